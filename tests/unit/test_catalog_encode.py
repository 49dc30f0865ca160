"""Items to features: images, structure, content, embeddings, and every reason for rejection."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qbrec.catalog.contract import Domain, as_vectors
from qbrec.catalog.encode import ItemEncoder, as_binary, from_binary
from qbrec.catalog.image import DIM, SIDE, BadImageError, decode, pixel_statistics
from qbrec.catalog.ngrams import NUM_BUCKETS
from qbrec.catalog.synth_items import encode_png
from qbrec.catalog.text import HashedNgramEncoder
from qbrec.config.sections import CatalogConfig, ImageConfig
from qbrec.errors import ConfigError
from qbrec.storage.hashing import hash64, hash_bytes


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    return encode_png(np.full((1, size, size, 3), colour, np.uint8))[0]


def encode(
    columns: dict[str, Any],
    config: CatalogConfig | None = None,
    embeddings: dict[str, tuple[str, int]] | None = None,
) -> list[dict[str, Any]]:
    table = pa.table(columns)
    domain = Domain(0, "shop", (), (), tuple(table.column_names), embeddings=embeddings or {})
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
        np.ones((3, NUM_BUCKETS), np.float32), np.zeros(0, np.int64), np.zeros((0, 16), np.float16), 1.0
    )
    encoder = ItemEncoder(config or CatalogConfig(), modalities=modalities, display=pa.schema([]), text=text)
    return encoder.encode(table, domain, file=0, first_row=100).to_pylist()


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
    expected = [None, None, away, away, away, "image_path: cannot be read", "image_path: is a URL"]
    assert [row["reason"] for row in rows] == expected


@pytest.mark.parametrize("part", ["text", "image"])
def test_a_named_encoder_without_the_extra(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from qbrec.catalog.named import NamedImageEncoder, NamedTextEncoder

    monkeypatch.setitem(sys.modules, "transformers", None)
    kind: Any = NamedTextEncoder if part == "text" else NamedImageEncoder
    with pytest.raises(ConfigError, match=r"qbrec\[encode\]") as caught:
        kind("some/model", revision=None, batch_size=4)
    assert caught.value.where == f"catalog.{part}.encoder"
