"""What vLLM, torch or Python would count and the key does not: the name of the factor it would be, and why not.

Written for vLLM 0.32.0 (`vllm/config/`, `envs.py: compile_factors`), torch 2.13.0 and Python 3.11.  Nothing is left out
that is not listed here.
"""

from __future__ import annotations

_PATH, _HOST, _RANK = "a path", "a host, a port or an address", "a rank or where a process is placed"
_LABEL, _LOG = "says how something is called or where it was built", "logging"
_FOUND = "decides what can be imported; what is imported counts: packages, plugins, what the trace read"

DROPPED = {
    # Fields of vLLM's configuration, by the class that hashes them, and keys of a model's own config.json.
    "ModelConfig.model": "a path or a name; what it holds stands in hf_config and in the module tree",
    "ModelConfig.model_weights": "a path or a name, as model",
    "ModelConfig.revision": "a name, as model",
    "ModelConfig.code_revision": "a name; what was traced of it is compared (seen.py)",
    "ModelConfig.generation_config": "a path, or where sampling defaults come from",
    "ModelConfig.max_logprobs": "how many logprobs a request may ask for; the sampler is not in a model's graph",
    "ModelConfig.trust_remote_code": "what the code says stands in hf_config, in the class and in what the trace read",
    "ParallelConfig.disable_nccl_for_dp_synchronization": "how data parallel ranks agree on the size of a batch, "
    "between steps; where it is not given, async_scheduling decides it",
    "hf_config._name_or_path": "a path or a name, as model",
    "hf_config.transformers_version": "one factor of its own: transformers",
    # Environment variables.
    "env.CUDA_HOME": _PATH,
    "env.VLLM_CUDART_SO_PATH": _PATH,
    "env.VLLM_LORA_RESOLVER_CACHE_DIR": _PATH,
    "env.VLLM_NCCL_INCLUDE_PATH": _PATH,
    "env.VLLM_NCCL_SO_PATH": _PATH,
    "env.VLLM_RUST_FRONTEND_PATH": _PATH,
    "env.MOONCAKE_PREFERRED_SEGMENT": _HOST,
    "env.MOONCAKE_REQUESTER_LOCAL_HOSTNAME": _HOST,
    "env.VLLM_EC_SIDE_CHANNEL_HOST": _HOST,
    "env.VLLM_EC_SIDE_CHANNEL_PORT": _HOST,
    "env.VLLM_GPU_NIC_PCIE_MAPPING": _HOST,
    "env.VLLM_LOOPBACK_IP": _HOST,
    "env.VLLM_MOONCAKE_BOOTSTRAP_PORT": _HOST,
    "env.VLLM_NIC_SELECTION_VARS": _HOST,
    "env.VLLM_NIXL_SIDE_CHANNEL_PORT": _HOST,
    "env.VLLM_P2P_SIDE_CHANNEL_HOST": _HOST,
    "env.VLLM_P2P_SIDE_CHANNEL_PORT": _HOST,
    "env.VLLM_RAY_DP_PLACEMENT_NODE_IPS": _HOST,
    "env.VLLM_CPU_NUM_OF_RESERVED_CPU": _RANK,
    "env.VLLM_CPU_OMP_THREADS_BIND": _RANK,
    "env.VLLM_DP_RANK": _RANK,
    "env.VLLM_DP_RANK_LOCAL": _RANK,
    "env.VLLM_RAY_BUNDLE_INDICES": _RANK,
    "env.VLLM_BUILD_PIPELINE": _LABEL,
    "env.VLLM_BUILD_URL": _LABEL,
    "env.VLLM_IMAGE_TAG": _LABEL,
    "env.VLLM_PROCESS_NAME_PREFIX": _LABEL,
    "env.VLLM_USAGE_SOURCE": _LABEL,
    "env.VLLM_SYSTEM_START_DATE": "a date for prompts: it changes every day",
    "env.VLLM_CONFIGURE_LOGGING": _LOG,
    "env.VLLM_DISABLE_LOG_LOGO": _LOG,
    "env.VLLM_LOG_BATCHSIZE_INTERVAL": _LOG,
    "env.VLLM_LOG_MODEL_INSPECTION": _LOG,
    "env.VLLM_MOONCAKE_STORE_TIER_LOG": _LOG,
    "env.vllm_compile_ext": "one factor of its own: plugin",
    "env.VLLM_PLUGINS": "one factor for each plugin that it lets in: vllm_plugin",
    # Settings of torch's compilers.
    "dynamo.base_dir": _PATH,
    "dynamo.debug_dir_root": _PATH,
    "dynamo.log_file_name": _PATH,
    "inductor.cpp.cxx": "a path; one factor of its own: compiler",
    # The state of torch.
    "state.guards.num_threads": "one factor of its own where it is in the code: threads",
    "state.c._get_caught_jit_exception_class_name": "the last error of TorchScript",
    "state.c._get_caught_jit_exception_original_msg": "the last error of TorchScript",
    "state.c._get_thread_name": "a name",
    "state.c._get_tracing_state": "TorchScript's tracer",
    "state.c._get_DTensor_sharding_propagator_cache_stats": "hits and misses of a cache",
    "state.c._get_upgraders_map_size": "size of a cache of TorchScript",
    "state.c._get_version_calculator_flag": "how TorchScript's files are numbered",
    "state.c._get_backcompat_broadcast_warn": "a warning",
    "state.c._get_backcompat_keepdim_warn": "a warning",
    "state.c._get_warnAlways": "a warning",
    "state.backends.cuda.cufft_plan_cache": "the size of a cache; asking for it initialises CUDA",
    # sys.flags.
    "flags.debug": "the parser's own output",
    "flags.inspect": "what happens when a program ends",
    "flags.interactive": "what happens when a program ends",
    "flags.dont_write_bytecode": "whether .pyc files are written",
    "flags.no_user_site": _FOUND,
    "flags.no_site": _FOUND,
    "flags.ignore_environment": _FOUND,
    "flags.isolated": _FOUND,
    "flags.safe_path": _FOUND,
    "flags.verbose": _LOG,
    "flags.quiet": _LOG,
    "flags.bytes_warning": "a warning",
    "flags.warn_default_encoding": "a warning",
    "flags.hash_randomization": "the seed differs from process to process",
}


def counts(name: str) -> bool:
    """Whether a factor of this name belongs into the key."""
    return name not in DROPPED
