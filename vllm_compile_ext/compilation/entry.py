"""A model's place in the store: its key, what is there for it, and who may write it."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.key import factors, misses
from vllm_compile_ext.key.misses import Change, closest, summary
from vllm_compile_ext.key.seen import Seen, changes
from vllm_compile_ext.program import commit
from vllm_compile_ext.record.spans import span
from vllm_compile_ext.store.store import Blob, Manifest, Store, UnsafeStoreError, key_of

logger = logging.getLogger(__name__)

VARIANTS = 4  # entries of one key that a start compares itself with, 20 to 40 ms each where a model has 80 layers


def store() -> Store | None:
    """The store of this process; None, after one line that says why, where there is none to be used."""
    return _open(settings.store())


@functools.cache
def _open(folder: Path) -> Store | None:
    if sys.flags.optimize:  # torch 2.13.0: a pass has its effect inside of an assert, and drops a store then
        logger.warning("nothing is loaded or kept: under python -O (PYTHONOPTIMIZE) torch may compile wrong code")
        return None
    try:
        return Store.open(folder, settings.store_limit())
    except UnsafeStoreError as error:
        logger.warning("every start compiles, nothing is read or kept: %s", error)
    except OSError as error:
        logger.warning("every start compiles: the store %s cannot be opened (%s)", folder, error)
    return None


class Entry:
    """What the store has for one model, as it is configured now.

    shard: ranks have equal keys and each its own entry, since a rank may hold other layers and other constants; so have
    the devices of a machine, since their numbers are in what Inductor generates.
    """

    def __init__(self, store: Store, model: Any) -> None:
        config = model.vllm_config
        parallel = config.parallel_config
        self.store = store
        self.factors = factors.factors(config, model)
        self.key = key_of(self.factors)
        # Data parallel ranks run the same code, unless experts are spread over them.
        expert = f"_dp{parallel.data_parallel_index}" if parallel.enable_expert_parallel else ""
        self.shard = f"rank{parallel.rank}{expert}{device()}"
        self.tag = f"[{getattr(model, '_compile_tag', '')}] "
        self.model = label(model)
        # What has changed since the entry of this key that was used last; None when there is none.
        self.changes: list[Change] | None = None
        self._claim = ExitStack()

    @property
    def facts(self) -> dict[str, Any]:
        """What an event about this model is noted with."""
        return {"key": self.key, "shard": self.shard, "model": self.model}

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
        mine = (m for m in self._programs() if _rank(m) == self.shard)
        return [m for m in mine if m.factors | {"compiler": "none"} == self.factors][:VARIANTS]

    def _programs(self) -> list[Manifest]:
        return [manifest for manifest in self.store.manifests() if manifest.kind == "program"]

    def explain_miss(self) -> str:
        """Why there is no entry, in a line; recorded for ``vllm-compile-ext explain miss``."""
        try:
            nearest: str | None = self.key
            differ = self.changes
            if differ is None:
                programs = self._programs()
                mine = [m for m in programs if _rank(m) == self.shard and _class(m.factors) == _class(self.factors)]
                found = closest(self.factors, mine or programs)
                nearest, differ = (found[0].key, found[1]) if found else (None, None)
            if self.store.writable:
                with suppress(OSError):
                    about = (self.key, self.shard, self.model, self.factors)
                    misses.record(self.store.tree, *about, nearest, differ)
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
            bound = settings.load().VLLM_COMPILE_WAIT
            logger.info("%sanother process is writing this model: waiting for it, at most %d s", self.tag, bound)
            self._claim.enter_context(self.store.writer(name, bound))
            return True
        except Exception as error:
            logger.warning("%snot waiting for other processes: %s", self.tag, harmless.error(error))
            return False

    def release(self) -> None:
        """Let others write."""
        self._claim.close()

    def commit(self, members: Mapping[str, Blob]) -> None:
        """Write the entry, beside those that were made where the trace read other things.  Raises `OSError`."""
        shard = f"{self.shard}.{members['seen'].digest[:8]}"
        commit(self.store, "program", self.key, shard, self.model, self.factors, members)


def _rank(manifest: Manifest) -> str:
    return manifest.shard.partition(".")[0]


def _class(table: Mapping[str, str]) -> tuple[str | None, str | None]:
    return table.get("class"), table.get("tag")


def device() -> str:
    """The number of this process's accelerator: Inductor writes it into the code (torch 2.13.0)."""
    import torch

    if not torch.accelerator.is_available():
        return ""
    return f"_{torch.accelerator.current_accelerator()}{torch.accelerator.current_device_index()}"


def label(model: Any) -> str:
    """A model for people: its checkpoint, its class and its part in the whole."""
    name = getattr(model.vllm_config.model_config, "model", "") or ""
    name = harmless.model_name(name).rpartition("/")[2]
    return plain(f"{name} {type(model).__qualname__} {getattr(model, '_compile_tag', '')}".strip())


def is_new(model: Any) -> bool:
    """Whether the store has nothing for models of this class: a guess, made before the key can be known."""
    found = store()
    name = f" {type(model).__qualname__}"
    return found is None or not any(m.kind == "program" and name in m.model for m in found.manifests())
