"""The contract with the installed vLLM: what it uses of `vllm.compilation`, and whether our modules provide it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_compile_ext.swap import REPLACED, THEIRS, UPSTREAM

_BY_STRING = re.compile(rf"{re.escape(THEIRS)}\.[\w.]+")


@dataclass(frozen=True)
class Use:
    """One place where vLLM names something of `vllm.compilation`: `module` relative to that package, `name` in it."""

    module: str
    name: str
    where: str


@dataclass(frozen=True)
class Breach:
    """One thing that vLLM expects and does not get."""

    what: str
    where: str
    problem: str


def uses(vllm: Path) -> list[Use]:
    """Every name that the package folder `vllm` imports from `vllm.compilation`, by statement or by string."""
    found: set[Use] = set()
    for path in sorted(vllm.rglob("*.py")):
        text = path.read_text(errors="replace")
        if "compilation" in text or path.is_relative_to(vllm / "compilation"):
            found.update(_uses_in(path.relative_to(vllm), text))
    return sorted(found, key=lambda use: (use.module, use.name, use.where))


def _uses_in(path: Path, text: str) -> Iterator[Use]:
    package = ["vllm", *path.parent.parts]
    for node in ast.walk(ast.parse(text)):
        where = f"vllm/{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if module == THEIRS:
                    yield Use(alias.name, "", where)
                elif module.startswith(THEIRS + "."):
                    yield Use(module.removeprefix(THEIRS + "."), alias.name, where)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(THEIRS + "."):
                    yield Use(alias.name.removeprefix(THEIRS + "."), "", where)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _BY_STRING.fullmatch(node.value):
            module, _, name = node.value.removeprefix(THEIRS + ".").rpartition(".")
            yield Use(module or name, name if module else "", where)


def not_accepted(ours: Callable[..., Any], theirs: Callable[..., Any]) -> str | None:
    """How a call that `theirs` takes could fail on `ours`, or None when every such call binds."""
    try:
        mine, wanted = inspect.signature(ours), inspect.signature(theirs)
    except (TypeError, ValueError):
        return None
    kinds = [p.kind for p in mine.parameters.values()]
    any_args, any_kwargs = inspect.Parameter.VAR_POSITIONAL in kinds, inspect.Parameter.VAR_KEYWORD in kinds
    positional = [p for p in mine.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for index, (name, parameter) in enumerate(wanted.parameters.items()):
        if parameter.kind is parameter.VAR_POSITIONAL and not any_args:
            return f"does not take *{name}"
        if parameter.kind is parameter.VAR_KEYWORD and not any_kwargs:
            return f"does not take **{name}"
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and not any_args:
            if index >= len(positional):
                return f"takes {len(positional)} positional arguments, not {name!r} as number {index + 1}"
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and positional[index].name != name and not any_kwargs:
                return f"calls {name!r} {positional[index].name!r}"
        if parameter.kind is parameter.KEYWORD_ONLY and name not in mine.parameters and not any_kwargs:
            return f"does not take {name}="
    for name, parameter in mine.parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and name not in wanted.parameters:
            return f"needs {name!r}, which vLLM does not pass"
    return None


def _callables(name: str, theirs: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """`theirs` itself and, for a class, the methods that it defines, by dotted name."""
    if callable(theirs):
        yield name, theirs
    if inspect.isclass(theirs):
        for method, value in vars(theirs).items():
            if inspect.isfunction(value) and (not method.startswith("_") or method in ("__call__", "__init__")):
                yield f"{name}.{method}", value


def _lookup(module: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        module = getattr(module, part)
    return module


def check(vllm: Path) -> tuple[int, list[Breach]]:
    """Compare what `vllm` uses with what is served under its names now: (number of distinct names, breaches).

    Imports every module that is named; call it in a process in which the swap is installed.  A module that is
    upstream's own and that this machine cannot import (it needs a GPU library) counts as served: so it is without us.
    """
    breaches: list[Breach] = []
    names: dict[str, Use] = {}
    for use in uses(vllm):
        names.setdefault(".".join(part for part in (THEIRS, use.module, use.name) if part), use)
    for what, use in names.items():
        try:
            module = importlib.import_module(f"{THEIRS}.{use.module}")
        except Exception as error:
            if use.module in REPLACED:
                breaches.append(Breach(what, use.where, f"cannot be imported ({type(error).__name__}: {error})"))
            continue
        if use.name:
            breaches.extend(_breaches(what, use, module))
    return len(names), breaches


def _breaches(what: str, use: Use, module: Any) -> Iterator[Breach]:
    if not hasattr(module, use.name) and not _is_submodule(module, use.name):
        yield Breach(what, use.where, "does not exist")
    elif use.module in REPLACED:
        upstream = importlib.import_module(f"{UPSTREAM}.{use.module}")
        for dotted, theirs in _callables(use.name, getattr(upstream, use.name)):
            full = what.removesuffix(use.name) + dotted
            try:
                ours = _lookup(module, dotted)
            except AttributeError:
                yield Breach(full, use.where, "does not exist")
                continue
            if problem := not_accepted(ours, theirs):
                yield Breach(full, use.where, problem)


def _is_submodule(module: Any, name: str) -> bool:
    return importlib.util.find_spec(f"{module.__name__}.{name}") is not None if hasattr(module, "__path__") else False
