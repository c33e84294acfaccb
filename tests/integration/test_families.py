"""Many architectures: traced once a kind of layer, they answer as when every layer is traced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import engine, process
from tests.families import FAMILIES

pytestmark = pytest.mark.engine


# Layers that were traced, and that were copied.  The first decoder layer is called without a residual.
FIGURES = {
    "llama": (2, 4),
    "llama of 1 layer": (0, 0),
    "llama of 2 layers": (0, 0),
    "qwen3": (2, 3),
    "gemma3": (2, 4),
    "mixtral": (2, 3),
    "opt": (1, 4),
    "bert": (1, 4),
    "qwen3next": (5, 3),
    "deepseek": (2, 3),
    "granite": (2, 3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers_as_a_full_trace(name: str, tmp_path: Path) -> None:
    # vLLM's kernels for linear attention on CPU take bfloat16 only.
    options = {"bert": {"embeds": True}, "qwen3next": {"dtype": "bfloat16"}}
    assert compare(name, tmp_path, options.get(name, {}), fork=True) == FIGURES[name]


def compare(name: str, folder: Path, options: dict[str, Any], *, fork: bool = False) -> tuple[int, int]:
    """Start one family traced in full, once, and warm from another folder, and compare.

    Returns how many layers were traced, and copied.  fork: both cold starts at once, on two cores; on a GPU each would
    take the other's memory for its own.
    """
    model = FAMILIES[name](folder / "model")

    def begin(which: str) -> process.Started:
        asked = options | {"upstream": which == "full"}
        return engine.begin(model, folder / which / "root", folder / which / "run", asked, fork=fork)

    started = begin("full") if fork else None
    once = engine.end(begin("once"), folder / "once" / "run")
    full = engine.end(started or begin("full"), folder / "full" / "run")
    elsewhere = model.rename(folder / "elsewhere")
    warm = engine.run(elsewhere, folder / "once" / "root", options, fork=fork)

    assert once.tokens == full.tokens == warm.tokens
    # The same kernels: the same bits.
    assert once.logprobs == full.logprobs == warm.logprobs
    assert once.vectors == full.vectors == warm.vectors
    assert once.tokens or once.vectors
    assert once.counters["num_compiled_artifacts_saved"] <= full.counters["num_compiled_artifacts_saved"]
    assert (warm.loaded, warm.compiled) == (1, 0)

    assert full.output.lines("every layer is traced", "asked for by a test")
    (line,) = once.output.lines("traced", "copied", "distinct")
    traced, copied, _, distinct = map(int, re.findall(r"\d+", line.partition("traced")[2])[:4])
    assert once.compiled == distinct == once.counters["num_compiled_artifacts_saved"]
    assert once.compiled <= full.compiled
    return traced, copied
