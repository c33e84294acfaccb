"""Read a recorded start: one file of JSON lines, which `vllm_compile_ext.record.recorder` writes.

All processes of a start append to the same file, and any of them may be killed at any moment.  So a line that is cut
off or damaged is skipped and counted, a span without an end has `end` None, and what is missing has a default.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from vllm_compile_ext import settings

FOLDER = "_VLLM_COMPILE_EXT_STARTS"  # set by `vllm-compile-ext warm` for the start that it asks for
SUFFIX = ".jsonl"

# Depth of a kind of process: a deeper one is waited for by those above it.  A helper looks something up for one of the
# others, which does nothing meanwhile.
KINDS = {"front end": 0, "engine core": 1, "worker": 2, "helper": 3}

Moment = Annotated[int, Meta(gt=0, le=2**63 - 1)]  # unix ns
Name = Annotated[str, Meta(min_length=1)]


class ReadError(ValueError):
    """The file is not a recorded start; the message names it."""


class Process(Struct, frozen=True, kw_only=True, tag_field="k", tag="process", rename={"start": "t"}):
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


class Span(Struct, frozen=True, kw_only=True, tag_field="k", tag="span", rename={"start": "t"}):
    """start, end: unix ns; end is None where the span never ended, or had not when the file was read."""

    id: Name
    parent: str | None = None
    pid: int
    name: Name
    start: Moment
    end: Moment | None = None
    attrs: dict[str, Any] = {}
    error: str | None = None

    @property
    def phase(self) -> str | None:
        value = self.attrs.get("phase")
        return value if isinstance(value, str) and value else None


class Note(Struct, frozen=True, kw_only=True, tag_field="k", tag="note", rename={"time": "t"}):
    """A fact about what was compiled, loaded or captured."""

    time: Moment
    pid: int = 0
    name: Name
    attrs: dict[str, Any] = {}


class Exit(Struct, frozen=True, kw_only=True, tag_field="k", tag="exit", rename={"time": "t"}):
    """The end of a process that still recorded."""

    time: Moment
    pid: int = 0
    error: str | None = None


# The other kinds of lines.


class _First(Struct, tag_field="k", tag="start"):
    t: Moment
    trace: str = ""
    parent: str | None = None
    model: str = ""
    options: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}


class _Begin(Struct, tag_field="k", tag="begin"):
    t: Moment
    id: Name
    pid: int
    name: Name
    parent: str | None = None
    attrs: dict[str, Any] = {}


class _End(Struct, tag_field="k", tag="end"):
    t: Moment
    id: Name
    attrs: dict[str, Any] = {}
    error: str | None = None


class _Ready(Struct, tag_field="k", tag="ready"):
    t: Moment


class _FirstToken(Struct, tag_field="k", tag="first_token"):
    t: Moment


_Line = _First | Process | _Begin | _End | Span | Note | _Ready | _FirstToken | Exit
_decoder: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line)


@dataclass(slots=True, kw_only=True)
class Start:
    """Everything that one file says.

    time: unix ns of its first line.  ready, first_token: unix ns, None where it did not come to that.
    skipped: lines that could not be read.  last: unix ns of the last thing that was recorded.
    """

    id: str
    path: Path | None = None
    trace: str = ""
    parent: str | None = None
    model: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    time: int = 0
    processes: list[Process] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
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
        with suppress(OSError, ValueError):
            yield read(path)


def previous(start: Start, where: Path | None = None) -> Start | None:
    """The last start of the same model before `start` that got ready; None where there is none."""
    for path in reversed(recorded(where)):
        if path.name.removesuffix(SUFFIX) < start.id:
            with suppress(OSError, ValueError):
                found = read(path)
                if found.ready is not None and found.model == start.model:
                    return found
    return None


def parse(lines: Iterable[bytes], name: str) -> Start:
    """A `Start` with the id `name` from the lines of its file, in any order."""
    start = Start(id=name)
    processes: dict[int, Process] = {}
    spans: dict[str, Span] = {}
    ends: dict[str, _End] = {}
    for raw in lines:
        if not raw.strip():
            continue
        try:
            line = _decoder.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            start.skipped += 1
            continue
        match line:
            case _First(t=time):
                if not start.time:
                    start.time, start.trace, start.parent, start.model = time, line.trace, line.parent, line.model
                    start.options, start.versions, start.machine = line.options, line.versions, line.machine
            case Process(start=time, pid=pid):
                # A process may say again what it is: its rank is what it may not know yet.
                known = processes[pid].rank if pid in processes and line.rank is None else line.rank
                processes[pid] = replace(line, rank=known)
            case _Begin(t=time):
                at = {"id": line.id, "parent": line.parent, "pid": line.pid, "start": time}
                spans[line.id] = Span(**at, name=line.name, attrs=line.attrs)  # type: ignore[arg-type]
            case _End(t=time):
                ends[line.id] = line
            case Span(start=time):
                time = max(time, line.end or 0)
                spans[line.id] = replace(line, end=time)
            case Note(time=time):
                start.notes.append(line)
            case Exit(time=time):
                start.exits.append(line)
            case _Ready(t=time):
                start.ready = min(time, start.ready or time)
            case _FirstToken(t=time):
                start.first_token = min(time, start.first_token or time)
        start.last = max(start.last, time)
    for key, end in ends.items():
        if (span := spans.get(key)) is not None:
            attrs = span.attrs | end.attrs
            spans[key] = replace(span, end=max(span.start, end.t), attrs=attrs, error=end.error)
        else:
            start.skipped += 1
    start.spans = sorted(spans.values(), key=lambda span: (span.start, -(span.end or span.start)))
    for span in start.spans:
        processes.setdefault(span.pid, Process(pid=span.pid, kind="process", start=span.start))
    start.processes = sorted(processes.values(), key=lambda one: (one.depth, one.rank or 0, one.start, one.pid))
    start.notes.sort(key=lambda note: note.time)
    times = [span.start for span in start.spans] or [process.start for process in start.processes]
    start.time = start.time or min(times, default=0)
    return start
