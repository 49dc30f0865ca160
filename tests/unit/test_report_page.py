"""The whole page of a run: every chapter, the champion, the costs, the pictures, its size."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qbrec.config import parse_config
from qbrec.registry.standing import Standing
from qbrec.report import write_report
from qbrec.report.results import tiles
from qbrec.storage.artifact import Artifact, ArtifactStore
from tests.support.report_page import SECONDS, judged, pictured_run
from tests.support.tiny_run import TinyRun
from tests.unit.test_report import assert_self_contained

MAX_PAGE_BYTES = 2_000_000  # what a mail carries without a thought


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return pictured_run(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def standing(run: TinyRun) -> Standing:
    return judged(run)


def page(run: TinyRun, standing: Standing | None = None, **changes: object) -> str:
    config = run.config.model_copy(update=changes)
    return write_report(config, run.run_dir, run.artifacts, standing=standing).read_text()


def table(html: str, title: str) -> list[list[str]]:
    """Cells of the table below a heading, row by row, as text."""
    body = html[html.index(f"<h3>{title}</h3>") :]
    body = body[body.index("<table>") : body.index("</table>")]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in rows]
    return [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_the_page_is_self_contained_and_light(run: TinyRun, standing: Standing) -> None:
    html = page(run, standing)
    assert_self_contained(html)
    assert html.count('<img class="picture"') > 30
    assert 'class="picture"></i>' in html  # every seventh item has none
    assert len(html.encode()) < MAX_PAGE_BYTES


class TestChampion:
    def test_its_row_stands_below_ours_with_the_paired_difference(
        self, run: TinyRun, standing: Standing
    ) -> None:
        html = page(run, standing)
        rival = standing.rival
        assert rival is not None
        metrics = table(html, "All metrics")
        assert [row[0] for row in metrics] == ["model", "qbrec", "champion, version 11", "popularity"]
        theirs = rival.metrics["models"]["qbrec"]["removed"]["ndcg@10"]
        column = metrics[0].index("NDCG@10")
        low, high = theirs["low"], theirs["high"]
        assert metrics[2][column] == f"{theirs['mean']:.4f} {low:.4f} … {high:.4f}"
        differences = table(html, "qbrec minus the others, user by user")
        assert differences[1][0] == "champion, version 11"
        gain = rival.paired["ndcg@10"]
        assert differences[1][column] == f"{gain.mean:+.4f} {gain.low:+.4f} … {gain.high:+.4f}"
        ours = json.loads((run.artifacts["evaluation"].path / "metrics.json").read_text())
        mine = ours["models"]["qbrec"]["removed"]["ndcg@10"]["mean"]
        assert gain.mean == pytest.approx(mine - theirs["mean"])
        slices = table(html, "NDCG@10 by slice")
        assert slices[0] == ["slice", "users", "qbrec", "champion, version 11", "difference", "popularity"]
        assert slices[1][4] == differences[1][column]
        tail = next(row for row in slices if row[0] == "tail")
        assert tail[4].startswith(f"{rival.paired['tail/ndcg@10'].mean:+.4f}")
        assert any("champion, version 11" in tile.text for tile in tiles(run.artifacts, standing))
        assert "This run is version 12 of &#39;qbrec&#39;. It does not serve." in html
        assert "champion, version 11 (run last-month), on the same users" in html

    def test_the_gate_is_quoted(self, run: TinyRun, standing: Standing) -> None:
        html = page(run, standing)
        assert "Asked on 2026-01-02T03:04:05Z, beside version 11." in html
        (head, check) = table(html, "The gate default said yes")
        assert head == ["question", "answer", "why"]
        assert check[:2] == ["not worse than @champion in ndcg@10", "yes"]
        assert check[2].startswith("difference +0.0123")

    def test_where_there_is_none_a_line_says_so(self, run: TinyRun, standing: Standing) -> None:
        alone = Standing("qbrec", "1")
        unpaired = replace(standing.rival, paired={}, problem="it was evaluated on another catalogue")  # type: ignore[type-var]
        cases = {
            None: "This run has no registry",
            Standing("qbrec", problem="MLflow is away"): "could not be asked: MLflow is away",
            Standing("qbrec"): "This run is not registered",
            alone: "There is no champion to compare it with.",
            replace(alone, serves=True): "the champion: it serves",
        }
        for case, told in cases.items():
            html = page(run, case)
            assert told in html
            assert "champion, version" not in html
        html = page(run, replace(standing, rival=unpaired))
        assert "not compared with the champion, version 11 (run last-month): it was evaluated on" in html
        assert len(table(html, "All metrics")) == 3


class TestCosts:
    def test_time_workers_hours_and_money(self, run: TinyRun) -> None:
        rows = table(page(run), "What was trained on what, and at what cost")
        assert rows[0] == ["stage", "on what", "time", "workers", "worker-hours", "cost"]
        found = {row[0]: row[2:] for row in rows[1:]}
        assert found["catalog"] == ["1 min 01 s", "driver, Ray tasks", "–", "0.21"]
        assert found["quantizer"] == ["30 min 00 s", "1 × CPU", "0.5", "6.25"]
        assert found["finetune"] == ["2 h 00 min", "1 × CPU", "2", "25.00"]
        total = sum(SECONDS.values())
        assert found["together"] == ["2 h 32 min", "", f"{2.5 + 90 / 3600:.4g}", f"{total / 3600 * 12.5:.2f}"]

    def test_groups_of_workers_gpus_and_what_nobody_noted(
        self, run: TinyRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = run.artifacts["finetune"].manifest
        monkeypatch.setitem(manifest, "made_by", {"workers": 8, "device": "cuda"})
        compute = run.config.compute.model_copy(update={"cost_per_hour": 0.0, "num_workers": (2, 8)})
        html = page(run, compute=compute)
        rows = {row[0]: row[2:] for row in table(html, "What was trained on what, and at what cost")}
        assert rows["finetune"] == ["2 h 00 min", "8 × GPU", "16"]
        assert rows["together"] == ["2 h 32 min", "", f"{16.5 + 90 / 3600:.4g}"]
        assert "number of workers is the one at the end of a stage" in html
        monkeypatch.delitem(manifest, "made_by")
        rows = {row[0]: row[2:] for row in table(page(run), "What was trained on what, and at what cost")}
        assert rows["finetune"] == ["2 h 00 min", "–", "–", "25.00"]
        assert rows["together"][2] == "–"

    def test_workers_and_device_are_in_the_manifest_and_no_part_of_what_it_is(self, tmp_path: Path) -> None:
        made: list[Artifact] = []
        for number, workers in enumerate((1, 4)):
            writer = ArtifactStore(tmp_path / str(number)).writer("fusion", "f" * 64)
            writer.prepare()
            writer.save_json("x.json", {})
            made_by = {"workers": workers, "device": "cpu"}
            made.append(writer.commit(meta={}, inputs={}, config={}, seed=0, made_by=made_by))
        assert [one.manifest["made_by"]["workers"] for one in made] == [1, 4]
        assert made[0].fingerprint == made[1].fingerprint


def test_curves_are_grouped_and_the_rest_is_folded(run: TinyRun) -> None:
    html = page(run)
    training = html[html.index('<section id="training">') : html.index('<section id="data">')]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", training)
    assert captions == ["Loss", "Validation, full catalogue", "Seconds of a step, by phase"] * 3
    assert training.count("<details><summary>All that was logged</summary>") == 3
    assert "Reused, and so in the report of the run that trained them: quantizer." in training


def test_a_run_of_nothing_has_a_page(tmp_path: Path) -> None:
    html = write_report(parse_config({}), tmp_path, {}).read_text()
    assert_self_contained(html)
    assert "not run" in html
