from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_compile_ext import settings
from vllm_compile_ext.cli.env import markdown


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("VLLM_COMPILE_DEPYF", None, False),
        ("VLLM_COMPILE_EXT", "", True),
        *(("VLLM_COMPILE_DEPYF", raw, True) for raw in ("1", "TRUE", "on")),
        *(("VLLM_COMPILE_EXT", raw, False) for raw in ("0", " no ")),
        ("VLLM_COMPILE_WORKERS", None, 0),
        ("VLLM_COMPILE_WORKERS", " 2 ", 2),
        ("VLLM_COMPILE_CUDAGRAPHS", " Idle", "idle"),
        ("VLLM_COMPILE_STORE", None, ""),
        ("VLLM_COMPILE_STORE", "~/A b", "~/A b"),
    ],
)
def test_a_value_is_parsed_by_its_type_and_none_is_the_default(name: str, raw: str | None, value: object) -> None:
    found = getattr(settings.load({} if raw is None else {name: raw}), name)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("name", "raw", "allowed"),
    [
        ("VLLM_COMPILE_DEPYF", "banana", "0 or 1"),
        ("VLLM_COMPILE_CUDAGRAPHS", "never", "lazy, idle or eager"),
        *(("VLLM_COMPILE_WORKERS", raw, "a whole number from 0") for raw in ("-1", "two", "1.5", "true", "²")),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_allowed(name: str, raw: str, allowed: str) -> None:
    with pytest.raises(settings.EnvError) as error:
        settings.load({name: raw})
    assert str(error.value) == f"{name}={raw!r} is not allowed: use {allowed}, or unset it"


def test_strict_does_not_depend_on_the_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_DEPYF", "banana")
    monkeypatch.delenv("VLLM_COMPILE_EXT_STRICT", raising=False)
    assert settings.strict() is False
    monkeypatch.setenv("VLLM_COMPILE_EXT_STRICT", "1")
    assert settings.strict() is True


def test_the_docs_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "environment.md"
    assert page.read_text() == markdown(), "run: vllm-compile-ext env --markdown > docs/environment.md"


def test_what_is_set_is_written_as_one_would_set_it() -> None:
    switches = settings.load({"VLLM_COMPILE_DEPYF": "on", "VLLM_COMPILE_WAIT": "3", "VLLM_COMPILE_STORE": "/a"})
    assert settings.changed(switches) == ["VLLM_COMPILE_DEPYF=1", "VLLM_COMPILE_STORE=/a", "VLLM_COMPILE_WAIT=3"]


# --- for one engine

ALLOWED = "depyf, workers, cudagraphs, custom_ops, wait"


@pytest.mark.parametrize(
    ("ours", "variables", "message"),
    [
        ({"banana": 1}, {}, f"compile_ext.banana is not a setting: there are {ALLOWED}"),
        ({"VLLM_COMPILE_WAIT": 1}, {}, f"compile_ext.VLLM_COMPILE_WAIT is not a setting: there are {ALLOWED}"),
        ({"wait": -1}, {}, "compile_ext.wait=-1 is not allowed: use a whole number from 0, or unset it"),
        ({"wait": True}, {}, "compile_ext.wait=True is not allowed: use a whole number from 0, or unset it"),
        ({"depyf": None}, {}, "compile_ext.depyf=None is not allowed: use 0 or 1, or unset it"),
        (
            {"cudagraphs": "never"},
            {},
            "compile_ext.cudagraphs='never' is not allowed: use lazy, idle or eager, or unset it",
        ),
        ("idle", {}, f"compile_ext='idle' is not allowed: use a dictionary, which may have {ALLOWED}"),
        # Read before there is a configuration, or of what engines share.
        ({"ext": 0}, {}, "compile_ext.ext is not allowed: only the variable VLLM_COMPILE_EXT sets it"),
        ({"fork": 0}, {}, "compile_ext.fork is not allowed: only the variable VLLM_COMPILE_FORK sets it"),
        ({"store": "/a"}, {}, "compile_ext.store is not allowed: only the variable VLLM_COMPILE_STORE sets it"),
        ({"wait": 10}, {"VLLM_COMPILE_WAIT": "10"}, None),
        ({"depyf": True}, {"VLLM_COMPILE_DEPYF": "on"}, None),
        ({"wait": "10"}, {"VLLM_COMPILE_WAIT": "", "VLLM_COMPILE_WORKERS": "3"}, None),
        ({"wait": 10}, {"VLLM_COMPILE_WAIT": "3"}, "VLLM_COMPILE_WAIT=3 and additional_config.compile_ext.wait=10"),
        (
            {"cudagraphs": "idle"},
            {"VLLM_COMPILE_CUDAGRAPHS": "lazy"},  # also where it is set to the default
            "VLLM_COMPILE_CUDAGRAPHS=lazy and additional_config.compile_ext.cudagraphs='idle'",
        ),
    ],
)
def test_what_an_engine_is_given_is_checked(ours: object, variables: dict[str, str], message: str | None) -> None:
    given = {"another_plugins": {"wait": "forever"}, "compile_ext": ours}
    if message is None:
        settings.check(given, variables)
        return
    with pytest.raises(settings.EnvError) as error:
        settings.check(given, variables)
    disagree = " disagree: remove one of them"
    assert str(error.value) == (message + disagree if variables else f"additional_config.{message}")


@pytest.mark.parametrize("name", ["compile-ext", "vllm_compile_ext", "VLLM-Compile-Ext"])
def test_a_namespace_of_another_spelling_is_an_error(name: str) -> None:
    with pytest.raises(settings.EnvError, match=f"additional_config.{name} would have no effect: call it compile_ext"):
        settings.check({name: {"wait": 10}})


def test_each_engine_has_its_own_settings_and_the_variables_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(additional_config: Any) -> tuple[str, int, int]:
        found = settings.of(SimpleNamespace(additional_config=additional_config))
        return found.VLLM_COMPILE_CUDAGRAPHS, found.VLLM_COMPILE_WAIT, found.VLLM_COMPILE_WORKERS

    for name in ("CUDAGRAPHS", "WAIT"):
        monkeypatch.delenv(f"VLLM_COMPILE_{name}", raising=False)
    monkeypatch.setenv("VLLM_COMPILE_WORKERS", "3")
    one, other = {"compile_ext": {"cudagraphs": "Idle", "wait": 10}}, {"compile_ext": {"wait": "7"}}
    assert [of(each) for each in (one, other, one, {})] == [
        ("idle", 10, 3),
        ("lazy", 7, 3),
        ("idle", 10, 3),
        ("lazy", 200, 3),
    ]
    assert of(SimpleNamespace(compute_hash=lambda: "of an object that vLLM takes, too")) == ("lazy", 200, 3)
