"""Some of the stacks of `copies.py` behind vLLM's decorator: most with pieces as they are, some through Inductor."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process
from tests.fuzz import known

pytestmark = pytest.mark.engine  # they start none, but compile

SEEDS = range(1000, 1040)
# Of layers that change their buffers, a call that differs by an argument, and one kind of each container.
INDUCTOR = [*(name for name in known.CASES if "in place" in name), "argument that is the first layer's own buffer"]
INDUCTOR += ["nested containers", "dtype", "partial that the model calls first", "buffer that is None in a middle one"]

CODE = """
    from tests.fuzz import decorated, known
    from tests.fuzz.test_decorated import INDUCTOR, SEEDS
    asis = decorated.run([*known.CASES, *SEEDS])
    report([asis, decorated.run(INDUCTOR, inductor=True)])
"""


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    outcome = process.run(CODE, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return list(outcome.value)


@pytest.mark.parametrize("inductor", [False, True], ids=["pieces as they are", "inductor"])
def test_the_compiled_model_gives_what_the_model_gives(results: list[list[dict[str, Any]]], inductor: bool) -> None:
    bad = [r for r in results[inductor] if r["outcome"] in ("wrong", "crashed")]
    lines = [f"[{r['seed']}] {r['outcome']}: {r['what']}\n    {r['detail']}" for r in bad]
    assert not bad, "\n".join([f"{len(bad)} of {len(results[inductor])}", *lines])


def test_nearly_all_of_them_are_compiled(results: list[list[dict[str, Any]]]) -> None:
    every = [r for mine in results for r in mine]
    unsupported = [r for r in every if r["outcome"] == "unsupported"]
    assert len(unsupported) <= len(every) / 20, unsupported
