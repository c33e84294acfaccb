"""One CPU engine in a process of its own: its answers, its counters, and what a test has it do before and after."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import process

PROMPTS = ["The import statement", "def f(x):", "A class is a " * 20, "x"]
LIMITS = {"max_num_batched_tokens": 256, "max_model_len": 256, "gpu_memory_utilization": 0.4}

# `report` is the prelude's of `process.start`.
ENGINE = f"""
import dataclasses, os
options = json.loads(sys.argv[1])
import depyf
decompiled, decompile = [], depyf.decompile
depyf.decompile = lambda code: decompiled.append(code.co_name) or decompile(code)
embeds = options.pop("embeds", False)
if options.pop("upstream", False):
    import vllm_compile_ext.compilation.rules as rules
    rules.why_upstream = lambda config: "asked for by a test"
from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter
extra = {{}}

def ask():
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
    return [o.outputs[0] for o in llm.generate({PROMPTS}, params, use_tqdm=False)]

def tokens():
    return [list(o.token_ids) for o in ask()]

BEFORE
llm = LLM(disable_log_stats=True, **({LIMITS} | options))
counters = dataclasses.asdict(compilation_counter)
import prometheus_client
import vllm.compilation.backends as backends
page = [line.split() for line in prometheus_client.generate_latest().decode().splitlines() if "{{" not in line]
config = llm.llm_engine.vllm_config.compilation_config
outputs = [] if embeds else ask()
answers = dict(
    vectors=[o.outputs.embedding for o in llm.embed({PROMPTS}, use_tqdm=False)] if embeds else [],
    tokens=[list(o.token_ids) for o in outputs],
    logprobs=[[p[t].logprob for p, t in zip(o.logprobs, o.token_ids)] for o in outputs],
)
AFTER
report(answers | dict(
    counters=counters, mode=config.mode.name, sizes=config.compile_sizes, backends=backends.__file__,
    decompiled=decompiled, folder=config.local_cache_dir, extra=extra,
    metrics={{words[0]: float(words[1]) for words in page if words[0].startswith("vllm_compile_ext_")}},
))
"""


@dataclass(frozen=True)
class Run:
    """What one engine did: its answers, vLLM's own counters when it was ready, and everything that it printed."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    vectors: list[list[float]]
    counters: dict[str, int]
    mode: str
    sizes: list[int] | None
    backends: str
    decompiled: list[str]
    folder: str
    metrics: dict[str, float]
    extra: dict[str, Any]
    output: process.Outcome

    @property
    def compiled(self) -> int:
        """Pieces that Inductor was asked to compile."""
        return self.counters["num_inductor_compiles"]

    @property
    def loaded(self) -> int:
        """Whole models that were loaded from an earlier start's artifact."""
        return self.counters["num_aot_artifacts_loaded"]


def greedy(model: Path, tokens: int = 16) -> list[list[int]]:
    """What `model` answers to `PROMPTS` without vLLM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        end = len(ids)
        for _ in range(tokens):
            with torch.inference_mode():
                ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[end:])
    return answers


def run(
    model: Path,
    cache: Path,
    options: dict[str, Any] | None = None,
    *,
    before: str = "",
    after: str = "",
    fork: bool = False,
    plugin: bool = True,
    **env: str | None,
) -> Run:
    """Start an engine for `model` on the cache root `cache`, and let it answer; it must end well.

    `options` go to `vllm.LLM`, but for two: ``upstream`` sends the model through upstream's path of compilation, piece
    by piece and layer by layer; ``embeds`` asks for embeddings instead of tokens.  `before` is code that runs before
    the engine is made, and `after` when it has answered: `tokens()` asks it again, and `extra` is what comes back.
    """
    # "auto" would turn a float32 model into bfloat16; see benchmarks/models.py on what float32 is for.
    arguments = json.dumps({"model": str(model), "dtype": "float32"} | (options or {}))
    code = ENGINE.replace("BEFORE\n", textwrap.dedent(before)).replace("AFTER\n", textwrap.dedent(after))
    folder = cache.parent / f"{cache.name}.run"
    outcome = process.run(code, arguments, folder=folder, fork=fork, plugin=plugin, VLLM_CACHE_ROOT=str(cache), **env)
    assert outcome.code == 0, outcome.output[-5000:]
    return Run(**outcome.value, output=outcome)
