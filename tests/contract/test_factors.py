"""The factors of a key against the installed vLLM: what its hash counts, the factors count, but for the listed fields.

Nothing is compiled.  Each test looks at what one process reports; there configurations are changed in place, which
vLLM's own checks of their values do not see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import run

START = """
    import dataclasses, enum, os, types
    import torch
    import vllm.envs
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.engine.arg_utils import EngineArgs
    from vllm_compile_ext.key import config as key_config, factors, machine, torch_state

    path = sys.argv[1]

    def made(model=path, **options):
        options = dict(dtype="float32", max_num_batched_tokens=256, max_model_len=256) | options
        return EngineArgs(model=model, **options).create_engine_config()

    def difference(one, other):
        return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))

    config = made()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
"""

MUTATE = (
    START
    + """
    from vllm.config import (
        ECTransferConfig, KVTransferConfig, LoRAConfig, MultiModalConfig, ProfilerConfig, SpeculativeConfig
    )

    # Parts that are not there by default.
    config.lora_config = LoRAConfig(max_lora_rank=8)
    config.additional_config = {"ours": 1, "nested": {"api_key": "s3cret", "token": "s3cret"}}
    config.model_config.multimodal_config = MultiModalConfig()
    config.compilation_config.compile_mm_encoder = True
    config.speculative_config = SpeculativeConfig(
        method="draft_model", model=path, num_speculative_tokens=2,
        target_model_config=config.model_config, target_parallel_config=config.parallel_config,
    )

    def variants(value):
        if isinstance(value, bool):
            yield not value
        elif isinstance(value, enum.Enum):
            yield from [member for member in type(value) if member is not value][:1]
        elif isinstance(value, (int, float)):
            yield value + 1
        elif isinstance(value, str):
            yield value + "x"
        elif isinstance(value, torch.dtype):
            yield torch.float64
        elif isinstance(value, dict):
            yield value | {"new": 1}
            yield value | {"new": None}
        elif isinstance(value, (list, tuple)):
            yield type(value)([*value, 1])
            yield type(value)([*value, "x"])
        elif isinstance(value, (set, frozenset)):
            yield value | {"x"}
        if value is not None:
            yield None
        else:
            yield from (1, "x", {"a": 1})

    def places(owner, name, depth=3):
        # Every field of every config below `owner`, as a name, the object that has it and the field.
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name, None)
            here = f"{name}.{field.name}"
            yield here, owner, field.name
            if dataclasses.is_dataclass(value) and not isinstance(value, type) and depth and "hf_" not in field.name:
                yield from places(value, here, depth - 1)

    def look():
        return config.compute_hash(), key_config.config_factors(config)

    base = look()
    under, over, unlike, changed, unhashable, fallen = [], [], [], {}, set(), []
    for name, owner, field in places(config, "config"):
        old = getattr(owner, field)
        for new in variants(old):
            try:
                object.__setattr__(owner, field, new)
                found = look()
            except Exception as error:
                unhashable.add(name)
                continue
            finally:
                object.__setattr__(owner, field, old)
            names = difference(found[1], base[1])
            if "config" in found[1]:
                fallen.append(name)
            if found[0] != base[0]:
                changed.setdefault(name, []).append(names)
                if not names:
                    under.append(name)
            elif names:
                over.append([name, names])
    hf = config.model_config.hf_config
    in_hf = {}
    for key, value in list(vars(hf).items()):
        for new in variants(value):
            vars(hf)[key] = new  # past the checks of transformers
            try:
                found = look()
            except Exception:
                continue
            finally:
                vars(hf)[key] = value
            if found[0] != base[0]:
                in_hf.setdefault(key, []).append(difference(found[1], base[1]))
    after = look()
    report(dict(
        factors=base[1], under=under, over=over, changed=changed, unhashable=sorted(unhashable), in_hf=in_hf,
        fallen=fallen, unchanged=after == base,
    ))
