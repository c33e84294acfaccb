"""Many starts from one process: vLLM is imported once, and each start is a fork of it.

`prepare` and `Fork` are for processes of `tests/process.py`, after the plugin is loaded.  No thread pool may have run
before the first fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What `prepare` replaced by its uncompiled form.
COMPILED: dict[str, Any] = {}


def prepare() -> None:
    """Import what an engine of a Llama needs, and let forks inherit what would take each of them seconds."""
    import torch._inductor.compile_fx  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from torch._inductor import codecache
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from vllm.model_executor.models import registry
    from vllm.v1.sample import sampler

    # Inductor compiles and loads a library for each set of instructions, and keeps what it found.  The same goes for
    # the header that it compiles first, for kernels with vectors and without.
    pick_vec_isa()
    for code in ("", "at::vec::"):
        codecache.CppPythonBindingsCodeCache.load_async(code, device_type="cpu")
    # vLLM has the model's class looked at in a Python of its own where its cache knows nothing of it.
    registry._run_in_subprocess = lambda function: function()
    # Compiled by the first request for logprobs.
    COMPILED["batched_count_greater_than"] = compiled = sampler.batched_count_greater_than
    sampler.batched_count_greater_than = compiled._torchdynamo_orig_callable


@dataclass(frozen=True)
class Ended:
    """status: as of a process, negative for a signal.  value: what the function returned, None if it did not end."""

    status: int
    value: Any
    output: str

    def lines(self, *words: str) -> list[str]:
        """The printed lines that contain all of `words`."""
        return [line for line in self.output.splitlines() if all(word in line for word in words)]

    def warnings(self) -> list[str]:
        """What it warned of that has to do with compiled code or the store."""
        return [line for line in self.lines("WARNING") if "compil" in line or "store" in line]

    def counts(self) -> list[int]:
        """Of a start by `toys.start` that gave the right answer: models loaded, pieces compiled, models kept."""
        assert self.status == 0, self.output[-3000:]
        off, *counts = self.value
        assert off <= 1e-5
        return counts


class Fork:
    """A running start: `function()` in a process of its own, in a process group of its own."""

    _count = 0

    def __init__(self, function: Callable[[], Any]) -> None:
        Fork._count += 1
        self.result, self.output = (Path(f"fork{Fork._count}.{kind}").absolute() for kind in ("json", "txt"))
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setpgid(0, 0)
            handle = os.open(self.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            self.result.write_text(json.dumps(function()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """As if the machine had lost power: the process and the compilers it started."""
        for kill, target in ((os.killpg, self.pid), (os.kill, self.pid)):
            with suppress(ProcessLookupError):
                kill(target, signal.SIGKILL)

    def end(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        value = json.loads(self.result.read_text()) if self.result.exists() else None
        return Ended(os.waitstatus_to_exitcode(status), value, self.output.read_text(errors="replace"))


def run(function: Callable[[], Any]) -> Ended:
    return Fork(function).end()
