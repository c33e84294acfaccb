"""How much device memory graphs may take.

Upstream captures graphs to see what they need and throws them away (vllm/v1/worker/gpu/cudagraph_utils.py,
profile_cudagraph_memory, 0.32.0).  Here that is what they took in an earlier start, or, the first time, an estimate.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

KIB = 1 << 10
MIB = 1 << 20
# What all graphs of a process share beside the memory of a forward pass: outputs, cuBLAS's workspace for their stream.
BASE = 64 * MIB
# Never taken for graphs: what a step may need beside them.  More where nothing was kept free for graphs, since the
# largest step may still be to come.
MARGIN = 128 * MIB
UNKEPT_MARGIN = 1024 * MIB
# A graph that seems to take so many times what is expected: another process has taken the rest.
ABSURD = 4
# The driver's memory for each decoder layer in a graph, H100, driver 580: a graph of a whole step is one graph, the
# other kind is one for each piece of the model.
LAYER = {"FULL": 52 * KIB, "PIECEWISE": 128 * KIB}
# Torch takes memory in steps of 20 MiB (c10/cuda/CUDACachingAllocator, kLargeBuffer, 2.13), and the driver hands it out
# in steps of 2 MiB, so that another order of captures may need more: for all graphs together.
STEP = 20 * MIB
STEPS = 32 * MIB
# Of the shapes that traffic never asked for, the part that memory is kept free for once traffic is known, or, of decode
# steps, while graphs of the other kind are captured.
UNASKED = 0.25


def estimate(layers: int, graphs: Mapping[str, int]) -> int:
    """Bytes for `graphs`, number by kind, of a model with `layers` decoder layers, of which nothing was measured."""
    return STEPS + sum(count * layers * LAYER[kind] for kind, count in graphs.items())


@dataclass
class Budget:
    """limit: bytes that graphs may take together.  layers: decoder layers.  margin: bytes of the device that stay free.
    base: bytes that were taken for all graphs before the first.  each: bytes of a graph in an earlier start, by kind.
    held: bytes that graphs take.  costs: bytes of each captured graph, by kind."""

    limit: int
    layers: int
    margin: int = MARGIN
    base: int = 0
    each: Mapping[str, int] = field(default_factory=dict)
    held: int = 0
    costs: dict[str, list[int]] = field(default_factory=dict)

    def expected(self, kind: str) -> int:
        """Bytes that the next graph of `kind` will take: the mean of those before, what is known of an earlier start
        (or else the estimate) among them; without the largest if it took a step of torch's, which has room for more."""
        known = sorted([self.each.get(kind, self.layers * LAYER[kind]), *self.costs.get(kind, ())])
        return int(statistics.fmean(known[:-1] if known[-1] >= STEP and len(known) > 1 else known))

    def over(self, kind: str, later: int = 0) -> str | None:
        """Why a graph of `kind` is more than graphs may take together; None when it is not.  later: decode steps that
        may still ask for a graph, for a part of which room is left."""
        reserve = int(UNASKED * later * self.expected("FULL"))
        if self.held + self.expected(kind) + reserve <= self.limit:
            return None
        used_up = f"the {self.limit / MIB:.0f} MiB for CUDA graphs are used up"
        return used_up + (f" but for {reserve / MIB:.0f} MiB for decode steps" if reserve else "")

    def short(self, kind: str, free: int) -> str | None:
        """Why `free` bytes on the device are too few for a graph of `kind`; None when they are enough."""
        if free >= self.expected(kind) + self.margin:
            return None
        return f"only {free / MIB:.0f} MiB are free on the device"

    def took(self, kind: str, size: int, grown: int) -> int:
        """A graph took `size` bytes of the device, of which this process's allocator knows `grown`.  Returns what
        counts: another process may have taken memory meanwhile."""
        size = max(0, min(size, max(grown, 0) + ABSURD * self.layers * LAYER[kind]))
        self.held += size
        self.costs.setdefault(kind, []).append(size)
        return size

    def needed(self, asked: Mapping[str, int], unasked: Mapping[str, int]) -> int:
        """What the next start keeps free beside `base`: for the graphs that are held, those not captured that traffic
        `asked` for, and a part of those it did not ask for; both are numbers by kind."""
        more = sum(count * self.expected(kind) for kind, count in asked.items())
        rest = sum(count * self.expected(kind) for kind, count in unasked.items())
        return self.held + more + int(UNASKED * rest) + STEPS
