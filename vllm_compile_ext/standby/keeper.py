"""The parent of a server: tells the client how it ended, and ends it when the client is killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NoReturn

from vllm_compile_ext import harmless
from vllm_compile_ext.standby import server
from vllm_compile_ext.standby.server import Held

STALE = 3  # its exit status where files that the standby has imported have changed


def keep(there: socket.socket, held: Held) -> Callable[[], None]:
    """Fork the server that is asked for, in which this returns, with what it is to run."""
    os.setsid()
    _, files, _, _ = socket.recv_fds(there, 1, 253)
    connection = Connection(there.detach())
    asked = connection.recv()
    try:
        stale = held.files.changed(asked.surroundings.folder)
        reason = held.differs(asked) or (stale and f"{stale} has changed")
    except Exception as error:
        stale, reason = None, harmless.error(error)
    if reason:
        with contextlib.suppress(OSError):
            connection.send(reason)
        os._exit(STALE if stale else 0)
    number = os.fork()
    if number != 0:
        del asked  # and its environment
        for file in files:
            os.close(file)
        _watch(number, connection)
    return server.become(asked, files, connection, held)


def _watch(number: int, connection: Connection) -> NoReturn:
    for each in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(each, signal.SIG_IGN)  # it ends when the server has
    handle = os.pidfd_open(number)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(connection, 0)  # the client's end
    if handle not in {file for file, _ in poll.poll()}:
        with contextlib.suppress(OSError):
            os.killpg(number, signal.SIGKILL)
    result = os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)  # the client may still use its number
    if result is not None:
        with contextlib.suppress(OSError):
            connection.send(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)
            poll.unregister(handle)
            poll.poll(1000)
    os._exit(0)
