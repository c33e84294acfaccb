"""Seconds by phase: what a start waited for at each instant from its beginning to ready.

The processes of a start work at the same time, so their spans add up to more than the clock shows.  Here each instant
belongs to one span of one process, and so the rows of the table add up to the wall time:

- of a process, the deepest span that is open (of threads, the one that began last);
- of the processes, the one that the others wait for: one inside a named phase goes before one that is not, work goes
  before waiting (the phase "spawn", or an attribute `wait`), a worker goes before the engine core and this before the
  front end, and of workers the one whose span ends last: the others wait for it at their next collective.

A span without a phase takes that of the nearest span around it; where there is none, the time is "other".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
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
_PLACE = {phase: place for place, phase in enumerate(PHASES)}


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
        return 1.0 - sum(row.share for row in self.rows if row.phase == OTHER)


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
            for each in reversed(self.path(span)):
                if each.id not in self._depth:
                    self._place(each)

    def _place(self, span: Span) -> None:
        """Find depth, phase and waiting of `span`, whose parent has been placed unless they go in a circle."""
        outer = self.around(span)
        outer = outer if outer is not None and outer.id in self._depth else None
        self._depth[span.id] = self._depth[outer.id] + 1 if outer is not None else 0
        # Of another process, what its work is for is known, what it waits for is not.
        inherits = outer is not None and outer.pid == span.pid
        self._phase[span.id] = span.phase or (self._phase[outer.id] if outer is not None and inherits else OTHER)
        waits = span.attrs.get("wait")
        if waits is None and outer is not None and inherits and not span.phase:
            waits = self._waits[outer.id]
        self._waits[span.id] = bool(waits) or self._phase[span.id] == WAITING

    def around(self, span: Span) -> Span | None:
        """The span that `span` is part of; None for an outermost one."""
        return self.spans.get(span.parent) if span.parent is not None else None

    def path(self, span: Span) -> list[Span]:
        """`span` and those around it, from the inside out.  In a damaged file they may go in a circle, once."""
        path: dict[str, Span] = {}
        at: Span | None = span
        while at is not None and at.id not in path:
            path[at.id] = at
            at = self.around(at)
        return list(path.values())

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

    def _preference(self, span: Span) -> tuple[bool, bool, int, int]:
        """Of the innermost spans of processes, the greatest is the one that the instant belongs to."""
        named = self.phase(span) != OTHER
        return named, named and not self.waits(span), self.processes[span.pid].depth, self.end(span)

    def segments(self, spans: Iterable[Span], begin: int, end: int) -> list[Segment]:
        """What `spans` fill of `begin` to `end` without a gap, and no two neighbours alike."""
        edges: dict[int, tuple[list[Span], list[Span]]] = defaultdict(lambda: ([], []))
        for span in spans:
            opened, closed = max(span.start, begin), min(self.end(span), end)
            if opened < closed:
                edges[opened][0].append(span)
                edges[closed][1].append(span)
        open_spans: dict[int, dict[str, Span]] = defaultdict(dict)  # of each process
        found: list[Segment] = []
        for time, until in pairwise(sorted({begin, end, *edges})):
            opening, closing = edges.get(time, ((), ()))
            for span in closing:
                del open_spans[span.pid][span.id]
            for span in opening:
                open_spans[span.pid][span.id] = span
            innermost = [
                max(each.values(), key=lambda s: (self.depth(s), s.start)) for each in open_spans.values() if each
            ]
            chosen = max(innermost, key=self._preference, default=None)
            if found and found[-1].span is chosen:
                found[-1] = Segment(found[-1].begin, until, found[-1].phase, chosen)
            else:
                found.append(Segment(time, until, OTHER if chosen is None else self.phase(chosen), chosen))
        return found


def breakdown(start: Start, begin: int | None = None, end: int | None = None) -> Breakdown:
    """From the beginning to ready, or to the last thing recorded where it did not come to that."""
    first = start.begin if begin is None else begin
    last = start.ready if start.ready is not None else start.last
    last = max(first, last if end is None else end)
    segments = Tree(start).segments(start.spans, first, last)
    return Breakdown(first, last, segments, _rows(segments, last - first))


def _rows(segments: Iterable[Segment], wall: int) -> list[Row]:
    total: dict[str, int] = defaultdict(int)
    for segment in segments:
        total[segment.phase] += segment.end - segment.begin
    return [Row(phase, total[phase] / 1e9, total[phase] / wall if wall else 0.0) for phase in _ordered(total)]


def by_process(start: Start) -> dict[int, list[Row]]:
    """Seconds by phase of each process for itself, whatever the others did; shares are of the start's wall time."""
    tree, whole, found = Tree(start), breakdown(start), {}
    for process in start.processes:
        segments = tree.segments((one for one in start.spans if one.pid == process.pid), whole.begin, whole.end)
        found[process.pid] = _rows((one for one in segments if one.span is not None), whole.end - whole.begin)
    return found


def compare(old: Breakdown, new: Breakdown) -> list[Difference]:
    """The phases of both, in `PHASES`' order."""
    before, after = ({row.phase: row.seconds for row in each.rows} for each in (old, new))
    return [Difference(phase, before.get(phase), after.get(phase)) for phase in _ordered({**before, **after})]


def _ordered(phases: Iterable[str]) -> list[str]:
    """In `PHASES`' order; what is not there, of another version, goes before "other"."""
    return sorted(phases, key=lambda phase: (_PLACE.get(phase, len(PHASES) - 1.5), phase))


def death(start: Start) -> Death | None:
    """The phase that a start died in; None for one that got ready.  A start that still runs looks like a killed one.

    The process is the deepest that says anything: when a worker dies, those above it end because of that.
    """
    if start.ready is not None:
        return None
    tree = Tree(start)
    errors = {gone.pid: gone.error for gone in start.exits if gone.error}

    def rank(span: Span) -> tuple[bool, int, bool, int, int, int]:
        failed = span.error is not None
        # An error goes from the inside out: the first to end is where it happened.  Killed: the last to begin.
        moment = -(span.end or 0) if failed else span.start
        named = tree.phase(span) != OTHER and not tree.waits(span)
        return named, tree.processes[span.pid].depth, failed, moment, tree.depth(span), span.start

    def is_fatal(span: Span) -> bool:
        """Whether it was never left, or was left with an error that nothing around it in its process held up."""
        return not any(one.pid == span.pid and one.end is not None and one.error is None for one in tree.path(span))

    span = max(filter(is_fatal, start.spans), key=rank, default=None)
    error = next(iter(errors.values()), None)
    if span is None:
        return Death(None, None, OTHER, error)
    return Death(tree.processes[span.pid], span, tree.phase(span), span.error or errors.get(span.pid) or error)
