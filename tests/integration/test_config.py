"""The compilation mode on CPU, decided by vLLM's own configuration code; no engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import run

CODE = """
    import os
    from vllm.engine.arg_utils import EngineArgs
    out, fusions = {}, {}
    for name, env, options in (
        ("default", {}, {}),
        ("asked", {}, {"compilation_config": {"mode": 3}}),
        ("sizes", {}, {"compilation_config": {"compile_sizes": [8, 1]}}),
        ("splitting", {}, {"compilation_config": {"splitting_ops": ["aten::sin"]}}),
        ("O1", {}, {"optimization_level": 1}),
        ("O0", {}, {"optimization_level": 0}),
        ("trace once", {}, {"compilation_config": {"mode": 2}}),
        ("stock torch", {}, {"compilation_config": {"mode": 1}}),
        ("none", {}, {"compilation_config": {"mode": 0}}),
        ("eager", {}, {"enforce_eager": True}),
        ("lora", {}, {"enable_lora": True, "max_lora_rank": 8}),
        ("ci", {"VLLM_CPU_CI_ENV": "1"}, {}),
        ("inductor partition", {}, {"compilation_config": {"use_inductor_graph_partition": True}}),
    ):
        os.environ.update(env)
        config = EngineArgs(model=sys.argv[1], max_model_len=256, **options).create_engine_config().compilation_config
        for key in env:
            del os.environ[key]
        out[name] = [config.mode.name, config.backend, config.compile_sizes]
        passes = vars(config.pass_config)
        fusions[name] = [key for key, value in passes.items() if key.startswith("fuse_") and value]
    report(out | {"fusions": fusions})
"""


@pytest.fixture(scope="module")
def ours(llama2: Path) -> Any:
    return run(CODE, str(llama2), fork=True).value


@pytest.fixture(scope="module")
def stock(llama2: Path) -> Any:
    return run(CODE, str(llama2), VLLM_COMPILE_EXT="0").value


@pytest.mark.parametrize("name", ["default", "asked", "O1"])
def test_what_the_user_asked_for_survives(ours: dict[str, Any], name: str) -> None:
    assert ours[name] == ["VLLM_COMPILE", "inductor", []]


def test_compile_sizes_are_kept(ours: dict[str, Any]) -> None:
    assert (ours["sizes"][0], sorted(ours["sizes"][2])) == ("VLLM_COMPILE", [1, 8])


@pytest.mark.parametrize(
    "name", ["O0", "trace once", "stock torch", "none", "eager", "lora", "ci", "inductor partition"]
)
def test_another_choice_keeps_stocks_behaviour(ours: dict[str, Any], stock: dict[str, Any], name: str) -> None:
    assert ours[name] == stock[name]
    assert ours[name][0] != "VLLM_COMPILE"


def test_passes_that_cpu_builds_do_not_have_are_off(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert "fuse_rope_kvcache_cat_mla" in stock["fusions"]["splitting"], "else this needs no test"
    assert ours["splitting"][0] == "VLLM_COMPILE"
    assert ours["fusions"]["splitting"] == ours["fusions"]["default"] == []
