"""Every setting of the plugin: the environment variable, type, default, meaning.

`Settings` is the one table: the command ``vllm-compile-ext env``, the docs page and what vLLM knows are made from it.
Some can also be set for one engine, in the dictionary `NAMESPACE` of vLLM's ``additional_config``: those that are read
where the engine's `VllmConfig` is at hand, and that concern nothing which engines share.
None of the settings changes compiled code: all are left out of vLLM's compile cache key.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vllm_compile_ext import __version__
from vllm_compile_ext.replace import Undo

NAMESPACE = "compile_ext"  # of `additional_config`; keys are the variables' names in lower case without _PREFIX
_PREFIX = "VLLM_COMPILE_"
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_ALLOWED = {bool: "0 or 1", int: "a whole number from 0", str: "a folder"}


class EnvError(ValueError):
    """A setting that is not allowed; the message names it, its value and what is allowed."""


def _variable(
    default: bool | int | str,
    meaning: str,
    *,
    shown: str = "",
    choices: tuple[str, ...] = (),
    per_engine: bool = False,
) -> Any:
    """shown: the default in words, where the value does not say it.  choices: the texts that are allowed.
    per_engine: whether `NAMESPACE` may have it; who reads it asks `of`, not `load`."""
    metadata = {"meaning": meaning, "shown": shown, "choices": choices, "per_engine": per_engine}
    return field(default=default, metadata=metadata)


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
        per_engine=True,
    )
    VLLM_COMPILE_WORKERS: int = _variable(
        0,
        "How many kernels compile at a time in a cold start. 0 stands for the cores that the process may use.",
        per_engine=True,
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
        "When CUDA graphs are captured: lazy, while there are no requests those that traffic asked for, in "
        "earlier starts too, and others when it asks for them; idle, all while there are no requests; eager, all while "
        "starting, as in stock vLLM.",
        choices=("lazy", "idle", "eager"),
        per_engine=True,
    )
    VLLM_COMPILE_CUSTOM_OPS: str = _variable(
        "stock",
        "Which of vLLM's custom ops run their kernels: stock, as vLLM decides; auto, as measured here by "
        "vllm-compile-ext ops MODEL --measure, unless custom_ops are set.",
        choices=("stock", "auto"),
        per_engine=True,
    )
    VLLM_COMPILE_WAIT: int = _variable(
        200,
        "How many seconds to wait for another process that compiles the same model, before doing it here too.",
        per_engine=True,
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


def _parse(variable: Any, raw: Any, name: str) -> bool | int | str:
    """raw: text, or what JSON gave for an item of `NAMESPACE`.  name: what the user has set, for the message."""
    value, choices = str(raw).strip().lower(), variable.metadata["choices"]
    if isinstance(variable.default, bool):
        if value in (*_TRUE, *_FALSE):
            return value in _TRUE
    elif isinstance(variable.default, int):
        if value.isdecimal():
            return int(value)
    elif not choices:
        return str(raw)
    elif value in choices:
        return value
    raise EnvError(f"{name}={raw!r} is not allowed: use {_allowed(variable)}, or unset it")


def _allowed(variable: Any) -> str:
    choices = variable.metadata["choices"]
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if choices else _ALLOWED[type(variable.default)]


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Parse the variables that are set; an empty value counts as unset.  Raises `EnvError` on the first bad one."""
    set_ = [f for f in fields(Settings) if environ.get(f.name)]
    values: dict[str, Any] = {f.name: _parse(f, environ[f.name], f.name) for f in set_}
    return Settings(**values)


def of(vllm_config: Any) -> Settings:
    """The settings of the engine of a `VllmConfig`: where its `NAMESPACE` has one, not the variable's."""
    return replace(load(), **_of_engine(vllm_config.additional_config))


def check(additional_config: Any, environ: Mapping[str, str] = os.environ) -> None:
    """Raises `EnvError` where `NAMESPACE` holds what it may not, or other values than the variables."""
    for name, value in _of_engine(additional_config).items():
        if environ.get(name) and getattr(load(environ), name) != value:
            place = f"additional_config.{NAMESPACE}.{_key(name)}={additional_config[NAMESPACE][_key(name)]!r}"
            raise EnvError(f"{name}={environ[name]} and {place} disagree: remove one of them")


def _key(name: str) -> str:
    return name.removeprefix(_PREFIX).lower()


def _of_engine(additional_config: Any) -> dict[str, Any]:
    """What `NAMESPACE` sets, by variable.  Raises `EnvError` on the first thing that is not allowed.

    vLLM also takes an object that hashes itself; that has no namespace.
    """
    theirs = dict(additional_config) if isinstance(additional_config, dict) else {}
    ours = theirs.pop(NAMESPACE, {})
    place, known = f"additional_config.{NAMESPACE}", {_key(f.name): f for f in fields(Settings)}
    allowed = ", ".join(key for key, f in known.items() if f.metadata["per_engine"])
    for name in theirs:
        if str(name).lower().replace("-", "_").removeprefix("vllm_") == NAMESPACE:
            raise EnvError(f"additional_config.{name} would have no effect: call it {NAMESPACE}")
    if not isinstance(ours, dict):
        raise EnvError(f"{place}={ours!r} is not allowed: use a dictionary, which may have {allowed}")
    values = {}
    for key, raw in ours.items():
        if (variable := known.get(key)) is None:
            raise EnvError(f"{place}.{key} is not a setting: there are {allowed}")
        if not variable.metadata["per_engine"]:
            raise EnvError(f"{place}.{key} is not allowed: only the variable {variable.name} sets it")
        values[variable.name] = _parse(variable, raw, f"{place}.{key}")
    return values


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
    """One line of the table that people read.  key: in `NAMESPACE`; empty where only the variable sets it."""

    name: str
    key: str
    allowed: str
    default: str
    meaning: str


def table() -> list[Row]:
    """The variables as rows, in the order of `Settings`."""
    rows = []
    for f in fields(Settings):
        about = f.metadata
        key = _key(f.name) if about["per_engine"] else ""
        rows.append(Row(f.name, key, _allowed(f), about["shown"] or _text(f.default), about["meaning"]))
    return rows


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


def checked(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    """`VllmConfig.__post_init__`, and before it our `check`: what it raises is reported as vLLM's own bad options."""

    def check_and_post_init(config: Any) -> None:
        check(config.additional_config)
        post_init(config)

    return check_and_post_init


def without_namespace(compute_hash: Callable[..., str]) -> Callable[..., str]:
    """`VllmConfig.compute_hash` of the configuration without `NAMESPACE`."""

    def hash_the_rest(config: Any, *args: Any, **kwargs: Any) -> str:
        rest = config.additional_config
        if isinstance(rest, dict) and NAMESPACE in rest:
            config = copy.copy(config)  # others may be reading it
            vars(config)["additional_config"] = {key: value for key, value in rest.items() if key != NAMESPACE}
        return compute_hash(config, *args, **kwargs)

    return hash_the_rest
