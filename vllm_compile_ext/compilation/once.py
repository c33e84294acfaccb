"""From Dynamo's graph of a model that was traced once to the compiled model."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.compilation.compiler_interface import is_compile_cache_enabled
from vllm.compilation.counter import compilation_counter
from vllm.compilation.partition_rules import should_split
from vllm.compilation.piecewise_backend import PiecewiseBackend

from vllm_compile_ext.compilation.progress import Progress
from vllm_compile_ext.compilation.session import Differs, Session
from vllm_compile_ext.compilation.sharing import Shared
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.key.seen import NotDescribed, Seen, collect
from vllm_compile_ext.program.pieces import constants as constants_of
from vllm_compile_ext.program.plan_function import PlanFunction, loaded_piece
from vllm_compile_ext.record import metrics
from vllm_compile_ext.record.spans import note, span
from vllm_compile_ext.trace import plan as plans
from vllm_compile_ext.trace.fingerprint import Unfingerprintable, fingerprint
from vllm_compile_ext.trace.split import Piece, decompose_sizes, extract, split
from vllm_compile_ext.trace.stitch import stitch

logger = logging.getLogger(__name__)


def compile_model(backend: Any, graph: torch.fx.GraphModule, inputs: Sequence[Any], session: Session) -> PlanFunction:
    """Stitch, split, fingerprint, compile the distinct pieces and plan.

    Up to the first piece that is compiled nothing of `backend` changes, so that the model can be traced again as
    upstream does it when the graph is not understood (`Session.compiling`).
    """
    tag = f"[{backend.prefix}] " if backend.prefix else ""
    config = backend.compilation_config
    dynamo = _seconds_since_start()
    started = time.perf_counter()
    with span("split") as splitting:
        extras = stitch(graph.graph, inputs)
        decompose_sizes(graph.graph)
        operators = config.splitting_ops or []
        pieces = split(graph.graph, lambda node: should_split(node, operators))
        splitting.set(pieces=len(pieces))
    with span("describe what was read"):
        seen = _describe(session, graph.graph)
    with span("fingerprint"):
        numbers, firsts, fingerprints = deduplicate(pieces, graph)
    with span("plan"):
        modules = [extract(piece, graph) for piece in firsts]
        plan = plans.write(graph.graph, pieces, numbers, extras)
    session.compiling = True

    tracer = session.tracer
    compilation_counter.num_graphs_seen += 1
    compilation_counter.num_piecewise_graphs_seen += len(pieces)
    compilation_counter.num_piecewise_capturable_graphs_seen += len(plan.calls)
    logger.info("%sDynamo bytecode transform time: %.2f s", tag, dynamo)
    logger.info(
        "%straced %d layers and copied %d; %d pieces to compile, %d of them distinct (%.2f s)",
        tag,
        tracer.traced,
        tracer.stamped,
        len(plan.calls),
        len(firsts),
        time.perf_counter() - started,
    )
    reasons = list(dict.fromkeys(tracer.reasons))
    if reasons and not tracer.stamped:
        logger.info("%severy layer is traced, as in stock vLLM: %s", tag, reasons[0])
    for reason in reasons:
        logger.debug("%snot copied: %s", tag, reason)

    folder = _folder(backend)
    config.traced_files.clear()
    disabled = not is_compile_cache_enabled(backend.inductor_config)
    backend.configure_post_pass()
    backend.compiler_manager.initialize_cache(str(folder), disabled, backend.prefix)
    # An index that upstream's path left in the user's `cache_dir` numbers other pieces.
    backend.compiler_manager.cache.clear()
    _write_graph(folder, plan, modules)
    shared = Shared(session.entry, fingerprints, None if isinstance(seen, NotDescribed) else seen.called)
    constants = [constants_of(module) for module in modules]  # before Inductor gets the modules
    values = [*inputs, *(extra.value for extra in extras)]
    prove = functools.partial(_prove, session, graph.graph, values)
    try:
        compiled = _compile(backend, modules, constants, shared, len(plan.calls), tag, prove)
    except Differs:
        # The next compilation must find the backend as it was made.
        backend.__init__(backend.vllm_config, backend.prefix, backend.is_encoder)
        raise
    backend._called = True
    function = PlanFunction(plan, compiled, backend.vllm_config, backend.prefix, backend.is_encoder)
    function.kept, function.constants, function.seen = shared.kept, constants, seen
    function.bind(session.model)
    note(
        "compiled",
        model=session.entry.model if session.entry is not None else type(session.model).__qualname__,
        pieces=len(plan.calls),
        distinct=len(firsts),
        loaded=shared.loaded,
        traced=tracer.traced,
        copied=tracer.stamped,
        dynamo=round(dynamo, 3),
    )
    return function


def deduplicate(
    pieces: Sequence[Piece], graph: torch.fx.GraphModule
) -> tuple[list[int | None], list[Piece], list[str | None]]:
    """Number of the distinct piece that each piece is, None for splitting operators; the distinct pieces; and their
    fingerprints.

    A piece that holds something whose identity cannot be told is distinct from all others and has no fingerprint.
    """
    known: dict[str, int] = {}
    numbers: list[int | None] = []
    firsts: list[Piece] = []
    fingerprints: list[str | None] = []
    for piece in pieces:
        if piece.splitting:
            numbers.append(None)
            continue
        key = None
        try:
            key = fingerprint(piece, graph)
        except Unfingerprintable as why:
            logger.debug("piece %d is compiled on its own: %s", len(numbers), why)
        if key is None or key not in known:
            if key is not None:
                known[key] = len(firsts)
            numbers.append(len(firsts))
            firsts.append(piece)
            fingerprints.append(key)
        else:
            numbers.append(known[key])
    return numbers, firsts, fingerprints


def _compile(
    backend: Any,
    modules: Sequence[torch.fx.GraphModule],
    constants: Sequence[list[Any]],
    shared: Shared,
    sites: int,
    tag: str,
    prove: Callable[[], None],
) -> list[PiecewiseBackend]:
    """The distinct pieces, loaded where another process has compiled them.  `prove` runs while compilers do."""
    count = workers.wanted()
    started = time.perf_counter()
    made: dict[int, PiecewiseBackend] = {}
    with Progress(f"{tag}compiling", len(modules), sites) as progress, workers.compiling(count) as kernels:
        mine: list[int] = []
        proofs = [prove]

        def finish() -> None:
            while proofs:
                progress.phase("comparing copies with traces")
                proofs.pop()()
            progress.phase("waiting for kernels")
            with span("wait for kernels"):
                kernels.wait()
            for number in mine:
                with span(f"keep piece {number}"):
                    shared.keep(number, made[number], constants[number])
            mine.clear()
            shared.release()

        try:
            for wait in (False, True):
                for number, module in enumerate(modules):
                    if number in made:
                        continue
                    piece = _loaded(backend, number, module, len(modules), shared)
                    if piece is None and _claim(shared, number, wait=wait):
                        # Whoever had it may have been done with it just before.
                        piece = _loaded(backend, number, module, len(modules), shared)
                        if piece is None:
                            piece = _lowered(backend, number, module, len(modules))
                            mine.append(number)
                    if piece is not None:
                        made[number] = piece
                        progress.advance()
                    if wait:  # nothing is held while waiting for the next one
                        finish()
                finish()
        finally:
            shared.release()
    metrics.inc("pieces_compiled_total", len(modules) - shared.loaded)
    logger.info(
        "%scompiled %d pieces with %d workers, loaded %d that another process compiled (%.2f s)",
        tag,
        len(modules) - shared.loaded,
        count,
        shared.loaded,
        time.perf_counter() - started,
    )
    return [made[number] for number in range(len(modules))]


def _describe(session: Session, graph: torch.fx.Graph) -> Seen | NotDescribed:
    """What the trace has read, before anything of the model runs and changes it."""
    try:
        return collect(session.model, session.tracer, graph)
    except NotDescribed as why:
        return why


def _prove(session: Session, graph: torch.fx.Graph, values: Sequence[Any]) -> None:
    with span("prove"):
        session.prove(graph, values)


def _claim(shared: Shared, number: int, *, wait: bool) -> bool:
    if not wait:
        return shared.claim(number, wait=False)
    with span("wait for another rank", wait=True):
        return shared.claim(number, wait=True)


def _symbols(module: torch.fx.GraphModule) -> list[int]:
    """Which inputs of a piece are symbols."""
    inputs = module.graph.find_nodes(op="placeholder")
    return [i for i, node in enumerate(inputs) if isinstance(node.meta["example_value"], torch.SymInt)]


def _loaded(
    backend: Any, number: int, module: torch.fx.GraphModule, count: int, shared: Shared
) -> PiecewiseBackend | None:
    found = shared.load(number)
    return None if found is None else loaded_piece(backend, number, count, _symbols(module), found)


def _lowered(backend: Any, number: int, module: torch.fx.GraphModule, count: int) -> PiecewiseBackend:
    """Inductor's work, but for the kernels that compile in the background."""
    symbols = _symbols(module)
    config = backend.vllm_config
    with span(f"piece {number}"):
        return PiecewiseBackend(module, config, number, count, symbols, backend, True, submod_name=f"piece_{number}")


