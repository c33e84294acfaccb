"""Stock, cold and warm starts of a real CPU engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "root"


@pytest.fixture(scope="module")
def stock_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock") / "root"


@pytest.fixture(scope="module")
def first(llama: Path, cache: Path, stock_root: Path) -> tuple[engine.Run, engine.Run]:
    """Stock's cold start and ours, both at once."""
    folders = [stock_root.parent / "run", cache.parent / "run"]
    stock = engine.begin(llama, stock_root, folders[0], VLLM_COMPILE_EXT="0")
    cold = engine.begin(llama, cache, folders[1])
    return engine.end(stock, folders[0]), engine.end(cold, folders[1])


@pytest.fixture(scope="module")
def stock(first: tuple[engine.Run, engine.Run]) -> engine.Run:
    return first[0]


@pytest.fixture(scope="module")
def eager(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> engine.Run:
    return engine.run(llama, tmp_path_factory.mktemp("eager") / "root", {"enforce_eager": True}, fork=True)


@pytest.fixture(scope="module")
def cold(first: tuple[engine.Run, engine.Run]) -> engine.Run:
    return first[1]


@pytest.fixture(scope="module")
def warm(llama: Path, cache: Path, cold: engine.Run) -> engine.Run:
    return engine.run(llama, cache)


def test_the_model_is_a_fair_judge(stock: engine.Run) -> None:
    assert all(len(set(tokens)) > 8 for tokens in stock.tokens), "greedy tokens must vary"
    assert len({tuple(tokens) for tokens in stock.tokens}) == len(engine.PROMPTS)


def test_kill_switch_runs_stock(stock: engine.Run) -> None:
    assert stock.backends.endswith("/vllm/compilation/backends.py")
    assert stock.mode == "DYNAMO_TRACE_ONCE"
    assert stock.output.lines("vllm-compile-ext", "is off")


def test_metrics_in_one_process(stock: engine.Run, cold: engine.Run, warm: engine.Run) -> None:
    def counts(run: engine.Run) -> list[float]:
        names = ("store_misses", "store_hits", "pieces_compiled", "pieces_loaded")
        return [run.metrics[f"vllm_compile_ext_{name}_total"] for name in names]

    assert stock.metrics == {}
    assert counts(cold) == [1, 0, 3, 0]
    assert counts(warm) == [0, 1, 0, 3]


def test_cold_start_compiles_pieces_and_saves(cold: engine.Run) -> None:
    assert cold.backends.endswith("vllm_compile_ext/compilation/backends.py")
    assert (cold.mode, cold.sizes) == ("VLLM_COMPILE", [])
    assert cold.counters["num_graphs_seen"] == 1
    assert cold.counters["num_piecewise_capturable_graphs_seen"] == 5  # 4 layers split at attention
    assert cold.counters["num_compiled_artifacts_saved"] == 3  # first, middle, last
    assert (cold.counters["num_aot_artifacts_saved"], cold.loaded) == (1, 0)
    (line,) = cold.output.lines("vllm-compile-ext", "is active")
    assert "INFO" in line


def test_warm_start_loads_and_compiles_nothing(warm: engine.Run) -> None:
    assert (warm.loaded, warm.compiled, warm.counters["num_graphs_seen"]) == (1, 0, 0)
    assert warm.counters["num_compiled_artifacts_loaded"] == 3
    assert warm.counters["num_aot_artifacts_saved"] == 0


def test_same_answers(stock: engine.Run, eager: engine.Run, cold: engine.Run, warm: engine.Run) -> None:
    assert cold.tokens == warm.tokens == stock.tokens == eager.tokens
    assert cold.logprobs == warm.logprobs, "the same kernels give the same bits"
    for other in (stock, eager):
        for mine, theirs in zip(cold.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


def test_nothing_is_decompiled_on_the_start_path(cache: Path, cold: engine.Run, warm: engine.Run) -> None:
    assert cold.decompiled == warm.decompiled == []
    (file,) = cache.rglob("transformed_code.py")
    assert "VLLM_COMPILE_DEPYF=1" in file.read_text()


def test_depyf_fills_the_files_on_a_warm_start_too(llama: Path, cache: Path, warm: engine.Run, tmp_path: Path) -> None:
    options = {"compilation_config": {"debug_dump_path": str(tmp_path / "dump")}}
    run = engine.run(llama, cache, options, fork=True, VLLM_COMPILE_DEPYF="1")
    assert (run.loaded, run.compiled) == (1, 0), "neither the variable nor the dump path is in the key"
    assert run.decompiled == ["forward"]
    assert run.tokens == warm.tokens
    dumps = [*(tmp_path / "dump").rglob("transformed_code.py"), *Path(run.folder).rglob("transformed_code.py")]
    assert len(dumps) == 2, "the debug dump folder and the model's cache folder"
    for path in dumps:
        assert "def forward(self, input_ids" in path.read_text()
        compile(path.read_text(), str(path), "exec")


def test_two_engines_starting_cold_at_once_both_end_well(llama2: Path, tmp_path: Path) -> None:
    started = [engine.begin(llama2, tmp_path / "root", tmp_path / name, fork=True) for name in ("a", "b")]
    first, second = (engine.end(p, tmp_path / name) for p, name in zip(started, ("a", "b"), strict=True))
    assert first.tokens == second.tokens
    third = engine.run(llama2, tmp_path / "root", fork=True)
    assert (third.loaded, third.compiled) == (1, 0)
    assert third.tokens == first.tokens
    assert not third.output.lines("compiling")


def test_stocks_cache_is_left_as_it_is(llama: Path, stock: engine.Run, stock_root: Path) -> None:
    before = {path: path.read_bytes() for path in stock_root.rglob("*") if path.is_file()}
    assert [path for path in before if "torch_aot_compile" in str(path)]
    run = engine.run(llama, stock_root, fork=True)
    assert (run.loaded, run.compiled) == (0, 3)
    assert {path: path.read_bytes() for path in before if "modelinfos" not in str(path)} == {
        path: data for path, data in before.items() if "modelinfos" not in str(path)
    }
