"""The real `vllm serve`, front end, engine core and worker in processes of their own, cold and then warm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.serve import Server
from tests.served import ARGS, Served

pytestmark = pytest.mark.engine


def test_cold_then_warm(cold_server: Served, warm_server: Served) -> None:
    cold, warm = cold_server, warm_server
    assert cold.blobs
    assert warm.blobs == cold.blobs
    assert cold.answers == warm.answers
    assert cold.answers[0]["text"]
    assert cold.answers[1]["message"]["content"]
    for log in (cold.log, warm.log):
        said = [line for line in log.splitlines() if "vllm-compile-ext" in line and "is active" in line]
        processes = ("MainProcess", "EngineCore", "Worker")  # vLLM's front end has no other name yet
        assert [sum(name in line for line in said) for name in processes] == [1, 1, 1], "each process says it once"
        assert "Unknown vLLM environment variable" not in log
    assert "cache miss: nothing is stored yet" in cold.log
    assert "kept as" in cold.log
    assert "loaded compiled code" in warm.log
    assert "cache miss" not in warm.log
    cold_counts, warm_counts = counts(cold.metrics), counts(warm.metrics)
    assert (cold_counts["store_misses_total"], cold_counts["pieces_compiled_total"]) == (1, 3)
    assert (warm_counts["store_hits_total"], warm_counts["pieces_loaded_total"]) == (1, 3)
    assert cold_counts["store_kept_bytes_total"] > 10_000 < warm_counts["store_loaded_bytes_total"]
    assert warm_counts["store_misses_total"] == warm_counts["pieces_compiled_total"] == 0


def counts(page: str) -> dict[str, float]:
    """The plugin's metrics without labels."""
    found = (line.removeprefix("vllm_compile_ext_").split() for line in page.splitlines() if "{" not in line)
    return {words[0]: float(words[1]) for words in found if len(words) == 2}


def test_metrics_with_two_api_servers(llama2: Path, cold_server: Served, tmp_path: Path) -> None:
    args = (*ARGS, "--api-server-count", "2")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    shutil.copytree(cold_server.cache, tmp_path / "cache")
    environ = {"TMPDIR": str(temporary)}
    with Server(llama2, tmp_path / "log", tmp_path / "cache", args=args, env=environ) as server:
        server.wait_ready()
        pages = [server.get("/metrics") for _ in range(6)]  # from either server
        folders = list(temporary.glob("vllm-compile-ext-run-*"))
    for page in pages:
        assert counts(page)["store_hits_total"] == 1
        assert page.count("\nvllm_compile_ext_store_hits_total") == 1
        assert "\nvllm:" in page
    assert not any(folder.exists() for folder in folders), "the front end removes it"
    assert len(folders) == 1
