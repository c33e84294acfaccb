"""CUDA graphs on demand with the installed vLLM's own manager, wrapper and configuration, without a GPU.

`test_in_vllm` runs these in a process of their own, since `tests.graphs` changes torch and vLLM.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import graphs
from tests.graphs import MIB, decode, look, mixed, state, text  # isort: split

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.worker import gpu_worker, startup_plan

from vllm_compile_ext.cuda_graphs import coverage, manager, memory, ranks, replacements
from vllm_compile_ext.cuda_graphs.memory import FULL, PIECEWISE
from vllm_compile_ext.cuda_graphs.session import BATCHES, BATCHES_BETWEEN

LLAMA = os.environ["LLAMA"]
EVERY_FULL = [1, 2, 4, 8, 16]
EVERY_PIECEWISE = [1, 2, 4, 8, 16, 24, 32]
ALL = {"full": EVERY_FULL, "pieces": [EVERY_PIECEWISE] * 2}
NOTHING = {"full": [], "pieces": [[], []]}
BROKE_OFF = "RuntimeError: CUDA error: operation failed due to a previous error during capture"
OPEN, WITHIN = True, True


@pytest.fixture(scope="session")
def config() -> VllmConfig:
    return graphs.config(LLAMA)


@pytest.fixture
def made(config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A manager after the start, which captures on demand."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path))
    found = graphs.start(manager.OnDemandManager, config)
    found.session.budget.limit = 1 << 40
    return found


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The lines of the plugin's log."""
    logger, lines = logging.getLogger("vllm_compile_ext"), list[str]()
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


# --- the start


def test_the_manager_is_between_upstreams_classes() -> None:
    names = [each.__name__ for each in manager.OnDemandManager.__mro__]
    assert names == ["OnDemandManager", "ModelCudaGraphManager", "_OneByOne", "CudaGraphManager", "object"]


def test_the_start_captures_nothing_and_closes_the_guard(made: Any) -> None:
    shapes = [f"FULL {n}" for n in EVERY_FULL] + [f"PIECEWISE {n}" for n in EVERY_PIECEWISE]
    assert sorted(f"{s.kind} {s.tokens}" for s in made.session.policy.shapes) == sorted(shapes)
    assert look(made) == NOTHING | {"captures": 0, "left open": []}
    # It runs the largest size of each kind, and allocates the outputs of the largest.
    assert [forward[:2] for forward in state.forwards] == [("NONE", 32), ("NONE", 16)]
    assert list(made.hidden_states.shape) == [32, graphs.HIDDEN]
    # In the graphs' pool, which is kept; what that takes of the device counts.
    assert state.pooled == [made.pool] * 2
    assert state.within == [[made._stream]] * 2
    assert state.pool_calls == ["begin", "end"]
    assert (made.session.budget.base, made.session.budget.held) == (2 * MIB, 0)


def test_the_device_says_what_is_free_and_is_given_back_what_is_unused(made: Any) -> None:
    device = made.session._device
    assert (device.free(), device.reserved(), state.emptied) == (state.free, 10 * MIB, 0)
    device.give_back()
    assert state.emptied == 1


