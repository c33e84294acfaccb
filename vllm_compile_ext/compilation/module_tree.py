"""A digest of a model's module tree: what the constructors made of the configuration and of the checkpoint.

Tracing turns a module's plain attributes into constants of the compiled code, and some come from the checkpoint
(`_k_scale_float`), not from the configuration.  So they are in the digest, next to classes, shapes, strides and types.
Left out is what differs from rank to rank or from start to start: attributes named after ranks, paths, and what
running a model leaves in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from blake3 import blake3

# Attributes that every module has; those that the decorator and the wrapper set (vLLM 0.32.0,
# `compilation/decorators.py` and `wrapper.py`); those that attention sets when it runs
# (`v1/attention/backends/cpu_attn.py`, the KV cache).
_SKIPPED = {
    *vars(torch.nn.Module()),
    "aot_compiled_fn",
    "compiled",
    "first_compile",
    "was_aot_compile_fn_loaded_from_disk",
    "_aot_cache_dir",
    "_aot_compilation_path",
    "_bytecode_hook_handle",
    "_compiled_bytecode",
    "_compiled_callable",
    "isa",
    "kv_cache",
} - {"training"}
# Objects that hold a layer's way of calculating (vLLM 0.32.0, `model_executor/layers/`): their attributes count too.
_OPENED = {"quant_method", "scheme", "kernel", "fp8_linear"}
# Names of attributes that differ from rank to rank of one model.
_RANKS = frozenset(f"{group}rank" for group in ("", "tp_", "pp_", "dp_", "ep_", "pcp_", "dcp_", "local_", "global_"))
_SIMPLE = frozenset({type(None), bool, int, float, complex, torch.dtype, torch.Size})


def structure(model: torch.nn.Module) -> str:
    """'107 modules, 43 tensors, <digest>' for the tree below `model`."""
    tree = _Tree()
    modules = 0
    for name, module in model.named_modules():
        modules += 1
        tree.add(name, module)
    text = "\n".join(tree.lines).encode(errors="backslashreplace")
    return f"{modules} modules, {len(tree.tensors)} tensors, {blake3(text).hexdigest()[:32]}"


class _Tree:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tensors: dict[int, int] = {}

    def add(self, name: str, module: torch.nn.Module) -> None:
        self.lines.append(f"{name} {_qualified(type(module))}")
        for tensors in (module._parameters, module._buffers):
            self.lines += [f"  {key} {self._plain(value)}" for key, value in tensors.items()]
        self.lines += self._attributes("  ", vars(module), 2)

    def _attributes(self, indent: str, values: dict[str, Any], depth: int) -> Iterator[str]:
        for key, value in values.items():
            if key in _SKIPPED or key in _RANKS:
                continue
            yield f"{indent}{key}={repr(value) if type(value) in _SIMPLE else self._plain(value)}"
            if depth and key in _OPENED and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
                yield from self._attributes(f"{indent}  ", vars(value), depth - 1)

    def _plain(self, value: Any) -> str:
        kind = type(value)
        if kind in _SIMPLE:
            return repr(value)
        if kind is str:
            return "a path" if value.startswith("/") else repr(value)
        if kind is list or kind is tuple:
            return f"[{', '.join(map(self._plain, value))}]"
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind is dict:
            named = ((k, v) for k, v in value.items() if type(k) is str)  # others may be addresses
            return f"{{{', '.join(f'{k}: {self._plain(v)}' for k, v in named)}}}"
        if isinstance(value, Enum):
            return f"{kind.__qualname__}.{value.name}"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self._plain, value)))}}}"
        if isinstance(value, functools.partial):
            return f"partial {self._plain(value.func)}"
        return f"<{_qualified(value if hasattr(value, '__qualname__') else kind)}>"

    def _tensor(self, value: torch.Tensor) -> str:
        """What a graph knows of a tensor; one that has been seen before is the same input again."""
        number = self.tensors.setdefault(id(value), len(self.tensors))
        stride = value.stride() if value.layout == torch.strided else value.layout
        kind = type(value).__qualname__
        own = {key: one for key, one in vars(value).items() if type(one) in _SIMPLE or type(one) is str}
        return f"{number} {kind} {value.dtype} {value.device.type} {tuple(value.shape)} {stride} {self._plain(own)}"


def _qualified(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"
