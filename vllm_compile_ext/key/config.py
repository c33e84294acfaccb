"""What vLLM's configuration puts into compiled code, one factor for each field.

vLLM decides: each of its config classes knows which of its fields count, and `VllmConfig.compute_hash` makes one digest
of all (vLLM 0.32.0, `vllm/config/`).  Here that method runs as it is, and what the classes hash on the way is noted.
Fields that only say where things are or what they are called are left out afterwards.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import logging
import re
import sys
import threading
from collections.abc import Container, Iterable
from dataclasses import is_dataclass
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

from vllm_compile_ext import harmless
from vllm_compile_ext.key import readable

logger = logging.getLogger(__name__)

# Classes that hash a list: the names of its items, used where the fields of these names hold what was hashed.
_LISTS = {"SchedulerConfig": ("max_num_batched_tokens", "max_num_seqs")}
_HASHES = ("hash_factors", "safe_hash")
_recording = threading.Lock()


class Hashed(NamedTuple):
    """One thing that vLLM hashed.

    path: the names of the configs from below VllmConfig to the one that hashed, ("compilation", "pass"); () for
    VllmConfig itself.  content: its factors by name, or the text that it hashed.
    """

    path: tuple[str, ...]
    config: Any
    content: dict[str, Any] | str
    digest: str


def config_factors(vllm_config: Any, excluded: Iterable[str]) -> dict[str, str]:
    """The factors ``config.<config>.<field>`` of `vllm_config`; two that are equal have equal hashes in vLLM, too, but
    for the fields `excluded`, each ``<class>.<field>`` or ``hf_config.<key>``.

    Where the hash cannot be taken apart it is the one factor ``config``.  Raises what `compute_hash` raises:
    `TypeError` for a field that vLLM cannot hash.
    """
    try:
        hashed, result = record(vllm_config)
        if not hashed or hashed[-1].path or not result or not hashed[-1].digest.startswith(result):
            raise ValueError("the result is not the last thing that was hashed")
        *parts, whole = hashed
        factors = _Factors(frozenset(excluded))
        for part in parts:
            factors.add(part, parts)
        factors.add_rest(str(whole.content), [part.digest for part in parts if len(part.path) <= 1])
        return factors.values
    except Exception as error:
        logger.debug("vLLM's hash stays in one piece: %s", harmless.error(error))
        return {"config": str(vllm_config.compute_hash())}


def record(vllm_config: Any) -> tuple[list[Hashed], str]:
    """Run `compute_hash` and note what is hashed in it, in order; its result comes second.

    The two functions that vLLM hashes with are replaced meanwhile, in every module of `vllm.config` that holds them.
    """
    from vllm.config import utils
    from vllm.utils import hashing

    found: list[Hashed] = []
    thread, here = threading.get_ident(), sys._getframe()
    hash_factors, safe_hash = utils.hash_factors, hashing.safe_hash

    def note(content: Any, digest: str) -> None:
        if threading.get_ident() == thread:
            owners: list[Any] = []  # the configs whose `compute_hash` is running, the outermost first
            frame: FrameType | None = sys._getframe(2)
            while frame is not None and frame is not here:
                if frame.f_code.co_name == "compute_hash" and "self" in frame.f_locals:
                    owners.insert(0, frame.f_locals["self"])
                frame = frame.f_back
            path = tuple(_name(parent, child) for parent, child in itertools.pairwise(owners))
            found.append(Hashed(path, owners[-1] if owners else None, content, digest))

    def noted_factors(items: dict[str, Any]) -> str:
        digest: str = hash_factors(items)
        note(dict(items), digest)
        return digest

    def noted_hash(data: bytes, *args: Any, **kwargs: Any) -> Any:
        result = safe_hash(data, *args, **kwargs)
        note(data.decode(), result.hexdigest())
        return result

    replaced = {hash_factors: noted_factors, safe_hash: noted_hash}
    with _recording, contextlib.ExitStack() as changes:
        for name, module in list(sys.modules.items()):
            for attribute in _HASHES if f"{name}.".startswith("vllm.config.") else ():
                if (new := replaced.get(vars(module).get(attribute))) is not None:
                    changes.enter_context(patch.object(module, attribute, new))
        return found, str(vllm_config.compute_hash())


def _name(parent: Any, child: Any) -> str:
    """What `parent` calls `child`: "cache" for its attribute `cache_config`."""
    for key, value in vars(parent).items():
        if value is child:
            return str(key).removesuffix("_config")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(child).__name__.removesuffix("Config")).lower()


class _Factors:
    def __init__(self, excluded: frozenset[str]) -> None:
        self.values: dict[str, str] = {}
        self._excluded = excluded
        self._excluded_keys = {name.partition(".")[2] for name in excluded if name.startswith("hf_config.")}
        self._objects: dict[str, str] = {}  # JSON objects of one config that were written out, and the name of each

    def add(self, part: Hashed, parts: list[Hashed]) -> None:
        """Write what one config hashed; digests of configs in it speak for themselves and are left out or named."""
        depth, kind = len(part.path), type(part.config)
        below = {p.digest: p.path for p in parts if len(p.path) > depth and p.path[:depth] == part.path}
        name = ".".join(("config", *part.path))
        content: Any = part.content
        fields = _LISTS.get(kind.__name__, ())
        values = [getattr(part.config, field, None) for field in fields]
        if fields and content == str(values):
            content = dict(zip(fields, values, strict=True))
        self._objects.clear()
        if not part.path:
            self._add_users(content)
        elif isinstance(content, dict):
            choices = harmless.choices(kind) if is_dataclass(kind) else frozenset()
            if not content:
                self._put(name, "{}")
            for field, value in content.items():
                if f"{kind.__name__}.{field}" not in self._excluded and not (isinstance(value, str) and value in below):
                    self._add_value(f"{name}.{field}", value, choices)
        else:
            for digest, path in below.items():
                content = content.replace(digest, ".".join(path))
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                content = ast.literal_eval(content)
            self._put(name, readable.text(content, name))

    def add_rest(self, whole: str, digests: list[str]) -> None:
        """Write what VllmConfig hashed besides the digests of its configs and vLLM's version: anything that is new."""
        from vllm import __version__

        items = ast.literal_eval(whole)
        if not (isinstance(items, list) and len(items) == 1 and isinstance(items[0], list)):
            raise ValueError("VllmConfig hashes something else than one list")
        for index, item in enumerate(items[0]):
            if digests and item == digests[0]:
                digests = digests[1:]
            elif item not in (None, "None") and not (index == 0 and item == __version__):
                self._put(f"config.{index}", readable.text(item, f"config.{index}"))
        if digests:
            raise ValueError("VllmConfig leaves out a digest that was made for it")

    def _add_users(self, content: Any) -> None:
        """Write `additional_config`, the user's and a platform's own: not even its numbers are shown."""
        name = "config.additional"
        items = readable.json_object(content)
        named = {name: content} if items is None else {readable.below(name, key): items[key] for key in items}
        for place, value in named.items():
            self._put(place, readable.hidden(place, repr(value)))

    def _add_value(self, name: str, value: Any, choices: frozenset[str]) -> None:
        """Write a field; a JSON object once: `hf_text_config` often is `hf_config`."""
        found = readable.json_object(value)
        if found is not None:
            value, choices = _without(found, self._excluded_keys), frozenset()
            first = self._objects.setdefault(json.dumps(value, sort_keys=True), name)
            if first != name and len(value) > 3:
                self._put(name, f"same as {first}")
                return
        if value is not None:
            for leaf, text in readable.leaves(name, value, choices):
                self._put(leaf, text)

    def _put(self, name: str, value: str) -> None:
        while self.values.setdefault(name, value) != value:  # a second config of this name, or a key with a dot
            name += "'"


def _without(value: Any, keys: Container[str]) -> Any:
    """JSON `value` without `keys`, at any depth."""
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    if isinstance(value, list):
        return [_without(v, keys) for v in value]
    return value
