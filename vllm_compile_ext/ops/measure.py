"""How fast an op's kernel and its native form are on this machine, and how far apart their results."""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch.utils._pytree import tree_leaves, tree_map

from vllm_compile_ext.ops.model import Call, Shape

BATCHES = (1, 8, 64, 512)  # tokens
SECONDS = 0.2  # at least, for each figure


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one batch.

    error: the largest difference between the kernel's results and the native form's, as a share of the largest native
    one.  kernel, native, compiled: seconds of a call, of the kernel, the native form as it is, and compiled.
    """

    tokens: int
    error: float
    kernel: float
    native: float
    compiled: float


def measure(call: Call, method: str, positions: int, device: torch.device, graphs: bool) -> list[Figures]:
    """Figures of `BATCHES`.

    method: the kernel's ("forward_cpu").  positions: how many a model has.  graphs: time is that of CUDA graphs, in
    which launching costs nothing.
    """
    op = _materialize(call.op, device)
    whole, found = torch.compile(op.forward_native), []
    one = torch.compile(op.forward_native, dynamic=False)
    for tokens in reversed(BATCHES):  # the code for all sizes is made from a large one
        arguments = _arguments(call, tokens, positions, device)
        if tokens > 1:
            _mark(call, arguments)
        kernel, native, compiled = getattr(op, method), op.forward_native, whole if tokens > 1 else one
        with torch.no_grad():
            error = _error(kernel, native, arguments)
            found.append(Figures(tokens, error, *(_time(f, arguments, graphs) for f in (kernel, native, compiled))))
    return found[::-1]


def _materialize(op: Any, device: torch.device) -> Any:
    """A copy with data: what an op computes with is random, of the size of trained weights."""
    made = copy.deepcopy(op)
    del made.forward  # that notes calls
    made = made.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, value in list(vars(made).items()):
        if torch.is_tensor(value):
            vars(made)[name] = torch.empty_like(value, device=device)
    for value in [*made.parameters(), *made.buffers(), *filter(torch.is_tensor, vars(made).values())]:
        if value.is_floating_point():
            value.data.uniform_(-1, 1, generator=generator)
        else:
            value.data.zero_()
    return made


def _arguments(call: Call, tokens: int, positions: int, device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(tokens)

    def make(each: Any) -> Any:
        if not isinstance(each, Shape):
            return each
        sizes = each.at(tokens)
        if each.dtype.is_floating_point:
            return torch.randn(sizes, generator=generator, device=device).to(each.dtype)
        return torch.randint(0, positions, sizes, generator=generator, device=device).to(each.dtype)

    return tree_map(make, call.arguments)


def _mark(call: Call, arguments: Any) -> None:
    for shape, tensor in zip(tree_leaves(call.arguments), tree_leaves(arguments), strict=True):
        if isinstance(shape, Shape):
            for dim in shape.growing():
                torch._dynamo.mark_dynamic(tensor, dim)


def _time(function: Callable[..., Any], arguments: Any, graphs: bool) -> float:
    given, named = again = _copy(arguments)
    function(*given, **named)
    if graphs:
        testing = importlib.import_module("triton.testing")  # which CPU builds do not have
        return float(testing.do_bench_cudagraph(lambda: function(*given, **named), rep=int(SECONDS * 1000))) / 1000
    tensors = [
        pair for pair in zip(tree_leaves(again), tree_leaves(arguments), strict=True) if torch.is_tensor(pair[0])
    ]
    wait = torch.accelerator.synchronize if any(each.device.type != "cpu" for each, _ in tensors) else int
    best, end = math.inf, time.monotonic() + SECONDS
    while time.monotonic() < end:
        for tensor, value in tensors:  # which a kernel has changed in place
            tensor.copy_(value)
        wait()
        begin = time.perf_counter()
        function(*given, **named)
        wait()
        best = min(best, time.perf_counter() - begin)  # what else runs on the machine only makes it longer
    return best


def _copy(arguments: Any) -> Any:
    return tree_map(lambda each: each.clone() if torch.is_tensor(each) else each, arguments)


def _error(kernel: Callable[..., Any], native: Callable[..., Any], arguments: Any) -> float:
    results = []
    for function in (kernel, native):
        given, named = _copy(arguments)
        results.append([each.double() for each in tree_leaves(function(*given, **named)) if torch.is_tensor(each)])
    ours, theirs = results
    pairs = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(ours, theirs, strict=True)]
    return max((float(each) for each in pairs), default=0.0)
