"""The page does what it offers, on a desk and on a phone, by light and in the dark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import starts

Opened = Callable[..., Any]

PHONE = 390

# Contrast of each element's own text with what is behind it, by WCAG 2; hatched and empty elements are left out.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    const style = getComputedStyle(node);
    if (!text || !node.getClientRects().length || style.backgroundImage !== "none") continue;
    const name = `${node.tagName}.${node.className}: ${text.slice(0, 40)}`;
    found.push([ratio(light(rgba(style.color)), light(behind(node))), name]);
  }
  return found;
}"""


def shown(page: Any) -> tuple[float, float]:
    """The seconds that the timeline shows, after it was drawn again."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    view = page.locator("#view")
    return float(view.get_attribute("data-a")), float(view.get_attribute("data-b"))


def settled(page: Any) -> float:
    """How many seconds it shows."""
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


def test_without_javascript(opened: Opened, browser: Any) -> None:
    url = opened(starts.cold()).url
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert page.locator(".phases tbody tr").count() == 15
    assert page.locator("noscript").is_visible()
    assert not page.locator("#timeline").is_visible()
    context.close()


def test_filter(opened: Opened) -> None:
    page = opened(starts.cold())
    everything = names(page)
    page.fill("#filter", "Load")
    settled(page)
    assert set(names(page)) < set(everything)
    assert {"Load model"} <= set(names(page))
    assert "Capture model" not in names(page)
    hits, of = page.inner_text("#hits").removesuffix(" spans").split(" of ")
    assert 0 < int(hits) < int(of)
    page.locator("details > summary").click()
    assert page.locator("#spans tbody tr").count() == int(hits)
    page.fill("#filter", "no such span")
    settled(page)
    assert names(page) == []
    assert page.inner_text("#hits") == f"0 of {of} spans"
    page.fill("#filter", "")
    settled(page)
    assert names(page) == everything


def test_filter_by_phase(opened: Opened) -> None:
    page = opened(starts.cold())
    page.get_by_role("button", name="graph capture").click()
    settled(page)
    assert page.input_value("#filter") == "phase:graph capture"
    assert names(page) == ["Capture model", "Capture model"]
    page.get_by_role("button", name="graph capture").click()
    assert page.input_value("#filter") == ""


def test_zoom_buttons(opened: Opened) -> None:
    page = opened(starts.cold())
    whole = settled(page)
    page.get_by_role("button", name="Zoom in").click()
    assert settled(page) == pytest.approx(whole / 2)
    a, _ = shown(page)
    page.get_by_role("button", name="Move right").click()
    assert shown(page)[0] == pytest.approx(a + 0.3 * whole / 2)
    page.get_by_role("button", name="Move left").click()
    assert shown(page)[0] == pytest.approx(a)
    for _ in range(40):  # to its end, and not beyond
        page.get_by_role("button", name="Zoom in").click()
    assert 0 < settled(page) < 1e-3
    page.get_by_role("button", name="All").click()
    assert shown(page) == pytest.approx((0, whole))
    page.get_by_role("button", name="Zoom out").click()
    assert settled(page) == pytest.approx(whole)


def test_zoom_keys(opened: Opened) -> None:
    page = opened(starts.cold())
    whole = settled(page)
    page.locator("#view").focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert settled(page) == pytest.approx(whole / 4)
    a, _ = shown(page)
    page.keyboard.press("ArrowRight")
    assert shown(page)[0] > a
    page.keyboard.press("0")
    assert settled(page) == pytest.approx(whole)
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#detail strong") == "start"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.inner_text("#detail strong") == "interpreter"
    assert settled(page) < 0.1
    page.keyboard.press("Escape")
    assert page.locator("#detail strong").count() == 0


def test_wheel(opened: Opened) -> None:
    page = opened(starts.cold())
    whole = settled(page)
    box = page.locator("#lanes").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40)
    page.mouse.wheel(0, 200)  # of the page: it scrolls
    assert settled(page) == pytest.approx(whole)
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
    page.locator(".bar", has_text="Load model").first.dblclick()
    assert settled(page) < 20
    assert "shard 2/6" in names(page)


def test_phone(opened: Opened) -> None:
    page = opened(starts.cold(), starts.warm(), width=PHONE)
    assert overflow(page) == []
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


@pytest.mark.parametrize("made", [starts.crashed, starts.damaged, lambda: starts.cold(model="x" * 200)])
def test_phone_of_others(opened: Opened, made: Callable[[], Any]) -> None:
    assert overflow(opened(made(), width=PHONE)) == []


def test_dark(opened: Opened) -> None:
    def colours(scheme: str) -> set[str]:
        page = opened(starts.cold(), scheme=scheme)
        return set(
            page.evaluate(
                """() => ["body", ".tile", ".bar", "#view"].map((n) => {
                const style = getComputedStyle(document.querySelector(n));
                return n + style.backgroundColor + style.color; })"""
            )
        )

    assert colours("light").isdisjoint(colours("dark"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("made", [starts.cold, starts.crashed])
def test_contrast(opened: Opened, made: Callable[[], starts.Recorder], scheme: str) -> None:
    page = opened(made(), starts.warm(), scheme=scheme)
    page.locator("details > summary").click()
    found = page.evaluate(CONTRAST)
    assert len(found) > 150
    assert [text for ratio, text in found if ratio < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_every_phase(opened: Opened, scheme: str) -> None:
    from vllm_compile_ext.record.phases import PHASES

    made = starts.Recorder()
    made.start(0)
    for number, phase in enumerate((*PHASES, "a phase of another version")):
        made.span(None, 7, f"span of {phase}", number, number + 1, phase)
    made.line("ready", len(PHASES) + 1)
    page = opened(made, scheme=scheme)
    found = [(ratio, text) for ratio, text in page.evaluate(CONTRAST) if "bar" in text]
    assert len(found) > len(PHASES)
    assert [text for ratio, text in found if ratio < 4.5] == []
    # The bars themselves stand out from what they lie on.
    bars = page.evaluate(CONTRAST.replace("rgba(style.color)", "behind(node.parentElement)"))
    assert [text for ratio, text in bars if ".bar" in text and ratio < 3 and "plain" not in text] == []


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
    evil = (
        '</script><script>alert(1)</script><img src="https://example.invalid/x" onerror=alert(2)>{{script}}\u2028<!--'
    )
    made = starts.cold(model=evil)
    made.line(
        "span", 1, id="e", parent=None, pid=9, name=evil, end=made.at(9), attrs={"phase": evil, evil: evil}, error=evil
    )
    made.line("process", 1, pid=9, ppid=1, kind=evil, name=evil, argv=[evil], host=evil, rank=None)
    made.note(1, 9, "miss", summary=evil, closest=evil, changes=[[evil, evil, evil]])
    made.note(1, 9, "key", key=evil, shard=evil)
    made.note(1, 9, evil, **{evil: evil})
    made.line("exit", 80, pid=9, error=evil)
    page = opened(made, starts.warm())
    assert page.locator("h1").inner_text().startswith(evil.replace("\u2028", "\n")[:40])
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    page.locator(".lane:not(.path) .bar", has_text="alert(1)").first.click()
    assert "alert(2)" in page.inner_text("#detail")
    page.fill("#filter", evil[:20])
    settled(page)
    assert page.locator("script").count() == 2


def test_a_surrogate_and_a_number_that_is_none(opened: Opened) -> None:
    made = starts.cold(model="bad \ud800 name")
    made.span(None, 9, "\udfff", 1, 2, "weights", rate=float("nan"))
    opened(made)


def test_policy(opened: Opened) -> None:
    page = opened(starts.cold())
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]


@pytest.mark.parametrize("content", [b'{"k":"start","t":1795000000000000000}\n', starts.damaged()])
def test_little_is_known(opened: Opened, content: bytes) -> None:
    page = opened(content)
    assert page.locator("h1").is_visible()


def test_many_spans(opened: Opened) -> None:
    """A page of 20 000 spans opens and zooms without a wait that one would notice."""
    made = starts.Recorder()
    made.start(0)
    root = made.begin_span(None, 7, "start", 0, "weights")
    for number in range(20_000):
        made.span(root, 7, f"tensor {number}", number / 200, number / 200 + 0.004, "weights")
    made.end_span(root, 100)
    made.line("ready", 100)
    page = opened(made)
    assert page.locator(".bar").count() < 3000
    for _ in range(5):
        page.get_by_role("button", name="Zoom in").click()
    took = page.evaluate(
        """async () => { const begin = performance.now(); document.getElementById("in").click();
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        return performance.now() - begin; }"""
    )
    assert took < 1000
