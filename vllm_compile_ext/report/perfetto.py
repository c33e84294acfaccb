"""A start in the Chrome trace event format, for https://ui.perfetto.dev and chrome://tracing.

The format: "Trace Event Format" of the Chromium project.  Times are microseconds.  Complete events ("X") of one thread
have to nest, so spans that overlap, of threads, get threads of their own here.  Everything is in one file and stays on
this machine until someone opens it.
"""

from __future__ import annotations

from typing import Any

from vllm_compile_ext.record.read import Start

_MAIN = 1  # thread id of the outermost spans; others follow


def trace(start: Start, facts: dict[str, Any]) -> dict[str, Any]:
    """The file's content, from what `facts.facts` made of `start`; events are sorted by time, outer ones first."""
    head: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    threads: dict[str, tuple[int, int]] = {}
    for order, process in enumerate(facts["processes"]):
        pid = process["pid"]
        head.append(_about("process_name", pid, 0, {"name": f"{process['title']} ({pid})"}))
        head.append(_about("process_sort_index", pid, 0, {"sort_index": order}))
        tracks: list[list[int]] = []
        for span in sorted(process["spans"], key=lambda s: (s["at"], s["line"])):
            track = _track(tracks, _micro(span["at"]), _micro(span["at"] + span["seconds"]))
            threads[span["id"]] = pid, _MAIN + track
            events.append(_span(span, pid, _MAIN + track))
        for track in range(len(tracks)):
            name = "spans" if track == 0 else f"at the same time {track}"
            head.append(_about("thread_name", pid, _MAIN + track, {"name": name}))
    spans = {span["id"]: span for process in facts["processes"] for span in process["spans"]}
    for number, (key, span) in enumerate(spans.items(), start=1):
        outer = spans.get(span["parent"])
        if outer is not None and threads[outer["id"]][0] != threads[key][0]:
            events += _arrow(number, span, threads[outer["id"]], threads[key])
    first = facts["processes"][0]["pid"] if facts["processes"] else 0
    for mark in facts["marks"]:
        event = {"ph": "i", "s": "g", "name": mark["name"], "ts": _micro(mark["at"]), "pid": first, "tid": _MAIN}
        events.append(event | {"cat": "mark"})
    for note in facts["notes"]:
        event = {"ph": "i", "s": "p", "name": note["text"], "ts": _micro(note["at"]), "pid": note["pid"], "tid": _MAIN}
        events.append(event | {"cat": "note", "args": note["attrs"]})
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    about = {"start": start.id, "model": start.model, "trace": start.trace, "begin_unix_ns": start.begin}
    return {"traceEvents": head + events, "displayTimeUnit": "ms", "otherData": {k: str(v) for k, v in about.items()}}


def _track(tracks: list[list[int]], begin: int, end: int) -> int:
    """The first track in which begin to end nests; a track is the stack of the ends of what is open in it."""
    for number, stack in enumerate(tracks):
        while stack and stack[-1] <= begin:
            stack.pop()
        if not stack or end <= stack[-1]:
            stack.append(end)
            return number
    tracks.append([end])
    return len(tracks) - 1


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def _about(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _span(span: dict[str, Any], pid: int, tid: int) -> dict[str, Any]:
    args = dict(span["attrs"])
    args |= {"error": span["error"]} if span["error"] else {}
    args |= {"unfinished": True} if span["open"] else {}
    begin = _micro(span["at"])
    event = {"ph": "X", "name": span["name"], "cat": span["phase"], "ts": begin}
    return event | {"dur": _micro(span["at"] + span["seconds"]) - begin, "pid": pid, "tid": tid, "args": args}


def _arrow(number: int, span: dict[str, Any], source: tuple[int, int], to: tuple[int, int]) -> list[dict[str, Any]]:
    """From the span in the process that started another to what this one did first."""
    arrow = {"name": "started", "cat": "process", "id": number, "ts": _micro(span["at"])}
    return [
        arrow | {"ph": "s", "pid": source[0], "tid": source[1]},
        arrow | {"ph": "f", "bp": "e", "pid": to[0], "tid": to[1]},
    ]
