"""``vllm-compile-ext patch`` on made-up trees: what it changes, what it refuses, and that all of it can be undone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests import process
from vllm_compile_ext import plugin
from vllm_compile_ext.cli import app, patch

FILE = "vllm/compilation/__init__.py"
PATCHES = sorted((process.ROOT / "patches").glob("*/*.patch"))
VERSIONS = sorted({path.parent.name for path in PATCHES})
# As setuptools_scm writes it for vLLM.
WRITTEN = "version: str\n__version__: str\n\n__version__ = version = '{}'\n__version_tuple__ = (0, 0)\n"


def make(folder: Path, version: str | None = "0.33.0") -> Path:
    (folder / "vllm/compilation").mkdir(parents=True)
    (folder / FILE).touch()
    (folder / "vllm/compilation/backends.py").write_text("stock = True\n")
    (folder / "vllm/version.py").write_text("from ._version import __version__\n")
    if version:
        (folder / "vllm/_version.py").write_text(WRITTEN.format(version))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make(tmp_path / "tree")


def cli(command: str, tree: Path, *args: str, code: int = 0) -> str:
    """What the command prints; an error in one line."""
    result = CliRunner().invoke(app, ["patch", command, "--tree", str(tree), *args])
    assert result.exit_code == code, result.output
    assert code == 0 or len(result.output.splitlines()) == 1
    return result.output


def snapshot(tree: Path) -> dict[str, Any]:
    """Everything in a tree: kinds, modes, owners and contents."""

    def about(path: Path) -> Any:
        seen = path.lstat()
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        return seen.st_mode, seen.st_uid, seen.st_gid, content

    return {str(path.relative_to(tree)): about(path) for path in sorted(tree.rglob("*"))}


def refused(tree: Path, *words: str, revert: bool = True) -> None:
    """Each command says why, and changes nothing."""
    before = snapshot(tree)
    for command in ("apply", "check", "revert")[: 3 if revert else 2]:
        said = cli(command, tree, code=1)
        assert all(word in said for word in words), said
        assert snapshot(tree) == before


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.0+vendor", "0.33.1.dev3+g0123456"])
@pytest.mark.parametrize("form", ["source", "installed", "package", "named"])
def test_apply_check_and_revert(tmp_path: Path, version: str, form: str) -> None:
    """A source tree, site-packages, the package's own folder; and a source tree that does not say its version."""
    tree = make(tmp_path / "tree", None if form == "named" else version)
    given = tree / "vllm" if form == "package" else tree
    option = ["--vllm", version] if form == "named" else []
    (tree / FILE).chmod(0o640)
    stock = snapshot(tree)
    assert "is not patched: vllm-compile-ext patch apply" in cli("check", given, *option, code=1)
    assert f"{FILE} is patched\n" in cli("apply", given, *option)
    patched = snapshot(tree)
    assert {name for name in patched if patched[name] != stock[name]} == {FILE}
    assert patched[FILE][:3] == stock[FILE][:3]
    assert f"is patched, for vLLM {version[:4]}" in cli("check", given, *option)
    assert "is patched already" in cli("apply", given, *option)
    assert snapshot(tree) == patched
    assert f"{FILE} is as vLLM has it\n" in cli("revert", given)
    assert snapshot(tree) == stock
    assert "already" in cli("revert", given)


def test_a_relative_tree(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    cli("apply", Path())
    assert patch.is_patched(Path("vllm"))


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.sampled_from(["alone", "before", "after", "part", "changed"]), st.data())
def test_what_somebody_else_has_written_is_left_alone(content: bytes, how: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tree = make(Path(folder, "tree"))
        cli("apply", tree)
        ours = (tree / FILE).read_bytes()
        at = data.draw(st.integers(1, len(ours) - 1))
        changed = bytes([ours[at] ^ data.draw(st.integers(1, 255))])
        dirty = {
            "alone": content,
            "before": content + ours,
            "after": ours + content,
            "part": ours[:at],
            "changed": ours[:at] + changed + ours[at + 1 :],
        }
        (tree / FILE).write_bytes(dirty[how])
        refused(tree, FILE, "neither empty, as vLLM has it, nor as patched", "left alone")
        assert not patch.is_patched(tree / "vllm")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.31.2", ("vLLM 0.31.2", "0.32 and 0.33")),
        ("0.34.0", ("vLLM 0.34.0",)),
        ("dev", ("vLLM dev",)),
        (None, ("_version.py does not say", "--vllm 0.33")),
    ],
)
def test_unknown_versions_are_refused_and_can_be_reverted(
    tree: Path, version: str | None, words: tuple[str, ...]
) -> None:
    stock = snapshot(tree)
    cli("apply", tree)
    written = tree / "vllm/_version.py"
    kept = written.read_text()
    written.write_text(WRITTEN.format(version)) if version else written.unlink()
    refused(tree, *words, revert=False)
    cli("revert", tree)
    written.write_text(kept)
    assert snapshot(tree) == stock


@pytest.mark.parametrize("name", ["", "vllm", "vllm/version.py", "vllm/compilation"])
def test_no_vllm(tree: Path, name: str) -> None:
    path = tree / name
    path.unlink() if path.is_file() else shutil.rmtree(path)
    tree.mkdir(exist_ok=True)
    refused(tree, f"no vLLM in {tree}", "give --tree")


@pytest.mark.parametrize("linked", ["vllm", "vllm/compilation", FILE])
def test_links_out_of_the_tree(tree: Path, tmp_path: Path, linked: str) -> None:
    """As pip's editable installs and some installers of packages make them."""
    elsewhere = (tree / linked).rename(tmp_path / "elsewhere")
    (tree / linked).symlink_to(elsewhere)
    before = snapshot(tmp_path)
    refused(tree, "is a link to", str(elsewhere), "give --tree the tree")
    assert snapshot(tmp_path) == before


