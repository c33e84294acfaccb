"""What the report shows of a start, as plain tables that JSON can hold; times are seconds after the start's beginning.

The terminal, the page, the Chrome trace and ``--json`` are made from this alone, so they cannot disagree.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import psutil

from vllm_compile_ext.record import phases
from vllm_compile_ext.record.phases import Breakdown
from vllm_compile_ext.record.read import Note, Process, Start
from vllm_compile_ext.report.formats import date, duration

COMPARED = ("versions", "options", "machine")


def facts(start: Start, other: Start | None = None) -> dict[str, Any]:
    """Everything known of `start`; with `other`, an earlier one, also each phase's seconds there and what differs."""
    whole = phases.breakdown(start)
    before = phases.breakdown(other) if other else None
    rows = phases.by_process(start)
    names = titles(start)
    exits = {end.pid: end.error or "" for end in start.exits}

    def at(moment: int) -> float:
        return round((moment - whole.begin) / 1e9, 6)

    def process_facts(process: Process) -> dict[str, Any]:
        title = names[process.pid]
        return {
            **{name: getattr(process, name) for name in ("pid", "ppid", "kind", "rank", "host", "argv")},
            "title": title,
            "name": "" if process.name in (process.kind, title) else process.name,
            "phases": [row._asdict() for row in rows[process.pid]],
            "spans": _spans(start, process.pid, at),
            "exit": exits.get(process.pid),
        }

    return {
        **summary(start),
        "file": str(start.path) if start.path else None,
        "trace": start.trace,
        "wall": whole.seconds,
        "coverage": whole.coverage,
        "skipped": start.skipped,
        **{name: getattr(start, name) for name in COMPARED},
        "phases": _phases(whole, before),
        "other": summary(other) | {"wall": before.seconds} if other and before else None,
        "different": {name: _different(getattr(other or start, name), getattr(start, name)) for name in COMPARED},
        "path": _path(whole, at),
        "processes": [process_facts(process) for process in start.processes],
        "notes": [
            {"at": at(note.time), "process": names.get(note.pid, ""), "pid": note.pid, "name": note.name, **_note(note)}
            for note in start.notes
        ],
        "marks": [
            {"at": at(moment), "name": name}
            for name, moment in (("ready", start.ready), ("first token", start.first_token))
            if moment is not None
        ],
    }


def summary(start: Start) -> dict[str, Any]:
    """A start as a line of the listing.  outcome: ready, failed, running, or unfinished for one that was killed.

    died: what a start that is not ready did last, or does now; `since`: for how many seconds.
    """
    outcome = "ready" if start.ready is not None else "failed" if start.failed else "unfinished"
    if outcome == "unfinished" and _is_running(start):
        outcome = "running"
    end, died = phases.death(start), None
    if end is not None and (end.span is not None or end.error is not None):
        died = {
            "phase": end.phase,
            "span": end.span.name if end.span else None,
            "process": titles(start).get(end.process.pid) if end.process else None,
            "error": end.error,
            "since": time.time() - end.span.start / 1e9 if end.span and outcome == "running" else None,
        }
    return {
        "id": start.id,
        "model": start.model,
        "time": start.begin / 1e9,
        "outcome": outcome,
        "temperature": start.temperature,
        "seconds": start.seconds,
        "died": died,
    }


def outcome(line: dict[str, Any]) -> str:
    """How a start went: "ready", "failed in weights", "still running", "killed in compile"."""
    word = {"running": "still", "unfinished": "killed"}.get(line["outcome"], line["outcome"])
    if died := line["died"]:
        return f"{word} in {died['phase']}"
    return "still running" if word == "still" else word


def death(died: dict[str, Any]) -> str:
    """Where a start that did not get ready ended, or where it is, in a sentence without the error."""
    where = f"in the phase {died['phase']}" + (f" ({died['span']})" if died["span"] else "")
    where += f" of {died['process']}" if died["process"] else ""
    if died["since"] is not None:
        return f"It is {where}, for {duration(died['since'])} now"
    return f"It ended {where}" + ("" if died["error"] else ", and said nothing of an error: it was killed")


def comparison(facts: dict[str, Any]) -> str:
    """Such as "17.4 s faster than the cold start of 2026-11-18 11:06"; "" where there is nothing to compare."""
    other = facts["other"]
    if other is None or other["seconds"] is None or facts["seconds"] is None:
        return ""
    change = facts["seconds"] - other["seconds"]
    how = "as fast as" if abs(change) < 0.05 else f"{duration(abs(change))} {'faster' if change < 0 else 'slower'} than"
    return f"{how} the {other['temperature'] or 'earlier'} start of {date(other['time'])}"


