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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.compilation import functions, rules
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.key import factors, machine, misses
from vllm_compile_ext.key.misses import Change, Miss, closest, summary
from vllm_compile_ext.key.seen import Seen, changes
from vllm_compile_ext.program import NotKept, commit, dump, open_store, program
from vllm_compile_ext.record.events import event, span
from vllm_compile_ext.store import evict
from vllm_compile_ext.store.store import Blob, DamagedError, Manifest, Store, key_of, total

logger = logging.getLogger(__name__)

ENTRY = "_compile_ext_entry"  # the attribute of a model that holds its entry while it compiles
LOADING = "load compiled code"  # the phase
VARIANTS = 4  # entries of one key that a start compares itself with, 20 to 40 ms each where a model has 80 layers
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
    if (loaded := _load(entry, model, path, stock)) is not None:
        return loaded
    why = "there is no store to load from: see the line above"
    if entry is not None:
        why = entry.explain_miss()
        event("miss", f"{entry.tag}{why}", why=why, **entry.facts)
        why += f" (store {entry.store.root}, key {entry.key[:12]})"
    if vllm.envs.VLLM_FORCE_AOT_LOAD:
        raise FileNotFoundError(f"VLLM_FORCE_AOT_LOAD=1, but {why}")
    if entry is None:
        return None
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
    store = entry.store if entry is not None else None
    facts = entry.facts if entry is not None else {"model": label(model)}
    try:
        with span("compile", "compile", model=type(model).__qualname__, tag=getattr(model, "_compile_tag", "")):
            try:
                compiled = once.trace_once(model, store, facts, stock, args, kwargs)
                if compiled is None and not model.kept_by_stock:
                    return model.compile_as_stock(*args, **kwargs)
                if compiled is None:
                    with span("trace every layer"):
                        compiled = stock(*args, **kwargs)
            finally:
                workers.stop()
            artifact = getattr(model, "_aot_compilation_path", None)
            dump.inspect(model, compiled._artifacts.runtime_env.bytecode, artifact)  # torch 2.13
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
            store = open_store()
            entry = Entry(store, model) if store is not None else None
    except Exception as error:
        why = f"nothing is loaded or kept: no key ({plain(harmless.error(error))})"
        event("fallback", why, why=why)
        logger.debug("no key", exc_info=True)
        return None
    if entry is not None:
        event("key", f"{entry.tag}the key is {entry.key[:12]} ({entry.shard})", level=logging.DEBUG, **entry.facts)
    return entry


def _load(entry: Entry | None, model: Any, path: Path, stock: Callable[[Any, str], Any | None]) -> Any | None:
    """The code of the model's entry, or else what upstream has kept because trace-once gave up on it."""
    loaded = _load_entry(entry, model, path) if entry is not None else None
    if loaded is None and path.exists() and not sys.flags.optimize:
        workers.wait()
        with span("load from vLLM's cache", LOADING):
            loaded = stock(model, os.fspath(path))
        if loaded is not None and entry is not None:
            _say_in_stocks_cache(entry)
    return loaded


def _load_entry(entry: Entry, model: Any, path: Path) -> Any | None:
    """The code of the entry whose trace read what is here now; None when there is none, or it cannot be used."""
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.monitor import monitor_torch_compile

    begin = time.perf_counter()
    try:
        with span("load", LOADING, model=entry.model, key=entry.key):
            with span("look up"):
                manifest = entry.find(model)
            if manifest is None:
                return None
            is_encoder, tag = model._is_encoder, getattr(model, "_compile_tag", "")
            with monitor_torch_compile(model.vllm_config, announce_start=False, is_encoder=is_encoder, tag=tag):
                loaded, code = program.load(entry.store, manifest, model)
                dump.inspect(model, code, path)
            entry.store.use(manifest)
    except Exception as error:  # whatever it is, compiling again is the way out
        why = f"compiling again: {_why(error, DamagedError)}"
        event("fallback", f"{entry.tag}{why}", why=why, **entry.facts)
        logger.debug("loading failed", exc_info=True)
        return None
    seconds = time.perf_counter() - begin
    pieces, size = _measure(manifest.members)
    compilation_counter.num_aot_artifacts_loaded += 1
    compilation_counter.num_compiled_artifacts_loaded += pieces
    functions.keep_for(manifest.key, entry.model)  # not entry.key: without a compiler, an entry made with any will do
    line = f"{entry.tag}loaded compiled code {entry.key[:12]} of {entry.store.root} ({seconds * 1000:.1f} ms)"
    event("loaded", line, pieces=pieces, bytes=size, seconds=round(seconds, 4), **entry.facts)
    return loaded


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
    pieces, size = _measure(members)
    compilation_counter.num_aot_artifacts_saved += 1
    compilation_counter.num_compiled_artifacts_saved += pieces
    line = f"{entry.tag}kept as {entry.key[:12]} in {entry.store.root} ({size / 1e6:.1f} MB)"
    event("kept", line, pieces=pieces, bytes=size, **entry.facts)


