"""The compiled model: a plan that calls unique pieces, and what is kept of it for the next start."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from torch._dynamo.aot_compile import SerializableCallable
from vllm.compilation.caching import StandaloneCompiledArtifacts
from vllm.compilation.piecewise_backend import PiecewiseBackend

from vllm_compile_ext.graph import plan as plans
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
        """Read the tensors of copied layers from `model` from now on."""
        self._gather = self.plan.gatherer(model)

    def __call__(self, *args: Any) -> Any:
        assert self._gather is not None, "bind() comes before the first call"
        return self._run(self._gather(), *args)

    def finalize_loading(self, vllm_config: Any) -> None:
        """Upstream calls this after it has checked the sources; everything is loaded by then."""

    @classmethod
    def serialize_compile_artifacts(cls, compiled_fn: PlanFunction) -> bytes:
        """The plan and every compiled piece once; no graph."""
        artifacts = StandaloneCompiledArtifacts()
        for number, piece in enumerate(compiled_fn.pieces):
            for shape, data in piece.to_bytes().items():
                artifacts.insert(str(number), shape, data)
        return pickle.dumps(
            {
                "plan": plans.dumps(compiled_fn.plan),
                "artifacts": artifacts,
                "sym_shape_indices": [piece.sym_shape_indices for piece in compiled_fn.pieces],
                "prefix": compiled_fn.prefix,
                "is_encoder": compiled_fn.is_encoder,
            }
        )

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> PlanFunction:
        """Load what `serialize_compile_artifacts` kept, for vLLM's current configuration."""
        from vllm.compilation.backends import VllmBackend
        from vllm.config import get_current_vllm_config

        state = pickle.loads(data)
        config = get_current_vllm_config()
        artifacts = state["artifacts"]
        artifacts.load_all()
        backend = VllmBackend(config, state["prefix"], state["is_encoder"])
        indices = state["sym_shape_indices"]
        runnables: list[dict[str, Any]] = [{} for _ in indices]
        for key in artifacts.submodule_bytes:
            number, _, shape = key.partition("_")
            runnables[int(number)][shape] = artifacts.get_loaded(number, shape)
        pieces = [
            PiecewiseBackend(
                graph=None,
                vllm_config=config,
                piecewise_compile_index=number,
                total_piecewise_compiles=len(indices),
                sym_shape_indices=indices[number],
                vllm_backend=backend,
                returns_tuple=True,
                compiled_runnables=runnables[number],
            )
            for number in range(len(indices))
        ]
        return cls(plans.loads(state["plan"]), pieces, config, state["prefix"], state["is_encoder"])
