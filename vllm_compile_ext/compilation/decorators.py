"""`vllm.compilation.decorators`: upstream's, with the store in place of its folder of artifacts.

What upstream's path compiles (`rules.why_upstream`, or trace-once gave up) upstream also keeps and loads, where and how
it does without us.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vllm_compile_ext import harmless
from vllm_compile_ext.compilation import entry as entries
from vllm_compile_ext.compilation import functions, outcomes, rules, scratch
from vllm_compile_ext.compilation.entry import Entry
from vllm_compile_ext.compilation.wrapper import inspect_bytecode
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.printable import plain
from vllm_compile_ext.program import program
from vllm_compile_ext.program.transformed import NotSaved
from vllm_compile_ext.record import metrics
from vllm_compile_ext.record.spans import note, span
from vllm_compile_ext.store.files import DamagedError
from vllm_compile_ext.store.store import Manifest, total
from vllm_compile_ext.upstream import decorators as upstream

logger = logging.getLogger(__name__)

_upstream_load = upstream._try_load_aot_compiled_fn
_upstream_decorate = upstream._support_torch_compile


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


LOADING = "load compiled code"  # the phase
IN_UPSTREAMS_CACHE = "it was not traced once, and is kept in vLLM's own cache and not in the store"


class _Miss(Exception):  # noqa: N818 - leaves the timer without a line about a load
    pass


def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any | None:
    """Load what an earlier start compiled; None, after a line that says why, when the model has to be compiled.

    Then this process is the one that compiles it, unless it waited in vain for another one.
    Under ``VLLM_FORCE_AOT_LOAD=1`` a miss raises, as it does upstream.
    """
    import vllm.envs

    if rules.why_upstream(model.vllm_config) is not None:
        return _upstream_load(model, aot_compilation_path)
    try:
        with span("compute key", LOADING):
            entry = entries.of(model)
    except Exception as error:
        logger.warning("nothing is loaded or kept: no key (%s)", plain(harmless.error(error)))
        logger.debug("no key", exc_info=True)
        entry = None
    path = Path(aot_compilation_path)
    if entry is None:
        loaded = _load_from_upstream(model, path)
        if loaded is None and vllm.envs.VLLM_FORCE_AOT_LOAD:
            raise FileNotFoundError("VLLM_FORCE_AOT_LOAD=1, but there is no store to load from: see the line above")
        return loaded
    note("key", model=entry.model, key=entry.key, shard=entry.shard)
    loaded = _load(entry, model, path)
    if loaded is not None:
        return loaded
    why = entry.miss()
    metrics.inc("store_misses_total")
    if vllm.envs.VLLM_FORCE_AOT_LOAD:
        raise FileNotFoundError(f"VLLM_FORCE_AOT_LOAD=1, but {why} (store {entry.store.root}, key {entry.key[:12]})")
    logger.info("%s%s", entry.tag, why)
    note("miss", model=entry.model, key=entry.key, shard=entry.shard, why=why)
    try:
        with span("wait for another process", LOADING, wait=True):
            waited = entry.claim()
        if waited:
            loaded = _load(entry, model, path)  # by the process that was waited for
    except Exception as error:
        logger.warning("%snot waiting for other processes: %s", entry.tag, harmless.error(error))
    if loaded is not None:
        entry.release()
        return loaded
    setattr(model, entries.NAME, entry)
    functions.belong_to(entry.key, entry.model)
    return None


def _timed(model: Any) -> AbstractContextManager[None]:
    """Upstream's "torch.compile took", for a load."""
    from vllm.compilation.monitor import monitor_torch_compile

    about = {"is_encoder": model._is_encoder, "tag": getattr(model, "_compile_tag", "")}
    timer: AbstractContextManager[None] = monitor_torch_compile(model.vllm_config, announce_start=False, **about)
    return timer


def _load(entry: Entry, model: Any, path: Path) -> Any | None:
    with span("load", LOADING, model=entry.model, key=entry.key):
        loaded = _load_from_store(entry, model, path)
        if loaded is None:
            loaded = _load_from_upstream(model, path)
            if loaded is not None:
                _tell(entry, "failed", IN_UPSTREAMS_CACHE)
        return loaded


def _load_from_upstream(model: Any, path: Path) -> Any | None:
    """What an earlier start compiled and kept as stock does it, because trace-once gave up on this model."""
    if sys.flags.optimize or not path.exists():
        return None
    workers.wait()
    return _upstream_load(model, os.fspath(path))