def _measure(members: Mapping[str, Blob]) -> tuple[int, int]:
    """How many pieces an entry has, and its bytes."""
    return sum(name.startswith("piece/") for name in members), total(members.values())


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


class Entry:
    """A model's place in the store: its key, what is there for it, and who may write it.

    shard: ranks have equal keys and each its own entry, since a rank may hold other layers and other constants; so have
    the devices of a machine, since their numbers are in what Inductor generates.
    facts: what an event about this model is noted with.
    """

    def __init__(self, store: Store, model: Any) -> None:
        self._config = config = model.vllm_config
        parallel = config.parallel_config
        self.store = store
        self.factors = factors.factors(config, model)
        self.key = key_of(self.factors)
        # Data parallel ranks run the same code, unless experts are spread over them.
        expert = f"_dp{parallel.data_parallel_index}" if parallel.enable_expert_parallel else ""
        self.shard = f"rank{parallel.rank}{expert}{machine.device()}"
        self.tag = f"[{getattr(model, '_compile_tag', '')}] "
        self.model = label(model)
        self.facts: dict[str, Any] = {"key": self.key, "shard": self.shard, "model": self.model}
        # What has changed since the entry of this key that was used last; None when there is none.
        self.changes: list[Change] | None = None
        self._claim = ExitStack()

    def find(self, model: Any) -> Manifest | None:
        """The entry whose trace read what is here now; None when there is none."""
        self.changes = None
        for manifest in self.store.variants(self.key, self.shard)[:VARIANTS] or self._made_with_any_compiler():
            with span("compare what was read"):
                seen = msgspec.msgpack.decode(self.store.get(manifest.members["seen"]), type=Seen)
                found = changes(seen, model)
            if not found:
                return manifest
            self.changes = self.changes or found
        return None

    def _made_with_any_compiler(self) -> list[Manifest]:
        """On a machine without a compiler: the entries that differ only by having been made with one."""
        if self.factors.get("compiler") != "none":
            return []
        mine = filter(self._is_mine, _programs(self.store))
        return [m for m in mine if m.factors | {"compiler": "none"} == self.factors][:VARIANTS]

    def _is_mine(self, manifest: Manifest) -> bool:
        return manifest.shard.partition(".")[0] == self.shard

    def explain_miss(self) -> str:
        """Why there is no entry, in a line; recorded for ``vllm-compile-ext explain miss``."""
        try:
            nearest: str | None = self.key
            differ = self.changes
            if differ is None:
                programs = list(_programs(self.store))
                mine = [m for m in programs if self._is_mine(m) and _class(m.factors) == _class(self.factors)]
                found = closest(self.factors, mine or programs)
                nearest, differ = (found[0].key, found[1]) if found else (None, None)
            if self.store.writable:
                with suppress(OSError):
                    miss = Miss(self.key, self.shard, self.model, self.factors, nearest, differ)
                    misses.record(self.store.tree, miss)
            return summary(differ)
        except Exception as error:  # it is only told
            logger.debug("the miss was not explained", exc_info=True)
            return plain(f"cache miss: {harmless.error(error)}")

    def claim(self) -> bool:
        """Become the one process that compiles this entry; True when another was waited for and may have done it."""
        if not self.store.writable:
            return False
        name = key_of({"key": self.key, "shard": self.shard})
        try:
            if self._claim.enter_context(self.store.writer(name, 0)):
                return False
            self.release()
            bound = settings.of(self._config).VLLM_COMPILE_WAIT
            logger.info("%sanother process is writing this model: waiting for it, at most %d s", self.tag, bound)
            self._claim.enter_context(self.store.writer(name, bound))
            return True
        except Exception as error:
            logger.warning("%snot waiting for other processes: %s", self.tag, harmless.error(error))
            return False

    def release(self) -> None:
        """Let others write."""
        self._claim.close()

    def commit(self, members: dict[str, Blob]) -> None:
        """Write the entry, beside those that were made where the trace read other things.  Raises `OSError`."""
        about = self.facts | {"shard": f"{self.shard}.{members['seen'].digest[:8]}"}
        commit(self.store, kind="program", factors=self.factors, members=members, **about)


def _programs(store: Store) -> Iterator[Manifest]:
    return (manifest for manifest in store.manifests() if manifest.kind == "program")


def _class(table: Mapping[str, str]) -> tuple[str | None, str | None]:
    return table.get("class"), table.get("tag")


def label(model: Any) -> str:
    """A model for people: its checkpoint, its class and its part in the whole."""
    name = getattr(model.vllm_config.model_config, "model", "") or ""
    name = harmless.model_name(name).rpartition("/")[2]
    return plain(f"{name} {type(model).__qualname__} {getattr(model, '_compile_tag', '')}".strip())


def is_new(model: Any) -> bool:
    """Whether the store has nothing for models of this class: a guess, made before the key can be known."""
    store = open_store()
    name = f" {type(model).__qualname__}"
    return store is None or not any(name in manifest.model for manifest in _programs(store))
