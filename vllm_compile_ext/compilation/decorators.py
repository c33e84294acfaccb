"""`vllm.compilation.decorators`: upstream's, with a checked load.

Upstream unpickles the artifact that a start finds.  Here its seal is checked first: an artifact that is not what was
written is named, left unread and compiled again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm_compile_ext.artifacts import seal
from vllm_compile_ext.compilation import workers
from vllm_compile_ext.compilation.plan_function import PlanFunction
from vllm_compile_ext.compilation.wrapper import aot_bytecode, inspect_bytecode
from vllm_compile_ext.upstream import decorators as upstream

logger = logging.getLogger(__name__)

_upstream_load = upstream._try_load_aot_compiled_fn


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


def _sound(path: Path) -> bool:
    """Whether the artifact `path` exists and is what was written; damaged files that it needs are removed.

    Inductor makes a missing file again, and runs a damaged one.
    """
    root = path.parent.parent
    try:
        _, damaged = seal.read(path, root)
    except FileNotFoundError:
        return False
    except (OSError, seal.DamagedError) as error:
        logger.warning("compiling again: %s", error)
        return False
    for bad in damaged:
        logger.warning("compiling one file again: %s", bad)
        bad.path.unlink(missing_ok=True)
    return True


def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any | None:
    """Load the artifact of an earlier start, or return None when there is none that can be trusted.

    Under ``VLLM_FORCE_AOT_LOAD=1`` a failure raises, as it does upstream.
    """
    import vllm.envs

    path = Path(aot_compilation_path)
    if not _sound(path):
        if vllm.envs.VLLM_FORCE_AOT_LOAD:
            raise FileNotFoundError(f"VLLM_FORCE_AOT_LOAD=1, but there is no sound artifact at {path}")
        return None
    workers.wait()
    compiled = _upstream_load(model, aot_compilation_path)
    if compiled is not None:
        function = compiled._artifacts.compiled_fn
        if isinstance(function, PlanFunction):
            function.bind(model)
        inspect_bytecode(model, aot_bytecode(compiled), path)
    return compiled


# `upstream` is this plugin's own copy of the module (see swap.py): vLLM's is not touched.
upstream._try_load_aot_compiled_fn = _try_load_aot_compiled_fn
