"""Environment variables and settings of torch's compilers that go into compiled code."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from vllm_compile_ext.key import readable

# Variables that torch's compilers read while they compile, past their settings (torch 2.13.0, `_inductor`).
READ_WHILE_COMPILING = (
    "ATEN_CPU_CAPABILITY",
    "FX_PATCH_GETITEM",
    "PYTORCH_ROCM_ARCH",
    "TENSORIFY_PYTHON_SCALARS",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_DEBUG_COMPILE",
    "TORCHINDUCTOR_DEBUG_SYMBOL",
    "TORCHINDUCTOR_PATTERN_MATCH_BACKEND",
    "TRITON_INTERPRET",
    "TRITON_USE_META_WS",
)


def variables(*, cpu: bool) -> dict[str, str]:
    """Every variable that vLLM counts, those that torch reads while it compiles, and those that Triton counts."""
    import vllm.envs

    found: dict[str, Any] = dict(vllm.envs.compile_factors())
    found |= {name: os.environ[name] for name in READ_WHILE_COMPILING if name in os.environ}
    found |= {} if cpu else _triton()
    return {name: readable.text(value, name) for name, value in found.items() if value is not None}


def _triton() -> dict[str, str]:
    """Those of Triton's own cache that are set; Inductor sets those that are paths."""
    try:
        found = importlib.import_module("triton._C.libtriton").get_cache_invalidating_env_vars()
    except (ImportError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if not name.endswith("_PATH")}


def of_compilers(overridden: Mapping[str, Any]) -> dict[str, str]:
    """Settings of torch's compilers, and torch's own sources as one digest.

    Settings of Inductor that the configuration overrides do not count; they differ between an engine that runs in the
    process of its user and one that does not (`cpp.dynamic_threads`, which `platforms/cpu.py` hands down in a
    variable).
    """
    import torch._dynamo.config
    import torch._inductor.config_comms
    import torch.fx.experimental._config
    from vllm.compilation.compiler_interface import get_inductor_factors

    found: dict[str, Any] = {}
    own: dict[str, str] = {}
    layers = {
        "comms": torch._inductor.config_comms.save_config_portable(),
        "dynamo": torch._dynamo.config.save_config_portable(),
        "fx": torch.fx.experimental._config.save_config_portable(),
    }
    match get_inductor_factors():
        case [{"hash": _, **system}, bytes(sources), dict(inductor), dict(functorch)]:
            own = {"torch.sources": sources.hex()[:32]}
            found |= {"system": system or None}
            layers |= {"functorch": functorch}
            layers |= {"inductor": {name: value for name, value in inductor.items() if name not in overridden}}
        case unknown:
            found["inductor"] = str(unknown)
    found |= {f"{layer}.{name}": value for layer, each in layers.items() for name, value in each.items()}
    return own | readable.flat_all(found)
