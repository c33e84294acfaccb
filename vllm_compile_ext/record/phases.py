"""Seconds by phase: what a start waited for at each instant from its beginning to ready.

The processes of a start work at the same time, so their spans add up to more than the clock shows.  Here each instant
belongs to one span of one process, and so the rows of the table add up to the wall time:

- of a process, the deepest span that is open (of threads, the one that began last);
- of the processes, the one that the others wait for: one inside a named phase goes before one that is not, work goes
  before waiting (the phase "spawn", or an attribute `wait`), a worker goes before the engine core and this before the
  front end, and of workers the one whose span ends last: the others wait for it at their next collective.

A span without a phase takes that of the nearest span around it; where there is none, the time is "other".
Standard library only: vLLM's front end prints the table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from vllm_compile_ext.record.read import Process, Span, Start

OTHER = "other"
WAITING = "spawn"  # the phase in which a process waits for one that it started

# In the order in which a start goes through them.
PHASES = (
    "interpreter",
    "imports",
    "config",
    "plugin",
    WAITING,
    "distributed",
    "model construction",
    "weights",
    "compile",
    "load compiled code",
    "memory profiling",
    "kv cache",
    "warm-up",
    "graph capture",
    "api server",
    "first request",
    OTHER,
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the wall time and what it is attributed to; span is None where no span was open."""

    begin: int
    end: int
    phase: str
    span: Span | None


@dataclass(frozen=True, slots=True)
class Row:
    """share: of the wall time, 0 to 1."""

    phase: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """begin, end: unix ns.  segments: without a gap.  rows: of phases that took time, in `PHASES`' order."""

    begin: int
    end: int
    segments: list[Segment]
    rows: list[Row]

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9

    @property
    def coverage(self) -> float:
        """The share of the wall time inside named phases, 0 to 1."""
        return 1.0 - next((row.share for row in self.rows if row.phase == OTHER), 0.0)


@dataclass(frozen=True, slots=True)
class Difference:
    """A phase in two starts; None where a start has no such phase."""

    phase: str
    old: float | None
    new: float | None

    @property
    def seconds(self) -> float:
        return (self.new or 0.0) - (self.old or 0.0)


@dataclass(frozen=True, slots=True)
class Death:
    """Where a start that did not get ready ended: the innermost span, None where none was open, and why."""

    process: Process | None
    span: Span | None
    phase: str
    error: str | None


class Tree:
    """The spans of a start by their parents, with an end for those that never ended."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.spans = {span.id: span for span in start.spans}
        self.processes = {process.pid: process for process in start.processes}
        self._exits = {gone.pid: gone.time for gone in start.exits}
        self._depth: dict[str, int] = {}
        self._phase: dict[str, str] = {}
        self._waits: dict[str, bool] = {}
        for span in start.spans:
            self._place(span)

    def _place(self, span: Span) -> None:
        """Depth and phase of `span` and of those around it.  In a damaged file they may go in a circle."""
        path = []
        at: Span | None = span
        seen = set()
        while at is not None and at.id not in self._depth and at.id not in seen:
            seen.add(at.id)
            path.append(at)
            at = self.around(at)
        for inner in reversed(path):
            outer = self.around(inner)
            known = outer is not None and outer.id in self._depth
            self._depth[inner.id] = self._depth[outer.id] + 1 if outer is not None and known else 0
            # Of another process, what its work is for is known, what it waits for is not.
            same = outer is not None and known and outer.pid == inner.pid
            self._phase[inner.id] = inner.phase or (self._phase[outer.id] if outer is not None and same else OTHER)
            waits = inner.attrs.get("wait")
            if waits is None:
                waits = self._waits[outer.id] if outer is not None and same and not inner.phase else False
            self._waits[inner.id] = bool(waits) or self._phase[inner.id] == WAITING

    def around(self, span: Span) -> Span | None:
        """The span that `span` is part of; None for an outermost one."""
        return self.spans.get(span.parent) if span.parent is not None else None

    def phase(self, span: Span) -> str:
        """Its own phase, or the one it inherits."""
        return self._phase[span.id]

    def depth(self, span: Span) -> int:
        return self._depth[span.id]

    def waits(self, span: Span) -> bool:
        """Whether the process does nothing meanwhile but wait for another."""
        return self._waits[span.id]

    def end(self, span: Span) -> int:
        """Its end; of one that never ended that of its process, or of what is recorded."""
        if span.end is not None:
            return span.end
        return max(span.start, self._exits.get(span.pid, self.start.last))

    def leaves(self) -> list[Span]:
        """The spans that no other span is part of."""
        outer = {span.parent for span in self.start.spans}
        return [span for span in self.start.spans if span.id not in outer]

    def within(self, span: Span) -> tuple[int, int]:
        """Of a process's open spans, the greatest is the innermost."""
        return self.depth(span), span.start

    def preference(self, span: Span) -> tuple[bool, bool, int, int]:
        """Of the innermost spans of processes, the greatest is the one that the instant belongs to."""
        process = self.processes.get(span.pid)
        named = self.phase(span) != OTHER
        return named, named and not self.waits(span), process.depth if process else 0, self.end(span)


