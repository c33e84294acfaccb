"""Tensor parallel ranks capture the same shape in the same step, or none does."""

from __future__ import annotations

import torch
from vllm.distributed import parallel_state


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


def from_first(number: int) -> int:
    """The first tensor parallel rank's `number`."""
    group = parallel_state.get_tp_group()
    if group.world_size == 1:
        return number
    numbers = torch.tensor([number], dtype=torch.int64)
    torch.distributed.broadcast(numbers, src=group.ranks[0], group=group.cpu_group)
    return int(numbers.item())


def from_all(value: list[int]) -> list[list[int]]:
    """Each tensor parallel rank's `value`.  By broadcasts, since gloo cannot gather objects in inference mode (pytorch
    #126032)."""
    group, found = parallel_state.get_tp_group(), []
    for rank in group.ranks:
        objects = [value]
        torch.distributed.broadcast_object_list(objects, src=rank, group=group.cpu_group, device="cpu")
        found += objects
    return found
