"""Two tensor parallel ranks with vLLM's own groups, on CPU: what one cannot capture, no rank does, and the addresses
that custom all-reduce leaves open in graphs are filled in.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests import process
from tests.all_reduce import CALLS, INPUT, UNUSED

CODE = """
    import inspect, os, torch
    from vllm_compile_ext import plugin
    plugin.register()
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from tests.unit.cuda_graphs.fakes import GRAPH, Gpu, Remembered
    from tests.unit.cuda_graphs.shapes import ALL, decode, fits, mixed
    from vllm_compile_ext.cuda_graphs import ranks
    from vllm_compile_ext.cuda_graphs.budget import MARGIN
    from vllm_compile_ext.cuda_graphs.session import Device, RanksDifferError, Session

    rank = int(sys.argv[1])
    with set_current_vllm_config(VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=2))):
        parallel_state.init_distributed_environment(2, rank, f"file://{sys.argv[2]}", rank, "gloo")
        parallel_state.initialize_model_parallel(2, backend="gloo")

    out = {"size": parallel_state.get_tp_group().world_size, "several": ranks.several()}
    out["agree"] = [ranks.all_agree(ok) for ok in (True, False, rank == 0, rank == 1)]
    out["first"] = [ranks.from_first(10 + rank), ranks.from_first(-1 - rank), ranks.from_first((1 << 40) + rank)]

    def session(limit=1 << 40, failing=(), before={}, free=1 << 40):
        gpu = Gpu(free, failing=failing)
        def capture(shape):
            error = gpu.capture(shape)
            return None if ranks.all_agree(error is None) else error or RanksDifferError("it failed on another rank")
        device = Device(capture, lambda: gpu.memory, lambda: gpu.reserved, gpu.give_back, ranks.all_agree,
            ranks.from_first)
        return Session(Remembered(limit, before), 1, device), gpu

    def names(shapes):
        return [f"{s.kind} {s.tokens}" for s in shapes]

    def serve(made, gpu):
        ran = [made.graph_for(best, fits(best, made.policy.captured)) for best in ALL * 20]
        return {"ran": [s and names([s])[0] for s in ran], "tried": names(gpu.tried),
            "captured": sorted(names(made.policy.captured)), "barred": sorted(names(made.policy.barred)),
            "reasons": sorted(set(made.policy.barred.values()))}

    out["alike"] = serve(*session())
    out["budget"] = serve(*session(limit=0 if rank else 1 << 40))
    out["later"] = serve(*session(limit=2 * GRAPH if rank else 1 << 40))
    out["short"] = serve(*session(free=MARGIN if rank else 1 << 40))
    out["failure"] = serve(*session(failing=[] if rank else [decode(8), mixed(64)]))
    out["stopped"] = serve(*session(failing=[decode(8), decode(16), decode(32)] if rank else []))
    made, gpu = session(before={mixed(64): 3} if rank == 0 else {decode(32): 3})
    out["idle"] = [[made.capture_idle() for _ in range(20)], names(gpu.tried)]

    from vllm.distributed.device_communicators import custom_all_reduce
    from tests import all_reduce
    from vllm_compile_ext.cuda_graphs.addresses import Addresses

    out["kernels"] = {name: list(inspect.signature(getattr(custom_all_reduce.ops, name)).parameters) for name in
        ("allocate_shared_buffer_and_handle", "get_graph_buffer_ipc_meta", "register_graph_buffers")}
    kernels = custom_all_reduce.ops = all_reduce.Kernels(rank)
    group = parallel_state.get_tp_group()
    Addresses().exchange()
    out["without"] = list(kernels.calls)
    communicator = group.device_communicator.ca_comm = all_reduce.communicator(group.cpu_group, rank)
    with torch.inference_mode():  # as a step
        addresses = Addresses()
        def captured(*calls):
            with addresses.open():
                for _ in range(calls[rank]):
                    kernels.capture(communicator)
            return [addresses.exchange(), kernels.take()]
        out["filled in"] = [captured(*calls) for calls in all_reduce.CALLS]
    out["after"] = [communicator._IS_CAPTURING, communicator._capture_registered,
        "register_graph_buffers" in vars(kernels)]
    out["copies"] = [kernels.copies]
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    addresses = Addresses()
    captured(1, 1)
    out["copies"].append(kernels.copies)
    communicator.disabled = True
    Addresses().exchange()

    # What only one rank remembers.
    from vllm_compile_ext import envs
    from vllm_compile_ext.cuda_graphs import memory, record
    os.environ["VLLM_COMPILE_STORE"] = os.path.abspath("store")
    memory.key_of, memory._need = lambda config: config, lambda config, known, activations: known is not None
    for key, there in (("a" * 32, True), ("b" * 32, rank == 0), ("c" * 32, False)):
        if there:
            record.write(envs.store(), key, record.Record(base=0, held=0, graphs=0, each={}, needed=0, used=[]))
    out["remembered"] = [memory._find(key * 32, None)[2] for key in "abc"]
    report(out | {"calls": kernels.calls})
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    folders = [folder / "0", folder / "1"]
    started = [process.start(CODE, folders[n], str(n), str(folder / "meet")) for n in range(2)]
    deadline = time.monotonic() + 300
    try:
        ended = [
            process.finish(one, where, max(1, deadline - time.monotonic()))
            for one, where in zip(started, folders, strict=True)
        ]
    finally:
        for one in started:
            one.kill()
    for outcome in ended:
        assert outcome.code == 0, outcome.output[-5000:]
    return [outcome.value for outcome in ended]


