"""Dynamo's transformed bytecode of one function, as bytes: the code object and everything it reaches by name.

The bytecode calls a backend's compiled function, which it finds among its globals under `backend`.
"""

from __future__ import annotations

import importlib
import marshal
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from vllm_compile_ext.program import NotKept
from vllm_compile_ext.trace.plan import PYTHON

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


@dataclass(frozen=True)
class Bytecode:
    """code: what Dynamo made of a function.  backend: the global that holds the compiled function.

    imports: global -> module to import.  named: global -> (module, qualified name) of a function or class.
    constants: global -> value.  defaults, kwdefaults: of the function's parameters; constants.
    needed: further globals, which the traced function has.
    """

    code: CodeType
    backend: str
    imports: dict[str, str]
    named: dict[str, tuple[str, str]]
    constants: dict[str, Any]
    defaults: tuple[Any, ...] | None
    kwdefaults: dict[str, Any] | None
    needed: tuple[str, ...]

    @classmethod
    def capture(cls, environment: Any, backend: str) -> Bytecode:
        """Take what `torch._dynamo.convert_frame.GraphRuntimeEnv` (torch 2.13.0) holds.  Raises `NotKept`."""
        names = _names(environment.bytecode)
        imports = {alias: name for alias, name in environment.import_sources.items() if alias in names}
        named, constants = {}, {}
        for alias, value in environment.used_globals.items():
            if isinstance(value, ModuleType):
                imports[alias] = value.__name__
            elif _is_constant(value):
                constants[alias] = value
            else:
                named[alias] = _name(alias, value)
        for value in (*(environment.argdefs or ()), *(environment.kwdefaults or {}).values()):
            if not _is_constant(value):
                raise NotKept(f"the default {value!r} of a parameter")
        defaults, needed = environment.argdefs, tuple(sorted(environment.external_refs))
        kwdefaults = environment.kwdefaults or None
        return cls(environment.bytecode, backend, imports, named, constants, defaults, kwdefaults, needed)

    def function(self, compiled: Callable[..., Any], traced: FunctionType) -> FunctionType:
        """The function, calling `compiled`, with the globals and the closure of the function that was traced.

        Raises `ImportError`, `AttributeError`, `LookupError` when something that the code names is not there.
        """
        space: dict[str, Any] = {alias: importlib.import_module(name) for alias, name in self.imports.items()}
        space |= {alias: _find(*place) for alias, place in self.named.items()}
        space |= self.constants | traced.__globals__ | {self.backend: compiled}
        if missing := [name for name in self.needed if name not in space]:
            raise LookupError(f"the bytecode needs the globals {', '.join(missing)}")
        cells = dict(zip(traced.__code__.co_freevars, traced.__closure__ or (), strict=True))
        if missing := [name for name in self.code.co_freevars if name not in cells]:
            raise LookupError(f"the bytecode needs the closure over {', '.join(missing)}")
        closure = tuple(cells[name] for name in self.code.co_freevars)
        function = FunctionType(self.code, space, argdefs=self.defaults, closure=closure)
        function.__kwdefaults__ = self.kwdefaults
        return function

    def dumps(self) -> bytes:
        """As bytes, for the Python that runs now.  Raises `NotKept` when a constant of the code has no bytes."""
        try:
            return marshal.dumps((PYTHON, *vars(self).values()))
        except ValueError as error:
            raise NotKept(f"a constant of the bytecode ({error})") from error

    @classmethod
    def loads(cls, data: bytes) -> Bytecode:
        """The inverse of `dumps`.  Raises `ValueError` for another Python's bytes; check a digest of `data` first."""
        python, *parts = marshal.loads(data)
        if python != PYTHON:
            raise ValueError(f"bytecode of Python {python}, and this is {PYTHON}")
        return cls(*parts)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_constant, value))
    if type(value) is dict:
        return all(map(_is_constant, (*value, *value.values())))
    return type(value) in _CONSTANTS


def _name(alias: str, value: Any) -> tuple[str, str]:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    try:
        if module and name and _find(module, name) is value:
            return module, name
    except (ImportError, AttributeError):
        pass
    raise NotKept(f"the global {alias}, a {type(value).__name__} without a name")


def _find(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
