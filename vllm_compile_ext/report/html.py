"""A start as one page: a file that needs no network and no framework, and that shows its tables without JavaScript too.

Every text that comes from the record is escaped: `_Html.text` for the tables, `_script_data` for what the script reads.
The policy in the page's head allows the page's own script, by its digest, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from vllm_compile_ext import __version__
from vllm_compile_ext.report.words import changes, date, death, different, duration, outcome, size

_NONE = "\N{EN DASH}"
_PLACE = re.compile(r"\{\{([a-z]+)\}\}")


def page(facts: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The whole file, from `facts.facts`; with those of an earlier start, also what differs in versions and options."""
    script = _template("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    model = facts["model"] or "unknown model"
    parts = {
        "policy": f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:",
        "title": escape(f"{model}: start {facts['id']}"),
        "style": _template("page.css"),
        "headline": _headline(facts, model),
        "tiles": _tiles(facts),
        "sections": "\n".join(
            section
            for section in (
                _phases(facts),
                _said(facts),
                _cache(facts),
                _processes(facts),
                _spans(),
                _about(facts, other),
            )
            if section
        ),
        "footer": escape(f"Made by vllm-compile-ext {__version__} from {facts['file'] or facts['id']}"),
        "data": _script_data({name: facts[name] for name in ("processes", "path", "marks", "wall")}),
        "script": script,
    }
    # In one pass: a model may be called {{script}}.
    return _PLACE.sub(lambda match: parts[match[1]], _template("page.html"))


def _template(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script_data(value: Any) -> str:
    """JSON that neither ends the script element nor begins a comment in it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _headline(facts: dict[str, Any], model: str) -> str:
    kind = {"ready": "good", "failed": "bad", "unfinished": "bad"}.get(facts["outcome"], "")
    badges = [f'<span class="badge {kind}">{escape(outcome(facts))}</span>']
    if facts["temperature"]:
        badges.append(f'<span class="badge">{escape(facts["temperature"])} start</span>')
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    lines = [f"<h1>{escape(model)} {' '.join(badges)}</h1>"]
    lines.append(f'<p class="muted">{escape(date(facts["time"]))} · {escape(facts["id"])} · {escape(versions)}</p>')
    if facts["died"]:
        said, _, error = (
            death(facts["died"]).partition(": ") if facts["died"]["error"] else (death(facts["died"]), "", "")
        )
        detail = f"<code>{escape(error)}</code>" if error else ""
        kind = "banner now" if facts["outcome"] == "running" else "banner"
        lines.append(f'<div class="{kind}" role="alert"><strong>{escape(said)}</strong>{detail}</div>')
    return "\n".join(lines)


def _tiles(facts: dict[str, Any]) -> str:
    other = facts["other"]
    tiles = []
    if facts["seconds"] is not None:
        note = ""
        if other and other["seconds"] is not None:
            note = _against(facts["seconds"] - other["seconds"]) + f" {escape(_called(other))}"
        tiles.append(("Time to ready", duration(facts["seconds"]), note))
    else:
        tiles.append(("Recorded", duration(facts["wall"]), escape(outcome(facts))))
    longest = max(facts["phases"], key=lambda row: row["seconds"] or 0.0, default=None)
    if longest and longest["seconds"]:
        tiles.append(("Longest phase", longest["phase"], f"{duration(longest['seconds'])}, {longest['share']:.0%}"))
    compiled = sum(
        row["seconds"] or 0.0 for row in facts["phases"] if row["phase"] in ("compile", "load compiled code")
    )
    how = {"cold": "compiled", "warm": "loaded from the store"}.get(facts["temperature"], "")
    if compiled or how:
        tiles.append(("Compiling or loading", duration(compiled), how))
    first = next((mark["at"] for mark in facts["marks"] if mark["name"] == "first token"), None)
    if first is not None and facts["seconds"] is not None:
        tiles.append(("First token", duration(first), f"{duration(max(0.0, first - facts['seconds']))} after ready"))
    tiles.append(("In named phases", f"{facts['coverage']:.1%}", f"of {duration(facts['wall'])}"))
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="big">{escape(value)}</dd>'
        f'<dd class="muted">{note}</dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _against(change: float) -> str:
    if abs(change) < 0.05:
        return "as"
    kind, word = ("better", "faster") if change < 0 else ("worse", "slower")
    return f'<span class="{kind}">{escape(duration(abs(change)))} {word}</span> than'


def _called(other: dict[str, Any]) -> str:
    how = f"{other['temperature']} " if other["temperature"] else ""
    return f"the {how}start of {date(other['time'])}"


def _phases(facts: dict[str, Any]) -> str:
    other = facts["other"]
    most = max((max(row["seconds"] or 0, row["other"] or 0) for row in facts["phases"]), default=0) or 1.0
    head = [("Phase", "name"), ("Seconds", "num"), ("Share", "num wide" if other else "num")]
    head += [("Before", "num"), ("Change", "num")] if other else []
    rows = []
    for row in facts["phases"]:
        taken, before = row["seconds"] or 0.0, row["other"] or 0.0
        bars = f'<span class="share"><i style="width:{taken / most:.2%}"></i></span>'
        if other:
            bars += f'<span class="share before"><i style="width:{before / most:.2%}"></i></span>'
        bars = f'<div class="bars" aria-hidden="true">{bars}</div>'
        name = escape(row["phase"])
        button = f'<button type="button" data-phase="{name}">{name}</button>'
        cells = f'<td class="name"><div><span class="label"><i class="swatch"></i>{button}</span>{bars}</div></td>'
        cells += f'<td class="num">{_number(row["seconds"])}</td>'
        cells += f'<td class="{head[2][1]}">{_NONE if row["seconds"] is None else format(row["share"], ".1%")}</td>'
        if other:
            cells += f'<td class="num">{_number(row["other"])}</td><td class="num">{_change(row["change"])}</td>'
        rows.append(f'<tr style="--c:{_colour(row["phase"])}">{cells}</tr>')
    total = f'<td>Total</td><td class="num">{_number(facts["wall"])}</td><td class="{head[2][1]}"></td>'
    if other:
        before = sum(row["other"] or 0.0 for row in facts["phases"])
        total += f'<td class="num">{_number(before)}</td><td class="num">{_change(facts["wall"] - before)}</td>'
    about = "Each instant belongs to what the start waited for, so the rows add up to the wall time. A click filters."
    if other:
        about += f" Before: {_called(other)}, {other['id']}; the thin bars are its own."
    table = f'<table class="phases">{_head(head)}<tbody>{"".join(rows)}</tbody><tfoot><tr>{total}</tr></tfoot></table>'
    return _section("Phases", f'<p class="muted">{escape(about)}</p>{table}')


def _said(facts: dict[str, Any]) -> str:
    """What was compiled, loaded, kept, captured; what several ranks say is one line."""
    lines: dict[str, tuple[float, list[str]]] = {}
    for note in facts["notes"]:
        if note["name"] not in ("key", "miss"):
            lines.setdefault(note["text"], (note["at"], []))[1].append(note["process"])
    if not lines:
        return _section("Compiled, loaded, captured", '<p class="muted">Nothing was compiled, loaded or captured.</p>')
    items = "".join(
        f'<li><span class="at">{duration(at)}</span> {escape(text)}'
        f'<span class="tag">{escape(_names(names))}</span></li>'
        for text, (at, names) in lines.items()
    )
    return _section("Compiled, loaded, captured", f'<ul class="said">{items}</ul>')


def _cache(facts: dict[str, Any]) -> str:
    """The keys, and why what was looked for was not there."""
    keys: dict[str, list[str]] = {}
    misses: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for note in facts["notes"]:
        if note["name"] == "key" and note["attrs"].get("key"):
            keys.setdefault(str(note["attrs"]["key"]), []).append(str(note["attrs"].get("shard") or note["process"]))
        elif note["name"] == "miss":
            named = json.dumps([note["text"], note["attrs"].get("changes")], sort_keys=True)
            misses.setdefault(named, (note, []))[1].append(note["process"])
    if not keys and not misses:
        return ""
    parts = [
        f'<p>Key <code>{escape(key)}</code><span class="tag">{escape(_names(of))}</span></p>'
        for key, of in keys.items()
    ]
    for note, of in misses.values():
        parts.append(f'<h3>{escape(note["text"])}<span class="tag">{escape(_names(of))}</span></h3>')
        if note["attrs"].get("closest"):
            parts.append(f"<p>The closest entry has the key <code>{escape(str(note['attrs']['closest']))}</code></p>")
        rows = changes(note["attrs"])
        if rows:
            cells = _rows((("", name), ("stored", old), ("now", new)) for name, old, new in rows)
            head = _head([("What differs", ""), ("Stored", ""), ("Now", "")])
            parts.append(f'<table class="stack">{head}<tbody>{cells}</tbody></table>')
    if not misses:
        parts.append("<p>Nothing was missed: the store had all that this start looked for.</p>")
    return _section("Cache key and misses", "".join(parts))


def _processes(facts: dict[str, Any]) -> str:
    parts = []
    for process in facts["processes"]:
        busy = sum(row["seconds"] for row in process["phases"])
        strip = "".join(
            f'<i style="width:{row["share"]:.3%};--c:{_colour(row["phase"])}" '
            f'title="{escape(row["phase"])}: {escape(duration(row["seconds"]))}"></i>'
            for row in process["phases"]
        )
        longest = sorted(process["phases"], key=lambda row: -row["seconds"])[:4]
        said = ", ".join(f"{row['phase']} {duration(row['seconds'])}" for row in longest)
        about = f"{process['name']} pid {process['pid']}" + (f" on {process['host']}" if process["host"] else "")
        about += f", {duration(busy)} recorded"
        parts.append(
            f'<h3>{escape(process["title"])}<span class="tag">{escape(about.lstrip())}</span></h3>'
            f'<div class="strip" aria-hidden="true">{strip}</div><p class="muted">{escape(said)}</p>'
        )
        # Python's own line says nothing about a process that it forked or spawned.
        if process["argv"] and "--multiprocessing-fork" not in process["argv"]:
            parts.append(f"<p><code>{escape(' '.join(process['argv']))}</code></p>")
        if process["exit"]:
            parts.append(f'<p class="worse">Ended with <code>{escape(process["exit"])}</code></p>')
    head = '<p class="muted">Each process for itself, whatever the others did; the strips are as long as the start.</p>'
    return _section("Processes", head + "".join(parts)) if parts else ""


def _spans() -> str:
    head = _head([("Span", ""), ("Phase", "wide"), ("Process", ""), ("From", "num wide"), ("Took", "num")])
    table = f'<p id="spans-count" class="muted"></p><table id="spans">{head}<tbody></tbody></table>'
    about = "<summary>All spans, the longest first; the filter of the timeline applies</summary>"
    return _section("Spans", f"<details>{about}{table}</details>")


def _about(facts: dict[str, Any], other: dict[str, Any] | None) -> str:
    parts = []
    for title in ("versions", "machine", "options"):
        if facts[title]:
            cells = _rows((("", name), ("", _plain(name, value))) for name, value in facts[title].items())
            cells = cells.replace("<tr><td>", '<tr><th scope="row">').replace("</td><td>", "</th><td>")
            parts.append(f'<div><h3>{title.capitalize()}</h3><table class="facts"><tbody>{cells}</tbody></table></div>')
    differ = ""
    if other is not None:
        rows = [row for title in ("versions", "options", "machine") for row in different(other[title], facts[title])]
        if rows:
            cells = _rows((("", name), ("before", old), ("now", new)) for name, old, new in rows)
            head = _head([("What differs from the other start", ""), ("Before", ""), ("Now", "")])
            differ = f'<table class="stack">{head}<tbody>{cells}</tbody></table>'
    trace = f'<p class="muted">Trace {escape(facts["trace"])}</p>' if facts["trace"] else ""
    if facts["skipped"]:
        trace += f'<p class="muted">{facts["skipped"]} lines of the file could not be read.</p>'
    return _section("Versions and options", f'{differ}<div class="columns">{"".join(parts)}</div>{trace}')


def _section(title: str, content: str) -> str:
    name = "h-" + re.sub("[^a-z]+", "-", title.lower())
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'


def _head(columns: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in columns)
    return f"<thead><tr>{cells}</tr></thead>"


def _rows(rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Cells with the name that a phone shows before the value."""
    found = []
    for row in rows:
        cells = (
            f"<td{f' data-name={chr(34)}{name}{chr(34)}' if name else ''}>{escape(text)}</td>" for name, text in row
        )
        found.append(f"<tr>{''.join(cells)}</tr>")
    return "".join(found)


def _plain(name: str, value: Any) -> str:
    if name == "memory" and isinstance(value, int):
        return size(value)
    return value if isinstance(value, str) else json.dumps(value)


def _names(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name))


def _colour(phase: str) -> str:
    return f"var(--p-{re.sub('[^a-z]+', '-', phase)}, var(--p-other))"


def _number(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{seconds:.2f}"


def _change(seconds: float | None) -> str:
    if seconds is None or abs(seconds) < 0.005:
        return _NONE if seconds is None else "0.00"
    sign = "\N{MINUS SIGN}" if seconds < 0 else "+"
    return f'<span class="{"better" if seconds < 0 else "worse"}">{sign}{abs(seconds):.2f}</span>'
