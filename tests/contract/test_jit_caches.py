"""Where the installed torch and vLLM keep Triton's kernels, with the plugin and without; no GPU, no engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.process import Outcome, run, together

# A cold start, as far as it goes without a GPU: vLLM's decorator names Inductor's folder, a model is compiled, and
# Inductor makes a Triton kernel.  What Triton compiles afterwards goes where TRITON_CACHE_DIR says.
COLD = """
    import os
    from types import SimpleNamespace
    import vllm.engine.arg_utils
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    model = sys.argv[1]
    def look():
        return [os.environ.get("TRITON_CACHE_DIR"), triton_cache_dir(0), triton_cache_dir(1)]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = model
    import torch
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir, triton_cache_dir
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    out = {"before": look()}
    compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
    out["right"] = torch.equal(compiled(torch.ones(4)), torch.ones(4).sin() + 1)
    with temporary_cache_dir(model + "-temporary"):
        out["temporary"] = look()
    device = DeviceProperties(type="cuda", index=0, multi_processor_count=1, cc=90)
    config = SimpleNamespace(kwargs={}, pre_hook=None)
    CachingAutotuner(SimpleNamespace(__name__="k", arg_names=[]), {"device": device}, [config], None, [], True, None)
    out["after"] = look()
    out["caches"] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    report(out)
"""


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """Stock and ours: a folder, and what was found."""

    def start(folder: Path, switch: str) -> Outcome:
        env = {"TRITON_CACHE_DIR": None, "TRITON_HOME": None, "VLLM_CACHE_ROOT": str(folder / "root")}
        return run(COLD, str(folder / "model"), VLLM_COMPILE_EXT=switch, **env)

    folders = [tmp_path_factory.mktemp(name) for name in ("stock", "ours")]
    outcomes = together(*(partial(start, folder, switch) for folder, switch in zip(folders, "01", strict=True)))
    for folder, outcome in zip(folders, outcomes, strict=True):
        assert outcome.code == 0, outcome.output[-5000:]
        assert outcome.value["right"]
        assert outcome.value["caches"] == str(folder / "model"), "only Triton's folder is ours"
    return [(folder, outcome.value) for folder, outcome in zip(folders, outcomes, strict=True)]


def test_stock_moves_tritons_folder_into_the_models(cold: list[tuple[Path, dict[str, Any]]]) -> None:
    folder, found = cold[0]
    places = [f"{folder}/model/triton/{device}" for device in (0, 1)]
    assert found["before"] == [None, *places]
    assert found["temporary"][1] == f"{folder}/model-temporary/triton/0"
    assert found["after"] == [places[0], places[0], places[0]], "from then on, for all kernels and all devices"
    assert not (folder / "root/compile_store").exists()


def test_with_the_plugin_it_is_one_place_in_the_store(cold: list[tuple[Path, dict[str, Any]]]) -> None:
    folder, found = cold[1]
    place = found["before"][0]
    assert Path(place).is_relative_to(folder / "root/compile_store/v1/jit/triton")
    assert found["before"] == found["temporary"] == found["after"] == [place] * 3


FAMILY = """
    import os, subprocess
    import vllm.engine.arg_utils
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm_compile_ext import jit_caches, plugin
    names = [*(cache.variable for cache in jit_caches.CACHES), jit_caches.MARK]
    def look():
        return {name: os.environ[name] for name in names if name in os.environ}
    out = {"here": look(), "line": plugin.status().line}
    if len(sys.argv) == 1:
        children = {}
        for name, env in (("same", {}), ("off", {"VLLM_COMPILE_EXT": "0"}), ("set", {"TRITON_CACHE_DIR": "/theirs"})):
            os.makedirs(name)
            children[name] = subprocess.Popen([sys.executable, "../main.py", name], env=os.environ | env, cwd=name)
        for name, child in children.items():
            assert child.wait() == 0
            out[name] = json.load(open(name + "/report.json"))["here"]
        from vllm.compilation.compiler_interface import InductorAdaptor
        InductorAdaptor().initialize_cache(os.getcwd() + "/model")
        out["adaptor"] = look()
    plugin.unregister()
    out["undone"] = look()
    plugin.register()
    out["again"] = look()
    import vllm.envs
    from vllm_compile_ext import envs
    roots = {}
    for name, value in (("VLLM_CACHE_ROOT", "~/a"), ("VLLM_CACHE_ROOT", None), ("XDG_CACHE_HOME", "/x")):
        os.environ.update({name: value}) if value else os.environ.pop(name, None)
        roots[str(envs.cache_root())] = os.path.abspath(vllm.envs.environment_variables["VLLM_CACHE_ROOT"]())
    out["roots"] = roots
    report(out)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("family")
    unset = dict.fromkeys(("TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME"), None)
    outcome = run(
        FAMILY, folder=folder / "run", HOME=str(folder / "home"), VLLM_COMPILE_STORE=str(folder / "store"), **unset
    )
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def test_child_processes_keep_the_place(family: Any) -> None:
    assert len(family["here"]) == 6
    assert family["same"] == family["here"]


def test_a_child_without_the_plugin_is_stock(family: Any) -> None:
    assert family["off"] == {}


def test_a_child_for_which_the_user_chose(family: Any) -> None:
    assert family["set"]["TRITON_CACHE_DIR"] == "/theirs"
    assert family["set"]["DG_JIT_CACHE_DIR"] == family["here"]["DG_JIT_CACHE_DIR"]


def test_vllms_other_compiler_respects_it(family: Any) -> None:
    assert family["adaptor"] == family["here"]


def test_unregister_restores_the_environment(family: Any) -> None:
    assert family["undone"] == {}
    assert family["again"] == family["here"]


def test_the_status_line_names_the_store(family: Any) -> None:
    assert "VLLM_COMPILE_STORE=" in family["line"]


def test_the_cache_root_is_vllms(family: Any) -> None:
    assert len(family["roots"]) == 3
    assert all(ours == theirs for ours, theirs in family["roots"].items())