@pytest.mark.parametrize("why", ["eager", "not covered"])
def test_where_graphs_are_not_captured_on_demand_all_is_captured_at_start_as_in_stock(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "eager":
        monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", "eager")
    else:
        monkeypatch.setattr(coverage, "stock_because", lambda config: "a reason")
    made = graphs.start(manager.OnDemandManager, config)
    assert ALL.items() <= look(made, guard=True).items()
    assert (made.session, state.exchanges) == (None, 1)
    assert [text(decode(made, 3)), text(mixed(made, 3, 20)), made.use_gap(everything=True)] == [
        "FULL 4",
        "PIECEWISE 24",
        False,
    ]


# --- while serving


def test_a_decode_step_is_captured_in_one_forward_pass_and_replayed_and_serves_a_smaller_one(made: Any) -> None:
    buffer, descs = made.hidden_states, made._capture_descs
    best = decode(made, 3)
    assert text(best) == "FULL 4"
    assert look(made) == {"full": [4], "pieces": [[], []], "captures": 1, "left open": []}
    assert state.forwards[2:] == [("NONE", 4, OPEN, WITHIN)]
    assert state.within[-1] == [made._stream]
    assert state.graphs == [(made.pool, "current stream", "relaxed", OPEN)]  # other threads do not disturb it
    assert decode(made, 3) == best
    assert made.hidden_states is buffer
    assert made._capture_descs is descs
    made.run_fullgraph(best)
    assert made.graphs[best].replays == 1
    with pytest.raises(AssertionError, match="No cudagraph for"):
        made.run_fullgraph(next(desc for desc in descs[best.cg_mode] if desc != best))
    assert text(decode(made, 2)) == "FULL 4"
    assert len(state.graphs) == 1
    # Upstream's exchange of addresses, which does not expect failures, is not used.
    assert state.exchanges == 0


def test_a_prompts_shape_is_captured_in_all_pieces_after_some_batches_which_are_not_padded(made: Any) -> None:
    missed = mixed(made, 3, 20)
    assert missed == type(missed)(cg_mode=CUDAGraphMode.NONE, num_tokens=20, num_reqs=3)
    seen = [text(mixed(made, 3, 20)) for _ in range(30)]
    first = seen.index("PIECEWISE 24")
    assert set(seen) == {"NONE 20", "PIECEWISE 24"}
    assert 1 <= first <= BATCHES[PIECEWISE]
    assert look(made) == {"full": [], "pieces": [[24], [24]], "captures": 2, "left open": []}
    # What stock has no graph for is no miss.
    assert [text(mixed(made, 3, 33)), text(mixed(made, 1, 0))] == ["NONE 33", "NONE 0"]
    assert made.session.counts["missed"] == {PIECEWISE: 1 + first}


def test_attention_beside_a_prompts_graph_takes_no_memory_for_partial_results(made: Any) -> None:
    decode(made, 3)
    assert state.splits[-1] == [{"max_num_splits": 32, "scheduler_metadata": "for 32"}, {}]
    for _ in range(30):
        mixed(made, 3, 20)
    assert state.splits[-1] == [{"max_num_splits": 1, "scheduler_metadata": None}, {}]
    source = inspect.getsource(flash_attn.FlashAttentionMetadata)
    assert "scheduler_metadata: torch.Tensor | None = None" in source
    assert "max_num_splits: int = 0" in source


def test_where_the_best_shape_is_barred_the_next_choice_is_asked_for_and_captured(made: Any) -> None:
    made.session.policy.bar([s for s in made.session.policy.shapes if s[:2] == (FULL, 4)], "no")
    seen = [text(decode(made, 4)) for _ in range(30)]
    without = max(BATCHES[PIECEWISE], BATCHES_BETWEEN) - 1  # barring counts as a capture
    assert seen == ["NONE 4"] * without + ["PIECEWISE 4"] * (30 - without)


def test_all_shapes_are_captured_and_timed_between_requests(made: Any) -> None:
    assert [made.use_gap(everything=True) for _ in range(25)] == [True] * 24 + [False]
    assert made.session.policy.times.keys() == set(made.session.policy.shapes)
    assert {graph.replays for graph in made.graphs.values()} == {1}
    # With inputs as for a capture, which fill block 0 only, on the graphs' stream; all-reduce is not told of a capture.
    assert state.forwards[-2:] == [
        ("PIECEWISE", 1, OPEN, not WITHIN),
        ("NONE", 1, OPEN, not WITHIN),
    ]
    assert state.within[-2:] == [[made._stream]] * 2
    assert ALL.items() <= look(made).items()
    assert [text(decode(made, 3)), text(mixed(made, 3, 20)), text(decode(made, 17))] == [
        *("FULL 4", "PIECEWISE 24", "PIECEWISE 24")
    ]


def test_after_it_slept_nothing_is_captured_until_a_batch_has_run(made: Any) -> None:
    made.sleep()
    assert made.use_gap(everything=True) is False
    assert text(decode(made, 3)) == "FULL 4"
    assert made.use_gap(everything=True) is True


@pytest.fixture
def breakable(config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A manager after the start, of a model whose graphs break where attention is."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    found = graphs.start(manager.OnDemandManager, config)
    found.session.budget.limit = 1 << 40
    return found


def test_a_breakable_graph_is_captured_in_its_parts_between_steps_and_replayed(breakable: Any) -> None:
    made = breakable
    assert made.use_breakable_cg
    assert look(made) == NOTHING | {"captures": 0, "left open": []}
    assert state.pooled == [made.pool] * 2
    seen = [text(mixed(made, 3, 20)) for _ in range(30)]
    assert seen.count("NONE 20") == BATCHES[PIECEWISE] - 1
    assert look(made) == {"full": [], "pieces": [[24]] * 2, "captures": 2, "left open": []}
    assert state.graphs == [(made.pool, made._stream, "relaxed", OPEN)] * 2
    assert state.splits[-1] == [{"max_num_splits": 1, "scheduler_metadata": None}, {}]
    assert made.model.attended[-1:] == [24]
    while made.use_gap(everything=True):
        pass
    assert ALL.items() <= look(made).items()
    assert made.session.policy.times.keys() == set(made.session.policy.shapes)


def test_a_breakable_graph_whose_capture_breaks_off_leaves_nothing(breakable: Any) -> None:
    made = breakable
    state.failing = {("PIECEWISE", 24): 5}
    assert {text(mixed(made, 3, 20)) for _ in range(40)} == {"NONE 20"}
    gc.collect()  # the part before the break
    assert look(made) == NOTHING | {"captures": 4, "left open": []}  # two parts, twice
    assert [s.tokens for s in made.session.policy.barred] == [24]
    assert {text(mixed(made, 3, 10)) for _ in range(40)} == {"NONE 10", "PIECEWISE 16"}
    assert torch.cuda.CUDAGraph is graphs.CUDAGraph


def test_vllms_guard_stays_on_for_everyone_else(made: Any) -> None:
    forward = made._create_forward_fn(made._capture_descs[CUDAGraphMode.PIECEWISE][0], True)
    with pytest.raises(RuntimeError, match="capturing detected at an inappropriate time"):
        forward(CUDAGraphMode.PIECEWISE)


def test_what_idle_captures_wait_for_is_there() -> None:
    assert callable(EngineCoreProc.is_scheduler_paused)
    assert callable(EngineCoreProc.is_running)
    assert "self._weight_update_active = True" in inspect.getsource(gpu_worker)


# --- captures that break off


def test_a_capture_that_breaks_off_is_tried_once_more_after_a_forward_pass(made: Any) -> None:
    state.failing = {("NONE", 4): 1, ("PIECEWISE", 24): 1}
    assert text(decode(made, 4)) == "FULL 4"
    assert look(made) == {"full": [4], "pieces": [[], []], "captures": 2, "left open": []}
    forwards = [("NONE", 4, OPEN, WITHIN), ("NONE", 4, OPEN, not WITHIN), ("NONE", 4, OPEN, WITHIN)]
    assert state.forwards[2:] == forwards
    assert state.pool_calls[2:] == ["end", "release"]
    # So is one of a prompt's shape, larger than any decode step.
    assert {text(mixed(made, 3, 20)) for _ in range(30)} == {"NONE 20", "PIECEWISE 24"}
    assert look(made) == {"full": [4], "pieces": [[24], [24]], "captures": 6, "left open": []}
    assert [forward[:2] for forward in state.forwards[5:]] == [("PIECEWISE", 24), ("NONE", 24), ("PIECEWISE", 24)]
    assert made.session.counts["skipped"] == {}


@pytest.mark.parametrize(("kind", "tokens"), [(FULL, 16), (PIECEWISE, 24)])
def test_a_shape_that_fails_twice_has_no_graph_and_leaves_nothing(
    made: Any, said: list[str], kind: str, tokens: int
) -> None:
    pool = made.pool
    good = decode(made, 8)
    state.failing[("NONE" if kind == FULL else kind, tokens)] = 5
    seen = {text(decode(made, 16) if kind == FULL else mixed(made, 3, 20)) for _ in range(40)}
    assert f"{kind} {tokens}" not in seen
    assert {(s.kind, s.tokens): why for s, why in made.session.policy.barred.items()} == {(kind, tokens): BROKE_OFF}
    assert [line for line in said if "run without" in line] == [
        f"batches of {tokens} tokens run without a {kind} CUDA graph, capturing it failed ({BROKE_OFF})"
    ]
    after = look(made)
    assert (after["full"], after["left open"]) == ([8], [])
    assert all(24 not in piece for piece in after["pieces"])
    assert {made.pool, *(piece.graph_pool for piece in made.model.pieces)} == {pool}
    # Graphs that were there are replayed.
    made.run_fullgraph(good)
    assert text(decode(made, 2)) == "FULL 8"


@pytest.mark.parametrize(
    ("failing", "agreed", "why"), [(1, True, BROKE_OFF), (0, False, "RanksDifferError: it failed on another rank")]
)
def test_with_more_ranks_than_one_what_broke_off_on_one_is_dropped_and_not_tried_again(
    made: Any, monkeypatch: pytest.MonkeyPatch, failing: int, agreed: bool, why: str
) -> None:
    state.failing[("NONE", 4)] = failing
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "several", lambda: True)
        patch.setattr(ranks, "all_agree", lambda ok: ok and agreed)  # the session took the votes on memory with it
        assert text(decode(made, 4)) == "NONE 4"
    assert look(made) == NOTHING | {"captures": 1, "left open": []}
    assert state.forwards[2:] == [("NONE", 4, OPEN, WITHIN)]
    assert list(made.session.policy.barred.values()) == [why]
    assert text(decode(made, 8)) == "FULL 8"


@pytest.mark.parametrize(
    ("alike", "failing", "ran", "why"),
    [
        (True, 0, "FULL 4", []),
        (False, 0, "NONE 4", ["RanksDifferError: ranks captured different calls of all-reduce"]),
        (False, 1, "NONE 4", [BROKE_OFF]),  # every rank has to take part, also where its capture broke off
    ],
)
def test_addresses_are_exchanged_after_each_capture_and_before_the_vote(
    made: Any, monkeypatch: pytest.MonkeyPatch, alike: bool, failing: int, ran: str, why: list[str]
) -> None:
    calls: list[str] = []
    made._addresses = SimpleNamespace(
        changes=[(state, "captures", calls)],  # written down there only while these changes are made
        exchange=lambda: calls.append("exchange") or alike,
    )
    monkeypatch.setattr(ranks, "several", lambda: True)
    monkeypatch.setattr(ranks, "all_agree", lambda ok: calls.append("vote") or ok)
    state.failing[("NONE", 4)] = failing
    assert text(decode(made, 4)) == ran
    assert calls == ["capture", "exchange", "vote"]
    assert list(made.session.policy.barred.values()) == why


def test_after_a_surprise_batches_run_and_graphs_that_are_there_are_used(
    made: Any, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    decode(made, 8)
    with monkeypatch.context() as patch:
        patch.setattr(made.session, "choose_graph", lambda *args: {}["what"])
        assert [text(decode(made, n)) for n in (3, 8, 16, 8)] == ["NONE 3", "FULL 8", "NONE 16", "FULL 8"]
    assert [text(decode(made, n)) for n in (3, 8, 16)] == ["FULL 8", "FULL 8", "NONE 16"]
    assert len(state.graphs) == 1
    assert made.use_gap(everything=True) is False
    assert made.session.counts["skipped"] == {FULL: len(EVERY_FULL) - 1, PIECEWISE: len(EVERY_PIECEWISE)}
    (line,) = [line for line in said if "no more" in line]
    assert line.startswith("no more CUDA graphs are captured (KeyError in ")


# --- while memory is profiled


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list[Any]) -> Any:
    """Profile memory for the graphs of a new configuration: the bytes."""
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9 * MIB)
    state.__init__()  # type: ignore[misc]

    def run(config: VllmConfig) -> int:
        runner = SimpleNamespace(
            vllm_config=config,
            compilation_config=config.compilation_config,
            _dummy_run=lambda *args, **options: calls.append((args, options)),
        )
        return memory.profile(lambda runner: calls.append("stock") or 77, runner)

    return run


