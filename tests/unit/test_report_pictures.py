"""Pictures on the page: from every form of input, drawn anew, bounded, and never a reason to fail."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qbrec.config import RootConfig, parse_config
from qbrec.report import pictures
from qbrec.report.pictures import SIDE, Thumbnails, thumbnails
from qbrec.storage.catalog_view import CatalogView
from tests.support.grown_shop import draw, write_catalog
from tests.support.report_page import picture, write_items

COUNT = 120


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> CatalogView:
    return CatalogView(write_catalog(tmp_path_factory.mktemp("catalog"), draw(COUNT, "i", seed=1)))


def config(items: str, **image: Any) -> RootConfig:
    domains = {"shop": {"items": items, "interactions": "-"}}
    return parse_config({"data": {"domains": domains}, "catalog": {"image": image}})


def shown(found: Thumbnails, row: int) -> Image.Image:
    uri = found.of(row)
    assert uri is not None
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def apart(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures of one size, of 255."""
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def names(catalog: CatalogView) -> list[str]:
    return catalog.item_ids(np.arange(COUNT))


def test_each_item_has_its_own_picture(catalog: CatalogView, tmp_path: Path) -> None:
    ids = names(catalog)
    forms = ("PNG", "JPEG", "WEBP", "GIF")
    encoded = {name: picture(n, form=forms[n % 4]) if n % 3 else None for n, name in enumerate(ids)}
    place = write_items(tmp_path / "items.parquet", dict(reversed(encoded.items())))
    rows = [5, 0, 118, 5, 61]
    found = thumbnails(config(place), catalog, rows)
    assert set(found.uris) == {5, 118, 61}
    assert found.of(0) == ""
    assert found.note == ""
    for row in found.uris:
        small = shown(found, row)
        assert max(small.size) == SIDE
        assert small.width / small.height == pytest.approx(120 / 80, abs=0.03)
        own = Image.open(io.BytesIO(picture(row))).convert("RGB").resize(small.size)
        assert apart(small, own) < 25
        assert all(apart(small, shown(found, other)) > 25 for other in found.uris if other != row)


def test_lists_and_paths(catalog: CatalogView, tmp_path: Path) -> None:
    first, second, third, fourth = names(catalog)[:4]
    lists = {first: [None, b"", picture(1), picture(2)], second: [], third: None}
    found = thumbnails(config(write_items(tmp_path / "lists.parquet", lists)), catalog, [0, 1, 2])
    assert set(found.uris) == {0}
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.png").write_bytes(picture(3))
    (tmp_path / "outside.png").write_bytes(picture(4))
    paths = {
        first: "a.png",
        second: "../outside.png",
        third: "gone.png",
        fourth: str(tmp_path / "outside.png"),
    }
    place = write_items(tmp_path / "paths.parquet", paths, column="image_path")
    found = thumbnails(config(place, roots=[str(tmp_path / "inside")]), catalog, [0, 1, 2, 3])
    assert set(found.uris) == {0}
    assert found.note == ("Pictures left out: 2 × lies outside catalog.image.roots; 1 × cannot be read.")


def test_nothing_of_a_file_but_its_pixels_reaches_the_page(catalog: CatalogView, tmp_path: Path) -> None:
    evil = b"<script>alert(1)</script>"
    buffer = io.BytesIO()
    clean = Image.open(io.BytesIO(picture(1)))
    clean.save(buffer, "JPEG", comment=evil, exif=b"Exif\0\0" + evil)
    ids = names(catalog)
    place = write_items(
        tmp_path / "items.parquet", {ids[0]: buffer.getvalue() + evil, ids[1]: b"<svg onload=x>" + evil}
    )
    assert evil in buffer.getvalue()
    found = thumbnails(config(place), catalog, [0, 1])
    assert evil not in base64.b64decode(str(found.of(0)).partition(",")[2])
    assert found.of(1) == ""
    assert found.note == "Pictures left out: 1 × cannot be decoded."


