"""What the processes of one vLLM count and measure about starting, at vLLM's ``/metrics``.

    metrics.inc("store_hits_total")
    metrics.inc("graphs_replayed_total", kind="FULL")
    metrics.set("startup_seconds", 4.2, phase="weights")

`METRICS` lists the names; each is exposed with `PREFIX`.  Whoever counts writes to memory-mapped files of the format
of `prometheus_client` in the folder that the processes share (`run_folder`); whoever serves ``/metrics`` reads them
when it is asked: counters are added up over processes, the gauges as their table says.  Nothing here raises, waits
for another process, or is imported before the first count; the first failure costs one line and ends the counting.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_compile_ext import harmless, run_folder
from vllm_compile_ext.after_import import after_import

logger = logging.getLogger(__name__)

PREFIX = "vllm_compile_ext_"
SIZE = 1 << 16  # bytes of a process's file, made at once: a map of a file that cannot grow on a full disk kills
SERIES = 64  # at most in one file, each under 1 KiB
LETTERS = 64  # of a label's value


@dataclass(frozen=True)
class Metric:
    """One metric: its name without `PREFIX`, what it means, and the names of its labels.

    kind: "counter", added up over processes; "sum", a gauge that is added up over the processes that live; "latest", a
    gauge of which the value that was set last counts.
    """

    name: str
    kind: Literal["counter", "sum", "latest"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric(
        "startup_seconds",
        "latest",
        "Seconds that the start spent in a phase, from the start of the first process to ready.",
        ("phase",),
    ),
    Metric("store_hits_total", "counter", "Models whose compiled code was loaded from the store, on each rank."),
    Metric("store_misses_total", "counter", "Models for which the store had no compiled code, on each rank."),
    Metric("store_failures_total", "counter", "Models whose compiled code could not be kept, on each rank."),
    Metric("store_loaded_bytes_total", "counter", "Bytes of compiled code that were loaded from the store."),
    Metric("store_kept_bytes_total", "counter", "Bytes of compiled code that were kept in the store."),
    Metric("store_load_seconds_total", "counter", "Seconds that loading compiled code from the store took."),
    Metric("copies_refuted_total", "counter", "Models traced again in full, since a copied layer was not its trace."),
    Metric("pieces_compiled_total", "counter", "Distinct pieces of models that were compiled."),
    Metric(
        "pieces_loaded_total",
        "counter",
        "Distinct pieces of models that were loaded: with the whole model, or because another rank had compiled them.",
    ),
    Metric("functions_compiled_total", "counter", "Functions beside models that were compiled."),
    Metric("functions_loaded_total", "counter", "Functions beside models that were loaded from the store."),
    Metric("graphs_captured_total", "counter", "CUDA graphs that were captured on demand.", ("kind",)),
    Metric("graphs_replayed_total", "counter", "Steps that replayed a CUDA graph.", ("kind",)),
    Metric("graphs_missed_total", "counter", "Steps that ran without a CUDA graph which stock vLLM has.", ("kind",)),
    Metric(
        "graphs_skipped_total",
        "counter",
        "Shapes that have no CUDA graph for good: no memory, or it failed.",
        ("kind",),
    ),
    Metric("graph_capture_seconds_total", "counter", "Seconds that capturing CUDA graphs took."),
    Metric("graph_bytes", "sum", "Bytes of GPU memory that CUDA graphs take."),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def table() -> tuple[Metric, ...]:
    """All metrics that there are."""
    return METRICS


def inc(name: str, amount: float = 1, **labels: str) -> None:
    """Add to a counter of `METRICS`."""
    try:
        with _lock:
            series = _series.get((name, *labels.items())) or _open(name, labels, "counter")
            if series is not None and amount > 0:
                series.value += amount
                series.write(0.0)
    except Exception as error:
        _give_up(error)


def set(name: str, value: float, **labels: str) -> None:
    """Set a gauge of `METRICS`."""
    try:
        with _lock:
            series = _series.get((name, *labels.items())) or _open(name, labels, "gauge")
            if series is not None:
                series.value = float(value)
                series.write(time.time())
    except Exception as error:
        _give_up(error)


class _Series:
    """One line of ``/metrics``, as far as this process made it."""

    def __init__(self, file: Any, key: str) -> None:
        self.file, self.key = file, key
        self.value: float = file.read_value(key)[0]  # other than 0 where a process of the same number has ended

    def write(self, stamp: float) -> None:
        self.file.write_value(self.key, self.value, stamp)


_lock = threading.RLock()  # a finalizer may count in the middle of a count
_series: dict[tuple[Any, ...], _Series] = {}
_files: dict[str, Any] = {}
_over = False  # counting has failed
_told = False  # a warning was given


def _open(name: str, labels: dict[str, str], kind: str) -> _Series | None:
    """The series, where there is a place to count; under the lock."""
    folder = run_folder.folder()
    if folder is None or _over:
        return None
    metric = _BY_NAME.get(name)
    if metric is None or sorted(labels) != sorted(metric.labels) or (metric.kind == "counter") != (kind == "counter"):
        raise _UnknownError(f"there is no {kind} {name} with the labels {', '.join(labels) or '(none)'}")
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    # The name of a file says how its values are put together (`prometheus_client/multiprocess.py`, 0.26).
    stem = {"counter": "counter", "sum": "gauge_livesum", "latest": "gauge_mostrecent"}[metric.kind]
    if stem not in _files:
        path = folder / f"{stem}_{os.getpid()}.db"
        _reserve(path)
        _files[stem] = MmapedDict(str(path))
    values = [str(labels[label])[:LETTERS] for label in metric.labels]
    family = (PREFIX + name).removesuffix("_total")
    key = mmap_key(family, PREFIX + name, list(metric.labels), values, metric.help)
    made = next((each for each in _series.values() if each.key == key), None)
    if made is None:
        if len({each.key for each in _series.values()}) >= SERIES:
            raise _UnknownError(f"more than {SERIES} series: {name} {labels}")
        made = _Series(_files[stem], key)
    _series[(name, *labels.items())] = made  # also where the labels are in another order
    return made


class _UnknownError(Exception):
    """A mistake of the caller, who is told in one line; other counts go on."""


def _reserve(path: Path) -> None:
    """Make the file with all its blocks.  Raises `OSError` where the disk is full."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(handle, 0, SIZE)
    finally:
        os.close(handle)


