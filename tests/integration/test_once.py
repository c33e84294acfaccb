"""Options of compilation that the plugin's own path serves: the same answers as upstream's path gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import engine

pytestmark = pytest.mark.engine


def both(model: Path, folder: Path, compilation: dict[str, Any]) -> tuple[engine.Run, engine.Run]:
    """Two cold starts at once: every layer traced, and one of each kind."""
    options = {"compilation_config": compilation}
    folders = [folder / which for which in ("full", "once")]
    started = [
        engine.begin(model, each / "root", each / "run", options | {"upstream": each.name == "full"}, fork=True)
        for each in folders
    ]
    full, once = (engine.end(p, each / "run") for p, each in zip(started, folders, strict=True))
    assert full.output.lines("every layer is traced", "asked for by a test")
    assert once.output.lines("traced 2 layers and copied 2; 5 pieces to compile, 3 of them distinct")
    assert not once.output.lines("every layer is traced")
    return full, once


def test_compile_sizes(llama: Path, tmp_path: Path) -> None:
    options = {"compile_sizes": [1, 8]}
    full, once = both(llama, tmp_path, options)
    warm = engine.run(llama, tmp_path / "once" / "root", {"compilation_config": options}, fork=True)
    assert once.tokens == full.tokens == warm.tokens
    assert once.logprobs == full.logprobs == warm.logprobs
    assert once.compiled == 3 * 3, "three distinct pieces, each for 1 token, 8 tokens and any number"
    assert (warm.loaded, warm.compiled) == (1, 0)
    assert warm.counters["num_compiled_artifacts_loaded"] == once.counters["num_compiled_artifacts_saved"]


@pytest.mark.parametrize("kind", ["unbacked", "backed_size_oblivious"])
def test_dynamic_shapes(kind: str, llama: Path, tmp_path: Path) -> None:
    full, once = both(llama, tmp_path, {"dynamic_shapes_config": {"type": kind}})
    assert once.tokens == full.tokens
    assert once.logprobs == full.logprobs
    assert once.compiled == 3
