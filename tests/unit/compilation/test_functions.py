"""Functions that are compiled beside models: kept, found by what they are, and right in every start."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.decorators import mark_unbacked

from vllm_compile_ext.compilation import functions, hooks
from vllm_compile_ext.key import machine
from vllm_compile_ext.program import open_store
from vllm_compile_ext.store.store import Manifest
from vllm_compile_ext.trace.fingerprint import Unfingerprintable

PROGRAM, OTHER = "1" * 64, "2" * 64


def _ranks(x: torch.Tensor, values: torch.Tensor) -> Any:  # as vLLM counts them
    torch._check(x.shape[0] >= 1)
    torch._check(x.shape[0] == values.shape[0])
    return (x >= values).sum(-1)


def _softmax(x: torch.Tensor, k: int) -> Any:
    return (x.softmax(-1) * k)[:, ::2].cumsum(-1)


def _mutates(x: torch.Tensor) -> Any:
    x.add_(1)
    return x * 2, x


def _views(x: torch.Tensor) -> Any:
    y = x.sin()
    return x.view(-1), y[1:], y, y


def _data(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


X = _data(4, 6)
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, check_stride=True)


def _of_any_batch(count: int) -> tuple[Any, ...]:
    made = _data(count, 64), _data(count, 1)
    for tensor in made:
        mark_unbacked(tensor, 0)
    return made


CASES: dict[str, tuple[Callable[..., Any], bool | None, list[Callable[[], tuple[Any, ...]]]]] = {
    "any batch": (_ranks, None, [lambda: _of_any_batch(3), lambda: _of_any_batch(1), lambda: _of_any_batch(70)]),
    "static, then dynamic": (_ranks, None, [lambda: (_data(3, 64), _data(3, 1)), lambda: (_data(9, 64), _data(9, 1))]),
    "sizes": (_softmax, True, [lambda: (_data(3, 48), 3), lambda: (_data(8, 128), 7)]),
    "mutates": (_mutates, True, [lambda: (X.clone(),)]),
    "views": (_views, False, [lambda: (X,)]),
}


class Starts:
    """Runs functions as successive starts do, each with what the store has."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled = 0
        monkeypatch.setenv("VLLM_COMPILE_STORE", str(folder))
        self.wrapper = torch._TorchCompileInductorWrapper
        stock = self.wrapper.__call__

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.compiled += 1
            return stock(*args, **kwargs)

        self.counted, self.hooked = counted, hooks.look_up_functions(counted)
        monkeypatch.setattr(self.wrapper, "__call__", self.hooked)
        monkeypatch.setattr(functions, "_models", {PROGRAM: "model"})

    def run(
        self, function: Callable[..., Any], calls: list[Callable[[], Any]], *, stock: bool = False, **options: Any
    ) -> list[Any]:
        """What each call gives, and its arguments afterwards."""
        self.wrapper.__call__ = self.counted if stock else self.hooked
        torch._dynamo.reset()
        self.compiled = 0
        code = torch.compile(function, backend="inductor", **options)
        with torch.no_grad():
            return [(code(*args), args) for args in (call() for call in calls)]

    def kept(self) -> list[Manifest]:
        store = open_store()
        assert store is not None
        return sorted(store.manifests(), key=lambda manifest: manifest.created)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    yield Starts(tmp_path / "store", monkeypatch)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_the_next_start_loads_it_and_the_answers_are_stocks(case: str, starts: Starts) -> None:
    function, dynamic, calls = CASES[case]
    stock = starts.run(function, calls, dynamic=dynamic, stock=True)
    graphs = starts.compiled
    same(starts.run(function, calls, dynamic=dynamic), stock)
    assert starts.compiled == len(starts.kept()) == graphs
    same(starts.run(function, calls, dynamic=dynamic), stock)
    assert starts.compiled == 0
    assert all(made.factors == {"program": PROGRAM} and made.model == "model" for made in starts.kept())


def test_what_compiling_assumed_of_sizes_is_guarded_where_it_was_loaded(starts: Starts) -> None:
    """Inductor sums up to 4096 elements in another way than more (torch 2.13.0, `codegen/cpp.py`)."""
    small, large = (lambda: (_data(3, 48), 3)), (lambda: (_data(3, 5000), 3))
    expected = starts.run(_softmax, [small, large], dynamic=True)
    assert starts.compiled == 2
    first, second = starts.kept()
    assert (first.key == second.key, first.shard == second.shard) == (True, False)
    same(starts.run(_softmax, [small, large], dynamic=True), expected)
    assert starts.compiled == 0
    same(starts.run(_softmax, [large], dynamic=True), expected[1:])
    assert starts.compiled == 0
    starts.run(_softmax, [lambda: (_data(3, 4999), 3)], dynamic=True)
    assert starts.compiled == 0


