"""Run Python in a fresh process: what the plugin does to a process can only be seen from its beginning.

Where the beginning does not matter, a fork of a process that has imported vLLM (`tests/parent.py`) saves 10 to 20 s.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forks import Ended

ROOT = Path(__file__).parent.parent
BASE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
# A machine without FlashInfer has to say so, also to the processes of tests.
KEPT = ("VLLM_USE_FLASHINFER_SAMPLER",)
PRELUDE = """
import json, sys
def report(value):
    json.dump(value, open("report.json", "w"), default=vars)
"""


@dataclass(frozen=True)
class Outcome:
    """What a process left: exit status, everything it printed, and the value it reported (see `run`)."""

    code: int
    output: str
    value: Any

    def lines(self, *words: str) -> list[str]:
        """The printed lines that contain all of `words`."""
        return [line for line in self.output.splitlines() if all(word in line for word in words)]


def environment(**env: str | None) -> dict[str, str]:
    """This process's environment without any VLLM_* variable, with `BASE` and `env`; None unsets."""
    merged = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") or k in KEPT} | BASE | env
    return {k: v for k, v in merged.items() if v is not None}


class Parent:
    """The process of `tests/parent.py`, which ends with this one."""

    def __init__(self, *, plugin: bool) -> None:
        self._folder = tempfile.TemporaryDirectory()
        command, pipe = [sys.executable, "-m", "tests.parent", *["plugin"] * plugin], subprocess.PIPE
        env = environment(VLLM_CACHE_ROOT=self._folder.name)
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def ask(self, request: dict[str, Any] | int) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


parent = functools.cache(Parent)


class ForkedProgram:
    """A program in a fork of a parent; what tests use of `subprocess.Popen`."""

    def __init__(self, parent: Parent, folder: Path, args: tuple[str, ...], env: dict[str, str]) -> None:
        self.parent = parent
        self.pid = parent.ask({"folder": str(folder), "args": args, "env": env})

    def wait(self) -> int:
        ended = os.pidfd_open(self.pid)
        try:
            select.select([ended], [], [])  # a test that takes too long ends here, with nothing asked of the parent
        finally:
            os.close(ended)
        return self.parent.ask(self.pid)


Started = subprocess.Popen[bytes] | ForkedProgram


def start(code: str, folder: Path, *args: str, fork: bool = False, plugin: bool = True, **env: str | None) -> Started:
    """Start `code` in `folder`; it calls ``report(value)`` with something that JSON can hold, or `Ended`.

    fork: in a fork of a process that has vLLM imported and, unless `plugin` is False, the plugin loaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    (folder / "main.py").write_text(PRELUDE + textwrap.dedent(code))
    with (folder / "output.txt").open("w") as output:
        if fork:
            return ForkedProgram(parent(plugin=plugin), folder, args, environment(**env))
        command, both = [sys.executable, "main.py", *args], {"stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=folder, env=environment(**env), **both)  # type: ignore[call-overload]


def finish(process: Started, folder: Path) -> Outcome:
    """Wait for a process of `start`."""
    code = process.wait()
    report = folder / "report.json"
    value = json.loads(report.read_text(), object_hook=_restore) if report.exists() else None
    return Outcome(code, (folder / "output.txt").read_text(), value)


def _restore(found: dict[str, Any]) -> Any:
    return Ended(**found) if found.keys() == {"status", "value", "output"} else found


def run(
    code: str, *args: str, folder: Path | None = None, fork: bool = False, plugin: bool = True, **env: str | None
) -> Outcome:
    """`start` and `finish`, in a temporary folder unless `folder` is given."""
    with tempfile.TemporaryDirectory() as name:
        folder = folder or Path(name)
        return finish(start(code, folder, *args, fork=fork, plugin=plugin, **env), folder)
