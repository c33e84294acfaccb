"""``vllm serve MODEL`` with caches of its own and what small CPU machines need; ask it with `post` and `get`."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

from vllm_compile_ext.cli.bench import server
from vllm_compile_ext.cli.program import Line, Program

# A CPU engine refuses to start when less than this share of a NUMA node's memory is free (vLLM 0.32.0, default 0.92).
MEMORY_SHARE = 0.4
# What the caller sets for a machine without FlashInfer, and to compare with vLLM's own remembered memory profile.
PASSED = ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ENABLE_STARTUP_PLAN")


def environment(cache: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server whose caches all lie in `cache`; of the caller's settings for vLLM only `PASSED`."""
    paths = [server.alias_metadata(cache / "metadata"), os.environ.get("PYTHONPATH", "")]
    dropped = ("VLLM_", "TORCHINDUCTOR_", "TORCH_COMPILE_", "TRITON_CACHE_DIR", "TRITON_HOME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) or k in PASSED}
    return (
        kept
        | {
            "VLLM_CACHE_ROOT": str(cache),
            "VLLM_COMPILE_STANDBY": os.devnull,  # no start is another one's fork, unless asked for
            # Stock's mode on CPU leaves Inductor's files in a folder that all starts of a user share.
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        | dict(extra)
    )


@contextlib.contextmanager
def standing_by(cache: Path, env: Mapping[str, str], log: Path) -> Iterator[Mapping[str, str]]:
    """`env` with a standby for servers that have it, which all become forks of that.  Raises `ProgramError`."""
    with tempfile.TemporaryDirectory(prefix="standby-") as at:  # the path of a socket has 107 bytes
        env = {**env, "VLLM_COMPILE_STANDBY": at}
        command = [sys.executable, "-m", "vllm_compile_ext.cli", "standby"]
        with Program(command, environment(cache, env), log=log) as standby:
            while not any("standing by" in line.text for line in standby.lines):
                if not standby.running or standby.elapsed() > 300:
                    raise standby.error("the standby did not begin")
                time.sleep(0.1)
            yield env
            if len([line for line in standby.lines if "standing by for" in line.text]) > 1:
                raise standby.error("the standby began again")


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
        super().__init__([str(model), *common, *args], environment(cache, env or {}), log=log, listen=listen)
        self._requests = requests.Session()
        self._requests.trust_env = False  # no proxy for loopback addresses

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> dict[str, Any]:
        """POST `body` to `path` ("/v1/completions") for this server's model; returns the answer's JSON.

        Raises `ProgramError` with what the server said when it answers with an error or not at all.
        """
        try:
            answer = self._requests.post(self._url(path), json={"model": "model", **body}, timeout=timeout)
        except requests.RequestException as error:
            raise self.error(f"{path} did not answer: {error}") from error
        if not answer.ok:
            raise self.error(f"{path} answered {answer.status_code}: {answer.text[:500]}")
        return dict(answer.json())

    def get(self, path: str, timeout: float = 60.0) -> str:
        """GET `path` ("/metrics"); returns the text."""
        return self._requests.get(self._url(path), timeout=timeout).text

    def said(self, text: str) -> str | None:
        """The first line of the log that contains `text`, or None."""
        return next((line.text for line in self.lines if text in line.text), None)

    def _url(self, path: str) -> str:
        return f"http://{server.HOST}:{self.port}{path}"
