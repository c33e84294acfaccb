from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vllm_compile_ext.record import bytecode


@pytest.mark.parametrize("writes", [True, False])
def test_modules_without_bytecode_are_told_of(writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "dont_write_bytecode", not writes)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = bytecode.missing()
    names = [f"without_bytecode_{number}" for number in range(2 * len(sys.modules))]
    for name in names:
        (tmp_path / f"{name}.py").write_text("")
        importlib.import_module(name)
    told = bytecode.missing()
    if writes:
        assert told is None
        return
    assert told is not None
    without, modules = int(told.split()[0]), int(told.split()[2])
    assert without >= len(names)
    assert modules > without
    assert before is None or int(before.split()[0]) < without
