"""Each distinct piece is compiled by one process of the machine; the others load it.

Ranks of one model compile at the same time.  Whoever comes first to a piece takes its lock and compiles it, the others
go on to the next one and come back.  A process waits only when it has nothing left to compile and holds no lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from vllm_compile_ext import harmless, platforms, settings
from vllm_compile_ext.compilation.entry import Entry
from vllm_compile_ext.program import program
from vllm_compile_ext.record import metrics
from vllm_compile_ext.store.files import DamagedError
from vllm_compile_ext.store.store import Blob, Manifest, key_of, total

logger = logging.getLogger(__name__)

SHARD = "piece"


class Shared:
    """The distinct pieces of one model in the store.

    fingerprints: one a piece, None where a piece is like no other.  entry: None where nothing is kept.
    called: digest of what operators do by Python (`Seen.called`), None where that is not known: nothing is shared then.
    kept: piece -> compile range -> members, of those that are in the store.
    """

    def __init__(self, entry: Entry | None, fingerprints: Sequence[str | None], called: str | None) -> None:
        self.entry = entry if called else None
        self.keys = [
            key_of({"program": entry.key, "piece": piece, "called": called}) if piece and entry and called else None
            for piece in fingerprints
        ]
        self.kept: dict[int, dict[str, dict[str, Blob]]] = {}
        self.loaded = 0
        self._locks = ExitStack()
        self._told: set[int] = set()  # pieces that a line was said about

    def load(self, number: int) -> dict[str, Callable[..., Any]] | None:
        """Compile range -> the compiled piece, when the store has it."""
        key = self.keys[number]
        found = self.entry.store.find(key, SHARD) if self.entry and key else None
        if found is None or self.entry is None:
            return None
        members: dict[str, dict[str, Blob]] = {}
        for name, blob in found.members.items():
            shape, _, rest = name.partition("/")
            members.setdefault(shape, {})[rest] = blob
        try:
            runnables = {s: program.get_piece(self.entry.store, parts["code"]) for s, parts in members.items()}
        except Exception as error:  # whatever it is, compiling it is the way out
            if number not in self._told:
                why = error if isinstance(error, DamagedError) else harmless.error(error)
                logger.warning("compiling one piece again: %s", why)
            self._told.add(number)
            return None
        self.entry.store.use(found)
        self.kept[number] = members
        self.loaded += 1
        metrics.inc("pieces_loaded_total")
        metrics.inc("store_loaded_bytes_total", total(found.members.values()))
        return runnables

    def claim(self, number: int, *, wait: bool) -> bool:
        """Take the lock of a piece, and `wait` for who has it; True when this process is to compile it.

        Without a lock it compiles it too, when `wait` is set: then it took longer than it should.
        """
        key = self.keys[number]
        if self.entry is None or key is None or not self.entry.store.writable:
            return True
        bound = settings.load().VLLM_COMPILE_WAIT if wait else 0
        return self._locks.enter_context(self.entry.store.writer(key, bound)) or wait

    def keep(self, number: int, piece: Any, own: Sequence[Any]) -> None:
        """Write a piece that this process compiled (upstream's `PiecewiseBackend`, and its constants); a failure is no
        error.
        """
        key = self.keys[number]
        if self.entry is None or key is None or not self.entry.store.writable:
            return
        try:
            members = program.put_piece(self.entry.store, piece, own)
            self.entry.store.commit(
                Manifest(
                    kind="piece",
                    key=key,
                    shard=SHARD,
                    model=self.entry.model,
                    created=time.time(),
                    platform=platforms.name(),
                    factors={"program": self.entry.key},
                    members={
                        f"{shape}/{name}": blob for shape, parts in members.items() for name, blob in parts.items()
                    },
                )
            )
            self.entry.grown = True
            self.kept[number] = members
        except Exception as error:
            logger.debug("piece %d is not shared: %s", number, error)  # saving the model will say it

    def release(self) -> None:
        """Let other processes have the pieces that this one has kept."""
        self._locks.close()
