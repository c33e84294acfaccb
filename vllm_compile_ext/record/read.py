"""Read a recorded start: one file of JSON lines, which `vllm_compile_ext.record.recorder` writes.

All processes of a start append to the same file, and any of them may be killed at any moment.  So a line that is cut
off or damaged is skipped and counted, a span without an end has `end` None, and what is missing has a default.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from vllm_compile_ext import settings

FOLDER = "_VLLM_COMPILE_EXT_STARTS"  # set by `vllm-compile-ext warm` for the start that it asks for
SUFFIX = ".jsonl"

OTHER = "other"  # the phase of what is in no named one
WAITING = "spawn"  # the phase in which a process waits for one that it started

# Depth of a kind of process: a deeper one is waited for by those above it.  A helper looks something up for one of the
# others, which does nothing meanwhile.
KINDS = {"front end": 0, "engine core": 1, "worker": 2, "helper": 3}

Moment = Annotated[int, Meta(gt=0, le=2**63 - 1)]  # unix ns
Name = Annotated[str, Meta(min_length=1)]


class ReadError(ValueError):
    """The file is not a recorded start; the message names it."""


# The kinds of lines


class Process(Struct, kw_only=True, tag_field="k", tag="process", rename={"start": "t"}):
    """start: unix ns, as the operating system has it.  rank: of a worker, None where it is not known."""

    pid: int
    ppid: int = 0
    kind: str = "front end"
    name: str = ""
    argv: tuple[str, ...] = ()
    host: str = ""
    start: Moment
    rank: int | None = None

    @property
    def depth(self) -> int:
        return KINDS.get(self.kind, 0)

    @property
    def title(self) -> str:
        """Such as "worker 1"."""
        return self.kind if self.rank is None else f"{self.kind} {self.rank}"


class Span(Struct, kw_only=True, tag_field="k", tag="span", rename={"start": "t"}):
    """start, end: unix ns; end is None where the span never ended, or had not when the file was read.

    The rest is not in the file, but comes from the spans around it in its process.  depth: how many they are, and one.
    phase: its own or that of the nearest.  waits: the process does nothing meanwhile but wait for another.
    fatal: it was never left, or was left with an error that nothing around it held up.
    """

    id: Name
    parent: str | None = None
    pid: int
    name: Name
    start: Moment
    end: Moment | None = None
    attrs: dict[str, Any] = {}
    error: str | None = None

    depth: int = 1
    phase: str = OTHER
    waits: bool = False
    fatal: bool = False


class _End(Struct, tag_field="k", tag="end"):
    t: Moment
    id: Name
    attrs: dict[str, Any] = {}
    error: str | None = None


class Note(Struct, kw_only=True, tag_field="k", tag="note", rename={"time": "t"}):
    """A fact about what was compiled, loaded or captured."""

    time: Moment
    pid: int = 0
    name: Name
    attrs: dict[str, Any] = {}


class _Ready(Struct, tag_field="k", tag="ready"):
    t: Moment


class _FirstToken(Struct, tag_field="k", tag="first_token"):
    t: Moment


class Exit(Struct, kw_only=True, tag_field="k", tag="exit", rename={"time": "t"}):
    """The end of a process that still recorded."""

    time: Moment
    pid: int = 0
    error: str | None = None


class Start(Struct, kw_only=True, tag_field="k", tag="start", rename={"time": "t"}):
    """Everything that one file says, of which its first line says what is up to `machine`.

    time: unix ns of that line.  ready, first_token: unix ns, None where it did not come to that.
    skipped: lines that could not be read.  last: unix ns of the last thing that was recorded.
    """

    time: Moment
    trace: str = ""
    parent: str | None = None
    model: str = ""
    options: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    id: str = ""
    path: Path | None = None
    processes: list[Process] = []
    spans: list[Span] = []
    notes: list[Note] = []
    exits: list[Exit] = []
    ready: int | None = None
    first_token: int | None = None
    skipped: int = 0
    last: int = 0

    @property
    def begin(self) -> int:
        """When the start began: its earliest span, or the first line.

        Not a process's start: a program may have run for hours before it made an engine.
        """
        return min((self.time, *(span.start for span in self.spans)))

    def end(self, span: Span) -> int:
        """When a span ended; for one that never did, when its process ended, or the last thing was recorded."""
        if span.end is not None:
            return span.end
        return max(span.start, next((gone.time for gone in self.exits if gone.pid == span.pid), self.last))

    @property
    def seconds(self) -> float | None:
        """From its beginning to ready."""
        return None if self.ready is None else max(0, self.ready - self.begin) / 1e9

    @property
    def failed(self) -> bool:
        """Whether a process ended with an error before the start was ready."""
        return self.ready is None and any(gone.error for gone in self.exits)

    @property
    def temperature(self) -> str:
        """Either "cold" when it compiled something, "warm" when it only loaded, "" when it did neither."""
        names = {note.name for note in self.notes}
        return "cold" if "compiled" in names else "warm" if "loaded" in names else ""


_decoder = msgspec.json.Decoder(Start | Process | Span | _End | Note | _Ready | _FirstToken | Exit)


def folder() -> Path:
    """Where starts are recorded: `compile_starts` in vLLM's cache root, or the folder that `FOLDER` names."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else settings.cache_root() / "compile_starts"


