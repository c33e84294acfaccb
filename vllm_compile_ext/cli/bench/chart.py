"""The medians of one figure as bars, with the spread as a line: drawn by matplotlib, as SVG or PNG."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vllm_compile_ext.cli.bench.figures import Summary, seconds

COLOURS = {"stock": "#9aa3ad", "ours": "#2f7ed8"}
LINE = 120  # letters of a caption
NEEDED = 'a chart needs matplotlib: pip install "vllm-compile-ext[chart]"'


class ChartError(ValueError):
    """There can be no such chart; the message says why."""


def check(path: Path) -> None:
    """Raises `ChartError` where no chart could be written to `path`: before hours are spent on measuring."""
    if path.suffix not in (".svg", ".png"):
        raise ChartError(f"a chart's file ends in .svg or .png, and {path.name} does not")
    if importlib.util.find_spec("matplotlib") is None:
        raise ChartError(NEEDED)


def write(path: Path, made: Sequence[Summary], title: str, captions: Sequence[str]) -> None:
    """Write the chart of summaries of one figure, with sentences below it.  Raises `OSError`."""
    import matplotlib
    from matplotlib.figure import Figure

    below = [line for caption in captions for line in textwrap.wrap(caption, LINE)]
    # A model's name may hold $, and the text of an SVG is to be found by searching.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.4 + 0.42 * len(made)), layout="constrained")
        axes = figure.subplots()
        for place, each in enumerate(made):
            spread = [[each.median - each.least], [each.most - each.median]] if each.count > 1 else None
            axes.barh(place, each.median, xerr=spread, color=COLOURS[each.side], capsize=3)
            text = f"{seconds(each.median)} s"
            text += f" ({seconds(each.least)}-{seconds(each.most)})" if each.count > 1 else ""
            axes.annotate(text, (each.most, place), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(made)), [f"{each.kind}, {each.side}" for each in made])
        axes.invert_yaxis()
        axes.set_xlim(0, max((each.most for each in made), default=1.0) * 1.3)
        axes.set_xlabel("\n".join(["seconds", *below]), fontsize=8)
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=144)
