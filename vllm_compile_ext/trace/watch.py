"""What a trace has looked at: the places where Dynamo is hooked while a Tracer is installed, and their undo.

The hooks are shared: the first Tracer puts them in place, the last one to leave takes them away, in whatever order they
leave.  Each thread's innermost Tracer is the one that is told.  Names are those of torch 2.13, below `torch._dynamo`:

* `variables.UnspecializedNNModuleVariable.call_function`: a call of an nn.Module;
* `variables.script_object.OpaqueObjectClassVariable.call_function`: the making of an opaque object;
* `symbolic_convert.InliningInstructionTranslator.build_inline_tracer`: each function that is traced into;
* `variables.builtin.GetAttrBuiltinVariable`, `HasAttrBuiltinVariable`, `misc.PythonModuleVariable`,
  `dicts.SideEffectsProxyDict` (an object's `__dict__`), `symbolic_convert` `_load_global`: attributes and globals;
* `variables.object_protocol.{vt_identity_compare, generic_hash_impl}`, `BuiltinVariable.call_id`: which object it is;
* `variables.sets`, all but what does not depend on the order of a set;
* `variables.user_defined.UserDefinedClassVariable.call_method`: which classes come from another one;
* `variables.functions.invoke_and_store_as_constant`: functions that run while tracing, which read what they like;
* `torch.fx.node._side_effectful_functions`: nodes that dead code elimination must not drop.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import functools
import operator
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx as fx

from vllm_compile_ext.trace.bodies import keep_alive, region
from vllm_compile_ext.trace.values import ALL, OWN_OF_MODULES, PLAIN_METACLASSES, Accessed, is_atom

UNKNOWN: Any = object()  # a value that cannot be found again
NEW: Any = object()  # a value that the trace made


@dataclass
class Foreign:
    """A call of a function that ran while tracing (`assume_constant_result`), with Dynamo's variables."""

    fn: Callable[..., Any]
    variables: list[Any]


@dataclass
class Seen:
    """What a trace, or a part of it, has looked at.

    functions: those that were traced into.  globals: (name of a Python module, attribute or global of it) that was
    read, with its value; the name is None where the globals are of no module.  identities: two objects of which the
    trace asked whether they are one, or twice the same one whose identity it used; `UNKNOWN` where that cannot be said.
    A global that is not there is None.
    """

    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    globals: dict[tuple[str | None, str], Any] = field(default_factory=dict)
    identities: list[tuple[Any, Any]] = field(default_factory=list)
    foreign: list[Foreign] = field(default_factory=list)
    listed: set[type] = field(default_factory=set)  # classes whose `__subclasses__` were asked for
    asked: set[tuple[type, type]] = field(default_factory=set)  # is this class one of that ABC's?
    inspected: bool = False  # an opaque object was looked at, not only handed to an operator

    def roots(self) -> Iterator[Any]:
        """What code could reach but by its arguments: functions that ran, globals, attributes of modules."""
        yield from self.functions.values()
        yield from self.globals.values()


class Listener(Protocol):
    """Who is asked about a call, where `trace` traces it as Dynamo would, and told what the trace looks at.

    accessed: the attributes that it has accessed.  parts: where to note what is looked at.
    """

    accessed: Accessed
    parts: list[Seen]

    def on_call(
        self, module: Any, tx: Any, args: list[Any], kwargs: dict[str, Any], trace: Callable[[], Any]
    ) -> Any: ...


class _Local(threading.local):
    def __init__(self) -> None:
        self.stack: list[Listener] = []


