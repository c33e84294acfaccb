"""Looking at what is in use without being in the way of those that use it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tests.unit.artifacts import bundles
from vllm_compile_ext.artifacts import locks
from vllm_compile_ext.artifacts.store import Store


def test_what_is_used_is_in_use(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    entry, other = bundles.entry(store, "llama"), bundles.entry(store, "qwen")
    store.use(entry)
    assert locks.in_use(store.layout.manifest(entry.key, entry.shard))
    assert not locks.in_use(store.layout.manifest(other.key, other.shard))


def test_what_is_not_there_is_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert not locks.in_use(tmp_path / "missing")
    assert not locks.in_use(tmp_path / "link")


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_one_who_looks_does_not_keep_another_from_using(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(b"")
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as `in_use` has it for a moment
    threading.Timer(seconds, os.close, [handle]).start()
    locks.hold(path)
    assert locks.in_use(path)
