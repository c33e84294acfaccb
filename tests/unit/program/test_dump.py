from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from vllm_compile_ext.program import dump


def add(a: int, b: int) -> int:
    return a + b


def write_back(module: dict[str, int], value: int) -> None:
    module.update(buffer=value)


@pytest.fixture
def no_depyf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depyf", None)  # importing it now fails


@pytest.mark.usefixtures("no_depyf")
def test_off_leaves_a_notice_and_does_not_decompile(tmp_path: Path) -> None:
    dump.write([tmp_path], "Model.forward", add.__code__, decompiled=False)
    lines = (tmp_path / "transformed_code.py").read_text().splitlines()
    assert any("VLLM_COMPILE_DEPYF=1" in line for line in lines)
    assert all(line.startswith("#") for line in lines)


def test_every_callable_has_a_section_in_every_folder_and_replaces_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "cache", tmp_path / "debug"]
    paths = [folder / dump.FILE for folder in folders]
    dump.write(folders, "Model.forward [backbone]", add.__code__, decompiled=False)
    for name, function in (("Model [backbone]", add), ("Head [eagle]", write_back), ("Model [backbone]", add)):
        dump.write(folders, name, function.__code__, decompiled=True)
    for path in paths:
        text = path.read_text()
        compile(text, str(path), "exec")
        assert (text.count("Model [backbone]"), text.count("Head [eagle]"), text.count("return a + b")) == (1, 1, 1)
        assert dump.NOTICE not in text
    dump.write(folders, "Model [backbone]", add.__code__, decompiled=False)
    assert [path.read_text() for path in paths] == [text, text]


@pytest.mark.usefixtures("no_depyf")
def test_a_decompiler_failure_is_a_warning_and_leaves_the_disassembly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        dump.write([tmp_path], "f", add.__code__, decompiled=True)
    assert "cannot decompile add" in caplog.text
    text = (tmp_path / dump.FILE).read_text()
    assert "BINARY_OP" in text
    assert all(line.startswith("#") for line in text.splitlines() if line)


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        dump.write([tmp_path / "file", tmp_path / "fine"], "f", add.__code__, decompiled=False)
    assert (tmp_path / "fine" / dump.FILE).exists()
    assert len(caplog.records) == 1


def test_a_file_that_is_no_text_and_one_that_is_a_link_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"\xc3")  # a letter that was cut
    (tmp_path / dump.FILE).symlink_to("elsewhere")
    dump.write([tmp_path], "f", add.__code__, decompiled=True)
    assert "return a + b" in (tmp_path / dump.FILE).read_text()
    assert (tmp_path / "elsewhere").read_bytes() == b"\xc3"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("there", [True, False])
def test_an_assigned_buffer_is_an_error_worded_with_the_code(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if not there:
        monkeypatch.setitem(sys.modules, "depyf", None)
    dump.forbid_buffer_assignment(add.__code__)
    with pytest.raises(RuntimeError, match=r"write_back assigns a buffer.*(?s:.*)update"):
        dump.forbid_buffer_assignment(write_back.__code__)
