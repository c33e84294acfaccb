"""`vllm.compilation.wrapper`: upstream's, with the decompiler off the start path and a seal behind the artifact."""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from vllm_compile_ext import envs
from vllm_compile_ext.artifacts import seal
from vllm_compile_ext.bytecode import buffers, dump
from vllm_compile_ext.compilation import inductor_files, rules, workers
from vllm_compile_ext.compilation.session import Session
from vllm_compile_ext.upstream import wrapper as upstream

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    return getattr(upstream, name)


def inspect_bytecode(model: Any, code: CodeType, artifact: str | Path | None = None) -> None:
    """Check and dump the transformed bytecode `code` of one compiled callable of `model`.

    The dump goes beside `artifact`, the file that the callable is or will be saved in; where upstream keeps its graph
    elsewhere, there too; and into the debug dump folder when one is set.  Raises `RuntimeError` when the code assigns
    module buffers and CUDA graphs are on.
    """
    from vllm.config import CUDAGraphMode

    config = model.vllm_config
    places = [config.compile_debug_dump_path()]
    graph = config.compilation_config.local_cache_dir  # None in modes that keep no cache of their own
    if artifact is not None:
        places.append(Path(artifact).parent)
    if artifact is None or (graph and not Path(graph).is_relative_to(Path(artifact).parent.parent)):
        places.append(graph)
    dump.write(
        [Path(place) for place in places if place],
        f"{type(model).__qualname__}.forward [{getattr(model, '_compile_tag', '') or 'model'}]",
        code,
        decompile=envs.load().VLLM_COMPILE_DEPYF,
    )
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        buffers.forbid(code)


def aot_bytecode(compiled: Any) -> CodeType:
    """The transformed bytecode inside a `torch._dynamo.aot_compile.AOTCompiledFunction` (torch 2.13)."""
    code: CodeType = compiled._artifacts.runtime_env.bytecode
    return code


def artifact_of(model: Any) -> Path:
    """Where upstream's decorator will look for the compiled `model` (vLLM 0.32.0, `compilation/decorators.py`)."""
    import vllm.envs
    from vllm.compilation.caching import aot_compile_hash_factors
    from vllm.compilation.decorators import _model_hash_key

    config = model.vllm_config
    factors = [*aot_compile_hash_factors(config), _model_hash_key(model.forward)]
    key = hashlib.sha256(str(factors).encode()).hexdigest()
    rank = f"rank_{config.parallel_config.rank}_{config.parallel_config.data_parallel_index}"
    return Path(vllm.envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "torch_aot_compile" / key / rank / "model"


def _save_sealed(compiled: Any, path: str) -> None:
    """Write what upstream's `save_compiled_function` would, with a seal behind it.

    `path` is the temporary name in the rank's folder that upstream then renames; Inductor's files lie in the folder
    ``inductor_cache`` beside that folder (vLLM 0.32.0, `compilation/decorators.py`).
    """
    root = Path(path).parent.parent
    payload = type(compiled).serialize(compiled).serialized_data
    Path(path).write_bytes(seal.seal(payload, root, inductor_files.loaded(root / "inductor_cache")))


def _compiled_frame(old_code: CodeType) -> Any:
    """The frame that Dynamo is compiling, found in the locals of `convert_frame._compile` further up the stack."""
    caller: Any = sys._getframe()
    while caller is not None:
        where = Path(caller.f_code.co_filename).name
        if (caller.f_code.co_name, where) == ("_compile", "convert_frame.py"):
            compiled = caller.f_locals["frame"]
            return compiled if compiled.f_code is old_code else None
        caller = caller.f_back
    return None


class TorchCompileWithNoGuardsWrapper(upstream.TorchCompileWithNoGuardsWrapper):
    """Upstream's wrapper; the model is traced once a kind of layer, and the transformed bytecode is looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rules.why_upstream(self.vllm_config) is None:
            workers.prepare(workers.wanted(), lambda: not artifact_of(self).exists())

    def _trace_once(self, *args: Any, **kwargs: Any) -> Any | None:
        """Compile with identical layers traced once; None, after a line that says why, where upstream has to do it."""
        tag = f"[{getattr(self, '_compile_tag', '')}] "
        if reason := rules.why_upstream(self.vllm_config):
            logger.info("%severy layer is traced, as in stock vLLM: %s", tag, reason)
            return None
        session = Session(self)
        try:
            with session.active():
                return super().aot_compile(*args, **kwargs)
        except Exception as error:
            if session.compiling:
                raise
            # Whatever it is, tracing as stock does it either works or gives the error that stock gives.
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            logger.info("%severy layer is traced, as in stock vLLM: %s", tag, why)
            logger.debug("%strace once gave up", tag, exc_info=True)
            return None

    def aot_compile(self, *args: Any, **kwargs: Any) -> Any:
        try:
            compiled = self._trace_once(*args, **kwargs)
            if compiled is None:
                compiled = super().aot_compile(*args, **kwargs)
        finally:
            workers.stop()
        inspect_bytecode(self, aot_bytecode(compiled), getattr(self, "_aot_compilation_path", None))
        compiled.save_compiled_function = functools.partial(_save_sealed, compiled)
        return compiled

    def bytecode_hook(self, old_code: CodeType, new_code: CodeType) -> None:
        """Keep `new_code` for direct execution if it is this instance's: Dynamo calls the hooks of all instances."""
        if old_code is not self.original_code_object():
            return
        frame = _compiled_frame(old_code)
        if frame is None or frame.f_locals.get("self") is not self:
            return
        self._compiled_bytecode = new_code
        inspect_bytecode(self, new_code)
