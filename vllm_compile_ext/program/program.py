"""A compiled model as an entry of the store: Dynamo's bytecode, the plan, what the trace read, the distinct pieces.

members = keep(store, compiled)                   # what `torch._dynamo.aot_compile` made, as blobs
commit(store, kind="program", members=members, ...)
function, bytecode = load(store, manifest, model)   # looks up and maps: nothing is traced or compiled
"""

from __future__ import annotations

import importlib
import marshal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import msgspec
from torch._dynamo.aot_compile import SerializableCallable
from vllm.compilation.piecewise_backend import PiecewiseBackend

from vllm_compile_ext.key.seen import NotDescribed, Seen
from vllm_compile_ext.program import NotKept
from vllm_compile_ext.program import piece as pieces
from vllm_compile_ext.record.events import span
from vllm_compile_ext.store.store import Blob, Manifest, Store
from vllm_compile_ext.trace import plan as plans
from vllm_compile_ext.upstream import backends as upstream

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


class Program(SerializableCallable):
    """What Dynamo's bytecode calls for a model that was traced once.

    plan: straight code over call sites.  pieces: one upstream `PiecewiseBackend` for each distinct piece, which picks
    the compile range by the number of tokens.  The tensors of copied layers are not passed by the bytecode: `bind`
    names the model that they are read from, at every call.
    """

    # Of a model that was compiled here, for `keep`: what the trace has read, or why that cannot be told; distinct piece
    # -> its members, of those that the store has; the constants that each distinct piece holds.
    seen: Seen | NotDescribed
    kept: Mapping[int, Mapping[str, Blob]]
    constants: Sequence[list[Any]]

    def __init__(self, plan: plans.Plan, pieces: list[Any], vllm_config: Any, prefix: str, is_encoder: bool) -> None:
        self.plan = plan
        self.pieces = pieces
        self.prefix = prefix
        self.is_encoder = is_encoder
        last = len(plan.calls) - 1
        # Each call site replays CUDA graphs of its own: its tensors have addresses of their own.
        sites = [
            upstream.wrap_with_cudagraph_if_needed(
                pieces[number], vllm_config, vllm_config.compilation_config, site == 0, site == last
            )
            for site, number in enumerate(plan.calls)
        ]
        self._run = plan.load(sites)
        self._gather: Callable[[], list[Any]] | None = None

    def bind(self, model: Any) -> None:
        """Read the tensors of copied layers from `model` from now on; replaced ones are seen (`Plan.gatherer`)."""
        self._gather = self.plan.gatherer(model)

    def __call__(self, *args: Any) -> Any:
        assert self._gather is not None, "bind() comes before the first call"
        return self._run(self._gather(), *args)

    @classmethod
    def serialize_compile_artifacts(cls, compiled_fn: Program) -> bytes:
        raise TypeError("`keep` does it")  # torch wants the method, and does not call it

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Program:
        raise TypeError("`load` does it")


class Header(msgspec.Struct, frozen=True):
    """prefix, is_encoder: of upstream's backend.  symbols: for each distinct piece, which inputs are symbolic sizes."""

    prefix: str
    is_encoder: bool
    symbols: list[list[int]]


def is_program(compiled: Any) -> bool:
    """Whether a compiled model (`torch._dynamo.aot_compile.AOTCompiledFunction`) was traced once."""
    return isinstance(compiled._artifacts.compiled_fn, Program)


def keep(store: Store, compiled: Any) -> dict[str, Blob]:
    """Keep a compiled model that `is_program`; returns the members of its entry.  Raises `OSError` and `NotKept`."""
    artifacts = compiled._artifacts
    program: Program = artifacts.compiled_fn
    if isinstance(program.seen, NotDescribed):
        raise NotKept(f"its trace has read {program.seen}")
    bytecode = Bytecode.capture(artifacts.runtime_env, artifacts.backend_id).dumps()
    header = Header(program.prefix, program.is_encoder, [piece.sym_shape_indices for piece in program.pieces])
    members: dict[str, Blob] = {}
    for number, piece in enumerate(program.pieces):
        try:
            kept = program.kept.get(number) or keep_piece(store, piece, program.constants[number])
        except NotKept as why:
            raise NotKept(f"piece {number} of {len(program.pieces)}: {why}") from None
        for name, blob in kept.items():
            kind, _, shape = name.partition("/")
            members[f"piece/{number}/{shape}" if kind == "code" else name] = blob
    return members | {
        "bytecode": store.put(bytecode),
        "seen": store.put(msgspec.msgpack.encode(program.seen)),
        "plan": store.put(plans.dumps(program.plan)),
        "head": store.put(msgspec.json.encode(header)),
    }


