"""Starts as medians with their spread: a table, JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from vllm_compile_ext.bench.starts import KINDS, SIDES, Figure, Kind, Side, Start


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
    measured, made = list(starts), []
    for kind in KINDS:
        for side in SIDES:
            for figure in figures:
                of_these = (start.figures for start in measured if (start.kind, start.side) == (kind, side))
                values = [found[figure.name] for found in of_these if figure.name in found]
                if values:
                    middle = statistics.median(values)
                    made.append(Summary(kind, side, figure.name, middle, min(values), max(values), len(values)))
    return made


def find(made: Iterable[Summary], kind: Kind, side: Side, figure: str) -> Summary | None:
    """One of them."""
    return next((each for each in made if (each.kind, each.side, each.figure) == (kind, side, figure)), None)


def table(made: Sequence[Summary], figures: Sequence[Figure], title: str) -> Table:
    """A row for each kind and side; ours with its ratio to stock's start of the same kind."""
    shown = [figure for figure in figures if any(each.figure == figure.name for each in made)]
    grid = Table(title=title, title_justify="left", caption_justify="left")
    grid.add_column("start", no_wrap=True)
    for figure in shown:
        grid.add_column(figure.title, justify="right")
    for kind in KINDS:
        for side in SIDES:
            found = [find(made, kind, side, figure.name) for figure in shown]
            if any(found):
                stock = [find(made, kind, "stock", figure.name) if side == "ours" else None for figure in shown]
                grid.add_row(f"{side} {kind}", *map(cell, found, stock))
    return grid


def cell(own: Summary | None, stock: Summary | None) -> str:
    """Such as "12.3 s (12.1-12.9) 0.31x"."""
    if own is None:
        return "-"
    parts = [f"{seconds(own.median)} s"]
    if own.count > 1:
        parts.append(f"({seconds(own.least)}-{seconds(own.most)})")
    if stock is not None and stock.median > 0:
        parts.append(f"{own.median / stock.median:.2f}x")
    return " ".join(parts)


def seconds(value: float) -> str:
    """Enough digits to compare: "123.4", "1.23", "0.021"."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def as_json(starts: Sequence[Start], figures: Sequence[Figure], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "version": 1,
        **about,
        "figures": {figure.name: figure.meaning for figure in figures},
        "starts": [vars(start) for start in starts],
        "summary": [vars(each) for each in summaries(starts, figures)],
    }
