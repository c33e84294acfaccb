"""The factors of a key against the installed vLLM: what its hash counts, the factors count, but for the listed fields.

Nothing is compiled.  `test_in_vllm` runs these in a fork of a process that has vLLM imported.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
import vllm.envs
import vllm.platforms
from vllm.config import (
    ECTransferConfig,
    KVTransferConfig,
    LoRAConfig,
    MultiModalConfig,
    SpeculativeConfig,
    VllmConfig,
    utils,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.utils import hashing

from vllm_compile_ext.key import config as key_config
from vllm_compile_ext.key import factors, machine

LLAMA = os.environ["LLAMA"]
MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


def config_factors(config: VllmConfig) -> dict[str, str]:
    return key_config.config_factors(config, factors.EXCLUDED)


def made(model: str = LLAMA, **options: Any) -> VllmConfig:
    limits: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 256, "max_model_len": 256}
    return EngineArgs(model=model, **limits | options).create_engine_config()


def difference(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture
def config() -> VllmConfig:
    return made()


# --- every field: what changes vLLM's hash changes a factor


def variants(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, enum.Enum):
        yield from [member for member in type(value) if member is not value][:1]
    elif isinstance(value, int | float):
        yield value + 1
    elif isinstance(value, str):
        yield value + "x"
    elif isinstance(value, torch.dtype):
        yield torch.float64
    elif isinstance(value, dict):
        yield from (value | {"new": 1}, value | {"new": None})
    elif isinstance(value, list | tuple):
        yield from (type(value)([*value, 1]), type(value)([*value, "x"]))
    elif isinstance(value, set | frozenset):
        yield value | {"x"}
    yield from (1, "x", {"a": 1}) if value is None else (None,)


def places(owner: Any, name: str, depth: int = 3) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every field of every config below `owner`: its name, and where its value is, past the checks of vLLM."""
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name, None)
        here = f"{name}.{field.name}"
        if field.name in vars(owner):
            yield here, vars(owner), field.name
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and depth and "hf_" not in field.name:
            yield from places(value, here, depth - 1)


