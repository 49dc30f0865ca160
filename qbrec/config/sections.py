"""Everything a user can set before training: run, data, catalog, compute, tracking, registry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qbrec.config.base import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Seconds = Annotated[float, Field(gt=0.0, le=3600.0)]
RemoteUri = Annotated[str, Field(pattern=r"^((s3|gs)://[A-Za-z0-9][A-Za-z0-9._-]*(/.*)?|file:///.+)$")]
_METRIC = r"((hr|ndcg)@[0-9]+|mrr)"
MetricName = Annotated[str, Field(pattern=rf"^([a-z_]+/)?{_METRIC}$")]
ColdMetricName = Annotated[str, Field(pattern=rf"^(held_out|catalogue)/([a-z_]+/)?{_METRIC}$")]
HostPattern = Annotated[
    str, Field(pattern=r"^(\*\.)?([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?$")
]


class RunConfig(Section):
    """Identity of a run: the same (storage, name) pair resumes."""

    name: Name = "default"
    seed: Count = 0
    storage: str = "qbrec-storage"
    # A remote home of finished artifacts: what it has is fetched instead of computed. Never part of a key.
    remote: RemoteUri | None = None


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
    """Text encoder: the built-in hashed n-grams or a sentence-transformers or CLIP model by name."""

    encoder: str = "hashed-ngram"  # else a model on the Hugging Face hub, or a folder that holds one
    dim: Positive = 256  # of the built-in encoder; a named model brings its own
    batch_size: Positive = 256
    revision: str | None = None  # of a model on the hub: the hash of its commit
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of a named model
    attributes: tuple[str, ...] = ()  # further columns that make one more token: "name: value; …"
    description_tokens: Annotated[int, Field(ge=1, le=64)] = 1  # of one description, at most
    chunk_characters: Annotated[int, Field(ge=50, le=1000)] = 1000  # of the description in one such token

    @model_validator(mode="after")
    def _sensible(self) -> TextConfig:
        if self.encoder == "hashed-ngram" and self.revision is not None:
            raise ValueError("revision belongs to a named encoder; the built-in one has none")
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"attributes names a column twice: {', '.join(self.attributes)}")
        return self


class ImageConfig(Section):
    """Image encoder, the built-in colour and gradient statistics or a CLIP model by name; its pictures."""

    encoder: str = "pixel-statistics"  # else a CLIP model on the Hugging Face hub, or a folder that holds one
    batch_size: Positive = 64
    revision: str | None = None  # of a model on the hub: the hash of its commit
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of a named model
    tokens: Literal["pooled", "grid"] = "pooled"  # grid: beside the whole picture, grid x grid parts of it
    grid: Annotated[int, Field(ge=2, le=7)] = 2
    max_pictures: Annotated[int, Field(ge=1, le=32)] = 4  # of one item; further ones are counted as skipped
    on_error: Literal["reject", "skip"] = "reject"  # what a bad picture costs: its item, or only itself
    max_pixels: Positive = 25_000_000
    max_bytes: Positive = 20_000_000
    roots: tuple[str, ...] = ()  # folders, s3:// and gs:// prefixes from which `image_path` may be read
    hosts: tuple[HostPattern, ...] = ()  # from which `image_path` may fetch http(s)://; *.example.com too
    fetch_concurrency: Annotated[int, Field(ge=1, le=256)] = 16  # pictures read at once by one task
    retries: Annotated[int, Field(ge=0, le=10)] = 3  # of a server that is busy, failing or slow
    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = 10.0  # without a single byte
    total_timeout_s: Seconds = 60.0  # of one picture, with all redirects and retries

    @model_validator(mode="after")
    def _sensible(self) -> ImageConfig:
        if self.encoder == "pixel-statistics" and self.revision is not None:
            raise ValueError("revision belongs to a named encoder; the built-in one has none")
        if self.tokens_per_picture * self.max_pictures > 255:
            raise ValueError(
                f"{self.max_pictures} pictures of {self.tokens_per_picture} tokens exceed the 255 tokens "
                "that a modality may have: lower max_pictures or grid"
            )
        return self

    @property
    def tokens_per_picture(self) -> int:
        """Feature tokens of one picture."""
        return 1 + self.grid**2 if self.tokens == "grid" else 1


class DuplicatesConfig(Section):
    """Near-duplicates: items that the same users bought, beside items of equal content."""

    min_overlap: float = Field(default=0.5, gt=0, le=1)  # Jaccard of the sets of training users
    # In common: of pairs with a single one 2 of 39 had alike titles, with two 10 of 15 (beauty, scientific).
    min_users: Positive = 2
    # Of each group only the most popular item stays in histories and among the candidates.
    collapse: Literal["none", "content", "overlap", "both"] = "none"


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
    duplicates: DuplicatesConfig = DuplicatesConfig()
    shard_bytes: Positive = 256 << 20  # about; of a tar of items or histories
    block_bytes: Positive = 4 << 20  # about; smaller where the catalogue would have few blocks


class ComputeConfig(Section):
    """Where and how wide a run executes. Never part of an artifact's key."""

    launcher: Literal["auto", "inprocess", "torchrun", "ray"] = "auto"
    # (min, max) is elastic: Ray starts with what there is, goes on with what is left, and grows again; under
    # torchrun it is what `--nnodes min:max` may come to.
    num_workers: Positive | tuple[Positive, Positive] = 1
    resize_interval_s: Seconds = 60.0  # between two looks for room to grow; growing costs a restart
    threads_per_worker: Count = 0  # 0: cores of the machine / workers on it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # moments and master weights in the host's memory; ZeRO 1 to 3
    offload_parameters: bool = False  # weights too, fetched layer by layer; ZeRO 3
    overlap_communication: Literal["auto"] | bool = "auto"  # with backward; auto: on GPUs
    # Of gradients reduced, or weights gathered, at once.
    bucket_elements: Annotated[int, Field(ge=2, multiple_of=2)] = 50_000_000
    loss_scale_power: Annotated[int, Field(ge=0, le=32)] = 16  # float16 begins at a scale of 2 to it
    loss_scale_window: Positive = 1000  # steps without overflow after which the scale doubles
    compile: bool = False  # torch.compile of the trained module; needs a C++ compiler
    max_failures: Count = 2  # worker-group restarts by Ray Train before a run gives up
    timeout_s: Positive = 1800  # a collective that waits longer names the missing rank and stops
    stop_grace_s: Seconds = 60.0  # that a driver told to stop gives its workers to write a checkpoint
    encoder_actors: Count = 0  # most Ray actors with named feature encoders; 0: as many as find room
    encoder_gpus: Annotated[float, Field(gt=0.0, le=8.0)] = 1.0  # of one of them; a fraction shares a GPU
    encoder_cpus: Positive = 1
    ray_address: str | None = None  # None: the cluster of RAY_ADDRESS, else a local one
    # Of all machines of the run together, in whatever currency; 0: unknown. Only the report reads it.
    cost_per_hour: NonNegative = 0.0

    @model_validator(mode="after")
    def _offload(self) -> ComputeConfig:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("(min, max): the first may not exceed the second")
        return value

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2

    @property
    def min_workers(self) -> int:
        """Workers without which a stage does not run."""
        return self.worker_range[0]

    @property
    def max_workers(self) -> int:
        """Most workers of a stage."""
        return self.worker_range[1]


