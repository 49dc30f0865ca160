"""Users by id, without an index: they are numbered in the order of their hash, so the table itself is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qbrec.storage.hashing import hash64

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa

# Hashes are as good as uniform, so a guess by proportion is off by about the root of what is left: some five
# rounds for 200 million users. Should they not be, halving ends the search.
_GUESSES = 12


def users_of(table: pa.Table, domain: str, user_ids: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of users, int64 [n]; -1 where there is no such user in the domain.

    Args:
        table: `users.arrow`: columns `domain` and `user_id`, the row is the user's number.
        domain: Domain of all ids asked for.
        user_ids: n ids.
    """
    wanted = hash64(domain, user_ids)
    found = np.full(len(wanted), -1, np.int64)
    # Everything below `low` is smaller, everything from `high` on is larger.
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), table.num_rows, np.int64)
    least, most = np.zeros(len(wanted)), np.full(len(wanted), 2.0**64)
    left = np.flatnonzero(low < high)
    rounds = 0
    while len(left):
        room = high[left] - low[left]
        if rounds < _GUESSES:
            width = np.maximum(most[left] - least[left], 1.0)
            share = (wanted[left].astype(np.float64) - least[left]) / width
            step = np.clip((share * room).astype(np.int64), 0, room - 1)
        else:
            step = room // 2
        place = low[left] + step
        there = _hashes(table, place)
        equal, less = there == wanted[left], there < wanted[left]
        found[left[equal]] = place[equal]
        low[left[less]], least[left[less]] = place[less] + 1, there[less]
        more = ~less & ~equal
        high[left[more]], most[left[more]] = place[more], there[more]
        left = left[~equal]
        left = left[low[left] < high[left]]
        rounds += 1
    return found


def _hashes(table: pa.Table, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash of the users at some places, uint64 [n]."""
    distinct, back = np.unique(places, return_inverse=True)
    rows = table.select(["domain", "user_id"]).take(distinct).to_pydict()
    domains, ids = np.array(rows["domain"]), np.array(rows["user_id"], dtype=object)
    hashes = np.zeros(len(distinct), np.uint64)
    for domain in np.unique(domains):
        mine = domains == domain
        hashes[mine] = hash64(str(domain), ids[mine])
    return hashes[back]
