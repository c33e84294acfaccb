"""The page does what it offers, on a desk and on a phone, by light and in the dark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import starts

Opened = Callable[..., Any]

PHONE = 390


def shown(page: Any) -> tuple[float, float]:
    """The seconds that the timeline shows, after it was drawn again."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    view = page.locator("#view")
    return float(view.get_attribute("data-a")), float(view.get_attribute("data-b"))


def width(page: Any) -> float:
    """How many seconds the timeline shows."""
    a, b = shown(page)
    return b - a


def names(page: Any) -> list[str]:
    found: list[str] = page.locator(".lane:not(.path) .bar:not(.dim)").all_inner_texts()
    return [name for name in found if name]


def overflow(page: Any) -> list[str]:
    """What is wider than the window."""
    found: list[str] = page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
        .filter((n) => n.getBoundingClientRect().right > innerWidth && !n.closest("#view"))
        .map((n) => n.outerHTML.slice(0, 80))"""
    )
    return found


def test_opens(opened: Opened) -> None:
    page = opened(starts.cold())
    assert page.title() == "meta-llama/Llama-3.3-70B-Instruct: start 20261118-120640-77a0c3"
    heads = page.locator(".lane-title").all_inner_texts()
    assert heads[0] == "What the start waited for"
    assert len(heads) == 5
    assert {"imports", "Load model", "Capture model"} <= set(names(page))
    assert page.locator("h2").all_inner_texts() == [
        "Timeline",
        "Phases",
        "Compiled, loaded, captured",
        "Cache key and misses",
        "Processes",
        "Spans",
        "Versions and options",
    ]
    assert page.locator(".mark b").all_inner_texts() == ["ready", "first token"]


def test_filter(opened: Opened) -> None:
    page = opened(starts.cold())
    everything = names(page)
    page.fill("#filter", "Load")
    width(page)
    assert set(names(page)) < set(everything)
    assert {"Load model"} <= set(names(page))
    assert "Capture model" not in names(page)
    hits, of = page.inner_text("#hits").removesuffix(" spans").split(" of ")
    assert 0 < int(hits) < int(of)
    page.locator("details > summary").click()
    assert page.locator("#spans tbody tr").count() == int(hits)
    page.fill("#filter", "no such span")
    width(page)
    assert names(page) == []
    assert page.inner_text("#hits") == f"0 of {of} spans"
    page.fill("#filter", "")
    width(page)
    assert names(page) == everything


def test_filter_by_phase(opened: Opened) -> None:
    page = opened(starts.cold())
    page.get_by_role("button", name="graph capture").click()
    width(page)
    assert page.input_value("#filter") == "phase:graph capture"
    assert names(page) == ["Capture model", "Capture model"]
    page.get_by_role("button", name="graph capture").click()
    assert page.input_value("#filter") == ""


def test_zoom_and_move(opened: Opened) -> None:
    page = opened(starts.cold())
    whole = width(page)
    page.get_by_role("button", name="Zoom in").click()
    assert width(page) == pytest.approx(whole / 2)
    a, _ = shown(page)
    page.get_by_role("button", name="Move right").click()
    assert shown(page)[0] == pytest.approx(a + 0.3 * whole / 2)
    page.get_by_role("button", name="Move left").click()
    assert shown(page)[0] == pytest.approx(a)
    page.locator("#view").focus()
    page.keyboard.press("+")
    assert width(page) == pytest.approx(whole / 4)
    a, _ = shown(page)
    page.keyboard.press("ArrowRight")
    assert shown(page)[0] > a
    for _ in range(40):  # to its end, and not beyond
        page.keyboard.press("+")
    assert 0 < width(page) < 1e-3
    page.get_by_role("button", name="All").click()
    assert shown(page) == pytest.approx((0, whole))
    page.get_by_role("button", name="Zoom out").click()
    assert width(page) == pytest.approx(whole)


def test_keys_step_from_span_to_span(opened: Opened) -> None:
    page = opened(starts.cold())
    page.locator("#view").focus()
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#detail strong") == "start"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail strong") == "interpreter"
    assert width(page) < 0.1
    page.keyboard.press("Escape")
    assert page.locator("#detail strong").count() == 0


def test_wheel(opened: Opened) -> None:
    page = opened(starts.cold())
    whole = width(page)
    box = page.locator("#lanes").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
    page.mouse.wheel(0, 200)  # of the page: it scrolls
    assert width(page) == pytest.approx(whole)
    page.wait_for_function("scrollY > 0")
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function(f"view.dataset.b - view.dataset.a < {whole * 0.6}")
    a, b = shown(page)
    assert (whole / 4 - a) / (b - a) == pytest.approx(0.25, abs=0.01)  # what the pointer is at stays there


def test_drag_and_click(opened: Opened) -> None:
    page = opened(starts.cold())
    page.get_by_role("button", name="Zoom in").click()
    a, b = shown(page)
    box = page.locator("#lanes").bounding_box()
    page.mouse.move(box["x"] + 600, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 60, steps=3)
    page.mouse.up()
    assert shown(page)[0] == pytest.approx(a + 100 / box["width"] * (b - a), rel=0.01)
    assert page.locator("#detail strong").count() == 0  # it was no click
    page.get_by_role("button", name="All").click()
    page.locator(".bar", has_text="Load model").first.click()
    assert page.inner_text("#detail strong") == "Load model"
    assert "weights · worker 0" in page.inner_text("#detail")
    page.locator(".lane.path .bar", has_text="weights").click()
    assert "12.6 s · what the start waited for" in page.inner_text("#detail")
    # On a busy machine two clicks are no double click: half a second lies between them.
    page.locator(".bar", has_text="Load model").first.dispatch_event("dblclick")
    assert width(page) < 20
    assert "shard 2/6" in names(page)


MADE = [starts.cold, starts.crashed, starts.damaged, lambda: starts.cold(model="x" * 200)]


@pytest.mark.parametrize("made", MADE, ids=["cold", "crashed", "damaged", "long"])
def test_phone(opened: Opened, made: Callable[[], Any]) -> None:
    page = opened(made(), starts.warm(), width=PHONE)
    page.locator("details > summary").click()
    assert overflow(page) == []
    for button in page.locator(".toolbar button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 40
    small = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
        .filter((n) => n.textContent.trim() && n.getClientRects().length)
        .filter((n) => parseFloat(getComputedStyle(n).fontSize) < 11).map((n) => n.outerHTML.slice(0, 80))"""
    )
    assert small == []


