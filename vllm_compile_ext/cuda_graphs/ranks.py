"""Tensor parallel ranks capture the same shape in the same step, or none does."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from vllm.device_allocator import alloc_conf
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators import custom_all_reduce

_T = TypeVar("_T")

# Bytes of a buffer that nobody uses.
UNUSED = 256


class RanksDifferError(RuntimeError):
    """A graph is not captured on every rank; the message says why."""


def several() -> bool:
    """Whether there is more than one tensor parallel rank."""
    return int(parallel_state.get_tp_group().world_size) > 1


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every tensor parallel rank."""
    group = parallel_state.get_tp_group()
    if group.world_size == 1:
        return ok
    votes = torch.tensor([int(ok)], dtype=torch.int32)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(votes.item())


def from_first(value: _T) -> _T:
    """The first tensor parallel rank's `value`."""
    return from_all(value)[0] if several() else value


def from_all(value: _T) -> list[_T]:
    """Each tensor parallel rank's `value`, in the order of ranks.  By broadcasts, since gloo cannot gather objects in
    inference mode (pytorch #126032)."""
    group, found = parallel_state.get_tp_group(), []
    for rank in group.ranks:
        objects = [value]
        torch.distributed.broadcast_object_list(objects, src=rank, group=group.cpu_group, device="cpu")
        found += objects
    return found


class Addresses:
    """The addresses that vLLM's custom all-reduce leaves open in a graph: ranks exchange them after each capture.

    Facts from vllm/distributed/device_communicators/custom_all_reduce.py and csrc/custom_all_reduce.cuh, vLLM 0.32.0: a
    kernel that is being captured is given a place, which `register_graph_buffers` fills in later with where each rank's
    input is.  For each of its places a rank opens what the other ranks have sent for the place of that number, without
    looking whether they have sent as many.

    Every rank has to make one, and call `exchange` as often as the others.

    changes: what all-reduce needs while a graph is captured, as (object, attribute, value): to read the ranks' inputs
    where they are, instead of copying them first, if it can.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[Any, str, Any]] = []
        communicator: Any = getattr(parallel_state.get_tp_group().device_communicator, "ca_comm", None)
        self._communicator = None if communicator is None or communicator.disabled else communicator
        if self._communicator is None:
            return
        _, handle = custom_all_reduce.ops.allocate_shared_buffer_and_handle(UNUSED)
        self._unused: list[list[int]] = from_all(handle.tolist())
        # What expandable segments consist of has no handle; upstream's kernel would end the process.
        live = alloc_conf.expandable_segments_enabled()
        expandable = alloc_conf.expandable_segments_enabled_from_env() if live is None else live
        registered = communicator._capture_registered and not expandable
        self.changes = [(communicator, "_IS_CAPTURING", True), (communicator, "_capture_registered", registered)]

    def exchange(self) -> bool:
        """Fill in what the last capture left open; whether it left as much open on every rank.

        If not, it broke off on some, and no rank may use what it captured, but the places have to be done with.  A rank
        on which this raises cannot go on: the others' graphs do not have its addresses.
        """
        if self._communicator is None:
            return True
        pointer, kernels = self._communicator._ptr, custom_all_reduce.ops
        sent = from_all(kernels.get_graph_buffer_ipc_meta(pointer))
        most = max(len(offsets) for _, offsets in sent)
        handles, places = [], []
        for unused, (handle, offsets) in zip(self._unused, sent, strict=True):
            missing = most - len(offsets)
            handles.append([*handle, *unused * missing])
            places.append([*offsets, *[0] * missing])
        kernels.register_graph_buffers(pointer, handles, places)
        return all(len(offsets) == most for _, offsets in sent)
