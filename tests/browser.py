"""Chromium for tests, and a page that records its errors."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
CHROMIUM = (
    os.environ.get("CHROMIUM")
    or next(filter(None, map(shutil.which, PROGRAMS)), None)
    or (str(MAC) if MAC.is_file() else None)
)
needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium: install it, or name the program in $CHROMIUM"
)
# Chromium itself must fetch nothing and show nothing.
QUIET = (
    "--disable-gpu", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
SCREENSHOTS = Path(__file__).resolve().parents[1] / "build/screenshots"


@contextmanager
def chromium():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


# Badges, the only things that a page may fetch; and pictures attached to a cell, which JupyterLab
# asks for before it replaces their addresses.
BADGES = ("https://colab.research.google.com/assets/", "https://mybinder.org/badge_logo.svg")
ATTACHED = "attachment:"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="100" height="20"/>'


@contextmanager
def new_page(browser, timeout=60):
    """A page cut off from the network, and the list of the errors on it.

    Errors are exceptions, console errors, failed requests and requests to anywhere else than this
    machine. Badges are answered with an empty picture.
    """
    errors = []

    def elsewhere(route):
        if route.request.url.startswith((*BADGES, ATTACHED)):
            route.fulfill(content_type="image/svg+xml", body=SVG)
        else:
            route.abort()

    def failed(request):
        if not request.url.startswith(ATTACHED):
            errors.append(f"request: {request.url} {request.failure}")

    page = browser.new_page(viewport={"width": 1300, "height": 950})
    page.set_default_timeout(1000 * timeout)
    page.route(re.compile(r"^(?!https?://127\.0\.0\.1|file:|data:|blob:)"), elsewhere)
    page.on("pageerror", lambda error: errors.append(f"exception: {error}"))
    page.on("console", lambda m: errors.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("requestfailed", failed)
    yield page, errors
    page.close()


def keep(page, name):
    """Save a screenshot of the page in build/screenshots."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
