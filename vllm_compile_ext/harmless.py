"""Which values others may see.  Everything that is kept or said of a start (its record, reports, manifests, bundles,
log lines) is read by people who did not write its command line, so a value is shown only where a rule here says so.

Shown are numbers, switches and names of code; words that vLLM, torch or a model family publishes (`WORDS`, and the
choices that vLLM declares); short words under the few names of `NAMED`; and a model's name without the folder or the
address that it lies at.  Everything else is `HIDDEN`: nothing is looked for that looks like a secret.

Standard library only: what records a start imports it early.
"""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

HIDDEN = "***"


def plain(text: str) -> str:
    r"""`text` with all that a terminal or a log would act on written out: \x1b, \n, \u202e (bidirectional), ..."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What vLLM 0.32.0, torch 2.13.0 and their variables have words for, past the choices that vLLM declares.
WORDS = _words("""
    0 1 true false True False yes no on off auto none None default all any native unknown cpu cuda rocm xpu tpu host
    gloo nccl mp ray uni external_launcher spawn fork binary unpacked float half float16 float32 float64 bfloat16 int8
    int4 int64 complex128 fp4 fp8 fp8_e4m3 fp8_e5m2 nvfp4 mxfp4 mxfp8 safetensors dummy pt hf mistral gguf awq
    awq_marlin gptq gptq_marlin bitsandbytes compressed-tensors modelopt torchao inductor eager openxla triton cutlass
    flashinfer marlin aten pallas cpp ATEN TRITON CPP CUTLASS CK DEFAULT EXHAUSTIVE transformers terratorch vllm cumem
    linear ag_rs allgather_reducescatter strict fill span relax skip full warmup highest high medium ieee tf32 bf16 avx2
    avx512 AVX2 AVX512 AMX x86 fbgemm qnnpack onednn mkldnn conv rnn matmul info warn warning error debug INFO WARN
    WARNING ERROR DEBUG NONE FP INT8 INT6 INT4 dynamic static donated same_as_forward needs_exact_strides
    needs_fixed_stride_order flops dp svg intermediates heuristic analytical benchmark original_aten host-cuda
    Anderson2021 Adams2019 O1 -O1 -O2 -O3 gfx90a gfx942 gfx950 cublas cublaslt hipblas hipblaslt cusolver magma aotriton
    ck cutedsl privateuseone silu gelu gelu_new gelu_fast gelu_pytorch_tanh relu relu2 tanh quick_gelu swiglu llama3
    longrope yarn mrope ntk full_attention sliding_attention chunked_attention linear_attention attention mamba
""")

# Names under which a short word is shown whatever it says: what a model is, and which operators are compiled how.
NAMED = _words("""
    architectures model_type hidden_act hidden_activation activation_function dtype torch_dtype rope_type quant_method
    layer_types custom_ops splitting_ops
""")
_SHORT = re.compile(r"[+-]?[A-Za-z][\w:.-]{0,79}")
_DTYPE = re.compile(r"torch\.(bool|u?int|bits|q?int|bfloat|float|complex)\d{0,3}(_e\dm\d[a-z]{0,4})?")
_KEY = re.compile(r"[A-Za-z_][\w.]{0,63}|\d{1,6}")  # names are shown, also of what a user names

# Options whose value is a number, and others, of which the name alone is shown where vLLM has not told its options.
NUMBERS = _words("""
    max_model_len max_num_seqs max_num_batched_tokens gpu_memory_utilization tensor_parallel_size pipeline_parallel_size
    data_parallel_size data_parallel_size_local data_parallel_rank nnodes node_rank block_size kv_cache_memory_bytes
    cpu_offload_gb max_loras max_lora_rank max_logprobs num_gpu_blocks_override optimization_level api_server_count port
    seed tp pp dp
