"""What the plugin takes from the installed vLLM and torch, and what vLLM takes from the plugin; no engine is started.

`test_in_vllm` runs these in a fork of a process that has vLLM imported, with the plugin.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
import vllm.envs
from torch._inductor.fx_passes import joint_graph
from vllm.benchmarks import startup
from vllm.compilation import compiler_interface
from vllm.config import CompilationConfig, VllmConfig
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker import gpu_worker

from tests.contract import __main__ as contract
from tests.contract import calls, uses
from vllm_compile_ext import changes, plugin, settings
from vllm_compile_ext.cli import warm_start
from vllm_compile_ext.compilation import backends
from vllm_compile_ext.compilation.rules import why_upstream
from vllm_compile_ext.record import vllm_spans

LLAMA = os.environ["LLAMA"]
VLLM = Path(vllm.__file__).parent


# --- names and calls


def test_everything_vllm_imports_of_the_package_is_served() -> None:
    count, breaches = uses.check(VLLM)
    assert breaches == []
    assert count > 50


def test_a_breach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "set_model_tag", lambda tag: None)
    monkeypatch.setattr(backends.VllmBackend, "__init__", lambda self, vllm_config: None)
    _, found = uses.check(VLLM)
    assert any("set_model_tag: too many positional" in line for line in found)
    assert any("VllmBackend.__init__" in line for line in found)


def test_what_takes_the_place_of_a_function_takes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(contract.replaced_functions()) == []
    monkeypatch.setattr(warm_start, "small_kv_cache", lambda stock: lambda config: stock(config))
    (line,) = contract.replaced_functions()
    assert line.startswith("cli/warm_start.py: vllm.v1.engine.core.get_kv_cache_configs: too many positional")


def test_everything_we_take_of_vllm_and_torch_is_there_and_takes_our_calls() -> None:
    files = sorted(Path(plugin.__file__).parent.rglob("*.py"))
    assert [line for path in files for line in (*calls.missing(path), *calls.bad_calls(path))] == []
    assert sum(len(list(calls.taken(path))) for path in files) > 100


def test_a_call_that_would_not_be_taken_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "from logging import Formatter as F, getLogger\nclass A(F):\n    def __init__(self):\n"
        "        super().__init__(3, 4, 5, 6, 7, 8, 9)\n        super().format(1)\n"
        "getLogger('a', 'b')\nF(fmt=3)\nF(no=3)\n"
    )
    monkeypatch.setattr(calls, "THEIRS", ("logging",))
    found = calls.bad_calls(tmp_path / "a.py")
    assert [line.split(": ")[0].rpartition(":")[2] for line in sorted(found)] == ["4", "6", "8"]


def test_every_row_of_the_table_of_changes_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: list[Any] = []
    monkeypatch.setattr(changes.logger, "debug", lambda *args: skipped.append(args))
    assert changes.problems() == skipped == []


def test_every_span_of_vllm_has_a_phase() -> None:
    found = set()
    for path in VLLM.rglob("*.py"):
        if "instrument(span_name=" in (text := path.read_text(errors="replace")):
            words = [word for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) for word in node.keywords]
            found |= {w.value.value for w in words if w.arg == "span_name" and isinstance(w.value, ast.Constant)}
    assert found - {""} == vllm_spans.PHASES.keys()


# --- which configurations keep upstream's path of compilation

OFF = "torch's compile caches are off (force_disable_caches)"
RULES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"compile_sizes": [1, 8]}, None),
    ({"dynamic_shapes_config": {"type": "unbacked"}}, None),
    ({"dynamic_shapes_config": {"type": "backed_size_oblivious"}}, None),
    ({"inductor_passes": {"post_grad_custom_post_pass": "json.dumps"}}, None),
    ({"mode": 2}, "mode DYNAMO_TRACE_ONCE"),
    ({"VLLM_DISABLE_COMPILE_CACHE": "1"}, "VLLM_DISABLE_COMPILE_CACHE=1"),
    ({"inductor_compile_config": {"force_disable_caches": True}}, OFF),
    ({"torch": {"force_disable_caches": True}}, OFF),
    ({"VLLM_USE_AOT_COMPILE": "0"}, "VLLM_USE_AOT_COMPILE=0"),
    ({"VLLM_USE_MEGA_AOT_ARTIFACT": "0"}, "VLLM_USE_MEGA_AOT_ARTIFACT=0"),
    ({"VLLM_USE_STANDALONE_COMPILE": "0"}, "VLLM_USE_STANDALONE_COMPILE=0"),
    ({"later": {"backend": "eager"}}, "backend 'eager'"),
    (
        {"later": {"use_inductor_graph_partition": True}},
        "use_inductor_graph_partition: Inductor splits the whole graph",
    ),
    ({"later": {"cudagraph_copy_inputs": True}}, "cudagraph_copy_inputs: inputs go through buffers of the whole graph"),
    (
        {"VLLM_USE_BYTECODE_HOOK": "0", "dynamic_shapes_config": {"evaluate_guards": True}},
        "evaluate_guards: every guard of a full trace is wanted",
    ),
]


@pytest.mark.parametrize(("case", "reason"), RULES)
def test_why_a_configuration_keeps_upstreams_path(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], reason: str | None
) -> None:
    options = {"mode": 3} | case
    for name in [name for name in case if name.startswith("VLLM_")]:
        monkeypatch.setenv(name, options.pop(name))
    later, inductor = options.pop("later", {}), options.pop("torch", {})
    config = VllmConfig(compilation_config=CompilationConfig(**options))
    for name, value in later.items():  # what CPU does not leave as it was asked for
        setattr(config.compilation_config, name, value)
    with torch._inductor.config.patch(inductor):
        assert why_upstream(config) == reason


# --- a start


@pytest.mark.parametrize("check", [None, "warn", "error"])
def test_inductors_patterns_are_made_at_start_only_where_syncs_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, check: str | None
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(joint_graph, "lazy_init", lambda input_device=None: made.append(input_device))
    if check:
        monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", check)
    compiler_interface.trigger_inductor_lazy_init("the device")
    assert made == ["the device"] * bool(check)
    assert "trigger_inductor_lazy_init(self.device)" in inspect.getsource(gpu_worker)


@pytest.mark.parametrize(
    "env", [{"VLLM_CACHE_ROOT": "~/a"}, {"VLLM_CACHE_ROOT": None}, {"VLLM_CACHE_ROOT": None, "XDG_CACHE_HOME": "/x"}]
)
def test_the_cache_root_is_vllms(monkeypatch: pytest.MonkeyPatch, env: dict[str, str | None]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    theirs = Path(vllm.envs.environment_variables["VLLM_CACHE_ROOT"]())
    assert settings.cache_root() == theirs.absolute()


# --- ``vllm-compile-ext warm`` and ``bench``


def test_no_option_of_the_commands_is_one_of_serve() -> None:
    serve = ServeSubcommand().subparser_init(FlexibleArgumentParser(prog="vllm").add_subparsers(dest="subparser"))
    options = serve._option_string_actions.keys()
    assert options.isdisjoint({"--runs", "--starts", "--engine", "--json", "--chart", "--limit", "--verbose"})
    assert {"--enforce-eager", "--host", "--port"} <= options


def test_the_function_that_times_an_engine() -> None:
    assert list(inspect.signature(startup.run_startup_in_subprocess).parameters) == ["engine_args", "result_queue"]
    source = inspect.getsource(startup.run_startup_in_subprocess)
    for name in ("total_startup_time", "compilation_time", "encoder_compilation_time"):
        assert f'"{name}"' in source


def test_the_options_of_serve_are_taken_and_nothing_that_is_left_out_changes_the_key() -> None:
    server = ["--port", "80", "--api-key", "x", "--ssl-keyfile", "k", "--max-model-len", "256"]
    weights = ["--load-format", "safetensors", "--model-loader-extra-config", '{"enable_multithread_load": true}']
    args = warm_start.parse([LLAMA, *server, *weights, "--num-gpu-blocks-override", "3"])
    assert (args.model, args.port, args.max_model_len) == (LLAMA, 80, 256)
    config = warm_start.configure(args)
    key = config.compute_hash()
    warm_start.lighten(config)
    assert config.compute_hash() == key
    assert (config.load_config.load_format, config.load_config.model_loader_extra_config) == ("dummy", {})
    assert (config.model_config.skip_tokenizer_init, config.cache_config.num_gpu_blocks_override) == (True, None)


@pytest.mark.parametrize(
    ("options", "env", "why"),
    [
        ([], {}, None),
        (["--enforce-eager"], {}, "--enforce-eager"),
        (["--headless"], {}, "a part of an engine"),
        (["ray"], {}, "--distributed-executor-backend ray"),
        ([], {"VLLM_DISABLE_COMPILE_CACHE": "1"}, "VLLM_DISABLE_COMPILE_CACHE=1"),
        ([], {"VLLM_USE_AOT_COMPILE": "0"}, "VLLM_USE_AOT_COMPILE=0"),
        ([], {"VLLM_USE_MEGA_AOT_ARTIFACT": "0"}, "keeps it in its own cache: VLLM_USE_MEGA_AOT_ARTIFACT=0"),
        ([], {"VLLM_COMPILE_STORE": "a store that others can write"}, "chmod"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], env: dict[str, str], why: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if store := env.get("VLLM_COMPILE_STORE"):
        Path(store).mkdir()
        Path(store).chmod(0o777)
    backend = options == ["ray"] and options.pop()

    def check() -> None:
        args = warm_start.parse([LLAMA, *options])
        warm_start.check_plugin()
        config = warm_start.configure(args)
        if backend:
            config.parallel_config.distributed_executor_backend = backend  # which need not be installed
        warm_start.check_config(config, args)

    if why is None:
        check()
    else:
        with pytest.raises(warm_start.RefusedError) as refused:
            check()
        assert why in str(refused.value)


def test_a_bad_option_gives_vllms_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["warm", "m", "--no-such-option", "3"])
    with pytest.raises(SystemExit, match="2"):
        warm_start.main()
    output = capsys.readouterr().err
    assert "usage: vllm" in output
    assert "vllm: error: unrecognized arguments: --no-such-option 3" in output


@pytest.mark.parametrize(
    ("status", "why"), [(None, "VLLM_PLUGINS"), (SimpleNamespace(active=False, line="is off (because)"), "(because)")]
)
def test_a_plugin_that_is_off_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Any, why: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["warm", "m"])
    monkeypatch.setattr(plugin, "status", lambda: status)
    assert warm_start.main() == warm_start.REFUSED
    assert why in capsys.readouterr().out.partition("refused: ")[2]
