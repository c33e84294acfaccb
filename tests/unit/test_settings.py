from pathlib import Path

import pytest

from vllm_compile_ext import settings
from vllm_compile_ext.cli.env import markdown


def test_defaults_when_nothing_is_set() -> None:
    assert settings.load({}) == settings.Settings(
        VLLM_COMPILE_EXT=True, VLLM_COMPILE_EXT_STRICT=False, VLLM_COMPILE_DEPYF=False
    )


@pytest.mark.parametrize(("raw", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), (" no ", False)])
def test_switches_are_parsed(raw: str, value: bool) -> None:
    assert settings.load({"VLLM_COMPILE_DEPYF": raw}).VLLM_COMPILE_DEPYF is value


def test_an_empty_value_counts_as_unset() -> None:
    assert settings.load({"VLLM_COMPILE_EXT": ""}).VLLM_COMPILE_EXT is True


def test_a_bad_value_names_variable_value_and_choices() -> None:
    with pytest.raises(settings.EnvError) as error:
        settings.load({"VLLM_COMPILE_DEPYF": "banana"})
    for word in ("VLLM_COMPILE_DEPYF", "'banana'", "1", "0", "unset it"):
        assert word in str(error.value)


def test_workers_are_a_whole_number_and_0_stands_for_the_cores() -> None:
    assert settings.load({}).VLLM_COMPILE_WORKERS == 0
    assert settings.load({"VLLM_COMPILE_WORKERS": " 2 "}).VLLM_COMPILE_WORKERS == 2


@pytest.mark.parametrize("raw", ["-1", "two", "1.5", "true", "²"])
def test_a_bad_number_of_workers_is_refused(raw: str) -> None:
    with pytest.raises(settings.EnvError, match="use a whole number from 0, or unset it") as error:
        settings.load({"VLLM_COMPILE_WORKERS": raw})
    assert f"VLLM_COMPILE_WORKERS={raw!r}" in str(error.value)


def test_strict_does_not_depend_on_the_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPILE_DEPYF", "banana")
    monkeypatch.delenv("VLLM_COMPILE_EXT_STRICT", raising=False)
    assert settings.strict() is False
    monkeypatch.setenv("VLLM_COMPILE_EXT_STRICT", "1")
    assert settings.strict() is True


def test_the_docs_page_is_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "environment.md"
    assert page.read_text() == markdown(), "run: vllm-compile-ext env --markdown > docs/environment.md"


def test_a_folder_is_kept_as_text() -> None:
    assert settings.load({}).VLLM_COMPILE_STORE == ""
    assert settings.load({"VLLM_COMPILE_STORE": "~/A b"}).VLLM_COMPILE_STORE == "~/A b"
    (row,) = (row for row in settings.table() if row.name == "VLLM_COMPILE_STORE")
    assert (row.default, row.allowed) == ("compile_store in vLLM's cache root", "a folder")


def test_what_is_set_is_written_as_one_would_set_it() -> None:
    switches = settings.load({"VLLM_COMPILE_DEPYF": "on", "VLLM_COMPILE_WAIT": "3", "VLLM_COMPILE_STORE": "/a"})
    assert settings.changed(switches) == ["VLLM_COMPILE_DEPYF=1", "VLLM_COMPILE_STORE=/a", "VLLM_COMPILE_WAIT=3"]
