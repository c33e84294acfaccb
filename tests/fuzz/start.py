"""One start of each toy model of `loads.py`.  Imported by forks of `tests/parent.py` only: it loads the plugin."""

from __future__ import annotations

import importlib
import linecache
import sys
import types
from typing import Any

import torch

from tests import toys
from tests.fuzz import loads


@torch.library.custom_op("fuzz::scale", mutates_args=())
def _scale(x: torch.Tensor, k: float) -> torch.Tensor:
    return x * k


@_scale.register_fake
def _(x: torch.Tensor, k: float) -> torch.Tensor:
    return torch.empty_like(x)


def scale(y: torch.Tensor, k: float) -> torch.Tensor:
    """`y * k` as one operator: Inductor makes no kernel of it, so that nothing waits for a C++ compiler."""
    return torch.ops.fuzz.scale(y, k)


def run(state: int, names: list[str]) -> dict[str, Any]:
    """For each change, or the named ones, what a start in the first state (0) or the other one (1) gives."""
    sys.dont_write_bytecode = True
    return {name: _start(loads.CHANGES[name], state) for name in names or loads.CHANGES}


def _start(change: loads.Change, state: int) -> dict[str, Any]:
    v = change.values[state]
    loads.write(change, v)
    importlib.invalidate_caches()
    torch._dynamo.reset()
    found: dict[str, Any] = {}
    with toys.counted() as counts, change.around(v):
        try:
            module = _cell(change, v) if change.cell else importlib.import_module(change.module)
            model = module.prepare(
                toys.build(module.Model, toys.config(f"root_{change.module}")).requires_grad_(False),
                getattr(torch, v) if v in ("float32", "float64") else v,
            )
            x = toys.tokens()
            expected = toys.eager(model, x)
            got = model(x)
            size = float(expected.abs().max())
            found = {
                "off": float((got - expected).abs().max()) / size,
                "expected": expected.flatten()[:8].tolist(),
                "again": float((model(x) - expected).abs().max()) / size,
            }
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
    found |= {"loaded": counts["num_aot_artifacts_loaded"], "kept": counts["num_aot_artifacts_saved"]}
    return found


def _cell(change: loads.Change, v: Any) -> types.ModuleType:
    """What running a notebook's cell makes: code whose file does not exist."""
    module, text = types.ModuleType(change.module), change.text(v)
    sys.modules[change.module] = module
    name = f"/tmp/ipykernel_1/{change.module}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
    return module
