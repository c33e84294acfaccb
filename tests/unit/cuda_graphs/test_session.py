"""One model's graphs while it serves, on a device that only counts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from tests.unit.cuda_graphs.fakes import GRAPH, Gpu, Remembered
from tests.unit.cuda_graphs.shapes import ALL, DECODE, MIXED, decode, fits, mixed
from vllm_compile_ext.cuda_graphs.budget import ABSURD, LAYER, MARGIN, MIB, UNASKED, UNKEPT_MARGIN
from vllm_compile_ext.cuda_graphs.policy import BATCHES, BATCHES_PADDED, BATCHES_POSTPONED, FULL, PIECEWISE, Shape
from vllm_compile_ext.cuda_graphs.session import FAILURES, Device, RanksDifferError, Session


def session(
    gpu: Gpu, limit: int = 1 << 40, before: dict[Shape, int] | None = None, layers: int = 1, kept: bool = True
) -> Session:
    return Session(Remembered(limit, before, kept), layers, gpu.device())  # type: ignore[arg-type]


def ask(made: Session, best: Shape) -> Shape | None:
    return made.graph_for(best, fits(best, made.policy.captured))


def until_barred(made: Session, best: Shape) -> None:
    for _ in range(100):
        if best in made.policy.barred:
            return
        ask(made, best)
    raise AssertionError(f"{best} is not barred")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- captures and counters


def test_the_start_says_how_many_shapes_and_how_much_is_kept_free(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    session(Gpu(), limit=3 << 28)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        f"CUDA graphs are captured on demand: {len(ALL)} shapes, none at start; "
        "kept free for them: 0.75 GiB (an estimate)"
    )


def test_where_nothing_was_kept_free_the_start_says_so_and_more_of_the_device_stays_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    gpu = Gpu(free=UNKEPT_MARGIN + 2 * GRAPH)
    made = session(gpu, limit=3 << 28, kept=False)
    assert [r.getMessage() for r in caplog.records] == [
        f"CUDA graphs are captured on demand: {len(ALL)} shapes, none at start; "
        "of what the KV cache leaves they may take 0.75 GiB (an estimate)"
    ]
    for size in (16, 32, 64, 128, 256):
        ask(made, decode(size))
    assert gpu.tried == [decode(16), decode(32)]
    assert gpu.memory == UNKEPT_MARGIN


def test_the_batch_that_a_graph_is_captured_for_runs_on_it() -> None:
    gpu = Gpu()
    made = session(gpu)
    assert [ask(made, decode(8)) for _ in range(3)] == [decode(8)] * 3
    assert gpu.tried == [decode(8)]


def test_batches_are_counted_by_what_they_ran_on() -> None:
    made = session(Gpu())
    for _ in range(BATCHES[PIECEWISE] + 2):
        ask(made, mixed(256))  # missed until it is captured
    ask(made, decode(8))
    ask(made, decode(4))  # on the graph of 8
    counters = made.counters
    assert counters.captured == {PIECEWISE: 1, FULL: 1}
    assert counters.missed == {PIECEWISE: BATCHES[PIECEWISE] - 1}
    assert counters.replayed == {PIECEWISE: 3, FULL: 2}
    assert counters.skipped == {}
    assert len(counters.seconds) == 2
    assert min(counters.seconds) >= 0
    assert counters.size == made.budget.held == 2 * GRAPH


def test_what_the_session_held_before_counts() -> None:
    made = session(Gpu())
    made.budget.held = 7 * MIB
    ask(made, decode(8))
    assert made.counters.size == 7 * MIB + GRAPH


def test_what_the_device_says_counts_but_not_what_another_process_took() -> None:
    gpu = Gpu(others=1 << 34)
    made = session(gpu)
    ask(made, decode(8))
    assert made.counters.size == made.budget.held == GRAPH + ABSURD * LAYER[FULL]


def test_each_capture_is_remembered_and_batches_ever_more_rarely() -> None:
    made = session(Gpu())
    memory = made.memory
    assert isinstance(memory, Remembered)
    ask(made, decode(8))
    assert memory.kept == 2
    for _ in range(1023):
        ask(made, decode(8))
    assert memory.kept == 2 + 10


# --- failures


def test_a_failure_bars_its_shape_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu(failing=[decode(8)])
    made = session(gpu)
    assert [ask(made, decode(8)) for _ in range(50)] == [None] * 50
    assert gpu.tried == [decode(8)]
    assert warnings(caplog) == [
        "batches of 8 tokens run without a FULL CUDA graph, capturing it failed "
        "(RuntimeError: CUDA error: operation not permitted when stream is capturing)"
    ]
    assert made.policy.barred.keys() == {decode(8)}
    assert made.counters.skipped == {FULL: 1}
    assert made.counters.missed == {FULL: 50}
    assert made.counters.size == 0
    assert ask(made, decode(16)) == decode(16)
    assert ask(made, decode(8)) == decode(16)


def test_failures_stop_all_captures_and_graphs_that_are_there_stay(caplog: pytest.LogCaptureFixture) -> None:
    bad = [decode(1), decode(2), decode(4)]
    assert len(bad) == FAILURES
    gpu = Gpu(failing=bad)
    made = session(gpu)
    ask(made, mixed(1))
    made.capture(mixed(256))
    for shape in bad:
        until_barred(made, shape)
    tried = len(gpu.tried)
    for shape in ALL * 20:
        ask(made, shape)
    assert len(gpu.tried) == tried == FAILURES + 1
    said = warnings(caplog)
    assert len(said) == FAILURES
    assert [" and no more are captured" in line for line in said] == [False, False, True]
    assert made.policy.barred.keys() == set(ALL) - {mixed(256)}
    assert made.counters.skipped == {FULL: len(DECODE), PIECEWISE: len(MIXED) - 1}
    assert ask(made, mixed(256)) == mixed(256)


# --- the budget


def test_the_budget_stops_one_kind_once_and_leaves_the_other_alone(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()
    # With one layer the first graph of the other kind is expected to be small: it still fits.
    made = session(gpu, limit=2 * GRAPH + MIB)
    ask(made, decode(1))
    ask(made, decode(8))
    for shape in DECODE * 20:
        ask(made, shape)
    assert gpu.tried == [decode(1), decode(8)]
    assert warnings(caplog) == [
        "no more FULL CUDA graphs are captured, the 9 MiB for CUDA graphs are used up: "
        f"2 shapes have one, {len(DECODE) - 2} run without; the next start keeps more free"
    ]
    assert made.counters.skipped == {FULL: len(DECODE) - 2}
    for _ in range(20):
        ask(made, mixed(256))
    assert mixed(256) in made.policy.captured


def test_a_full_device_stops_captures_though_the_budget_is_not_used_up(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu(free=MARGIN + 2 * GRAPH)
    made = session(gpu)
    for size in (16, 32, 64, 128, 256):
        ask(made, decode(size))
    assert gpu.tried == [decode(16), decode(32)]
    assert warnings(caplog) == ["a FULL CUDA graph waits: only 128 MiB are free on the device"]
    assert gpu.memory == MARGIN
    # What torch kept unused was given back before.
    assert gpu.given_back == 3
    assert made.policy.barred == {}
    assert made.counters.skipped == {}


def test_a_momentary_lack_of_memory_postpones_one_shape() -> None:
    gpu = Gpu(free=MARGIN)
    made = session(gpu)
    assert ask(made, decode(256)) is None
    gpu.memory = 1 << 40
    assert ask(made, decode(16)) == decode(16)  # others do not wait
    ran = [ask(made, decode(256)) for _ in range(BATCHES_POSTPONED)]
    assert ran[: BATCHES_POSTPONED - 2] == [None] * (BATCHES_POSTPONED - 2)
    assert ran[-1] == decode(256)
    assert gpu.tried == [decode(16), decode(256)]


def test_what_torch_keeps_unused_is_given_back_where_memory_is_short_and_only_there() -> None:
    gpu = Gpu(free=MARGIN + 2 * GRAPH, unused=3 * GRAPH)
    made = session(gpu)
    for size in (16, 32):
        ask(made, decode(size))
    assert (gpu.given_back, gpu.unused) == (0, 3 * GRAPH)
    ask(made, decode(64))
    assert (gpu.given_back, gpu.unused) == (1, 0)
    assert gpu.tried == [decode(16), decode(32), decode(64)]
    assert made.budget.held == 3 * GRAPH


def test_where_the_budget_is_used_up_nothing_is_given_back() -> None:
    gpu = Gpu(free=MARGIN, unused=3 * GRAPH)
    ask(session(gpu, limit=0), decode(16))
    assert gpu.given_back == 0


def test_with_nothing_kept_free_nothing_is_captured_and_nothing_fails(caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu()
    made = session(gpu, limit=0)
    assert {ask(made, shape) for shape in ALL * 20} == {None}
    assert gpu.tried == []
    assert len(warnings(caplog)) == 2  # one for each kind


# --- surprises


def test_after_a_surprise_what_is_captured_is_used_and_nothing_more_is_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = Gpu()
    made = session(gpu)
    ask(made, decode(16))
    made.stop(KeyError("what"))
    made.stop(KeyError("what"))
    assert warnings(caplog) == ["no more CUDA graphs are captured (KeyError)"]
    assert {ask(made, decode(16)) for _ in range(20)} == {decode(16)}
    assert {ask(made, mixed(256)) for _ in range(20)} == {None}
    assert made.capture_idle() is False
    assert gpu.tried == [decode(16)]
    assert made.policy.barred == dict.fromkeys(set(ALL) - {decode(16)}, "KeyError")
    assert made.counters.skipped == {FULL: len(DECODE) - 1, PIECEWISE: len(MIXED)}


def test_room_is_left_for_what_graphs_took_in_an_earlier_start() -> None:
    limit = int(UNASKED * len(DECODE) * GRAPH) + GRAPH
    for each, there in (({FULL: GRAPH, PIECEWISE: GRAPH}, True), ({FULL: 2 * GRAPH, PIECEWISE: GRAPH}, False)):
        made = Session(Remembered(limit, each=each), 1, Gpu().device())  # type: ignore[arg-type]
        assert made.capture(mixed(64)) is there


def test_prompts_do_not_use_up_what_decode_steps_need(caplog: pytest.LogCaptureFixture) -> None:
    each = {FULL: GRAPH, PIECEWISE: GRAPH}
    made = Session(Remembered(6 * GRAPH, each=each), 1, Gpu().device())  # type: ignore[arg-type]
    ask(made, decode(1))  # 8 sizes are left, and room is kept for two of them
    for shape in MIXED:
        for _ in range(2 * BATCHES_PADDED):
            ask(made, shape)
    assert made.counters.captured == {FULL: 1, PIECEWISE: 3}
    (line,) = warnings(caplog)
    assert line.startswith("no more PIECEWISE CUDA graphs are captured")
    assert ask(made, decode(256)) == decode(256)


# --- while idle


def test_idle_captures_all_shapes_then_says_that_none_is_left() -> None:
    gpu = Gpu()
    made = session(gpu, before={mixed(64): 3})
    assert [made.capture_idle() for _ in ALL] == [True] * (len(ALL) - 1) + [False]
    assert gpu.tried == [mixed(64), *DECODE, *(s for s in MIXED if s != mixed(64))]
    assert made.capture_idle() is False
    assert len(gpu.tried) == len(ALL)
    assert made.counters.replayed == made.counters.missed == {}


def test_until_the_first_batch_what_is_remembered_is_captured() -> None:
    gpu = Gpu()
    made = session(gpu, before={decode(8): 3, decode(1): 2})
    assert [made.capture_idle(remembered=True) for _ in range(3)] == [True, True, False]
    assert gpu.tried == [decode(8), decode(1)]
    assert ask(made, decode(8)) == decode(8)
    assert gpu.tried == [decode(8), decode(1)]


def test_idle_captures_end_when_the_budget_is_used_up() -> None:
    gpu = Gpu()
    made = session(gpu, limit=2 * GRAPH)
    rounds = 0
    while made.capture_idle():
        rounds += 1
        assert rounds < 10
    assert gpu.tried == DECODE[:2]


def test_idle_captures_end_where_memory_is_short_and_bar_nothing() -> None:
    gpu = Gpu(free=MARGIN + 2 * GRAPH)
    made = session(gpu)
    assert [made.capture_idle() for _ in range(3)] == [True, True, False]
    assert gpu.tried == DECODE[:2]
    assert made.policy.barred == {}


def test_idle_captures_end_after_failures() -> None:
    gpu = Gpu(failing=ALL)
    made = session(gpu)
    assert [made.capture_idle() for _ in range(FAILURES)] == [True] * (FAILURES - 1) + [False]


# --- several ranks


class Ranks:
    """Two sessions that meet at each vote, in two threads, as ranks do."""

    def __init__(self, *gpus: Gpu, limits: tuple[int, int] = (1 << 40, 1 << 40), before: tuple = ({}, {})) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._votes: list[int] = [0, 0]
        self.gpus = gpus
        self.sessions = [
            Session(
                Remembered(limit, known),  # type: ignore[arg-type]
                1,
                Device(
                    lambda shape, rank=rank: self._capture(rank, shape),
                    lambda rank=rank: gpus[rank].memory,
                    lambda rank=rank: gpus[rank].reserved,
                    gpus[rank].give_back,
                    lambda ok, rank=rank: all(self._meet(rank, ok)),
                    lambda number, rank=rank: self._meet(rank, number)[0],
                ),
            )
            for rank, (limit, known) in enumerate(zip(limits, before, strict=True))
        ]

    def _meet(self, rank: int, vote: int) -> list[int]:
        self._votes[rank] = vote
        self._barrier.wait()
        votes = list(self._votes)
        self._barrier.wait()
        return votes

    def _capture(self, rank: int, shape: Shape) -> Exception | None:
        error = self.gpus[rank].capture(shape)
        if all(self._meet(rank, error is None)):
            return None
        return error or RanksDifferError("it failed on another rank")

    def run(self, function: Callable[[Session], object]) -> list[object]:
        """What `function` returns on each rank."""
        results: list[object] = [None, None]

        def rank(number: int) -> None:
            results[number] = function(self.sessions[number])

        threads = [threading.Thread(target=rank, args=(n,), daemon=True) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank waits for the other for ever"
        return results

    def agree(self) -> bool:
        one, other = (s.policy for s in self.sessions)
        return (one.captured, one.barred.keys()) == (other.captured, other.barred.keys())


def all_batches(made: Session) -> list[Shape | None]:
    return [ask(made, shape) for shape in ALL * 20]


def test_ranks_that_agree_capture_the_same() -> None:
    ranks = Ranks(Gpu(), Gpu())
    one, other = ranks.run(all_batches)
    assert one == other
    assert ranks.gpus[0].tried == ranks.gpus[1].tried
    assert ranks.agree()


@pytest.mark.parametrize("full", [0, 1])
def test_where_one_ranks_budget_is_used_up_none_captures(full: int, caplog: pytest.LogCaptureFixture) -> None:
    limits = (0, 1 << 40) if full == 0 else (1 << 40, 0)
    ranks = Ranks(Gpu(), Gpu(), limits=limits)
    one, other = ranks.run(all_batches)
    assert one == other == [None] * len(one)  # type: ignore[arg-type]
    assert [gpu.tried for gpu in ranks.gpus] == [[], []]
    assert ranks.agree()
    said = "\n".join(warnings(caplog))
    assert said.count("another rank has no memory for them") == 2
    assert said.count("are used up") == 2


@pytest.mark.parametrize("full", [0, 1])
def test_where_one_ranks_budget_is_used_up_later_both_end_there(full: int) -> None:
    limits = (2 * GRAPH, 1 << 40) if full == 0 else (1 << 40, 2 * GRAPH)
    ranks = Ranks(Gpu(), Gpu(), limits=limits)
    one, other = ranks.run(all_batches)
    assert one == other
    assert ranks.gpus[0].tried == ranks.gpus[1].tried
    assert len(ranks.gpus[0].tried) == 2
    assert ranks.agree()


@pytest.mark.parametrize("full", [0, 1])
def test_where_one_rank_has_no_memory_at_the_moment_all_postpone(full: int, caplog: pytest.LogCaptureFixture) -> None:
    gpus = [Gpu(), Gpu()]
    gpus[full].memory = MARGIN
    ranks = Ranks(*gpus)
    one, other = ranks.run(all_batches)
    assert one == other == [None] * len(one)  # type: ignore[arg-type]
    assert [gpu.tried for gpu in gpus] == [[], []]
    assert [made.policy.barred for made in ranks.sessions] == [{}, {}]
    assert len(warnings(caplog)) == 2
    assert sum("another rank has no memory for it" in line for line in warnings(caplog)) == 1
    gpus[full].memory = 1 << 40
    one, other = ranks.run(lambda made: [ask(made, decode(8)) for _ in range(BATCHES_POSTPONED)])
    assert one == other
    assert gpus[0].tried == gpus[1].tried == [decode(8)]


@pytest.mark.parametrize("bad", [0, 1])
def test_where_one_rank_fails_none_has_the_graph(bad: int, caplog: pytest.LogCaptureFixture) -> None:
    gpus = [Gpu(), Gpu()]
    gpus[bad].failing = {decode(8), mixed(64)}
    ranks = Ranks(*gpus)
    one, other = ranks.run(all_batches)
    assert one == other
    assert ranks.agree()
    assert ranks.sessions[0].policy.barred.keys() == {decode(8), mixed(64)}
    assert sum("it failed on another rank" in line for line in warnings(caplog)) == 2


def test_ranks_that_remember_different_traffic_capture_what_the_first_one_chooses() -> None:
    ranks = Ranks(Gpu(), Gpu(), before=({mixed(64): 3}, {decode(32): 3}))
    ranks.run(lambda made: [made.capture_idle() for _ in range(5)])
    assert ranks.gpus[0].tried == ranks.gpus[1].tried == [mixed(64), *DECODE[:4]]


@pytest.mark.parametrize("full", [0, 1])
def test_idle_captures_end_on_all_ranks_where_one_ranks_budget_is_used_up(full: int) -> None:
    limits = (2 * GRAPH, 1 << 40) if full == 0 else (1 << 40, 2 * GRAPH)
    ranks = Ranks(Gpu(), Gpu(), limits=limits)

    def idle(made: Session) -> list[bool]:
        return [made.capture_idle() for _ in range(6)]

    one, other = ranks.run(idle)
    assert one == other
    assert one[-1] is False  # type: ignore[index]
    assert ranks.gpus[0].tried == ranks.gpus[1].tried == DECODE[:2]