"""
)


@pytest.fixture(scope="module")
def mutated(llama2: Path) -> dict[str, Any]:
    outcome = run(MUTATE, str(llama2), fork=True)
    assert outcome.value, outcome.output[-3000:]
    return outcome.value


def test_no_change_of_vllms_hash_is_missed(mutated: dict[str, Any]) -> None:
    assert mutated["unchanged"]
    assert len(mutated["changed"]) > 150, "else the fields were not changed"
    assert {name.rpartition(".")[2] for name in mutated["under"]} == {
        *("model", "model_weights", "revision", "code_revision", "generation_config"),
        *("max_logprobs", "trust_remote_code", "disable_nccl_for_dp_synchronization"),
    }
    assert mutated["over"] == mutated["fallen"] == []


def test_no_change_of_the_models_own_configuration_is_missed(mutated: dict[str, Any]) -> None:
    assert len(mutated["in_hf"]) > 20
    assert [key for key, names in mutated["in_hf"].items() if [] in names] == []
    assert mutated["in_hf"]["num_hidden_layers"][0] == ["config.model.hf_config.num_hidden_layers"]


def test_a_change_is_named(mutated: dict[str, Any]) -> None:
    one = {name: names[0] for name, names in mutated["changed"].items()}
    assert one["config.model_config.dtype"] == ["config.model.dtype"]
    assert one["config.scheduler_config.max_num_batched_tokens"] == ["config.scheduler.max_num_batched_tokens"]
    assert one["config.parallel_config.eplb_config.policy"] == ["config.parallel.eplb_config.policy"]
    assert one["config.compilation_config.compile_sizes"] == ["config.compilation.compile_sizes"]
    assert one["config.compilation_config.pass_config.eliminate_noops"] == ["config.compilation.pass.eliminate_noops"]
    assert one["config.compilation_config.cudagraph_mode"] == ["config.compilation.cudagraph_mode"]
    assert one["config.lora_config.max_lora_rank"] == ["config.lora"]
    assert one["config.speculative_config.draft_model_config.max_model_len"] == [
        "config.speculative.draft_model.max_model_len"
    ]
    several = {name: names for name, names in one.items() if len(names) > 1}
    assert all(len(names) < 80 for names in several.values()), several


def test_values_are_for_people(mutated: dict[str, Any]) -> None:
    factors = mutated["factors"]
    assert factors["config.model.hf_config.num_hidden_layers"] == "2"
    assert factors["config.model.hf_text_config"] == "same as config.model.hf_config"
    assert factors["config.compilation.mode"] == "VLLM_COMPILE"
    assert factors["config.scheduler.max_num_batched_tokens"] == "256"
    assert max(map(len, factors.values())) <= 300
    assert "s3cret" not in str(factors)
    assert "/" not in "".join(factors.values()), "a path"


UNKNOWN = (
    START
    + """
    from vllm.config import utils
    from vllm.utils import hashing

    holders = [m for n, m in sys.modules.items() if n.startswith("vllm.config")]
    def untouched():
        return all(vars(m).get("hash_factors", utils.hash_factors) is upstream[0] for m in holders) and all(
            vars(m).get("safe_hash", hashing.safe_hash) is upstream[1] for m in holders)
    upstream = utils.hash_factors, hashing.safe_hash
    out = {"before": untouched()}
    key_config.config_factors(config)
    out["after"] = untouched()

    # A field that vLLM cannot hash.
    config.model_config.revision = lambda: 1
    try:
        key_config.config_factors(config)
    except TypeError as error:
        out["error"] = str(error)
    config.model_config.revision = None
    out["after an error"] = untouched()

    # Other ways to make the hash.
    kind = type(config)
    real = kind.compute_hash
    kind.compute_hash = lambda self: real(self)[::-1]
    out["turned"], out["opaque"] = key_config.config_factors(config), config.compute_hash()
    kind.compute_hash = lambda self: real(self) + "z"
    out["longer"] = list(key_config.config_factors(config))
    kind.compute_hash = lambda self: "0"
    out["constant"] = key_config.config_factors(config)
    kind.compute_hash = real

    # A config whose hash is made in its own way, and one that has a digest twice.
    class Foreign:
        def __init__(self, value): self.value = value
        def compute_hash(self): return "foreign" + str(self.value)
    config.additional_config = Foreign(1)
    one = key_config.config_factors(config)
    config.additional_config = Foreign(2)
    out["foreign"] = difference(one, key_config.config_factors(config))
    config.additional_config = {}
    none = key_config.config_factors(config)
    from vllm.config import ECTransferConfig, KVTransferConfig
    config.ec_transfer_config = ECTransferConfig()
    out["same digest"] = difference(none, key_config.config_factors(config))
    config.ec_transfer_config = None
    config.kv_transfer_config = KVTransferConfig()
    out["new part"] = difference(none, key_config.config_factors(config))
    report(out)