def both(ranks: list[dict[str, Any]], name: str) -> Any:
    """What both ranks report, the reasons apart, which they may word differently."""
    one, other = ({k: v for k, v in rank[name].items() if k != "reasons"} for rank in ranks)
    assert one == other
    return one


def test_votes_and_numbers_are_the_same_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert (rank["size"], rank["several"]) == (2, True)
        assert rank["agree"] == [True, False, False, False]
        assert rank["first"] == [10, -1, 1 << 40]


def test_ranks_that_are_alike_capture_the_same(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "alike")
    assert len(found["captured"]) > 10
    assert found["barred"] == []


def test_what_one_ranks_budget_refuses_no_rank_captures(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "budget")
    assert (found["tried"], found["captured"]) == ([], [])
    assert set(found["ran"]) == {None}
    assert ranks[0]["budget"]["reasons"] == ["another rank has no memory for them"]
    assert ranks[1]["budget"]["reasons"] == ["the 0 MiB for CUDA graphs are used up"]


def test_where_one_ranks_budget_is_used_up_later_both_end_there(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "later")
    assert len(found["tried"]) == 2
    assert found["tried"] == sorted(found["captured"], key=found["tried"].index)
    assert len(found["barred"]) == 16


def test_where_one_rank_has_no_memory_at_the_moment_all_wait(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "short")
    assert (found["tried"], found["captured"], found["barred"]) == ([], [], [])
    assert set(found["ran"]) == {None}


def test_what_fails_on_one_rank_no_rank_has(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "failure")
    assert found["barred"] == ["FULL 8", "PIECEWISE 64"]
    assert not {"FULL 8", "PIECEWISE 64"} & {*found["captured"], *found["ran"]}
    assert ranks[1]["failure"]["reasons"] == ["RanksDifferError: it failed on another rank"]


def test_failures_on_one_rank_stop_captures_on_both(ranks: list[dict[str, Any]]) -> None:
    found = both(ranks, "stopped")
    assert len(found["captured"]) + len(found["barred"]) == 18
    assert [name for name in found["tried"] if name in found["barred"]] == ["FULL 32", "FULL 16", "FULL 8"]
    assert found["tried"][-1] == "FULL 8"


def test_while_idle_the_first_ranks_choice_is_captured(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["idle"] == ranks[1]["idle"]
    more, tried = ranks[0]["idle"]
    assert more == [True] * 17 + [False] * 3
    assert tried[:3] == ["PIECEWISE 64", "FULL 1", "FULL 2"]
    assert len(tried) == 18


def test_the_places_for_addresses_in_a_graph_are_filled_in_with_those_of_the_other_rank(
    ranks: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(ranks):
        other, before = 1 - rank, 0
        for calls, (alike, filled) in zip(CALLS, found["filled in"], strict=True):
            assert alike == (calls[0] == calls[1])
            if alike:
                inputs = range(1000 * other + before, 1000 * other + before + calls[other])
                assert filled == [[INPUT + other, number] for number in inputs]
            before += calls[other]


def test_a_capture_that_broke_off_on_one_rank_leaves_no_place_open_on_any(ranks: list[dict[str, Any]]) -> None:
    one, other = ([filled for _, filled in found["filled in"]] for found in ranks)
    assert one[1] == [[INPUT + 1, 1003], [UNUSED + 1, 0], [UNUSED + 1, 0]]
    assert other[1] == [[INPUT, 3]]
    assert one[3] == []
    assert other[3] == [[UNUSED, 0], [UNUSED, 0]]


def test_outside_a_capture_all_reduce_is_as_it_was(ranks: list[dict[str, Any]]) -> None:
    assert [found["after"] for found in ranks] == [[False, True, False]] * 2


def test_memory_that_has_no_handle_is_copied_from(ranks: list[dict[str, Any]]) -> None:
    assert [found["copies"] for found in ranks] == [[False, True]] * 2


def test_what_only_one_rank_remembers_none_does(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["remembered"] == [True, False, False]


def test_the_kernels_are_called_as_they_are_here(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["kernels"] == {
        "allocate_shared_buffer_and_handle": ["size"],
        "get_graph_buffer_ipc_meta": ["fa"],
        "register_graph_buffers": ["fa", "handles", "offsets"],
    }


def test_without_custom_all_reduce_nothing_is_exchanged(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["without"] == []
        assert found["calls"] == ["allocate", *["get"] * len(CALLS), "allocate", "get"]
