"""What item graphs add to the score of semantic IDs: a non-negative bonus on the candidates that paths reach.

    score(i) = id_score(i) + Σ_p weight_p · strength_p(history, i)

Semantic IDs generalise, graphs remember. The weights are those of a conditional logit over candidates (the
softmax over items that the encoder itself is trained with), fitted on validation users; how much of the whole
bonus is added (nothing, too) is then chosen by the NDCG@10 of exactly the ranking that will serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from qbrec.ranking.counted import strongest
from qbrec.ranking.graphs import ItemGraphs
from qbrec.ranking.kin import kin_of_appended, with_inherited
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.rescore import add_bonus
from qbrec.ranking.scorer import Domain, Scorer
from qbrec.ranking.topk import LOWEST, target_ranks
from qbrec.ranking.validate import dealt_back
from qbrec.storage.ragged import Ragged

SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
FIRST_BY_IDS = 100  # candidates of a user by semantic IDs, for the fit
FIRST_BY_PATHS = 200  # and by all paths together
RIDGE = 1e-4
_START = 0.5  # of the semantic IDs' own score, which is too sure of itself beside others

Batch = tuple[Ragged, NDArray[np.int64], Domain]


@dataclass(frozen=True)
class Bonus:
    """A weight for every path of the graphs.

    Attributes:
        graphs: The graphs.
        weights: In the order of `graphs.names`, none negative.
    """

    graphs: ItemGraphs
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.weights) == len(self.graphs.names)
        assert min(self.weights) >= 0

    def __call__(self, histories: Ragged) -> sp.csr_matrix:
        """The bonus of the candidates of every history, float32 CSR [B, N]."""
        return with_inherited(weighted(self.graphs.paths(histories), self.weights), self.kin)

    @cached_property
    def kin(self) -> sp.csr_matrix | None:
        """Items whose bonus appended ones inherit, see `kin_of_appended`."""
        return kin_of_appended(self.graphs, self.weights)


class BonusScorer:
    """Another scorer's scores plus the bonus; exact, since every item is scored.

    Args:
        base: The scorer over semantic IDs; it may know more rows than the graphs (items appended after the
            training that have no rows there yet), which get no bonus.
        bonus: Graphs and weights.
    """

    def __init__(self, base: Scorer, bonus: Bonus) -> None:
        self.base, self.bonus, self.name = base, bonus, base.name

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Scores float32 [B, N of the base scorer]."""
        scores = self.base.scores(histories, domain)
        add_bonus(scores, self.bonus(histories))
        return scores


def weighted(paths: Sequence[sp.csr_matrix], weights: Sequence[float]) -> sp.csr_matrix:
    """Sum of weight · path, float32 CSR."""
    total = sp.csr_matrix(paths[0].shape, dtype=np.float32)
    for path, weight in zip(paths, weights, strict=True):
        if weight:
            total = total + path * np.float32(weight)
    return total.tocsr()


def tune_bonus(
    base: Scorer,
    graphs: ItemGraphs,
    batches: Sequence[Batch],
    *,
    tie_rank: NDArray[np.int64],
    allowed: NDArray[np.bool_] | None = None,
    gather: Callable[[torch.Tensor], list[torch.Tensor]] = lambda tensor: [tensor],
    device: torch.device | str = "cpu",
) -> tuple[Bonus, dict[str, float]]:
    """Fit the weights on validation targets, seen items removed, and choose how much of the bonus to add.

    Args:
        base: The scorer over semantic IDs.
        graphs: Built from the training part.
        batches: (contexts, targets int64 [b], domain [b]) of this rank's validation users: user
            `rank + i · world` of all at place i.
        tie_rank: Order of equal scores, [N].
        allowed: Candidates, bool [N].
        gather: Collects a tensor of every rank on every rank.
        device: Where gathered tensors must lie.

    Returns:
        The bonus, and validation NDCG@10 by share of the bonus added. The same on every rank.
    """
    parts = [_candidates(base, graphs, *batch, allowed=allowed) for batch in batches]
    # Nobody, so that a rank without users has arrays of the right shape.
    none = np.zeros((0, _num_candidates(len(tie_rank)), 1 + len(graphs.names)), np.float32)
    features = np.concatenate([none, *(part for part, _ in parts)])
    found = np.concatenate([np.zeros(0, np.int64), *(known for _, known in parts)])
    features = dealt_back(gather(torch.from_numpy(features).to(device))).numpy()
    places = dealt_back(gather(torch.from_numpy(found).to(device))).numpy()
    bonus = Bonus(graphs, tuple(conditional_logit(features, places)))
    gains = torch.zeros(1 + len(SCALES), dtype=torch.float64)
    place = METRICS.index("ndcg@10")
    for contexts, targets, domain in batches:
        scores, reached, extra = base.scores(contexts, domain), 0.0, bonus(contexts)
        gains[0] += len(targets)
        for column, scale in enumerate(SCALES, 1):
            add_bonus(scores, extra, scale=scale - reached)
            reached = scale
            ranks = target_ranks(scores, targets, tie_rank=tie_rank, exclude=contexts, allowed=allowed)
            gains[column] += metrics_of_ranks(ranks)[:, place].sum()
    total = torch.stack(gather(gains[None].to(device))).sum((0, 1)).cpu().numpy()
    means = total[1:] / max(total[0], 1.0)
    best = SCALES[int(means.argmax())]
    table = {f"{scale:g} of the bonus": float(mean) for scale, mean in zip(SCALES, means, strict=True)}
    return Bonus(graphs, tuple(best * weight for weight in bonus.weights)), table


