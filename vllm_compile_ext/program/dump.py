"""`transformed_code.py`: Dynamo's transformed bytecode of every compiled callable, for people to read.

A file holds one section for each callable, so that a main model and its draft head can share a folder, and a section
is replaced when its callable is compiled again.
"""

from __future__ import annotations

import dis
import io
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import CodeType

logger = logging.getLogger(__name__)

FILE = "transformed_code.py"
VARIABLE = "VLLM_COMPILE_DEPYF"
NOTICE = (
    f"# Dynamo's transformed bytecode is not decompiled while starting.\n"
    f"# Set {VARIABLE}=1 and start again to fill this file; a warm start fills it too.\n"
)
_MARK = "# ---- compiled callable: "


def disassemble(code: CodeType) -> str:
    """The instructions of `code` as comment lines, for when it cannot be decompiled."""
    out = io.StringIO()
    dis.dis(code, file=out)
    return "".join(f"# {line}\n" for line in out.getvalue().splitlines())


def readable(code: CodeType) -> str:
    """`code` decompiled to Python source by depyf, or its disassembly after one warning."""
    try:
        import depyf

        return str(depyf.decompile(code)).strip() + "\n"
    except Exception as error:  # decompiling is not always possible: bytecode says less than source
        why = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("depyf cannot decompile %s (%s): leaving its disassembly", code.co_name, why)
        return f"# not decompiled: {why}\n" + disassemble(code)


def _sections(text: str) -> dict[str, str]:
    parts = text.split(_MARK)[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def write(folders: Iterable[Path], name: str, code: CodeType, *, decompile: bool) -> list[Path]:
    """Write `code` as the section `name` of `FILE` in each of `folders`, and return the files written.

    With `decompile` off nothing is decompiled: a file that does not exist yet gets the notice that names the variable,
    and one that does is left alone.  A folder that cannot be written costs one warning.
    """
    source = readable(code) if decompile else None
    written = []
    for folder in dict.fromkeys(folders):
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if source is None:
                if path.exists():
                    continue
                text = NOTICE
            else:
                sections = _sections(path.read_text()) if path.exists() else {}
                sections[name] = source
                text = "\n".join(f"{_MARK}{key}\n{body.rstrip()}\n" for key, body in sections.items())
            _replace(path, text)
        except OSError as error:
            logger.warning("cannot write %s: %s", path, error)
            continue
        written.append(path)
    return written


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
