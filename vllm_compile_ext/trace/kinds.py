"""The kinds of sources and guards that Dynamo records of a trace, and what each of them means for a copy.

What is in no table refuses.  `tests/contract/test_trace_kinds.py` has those that are left out on purpose and compares
all with the classes and methods of the installed torch, so that a new torch fails a test and not a user.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# What a source of the kind leads to is compared (values.py): an attribute, an item, a closure's cell, a type, ...
COMPARED = {
    "AttrSource", "CallFunctionNoArgsSource", "CellContentsSource", "ClosureSource", "CodeSource",
    "ConstDictKeySource", "ConstantSource", "ConvertIntSource", "DataclassFieldsSource", "DefaultsSource",
    "DictGetItemSource", "DictSubclassGetItemSource", "GenericAttrSource", "GetItemSource", "GlobalSource",
    "GlobalStateSource", "ImportSource", "ListGetItemSource", "LocalCellSource", "LocalSource", "NNModuleSource",
    "NamedTupleFieldsSource", "NegateSource", "NonSerializableSetGetItemSource", "ParamBufferSource",
    "ShapeEnvSource", "SkipGuardSource", "SyntheticLocalSource", "TempLocalSource", "TensorPropertySource",
    "TorchFunctionModeStackSource", "TupleIteratorGetItemSource", "TypeDictSource", "TypeMROSource", "TypeSource",
    "UnspecializedBuiltinNNModuleSource", "UnspecializedNNModuleSource", "UnspecializedParamBufferSource",
}  # fmt: skip

# The guard's value is compared, or it is about the state of torch (call.py).
VALUE = {
    "AUTOGRAD_SAVED_TENSORS_HOOKS", "BOOL_MATCH", "BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "CONSTANT_MATCH",
    "CONSTANT_SUBCLASS_MATCH", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS", "DICT_CONTAINS", "DICT_KEYS_MATCH",
    "DICT_NOT_CONTAINS", "DISPATCH_KEY_SET_MATCH", "DUPLICATE_INPUT", "EMPTY_NN_MODULE_HOOKS_DICT", "EQUALS_MATCH",
    "FUNCTION_MATCH", "FUNCTORCH_STACK_MATCH", "GLOBAL_STATE", "GRAD_MODE", "HASATTR", "MAPPING_KEYS_CHECK",
    "MODULE_MATCH", "NN_MODULE", "NONE_MATCH", "NOT_NONE_MATCH", "NOT_PRESENT_IN_GENERIC_DICT",
    "OPAQUE_OBJ_GUARD_FN_MATCH", "RANGE_ITERATOR_MATCH", "COUNT_ITERATOR_MATCH", "SEQUENCE_LENGTH", "SET_CONTAINS",
    "SET_NOT_CONTAINS", "SHAPE_ENV", "TENSOR_MATCH", "TORCH_FUNCTION_STATE", "TUPLE_ITERATOR_LEN", "TYPE_MATCH",
}  # fmt: skip
# The trace depends on which object it is.
IDENTITY = {"ID_MATCH", "WEAKREF_ALIVE"}


def guards(tx: Any) -> set[Any]:
    """The guards that the trace has so far."""
    return set(tx.output.tracing_context.guards_context.dynamo_guards)


def bases(source: Any) -> Iterator[Any]:
    """What a source is read from, one step after the other; the last is a local or a global."""
    while (source := getattr(source, "base", None)) is not None:
        yield source


def last_step(source: Any) -> tuple[Any, Any]:
    """(base, key) of the last attribute or item access of a source; (None, None) for one that is not such an access."""
    for step in (source, *bases(source)):
        for name in ("member", "index"):
            key = getattr(step, name, None)
            if key is not None and hasattr(step, "base"):
                return step.base, key if isinstance(key, str | int | bool | float | tuple) else None
    return None, None
