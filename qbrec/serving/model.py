"""Which model is served, as paths: what crosses process borders, and what tells two models apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qbrec.config import RootConfig
from qbrec.config.stages import RankingConfig
from qbrec.registry.bundle import GENERATION_PARTS, PARTS, open_part, read_bundle, require
from qbrec.storage.artifact import Artifact, ArtifactStore

if TYPE_CHECKING:
    from qbrec.registry.recommend import Recommender

_JUDGED_BY = "evaluation"  # the gate reads it, nobody who recommends


@dataclass(frozen=True)
class ServedModel:
    """A run's artifacts, or the bundle of a registered version; on storage that every node sees.

    Attributes:
        fingerprints: Of every artifact that recommending reads, generations included, by name.
        ranking: How the scorer is searched.
        paths: Folder of every artifact by name; of a bundle its parts, for those kept outside it.
        storage: Root of the store that keeps them; None: a bundle.
        bundle: Folder of the bundle; None: a run.
    """

    fingerprints: Mapping[str, str]
    ranking: RankingConfig
    paths: Mapping[str, str]
    storage: str | None = None
    bundle: str | None = None

    @classmethod
    def of_run(cls, config: RootConfig, artifacts: Mapping[str, Artifact]) -> ServedModel:
        """The model of a finished run with all that was appended since.

        Raises:
            DataError: The run is not finished.
        """
        served = {name: artifact for name, artifact in artifacts.items() if _is_read(name)}
        if "neighbours" not in require(artifacts, "finetune").inputs:  # a run without a bonus
            served.pop("neighbours", None)
        return cls(
            fingerprints={name: artifact.fingerprint for name, artifact in served.items()},
            ranking=config.ranking,
            paths={name: str(artifact.path.resolve()) for name, artifact in served.items()},
            storage=str(Path(config.run.storage).resolve()),
        )

    @classmethod
    def of_bundle(cls, folder: Path) -> ServedModel:
        """The model in a bundle.

        Raises:
            DataError: It is no bundle, or a part kept outside it is another.
        """
        document = read_bundle(folder)
        parts = {name: open_part(folder, name) for name in document["parts"] if _is_read(name)}
        return cls(
            fingerprints={name: artifact.fingerprint for name, artifact in parts.items()},
            ranking=RankingConfig.model_validate(document["ranking"]),
            paths={name: str(artifact.path) for name, artifact in parts.items()},
            bundle=str(folder.resolve()),
        )

    def artifact(self, name: str) -> Artifact:
        """One of a run's artifacts; files are fetched and verified as they are read.

        Raises:
            DataError: It is not there: every node has to see the storage.
        """
        assert self.storage is not None
        return ArtifactStore(self.storage).open(self.paths[name])

    def open(self, *, device: str = "cpu") -> Recommender:
        """Open it for ranking.

        Args:
            device: `cpu` or `cuda`: where the encoder shall run.

        Raises:
            DataError: A file is missing or damaged.
        """
        from qbrec.registry.recommend import Recommender

        if self.bundle is not None:
            return Recommender.load(self.bundle, device=device)
        artifacts = {name: self.artifact(name) for name in self.paths}
        return Recommender.from_artifacts(artifacts, ranking=self.ranking, device=device)


def _is_read(name: str) -> bool:
    kind, dash, _ = name.partition("-")
    return kind in GENERATION_PARTS if dash else name in PARTS and name != _JUDGED_BY
