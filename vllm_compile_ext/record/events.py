"""One call for each thing that happens: the line in the log, the counters and the note in the record of the start."""

from __future__ import annotations

import logging
from typing import Any

from vllm_compile_ext.record import metrics
from vllm_compile_ext.record.spans import note

logger = logging.getLogger(__name__)

# Event -> counter -> what is added to it: the fact of that name, or a number.
COUNTS: dict[str, dict[str, str | int]] = {
    "miss": {"store_misses_total": 1},
    "loaded": {
        "store_hits_total": 1,
        "store_load_seconds_total": "seconds",
        "store_loaded_bytes_total": "bytes",
        "pieces_loaded_total": "pieces",
    },
    "compiled": {
        "pieces_compiled_total": "compiled",
        "pieces_loaded_total": "loaded",
        "store_loaded_bytes_total": "loaded_bytes",
    },
    "kept": {"store_kept_bytes_total": "bytes"},
    "not kept": {"store_failures_total": 1},
    "refuted": {"copies_refuted_total": 1},
    "function compiled": {"functions_compiled_total": 1},
    "function loaded": {"functions_loaded_total": 1, "store_loaded_bytes_total": "bytes"},
    "captured": {"graph_capture_seconds_total": "seconds"},
    "function kept": {"store_kept_bytes_total": "bytes"},
}
# What an operator should look at; the rest is logged at level INFO.
WARNINGS = frozenset({"fallback", "graphs skipped", "not kept", "refuted"})


def event(name: str, line: str = "", /, *, level: int | None = None, **facts: Any) -> None:
    """Log `line`, count by `COUNTS`, and note both line and facts in the record of the start; never raises.

    line: a sentence for people, safe to print; without one nothing is logged.  level: of `logging`; by `WARNINGS` where
    it is None.  facts: what programs read of it, such as key, model, shard, bytes, seconds.
    """
    if line:
        logger.log(level or (logging.WARNING if name in WARNINGS else logging.INFO), "%s", line, stacklevel=2)
    for counter, amount in COUNTS.get(name, {}).items():
        metrics.inc(counter, facts.get(amount, 0) if isinstance(amount, str) else amount)
    note(name, line=line, **facts)
