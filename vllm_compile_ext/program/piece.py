"""One compiled piece as bytes: Inductor's module without its compilers, the kernels, and AOTAutograd's wrappers.

Inductor's module compiles its kernels when it is imported (`name = async_compile.triton(...)`), which asks compilers
for their versions and caches for their keys even when everything is compiled.  `freeze` takes those calls out and keeps
the kernels; `thaw` unpickles what AOTAutograd recorded of the inputs and outputs, runs what is left of the module with
the kernels in their places, and puts upstream's own runtime wrappers around it.  Nothing is traced, no graph is read,
no compiler is asked for anything (torch 2.13.0: `_functorch/_aot_autograd/aot_autograd_result.py`,
`_inductor/output_code.py`, `_inductor/codegen/wrapper.py`, `triton_bundler.py`).
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.machinery
import importlib.util
import itertools
import linecache
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from blake3 import blake3

from vllm_compile_ext.program import NotKept

CPP, TRITON = "cpp_pybinding", "triton"  # as `async_compile` calls them

_KERNELS = "_kernels_"
_FOR_PEOPLE = ("get_args", "benchmark_compiled_module")
_PLUMBING = ("async_compile = AsyncCompile()", "async_compile.wait(globals())", "del async_compile")


@dataclass(frozen=True)
class Frozen:
    """source: of the module, as `cut` leaves it.  record: pickled, what AOTAutograd and Inductor know of the piece, and
    its constants.  kernels: (`CPP` or `TRITON`, bytes), in the order in which the module names them.
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


def freeze(artifact: Any, held: Sequence[Any] = ()) -> Frozen:
    """A compiled `torch._inductor.standalone_compile.AOTCompiledArtifact`, with its `constants`, as bytes.

    Raises `NotKept` when the piece is not of the known shape.
    """
    from torch._functorch._aot_autograd.aot_autograd_result import BundledAOTAutogradResult
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.output_code import CompiledFxGraph

    inner = getattr(artifact, "inner_fn", None)
    entry = inner.compiled_fn.serialize() if inner is not None else None
    if not isinstance(entry, BundledAOTAutogradResult) or entry.compiled_bw is not None:
        raise NotKept(f"it is a {type(artifact).__name__} of a {type(entry).__name__}")
    graph = entry.compiled_fw.result
    if not isinstance(graph, CompiledFxGraph):
        raise NotKept(f"Inductor made a {type(graph).__name__}")
    if graph.torchbind_constants or graph.frozen_param_names or graph._wrap_compiled_regions:
        raise NotKept("it holds script objects, frozen parameters or regions")
    source, calls = cut(graph.source_code)
    module = next((m for m in PyCodeCache.modules if m.__name__.endswith(f".{graph.cache_key}")), None)
    if module is None:
        raise NotKept("its module is not loaded")
    freezers = {CPP: _shared_object, TRITON: _triton}
    kernels = [(call.kind, freezers[call.kind](call, getattr(module, call.name))) for call in calls]
    return Frozen(source, pickle.dumps((_without_texts(entry, graph), list(held))), kernels)


def thaw(frozen: Frozen) -> Callable[..., Any]:
    """The callable: the piece's inputs as arguments, a sequence of its outputs as result."""
    from torch._inductor.output_code import CompiledFxGraphConstants, maybe_realign_inputs

    entry, held = pickle.loads(frozen.record)
    graph = entry.compiled_fw.result
    kernels = [_map(data) if kind == CPP else _launcher(data) for kind, data in frozen.kernels]
    name = f"vllm_compile_ext.piece_{blake3(frozen.source.encode() + frozen.record).hexdigest()[:16]}"
    module = run(frozen.source, kernels, CompiledFxGraphConstants().unwrap(graph), name)
    graph.current_callable = module.call
    maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)
    call = graph.current_callable

    def boxed(inputs: list[Any]) -> Any:  # the wrappers set an attribute on it
        return call(inputs)

    compiled = entry._apply_runtime_wrappers(boxed, None, False, entry.sanitized_aot_config)
    return lambda *inputs: compiled([*held, *inputs])


