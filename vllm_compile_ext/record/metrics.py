"""What the processes of one vLLM count and measure about starting, at vLLM's ``/metrics``.

    metrics.inc("store_hits_total")
    metrics.inc("graphs_replayed_total", kind="FULL")
    metrics.set("startup_seconds", 4.2, phase="weights")

`METRICS` lists the names; each is exposed with `PREFIX`.  Whoever counts writes to memory-mapped files of the format
of `prometheus_client` in the folder that the processes share (`temporary`); whoever serves ``/metrics`` reads them
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

from vllm_compile_ext import harmless, temporary

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


def inc(name: str, amount: float = 1, **labels: str) -> None:
    """Add to a counter of `METRICS`."""
    _write(name, amount, labels, add=True)


def set(name: str, value: float, **labels: str) -> None:
    """Set a gauge of `METRICS`."""
    _write(name, value, labels, add=False)


_lock = threading.RLock()  # a finalizer may count in the middle of a count
_series: dict[tuple[str, ...], tuple[Any, str]] = {}  # name and values of the labels -> file, and key in it
_files: dict[str, Any] = {}
_folder: str | None = None  # the one that the files lie in
_over = False  # counting has failed
_warned = False


class _Mistake(Exception):  # noqa: N818 - its name is printed
    """The caller's, who is told in one line; other counts go on."""


def _write(name: str, value: float, labels: dict[str, str], *, add: bool) -> None:
    global _over, _folder
    try:
        with _lock:
            metric = _BY_NAME.get(name)
            if metric is None or labels.keys() != {*metric.labels} or (metric.kind == "counter") != add:
                kind = "counter" if add else "gauge"
                raise _Mistake(f"there is no {kind} {name} with the labels {', '.join(labels) or '(none)'}")
            folder = os.environ.get(temporary.RUN)
            if folder != _folder:
                _begin_anew()
                _folder = folder
            if not folder or _over or (add and not value > 0):
                return
            values = [str(labels[label])[:LETTERS] for label in metric.labels]
            file, key = _series.get((name, *values)) or _open(Path(folder), metric, values)
            # Not 0 at first where a process of the same number has ended.
            file.write_value(key, file.read_value(key)[0] + value if add else float(value), time.time())
    except Exception as error:
        _over = _over or not isinstance(error, _Mistake)
        _warn(error)


def _open(folder: Path, metric: Metric, values: list[str]) -> tuple[Any, str]:
    """The series of `metric` with these values of its labels; under the lock."""
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    if len(_series) >= SERIES:
        raise _Mistake(f"more than {SERIES} series: {metric.name} {values}")
    # The name of a file says how its values are put together (`prometheus_client/multiprocess.py`, 0.26).
    stem = {"counter": "counter", "sum": "gauge_livesum", "latest": "gauge_mostrecent"}[metric.kind]
    if stem not in _files:
        path = folder / f"{stem}_{os.getpid()}.db"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(handle, 0, SIZE)  # `OSError` now where the disk is full, and not SIGBUS later
        finally:
            os.close(handle)
        _files[stem] = MmapedDict(str(path))
    name = PREFIX + metric.name
    key = mmap_key(name.removesuffix("_total"), name, list(metric.labels), values, metric.help)
    made = _series[metric.name, *values] = _files[stem], key
    return made


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning("metrics are not complete: %s", harmless.error(error).lstrip("_"))
        logger.debug("metrics", exc_info=True)


def forget() -> None:
    """Begin anew: for a forked child, which has files and a process number of its own, and for tests."""
    global _lock
    _lock = threading.RLock()  # another thread may have held it
    _begin_anew()


def _begin_anew() -> None:
    global _over, _warned
    _series.clear()
    _files.clear()
    _over = _warned = False


os.register_at_fork(after_in_child=forget)


def collect() -> list[Any]:
    """What all processes have counted so far, as metrics of `prometheus_client`."""
    try:
        return list(_collect())
    except Exception as error:  # the rest of the page is vLLM's
        _warn(error)
        return []


def _collect() -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = temporary.run_folder()
    if folder is None:
        return
    found = list(MultiProcessCollector.merge([str(path) for path in sorted(folder.glob("*.db")) if _is_readable(path)]))
    yield from found
    seen = {metric.name for metric in found}
    for metric in METRICS:  # a rate needs a beginning
        name = (PREFIX + metric.name).removesuffix("_total")
        if metric.kind == "counter" and not metric.labels and name not in seen:
            yield CounterMetricFamily(name, metric.help, value=0)


def _is_readable(path: Path) -> bool:
    """Whether the file counts: gauges of processes that are gone do not, nor what such a process left damaged."""
    import psutil
    from prometheus_client.mmap_dict import MmapedDict

    try:
        list(MmapedDict.read_all_values_from_file(str(path)))
        return not path.name.startswith("gauge_live") or psutil.pid_exists(int(path.stem.rpartition("_")[2]))
    except Exception as error:
        logger.debug("%s is not read: %s", path, error)
        return False


def samples() -> dict[tuple[str, ...], float]:
    """What ``/metrics`` would show now: (name, value of each label) -> value; {} where nothing can be read."""
    return {
        (sample.name, *map(str, sample.labels.values())): float(sample.value)
        for metric in collect()
        for sample in metric.samples
    }


def with_ours(stock: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
    """For `prometheus_client.REGISTRY.collect` and `MultiProcessCollector.collect`: also what `collect` finds.

    With one API server a page is the registry.  With several (``PROMETHEUS_MULTIPROC_DIR`` is set then) it is what a
    `MultiProcessCollector` finds, one that is made for each request (`prometheus_fastapi_instrumentator` 8.1,
    `Instrumentator.expose`), and also one of vLLM's (0.32.0, `v1/metrics/prometheus.py: get_prometheus_registry`).
    """
    return lambda *args: [*stock(*args), *collect()]


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
