"""Values of settings as short text, equal exactly when the values are; nested ones as one text for each leaf.

Knows neither vLLM nor torch: what they hash is JSON, tuples, enums and dictionaries.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from blake3 import blake3

from vllm_compile_ext import harmless

# Longer texts are cut and end in their digest; a longer dictionary of single values (labels, token tables) is one text.
LIMIT = 300
MANY = 200

# A string that reads like a value of another type is quoted.
_LIKE_A_VALUE = re.compile(r"|True|False|None|[-+]?[\d.]+(e[-+]?\d+)?|[-+]?inf|nan|[\[({<'\"].*", re.DOTALL)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_CLASS = re.compile(r"[A-Za-z_][\w.]*\.[A-Z_]\w*")


def digest(data: bytes) -> str:
    """The first 32 hexadecimal digits of blake3: enough to tell two texts of one factor apart."""
    return blake3(data).hexdigest()[:32]


def text(value: Any, name: str = "", choices: Set[str] = frozenset()) -> str:
    """`value`, of `name`, in at most about `LIMIT` characters; where it is not harmless `hidden`.

    Which of both depends on nothing but the arguments: equal values have equal texts in every process.
    """
    full = value if type(value) is str and not _LIKE_A_VALUE.fullmatch(value) else whole(value)
    shown = harmless.is_harmless(value, name, choices) or (isinstance(value, tuple) and _member(value) is not None)
    return cut(full) if shown else hidden(name, full)


def hidden(name: str, full: str) -> str:
    """What stands for a value that is not shown, another one for each value.

    Whoever has the key of an entry and its other factors can check a guess of a value, whatever stands here: an entry
    must be found again on other machines, so there is no secret in it.  A token cannot be guessed; a short password
    can.  With the name in the digest, equal values of two factors do not look equal.
    """
    return f"{harmless.HIDDEN}{digest(f'{name} {full}'.encode('utf-8', 'surrogatepass'))}"


def cut(full: str) -> str:
    """`full`, or its beginning and its digest when it is longer than `LIMIT`."""
    return full if len(full) <= LIMIT else f"{full[:60]}... ({len(full)} characters, {digest(full.encode())})"


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """The leaves of `values`, dotted name -> text; nothing for a None, which so equals a setting that is not there."""
    found = (leaves(name, value) for name, value in values.items() if value is not None)
    return {name: text for each in found for name, text in each}


def leaves(name: str, value: Any, choices: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """The leaves of `value` as (dotted name, text).

    A None inside is a leaf: a key of a dictionary that is not there often stands for a default.  Dictionaries are
    split, and what vLLM makes of dictionaries and dataclasses before it hashes them (tuples of pairs,
    `vllm/config/utils.py: normalize_value`, vLLM 0.32.0).
    """
    fields = _fields(value)
    if not fields or (len(fields) > MANY and not any(_fields(v) for v in fields.values())):
        yield name, text(value, name, choices)
        return
    for key, part in fields.items():
        yield from leaves(below(name, key), part, choices)


def below(name: str, key: str) -> str:
    """The name of an item; of one whose key does not look like a name, with a digest."""
    return f"{name}.{key if harmless.is_key(key) else hidden(name, key)}"


def json_object(value: Any) -> dict[str, Any] | None:
    """The JSON object that the string `value` holds, or None."""
    if not isinstance(value, str) or not value.startswith("{"):
        return None
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _fields(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if not isinstance(value, tuple):
        return None
    if len(value) == 2 and isinstance(value[0], str) and _CLASS.fullmatch(value[0]):
        return _fields(value[1])
    pairs = all(isinstance(v, tuple) and len(v) == 2 and type(v[0]) is str for v in value)
    found = dict(value) if pairs else {}
    return found if found and len(found) == len(value) else None


def whole(value: Any) -> str:
    """`value` as one text of any length."""
    if isinstance(value, Enum):
        return str(value.name)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{whole(k)}: {whole(v)}' for k, v in value.items())}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(whole(v) for v in value))}}}"
    if isinstance(value, Sequence):
        return _member(value) or f"[{', '.join(whole(v) for v in value)}]"
    if callable(getattr(value, "uuid", None)):
        return f"<{type(value).__module__}.{type(value).__qualname__} {value.uuid()}>"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"<{value.__module__}.{value.__qualname__}>"
    return _ADDRESS.sub("", str(value))


def _member(value: Sequence[Any]) -> str | None:
    """The name of the enum member that vLLM wrote as (class, value), or None."""
    if not (len(value) == 2 and isinstance(value[0], str) and _CLASS.fullmatch(value[0])):
        return None
    module, _, name = value[0].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    try:
        return str(kind(value[1]).name) if isinstance(kind, type) and issubclass(kind, Enum) else None
    except ValueError:
        return None
