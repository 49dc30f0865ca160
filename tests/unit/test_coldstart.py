"""What is held out, what is left of the histories, content alone; the whole command is in tests/ray."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qbrec.config import parse_config
from qbrec.errors import ConfigError
from qbrec.evaluation.coldstart import KIND, WHOLE, ContentScorer, expected_at_random
from qbrec.evaluation.held_out import HELD_OUT, INTERACTIONS, ITEMS, HeldOut, first_places, write_input
from qbrec.evaluation.protocol import TestSet, rank_model
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.topk import tie_rank
from qbrec.run_coldstart import coldstart_config, with_coldstart
from qbrec.run_generations import place_of
from qbrec.run_record import RunRecord
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import Histories
from qbrec.storage.ragged import Ragged

N = 8
ROWS = st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=7), min_size=1, max_size=6)


def held_out(histories: list[list[int]], rows: list[int], *, collapsed: dict[int, int] | None = None) -> Any:
    """Of a catalogue of items i0 … i7 and users u0 …, that answers what is asked of it."""
    ragged, users = Ragged.from_lists(histories), np.arange(len(histories))
    times = Ragged(np.arange(len(ragged.values), dtype=np.int64) * 10, ragged.offsets)
    stands_for = np.arange(N)
    for row, by in (collapsed or {}).items():
        stands_for[row] = by
    catalog = SimpleNamespace(
        artifact=SimpleNamespace(fingerprint="f" * 64),
        num_items=N,
        item_ids=lambda rows: [f"i{row}" for row in rows],
        user_ids=lambda users: [f"u{user}" for user in users],
        representatives=lambda rows: stands_for[rows],
    )
    stored = Histories(
        users, np.zeros(len(users), np.uint8), ragged, times, np.zeros((len(users), 2), np.int32)
    )
    first = first_places(ragged, np.isin(np.arange(N), rows))
    return HeldOut(catalog, stored, np.array(sorted(rows)), first)  # type: ignore[arg-type]


@given(ROWS, st.sets(st.integers(0, N - 1), min_size=1))
def test_what_is_tested_and_what_is_left(histories: list[list[int]], rows: set[int]) -> None:
    held = held_out(histories, sorted(rows))
    tests, left = [], []
    for number, history in enumerate(histories):
        first = next((place for place, row in enumerate(history) if row in rows), len(history))
        if 0 < first < len(history):
            tests.append((number, history[:first], history[first]))
        left += history[:first] if first else [row for row in history if row not in rows]
    assert held.users.tolist() == [number for number, _, _ in tests]
    contexts, targets = held.tests(held.users)
    assert [contexts.row(i).tolist() for i in range(len(tests))] == [context for _, context, _ in tests]
    assert targets.tolist() == [target for _, _, target in tests]
    assert held.histories.rows.values[held.kept()].tolist() == left


def test_the_input_falls_into_what_stays_and_what_is_held_out(tmp_path: Path) -> None:
    held = held_out([[0, 1, 2, 3], [2, 4, 5], [6, 7, 6]], [2, 7], collapsed={3: 2})
    (tmp_path / "items").mkdir()
    for number, part in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        ids = pa.array([f"i{row}" for row in part]).dictionary_encode()
        titles, pictures = pa.array([f"t{row}" for row in part]), pa.array([b"x"] * 4)
        table = pa.table({"item_id": ids, "title": titles, "image": pictures})
        pq.write_table(table, tmp_path / "items" / f"{number}.parquet")
    given = {"items": str(tmp_path / "items"), "share": 0.3, "seed": 1}
    folder = tmp_path / "input"
    assert write_input(folder, held, **given)
    places = tmp_path / "items", folder / ITEMS, folder / HELD_OUT
    whole, stays, out = (pq.read_table(place) for place in places)
    # i3 was collapsed into i2: it goes, so as not to take its place, and does not come back.
    assert stays["item_id"].to_pylist() == ["i0", "i1", "i4", "i5", "i6"]
    assert out["item_id"].to_pylist() == ["i2", "i7"]
    assert stays.schema.equals(whole.schema)
    assert out.schema.equals(whole.schema)
    assert out["title"].to_pylist() == ["t2", "t7"]
    expected = [("u0", "i0", 0), ("u0", "i1", 10), ("u1", "i4", 50), ("u1", "i5", 60), ("u2", "i6", 70)]
    kept = pq.read_table(folder / INTERACTIONS).to_pylist()
    assert kept == [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in expected]
    # Again: nothing is written. Of another draw, or cut off before its end: all is.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    assert len(before) == 5
    assert not write_input(folder, held, **given)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")} == before
    assert write_input(folder, held, **(given | {"seed": 2}))
    assert not write_input(folder, held, **(given | {"seed": 2}))
    (folder / "held_out.json").unlink()
    assert write_input(folder, held, **(given | {"seed": 2}))


def test_content_alone_against_plain_numpy() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N, 5))
    vectors[6] = 0
    histories = [[0, 3, 3], [7], [1, 2, 4, 5, 6, 0] * 5]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    for decay in (1.0, 0.8):
        scores = ContentScorer("x", vectors, decay=decay).scores(Ragged.from_lists(histories), 0)
        assert scores.dtype == torch.float32
        for history, ours in zip(histories, scores.numpy(), strict=True):
            ages = enumerate(reversed(history[-20:]))
            expected = sum(decay**age * (unit @ unit[row]) for age, row in ages)
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert not scores[:, 6].any()


def test_chance_is_the_mean_over_all_ranks() -> None:
    rng = np.random.default_rng(1)

    class Chance:
        name = "chance"

        def scores(self, histories: Ragged, domain: Any) -> torch.Tensor:
            return torch.from_numpy(rng.random((len(histories), 30))).float()

    users = 20_000
    contexts = Ragged(np.zeros(0, np.int64), np.zeros(users + 1, np.int64))
    mask, ties = np.arange(30) >= 5, tie_rank(np.zeros(30))
    targets = rng.integers(5, 30, users)
    test = TestSet(np.arange(users), np.zeros(users, np.uint8), contexts, targets, mask, ties)
    ranks = rank_model(Chance(), test, batch_users=1000).removed
    found = dict(zip(METRICS, metrics_of_ranks(ranks).mean(0), strict=True))
    assert expected_at_random(25) == pytest.approx(found, abs=0.01)
    assert expected_at_random(25)["hr@10"] == pytest.approx(10 / 25)


def test_the_run_without_the_items(tmp_path: Path) -> None:
    domains = {name: {"items": f"{name}/i", "interactions": f"{name}/a"} for name in ("a.b", "c")}
    tree: dict[str, Any] = {
        "run": {"name": "shop", "storage": str(tmp_path)},
        "data": {"domains": domains, "target": "c"},
    }
    config = parse_config(tree)
    cold = coldstart_config(config)
    assert cold.run.name == "shop-coldstart"
    assert list(cold.data.domains) == ["a.b", "c"]  # domains keep their numbers
    assert cold.data.domains["a.b"] == config.data.domains["a.b"]
    assert cold.data.domains["c"].items == str(tmp_path / "runs" / "shop-coldstart" / "input" / "items")
    assert cold.data.target_domain == "c"
    same = {"run", "data"}
    assert cold.model_dump(exclude=same) == config.model_dump(exclude=same)
    with pytest.raises(ConfigError, match="one seed"):
        coldstart_config(parse_config(tree | {"evaluation": {"seeds": 2}}))
    with pytest.raises(ConfigError, match=r"run\.name"):
        coldstart_config(parse_config(tree | {"run": {"name": "x" * 60}}))


def test_its_figures_are_found_by_the_run_that_they_are_of(tmp_path: Path) -> None:
    domains = {"shop": {"items": "i.parquet", "interactions": "x.parquet"}}
    tree: dict[str, Any] = {"run": {"name": "a", "storage": str(tmp_path)}, "data": {"domains": domains}}
    config, store = parse_config(tree), ArtifactStore(tmp_path)

    def made(kind: str, *, inputs: dict[str, str]) -> Artifact:
        writer = store.writer(kind, "1" * 64)
        writer.prepare()
        writer.save_json(f"{kind}.json", inputs)
        return writer.commit(meta={}, inputs=inputs, config={}, seed=0)

    catalog = made("catalog", inputs={})
    run = {"catalog": catalog}
    assert with_coldstart(config, run) == run
    record = RunRecord.own(coldstart_config(config), resume="auto")
    assert with_coldstart(config, run) == run  # not measured yet
    measured = made(KIND, inputs={WHOLE: catalog.fingerprint})
    record.extra[KIND] = place_of(measured)
    record.save()
    record.close()
    assert with_coldstart(config, run)[KIND].fingerprint == measured.fingerprint
    tree["registry"] = {"gate": {"min_coldstart": {"held_out/hr@10": 0.1}}}
    assert KIND in with_coldstart(parse_config(tree), run)
    for section, other in (
        ("sequence", {"width": 32}),  # another model
        ("evaluation", {"seeds": 3}),  # of which nothing can be measured
        ("run", {"name": "a" * 60, "storage": str(tmp_path)}),
    ):
        assert with_coldstart(parse_config(tree | {section: other}), run) == run
    renewed = Artifact(catalog.path, {**catalog.manifest, "fingerprint": "f" * 64})
    assert KIND not in with_coldstart(config, {"catalog": renewed})
    shutil.rmtree(measured.path)
    assert with_coldstart(config, run) == run