def load(store: Store, manifest: Manifest, model: Any) -> tuple[Callable[..., Any], Any]:
    """The function that stands for `model.forward`, called with the model first, and its bytecode.

    Raises `DamagedError` where a blob is not what was written.
    """
    from vllm.compilation.backends import VllmBackend

    members = manifest.members
    with span("read bytecode and plan"):
        bytecode = Bytecode.loads(store.get(members["bytecode"]))
        plan = plans.loads(store.get(members["plan"]))
        header = msgspec.json.decode(store.get(members["head"]), type=Header)
    runnables: list[dict[str, Any]] = [{} for _ in header.symbols]
    for name, blob in members.items():
        kind, _, rest = name.partition("/")
        if kind == "piece":
            number, _, shape = rest.partition("/")
            with span(f"load piece {number}", range=shape):
                runnables[int(number)][shape] = load_code(store, blob)
    with span("bind"):
        backend = VllmBackend(model.vllm_config, header.prefix, header.is_encoder)
        made = [
            loaded_piece(backend, number, len(runnables), header.symbols[number], found)
            for number, found in enumerate(runnables)
        ]
        program = Program(plan, made, model.vllm_config, header.prefix, header.is_encoder)
        program.bind(model)
    return bytecode.function(program, getattr(model.forward, "__func__", model.forward)), bytecode.code


def loaded_piece(
    backend: Any, number: int, count: int, symbols: list[int], runnables: Mapping[str, Callable[..., Any]]
) -> PiecewiseBackend:
    """Upstream's dispatch by number of tokens over a piece that is compiled: compile range -> callable."""
    return PiecewiseBackend(
        graph=None,
        vllm_config=backend.vllm_config,
        piecewise_compile_index=number,
        total_piecewise_compiles=count,
        sym_shape_indices=symbols,
        vllm_backend=backend,
        returns_tuple=True,
        compiled_runnables=dict(runnables),
    )


def keep_piece(store: Store, piece: PiecewiseBackend, constants: Sequence[Any]) -> dict[str, Blob]:
    """Keep one compiled piece: "code/<compile range>" for each range, and its kernels."""
    members: dict[str, Blob] = {}
    for shape, entry in piece.range_entries.items():
        members |= keep_code(store, entry.runnable, constants, f"code/{shape}")
    return members


def keep_code(store: Store, artifact: Any, constants: Sequence[Any], name: str) -> dict[str, Blob]:
    """Keep what Inductor compiled (see `piece.freeze`) under `name`, beside its kernels.

    Raises `OSError` and `NotKept`.
    """
    frozen = pieces.freeze(artifact, constants)
    kernels = [(kind, store.put(data)) for kind, data in frozen.kernels]
    code = store.put(msgspec.msgpack.encode((frozen.source, frozen.record, kernels)))
    return {name: code} | {f"kernel/{blob.digest}": blob for _, blob in kernels}


def load_code(store: Store, code: Blob) -> Callable[..., Any]:
    """The callable that `keep_code` kept.  Raises `DamagedError` where a blob is not what was written."""
    with span("read and verify"):
        source, record, blobs = msgspec.msgpack.decode(store.get(code), type=tuple[str, bytes, list[tuple[str, Blob]]])
        kernels = [(kind, store.get(blob)) for kind, blob in blobs]
    with span("map", kernels=len(kernels)):
        return pieces.thaw(pieces.Frozen(source, record, kernels))


# --- Dynamo's bytecode