class TrackingConfig(Section):
    """MLflow. A dead server costs nothing: metrics are replayed from metrics.jsonl later."""

    enabled: bool = True
    uri: str | None = None  # None: sqlite:///<storage>/mlflow.db
    experiment: str = "qbrec"


class IdGateConfig(Section):
    """What the semantic IDs of the trained catalogue must be like (its `quality.json`); None: not asked."""

    min_no_collision_rate: Fraction | None = None  # items alone on their ID
    min_perplexity_share: Fraction | None = None  # perplexity of level 0 over its number of codes
    max_largest_bucket: Positive | None = None  # items on one ID


class LatencyGateConfig(Section):
    """How fast one recommendation must be on the machine that promotes."""

    max_p95_ms: float | None = Field(default=None, gt=0)  # None: not measured
    histories: Positive = 200  # real ones of the hold-out, one request each; the bundle may carry fewer
    max_seconds: Seconds = 30.0  # what was measured by then decides


class GateConfig(Section):
    """What a version must show before `qbrec promote` gives it @champion.

    Metrics are those of qbrec with seen items removed: `ndcg@10`, or `tail/ndcg@10` on a slice.
    """

    min_metrics: dict[MetricName, float] = Field(default_factory=dict)  # e.g. {"ndcg@10": 0.05}
    # Absolute loss to @champion that is borne: the paired 95 % interval must not reach below minus it.
    max_loss: dict[MetricName, NonNegative] = Field(default_factory=lambda: {"ndcg@10": 0.002})
    # Where @champion was evaluated on other items or histories, its users cannot be paired with ours.
    other_catalog: Literal["refuse", "floors"] = "refuse"
    # Where the evaluation of @champion is damaged or gone, nothing can be compared with it.
    damaged_champion: Literal["refuse", "floors"] = "refuse"
    ids: IdGateConfig = IdGateConfig()
    latency: LatencyGateConfig = LatencyGateConfig()
    # Of `qbrec coldstart`: held_out/ndcg@10 (among items held out), catalogue/ndcg@10 (among all items).
    min_coldstart: dict[ColdMetricName, float] = Field(default_factory=dict)


class RegistryConfig(Section):
    """Registered model name and promotion gate."""

    enabled: bool = True
    model_name: Name = "qbrec"
    max_part_bytes: Count = 4 << 30  # a part (catalog, quantizer, …) beyond it is served from where it lies
    # Histories of test users, without their ids, that a version carries so that its latency can be measured.
    probe_histories: Count = 256
    gate: GateConfig = GateConfig()


class ServingConfig(Section):
    """`qbrec serve`: how requests are ranked together, and what one of them may ask for."""

    max_batch: Positive = 64  # histories ranked together; a request with more is ranked as it is
    max_wait_ms: Annotated[float, Field(ge=0.0, le=1000.0)] = 2.0  # that a history waits for company
    max_waiting: Positive = 1024  # histories of a replica under way; beyond, requests are answered 503
    max_histories: Positive = 64  # of one request
    max_history_items: Positive = 1024  # of one history
    max_k: Positive = 200
    max_body_bytes: Positive = 1 << 20
    poll_s: Seconds = 10.0  # between two looks at the registry for another version
    drain_s: Seconds = 30.0  # that requests under way get when the service ends
