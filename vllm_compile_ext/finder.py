"""The plugin's one finder on `sys.meta_path`: serves our modules, calls hooks after an import, and times imports.

The plugin puts it in place, and in processes that look like vLLM's `early.py` does before.  It finds nothing of
others itself: it asks the finders behind it, and changes how what they find is run.

Served are three kinds of names, the first while `Finder.swapped`:

* ``vllm.compilation.<name>``, for each name of `REPLACED`, *is* the module ``vllm_compile_ext.compilation.<name>``: one
  object under two names, so that tracebacks, `inspect.getsource` and pickled references all lead to our file;
* ``vllm_compile_ext.upstream.<name>`` of these is then vLLM's own file, run as a module of its own;
* ``vllm_compile_ext.upstream.<anything else>`` is the very module that vLLM uses, so that counters and other shared
  state exist once.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import sys
import time
from _thread import _local
from importlib.machinery import ExtensionFileLoader, SourceFileLoader, SourcelessFileLoader

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

STARTED = time.time_ns()  # the interpreter is up, as far as is known here

REPLACED = ("backends", "decorators", "wrapper")
THEIRS = "vllm.compilation"
OURS = "vllm_compile_ext.compilation"
UPSTREAM = "vllm_compile_ext.upstream"

# Timed wherever they are imported; of the rest only what nothing else imports.
_HEAVY = """
torch torch._dynamo torch._inductor torch.distributed torchvision torchaudio triton transformers tokenizers
numpy scipy numba sympy fastapi pydantic openai anthropic huggingface_hub opentelemetry prometheus_client
uvicorn uvloop aiohttp zmq cv2 PIL ray flashinfer xgrammar outlines_core llguidance mistral_common
compressed_tensors gguf safetensors sentencepiece tiktoken vllm vllm.config vllm.engine vllm.entrypoints
vllm.model_executor vllm.multimodal vllm.platforms vllm.transformers_utils vllm.v1 vllm._C vllm.distributed
vllm.lora vllm_compile_ext.plugin
"""
HEAVY = frozenset(_HEAVY.split())
# New for each module, so that one of them can be told to run its module differently.
_LOADERS = (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader)


class Interval:
    """One timed import, in unix ns.

    around: the import that it is part of, of its thread.  owner: what `Finder.owner` said when it began.  span: free
    for whoever records it.
    """

    __slots__ = ("around", "end", "name", "owner", "span", "start")

    def __init__(self, name: str, around: Interval | None, owner: Any) -> None:
        self.name, self.around, self.owner = name, around, owner
        self.start = time.time_ns()
        self.end = 0
        self.span: Any = None


class Finder:
    """See above.

    swapped: whether our modules are served under vLLM's names.  timing: whether imports are timed.
    intervals: finished imports of all threads.  sink: called with each instead, where there is one.
    owner: asked what an import that begins belongs to.
    hooks: name of a module -> functions that are called with it once it is imported.
    before: called once, before vLLM is imported.
    """

    def __init__(self) -> None:
        self.swapped = False
        self.timing = False
        self.intervals: list[Interval] = []
        self.sink: Callable[[Interval], None] | None = None
        self.owner: Callable[[], Any] | None = None
        self.hooks: dict[str, list[Callable[[ModuleType], None]]] = {}
        self.before: Callable[[], None] | None = None
        self._thread = _local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "vllm" and self.before is not None:
            before, self.before = self.before, None
            before()
        thread = self._thread.__dict__
        if name.startswith(f"{UPSTREAM}."):  # at any depth: a second copy of a module would have state of its own
            return self._serve(name, name.removeprefix(f"{UPSTREAM}."))
        package, _, tail = name.rpartition(".")
        if self.swapped and package == THEIRS and tail in REPLACED:
            return self._serve(name, tail)
        timed = self.timing and (thread.get("open") is None or name in HEAVY)
        if thread.get("busy") or (not timed and name not in self.hooks):
            return None
        thread["busy"] = True
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find(name, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    self._watch(spec)
                    return spec
            return None
        finally:
            thread["busy"] = False

    def _watch(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        if type(loader) in _LOADERS:

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # of this loader; its class's is there again
                self._run(loader, module)

            loader.exec_module = exec_module
        elif spec.name in self.hooks and loader is not None:
            spec.loader = _Once(self, loader)  # type: ignore[assignment]

    def _serve(self, name: str, tail: str) -> ModuleSpec | None:
        import importlib.util
        from importlib.machinery import ModuleSpec, PathFinder

        ours = name.startswith(THEIRS)
        if not ours and self.swapped and tail in REPLACED:  # vLLM's file, as a module of its own
            found = PathFinder.find_spec(f"{THEIRS}.{tail}", importlib.import_module(THEIRS).__path__)
            if found is None or found.origin is None:
                return None
            return importlib.util.spec_from_file_location(
                name, found.origin, loader=SourceFileLoader(name, found.origin)
            )
        target = f"{OURS if ours else THEIRS}.{tail}"
        found = importlib.util.find_spec(target)
        loader: Any = _Alias(target)
        return ModuleSpec(name, loader, origin=found.origin) if found else None

    def _run(self, loader: Any, module: ModuleType) -> None:
        name = module.__name__
        outer = self._thread.__dict__.get("open")
        if self.timing:
            interval = Interval(name, outer, self.owner() if self.owner is not None and outer is None else None)
            self._thread.open = interval
            try:
                loader.exec_module(module)
            finally:
                self._thread.open = outer
                interval.end = time.time_ns()
                _call(self.sink or self.intervals.append, interval)
        else:
            loader.exec_module(module)
        for hook in self.hooks.pop(name, ()):
            _call(hook, module)

    def stop_timing(self) -> None:
        """Time no more imports, and forget those that were timed."""
        self.timing, self.sink, self.owner = False, None, None
        self.intervals.clear()

    def after(self, name: str, hook: Callable[[ModuleType], None]) -> Callable[[], None]:
        """Call `hook` with the module `name`: now where it is imported, else once it is.  Returns the undo of waiting.

        Raises what `hook` raises where it is called now; what it raises later is a line of the debug log.
        """
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            hook(module)
            return lambda: None
        waiting = self.hooks.setdefault(name, [])
        waiting.append(hook)

        def undo() -> None:
            if hook in waiting:
                waiting.remove(hook)
            if not self.hooks.get(name, True):
                del self.hooks[name]

        return undo


def _call(function: Callable[[Any], None], argument: Any) -> None:
    """Call what must not make an import fail."""
    try:
        function(argument)
    except Exception as error:
        import logging

        logging.getLogger(__name__).debug("while importing: %s", type(error).__name__)


class _Once:
    """Loads one module as `loader` does, which others may share, and gives way to it."""

    def __init__(self, finder: Finder, loader: Any) -> None:
        self.finder, self.loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self.loader
        self.finder._run(self.loader, module)


class _Alias:
    """Makes one module importable under a second name; its own `__name__`, `__file__` and `__spec__` stay."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        import importlib

        module = importlib.import_module(self.target)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has just put the alias's there


