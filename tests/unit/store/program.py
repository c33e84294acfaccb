"""A made-up program of several blobs, and other processes that work on a store."""

from __future__ import annotations

import errno
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_compile_ext.store.store import Manifest, Store, key_of


def members(name: str, count: int = 4, size: int = 1000) -> dict[str, bytes]:
    """What `name` compiles to: `count` members of `size` bytes, the first the same for every name."""
    parts = [f"{name if index else 'shared'} {index} ".encode() for index in range(count)]
    return {f"piece/{index}/(1, 256)": (part * size)[:size] for index, part in enumerate(parts)}


def factors(name: str) -> dict[str, str]:
    return {"model": name, "torch": "2.13.0"}


def manifest(store: Store, name: str, data: dict[str, bytes], shard: str = "rank0", **changes: Any) -> Manifest:
    """The manifest of `data`, whose blobs are put."""
    fields: dict[str, Any] = {"kind": "program", "key": key_of(factors(name)), "shard": shard, "model": name}
    fields |= {"created": time.time(), "platform": "linux-x86_64 cpu", "factors": factors(name)}
    fields |= {"members": {member: store.put(content) for member, content in data.items()}}
    return Manifest(**fields | changes)


def leave(store: Store, name: str, **kwargs: int) -> Manifest:
    """Write an entry as a process did that has ended since: nothing holds it."""
    written = manifest(store, name, members(name, **kwargs))
    store.add(written)
    return written


def write(store: Store, name: str, **kwargs: int) -> Manifest:
    """Write an entry as a process does that then uses it."""
    written = leave(store, name, **kwargs)
    store.use(written)
    return written


def load(store: Store, found: Manifest) -> dict[str, bytes]:
    return {name: store.get(blob) for name, blob in found.members.items()}


def raising(number: int) -> Callable[..., Any]:
    """A function that raises the `OSError` with this number."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


full = raising(errno.ENOSPC)


@contextmanager
def failing(calls: Sequence[str], times: int, then: Callable[[], Any] = full) -> Iterator[None]:
    """The functions `calls` of `os` work `times` times in all; after that `then` is called in their place."""
    left = times

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            return call(*args, **kwargs) if left >= 0 else then()

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, wrap(getattr(os, name)))
        yield


def fork(work: Callable[[], object], calls: Sequence[str] = (), times: int = 0) -> int:
    """A process that does `work`; with `calls`, it ends at one of these (see `failing`), as if it were killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with failing(calls, times, lambda: os._exit(9)):
                work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit status of a process of `fork`."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Another process that has done `work` and then hangs, until the function that this gives kills it."""
    reading, writing = os.pipe()

    def hang() -> None:
        work()
        os.write(writing, b"done")
        time.sleep(600)

    child = fork(hang)
    os.close(writing)
    assert os.read(reading, 4) == b"done"
    os.close(reading)

    @functools.cache
    def kill() -> None:
        os.kill(child, signal.SIGKILL)
        ended(child)

    try:
        yield kill
    finally:
        kill()
