"""vLLM's own code of CUDA graphs on a machine without a GPU: torch's calls only count and write down what they would
have captured.  Imported by processes of `tests/process.py` only: importing it changes torch and vLLM.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

MIB = 1 << 20
SIZES = [1, 2, 4, 8, 16, 24, 32]
SEQS = 16
HIDDEN = 8


class State:
    """What happened.  failing: how often the capture of (kind, tokens) still breaks off.

    open: pools that torch's allocator allocates from at the moment.  uses: what keeps a pool, graphs and others.
    """

    def __init__(self) -> None:
        self.capturing = False
        self.free = 1 << 34
        self.pools = 0
        self.forwards: list[Any] = []  # (kind asked for, tokens, guard open, within a capture)
        self.pooled: list[Any] = []  # for each of them, the pool that it allocated from, or None
        self.graphs: list[Any] = []  # (pool, stream, error mode, guard open)
        self.captures: list[str] = []
        self.open: list[Any] = []
        self.uses: Counter[Any] = Counter()
        self.pool_calls: list[str] = []  # of what is not within a capture
        self.streams: list[Any] = []  # the current one is the last
        self.within: list[Any] = []  # for each forward pass
        self.splits: list[Any] = []  # for each of them, what attention was told
        self.exchanges = 0  # of addresses between ranks
        self.unused = 3 * MIB  # that torch keeps
        self.emptied = 0  # how often it was told to give that back
        self.failing: dict[Any, int] = {}
        self.broken = False  # the capture under way cannot end


state = State()


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    state.streams.append(stream)
    try:
        yield
    finally:
        state.streams.pop()


class CUDAGraph:
    """pool: that a capture ended in.  uses: of pools, at that time."""

    def __init__(self) -> None:
        self.replays = 0
        self.pool: Any = None
        self.uses = state.uses

    def __del__(self) -> None:
        if self.pool is not None:
            self.uses[self.pool] -= 1

    def replay(self) -> None:
        self.replays += 1

    def capture_begin(self, pool: Any, capture_error_mode: str = "global") -> None:
        self._capture = Capture(self, pool, state.streams[-1] if state.streams else None, capture_error_mode)
        self._capture.__enter__()

    def capture_end(self) -> None:
        self._capture.__exit__(RuntimeError if state.broken else None)


class Capture:
    """In the place of `torch.cuda.graph`."""

    def __init__(self, cuda_graph: Any, pool: Any, stream: Any, capture_error_mode: str = "global") -> None:
        self._graph = cuda_graph
        self._pool = pool
        self._about = (pool, stream, capture_error_mode)

    def __enter__(self) -> None:
        begin(0, self._pool)
        state.capturing = True
        state.captures.append("capture")
        state.graphs.append((*self._about, monitor.cudagraph_capturing_enabled))

    def __exit__(self, kind: Any, *exc: Any) -> None:
        state.capturing = state.broken = False
        if kind is not None:  # as `capture_end` of torch 2.13, which leaves the pool open
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        end(0, self._pool)
        self._graph.pool = self._pool
        state.free -= MIB


def begin(device: int, pool: Any) -> None:
    """Torch's allocator: a pool is open once, and kept by what allocated from it."""
    assert device == 0
    if pool in state.open:
        raise RuntimeError("a capture into this pool has not ended")
    state.open.append(pool)
    state.uses[pool] += 1


def end(device: int, pool: Any) -> None:
    assert device == 0
    if pool not in state.open:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    state.open.remove(pool)


def release(device: int, pool: Any) -> None:
    assert device == 0
    assert state.uses[pool] > 0
    state.uses[pool] -= 1


def _pool() -> tuple[int, int]:
    state.pools += 1
    return (0, state.pools)


torch.cuda.graph = Capture  # type: ignore[assignment,misc]
torch.cuda.CUDAGraph = CUDAGraph  # type: ignore[assignment,misc]
torch.cuda.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)  # type: ignore[assignment,misc]
torch.cuda.stream = _stream  # type: ignore[assignment]
torch.cuda.current_stream = lambda *args: "the step's stream"  # type: ignore[assignment,return-value]
torch.cuda.current_device = lambda: 0
for _name, _function in (
    ("_cuda_beginAllocateCurrentThreadToPool", begin),
    ("_cuda_endAllocateToPool", end),
    ("_cuda_releasePool", release),
):
    assert hasattr(torch._C, _name)
    setattr(torch._C, _name, lambda *args, _of=_function: state.pool_calls.append(_of.__name__) or _of(*args))
torch.cuda.synchronize = lambda *args: None
torch.cuda.empty_cache = lambda: setattr(state, "emptied", state.emptied + 1)
torch.cuda.mem_get_info = lambda *args: (state.free, 1 << 35)
torch.cuda.memory_reserved = lambda *args: 7 * MIB + state.unused
torch.cuda.memory_allocated = lambda *args: 7 * MIB
torch.cuda.get_device_name = lambda *args: "NVIDIA H100"
torch._C._host_emptyCache = getattr(torch._C, "_host_emptyCache", lambda: None)
torch.set_grad_enabled(False)

from vllm.plugins import load_general_plugins  # noqa: E402

load_general_plugins()

from vllm.compilation import breakable_cudagraph, cuda_graph, monitor  # noqa: E402
from vllm.config import CUDAGraphMode, VllmConfig  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.worker.gpu import cudagraph_utils as upstream  # noqa: E402

_GROUP = SimpleNamespace(world_size=1, is_first_rank=True, is_last_rank=True, device_communicator=None)
for _name in ("get_tp_group", "get_pp_group", "get_dp_group"):
    setattr(parallel_state, _name, lambda: _GROUP)
