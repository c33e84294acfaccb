"""Which graph a batch runs on, and which is captured for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cuda_graphs.shapes import ALL, DECODE, MIXED, SIZES, decode, fits, mixed
from vllm_compile_ext.cuda_graphs.policy import (
    BATCHES,
    BATCHES_BETWEEN,
    BATCHES_PADDED,
    BATCHES_POSTPONED,
    FULL,
    PAD_FACTOR,
    PAD_FREELY,
    PIECEWISE,
    Plan,
    Policy,
    Shape,
)


def ask(policy: Policy, best: Shape) -> Plan:
    """A batch whose plan is carried out."""
    plan = policy.plan(best, fits(best, policy.captured))
    if plan.capture is not None:
        policy.done(plan.capture)
    return plan


def until_captured(policy: Policy, best: Shape) -> int:
    """How many batches it takes until the shape is captured, at most 100."""
    return next(n for n in range(1, 101) if ask(policy, best).capture == best)


# --- when a shape is captured


def test_a_decode_step_is_captured_for_its_first_batch_and_replayed_for_the_next() -> None:
    policy = Policy(ALL)
    assert ask(policy, decode(1)) == Plan(decode(1), None)
    assert ask(policy, decode(1)) == Plan(None, decode(1))


@pytest.mark.parametrize("kind", [FULL, PIECEWISE])
def test_a_shape_without_any_graph_is_captured_after_a_few_batches(kind: str) -> None:
    assert (
        until_captured(Policy(ALL), Shape(kind, 128, f"{'decode' if kind == FULL else 'mixed'} 128")) == (BATCHES[kind])
    )


def test_decode_steps_without_any_graph_do_not_wait_for_each_other() -> None:
    policy = Policy(ALL)
    # Each is larger than what was captured before.
    assert [ask(policy, decode(size)).capture for size in SIZES] == DECODE


def test_where_a_larger_graph_serves_a_shape_is_captured_later() -> None:
    policy = Policy(ALL)
    ask(policy, decode(16))
    plans = [ask(policy, decode(8)) for _ in range(BATCHES_PADDED)]
    assert plans[:-1] == [Plan(None, decode(16))] * (BATCHES_PADDED - 1)
    assert plans[-1] == Plan(decode(8), decode(16))


def test_captures_that_can_wait_are_apart() -> None:
    policy = Policy(ALL)
    captured = []
    for number in range(200):  # sizes take turns, so that all are asked for equally often
        if plan := ask(policy, MIXED[number % len(MIXED)]).capture:
            captured.append((number, plan))
    numbers = [number for number, _ in captured]
    assert len(captured) >= 3
    assert min(b - a for a, b in pairwise(numbers)) >= BATCHES_BETWEEN


def test_the_first_capture_waits_for_nothing() -> None:
    assert until_captured(Policy(ALL), mixed(256)) == BATCHES[PIECEWISE] < BATCHES_BETWEEN


def test_a_decode_step_without_any_graph_does_not_wait_after_a_capture() -> None:
    policy = Policy(ALL)
    until_captured(policy, mixed(256))  # too large to serve it
    assert ask(policy, decode(1)).capture == decode(1)


def test_after_a_failure_others_wait_as_after_a_capture() -> None:
    policy = Policy(ALL)
    for _ in range(BATCHES[PIECEWISE] - 1):
        ask(policy, mixed(128))
    policy.bar([mixed(256)], "no")
    assert until_captured(policy, mixed(128)) == BATCHES_BETWEEN


# --- padding


@pytest.mark.parametrize("best", [decode(1), mixed(1), decode(32), mixed(32)])
def test_small_batches_are_padded_freely(best: Shape) -> None:
    policy = Policy(ALL)
    policy.captured = {best._replace(tokens=PAD_FREELY)}
    assert policy.plan(best, policy.captured).otherwise in policy.captured
    policy.captured = {best._replace(tokens=PAD_FREELY + 1)}
    assert policy.plan(best, policy.captured).otherwise is None


@pytest.mark.parametrize("kind", [FULL, PIECEWISE])
def test_large_batches_are_padded_by_a_factor(kind: str) -> None:
    best, most = Shape(kind, 1000), PAD_FACTOR * 1000
    policy = Policy([best])
    assert policy.plan(best, [Shape(kind, most)]).otherwise == Shape(kind, most)
    assert policy.plan(best, [Shape(kind, most + 1)]).otherwise is None
    assert policy.plan(best, [Shape(kind, 999)]).otherwise is None  # never a smaller one


def test_the_nearest_graph_serves_and_one_of_a_whole_step_before_others() -> None:
    policy = Policy(ALL)
    assert policy.plan(decode(8), [decode(64), decode(16), decode(32)]).otherwise == decode(16)
    assert policy.plan(decode(8), [mixed(8), decode(64)]).otherwise == decode(64)
    assert policy.plan(decode(8), [mixed(32), mixed(16)]).otherwise == mixed(16)


# --- barred


def test_a_barred_shape_is_never_captured_and_runs_on_a_larger_one_or_on_none() -> None:
    policy = Policy(ALL)
    policy.bar([decode(8)], "out of memory")
    assert [ask(policy, decode(8)) for _ in range(50)] == [Plan(None, None)] * 50
    ask(policy, decode(16))
    assert [ask(policy, decode(8)) for _ in range(50)] == [Plan(None, decode(16))] * 50
    assert policy.barred == {decode(8): "out of memory"}


def test_what_is_left_is_neither_captured_nor_barred() -> None:
    policy = Policy(DECODE)
    ask(policy, decode(1))
    policy.bar([decode(2), decode(4)], "no")
    assert policy.left == DECODE[3:]


# --- postponed


def test_a_postponed_shape_is_planned_again_after_many_batches_and_others_do_not_wait() -> None:
    policy = Policy(ALL)
    policy.plan(decode(8), [])
    policy.postpone(decode(8))
    # Not as after a capture: the next shape is captured at once.
    assert ask(policy, decode(1)).capture == decode(1)
    plans = [policy.plan(decode(8), []) for _ in range(BATCHES_POSTPONED - 1)]
    assert [plan.capture for plan in plans] == [None] * (BATCHES_POSTPONED - 2) + [decode(8)]
    assert decode(8) in policy.left
    assert policy.barred == {}


def test_a_postponed_shape_runs_on_a_larger_one_meanwhile() -> None:
    policy = Policy(ALL)
    ask(policy, decode(16))
    policy.postpone(decode(8))
    assert {ask(policy, decode(8)) for _ in range(50)} == {Plan(None, decode(16))}


def test_other_captures_need_not_be_apart_from_one_that_was_postponed() -> None:
    policy = Policy(ALL)
    for _ in range(BATCHES[PIECEWISE] - 1):
        policy.plan(mixed(128), [])
        policy.postpone(mixed(256))
    assert policy.plan(mixed(128), []).capture == mixed(128)


# --- while idle


def idle(policy: Policy) -> Iterator[Shape]:
    while (shape := policy.next_idle()) is not None:
        policy.done(shape)
        yield shape


def test_idle_captures_go_through_all_shapes_decode_steps_first_from_small_to_large() -> None:
    assert list(idle(Policy(ALL))) == DECODE + MIXED


def test_idle_captures_begin_with_what_earlier_starts_used_the_most_used_first() -> None:
    policy = Policy(ALL, {mixed(64): 10, decode(256): 30, mixed(128): 20})
    found = list(idle(policy))
    assert found[:5] == [decode(256), mixed(128), mixed(64), decode(1), decode(2)]
    assert sorted(found) == sorted(ALL)


def test_idle_captures_count_what_this_start_used() -> None:
    policy = Policy(ALL, {mixed(64): 2})
    for _ in range(3):
        policy.plan(mixed(8), [])
    assert list(idle(policy))[:3] == [mixed(8), mixed(64), decode(1)]


def test_before_the_first_batch_only_what_earlier_starts_had_captured_is_left() -> None:
    often = {mixed(64): BATCHES[PIECEWISE], mixed(8): BATCHES[PIECEWISE] - 1, decode(2): BATCHES[FULL], decode(4): 9}
    policy = Policy(ALL, often)
    found = []
    while (shape := policy.next_remembered()) is not None:
        found.append(shape)
        policy.done(shape)
    assert found == [decode(4), mixed(64), decode(2)]


def test_after_the_first_batch_nothing_is_captured_for_earlier_starts() -> None:
    policy = Policy(ALL, {decode(4): 9})
    assert policy.next_remembered() == decode(4)
    ask(policy, decode(1))
    assert policy.next_remembered() is None


def test_idle_captures_leave_out_what_is_barred() -> None:
    policy = Policy(DECODE, {decode(1): 5})
    policy.bar([decode(1)], "no")
    assert list(idle(policy)) == DECODE[1:]
    assert policy.next_idle() is None


def test_shapes_of_another_configuration_are_not_remembered() -> None:
    assert Policy(DECODE, {mixed(8): 5, decode(8): 1}).remembered == {decode(8): 1}


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
            policy.done(plan.capture)
        else:
            failed = [plan.capture]
            stopped = [s for s in policy.left if s.kind == plan.capture.kind]
            policy.bar(failed if outcome == "failed" else stopped, outcome)
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
            limit = max(PAD_FREELY, PAD_FACTOR * best.tokens)
            assert best.tokens <= plan.otherwise.tokens <= limit
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


def test_misses_of_neighbouring_sizes_count_together_and_their_graph_serves_them() -> None:
    sizes = [Shape(PIECEWISE, tokens) for tokens in (136, 144, 192, 248, 200)]
    policy = Policy(sizes)
    for number, best in enumerate(sizes[:4], 1):
        plan = policy.plan(best, policy.captured)
        assert plan.capture == (best if number == BATCHES[PIECEWISE] else None)
    policy.done(sizes[3])
    assert policy.plan(sizes[4], policy.captured) == Plan(None, sizes[3])


def test_the_count_starts_again_after_a_capture() -> None:
    small, large = Shape(PIECEWISE, 136), Shape(PIECEWISE, 248)
    policy = Policy([small, large])
    for _ in range(BATCHES[PIECEWISE]):
        plan = policy.plan(small, [])
    assert plan.capture == small
    policy.done(small)
    for _ in range(BATCHES[PIECEWISE] - 1):
        assert policy.plan(large, []).capture is None  # the small one does not fit it
