"""The starts that are measured: in which order, with which caches, and the figures of each.

A round is one start of every kind, stock and ours in turn; who is first changes from round to round, so that a machine
that slows down or warms up does so for both.  Each side of a round begins with a cache root, an Inductor folder and a
home folder that are new and empty: its first start is cold, and what it leaves is what the next ones find.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vllm_compile_ext import jit_caches, run_folder
from vllm_compile_ext.bench.server import Line, Program, Server, ServerError, alias_metadata

Kind = Literal["cold", "warm", "eager"]
Side = Literal["stock", "ours"]
KINDS: tuple[Kind, ...] = ("cold", "warm", "eager")
SIDES: tuple[Side, ...] = ("stock", "ours")
EAGER = "--enforce-eager"

# What a caller may have set for the caches that are to be empty, and what switches the plugin.
_DROPPED = (
    *("VLLM_CACHE_ROOT", "VLLM_COMPILE_EXT", "VLLM_COMPILE_STORE", "VLLM_DISABLE_COMPILE_CACHE", "XDG_CACHE_HOME"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FORCE_DISABLE_CACHES", run_folder.VARIABLE, jit_caches.MARK),
    *(name for cache in jit_caches.CACHES for name in (cache.variable, *cache.also)),
)


@dataclass(frozen=True)
class Figure:
    """One thing that is measured of each start, in seconds: its name in JSON, its title, and what it is."""

    name: str
    title: str
    meaning: str


SERVE = (
    Figure("ready", "ready", "from the start of `vllm serve` until /health answers"),
    Figure("init", "engine init", "vLLM's figure: profiling, KV cache, compiling and capturing"),
    Figure("first_run", "compile and first pass", "from vLLM's line before compiling to the one after the first pass"),
    Figure("compile", "torch.compile", "vLLM's figure for compiling, or for loading what is compiled"),
)
ENGINE = (
    Figure("startup", "engine start", "vllm bench startup: making `vllm.LLM`, imports not included"),
    Figure("compile", "torch.compile", "vllm bench startup: compiling, or loading what is compiled"),
)


@dataclass(frozen=True)
class Start:
    """One start that was measured; a figure that the log does not tell is missing."""

    round: int
    kind: Kind
    side: Side
    figures: dict[str, float] = field(default_factory=dict)


def order(rounds: int, kinds: Sequence[Kind]) -> list[Start]:
    """All starts, yet without figures."""
    wanted = [kind for kind in KINDS if kind in kinds]
    turns = (SIDES, SIDES[::-1])
    return [Start(n, kind, side) for n in range(1, rounds + 1) for kind in wanted for side in turns[(n - 1) % 2]]


def environment(root: Path, side: Side, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` with all caches below `root`, but for downloaded models; the user's other settings stay."""
    home = root / "home"
    for folder in (root / "vllm", root / "inductor", home):
        folder.mkdir(parents=True, exist_ok=True)
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "~"), ".cache")  # noqa: PTH118
    alias = alias_metadata(root / "metadata")
    paths = [str(alias) if alias else "", environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in environ.items() if name not in _DROPPED}
    return {
        "HF_HOME": os.path.expanduser(os.path.join(cache, "huggingface")),  # noqa: PTH111, PTH118
        "PYTHONUSERBASE": site.getuserbase(),
        **kept,
        "HOME": str(home),
        "VLLM_CACHE_ROOT": str(root / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "VLLM_COMPILE_EXT": "0" if side == "stock" else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


@dataclass
class Bench:
    """Measures starts of ``vllm serve ARGUMENTS`` in `folder`, or, with `engine`, of the engine alone.

    timeout: seconds that one start may take.  listen: called with each line of the running start's log.
    """

    arguments: Sequence[str]
    folder: Path
    engine: bool = False
    timeout: float = 1800.0
    listen: Callable[[Line], None] | None = None

    @property
    def figures(self) -> tuple[Figure, ...]:
        return ENGINE if self.engine else SERVE

    def prepare(self) -> None:
        """An eager start that is not measured: it downloads and reads all files once.  Raises `ServerError`."""
        self._start(Start(0, "eager", "stock"))
        self.clean(Start(0, "eager", "stock"))

    def measure(self, start: Start) -> Start:
        """`start` with its figures.  Raises `ServerError`."""
        return Start(start.round, start.kind, start.side, self._start(start))

    def clean(self, start: Start) -> None:
        """Remove the caches that `start` used."""
        shutil.rmtree(self._root(start), ignore_errors=True)

    def _root(self, start: Start) -> Path:
        return self.folder / f"{start.round}-{start.side}"

    def _start(self, start: Start) -> dict[str, float]:
        root = self._root(start)
        env = environment(root, start.side)
        arguments = [*self.arguments, EAGER] if start.kind == "eager" else self.arguments
        log = self.folder / f"{start.round}-{start.side}-{start.kind}.log"
        return self._engine(arguments, log, env) if self.engine else self._serve(arguments, log, env)

    def _serve(self, arguments: Sequence[str], log: Path, env: Mapping[str, str]) -> dict[str, float]:
        with Server(arguments, log, env, listen=self.listen) as server:
            server.wait_ready(self.timeout)
            phases = vars(server.phases())
        found = {figure.name: phases[figure.name] for figure in SERVE}
        if phases["load"] is not None:
            found["compile"] = phases["load"]  # the same, with more digits
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    def _engine(self, arguments: Sequence[str], log: Path, env: Mapping[str, str]) -> dict[str, float]:
        out = log.with_suffix(".json")
        command = [sys.executable, "-m", "vllm_compile_ext.bench.engine_start", str(out), *arguments]
        with Program(command, log, env, listen=self.listen) as program:
            status = program.wait(self.timeout)
        if status or not out.exists():
            raise ServerError(f"the engine did not start (exit status {status})", log)
        said = json.loads(out.read_text())
        compiling = said["compilation_time"] + said.get("encoder_compilation_time", 0.0)
        found = {"startup": said["total_startup_time"], "compile": compiling}
        return {name: round(value, 4) for name, value in found.items() if value}  # nothing compiles in an eager one
