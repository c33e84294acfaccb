"""A start on a terminal: phases as a table, and what each process did as bars under one clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from vllm_compile_ext.harmless import plain
from vllm_compile_ext.record.phases import PHASES
from vllm_compile_ext.record.read import OTHER
from vllm_compile_ext.report.facts import comparison, death, grouped, longest, outcome
from vllm_compile_ext.report.formats import ago, cell, change, count, date, duration, percent, verdict

LINES = 4  # of a process's lane
BAR = 18  # characters of the longest phase: the table fits into 80
VERDICTS = {"better": "green", "worse": "red", "": ""}


def show(out: Console, facts: dict[str, Any]) -> None:
    """Print the whole report."""
    headline(out, facts)
    out.print()
    out.print(phase_table(facts))
    out.print()
    lanes(out, facts)
    notes(out, facts)
    differences(out, facts)
    out.print()
    unread = f"{count(facts['skipped'], 'line')} of the file could not be read; " if facts["skipped"] else ""
    out.print(f"{unread}{percent(facts['coverage'])} of the time is inside named phases", style="dim", soft_wrap=True)


def show_two(out: Console, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Print two starts side by side; `new` was made with `old` as the other one."""
    for name, facts in (("A", old), ("B", new)):
        out.print(f"{name} ", end="", style="bold")
        headline(out, facts)
    out.print()
    out.print(phase_table(new, before="A", now="B"))
    differences(out, new)


def headline(out: Console, facts: dict[str, Any]) -> None:
    words = [f"{duration(facts['seconds'])} to ready" if facts["seconds"] is not None else outcome(facts)]
    words += [f"{facts['temperature']} start"] if facts["temperature"] else []
    words += filter(None, [comparison(facts)])
    style = "red" if facts["outcome"] == "failed" else ""
    title = Text(plain(facts["model"]) or "unknown model", style="bold")
    out.print(title + Text(plain("  " + ", ".join(words)), style=style), soft_wrap=True)
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    out.print(plain(f"{facts['id']}  {date(facts['time'])}  {versions}"), style="dim", soft_wrap=True)
    if died := facts["died"]:
        text = death(died) + (f": {died['error']}" if died["error"] else "")
        out.print(plain(text), style="bold" if facts["outcome"] == "running" else "bold red", soft_wrap=True)


def phase_table(facts: dict[str, Any], before: str = "before", now: str = "now") -> Table:
    """Seconds, share and bar of each phase; with another start its seconds too, called `before`, and its bar."""
    other = facts["other"]
    table = _table(Column("phase", no_wrap=True), *([before, now] if other else ["seconds"]), "share")
    for name in ("change", "ratio") if other else ():
        table.add_column(name, justify="right")
    table.add_column(no_wrap=True, overflow="crop")

    def numbers(a: float | None, b: float | None, share: float) -> list[Text | str]:
        cells: list[Text | str] = [cell(b), "-" if b is None else percent(share)]
        if not other:
            return cells
        difference = (b or 0.0) - (a or 0.0)
        ratio = f"{b / a:.2f}x" if a and b is not None and a >= 0.005 else "-"
        return [cell(a), *cells, Text(change(difference), style=VERDICTS[verdict(difference)]), ratio]

    scale = BAR / longest(facts)
    for row in facts["phases"]:
        a, b, colour = row["other"], row["seconds"], _colour(row["phase"])
        bars = _bars(a if other else b, b, scale, colour)
        table.add_row(Text("■ ", style=colour) + plain(row["phase"]), *numbers(a, b, row["share"]), bars)
    table.add_row("total", *numbers(other and other["wall"], facts["wall"], 1.0), style="bold")
    if other:
        table.caption = f"Bars: {before} is the upper half, {now} the lower."
        table.caption_justify = "left"
    return table


