"""Where the installed torch and vLLM keep Triton's kernels, with the plugin and without; no GPU, no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.process import run

LOAD = """
    import os
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm_compile_ext import plugin
    from vllm_compile_ext.store import kernels
    names = [*(cache.variable for cache in kernels.CACHES), kernels.MARK]
    def variables():
        return {name: os.environ[name] for name in names if name in os.environ}
    out = {"variables": variables(), "environment": dict(os.environ), "line": plugin.status().line}
"""

# A cold start, as far as it goes without a GPU: vLLM's decorator names Inductor's folder, a model is compiled, and
# Inductor makes a Triton kernel.  What Triton compiles afterwards goes where TRITON_CACHE_DIR says.
COLD = (
    LOAD
    + """
    from types import SimpleNamespace
    model = sys.argv[1]
    def look():
        return [os.environ.get("TRITON_CACHE_DIR"), triton_cache_dir(0), triton_cache_dir(1)]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = model
    import torch
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir, triton_cache_dir
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    out["before"] = look()
    compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
    assert torch.equal(compiled(torch.ones(4)), torch.ones(4).sin() + 1)
    with temporary_cache_dir(model + "-temporary"):
        out["temporary"] = look()
    device = DeviceProperties(type="cuda", index=0, multi_processor_count=1, cc=90)
    config = SimpleNamespace(kwargs={}, pre_hook=None)
    CachingAutotuner(SimpleNamespace(__name__="k", arg_names=[]), {"device": device}, [config], None, [], True, None)
    out["after"] = look()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == model, "only Triton's folder is ours"
    if plugin.status().active:
        from vllm.compilation.compiler_interface import InductorAdaptor
        InductorAdaptor.__new__(InductorAdaptor).initialize_cache(model)
        out["adaptor"] = variables()
        plugin.unregister()
        out["undone"] = variables()
    report(out)
"""
)


def start(folder: Path, code: str, **env: str | None) -> Any:
    outcome = run(code, str(folder / "model"), folder=folder, fork=True, plugin=False, **env)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def test_tritons_folder_is_one_place_in_the_store_and_not_in_the_models(tmp_path: Path) -> None:
    folders = tmp_path / "stock", tmp_path / "ours"
    stock, ours = (
        start(
            folder,
            COLD,
            TRITON_CACHE_DIR=None,
            TRITON_HOME=None,
            HOME=str(folder),
            VLLM_COMPILE_STORE=str(folder / "store"),
            VLLM_COMPILE_EXT=switch,
        )
        for folder, switch in zip(folders, "01", strict=True)
    )

    places = [f"{folders[0]}/model/triton/{device}" for device in (0, 1)]
    assert stock["before"] == [None, *places]
    assert stock["temporary"][1] == f"{folders[0]}/model-temporary/triton/0"
    assert stock["after"] == [places[0]] * 3, "from then on, for all kernels and all devices"
    assert not (folders[0] / "store").exists()

    place, variables = ours["before"][0], ours["variables"]
    assert Path(place).is_relative_to(folders[1] / "store/v1/jit/triton")
    assert ours["before"] == ours["temporary"] == ours["after"] == [place] * 3
    assert len(variables) == 6
    assert ours["adaptor"] == variables
    assert ours["undone"] == {}
    assert "VLLM_COMPILE_STORE=" in ours["line"]

    def child(**env: str) -> Any:
        """The variables of a process that inherits the environment, with `env`."""
        return start(tmp_path / "child", LOAD + "\n    report(out)\n", **ours["environment"] | env)["variables"]

    assert child() == variables
    assert child(VLLM_COMPILE_EXT="0") == {}
    theirs = child(TRITON_CACHE_DIR="/theirs")
    assert (theirs["TRITON_CACHE_DIR"], theirs["DG_JIT_CACHE_DIR"]) == ("/theirs", variables["DG_JIT_CACHE_DIR"])
