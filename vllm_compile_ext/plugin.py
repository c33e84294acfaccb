"""The entry point: decide, install, say one line.

vLLM calls `register` in each of its processes (front end, engine core, workers).  Whatever goes wrong here must not
take serving down: vLLM then starts as it would without the plugin, and one line says why.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_compile_ext import __version__, changes, finder, harmless, settings, versions
from vllm_compile_ext.replace import Undo, replace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What the plugin did in this process.

    active: vLLM's modules are swapped.
    wanted: False only where the user switched the plugin off.
    line: the sentence that is logged, at `level`.
    """

    active: bool
    wanted: bool
    line: str
    level: int = logging.INFO


_status: Status | None = None
_announced = False
_undos: list[Undo] = []
_began = 0  # unix ns, of `register`


class PluginError(RuntimeError):
    """The plugin cannot take over and `VLLM_COMPILE_EXT_STRICT=1` forbids starting without it."""


def register() -> None:
    """Take over `vllm.compilation` in this process, or say why not; the second call does nothing.

    Raises `PluginError` only under ``VLLM_COMPILE_EXT_STRICT=1``.
    """
    global _status, _began
    if _status is None:
        _began = time.time_ns()
        try:
            _status = _take_over()
        except Exception as error:
            _status = _give_up(error)
        announce()


def load_always() -> None:
    """Have vLLM load the plugin whatever `VLLM_PLUGINS` says.  Called by vLLM where it is patched (`patches/`)."""
    changes.make(changes.PATCHED)


def status() -> Status | None:
    """What `register` did in this process; None before its first call."""
    return _status


def announce() -> None:
    """Log the status line, once, and not before logging is set up for its level."""
    global _announced
    if _status is not None and not _announced and logger.isEnabledFor(_status.level):
        logger.log(_status.level, _status.line)
        _announced = True


def unregister() -> None:
    """Undo everything that `register` changed.  For tests: what was imported in between stays as it is."""
    global _status, _announced
    changes.undo(_undos)
    finder.remove()
    _status, _announced = None, False


def _take_over() -> Status:
    global _undos
    switches = settings.load()
    if not switches.VLLM_COMPILE_EXT:
        _undos = changes.make(changes.ALWAYS, changes.OFF, changes.NOT_RECORDED)
        return Status(False, False, f"vllm-compile-ext {__version__} is off (VLLM_COMPILE_EXT=0): vLLM is stock")
    vllm, torch = versions.vllm_version(), versions.torch_version()
    if reason := versions.unsupported(vllm, torch):
        raise PluginError(reason)
    recording = changes.STARTING if switches.VLLM_COMPILE_STARTS else changes.NOT_RECORDED
    _undos = changes.make(changes.ALWAYS, changes.ACTIVE, recording)
    swapped = f"vllm.compilation.{{{','.join(finder.REPLACED)}}} swapped"
    line = f"vllm-compile-ext {__version__} is active (vllm {vllm}, torch {torch}): {swapped}"
    return Status(True, True, "; ".join([line, *settings.changed(switches)]))


def _give_up(error: Exception) -> Status:
    global _undos
    if (front := sys.modules.get("vllm_compile_ext.zygote.front")) is not None:
        front.end()
    bad_value = isinstance(error, settings.EnvError)
    reason = str(error) if bad_value or isinstance(error, PluginError | finder.TooLateError) else harmless.error(error)
    if settings.strict():
        raise PluginError(f"{reason} (VLLM_COMPILE_EXT_STRICT=1 forbids starting without the plugin)") from error
    try:
        _undos = changes.make(changes.ALWAYS, changes.OFF, changes.NOT_RECORDED)
    except Exception as also:  # an unsupported vLLM may not have what these change
        logger.debug("variables not registered with this vLLM: %s", also)
    line = f"vllm-compile-ext {__version__} is not active, vLLM starts stock: {reason}"
    return Status(False, True, line, logging.ERROR if bad_value else logging.WARNING)


# Rows of the table of changes.


def log_as_vllm() -> Undo:
    """Hand our lines to vLLM's logger."""
    return replace(logging.getLogger("vllm_compile_ext"), "parent", lambda stock: logging.getLogger("vllm"))


def announce_after(configure_logging: Callable[..., None]) -> Callable[..., None]:
    """`configure_logging`, and the status line."""

    def configure_and_announce(*args: Any, **kwargs: Any) -> None:
        configure_logging(*args, **kwargs)
        announce()

    return configure_and_announce


def with_ours(load_plugins_by_group: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """The plugins that vLLM found for a group and that `VLLM_PLUGINS` allows, and this one for its group."""

    def load(group: str) -> dict[str, Any]:
        return load_plugins_by_group(group) | ({"compile_ext": register} if group == "vllm.general_plugins" else {})

    return load


def unfreeze_later() -> Undo:
    """What is to be undone of `gc.freeze`, which is called where vLLM's models are defined."""
    return gc.unfreeze


def record() -> Undo:
    """Record this process as a part of a start."""
    from vllm_compile_ext.record import vllm_spans

    return vllm_spans.install(_began)


def drop_record() -> None:
    """Drop what the .pth file has begun to record in this process."""
    finder.finder.stop_timing()
    vllm_spans = sys.modules.get("vllm_compile_ext.record.vllm_spans")
    if vllm_spans is not None:
        vllm_spans.forget()
