"""The standby: imports what `vllm serve` imports, then waits for clients and forks itself for each."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from vllm_compile_ext.finder import STARTED, finder
from vllm_compile_ext.standby import facts, keeper, place
from vllm_compile_ext.standby.files import Files
from vllm_compile_ext.standby.server import Held
from vllm_compile_ext.zygote import front, reads

HIGHEST = 900  # numbers of files from here on are this process's own, those below its clients'


class CannotStandByError(Exception):
    """The message says why."""


class _ImportedError(BaseException):
    """Ends vLLM's `main` where it has imported everything."""


def hold(idle: float | None) -> Callable[[], None]:
    """Serve clients until there has been nobody for `idle` seconds; returns in each server, with what it is to run.

    Raises `CannotStandByError`.
    """
    if finder not in sys.meta_path or not reads.is_watching():
        raise CannotStandByError("the plugin's .pth file was not read: install it with pip, not on PYTHONPATH")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    began, owner, lock = time.monotonic(), os.getpid(), _lock()
    for file in reads.given_files():
        os.close(file)
    held = _import(again=reads.first().pop(_AGAIN, None) is not None)
    gc.freeze()  # else each fork goes through all of it, and so gets a copy
    listening = _listen()

    def leave(number: int, frame: Any) -> None:
        _leave("ended") if os.getpid() == owner else os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    sys.modules["vllm.utils.system_utils"].set_process_title("Standby")
    seconds = time.monotonic() - began
    _say(f"standing by for vllm serve: {len(sys.modules)} modules, {seconds:.1f} s; {place.socket()}")
    there = _wait(listening, idle)
    os.close(lock)
    return keeper.keep(there, held)


def _listen() -> socket.socket:
    Path(place.socket()).unlink(missing_ok=True)  # of one that was killed
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place.socket())
    listening.listen(16)
    return _move(listening)


def _wait(listening: socket.socket, idle: float | None) -> socket.socket:
    """Fork for each client; returns in each keeper, with what leads to the client."""
    keepers = set[int]()  # handles
    with selectors.DefaultSelector() as selector, listening:
        selector.register(listening, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select(idle if not keepers else None)}
            if not ready and not keepers:
                _leave(f"nobody came for {idle:g} s")
            for handle in keepers & ready:
                selector.unregister(handle)
                os.close(handle)
            keepers -= ready
            _collect()
            if listening.fileno() not in ready:
                continue
            try:
                with _move(listening.accept()[0]) as there:
                    number = os.fork()
                    if number == 0:
                        for handle in keepers:
                            os.close(handle)
                        return _move(there)
                    handle = _high(os.pidfd_open(number))
                    keepers.add(handle)
                    selector.register(handle, selectors.EVENT_READ)
            except OSError:  # the client has gone, or there are too many processes or files
                continue


def _collect() -> None:
    """Collect those that have ended, also of the time before it began again; begin again where one found a reason."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if os.waitstatus_to_exitcode(ended[1]) == keeper.STALE:
                _begin_again()


def _lock() -> int:
    """Whoever has it is the standby; it ends with the process."""
    folder = Path(place.folder())
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not place.is_private():
        raise CannotStandByError(
            f"{folder} is not a folder that only this user can write to: name another in {place.VARIABLE}"
        )
    if len(os.fsencode(place.socket())) > place.LONGEST:
        raise CannotStandByError(
            f"{place.socket()} is longer than {place.LONGEST} bytes: name another folder in {place.VARIABLE}"
        )
    lock = _high(os.open(place.socket() + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotStandByError(f"another one stands by at {place.socket()}") from None
    return lock


# Modules that read the command line when they are imported: vLLM's `main` does so again in each server, vLLM's options
# look for --help (see `Held.differs`), tvm_ffi for a tool of its own.
_READ_ARGUMENTS = {"vllm.entrypoints.cli.main", "vllm.engine.arg_utils", "tvm_ffi"}


class _Arguments(list[str]):
    """The command line while importing: notes which modules read it."""

    readers: ClassVar[set[str]] = set()

    @staticmethod
    def _noting(name: str) -> Any:
        def noting(self: _Arguments, *arguments: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_name == "<genexpr>":
                frame = frame.f_back
            self.readers.add(str(frame.f_globals.get("__name__")))
            return getattr(list, name)(self, *arguments)

        return noting

    __iter__, __getitem__, __contains__, __len__ = map(_noting, ("__iter__", "__getitem__", "__contains__", "__len__"))
    copy, index, count, __add__, __eq__ = map(_noting, ("copy", "index", "count", "__add__", "__eq__"))


def _import(again: bool) -> Held:
    """Import what vLLM's command imports before it does anything else.  again: it has begun again for that."""
    os.environ.pop(_AGAIN, None)
    seen: dict[str, Any] = {}

    def look() -> None:
        # Not the system's time of this process: where it has begun again, that is the first one's.
        seen["facts"], seen["files"] = facts.look(), Files(STARTED)

    def stop() -> None:
        raise _ImportedError

    finder.before, front.instead = look, stop
    arguments = sys.orig_argv
    # Of an option that vLLM does not have it complains, where it has come so far: not where it does what is expected.
    sys.argv, sys.orig_argv = _Arguments(["vllm", "serve", "--standing-by"]), _Arguments(arguments)
    try:
        from vllm.entrypoints.cli.main import main

        main()
    except _ImportedError:
        front.instead, sys.orig_argv = None, arguments
    except SystemExit:
        raise CannotStandByError("vLLM's command is not as it is in the versions that are supported") from None
    files: Files = seen["files"]
    if changed := files.stop():
        if again:
            raise CannotStandByError(f"{changed} changes whenever vLLM is imported")
        _begin_again(changed)
    if files.temporary:
        raise CannotStandByError(f"imports have made {min(files.temporary)}, which servers would remove")
    if readers := {each for each in _Arguments.readers if not each.startswith("vllm_compile_ext.")} - _READ_ARGUMENTS:
        raise CannotStandByError(f"{', '.join(sorted(readers))} reads the command line when it is imported")
    if reason := front.reason_to_spawn() or _threads_left():
        raise CannotStandByError(reason)
    reads.stop()
    first, variables = reads.first(), reads.names()
    changes = {name: os.environ.get(name) for name in {*first, *os.environ} if first.get(name) != os.environ.get(name)}
    return Held(seen["facts"], files, variables, changes)


def _threads_left() -> str | None:
    """Threads of libraries that do not end for a fork: in it they would be missing."""
    number = os.fork()
    if number == 0:
        os._exit(0)
    os.waitpid(number, 0)
    return front.threads_left()


def _leave(why: str) -> NoReturn:
    with contextlib.suppress(OSError):
        Path(place.socket()).unlink()
    _say(f"no longer standing by: {why}")
    os._exit(0)


def _begin_again(changed: str = "") -> NoReturn:
    """With the command line and the environment that this process began with; its lock ends with `execve`.

    changed: a path that has changed while importing, which is not to happen again.
    """
    _say(f"{changed or 'what was imported'} has changed: begins again")
    os.execve(sys.executable, sys.orig_argv, reads.first() | ({_AGAIN: "1"} if changed else {}))


_AGAIN = "_VLLM_COMPILE_EXT_AGAIN"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(text, flush=True)


def _high(file: int) -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, min(HIGHEST, limit // 2))
    os.close(file)
    return moved


def _move(of: socket.socket) -> socket.socket:
    return socket.socket(fileno=_high(of.detach()))
