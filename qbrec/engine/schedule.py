"""The learning rate of a step."""

from __future__ import annotations

import math

from qbrec.config.stages import TrainConfig


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """What learning rates are multiplied by: linear warm-up to 1, then a cosine down to `min_lr_fraction`.

    Args:
        config: Warm-up and floor.
        step: Optimiser steps taken before this one.
        total: Optimiser steps of the whole training.
    """
    warmup = max(int(config.warmup_fraction * total), 1)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    floor = config.min_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
