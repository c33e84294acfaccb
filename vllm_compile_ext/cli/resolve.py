"""The configuration that ``vllm-compile-ext explain`` shows, a program of its own: ``resolve FILE ADDED OPTIONS``.

Resolves the options of ``vllm serve`` as that does, without weights and without starting a device, with each list of
ADDED (JSON) behind them in turn.  Writes to FILE a line of JSON for each: every setting of compilation, graphs, passes
and kernels, and who set it, noted at each assignment, not guessed from the outcome; and what of the plugin applies.
Exit status 2: a bad option; the output is what vLLM says of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from vllm_compile_ext import plugin
from vllm_compile_ext.cli import doctor, warm_start
from vllm_compile_ext.compilation import rules
from vllm_compile_ext.inductor import workers

USER, DEFAULT, UNKNOWN = "user", "default", "vLLM"
# Whose code a file is that sets something, by its beginning; what else is vLLM's sets by rules.
_SETTERS = (
    ("vllm/engine/arg_utils.py", USER),  # an option of its own: --cudagraph-capture-sizes
    ("vllm/platforms/", "platform"),
    ("vllm/model_executor/models/", "model"),
    ("vllm/", "vLLM"),
    ("vllm_compile_ext/", "vllm-compile-ext"),
)


class Write(NamedTuple):
    """A change of a field: the value that it left, who made it, and where."""

    value: str
    source: str
    where: str


_CHANGES, _ASKED = "_changes_of_fields", "_asked_for"  # beside a configuration's fields: copies have them too
_in_place: dict[tuple[str, str], Write] = {}  # of lists, by class and field


class Noting:
    """Has configurations note who changes them, and, until `asked` is set, what they are made with: by the user."""

    def __init__(self, classes: Iterable[type]) -> None:
        self.asked = False
        for cls in classes:
            self._watch(cls)

    def _watch(self, cls: Any) -> None:
        set_stock, init = cls.__setattr__, cls.__init__

        def set_noting(config: Any, name: str, value: Any) -> None:
            old = text(getattr(config, name, None))
            set_stock(config, name, _List(value, (cls.__name__, name)) if type(value) is list else value)
            if text(value) != old:
                write = Write(text(value), *_setter(sys._getframe(1)))
                vars(config).setdefault(_CHANGES, {})[name] = write
                if write.source == USER:
                    vars(config).setdefault(_ASKED, {})[name] = write.value

        @wraps(init)
        def init_noting(config: Any, *arguments: Any, **options: Any) -> None:
            init(config, *arguments, **options)
            if not self.asked:
                vars(config)[_ASKED] = {name: text(value) for name, value in options.items()}
            for name, value in list(vars(config).items()):
                if type(value) is list:
                    vars(config)[name] = _List(value, (cls.__name__, name))

        cls.__setattr__, cls.__init__ = set_noting, init_noting


class _List(list[Any]):
    """A list that is a field, of which is noted who changes it."""

    def __init__(self, values: Iterable[Any] = (), field: tuple[str, str] | None = None) -> None:
        super().__init__(values)
        self._field = field

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _List, (list(self), self._field)

    @staticmethod
    def _change(name: str) -> Any:
        def change(self: _List, *arguments: Any) -> Any:
            result = getattr(list, name)(self, *arguments)
            if self._field is not None:
                _in_place[self._field] = Write(text(self), *_setter(sys._getframe(1)))
            return result

        return change

    append, extend, insert, remove, pop, sort = map(_change, ("append", "extend", "insert", "remove", "pop", "sort"))
    __iadd__, __setitem__, __delitem__ = map(_change, ("__iadd__", "__setitem__", "__delitem__"))


def _setter(frame: Any) -> tuple[str, str]:
    """Who sets a field, and where ("vllm/platforms/cpu.py:353")."""
    name, line = _short(frame.f_code.co_filename), frame.f_lineno
    around = frame
    for _ in range(6):  # what fills in a level's values is called for them
        if around is None:
            break
        if around.f_code.co_name == "_apply_optimization_level_defaults":
            config = around.f_locals["self"]
            return f"-O{int(config.optimization_level)}", f"{name}:{line}"
        around = around.f_back
    source = next((who for part, who in _SETTERS if name.startswith(part)), f"plugin {name.partition('/')[0]}")
    return source, f"{name}:{line}"


def _short(path: str) -> str:
    """From the package on."""
    for package in ("vllm_compile_ext", "vllm"):
        before, found, rest = path.rpartition(f"/{package}/")
        if found and "/vllm/" not in before:
            return f"{package}/{rest}"
    return path.rpartition("/site-packages/")[2]


def text(value: Any) -> str:
    return str(getattr(value, "name", value))


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Name, configuration and field of each setting, also of configurations within."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
        elif field.init:
            yield prefix + field.name, config, field.name


def shown(config: Any) -> Iterator[tuple[str, Any, str]]:
    """`settings` of a `VllmConfig` that are shown."""
    yield "optimization_level", config, "optimization_level"
    yield "enforce_eager", config.model_config, "enforce_eager"
    for part in ("compilation_config", "kernel_config"):
        yield from settings(getattr(config, part), f"{part}.")


def _ask(config: Any, untouched: Mapping[str, Any]) -> None:
    """Note as asked for what the parser has made otherwise than an untouched configuration."""
    for _, within, field in settings(config):
        value, default = getattr(within, field), getattr(untouched.get(type(within).__name__), field, None)
        if text(value) != text(default):
            vars(within).setdefault(_ASKED, {}).setdefault(field, text(value))
        if type(value) is list:
            vars(within)[field] = _List(value, (type(within).__name__, field))


def row(name: str, config: Any, field: str, untouched: Mapping[str, Any], factors: Set[str]) -> dict[str, Any]:
    """What is to be said of a setting."""
    cls, value = type(config).__name__, text(getattr(config, field))
    asked = vars(config).get(_ASKED, {}).get(field)
    changes = (_in_place.get((cls, field)), vars(config).get(_CHANGES, {}).get(field))
    last = next((change for change in changes if change is not None and change.value == value), None)
    if last is not None:
        source, where = last.source, last.where
    elif asked == value:
        source, where = USER, ""
    else:
        default = text(getattr(untouched.get(cls, type(config)), field, None))
        source, where = DEFAULT if default == value else UNKNOWN, ""
    factor = f"config.{name.replace('_config.', '.')}"
    in_key = any(each == factor or each.startswith(f"{factor}.") for each in factors)
    found = {"name": name.removeprefix("compilation_config."), "value": value, "source": source, "where": where}
    return found | {"asked": asked if asked != value else None, "in_key": in_key}


def parts(config: Any) -> Iterator[Any]:
    """A configuration and those within."""
    yield config
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            yield from parts(value)


def ours(config: Any) -> dict[str, str | None]:
    """What the plugin does for a `VllmConfig`: None, or why it does not."""
    from vllm.platforms import current_platform

    from vllm_compile_ext.cuda_graphs import coverage

    status = plugin.status()
    off = "vLLM does not load the plugin" if status is None else None if status.active else status.line
    code = off or rules.why_upstream(config)
    store = doctor.store()
    return {
        "identical layers traced once and copied": code,
        "pieces compiled in parallel": code or ("one at a time" if workers.wanted(config) == 1 else None),
        "code kept in and loaded from the store": code or (store.text if store.state != "ok" else None),
        "CUDA graphs captured on demand": off
        or (coverage.why_at_start(config) if current_platform.is_cuda() else "there is no CUDA"),
    }


def resolve(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings with these options, and what is `ours` with them."""
    from vllm.config import CompilationConfig, KernelConfig, ModelConfig, VllmConfig

    from vllm_compile_ext.key.config import config_factors

    untouched = {type(each).__name__: each for made in (CompilationConfig(), KernelConfig()) for each in parts(made)}
    noting = Noting({VllmConfig, ModelConfig, *map(type, untouched.values())})
    args = warm_start.parse(arguments)
    noting.asked = True
    for each in vars(args).values():
        if dataclasses.is_dataclass(each):
            _ask(each, untouched)
    config = warm_start.configure(args)
    for part, field, words in _OPTIONS:
        if any(word.startswith(words) for word in arguments):
            of = getattr(config, part, config)
            kind = type(getattr(of, field))  # a bool, or an enumeration of numbers
            vars(of).setdefault(_ASKED, {})[field] = text(kind(int(getattr(args, field))))
    factors = {*config_factors(config, ())}
    return {"settings": [row(*each, untouched, factors) for each in shown(config)], "ours": ours(config)}


def main() -> None:
    to, added, *arguments = sys.argv[1:]
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # as `vllm serve` has, before it resolves anything
    import vllm.entrypoints.cli.serve  # noqa: F401 - takes 10 s, and each fork would do it

    for more in json.loads(added):
        # In a fork: what vLLM leaves in its environment while it resolves (VLLM_USE_BREAKABLE_CUDAGRAPH) and what is
        # noted of classes are not there for the next.
        if not (child := os.fork()):
            with Path(to).open("a") as file:
                print(json.dumps(resolve([*arguments, *more])), file=file)
            os._exit(0)  # to free all that was imported takes 2 s
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(status)


# Options that are no field of a configuration that the parser makes.
_OPTIONS = (
    ("model_config", "enforce_eager", ("--enforce-eager", "--no-enforce-eager", "--enforce_eager")),
    ("", "optimization_level", ("-O", "--optimization-level", "--optimization_level")),
)


if __name__ == "__main__":
    main()
