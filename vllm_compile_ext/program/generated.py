"""Modules that Inductor generates: the Python that calls kernels, kept without the kernels' sources.

A generated module compiles its kernels when it is imported (`name = async_compile.triton(...)`), which asks compilers
for their versions and caches for their keys even when everything is compiled.  `cut` takes those calls out; `load` runs
what is left with finished kernels in their places (torch 2.13.0, `_inductor/codegen/wrapper.py`).
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

KERNELS = "_kernels_"
_KINDS = ("cpp_pybinding", "triton")
_NOT_NEEDED = ("get_args", "benchmark_compiled_module")  # for people who run the file


class Uncuttable(Exception):  # noqa: N818 - an answer, not an error
    """The module is not of the known shape; the message says why."""


@dataclass(frozen=True)
class Kernel:
    """One call that was taken out: the name that it was assigned to, the compiler, and its literal arguments."""

    name: str
    kind: str
    arguments: tuple[Any, ...]


def cut(source: str) -> tuple[str, list[Kernel]]:
    """The source without what compiles kernels, and the kernels in order.  Raises `Uncuttable`."""
    lines = source.split("\n")  # as `ast` counts them
    kernels: list[Kernel] = []
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise Uncuttable(str(error)) from error
    used = {node.id for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Name)}
    for statement in reversed(body):
        new = _replacement(statement, kernels, used)
        if new is not None:
            lines[statement.lineno - 1 : statement.end_lineno] = new
    kernels.reverse()
    text = "\n".join(lines).strip() + "\n"
    for number, kernel in enumerate(kernels):
        text = text.replace(f"{kernel.name} = {KERNELS}[?]", f"{kernel.name} = {KERNELS}[{number}]", 1)
    left = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    if unknown := left & {"async_compile", "AsyncCompile"}:
        raise Uncuttable(f"{', '.join(sorted(unknown))} is used in an unknown way")
    return text, kernels


def _replacement(statement: ast.stmt, kernels: list[Kernel], used: set[str]) -> list[str] | None:
    """Lines that stand in for a top-level statement, where the module uses the names `used`; None keeps it."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return []
    if isinstance(statement, ast.FunctionDef) and statement.name in _NOT_NEEDED:
        return []
    if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
        return []
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        return [] if not names & used or names == {"AsyncCompile"} else None
    if ast.unparse(statement) in (
        "async_compile = AsyncCompile()",
        "async_compile.wait(globals())",
        "del async_compile",
    ):
        return []
    if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
        return None
    call, target = statement.value, statement.targets[0]
    if not ast.unparse(call.func).startswith("async_compile."):
        return None
    kind = ast.unparse(call.func).removeprefix("async_compile.")
    if kind not in _KINDS or len(statement.targets) != 1 or not isinstance(target, ast.Name):
        raise Uncuttable(f"a kernel of kind {kind}")
    try:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        kernels.append(Kernel(target.id, kind, tuple(ast.literal_eval(a) for a in arguments)))
    except ValueError as error:
        raise Uncuttable(f"{target.id}: {error}") from error
    return [f"{target.id} = {KERNELS}[?]"]


def load(source: str, kernels: Sequence[Any], attributes: Mapping[str, Any], name: str) -> ModuleType:
    """Run `source`, as `cut` left it, with `kernels` in order; `attributes` (constants of the graph) are set on it.

    The module is registered in `sys.modules` under `name`, and its lines are shown in tracebacks.
    """
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    module.__dict__[KERNELS] = kernels
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    module.__dict__.update(attributes)  # afterwards: the source has None in their places
    return module
