"""`vllm serve` where there is a standby: it has a fork of that be the server, and stands for it until it has ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from vllm_compile_ext import finder
from vllm_compile_ext.record.recorder import process_start
from vllm_compile_ext.standby import facts, place
from vllm_compile_ext.zygote import reads
from vllm_compile_ext.zygote.surroundings import Surroundings

PATIENCE = 10  # seconds; a standby that is not itself busy takes a tenth of one
_FROM_KERNEL = 0x80  # asm-generic/siginfo.h: SI_KERNEL, of a terminal, which signals a whole group
# What a script may do before it imports vLLM, since the server does it again: pip's and uv's do no more.
_SCRIPT = re.compile(r"(#.*\n|\s*\n|import [\w., ]+\n|from [\w.]+ import [\w., ]+\n)*?(import|from) vllm\b")
# A server gets them by itself, or the kernel lets nobody have them.
_OWN = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE}


@dataclass
class Asked:
    """What a client says of itself.

    program: its arguments, from the script or ``-m`` on.  files: numbers of the files that are sent along.
    began: unix ns at which the system began this process; up: at which its Python was.  name: as `ps -o comm` has it.
    """

    program: list[str]
    files: tuple[int, ...]
    began: int
    up: int = finder.STARTED
    name: str = field(default_factory=lambda: Path("/proc/self/comm").read_text().strip())
    path: list[str] = field(default_factory=lambda: sys.path)
    orig_argv: list[str] = field(default_factory=lambda: sys.orig_argv)
    facts: dict[str, Any] = field(default_factory=facts.look)
    surroundings: Surroundings = field(default_factory=Surroundings)


def peer(of: socket.socket) -> int:
    """The process at the other end, which is another user's or in another pod: 0."""
    process, user, _ = struct.unpack("3i", of.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        of.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", PATIENCE, 0))
    return int(process) if user == os.getuid() else 0


def ask() -> None:
    """Become the one who stands for the server; returns where that is not possible, after a line that says why."""
    program = place.program(sys.orig_argv)
    if program is None or not place.is_private():
        return
    with socket.socket(socket.AF_UNIX) as there:
        try:
            there.connect(place.socket())
        except OSError:
            return  # none is running
        try:
            found = _agree(there, program)
        except Exception as error:
            found = f"it did not answer ({type(error).__name__})"
    if not isinstance(found, str):
        server, handle, connection = found
        found = _begin(server, handle, connection) or _stand_for(server, connection)
    _say(f"the standby is not used: {found}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        os.write(2, f"vllm-compile-ext: {text}\n".encode())


def _agree(there: socket.socket, program: list[str]) -> tuple[int, int, Connection] | str:
    """Number and handle of the server and what tells of its end; or why there will be none."""
    if program[0] != "-m" and not _SCRIPT.match(Path(program[0]).read_text(errors="replace")):
        return f"{program[0]} does something of its own before it imports vLLM"
    standby = peer(there)
    if standby == 0:
        return "it is another user's, or beyond reach"
    if what := facts.differs(standby):
        return f"{what} is another"
    files = [0, 1, 2, *reads.given_files()]
    socket.send_fds(there, [b"f"], files)
    connection = Connection(os.dup(there.fileno()))
    connection.send(Asked(program, tuple(files), process_start() or finder.STARTED))
    if not connection.poll(PATIENCE):
        raise TimeoutError
    server = connection.recv()
    return server if isinstance(server, str) else (server, os.pidfd_open(server), connection)


def _begin(server: int, handle: int, connection: Connection) -> str | None:
    """Have the server go on; returns why that is not possible."""
    passed, before = signal.valid_signals() - _OWN, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ignores_stop = signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        signal.pthread_sigmask(signal.SIG_BLOCK, passed)
        threading.Thread(target=_pass_on, args=(passed, server, handle, ignores_stop), daemon=True).start()
        _say(f"this is served by {server}, a fork of the standby")  # before the server says anything
        connection.send("go")
    except Exception as error:  # the server ends when the connection does
        connection.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return f"{type(error).__name__}"
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # who reads it waits for its end
    return None


def _stand_for(server: int, connection: Connection) -> NoReturn:
    for number in reads.given_files():
        os.close(number)
    with socket.socket(fileno=os.dup(connection.fileno())) as forever:
        forever.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    try:
        status = connection.recv()
    except (OSError, EOFError):
        _say("the process that watched over the server was killed; so is the server")
        with contextlib.suppress(OSError):
            os.killpg(server, signal.SIGKILL)
        status = 1
    _end(status)


def _pass_on(passed: set[signal.Signals], server: int, handle: int, ignores_stop: bool) -> None:
    """Pass signals on: one of a terminal to all of the server's processes, as the terminal would."""
    while True:
        info = signal.sigwaitinfo(passed)
        with contextlib.suppress(OSError):  # it is about to end
            if info.si_code == _FROM_KERNEL or info.si_signo in (signal.SIGHUP, signal.SIGCONT):
                os.killpg(server, info.si_signo)
            else:
                signal.pidfd_send_signal(handle, info.si_signo)
        if info.si_signo == signal.SIGTSTP and not ignores_stop:
            os.kill(os.getpid(), signal.SIGSTOP)


def _end(status: int) -> NoReturn:
    """End as the server did: with its exit status, or by the signal that ended it."""
    if status < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the server has left one, if any
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        signal.pthread_kill(threading.get_ident(), -status)  # the other thread waits for some
    os._exit(status & 0xFF if status >= 0 else 128 - status)
