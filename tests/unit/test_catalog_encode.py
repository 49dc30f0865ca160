"""Items to features: images, structure, content, embeddings, and every reason for rejection."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders.content import hash_sequences, hash_vectors
from qbrec.catalog.encoders.encode import ItemEncoder, as_binary, from_binary, skipped_pictures
from qbrec.catalog.encoders.fields import attribute_texts, category_paths, item_texts, text_tokens
from qbrec.catalog.encoders.image import (
    DIM,
    SIDE,
    BadImageError,
    decode,
    decode_parts,
    picture_tokens,
    pixel_statistics,
)
from qbrec.catalog.encoders.ngrams import NUM_BUCKETS
from qbrec.catalog.encoders.text import FIELDS, HashedNgramEncoder
from qbrec.catalog.encoders.vectors import as_vectors
from qbrec.catalog.synth_items import encode_png
from qbrec.config.sections import CatalogConfig, ImageConfig, TextConfig
from qbrec.storage.hashing import hash64, hash_bytes


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    return encode_png(np.full((1, size, size, 3), colour, np.uint8))[0]


def encode(
    columns: dict[str, Any],
    config: CatalogConfig | None = None,
    embeddings: dict[str, tuple[str, int]] | None = None,
) -> list[dict[str, Any]]:
    return encoded(columns, config, embeddings).to_pylist()


def encoded(
    columns: dict[str, Any],
    config: CatalogConfig | None = None,
    embeddings: dict[str, tuple[str, int]] | None = None,
) -> pa.Table:
    table = pa.table(columns)
    attributes = config.text.attributes if config else ()
    domain = Domain(
        0, "shop", (), (), tuple(table.column_names), embeddings=embeddings or {}, attributes=attributes
    )
    modalities = tuple(
        m
        for m, there in (
            ("text", domain.encodes_text),
            ("image", domain.picture_column),
            *(embeddings or {}).items(),
        )
        if there
    )
    text = HashedNgramEncoder(
        np.ones((len(FIELDS), NUM_BUCKETS), np.float32),
        np.zeros(0, np.int64),
        np.zeros((0, 16), np.float16),
        1.0,
    )
    encoder = ItemEncoder(config or CatalogConfig(), modalities=modalities, display=pa.schema([]), text=text)
    return encoder.encode(table, domain, file=0, first_row=100)


def test_png_of_our_own_is_what_pillow_reads() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)[0]))), picture[0])


def test_pixel_statistics_tell_colours_and_edges_apart() -> None:
    red, blue = (np.full((SIDE, SIDE, 3), c, np.uint8) for c in ([220, 30, 30], [30, 30, 220]))
    dark_red = np.full((SIDE, SIDE, 3), [200, 40, 40], np.uint8)
    lying = np.tile((np.arange(SIDE) % 8 < 4)[:, None, None] * np.uint8(255), (1, SIDE, 3))
    standing = lying.transpose(1, 0, 2)
    v = pixel_statistics(np.stack([red, blue, dark_red, lying, standing]))
    assert v.shape == (5, DIM)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, rtol=1e-5)
    assert v[0] @ v[2] > v[0] @ v[1] + 0.3
    edges = slice(64, 64 + 128)
    assert v[3, edges] @ v[4, edges] < 0.1 < v[3, edges] @ v[3, edges]


def test_every_mode_of_picture_is_read() -> None:
    for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK"):
        buffer = io.BytesIO()
        Image.new(mode, (20, 10)).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
        assert decode(buffer.getvalue(), max_pixels=200).shape == (SIDE, SIDE, 3)


def test_bad_pictures() -> None:
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(b"no picture", max_pixels=100)
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(png((1, 2, 3), size=64)[:60], max_pixels=10_000)
    with pytest.raises(BadImageError, match="max_pixels"):
        decode(png((1, 2, 3)), max_pixels=63)


def test_reasons() -> None:
    rows = encode(
        {
            "item_id": ["a", None, "", "d", "e"],
            "image": [png((255, 0, 0)), None, None, b"junk", None],
            "sound_embedding": [[1.0, 2.0], [1.0, 2.0], None, None, [1.0]],
            "smell_embedding": [[float("nan")], None, None, None, None],
        },
        embeddings={"sound": ("sound_embedding", 2), "smell": ("smell_embedding", 1)},
    )
    assert [row["reason"] for row in rows] == [
        "smell_embedding: holds NaN or a number beyond float16",
        "item_id: is null",
        "item_id: is empty",
        "image: cannot be decoded",
        "sound_embedding: has a wrong length",
    ]
    assert [row["row"] for row in rows] == list(range(100, 105))


def test_tokens_of_absent_fields_are_not_stored() -> None:
    rows = encode(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["red paint", None, " - ", "x"],
            "description": ["for walls", "for walls", None, None],
            "categories": [["Art"], [], None, None],
            "brand": [None, "Acme", None, None],
        }
    )
    assert [row["tokens.text"] for row in rows] == [3, 2, 0, 1]
    assert [len(row["feature.text"]) for row in rows] == [3 * 32, 2 * 32, 0, 32]


def test_structure_hashes_every_prefix_and_the_brand() -> None:
    config = CatalogConfig(structure_depth=2, structure_buckets=1000)
    rows = encode(
        {
            "item_id": ["a", "b", "c", "d"],
            "categories": [["Art", "Paint", "Oil"], ["Art", "Brush"], None, ["Paint"]],
            "brand": ["Acme", " ACME ", None, ""],
        },
        config,
    )
    codes = np.array([np.frombuffer(row["structure"], np.int32) for row in rows])
    assert codes.shape == (4, 3)
    assert codes[0, 0] == codes[1, 0] == hash_bytes([b"category\x1fArt"])[0] % np.uint64(1000)
    assert codes[0, 1] != codes[1, 1]
    assert codes[0, 2] == codes[1, 2] >= 0
    assert codes[2].tolist() == [-1, -1, -1]
    assert codes[3, 0] not in (codes[0, 0], -1)
    assert codes[3, 1:].tolist() == [-1, -1]
    assert codes.max() < 1000


def test_content_is_all_that_encoders_see() -> None:
    base = {"title": "Red Paint", "categories": ["Art"], "brand": "Acme", "image": png((9, 9, 9)), "x": [1.0]}
    changes: list[dict[str, Any]] = [
        {}, {"title": "red  paint!"}, {"title": "Blue Paint"}, {"categories": ["Tools"]}, {"image": png((9, 9,
        200))},
        {"x": [2.0]}, {"image": None},
    ]  # fmt: skip
    rows = [base | change for change in changes]
    columns = {name: [row[name] for row in rows] for name in base} | {
        "item_id": [str(i) for i in range(len(rows))]
    }
    columns["x_embedding"] = columns.pop("x")
    content = [row["content"] for row in encode(columns, embeddings={"x": ("x_embedding", 1)})]
    assert content[0] == content[1]
    assert len(set(content)) == len(rows) - 1


def test_items_that_show_nothing_are_not_duplicates() -> None:
    rows = encode({"item_id": ["a", "b"], "title": [None, None]})
    assert rows[0]["content"] != rows[1]["content"]
    assert rows[0]["hash"] == hash64("shop", ["a"])[0]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16()), pa.list_(pa.float64()), pa.list_(pa.float32(), 3), pa.large_list(pa.float32())],
)
def test_vectors_of_any_list_type(kind: pa.DataType) -> None:
    array = pa.array([[1.0, 2.0, 3.0], None, [4.0, 5.0, 6.0]], pa.list_(pa.float32())).cast(kind)
    for column in (pa.chunked_array([array]), pa.chunked_array([array.slice(1)])):
        vectors, present, fault = as_vectors(column, 3)
        assert vectors.dtype == np.float16
        assert present.tolist() == [True, False, True][-len(column) :]
        assert vectors[-1].tolist() == [4, 5, 6]
        assert not fault.any()


def test_vectors_beyond_float16_are_faults() -> None:
    _, _, fault = as_vectors(
        pa.chunked_array([pa.array([[1e6], [np.inf], [None], [1.0]], pa.list_(pa.float32()))]), 1
    )
    assert fault.tolist() == [2, 2, 2, 0]


def test_binary_round_trip() -> None:
    tokens = np.array([2, 0, 1, 3], np.uint8)
    values = np.arange(24, dtype=np.float16).reshape(6, 4)
    column = pa.chunked_array([as_binary(values, tokens)])
    np.testing.assert_array_equal(from_binary(column, 4), values)
    np.testing.assert_array_equal(from_binary(column.slice(2), 4), values[2:])
    np.testing.assert_array_equal(from_binary(column.take(pa.array([3, 0])), 4), values[[3, 4, 5, 0, 1]])


def test_image_paths_stay_below_their_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.png").write_bytes(png((200, 0, 0)))
    (inside / "link.png").symlink_to(outside / "a.png")
    paths = ["a.png", str(inside / "a.png"), "../out/a.png", str(outside / "a.png"), "link.png", "b.png",
             "http://169.254.169.254/a.png"]  # fmt: skip
    config = CatalogConfig(image=ImageConfig(roots=(str(inside),)))
    rows = encode({"item_id": [str(i) for i in range(7)], "image_path": paths}, config)
    assert [row["tokens.image"] for row in rows] == [1, 1, 0, 0, 0, 0, 0]
    away = "image_path: lies outside catalog.image.roots"
    host = "image_path: names a host that is not in catalog.image.hosts"
    expected = [None, None, away, away, away, "image_path: cannot be read", host]
    assert [row["reason"] for row in rows] == expected


def checks(size: int = 64) -> bytes:
    """Four quarters of different colours."""
    picture = np.zeros((1, size, size, 3), np.uint8)
    half = size // 2
    for number, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]):
        picture[0, number // 2 * half :, number % 2 * half :] = colour
    return encode_png(picture)[0]


@pytest.mark.parametrize("grid", [2, 3, 4, 7])
def test_a_grid_is_the_whole_and_its_parts(grid: int) -> None:
    (tokens,) = picture_tokens([decode_parts(checks(), max_pixels=10_000, grid=grid)])
    assert tokens.shape == (1 + grid**2, DIM)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, rtol=1e-5)
    plain = pixel_statistics(decode(checks(), max_pixels=10_000)[None])
    np.testing.assert_array_equal(tokens[:1], plain)
    corners = tokens[[1, grid, 1 + grid * (grid - 1), grid**2]]
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    alone = pixel_statistics(np.stack([np.full((SIDE, SIDE, 3), c, np.uint8) for c in colours]))
    assert ((corners @ alone.T).argmax(axis=1) == np.arange(4)).all()


def test_several_pictures_of_several_tokens() -> None:
    red, blue = png((255, 0, 0)), png((0, 0, 255))
    columns = {
        "item_id": ["a", "b", "c", "d", "e"],
        "image": [[red, blue], [blue, red], None, [], [None, b"", red]],
    }
    for tokens, each in (("pooled", 1), ("grid", 5)):
        config = CatalogConfig(image=ImageConfig(tokens=tokens))  # type: ignore[arg-type]
        table = encoded(columns, config)
        assert table["tokens.image"].to_pylist() == [2 * each, 2 * each, 0, 0, each]
        values = from_binary(table["feature.image"], DIM).reshape(5, each, DIM)
        np.testing.assert_array_equal(values[0], values[3])
        np.testing.assert_array_equal(values[1], values[2])
        assert len(set(table["content"].to_pylist())) == 5, "the order of pictures is content"
        assert table["skipped"].null_count == 5


def test_pictures_beyond_the_limit_are_counted() -> None:
    several = [[png((n, n, n)) for n in range(3)], [png((9, 9, 9))]]
    config = CatalogConfig(image=ImageConfig(max_pictures=2))
    table = encoded({"item_id": ["a", "b"], "image": several}, config)
    assert table["tokens.image"].to_pylist() == [2, 1]
    skipped = skipped_pictures(table).to_pylist()
    reason = "image: is beyond catalog.image.max_pictures"
    assert skipped == [{"domain": 0, "file": 0, "row": 100, "item_id": "a", "reason": reason}]


def test_a_bad_picture_costs_its_item_or_itself() -> None:
    good, columns = png((1, 2, 3)), {"item_id": ["a", "b", "c"]}
    images = [[good, b"junk"], [b"junk", b"x" * 2000], [good]]
    config = ImageConfig(max_bytes=1000)
    rows = encode(columns | {"image": images}, CatalogConfig(image=config))
    assert [row["reason"] for row in rows] == ["image: cannot be decoded"] * 2 + [None]
    assert [row["tokens.image"] for row in rows] == [0, 0, 1]
    assert all(row["skipped"] is None for row in rows)

    config = ImageConfig(max_bytes=1000, on_error="skip")
    table = encoded(columns | {"image": images}, CatalogConfig(image=config))
    assert table["reason"].null_count == 3
    assert table["tokens.image"].to_pylist() == [1, 0, 1]
    assert table["content"][0] == table["content"][2]
    assert [(row["row"], row["reason"]) for row in skipped_pictures(table).to_pylist()] == [
        (100, "image: cannot be decoded"),
        (101, "image: cannot be decoded"),
        (101, "image: has more bytes than catalog.image.max_bytes"),
    ]
    assert skipped_pictures(table.slice(2)).num_rows == 0


def test_pictures_by_path_in_lists(tmp_path: Path) -> None:
    for name, colour in (("a", (250, 0, 0)), ("b", (0, 0, 250))):
        (tmp_path / f"{name}.png").write_bytes(png(colour))
    config = CatalogConfig(image=ImageConfig(roots=(str(tmp_path),), fetch_concurrency=2))
    paths = [["a.png", "b.png"], ["b.png"], ["none.png", "a.png"], None]
    by_path = encoded({"item_id": list("abcd"), "image_path": paths}, config)
    images = [[png((250, 0, 0)), png((0, 0, 250))], [png((0, 0, 250))], None, None]
    by_value = encoded({"item_id": list("abcd"), "image": images})
    assert by_path["reason"].to_pylist() == [None, None, "image_path: cannot be read", None]
    for column in ("feature.image", "tokens.image", "content"):
        assert by_path[column].equals(by_value[column])


def test_no_picture_is_read_for_a_row_that_is_bad_anyway(tmp_path: Path) -> None:
    config = CatalogConfig(image=ImageConfig(roots=(str(tmp_path),), on_error="skip"))
    table = encoded({"item_id": [None, "a"], "image_path": ["none.png", "none.png"]}, config)
    assert table["skipped"].to_pylist() == [None, ["image_path: cannot be read"]]


def test_a_large_jpeg_keeps_what_a_named_encoder_looks_at() -> None:
    from qbrec.catalog.encoders.image import open_picture

    buffer = io.BytesIO()
    Image.new("RGB", (2048, 2048)).save(buffer, format="JPEG")
    sides = {side: open_picture(buffer.getvalue(), max_pixels=10**7, side=side).width for side in (32, 224)}
    assert sides[32] == 256  # the smallest fraction a JPEG can be unpacked at
    assert 448 <= sides[224] <= 512


def test_formats_that_start_programs_are_not_opened() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="EPS")
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(buffer.getvalue(), max_pixels=100)


def test_attributes_are_a_text_of_their_own() -> None:
    columns = {
        "item_id": ["a", "b", "c"],
        "title": ["paint", "brush", None],
        "colour": ["red", " ", None],
        "tags": pa.array([["x", None, "y z"], [], None], pa.list_(pa.string())),
        "pieces": [3, None, None],
        "weight": [1.5, None, None],
        "vegan": [True, None, None],
    }
    names = ("colour", "tags", "pieces", "weight", "vegan", "absent")
    text = attribute_texts(pa.table(columns), names).to_pylist()
    assert text == ["colour: red; tags: x, y z; pieces: 3; weight: 1.5; vegan: true", None, None]
    config = CatalogConfig(text=TextConfig(attributes=names))
    rows = encode(columns, config)
    assert [row["tokens.text"] for row in rows] == [2, 1, 0]
    assert [row["tokens.text"] for row in encode(columns)] == [1, 1, 0]
    other = encode(columns | {"colour": ["blue", None, None]}, config)
    assert rows[0]["content"] != other[0]["content"]
    assert rows[1]["content"] == other[1]["content"]


def test_a_long_description_becomes_several_tokens() -> None:
    words = " ".join(f"word{n}" for n in range(40))  # 7 to 8 characters each
    columns = {"item_id": ["a", "b"], "title": ["t", "u"], "description": [words, "short"]}
    for most, expected in ((1, [2, 2]), (3, [4, 2]), (64, [7, 2])):
        config = CatalogConfig(text=TextConfig(description_tokens=most, chunk_characters=50))
        assert [row["tokens.text"] for row in encode(columns, config)] == expected
    texts = item_texts(pa.table(columns), category_paths(pa.table(columns)))
    cut = text_tokens(texts, description_tokens=64, chunk_characters=50)
    pieces = [raw for raw, field in zip(cut.raw.to_pylist(), cut.field, strict=True) if field == 1]
    assert " ".join(pieces[:-1]) == words
    assert max(map(len, pieces)) <= 50
    assert cut.owner.tolist() == sorted(cut.owner.tolist())
    solid = pa.table({"item_id": ["a"], "description": ["x" * 120]})
    found = text_tokens(item_texts(solid, category_paths(solid)), description_tokens=9, chunk_characters=50)
    assert [len(piece) for piece in found.raw.to_pylist()] == [50, 50, 20]


NAMES = st.lists(
    st.one_of(st.none(), st.sampled_from(["", " ", "Art", " Art ", "Wall Paint", "x"])), max_size=4
)


@given(st.lists(st.one_of(st.none(), NAMES), max_size=6))
def test_category_paths_and_buckets_are_those_of_a_loop(paths: list[list[str | None] | None]) -> None:
    brands = ["Acme ", None, "", " ", "ACME", "b"][: len(paths)]
    columns = {"item_id": [str(n) for n in range(len(paths))]}
    table = pa.table(
        columns
        | {"categories": pa.array(paths, pa.list_(pa.string())), "brand": pa.array(brands, pa.string())}
    )
    tidy = [[name.strip() for name in path or [] if name and name.strip()] for path in paths]
    assert category_paths(table).to_pylist() == tidy
    assert category_paths(table.slice(1)).to_pylist() == tidy[1:]
    config = CatalogConfig(structure_depth=3, structure_buckets=1000)
    encoder = ItemEncoder(config, modalities=(), display=pa.schema([]), text=None)
    found = encoder.structure(table, category_paths(table))
    assert found.shape == (len(paths), 4)
    for row, path, brand in zip(found.tolist(), tidy, brands, strict=True):
        keys = ["\x1f".join(["category", *path[: d + 1]]) for d in range(min(3, len(path)))]
        expected = [int(h % np.uint64(1000)) for h in hash_bytes(key.encode() for key in keys)]
        name = (brand or "").strip().lower()
        mark = int(hash_bytes([f"\x1fbrand\x1f{name}".encode()])[0] % np.uint64(1000)) if name else -1
        assert row == expected + [-1] * (3 - len(expected)) + [mark]


def test_hashes_of_vectors() -> None:
    rng = np.random.default_rng(0)
    for width in (1, 3, 4, 130):
        vectors = rng.standard_normal((500, width)).astype(np.float16)
        vectors[1] = vectors[0]
        found = hash_vectors(vectors)
        distinct = len(np.unique(vectors, axis=0))
        assert len(np.unique(found)) == distinct
        np.testing.assert_array_equal(hash_vectors(np.asfortranarray(vectors)), found)
        np.testing.assert_array_equal(hash_vectors(vectors[7:9]), found[7:9])
    # What plain sums of products do not see: two flipped signs, two elements exchanged.
    base = rng.standard_normal(16).astype(np.float16)
    flipped, swapped = base.copy(), base.copy()
    flipped[[3, 7]] *= -1
    swapped[[0, 4]] = swapped[[4, 0]]
    assert len(np.unique(hash_vectors(np.stack([base, flipped, swapped])))) == 3
    assert hash_vectors(np.zeros((1, 3), np.float16))[0] != hash_vectors(np.zeros((1, 4), np.float16))[0]


def test_hashes_of_sequences_see_the_order() -> None:
    owner = np.array([0, 0, 1, 1, 3], np.int64)
    tokens = np.array([5, 6, 6, 5, 5], np.uint64)
    found = hash_sequences(owner, tokens, 4)
    assert found[2] == 0
    assert len(np.unique(found)) == 4
    np.testing.assert_array_equal(hash_sequences(np.array([0, 0]), tokens[:2], 1), found[:1])


@given(
    st.lists(
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.floats(width=32)), min_size=2, max_size=3)),
        max_size=6,
    ),
    st.sampled_from([pa.float16(), pa.float32(), pa.float64()]),
)
def test_vectors_are_those_of_a_loop(rows: list[list[float | None] | None], kind: pa.DataType) -> None:
    with np.errstate(over="ignore"):
        tidy = [
            row and [None if x is None else float(np.float16(x)) if kind == pa.float16() else x for x in row]
            for row in rows
        ]
    column = pa.chunked_array([pa.array(tidy, pa.list_(kind))])
    vectors, present, fault = as_vectors(column, 3)
    assert present.tolist() == [row is not None for row in rows]
    for i, row in enumerate(tidy):
        if row is None:
            assert fault[i] == 0
        elif len(row) != 3:
            assert fault[i] == 1
        else:
            with np.errstate(over="ignore"):
                expected = np.array([np.nan if x is None else x for x in row]).astype(np.float16)
            assert fault[i] == (0 if np.isfinite(expected).all() else 2)
            np.testing.assert_array_equal(vectors[i], expected)


def test_no_items_at_all() -> None:
    columns = {
        "item_id": ["a"],
        "title": ["x"],
        "categories": [["c"]],
        "image": [png((1, 2, 3))],
        "x_embedding": [[1.0]],
    }
    table = pa.table(columns).slice(0, 0)
    found = encoded({name: table[name] for name in columns}, embeddings={"x": ("x_embedding", 1)})
    assert found.num_rows == 0
    assert found.schema == encoded(columns, embeddings={"x": ("x_embedding", 1)}).schema


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": "grid", "grid": 7, "max_pictures": 6},
        {"grid": 1},
        {"max_pictures": 0},
        {"connect_timeout_s": 0.0},
    ],
)
def test_senseless_pictures(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="255 tokens" if "tokens" in wrong else next(iter(wrong))):
        ImageConfig(**wrong)
    assert ImageConfig(tokens="grid", grid=7, max_pictures=5).tokens_per_picture == 50


def test_senseless_texts() -> None:
    with pytest.raises(ValueError, match="twice"):
        TextConfig(attributes=("a", "b", "a"))
