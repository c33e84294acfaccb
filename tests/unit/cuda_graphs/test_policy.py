"""Which graph a batch runs on, and which is captured for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cuda_graphs.fakes import ALL, DECODE, MIXED, SIZES, decode, fits, mixed
from vllm_compile_ext.cuda_graphs.memory import FULL, PIECEWISE
from vllm_compile_ext.cuda_graphs.session import (
    BATCHES,
    BATCHES_BETWEEN,
    BATCHES_PADDED,
    BATCHES_POSTPONED,
    PAD_FACTOR,
    PAD_FREELY,
    Plan,
    Policy,
    Shape,
)


def ask(policy: Policy, best: Shape) -> Plan:
    """A batch whose plan is carried out."""
    plan = policy.plan(best, fits(best, policy.captured))
    if plan.capture is not None:
        policy.mark_captured(plan.capture)
    return plan


def until_captured(policy: Policy, best: Shape) -> int:
    """How many batches it takes until the shape is captured, at most 100."""
    return next(n for n in range(1, 101) if ask(policy, best).capture == best)


# --- when a shape is captured


@pytest.mark.parametrize("best", [decode(128), mixed(128)])
def test_a_shape_without_any_graph_is_captured_after_a_few_batches_and_replayed(best: Shape) -> None:
    policy = Policy(ALL)
    assert until_captured(policy, best) == BATCHES[best.kind] < BATCHES_BETWEEN
    assert ask(policy, best) == Plan(None, best)


def test_decode_steps_without_any_graph_wait_neither_for_each_other_nor_after_a_prompts() -> None:
    policy = Policy(ALL)
    assert [ask(policy, decode(size)) for size in SIZES] == [Plan(s, None) for s in DECODE]  # ever larger
    policy = Policy(ALL)
    until_captured(policy, mixed(256))  # too large to serve it
    assert ask(policy, decode(1)).capture == decode(1)


def test_where_a_larger_graph_serves_a_shape_is_captured_later() -> None:
    policy = Policy(ALL)
    ask(policy, decode(16))
    plans = [ask(policy, decode(8)) for _ in range(BATCHES_PADDED)]
    assert plans == [Plan(None, decode(16))] * (BATCHES_PADDED - 1) + [Plan(decode(8), decode(16))]


def test_captures_that_can_wait_are_apart() -> None:
    policy = Policy(ALL)
    # Sizes take turns, so that all are asked for equally often.
    numbers = [number for number in range(200) if ask(policy, MIXED[number % len(MIXED)]).capture]
    assert len(numbers) >= 3
    assert min(b - a for a, b in pairwise(numbers)) >= BATCHES_BETWEEN


def test_after_a_failure_others_wait_as_after_a_capture() -> None:
    policy = Policy(ALL)
    for _ in range(BATCHES[PIECEWISE] - 1):
        ask(policy, mixed(128))
    policy.bar([mixed(256)], "no")
    assert until_captured(policy, mixed(128)) == BATCHES_BETWEEN


def test_misses_of_neighbouring_sizes_count_together_and_their_graph_serves_them() -> None:
    sizes = [Shape(PIECEWISE, tokens) for tokens in (136, 144, 192, 248, 200)]
    policy = Policy(sizes)
    for number, best in enumerate(sizes[:4], 1):
        assert ask(policy, best).capture == (best if number == BATCHES[PIECEWISE] else None)
    assert policy.plan(sizes[4], policy.captured) == Plan(None, sizes[3])


def test_the_count_of_misses_starts_again_after_a_capture() -> None:
    small, large = Shape(PIECEWISE, 136), Shape(PIECEWISE, 248)
    policy = Policy([small, large])
    until_captured(policy, small)
    for _ in range(BATCHES[PIECEWISE] - 1):
        assert policy.plan(large, []).capture is None  # the small one does not fit it


# --- padding


@pytest.mark.parametrize("kind", [FULL, PIECEWISE])
@pytest.mark.parametrize("tokens", [1, 32, 1000])
def test_batches_are_padded_freely_up_to_a_size_and_by_a_factor_beyond(kind: str, tokens: int) -> None:
    best, most = Shape(kind, tokens), max(PAD_FREELY, PAD_FACTOR * tokens)
    policy = Policy([best])
    assert policy.plan(best, [Shape(kind, most)]).otherwise == Shape(kind, most)
    for other in (most + 1, tokens - 1):
        assert policy.plan(best, [Shape(kind, other)]).otherwise is None


@pytest.mark.parametrize(
    ("captured", "chosen"),
    [
        ([decode(64), decode(16), decode(32)], decode(16)),
        ([mixed(8), decode(64)], decode(64)),
        ([mixed(32), mixed(16)], mixed(16)),
    ],
)
def test_the_nearest_graph_serves_and_one_of_a_whole_step_before_others(captured: list[Shape], chosen: Shape) -> None:
    assert Policy(ALL).plan(decode(8), captured).otherwise == chosen


# --- barred and postponed


def test_a_barred_shape_is_never_captured_and_runs_on_a_larger_one_or_on_none() -> None:
    policy = Policy(DECODE)
    policy.bar([decode(8)], "out of memory")
    assert {ask(policy, decode(8)) for _ in range(50)} == {Plan(None, None)}
    ask(policy, decode(16))
    assert {ask(policy, decode(8)) for _ in range(50)} == {Plan(None, decode(16))}
    assert policy.barred == {decode(8): "out of memory"}
    assert policy.left == [s for s in DECODE if s not in (decode(8), decode(16))]


def test_a_postponed_shape_is_planned_again_after_many_batches_and_others_do_not_wait() -> None:
    policy = Policy(ALL)
    policy.plan(decode(8), [])
    policy.postpone(decode(8))
    # Not as after a capture: the next shape is captured at once.
    assert ask(policy, decode(1)).capture == decode(1)
    plans = [policy.plan(decode(8), [decode(16)]) for _ in range(BATCHES_POSTPONED - 1)]
    assert plans == [Plan(None, decode(16))] * (BATCHES_POSTPONED - 2) + [Plan(decode(8), decode(16))]
    for _ in range(BATCHES[PIECEWISE] - 1):
        policy.plan(mixed(128), [])
        policy.postpone(mixed(256))
    assert policy.plan(mixed(128), []).capture == mixed(128)


# --- while idle


def idle(policy: Policy, remembered: bool = False) -> Iterator[Shape]:
    while (shape := policy.next_idle(remembered=remembered)) is not None:
        policy.mark_captured(shape)
        yield shape


def test_idle_captures_begin_with_what_traffic_asked_for_then_decode_steps_from_small_to_large() -> None:
    assert list(idle(Policy(ALL))) == DECODE + MIXED
    policy = Policy(ALL, {mixed(64): 2, decode(256): 30, decode(1): 5})
    policy.bar([decode(1)], "no")
    for _ in range(3):
        policy.plan(mixed(8), [])
    found = list(idle(policy))
    assert found[:5] == [decode(256), mixed(8), mixed(64), decode(2), decode(4)]
    assert sorted(found) == sorted(set(ALL) - {decode(1)})


def test_before_the_first_batch_only_what_earlier_starts_had_captured_is_left_and_nothing_after_it() -> None:
    used = {mixed(64): BATCHES[PIECEWISE], mixed(8): BATCHES[PIECEWISE] - 1, decode(2): BATCHES[FULL], decode(4): 9}
    assert list(idle(Policy(ALL, used), remembered=True)) == [decode(4), mixed(64), decode(2)]
    policy = Policy(ALL, used)
    ask(policy, decode(1))
    assert policy.next_idle(remembered=True) is None


# --- whatever the traffic

traffic = st.lists(st.tuples(st.sampled_from(ALL), st.sampled_from(["captured", "captured", "failed", "stop"])))


def serve(policy: Policy, batches: list[tuple[Shape, str]], order: int) -> list[Plan]:
    """Carry out each plan; `order` is that in which the captured shapes are listed, which differs between ranks."""
    plans = []
    for best, outcome in batches:
        compatible = sorted(fits(best, policy.captured), key=lambda s: (s.tokens * order, s.kind))
        plans.append(plan := policy.plan(best, compatible))
        if plan.capture is None:
            continue
        if outcome == "captured":
            policy.mark_captured(plan.capture)
        else:
            stopped = [s for s in policy.left if s.kind == plan.capture.kind]
            policy.bar([plan.capture] if outcome == "failed" else stopped, outcome)
    return plans


@given(traffic, st.dictionaries(st.sampled_from(ALL), st.integers(1, 100)))
def test_ranks_with_the_same_batches_plan_the_same_whatever_they_remember(
    batches: list[tuple[Shape, str]], remembered: dict[Shape, int]
) -> None:
    one, other = Policy(ALL), Policy(ALL, remembered)
    assert serve(one, batches, 1) == serve(other, batches, -1)
    assert (one.captured, one.barred) == (other.captured, other.barred)


@given(traffic)
def test_each_plan_can_be_carried_out(batches: list[tuple[Shape, str]]) -> None:
    policy, last = Policy(ALL), -BATCHES_BETWEEN
    for number, batch in enumerate(batches):
        captured, barred = set(policy.captured), set(policy.barred)
        best = batch[0]
        (plan,) = serve(policy, [batch], 1)
        if plan.otherwise is not None:
            assert plan.otherwise in captured
            assert best.tokens <= plan.otherwise.tokens <= max(PAD_FREELY, PAD_FACTOR * best.tokens)
        if best in captured:
            assert plan == Plan(None, best)
        if plan.capture is not None:
            assert plan.capture == best
            assert best not in captured | barred
            urgent = best.kind == FULL and plan.otherwise is None
            assert urgent or number - last >= BATCHES_BETWEEN
            last = number
        assert not policy.captured & policy.barred.keys()


@given(st.lists(st.sampled_from(ALL), max_size=60), st.sampled_from(ALL))
def test_what_is_asked_for_again_and_again_is_captured(before: list[Shape], shape: Shape) -> None:
    policy = Policy(ALL)
    for best in before:
        ask(policy, best)
    for _ in range(max(BATCHES_PADDED, BATCHES_BETWEEN)):
        ask(policy, shape)
    assert shape in policy.captured
