"""Toy models behind vLLM's decorator: what an engine on CPU does not reach, judged by eager mode and by upstream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine  # they start none, but compile

WORKS = """
    import torch
    from torch import nn
    from tests import toys
    from vllm.compilation.backends import set_model_tag
    out = {}

    config = toys.config("parts")
    with toys.counted() as counts:
        body = toys.build(toys.Plain, config)
        out["parts"] = [toys.off(body)]
        out["kernels"] = toys.kernels("parts")
        with set_model_tag("toy_head"):
            head = toys.build(toys.Head, config)
        out["parts"].append(toys.off(head))
    out["parts counts"] = counts
    out["answer"] = body(toys.tokens()).tolist()

    with toys.counted() as counts:
        other = toys.build(toys.Plain, config)
        other.layers[3].up.weight.neg_()
        difference = float((other(toys.tokens()) - body(toys.tokens())).abs().max())
    out["other"] = [toys.off(other), toys.off(body), difference, counts["num_aot_artifacts_loaded"]]

    replaced = out["replaced"] = {}
    for number in (1, 3):
        layer = body.layers[number]
        for name, change in (
            ("set", lambda: setattr(layer.down, "weight", nn.Parameter(torch.randn(toys.SIZE, 2 * toys.SIZE)))),
            ("copied into", lambda: layer.up.bias.copy_(torch.randn(2 * toys.SIZE))),
            ("data", lambda: setattr(layer.up.weight, "data", torch.randn(2 * toys.SIZE, toys.SIZE))),
        ):
            before = body(toys.tokens())
            change()
            moved = float((body(toys.tokens()) - before).abs().max())
            replaced[f"{name} {number}"] = [moved, toys.off(body)]

    config = toys.config("stages")
    first, last = toys.build(toys.FirstStage, config), toys.build(toys.LastStage, config)
    stages = out["stages"] = []
    for count in (7, 2, 30):
        x = toys.tokens(count)
        mine, expected = first(x), toys.eager(first, x)
        stages.append([type(mine).__name__, sorted(mine.tensors)])
        stages += [float((mine[k] - expected[k]).abs().max()) for k in sorted(mine.tensors)]
        stages.append(float((last(expected) - toys.eager(last, expected)).abs().max()))

    encoder = toys.build(toys.Encoder, toys.config("encoder"))
    most = encoder.vllm_config.scheduler_config.max_num_batched_tokens
    out["encoder"] = toys.off(encoder, (7, most + 100))

    seen = []
    def watch(graph):
        seen.append(len(graph.nodes))
    with toys.counted() as counts:
        passes = {"post_grad_custom_post_pass": "__main__.watch"}
        config = toys.config("pass", inductor_passes=passes, compile_ranges_endpoints=[8])
        off = toys.off(toys.build(toys.Plain, config))
    out["pass"] = [off, counts["num_inductor_compiles"], len(seen)]
    report(out)
"""


TWO_WORKERS = """
    from tests import toys
    model = toys.build(toys.Plain, toys.config("parts"))
    report({"answer": model(toys.tokens()).tolist(), "kernels": toys.kernels("parts")})
