"""The parent of a server: tells the client how it ended, and ends it when the client is killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NoReturn

from vllm_compile_ext import harmless
from vllm_compile_ext.standby import client, facts, server
from vllm_compile_ext.standby.server import Held

STALE = 3  # its exit status where files that the standby has imported have changed


def keep(there: socket.socket, held: Held) -> Callable[[], None]:
    """Fork the server that is asked for, in which this returns, with what it is to run."""
    try:
        return _keep(there, held)
    except (OSError, EOFError):  # the client has gone
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _keep(there: socket.socket, held: Held) -> Callable[[], None]:
    os.setsid()
    process = client.peer(there)
    if process == 0 or facts.differs(process):
        os._exit(0)  # and read nothing that it says: what is pickled may do anything
    _, files, _, _ = socket.recv_fds(there, 1, 253)
    connection = Connection(there.detach())
    asked = connection.recv()
    stale = None
    try:
        if not (reason := held.differs(asked)) and (stale := held.files.changed()):
            reason = f"{stale} has changed"
    except Exception as error:
        reason = harmless.error(error)
    if reason:
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
    sys.modules["vllm.utils.system_utils"].set_process_title("Keeper")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nowhere, file)
    handle = os.pidfd_open(number)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(connection, 0)  # the client's end
    client_is_there = handle in {file for file, _ in poll.poll()}
    if not client_is_there:
        _end_all(number)
    result = os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)  # its number stays its own
    if result is not None:
        killed = result.si_code != os.CLD_EXITED
        if killed:
            _end_all(number)  # engines would not notice
        with contextlib.suppress(OSError):
            connection.send(-result.si_status if killed else result.si_status)
            poll.unregister(handle)
            poll.poll(1000)  # until the client has ended, which may still use the number
    os.waitpid(number, 0)
    os._exit(0)


def _end_all(group: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
