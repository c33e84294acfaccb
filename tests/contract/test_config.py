"""The compilation mode on CPU, decided by vLLM's own configuration code; no engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import run

# What the user asks for: options, and the variable VLLM_CPU_CI_ENV.
ASKED: dict[str, dict[str, Any]] = {
    "default": {},
    "asked": {"compilation_config": {"mode": 3}},
    "sizes": {"compilation_config": {"compile_sizes": [8, 1]}},
    "splitting": {"compilation_config": {"splitting_ops": ["aten::sin"]}},
    "O1": {"optimization_level": 1},
}
# Whose mode is another one, which is kept.
OTHERS: dict[str, dict[str, Any]] = {
    "O0": {"optimization_level": 0},
    "trace once": {"compilation_config": {"mode": 2}},
    "stock torch": {"compilation_config": {"mode": 1}},
    "none": {"compilation_config": {"mode": 0}},
    "eager": {"enforce_eager": True},
    "lora": {"enable_lora": True, "max_lora_rank": 8},
    "ci": {"VLLM_CPU_CI_ENV": "1"},
    "inductor partition": {"compilation_config": {"use_inductor_graph_partition": True}},
}

CODE = f"""
    import os
    from vllm.engine.arg_utils import EngineArgs
    out = {{}}
    for name, options in {ASKED | OTHERS}.items():
        os.environ["VLLM_CPU_CI_ENV"] = options.pop("VLLM_CPU_CI_ENV", "0")
        config = EngineArgs(model=sys.argv[1], max_model_len=256, **options).create_engine_config().compilation_config
        passes = vars(config.pass_config)
        fusions = [key for key, value in passes.items() if key.startswith("fuse_") and value]
        out[name] = [config.mode.name, config.backend, config.compile_sizes, fusions]
    report(out)
"""


@pytest.fixture(scope="module")
def ours(llama2: Path) -> Any:
    return run(CODE, str(llama2), fork=True, plugin=False).value


@pytest.fixture(scope="module")
def stock(llama2: Path) -> Any:
    return run(CODE, str(llama2), fork=True, plugin=False, VLLM_COMPILE_EXT="0").value


def test_what_the_user_asked_for_survives_but_for_passes_that_cpu_builds_do_not_have(
    ours: dict[str, Any], stock: dict[str, Any]
) -> None:
    assert "fuse_rope_kvcache_cat_mla" in stock["splitting"][3], "else fusions need no test"
    assert ours["splitting"][0] == "VLLM_COMPILE"
    assert ours["splitting"][3] == []
    assert sorted(ours["sizes"][2]) == [1, 8]
    ours["sizes"][2].clear()
    for name in ("default", "asked", "O1", "sizes"):
        assert ours[name] == ["VLLM_COMPILE", "inductor", [], []], name


@pytest.mark.parametrize("name", OTHERS)
def test_another_choice_keeps_stocks_behaviour(ours: dict[str, Any], stock: dict[str, Any], name: str) -> None:
    assert ours[name] == stock[name]
    assert ours[name][0] != "VLLM_COMPILE"
