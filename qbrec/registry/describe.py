"""What the registry knows, as documents: all versions, one of them, two of them side by side."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbrec.config import RootConfig
from qbrec.errors import DataError, RegistryError
from qbrec.ranking import METRICS
from qbrec.registry.bundle import COLDSTART, COLDSTART_FILE
from qbrec.registry.comparison import RANKS, Comparison, Evaluated, same_hold_out
from qbrec.registry.fetch import FetchedBundle
from qbrec.registry.judge import METRICS_FILE, QUALITY_FILE, evaluated
from qbrec.registry.line import CHALLENGER, CHAMPION, Served, all_versions, read_served
from qbrec.registry.metrics import qbrec_cells
from qbrec.registry.standing import Rival, Standing, paired_with
from qbrec.registry.verdicts import history, last
from qbrec.registry.versions import EVALUATION_TAG, RUN_TAG, registry_errors
from qbrec.storage.artifact import Artifact
from qbrec.tracking.client import connect
from qbrec.tracking.flatten import flatten_params, safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

SHOWN = ("ndcg@10", "hr@10")  # in the list
_NO_PRINTS = (RUN_TAG, "qbrec.run_dir", "qbrec.rolled_back")
_GATE = "qbrec.gate"


def list_versions(config: RootConfig) -> list[dict[str, Any]]:
    """Every version, newest first: number, aliases, run, time, metrics and the last verdict.

    Raises:
        RegistryError: MLflow is not reachable.
    """
    with registry_errors(config):
        client, _ = connect(config)
        name = config.registry.model_name
        served = read_served(client, name)
        return [_facts(version, served) for version in reversed(all_versions(client, name))]


def show_version(config: RootConfig, selector: str) -> dict[str, Any]:
    """All about one version.

    Args:
        config: Names the registry and the model.
        selector: A number or an alias, with @ or without.

    Returns:
        What `list_versions` has, and `fingerprints` by part, `history` of verdicts, `card`; from the bundle
        `metrics` with intervals, `slices`, `coldstart`, `ids`, `parts` and `bytes`, `configuration`, and a
        `problem` where these cannot be read.

    Raises:
        RegistryError: There is no such version, or MLflow is not reachable.
    """
    with registry_errors(config), tempfile.TemporaryDirectory(prefix="qbrec-show-") as folder:
        client, _ = connect(config)
        served = read_served(client, config.registry.model_name)
        version = _selected(client, config, selector, served)
        document = _facts(version, served)
        document |= {
            "fingerprints": _fingerprints(version.tags),
            "history": history(version.tags),
            "card": version.description or "",
            "problem": "",
        }
        try:
            document |= _measured(FetchedBundle(config, str(version.version), folder=Path(folder)))
        except DataError as error:  # somebody may well look at a version because it is damaged
            document["problem"] = str(error)
        return document


def diff_versions(config: RootConfig, selector: str = CHALLENGER, against: str = CHAMPION) -> dict[str, Any]:
    """Two versions side by side.

    Args:
        config: Names the registry and the model; its run.seed is that of the bootstrap, as for the gate.
        selector: A number or an alias.
        against: The other one.

    Returns:
        `version` and `against` as `list_versions` has them; `configuration`: both values of each key that
        differs; `metrics` and `slices`: both means, and where the same users were ranked the paired
        `difference`; `unpaired`: why there is none, or empty; `artifacts`: whether each part is equal.

    Raises:
        RegistryError: There is no such version, or MLflow is not reachable.
        DataError: A bundle is damaged.
    """
    with registry_errors(config), tempfile.TemporaryDirectory(prefix="qbrec-diff-") as folder:
        client, _ = connect(config)
        served = read_served(client, config.registry.model_name)
        pair = [_selected(client, config, one, served) for one in (selector, against)]
        if pair[0].version == pair[1].version:
            raise RegistryError(
                f"{selector} and {against} are both version {pair[0].version}",
                where=config.registry.model_name,
                fix="name two versions: `qbrec registry diff 3 1`",
            )
        bundles = [FetchedBundle(config, str(one.version), folder=Path(folder)) for one in pair]
        document = {name: _facts(one, served) for name, one in zip(("version", "against"), pair, strict=True)}
        ours, theirs = (_fingerprints(one.tags) for one in pair)
        configs = [flatten_params(bundle.document.get("config", {})) for bundle in bundles]
        return {
            **document,
            "configuration": _differing(*configs),
            "artifacts": {
                kind: {
                    "equal": ours.get(kind) == theirs.get(kind),
                    "version": ours.get(kind),
                    "against": theirs.get(kind),
                }
                for kind in sorted(ours | theirs)
            },
            **_compared(*bundles, seed=config.run.seed),
        }


def standing_of(config: RootConfig, *, evaluation: Artifact, catalog: Artifact) -> Standing | None:
    """How the model of a run stands in the registry, and to whom it is compared there.

    Args:
        config: Names the registry and the model; its run.seed is that of the bootstrap, as for the gate.
        evaluation: The run's: a version belongs to the run if it was registered with this one.
        catalog: The run's; where it is newer than the evaluation, only versions of the older one can be
            compared.

    Returns:
        None where the run has no registry; where that does not answer, the problem.
    """
    if not (config.registry.enabled and config.tracking.enabled):
        return None
    name = config.registry.model_name
    ours = Evaluated(evaluation, lambda: _evaluated_catalog(evaluation, catalog))
    try:
        with registry_errors(config), tempfile.TemporaryDirectory(prefix="qbrec-standing-") as folder:
            client, _ = connect(config)
            served = read_served(client, name)
            versions = {str(one.version): one for one in all_versions(client, name)}
            own = [n for n, one in versions.items() if one.tags.get(EVALUATION_TAG) == evaluation.fingerprint]
            version = served.champion if served.champion in own else max(own, key=int, default=None)
            # Without a @champion nothing serves, whatever served once.
            line = served.line if served.champion is not None else ()
            other = next((number for number in reversed(line) if number not in own), None)
            rival = None
            if other is not None:
                bundle = FetchedBundle(config, other, folder=Path(folder))
                found = Rival(other, versions[other].tags.get(RUN_TAG, ""), serves=other == served.champion)
                rival = _compared_with(found, bundle, ours, seed=config.run.seed)
            verdict = None if version is None else last(versions[version].tags)
            return Standing(name, version, served.champion in own, verdict, rival)
    except RegistryError as error:
        return Standing(name, problem=str(error))


def _evaluated_catalog(evaluation: Artifact, catalog: Artifact) -> Artifact:
    if evaluation.inputs["catalog"] != catalog.fingerprint:
        raise DataError(
            "the run's catalogue is newer than its evaluation",
            where=str(evaluation.path),
            fix="bring the run up to date with `qbrec run`",
        )
    return catalog


def _compared_with(rival: Rival, bundle: FetchedBundle, ours: Evaluated, *, seed: int) -> Rival:
    ours.evaluation.file(RANKS)  # damaged, it is no matter of the other's
    try:
        theirs = evaluated(bundle)
        paired, problem = paired_with(ours, theirs, seed=seed)
        metrics = theirs.evaluation.load_json(METRICS_FILE)
        if qbrec_cells(metrics).keys() != set(METRICS) or not {"coverage", "slices"} <= metrics.keys():
            return replace(rival, problem="its evaluation has the layout of another release")
        return replace(rival, metrics=metrics, paired=paired, problem=problem)
    except DataError as error:
        return replace(rival, problem=f"the two cannot be compared: {error.what}")


def _facts(version: ModelVersion, served: Served) -> dict[str, Any]:
    tags, verdict = version.tags, last(version.tags)
    created = time.gmtime(version.creation_timestamp / 1000)
    number = str(version.version)
    return {
        "version": number,
        "aliases": sorted(alias for alias, one in served.aliases.items() if one == number),
        "run": tags.get(RUN_TAG),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", created),
        "means": {name: _number(tags.get(f"metric.{safe_name(name)}")) for name in SHOWN},
        "verdict": verdict,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _selected(client: MlflowClient, config: RootConfig, selector: str, served: Served) -> ModelVersion:
    wanted = selector.removeprefix("@")
    number = served.aliases.get(wanted, wanted)
    for version in all_versions(client, config.registry.model_name):
        if str(version.version) == number:
            return version
    raise RegistryError(
        f"{config.registry.model_name!r} has no version {number}"
        if number.isdigit()
        else f"{config.registry.model_name!r} has no @{wanted}",
        where=config.registry.model_name,
        fix="see `qbrec registry list`",
    )


def _fingerprints(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        tag.removeprefix("qbrec."): value
        for tag, value in sorted(tags.items())
        if tag.startswith("qbrec.") and not tag.startswith(_GATE) and tag not in _NO_PRINTS
    }


def _measured(bundle: FetchedBundle) -> dict[str, Any]:
    """What the bundle says of itself, its evaluation and its semantic IDs."""
    evaluation, quantizer = bundle.part("evaluation", METRICS_FILE), bundle.part("quantizer", QUALITY_FILE)
    assert evaluation is not None, "every bundle has one"
    assert quantizer is not None, "every bundle has one"
    metrics, quality = evaluation.load_json(METRICS_FILE), quantizer.load_json(QUALITY_FILE)
    cold = bundle.part(COLDSTART, COLDSTART_FILE)
    measured = None if cold is None else cold.load_json(COLDSTART_FILE)
    parts = bundle.document["parts"]
    return {
        "protocol": metrics["protocol"],
        "metrics": qbrec_cells(metrics),
        "slices": {
            name: qbrec_cells(part)
            for name, part in metrics["slices"].items()
            if part["models"] and name != "all"
        },
        "coldstart": None
        if measured is None
        else {race: qbrec_cells(measured[race]) for race in ("catalogue", "held_out")},
        "ids": {
            "levels": quality["levels"],
            **{name: quality[name] for name in ("unique_ids", "no_collision_rate", "largest_bucket")},
        },
        "parts": {name: {key: part[key] for key in ("bytes", "embedded")} for name, part in parts.items()},
        "bytes": sum(part["bytes"] for part in parts.values()),
        "configuration": bundle.document.get("config"),
    }


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    return {
        key: {"version": ours.get(key), "against": theirs.get(key)}
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    }


def _compared(version: FetchedBundle, against: FetchedBundle, *, seed: int) -> dict[str, Any]:
    ours, theirs = evaluated(version), evaluated(against)
    documents = [one.evaluation.load_json(METRICS_FILE) for one in (ours, theirs)]
    comparison, unpaired = None, "they were evaluated on different items or histories"
    if same_hold_out(ours, theirs):
        comparison = Comparison(ours.evaluation, theirs.evaluation, seed=seed)
        unpaired = comparison.problem

    def row(tables: list[Mapping[str, Any]], metric: str, part: str) -> dict[str, Any]:
        means = [qbrec_cells(table).get(metric, {}).get("mean") for table in tables]
        found = None if comparison is None or unpaired else comparison.of(f"{part}/{metric}".strip("/"))
        difference = None if found is None or isinstance(found, str) else asdict(found)
        return {"version": means[0], "against": means[1], "difference": difference}

    common = [name for name in documents[0]["slices"] if name in documents[1]["slices"] and name != "all"]
    slices = {
        name: {metric: row([one["slices"][name] for one in documents], metric, name) for metric in SHOWN}
        for name in common
    }
    return {
        "metrics": {metric: row(documents, metric, "") for metric in METRICS},
        "slices": slices,
        "unpaired": unpaired,
    }
