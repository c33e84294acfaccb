"""What tracing a body has read, by Dynamo's own record, and whether a reading could differ for another layer.

Dynamo adds a source to the tracer's `traced_sources` each time a value is looked at through an access path (torch 2.13,
_dynamo/variables/builder.py, `VariableBuilder._call_impl`), and a guard when the trace depends on a value.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from vllm_compile_ext.trace.bodies import ANY, UNKNOWN, Foreign, NotOnce, Opaque, Read
from vllm_compile_ext.trace.structure import Comparison, Difference


def split_source(source: Any) -> tuple[Any, Any]:
    """(base, key) of the last attribute or item access of a Dynamo source.

    (None, None) where there is none: a local or a global.  The key is `ANY` where it is not a plain one.
    """
    while hasattr(source, "base"):
        for name in ("member", "index"):
            key = getattr(source, name, None)
            if key is not None:
                return source.base, key if isinstance(key, str | int | bool | float | tuple) else ANY
        if type(source).__name__ in ("DictGetItemSource", "GetItemSource"):  # the key is None itself
            return source.base, ANY
        source = source.base
    return None, None


def guards(tx: Any) -> set[Any]:
    """The guards that the trace has so far."""
    return set(tx.output.tracing_context.guards_context.dynamo_guards)


def reads(tx: Any, looked_at: Iterable[Any], guarded: Iterable[Any] = ()) -> list[Read]:
    """The accesses that the sources and everything on the way to them stand for, with the values they give.

    `looked_at`: what the trace looked at, `guarded`: what its guards name.
    """
    found: list[Read] = []
    values: dict[Any, Any] = {}

    def value(source: Any) -> Any:
        if source not in values:
            try:
                values[source] = tx.output.resolve_source_value(source)
            except Exception:  # a source of Dynamo's own making, which no expression leads to
                values[source] = UNKNOWN
        return values[source]

    seen: set[Any] = set()
    direct = set(looked_at)
    todo = [*direct, *guarded]
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if hasattr(source, "base"):
            todo.append(source.base)
        base, key = split_source(source)
        if base is not None:
            owner = value(base)
            if isinstance(owner, types.MethodType):  # a method has no identity to keep: it is where it was read from
                owner = value(split_source(base)[0])
            found.append(Read(source.name, owner, key, value(source), source in direct))
    return found


def identities(tx: Any, added: Iterable[Any]) -> list[Any]:
    """The modules whose very identity the trace depends on, by the guards `added` to it."""
    found = []
    for guard in added:
        if guard.create_fn_name() == "ID_MATCH":
            try:
                value = tx.output.resolve_source_value(guard.originating_source)
            except Exception:  # no expression leads there, so it is no module of the model
                continue
            if isinstance(value, torch.nn.Module):
                found.append(value)
    return found


_PLAIN = (int, float, str, bool, complex, type(None), type, torch.dtype, torch.device, types.ModuleType)


def renamed(
    foreign: list[Foreign], opaque: list[Opaque], comparison: Comparison, lookups: Collection[Callable[..., Any]]
) -> dict[str, str]:
    """Strings that functions made of an opaque object while tracing -> what they make of the other layer's.

    vLLM 0.32 does so on CPU, where it looks up an MoE layer by the name in its LayerName.  Only `lookups` may: of other
    functions nobody says that the string is used for nothing else.  Raises `NotOnce` when another did, or when a
    function got a part of the layer, of which it may have read anything.
    """
    found: dict[str, str] = {}
    for call in foreign:
        theirs = [_counterpart(a, opaque, comparison) for a in call.args]
        for value in (*call.args, getattr(call.fn, "__self__", None)):
            plain = isinstance(value, _PLAIN) or any(_made(what, value) for what in opaque)
            if not plain or id(value) in comparison.pairs or id(value) in comparison.rights:
                raise NotOnce(f"a function runs while it is traced: {getattr(call.fn, '__name__', call.fn)}")
        if any(a is not b for a, b in zip(call.args, theirs, strict=True)):
            mine, other = (call.fn(*call.args), call.fn(*theirs)) if call.fn in lookups else (None, None)
            if type(mine) is not str or type(other) is not str or found.setdefault(mine, other) != other:
                raise NotOnce(f"a function reads the layer's name: {getattr(call.fn, '__name__', call.fn)}")
    return found


def _made(what: Opaque, value: Any) -> bool:
    return type(value) is what.ctor and bool(value == what.ctor(*what.args))


def _counterpart(value: Any, opaque: list[Opaque], comparison: Comparison) -> Any:
    for what in opaque:
        if _made(what, value):
            args = list(what.args)
            for i, origin in enumerate(what.origins):
                for d in comparison.differences:
                    if origin is not None and d.owner is origin[0] and d.key == origin[1]:
                        args[i] = d.right
            return what.ctor(*args)
    return value


def check(
    found: list[Read], lifted: set[tuple[int, Any]], comparison: Comparison, renamed: dict[str, str] | None = None
) -> None:
    """Raises `NotOnce` when a read may give something else for the other layer than the counterpart of what it gave.

    `lifted`: (id of owner, key) of strings that only went into the constructor of an opaque graph input.
    `renamed`: strings that name the layer -> the ones that name the other.
    """
    named = _looked_up(found, renamed or {}, comparison)
    table = comparison.by_key()
    pairs, rights = comparison.pairs, comparison.rights
    for read in found:
        candidates: Iterable[Difference] = comparison.differences if read.key is ANY else table.get(read.key, ())
        for d in candidates:
            if read.owner is UNKNOWN:
                raise NotOnce(f"{read.name}: cannot tell whether it differs")
            if _is_owner(read.owner, d.owner) and (id(d.owner), d.key) not in lifted:
                raise NotOnce(f"reads {d.path}: {str(d.left)[:60]!r} / {str(d.right)[:60]!r}")
        if not read.direct or id(read) in named:
            continue
        # By a path that is the same for both layers, to something that belongs to one of them.
        if id(read.value) in pairs or id(read.value) in rights:
            if id(read.owner) not in pairs:
                raise NotOnce(f"reads {read.name}, a part of one layer, from outside of it")
        elif not (read.inside.isdisjoint(pairs) and read.inside.isdisjoint(rights)):
            raise NotOnce(f"reads {read.name}, which has parts of one layer in it")


def _looked_up(found: list[Read], renamed: dict[str, str], comparison: Comparison) -> set[int]:
    """ids of the reads that find a layer's part by its name in a dict which has the counterpart by the other's, and of
    the reads that give such a dict.  Raises `NotOnce` for a read that finds something else so."""
    dicts: set[int] = set()
    named: set[int] = set()
    for read in found:
        if type(read.owner) is dict and isinstance(read.key, str) and read.key in renamed:
            other = read.owner.get(renamed[read.key])
            if other is None or comparison.pairs.get(id(read.value)) != id(other):
                raise NotOnce(f"{read.name} is found by the layer's name, and is no part of the layer")
            dicts.add(id(read.owner))
            named.add(id(read))
    return named | {id(read) for read in found if id(read.value) in dicts}


def _is_owner(owner: Any, wanted: Any) -> bool:
    """Whether a read of `owner` reads `wanted`: itself, or by its `__dict__`."""
    return owner is wanted or (type(owner) is dict and owner is getattr(wanted, "__dict__", None))


def lifted_strings(inputs: Iterable[Any], found: list[Read], guarded: list[Read]) -> set[tuple[int, Any]]:
    """(id of owner, key) of each string that only went into an opaque object's constructor: no guard depends on it."""
    inspected = {(id(r.owner), r.key) for r in guarded}
    plain = {(id(r.owner), r.key) for r in found if isinstance(r.value, str)}
    origins = {(id(o[0]), o[1]) for i in inputs if isinstance(i, Opaque) for o in i.origins if o is not None}
    return (origins & plain) - inspected
