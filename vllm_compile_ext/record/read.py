"""Read a recorded start: one file of JSON lines (`record/file.py` writes it) as dataclasses.

All processes of a start append to the same file, and any of them may be killed at any moment.  So a line that is cut
off or damaged is skipped and counted, a span without an end has `end` None, and what is missing has a default.
Standard library only: vLLM's own processes read the previous start.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_compile_ext import settings

SUFFIX = ".jsonl"
VERSION = 1  # of the format

# Depth of a kind of process: a deeper one is waited for by those above it.  A helper looks something up for one of the
# others, which does nothing meanwhile.
KINDS = {"front end": 0, "engine core": 1, "worker": 2, "helper": 3}


class ReadError(ValueError):
    """The file is not a recorded start; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """start: unix ns, as the operating system has it.  rank: of a worker, None where it is not known."""

    pid: int
    ppid: int = 0
    kind: str = "front end"
    name: str = ""
    argv: tuple[str, ...] = ()
    host: str = ""
    start: int = 0
    rank: int | None = None

    @property
    def depth(self) -> int:
        return KINDS.get(self.kind, 0)

    @property
    def title(self) -> str:
        """Such as "worker 1"."""
        return self.kind if self.rank is None else f"{self.kind} {self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """start, end: unix ns; end is None where the span never ended, or had not when the file was read."""

    id: str
    parent: str | None
    pid: int
    name: str
    start: int
    end: int | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def phase(self) -> str | None:
        value = self.attrs.get("phase")
        return value if isinstance(value, str) and value else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A fact about what was compiled, loaded or captured."""

    time: int
    pid: int
    name: str
    attrs: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The end of a process that still recorded."""

    time: int
    pid: int
    error: str | None


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
    """Where starts are recorded: `compile_starts` in vLLM's cache root."""
    return settings.cache_root() / "compile_starts"


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


def previous(of: Start, where: Path | None = None) -> Start | None:
    """The last start of the same model before `of` that got ready; None where there is none."""
    older = [path for path in recorded(where) if path.name.removesuffix(SUFFIX) < of.id]
    for path in reversed(older):
        with suppress(OSError, ValueError):
            if model(path) == of.model:
                found = read(path)
                if found.ready is not None:
                    return found
    return None


def model(path: Path) -> str:
    """The model of a recorded start, from its first line alone; "" where that cannot be read.  Raises `OSError`."""
    with path.open("rb") as file:
        line = _line(file.readline())
    return _text(line.get("model")) if line is not None and line["k"] == "start" else ""


def parse(lines: Iterable[bytes], name: str) -> Start:
    """A `Start` with the id `name` from the lines of its file, in any order."""
    start = Start(id=name)
    reader = _Reader(start)
    for raw in lines:
        if not raw.strip():
            continue
        line = _line(raw)
        if line is None or not reader.take(line):
            start.skipped += 1
    reader.finish()
    return start


