"""Says what a command is doing while vLLM starts, which takes minutes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

from vllm_compile_ext.cli.program import Line

# What a start is doing once its log has a line with these words.
STEPS = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading the model",
    "Warming up model for the compilation": "compiling or loading",
    "Starting torch.compile": "compiling",
    "loaded compiled code": "loaded; warming up",
    "kept as": "kept; warming up",
    "Capturing CUDA graphs": "capturing CUDA graphs",
    "init engine (profile": "the engine is ready",
}


class Progress:
    """A live line with a clock on a terminal, plain lines elsewhere; with `verbose` vLLM's log itself instead."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console, self._verbose = console, verbose
        columns = progress.SpinnerColumn(), progress.TextColumn("{task.description}", markup=False)
        clock = progress.TimeElapsedColumn()
        self._live = progress.Progress(
            *columns, clock, console=console, transient=True, disable=verbose or not console.is_terminal
        )
        self._task = self._live.add_task("")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def task(self, title: str, step: str = "importing vLLM") -> None:
        """Begin something whose seconds count from now."""
        self._title, self._step = title, ""
        self._live.reset(self._task)
        self.step(step)

    def step(self, step: str) -> None:
        """Say what the task is doing now; the same step again, of another rank, says nothing."""
        if step != self._step:
            self._step = step
            self._live.update(self._task, description=f"{self._title}: {step}")
            if self._live.disable:
                self._print(step)

    def listen(self, line: Line) -> None:
        """Take the next line of vLLM's log."""
        if self._verbose:
            self._console.out(line.text, highlight=False)
        for words, step in STEPS.items():
            if words in line.text:
                self.step(step)

    def done(self) -> None:
        """Leave a line behind: the task is over."""
        self._print("done")

    def _print(self, what: str) -> None:
        if not self._verbose:
            elapsed = self._live.tasks[0].elapsed or 0.0
            self._console.print(f"{elapsed:6.1f} s  {self._title}: {what}", markup=False)
