"""The start that ``vllm-compile-ext warm`` makes, a program of its own: ``python -m vllm_compile_ext.cli.warm_start``.

Its arguments are those of ``vllm serve``, read by vLLM's own parser.  It starts the engine that the server would have,
with the same processes, and ends it as soon as it is ready.  What differs cannot change the compiled code, and vLLM
0.32.0 keeps it out of its own cache key: random weights, no tokenizer where none is needed, a small KV cache.

Exit status 0: the engine was ready; the record of the start says what was kept.  1: it was not; the output says why.
2: a bad option; the output is what vLLM says of it.  `warm.REFUSED`: nothing was started; the last line says why.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from vllm_compile_ext import harmless, plugin, settings, versions
from vllm_compile_ext.cli import doctor
from vllm_compile_ext.cli.warm import REFUSAL, REFUSED
from vllm_compile_ext.compilation import rules
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.store.store import Store, UnsafeStoreError

FIRST = 16 * 2**20  # bytes of the smallest KV cache that is tried
STOP = 30.0  # seconds that the engine's processes have for ending by themselves


class RefusedError(Exception):
    """There is nothing to keep, or nowhere; the message says why."""


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of ``vllm serve``, checked as it checks them.  A bad one ends the process with status 2."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    versions.of_vllm("cli_env_setup")()
    parser = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args: Namespace = parser.parse_args([serve.name, *arguments])
    configure_logging_from_args(args)
    serve.validate(args)
    if args.model_tag is not None:
        args.model = args.model_tag
    return args


def configure(args: Namespace) -> Any:
    """The `VllmConfig` that the server's engine would get."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import propagate_flash_late_interaction
    from vllm.reasoning import ReasoningParserManager
    from vllm.usage.usage_lib import UsageContext

    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    engine = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine)
    # The context decides over defaults, such as the number of tokens in a batch.
    return engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=args.headless)


def check_plugin() -> None:
    """Raises `RefusedError` where this plugin did not take over or keeps nothing."""
    status = plugin.status()
    if status is None:
        raise RefusedError("vLLM does not load this plugin: look at VLLM_PLUGINS, or run vllm-compile-ext doctor")
    if not status.active:
        raise RefusedError(status.line)
    found = doctor.store()
    if found.state != "ok":
        raise RefusedError(f"nothing can be kept: {found.text}" + (f". {found.way_out}" if found.way_out else ""))
    try:
        Store.open(settings.store())  # made now: a failure behind the engine's start would be late
    except (UnsafeStoreError, OSError) as error:
        raise RefusedError(f"the store cannot be used: {error}") from error


def check_config(config: Any, args: Namespace) -> None:
    """Raises `RefusedError` where an engine of this `VllmConfig` has no compiled code, or needs another machine."""
    from vllm.config import CompilationMode

    mode = config.compilation_config.mode
    if mode != CompilationMode.VLLM_COMPILE:
        why = "--enforce-eager" if config.model_config.enforce_eager else f"compilation mode {mode.name}"
        raise RefusedError(f"with these options no compiled code is kept: {why}")
    if reason := rules.why_upstream(config):
        raise RefusedError(f"vLLM compiles this model on its own path and keeps it in its own cache: {reason}")
    parallel = config.parallel_config
    if parallel.distributed_executor_backend == "ray":
        raise RefusedError(
            "Ray's workers do not say what they keep: leave --distributed-executor-backend ray out, "
            "which changes nothing of the code"
        )
    alone = parallel.data_parallel_size_local == parallel.data_parallel_size and not parallel.data_parallel_external_lb
    if args.headless or parallel.nnodes > 1 or not alone:
        raise RefusedError("these options start a part of an engine that waits for others; warm starts whole engines")


def lighten(config: Any) -> None:
    """Take what the code does not depend on out of a `VllmConfig`.

    Afterwards, not in the options: vLLM looks at the checkpoint while it makes the `VllmConfig`, and not under
    ``--load-format dummy`` (`VllmConfig.__post_init__`, `maybe_untie_word_embeddings`, which changes the key).
    """
    config.load_config.load_format = "dummy"
    config.load_config.model_loader_extra_config = {}  # which that format does not take
    if config.speculative_config is not None:
        config.speculative_config.draft_load_config = None  # as for the model itself
    model = config.model_config
    if not model.is_multimodal_model:  # its processor makes the dummy inputs, and needs the tokenizer
        model.skip_tokenizer_init = True
    if sizes_model(config):
        return
    config.cache_config.num_gpu_blocks_override = None
    if on_cpu():
        # Any number: otherwise most of the machine's memory has to be free (`CPUWorker.__init__`).
        config.cache_config.kv_cache_memory_bytes = FIRST


def sizes_model(config: Any) -> bool:
    """Whether the KV cache decides over the longest request (``--max-model-len auto``); it is left alone then."""
    return bool(config.model_config.original_max_model_len == -1)


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def small_kv_cache(upstream: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """vLLM's `get_kv_cache_configs`, for the smallest KV cache with which an engine starts, to a power of two.

    vLLM raises `ValueError` for one that cannot hold a request of the longest length.  On GPUs it is larger, for what
    the kernels' warm-up takes: twice such a request (`run_mixed_prefill_decode_warmup`), and two blocks a sequence and
    group (`_warmup_kernels`), which else runs with fewer sequences than in a real start.
    """

    def get_kv_cache_configs(config: Any, specs: list[Any], available: list[int], *more: Any) -> list[Any]:
        limit = 2**50 if on_cpu() else min(available, default=0)
        blocks, size, fits = 2 * config.scheduler_config.max_num_seqs, FIRST, False
        while size < limit and not sizes_model(config):
            try:
                found = upstream(config, specs, [size] * len(available), *more)
            except ValueError:
                pass
            else:
                has_room = all(each.num_blocks > blocks * len(each.kv_cache_groups) for each in found)
                if on_cpu() or (fits and has_room):
                    return found
                fits = True
            size *= 2
        return upstream(config, specs, available, *more)

    return get_kv_cache_configs


async def start(config: Any) -> None:
    """Start the engine of a `VllmConfig` as vLLM's server does, and end it when it has answered a few requests."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=True)
    if config.model_config.runner_type == "generate":
        try:
            await ask(engine)
        except Exception:
            traceback.print_exc()  # what the start has compiled is kept all the same
    engine.shutdown(timeout=STOP)


async def ask(engine: Any) -> None:
    """Have that compiled, too, which only requests need: log-probabilities, of one sequence and of several."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1, ignore_eos=True, detokenize=False)

    async def one(name: str) -> None:
        async for _ in engine.generate(TokensPrompt(prompt_token_ids=[0, 1]), params, name):
            pass

    for together in (1, 2, 3):
        await asyncio.gather(*(one(f"warm {together} {number}") for number in range(together)))


def main() -> int:
    try:
        args = parse(sys.argv[1:])
        check_plugin()
        config = configure(args)
        check_config(config, args)
    except RefusedError as error:
        why = str(error)
    except Exception as error:
        traceback.print_exc()
        why = f"vLLM does not start with these options ({harmless.error(error)}); --verbose shows what it says"
    else:
        lighten(config)
        asyncio.run(start(config))
        return 0
    print(plain(f"{REFUSAL}{why}"), flush=True)
    return REFUSED


# Each process that vLLM spawns runs this module first, as "__mp_main__".
if __name__ in ("__main__", "__mp_main__"):
    from vllm.v1.engine import core

    core.get_kv_cache_configs = small_kv_cache(core.get_kv_cache_configs)
if __name__ == "__main__":
    sys.exit(main())
