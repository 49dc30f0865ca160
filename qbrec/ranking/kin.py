"""What appended items inherit of the bonus: nobody has followed them yet, their nearest kin speaks for them.

Most paths lead along what was done with items, and an appended item is at the end of none of those. Its own
arrows of content alone leave it far behind the catalogue, semantic IDs or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from qbrec.ranking.counted import strongest
from qbrec.ranking.graphs import CONTENT_PATHS, ItemGraphs, steps


def kin_of_appended(graphs: ItemGraphs, weights: Sequence[float]) -> sp.csr_matrix | None:
    """The nearest item of the catalogue for each appended one, by the content view that is trusted most.

    Where an item lacks that view, or is like nothing by it, the next one decides.

    Args:
        graphs: Grown ones.
        weights: Of their paths, in the order of `graphs.names`, fitted on validation. The trust in a view is
            the weight of its direct path, which is content and nothing else; of equal ones, that of the two
            longer paths, which say as much of their other step. A view without any weight is not asked.

    Returns:
        Squared cosines, float32 CSR [N + M, N + M], from items of the catalogue to appended ones; None
        without appended items, or where no view is trusted.
    """
    by_path = dict(zip(graphs.names, weights, strict=True))
    trust = {}
    for view in graphs.alike:
        direct, *longer = (by_path[name.format(view)] for name in CONTENT_PATHS)
        trust[view] = direct, sum(longer)
    appended = np.arange(graphs.num_items - graphs.num_appended, graphs.num_items)
    nearest = None
    asked = (view for view in trust if any(trust[view]))
    for view in sorted(asked, key=trust.__getitem__, reverse=True):
        rows = strongest(graphs.alike[view][appended], 1)
        if nearest is None:
            nearest = rows
        else:
            silent = (np.diff(nearest.indptr) == 0).astype(np.float32)
            nearest = (nearest + sp.diags(silent) @ rows).tocsr()
    if nearest is None or not len(appended):
        return None
    indptr = np.concatenate([np.zeros(appended[0], nearest.indptr.dtype), nearest.indptr])
    whole = sp.csr_matrix((nearest.data, nearest.indices, indptr), shape=graphs.follows.shape)
    return whole.T.tocsr().astype(np.float32)


def with_inherited(bonus: sp.csr_matrix, kin: sp.csr_matrix | None) -> sp.csr_matrix:
    """The bonus, in which an appended item has that of its kin times their likeness if it has less itself.

    Args:
        bonus: CSR [B, N + M], non-negative.
        kin: Of `kin_of_appended`.

    Returns:
        float32 CSR [B, N + M]; bonuses of the catalogue as they were.
    """
    return bonus if kin is None else bonus.maximum(steps(bonus, kin)).tocsr()
