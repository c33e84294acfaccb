"""The memory that is kept free for graphs, and what the next start is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.cuda_graphs.shapes import ALL, DECODE, MIXED, SIZES, decode, mixed
from vllm_compile_ext.cuda_graphs import memory, record
from vllm_compile_ext.cuda_graphs.budget import BASE, LAYER, MIB, STEPS, UNASKED, Budget
from vllm_compile_ext.cuda_graphs.memory import Memory, Need, keep_free
from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE, Policy
from vllm_compile_ext.cuda_graphs.record import Record, Used

LAYERS = 80
ESTIMATE = LAYERS * len(SIZES) * (LAYER[FULL] + LAYER[PIECEWISE]) + STEPS

REMEMBERED = Record(base=5, held=1 << 30, graphs=7, each={FULL: MIB}, needed=2 << 30, used=[])


class Timer:
    """In the place of `threading.Timer`; `run` lets its time pass."""

    made: list[Timer]
    threads = True  # whether the process may have more

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        assert seconds == memory.DELAY
        self.run = function
        self.daemon = False

    def start(self) -> None:
        assert self.daemon, "the process would wait for it at its end"
        if not Timer.threads:
            raise RuntimeError("can't start new thread")
        Timer.made.append(self)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's folder, not made yet, on a device with a name."""
    Timer.made, Timer.threads = [], True
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("VLLM_DISABLE_COMPILE_CACHE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(memory.threading, "Timer", Timer)
    monkeypatch.setattr(memory, "_kept_free", {})
    monkeypatch.setattr(memory, "_applied", lambda: True)  # asks vLLM
    monkeypatch.setattr(memory.ranks, "all_agree", lambda ok: ok)  # there is one
    return tmp_path / "store"


def mode(full: bool, piecewise: bool) -> Any:
    class Mode:
        def has_full_cudagraphs(self) -> bool:
            return full

        def has_piecewise_cudagraphs(self) -> bool:
            return piecewise

        def __str__(self) -> str:
            return f"{full} {piecewise}"

    return Mode()


def config(
    digest: str = "hash",
    sizes: tuple[int, ...] = SIZES,
    seqs: int = 256,
    rank: int = 0,
    full: bool = True,
    piecewise: bool = True,
) -> Any:
    """The attributes of a `VllmConfig` that are looked at."""
    return SimpleNamespace(
        compute_hash=lambda: digest,
        compilation_config=SimpleNamespace(cudagraph_mode=mode(full, piecewise), cudagraph_capture_sizes=list(sizes)),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        parallel_config=SimpleNamespace(rank=rank),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: LAYERS),
    )


def never() -> int:
    raise AssertionError("a forward pass was measured")


def start(made: Any = None) -> tuple[Memory, Policy, Budget]:
    """A start on this configuration, whose forward pass takes 5 MiB."""
    made = made or config()
    keep_free(made, lambda: 5 * MIB)
    known = Memory(made, ALL)
    return known, Policy(ALL, known.before), Budget(known.need.graphs, LAYERS, base=3 * MIB)


# --- what is kept free


def test_a_first_start_keeps_an_estimate_free() -> None:
    made = config()
    assert keep_free(made, lambda: 5 * MIB) == BASE + 5 * MIB + ESTIMATE
    assert Memory(made, ALL).need == Need(BASE + 5 * MIB + ESTIMATE, ESTIMATE, "an estimate", kept=True)


@pytest.mark.parametrize(("full", "piecewise"), [(True, False), (False, True), (False, False)])
def test_only_the_kinds_that_there_are_count(full: bool, piecewise: bool) -> None:
    per_size = LAYERS * (full * LAYER[FULL] + piecewise * LAYER[PIECEWISE])
    assert keep_free(config(full=full, piecewise=piecewise), lambda: 0) == BASE + len(SIZES) * per_size + STEPS


def test_a_later_start_keeps_free_what_an_earlier_one_said_and_measures_nothing() -> None:
    known, policy, budget = start()
    policy.done(decode(8))
    budget.took(FULL, 4 * MIB, 4 * MIB)
    known.keep(policy, budget)
    Timer.made[0].run()

    needed = budget.needed({}, {FULL: len(DECODE) - 1, PIECEWISE: len(MIXED)})
    made = config()
    assert keep_free(made, never) == budget.base + needed
    source = "1 graphs took 0.00 GiB in an earlier start"
    assert Memory(made, ALL).need == Need(budget.base + needed, needed, source, kept=True)


