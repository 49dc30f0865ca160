"""Page-locked copies of micro-batches: what a device can fetch while it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

Batch = TypeVar("Batch")


def pinned(batch: Batch) -> Batch:
    """The same batch with every tensor copied to page-locked memory; needs CUDA.

    Args:
        batch: A tensor, or dataclasses, mappings, lists and tuples of tensors and of anything else, which is
            passed through.
    """
    return cast(Batch, _pinned(batch))


def _pinned(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _pinned(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {name: _pinned(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_pinned, value))
    return value
