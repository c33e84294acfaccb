"""Two tensor-parallel ranks on one machine: a piece that both have is compiled by one of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import process
from tests.served import ENGINE, two_ranks

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to cores of its own"),
]


def test_two_ranks_compile_a_common_piece_once(
    cold_ranks: tuple[process.Outcome, Path], llama2: Path, tmp_path: Path
) -> None:
    cold, cache = cold_ranks
    said = re.findall(r"compiled (\d+) pieces with \d+ workers, loaded (\d+) that another", cold.output)
    assert len(said) == 2
    # Three distinct pieces a rank; the first holds the rank's part of the vocabulary and is another one in each.
    assert sum(int(compiled) for compiled, _ in said) == 4
    assert sum(int(loaded) for _, loaded in said) == 2

    warm = two_ranks(llama2, tmp_path / "warm", cache)
    assert len(warm.lines("loaded compiled code")) == 2
    assert not warm.lines("cache miss")
    one = process.run(ENGINE, str(llama2), "{}", folder=tmp_path / "one", fork=True, VLLM_CACHE_ROOT=str(cache))
    assert cold.value["tokens"] == warm.value["tokens"] == one.value["tokens"]
