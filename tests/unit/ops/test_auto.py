"""Which ops run their kernels, by what was measured: chosen, kept, and applied."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext.ops import auto
from vllm_compile_ext.ops.auto import Measured


def rows(*times: tuple[float, float, float], error: float = 0.0) -> list[Any]:
    return [SimpleNamespace(kernel=k, native=n, compiled=c, error=error) for k, n, c in times]


FAST, SLOW, MIXED = rows((1, 2, 2), (1, 3, 2)), rows((2, 1, 1), (3, 1, 1)), rows((1, 2, 2), (2, 1, 1))
NONE, ALL = ["none"], ["all"]


@pytest.mark.parametrize(
    ("found", "custom_ops", "compiled", "choice"),
    [
        (FAST, NONE, True, ["+op"]),
        (FAST, ALL, True, []),  # it runs already
        (SLOW, ALL, False, ["-op"]),
        (SLOW, NONE, True, []),
        (MIXED, NONE, True, []),  # not in every batch
        (MIXED, ALL, False, []),
        (rows((1, 1.04, 1.04)), NONE, True, []),  # by too little
        (rows((1, 2, 0.5)), NONE, True, []),  # the compiled form is what would run
        (rows((1, 2, 0.5)), NONE, False, ["+op"]),
        (rows((1, 2, 2), error=0.5), NONE, True, []),  # wrong, however fast
        (rows((1, 2, 2), error=0.5), ALL, False, ["-op"]),
        (rows((1, 2, 2), error=float("nan")), NONE, True, []),
        (rows((1, 2, 2), error=float("nan")), ALL, False, ["-op"]),
        ([], ALL, False, []),  # it could not be measured
        (FAST, ["none", "-op"], True, []),  # somebody has said so
        (SLOW, ["all", "+op"], True, []),
    ],
)
def test_what_is_chosen(found: list[Any], custom_ops: list[str], compiled: bool, choice: list[str]) -> None:
    assert auto.choose("op", found, custom_ops, compiled) == choice


def measured(*choice: str, key: str = "a" * 64) -> Measured:
    return Measured(key, {"model": "m"}, list(choice))


def test_it_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert auto.kept(root, "a" * 64) is None
    auto.keep(root, measured("+silu_and_mul"))
    auto.keep(root, measured("-gelu", key="b" * 64))
    assert auto.kept(root, "a" * 64) == measured("+silu_and_mul")
    file = next(root.rglob(f"{'a' * 64}.json"))
    file.write_bytes(file.read_bytes().replace(b"+silu", b"-silu"))
    assert auto.kept(root, "a" * 64) is None  # its seal is broken
    next(root.rglob(f"{'b' * 64}.json")).rename(file)
    assert auto.kept(root, "a" * 64) is None  # that of another


class Resolve:
    """`EngineArgs.create_engine_config` and its arguments."""

    def __init__(self, *asked: str, base: str = "none", passes: dict[str, Any] | None = None, **ours: str) -> None:
        self.compilation_config = SimpleNamespace(custom_ops=list(asked))
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(
                custom_ops=[*asked, *[base] * (not {*asked} & {"all", "none"}), "+quant_fp8"],
                pass_config=SimpleNamespace(**(passes or {})),
            ),
            model_config=SimpleNamespace(),
            additional_config={"compile_ext": ours},
        )

    def __call__(self) -> list[str]:
        created = auto.create_engine_config(lambda arguments: arguments.config)(self)
        assert created is self.config
        found: list[str] = created.compilation_config.custom_ops
        return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(auto, "factors", lambda config: {"model": "m"})
    return tmp_path / "store"


def test_it_is_applied(store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_compile_ext")
    key = auto.key_of({"model": "m"})
    auto.keep(store, Measured(key, {"model": "m"}, ["+rotary_embedding", "+quant_fp8", "-gelu"]))
    assert Resolve()() == ["none", "+quant_fp8"]  # off by default
    assert not caplog.records
    assert Resolve(custom_ops="auto")() == ["none", "+quant_fp8", "+rotary_embedding", "-gelu"]  # for one engine
    monkeypatch.setenv("VLLM_COMPILE_CUSTOM_OPS", "auto")
    assert Resolve()() == ["none", "+quant_fp8", "+rotary_embedding", "-gelu"]
    assert "custom_ops, as measured: +rotary_embedding +quant_fp8 -gelu" in caplog.text
    # With a pass of vLLM's that may look for a kernel, none is switched off.
    fuses: dict[str, Any] = {"fuse_norm_quant": True, "eliminate_noops": True}
    assert Resolve(passes=fuses)() == ["none", "+quant_fp8", "+rotary_embedding"]
    assert Resolve(passes={"fuse_norm_quant": False, "eliminate_noops": True})()[-1] == "-gelu"


def test_the_user_wins(store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_compile_ext")
    monkeypatch.setenv("VLLM_COMPILE_CUSTOM_OPS", "auto")
    auto.keep(store, Measured(auto.key_of({"model": "m"}), {"model": "m"}, ["+rotary_embedding"]))
    assert Resolve("none", "+gelu")() == ["none", "+gelu", "+quant_fp8"]
    assert "custom_ops are the user's" in caplog.text


def test_without_a_measurement_a_line_says_how_to_make_one(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm_compile_ext")
    monkeypatch.setenv("VLLM_COMPILE_CUSTOM_OPS", "auto")
    assert Resolve()() == ["none", "+quant_fp8"]
    assert "vllm-compile-ext ops MODEL --measure" in caplog.text
