"""Collapsed duplicates: against a plain loop, the rewritten tars, and who may still be recommended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import click
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbrec.catalog.duplicates.collapse import (
    REPRESENTATIVES,
    CollapseJob,
    collapse_block,
    collapse_histories,
    representatives,
)
from qbrec.cli.main import cli
from qbrec.cli.options import with_flags
from qbrec.config import load_config
from qbrec.errors import ConfigError, DataError
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockSet, BlockTarWriter, RaggedField, write_block_index
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.generations import GenerationsView
from qbrec.storage.hashing import hash64
from qbrec.storage.ragged import Ragged

Split = Literal["leave_one_out", "global_time"]


def test_the_most_popular_of_a_group_and_domain_stands_for_it() -> None:
    groups = np.array([0, 0, 2, 0, 4, 2, 2])
    counts = np.array([3, 5, 1, 5, 9, 1, 8])
    domain = np.array([0, 0, 0, 0, 0, 0, 1], np.uint8)
    found = representatives(groups, train_counts=counts, item_domain=domain)
    assert found.tolist() == [1, 1, 2, 1, 4, 2, 6]  # 6 has 2's content in another domain: it stays
    assert representatives(np.arange(3), train_counts=counts[:3], item_domain=domain[:3]).tolist() == [
        0,
        1,
        2,
    ]


def plain(
    rows: list[int], times: list[int], *, stands_for: list[int], starts: tuple[int, int], split: Split
) -> tuple[list[int], list[int], list[int]]:
    """One history collapsed by a plain loop; for global_time validation and test begin at `starts`."""
    grouped = {row for row in stands_for if stands_for.count(row) > 1}
    kept: list[int] = []
    when: list[int] = []
    for row, time in zip(rows, times, strict=True):
        if stands_for[row] in grouped and stands_for[row] in kept:
            continue
        kept.append(stands_for[row])
        when.append(time)
    n = len(kept)
    if n < 3:
        return kept, when, [n, n]
    if split == "leave_one_out":
        return kept, when, [n - 2, n - 1]
    return kept, when, [sum(time < start for time in when) for start in starts]


def cut_of(times: list[int], starts: tuple[int, int], split: Split) -> list[int]:
    rows = list(range(len(times)))
    return plain(rows, times, stands_for=rows, starts=starts, split=split)[2]


@st.composite
def shops(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 8))
    groups = [draw(st.integers(0, row)) for row in range(size)]
    groups = [groups[g] if groups[groups[g]] == groups[g] else row for row, g in enumerate(groups)]
    chosen = representatives(
        np.array([min(r for r in range(size) if groups[r] == g) for g in groups]),
        train_counts=np.array(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))),
        item_domain=np.zeros(size, np.uint8),
    )
    row = st.integers(0, size - 1)
    lists = draw(st.lists(st.lists(row, min_size=1, max_size=9), min_size=1, max_size=8))
    return {
        "lists": lists,
        "times": [sorted(draw(st.integers(0, 20)) for _ in rows) for rows in lists],
        "starts": tuple(sorted((draw(st.integers(0, 20)), draw(st.integers(0, 20))))),
        "split": draw(st.sampled_from(["leave_one_out", "global_time"])),
        "representative": chosen,
    }


def block_of(shop: dict[str, Any], begin: int = 0, end: int | None = None) -> dict[str, np.ndarray]:
    part = slice(begin, end)
    rows, times = Ragged.from_lists(shop["lists"][part]), Ragged.from_lists(shop["times"][part])
    cut = [cut_of(times, shop["starts"], shop["split"]) for times in shop["times"][part]]
    return {
        "user": np.arange(begin, begin + len(rows)),
        "domain": np.zeros(len(rows), np.uint8),
        "offset": rows.offsets,
        "row": rows.values,
        "time": times.values,
        "cut": np.array(cut, np.int32),
    }


def expected(shop: dict[str, Any]) -> list[tuple[list[int], list[int], list[int]]]:
    options = {"starts": shop["starts"], "split": shop["split"]}
    stands_for = shop["representative"].tolist()
    return [
        plain(rows, times, stands_for=stands_for, **options)
        for rows, times in zip(shop["lists"], shop["times"], strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(shops())
def test_a_block_is_what_a_plain_loop_makes_of_it(shop: dict[str, Any]) -> None:
    chosen = shop["representative"]
    old = block_of(shop)
    grouped = np.bincount(chosen, minlength=len(chosen))[chosen] > 1
    new = collapse_block(old, representative=chosen, grouped=grouped, split=shop["split"])
    assert {name: array.dtype for name, array in new.items()} == {n: a.dtype for n, a in old.items()}
    rows, times = Ragged(new["row"], new["offset"]), Ragged(new["time"], new["offset"])
    found = [(rows.row(i).tolist(), times.row(i).tolist(), new["cut"][i].tolist()) for i in range(len(rows))]
    assert found == expected(shop)
    again = collapse_block(new, representative=chosen, grouped=grouped, split=shop["split"])
    assert all(np.array_equal(again[name], new[name]) for name in new)


def test_tars_are_rewritten_with_the_same_users(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 6, rng.integers(1, 8)).tolist() for _ in range(40)]
    shop: dict[str, Any] = {
        "lists": lists,
        "times": [list(range(len(rows))) for rows in lists],
        "starts": (0, 0),
        "split": "leave_one_out",
        "representative": np.array([1, 1, 2, 3, 3, 1]),
    }
    records = []
    for shard, (begin, end) in {0: (0, 11), 3: (11, 40)}.items():  # a range of hashes without a user: no tar
        with BlockTarWriter(tmp_path, prefix="histories", first_shard=shard, shard_bytes=1 << 62) as writer:
            for first in range(begin, end, 7):
                last = min(first + 7, end)
                writer.add(block_of(shop, first, last), last - first)
            records.append(writer.close())
    write_block_index(tmp_path / "blocks.histories.npy", records)
    np.save(tmp_path / REPRESENTATIVES, shop["representative"])
    job = CollapseJob(tmp_path, "leave_one_out", 1)
    assert job.shards == [0, 3]
    job.rewrite(3)  # a task that was lost and runs once more

    def reduce(parts: list[list[int]], work: Any) -> Any:
        return (work(number, mine) for number, mine in enumerate(parts))

    done: list[int] = []
    counts, facts = collapse_histories(job, num_items=6, reduce=reduce, update=done.append)
    want = expected(shop)
    blocks = BlockSet.open(tmp_path, "histories")
    rows = blocks.ragged(RaggedField("row", offsets="offset"))
    cut = blocks.column("cut")
    assert blocks.column("user").tolist() == list(range(40))
    assert [rows.row(i).tolist() for i in range(40)] == [x[0] for x in want]
    assert cut.tolist() == [x[2] for x in want]
    trained = [row for x in want for row in x[0][: x[2][0]]]
    assert counts.tolist() == np.bincount(trained, minlength=6).tolist()
    assert counts[[0, 4, 5]].tolist() == [0, 0, 0]
    kept = sum(len(x[0]) for x in want)
    assert (facts["kept"], facts["removed"]) == (kept, sum(map(len, lists)) - kept)
    assert facts["eval_users"].tolist() == [sum(len(x[0]) >= 3 for x in want)]
    assert done == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blocks.histories.npy", "histories-000000.tar", "histories-000003.tar", REPRESENTATIVES,
    ]  # fmt: skip


def catalogue(root: Path, *, collapsed: bool) -> Artifact:
    """Five items of the shop and one of another domain; 0 and 1 are the same, 1 stands for both."""
    ids = [f"i{number}" for number in range(5)]
    order = np.argsort(hash64("shop", ids))
    writer = ArtifactStore(root).writer("catalog", ("c" if collapsed else "d") * 64)
    writer.prepare()
    hashes = np.concatenate([hash64("shop", ids)[order], hash64("other", ["x"])])
    place = np.argsort(hashes)
    names = [*np.array(ids)[order], "x"]
    rows = {names[old]: new for new, old in enumerate(place.tolist())}
    writer.save_npy("hashes.npy", np.sort(hashes))
    writer.save_npy("item_domain.npy", np.array([int(names[old] == "x") for old in place], np.uint8))
    counts = np.zeros(6, np.int64)
    counts[rows["i1"]] = 9
    writer.save_npy("train_counts.npy", counts)
    table = {"item_id": [names[old] for old in place], "title": [f"T {names[old]}" for old in place]}
    writer.write_table("items.arrow", pa.table(table))
    if collapsed:
        chosen = np.arange(6)
        chosen[rows["i0"]] = rows["i1"]
        writer.save_npy(REPRESENTATIVES, chosen)
        writer.save_npy("retired.npy", chosen != np.arange(6))
    meta = {"num_items": 6, "domains": ["shop", "other"]}
    return writer.commit(meta=meta, inputs={}, config={}, seed=0)


def test_retired_items_are_no_candidates(tmp_path: Path) -> None:
    whole, collapsed = (CatalogView(catalogue(tmp_path, collapsed=c)) for c in (False, True))
    assert (whole.candidates("shop") == whole.domain_mask("shop")).all()
    assert whole.candidates().all()
    (retired,) = np.flatnonzero(collapsed.retired).tolist()
    assert collapsed.item_ids([retired]) == ["i0"]
    assert collapsed.domain_mask("shop")[retired]
    assert collapsed.candidates("shop").sum() == 4
    assert collapsed.candidates().sum() == 5
    rows = collapsed.lookup(["i0", "i2"], "shop")
    assert collapsed.item_ids(collapsed.representatives(rows)) == ["i1", "i2"]
    assert (whole.representatives(rows) == rows).all()
    with pytest.raises(DataError, match="no domain"):
        collapsed.candidates("toys")


def test_recommending_reads_a_retired_item_as_its_representative(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def scores(histories: Ragged, domain: object) -> torch.Tensor:
        seen.extend(histories.row(i).tolist() for i in range(len(histories)))
        return torch.zeros(len(histories), 6)

    found = {}
    for collapsed in (False, True):
        view = GenerationsView(catalogue(tmp_path, collapsed=collapsed))
        recommender = Recommender(
            catalog=view,
            semantic_ids=np.zeros((6, 2), np.uint8),
            labels={},
            scorer=SimpleNamespace(name="flat", scores=scores),
            domain="shop",
        )
        (items,) = recommender.recommend([["i0"]], k=recommender.num_candidates)
        found[collapsed] = {item["item_id"] for item in items}
        assert seen.pop() == view.lookup(["i1" if collapsed else "i0"], "shop").tolist()
    assert found == {False: {"i1", "i2", "i3", "i4"}, True: {"i2", "i3", "i4"}}


def test_the_flag_is_short_for_the_key() -> None:
    overrides = with_flags(("run.seed=3",), workers=2, collapse_duplicates=True)
    config = load_config(overrides=overrides)
    assert config.catalog.duplicates.collapse == "both"
    assert (config.compute.num_workers, config.run.seed) == (2, 3)
    assert load_config(overrides=with_flags((), workers=None, collapse_duplicates=False)) == load_config()
    for name in ("run", "catalog", "evaluate"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert "collapse_duplicates" in {parameter.name for parameter in command.params}


@pytest.mark.parametrize("value", ["min_overlap=0", "min_overlap=1.5", "min_users=0", "collapse=all"])
def test_wrong_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=value.split("=")[0]):
        load_config(overrides=[f"catalog.duplicates.{value}"])
