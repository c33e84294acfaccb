"""A start on a terminal: phases as a table, and what each process did as bars under one clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from vllm_compile_ext.report.words import ago, changes, count, date, death, different, duration, outcome, plain

LINES = 4  # of a process's lane
_BAR = 24  # characters of a share of 100 %
_NARROWEST = 40

# By their family: Python, processes, the model, compiling, memory, graphs, serving.
COLOURS = {
    "interpreter": "#79a7e8",
    "imports": "#4d8ae0",
    "config": "#8fb8d8",
    "plugin": "#5aa7c8",
    "spawn": "#9aa4b2",
    "distributed": "#7d93c9",
    "model construction": "#6fbf8b",
    "weights": "#3fa66a",
    "compile": "#f0a33c",
    "load compiled code": "#f2c35a",
    "memory profiling": "#b58be0",
    "kv cache": "#9a74d0",
    "warm-up": "#d08bd0",
    "graph capture": "#e8718d",
    "api server": "#45b8ac",
    "first request": "#7cc9c0",
}
_ELSE = "#b0b0b0"
_BEFORE = "#808080"


def show(out: Console, facts: dict[str, Any], other: dict[str, Any] | None = None) -> None:
    """Print the whole report; `other`: the facts of the start that it is compared with."""
    headline(out, facts)
    out.print()
    out.print(phases(facts))
    out.print()
    lanes(out, facts)
    _notes(out, facts)
    if other is not None:
        differences(out, other, facts)
    hints = []
    if facts["skipped"]:
        hints.append(f"{count(facts['skipped'], 'line')} of the file could not be read")
    if facts["wall"]:
        hints.append(f"{facts['coverage']:.1%} of the time is inside named phases")
    out.print()
    out.print("; ".join(hints), style="dim", soft_wrap=True)


def headline(out: Console, facts: dict[str, Any]) -> None:
    words = [duration(facts["seconds"]) + " to ready" if facts["seconds"] is not None else outcome(facts)]
    words += [f"{facts['temperature']} start"] if facts["temperature"] else []
    title = Text(plain(facts["model"]) or "unknown model", style="bold")
    out.print(
        title + Text("  " + ", ".join(words), style="red" if facts["outcome"] == "failed" else ""), soft_wrap=True
    )
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    out.print(plain(f"{facts['id']}  {date(facts['time'])}  {versions}"), style="dim", soft_wrap=True)
    if facts["died"]:
        style = "bold" if facts["outcome"] == "running" else "bold red"
        out.print(plain(death(facts["died"])), style=style, soft_wrap=True)


def phases(facts: dict[str, Any]) -> Table:
    """Seconds and share by phase; with another start, its seconds and the difference."""
    other = facts["other"]
    columns = [Column("phase", no_wrap=True), Column("seconds", justify="right"), Column("share", justify="right")]
    if other:
        columns += [Column(_short(other["id"]), justify="right"), Column("change", justify="right")]
    table = Table(*columns, "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in facts["phases"]:
        taken = row["seconds"]
        cells: list[Text | str] = [_name(row["phase"])]
        cells += [_number(taken), "-" if taken is None else f"{row['share']:.1%}"]
        cells += [_number(row["other"]), _change(row["change"])] if other else []
        width = round(row["share"] * _BAR * 8)
        table.add_row(*cells, Text(_blocks(width), style=_colour(row["phase"])))
    total: list[Text | str] = [Text("total", style="bold"), Text(_number(facts["wall"]), style="bold"), ""]
    if other:
        before = sum(row["other"] or 0.0 for row in facts["phases"])
        total += [_number(before), _change(facts["wall"] - before)]
    table.add_row(*total, "")
    return table


def comparison(out: Console, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Two starts side by side; `new` was made with `old` as the other one."""
    for mark, facts in (("A", old), ("B", new)):
        out.print(f"{mark} ", end="", style="bold")
        headline(out, facts)
    out.print()
    widest = max((max(row["seconds"] or 0, row["other"] or 0) for row in new["phases"]), default=0) or 1.0
    table = Table(
        Column("phase", no_wrap=True),
        *(Column(name, justify="right") for name in ("A", "B", "B - A", "B / A")),
        "",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for row in new["phases"]:
        a, b = row["other"], row["seconds"]
        bars = _pair((a or 0.0) / widest, (b or 0.0) / widest, _colour(row["phase"]))
        table.add_row(_name(row["phase"]), _number(a), _number(b), _change(row["change"]), _ratio(a, b), bars)
    before, after = sum(row["other"] or 0.0 for row in new["phases"]), new["wall"]
    cells = (_number(before), _number(after), _change(after - before).plain, _ratio(before, after))
    table.add_row("total", *cells, "", style="bold")
    out.print(table)
    out.print("Bars: A is the upper half, B the lower.", style="dim")
    differences(out, old, new)


def differences(out: Console, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Print in what versions, options and machines two starts do not agree."""
    for title in ("versions", "options", "machine"):
        differ = different(old[title], new[title])
        if differ:
            out.print()
            out.print(f"{title} that differ from {old['id']}", style="bold")
            for key, one, two in differ:
                out.print(plain(f"  {key}: {one} -> {two}"), soft_wrap=True)


def lanes(out: Console, facts: dict[str, Any]) -> None:
    """One lane for each process, all under one clock: its spans, below each what it consists of."""
    width = max(_NARROWEST, min(out.width, 160))
    wall = facts["wall"]
    if not wall:
        return
    out.print(_clock(wall, width), style="dim")
    for process in facts["processes"]:
        spans = [span for span in process["spans"] if span["at"] < wall]
        if not spans:
            continue
        out.print(Text(plain(f"{process['title']} ({process['pid']})"), style="bold"))
        for line in range(min(LINES, 1 + max(span["line"] for span in spans))):
            out.print(_lane([span for span in spans if span["line"] == line], wall, width), no_wrap=True, crop=True)


def _lane(spans: Iterable[dict[str, Any]], wall: float, width: int) -> Text:
    """A line of bars with their names in them, where there is room."""
    text = Text()
    for span in sorted(spans, key=lambda span: span["at"]):
        left = round(span["at"] / wall * width)
        right = min(width, round((span["at"] + span["seconds"]) / wall * width))
        left = max(left, len(text))
        if right <= left:
            continue
        text.append(" " * (left - len(text)))
        room = right - left - 1
        name = plain(span["name"])
        label = name if len(name) <= room else name[: room - 1] + "…" if room > 3 else ""
        mark = "!" if span["error"] or span["open"] else "▏"
        if span["waits"]:
            text.append(mark + label.ljust(room, "╌"), style=_colour(span["phase"]))
        else:
            text.append(mark + label.ljust(room), style=Style(color="#101010", bgcolor=_colour(span["phase"])))
    return text


def _clock(wall: float, width: int) -> Text:
    """Seconds above the lanes."""
    step = next(
        (s for s in (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600) if wall / s * 9 < width), wall
    )
    text = Text()
    number = 0
    while number * step <= wall:
        at = round(number * step / wall * width)
        label = f"{number * step:g} s"
        if at >= len(text) and at + len(label) < width:
            text.append(" " * (at - len(text)) + label)
        number += 1
    return text


def _notes(out: Console, facts: dict[str, Any]) -> None:
    """What was compiled, loaded and captured; what several ranks say is said once."""
    seen: dict[str, list[str]] = {}
    for note in facts["notes"]:
        seen.setdefault(note["text"], []).append(note["process"])
    if seen:
        out.print()
    for text, processes in seen.items():
        who = ", ".join(dict.fromkeys(name for name in processes if name))
        out.print(Text.assemble(plain(text), (f"  {plain(who)}", "dim")), soft_wrap=True)
    for note in facts["notes"]:
        rows = changes(note["attrs"]) if note["name"] == "miss" else []
        if len(rows) > 3:
            out.print("All that differs: --html or --json, or vllm-compile-ext explain miss", style="dim")
            return


def listing(lines: Iterable[dict[str, Any]]) -> Table:
    """Recorded starts, one a line."""
    table = Table(
        Column("start", no_wrap=True),
        Column("when", no_wrap=True),
        Column("model", overflow="fold"),
        Column("", no_wrap=True),
        Column("to ready", justify="right", no_wrap=True),
        Column("outcome", overflow="fold"),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for line in lines:
        taken = "-" if line["seconds"] is None else duration(line["seconds"])
        how = Text(plain(outcome(line)), style="red" if line["outcome"] == "failed" else "")
        # The end of a path or of a repository's name is what tells models apart.
        model = plain(line["model"].rstrip("/").rpartition("/")[2]) or "?"
        table.add_row(line["id"], f"{ago(line['time'])} ago", model, line["temperature"] or "-", taken, how)
    return table


def _short(name: str) -> str:
    """An id's date and time, without its random part: "1118-110640"."""
    parts = name.split("-")
    return f"{parts[0][4:]}-{parts[1]}" if len(parts) == 3 and len(parts[0]) == 8 else name[:16]


def _name(phase: str) -> Text:
    return Text.assemble(("■ ", _colour(phase)), plain(phase))


def _colour(phase: str) -> str:
    return COLOURS.get(phase, _ELSE)


def _number(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


def _change(seconds: float | None) -> Text:
    if seconds is None:
        return Text("-")
    if abs(seconds) < 0.005:  # as much as is shown
        return Text("0.00")
    return Text(f"{seconds:+.2f}", style="green" if seconds < 0 else "red")


def _ratio(a: float | None, b: float | None) -> str:
    return f"{b / a:.2f}x" if a and b is not None and a >= 0.005 else "-"


def _pair(a: float, b: float, colour: str) -> Text:
    """Two bars in one line, of shares of the widest: half blocks, which can be told apart without colours."""
    one, two = round(a * _BAR), round(b * _BAR)
    parts = (
        ("█" * min(one, two), Style(color=colour)),
        ("▀" * (one - two), Style(color=_BEFORE)),
        ("▄" * (two - one), Style(color=colour)),
    )
    return Text.assemble(*(part for part in parts if part[0]))


def _blocks(eighths: int) -> str:
    """A bar of so many eighths of a character."""
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
