"""The memory that is kept free for graphs, what is remembered of it, and whether there is room for one more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.cuda_graphs.fakes import SIZES, budget
from vllm_compile_ext.cuda_graphs import coverage, memory
from vllm_compile_ext.cuda_graphs.memory import FULL, LAYER, MIB, PIECEWISE, STEP, STEPS, Budget, History, read, write
from vllm_compile_ext.store.files import UnsafeStoreError
from vllm_compile_ext.store.store import seal

LAYERS = 80
PASS = 5 * MIB
KEY, OTHER = "a" * 32, "b" * 32
BY_PLACE: dict[str, Any] = {"used": {0: 7, 50: 1}, "times": {0: (4000, 60000)}}
MADE = History(key=KEY, base=5, held=1 << 30, graphs=7, each={FULL: 3}, needed=2 << 30, **BY_PLACE)


def changed(**changes: Any) -> History:
    return msgspec.structs.replace(MADE, **changes)


@pytest.fixture
def measured() -> list[int]:
    """The forward passes that were measured."""
    return []


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]) -> Path:
    """The store's folder, not made yet, on a device with a name, where a forward pass takes 5 MiB."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    for variable in ("VLLM_DISABLE_COMPILE_CACHE", "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(memory, "_profiled", {})
    monkeypatch.setattr(memory, "_activations", lambda runner: measured.append(PASS) or PASS)
    monkeypatch.setattr(memory.ranks, "all_agree", lambda ok: ok)  # there is one
    monkeypatch.setattr(memory.ranks, "from_first", lambda value: value)
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
    "negative batches": inside(used={"1": -1}),
    "half a time": inside(times={"1": [4000]}),
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


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> memory.Writer:
    """Whose thread is the test's, and whose delays pass at once."""
    monkeypatch.setattr(memory.Writer, "start", lambda writer: None)
    monkeypatch.setattr(memory, "time", SimpleNamespace(sleep=lambda seconds: None))
    return memory.Writer()


