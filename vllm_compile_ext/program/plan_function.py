"""The compiled model: a plan that calls unique pieces, and what is kept of it for the next start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.aot_compile import SerializableCallable
from vllm.compilation.piecewise_backend import PiecewiseBackend

from vllm_compile_ext.key.seen import NotDescribed, Seen
from vllm_compile_ext.store.store import Blob
from vllm_compile_ext.trace import plan as plans
from vllm_compile_ext.upstream import backends as upstream


class PlanFunction(SerializableCallable):
    """What Dynamo's bytecode calls for a model that was traced once.

    plan: straight code over call sites; pieces: one upstream `PiecewiseBackend` for each distinct piece, which picks
    the compile range by the number of tokens.  The tensors of copied layers are not passed by the bytecode: `bind`
    names the model that they are read from, at every call.
    """

    def __init__(self, plan: plans.Plan, pieces: list[Any], vllm_config: Any, prefix: str, is_encoder: bool) -> None:
        self.plan = plan
        self.pieces = pieces
        self.prefix = prefix
        self.is_encoder = is_encoder
        # Distinct piece -> compile range -> its members, for the pieces that the store has.
        self.kept: Mapping[int, dict[str, dict[str, Blob]]] = {}
        # The constants that each distinct piece holds, of a model that was compiled here.
        self.constants: Sequence[list[Any]] = [[] for _ in pieces]
        # What the trace has read, or why that cannot be told.
        self.seen: Seen | NotDescribed | None = None
        last = len(plan.calls) - 1
        # Each call site replays CUDA graphs of its own: its tensors have addresses of their own.
        sites = [
            upstream.wrap_with_cudagraph_if_needed(
                pieces[number], vllm_config, vllm_config.compilation_config, site == 0, site == last
            )
            for site, number in enumerate(plan.calls)
        ]
        self._run = plan.load(sites)
        self._gather: Callable[[], list[Any]] | None = None

    def bind(self, model: Any) -> None:
        """Read the tensors of copied layers from `model` from now on; replaced ones are seen (`Plan.gatherer`)."""
        self._gather = self.plan.gatherer(model)

    def __call__(self, *args: Any) -> Any:
        assert self._gather is not None, "bind() comes before the first call"
        return self._run(self._gather(), *args)

    @classmethod
    def serialize_compile_artifacts(cls, compiled_fn: PlanFunction) -> bytes:
        raise TypeError("program/program.py keeps it")  # torch wants the method, and does not call it

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> PlanFunction:
        raise TypeError("program/program.py loads it")

    @classmethod
    def of(
        cls,
        plan: plans.Plan,
        symbols: Sequence[list[int]],
        runnables: Sequence[Mapping[str, Callable[..., Any]]],
        vllm_config: Any,
        prefix: str,
        is_encoder: bool,
    ) -> PlanFunction:
        """From pieces that are compiled: `runnables`, for each one compile range -> callable."""
        from vllm.compilation.backends import VllmBackend

        backend = VllmBackend(vllm_config, prefix, is_encoder)
        pieces = [
            loaded_piece(backend, number, len(runnables), symbols[number], found)
            for number, found in enumerate(runnables)
        ]
        return cls(plan, pieces, vllm_config, prefix, is_encoder)


def loaded_piece(
    backend: Any, number: int, count: int, symbols: list[int], runnables: Mapping[str, Callable[..., Any]]
) -> PiecewiseBackend:
    """Upstream's dispatch by number of tokens over a piece that is compiled."""
    return PiecewiseBackend(
        graph=None,
        vllm_config=backend.vllm_config,
        piecewise_compile_index=number,
        total_piecewise_compiles=count,
        sym_shape_indices=symbols,
        vllm_backend=backend,
        returns_tuple=True,
        compiled_runnables=dict(runnables),
    )
