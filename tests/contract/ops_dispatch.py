"""`dispatch` gives vLLM's own answers, for each op and platform, and for levels of a real configuration.

`test_in_vllm` runs these in a fork of a process that has vLLM imported.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import custom_op
from vllm.model_executor.custom_op import CustomOp, op_registry
from vllm.model_executor.layers import activation, layernorm
from vllm.model_executor.layers import rotary_embedding as rope

from vllm_compile_ext.ops import dispatch

CONFIG = VllmConfig()
MODES = [modes for length in range(3) for modes in itertools.product(("none", "all"), repeat=length)]
ENTRIES = [
    entries
    for length in range(4)
    for entries in itertools.permutations(("+rms_norm", "-rms_norm", "+gelu", "-rms_norm_gated"), length)
]


def answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError:
        return ValueError


@pytest.mark.parametrize("modes", MODES)
def test_which_ops_are_enabled(modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with set_current_vllm_config(CONFIG):
        for entries, first in itertools.product(ENTRIES, (True, False)):
            custom_ops = [*modes, *entries] if first else [*entries, *modes]
            monkeypatch.setattr(CONFIG.compilation_config, "custom_ops", custom_ops)
            for name in ("rms_norm", "gelu", "silu_and_mul"):
                ours = answer(partial(dispatch.rule, name, custom_ops))
                assert (ours if ours is ValueError else ours[0]) == answer(op_registry[name].enabled), custom_ops


def test_the_reason_is_the_entry_that_decides() -> None:
    custom_ops = ["none", "+gelu", "-rms_norm"]
    assert [dispatch.rule(name, custom_ops)[1] for name in ("gelu", "rms_norm", "relu2")] == [
        "+gelu",
        "-rms_norm",
        "none",
    ]
    assert dispatch.rule("gelu", ["all", "+gelu"]) == (True, "+gelu")
    assert dispatch.rule("relu2", ["all", "+gelu"]) == (True, "all")
    with pytest.raises(ValueError, match=r"remove \+gelu or -gelu"):
        dispatch.rule("gelu", ["all", "+gelu", "-gelu"])
    with pytest.raises(ValueError, match="once: it has none of them"):
        dispatch.rule("gelu", ["+gelu"])
    with pytest.raises(ValueError, match="once: it has all, none"):
        dispatch.rule("gelu", ["all", "none"])


def recorder(name: str) -> Callable[..., str]:
    return lambda *args, **kwargs: name


@pytest.mark.parametrize("platform", dispatch.CHOSEN)
def test_which_method_runs(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of the ops say their name, so that those of the base class show what they call."""
    asked = {f"is_{one.replace(' ', '_')}.return_value": one == platform for one in dispatch.CHOSEN}
    monkeypatch.setattr(custom_op, "current_platform", Mock(**asked))
    monkeypatch.setattr(CONFIG.compilation_config, "custom_ops", ["all"])
    methods = {*dispatch.CHOSEN.values(), "forward_native"}
    found = set()
    for cls in [*op_registry.values(), rope.RotaryEmbedding, rope.MRotaryEmbedding, Bare, Inherits]:
        if not issubclass(cls, CustomOp):
            continue
        own = {name for name in methods if getattr(cls, name) is not getattr(CustomOp, name)}
        op = object.__new__(type("Recorded", (cls,), {name: recorder(name) for name in own}))
        nn.Module.__init__(op)
        op._enforce_enable = False
        with set_current_vllm_config(CONFIG):
            method = op.dispatch_forward(compile_native=False)
        ours = dispatch.method(cls, platform)
        if ours in own:
            assert method() == ours, cls
        else:
            with pytest.raises(NotImplementedError):
                method()
            assert ours in ("forward_native", "forward_cuda")
        found.add(ours)
    assert dispatch.CHOSEN[platform] in found or platform in ("tpu", "out of tree")  # which no op of vLLM's defines


class Bare(CustomOp):
    name = "bare"


class Inherits(activation.GELU):
    pass


@pytest.mark.parametrize("custom_ops", [[], ["all"], ["none", "+gelu"], ["all", "-rms_norm"]], ids=str)
@pytest.mark.parametrize("level", range(4))
def test_levels(level: int, custom_ops: list[str]) -> None:
    options = {"optimization_level": level, "compilation_config": {"custom_ops": custom_ops}}
    config = EngineArgs(model=os.environ["LLAMA"], max_model_len=256, **options).create_engine_config()
    resolved = config.compilation_config.custom_ops
    with set_current_vllm_config(config):
        ops = [
            activation.GELU(),
            activation.SiluAndMul(compile_native=False),
            layernorm.RMSNorm(8),
            rope.RotaryEmbedding(8, 8, 8, 10000, True, config.model_config.dtype),
        ]
    for op in ops:
        enabled, why = dispatch.rule(op.name, resolved)
        assert op._forward_method.__name__ == (dispatch.CHOSEN["cpu"] if enabled else "forward_native")
        assert why in resolved
    assert set(custom_ops) <= set(resolved)
