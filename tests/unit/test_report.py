"""Charts, run log and the page: complete, escaped, self-contained."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.report.run_log import duration, read_curves, read_seconds
from qbrec.report.svg import (
    Interval,
    Series,
    bar_chart,
    grouped_bar_chart,
    interval_chart,
    line_chart,
    number,
    ticks,
)

PICTURE = r"data:image/webp;base64,[A-Za-z0-9+/]+=*"
EVIL = '<script>alert("1")</script>&\'x'


def parse(figure: str) -> ET.Element:
    """A figure is well-formed XML, or this raises."""
    return ET.fromstring(figure)


class TestTicks:
    @settings(max_examples=300, deadline=None)
    @given(st.floats(-1e9, 1e9, allow_nan=False), st.floats(0, 1e9, allow_nan=False), st.integers(2, 8))
    def test_enclose_and_are_few(self, low: float, width: float, count: int) -> None:
        if 0 < width < 1e-6 * max(1.0, abs(low)):
            width = 0.0  # closer than a chart can show
        found = ticks(low, low + width, count=count)
        slack = 1e-6 * max(1.0, abs(low), width)
        assert found[0] <= low + slack
        assert found[-1] >= low + width - slack
        assert 2 <= len(found) <= 2 * count + 3

    def test_numbers(self) -> None:
        assert [number(v) for v in (0.12345, 12345, 2_500_000, float("nan"))] == [
            "0.1235",
            "12.35k",
            "2.5M",
            "–",
        ]


class TestCharts:
    def test_escape_and_well_formed(self) -> None:
        figures = [
            line_chart([Series(EVIL, [(0, 1), (1, 2)]), Series("b", [(0, 3)])], title=EVIL, x_label="x"),
            bar_chart([EVIL, "b"], [1.0, 2.0], title=EVIL, x_label=EVIL),
            grouped_bar_chart(["a"], {EVIL: [1.0], "c": [2.0]}, title=EVIL, x_label=EVIL),
            interval_chart([Interval(EVIL, 0.2, 0.1, 0.3, strong=True)], title=EVIL, x_label=EVIL),
        ]
        for figure in figures:
            assert "<script" not in figure
            assert EVIL in "".join(parse(figure).itertext())

    def test_long_curves_stay_small_and_nan_is_left_out(self) -> None:
        points = [(float(i), float("nan") if i % 7 == 0 else i * 0.5) for i in range(50_000)]
        figure = line_chart([Series("loss", points)], title="loss", x_label="step")
        assert len(figure) < 20_000
        assert "nan" not in figure

    def test_nothing_to_draw(self) -> None:
        assert line_chart([Series("a", [])], title="t", x_label="x") == ""
        assert bar_chart([], [], title="t", x_label="x") == ""
        assert grouped_bar_chart([], {"a": [], "b": []}, title="t", x_label="x") == ""
        assert interval_chart([], title="t", x_label="x") == ""

    def test_constant_curve(self) -> None:
        parse(line_chart([Series("a", [(1, 0.0), (2, 0.0)])], title="t", x_label="x"))

    def test_bar_heights_are_proportional(self) -> None:
        root = parse(bar_chart(["a", "b"], [2.0, 4.0], title="t", x_label="x"))
        heights = [float(bar.get("height", "0")) for bar in root.iter("rect")]
        assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)

    def test_bars_of_a_group_stand_side_by_side(self) -> None:
        groups = {"ours": [4.0, 1.0], "theirs": [2.0, -1.0]}
        root = parse(grouped_bar_chart(["a", "b"], groups, title="t", x_label="x"))
        bars = [
            {key: float(bar.get(key, "")) for key in ("x", "width", "height")} for bar in root.iter("rect")
        ]
        heights = [bar["height"] for bar in bars]
        assert heights[0] > 0
        assert [height / heights[0] for height in heights] == pytest.approx([1, 0.5, 0.25, 0], abs=0.01)
        edges = [(bar["x"], bar["x"] + bar["width"]) for bar in bars]
        assert all(left[1] <= right[0] + 0.11 for left, right in pairwise(edges))
        assert {key.text for key in root.iter("span")} == {"ours", "theirs"}

    def test_a_curve_can_start_from_zero(self) -> None:
        lowest = {
            flag: min(
                float(text.text or "")
                for text in parse(
                    line_chart([Series("a", [(0, 80.0), (1, 90.0)])], title="t", x_label="x", from_zero=flag)
                ).iter("text")
                if text.get("text-anchor") == "end"
            )
            for flag in (True, False)
        }
        assert lowest == {True: 0.0, False: 80.0}


class TestRunLog:
    def test_last_word_counts_and_half_lines_do_not(self, tmp_path: Path) -> None:
        lines = [
            json.dumps({"time": 1, "stage": "fusion", "step": step, "metrics": {"loss": value}})
            for step, value in ((10, 3.0), (5, 2.0), (10, 1.0))
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"time": 1, "sta')
        assert read_curves(tmp_path) == {"fusion": {"loss": [(5.0, 2.0), (10.0, 1.0)]}}

    def test_seconds(self, tmp_path: Path) -> None:
        assert read_seconds(tmp_path) == {}
        (tmp_path / "run.json").write_text('{"stages": {"fusion": {"key": "k", "seconds": 12.5}}}')
        assert read_seconds(tmp_path) == {"fusion": 12.5}

    def test_duration(self) -> None:
        texts = [duration(s) for s in (0.2, 42, 185, 7800)]
        assert texts == ["200 ms", "42.0 s", "3 min 05 s", "2 h 10 min"]


class Links(HTMLParser):
    """Collects everything a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            inside = name == "href" and (value or "").startswith("#")
            inside |= tag == "img" and name == "src" and re.fullmatch(PICTURE, value or "") is not None
            if (name in ("src", "href", "srcset", "data", "action") and not inside) or name.startswith("on"):
                self.outside.append(f"{tag} {name}={value}")


def assert_self_contained(html: str) -> None:
    links = Links()
    links.feed(html)
    assert links.outside == []
    assert not {"script", "iframe", "object", "embed", "link"} & set(links.tags)
    assert not re.search(r"url\(|@import", html)
    anchors = set(re.findall(r'href="#([^"]+)"', html))
    assert anchors == set(re.findall(r'<section id="([^"]+)"', html))
