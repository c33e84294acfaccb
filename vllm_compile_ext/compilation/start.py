"""One start of one model: its code is loaded, or else traced, compiled and kept.

vLLM's decorator (0.32.0, `compilation/decorators.py`) asks twice when a model is called first.  `load`: code for what
is here now, or None; then this process is the one that compiles it.  `compile_and_keep`: trace each kind of layer once,
compile each distinct piece once, write the entry.  What is not traced once (`rules.why_upstream`, or trace-once gave
up) upstream keeps and loads, where and how it does without us.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.compilation import functions, rules
from vllm_compile_ext.compilation.entry import Entry, store
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.program import NotKept, dump, program
from vllm_compile_ext.record.events import event
from vllm_compile_ext.record.spans import span
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.files import DamagedError
from vllm_compile_ext.store.store import total

logger = logging.getLogger(__name__)

ENTRY = "_compile_ext_entry"  # the attribute of a model that holds its entry while it compiles
LOADING = "load compiled code"  # the phase
IN_STOCKS_CACHE = "it was not traced once, and is kept in vLLM's own cache and not in the store"


def load(model: Any, path: Path, stock: Callable[[Any, str], Any | None]) -> Any | None:
    """Load what an earlier start compiled; None, after a line that says why, when the model has to be compiled.

    Then this process is the one that compiles it, unless it waited in vain for another one.  stock: loads from `path`,
    where upstream keeps the model.  Under ``VLLM_FORCE_AOT_LOAD=1`` a miss raises, as it does upstream.
    """
    import vllm.envs

    if rules.why_upstream(model.vllm_config) is not None:
        return stock(model, os.fspath(path))
    entry = _find_entry(model)
    if entry is None:
        loaded = _load_from_stock(model, path, stock)
        if loaded is None and vllm.envs.VLLM_FORCE_AOT_LOAD:
            raise FileNotFoundError("VLLM_FORCE_AOT_LOAD=1, but there is no store to load from: see the line above")
        return loaded
    if (loaded := _load(entry, model, path, stock)) is not None:
        return loaded
    why = entry.explain_miss()
    event("miss", f"{entry.tag}{why}", why=why, **entry.facts)
    if vllm.envs.VLLM_FORCE_AOT_LOAD:
        raise FileNotFoundError(f"VLLM_FORCE_AOT_LOAD=1, but {why} (store {entry.store.root}, key {entry.key[:12]})")
    with span("wait for another process", LOADING, wait=True):
        waited = entry.claim()
    if waited and (loaded := _load(entry, model, path, stock)) is not None:
        entry.release()
        return loaded
    setattr(model, ENTRY, entry)
    functions.keep_for(entry.key, entry.model)
    return None


def compile_and_keep(model: Any, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compile `model` by `stock`, upstream's `aot_compile`, with identical layers traced once, and keep the result."""
    from vllm_compile_ext.compilation import once

    entry: Entry | None = model.__dict__.pop(ENTRY, None)
    try:
        with span("compile", "compile", model=type(model).__qualname__, tag=getattr(model, "_compile_tag", "")):
            try:
                compiled = once.trace_once(model, entry, stock, args, kwargs)
                if compiled is None:
                    with span("trace every layer"):
                        compiled = stock(*args, **kwargs)
            finally:
                workers.stop()
            artifact = getattr(model, "_aot_compilation_path", None)
            inspect_bytecode(model, compiled._artifacts.runtime_env.bytecode, artifact)  # torch 2.13
        if not program.is_program(compiled):
            _keep_as_stock(entry, model, compiled)
        elif entry is not None and entry.store.writable:
            _keep(entry, compiled)
    finally:
        if entry is not None:
            entry.release()
            evict.keep_limit(entry.store)  # pieces may be kept where the model is not
    return compiled


def _find_entry(model: Any) -> Entry | None:
    """The place of `model` in the store; None, after a line, where nothing is loaded or kept."""
    try:
        with span("compute key", LOADING):
            found = store()
            entry = Entry(found, model) if found is not None else None
    except Exception as error:
        why = f"nothing is loaded or kept: no key ({plain(harmless.error(error))})"
        event("fallback", why, why=why)
        logger.debug("no key", exc_info=True)
        return None
    if entry is not None:
        event("key", f"{entry.tag}the key is {entry.key[:12]} ({entry.shard})", level=logging.DEBUG, **entry.facts)
    return entry


