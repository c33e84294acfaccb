from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_compile_ext import contract


def upstream(a: int, b: int = 0, *, c: int = 0) -> None: ...
def same(a: int, b: int = 0, *, c: int = 0) -> None: ...
def more(a: int, b: int = 0, d: int = 0, *, c: int = 0, e: int = 0) -> None: ...
def anything(*args: Any, **kwargs: Any) -> None: ...
def fewer(a: int, *, c: int = 0) -> None: ...
def renamed(a: int, z: int = 0, *, c: int = 0) -> None: ...
def keyword_gone(a: int, b: int = 0) -> None: ...
def demands(a: int, b: int = 0, *, c: int = 0, d: int) -> None: ...


@pytest.mark.parametrize("ours", [same, more, anything])
def test_every_upstream_call_binds(ours: Callable[..., Any]) -> None:
    assert contract.not_accepted(ours, upstream) is None


@pytest.mark.parametrize("ours", [fewer, renamed, keyword_gone, demands])
def test_a_call_that_would_fail_is_found(ours: Callable[..., Any]) -> None:
    assert contract.not_accepted(ours, upstream)


def test_uses_are_found_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.py").write_text(
        "from vllm.compilation.decorators import support_torch_compile\n"
        "def f():\n    from vllm.compilation import counter\n    import vllm.compilation.monitor\n"
        "    return 'vllm.compilation.cuda_graph.CUDAGraphWrapper'\n"
    )
    (tmp_path / "compilation").mkdir()
    (tmp_path / "compilation" / "caching.py").write_text("from .backends import VllmBackend\nfrom .passes import x\n")
    found = {(use.module, use.name) for use in contract.uses(tmp_path)}
    assert found == {
        ("decorators", "support_torch_compile"),
        ("counter", ""),
        ("monitor", ""),
        ("cuda_graph", "CUDAGraphWrapper"),
        ("backends", "VllmBackend"),
        ("passes", "x"),
    }
