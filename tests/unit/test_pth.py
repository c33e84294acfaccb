"""The .pth file, as Python runs it: never a word, whatever is wrong, and nothing in a Python that is not vLLM's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from tests import process
from vllm_compile_ext import early

PTH = process.ROOT / "vllm_compile_ext.pth"
# -S leaves out the environment's own site folder, which may have the file as well.
SITE = "import sys\n{before}\nimport site; site.addsitedir({folder!r})\n{after}"
STARTED = "print('vllm_compile_ext.finder' in sys.modules)"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the file and the part of the package that it needs."""
    shutil.copy(PTH, tmp_path)
    package = tmp_path / "vllm_compile_ext"
    for name in (
        *("__init__.py", "early.py", "finder.py", "pycache.py", "zygote/__init__.py", "zygote/reads.py"),
        *("standby/__init__.py", "standby/place.py"),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(process.ROOT / "vllm_compile_ext" / name, package / name)
    return tmp_path


def python(site: Path, *flags: str, before: str = "", after: str = STARTED, **env: str) -> str:
    """What a Python for vLLM says to stdout; to stderr it must say nothing."""
    code = SITE.format(folder=str(site), before=before, after=after)
    whole = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "_VLLM_", "PYTHON"))} | env
    done = subprocess.run(
        [sys.executable, "-S", *flags, "-c", code, "vllm", "serve"],
        capture_output=True,
        text=True,
        env=whole,
        cwd=site.parent,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.parametrize("flags", [(), ("-E",), ("-I",), ("-O",), ("-OO",), ("-I", "-O"), ("-X", "dev")])
def test_it_watches_vllm(site: Path, flags: tuple[str, ...]) -> None:
    assert python(site, *flags) == "True"


# File of the package, and what is in it; None: it is gone.
BROKEN = {
    "no package": ("", None),
    "no finder": ("finder.py", None),
    "no zygote": ("zygote", None),
    "no begin": ("early.py", ""),
    "no syntax": ("finder.py", "def"),
    "not text": ("finder.py", "\udcff\0"),
    "import fails": ("__init__.py", "import no_such_module_at_all"),
    "import ends": ("__init__.py", "raise SystemExit(3)"),
    "begin fails": ("early.py", "def begin(): 1 / 0"),
    "begin ends": ("early.py", "def begin(): raise SystemExit('no')"),
    "begin is none": ("early.py", "begin = None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_no_matter(site: Path, name: str) -> None:
    file, text = BROKEN[name]
    path = site / "vllm_compile_ext" / file
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert python(site, "-I", after="print('on')") == "on"


def test_a_hook_that_fails_later_is_no_matter(site: Path) -> None:
    """What records a start is gone: only the beginning is there."""
    fake = site / "vllm" / "tracing"
    fake.mkdir(parents=True)
    for name in (site / "vllm", fake):
        (name / "__init__.py").write_text("")
    (fake / "otel.py").write_text("")
    assert python(site, "-I", after="import vllm.tracing.otel; print('on')") == "on"


@pytest.mark.parametrize(
    ("line", "env", "started"),
    [
        *((odd, {}, False) for odd in ("del sys.orig_argv", "sys.orig_argv = None", "sys.orig_argv = []")),
        ("del sys.orig_argv", {"VLLM_COMPILE_STARTS": "1"}, True),
        ("sys.orig_argv = ['/opt/vllm/bin/python', 'x.py']", {}, False),  # an interpreter in a folder of that name
        ("sys.orig_argv = ['/opt/vllm/bin/python']", {}, False),
        # Arguments that are no strings.
        *((f"sys.orig_argv = ['python', {odd}]", {}, "vllm" in odd) for odd in ("b'vllm'", "3, 'vllm'", "None")),
        ("sys.orig_argv = ['python', '\\udcff vllm']", {}, True),
    ],
)
def test_it_looks_at_the_command_line(site: Path, line: str, env: dict[str, str], started: bool) -> None:
    assert python(site, before=line, **env) == str(started)


def test_nothing_is_imported_in_another_python(site: Path) -> None:
    before = "sys.orig_argv = ['python', 'x.py']; import site; was = set(sys.modules)"
    assert python(site, before=before, after="print(sorted(set(sys.modules) - was))") == "[]"


@pytest.mark.parametrize(
    "off",
    [{"VLLM_COMPILE_EXT": "0"}, {"VLLM_PLUGINS": "0"}, {"VLLM_COMPILE_STARTS": "0", "VLLM_COMPILE_FORK": "0"}],
    ids=" ".join,
)
def test_it_watches_nothing_where_that_is_off(site: Path, off: dict[str, str]) -> None:
    look = "import os; finder = sys.modules['vllm_compile_ext.finder'].finder; print(finder in sys.meta_path, end=' ')"
    look += "; print(type(os.environ).__getitem__.__module__)"
    assert python(site, after=look) == "True vllm_compile_ext.zygote.reads"
    assert python(site, after=look, **off) == "False os"


def test_it_costs_nothing_in_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.07 ms where a Python takes 10 to start; least of many, since other processes can only add."""
    for name in ("VLLM_COMPILE_STARTS", "_VLLM_COMPILE_EXT_START"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", "--option", "y" * 1000])
    (line,) = PTH.read_text().splitlines()
    assert min(timeit.repeat(lambda: exec(line, {}), number=1, repeat=200)) < 0.001


@pytest.mark.parametrize(
    ("env", "off"),
    [
        ({}, False),
        ({"VLLM_COMPILE_EXT": "0"}, True),
        ({"VLLM_COMPILE_EXT": "off"}, True),
        ({"VLLM_COMPILE_STARTS": "0"}, False),
        ({"VLLM_PLUGINS": "other"}, True),
        ({"VLLM_PLUGINS": "other,compile_ext"}, False),
        ({"VLLM_COMPILE_EXT": "banana"}, False),
    ],
)
def test_variables_switch_it_off(env: dict[str, str], off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_COMPILE_EXT", "VLLM_COMPILE_STARTS", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert early.off("VLLM_COMPILE_EXT") is off
