"""``vllm-compile-ext patch``: a few lines in vLLM's own files, for people who build vLLM or let it load no plugins.

Each patch of `patches/` fills one file that is empty in vLLM.  So the file says itself what was done to it: it is
empty, or what a patch makes of it, or somebody else's, which is never written.  A file is replaced as a whole by
another: what is interrupted leaves one or the other, and a hard link elsewhere keeps what it had.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from vllm_compile_ext.cli.shared import UserError

PATCHES = Path(__file__).parents[1] / "patches"
STOCK = b""
_PARTIAL = ".vllm-compile-ext-"  # how the name begins of a file that is being written
_VERSION = re.compile(r"""^__version__ = (?:version = )?['"](.+)['"]""", re.MULTILINE)  # as setuptools_scm writes it

TreeOption = Annotated[
    Path,
    typer.Option("--tree", metavar="DIR", help="vLLM's source tree, or the site-packages folder that it lies in."),
]
VersionOption = Annotated[
    str | None, typer.Option("--vllm", metavar="VERSION", help="Its version, where a source tree does not say it.")
]


def patched() -> dict[str, dict[str, bytes]]:
    """Version of vLLM, "0.33" -> file in vLLM's package -> what it holds once it is patched."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(PATCHES.glob("*/*.patch")):
        head, _, hunk = path.read_bytes().partition(b"\n@@ -0,0 ")
        file = head.rpartition(b"\n+++ b/vllm/")[2].decode()
        lines = hunk.splitlines(keepends=True)[1:]
        found.setdefault(path.parent.name, {})[file] = b"".join(line.removeprefix(b"+") for line in lines)
    return found


def is_patched(package: Path) -> bool:
    """Whether the folder `vllm` holds a version's patches."""
    with suppress(OSError):
        return any(all((package / f).read_bytes() == new for f, new in files.items()) for files in patched().values())
    return False


def apply(tree: TreeOption, vllm: VersionOption = None) -> None:
    """Have vLLM load the plugin whatever VLLM_PLUGINS says."""
    _put(tree, patched()[_version(tree, vllm)], "patched")


def check(tree: TreeOption, vllm: VersionOption = None) -> None:
    """Say whether it is patched; exit status 1 where it is not, or cannot be."""
    files = patched()[version := _version(tree, vllm)]
    missing = [path for path, content in _contents(tree, files).items() if content not in files.values()]
    for path in missing:
        typer.echo(f"{path} is not patched: vllm-compile-ext patch apply --tree {tree}")
    if missing:
        raise typer.Exit(1)
    typer.echo(f"{_package(tree)} is patched, for vLLM {version}")


def revert(tree: TreeOption) -> None:
    """Make it what it was, byte for byte, whatever its version and however much of it is patched."""
    _put(tree, {file: STOCK for files in patched().values() for file in files}, "as vLLM has it")


def _package(tree: Path) -> Path:
    """The folder `vllm` of the tree, which may be that folder itself.  Raises `UserError`."""
    for package in (tree / "vllm", tree):
        if (package / "version.py").is_file() and (package / "compilation").is_dir():
            return package
    raise UserError(f"no vLLM in {tree}: give --tree its source tree, or the site-packages folder that it lies in")


def _version(tree: Path, given: str | None) -> str:
    """The version of vLLM, "0.33", that has patches.  Raises `UserError`."""
    written = _package(tree) / "_version.py"  # made by a build
    match = _VERSION.search(written.read_text(errors="replace")) if written.is_file() else None
    version = match[1] if match else given
    known = sorted(patched())
    if version is None:
        raise UserError(f"{written} does not say which vLLM this is: add --vllm {known[-1]}, if it is that")
    minor = ".".join(version.split(".")[:2])
    if minor not in known:
        raise UserError(f"no patches for vLLM {version} of {tree}, only for {' and '.join(known)}: leave it as it is")
    return minor


def _contents(tree: Path, files: Iterable[str]) -> dict[Path, bytes]:
    """What `files` of vLLM's package hold.  Raises `UserError` where it is not vLLM's and not a patch's."""
    found = {}
    for file in files:
        path = _package(tree) / file
        if (real := path.resolve()) != tree.resolve() / path.relative_to(tree):
            raise UserError(f"{path} is a link to {real}, which others may use: give --tree the tree that it lies in")
        found[path] = path.read_bytes()
        if found[path] not in (STOCK, *(each.get(file) for each in patched().values())):
            raise UserError(
                f"{path} is neither empty, as vLLM has it, nor as patched, and is left alone: "
                "take out what was changed there, or add the lines by hand (patches/README.md)"
            )
    return found


def _put(tree: Path, files: dict[str, bytes], state: str) -> None:
    """Make these the contents of the package's files, after all were looked at.  Raises `UserError`."""
    for (path, old), new in zip(_contents(tree, files).items(), files.values(), strict=True):
        try:
            for partial in path.parent.glob(f"{_PARTIAL}*"):  # of a command that was killed
                partial.unlink()
            if old != new:
                _replace(path, new)
        except OSError as error:
            why = f"{path} cannot be replaced ({error.strerror}) and is what it was"
            raise UserError(f"{why}: run this as the user whose it is, or where the image is built") from error
        typer.echo(f"{path} is {state}{' already' if old == new else ''}")


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_PARTIAL, delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(content)
            file.flush()
            old = path.stat()
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            os.fsync(file.fileno())  # before the rename: a name without its bytes would survive a power cut
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
