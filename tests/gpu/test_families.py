"""On a GPU, with CUDA graphs: traced once a kind of layer, models answer as when every layer is traced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_families import compare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_same_answers_as_a_full_trace(name: str, tmp_path: Path) -> None:
    assert compare(name, tmp_path, {"dtype": "bfloat16"})[1] > 0
