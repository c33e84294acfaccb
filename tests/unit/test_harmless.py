"""A value is shown where a rule says that it is harmless, and nothing else is."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_compile_ext import harmless
from vllm_compile_ext.harmless import HIDDEN

SECRET = "s3cr3t-CANARY"
# Around the secret whatever a command line may have there.
AROUND = st.text(string.ascii_letters + string.digits + "-=.,/:@?#{}[]\"' \n\x1b", max_size=12)
WITH_SECRET = st.builds(lambda before, after: f"{before}{SECRET}{after}", AROUND, AROUND)
SOME = st.sampled_from(["--dtype", "--api-k", "--additional-config", "-c", "-X", "-m", "-tp", "serve", "vllm", "1", ""])


class Color(Enum):
    RED = SECRET


@dataclass
class Inner:
    mode: Literal["fast", "slow"] = "fast"
    path: str = ""
    count: int = 1


@dataclass
class Options:
    model: str = "m"
    dtype: Literal["auto", "half"] | str = "auto"
    size: int | None = None
    on: bool = False
    sizes: list[int] = field(default_factory=list)
    token: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


HARMLESS = [None, True, 3, 0.5, "auto", "ATEN,TRITON", "", [1, 2], {"none", "all"}, {}, Color.RED]
HARMLESS += [torch.float32, "torch.float32", "torch.float8_e4m3fn", torch.device("cpu"), Options, len]
OTHERS = [SECRET, [1, SECRET], {SECRET}, {"a": 1}, {"auto": SECRET}, ("auto", ("auto", SECRET)), f"auto,{SECRET}"]
OTHERS += [b"1", bytearray(b"1"), object(), torch.zeros(1), "1234", "/a/path", "torch.password", f"torch.{SECRET}"]


@pytest.mark.parametrize(("value", "shown"), [(v, True) for v in HARMLESS] + [(v, False) for v in OTHERS])
def test_what_is_harmless_and_what_is_not(value: Any, shown: bool) -> None:
    assert harmless.is_harmless(value) is shown


@settings(deadline=None)
@given(WITH_SECRET)
def test_no_other_string_is(text: str) -> None:
    assert not harmless.is_harmless(text)
    assert not harmless.is_harmless([{"auto": ["auto", text]}])


def test_few_names_have_short_words() -> None:
    assert harmless.is_harmless(["LlamaForCausalLM"], "config.model.hf_config.architectures")
    assert not harmless.is_harmless("LlamaForCausalLM", "config.model.hf_config.name")
    for text in ("/a/path", "two words", "12", "x" * 81, "\x1b[2J"):
        assert not harmless.is_harmless(text, "hf_config.model_type")


def test_options_that_differ_from_their_defaults() -> None:
    inner = Inner(mode="slow", path=SECRET, count=3)
    found = harmless.options(Options("x", "half", 5, True, [1, 2], SECRET, {"a": SECRET}, inner))
    assert found == {"model": HIDDEN, "dtype": "half", "size": 5, "on": True, "sizes": "[1, 2]", "token": HIDDEN} | {
        "extra": HIDDEN,
        "inner.mode": "slow",
        "inner.path": HIDDEN,
        "inner.count": 3,
    }
    assert harmless.options(Options()) == {}
    assert harmless.options(Options(dtype=SECRET)) == {"dtype": HIDDEN}
    # One whose comparison fails.
    assert harmless.options(Options(extra=torch.zeros(2))) == {"extra": HIDDEN}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("org/name-7B.v1", "org/name-7B.v1"),
        ("/models/a/llama", "llama"),
        ("./models/llama/", "llama"),
        ("s3://user:s3cret@bucket/folder/name", "name"),
        ("https://user:s3cret@host/org/name?token=s3cret#s3cret", "name"),
        ("https://user:s3cret@host", HIDDEN),
        ("https://host?s3cret", "host"),
        ("a\x1b[2J", HIDDEN),
        ("", ""),
    ],
)
def test_models(text: str, shown: str) -> None:
    assert harmless.model_name(text) == shown


LINES = [
    ("python /bin/vllm serve org/m --api-key x --port 1", "python vllm serve org/m --api-key *** --port 1"),
    ("/x/python3.11 -m vllm.entrypoints.cli.main serve /a/m", "python3.11 -m vllm.entrypoints.cli.main serve m"),
    ("vllm serve --hf-token=x --max-num-batched-tokens 5", "vllm serve --hf-token=*** --max-num-batched-tokens 5"),
    ("vllm serve m --api-key a b", "vllm serve *** --api-key *** ***"),
    ("vllm serve --api-k x --api-k=x", "vllm serve --api-k *** --api-k=***"),
    ("vllm serve --additional-config.a.key x", "vllm serve --additional-config.*** ***"),
    ("vllm serve --additional-config.a.key=x", "vllm serve --additional-config.***=***"),
    ("vllm serve --dtype half --dtype=x --max-model-len 8k", "vllm serve --dtype half --dtype=*** --max-model-len 8k"),
    ("vllm serve --max-model-len x --seed -1 --api-key 12", "vllm serve --max-model-len *** --seed -1 --api-key ***"),
    ("vllm serve --my-option x", "vllm serve *** ***"),
    ("vllm serve --enforce-eager org/m -tp 2 -O3", "vllm serve --enforce-eager org/m -tp 2 -O3"),
    ("vllm serve -cc.mode=3 -sc x", "vllm serve -cc.***=*** -sc ***"),
    ("python -c import x", "python -c *** ***"),
    ("python -cimport", "python -c***"),
    ("python -X importtime -Iu a/my_start.py x y", "python -X *** -Iu my_start.py *** ***"),
    ("python -Werror /bin/vllm serve", "python -W*** vllm serve"),
    ("python -m mine.x serve", "python -m *** serve"),
    ("/home/user/secret x", "*** ***"),
    ("python -c x --multiprocessing-fork", "python -c *** --multiprocessing-fork"),
]


@pytest.mark.parametrize(("given", "shown"), LINES)
def test_command_lines(given: str, shown: str) -> None:
    model = next((word for word in given.split() if word.endswith("/m")), None)
    assert " ".join(harmless.arguments(given.split(), model)) == shown


@settings(deadline=None)
@given(st.lists(st.one_of(WITH_SECRET, SOME, st.builds(str.__add__, SOME, WITH_SECRET)), max_size=8))
def test_no_command_line_shows_more(given: list[str]) -> None:
    assert SECRET not in "\n".join(harmless.arguments(given))


def test_a_command_line_may_be_odd() -> None:
    assert harmless.arguments([]) == [HIDDEN]
    assert harmless.arguments([b"x", 3, "\0"]) == [HIDDEN] * 3
    assert harmless.arguments(["python", "-m"]) == ["python", "-m", HIDDEN]


class OurError(Exception):
    __module__ = "vllm_compile_ext.a_test"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(SECRET), "ValueError in raised (test_harmless.py:"),
        (FileNotFoundError(2, "No such file", f"/{SECRET}"), "FileNotFoundError: No such file"),
        (OSError(SECRET), "OSError in raised"),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "OutOfMemoryError: CUDA out of memory"),
        (OurError("why"), "OurError: why"),
    ],
)
def test_errors(error: Exception, said: str) -> None:
    def raised() -> None:
        raise error

    with pytest.raises(type(error)):
        raised()
    found = harmless.error(error)
    assert found.replace("test_errors.<locals>.", "").startswith(said)
    assert SECRET not in found
    assert "\n" not in found


def test_an_error_that_was_not_raised() -> None:
    assert harmless.error(ValueError(SECRET)) == "ValueError"
    assert harmless.error(None) == ""
