"""What of this machine and its installed software goes into compiled code: as short text, found without compiling.

The slow ones are cached, and `factors.prepare` finds them in the background.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform as python_platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_compile_ext import __version__
from vllm_compile_ext.key import readable

# Modules whose presence decides which operators vLLM's layers call (vLLM 0.32.0, `utils/import_utils.py` and the
# `find_spec` calls in layers and kernels), or how a config is read.
PACKAGES = """
    aiter arctic_inference compressed_tensors conch cutlass deep_ep deep_gemm fbgemm_gpu flash_attn flashinfer
    flashinfer_cubin helion hpc humming moonep mori nixl_ep quark tilelang torchao transformers triton_kernels
"""
# Those that come in a distribution of another name.
DISTRIBUTIONS = {
    "aiter": "amd-aiter",
    "conch": "conch-triton-kernels",
    "cutlass": "nvidia-cutlass-dsl",
    "fbgemm_gpu": "fbgemm-gpu-genai",
    "flashinfer": "flashinfer-python",
    "quark": "amd-quark",
}
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")  # of those that run where models do
# Flags of /proc/cpuinfo that a compiler told `-march=native` (torch 2.13.0, `_inductor/cpp_builder.py`) may write
# instructions for without being asked, or that torch's headers ask for.  Others come and go with the kernel.
_FLAGS = re.compile(
    r"(sse|ssse|pni|avx|amx|apx|fma|f16c|bmi|abm|movbe|popcnt|cx16|lahf_lm|gfni|vaes|vpclmul|sha|xop|tbm"
    r"|asimd|sve|sme(?!p)|bf16|i8mm|atomics|crc32|dcpop|fcma|flagm|jscvt|lrcpc|uscat|vx|vsx|altivec).*|fp|fphp"
)


def python() -> str:
    """'3.11.7 cpython-311-x86_64-linux-gnu': bytecode is kept, and C++ kernels are extension modules."""
    return f"{python_platform.python_version()} {sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"


def flags() -> dict[str, str]:
    """The flags of this Python."""
    names = [name for name in dir(sys.flags) if not name.startswith(("_", "n_")) and name not in ("count", "index")]
    return {name: str(getattr(sys.flags, name)) for name in names}


def torch_versions(*, cpu: bool) -> dict[str, str | None]:
    """Of torch, what it was built for, and Triton's."""
    import torch

    triton = None if cpu else version("triton", "pytorch-triton", "pytorch-triton-rocm")
    return {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip, "triton": triton}


def threads(options: Mapping[str, Any]) -> str | None:
    """How many threads Inductor writes into C++ kernels (torch 2.13.0, `_inductor/utils.py: parallel_num_threads`)."""
    import torch
    from torch._inductor import config

    if options.get("cpp.dynamic_threads", config.cpp.dynamic_threads):
        return None
    wanted = options.get("cpp.threads", config.cpp.threads)
    return str(wanted if wanted >= 1 else torch.get_num_threads())


def platform() -> str:
    """Where the code can run, as exactly as Inductor looks: 'linux-x86_64 cpu avx2 avx512 avx512_vnni amx_tile',
    'linux-x86_64 cuda sm_90 NVIDIA H200, 132 SMs'.  `platforms.name` is the short name, found without torch.

    On CPU these are the instruction sets among which Inductor chooses, as torch knows them; nothing is probed.
    """
    import torch
    from vllm.platforms import current_platform

    system = f"{sys.platform}-{python_platform.machine()}"
    if current_platform.is_cpu():
        return " ".join([f"{system} cpu", *_instruction_sets()])
    if not current_platform.is_cuda_alike():
        return f"{system} {current_platform.device_type} {current_platform.get_device_name()}"
    # Inductor writes the number of multiprocessors into what it generates, besides choosing by the name.
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = f"rocm {device.gcnArchName}" if torch.version.hip else f"cuda sm_{device.major}{device.minor}"
    return f"{system} {arch} {device.name}, {device.multi_processor_count} SMs"


def device() -> str:
    """'_cuda0': the number of this process's accelerator, which Inductor writes into the code (torch 2.13.0); or ''."""
    import torch

    if not torch.accelerator.is_available():
        return ""
    return f"_{torch.accelerator.current_accelerator()}{torch.accelerator.current_device_index()}"


