"""Tokens/s of two servers that are there at once and are asked in turns, while the other is stopped.

A server's tokens/s differ by up to 1.4 times from one minute to the next on two cores; what the machine does meanwhile,
the two share.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import demo
from benchmarks.serve import Server
from vllm_compile_ext.cli.progress import Progress

REQUESTS, TOKENS, ROUNDS = 8, 128, 24  # at a time; of each; of each server


@dataclass(frozen=True)
class Speeds:
    """Tokens/s of each round, of the one and the other."""

    one: list[float]
    other: list[float]

    @property
    def ratios(self) -> list[float]:
        return [other / one for one, other in zip(self.one, self.other, strict=True)]

    def cells(self) -> tuple[str, str, str]:
        """Median tokens/s of each, and of the ratio the median and the range in which half of all rounds are."""
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        one, other = statistics.median(self.one), statistics.median(self.other)
        return f"{one:.0f}", f"{other:.0f}", f"{middle:.3f}x ({low:.2f} to {high:.2f})"


def compare(model: Path, runs: Sequence[demo.Run], progress: Progress, number: str) -> Speeds:
    """Start both servers of `runs` on caches that hold their code, and ask them.  Raises `ProgramError`."""
    rates: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        servers = []
        for run in runs:
            progress.begin(f"[{number}] {run.title}, beside the other")
            server = stack.enter_context(demo.serving(run, model, progress))
            server.wait_ready()
            rate(server)  # on GPUs the first round captures graphs
            servers.append(server)
            server.signal(signal.SIGSTOP)
            progress.done()
        progress.begin(f"[{number}] both in turns", f"{ROUNDS} rounds")
        for round_ in range(ROUNDS):
            for side in (0, 1) if round_ % 2 else (1, 0):
                servers[side].signal(signal.SIGCONT)
                rates[side].append(rate(servers[side]))
                servers[side].signal(signal.SIGSTOP)
        for server in servers:
            server.signal(signal.SIGCONT)
        progress.done()
    return Speeds(*rates)


def rate(server: Server) -> float:
    """Tokens/s of `REQUESTS` greedy requests at a time."""
    body = {"prompt": demo.PROMPTS[0], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    with ThreadPoolExecutor(REQUESTS) as pool:
        begin = time.monotonic()
        answers = list(pool.map(lambda _: server.post("/v1/completions", body), range(REQUESTS)))
        return sum(int(each["usage"]["completion_tokens"]) for each in answers) / (time.monotonic() - begin)
