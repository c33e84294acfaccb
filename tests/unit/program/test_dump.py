import logging
import sys
from pathlib import Path
from types import CodeType

import pytest

from vllm_compile_ext.program import dump


def add(a: int, b: int) -> int:
    return a + b


def write_back(module: dict[str, int], value: int) -> None:
    module.update(buffer=value)


CODE: CodeType = add.__code__


@pytest.fixture
def no_depyf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depyf", None)  # importing it now fails


@pytest.mark.usefixtures("no_depyf")
def test_off_leaves_a_notice_and_does_not_decompile(tmp_path: Path) -> None:
    (path,) = dump.write([tmp_path], "Model.forward", CODE, decompiled=False)
    assert path == tmp_path / "transformed_code.py"
    assert "VLLM_COMPILE_DEPYF=1" in path.read_text()
    assert all(line.startswith("#") for line in path.read_text().splitlines())


def test_every_callable_has_a_section_in_every_folder_and_replaces_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "cache", tmp_path / "debug"]
    dump.write(folders, "Model.forward [backbone]", CODE, decompiled=False)
    for name, code in (("Model [backbone]", CODE), ("Head [eagle]", write_back.__code__), ("Model [backbone]", CODE)):
        written = dump.write(folders, name, code, decompiled=True)
    assert [path.parent for path in written] == folders
    for path in written:
        text = path.read_text()
        compile(text, str(path), "exec")
        assert (text.count("Model [backbone]"), text.count("Head [eagle]"), text.count("return a + b")) == (1, 1, 1)
        assert dump.NOTICE not in text
    assert dump.write(folders, "Model [backbone]", CODE, decompiled=False) == []
    assert written[0].read_text() == text
    assert sorted(tmp_path.rglob("*.*")) == sorted(written), "nothing else is left"


@pytest.mark.usefixtures("no_depyf")
def test_a_decompiler_failure_is_a_warning_and_leaves_the_disassembly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        (path,) = dump.write([tmp_path], "f", CODE, decompiled=True)
    assert "cannot decompile add" in caplog.text
    assert "BINARY_OP" in path.read_text()
    assert all(line.startswith("#") for line in path.read_text().splitlines() if line)


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        written = dump.write([tmp_path / "file", tmp_path / "fine"], "f", CODE, decompiled=False)
    assert written == [tmp_path / "fine" / "transformed_code.py"]
    assert len(caplog.records) == 1


def test_an_assigned_buffer_is_an_error_worded_with_the_decompiled_code() -> None:
    dump.forbid_buffer_assignment(CODE)
    with pytest.raises(RuntimeError, match=r"write_back assigns a buffer.*(?s:.*)update\("):
        dump.forbid_buffer_assignment(write_back.__code__)


@pytest.mark.usefixtures("no_depyf")
def test_an_assigned_buffer_is_an_error_without_the_decompiler() -> None:
    dump.forbid_buffer_assignment(CODE)
    with pytest.raises(RuntimeError, match="assigns a buffer"):
        dump.forbid_buffer_assignment(write_back.__code__)