def lanes(out: Console, facts: dict[str, Any]) -> None:
    """Print one lane for each process, all under one clock: its spans, and below each its parts."""
    wall, width = facts["wall"], max(40, min(out.width, 160))
    if not wall:
        return
    out.print(_clock(wall, width), style="dim")
    for process in facts["processes"]:
        spans = [span for span in process["spans"] if span["at"] < wall]
        if spans:
            out.print(Text(plain(f"{process['title']} ({process['pid']})"), style="bold"))
        for line in range(min(LINES, 1 + max((span["line"] for span in spans), default=-1))):
            bars = _lane((span for span in spans if span["line"] == line), wall, width)
            out.print(bars, no_wrap=True, crop=True)


def notes(out: Console, facts: dict[str, Any]) -> None:
    """Print what was compiled, loaded and captured, once where several processes say the same."""
    if facts["notes"]:
        out.print()
    for note, processes in grouped(facts["notes"]):
        out.print(Text.assemble(plain(note["text"]), (f"  {plain(processes)}", "dim")), soft_wrap=True)
    if any(note["attrs"].get("changes") for note in facts["notes"] if note["name"] == "miss"):
        out.print("All that differs: --html or --json, or vllm-compile-ext explain miss", style="dim")


def differences(out: Console, facts: dict[str, Any]) -> None:
    for title, rows in facts["different"].items():
        if rows:
            out.print()
            out.print(f"{title} that differ from {facts['other']['id']}", style="bold")
        for name, old, new in rows:
            out.print(plain(f"  {name}: {old} -> {new}"), soft_wrap=True)


def listing(lines: Iterable[dict[str, Any]]) -> Table:
    """Recorded starts, one a line."""
    table = _table(Column("start", no_wrap=True), Column("when", no_wrap=True), Column("model", overflow="fold"))
    table.add_column(no_wrap=True)
    table.add_column("to ready", justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    for line in lines:
        taken = "-" if line["seconds"] is None else duration(line["seconds"])
        how = Text(plain(outcome(line)), style="red" if line["outcome"] == "failed" else "")
        # The end of a path or of a repository's name is what tells models apart.
        model = plain(line["model"].rstrip("/").rpartition("/")[2]) or "?"
        table.add_row(line["id"], f"{ago(line['time'])} ago", model, line["temperature"] or "-", taken, how)
    return table


def _table(*columns: Column | str) -> Table:
    """Without lines; a column that is only named holds numbers."""
    made = (column if isinstance(column, Column) else Column(column, justify="right") for column in columns)
    return Table(*made, box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _colour(phase: str) -> str:
    return PHASES.get(phase, PHASES[OTHER])[1]


def _bars(a: float | None, b: float | None, scale: float, colour: str) -> Text:
    """Two bars in one line of half blocks, which can be told apart without colours."""
    one, two = round((a or 0.0) * scale), round((b or 0.0) * scale)
    text = Text("█" * min(one, two) + "▄" * (two - one), style=colour)
    text.append("▀" * (one - two), style="#808080")
    return text or Text("▏" if a or b else "", style=colour)


def _lane(spans: Iterable[dict[str, Any]], wall: float, width: int) -> Text:
    """A line of bars with their names in them, where there is room."""
    text = Text()
    for span in sorted(spans, key=lambda span: span["at"]):
        left = max(len(text), round(span["at"] / wall * width))
        right = min(width, round((span["at"] + span["seconds"]) / wall * width))
        if right <= left:
            continue
        room = right - left - 1
        name = plain(span["name"])
        label = name if len(name) <= room else name[: room - 1] + "…" if room > 3 else ""
        bar = ("!" if span["error"] or span["open"] else "▏") + label.ljust(room, "╌" if span["waits"] else " ")
        colour = _colour(span["phase"])
        text.append(" " * (left - len(text)))
        text.append(bar, style=Style(color=colour) if span["waits"] else Style(color="#101010", bgcolor=colour))
    return text


def _clock(wall: float, width: int) -> Text:
    """Seconds above the lanes."""
    steps = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
    step = next((step for step in steps if wall / step * 9 < width), wall)
    text = Text()
    for number in range(int(wall / step) + 1):
        at, label = round(number * step / wall * width), f"{number * step:g} s"
        if at >= len(text) and at + len(label) < width:
            text.append(" " * (at - len(text)) + label)
    return text
