"""``make demo``: the real ``vllm serve`` on one small model, three times: stock, ours cold, ours warm.

Run as ``python -m benchmarks.demo`` in the repository's root.  Everything it makes lies in ``.demo/``.  Exit status 0
when every server started and ours gave the same tokens cold and warm, else 1.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve import Line, Phases, Server, ServerError, tail
from vllm_compile_ext.bench.machine import machine
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
# What the user sees while a line of vLLM's log is the latest of these.
STEPS = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading weights",
    "Warming up model for the compilation": "loading or compiling the model",
    "Warming up done": "making the KV cache",
    "init engine (profile": "starting the HTTP server",
}


@dataclass(frozen=True)
class Run:
    """One of the three starts: its title, the plugin's switch and the folder (in `FOLDER`) of its caches."""

    title: str
    switch: str
    cache: str

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.title.replace(' ', '-')}.log"


RUNS = (Run("stock", "0", "cache-stock"), Run("ours cold", "1", "cache-ours"), Run("ours warm", "1", "cache-ours"))


@dataclass(frozen=True)
class Answer:
    """What one request got: token ids, their log probabilities, and how much likelier each was than the runner-up."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]


@dataclass(frozen=True)
class Result:
    """What one run showed; `first` and `requests` are seconds (the first request, all of them)."""

    run: Run
    phases: Phases
    answers: list[Answer]
    first: float
    requests: float
    plugin: str
    code: str


def make_model(progress: Progress, size: str = SIZE) -> Path:
    """Make the model in a process of its own, so that its memory is free again when the servers run."""
    folder, log = FOLDER / size, FOLDER / f"{size}.log"
    title = f"making {size}: tokenizer and seeded weights"
    progress.task(title)
    call([sys.executable, "-m", "benchmarks.models", size, str(folder)], log)
    progress.done(title)
    return folder


def read_ahead(progress: Progress) -> None:
    """Import vLLM once, unmeasured: else the first run alone would pay for reading its files from the disk."""
    title = "reading vLLM's files once, so that no run pays for a cold disk"
    progress.task(title)
    code = "import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.model_executor.models.llama"
    call([sys.executable, "-c", code], FOLDER / "read-ahead.log", env={"VLLM_COMPILE_EXT": "0"})
    progress.done(title)


def call(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command, its output in `log`, with `env` added to the environment.  Raises `ServerError`."""
    merged = {**os.environ, **(env or {})}
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=merged, check=False)
    if done.returncode:
        raise ServerError(f"{' '.join(command[1:3])} ended with status {done.returncode}", log)


def measure(
    run: Run, number: int, of: int, model: Path, progress: Progress, env: Mapping[str, str] | None = None
) -> Result:
    """Start one server, number `number` of `of`, ask it everything, end it."""
    title = f"[{number}/{of}] {run.title}"

    def listen(line: Line) -> None:
        for mark, step in STEPS.items():
            if mark in line.text:
                progress.step(f"{title}: {step}")

    progress.task(f"{title}: importing vLLM")
    cache, switch = (FOLDER / run.cache).resolve(), {"VLLM_COMPILE_EXT": run.switch}
    with Server(model, run.log, cache, env={**switch, **(env or {})}, args=ARGS, listen=listen) as server:
        server.wait_ready()
        progress.step(f"{title}: answering requests")
        answers, seconds = ask(server)
        progress.step(f"{title}: ending the server")
    progress.done(title)
    return Result(run, server.phases(), answers, seconds[0], sum(seconds), plugin_state(server), code_source(server))


def ask(server: Server) -> tuple[list[Answer], list[float]]:
    """Every request, one after the other: the answers and the seconds that each took."""
    common = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    answers, seconds = [], []
    for prompt in PROMPTS:
        begin = time.monotonic()
        reply = server.post("/v1/completions", common | {"prompt": prompt, "logprobs": 2})
        seconds.append(time.monotonic() - begin)
        answers.append(completion_answer(reply["choices"][0]))
    for question in CHATS:
        begin = time.monotonic()
        messages = [{"role": "user", "content": question}]
        body = common | {"messages": messages, "logprobs": True, "top_logprobs": 2}
        reply = server.post("/v1/chat/completions", body)
        seconds.append(time.monotonic() - begin)
        answers.append(chat_answer(reply["choices"][0]))
    return answers, seconds


def completion_answer(choice: dict[str, Any]) -> Answer:
    logprobs = choice["logprobs"]
    tops = [list(top.values()) for top in logprobs["top_logprobs"]]
    return Answer(choice["token_ids"], logprobs["token_logprobs"], [_lead(top) for top in tops])


def chat_answer(choice: dict[str, Any]) -> Answer:
    content = choice["logprobs"]["content"]
    tops = [[top["logprob"] for top in token["top_logprobs"]] for token in content]
    return Answer(choice["token_ids"], [token["logprob"] for token in content], [_lead(top) for top in tops])


