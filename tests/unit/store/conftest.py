from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_compile_ext.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of its own, 1 MB of memory."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()


@pytest.fixture
def user() -> Iterator[Path]:
    """The rest of the test runs as a user for whom file modes count, with a folder of their own."""
    folder = Path(tempfile.mkdtemp())
    me = os.geteuid()
    if me == 0:
        folder.chmod(0o755)
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    yield folder
    os.seteuid(me)
    shutil.rmtree(folder)
