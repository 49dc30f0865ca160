"""Full-catalogue ranking: scorers over items or semantic IDs, exact top-k, ranks, metrics."""

from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.scorer import CodeScorer, FactorisedScorer, Scorer
from qbrec.ranking.topk import target_ranks, tie_rank, top_k
from qbrec.ranking.validate import validation_metrics

__all__ = [
    "METRICS",
    "CodeScorer",
    "FactorisedScorer",
    "Scorer",
    "metrics_of_ranks",
    "target_ranks",
    "tie_rank",
    "top_k",
    "validation_metrics",
]