@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")])
def test_light_and_dark(opened: Opened, scheme: str, background: str) -> None:
    page = opened(starts.cold(), scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background


def test_accessible(opened: Opened) -> None:
    page = opened(starts.cold(), starts.warm())
    assert page.locator("html").get_attribute("lang") == "en"
    tree = page.locator("body").aria_snapshot()
    assert 'searchbox "Filter spans"' in tree
    assert 'group "Timeline of the start, by process"' in tree
    assert page.evaluate(
        "() => [...document.querySelectorAll('button')].every((b) => b.ariaLabel || b.textContent.trim())"
    )
    assert (
        page.evaluate("() => new Set([...document.querySelectorAll('[id]')].map((n) => n.id)).size")
        == page.locator("[id]").count()
    )
    page.keyboard.press("Tab")  # everything is reached without a mouse, and is seen to be
    reached = []
    for _ in range(40):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
    assert reached[:7] == ["filter", "left", "right", "out", "in", "reset", "view"]
    assert reached[-1] == "SUMMARY"


def test_nothing_is_run_that_was_recorded(opened: Opened) -> None:
    """Whatever a name or an error holds, it is text."""
    page = opened(starts.hostile(), starts.warm())
    page.locator(".lane:not(.path) .bar", has_text="alert(1)").first.click()
    assert "alert(2)" in page.inner_text("#detail")
    page.fill("#filter", starts.HOSTILE[:20])
    width(page)
    assert page.locator("script").count() == 2
    assert page.locator("img, [onfocus]").count() == 0


@pytest.mark.parametrize("content", [b'{"k":"start","t":1795000000000000000}\n', starts.damaged()])
def test_little_is_known(opened: Opened, content: bytes) -> None:
    page = opened(content)
    assert page.locator("h1").is_visible()


def test_many_spans(opened: Opened) -> None:
    """A page of 20 000 spans draws only what can be told apart."""
    made = starts.Recorder()
    made.start(0)
    root = made.begin_span(None, 7, "start", 0, "weights")
    for number in range(20_000):
        made.span(root, 7, f"tensor {number}", number / 200, number / 200 + 0.004, "weights")
    made.end_span(root, 100)
    made.line("ready", 100)
    page = opened(made)
    assert page.locator(".bar").count() < 3000
    for _ in range(10):
        page.get_by_role("button", name="Zoom in").click()
    assert width(page) == pytest.approx(0.1, abs=0.01)
    assert page.locator(".bar", has_text="tensor").count() > 15
