"""The memory that graphs take: how much is kept free for them, and whether there is room for one more.

Upstream captures graphs to see what they need and throws them away (vllm/v1/worker/gpu/cudagraph_utils.py,
profile_cudagraph_memory, 0.32.0).  Here that is what they took in an earlier start, or, the first time, an estimate.
What earlier starts found is a small file in the store, one for each model and rank.  It is sealed: with a wrong number
in it, a server could have too little memory left to start.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import msgspec
import torch
import vllm.envs

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.cuda_graphs import coverage, ranks
from vllm_compile_ext.store.store import read_record, write_record

logger = logging.getLogger(__name__)

# The kinds of graph, named as upstream's modes: a whole decode step; the parts of a pass between attention layers.
FULL = "FULL"
PIECEWISE = "PIECEWISE"

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
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
LAYER = {FULL: 52 * KIB, PIECEWISE: 128 * KIB}
# Torch takes memory in steps of 20 MiB (c10/cuda/CUDACachingAllocator, kLargeBuffer, 2.13), and the driver hands it out
# in steps of 2 MiB, so that another order of captures may need more: for all graphs together.
STEP = 20 * MIB
STEPS = 32 * MIB
# Of the shapes that traffic never asked for, the part that memory is kept free for once traffic is known, or, of decode
# steps, while graphs of the other kind are captured.
UNASKED = 0.25

# --- what earlier starts found

FORMAT = 5
KEPT = 200
# Seconds between two writes: a run of captures is one write, and no step waits for the disk.
DELAY = 5

_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class History(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """key: names what graphs depend on.  base: bytes that the last start took for all graphs before the first.  held:
    bytes that its graphs took.  graphs: how many they were.  each: bytes of one, by kind.  needed: bytes for the graphs
    of the next start.  By a shape's place among the model's: used, the batches of all starts that asked for it; times,
    the microseconds of a step on its graph and without one."""

    key: str
    base: _Number
    held: _Number
    graphs: _Number
    each: dict[str, _Number]
    needed: _Number
    used: dict[_Number, _Number]
    times: dict[_Number, tuple[_Number, _Number]]


def read(root: Path, key: str) -> History | None:
    """The history named `key` in the store `root`; None where there is none to be read."""
    return read_record(root, "graphs", key, History, FORMAT)


def write(root: Path, history: History) -> None:
    """Replace the history of this key, and drop the oldest beyond `KEPT`.

    Raises `OSError`, and `UnsafeStoreError` when others can write the store.
    """
    write_record(root, "graphs", history, FORMAT, KEPT)


class Writer(threading.Thread):
    """Writes the last history it was given, `DELAY` seconds after the first: no step waits for the disk."""

    def __init__(self) -> None:
        super().__init__(name="what graphs took", daemon=True)
        self._given: SimpleQueue[History] = SimpleQueue()
        self.put = self._given.put
        with suppress(RuntimeError):  # no more threads: what graphs took is not kept
            self.start()

    def run(self) -> None:
        while True:
            self.write_next()

    def write_next(self) -> None:
        history = self._given.get()
        time.sleep(DELAY)
        while not self._given.empty():
            history = self._given.get()
        try:
            if not settings.store_off():
                write(settings.store(), history)
        except Exception as error:  # the next one may be kept
            logger.debug("what graphs took was not kept (%s)", harmless.error(error))


# --- what graphs may take


@dataclass
class Budget:
    """What graphs may take, and what they took.

    key: of the history.  layers: decoder layers of the model.  base: bytes for what all graphs share, taken before the
    first.  limit: bytes that graphs may take together, beside these.  source: where the figures are from, in words.
    kept: whether the KV cache was made that much smaller.  each, used, times: as in the history of earlier starts.

    held: bytes that graphs take.  costs: bytes of each captured graph, by kind.
    """

    key: str
    layers: int
    base: int
    limit: int
    source: str
    kept: bool = False
    each: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[int, int] = field(default_factory=dict)
    times: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    held: int = 0
    costs: dict[str, list[int]] = field(default_factory=dict)

    def expected(self, kind: str) -> int:
        """Bytes that the next graph of `kind` will take: the mean of those before, what is known of an earlier start
        (or else the estimate) among them; without the largest if it took a step of torch's, which has room for more."""
        known = sorted([self.each.get(kind, self.layers * LAYER[kind]), *self.costs.get(kind, ())])
        return int(statistics.fmean(known[:-1] if known[-1] >= STEP and len(known) > 1 else known))

    def refusal(self, kind: str, later: int = 0) -> str | None:
        """Why one more graph of `kind` would pass the limit; None when it would not.  later: how many decode steps may
        still ask for a graph, for a part of which room is left."""
        reserve = int(UNASKED * later * self.expected(FULL))
        if self.held + self.expected(kind) + reserve <= self.limit:
            return None
        used_up = f"the {self.limit / MIB:.0f} MiB for CUDA graphs are used up"
        return used_up + (f" but for {reserve / MIB:.0f} MiB for decode steps" if reserve else "")

    def shortage(self, kind: str, free: int) -> str | None:
        """Why `free` bytes on the device are too few for a graph of `kind`; None when they are enough."""
        enough = free >= self.expected(kind) + (MARGIN if self.kept else UNKEPT_MARGIN)
        return None if enough else f"only {free / MIB:.0f} MiB are free on the device"

    def add(self, kind: str, size: int, grown: int) -> int:
        """Count a graph that took `size` bytes of the device, of which this process's allocator knows `grown`.  Returns
        what counts of them: another process may have taken memory meanwhile."""
        size = max(0, min(size, max(grown, 0) + ABSURD * self.layers * LAYER[kind]))
        self.held += size
        self.costs.setdefault(kind, []).append(size)
        return size

    def remember(
        self,
        used: Mapping[int, int],
        times: Mapping[int, tuple[int, int]],
        asked: Mapping[str, int],
        unasked: Mapping[str, int],
    ) -> History:
        """What the next start is to know.  It keeps memory free for the graphs that are held, for those that traffic
        `asked` for and that were not captured, and for a part of those it did not ask for; both are numbers by kind."""
        more = sum(count * self.expected(kind) for kind, count in asked.items())
        rest = sum(count * self.expected(kind) for kind, count in unasked.items())
        return History(
            key=self.key,
            base=self.base,
            held=self.held,
            graphs=sum(map(len, self.costs.values())),
            each={kind: self.expected(kind) for kind in {**self.each, **self.costs}},
            needed=self.held + more + int(UNASKED * rest) + STEPS,
            used=dict(used),
            times=dict(times),
        )