def _without_texts(entry: Any, graph: Any) -> Any:
    """A copy of AOTAutograd's `entry` without what only logs and compilers read."""
    entry, forward, graph = copy.copy(entry), copy.copy(entry.compiled_fw), copy.copy(graph)
    entry.compiled_fw, forward.result = forward, graph
    for text in ("source_code", "runnable_graph_str", "inductor_post_grad_graph_str"):
        setattr(graph, text, "")
    for name in ("cache_linemap", "inductor_provenance_mapping_str", "inductor_provenance_stack_traces_str"):
        setattr(graph, name, None)
    graph._triton_bundle = None
    for name in ("aot_joint_graph_str", "aot_forward_graph_str", "aot_backward_graph_str", "guards_expr"):
        setattr(entry, name, None)
    return entry


# The module that Inductor generated.


@dataclass(frozen=True)
class KernelCall:
    """A call of a compiler that was taken out: the name it was assigned to, its kind, and its literal arguments."""

    name: str
    kind: str
    arguments: tuple[Any, ...]


def cut(source: str) -> tuple[str, list[KernelCall]]:
    """The module without the calls that compile kernels, and those calls in order.

    Raises `NotKept` where it is not of the known shape.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise NotKept(f"its module: {error}") from error
    lines = source.split("\n")  # as `ast` counts them
    calls: list[KernelCall] = []
    used = _names(tree)
    cuts = []
    for statement in tree.body:
        if (call := _kernel_call(statement)) is not None:
            cuts.append((statement, [f"{call.name} = {_KERNELS}[{len(calls)}]"]))
            calls.append(call)
        elif _is_unneeded(statement, used):
            cuts.append((statement, []))
    for statement, instead in reversed(cuts):
        lines[statement.lineno - 1 : statement.end_lineno] = instead
    text = "\n".join(lines).strip() + "\n"
    if unknown := _names(ast.parse(text)) & {"async_compile", "AsyncCompile"}:
        raise NotKept(f"{', '.join(sorted(unknown))} is used in an unknown way")
    return text, calls


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _is_unneeded(statement: ast.stmt, used: set[str]) -> bool:
    """Whether the module, which uses the names `used`, computes the same without a top-level statement."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        names = {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        return not names & used or names == {"AsyncCompile"}
    return (
        (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ast.FunctionDef) and statement.name in _FOR_PEOPLE)
        or (isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test))
        or ast.unparse(statement) in _PLUMBING
    )


def _kernel_call(statement: ast.stmt) -> KernelCall | None:
    """The call of a compiler that a top-level statement is; None for others."""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)):
        return None
    call, target = statement.value, statement.targets[0]
    function = ast.unparse(call.func)
    if not function.startswith("async_compile."):
        return None
    kind = function.removeprefix("async_compile.")
    if kind not in (CPP, TRITON) or len(statement.targets) != 1 or not isinstance(target, ast.Name):
        raise NotKept(f"a kernel of kind {kind}")
    try:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        return KernelCall(target.id, kind, tuple(map(ast.literal_eval, arguments)))
    except ValueError as error:
        raise NotKept(f"{target.id}: {error}") from error


def run(source: str, kernels: Sequence[Any], attributes: Mapping[str, Any], name: str) -> ModuleType:
    """Run `source`, as `cut` left it, with `kernels` in order; `attributes` (constants of the graph) are set on it.

    The module is registered in `sys.modules` under `name`, and its lines are shown in tracebacks.
    """
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    module.__dict__[_KERNELS] = kernels
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    module.__dict__.update(attributes)  # afterwards: the source has None in their places
    return module


# C++ kernels.


