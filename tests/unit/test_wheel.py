"""What a wheel and an editable install hold beside the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import process

BUILT = (
    "vllm_compile_ext",
    "patches",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "vllm_compile_ext.pth",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in BUILT:
        path = process.ROOT / name
        if path.is_dir():
            shutil.copytree(path, tmp_path / "source" / name, symlinks=True)
        else:
            shutil.copy2(path, tmp_path / "source" / name)
    return tmp_path / "source"


def build(kind: str, folder: Path) -> Path:
    """What setuptools makes of `folder`: a wheel, an editable one, or an sdist."""
    code = f"import sys; import setuptools.build_meta as build; build.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, "out"], cwd=folder, check=True, capture_output=True)
    (made,) = (folder / "out").iterdir()
    return made


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_pth_file_is_at_the_top(source: Path, kind: str) -> None:
    with zipfile.ZipFile(build(kind, source)) as archive:
        assert archive.read("vllm_compile_ext.pth") == (process.ROOT / "vllm_compile_ext.pth").read_bytes()
        (record,) = [name for name in archive.namelist() if name.endswith("/RECORD")]
        assert b"vllm_compile_ext.pth,sha256=" in archive.read(record)


@pytest.mark.parametrize("through", ["source", "sdist"])
def test_patches_are_in_the_wheel(source: Path, tmp_path: Path, through: str) -> None:
    """In the repository the package has a link to them."""
    if through == "sdist":
        shutil.unpack_archive(build("sdist", source), tmp_path / "unpacked")
        (source,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", source)) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if name.endswith(".patch")}
    patches = process.ROOT / "patches"
    expected = {
        str("vllm_compile_ext" / p.relative_to(patches.parent)): p.read_bytes() for p in patches.glob("*/*.patch")
    }
    assert found == expected != {}
