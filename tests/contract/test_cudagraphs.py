"""CUDA graphs on demand against the installed vLLM, without a GPU: its own manager, wrapper and configuration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.process import Outcome, run
from vllm_compile_ext.cuda_graphs.coverage import STOCK
from vllm_compile_ext.cuda_graphs.policy import BATCHES, BATCHES_BETWEEN, FULL, PIECEWISE

MANAGER = """
    import contextlib, os
    from pathlib import Path
    from tests import graphs
    from tests.graphs import decode, mixed, state, text
    from vllm.compilation import monitor
    from vllm_compile_ext.cuda_graphs import capture, coverage, manager, memory, profile, ranks
    os.environ["VLLM_COMPILE_STORE"] = str(Path("store").absolute())
    config = graphs.config(sys.argv[1])
    out = {"mro": [c.__name__ for c in manager.OnDemandManager.__mro__]}

    def started(limit=1 << 40):
        made = graphs.start(manager.OnDemandManager, config)
        made.session.budget.limit = limit
        return made

    def entries(made):
        return [sorted(d.num_tokens for d in piece.concrete_cudagraph_entries) for piece in made.model.pieces]

    def look(made):
        return {"full": sorted(d.num_tokens for d in made.graphs), "pieces": entries(made),
            "guard": monitor.cudagraph_capturing_enabled, "captures": len(state.graphs), "open": len(state.open),
            "exchanges": state.exchanges,
            # What keeps the graphs' pool, beside the graphs that are there.
            "uses": state.uses[made.pool] - len(made.graphs) - sum(map(len, entries(made)))}

    # The start, and what it leaves to upstream.
    made = started()
    out["start"] = look(made) | {"forwards": list(state.forwards), "buffer": list(made.hidden_states.shape),
        "pooled": [pool == made.pool for pool in state.pooled], "pool calls": list(state.pool_calls),
        "stream": [within == [made._stream] for within in state.within]}
    out["start"]["held"] = made.session.budget.held
    out["start"]["base"] = made.session.budget.base
    out["memory"] = [capture.free_memory() == state.free, capture.reserved_memory() == 10 * graphs.MIB, state.emptied]
    capture.give_back()
    out["memory"].append(state.emptied)
    out["shapes"] = sorted(f"{s.kind} {s.tokens}" for s in made.session.policy.shapes)

    # A decode step: captured and returned.
    buffer, descs = made.hidden_states, made._capture_descs
    best = decode(made, 3)
    out["hit"] = look(made) | {"desc": text(best), "same": [best == decode(made, 3), made.hidden_states is buffer,
        made._capture_descs is descs], "graph": state.graphs[0], "forwards": state.forwards[2:],
        "stream": state.within[-1] == [made._stream], "pool": state.graphs[0][0] == made.pool,
        "splits": state.splits[-1]}
    made.run_fullgraph(best)
    out["replays"] = made.graphs[best].replays
    try:
        made.run_fullgraph(next(d for d in descs[best.cg_mode] if d not in made.graphs))
    except AssertionError as error:
        out["uncaptured"] = str(error)
    out["larger"] = [text(decode(made, 2)), look(made)["captures"]]

    # A prompt: first without a graph, unpadded.
    missed = mixed(made, 3, 20)
    out["miss"] = [text(missed), missed.num_reqs, missed.uniform_token_count, missed.num_ubatches, missed == type(
        missed)(cg_mode=missed.cg_mode, num_tokens=20, num_reqs=3)]
    seen = [text(mixed(made, 3, 20)) for _ in range(30)]
    out["prompts"] = [sorted(set(seen)), seen.index("PIECEWISE 24")]
    out["prompt"] = look(made) | {"splits": state.splits[-1]}
    out["outside"] = [text(mixed(made, 3, 33)), text(mixed(made, 1, 0)), dict(made.session.counters.missed)]

    # Upstream's next choice where its first can have no graph.
    made = started()
    first = next(s for s in made.session.policy.shapes if (s.kind, s.tokens) == ("FULL", 4))
    made.session.policy.bar([first], "no")
    seen = [text(decode(made, 4)) for _ in range(30)]
    out["barred"] = [sorted(set(seen)), seen[-1], dict(made.session.counters.missed), look(made)]

    # A capture that breaks off once is tried again, after a forward pass.
    made = started()
    state.failing[("NONE", 4)] = 1
    out["again"] = [text(decode(made, 4)), look(made), state.forwards[2:], dict(made.session.counters.skipped)]
    out["again"].append(state.pool_calls[2:])

    made = started()
    state.failing[("PIECEWISE", 24)] = 1
    seen = [text(mixed(made, 3, 20)) for _ in range(30)]
    out["prompt again"] = [sorted(set(seen)), look(made), state.forwards[2:], dict(made.session.counters.skipped)]

    # One that breaks off again has no graph; both kinds.
    def fail(kind, tokens, ask):
        made = started()
        pools = {made.pool} | {piece.graph_pool for piece in made.model.pieces}
        good = decode(made, 8)
        state.failing[(kind, tokens)] = 5
        seen = {text(ask(made)) for _ in range(40)}
        after = [made.pool, *(piece.graph_pool for piece in made.model.pieces)]
        about = look(made) | {"seen": sorted(seen), "barred": [f"{s.kind} {s.tokens}" for s in
            made.session.policy.barred], "reasons": list(made.session.policy.barred.values()),
            "same pool": {*after} == pools == {made.pool}, "forwards": len(state.forwards)}
        made.run_fullgraph(good)
        about["others"] = [text(decode(made, 2)), sorted(d.num_tokens for d in made.graphs)]
        return about
    out["failed FULL"] = fail("NONE", 16, lambda made: decode(made, 16))
    out["failed PIECEWISE"] = fail("PIECEWISE", 24, lambda made: mixed(made, 3, 20))

    # With more ranks than one there is no second try: a pass of one rank alone would wait for the others.
    made, several, there_is_one = started(), ranks.several, ranks.all_agree
    ranks.several = lambda: True
    state.failing[("NONE", 4)] = 1
    out["ranks"] = {"failed here": [text(decode(made, 4)), look(made), state.forwards[2:],
        list(made.session.policy.barred.values())]}
    made = started()
    ranks.all_agree = lambda ok: False  # after the capture: the session took the votes on memory with it
    out["ranks"]["failed there"] = [text(decode(made, 4)), look(made), state.forwards[2:],
        list(made.session.policy.barred.values())]
    ranks.several, ranks.all_agree = several, there_is_one
    made.session.policy.barred.clear()
    out["ranks"]["after"] = [text(decode(made, 8)), look(made)]

    # The addresses that all-reduce leaves open in a graph.
    class Addresses:
        def __init__(self, alike):
            self.alike, self.seen = alike, []
        @contextlib.contextmanager
        def open(self):
            before = len(state.graphs)
            try:
                yield
            finally:
                self.seen.append(f"{len(state.graphs) - before} captured")
        def exchange(self):
            self.seen.append("exchange")
            return self.alike
    def agree(ok):
        made._addresses.seen.append("vote")
        return ok
    out["addresses"] = {}
    for name, alike, failing in (("alike", True, 0), ("other calls", False, 0), ("broke off", False, 1)):
        ranks.several, ranks.all_agree = several, there_is_one
        made = started()
        made._addresses = Addresses(alike)
        ranks.several, ranks.all_agree = lambda: True, agree
        state.failing[("NONE", 4)] = failing
        ran = text(decode(made, 4))
        out["addresses"][name] = [ran, made._addresses.seen, list(made.session.policy.barred.values())]
    state.failing.clear()
    ranks.several, ranks.all_agree = several, there_is_one

    # A surprise: the batch runs.
    made = started()
    kept = decode(made, 8)
    graph_for = made.session.graph_for
    made.session.graph_for = lambda *args: {}["what"]
    out["surprise"] = [[text(decode(made, n)) for n in (3, 8, 16, 8)], len(state.graphs)]
    made.session.graph_for = graph_for
    out["surprise"] += [[text(decode(made, n)) for n in (3, 8, 16)], len(state.graphs)]

    # While idle.
    made = started()
    out["idle"] = [[made.capture_idle() for _ in range(13)], look(made)]
    out["idle"].append([text(decode(made, 3)), text(mixed(made, 3, 20)), text(decode(made, 17))])

    # The guard is upstream's: a capture at another time raises.
    made = started()
    piece = made.model.pieces[0]
    try:
        made._create_forward_fn(made._capture_descs[graphs.CUDAGraphMode.PIECEWISE][0], True)(
            graphs.CUDAGraphMode.PIECEWISE)
    except RuntimeError as error:
        out["guarded"] = str(error)

    # Stock.
    os.environ["VLLM_COMPILE_CUDAGRAPHS"] = "eager"
    made = graphs.start(manager.OnDemandManager, config)
    out["eager"] = [look(made), made.session is None, text(decode(made, 3)), text(mixed(made, 3, 20)),
        made.capture_idle()]
    del os.environ["VLLM_COMPILE_CUDAGRAPHS"]
    coverage_reason, coverage.stock_because = coverage.stock_because, lambda config: "a reason"
    made = graphs.start(manager.OnDemandManager, config)
    out["not covered"] = [look(made), made.session is None]

    # Before the start, while memory is profiled.
    import torch
    calls = []
    from types import SimpleNamespace
    runner = SimpleNamespace(vllm_config=config, compilation_config=config.compilation_config,
        _dummy_run=lambda *args, **kwargs: calls.append([list(args), kwargs]))
    torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.max_memory_allocated = lambda: 9 << 20
    import vllm.envs
    out["applied"] = [memory._applied()]
    os.environ["VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"] = "0"
    out["applied"].append(memory._applied())
    del os.environ["VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"]
    state.emptied = 0
    out["activations"] = [profile._activations(runner), state.emptied]
    calls.clear()
    stock = lambda runner: calls.append("stock") or 77
    profiled = profile.around(stock)
    out["profile"] = {"not covered": [profiled(runner), list(calls)]}
    coverage.stock_because = coverage_reason
    calls.clear()
    out["profile"]["first"] = [profiled(runner), list(calls)]

    # A surprise there: all is stock's.
    keep_free, memory.keep_free = memory.keep_free, lambda *args: {}["figure"]
    calls.clear()
    out["profile"]["surprise"] = [profiled(runner), list(calls)]
    memory.keep_free = keep_free
    made = graphs.start(manager.OnDemandManager, config)
    out["profile"]["start after it"] = [look(made), made.session is None]

    # On another rank.
    runner.vllm_config = graphs.config(sys.argv[1])
    ranks.all_agree = lambda ok: False
    calls.clear()
    out["profile"]["surprise of another rank"] = [profiled(runner), list(calls)[-1:],
        coverage.on_demand(runner.vllm_config)]
    ranks.all_agree = there_is_one
    runner.vllm_config = config

    config.compilation_config.cudagraph_mode = graphs.CUDAGraphMode.NONE
    calls.clear()
    out["profile"]["none"] = [profiled(runner), list(calls)]
    report(out)
