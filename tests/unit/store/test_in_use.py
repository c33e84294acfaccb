"""Looking at what is in use without being in the way of those that use it."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tests.unit.store import bundles
from vllm_compile_ext.store.store import Store


def test_what_is_used_is_in_use(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    entry, other = bundles.entry(store, "llama"), bundles.entry(store, "qwen")
    store.use(entry)
    assert store.tree.in_use(*entry.names)
    assert not store.tree.in_use(*other.names)


def test_what_is_not_there_is_not_in_use(store: Store) -> None:
    (store.tree.path / "tmp" / "link").symlink_to("/etc")
    assert not store.tree.in_use("tmp", "missing")
    assert not store.tree.in_use("tmp", "link")


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_one_who_looks_does_not_keep_another_from_using(store: Store, seconds: float) -> None:
    path = store.tree.path / "tmp" / "manifest"
    path.write_bytes(b"")
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as `in_use` has it for a moment
    threading.Timer(seconds, os.close, [handle]).start()
    store.tree.hold("tmp", "manifest")
    assert store.tree.in_use("tmp", "manifest")