"""
)


@pytest.fixture(scope="module")
def unknown(llama2: Path) -> dict[str, Any]:
    outcome = run(UNKNOWN, str(llama2), fork=True)
    assert outcome.value, outcome.output[-3000:]
    return outcome.value


def test_vllms_functions_are_put_back(unknown: dict[str, Any]) -> None:
    assert unknown["before"]
    assert unknown["after"]
    assert "revision" in unknown["error"]
    assert unknown["after an error"]


def test_a_hash_that_is_not_understood_counts_whole(unknown: dict[str, Any]) -> None:
    assert unknown["turned"] == {"config": unknown["opaque"]}
    assert unknown["longer"] == ["config"]
    assert unknown["constant"] == {"config": "0"}


def test_parts_that_are_not_understood_count(unknown: dict[str, Any]) -> None:
    assert len(unknown["foreign"]) == len(unknown["same digest"]) == 1
    assert unknown["new part"] == ["config.kv_transfer"]


WHOLE = (
    START
    + """
    import shutil
    import torch._inductor.config as inductor
    base = factors.factors(config, model)
    out = {"factors": base, "twice": difference(base, factors.factors(config, model))}
    factors.prepare()
    out["prepared"] = difference(base, factors.factors(config, model))

    def changed(name, *, config=config, model=model, env=None):
        os.environ.update(env or {})
        out[name] = difference(base, factors.factors(config, model))
        for key in env or {}:
            del os.environ[key]

    other = sys.argv[2]
    shutil.copytree(path, other)
    changed("path", config=made(model=other, tokenizer=path))
    changed("requests", config=made(max_logprobs=5, trust_remote_code=True))
    synchronous = made(async_scheduling=False)
    out["decides"] = [each.parallel_config.disable_nccl_for_dp_synchronization for each in (config, synchronous)]
    changed("scheduling", config=synchronous)
    changed("runtime", config=made(
        seed=7, gpu_memory_utilization=0.3, served_model_name="x", kv_cache_memory_bytes=1 << 28, load_format="dummy",
        compilation_config={"cache_dir": other, "debug_dump_path": other},
    ))
    changed("runtime variables", env={name: value for name, value in {
        "VLLM_PORT": "1234", "VLLM_HOST_IP": "10.0.0.1", "VLLM_CACHE_ROOT": other, "VLLM_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret", "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_NIXL_SIDE_CHANNEL_PORT": "77", "CUDA_HOME": other,
        "VLLM_DP_RANK": "1", "LOCAL_RANK": "1", "VLLM_COMPILE_WORKERS": "3", "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_SYSTEM_START_DATE": "2026-01-01", "VLLM_IMAGE_TAG": "t",
    }.items()})

    changed("dtype", config=made(dtype="bfloat16"))
    changed("tokens", config=made(max_num_batched_tokens=128))
    changed("sizes", config=made(compilation_config={"compile_sizes": [1]}))
    changed("passes", config=made(compilation_config={"pass_config": {"eliminate_noops": False}}))
    changed("variable", env={"VLLM_PP_LAYER_PARTITION": "1,1"})
    changed("torch's variable", env={"ATEN_CPU_CAPABILITY": "avx2"})
    with inductor.patch(max_autotune=True):
        changed("setting")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        changed("dynamo")
    threads = made()
    threads.compilation_config.inductor_compile_config["cpp.dynamic_threads"] = False
    found = factors.factors(threads, model)
    out["threads"], count = difference(base, found), torch.get_num_threads()
    torch.set_num_threads(count + 1)
    out["other threads"] = difference(found, factors.factors(threads, model))
    torch.set_num_threads(count)
    with inductor.patch({"cpp.dynamic_threads": True}):
        changed("overridden")
    def switched(name, owner, attribute, value):
        old = getattr(owner, attribute)
        setattr(owner, attribute, value)
        changed(name)
        setattr(owner, attribute, old)

    switched("tf32 of cudnn", torch.backends.cudnn, "allow_tf32", False)
    switched("mkldnn", torch.backends.mkldnn, "deterministic", True)
    switched("precision of mkldnn", torch.backends.mkldnn.matmul, "fp32_precision", "bf16")
    switched("precision", torch.backends, "fp32_precision", "tf32")
    switched("reductions", torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    torch.backends.mha.set_fastpath_enabled(False)
    changed("mha")
    torch.backends.mha.set_fastpath_enabled(True)
    torch.use_deterministic_algorithms(True)
    changed("deterministic")
    torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu"):
        changed("autocast")
    torch.set_default_dtype(torch.float64)
    changed("default dtype")
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(count + 1)
    changed("threads that are not in the code")
    torch.set_num_threads(count)
    out["cuda"] = torch.cuda.is_initialized()
    import time
    began = time.perf_counter()
    for _ in range(20):
        torch_state.state()
    out["seconds"] = (time.perf_counter() - began) / 20
    points = machine._entry_points()
    machine._entry_points = lambda: points | {"theirs": "theirs.plugin:register theirs 1.2"}
    changed("another plugin")
    changed("another plugin, kept out", env={"VLLM_PLUGINS": "lora_filesystem_resolver,lora_hf_hub_resolver"})
    machine._entry_points = lambda: points
    changed("fewer plugins", env={"VLLM_PLUGINS": "lora_hf_hub_resolver"})
    changed("depth", model=torch.nn.Sequential(*model, torch.nn.Linear(4, 4)))
    changed("class", model=torch.nn.ModuleList(model))

    version, torch.__version__ = torch.__version__, "2.13.1"
    changed("torch")
    torch.__version__ = version
    real = torch.cpu.get_capabilities
    torch.cpu.get_capabilities = lambda: dict(real()) | dict.fromkeys(
        ("avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_fp16", "avx2", "sve", "bf16"), False)
    instructions = machine.platform()
    torch.cpu.get_capabilities = real
    out["platforms"] = [machine.platform(), instructions]
    sets, machine._instruction_sets = machine._instruction_sets, lambda: [*sets(), "avx99"]
    changed("instructions")
    machine._instruction_sets = sets
    flags, machine.processor = machine.processor, lambda: (*flags(), "avx99")
    changed("flags")
    machine.processor = flags
    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
        changed("no compiler")
        out["compiler"] = machine.compiler()
    with inductor.patch({"cpp.cxx": (None, shutil.which("g++") or "g++")}):
        changed("compiler by its path")
    out["secrets"] = [name for name, value in base.items() if "s3cret" in value]
    report(out)
"""
)


@pytest.fixture(scope="module")
def whole(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = run(WHOLE, str(llama2), str(tmp_path_factory.mktemp("elsewhere") / "a copy"), fork=True)
    assert outcome.value, outcome.output[-3000:]
    return outcome.value


@pytest.mark.parametrize(
    "name",
    [
        "twice",
        "prepared",
        "path",
        "requests",
        "scheduling",
        "runtime",
        "runtime variables",
        "threads that are not in the code",
        "another plugin, kept out",
        "overridden",
        "compiler by its path",
    ],
)
def test_what_cannot_change_the_code_does_not_count(whole: dict[str, Any], name: str) -> None:
    assert whole[name] == []
    assert whole["decides"] == [True, False], "what async_scheduling changes of vLLM's hash"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dtype", ["config.model.dtype"]),
        ("tokens", ["config.compilation.compile_ranges_endpoints", "config.scheduler.max_num_batched_tokens"]),
        ("sizes", ["config.compilation.compile_sizes"]),
        ("passes", ["config.compilation.pass.eliminate_noops"]),
        ("variable", ["env.VLLM_PP_LAYER_PARTITION"]),
        ("torch's variable", ["env.ATEN_CPU_CAPABILITY"]),
        ("setting", ["inductor.max_autotune"]),
        ("dynamo", ["dynamo.capture_scalar_outputs"]),
        ("threads", ["config.compilation.inductor_compile_config.cpp.dynamic_threads", "threads"]),
        ("other threads", ["threads"]),
        ("another plugin", ["vllm_plugin.theirs"]),
        ("fewer plugins", ["vllm_plugin.lora_filesystem_resolver"]),
        ("depth", []),
        ("class", ["class"]),
        ("torch", ["torch"]),
        ("instructions", ["platform"]),
        ("flags", ["cpu.avx99"]),
        ("no compiler", ["compiler"]),
    ],
)
def test_what_changes_the_code_counts_and_is_named(whole: dict[str, Any], name: str, expected: list[str]) -> None:
    assert whole[name] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tf32 of cudnn", "backends.cudnn.allow_tf32"),
        ("mkldnn", "backends.mkldnn.deterministic"),
        ("precision of mkldnn", "backends.mkldnn.matmul.fp32_precision"),
        ("precision", "backends.fp32_precision"),
        ("reductions", "backends.cuda.matmul.allow_fp16_reduced_precision_reduction"),
        ("mha", "backends.mha._is_fastpath_enabled"),
        ("deterministic", "guards.deterministic_algorithms"),
        ("autocast", "guards.autocast_state.enabled"),
        ("default dtype", "guards.default_dtype"),
    ],
)
def test_the_state_of_torch_counts(whole: dict[str, Any], name: str, expected: str) -> None:
    assert f"state.{expected}" in whole[name]
    # Switching on deterministic algorithms also sets an option of Inductor.
    assert {factor.partition(".")[0] for factor in whole[name]} <= {"state", "inductor"}


def test_asking_for_the_state_is_cheap_and_wakes_no_device(whole: dict[str, Any]) -> None:
    assert not whole["cuda"]
    assert whole["seconds"] < 0.003 * 3, "0.6 ms on an idle machine"


def test_there_is_a_factor_for_each_part(whole: dict[str, Any]) -> None:
    factors = whole["factors"]
    expected = {"vllm", "torch", "python", "plugin", "transformers", "platform", "compiler", "libc", "passes", "class"}
    assert expected <= factors.keys()
    assert {name.partition(".")[0] for name in factors} >= {"config", "env", "inductor", "functorch", "dynamo", "cpu"}
    assert all(isinstance(value, str) for value in factors.values())
    assert list(factors)[:2] == ["vllm", "torch"], "what explains most comes first"
    assert whole["compiler"] == "none"
    assert whole["platforms"][1].endswith(" cpu")
    assert not any(value.startswith("/") for value in factors.values()), "a path"


VARIABLES = (
    START
    + """
    from vllm_compile_ext.key.dropped import DROPPED
    dropped = [tuple(name.split(".", 1)) for name in DROPPED]
    known = vllm.envs.compile_factors()
    base = factors.factors(config, model)
    missed = []
    for name in known:
        value = "s3cret" if known[name] != "s3cret" else "another"
        vllm.envs.compile_factors = lambda: known | {name: value}
        if difference(base, factors.factors(config, model)) != [f"env.{name}"]:
            missed.append(name)
    report(dict(missed=missed, dropped=[name for layer, name in dropped if layer == "env"], settings=[
        name for layer, name in dropped
        if layer in ("dynamo", "inductor") and name not in getattr(torch, "_" + layer).config.save_config_portable()
    ], gone=[
        name for layer, name in dropped
        if layer == "flags" and not hasattr(sys.flags, name)
        or name[:2] == "c." and not hasattr(torch._C, name[2:])
    ]))
"""
)


def test_every_variable_that_vllm_counts_counts_but_for_the_listed_ones(llama2: Path) -> None:
    outcome = run(VARIABLES, str(llama2), fork=True)
    assert outcome.value, outcome.output[-3000:]
    assert sorted(outcome.value["missed"]) == sorted(outcome.value["dropped"])
    assert outcome.value["settings"] == outcome.value["gone"] == [], "what torch or Python does not have"


GPU = (
    START
    + """
    import vllm.platforms

    class Platform:
        device_type = "cuda"
        is_cpu = staticmethod(lambda: False)
        is_cuda_alike = staticmethod(lambda: True)
        get_pass_manager_cls = staticmethod(lambda: "tests.process.Outcome")
        def __getattr__(self, name): return getattr(cpu, name)

    cpu = vllm.platforms.current_platform
    vllm.platforms.current_platform = Platform()
    device = types.SimpleNamespace(
        major=9, minor=0, name="NVIDIA H100", multi_processor_count=132, gcnArchName="gfx942")
    torch.cuda.get_device_properties = lambda index: device
    torch.cuda.current_device = lambda: 0
    torch.version.cuda = "13.0"
    machine.version.__globals__["metadata"] = types.SimpleNamespace(
        version=lambda name: "3.6.0", PackageNotFoundError=KeyError, entry_points=lambda group: [])
    found = factors.factors(config, model)
    torch.version.cuda, torch.version.hip = None, "7.1"
    report([found, factors.factors(config, model)])
"""
)


def test_a_gpu_is_its_architecture_and_name_and_needs_no_compiler(llama2: Path) -> None:
    outcome = run(GPU, str(llama2), fork=True)
    assert outcome.value, outcome.output[-3000:]
    cuda, rocm = outcome.value
    assert cuda["platform"].endswith(" cuda sm_90 NVIDIA H100, 132 SMs")
    assert (cuda["cuda"], cuda["triton"]) == ("13.0", "3.6.0")
    assert not {"compiler", "libc", "threads", "cpu.avx2"} & cuda.keys()
    assert cuda["passes"].startswith("tests.process.Outcome ")
    assert len(cuda["passes"].split()) == 3, "another platform's passes have their own sources"
    assert " rocm gfx942 " in rocm["platform"]
    assert rocm["hip"] == "7.1"
