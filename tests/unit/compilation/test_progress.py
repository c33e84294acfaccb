"""The bar of a cold compilation: on a terminal that sees INFO, and nowhere else."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from vllm_compile_ext.compilation import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    before = progress.logger.level
    progress.logger.setLevel(logging.INFO)
    yield
    progress.logger.setLevel(before)


def painted(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, fail: bool = False) -> str:
    """What a compilation of three distinct pieces of 161 writes to `stream`, standard error."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "120")
    try:
        with progress.Progress("[backbone] compiling", 3, 161) as bar:
            for _ in range(3):
                bar.advance()
                if fail:
                    raise ZeroDivisionError
            bar.phase("waiting for kernels")
    except ZeroDivisionError:
        pass
    return stream.getvalue()


def test_a_terminal_sees_done_distinct_total_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = painted(Terminal(), monkeypatch).split("\r")
    assert any("[backbone] compiling 3 distinct of 161 pieces" in f and "0/3" in f and "lowering" in f for f in frames)
    assert any("3/3" in f and "waiting for kernels" in f for f in frames)
    assert frames[-1].strip() == "", "the bar goes when the work is done"


def test_the_bar_goes_when_a_piece_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert painted(Terminal(), monkeypatch, fail=True).split("\r")[-1].strip() == ""


def test_a_log_file_sees_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert painted(io.StringIO(), monkeypatch) == ""


def test_hidden_info_hides_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    progress.logger.setLevel(logging.WARNING)
    assert painted(Terminal(), monkeypatch) == ""
