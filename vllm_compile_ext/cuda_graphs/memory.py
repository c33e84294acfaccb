"""The memory that a model's graphs need: remembered from an earlier start, or estimated."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vllm_compile_ext import settings
from vllm_compile_ext.cuda_graphs import ranks, record
from vllm_compile_ext.cuda_graphs.budget import BASE, Budget, estimate
from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE, Policy, Shape
from vllm_compile_ext.store.files import UnsafeStoreError

logger = logging.getLogger(__name__)

# Seconds between two writes of a record: a run of captures is one write, and no step waits for the disk.
DELAY = 5


class Need(NamedTuple):
    """size: bytes.  graphs: the part of them that is for graphs alone.  source: where that is from, in words.  kept:
    whether the KV cache was made that much smaller."""

    size: int
    graphs: int
    source: str
    kept: bool


# Key, what is remembered and need by the configuration's id, from the profiling of memory to the start's end: between
# the two the KV cache takes all that is not kept free, and with `--max-model-len auto` the configuration changes.
_kept_free: dict[int, tuple[str, record.Record | None, Need]] = {}


def key_of(config: Any) -> str:
    """What a model's graphs depend on: the model and its configuration, the shapes, the device, the rank."""
    compilation = config.compilation_config
    parts = (
        config.compute_hash(),
        str(compilation.cudagraph_mode),
        tuple(compilation.cudagraph_capture_sizes or ()),
        config.scheduler_config.max_num_seqs,
        torch.cuda.get_device_name(),
        config.parallel_config.rank,
    )
    return record.key_of(parts)


def keep_free(config: Any, activations: Callable[[], int]) -> int:
    """Bytes to keep free for graphs.  `activations()` measures a forward pass, where nothing is remembered."""
    key, known, need = _find(config, activations)
    need = need._replace(kept=_applied())
    _kept_free[id(config)] = key, known, need
    return need.size


def _find(config: Any, activations: Callable[[], int]) -> tuple[str, record.Record | None, Need]:
    key = key_of(config)
    known = None if settings.store_off() else record.read(settings.store(), key)
    if not ranks.all_agree(known is not None):  # a rank that measured a forward pass alone would wait for the others
        known = None
    return key, known, _need(config, known, activations)


def _need(config: Any, known: record.Record | None, activations: Callable[[], int]) -> Need:
    if known is not None:
        source = f"{known.graphs} graphs took {known.held / (1 << 30):.2f} GiB in an earlier start"
        return Need(known.base + known.needed, known.needed, source, kept=False)
    sizes = len(config.compilation_config.cudagraph_capture_sizes or ())
    mode = config.compilation_config.cudagraph_mode
    graphs = {FULL: sizes * mode.has_full_cudagraphs(), PIECEWISE: sizes * mode.has_piecewise_cudagraphs()}
    expected = estimate(layers(config), graphs)
    return Need(BASE + activations() + expected, expected, "an estimate", kept=False)


def _applied() -> bool:
    """Whether vLLM keeps free what it asks for (v1/worker/gpu_worker.py, determine_available_memory)."""
    import vllm.envs

    return bool(vllm.envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS)


def layers(config: Any) -> int:
    """Decoder layers of the model."""
    return int(config.model_config.get_total_num_hidden_layers())


class Memory:
    """This start's part of what is remembered."""

    def __init__(self, config: Any, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)
        # Where memory was not profiled (kv_cache_memory_bytes), nothing was kept free.
        kept = _kept_free.pop(id(config), None)
        self.key, known, self.need = kept or _find(config, lambda: 0)
        self.each = known.each if known else {}
        used = known.used if known else []
        self.before = Counter({self.shapes[u.number]: u.batches for u in used if 0 <= u.number < len(self.shapes)})
        self._pending: tuple[Counter[Shape], set[Shape], Budget] | None = None
        self._lock = threading.Lock()

    def keep(self, policy: Policy, budget: Budget) -> None:
        """Have the record written in `DELAY` seconds.  A step only waits for copies to be made."""
        costs = {kind: list(sizes) for kind, sizes in budget.costs.items()}
        state = policy.asked.copy(), policy.captured.copy(), replace(budget, costs=costs)
        with self._lock:
            waiting, self._pending = self._pending is not None, state
        if waiting:
            return
        timer = threading.Timer(DELAY, self._write)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:  # no more threads: the next state may find one
            logger.debug("what graphs took is not kept: %s", error)
            with self._lock:
                self._pending = None

    def _record(self, asked: Counter[Shape], captured: set[Shape], budget: Budget) -> record.Record:
        used = asked + self.before
        without = [s for s in self.shapes if s not in captured]
        return record.Record(
            base=budget.base,
            held=budget.held,
            graphs=len(captured),
            each={kind: budget.expected(kind) for kind in {**budget.each, **budget.costs}},
            needed=budget.needed(
                Counter(s.kind for s in without if used[s]), Counter(s.kind for s in without if not used[s])
            ),
            used=[record.Used(number, used[shape]) for number, shape in enumerate(self.shapes) if used[shape]],
        )

    def _write(self) -> None:
        with self._lock:
            state, self._pending = self._pending, None
        try:
            if state is not None and not settings.store_off():
                record.write(settings.store(), self.key, self._record(*state))
        except (OSError, UnsafeStoreError) as error:
            logger.debug("what graphs took was not kept: %s", error)