def test_a_run_of_captures_is_one_write_with_the_last_state(
    store: Path, writer: memory.Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(seconds: float) -> None:
        assert (seconds, store.exists()) == (memory.DELAY, False)
        for number in range(9):
            writer.put(changed(graphs=number))

    writer.put(MADE)
    with monkeypatch.context() as patch:
        patch.setattr(memory.time, "sleep", meanwhile)
        writer.write_next()
    assert read(store, KEY) == changed(graphs=8)
    writer.put(MADE)
    writer.write_next()
    assert read(store, KEY) == MADE


def test_no_step_and_no_end_of_the_process_waits_for_the_disk(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DELAY", 0)
    written = Queue[History]()
    monkeypatch.setattr(memory, "write", lambda root, history: written.put(history))
    writer = memory.Writer()
    for made in (changed(graphs=1), MADE):
        writer.put(made)
        assert written.get(timeout=60) == made
    assert (writer.daemon, writer.is_alive()) == (True, True)


@pytest.mark.parametrize("why", ["no folder", "others can write it", "switched off"])
def test_a_store_that_cannot_be_used_costs_nothing(
    store: Path,
    writer: memory.Writer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
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
    writer.put(changed(graphs=1))
    writer.write_next()
    assert not store.is_dir() or b'"graphs":7' in path_of(store).read_bytes()
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


def profile(made: Any) -> int:
    return memory.profile(lambda runner: 77, SimpleNamespace(vllm_config=made))


@pytest.mark.parametrize(("full", "piecewise"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_first_start_keeps_an_estimate_free_for_the_kinds_that_there_are(full: bool, piecewise: bool) -> None:
    made = config(full=full, piecewise=piecewise)
    graphs = LAYERS * len(SIZES) * (full * LAYER[FULL] + piecewise * LAYER[PIECEWISE]) + STEPS
    expected = Budget(memory.history_key(made), LAYERS, memory.BASE + PASS, graphs, "an estimate", kept=True)
    assert profile(made) == expected.base + expected.limit
    assert memory.take_budget(made) == expected
    # Another engine in this process, whose memory is not profiled.
    expected.base, expected.kept = memory.BASE, False
    assert memory.take_budget(made) == expected


def test_the_estimate_of_the_measured_model_is_what_stock_expects() -> None:
    # n70 on an H100: 80 layers, 51 sizes; stock's capture while it profiles memory found 0.79 GiB.
    found = memory.take_budget(config(sizes=tuple(range(51))))
    assert 0.8 * 0.79 * 1024 * MIB <= found.limit <= 0.79 * 1024 * MIB


@pytest.mark.parametrize("profiled", [True, False])
def test_a_later_start_keeps_free_what_an_earlier_one_said_and_measures_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int], profiled: bool
) -> None:
    made = config()
    key = memory.history_key(made)
    write(store, changed(key=key))
    assert not profiled or profile(made) == MADE.base + MADE.needed
    source = "7 graphs took 1.00 GiB in an earlier start"
    expected = Budget(key, LAYERS, MADE.base, MADE.needed, source, profiled, MADE.each, MADE.used, MADE.times)
    assert memory.take_budget(made) == expected
    assert measured == []
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    assert memory.take_budget(made).source == "an estimate"


@pytest.mark.parametrize(("value", "kept"), [("0", False), ("1", True)])
def test_what_was_profiled_counts_for_its_start_and_whether_it_is_kept_free_is_vllms_choice(
    monkeypatch: pytest.MonkeyPatch, value: str, kept: bool
) -> None:
    monkeypatch.setenv("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", value)
    made = config()
    size, key = profile(made), memory.history_key(made)
    made.compute_hash = lambda: "with the length that fits"  # --max-model-len auto
    found = memory.take_budget(made)
    assert (found.base + found.limit, found.key, found.kept) == (size, key, kept)


def test_what_graphs_depend_on_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [config("other"), config(sizes=(1, 2)), config(seqs=1), config(rank=1), config(full=False)]
    keys = {memory.history_key(made) for made in (config(), *others)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    keys.add(memory.history_key(config()))
    assert len(keys) == len(others) + 2
    assert all(len(key) == 32 and key.isalnum() for key in keys)


# --- room for one more


def take(made: Budget, kind: str, *sizes: int) -> None:
    """Graphs that took so many bytes, all of them through this process's allocator."""
    for size in sizes:
        assert made.add(kind, size, size) == size


def again(before: Budget, layers: int = LAYERS, **by_kind: dict[str, int]) -> Budget:
    """That of the start after the one of `before`."""
    history = before.remember(used={}, times={}, **({"asked": {}, "unasked": {}} | by_kind))
    return budget(history.needed, layers, each=history.each)


@pytest.mark.parametrize(("each", "first"), [({}, LAYERS * LAYER[FULL]), ({FULL: 3 * MIB}, 3 * MIB)])
def test_a_graph_is_expected_to_take_the_mean_of_those_before_it_and_of_an_earlier_start_or_the_estimate(
    each: dict[str, int], first: int
) -> None:
    made = budget(layers=LAYERS, each=each)
    assert made.expected(FULL) == first
    take(made, FULL, 10 * MIB)
    assert made.expected(FULL) == (first + 10 * MIB) // 2
    take(made, FULL, 2 * MIB, STEP)  # the largest has room for others
    assert made.expected(FULL) == (first + 12 * MIB) // 3
    take(made, FULL, STEP)
    assert made.expected(FULL) == (first + 12 * MIB + STEP) // 4
    assert made.expected(PIECEWISE) == LAYERS * LAYER[PIECEWISE]
    assert made.held == 12 * MIB + 2 * STEP


@pytest.mark.parametrize("layers", [8, 32, 80])
def test_one_graph_that_took_a_step_of_torchs_does_not_use_up_the_room_for_others(layers: int) -> None:
    before = budget(layers=layers)
    for kind in (FULL, PIECEWISE):
        take(before, kind, *[layers * LAYER[kind]] * 5)
    made = again(before, layers, unasked={FULL: 46, PIECEWISE: 46})
    take(made, FULL, 22 * MIB)
    assert made.refusal(PIECEWISE, later=50) is None


def test_graphs_that_share_the_drivers_steps_are_not_expected_to_take_nothing() -> None:
    made = budget(layers=8)  # a small model: of three graphs, the driver gave one a step of 2 MiB
    take(made, FULL, 2 * MIB, 0, 0)
    assert MIB // 2 < made.expected(FULL) < MIB


MOST = memory.ABSURD * LAYERS * LAYER[FULL]  # of the driver's memory, which torch does not know


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
    made = budget(layers=LAYERS)
    assert made.add(FULL, size, grown) == made.held == counted


def test_a_graph_is_refused_when_the_limit_would_be_passed_but_for_room_for_decode_steps_to_come() -> None:
    made = budget(20 * MIB, each={FULL: 4 * MIB, PIECEWISE: 4 * MIB})
    take(made, FULL, 4 * MIB)
    take(made, PIECEWISE, 4 * MIB)
    assert made.refusal(PIECEWISE, later=8) is None  # 8 of the 12 MiB left are for them
    used_up = "the 20 MiB for CUDA graphs are used up"
    assert made.refusal(PIECEWISE, later=12) == f"{used_up} but for 12 MiB for decode steps"
    take(made, FULL, 4 * MIB, 4 * MIB)
    assert made.refusal(FULL) is None  # just what is left
    take(made, FULL, 4 * MIB)
    assert made.refusal(FULL) == used_up


@pytest.mark.parametrize("piecewise_first", [False, True])
def test_a_start_may_capture_what_the_one_before_it_needed(piecewise_first: bool) -> None:
    size = {FULL: 4 * MIB, PIECEWISE: 6 * MIB}
    before = budget(100 * MIB, each=size)
    for kind in size:
        take(before, kind, *[size[kind]] * 5)
    made = again(before, asked={FULL: 3, PIECEWISE: 3}, unasked={FULL: 20, PIECEWISE: 20})
    for kind in sorted(size, reverse=piecewise_first):
        for _ in range(5 + 3):
            assert made.refusal(kind, later=28 if kind == PIECEWISE and piecewise_first else 0) is None
            take(made, kind, size[kind])
    more = 0
    while made.refusal(FULL) is None:
        take(made, FULL, 4 * MIB)
        more += 1
    assert more == int(memory.UNASKED * (20 * 4 + 20 * 6) * MIB + STEPS) // (4 * MIB)