"""


@pytest.fixture(scope="module")
def done(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = run(MANAGER, str(llama2), fork=True, folder=tmp_path_factory.mktemp("manager"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome


@pytest.fixture(scope="module")
def seen(done: Outcome) -> dict[str, Any]:
    return done.value  # type: ignore[no-any-return]


EVERY_FULL = [1, 2, 4, 8, 16]
EVERY_PIECEWISE = [1, 2, 4, 8, 16, 24, 32]
OPEN = True


def test_the_manager_captures_through_both_of_upstreams_classes(seen: dict[str, Any]) -> None:
    assert seen["mro"] == ["OnDemandManager", "ModelCudaGraphManager", "_OneByOne", "CudaGraphManager", "object"]


def test_the_shapes_are_upstreams(seen: dict[str, Any]) -> None:
    assert seen["shapes"] == sorted([f"FULL {n}" for n in EVERY_FULL] + [f"PIECEWISE {n}" for n in EVERY_PIECEWISE])


def test_the_start_captures_nothing_and_closes_the_guard(seen: dict[str, Any]) -> None:
    start = seen["start"]
    assert (start["full"], start["pieces"], start["captures"]) == ([], [[], []], 0)
    assert start["guard"] is False


def test_the_start_runs_the_largest_size_of_each_kind_and_allocates_the_outputs_of_the_largest(
    seen: dict[str, Any],
) -> None:
    assert [forward[:2] for forward in seen["start"]["forwards"]] == [["NONE", 32], ["NONE", 16]]
    assert seen["start"]["buffer"] == [32, 8]


def test_the_start_allocates_in_the_graphs_pool_which_is_kept(seen: dict[str, Any]) -> None:
    start = seen["start"]
    assert start["pooled"] == start["stream"] == [True, True]
    assert start["pool calls"] == ["begin", "end"]
    assert (start["open"], start["uses"]) == (0, 1)


def test_what_the_start_takes_of_the_device_counts(seen: dict[str, Any]) -> None:
    assert seen["start"]["base"] == 2 << 20
    assert seen["start"]["held"] == 0


def test_free_is_what_the_device_says_and_unused_memory_is_given_back_when_asked_for(seen: dict[str, Any]) -> None:
    free, reserved, before, after = seen["memory"]
    assert free is reserved is True
    assert (before, after) == (0, 1)  # not by the start


def test_whether_vllm_keeps_memory_free_is_its_variable(seen: dict[str, Any]) -> None:
    assert seen["applied"] == [True, False]


def test_upstreams_exchange_of_addresses_which_does_not_expect_failures_is_not_used(seen: dict[str, Any]) -> None:
    assert [seen[name]["exchanges"] for name in ("start", "hit", "prompt")] == [0, 0, 0]


def test_addresses_are_exchanged_after_each_capture_and_before_the_vote(seen: dict[str, Any]) -> None:
    after = ["1 captured", "exchange", "vote"]
    assert seen["addresses"]["alike"] == ["FULL 4", after, []]
    # Every rank has to take part, also where its capture broke off.
    why = "RanksDifferError: ranks captured different calls of all-reduce"
    assert seen["addresses"]["other calls"] == ["NONE 4", after, [why]]
    ran, calls, [why] = seen["addresses"]["broke off"]
    assert (ran, calls) == ("NONE 4", after)
    assert "different" not in why


def test_a_decode_step_is_captured_and_runs_on_its_graph(seen: dict[str, Any]) -> None:
    hit = seen["hit"]
    assert hit["desc"] == "FULL 4"
    assert (hit["full"], hit["pieces"], hit["captures"]) == ([4], [[], []], 1)
    assert hit["same"] == [True, True, True]
    assert seen["replays"] == 1
    assert "No cudagraph for" in seen["uncaptured"]


def test_a_capture_is_one_forward_pass_with_the_guard_open_that_other_threads_do_not_disturb(
    seen: dict[str, Any],
) -> None:
    assert seen["hit"]["forwards"] == [["NONE", 4, OPEN, True]]
    pool, stream, mode, guard = seen["hit"]["graph"]
    assert (stream, mode, guard) == ("current stream", "relaxed", OPEN)
    assert pool is not None
    assert seen["hit"]["pool"] is seen["hit"]["stream"] is True
    assert seen["hit"]["guard"] is False


def test_a_smaller_batch_runs_on_the_larger_graph_meanwhile(seen: dict[str, Any]) -> None:
    assert seen["larger"] == ["FULL 4", 1]


def test_a_batch_without_a_graph_is_not_padded(seen: dict[str, Any]) -> None:
    assert seen["miss"] == ["NONE 20", 3, None, 1, True]


def test_a_prompts_shape_is_captured_in_all_pieces_after_some_batches(seen: dict[str, Any]) -> None:
    names, first = seen["prompts"]
    assert names == ["NONE 20", "PIECEWISE 24"]
    assert 1 <= first <= BATCHES[PIECEWISE] + BATCHES_BETWEEN
    assert (seen["prompt"]["full"], seen["prompt"]["pieces"]) == ([4], [[24], [24]])
    assert seen["prompt"]["guard"] is False


def test_attention_beside_a_prompts_graph_takes_no_memory_for_partial_results(seen: dict[str, Any]) -> None:
    assert seen["hit"]["splits"] == [{"max_num_splits": 32, "scheduler_metadata": "for 32"}, {}]
    assert seen["prompt"]["splits"] == [{"max_num_splits": 1, "scheduler_metadata": None}, {}]
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    flash = (Path(spec.origin).parent / "v1/attention/backends/flash_attn.py").read_text()
    assert "scheduler_metadata: torch.Tensor | None = None" in flash
    assert "max_num_splits: int = 0" in flash


def test_what_stock_has_no_graph_for_is_no_miss(seen: dict[str, Any]) -> None:
    names = seen["outside"]
    assert names[:2] == ["NONE 33", "NONE 0"]
    assert names[2] == {PIECEWISE: 1 + seen["prompts"][1]}


def test_where_the_best_shape_is_barred_the_next_choice_is_asked_for_and_captured(seen: dict[str, Any]) -> None:
    names, last, missed, state = seen["barred"]
    assert names == ["NONE 4", "PIECEWISE 4"]
    assert last == "PIECEWISE 4"
    assert missed == {PIECEWISE: max(BATCHES[PIECEWISE], BATCHES_BETWEEN) - 1}  # barring counts as a capture
    assert (state["full"], state["pieces"]) == ([], [[4], [4]])


def test_a_capture_that_breaks_off_is_tried_once_more_after_a_forward_pass(seen: dict[str, Any]) -> None:
    name, state, forwards, skipped, pool_calls = seen["again"]
    assert name == "FULL 4"
    assert pool_calls == ["end", "release"]
    assert (state["open"], state["uses"]) == (0, 1)
    assert (state["full"], state["captures"], state["guard"]) == ([4], 2, False)
    assert forwards == [["NONE", 4, OPEN, True], ["NONE", 4, OPEN, False], ["NONE", 4, OPEN, True]]
    assert skipped == {}


def test_so_is_one_of_a_prompts_shape_larger_than_any_decode_step(seen: dict[str, Any]) -> None:
    names, state, forwards, skipped = seen["prompt again"]
    assert (state["open"], state["uses"]) == (0, 1)
    assert names == ["NONE 20", "PIECEWISE 24"]
    assert (state["full"], state["pieces"]) == ([], [[24], [24]])
    assert [forward[:2] for forward in forwards] == [["PIECEWISE", 24], ["NONE", 24], ["PIECEWISE", 24]]
    assert skipped == {}


@pytest.mark.parametrize(("kind", "name", "full"), [(FULL, "FULL 16", [8]), (PIECEWISE, "PIECEWISE 24", [8])])
def test_a_shape_that_fails_twice_has_no_graph_and_leaves_nothing(
    seen: dict[str, Any], kind: str, name: str, full: list[int]
) -> None:
    failed = seen[f"failed {kind}"]
    assert failed["barred"] == [name]
    assert failed["reasons"] == ["RuntimeError: CUDA error: operation failed due to a previous error during capture"]
    assert failed["full"] == full
    assert name not in failed["seen"]
    assert all(24 not in piece for piece in failed["pieces"])
    assert failed["same pool"] is True
    assert (failed["open"], failed["uses"]) == (0, 1)
    assert failed["guard"] is False
    # Graphs that were there are replayed, and others are captured.
    assert failed["others"][0] == "FULL 8"


def test_with_more_ranks_than_one_a_capture_that_breaks_off_is_not_tried_again(seen: dict[str, Any]) -> None:
    name, state, forwards, reasons = seen["ranks"]["failed here"]
    assert (name, state["full"], state["captures"]) == ("NONE 4", [], 1)
    assert forwards == [["NONE", 4, OPEN, True]]
    assert reasons == ["RuntimeError: CUDA error: operation failed due to a previous error during capture"]
    assert (state["open"], state["uses"]) == (0, 1)


def test_what_broke_off_on_another_rank_is_dropped_and_the_pool_is_as_before(seen: dict[str, Any]) -> None:
    name, state, forwards, reasons = seen["ranks"]["failed there"]
    assert (name, state["full"], state["captures"]) == ("NONE 4", [], 1)
    assert forwards == [["NONE", 4, OPEN, True]]
    assert reasons == ["RanksDifferError: it failed on another rank"]
    assert (state["open"], state["uses"]) == (0, 1)
    name, state = seen["ranks"]["after"]
    assert (name, state["full"], state["open"], state["uses"]) == ("FULL 8", [8], 0, 1)


def test_after_a_surprise_batches_run_and_graphs_that_are_there_are_used(seen: dict[str, Any], done: Outcome) -> None:
    meanwhile, captures, after, captures_after = seen["surprise"]
    assert meanwhile == ["NONE 3", "FULL 8", "NONE 16", "FULL 8"]
    assert after == ["FULL 8", "FULL 8", "NONE 16"]
    assert captures == captures_after == 1
    assert len(done.lines("no more CUDA graphs are captured (KeyError")) == 1


def test_a_failure_is_said_once_for_each_shape(done: Outcome) -> None:
    assert len(done.lines("batches of 16 tokens run without a FULL CUDA graph")) == 1
    assert len(done.lines("batches of 24 tokens run without a PIECEWISE CUDA graph")) == 1


def test_all_shapes_are_captured_while_idle(seen: dict[str, Any]) -> None:
    more, state, names = seen["idle"]
    assert more == [True] * 11 + [False] * 2
    assert (state["full"], state["pieces"]) == (EVERY_FULL, [EVERY_PIECEWISE] * 2)
    assert state["guard"] is False
    assert names == ["FULL 4", "PIECEWISE 24", "PIECEWISE 24"]


def test_vllms_guard_stays_on_for_everyone_else(seen: dict[str, Any]) -> None:
    assert "capturing detected at an inappropriate time" in seen["guarded"]


def test_with_eager_all_is_captured_at_start_as_in_stock(seen: dict[str, Any]) -> None:
    state, no_session, small, prompt, idle = seen["eager"]
    assert (state["full"], state["pieces"]) == (EVERY_FULL, [EVERY_PIECEWISE] * 2)
    assert (no_session, small, prompt, idle) == (True, "FULL 4", "PIECEWISE 24", False)


def test_where_it_is_not_covered_all_is_captured_at_start_and_a_line_says_why(
    seen: dict[str, Any], done: Outcome
) -> None:
    state, no_session = seen["not covered"]
    assert (state["full"], state["pieces"], no_session) == (EVERY_FULL, [EVERY_PIECEWISE] * 2, True)
    assert len(done.lines("CUDA graphs are captured at start, as in stock vLLM, with a reason")) == 1


def test_profiling_memory_measures_one_forward_pass_at_the_largest_size(seen: dict[str, Any]) -> None:
    size, calls = seen["profile"]["first"]
    assert size > 0
    assert seen["activations"] == [2 << 20, 1]  # what the pass left is given back before the KV cache is sized
    # Starts of this process were remembered by then only if 5 seconds had passed: both are right.
    assert calls in ([], [[[32], {"skip_attn": True, "is_profile": True, "skip_eplb": True}]])


def test_profiling_memory_is_stocks_where_capture_is_and_nothing_without_graphs(seen: dict[str, Any]) -> None:
    assert seen["profile"]["not covered"] == [77, ["stock"]]
    assert seen["profile"]["none"] == [0, []]


def test_after_a_surprise_while_memory_is_profiled_the_start_is_stocks(seen: dict[str, Any], done: Outcome) -> None:
    assert seen["profile"]["surprise"] == [77, ["stock"]]
    assert seen["profile"]["surprise of another rank"] == [77, ["stock"], False]
    state, no_session = seen["profile"]["start after it"]
    assert (state["full"], state["pieces"], no_session) == (EVERY_FULL, [EVERY_PIECEWISE] * 2, True)
    assert len(done.lines("CUDA graphs are captured at start, as in stock vLLM (KeyError in ")) == 1


# --- on a CPU nothing changes

INERT = """
    import sys
    from vllm_compile_ext import plugin
    before = list(sys.meta_path)
    if sys.argv[1] == "cuda":
        from vllm_compile_ext.cuda_graphs import install
        install._cuda = lambda: True
    plugin.register()
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner
    from vllm.v1.engine import core

    def places():
        return {
            "manager": cudagraph_utils.ModelCudaGraphManager, "bound": model_runner.ModelCudaGraphManager,
            "profile": cudagraph_utils.profile_cudagraph_memory, "capture": model_runner.GPUModelRunner.capture_model,
            "idle": core.EngineCoreProc._notify_idle_state_callbacks,
        }

    def ours():
        # A class by its module; a function that wraps stock's has stock's module, and code of ours.
        return [name for name, place in places().items() if "vllm_compile_ext" in (
            place.__module__ if isinstance(place, type) else place.__code__.co_filename)]

    registered, status = ours(), plugin.status().line
    specs = [[type(m.__spec__.loader).__name__, m.__spec__.loader is m.__loader__] for m in (
        cudagraph_utils, model_runner, core)]
    plugin.unregister()
    report(dict(registered=registered, after=ours(), status=status, specs=specs, path=sys.meta_path == before,
        loaded="vllm_compile_ext.cuda_graphs.manager" in sys.modules))
