"""The stages in order; a stage whose key has not changed is skipped, one that was cut off goes on."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qbrec.config import RootConfig
from qbrec.errors import ConfigError, DataError
from qbrec.run_record import RunRecord, run_directory
from qbrec.stages import Stage, stages_of
from qbrec.storage.artifact import MANIFEST, Artifact, ArtifactStore

if TYPE_CHECKING:
    from qbrec.engine.progress import Progress


class Pipeline:
    """One run of the road, owned for the time of a `with` block.

    Args:
        config: The configuration.
        resume: `auto`, `must` or `never`.
        given: Artifacts that are there already, by the names under which stages read them.
    """

    def __init__(
        self, config: RootConfig, *, resume: str = "auto", given: Mapping[str, Artifact] | None = None
    ) -> None:
        if not config.data.domains:
            raise ConfigError(
                "no input: data.domains is empty",
                where="data.domains",
                fix="name at least one: data: {domains: {shop: {items: …, interactions: …}}}",
            )
        storage = Path(config.run.storage).resolve()
        self.config = config.model_copy(
            update={"run": config.run.model_copy(update={"storage": str(storage)})}
        )
        self.store = ArtifactStore(storage, remote=config.run.remote, progress=_meter)
        self.run_dir = run_directory(self.config)
        self.artifacts: dict[str, Artifact] = dict(given or {})
        self._resume = resume
        self._sources = ""

    def __enter__(self) -> Self:
        from qbrec.engine.launch import process_group, resolve_launcher
        from qbrec.engine.preemption import stop_on_sigterm
        from qbrec.engine.ray_metrics import RayGauges
        from qbrec.tracking.export import GAUGES, Exporter
        from qbrec.tracking.tracker import Tracker

        torchrun = resolve_launcher(self.config) == "torchrun"
        self._main = not torchrun or os.environ.get("RANK", "0") == "0"
        self._held = ExitStack()
        self._held.enter_context(stop_on_sigterm())
        if torchrun:
            self._held.enter_context(process_group(self.config))
        self._torchrun = torchrun
        with self._on_main():
            if self._main:
                self.store.prepare()
                self._refuse_known()
                self.record = RunRecord.own(self.config, resume=self._resume)
                self.tracker = Tracker(self.config, self.run_dir)
                self._held.enter_context(
                    Exporter(self.run_dir, run=self.config.run.name, publish=RayGauges(GAUGES))
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main and hasattr(self, "tracker"):
            self.tracker.finish("FINISHED" if kind is None else "FAILED")
            self.record.close()
        self._held.__exit__(kind, error, trace)

    @property
    def is_main(self) -> bool:
        """Whether this process is the driver (always, except under torchrun)."""
        return self._main

    def up_to(self, name: str) -> Artifact:
        """Bring a stage and all before it up to date and return its artifact.

        Raises:
            ConfigError: This configuration has no such stage.
        """
        stages = stages_of(self.config)
        if name not in [stage.name for stage in stages]:
            raise ConfigError(
                f"this configuration has no stage {name!r}: it is switched off",
                where="sequence.pretraining" if name == "pretrain" else "configuration",
                fix=f"choose one of {', '.join(stage.name for stage in stages)}",
            )
        for stage in stages:
            if stage.name not in self.artifacts:
                self._bring(stage)
            if stage.name == name:
                return self.artifacts[name]
        raise AssertionError(f"no stage {name!r}")

    def train(self) -> dict[str, Artifact]:
        """Bring all that the evaluation reads up to date, and return it by stage."""
        for stage in stages_of(self.config):
            if stage.name not in self.artifacts and not stage.every_seed:
                self._bring(stage)
        return dict(self.artifacts)

    def _bring(self, stage: Stage) -> None:
        inputs = {name: self.artifacts[name] for name in stage.inputs}
        if not self._sources:
            self._sources = self._fingerprint()
        key = stage.key(self.config, inputs=inputs, sources=self._sources)
        found = self._find(stage.name, key)
        if found is not None:
            found.verify()
            if self._main:
                self.store.publish(found)
                self._forget_copies(stage.name)
                say(f"✓ {stage.name:<11} up to date  {_short(found.path)}")
                self.tracker.reused(stage.name, found)
        else:
            found = self._run(stage, key, inputs)
        self.artifacts[stage.name] = found
        if self._main:
            self.record.complete(stage.name, key=key, path=found.path)
            if stage.name == "catalog":
                self.tracker.dataset(found)
        if stage.gate is not None:
            from qbrec.engine.worker import entry_point

            entry_point(stage.gate)(found, self.config)

    def _run(self, stage: Stage, key: str, inputs: dict[str, Artifact]) -> Artifact:
        from qbrec.engine.launch import launch
        from qbrec.engine.worker import Order, run_order

        order: Order = {
            "stage": stage.name,
            "entry": stage.entry,
            "key": key,
            "config": self.config.model_dump(mode="json"),
            "recipe": stage.recipe(self.config),
            "inputs": {name: str(artifact.path) for name, artifact in inputs.items()},
            "storage": str(self.store.root),
            "run_dir": str(self.run_dir),
            "owner": self.record.owner if self._main else "",
            "progress_file": None,
        }
        start = time.monotonic()
        if self._main:
            say(f"▸ {stage.name}")
        with (
            self.record.timed(stage.name, key) if self._main else nullcontext(),
            self.tracker.stage(stage.name, key=key) if self._main else nullcontext() as record,
        ):
            if stage.distributed:
                launch(order)
            else:
                with self._on_main():
                    if self._main:
                        run_order(order, alone=True)
            found = self.store.find(stage.name, key)
            assert found is not None, f"stage {stage.name} ended without its artifact"
            if self._main:
                if not stage.inputs:
                    self._check_sources(found)
                self.store.publish(found)
                self._forget_copies(stage.name)
            if record is not None:
                record.complete(found)
        if self._main:
            say(f"✓ {stage.name:<11} {time.monotonic() - start:6.1f} s    {_short(found.path)}")
        return found

    def _refuse_known(self) -> None:
        """`never` resume also means what the remote home has of a run of this name."""
        from qbrec.engine.remote_checkpoints import has_copies

        remote = self.config.run.remote
        if self._resume == "never" and remote and has_copies(remote, run=self.run_dir.name):
            raise ConfigError(
                "the remote home has checkpoints of a run of this name",
                where=f"{remote}/checkpoints/{self.run_dir.name}",
                fix="choose another run.name, or delete that folder",
            )

    def _forget_copies(self, stage: str) -> None:
        """What a finished stage would resume from is of no more use, here or remotely."""
        from qbrec.engine.remote_checkpoints import forget_copies

        shutil.rmtree(self.run_dir / "checkpoints" / stage, ignore_errors=True)
        if self.config.run.remote is None:
            return
        try:
            forget_copies(self.config.run.remote, run=self.run_dir.name, stage=stage)
        except DataError as error:
            say(f"warning: old copies of checkpoints stay in the remote home\n{error}")

    def _find(self, kind: str, key: str) -> Artifact | None:
        """The same answer on every rank: rank 0 alone asks the remote home, the others see its cache."""
        found = None
        with self._on_main():
            if self._main:
                found = self.store.find(kind, key)
        return found if self._main else self.store.find_again(kind, key)

    def _fingerprint(self) -> str:
        """Identity of all that the catalogue reads: the input's files and local encoders."""
        from qbrec.catalog.encoders.models import local_models
        from qbrec.catalog.sources import source_fingerprint

        return source_fingerprint(self.config.data, models=local_models(self.config.catalog))

    def _check_sources(self, catalog: Artifact) -> None:
        """Refuse a catalogue whose input changed while it was read: its key speaks of the earlier files."""
        if self._fingerprint() != self._sources:
            (catalog.path / MANIFEST).unlink()
            raise DataError(
                "the input changed while the catalogue was built",
                where="data.domains",
                fix="leave the files alone and run the same command again: it is built anew",
            )

    @contextmanager
    def _on_main(self) -> Iterator[None]:
        """Work of rank 0 under torchrun: the others wait at its end."""
        yield
        if self._torchrun:
            import torch.distributed as dist

            dist.barrier()

    def catch_up(self) -> None:
        """Give what was appended to the catalogue its semantic IDs, where it has none yet.

        Raises:
            QbrecError: See `append_run.bring_to_models`.
        """
        from qbrec.append_run import bring_to_models

        limit = self.config.quantizer.quality.max_drift
        bring_to_models(self.config, self.record, self.store, max_drift=limit, say=say, warn=say)

    def register(self) -> str | None:
        """Register the model unless this very one is registered; its version, None where switched off."""
        if not (self.config.registry.enabled and self.config.tracking.enabled):
            return None
        from qbrec.registry.versions import register
        from qbrec.run_coldstart import with_coldstart
        from qbrec.run_generations import with_generations

        self.tracker.flush()  # the version hangs on the run's own MLflow run
        artifacts = with_coldstart(self.config, with_generations(self.config, self.artifacts))
        return register(self.config, self.run_dir, artifacts)

    def report(self) -> Path:
        """Write the run's HTML report."""
        return report_of(self.config, self.artifacts)