def breakdown(start: Start, begin: int | None = None, end: int | None = None) -> Breakdown:
    """From the beginning to ready, or to the last thing recorded where it did not come to that."""
    tree = Tree(start)
    first = start.begin if begin is None else begin
    last = start.ready if start.ready is not None else start.last
    last = max(first, last if end is None else end)
    segments = _segments(tree, start.spans, first, last)
    return Breakdown(first, last, segments, _rows(segments, last - first))


def _segments(tree: Tree, spans: list[Span], begin: int, end: int) -> list[Segment]:
    """What `spans` fill of `begin` to `end` without a gap, and no two neighbours alike."""
    edges: dict[int, tuple[list[Span], list[Span]]] = defaultdict(lambda: ([], []))
    for span in spans:
        opened, closed = max(span.start, begin), min(tree.end(span), end)
        if opened < closed:
            edges[opened][0].append(span)
            edges[closed][1].append(span)
    times = sorted({begin, end, *edges})
    opened_by: dict[int, dict[str, Span]] = defaultdict(dict)
    found: list[Segment] = []
    for time, until in pairwise(times):
        if time in edges:
            for span in edges[time][1]:
                opened_by[span.pid].pop(span.id, None)
            for span in edges[time][0]:
                opened_by[span.pid][span.id] = span
        innermost = [max(open_.values(), key=tree.within) for open_ in opened_by.values() if open_]
        chosen = max(innermost, key=tree.preference, default=None)
        phase = OTHER if chosen is None else tree.phase(chosen)
        if found and found[-1].span is chosen:
            found[-1] = Segment(found[-1].begin, until, phase, chosen)
        else:
            found.append(Segment(time, until, phase, chosen))
    return found


def _rows(segments: Iterable[Segment], wall: int) -> list[Row]:
    total: dict[str, int] = defaultdict(int)
    for segment in segments:
        total[segment.phase] += segment.end - segment.begin
    return [Row(phase, total[phase] / 1e9, total[phase] / wall if wall else 0.0) for phase in ordered(total)]


def by_process(start: Start) -> dict[int, list[Row]]:
    """Seconds by phase of each process for itself, whatever the others did; shares are of the start's wall time."""
    tree = Tree(start)
    whole = breakdown(start)
    found = {}
    for process in start.processes:
        spans = [span for span in start.spans if span.pid == process.pid]
        segments = _segments(tree, spans, whole.begin, whole.end)
        found[process.pid] = _rows((s for s in segments if s.span is not None), whole.end - whole.begin)
    return found


def compare(old: Breakdown, new: Breakdown) -> list[Difference]:
    """The phases of both, in `PHASES`' order."""
    before, after = _seconds(old.rows), _seconds(new.rows)
    return [Difference(phase, before.get(phase), after.get(phase)) for phase in ordered({**before, **after})]


def _seconds(rows: Iterable[Row]) -> dict[str, float]:
    return {row.phase: row.seconds for row in rows}


def ordered(phases: Mapping[str, object] | Iterable[str]) -> list[str]:
    """In `PHASES`' order; what is not there, of another version, goes before "other"."""
    known = {phase: place for place, phase in enumerate(PHASES)}
    return sorted(phases, key=lambda phase: (known.get(phase, len(PHASES) - 1.5), phase))


def death(start: Start) -> Death | None:
    """The phase that a start died in; None for one that got ready.  A start that still runs looks like a killed one.

    The process is the deepest that says anything: when a worker dies, those above it end because of that.
    """
    if start.ready is not None:
        return None
    tree = Tree(start)
    errors = {gone.pid: gone.error for gone in start.exits if gone.error}
    candidates = [span for span in start.spans if _fatal(tree, span)]

    def rank(span: Span) -> tuple[bool, int, bool, int, int, int]:
        process = tree.processes.get(span.pid)
        depth = process.depth if process else 0
        failed = span.error is not None
        # An error goes from the inside out: the first to end is where it happened.  Killed: the last to begin.
        moment = -(span.end or 0) if failed else span.start
        named = tree.phase(span) != OTHER and not tree.waits(span)
        return named, depth, failed, moment, tree.depth(span), span.start

    span = max(candidates, key=rank, default=None)
    if span is None:
        return Death(None, None, OTHER, next(iter(errors.values()), None))
    error = span.error or errors.get(span.pid) or next(iter(errors.values()), None)
    return Death(tree.processes.get(span.pid), span, tree.phase(span), error)


def _fatal(tree: Tree, span: Span) -> bool:
    """Whether it was never left, or was left with an error that nothing around it in its process held up."""
    seen = set()
    at: Span | None = span
    while at is not None and at.pid == span.pid and at.id not in seen:
        if at.end is not None and at.error is None:
            return False
        seen.add(at.id)
        at = tree.around(at)
    return True