"""


def test_on_a_cpu_nothing_is_changed() -> None:
    outcome = run(INERT, "cpu")
    assert outcome.code == 0, outcome.output[-5000:]
    assert "is active" in outcome.value["status"]
    assert outcome.value["registered"] == outcome.value["after"] == []
    assert outcome.value["loaded"] is False
    assert outcome.value["specs"] == [["SourceFileLoader", True]] * 3
    assert outcome.value["path"] is True


def test_with_cuda_all_four_names_are_changed_and_changed_back() -> None:
    outcome = run(INERT, "cuda")
    assert outcome.code == 0, outcome.output[-5000:]
    assert outcome.value["registered"] == ["manager", "bound", "profile", "capture", "idle"]
    # What a module took by name before stays; nobody but tests undoes a change.
    assert outcome.value["after"] == ["bound"]
    assert outcome.value["path"] is True


PAUSES = """
    import importlib.util
    from pathlib import Path
    from vllm.v1.engine.core import EngineCoreProc
    worker = Path(importlib.util.find_spec("vllm.v1.worker.gpu_worker").origin).read_text()
    report([callable(EngineCoreProc.is_scheduler_paused), callable(EngineCoreProc.is_running),
        "self._weight_update_active = True" in worker])
"""


def test_what_idle_captures_wait_for_is_there() -> None:
    outcome = run(PAUSES, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    assert outcome.value == [True, True, True]


# --- what is not covered: every line of the table, with vLLM's own configuration

COVERAGE = """
    import inspect, json, os
    from types import SimpleNamespace
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.config import CUDAGraphMode
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm_compile_ext.cuda_graphs import coverage

    def layer(name):
        backend = SimpleNamespace(get_name=lambda: AttentionBackendEnum[name].name)
        return SimpleNamespace(get_attn_backend=lambda: backend)

    def look(options={}, later={}, env={}, cuda=False, mode="FULL_AND_PIECEWISE", backends=(), communicator=()):
        options = dict(dtype="float32", max_num_batched_tokens=256, max_model_len=256) | options
        config = EngineArgs(model=sys.argv[1], **options).create_engine_config()
        config.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
        layers = config.compilation_config.static_forward_context
        layers |= {"no attention": object()} | {name: layer(name) for name in backends}
        names = inspect.getsource(CudaCommunicator)
        assert all(f"self.{name} = " in names or f"self.{name}: " in names for name in communicator)
        about = SimpleNamespace(**dict.fromkeys(["ca_comm", *communicator], object()))
        parallel_state.get_tp_group = lambda: SimpleNamespace(device_communicator=about)
        for path, value in later.items():  # what CPU refuses or does not leave as it was asked for
            *owners, name = path.split(".")
            owner = config
            for step in owners:
                owner = getattr(owner, step)
            getattr(owner, name)  # it has to be there
            setattr(owner, name, value)
        # vLLM refuses the V2 runner without Triton when it makes a configuration.
        env = {"VLLM_USE_V2_MODEL_RUNNER": "1"} | env
        before, kept = dict(os.environ), type(current_platform).is_cuda_alike
        os.environ.update(env)
        if cuda:
            type(current_platform).is_cuda_alike = lambda self: True
        try:
            return [coverage.stock_because(config), [row.what for row in coverage.STOCK if row.holds(config)],
                coverage.on_demand(config)]
        finally:
            os.environ.clear()
            os.environ.update(before)
            type(current_platform).is_cuda_alike = kept

    assert AttentionLayerBase.get_attn_backend  # what the layers of a model have
    report({name: look(**case) for name, case in json.loads(sys.argv[2]).items()})
