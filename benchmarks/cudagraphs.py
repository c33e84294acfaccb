"""CUDA graphs on demand against stock's capture and --enforce-eager: ``python -m benchmarks.cudagraphs n70``.

Engines without a server, so that one import of vLLM serves many starts: one process for stock (VLLM_COMPILE_EXT=0) and
one for ours, each start a fork of it; eager is --enforce-eager.  Kernels that Triton compiles are shared by all starts,
and the seconds of torch.compile are left out.  "ours first" is the first start of all, when nothing is remembered, and
"at once" a later one whose first request comes in the moment it is ready; in the others the gap between ready and the
first request is as long as a server needs for what it captures there.
Weights are vLLM's dummy ones; tests/gpu/test_cudagraphs.py compares tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.models import SIZES, VOCAB
from vllm_compile_ext.cli.bench.figures import machine

# The dimensions of Llama 3 8B.
EIGHT = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
# For which vLLM 0.33 does not compile, but has breakable graphs: a mixture of experts of the same depth.
BEAM = SIZES["n70"] | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024)
SHAPES = {"n8": SIZES["n8"], "n70": SIZES["n70"], "8b": EIGHT, "beam": BEAM}
VOCABULARY = {"8b": 128256}
INTERMEDIATE = {"8b": 14336}
BATCHES = (1, 8, 64)
TOKENS = 256  # decoded at each of them
REPEATS = 3
SIDES = ("stock", "stock eager", "ours first", "ours at once", "ours")  # as in the table
INIT = re.compile(
    r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s(?: \(compilation: ([\d.]+) s\))?"
)


@dataclass(frozen=True)
class Measured:
    """One start.

    init: seconds of engine initialisation, as vLLM logs it, less those of torch.compile.  gap: seconds until there was
    nothing to capture any more before the first request.  first: seconds of the first request.  gaps: inter-token
    latencies in seconds of mixed traffic from then on.  rates: decoded tokens per second by batch size, after it.
    used: bytes used on the device, before and after.  graphs: of ours, what was captured and how much it holds.
    """

    init: float
    gap: float
    first: float
    gaps: list[float]
    rates: dict[str, float]
    used: tuple[int, int]
    graphs: dict[str, Any]


def make(folder: Path, name: str) -> str:
    """A model folder with a configuration only."""
    if name == "beam":
        from vllm.transformers_utils.configs.beam import BeamConfig as Config
    else:
        from transformers import LlamaConfig as Config

    shape = SHAPES[name]
    intermediate = INTERMEDIATE.get(name, 4 * shape["hidden_size"])
    Config(
        **shape,
        vocab_size=VOCABULARY.get(name, VOCAB),
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["BeamForCausalLM" if name == "beam" else "LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder / name)
    return str(folder / name)


class Client:
    """Sends requests to an engine in this process and notes when each token comes."""

    def __init__(self, llm: Any, seed: int) -> None:
        self.engine, self.random, self.sent = llm.llm_engine, random.Random(seed), 0
        self.times: dict[str, list[float]] = {}

    def send(self, prompt: int, tokens: int) -> None:
        from vllm import SamplingParams, TokensPrompt

        ids = [self.random.randrange(3, VOCAB - 1) for _ in range(prompt)]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(f"{id(self)}-{self.sent}", TokensPrompt(prompt_token_ids=ids), params)
        self.sent += 1

    def step(self) -> int:
        """One step; the number of requests that ended."""
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            self.times.setdefault(output.request_id, []).append(now)
        return sum(output.finished for output in outputs)

    def drain(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()

    def gaps(self) -> list[float]:
        return [b - a for times in self.times.values() for a, b in pairwise(times)]


def first_request(llm: Any) -> float:
    client, start = Client(llm, 0), time.perf_counter()
    client.send(32, 16)
    client.drain()
    return time.perf_counter() - start


def traffic(llm: Any, seconds: float) -> list[float]:
    """1 to 16 requests at a time, another number every second, of mixed lengths."""
    client, running, end = Client(llm, 1), 0, time.perf_counter() + seconds
    wanted, change = 1, time.perf_counter() + 1
    while (now := time.perf_counter()) < end:
        if now > change:
            wanted, change = client.random.randint(1, 16), now + 1
        while running < wanted:
            client.send(client.random.randint(16, 256), client.random.randint(16, 96))
            running += 1
        running -= client.step()
    client.drain()
    return client.gaps()


def rate(llm: Any, batch: int) -> float:
    """Tokens decoded per second, the median of `REPEATS`."""
    rates = []
    for repeat in range(REPEATS):
        client = Client(llm, 100 * batch + repeat)
        for _ in range(batch):
            client.send(16, TOKENS)
        client.drain()
        begin = max(times[0] for times in client.times.values())
        end = max(times[-1] for times in client.times.values())
        after = sum(sum(t > begin for t in times) for times in client.times.values())
        rates.append(after / (end - begin))
    return statistics.median(rates)


def use_gap(llm: Any) -> float:
    """What a server does while there are no requests; the seconds."""
    from vllm_compile_ext.cuda_graphs.replacements import use_gap_in_worker

    start = time.perf_counter()
    while any(llm.collective_rpc(use_gap_in_worker, args=(False,))):
        pass
    return time.perf_counter() - start


def used(worker: Any) -> int:
    """Bytes used on a worker's device."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def graphs(worker: Any) -> dict[str, Any]:
    """What a worker has captured on demand."""
    session = getattr(worker.model_runner.cudagraph_manager, "session", None)
    if session is None:
        return {}
    counts, costs = session.counts, session.budget.costs
    return {
        "captured": dict(counts["captured"]),
        "replayed": dict(counts["replayed"]),
        "missed": dict(counts["missed"]),
        "skipped": dict(counts["skipped"]),
        "seconds": session.seconds,
        "held": session.budget.held,
        "limit": session.budget.limit,
        "mean_cost": {kind: statistics.fmean(cost) for kind, cost in costs.items()},
    }


