"""The real `vllm serve`, front end, engine core and worker in processes of their own, cold and then warm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import Server

pytestmark = pytest.mark.engine

ARGS = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256")


def serve(model: Path, folder: Path, name: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """One start on the cache in `folder`: the log, the phases and the answers to two requests."""
    with Server(model, folder / f"{name}.log", folder / "cache", args=ARGS) as server:
        server.wait_ready()
        common = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
        answers = [
            server.post("/v1/completions", common | {"prompt": "def f(x):", "logprobs": 1}),
            server.post("/v1/chat/completions", common | {"messages": [{"role": "user", "content": "hello"}]}),
        ]
        phases = vars(server.phases())
        (folder / f"{name}.metrics").write_text(server.get("/metrics"))
    return (folder / f"{name}.log").read_text(), phases, [answer["choices"][0] for answer in answers]


def test_cold_then_warm(llama: Path, tmp_path: Path) -> None:
    cold_log, _, cold = serve(llama, tmp_path, "cold")
    blobs = set(tmp_path.rglob("blobs/*/*"))
    warm_log, _, warm = serve(llama, tmp_path, "warm")
    assert blobs
    assert set(tmp_path.rglob("blobs/*/*")) == blobs
    assert cold == warm
    assert cold[0]["text"]
    assert cold[1]["message"]["content"]
    for log in (cold_log, warm_log):
        said = [line for line in log.splitlines() if "vllm-compile-ext" in line and "is active" in line]
        processes = ("MainProcess", "EngineCore", "Worker")  # vLLM's front end has no other name yet
        assert [sum(name in line for line in said) for name in processes] == [1, 1, 1], "each process says it once"
        assert "Unknown vLLM environment variable" not in log
    assert "cache miss: nothing is stored yet" in cold_log
    assert "kept as" in cold_log
    assert "loaded compiled code" in warm_log
    assert "cache miss" not in warm_log
    cold_counts, warm_counts = (counts((tmp_path / f"{name}.metrics").read_text()) for name in ("cold", "warm"))
    assert (cold_counts["store_misses_total"], cold_counts["pieces_compiled_total"]) == (1, 3)
    assert (warm_counts["store_hits_total"], warm_counts["pieces_loaded_total"]) == (1, 3)
    assert cold_counts["store_kept_bytes_total"] > 10_000 < warm_counts["store_loaded_bytes_total"]
    assert warm_counts["store_misses_total"] == warm_counts["pieces_compiled_total"] == 0


def counts(page: str) -> dict[str, float]:
    """The plugin's metrics without labels."""
    found = (line.removeprefix("vllm_compile_ext_").split() for line in page.splitlines() if "{" not in line)
    return {words[0]: float(words[1]) for words in found if len(words) == 2}


def test_metrics_with_two_api_servers(llama2: Path, tmp_path: Path) -> None:
    args = (*ARGS, "--api-server-count", "2")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environ = {"TMPDIR": str(temporary)}
    with Server(llama2, tmp_path / "log", tmp_path / "cache", args=args, env=environ) as server:
        server.wait_ready()
        pages = [server.get("/metrics") for _ in range(6)]  # from either server
        folders = list(temporary.glob("vllm-compile-ext-run-*"))
    for page in pages:
        assert counts(page)["store_misses_total"] == 1
        assert page.count("\nvllm_compile_ext_store_misses_total") == 1
        assert "\nvllm:" in page
    assert not any(folder.exists() for folder in folders), "the front end removes it"
    assert len(folders) == 1
