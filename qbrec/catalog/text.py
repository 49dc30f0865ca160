"""Built-in text encoder: hashed n-grams → TF-IDF → latent semantic projection, frozen in the artifact.

No download and no vocabulary. Inverse document frequencies come from one counting pass over the whole
catalogue; the projection of the frequent n-grams is a truncated SVD (latent semantic analysis) of a sample
chosen by item hash; all other n-grams keep a fixed sparse random projection, so that wording nobody has seen
before still tells items apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from qbrec.catalog.ngrams import NUM_BUCKETS, ngram_counts, normalise
from qbrec.engine.threads import one_blas_thread
from qbrec.storage.hashing import mix64

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

WORD_SHARE = 0.7  # of a text's squared length that words may hold is 0.7²; characters hold the rest
MAX_FEATURES = 32_768  # n-grams with a learnt direction
SAMPLE_TEXTS = 16_384  # texts the projection is fitted on
TAIL_WEIGHT = 0.3  # of n-grams without a learnt direction, beside a mean text's length of 1
_SKETCH = 4  # dimensions one such n-gram touches
_OVERSAMPLE = 16
FIELDS = (
    "title",
    "description",
    "labels",
)  # feature tokens of an item, in this order; labels: categories and brand


def document_frequencies(texts: pa.Array) -> NDArray[np.int64]:
    """In how many of n normalised texts every n-gram bucket occurs, int64 [NUM_BUCKETS]."""
    words, chars = ngram_counts(texts)
    return np.bincount(np.concatenate([words.indices, chars.indices]), minlength=NUM_BUCKETS)


@dataclass(frozen=True)
class HashedNgramEncoder:
    """Texts to unit vectors.

    Attributes:
        idf: Inverse document frequency of every bucket by field, float32 [3, NUM_BUCKETS]. Each has its own,
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
                int64 [3, NUM_BUCKETS].
            num_texts: Non-empty texts of each field in the catalogue, int64 [3].
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
        weighted = _tfidf(texts, self.idf[FIELDS.index(field)])
        learnt = np.zeros(NUM_BUCKETS, dtype=bool)
        learnt[self.features] = True
        rare = weighted.copy()
        rare.data = np.where(learnt[rare.indices], np.float32(0), rare.data)
        rare.eliminate_zeros()
        vectors = (weighted[:, self.features] @ self.projection.astype(np.float32)) * np.float32(self.scale)
        vectors += np.float32(TAIL_WEIGHT) * _sketch(rare, self.dim)
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


def _sketch(weighted: sparse.csr_matrix, dim: int) -> Floats:
    """Sparse random projection of every bucket: four dimensions with a sign, from the hash of the bucket."""
    columns, inverse = np.unique(weighted.indices, return_inverse=True)
    counter = columns.astype(np.uint64)[:, None] * np.uint64(_SKETCH)
    draws = mix64(np.asarray(counter + np.arange(_SKETCH, dtype=np.uint64), dtype=np.uint64))
    places = ((draws >> np.uint64(32)) % np.uint64(dim)).astype(np.int32)
    signs = np.where(draws & np.uint64(1), np.float32(0.5), np.float32(-0.5))
    table = sparse.csr_matrix(
        (signs.ravel(), places.ravel(), np.arange(0, places.size + 1, _SKETCH)), shape=(len(columns), dim)
    )
    compact = sparse.csr_matrix(
        (weighted.data, inverse.astype(np.int32), weighted.indptr), shape=(weighted.shape[0], len(columns))
    )
    return np.asarray((compact @ table).toarray(), dtype=np.float32)


__all__ = ["FIELDS", "SAMPLE_TEXTS", "HashedNgramEncoder", "document_frequencies", "normalise"]
