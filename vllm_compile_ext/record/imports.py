"""Times imports, and tells when a module has just been imported.

`install` puts an observer first on `sys.meta_path`.  The file ``vllm_compile_ext.pth``, which Python reads when it
starts, calls it in processes that look like vLLM's; elsewhere the plugin does when it is loaded.  Until somebody takes
what was found, it is a list in memory.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import os
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

VARIABLES = ("VLLM_COMPILE_EXT", "VLLM_COMPILE_STARTS")
_OFF = ("0", "false", "no", "off")

# Timed wherever they are imported; of the rest only what nothing else imports.
_HEAVY = """
( torch torch._dynamo torch._inductor torch.distributed torchvision torchaudio triton transformers tokenizers
numpy scipy numba sympy fastapi pydantic openai anthropic huggingface_hub opentelemetry prometheus_client
uvicorn uvloop aiohttp zmq cv2 PIL ray flashinfer xgrammar outlines_core llguidance mistral_common
compressed_tensors gguf safetensors sentencepiece tiktoken vllm vllm.config vllm.engine vllm.entrypoints
vllm.model_executor vllm.multimodal vllm.platforms vllm.transformers_utils vllm.v1 vllm._C vllm.distributed
vllm.lora vllm_compile_ext.plugin
"""
HEAVY = frozenset(_HEAVY.split())
# New for each module, so that one of them can be told to load its module differently.
_LOADERS = (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader)


class Interval:
    """One import.  around: the import that it is part of; here: whether it was the outermost of its thread.

    span: what the interval became in the record, see `vllm_compile_ext.record.recorder`.
    """

    __slots__ = ("around", "end", "name", "owner", "span", "start")

    def __init__(self, name: str, around: Interval | None, owner: Any) -> None:
        self.name, self.around, self.owner = name, around, owner
        self.start = time.time_ns()
        self.end = 0
        self.span: Any = None


class Observer:
    """The finder on `sys.meta_path`: finds nothing itself, it changes how what others find is run."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []  # finished, of all threads
        self.sink: Callable[[Interval], None] | None = None  # called with each further one that is finished
        self.owner: Callable[[], Any] | None = None  # asked what an import that begins is part of
        # name of a module -> functions that are called with it when it has been imported
        self.hooks: dict[str, list[Callable[[ModuleType], None]]] = {}
        self.errors: list[str] = []
        self.watching = True  # else imports are not timed, and hooks are all that is left
        self._local = _local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        local = self._local.__dict__
        inner = local.get("open") is not None or not self.watching
        if local.get("busy") or (inner and name not in self.hooks and not (self.watching and name in HEAVY)):
            return None
        local["busy"] = True
        try:
            return self._find(name, path, target)
        finally:
            local["busy"] = False

    def _find(self, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if type(spec.loader) in _LOADERS:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        loader.exec_module = lambda module: self._run(loader, module)

    def _run(self, loader: Any, module: ModuleType) -> None:
        del loader.exec_module  # of this loader; its class's is there again
        name = module.__name__
        outer = self._local.__dict__.get("open")
        interval = Interval(name, outer, self.owner() if self.owner is not None and outer is None else None)
        self._local.open = interval
        try:
            loader.exec_module(module)
        finally:
            self._local.open = outer
            interval.end = time.time_ns()
            self._done(interval)
        for hook in self.hooks.pop(name, ()):
            try:
                hook(module)
            except Exception as error:  # an import must not fail because of us
                self.errors.append(f"{name}: {type(error).__name__}: {error}")

    def _done(self, interval: Interval) -> None:
        if not self.watching:
            return
        sink = self.sink
        if sink is None:
            self.intervals.append(interval)
            return
        try:
            sink(interval)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def current(self) -> Interval | None:
        """The import that this thread is in the middle of, or None."""
        return self._local.__dict__.get("open")

    def when(self, name: str, hook: Callable[[ModuleType], None]) -> None:
        """Call `hook` with the module `name`: now where it is imported, or else when it has been."""
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            hook(module)
        else:
            self.hooks.setdefault(name, []).append(hook)

    def remove(self) -> None:
        """Take the observer away."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


observer: Observer | None = None
early = False  # whether the .pth file put it there


def off() -> bool:
    """Whether a variable switches the record off.  A value that cannot be read is for the plugin to complain about."""
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "compile_ext" not in plugins.split(","):
        return True
    return any(os.environ.get(name, "").strip().lower() in _OFF for name in VARIABLES)


def install() -> Observer:
    """The observer of this process, put in place where there is none."""
    global observer
    if observer is None or observer not in sys.meta_path:
        observer = Observer()
        sys.meta_path.insert(0, observer)
    return observer


def begin() -> None:
    """Called by the .pth file: watch from here, and record vLLM's own spans from its first on."""
    global early
    if early or off():
        return
    early = True
    install().when("vllm.tracing.otel", _tracing)


def _tracing(module: ModuleType) -> None:
    from vllm_compile_ext.record import recorder

    recorder.meet(module)
