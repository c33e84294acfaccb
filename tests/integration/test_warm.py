"""``vllm-compile-ext warm`` and the ``vllm serve`` that follows it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import Server, environment
from vllm_compile_ext.store.store import Store

pytestmark = pytest.mark.engine

ARGS = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256")
PROMPT = "def f(x):"
TOKENS = 16


def warm(model: Path, cache: Path) -> dict[str, Any]:
    """The command's report; it must end well.  Without VLLM_CPU_KVCACHE_SPACE, as in a Dockerfile."""
    env = environment(cache, {})
    del env["VLLM_CPU_KVCACHE_SPACE"]
    command = [sys.executable, "-m", "vllm_compile_ext.cli", "warm", str(model), *ARGS, "--port", "80", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout))


def greedy(model: Path) -> list[int]:
    """The tokens of the model without vLLM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = reference.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return list(made[0, prompt.shape[1] :].tolist())


def test_a_server_finds_what_was_made_without_weights(llama: Path, tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    shutil.copy(llama / "config.json", model)
    first = warm(model, cache)
    assert first["status"] == "kept"
    (entry,) = first["entries"]
    assert (entry["shard"], entry["state"]) == ("rank0", "kept")
    assert 0 < entry["bytes"] == first["bytes"] < Store.open(cache / "compile_store").size()
    assert not [*(cache / "compile_scratch").iterdir()], "an image would keep it"

    shutil.copytree(llama, model, dirs_exist_ok=True)
    with Server(model, tmp_path / "log", cache, args=ARGS) as server:
        server.wait_ready()
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
        answer = server.post("/v1/completions", body)["choices"][0]
        for prompts in (PROMPT, [PROMPT, "x"], [PROMPT, "x", "y", "z"]):
            server.post("/v1/completions", body | {"prompt": prompts, "logprobs": 2})
        page = [line.split() for line in server.get("/metrics").splitlines() if line.startswith("vllm_compile_ext_f")]
        counted = {words[0].partition("{")[0]: float(words[-1]) for words in page}
    assert server.said(f"loaded compiled code {entry['key'][:12]}")
    for line in ("cache miss", "kept as", "Starting torch.compile"):
        assert not server.said(line)
    assert answer["token_ids"] == greedy(model)
    assert counted["vllm_compile_ext_functions_loaded_total"] >= 1
    assert counted["vllm_compile_ext_functions_compiled_total"] == 0

    second = warm(model, cache)
    assert second["status"] == "already there"
    assert [each | {"state": "kept"} for each in second["entries"]] == first["entries"]
