"""Tests of the installed vLLM that run in forks of a process that has it imported, with the plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.process import Started, finish, start

CODE = """
    import pytest
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    sys.exit(pytest.main([*options, "--basetemp", "tests", *sys.argv[1:]]))
"""


def begin(name: str, folder: Path, **env: str) -> Started:
    return start(CODE, folder, str(Path(__file__).with_name(name)), fork=True, **env)


def end(started: Started, folder: Path) -> None:
    outcome = finish(started, folder)
    assert outcome.code == 0, outcome.output


@pytest.mark.parametrize(
    "name",
    ["with_vllm.py", "factors_of_vllm.py", "graphs_on_demand.py", "ops_dispatch.py", "ops_model.py", "ops_native.py"],
)
def test_in_a_fork(llama2: Path, tmp_path: Path, name: str) -> None:
    end(begin(name, tmp_path, LLAMA=str(llama2)), tmp_path)


def test_on_two_ranks(tmp_path: Path) -> None:
    meet = str(tmp_path / "meet")
    started = [begin("two_ranks.py", tmp_path / rank, RANK=rank, MEET=meet) for rank in "01"]
    for rank, one in zip("01", started, strict=True):
        end(one, tmp_path / rank)
