"""The custom ops of a model and what it calls them with, found without weights, memory or a device.

The model is made of tensors that have no data, and called once.  Linear layers, attention and experts, whose kernels
know no such tensors, only say how large their outputs are.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from vllm_compile_ext import harmless
from vllm_compile_ext.ops import dispatch

TOKENS = 1009  # of that call.  A prime: what it divides grows with the batch


@dataclass(frozen=True)
class Shape:
    """Of a tensor that an op is called with."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    def at(self, tokens: int) -> tuple[int, ...]:
        """Its sizes in a batch of so many tokens."""
        return tuple(size // TOKENS * tokens if size and size % TOKENS == 0 else size for size in self.sizes)

    def growing(self) -> list[int]:
        """The dimensions that grow with the batch."""
        return [dim for dim, size in enumerate(self.sizes) if size and size % TOKENS == 0]

    def __str__(self) -> str:
        sizes = (
            "n" if size == TOKENS else f"{size // TOKENS}n" if d in self.growing() else str(size)
            for d, size in enumerate(self.sizes)
        )
        return f"[{', '.join(sizes)}] {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Call:
    """What a model calls an op with, `count` times a step.

    op: a module without data.  arguments: positional and named ones, with a `Shape` for each tensor.
    """

    op: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    count: int = 0

    @property
    def shapes(self) -> str:
        return ", ".join(str(each) for each in tree_leaves(self.arguments) if isinstance(each, Shape))


# Of the modules of ops that compute more than each number once or twice.
_HEAVY = ("attention", "conv", "fla", "fused_moe", "hpc", "kda", "mamba", "mhc", "mm_input_norm", "sparse_attn_indexer")


def is_light(cls: type[Any]) -> bool:
    """Whether a custom op is a norm, an activation, a rotary embedding or the like, with a native form."""
    parts = {*cls.__module__.split("."), *cls.__module__.split("_")}
    return not parts & {*_HEAVY} and "native" in dispatch.implementations(cls)


def find(config: Any) -> tuple[list[Call], str | None]:
    """The calls of one forward pass of the model of a `VllmConfig`, equal ones once; and why there are not all."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    calls: dict[tuple[str, ...], Call] = {}
    with set_current_vllm_config(config), _one_rank(config), torch.device("meta"), torch.no_grad():
        try:
            model = _make(config)
            _prepare(model, calls)
            tokens = torch.zeros(TOKENS, dtype=torch.int64)
            with set_forward_context(None, config, num_tokens=TOKENS):
                model(tokens, tokens, None, None)
        except Exception as error:  # of any model's code
            return list(calls.values()), harmless.error(error)
    return list(calls.values()), None


def _make(config: Any) -> Any:
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config)


def _prepare(model: Any, calls: dict[tuple[str, ...], Call]) -> None:
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import LinearBase

    for module in model.modules():
        if hasattr(module, "do_not_compile"):
            module.do_not_compile = True
        if isinstance(module, LinearBase):
            module.forward = _linear(module)
        elif isinstance(module, AttentionLayerBase):
            module.forward = _like_first
        elif isinstance(module, CustomOp):
            module.forward = _noting(module, calls)


def _linear(module: Any) -> Callable[..., Any]:
    row = getattr(module, "input_size_per_partition", module.input_size) != module.input_size
    whole = row or getattr(module, "gather_output", False)
    size = module.output_size if whole else getattr(module, "output_size_per_partition", module.output_size)

    def forward(hidden: Any, *_: Any, **__: Any) -> Any:
        out = hidden.new_empty((*hidden.shape[:-1], size), dtype=module.params_dtype)
        return (out, None) if module.return_bias else out

    return forward


def _like_first(*given: Any, output_shape: Any = None, **named: Any) -> Any:
    first = next(each for each in (*given, *named.values()) if torch.is_tensor(each))
    return first.new_empty(output_shape or first.shape)


def _noting(op: Any, calls: dict[tuple[str, ...], Call]) -> Callable[..., Any]:
    def forward(*given: Any, **named: Any) -> Any:
        found = tree_map(
            lambda each: Shape(tuple(each.shape), each.dtype) if torch.is_tensor(each) else each, (given, named)
        )
        same = op.name, type(op).__qualname__, op.extra_repr(), repr(found)
        if is_light(type(op)):
            calls.setdefault(same, Call(op, found)).count += 1
        try:
            return op.forward_native(*given, **named)
        except Exception:  # experts, for example, want weights
            return _like_first(*given, **named)

    return forward


@contextlib.contextmanager
def _one_rank(config: Any) -> Iterator[None]:
    """Groups of this process alone, which say that they are as large as the configuration's: shapes are a rank's."""
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        get_tp_group,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory(prefix="vllm-compile-ext-ops-") as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        group: Any = get_tp_group()
        group.world_size = size = config.parallel_config.tensor_parallel_size
        group.all_reduce = lambda each: each
        group.all_gather = lambda each, dim=-1: torch.cat([each] * size, dim)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()
