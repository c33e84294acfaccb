"""What a process inherits when it is spawned: taken from the process that asks, given to the fork.

What cannot be given to a process that has already imported everything is a reason to spawn.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from vllm_compile_ext.zygote import NotForkedError, reads, threads


def fixed() -> dict[str, Any]:
    """What a process has for life, or what only its start could give it, by what it is called."""
    spaces = Path("/proc/self/ns")
    return {
        "the user or group": (os.getresuid(), os.getresgid(), sorted(os.getgroups())),
        "the namespaces": sorted(str(each.readlink()) for each in spaces.iterdir()),
        "the control group": Path("/proc/self/cgroup").read_text(),
        "the priority": os.getpriority(os.PRIO_PROCESS, 0),
        "the scheduling policy": os.sched_getscheduler(0),
        "the out-of-memory score": Path("/proc/self/oom_score_adj").read_text(),
        "the root folder": str(Path("/proc/self/root").readlink()),
        "Python's executable": os.fsdecode(spawn.get_executable()),
    }


# What Python does with these when it starts (Python/pylifecycle.c, Modules/signalmodule.c, 3.11).
_AT_START: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGPIPE: signal.SIG_IGN,
    signal.SIGXFSZ: signal.SIG_IGN,
}


def _signals() -> Iterator[int]:
    return (number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP))


def _ignored() -> set[int]:
    return {number for number in _signals() if signal.getsignal(number) is signal.SIG_IGN}


def _umask() -> int:
    return int(re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1], 8)  # type: ignore[index]


def _limits() -> dict[int, tuple[int, int]]:
    names = (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
    return {number: resource.getrlimit(number) for number in names}


@dataclass
class Surroundings:
    """Of the process that asks.

    limits: soft and hard ones, by `resource`'s numbers.  ignored, blocked: signals.  processors: those it may run on.
    """

    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: str = field(default_factory=os.getcwd)
    mask: int = field(default_factory=_umask)
    limits: dict[int, tuple[int, int]] = field(default_factory=_limits)
    ignored: set[int] = field(default_factory=_ignored)
    blocked: set[int] = field(default_factory=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    processors: set[int] = field(default_factory=lambda: os.sched_getaffinity(0))
    fixed: dict[str, Any] = field(default_factory=fixed)

    def give(self, seen: Mapping[str, str]) -> None:
        """Make them this process's; `seen` is the environment while all was imported.

        Raises `NotForkedError`, and `OSError` or `ValueError` where the system refuses.
        """
        here = fixed()
        if differ := [what for what, value in self.fixed.items() if here.get(what) != value]:
            raise NotForkedError(f"{differ[0]} is not as it was")
        check_environment(seen, self.environ)
        for name in os.environ.keys() - self.environ.keys():
            del os.environ[name]
        for name, value in self.environ.items():
            if os.environ.get(name) != value:  # the rest stays where it is: setproctitle looks for it there
                os.environ[name] = value
        os.chdir(self.folder)
        os.umask(self.mask)
        for limit, allowed in self.limits.items():
            if resource.getrlimit(limit) != allowed:
                resource.setrlimit(limit, allowed)
        for number in _signals():
            if number in self.ignored:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) is not None:  # None: a handler that is not Python's, such as faulthandler's
                signal.signal(number, _AT_START.get(number, signal.SIG_DFL))
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)
        os.sched_setaffinity(0, self.processors)
        for name, apply in reads.SET_BY.items():
            if seen.get(name) != self.environ.get(name):
                apply(self.environ.get(name))


# Read by the loader of programs, by C and C++ libraries, by Python itself: where no Python code sees it.
_NATIVE = re.compile(
    "(LD|PYTHON|MALLOC|GLIBC|OMP|GOMP|KMP|MKL|OPENBLAS|GOTO|BLIS|DNNL|ONEDNN|TORCH|PYTORCH|ATEN|C10|CUDA|CUBLAS"
    "|CUDNN|NVIDIA|HIP|ROCR|HSA|NCCL|GLOO|LC|LANG|TZ|TMPDIR|HOME|PATH)(_|$)|.*MALLOC"
)


def check_environment(seen: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `NotForkedError` where `now` has a variable that was read while it was as in `seen`, or may have been."""
    if problem := threads.problem(seen, now):
        raise NotForkedError(problem)
    changed = {name for name in {*seen, *now} if seen.get(name) != now.get(name)}
    changed -= {*threads.KNOWN, *reads.LATE, *reads.SET_BY}
    if late := sorted(name for name in changed if _NATIVE.match(name) or reads.was_read(name)):
        raise NotForkedError(f"{', '.join(late)} changed after it may have been read")
