"""One compiled piece as bytes: Inductor's module without its compilers, the kernels, and AOTAutograd's wrappers.

Loading one unpickles what AOTAutograd recorded of the piece's inputs and outputs, runs the module, maps the kernels and
puts upstream's own runtime wrappers around it.  Nothing is traced, no graph is read, no compiler is asked for anything
(torch 2.13.0: `_functorch/_aot_autograd/aot_autograd_result.py`, `_inductor/output_code.py`, `triton_bundler.py`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.machinery
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_compile_ext.program import generated

CPP, TRITON = "cpp", "triton"


class NotFrozen(Exception):  # noqa: N818 - an answer, not an error
    """The piece is not of the known shape; the message says why."""


@dataclass(frozen=True)
class Frozen:
    """source: the module, see `bytecode.generated`.  record: pickled, its constants and what AOTAutograd and Inductor
    know of the piece.

    kernels: (`CPP` or `TRITON`, bytes) in the order in which the module names them.
    """

    source: str
    record: bytes
    kernels: list[tuple[str, bytes]]


def constants(module: Any) -> list[Any]:
    """The tensors that a piece holds itself: compiled, it takes them before its inputs.

    AOTAutograd passes them while the process that compiled lives, and leaves them out of what it serializes (torch
    2.13.0, `_functorch/_aot_autograd/aot_autograd_result.py: deserialize_bundled_cache_entry`).
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return list(named.values())


def freeze(artifact: Any, own: Sequence[Any] = ()) -> Frozen:
    """A compiled `torch._inductor.standalone_compile.AOTCompiledArtifact`, with its `constants`, as bytes.

    Raises `NotFrozen`.
    """
    from torch._functorch._aot_autograd.aot_autograd_result import BundledAOTAutogradResult
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.output_code import CompiledFxGraph

    inner = getattr(artifact, "inner_fn", None)
    entry = inner.compiled_fn.serialize() if inner is not None else None
    if not isinstance(entry, BundledAOTAutogradResult) or entry.compiled_bw is not None:
        raise NotFrozen(f"it is a {type(artifact).__name__} of a {type(entry).__name__}")
    graph = entry.compiled_fw.result
    if not isinstance(graph, CompiledFxGraph):
        raise NotFrozen(f"Inductor made a {type(graph).__name__}")
    if graph.torchbind_constants or graph.frozen_param_names or graph._wrap_compiled_regions:
        raise NotFrozen("it holds script objects, frozen parameters or regions")
    try:
        source, calls = generated.cut(graph.source_code)
    except generated.Uncuttable as why:
        raise NotFrozen(str(why)) from None
    module = next((m for m in PyCodeCache.modules if m.__name__.endswith(f".{graph.cache_key}")), None)
    if module is None:
        raise NotFrozen("its module is not loaded")
    kernels = [
        (CPP, _object_file(getattr(module, call.name)))
        if call.kind == "cpp_pybinding"
        else (TRITON, _triton(call, getattr(module, call.name)))
        for call in calls
    ]
    return Frozen(source, pickle.dumps((_without_texts(entry, graph), list(own))), kernels)


def thaw(frozen: Frozen) -> Callable[..., Any]:
    """The callable: the piece's inputs as arguments, a sequence of its outputs as result."""
    from torch._inductor.output_code import CompiledFxGraphConstants, maybe_realign_inputs

    entry, own = pickle.loads(frozen.record)
    graph = entry.compiled_fw.result
    kernels = [_map(data) if kind == CPP else _launcher(data) for kind, data in frozen.kernels]
    name = f"vllm_compile_ext.piece_{blake3(frozen.source.encode() + frozen.record).hexdigest()[:16]}"
    module = generated.load(frozen.source, kernels, CompiledFxGraphConstants().unwrap(graph), name)
    graph.current_callable = module.call
    maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)
    run = graph.current_callable

    def boxed(inputs: list[Any]) -> Any:
        return run(inputs)

    compiled = entry._apply_runtime_wrappers(boxed, None, False, entry.sanitized_aot_config)
    return lambda *inputs: compiled([*own, *inputs])


def _without_texts(entry: Any, graph: Any) -> Any:
    """A copy of AOTAutograd's `entry` without what only logs and compilers read."""
    entry, forward, graph = copy.copy(entry), copy.copy(entry.compiled_fw), copy.copy(graph)
    entry.compiled_fw, forward.result = forward, graph
    for text in ("source_code", "runnable_graph_str", "inductor_post_grad_graph_str"):
        setattr(graph, text, "")
    for gone in ("cache_linemap", "inductor_provenance_mapping_str", "inductor_provenance_stack_traces_str"):
        setattr(graph, gone, None)
    graph._triton_bundle = None
    for gone in ("aot_joint_graph_str", "aot_forward_graph_str", "aot_backward_graph_str", "guards_expr"):
        setattr(entry, gone, None)
    return entry


