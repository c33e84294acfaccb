"""The table of what is not covered, and the page that has it; tests/contract has a test for each line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext import settings
from vllm_compile_ext.cuda_graphs import budget, coverage, policy, record, session
from vllm_compile_ext.cuda_graphs.coverage import Row
from vllm_compile_ext.cuda_graphs.policy import FULL, PIECEWISE

PAGE = (Path(__file__).parents[3] / "docs" / "cudagraphs.md").read_text()


def config(**changes: Any) -> Any:
    """The attributes of a plain `VllmConfig` that are looked at, some of them changed by their path."""
    made = SimpleNamespace(
        use_v2_model_runner=True,
        use_cumem_cudagraph_pool=False,
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        parallel_config=SimpleNamespace(
            use_ubatching=False,
            data_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_eplb=False,
            enable_elastic_ep=False,
            tensor_parallel_size=1,
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mm_encoder=False,
            use_inductor_graph_partition=False,
            static_forward_context={},
            cudagraph_mode=SimpleNamespace(mixed_mode=lambda: SimpleNamespace(name="PIECEWISE")),
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        profiler_config=SimpleNamespace(profiler=None),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        observability_config=SimpleNamespace(jit_monitor_mode="log"),
    )
    return SimpleNamespace(**(vars(made) | changes))


@pytest.fixture(autouse=True)
def not_breakable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPILE_CUDAGRAPHS", raising=False)
    monkeypatch.setattr(coverage, "_breakable", lambda: False)  # asks vLLM


def test_a_plain_configuration_is_covered() -> None:
    assert coverage.stock_because(config()) is None
    assert coverage.on_demand(config()) is True


def test_the_first_line_that_holds_is_the_reason() -> None:
    reason = coverage.stock_because(config(lora_config=object(), speculative_config=object()))
    assert reason is not None
    assert reason.startswith("speculative decoding: ")
    assert coverage.on_demand(config(lora_config=object())) is False


def layer(backend: str) -> Any:
    return SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend))


@pytest.mark.parametrize(
    ("backends", "covered"),
    [(["FLASH_ATTN"], True), (["TRITON_ATTN", "FLASH_ATTN"], True), (["FLASH_ATTN", "FLASHINFER"], False)],
)
def test_the_backends_of_all_layers_count(backends: list[str], covered: bool) -> None:
    made = config()
    layers = {str(n): layer(name) for n, name in enumerate(backends)}
    made.compilation_config.static_forward_context |= layers | {"experts": object()}
    assert coverage.on_demand(made) is covered


def test_a_configuration_that_was_given_up_is_stocks_without_another_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coverage, "_given_up", set())
    made, other = config(), config()
    coverage.give_up(made)
    del made.parallel_config  # a surprise again, if it were asked for
    assert coverage.on_demand(made) is False
    caplog.set_level("INFO")
    coverage.say(made)
    assert caplog.records == []
    assert coverage.on_demand(other) is True


@pytest.mark.parametrize(("value", "expected"), [("lazy", True), ("idle", True), ("eager", False)])
def test_what_was_asked_for_counts(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("VLLM_COMPILE_CUDAGRAPHS", value)
    assert coverage.on_demand(config()) is expected


def test_no_line_is_there_twice() -> None:
    assert len({row.what for row in coverage.STOCK}) == len(coverage.STOCK)


def test_the_table_has_all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "STOCK", (Row("one", "a", bool), Row("two", "b", bool)))
    assert coverage.markdown().splitlines()[2:] == ["| one | a |", "| two | b |"]


# --- docs/cudagraphs.md


def test_the_docs_page_has_the_table() -> None:
    assert PAGE.endswith(coverage.markdown()), "put coverage.markdown() at the end of docs/cudagraphs.md"


def test_the_docs_page_has_the_values_of_the_variable() -> None:
    (row,) = [row for row in settings.table() if row.name == "VLLM_COMPILE_CUDAGRAPHS"]
    assert row.allowed == "lazy, idle or eager"
    for line in ("| `lazy` (default) |", "| `idle` |", "| `eager` |"):
        assert line in PAGE


def ordinal(number: int) -> str:
    return f"{number}{'st' if number == 1 else 'th'}"


def test_the_docs_page_has_the_thresholds() -> None:
    full, piecewise = (ordinal(policy.BATCHES[kind]) for kind in (FULL, PIECEWISE))
    padded = ordinal(policy.BATCHES_PADDED)
    larger = f"up to {policy.PAD_FREELY} tokens, or {policy.PAD_FACTOR} times"
    for line in (
        f"| captured for which batch without a graph | the {full} | the {piecewise} |",
        f"| for which batch of its size, where a larger graph serves meanwhile | the {padded} | the {padded} |",
        f"| how much larger that may be | {larger} | {larger} |",
        f"| batches between this capture and the one before | 0, or {policy.BATCHES_BETWEEN} where a larger graph "
        f"serves | {policy.BATCHES_BETWEEN} |",
        f"less than {budget.MARGIN // budget.MIB} MiB free",
        f"{budget.UNKEPT_MARGIN >> 30} GiB stays free",
        f"{policy.BATCHES_POSTPONED} batches later",
        f"The {record.KEPT} newest are kept",
    ):
        assert line in PAGE
    assert budget.UNASKED == 0.25, "the page says: a quarter"
    assert session.FAILURES == 3, "the page says: the third"