def test_what_was_measured_belongs_to_one_start() -> None:
    made = config()
    keep_free(made, lambda: 5 * MIB)
    assert Memory(made, ALL).need.size == BASE + 5 * MIB + ESTIMATE
    # Another engine in this process, whose memory is not profiled.
    assert Memory(config(), ALL).need == Need(BASE + ESTIMATE, ESTIMATE, "an estimate", kept=False)


def test_a_configuration_that_changes_after_profiling_is_the_same_start(store: Path) -> None:
    for source in ("an estimate", "0 graphs took 0.00 GiB in an earlier start"):
        made = config()
        size = keep_free(made, lambda: 5 * MIB)
        made.compute_hash = lambda: "with the length that fits"  # --max-model-len auto
        known = Memory(made, ALL)
        assert (known.need.size, known.need.source, known.need.kept) == (size, source, True)
        known.keep(Policy(ALL), Budget(size, LAYERS))
        Timer.made[-1].run()


def test_where_memory_is_not_profiled_what_is_remembered_counts(store: Path) -> None:
    record.write(store, memory.key_of(config()), REMEMBERED)
    source = "7 graphs took 1.00 GiB in an earlier start"
    assert Memory(config(), ALL).need == Need((2 << 30) + 5, 2 << 30, source, kept=False)


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("applied", [False, True])
def test_whether_it_is_kept_free_is_vllms_choice(
    monkeypatch: pytest.MonkeyPatch, store: Path, applied: bool, remembered: bool
) -> None:
    if remembered:
        record.write(store, memory.key_of(config()), REMEMBERED)
    monkeypatch.setattr(memory, "_applied", lambda: applied)
    made = config()
    keep_free(made, lambda: 0)
    assert Memory(made, ALL).need.kept is applied


