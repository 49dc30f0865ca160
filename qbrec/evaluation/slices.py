"""Parts of the test users whose numbers tell more than the mean over all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qbrec.evaluation.protocol import TestSet
from qbrec.storage.ragged import Ragged

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
    duplicates = saw_near_duplicate(test.contexts, test.targets, near_duplicate_group=near_duplicate_group)
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


def saw_near_duplicate(
    contexts: Ragged, targets: NDArray[np.int64], *, near_duplicate_group: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whose history holds a near-duplicate of the target, bool [B].

    Args:
        contexts: B rows of item rows.
        targets: Item row sought, [B].
        near_duplicate_group: First row of the near-duplicates of each item, [N].
    """
    groups, owner = np.asarray(near_duplicate_group), contexts.row_ids
    same = groups[contexts.values] == groups[targets][owner]
    found: NDArray[np.bool_] = np.bincount(owner[same], minlength=len(contexts)) > 0
    return found


test_slices.__test__ = False  # type: ignore[attr-defined]  # pytest: no test