def test_the_tree_itself_may_be_a_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    cli("apply", tmp_path / "link")
    assert patch.is_patched(tree / "vllm")


def test_other_links_to_the_file_keep_what_they_have(tree: Path, tmp_path: Path) -> None:
    """Installers link what they install to a cache, from which other environments are made."""
    (tmp_path / "cache").hardlink_to(tree / FILE)
    cli("apply", tree)
    assert (tmp_path / "cache").read_bytes() == patch.STOCK


@pytest.mark.parametrize("patched", [False, True])
def test_a_tree_that_can_only_be_read(tree: Path, patched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if patched:
        cli("apply", tree)
    before = snapshot(tree)
    if os.geteuid() == 0:  # root is let into all but a mount
        mount = ["mount", "-o", "bind,ro", tree, tree]
        if subprocess.run(mount).returncode:
            pytest.skip("mounting is not allowed here")
    else:
        (tree / FILE).parent.chmod(0o555)
    try:
        cli("check", tree, code=not patched)
        cli("apply" if patched else "revert", tree)  # nothing is to be written
        said = cli("revert" if patched else "apply", tree, code=1)
        assert f"{tree / FILE} cannot be replaced (" in said
        assert "and is what it was: run this as" in said
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", tree], check=True)
        else:
            (tree / FILE).parent.chmod(0o755)
    assert snapshot(tree) == before


@pytest.mark.parametrize("command", ["apply", "revert"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_killed(tree: Path, command: str, where: str) -> None:
    """Before or after the one step that counts; what is left behind goes with the next command."""
    stock = snapshot(tree)
    cli("apply", tree)
    patched = snapshot(tree)
    if command == "apply":
        cli("revert", tree)
    code = f"""if True:
        import os, pathlib
        from vllm_compile_ext.cli import app
        replace = pathlib.Path.replace
        def killed(*paths):
            {"replace(*paths)" if where == "after" else ""}
            os.kill(os.getpid(), 9)
        pathlib.Path.replace = killed
        app(["patch", "{command}", "--tree", {str(tree)!r}])
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=process.ROOT, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    now = snapshot(tree)
    assert now[FILE] == (stock if (command == "apply") == (where == "before") else patched)[FILE]
    assert len(now.keys() - stock.keys()) == (where == "before")
    if command == "apply":
        cli("apply", tree)
        assert snapshot(tree) == patched
    cli("revert", tree)
    assert snapshot(tree) == stock


def test_partly_applied(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second patch, of another file, of which only one was applied."""
    more = shutil.copytree(patch.PATCHES, tmp_path / "patches")
    first = next((more / "0.33").iterdir())
    text = first.read_text().replace("compilation/__init__", "compilation/passes")
    (more / "0.33" / "0002-more.patch").write_text(text)
    (tree / "vllm/compilation/passes.py").touch()
    stock = snapshot(tree)
    cli("apply", tree)
    monkeypatch.setattr(patch, "PATCHES", more)
    assert "passes.py is not patched" in cli("check", tree, code=1)
    part = snapshot(tree)
    assert "__init__.py is patched already" in cli("apply", tree)
    cli("check", tree)
    (tree / "vllm/compilation/passes.py").write_bytes(patch.STOCK)
    assert snapshot(tree) == part
    cli("revert", tree)
    assert snapshot(tree) == stock


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_git_and_patch_make_the_same_of_it(path: Path, tree: Path, tmp_path: Path) -> None:
    by_hand = shutil.copytree(tree, tmp_path / "by hand")
    (tree / "vllm/_version.py").write_text(WRITTEN.format(path.parent.name))
    stock = (by_hand / FILE).read_bytes()
    cli("apply", tree)
    for apply, undo in (
        (["git", "apply", path], ["git", "apply", "-R", path]),
        (["patch", "-p1", "-i", path], ["patch", "-R", "-p1", "-i", path]),
    ):
        if shutil.which(str(apply[0])) is None:
            continue
        subprocess.run(apply, cwd=by_hand, check=True)
        assert (by_hand / FILE).read_bytes() == (tree / FILE).read_bytes()
        subprocess.run(undo, cwd=by_hand, check=True)
        assert (by_hand / FILE).read_bytes() == stock


def test_each_supported_version_has_patches_that_only_add_lines_of_ours() -> None:
    from vllm_compile_ext import versions

    assert list(versions.BUILT_FOR) == VERSIONS
    for path in PATCHES:
        head, _, hunk = path.read_text().partition("\n@@ -0,0 +1,")
        count, *lines = hunk.splitlines()
        assert head.endswith(f"\n--- a/{FILE}\n+++ b/{FILE}")
        assert all(line.startswith("+") for line in lines)
        assert count == f"{len(lines)} @@"
        compile(patch.patched()[path.parent.name]["compilation/__init__.py"], FILE, "exec")


def test_the_command_imports_neither_vllm_nor_torch(tree: Path) -> None:
    code = f"""if True:
        import sys
        from vllm_compile_ext.cli import app
        app(["patch", "apply", "--tree", {str(tree)!r}], standalone_mode=False)
        assert not {{"vllm", "torch"}} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], cwd=process.ROOT, check=True)


@pytest.mark.parametrize("allowed", [{}, {"other": print}, {"other": print, "compile_ext": plugin.register}])
def test_vllms_loader_gets_the_plugin_once(allowed: dict[str, Any]) -> None:
    load = plugin.with_ours(lambda group: dict(allowed))
    assert load("vllm.general_plugins") == allowed | {"compile_ext": plugin.register}
    assert load("vllm.platform_plugins") == allowed
