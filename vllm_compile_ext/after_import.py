"""Something to do to a module as soon as it is imported, by whomever and however late: nothing is imported for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)


def after_import(name: str, then: Callable[[Any], None]) -> Callable[[], None]:
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
        logger.warning("%s stays as vLLM has it: %s: %s", module.__name__, type(error).__name__, error)


class _Finder(MetaPathFinder):
    """Finds one module, once, and lets its loader call `then` at the end."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is None or found.loader is None:
            return None
        execute = found.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.leave()
            _call(self.then, module)

        found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found

    def leave(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