"""

# By a row's `what`: configurations in which just it holds.
CASES: dict[str, list[dict[str, Any]]] = {
    "the V1 model runner": [{"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}],
    "breakable CUDA graphs (`VLLM_USE_BREAKABLE_CUDAGRAPH=1`)": [{"env": {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}}],
    "DBO and micro-batches": [
        {"later": {"parallel_config.enable_dbo": True}},
        {"later": {"parallel_config.ubatch_size": 2}},
    ],
    "speculative decoding": [
        {"options": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}}
    ],
    "LoRA": [{"options": {"enable_lora": True, "max_lora_rank": 8}}],
    "graphs of encoders (`cudagraph_mm_encoder`)": [
        {"options": {"compilation_config": {"cudagraph_mm_encoder": True}}}
    ],
    "data parallel ranks that step together": [{"options": {"data_parallel_size": 2}}],
    "pipeline parallelism": [{"options": {"pipeline_parallel_size": 2}}],
    "context parallelism (PCP, DCP)": [
        {"later": {"parallel_config.prefill_context_parallel_size": 2}},
        {"later": {"parallel_config.decode_context_parallel_size": 2}},
    ],
    "elastic EP and EPLB": [
        {"later": {"parallel_config.enable_eplb": True}},
        {"later": {"parallel_config.enable_elastic_ep": True}},
    ],
    "KV and encoder cache connectors": [
        {"options": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}},
        {"options": {"ec_transfer_config": {"ec_connector": "X", "ec_role": "ec_consumer"}}},
    ],
    "weights offloaded to the CPU": [
        {"options": {"cpu_offload_gb": 1}},
        {"options": {"offload_group_size": 2}},
    ],
    "sleep mode that offloads graphs (`sleep_mode_offload_cudagraph`)": [
        {
            "later": {
                "model_config.enable_sleep_mode": True,
                "model_config.sleep_mode_offload_cudagraph": True,
                "model_config.sleep_mode_backend": "cumem",
            },
            "cuda": True,
        }
    ],
    "Inductor's graph partition (`use_inductor_graph_partition`)": [
        {"options": {"compilation_config": {"use_inductor_graph_partition": True}}}
    ],
    "fast prefill with shared KV (`kv_sharing_fast_prefill`)": [{"options": {"kv_sharing_fast_prefill": True}}],
    "attention backends other than FLASH_ATTN and TRITON_ATTN": [
        {"backends": ["FLASHINFER"]},
        {"backends": ["FLASH_ATTN", "TRITON_MLA"]},
    ],
    "prompts in graphs of whole steps (`cudagraph_mode=FULL`)": [{"mode": "FULL"}],
    "all-reduce kernels of FlashInfer (PCIe) and AITER": [
        {"options": {"tensor_parallel_size": 2}, "communicator": ["fi_pcie_ipc_ar_comm"]},
        {"options": {"tensor_parallel_size": 2}, "communicator": ["aiter_ar_comm"]},
    ],
    "HiSparse": [{"later": {"attention_config.hisparse_config": {}}}],
    "the Proton profiler": [{"later": {"profiler_config.profiler": "proton"}}],
    "`--jit-monitor-mode error`": [{"options": {"jit_monitor_mode": "error"}}],
}
PLAIN = {
    "plain": {},
    "tensor parallelism": {"options": {"tensor_parallel_size": 2}},
    "one rank": {"communicator": ["fi_pcie_ipc_ar_comm"]},
    "FLASH_ATTN and TRITON_ATTN": {"backends": ["FLASH_ATTN", "TRITON_ATTN"]},
    "decode steps alone": {"mode": "FULL_DECODE_ONLY"},
    "no whole steps": {"mode": "PIECEWISE"},
    "another profiler": {"later": {"profiler_config.profiler": "cuda"}},
    "sleep mode alone": {"later": {"model_config.enable_sleep_mode": True}, "cuda": True},
}


@pytest.fixture(scope="module")
def reasons(llama2: Path) -> dict[str, Any]:
    cases = {f"{what}/{n}": case for what, listed in CASES.items() for n, case in enumerate(listed)}
    outcome = run(COVERAGE, str(llama2), json.dumps(cases | PLAIN), fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value  # type: ignore[no-any-return]


@pytest.mark.parametrize("row", STOCK, ids=lambda row: row.what)
def test_each_line_of_the_table_alone_keeps_stocks_capture(reasons: dict[str, Any], row: Any) -> None:
    for number in range(len(CASES[row.what])):
        reason, holding, on_demand = reasons[f"{row.what}/{number}"]
        assert reason == f"{row.what}: {row.why}"
        assert holding == [row.what]
        assert on_demand is False


@pytest.mark.parametrize("name", PLAIN)
def test_other_configurations_capture_on_demand(reasons: dict[str, Any], name: str) -> None:
    assert reasons[name] == [None, [], True]


def test_every_case_is_for_a_line_of_the_table() -> None:
    assert CASES.keys() == {row.what for row in STOCK}
