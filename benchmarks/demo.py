"""``make demo``: the real ``vllm serve`` on one small model, three times: stock, ours cold, ours warm.

Run as ``python -m benchmarks.demo`` in the repository's root.  Everything it makes lies in ``.demo/``.  Exit status 0
when every server started and ours gave the same tokens cold and warm, else 1.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve import Server
from vllm_compile_ext.cli.bench.figures import machine
from vllm_compile_ext.cli.program import Program, ProgramError, excerpt, interruptible
from vllm_compile_ext.cli.progress import Progress

FOLDER = Path(".demo")
SIZE = "llama16"
# What users run; the model's own choice of type ("auto") would follow however its files happen to be stored.
ARGS = ("--dtype", "bfloat16", "--max-num-batched-tokens", "512", "--max-model-len", "512")
TOKENS = 32  # generated for each request
PROMPTS = (
    "Hello world, this is",
    "def f(x):",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "import os\nimport sys\n",
)
CHATS = ("What does a list hold?", "Name three statements that end a loop.")
# Rows of the table, and the phases of `Server.phases` that they show.
ROWS = {
    "imports and configuration": "imports",
    "engine start": "engine",
    "weights (vLLM's figure)": "weights",
    "compile or load, and first pass": "first_run",
    "  torch.compile (vLLM's figure)": "compile",
    "KV cache and warm-up": "kv_cache",
    "HTTP server": "front_end",
    "time to ready": "ready",
}


@dataclass(frozen=True)
class Run:
    """One start: its title, the plugin's switch, the folder (in `FOLDER`) of its caches, more options and variables."""

    title: str
    switch: str
    cache: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.title.replace(' ', '-')}.log"


RUNS = (Run("stock", "0", "cache-stock"), Run("ours cold", "1", "cache-ours"), Run("ours warm", "1", "cache-ours"))


@dataclass(frozen=True)
class Result:
    """What one run showed.

    answers: token ids of each request.  first, requests: seconds of the first request and of all.  plugin: "active",
    "not active" or "off", by the plugin's own line.  code: whether the model's was "compiled" or "loaded", by stock's
    lines or ours; "-" where no line says.
    """

    run: Run
    phases: dict[str, float]
    answers: list[list[int]]
    first: float
    requests: float
    plugin: str
    code: str


@contextmanager
def running(folder: Path, console: Console) -> Iterator[Progress]:
    """An empty `FOLDER`, in which every start is cold, and its progress; an error ends with the log, status 1."""
    global FOLDER
    FOLDER = folder
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with interruptible():
        try:
            with Progress(console) as progress:
                yield progress
        except ProgramError as error:
            console.print("\n".join([*excerpt(error.lines), f"error: {error}"]), markup=False, soft_wrap=True)
            console.print(f"the whole log is in {FOLDER.resolve()}", markup=False, soft_wrap=True)
            sys.exit(1)


def call(progress: Progress, title: str, command: Sequence[str], log: str, **env: str) -> None:
    """Run a command to its end, its output in the file `log`.  Raises `ProgramError`."""
    progress.begin(title, "running")
    with Program(command, os.environ | env, log=FOLDER / log) as program:
        if status := program.wait():
            raise program.error(f"{' '.join(command[1:3])} ended with status {status}")
    progress.done()


def make_model(progress: Progress, size: str = SIZE) -> Path:
    """Make the model in a process of its own, so that its memory is free again when the servers run."""
    command = [sys.executable, "-m", "benchmarks.models", size, str(FOLDER / size)]
    call(progress, f"making {size}: tokenizer and seeded weights", command, f"{size}.log")
    return FOLDER / size


def read_ahead(progress: Progress) -> None:
    """Import vLLM once, unmeasured: else the first run alone would pay for reading its files from the disk."""
    code = "import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.model_executor.models.llama"
    title = "reading vLLM's files once, so that no run pays for a cold disk"
    call(progress, title, [sys.executable, "-c", code], "read-ahead.log", VLLM_COMPILE_EXT="0")