def finished_artifacts(config: RootConfig) -> dict[str, Artifact]:
    """Artifacts of a run as its run.json names them, without running anything.

    Raises:
        DataError: The run does not exist or an artifact is damaged.
    """
    path = run_directory(config)
    record = RunRecord.load(path)
    if not record.stages:
        raise DataError("there is no such run yet", where=str(path), fix="`qbrec run --config …` makes it")
    store = ArtifactStore(Path(config.run.storage).resolve())
    return {name: store.open(stage["path"]) for name, stage in record.stages.items()}


def report_of(config: RootConfig, artifacts: Mapping[str, Artifact]) -> Path:
    """Write the HTML report of a run, with what the registry says of its model.

    Raises:
        DataError: An artifact is damaged.
    """
    from qbrec.registry.describe import standing_of
    from qbrec.report.page import write_report

    catalog, evaluation = artifacts.get("catalog"), artifacts.get("evaluation")
    standing = None
    if catalog is not None and evaluation is not None:
        standing = standing_of(config, evaluation=evaluation, catalog=catalog)
    return write_report(config, run_directory(config), artifacts, standing=standing)


def say(text: str, **style: Any) -> None:
    """One line for the person watching."""
    print(text, file=sys.stderr, flush=True, **style)


def _meter(total: int, label: str) -> Progress:
    from qbrec.engine.progress import Progress  # brings torch along

    return Progress(total, label)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
