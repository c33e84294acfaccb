"""What one process records of a start: which start it belongs to, its outermost span, and when it is over.

The front end is the first process of a start.  Its outermost span is the start itself, from the operating system's
start of the process to the first token.  What it starts inherits two variables: the trace's context (W3C's
``traceparent``, which vLLM reads as well) and the start's file.  A process that finds them adds an outermost span of
its own below the one that it was started in.

What is recorded before there is a file is kept in memory: the front end makes the file when an engine is configured, so
that a process which only asks for vLLM's configuration leaves none.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_compile_ext import harmless
from vllm_compile_ext.record import clock, display, imports, names, progress
from vllm_compile_ext.record.file import Log, encode

if TYPE_CHECKING:
    from vllm_compile_ext.record.backend import Backend, Handle
    from vllm_compile_ext.record.imports import Interval

logger = logging.getLogger(__name__)

# The process that began the start, and its file ("" where that cannot be written).
VARIABLE = "_VLLM_COMPILE_EXT_START"
CONTEXT = "traceparent"  # in small letters vLLM writes it; an orchestrator may have set TRACEPARENT
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

FRONT, ENGINE, WORKER, HELPER = "front end", "engine core", "worker", "helper"

SHORTEST = 20_000_000  # ns; imports that took less are not told apart
JOINED = 5_000_000  # ns; imports with less than this between them are one stretch
RECENT = 120 * 10**9  # ns; a program that is older when it asks for an engine did something else before
_KEPT_LINES = 5000  # in memory, while there is no file


class Recorder:
    """Of one process and one start.

    over: nothing more is recorded here.  waiting: the process waits for its first request.
    """

    def __init__(self, backend: Backend, begin: int) -> None:
        self.pid = os.getpid()
        self.backend = backend
        self.kind, self.name, self.rank = kind()
        self.over = False
        self.ready_at: int | None = None
        self.log: Log | None = None
        self.told = 0  # lines
        self.spent = 0  # ns spent in writing
        self._lines: list[bytes] | None = []
        self._lock = threading.Lock()
        child = inherited() is not None
        # Put back when the start is over; what a start's other process set is of no use then.
        self._environ = {name: None if child else os.environ.get(name) for name in (CONTEXT, VARIABLE)}
        self._starting: Handle | None = None
        self._stages: list[Handle] = []
        self._held: dict[int, list[Interval]] = {}
        self.parent = parent()
        backend.bind(self)
        self._process_line()
        self.process = backend.begin(self.title if child else "start", self.parent, begin, {})
        self.trace = self.process.trace
        if child:
            os.environ[CONTEXT] = self.process.traceparent
        atexit.register(self._exit)

    # Lines

    def line(self, k: str, **fields: Any) -> None:
        """Write a line, or keep it until there is a file."""
        if self.over:
            return
        begin = clock.now()
        if os.getpid() != self.pid:
            self._forked()
        data = encode({"k": k, **fields})
        with self._lock:
            self.told += 1
            if self._lines is None:
                if self.log is not None:
                    self.log.write((data,))
            elif len(self._lines) < _KEPT_LINES:
                self._lines.append(data)
        self.spent += clock.now() - begin

    def _flush(self, log: Log | None, *first: bytes) -> None:
        with self._lock:
            lines, self._lines = self._lines or [], None
            self.log = log
            if log is not None:
                log.write((*first, *lines))

    def _process_line(self, model: str | None = None) -> None:
        self.line(
            "process",
            t=clock.process_start() or imports.STARTED,
            pid=os.getpid(),
            ppid=os.getppid(),
            kind=self.kind,
            name=self.name,
            argv=harmless.arguments(sys.orig_argv, model),
            host=os.uname().nodename,
            rank=self.rank,
        )

    @property
    def title(self) -> str:
        """The name of the outermost span of a process that another one started."""
        return self.name if self.kind != WORKER else f"worker {self.rank}"

    @property
    def stage(self) -> Handle:
        """What a span is part of that is in no other."""
        return self._stages[-1] if self._stages else self.process

    def enter(self, name: str, attrs: dict[str, Any]) -> Handle:
        """Begin a stage.  Unlike a span of `span` it is not in the context that asyncio's tasks take along: the tasks
        that answer requests would make theirs part of it for ever.
        """
        stage = self.backend.begin(name, self.backend.current() or self.stage, clock.now(), attrs)
        self._stages.append(stage)
        os.environ[CONTEXT] = stage.traceparent
        return stage

    def leave(self, stage: Handle, error: str | None = None) -> None:
        """End a stage, with those inside of it."""
        stage.end(error=error)
        if stage in self._stages:
            del self._stages[self._stages.index(stage) :]
            if not self.over and self.ready_at is None:
                os.environ[CONTEXT] = self.stage.traceparent

    def _forked(self) -> None:
        """This process is a fork of the one that recorded, and has become interesting by recording something."""
        self.pid = os.getpid()
        self._lock = threading.Lock()
        if self._lines is not None:
            self._lines = []
        self._held.clear()
        self._starting = None
        self._stages = []
        self.kind, self.name, self.rank = kind(forked=True)
        atexit.unregister(self._exit)
        self._process_line()
        around = self.backend.current() or self.process
        self.process = self.backend.begin(self.title, around, clock.process_start() or clock.now(), {})
        os.environ[CONTEXT] = self.process.traceparent

    # What the backend says of spans

    def began(self, span: str, parent: str | None, name: str, start: int, attrs: dict[str, Any]) -> None:
        """A span has begun."""
        about = with_phase(name, attrs)
        self.line("begin", id=span, parent=parent, pid=os.getpid(), name=name, t=start, attrs=about)
        if not self.over and self.kind != HELPER and self.rank in (None, 0):
            progress.began(span, str(about.get("phase", "")))

    def ended(self, span: str, end: int, attrs: dict[str, Any], error: str | None) -> None:
        """A span that `began` was told of has ended."""
        self.line("end", id=span, t=end, attrs=attrs, error=error)
        progress.ended(span)
        if error is not None and self.kind == FRONT:
            display.hide()  # the start has failed, and the program may go on without it

    def was(self, span: str, parent: str | None, name: str, start: int, end: int, attrs: dict[str, Any]) -> None:
        """A span of which its end was known when it was made."""
        about = with_phase(name, attrs)
        self.line("span", id=span, parent=parent, pid=os.getpid(), name=name, t=start, end=end, attrs=about, error=None)

    # The start's stages

    def settle(self, loaded: int) -> None:
        """The plugin is being loaded, since `loaded`: record what came before, and what is imported from now on."""
        watcher = imports.install()
        begin = clock.process_start() or imports.STARTED
        if self.process.start > begin:  # an older program: what it did before is not of this start
            watcher.intervals.clear()
        elif imports.early:
            self._before(begin, loaded, watcher.intervals)
        else:
            self._after("imports", begin, loaded, "imports")
        self.watch()

    def watch(self) -> None:
        """Record what is imported from here on, and let processes that are started be part of this one."""
        os.environ[CONTEXT] = self.process.traceparent
        watcher = imports.install()
        watcher.intervals, watcher.watching = [], True
        watcher.sink, watcher.owner = self.imported, lambda: self.backend.current() or self.stage

    def _before(self, begin: int, loaded: int, intervals: list[Interval]) -> None:
        self._after("interpreter", begin, imports.STARTED, "interpreter")
        outermost = sorted((i for i in intervals if i.around is None and i.owner is None), key=lambda i: i.start)
        stretches: list[list[Interval]] = []
        for interval in outermost:
            if stretches and interval.start - stretches[-1][-1].end < JOINED:
                stretches[-1].append(interval)
            else:
                stretches.append([interval])
        inside: dict[int, Handle] = {}
        at = imports.STARTED
        for stretch in [*stretches, None]:
            start = loaded if stretch is None else stretch[0].start
            if start - at >= JOINED:
                name, phase = self._program()
                self._after(name, at, start, phase)
            if stretch is not None:
                at = stretch[-1].end
                handle = self._after("imports", stretch[0].start, at, "imports")
                inside |= {id(interval): handle for interval in stretch}
        # Of this moment: the plugin's own import goes on, and the one that loads it may be inside of others.
        for interval in sorted(intervals, key=lambda i: (i.start, -i.end)):
            self._import(interval, inside.get(id(interval)) or interval.owner)

    def _program(self) -> tuple[str, str]:
        """What a process does that imports nothing and is not in vLLM's engine yet."""
        if inherited() is not None:
            return "receive configuration", "spawn"
        return ("command line", "config") if vllm_command() else ("program", "other")

    def _after(self, name: str, start: int, end: int, phase: str, parent: Any = None, **attrs: Any) -> Handle:
        return self.backend.was(name, parent or self.process, start, max(start, end), {"phase": phase, **attrs})

    def imported(self, interval: Interval) -> None:
        """An import is done; those inside of it come first, and are told of with the outermost."""
        held = self._held.setdefault(threading.get_ident(), [])
        held.append(interval)
        if interval.around is None:
            del self._held[threading.get_ident()]
            for one in sorted(held, key=lambda i: (i.start, -i.end)):
                self._import(one, one.owner)

    def _import(self, interval: Interval, owner: Any) -> None:
        if interval.end - interval.start < SHORTEST or self.over:
            return
        around = interval.around.span if interval.around is not None else None
        phase = "plugin" if interval.name.startswith("vllm_compile_ext") else "imports"
        name = f"import {interval.name}"
        interval.span = self._after(name, interval.start, interval.end, phase, around or owner, module=interval.name)

    def open(self, about: dict[str, Any], model: str | None = None) -> None:
        """The front end begins an engine: make the file.  about: of the line "start"; model: as the user named it."""
        if self._lines is None or self.kind != FRONT:
            return
        self._process_line(model)  # again: vLLM has told its options meanwhile
        log = Log.create(self.trace)
        span = self.parent[1] if self.parent is not None else None
        first = {"k": "start", "version": 1, "trace": self.trace, "parent": span, "t": self.process.start, **about}
        self._flush(log, encode(first))
        os.environ[VARIABLE] = f"{self.pid} {log.path if log is not None else ''}"
        display.show(self.process.start / 1e9)

    def join(self) -> None:
        """This process was started by one that records: write to its file."""
        path = os.environ.get(VARIABLE, "").partition(" ")[2]
        self._flush(Log.join(Path(path)) if path else None)
        if self.kind != FRONT:  # there it would be in the context of every request
            self.backend.attach()
        self.backend.export()

    def serving(self) -> None:
        """The engine is up; what is left is the front end's own."""
        if self.kind == FRONT and self.ready_at is None and not self._stages:
            self.enter("api server", {"phase": "api server"})

    def ready(self) -> None:
        """Requests can be answered from now on."""
        if self.over or self.ready_at is not None:
            return
        for stage in reversed(self._stages):
            stage.end()
        self._stages.clear()
        self.ready_at = clock.now()
        self.line("ready", t=self.ready_at)
        display.hide()
        self._restore()

    def request(self) -> None:
        """A request has come."""
        if self.over or self.ready_at is None or self._starting is not None:
            return
        now = clock.now()
        if now - self.ready_at >= JOINED:
            self._after("wait for a request", self.ready_at, now, "idle")
        self._starting = self.backend.begin("first request", self.process, now, {"phase": "first request"})

    def first_token(self) -> None:
        """The first token of the first request is there: the start is over."""
        if self.over or self._starting is None:
            return
        now = clock.now()
        self._starting.end(now)
        self.process.end(now)
        self.line("first_token", t=now)
        self.finish()

    def done(self) -> None:
        """This process has done its part of the start."""
        if self.kind != FRONT and not self.over:
            self.process.end()
            self.finish()

    def finish(self) -> None:
        """Record nothing more; twice is the same as once."""
        if self.over:
            return
        self.over = True
        self._restore()
        atexit.unregister(self._exit)
        watcher = imports.observer
        if watcher is not None:
            watcher.watching, watcher.sink, watcher.owner = False, None, None
            watcher.intervals.clear()
        logger.debug("%d lines recorded of this start in %.1f ms", self.told, self.spent / 1e6)
        with self._lock:
            self._lines = None
            if self.log is not None:
                self.log.close()

    def _restore(self) -> None:
        """What is started from now on is not of this start, and vLLM's traces of requests are their own."""
        for name, value in self._environ.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def loaded(self, since: int) -> None:
        """The plugin is loaded."""
        self._after("load plugin", since, clock.now(), "plugin")

    def _exit(self) -> None:
        if self.over or os.getpid() != self.pid:
            return
        self.stop(harmless.error(getattr(sys, "last_value", None)) or None)

    def stop(self, error: str | None = None) -> None:
        """The process, or its engine, ends before the start was over; one that got no request was over when ready."""
        for stage in reversed(self._stages):
            stage.end(error=error)
        if self.ready_at is not None and self._starting is None:
            self.process.end(self.ready_at)
        else:
            self.process.end(error=error)
        self.line("exit", t=clock.now(), pid=self.pid, error=error)
        self.finish()


