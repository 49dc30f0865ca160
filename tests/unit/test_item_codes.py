"""Item codes: who has one, and that appended items share the last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qbrec.sequence.item_codes import ItemCodes, codes_read
from qbrec.storage.artifact import ArtifactStore


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 50), st.integers(1, 5))
def test_those_with_enough_interactions_are_chosen(counts: list[int], largest: int, least: int) -> None:
    own = ItemCodes.choose(np.array(counts), largest=largest, least=least)
    expected = [row for row, count in enumerate(counts) if count >= least and len(counts) <= largest]
    assert (own.rows.tolist() if own is not None else []) == expected


@given(st.sets(st.integers(0, 400), min_size=1), st.sampled_from([np.uint8, np.uint16]), st.integers(0, 5))
def test_every_other_item_has_the_shared_code(rows: set[int], kind: type, appended: int) -> None:
    own = ItemCodes(np.array(sorted(rows)))
    codes = np.random.default_rng(0).integers(0, 256, (401 + appended, 3)).astype(kind)
    found = own.beside(codes)
    np.testing.assert_array_equal(found[:, :3], codes)
    number = {row: code for code, row in enumerate(sorted(rows))}
    assert found[:, 3].tolist() == [number.get(row, len(rows)) for row in range(len(codes))]
    assert found.max() < 256 or found.dtype == np.uint16
    assert found[:, 3].max(initial=0) < own.size


def test_an_artifact_tells_what_its_encoder_reads(tmp_path: Path) -> None:
    writer = ArtifactStore(tmp_path).writer("pretrain", "a" * 64)
    writer.prepare()
    ItemCodes(np.array([2, 3])).save(writer)
    artifact = writer.commit(meta={}, inputs={}, config={}, seed=0)
    codes = np.array([[1], [2], [3], [4], [5]], np.uint8)
    assert codes_read(artifact, codes).tolist() == [[1, 2], [2, 2], [3, 0], [4, 1], [5, 2]]
