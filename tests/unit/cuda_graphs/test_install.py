"""What is changed in vLLM's modules when they are imported, on modules with the same names in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_compile_ext.cuda_graphs import coverage, install

STOCK = 77


class GPUModelRunner:
    """cudagraph_manager: with a session, as after a start that captures on demand."""

    def __init__(self, session: Any, *, on_demand: bool) -> None:
        self.vllm_config = on_demand
        self.cudagraph_manager = SimpleNamespace(session=session)

    def capture_model(self, *, profile_only: bool = False) -> int:
        return STOCK + profile_only


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(coverage, "on_demand", lambda config: config)


@pytest.fixture
def runner() -> Iterator[type[GPUModelRunner]]:
    module = ModuleType("vllm.v1.worker.gpu.model_runner")
    made = type("GPUModelRunner", (GPUModelRunner,), {"capture_model": GPUModelRunner.capture_model})
    vars(module).update(GPUModelRunner=made, freeze_gc_for_cudagraph_capture=contextlib.nullcontext)
    undo = install._runner(module)
    yield made
    undo()
    assert made.capture_model is GPUModelRunner.capture_model


def test_capture_model_says_what_is_kept_free(runner: type[GPUModelRunner]) -> None:
    made = runner(SimpleNamespace(budget=SimpleNamespace(base=2, limit=3)), on_demand=True)
    assert made.capture_model() == 5
    assert runner(None, on_demand=True).capture_model() == 0


def test_capture_model_is_stocks_where_capture_is(runner: type[GPUModelRunner]) -> None:
    made = runner(None, on_demand=False)
    assert [made.capture_model(), made.capture_model(profile_only=True)] == [STOCK, STOCK + 1]


@pytest.mark.parametrize("change", [install._utils, install._runner, install._core])
def test_without_cuda_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    undo = change(ModuleType("empty"))  # has none of the names
    undo()


def test_the_engine_cores_loop_is_changed_and_changed_back() -> None:
    class EngineCoreProc:
        def _notify_idle_state_callbacks(self) -> None: ...

    module, stock = ModuleType("vllm.v1.engine.core"), EngineCoreProc._notify_idle_state_callbacks
    vars(module)["EngineCoreProc"] = EngineCoreProc
    undo = install._core(module)
    assert EngineCoreProc._notify_idle_state_callbacks is not stock
    undo()
    assert EngineCoreProc._notify_idle_state_callbacks is stock
