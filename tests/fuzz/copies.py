"""Are copied layers what tracing each of them gives?  Stacks from seeds, judged by eager mode and by a full trace.

`python -m tests.fuzz.copies` runs many cases and prints one line for each class; `--case N` shows one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.fuzz import kit, known, sizes, stacks
from tests.fuzz.stacks import Stack
from tests.unit.trace.capture import Stitched, against_full_trace, backend_input, run, stitched


@dataclass
class Result:
    """seed: of a generated case, or the name of a known one.  outcome: right, wrong, crashed or unsupported.

    copied: layers that were not traced; expected: how many could be, None where that is not said.
    """

    seed: int | str
    kind: str
    what: str
    outcome: str
    detail: str = ""
    copied: int = 0
    expected: int | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        return self.outcome in ("wrong", "crashed")

    def __str__(self) -> str:
        return f"[{self.seed}] {self.outcome}: {self.what}\n        {self.detail}"


@contextmanager
def same_state() -> Iterator[None]:
    """What a case leaves changed is put back."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_grad_enabled(grad)
        kit.Current.value, kit.Current.stack = 1.0, []


def _flat(result: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def equal(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Bit by bit unless there is a tolerance, but for what a NaN carries."""
    left, right = _flat(a), _flat(b)
    return len(left) == len(right) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.allclose(x.double(), y.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        for x, y in zip(left, right, strict=True)
    )


def eager(stack: Stack) -> list[torch.Tensor]:
    """What the model itself gives."""
    model, args, _ = stack.make()
    with torch.no_grad(), same_state():
        return copy.deepcopy(_flat(model(*args)))


def _unsupported(stack: Stack, expected: Any) -> str | None:
    """Why tracing every layer does not give what the model gives; None when it does."""
    model, args, _ = stack.make()
    try:
        with same_state():
            got = backend_input(model, args)
        module, inputs = got.graph_module, list(got.example_inputs)
        full = run(Stitched(None, module.graph, module, inputs, []), model, args)[0]  # type: ignore[arg-type]
    except Exception as error:
        return f"full trace: {line(error)}"
    return None if equal(full, expected) else "the full trace differs from eager mode"


def line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def judge(seed: int | str, kind: str, stack: Stack, *, graphs: bool = True) -> Result:
    """graphs: compare the graph with the full trace's, too."""
    begin = time.perf_counter()
    result = Result(seed, kind, stack.what, "right", expected=stack.copies)
    try:
        expected = eager(stack)
    except Exception as error:
        result.outcome, result.detail = "unsupported", f"eager mode: {line(error)}"
        return result
    try:
        model, args, _ = stack.make()
        with same_state():
            s = stitched(model, args)
            result.copied = s.tracer.stamped
            result.detail = f"copied {s.tracer.stamped}: {(s.tracer.reasons or ['nothing said'])[0][:300]}"
            different = against_full_trace(s, model, args) if graphs and s.tracer.stamped else None
        got = run(s, model, args)[0]
        if not equal(got, expected):
            result.outcome, result.detail = "wrong", f"copied {s.tracer.stamped}; the result differs from eager mode"
        elif different is not None:
            result.outcome, result.detail = "wrong", f"copied {s.tracer.stamped}; graph: {different[:200]}"
    except Exception as error:
        result.outcome, result.detail = "crashed", line(error)
    if result.bad and "graph:" not in result.detail and (why := _unsupported(stack, expected)):
        result.outcome, result.detail = "unsupported", why
    result.seconds = time.perf_counter() - begin
    return result


def generated(seeds: Iterable[int]) -> Iterator[Result]:
    """Judge generated cases; of every third the graph is compared, too."""
    with _collected():
        for n, seed in enumerate(seeds):
            kind, stack = stacks.generate(seed)
            yield judge(seed, kind, stack, graphs=seed % 3 == 0)
            if n % 50 == 49:
                gc.collect()


@contextmanager
def _collected() -> Iterator[None]:
    """Garbage is collected once in a while: with Dynamo's, doing it all the time takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def summary(results: list[Result]) -> str:
    """One line for each class."""
    lines = []
    for kind in dict.fromkeys(r.kind for r in results):
        mine = [r for r in results if r.kind == kind]
        count = Counter(r.outcome for r in mine)
        line = (
            f"{kind:<8} {len(mine):5} cases, {count['wrong']:4} wrong, {count['crashed']:3} crashed, "
            f"{count['unsupported']:4} unsupported, {sum(r.copied > 0 for r in mine):5} with copies, "
            f"{sum(r.seconds for r in mine) / len(mine):.3f} s a case"
        )
        if share := copied(mine):
            line += f"; {100 * share[0] / share[1]:.1f} % of {share[1]} that may be copied are"
        lines.append(line)
    return "\n".join(lines)


def copied(results: Iterable[Result]) -> tuple[int, int] | None:
    """In how many cases all layers are copied that may be, and of how many cases that is known."""
    known = [r for r in results if r.expected is not None and r.outcome != "unsupported"]
    return (sum(r.copied >= (r.expected or 0) for r in known), len(known)) if known else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.copies")
    parser.add_argument("--case", help="show the case of this seed, or a known one: its code, and what comes out")
    parser.add_argument("--cases", type=int, default=len(sizes.STACKS))
    parser.add_argument("--start", type=int, default=sizes.STACKS.start, help="the first seed")
    parser.add_argument("--show", default="wrong,crashed", help="print cases with these outcomes, or `uncopied` ones")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if chosen.case is not None:
        found = ("known", known.CASES[chosen.case]) if chosen.case in known.CASES else stacks.generate(int(chosen.case))
        result = judge(chosen.case, *found)
        print(found[1].source, result, sep="\n")
        return int(result.bad)
    results = list(generated(range(chosen.start, chosen.start + chosen.cases)))
    results += [judge(name, "known", stack) for name, stack in known.CASES.items()]
    for result in results:
        few = result.expected is not None and result.copied < result.expected
        if result.outcome in chosen.show or ("uncopied" in chosen.show and few):
            print(result)
    print(summary(results))
    share = copied(r for r in results if r.kind == "benign") or (1, 1)
    return int(any(r.bad for r in results) or share[0] / share[1] < 0.95)


if __name__ == "__main__":
    raise SystemExit(main())