@pytest.mark.parametrize(
    ("function", "options", "dtype"),
    [
        (lambda x: x.sin() * 3, {}, torch.float32),
        (lambda x: x.sin() * 2.0, {}, torch.float32),
        (lambda x: x.cos() * 2, {}, torch.float32),
        (lambda x: x.sin() * 2, {}, torch.float64),
        (lambda x: x.sin() * 2, {"options": {"cpp.min_chunk_size": 1}}, torch.float32),
        (lambda x: x.sin() * 2, {"dynamic": True}, torch.float32),
    ],
)
def test_another_graph_is_not_taken_for_it(
    starts: Starts, function: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    starts.run(lambda x: x.sin() * 2, [lambda: (X,)])
    ((found, (x,)),) = starts.run(function, [lambda: (X.to(dtype),)], **options)
    assert starts.compiled == 1
    assert torch.allclose(found, function(x))


def test_what_was_switched_in_torch_since_is_in_the_key(starts: Starts) -> None:
    starts.run(torch.sin, [lambda: (X,)])
    before = torch.are_deterministic_algorithms_enabled()  # other tests of this process may have switched it on
    torch.use_deterministic_algorithms(not before)
    try:
        starts.run(torch.sin, [lambda: (X,)])
    finally:
        torch.use_deterministic_algorithms(before)
    assert starts.compiled == 1


@torch.library.custom_op("functions_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """Python that a graph does not show."""
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        (lambda x: torch.ops.functions_test.twice(x.sin()), lambda: (X,)),
        (lambda x, y: (x.add_(1), y * 2), lambda: (X, X[1:])),
    ],
    ids=["operator", "views of one"],
)
def test_what_cannot_be_told_is_compiled_in_every_start(
    starts: Starts, function: Callable[..., Any], call: Callable[[], Any]
) -> None:
    for _ in range(2):
        starts.run(function, [call])
        assert starts.compiled == 1
    assert starts.kept() == []


def test_a_graph_that_does_not_say_what_its_inputs_are_is_not_told_from_others() -> None:
    graph = torch.fx.symbolic_trace(lambda x: (x.sin(),))
    with pytest.raises(Unfingerprintable, match="not described"), torch.no_grad():
        functions._describe(graph, [X], {})


def test_what_is_trained_is_stocks(starts: Starts) -> None:
    weight = torch.ones(6, requires_grad=True)
    torch.compile(lambda x: (x * weight).sum(), backend="inductor")(X).backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, X.sum(0))
    assert starts.kept() == []


@pytest.mark.parametrize("why", ["no program", "read-only", "full disk", "saved ahead of time"])
def test_where_nothing_can_be_kept_it_is_compiled(starts: Starts, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    store = open_store()
    assert store is not None
    match why:
        case "no program":
            functions._models.clear()
        case "read-only":
            monkeypatch.setattr(store, "writable", False)
        case "full disk":
            monkeypatch.setattr(store, "put", lambda data: 1 / 0)
    with torch._functorch.config.patch(bypass_autograd_cache_key=why == "saved ahead of time"):
        ((found, _),) = starts.run(torch.sin, [lambda: (X,)])
    assert torch.allclose(found, X.sin())
    assert starts.compiled == 1
    assert starts.kept() == []


def test_a_function_is_kept_for_each_program_of_the_process(starts: Starts) -> None:
    functions.keep_for(OTHER, "draft")
    starts.run(torch.sin, [lambda: (X,)])
    assert {(made.factors["program"], made.model) for made in starts.kept()} == {(PROGRAM, "model"), (OTHER, "draft")}
    functions._models.pop(PROGRAM)
    starts.run(torch.sin, [lambda: (X,)])
    assert starts.compiled == 0


def test_a_damaged_one_is_compiled_again(starts: Starts, caplog: pytest.LogCaptureFixture) -> None:
    (expected,) = starts.run(torch.sin, [lambda: (X,)])
    (made,) = starts.kept()
    store = open_store()
    assert store is not None
    store.path(made.members["code"]).write_bytes(b"")
    same(starts.run(torch.sin, [lambda: (X,)]), [expected])
    assert starts.compiled == 1
    assert "compiling a function again: " in caplog.text
    starts.run(torch.sin, [lambda: (X,)])
    assert starts.compiled == 0


def test_without_a_compiler_it_is_loaded_or_runs_as_it_is(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    functions._say_uncompiled.cache_clear()
    (expected,) = starts.run(torch.sin, [lambda: (X,)])
    monkeypatch.setattr(machine, "compiler", lambda: "none")
    with caplog.at_level(logging.INFO):
        same(starts.run(torch.sin, [lambda: (X,)]), [expected])
        assert "uncompiled" not in caplog.text
        for function in (torch.cos, lambda x: _softmax(x, 3)):
            ((found, (x,)),) = starts.run(function, [lambda: (X,)])
            assert torch.equal(found, function(x))
    assert starts.compiled == 0
    assert len(starts.kept()) == 1
    assert caplog.text.count("run uncompiled") == 1
