"""The import hook: our modules under vLLM's names, and vLLM's own under ours.

While the hook is installed

* ``vllm.compilation.<name>``, for each name of `REPLACED`, *is* the module ``vllm_compile_ext.compilation.<name>``: one
  object under two names, so that tracebacks, `inspect.getsource` and pickled references all lead to our file;
* ``vllm_compile_ext.upstream.<name>`` is vLLM's own file of that name, run as a module of its own;
* ``vllm_compile_ext.upstream.<anything else>`` is the very module that vLLM uses, so that counters and other shared
  state exist once.

Without the hook every ``vllm_compile_ext.upstream.<name>`` is the module that vLLM uses.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

REPLACED = ("backends", "decorators", "wrapper")

THEIRS = "vllm.compilation"
OURS = "vllm_compile_ext.compilation"
UPSTREAM = "vllm_compile_ext.upstream"


class _AliasLoader(Loader):
    """Makes one module importable under a second name; its own `__name__`, `__file__` and `__spec__` stay."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.target)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has just put the alias's spec there


def _alias(name: str, target: str) -> ModuleSpec | None:
    found = importlib.util.find_spec(target)
    return ModuleSpec(name, _AliasLoader(target), origin=found.origin) if found else None


class SwapFinder(MetaPathFinder):
    """Serves the names that the module's docstring lists, and nothing else."""

    def __init__(self, replaced: Sequence[str]) -> None:
        self.replaced = tuple(replaced)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package == THEIRS and name in self.replaced:
            return _alias(fullname, f"{OURS}.{name}")
        if not fullname.startswith(UPSTREAM + "."):
            return None
        name = fullname.removeprefix(UPSTREAM + ".")
        if name in self.replaced:
            return self._upstream_file(fullname, name)
        return _alias(fullname, f"{THEIRS}.{name}")

    @staticmethod
    def _upstream_file(fullname: str, name: str) -> ModuleSpec | None:
        package = importlib.import_module(THEIRS)
        found = PathFinder.find_spec(f"{THEIRS}.{name}", package.__path__)
        if found is None or found.origin is None:
            return None
        loader = SourceFileLoader(fullname, found.origin)
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=loader)


def already_imported() -> list[str]:
    """Upstream's modules of `REPLACED` that this process has imported: too late to swap those."""
    return [f"{THEIRS}.{name}" for name in REPLACED if f"{THEIRS}.{name}" in sys.modules]


def installed() -> SwapFinder | None:
    """The hook that serves the swap in this process, or None."""
    return next((f for f in sys.meta_path if isinstance(f, SwapFinder) and f.replaced), None)


def install() -> None:
    """Put the hook first on `sys.meta_path`; twice is the same as once.

    Raises `RuntimeError` when upstream's modules are already imported: classes made with them would stay stock while
    later ones would not.
    """
    if installed():
        return
    if late := already_imported():
        raise RuntimeError(f"{', '.join(late)} imported before the plugin was loaded")
    sys.meta_path.insert(0, SwapFinder(REPLACED))


def uninstall() -> None:
    """Take the hook away and forget the swapped modules: the next import of each is stock again."""
    hook = installed()
    if hook is None:
        return
    sys.meta_path.remove(hook)
    for package in (THEIRS, OURS, UPSTREAM):
        for name in [m for m in sys.modules if m.startswith(package + ".")]:
            tail = name.removeprefix(package + ".")
            if tail in REPLACED or package == UPSTREAM:
                del sys.modules[name]
                vars(sys.modules[package]).pop(tail, None)