def _shared_object(call: KernelCall, kernel: Any) -> bytes:
    """The shared object that `kernel`, made by Inductor's `CppPythonBindingsCodeCache`, is in.

    Without debug information, which names the folder that it was compiled in: equal kernels are equal bytes then, and a
    third of the size.  Left as it is where there is no `strip`; it comes with g++.
    """
    file = getattr(getattr(kernel, "__self__", None), "__file__", None)
    if file is None:
        raise NotKept(f"the kernel {call.name} is in no shared object")
    path, strip = Path(file), shutil.which("strip")
    if strip is not None:
        out = path.with_suffix(".stripped")
        sections = ("--remove-section=.note.gnu.build-id", "--remove-section=.comment")
        if subprocess.run([strip, "--strip-all", *sections, "-o", out, path], capture_output=True).returncode == 0:
            return out.read_bytes()
    return path.read_bytes()


# By the shared object's digest.
_kernels: dict[str, Any] = {}


def _map(data: bytes) -> Any:
    """Map the shared object `data` and return its kernel.  No file is involved that could change or vanish later."""
    import torch

    name = f"vllm_compile_ext.{blake3(data).hexdigest()}.kernel"
    if name not in _kernels:
        # The object asks for the address of torch's accessor when it is initialized.
        accessor = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr
        os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(accessor)
        with _file_in_memory(data) as path:
            loader = importlib.machinery.ExtensionFileLoader(name, path)
            spec = importlib.util.spec_from_loader(name, loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        # Whoever reads the files of all modules would read what has that descriptor by then, and wait for a terminal.
        del module.__file__
        spec.origin = None
        _kernels[name] = module.kernel
    return _kernels[name]


_numbers = itertools.count(1)


@contextlib.contextmanager
def _file_in_memory(data: bytes) -> Iterator[str]:
    """Path of a file that holds `data`.  No two are the same path: the loader tells libraries by it."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(data)
            file.flush()
            yield file.name
        return
    # "/." and "/" in the middle of a path change nothing but its text.
    unique = "".join("/." if bit == "1" else "/" for bit in f"{next(_numbers):b}")
    descriptor = os.memfd_create("vllm_compile_ext")
    try:
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(data)
        yield f"/proc/self/fd{unique}/{descriptor}"
    finally:
        os.close(descriptor)


# Triton's kernels.


def _triton(call: KernelCall, kernel: Any) -> bytes:
    """A kernel that Inductor launches without Triton: its launcher, pickled, and the binary of each config.

    Where tuning has chosen one of several configs, only that one is kept.
    """
    from torch._inductor.runtime.runtime_utils import triton_config_to_hashable
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    if not isinstance(kernel, CachingAutotuner) or not kernel.is_statically_launchable():
        raise NotKept(f"the Triton kernel {call.name} is not launched statically")
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

    folder = Path(triton_cache_dir(result.compile_meta.get("device") or 0))
    suffix = ".hsaco" if torch.version.hip else ".cubin"
    path = folder / triton_hash_to_path_key(result.kernel.hash) / f"{result.kernel.name}{suffix}"
    try:
        binary: bytes = path.read_bytes()
    except OSError as error:
        raise NotKept(f"the binary of the Triton kernel {result.kernel.name} is gone ({error})") from None
    return binary


def _launcher(data: bytes) -> Any:
    """The launcher of `_triton`, with its binaries handed to the driver."""
    from torch._inductor import async_compile
    from torch._inductor.codecache import StaticAutotunerFuture

    (name, source, *_), launcher, binaries = pickle.loads(data)

    def reload() -> Any:  # only tuning that runs after the load asks for the source
        return async_compile._load_triton_kernel_from_source(name, source)

    with contextlib.ExitStack() as files:
        for result, binary in zip(launcher.compile_results, binaries, strict=True):
            result.kernel.cubin_path = files.enter_context(_file_in_memory(binary))
        if len(binaries) == 1:
            # Tuned already, or nothing to tune: upstream's `precompile` might choose and compile anew.
            launcher._reload_kernel = reload
            launcher._make_launchers()
            return launcher
        future = StaticAutotunerFuture(launcher)
        future.reload_kernel_from_src = reload
        return future.result()
