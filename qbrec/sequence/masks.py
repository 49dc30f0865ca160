"""Masks of stage 3, drawn on the device from a counter-based random stream.

A draw is a hash of (seed, epoch, sample, purpose, index), not the next state of a generator. So it depends
neither on which other samples share the batch nor on the number of ranks, a resumed run draws the same masks,
and no Python runs per sample: everything below works on flat arrays over the items of all histories of a
micro-batch.
"""

from __future__ import annotations

import functools
import math

import torch

from qbrec.config.stages import MaskConfig
from qbrec.engine.mixing import uniform

# Purposes: separate streams for separate decisions about one sample.
(
    KIND,
    SPAN_START,
    SPAN_LENGTH,
    REGION,
    REGION_SIDE,
    FALLBACK,
    PARTIAL,
    PARTIAL_LEVEL,
    PREFIX,
    PREFIX_LENGTH,
) = range(10)  # the next one is `engine.candidates.CANDIDATES`

SPAN, TAIL, MULTI_REGION = range(3)

# Stopping probability of the geometric span length: mean about 2 items, most spans within `max_span`.
_STOP = 0.4


def _integers(u: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Uniform integers in [0, bound) from uniform numbers; int64."""
    return torch.minimum((u.to(torch.float64) * bound).to(torch.int64), bound - 1)


def prefix_lengths(
    lengths: torch.Tensor, samples: torch.Tensor, *, seed: int, epoch: int, probability: float
) -> torch.Tensor:
    """Random truncation of histories, so that every item of a history becomes the last one in some epoch.

    Args:
        lengths: int64 [B], items in each history, at least 1.
        samples: int64 [B], global sample ids.
        seed: Seed of the stage.
        epoch: Epoch, from 0.
        probability: Share of the histories that are truncated; the others stay whole.

    Returns:
        int64 [B], between min(2, length) and length.
    """
    low = lengths.clamp(max=2)
    drawn = low + _integers(
        uniform(samples, seed=seed, epoch=epoch, purpose=PREFIX_LENGTH), lengths - low + 1
    )
    chosen = uniform(samples, seed=seed, epoch=epoch, purpose=PREFIX) < probability
    return torch.where(chosen, drawn, lengths)


def draw_masks(
    lengths: torch.Tensor,
    samples: torch.Tensor,
    config: MaskConfig,
    *,
    num_levels: int,
    seed: int,
    epoch: int,
) -> torch.Tensor:
    """Which tokens of each history are hidden (paper: span, tail and multi-region masks).

    Each sample draws one kind. *Span*: spans of geometric length up to `max_span` start anywhere, so that a
    share of about `ratio` is hidden. *Tail*: the last item. *Multi-region*: the history is cut into about
    `ratio` × length (at least two) equal regions and one item hidden in each, never two neighbours. Hidden
    items lose all their levels, or, with probability `partial`, only the deeper ones, so that decoding from
    left to right stays in distribution. Every sample hides at least one item.

    Args:
        lengths: int64 [B], items in each history, at least 1.
        samples: int64 [B], global sample ids.
        config: Mixture and shape.
        num_levels: L.
        seed: Seed of the stage.
        epoch: Epoch, from 0.

    Returns:
        bool [Σ lengths, L], True where hidden; items in the order of the histories.
    """
    weights = (config.span, config.tail, config.multi_region)
    bounds = torch.tensor(
        [weights[0] / sum(weights), (weights[0] + weights[1]) / sum(weights)], device=lengths.device
    )
    kind = torch.bucketize(uniform(samples, seed=seed, epoch=epoch, purpose=KIND), bounds, right=True)

    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # [S]
    ends = torch.cumsum(lengths, 0)  # [B]
    place = torch.arange(len(owner), device=lengths.device)  # [S] flat position
    position = place - (ends - lengths)[owner]  # [S] position inside the history
    item_samples = samples[owner]  # [S]

    spans = _spans(item_samples, position, place, ends[owner], config, seed=seed, epoch=epoch)
    tails = place == ends[owner] - 1
    regions = _regions(item_samples, position, lengths[owner], config, seed=seed, epoch=epoch)
    item_kind = kind[owner]
    hidden = torch.where(item_kind == SPAN, spans, torch.where(item_kind == TAIL, tails, regions))  # [S]

    counts = torch.zeros_like(lengths).index_add_(0, owner, hidden.to(torch.int64))
    spare = _integers(uniform(samples, seed=seed, epoch=epoch, purpose=FALLBACK), lengths)
    hidden |= (counts == 0)[owner] & (position == spare[owner])

    return _levels(hidden, item_samples, position, config, num_levels=num_levels, seed=seed, epoch=epoch)


def _spans(
    samples: torch.Tensor,
    position: torch.Tensor,
    place: torch.Tensor,
    end: torch.Tensor,
    config: MaskConfig,
    *,
    seed: int,
    epoch: int,
) -> torch.Tensor:
    """Covered by a span, bool [S]. All arguments are per item; `place` and `end` are flat positions."""
    tail_mass = _tail_mass(config.max_span)
    start = _start_probability(config.ratio, config.max_span)
    draw = uniform(samples, seed=seed, epoch=epoch, purpose=SPAN_LENGTH, index=position)
    thresholds = torch.tensor([1 - mass for mass in tail_mass], device=samples.device)
    length = 1 + torch.bucketize(draw, thresholds, right=True)
    starts = uniform(samples, seed=seed, epoch=epoch, purpose=SPAN_START, index=position) < start
    reach = torch.where(starts, torch.minimum(place + length, end), 0)
    # Spans end inside their own history, so one running maximum over the flat array serves all of them.
    return torch.cummax(reach, 0).values > place if len(reach) else starts


def _tail_mass(max_span: int) -> list[float]:
    """P(length > 1), P(length > 2), … of a span."""
    return [(1 - _STOP) ** length for length in range(1, max_span)]


@functools.cache
def _start_probability(ratio: float, max_span: int) -> float:
    """How often a span must start for a share `ratio` of the items to be covered, by bisection.

    An item stays visible if no span that starts at it, or d items before it and is longer than d, covers it.
    """
    reach = [1.0, *_tail_mass(max_span)]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        visible = math.prod(1 - middle * mass for mass in reach)
        low, high = (low, middle) if 1 - visible > ratio else (middle, high)
    return high


def _regions(
    samples: torch.Tensor,
    position: torch.Tensor,
    length: torch.Tensor,
    config: MaskConfig,
    *,
    seed: int,
    epoch: int,
) -> torch.Tensor:
    """The hidden item of its region, bool [S]; at least two items a region, where the history has four.

    One item at the edge of a region stays visible, the first one or the last one in all regions of a history,
    so that hidden items are never neighbours.
    """
    count = torch.maximum(
        (config.ratio * length).round().to(torch.int64), torch.tensor(2, device=length.device)
    )
    count = torch.minimum(count, length // 2).clamp(min=1)  # [S]
    region = torch.div(position * count, length, rounding_mode="floor")
    first = torch.div(region * length + count - 1, count, rounding_mode="floor")
    after = torch.div((region + 1) * length + count - 1, count, rounding_mode="floor")
    # With one region only (a short history) nothing has to be kept apart.
    spared = (count > 1).to(torch.int64)
    side = uniform(samples, seed=seed, epoch=epoch, purpose=REGION_SIDE) < 0.5
    draw = uniform(samples, seed=seed, epoch=epoch, purpose=REGION, index=region)
    return position == first + spared * side + _integers(draw, after - first - spared)


def _levels(
    hidden: torch.Tensor,
    samples: torch.Tensor,
    position: torch.Tensor,
    config: MaskConfig,
    *,
    num_levels: int,
    seed: int,
    epoch: int,
) -> torch.Tensor:
    """Bool [S, L] from hidden items bool [S]: all levels, or from a random level ≥ 1 on."""
    level = torch.arange(num_levels, device=hidden.device)
    if num_levels == 1:
        return hidden[:, None]
    partial = uniform(samples, seed=seed, epoch=epoch, purpose=PARTIAL, index=position) < config.partial
    draw = uniform(samples, seed=seed, epoch=epoch, purpose=PARTIAL_LEVEL, index=position)
    deeper = 1 + _integers(draw, torch.full_like(position, num_levels - 1))
    first = torch.where(partial, deeper, 0)
    return hidden[:, None] & (level[None, :] >= first[:, None])
