"""Bytecode that is kept where there is none beside a module: used, checked, private."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
sys.path.insert(0, sys.argv[2])
from vllm_compile_ext.early import begin
begin()
compiled = []
sys.addaudithook(lambda event, args: compiled.append(args[1]) if event == "compile" and args[0] is not None else None)
import a_module
print(a_module.WHAT, a_module.__cached__, any("a_module" in str(name) for name in compiled))
"""


class Case:
    """A module in a folder of its own, and a cache root."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.root = tmp_path / "modules", tmp_path / "cache"
        self.folder.mkdir()
        self.source = self.folder / "a_module.py"
        self.source.write_text("WHAT = 1\n")

    def run(self, **env: str) -> tuple[str, Path, bool]:
        """What the module says, where its bytecode is looked for, and whether it was compiled."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTHONDONT"))}
        env = {"PYTHONDONTWRITEBYTECODE": "1", "VLLM_COMPILE_PYCACHE": "1", "VLLM_CACHE_ROOT": str(self.root)} | env
        done = subprocess.run(
            [sys.executable, "-c", CODE, "vllm", str(self.folder)],
            env=environ | env,
            capture_output=True,
            text=True,
            check=True,
        )
        what, where, compiled = done.stdout.split()
        return what, Path(where), compiled == "True"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_it_is_compiled_once(case: Case) -> None:
    what, where, compiled = case.run()
    assert (what, compiled) == ("1", True)
    assert where.is_relative_to(case.root / "compile_pycache")
    assert where.exists()
    assert case.run() == ("1", where, False)
    assert [*case.folder.iterdir()] == [case.source]


def test_a_source_that_changed_is_compiled(case: Case) -> None:
    case.run()
    case.source.write_text("WHAT = 'another'\n")
    assert case.run()[::2] == ("another", True)
    assert case.run()[::2] == ("another", False)


def test_bytecode_of_another_python_is_not_read(case: Case) -> None:
    _, where, _ = case.run()
    where.write_bytes(b"else" + where.read_bytes()[4:])
    assert case.run()[::2] == ("1", True)


def test_what_is_beside_the_module_is_used(case: Case) -> None:
    environ = {"PYTHONDONTWRITEBYTECODE": ""}
    _, where, compiled = case.run(**environ)
    assert compiled
    assert where.is_relative_to(case.folder)
    assert case.run() == ("1", where, False)
    assert not [*case.root.rglob("*.pyc")]


@pytest.mark.parametrize("env", [{"VLLM_COMPILE_PYCACHE": "0"}, {"VLLM_COMPILE_EXT": "0"}, {"VLLM_PLUGINS": "others"}])
def test_it_is_by_choice(case: Case, env: dict[str, str]) -> None:
    for _ in range(2):
        assert case.run(**env)[2]
    assert not [*case.root.rglob("*.pyc")]


def test_a_folder_of_others_is_not_used(case: Case) -> None:
    (case.root / "compile_pycache").mkdir(parents=True)
    (case.root / "compile_pycache").chmod(0o770)
    for _ in range(2):
        assert case.run()[2]
    assert not [*case.root.rglob("*.pyc")]
