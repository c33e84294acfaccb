"""The medians of one figure as bars, with the spread as a line: SVG by a few lines of our own, PNG by matplotlib."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from vllm_compile_ext.bench.figures import Summary, seconds

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, BETWEEN = 760, 110, 150, 64, 22, 4, 18
LINE = 120  # letters
COLORS = {"stock": "#9aa3ad", "ours": "#2f7ed8"}
TEXT, DARK = "#1f2328", "#e6edf3"
NEEDED = 'a PNG needs matplotlib: pip install "vllm-compile-ext[chart]", or name a file that ends in .svg'


class ChartError(ValueError):
    """There can be no such chart; the message says why."""


def check(path: Path) -> None:
    """Raises `ChartError` where no chart could be written to `path`: before hours are spent on measuring."""
    if path.suffix not in (".svg", ".png"):
        raise ChartError(f"a chart's file ends in .svg or .png, and {path.name} does not")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ChartError(NEEDED)


def write(path: Path, made: Sequence[Summary], title: str, captions: Sequence[str]) -> None:
    """Write the chart of summaries of one figure, with sentences below it.  Raises `OSError`."""
    below = [line for caption in captions for line in textwrap.wrap(caption, LINE)]
    path.write_bytes(png(made, title, below) if path.suffix == ".png" else svg(made, title, below).encode())


def axis(most: float) -> tuple[float, float]:
    """The end of an axis that holds `most`, and the step between its marks."""
    power = 10.0 ** (len(str(int(most))) - 1) if most >= 1 else 0.1
    while most / power < 1:
        power /= 10
    step = next(power * factor for factor in (0.2, 0.5, 1, 2, 5) if most / (power * factor) <= 6)
    count = int(most / step) + 1
    return count * step, step


def text(each: Summary) -> str:
    """What stands beside a bar."""
    return f"{seconds(each.median)} s" + (f" ({seconds(each.least)}-{seconds(each.most)})" if each.count > 1 else "")


def svg(made: Sequence[Summary], title: str, below: Sequence[str]) -> str:
    """The chart as SVG, for light and dark backgrounds."""
    end, step = axis(max((each.most for each in made), default=1.0))
    scale = (WIDTH - LEFT - RIGHT) / end
    parts, y = [], TOP
    for kind, group in groupby(made, key=lambda each: each.kind):
        parts.append(f'<text x="12" y="{y + BAR - 6}" class="kind">{escape(kind)}</text>')
        for each in group:
            x, middle = LEFT + each.median * scale, y + BAR / 2
            low, high = LEFT + each.least * scale, LEFT + each.most * scale
            parts.append(
                f'<text x="{LEFT - 8}" y="{y + BAR - 6}" class="side">{each.side}</text>'
                f'<rect x="{LEFT}" y="{y}" width="{max(1.0, x - LEFT):.1f}" height="{BAR}" rx="2" '
                f'fill="{COLORS[each.side]}"/>'
            )
            if each.count > 1:
                parts.append(
                    f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10" '
                    'class="spread"/>'
                )
            parts.append(f'<text x="{max(x, high) + 6:.1f}" y="{y + BAR - 6}">{escape(text(each))}</text>')
            y += BAR + GAP
        y += BETWEEN
    bottom = y - BETWEEN + 4
    marks = []
    for number in range(round(end / step) + 1):
        x = LEFT + number * step * scale
        marks.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom}" class="mark"/>')
        marks.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="tick">{number * step:g}</text>')
    height = bottom + 48 + 14 * len(below)
    small = [
        f'<text x="12" y="{bottom + 50 + 14 * n}" class="small">{escape(line)}</text>' for n, line in enumerate(below)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n'
        "<style>"
        f"text{{font:13px system-ui,sans-serif;fill:{TEXT}}}.title{{font-size:16px;font-weight:600}}"
        ".kind{font-weight:600}.side{text-anchor:end}.tick{text-anchor:middle;font-size:11px}.small{font-size:11px}"
        f".mark{{stroke:{TEXT};stroke-opacity:.12}}.spread{{stroke:{TEXT};fill:none;stroke-width:1.5}}"
        f"@media(prefers-color-scheme:dark){{text{{fill:{DARK}}}.mark,.spread{{stroke:{DARK}}}}}"
        "</style>\n"
        f'<text x="12" y="28" class="title">{escape(title)}</text>\n'
        + "\n".join([*marks, *parts])
        + f'\n<text x="{WIDTH - RIGHT}" y="{bottom + 32}" class="tick">seconds</text>\n'
        + "\n".join(small)
        + "\n</svg>\n"
    )


def png(made: Sequence[Summary], title: str, below: Sequence[str]) -> bytes:
    """The chart as PNG, by matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(made)), layout="constrained")
    for place, each in enumerate(made):
        spread = [[each.median - each.least], [each.most - each.median]] if each.count > 1 else None
        axes.barh(place, each.median, xerr=spread, color=COLORS[each.side], capsize=3)
        axes.annotate(text(each), (each.most, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(made)), [f"{each.kind}, {each.side}" for each in made])
    axes.invert_yaxis()
    axes.set_xlim(0, max((each.most for each in made), default=1.0) * 1.3)
    axes.set_xlabel("\n".join(["seconds", *below]), fontsize=8)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=144)
    pyplot.close(picture)
    return out.getvalue()
