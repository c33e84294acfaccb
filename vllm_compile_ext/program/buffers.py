"""No assignment to a module's buffers inside a CUDA graph.

Dynamo writes such an assignment behind the compiled call, as an update of the module's dictionary of buffers.  A CUDA
graph replay skips it, and the model goes on with the old value: a silent error.
"""

from __future__ import annotations

from types import CodeType

from vllm_compile_ext.program.dump import readable


def assigns_buffers(code: CodeType) -> bool:
    """Whether Dynamo's transformed `code` writes module state back: it then calls a method named ``update``.

    The source of this fact is vLLM 0.32.0, `compilation/wrapper.py`, which looks for the same name.
    """
    return "update" in code.co_names


def forbid(code: CodeType) -> None:
    """Raise `RuntimeError` when `code` assigns module buffers.  Only the message needs the code decompiled."""
    if assigns_buffers(code):
        raise RuntimeError(
            f"{code.co_name} assigns a buffer of its module in the forward pass, which a CUDA graph would silently "
            "skip. Change the model so that it does not, or start with --enforce-eager or "
            "-cc.cudagraph_mode=none. Look for 'update' in the compiled code to see which buffer:\n" + readable(code)
        )
