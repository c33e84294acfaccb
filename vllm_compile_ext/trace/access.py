"""Access expressions: chains such as `L['self']._modules['layers']._modules['0'].scale`, over L, a frame's locals."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from vllm_compile_ext.trace.bodies import NotOnce


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


class _Prefix:
    """What some expressions have in common.  places: of the expressions that end here."""

    def __init__(self) -> None:
        self.longer: dict[str, _Prefix] = {}
        self.places: list[int] = []


def reader(expressions: Sequence[str | None]) -> str:
    """Source of `read(root, fixed)`, which evaluates `expressions` anew at each call and gives their values.

    `root` is the one local that all start from; `fixed` has the values for the places that are None.  What several have
    in common is evaluated once a call: 546 parameters of 80 layers take about 0.06 ms.  Nothing on the way is
    remembered: a parameter, an attribute, a closure or a module may be replaced in ways that nobody is told of.
    Raises `NotOnce` when they start from several locals.
    """
    top = _Prefix()
    locals_: set[str] = set()
    result = [""] * len(expressions)
    fixed = 0
    for place, expression in enumerate(expressions):
        if expression is None:
            result[place] = f"fixed[{fixed}]"
            fixed += 1
            continue
        local, path = steps(expression)
        locals_.add(local)
        node = top
        for step in path:
            node = node.longer.setdefault(step, _Prefix())
        node.places.append(place)
    if len(locals_) > 1:
        raise NotOnce(f"extras of several locals: {', '.join(sorted(locals_))}")
    lines = ["def read(root, fixed):"]
    names = 0

    def visit(node: _Prefix, text: str) -> None:
        nonlocal names
        if text != "root" and len(node.longer) + len(node.places) > 1:
            lines.append(f"    x{names} = {text}")
            text = f"x{names}"
            names += 1
        for place in node.places:
            result[place] = text
        for step, longer in node.longer.items():
            visit(longer, text + step)

    visit(top, "root")
    return "\n".join([*lines, f"    return [{', '.join(result)}]", ""])
