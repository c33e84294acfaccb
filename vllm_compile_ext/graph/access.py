"""Access expressions: chains such as `L['self']._modules['layers']._modules['0'].scale`, over L, a frame's locals."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from vllm_compile_ext.graph.bodies import NotOnce


def steps(expression: str) -> tuple[str, list[str]]:
    """(name of the local, source text of each step after it).  Raises `NotOnce` for anything but a plain chain."""
    found: list[str] = []
    try:
        node: ast.expr = ast.parse(expression, mode="eval").body
    except SyntaxError:
        raise NotOnce(f"{expression} is no access expression") from None
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            found.append(f".{node.attr}")
        elif isinstance(node, ast.Subscript):
            try:
                found.append(f"[{ast.literal_eval(node.slice)!r}]")
            except (ValueError, TypeError):
                raise NotOnce(f"{expression} is no plain chain") from None
        else:
            raise NotOnce(f"{expression} is no plain chain")
        node = node.value
    if node.id != "L" or not found:
        raise NotOnce(f"{expression} does not start at a local")
    local = ast.literal_eval(found.pop()[1:-1])
    return str(local), found[::-1]


class _Owner:
    """A module, or its dict of parameters or buffers.  leaves: (place, the steps that are taken from it each time)."""

    def __init__(self) -> None:
        self.longer: dict[str, _Owner] = {}
        self.leaves: list[tuple[int, str]] = []


def _found_once(path: Sequence[str]) -> int:
    """How many steps of `path` lead to the last submodule, or to its dict of parameters or buffers.

    These hold until a submodule is replaced, which torch tells (see `replaced`).  Whatever else is on the way may be
    replaced unnoticed: vLLM 0.32's CPU layers keep packed weights in the closure of an attribute, and make a new one
    when weights are loaded again.
    """
    end = 0
    while path[end : end + 1] == ["._modules"] and len(path) > end + 2:
        end += 2
    if path[end : end + 1] in (["._parameters"], ["._buffers"]) and len(path) == end + 2:
        end += 1
    return end


def binder(expressions: Sequence[str | None]) -> str:
    """Source of `bind(root, fixed)`, which gives a function `read()` that gives the values of `expressions`.

    `root` is the one local that all start from; `fixed` has the values for the places that are None.  `bind` walks to
    the modules that hold the values, once; `read` takes the last steps, each time: a parameter or attribute that was
    replaced is seen, and 546 parameters of 80 layers take 0.02 ms.
    Raises `NotOnce` when they start from several locals.
    """
    top = _Owner()
    locals_: set[str] = set()
    result = [""] * len(expressions)
    for place, expression in enumerate(expressions):
        if expression is None:
            continue
        local, path = steps(expression)
        locals_.add(local)
        node, end = top, _found_once(path)
        for step in path[:end]:
            node = node.longer.setdefault(step, _Owner())
        node.leaves.append((place, "".join(path[end:])))
    if len(locals_) > 1:
        raise NotOnce(f"extras of several locals: {', '.join(sorted(locals_))}")
    lines = ["def bind(root, fixed):"]
    for number, place in enumerate(place for place, expression in enumerate(expressions) if expression is None):
        lines.append(f"    f{number} = fixed[{number}]")
        result[place] = f"f{number}"
    names = 0

    def visit(node: _Owner, text: str) -> None:
        nonlocal names
        if text != "root" and (node.leaves or len(node.longer) > 1):
            lines.append(f"    x{names} = {text}")
            text = f"x{names}"
            names += 1
        for place, rest in node.leaves:
            result[place] = text + rest
        for step, longer in node.longer.items():
            visit(longer, text + step)

    visit(top, "root")
    return "\n".join([*lines, "    def read():", f"        return [{', '.join(result)}]", "    return read", ""])
