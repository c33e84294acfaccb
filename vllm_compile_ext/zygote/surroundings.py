"""What a process inherits when it is spawned: taken from the process that asks, given to the fork.

What cannot be given to a process that has already imported everything is a reason to spawn.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from vllm_compile_ext.zygote import NotForkedError, reads, threads


def fixed(process: int = 0) -> dict[str, Any]:
    """What a process, by default this one, has for life, or what only its start could give it, by what it is called."""
    folder = Path("/proc", str(process or "self"))
    status = (folder / "status").read_text()
    return {
        "the user or group": _lines("Uid|Gid|Groups", status),
        "the namespaces": sorted(str(each.readlink()) for each in (folder / "ns").iterdir()),
        "the control group": (folder / "cgroup").read_text(),
        "the priority": os.getpriority(os.PRIO_PROCESS, process),
        "the scheduling policy": os.sched_getscheduler(process),
        "the out-of-memory score": (folder / "oom_score_adj").read_text(),
        "the process group or session": (os.getpgid(process), os.getsid(process)),
        "a capability or a filter": _lines(r"Cap\w*|NoNewPrivs|Seccomp\w*", status),
        "the security label": _label(folder),
        "the root folder": str((folder / "root").readlink()),
        "Python's executable": os.fsdecode(spawn.get_executable()),
    }


def _lines(names: str, status: str) -> list[str]:
    return re.findall(rf"^(?:{names}):.*", status, re.MULTILINE)


def _label(folder: Path) -> str:
    """Of SELinux, AppArmor and their like; "" without one."""
    try:
        return (folder / "attr/current").read_text().strip("\0\n")
    except OSError:
        return ""


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
    return int(re.findall(r"^Umask:\s*(\d+)", _status(), re.MULTILINE)[0], 8)


def traced() -> bool:
    """Whether a native debugger is at work."""
    return re.search(r"^TracerPid:\s*[1-9]", _status(), re.MULTILINE) is not None


def _status() -> str:
    return Path("/proc/self/status").read_text()


def limits() -> dict[int, tuple[int, int]]:
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
    limits: dict[int, tuple[int, int]] = field(default_factory=limits)
    ignored: set[int] = field(default_factory=_ignored)
    blocked: set[int] = field(default_factory=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    processors: set[int] = field(default_factory=lambda: os.sched_getaffinity(0))
    fixed: dict[str, Any] = field(default_factory=fixed)

    def check(self) -> None:
        """Raise `NotForkedError` where they cannot be given to this process."""
        here = fixed()
        if differ := [what for what, value in self.fixed.items() if here.get(what) != value]:
            raise NotForkedError(f"{differ[0]} is not as it was")
        check_environment(self.environ, self.folder)

    def give(self) -> None:
        """Make them this process's.  Raises `OSError` or `ValueError` where the system refuses."""
        for name in os.environ.keys() - self.environ.keys():
            del os.environ[name]
        for name, value in self.environ.items():
            if os.environ.get(name) != value:  # the rest stays where it is: setproctitle looks for it there
                os.environ[name] = value
        if (handlers := sys.modules.get("wsgiref.handlers")) is not None:
            handlers.BaseHandler.os_environ = handlers.read_environ()
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


_LIBRARIES = "LD_LIBRARY_PATH"
# Read by the loader of programs, by C and C++ libraries, by Python itself: where no Python code sees it.
_NATIVE = re.compile(
    "(LD|MALLOC|GLIBC|OMP|GOMP|KMP|MKL|OPENBLAS|GOTO|BLIS|DNNL|ONEDNN|TORCH|PYTORCH|ATEN|C10|CUDA|CUBLAS|CUBLASLT"
    "|CUDNN|CUFFT|CUSPARSE|NVIDIA|HIP|ROCR|HSA|NCCL|GLOO|LC|LANG|TZ|TMPDIR|HOME|PATH|SSL|OPENSSL|OPENCV|NPY|NUMPY"
    "|NUMBA|KINETO|GRPC|TQDM|NETWORKX)(_|$)|PYTHON|.*MALLOC"
)


def check_environment(now: Mapping[str, str], folder: str) -> None:
    """Raise `NotForkedError` where a process that begins with `now` in `folder` would import something else."""
    first, read = reads.first(), reads.names()
    if problem := threads.problem(first, now):
        raise NotForkedError(problem)
    known = {*threads.KNOWN, *reads.LATE, *reads.SET_BY}
    if not _new_libraries(first.get(_LIBRARIES, ""), now.get(_LIBRARIES, ""), folder):
        known.add(_LIBRARIES)
    names = {*_native(first, now), *read} - known
    if late := sorted(name for name in names if reads.at_import(name) != now.get(name)):
        raise NotForkedError(f"{', '.join(late)} changed after it may have been read")


def follow_environment(now: Mapping[str, str]) -> None:
    """Set what imports have set by variables that are others `now`.  Raises `NotForkedError`."""
    for name, apply in reads.SET_BY.items():
        if reads.at_import(name) != now.get(name):
            apply(now.get(name))
    threads.follow(reads.first(), now)


def read_otherwise(now: Mapping[str, str], read: Set[str]) -> list[str]:
    """Variables of which imports of a process that begins with `now` would read another value than this one's have.

    read: those that Python code has read.
    """
    first = reads.first()
    names = {*_native(first, now), *read, *((*first, *now) if reads.all_read_by else ())} - reads.LATE
    return sorted(name for name in names if first.get(name) != now.get(name))


def _native(*environments: Mapping[str, str]) -> set[str]:
    return {name for each in environments for name in each if _NATIVE.match(name)}


def _new_libraries(first: str, now: str, folder: str) -> bool:
    """Whether another search path finds other libraries: OpenCV adds a folder that pip does not make."""
    before, after = ({str(Path(folder, part)) for part in value.split(":") if value} for value in (first, now))
    found = (file.name for part in after - before for file in Path(part).glob("*.so*"))
    return bool(before - after) or any(re.search(r"\.so(\.\d+)*$", name) for name in found)