def test_no_change_of_vllms_hash_is_missed_and_each_is_named(config: VllmConfig) -> None:
    # Parts that are not there by default.
    config.lora_config = LoRAConfig(max_lora_rank=8)
    config.additional_config = {"ours": 1, "nested": {"api_key": "s3cret", "token": "s3cret"}}
    config.model_config.multimodal_config = MultiModalConfig()
    config.compilation_config.compile_mm_encoder = True
    config.speculative_config = SpeculativeConfig(
        method="draft_model",
        model=LLAMA,
        num_speculative_tokens=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    base = key, table = config.compute_hash(), config_factors(config)
    under, over, changed = set(), [], dict[str, list[str]]()
    models = vars(config.model_config.hf_config)
    for name, values, field in [*places(config, "config"), *((f"hf_config.{name}", models, name) for name in models)]:
        old = values[field]
        for new in variants(old):
            values[field] = new
            try:
                found = config.compute_hash(), config_factors(config)
            except Exception:  # vLLM cannot hash it
                continue
            finally:
                values[field] = old
            names = difference(found[1], table)
            assert "config" not in found[1], "the hash was not understood"
            if found[0] != key:
                changed.setdefault(name, names)
                if not names:
                    under.add(field)
            elif names:
                over.append((name, names))
    assert len(changed) > 150, "else the fields were not changed"
    assert under == {
        *("model", "model_weights", "revision", "code_revision", "generation_config"),
        *("max_logprobs", "trust_remote_code", "disable_nccl_for_dp_synchronization"),
    }
    assert over == []
    for field, named in {
        "model_config.dtype": "model.dtype",
        "scheduler_config.max_num_batched_tokens": "scheduler.max_num_batched_tokens",
        "parallel_config.eplb_config.policy": "parallel.eplb_config.policy",
        "compilation_config.compile_sizes": "compilation.compile_sizes",
        "compilation_config.pass_config.eliminate_noops": "compilation.pass.eliminate_noops",
        "compilation_config.cudagraph_mode": "compilation.cudagraph_mode",
        "lora_config.max_lora_rank": "lora",
        "speculative_config.draft_model_config.max_model_len": "speculative.draft_model.max_model_len",
    }.items():
        assert changed[f"config.{field}"] == [f"config.{named}"]
    assert max(map(len, changed.values())) < 80

    assert sum(name.startswith("hf_config.") for name in changed) > 20
    assert changed["hf_config.num_hidden_layers"] == ["config.model.hf_config.num_hidden_layers"]
    assert (config.compute_hash(), config_factors(config)) == base

    # Values are for people.
    assert table["config.model.hf_config.num_hidden_layers"] == "2"
    assert table["config.model.hf_text_config"] == "same as config.model.hf_config"
    assert table["config.compilation.mode"] == "VLLM_COMPILE"
    assert table["config.scheduler.max_num_batched_tokens"] == "256"
    assert max(map(len, table.values())) <= 300
    assert "s3cret" not in str(table)
    assert "/" not in "".join(table.values()), "a path"


# --- what is not understood


def test_vllms_functions_are_put_back(config: VllmConfig) -> None:
    holders = [utils, hashing, *(module for name, module in sys.modules.items() if name.startswith("vllm.config"))]

    def functions() -> list[Any]:
        return [vars(holder).get(name) for holder in holders for name in ("hash_factors", "safe_hash")]

    before = functions()
    config_factors(config)
    assert functions() == before
    config.model_config.revision = lambda: 1  # type: ignore[assignment]  # which vLLM cannot hash
    with pytest.raises(TypeError, match="revision"):
        config_factors(config)
    assert functions() == before


def test_a_hash_that_is_not_understood_counts_whole(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = VllmConfig.compute_hash
    for other in (lambda self: stock(self)[::-1], lambda self: stock(self) + "z", lambda self: "0"):
        monkeypatch.setattr(VllmConfig, "compute_hash", other)
        assert config_factors(config) == {"config": config.compute_hash()}


def test_parts_that_are_not_understood_count(config: VllmConfig) -> None:
    none = config_factors(config)
    tables = []
    for value in (1, 2):
        config.additional_config = SimpleNamespace(compute_hash=lambda value=value: f"foreign{value}")  # type: ignore[assignment]
        tables.append(config_factors(config))
    assert len(difference(*tables)) == 1
    config.additional_config = {}
    config.ec_transfer_config = ECTransferConfig()  # a digest that is there twice
    assert len(difference(none, config_factors(config))) == 1
    config.ec_transfer_config = None
    config.kv_transfer_config = KVTransferConfig()
    assert difference(none, config_factors(config)) == ["config.kv_transfer"]


# --- the whole key


DEFAULT = made()  # which no test changes


@pytest.fixture(scope="module")
def base() -> dict[str, str]:
    return factors.factors(DEFAULT, MODEL)


def changes(base: dict[str, str], config: VllmConfig = DEFAULT, model: Any = MODEL) -> list[str]:
    """Names of the factors that are others than in `base`."""
    return difference(base, factors.factors(config, model))


def test_what_cannot_change_the_code_does_not_count(
    base: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    factors.prepare()
    assert changes(base) == []
    other = str(tmp_path / "a copy")
    shutil.copytree(LLAMA, other)
    asynchronous, synchronous = made(), made(async_scheduling=False)
    decides = [each.parallel_config.disable_nccl_for_dp_synchronization for each in (asynchronous, synchronous)]
    assert decides == [True, False], "what async_scheduling changes of vLLM's hash"
    for config in (
        made(model=other, tokenizer=LLAMA),
        made(max_logprobs=5, trust_remote_code=True),
        synchronous,
        made(
            seed=7,
            gpu_memory_utilization=0.3,
            served_model_name="x",
            kv_cache_memory_bytes=1 << 28,
            load_format="dummy",
            compilation_config={"cache_dir": other, "debug_dump_path": other},
        ),
    ):
        assert changes(base, config) == []
    assert changes(base, model=torch.nn.Sequential(*MODEL, torch.nn.Linear(4, 4))) == []
    with torch._inductor.config.patch({"cpp.cxx": (None, shutil.which("g++") or "g++")}):
        assert changes(base) == []
    with torch._inductor.config.patch({"cpp.dynamic_threads": True}):  # the configuration overrides it
        assert changes(base) == []
    for name in ("VLLM_CACHE_ROOT", "CUDA_HOME"):
        monkeypatch.setenv(name, other)
    for name in ("VLLM_API_KEY", "HF_TOKEN", "VLLM_IMAGE_TAG"):
        monkeypatch.setenv(name, "s3cret")
    for name in ("VLLM_PORT", "VLLM_NIXL_SIDE_CHANNEL_PORT", "VLLM_DP_RANK", "LOCAL_RANK", "VLLM_COMPILE_WORKERS"):
        monkeypatch.setenv(name, "3")
    for name, value in {
        "VLLM_HOST_IP": "10.0.0.1",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_SYSTEM_START_DATE": "2026-01-01",
    }.items():
        monkeypatch.setenv(name, value)
    assert changes(base) == []


def test_what_changes_the_code_counts_and_is_named(base: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["config.compilation.compile_ranges_endpoints", "config.scheduler.max_num_batched_tokens"]
    passes = {"pass_config": {"eliminate_noops": False}}
    assert changes(base, made(dtype="bfloat16")) == ["config.model.dtype"]
    assert changes(base, made(max_num_batched_tokens=128)) == tokens
    assert changes(base, made(compilation_config={"compile_sizes": [1]})) == ["config.compilation.compile_sizes"]
    assert changes(base, made(compilation_config=passes)) == ["config.compilation.pass.eliminate_noops"]
    assert changes(base, model=torch.nn.ModuleList(MODEL)) == ["class"]
    for name, value in (("VLLM_PP_LAYER_PARTITION", "1,1"), ("ATEN_CPU_CAPABILITY", "avx2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert changes(base) == [f"env.{name}"]
    with torch._inductor.config.patch(max_autotune=True):
        assert changes(base) == ["inductor.max_autotune"]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert changes(base) == ["dynamo.capture_scalar_outputs"]


def test_the_machine_and_what_is_installed_count(base: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    points, sets, flags = machine._entry_points(), machine._instruction_sets(), machine.processor()
    theirs = points | {"theirs": "theirs.plugin:register theirs 1.2"}
    for owner, attribute, value, expected in (
        (machine, "_entry_points", lambda: theirs, "vllm_plugin.theirs"),
        (torch, "__version__", "2.13.1", "torch"),
        (machine, "_instruction_sets", lambda: [*sets, "avx99"], "platform"),
        (machine, "processor", lambda: (*flags, "avx99"), "cpu.avx99"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            assert changes(base) == [expected]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_entry_points", lambda: theirs)
        patch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,lora_hf_hub_resolver")
        assert changes(base) == [], "it is kept out"
        patch.undo()
        patch.setenv("VLLM_PLUGINS", "lora_hf_hub_resolver")
        assert changes(base) == ["vllm_plugin.lora_filesystem_resolver"]
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert changes(base) == ["compiler"]
        assert machine.compiler() == "none"
    nothing = dict.fromkeys(("avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_fp16", "avx2", "bf16"), False)
    known = torch.cpu.get_capabilities() | nothing | {"sve": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert machine.platform().endswith(" cpu")


def test_threads_count_where_they_are_in_the_code(base: dict[str, str]) -> None:
    config, count = made(), torch.get_num_threads()
    config.compilation_config.inductor_compile_config["cpp.dynamic_threads"] = False
    option = "config.compilation.inductor_compile_config.cpp.dynamic_threads"
    assert changes(base, config) == [option, "threads"]
    found = factors.factors(config, MODEL)
    torch.set_num_threads(count + 1)
    assert changes(found, config) == ["threads"]
    assert changes(base) == []
    torch.set_num_threads(count)


def test_what_is_switched_in_torch_counts(base: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(expected: str, *more: str) -> None:
        found = changes(base)
        assert f"state.{expected}" in found
        assert all(name.startswith(("state.", *more)) for name in found)

    for owner, attribute, value, expected in (
        (torch.backends.cudnn, "allow_tf32", False, "backends.cudnn.allow_tf32"),
        (torch.backends.mkldnn, "deterministic", True, "backends.mkldnn.deterministic"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "bf16", "backends.mkldnn.matmul.fp32_precision"),
        (torch.backends, "fp32_precision", "tf32", "backends.fp32_precision"),
        (
            torch.backends.cuda.matmul,
            "allow_fp16_reduced_precision_reduction",
            False,
            "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
        ),
    ):
        old = getattr(owner, attribute)
        setattr(owner, attribute, value)
        check(expected)
        setattr(owner, attribute, old)
    for switch, on, off, expected, *more in (
        (torch.backends.mha.set_fastpath_enabled, False, True, "backends.mha._is_fastpath_enabled"),
        # It also sets an option of Inductor.
        (torch.use_deterministic_algorithms, True, False, "guards.deterministic_algorithms", "inductor."),
        (torch.set_default_dtype, torch.float64, torch.float32, "guards.default_dtype"),
    ):
        switch(on)
        check(expected, *more)
        switch(off)
    with torch.autocast("cpu"):
        check("guards.autocast_state.enabled")
    assert changes(base) == []
    assert not torch.cuda.is_initialized(), "asking for the state has woken a device"


def test_there_is_a_factor_for_each_part(base: dict[str, str]) -> None:
    expected = {"vllm", "torch", "python", "plugin", "transformers", "platform", "compiler", "libc", "passes", "class"}
    assert expected <= base.keys()
    kinds = {"config", "env", "inductor", "functorch", "dynamo", "cpu", "flags"}
    assert {name.partition(".")[0] for name in base} >= kinds
    assert all(isinstance(value, str) for value in base.values())
    assert list(base)[:2] == ["vllm", "torch"], "what explains most comes first"
    assert not any(value.startswith("/") for value in base.values()), "a path"


def test_every_variable_that_vllm_counts_counts_but_for_the_listed_ones(
    base: dict[str, str], config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded = [name.split(".", 1) for name in factors.EXCLUDED]
    known, missed = vllm.envs.compile_factors(), []
    for name in known:
        value = "s3cret" if known[name] != "s3cret" else "another"
        monkeypatch.setattr(vllm.envs, "compile_factors", lambda name=name, value=value: known | {name: value})
        if changes(base, config) != [f"env.{name}"]:
            missed.append(name)
    assert sorted(missed) == sorted(name for layer, name in excluded if layer == "env" and name in known)
    for layer, name in excluded:  # what torch or Python does not have
        if layer in ("dynamo", "inductor"):
            assert name in getattr(torch, f"_{layer}").config.save_config_portable()
        elif layer == "flags":
            assert hasattr(sys.flags, name)
        assert not name.startswith("c.") or hasattr(torch._C, name[2:])


def test_a_gpu_is_its_architecture_and_name_and_needs_no_compiler(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = vllm.platforms.current_platform

    class Platform:
        device_type = "cuda"
        is_cpu = staticmethod(lambda: False)
        is_cuda_alike = staticmethod(lambda: True)
        get_pass_manager_cls = staticmethod(lambda: "tests.process.Outcome")

        def __getattr__(self, name: str) -> Any:
            return getattr(cpu, name)

    monkeypatch.setattr(vllm.platforms, "current_platform", Platform())
    device = SimpleNamespace(major=9, minor=0, name="NVIDIA H100", multi_processor_count=132, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    packages = SimpleNamespace(
        version=lambda name: "3.6.0", PackageNotFoundError=KeyError, entry_points=lambda group: []
    )
    monkeypatch.setitem(machine.version.__globals__, "metadata", packages)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = factors.factors(config, MODEL)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    rocm = factors.factors(config, MODEL)
    assert cuda["platform"].endswith(" cuda sm_90 NVIDIA H100, 132 SMs")
    assert (cuda["cuda"], cuda["triton"]) == ("13.0", "3.6.0")
    assert not {"compiler", "libc", "threads", "cpu.avx2"} & cuda.keys()
    assert cuda["passes"].startswith("tests.process.Outcome ")
    assert len(cuda["passes"].split()) == 3, "another platform's passes have their own sources"
    assert " rocm gfx942 " in rocm["platform"]
    assert rocm["hip"] == "7.1"
