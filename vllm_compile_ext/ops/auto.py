"""Which ops run their kernels, chosen by what `vllm-compile-ext ops MODEL --measure` has kept: VLLM_COMPILE_CUSTOM_OPS.

A kernel is chosen where it was faster in every batch that was measured, and equal but for rounding.  One that is not
equal is switched off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_compile_ext import platforms, settings
from vllm_compile_ext.ops import dispatch
from vllm_compile_ext.store.files import UnsafeStoreError
from vllm_compile_ext.store.store import key_of, read_record, write_record

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = 200
FASTER = 1.05  # times, else an op stays as it is
ROUNDING = 0.02  # of the largest result: two steps of bfloat16


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured for one model on one kind of machine.

    key: of `factors`, on which it depends.  choice: "+silu_and_mul" and the like; empty where nothing is faster.
    """

    key: str
    factors: dict[str, str]
    choice: list[str]


def factors(config: Any) -> dict[str, str]:
    """What the times of a model's ops depend on, of its `VllmConfig`."""
    import torch
    import vllm

    compilation, model = config.compilation_config, config.model_config
    return {
        "platform": platforms.name(),
        "torch": str(torch.__version__),
        "vllm": vllm.__version__,
        "model": model.compute_hash(),
        "tensor_parallel_size": str(config.parallel_config.tensor_parallel_size),
        "mode": compilation.mode.name,
        "graphs": compilation.cudagraph_mode.name,
        "processors": str(len(os.sched_getaffinity(0))),
    }


def choose(name: str, rows: Sequence[Any], custom_ops: list[str], compiled: bool) -> list[str]:
    """The entry for the op `name` that its `measure.Figures`, of all its calls, speak for, if any.

    compiled: whether the model is compiled, and so the native form.
    """
    enabled, why = dispatch.rule(name, custom_ops)
    if why not in ("all", "none"):
        return []
    if any(not row.error <= ROUNDING for row in rows):
        return [f"-{name}"] if enabled else []
    pairs = [(row.kernel, row.compiled if compiled else row.native) for row in rows]
    if enabled:
        return [f"-{name}"] if pairs and all(native * FASTER < kernel for kernel, native in pairs) else []
    return [f"+{name}"] if pairs and all(kernel * FASTER < native for kernel, native in pairs) else []


def keep(root: Path, measured: Measured) -> None:
    """Raises `OSError`, and `UnsafeStoreError` when others can write the store."""
    write_record(root, "ops", measured, FORMAT, KEPT)


def kept(root: Path, key: str) -> Measured | None:
    with suppress(UnsafeStoreError, OSError):
        return read_record(root, "ops", key, Measured, FORMAT)
    return None


def create_engine_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`: with VLLM_COMPILE_CUSTOM_OPS=auto, and without `custom_ops` of the user's."""

    def create(arguments: Any, *given: Any, **named: Any) -> Any:
        asked = list(arguments.compilation_config.custom_ops)
        config = stock(arguments, *given, **named)
        if settings.of(config).VLLM_COMPILE_CUSTOM_OPS == "auto" and config.model_config is not None:
            if asked:
                logger.info("custom_ops are the user's: VLLM_COMPILE_CUSTOM_OPS=auto changes nothing")
            else:
                _apply(config)
        return config

    return create


def _apply(config: Any) -> None:
    measured = kept(settings.store(), key_of(factors(config)))
    if measured is None:
        logger.info(
            "VLLM_COMPILE_CUSTOM_OPS=auto: nothing was measured for this model here; "
            "vllm-compile-ext ops MODEL --measure does so"
        )
        return
    compilation = config.compilation_config
    fuses = any(value is True for name, value in vars(compilation.pass_config).items() if "fus" in name)
    # A pass of vLLM's that looks for a kernel finds it: with passes on, none is switched off.
    chosen = [entry for entry in measured.choice if entry[0] == "+" or not fuses]
    compilation.custom_ops.extend(entry for entry in chosen if entry not in compilation.custom_ops)
    logger.info("custom_ops, as measured: %s", " ".join(chosen) or "as they are")
