"""A cold compilation: each kind of layer traced once, each distinct piece of the graph compiled once.

`trace_once` has Dynamo trace the model, and Dynamo hands the graph to `compile_graph`, through upstream's backend.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.fx as fx
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from vllm.compilation import monitor
from vllm.compilation.compiler_interface import is_compile_cache_enabled
from vllm.compilation.counter import compilation_counter
from vllm.compilation.partition_rules import should_split

from vllm_compile_ext import harmless, temporary
from vllm_compile_ext.compilation import rules
from vllm_compile_ext.harmless import plain
from vllm_compile_ext.inductor import workers
from vllm_compile_ext.inductor.pieces import DistinctPieces, deduplicate
from vllm_compile_ext.key.seen import NotDescribed, Seen, collect
from vllm_compile_ext.program.program import Program
from vllm_compile_ext.record.events import event, span
from vllm_compile_ext.store.store import Store, key_of
from vllm_compile_ext.trace import plan as plans
from vllm_compile_ext.trace.split import decompose_sizes, extract, split
from vllm_compile_ext.trace.stitch import difference, stitch
from vllm_compile_ext.trace.tracer import Tracer

logger = logging.getLogger(__name__)

LEAST_LAYERS = 3  # of one class in a list: fewer are traced
INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


class Differs(Exception):  # noqa: N818 - an answer, not an error
    """A copy of a layer is not what tracing that layer gives; the message says where."""


@dataclass
class Session:
    """One compilation of a model.

    store: where pieces are kept, None for nowhere.  facts: what events about the model are noted with; with a store its
    key is among them.  arguments: of its first call.  copies: whether layers may be copied.
    compiling: the graph is understood and pieces are being compiled.  An error before this point means that the model
    is traced again as upstream does it; an error after it is the user's to see.
    """

    model: Any
    store: Store | None
    facts: Mapping[str, Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    copies: bool
    compiling: bool = False

    def __post_init__(self) -> None:
        self.tracer = self._tracer()

    def _tracer(self, skip: Collection[int] = ()) -> Tracer:
        tables = [self.model.vllm_config.compilation_config.static_forward_context]
        try:  # turns a layer's name into the key of such a table (vLLM 0.32.0)
            from vllm.model_executor.layers.fused_moe.runner.moe_runner import _resolve_layer_name

            lookups: list[Callable[..., Any]] = [_resolve_layer_name]
        except ImportError:
            lookups = []
        return Tracer(self.model, LEAST_LAYERS if self.copies else sys.maxsize, lookups, tables, skip)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Trace with the tracer, as the `current` session."""
        token = current.set(self)
        try:
            with self.tracer.install():
                yield
        finally:
            current.reset(token)

    def check_copies(self, graph: fx.Graph, values: Sequence[Any]) -> None:
        """Trace the model once more, with the last copy of each kind of layer traced instead of copied, and compare.

        values: of the placeholders of `graph`, which was stitched and has its sizes decomposed.  A net under the proof
        of `trace/`: raises `Differs`.
        """
        skip = set(self.tracer.last_copies.values())
        if not skip:
            return
        args, kwargs = self.arguments
        # As `torch._dynamo.aot_compile` captures (torch 2.13).
        with get_metrics_context(), torch_function_mode_stack_state_mgr, self._tracer(skip).install():
            captured = fullgraph_capture(self.model.forward, args, kwargs).backend_input
        again, inputs = captured.graph_module.graph, list(captured.example_inputs)
        inputs += [extra.value for extra in stitch(again, inputs)]
        decompose_sizes(again)
        if (where := difference(again, inputs, graph, values)) is not None:
            raise Differs(where)


# The session of the compilation that runs in this context; None for upstream's path.
current: ContextVar[Session | None] = ContextVar("vllm_compile_ext_session", default=None)


