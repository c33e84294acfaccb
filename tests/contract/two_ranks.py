"""One of two tensor parallel ranks with vLLM's own groups, on CPU: their votes, and the addresses that custom
all-reduce leaves open in graphs.  `test_in_vllm` runs both."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.device_allocator import alloc_conf
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators import custom_all_reduce
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

from tests.unit.cuda_graphs.test_memory import changed, config
from vllm_compile_ext.cuda_graphs import memory, ranks
from vllm_compile_ext.replace import replace

RANK = int(os.environ["RANK"])
OTHER = 1 - RANK
HANDLE = 64  # bytes
UNUSED = 200  # what a handle consists of, and the rank: of the buffer that nobody uses
INPUT = 100  # of the memory that graphs are in


class Kernels:
    """In the place of `vllm._custom_ops`: what csrc/custom_all_reduce.cuh (0.32.0) does with addresses.

    copies: whether inputs are copied to a buffer first.  open: offsets of the inputs whose places in graphs are not
    filled in.  filled: the other rank's handle and offset in the places that were.
    """

    def __init__(self) -> None:
        self.captured = 0
        self.copies = False
        self.open: list[int] = []
        self.filled: list[tuple[int, int]] = []
        self.calls: list[str] = []

    def capture(self, communicator: Any) -> None:
        """A call is captured."""
        assert communicator._IS_CAPTURING
        self.copies = not communicator._capture_registered
        self.open.append(1000 * RANK + self.captured)
        self.captured += 1

    def allocate_shared_buffer_and_handle(self, size: int) -> tuple[int, torch.Tensor]:
        assert size > 0
        self.calls.append("allocate")
        return 1, torch.full((HANDLE,), UNUSED + RANK, dtype=torch.uint8)

    def get_graph_buffer_ipc_meta(self, fa: int) -> tuple[list[int], list[int]]:
        self.calls.append("get")
        return [INPUT + RANK] * HANDLE * len(self.open), list(self.open)

    def register_graph_buffers(self, fa: int, handles: list[list[int]], offsets: list[list[int]]) -> None:
        assert offsets[RANK][: len(self.open)] == self.open
        for place in range(len(self.open)):
            handle = handles[OTHER][HANDLE * place : HANDLE * (place + 1)]
            assert len(handle) == HANDLE, "read past the end"
            assert len(set(handle)) == 1
            self.filled.append((handle[0], offsets[OTHER][place]))
        self.open = []


@contextmanager
def _captured(addresses: ranks.Addresses) -> Iterator[None]:
    with ExitStack() as undos:
        for owner, name, value in addresses.changes:
            undos.callback(replace(owner, name, lambda stock, value=value: value))
        yield


@pytest.fixture(scope="session", autouse=True)
def group() -> Any:
    os.environ["VLLM_DIST_IDENT"] = str(RANK)  # where the names differ, CPU ranks have no shared memory of their own
    with set_current_vllm_config(VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=2))):
        parallel_state.init_distributed_environment(2, RANK, f"file://{os.environ['MEET']}", RANK, "gloo")
        parallel_state.initialize_model_parallel(2, backend="gloo")
    return parallel_state.get_tp_group()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made, stock = Kernels(), custom_all_reduce.ops
    for name in ("allocate_shared_buffer_and_handle", "get_graph_buffer_ipc_meta", "register_graph_buffers"):
        theirs, ours = (list(inspect.signature(getattr(ops, name)).parameters) for ops in (stock, made))
        assert theirs == ours
    monkeypatch.setattr(custom_all_reduce, "ops", made)
    return made


@pytest.fixture
def communicator(group: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Upstream's, without its buffers on devices."""
    made = CustomAllreduce.__new__(CustomAllreduce)
    made._ptr, made._IS_CAPTURING, made.disabled, made.group, made.rank = 0, False, False, group.cpu_group, RANK
    made._capture_registered = True
    monkeypatch.setattr(group.device_communicator, "ca_comm", made, raising=False)
    return made


def test_votes_and_numbers_are_the_same_on_both_ranks() -> None:
    assert ranks.several()
    assert [ranks.all_agree(ok) for ok in (True, False, RANK == 0, RANK == 1)] == [True, False, False, False]
    assert [ranks.from_first(number + RANK) for number in (10, -1, 1 << 40)] == [10, -1, 1 << 40]


def test_places_for_addresses_are_filled_in_with_the_other_ranks_and_none_is_left_open_where_one_broke_off(
    kernels: Kernels, communicator: Any
) -> None:
    first = [0, 0]
    with torch.inference_mode():  # as a step
        addresses = ranks.Addresses()
        for calls in [(3, 3), (3, 1), (2, 2), (0, 2), (0, 0), (1, 1)]:
            with _captured(addresses):
                for _ in range(calls[RANK]):
                    kernels.capture(communicator)
            assert addresses.exchange() == (calls[0] == calls[1])
            inputs = [(INPUT + OTHER, 1000 * OTHER + first[OTHER] + place) for place in range(calls[OTHER])]
            unused = [(UNUSED + OTHER, 0)] * (calls[RANK] - calls[OTHER])
            assert kernels.filled == [*inputs, *unused][: calls[RANK]]
            assert kernels.open == []
            kernels.filled = []
            first = [before + more for before, more in zip(first, calls, strict=True)]
    assert kernels.calls == ["allocate", *["get"] * 6]


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_memory_that_has_no_handle_is_copied_from(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, communicator: Any, allocator: str
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", allocator)
    monkeypatch.setattr(alloc_conf, "expandable_segments_enabled", lambda: None)  # as without CUDA
    with _captured(ranks.Addresses()):
        kernels.capture(communicator)
    assert kernels.copies == bool(allocator)


def test_without_custom_all_reduce_nothing_is_exchanged(kernels: Kernels, communicator: Any) -> None:
    communicator.disabled = True
    assert ranks.Addresses().exchange()
    assert kernels.calls == []


@pytest.mark.parametrize(("name", "there"), [("both", True), ("one", RANK == 0), ("none", False)])
def test_what_only_one_rank_remembers_none_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, name: str, there: bool
) -> None:
    monkeypatch.setenv("VLLM_COMPILE_STORE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    if there:
        memory.write(tmp_path, changed(key=memory.history_key(config(name))))
    assert (memory.take_budget(config(name)).source != "an estimate") == (name == "both")