def _instruction_sets() -> list[str]:
    """The names that `torch._inductor.cpu_vec_isa` asks for (torch 2.13.0)."""
    import torch
    from torch._inductor.cpu_vec_isa import x86_isa_checker

    found = torch.cpu.get_capabilities()
    more = [name for name in ("avx512_bf16", "amx_fp16", "sve", "sve2", "bf16") if found.get(name)]
    length = [f"{found['sve_max_length']} bits"] if found.get("sve_max_length") else []
    return [*x86_isa_checker(), *more, *length]


@functools.cache
def processor() -> tuple[str, ...]:
    """The instruction-set flags of this processor that a compiler may use, sorted; () where Linux does not say."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return flags_in(file.read(16384))  # the first of many equal processors
    except OSError:
        return ()


def flags_in(cpuinfo: str) -> tuple[str, ...]:
    """The flags of the first processor in the text of /proc/cpuinfo."""
    line = re.search(r"^(?:flags|Features|features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return tuple(sorted({flag for flag in line[1].split() if _FLAGS.fullmatch(flag)})) if line else ()


def compiler() -> str:
    """The C++ compiler that Inductor would call: 'gcc 12.2.0 (Debian 12.2.0-14), x86_64-linux-gnu', or 'none'."""
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    return next((found for name in names if name and (found := _compiler(name)) is not None), "none")


@functools.cache
def _compiler(name: str) -> str | None:
    env = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            [name, "-v"], capture_output=True, stdin=subprocess.DEVNULL, env=env, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return compiler_in((done.stdout + done.stderr).decode(errors="replace"))


def compiler_in(output: str) -> str:
    """Name, version and target of the compiler that printed `output` for ``-v``."""
    version = re.search(r"^.*\bversion \d.*$", output, re.MULTILINE)
    target = re.search(r"^Target: (.*)$", output, re.MULTILINE)
    if version is None:
        return readable.digest(output.encode())
    name = version[0].strip().replace(" version ", " ")
    return f"{name}, {target[1].strip()}" if target else name


def libc() -> str:
    """'glibc 2.36'."""
    return " ".join(python_platform.libc_ver())


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the installed ones of `PACKAGES`."""
    found = {}
    for module in PACKAGES.split():
        spec = None
        with suppress(ImportError, ValueError):  # a package that is not there, or not as it should be
            spec = importlib.util.find_spec(module)
        if spec is not None:
            found[module] = version(DISTRIBUTIONS.get(module, module), module)
    return found


def version(*distributions: str) -> str:
    """The version of the first of these distributions that is installed, or 'unknown'."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def vllm_plugins() -> dict[str, str]:
    """Name -> what it is and its version, of the plugins that vLLM's loader takes (vLLM 0.32.0, `plugins/__init__.py`);
    this one has a factor of its own.
    """
    import vllm.envs

    wanted = vllm.envs.VLLM_PLUGINS
    return {name: what for name, what in _entry_points().items() if wanted is None or name in wanted}


@functools.cache
def _entry_points() -> dict[str, str]:
    found = [point for group in PLUGIN_GROUPS for point in metadata.entry_points(group=group)]
    ours = __name__.partition(".")[0]
    return {
        point.name: f"{point.value} {point.dist.name} {point.dist.version}" if point.dist else point.value
        for point in sorted(found)
        if point.module.partition(".")[0] != ours
    }


def plugin() -> str:
    """'0.1.0 <digest of the plugin's sources>'."""
    return f"{__version__} {sources(Path(__file__).parents[1])}"


@functools.cache
def sources(folder: Path) -> str:
    """A digest of the Python files below `folder`, by their names in it: the same wherever it is installed."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    parts = [f"{name} {readable.digest(path.read_bytes())}" for name, path in files]
    return readable.digest("\n".join(parts).encode())


def passes() -> str:
    """The class that runs vLLM's graph passes, and a digest of the sources of vLLM's compiler and its passes."""
    import vllm
    from vllm.platforms import current_platform

    found = [current_platform.get_pass_manager_cls(), sources(Path(vllm.__file__).parent / "compilation")]
    module = importlib.util.find_spec(found[0].rpartition(".")[0])
    if not found[0].startswith("vllm.compilation.") and module is not None and module.origin is not None:
        found.append(readable.digest(Path(module.origin).read_bytes()))
    return " ".join(found)
