"""Something to do to a module as soon as it is imported, by whomever and however late: nothing is imported for it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm_compile_ext import harmless

logger = logging.getLogger(__name__)

Undo = Callable[[], None]


def install(changes: Mapping[str, Callable[[ModuleType], Undo]]) -> Undo:
    """Make each change as soon as its module is imported; the returned undo takes all of them back."""
    undos: list[Undo] = []

    def wait(name: str, make: Callable[[ModuleType], Undo]) -> Undo:
        return after_import(name, lambda module: undos.append(make(module)))

    waits = [wait(name, make) for name, make in changes.items()]

    def undo() -> None:
        for stop in waits:
            stop()
        while undos:
            undos.pop()()

    return undo


def replace(owner: Any, name: str, around: Callable[[Any], Any]) -> Undo:
    """Put ``around(stock)`` in the place of the function `name` of `owner`."""
    stock = getattr(owner, name)
    setattr(owner, name, functools.wraps(stock)(around(stock)))
    return lambda: setattr(owner, name, stock)


def after_import(name: str, then: Callable[[Any], None]) -> Undo:
    """Call `then` with the module `name`: now where it is imported, else when it is; what it raises costs a line.

    The returned undo takes the waiting back; what `then` did is the caller's to undo.
    """
    module = sys.modules.get(name)
    if module is not None:
        _call(then, module)
        return lambda: None
    finder = _Finder(name, then)
    sys.meta_path.insert(0, finder)
    return finder.leave


def _call(then: Callable[[Any], None], module: ModuleType) -> None:
    try:
        then(module)
    except Exception as error:  # whoever imports it must not fail
        logger.warning("%s stays as vLLM has it: %s", module.__name__, harmless.error(error))


class _Finder(MetaPathFinder):
    """Finds one module, once, and lets its loader call `then` at the end."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then, self.asking = name, then, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.asking:
            return None
        # By the finders behind this one: another may wait for the same module.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        self.asking = True  # one of them may ask all finders in turn (record/imports.py)
        try:
            found = next((spec for spec in specs if spec is not None), None)
        finally:
            self.asking = False
        if found is None or found.loader is None:
            return None
        found.loader = _Loader(found.loader, self)
        return found

    def imported(self, module: ModuleType) -> None:
        """`module` is there."""
        self.leave()
        _call(self.then, module)

    def leave(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Loads once as `loader` does, which other modules may share, and gives way to it."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.imported(module)
