"""What vLLM gets for ``multiprocessing.get_context("spawn")``: its processes are forked by the zygote, or spawned."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from typing import Any

from vllm_compile_ext import harmless
from vllm_compile_ext.zygote import NotForkedError, child, front
from vllm_compile_ext.zygote.surroundings import Surroundings

logger = logging.getLogger(__name__)


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


_Spawned: Any = popen_spawn_posix.Popen


class Popen(_Spawned):
    """Forked by the zygote, else spawned."""

    def _launch(self, process_obj: Any) -> None:
        try:
            self._fork(process_obj)
        except NotForkedError as reason:
            logger.info("%s is spawned and imports everything again, not forked: %s", process_obj.name, reason)
            self._fds.clear()
            super()._launch(process_obj)

    def _fork(self, process_obj: Any) -> None:
        zygote = front.zygote()
        config = process_obj._kwargs.get("vllm_config")
        backend = getattr(getattr(config, "parallel_config", None), "distributed_executor_backend", None)
        try:
            reason, surroundings = reason_to_spawn(config), Surroundings()
        except Exception as error:
            raise NotForkedError(harmless.error(error)) from error
        if reason:
            raise NotForkedError(reason)
        tracker: Any = resource_tracker.getfd()
        self._fds.append(tracker)
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), data)
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        sentinel, child_w = os.pipe()
        child_r, arguments = os.pipe()
        try:
            files = [0, 1, 2, *dict.fromkeys([*self._fds, child_r, child_w])]
            starts = not process_obj.daemon and backend != "uni"
            told = child.Told(surroundings, process_obj.name, starts, tuple(files), child_r, tracker)
            self.pid = zygote.fork(told, files)
        except BaseException:
            os.close(sentinel)
            os.close(arguments)
            raise
        finally:
            os.close(child_w)
            os.close(child_r)
        self.sentinel = sentinel
        self.finalizer = util.Finalize(self, _close, (sentinel, arguments))
        with open(arguments, "wb", closefd=False) as pipe:
            pipe.write(data.getbuffer())


def reason_to_spawn(config: Any) -> str | None:
    """Why a process with this `VllmConfig` is spawned by vLLM's own advice (vllm/config/vllm.py, 0.32)."""
    parallel, model = getattr(config, "parallel_config", None), getattr(config, "model_config", None)
    if "ray" in (getattr(parallel, name, None) for name in ("distributed_executor_backend", "data_parallel_backend")):
        return "Ray in a fork has not been tried"
    if getattr(getattr(model, "hf_config", None), "model_type", None) == "whisper":
        return "Whisper is known to hang in forked workers"
    if getattr(getattr(model, "multimodal_config", None), "mm_tensor_ipc", None) == "torch_shm":
        return "--mm-tensor-ipc torch_shm is known to fail in them"
    return None


class Process(context.SpawnProcess):
    """Of `Context`."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # noqa: N802
        return Popen(process_obj)


class Context(context.SpawnContext):
    """The context of `spawn`, with `Process` of our own."""

    Process = Process


_context = Context()


def get_mp_context(stock: Callable[[], Any]) -> Callable[[], Any]:
    """A row of the table of changes."""

    def get() -> Any:
        found = stock()
        return _context if type(found) is context.SpawnContext and front.wanted() else found

    return get
