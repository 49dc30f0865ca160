"""fp16 on CPUs: torch computes it everywhere, DeepSpeed asks for special instructions first."""

from __future__ import annotations


def allow_half() -> None:
    """Let DeepSpeed train in fp16 on this CPU, slowly."""
    from qbrec.engine.ds_engine import import_deepspeed

    import_deepspeed("cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
