"""How much device memory graphs may take."""

from __future__ import annotations

import pytest

from vllm_compile_ext.cuda_graphs.budget import ABSURD, LAYER, MARGIN, MIB, STEP, STEPS, UNASKED, Budget, estimate
from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE

MUCH = 1 << 40


def take(budget: Budget, kind: str, size: int) -> int:
    """A graph that took `size` bytes, all of them through this process's allocator."""
    return budget.took(kind, size, size)


def test_the_estimate_is_a_part_for_each_layer_in_each_graph() -> None:
    assert estimate(80, {}) == STEPS
    assert estimate(80, {FULL: 51, PIECEWISE: 0}) == 51 * 80 * LAYER[FULL] + STEPS
    both = estimate(80, {FULL: 51, PIECEWISE: 51})
    assert both == 51 * 80 * (LAYER[FULL] + LAYER[PIECEWISE]) + STEPS


def test_the_estimate_of_the_measured_model_is_what_stock_expects() -> None:
    # n70 on an H100: 80 layers, 51 sizes; stock's capture while it profiles memory found 0.79 GiB.
    assert 0.8 * 0.79 * 1024 * MIB <= estimate(80, {FULL: 51, PIECEWISE: 51}) <= 0.79 * 1024 * MIB


def test_a_first_graph_is_expected_to_take_the_estimate_and_the_next_the_mean_with_it() -> None:
    budget = Budget(limit=MUCH, layers=80)
    estimated = budget.expected(FULL)
    assert estimated == 80 * LAYER[FULL]
    assert take(budget, FULL, 10 * MIB) == 10 * MIB
    assert budget.expected(FULL) == (estimated + 10 * MIB) // 2
    take(budget, FULL, 2 * MIB)
    assert budget.expected(FULL) == (estimated + 12 * MIB) // 3
    take(budget, FULL, STEP)  # has room for others
    assert budget.expected(FULL) == (estimated + 12 * MIB) // 3
    take(budget, FULL, STEP)
    assert budget.expected(FULL) == (estimated + 12 * MIB + STEP) // 4
    assert budget.expected(PIECEWISE) == 80 * LAYER[PIECEWISE]
    assert budget.held == 12 * MIB + 2 * STEP


def test_a_first_graph_is_expected_to_take_what_those_of_an_earlier_start_did() -> None:
    budget = Budget(limit=MUCH, layers=80, each={FULL: 3 * MIB})
    assert budget.expected(FULL) == 3 * MIB
    assert budget.expected(PIECEWISE) == 80 * LAYER[PIECEWISE]
    take(budget, FULL, 5 * MIB)
    assert budget.expected(FULL) == 4 * MIB


@pytest.mark.parametrize("layers", [8, 32, 80])
def test_one_graph_that_took_a_step_of_torchs_does_not_use_up_the_room_for_others(layers: int) -> None:
    # What a start remembers after few graphs of each kind.
    before = Budget(limit=MUCH, layers=layers)
    for kind in (FULL, PIECEWISE):
        for _ in range(5):
            take(before, kind, layers * LAYER[kind])
    each = {kind: before.expected(kind) for kind in (FULL, PIECEWISE)}
    budget = Budget(limit=before.needed({}, {FULL: 46, PIECEWISE: 46}), layers=layers, each=each)
    take(budget, FULL, 22 * MIB)
    assert budget.over(PIECEWISE, later=50) is None


def test_graphs_that_share_the_drivers_steps_are_not_expected_to_take_nothing() -> None:
    """A small model: of three graphs, the driver gave one a step of 2 MiB."""
    budget = Budget(limit=MUCH, layers=8)
    for size in (2, 0, 0):
        take(budget, FULL, size * MIB)
    assert MIB // 2 < budget.expected(FULL) < MIB


def test_memory_that_grew_counts_as_a_graph_of_nothing() -> None:
    budget = Budget(limit=MUCH, layers=1, each={FULL: 2 * MIB})
    assert take(budget, FULL, -5) == 0
    assert (budget.held, budget.expected(FULL)) == (0, MIB)


def test_what_another_process_took_during_a_capture_does_not_count() -> None:
    budget = Budget(limit=MUCH, layers=80)
    most = ABSURD * 80 * LAYER[FULL]  # of the driver's memory, which torch does not know
    assert budget.took(FULL, 3 * MIB + most + 1, 3 * MIB) == 3 * MIB + most
    assert budget.took(FULL, 1 << 36, 0) == most
    assert budget.took(FULL, 1 << 36, -MIB) == most  # torch gave memory back meanwhile
    assert budget.held == 3 * MIB + 3 * most


