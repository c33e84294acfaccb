"""The places where Dynamo is hooked while a Tracer is installed, and their undo.

The hooks are shared: the first Tracer puts them in place, the last one to leave takes them away, in whatever order they
leave.  Each thread's innermost Tracer is the one that is asked.  Names are those of torch 2.13:

* `UnspecializedNNModuleVariable.call_function` (_dynamo/variables/nn_module.py): a call of an nn.Module;
* `OpaqueObjectClassVariable.call_function` (_dynamo/variables/script_object.py): the making of an opaque object;
* `invoke_and_store_as_constant` (_dynamo/variables/functions.py, imported by nn_module.py): functions that run while
  tracing, which read what they like;
* `_side_effectful_functions` (fx/node.py): nodes that dead code elimination must not drop.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.fx as fx

from vllm_compile_ext.trace.bodies import keep_alive, region


class Listener(Protocol):
    """Who is asked about a call; `trace` traces it as Dynamo would."""

    def on_call(
        self, module: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], trace: Callable[[], Any]
    ) -> Any: ...

    def on_foreign(self, fn: Callable[..., Any], args: list[Any]) -> None: ...


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[Listener] = []


_local = _Local()
_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Ask `listener` while the context lasts, on this thread."""
    global _users
    with _lock:
        if _users == 0:
            try:
                _install()
            except BaseException:
                _remove()
                raise
        _users += 1
    stack = _local.stack
    stack.append(listener)
    try:
        yield
    finally:
        del stack[len(stack) - 1 - stack[::-1].index(listener)]
        with _lock:
            _users -= 1
            if _users == 0:
                _remove()


def installed() -> bool:
    """Whether Dynamo is hooked now."""
    return bool(_undo)


def _install() -> None:
    from torch._dynamo.variables import functions, nn_module
    from torch._dynamo.variables.script_object import OpaqueObjectClassVariable

    _patch(nn_module.UnspecializedNNModuleVariable, "call_function", _module_call)
    _patch(OpaqueObjectClassVariable, "call_function", _opaque_call)
    _patch(functions, "invoke_and_store_as_constant", _foreign_call)
    _patch(nn_module, "invoke_and_store_as_constant", _foreign_call)
    for marker in (keep_alive, region):
        fx.node._side_effectful_functions.add(marker)
        _undo.append(functools.partial(fx.node._side_effectful_functions.discard, marker))


def _remove() -> None:
    while _undo:
        _undo.pop()()


def _patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(owner)[name]
    ours = functools.wraps(original)(make(original))
    setattr(owner, name, ours)

    def undo() -> None:
        if vars(owner).get(name) is ours:  # else somebody has patched it since: theirs calls ours, which does nothing
            setattr(owner, name, original)

    _undo.append(undo)


def _module_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if not _local.stack:
            return original(self, tx, args, kwargs)
        return _local.stack[-1].on_call(self, tx, list(args), dict(kwargs), lambda: original(self, tx, args, kwargs))

    return call_function


def _opaque_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        # A string that only names the object does not get a guard; a later, real look at it still does.
        return original(self, tx, [_unread(a) for a in args] if _local.stack else args, kwargs)

    return call_function


def _unread(variable: Any) -> Any:
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if not isinstance(variable, LazyVariableTracker) or variable.is_realized():
        return variable
    value = variable.peek_value()
    if not isinstance(value, str):
        return variable
    constant = ConstantVariable.create(value)
    constant.source = variable.original_source()
    return constant


def _foreign_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def invoke_and_store_as_constant(tx: Any, fn: Any, name: str, args: Any, kwargs: Any) -> Any:
        if _local.stack:
            _local.stack[-1].on_foreign(fn, [*args, *kwargs.values()])
        return original(tx, fn, name, args, kwargs)

    return invoke_and_store_as_constant
