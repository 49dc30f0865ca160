"""Everything a user can set before training: run, data, catalog, compute, tracking, registry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qbrec.config.base import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class RunConfig(Section):
    """Identity of a run: the same (storage, name) pair resumes."""

    name: Name = "default"
    seed: Count = 0
    storage: str = "qbrec-storage"


class DomainConfig(Section):
    """Where one domain's Parquet lies: a file, a folder or a glob; local, `s3://` or `gs://`."""

    items: str
    interactions: str


class DataConfig(Section):
    """Input of one or several named domains."""

    domains: dict[Name, DomainConfig] = Field(default_factory=dict)
    target: Name | None = None  # the domain that is fine-tuned and evaluated; None: the first one named

    @model_validator(mode="after")
    def _known_target(self) -> DataConfig:
        if self.target is not None and self.target not in self.domains:
            raise ValueError(f"target {self.target!r} is not one of the domains {sorted(self.domains)}")
        return self

    @property
    def target_domain(self) -> str:
        """The domain whose users are fine-tuned on and evaluated."""
        return self.target or next(iter(self.domains))


class TextConfig(Section):
    """Text encoder: the built-in hashed n-grams or a sentence-transformers model by name."""

    encoder: str = "hashed-ngram"
    dim: Positive = 256  # of the built-in encoder; a named model brings its own
    batch_size: Positive = 256
    revision: str | None = None


class ImageConfig(Section):
    """Image encoder: the built-in colour and gradient statistics or a CLIP model by name."""

    encoder: str = "pixel-statistics"
    batch_size: Positive = 64
    revision: str | None = None
    max_pixels: Positive = 25_000_000
    roots: tuple[str, ...] = ()  # folders from which `image_path` may be read


class CatalogConfig(Section):
    """Stage 0: validation, feature encoders, user histories."""

    max_rejected_fraction: Fraction = 0.01
    max_history: Positive = 512
    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    validation_fraction: Fraction = 0.1  # of the time span, for split: global_time
    test_fraction: Fraction = 0.1
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    structure_buckets: Positive = 65_536
    structure_depth: Positive = 6  # category-path prefixes kept, root first
    rows_per_shard: Positive = 262_144
    block_bytes: Positive = 1 << 20


class ComputeConfig(Section):
    """Where and how wide a run executes. Never part of an artifact's key."""

    launcher: Literal["auto", "inprocess", "torchrun", "ray"] = "auto"
    num_workers: Positive = 1
    threads_per_worker: Count = 0  # 0: cores of the machine / workers on it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    max_failures: Count = 2  # worker-group restarts by Ray Train before a run gives up
    timeout_s: Positive = 1800  # a collective that waits longer names the missing rank and stops
    ray_address: str | None = None  # None: the cluster of RAY_ADDRESS, else a local one


class TrackingConfig(Section):
    """MLflow. A dead server costs nothing: metrics are replayed from metrics.jsonl later."""

    enabled: bool = True
    uri: str | None = None  # None: sqlite:///<storage>/mlflow.db
    experiment: str = "qbrec"


class GateConfig(Section):
    """Floors a version must reach before `qbrec promote` gives it @champion."""

    min_metrics: dict[str, float] = Field(default_factory=dict)  # e.g. {"ndcg@10": 0.05}
    # Absolute NDCG@10 that may be lost to @champion: the lower end of the paired interval must be above minus
    # this.
    max_ndcg_loss: float = Field(default=0.002, ge=0)
    # Where @champion was evaluated on another catalogue, its users cannot be paired with ours.
    other_catalog: Literal["refuse", "floors"] = "refuse"


class RegistryConfig(Section):
    """Registered model name and promotion gate."""

    enabled: bool = True
    model_name: Name = "qbrec"
    max_part_bytes: Count = 4 << 30  # a part (catalog, quantizer, …) beyond it is served from where it lies
    gate: GateConfig = GateConfig()
