"""What of torch goes into compiled code besides its version: variables, settings of its compilers, and its own state.

Found by looking, not from a list: what another torch adds counts.  Nothing here initialises CUDA.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

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
_INITIALISES_CUDA = "backends.cuda.cufft_plan_cache"  # and is the size of a cache


def variables(*, cpu: bool) -> dict[str, str]:
    """Every variable that vLLM counts, those that torch reads while it compiles, and those that Triton counts."""
    import vllm.envs

    found: dict[str, Any] = dict(vllm.envs.compile_factors())
    found |= {name: os.environ[name] for name in READ_WHILE_COMPILING if name in os.environ}
    if not cpu:
        try:
            triton = importlib.import_module("triton._C.libtriton").get_cache_invalidating_env_vars()
        except (ImportError, AttributeError):
            triton = {}
        found |= {name: value for name, value in triton.items() if not name.endswith("_PATH")}  # Inductor sets paths
    return {name: readable.text(value, name) for name, value in found.items() if value is not None}


def compilers(overridden: Mapping[str, Any]) -> dict[str, str]:
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
    sources: dict[str, str] = {}
    layers = {
        "comms": torch._inductor.config_comms.save_config_portable(),
        "dynamo": torch._dynamo.config.save_config_portable(),
        "fx": torch.fx.experimental._config.save_config_portable(),
    }
    match get_inductor_factors():
        case [{"hash": _, **system}, bytes(digest), dict(inductor), dict(functorch)]:
            sources = {"torch.sources": digest.hex()[:32]}
            found["system"] = system or None
            layers |= {"functorch": functorch}
            layers |= {"inductor": {name: value for name, value in inductor.items() if name not in overridden}}
        case unknown:
            found["inductor"] = str(unknown)
    found |= {f"{layer}.{name}": value for layer, settings in layers.items() for name, value in settings.items()}
    return sources | readable.flat(found)


def state() -> dict[str, str]:
    """What was switched in torch past the settings of its compilers, name -> value as text.

    guards: what Dynamo compares before it runs code (`GlobalStateGuard`).  c: what `torch._C` answers without being
    told more.  backends: what the modules of `torch.backends` keep themselves, or ask `torch._C` with arguments.
    """
    from torch._C._dynamo.guards import GlobalStateGuard

    guards = json.loads(str(GlobalStateGuard().__getstate__()))
    answers = {name: _answer(getattr(torch._C, name)) for name in _getters()}
    return readable.flat({"guards": guards, "c": answers} | dict(_switches("backends", torch.backends)))


@functools.cache
def _getters() -> list[str]:
    """The functions of `torch._C` that read one plain value: called once, those that want arguments say so."""
    names = [name for name in dir(torch._C) if name.startswith("_get_")]
    answers = {name: _answer(getattr(torch._C, name)) for name in names}
    return [name for name, value in answers.items() if value is None or _is_plain(value)]


def _answer(getter: Any) -> Any:
    try:
        return getter()
    except TypeError:  # it wants arguments
        return getter
    except RuntimeError as error:  # torch's old and new flags for precision, both used (torch 2.13.0, `Context.cpp`)
        return str(error).partition("\n")[0]


def _is_plain(value: Any) -> bool:
    """Whether a value says by itself what it is: also a member of one of torch's enums."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str) or hasattr(type(value), "__members__")


def _switches(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """The plain values of a module of `torch.backends`, of one of its objects, and of what lies in them."""
    for attribute in _attributes(owner):
        below = f"{name}.{attribute}"
        if below == _INITIALISES_CUDA:
            continue
        value = _answer(functools.partial(getattr, owner, attribute, None))
        if _is_plain(value):
            yield below, value
        elif _is_backend(value):
            yield from _switches(below, value)


def _attributes(owner: Any) -> list[str]:
    """Names of what may be a value: variables, properties, and the names that a `__getattr__` of its own compares."""
    inner = getattr(owner, "m", owner)  # of a module that torch put into the place of another
    names = {key for key, value in vars(inner).items() if _is_plain(value) or _is_backend(value)}
    for kind in type(owner).__mro__:
        if kind.__module__.startswith("torch.backends"):
            names |= {key for key, value in vars(kind).items() if not inspect.isroutine(value)}
            names |= set(vars(kind)["__getattr__"].__code__.co_consts) if "__getattr__" in vars(kind) else set()
    return sorted(name for name in names if isinstance(name, str) and name.isidentifier() and name[:2] != "__")


def _is_backend(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return value.__name__.startswith("torch.backends.")
    return type(value).__module__.startswith("torch.backends")
