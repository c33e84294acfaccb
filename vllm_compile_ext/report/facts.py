"""What every form of the report shows of a start, as plain tables that JSON can hold.

Times are seconds after the start's beginning.  The terminal, the page and ``--json`` are made from this, so that they
cannot disagree.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from typing import Any

from vllm_compile_ext.record import phases
from vllm_compile_ext.record.phases import Breakdown, Tree
from vllm_compile_ext.record.read import Process, Span, Start
from vllm_compile_ext.report import alive, words

FORMAT = 1


def facts(start: Start, other: Start | None = None) -> dict[str, Any]:
    """All that is known of `start`; with `other`, an earlier one, each phase has its seconds there too."""
    tree = Tree(start)
    whole = phases.breakdown(start)
    base = start.begin
    named = titles(start)
    models = len({str(note.attrs["model"]) for note in start.notes if "model" in note.attrs}) > 1
    alone = phases.by_process(start)
    found: dict[str, Any] = {
        "format": FORMAT,
        **summary(start),
        "file": str(start.path) if start.path else None,
        "trace": start.trace,
        "wall": seconds(whole.end - whole.begin),
        "coverage": round(whole.coverage, 4),
        "skipped": start.skipped,
        "options": clean(start.options),
        "versions": clean(start.versions),
        "machine": clean(start.machine),
        "phases": _rows(whole, phases.breakdown(other) if other else None),
        "other": summary(other) if other else None,
        "path": _path(whole, base),
        "processes": [],
        "notes": [
            {"at": seconds(note.time - base), "process": named.get(note.pid, ""), "pid": note.pid, "name": note.name}
            | {"text": words.note(note, models=models), "attrs": clean(note.attrs)}
            for note in start.notes
        ],
        "marks": [
            {"at": seconds(time - base), "name": name}
            for name, time in (("ready", start.ready), ("first token", start.first_token))
            if time is not None
        ],
    }
    for process in start.processes:
        rows = [
            {"phase": r.phase, "seconds": round(r.seconds, 6), "share": round(r.share, 6)} for r in alone[process.pid]
        ]
        found["processes"].append(
            {
                "pid": process.pid,
                "ppid": process.ppid,
                "kind": process.kind,
                "title": named[process.pid],
                "name": "" if process.name in (process.kind, named[process.pid]) else process.name,
                "rank": process.rank,
                "host": process.host,
                "argv": list(process.argv),
                "phases": rows,
                "spans": _spans(tree, process),
                "exit": next((gone.error or "" for gone in start.exits if gone.pid == process.pid), None),
            }
        )
    return found


def summary(start: Start) -> dict[str, Any]:
    """A start as a line of the listing.  outcome: ready, failed, running, or unfinished for one that was killed.

    died: what a start that is not ready did last, or does now; `since`: for how many seconds.
    """
    gone = phases.death(start)
    runs = start.ready is None and not start.failed and alive.running(start)
    died = None
    if gone is not None and (gone.span is not None or gone.error is not None):
        died = {
            "phase": gone.phase,
            "span": gone.span.name if gone.span else None,
            "process": titles(start).get(gone.process.pid) if gone.process else None,
            "error": gone.error,
            "since": round(time.time() - gone.span.start / 1e9, 3) if runs and gone.span else None,
        }
    return {
        "id": start.id,
        "model": start.model,
        "time": round(start.begin / 1e9, 3),
        "outcome": "ready"
        if start.ready is not None
        else "failed"
        if start.failed
        else "running"
        if runs
        else "unfinished",
        "temperature": start.temperature,
        "seconds": None if start.seconds is None else round(start.seconds, 6),
        "died": died,
    }


def seconds(ns: int) -> float:
    return round(ns / 1e9, 6)


def clean(value: Any) -> Any:
    """`value` as JSON has it: a number that is none (a damaged file may hold one) becomes text."""
    if isinstance(value, dict):
        return {str(name): clean(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _rows(whole: Breakdown, other: Breakdown | None) -> list[dict[str, Any]]:
    first: dict[str, int] = {}
    for segment in whole.segments:
        first.setdefault(segment.phase, segment.begin)
    shares = {row.phase: row.share for row in whole.rows}
    differences = phases.compare(other or whole, whole)
    return [
        {
            "phase": row.phase,
            "seconds": None if row.new is None else round(row.new, 6),
            "share": round(shares.get(row.phase, 0.0), 6),
            "other": None if other is None or row.old is None else round(row.old, 6),
            "change": None if other is None else round(row.seconds, 6),
        }
        for row in differences
    ]


def _path(whole: Breakdown, base: int) -> list[list[Any]]:
    """What the start waited for: from when, how long, which phase; neighbours of one phase are one."""
    found = []
    for phase, segments in itertools.groupby(whole.segments, key=lambda segment: segment.phase):
        run = list(segments)
        begin, end = seconds(run[0].begin - base), seconds(run[-1].end - base)
        found.append([begin, round(end - begin, 6), phase])
    return found


def titles(start: Start) -> dict[int, str]:
    """What each process is called, by its pid; of processes that would be called alike the name or pid is added."""
    alike = Counter(process.title for process in start.processes)
    return {
        process.pid: process.title if alike[process.title] == 1 else f"{process.title} {process.name or process.pid}"
        for process in start.processes
    }


def _spans(tree: Tree, process: Process) -> list[dict[str, Any]]:
    """The spans of a process and the line of its lane that each is drawn in: below the one it is part of.

    Those of threads that run at the same time are put below each other.
    """
    found = []
    free: dict[int, int] = defaultdict(int)  # line -> until when it is taken
    line_of: dict[str, int] = {}
    base = tree.start.begin
    for span in sorted((s for s in tree.start.spans if s.pid == process.pid), key=lambda s: (s.start, tree.depth(s))):
        outer = tree.around(span)
        line = line_of[outer.id] + 1 if outer is not None and outer.id in line_of else 0
        while free[line] > span.start:
            line += 1
        free[line] = tree.end(span)
        line_of[span.id] = line
        found.append(_span(tree, span, line, base))
    return found


def _span(tree: Tree, span: Span, line: int, base: int) -> dict[str, Any]:
    # Both ends are rounded, so that what nests does so in microseconds too.
    begin, end = seconds(span.start - base), seconds(tree.end(span) - base)
    return {
        "id": span.id,
        "parent": span.parent,
        "name": span.name,
        "phase": tree.phase(span),
        "at": begin,
        "seconds": round(end - begin, 6),
        "line": line,
        "waits": tree.waits(span),
        "open": span.end is None,
        "error": span.error,
        "attrs": clean({name: value for name, value in span.attrs.items() if name not in ("phase", "wait")}),
    }
