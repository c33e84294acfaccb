"""What one process records of a start: its spans, which start they belong to, and when it is over.

The front end is the first process of a start.  Its outermost span is the start itself, from the operating system's
start of the process to the first token.  It names itself, the trace, its innermost span and the file in `VARIABLE`; a
process that inherits this variable writes to the same file, with an outermost span of its own below that one.

The front end makes the file when an engine is configured, so that a process which only asks for vLLM's configuration
leaves none.  Until then its lines are kept in memory.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import sys
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from vllm_compile_ext import finder, harmless
from vllm_compile_ext.finder import Interval
from vllm_compile_ext.record.file import StartFile, encode

logger = logging.getLogger(__name__)

VARIABLE = "_VLLM_COMPILE_EXT_START"  # "pid trace span path"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

FRONT, ENGINE, WORKER, HELPER = "front end", "engine core", "worker", "helper"

SHORTEST = 20_000_000  # ns; imports that took less get no span of their own
JOINED = 5_000_000  # ns; imports with less than this between them are one stretch
RECENT = 120 * 10**9  # ns; a program that is older when it asks for an engine did something else before
_PENDING_LINES = 5000  # in memory, while there is no file

now = time.time_ns  # the clock that all processes of a machine share


def new_id() -> str:
    """The id of a span; `random.seed` must not repeat it."""
    return os.urandom(8).hex()


class OpenSpan(NamedTuple):
    """A span that is open in this context, and the one around it."""

    trace: str
    id: str
    around: OpenSpan | None


open_span: ContextVar[OpenSpan | None] = ContextVar("vllm_compile_ext_span", default=None)


class Recorder:
    """Records one process of one start.

    is_first: no other process of this start started it.  over: nothing more is recorded.
    ready_at: unix ns since which requests can be answered.
    changed: set when the process gets ready and when it is over.  watcher: the thread that waits for that.
    """

    def __init__(self, began: int) -> None:
        self.pid = os.getpid()
        self.kind, self.name, self.rank = identify()
        self.began, self.over = began, False
        self.ready_at: int | None = None
        self.changed = threading.Event()
        self.watcher: threading.Thread | None = None
        self.file: StartFile | None = None
        self._pending: list[bytes] | None = []
        self._lock = threading.Lock()
        self._stages: list[str] = []
        self._first_request: str | None = None
        given = inherited()
        self.is_first = not given
        if given:
            self.trace, self.parent, path = given
            self._pending, self.file = None, StartFile.join(Path(path))
            self._write_process()
        else:
            self.trace, self.parent, _ = traceparent() or (os.urandom(16).hex(), "", 1)
        self.process = self.parent
        self.process = self.begin("start" if self.is_first else self.title, {}, start=began)
        self.hand_down()
        atexit.register(self._exit)

    # Lines

    def line(self, k: str, /, **fields: Any) -> None:
        """Write a line, or keep it until there is a file."""
        if self.over:
            return
        self._notice_fork()
        data = encode({"k": k, **fields})
        with self._lock:
            if self.file is not None:
                self.file.write(data)
            elif self._pending is not None and len(self._pending) < _PENDING_LINES:
                self._pending.append(data)

    def _write_process(self, model: str | None = None) -> None:
        about = {"pid": self.pid, "ppid": os.getppid(), "kind": self.kind, "name": self.name, "rank": self.rank}
        about |= {"argv": harmless.arguments(sys.orig_argv, model), "host": os.uname().nodename}
        self.line("process", t=process_start() or finder.STARTED, **about)

    def open(self, about: dict[str, Any], model: str | None = None) -> bool:
        """Make the file of the start, whose engine is being configured; False where there is one, or none can be made.

        about: what the line "start" says of the engine.  model: as the user named it.
        """
        if self._pending is None or self.kind != FRONT:
            return False
        file = StartFile.create(self.trace)
        if file is None:
            self.finish()
            return False
        first = {"k": "start", "trace": self.trace, "parent": self.parent or None, "t": self.began}
        with self._lock:
            file.write(b"".join([encode(first | about), *self._pending]))
            self.file, self._pending = file, None
        self._write_process(model)  # now, since vLLM has imported its options meanwhile
        self.hand_down()
        return True

    # Spans

    @property
    def title(self) -> str:
        """The name of the outermost span of a process that another one started."""
        return self.name if self.kind != WORKER else f"worker {self.rank}"

    @property
    def innermost(self) -> str:
        """Parent of a span that begins here: the open span of this context, else the innermost stage or the process."""
        span = open_span.get()
        if span is not None and span.trace == self.trace:
            return span.id
        return self._stages[-1] if self._stages else self.process

    def begin(
        self, name: str, attrs: dict[str, Any], parent: str = "", start: int = 0, end: int = 0, span: str = ""
    ) -> str:
        """Record that a span begins, now and in the innermost one if not told otherwise, and return its id.

        end: of one that is over.  span: its id, where it has one already.
        """
        self._notice_fork()
        span, start, parent = span or new_id(), start or now(), parent or self.innermost
        about = {"id": span, "parent": parent or None, "pid": self.pid, "name": name, "attrs": attrs}
        self.line("span", t=start, **about, **({"end": max(start, end)} if end else {}))
        return span

    def end(self, span: str, error: str | None = None, attrs: dict[str, Any] | None = None, time: int = 0) -> None:
        """Record that a span has ended.  attrs: those that were not known when it began."""
        self.line("end", id=span, t=time or now(), attrs=attrs or {}, error=error)

    def enter(self, name: str, attrs: dict[str, Any]) -> str:
        """Begin a span that becomes the parent of what begins in this context."""
        span = self.begin(name, attrs)
        open_span.set(OpenSpan(self.trace, span, open_span.get()))
        return span

    def leave(self, span: str, error: str | None, attrs: dict[str, Any]) -> None:
        """End the span that was entered last in this context."""
        entered = open_span.get()
        open_span.set(entered and entered.around)
        self.end(span, error, attrs)

    def begin_stage(self, name: str, attrs: dict[str, Any]) -> str:
        """Begin a span that becomes the parent of what has none, in all threads and in processes that are started."""
        stage = self.begin(name, attrs)
        self._stages.append(stage)
        self.hand_down()
        return stage

    def end_stage(self, stage: str, error: str | None, attrs: dict[str, Any]) -> None:
        """End a stage, unless it has ended with one around it or with the start."""
        if stage in self._stages:
            self.end(stage, error, attrs)
            del self._stages[self._stages.index(stage) :]
            self.hand_down()

    def hand_down(self) -> None:
        """Let processes that are started from here on be part of the innermost span."""
        if self.file is not None and not self.over and self.ready_at is None:
            os.environ[VARIABLE] = f"{self.pid} {self.trace} {self.innermost} {self.file.path}"

    def _notice_fork(self) -> None:
        """In a fork of the process that recorded: be a process of its own, which begins by recording something."""
        if os.getpid() == self.pid:
            return
        parent = self.innermost
        self.pid = os.getpid()
        self._lock, self.changed, self.watcher = threading.Lock(), threading.Event(), None
        self._pending = None if self._pending is None else []
        self._stages, self._first_request = [], None
        self.kind, self.name, self.rank = identify(forked=True)
        atexit.unregister(self._exit)
        open_span.set(None)
        self._write_process()
        self.process = self.begin(self.title, {}, parent, process_start() or 0)
        self.hand_down()

    # Imports

    def record_imports(self, loaded: int) -> None:
        """Record what came before the plugin, which is being loaded since `loaded`, and the imports from here on."""
        begin = process_start() or finder.STARTED
        if self.began <= begin and finder.finder.timing:  # since the .pth file was read
            self._record_earlier(begin, loaded, finder.finder.intervals)
        elif self.began <= begin:  # else an older program: what it did before is not of this start
            self.begin("imports", {"phase": "imports"}, self.process, begin, loaded)
        self.watch_imports()

    def watch_imports(self) -> None:
        """Record the imports from here on."""
        ours = finder.install()
        ours.intervals, ours.timing = [], True
        ours.sink, ours.owner = self._imported, lambda: self.innermost

    def _record_earlier(self, begin: int, loaded: int, intervals: list[Interval]) -> None:
        """Fill the time until `loaded` with stretches of imports, and with what was done between them."""
        self.begin("interpreter", {"phase": "interpreter"}, self.process, begin, finder.STARTED)
        if not self.is_first:
            between = "receive configuration", "spawn"
        else:
            between = ("command line", "config") if vllm_command() else ("program", "other")
        stretches: list[list[Interval]] = []
        for interval in sorted((one for one in intervals if one.around is None), key=lambda one: one.start):
            if stretches and interval.start - stretches[-1][-1].end < JOINED:
                stretches[-1].append(interval)
            else:
                stretches.append([interval])
        at = finder.STARTED
        for stretch in stretches:
            if stretch[0].start - at >= JOINED:
                self.begin(between[0], {"phase": between[1]}, self.process, at, stretch[0].start)
            at = stretch[-1].end
            span = self.begin("imports", {"phase": "imports"}, self.process, stretch[0].start, at)
            for interval in stretch:
                interval.owner = span
        if loaded - at >= JOINED:
            self.begin(between[0], {"phase": between[1]}, self.process, at, loaded)
        for interval in intervals:
            self._imported(interval)

    def _imported(self, interval: Interval) -> None:
        """An import is over; the one around it, which took longer, is recorded later by the id that it gets here."""
        if interval.end - interval.start >= SHORTEST:
            parent = interval.owner or self.process
            if interval.around is not None:
                parent = interval.around.span = interval.around.span or new_id()
            attrs = {"phase": "plugin" if interval.name.startswith("vllm_compile_ext") else "imports"}
            attrs["module"] = interval.name
            self.begin(f"import {interval.name}", attrs, parent, interval.start, interval.end, interval.span)

    # The end of a start

    def ready(self) -> None:
        """Requests can be answered from now on."""
        if self.over or self.ready_at is not None:
            return
        while self._stages:
            self.end(self._stages.pop())
        self.ready_at = now()
        self.line("ready", t=self.ready_at)
        os.environ.pop(VARIABLE, None)  # what is started from now on is not part of this start
        atexit.unregister(self._exit)
        atexit.register(self._exit)  # before vLLM's exporter is shut down, which it registered meanwhile
        self.changed.set()

    def request(self) -> None:
        """A request has come."""
        if self.over or self._first_request is not None:
            return
        self.ready()  # where nobody listens: a batch, gRPC
        time, ready = now(), self.ready_at or now()
        if time - ready >= JOINED:
            self.begin("wait for a request", {"phase": "idle"}, self.process, ready, time)
        self._first_request = self.begin("first request", {"phase": "first request"}, self.process, time)

    def first_token(self) -> None:
        """The first token of the first request is there: the start is over."""
        if self._first_request is not None:
            time = now()
            self.end(self._first_request, time=time)
            self.line("first_token", t=time)
            self.done(time)

    def done(self, time: int = 0) -> None:
        """This process has done its part of the start."""
        self.end(self.process, time=time)
        self.finish()

    def stop(self, error: str | None = None) -> None:
        """The process, or its engine, ends before the start was over; without any request it was over when ready."""
        if self.over:
            return
        while self._stages:
            self.end(self._stages.pop(), error)
        waited = self.ready_at is not None and self._first_request is None
        self.end(self.process, None if waited else error, time=self.ready_at or 0 if waited else 0)
        self.line("exit", t=now(), pid=self.pid, error=error)
        self.finish()
        if self.watcher is not None:
            self.watcher.join(10)  # it may have to export

    def finish(self) -> None:
        """Record nothing more; twice is the same as once."""
        if self.over:
            return
        self.over = True
        os.environ.pop(VARIABLE, None)
        atexit.unregister(self._exit)
        finder.finder.stop_timing()
        with self._lock:
            self._pending = None
            if self.file is not None:
                self.file.close()
        self.changed.set()
        if self.watcher is not None:
            atexit.register(self.watcher.join, 10)  # it may have to export

    def _exit(self) -> None:
        if os.getpid() == self.pid:
            self.stop(harmless.error(getattr(sys, "last_value", None)) or None)


current: Recorder | None = None


def active() -> Recorder | None:
    """The recorder of this process while it records."""
    return current if current is not None and not current.over else None


def begin() -> Recorder | None:
    """Begin to record this process, unless it does already; None where its start is over."""
    global current
    child = bool(inherited())
    if active() is not None or (not child and identify().kind != FRONT):
        return active()
    began, time = process_start() or finder.STARTED, now()
    if not child and (current is not None or (not vllm_command() and time - began > RECENT)):
        began = time
    current = Recorder(began)
    return current


def forget() -> None:
    """Record nothing after all: the plugin is not wanted."""
    global current
    if current is not None:
        current.finish()
        current = None


def inherited() -> list[str]:
    """Trace, span and file that this process is part of, by `VARIABLE`; empty where it is the first of a start."""
    pid, *parts = os.environ.get(VARIABLE, "").split(" ", 3)
    return parts if len(parts) == 3 and pid != str(os.getpid()) else []


def traceparent() -> tuple[str, str, int] | None:
    """Trace, span and flags of what started this program, by W3C's TRACEPARENT; vLLM reads it in small letters too."""
    for name in ("traceparent", "TRACEPARENT"):
        found = _TRACEPARENT.fullmatch(os.environ.get(name, "").strip())
        if found and int(found[1], 16) and int(found[2], 16):
            return found[1], found[2], int(found[3], 16)
    return None


