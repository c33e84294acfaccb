"""What must hold of the record of any start that came up."""

from __future__ import annotations

from pathlib import Path

from vllm_compile_ext.record import phases, read
from vllm_compile_ext.record.read import Span, Start


def starts(cache: Path) -> list[Start]:
    """The starts that are recorded in the cache root `cache`, the oldest first."""
    return sorted((read.read(path) for path in read.recorded(cache / "compile_starts")), key=lambda start: start.time)


def root(start: Start) -> Span:
    """The one span that is part of no other of the start."""
    known = {span.id for span in start.spans}
    (found,) = [span for span in start.spans if span.parent not in known]
    return found


def check_whole(start: Start) -> None:
    """One tree of ended spans up to the first token, with nearly all of the time in named phases."""
    assert root(start).name == "start"
    assert root(start).end == start.first_token
    assert [span.name for span in start.spans if span.end is None] == []
    assert start.skipped == 0
    assert phases.breakdown(start).coverage >= 0.95
    assert phases.breakdown(start, end=start.first_token).coverage >= 0.95
