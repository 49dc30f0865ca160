"""The built-in text encoder: exact n-gram counts, invariances, neighbours against scikit-learn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from qbrec.catalog.encoders.ngrams import ngram_counts, normalise
from qbrec.catalog.encoders.text import FIELDS, HashedNgramEncoder, document_frequencies
from qbrec.catalog.synth import generate


def clean(*texts: str | None) -> pa.Array:
    return normalise(pa.array(texts, pa.string()))


def test_normalisation() -> None:
    found = clean("  Crème-BRÛLÉE,  2.5oz!", None, "...", "Ünï çode 日本").to_pylist()
    assert found == ["creme brulee 2 5oz", "", "", "uni code 日本"]


@given(st.lists(st.text(alphabet="ab ñ1日-", max_size=20), min_size=1, max_size=6))
def test_counts_are_those_of_scikit_learn(texts: list[str]) -> None:
    """Same multiset of counts per text: hashing only renames the columns (no collisions on so few)."""
    tidy = clean(*texts)
    for ours, theirs in zip(
        ngram_counts(tidy),
        (
            CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+"),
            CountVectorizer(analyzer="char_wb", ngram_range=(3, 5)),
        ),
        strict=True,
    ):
        try:
            expected = theirs.fit_transform(tidy.to_pylist())
        except ValueError:  # an empty vocabulary
            assert ours.nnz == 0
            continue
        for row in range(len(texts)):
            mine = Counter(ours[row].data.astype(int).tolist())
            if theirs.analyzer == "char_wb":
                # scikit-learn repeats a short padded word once per size; a window that does not fit is none
                # here.
                words = tidy[row].as_py().split()
                assert mine.total() == len({g for w in words for n in (3, 4, 5) for g in grams(f" {w} ", n)})
            else:
                assert mine == Counter(expected[row].data.tolist())


def grams(word: str, size: int) -> list[str]:
    return [word[i : i + size] for i in range(len(word) - size + 1)]


def test_a_text_is_encoded_the_same_in_any_company() -> None:
    texts = clean("red paint brush", "blue steel hammer", "red paint set", "")
    encoder = fitted(texts, dim=32)
    together = encoder.encode(texts, field="title")
    for i in range(4):
        np.testing.assert_array_equal(encoder.encode(texts.slice(i, 1), field="title")[0], together[i])
    assert not together[3].any()
    np.testing.assert_allclose(np.linalg.norm(together[:3], axis=1), 1, rtol=1e-5)


def test_repeated_texts_are_what_they_are_alone() -> None:
    texts = clean("red paint", "blue", "red paint", "", "blue", "red paint", "", "blue")
    encoder = fitted(texts, dim=16)
    together = encoder.encode(texts, field="labels")
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(encoder.encode(pa.array([text]), field="labels")[0], together[i])


def test_unseen_wording_still_tells_items_apart() -> None:
    encoder = fitted(clean("red paint", "red brush", "blue paint"), dim=64)
    vectors = encoder.encode(clean("zyxgluon wavicle", "quokka jumble", "zyxgluon wavicle"), field="title")
    assert vectors[0] @ vectors[2] == pytest.approx(1)
    assert abs(vectors[0] @ vectors[1]) < 0.6


def test_state_comes_back() -> None:
    texts = clean("red paint brush", "blue paint", "green paint brush")
    encoder = fitted(texts, dim=16)
    again = HashedNgramEncoder.from_state(encoder.state())
    np.testing.assert_array_equal(again.encode(texts, field="title"), encoder.encode(texts, field="title"))


def test_the_fit_does_not_depend_on_the_number_of_threads() -> None:
    words = np.array([f"word{n}" for n in range(700)])
    rows = np.random.default_rng(0).zipf(1.3, size=(1500, 8)) % len(words)
    texts = clean(*(" ".join(words[row]) for row in rows))
    states = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            states.append(fitted(texts, dim=200).projection)
    assert all(np.array_equal(state, states[0]) for state in states)


def test_neighbours_share_the_leaf(tmp_path: Path) -> None:
    shop = generate(tmp_path, num_items=1500, num_users=5, images=False, cold=0.0)
    titles = normalise(pq.read_table(shop.items)["title"].combine_chunks())
    leaf = pq.read_table(shop.truth)["leaf"].to_numpy()
    assert purity(fitted(titles, dim=128).encode(titles, field="title"), leaf) > 0.9


@pytest.mark.parametrize(("name", "column"), [("beauty", "title"), ("scientific", "title")])
def test_neighbours_beat_scikit_learn(bench_data: Path, name: str, column: str) -> None:
    """Same data, same width: TF-IDF + truncated SVD of scikit-learn is the rival."""
    table = pq.read_table(bench_data / name / "items.parquet").slice(0, 4000)
    texts = normalise(table[column].combine_chunks())
    paths = ["/".join(path or []) for path in table["categories"].to_pylist()]
    leaf = np.unique(paths, return_inverse=True)[1]
    with threadpool_limits(1):  # threads that wait for each other on a busy machine take ten times longer
        ours, theirs = compare(texts, leaf)
    chance = float(np.square(np.bincount(leaf) / len(leaf)).sum())
    print(f"{name}: neighbours of the same leaf {ours:.3f}, scikit-learn {theirs:.3f}, chance {chance:.3f}")
    assert ours > 8 * chance
    assert ours > theirs - 0.01


def compare(texts: pa.Array, leaf: NDArray[np.int64]) -> tuple[float, float]:
    """Purity of our neighbours and of scikit-learn's."""
    ours = purity(fitted(texts, dim=128).encode(texts, field="title"), leaf)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit_transform(texts.to_pylist())
    return ours, purity(TruncatedSVD(128, random_state=0).fit_transform(words), leaf)


def fitted(texts: pa.Array, *, dim: int) -> HashedNgramEncoder:
    frequencies = np.stack([document_frequencies(texts)] * len(FIELDS))
    sample = pc.unique(texts.filter(pc.not_equal(texts, "")))
    return HashedNgramEncoder.fit(
        frequencies, np.full(len(FIELDS), len(texts)), sample, field="title", dim=dim, seed=0
    )


def purity(vectors: NDArray[np.float32], leaf: NDArray[np.int64], neighbours: int = 10) -> float:
    """Share of each item's nearest neighbours (cosine) that lie in its leaf."""
    vectors = normalize(np.asarray(vectors, dtype=np.float32))
    query = np.random.default_rng(0).choice(len(vectors), min(1000, len(vectors)), replace=False)
    scores = vectors[query] @ vectors.T
    scores[np.arange(len(query)), query] = -np.inf
    near = np.argpartition(-scores, neighbours, axis=1)[:, :neighbours]
    return float((leaf[near] == leaf[query][:, None]).mean())
