"""One compilation on the plugin's path: what the wrapper that starts it and the backend that Dynamo calls share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch.fx as fx
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

from vllm_compile_ext.compilation.entry import Entry
from vllm_compile_ext.trace.check import difference
from vllm_compile_ext.trace.split import decompose_sizes
from vllm_compile_ext.trace.stitch import stitch
from vllm_compile_ext.trace.tracer import Tracer


class Differs(Exception):  # noqa: N818 - an answer, not an error
    """A copy of a layer is not what tracing that layer gives; the message says where."""


class Session:
    """The model that is compiled with its first call's arguments, its tracer, its place in the store, and how far the
    compilation has come.

    compiling: the graph is understood and pieces are being compiled.  An error before this point means that the model
    is traced again as upstream does it; an error after it is the user's to see.
    """

    def __init__(
        self, model: Any, entry: Entry | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool = True
    ) -> None:
        self.model = model
        self.entry = entry
        self.arguments = args, kwargs
        self.copies = copies
        self.tracer = self._tracer()
        self.compiling = False

    def _tracer(self, skip: Collection[int] = ()) -> Tracer:
        tables = [self.model.vllm_config.compilation_config.static_forward_context]
        least = 3 if self.copies else sys.maxsize
        return Tracer(self.model, least, _lookups(), tables, skip)

    def prove(self, graph: fx.Graph, values: Sequence[Any]) -> None:
        """Trace the model once more, with the last copy of each kind of layer traced instead of copied, and compare.

        values: of the placeholders of `graph`, which was stitched and has its sizes decomposed.  A net under the proof
        of `trace/`: raises `Differs`.
        """
        skip = self.tracer.last_of_each_kind()
        if not skip:
            return
        tracer = self._tracer(skip)
        args, kwargs = self.arguments
        # As `torch._dynamo.aot_compile` captures (torch 2.13).
        with get_metrics_context(), torch_function_mode_stack_state_mgr, tracer.install():
            got = fullgraph_capture(self.model.forward, args, kwargs).backend_input
        again, inputs = got.graph_module.graph, list(got.example_inputs)
        inputs += [extra.value for extra in stitch(again, inputs)]
        decompose_sizes(again)
        if (where := difference(again, inputs, graph, values)) is not None:
            raise Differs(where)

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
