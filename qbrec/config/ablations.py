"""Variants of a run that leave one part of the model out.

Each is the same configuration with a few keys changed, so stages that a change does not touch are shared.
"""

from __future__ import annotations

FULL = "full"

# By name: what it shows, and the keys it changes.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    FULL: ("the configuration as it is", ()),
    "no-pretraining": ("fine-tuning from scratch, as long as both", ("sequence.pretraining=false",)),
    "no-span": ("pretraining without span masks", ("sequence.masks.span=0",)),
    "no-tail": ("pretraining without tail masks", ("sequence.masks.tail=0",)),
    "no-multi-region": ("pretraining without multi-region masks", ("sequence.masks.multi_region=0",)),
    "no-gate": ("every item takes all fusion blocks", ("fusion.gate=false",)),
    "no-behaviour": ("content alone is fused, no co-occurrence", ("fusion.behaviour_dim=0",)),
    "text-only": ("text alone is fused", ("fusion.modalities=[text]",)),
    "random-ids": (
        "the same IDs, dealt to the items at random",
        # IDs without meaning are what is asked for: the gate against them must let them pass.
        (
            "quantizer.shuffled=true",
            "quantizer.quality.min_cohesion_gain=0",
            "quantizer.quality.max_collision_rate=1",
            "quantizer.quality.max_largest_bucket=0",
        ),
    ),
}
