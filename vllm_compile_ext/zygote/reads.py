"""Which environment variables Python code has read, and what to do where one is changed after that; given files.

Standard library only, and little of it: this is imported before anything else is.
"""

from __future__ import annotations

import os
import sys

from vllm_compile_ext.zygote import NotForkedError

TYPE_CHECKING = False  # of `typing`, which takes milliseconds to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_first: dict[str, str] | None = None  # the environment that the process began with
_read: dict[str, str | None] = {}  # what was read of it, at first
_files: list[str] = []
_stock: Any = None
all_read_by: set[str] = set()  # modules that have gone through all variables, and may have kept any


def watch() -> None:
    """Note each variable that is read from here on, present or not; and the files that the process was given."""
    global _first, _files
    if _stock is not None:
        return
    _first = dict(os.environ)
    if os.path.isdir("/proc/self/fd"):  # noqa: PTH112
        _files = os.listdir("/proc/self/fd")  # noqa: PTH208
    _read.clear()
    go_on()


def go_on() -> None:
    """Note again, after `stop`."""
    global _stock
    _stock = stock = type(os.environ).__getitem__

    def read(self: Any, key: str) -> str:
        frame: Any = sys._getframe(1)
        if frame.f_code.co_name == "__iter__":  # of `items`
            frame = frame.f_back
        beginning = _GO_THROUGH_ALL.get(frame.f_globals.get("__name__"))
        if beginning is not None and not key.startswith(beginning):
            return str(stock(self, key))
        try:
            found: str = stock(self, key)
        except KeyError:
            # Not what `setdefault` asks for: it reads what it has set, which it would find in the next process.
            if frame.f_code.co_name != "__contains__" or frame.f_back.f_code.co_name != "setdefault":
                _read.setdefault(key, None)
            raise
        _read.setdefault(key, found)
        return found

    def go_through(self: Any) -> Any:
        frame: Any = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "collections.abc":
            frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
        if name not in _GO_THROUGH_ALL and not name.startswith("vllm_compile_ext."):
            all_read_by.add(name)
        return _stock_iter(self)

    type(os.environ).__getitem__ = read  # type: ignore[method-assign]
    type(os.environ).__iter__ = go_through  # type: ignore[method-assign]


_stock_iter = type(os.environ).__iter__


def stop() -> None:
    """Note no more; what was noted stays.

    What imports have set themselves counts as read: for the libraries that they load next.  Not so what only the
    loader of a program reads.
    """
    global _stock
    if _stock is not None:
        type(os.environ).__getitem__ = _stock  # type: ignore[method-assign]
        type(os.environ).__iter__ = _stock_iter  # type: ignore[method-assign]
        _stock = None
        for name, value in os.environ.items():
            if value != first().get(name) and not name.startswith("LD_"):
                _read.setdefault(name, value)


def given_files() -> list[int]:
    """Open files, beside the standard streams, that whoever started the process has left it; a spawned one has none."""
    return [int(file) for file in _files if int(file) > 2 and _is_given(int(file))]


def set_given(files: Iterable[int]) -> None:
    """The files that the process stands for was given; it was given none itself."""
    global _files
    _files = [str(file) for file in files]


def _is_given(file: int) -> bool:
    try:
        return os.get_inheritable(file)  # what Python itself opens is not
    except OSError:
        return False


def first() -> dict[str, str]:
    """The environment that the process began with, which C code has seen.  Raises `NotForkedError`: nobody watched."""
    if _first is None:
        raise NotForkedError("nobody noted what its imports read of the environment")
    return _first


def is_watching() -> bool:
    return _stock is not None


def names() -> set[str]:
    """The variables that Python code has read."""
    return set(_read)


def at_import(name: str) -> str | None:
    """What imports have seen of a variable: what was first read, else what the process began with."""
    return _read[name] if name in _read else first().get(name)


# Modules that go through all variables when they are imported, and how those begin whose values they take.  `platform`
# hands all to the command `file`; what wsgiref keeps of them is given anew (`surroundings`).
_GO_THROUGH_ALL = {
    "tqdm.utils": "TQDM_",
    "networkx.utils.backends": "NETWORKX_",
    "platform": "\0",
    "wsgiref.handlers": "\0",
}


def _compile_threads(value: str | None) -> None:
    from torch._inductor import config

    config.compile_threads = config.decide_compile_threads()


def _dynamic_threads(value: str | None) -> None:
    from torch._inductor import config

    config.cpp.dynamic_threads = value == "1"


def _metrics_of_many(value: str | None) -> None:
    from prometheus_client import REGISTRY, metrics, values

    if any(isinstance(each, metrics.MetricWrapperBase) for each in REGISTRY._collector_to_names):
        raise NotForkedError("PROMETHEUS_MULTIPROC_DIR was set after metrics were made")
    values.ValueClass = values.get_value_class()


# Read anew by whoever uses them, or, the last two, set by whoever reads them and finds nothing (torch, TileLang).
LATE = frozenset(
    (
        *(
            "VLLM_WORKER_MULTIPROC_METHOD",
            "TRACEPARENT",
            "traceparent",
            "_VLLM_COMPILE_EXT_START",
            "_VLLM_COMPILE_EXT_RUN",
            "TORCHINDUCTOR_CACHE_DIR",
        ),
        *("TRITON_CACHE_AUTOTUNING", "TILELANG_CLEANUP_TEMP_FILES"),
    )
)
# Read when a module is imported, which then sets something (torch/_inductor/config.py, 2.13 and 2.14;
# prometheus_client/values.py, 0.22): sets it again.
SET_BY: dict[str, Callable[[str | None], None]] = {
    "PROMETHEUS_MULTIPROC_DIR": _metrics_of_many,
    "TORCHINDUCTOR_COMPILE_THREADS": _compile_threads,
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": _dynamic_threads,
}
