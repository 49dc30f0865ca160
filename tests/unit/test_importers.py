"""Importers, format by format: what is written, and what is counted."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qbrec.catalog.contract import read_contract
from qbrec.catalog.importers.amazon_2018 import amazon_2018
from qbrec.catalog.importers.amazon_2023 import amazon_2023
from qbrec.catalog.importers.csv_files import Columns, csv_files
from qbrec.catalog.importers.movielens import movielens
from qbrec.config.sections import CatalogConfig, DataConfig
from qbrec.errors import ConfigError, DataError
from tests.support.import_files import interactions_of, items_of, review_2018, review_2023, run, write_lines

S = 1_000_000  # microseconds


def check_contract(out: Path) -> None:
    """The files satisfy what the catalogue stage demands of them."""
    place = {"items": str(out / "items.parquet"), "interactions": str(out / "interactions.parquet")}
    catalog = CatalogConfig.model_validate({"image": {"hosts": ("example.com",)}})
    (domain,) = read_contract(DataConfig.model_validate({"domains": {"d": place}}), catalog)
    assert domain.interaction_rows > 0


META_2018 = {
    "asin": "B1",
    "title": "Slime &amp; <b>Shine</b>   Nail\nKit &lt;i&gt;new&lt;/i&gt;",
    "description": ["For <3 nails", "", "<script>if (a < b) { x(); }</script>Red."],
    "brand": "Acme",
    "category": ["Beauty", "Nails", "</span></span>"],
    "imageURL": ["https://example.com/small.jpg"],
    "imageURLHighRes": ["https://example.com/large.jpg", "https://example.com/other.jpg"],
    "also_buy": ["B2", "B9"],
    "price": "$1,299.00 - $1,500.00",
    "feature": ["Vegan", "<b>Dries</b> fast"],
}


def test_amazon_2018(tmp_path: Path) -> None:
    bad = [
        b"", b"{not json", b'["a", "list"]', b'"text"', b'{"reviewerID": "\xff"}',
        {"asin": "B1", "unixReviewTime": 1}, review_2018("", "B1", 1), review_2018(None, "B1", 1),
        review_2018("u1", None, 1), review_2018("u1", ["B1"], 1),
        review_2018("u1", "B1", None), review_2018("u1", "B1", "soon"), review_2018("u1", "B1", 1.5),
        review_2018("u1", "B1", 10**13), review_2018("u1", "B1", 1, None), review_2018("u1", "B1", 1, 2.0),
        '{"reviewerID": "\\ud800", "asin": "B1", "unixReviewTime": 1, "overall": 5}',
    ]  # fmt: skip
    good = [
        review_2018("u1", "B1", 1472688000), review_2018("u1", "B2", "1472688001", "4.0"),
        review_2018("u\u00e9", "B1", -5.0), review_2018("u1", "B1", 1472688000), review_2018(7, "B3", 9),
    ]  # fmt: skip
    metadata = [
        META_2018,
        {"asin": "B1", "title": "the same again"},
        "{'asin': 'B2', 'title': \"Miner's hat\", 'description': 'Old \\'form\\'', 'price': 9.5, "
        "'categories': [['Toys'], ['Sports', 'Hats']], 'imUrl': 'http://old.example.com/i.jpg', "
        "'brand': None}",
        {"asin": "B3", "title": "var a = (new Date()).getTime();", "category": [], "description": []},
        {"asin": "B8", "title": "no one bought it"},
        {"title": "no id"}, "{broken", "__import__('os').system('true')", b"\xff\xfe",
    ]  # fmt: skip
    dataset = amazon_2018(
        reviews=[write_lines(tmp_path / "R_5.json.gz", [*good, *bad])],
        metadata=[write_lines(tmp_path / "meta_R.json.gz", metadata)],
        also_buy=True,
    )
    summary = run(dataset, tmp_path / "out", min_rating=3)
    check_contract(tmp_path / "out")
    assert interactions_of(summary) == sorted(
        [
            ("u1", "B1", 1472688000 * S), ("u1", "B1", 1472688000 * S), ("u1", "B2", 1472688001 * S),
            ("u\u00e9", "B1", -5 * S), ("7", "B3", 9 * S),
        ]
    )  # fmt: skip
    assert summary.record["left_out"] == {
        "interactions: not a JSON object": 4,
        "interactions: no user": 4,
        "interactions: no item": 2,
        "interactions: no timestamp": 3,
        "interactions: timestamp beyond the years 1 to 9999": 1,
        "interactions: no rating": 1,
        "interactions: rating below 3": 1,
        "metadata: not a JSON object": 3,
        "metadata: no item": 1,
        "metadata: no one interacted with the item": 1,
        "metadata: repeat of the item": 1,
    }
    assert summary.record["noted"] == {"titles that are page source, left empty": 1}
    assert summary.record["written"] == {"users": 3, "items": 3, "interactions": 5}
    assert summary.record["image_hosts"] == ["example.com", "old.example.com"]
    items = items_of(summary)
    assert items["B1"] == {
        "title": "Slime & Shine Nail Kit new",
        "description": "For <3 nails Red.",
        "brand": "Acme",
        "categories": ["Beauty", "Nails"],
        "image_path": "https://example.com/large.jpg",
        "price": 1299.0,
        "features": ["Vegan", "Dries fast"],
        "also_buy": ["B2", "B9"],
    }
    assert items["B2"] == {
        "title": "Miner's hat", "description": "Old 'form'", "brand": None, "categories": ["Sports", "Hats"],
        "image_path": "http://old.example.com/i.jpg", "price": 9.5, "features": None, "also_buy": None,
    }  # fmt: skip
    assert items["B3"]["title"] is None
    assert items["B3"]["categories"] == []
    assert items["B3"]["description"] is None


def test_whole_blocks_and_single_lines_read_alike(tmp_path: Path) -> None:
    good = [review_2018(f"u{i % 7}", f"B{i % 11}", 1472688000 + i, float(i % 5)) for i in range(500)]
    fast = run(amazon_2018(reviews=[write_lines(tmp_path / "a.json", good)]), tmp_path / "a", min_rating=2)
    # A number as text is no number to the parser of blocks.
    slow_lines = [*good[:-1], good[-1] | {"unixReviewTime": str(good[-1]["unixReviewTime"])}]
    slow = run(
        amazon_2018(reviews=[write_lines(tmp_path / "b.json", slow_lines)]), tmp_path / "b", min_rating=2
    )
    assert interactions_of(fast) == interactions_of(slow)
    assert fast.record["left_out"] == slow.record["left_out"] == {"interactions: rating below 2": 200}


@pytest.mark.parametrize(
    "line", ['{"asin": "B1"} {"asin": "B2"}', '{"asin": "B1",\n"overall": 2.0}', '{"a": [[[', "{}}"]
)
def test_lines_that_only_the_block_parser_would_take_are_counted(tmp_path: Path, line: str) -> None:
    good = [review_2018("u", "B", 1), review_2018("v", "B", 2)]
    path = write_lines(tmp_path / "a.json", [good[0], line, good[1]])
    summary = run(amazon_2018(reviews=[path]), tmp_path / "out")
    assert len(interactions_of(summary)) == 2
    assert summary.record["left_out"] == {"interactions: not a JSON object": 1 + line.count("\n")}


def test_options_of_texts_and_items(tmp_path: Path) -> None:
    reviews = write_lines(tmp_path / "r.json.gz", [review_2018("u", "B1", 1), review_2018("u", "B5", 2)])
    metadata = write_lines(tmp_path / "m.json.gz", [META_2018, {"asin": "B8", "title": "no one"}])
    dataset = amazon_2018(reviews=[reviews], metadata=[metadata], images=False, keep_html=True)
    summary = run(dataset, tmp_path / "out", all_items=True)
    items = items_of(summary)
    assert list(items) == ["B1", "B8", "B5"]
    assert items["B1"]["title"] == META_2018["title"]
    assert items["B1"]["description"] == "For <3 nails <script>if (a < b) { x(); }</script>Red."
    assert "image_path" not in items["B1"]
    assert "also_buy" not in items["B1"]
    assert set(items["B5"].values()) == {None}
    assert summary.record["noted"] == {"items without metadata": 1}
    bare = run(amazon_2018(reviews=[reviews]), tmp_path / "bare")
    assert items_of(bare) == {"B1": {}, "B5": {}}


def test_amazon_2023(tmp_path: Path) -> None:
    reviews = write_lines(
        tmp_path / "R.jsonl.gz",
        [review_2023("u1", "P1", 1588687728923), review_2023("u2", "P2", 1588687728924, 1.0), "oops",
         review_2023("u2", "P1", 1588687728925),
         {"user_id": "u", "asin": "P1", "timestamp": 1, "rating": 5.0}],
    )  # fmt: skip
    benchmark = write_lines(
        tmp_path / "B.csv.gz",
        ["user_id,parent_asin,rating,timestamp", "u3,P3,5.0,1588687728926", "u3,P4,,1588687728927", "u3,P4",
         "u3,P5,1.0,1588687728928", "u3,P1,5.0,later"],
    )  # fmt: skip
    metadata = write_lines(
        tmp_path / "meta_R.jsonl.gz",
        [
            {"main_category": "All Beauty", "title": "Howard Leather &quot;Conditioner&quot;",
             "average_rating": 4.8, "features": [], "description": ["One", "two"], "price": None,
             "images": [{"thumb": "https://example.com/t.jpg", "large": "https://example.com/l2.jpg",
                         "variant": "PT01", "hi_res": "https://example.com/h2.jpg"},
                        {"thumb": "https://example.com/t.jpg", "large": "https://example.com/l.jpg",
                         "variant": "MAIN", "hi_res": None}],
             "videos": [], "store": "Howard Products", "categories": ["Beauty", "Care"],
             "details": {"Brand": "Howard"}, "parent_asin": "P1", "bought_together": None},
            {"title": "As on the hub", "price": "from 14.99", "store": "Shop", "parent_asin": "P3",
             "images": {"hi_res": [None, "https://example.com/h.jpg"], "large": ["https://example.com/l.jpg"],
                        "variant": ["MAIN", "PT01"]},
             "details": '{"Brand": " "}', "categories": None},
        ],
    )  # fmt: skip
    dataset = amazon_2023(reviews=[reviews, benchmark], metadata=[metadata])
    summary = run(dataset, tmp_path / "out", min_rating=2)
    check_contract(tmp_path / "out")
    assert interactions_of(summary) == [
        ("u1", "P1", 1588687728923_000), ("u2", "P1", 1588687728925_000), ("u3", "P3", 1588687728926_000)
    ]  # fmt: skip
    assert summary.record["left_out"] == {
        "interactions: not a JSON object": 1,
        "interactions: no item": 1,
        "interactions: wrong number of values": 1,
        "interactions: no timestamp": 1,
        "interactions: no rating": 1,
        "interactions: rating below 2": 2,
    }
    items = items_of(summary)
    assert items["P1"] == {
        "title": 'Howard Leather "Conditioner"', "description": "One two", "brand": "Howard",
        "categories": ["Beauty", "Care"], "image_path": "https://example.com/l.jpg", "price": None,
        "features": [], "main_category": "All Beauty",
    }  # fmt: skip
    assert items["P3"]["brand"] == "Shop"
    assert items["P3"]["image_path"] == "https://example.com/h.jpg"
    assert items["P3"]["price"] is None


RATINGS = [
    "userId,movieId,rating,timestamp",
    "1,296,5.0,1147880044",
    "1,306,3.5,1147868817",
    "2,296,0.5,1147868828",
]
MOVIES = [
    "movieId,title,genres", '296,"American President, The (1995)",Comedy|Drama|Romance',
    "306,Am\u00e9lie,(no genres listed)", "7,Unseen (2001),Drama",
]  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_movielens_25m(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "ml-25m"
    folder.mkdir()
    write_lines(folder / "ratings.csv", RATINGS)
    write_lines(folder / "movies.csv", MOVIES)
    place = folder
    if packed:
        place = tmp_path / "ml-25m.zip"
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in folder.iterdir():
                archive.write(path, f"ml-25m/{path.name}")
    summary = run(movielens(str(place)), tmp_path / "out", min_rating=1)
    check_contract(tmp_path / "out")
    assert interactions_of(summary) == [("1", "296", 1147880044 * S), ("1", "306", 1147868817 * S)]
    assert items_of(summary) == {
        "296": {
            "title": "American President, The (1995)", "categories": ["Comedy", "Drama", "Romance"],
            "year": 1995,
        },
        "306": {"title": "Am\u00e9lie", "categories": [], "year": None},
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["latin1", "utf-8"])
def test_movielens_1m_and_10m(tmp_path: Path, encoding: str) -> None:
    write_lines(
        tmp_path / "ratings.dat",
        ["1::1193::5::978300760", "1::661::x::978302109", "2::1193::4", "2::661::3::9"],
    )
    write_lines(
        tmp_path / "movies.dat",
        ['1193::"Z": One Flew: Over (1975)::Drama', "661::Mis\u00e9rables, Les (1995)::Drama|Musical"],
        encoding=encoding,
    )
    summary = run(movielens(str(tmp_path)), tmp_path / "out")
    assert interactions_of(summary) == [
        ("1", "1193", 978300760 * S), ("1", "661", 978302109 * S), ("2", "661", 9 * S)
    ]  # fmt: skip
    assert summary.record["left_out"] == {"interactions: wrong number of values": 1}
    assert items_of(summary) == {
        "1193": {"title": '"Z": One Flew: Over (1975)', "categories": ["Drama"], "year": 1975},
        "661": {"title": "Mis\u00e9rables, Les (1995)", "categories": ["Drama", "Musical"], "year": 1995},
    }


def test_movielens_refuses_what_it_is_not(tmp_path: Path) -> None:
    for name, content in (("a.zip", b"no zip"), ("b.zip", None)):
        if content is None:
            zipfile.ZipFile(tmp_path / name, "w").close()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"zip|ratings"):
            movielens(str(tmp_path / name))
    with pytest.raises(DataError, match="No such file"):
        movielens(str(tmp_path / "nothing"))


def test_csv_with_named_columns(tmp_path: Path) -> None:
    clicks = write_lines(
        tmp_path / "clicks.tsv.gz",
        ["\ufeffwho\twhat\twhen\tstars\tnote", 'u1\ti1\t2020-02-03\t4\t"a\ttab"',
         "u1\ti2\t2020-02-03T04:05:06.5+02:00\t5\t", "u2\ti1\t2020-02-31\t5\t",
         "u2\ti1\t2020-02-03 04:05\t5\t", "u2\t\t2020-02-03\t5\t", '"u\n3"\ti1\t1969-12-31\t1e0\t'],
    )  # fmt: skip
    things = write_lines(
        tmp_path / "things.csv",
        ["sku,name,brand,path,colour", "i1,\"Hat, red\",Acme,Clothes > Hats >,red", "i2,,,,", "i3,Unseen,,,"],
    )  # fmt: skip
    columns = Columns(
        user="who", item="what", time="when", rating="stars", items_item="sku",
        texts={"title": "name", "categories": "path"}, keep=["colour"],
    )  # fmt: skip
    summary = run(
        csv_files(interactions=[clicks], items=things, columns=columns, unit="iso", separator=">"),
        tmp_path / "out",
        min_rating=1,
    )
    check_contract(tmp_path / "out")
    day = 1580688000 * S
    assert interactions_of(summary) == [
        ("u\n3", "i1", -86400 * S), ("u1", "i1", day), ("u1", "i2", day + 7506 * S + S // 2),
        ("u2", "i1", day + 14700 * S),
    ]  # fmt: skip
    assert summary.record["left_out"] == {
        "interactions: no item": 1,
        "interactions: no timestamp": 1,
        "metadata: no one interacted with the item": 1,
    }
    assert items_of(summary) == {
        "i1": {"title": "Hat, red", "brand": "Acme", "categories": ["Clothes", "Hats"], "colour": "red"},
        "i2": {"title": None, "brand": None, "categories": None, "colour": None},
    }


@pytest.mark.parametrize(("unit", "factor"), [("s", S), ("ms", 1000), ("us", 1)])
def test_csv_without_header(tmp_path: Path, unit: str, factor: int) -> None:
    rows = ["i1;u1;4.5;100", 'i"1;u1;;+200.0', "i1;u2;5;1e3", "i1;u2;5;99999999999999999999", "i1;u2;5;"]
    path = write_lines(tmp_path / "a.csv", rows)
    columns = Columns(user="2", item="1", time="4", rating="3")
    dataset = csv_files(
        interactions=[path], columns=columns, delimiter=";", header=False, quotes=False, unit=unit
    )
    summary = run(dataset, tmp_path / "out")
    assert interactions_of(summary) == [("u1", 'i"1', 200 * factor), ("u1", "i1", 100 * factor)]
    assert summary.record["left_out"] == {"interactions: no timestamp": 3}


def test_csv_says_what_is_wrong(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.csv", ["user_id,item_id,timestamp", "u,i,1"])

    def load(path: str, **options: Any) -> None:
        columns = options.pop("columns", Columns())
        run(csv_files(interactions=[path], columns=columns, **options), tmp_path / "out", force=True)

    load(good)
    with pytest.raises(DataError, match="'who' is missing"):
        load(good, columns=Columns(user="who"))
    with pytest.raises(DataError, match="there twice"):
        load(write_lines(tmp_path / "b.csv", ["user_id,user_id,item_id,timestamp", "u,u,i,1"]))
    with pytest.raises(DataError, match="encoding"):
        load(write_lines(tmp_path / "c.csv", ["user_id,item_id,timestamp", "\u00e9,i,1"], encoding="latin1"))
    load(str(tmp_path / "c.csv"), encoding="latin1")
    with pytest.raises(ConfigError, match="no encoding"):
        load(good, encoding="klingon")
    with pytest.raises(DataError, match="is empty"):
        load(write_lines(tmp_path / "d.csv", []))
    with pytest.raises(DataError, match="not one interaction is left"):
        load(write_lines(tmp_path / "e.csv", ["user_id,item_id,timestamp"]))
    # Milliseconds taken for seconds.
    with pytest.raises(DataError, match="beyond the years"):
        load(write_lines(tmp_path / "f.csv", ["user_id,item_id,timestamp", "u,i,1588687728923"]))
    with pytest.raises(DataError, match="No such file"):
        load(str(tmp_path / "nothing.csv"))


@pytest.mark.parametrize("name", ["beauty", "scientific"])
def test_real_data_comes_back(bench_data: Path, tmp_path: Path, name: str) -> None:
    items = pq.read_table(bench_data / name / "items.parquet")
    events = pq.read_table(bench_data / name / "interactions.parquet")
    with gzip.open(tmp_path / "r.json.gz", "wt", compresslevel=1) as file:
        for row in events.to_pylist():
            file.write(json.dumps(review_2018(row["user_id"], row["item_id"], row["timestamp"])) + "\n")
    texts = [
        column for column in ("title", "description", "brand", "categories") if column in items.column_names
    ]
    with gzip.open(tmp_path / "m.json.gz", "wt", compresslevel=1) as file:
        for row in items.select(["item_id", *texts]).to_pylist():
            line = {"asin": row["item_id"], "title": row["title"], "category": row["categories"]}
            if "description" in texts:
                line |= {
                    "description": [row["description"]] if row["description"] else [],
                    "brand": row["brand"],
                }
            file.write(json.dumps(line) + "\n")
    dataset = amazon_2018(
        reviews=[str(tmp_path / "r.json.gz")], metadata=[str(tmp_path / "m.json.gz")], keep_html=True
    )
    summary = run(dataset, tmp_path / "out", core=5 if name == "beauty" else 1)
    assert summary.record["left_out"] == {}
    got = pq.read_table(summary.interactions)
    seconds = pa.compute.divide(got["timestamp"].cast(pa.int64()), S)
    got = got.set_column(2, "timestamp", seconds).sort_by(
        [("user_id", "ascending"), ("item_id", "ascending")]
    )
    assert got.equals(
        events.select(got.column_names).sort_by([("user_id", "ascending"), ("item_id", "ascending")])
    )
    found = pq.read_table(summary.items).sort_by("item_id").select(["item_id", *texts]).to_pylist()
    assert found == items.sort_by("item_id").select(["item_id", *texts]).to_pylist()
