"""What happened to graphs in this process, as numbers; the same are at vLLM's ``/metrics``."""

from __future__ import annotations

from collections import Counter

from vllm_compile_ext.cuda_graphs.policy import Shape
from vllm_compile_ext.record import metrics


class Counters:
    """By kind of graph: captured; replayed, the batches that ran on one; missed, those that ran without; skipped, the
    shapes that will have none.  seconds spent capturing, size in bytes of all graphs."""

    def __init__(self) -> None:
        self.captured: Counter[str] = Counter()
        self.replayed: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.size = 0

    def batch(self, best: Shape, ran: Shape | None) -> None:
        """A batch for which stock has `best` ran on `ran`."""
        if ran is None:
            self.missed[best.kind] += 1
            metrics.inc("graphs_missed_total", kind=best.kind)
        else:
            self.replayed[ran.kind] += 1
            metrics.inc("graphs_replayed_total", kind=ran.kind)

    def capture(self, shape: Shape, seconds: float, size: int) -> None:
        """`shape` was captured."""
        self.captured[shape.kind] += 1
        self.seconds.append(seconds)
        self.size = size
        metrics.inc("graphs_captured_total", kind=shape.kind)
        metrics.inc("graph_capture_seconds_total", seconds)
        metrics.set("graph_bytes", size)

    def skip(self, shapes: list[Shape]) -> None:
        """These have no graph for good."""
        self.skipped.update(s.kind for s in shapes)
        for shape in shapes:
            metrics.inc("graphs_skipped_total", kind=shape.kind)
