"""The report as people see it: in Chromium, on a wide and a narrow screen, by day and by night."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.support.browser import chromium
from tests.support.report_page import full_page

WIDE, NARROW = 1440, 390
CHAPTERS = (
    "decision", "results", "flow", "examples", "ids", "codebooks", "training", "data", "configuration"
)  # fmt: skip
# Labels of one chart that lie on each other, or stick out of it; boxes in pixels of the page.
_COLLISIONS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const edge = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([name, a], n) => {
      if (a.left < edge.left - 1 || a.right > edge.right + 1
          || a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
        found.push(`${svg.getAttribute("aria-label")}: "${name}" sticks out`);
      for (const [other, b] of texts.slice(n + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
          found.push(`${svg.getAttribute("aria-label")}: "${name}" lies on "${other}"`);
    });
  }
  return found;
}"""
# Contrast of every text with what is behind it (WCAG 2.2, relative luminance), least first.
_CONTRASTS = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    if (!walker.currentNode.textContent.trim() || !node.getClientRects().length) continue;
    const [a, b] = [light(node.closest("svg") ? style.fill : style.color), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@dataclass
class Screen:
    """The page as it is on one screen, and what the browser said and asked for."""

    page: Page
    width: int
    dark: bool
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def box(self, selector: str) -> dict[str, float]:
        box = self.page.locator(selector).bounding_box()
        assert box is not None, f"{selector} is not visible"
        return dict(box)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_page(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=[(WIDE, False), (NARROW, True)], ids=["wide-light", "narrow-dark"])
def screen(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Screen]:
    width, dark = request.param
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
    )
    found = Screen(page, width, dark)
    page.on("console", lambda message: found.said.append(message.text))
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda asked: found.asked.append(asked.url))
    page.goto(report.as_uri())
    yield found
    page.close()


def pixels(screenshot: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What is drawn, uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"))


def test_nothing_is_asked_for_and_nothing_goes_wrong(screen: Screen, report: Path) -> None:
    assert screen.asked == [report.as_uri()]
    assert screen.said == []
    drawn = "images => images.map(i => [i.complete, i.naturalWidth > 0, i.naturalWidth <= 64])"
    pictures = screen.page.locator("img").evaluate_all(drawn)
    assert len(pictures) > 30
    assert all(map(all, pictures))


def test_every_chapter_is_there_and_fits_the_screen(screen: Screen) -> None:
    shown = screen.page.locator("section").evaluate_all("sections => sections.map(s => s.id)")
    assert tuple(shown) == CHAPTERS
    bottom = 0.0
    for chapter in CHAPTERS:
        box = screen.box(f"#{chapter}")
        assert box["height"] > 60
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= screen.width
        assert box["y"] >= bottom
        bottom = box["y"] + box["height"]
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= screen.width


def test_tables_scroll_on_a_narrow_screen_only(screen: Screen) -> None:
    cut = screen.page.locator(".scroll").evaluate_all(
        "tables => tables.filter(t => t.scrollWidth > t.clientWidth)"
        ".map(t => [t.innerText.slice(0, 60), getComputedStyle(t).overflowX])"
    )
    if screen.width == WIDE:
        assert cut == []
    else:
        assert cut
        assert {overflow for _, overflow in cut} == {"auto"}


def test_charts_have_ink_in_colour(screen: Screen) -> None:
    image = pixels(screen.page.screenshot(full_page=True))
    charts = screen.page.locator("svg")
    assert charts.count() > 8
    for chart in charts.all():
        box = chart.bounding_box()
        assert box is not None
        left, top = round(box["x"]), round(box["y"])
        part = image[top : top + round(box["height"]), left : left + round(box["width"])].astype(int)
        coloured = part.max(2) - part.min(2) > 60  # text and grid are shades of grey
        assert coloured.sum() > 80, chart.get_attribute("aria-label")


def test_labels_of_charts_do_not_collide(screen: Screen) -> None:
    assert screen.page.evaluate(_COLLISIONS) == []


def test_texts_stand_out_from_what_is_behind_them(screen: Screen) -> None:
    found = screen.page.evaluate(_CONTRASTS)
    assert len(found) > 200
    assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
    light = pixels(screen.page.screenshot())[:20].mean()
    assert light < 60 if screen.dark else light > 200


def test_the_explorer_opens_code_by_code(screen: Screen) -> None:
    first = screen.page.locator(".tree > details").first
    below = first.locator(":scope > details").first
    assert not below.is_visible()
    first.locator(":scope > summary").click()
    assert below.is_visible()
    below.locator(":scope > summary").click()
    assert below.locator("p").first.is_visible()
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= screen.width
