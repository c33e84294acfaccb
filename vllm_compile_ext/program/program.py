"""A compiled model as an entry of the store: Dynamo's bytecode, the plan and the distinct pieces.

Loading it is looking up and mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from vllm_compile_ext.key.seen import NotDescribed
from vllm_compile_ext.program import pieces, transformed
from vllm_compile_ext.program.plan_function import PlanFunction
from vllm_compile_ext.record.spans import span
from vllm_compile_ext.store.store import Blob, Manifest, Store
from vllm_compile_ext.trace import plan as plans


class Head(msgspec.Struct, frozen=True):
    """What of a program is neither code nor plan.

    prefix, is_encoder: of upstream's backend.  symbols: for each distinct piece, which of its inputs are symbols.
    """

    prefix: str
    is_encoder: bool
    symbols: list[list[int]]


class _Piece(msgspec.Struct, frozen=True):
    """See `pieces.Frozen`."""

    source: str
    record: bytes
    kernels: list[tuple[str, Blob]]


def put_piece(store: Store, piece: Any, own: Sequence[Any]) -> dict[str, dict[str, Blob]]:
    """Keep one compiled piece (upstream's `PiecewiseBackend`, and the constants it holds): compile range -> "code" and
    its kernels.

    Raises `OSError`, and `pieces.NotFrozen`.
    """
    entries = piece.range_entries.items()
    return {str(shape): put_artifact(store, entry.runnable, own) for shape, entry in entries}


def put_artifact(store: Store, artifact: Any, own: Sequence[Any] = ()) -> dict[str, Blob]:
    """Keep what Inductor compiled (see `pieces.freeze`): "code" and its kernels.  Raises as `put_piece`."""
    frozen = pieces.freeze(artifact, own)
    kernels = [(kind, store.put(data)) for kind, data in frozen.kernels]
    code = store.put(msgspec.msgpack.encode(_Piece(frozen.source, frozen.record, kernels)))
    return {"code": code} | {f"kernel/{blob.digest}": blob for _, blob in kernels}


def get_piece(store: Store, code: Blob) -> Callable[..., Any]:
    """The piece of which "code" is `code`.  Raises `DamagedError` where a blob is not what was written."""
    with span("read and verify"):
        piece = msgspec.msgpack.decode(store.get(code), type=_Piece)
        kernels = [(kind, store.get(blob)) for kind, blob in piece.kernels]
    with span("map", kernels=len(kernels)):
        return pieces.thaw(pieces.Frozen(piece.source, piece.record, kernels))


def is_ours(compiled: Any) -> bool:
    """Whether a compiled model (`torch._dynamo.aot_compile.AOTCompiledFunction`) was traced once, on the plugin's path.

    What upstream's path compiled is upstream's to keep.
    """
    return isinstance(compiled._artifacts.compiled_fn, PlanFunction)


def keep(store: Store, compiled: Any) -> dict[str, Blob]:
    """Keep a compiled model that `is_ours`; returns the members of its entry.

    Raises `OSError`, and `transformed.NotSaved` where the bytecode or a piece has no bytes.
    """
    artifacts = compiled._artifacts
    function = artifacts.compiled_fn
    if isinstance(function.seen, NotDescribed):
        raise transformed.NotSaved(f"its trace has read {function.seen}")
    code = transformed.dumps(transformed.capture(artifacts.runtime_env, artifacts.backend_id))
    head = Head(function.prefix, function.is_encoder, [piece.sym_shape_indices for piece in function.pieces])
    members: dict[str, Blob] = {}
    for number, piece in enumerate(function.pieces):
        try:
            kept = function.kept.get(number) or put_piece(store, piece, function.constants[number])
        except pieces.NotFrozen as why:
            raise transformed.NotSaved(f"piece {number} of {len(function.pieces)}: {why}") from None
        for shape, parts in kept.items():
            members |= {name if name != "code" else f"piece/{number}/{shape}": blob for name, blob in parts.items()}
    members["bytecode"] = store.put(code)
    members["seen"] = store.put(msgspec.msgpack.encode(function.seen))
    members["plan"] = store.put(plans.dumps(function.plan))
    members["head"] = store.put(msgspec.json.encode(head))
    return members


def load(store: Store, manifest: Manifest, model: Any) -> tuple[Callable[..., Any], Any]:
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
    return code.function(function, getattr(model.forward, "__func__", model.forward)), code.code
