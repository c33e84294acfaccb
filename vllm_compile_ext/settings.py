"""Every environment variable of the plugin: name, type, default, meaning.

`Settings` is the one table: the command ``vllm-compile-ext env``, the docs page and what vLLM knows are made from it.
None of the variables changes compiled code: all are left out of vLLM's compile cache key.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_compile_ext import __version__
from vllm_compile_ext.replace import Undo

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_ALLOWED = {bool: "0 or 1", int: "a whole number from 0", str: "a folder"}


class EnvError(ValueError):
    """A variable holds a value that its type does not allow; the message names both and what is allowed."""


def _variable(default: bool | int | str, meaning: str, *, shown: str = "", choices: tuple[str, ...] = ()) -> Any:
    """shown: the default in words, where the value does not say it.  choices: the texts that are allowed."""
    return field(default=default, metadata={"meaning": meaning, "shown": shown, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """The plugin's variables, one field each, parsed."""

    VLLM_COMPILE_EXT: bool = _variable(True, "0 leaves vLLM exactly as it is without the plugin.")
    VLLM_COMPILE_EXT_STRICT: bool = _variable(
        False,
        "1 makes it an error when the plugin cannot take over (an unsupported version, a bad variable). "
        "With 0 vLLM starts stock and one line says why.",
    )
    VLLM_COMPILE_DEPYF: bool = _variable(
        False,
        "1 decompiles Dynamo's bytecode of every compiled callable into transformed_code.py, in the model's "
        "cache folder and, when one is set, the debug dump folder. 0 decompiles nothing while starting.",
    )
    VLLM_COMPILE_WORKERS: int = _variable(
        0,
        "How many kernels compile at a time in a cold start. 0 stands for the cores that the process may use.",
    )
    VLLM_COMPILE_STORE: str = _variable(
        "",
        "Where compiled code is kept between starts. What lies there is run: the folder is made for its owner "
        "only and is not used while others can write to it.",
        shown="compile_store in vLLM's cache root",
    )
    VLLM_COMPILE_STORE_GROUP: bool = _variable(
        False,
        "1 uses a store that its group can write, where this process has that group: whoever is in the group "
        "can then run code in this process. For volumes that several users of a cluster share.",
    )
    VLLM_COMPILE_STORE_MAX_GB: int = _variable(
        10,
        "How many GiB compiled code may take in the store; what was not used for longest goes first. "
        "0 stands for no limit.",
    )
    VLLM_COMPILE_CUDAGRAPHS: str = _variable(
        "lazy",
        "When CUDA graphs are captured: lazy, each when traffic first asks for its shape, and before the "
        "first request those that earlier starts used; idle, also the others while there are no requests; eager, all "
        "while starting, as in stock vLLM.",
        choices=("lazy", "idle", "eager"),
    )
    VLLM_COMPILE_CUSTOM_OPS: str = _variable(
        "stock",
        "Which of vLLM's custom ops run their kernels: stock, as vLLM decides; auto, as measured here by "
        "vllm-compile-ext ops MODEL --measure, unless custom_ops are set.",
        choices=("stock", "auto"),
    )
    VLLM_COMPILE_WAIT: int = _variable(
        200,
        "How many seconds to wait for another process that compiles the same model, before doing it here too.",
    )
    VLLM_COMPILE_STARTS: bool = _variable(
        True,
        "Where each start spends its time is kept in compile_starts in vLLM's cache root, the last 20, for "
        "vllm-compile-ext report. 0 records nothing. 1 also times the imports of programs that are not called vllm.",
    )
    VLLM_COMPILE_FORK: bool = _variable(
        True,
        "vllm serve forks its engines and workers from a process that has everything imported, where a fork is as a "
        "spawned process would be; else a line of the log says why it spawns them. 0 always spawns.",
    )
    VLLM_COMPILE_PYCACHE: bool = _variable(
        False,
        "Bytecode of modules that have none, which Python would compile in each process, is kept in compile_pycache in "
        "vLLM's cache root, private to the user. 0: as Python does.",
    )
    VLLM_COMPILE_STANDBY: str = _variable(
        "",
        "Folder of the socket at which `vllm serve` looks for `vllm-compile-ext standby`; only its user may have "
        "access to it. Without a value it is one of the user's own in /tmp.",
    )
    VLLM_COMPILE_PROGRESS: bool = _variable(
        True,
        "What a start is doing is said in a line of the log every 10 s. 0 says nothing; neither does "
        "VLLM_COMPILE_STARTS=0.",
    )


