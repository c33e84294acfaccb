"""The stacks of `stacks.py` behind vLLM's decorator.  Imported by forks of `tests/parent.py` only: it loads the plugin.

Pieces run as the graphs that they are, unless `inductor` is asked for.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from vllm.compilation.compiler_interface import InductorStandaloneAdaptor
from vllm.config import set_current_vllm_config

from tests import toys
from tests.fuzz import known, stacks
from tests.fuzz.copies import Result, eager, equal, line, same_state
from tests.fuzz.stacks import Stack

warnings.simplefilter("ignore")


def _as_it_is(self: Any, graph: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    return graph, None


def run(cases: Sequence[int | str], *, inductor: bool = False) -> list[dict[str, Any]]:
    """The results of seeds or names of known cases, as dicts."""
    for name in ("DISABLE_COMPILE_CACHE", "USE_AOT_COMPILE", "USE_MEGA_AOT_ARTIFACT"):
        os.environ[f"VLLM_{name}"] = "1"
    real = InductorStandaloneAdaptor.compile
    if not inductor:
        InductorStandaloneAdaptor.compile = _as_it_is
    try:
        return [vars(_judge(case, inductor)) for case in cases]
    finally:
        InductorStandaloneAdaptor.compile = real


def _judge(case: int | str, inductor: bool) -> Result:
    begin = time.perf_counter()
    kind, stack = stacks.generate(case) if isinstance(case, int) else ("known", known.CASES[case])
    result = Result(case, "behind vLLM's decorator", f"{kind}: {stack.what}", "right")
    try:
        expected = eager(stack)
    except Exception as error:
        result.outcome, result.detail = "unsupported", f"eager mode: {line(error)}"
        return result
    tolerance = 1e-3 if inductor else 0.0
    ours = _differs(stack, expected, tolerance)
    if ours is not None:
        with toys.upstream():
            stock = _differs(stack, expected, tolerance)
        result.outcome = "unsupported" if stock else "wrong" if ours == DIFFERS else "crashed"
        result.detail = stock or ours
    result.seconds = time.perf_counter() - begin
    gc.collect(1)
    return result


DIFFERS = "the result differs from eager mode"


def _differs(stack: Stack, expected: list[torch.Tensor], tolerance: float) -> str | None:
    """What is wrong with the compiled model; None where it gives what the model gives."""
    torch._dynamo.reset()
    decorate = toys.support_torch_compile(dynamic_arg_dims={"x": 0})
    config = toys.config("root", cudagraph_capture_sizes=[], splitting_ops=["t::attn"])
    try:
        with set_current_vllm_config(config):
            model, args, _ = stack.make(decorate)
        with same_state():
            got = model(*args)
    except Exception as error:
        return line(error)
    return None if equal(got, expected, tolerance) else DIFFERS
