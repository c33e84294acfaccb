"""Captures while there are no requests, in an engine core that only counts."""

from __future__ import annotations

import logging
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext.cuda_graphs import idle


class Core:
    """The parts of `EngineCoreProc` that are used; `left` shapes in each worker's manager."""

    def __init__(self, left: int = 5, workers: int = 1) -> None:
        self.input_queue: Queue[str] = Queue()
        self.running = True
        self.paused = False
        self.notified = 0
        self.captures: list[int] = []
        self.remembered: bool | None = None
        self.arrives_at: int | None = None  # a request arrives during this capture
        self.workers = [SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=self)) for _ in range(workers)]
        self.left = left
        self.model_executor = SimpleNamespace(is_sleeping=False, collective_rpc=self._call)

    def is_running(self) -> bool:
        return self.running

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def _notify_idle_state_callbacks(self) -> None:
        """Tell who waits for the engine to be idle."""
        self.notified += 1

    def _call(self, method: Any, args: tuple[Any, ...] = ()) -> list[bool]:
        return [method(worker, *args) for worker in self.workers]

    def capture_idle(self, *, remembered: bool) -> bool:
        self.remembered = remembered
        if not self.left:
            return False
        self.left -= 1
        self.captures.append(self.left)
        if len(self.captures) == self.arrives_at:
            self.input_queue.put("request")
        return self.left > 0


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", "idle")


def test_all_shapes_are_captured_while_no_request_comes_and_then_nothing_is_asked_any_more() -> None:
    core = Core(left=5)
    idle.capture_while_idle(core)
    assert core.captures == [4, 3, 2, 1, 0]
    core.model_executor.collective_rpc = None
    idle.capture_while_idle(core)


def test_captures_stop_at_a_request_and_go_on_when_it_is_done() -> None:
    core = Core(left=5)
    core.arrives_at = 2
    idle.capture_while_idle(core)
    assert core.captures == [4, 3]
    idle.capture_while_idle(core)
    assert core.captures == [4, 3]
    core.input_queue.get()
    idle.capture_while_idle(core)
    assert core.captures == [4, 3, 2, 1, 0]


def test_nothing_is_captured_while_the_engine_sleeps_but_afterwards() -> None:
    core = Core(left=2)
    core.model_executor.is_sleeping = True
    idle.capture_while_idle(core)
    assert core.captures == []
    core.model_executor.is_sleeping = False
    idle.capture_while_idle(core)
    assert core.captures == [1, 0]


def test_nothing_is_captured_while_the_scheduler_is_paused_but_afterwards() -> None:
    core = Core(left=2)
    core.paused = True
    idle.capture_while_idle(core)
    assert core.captures == []
    core.paused = False
    idle.capture_while_idle(core)
    assert core.captures == [1, 0]


def test_nothing_is_captured_while_weights_are_updated_but_afterwards() -> None:
    core = Core(left=2)
    (worker,) = core.workers
    worker._weight_update_active = True
    idle.capture_while_idle(core)
    assert core.captures == []
    worker._weight_update_active = False
    idle.capture_while_idle(core)
    assert core.captures == [1, 0]


def test_nothing_is_captured_while_the_engine_shuts_down() -> None:
    core = Core()
    core.running = False
    idle.capture_while_idle(core)
    assert core.captures == []


def test_it_is_off_where_all_is_captured_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", "eager")
    core = Core()
    idle.capture_while_idle(core)
    assert core.captures == []


@pytest.mark.parametrize(("value", "remembered"), [("lazy", True), ("idle", False)])
def test_lazy_captures_only_what_is_remembered(monkeypatch: pytest.MonkeyPatch, value: str, remembered: bool) -> None:
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", value)
    core = Core()
    idle.capture_while_idle(core)
    assert core.remembered is remembered


@pytest.mark.parametrize("where", ["collective_rpc", "is_sleeping", "input_queue"])
def test_an_error_costs_one_line_and_ends_it(caplog: pytest.LogCaptureFixture, where: str) -> None:
    core = Core()
    kept = core.model_executor
    if where == "input_queue":
        core.input_queue = None  # type: ignore[assignment]
    else:
        core.model_executor = SimpleNamespace(**{n: v for n, v in vars(kept).items() if n != where})
    idle.capture_while_idle(core)
    core.input_queue, core.model_executor = Queue(), kept
    idle.capture_while_idle(core)
    assert core.captures == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("CUDA graphs are not captured while idle any more (AttributeError in ")


def test_a_bad_variable_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_WAIT", "banana")
    idle.capture_while_idle(Core())


def test_workers_of_which_one_has_shapes_left_go_on() -> None:
    core = Core(left=3, workers=2)
    core.workers[1] = SimpleNamespace()  # no model runner
    idle.capture_while_idle(core)
    assert core.captures == [2, 1, 0]


@pytest.mark.parametrize(
    "worker",
    [
        SimpleNamespace(),
        SimpleNamespace(model_runner=None),
        SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=None)),
        SimpleNamespace(model_runner=SimpleNamespace(cudagraph_manager=SimpleNamespace())),
    ],
)
def test_a_worker_without_graphs_on_demand_has_nothing_left(worker: Any) -> None:
    assert idle.capture_in_worker(worker, remembered=False) is False


def test_the_change_runs_after_stock_and_is_undone() -> None:
    class Changed(Core):
        def capture_idle(self, *, remembered: bool) -> bool:
            assert self.notified
            return super().capture_idle(remembered=remembered)

    stock = Changed._notify_idle_state_callbacks
    undo = idle.install(Changed)
    core = Changed(left=3)
    core._notify_idle_state_callbacks()
    assert (core.notified, core.captures) == (1, [2, 1, 0])
    assert Changed._notify_idle_state_callbacks.__doc__ == stock.__doc__
    undo()
    again = Changed(left=3)
    again._notify_idle_state_callbacks()
    assert (again.notified, again.captures) == (1, [])
    assert Changed._notify_idle_state_callbacks is stock