""")
_OPTIONS = _words("""
    model tokenizer dtype kv_cache_dtype quantization load_format enforce_eager enable_expert_parallel enable_lora
    distributed_executor_backend trust_remote_code served_model_name compilation_config additional_config
    speculative_config hf_overrides hf_token api_key host headless multiprocessing_fork
""")
_SHORTS = _words("-c -m -tp -pp -dp -dpn -dpr -dpa -n -r -q -cc -ac -sc -O -O0 -O1 -O2 -O3")
_COMMANDS = frozenset({"serve", "bench", "chat", "complete", "launch", "run-batch", "collect-env"})
_DECLARED = (("vllm.engine.arg_utils", "AsyncEngineArgs"), ("vllm.entrypoints.launchers.cli_args", "FrontendArgs"))
_FLAGS = re.compile(r"-[BbdEhiIOPqsSuvx]{1,3}")  # of Python itself, without a value
_NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,15})?[kKmMgGtT]?i?")
_MODULE = re.compile(r"vllm(_compile_ext)?(\.[a-z_]{1,32}){0,8}")
_PROGRAM = re.compile(r"python[\d.]{0,5}|vllm|vllm-compile-ext|pytest|[A-Za-z_][\w-]{0,40}\.py")
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE = re.compile(r"[\w-][\w.+ -]{0,99}")


def is_harmless(value: Any, name: str = "", choices: Set[str] = frozenset()) -> bool:
    """Whether a value may be shown.  name: of what it is the value, dotted; choices: words that are declared for it."""
    kind: Any = type(value)
    if value is None or kind in (bool, int, float) or hasattr(kind, "__members__"):  # a member of an enum
        return True
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return True
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device", "layout", "memory_format"):
        return True
    if isinstance(value, bytes | bytearray | memoryview):
        return False
    if isinstance(value, str):
        named = name.rpartition(".")[2] in NAMED and _SHORT.fullmatch(value) is not None
        known = all(word in WORDS or word in choices for word in re.split(", ?", value))
        return named or known or value == "" or _DTYPE.fullmatch(value) is not None
    if isinstance(value, Mapping):
        return all(is_harmless(key) and is_harmless(one, name, choices) for key, one in value.items())
    return isinstance(value, Sequence | Set) and all(is_harmless(one, name, choices) for one in value)


def is_key(text: str) -> bool:
    """Whether a key of a dictionary looks like a name: those are shown."""
    return _KEY.fullmatch(text) is not None


@functools.cache
def choices(kind: Any) -> frozenset[str]:
    """The words that the annotations of a dataclass declare."""
    try:
        annotations = typing.get_type_hints(kind)
    except Exception:  # one that cannot be evaluated
        annotations = {field.name: field.type for field in fields(kind)}
    return frozenset(word for annotation in annotations.values() for word in _literals(annotation))


def _literals(annotation: Any) -> Iterable[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return (word for word in typing.get_args(annotation) if isinstance(word, str))
    return (word for part in typing.get_args(annotation) for word in _literals(part))


def options(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, as they may be shown; those inside of one, dotted."""
    found: dict[str, Any] = {}
    kind: Any = type(config)
    for field in fields(config):
        value = getattr(config, field.name, None)
        try:
            default = field.default_factory() if callable(field.default_factory) else field.default
            same = bool(value == default)
        except Exception:  # a comparison of the value's own
            same = False
        if same or value in (None, ""):
            continue
        if is_dataclass(value) and not isinstance(value, type):
            found |= {f"{field.name}.{name}": shown for name, shown in options(value).items()}
        elif not is_harmless(value, choices=choices(kind)):
            found[field.name] = HIDDEN
        else:
            number = type(value) in (bool, int, float)
            found[field.name] = value if number else value.name if isinstance(value, Enum) else str(value)[:200]
    return found


def model_name(text: str) -> str:
    """'org/name' as it is, of a path or an address the last part, without what follows it."""
    if _HUB.fullmatch(text):
        return text
    last = PurePath(re.split(r"[?#]", text)[0]).name
    return last if _FILE.fullmatch(last) else HIDDEN if text else ""


