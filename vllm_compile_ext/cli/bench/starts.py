"""The starts that are measured: in which order, with which caches, and the figures of each.

A round is one start of every kind, stock and ours in turn; who is first changes from round to round, so that a machine
that slows down or warms up does so for both.  Each side of a round begins with a cache root, an Inductor folder and a
home folder that are new and empty: its first start is cold, and what it leaves is what the next ones find.
"""

from __future__ import annotations

import json
import os
import site
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_compile_ext import temporary
from vllm_compile_ext.cli.bench.server import Server, alias_metadata
from vllm_compile_ext.cli.program import Line, Program
from vllm_compile_ext.store import kernels

KINDS = ("cold", "warm", "eager")
SIDES = ("stock", "ours")

# What a caller may have set for the caches that are to be empty, and what switches the plugin.
_DROPPED = (
    *("VLLM_CACHE_ROOT", "VLLM_COMPILE_EXT", "VLLM_COMPILE_STORE", "VLLM_DISABLE_COMPILE_CACHE", "XDG_CACHE_HOME"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FORCE_DISABLE_CACHES", temporary.RUN, kernels.MARK),
    *(name for cache in kernels.CACHES for name in (cache.variable, *cache.also)),
)


# Seconds that are measured of a start, by their names in JSON: the titles of docs/bench.md, which says what they are.
SERVE = {
    "ready": "ready",
    "init": "engine init",
    "first_run": "compile and first pass",
    "compile": "torch.compile",
}
ENGINE = {"startup": "engine start", "compile": "torch.compile"}


@dataclass
class Start:
    """One start of a kind and a side, and its figures by name; one that the log does not tell is missing."""

    round: int
    kind: str
    side: str
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def caches(self) -> str:
        """Name of the folder of its caches."""
        return f"{self.round}-{self.side}"


def order(rounds: int, kinds: Sequence[str]) -> list[Start]:
    """All starts, without figures yet."""
    turns = (SIDES, SIDES[::-1])
    return [Start(n, kind, side) for n in range(1, rounds + 1) for kind in kinds for side in turns[(n - 1) % 2]]


def environment(root: Path, side: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` with all caches below `root`, but for downloaded models; the user's other settings stay."""
    home = root / "home"
    for folder in (root / "vllm", root / "inductor", home):
        folder.mkdir(parents=True, exist_ok=True)
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "~"), ".cache")  # noqa: PTH118
    paths = [alias_metadata(root / "metadata"), environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in environ.items() if name not in _DROPPED}
    return {
        "HF_HOME": os.path.expanduser(os.path.join(cache, "huggingface")),  # noqa: PTH111, PTH118
        "PYTHONUSERBASE": site.getuserbase(),
        **kept,
        "HOME": str(home),
        "VLLM_CACHE_ROOT": str(root / "vllm"),
        "VLLM_COMPILE_STANDBY": os.devnull,  # no start is another one's fork
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "VLLM_COMPILE_EXT": "0" if side == "stock" else "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def serve(
    arguments: Sequence[str], env: Mapping[str, str], limit: float, listen: Callable[[Line], None]
) -> dict[str, float]:
    """The figures of one start of ``vllm serve ARGUMENTS``, which may take `limit` seconds.  Raises `ProgramError`."""
    with Server(arguments, env, listen=listen) as server:
        server.wait_ready(limit)
        found = server.phases()
    return found | ({"compile": found["load"]} if "load" in found else {})


def engine(
    arguments: Sequence[str], env: Mapping[str, str], limit: float, listen: Callable[[Line], None]
) -> dict[str, float]:
    """The same of a start of the engine alone, with the options of ``vllm serve``."""
    out = Path(env["VLLM_CACHE_ROOT"]) / "engine.json"
    command = [sys.executable, "-m", "vllm_compile_ext.cli.bench.engine_start", str(out), *arguments]
    with Program(command, env, listen=listen) as program:
        status = program.wait(limit)
    if status:
        raise program.error(f"the engine did not start (exit status {status})")
    said = json.loads(out.read_text())
    compiling = said["compilation_time"] + said.get("encoder_compilation_time", 0.0)
    return {"startup": said["total_startup_time"]} | ({"compile": compiling} if compiling else {})