def _parse(variable: Any, raw: str) -> bool | int | str:
    value, choices = raw.strip().lower(), variable.metadata["choices"]
    if isinstance(variable.default, bool):
        if value in (*_TRUE, *_FALSE):
            return value in _TRUE
    elif isinstance(variable.default, int):
        if value.isdecimal():
            return int(value)
    elif not choices:
        return raw
    elif value in choices:
        return value
    raise EnvError(f"{variable.name}={raw!r} is not allowed: use {_allowed(variable)}, or unset it")


def _allowed(variable: Any) -> str:
    choices = variable.metadata["choices"]
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if choices else _ALLOWED[type(variable.default)]


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Parse the variables that are set; an empty value counts as unset.  Raises `EnvError` on the first bad one."""
    values: dict[str, Any] = {f.name: _parse(f, environ[f.name]) for f in fields(Settings) if environ.get(f.name)}
    return Settings(**values)


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """vLLM's cache root, found as vLLM 0.32.0 does (`vllm/envs.py`, VLLM_CACHE_ROOT) and without importing it."""
    base = environ.get("XDG_CACHE_HOME", "~/.cache")
    return _absolute(environ.get("VLLM_CACHE_ROOT", f"{base}/vllm" if base else "vllm"))


def store(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of the store of compiled code: VLLM_COMPILE_STORE, or its default."""
    named = environ.get("VLLM_COMPILE_STORE")
    return _absolute(named) if named else cache_root(environ) / "compile_store"


def store_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants nothing kept between starts: VLLM_DISABLE_COMPILE_CACHE, as vLLM 0.32.0 reads it."""
    return environ.get("VLLM_DISABLE_COMPILE_CACHE", "0").strip() not in ("", "0")


def store_limit() -> int | None:
    """Bytes that the store's entries may take, None for no limit."""
    return load().VLLM_COMPILE_STORE_MAX_GB * 2**30 or None


def store_group() -> bool:
    """Whether a group may share the store: VLLM_COMPILE_STORE_GROUP; a bad value counts as off."""
    return _switched("VLLM_COMPILE_STORE_GROUP", bad=False)


def _absolute(name: str) -> Path:
    # Not Path.expanduser: like vLLM, this does not raise for a user without a home.
    return Path(os.path.expanduser(name)).absolute()  # noqa: PTH111


def strict() -> bool:
    """Whether ``VLLM_COMPILE_EXT_STRICT`` is on, whatever the other variables hold; a bad value of it counts as on."""
    return _switched("VLLM_COMPILE_EXT_STRICT", bad=True)


def _switched(name: str, *, bad: bool) -> bool:
    """Whether a switch is on, whatever the other variables hold; `bad` where its own value is not allowed."""
    try:
        return bool(getattr(load({name: os.environ.get(name, "")}), name))
    except EnvError:
        return bad


@dataclass(frozen=True)
class Row:
    """One line of the table that people read."""

    name: str
    allowed: str
    default: str
    meaning: str


def table() -> list[Row]:
    """The variables as rows, in the order of `Settings`."""
    return [
        Row(f.name, _allowed(f), f.metadata["shown"] or _text(f.default), f.metadata["meaning"])
        for f in fields(Settings)
    ]


def changed(switches: Settings) -> list[str]:
    """What is set other than by default, as one would set it: "NAME=value"."""
    values = {f.name: getattr(switches, f.name) for f in fields(Settings)}
    return [f"{f.name}={_text(values[f.name])}" for f in fields(Settings) if values[f.name] != f.default]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(int(value))


# Rows of the table of changes.


def add_to_vllm() -> Undo:
    """Add our variables to vLLM's table, in place: others may hold it."""
    import vllm.envs

    def value(name: str) -> Any:
        try:
            return getattr(load(), name)
        except EnvError:  # reported by the plugin; vLLM reads all variables at once and must not fail here
            return os.environ.get(name)

    known = vllm.envs.environment_variables
    added = {f.name: functools.partial(value, f.name) for f in fields(Settings) if f.name not in known}
    known.update(added)

    def undo() -> None:
        for name in added:
            known.pop(name, None)

    return undo


def without_ours(compile_factors: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    """vLLM's part of its compile cache key that comes from variables, without ours."""
    ours = {f.name for f in fields(Settings)}
    return lambda: {name: value for name, value in compile_factors().items() if name not in ours}


def with_our_version(compile_factors: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
    """The same, and the plugin's version."""
    stock = without_ours(compile_factors)
    return lambda: stock() | {"vllm_compile_ext": __version__}
