from __future__ import annotations

import dataclasses
import marshal
import math
import sys
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext.program import NotKept
from vllm_compile_ext.program.program import Bytecode

LIMIT = 3


def traced(self: Any, x: int, y: int = 2) -> Any:
    inner = lambda: alias.sqrt(16)  # type: ignore[name-defined]  # noqa: E731, F821
    return backend_0(self, x, y), helper(x), number + LIMIT, inner()  # type: ignore[name-defined]  # noqa: F821


def helper(x: int) -> int:
    return -x


def capture(**changes: Any) -> Bytecode:
    parts: dict[str, Any] = dict(
        bytecode=traced.__code__,
        import_sources={"alias": "math", "unused": "no.such.module"},
        used_globals={"helper": helper, "number": 40, "alias2": math},
        argdefs=(2,),
        kwdefaults=None,
        external_refs={"LIMIT"},
    )
    return Bytecode.capture(SimpleNamespace(**(parts | changes)), "backend_0")


def test_round_trip() -> None:
    code = Bytecode.loads(capture().dumps())
    function = code.function(lambda *args: args, FunctionType(helper.__code__, {"LIMIT": LIMIT}))
    assert function("self", 1) == (("self", 1, 2), -1, 43, 4.0)
    assert "unused" not in code.imports, "only what the bytecode names is imported"


def test_the_closure_is_that_of_the_function_that_was_traced() -> None:
    def around(value: int) -> Any:
        return lambda x: x + value

    code = dataclasses.replace(Bytecode.loads(capture(bytecode=around(1).__code__).dumps()), needed=())
    assert code.function(print, around(2))(40) == 42
    with pytest.raises(LookupError, match="the closure over value"):
        code.function(print, FunctionType(helper.__code__, {}))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"used_globals": {"helper": lambda x: x}}, "the global helper, a function without a name"),
        ({"used_globals": {"number": object()}}, "the global number"),
        ({"argdefs": (object(),)}, "the default"),
        ({"kwdefaults": {"z": object()}}, "the default"),
        ({"bytecode": traced.__code__.replace(co_consts=(object(),))}, "a constant of the bytecode"),
    ],
)
def test_what_has_no_name_is_not_kept(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(NotKept, match=what):
        capture(**changes).dumps()


def test_another_pythons_bytecode_is_refused() -> None:
    _, *parts = marshal.loads(capture().dumps())
    with pytest.raises(ValueError, match=r"bytecode of Python cpython-399 0x3990000"):
        Bytecode.loads(marshal.dumps(("cpython-399 0x3990000", *parts)))


def test_what_is_gone_is_an_error() -> None:
    bare = FunctionType(helper.__code__, {})
    with pytest.raises(LookupError, match="LIMIT"):
        capture().function(print, bare)
    with pytest.raises(ImportError, match="no"):
        capture(import_sources={"alias": "no.such.module"}).function(print, bare)


def test_a_global_of_a_module_that_is_named_by_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers names those of ``--trust-remote-code``."""
    module = ModuleType("remote.0a1b")
    made = FunctionType(helper.__code__, {}, "made")
    made.__module__, module.made = module.__name__, made  # type: ignore[attr-defined]
    made.__qualname__ = "made"
    monkeypatch.setitem(sys.modules, "remote", ModuleType("remote"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert capture(used_globals={"helper": made, "number": 40}).named["helper"] == (module.__name__, "made")
