"""A catalogue and its generations read as one, against a plain dictionary."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.catalog.append.classify import equal_values
from qbrec.errors import DataError
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import RaggedField
from qbrec.storage.generations import GenerationsView, current_generations
from qbrec.storage.hashing import hash64
from tests.support.generations import (
    DOMAINS,
    append_generation,
    feature,
    shown,
    title,
    write_catalog,
)

TEXT = RaggedField("feature.text", counts="tokens.text")
NAMES = [(domain, f"i{n}" * (1 + n % 2)) for domain in DOMAINS for n in range(5)]
SHOP = [(*name, 1) for name in NAMES[:7]]
BATCH = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 4), max_size=6)
STEPS = st.lists(st.tuples(BATCH, st.sets(st.sampled_from(NAMES), max_size=4)), max_size=4)


@dataclass
class Known:
    row: int
    version: int
    retired: bool = False


def rows_by_hash(names: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(names, key=lambda name: int(hash64(name[0], [name[1]])[0]))


def check(view: GenerationsView, model: dict[tuple[str, str], Known], collapsed: set[int]) -> None:
    """Everything that the view says of every row."""
    by_row = sorted(model.items(), key=lambda item: item[1].row)
    assert [known.row for _, known in by_row] == list(range(view.num_items))
    rows = np.random.default_rng(0).permutation(view.num_items)
    names = [by_row[row][0] for row in rows]
    versions = [by_row[row][1].version for row in rows]
    assert view.item_ids(rows) == [name for _, name in names]
    assert view.titles(rows) == [title(n, v) for (_, n), v in zip(names, versions, strict=True)]
    table = view.display(rows)
    assert table["row"].to_pylist() == rows.tolist()
    assert table["domain"].to_pylist() == [domain for domain, _ in names]
    assert table["price"].is_null().to_pylist() == [shown(version) % 2 == 1 for version in versions]
    found = view.take(rows, ["row", "content", TEXT])
    assert found["row"].tolist() == rows.tolist()
    assert found["content"].tolist() == [min(version, 3) for version in versions]
    for place, ((_, name), version) in enumerate(zip(names, versions, strict=True)):
        # Version 4 shows another title than version 3, and both are given with their features.
        np.testing.assert_array_equal(found["feature.text"].row(place), feature(name, version))
    gone = [known.retired or known.row in collapsed for _, known in by_row]
    assert view.retired.tolist() == gone
    first = min(row for row in range(view.num_items) if row not in collapsed)
    assert view.representatives(rows).tolist() == [first if row in collapsed else row for row in rows]
    assert view.retired_later(np.arange(view.num_items)).tolist() == [k.retired for _, k in by_row]
    for domain in DOMAINS:
        ids = [name for d, name in NAMES if d == domain]
        expected = [model[domain, name].row if (domain, name) in model else -1 for name in ids]
        assert view.lookup(ids, domain).tolist() == expected
        live = [k.row for (d, _), k in by_row if d == domain and not gone[k.row]]
        assert np.flatnonzero(view.candidates(domain)).tolist() == live
    assert int(view.candidates().sum()) == len(gone) - sum(gone)


@given(STEPS, st.sets(st.integers(0, 6), max_size=2))
@settings(max_examples=25)
def test_any_history_of_a_shop(
    steps: list[tuple[dict[tuple[str, str], int], set[tuple[str, str]]]], collapsed: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(folder)
        view = GenerationsView(write_catalog(store, SHOP, collapsed=collapsed))
        model = {name: Known(row, 1) for row, name in enumerate(rows_by_hash(NAMES[:7]))}
        check(view, model, collapsed)
        for number, (batch, leaving) in enumerate(steps, 1):
            expected = {"added": 0, "changed": 0, "unchanged": 0, "restored": 0}
            fresh, stored = [], set()
            for name, version in batch.items():
                known = model.get(name)
                if known is None:
                    fresh.append(name)
                    continue
                same = known.version == version
                kind = "restored" if known.retired else "unchanged" if same else "changed"
                expected[kind] += 1
                known.retired, known.version = False, version
                stored |= set() if same else {known.row}
            out = [model[name] for name in leaving if name in model and name not in batch]
            rows = [known.row for known in out]
            for known in out:
                known.retired = True
            for row, name in enumerate(rows_by_hash(fresh), len(model)):
                model[name] = Known(row, batch[name])
                expected["added"] += 1
                stored.add(row)
            items = [(*name, version) for name, version in batch.items()]
            view, tally = append_generation(store, view, items, retire=rows)
            assert tally == expected
            check(view, model, collapsed)
            new = [int(row) for block in view.new_features(number, ["row"]) for row in block["row"]]
            assert set(new) == stored
            assert len(new) == len(stored)
            assert not view.superseded(new, number).any()


def _digest(artifact: Artifact) -> dict[str, str]:
    files = [path for path in artifact.path.rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_was_written_before_is_not_touched(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = GenerationsView(write_catalog(store, SHOP))
    second, _ = append_generation(store, first, [("pets", "new", 1), ("pets", "i0", 2)])
    before = [_digest(first.base.artifact), _digest(second.generations[0].artifact)]
    third, tally = append_generation(store, second, [("pets", "new", 2), ("pets", "i0", 2)], retire=[0])
    assert tally == {"added": 0, "changed": 1, "unchanged": 1, "restored": 0}
    assert [_digest(first.base.artifact), _digest(second.generations[0].artifact)] == before
    assert third.lookup(["new", "i0"], "pets").tolist() == second.lookup(["new", "i0"], "pets").tolist()
    # What generation 1 encoded of `new` is old now; `i0` it encoded for good.
    assert third.superseded(third.lookup(["new", "i0"], "pets"), 1).tolist() == [True, False]
    assert first.retired.tolist() == [False] * 7


def test_generations_have_to_follow_one_another(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    one = GenerationsView(write_catalog(store, SHOP))
    two, _ = append_generation(store, one, [("pets", "new", 1)])
    three, _ = append_generation(store, two, [("pets", "newer", 1)])
    catalog, first, second = (one.base.artifact, *(g.artifact for g in three.generations))
    with pytest.raises(DataError, match="generation 1 was not appended to what stands before it"):
        GenerationsView(catalog, [second])
    with pytest.raises(DataError, match="generation 1 was not appended"):
        GenerationsView(catalog, [second, first])
    with pytest.raises(DataError, match="not a generation"):
        GenerationsView(catalog, [catalog])
    with pytest.raises(DataError, match="no domain 'cars'"):
        three.lookup(["x"], "cars")
    assert current_generations(catalog, [first, second]) == [first, second]
    rebuilt = write_catalog(ArtifactStore(tmp_path / "other"), SHOP[:5])
    assert current_generations(rebuilt, [first, second]) == []


def test_one_hash_of_two_ids_over_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored id decides, not the hash: of the catalogue and of an earlier generation alike."""
    store = ArtifactStore(tmp_path)
    catalog = GenerationsView(write_catalog(store, SHOP))
    view, _ = append_generation(store, catalog, [("pets", "late", 1)])
    for there in ("i0", "late"):
        taken = hash64("pets", [there])
        monkeypatch.setattr("tests.support.generations.hash64", lambda domain, ids, taken=taken: taken)
        with pytest.raises(DataError, match="same 64-bit hash") as caught:
            append_generation(store, view, [("pets", "other", 1)])
        assert f"{there!r} of 'pets'" in str(caught.value)
        assert "'other' of 'pets'" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "first", "second", "equal"),
    [
        (pa.string(), ["a", None, None, "b"], ["a", None, "b", "c"], [True, True, False, False]),
        (pa.float64(), [1.0, float("nan"), None], [1.0, float("nan"), float("nan")], [True, True, False]),
        (pa.list_(pa.string()), [["a"], [], None], [["a", "b"], [], []], [False, True, False]),
        (pa.list_(pa.float32()), [[float("nan")], [1]], [[float("nan")], [2]], [True, False]),
        (pa.struct([("x", pa.int8())]), [{"x": 1}, None], [{"x": 1}, {"x": None}], [True, False]),
        (pa.bool_(), [True, False], [True, True], [True, False]),
        (pa.timestamp("s"), [1, 2], [1, None], [True, False]),
        (pa.binary(), [b"a", b"b"], [b"a", b""], [True, False]),
    ],
)
def test_equal_values(
    kind: pa.DataType, first: list[object], second: list[object], equal: list[bool]
) -> None:
    a, b = pa.array(first, kind), pa.array(second, kind)
    assert equal_values(a, b).tolist() == equal
    assert equal_values(pa.chunked_array([a[:1], a[1:]]), b).tolist() == equal
    none = pa.nulls(len(a))
    assert equal_values(a, none).tolist() == a.is_null().to_pylist()
    assert equal_values(none, none).tolist() == [True] * len(a)