def test_what_the_device_says_counts_and_not_what_torch_says() -> None:
    budget = Budget(limit=MUCH, layers=80)
    assert budget.took(FULL, MIB, 0) == MIB  # the driver's memory alone
    assert budget.took(FULL, 0, 20 * MIB) == 0  # torch had it before
    assert budget.held == MIB


def test_a_graph_is_refused_when_the_limit_would_be_passed() -> None:
    budget = Budget(limit=10 * MIB, layers=1, each={FULL: 5 * MIB})
    take(budget, FULL, 5 * MIB)
    assert budget.over(FULL) is None  # 5 more are expected, just what is left
    take(budget, FULL, 4 * MIB)
    assert budget.over(FULL) == "the 10 MiB for CUDA graphs are used up"
    # The other kind is smaller here, and there is room for it.
    assert budget.over(PIECEWISE) is None


def test_room_is_left_for_a_part_of_the_decode_steps_to_come() -> None:
    budget = Budget(limit=20 * MIB, layers=1, each={FULL: 4 * MIB, PIECEWISE: 4 * MIB})
    take(budget, FULL, 4 * MIB)
    take(budget, PIECEWISE, 4 * MIB)
    assert budget.over(PIECEWISE, later=8) is None  # 8 of the 12 MiB left are for them
    assert budget.over(PIECEWISE, later=12) == "the 20 MiB for CUDA graphs are used up but for 12 MiB for decode steps"
    assert budget.over(FULL) is None


def test_a_graph_is_refused_when_the_device_is_full() -> None:
    budget = Budget(limit=0, layers=80)  # which is another question
    needed = budget.expected(FULL) + MARGIN
    assert budget.short(FULL, needed) is None
    assert budget.short(FULL, needed - 1) == f"only {(needed - 1) / MIB:.0f} MiB are free on the device"


def test_the_margin_is_what_stays_free() -> None:
    budget = Budget(limit=MUCH, layers=80, margin=7 * MIB)
    needed = budget.expected(PIECEWISE) + 7 * MIB
    assert budget.short(PIECEWISE, needed) is None
    assert budget.short(PIECEWISE, needed - 1) is not None


@pytest.mark.parametrize("kind", [FULL, PIECEWISE])
def test_with_nothing_kept_free_nothing_is_captured(kind: str) -> None:
    assert Budget(limit=0, layers=1).over(kind) is not None


def test_the_next_start_keeps_free_what_is_held_what_was_asked_for_and_a_part_of_the_rest() -> None:
    budget = Budget(limit=MUCH, layers=1, each={FULL: 4 * MIB, PIECEWISE: 8 * MIB})
    assert budget.needed({}, {}) == STEPS
    take(budget, FULL, 4 * MIB)
    take(budget, PIECEWISE, 8 * MIB)
    held, rest = 12 * MIB + STEPS, int(UNASKED * 120 * MIB)
    assert budget.needed({}, {}) == held
    assert budget.needed({FULL: 2, PIECEWISE: 1}, {}) == held + (8 + 8) * MIB
    assert budget.needed({}, {FULL: 10, PIECEWISE: 10}) == held + rest
    assert budget.needed({FULL: 2, PIECEWISE: 1}, {FULL: 10, PIECEWISE: 10}) == held + (8 + 8) * MIB + rest


@pytest.mark.parametrize("piecewise_first", [False, True])
def test_a_start_may_capture_what_the_one_before_it_needed(piecewise_first: bool) -> None:
    budget = Budget(limit=100 * MIB, layers=1, each={FULL: 4 * MIB, PIECEWISE: 6 * MIB})
    for _ in range(5):
        take(budget, FULL, 4 * MIB)
        take(budget, PIECEWISE, 6 * MIB)
    asked, unasked = {FULL: 3, PIECEWISE: 3}, {FULL: 20, PIECEWISE: 20}
    each = {kind: budget.expected(kind) for kind in asked}
    after = Budget(limit=budget.needed(asked, unasked), layers=80, each=each)  # an estimate would be much more
    order = {FULL: 4 * MIB, PIECEWISE: 6 * MIB}
    for kind in sorted(order, reverse=piecewise_first):
        for _ in range(5 + 3):
            assert after.over(kind, later=28 if kind == PIECEWISE and piecewise_first else 0) is None
            take(after, kind, order[kind])
    more = 0
    while after.over(FULL) is None:
        take(after, FULL, 4 * MIB)
        more += 1
    assert more == int(UNASKED * (20 * 4 + 20 * 6) * MIB + STEPS) // (4 * MIB)
