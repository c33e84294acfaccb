from __future__ import annotations

import dataclasses
import marshal
import math
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext.program import transformed
from vllm_compile_ext.program.transformed import NotSaved

LIMIT = 3


def traced(self: Any, x: int, y: int = 2) -> Any:
    inner = lambda: alias.sqrt(16)  # type: ignore[name-defined]  # noqa: E731, F821
    return backend_0(self, x, y), helper(x), number + LIMIT, inner()  # type: ignore[name-defined]  # noqa: F821


def helper(x: int) -> int:
    return -x


def environment(**changes: Any) -> Any:
    parts = dict(
        bytecode=traced.__code__,
        import_sources={"alias": "math", "unused": "no.such.module"},
        used_globals={"helper": helper, "number": 40, "alias2": math},
        closure=(),
        argdefs=(2,),
        kwdefaults=None,
        external_refs={"LIMIT"},
    )
    return SimpleNamespace(**(parts | changes))


def of(**around: Any) -> FunctionType:
    """A function that was traced, with these globals."""
    return FunctionType(helper.__code__, around)


def test_the_closure_is_that_of_the_function_that_was_traced() -> None:
    def around(value: int) -> Any:
        return lambda x: x + value

    code = transformed.loads(transformed.dumps(transformed.capture(environment(bytecode=around(1).__code__), "b")))
    code = dataclasses.replace(code, around=())
    assert code.function(print, around(2))(40) == 42
    with pytest.raises(LookupError, match="the closure over value"):
        code.function(print, of())


def test_round_trip() -> None:
    code = transformed.loads(transformed.dumps(transformed.capture(environment(), "backend_0")))
    function = code.function(lambda *args: args, of(LIMIT=LIMIT))
    assert function("self", 1) == (("self", 1, 2), -1, 43, 4.0)
    assert "unused" not in code.imports, "only what the bytecode names is imported"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"used_globals": {"helper": lambda x: x}}, "the global helper, a function without a name"),
        ({"used_globals": {"number": object()}}, "the global number"),
        ({"argdefs": (object(),)}, "the default"),
        ({"kwdefaults": {"z": object()}}, "the default"),
    ],
)
def test_what_has_no_name_is_not_saved(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(NotSaved, match=what):
        transformed.capture(environment(**changes), "backend_0")


def test_a_constant_without_bytes_is_not_saved() -> None:
    code = traced.__code__.replace(co_consts=(*traced.__code__.co_consts, object()))
    with pytest.raises(NotSaved, match="a constant of the bytecode"):
        transformed.dumps(transformed.capture(environment(bytecode=code), "backend_0"))


def test_another_pythons_bytecode_is_refused() -> None:
    data = transformed.dumps(transformed.capture(environment(), "backend_0"))
    with pytest.raises(ValueError, match=r"bytecode of Python cpython-399 0x3990000"):
        transformed.loads(marshal.dumps(("cpython-399 0x3990000", *marshal.loads(data)[1:])))


def test_a_global_that_is_gone_is_an_error() -> None:
    code = transformed.capture(environment(), "backend_0")
    with pytest.raises(LookupError, match="LIMIT"):
        code.function(print, of())


def test_a_module_that_is_gone_is_an_error() -> None:
    code = transformed.capture(environment(import_sources={"alias": "no.such.module"}), "backend_0")
    with pytest.raises(ImportError):
        code.function(print, of())