def child(side: str, names: list[str], seconds: float, out: Path, ranks: int) -> None:
    """All starts of one side; `ranks`: tensor parallel."""
    if side == "ours":
        from vllm_compile_ext import plugin

        plugin.register()
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.gpu.model_runner
    import vllm.v1.worker.gpu_worker  # noqa: F401
    from vllm import LLM

    from tests import forks

    def start(model: str, then: Callable[[Any], dict[str, Any]], **options: Any) -> dict[str, Any]:
        def function() -> dict[str, Any]:
            llm = LLM(
                model=model,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=2048,
                max_num_batched_tokens=2048,
                num_gpu_blocks_override=4096,
                gpu_memory_utilization=0.7,
                disable_log_stats=True,
                enable_prefix_caching=False,
                tensor_parallel_size=ranks,
                **options,
            )
            return then(llm)

        ended = forks.run(function)
        if ended.status:
            sys.exit(f"{side} {model} {options}: status {ended.status}\n{ended.output[-4000:]}")
        told = ("init engine", "CUDA graph", "stays as", "table.py")
        lines = [line for line in ended.output.splitlines() if any(words in line for words in told)]
        print(*[line[-220:] for line in lines if "it/s" not in line], sep="\n", flush=True)
        init, compilation = INIT.findall(ended.output)[-1]
        return ended.value | {"init": float(init) - float(compilation or 0)}

    def of_first_rank(llm: Any, what: Callable[[Any], Any]) -> Any:
        return llm.collective_rpc(what)[0]

    def measure(llm: Any, gap: bool = side == "ours") -> dict[str, Any]:
        before, waited = of_first_rank(llm, used), use_gap(llm) if gap else 0.0
        first = first_request(llm)
        gaps = traffic(llm, seconds)
        rates = {str(batch): rate(llm, batch) for batch in BATCHES}
        after = of_first_rank(llm, used)
        made = of_first_rank(llm, graphs)
        figures = {"gap": waited, "first": first, "gaps": gaps, "rates": rates}
        return figures | {"used": (before, after), "graphs": made}

    def shortly(llm: Any) -> dict[str, Any]:
        first, now = first_request(llm), of_first_rank(llm, used)
        return {"gap": 0.0, "first": first, "gaps": [], "rates": {}, "used": (now, now), "graphs": {}}

    def first_ever(llm: Any) -> dict[str, Any]:
        from vllm_compile_ext.cuda_graphs.memory import DELAY

        measured = measure(llm)
        time.sleep(DELAY + 1)  # until what graphs took is kept
        return measured

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        model = make(Path.cwd(), name)
        if side == "ours":
            found[f"{name} ours first"] = start(model, first_ever)
            found[f"{name} ours at once"] = start(model, partial(measure, gap=False))
        else:
            found[f"{name} stock eager"] = start(model, shortly, enforce_eager=True)
        found[f"{name} {side}"] = start(model, measure)
        out.write_text(json.dumps(found))


