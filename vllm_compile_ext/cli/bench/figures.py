"""Starts as medians with their spread: a table, JSON, a chart; and the machine that they were measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table

from vllm_compile_ext import __version__, versions
from vllm_compile_ext.cli.bench.starts import KINDS, SIDES, Start

COLOURS = {"stock": "#9aa3ad", "ours": "#2f7ed8"}
CAPTION = 120  # letters of a line below the chart


@dataclass(frozen=True)
class Summary:
    """One figure of the `count` starts of one kind and side: median, least and most, in seconds."""

    kind: str
    side: str
    figure: str
    median: float
    least: float
    most: float
    count: int

    def __str__(self) -> str:
        """Such as "12.3 s (12.1-12.9)"."""
        spread = f" ({seconds(self.least)}-{seconds(self.most)})" if self.count > 1 else ""
        return f"{seconds(self.median)} s{spread}"


def seconds(value: float) -> str:
    """Enough digits to compare: "123.4", "1.23", "0.021"."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def summaries(starts: Iterable[Start], figures: Iterable[str]) -> list[Summary]:
    """What there is, in the order of a table's rows and columns."""
    measured: dict[tuple[str, str, str], list[float]] = {}
    for start in starts:
        for name, value in start.figures.items():
            measured.setdefault((start.kind, start.side, name), []).append(value)
    keys = [(kind, side, figure) for kind in KINDS for side in SIDES for figure in figures]
    return [
        Summary(*key, statistics.median(values), min(values), max(values), len(values))
        for key in keys
        if (values := measured.get(key))
    ]


def table(made: Iterable[Summary], titles: Mapping[str, str], title: str) -> Table:
    """A row for each kind and side, a column for each figure that there is; ours as a ratio to stock's same kind."""
    found = {(each.kind, each.side, each.figure): each for each in made}
    grid = Table(title=title, title_justify="left", caption=machine(), caption_justify="left")
    grid.add_column("start", no_wrap=True)
    shown = [figure for figure in titles if any(each.figure == figure for each in found.values())]
    for figure in shown:
        grid.add_column(titles[figure], justify="right")
    for kind in KINDS:
        for side in SIDES:
            row = [found.get((kind, side, figure)) for figure in shown]
            stock = [found.get((kind, "stock", figure)) if side == "ours" else None for figure in shown]
            if any(row):
                grid.add_row(f"{side} {kind}", *map(cell, row, stock))
    return grid


def cell(own: Summary | None, stock: Summary | None) -> str:
    """Such as "12.3 s (12.1-12.9) 0.31x"."""
    if own is None:
        return "-"
    return f"{own} {own.median / stock.median:.2f}x" if stock is not None and stock.median > 0 else str(own)


def draw(path: Path, made: Sequence[Summary], title: str, captions: Sequence[str]) -> None:
    """Write one figure's medians as bars, with the spread as a line and sentences below, to an .svg or a .png.

    Raises `OSError`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    below = [line for caption in captions for line in textwrap.wrap(caption, CAPTION)]
    # A model's name may hold $, and the text of an SVG is to be found by searching.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.4 + 0.42 * len(made)), layout="constrained")
        axes = figure.subplots()
        for place, each in enumerate(made):
            spread = [[each.median - each.least], [each.most - each.median]] if each.count > 1 else None
            axes.barh(place, each.median, xerr=spread, color=COLOURS[each.side], capsize=3)
            axes.annotate(str(each), (each.most, place), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(made)), [f"{each.kind}, {each.side}" for each in made])
        axes.invert_yaxis()
        axes.set_xlim(0, max((each.most for each in made), default=1.0) * 1.3)
        axes.set_xlabel("\n".join(["seconds", *below]), fontsize=8)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=144)


def machine() -> str:
    """Machine, versions, and whether vLLM remembers memory profiles, for a reader who compares two tables."""
    plan = "with VLLM_ENABLE_STARTUP_PLAN=1; " if os.environ.get("VLLM_ENABLE_STARTUP_PLAN") == "1" else ""
    cores = len(os.sched_getaffinity(0))
    vllm = f"{versions.vllm_distribution()} {versions.vllm_version()}"
    return (
        f"{processor()}, {cores} cores; {platform.python_implementation()} {platform.python_version()}, "
        f"torch {metadata.version('torch')}, {vllm}, vllm-compile-ext {__version__}; {plan}{time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """The GPUs' names by nvidia-smi, or the processor's by /proc/cpuinfo, else the machine type."""
    if smi := shutil.which("nvidia-smi"):
        asked = [smi, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return ", ".join(done.stdout.strip().splitlines())
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
