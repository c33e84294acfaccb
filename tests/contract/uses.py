"""What the installed vLLM uses of `vllm.compilation`, and whether our modules provide it."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_compile_ext.finder import REPLACED, THEIRS, UPSTREAM

_BY_STRING = re.compile(rf"{re.escape(THEIRS)}\.[\w.]+")


@functools.cache
def uses(vllm: Path) -> dict[tuple[str, str], str]:
    """What the package folder `vllm` imports from `vllm.compilation`, by statement or by string, and a place of each.

    A module, relative to that package, and a name in it; "" where the module itself is imported.
    """
    found = {}
    for path in sorted(vllm.rglob("*.py")):
        text = path.read_text(errors="replace")
        if "compilation" in text or path.is_relative_to(vllm / "compilation"):
            found |= {(module, name): where for module, name, where in _uses_in(path.relative_to(vllm), text)}
    return found


def _uses_in(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    package = ["vllm", *path.parent.parts]
    for node in ast.walk(ast.parse(text)):
        where = f"vllm/{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if module == THEIRS:
                    yield (alias.name, "", where)
                elif module.startswith(THEIRS + "."):
                    yield (module.removeprefix(THEIRS + "."), alias.name, where)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(THEIRS + "."):
                    yield (alias.name.removeprefix(THEIRS + "."), "", where)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _BY_STRING.fullmatch(node.value):
            module, _, name = node.value.removeprefix(THEIRS + ".").rpartition(".")
            yield (module or name, name if module else "", where)


def check(vllm: Path) -> tuple[int, list[str]]:
    """Compare what `vllm` uses with what is served under its names now: the number of distinct names, and breaches.

    Imports every module that is named; call it in a process in which the swap is installed.  A module that is
    upstream's own and that this machine cannot import (it needs a GPU library) counts as served: so it is without us.
    """
    breaches = []
    for (module, name), where in uses(vllm).items():
        try:
            served = importlib.import_module(f"{THEIRS}.{module}")
        except Exception as error:
            if module in REPLACED:
                breaches.append(f"{module} cannot be imported ({type(error).__name__}: {error}), {where}")
            continue
        if name:
            breaches += [f"{module}.{problem}, {where}" for problem in _problems(module, name, served)]
    return len(uses(vllm)), breaches


def _problems(module: str, name: str, served: Any) -> Iterator[str]:
    if not hasattr(served, name):
        if not hasattr(served, "__path__") or importlib.util.find_spec(f"{served.__name__}.{name}") is None:
            yield f"{name} does not exist"
    elif module in REPLACED:
        upstream = importlib.import_module(f"{UPSTREAM}.{module}")
        for dotted, theirs in _callables(name, getattr(upstream, name)):
            try:
                ours = operator.attrgetter(dotted)(served)
            except AttributeError:
                yield f"{dotted} does not exist"
            else:
                if problem := not_accepted(ours, theirs):
                    yield f"{dotted}: {problem}"


def _callables(name: str, theirs: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """`theirs` itself and, for a class, the methods that it defines, by dotted name."""
    if callable(theirs):
        yield name, theirs
    if inspect.isclass(theirs):
        for method, value in vars(theirs).items():
            if inspect.isfunction(value) and (not method.startswith("_") or method in ("__call__", "__init__")):
                yield f"{name}.{method}", value


def not_accepted(ours: Callable[..., Any], theirs: Callable[..., Any]) -> str | None:
    """How a call that `theirs` takes fails on `ours`: with all arguments by place, by name, or those that it needs."""
    try:
        mine, wanted = inspect.signature(ours), inspect.signature(theirs).parameters.values()
    except (TypeError, ValueError):
        return None
    by_place = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    by_name = [p for p in wanted if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    either = [p for p in by_place if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p for p in wanted if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for places, names in (
        (by_place, by_name),
        ([p for p in by_place if p.kind is p.POSITIONAL_ONLY], either + by_name),
        ([p for p in needed if p in by_place], [p for p in needed if p in by_name]),
    ):
        try:
            mine.bind(*places, **{p.name: p for p in names})
        except TypeError as error:
            return str(error)
    shared = [name for name in mine.parameters if name in {p.name for p in by_place}]
    return None if shared == [p.name for p in by_place if p.name in shared] else f"takes {shared} in another order"
