"""`vllm-compile-ext ops` says what an engine runs, and VLLM_COMPILE_CUSTOM_OPS=auto has it run what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from tests import engine, process
from vllm_compile_ext.cli import app, ops
from vllm_compile_ext.ops import auto

pytestmark = pytest.mark.engine

OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "256"]
RUNS = """
from vllm.model_executor.custom_op import CustomOp
def runs(model):
    return {m.name: m._forward_method.__name__ for m in model.modules() if isinstance(m, CustomOp)}
(extra["runs"],) = llm.apply_model(runs)
extra["custom_ops"] = config.custom_ops
"""


def ask(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["ops", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ops, "BUSY", 101)  # other tests run
    for name, value in process.environment(VLLM_CACHE_ROOT=str(tmp_path / "cache")).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def test_from_the_measurement_to_the_engine(llama2: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(str(llama2), *OPTIONS, "--measure")
    rows = {row["name"]: row for row in found["ops"] if row["used"]}
    assert {name: (row["runs"], row["rule"]) for name, row in rows.items()} == dict.fromkeys(
        ("rms_norm", "rotary_embedding", "silu_and_mul"), ("compiled", "none")
    )
    assert found["problem"] is None
    shapes = {call["name"]: call["shapes"] for call in found["calls"] if call["name"] != "rms_norm"}
    assert "[n] int64" in shapes["rotary_embedding"]
    figures = {call["name"]: call["figures"] for call in found["calls"] if "figures" in call}
    assert figures.keys() == {"rotary_embedding", "silu_and_mul"}  # norms have no kernel on CPU
    for each in figures.values():
        assert [row["tokens"] for row in each] == [1, 8, 64, 512]
        assert max(row["error"] for row in each) < auto.ROUNDING
    store = cache / "compile_store"
    kept = auto.kept(store, found["measured"]["key"])
    assert kept == msgspec.convert(found["measured"], auto.Measured)
    # Which is faster here is not what this is about.
    auto.keep(store, auto.Measured(kept.key, kept.factors, ["+rotary_embedding"]))

    stock = engine.run(llama2, cache, after=RUNS)
    assert stock.extra["custom_ops"] == found["custom_ops"] == ["none"]
    assert {*stock.extra["runs"].values()} == {"forward_native"}
    measured = engine.run(llama2, cache, after=RUNS, VLLM_COMPILE_CUSTOM_OPS="auto")
    assert measured.output.lines("custom_ops, as measured: +rotary_embedding")
    assert measured.extra["custom_ops"] == ["none", "+rotary_embedding"]
    assert measured.extra["runs"] == stock.extra["runs"] | {"rotary_embedding": "forward_cpu"}
    assert measured.tokens == stock.tokens
    monkeypatch.setenv("VLLM_COMPILE_CUSTOM_OPS", "auto")
    again = ask(str(llama2), *OPTIONS)
    assert {row["name"]: (row["runs"], row["rule"]) for row in again["ops"] if row["used"]} == {
        "rms_norm": ("compiled", "none"),
        "rotary_embedding": ("kernel", "+rotary_embedding"),
        "silu_and_mul": ("compiled", "none"),
    }


def test_the_command(llama2: Path, cache: Path) -> None:
    done = CliRunner().invoke(app, ["ops", str(llama2), "--enforce-eager"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "vLLM's kernel (cpu)" in done.output  # rotary_embedding
    assert "PyTorch, as it is" in done.output  # rms_norm, which has none on CPU
    assert "custom_ops: all" in done.output
    every = ask()  # without a model
    assert {"rms_norm", "gelu", "quant_fp8"} <= {row["name"] for row in every["ops"]}
    assert every["calls"] == []
    done = CliRunner().invoke(app, ["ops", "--measure"])
    assert done.exit_code == 2
    assert "name a model" in done.output
    done = CliRunner().invoke(app, ["ops", str(llama2), "--no-such-option"])
    assert done.exit_code == 2
    assert "--no-such-option" in done.output
