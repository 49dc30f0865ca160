"""Parts of the test users whose numbers tell more than the mean over all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qbrec.evaluation.protocol import TestSet

HEAD_SHARE = 0.2
SHORT_HISTORY = 5


def test_slices(
    test: TestSet, *, train_counts: NDArray[np.int64], near_duplicate_group: NDArray[np.int64]
) -> dict[str, NDArray[np.bool_]]:
    """Membership of every test user in every slice.

    - `all`;
    - `non_duplicate`: no item of the history is a near-duplicate of the target (equal content, or bought by
      the same users: a copied listing gives it away);
    - `cold`: the target never occurs in the training part;
    - `head`, `tail`: the target is among the most popular fifth of the candidates, or not;
    - `short`, `long`: at most five items before the target, or more.

    Args:
        test: Users and targets.
        train_counts: Interactions of each item in the training part, [N].
        near_duplicate_group: First row of the near-duplicates of each item, [N].

    Returns:
        bool [B] by name.
    """
    groups = np.asarray(near_duplicate_group)
    owner = test.contexts.row_ids
    same = groups[test.contexts.values] == groups[test.targets][owner]
    duplicates = np.bincount(owner[same], minlength=len(test)) > 0
    candidates = np.sort(test.ties[test.allowed])
    num_head = int(np.ceil(HEAD_SHARE * len(candidates)))
    head = test.ties[test.targets] <= candidates[num_head - 1]
    short = test.contexts.lengths <= SHORT_HISTORY
    return {
        "all": np.ones(len(test), bool),
        "non_duplicate": ~duplicates,
        "cold": np.asarray(train_counts)[test.targets] == 0,
        "head": head,
        "tail": ~head,
        "short": short,
        "long": ~short,
    }


test_slices.__test__ = False  # type: ignore[attr-defined]  # pytest: no test
