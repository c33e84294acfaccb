from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import process
from tests.unit.store import program
from vllm_compile_ext.compilation import entry
from vllm_compile_ext.key import factors
from vllm_compile_ext.store.store import Blob, Store

SEEN = {"seen": Blob("0" * 64, 0)}


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(factors, "factors", lambda config, model: {"torch": "2.13.0"})
    store = Store.open(tmp_path / "store")

    def of(*, rank: int = 0, data: int = 0, experts: bool = False, device: int | None = None) -> tuple[str, str]:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: device)
        parallel = SimpleNamespace(rank=rank, data_parallel_index=data, enable_expert_parallel=experts)
        config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(model="/models/m"))
        made = entry.Entry(store, SimpleNamespace(vllm_config=config))
        return made.key, made.shard

    return of


def test_ranks_have_one_key_and_shards_of_their_own(shard: Any) -> None:
    assert shard(rank=0)[0] == shard(rank=1)[0]
    assert (shard(rank=0)[1], shard(rank=1)[1]) == ("rank0", "rank1")


def test_data_parallel_ranks_share_a_shard_unless_they_hold_other_experts(shard: Any) -> None:
    assert shard(data=0) == shard(data=1)
    assert shard(data=0, experts=True) != shard(data=1, experts=True)


def test_devices_have_shards_of_their_own(shard: Any) -> None:
    """Inductor writes the device's number into the code: data parallel ranks are on other devices."""
    assert shard(data=0, device=0)[1] == "rank0_cuda0"
    assert shard(data=0, device=0) != shard(data=1, device=1)


def test_the_name_of_a_model_is_safe_to_print() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(model="/models/\x1b[31mred\nINFO \u202em"))
    assert entry.name_of(SimpleNamespace(vllm_config=config)) == "*** SimpleNamespace"


def test_the_line_of_a_miss_is_safe_to_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(value: str) -> entry.Entry:
        monkeypatch.setattr(factors, "factors", lambda config, model: {"config.model.hf_config.x": value})
        parallel = SimpleNamespace(rank=0, data_parallel_index=0, enable_expert_parallel=False)
        config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(model="m"))
        return entry.Entry(Store.open(tmp_path / "store"), SimpleNamespace(vllm_config=config))

    made("a").commit(SEEN)
    assert made("\x1b[31m\nred").miss() == r"cache miss: config.model.hf_config.x a -> \x1b[31m\nred"


def test_who_has_written_an_entry_keeps_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "store", max_bytes=0)
    old = program.leave(store, "old")
    monkeypatch.setattr(factors, "factors", lambda config, model: {"model": "new"})
    parallel = SimpleNamespace(rank=0, data_parallel_index=0, enable_expert_parallel=False)
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(model="m"))
    made = entry.Entry(store, SimpleNamespace(vllm_config=config))
    assert not made.claim()
    made.release()
    assert list(store.manifests()) == [old], "nothing was written"
    assert not made.claim()
    made.commit(SEEN)
    made.release()
    assert [m.factors for m in store.manifests()] == [{"model": "new"}]


def test_under_O_there_is_no_store(tmp_path: Path) -> None:  # noqa: N802 - the option
    code = """
        from vllm_compile_ext.compilation import entry
        report([entry.store() is None, entry.store() is None])
    """
    for optimize, none in (("", False), ("1", True)):
        outcome = process.run(code, PYTHONOPTIMIZE=optimize, VLLM_COMPILE_STORE=str(tmp_path / "store"))
        assert outcome.value == [none, none], outcome.output[-3000:]
        assert len(outcome.lines("nothing is loaded or kept: under python -O")) == int(none)
