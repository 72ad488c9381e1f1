"""A real browser without a window, for pages that are files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds

# Whether all plots are there, and at rest.
DRAWN = "() => window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(d => d.is_idle)"


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """Chromium, by playwright; skips where one of the two is not to be had. In CI they must be."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("no browser: install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        # as root there is no sandbox to be had, and the pages are our own
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def missing(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def opened(browser: Any, file: Path, has_plots: bool = True, script: str = "") -> Iterator[Any]:
    """Open a page, after a script; fail if it asks for anything but itself, or has an error."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("file:", "data:", "blob:")) else wrong.append(asked.url)
        ),
    )
    page.add_init_script(script)
    try:
        page.goto(file.as_uri())
        if has_plots:
            page.wait_for_function(DRAWN, timeout=PATIENCE)
        yield page
        assert wrong == []
    finally:
        page.close()


def numbers(page: Any) -> dict[str, str]:
    """Return the numbers at the top of a page by their names."""
    tiles = page.locator(".tile b").all()
    return {tile.get_attribute("data-name"): tile.inner_text() for tile in tiles}
