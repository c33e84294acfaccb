"""The addresses that vLLM's custom all-reduce leaves open in a graph: the ranks exchange them after each capture.

Facts from vllm/distributed/device_communicators/custom_all_reduce.py and csrc/custom_all_reduce.cuh, vLLM 0.32.0: a
kernel that is being captured is given a place, which `register_graph_buffers` fills in later with where each rank's
input is.  For each of its places a rank opens what the other ranks have sent for the place of that number, without
looking whether they have sent as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from vllm.device_allocator import alloc_conf
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators import custom_all_reduce

from vllm_compile_ext.cuda_graphs import ranks

# Bytes of a buffer that nobody uses.
UNUSED = 256


class Addresses:
    """Of the tensor parallel group's custom all-reduce; where it is not in use, nothing is done.

    Every rank has to make one, and call `exchange` as often as the others.
    """

    def __init__(self) -> None:
        communicator = getattr(parallel_state.get_tp_group().device_communicator, "ca_comm", None)
        self._communicator = None if communicator is None or communicator.disabled else communicator
        if self._communicator is not None:
            _, handle = custom_all_reduce.ops.allocate_shared_buffer_and_handle(UNUSED)
            # Of each rank, the handle of such a buffer.
            self._unused = ranks.from_all(handle.tolist())
            # What expandable segments consist of has no handle; upstream's kernel would end the process.
            self._have_handles = self._communicator._capture_registered and not _expandable_segments()

    @contextmanager
    def open(self) -> Iterator[None]:
        """What is captured in here reads the ranks' inputs where they are, instead of copying them first, if it can."""
        if self._communicator is None:
            yield
            return
        with patch.multiple(self._communicator, _IS_CAPTURING=True, _capture_registered=self._have_handles):
            yield

    def exchange(self) -> bool:
        """Fill in what the last capture left open; whether it left as much open on every rank.

        If not, it broke off on some, and no rank may use what it captured, but the places have to be done with.  A rank
        on which this raises cannot go on: the others' graphs do not have its addresses.
        """
        if self._communicator is None:
            return True
        fill_in, found = custom_all_reduce.ops.register_graph_buffers, set[int]()

        def as_many(pointer: int, handles: list[list[int]], offsets: list[list[int]]) -> None:
            found.update(map(len, offsets))
            for unused, of_rank, at in zip(self._unused, handles, offsets, strict=True):
                missing = max(found) - len(at)
                of_rank += unused * missing
                at += [0] * missing
            fill_in(pointer, handles, offsets)

        with patch.object(custom_all_reduce.ops, "register_graph_buffers", as_many):
            self._communicator.register_graph_buffers()
        return len(found) == 1


def _expandable_segments() -> bool:
    known = alloc_conf.expandable_segments_enabled()
    return bool(alloc_conf.expandable_segments_enabled_from_env() if known is None else known)
