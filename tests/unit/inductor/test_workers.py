"""C++ kernels that compile in threads while Inductor goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache

from vllm_compile_ext.inductor import workers

# A module as Inductor generates it: kernels are globals, and a second name may hold one too.
MODULE = """
first = async_compile.cpp_pybinding(['float*'], 'one')
second = async_compile.cpp_pybinding(['float*'], 'two')
def call():
    return first(1), second(2)
"""


class Gxx:
    """Stands in for the compiler: waits until `go`, then gives a kernel, or an error for a source in `bad`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.bad: set[str] = set()
        self.seen: list[str] = []

    def load(self, argtypes: list[str], source: str, submit_fn: Callable[..., Any]) -> Callable[[], Any]:
        future = submit_fn(self.compile, source)
        return lambda: future.result()

    def compile(self, source: str) -> Callable[..., Any]:
        assert self.go.wait(10)
        self.seen.append(source)
        if source in self.bad:
            raise SyntaxError(source)
        return lambda x: (source, x)


@pytest.fixture
def gxx(monkeypatch: pytest.MonkeyPatch) -> Gxx:
    compiler = Gxx()
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding_async", compiler.load)
    return compiler


def generated() -> dict[str, Any]:
    module: dict[str, Any] = {"async_compile": AsyncCompile()}
    exec(MODULE, module)
    return module


def test_the_real_kernels_replace_the_stand_ins_in_the_module(gxx: Gxx) -> None:
    with workers.compiling(1) as kernels:
        module = generated()  # does not wait for the compiler
        assert gxx.seen == []
        gxx.go.set()
        assert module["call"]() == (("one", 1), ("two", 2)), "a stand-in works before the wait"
        kernels.wait()
        assert not any(isinstance(value, workers._StandIn) for value in module.values())
        assert module["call"]() == (("one", 1), ("two", 2))
    assert gxx.seen == ["one", "two"], "one worker compiles in order"


def test_the_first_error_of_the_compiler_is_raised(gxx: Gxx) -> None:
    gxx.bad = {"one", "two"}
    gxx.go.set()
    with workers.compiling(2) as kernels:
        generated()
        with pytest.raises(SyntaxError, match="one"):
            kernels.wait()


def test_inductor_is_as_before_and_waiting_kernels_are_dropped_after_an_error(gxx: Gxx) -> None:
    stock = AsyncCompile.__dict__["cpp_pybinding"]
    with suppress(ZeroDivisionError), workers.compiling(1):
        assert AsyncCompile.__dict__["cpp_pybinding"] is not stock
        generated()
        threading.Timer(0.1, gxx.go.set).start()
        raise ZeroDivisionError
    assert AsyncCompile.__dict__["cpp_pybinding"] is stock
    assert gxx.seen == ["one"], "the kernel that no worker had begun is not compiled"


def test_one_worker_for_each_core_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 7})
    monkeypatch.delenv("VLLM_COMPILE_WORKERS", raising=False)
    config = SimpleNamespace(additional_config={})
    assert workers.wanted(config) == 3
    monkeypatch.setenv("VLLM_COMPILE_WORKERS", "2")
    assert workers.wanted(config) == 2
    monkeypatch.delenv("VLLM_COMPILE_WORKERS")
    assert workers.wanted(SimpleNamespace(additional_config={"compile_ext": {"workers": 5}})) == 5
