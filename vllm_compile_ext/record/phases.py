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
from typing import NamedTuple

from vllm_compile_ext.record.read import OTHER, WAITING, Process, Span, Start

# In the order in which a start goes through them, with their colours: by light (dark enough for white text), and in the
# dark and on a terminal (light enough for black text).  Neighbours are families: Python, processes, the model,
# compiling, memory, graphs, serving.
PHASES = {
    "interpreter": ("#3a5a99", "#8fb3ea"),
    "imports": ("#2563c9", "#6ba3f5"),
    "config": ("#3b7390", "#8fb8d8"),
    "plugin": ("#1d6f8f", "#5ab3d6"),
    WAITING: ("#667080", "#9aa4b2"),
    "distributed": ("#5860b8", "#98a3ee"),
    "model construction": ("#2f7d55", "#6fbf8b"),
    "weights": ("#1a7340", "#4fc07c"),
    "compile": ("#b3560a", "#f0a33c"),
    "load compiled code": ("#8d6608", "#f2c35a"),
    "memory profiling": ("#8250c8", "#c09af0"),
    "kv cache": ("#6f42b5", "#ab8ae6"),
    "warm-up": ("#9a3f9a", "#d890d8"),
    "graph capture": ("#c22f55", "#f07f9a"),
    "api server": ("#0c7a72", "#45b8ac"),
    "first request": ("#2a7680", "#7cc9c0"),
    OTHER: ("#6b7280", "#a0a7b1"),
}
_PLACE = {phase: place for place, phase in enumerate(PHASES)}


class Segment(NamedTuple):
    """A stretch of the wall time and what it is attributed to; span is None where no span was open."""

    begin: int
    end: int
    phase: str
    span: Span | None


class Row(NamedTuple):
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


class Death(NamedTuple):
    """Where a start that did not get ready ended: the innermost span, None where none was open, and why."""

    process: Process | None
    span: Span | None
    phase: str
    error: str | None


def breakdown(start: Start, end: int | None = None) -> Breakdown:
    """From the beginning to ready, or to the last thing recorded where it did not come to that."""
    begin = start.begin
    end = max(begin, end or start.ready or start.last)
    segments = _segments(start, start.spans, begin, end)
    return Breakdown(begin, end, segments, _rows(segments, end - begin))


def by_process(start: Start) -> dict[int, list[Row]]:
    """Seconds by phase of each process for itself, whatever the others did; shares are of the start's wall time."""
    whole, found = breakdown(start), {}
    for process in start.processes:
        spans = (span for span in start.spans if span.pid == process.pid)
        segments = _segments(start, spans, whole.begin, whole.end)
        found[process.pid] = _rows((one for one in segments if one.span is not None), whole.end - whole.begin)
    return found


def _segments(start: Start, spans: Iterable[Span], begin: int, end: int) -> list[Segment]:
    """What `spans` fill of `begin` to `end` without a gap, and no two neighbours alike."""
    edges: dict[int, tuple[list[Span], list[Span]]] = defaultdict(lambda: ([], []))
    for span in spans:
        opened, closed = max(span.start, begin), min(start.end(span), end)
        if opened < closed:
            edges[opened][0].append(span)
            edges[closed][1].append(span)
    depths = {process.pid: process.depth for process in start.processes}

    def preference(span: Span) -> tuple[bool, bool, int, int]:
        """Of the innermost spans of processes, the greatest is the one that the instant belongs to."""
        named = span.phase != OTHER
        return named, named and not span.waits, depths[span.pid], start.end(span)

    open_spans: dict[int, dict[str, Span]] = defaultdict(dict)  # of each process
    found: list[Segment] = []
    for time, until in pairwise(sorted({begin, end, *edges})):
        opening, closing = edges.get(time, ((), ()))
        for span in closing:
            del open_spans[span.pid][span.id]
        for span in opening:
            open_spans[span.pid][span.id] = span
        innermost = [max(each.values(), key=lambda s: (s.depth, s.start)) for each in open_spans.values() if each]
        chosen = max(innermost, key=preference, default=None)
        if found and found[-1].span is chosen:
            found[-1] = found[-1]._replace(end=until)
        else:
            found.append(Segment(time, until, OTHER if chosen is None else chosen.phase, chosen))
    return found


def _rows(segments: Iterable[Segment], wall: int) -> list[Row]:
    total: dict[str, int] = defaultdict(int)
    for segment in segments:
        total[segment.phase] += segment.end - segment.begin
    return [Row(phase, total[phase] / 1e9, total[phase] / wall if wall else 0.0) for phase in _ordered(total)]


def compare(old: Breakdown, new: Breakdown) -> list[tuple[str, float | None, float | None]]:
    """The phases of both, in `PHASES`' order, with their seconds in each; None where a start has no such phase."""
    before, after = ({row.phase: row.seconds for row in each.rows} for each in (old, new))
    return [(phase, before.get(phase), after.get(phase)) for phase in _ordered({**before, **after})]


def _ordered(phases: Iterable[str]) -> list[str]:
    """In `PHASES`' order; what is not there, of another version, goes before "other"."""
    return sorted(phases, key=lambda phase: (_PLACE.get(phase, len(PHASES) - 1.5), phase))


def death(start: Start) -> Death | None:
    """The phase that a start died in; None for one that got ready.  A start that still runs looks like a killed one.

    The process is the deepest that says anything: when a worker dies, those above it end because of that.
    """
    if start.ready is not None:
        return None
    processes = {process.pid: process for process in start.processes}
    errors = {gone.pid: gone.error for gone in start.exits if gone.error}

    def rank(span: Span) -> tuple[bool, int, bool, int, int, int]:
        failed = span.error is not None
        # An error goes from the inside out: the first to end is where it happened.  Killed: the last to begin.
        moment = -(span.end or 0) if failed else span.start
        named = span.phase != OTHER and not span.waits
        return named, processes[span.pid].depth, failed, moment, span.depth, span.start

    span = max((span for span in start.spans if span.fatal), key=rank, default=None)
    error = next(iter(errors.values()), None)
    if span is None:
        return Death(None, None, OTHER, error)
    return Death(processes[span.pid], span, span.phase, span.error or errors.get(span.pid) or error)
