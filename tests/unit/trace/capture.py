"""Capture a model with Dynamo, with or without a Tracer, and take a stitched graph all the way to a callable."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

from vllm_compile_ext.trace import plan, watch
from vllm_compile_ext.trace.fingerprint import fingerprint
from vllm_compile_ext.trace.split import decompose_sizes, extract, split
from vllm_compile_ext.trace.stitch import Extra, difference, stitch
from vllm_compile_ext.trace.tracer import Tracer


def backend_input(model: nn.Module, args: tuple[Any, ...], tracer: Tracer | None = None) -> Any:
    """What a backend would get: `.graph_module`, `.example_inputs`."""
    torch._dynamo.reset()
    for arg in args:
        if isinstance(arg, torch.Tensor):
            torch._dynamo.mark_dynamic(arg, 0)
    with (
        torch.no_grad(),
        get_metrics_context(),
        torch_function_mode_stack_state_mgr,
        tracer.install() if tracer else contextlib.nullcontext(),
    ):
        return torch._dynamo.convert_frame.fullgraph_capture(model.forward, args, {}).backend_input


@dataclass
class Stitched:
    tracer: Tracer
    graph: fx.Graph
    module: fx.GraphModule
    inputs: list[Any]
    extras: list[Extra]

    @property
    def values(self) -> list[Any]:
        return [*self.inputs, *(e.value for e in self.extras)]


def stitched(model: nn.Module, args: tuple[Any, ...], lookups: Any = (), tables: Any = ()) -> Stitched:
    tracer = Tracer(model, lookups=lookups, tables=tables)
    got = backend_input(model, args, tracer)
    assert not watch.installed()
    graph, inputs = got.graph_module.graph, list(got.example_inputs)
    extras = stitch(graph, inputs)
    graph.lint()
    return Stitched(tracer, graph, got.graph_module, inputs, extras)


def against_full_trace(s: Stitched, model: nn.Module, args: tuple[Any, ...]) -> str | None:
    full = backend_input(model, args)
    return difference(full.graph_module.graph, list(full.example_inputs), s.graph, s.values)


def splits(node: fx.Node) -> bool:
    """The custom ops of `models`, and sigmoid."""
    return "t::" in str(getattr(node.target, "_qualified_op_name", "")) or node.target in (torch.sigmoid, "sigmoid")


def run(s: Stitched, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, plan.Plan]:
    """What the plan gives with each unique piece run eagerly, and the plan.  `args` are for the symbols."""
    decompose_sizes(s.graph)
    pieces = split(s.graph, splits)
    known: dict[str, int] = {}
    unique: list[int | None] = []
    compiled: list[Callable[..., Any]] = []
    for piece in pieces:
        if piece.splitting:
            unique.append(None)
            continue
        key = fingerprint(piece, s.module)
        if key not in known:
            known[key] = len(compiled)
            compiled.append(extract(piece, s.module))
        unique.append(known[key])
    made = plan.loads(plan.dumps(plan.write(s.graph, pieces, unique, s.extras)))
    gather = made.gatherer(model)
    for extra, value in zip(s.extras, gather(), strict=True):
        assert value is extra.value if extra.ctor is None else value == extra.value
    call = made.load([compiled[i] for i in made.calls])
    real = [_real(value, args) for value in s.inputs]
    with torch.no_grad():
        return call(gather(), *real), made


def _real(value: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, torch.SymInt):
        return operator.index(args[0].shape[0])
    return getattr(value, "real_obj", value)