class TooLateError(RuntimeError):
    """vLLM's modules are already imported; the message says what to do."""


finder = Finder()


def install() -> Finder:
    """The finder of this process, first on `sys.meta_path`."""
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)
    return finder


def remove() -> None:
    """Take the finder away, with all that waits in it."""
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
    finder.stop_timing()
    finder.hooks.clear()
    finder.before = None


def swap() -> Callable[[], None]:
    """Serve our modules under vLLM's names; returns the undo, after which the next import of each is stock again.

    Raises `TooLateError` where vLLM's are already imported: classes made with them would stay stock while later ones
    would not.
    """
    if late := [name for name in (f"{THEIRS}.{tail}" for tail in REPLACED) if name in sys.modules]:
        raise TooLateError(
            f"{', '.join(late)} imported before the plugin was loaded: "
            "call vllm_compile_ext.plugin.register() before importing vLLM's models"
        )
    install().swapped = True

    def undo() -> None:
        finder.swapped = False
        for package in (THEIRS, OURS, UPSTREAM):
            for name in [m for m in sys.modules if m.startswith(package + ".")]:
                tail = name.removeprefix(package + ".")
                if tail in REPLACED or package == UPSTREAM:
                    del sys.modules[name]
                    vars(sys.modules[package]).pop(tail, None)

    return undo
