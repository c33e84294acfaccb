"""Everything that can change compiled code and is known before tracing, as readable text: a store's key is made of it.

`factors` gives names and values; two starts with equal factors and equal sources of traced files get the same code.
Names are ordered by how much they explain: versions, the machine, the model, its configuration, variables, settings of
the compilers.  A setting that is None has no factor.

Left out are paths, host names, ports, ranks, names and logging, where vLLM or torch would count them: see `DROPPED`.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

from vllm_compile_ext import compat
from vllm_compile_ext.key import config, machine, readable

logger = logging.getLogger(__name__)

# Environment variables that vLLM counts (vLLM 0.32.0, `envs.py: compile_factors`), and why they do not count here.
_PATH, _HOST, _RANK = "a path", "a host, a port or an address", "a rank or where a process is placed"
_LABEL, _LOG = "says how something is called or where it was built", "logging"
DROPPED_ENV = {
    "CUDA_HOME": _PATH,
    "VLLM_CUDART_SO_PATH": _PATH,
    "VLLM_LORA_RESOLVER_CACHE_DIR": _PATH,
    "VLLM_NCCL_INCLUDE_PATH": _PATH,
    "VLLM_NCCL_SO_PATH": _PATH,
    "VLLM_RUST_FRONTEND_PATH": _PATH,
    "MOONCAKE_PREFERRED_SEGMENT": _HOST,
    "MOONCAKE_REQUESTER_LOCAL_HOSTNAME": _HOST,
    "VLLM_EC_SIDE_CHANNEL_HOST": _HOST,
    "VLLM_EC_SIDE_CHANNEL_PORT": _HOST,
    "VLLM_GPU_NIC_PCIE_MAPPING": _HOST,
    "VLLM_LOOPBACK_IP": _HOST,
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": _HOST,
    "VLLM_NIC_SELECTION_VARS": _HOST,
    "VLLM_NIXL_SIDE_CHANNEL_PORT": _HOST,
    "VLLM_P2P_SIDE_CHANNEL_HOST": _HOST,
    "VLLM_P2P_SIDE_CHANNEL_PORT": _HOST,
    "VLLM_RAY_DP_PLACEMENT_NODE_IPS": _HOST,
    "VLLM_CPU_NUM_OF_RESERVED_CPU": _RANK,
    "VLLM_CPU_OMP_THREADS_BIND": _RANK,
    "VLLM_DP_RANK": _RANK,
    "VLLM_DP_RANK_LOCAL": _RANK,
    "VLLM_RAY_BUNDLE_INDICES": _RANK,
    "VLLM_BUILD_PIPELINE": _LABEL,
    "VLLM_BUILD_URL": _LABEL,
    "VLLM_IMAGE_TAG": _LABEL,
    "VLLM_PROCESS_NAME_PREFIX": _LABEL,
    "VLLM_USAGE_SOURCE": _LABEL,
    "VLLM_SYSTEM_START_DATE": "a date for prompts: it changes every day",
    "VLLM_CONFIGURE_LOGGING": _LOG,
    "VLLM_DISABLE_LOG_LOGO": _LOG,
    "VLLM_LOG_BATCHSIZE_INTERVAL": _LOG,
    "VLLM_LOG_MODEL_INSPECTION": _LOG,
    "VLLM_MOONCAKE_STORE_TIER_LOG": _LOG,
    "vllm_compile_ext": "one factor of its own: plugin",
}
# Settings of torch's compilers, likewise (torch 2.13.0).
DROPPED_SETTINGS = {
    "dynamo.base_dir": _PATH,
    "dynamo.debug_dir_root": _PATH,
    "dynamo.log_file_name": _PATH,
    "inductor.cpp.cxx": "a path; one factor of its own: compiler",
}
DROPPED = {
    **config.DROPPED,
    **{f"env.{name}": why for name, why in DROPPED_ENV.items()},
    **DROPPED_SETTINGS,
}
# Variables that torch's compilers read while they compile, past their settings (torch 2.13.0, `_inductor`).
READ_WHILE_COMPILING = (
    "ATEN_CPU_CAPABILITY",
    "FX_PATCH_GETITEM",
    "PYTORCH_ROCM_ARCH",
    "TENSORIFY_PYTHON_SCALARS",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_DEBUG_COMPILE",
    "TORCHINDUCTOR_DEBUG_SYMBOL",
    "TORCHINDUCTOR_PATTERN_MATCH_BACKEND",
    "TRITON_INTERPRET",
    "TRITON_USE_META_WS",
)

_preparing: threading.Thread | None = None


def prepare() -> None:
    """Find what takes longest (digests of sources, the compiler's version) in the background, once; `factors` waits.

    Touches no device: which one a rank has is known in its main thread alone.
    """
    global _preparing
    if _preparing is None:
        _preparing = threading.Thread(target=_slow, daemon=True, name="prepare-factors")
        _preparing.start()


def _slow() -> None:
    try:
        from torch._inductor import codecache
        from vllm.platforms import current_platform

        machine.plugin()
        machine.packages()
        machine.passes(current_platform)
        if current_platform.is_cpu():
            machine.compiler()
        else:
            codecache.triton_key()
        codecache.torch_key()
    except Exception as error:  # `factors` meets it again and says so
        logger.debug("factors are not prepared: %s: %s", type(error).__name__, error)


def factors(vllm_config: Any, model: Any) -> dict[str, str]:
    """The factors of compiling `model`, a decorated module that has its weights, under `vllm_config`.

    Raises what vLLM raises for a configuration that it cannot hash (`TypeError`).
    """
    from vllm.platforms import current_platform

    from vllm_compile_ext.compilation import module_tree

    if _preparing is not None:
        _preparing.join()
    found = dict(_versions())
    found |= _machine(vllm_config)
    found |= _model(model)
    found |= config.config_factors(vllm_config)
    found |= _environment()
    if current_platform.is_cpu():  # of which the platform names those that Inductor knows
        found |= {f"cpu.{flag}": "yes" for flag in machine.processor()}
    # Settings that the configuration overrides do not count; they differ between an engine that runs in the process of
    # its user and one that does not (`cpp.dynamic_threads`, which `platforms/cpu.py` hands down in a variable).
    overridden = {f"inductor.{name}" for name in vllm_config.compilation_config.inductor_compile_config}
    unwanted = {*DROPPED_SETTINGS, *overridden}
    found |= {name: value for name, value in _settings().items() if name not in unwanted}
    found["structure"] = module_tree.structure(model)
    return found


def _versions() -> Iterator[tuple[str, str]]:
    import torch
    from vllm.platforms import current_platform

    yield "vllm", compat.vllm_version()
    yield "torch", str(torch.__version__)
    if torch.version.cuda or torch.version.hip:
        yield ("cuda", torch.version.cuda) if torch.version.cuda else ("hip", torch.version.hip)
    if not current_platform.is_cpu():
        yield "triton", machine.version("triton", "pytorch-triton", "pytorch-triton-rocm")
    yield "python", machine.python()
    yield "plugin", machine.plugin()
    yield from machine.packages().items()


def _machine(vllm_config: Any) -> dict[str, str]:
    from torch._inductor import config
    from vllm.platforms import current_platform

    found = {"platform": machine.platform()}
    if current_platform.is_cpu():
        found["compiler"] = machine.compiler()
        found["libc"] = machine.libc()
        chosen = vllm_config.compilation_config.inductor_compile_config
        if not chosen.get("cpp.dynamic_threads", config.cpp.dynamic_threads):
            found["threads"] = _threads(chosen.get("cpp.threads", config.cpp.threads))
    found["passes"] = machine.passes(current_platform)
    return found


def _threads(asked: int) -> str:
    """How many threads Inductor writes into C++ kernels (torch 2.13.0, `_inductor/utils.py: parallel_num_threads`)."""
    import torch

    return str(asked if asked >= 1 else torch.get_num_threads())


def _model(model: Any) -> dict[str, str]:
    kind = type(model)
    found = {"class": f"{kind.__module__}.{kind.__qualname__}", "tag": getattr(model, "_compile_tag", "") or "model"}
    for name, attribute in (("encoder", "_is_encoder"), ("dynamic_args", "_dynamic_arg_dims")):
        if (value := getattr(model, attribute, None)) is not None:
            found[name] = readable.text(value)
    return found


def _environment() -> dict[str, str]:
    """Every variable that vLLM counts, and those that torch reads while it compiles; one that is None is left out."""
    import vllm.envs

    values = {
        name: value
        for name, value in vllm.envs.compile_factors().items()
        if name not in DROPPED_ENV and not config.SECRET.search(name)
    }
    values |= {name: os.environ[name] for name in READ_WHILE_COMPILING if name in os.environ}
    values |= _triton_variables()
    return {f"env.{name}": readable.text(value) for name, value in values.items() if value is not None}


def _triton_variables() -> dict[str, str]:
    """The variables that Triton's own cache counts and that are set; Inductor sets those that are paths."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {}
    try:
        found = importlib.import_module("triton._C.libtriton").get_cache_invalidating_env_vars()
    except (ImportError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if not name.endswith("_PATH")}


def _settings() -> dict[str, str]:
    """Settings of torch's compilers, one factor each, and torch's own sources as one digest."""
    import torch
    import torch._dynamo.config
    import torch._inductor.config_comms
    import torch.fx.experimental._config
    from vllm.compilation.compiler_interface import get_inductor_factors

    found: dict[str, str] = {}
    layers: dict[str, Any] = {}
    match get_inductor_factors():
        case [{"hash": _, **system}, bytes(sources), dict(inductor), dict(functorch)]:
            found["torch.sources"] = sources.hex()[:32]
            found |= readable.flat("system", system or None)
            layers = {"inductor": inductor, "functorch": functorch}
        case unknown:
            found["inductor"] = readable.text(unknown)
    matmul = torch.backends.cuda.matmul
    state = {
        "default_dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic.warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "deterministic.fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul.fp32_precision": matmul.fp32_precision,
        "matmul.fp16_reduced_precision": matmul.allow_fp16_reduced_precision_reduction,
        "matmul.bf16_reduced_precision": matmul.allow_bf16_reduced_precision_reduction,
    }
    layers |= {
        "comms": torch._inductor.config_comms.save_config_portable(),
        "dynamo": torch._dynamo.config.save_config_portable(),
        "fx": torch.fx.experimental._config.save_config_portable(),
        "torch": state,
    }
    for layer, values in layers.items():
        for name, value in values.items():
            found |= readable.flat(f"{layer}.{name}", value)
    return found
