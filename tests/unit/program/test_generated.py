from __future__ import annotations

import traceback

import pytest

from vllm_compile_ext.program import generated

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
    source, kernels = generated.cut(MODULE)
    assert [(k.name, k.kind) for k in kernels] == [("fused_0", "cpp_pybinding"), ("fused_1", "triton")]
    assert kernels[0].arguments[0] == ["const float*", "float*"]
    assert kernels[1].arguments[0::2] == ("triton_fused_1", "cuda")
    assert "#include" not in source
    assert "async_compile" not in source
    assert "# Topologically Sorted Source Nodes" in source
    assert "get_args" not in source
    assert "select_algorithm" not in source, "an import that nothing needs"
    module = generated.load(source, [lambda a: a + 1, lambda a: a * 2], {"offset": 7}, "test_generated_module")
    assert module.call([1, 5]) == (2, 10, 3.141592653589793, 7)


def test_lines_are_shown_in_tracebacks() -> None:
    source, _ = generated.cut(MODULE)
    module = generated.load(source, [None, None], {}, "test_generated_traceback")
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
    with pytest.raises(generated.Uncuttable):
        generated.cut(MODULE.replace("\nclass Runner", f"\n{line}\nclass Runner"))