def _write_graph(folder: Path, plan: plans.Plan, modules: Sequence[torch.fx.GraphModule]) -> None:
    """The plan and the distinct pieces as Python text, for people; upstream keeps its graph under the same name."""
    parts = [f"# what calls the pieces: f0, f1, ... are the call sites of the pieces {plan.calls}\n{plan.source}"]
    parts += [f"# piece {n}\n{module.print_readable(print_output=False)}" for n, module in enumerate(modules)]
    try:
        (folder / "computation_graph.py").write_text("\n\n".join(parts))
    except OSError as error:
        logger.warning("cannot write the graph to %s: %s", folder, error)


def _folder(backend: Any) -> Path:
    """The folder of this model, rank and prefix below the model's cache folder; made when it does not exist.

    The model's cache folder is the user's `cache_dir`, or else the one that upstream's decorator keeps the model's
    artifact in (vLLM 0.32.0, `compilation/decorators.py`).
    """
    config = backend.compilation_config
    parallel = backend.vllm_config.parallel_config
    folder: Path = Path(config.cache_dir or config.local_cache_dir)
    folder = folder / f"rank_{parallel.rank}_{parallel.data_parallel_index}" / backend.prefix
    folder.mkdir(parents=True, exist_ok=True)
    config.local_cache_dir = str(folder)
    return folder


def _seconds_since_start() -> float:
    """Seconds since upstream's monitor started timing this compilation."""
    from vllm.compilation import monitor

    return time.perf_counter() - float(monitor.torch_compile_start_time)
