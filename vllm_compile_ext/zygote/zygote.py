"""The zygote: a fork that does nothing but fork itself."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vllm_compile_ext import harmless
from vllm_compile_ext.zygote import NotForkedError, child

_MOST_FILES = 250  # of one message; Linux allows 253
_PATIENCE = 30  # seconds for what takes milliseconds
_HIGH = 200  # numbers of files from here on are nobody's
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # linux/prctl.h


class Zygote:
    """The zygote of the process that makes it, which alone can ask it.

    owner, pid: the numbers of that process and of the zygote.
    """

    def __init__(self, others: Sequence[int], make_zygote: Callable[[Sequence[int]], Callable[[], None]]) -> None:
        """others: open files of this process that the zygote closes.  make_zygote: for `child.run`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner = os.getpid()
        _flush()
        self.pid = os.fork()
        if self.pid == 0:
            be = functools.partial(child.run, make_zygote=make_zygote)
            _only(lambda: _serve(theirs, [ours.detach(), *others], be))
        theirs.close()
        _send_for_a_while(ours)
        self._socket, self._lock = ours, threading.Lock()

    def fork(self, told: child.Told, files: Sequence[int]) -> int:
        """A new child process of this one, which is told `told` and gets `files`; returns its number.

        Raises `NotForkedError`.
        """
        if len(files) > _MOST_FILES - 1:
            raise NotForkedError(f"{len(files)} files are to be handed over")
        number = 0
        ours, theirs = socket.socketpair()
        _send_for_a_while(ours)
        with Connection(ours.detach()) as connection, theirs, self._lock:
            try:
                with _adopting_orphans():
                    socket.send_fds(self._socket, [b"f"], [theirs.fileno(), *files])
                    theirs.close()
                    connection.send((self.owner, told))
                    number, problem = _answer(connection), _answer(connection)
            except (OSError, EOFError) as error:
                self.close()  # and never again
                problem = f"the zygote does not answer ({harmless.error(error)})"
        if problem:
            with contextlib.suppress(OSError):  # ended, or not this process's child
                if number:
                    os.kill(number, signal.SIGKILL)
                    os.waitpid(number, 0)
            raise NotForkedError(str(problem))
        return int(number)

    def close(self) -> None:
        """End it, once; it ends by itself when its owner does."""
        if self.owner != os.getpid() or self._socket.fileno() < 0:
            return
        self._socket.close()
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)  # it may hold a lock of a library, and has nothing to lose
            os.waitpid(self.pid, 0)


def _send_for_a_while(to: socket.socket) -> None:
    to.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _PATIENCE, 0))


def _answer(connection: Connection) -> Any:
    if not connection.poll(_PATIENCE):
        raise TimeoutError(f"{_PATIENCE} s")
    return connection.recv()


def _flush() -> None:
    """What is in the buffers would be written by each fork."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _serve(requests: socket.socket, others: Sequence[int], be: Callable[..., int]) -> None:
    """Fork for each request, until the process that asks has ended."""
    tracker: Any = resource_tracker._resource_tracker
    for file in {*others, *filter(None, [tracker._fd])}:
        os.close(file)
    tracker._fd = tracker._pid = None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who have something to end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "vllm.utils.system_utils" in sys.modules:
        sys.modules["vllm.utils.system_utils"].set_process_title("Zygote")
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1, _MOST_FILES)
        if not message:
            return
        # A process whose parent ends at once is adopted by the one that asks: this is its parent from then on.
        with contextlib.suppress(OSError):  # too many processes: the asker sees its connection end
            between = os.fork()
            if between == 0:
                if os.fork() == 0:
                    requests.close()
                    _only(functools.partial(_begin, be, files))
                os._exit(0)
            os.waitpid(between, 0)
        for file in files:
            os.close(file)


def _begin(be: Callable[..., int], files: Sequence[int]) -> int:
    connection = fcntl.fcntl(files[0], fcntl.F_DUPFD_CLOEXEC, _HIGH)
    os.close(files[0])
    return be(Connection(connection), files[1:])


def _only(function: Callable[[], int | None]) -> NoReturn:
    """Run `function` and end with its status: what is below on the stack is another's."""
    code = 1
    try:
        code = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        ctypes.CDLL(None).fflush(None)
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
