"""One compilation on the plugin's path: what the wrapper that starts it and the backend that Dynamo calls share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from vllm_compile_ext.compilation.entry import Entry
from vllm_compile_ext.trace.regions import Tracer


class Session:
    """The model that is compiled, its tracer, its place in the store, and how far the compilation has come.

    compiling: the graph is understood and pieces are being compiled.  An error before this point means that the model
    is traced again as upstream does it; an error after it is the user's to see.
    """

    def __init__(self, model: Any, entry: Entry | None) -> None:
        self.model = model
        self.entry = entry
        self.tracer = Tracer(model, lookups=_lookups())
        self.compiling = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Trace with the tracer, and let `current` find this session."""
        token = _current.set(self)
        try:
            with self.tracer.install():
                yield
        finally:
            _current.reset(token)


def _lookups() -> list[Callable[..., Any]]:
    """vLLM's functions that turn a layer's name into the key of a table of layers, as far as they exist (0.32.0)."""
    try:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import _resolve_layer_name
    except ImportError:
        return []
    return [_resolve_layer_name]


_current: ContextVar[Session | None] = ContextVar("vllm_compile_ext_session", default=None)


def current() -> Session | None:
    """The session of the compilation that runs in this context, or None for upstream's path."""
    return _current.get()
