"""A made-up program of several blobs, and other processes that work on a store."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import process
from vllm_compile_ext.store.store import Manifest, Store, key_of


def members(name: str, count: int = 4, size: int = 1000) -> dict[str, bytes]:
    """What `name` compiles to: `count` members of `size` bytes, the first the same for every name."""
    parts = [f"{name if index else 'shared'} {index} ".encode() for index in range(count)]
    return {f"piece/{index}/(1, 256)": (part * size)[:size] for index, part in enumerate(parts)}


def factors(name: str) -> dict[str, str]:
    return {"model": name, "torch": "2.13.0"}


def manifest(store: Store, name: str, data: dict[str, bytes], shard: str = "rank0") -> Manifest:
    """The manifest of `data`, whose blobs are put."""
    return Manifest(
        kind="program",
        key=key_of(factors(name)),
        shard=shard,
        model=name,
        created=time.time(),
        platform="linux-x86_64 cpu",
        factors=factors(name),
        members={member: store.put(content) for member, content in data.items()},
    )


def write(store: Store, name: str, **kwargs: int) -> Manifest:
    """Write an entry as a process does that then uses it."""
    written = manifest(store, name, members(name, **kwargs))
    store.commit(written)
    return written


def leave(store: Store, name: str, **kwargs: int) -> Manifest:
    """Write an entry as a process did that has ended since: nothing holds it."""
    written = manifest(store, name, members(name, **kwargs))
    store.add(written)
    return written


def load(store: Store, found: Manifest) -> dict[str, bytes]:
    return {name: store.get(blob) for name, blob in found.members.items()}


PRELUDE = """
import os, sys, time
from pathlib import Path
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import Store, key_of
from tests.unit.store import program

store = Store.open(Path(sys.argv[1]))
def say(word):
    print(word, flush=True)
"""


@contextmanager
def child(code: str, root: Path, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `code` with `store`, the one at `root`, and ``say(word)``; killed at the end."""
    started = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(root), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=process.environment(),
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def heard(started: subprocess.Popen[str]) -> str:
    """The next word that a child says; empty when it ended without."""
    assert started.stdout is not None
    return started.stdout.readline().strip()
