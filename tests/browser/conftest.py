"""The page in Debian's Chromium, through Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import starts
from vllm_compile_ext.record import read
from vllm_compile_ext.report import facts
from vllm_compile_ext.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    # Chromium's sandbox does not start for root, as in containers; the page is ours.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a start's page; whatever it says on the console, and any request it makes, fails the test at its end."""
    said: list[str] = []
    contexts = []

    def open_page(
        made: starts.Recorder | bytes, other: starts.Recorder | None = None, *, width: int = 1280, scheme: str = "light"
    ) -> Any:
        name = "20261118-120640-77a0c3"
        start = read.parse(made.splitlines(), name) if isinstance(made, bytes) else made.read(name)
        before = other and other.read("20261118-110640-4bf92f")
        path = tmp_path / "page.html"
        path.write_text(render(facts.facts(start, before)), encoding="utf-8", errors="replace")
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_function("document.getElementById('view').dataset.b")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
