"""Every environment variable of the plugin: name, type, default, meaning.

`Settings` is the one table.  The command ``vllm-compile-ext env``, the docs page and the registration with vLLM are all
made from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class EnvError(ValueError):
    """A variable holds a value that its type does not allow; the message names both and what is allowed."""


def _switch(*, default: bool, meaning: str, in_key: bool = False) -> Any:
    return field(default=default, metadata={"meaning": meaning, "in_key": in_key, "allowed": "0 or 1"})


def _count(*, default: int, meaning: str, in_key: bool = False) -> Any:
    return field(default=default, metadata={"meaning": meaning, "in_key": in_key, "allowed": "a whole number from 0"})


def _choice(*allowed: str, meaning: str) -> Any:
    """One of `allowed`; the first is the default."""
    text = ", ".join(allowed[:-1]) + f" or {allowed[-1]}"
    return field(
        default=allowed[0], metadata={"meaning": meaning, "in_key": False, "allowed": text, "choices": allowed}
    )


def _folder(*, default: str, meaning: str) -> Any:
    """A folder's name, kept as text; "" where it is unset, and `default` says in words what that stands for."""
    return field(default="", metadata={"meaning": meaning, "in_key": False, "allowed": "a folder", "default": default})


@dataclass(frozen=True)
class Settings:
    """The plugin's variables, one field each, parsed.  A field's metadata holds:

    ``meaning``: what the variable does, in a sentence or two; ``allowed``: its values, for people;
    ``in_key``: True where the value changes the compiled code, and so belongs in vLLM's compile cache key;
    ``default``: the default in words, where its value does not say it.
    """

    VLLM_COMPILE_EXT: bool = _switch(
        default=True,
        meaning="0 leaves vLLM exactly as it is without the plugin.",
    )
    VLLM_COMPILE_EXT_STRICT: bool = _switch(
        default=False,
        meaning="1 makes it an error when the plugin cannot take over (an unsupported version, a bad variable). "
        "With 0 vLLM starts stock and one line says why.",
    )
    VLLM_COMPILE_DEPYF: bool = _switch(
        default=False,
        meaning="1 decompiles Dynamo's bytecode of every compiled callable into transformed_code.py, in the model's "
        "cache folder and, when one is set, the debug dump folder. 0 decompiles nothing while starting.",
    )
    VLLM_COMPILE_WORKERS: int = _count(
        default=0,
        meaning="How many kernels compile at a time in a cold start. 0 stands for the cores that the process may use.",
    )
    VLLM_COMPILE_STORE: str = _folder(
        default="compile_store in vLLM's cache root",
        meaning="Where compiled code is kept between starts. What lies there is run: the folder is made for its owner "
        "only and is not used while others can write to it.",
    )
    VLLM_COMPILE_STORE_GROUP: bool = _switch(
        default=False,
        meaning="1 uses a store that its group can write, where this process has that group: whoever is in the group "
        "can then run code in this process. For volumes that several users of a cluster share.",
    )
    VLLM_COMPILE_STORE_MAX_GB: int = _count(
        default=10,
        meaning="How many GiB compiled code may take in the store; what was not used for longest goes first. "
        "0 stands for no limit.",
    )
    VLLM_COMPILE_CUDAGRAPHS: str = _choice(
        "lazy",
        "idle",
        "eager",
        meaning="When CUDA graphs are captured: lazy, each when traffic first asks for its shape, and before the "
        "first request those that earlier starts used; idle, also the others while there are no requests; eager, all "
        "while starting, as in stock vLLM.",
    )
    VLLM_COMPILE_WAIT: int = _count(
        default=200,
        meaning="How many seconds to wait for another process that compiles the same model, before doing it here too.",
    )
    VLLM_COMPILE_STARTS: bool = _switch(
        default=True,
        meaning="Where each start spends its time is kept in compile_starts in vLLM's cache root, the last 20, for "
        "vllm-compile-ext report. 0 records nothing. 1 also times the imports of programs that are not called vllm.",
    )
    VLLM_COMPILE_PROGRESS: bool = _switch(
        default=True,
        meaning="What a start is doing is shown while it lasts: in the last line of a terminal, elsewhere in a line of "
        "the log every 10 s of a long phase. 0 shows nothing; neither does VLLM_COMPILE_STARTS=0.",
    )


def _parse(name: str, raw: str, kind: type, choices: tuple[str, ...] = ()) -> bool | int | str:
    value = raw.strip().lower()
    if choices:
        if value in choices:
            return value
        raise EnvError(f"{name}={raw!r} is not allowed: use one of {', '.join(choices)}, or unset it")
    if kind is str:
        return raw
    if kind is int:
        if value.isdecimal():
            return int(value)
        raise EnvError(f"{name}={raw!r} is not allowed: use a whole number from 0, or unset it")
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise EnvError(f"{name}={raw!r} is not allowed: use one of {', '.join((*_TRUE, *_FALSE))}, or unset it")


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Parse the variables that are set; an empty value counts as unset.  Raises `EnvError` on the first bad one."""
    found = [f for f in fields(Settings) if environ.get(f.name)]
    values: dict[str, Any] = {
        f.name: _parse(f.name, environ[f.name], type(f.default), f.metadata.get("choices", ())) for f in found
    }
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


def text(value: bool | int | str) -> str:
    """The value of a variable as one would set it."""
    return value if isinstance(value, str) else str(int(value))


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
    in_key: bool
    meaning: str


def table() -> list[Row]:
    """The variables as rows, in the order of `Settings`."""
    rows = []
    for f in fields(Settings):
        assert f.default is not MISSING
        about = f.metadata
        default = about.get("default", text(f.default))
        rows.append(Row(f.name, about["allowed"], default, about["in_key"], about["meaning"]))
    return rows
