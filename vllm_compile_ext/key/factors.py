"""The key of compiled code: everything that can change it and is known before tracing, as a table of readable text.

`FACTORS` is the whole table, ordered by how much a row explains when it changes; `EXCLUDED` lists what vLLM, torch or
Python would count and the key does not.  Two starts with equal factors, in which what the trace read is equal, too
(seen.py), get the same code.  Written for vLLM 0.32.0 (`vllm/config/`, `envs.py: compile_factors`), torch 2.13.0 and
Python 3.11.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vllm_compile_ext import harmless, versions
from vllm_compile_ext.key import config, machine, readable, torch_settings

logger = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """What is compiled: a decorated module that has its weights, and its `VllmConfig`.

    inductor: the settings of Inductor that the configuration overrides.
    """

    config: Any
    model: Any
    inductor: Mapping[str, Any]
    cpu: bool


# Name, and what finds the text.  Of a dictionary each item is a factor, `name.item`; None is no factor.
FACTORS: tuple[tuple[str, Callable[[Compiled], Any]], ...] = (
    ("vllm", lambda _: versions.vllm_version()),
    ("", lambda c: machine.torch_versions(cpu=c.cpu)),
    ("python", lambda _: machine.python()),
    ("flags", lambda _: machine.flags()),
    ("plugin", lambda _: machine.plugin()),
    ("vllm_plugin", lambda _: machine.vllm_plugins()),
    ("", lambda _: machine.packages()),
    ("platform", lambda _: machine.platform()),
    ("compiler", lambda c: machine.compiler() if c.cpu else None),
    ("libc", lambda c: machine.libc() if c.cpu else None),
    ("threads", lambda c: machine.threads(c.inductor) if c.cpu else None),
    ("passes", lambda _: machine.passes()),
    ("class", lambda c: f"{type(c.model).__module__}.{type(c.model).__qualname__}"),
    ("tag", lambda c: getattr(c.model, "_compile_tag", "") or "model"),
    ("use_aot_compile", lambda c: None if getattr(c.model, "kept_by_stock", True) else "False"),
    ("encoder", lambda c: str(getattr(c.model, "_is_encoder", None))),
    ("dynamic_args", lambda c: readable.cut(readable.whole(getattr(c.model, "_dynamic_arg_dims", None)))),
    ("", lambda c: config.config_factors(c.config, EXCLUDED)),
    ("env", lambda c: torch_settings.variables(cpu=c.cpu)),
    ("cpu", lambda c: dict.fromkeys(machine.processor(), "yes") if c.cpu else None),
    ("", lambda c: torch_settings.compilers(c.inductor)),
    ("state", lambda _: torch_settings.state()),
)

# Why, and the names of the factors that these would be.  Fields of vLLM's configuration have the class that hashes them
# before the dot, keys of a model's own config.json `hf_config`.
_EXCLUDED = {
    "a path or a name; what it holds stands in hf_config, in the module tree and in what the trace read": """
        ModelConfig.model ModelConfig.model_weights ModelConfig.revision ModelConfig.code_revision
        hf_config._name_or_path ModelConfig.trust_remote_code""",
    "a path, or where sampling defaults come from": "ModelConfig.generation_config",
    "how many logprobs a request may ask for: the sampler is not in a model's graph": "ModelConfig.max_logprobs",
    # Where it is not given, async_scheduling decides it.
    "how data parallel ranks agree on the size of a batch, between steps": """
        ParallelConfig.disable_nccl_for_dp_synchronization""",
    "has a factor of its own (transformers, plugin, vllm_plugin, compiler, threads where they are in the code)": """
        hf_config.transformers_version env.vllm_compile_ext env.VLLM_PLUGINS inductor.cpp.cxx
        state.guards.num_threads""",
    "a path": """
        env.CUDA_HOME env.VLLM_CUDART_SO_PATH env.VLLM_LORA_RESOLVER_CACHE_DIR env.VLLM_NCCL_INCLUDE_PATH
        env.VLLM_NCCL_SO_PATH env.VLLM_RUST_FRONTEND_PATH dynamo.base_dir dynamo.debug_dir_root dynamo.log_file_name""",
    "a host, a port or an address": """
        env.MOONCAKE_PREFERRED_SEGMENT env.MOONCAKE_REQUESTER_LOCAL_HOSTNAME env.VLLM_EC_SIDE_CHANNEL_HOST
        env.VLLM_EC_SIDE_CHANNEL_PORT env.VLLM_GPU_NIC_PCIE_MAPPING env.VLLM_LOOPBACK_IP
        env.VLLM_MOONCAKE_BOOTSTRAP_PORT env.VLLM_NIC_SELECTION_VARS env.VLLM_NIXL_SIDE_CHANNEL_PORT
        env.VLLM_P2P_SIDE_CHANNEL_HOST env.VLLM_P2P_SIDE_CHANNEL_PORT env.VLLM_RAY_DP_PLACEMENT_NODE_IPS""",
    "a rank, or where a process is placed": """
        env.VLLM_CPU_NUM_OF_RESERVED_CPU env.VLLM_CPU_OMP_THREADS_BIND env.VLLM_DP_RANK env.VLLM_DP_RANK_LOCAL
        env.VLLM_RAY_BUNDLE_INDICES""",
    "what something is called, or where it was built": """
        env.VLLM_BUILD_PIPELINE env.VLLM_BUILD_URL env.VLLM_IMAGE_TAG env.VLLM_PROCESS_NAME_PREFIX
        env.VLLM_USAGE_SOURCE state.c._get_thread_name""",
    "a date for prompts: it changes every day": "env.VLLM_SYSTEM_START_DATE",
    "logging and warnings": """
        env.VLLM_CONFIGURE_LOGGING env.VLLM_DISABLE_LOG_LOGO env.VLLM_LOG_BATCHSIZE_INTERVAL
        env.VLLM_LOG_MODEL_INSPECTION env.VLLM_MOONCAKE_STORE_TIER_LOG state.c._get_backcompat_broadcast_warn
        state.c._get_backcompat_keepdim_warn state.c._get_warnAlways flags.verbose flags.quiet flags.bytes_warning
        flags.warn_default_encoding""",
    "TorchScript, which traces nothing here, and hits and misses of a cache": """
        state.c._get_caught_jit_exception_class_name state.c._get_caught_jit_exception_original_msg
        state.c._get_tracing_state state.c._get_upgraders_map_size state.c._get_version_calculator_flag
        state.c._get_DTensor_sharding_propagator_cache_stats""",
    "the parser's own output, what happens when a program ends, and whether .pyc files are written": """
        flags.debug flags.inspect flags.interactive flags.dont_write_bytecode""",
    "decides what can be imported; what is imported counts: packages, plugins, what the trace read": """
        flags.no_user_site flags.no_site flags.ignore_environment flags.isolated flags.safe_path""",
    "a seed that differs from process to process": "flags.hash_randomization",
}
EXCLUDED: dict[str, str] = {name: why for why, names in _EXCLUDED.items() for name in names.split()}

_preparing: threading.Thread | None = None


def factors(vllm_config: Any, model: Any) -> dict[str, str]:
    """The factors of compiling `model`, a decorated module that has its weights, under `vllm_config`.

    Raises what vLLM raises for a configuration that it cannot hash (`TypeError`).
    """
    from vllm.platforms import current_platform

    if _preparing is not None:
        _preparing.join()
    options = vllm_config.compilation_config.inductor_compile_config
    compiled = Compiled(vllm_config, model, options, current_platform.is_cpu())
    found: dict[str, str] = {}
    for name, find in FACTORS:
        value = find(compiled)
        for item, text in value.items() if isinstance(value, Mapping) else (("", value),):
            factor = ".".join(filter(None, (name, item)))
            if text is not None and factor not in EXCLUDED:
                found[factor] = text
    return found


def prepare() -> None:
    """Find what takes longest (digests of sources, the compiler's version) in the background, once; `factors` waits.

    Touches no device: which one a rank has is known in its main thread alone.
    """
    global _preparing
    if _preparing is None:
        _preparing = threading.Thread(target=_find_slow, daemon=True, name="prepare-factors")
        _preparing.start()


def _find_slow() -> None:
    try:
        from torch._inductor import codecache
        from vllm.platforms import current_platform

        for find in (machine.plugin, machine.packages, machine.vllm_plugins, machine.passes, torch_settings.state):
            find()
        if current_platform.is_cpu():
            machine.compiler()
        else:
            codecache.triton_key()
        codecache.torch_key()
    except Exception as error:  # `factors` fails the same way, and says so
        logger.debug("factors are not prepared: %s", harmless.error(error))
