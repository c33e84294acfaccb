"""Each light op that CPU has a method of its own for gives the numbers of vLLM's native method, for what models pass.

`test_in_vllm` runs these in a fork of a process that has vLLM imported.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor import layers
from vllm.model_executor.custom_op import CustomOp, op_registry
from vllm.model_executor.layers import activation
from vllm.model_executor.layers import rotary_embedding as rope
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from tests import forks
from vllm_compile_ext.ops import dispatch

torch.set_num_threads(1)  # some of these tests fork
torch.set_grad_enabled(False)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
CONFIG = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"]))

# Arguments of each, in every way that changes what it computes.
ACTIVATIONS: dict[str, list[dict[str, Any]]] = {
    "FastGELU": [{}],
    "GELU": [{}],
    "GELUTanh": [{}],
    "GeluAndMul": [{"approximate": "none"}, {"approximate": "tanh"}],
    "NewGELU": [{}],
    "QuickGELU": [{}],
    "SiluAndMul": [{}],
}
ROPES: dict[str, dict[str, Any]] = {
    "DynamicNTKAlphaRotaryEmbedding": {"scaling_alpha": 8.0},
    "DynamicNTKScalingRotaryEmbedding": {"scaling_factor": 2.0, "max_trained_positions": 16},
    "Gemma4RotaryEmbedding": {},
    "LinearScalingRotaryEmbedding": {"scaling_factors": [1.0, 4.0]},
    "Llama3RotaryEmbedding": {
        **{"scaling_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "orig_max_position": 32}
    },
    "NTKScalingRotaryEmbedding": {"scaling_factor": 2.0},
    "RotaryEmbedding": {},
    "YaRNScalingRotaryEmbedding": {"scaling_factor": 4.0},
}
# The sections of each (time, height, width) for a number of frequencies.
MROPES: dict[str, Callable[[int], list[int]]] = {
    "BailingMRotaryEmbedding": lambda n: [n - 2 * (n // 3), n // 3, n // 3],
    "MRotaryEmbedding": lambda n: [n - 2 * (n // 3), n // 3, n // 3],
}
TESTED = {*ACTIVATIONS, *ROPES, *MROPES, "ApplyRotaryEmb", "Ernie4_5_VLRotaryEmbedding"}
# And why they are not here.
OTHERS = {
    "FourierRotaryEmbedding": "its model calls `forward_native`; `forward_cpu` cannot read its table",
    "HCHeadOp": "matrix products",
    "MHCFusedPostPreOp": "matrix products",
    "MHCPostOp": "matrix products",
    "MHCPreOp": "matrix products",
    "MMEncoderAttention": "attention",
    "RocmSparseAttnIndexer": "attention",
    "SparseAttnIndexer": "attention",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = 64
# The kernel's stores of bfloat16 vectors need their alignment there (see the tests that crash below).
ALIGNED = platform.machine() == "x86_64"


def build(cls: type[CustomOp], **kwargs: Any) -> CustomOp:
    with set_current_vllm_config(CONFIG):
        return cls(**kwargs)


def subclasses(cls: type) -> Iterator[type[Any]]:
    for one in cls.__subclasses__():
        yield one
        yield from subclasses(one)


def test_every_op_with_a_method_for_cpu_is_here() -> None:
    for module in pkgutil.walk_packages(layers.__path__, layers.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except Exception:  # for hardware or packages that are not here
            spec = importlib.util.find_spec(module.name)
            assert "CustomOp" not in Path(spec.origin).read_text(), module.name
    ops = {
        one
        for one in subclasses(CustomOp)
        if one.__module__.startswith("vllm.") and getattr(one, "name", "") in op_registry
    }
    assert {one for one in op_registry.values() if issubclass(one, CustomOp)} <= ops
    # One that replaces `forward` dispatches nothing.
    ops = {one for one in ops if one.forward is CustomOp.forward}
    assert {one.__name__ for one in ops if dispatch.method(one, "cpu") != "forward_native"} == TESTED | OTHERS.keys()


def check(op: CustomOp, *args: Any) -> None:
    """Compare `op` and its native method with the native method in float64; the arguments may be written to.

    Rounding once costs half of `eps` of the largest number seen, and the native methods round up to eight times.
    """
    assert op._forward_method.__func__.__name__ == "forward_cpu"

    def copies(dtype: torch.dtype | None = None) -> list[Any]:
        return [one.clone().to(dtype or one.dtype) if is_real(one) else one for one in args]

    inputs = [one for one in args if is_real(one)]
    exact, native, custom = (
        result if isinstance(result, tuple) else (result,)
        for result in (op.forward_native(*copies(torch.float64)), op.forward_native(*copies()), op(*args))
    )
    scale = max([1.0, *(float(one.abs().max()) for one in (*inputs, *filter(is_real, exact)) if one.numel())])
    for right, *ours in zip(exact, native, custom, strict=True):
        for one in ours:
            if right is None:
                assert one is None
                continue
            assert (one.dtype, one.shape) == (inputs[0].dtype, right.shape)
            tolerance = 4 * torch.finfo(one.dtype).eps * scale
            torch.testing.assert_close(one.double(), right, atol=tolerance, rtol=0)


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --- activations


@st.composite
def rows(draw: st.DrawFn, even: bool) -> Tensor:
    """Numbers in one to three dimensions, where the last is even if it has to be, laid out in one of four ways."""
    size = draw(st.sampled_from((1, 2, 3, 17, 64, 1000))) * (1 + even)
    shape = (*draw(st.lists(st.sampled_from((0, 1, 2, 3, 33)), max_size=2)), size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    values = (values * draw(st.sampled_from((1, 20)))).to(draw(st.sampled_from(DTYPES)))
    match draw(st.sampled_from(("packed", "columns", "transposed", "every second"))):
        case "columns":
            return torch.cat((values, values, values), -1)[..., size + 1 : 2 * size + 1].copy_(values)
        case "transposed" if len(shape) > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "every second":
            return (
                torch.stack((values, values))[::2].squeeze(0)
                if len(shape) == 1
                else values.repeat_interleave(2, 0)[::2]
            )
    return values


@pytest.mark.parametrize("name", ACTIVATIONS)
@SETTINGS
@given(data=st.data())
def test_activation(name: str, data: st.DataObject) -> None:
    kwargs = data.draw(st.sampled_from(ACTIVATIONS[name]))
    check(build(getattr(activation, name), **kwargs), data.draw(rows(even=name.endswith("Mul"))))


# --- rotary embeddings


@st.composite
def rope_sizes(draw: st.DrawFn, dtype: torch.dtype, neox: bool) -> tuple[int, int]:
    """Sizes of a head and of its part that turns."""
    if ALIGNED and neox and dtype is torch.bfloat16:
        head = draw(st.sampled_from((16, 48, 64, 128)))
        return head, draw(st.sampled_from(range(16, head + 1, 16)))
    head = draw(st.sampled_from((4, 6, 18, 64, 80, 100)))
    return head, draw(st.sampled_from(range(4, head + 1, 2)))


def class_of(name: str) -> type[CustomOp]:
    return next(one for one in subclasses(CustomOp) if one.__name__ == name)


def turn(data: st.DataObject, name: str, sections: Callable[[int], list[int]] | None = None, **kwargs: Any) -> None:
    """Check a rotary embedding on query and key as a model has them: columns of what one product made, or copies.

    Columns whose elements do not lie side by side no model makes: the kernel would read and write past them.
    """
    dtype, neox = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    head, turned = data.draw(rope_sizes(dtype, neox))
    if sections:
        kwargs["mrope_section"] = sections(turned // 2)
    sizes = {"head_size": head, "rotary_dim": turned, "max_position_embeddings": POSITIONS}
    op = build(class_of(name), **sizes, base=10000, is_neox_style=neox, dtype=dtype, **kwargs)

    keys = data.draw(st.integers(1, 3))
    queries = keys * data.draw(st.integers(1, 4))
    tokens, step = data.draw(st.sampled_from((1, 2, 3, 7, 33))), data.draw(st.sampled_from((1, 2)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    made = torch.randn(tokens * step, (queries + 2 * keys) * head, generator=random).to(dtype)
    query, key, _ = made[::step].split([queries * head, keys * head, keys * head], -1)
    highest = data.draw(st.sampled_from((1, 5, POSITIONS)))  # repeated, or not
    shape = (3, tokens) if sections and data.draw(st.booleans()) else (tokens,)
    positions = torch.randint(highest, shape, generator=random)
    if data.draw(st.booleans()):
        query, key = query.contiguous(), key.contiguous()
    elif not sections and data.draw(st.booleans()):  # a batch of sequences
        positions, query, key = positions[None], query[None], key[None]
    before = made.clone()
    check(op, positions, query, None if not sections and data.draw(st.booleans()) else key)
    # What is neither query nor key it left alone.
    for one in (made, before):
        one[::step, : (queries + keys) * head] = 0
    assert torch.equal(made, before)


@pytest.mark.parametrize("name", ROPES)
@SETTINGS
@given(data=st.data())
def test_rotary_embedding(name: str, data: st.DataObject) -> None:
    turn(data, name, **ROPES[name])


@pytest.mark.parametrize("name", MROPES)
@SETTINGS
@given(data=st.data())
def test_rotary_embedding_with_sections(name: str, data: st.DataObject) -> None:
    more = {"mrope_interleaved": data.draw(st.booleans())} if name == "MRotaryEmbedding" else {}
    turn(data, name, MROPES[name], **more)


@SETTINGS
@given(data=st.data())
def test_apply_rotary_emb(data: st.DataObject) -> None:
    dtype, size = data.draw(st.sampled_from(DTYPES)), 2 * data.draw(st.sampled_from((1, 3, 32, 40)))
    flags = {name: data.draw(st.booleans()) for name in ("is_neox_style", "enable_fp32_compute")}
    tokens, heads = data.draw(st.sampled_from((0, 1, 7))), data.draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(*data.draw(st.sampled_from(((), (2,)))), tokens, heads, size + 3, generator=random).to(dtype)
    cos, sin = torch.randn(2, tokens, size // 2, generator=random).clamp(-1, 1).to(dtype)
    check(build(ApplyRotaryEmb, **flags), x[..., 3:], cos, sin)


# --- what they refuse, and where vLLM is wrong


def plain_rope(dtype: torch.dtype, head: int = 64, turned: int = 64) -> CustomOp:
    sizes = {"head_size": head, "rotary_dim": turned, "max_position_embeddings": POSITIONS}
    return build(rope.RotaryEmbedding, **sizes, base=10000, is_neox_style=True, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_are_an_error_of_the_native_rotary_embedding_only(dtype: torch.dtype) -> None:
    op, args = plain_rope(dtype), (torch.zeros(0, dtype=torch.int64), *torch.zeros(2, 0, 128, dtype=dtype))
    assert [one.shape for one in op(*args)] == [(0, 128)] * 2
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        op.forward_native(*args)


def test_positions_of_32_bits_are_an_error_of_the_kernel_only() -> None:
    op, args = plain_rope(torch.float32), (torch.arange(3, dtype=torch.int32), *torch.ones(2, 3, 128))
    op.forward_native(*args)
    with pytest.raises(RuntimeError, match="expected scalar type Long but found Int"):
        op(*args)


@pytest.mark.xfail(reason="the kernel takes the last dimension for all heads, and turns some of them", strict=True)
def test_heads_in_a_dimension_of_their_own_as_latent_attention_has_them() -> None:
    query, key = torch.randn(2, 3, 128 + 64)[..., 128:].unsqueeze(2).expand(2, 3, 2, 64).clone()
    check(plain_rope(torch.float32), torch.arange(3), query, key[:, :1])


@pytest.mark.xfail(reason="it hands four arguments to a native method that takes three", strict=True, raises=TypeError)
def test_ernie_vl() -> None:
    kwargs = {"head_size": 64, "rotary_dim": 64, "max_position_embeddings": POSITIONS, "mrope_section": [11, 11, 10]}
    op = build(class_of("Ernie4_5_VLRotaryEmbedding"), **kwargs, base=10000, is_neox_style=True, dtype=torch.float32)
    check(op, torch.arange(3), *torch.randn(2, 3, 64))


@pytest.mark.xfail(ALIGNED, reason="vectors of bfloat16 are stored as if they were aligned", strict=True)
@pytest.mark.parametrize(
    ("head", "turned", "offset"),
    [(100, 100, 0), (80, 20, 0), (96, 24, 0), (64, 64, 4)],
    ids=["all of 100", "a quarter of 80, as in StableLM", "a quarter of 96", "columns that begin at the fifth"],
)
def test_unaligned_halves(tmp_path: Path, head: int, turned: int, offset: int) -> None:
    def function() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # torch's handler would print stacks for seconds
        query = torch.randn(3, offset + 2 * head).to(torch.bfloat16)[:, offset:]
        check(plain_rope(torch.bfloat16, head, turned), torch.arange(3), query, None)

    os.chdir(tmp_path)
    ended = forks.run(function)
    assert ended.status == 0, ended.output
