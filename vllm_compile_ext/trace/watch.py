"""What a trace looks at: Dynamo is hooked while a Tracer is installed, and each thread's innermost Tracer is told.

The hooks are shared: the first Tracer puts them in place, the last one to leave takes them away, in whatever order they
leave.  `PLACES` lists them.
"""

from __future__ import annotations

import abc
import builtins
import contextlib
import operator
import os
import pkgutil
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from vllm_compile_ext import versions
from vllm_compile_ext.replace import replace
from vllm_compile_ext.trace.call import keep_alive, region, resolve
from vllm_compile_ext.trace.values import ALL, HEAP_TYPE, OWN_OF_MODULES, PLAIN_METACLASSES, is_atom

UNKNOWN: Any = object()  # a value that cannot be found again
NEW: Any = object()  # a value that the trace made


@dataclass
class Seen:
    """What a trace, or a part of it, has looked at.

    functions: those that were traced into.  globals: (name of a Python module, attribute or global of it) that was
    read, with its value, None for one that is not there; the name is None where the globals are of no module.
    identities: two objects of which the trace asked whether they are one, or twice the same one whose identity it used;
    `UNKNOWN` where that cannot be said.  foreign: each function that ran while tracing (`assume_constant_result`), with
    Dynamo's variables for its arguments.
    """

    functions: dict[int, types.FunctionType] = field(default_factory=dict)
    globals: dict[tuple[str | None, str], Any] = field(default_factory=dict)
    identities: list[tuple[Any, Any]] = field(default_factory=list)
    foreign: list[tuple[Callable[..., Any], list[Any]]] = field(default_factory=list)
    listed: set[type] = field(default_factory=set)  # classes whose `__subclasses__` were asked for
    asked: set[tuple[type, type]] = field(default_factory=set)  # is this class one of that ABC's?
    inspected: bool = False  # an opaque object was looked at, not only handed to an operator

    def include(self, part: Seen) -> None:
        """Add what a part of the trace has looked at."""
        self.functions |= part.functions
        self.globals |= part.globals
        self.identities += part.identities
        self.foreign += part.foreign
        self.listed |= part.listed
        self.asked |= part.asked
        self.inspected |= part.inspected

    def roots(self) -> Iterator[Any]:
        """What code could reach but by its arguments: functions that ran, globals, attributes of modules."""
        yield from self.functions.values()
        yield from self.globals.values()


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.stack: list[Any] = []


_local = _Listeners()
_lock = threading.Lock()
_users = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def listening(tracer: Any) -> Iterator[None]:
    """Ask `tracer.on_call` about calls, and tell its `accessed` and `part` what this thread's traces look at."""
    global _users
    with _lock:
        if _users == 0:
            _install()
        _users += 1
    stack = _local.stack
    stack.append(tracer)
    try:
        yield
    finally:
        del stack[len(stack) - 1 - stack[::-1].index(tracer)]
        with _lock:
            _users -= 1
            if _users == 0:
                _undo.close()


def installed() -> bool:
    """Whether Dynamo is hooked now."""
    return _users > 0


def _install() -> None:
    global _undo
    with contextlib.ExitStack() as undo:  # takes back what was done where a place to hook is missing
        for owner, name, replacement in _hooks():
            undo.callback(replace(owner, name, replacement))
        for marker in (keep_alive, region):  # dead code elimination must not drop them
            fx.node._side_effectful_functions.add(marker)
            undo.callback(fx.node._side_effectful_functions.discard, marker)
        _undo = undo.pop_all()


Replacement = Callable[[Callable[..., Any]], Callable[..., Any]]


def _hooks() -> Iterator[tuple[Any, str, Replacement]]:
    """(owner, name, replacement) of each place in Dynamo where a trace tells what it looks at."""
    for owner, names, replacement in PLACES:
        for name in filter(None, map(versions.dynamo, names)):
            yield find_owner(owner), name, replacement
    from torch._dynamo.variables.sets import FrozensetVariable, SetVariable

    without_order = {"call_method", *map(versions.dynamo, _WITHOUT_ORDER)}
    for kind in (SetVariable, FrozensetVariable):
        for name, value in list(vars(kind).items()):
            if isinstance(value, types.FunctionType) and name not in without_order:
                yield kind, name, _tell(_set_used)
    # Its own in torch 2.13, and in 2.14 that of all variables.
    yield next(c for c in SetVariable.__mro__ if "call_method" in vars(c)), "call_method", _tell(_set_method_called)


def find_owner(owner: str) -> Any:
    """What `PLACES` names.  Raises `ImportError` or `AttributeError`."""
    module, _, name = owner.partition(":")
    return pkgutil.resolve_name(f"torch._dynamo.{module}:{versions.dynamo(name) or ''}")


