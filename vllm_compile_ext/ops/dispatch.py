"""Which forward method of a custom op vLLM runs: `custom_ops` enables the op or not, and the platform chooses.

The same answers as those of vLLM's `CustomOp`, with reasons, and without making an op or a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What vLLM calls of an enabled op, by platform.  An op that is not enabled runs `forward_native` everywhere.
CHOSEN = {
    "cuda": "forward_cuda",
    "rocm": "forward_hip",
    "cpu": "forward_cpu",
    "xpu": "forward_xpu",
    "tpu": "forward_tpu",
    "out of tree": "forward_oot",
}
# What the base class calls in place of a method that an op does not define.
INSTEAD = dict.fromkeys(("forward_cpu", "forward_xpu", "forward_tpu", "forward_oot"), "forward_native") | {
    "forward_hip": "forward_cuda"
}


def rule(name: str, custom_ops: Sequence[str]) -> tuple[bool, str]:
    """Whether the op `name` is enabled, and the entry of `custom_ops` that decides it: its own, else the mode.

    An op that is made with `enforce_enable` is enabled whatever they say.
    """
    modes = [entry for entry in custom_ops if entry in ("all", "none")]
    entries = [entry for entry in (f"+{name}", f"-{name}") if entry in custom_ops]
    if len(entries) == 2:
        raise ValueError(f"custom_ops both enables and disables {name}: remove +{name} or -{name}")
    if len(modes) != 1:
        raise ValueError(f"custom_ops needs 'all' or 'none', once: it has {', '.join(modes) or 'none of them'}")
    why = (entries or modes)[0]
    return why in ("all", f"+{name}"), why


def method(cls: type[Any], platform: str) -> str:
    """The forward method of the op `cls` that runs on `platform` when the op is enabled: `CHOSEN`, or its replacement.

    What an op decides by itself is not seen: an `__init__` that chooses another method, or a method that calls another.
    """
    name = CHOSEN[platform]
    owner = next(base for base in cls.__mro__ if name in vars(base))
    return INSTEAD.get(name, name) if owner.__name__ == "CustomOp" else name


def implementations(cls: type[Any]) -> list[str]:
    """What the op `cls` defines: "native", "cuda", "cpu"."""
    names = ("native", *(method.removeprefix("forward_") for method in CHOSEN.values()))
    bases = [base for base in cls.__mro__ if base.__name__ != "CustomOp"]
    return [name for name in names if any(f"forward_{name}" in vars(base) for base in bases)]
