"""What processes of `test_zygote.py` do: a module that a spawned process can import."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_compile_ext.zygote import front
from vllm_compile_ext.zygote.context import Context


def look() -> dict[str, Any]:
    """What a process can see of itself that is the same in two spawned ones."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limits = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
    numbers = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
    main: Any = sys.modules["__main__"]
    parent: Any = multiprocessing.parent_process()
    return {
        "environ": {k: v for k, v in os.environ.items()},
        "argv, path": (sys.argv, sys.path),
        "main": (main.__name__, getattr(main, "__file__", None), main is sys.modules.get("__mp_main__")),
        "folder, mask": (str(Path.cwd()), status["Umask"]),
        "limits": limits,
        "handlers": {number: str(signal.getsignal(number)).split(" at ")[0] for number in numbers},
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "Cpus_allowed_list", "Uid", "Gid")],
        "parent": (os.getppid(), parent.pid, parent.name, parent.is_alive()),
        "group": (os.getpgrp(), os.getsid(0), os.getpriority(os.PRIO_PROCESS, 0)),
        "name": (multiprocessing.current_process().name, multiprocessing.current_process().daemon),
        "method": multiprocessing.get_start_method(),
        "threads": [each.name for each in threading.enumerate()],
        "children": len(multiprocessing.active_children()),
        "streams": [str(Path(f"/proc/self/fd/{number}").readlink()) for number in (0, 1, 2)],
        "stdin": sys.stdin.read(),
    }


def tell(pipe: Connection) -> None:
    pipe.send(look())


def end(how: str) -> None:
    atexit.register(print, f"atexit of {how}", flush=True)
    if how == "exit 3":
        sys.exit(3)
    if how == "raise":
        raise RuntimeError("raised")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "at once":
        os._exit(7)
    if how in ("terminate", "interrupt"):
        print("waiting", flush=True)
        while True:  # not `signal.pause`, which sleeps on where the signal comes just before it
            time.sleep(0.05)


def numbers(pipe: Connection) -> None:
    import numpy

    pipe.send((random.random(), numpy.random.random()))


def below(pipe: Connection) -> None:
    """A process that starts one of its own."""
    found = Context() if front.wanted() else multiprocessing.get_context("spawn")
    ours, theirs = found.Pipe()
    process = found.Process(target=tell, args=(theirs,), name="below", daemon=True)
    process.start()
    pipe.send((ours.recv(), os.getpid(), process.pid))
    process.join()
    pipe.send(process.exitcode)


def count(lock: Any, value: Any, queue: Any) -> None:
    for _ in range(100):
        with lock:
            value.value += 1
    queue.put(os.getpid())


def compute(pipe: Connection) -> None:
    """How many threads compute, and the processors that this one and another may use."""
    import torch

    torch.zeros(1 << 20).add_(1)
    tasks = [(task / "status").read_text() for task in Path("/proc/self/task").iterdir()]
    allowed = {line.split()[1] for text in tasks for line in text.splitlines() if line.startswith("Cpus_allowed_list")}
    pipe.send((torch.get_num_threads(), sorted(allowed), sorted(os.sched_getaffinity(0))))


def settings(pipe: Connection) -> None:
    from prometheus_client import values
    from torch._inductor import config

    pipe.send((config.compile_threads, config.cpp.dynamic_threads, values.ValueClass.__name__))


class Unreadable:
    def __getstate__(self) -> int:
        return 1

    def __setstate__(self, state: int) -> None:
        raise ValueError("unreadable")


def files(pipe: Connection) -> None:
    pipe.send([str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()])
