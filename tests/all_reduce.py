"""vLLM's custom all-reduce on a machine without a GPU: what csrc/custom_all_reduce.cuh (0.32.0) does with addresses."""

from __future__ import annotations

from typing import Any

import torch

HANDLE = 64  # bytes
UNUSED = 200  # what a handle consists of, and the rank: of the buffer that nobody uses
INPUT = 100  # of the memory that graphs are in
# Captures in turn: the calls of all-reduce that each of two ranks comes to.
CALLS = [(3, 3), (3, 1), (2, 2), (0, 2), (0, 0), (1, 1)]


class Kernels:
    """In the place of `vllm._custom_ops`.

    copies: whether inputs are copied to a buffer first.  open: offsets of the inputs whose places in graphs are not
    filled in.  filled: the other rank's handle and offset in the places that were.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.captured = 0
        self.copies = False
        self.open: list[int] = []
        self.filled: list[tuple[int, int]] = []
        self.calls: list[str] = []

    def capture(self, communicator: Any) -> None:
        """A call is captured."""
        assert communicator._IS_CAPTURING
        self.copies = not communicator._capture_registered
        self.open.append(1000 * self.rank + self.captured)
        self.captured += 1

    def allocate_shared_buffer_and_handle(self, size: int) -> tuple[int, torch.Tensor]:
        assert size > 0
        self.calls.append("allocate")
        return 1, torch.full((HANDLE,), UNUSED + self.rank, dtype=torch.uint8)

    def get_graph_buffer_ipc_meta(self, pointer: int) -> tuple[list[int], list[int]]:
        self.calls.append("get")
        return [INPUT + self.rank] * HANDLE * len(self.open), list(self.open)

    def register_graph_buffers(self, pointer: int, handles: list[list[int]], offsets: list[list[int]]) -> None:
        other = 1 - self.rank
        assert offsets[self.rank][: len(self.open)] == self.open
        for place in range(len(self.open)):
            handle = handles[other][HANDLE * place : HANDLE * (place + 1)]
            assert len(handle) == HANDLE, "read past the end"
            assert len(set(handle)) == 1
            self.filled.append((handle[0], offsets[other][place]))
        self.open = []

    def take(self) -> list[tuple[int, int]]:
        assert self.open == [], "to be filled in with what belongs to another graph"
        filled, self.filled = self.filled, []
        return filled


def communicator(group: Any, rank: int) -> Any:
    """Upstream's, without its buffers on devices."""
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    made = CustomAllreduce.__new__(CustomAllreduce)
    made._ptr, made._IS_CAPTURING, made.disabled, made.group, made.rank = 0, False, False, group, rank
    made._capture_registered = True
    return made