def _give_up(error: Exception) -> None:
    global _over
    _over = _over or not isinstance(error, _UnknownError)
    _tell(error)


def _tell(error: Exception) -> None:
    global _told
    if not _told:
        _told = True
        logger.warning("metrics are not complete: %s", harmless.error(error).lstrip("_"))
        logger.debug("metrics", exc_info=True)


def forget() -> None:
    """Begin anew: for a forked child, which has files and a process number of its own, and for tests."""
    global _lock, _over, _told
    _lock = threading.RLock()
    _series.clear()
    _files.clear()
    _over = _told = False


os.register_at_fork(after_in_child=forget)


class Collector:
    """What all processes have counted so far, for a registry of `prometheus_client`."""

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        try:
            return list(_collect())
        except Exception as error:  # the rest of the page is vLLM's
            _tell(error)
            return ()


_collector = Collector()


def _collect() -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = run_folder.folder()
    if folder is None:
        return
    found = list(MultiProcessCollector.merge([str(path) for path in _readable(folder)]))
    yield from found
    seen = {metric.name for metric in found}
    for metric in METRICS:  # a rate needs a beginning
        name = (PREFIX + metric.name).removesuffix("_total")
        if metric.kind == "counter" and not metric.labels and name not in seen:
            yield CounterMetricFamily(name, metric.help, value=0)


def _readable(folder: Path) -> Iterator[Path]:
    """The files of the folder, without the gauges of processes that are gone and what such a process left damaged."""
    from prometheus_client.mmap_dict import MmapedDict

    for path in sorted(folder.glob("*.db")):
        try:
            if path.name.startswith("gauge_live") and not _lives(int(path.stem.rpartition("_")[2])):
                continue
            list(MmapedDict.read_all_values_from_file(str(path)))
        except Exception as error:
            logger.debug("%s is not read: %s", path, error)
            continue
        yield path


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def samples() -> dict[tuple[str, ...], float]:
    """What ``/metrics`` would show now: (name, value of each label) -> value; {} where nothing can be read."""
    return {
        (sample.name, *map(str, sample.labels.values())): float(sample.value)
        for metric in _collector.collect()
        for sample in metric.samples
    }


_undo: list[Callable[[], None]] = []


def expose() -> None:
    """Let ``/metrics`` show the metrics in this process, as soon as it has imported what a page is made of.

    With one API server the page is `prometheus_client.REGISTRY`.  With several (``PROMETHEUS_MULTIPROC_DIR`` is set
    then) it is what a `MultiProcessCollector` finds, one that is made for each request
    (`prometheus_fastapi_instrumentator` 8.1, `Instrumentator.expose`), and also one of vLLM's (0.32.0,
    `v1/metrics/prometheus.py: get_prometheus_registry`).
    """
    _undo.append(after_import("prometheus_client", _show))
    _undo.append(after_import("prometheus_client.multiprocess", _show_with_others))


def _show(prometheus_client: Any) -> None:
    prometheus_client.REGISTRY.register(_collector)
    _undo.append(lambda: prometheus_client.REGISTRY.unregister(_collector))


def _show_with_others(multiprocess: Any) -> None:
    theirs = multiprocess.MultiProcessCollector
    upstream = theirs.collect

    def collect(self: Any) -> list[Any]:
        return [*upstream(self), *_collector.collect()]

    theirs.collect = collect
    _undo.append(lambda: setattr(theirs, "collect", upstream))


def conceal() -> None:
    """Undo `expose`, and count no more in the files that are open."""
    while _undo:
        _undo.pop()()
    forget()


def markdown() -> str:
    """The table as the docs page."""
    rows = []
    for metric in METRICS:
        name = f"`{PREFIX}{metric.name}{{{', '.join(metric.labels)}}}`".replace("{}", "")
        kind = {"counter": "counter", "sum": "gauge, added up", "latest": "gauge"}[metric.kind]
        rows.append(f"| {name} | {kind} | {metric.help} |")
    return "\n".join([_PAGE, "| metric | kind | meaning |", "|---|---|---|", *rows]) + "\n"


_PAGE = """# Metrics

Made by `python -m vllm_compile_ext.record.metrics` from `vllm_compile_ext/record/metrics.py`; do not edit.

`vllm serve` shows these at `/metrics` beside vLLM's own. The engine and the workers count in memory-mapped files in a
private temporary folder, which the front end reads when the page is asked for: with `--api-server-count` every server
shows the same. Counters are those of all processes together and begin at 0 with each start of the server. `kind` of a
graph is `FULL` or `PIECEWISE`, as in vLLM. In a program that uses `vllm.LLM` they are in `prometheus_client.REGISTRY`.
"""


if __name__ == "__main__":
    print(markdown(), end="")
