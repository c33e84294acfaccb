"""The entry point: decide, swap, say one line.

vLLM calls `register` in each of its processes (front end, engine core, workers).  Whatever goes wrong here must not
take serving down: vLLM then starts as it would without the plugin, and one line says why.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from vllm_compile_ext import __version__, harmless, monkeypatches, settings, swap, versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What the plugin did in this process.

    active: the swap is in place.
    wanted: False only where the user switched the plugin off.
    line: the sentence that is logged, at `level`.
    """

    active: bool
    wanted: bool
    line: str
    level: int = logging.INFO


_status: Status | None = None
_announced = False
_undos: list[monkeypatches.Undo] = []
loading_since: int | None = None  # unix ns, of `register`


class PluginError(RuntimeError):
    """The plugin cannot take over and `VLLM_COMPILE_EXT_STRICT=1` forbids starting without it."""


def register() -> None:
    """Take over `vllm.compilation` in this process, or say why not; the second call does nothing.

    Raises `PluginError` only under ``VLLM_COMPILE_EXT_STRICT=1``.
    """
    global _status, loading_since
    if _status is None:
        loading_since = time.time_ns()
        try:
            _status = _decide()
        except Exception as error:
            _status = _give_up(error)
        announce()


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
    """Undo everything that `register` changed.  For tests: models made in between keep the classes they are of."""
    global _status, _announced
    monkeypatches.undo(_undos)
    _status, _announced = None, False


def _decide() -> Status:
    switches = settings.load()
    if switches.VLLM_COMPILE_EXT:
        return _take_over(switches)
    _undos.extend(monkeypatches.make(monkeypatches.OFF))
    return Status(False, False, f"vllm-compile-ext {__version__} is off (VLLM_COMPILE_EXT=0): vLLM is stock")


def _take_over(switches: settings.Settings) -> Status:
    vllm, torch = versions.vllm_version(), versions.torch_version()
    if reason := versions.unsupported(vllm, torch):
        raise PluginError(reason)
    if late := swap.already_imported():
        raise PluginError(
            f"{', '.join(late)} imported before the plugin was loaded: "
            "call vllm_compile_ext.plugin.register() before importing vLLM's models"
        )
    _undos.extend(monkeypatches.make(monkeypatches.ACTIVE))
    defaults = settings.Settings()
    changed = [row.name for row in settings.table() if getattr(switches, row.name) != getattr(defaults, row.name)]
    switched = [f"{name}={settings.text(getattr(switches, name))}" for name in changed]
    line = (
        f"vllm-compile-ext {__version__} is active (vllm {vllm}, torch {torch}): "
        f"vllm.compilation.{{{','.join(swap.REPLACED)}}} swapped"
    )
    return Status(True, True, "; ".join([line, *switched]))


def _give_up(error: Exception) -> Status:
    bad_value = isinstance(error, settings.EnvError)
    reason = str(error) if bad_value or isinstance(error, PluginError) else harmless.error(error)
    if settings.strict():
        raise PluginError(f"{reason} (VLLM_COMPILE_EXT_STRICT=1 forbids starting without the plugin)") from error
    try:
        _undos.extend(monkeypatches.make(monkeypatches.OFF))
    except Exception as also:  # an unsupported vLLM may not have what these change
        logger.debug("variables not registered with this vLLM: %s", also)
    line = f"vllm-compile-ext {__version__} is not active, vLLM starts stock: {reason}"
    return Status(False, True, line, logging.ERROR if bad_value else logging.WARNING)
