"""Everything that can change compiled code and is known before tracing, as readable text: a store's key is made of it.

`FACTORS` is the whole table, ordered by how much a row explains when it changes; `dropped.DROPPED` lists what is left
out of it, with reasons.  Two starts with equal factors, in which what the trace read is equal (seen.py), get the same
code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm_compile_ext import harmless, versions
from vllm_compile_ext.key import compilers, config, machine, readable, torch_state
from vllm_compile_ext.key.dropped import counts

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What is compiled: a decorated module that has its weights, and its `VllmConfig`."""

    config: Any
    model: Any
    cpu: bool


def _class(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


# Name, and what finds the text.  Of a dictionary each item is a factor, `name.item`; None is no factor.
FACTORS: tuple[tuple[str, Callable[[Asked], Any]], ...] = (
    ("vllm", lambda _: versions.vllm_version()),
    ("", lambda asked: machine.torch_versions(cpu=asked.cpu)),
    ("python", lambda _: machine.python()),
    ("flags", lambda _: machine.flags()),
    ("plugin", lambda _: machine.plugin()),
    ("vllm_plugin", lambda _: machine.vllm_plugins()),
    ("", lambda _: machine.packages()),
    ("platform", lambda _: machine.platform()),
    ("compiler", lambda asked: machine.compiler() if asked.cpu else None),
    ("libc", lambda asked: machine.libc() if asked.cpu else None),
    ("threads", lambda asked: machine.threads(_options(asked)) if asked.cpu else None),
    ("passes", lambda _: machine.passes()),
    ("class", lambda asked: _class(asked.model)),
    ("tag", lambda asked: getattr(asked.model, "_compile_tag", "") or "model"),
    ("encoder", lambda asked: str(getattr(asked.model, "_is_encoder", None))),
    ("dynamic_args", lambda asked: readable.cut(readable.plain(getattr(asked.model, "_dynamic_arg_dims", None)))),
    ("", lambda asked: config.config_factors(asked.config)),
    ("env", lambda asked: compilers.variables(cpu=asked.cpu)),
    ("cpu", lambda asked: dict.fromkeys(machine.processor(), "yes") if asked.cpu else None),
    ("", lambda asked: compilers.of_compilers(_options(asked))),
    ("state", lambda _: torch_state.state()),
)

_preparing: threading.Thread | None = None


def factors(vllm_config: Any, model: Any) -> dict[str, str]:
    """The factors of compiling `model`, a decorated module that has its weights, under `vllm_config`.

    Raises what vLLM raises for a configuration that it cannot hash (`TypeError`).
    """
    from vllm.platforms import current_platform

    if _preparing is not None:
        _preparing.join()
    asked = Asked(vllm_config, model, current_platform.is_cpu())
    found: dict[str, str] = {}
    for name, find in FACTORS:
        value = find(asked)
        for item, part in value.items() if isinstance(value, Mapping) else (("", value),):
            whole = ".".join(filter(None, (name, item)))
            if part is not None and counts(whole):
                found[whole] = part
    return found


def _options(asked: Asked) -> Mapping[str, Any]:
    """Inductor's settings that the configuration overrides."""
    options: Mapping[str, Any] = asked.config.compilation_config.inductor_compile_config
    return options


def prepare() -> None:
    """Find what takes longest (digests of sources, the compiler's version) in the background, once; `factors` waits.

    Touches no device: which one a rank has is known in its main thread alone.
    """
    global _preparing
    if _preparing is None:
        _preparing = threading.Thread(target=_slow, daemon=True, name="prepare-factors")
        _preparing.start()


def _slow() -> None:
    try:
        from torch._inductor import codecache
        from vllm.platforms import current_platform

        machine.plugin()
        machine.packages()
        machine.vllm_plugins()
        machine.passes()
        torch_state.state()
        if current_platform.is_cpu():
            machine.compiler()
        else:
            codecache.triton_key()
        codecache.torch_key()
    except Exception as error:  # `factors` meets it again and says so
        logger.debug("factors are not prepared: %s", harmless.error(error))
