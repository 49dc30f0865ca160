"""The chapter about the codebooks: the tree of IDs against brute force, its size, escaping, the charts."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.quantizer import stage
from qbrec.report.blocks import Block, Branch, Section
from qbrec.report.codebooks import codebooks
from qbrec.report.id_tree import TITLES, count_codes, id_tree
from qbrec.report.page import _render
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.clusters import clustered
from tests.support.quantizer_inputs import quantizer_inputs
from tests.unit.test_report import EVIL, assert_self_contained

LETTERS = "abcd"


def page(section: Section) -> str:
    return _render(
        title="t", subtitle="", tiles=[], sections=[section], contents=[(section.id, section.name)], footer=""
    )


def walk(branches: list[Branch], above: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Branch]]:
    for branch in branches:
        letter, code = branch.code.split("_")
        assert letter == LETTERS[len(above)]
        codes = (*above, int(code))
        yield codes, branch
        yield from walk(list(branch.branches), codes)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 300),
    depth=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)),
    max_bytes=st.sampled_from([1500, 10_000, 10**9]),
)
def test_the_tree_equals_brute_force(
    seed: int, count: int, depth: int, widths: tuple[int, ...], max_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = (rng.random((count, depth)) ** 2 * 7).astype(np.uint8)
    popularity = rng.integers(0, 5, count)
    tree = id_tree(
        ids,
        {},
        popularity=popularity,
        names_of=lambda rows: [f"item {row}" for row in rows],
        widths=widths,
        max_bytes=max_bytes,
    )
    found = dict(walk(list(tree.branches)))
    assert tree.shown == len(found)
    for codes, branch in found.items():
        inside = np.flatnonzero((ids[:, : len(codes)] == codes).all(1))
        assert branch.count == len(inside)
        best = sorted(inside, key=lambda row: (-popularity[row], row))[:TITLES]
        assert list(branch.titles) == [f"item {row}" for row in best]
    for above in [(), *found]:
        inside = ids[(ids[:, : len(above)] == above).all(1)]
        shown = list(found[above].branches) if above else list(tree.branches)
        counts = [branch.count for branch in shown]
        assert counts == sorted(counts, reverse=True)
        if len(above) >= min(depth, 3):
            assert not shown
            continue
        in_use = np.bincount(inside[:, len(above)])
        in_use = np.sort(in_use[in_use > 0])[::-1]
        assert counts == in_use[: len(counts)].tolist(), "the largest are shown"
        assert len(counts) <= widths[len(above)]
        if max_bytes == 10**9:
            assert len(counts) == min(widths[len(above)], len(in_use))
        hidden = (len(in_use) - len(counts), len(inside) - sum(counts))
        told = found[above].more if above else tree.left_out
        figures = tuple(int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", told))
        assert figures == (hidden if hidden[0] else ())


def test_words_are_those_that_no_prefix_above_has_said() -> None:
    labels = {"1": ["paint", "art"], "1.2": ["paints", "acrylic", "arts", "set", "kids", "wide"], "1.2.0": []}
    ids = np.array([[1, 2, 0]], np.uint8)
    tree = id_tree(ids, labels, popularity=np.zeros(1, np.int64), names_of=lambda rows: ["x"] * len(rows))
    (root,) = tree.branches
    assert root.words == "paint, art"
    assert root.branches[0].words == "acrylic, set, kids"
    assert root.branches[0].branches[0].words == ""


def test_counts_are_those_of_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qbrec.report.id_tree._AT_ONCE", 7)
    ids = np.random.default_rng(0).integers(0, 9, (100, 2)).astype(np.uint16)
    assert count_codes(ids, 1, 12).tolist() == np.bincount(ids[:, 1], minlength=12).tolist()


@pytest.mark.parametrize("name", ["short", EVIL * 4, "“ö–日本語”" * 9])
def test_the_tree_never_outgrows_its_share_of_the_page(name: str) -> None:
    rng = np.random.default_rng(0)
    count, budget = 60_000, 300_000
    ids = rng.integers(0, 100, (count, 4)).astype(np.uint8)
    labels = {str(code): [f"{name} {word}" for word in range(5)] for code in range(100)}
    tree = id_tree(
        ids,
        labels,
        popularity=rng.integers(0, 9, count),
        names_of=lambda rows: [f"{row} {name}" for row in rows],
        max_bytes=budget,
    )
    empty = len(page(Section("x", "x")).encode())
    size = len(page(Section("x", "x", blocks=(Block(tree=tree.branches),))).encode()) - empty
    assert 0.5 * budget < size < budget


class Details(HTMLParser):
    """Depth and number of the foldable parts; every one is closed again."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = self.deepest = self.count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            self.depth += 1
            self.count += 1
            self.deepest = max(self.deepest, self.depth)

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "details"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("report")
    titles = [EVIL if row % 3 else f"Drum {row % 7} & sticks" for row in range(900)]
    store = ArtifactStore(folder)
    inputs = quantizer_inputs(store, clustered(900, 8), titles=list(titles))
    ctx = StageContext.local(store, folder / "runs" / "x", stage="quantizer", key="2" * 64, seed=1)
    fixed = {
        "levels": [8, 8, 8],
        "iterations": 5,
        "collisions": "none",
        "quality": {"max_collision_rate": 1.0},
    }
    return {**inputs, "quantizer": stage.run(ctx, parse_config({"quantizer": fixed}), inputs)}


def test_the_chapter_is_complete_and_escaped(artifacts: dict[str, Artifact]) -> None:
    section = codebooks(artifacts)
    assert section is not None
    html = page(section)
    assert_self_contained(html)
    figures = [ET.fromstring(figure) for figure in re.findall(r"<figure>.*?</figure>", html, re.S)]
    captions = [figure.findtext("figcaption") for figure in figures]
    assert captions == [
        "Items per code, most used first",
        "Perplexity as a share of the codes",
        "Variance left after each level",
        "Mean cosine of two items",
        "Items by contents on their ID",
        "Different prefixes",
    ]
    assert "<script" not in html
    assert "&lt;script&gt;alert" in html
    assert "Drum" in html
    details = Details()
    details.feed(html)
    assert details.depth == 0
    assert details.deepest == 2
    assert details.count > 8
    quality = artifacts["quantizer"].load_json("quality.json")
    for value in (quality["unique_ids"], quality["raw"]["unique_ids"], quality["largest_bucket"]):
        assert f">{value:,}<" in html
    for level in quality["levels"]:
        assert f"{level['r2_held_out']:.3f}" in html


def test_a_run_with_fewer_figures_is_shown_without_them(
    artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Artifact.load_json

    def older(self: Artifact, name: str) -> object:
        document = load(self, name)
        if name != "quality.json":
            return document
        names = ("codes", "used", "dead", "perplexity", "largest_share")
        levels = [{key: level[key] for key in names} for level in document["levels"]]
        return json.loads(json.dumps({"levels": levels, "unique_ids": document["unique_ids"]}))

    monkeypatch.setattr(Artifact, "load_json", older)
    section = codebooks(artifacts)
    assert section is not None
    html = page(section)
    assert html.count("<svg") == 2
    assert "Perplexity" in html
    assert "R²" not in html


def test_nothing_without_a_quantizer(artifacts: dict[str, Artifact]) -> None:
    assert codebooks({"catalog": artifacts["catalog"]}) is None
