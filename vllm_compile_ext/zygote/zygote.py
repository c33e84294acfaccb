"""The zygote: a fork that does nothing but fork itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vllm_compile_ext import harmless
from vllm_compile_ext.zygote import NotForkedError, child

_MOST_FILES = 250  # of one message; Linux allows 253
_ANSWER = 30.0  # seconds; it takes milliseconds
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # linux/prctl.h


class Zygote:
    """The zygote of the process that makes it, which alone can ask it.

    owner, pid: the numbers of that process and of the zygote.
    """

    def __init__(
        self, others: Sequence[int], seen: Mapping[str, str], make_zygote: Callable[[Sequence[int]], None]
    ) -> None:
        """others: open files of this process that the zygote closes.  The rest is for `child.run`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            be = functools.partial(child.run, seen=seen, make_zygote=make_zygote)
            _only(lambda: _serve(theirs, [ours.detach(), *others], be))
        theirs.close()
        self._socket, self._lock = ours, threading.Lock()

    def fork(self, told: child.Told, files: Sequence[int]) -> int:
        """A new child process of this one, which is told `told` and gets `files`; returns its number.

        Raises `NotForkedError`.
        """
        if len(files) > _MOST_FILES - 1:
            raise NotForkedError(f"{len(files)} files are to be handed over")
        ours, theirs = socket.socketpair()
        with Connection(ours.detach()) as connection, theirs:
            try:
                with self._lock, _adopting_orphans():
                    socket.send_fds(self._socket, [b"f"], [theirs.fileno(), *files])
                    theirs.close()
                    connection.send((self.owner, told))
                    if not connection.poll(_ANSWER):
                        raise NotForkedError("the zygote does not answer")
                    number, problem = connection.recv()
            except (OSError, EOFError) as error:
                raise NotForkedError(f"the zygote does not answer ({harmless.error(error)})") from None
        if problem:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, 0)
            raise NotForkedError(problem)
        return int(number)

    def close(self) -> None:
        """End it; it ends by itself when this process does."""
        self._socket.close()
        os.waitpid(self.pid, 0)


def _serve(requests: socket.socket, others: Sequence[int], be: Callable[..., int]) -> None:
    """Fork for each request, until the process that asks has ended."""
    for file in others:
        os.close(file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who have something to end
    if "vllm.utils.system_utils" in sys.modules:
        sys.modules["vllm.utils.system_utils"].set_process_title("Zygote")
    while True:
        _, files, _, _ = socket.recv_fds(requests, 1, _MOST_FILES)
        if not files:
            return
        # A process whose parent ends at once is adopted by the one that asks: this is its parent from then on.
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                requests.close()
                _only(functools.partial(be, Connection(files[0]), files[1:]))
            os._exit(0)
        os.waitpid(between, 0)
        for file in files:
            os.close(file)


def _only(function: Callable[[], int | None]) -> NoReturn:
    """Run `function` and end with its status: what is below on the stack is another's."""
    code = 1
    try:
        code = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 0xFF)


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Descendants whose parent ends become children of this process."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before: Any = ctypes.c_int()
    if prctl(_GET_SUBREAPER, ctypes.byref(before), 0, 0, 0) or prctl(_SET_SUBREAPER, 1, 0, 0, 0):
        raise NotForkedError(f"prctl: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        prctl(_SET_SUBREAPER, before.value, 0, 0, 0)