current: Recorder | None = None


def active() -> Recorder | None:
    """The recorder of this process while it records."""
    return current if current is not None and not current.over else None


def meet(tracing: ModuleType | None) -> None:
    """Begin to record, in memory; tracing: vLLM's module ``vllm.tracing.otel``, where it is imported."""
    global current
    if active() is not None:
        return
    child = inherited()
    if child is None and kind()[0] != FRONT:
        return  # a process of an engine whose start is over
    from vllm_compile_ext.record import backend

    begin = clock.process_start() or imports.STARTED
    now = clock.now()
    if child is None and (current is not None or (not vllm_command() and now - begin > RECENT)):
        begin = now
    current = Recorder(backend.of(tracing), begin)


def forget() -> None:
    """Stop, without a trace of it: the plugin is not wanted after all."""
    global current
    if current is not None:
        current.finish()
        current = None


def inherited() -> str | None:
    """The file of the start that this process was started in, "" where it has none; None where it is the first."""
    pid, _, path = os.environ.get(VARIABLE, "").partition(" ")
    return None if pid in ("", str(os.getpid())) else path


def parent() -> tuple[str, str, int] | None:
    """Trace, span and flags that the environment names as what started this process."""
    for name in (CONTEXT, CONTEXT.upper()):
        found = _TRACEPARENT.fullmatch(os.environ.get(name, "").strip())
        if found and int(found[1], 16) and int(found[2], 16):
            return found[1], found[2], int(found[3], 16)
    return None


def kind(*, forked: bool = False) -> tuple[str, str, int | None]:
    """What this process is to vLLM 0.32.0: kind, name, rank.  vLLM names the processes that it starts."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    name = multiprocessing.current_process().name if multiprocessing is not None else "MainProcess"
    if name.startswith("EngineCore"):
        return ENGINE, name, None
    if name.startswith("VllmWorker"):
        rank = name.rpartition("-")[2]
        return WORKER, name, int(rank) if rank.isdecimal() else None
    if name.startswith("ApiServer"):
        return FRONT, name, None
    if forked or inherited() is not None:
        helper = "model inspection" if any("registry" in arg for arg in sys.orig_argv) else "helper"
        return HELPER, helper, None
    return FRONT, "front end", None


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


def with_phase(name: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """`attrs` with the phase of one of vLLM's spans."""
    phase = names.PHASES.get(name)
    return attrs if phase is None or "phase" in attrs else {"phase": phase, **attrs}