def arguments(given: Iterable[Any], model: str | None = None) -> list[str]:
    """A command line as it may be shown; model: the value of that option, where it is known.

    Shown are programs, options that vLLM has (of a dotted one its beginning), words, and numbers of `NUMBERS`.
    """
    words = [str(text) for text in given] or [""]
    shown = [_program(words.pop(0))]
    if shown[0].startswith("python"):
        shown += _interpreter(words)
    if words and not words[0].startswith("-"):
        command = words.pop(0)
        shown.append(command if command in _COMMANDS else HIDDEN)
    known = _known()
    option = ""  # whose values follow
    for text in words:
        if not text.startswith("-") or _NUMBER.fullmatch(text):
            shown.append(_value(text, option, model))
            continue
        name, equals, value = text.partition("=")
        name, dot, _ = name.partition(".")
        option = HIDDEN if dot else name.lstrip("-").replace("-", "_")
        if _is_option(name, known):
            told = HIDDEN if dot else _value(value, option, model)
            shown.append(name + (f".{HIDDEN}" if dot else "") + (f"={told}" if equals else ""))
        else:
            shown.append(HIDDEN)
            option = HIDDEN
    return shown


def _program(text: str) -> str:
    name = PurePath(text).name
    return name if _PROGRAM.fullmatch(name) else HIDDEN


def _interpreter(words: list[str]) -> list[str]:
    """Python's own options and what it runs, as they may be shown; they are taken from `words`."""
    shown = []
    while words:
        text = words.pop(0)
        head, joined = text[:2], text[2:]
        if head in ("-c", "-m", "-X", "-W"):
            value = joined or (words.pop(0) if words else "")
            harmless = head == "-m" and _MODULE.fullmatch(value)
            shown += [head + HIDDEN] if joined else [head, value if harmless else HIDDEN]
            if head in ("-c", "-m"):
                break
        elif text.startswith("-"):
            shown.append(text if _FLAGS.fullmatch(text) else HIDDEN)
        else:
            shown.append(_program(text))
            break
    return shown


def _is_option(name: str, known: Set[str]) -> bool:
    if not name.startswith("--"):
        return name in _SHORTS
    option = name[2:].replace("-", "_")
    starts = {option, option.removeprefix("no_")} - {""}
    return any(each.startswith(start) for start in starts for each in known)  # vLLM takes abbreviations


def _known() -> Set[str]:
    """The names of vLLM's options, as far as they have been imported."""
    known = set(NUMBERS | _OPTIONS)
    for module, name in _DECLARED:
        kind = getattr(sys.modules.get(module), name, None)
        if is_dataclass(kind):
            known |= {field.name for field in fields(kind)}
    return known


def _value(text: str, option: str, model: str | None) -> str:
    if model is not None and text == model:
        return model_name(text)
    return text if text in WORDS or (option in NUMBERS and _NUMBER.fullmatch(text)) else HIDDEN


def error(raised: BaseException | None) -> str:
    """What may be said of an exception: its class, and its message where that is ours or the operating system's.

    Messages of others quote what they do not like; for them it is the line that raised it.
    """
    kind: Any = type(raised)
    if raised is None:
        return ""
    name = kind.__name__
    if kind.__module__.startswith("vllm_compile_ext"):
        return f"{name}: {raised}"[:500]
    if isinstance(raised, OSError) and raised.errno is not None:
        return f"{name}: {raised.strerror}"
    if isinstance(raised, RuntimeError) and str(raised).startswith("CUDA "):  # torch's: of the device, or its memory
        return f"{name}: {raised}".partition("\n")[0][:500]
    trace = raised.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return str(name)
    code = trace.tb_frame.f_code
    return f"{name} in {code.co_qualname} ({PurePath(code.co_filename).name}:{trace.tb_lineno})"