def trace_once(
    model: Any,
    store: Store | None,
    facts: Mapping[str, Any],
    stock: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any | None:
    """Compile `model` by `stock`, upstream's `aot_compile`, with identical layers traced once.

    None, after a line that says why, where upstream has to trace every layer.  store, facts: see `Session`.
    """
    tag = f"[{getattr(model, '_compile_tag', '')}] "
    if reason := rules.why_upstream(model.vllm_config):
        _say_upstream(tag, reason, facts)
        return None
    folder = os.environ.get(INDUCTOR_FOLDER)
    os.environ[INDUCTOR_FOLDER] = str(temporary.scratch() / "inductor")
    for copies in (True, False):
        session = Session(model, store, facts, (args, kwargs), copies)
        try:
            with session.active(), span("trace" if copies else "trace every layer"):
                return stock(*args, **kwargs)
        except Differs as where:
            line = f"{tag}every layer is traced: a copied one is not what tracing gives, {where}"
            event("refuted", line, why=f"every layer is traced: {where}", **facts)
        except Exception as error:
            if session.compiling:
                raise
            # Whatever it is, tracing as stock does it either works or gives the error that stock gives.
            logger.debug("%strace once gave up", tag, exc_info=True)
            _say_upstream(tag, plain(harmless.error(error).partition("\n")[0]), facts)
            break
    if folder is not None:  # upstream's: what it keeps names files there
        os.environ[INDUCTOR_FOLDER] = folder
    return None


def _say_upstream(tag: str, why: str, facts: Mapping[str, Any]) -> None:
    line = f"{tag}every layer is traced, as in stock vLLM: {why}"
    event("fallback", line, level=logging.INFO, why=f"every layer is traced: {why}", **facts)


def compile_graph(backend: Any, graph: fx.GraphModule, inputs: Sequence[Any], session: Session) -> Program:
    """Stitch, split, fingerprint, compile the distinct pieces and plan.

    Up to the first piece that is compiled nothing of `backend` changes, so that the model can be traced again as
    upstream does it when the graph is not understood (`Session.compiling`).
    """
    dynamo = time.perf_counter() - float(monitor.torch_compile_start_time)
    started = time.perf_counter()
    with span("split") as splitting:
        extras = stitch(graph.graph, inputs)
        decompose_sizes(graph.graph)
        operators = backend.compilation_config.splitting_ops or []
        pieces = split(graph.graph, lambda node: should_split(node, operators))
        splitting["pieces"] = len(pieces)
    with span("describe what was read"):  # before anything of the model runs and changes it
        seen: Seen | NotDescribed
        try:
            seen = collect(session.model, session.tracer, graph.graph)
        except NotDescribed as why:
            seen = why
    with span("fingerprint"):
        numbers, distinct, fingerprints = deduplicate(pieces, graph)
    with span("plan"):
        modules = [extract(piece, graph) for piece in distinct]
        plan = plans.write(graph.graph, pieces, numbers, extras)
    session.compiling = True

    tag = f"[{backend.prefix}] " if backend.prefix else ""
    logger.info("%sDynamo bytecode transform time: %.2f s", tag, dynamo)
    _say_traced(session.tracer, tag, f"{len(plan.calls)} pieces to compile, {len(distinct)} of them distinct", started)
    compilation_counter.num_graphs_seen += 1
    compilation_counter.num_piecewise_graphs_seen += len(pieces)
    compilation_counter.num_piecewise_capturable_graphs_seen += len(plan.calls)
    started = time.perf_counter()

    def check_copies() -> None:
        with span("prove"):
            session.check_copies(graph.graph, [*inputs, *(extra.value for extra in extras)])

    _prepare(backend, plan, modules)
    shared = DistinctPieces(backend, modules, session.store, _keys(session, seen, fingerprints), session.facts)
    try:
        compiled = shared.compile(check_copies)
    except Differs:
        # The next compilation must find the backend as it was made.
        backend.__init__(backend.vllm_config, backend.prefix, backend.is_encoder)
        raise
    backend._called = True
    program = Program(plan, compiled, backend.vllm_config, backend.prefix, backend.is_encoder)
    program.seen, program.kept, program.constants = seen, shared.kept, shared.constants
    program.bind(session.model)

    here, seconds = len(distinct) - shared.loaded, time.perf_counter() - started
    count = workers.wanted(backend.vllm_config)
    event(
        "compiled",
        f"{tag}compiled {here} pieces with {count} workers, loaded {shared.loaded} that another process "
        f"compiled ({seconds:.2f} s)",
        pieces=len(plan.calls),
        distinct=len(distinct),
        compiled=here,
        loaded=shared.loaded,
        loaded_bytes=shared.loaded_bytes,
        traced=session.tracer.traced,
        copied=session.tracer.stamped,
        dynamo=round(dynamo, 3),
        seconds=round(seconds, 3),
        **session.facts,
    )
    return program


def _keys(session: Session, seen: Seen | NotDescribed, fingerprints: Sequence[str | None]) -> list[str | None]:
    """The key of each distinct piece; None for one that is shared with nobody.

    What operators do by Python (`Seen.called`) is in it; nothing is shared where that is not known.
    """
    if session.store is None or isinstance(seen, NotDescribed) or not seen.called:
        return [None] * len(fingerprints)
    facts = {"program": session.facts["key"], "called": seen.called}
    return [key_of(facts | {"piece": found}) if found else None for found in fingerprints]


def _say_traced(tracer: Tracer, tag: str, pieces: str, started: float) -> None:
    took = time.perf_counter() - started
    logger.info("%straced %d layers and copied %d; %s (%.2f s)", tag, tracer.traced, tracer.stamped, pieces, took)
    reasons = list(dict.fromkeys(tracer.reasons))
    if reasons and not tracer.stamped:
        logger.info("%severy layer is traced, as in stock vLLM: %s", tag, reasons[0])
    for reason in reasons:
        logger.debug("%snot copied: %s", tag, reason)


def _prepare(backend: Any, plan: plans.Plan, modules: Sequence[fx.GraphModule]) -> None:
    """Make `backend` ready to compile pieces, and write the graph for people.

    Its folder is below the model's cache folder: the user's `cache_dir`, or else the one that upstream's decorator
    keeps the model's artifact in (vLLM 0.32.0, `compilation/decorators.py`).
    """
    config, parallel = backend.compilation_config, backend.vllm_config.parallel_config
    folder = Path(config.cache_dir or config.local_cache_dir)
    folder = folder / f"rank_{parallel.rank}_{parallel.data_parallel_index}" / backend.prefix
    folder.mkdir(parents=True, exist_ok=True)
    config.local_cache_dir = str(folder)
    config.traced_files.clear()
    disabled = not is_compile_cache_enabled(backend.inductor_config)
    backend.configure_post_pass()
    backend.compiler_manager.initialize_cache(str(folder), disabled, backend.prefix)
    # An index that upstream's path left in the user's `cache_dir` numbers other pieces.
    backend.compiler_manager.cache.clear()
    parts = [f"# what calls the pieces: c0, c1, ... are the call sites of the pieces {plan.calls}\n{plan.source}"]
    parts += [f"# piece {n}\n{module.print_readable(print_output=False)}" for n, module in enumerate(modules)]
    try:  # upstream keeps its graph under the same name
        (folder / "computation_graph.py").write_text("\n\n".join(parts))
    except OSError as error:
        logger.warning("cannot write the graph to %s: %s", folder, error)