def _lead(logprobs: Sequence[float]) -> float:
    ordered = sorted(logprobs, reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else 0.0  # two tokens of one spelling share an entry


def plugin_state(server: Server) -> str:
    """What the plugin's own line says: "active", "off", or that it is not active."""
    line = server.said("vllm-compile-ext ")
    if line is None:
        return "-"
    return next((state for state in ("not active", "active", "off") if f" is {state}" in line), "-")


def code_source(server: Server) -> str:
    """Whether the model's code was compiled or loaded, by stock's lines or ours; "-" where they say neither."""
    if server.said("Directly load AOT compilation") or server.said("loaded compiled code"):
        return "loaded"
    return "compiled" if server.said("saved AOT compiled function") or server.said("kept as") else "-"


def agreement(answers: Sequence[Answer], reference: Sequence[Answer]) -> str:
    """ "yes", or how many answers agree and how close a call the first token was at which one does not."""
    pairs = list(zip(answers, reference, strict=True))
    parted = [(a, r) for a, r in pairs if a.tokens != r.tokens]
    if not parted:
        return "yes"
    answer, wanted = parted[0]
    step = next(i for i, (a, r) in enumerate(zip(answer.tokens, wanted.tokens, strict=False)) if a != r)
    return f"{len(pairs) - len(parted)} of {len(pairs)} (lead {wanted.leads[step]:.2f})"


def drift(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """The largest difference of a token's log probability, as far as the tokens agree."""
    worst = 0.0
    for answer, wanted in zip(answers, reference, strict=True):
        steps = zip(answer.tokens, wanted.tokens, answer.logprobs, wanted.logprobs, strict=True)
        for token, other, logprob, expected in steps:
            if token != other:
                break
            worst = max(worst, abs(logprob - expected))
    return worst


def table(results: Sequence[Result]) -> Table:
    """The one table: a row for each phase, a column for each run, and ours as a ratio to stock."""
    stock, cold, warm = results
    grid = Table(title=f"vllm serve, {SIZE}: seconds, and ours as a ratio to stock", title_justify="left")
    grid.add_column("")
    for result in results:
        grid.add_column(result.run.title, justify="right")

    def row(name: str, values: Sequence[float | None], *, end: bool = False) -> None:
        grid.add_row(name, *(cell(value, values[0] if i else None) for i, value in enumerate(values)), end_section=end)

    def phase(name: str, field: str, *, end: bool = False) -> None:
        row(name, [getattr(result.phases, field) for result in results], end=end)

    phase("imports and configuration", "imports")
    phase("engine start", "engine")
    phase("weights (vLLM's figure)", "weights")
    phase("compile or load, and first pass", "first_run")
    phase("  torch.compile (vLLM's figure)", "compile")
    phase("KV cache and warm-up", "kv_cache")
    phase("HTTP server", "front_end")
    phase("time to ready", "ready", end=True)
    row(f"first request, {TOKENS} tokens", [result.first for result in results])
    row(f"all {len(PROMPTS) + len(CHATS)} requests", [result.requests for result in results], end=True)
    grid.add_row("plugin", *(result.plugin for result in results))
    grid.add_row("the model's code was", *(result.code for result in results))
    grid.add_row("tokens as stock", "", *(agreement(result.answers, stock.answers) for result in (cold, warm)))
    grid.add_row("largest |d logprob| to stock", "", *(f"{drift(r.answers, stock.answers):.4f}" for r in (cold, warm)))
    grid.add_row("tokens warm as cold", "", "", agreement(warm.answers, cold.answers))
    grid.caption = machine()
    grid.caption_justify = "left"
    return grid


def cell(value: float | None, stock: float | None = None) -> str:
    """Seconds with the ratio to `stock`; "-" for what was not measured."""
    if value is None:
        return "-"
    if not stock or stock < 0.1:  # a ratio of hundredths of a second says nothing
        return f"{value:.2f}"
    return f"{value:.2f} ({value / stock:.2f}x)"


def prepare() -> None:
    """An empty `FOLDER`: every demo starts cold."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()


def verdict(results: Sequence[Result], console: Console) -> int:
    """Say what the table means; the exit status."""
    stock, cold, warm = results
    if agreement(cold.answers, stock.answers) != "yes":
        console.print(
            "Stock compiles the whole model into one graph, ours in pieces: bf16 rounds differently in the two, and a "
            "token changes where two candidates are nearly equal (lead: how far stock's choice was ahead, in log "
            "probability)."
        )
    if any(result.plugin != "active" for result in (cold, warm)):
        console.print(f"The plugin was not active: see {cold.run.log} and {warm.run.log}", style="red")
        return 1
    if agreement(warm.answers, cold.answers) != "yes":
        console.print("Ours gave other tokens warm than cold: that is a bug, please report it.", style="red")
        return 1
    console.print(f"The servers' logs are {', '.join(str(run.log) for run in RUNS)}")
    return 0


def report(error: ServerError, console: Console) -> None:
    """The error, the end of the log that belongs to it, and where the rest is."""
    console.print(f"error: {error}", style="red", markup=False)
    console.print(f"the end of {error.log}:", markup=False)
    console.print(tail(error.log), markup=False, highlight=False, soft_wrap=True)
    console.print(f"the whole log: {error.log.resolve()}", markup=False, soft_wrap=True)


def main() -> int:
    # A terminated or hung-up demo takes its server along, as one that is interrupted does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    console = Console() if sys.stdout.isatty() else Console(width=100)
    begin = time.monotonic()
    prepare()
    console.print(f"Three starts of vllm serve, logs in {FOLDER}/. This takes 2 to 8 minutes.", markup=False)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"The machine is busy (load {load:.1f}, 1 minute): the figures will be noisy.", style="yellow")
    try:
        with Progress(console) as progress:
            model = make_model(progress)
            read_ahead(progress)
            results = [measure(run, number, len(RUNS), model, progress) for number, run in enumerate(RUNS, 1)]
    except ServerError as error:
        report(error, console)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the server was ended", style="red")
        return 130
    console.print(table(results))
    console.print(f"{time.monotonic() - begin:.0f} s in all.")
    return verdict(results, console)


if __name__ == "__main__":
    sys.exit(main())
