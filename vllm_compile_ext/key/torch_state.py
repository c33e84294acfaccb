"""What was switched in torch past the settings of its compilers: flags of its backends, and what Dynamo guards.

Found by looking, not from a list: what another torch adds counts.  Nothing here initialises CUDA.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Iterator
from typing import Any

from vllm_compile_ext.key import readable
from vllm_compile_ext.key.dropped import counts

_PLAIN = (bool, int, float, str)


def state() -> dict[str, str]:
    """Name -> value as text.

    guards: what Dynamo compares before it runs code (`GlobalStateGuard`).  c: what `torch._C` answers without being
    told more.  backends: what the modules of `torch.backends` keep themselves, or ask `torch._C` with arguments.
    """
    import torch
    from torch._C._dynamo.guards import GlobalStateGuard

    guards = json.loads(str(GlobalStateGuard().__getstate__()))
    own = {name: _answer(getattr(torch._C, name)) for name in _getters()}
    return readable.flat_all({"guards": guards, "c": own} | dict(_backend("backends", torch.backends)))


@functools.cache
def _getters() -> list[str]:
    """The functions of `torch._C` that read one plain value: called once, those that want arguments say so."""
    import torch

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
    return isinstance(value, _PLAIN) or hasattr(type(value), "__members__")


def _backend(name: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """The plain values of a module of `torch.backends`, of one of its objects, and of what lies in them."""
    for attribute in _attributes(owner):
        below = f"{name}.{attribute}"
        if not counts(f"state.{below}"):
            continue
        value = _answer(functools.partial(getattr, owner, attribute, None))
        if _is_plain(value):
            yield below, value
        elif _is_backend(value):
            yield from _backend(below, value)


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