@dataclass(frozen=True)
class Bytecode:
    """Dynamo's transformed bytecode of one function: the code object and everything it reaches by name.

    The bytecode calls a backend's compiled function, which it finds among its globals under `backend`.
    imports: global -> module to import.  named: global -> (module, qualified name) of a function or class.
    constants: global -> value.  defaults, kwdefaults: of the function's parameters; constants.
    needed: further globals, which the traced function has.
    """

    code: CodeType
    backend: str
    imports: dict[str, str]
    named: dict[str, tuple[str, str]]
    constants: dict[str, Any]
    defaults: tuple[Any, ...] | None
    kwdefaults: dict[str, Any] | None
    needed: tuple[str, ...]

    @classmethod
    def capture(cls, environment: Any, backend: str) -> Bytecode:
        """Take what `torch._dynamo.convert_frame.GraphRuntimeEnv` (torch 2.13.0) holds.  Raises `NotKept`."""
        names = _names(environment.bytecode)
        imports = {alias: name for alias, name in environment.import_sources.items() if alias in names}
        named, constants = {}, {}
        for alias, value in environment.used_globals.items():
            if isinstance(value, ModuleType):
                imports[alias] = value.__name__
            elif _is_constant(value):
                constants[alias] = value
            else:
                named[alias] = _name(alias, value)
        for value in (*(environment.argdefs or ()), *(environment.kwdefaults or {}).values()):
            if not _is_constant(value):
                raise NotKept(f"the default {value!r} of a parameter")
        defaults, needed = environment.argdefs, tuple(sorted(environment.external_refs))
        kwdefaults = environment.kwdefaults or None
        return cls(environment.bytecode, backend, imports, named, constants, defaults, kwdefaults, needed)

    def function(self, compiled: Callable[..., Any], traced: FunctionType) -> FunctionType:
        """The function, calling `compiled`, with the globals and the closure of the function that was traced.

        Raises `ImportError`, `AttributeError`, `LookupError` when something that the code names is not there.
        """
        space: dict[str, Any] = {alias: importlib.import_module(name) for alias, name in self.imports.items()}
        space |= {alias: _find(module, name) for alias, (module, name) in self.named.items()}
        space |= self.constants | traced.__globals__ | {self.backend: compiled}
        if missing := [name for name in self.needed if name not in space]:
            raise LookupError(f"the bytecode needs the globals {', '.join(missing)}")
        cells = dict(zip(traced.__code__.co_freevars, traced.__closure__ or (), strict=True))
        if missing := [name for name in self.code.co_freevars if name not in cells]:
            raise LookupError(f"the bytecode needs the closure over {', '.join(missing)}")
        closure = tuple(cells[name] for name in self.code.co_freevars)
        function = FunctionType(self.code, space, argdefs=self.defaults, closure=closure)
        function.__kwdefaults__ = self.kwdefaults
        return function

    def dumps(self) -> bytes:
        """As bytes, for the Python that runs now.  Raises `NotKept` when a constant of the code has no bytes."""
        try:
            return marshal.dumps((plans.PYTHON, *vars(self).values()))
        except ValueError as error:
            raise NotKept(f"a constant of the bytecode ({error})") from error

    @classmethod
    def loads(cls, data: bytes) -> Bytecode:
        """The inverse of `dumps`.  Raises `ValueError` for another Python's bytes; check a digest of `data` first."""
        python, *parts = marshal.loads(data)
        if python != plans.PYTHON:
            raise ValueError(f"bytecode of Python {python}, and this is {plans.PYTHON}")
        return cls(*parts)


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_constant, value))
    if type(value) is dict:
        return all(map(_is_constant, (*value, *value.values())))
    return type(value) in _CONSTANTS


def _name(alias: str, value: Any) -> tuple[str, str]:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    try:
        if module and name and _find(module, name) is value:
            return module, name
    except (ImportError, AttributeError):
        pass
    raise NotKept(f"the global {alias}, a {type(value).__name__} without a name")


def _find(module: str, name: str) -> Any:  # `pkgutil.resolve_name` refuses modules that are named by a digest
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
