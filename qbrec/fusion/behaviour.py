"""The behaviour view: which items are consumed together, as a low-rank factor of their co-occurrence.

Beyond the paper. It is computed from the training part of the histories and from nothing else.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from qbrec.engine.threads import one_blas_thread
from qbrec.storage.block_reader import BlockSet
from qbrec.storage.hashing import uniform
from qbrec.storage.ragged import Ragged

_CHUNK = 4_000_000  # interactions turned into pairs at once: bounds the memory of the pair lists
_SMOOTHING = 0.75  # context counts to this power (word2vec, GloVe): keeps rare contexts from dominating
_OVERSAMPLE = 16
_POWER_ITERATIONS = 3


def training_histories(histories: BlockSet, *, max_interactions: int, seed: int) -> Ragged:
    """What users did before their validation item: `row[:cut[0]]`, oldest first.

    Args:
        histories: The catalogue's blocks.
        max_interactions: Above this many (in expectation) a sample of the users is taken, with their whole
            histories.
        seed: Of that sample.

    Returns:
        Item rows int64, one row of the result per sampled user.
    """
    total = int(histories.column("cut")[:, 0].sum(dtype=np.int64))
    values, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block in range(histories.num_blocks):
        fields = histories.read(block, ["user", "offset", "row", "cut"])
        part = Ragged(fields["row"], fields["offset"].astype(np.int64)).prefix(fields["cut"][:, 0])
        kept = uniform(fields["user"].astype(np.uint64), stream=seed) * total < max_interactions
        part = part.take(np.flatnonzero(kept))
        values.append(part.values)
        lengths.append(part.lengths)
    return Ragged.from_lengths(np.concatenate(values), np.concatenate(lengths))


def cooccurrence(histories: Ragged, *, num_items: int, window: int) -> sp.csr_matrix:
    """Symmetric co-occurrence of items within `window` positions, weight 1 / distance.

    Args:
        histories: Item rows of the training part, oldest first.
        num_items: N.
        window: Largest distance in positions.

    Returns:
        float32 [N, N] without diagonal.
    """
    total = sp.csr_matrix((num_items, num_items), dtype=np.float32)
    offsets = histories.offsets
    start = 0
    while start < len(histories):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _CHUNK, side="right")) - 1)
        rows = histories.values[offsets[start] : offsets[stop]]
        owner = np.repeat(np.arange(start, stop), np.diff(offsets[start : stop + 1]))
        for distance in range(1, window + 1):
            together = owner[distance:] == owner[:-distance]
            left, right = rows[:-distance][together], rows[distance:][together]
            weight = np.full(len(left), 1.0 / distance, dtype=np.float32)
            total = total + sp.coo_matrix((weight, (left, right)), shape=total.shape).tocsr()
        start = stop
    total = (total + total.T).tocsr()
    total.setdiag(0)
    total.eliminate_zeros()
    return total.astype(np.float32)


def positive_pmi(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Positive pointwise mutual information of symmetric counts, with smoothed contexts; float32 [N, N]."""
    result = counts.tocoo()
    degree = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    context = degree**_SMOOTHING
    scale = degree[result.row] * context[result.col]
    result.data = np.maximum(np.log(result.data * context.sum() / scale), 0).astype(np.float32)
    ppmi = result.tocsr()
    ppmi.eliminate_zeros()
    return ppmi


@one_blas_thread()
def behaviour_vectors(
    histories: Ragged, *, num_items: int, dim: int, window: int, seed: int
) -> NDArray[np.float32]:
    """Behaviour features of all items: randomised SVD (Halko et al. 2011) of their PPMI, U √Σ of unit RMS.

    Args:
        histories: Item rows of the training part (`hist[:cut[0]]`), oldest first.
        num_items: N.
        dim: Width d; catalogues with fewer items are padded with zeros.
        window: Largest distance in positions that counts as together.
        seed: Of the random projection.

    Returns:
        float32 [N, d]; an all-zero row means the view is absent (nothing co-occurred with the item).
    """
    vectors = np.zeros((num_items, dim), dtype=np.float32)
    matrix = positive_pmi(cooccurrence(histories, num_items=num_items, window=window))
    if not matrix.nnz:
        return vectors
    rank = min(dim, num_items)
    generator = np.random.default_rng(seed)
    basis = generator.standard_normal((num_items, min(rank + _OVERSAMPLE, num_items)), dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        # Orthonormal between the passes: in float32 the small directions would drown otherwise.
        basis = np.linalg.qr(matrix @ basis)[0]
        basis = np.linalg.qr(matrix.T @ basis)[0]
    image = matrix @ basis
    left, singular, _ = np.linalg.svd(image, full_matrices=False)
    vectors[:, :rank] = left[:, :rank] * np.sqrt(singular[:rank])
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    seen = np.diff(matrix.indptr)[:, None] > 0
    scaled = vectors * (np.sqrt(dim) / np.maximum(norm, np.finfo(np.float32).tiny))
    return np.where(seen & (norm > 0), scaled, 0).astype(np.float32)