def recorded(where: Path | None = None) -> list[Path]:
    """The files of the recorded starts, oldest first: their names sort by time."""
    return sorted((where or folder()).glob(f"*{SUFFIX}"), key=lambda path: path.name)


def read(path: Path) -> Start:
    """The start in `path`.  Raises `OSError`, and `ReadError` when no line of it can be read."""
    with path.open("rb") as file:
        start = parse(file, path.name.removesuffix(SUFFIX))
    if not start.last:
        raise ReadError(f"{str(path)!r} is not a recorded start: no line of it can be read")
    start.path = path
    return start


def starts(where: Path | None = None) -> Iterator[Start]:
    """The recorded starts that can be read, newest first."""
    for path in reversed(recorded(where)):
        with suppress(OSError, ReadError):
            yield read(path)


def previous(start: Start, where: Path | None = None) -> Start | None:
    """The last start of the same model before `start` that got ready; None where there is none."""
    for found in starts(where):
        if found.id < start.id and found.ready is not None and found.spans and found.model == start.model:
            return found
    return None


def parse(lines: Iterable[bytes], name: str) -> Start:
    """A `Start` with the id `name` from the lines of its file."""
    start = Start(id=name, time=0)
    processes: dict[int, Process] = {}
    spans: dict[str, Span] = {}
    for raw in lines:
        if not raw.strip():
            continue
        try:
            line = _decoder.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            start.skipped += 1
            continue
        match line:
            case Start(time=time):
                start = replace(line, id=name, skipped=start.skipped)
            case Process(start=time):
                processes[line.pid] = line
            case Span(start=time):
                spans[line.id] = line
                time = max(time, line.end or 0)
            case _End(t=time):
                if (span := spans.get(line.id)) is None:
                    start.skipped += 1
                else:
                    span.end, span.error = max(span.start, time), line.error
                    span.attrs |= line.attrs
            case Note(time=time):
                start.notes.append(line)
            case Exit(time=time):
                start.exits.append(line)
            case _Ready(t=time):
                start.ready = min(time, start.ready or time)
            case _FirstToken(t=time):
                start.first_token = min(time, start.first_token or time)
        start.last = max(start.last, time)
    start.spans = sorted(spans.values(), key=lambda span: (span.start, -(span.end or span.start)))
    for span in start.spans:
        _look_around(span, spans)
        processes.setdefault(span.pid, Process(pid=span.pid, kind="process", start=span.start))
    start.processes = sorted(processes.values(), key=lambda one: (one.depth, one.rank or 0, one.start, one.pid))
    start.notes.sort(key=lambda note: note.time)
    start.time = start.time or min((one.start for one in start.spans or start.processes), default=0)
    return start


def _look_around(span: Span, spans: Mapping[str, Span]) -> None:
    """Tell a span what it has from those around it in its process."""
    path: list[Span] = []  # from the inside out
    at: Span | None = span
    while at is not None and at.pid == span.pid and at not in path:  # in a damaged file they may go in a circle
        path.append(at)
        at = spans.get(at.parent or "")
    span.depth = len(path)
    span.phase = next((str(one.attrs["phase"]) for one in path if one.attrs.get("phase")), OTHER)
    teller = next((one for one in path if "phase" in one.attrs or "wait" in one.attrs), span)
    span.waits = span.phase == WAITING or bool(teller.attrs.get("wait"))
    span.fatal = not any(one.end is not None and one.error is None for one in path)
