"""Full-catalogue ranking: scorers over items or semantic IDs, exact top-k, ranks, metrics."""

from qbrec.ranking.beam import AutoregressiveScorer, BeamSearch
from qbrec.ranking.code_index import CodeIndex
from qbrec.ranking.exact import exact_top_k
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.rank_of import exact_ranks
from qbrec.ranking.scorer import CodeScorer, FactorisedScorer, PrefixScorer, Scorer
from qbrec.ranking.topk import target_ranks, tie_rank, top_k
from qbrec.ranking.validate import validation_metrics

__all__ = [
    "METRICS",
    "AutoregressiveScorer",
    "BeamSearch",
    "CodeIndex",
    "CodeScorer",
    "FactorisedScorer",
    "PrefixScorer",
    "Scorer",
    "exact_ranks",
    "exact_top_k",
    "metrics_of_ranks",
    "target_ranks",
    "tie_rank",
    "top_k",
    "validation_metrics",
]
