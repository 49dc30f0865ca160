"""A run catches up with its generations: nothing is done twice, what is gone is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbrec.append_run import append_generation
from qbrec.catalog.append.run import Request
from qbrec.errors import DataError
from qbrec.neighbours import stage as neighbours_stage
from qbrec.ranking.graphs import GRAPHS
from qbrec.run_generations import with_generations
from qbrec.run_record import RunRecord, run_directory
from qbrec.stages import STAGES
from qbrec.storage.artifact import Artifact
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import IdTable, numbered
from tests.support import grown_shop
from tests.support.grown_run import GENERATION_PARTS, Noted, digests
from tests.support.grown_shop import append, configuration, draw, id_table, train


def test_a_run_catches_up_and_does_nothing_twice(
    shop_root: Path, grown_run: dict[str, Artifact], capsys: Any
) -> None:
    run = Noted(shop_root, grown_run)
    stages = RunRecord.load(run_directory(run.config)).stages
    run.edit(lambda d: d["stages"].pop("quantizer"))
    assert run.bring() == ([], "the run has no finished quantizer yet")
    assert "ids" not in run.noted()[0]
    assert [*with_generations(run.config, {"catalog": grown_run["catalog"]})] == [
        *("catalog", "generation-1", "generation-2", "generation-3")
    ]
    run.edit(lambda d: d["stages"].update(stages))
    ids, missing = run.bring()
    assert missing == ""
    assert [made.meta["first_row"] for made in ids] == [500, 564, 624]
    assert run.said == [
        "✓ generation 1: 64 new items have semantic IDs",
        "✓ generation 2: 60 new items have semantic IDs",
    ]
    assert run.warned == []
    np.testing.assert_array_equal(IdTable(grown_run["quantizer"], ids).codes, id_table(grown_run).codes)
    state, noted = digests(shop_root / "artifacts"), run.noted()
    assert [place["ids"]["path"] for place in noted] == [str(made.path) for made in ids]
    # Again, and with another threshold: published IDs are not made anew.
    for threshold in (1.5, 0.001):
        again, _ = run.bring(threshold)
        assert [made.path for made in again] == [made.path for made in ids]
    assert (digests(shop_root / "artifacts"), run.noted(), len(run.said)) == (state, noted, 2)
    # Forgotten by run.json (killed before it was written), they are found, not made.
    run.edit(lambda d: [place.pop("ids") for place in d["extra"]["generations"]])
    run.bring()
    assert (digests(shop_root / "artifacts"), run.noted()) == (state, noted)
    found = with_generations(run.config, {name: grown_run[name] for name in ("catalog", "quantizer")})
    assert {name for name in found if "-" in name} == GENERATION_PARTS


def test_a_run_catches_up_with_its_item_graphs(
    shop_root: Path, joined_run: dict[str, Artifact], tmp_path: Path
) -> None:
    run = Noted(shop_root, {name: a for name, a in joined_run.items() if name != "neighbours"})
    models = {name: joined_run[name] for name in ("catalog", "quantizer", "neighbours")}
    run.bring()  # as before there were such rows
    assert not any("alike" in place for place in run.noted())
    assert not any(name.startswith("alike") for name in with_generations(run.config, models))
    place = {"key": joined_run["neighbours"].key, "path": str(joined_run["neighbours"].path)}
    run.edit(lambda d: d["stages"].update(neighbours=place))
    ids, _ = run.bring()
    found = with_generations(run.config, models)
    made = numbered(found, "alike")
    assert len(made) == 3
    for number, rows in enumerate(made, 1):
        assert rows.inputs["ids"] == ids[number - 1].fingerprint
        wanted = (joined_run[f"alike-{number}"].path / GRAPHS).read_bytes()
        assert (rows.path / GRAPHS).read_bytes() == wanted
    state, noted = digests(shop_root / "artifacts"), run.noted()
    run.bring()
    assert (digests(shop_root / "artifacts"), run.noted()) == (state, noted)
    # Without its row a generation waits, and those after it; then it is made again.
    shutil.rmtree(made[1].path)
    (left,) = numbered(with_generations(run.config, models), "alike")
    assert left.path == made[0].path
    run.bring()
    assert (made[1].path / GRAPHS).is_file()
    # Other graphs of the same models: rows of their own. Graphs of other models: none.
    short = run.config.model_copy(update={"ranking": run.config.ranking.model_copy(update={"alike": 3})})
    ctx = grown_shop.context(shop_root, "neighbours", "short")
    ctx.recipe = STAGES["neighbours"].recipe(short)
    inputs = {name: joined_run[name] for name in ("catalog", "fusion", "quantizer")}
    other = neighbours_stage.run(ctx, short, inputs)
    assert not numbered(with_generations(run.config, {**models, "neighbours": other}), "alike")
    run.edit(lambda d: d["stages"]["neighbours"].update(path=str(other.path)))
    run.bring()
    again = numbered(with_generations(run.config, {**models, "neighbours": other}), "alike")
    assert [rows.meta["arrows"]["text"] for rows in again] == [3 * 62, 3 * 30, 0]
    manifest = json.loads((other.path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"inputs": {}}))
    run.edit(lambda d: [place.pop("alike") for place in d["extra"]["generations"]])
    run.edit(lambda d: d["stages"]["neighbours"].update(path=str(tmp_path)))
    run.bring()
    assert not any("alike" in place for place in run.noted())


@pytest.mark.parametrize("lost", ["fused", "ids"])
def test_what_the_models_made_is_made_again_where_it_is_gone(
    shop_root: Path, grown_run: dict[str, Artifact], lost: str
) -> None:
    run = Noted(shop_root, grown_run)
    before, _ = run.bring()
    codes = IdTable(grown_run["quantizer"], before).codes
    shutil.rmtree(run.noted()[1][lost]["path"])
    found = with_generations(run.config, {name: grown_run[name] for name in ("catalog", "quantizer")})
    assert ("ids-3" in found) == (lost == "fused"), "the intermediate is not needed to read the IDs"
    again, missing = run.bring()
    assert missing == ""
    assert Path(run.noted()[1][lost]["path"]).is_dir()
    np.testing.assert_array_equal(IdTable(grown_run["quantizer"], again).codes, codes)


def test_another_quantizer_gives_other_ids(shop_root: Path, trained_run: dict[str, Artifact]) -> None:
    config = configuration(shop_root, levels=[8, 8])
    view = append(shop_root, GenerationsView(trained_run["catalog"]), draw(40, "o", seed=33, far=4.0))
    artifacts = {**trained_run, "generation-1": view.generations[0].artifact}
    run = Noted(shop_root, artifacts)
    (first,), _ = run.bring()
    assert "refit: the new items of generation 1" in run.warned[0]
    other = train(shop_root, trained_run["catalog"], config, name="other")["quantizer"]
    # Its IDs do not hold for another quantizer: the items wait for new ones.
    assert "ids-1" not in with_generations(run.config, {**trained_run, "quantizer": other})
    assert "ids-1" in with_generations(run.config, trained_run)
    run.edit(lambda d: d["stages"]["quantizer"].update(path=str(other.path)))
    (second,), _ = run.bring(max_drift=1000.0)
    assert second.meta["levels"] == [8, 8]
    assert second.path != first.path
    assert len(run.warned) == 1
    # A fusion of an earlier catalogue cannot read the items of this one.
    stale = Artifact(trained_run["fusion"].path, trained_run["fusion"].manifest)
    manifest = json.loads((stale.path / "manifest.json").read_text())
    folder = shop_root / "stale"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"inputs": {"catalog": "0" * 64}}))
    run.edit(lambda d: d["stages"]["fusion"].update(path=str(folder)))
    assert run.bring() == ([], "the run's fusion was made before its catalogue was built anew")


def test_appending_needs_a_catalogue(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished catalogue"):
        append_generation(configuration(tmp_path), Request("", "x"), say=print, warn=print)
