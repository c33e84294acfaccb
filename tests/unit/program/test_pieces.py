"""Pieces as bytes: what comes back computes what Inductor's own callable does, and no compiler has a part in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import standalone_compile

from vllm_compile_ext.program import pieces

X = torch.arange(24, dtype=torch.float32).reshape(6, 4) / 7


def _constant(x: torch.Tensor) -> Any:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0])


def _mutates(x: torch.Tensor) -> Any:
    x.add_(1)
    return x * 2


def _returns_its_input(x: torch.Tensor) -> Any:
    return x, x.sin()


def _views(x: torch.Tensor) -> Any:
    y = x.sin()
    return x.view(-1), y[1:], y


def _several(x: torch.Tensor) -> Any:
    y = x.cos()
    return y, y, (y @ y.t()).relu()


def _mutates_a_view(x: torch.Tensor) -> Any:
    x[1:].mul_(3)
    return x.sum(0)


def _nothing_to_compile(x: torch.Tensor) -> Any:
    return x @ x.t()


CASES: list[Callable[[torch.Tensor], Any]] = [
    torch.sin, _constant, _mutates, _returns_its_input, _views, _several, _mutates_a_view, _nothing_to_compile,
]  # fmt: skip


def compiled(function: Callable[..., Any], x: torch.Tensor) -> tuple[Any, pieces.Frozen]:
    """What Inductor makes of `function`, as vLLM asks for it, and the same as bytes."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            out = function(x)
            return out if isinstance(out, tuple) else (out,)

    # As `torch._dynamo.aot_compile` sets it around vLLM's backend (torch 2.13.0).
    settings = dict.fromkeys(("bypass_autograd_cache_key", "bundled_autograd_cache", "force_autograd_cache"), True)
    with torch.no_grad(), torch._functorch.config.patch(settings):
        graph = torch.fx.symbolic_trace(Module())
        own = pieces.constants(graph)
        artifact = standalone_compile(graph, [x], dynamic_shapes="from_example_inputs", options={}, aot=True)
    return artifact, pieces.freeze(artifact, own)


def call(piece: Callable[..., Any], x: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """The outputs, and the input afterwards."""
    x = x.clone()
    with torch.inference_mode():
        return list(piece(x)), x


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.__name__.strip("_"))
def piece(request: pytest.FixtureRequest) -> tuple[Any, pieces.Frozen]:
    return compiled(request.param, X.clone())


def test_the_same_results(piece: tuple[Any, pieces.Frozen]) -> None:
    artifact, frozen = piece
    thawed = pieces.thaw(frozen)
    for x in (X, -X, torch.zeros_like(X)):
        for got, expected in zip(call(thawed, x), call(artifact, x), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_an_output_that_is_an_input_or_its_view_stays_one() -> None:
    for function in (_returns_its_input, _views):
        artifact, frozen = compiled(function, X.clone())
        for made in (artifact, pieces.thaw(frozen)):
            x = X.clone()
            with torch.inference_mode():
                out = made(x)
            assert out[0].data_ptr() == x.data_ptr()


def test_an_input_at_an_odd_address() -> None:
    artifact, frozen = compiled(_constant, X.clone())
    thawed = pieces.thaw(frozen)
    odd = torch.zeros(25)[1:].view(6, 4)
    odd.copy_(X)
    torch.testing.assert_close(call(thawed, odd)[0], call(artifact, odd)[0], rtol=0, atol=0)


def test_no_sources_of_kernels_are_kept() -> None:
    _, frozen = compiled(torch.sin, X.clone())
    assert "async_compile" not in frozen.source
    assert "#include" not in frozen.source
    assert [kind for kind, _ in frozen.kernels] == [pieces.CPP]
    assert frozen.kernels[0][1].startswith(b"\x7fELF")
    assert b"at::vec" not in frozen.record


def test_equal_kernels_are_equal_bytes(tmp_path: Path) -> None:
    """Compiled anew in another folder."""
    code = (
        "import sys; from tests.unit.compilation.test_pieces import *\n"
        "from vllm_compile_ext.store.store import digest\n"
        "print('DIGESTS', *[digest(d) for _, d in compiled(torch.sin, X.clone())[1].kernels])"
    )

    def digests(folder: str) -> str:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / folder)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.rpartition("DIGESTS ")[2]

    assert digests("one") == digests("other") != ""


def test_loading_runs_no_compiler(piece: tuple[Any, pieces.Frozen], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile, codecache, cpu_vec_isa

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a compiler")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(async_compile.AsyncCompile, "__init__", refuse)
    monkeypatch.setattr(codecache.CppCodeCache, "load_async", refuse)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", refuse)
    pieces.thaw(piece[1])


def test_what_is_not_known_is_not_frozen() -> None:
    with pytest.raises(pieces.NotFrozen, match="it is a function"):
        pieces.freeze(lambda x: x)
