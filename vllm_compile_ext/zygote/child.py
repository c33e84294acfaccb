"""What a process does that the zygote forked: become as one that was spawned, then run what it was asked to run."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import process, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from vllm_compile_ext import harmless
from vllm_compile_ext.finder import finder
from vllm_compile_ext.zygote import NotForkedError
from vllm_compile_ext.zygote.surroundings import Surroundings, follow_environment


@dataclass
class Told:
    """What a process is told that asks to be forked.

    files: the numbers that the files sent along had.  pipe: of the pickled arguments.  tracker: multiprocessing's.
    starts: whether it may start processes itself.
    """

    surroundings: Surroundings
    name: str
    starts: bool
    files: tuple[int, ...]
    pipe: int
    tracker: int


def run(
    connection: Connection, files: Sequence[int], make_zygote: Callable[[Sequence[int]], Callable[[], None]]
) -> int:
    """Be the process that is asked for; returns its exit status.

    make_zygote: makes one for this process, without the files that it names; returns what ends it.
    """
    end: Callable[[], object] = int
    with connection, contextlib.suppress(OSError):  # nobody listens any more
        connection.send(os.getpid())
        parent, told = connection.recv()
        try:
            _wait_for_parent(parent)
            place(files, told.files)
            told.surroundings.check()
            told.surroundings.give()
            forget(told.name)
            if told.starts:
                end = make_zygote([*told.files[3:], connection.fileno()])
            follow_environment(os.environ)
        except Exception as error:
            end()
            connection.send(str(error) if isinstance(error, NotForkedError) else harmless.error(error))
            return 0
        connection.send("")
    setattr(resource_tracker._resource_tracker, "_fd", told.tracker)  # noqa: B010
    try:
        return int(spawn._main(told.pipe, os.dup(told.pipe)))
    finally:
        atexit._run_exitfuncs()
        util._flush_std_streams()  # type: ignore[attr-defined]


def _wait_for_parent(parent: int) -> None:
    deadline = time.monotonic() + 10
    while os.getppid() != parent:
        if time.monotonic() > deadline:
            raise NotForkedError("the process that asked did not become its parent")
        time.sleep(0.0002)


def place(files: Sequence[int], numbers: Sequence[int], *, given: bool = False) -> None:
    """Give the files that were sent the numbers that they had.

    given: by whoever started the program, so that programs that this one starts may have them.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the asker's limit may be higher than this one
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, numbers, strict=True):
        if number > 2 and _is_open(number):
            raise NotForkedError(f"a file is open as number {number}")
        os.dup2(file, number, inheritable=given or number <= 2)
        os.close(file)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def forget(name: str) -> None:
    """Drop what is of the process that was forked, not of its imports."""
    process.current_process().name = name
    sys.modules["__main__"] = ModuleType("__main__")  # multiprocessing runs the program's file again, as "__mp_main__"
    recorder: Any = sys.modules.get("vllm_compile_ext.record.recorder")
    if recorder is not None and recorder.current is not None:
        atexit.unregister(recorder.current._exit)
        recorder.current = None
        finder.intervals.clear()
        recorder.begin()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # Python's own does so by itself; torch's begins with a constant