upstream.get_pp_group = parallel_state.get_pp_group
upstream.is_global_first_rank = lambda: True
upstream.has_compiled_submodule = lambda model: True
upstream.prepare_inputs_to_capture = lambda *args, **kwargs: upstream.AttentionState(
    {"split": SimpleNamespace(max_num_splits=32, scheduler_metadata="for 32"), "other": SimpleNamespace()}, {}
)
upstream.current_stream = cuda_graph.current_stream = lambda: "current stream"
cuda_graph.weak_ref_tensors = breakable_cudagraph.weak_ref_tensors = lambda tensors: tensors
breakable_cudagraph.weak_ref_tensor = lambda tensor: tensor
type(current_platform).graph_pool_handle = staticmethod(_pool)


@contextmanager
def _stock_graph_capture(device: Any) -> Iterator[None]:
    """At its end ranks exchange addresses."""
    yield
    state.exchanges += 1


upstream.graph_capture = _stock_graph_capture


def config(model: str) -> VllmConfig:
    """A configuration as a GPU leaves it, of a model on the CPU."""
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    made = EngineArgs(
        model=model, dtype="float32", max_num_batched_tokens=256, max_model_len=256, max_num_seqs=SEQS
    ).create_engine_config()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # which vLLM refuses without Triton
    made.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    made.compilation_config.cudagraph_capture_sizes = list(SIZES)
    made.compilation_config.max_cudagraph_capture_size = max(SIZES)
    return made


class Model(nn.Module):
    """Two pieces, each behind vLLM's wrapper, or with a break between them; `attended`: what ran there."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.attended: list[int] = []
        if breakable_cudagraph.is_breakable_cudagraph_enabled():
            self.pieces: list[Any] = [breakable_cudagraph.eager_break_during_capture(self._attend), self._last_piece]
            return
        self.pieces = [
            cuda_graph.CUDAGraphWrapper(piece, vllm_config, CUDAGraphMode.PIECEWISE)
            for piece in (lambda x: x, self._last_piece)
        ]

    def _attend(self, x: Any) -> Any:
        assert not state.capturing or get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.NONE
        self.attended.append(len(x))
        return x

    def forward(self, input_ids: Any, positions: Any, intermediate_tensors: Any) -> Any:
        mode = get_forward_context().cudagraph_runtime_mode
        state.forwards.append((mode.name, len(input_ids), monitor.cudagraph_capturing_enabled, state.capturing))
        state.pooled.append(state.open[-1] if state.open else None)
        state.within.append(list(state.streams))
        state.splits.append([vars(layer) for layer in get_forward_context().attn_metadata.values()])
        if state.open and not state.capturing:
            state.free -= MIB
        x = input_ids[:, None].float().expand(-1, HIDDEN)
        for piece in self.pieces:
            x = piece(x)
        return x

    def _last_piece(self, x: Any) -> Any:
        kind = (get_forward_context().cudagraph_runtime_mode.name, len(x))
        if state.capturing and state.failing.get(kind, 0) > 0:
            state.failing[kind] -= 1
            state.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return x


def start(manager_class: Any, vllm_config: VllmConfig) -> Any:
    """A manager after the start: what the runner does with it up to there."""
    state.__init__()  # type: ignore[misc]
    monitor.set_cudagraph_capturing_enabled(False)  # as warming up leaves it
    made = manager_class(
        vllm_config, torch.device("cpu"), vllm_config.compilation_config.cudagraph_mode, decode_query_len=1
    )
    made.model = Model(vllm_config)
    tokens = max(SIZES)
    buffers = SimpleNamespace(
        input_ids=torch.zeros(tokens, dtype=torch.int32),
        positions=torch.zeros(tokens, dtype=torch.int64),
        is_padding=torch.zeros(tokens, dtype=torch.bool),
    )
    model_state = SimpleNamespace(prepare_dummy_inputs=lambda num_reqs, num_tokens: {})
    made.capture(made.model, model_state, buffers, None, None, [], None)
    return made


def decode(made: Any, requests: int) -> Any:
    """What a decode step runs on."""
    return made.dispatch(requests, requests, 1, 0, 1)


def mixed(made: Any, requests: int, tokens: int) -> Any:
    """What a batch with a prompt runs on."""
    return made.dispatch(requests, tokens, None, 0, None)


def entries(made: Any) -> list[list[int]]:
    """For each piece of the model, the sizes that have a PIECEWISE graph; with breaks between them, one for all."""
    if made.breakable_cg_runner is not None:
        return [sorted(d.num_tokens for d in made.breakable_cg_runner.entries)] * 2
    return [sorted(d.num_tokens for d in piece.concrete_cudagraph_entries) for piece in made.model.pieces]


def look(made: Any, *, guard: bool = False) -> dict[str, Any]:
    """The sizes that have a graph, and how often one was captured; "left open": pools, and uses of the graphs' pool
    beside the graphs and the start's.  vLLM's guard has to be as `guard`."""
    assert monitor.cudagraph_capturing_enabled is guard
    uses = state.uses[made.pool] - len(made.graphs) - sum(map(len, entries(made)))
    return {
        "full": sorted(d.num_tokens for d in made.graphs),
        "pieces": entries(made),
        "captures": len(state.graphs),
        "left open": [*state.open, *["use"] * (uses - (made.session is not None))],
    }


def text(desc: Any) -> str:
    """Such as "FULL 8" or "NONE 5"."""
    return f"{desc.cg_mode.name} {desc.num_tokens}"
