"""Starts as medians with their spread: a table, JSON; and the machine that they were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_compile_ext import __version__, versions
from vllm_compile_ext.cli.bench.starts import KINDS, SIDES, Figure, Kind, Side, Start


@dataclass(frozen=True)
class Summary:
    """One figure of the `count` starts of one kind and side: median, least and most, in seconds."""

    kind: Kind
    side: Side
    figure: str
    median: float
    least: float
    most: float
    count: int


def summaries(starts: Iterable[Start], figures: Sequence[Figure]) -> list[Summary]:
    """What there is, in the order of a table's rows and columns."""
    measured: dict[tuple[Kind, Side, str], list[float]] = {}
    for start in starts:
        for name, value in start.figures.items():
            measured.setdefault((start.kind, start.side, name), []).append(value)
    keys = [(kind, side, figure.name) for kind in KINDS for side in SIDES for figure in figures]
    return [
        Summary(*key, statistics.median(values), min(values), max(values), len(values))
        for key in keys
        if (values := measured.get(key))
    ]


def table(made: Iterable[Summary], figures: Sequence[Figure], title: str) -> Table:
    """A row for each kind and side; ours with its ratio to stock's start of the same kind."""
    found = {(each.kind, each.side, each.figure): each for each in made}
    grid = Table(title=title, title_justify="left", caption=machine(), caption_justify="left")
    grid.add_column("start", no_wrap=True)
    shown = [figure for figure in figures if any(name == figure.name for _, _, name in found)]
    for figure in shown:
        grid.add_column(figure.title, justify="right")
    for kind in KINDS:
        for side in SIDES:
            row = [found.get((kind, side, figure.name)) for figure in shown]
            stock = [found.get((kind, "stock", figure.name)) if side == "ours" else None for figure in shown]
            if any(row):
                grid.add_row(f"{side} {kind}", *map(cell, row, stock))
    return grid


def cell(own: Summary | None, stock: Summary | None) -> str:
    """Such as "12.3 s (12.1-12.9) 0.31x"."""
    if own is None:
        return "-"
    spread = f" ({seconds(own.least)}-{seconds(own.most)})" if own.count > 1 else ""
    ratio = f" {own.median / stock.median:.2f}x" if stock is not None and stock.median > 0 else ""
    return f"{seconds(own.median)} s{spread}{ratio}"


def seconds(value: float) -> str:
    """Enough digits to compare: "123.4", "1.23", "0.021"."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def as_json(starts: Sequence[Start], figures: Sequence[Figure], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "version": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **about,
        "figures": {figure.name: figure.meaning for figure in figures},
        "starts": [asdict(start) for start in starts],
        "summary": [asdict(each) for each in summaries(starts, figures)],
    }


def machine() -> str:
    """The machine and the versions, for a reader who compares two tables."""
    cores = len(os.sched_getaffinity(0))
    vllm = f"{versions.vllm_distribution()} {versions.vllm_version()}"
    return (
        f"{processor()}, {cores} cores; {platform.python_implementation()} {platform.python_version()}, "
        f"torch {metadata.version('torch')}, {vllm}, vllm-compile-ext {__version__}; {time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """The GPUs' names by nvidia-smi, or the processor's by /proc/cpuinfo, else the machine type."""
    if smi := shutil.which("nvidia-smi"):
        asked = [smi, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return ", ".join(done.stdout.strip().splitlines())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
