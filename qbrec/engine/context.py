"""What a stage knows of the world it runs in: its rank, its storage, its run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qbrec.config.sections import ComputeConfig
from qbrec.engine.progress import Progress
from qbrec.errors import LaunchError
from qbrec.storage.artifact import Artifact, ArtifactStore, ArtifactWriter
from qbrec.storage.diskfull import writing

OWNER = "owner"  # file of a run directory: the mark of the driver that has it


@dataclass
class StageContext:
    """One rank's view of a running stage.

    Attributes:
        stage: Name of the stage, such as `fusion`; also the kind of the artifact it writes.
        key: Key of the artifact it writes.
        rank: This process among `world`.
        device: Where tensors of this rank live.
        run_dir: `<storage>/runs/<name>`: metrics.jsonl and checkpoints.
        owner: Mark of the driver that this rank works for; None: nobody else can have the run.
        recipe: Configuration that goes into the manifest.
        progress_file: Where progress is left for the driver; None: draw it here.
        remote: The run's remote home, where copies of checkpoints go; None: there is none.
    """

    store: ArtifactStore
    run_dir: Path
    stage: str
    key: str
    seed: int
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    progress_file: Path | None = None
    owner: str | None = None
    remote: str | None = None

    @classmethod
    def local(
        cls,
        store: ArtifactStore,
        run_dir: str | Path,
        *,
        stage: str = "stage",
        key: str = "0" * 64,
        seed: int = 0,
    ) -> StageContext:
        """A context for one process without a process group."""
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        return cls(store=store, run_dir=Path(run_dir), stage=stage, key=key, seed=seed)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0

    @property
    def checkpoint_dir(self) -> Path:
        """Where this stage keeps its checkpoints."""
        return self.run_dir / "checkpoints" / self.stage

    def check_owner(self) -> None:
        """Refuse to write for a driver that is gone while another one goes on with its run.

        After `kill -9` of a driver its workers live for some seconds, on a cluster whose network is cut for
        as long as that lasts. Called before anything that the next driver would find.

        Raises:
            LaunchError: The run belongs to another driver now.
        """
        if self.owner is not None and (self.run_dir / OWNER).read_text(encoding="utf-8") != self.owner:
            raise LaunchError(
                "another process has taken over this run", where=str(self.run_dir), fix="let that one go on"
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce in place over all ranks (`sum`, `max`, `min`) and return the tensor."""
        if self.world > 1:
            ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
            dist.all_reduce(tensor, op=ops[op])
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Copy the tensor of one rank to all, in place, and return it."""
        if self.world > 1:
            dist.broadcast(tensor, src=source)
        return tensor

    def broadcast_json(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0's document on every rank, as JSON gives it back."""
        data = json.dumps(document).encode() if self.is_main else b""
        length = self.broadcast(torch.tensor([len(data)], dtype=torch.int64, device=self.device))
        filled = data.ljust(int(length), b" ")
        body = torch.frombuffer(bytearray(filled), dtype=torch.uint8).to(self.device)
        found: dict[str, Any] = json.loads(self.broadcast(body).cpu().numpy().tobytes())
        return found

    def gather_bytes(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of all ranks on every rank; they may differ in length along the first dimension."""
        if self.world == 1:
            return [tensor]
        lengths = torch.zeros(self.world, dtype=torch.int64, device=tensor.device)
        lengths[self.rank] = len(tensor)
        self.all_reduce(lengths)
        longest = int(lengths.max())
        padded = torch.zeros((longest, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def sub_seed(self, purpose: str) -> int:
        """A seed for one purpose, the same on every rank; 63 bits."""
        return sub_seed(self.seed, purpose)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append to the run's metrics.jsonl (rank 0 only)."""
        if self.is_main:
            self.check_owner()
            line = {
                "time": round(time.time(), 3),
                "stage": self.stage,
                "step": step,
                "metrics": dict(metrics),
            }
            path = self.run_dir / "metrics.jsonl"
            with writing(path), open(path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    # A death or a full disk in the middle of a line must not swallow the next one.
                    torn = file.read(1) != b"\n"
                    file.write(b"\n" * torn)
                file.write(json.dumps(line).encode() + b"\n")

    def progress(self, total: int, label: str, *, done: int = 0) -> Progress:
        """Progress with an ETA; shown once, whatever the number of ranks."""
        return Progress(total, label, silent=not self.is_main, file=self.progress_file, done=done)

    def writer(self) -> ArtifactWriter:
        """Writer of this stage's artifact, its directory emptied; called on every rank."""
        writer = self.store.writer(self.stage, self.key)
        if self.is_main:
            self.check_owner()
            writer.prepare()
        self.barrier()
        return writer

    def commit(
        self, writer: ArtifactWriter, *, meta: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> Artifact:
        """Finish this stage's artifact; called on every rank, written by rank 0."""
        self.barrier()
        if self.is_main:
            self.check_owner()
            prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
            writer.commit(
                meta=meta,
                inputs=prints,
                config=self.recipe,
                seed=self.seed,
                made_by={"workers": self.world, "device": self.device.type},
            )
        self.barrier()
        return self.store.open(writer.path)


def sub_seed(seed: int, purpose: str) -> int:
    """Derive an independent 63-bit seed for a purpose."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