# By the configuration's id, from the profiling of memory to the start's end: between the two the KV cache takes all
# that is not kept free, and with `--max-model-len auto` the configuration changes.
_profiled: dict[int, Budget] = {}


def profile(stock: Callable[[Any], int], runner: Any) -> int:
    """In the place of upstream's `profile_cudagraph_memory` (`stock`): bytes to keep free for graphs, at the price of
    one forward pass, or of none."""
    config = runner.vllm_config
    budget, error = None, None
    try:
        if coverage.on_demand(config):
            budget = find_budget(config, lambda: _activations(runner))
    except Exception as caught:
        error = caught
    if budget is None and error is None:
        return stock(runner)
    if ranks.all_agree(error is None) and budget is not None:
        budget.kept = bool(vllm.envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS)
        _profiled[id(config)] = budget
        return budget.base + budget.limit
    coverage.give_up(config)
    why = harmless.error(error) or "another rank has no figure for them"
    logger.warning("CUDA graphs are captured at start, as in stock vLLM (%s)", why)
    logger.debug("no figure for CUDA graphs", exc_info=error)
    return stock(runner)


def take_budget(config: Any) -> Budget:
    """What was kept free when memory was profiled, or, where it was not (kv_cache_memory_bytes), what graphs need."""
    return _profiled.pop(id(config), None) or find_budget(config, lambda: 0)


def find_budget(config: Any, activations: Callable[[], int]) -> Budget:
    """What an earlier start of `config` left on every rank, else an estimate.  `activations()` measures a forward
    pass, on every rank or on none: a rank alone would wait for the others."""
    key, layers = history_key(config), int(config.model_config.get_total_num_hidden_layers())
    known = None if settings.store_off() else read(settings.store(), key)
    if ranks.all_agree(known is not None) and known is not None:
        source = f"{known.graphs} graphs took {known.held / GIB:.2f} GiB in an earlier start"
        times = ranks.from_first(known.times)  # ranks choose graphs by them
        return Budget(key, layers, known.base, known.needed, source, each=known.each, used=known.used, times=times)
    sizes = len(config.compilation_config.cudagraph_capture_sizes or ())
    mode = config.compilation_config.cudagraph_mode
    per_size = mode.has_full_cudagraphs() * LAYER[FULL] + mode.has_piecewise_cudagraphs() * LAYER[PIECEWISE]
    return Budget(key, layers, BASE + activations(), sizes * layers * per_size + STEPS, "an estimate")


def history_key(config: Any) -> str:
    """Names what a model's graphs depend on: the model and its configuration, the shapes, the device, the rank."""
    parts = [
        config.compute_hash(),
        str(config.compilation_config.cudagraph_mode),
        tuple(config.compilation_config.cudagraph_capture_sizes or ()),
        config.scheduler_config.max_num_seqs,
        torch.cuda.get_device_name(),
        config.parallel_config.rank,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _activations(runner: Any) -> int:
    """Peak bytes of a forward pass at the largest size that has a graph."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    size = runner.compilation_config.max_cudagraph_capture_size
    runner._dummy_run(size, skip_attn=True, is_profile=True, skip_eplb=True)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    return int(peak - before)
