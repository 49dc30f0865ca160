"""The input contract: what is found, what is refused, and what the refusal says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.contract import Domain, read_contract
from qbrec.catalog.sources import list_files, source_fingerprint
from qbrec.catalog.units import cut_units, read_unit
from qbrec.config.sections import CatalogConfig, DataConfig, DomainConfig, ImageConfig, TextConfig
from qbrec.errors import ConfigError, DataError
from qbrec.storage.hashing import rows_of

ITEMS_TABLE = {"item_id": ["a", "b", "c"], "title": ["x", "y", "z"]}
INTERACTIONS = {"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2]}


def write(
    folder: Path, items: Any = ITEMS_TABLE, interactions: Any = INTERACTIONS, name: str = "shop"
) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    place = DomainConfig(
        items=str(folder / "items.parquet"), interactions=str(folder / "interactions.parquet")
    )
    return DataConfig(domains={name: place})


def refused(data: DataConfig, *words: str, catalog: CatalogConfig | None = None) -> None:
    with pytest.raises(DataError) as caught:
        read_contract(data, catalog or CatalogConfig())
    assert caught.value.exit_code == 3
    assert caught.value.fix
    for word in words:
        assert word in str(caught.value)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "_SUCCESS", "_tmp/d.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(ITEMS_TABLE), tmp_path / name)

    def names(place: str) -> list[str]:
        return [os.path.relpath(file.path, tmp_path) for file in list_files(place, where="here")]

    assert names(str(tmp_path)) == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert names(f"{tmp_path}/?.parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{tmp_path}/*/c.parquet") == ["sub/c.parquet"]
    assert names(f"{tmp_path}/a.parquet") == ["a.parquet"]
    assert [f.path for f in list_files(f"file://{tmp_path}/a.parquet", where="")] == [
        f"file://{tmp_path}/a.parquet"
    ]
    for place in (f"{tmp_path}/none.parquet", f"{tmp_path}/*.csv"):
        with pytest.raises(DataError, match="no Parquet file"):
            list_files(place, where="data.domains.x.items")
    with pytest.raises(ConfigError, match="ftp"):
        list_files("ftp://host/a.parquet", where="")


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    data = write(tmp_path)
    before = source_fingerprint(data, models={})
    assert source_fingerprint(data, models={}) == before
    assert source_fingerprint(data, models={"text": "ab"}) != before
    os.utime(tmp_path / "items.parquet", ns=(1, 1))
    assert source_fingerprint(data, models={}) != before
    with pytest.raises(ConfigError, match="no domain"):
        source_fingerprint(DataConfig(), models={})


def test_what_a_domain_brings(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 2.0], None, [1.0]], pa.list_(pa.float32()))
    items = ITEMS_TABLE | {
        "text_embedding": vectors,
        "text_tokens": [[1], [2], [3]],
        "price": [1.0, 2.0, 3.0],
    }
    (domain,) = read_contract(write(tmp_path, items), CatalogConfig())
    assert domain.embeddings == {"text": ("text_embedding", 2)}
    assert not domain.encodes_text
    assert domain.display.names == ["text_tokens", "price"]
    assert (domain.item_rows, domain.interaction_rows) == (3, 2)


@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
def test_a_missing_column(tmp_path: Path, column: str) -> None:
    rest = {name: values for name, values in INTERACTIONS.items() if name != column}
    refused(write(tmp_path, interactions=rest), column, "interactions.parquet", *rest)


@pytest.mark.parametrize(
    ("column", "values", "word"),
    [
        ("item_id", [1, 2, 3], "int64"),
        ("title", [1, 2, 3], "title"),
        ("categories", ["a", "b", "c"], "list<string>"),
        ("image", ["a", "b", "c"], "binary"),
        ("image", [["a"], ["b"], ["c"]], "list<binary>"),
        ("image_path", [b"a", b"b", b"c"], "list<string>"),
        ("text_embedding", ["a", "b", "c"], "list of floats"),
        ("text_embedding", [[1], [2], [3]], "list of floats"),
        ("structure_embedding", [[1.0], [2.0], [3.0]], "structure"),
        ("My Own_embedding", [[1.0], [2.0], [3.0]], "lower-case"),
        ("text_embedding", pa.array([None] * 3, pa.list_(pa.float32())), "empty in every row"),
    ],
)
def test_a_column_of_the_wrong_kind(tmp_path: Path, column: str, values: Any, word: str) -> None:
    refused(
        write(tmp_path, ITEMS_TABLE | {column: values}),
        column.removesuffix("_embedding"),
        word,
        "items.parquet",
    )


def test_empty_tables_and_files_that_are_no_parquet(tmp_path: Path) -> None:
    empty = pa.table(INTERACTIONS).slice(0, 0)
    refused(write(tmp_path / "a", interactions=empty), "not a single row of interactions")
    data = write(tmp_path / "b")
    (tmp_path / "b" / "items.parquet").write_bytes(b"PAR1 or so")
    refused(data, "not a readable Parquet file", "items.parquet")


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    refused(write(tmp_path, {"item_id": ["a"]}), "nothing to learn from")


def test_files_of_one_table_agree(tmp_path: Path) -> None:
    for number, extra in enumerate(({}, {"brand": ["x"] * 3})):
        pq.write_table(pa.table(ITEMS_TABLE | extra), tmp_path / f"i{number}.parquet")
    pq.write_table(pa.table(INTERACTIONS), tmp_path / "x.parquet")
    place = DomainConfig(items=f"{tmp_path}/i*.parquet", interactions=f"{tmp_path}/x.parquet")
    refused(DataConfig(domains={"shop": place}), "different columns: brand", "i1.parquet")


def test_domains_agree_on_how_a_modality_is_made(tmp_path: Path) -> None:
    first = write(tmp_path / "a", name="a").domains
    vectors = ITEMS_TABLE | {"text_embedding": [[1.0]] * 3}
    second = write(tmp_path / "b", vectors, name="b").domains
    refused(DataConfig(domains=first | second), "'text'", "raw text", "width 1", "'a'", "'b'")


def test_image_paths_need_allowed_folders(tmp_path: Path) -> None:
    data = write(tmp_path, ITEMS_TABLE | {"image_path": ["p", "q", "r"]})
    with pytest.raises(ConfigError) as caught:
        read_contract(data, CatalogConfig())
    assert caught.value.where == "catalog.image.roots"
    assert read_contract(data, CatalogConfig(image=ImageConfig(roots=(str(tmp_path),))))


def test_hosts_or_roots_allow_image_paths(tmp_path: Path) -> None:
    data = write(tmp_path, ITEMS_TABLE | {"image_path": [["p"], ["q", "r"], []]})
    for image in (ImageConfig(roots=("s3://bucket/x",)), ImageConfig(hosts=("cdn.example.com",))):
        (domain,) = read_contract(data, CatalogConfig(image=image))
        assert domain.picture_column == "image_path"


def test_several_pictures_per_item(tmp_path: Path) -> None:
    (domain,) = read_contract(write(tmp_path, ITEMS_TABLE | {"image": [[b"p"], [], None]}), CatalogConfig())
    assert domain.picture_column == "image"


def test_attributes_are_further_columns(tmp_path: Path) -> None:
    config = CatalogConfig(text=TextConfig(attributes=("colour", "pieces")))
    items = {"item_id": ["a", "b", "c"], "colour": [["r"], None, []], "pieces": [1, 2, 3]}
    (domain,) = read_contract(write(tmp_path / "a", items), config)
    assert domain.attributes == ("colour", "pieces")
    assert domain.encodes_text
    assert domain.display.names == ["colour", "pieces"]
    first = write(tmp_path / "b", ITEMS_TABLE, name="b").domains
    second = write(tmp_path / "c", items, name="c").domains
    domains = read_contract(DataConfig(domains=first | second), config)
    assert [domain.attributes for domain in domains] == [(), ("colour", "pieces")]
    for wanted, word in ((("colour", "size"), "size"), (("title",), "title")):
        with pytest.raises(ConfigError, match=f"no domain has a further column '{word}'") as caught:
            read_contract(
                write(tmp_path / "d", items | ITEMS_TABLE), CatalogConfig(text=TextConfig(attributes=wanted))
            )
        assert caught.value.where == "catalog.text.attributes"
    vectors = items | {"colour": [[1.0], [2.0], [3.0]]}
    refused(write(tmp_path / "e", vectors), "colour", "list<string>, number", catalog=config)


def test_units_cover_every_row_once(tmp_path: Path) -> None:
    table = pa.table({"item_id": [f"i{n}" for n in range(100)], "title": ["t"] * 100})
    data = write(tmp_path, table)
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=37)
    domains = read_contract(data, CatalogConfig())
    units = cut_units(domains, role="items", unit_rows=10)
    assert max(unit["end"] - unit["begin"] for unit in units) == 10
    seen = []
    for unit in units:
        for first, batch in read_unit(unit, ["item_id"], batch_rows=7):
            assert batch["item_id"][0].as_py() == f"i{first}"
            seen += batch["item_id"].to_pylist()
    assert seen == table["item_id"].to_pylist()


def test_rows_of_hashes() -> None:
    rng = np.random.default_rng(0)
    hashes = np.unique(rng.integers(0, 1 << 63, 500).astype(np.uint64))
    wanted = np.concatenate([hashes[::3], hashes[::7] + np.uint64(1)])
    expected = [np.flatnonzero(hashes == w)[0] if w in hashes else -1 for w in wanted]
    assert rows_of(hashes, wanted).tolist() == expected
    assert rows_of(hashes[:0], wanted[:2]).tolist() == [-1, -1]


def test_a_domain_without_pictures_knows_it() -> None:
    assert Domain(0, "x", (), (), ("item_id",)).picture_column is None
    both = Domain(0, "x", (), (), ("item_id", "image", "image_path"))
    assert both.picture_column == "image"
    assert (
        Domain(0, "x", (), (), ("image",), embeddings={"image": ("image_embedding", 3)}).picture_column
        is None
    )
