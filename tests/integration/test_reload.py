"""A warm start of a real engine: nothing is traced or compiled, no graph is read, and weights that change are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine

CODE = """
    import os, sys
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from tests import forks
    forks.prepare()
    import torch
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter as counter
    from vllm_compile_ext.compilation import decorators, program
    first, second = sys.argv[1:3]
    os.environ["VLLM_CACHE_ROOT"] = str(Path("root").absolute())
    PROMPTS = ("The import statement", "def f(x):", "x")

    def engine(model):
        limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4)
        return LLM(model=model, dtype="float32", disable_log_stats=True, **limits)

    def ask(llm):
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]

    def plain(model):
        return lambda: ask(engine(model))

    out = {"first": forks.run(plain(first)).value, "second": forks.run(plain(second)).value}

    def guarded():
        import importlib, subprocess
        from torch._dynamo.utils import counters
        entered, tracked = [], [False]
        def guard(module, name, method=None):
            owner = importlib.import_module(module)
            owner = getattr(owner, name) if method else owner
            real = getattr(owner, method or name)
            def seen(*args, **kwargs):
                if tracked[0]:
                    # The compiler's version is in the key: it is asked for that, in the background.
                    command = args[1] if name == "Popen" else ()
                    if list(command[1:]) != ["-v"]:
                        entered.append(f"{module}.{name}.{method} {command}")
                return real(*args, **kwargs)
            setattr(owner, method or name, seen)
        guard("torch._dynamo.convert_frame", "fullgraph_capture")
        guard("torch._dynamo.convert_frame", "_compile")
        guard("torch._dynamo.package", "load_guard_manager")
        guard("torch.fx", "Graph", "__init__")
        guard("torch.fx", "GraphModule", "__init__")
        guard("torch.fx._graph_pickler", "GraphPickler", "loads")
        guard("torch._subclasses.fake_tensor", "FakeTensorMode", "__init__")
        guard("torch.fx.experimental.symbolic_shapes", "ShapeEnv", "__init__")
        guard("torch._functorch.aot_autograd", "aot_module_simplified")
        guard("torch._functorch.aot_autograd", "create_aot_state")
        guard("torch._functorch._aot_autograd.aot_autograd_result", "deserialize_bundled_cache_entry")
        guard("torch._inductor.compile_fx", "compile_fx")
        guard("torch._inductor.compile_fx", "fx_codegen_and_compile")
        guard("torch._inductor.graph", "GraphLowering", "__init__")
        guard("torch._inductor.async_compile", "AsyncCompile", "__init__")
        guard("torch._inductor.codecache", "PyCodeCache", "load_by_key_path")
        guard("torch._inductor.codecache", "CppCodeCache", "load_async")
        guard("torch._inductor.codecache", "FxGraphCache", "load_with_key")
        guard("torch._inductor.cpu_vec_isa", "pick_vec_isa")
        guard("subprocess", "Popen", "__init__")
        real_load = decorators.upstream._try_load_aot_compiled_fn
        imported = []
        def load(model, path):
            tracked[0], before = True, set(sys.modules)
            try:
                return real_load(model, path)
            finally:
                tracked[0] = False
                imported.extend(sorted(set(sys.modules) - before))
        decorators.upstream._try_load_aot_compiled_fn = load
        counters.clear()
        llm = engine(first)
        return dict(
            entered=entered, imported=imported, tokens=ask(llm),
            dynamo={kind: dict(values) for kind, values in counters.items() if values},
            vllm={n: v for n, v in vars(counter).items() if v and ("graph" in n or "compil" in n or "artifact" in n)},
        )
    ended = forks.run(guarded)
    out["guarded"], out["guarded output"] = ended.value, ended.output[-3000:]

    def weights():
        llm = engine(first)
        core = llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.get_model()
        got = {"loaded": counter.num_aot_artifacts_loaded, "at first": ask(llm)}
        llm.collective_rpc("reload_weights", kwargs={"weights_path": second})
        got["reloaded"] = ask(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": first})
        got["and back"] = ask(llm)
        # What RL loops and vLLM's own loaders do to parameters; layer 0 was traced, layer 2 is a copy of layer 1.
        changes = got["changes"] = {}
        for number in (0, 2):
            norm = model.model.layers[number].input_layernorm
            old, kept = norm.weight, norm.weight.data.clone()
            new = torch.nn.Parameter(torch.linspace(-2, 2, len(kept)), requires_grad=False)
            def attribute(value):
                norm.weight = value
            def registration(value):
                del norm.weight
                norm.register_parameter("weight", value)
            def dictionary(value):
                norm._parameters["weight"] = value
            for change in (attribute, registration, dictionary):
                change(new)
                changed = ask(llm)
                change(old)
                changes[f"{change.__name__} {number}"] = [changed, ask(llm)]
            norm.weight.data.copy_(new.data)
            changed = ask(llm)
            norm.weight.data.copy_(kept)
            changes[f"in place {number}"] = [changed, ask(llm)]
        return got
    ended = forks.run(weights)
    out["weights"], out["weights output"] = ended.value, ended.output[-3000:]
    report(out)
"""


@pytest.fixture(scope="module")
def ran(llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, str(llama), str(other_llama), folder=tmp_path_factory.mktemp("reload"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def test_a_warm_start_enters_no_compiler(ran: dict[str, Any]) -> None:
    guarded = ran["guarded"]
    assert guarded is not None, ran["guarded output"]
    assert guarded["entered"] == []
    assert guarded["tokens"] == ran["first"]
    assert guarded["dynamo"] == {}
    assert guarded["vllm"]["num_aot_artifacts_loaded"] == 1
    assert guarded["vllm"]["num_compiled_artifacts_loaded"] == 3
    assert set(guarded["vllm"]) == {"num_aot_artifacts_loaded", "num_compiled_artifacts_loaded"}


def test_a_warm_start_imports_no_compiler(ran: dict[str, Any]) -> None:
    """What the load brings in is the plugin's own and the model's pieces."""
    foreign = [name for name in ran["guarded"]["imported"] if not name.startswith("vllm_compile_ext")]
    assert [
        name for name in foreign if name.startswith(("torch._dynamo", "torch._inductor", "torch.fx", "sympy"))
    ] == []


def test_reloaded_weights_are_used(ran: dict[str, Any]) -> None:
    weights = ran["weights"]
    assert weights is not None, ran["weights output"]
    assert weights["loaded"] == 1
    assert ran["first"] != ran["second"]
    assert weights["at first"] == weights["and back"] == ran["first"]
    assert weights["reloaded"] == ran["second"]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("how", ["attribute", "registration", "dictionary", "in place"])
def test_changed_parameters_are_used(ran: dict[str, Any], how: str, layer: int) -> None:
    changed, back = ran["weights"]["changes"][f"{how} {layer}"]
    assert back == ran["first"]
    assert changed != ran["first"]
    assert changed == ran["weights"]["changes"][f"in place {layer}"][0], "however it is done"