class Identity(NamedTuple):
    """kind: `FRONT`, `ENGINE`, `WORKER` or `HELPER`.  rank: of a worker."""

    kind: str
    name: str
    rank: int | None = None


def identify(*, forked: bool = False) -> Identity:
    """What this process is, by the names that vLLM 0.32.0 gives to the processes that it starts."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    name = multiprocessing.current_process().name if multiprocessing is not None else ""
    if name.startswith("EngineCore"):
        return Identity(ENGINE, name)
    if name.startswith("VllmWorker"):
        rank = name.rpartition("-")[2]
        return Identity(WORKER, name, int(rank) if rank.isdecimal() else None)
    if name.startswith("ApiServer"):
        return Identity(FRONT, name)
    if forked or inherited():
        return Identity(HELPER, "model inspection" if any("registry" in arg for arg in sys.orig_argv) else "helper")
    return Identity(FRONT, "front end")


def vllm_command() -> bool:
    """Whether this process runs one of vLLM's own commands, which do nothing else before they start an engine."""
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if argument == "-m":
            return next(arguments, "").split(".")[0] == "vllm"
        if argument in ("-W", "-X"):
            next(arguments, None)
        elif not argument.startswith("-"):
            return Path(argument).name == "vllm"
    return False


stands_in: dict[int, int] = {}  # number of a process that another stands for -> unix ns at which that one began


@functools.cache
def process_start() -> int | None:
    """Unix ns at which the operating system started this process; None where it does not say (not Linux)."""
    if os.getpid() in stands_in:
        return stands_in[os.getpid()]
    # Field 22 of /proc/self/stat counts ticks since the machine booted, sleep included (`man 5 proc`): exact to a tick,
    # 10 ms.  /proc/stat, which psutil reads, has the time of the boot in whole seconds only: two clocks are exact.
    try:
        # The second field is a name in parentheses that may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time_ns() - age if age >= 0 else None


os.register_at_fork(after_in_child=process_start.cache_clear)