_local = _Local()
_lock = threading.Lock()
_users = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` while the context lasts, on this thread."""
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
    from torch._dynamo import symbolic_convert
    from torch._dynamo.variables import builtin, dicts, functions, misc, nn_module, object_protocol, script_object, sets
    from torch._dynamo.variables.user_defined import UserDefinedClassVariable

    _patch(nn_module.UnspecializedNNModuleVariable, "call_function", _module_call)
    _patch(script_object.OpaqueObjectClassVariable, "call_function", _opaque_call)
    _patch(symbolic_convert.InliningInstructionTranslator, "build_inline_tracer", _inlined)
    _patch(builtin.GetAttrBuiltinVariable, "call_function", _attribute)
    _patch(builtin.HasAttrBuiltinVariable, "call_function", _attribute)
    _patch(symbolic_convert.InstructionTranslatorBase, "_load_global", _global)
    _patch(symbolic_convert.InliningInstructionTranslator, "_load_global", _global)
    _patch(misc.PythonModuleVariable, "var_getattr", _module_attribute)
    _patch(misc.PythonModuleVariable, "call_obj_hasattr", _module_attribute)
    for fn, name in ((operator.is_, "is"), (operator.is_not, "is not")):
        _patch_item(symbolic_convert.compare_op_handlers, name, _comparison(fn))
    for name in ("var_getattr", "call_method", "hash_impl", "richcompare_impl", "is_python_equal"):
        _patch(script_object.TorchScriptObjectVariable, name, _opaque)
    for name in ("__getitem__", "__contains__", "__iter__", "__len__"):
        _patch(dicts.SideEffectsProxyDict, name, _of_dict)
    for kind in (sets.SetVariable, sets.FrozensetVariable):
        for name, value in list(vars(kind).items()):
            if isinstance(value, types.FunctionType) and name not in _WITHOUT_ORDER:
                _patch(kind, name, _of_set)
    _patch(UserDefinedClassVariable, "call_method", _class_method)
    _patch(builtin.BuiltinVariable, "call_id", _identity)
    _patch(builtin.BuiltinVariable, "call_function", _builtin_call)
    for owner in (object_protocol, builtin):
        _patch(owner, "vt_identity_compare", _identity)
    _patch(object_protocol, "generic_hash_impl", _hash)
    for owner in (functions, nn_module):
        _patch(owner, "invoke_and_store_as_constant", _foreign_call)
    for marker in (keep_alive, region):
        fx.node._side_effectful_functions.add(marker)
        _undo.append(functools.partial(fx.node._side_effectful_functions.discard, marker))


def _remove() -> None:
    while _undo:
        _undo.pop()()


def _patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = vars(owner)[name]
    static = isinstance(original, staticmethod)
    function = original.__func__ if static else original
    ours: Any = functools.wraps(function)(make(function))
    ours = staticmethod(ours) if static else ours
    setattr(owner, name, ours)

    def undo() -> None:
        if vars(owner).get(name) is ours:  # else somebody has patched it since: theirs calls ours, which does nothing
            setattr(owner, name, original)

    _undo.append(undo)


def _patch_item(table: dict[str, Any], key: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = table[key]
    ours = table[key] = make(original)

    def undo() -> None:
        if table.get(key) is ours:
            table[key] = original

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
    if type(value) is not str:
        return variable
    constant = ConstantVariable.create(value)
    constant.source = variable.original_source()
    return constant


def _inlined(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_inline_tracer(parent: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if _local.stack:
            code, fn = func.get_code(), getattr(func, "fn", None)
            note_code(_local.stack[-1], code, fn)
            if code in _ENVIRONMENT:
                _environment(_local.stack[-1], code, args[0])
        return original(parent, func, *args, **kwargs)

    return build_inline_tracer


def note_code(listener: Listener, code: types.CodeType, fn: Any = None) -> None:
    """Code is traced; of the function `fn`, if it is one from outside of the trace."""
    listener.accessed.add_code(code)
    if isinstance(fn, types.FunctionType):
        for seen in listener.parts:
            seen.functions.setdefault(id(fn), fn)


_ENVIRONMENT = {f.__code__ for f in vars(type(os.environ)).values() if isinstance(f, types.FunctionType)}


def _environment(listener: Listener, code: types.CodeType, args: Any) -> None:
    """A method of `os.environ` is traced: which variable is asked for, or all of them."""
    one = code is type(os.environ).__getitem__.__code__ and len(args) > 1 and args[1].is_python_constant()
    listener.accessed.add_variable(args[1].as_python_constant() if one else None)


def _global(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_global(self: Any, inst: Any) -> Any:
        name = self.f_globals.get("__name__") or ""
        if _local.stack and not name.startswith("namedtuple_"):  # which has what `namedtuple` made for it alone
            module = name if getattr(sys.modules.get(name), "__dict__", None) is self.f_globals else None
            for seen in _local.stack[-1].parts:
                seen.globals[module, inst.argval] = self.f_globals.get(inst.argval)
                if inst.argval not in self.f_globals:
                    seen.globals["builtins", inst.argval] = getattr(builtins, inst.argval, None)
        return original(self, inst)

    return load_global


def _attribute(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if _local.stack and len(args) > 1 and tx.f_code not in OWN_OF_MODULES:
            accessed, name = _local.stack[-1].accessed, args[1]
            if name.is_python_constant() and type(name.as_python_constant()) is str:
                accessed.add(_kind(args[0]), name.as_python_constant())
            else:
                accessed.add(None, ALL)
        return original(self, tx, args, kwargs)

    return call_function


def _of_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: Any, *key: Any) -> Any:
        if _local.stack:
            name = self._maybe_unwrap_key(*key) if key else ALL
            _local.stack[-1].accessed.add(_kind(self.item), name if type(name) is str else ALL)
        return original(self, *key)

    return read


def _kind(variable: Any) -> Any:
    """The class of what a variable stands for; None where it is not an object of its own, as `super()`."""
    from torch._dynamo.variables import UserDefinedObjectVariable

    real = variable.realize()
    if isinstance(real, UserDefinedObjectVariable):
        return type(real.value)
    if real.is_tensor():
        return torch.nn.Parameter
    kind: Any = None
    with contextlib.suppress(NotImplementedError):
        kind = real.python_type()
    return kind if isinstance(kind, type) and kind is not super else None


def _module_attribute(original: Callable[..., Any]) -> Callable[..., Any]:
    def of_module(self: Any, tx: Any, name: str) -> Any:
        if _local.stack:
            for seen in _local.stack[-1].parts:
                seen.globals[self.value.__name__, name] = getattr(self.value, name, None)
        return original(self, tx, name)

    return of_module


def _identity(original: Callable[..., Any]) -> Callable[..., Any]:
    def about(*args: Any) -> Any:
        if _local.stack:
            from torch._dynamo.variables import VariableTracker

            values = [found_value(a) for a in args if isinstance(a, VariableTracker)]
            # `x is None` asks for the type of x, which is compared; what the trace made is no other object.
            if not any(v is NEW or is_atom(v) for v in values):
                _note(values[0], values[-1])
        return original(*args)

    return about


def _hash(original: Callable[..., Any]) -> Callable[..., Any]:
    def generic_hash_impl(tx: Any, variable: Any) -> Any:
        if _local.stack:
            value = found_value(variable)
            # Dynamo traces into a `__hash__` of Python, and asks for the hashes of a dataclass's fields.
            if value is not NEW and not is_atom(value) and type(type(value).__hash__) is not types.FunctionType:
                _note(value, value)
        return original(tx, variable)

    return generic_hash_impl


def _builtin_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if _local.stack and args:
            _asked(self.fn, args)
        return original(self, tx, args, kwargs)

    return call_function


def _comparison(fn: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def compare(tx: Any, args: Any, kwargs: Any) -> Any:
            if _local.stack:
                _asked(fn, args)
            return original(tx, args, kwargs)

        return compare

    return make


# Equal ones may be one object or two, as the interpreter likes, and are the same to all but `is` and `id`.
_SHARED_BY_CHANCE = (int, float, complex, str, bytes, tuple, frozenset, range)


def _asked(fn: Any, args: Any) -> None:
    """A builtin that may tell more of its arguments than their attributes is called."""
    if fn in (operator.is_, operator.is_not, id):
        values = [found_value(a) for a in args]
        if all(isinstance(v, _SHARED_BY_CHANCE) and type(v) is not bool for v in values):
            _note(UNKNOWN, UNKNOWN)
    elif fn is dir:
        _local.stack[-1].accessed.add(_kind(args[0]), ALL)
    elif fn in (repr, str, format, ascii):
        value = found_value(args[0])
        kind: Any = type(value)
        if value is not NEW and kind.__repr__ is object.__repr__:  # which has its address
            _note(value, value)
    elif fn in (isinstance, issubclass) and len(args) > 1:
        kinds = found_value(args[1])
        for kind in kinds if type(kinds) is tuple else (kinds,):
            meta: Any = type(kind)
            if isinstance(kind, type) and (meta not in PLAIN_METACLASSES or getattr(kind, "_is_protocol", False)):
                # Its answer may depend on any attribute, which is read outside of the trace.
                _local.stack[-1].accessed.add(_kind(args[0]), ALL)
            if isinstance(kind, abc.ABCMeta):
                _registered(found_value(args[0]) if fn is issubclass else _kind(args[0]), kind)


def _registered(kind: Any, base: abc.ABCMeta) -> None:
    # What is no class of Python is never found by its name, as `dict_items`, and is registered once and for all.
    if isinstance(kind, type) and base not in kind.__mro__ and kind.__flags__ & (1 << 9):
        for seen in _local.stack[-1].parts:
            seen.asked.add((kind, base))


def _note(one: Any, other: Any) -> None:
    for seen in _local.stack[-1].parts:
        seen.identities.append((one, other))


# What Dynamo does with a set (torch 2.13, `SetVariable`) that is the same in whatever order it iterates.
_WITHOUT_ORDER = {
    "__init__", "python_type", "python_type_var", "__contains__", "has_new_items", "is_new_item", "clone",
    "is_hashable", "hash_impl", "var_getattr", "call_obj_hasattr", "install_set_contains_guard", "sq_contains",
    "sq_length", "richcompare_impl", "is_python_equal",
}  # fmt: skip


def _of_set(original: Callable[..., Any]) -> Callable[..., Any]:
    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = original.__name__ == "call_method"
        if _local.stack and not (method and args[1] in ("__contains__", "__len__")):
            given = (self, *args, *kwargs.values(), *(args[2] if method else ()))
            if any(getattr(a, "source", None) is not None for a in given):  # what the trace makes is alike each time
                _local.stack[-1].accessed.add_order()
        return original(self, *args, **kwargs)

    return seen


def _class_method(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if _local.stack and name == "__subclasses__":
            for seen in _local.stack[-1].parts:
                seen.listed.add(self.value)
        return original(self, tx, name, args, kwargs)

    return call_method


def _opaque(original: Callable[..., Any]) -> Callable[..., Any]:
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        if _local.stack:
            for seen in _local.stack[-1].parts:
                seen.inspected = True
        return original(*args, **kwargs)

    return looked_at


def found_value(variable: Any) -> Any:
    """The real object that a variable stands for; `NEW` for one that the trace made, `UNKNOWN` if it is not found."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if isinstance(variable, LazyVariableTracker):
        if not variable.is_realized():
            return variable.original_value()
        variable = variable.realize()
    if isinstance(variable, ConstantVariable):
        return variable.value
    if variable.source is None:
        return vars(variable).get("value", NEW)
    try:
        return InstructionTranslator.current_tx().output.resolve_source_value(variable.source)
    except Exception:  # a source of Dynamo's own making, which no expression leads to
        return UNKNOWN


def _foreign_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def invoke_and_store_as_constant(tx: Any, fn: Any, name: str, args: Any, kwargs: Any) -> Any:
        if _local.stack:
            for seen in _local.stack[-1].parts:
                seen.foreign.append(Foreign(fn, [*args, *kwargs.values()]))
        return original(tx, fn, name, args, kwargs)

    return invoke_and_store_as_constant
