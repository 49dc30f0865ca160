"""Token ids of stage 3: pad, one mask, one range of ids per level, one token per domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from qbrec.errors import DataError


@dataclass(frozen=True)
class Vocabulary:
    """Maps codes of every level, and domains, to disjoint ranges of token ids.

    Layout: `pad` 0, `mask` 1, then `levels[0]` ids for level 0, `levels[1]` for level 1, …, then one id per
    domain. The same code number at two levels is two tokens (`<a_12>` is not `<b_12>`).

    Attributes:
        levels: K_l, the number of codes of each level.
        domains: Names of the domains, in the order of the catalogue's domain index.
    """

    levels: tuple[int, ...]
    domains: tuple[str, ...]

    pad = 0
    mask = 1

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 1:
            raise DataError(f"a semantic ID needs at least one level of at least one code, not {self.levels}")
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise DataError(f"domains must be named and distinct, not {self.domains}")

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.levels)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token id of each level, then the first domain token: L + 1 numbers."""
        starts = [2]
        for num_codes in self.levels:
            starts.append(starts[-1] + num_codes)
        return tuple(starts)

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self.starts[-1] + len(self.domains)

    def tokens(self, codes: torch.Tensor) -> torch.Tensor:
        """Token ids of codes.

        Args:
            codes: int64 [..., L], code of each level.

        Returns:
            int64 [..., L].
        """
        return codes + torch.tensor(self.starts[:-1], dtype=torch.int64, device=codes.device)

    def domain_tokens(self, domains: torch.Tensor) -> torch.Tensor:
        """Token ids of domain indices, int64 of any shape."""
        return domains + self.starts[-1]

    def name(self, token: int) -> str:
        """Readable form of one token id: `<pad>`, `<mask>`, `<a_12>`, `<domain:pets>`."""
        if not 0 <= token < self.size:
            raise ValueError(f"token {token} is outside 0…{self.size - 1}")
        if token < 2:
            return "<mask>" if token else "<pad>"
        if token >= self.starts[-1]:
            return f"<domain:{self.domains[token - self.starts[-1]]}>"
        level = max(index for index, start in enumerate(self.starts[:-1]) if start <= token)
        return f"<{level_letter(level)}_{token - self.starts[level]}>"


def level_letter(level: int) -> str:
    """`a` for level 0, `b` for level 1, …; beyond `z` the number itself."""
    return chr(ord("a") + level) if level < 26 else f"level{level}"


def format_semantic_id(codes: Sequence[int]) -> str:
    """`<a_12><b_7><c_251><d_3>` for the codes of one item."""
    return "".join(f"<{level_letter(level)}_{code}>" for level, code in enumerate(codes))
