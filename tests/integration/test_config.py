"""The compilation mode on CPU, decided by vLLM's own configuration code; no engine is started."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.process import run, together

CODE = """
    import os
    from vllm.config import CompilationMode, VllmConfig
    from vllm.config.lora import LoRAConfig
    from vllm.engine.arg_utils import EngineArgs
    import vllm_compile_ext.platforms.cpu
    model, out, fusions = sys.argv[1], {}, {}
    def mode(name, env=None, **options):
        os.environ.update(env or {})
        config = EngineArgs(model=model, max_model_len=256, **options).create_engine_config()
        for key in env or {}:
            del os.environ[key]
        compilation = config.compilation_config
        out[name] = [compilation.mode.name, compilation.backend, compilation.compile_sizes]
        passes = vars(compilation.pass_config)
        fusions[name] = [key for key, value in passes.items() if key.startswith('fuse_') and value]
    mode('default')
    mode('asked', compilation_config={'mode': 3})
    mode('sizes', compilation_config={'compile_sizes': [8, 1]})
    mode('splitting', compilation_config={'splitting_ops': ['aten::sin']})
    mode('O1', optimization_level=1)
    mode('O0', optimization_level=0)
    mode('trace once', compilation_config={'mode': 2})
    mode('stock torch', compilation_config={'mode': 1})
    mode('none', compilation_config={'mode': 0})
    mode('eager', enforce_eager=True)
    mode('lora', enable_lora=True, max_lora_rank=8)
    mode('ci', env={'VLLM_CPU_CI_ENV': '1'})
    mode('inductor partition', compilation_config={'use_inductor_graph_partition': True})
    report(out | {'fusions': fusions})
"""


@pytest.fixture(scope="module")
def both(llama2: Path) -> list[dict[str, Any]]:
    ours, stock = together(partial(run, CODE, str(llama2)), partial(run, CODE, str(llama2), VLLM_COMPILE_EXT="0"))
    return [ours.value, stock.value]


@pytest.fixture(scope="module")
def ours(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[0]


@pytest.fixture(scope="module")
def stock(both: list[dict[str, Any]]) -> dict[str, Any]:
    return both[1]


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
