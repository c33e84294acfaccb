"""A store that was filled with a C++ compiler serves without one, whatever a request asks for; with one, a warm start
and its requests compile nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine

CODE = """
    import os, shutil
    from pathlib import Path
    from tests import forks
    from vllm.v1.sample import sampler
    sampler.batched_count_greater_than = forks.COMPILED["batched_count_greater_than"]
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter as counter
    from vllm_compile_ext import temporary
    from vllm_compile_ext.record import metrics
    temporary.make_run_folder()  # for what is counted
    os.environ["VLLM_CACHE_ROOT"] = str(Path("root").absolute())
    from tests.engine import PROMPTS
    ASKED = {
        "plain": {"temperature": 0},
        "logprobs": {"temperature": 0, "logprobs": 5},
        "prompt_logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 3},
        "top": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "seed": 1, "logprobs": 1},
        "top_p": {"temperature": 0.8, "top_p": 0.9, "seed": 2},
        "penalties": {
            "temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1,
            "seed": 3, "stop": ["zzz"], "logit_bias": {5: 1.0}, "min_tokens": 2, "logprobs": 0,
        },
    }

    def ranks(positions):
        return [{str(t): [p.rank, p.logprob] for t, p in (at or {}).items()} for at in positions or ()]

    # A compiler that notes what it is run for, and a PATH without any.
    real = shutil.which("g++")
    noting, without = Path("noting"), Path("without")
    noting.mkdir(), without.mkdir()
    ran = Path("ran").absolute()
    (noting / "g++").write_text(f'#!/bin/sh\\nexec_() {{ exec {real} "$@"; }}\\n'
        f'case "$*" in -v|--version) ;; *) echo "$*" >> {ran} ;; esac\\nexec_ "$@"\\n')
    (noting / "g++").chmod(0o755)
    (without / "lscpu").symlink_to(shutil.which("lscpu"))
    with_it = os.pathsep.join([str(noting.absolute()), os.environ["PATH"]])

    def counted():
        seen = {sample.name: sample.value for metric in metrics.collect() for sample in metric.samples}
        return [seen.get(f"vllm_compile_ext_functions_{what}_total", 0) for what in ("compiled", "loaded")]

    def start(path):
        def serve():
            os.environ["PATH"] = path
            ran.write_text("")
            before = counted()
            limits = dict(max_num_batched_tokens=1024, max_model_len=256, gpu_memory_utilization=0.4)
            llm = LLM(model=sys.argv[1], dtype="float32", disable_log_stats=True, **limits)
            answers = {}
            for name, asked in ASKED.items():
                for count in (4, 1, 11):
                    llm.reset_prefix_cache()
                    params = SamplingParams(max_tokens=6, ignore_eos=True, **asked)
                    outputs = llm.generate((PROMPTS * 3)[:count], params, use_tqdm=False)
                    answers[f"{name} {count}"] = [
                        [list(o.outputs[0].token_ids), ranks(o.outputs[0].logprobs), ranks(o.prompt_logprobs)]
                        for o in outputs
                    ]
            return dict(answers=answers, compiled=len(ran.read_text().splitlines()),
                loaded=counter.num_aot_artifacts_loaded,
                functions=[now - then for now, then in zip(counted(), before)])
        return forks.run(serve)

    out = {"cold": start(with_it), "warm": start(with_it), "without": start(str(without.absolute()))}
    for manifest in Path("root/compile_store/v1/manifests").glob("*/function.*.json"):
        manifest.unlink()
    out["without, not kept"] = start(str(without.absolute()))
    report(out)
"""


@pytest.fixture(scope="module")
def ran(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, str(llama2), folder=tmp_path_factory.mktemp("functions"), fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def good(ran: dict[str, Any], start: str) -> dict[str, Any]:
    ended = ran[start]
    assert ended.status == 0, ended.output[-5000:]
    return dict(ended.value)


def test_the_first_start_compiles_and_keeps(ran: dict[str, Any]) -> None:
    cold = good(ran, "cold")
    assert (cold["loaded"], cold["functions"]) == (0, [1, 0])
    assert cold["compiled"] > 1


@pytest.mark.parametrize("start", ["warm", "without", "without, not kept"])
def test_later_starts_give_its_answers_and_compile_nothing(ran: dict[str, Any], start: str) -> None:
    value = good(ran, start)
    assert value["answers"] == good(ran, "cold")["answers"]
    assert (value["loaded"], value["compiled"]) == (1, 0)
    assert value["functions"] == ([0, 0] if "not kept" in start else [0, 1])


def test_what_runs_uncompiled_is_said_once(ran: dict[str, Any]) -> None:
    said = "there is no C++ compiler: functions that vLLM compiles beside the model run uncompiled"
    assert [ended.output.count(said) for ended in ran.values()] == [0, 0, 0, 1]
