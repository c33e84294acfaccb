"""Stock, cold and warm starts of a CPU engine: the same answers, nothing compiled twice, new weights are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import engine

pytestmark = pytest.mark.engine

# Whatever traces, compiles, reads a graph or starts a process, noted while the plugin loads compiled code.
GUARDS = """
    import importlib, subprocess
    from torch._dynamo.utils import counters as dynamo
    from vllm_compile_ext.compilation import decorators
    extra.update(entered=[], imported=[])
    loading = False

    def guard(module, path):
        *outer, name = path.split(".")
        owner = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        real = getattr(owner, name)
        def seen(*args, **kwargs):
            # The compiler's version is in the key: it is asked for that, in the background.
            if loading and not (path == "Popen.__init__" and list(args[1])[1:] == ["-v"]):
                extra["entered"].append(f"{module}.{path}")
            return real(*args, **kwargs)
        setattr(owner, name, seen)

    for module, paths in {
        "torch._dynamo.convert_frame": "fullgraph_capture _compile",
        "torch._dynamo.package": "load_guard_manager",
        "torch.fx": "Graph.__init__ GraphModule.__init__",
        "torch.fx._graph_pickler": "GraphPickler.loads",
        "torch._subclasses.fake_tensor": "FakeTensorMode.__init__",
        "torch.fx.experimental.symbolic_shapes": "ShapeEnv.__init__",
        "torch._functorch.aot_autograd": "aot_module_simplified create_aot_state",
        "torch._functorch._aot_autograd.aot_autograd_result": "deserialize_bundled_cache_entry",
        "torch._inductor.compile_fx": "compile_fx fx_codegen_and_compile",
        "torch._inductor.graph": "GraphLowering.__init__",
        "torch._inductor.async_compile": "AsyncCompile.__init__",
        "torch._inductor.codecache":
            "PyCodeCache.load_by_key_path CppCodeCache.load_async FxGraphCache.load_with_key",
        "torch._inductor.cpu_vec_isa": "pick_vec_isa",
        "subprocess": "Popen.__init__",
    }.items():
        for path in paths.split():
            guard(module, path)

    load = decorators.upstream._try_load_aot_compiled_fn
    def guarded(model, path):
        global loading
        loading, before = True, set(sys.modules)
        try:
            return load(model, path)
        finally:
            loading = False
            extra["imported"] += sorted(set(sys.modules) - before)
    decorators.upstream._try_load_aot_compiled_fn = guarded
    dynamo.clear()
"""

# Other weights for the whole model; then what RL loops and vLLM's own loaders do to one parameter of layer 0, which was
# traced, and of layer 2, which is a copy of layer 1.
CHANGES = """
    extra["dynamo"] = {kind: dict(values) for kind, values in dynamo.items() if values}
    seen = vars(compilation_counter).items()
    extra["vllm"] = {n: v for n, v in seen if v and ("graph" in n or "compil" in n or "artifact" in n)}

    import torch
    for name, path in (("reloaded", os.environ["OTHER"]), ("and back", options["model"])):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        extra[name] = tokens()

    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.get_model()
    extra["changes"] = {}
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
            changed = tokens()
            change(old)
            extra["changes"][f"{change.__name__} {number}"] = [changed, tokens()]
        norm.weight.data.copy_(new.data)
        changed = tokens()
        norm.weight.data.copy_(kept)
        extra["changes"][f"in place {number}"] = [changed, tokens()]
