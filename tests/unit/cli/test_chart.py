from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_compile_ext.cli.bench import chart
from vllm_compile_ext.cli.bench.figures import Summary

MADE = [
    Summary("cold", "stock", "ready", 120, 100, 155, 3),
    Summary("cold", "ours", "ready", 31, 30, 33, 3),
    Summary("warm", "stock", "ready", 85, 85, 85, 1),
    Summary("warm", "ours", "ready", 35, 35, 35, 1),
]
TITLE = "vllm serve <m> & $more$: ready"


def test_an_svg_shows_every_bar_and_all_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart.write(tmp_path / "x.svg", MADE, TITLE, ["machine"])
    text = [element.text for element in ElementTree.parse(tmp_path / "x.svg").iter() if element.text]
    for part in (TITLE, "120.0 s (100.0-155.0)", "31.0 s (30.0-33.0)", "85.0 s", "35.0 s", "cold, stock", "machine"):
        assert part in text


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart.write(tmp_path / "x.png", MADE, TITLE, ["machine"])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(chart.ChartError, match=r"pip install \"vllm-compile-ext\[chart\]\""):
        chart.check(Path("x.svg"))
    with pytest.raises(chart.ChartError, match=r"ends in \.svg or \.png, and x\.gif does not"):
        chart.check(Path("x.gif"))