def longest(facts: dict[str, Any]) -> float:
    """The seconds of the longest phase of either start, for the scale of bars; never 0."""
    return max((row[name] or 0.0 for row in facts["phases"] for name in ("seconds", "other")), default=0.0) or 1.0


def grouped(notes: Iterable[dict[str, Any]], attribute: str | None = None) -> list[tuple[dict[str, Any], str]]:
    """Notes without repetition, each with the titles of all processes that made it.

    Equal are notes with the same value of `attribute`, or without it those with the same text.
    """
    groups: dict[str, tuple[dict[str, Any], dict[str, None]]] = {}
    for note in notes:
        value = note["attrs"].get(attribute) if attribute else (note["text"], note["attrs"].get("changes"))
        groups.setdefault(str(value), (note, {}))[1][note["process"]] = None
    return [(note, ", ".join(filter(None, titles))) for note, titles in groups.values()]


def titles(start: Start) -> dict[int, str]:
    """The titles of processes by pid; a title that several have is followed by the name or pid."""
    counts = Counter(process.title for process in start.processes)
    return {
        process.pid: process.title if counts[process.title] == 1 else f"{process.title} {process.name or process.pid}"
        for process in start.processes
    }


def _is_running(start: Start) -> bool:
    """Whether a process that recorded it is there, on this machine, and has not said that it ends."""
    ended = {end.pid for end in start.exits}
    for process in start.processes:
        if process.pid not in ended and process.host == os.uname().nodename:
            with suppress(psutil.Error, ValueError):
                found = psutil.Process(process.pid)
                # Numbers are used again, so the time of its beginning has to agree: within 2 s, by two clocks.
                if found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - process.start / 1e9) < 2:
                    return True
    return False


def _phases(whole: Breakdown, before: Breakdown | None) -> list[dict[str, Any]]:
    shares = {row.phase: row.share for row in whole.rows}
    rows: list[dict[str, Any]] = []
    for phase, old, new in phases.compare(before or whole, whole):
        row = {"phase": phase, "seconds": new, "share": shares.get(phase, 0.0), "other": None, "change": None}
        rows.append(row | {"other": old, "change": (new or 0.0) - (old or 0.0)} if before else row)
    return rows


def _path(whole: Breakdown, at: Callable[[int], float]) -> list[list[Any]]:
    """What the start waited for, in order: from when, how many seconds, which phase."""
    found = []
    for phase, segments in itertools.groupby(whole.segments, key=lambda segment: segment.phase):
        run = list(segments)
        begin, end = at(run[0].begin), at(run[-1].end)
        found.append([begin, round(end - begin, 6), phase])
    return found


def _spans(start: Start, pid: int, at: Callable[[int], float]) -> list[dict[str, Any]]:
    """The spans of a process, each with its line in the timeline: below its parent, and below what overlaps it."""
    found = []
    taken: dict[int, int] = defaultdict(int)  # line -> the end of its last span
    lines: dict[str, int] = {}
    for span in sorted((s for s in start.spans if s.pid == pid), key=lambda s: (s.start, s.depth)):
        line = lines.get(span.parent or "", -1) + 1
        while taken[line] > span.start:
            line += 1
        taken[line] = start.end(span)
        lines[span.id] = line
        # Both ends are rounded, so that what nests does so in microseconds too.
        begin, end = at(span.start), at(start.end(span))
        found.append(
            {
                "id": span.id,
                "parent": span.parent,
                "name": span.name,
                "phase": span.phase,
                "at": begin,
                "seconds": round(end - begin, 6),
                "line": line,
                "waits": span.waits,
                "open": span.end is None,
                "error": span.error,
                "attrs": {name: value for name, value in span.attrs.items() if name not in ("phase", "wait")},
            }
        )
    return found


def _note(note: Note) -> dict[str, Any]:
    """The text of a note, which is the line that was logged (else its name and attributes), and its attributes.

    A miss always has `changes`, the differences from the closest entry as rows: name, stored, now.
    """
    attrs = {name: value for name, value in note.attrs.items() if name != "line"}
    text = str(note.attrs.get("line") or f"{note.name}: " + ", ".join(f"{name} {attrs[name]}" for name in attrs))
    if note.name == "miss":
        rows = attrs.get("changes")
        rows = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []  # what a file says
        attrs["changes"] = [["unset" if value is None else str(value) for value in row] for row in rows]
    return {"text": text, "attrs": attrs}


def _different(old: dict[str, Any], new: dict[str, Any]) -> list[list[str]]:
    """The differences between two flat tables as rows: name, old, new."""
    rows = ([name, str(old.get(name, "unset")), str(new.get(name, "unset"))] for name in sorted({*old, *new}))
    return [row for row in rows if row[1] != row[2]]
