"""Pieces as bytes: what comes back computes what Inductor's own callable does, and no compiler has a part in it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import standalone_compile

from vllm_compile_ext.program import NotKept, piece
from vllm_compile_ext.store.store import digest

X = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 7


def _views(x: torch.Tensor) -> Any:
    y = x.sin()
    return x.view(-1), y[1:], y


def _several(x: torch.Tensor) -> Any:
    y = x.cos()
    return y, y, (y @ y.t()).relu()


CASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "sin": lambda x: (x.sin(),),
    "constant": lambda x: (x * torch.tensor([1.0, 2.0, 3.0, 4.0]),),
    "mutates": lambda x: (x.add_(1) * 2,),
    "mutates a view": lambda x: (x[1:].mul_(3), x.sum(0))[1:],
    "returns its input": lambda x: (x, x.sin()),
    "views": _views,
    "several": _several,
    "nothing to compile": lambda x: (x @ x.t(),),
}


@functools.cache
def compiled(case: str) -> tuple[Any, piece.Frozen]:
    """What Inductor makes of a case, as vLLM asks for it, and the same as bytes."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return CASES[case](x)

    # As `torch._dynamo.aot_compile` sets it around vLLM's backend (torch 2.13.0).
    settings = dict.fromkeys(("bypass_autograd_cache_key", "bundled_autograd_cache", "force_autograd_cache"), True)
    with torch.no_grad(), torch._functorch.config.patch(settings):
        graph = torch.fx.symbolic_trace(Module())
        held = piece.constants(graph)
        artifact = standalone_compile(graph, [X.clone()], dynamic_shapes="from_example_inputs", options={}, aot=True)
    return artifact, piece.freeze(artifact, held)


def call(function: Callable[..., Any], x: torch.Tensor, offset: int = 0) -> tuple[list[Any], torch.Tensor]:
    """The outputs, and the input afterwards, which lies `offset` numbers behind an aligned address."""
    mine = torch.zeros(x.numel() + offset)[offset:].view(x.shape).copy_(x)
    with torch.inference_mode():
        return list(function(mine)), mine


@pytest.mark.parametrize("case", CASES)
def test_the_same_results(case: str) -> None:
    artifact, frozen = compiled(case)
    thawed = piece.thaw(frozen)
    for x, offset in ((X, 0), (-X, 0), (torch.zeros_like(X), 0), (X, 1)):
        for got, expected in zip(call(thawed, x, offset), call(artifact, x, offset), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["returns its input", "views"])
def test_an_output_that_is_an_input_or_its_view_stays_one(case: str) -> None:
    artifact, frozen = compiled(case)
    for function in (artifact, piece.thaw(frozen)):
        out, x = call(function, X)
        assert out[0].data_ptr() == x.data_ptr()


def test_no_sources_of_kernels_are_kept() -> None:
    _, frozen = compiled("sin")
    assert "async_compile" not in frozen.source
    assert "#include" not in frozen.source
    assert [kind for kind, _ in frozen.kernels] == [piece.CPP]
    assert frozen.kernels[0][1].startswith(b"\x7fELF")
    assert b"at::vec" not in frozen.record


def test_equal_kernels_are_equal_bytes(tmp_path: Path) -> None:
    """Compiled anew in another folder."""
    code = (
        "from tests.unit.program.test_piece import compiled\n"
        "from vllm_compile_ext.store.store import digest\n"
        "print('DIGEST', *[digest(data) for _, data in compiled('sin')[1].kernels])"
    )
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.rpartition("DIGEST ")[2].split() == [digest(data) for _, data in compiled("sin")[1].kernels]


def test_loading_runs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile, codecache, cpu_vec_isa

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a compiler")

    frozen = [compiled(case)[1] for case in CASES]
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(async_compile.AsyncCompile, "__init__", refuse)
    monkeypatch.setattr(codecache.CppCodeCache, "load_async", refuse)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", refuse)
    for each in frozen:
        piece.thaw(each)


def test_no_module_names_a_descriptor_that_something_else_has_later() -> None:
    _, frozen = compiled("sin")
    before = set(sys.modules)
    piece.thaw(frozen)
    kernel = piece._map(frozen.kernels[0][1])
    assert kernel is piece._map(frozen.kernels[0][1])
    assert not hasattr(kernel.__self__, "__file__")
    files = [str(getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    assert [file for file in files if file.startswith(("/proc/", "/dev/"))] == []
    assert {name for name in set(sys.modules) - before if name.endswith(".kernel")} == set()


def test_what_is_not_known_is_not_frozen() -> None:
    with pytest.raises(NotKept, match="it is a function"):
        piece.freeze(lambda x: x)


MODULE = '''
"""
Compile-time auto-tuning block: async_compile
"""
# AOT ID: ['0_inference']
import math
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
from cmath import nanj as absent

async_compile = AsyncCompile()
empty = list
offset = None  # a constant of the graph

fused_0 = async_compile.cpp_pybinding(['const float*', 'float*'], r\'\'\'
#include <x>
fused_0 = async_compile.wait(globals())
\'\'\')


fused_1 = async_compile.triton('triton_fused_1', \'\'\'
import triton
\'\'\', device_str='cuda')


async_compile.wait(globals())
del async_compile

class Runner:
    def call(self, args):
        # Topologically Sorted Source Nodes
        return (fused_0(args[0]), fused_1(args[1]), math.pi, offset)

runner = Runner()
call = runner.call

def get_args():
    return []

def benchmark_compiled_module(args):
    return call(args)

if __name__ == "__main__":
    benchmark_compiled_module(get_args())
'''


def test_cut_takes_compilers_out_and_keeps_the_rest() -> None:
    source, kernels = piece.cut(MODULE)
    assert [(k.name, k.kind) for k in kernels] == [("fused_0", "cpp_pybinding"), ("fused_1", "triton")]
    assert kernels[0].arguments[0] == ["const float*", "float*"]
    assert kernels[1].arguments[0::2] == ("triton_fused_1", "cuda")
    assert "#include" not in source
    assert "async_compile" not in source
    assert "# Topologically Sorted Source Nodes" in source
    assert "get_args" not in source
    assert "select_algorithm" not in source, "an import that nothing needs"
    module = piece.run(source, [lambda a: a + 1, lambda a: a * 2], {"offset": 7}, "test_generated_module")
    assert module.call([1, 5]) == (2, 10, 3.141592653589793, 7)


def test_lines_are_shown_in_tracebacks() -> None:
    source, _ = piece.cut(MODULE)
    module = piece.run(source, [None, None], {}, "test_generated_traceback")
    try:
        module.call([1, 5])
    except TypeError:
        assert "return (fused_0(args[0])" in traceback.format_exc()


@pytest.mark.parametrize(
    "line",
    [
        "fused_2 = async_compile.cuda('x', 'so')",
        "fused_2 = async_compile.multi_kernel('x', [fused_0])",
        "fused_2 = async_compile.triton('x', SOURCE)",
        "fused_2 = other = async_compile.triton('x', '')",
        "use(async_compile)",
        "if True:\n    fused_2 = async_compile.triton('x', '')",
        "def broken(:",
    ],
)
def test_other_modules_are_left_alone(line: str) -> None:
    with pytest.raises(NotKept):
        piece.cut(MODULE.replace("\nclass Runner", f"\n{line}\nclass Runner"))
