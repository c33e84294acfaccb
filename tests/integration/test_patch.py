"""A patched vLLM that loads no plugins (`VLLM_PLUGINS=`): an engine with it, without the plugin, and after `revert`.

Its tree is made of links to the installed one, but for the file that the patch is for.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import engine, process
from vllm_compile_ext.cli import app

pytestmark = pytest.mark.engine

FILE = Path("vllm/compilation/__init__.py")
AFTER = """
    import vllm, vllm.plugins
    from vllm_compile_ext import plugin
    from vllm_compile_ext.cli import doctor
    extra.update(vllm=vllm.__file__, active=plugin.status().active, doctor=doctor.entry_point().state)
    extra["loaded"] = sorted(vllm.plugins.load_plugins_by_group("vllm.general_plugins"))
"""
IMPORT = """
    import os, sys
    if os.environ.get("WITHOUT"):
        sys.modules["vllm_compile_ext"] = None  # as if it was not installed
    import vllm.config, vllm.plugins
    vllm.plugins.load_general_plugins()
    import vllm.compilation.decorators as decorators
    report([vllm.__file__, decorators.__file__])
"""


@dataclass(frozen=True)
class Patched:
    """An engine with the plugin loaded the usual way, and another on the same cache root with the patched tree.

    stock, reverted: the tree before `apply` and after `revert`.  without: a process of the patched tree where the
    plugin is not installed; plain: one of the reverted tree.
    """

    tree: Path
    usual: engine.Run
    run: engine.Run
    without: process.Outcome
    plain: process.Outcome
    stock: dict[str, bytes]
    reverted: dict[str, bytes]


def contents(tree: Path) -> dict[str, bytes]:
    """Where each file's link leads, or what it holds, without bytecode, which Python may make anew."""
    files = [path for path in tree.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts]
    found = {path: os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() for path in files}
    return {str(path.relative_to(tree)): content for path, content in found.items()}


def cli(command: str, tree: Path) -> str:
    result = CliRunner().invoke(app, ["patch", command, "--tree", str(tree)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def patched(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    folder = tmp_path_factory.mktemp("patch")
    installed = Path(next(iter(importlib.util.find_spec("vllm").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    tree = folder / "tree"
    shutil.copytree(installed, tree / "vllm", copy_function=lambda file, link: Path(link).symlink_to(file))
    (tree / FILE).unlink()
    shutil.copy2(installed / FILE.relative_to("vllm"), tree / FILE)
    stock = contents(tree)

    env = {"VLLM_PLUGINS": "", "PYTHONPATH": f"{tree}{os.pathsep}{process.BASE['PYTHONPATH']}"}
    usual = engine.run(llama, folder / "root", fork=True)
    assert "is patched" in cli("apply", tree)
    cli("check", tree)
    run = engine.run(llama, folder / "root", after=AFTER, **env)
    without = process.run(IMPORT, folder=folder / "without", WITHOUT="1", **env)
    cli("revert", tree)
    reverted = contents(tree)
    plain = process.run(IMPORT, folder=folder / "plain", **env)
    return Patched(tree, usual, run, without, plain, stock, reverted)


def test_it_is_loaded_and_active_where_plugins_are_off(patched: Patched) -> None:
    assert patched.run.extra == {
        "vllm": str(patched.tree / "vllm" / "__init__.py"),
        "active": True,
        "doctor": "ok",
        "loaded": ["compile_ext"],
    }
    assert patched.run.output.lines("vllm-compile-ext", "is active")
    assert patched.run.backends.endswith("vllm_compile_ext/compilation/backends.py")


def test_it_does_the_same(patched: Patched) -> None:
    """It compiles again: vLLM's compiler, of which the file is a part, is not the one of the other start."""
    assert patched.run.counters == patched.usual.counters
    assert (patched.run.compiled, patched.run.loaded) == (3, 0)
    assert patched.run.output.lines("traced 2 layers and copied 2; 5 pieces to compile, 3 of them distinct")


def test_same_answers(patched: Patched) -> None:
    assert patched.run.tokens == patched.usual.tokens
    assert patched.run.logprobs == patched.usual.logprobs


def test_without_the_plugin_vllm_is_stock_after_one_line(patched: Patched) -> None:
    assert patched.without.code == 0, patched.without.output[-3000:]
    (line,) = patched.without.lines("vllm-compile-ext")
    assert "is not active, vLLM starts stock: No module named" in line
    assert f"install vllm-compile-ext, or empty {patched.tree / FILE}" in line
    assert patched.without.value[1] == str(patched.tree / "vllm/compilation/decorators.py")


def test_reverted_it_is_stock_byte_for_byte(patched: Patched) -> None:
    assert patched.reverted == patched.stock
    assert (patched.tree / FILE).read_bytes() == b""
    assert patched.plain.code == 0, patched.plain.output[-3000:]
    assert patched.plain.value == [
        str(patched.tree / path) for path in ("vllm/__init__.py", "vllm/compilation/decorators.py")
    ]
    assert not patched.plain.lines("vllm-compile-ext")