def _object_file(kernel: Any) -> bytes:
    """The shared object that a kernel made by Inductor's `CppPythonBindingsCodeCache` is in."""
    path = getattr(getattr(kernel, "__self__", None), "__file__", None)
    if path is None:
        raise NotFrozen(f"the kernel {kernel!r} is in no shared object")
    return _without_paths(Path(path))


def _without_paths(path: Path) -> bytes:
    """A shared object without debug information, which names the folder that it was compiled in: equal kernels are
    equal bytes then, and a third of the size.  Left as it is where there is no `strip`; it comes with g++.
    """
    strip = shutil.which("strip")
    out = path.with_suffix(".stripped")
    sections = ("--remove-section=.note.gnu.build-id", "--remove-section=.comment")
    if (
        strip
        and subprocess.run([strip, "--strip-all", *sections, "-o", out, path], capture_output=True).returncode == 0
    ):
        return out.read_bytes()
    return path.read_bytes()


def _map(data: bytes) -> Any:
    """Map the shared object `data` and return its kernel.  No file is involved that could change or vanish later."""
    import torch

    name = f"vllm_compile_ext.{blake3(data).hexdigest()}.kernel"
    if name not in sys.modules:
        # The object asks for the address of torch's accessor when it is initialized.
        os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(
            torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr
        )
        with _file(data) as path:
            spec = importlib.util.spec_from_loader(name, importlib.machinery.ExtensionFileLoader(name, path))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].kernel


_files = 0


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[str]:
    """Path of a file in memory that holds `data`.  No two are the same path: the loader tells libraries by it."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(data)
            file.flush()
            yield file.name
        return
    global _files
    _files += 1
    # "/." and "/" in the middle of a path change nothing but its text.
    unique = "".join("/." if bit == "1" else "/" for bit in f"{_files:b}")
    descriptor = os.memfd_create("vllm_compile_ext")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd{unique}/{descriptor}"
    finally:
        os.close(descriptor)


def _triton(call: generated.Kernel, kernel: Any) -> bytes:
    """A Triton kernel that Inductor launches without Triton: its launcher, pickled, and the binary of each config.

    Where tuning has chosen one of several configs, only that one is kept.
    """
    from torch._inductor.runtime.runtime_utils import triton_config_to_hashable
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    if not isinstance(kernel, CachingAutotuner) or not kernel.is_statically_launchable():
        raise NotFrozen(f"the Triton kernel {call.name} is not launched statically")
    results = kernel.compile_results
    if len(kernel.launchers) == 1:
        chosen = triton_config_to_hashable(kernel.launchers[0].config)
        results = [r for r in results if triton_config_to_hashable(r.config) == chosen] or results
    binaries = [_binary(result) for result in results]
    before = kernel.prepare_for_pickle()
    try:
        launcher = copy.copy(kernel)
        launcher.compile_results, launcher._reload_kernel = results, None
        if len(results) == 1:  # these name the folder of this process, where tuning would be noted
            launcher.filename, launcher.save_cache_hook = None, None
        return pickle.dumps((call.arguments, launcher, binaries))
    finally:
        kernel.restore_after_unpickle(before)


def _binary(result: Any) -> bytes:
    """What the driver loads for a `StaticTritonCompileResult`; Triton keeps it in a file of its cache."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key

    suffix = ".hsaco" if torch.version.hip else ".cubin"
    folder = Path(triton_cache_dir(result.compile_meta.get("device") or 0))
    path = folder / triton_hash_to_path_key(result.kernel.hash) / f"{result.kernel.name}{suffix}"
    try:
        binary: bytes = path.read_bytes()
    except OSError as error:
        raise NotFrozen(f"the binary of the Triton kernel {result.kernel.name} is gone ({error})") from None
    return binary


def _launcher(data: bytes) -> Any:
    """The launcher of `_triton`, with its binaries handed to the driver."""
    from torch._inductor import async_compile
    from torch._inductor.codecache import StaticAutotunerFuture

    arguments, launcher, binaries = pickle.loads(data)
    name, source = arguments[:2]

    def reload() -> Any:  # only tuning that runs after the load asks for the source
        return async_compile._load_triton_kernel_from_source(name, source)

    with contextlib.ExitStack() as files:
        for result, binary in zip(launcher.compile_results, binaries, strict=True):
            result.kernel.cubin_path = files.enter_context(_file(binary))
        if len(binaries) == 1:
            # Tuned already, or nothing to tune: upstream's `precompile` might choose and compile anew.
            launcher._reload_kernel = reload
            launcher._make_launchers()
            return launcher
        future = StaticAutotunerFuture(launcher)
        future.reload_kernel_from_src = reload
        return future.result()
