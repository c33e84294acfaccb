"""What vLLM's configuration puts into compiled code, one factor for each field.

vLLM decides: each of its config classes knows which of its fields count, and `VllmConfig.compute_hash` makes one digest
of all (vLLM 0.32.0, `vllm/config/`).  Here that method runs as it is, and what the classes hash on the way is noted.
Fields that only say where things are or what they are called are left out afterwards (`dropped.DROPPED`).
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import logging
import re
import sys
import threading
from dataclasses import dataclass, is_dataclass
from types import FrameType
from typing import Any
from unittest.mock import patch

from vllm_compile_ext import harmless
from vllm_compile_ext.key import readable
from vllm_compile_ext.key.dropped import DROPPED, counts

logger = logging.getLogger(__name__)

# Classes that hash a list: the names of its items, used where the fields of these names hold what was hashed.
_LISTS = {"SchedulerConfig": ("max_num_batched_tokens", "max_num_seqs")}
_IN_HF_CONFIG = {key.partition(".")[2] for key in DROPPED if key.startswith("hf_config.")}
_HASHES = ("hash_factors", "safe_hash")
_recording = threading.Lock()


class UnknownLayoutError(RuntimeError):
    """vLLM's hash is not made the way that this module understands; the message says what differs."""


@dataclass(frozen=True)
class Hashed:
    """One thing that vLLM hashed.

    path: the names of the configs from below VllmConfig to the one that hashed, ("compilation", "pass"); () for
    VllmConfig itself.  content: its factors by name, or the text that it hashed.
    """

    path: tuple[str, ...]
    config: Any
    content: dict[str, Any] | str
    digest: str


def config_factors(vllm_config: Any) -> dict[str, str]:
    """The factors ``config.<config>.<field>`` of `vllm_config`; two that are equal have equal hashes in vLLM, too,
    but for `DROPPED`.

    Where the hash cannot be taken apart it is the one factor ``config``.  Raises what `compute_hash` raises:
    `TypeError` for a field that vLLM cannot hash.
    """
    try:
        return _separate(vllm_config)
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
            owners = _owners(sys._getframe(2), here)
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


def _owners(frame: FrameType | None, end: FrameType) -> list[Any]:
    """The configs whose `compute_hash` is running below the frame `end`, the outermost first."""
    owners = []
    while frame is not None and frame is not end:
        if frame.f_code.co_name == "compute_hash" and "self" in frame.f_locals:
            owners.append(frame.f_locals["self"])
        frame = frame.f_back
    return owners[::-1]


def _name(parent: Any, child: Any) -> str:
    """What `parent` calls `child`: "cache" for its attribute `cache_config`."""
    for key, value in vars(parent).items():
        if value is child:
            return str(key).removesuffix("_config")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(child).__name__.removesuffix("Config")).lower()


def _separate(vllm_config: Any) -> dict[str, str]:
    found, result = record(vllm_config)
    if not found or found[-1].path or not result or not found[-1].digest.startswith(result):
        raise UnknownLayoutError("the result is not the last thing that was hashed")
    *parts, whole = found
    out = _Factors()
    for part in parts:
        out.add(part, parts)
    out.rest(whole, [part for part in parts if len(part.path) <= 1])
    return out.values


def _choices(config: Any) -> frozenset[str]:
    kind: Any = type(config)
    return harmless.choices(kind) if is_dataclass(config) else frozenset()


def _parsed(content: str) -> Any:
    """What a text is the `str` of, or the text."""
    try:
        return ast.literal_eval(content)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return content


class _Factors:
    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._objects: dict[str, str] = {}  # JSON objects of one config that were written out, and the name of each

    def add(self, part: Hashed, parts: list[Hashed]) -> None:
        """Write what one config hashed; digests of configs in it speak for themselves and are left out or named."""
        below = {
            p.digest: p.path for p in parts if len(p.path) > len(part.path) and p.path[: len(part.path)] == part.path
        }
        name = ".".join(("config", *part.path))
        self._objects.clear()
        if not part.path:
            self._additional(part)
        elif isinstance(part.content, dict):
            kind = type(part.config).__name__
            fields = {k: v for k, v in part.content.items() if counts(f"{kind}.{k}")}
            if not part.content:
                self._put(name, "{}")
            for field, value in fields.items():
                if not isinstance(value, str) or value not in below:
                    self._value(f"{name}.{field}", value, _choices(part.config))
        else:
            names = _LISTS.get(type(part.config).__name__, ())
            values = [getattr(part.config, n, None) for n in names]
            if names and str(values) == part.content:
                for field, value in zip(names, values, strict=True):
                    self._value(f"{name}.{field}", value)
                return
            content = part.content
            for digest, path in below.items():
                content = content.replace(digest, ".".join(path))
            self._put(name, readable.text(_parsed(content), name))

    def rest(self, whole: Hashed, children: list[Hashed]) -> None:
        """Write what VllmConfig hashed apart from its configs and vLLM's version: anything here that is new to us."""
        from vllm import __version__

        items = ast.literal_eval(str(whole.content))
        if not (isinstance(items, list) and len(items) == 1 and isinstance(items[0], list)):
            raise UnknownLayoutError("VllmConfig hashes something else than one list")
        waiting = [child.digest for child in children]
        for index, item in enumerate(items[0]):
            if waiting and item == waiting[0]:
                waiting.pop(0)
            elif item not in (None, "None") and not (index == 0 and item == __version__):
                self._put(f"config.{index}", readable.text(item, f"config.{index}"))
        if waiting:
            raise UnknownLayoutError("VllmConfig leaves out a digest that was made for it")

    def _additional(self, part: Hashed) -> None:
        """`additional_config` is the user's and a platform's own: not even its numbers are shown."""
        items = readable.object_of(part.content)
        for key, value in (items if items is not None else {"": part.content}).items():
            name = readable.below("config.additional", key) if items is not None else "config.additional"
            self._put(name, readable.hidden(name, repr(value)))

    def _value(self, name: str, value: Any, choices: frozenset[str] = frozenset()) -> None:
        found = readable.object_of(value)
        if found is None:
            for key, leaf in readable.flat(name, value, choices):
                self._put(key, leaf)
        else:
            self._object(name, readable.without(found, _IN_HF_CONFIG))

    def _object(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON object once: `hf_text_config` often is `hf_config`, or a part of it."""
        canonical = readable.text(sorted((k, repr(v)) for k, v in value.items()))
        first = self._objects.setdefault(canonical, name)
        if first != name and len(value) > 3:
            self._put(name, f"same as {first}")
            return
        for key, item in value.items():
            below = readable.below(name, key)
            if isinstance(item, dict) and 0 < len(item) <= readable.MANY:
                self._object(below, item)
            else:
                for leaf, content in readable.leaves(below, item):  # a key that is not there is a default
                    self._put(leaf, content)

    def _put(self, name: str, value: str) -> None:
        while self.values.setdefault(name, value) != value:  # a second config of this name, or a key with a dot
            name += "'"