def _load_from_store(entry: Entry, model: Any, path: Path) -> Any | None:
    begin = time.perf_counter()
    try:
        with _timed(model):
            with span("look up"):
                manifest = entry.find(model)
            if manifest is None:
                raise _Miss
            loaded = _loaded(entry, manifest, model, path)
        entry.store.use(manifest)
    except _Miss:
        return None
    except Exception as error:  # whatever it is, compiling again is the way out
        known = isinstance(error, DamagedError | OSError)
        why = str(error) if known else harmless.error(error)
        logger.warning("%scompiling again: %s", entry.tag, why)
        note("fallback", model=entry.model, key=entry.key, why=f"compiling again: {why}")
        logger.debug("loading failed", exc_info=True)
        return None
    spent = time.perf_counter() - begin
    logger.info("%sloaded compiled code %s of %s (%.1f ms)", entry.tag, entry.key[:12], entry.store.root, spent * 1000)
    metrics.inc("store_hits_total")
    metrics.inc("store_load_seconds_total", spent)
    _tell(entry, "found")
    size, count = total(manifest.members.values()), _pieces(manifest.members)
    metrics.inc("store_loaded_bytes_total", size)
    note("loaded", model=entry.model, key=entry.key, pieces=count, bytes=size, seconds=round(spent, 4))
    return loaded


def _pieces(members: Iterable[str]) -> int:
    return sum(name.startswith("piece/") for name in members)


def _loaded(entry: Entry, manifest: Manifest, model: Any, path: Path) -> Any:
    from vllm.compilation.counter import compilation_counter

    function, code = program.load(entry.store, manifest, model)
    compilation_counter.num_aot_artifacts_loaded += 1
    pieces = _pieces(manifest.members)
    compilation_counter.num_compiled_artifacts_loaded += pieces
    metrics.inc("pieces_loaded_total", pieces)
    inspect_bytecode(model, code, path)
    functions.belong_to(manifest.key, entry.model)
    return function


def _tell(entry: Entry, what: outcomes.What, why: str = "") -> None:
    outcomes.tell(outcomes.Outcome(what, entry.key, entry.shard, entry.model, why))


def _save(model: Any, upstream_save: Callable[[Any], None]) -> None:
    """Keep what was compiled, in place of upstream's `save_aot_compiled_function`."""
    entry: Entry | None = model.__dict__.get(entries.NAME)
    try:
        if not program.is_ours(model.aot_compiled_fn):
            if rules.why_upstream(model.vllm_config) is not None or not sys.flags.optimize:
                upstream_save(model)
            if entry is not None:
                _tell(entry, "failed", IN_UPSTREAMS_CACHE)
        elif entry is not None and entry.store.writable:
            _keep(entry, model)
    finally:
        entries.release(model)


def _keep(entry: Entry, model: Any) -> None:
    """Write the entry; a failure costs a line."""
    from vllm.compilation.counter import compilation_counter

    try:
        compiled = model.aot_compiled_fn
        with span("save", "compile", model=entry.model):
            members = program.keep(entry.store, compiled)
            entry.commit(members)
        compilation_counter.num_aot_artifacts_saved += 1
        compilation_counter.num_compiled_artifacts_saved += _pieces(members)
        size = total(members.values())
        metrics.inc("store_kept_bytes_total", size)
        logger.info("%skept as %s in %s (%.1f MB)", entry.tag, entry.key[:12], entry.store.root, size / 1e6)
        _tell(entry, "kept")
        count = _pieces(members)
        note("kept", model=entry.model, key=entry.key, pieces=count, bytes=size)
    except Exception as error:
        why = str(error) if isinstance(error, NotSaved | OSError) else harmless.error(error)
        logger.warning("%snot kept, the next start compiles again: %s", entry.tag, why)
        logger.debug("saving failed", exc_info=True)
        metrics.inc("store_failures_total")
        _tell(entry, "failed", why)
        note("fallback", model=entry.model, key=entry.key, why=f"not kept: {why}")


@functools.cache
def _freeze_imports() -> None:
    """Once, before the first model of this process."""
    # While an engine starts, vLLM 0.32.0 collects garbage up to 17 times (memory profiling, the model runner), 0.1 to
    # 0.6 s each for all that the imports made.  That stays; vLLM freezes it too, at the end of its start.
    if multiprocessing.parent_process() is None:
        gc.collect()  # a user's program may have garbage that must not stay
    gc.freeze()


def _support_torch_compile(cls: type, *args: Any, **kwargs: Any) -> type:
    _freeze_imports()
    decorated: Any = _upstream_decorate(cls, *args, **kwargs)
    upstream_save = decorated.save_aot_compiled_function
    decorated.save_aot_compiled_function = lambda model: _save(model, upstream_save)
    return decorated  # type: ignore[no-any-return]


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
        return os.fspath(scratch.folder())


# `upstream` is this plugin's own copy of the module (see swap.py): vLLM's is not touched.
upstream._try_load_aot_compiled_fn = _try_load_aot_compiled_fn
upstream._support_torch_compile = _support_torch_compile
upstream.envs = _Environment()
