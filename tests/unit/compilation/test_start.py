"""A model's place in the store, and what becomes of what was compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import process
from tests.unit.store import program as programs
from vllm_compile_ext.compilation import once, start
from vllm_compile_ext.compilation.start import Entry, label
from vllm_compile_ext.key import factors
from vllm_compile_ext.program import NotKept, dump, program
from vllm_compile_ext.store.store import Blob, Store

SEEN = {"seen": Blob("0" * 64, 0)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def make(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Entry]:
    """The entry of a model with such a factor, on a rank."""

    def made(
        factor: str = "2.13.0",
        *,
        rank: int = 0,
        data: int = 0,
        experts: bool = False,
        device: int | None = None,
        **ours: Any,
    ) -> Entry:
        monkeypatch.setattr(factors, "factors", lambda config, model: {"config.model.hf_config.x": factor})
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: device)
        parallel = SimpleNamespace(rank=rank, data_parallel_index=data, enable_expert_parallel=experts)
        model, additional = SimpleNamespace(model="/models/m"), {"compile_ext": ours}
        config = SimpleNamespace(parallel_config=parallel, model_config=model, additional_config=additional)
        return Entry(store, SimpleNamespace(vllm_config=config))

    return made


@pytest.mark.parametrize(
    ("one", "other", "shards"),
    [
        ({"rank": 0}, {"rank": 1}, ("rank0", "rank1")),
        ({"data": 0}, {"data": 1}, ("rank0", "rank0")),
        ({"data": 0, "experts": True}, {"data": 1, "experts": True}, ("rank0_dp0", "rank0_dp1")),
        ({"device": 0}, {"data": 1, "device": 1}, ("rank0_cuda0", "rank0_cuda1")),  # Inductor writes the number down
    ],
    ids=["ranks", "data parallel", "experts", "devices"],
)
def test_ranks_have_one_key_and_a_shard_for_all_that_run_the_same_code(
    make: Callable[..., Entry], one: dict[str, Any], other: dict[str, Any], shards: tuple[str, str]
) -> None:
    first, second = make(**one), make(**other)
    assert first.key == second.key
    assert (first.shard, second.shard) == shards


def test_names_and_misses_are_safe_to_print(make: Callable[..., Entry]) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(model="/models/\x1b[31mred\nINFO \u202em"))
    assert label(SimpleNamespace(vllm_config=config)) == "*** SimpleNamespace"
    make("a").commit(SEEN)
    assert make("\x1b[31m\nred").explain_miss() == r"cache miss: config.model.hf_config.x a -> \x1b[31m\nred"


@pytest.mark.parametrize("by", ["variable", "engine"])
def test_one_process_writes_an_entry(make: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "variable":
        monkeypatch.setenv("VLLM_COMPILE_WAIT", "0")
    first, second = make(), make(wait=0) if by == "engine" else make()
    assert not first.claim()
    assert second.claim(), "it has waited"
    first.release()
    assert not make().claim()


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_compiled_is_kept_within_the_limit_and_others_may_write(
    make: Callable[..., Entry],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: bool,
) -> None:
    def keep(store: Store, compiled: Any) -> dict[str, Blob]:
        if fails:
            raise NotKept("its trace has read too much")
        return SEEN

    artifacts = SimpleNamespace(runtime_env=SimpleNamespace(bytecode=None))
    monkeypatch.setattr(once, "trace_once", lambda *args: SimpleNamespace(_artifacts=artifacts))
    monkeypatch.setattr(program, "is_program", lambda compiled: True)
    monkeypatch.setattr(program, "keep", keep)
    monkeypatch.setattr(dump, "inspect", lambda *args: None)
    old = programs.leave(store, "old")
    entry = make()
    assert not entry.claim()
    store.max_bytes = 1 << 30 if fails else 0
    start.compile_and_keep(SimpleNamespace(**{start.ENTRY: entry}), lambda: None, (), {})
    kept = list(store.manifests())
    assert kept == [old] if fails else [m.factors for m in kept] == [entry.factors]
    assert ("not kept, the next start compiles again: its trace has read too much" in caplog.text) == fails
    assert not make().claim(), "it was released"


def test_under_O_there_is_no_store(tmp_path: Path) -> None:  # noqa: N802 - the option
    code = """
        from vllm_compile_ext.program import open_store
        report([open_store() is None, open_store() is None])
    """
    for optimize, none in (("", False), ("1", True)):
        outcome = process.run(code, PYTHONOPTIMIZE=optimize, VLLM_COMPILE_STORE=str(tmp_path / "store"))
        assert outcome.value == [none, none], outcome.output[-3000:]
        assert len(outcome.lines("nothing is loaded or kept: under python -O")) == int(none)
