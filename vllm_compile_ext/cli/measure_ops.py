"""What ``vllm-compile-ext ops`` shows, a program of its own: ``measure_ops FILE WHAT [OPTIONS OF vllm serve]``.

WHAT: "all" ops, those that a model calls ("model"), or their times, too ("measure").  Writes a line of JSON to FILE.
Exit status 2: a bad option; the output is what vLLM says of it.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_compile_ext import harmless
from vllm_compile_ext.cli import warm_start
from vllm_compile_ext.cli.shared import STEP
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.ops import auto, dispatch, measure, model
from vllm_compile_ext.store.store import key_of


def classes() -> dict[str, Any]:
    """All light ops of vLLM by name.  Imports what this machine can import."""
    from vllm.model_executor import layers
    from vllm.model_executor.custom_op import CustomOp, op_registry

    for module in pkgutil.walk_packages(layers.__path__, f"{layers.__name__}.", onerror=lambda name: None):
        with suppress(Exception):
            importlib.import_module(module.name)
    found = {name: cls for name, cls in op_registry.items() if issubclass(cls, CustomOp)}
    return {name: cls for name, cls in sorted(found.items()) if model.is_light(cls)}


def platform() -> str:
    """As `dispatch` names it."""
    from vllm.platforms import current_platform

    for name in ("rocm", "cpu", "tpu", "xpu"):
        if getattr(current_platform, f"is_{name}")():
            return name
    return "out of tree" if current_platform.is_out_of_tree() else "cuda"


def main() -> None:
    to, what, *arguments = sys.argv[1:]
    if what == "measure":  # from what vLLM chooses
        os.environ["VLLM_COMPILE_CUSTOM_OPS"] = "stock"
    from vllm.config import VllmConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    args = warm_start.parse(arguments) if arguments else None
    asked = args is not None and bool(args.compilation_config.custom_ops)
    config = VllmConfig() if args is None else warm_start.configure(args)
    custom_ops = config.compilation_config.custom_ops
    calls, problem = model.find(config) if arguments else ([], None)
    ops, here = [], platform()
    used = {call.op.name: type(call.op) for call in calls}
    for name, cls in (classes() | used if what == "all" else used).items():
        enabled, why = dispatch.rule(name, custom_ops)
        kernel = dispatch.method(cls, here)
        row: dict[str, Any] = {
            "name": name,
            "implementations": dispatch.implementations(cls),
            "kernel": kernel,
            "rule": why,
        }
        ops.append(row | {"runs": _runs(kernel, enabled, config), "used": name in used})
    found: dict[str, Any] = {"ops": ops, "custom_ops": custom_ops, "problem": problem, "calls": [], "measured": None}
    found["asked"] = asked
    found["calls"] = [{"name": each.op.name, "shapes": each.shapes, "count": each.count} for each in calls]
    if what == "measure":
        found["measured"] = _measure(config, calls, {op["name"]: op["kernel"] for op in ops}, found["calls"])
    Path(to).write_text(json.dumps(found))


def _runs(kernel: str, enabled: bool, config: Any) -> str:
    from vllm.config import CompilationMode

    if enabled and kernel != "forward_native":
        return "kernel"
    return "native" if config.compilation_config.mode == CompilationMode.NONE else "compiled"


def _measure(config: Any, calls: list[Any], kernels: dict[str, str], shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Add figures to `shown`; returns an `auto.Measured`."""
    import torch
    from vllm.config import CompilationMode, set_current_vllm_config
    from vllm.platforms import current_platform

    device = torch.device("cpu" if current_platform.is_cpu() else current_platform.device_type)
    compilation = config.compilation_config
    graphs = device.type == "cuda" and compilation.cudagraph_mode.name != "NONE"
    figures: dict[str, list[list[Any]]] = {}
    workers.wait()  # which else take processors from what is measured
    with set_current_vllm_config(config):
        for call, row in zip(calls, shown, strict=True):
            kernel = kernels[call.op.name]
            if kernel == "forward_native":
                continue
            print(f"{STEP}measuring {call.op.name} {call.shapes}", flush=True)
            try:
                rows = measure.measure(call, kernel, config.model_config.max_model_len, device, graphs)
            except Exception as error:  # of kernels, and of the compiler
                row["problem"], rows = harmless.error(error), []
            row["figures"] = msgspec.to_builtins(rows)
            figures.setdefault(call.op.name, []).append(rows)
    compiled = compilation.mode != CompilationMode.NONE
    choice = []
    for name, found in figures.items():
        measured = [each for rows in found for each in rows] if all(found) else []
        choice += auto.choose(name, measured, compilation.custom_ops, compiled)
    factors = auto.factors(config)
    made: dict[str, Any] = msgspec.to_builtins(auto.Measured(key_of(factors), factors, choice))
    return made


if __name__ == "__main__":
    main()
