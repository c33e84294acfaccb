"""Says what a command is doing while vLLM starts, which takes minutes."""

from __future__ import annotations

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


class Progress(progress.Progress):
    """A live line with a clock on a terminal, plain lines elsewhere; with `verbose` vLLM's log itself instead."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        words = progress.TextColumn("{task.description}", markup=False)
        columns = progress.SpinnerColumn(), words, progress.TimeElapsedColumn()
        super().__init__(*columns, console=console, transient=True, disable=verbose or not console.is_terminal)
        self.verbose = verbose
        self._only = self.add_task("")

    def begin(self, title: str, step: str = "importing vLLM") -> None:
        """Begin something whose seconds count from now."""
        self._title, self._step = title, ""
        self.reset(self._only)
        self.step(step)

    def step(self, step: str) -> None:
        """Say what is being done now; the same step again, of another rank, says nothing."""
        if step != self._step:
            self._step = step
            self.update(self._only, description=f"{self._title}: {step}")
            if self.disable:
                self._say(step)

    def listen(self, line: Line) -> None:
        """Take the next line of vLLM's log."""
        if self.verbose:
            self.console.out(line.text, highlight=False)
        for words, step in STEPS.items():
            if words in line.text:
                self.step(step)

    def done(self) -> None:
        """Leave a line behind: it is over."""
        self._say("done")

    def _say(self, what: str) -> None:
        if not self.verbose:
            elapsed = self.tasks[0].elapsed or 0.0
            self.console.print(f"{elapsed:6.1f} s  {self._title}: {what}", markup=False)
