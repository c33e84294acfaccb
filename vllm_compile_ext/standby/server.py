"""What a fork of the standby does to become the server that its client would have been."""

from __future__ import annotations

import contextlib
import os
import runpy
import shlex
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import process
from multiprocessing.connection import Connection
from typing import Any

from vllm_compile_ext import finder, harmless
from vllm_compile_ext.record import recorder
from vllm_compile_ext.standby.client import Asked
from vllm_compile_ext.standby.files import Files
from vllm_compile_ext.zygote import NotForkedError, child, reads
from vllm_compile_ext.zygote.surroundings import read_otherwise


@dataclass
class Held:
    """What a standby knows of its imports.

    facts: what was true before.  files, variables: what they read.
    changes: variables that they set, or removed (None).
    """

    facts: dict[str, Any]
    files: Files
    variables: set[str]
    changes: dict[str, str | None]

    def differs(self, asked: Asked) -> str | None:
        """What the client's imports would have found otherwise; None: they would have led to the same."""
        if differ := [what for what, value in self.facts.items() if asked.facts.get(what) != value]:
            return f"{differ[0]} is another"
        if names := read_otherwise(asked.surroundings.environ, self.variables):
            return f"{', '.join(names)} {'is another' if len(names) == 1 else 'are others'}"
        if any("--help" in argument for argument in asked.program):
            return "it is asked for help, for which imports prepare"
        if not sys.flags.safe_path and (hidden := self.files.hidden_by(asked.path[0])):
            return f"{hidden} would be imported"
        if path := self.files.differs_in(asked.surroundings.folder):
            return f"{path} in {asked.surroundings.folder} is another"
        return None


def become(asked: Asked, files: Sequence[int], connection: Connection, held: Held) -> Callable[[], None]:
    """Become the client's server; returns what it runs, or ends where that is not possible."""
    try:
        _become(asked, files, connection, held)
        connection.send(os.getpid())
        if connection.recv() == "go":
            connection.close()
            return lambda: _run(asked.program)
    except (OSError, EOFError):
        pass  # the client has gone
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(str(error) if isinstance(error, NotForkedError) else harmless.error(error))
    os._exit(0)


def _become(asked: Asked, files: Sequence[int], connection: Connection, held: Held) -> None:
    os.setpgid(0, 0)
    given, first = asked.surroundings, reads.first()
    child.place(files, asked.files, given=True)
    for name, value in held.changes.items():
        if given.environ.get(name) == first.get(name):
            if value is None:
                given.environ.pop(name, None)
            else:
                given.environ[name] = value
    given.give()
    if strange := held.files.follow(given.folder):
        raise NotForkedError(f"{strange} has asked for the working folder, which is another")
    sys.path[:], sys.orig_argv = asked.path, asked.orig_argv
    reads.set_given(asked.files)
    process.current_process().authkey = os.urandom(32)
    finder.STARTED = asked.up
    recorder.stands_in[os.getpid()] = asked.began
    recorder.process_start.cache_clear()
    child.forget("MainProcess")
    reads.go_on()
    _renew_ids()
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(shlex.join(asked.orig_argv))
        setproctitle.setthreadtitle(asked.name)


def _renew_ids() -> None:
    """Of a process, made when their modules are imported: what counts servers would count one."""
    if (usage := sys.modules.get("vllm.usage.usage_lib")) is not None:
        usage.usage_message.uuid = str(uuid.uuid4())
    if (hub := sys.modules.get("transformers.utils.hub")) is not None:
        vars(hub)["SESSION_ID"] = uuid.uuid4().hex


def _run(program: list[str]) -> None:
    """As ``python script ...`` or ``python -m module ...``."""
    if program[0] == "-m":
        sys.argv = program[1:]
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it is imported already
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")
