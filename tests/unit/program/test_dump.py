import logging
import sys
from pathlib import Path
from types import CodeType

import pytest

from vllm_compile_ext.program import buffers, dump


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
    (path,) = dump.write([tmp_path], "Model.forward", CODE, decompile=False)
    assert path == tmp_path / "transformed_code.py"
    assert "VLLM_COMPILE_DEPYF=1" in path.read_text()
    assert all(line.startswith("#") for line in path.read_text().splitlines())


def test_on_holds_the_source_in_every_folder(tmp_path: Path) -> None:
    for path in dump.write([tmp_path / "cache", tmp_path / "debug"], "Model.forward", CODE, decompile=True):
        assert "return a + b" in path.read_text()
        compile(path.read_text(), str(path), "exec")
    assert (tmp_path / "debug" / "transformed_code.py").exists()


def test_every_callable_has_a_section_and_a_second_dump_replaces_its_own(tmp_path: Path) -> None:
    dump.write([tmp_path], "Model.forward [backbone]", CODE, decompile=True)
    dump.write([tmp_path], "Head.forward [eagle_head]", write_back.__code__, decompile=True)
    (path,) = dump.write([tmp_path], "Model.forward [backbone]", CODE, decompile=True)
    text = path.read_text()
    assert text.count("Model.forward [backbone]") == 1
    assert text.count("Head.forward [eagle_head]") == 1
    assert "return a + b" in text
    assert "update" in text


def test_on_replaces_the_notice_and_off_keeps_the_source(tmp_path: Path) -> None:
    dump.write([tmp_path], "f", CODE, decompile=False)
    (path,) = dump.write([tmp_path], "f", CODE, decompile=True)
    assert dump.NOTICE not in path.read_text()
    assert dump.write([tmp_path], "f", CODE, decompile=False) == []
    assert "return a + b" in path.read_text()


@pytest.mark.usefixtures("no_depyf")
def test_a_decompiler_failure_is_a_warning_and_leaves_the_disassembly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        (path,) = dump.write([tmp_path], "f", CODE, decompile=True)
    assert "cannot decompile add" in caplog.text
    assert "BINARY_OP" in path.read_text()
    assert all(line.startswith("#") for line in path.read_text().splitlines() if line)


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="vllm_compile_ext"):
        written = dump.write([tmp_path / "file", tmp_path / "fine"], "f", CODE, decompile=False)
    assert written == [tmp_path / "fine" / "transformed_code.py"]
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("no_depyf")
def test_buffer_check_passes_from_names_alone() -> None:
    buffers.forbid(CODE)


def test_buffer_check_words_its_error_with_the_decompiled_code() -> None:
    with pytest.raises(RuntimeError, match=r"write_back assigns a buffer.*(?s:.*)update\("):
        buffers.forbid(write_back.__code__)


@pytest.mark.usefixtures("no_depyf")
def test_buffer_check_still_forbids_when_the_decompiler_fails() -> None:
    with pytest.raises(RuntimeError, match="assigns a buffer"):
        buffers.forbid(write_back.__code__)