def test_profiling_memory_measures_one_forward_pass_at_the_largest_size(
    config: VllmConfig, profile: Any, calls: list[Any]
) -> None:
    size = profile(config)
    budget = memory.take_budget(config)
    assert size == budget.base + budget.limit
    assert budget.base == memory.BASE + 2 * MIB
    assert calls == [((32,), {"skip_attn": True, "is_profile": True, "skip_eplb": True})]
    assert state.emptied == 1  # what the pass left is given back before the KV cache is sized


@pytest.mark.parametrize("where", ["not covered", "no graphs"])
def test_profiling_memory_is_stocks_where_capture_is_and_without_graphs(
    config: VllmConfig, profile: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "not covered":
        monkeypatch.setattr(coverage, "stock_because", lambda config: "a reason")
    else:
        monkeypatch.setattr(config.compilation_config, "cudagraph_mode", CUDAGraphMode.NONE)
    assert (profile(config), calls) == (77, ["stock"])


@pytest.mark.parametrize("on_demand", [True, False])
def test_a_plan_of_memory_is_applied_where_graphs_are_captured_as_when_it_was_recorded(
    config: VllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_demand: bool
) -> None:
    """VLLM_ENABLE_STARTUP_PLAN=1, in starts with this plugin and without."""
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    stock = inspect.unwrap(startup_plan.compute_plan_fingerprint)
    ours = replacements.plan_fingerprint(stock)

    def start(with_plugin: bool) -> SimpleNamespace:
        monkeypatch.setattr(startup_plan, "compute_plan_fingerprint", ours if with_plugin else stock)
        return SimpleNamespace(
            vllm_config=config,
            parallel_config=config.parallel_config,
            rank=0,
            cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
            init_snapshot=SimpleNamespace(free_memory=4 << 30),
        )

    startup_plan.maybe_save_startup_plan(start(on_demand), 1 << 30)
    applied = []
    for with_plugin in (True, False):
        worker = start(with_plugin)
        startup_plan.maybe_apply_startup_plan(worker)
        applied.append(worker.cache_config.kv_cache_memory_bytes)
    assert applied == ([1 << 30, None] if on_demand else [None, 1 << 30])
    monkeypatch.setattr(coverage, "on_demand", lambda config: False)
    assert ours(config, 0, 1) == stock(config, 0, 1)


@pytest.mark.parametrize("here", [True, False])
def test_after_a_surprise_on_any_rank_while_memory_is_profiled_the_start_is_stocks(
    profile: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch, said: list[str], here: bool
) -> None:
    made = graphs.config(LLAMA)
    if here:
        monkeypatch.setattr(memory, "find_budget", lambda *args: {}["figure"])
    else:
        monkeypatch.setattr(ranks, "all_agree", lambda ok: False)
    assert profile(made) == 77
    assert calls[-1] == "stock"
    monkeypatch.undo()
    assert look(graphs.start(manager.OnDemandManager, made), guard=True).items() >= ALL.items()
    why = "KeyError in " if here else "another rank has no figure for them)"
    (line,) = said
    assert line.startswith(f"CUDA graphs are captured at start, as in stock vLLM ({why}")


# --- what is not covered: every line of the table, with vLLM's own configuration

# Words of a row's `what`, and a configuration in which just this row holds.  Names with dots are set afterwards: CPU
# refuses them, or does not leave them as they were asked for.
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("the V1 model runner", {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    ("DBO", {"parallel_config.enable_dbo": True}),
    ("DBO", {"parallel_config.ubatch_size": 2}),
    ("speculative", {"speculative_config": NGRAM, "speculative_config.method": "eagle3"}),
    ("speculative", {"speculative_config": NGRAM, "speculative_config.enable_adaptive_verification": True}),
    ("LoRA", {"enable_lora": True, "max_lora_rank": 8}),
    ("encoders", {"compilation_config": {"cudagraph_mm_encoder": True}}),
    ("data parallel", {"data_parallel_size": 2}),
    ("pipeline", {"pipeline_parallel_size": 2}),
    ("context", {"parallel_config.prefill_context_parallel_size": 2}),
    ("context", {"parallel_config.decode_context_parallel_size": 2}),
    ("EPLB", {"parallel_config.enable_eplb": True}),
    ("EPLB", {"parallel_config.enable_elastic_ep": True}),
    ("connectors", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
    ("weights offloaded", {"cpu_offload_gb": 1}),
    ("weights offloaded", {"offload_group_size": 2}),
    (
        "sleep mode",
        {
            "model_config.enable_sleep_mode": True,
            "model_config.sleep_mode_offload_cudagraph": True,
            "model_config.sleep_mode_backend": "cumem",
        },
    ),
    ("partition", {"compilation_config": {"use_inductor_graph_partition": True}}),
    ("fast prefill", {"kv_sharing_fast_prefill": True}),
    ("backends", {"backends": ["FLASHINFER"]}),
    ("backends", {"backends": ["FLASH_ATTN", "TRITON_MLA"]}),
    ("prompts in graphs of whole steps", {"mode": "FULL"}),
    ("all-reduce", {"tensor_parallel_size": 2, "communicator": "fi_pcie_ipc_ar_comm"}),
    ("all-reduce", {"tensor_parallel_size": 2, "communicator": "aiter_ar_comm"}),
    ("HiSparse", {"attention_config.hisparse_config": {}}),
    ("Proton", {"profiler_config.profiler": "proton"}),
    ("jit-monitor", {"jit_monitor_mode": "error"}),
]
ON_DEMAND: list[dict[str, Any]] = [
    {},
    {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
    {"tensor_parallel_size": 2},
    {"communicator": "fi_pcie_ipc_ar_comm"},
    {"backends": ["FLASH_ATTN", "TRITON_ATTN"]},
    {"mode": "FULL_DECODE_ONLY"},
    {"speculative_config": NGRAM},
    {"speculative_config": NGRAM, "speculative_config.method": "draft_model"},
    {"ec_transfer_config": {"ec_connector": "X", "ec_role": "ec_consumer"}},
    {"mode": "PIECEWISE"},
    {"profiler_config.profiler": "cuda"},
    {"model_config.enable_sleep_mode": True},
]


@pytest.mark.parametrize(("word", "case"), [*CASES, *((None, case) for case in ON_DEMAND)])
def test_each_line_of_the_table_alone_keeps_stocks_capture(
    monkeypatch: pytest.MonkeyPatch, word: str | None, case: dict[str, Any]
) -> None:
    special = {"mode", "backends", "communicator"}
    options = {name: value for name, value in case.items() if "." not in name and name not in special}
    env = {"VLLM_USE_V2_MODEL_RUNNER": "1"} | {name: options.pop(name) for name in case if name.startswith("VLLM_")}
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)  # vLLM refuses it without Triton
    limits: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 256, "max_model_len": 256}
    config = EngineArgs(model=LLAMA, **limits | options).create_engine_config()
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    config.compilation_config.cudagraph_mode = CUDAGraphMode[case.get("mode", "FULL_AND_PIECEWISE")]
    assert AttentionLayerBase.get_attn_backend  # what the layers of a model have
    layers: dict[str, Any] = {"no attention": object()}
    for name in case.get("backends", ()):
        backend = SimpleNamespace(get_name=lambda name=name: AttentionBackendEnum[name].name)
        layers[name] = SimpleNamespace(get_attn_backend=lambda backend=backend: backend)
    config.compilation_config.static_forward_context = layers
    communicator = case.get("communicator", "ca_comm")
    assert f"self.{communicator}" in inspect.getsource(CudaCommunicator)
    group = SimpleNamespace(device_communicator=SimpleNamespace(**{communicator: object()}))
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    if "model_config.enable_sleep_mode" in case:
        monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    for path, value in case.items():
        if "." in path:
            owner, _, name = path.partition(".")
            assert hasattr(getattr(config, owner), name)
            setattr(getattr(config, owner), name, value)

    rows = [row for row in coverage.STOCK if row.holds(config)]
    assert rows == [row for row in coverage.STOCK if word and word in row.what]
    assert len(rows) == (word is not None)
    assert coverage.on_demand(config) is (word is None)


def test_every_line_of_the_table_has_a_case() -> None:
    assert [row.what for row in coverage.STOCK if not any(word in row.what for word, _ in CASES)] == []