"""


@dataclass(frozen=True)
class Works:
    """Two starts in one folder, the first with one worker; and a cold one of one of the models, with two workers."""

    cold: process.Outcome
    warm: process.Outcome
    two: process.Outcome


def run(code: str, folder: Path, **env: str) -> process.Outcome:
    outcome = process.run(code, folder=folder, fork=True, **env)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    folder = tmp_path_factory.mktemp("toys")
    cold, warm = (run(WORKS, folder / "works", VLLM_COMPILE_WORKERS="1") for _ in range(2))
    return Works(cold, warm, run(TWO_WORKERS, folder / "two", VLLM_COMPILE_WORKERS="2"))


@pytest.fixture(params=["cold", "warm"])
def value(works: Works, request: pytest.FixtureRequest) -> dict[str, Any]:
    return getattr(works, request.param).value


def test_two_compiled_parts_in_one_process(works: Works, value: dict[str, Any]) -> None:
    assert value["parts"] == pytest.approx([0, 0], abs=1e-5)
    counts = value["parts counts"]
    assert counts["num_models_seen"] == 2
    if value is works.cold.value:
        assert (counts["num_aot_artifacts_saved"], counts["num_inductor_compiles"]) == (2, 6)
        for tag in ("backbone", "toy_head"):
            assert works.cold.lines(f"[{tag}] traced 2 layers and copied 3; 6 pieces to compile, 3 of them distinct")
            assert works.cold.lines(f"[{tag}] compiled 3 pieces with 1 workers")
    else:
        assert (counts["num_aot_artifacts_loaded"], counts["num_inductor_compiles"]) == (2, 0)


def test_an_instance_of_the_same_class_loads_the_code_and_reads_its_own_tensors(value: dict[str, Any]) -> None:
    assert value["other"][:2] == pytest.approx([0, 0], abs=1e-5)
    assert value["other"][2] > 1e-3
    assert value["other"][3] == 1


def test_an_encoder_takes_more_tokens_than_a_batch(works: Works, value: dict[str, Any]) -> None:
    assert value["encoder"] == pytest.approx(0, abs=1e-4)
    assert works.cold.lines("[Encoder] traced 2 layers and copied 3")


def test_any_number_of_workers_makes_the_same(works: Works) -> None:
    assert works.two.lines("compiled 3 pieces with 2 workers")
    assert works.cold.value["answer"] == works.two.value["answer"] == works.warm.value["answer"]
    assert works.cold.value["kernels"] == works.two.value["kernels"] != []
    assert set(works.two.value["kernels"]) < set(works.warm.value["kernels"]), "the other part's are there, too"


@pytest.mark.parametrize("change", ["set 1", "set 3", "copied into 1", "copied into 3", "data 1", "data 3"])
def test_parameters_that_change_after_compilation(value: dict[str, Any], change: str) -> None:
    """Layer 1 was traced, layer 3 is a copy."""
    moved, off = value["replaced"][change]
    assert moved > 1e-3
    assert off == pytest.approx(0, abs=1e-4)


def test_pipeline_stages(value: dict[str, Any]) -> None:
    kinds = [v for v in value["stages"] if isinstance(v, list)]
    assert kinds == [["IntermediateTensors", ["hidden_states", "residual"]]] * 3
    assert [v for v in value["stages"] if not isinstance(v, list)] == pytest.approx([0] * 9, abs=1e-5)


def test_a_custom_pass_sees_each_distinct_piece_once_a_range(works: Works, value: dict[str, Any]) -> None:
    pieces = 3 * 2 if value is works.cold.value else 0
    assert value["pass"] == [pytest.approx(0, abs=1e-5), pieces, pieces]


FAILS = """
    import depyf
    from tests import toys
    from vllm.config import CUDAGraphMode
    from vllm_compile_ext.program import dump
    from vllm_compile_ext.trace import watch
    decompiled = []
    real = depyf.decompile
    depyf.decompile = lambda code: decompiled.append(code.co_name) or real(code)
    out = {}
    for kind in (toys.DependsOnData, toys.DependsOnDataInALayer, toys.BreaksTheGraph):
        run = lambda: toys.build(kind, toys.config(kind.__name__))(toys.tokens())
        ours = toys.error(run)
        hooked = watch.installed()
        with toys.upstream():
            out[kind.__name__] = [ours, toys.error(run), hooked]

    from vllm.platforms.cpu import CpuPlatform
    CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda cls: "tests.toys.StaticGraph")
    config = toys.config("graphs")
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    out["graphs"] = [toys.off(toys.build(toys.Plain, config)), toys.StaticGraph.made.copy(), decompiled.copy()]
    config = toys.config("buffer")
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    model, at_the_check, forbid = toys.build(toys.AssignsABuffer, config), [], dump.forbid_buffer_assignment
    def check(code):
        at_the_check.append(len(decompiled))
        forbid(code)
    dump.forbid_buffer_assignment = check
    out["buffer"] = [toys.error(lambda: model(toys.tokens())), at_the_check, decompiled]
    report(out)
"""


@pytest.fixture(scope="module")
def fails(tmp_path_factory: pytest.TempPathFactory) -> process.Outcome:
    return run(FAILS, tmp_path_factory.mktemp("fails"))


@pytest.mark.parametrize("kind", ["DependsOnData", "DependsOnDataInALayer", "BreaksTheGraph"])
def test_bad_input_gives_vllms_own_error(fails: process.Outcome, kind: str) -> None:
    ours, stock, hooked = fails.value[kind]
    assert ours == stock != []
    assert not hooked, "nothing of Dynamo stays changed"


def test_every_call_site_has_a_cuda_graph_of_its_own(fails: process.Outcome) -> None:
    off, made, decompiled = fails.value["graphs"]
    assert off == pytest.approx(0, abs=1e-5)
    first, middle, last = [False, False], [True, False], [True, True]
    assert made == [first, *[middle] * 4, last]
    assert decompiled == []


def test_a_buffer_that_is_assigned_under_cuda_graphs_is_an_error(fails: process.Outcome) -> None:
    (kind, message), at_the_check, decompiled = fails.value["buffer"]
    assert kind == "RuntimeError"
    assert "forward assigns a buffer of its module" in message
    assert at_the_check == [0], "only the message needs the decompiler"
    assert decompiled == ["forward"]
    assert fails.lines("traced 2 layers and copied 3"), "found behind a model that was traced once"
