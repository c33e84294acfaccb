"""The closed tables of Dynamo's sources and guards, and the places that are hooked, against the installed torch."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from tests.unit.trace.models import stack
from vllm_compile_ext.trace import kinds, values, watch
from vllm_compile_ext.trace.tracer import Tracer

# These lead to values that change without the layer (random numbers, gradients, weak references, other processes'
# modules), or that have not been met in a layer.
REFUSED_SOURCES = {
    "AttrProxySource", "BackwardStateSource", "CallMethodItemSource", "CurrentStreamSource", "DynamicScalarSource",
    "EphemeralSource", "FSDPNNModuleSource", "FlattenScriptObjectSource", "FloatTensorSource", "GlobalWeakRefSource",
    "GradSource", "IndexedSource", "NumpyTensorSource", "OptimizerSource", "RandomValueSource",
    "ScriptObjectQualifiedNameSource", "SubclassAttrListSource", "WeakRefCallSource",
    "ContextVarGetSource", "UnwrapCollectiveTensorSource",  # since torch 2.14
}  # fmt: skip
REFUSED_GUARDS = {
    "DICT_VERSION", "DTENSOR_SPEC_MATCH", "DUAL_LEVEL", "FAKE_SCRIPT_TYPE_MATCH", "FSDP_TRAINING_STATE",
    "TENSOR_SUBCLASS_METADATA_MATCH",
    "COW_TENSOR_MATCH",  # since torch 2.14
}  # fmt: skip


def sources() -> set[str]:
    from torch._dynamo import source
    from torch._guards import ChainedSource, Source

    found = {n for n, v in vars(source).items() if inspect.isclass(v) and issubclass(v, Source)}
    return found - {Source.__name__, ChainedSource.__name__}


def guards() -> set[str]:
    from torch._dynamo.guards import GuardBuilder

    return {name for name in vars(GuardBuilder) if name.isupper()}


def test_every_kind_of_source_is_known() -> None:
    assert kinds.COMPARED < sources() <= kinds.COMPARED | REFUSED_SOURCES
    assert kinds.COMPARED.isdisjoint(REFUSED_SOURCES)


def test_every_kind_of_guard_is_known() -> None:
    known = kinds.VALUE | kinds.IDENTITY
    assert known < guards() <= known | REFUSED_GUARDS
    assert known.isdisjoint(REFUSED_GUARDS)


def test_every_place_that_is_hooked_is_there() -> None:
    """`_install` raises where one is gone; without this test that would be a line in a log."""
    with Tracer(stack()).install():
        assert watch.installed()
    assert not watch.installed()


def test_what_a_module_has_of_its_own_is_known() -> None:
    """A new attribute of nn.Module would be one of the layer's, and so seen or not by its name."""
    structure = {"_parameters", "_buffers", "_modules"}
    assert structure < set(vars(nn.Module()))
    assert {k for k in vars(nn.Module()) if "hooks" in k} == {k for k in values.SEEN if "hooks" in k}


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList, nn.Sequential])
def test_attributes_of_torchs_modules_are_read_under_their_names_only(kind: type) -> None:
    assert values.is_ordinary(kind)


def test_the_state_that_dynamo_guards_can_be_read() -> None:
    from torch._C._dynamo.guards import GlobalStateGuard

    before = GlobalStateGuard().__getstate__()
    with torch.autocast("cpu", torch.bfloat16):
        assert GlobalStateGuard().__getstate__() != before
    assert GlobalStateGuard().__getstate__() == before
