"""The record switched off, and dropped where the plugin does not take over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import process

CODE = """
    import os
    sys.orig_argv = [*sys.orig_argv, "vllm"]
    exec(open({pth!r}).read())
    import vllm.tracing
    from vllm_compile_ext import compat, plugin
    if {unsupported}:
        compat.VLLM = ">99"
    plugin.register()
    from vllm.engine.arg_utils import EngineArgs
    report(dict(
        active=plugin.status().active,
        recorder="vllm_compile_ext.record.recorder" in sys.modules,
        finders=[type(finder).__name__ for finder in sys.meta_path if type(finder).__name__ == "Observer"],
        trace=type(vllm.tracing.otel.trace).__name__,
        traceparent=os.environ.get("traceparent"),
        hooked=hasattr(EngineArgs.create_engine_config, "__wrapped__"),
    ))
"""
STOCK: dict[str, Any] = {"finders": [], "trace": "module", "traceparent": None, "hooked": False}


def run(folder: Path, *, unsupported: bool = False, **env: str) -> dict[str, Any]:
    code = CODE.format(pth=str(process.ROOT / "vllm_compile_ext.pth"), unsupported=unsupported)
    outcome = process.run(code, folder=folder, VLLM_CACHE_ROOT=str(folder / "cache"), **env)
    assert outcome.code == 0, outcome.output
    assert not list((folder / "cache").glob("compile_starts"))
    assert isinstance(outcome.value, dict)
    return outcome.value


@pytest.mark.parametrize("name", ["VLLM_COMPILE_EXT", "VLLM_COMPILE_STARTS"])
def test_switched_off(tmp_path: Path, name: str) -> None:
    active = name == "VLLM_COMPILE_STARTS"
    assert run(tmp_path, **{name: "0"}) == STOCK | {"active": active, "recorder": False}


def test_dropped_where_the_plugin_does_not_take_over(tmp_path: Path) -> None:
    assert run(tmp_path, unsupported=True) == STOCK | {"active": False, "recorder": True}
