"""Which graph a batch runs on, and which is captured for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cuda_graphs.fakes import ALL, DECODE, MIXED, decode, fits, mixed
from vllm_compile_ext.cuda_graphs.memory import FULL, PIECEWISE
from vllm_compile_ext.cuda_graphs.session import (
    BATCHES,
    BATCHES_BETWEEN,
    BATCHES_FAR,
    BATCHES_PADDED,
    BATCHES_POSTPONED,
    PAD_FACTOR,
    PAD_FREELY,
    Plan,
    Policy,
    Shape,
    Times,
)


def ask(policy: Policy, best: Shape) -> Plan:
    """A batch whose plan is carried out."""
    plan = policy.plan(best, fits(best, policy.captured))
    if plan.capture is not None:
        policy.mark_captured(plan.capture)
    return plan


def until_captured(policy: Policy, best: Shape) -> int:
    """How many batches it takes until the shape is captured, at most 200."""
    return next(n for n in range(1, 201) if ask(policy, best).capture == best)


# --- when a shape is captured


@pytest.mark.parametrize(
    ("before", "best", "batches"),
    [
        (None, decode(128), BATCHES[FULL]),
        (None, mixed(128), BATCHES[PIECEWISE]),
        (mixed(1), decode(128), BATCHES[FULL]),  # too small to serve it
        (mixed(1), mixed(128), BATCHES_BETWEEN),
        (decode(16), decode(8), BATCHES_PADDED),
        (mixed(16), mixed(8), BATCHES_PADDED),
    ],
)
def test_a_shape_is_captured_after_some_batches_and_replayed(before: Shape | None, best: Shape, batches: int) -> None:
    policy = Policy(ALL)
    if before:
        until_captured(policy, before)
    assert until_captured(policy, best) == batches
    assert ask(policy, best) == Plan(None, best)


@pytest.mark.parametrize("kind", [decode, mixed])
def test_what_runs_on_a_much_larger_graph_has_its_own_soon(kind: Callable[[int], Shape]) -> None:
    policy = Policy(ALL, times={kind(256): Times(9, 60), kind(1): Times(4, 50)})
    policy.mark_captured(kind(256))
    assert until_captured(policy, kind(8)) == BATCHES_FAR
    assert until_captured(policy, kind(128)) == BATCHES_PADDED


def test_what_is_due_but_can_wait_waits_after_a_failure_as_after_a_capture() -> None:
    policy = Policy(ALL)
    for _ in range(BATCHES[PIECEWISE] - 1):
        ask(policy, mixed(128))
    policy.bar([mixed(256)], "no")
    assert until_captured(policy, mixed(128)) == BATCHES_BETWEEN
    ask(policy, decode(16))
    for _ in range(BATCHES_PADDED - 1):
        ask(policy, decode(8))
    assert ask(policy, decode(32)).capture == decode(32)
    assert until_captured(policy, decode(8)) == BATCHES_BETWEEN


def test_misses_of_neighbouring_sizes_count_together_from_the_last_capture_and_one_graph_serves_them() -> None:
    sizes = [Shape(PIECEWISE, tokens) for tokens in (136, 144, 192, 248)]
    small, large = Shape(PIECEWISE, 129), Shape(PIECEWISE, 256)
    policy = Policy([*sizes, small, large])
    for number, best in enumerate(sizes, 1):
        assert ask(policy, best).capture == (best if number == BATCHES[PIECEWISE] else None)
    assert policy.plan(small, policy.captured) == Plan(None, sizes[3])
    for _ in range(BATCHES_BETWEEN):  # enough of them apart, but too few misses
        policy.plan(decode(1), [decode(1)])
    for _ in range(BATCHES[PIECEWISE] - 1):
        assert policy.plan(large, []).capture is None


def test_a_postponed_shape_is_planned_again_after_many_batches_and_others_do_not_wait() -> None:
    policy = Policy(ALL)
    policy.plan(decode(8), [])
    policy.postpone(decode(8))
    plans = [policy.plan(decode(8), [decode(16)]) for _ in range(BATCHES_POSTPONED)]
    assert plans == [Plan(None, decode(16))] * (BATCHES_POSTPONED - 1) + [Plan(decode(8), decode(16))]
    for _ in range(BATCHES[PIECEWISE] - 1):
        policy.plan(mixed(128), [])
        policy.postpone(mixed(256))
    assert policy.plan(mixed(128), []).capture == mixed(128)  # not as after a capture


# --- whether a larger graph pays


def fast(best: Shape, larger: Shape, times: dict[Shape, Times]) -> bool:
    """Whether a batch for which stock has `best` runs on the graph of `larger` rather than without one."""
    policy = Policy(ALL, times=times)
    policy.mark_captured(larger)
    return policy.plan(best, fits(best, [larger])).otherwise == larger


@pytest.mark.parametrize(
    ("best", "larger", "times", "expected"),
    [
        (mixed(8), mixed(64), {}, True),
        (mixed(8), mixed(128), {}, False),
        (mixed(128), mixed(256), {}, True),
        # Large and still faster than to launch every kernel; small and slower.
        (mixed(8), mixed(256), {mixed(256): Times(9, 60), mixed(4): Times(4, 50)}, True),
        (mixed(128), mixed(256), {mixed(256): Times(20, 25), mixed(128): Times(11, 15)}, False),
        (mixed(128), mixed(256), {mixed(256): Times(15, 25), mixed(128): Times(11, 15)}, True),
        # Measured is what is nearest below; where that is nothing of its kind, its size decides.
        (mixed(128), mixed(256), {mixed(256): Times(20, 25), mixed(64): Times(9, 21), mixed(1): Times(4, 10)}, True),
        (mixed(64), mixed(256), {mixed(256): Times(20, 25), mixed(128): Times(9, 21), decode(1): Times(4, 50)}, False),
        (decode(8), mixed(256), {mixed(256): Times(9, 60), decode(1): Times(4, 50)}, True),
        (decode(8), mixed(256), {mixed(256): Times(9, 60), mixed(1): Times(4, 50)}, False),
    ],
)
def test_a_larger_graph_serves_where_it_is_faster_than_none(
    best: Shape, larger: Shape, times: dict[Shape, Times], expected: bool
) -> None:
    assert fast(best, larger, times) is expected


@given(
    st.dictionaries(st.sampled_from(ALL), st.tuples(st.integers(1, 99), st.integers(1, 99)).map(lambda t: Times(*t)))
)
def test_no_measured_graph_serves_that_is_slower_than_a_smaller_step_without_one(times: dict[Shape, Times]) -> None:
    for best, larger in [(mixed(8), mixed(64)), (decode(8), decode(256)), (mixed(128), mixed(256))]:
        smaller = [times[s].without for s in times if s.kind == best.kind and s.tokens <= best.tokens]
        if larger in times and fast(best, larger, times):
            assert not smaller or times[larger].graph <= max(smaller)


# --- between requests


def gap(policy: Policy, everything: bool = False) -> Iterator[Shape]:
    while (shape := policy.next_in_gap(everything=everything)) is not None:
        (policy.measured.add if shape in policy.captured else policy.mark_captured)(shape)
        yield shape


def test_gaps_take_everything_the_most_used_first_then_decode_steps_from_small_to_large_and_measure_them() -> None:
    assert list(gap(Policy(ALL), everything=True)) == DECODE + MIXED + ALL
    policy = Policy(ALL, {mixed(64): 2, decode(256): 30, decode(1): 5}, {mixed(8): Times(1, 2)})
    policy.bar([decode(1)], "no")
    for _ in range(3):
        policy.plan(mixed(8), [])
    found = list(gap(policy, everything=True))
    assert found[:5] == [decode(256), mixed(8), mixed(64), decode(2), decode(4)]
    assert found[len(ALL) - 1 :] == [s for s in ALL if s not in (decode(1), mixed(8))]
    assert sorted(set(found)) == sorted(set(ALL) - {decode(1)})


def test_gaps_take_what_earlier_starts_had_captured_and_what_traffic_asks_for_now() -> None:
    used = {mixed(64): BATCHES[PIECEWISE], mixed(8): BATCHES[PIECEWISE] - 1, decode(2): BATCHES[FULL], decode(4): 9}
    policy = Policy(ALL, used, dict.fromkeys(ALL, Times(1, 2)))
    assert list(gap(policy)) == [decode(4), mixed(64), decode(2)]
    policy.plan(mixed(32), [mixed(64)])
    policy.plan(decode(1), [decode(2)])
    policy.plan(decode(4), [])
    assert list(gap(policy)) == [decode(1), mixed(32)]


def test_in_a_first_start_gaps_take_sizes_up_to_twice_the_last_of_each_kind() -> None:
    sizes = [*range(1, 8), *range(8, 257, 8)]
    policy = Policy([Shape(kind, tokens) for kind in (FULL, PIECEWISE) for tokens in sizes])
    ladder = [1 << n for n in range(9)]
    assert [(s.kind, s.tokens) for s in gap(policy)][: 2 * len(ladder)] == [
        (kind, tokens) for kind in (FULL, PIECEWISE) for tokens in ladder
    ]
    assert len(policy.captured) == 2 * len(ladder)


def test_after_it_slept_gaps_wait_for_a_batch_that_runs() -> None:
    policy = Policy(ALL)
    policy.sleep()
    assert policy.next_in_gap(everything=True) is None
    policy.plan(decode(8), [])
    assert policy.next_in_gap(everything=True) == decode(8)


def test_where_there_was_no_memory_gaps_leave_it_alone_for_many_batches() -> None:
    policy = Policy(ALL)
    policy.plan(decode(8), [])
    policy.postpone(decode(8))
    for _ in range(BATCHES_POSTPONED):
        assert policy.next_in_gap(everything=True) is None
        policy.plan(decode(8), [])
    assert policy.next_in_gap(everything=True) == decode(8)


# --- whatever the traffic

outcomes = st.sampled_from(["captured"] * 4 + ["failed", "stop"])
# Runs of batches of one size.
runs = st.lists(st.tuples(st.sampled_from(ALL), outcomes, st.sampled_from([1, 4, BATCHES_PADDED])))
traffic = runs.map(lambda made: [(shape, outcome) for shape, outcome, batches in made for _ in range(batches)])


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
def test_the_nearest_graph_serves_and_what_cannot_wait_for_one_is_captured_and_the_rest_apart(
    batches: list[tuple[Shape, str]],
) -> None:
    policy, last = Policy(ALL), -BATCHES_BETWEEN
    for number, batch in enumerate(batches):
        best, captured, barred = batch[0], set(policy.captured), set(policy.barred)
        (plan,) = serve(policy, [batch], 1)
        if best in captured:
            assert plan == Plan(None, best)
            continue
        # Padded freely up to a size, and by a factor beyond; a graph of a whole step serves before others.
        near = [s for s in fits(best, captured) if s.tokens <= max(PAD_FREELY, PAD_FACTOR * best.tokens)]
        assert plan.otherwise == min(near, key=lambda s: (s.kind == PIECEWISE, s.tokens), default=None)
        urgent = best.kind == FULL and not near
        if plan.capture is None:
            assert best in barred or not urgent
        else:
            assert plan.capture == best
            assert best not in barred
            assert urgent or number - last >= BATCHES_BETWEEN
            last = number
        assert set(policy.left) == set(ALL) - policy.captured - policy.barred.keys()


@given(st.lists(st.sampled_from(ALL), max_size=60), st.sampled_from(ALL))
def test_what_is_asked_for_again_and_again_is_captured(before: list[Shape], shape: Shape) -> None:
    policy = Policy(ALL)
    for best in before:
        ask(policy, best)
    for _ in range(max(BATCHES_PADDED, BATCHES_BETWEEN)):
        ask(policy, shape)
    assert shape in policy.captured
