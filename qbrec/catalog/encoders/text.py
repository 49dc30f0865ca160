"""Built-in text encoder: hashed n-grams → TF-IDF → latent semantic projection, frozen in the artifact.

No download and no vocabulary. Inverse document frequencies come from one counting pass over the whole
catalogue; the projection of the frequent n-grams is a truncated SVD (latent semantic analysis) of a sample
chosen by item hash; all other n-grams keep a fixed sparse random projection, so that wording nobody has seen
before still tells items apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from qbrec.catalog.encoders.ngrams import NUM_BUCKETS, ngram_counts, normalise
from qbrec.engine.threads import one_blas_thread
from qbrec.storage.hashing import mix64

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

WORD_SHARE = 0.7  # of a text's squared length that words may hold is 0.7²; characters hold the rest
MAX_FEATURES = 32_768  # n-grams with a learnt direction
SAMPLE_TEXTS = 16_384  # texts the projection is fitted on
TAIL_WEIGHT = 0.3  # of n-grams without a learnt direction, beside a mean text's length of 1
_REPEATED = 0.8  # share of distinct texts below which each is encoded once
_SKETCH = 4  # dimensions one such n-gram touches
_OVERSAMPLE = 16
# Feature tokens of an item, in this order; labels: categories and brand, attributes: further columns.
FIELDS = ("title", "description", "labels", "attributes")


def document_frequencies(texts: pa.Array) -> NDArray[np.int64]:
    """In how many of n normalised texts every n-gram bucket occurs, int64 [NUM_BUCKETS]."""
    words, chars = ngram_counts(texts)
    return np.bincount(np.concatenate([words.indices, chars.indices]), minlength=NUM_BUCKETS)


@dataclass(frozen=True)
class HashedNgramEncoder:
    """Texts to unit vectors.

    Attributes:
        idf: Inverse document frequency of every bucket by field, float32 [F, NUM_BUCKETS]. Each has its own,
            because a category's name would otherwise look too common to matter in a title.
        features: Buckets with a learnt direction, ascending, int64 [F].
        projection: Their directions, float16 [F, dim] (computed with in float32).
        scale: 1 / root mean square length of the projected sample.
    """

    idf: Floats
    features: NDArray[np.int64]
    projection: NDArray[np.float16]
    scale: float

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.projection.shape[1])

    @cached_property
    def _directions(self) -> Floats:
        return self.projection.astype(np.float32)

    @cached_property
    def _place(self) -> NDArray[np.int32]:
        place = np.full(NUM_BUCKETS, -1, dtype=np.int32)
        place[self.features] = np.arange(len(self.features), dtype=np.int32)
        return place

    @classmethod
    def fit(
        cls,
        frequencies: NDArray[np.int64],
        num_texts: NDArray[np.int64],
        sample: pa.Array,
        *,
        field: str,
        dim: int,
        seed: int,
    ) -> HashedNgramEncoder:
        """Freeze the encoder of a catalogue.

        Args:
            frequencies: Texts of each field that hold each bucket, over the whole catalogue,
                int64 [F, NUM_BUCKETS] (F fields).
            num_texts: Non-empty texts of each field in the catalogue, int64 [F].
            sample: Distinct normalised texts to learn directions from.
            field: The field they come from.
            dim: Width of the vectors.
            seed: Of the range finder (Halko et al. 2011).
        """
        idf = (np.log((1 + num_texts[:, None]) / (1 + frequencies)) + 1).astype(np.float32)
        weighted = _tfidf(sample, idf[FIELDS.index(field)])
        seen = np.bincount(weighted.indices, minlength=NUM_BUCKETS)
        features = np.argsort(-seen, kind="stable")[:MAX_FEATURES]
        features = np.sort(features[seen[features] >= 2]).astype(np.int64)
        matrix = weighted[:, features].tocsr()
        rank = min(dim, *matrix.shape)
        projection = np.zeros((len(features), dim), dtype=np.float16)
        scale = 1.0
        if rank:
            directions = _right_singular_vectors(matrix, rank, seed)
            projection[:, : directions.shape[1]] = directions
            lengths = np.square(matrix @ projection.astype(np.float32)).sum(axis=1)
            scale = float(1 / np.sqrt(max(lengths.mean(), 1e-12)))
        return cls(idf, features, projection, scale)

    def encode(self, texts: pa.Array, *, field: str) -> Floats:
        """Unit vectors of n normalised texts of one field, float32 [n, dim]; zeros for an empty text."""
        if not pc.any(pc.not_equal(texts, "")).as_py():
            return np.zeros((len(texts), self.dim), dtype=np.float32)
        distinct = texts.dictionary_encode()
        if len(distinct.dictionary) < _REPEATED * len(texts):  # labels are much the same all over a shop
            vectors = self.encode(distinct.dictionary, field=field)
            return np.asarray(vectors[np.asarray(distinct.indices)], dtype=np.float32)
        weighted = _tfidf(texts, self.idf[FIELDS.index(field)])
        place = self._place[weighted.indices]
        learnt = place >= 0
        vectors = _only(weighted, learnt, place, len(self.features)) @ self._directions
        vectors *= np.float32(self.scale)
        rare = _only(weighted, ~learnt, weighted.indices, NUM_BUCKETS)
        vectors += np.float32(TAIL_WEIGHT) * (rare @ _sketch(self.dim)).toarray()
        length = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)

    def state(self) -> dict[str, torch.Tensor]:
        """What the artifact keeps, for `from_state`."""
        import torch

        return {
            "text.idf": torch.from_numpy(self.idf),
            "text.features": torch.from_numpy(self.features),
            "text.projection": torch.from_numpy(self.projection),
            "text.scale": torch.tensor([self.scale], dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> HashedNgramEncoder:
        """The frozen encoder of an artifact."""
        arrays = {name: state[f"text.{name}"].numpy() for name in ("idf", "features", "projection")}
        return cls(**arrays, scale=float(state["text.scale"][0]))


def _tfidf(texts: pa.Array, idf: Floats) -> sparse.csr_matrix:
    """Sublinear TF-IDF; words and characters are brought to their share of the length, then added."""
    parts = []
    for counts, share in zip(ngram_counts(texts), (WORD_SHARE, np.sqrt(1 - WORD_SHARE**2)), strict=True):
        counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
        length = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
        counts.data *= np.repeat(share / np.maximum(length, 1e-12), np.diff(counts.indptr)).astype(np.float32)
        parts.append(counts)
    total = (parts[0] + parts[1]).tocsr()
    total.sort_indices()
    return total


@one_blas_thread()
def _right_singular_vectors(matrix: sparse.csr_matrix, rank: int, seed: int) -> Floats:
    """Randomised SVD (Halko, Martinsson, Tropp 2011) of a sparse [n, F]: right vectors [F, ≤ rank]."""
    rng = np.random.default_rng(seed)
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    basis = rng.standard_normal((matrix.shape[1], width)).astype(np.float32)
    # One pass, no power iterations: measured, sharper singular vectors gave worse neighbours and cost more.
    basis = _orthonormal(matrix @ basis)
    basis = _orthonormal(matrix.T @ basis)
    projected = matrix @ basis
    values, vectors = np.linalg.eigh(projected.T.astype(np.float64) @ projected)
    top = vectors[:, np.argsort(-values)[:rank]].astype(np.float32)  # fewer where the texts span less
    # A sign of its own choice per vector would depend on the linear-algebra library.
    directions = basis @ top
    signs = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    return np.asarray(directions * np.where(signs == 0, 1, signs), dtype=np.float32)


def _orthonormal(tall: Floats) -> Floats:
    """A basis of the columns of a tall matrix, from its small Gram matrix.

    Householder QR would be a little more exact; it synchronises its threads at every column, which on a busy
    machine made it many times slower than this.
    """
    wide = tall.astype(np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide)
    kept = values > values[-1] * 1e-10
    return np.asarray(wide @ (vectors[:, kept] / np.sqrt(values[kept])), dtype=np.float32)


def _only(
    weighted: sparse.csr_matrix, kept: NDArray[np.bool_], columns: NDArray[np.int32], width: int
) -> sparse.csr_matrix:
    """The `kept` entries of a sparse matrix, moved to other columns."""
    before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    parts = (weighted.data[kept], columns[kept], before[weighted.indptr])
    return sparse.csr_matrix(parts, shape=(weighted.shape[0], width))


@lru_cache(maxsize=2)
def _sketch(dim: int) -> sparse.csr_matrix:
    """Sparse random projection of every bucket: four dimensions with a sign, from the hash of the bucket."""
    draws = mix64(np.arange(NUM_BUCKETS * _SKETCH, dtype=np.uint64))
    places = ((draws >> np.uint64(32)) % np.uint64(dim)).astype(np.int32)
    signs = np.where(draws & np.uint64(1), np.float32(0.5), np.float32(-0.5))
    starts = np.arange(0, len(draws) + 1, _SKETCH, dtype=np.int32)
    return sparse.csr_matrix((signs, places, starts), shape=(NUM_BUCKETS, dim))


__all__ = ["FIELDS", "SAMPLE_TEXTS", "HashedNgramEncoder", "document_frequencies", "normalise"]
