"""Each distinct piece of a model is compiled once, by one process of the machine; the others load it.

Ranks of one model compile at the same time.  Whoever comes first to a piece takes its lock and compiles it, the others
go on to the next one and come back.  A process waits only when it has nothing left to compile and holds no lock.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from vllm.compilation.piecewise_backend import PiecewiseBackend

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.program import commit, program
from vllm_compile_ext.program.piece import constants
from vllm_compile_ext.record.events import event, span
from vllm_compile_ext.store.files import DamagedError
from vllm_compile_ext.store.store import Blob, Store, total
from vllm_compile_ext.trace.fingerprint import Unfingerprintable, fingerprint
from vllm_compile_ext.trace.split import Piece

logger = logging.getLogger(__name__)

SHARD = "piece"


def deduplicate(
    pieces: Sequence[Piece], graph: torch.fx.GraphModule
) -> tuple[list[int | None], list[Piece], list[str | None]]:
    """Number of the distinct piece that each piece is, None for splitting operators; the distinct pieces; and their
    fingerprints.

    A piece that holds something whose identity cannot be told is distinct from all others and has no fingerprint.
    """
    known: dict[str | int, int] = {}  # fingerprint, or place of a piece that has none -> number of the distinct piece
    numbers: list[int | None] = []
    distinct: list[Piece] = []
    fingerprints: list[str | None] = []
    for piece in pieces:
        if piece.splitting:
            numbers.append(None)
            continue
        try:
            found = fingerprint(piece, graph)
        except Unfingerprintable as why:
            logger.debug("piece %d is compiled on its own: %s", len(numbers), why)
            found = None
        number = known.setdefault(found or len(numbers), len(distinct))
        if number == len(distinct):
            distinct.append(piece)
            fingerprints.append(found)
        numbers.append(number)
    return numbers, distinct, fingerprints


class DistinctPieces:
    """The distinct pieces of one model: compiled here, or loaded where another process has compiled them.

    backend: upstream's, which compiles a piece.  keys: of each piece in `store`, None for one that is this process's
    own.  facts: "model", and with keys "key", the whole model's.
    constants: the tensors that each piece holds.  Afterwards, kept: piece -> members, of those that are in the store;
    loaded, loaded_bytes: how many others had compiled, and what loading them read.
    """

    def __init__(
        self,
        backend: Any,
        modules: Sequence[torch.fx.GraphModule],
        store: Store | None,
        keys: Sequence[str | None],
        facts: Mapping[str, Any],
    ) -> None:
        self.backend = backend
        self.modules = modules
        self.constants = [constants(module) for module in modules]  # before Inductor gets the modules
        self.kept: dict[int, dict[str, Blob]] = {}
        self.loaded = self.loaded_bytes = 0
        self._store = store
        self._keys = keys
        self._facts = facts
        self._made: dict[int, PiecewiseBackend] = {}
        self._lowered: list[int] = []  # compiled here, neither finished nor kept yet
        self._damaged: set[int] = set()  # pieces that a line was said about

    def compile(self, check: Callable[[], None]) -> list[PiecewiseBackend]:
        """All of them, in order.  `check` runs while compilers do; what it raises ends the compilation."""
        with workers.compiling(workers.wanted(self.backend.vllm_config)) as kernels, ExitStack() as locks:
            for number in range(len(self.modules)):
                self._make(number, locks, wait=False)
            self._note("comparing copies with traces")
            try:
                check()
            except Exception:
                with contextlib.suppress(Exception):  # what a compiler says must not hide why
                    kernels.wait()  # Inductor remembers what it has begun: the next one would get it cancelled
                raise
            self._finish(kernels, locks)
            for number in range(len(self.modules)):
                if number not in self._made:
                    self._make(number, locks, wait=True)
                    self._finish(kernels, locks)  # nothing is held while waiting for the next one
        return [self._made[number] for number in range(len(self.modules))]

    def _make(self, number: int, locks: ExitStack, *, wait: bool) -> None:
        """Load a piece or lower it; neither, without `wait`, while another process compiles it."""
        piece = self._load(number)
        if piece is None and self._claim(number, locks, wait=wait):
            piece = self._load(number)  # whoever had it may have been done with it just before
            if piece is None:
                piece = self._lower(number)
                self._lowered.append(number)
        if piece is not None:
            self._made[number] = piece
            self._note("lowering")

    def _finish(self, kernels: workers.Kernels, locks: ExitStack) -> None:
        """Wait for the kernels of what was lowered here, keep it, and let other processes have it."""
        self._note("waiting for kernels")
        with span("wait for kernels"):
            kernels.wait()
        for number in self._lowered:
            with span(f"keep piece {number}"):
                self._keep(number)
        self._lowered.clear()
        locks.close()

    def _load(self, number: int) -> PiecewiseBackend | None:
        key = self._keys[number]
        manifest = self._store.find(key, SHARD) if self._store and key else None
        if manifest is None or self._store is None:
            return None
        try:
            code = {n.removeprefix("code/"): blob for n, blob in manifest.members.items() if n.startswith("code/")}
            runnables = {shape: program.load_code(self._store, blob) for shape, blob in code.items()}
            piece = program.loaded_piece(self.backend, number, len(self.modules), self._symbols(number), runnables)
        except Exception as error:  # whatever it is, compiling it is the way out
            if number not in self._damaged:
                why = error if isinstance(error, DamagedError) else harmless.error(error)
                logger.warning("compiling one piece again: %s", why)
            self._damaged.add(number)
            return None
        self._store.use(manifest)
        self.kept[number] = manifest.members
        self.loaded += 1
        self.loaded_bytes += total(manifest.members.values())
        return piece

    def _claim(self, number: int, locks: ExitStack, *, wait: bool) -> bool:
        """Take the lock of a piece, and `wait` for who has it; True when this process is to compile it.

        Without a lock it compiles it too, when `wait` is set: then it took longer than it should.
        """
        key = self._keys[number]
        if self._store is None or key is None or not self._store.writable:
            return True
        if not wait:
            return locks.enter_context(self._store.writer(key, 0))
        with span("wait for another rank", wait=True):
            locks.enter_context(self._store.writer(key, settings.of(self.backend.vllm_config).VLLM_COMPILE_WAIT))
        return True

    def _lower(self, number: int) -> PiecewiseBackend:
        """Inductor's work, but for the kernels that compile in the background."""
        with span(f"piece {number}"):
            return PiecewiseBackend(
                self.modules[number],
                self.backend.vllm_config,
                number,
                len(self.modules),
                self._symbols(number),
                self.backend,
                True,
                submod_name=f"piece_{number}",
            )

    def _symbols(self, number: int) -> list[int]:
        """Which inputs of a piece are symbolic sizes."""
        inputs = self.modules[number].graph.find_nodes(op="placeholder")
        return [i for i, node in enumerate(inputs) if isinstance(node.meta["example_value"], torch.SymInt)]

    def _keep(self, number: int) -> None:
        """Write a piece that was compiled here."""
        key = self._keys[number]
        if self._store is None or key is None or not self._store.writable:
            return
        try:
            members = program.keep_piece(self._store, self._made[number], self.constants[number])
            about = {"model": self._facts["model"], "factors": {"program": self._facts["key"]}}
            commit(self._store, kind="piece", key=key, shard=SHARD, members=members, **about)
            self.kept[number] = members
        except Exception as error:
            logger.debug("piece %d is not shared: %s", number, error)  # keeping the model will say it

    def _note(self, doing: str) -> None:
        event("progress", done=len(self._made), total=len(self.modules), what=f"distinct pieces, {doing}")
