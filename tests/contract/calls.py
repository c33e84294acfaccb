"""What our own code takes from vLLM and torch by name, and how it calls it, read from the source."""

from __future__ import annotations

import ast
import contextlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

THEIRS = ("vllm", "torch")
UPSTREAM = "vllm_compile_ext.upstream"


class Taken(NamedTuple):
    """An import: the dotted name of what is imported, what it is called here, and where."""

    name: str
    alias: str
    where: str


def taken(path: Path) -> Iterator[Taken]:
    """Every import from vLLM and torch in the file `path`."""
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.parent.name}/{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_theirs(node.module or ""):
            for alias in node.names:
                yield Taken(f"{node.module}.{alias.name}", alias.asname or alias.name, where)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_theirs(alias.name):
                    yield Taken(alias.name, alias.asname or alias.name.partition(".")[0], where)


def _is_theirs(module: str) -> bool:
    return module.split(".")[0] in THEIRS or module == UPSTREAM


def missing(path: Path) -> list[str]:
    """Imports in the file `path` of what is not there."""
    found = []
    for one in taken(path):
        try:
            pkgutil.resolve_name(one.name)
        except Exception as error:
            if one.name != "vllm.platforms.rocm" or isinstance(error, ImportError):  # it asks torch for its devices
                found.append(f"{one.where} {one.name}: {error}")
    return found


def bad_calls(path: Path) -> list[str]:
    """Calls in the file `path` that what is called would not take: of what it imports from vLLM, or of `super()`."""
    tree = ast.parse(path.read_text())
    names: dict[str, Any] = {}
    for one in taken(path):
        with contextlib.suppress(Exception):  # a module of another platform
            top = one.name.partition(".")[0]
            names[one.alias] = pkgutil.resolve_name(top if one.alias == top else one.name)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := _lookup(node.func, names)) is not None:
            found += _problem(node, function, path, bound=False)
        if isinstance(node, ast.ClassDef):
            for base in filter(None, (_lookup(each, names) for each in node.bases)):
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and (method := _of_super(call)) and hasattr(base, method):
                        found += _problem(call, getattr(base, method), path, bound=True)
    return found


def _lookup(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _lookup(node.value, names)) is not None:
        return getattr(owner, node.attr, None)
    return None


def _of_super(call: ast.Call) -> str | None:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "super()" else None


def _problem(call: ast.Call, function: Any, path: Path, *, bound: bool) -> Iterator[str]:
    if not callable(function) or any(isinstance(arg, ast.Starred) for arg in call.args):
        return
    if any(keyword.arg is None for keyword in call.keywords):
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    positional = [None] * (len(call.args) + (bound and not inspect.ismethod(function)))
    try:
        signature.bind(*positional, **{str(keyword.arg): None for keyword in call.keywords})
    except TypeError as error:
        yield f"{path.parent.name}/{path.name}:{call.lineno}: {ast.unparse(call.func)}{signature}: {error}"