OTHERS = {
    "model": config(digest="other"),
    "sizes": config(sizes=(1, 2)),
    "requests": config(seqs=1),
    "rank": config(rank=1),
    "mode": config(full=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_graphs_depend_on_is_in_the_key(name: str) -> None:
    assert memory.key_of(OTHERS[name]) != memory.key_of(config())


def test_the_device_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.key_of(config())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert memory.key_of(config()) != before


# --- what is remembered


def test_a_run_of_captures_is_one_write_with_the_last_state(store: Path) -> None:
    known, policy, budget = start()
    for shape in DECODE:
        policy.plan(shape, [])
        policy.done(shape)
        budget.took(FULL, MIB, MIB)
        known.keep(policy, budget)
    assert len(Timer.made) == 1
    assert record.read(store, known.key) is None
    Timer.made[0].run()
    found = record.read(store, known.key)
    assert found is not None
    assert (found.graphs, found.held) == (len(DECODE), len(DECODE) * MIB)
    # What comes later is a write of its own, and nothing new is none.
    policy.plan(decode(8), [])
    known.keep(policy, budget)
    assert len(Timer.made) == 2
    Timer.made[1].run()
    assert len(Timer.made) == 2


def test_without_more_threads_nothing_is_kept_until_there_are_some(store: Path) -> None:
    known, policy, budget = start()
    Timer.threads = False
    known.keep(policy, budget)
    known.keep(policy, budget)
    assert Timer.made == []
    Timer.threads = True
    policy.done(decode(8))
    known.keep(policy, budget)
    (timer,) = Timer.made
    timer.run()
    found = record.read(store, known.key)
    assert found is not None
    assert found.graphs == 1


def test_what_changes_during_a_write_is_a_write_of_its_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, policy, budget = start()
    write = record.write

    def meanwhile(*args: Any) -> None:
        write(*args)
        if not policy.captured:
            policy.done(decode(8))
            known.keep(policy, budget)

    monkeypatch.setattr(record, "write", meanwhile)
    known.keep(policy, budget)
    Timer.made[0].run()
    assert len(Timer.made) == 2
    Timer.made[1].run()
    found = record.read(store, known.key)
    assert found is not None
    assert found.graphs == 1


def test_states_are_handed_over_under_a_lock() -> None:
    known, policy, budget = start()
    with known._lock:
        thread = threading.Thread(target=known.keep, args=(policy, budget), daemon=True)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert known._pending is None
    thread.join(20)
    assert len(Timer.made) == 1


def test_shapes_are_remembered_by_how_often_traffic_asked_for_them_in_all_starts() -> None:
    for _ in range(2):
        known, policy, budget = start()
        for _ in range(3):
            policy.plan(mixed(64), [])
        policy.plan(decode(1), [])
        known.keep(policy, budget)
        Timer.made[-1].run()
    known, policy, _ = start()
    assert known.before == policy.remembered == {mixed(64): 6, decode(1): 2}
    assert policy.next_idle() == mixed(64)


def test_shapes_that_traffic_asked_for_have_memory_in_the_next_start_though_none_was_captured(store: Path) -> None:
    known, policy, budget = start()
    policy.plan(mixed(64), [])
    policy.plan(decode(1), [])
    known.keep(policy, budget)
    Timer.made[0].run()
    found = record.read(store, known.key)
    assert found is not None
    one, other = LAYERS * LAYER[FULL], LAYERS * LAYER[PIECEWISE]
    rest = (len(DECODE) - 1) * one + (len(MIXED) - 1) * other
    assert found == Record(
        base=3 * MIB,
        held=0,
        graphs=0,
        each={},
        needed=one + other + int(UNASKED * rest) + STEPS,
        used=[Used(ALL.index(s), 1) for s in ALL[::-1] if s in (mixed(64), decode(1))][::-1],
    )


def test_what_a_graph_took_is_expected_of_the_next_ones_of_later_starts(store: Path) -> None:
    known, policy, budget = start()
    assert known.each == {}
    budget.took(FULL, 2 * MIB, 2 * MIB)
    known.keep(policy, budget)
    Timer.made[-1].run()

    known, policy, _ = start()
    full = (LAYERS * LAYER[FULL] + 2 * MIB) // 2
    assert known.each == {FULL: full}
    # A start that captures none of these: what is known stays.
    budget = Budget(known.need.graphs, LAYERS, each=known.each)
    budget.took(PIECEWISE, 6 * MIB, 6 * MIB)
    known.keep(policy, budget)
    Timer.made[-1].run()
    assert start()[0].each == {FULL: full, PIECEWISE: (LAYERS * LAYER[PIECEWISE] + 6 * MIB) // 2}


def test_shapes_that_there_are_no_more_are_forgotten(store: Path) -> None:
    used = [Used(0, 5), Used(len(ALL), 7), Used(len(ALL) + 1, 7)]
    record.write(store, memory.key_of(config()), Record(base=0, held=0, graphs=0, each={}, needed=0, used=used))
    assert Memory(config(), ALL).before == {ALL[0]: 5}


def test_a_store_that_cannot_be_written_costs_nothing(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.parent.joinpath("store").write_text("not a folder")
    known, policy, budget = start()
    assert known.need.source == "an estimate"
    known.keep(policy, budget)
    Timer.made[0].run()
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_a_damaged_record_is_an_estimate_again(store: Path) -> None:
    known, policy, budget = start()
    known.keep(policy, budget)
    Timer.made[0].run()
    (path,) = (store / "v1" / "graphs").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"needed":', b'"needed":9'))
    assert start()[0].need == Need(BASE + 5 * MIB + ESTIMATE, ESTIMATE, "an estimate", kept=True)


def test_a_store_that_others_can_write_costs_nothing(store: Path) -> None:
    store.mkdir()
    store.chmod(0o777)
    known, policy, budget = start()
    known.keep(policy, budget)
    Timer.made[0].run()
    assert list(store.iterdir()) == []


def test_where_the_user_wants_nothing_kept_the_store_is_neither_read_nor_written(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Record(base=0, held=1, graphs=1, each={}, needed=1, used=[Used(0, 5)])
    record.write(store, memory.key_of(config()), made)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    known, policy, budget = start()
    assert (known.need.source, known.before) == ("an estimate", {})
    known.keep(policy, budget)
    Timer.made[0].run()
    assert record.read(store, known.key) == made
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "0")
    assert start()[0].before == {ALL[0]: 5}
