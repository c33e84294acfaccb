from pathlib import Path

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
