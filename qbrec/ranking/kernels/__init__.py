"""Searches over the trie, compiled by numba where it is installed and the catalogue is large enough."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType

NATIVE_ITEMS = 20_000  # from here on compiled loops are worth being loaded (a third of a second)


def native_kernels(num_items: int) -> ModuleType | None:
    """The compiled kernels; None without numba, or where a few items alone are not worth loading it."""
    loaded = sys.modules.get(f"{__name__}.native")
    if loaded is not None or num_items < NATIVE_ITEMS or not _has_numba():
        return loaded
    from qbrec.ranking.kernels import native

    return native


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None
