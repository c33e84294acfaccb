"""Words for people: sentences about a start, and how numbers, times and foreign text are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich import filesize

from vllm_compile_ext.printable import plain as plain
from vllm_compile_ext.record.read import Note

KEY_DIGITS = 12  # of a key, in sentences


def note(found: Note, *, models: bool = False) -> str:
    """One sentence; `models`: with the model in it.  Of a note that is not known here, its name and attributes."""
    say = _SAY.get(found.name)
    text = say(found.attrs) if say else ""
    model = found.attrs.get("model")
    if text and models and isinstance(model, str) and model:
        return f"{model}: {text}"
    return text or " ".join([found.name, *(f"{name}={value}" for name, value in found.attrs.items())])


def duration(seconds: float) -> str:
    """Such as "83.6 s", "12 ms"; two or three digits that mean something."""
    if abs(seconds) < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if abs(seconds) < 599.5 else f"{seconds / 60:.1f} min"


def size(count: int) -> str:
    """Bytes, such as "5.1 MB"; a MB is 1000 kB."""
    return filesize.decimal(count)


def count(number: int | float, one: str, many: str = "") -> str:
    """Such as "1 piece" or "81 pieces"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def date(moment: float) -> str:
    """A unix time in local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (OverflowError, ValueError, OSError):
        return "?"


def ago(moment: float) -> str:
    """How long ago a unix time was, such as "3 h"."""
    minutes = int(max(0.0, time.time() - moment) // 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} d"


def outcome(line: dict[str, Any]) -> str:
    """A word or two on how a start went."""
    words = {"ready": "ready", "failed": "failed", "running": "still"}.get(line["outcome"], "killed")
    return f"{words} in {line['died']['phase']}" if line["died"] else {"still": "still running"}.get(words, words)


def death(died: dict[str, Any]) -> str:
    """Where a start that did not get ready ended, or where it is."""
    where = f"in the phase {died['phase']}" + (f" ({died['span']})" if died["span"] else "")
    who = f" of {died['process']}" if died["process"] else ""
    if died["since"] is not None:
        return f"It is {where}{who}, for {duration(died['since'])} now"
    error = f": {died['error']}" if died["error"] else ", and said nothing of an error: it was killed"
    return f"It ended {where}{who}{error}"


def different(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What two flat tables do not agree in: name, old, new."""
    names = sorted({*old, *new})
    rows = ((name, old.get(name, "unset"), new.get(name, "unset")) for name in names)
    return [(name, str(a), str(b)) for name, a, b in rows if a != b]


def _key(attrs: dict[str, Any]) -> str:
    key = attrs.get("key")
    shard = attrs.get("shard")
    if not isinstance(key, str) or not key:
        return ""
    return f"the compile cache key is {key[:KEY_DIGITS]}" + (f" ({shard})" if shard else "")


def _miss(attrs: dict[str, Any]) -> str:
    for name in ("summary", "why"):
        if isinstance(attrs.get(name), str) and attrs[name]:
            return str(attrs[name])
    made = changes(attrs)
    if made:
        return "cache miss: " + ", ".join(f"{name} {old} -> {new}" for name, old, new in made[:3])
    return "cache miss: nothing is stored under this key"


def changes(attrs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of a miss, the factors that differ from the closest entry: name, stored, now."""
    found = attrs.get("changes")
    rows = found if isinstance(found, list) else []
    return [
        (str(row[0]), *("unset" if value is None else str(value) for value in row[1:]))  # type: ignore[misc]
        for row in rows
        if isinstance(row, list | tuple) and len(row) == 3
    ]


def _compiled(attrs: dict[str, Any]) -> str:
    parts = []
    if _number(attrs, "traced") is not None:
        copied = _number(attrs, "copied")
        parts.append(f"traced {count(attrs['traced'], 'layer')}" + (f" and copied {copied}" if copied else ""))
    if _number(attrs, "pieces") is not None:
        distinct = _number(attrs, "distinct")
        parts.append(
            f"compiled {count(attrs['pieces'], 'piece')}" + (f", {distinct} of them distinct" if distinct else "")
        )
    loaded = _number(attrs, "loaded")
    if loaded:
        parts.append(f"{count(loaded, 'piece')} of another model loaded")
    return "; ".join(parts) + _time(attrs) if parts else ""


def _loaded(attrs: dict[str, Any]) -> str:
    pieces = _number(attrs, "pieces")
    what = "compiled code" if pieces is None else f"{count(pieces, 'compiled piece')}"
    return f"loaded {what}{_of(attrs)}{_bytes(attrs)}{_time(attrs)}"


def _kept(attrs: dict[str, Any]) -> str:
    return f"kept compiled code{_of(attrs)} for the next start{_bytes(attrs)}"


def _graphs(attrs: dict[str, Any]) -> str:
    captured = _number(attrs, "captured")
    if captured is None:
        return _on_demand(attrs)
    kind = attrs.get("kind")
    which = f"{kind} CUDA graph" if kind else "CUDA graph"
    return f"captured {count(captured, which)}{_bytes(attrs)}{_time(attrs)}"


def _on_demand(attrs: dict[str, Any]) -> str:
    shapes, kept = _number(attrs, "shapes"), _number(attrs, "kept_free")
    if shapes is None or kept is None:
        return ""
    room = f"{size(int(kept))} kept free for them" if attrs.get("kept", True) else f"at most {size(int(kept))}"
    return f"{count(shapes, 'CUDA graph')} on demand, {room} ({attrs.get('source')})"


def _fallback(attrs: dict[str, Any]) -> str:
    why = attrs.get("why")
    return f"as in stock vLLM: {why}" if why else ""


_SAY: dict[str, Callable[[dict[str, Any]], str]] = {
    "key": _key,
    "miss": _miss,
    "compiled": _compiled,
    "loaded": _loaded,
    "kept": _kept,
    "graphs": _graphs,
    "fallback": _fallback,
}


def _number(attrs: dict[str, Any], name: str) -> int | float | None:
    value = attrs.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _of(attrs: dict[str, Any]) -> str:
    key = attrs.get("key")
    return f" of {key[:KEY_DIGITS]}" if isinstance(key, str) and key else ""


def _bytes(attrs: dict[str, Any]) -> str:
    number = _number(attrs, "bytes")
    return "" if number is None else f", {size(int(number))}"


def _time(attrs: dict[str, Any]) -> str:
    taken, milliseconds = _number(attrs, "seconds"), _number(attrs, "ms")
    if taken is None and milliseconds is not None:
        taken = milliseconds / 1000
    return "" if taken is None else f" in {duration(taken)}"