"""


@dataclass(frozen=True)
class Starts:
    """Starts on one cache root, stock's first.

    left: the root's files and their contents after stock's start.  tokens, other: what the model answers without vLLM,
    and with other weights.
    """

    root: Path
    stock: engine.Run
    left: dict[Path, bytes]
    cold: engine.Run
    warm: engine.Run
    tokens: list[list[int]]
    other: list[list[int]]


@pytest.fixture(scope="module")
def starts(llama: Path, other_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    root = tmp_path_factory.mktemp("start") / "root"
    stock = engine.run(llama, root, fork=True, plugin=False, VLLM_COMPILE_EXT="0")
    left = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "modelinfos" not in str(path)}
    cold = engine.run(llama, root, fork=True)
    warm = engine.run(llama, root, before=GUARDS, after=CHANGES, fork=True, OTHER=str(other_llama))
    return Starts(root, stock, left, cold, warm, engine.greedy(llama), engine.greedy(other_llama))


def test_the_model_is_a_fair_judge(starts: Starts) -> None:
    assert all(len(set(tokens)) > 8 for tokens in starts.tokens), "greedy tokens must vary"
    assert len({tuple(tokens) for tokens in starts.tokens}) == len(engine.PROMPTS)
    assert starts.other != starts.tokens


def test_kill_switch_runs_stock(starts: Starts) -> None:
    assert starts.stock.backends.endswith("/vllm/compilation/backends.py")
    assert starts.stock.mode == "DYNAMO_TRACE_ONCE"
    assert starts.stock.output.lines("vllm-compile-ext", "is off")
    assert starts.stock.metrics == {}


def test_a_cold_start_compiles_pieces_and_saves(starts: Starts) -> None:
    cold = starts.cold
    assert cold.backends.endswith("vllm_compile_ext/compilation/backends.py")
    assert (cold.mode, cold.sizes) == ("VLLM_COMPILE", [])
    assert cold.counters["num_graphs_seen"] == 1
    assert cold.counters["num_piecewise_capturable_graphs_seen"] == 5  # 4 layers split at attention
    assert cold.counters["num_compiled_artifacts_saved"] == 3  # first, middle, last
    assert (cold.compiled, cold.loaded, cold.counters["num_aot_artifacts_saved"]) == (3, 0, 1)
    assert cold.output.lines("traced 2 layers and copied 2; 5 pieces to compile, 3 of them distinct")


def test_a_warm_start_loads_and_compiles_nothing(starts: Starts) -> None:
    warm = starts.warm
    assert (warm.loaded, warm.compiled, warm.counters["num_graphs_seen"]) == (1, 0, 0)
    assert warm.extra["vllm"] == {"num_aot_artifacts_loaded": 1, "num_compiled_artifacts_loaded": 3}
    assert warm.extra["dynamo"] == {}
    # Nor is any compiler entered or imported.
    assert warm.extra["entered"] == []
    compilers = ("torch._dynamo", "torch._inductor", "torch.fx", "sympy")
    assert [name for name in warm.extra["imported"] if name.startswith(compilers)] == []


def test_same_answers(starts: Starts) -> None:
    assert starts.cold.tokens == starts.warm.tokens == starts.stock.tokens == starts.tokens
    assert starts.cold.logprobs == starts.warm.logprobs, "the same kernels give the same bits"
    for mine, theirs in zip(starts.cold.logprobs, starts.stock.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def test_stocks_cache_is_left_as_it_is(starts: Starts) -> None:
    assert [path for path in starts.left if "torch_aot_compile" in str(path)]
    assert {path: path.read_bytes() for path in starts.left} == starts.left


def test_reloaded_weights_are_used(starts: Starts) -> None:
    assert starts.warm.extra["reloaded"] == starts.other
    assert starts.warm.extra["and back"] == starts.warm.tokens


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("how", ["attribute", "registration", "dictionary", "in place"])
def test_changed_parameters_are_used(starts: Starts, how: str, layer: int) -> None:
    changes = starts.warm.extra["changes"]
    changed, back = changes[f"{how} {layer}"]
    assert back == starts.warm.tokens
    assert changed != starts.warm.tokens
    assert changed == changes[f"in place {layer}"][0], "however it is done"


def test_only_depyf_decompiles_and_on_a_warm_start_too(starts: Starts, llama: Path, tmp_path: Path) -> None:
    assert starts.cold.decompiled == starts.warm.decompiled == []
    (placeholder,) = {*starts.root.rglob("transformed_code.py")} - starts.left.keys()
    assert "VLLM_COMPILE_DEPYF=1" in placeholder.read_text()

    options = {
        "compilation_config": {"debug_dump_path": str(tmp_path / "dump")},
        "additional_config": {"compile_ext": {"depyf": True}},
    }
    run = engine.run(llama, starts.root, options, fork=True)
    assert (run.loaded, run.compiled) == (1, 0), "neither the setting nor the dump path is in the key"
    assert run.decompiled == ["forward"]
    assert run.tokens == starts.warm.tokens
    dumps = [*(tmp_path / "dump").rglob("transformed_code.py"), *Path(run.folder).rglob("transformed_code.py")]
    assert len(dumps) == 2, "the debug dump folder and the model's cache folder"
    for path in dumps:
        assert "def forward(self, input_ids" in path.read_text()
        compile(path.read_text(), str(path), "exec")
