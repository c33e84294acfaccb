"""What ``vllm-compile-ext bench`` takes from the installed vLLM: options that are free, and a function."""

from __future__ import annotations

import pytest

from tests.process import Outcome, run

LOOK = """
    import inspect
    from vllm.benchmarks import startup
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    report(dict(
        options=sorted(serve._option_string_actions),
        parameters=list(inspect.signature(startup.run_startup_in_subprocess).parameters),
        source=inspect.getsource(startup.run_startup_in_subprocess),
    ))
"""


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    found = run(LOOK, fork=True)
    assert found.code == 0, found.output
    return found


def test_no_option_of_the_bench_is_one_of_serve(outcome: Outcome) -> None:
    own = {"--runs", "--starts", "--engine", "--json", "--chart", "--limit", "--verbose"}
    assert own.isdisjoint(outcome.value["options"])
    assert {"--enforce-eager", "--host", "--port"} <= set(outcome.value["options"])


def test_the_function_that_times_an_engine(outcome: Outcome) -> None:
    assert outcome.value["parameters"] == ["engine_args", "result_queue"]
    for name in ("total_startup_time", "compilation_time", "encoder_compilation_time"):
        assert f'"{name}"' in outcome.value["source"]