def _tell(note: Callable[..., None]) -> Replacement:
    """A replacement that calls `note` with this thread's tracer and its arguments, and then what it replaces."""

    def replacement(stock: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            if _local.stack:
                note(_local.stack[-1], *args, **kwargs)
            return stock(*args, **kwargs)

        return told

    return replacement


def _module_call(stock: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if not _local.stack:
            return stock(self, tx, args, kwargs)
        return _local.stack[-1].on_call(self, tx, list(args), dict(kwargs), lambda: stock(self, tx, args, kwargs))

    return call_function


def _opaque_made(stock: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.lazy import LazyVariableTracker

    def unread(variable: Any) -> Any:
        """A string that nobody has looked at so far, as one that has no guard; a later, real look still makes it."""
        if not isinstance(variable, LazyVariableTracker) or variable.is_realized():
            return variable
        source = getattr(variable._cache, "source", None)  # none of what is computed from others (torch 2.14)
        if source is None or type(variable.peek_value()) is not str:
            return variable
        constant = ConstantVariable.create(variable.peek_value())
        constant.source = source
        return constant

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        return stock(self, tx, list(map(unread, args)) if _local.stack else args, kwargs)

    return call_function


_ENVIRONMENT = {f.__code__ for f in vars(type(os.environ)).values() if isinstance(f, types.FunctionType)}


def _code_inlined(tracer: Any, parent: Any, func: Any, args: Any, *_: Any, **__: Any) -> None:
    code = func.get_code()
    tracer.accessed.add_code(code)
    fn = getattr(func, "fn", None)
    if isinstance(fn, types.FunctionType):  # else it was made by the trace
        tracer.part.functions.setdefault(id(fn), fn)
    if code in _ENVIRONMENT:  # a method of `os.environ`: which variable is asked for, or all of them
        one = code is type(os.environ).__getitem__.__code__ and len(args) > 1 and args[1].is_python_constant()
        tracer.accessed.add_variable(args[1].as_python_constant() if one else None)


def _foreign_call(tracer: Any, tx: Any, fn: Any, name: str, args: Any, kwargs: Any) -> None:
    tracer.part.foreign.append((fn, [*args, *kwargs.values()]))


def _attribute_loaded(tracer: Any, frame: Any, name: str) -> None:
    """An instruction reads an attribute, which is no call of `getattr` in torch 2.14."""
    if frame.f_code not in OWN_OF_MODULES:
        tracer.accessed.add(_kind(frame.stack[-1]), name)


def _attribute_read(tracer: Any, _: Any, tx: Any, args: Any, kwargs: Any) -> None:
    if len(args) > 1 and tx.f_code not in OWN_OF_MODULES:
        name = args[1].as_python_constant() if args[1].is_python_constant() else None
        if type(name) is str:
            tracer.accessed.add(_kind(args[0]), name)
        else:
            tracer.accessed.add(None, ALL)


def _dict_read(tracer: Any, table: Any, *key: Any) -> None:
    """An object's `__dict__` is read."""
    name = table._maybe_unwrap_key(*key) if key else ALL
    tracer.accessed.add(_kind(table.item), name if type(name) is str else ALL)


def _global_read(tracer: Any, frame: Any, inst: Any) -> None:
    name = frame.f_globals.get("__name__") or ""
    if not name.startswith("namedtuple_"):  # which has what `namedtuple` made for it alone
        module = name if getattr(sys.modules.get(name), "__dict__", None) is frame.f_globals else None
        tracer.part.globals[module, inst.argval] = frame.f_globals.get(inst.argval)
        if inst.argval not in frame.f_globals:
            tracer.part.globals["builtins", inst.argval] = getattr(builtins, inst.argval, None)


def _module_read(tracer: Any, module: Any, tx: Any, name: str) -> None:
    tracer.part.globals[module.value.__name__, name] = getattr(module.value, name, None)


# Equal ones may be one object or two, as the interpreter likes, and are the same to all but `is` and `id`.
_SHARED_BY_CHANCE = (int, float, complex, str, bytes, tuple, frozenset, range)


def _compared(tracer: Any, tx: Any, args: Any, kwargs: Any) -> None:
    values = [found_value(a) for a in args]
    if all(isinstance(v, _SHARED_BY_CHANCE) and type(v) is not bool for v in values):
        tracer.part.identities.append((UNKNOWN, UNKNOWN))


def _identity_asked(tracer: Any, *args: Any) -> None:
    from torch._dynamo.variables import VariableTracker

    values = [found_value(a) for a in args if isinstance(a, VariableTracker)]
    # `x is None` asks for the type of x, which is compared; what the trace made is no other object.
    if not any(v is NEW or is_atom(v) for v in values):
        tracer.part.identities.append((values[0], values[-1]))


def _hashed(tracer: Any, tx: Any, variable: Any) -> None:
    value = found_value(variable)
    # Dynamo traces into a `__hash__` of Python, and asks for the hashes of a dataclass's fields.
    if value is not NEW and not is_atom(value) and type(type(value).__hash__) is not types.FunctionType:
        tracer.part.identities.append((value, value))


def _builtin_called(tracer: Any, builtin: Any, tx: Any, args: Any, kwargs: Any) -> None:
    """Some builtins tell more of their arguments than attributes."""
    fn = builtin.fn
    if not args:
        return
    if fn in (operator.is_, operator.is_not, id):
        _compared(tracer, tx, args, kwargs)
    elif fn is dir:
        tracer.accessed.add(_kind(args[0]), ALL)
    elif fn in (repr, str, format, ascii):
        value = found_value(args[0])
        kind: Any = type(value)
        if value is not NEW and kind.__repr__ is object.__repr__:  # which has its address
            tracer.part.identities.append((value, value))
    elif fn in (isinstance, issubclass) and len(args) > 1:
        kinds = found_value(args[1])
        for kind in kinds if type(kinds) is tuple else (kinds,):
            if isinstance(kind, type) and (type(kind) not in PLAIN_METACLASSES or getattr(kind, "_is_protocol", False)):
                # Its answer may depend on any attribute, which is read outside of the trace.
                tracer.accessed.add(_kind(args[0]), ALL)
            if isinstance(kind, abc.ABCMeta):
                one = found_value(args[0]) if fn is issubclass else _kind(args[0])
                # What is no class of Python is never found by its name, as `dict_items`, and is registered for good.
                if isinstance(one, type) and kind not in one.__mro__ and one.__flags__ & HEAP_TYPE:
                    tracer.part.asked.add((one, kind))


def _class_method_called(tracer: Any, kind: Any, tx: Any, name: str, args: Any, kwargs: Any) -> None:
    if name == "__subclasses__":
        tracer.part.listed.add(kind.value)


def _opaque_inspected(tracer: Any, *args: Any, **kwargs: Any) -> None:
    tracer.part.inspected = True


# What Dynamo does with a set (torch 2.13, `SetVariable`) that is the same in whatever order it iterates.
_WITHOUT_ORDER = {
    "__init__", "python_type", "python_type_var", "__contains__", "has_new_items", "is_new_item", "clone",
    "is_hashable", "hash_impl", "var_getattr", "call_obj_hasattr", "install_set_contains_guard", "sq_contains",
    "sq_length", "richcompare_impl", "is_python_equal", "is_python_constant", "python_type_name",
}  # fmt: skip


def _set_used(tracer: Any, *given: Any, **named: Any) -> None:
    if any(getattr(a, "source", None) is not None for a in (*given, *named.values())):  # else the trace has made it
        tracer.accessed.add_order()


def _set_method_called(tracer: Any, self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> None:
    from torch._dynamo.variables.sets import SetVariable

    if isinstance(self, SetVariable) and name not in ("__contains__", "__len__"):
        _set_used(tracer, self, *args, **kwargs)


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
    return resolve(InstructionTranslator.current_tx(), variable.source, UNKNOWN)


_BUILTIN = "variables.builtin:BuiltinVariable"
_FRAME, _INLINED = "symbolic_convert:InstructionTranslatorBase", "symbolic_convert:InliningInstructionTranslator"
# Owners below `torch._dynamo`, names there (both as in torch 2.13), and what takes their place; but for sets.
PLACES: tuple[tuple[str, tuple[str, ...], Replacement], ...] = (
    # A call of a module, which may not be traced, and the making of an opaque object.
    ("variables.nn_module:UnspecializedNNModuleVariable", ("call_function",), _module_call),
    ("variables.script_object:OpaqueObjectClassVariable", ("call_function",), _opaque_made),
    # Code that is traced into, and functions that run while tracing, which read what they like.
    (_INLINED, ("build_inline_tracer",), _tell(_code_inlined)),
    ("variables.functions", ("invoke_and_store_as_constant",), _tell(_foreign_call)),
    ("variables.nn_module", ("invoke_and_store_as_constant",), _tell(_foreign_call)),
    # Attributes and globals, by their names.
    (_FRAME, ("_load_attr",), _tell(_attribute_loaded)),
    ("variables.builtin:GetAttrBuiltinVariable", ("call_function",), _tell(_attribute_read)),
    ("variables.builtin:HasAttrBuiltinVariable", ("call_function",), _tell(_attribute_read)),
    ("variables.dicts:SideEffectsProxyDict", ("__getitem__", "__contains__", "__iter__", "__len__"), _tell(_dict_read)),
    (_FRAME, ("_load_global",), _tell(_global_read)),
    (_INLINED, ("_load_global",), _tell(_global_read)),
    ("variables.misc:PythonModuleVariable", ("var_getattr", "call_obj_hasattr"), _tell(_module_read)),
    # Which object something is, and other questions to it as a whole.
    ("symbolic_convert:compare_op_handlers", ("is", "is not"), _tell(_compared)),
    ("variables.object_protocol", ("vt_identity_compare",), _tell(_identity_asked)),
    ("variables.builtin", ("vt_identity_compare",), _tell(_identity_asked)),
    (_BUILTIN, ("call_id",), _tell(_identity_asked)),
    ("variables.object_protocol", ("generic_hash_impl",), _tell(_hashed)),
    (_BUILTIN, ("call_function",), _tell(_builtin_called)),
    ("variables.user_defined:UserDefinedClassVariable", ("call_method",), _tell(_class_method_called)),
    (
        "variables.script_object:TorchScriptObjectVariable",
        ("var_getattr", "call_method", "hash_impl", "richcompare_impl", "is_python_equal"),
        _tell(_opaque_inspected),
    ),
)
