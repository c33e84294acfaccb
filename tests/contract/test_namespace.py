"""Our settings in `additional_config`, in vLLM's own configuration: checked where it is made, and in no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import run

# What is given, and the part of the error that says why it is refused.
REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": ({"banana": 1}, "additional_config.compile_ext.banana is not a setting: there are "),
    "bad": ({"wait": -1}, "additional_config.compile_ext.wait=-1 is not allowed: use a whole number from 0"),
    "early": ({"fork": 0}, "additional_config.compile_ext.fork is not allowed: only the variable VLLM_COMPILE_FORK"),
    "disagrees": (
        {"workers": 2},
        "VLLM_COMPILE_WORKERS=3 and additional_config.compile_ext.workers=2 disagree: remove one of them",
    ),
}
AGREES = {"workers": 3, "cudagraphs": "idle", "wait": 10, "depyf": True}

CODE = f"""
    import copy, pickle
    from vllm.engine.arg_utils import EngineArgs
    from vllm_compile_ext import settings
    from vllm_compile_ext.key.config import config_factors

    def make(**additional):
        return EngineArgs(model=sys.argv[1], max_model_len=256, additional_config=additional).create_engine_config()

    def error(ours, why):
        try:
            make(compile_ext=ours)
        except ValueError as error:
            return str(error)

    none, theirs = make(), make(x=1)
    ours, both = make(compile_ext={AGREES}), make(compile_ext={AGREES}, x=1)
    other = make(compile_ext={{"wait": 3}})
    sent = pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)
    report(dict(
        errors={{name: error(*refused) for name, refused in {REFUSED}.items()}},
        hashes=[each.compute_hash() for each in (none, ours, other, theirs, both)],
        factors=[config_factors(each, ()) for each in (none, ours, other, theirs, both)],
        kept=[each.additional_config for each in (ours, both)],
        waits=[settings.of(each).VLLM_COMPILE_WAIT for each in (none, ours, other, *sent)],
    ))
"""


@pytest.fixture(scope="module")
def ours(llama2: Path) -> Any:
    return run(CODE, str(llama2), fork=True, plugin=False, VLLM_COMPILE_WORKERS="3").value


@pytest.fixture(scope="module")
def stock(llama2: Path) -> Any:
    return run(CODE, str(llama2), fork=True, plugin=False, VLLM_COMPILE_WORKERS="3", VLLM_COMPILE_EXT="0").value


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_an_error_of_the_configuration(ours: Any, name: str) -> None:
    assert REFUSED[name][1] in ours["errors"][name]


@pytest.mark.parametrize("key", ["hashes", "factors"])
def test_it_is_in_neither_key_and_what_is_beside_it_is(ours: Any, key: str) -> None:
    none, with_ours, other, theirs, both = ours[key]
    assert none == with_ours == other
    assert theirs == both
    assert none != theirs


def test_it_stays_in_the_configuration_which_other_processes_get(ours: Any) -> None:
    assert ours["kept"] == [{"compile_ext": AGREES}, {"compile_ext": AGREES, "x": 1}]
    assert ours["waits"] == [200, 10, 3, 10, 10]


def test_stock_vllm_does_not_look_at_it(stock: Any) -> None:
    assert set(stock["errors"].values()) == {None}
    assert len(set(stock["hashes"])) == 5, "all of additional_config is in its key"
