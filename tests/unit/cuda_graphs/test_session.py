"""One model's graphs while it serves, on a device that only counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cuda_graphs.fakes import ALL, DECODE, GRAPH, MIXED, MUCH, Gpu, ask, decode, mixed, places
from vllm_compile_ext.cuda_graphs import memory
from vllm_compile_ext.cuda_graphs.memory import FULL, LAYER, MARGIN, MIB, PIECEWISE, History
from vllm_compile_ext.cuda_graphs.session import BATCHES, BATCHES_PADDED, BATCHES_POSTPONED, FAILURES, Session, Shape
from vllm_compile_ext.record import metrics


def ask_all(made: Session) -> list[Shape | None]:
    return [ask(made, shape) for shape in ALL * (BATCHES_PADDED + 4)]


# --- captures and counts


@pytest.mark.parametrize(
    ("kept", "words"), [(True, "kept free for them:"), (False, "of what the KV cache leaves they may take")]
)
def test_the_start_says_how_many_shapes_and_how_much_is_kept_free(
    caplog: pytest.LogCaptureFixture, kept: bool, words: str
) -> None:
    caplog.set_level("INFO")
    Gpu().session(limit=1 << 29, base=1 << 28, kept=kept)
    assert caplog.messages == [
        f"CUDA graphs are captured on demand: {len(ALL)} shapes, none at start; {words} 0.75 GiB (an estimate)"
    ]


def test_batches_are_counted_by_what_they_ran_on_and_captures_with_seconds_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(metrics, "inc", lambda name, by=1, **kind: seen.append((name, by, kind)))
    monkeypatch.setattr(metrics, "set", lambda name, to: seen.append((name, to, {})))
    gpu = Gpu(others=1 << 34)
    made = gpu.session(base=7 * MIB)
    found = [ask(made, mixed(256)) for _ in range(BATCHES[PIECEWISE] + 2)]
    assert found == [None] * (BATCHES[PIECEWISE] - 1) + [mixed(256)] * 3
    seen.clear()
    assert [ask(made, decode(size)) for size in (8, 4)] == [decode(8)] * 2
    held = 2 * GRAPH + memory.ABSURD * (LAYER[FULL] + LAYER[PIECEWISE])  # not what another process took meanwhile
    assert sorted(seen) == [
        ("graph_bytes", 7 * MIB + held, {}),
        ("graph_capture_seconds_total", made.seconds[1], {}),
        ("graphs_captured_total", 1, {"kind": FULL}),
        *[("graphs_replayed_total", 1, {"kind": FULL})] * 2,
    ]
    assert made.counts == {
        "captured": {PIECEWISE: 1, FULL: 1},
        "missed": {PIECEWISE: BATCHES[PIECEWISE] - 1},
        "replayed": {PIECEWISE: 3, FULL: 2},
        "skipped": {},
    }
    assert (len(made.seconds), made.budget.held) == (2, held)
    assert gpu.tried == [mixed(256), decode(8)]


# --- failures


def test_a_failure_bars_its_shape_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu(failing=[decode(8)])
    made = gpu.session()
    assert [ask(made, decode(8)) for _ in range(50)] == [None] * 50
    assert gpu.tried == [decode(8)]
    assert caplog.messages == [
        "batches of 8 tokens run without a FULL CUDA graph, capturing it failed "
        "(RuntimeError: CUDA error: operation not permitted when stream is capturing)"
    ]
    assert made.policy.barred.keys() == {decode(8)}
    assert (made.counts["skipped"], made.counts["missed"], made.budget.held) == ({FULL: 1}, {FULL: 50}, 0)
    assert [ask(made, decode(size)) for size in (16, 8)] == [decode(16)] * 2


def test_failures_stop_all_captures_and_graphs_that_are_there_stay(caplog: pytest.LogCaptureFixture) -> None:
    bad = [decode(1), decode(2), decode(4)]
    assert len(bad) == FAILURES
    gpu = Gpu(failing=bad)
    made = gpu.session()
    made.capture(mixed(256))
    for shape in bad:
        ask(made, shape)
    ask_all(made)
    assert gpu.tried == [mixed(256), *bad]
    assert [" and no more are captured" in line for line in caplog.messages] == [False, False, True]
    assert made.policy.barred.keys() == set(ALL) - {mixed(256)}
    assert made.counts["skipped"] == {FULL: len(DECODE), PIECEWISE: len(MIXED) - 1}
    assert ask(made, mixed(256)) == mixed(256)


# --- the budget


def test_the_budget_stops_one_kind_once_and_leaves_the_other_alone(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()
    # With one layer the first graph of the other kind is expected to be small: it still fits.
    made = gpu.session(limit=2 * GRAPH + MIB)
    for shape in [decode(1), decode(8), *DECODE * 20]:
        ask(made, shape)
    assert gpu.tried == [decode(1), decode(8)]
    assert caplog.messages == [
        "no more FULL CUDA graphs are captured, the 9 MiB for CUDA graphs are used up: "
        f"2 shapes have one, {len(DECODE) - 2} run without; the next start keeps more free"
    ]
    assert made.counts["skipped"] == {FULL: len(DECODE) - 2}
    for _ in range(20):
        ask(made, mixed(256))
    assert mixed(256) in made.policy.captured


@pytest.mark.parametrize(("kept", "margin"), [(True, MARGIN), (False, memory.UNKEPT_MARGIN)])
def test_a_full_device_postpones_captures_though_the_budget_is_not_used_up(
    caplog: pytest.LogCaptureFixture, kept: bool, margin: int
) -> None:
    gpu = Gpu(free=margin + GRAPH, unused=2 * GRAPH)
    made = gpu.session(kept=kept)
    ask(made, decode(8))
    assert gpu.given_back == 0
    for size in (16, 32, 64, 128, 256):
        ask(made, decode(size))
    assert gpu.tried == [decode(8), decode(16), decode(32)]
    assert made.budget.held == 3 * GRAPH  # not what torch gave back of its unused memory before the second
    assert caplog.messages == [f"a FULL CUDA graph waits: only {margin // MIB} MiB are free on the device"]
    assert (gpu.memory, gpu.given_back) == (margin, 4)
    assert (made.policy.barred, made.counts["skipped"]) == ({}, {})


@given(
    st.permutations(ALL * 3),
    st.lists(st.integers(0, 24 * MIB), min_size=len(ALL), max_size=len(ALL)),
    st.booleans(),
    st.integers(0, 3 * MARGIN),
)
def test_whatever_the_order_graphs_leave_free_what_a_step_may_need_beside_them(
    order: list[Shape], sizes: list[int], kept: bool, more: int
) -> None:
    margin = MARGIN if kept else memory.UNKEPT_MARGIN
    gpu = Gpu(free=margin + more)
    gpu.size = lambda shape: sizes[ALL.index(shape)]
    made = gpu.session(kept=kept, each={FULL: 8 * MIB, PIECEWISE: 8 * MIB})
    for number, shape in enumerate(order):
        if number % 3:
            ask(made, shape)
        else:
            made.use_gap(everything=True)
        # What a graph takes beyond what is expected is known after its capture only.
        assert gpu.memory >= margin - max(sizes)


def test_prompts_do_not_use_up_what_decode_steps_need(caplog: pytest.LogCaptureFixture) -> None:
    made = Gpu().session(6 * GRAPH, each={FULL: GRAPH, PIECEWISE: GRAPH})
    ask(made, decode(1))  # 8 sizes are left, and room is kept for two of them
    for shape in MIXED:
        for _ in range(32):
            ask(made, shape)
    assert made.counts["captured"] == {FULL: 1, PIECEWISE: 3}
    (line,) = caplog.messages
    assert line.startswith("no more PIECEWISE CUDA graphs are captured")
    assert ask(made, decode(256)) == decode(256)


# --- between requests


@pytest.mark.parametrize(
    ("gpu", "limit", "more", "tried"),
    [
        (Gpu(), MUCH, [True] * 36 + [False] * 2, [mixed(64), *DECODE, *(s for s in MIXED if s != mixed(64))]),
        # Two captures, one that bars each kind, and two that are measured.
        (Gpu(), 2 * GRAPH, [True] * 6 + [False], [mixed(64), decode(1)]),
        (Gpu(free=MARGIN + 2 * GRAPH), MUCH, [True, True, False, False], [mixed(64), decode(1)]),
        (Gpu(failing=ALL), MUCH, [True, True, True, False], [mixed(64), *DECODE[: FAILURES - 1]]),
    ],
    ids=["all", "budget used up", "memory short", "failures"],
)
def test_captures_in_gaps_begin_with_what_was_used_and_end(
    gpu: Gpu, limit: int, more: list[bool], tried: list[Shape]
) -> None:
    made = gpu.session(limit, used=places({mixed(64): 3}))
    assert [made.use_gap(everything=True) for _ in more] == more
    assert gpu.tried == tried
    assert made.counts["replayed"] == made.counts["missed"] == {}


def test_what_a_gap_measures_decides_from_then_on_and_in_the_next_start() -> None:
    gpu = Gpu()
    made = gpu.session(used=places({mixed(256): 9, mixed(1): 8}))
    assert ask(made, mixed(8)) is None
    while made.use_gap(everything=False):
        pass
    assert gpu.measured == [mixed(256), mixed(8), mixed(1)]
    assert gpu.kept[-1].times == {ALL.index(s): (4000 + s.tokens, 60000) for s in gpu.measured}
    assert ask(made, mixed(16)) == mixed(256)
    again = Gpu().session(times=gpu.kept[-1].times)
    again.capture(mixed(256))
    assert ask(again, mixed(16)) == mixed(256)
    assert again.policy.measured == set(gpu.measured)


def test_what_cannot_be_measured_is_tried_once() -> None:
    gpu = Gpu()
    gpu.times = lambda shape: None
    made = gpu.session()
    while made.use_gap(everything=True):
        pass
    assert sorted(gpu.measured) == sorted(ALL)
    assert made.policy.times == gpu.kept[-1].times == {}


# --- what the next start is told


def test_each_capture_is_remembered_and_batches_ever_more_rarely() -> None:
    gpu = Gpu()
    made = gpu.session()
    for _ in range(1024):
        ask(made, decode(8))
    assert len(gpu.kept) == 1 + 11


def test_shapes_that_traffic_asked_for_have_memory_in_the_next_start_though_none_was_captured() -> None:
    gpu = Gpu(free=0)
    made = gpu.session(base=3 * MIB)
    ask(made, mixed(64))
    ask(made, decode(1))
    rest = (len(DECODE) - 1) * LAYER[FULL] + (len(MIXED) - 1) * LAYER[PIECEWISE]
    assert gpu.kept[-1] == History(
        key="key",
        base=3 * MIB,
        held=0,
        graphs=0,
        each={},
        needed=LAYER[FULL] + LAYER[PIECEWISE] + int(memory.UNASKED * rest) + memory.STEPS,
        used=places({mixed(64): 1, decode(1): 1}),
        times={},
    )


def test_what_earlier_starts_knew_is_added_up_and_stays_known_but_for_shapes_that_there_are_no_more() -> None:
    gpu = Gpu()
    made = gpu.session(used=places({mixed(64): 3, decode(1): 1}) | {len(ALL): 7}, each={FULL: 2 * MIB})
    for _ in range(BATCHES[PIECEWISE]):
        ask(made, mixed(64))
    found = gpu.kept[-1]
    assert found.used == places({mixed(64): 3 + BATCHES[PIECEWISE], decode(1): 1})
    assert (found.graphs, found.held) == (1, GRAPH)
    assert found.each == {FULL: 2 * MIB, PIECEWISE: (LAYER[PIECEWISE] + GRAPH) // 2}


# --- several ranks


class Ranks:
    """Two sessions that meet at each vote, in two threads, as ranks do."""

    def __init__(self, *gpus: Gpu, limits: tuple[int, ...] = (MUCH, MUCH), used: tuple[Any, ...] = ({}, {})) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._votes: list[int] = [0, 0]
        self.gpus = gpus
        self.sessions = [
            gpu.session(
                limits[rank],
                used=places(used[rank]),
                agree=lambda ok, rank=rank: all(self._votes_of_all(rank, ok)),
                from_first=lambda number, rank=rank: self._votes_of_all(rank, number)[0],
            )
            for rank, gpu in enumerate(gpus)
        ]

    def _votes_of_all(self, rank: int, vote: int) -> list[int]:
        self._votes[rank] = vote
        self._barrier.wait()
        votes = list(self._votes)
        self._barrier.wait()
        return votes

    def run(self, function: Callable[[Session], list[Any]]) -> list[Any]:
        """What `function` returns on each rank, which has to be the same and leave the same."""
        results: list[Any] = [None, None]

        def rank(number: int) -> None:
            results[number] = function(self.sessions[number])

        threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank waits for the other for ever"
        one, other = (session.policy for session in self.sessions)
        assert (one.captured, one.barred.keys()) == (other.captured, other.barred.keys())
        assert self.gpus[0].tried == self.gpus[1].tried
        assert results[0] == results[1]
        return results[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("graphs", [0, 2])
@pytest.mark.parametrize("poor", [0, 1])
@pytest.mark.parametrize("idle", [False, True])
def test_where_one_ranks_budget_is_used_up_both_end_there(
    graphs: int, poor: int, idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    limits = (graphs * GRAPH, MUCH)
    ranks = Ranks(Gpu(), Gpu(), limits=limits[::-1] if poor else limits)
    found = ranks.run((lambda made: [made.use_gap(everything=True) for _ in range(9)]) if idle else ask_all)
    assert len(ranks.gpus[0].tried) == graphs
    assert not idle or found[-1] is False
    said = "\n".join(caplog.messages)
    assert said.count("another rank has no memory for them") == said.count("are used up") == 2


@pytest.mark.parametrize("full", [0, 1])
def test_where_one_rank_has_no_memory_at_the_moment_all_postpone(full: int, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(Gpu(), Gpu())
    ranks.gpus[full].memory = MARGIN
    assert set(ranks.run(ask_all)) == {None}
    assert ranks.sessions[0].policy.barred == {}
    assert ["another rank has no memory for it" in line for line in sorted(caplog.messages)] == [True, False]
    ranks.gpus[full].memory = MUCH
    ranks.run(lambda made: [ask(made, decode(8)) for _ in range(BATCHES_POSTPONED)])
    assert ranks.gpus[0].tried == [decode(8)]


@pytest.mark.parametrize("bad", [0, 1])
def test_where_one_rank_fails_none_has_the_graph(bad: int, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(Gpu(), Gpu())
    ranks.gpus[bad].failing = {decode(8), mixed(64)}
    ranks.run(ask_all)
    assert ranks.sessions[0].policy.barred.keys() == {decode(8), mixed(64)}
    assert sum("it failed on another rank" in line for line in caplog.messages) == 2


def test_ranks_that_remember_different_traffic_capture_what_the_first_one_chooses() -> None:
    ranks = Ranks(Gpu(), Gpu(), used=({mixed(64): 3}, {decode(32): 3}))
    ranks.run(lambda made: [made.use_gap(everything=True) for _ in range(5)])
    assert ranks.gpus[0].tried == [mixed(64), *DECODE[:4]]


def test_ranks_choose_graphs_by_the_first_ones_times() -> None:
    ranks = Ranks(Gpu(), Gpu())
    ranks.gpus[1].times = lambda shape: None
    ranks.run(lambda made: [made.use_gap(everything=True) for _ in range(2 * len(ALL))])
    one, other = (session.policy.times for session in ranks.sessions)
    assert one == other == {s: (4000 + s.tokens, 60000) for s in ALL}
