"""What takes the place of stock's functions, and captures in an engine core that only counts."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_compile_ext import changes
from vllm_compile_ext.cuda_graphs import coverage, replacements
from vllm_compile_ext.cuda_graphs.replacements import capture_while_idle, no_request, use_gap_in_worker

STOCK = 77


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", "idle")


@pytest.mark.parametrize("row", [row for row in changes.TABLE if "cuda_graphs.replacements:" in row.by])
def test_stock_is_replaced_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch, row: changes.Change) -> None:
    assert row.function()(STOCK) is not STOCK
    monkeypatch.setattr(torch.version, "cuda", None)
    assert row.function()(STOCK) is STOCK


def test_capture_model_returns_what_is_kept_free_or_what_stock_captured_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    freezes: list[bool] = []

    @contextmanager
    def freeze() -> Any:
        freezes.append(True)
        yield

    module = ModuleType("vllm.v1.worker.gpu.model_runner")
    module.freeze_gc_for_cudagraph_capture = freeze  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(coverage, "stock_because", lambda config: config)
    monkeypatch.setattr(coverage, "_not_asked_for", lambda config: None)

    def stock(runner: Any, *, profile_only: bool = False) -> int:
        with module.freeze_gc_for_cudagraph_capture():
            return STOCK + profile_only

    def runner(session: Any, why: str | None) -> Any:
        return SimpleNamespace(vllm_config=why, cudagraph_manager=SimpleNamespace(session=session))

    capture_model = replacements.capture_model(stock)
    session = SimpleNamespace(budget=SimpleNamespace(base=2, limit=3))
    assert [capture_model(runner(made, None)) for made in (session, None)] == [5, 0]
    assert (freezes, caplog.messages) == ([], [])
    assert capture_model(runner(None, "a reason"), profile_only=True) == STOCK + 1
    assert (freezes, caplog.messages) == ([True], [])
    # As the V1 model runner's, which takes no options and has no such manager, whatever the configuration says.
    for why in ("a reason", None):
        assert replacements.capture_model(lambda runner: STOCK)(SimpleNamespace(vllm_config=why)) == STOCK
    assert caplog.messages == ["CUDA graphs are captured at start, as in stock vLLM, with a reason"]


class Core:
    """The parts of `EngineCoreProc` that are used; `left` shapes in the graphs of its worker."""

    def __init__(self, left: int = 5) -> None:
        self.input_queue: Any = Queue()
        self.running, self.paused = True, False
        self.vllm_config = SimpleNamespace(additional_config={})
        self.captures: list[int] = []
        self.slept = 0
        self.everything: bool | None = None
        self.arrives_at: int | None = None  # a request arrives during this capture
        self.workers: list[Any] = [SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=self))]
        self.left = left
        self.model_executor: Any = SimpleNamespace(is_sleeping=False, collective_rpc=self._call)
        self.is_running = lambda: self.running
        self.is_scheduler_paused = lambda: self.paused

    def _call(self, method: Any, args: tuple[Any, ...] = ()) -> list[bool]:
        return [method(worker, *args) for worker in self.workers]

    def sleep(self) -> None:
        self.slept += 1

    def use_gap(self, *, everything: bool) -> bool:
        self.everything = everything
        if not self.left:
            return False
        self.left -= 1
        self.captures.append(self.left)
        if len(self.captures) == self.arrives_at:
            self.input_queue.put("request")
        return self.left > 0


def test_the_engine_cores_loop_captures_after_stock() -> None:
    core = Core(left=3)
    core.workers.append(SimpleNamespace())  # one without a model runner does not end it
    seen: list[list[int]] = []
    notify = replacements.notify_idle_state_callbacks(lambda core: seen.append(list(core.captures)))
    notify(core)
    assert (seen, core.captures) == ([[]], [2, 1, 0])


def test_a_gap_begins_some_time_after_the_last_request_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def no_request(requests: Any, seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) != 5

    monkeypatch.setattr(replacements, "no_request", no_request)
    core = Core(left=4)
    core.arrives_at = 2
    capture_while_idle(core)
    core.left = 3
    for _ in range(3):
        capture_while_idle(core)
    assert waited == [0, 0, 0, 0, replacements.PATIENCE, replacements.PATIENCE, 0, 0, replacements.PATIENCE]


def test_a_request_ends_the_wait_for_a_gap_at_once_and_is_still_there() -> None:
    requests: Queue[str] = Queue()
    assert no_request(requests, 0.01)
    threading.Timer(0.05, requests.put, ["request"]).start()
    assert not no_request(requests, 300)
    assert not no_request(requests, 300)
    assert requests.get_nowait() == "request"


def test_captures_stop_at_a_request_and_go_on_when_it_is_done() -> None:
    core = Core(left=5)
    core.arrives_at = 2
    for expected in ([4, 3], [4, 3]):
        capture_while_idle(core)
        assert core.captures == expected
    core.input_queue.get()
    capture_while_idle(core)
    assert core.captures == [4, 3, 2, 1, 0]


PAUSES: dict[str, Callable[[Core, bool], None]] = {
    "asleep": lambda core, on: setattr(core.model_executor, "is_sleeping", on),
    "scheduler paused": lambda core, on: setattr(core, "paused", on),
    "weights updated": lambda core, on: setattr(core.workers[0], "_weight_update_active", on),
    "shutting down": lambda core, on: setattr(core, "running", not on),
}


@pytest.mark.parametrize("name", PAUSES)
def test_nothing_is_captured_meanwhile_but_afterwards(name: str) -> None:
    core = Core(left=2)
    for paused, expected in ((True, []), (False, [1, 0])):
        PAUSES[name](core, paused)
        capture_while_idle(core)
        assert core.captures == expected


def test_graphs_are_told_that_the_engine_sleeps() -> None:
    core = Core()
    core.workers.append(SimpleNamespace())
    core.model_executor.is_sleeping = True
    capture_while_idle(core)
    assert (core.slept, core.captures) == (1, [])
    core.model_executor.is_sleeping = False
    capture_while_idle(core)
    assert core.slept == 1


@pytest.mark.parametrize(("value", "everything"), [("lazy", False), ("idle", True), ("eager", None)])
def test_the_variable_says_what_is_captured(monkeypatch: pytest.MonkeyPatch, value: str, everything: Any) -> None:
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", value)
    core = Core()
    capture_while_idle(core)
    assert core.everything is everything


def test_an_engines_own_setting_says_it_for_this_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPILE_CUDAGRAPHS")
    cores = [Core(), Core()]
    cores[0].vllm_config.additional_config = {"compile_ext": {"cudagraphs": "idle"}}
    for core in cores:
        capture_while_idle(core)
    assert [core.everything for core in cores] == [True, False]


@pytest.mark.parametrize("where", ["model_executor", "input_queue", "a variable"])
def test_an_error_costs_one_line_and_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    core = Core()
    with monkeypatch.context() as patch:
        if where == "a variable":
            patch.setenv("VLLM_COMPILE_CUDAGRAPHS", "banana")
        else:
            patch.setattr(core, where, None)
        capture_while_idle(core)
    capture_while_idle(core)
    assert core.captures == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("CUDA graphs are not captured while idle any more (")


@pytest.mark.parametrize("runner", [None, SimpleNamespace(cudagraph_manager=None)])
def test_a_worker_without_graphs_on_demand_has_nothing_left(runner: Any) -> None:
    assert use_gap_in_worker(SimpleNamespace(model_runner=runner), everything=False) is False
