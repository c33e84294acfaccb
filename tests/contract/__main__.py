"""What this plugin relies on of the installed vLLM and torch, and what of it is gone or changed: ``make contract``.

Prints a line for each such thing, with the file of ours that needs it; exit status 1 when there is one.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

OURS = Path(__file__).parents[2] / "vllm_compile_ext"


def changed_places() -> Iterator[str]:
    """Rows of the table of changes."""
    from vllm_compile_ext import changes

    yield from changes.problems()


def replaced_functions() -> Iterator[str]:
    """What takes the place of a function, and not all arguments that it takes by place."""
    from vllm_compile_ext import changes

    for change in changes.TABLE:
        if not change.module or ":" not in change.by:
            continue
        try:
            owner, name = change.owner()
            stock = getattr(owner, name)
            stock = getattr(stock, "__func__", stock)  # of a method that is bound to its class
        except (ImportError, AttributeError):  # `changed_places` says it, where it matters
            continue
        if inspect.isroutine(stock):
            places = [p for p in inspect.signature(stock).parameters.values() if p.kind is not p.KEYWORD_ONLY]
            try:
                inspect.signature(change.function()(stock, *change.given)).bind(*places)
            except TypeError as error:
                yield f"{change.by.replace('.', '/').partition(':')[0]}.py: {change.what}: {error}"


def imports_and_calls() -> Iterator[str]:
    from tests.contract import calls

    for path in sorted(OURS.rglob("*.py")):
        yield from calls.missing(path)
        yield from calls.bad_calls(path)


def replaced_modules() -> Iterator[str]:
    """What vLLM uses of the modules that are swapped."""
    import vllm

    from tests.contract import uses
    from vllm_compile_ext import finder

    undo = finder.swap()
    try:
        yield from (f"compilation/{breach}" for breach in uses.check(Path(str(vllm.__file__)).parent)[1])
    finally:
        undo()


def kinds_of_a_trace() -> Iterator[str]:
    from tests.contract import test_trace_kinds as known
    from vllm_compile_ext.trace import kinds

    where = "trace/kinds.py"
    sources, guards = known.sources(), known.guards()
    yield from (f"{where}: unknown source {name}" for name in sources - kinds.COMPARED - known.REFUSED_SOURCES)
    yield from (f"{where}: no source {name}" for name in kinds.COMPARED - sources)
    yield from (f"{where}: unknown guard {n}" for n in guards - kinds.VALUE - kinds.IDENTITY - known.REFUSED_GUARDS)
    yield from (f"{where}: no guard {name}" for name in (kinds.VALUE | kinds.IDENTITY) - guards)


def hooks_of_a_trace() -> Iterator[str]:
    """Places in Dynamo that tell what a trace looks at."""
    from vllm_compile_ext import versions
    from vllm_compile_ext.trace import watch

    for owner, names, _ in watch.PLACES:
        try:
            found = watch.find_owner(owner)
        except (ImportError, AttributeError) as error:
            yield f"trace/watch.py: torch._dynamo.{owner}: {error}"
            continue
        for name in filter(None, map(versions.dynamo, names)):
            if not (name in found if isinstance(found, dict) else hasattr(found, name)):
                yield f"trace/watch.py: torch._dynamo.{owner} has no {name}"


def log_lines() -> Iterator[str]:
    """Lines of vLLM's log by which a start is timed."""
    import vllm

    from vllm_compile_ext.cli.bench import server

    texts = [server.ENGINE, server.MODEL, server.COMPILE, server.WARM, server.INIT, "Loading weights took", "in total"]
    written = set[str]()
    for path in Path(str(vllm.__file__)).parent.rglob("*.py"):
        text = path.read_text(errors="replace")
        if "logger" in text:
            constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
            written |= {node.value for node in constants if isinstance(node.value, str)}
    for text in texts:
        if not any(text in each for each in written):
            yield f"cli/bench/server.py: nothing logs {text!r}"


CHECKS = (
    *(replaced_modules, changed_places, replaced_functions, imports_and_calls),
    *(kinds_of_a_trace, hooks_of_a_trace, log_lines),
)


def main() -> int:
    import torch
    import vllm.engine.arg_utils  # what a front end has imported when it loads plugins

    print(f"vllm {vllm.__version__}, torch {torch.__version__}")
    found = 0
    for check in CHECKS:
        try:
            lines = sorted(set(check()))
        except Exception as error:  # the others are still of use
            lines = [f"{check.__name__} cannot be checked: {type(error).__name__}: {error}"]
        print(f"{check.__name__.replace('_', ' ')}: {len(lines) or 'nothing'} gone or changed")
        print(*(f"  {line}" for line in lines), sep="\n", end="\n" if lines else "")
        found += len(lines)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
