"""One real CPU engine in a process of its own: start it, ask it, and report tokens and counters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import process

PROMPTS = ("The import statement", "def f(x):", "A class is a " * 20, "x")

ENGINE = """
    import dataclasses, os
    options = json.loads(sys.argv[1])
    decompiled = []
    import depyf
    real = depyf.decompile
    depyf.decompile = lambda code: decompiled.append(code.co_name) or real(code)
    embeds = options.pop("embeds", False)
    if options.pop("upstream", False):
        import vllm_compile_ext.compilation.rules as rules
        rules.why_upstream = lambda config: "asked for by a test"
    from vllm import LLM, SamplingParams
    limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4)
    llm = LLM(disable_log_stats=True, **limits, **options)
    from vllm.compilation.counter import compilation_counter
    import vllm.compilation.backends as backends
    config = llm.llm_engine.vllm_config.compilation_config
    counters = dataclasses.asdict(compilation_counter)
    import prometheus_client
    page = [line.split() for line in prometheus_client.generate_latest().decode().splitlines() if "{" not in line]
    metrics = {words[0]: float(words[1]) for words in page if words[0].startswith("vllm_compile_ext_")}
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
    outputs, vectors = [], []
    if embeds:
        vectors = [o.outputs.embedding for o in llm.embed(PROMPTS, use_tqdm=False)]
    else:
        outputs = [o.outputs[0] for o in llm.generate(PROMPTS, params, use_tqdm=False)]
    report(dict(
        vectors=vectors,
        tokens=[list(o.token_ids) for o in outputs],
        logprobs=[[p[t].logprob for p, t in zip(o.logprobs, o.token_ids)] for o in outputs],
        counters=counters, mode=config.mode.name, sizes=config.compile_sizes, backends=backends.__file__,
        decompiled=decompiled, folder=config.local_cache_dir, metrics=metrics,
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
    output: process.Outcome

    @property
    def compiled(self) -> int:
        """Pieces that Inductor was asked to compile."""
        return self.counters["num_inductor_compiles"]

    @property
    def loaded(self) -> int:
        """Whole models that were loaded from an earlier start's artifact."""
        return self.counters["num_aot_artifacts_loaded"]


def begin(
    model: Path,
    cache: Path,
    folder: Path,
    options: dict[str, Any] | None = None,
    *,
    fork: bool = False,
    **env: str | None,
) -> process.Started:
    """Start an engine for `model` on the cache root `cache`; `options` go to `vllm.LLM`.

    Two options are the test's own: ``upstream`` sends the model through upstream's path of compilation, piece by piece
    and layer by layer; ``embeds`` asks for embeddings instead of tokens.
    """
    # "auto" would turn a float32 model into bfloat16; see benchmarks/models.py on what float32 is for.
    arguments = json.dumps({"model": str(model), "dtype": "float32"} | (options or {}))
    code = ENGINE.replace("PROMPTS", repr(list(PROMPTS)))
    return process.start(code, folder, arguments, fork=fork, VLLM_CACHE_ROOT=str(cache), **env)


def end(started: process.Started, folder: Path) -> Run:
    """Wait for an engine of `begin`; it must have ended well."""
    outcome = process.finish(started, folder)
    assert outcome.code == 0, outcome.output[-5000:]
    return Run(**outcome.value, output=outcome)


def run(
    model: Path, cache: Path, options: dict[str, Any] | None = None, *, fork: bool = False, **env: str | None
) -> Run:
    """`begin` and `end`."""
    folder = cache.parent / f"{cache.name}.run"
    return end(begin(model, cache, folder, options, fork=fork, **env), folder)
