"""`vllm.compilation.wrapper`: upstream's; a model is traced once a kind of layer, in a folder of this process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from vllm_compile_ext import harmless, settings
from vllm_compile_ext.compilation import entry as entries
from vllm_compile_ext.compilation import rules, scratch
from vllm_compile_ext.compilation.session import Differs, Session
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.key import factors
from vllm_compile_ext.printable import plain
from vllm_compile_ext.program import buffers, dump
from vllm_compile_ext.record import metrics
from vllm_compile_ext.record.spans import note, span
from vllm_compile_ext.upstream import wrapper as upstream

logger = logging.getLogger(__name__)

INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


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
        decompile=settings.load().VLLM_COMPILE_DEPYF,
    )
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        buffers.forbid(code)


def aot_bytecode(compiled: Any) -> CodeType:
    """The transformed bytecode inside a `torch._dynamo.aot_compile.AOTCompiledFunction` (torch 2.13)."""
    code: CodeType = compiled._artifacts.runtime_env.bytecode
    return code


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
        factors.prepare()
        if rules.why_upstream(self.vllm_config) is None:
            workers.prepare(workers.wanted(), lambda: entries.is_new(self))

    def _trace_once(self, *args: Any, **kwargs: Any) -> Any | None:
        """Compile with identical layers traced once; None, after a line that says why, where upstream has to do it."""
        tag = f"[{getattr(self, '_compile_tag', '')}] "
        if reason := rules.why_upstream(self.vllm_config):
            logger.info("%severy layer is traced, as in stock vLLM: %s", tag, reason)
            note("fallback", model=tag.strip(), why=f"every layer is traced: {reason}")
            return None
        entry = self.__dict__.get(entries.NAME)
        session = Session(self, entry, args, kwargs)
        folder = os.environ.get(INDUCTOR_FOLDER)
        os.environ[INDUCTOR_FOLDER] = str(scratch.inductor())
        try:
            try:
                with session.active(), span("trace"):
                    return super().aot_compile(*args, **kwargs)
            except Differs as where:
                metrics.inc("copies_refuted_total")
                logger.warning("%severy layer is traced: a copied one is not what tracing gives, %s", tag, where)
                note("fallback", model=tag.strip(), why=f"every layer is traced: {where}")
                session = Session(self, entry, args, kwargs, copies=False)
                with session.active(), span("trace every layer"):
                    return super().aot_compile(*args, **kwargs)
        except Exception as error:
            if session.compiling:
                raise
            # Whatever it is, tracing as stock does it either works or gives the error that stock gives.
            why = plain(harmless.error(error).partition("\n")[0])
            logger.info("%severy layer is traced, as in stock vLLM: %s", tag, why)
            logger.debug("%strace once gave up", tag, exc_info=True)
            note("fallback", model=tag.strip(), why=f"every layer is traced: {why}")
            if folder is not None:  # upstream's: what it keeps names files there
                os.environ[INDUCTOR_FOLDER] = folder
            return None

    def aot_compile(self, *args: Any, **kwargs: Any) -> Any:
        with span("compile", "compile", model=type(self).__qualname__, tag=getattr(self, "_compile_tag", "")):
            return self._compile(*args, **kwargs)

    def _compile(self, *args: Any, **kwargs: Any) -> Any:
        try:
            compiled = self._trace_once(*args, **kwargs)
            if compiled is None:
                with span("trace every layer"):
                    compiled = super().aot_compile(*args, **kwargs)
            inspect_bytecode(self, aot_bytecode(compiled), getattr(self, "_aot_compilation_path", None))
        except BaseException:
            entries.release(self)
            raise
        finally:
            workers.stop()
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
