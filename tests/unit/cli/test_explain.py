"""The table of `vllm-compile-ext explain MODEL --levels`, without vLLM."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from vllm_compile_ext.cli import app, explain


def resolved(level: str) -> explain.Resolved:
    def row(name: str, value: str, *, in_key: bool) -> explain.Setting:
        return {"name": name, "value": value, "source": level, "where": "", "asked": None, "in_key": in_key}

    compiles = level != "-O0"
    rows = [
        row("mode", "VLLM_COMPILE" if compiles else "NONE", in_key=compiles),
        row("custom_ops", "['none']", in_key=True),
    ]
    return rows, {"code kept": None if compiles else "mode NONE"}


def test_it_has_what_differs_and_why_something_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def resolve(arguments: list[str], added: list[list[str]], verbose: bool) -> list[explain.Resolved]:
        asked.append((arguments, added))
        return [resolved(level) for (level,) in added]

    monkeypatch.setattr(explain, "resolve", resolve)
    done = CliRunner().invoke(app, ["explain", "MODEL", "--dtype", "float32", "--levels", "--markdown"])
    assert asked == [(["MODEL", "--dtype", "float32"], [["-O0"], ["-O1"], ["-O2"], ["-O3"]])]
    lines = [line.split() for line in done.output.splitlines() if line.startswith("|")]
    compile_ = "| VLLM_COMPILE"
    assert [" ".join(line) for line in lines if "---" not in line[0]] == [
        "| setting | -O0 | -O1 | -O2 | -O3 | code |",
        f"| mode | NONE {compile_} {compile_} {compile_} | its own |",
        "| code kept | no: mode NONE | yes | yes | yes | |",
    ]
