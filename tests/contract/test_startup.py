"""What the record of a start relies on in the installed vLLM, read from its source."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from vllm_compile_ext.record import hooks, names


def source(module: str) -> ast.Module:
    root = importlib.util.find_spec("vllm")
    assert root is not None
    assert root.origin is not None
    path = Path(root.origin).parent.parent.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return ast.parse((file if file.exists() else path / "__init__.py").read_text())


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: f"{hook.where}.{hook.what}")
def test_what_is_hooked_is_there(hook: hooks.Hook) -> None:
    body: list[ast.stmt] = source(hook.where).body
    *outer, name = hook.what.split(".")
    for part in outer:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == part).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    imported = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in functions | imported


def test_every_span_of_vllm_has_a_phase() -> None:
    root = importlib.util.find_spec("vllm")
    assert root is not None
    assert root.origin is not None
    found = set()
    for path in Path(root.origin).parent.rglob("*.py"):
        if "instrument(span_name=" in (text := path.read_text(errors="replace")):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            keywords = [word for call in calls for word in call.keywords if word.arg == "span_name"]
            found |= {word.value.value for word in keywords if isinstance(word.value, ast.Constant)}
    assert found - {""} == names.PHASES.keys()


def test_the_tracing_module_has_what_is_replaced() -> None:
    tree = source("vllm.tracing.otel")
    text = ast.unparse(tree)
    for used in ("trace.get_tracer(", "TracerProvider(resource=", ".add_span_processor(", "set_tracer_provider("):
        assert used in text
