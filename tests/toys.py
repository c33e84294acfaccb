"""Toy models behind vLLM's decorator, compiled without an engine.  Imported by processes of `tests/process.py` only:
importing it loads the plugin.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.plugins import load_general_plugins

load_general_plugins()

from vllm.compilation.counter import compilation_counter  # noqa: E402
from vllm.compilation.decorators import support_torch_compile  # noqa: E402
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.config.logging import LoggingConfig  # noqa: E402
from vllm.logger import configure_logging  # noqa: E402
from vllm.sequence import IntermediateTensors  # noqa: E402

from tests import forks  # noqa: E402
from vllm_compile_ext.compilation import rules  # noqa: E402
from vllm_compile_ext.store.store import Store  # noqa: E402

configure_logging(LoggingConfig())
SIZE = 16
# Of `Ended.counts`: vLLM's counters of models loaded, pieces compiled, models kept.
COUNTS = ("num_aot_artifacts_loaded", "num_inductor_compiles", "num_aot_artifacts_saved")
torch.set_grad_enabled(False)


@torch.library.custom_op("toys::mix", mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    """Stands in for attention: tokens see each other, and graphs are split here."""
    return x + x.mean(0, keepdim=True)


@mix.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 2 * SIZE)
        self.down = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x if residual is None else x + residual
        y = torch.ops.toys.mix(torch.sin(residual))
        return self.down(nn.functional.silu(self.up(y))), residual


class Layers(nn.Module):
    """What the decorated models have in common."""

    kind: type[nn.Module] = Layer
    count = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.kind() for _ in range(self.count))

    def run(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x, residual = layer(x, residual)
        assert residual is not None
        return x, residual


class Sum(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        return x + residual


@support_torch_compile
class Plain(Sum):
    pass


# vLLM 0.33 keeps no compiled code of a class with this option, which 0.32 does not have.
OPTIONS = {"use_aot_compile": False} if "use_aot_compile" in inspect.signature(support_torch_compile).parameters else {}


@support_torch_compile(**OPTIONS)
class NotKeptByStock(Sum):
    _allow_aot_compile = False


@support_torch_compile
class Single(nn.Module):
    """One piece: the quickest to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.up(x)) + x


@support_torch_compile
class Head(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        return x * residual


@support_torch_compile
class Few(Sum):
    """`count` is set before it is built."""


class ConstantLayer(Layer):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = super().forward(x, residual)
        return x * torch.tensor([1.0, 2.0] * (SIZE // 2)), residual


@support_torch_compile
class Constant(Sum):
    """Its pieces hold a tensor."""

    kind = ConstantLayer


@support_torch_compile(is_encoder=True)
class Encoder(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        return x - residual


@support_torch_compile
class FirstStage(Layers):
    def forward(self, x: torch.Tensor) -> IntermediateTensors:
        x, residual = self.run(x, None)
        return IntermediateTensors({"hidden_states": x, "residual": residual})


@support_torch_compile
class LastStage(Layers):
    def forward(self, intermediate_tensors: IntermediateTensors) -> torch.Tensor:
        x, residual = self.run(intermediate_tensors["hidden_states"], intermediate_tensors["residual"])
        return x + residual


@support_torch_compile
class DependsOnData(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        if x.sum() > 0:
            x = x + 1
        return x + residual


@support_torch_compile
class BreaksTheGraph(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        torch._dynamo.graph_break()
        return x + residual


class BadLayer(Layer):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = super().forward(x, residual)
        return (x + 1 if x.sum() > 0 else x), residual


@support_torch_compile
class DependsOnDataInALayer(Sum):
    kind = BadLayer


@support_torch_compile
class AssignsABuffer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, residual = self.run(x, None)
        self.seen = self.seen + x.sum(0)
        return x + residual


class StaticGraph:
    """Stands in for `CUDAGraphWrapper`, which CPU does not have."""

    made: ClassVar[list[tuple[bool, bool]]] = []

    def __init__(self, runnable: Callable[..., Any], vllm_config: Any, runtime_mode: Any, cudagraph_options: Any):
        self.runnable = runnable
        self.made.append((cudagraph_options.gc_disable, cudagraph_options.weak_ref_output))

    def __call__(self, *args: Any) -> Any:
        return self.runnable(*args)


def config(root: str, **compilation: Any) -> VllmConfig:
    """A configuration that compiles piecewise; from now on the cache root is the folder `root`."""
    os.environ["VLLM_CACHE_ROOT"] = str(Path(root).absolute())
    options = {"mode": CompilationMode.VLLM_COMPILE, "splitting_ops": ["toys::mix"]}
    return VllmConfig(compilation_config=CompilationConfig(**(options | compilation)))


def build(kind: Callable[[], nn.Module], vllm_config: VllmConfig) -> Any:
    """A model with seeded weights."""
    torch.manual_seed(0)
    with set_current_vllm_config(vllm_config):
        return kind()


def tokens(count: int = 7) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(count))


def off(model: Any, counts: tuple[int, ...] = (7, 2, 30)) -> float:
    """The largest difference of the compiled `model` to itself in eager mode, for some numbers of tokens."""
    return max(float((model(tokens(n)) - eager(model, tokens(n))).abs().max()) for n in counts)


def eager(model: Any, *args: Any) -> Any:
    return type(model).forward(model, *args)


def start(
    root: str | Path,
    kind: Callable[[], nn.Module] = Plain,
    compilation: dict[str, Any] | None = None,
    before: Callable[[], object] = lambda: None,
    **env: str,
) -> forks.Fork:
    """A start with `kind` on the cache root `root`, in a fork; `Ended.counts` says what came of it."""

    def function() -> list[float]:
        os.environ.update(env)
        before()
        difference = off(build(kind, config(str(root), **(compilation or {}))))
        return [difference, *(getattr(compilation_counter, name) for name in COUNTS)]

    return forks.Fork(function)


def error(call: Callable[[], Any]) -> list[str]:
    """Type and first line of what `call` raises; an empty list for no error."""
    try:
        call()
    except Exception as raised:
        return [type(raised).__name__, str(raised).partition("\n")[0]]
    return []


@contextmanager
def upstream() -> Iterator[None]:
    """Inside, every model is compiled as stock does it."""
    ours = rules.why_upstream
    rules.why_upstream = lambda vllm_config: "asked for by a test"
    try:
        yield
    finally:
        rules.why_upstream = ours


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Afterwards, what vLLM's counters counted inside."""
    before, counts = vars(compilation_counter).copy(), {}
    yield counts
    counts.update((name, value - before[name]) for name, value in vars(compilation_counter).items())


def kernels(root: str) -> list[str]:
    """Digests of the kernels in the store of the cache root `root`."""
    store = Store.open(Path(root) / "compile_store")
    return sorted({n.rpartition("/")[2] for m in store.manifests() for n in m.members if "kernel/" in n})