def _load(entry: Entry, model: Any, path: Path, stock: Callable[[Any, str], Any | None]) -> Any | None:
    begin = time.perf_counter()
    with span("load", LOADING, model=entry.model, key=entry.key):
        loaded: Any | None = None
        try:
            with span("look up"):
                manifest = entry.find(model)
            if manifest is not None:
                with _timed(model):
                    loaded, code = program.load(entry.store, manifest, model)
                    inspect_bytecode(model, code, path)
                entry.store.use(manifest)
        except Exception as error:  # whatever it is, compiling again is the way out
            why = f"compiling again: {_why(error, DamagedError)}"
            event("fallback", f"{entry.tag}{why}", why=why, **entry.facts)
            logger.debug("loading failed", exc_info=True)
            manifest = None
        if manifest is None:
            loaded = _load_from_stock(model, path, stock)
            if loaded is not None:
                _say_in_stocks_cache(entry)
            return loaded
    from vllm.compilation.counter import compilation_counter

    seconds, pieces = time.perf_counter() - begin, program.count_pieces(manifest.members)
    compilation_counter.num_aot_artifacts_loaded += 1
    compilation_counter.num_compiled_artifacts_loaded += pieces
    functions.keep_for(manifest.key, entry.model)  # not entry.key: without a compiler, an entry made with any will do
    line = f"{entry.tag}loaded compiled code {entry.key[:12]} of {entry.store.root} ({seconds * 1000:.1f} ms)"
    size = total(manifest.members.values())
    event("loaded", line, pieces=pieces, bytes=size, seconds=round(seconds, 4), **entry.facts)
    return loaded


def _load_from_stock(model: Any, path: Path, stock: Callable[[Any, str], Any | None]) -> Any | None:
    """What an earlier start compiled and kept as stock does it, because trace-once gave up on this model."""
    if sys.flags.optimize or not path.exists():
        return None
    workers.wait()
    return stock(model, os.fspath(path))


def _keep(entry: Entry, compiled: Any) -> None:
    """Write the entry; a failure costs a line."""
    from vllm.compilation.counter import compilation_counter

    try:
        with span("save", "compile", model=entry.model):
            members = program.keep(entry.store, compiled)
            entry.commit(members)
    except Exception as error:
        why = _why(error, NotKept)
        line = f"{entry.tag}not kept, the next start compiles again: {why}"
        event("not kept", line, why=f"not kept: {why}", **entry.facts)
        logger.debug("keeping failed", exc_info=True)
        return
    pieces, size = program.count_pieces(members), total(members.values())
    compilation_counter.num_aot_artifacts_saved += 1
    compilation_counter.num_compiled_artifacts_saved += pieces
    line = f"{entry.tag}kept as {entry.key[:12]} in {entry.store.root} ({size / 1e6:.1f} MB)"
    event("kept", line, pieces=pieces, bytes=size, **entry.facts)


def _keep_as_stock(entry: Entry | None, model: Any, compiled: Any) -> None:
    """Have upstream keep what was not traced once."""
    if rules.why_upstream(model.vllm_config) is not None or not sys.flags.optimize:
        model.aot_compiled_fn = compiled  # upstream sets it afterwards
        type(model).save_as_stock(model)
    if entry is not None:
        _say_in_stocks_cache(entry)


def _say_in_stocks_cache(entry: Entry) -> None:
    event("fallback", f"{entry.tag}{IN_STOCKS_CACHE}", level=logging.INFO, why=IN_STOCKS_CACHE, **entry.facts)


def _why(error: Exception, known: type[Exception]) -> str:
    """What an error says: in full where it is `known` to hold nothing that must not be shown."""
    return str(error) if isinstance(error, known | OSError) else harmless.error(error)


def _timed(model: Any) -> Any:
    """Upstream's "torch.compile took", for a load."""
    from vllm.compilation.monitor import monitor_torch_compile

    tag = getattr(model, "_compile_tag", "")
    return monitor_torch_compile(model.vllm_config, announce_start=False, is_encoder=model._is_encoder, tag=tag)


def inspect_bytecode(model: Any, code: CodeType, artifact: str | Path | None = None) -> None:
    """Check and dump the transformed bytecode `code` of one compiled callable of `model`.

    The dump goes beside `artifact`, the file that the callable is or will be saved in; where upstream keeps its graph
    elsewhere, there too; and into the debug dump folder when one is set.  Raises `RuntimeError` when the code assigns
    module buffers and CUDA graphs are on.
    """
    from vllm.config import CUDAGraphMode

    config = model.vllm_config
    graph = config.compilation_config.local_cache_dir  # None in modes that keep no cache of their own
    folders = [config.compile_debug_dump_path(), graph]
    if artifact is not None:
        beside = Path(artifact).parent
        folders.append(beside)
        if graph and Path(graph).is_relative_to(beside.parent):
            folders.remove(graph)
    name = f"{type(model).__qualname__}.forward [{getattr(model, '_compile_tag', '') or 'model'}]"
    decompiled = settings.load().VLLM_COMPILE_DEPYF
    dump.write([Path(folder) for folder in folders if folder], name, code, decompiled=decompiled)
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        dump.forbid_buffer_assignment(code)
