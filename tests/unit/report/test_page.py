"""The page as text: what was recorded stays text in it, and it asks nothing of a network or of JavaScript."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from importlib import resources

import pytest

from tests import starts
from vllm_compile_ext.record.phases import PHASES
from vllm_compile_ext.report import facts, page


class Page(HTMLParser):
    """elements: their tags and attributes.  texts: by tag, what is directly in such elements."""

    def __init__(self, made: starts.Recorder, other: starts.Recorder | None = None) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page.render(facts.facts(made.read("now"), other and other.read("before"))))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.elements[-1][0], []).append(data.strip())

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def test_nothing_that_was_recorded_becomes_markup() -> None:
    plain, hostile = Page(starts.cold(), starts.warm()), Page(starts.hostile(), starts.warm())
    known = {(tag, name) for tag, attrs in plain.elements for name in attrs}
    assert {(tag, name) for tag, attrs in hostile.elements for name in attrs} <= known | {("p", "class")}
    assert [hostile.count(tag) for tag in ("script", "style", "title", "h1", "img")] == [2, 1, 1, 1, 0]
    assert starts.HOSTILE in hostile.texts["h1"]
    data = json.loads(hostile.texts["script"][0])
    assert starts.HOSTILE in [span["name"] for process in data["processes"] for span in process["spans"]]


def test_only_its_own_script_runs_and_nothing_is_loaded() -> None:
    made = Page(starts.cold())
    policy = next(attrs["content"] or "" for tag, attrs in made.elements if tag == "meta" and "http-equiv" in attrs)
    script = resources.files("vllm_compile_ext.report").joinpath("page.js").read_bytes()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert policy == (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:")
    assert made.texts["script"][1] == script.decode().strip()
    loaded = [attrs[name] for _, attrs in made.elements for name in ("src", "href") if name in attrs]
    assert loaded == ["data:,"]


def test_the_tables_need_no_javascript() -> None:
    made = Page(starts.cold(), starts.warm())
    assert sum("data-phase" in attrs for _, attrs in made.elements) == 16
    assert ("div", {"id": "timeline", "hidden": None}) in made.elements
    assert made.count("noscript") == 1
    text = " ".join(itertools.chain(*made.texts.values()))
    for part in ("loaded 81 pieces of b818f53c0d22", starts.KEY, "compile", "-tensor-parallel-size 2", "H100"):
        assert part in text


def contrast(one: str, other: str) -> float:
    """By WCAG 2."""
    lights = []
    for colour in (one, other):
        parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        lights.append(0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    style = resources.files("vllm_compile_ext.report").joinpath("page.css").read_text()
    pairs = re.findall(r"--([a-z-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colours = {name: (light, dark)[scheme] for name, light, dark in pairs}
    texts = [("bad", "bad-bg"), ("text", "bad-bg"), ("text", "shade")]
    texts += itertools.product(("text", "muted", "accent", "bad", "good"), ("bg", "card"))
    for text, behind in texts:
        assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for phase, both in PHASES.items():
        assert contrast(colours["on"], both[scheme]) >= 4.5, phase
        assert contrast(both[scheme], colours["card"]) >= 3, phase
        assert contrast("#101010", both[1]) >= 4.5, f"{phase} on a terminal"
