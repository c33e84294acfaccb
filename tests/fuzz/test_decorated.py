"""Some of the stacks of `copies.py` behind vLLM's decorator: most with pieces as they are, some through Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests import process
from tests.fuzz import known, sizes

pytestmark = pytest.mark.engine  # they start none, but compile

# Of layers that change their buffers, a call that differs by an argument, and one kind of each container.
INDUCTOR = [*(name for name in known.CASES if "in place" in name), "argument that is the first layer's own buffer"]
INDUCTOR += ["nested containers", "dtype", "partial that the model calls first", "buffer that is None in a middle one"]


def run(cases: Sequence[int | str], inductor: Sequence[str]) -> list[dict[str, Any]]:
    """The results of cases with pieces as they are, and of those that go through Inductor."""
    code = f"""
        from tests.fuzz import decorated
        report(decorated.run({cases!r}) + decorated.run({inductor!r}, inductor=True))
    """
    outcome = process.run(code, fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return list(outcome.value)


def bad(results: list[dict[str, Any]]) -> list[str]:
    wrong = [r for r in results if r["outcome"] in ("wrong", "crashed")]
    return [f"[{r['seed']}] {r['outcome']}: {r['what']}\n    {r['detail']}" for r in wrong]


def test_the_compiled_model_gives_what_the_model_gives() -> None:
    results = run([*list(known.CASES)[:: sizes.EVERY_KNOWN], *sizes.SUITE_DECORATED], INDUCTOR[:: sizes.EVERY_KNOWN])
    assert not (found := bad(results)), "\n".join(found)
    assert sum(r["outcome"] == "unsupported" for r in results) <= len(results) / 20