def conditional_logit(features: NDArray[np.float32], found: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights w ≥ 0 that maximise the likelihood of softmax(a · id_score + Σ w_p · path_p), as w / a.

    Args:
        features: [U, C, 1 + P]: score by semantic IDs (the lowest float where there is no candidate), then
            the paths.
        found: Place of each user's target among the candidates, -1 where it is none of them; [U].

    Returns:
        float64 [P]; zeros where no target is among the candidates.
    """
    known = torch.from_numpy(features[found >= 0])
    target = torch.from_numpy(found[found >= 0])
    num_paths = features.shape[2] - 1
    if not len(known):
        return np.zeros(num_paths)
    absent = known[..., 0] == LOWEST
    known[..., 0] = (known[..., 0] - known[..., 0].amax(1, keepdim=True)).masked_fill(absent, 0)
    spread = known.square().mean((0, 1)).sqrt().clamp(min=1e-6)  # one unit for all, for the optimiser's sake
    known /= spread

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        scores = (known @ w).masked_fill(absent, -torch.inf)
        nll = torch.nn.functional.cross_entropy(scores, target) + RIDGE * w.square().sum()
        nll.backward()
        assert w.grad is not None
        return float(nll.detach()), w.grad.double().numpy()

    start = np.full(1 + num_paths, 0.1)
    start[0] = _START * float(spread[0])
    # The scale of the semantic IDs must stay above zero: the others are expressed in it.
    bounds = [(1e-2 * float(spread[0]), None), *[(0.0, None)] * num_paths]
    solution = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 200})
    weights = solution.x / spread.double().numpy()
    return np.asarray(weights[1:] / weights[0])


def _candidates(
    base: Scorer,
    graphs: ItemGraphs,
    contexts: Ragged,
    targets: NDArray[np.int64],
    domain: Domain,
    *,
    allowed: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features float32 [b, C, 1 + P] of each user's candidates, and the target's place among them or -1."""
    scores = base.scores(contexts, domain).float()
    if allowed is not None:
        scores.masked_fill_(~torch.as_tensor(allowed, device=scores.device), LOWEST)
    rows = torch.from_numpy(contexts.row_ids).to(scores.device)
    scores[rows, torch.from_numpy(contexts.values.astype(np.int64)).to(scores.device)] = LOWEST
    paths = graphs.paths(contexts)
    # Every path in units of the user's own mean, so that each brings its best, whoever shares the batch.
    reached = strongest(weighted([_even(path) for path in paths], [1.0] * len(paths)), FIRST_BY_PATHS)
    columns = np.full((len(contexts), _num_candidates(scores.shape[1])), -1, np.int64)
    first = columns.shape[1] - FIRST_BY_PATHS
    columns[:, :first] = scores.topk(first, dim=1).indices.cpu().numpy()
    owner = np.repeat(np.arange(len(contexts)), np.diff(reached.indptr))
    columns[owner, first + np.arange(len(owner)) - reached.indptr[owner]] = reached.indices
    order = np.sort(columns, axis=1)  # an item that comes both ways counts once
    order[:, 1:][order[:, 1:] == order[:, :-1]] = -1
    features = np.zeros((*order.shape, 1 + len(paths)), np.float32)
    places = np.arange(len(order))[:, None]
    chosen = torch.from_numpy(np.maximum(order, 0)).to(scores.device)
    features[..., 0] = np.where(order >= 0, scores.gather(1, chosen).cpu().numpy(), LOWEST)
    for number, path in enumerate(paths, 1):
        inside = (order >= 0) & (order < path.shape[1])
        r, c = np.broadcast_to(places, order.shape)[inside], order[inside]
        features[..., number][inside] = np.asarray(path[r, c]).ravel()
    hit = (order == targets[:, None]) & (features[..., 0] > LOWEST)
    return features, np.where(hit.any(1), hit.argmax(1), -1)


def _even(path: sp.csr_matrix) -> sp.csr_matrix:
    """Rows divided by the mean of their entries."""
    lengths = np.diff(path.indptr)
    sums = np.asarray(path.sum(1)).ravel()
    scale = np.divide(lengths, sums, out=np.zeros(len(sums)), where=sums > 0).astype(np.float32)
    return sp.csr_matrix((path.data * np.repeat(scale, lengths), path.indices, path.indptr), shape=path.shape)


def _num_candidates(num_items: int) -> int:
    return min(FIRST_BY_IDS, num_items) + FIRST_BY_PATHS
