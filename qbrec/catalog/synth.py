"""A synthetic catalogue with a known truth: taxonomy, wording, pictures, and users who walk it.

Try it (3,000 items, 6,000 users, about three seconds)::

    from qbrec.catalog.synth import generate
    summary = generate("/tmp/shop", num_items=3000, num_users=6000, seed=0, images=True)
    # /tmp/shop/items.parquet, interactions.parquet (the input contract) and truth.parquet

How users walk, so that a model can be judged: from an item of (leaf, position) the next one is

- the *companion*: same position (hence same style word) in the leaf that complements this one,
- the *series*: next position of the same leaf,
- a *sibling*: same position in another leaf of the category, or
- a *jump* to a popular item, mostly of the user's home department.

Companion and series tend to alternate, so the last two items say more than the last one (item-to-item
neighbours cannot see that); companions share wording, so content predicts them; low positions are popular.
No user repeats an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qbrec.catalog.synth_items import (
    Taxonomy,
    build_taxonomy,
    encode_png,
    item_ids,
    item_table,
    item_truth,
    render_images,
)
from qbrec.errors import ConfigError

# Probability of (companion, series, sibling, jump) after each of them: the second-order structure.
TRANSITIONS = np.array(
    [[0.15, 0.60, 0.10, 0.15], [0.60, 0.15, 0.10, 0.15], [0.45, 0.30, 0.05, 0.20], [0.45, 0.30, 0.10, 0.15]]
)
_EPOCH = 1_600_000_000  # seconds
_SPAN = 2 * 365 * 86_400  # seconds in which users begin
_GAP = 3 * 86_400  # mean seconds between two interactions


@dataclass(frozen=True)
class SyntheticSummary:
    """What was written, and the truth in numbers."""

    items: Path
    interactions: Path
    truth: Path
    num_items: int
    num_users: int
    num_interactions: int
    num_duplicates: int
    num_cold: int
    num_without_image: int


def generate(
    out_dir: str | Path,
    *,
    num_items: int,
    num_users: int,
    seed: int = 0,
    images: bool = True,
    image_size: int = 32,
    duplicates: float = 0.02,
    cold: float = 0.05,
    missing_images: float = 0.1,
    missing_descriptions: float = 0.1,
    mean_history: float = 10.0,
    max_history: int = 50,
    equal_timestamps: float = 0.02,
    chunk: int = 65_536,
) -> SyntheticSummary:
    """Write items.parquet, interactions.parquet and truth.parquet; memory is that of one chunk.

    Args:
        out_dir: Folder to write to; made where it is missing.
        num_items: Items, at least 20.
        num_users: Users; lengths are 3 + geometric, up to `max_history` distinct items.
        seed: Everything is a function of it (and, for interactions, of `chunk`).
        images: Whether to render PNG pictures.
        image_size: Pixels a side.
        duplicates: Fraction of items that list another item's content again under their own id.
        cold: Fraction of items no user may touch.
        missing_images: Fraction of items without picture.
        missing_descriptions: Fraction of items without description.
        mean_history: Mean interactions per user.
        max_history: Most interactions per user.
        equal_timestamps: Fraction of interactions that bear the same timestamp as the one before.
        chunk: Items and users generated at a time, and rows per row group.

    Raises:
        ConfigError: A size or a fraction makes no sense.
    """
    for name, fraction in (("duplicates", duplicates), ("cold", cold), ("missing_images", missing_images)):
        if not 0 <= fraction <= 0.5:
            raise ConfigError(f"{name} is {fraction}", where="generate", fix="a fraction from 0 to 0.5")
    if num_items < 20 or num_users < 1 or mean_history < 3 or max_history < 3:
        raise ConfigError(
            "a synthetic catalogue needs 20 items, 1 user and histories of 3",
            where=f"{num_items} items, {num_users} users, histories of {mean_history} up to {max_history}",
            fix="ask for more",
        )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.parquet" for name in ("items", "interactions", "truth")]
    tree = build_taxonomy(num_items, seed=seed, cold=cold)
    counts = _write_items(
        tree,
        paths[0],
        paths[2],
        chunk=chunk,
        image_size=image_size if images else 0,
        rates={
            "duplicates": duplicates,
            "missing_images": missing_images,
            "missing_descriptions": missing_descriptions,
        },
    )
    written = 0
    with pq.ParquetWriter(paths[1], _INTERACTIONS) as writer:
        for number, begin in enumerate(range(0, num_users, chunk)):
            users = np.arange(begin, min(begin + chunk, num_users))
            rng = np.random.default_rng([seed, 2, number])
            table = _interactions(tree, users, rng, mean_history, max_history, equal_timestamps)
            writer.write_table(table)
            written += table.num_rows
    return SyntheticSummary(paths[0], paths[1], paths[2], num_items, num_users, written, *counts)


def _write_items(
    tree: Taxonomy, items: Path, truth_path: Path, *, chunk: int, image_size: int, rates: dict[str, float]
) -> tuple[int, int, int]:
    schema = item_table(tree, item_truth(tree, np.arange(1), **rates)).schema
    if image_size:
        schema = schema.append(pa.field("image", pa.binary()))
    num_duplicates = num_cold = num_missing = 0
    # Pictures weigh a hundred times more than words.
    step = min(chunk, 8192) if image_size else chunk
    with pq.ParquetWriter(items, schema) as item_writer, pq.ParquetWriter(truth_path, _TRUTH) as truth_writer:
        for begin in range(0, tree.num_items, step):
            index = np.arange(begin, min(begin + step, tree.num_items))
            truth = item_truth(tree, index, **rates)
            table = item_table(tree, truth)
            if image_size:
                has = np.flatnonzero(truth.has_image)
                pictures = np.full(len(index), None, dtype=object)
                pictures[has] = encode_png(render_images(tree, truth, size=image_size)[has])
                table = table.append_column("image", pa.array(pictures, pa.binary()))
                num_missing += len(index) - len(has)
            item_writer.write_table(table)
            copies = truth.content != index
            friend = tree.companion[truth.leaf]
            companion = tree.starts[friend] + truth.position % tree.active[friend]
            columns = [
                table["item_id"], tree.department[truth.leaf], tree.category[truth.leaf], truth.leaf,
                truth.position, truth.style, truth.cold,
                truth.has_image if image_size else np.zeros(len(index), dtype=bool),
                pc.if_else(pa.array(copies), item_ids(truth.content), pa.scalar(None, pa.string())),
                item_ids(companion),
            ]  # fmt: skip
            truth_writer.write_table(pa.table(columns, schema=_TRUTH))
            num_duplicates += int(copies.sum())
            num_cold += int(truth.cold.sum())
    return num_duplicates, num_cold, num_missing


def _interactions(
    tree: Taxonomy,
    users: NDArray[np.int64],
    rng: np.random.Generator,
    mean_history: float,
    max_history: int,
    equal_timestamps: float,
) -> pa.Table:
    n = len(users)
    want = np.minimum(2 + rng.geometric(1.0 / max(1.0, mean_history - 2), n), max_history)
    # A walk may step on an item twice; a third more steps nearly always leaves enough distinct ones.
    steps = int(want.max()) * 4 // 3 + 2
    item = walk(tree, n, steps, rng)
    user = np.repeat(np.arange(n), steps)
    time = np.repeat(np.arange(steps)[None], n, axis=0).ravel()
    order = np.lexsort((time, item.ravel(), user))
    first = np.ones(n * steps, dtype=bool)
    first[1:] = (np.diff(user[order]) != 0) | (np.diff(item.ravel()[order]) != 0)
    keep = np.zeros(n * steps, dtype=bool)
    keep[order[first]] = True
    keep &= (np.cumsum(keep.reshape(n, steps), axis=1) <= want[:, None]).ravel()
    gap = np.where(
        rng.random((n, steps)) < equal_timestamps, 0, 1 + rng.exponential(_GAP, (n, steps)).astype(np.int64)
    )
    gap[:, 0] = rng.integers(0, _SPAN, n)
    stamp = (_EPOCH + np.cumsum(gap, axis=1)).ravel()[keep]
    # File order must not be the order of time: what reads it must sort.
    shuffled = rng.permutation(int(keep.sum()))
    number = pc.utf8_lpad(pc.cast(pa.array(users[user[keep]][shuffled]), pa.string()), 9, "0")
    return pa.table(
        [
            pc.binary_join_element_wise(pa.scalar("u"), number, ""),
            item_ids(item.ravel()[keep][shuffled]),
            stamp[shuffled],
        ],
        schema=_INTERACTIONS,
    )


def walk(tree: Taxonomy, num_users: int, steps: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Item indices [num_users, steps] of users who walk the taxonomy, all users one step at a time."""
    by_department = np.argsort(tree.department, kind="stable")
    bounds = np.searchsorted(tree.department[by_department], np.arange(13))
    num_departments = int(tree.department.max()) + 1
    home = rng.integers(0, num_departments, num_users)

    def land(away: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        where = np.where(rng.random(num_users) < away, rng.integers(0, num_departments, num_users), home)
        width = bounds[where + 1] - bounds[where]
        leaf = by_department[bounds[where] + (rng.random(num_users) ** 1.5 * width).astype(np.int64)]
        return leaf, (rng.random(num_users) ** 2.5 * tree.active[leaf]).astype(np.int64)

    leaf, position = land(0.0)
    action = np.full(num_users, 3)
    cumulative = np.cumsum(TRANSITIONS, axis=1)
    out = np.empty((num_users, steps), dtype=np.int64)
    for step in range(steps):
        out[:, step] = tree.starts[leaf] + position
        action = np.minimum((rng.random(num_users)[:, None] > cumulative[action]).sum(axis=1), 3)
        far_leaf, far_position = land(0.2)
        leaf = np.choose(action, [tree.companion[leaf], leaf, tree.sibling[leaf], far_leaf])
        position = np.choose(action, [position, position + 1, position, far_position]) % tree.active[leaf]
    return out


_INTERACTIONS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
_TRUTH = pa.schema(
    [
        ("item_id", pa.string()), ("department", pa.int64()), ("category", pa.int64()), ("leaf", pa.int64()),
        ("position", pa.int64()), ("style", pa.int64()), ("cold", pa.bool_()), ("has_image", pa.bool_()),
        ("duplicate_of", pa.string()), ("companion", pa.string()),
    ]
)  # fmt: skip
