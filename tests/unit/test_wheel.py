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
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "vllm_compile_ext.pth",
)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_pth_file_is_at_the_top(tmp_path: Path, kind: str) -> None:
    for name in BUILT:
        path = process.ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, tmp_path / name)
    code = f"import sys; import setuptools.build_meta as build; build.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, "out"], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("vllm_compile_ext.pth") == (process.ROOT / "vllm_compile_ext.pth").read_bytes()
        (record,) = [name for name in archive.namelist() if name.endswith("/RECORD")]
        assert b"vllm_compile_ext.pth,sha256=" in archive.read(record)