@pytest.mark.parametrize("limit", [{"max_pixels": 1000}, {"max_bytes": 1000}], ids=str)
def test_the_limits_of_the_catalogue_hold_here_too(
    catalog: CatalogView, tmp_path: Path, limit: dict[str, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    place = write_items(tmp_path / "items.parquet", {names(catalog)[0]: buffer.getvalue()})
    assert thumbnails(config(place), catalog, [0]).uris
    found = thumbnails(config(place, **limit), catalog, [0])
    assert not found.uris
    assert f"catalog.image.{next(iter(limit))}" in found.note


def test_all_pictures_together_stay_within_their_share_of_the_page(
    catalog: CatalogView, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    ids = names(catalog)
    noisy = {}
    for name in ids:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)).save(buffer, "PNG")
        noisy[name] = buffer.getvalue()
    place = write_items(tmp_path / "items.parquet", noisy)
    rows = [*range(COUNT), *range(0, COUNT, 2)]  # half of them are shown twice
    budget = 60_000
    found = thumbnails(config(place), catalog, rows, max_bytes=budget)
    size = sum(len(found.of(row) or "") for row in rows)
    assert 0.8 * budget < size <= budget
    assert f"{COUNT - len(found.uris)} × is beyond what a page may carry" in found.note
    assert pictures.MAX_BYTES <= 300_000  # of a page that is to be mailed


def test_what_cannot_be_read_is_said(catalog: CatalogView, tmp_path: Path) -> None:
    gone = thumbnails(config(str(tmp_path / "gone.parquet")), catalog, [0, 1])
    assert gone.of(0) is None
    assert gone.note == "Pictures left out: 2 × no Parquet file here."
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    assert "Pictures left out: 1 × " in thumbnails(config(str(tmp_path / "torn.parquet")), catalog, [0]).note


def test_what_became_of_the_input_since_is_no_error(catalog: CatalogView, tmp_path: Path) -> None:
    ids = names(catalog)
    other = config("-").model_copy(update={"data": config("-").data.model_copy(update={"domains": {}})})
    assert "2 × is of a domain that the configuration" in thumbnails(other, catalog, [0, 1]).note
    for columns in (
        {"title": ["x"]},
        {"item_id": [ids[0]], "image_path": [7]},
        {"item_id": [7], "image": [b"x"]},
    ):
        pq.write_table(pa.table(columns), tmp_path / "rewritten.parquet")
        found = thumbnails(config(str(tmp_path / "rewritten.parquet")), catalog, [0])
        assert "1 × the column" in found.note, columns
    write_items(tmp_path / "0.parquet", {ids[0]: picture(0)})
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and no more")
    found = thumbnails(config(str(tmp_path)), catalog, [0, 1, 2])
    assert set(found.uris) == {0}
    assert "left out: 2 × " in found.note
    assert not found.note.endswith("..")


def test_items_without_a_picture_column_have_none(catalog: CatalogView, tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": names(catalog), "title": ["x"] * COUNT}), path)
    found = thumbnails(config(str(path)), catalog, [0, 1])
    assert (found.of(0), found.note) == (None, "")


def test_pictures_are_read_from_the_row_groups_that_hold_somebody_shown(
    catalog: CatalogView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = names(catalog)
    place = write_items(tmp_path / "items.parquet", {name: picture(n) for n, name in enumerate(ids)})
    read: list[tuple[int, tuple[str, ...]]] = []
    original = pictures.read_unit

    def spy(unit: dict[str, Any], columns: list[str], *, batch_rows: int) -> Any:
        read.append((unit["group"], tuple(columns)))
        return original(unit, columns, batch_rows=batch_rows)

    monkeypatch.setattr(pictures, "read_unit", spy)
    assert set(thumbnails(config(place), catalog, [55, 60]).uris) == {55, 60}  # groups of 50 rows
    assert read == [(0, ("item_id",)), (1, ("item_id",)), (1, ("item_id", "image"))]
