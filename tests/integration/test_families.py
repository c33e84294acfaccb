"""Many architectures: traced once a kind of layer, they answer as when every layer is traced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import engine
from tests.families import FAMILIES

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", FAMILIES)
def test_same_answers_as_a_full_trace(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name](tmp_path / "model")
    options = {"embeds": True} if name == "bert" else {}
    # Both at once: two cores, two engines.
    folders = [tmp_path / which for which in ("full", "once")]
    started = [
        engine.begin(model, folder / "root", folder / "run", options | {"upstream": folder.name == "full"})
        for folder in folders
    ]
    full, once = (engine.end(p, folder / "run") for p, folder in zip(started, folders, strict=True))
    warm = engine.run(model, folders[1] / "root", options)

    assert once.tokens == full.tokens == warm.tokens
    # The same kernels: the same bits.
    assert once.logprobs == full.logprobs == warm.logprobs
    assert once.vectors == full.vectors == warm.vectors
    assert once.tokens or once.vectors
    assert once.counters["num_compiled_artifacts_saved"] == full.counters["num_compiled_artifacts_saved"]
    assert (warm.loaded, warm.compiled) == (1, 0)

    assert full.output.lines("every layer is traced", "asked for by a test")
    (line,) = once.output.lines("traced", "copied", "distinct")
    _, copied, _, distinct = map(int, re.findall(r"\d+", line.partition("traced")[2])[:4])
    assert once.compiled == distinct == once.counters["num_compiled_artifacts_saved"]
    if name == "mixtral":  # on CPU its layers look themselves up by name in a global table, each its own
        assert copied == 0
        assert once.output.lines("every layer is traced", "assume_constant_result")
    elif "layer" not in name:
        assert copied > 0
    assert once.compiled < full.compiled or name == "llama of 1 layer"
