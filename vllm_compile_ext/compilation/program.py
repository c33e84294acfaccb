"""A compiled model as an entry of the store, in one of two forms.

"native": Dynamo's bytecode, the plan and the distinct pieces.  Loading it is looking up and mapping.
"upstream": the artifact that upstream's decorator pickles, and the files of Inductor that it runs; for models that
upstream's path compiled.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_compile_ext.artifacts.files import DamagedError
from vllm_compile_ext.artifacts.manifest import Blob, Manifest
from vllm_compile_ext.artifacts.store import Store
from vllm_compile_ext.bytecode import transformed
from vllm_compile_ext.compilation import inductor_files, pieces, scratch
from vllm_compile_ext.compilation.plan_function import PlanFunction
from vllm_compile_ext.startup.spans import span
from vllm_compile_ext.trace import plan as plans

logger = logging.getLogger(__name__)

NATIVE, UPSTREAM = "native", "upstream"


class Head(msgspec.Struct, frozen=True):
    """What of a native program is neither code nor plan.

    prefix, is_encoder: of upstream's backend.  symbols: for each distinct piece, which of its inputs are symbols.
    """

    prefix: str
    is_encoder: bool
    symbols: list[list[int]]


class _Piece(msgspec.Struct, frozen=True):
    """See `pieces.Frozen`.  A piece that could not be frozen has no source, its record is upstream's pickle, and the
    kinds of its kernels are the names of files that it needs in Inductor's folder.
    """

    source: str
    record: bytes
    kernels: list[tuple[str, Blob]]


def put_piece(store: Store, piece: Any, own: Sequence[Any]) -> dict[str, dict[str, Blob]]:
    """Keep one compiled piece (upstream's `PiecewiseBackend`, and the constants it holds): compile range -> "code" and
    its kernels.

    Raises `OSError`.
    """
    entries = piece.range_entries.items()
    return {str(shape): _put(store, piece, str(shape), entry.runnable, own) for shape, entry in entries}


def _put(store: Store, piece: Any, shape: str, artifact: Any, own: Sequence[Any]) -> dict[str, Blob]:
    try:
        frozen = pieces.freeze(artifact, own)
    except pieces.NotFrozen as why:
        logger.info("a piece is kept in upstream's form: %s", why)
        root = scratch.inductor()
        files = [(str(path.relative_to(root)), path.read_bytes()) for path in inductor_files.loaded(root)]
        frozen = pieces.Frozen("", pickle.dumps((piece.to_bytes()[shape], list(own))), files)
    kernels = [(kind, store.put(data)) for kind, data in frozen.kernels]
    code = store.put(msgspec.msgpack.encode(_Piece(frozen.source, frozen.record, kernels)))
    return {"code": code} | {f"kernel/{blob.digest}": blob for _, blob in kernels}


def get_piece(store: Store, code: Blob) -> Callable[..., Any]:
    """The piece of which "code" is `code`.  Raises `DamagedError` where a blob is not what was written."""
    with span("read and verify"):
        piece = msgspec.msgpack.decode(store.get(code), type=_Piece)
        kernels = [(kind, store.get(blob)) for kind, blob in piece.kernels]
    if piece.source:
        with span("map", kernels=len(kernels)):
            return pieces.thaw(pieces.Frozen(piece.source, piece.record, kernels))
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    _into_scratch(kernels)
    data, own = pickle.loads(piece.record)
    loaded = AOTCompiledArtifact.deserialize(pickle.loads(data))
    return lambda *inputs: loaded(*own, *inputs)


def _into_scratch(files: Iterable[tuple[str, bytes]]) -> None:
    """Write files that were found in Inductor's folder into the one of this process, and point Inductor there."""
    root = scratch.inductor()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root)
    for name, data in files:
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise DamagedError(path, "is outside of the folder of this process")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def keep(store: Store, compiled: Any) -> tuple[str, dict[str, Blob]]:
    """Keep a compiled model (`torch._dynamo.aot_compile.AOTCompiledFunction`): the form, and the members.

    Raises `OSError`, and `transformed.NotSaved` where the bytecode has no bytes.
    """
    if isinstance(compiled._artifacts.compiled_fn, PlanFunction):
        return NATIVE, _native(store, compiled)
    members = {"aot": store.put(type(compiled).serialize(compiled).serialized_data)}
    root = scratch.inductor()
    for path in inductor_files.loaded(root):
        members[f"inductor/{path.relative_to(root)}"] = store.put(path.read_bytes())
    return UPSTREAM, members


def _native(store: Store, compiled: Any) -> dict[str, Blob]:
    artifacts = compiled._artifacts
    function = artifacts.compiled_fn
    code = transformed.dumps(transformed.capture(artifacts.runtime_env, artifacts.backend_id))
    head = Head(function.prefix, function.is_encoder, [piece.sym_shape_indices for piece in function.pieces])
    members: dict[str, Blob] = {}
    for number, piece in enumerate(function.pieces):
        for shape, parts in (function.kept.get(number) or put_piece(store, piece, function.constants[number])).items():
            members |= {name if name != "code" else f"piece/{number}/{shape}": blob for name, blob in parts.items()}
    members["bytecode"] = store.put(code)
    members["plan"] = store.put(plans.dumps(function.plan))
    members["head"] = store.put(msgspec.json.encode(head))
    return members


def load_native(store: Store, manifest: Manifest, model: Any) -> tuple[Callable[..., Any], Any]:
    """The function that stands for `model.forward`, called with the model first, and its bytecode.

    Raises `DamagedError` where a blob is not what was written.
    """
    members = manifest.members
    with span("read bytecode and plan"):
        code = transformed.loads(store.get(members["bytecode"]))
        plan = plans.loads(store.get(members["plan"]))
        head = msgspec.json.decode(store.get(members["head"]), type=Head)
    runnables: list[dict[str, Any]] = [{} for _ in head.symbols]
    for name, blob in members.items():
        kind, _, rest = name.partition("/")
        if kind == "piece":
            number, _, shape = rest.partition("/")
            with span(f"load piece {number}", range=shape):
                runnables[int(number)][shape] = get_piece(store, blob)
    with span("bind"):
        function = PlanFunction.of(plan, head.symbols, runnables, model.vllm_config, head.prefix, head.is_encoder)
        function.bind(model)
    return code.function(function, model.forward.__globals__), code.code


def unpack_upstream(store: Store, manifest: Manifest) -> Path:
    """Write the artifact and Inductor's files into the scratch folder and return the artifact's path there.

    Raises `DamagedError`, `OSError`.
    """
    members = [(name.partition("/"), blob) for name, blob in manifest.members.items()]
    _into_scratch((rest, store.get(blob)) for (kind, _, rest), blob in members if kind == "inductor")
    path = scratch.folder() / "aot"
    path.write_bytes(store.get(manifest.members["aot"]))
    return path