def measure(
    run: Run,
    number: str,
    model: Path,
    progress: Progress,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Start one server, ask it everything, end it.  Raises `ProgramError`."""
    progress.begin(f"[{number}] {run.title}")
    with serving(run, model, progress, env) as server:
        server.wait_ready()
        progress.step("answering requests")
        answers, seconds = ask(server)
        progress.step("ending the server")
    progress.done()
    line = server.said("vllm-compile-ext ") or ""
    plugin = next((state for state in ("not active", "active", "off") if f" is {state}" in line), "-")
    loaded = server.said("Directly load AOT compilation") or server.said("loaded compiled code")
    compiled = server.said("saved AOT compiled function") or server.said("kept as")
    code = "loaded" if loaded else "compiled" if compiled else "-"
    return Result(run, server.phases(), answers, seconds[0], sum(seconds), plugin, code)


def serving(run: Run, model: Path, progress: Progress, env: Mapping[str, str] | None = None) -> Server:
    """The server of `run`, not started yet; `env` are more variables."""
    own = {"VLLM_COMPILE_EXT": run.switch} | dict(env or {}) | dict(run.env)
    cache = (FOLDER / run.cache).resolve()
    return Server(model, run.log, cache, env=own, args=(*ARGS, *run.args), listen=progress.listen)


def ask(server: Server) -> tuple[list[list[int]], list[float]]:
    """Send every request, one after the other; returns the token ids of the answers, and the seconds of each."""
    common = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    bodies: list[tuple[str, dict[str, Any]]] = [("/v1/completions", {"prompt": prompt}) for prompt in PROMPTS]
    for question in CHATS:
        bodies.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": question}]}))
    answers, seconds = [], []
    for path, body in bodies:
        begin = time.monotonic()
        choice = server.post(path, common | body)["choices"][0]
        seconds.append(time.monotonic() - begin)
        answers.append(choice["token_ids"])
    return answers, seconds


def agreement(answers: Sequence[list[int]], reference: Sequence[list[int]]) -> str:
    """ "yes", or how many answers agree."""
    same = sum(a == b for a, b in zip(answers, reference, strict=True))
    return "yes" if same == len(reference) else f"{same} of {len(reference)}"


def table(results: Sequence[Result]) -> Table:
    """The one table: a row for each phase, a column for each run, and ours as a ratio to stock."""
    stock, cold, warm = results
    title = f"vllm serve, {SIZE}: seconds, and ours as a ratio to stock"
    grid = Table(title=title, title_justify="left", caption=machine(), caption_justify="left")
    grid.add_column("")
    for result in results:
        grid.add_column(result.run.title, justify="right")

    def row(name: str, values: Sequence[float | None]) -> None:
        grid.add_row(name, *(cell(value, values[0] if i else None) for i, value in enumerate(values)))

    for name, phase in ROWS.items():
        row(name, [result.phases.get(phase) for result in results])
    grid.add_section()
    row(f"first request, {TOKENS} tokens", [result.first for result in results])
    row(f"all {len(PROMPTS) + len(CHATS)} requests", [result.requests for result in results])
    grid.add_section()
    grid.add_row("plugin", *(result.plugin for result in results))
    grid.add_row("the model's code was", *(result.code for result in results))
    grid.add_row("tokens as stock", "", *(agreement(result.answers, stock.answers) for result in (cold, warm)))
    grid.add_row("tokens warm as cold", "", "", agreement(warm.answers, cold.answers))
    return grid


def cell(value: float | None, stock: float | None = None) -> str:
    """Seconds with the ratio to `stock`; "-" for what was not measured."""
    if value is None:
        return "-"
    if not stock or stock < 0.1:  # a ratio of hundredths of a second says nothing
        return f"{value:.2f}"
    return f"{value:.2f} ({value / stock:.2f}x)"


def verdict(results: Sequence[Result], console: Console) -> int:
    """Say what the table means; returns the exit status."""
    stock, cold, warm = results
    if agreement(cold.answers, stock.answers) != "yes":
        console.print(
            "Stock compiles the whole model into one graph, ours in pieces: bf16 rounds differently in the two, and a "
            "token changes where two candidates are nearly equal."
        )
    if any(result.plugin != "active" for result in (cold, warm)):
        console.print(f"The plugin was not active: see {cold.run.log} and {warm.run.log}", style="red")
        return 1
    if agreement(warm.answers, cold.answers) != "yes":
        console.print("Ours gave other tokens warm than cold: that is a bug, please report it.", style="red")
        return 1
    console.print(f"The servers' logs are {', '.join(str(run.log) for run in RUNS)}")
    return 0


def main() -> int:
    console = Console() if sys.stdout.isatty() else Console(width=100)
    begin = time.monotonic()
    console.print(f"Three starts of vllm serve, logs in {FOLDER}/. This takes 2 to 8 minutes.", markup=False)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"The machine is busy (load {load:.1f}, 1 minute): the figures will be noisy.", style="yellow")
    with running(FOLDER, console) as progress:
        model = make_model(progress)
        read_ahead(progress)
        results = [measure(run, f"{n}/{len(RUNS)}", model, progress) for n, run in enumerate(RUNS, 1)]
    console.print(table(results))
    console.print(f"{time.monotonic() - begin:.0f} s in all.")
    return verdict(results, console)


if __name__ == "__main__":
    sys.exit(main())