def run(side: str, names: list[str], seconds: float, folder: Path, ranks: int) -> dict[str, Measured]:
    """The starts of one side, in a process of its own.  Raises `subprocess.CalledProcessError`."""
    out = folder / f"{side}.json"
    env = os.environ | {
        "VLLM_CACHE_ROOT": str(folder / f"cache-{side}"),
        "HOME": str(folder / f"home-{side}"),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder / "triton")),
        "VLLM_COMPILE_EXT": str(int(side == "ours")),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    (folder / f"home-{side}").mkdir()
    code = [sys.executable, "-m", "benchmarks.cudagraphs", *names, "--child", side, "--out", str(out)]
    subprocess.run([*code, "--seconds", str(seconds), "--ranks", str(ranks)], env=env, cwd=folder, check=True)
    return {name: Measured(**value) for name, value in json.loads(out.read_text()).items()}


def table(name: str, found: dict[str, Measured]) -> Table:
    """A column for each start; the last are ratios to stock."""
    starts = {side: found[f"{name} {side}"] for side in SIDES}
    ours, base, eager = starts["ours"], starts["stock"], starts["stock eager"]
    shown = Table(title=name, title_justify="left")
    for head in ("", *starts, "ratio", "target"):
        shown.add_column(head, justify="left" if not head or head == "target" else "right")

    def row(what: str, of: Callable[[Measured], float], text: str, target: str = "") -> None:
        cells = [text.format(of(start)) if has(start, of) else "" for start in starts.values()]
        shown.add_row(what, *cells, f"{of(ours) / of(base):.2f}", target)

    def has(start: Measured, of: Callable[[Measured], float]) -> bool:
        try:
            of(start)
        except (ValueError, KeyError, statistics.StatisticsError):  # not measured with --enforce-eager
            return False
        return True

    row("init engine without torch.compile, s", lambda m: m.init, "{:.1f}", f"{eager.init + 0.5:.1f} s")
    row("first request, ms", lambda m: m.first * 1e3, "{:.0f}", "1.10")
    for batch in map(str, BATCHES):
        row(f"tokens/s, batch {batch}", lambda m, batch=batch: m.rates[batch], "{:.0f}", "1.00")  # type: ignore[misc]
    row("inter-token latency, median, ms", lambda m: statistics.median(m.gaps) * 1e3, "{:.1f}")
    row("inter-token latency, p99, ms", lambda m: statistics.quantiles(m.gaps, n=100)[98] * 1e3, "{:.1f}", "1.10")
    row("inter-token latency, p99.9, ms", lambda m: statistics.quantiles(m.gaps, n=1000)[998] * 1e3, "{:.1f}", "1.10")
    row("inter-token latency, worst, ms", lambda m: max(m.gaps) * 1e3, "{:.1f}")
    row("used on the device at the end, GiB", lambda m: m.used[1] / 2**30, "{:.2f}")
    held = ours.graphs
    shown.caption = (
        f"on demand: captured {held['captured']} in {sum(held['seconds']):.1f} s, the longest "
        f"{max(held['seconds'], default=0.0) * 1e3:.0f} ms; the gap before the first request took {ours.gap:.1f} s; "
        f"{held['held'] / 2**20:.0f} MiB of {held['limit'] / 2**20:.0f} MiB; "
        f"batches on a graph {held['replayed']}, without one {held['missed']}"
    )
    return shown


def brief(start: Measured) -> dict[str, Any]:
    """A start for a file: of the gaps their number, some percentiles and the longest."""
    cuts = statistics.quantiles(start.gaps, n=1000) if start.gaps else []
    gaps = {f"p{p}": cuts[round(p * 10) - 1] for p in (50, 90, 99, 99.9)} | {"max": max(start.gaps)} if cuts else {}
    return asdict(start) | {"gaps": {"count": len(start.gaps)} | gaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--seconds", type=float, default=30.0, help="of mixed traffic")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel, each on a GPU of its own")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    parser.add_argument("--child", choices=("stock", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.models, args.seconds, args.out, args.ranks)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: this benchmark captures CUDA graphs")
    about = f"{args.ranks} ranks on {machine()}"
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for side in ("ours", "stock"):
            found |= run(side, args.models, args.seconds, Path(folder), args.ranks)
    if args.json:
        starts = {name: brief(start) for name, start in found.items()}
        args.json.write_text(json.dumps({"machine": about, "starts": starts}, indent=1))
    console = Console(width=120)
    console.print(about)
    for name in args.models:
        console.print(table(name, found))


if __name__ == "__main__":
    main()
