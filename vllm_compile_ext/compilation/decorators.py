"""`vllm.compilation.decorators`: upstream's, with the store in place of its folder of artifacts (`start.py`)."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm_compile_ext import temporary
from vllm_compile_ext.compilation import start
from vllm_compile_ext.upstream import decorators as upstream

_upstream_load = upstream._try_load_aot_compiled_fn
_upstream_decorate = upstream._support_torch_compile


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any | None:
    return start.load(model, Path(aot_compilation_path), _upstream_load)


def _support_torch_compile(cls: type, *args: Any, **kwargs: Any) -> type:
    _freeze_imports()
    decorated: Any = _upstream_decorate(cls, *args, **kwargs)
    if "save_as_stock" not in vars(decorated):  # a class may be decorated twice
        decorated.save_as_stock = decorated.save_aot_compiled_function
        decorated.save_aot_compiled_function = lambda model: None  # `start.compile_and_keep` has kept it
    return decorated  # type: ignore[no-any-return]


@functools.cache
def _freeze_imports() -> None:
    """Once, before the first model of this process."""
    # While an engine starts, vLLM 0.32.0 collects garbage up to 17 times (memory profiling, the model runner), 0.1 to
    # 0.6 s each for all that the imports made.  That stays; vLLM freezes it too, at the end of its start.
    if multiprocessing.parent_process() is None:
        gc.collect()  # a user's program may have garbage that must not stay
    gc.freeze()


class _Environment:
    """`vllm.envs` for upstream's decorator, with a cache root that can be written."""

    def __getattr__(self, name: str) -> Any:
        import vllm.envs

        value = getattr(vllm.envs, name)
        return _writable(value) if name == "VLLM_CACHE_ROOT" else value


@functools.cache  # upstream asks at each call of a model that is never compiled
def _writable(root: str) -> str:
    """`root`, or this process's scratch folder: upstream makes folders there before it looks for an artifact."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        return os.fspath(temporary.scratch())


# `upstream` is this plugin's own copy of the module: vLLM's is not touched.
upstream._try_load_aot_compiled_fn = _try_load_aot_compiled_fn
upstream._support_torch_compile = _support_torch_compile
upstream.envs = _Environment()