class _Reader:
    """Puts lines into a start; the two lines of a span may come in any order."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.processes: dict[int, Process] = {}
        self.spans: dict[str, Span] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        self.kinds: dict[str, Callable[[dict[str, Any], int], bool]] = {
            "start": self._start,
            "process": self._process,
            "begin": self._begin,
            "end": self._end,
            "span": self._span,
            "note": self._note,
            "ready": self._ready,
            "first_token": self._first_token,
            "exit": self._exit,
        }

    def take(self, line: dict[str, Any]) -> bool:
        """False when the line lacks what its kind needs."""
        time = _moment(line.get("t"))
        if time is None:
            return False
        take = self.kinds.get(line["k"])
        if take is None:
            return False
        taken = take(line, time)
        if taken:
            self.start.last = max(self.start.last, time)
        return taken

    def finish(self) -> None:
        start = self.start
        for key, end in self.ends.items():
            if key in self.spans:
                self.spans[key] = _ended(self.spans[key], end)
            else:
                start.skipped += 1
        start.spans = sorted(self.spans.values(), key=lambda span: (span.start, -(span.end or span.start)))
        for span in start.spans:
            self.processes.setdefault(span.pid, Process(pid=span.pid, kind="process", start=span.start))
        start.processes = sorted(
            self.processes.values(), key=lambda process: (process.depth, process.rank or 0, process.start, process.pid)
        )
        start.notes.sort(key=lambda note: note.time)
        start.time = start.time or min((span.start for span in start.spans), default=0)
        start.time = start.time or min((process.start for process in start.processes if process.start), default=0)

    def _start(self, line: dict[str, Any], time: int) -> bool:
        start = self.start
        if start.time:  # the first one counts
            return True
        start.time = time
        start.trace, start.parent = _text(line.get("trace")), _text(line.get("parent")) or None
        start.model = _text(line.get("model"))
        start.options, start.versions = _table(line.get("options")), _table(line.get("versions"))
        start.machine = _table(line.get("machine"))
        return True

    def _process(self, line: dict[str, Any], time: int) -> bool:
        pid = _whole(line.get("pid"))
        if pid is None:
            return False
        argv = line.get("argv")
        found = Process(
            pid=pid,
            ppid=_whole(line.get("ppid")) or 0,
            kind=_text(line.get("kind")) or "process",
            name=_text(line.get("name")),
            argv=tuple(map(_text, argv)) if isinstance(argv, list) else (),
            host=_text(line.get("host")),
            start=time,
            rank=_whole(line.get("rank")),
        )
        old = self.processes.get(pid)
        # A process may say again what it is, once it knows: its rank.
        if old is not None and found.rank is None:
            found = replace(found, rank=old.rank)
        self.processes[pid] = found
        return True

    def _begin(self, line: dict[str, Any], time: int) -> bool:
        key, pid = _text(line.get("id")), _whole(line.get("pid"))
        if not key or pid is None:
            return False
        self.spans[key] = Span(
            id=key,
            parent=_text(line.get("parent")) or None,
            pid=pid,
            name=_text(line.get("name")) or "?",
            start=time,
            attrs=_table(line.get("attrs")),
        )
        return True

    def _end(self, line: dict[str, Any], time: int) -> bool:
        key = _text(line.get("id"))
        if not key:
            return False
        self.ends[key] = line | {"end": time}
        return True

    def _span(self, line: dict[str, Any], time: int) -> bool:
        end = _moment(line.get("end"))
        if end is None or not self._begin(line, time):
            return False
        key = _text(line["id"])
        self.spans[key] = _ended(self.spans[key], line | {"end": end})
        self.start.last = max(self.start.last, end)
        return True

    def _note(self, line: dict[str, Any], time: int) -> bool:
        name = _text(line.get("name"))
        if not name:
            return False
        note = Note(time=time, pid=_whole(line.get("pid")) or 0, name=name, attrs=_table(line.get("attrs")))
        self.start.notes.append(note)
        return True

    def _ready(self, line: dict[str, Any], time: int) -> bool:
        self.start.ready = min(time, self.start.ready or time)
        return True

    def _first_token(self, line: dict[str, Any], time: int) -> bool:
        self.start.first_token = min(time, self.start.first_token or time)
        return True

    def _exit(self, line: dict[str, Any], time: int) -> bool:
        error = _text(line.get("error")) or None
        self.start.exits.append(Exit(time=time, pid=_whole(line.get("pid")) or 0, error=error))
        return True


def _ended(span: Span, line: dict[str, Any]) -> Span:
    attrs, error = span.attrs | _table(line.get("attrs")), _text(line.get("error")) or None
    return replace(span, end=max(span.start, line["end"]), attrs=attrs, error=error)


def _line(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("k"), str) else None


def _moment(value: Any) -> int | None:
    """Unix ns; None for what is none, so that a damaged digit cannot make a start of a thousand years."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63 else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
