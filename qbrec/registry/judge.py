"""All questions of a gate, asked of a registered version."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from qbrec.config import RootConfig
from qbrec.config.sections import GateConfig, IdGateConfig
from qbrec.errors import DataError
from qbrec.registry.bundle import COLDSTART, COLDSTART_FILE
from qbrec.registry.checks import check_coldstart, check_floors, check_ids
from qbrec.registry.comparison import RANKS, Evaluated, check_champion, without_comparison
from qbrec.registry.fetch import FetchedBundle
from qbrec.registry.gate import Check, Verdict
from qbrec.registry.latency import check_latency
from qbrec.registry.probe import HISTORIES, PROBE
from qbrec.registry.recommend import Recommender
from qbrec.storage.artifact import Artifact

METRICS_FILE, QUALITY_FILE = "metrics.json", "quality.json"


class Judge:
    """Asks a gate's questions of one version; only what they are about is fetched.

    Args:
        config: Names the registry and the model; its run.seed is that of the bootstrap.
        version: The version that wants to serve.
        gate: The gate.
        gate_name: As it is written in the verdict.
        folder: For what is fetched.
    """

    def __init__(
        self, config: RootConfig, version: str, *, gate: GateConfig, gate_name: str, folder: Path
    ) -> None:
        self._config, self._gate, self._gate_name, self._folder = config, gate, gate_name, folder
        self._bundle = FetchedBundle(config, version, folder=folder)
        self._champions: dict[str, FetchedBundle] = {}  # that have served while this version is judged

    def against(self, champion: str | None) -> Verdict:
        """The verdict, with that version serving now.

        Raises:
            DataError: The version to be judged holds no bundle, or a damaged one.
            RegistryError: What is needed cannot be fetched.
        """
        if champion is None:
            compared: Sequence[Check] = [Check("comparison", True, "there is no @champion")]
        elif champion == self._bundle.version:
            compared = [Check("comparison", True, "it is @champion already: nothing to move")]
        else:
            compared = self._compared(champion)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        checks = (*self._alone, *compared)
        return Verdict(self._bundle.version, champion, self._gate_name, now, checks)

    @cached_property
    def _alone(self) -> tuple[Check, ...]:
        """What has nothing to do with the champion: asked once, however often that one changes."""
        gate, bundle = self._gate, self._bundle
        checks = [*check_floors(self._ours.evaluation.load_json(METRICS_FILE), gate.min_metrics)]
        if gate.ids != IdGateConfig():
            quantizer = bundle.part("quantizer", QUALITY_FILE)
            assert quantizer is not None, "every bundle has one"
            checks += check_ids(quantizer.load_json(QUALITY_FILE), gate.ids)
        if gate.min_coldstart:
            measured = bundle.part(COLDSTART, COLDSTART_FILE)
            document = None if measured is None else measured.load_json(COLDSTART_FILE)
            checks += check_coldstart(document, gate.min_coldstart)
        if gate.latency.max_p95_ms is not None:
            probe = bundle.part(PROBE, HISTORIES)
            histories = [] if probe is None else probe.load_json(HISTORIES)
            checks.append(check_latency(Recommender.load(bundle.whole()), histories, gate.latency))
        return tuple(checks)

    @cached_property
    def _ours(self) -> Evaluated:
        return evaluated(self._bundle)

    def _compared(self, champion: str) -> Sequence[Check]:
        if champion not in self._champions:
            self._champions[champion] = FetchedBundle(self._config, champion, folder=self._folder)
        ours = self._ours
        ours.evaluation.file(RANKS)  # damaged, it is no matter of the champion's
        try:
            theirs = evaluated(self._champions[champion])
            return check_champion(ours, theirs, gate=self._gate, seed=self._config.run.seed)
        except DataError as error:
            what = f"the evaluation of @champion, version {champion}, cannot be read: {error.what}"
            passed = self._gate.damaged_champion == "floors"
            return [without_comparison(what, key="damaged_champion", passed=passed)]


def evaluated(bundle: FetchedBundle) -> Evaluated:
    """What a version can be compared by.

    Raises:
        DataError: It is missing or damaged.
        RegistryError: It cannot be fetched.
    """
    evaluation = bundle.part("evaluation", METRICS_FILE, RANKS)
    assert evaluation is not None, "every bundle has one"

    def open_catalog() -> Artifact:
        catalog = bundle.part("catalog")
        assert catalog is not None, "every bundle has one"
        return catalog

    return Evaluated(evaluation, open_catalog)
