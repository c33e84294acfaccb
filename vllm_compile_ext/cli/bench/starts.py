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

from vllm_compile_ext import temporary
from vllm_compile_ext.cli.bench.server import Server, alias_metadata
from vllm_compile_ext.cli.program import Line, Program
from vllm_compile_ext.store import kernels

Kind = Literal["cold", "warm", "eager"]
Side = Literal["stock", "ours"]
KINDS: tuple[Kind, ...] = ("cold", "warm", "eager")
SIDES: tuple[Side, ...] = ("stock", "ours")

# What a caller may have set for the caches that are to be empty, and what switches the plugin.
_DROPPED = (
    *("VLLM_CACHE_ROOT", "VLLM_COMPILE_EXT", "VLLM_COMPILE_STORE", "VLLM_DISABLE_COMPILE_CACHE", "XDG_CACHE_HOME"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FORCE_DISABLE_CACHES", temporary.RUN, kernels.MARK),
    *(name for cache in kernels.CACHES for name in (cache.variable, *cache.also)),
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
    """One start and its figures; one that the log does not tell is missing."""

    round: int
    kind: Kind
    side: Side
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def caches(self) -> str:
        """Name of the folder of its caches."""
        return f"{self.round}-{self.side}"


def order(rounds: int, kinds: Sequence[Kind]) -> list[Start]:
    """All starts, without figures yet."""
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
    """Measures starts of ``vllm serve ARGUMENTS`` with caches in `folder`, or, with `engine`, of the engine alone.

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

    def measure(self, start: Start) -> Start:
        """`start` with its figures.  Raises `ProgramError`."""
        env = environment(self.folder / start.caches, start.side)
        arguments = [*self.arguments, "--enforce-eager"] if start.kind == "eager" else self.arguments
        found = (self._engine if self.engine else self._serve)(arguments, env)
        figures = {figure.name: round(found[figure.name], 4) for figure in self.figures if figure.name in found}
        return Start(start.round, start.kind, start.side, figures)

    def clean(self, start: Start) -> None:
        """Remove the caches that `start` used."""
        shutil.rmtree(self.folder / start.caches, ignore_errors=True)

    def _serve(self, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, float]:
        with Server(arguments, env, listen=self.listen) as server:
            server.wait_ready(self.timeout)
            found = server.phases()
        return found | ({"compile": found["load"]} if "load" in found else {})

    def _engine(self, arguments: Sequence[str], env: Mapping[str, str]) -> dict[str, float]:
        out = self.folder / "engine.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "vllm_compile_ext.cli.bench.engine_start", str(out), *arguments]
        with Program(command, env, listen=self.listen) as program:
            status = program.wait(self.timeout)
        if status or not out.exists():
            raise program.error(f"the engine did not start (exit status {status})")
        said = json.loads(out.read_text())
        compiling = said["compilation_time"] + said.get("encoder_compilation_time", 0.0)
        return {"startup": said["total_startup_time"]} | ({"compile": compiling} if compiling else {})
