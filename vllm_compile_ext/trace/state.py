"""Python's state as a trace sees it: what has been changed since tracing began.

Dynamo does not change objects while it traces: it keeps the changes beside them (torch 2.13, _dynamo/side_effects.py).
Two calls may share a trace only when these changes are the same at both.
"""

from __future__ import annotations

from typing import Any

from vllm_compile_ext.trace.bodies import NotOnce

_CONSTANTS = (int, float, str, bool, type(None))


class Snapshot:
    """The changes so far.  Snapshots are equal when they hold the same changes, each to an equal constant or the same
    tensor; a change to anything else equals nothing.  A constant that was put back to what it was is no change."""

    def __init__(self, tx: Any) -> None:
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationExisting, ValueMutationNew

        effects = tx.output.side_effects
        self.keep: list[Any] = []
        self.changes: list[Any] = []
        self.names: list[str] = []
        for variable, stored in effects.store_attr_mutations.items():
            if isinstance(variable.mutation_type, AttributeMutationNew | ValueMutationNew):
                continue  # made while tracing: reachable from the model only by a store that is listed itself
            for name, value in stored.items():
                if not _restored(tx, variable, name, value):
                    self._add(f"{_name(variable)}.{name}", variable, name, self._value(value))
        for variable in effects.id_to_variable.values():
            kind = variable.mutation_type
            if isinstance(kind, ValueMutationExisting) and kind.is_modified:
                contents = _list(variable)
                if contents is None:
                    self._add(_name(variable), variable, "", object())
                elif not _same_list(tx, variable, contents):
                    self._add(_name(variable), variable, "", tuple(map(self._value, contents)))
            elif not isinstance(kind, AttributeMutationNew | ValueMutationNew) and _base_changed(variable, effects):
                self._add(_name(variable), variable, "", object())
        self.counts = (len(effects.tensor_hooks), len(effects.save_for_backward), len(tx.output.random_calls))
        self.torch = of_torch(tx)

    def _add(self, name: str, variable: Any, key: str, value: Any) -> None:
        self.keep.append(variable)
        self.changes.append((id(variable), key, value))
        self.names.append(name)

    def _value(self, variable: Any) -> Any:
        known, value = _constant(variable)
        if known:
            return (type(value), repr(value))
        real = _realized(variable)
        if real is not None and real.is_tensor():
            self.keep.append(real)
            return id(real)
        return object()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return (self.changes, self.counts, self.torch) == (other.changes, other.counts, other.torch)

    __hash__ = None  # type: ignore[assignment]

    def since(self, earlier: Snapshot) -> str:
        """What was changed since `earlier`, for people."""
        names = [n for n, c in zip(self.names, self.changes, strict=True) if c not in earlier.changes]
        names += [str(now) for now, then in zip(self.torch, earlier.torch, strict=True) if now != then]
        return ", ".join(names[:3]) or "a hook, a saved tensor or a random number"


def of_torch(tx: Any) -> tuple[Any, ...]:
    """The state of torch that a trace may read, as Dynamo itself guards it, and the contexts that are open.

    Raises `NotOnce` under a torch function mode.  `GlobalStateGuard` (torch 2.13, csrc/dynamo/guards.cpp) has grad
    mode, autocast, the default dtype, TF32, reduced precision, deterministic algorithms and the number of threads.
    """
    import torch
    from torch._C._dynamo.guards import GlobalStateGuard
    from torch.fx import traceback
    from torch.utils._device import DeviceContext

    functions = tx.symbolic_torch_function_state
    for mode in functions.mode_stack:
        if not isinstance(getattr(mode, "value", None), DeviceContext):
            raise NotOnce(f"called under a torch function mode, {type(getattr(mode, 'value', mode)).__name__}")
    contexts = []
    while tx is not None:
        contexts += [
            (type(block.with_context).__name__, repr(getattr(block.with_context, "target_values", None)))
            for block in tx.block_stack
            if block.with_context is not None
        ]
        tx = getattr(tx, "parent", None)
    return (
        GlobalStateGuard().__getstate__(),
        torch.is_inference_mode_enabled(),
        torch.get_float32_matmul_precision(),
        torch._C._len_torch_dispatch_stack(),
        len(functions.mode_stack),
        functions.torch_function_subclass_enabled,
        functions.torch_function_mode_enabled,
        repr(traceback.current_meta.get("custom")),
        tuple(contexts),
    )


def _name(variable: Any) -> str:
    try:
        return str(variable.source.name)
    except (AttributeError, NotImplementedError):  # no source, or one of Dynamo's own making
        return type(variable).__name__


def _realized(variable: Any) -> Any:
    """The variable itself, without making a lazy one look at its value; None for a lazy one."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if isinstance(variable, LazyVariableTracker):
        return variable.realize() if variable.is_realized() else None
    return variable


def _constant(variable: Any) -> tuple[bool, Any]:
    """(whether it is a plain constant, its value), adding no guard."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if isinstance(variable, LazyVariableTracker) and not variable.is_realized():
        value = variable.peek_value()
        return type(value) in _CONSTANTS, value
    real = _realized(variable)
    if isinstance(real, ConstantVariable):
        return type(real.value) in _CONSTANTS, real.value
    return False, None


def _equal(variable: Any, old: Any) -> bool:
    known, value = _constant(variable)
    return known and type(value) is type(old) and repr(value) == repr(old)


def _restored(tx: Any, variable: Any, name: str, value: Any) -> bool:
    from torch._dynamo.source import AttrSource

    if getattr(variable, "source", None) is None:
        return False
    try:
        old = tx.output.resolve_source_value(AttrSource(variable.source, name))
    except Exception:  # the attribute is new, or the object has no expression
        return False
    return _equal(value, old)


def _list(variable: Any) -> list[Any] | None:
    from torch._dynamo.variables import ListVariable

    return list(variable.items) if type(variable) is ListVariable else None


def _same_list(tx: Any, variable: Any, contents: list[Any]) -> bool:
    if variable.source is None:
        return False
    try:
        old = tx.output.resolve_source_value(variable.source)
    except Exception:  # no expression: no old value to compare with
        return False
    return type(old) is list and len(old) == len(contents) and all(map(_equal, contents, old))


def _base_changed(variable: Any, effects: Any) -> bool:
    """Whether a subclass of dict, list or set was changed as such."""
    changed = getattr(variable, "is_base_vt_modified", None)
    return changed is not None and bool(changed(effects))
