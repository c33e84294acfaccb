"""Dynamo's transformed bytecode of one function, as bytes: the code object and everything it reaches by name.

The bytecode calls a backend's compiled function, which it finds among its globals under `backend`.
"""

from __future__ import annotations

import importlib
import marshal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import CodeType, FunctionType, ModuleType
from typing import Any

# A code object means something to the Python that made it and to no other.
PYTHON = f"{sys.implementation.cache_tag} {sys.hexversion:#x}"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


class NotSaved(Exception):  # noqa: N818 - an answer, not an error
    """The code uses something that has no name in another process; the message says what."""


@dataclass(frozen=True)
class Transformed:
    """code: what Dynamo made of a function.  backend: the global that holds the compiled function.

    imports: global name -> module to import.  named: global name -> (module, qualified name) of a function or class.
    plain: global name -> a constant.  defaults, kwdefaults: of the function's parameters; constants.
    """

    code: CodeType
    backend: str
    imports: dict[str, str]
    named: dict[str, tuple[str, str]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    defaults: tuple[Any, ...] | None = None
    kwdefaults: dict[str, Any] | None = None
    # Globals that the code needs besides.
    around: tuple[str, ...] = ()

    def function(self, compiled: Callable[..., Any], traced: FunctionType) -> FunctionType:
        """The function, calling `compiled`, with the globals and the closure of the function that was traced.

        Raises `ImportError`, `AttributeError`, `LookupError` when something that the code names is not there.
        """
        space: dict[str, Any] = {alias: importlib.import_module(name) for alias, name in self.imports.items()}
        space |= {alias: _find(*place) for alias, place in self.named.items()}
        space |= self.plain | traced.__globals__ | {self.backend: compiled}
        if missing := [name for name in self.around if name not in space]:
            raise LookupError(f"the bytecode needs the globals {', '.join(missing)}")
        cells = dict(zip(traced.__code__.co_freevars, traced.__closure__ or (), strict=True))
        if missing := [name for name in self.code.co_freevars if name not in cells]:
            raise LookupError(f"the bytecode needs the closure over {', '.join(missing)}")
        closure = tuple(cells[name] for name in self.code.co_freevars)
        made = FunctionType(self.code, space, argdefs=self.defaults, closure=closure)
        made.__kwdefaults__ = self.kwdefaults
        return made


def capture(environment: Any, backend: str) -> Transformed:
    """What `torch._dynamo.convert_frame.GraphRuntimeEnv` (torch 2.13.0) holds.  Raises `NotSaved`."""
    names = _names(environment.bytecode)
    imports = {alias: name for alias, name in environment.import_sources.items() if alias in names}
    named, plain = {}, {}
    for alias, value in environment.used_globals.items():
        if isinstance(value, ModuleType):
            imports[alias] = value.__name__
        elif _is_plain(value):
            plain[alias] = value
        else:
            named[alias] = _name(alias, value)
    for value in (*(environment.argdefs or ()), *(environment.kwdefaults or {}).values()):
        if not _is_plain(value):
            raise NotSaved(f"the default {value!r} of a parameter")
    return Transformed(
        environment.bytecode,
        backend,
        imports,
        named,
        plain,
        environment.argdefs,
        environment.kwdefaults or None,
        tuple(sorted(environment.external_refs)),
    )


def dumps(code: Transformed) -> bytes:
    """As bytes, for the Python that runs now.  Raises `NotSaved` when a constant of the code has no bytes."""
    try:
        return marshal.dumps((PYTHON, *(getattr(code, part.name) for part in fields(code))))
    except ValueError as error:
        raise NotSaved(f"a constant of the bytecode ({error})") from error


def loads(data: bytes) -> Transformed:
    """The inverse of `dumps`.  Raises `ValueError` for another Python's bytes; check a digest of `data` first."""
    found = marshal.loads(data)
    if found[0] != PYTHON:
        raise ValueError(f"bytecode of Python {found[0]}, and this is {PYTHON}")
    return Transformed(*found[1:])


def _names(code: CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in _PLAIN


def _name(alias: str, value: Any) -> tuple[str, str]:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    try:
        if module and name and _find(module, name) is value:
            return module, name
    except (ImportError, AttributeError):
        pass
    raise NotSaved(f"the global {alias}, a {type(value).__name__} without a name")


def _find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
