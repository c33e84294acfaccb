"""A start in the Chrome trace event format, for https://ui.perfetto.dev and chrome://tracing.

The format: "Trace Event Format" of the Chromium project.  Times are microseconds.  Complete events ("X") of one thread
have to nest, so spans that overlap, of threads, get threads of their own here.  Everything is in one file and stays on
this machine until someone opens it.
"""

from __future__ import annotations

from typing import Any

MAIN = 1  # thread id of the outermost spans; others follow


def trace(facts: dict[str, Any]) -> dict[str, Any]:
    """The file's content, from `facts.facts`; events are sorted by time, outer ones first."""
    heads: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    threads: dict[str, dict[str, int]] = {}  # by span: its pid and tid
    for order, process in enumerate(facts["processes"]):
        pid = process["pid"]
        heads.append(_head("process_name", pid, 0, {"name": f"{process['title']} ({pid})"}))
        heads.append(_head("process_sort_index", pid, 0, {"sort_index": order}))
        tracks: list[list[int]] = []
        for span in sorted(process["spans"], key=lambda span: (span["at"], span["line"])):
            begin, end = _micro(span["at"]), _micro(span["at"] + span["seconds"])
            threads[span["id"]] = {"pid": pid, "tid": MAIN + _track(tracks, begin, end)}
            args = span["attrs"] | ({"error": span["error"]} if span["error"] else {})
            args |= {"unfinished": True} if span["open"] else {}
            event = {"ph": "X", "name": span["name"], "cat": span["phase"], "ts": begin, "dur": end - begin}
            events.append(event | threads[span["id"]] | {"args": args})
        for track in range(len(tracks)):
            name = f"at the same time {track}" if track else "spans"
            heads.append(_head("thread_name", pid, MAIN + track, {"name": name}))

    spans = [span for process in facts["processes"] for span in process["spans"]]
    for number, span in enumerate(spans, start=1):
        source, target = threads.get(span["parent"]), threads[span["id"]]
        if source is not None and source["pid"] != target["pid"]:
            arrow = {"name": "started", "cat": "process", "id": number, "ts": _micro(span["at"])}
            events += [arrow | source | {"ph": "s"}, arrow | target | {"ph": "f", "bp": "e"}]
    first = facts["processes"][0]["pid"] if facts["processes"] else 0
    for mark in facts["marks"]:
        events.append(_instant("mark", mark["name"], mark["at"], first) | {"s": "g"})
    for note in facts["notes"]:
        events.append(_instant("note", note["text"], note["at"], note["pid"]) | {"s": "p", "args": note["attrs"]})

    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    about = {"start": facts["id"], "model": facts["model"], "trace": facts["trace"], "begin_unix_s": facts["time"]}
    return {"traceEvents": heads + events, "displayTimeUnit": "ms", "otherData": about}


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


def _head(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _instant(kind: str, name: str, at: float, pid: int) -> dict[str, Any]:
    return {"ph": "i", "cat": kind, "name": name, "ts": _micro(at), "pid": pid, "tid": MAIN}
