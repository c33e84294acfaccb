"""The server of `vllm_compile_ext.bench.server`, with caches of its own and what small CPU machines need."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_compile_ext.bench import server
from vllm_compile_ext.bench.server import Line, Phases, ServerError, alias_metadata, tail

__all__ = ["MEMORY_SHARE", "Line", "Phases", "Server", "ServerError", "environment", "tail"]

# A CPU engine refuses to start when less than this share of a NUMA node's memory is free (vLLM 0.32.0, default 0.92).
MEMORY_SHARE = 0.4


def environment(cache: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server whose caches all lie in `cache`; what the caller set for vLLM is not passed on."""
    alias = alias_metadata(cache / "metadata")
    path = [str(alias)] if alias else []
    dropped = ("VLLM_", "TORCHINDUCTOR_", "TORCH_COMPILE_", "TRITON_CACHE_DIR", "TRITON_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) or k == "VLLM_USE_FLASHINFER_SAMPLER"}
    return (
        kept
        | {
            "VLLM_CACHE_ROOT": str(cache),
            # Stock's mode on CPU leaves Inductor's files in a folder that all starts of a user share.
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        | dict(extra)
    )


class Server(server.Server):
    """``vllm serve MODEL`` with `args`, under the name "model"."""

    def __init__(
        self,
        model: Path,
        log: Path,
        cache: Path,
        *,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = ("--max-num-batched-tokens", "512", "--max-model-len", "512"),
        listen: Callable[[Line], None] | None = None,
    ) -> None:
        common = ["--served-model-name", "model", "--gpu-memory-utilization", str(MEMORY_SHARE)]
        super().__init__([str(model), *common, *args], log, environment(cache, env or {}), listen=listen)
