"""Dynamo's transformed bytecode for people, in `transformed_code.py`, and a check on what it does.

A file holds one section for each callable, so that a main model and its draft head can share a folder, and a section
is replaced when its callable is compiled again.
"""

from __future__ import annotations

import dis
import io
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import CodeType
from typing import Any

from vllm_compile_ext import settings

logger = logging.getLogger(__name__)

FILE = "transformed_code.py"
NOTICE = """\
# Dynamo's transformed bytecode is not decompiled while starting.
# Set VLLM_COMPILE_DEPYF=1 and start again to fill this file; a warm start fills it too.
"""
_MARK = "# ---- compiled callable: "


def inspect(model: Any, code: CodeType, artifact: str | Path | None = None) -> None:
    """Dump Dynamo's `code` of a callable of `model`; raise `RuntimeError` if it assigns buffers and CUDA graphs are on.

    The dump goes beside `artifact`, the file that the callable is or will be saved in; where upstream keeps its graph
    elsewhere, there too; and into the debug dump folder when one is set.
    """
    from vllm.config import CUDAGraphMode

    config = model.vllm_config
    graph = config.compilation_config.local_cache_dir  # None in modes that keep no cache of their own
    folders = [config.compile_debug_dump_path(), graph]
    if artifact is not None:
        beside = Path(artifact).parent
        folders.append(beside)
        if graph and Path(graph).is_relative_to(beside.parent):
            folders.remove(graph)
    name = f"{type(model).__qualname__}.forward [{getattr(model, '_compile_tag', '') or 'model'}]"
    decompiled = settings.of(config).VLLM_COMPILE_DEPYF
    write([Path(folder) for folder in folders if folder], name, code, decompiled=decompiled)
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        forbid_buffer_assignment(code)


def write(folders: Iterable[Path], name: str, code: CodeType, *, decompiled: bool) -> None:
    """Write `code` as the section `name` of `FILE` in each of `folders`.

    With `decompiled` off, a file that does not exist yet gets the notice that names the variable, and one that does is
    left alone.  A folder that cannot be written costs one warning.
    """
    source = decompile(code) if decompiled else None
    for folder in dict.fromkeys(folders):
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if source is not None:
                there = path.read_text(errors="replace") if path.exists() else ""
                _replace(path, _with_section(there, name, source))
            elif not path.exists():
                _replace(path, NOTICE)
        except OSError as error:
            logger.warning("cannot write %s: %s", path, error)


def _replace(path: Path, text: str) -> None:
    partial = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{FILE}.", delete=False) as file:
            partial = Path(file.name)
            file.write(text)
        partial.replace(path)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _with_section(text: str, name: str, source: str) -> str:
    parts = [part.partition("\n") for part in text.split(_MARK)[1:]]
    sections = {key: body for key, _, body in parts} | {name: source}
    return "\n".join(f"{_MARK}{key}\n{body.rstrip()}\n" for key, body in sections.items())


def decompile(code: CodeType) -> str:
    """`code` as Python source by depyf, or, after one warning, its disassembly in comment lines."""
    try:
        import depyf

        return str(depyf.decompile(code)).strip() + "\n"
    except Exception as error:  # decompiling is not always possible: bytecode says less than source
        why = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("depyf cannot decompile %s (%s): leaving its disassembly", code.co_name, why)
        out = io.StringIO()
        dis.dis(code, file=out)
        return "".join(f"# {line}\n" for line in (f"not decompiled: {why}", *out.getvalue().splitlines()))


def forbid_buffer_assignment(code: CodeType) -> None:
    """Raise `RuntimeError` when `code` assigns module buffers.  Only the message needs the code decompiled.

    Dynamo writes such an assignment behind the compiled call, as a call of a method named ``update`` (vLLM 0.32.0,
    `compilation/wrapper.py`, looks for the same name).  A CUDA graph replay skips it, and the model would go on with
    the old value: a silent error.
    """
    if "update" in code.co_names:
        raise RuntimeError(
            f"{code.co_name} assigns a buffer of its module in the forward pass, which a CUDA graph would silently "
            "skip. Change the model so that it does not, or start with --enforce-eager or "
            f"-cc.cudagraph_mode=none. Look for 'update' in the compiled code to see which buffer:\n{decompile(code)}"
        )
