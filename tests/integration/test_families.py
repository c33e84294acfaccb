"""Many architectures and options: traced once a kind of layer, they answer as when every layer is traced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import engine
from tests.families import family
from vllm_compile_ext import platforms

pytestmark = pytest.mark.engine

SIZES = {"compile_sizes": [1, 8]}
SHAPES = "dynamic_shapes_config"


# Layers that are traced, and that are copied.  The first decoder layer is called without a residual.
@pytest.mark.parametrize(
    ("name", "options", "traced", "copied"),
    [
        ("llama", {"compilation_config": SIZES}, 2, 2),
        ("qwen3", {"compilation_config": {SHAPES: {"type": "unbacked"}}}, 2, 2),
        ("gemma3", {}, 2, 4),
        ("mixtral", {}, 2, 2),
        ("opt", {"compilation_config": {SHAPES: {"type": "backed_size_oblivious"}}}, 1, 3),
        ("bert", {"embeds": True}, 1, 3),
        ("qwen3next", {"dtype": "bfloat16"}, 5, 3),  # vLLM's kernels for linear attention on CPU take nothing else
        ("deepseek", {"dtype": "bfloat16"} if "amx" in platforms.name() else {}, 2, 2),  # all that AMX's kernels take
        ("granite", {}, 2, 2),
    ],
)
def test_same_answers_as_a_full_trace(
    name: str, options: dict[str, Any], traced: int, copied: int, tmp_path: Path
) -> None:
    assert compare(name, tmp_path, options, fork=True) == (traced, copied)


def compare(name: str, folder: Path, options: dict[str, Any], *, fork: bool = False) -> tuple[int, int]:
    """Start one family traced in full, once, and warm from another folder, and compare.

    Returns how many layers were traced, and copied.
    """
    model = family(name, folder / "model")
    full = engine.run(model, folder / "full", options | {"upstream": True}, fork=fork)
    once = engine.run(model, folder / "once", options, fork=fork)
    warm = engine.run(model.rename(folder / "elsewhere"), folder / "once", options, fork=fork)

    assert once.tokens == full.tokens == warm.tokens
    # The same kernels: the same bits.
    assert once.logprobs == full.logprobs == warm.logprobs
    assert once.vectors == full.vectors == warm.vectors
    assert once.tokens or once.vectors
    assert once.counters["num_compiled_artifacts_saved"] <= full.counters["num_compiled_artifacts_saved"]
    assert (warm.loaded, warm.compiled) == (1, 0)
    assert warm.counters["num_compiled_artifacts_loaded"] == once.counters["num_compiled_artifacts_saved"]

    assert full.output.lines("every layer is traced", "asked for by a test")
    assert not once.output.lines("every layer is traced")
    (line,) = once.output.lines("traced", "copied", "distinct")
    traced, copied, _, distinct = map(int, re.findall(r"\d+", line.partition("traced")[2])[:4])
    # Each piece for any number of tokens, and for each of the sizes.
    times = 1 + len(options.get("compilation_config", {}).get("compile_sizes", ()))
    assert once.compiled == times * distinct
    assert once.compiled <= full.compiled
    return traced, copied
