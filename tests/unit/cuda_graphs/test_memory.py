"""The memory that is kept free for graphs, what is remembered of it, and whether there is room for one more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.cuda_graphs.fakes import MUCH, SIZES
from vllm_compile_ext.cuda_graphs import coverage, memory
from vllm_compile_ext.cuda_graphs.memory import (
    BASE,
    FULL,
    LAYER,
    MIB,
    PIECEWISE,
    STEP,
    STEPS,
    Budget,
    History,
    Writer,
    read,
    write,
)
from vllm_compile_ext.store.files import UnsafeStoreError
from vllm_compile_ext.store.store import seal

LAYERS = 80
PASS = 5 * MIB
STOCK = 77
KEY, OTHER = "a" * 32, "b" * 32
MADE = History(key=KEY, base=100, held=300, graphs=12, each={FULL: 3}, needed=400, used={0: 7, 50: 1})


def changed(**changes: Any) -> History:
    return msgspec.structs.replace(MADE, **changes)


@pytest.fixture
def measured() -> list[int]:
    """The forward passes that were measured."""
    return []


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]) -> Path:
    """The store's folder, not made yet, on a device with a name, where a forward pass takes 5 MiB."""
    Timer.made, Timer.threads = [], True
    monkeypatch.setattr(memory.threading, "Timer", Timer)
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    for variable in ("VLLM_DISABLE_COMPILE_CACHE", "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(memory, "_profiled", {})
    monkeypatch.setattr(memory, "_activations", lambda runner: measured.append(PASS) or PASS)
    monkeypatch.setattr(memory.ranks, "all_agree", lambda ok: ok)  # there is one
    monkeypatch.setattr(coverage, "on_demand", lambda config: True)
    return tmp_path / "store"


# --- what earlier starts found


def path_of(root: Path, key: str = KEY) -> Path:
    return root / "v1" / "graphs" / f"{key}.json"


def inside(**changes: Any) -> Callable[[bytes], bytes]:
    """Sealed, but with something else in it."""
    return lambda data: seal(msgspec.to_builtins(MADE, str_keys=True) | changes, memory.FORMAT)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "other number": lambda data: data.replace(b'"needed":', b'"needed":9'),
    "other format": lambda data: seal(MADE, memory.FORMAT + 1),
    "negative bytes": inside(needed=-1),
    "huge": inside(needed=1 << 63),
    "a fraction": inside(held=1.5),
    "negative batches": inside(used={"1": -1}),
    "no place": inside(used={"one": 1}),
    "one field more": inside(more=1),
    "another model's": inside(key=OTHER),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_history_comes_back_and_a_damaged_one_is_none_and_is_replaced(store: Path, kind: str) -> None:
    assert read(store, KEY) is None
    write(store, changed(graphs=13))
    path_of(store).write_bytes(DAMAGE[kind](path_of(store).read_bytes()))
    assert read(store, KEY) is None
    write(store, MADE)
    assert (read(store, KEY), read(store, OTHER)) == (MADE, None)


def test_the_oldest_go(store: Path) -> None:
    keys = [f"{n:032}" for n in range(memory.KEPT + 5)]
    for number, key in enumerate(keys):
        write(store, changed(key=key))
        os.utime(path_of(store, key), (number, number))
    write(store, changed(key=keys[0]))  # used again
    assert len(list(path_of(store).parent.iterdir())) == memory.KEPT
    assert [read(store, key) is None for key in (keys[0], keys[1], keys[5], keys[-1])] == [False, True, True, False]


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


def test_a_run_of_captures_is_one_write_with_the_last_state(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer()

    def meanwhile(root: Path, made: History) -> None:
        write(root, made)
        if made.graphs == 8:
            writer.put(MADE)  # a write of its own

    monkeypatch.setattr(memory, "write", meanwhile)
    for number in range(9):
        writer.put(changed(graphs=number))
    (timer,) = Timer.made
    assert not store.exists()
    timer.run()
    assert read(store, KEY) == changed(graphs=8)
    Timer.made[1].run()
    assert read(store, KEY) == MADE
    assert len(Timer.made) == 2


def test_without_more_threads_nothing_is_kept_until_there_are_some(store: Path) -> None:
    writer = Writer()
    Timer.threads = False
    writer.put(changed(graphs=1))
    Timer.threads = True
    writer.put(MADE)
    (timer,) = Timer.made
    timer.run()
    assert read(store, KEY) == MADE


@pytest.mark.parametrize("why", ["no folder", "others can write it", "switched off"])
def test_a_store_that_cannot_be_used_costs_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    if why == "no folder":
        store.write_text("not a folder")
    elif why == "others can write it":
        write(store, MADE)
        path_of(store).parent.chmod(0o777)
        assert read(store, KEY) is None
        with pytest.raises(UnsafeStoreError, match="can be written by other users"):
            write(store, changed(graphs=1))
    else:
        monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    Writer().put(changed(graphs=1))
    Timer.made[0].run()
    assert not store.is_dir() or b'"graphs":12' in path_of(store).read_bytes()
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


# --- what is kept free


def config(
    digest: str = "hash",
    sizes: tuple[int, ...] = SIZES,
    seqs: int = 256,
    rank: int = 0,
    full: bool = True,
    piecewise: bool = True,
) -> Any:
    """The attributes of a `VllmConfig` that are looked at."""

    class Mode:
        has_full_cudagraphs = staticmethod(lambda: full)
        has_piecewise_cudagraphs = staticmethod(lambda: piecewise)

        def __str__(self) -> str:
            return f"{full} {piecewise}"

    return SimpleNamespace(
        compute_hash=lambda: digest,
        compilation_config=SimpleNamespace(cudagraph_mode=Mode(), cudagraph_capture_sizes=list(sizes)),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        parallel_config=SimpleNamespace(rank=rank),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: LAYERS),
    )


def remember(store: Path) -> History:
    """An earlier start of this configuration."""
    found = changed(key=memory.history_key(config()), base=5, held=1 << 30, graphs=7, needed=2 << 30)
    write(store, found)
    return found


def profile(made: Any) -> int:
    return memory.profile(lambda runner: STOCK, SimpleNamespace(vllm_config=made))


@pytest.mark.parametrize(("full", "piecewise"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_first_start_keeps_an_estimate_free_for_the_kinds_that_there_are(full: bool, piecewise: bool) -> None:
    made = config(full=full, piecewise=piecewise)
    graphs = LAYERS * len(SIZES) * (full * LAYER[FULL] + piecewise * LAYER[PIECEWISE]) + STEPS
    assert profile(made) == BASE + PASS + graphs
    need = memory.take_need(made)
    assert need[1:] == (LAYERS, BASE + PASS, graphs, "an estimate", True, None)
    # Another engine in this process, whose memory is not profiled.
    assert memory.take_need(made)[1:] == (LAYERS, BASE, graphs, "an estimate", False, None)


def test_the_estimate_of_the_measured_model_is_what_stock_expects() -> None:
    # n70 on an H100: 80 layers, 51 sizes; stock's capture while it profiles memory found 0.79 GiB.
    need = memory.take_need(config(sizes=tuple(range(51))))
    assert 0.8 * 0.79 * 1024 * MIB <= need.graphs <= 0.79 * 1024 * MIB


@pytest.mark.parametrize("profiled", [True, False])
def test_a_later_start_keeps_free_what_an_earlier_one_said_and_measures_nothing(
    store: Path, measured: list[int], profiled: bool
) -> None:
    known, made = remember(store), config()
    assert not profiled or profile(made) == 5 + (2 << 30)
    need = memory.take_need(made)
    assert (need.base, need.graphs, need.kept, need.history) == (5, 2 << 30, profiled, known)
    assert need.source == "7 graphs took 1.00 GiB in an earlier start"
    assert measured == []


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize(("value", "kept"), [("0", False), ("1", True)])
def test_what_was_profiled_counts_for_its_start_and_whether_it_is_kept_free_is_vllms_choice(
    monkeypatch: pytest.MonkeyPatch, store: Path, value: str, kept: bool, remembered: bool
) -> None:
    monkeypatch.setenv("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", value)
    made = config()
    if remembered:
        remember(store)
    size, key = profile(made), memory.history_key(made)
    made.compute_hash = lambda: "with the length that fits"  # --max-model-len auto
    need = memory.take_need(made)
    assert (need.base + need.graphs, need.key, need.kept) == (size, key, kept)


def test_where_the_user_wants_nothing_kept_the_store_is_not_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(store)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    assert memory.take_need(config()).source == "an estimate"


def test_what_graphs_depend_on_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [config("other"), config(sizes=(1, 2)), config(seqs=1), config(rank=1), config(full=False)]
    keys = {memory.history_key(made) for made in (config(), *others)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    keys.add(memory.history_key(config()))
    assert len(keys) == len(others) + 2
    assert all(len(key) == 32 and key.isalnum() for key in keys)


# --- room for one more


def take(budget: Budget, kind: str, *sizes: int) -> None:
    """Graphs that took so many bytes, all of them through this process's allocator."""
    for size in sizes:
        assert budget.add(kind, size, size) == size


@pytest.mark.parametrize(("each", "first"), [({}, 80 * LAYER[FULL]), ({FULL: 3 * MIB}, 3 * MIB)])
def test_a_graph_is_expected_to_take_the_mean_of_those_before_it_and_of_an_earlier_start_or_the_estimate(
    each: dict[str, int], first: int
) -> None:
    budget = Budget(limit=MUCH, layers=80, each=each)
    assert budget.expected(FULL) == first
    take(budget, FULL, 10 * MIB)
    assert budget.expected(FULL) == (first + 10 * MIB) // 2
    take(budget, FULL, 2 * MIB, STEP)  # the largest has room for others
    assert budget.expected(FULL) == (first + 12 * MIB) // 3
    take(budget, FULL, STEP)
    assert budget.expected(FULL) == (first + 12 * MIB + STEP) // 4
    assert budget.expected(PIECEWISE) == 80 * LAYER[PIECEWISE]
    assert budget.held == 12 * MIB + 2 * STEP


@pytest.mark.parametrize("layers", [8, 32, 80])
def test_one_graph_that_took_a_step_of_torchs_does_not_use_up_the_room_for_others(layers: int) -> None:
    # What a start remembers after few graphs of each kind.
    before = Budget(limit=MUCH, layers=layers)
    for kind in (FULL, PIECEWISE):
        take(before, kind, *[layers * LAYER[kind]] * 5)
    each = {kind: before.expected(kind) for kind in (FULL, PIECEWISE)}
    budget = Budget(limit=before.needed({}, {FULL: 46, PIECEWISE: 46}), layers=layers, each=each)
    take(budget, FULL, 22 * MIB)
    assert budget.refusal(PIECEWISE, later=50) is None


def test_graphs_that_share_the_drivers_steps_are_not_expected_to_take_nothing() -> None:
    budget = Budget(limit=MUCH, layers=8)  # a small model: of three graphs, the driver gave one a step of 2 MiB
    take(budget, FULL, 2 * MIB, 0, 0)
    assert MIB // 2 < budget.expected(FULL) < MIB


MOST = memory.ABSURD * 80 * LAYER[FULL]  # of the driver's memory, which torch does not know


@pytest.mark.parametrize(
    ("size", "grown", "counted"),
    [
        (MIB, 0, MIB),  # the driver's memory alone
        (0, 20 * MIB, 0),  # torch had it before
        (-5, -5, 0),  # memory was given back meanwhile
        (3 * MIB + MOST + 1, 3 * MIB, 3 * MIB + MOST),  # another process took the rest
        (1 << 36, -MIB, MOST),
    ],
)
def test_what_the_device_says_counts_but_not_what_another_process_took(size: int, grown: int, counted: int) -> None:
    budget = Budget(limit=MUCH, layers=80)
    assert budget.add(FULL, size, grown) == budget.held == counted


def test_a_graph_is_refused_when_the_limit_would_be_passed_but_for_room_for_decode_steps_to_come() -> None:
    budget = Budget(limit=20 * MIB, layers=1, each={FULL: 4 * MIB, PIECEWISE: 4 * MIB})
    take(budget, FULL, 4 * MIB)
    take(budget, PIECEWISE, 4 * MIB)
    assert budget.refusal(PIECEWISE, later=8) is None  # 8 of the 12 MiB left are for them
    used_up = "the 20 MiB for CUDA graphs are used up"
    assert budget.refusal(PIECEWISE, later=12) == f"{used_up} but for 12 MiB for decode steps"
    take(budget, FULL, 4 * MIB, 4 * MIB)
    assert budget.refusal(FULL) is None  # just what is left
    take(budget, FULL, 4 * MIB)
    assert budget.refusal(FULL) == used_up


@pytest.mark.parametrize("margin", [memory.MARGIN, 7 * MIB])
def test_a_graph_is_refused_when_the_device_is_full_but_for_the_margin(margin: int) -> None:
    budget = Budget(limit=0, layers=80, margin=margin)  # the limit is another question
    needed = budget.expected(FULL) + margin
    assert budget.shortage(FULL, needed) is None
    assert budget.shortage(FULL, needed - 1) == f"only {(needed - 1) / MIB:.0f} MiB are free on the device"


def test_the_next_start_keeps_free_what_is_held_what_was_asked_for_and_a_part_of_the_rest() -> None:
    budget = Budget(limit=MUCH, layers=1, each={FULL: 4 * MIB, PIECEWISE: 8 * MIB})
    assert budget.needed({}, {}) == STEPS
    take(budget, FULL, 4 * MIB)
    take(budget, PIECEWISE, 8 * MIB)
    held, rest = 12 * MIB + STEPS, int(memory.UNASKED * 120 * MIB)
    assert budget.needed({FULL: 2, PIECEWISE: 1}, {}) == held + (8 + 8) * MIB
    assert budget.needed({FULL: 2, PIECEWISE: 1}, {FULL: 10, PIECEWISE: 10}) == held + (8 + 8) * MIB + rest


@pytest.mark.parametrize("piecewise_first", [False, True])
def test_a_start_may_capture_what_the_one_before_it_needed(piecewise_first: bool) -> None:
    size = {FULL: 4 * MIB, PIECEWISE: 6 * MIB}
    budget = Budget(limit=100 * MIB, layers=1, each=size)
    for kind in size:
        take(budget, kind, *[size[kind]] * 5)
    asked, unasked = {FULL: 3, PIECEWISE: 3}, {FULL: 20, PIECEWISE: 20}
    each = {kind: budget.expected(kind) for kind in asked}
    after = Budget(limit=budget.needed(asked, unasked), layers=80, each=each)  # an estimate would be much more
    for kind in sorted(size, reverse=piecewise_first):
        for _ in range(5 + 3):
            assert after.refusal(kind, later=28 if kind == PIECEWISE and piecewise_first else 0) is None
            take(after, kind, size[kind])
    more = 0
    while after.refusal(FULL) is None:
        take(after, FULL, 4 * MIB)
        more += 1
    assert more == int(memory.UNASKED * (20 * 4 + 20 * 6) * MIB + STEPS) // (4 * MIB)
