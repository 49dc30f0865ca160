"""What `qbrec append` accepts: lists of ids, columns that fit the frozen catalogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.append.frozen import frozen_config, read_new_items
from qbrec.catalog.append.retire import read_ids, rows_to_retire
from qbrec.catalog.append.run import Request
from qbrec.config.sections import CatalogConfig, ImageConfig
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.generations import GenerationsView
from tests.support.generations import write_catalog

IDS = ["a", "b,c", "ünï", "d e"]
SHOP = [("pets", "i1", 1), ("pets", "i2", 2), ("games", "i1", 1)]


def _write(path: Path, data: str | bytes | pa.Table) -> str:
    if isinstance(data, pa.Table):
        pq.write_table(data, path)
    else:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("ids.txt", "a\nb,c\r\n\n  \nünï\nd e"),
        ("ids", "\ufeffa\nb,c\nünï\nd e\n"),
        ("ids.csv", 'title,item_id\nx,a\ny,"b,c"\n,ünï\nz,\nw,d e\n'),
        ("ids.parquet", pa.table({"n": range(5), "item_id": ["a", "b,c", None, "ünï", "d e"]})),
        ("ids.pq", pa.table({"item_id": pa.array(IDS).dictionary_encode()})),
    ],
)
def test_lists_of_ids(tmp_path: Path, name: str, data: str | pa.Table) -> None:
    place = _write(tmp_path / name, data)
    assert [item for batch in read_ids(place) for item in batch] == IDS
    before = Request("pets", retire=place).sources()
    assert before == Request("pets", retire=place).sources()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"x")
    assert Request("pets", retire=place).sources() != before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ids.csv", "id\na\n", "no column 'item_id'"),
        ("ids.csv", "item_id,x\na\n", "cannot read the list"),
        ("ids.txt", b"a\n\xff\xfe\n", "no UTF-8 text"),
        ("ids.parquet", b"PAR0", "not a readable Parquet file"),
        ("ids.parquet", pa.table({"id": ["a"]}), "no column 'item_id'"),
        ("none.txt", None, "cannot read the list"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, data: Any, message: str) -> None:
    if data is not None:
        _write(tmp_path / name, data)
    with pytest.raises(DataError, match=message):
        list(read_ids(str(tmp_path / name)))


def test_ids_of_the_domain_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = GenerationsView(write_catalog(ArtifactStore(tmp_path), SHOP))
    place = _write(tmp_path / "ids.txt", "i2\ni1\ni9\ni1\ni9\n")
    rows, unknown = rows_to_retire(place, "pets", view)
    assert rows.tolist() == sorted(view.lookup(["i1", "i2"], "pets").tolist())
    assert unknown == ["i9"]
    rows, unknown = rows_to_retire(place, "games", view)
    assert rows.tolist() == view.lookup(["i1"], "games").tolist()
    assert unknown == ["i2", "i9"]
    # An id that shares its hash with a stored one is still unknown.
    (row,) = view.lookup(["i1"], "games")
    monkeypatch.setattr(view, "lookup", lambda ids, domain: np.full(len(ids), row))
    rows, unknown = rows_to_retire(place, "games", view)
    assert view.item_ids(rows) == ["i1"]
    assert unknown == ["i2", "i9"]


class _Catalog:
    """A catalogue whose text was encoded, whose audio came as vectors, with a column `price`."""

    def __init__(self, folder: Path, **encoders: Any) -> None:
        artifact = write_catalog(ArtifactStore(folder), SHOP)
        artifact.meta["modalities"] = {"text": {"dim": 3}, "audio": {"dim": 2}}
        artifact.meta["encoders"] = {"text": {"encoder": "hashed-ngram", "dim": 3}} | encoders
        self.view, self.place = GenerationsView(artifact), folder / "items.parquet"
        self.config = CatalogConfig()

    def read(self, columns: dict[str, Any], domain: str = "pets") -> Any:
        _write(self.place, pa.table({"item_id": ["x", "y"]} | columns))
        return read_new_items(str(self.place), domain, self.view, self.config)


def test_items_that_fit(tmp_path: Path) -> None:
    catalog = _Catalog(tmp_path)
    vectors = [[1.0, 2.0], None]
    domains, frozen = catalog.read({"title": ["t", None], "audio_embedding": vectors}, "cars")
    assert [(d.number, d.name, d.item_rows) for d in domains] == [
        (0, "pets", 0),
        (1, "games", 0),
        (2, "cars", 2),
    ]
    assert frozen.widths == {"text": 3, "audio": 2}
    assert frozen.display.names == []
    # A modality may be missing; a narrower number fits into the catalogue's, a new column is its own.
    domains, frozen = catalog.read(
        {"price": pa.array([1, 2], pa.float32()), "seeds": [1, 2], "row": ["a", "b"]}
    )
    assert [d.item_rows for d in domains] == [2, 0]
    types = {field.name: field.type for field in frozen.display}
    assert types == {"price": pa.float64(), "seeds": pa.int64(), "row": pa.string()}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"audio_embedding": [[1.0, 2.0, 3.0]] * 2}, "have 3 numbers, those of the catalogue 2"),
        ({"smell_embedding": [[1.0]] * 2}, "no modality 'smell'"),
        ({"image": [b"x", b"y"]}, "bring pictures, but the catalogue has no modality 'image'"),
        ({"text_embedding": [[1.0, 2.0, 3.0]] * 2}, "'text' of pictures or text, the new items bring"),
        ({"price": ["cheap", "dear"]}, "'price' is string, in the catalogue it is double"),
        ({"price": pa.array([1, 2], pa.timestamp("s"))}, "'price' is timestamp"),
        ({"title": [1, 2]}, "the column 'title' is int64 instead of string"),
    ],
)
def test_items_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _Catalog(tmp_path).read(columns)


def test_an_encoder_that_is_another_one_now(tmp_path: Path) -> None:
    catalog = _Catalog(tmp_path, text={"encoder": "hashed-ngram", "dim": 3, "files": "0123"})
    with pytest.raises(DataError, match="its files is None instead of '0123'"):
        catalog.read({"title": ["a", "b"]})
    catalog.read({"audio_embedding": [[1.0, 2.0], None]})  # not encoded: no matter


def test_only_what_is_acceptable_comes_from_the_present_configuration(tmp_path: Path) -> None:
    made = CatalogConfig(structure_depth=3, image=ImageConfig(max_pictures=2, roots=("/then",)))
    found = write_catalog(ArtifactStore(tmp_path), SHOP)
    artifact = Artifact(found.path, found.manifest | {"config": {"catalog": made.model_dump(mode="json")}})
    now = CatalogConfig(
        structure_depth=4,
        max_rejected_fraction=0.3,
        image=ImageConfig(max_pictures=3, roots=("/now",), hosts=("pictures.example.com",)),
    )
    expected = made.model_copy(
        update={
            "max_rejected_fraction": 0.3,
            "image": made.image.model_copy(update={"roots": ("/now",), "hosts": ("pictures.example.com",)}),
        }
    )
    assert frozen_config(artifact, now) == expected
    with pytest.raises(DataError, match="does not say how the catalogue was made"):
        frozen_config(found, now)


def test_requests_differ(tmp_path: Path) -> None:
    """Path, size and time of the items: what is written again is read again."""
    place = _write(tmp_path / "items.parquet", pa.table({"item_id": ["a"]}))
    request = Request("pets", items=place)
    first = request.sources()
    assert replace(request, domain="games").sources() == first
    _write(tmp_path / "items.parquet", pa.table({"item_id": ["a"]}))
    assert request.sources() != first
