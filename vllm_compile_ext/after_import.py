"""Change a module when it is imported: the plugin loads before most of vLLM, and importing it early costs seconds."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

Undo = Callable[[], None]
Make = Callable[[ModuleType], Undo]


class _Loader(Loader):
    """Loads as `loader` does, then makes the change."""

    def __init__(self, loader: Loader, change: Callable[[ModuleType], None]) -> None:
        self._loader, self._change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._change(module)


class _Finder(MetaPathFinder):
    def __init__(self, changes: Mapping[str, Make], undos: list[Undo]) -> None:
        self._changes, self._undos, self._busy = dict(changes), undos, set[str]()

    def make(self, module: ModuleType) -> None:
        self._undos.append(self._changes[module.__name__](module))

    def _make_late(self, module: ModuleType) -> None:
        try:
            self.make(module)
        except Exception as error:  # the import must not fail for it
            what = f"{type(error).__name__}: {error}"
            logger.warning("%s stays as in stock vLLM, changing it failed (%s)", module.__name__, what)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._changes or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._make_late)
        return spec


def install(changes: Mapping[str, Make]) -> Undo:
    """Make each change when its module is imported, at once where that has happened; undo all of them.

    A change that fails at once raises, and leaves nothing behind; one that fails later is logged.
    """
    undos: list[Undo] = []
    finder = _Finder(changes, undos)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        while undos:
            undos.pop()()

    try:
        for name in changes:
            if (module := sys.modules.get(name)) is not None:
                finder.make(module)
    except BaseException:
        undo()
        raise
    sys.meta_path.insert(0, finder)
    return undo
