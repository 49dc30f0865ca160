"""A headless Chromium of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _executable(playwright: Playwright) -> str:
    """The system's browser, or the one that `playwright install` put in its place."""
    own = shutil.which(playwright.chromium.executable_path)
    found = next(filter(None, map(shutil.which, NAMES)), own)
    if found is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or `playwright install chromium`")
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, gone with the block."""
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, which is what containers of CI do; the page is our own.
        browser = playwright.chromium.launch(
            executable_path=_executable(playwright), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()
