"""The whole configuration, and what of it identifies each stage."""

from __future__ import annotations

from pydantic import Field

from qbrec.config.base import Section
from qbrec.config.sections import (
    CatalogConfig,
    ComputeConfig,
    DataConfig,
    RegistryConfig,
    RunConfig,
    ServingConfig,
    TrackingConfig,
)
from qbrec.config.stages import (
    BaselinesConfig,
    EvaluationConfig,
    FusionConfig,
    QuantizerConfig,
    RankingConfig,
    SequenceConfig,
)


class RootConfig(Section):
    """One run of the whole road."""

    run: RunConfig = RunConfig()
    data: DataConfig = Field(default_factory=DataConfig)
    catalog: CatalogConfig = CatalogConfig()
    fusion: FusionConfig = FusionConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    sequence: SequenceConfig = SequenceConfig()
    ranking: RankingConfig = RankingConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    serving: ServingConfig = ServingConfig()
