"""The dynamic cross-modal transformer of stage 1 (arXiv 2512.02474, semantic injection).

Every item starts from an ID query and reads its own modalities through a few cross-attention blocks; a gate
after each block decides whether to read on. Nothing here knows files, ranks or optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbrec.engine.mixing import hashed_normal

STRUCTURE = "structure"
BEHAVIOUR = "behaviour"
_BAG_WIDTH = 32  # of the structure table: random rows this wide already tell category paths apart
QUERY_STD = 0.02  # paper's initialisation of the ID vectors
_CONSTANT = 1e-6  # a feature that hardly varies stays as it is: a new item that has it must not explode
_GATE_BIAS = 2.0  # a fresh gate reads on (0.88), so that deep blocks see gradient before they are judged


@dataclass(frozen=True)
class ModalitySpec:
    """One source of meaning.

    Attributes:
        name: Name of the modality.
        kind: `dense` (a few feature tokens of `dim` numbers) or `bag` (mean of hashed rows of a small table).
        dim: Width of a feature token, or number of buckets.
    """

    name: str
    kind: Literal["dense", "bag"]
    dim: int


@dataclass(frozen=True)
class FusionBatch:
    """Items on the device. `M` follows the model's order of modalities.

    Attributes:
        rows: int64 [B], row of the item whose ID query is its own; -1 takes the shared query.
        features: Per dense modality float [B, T, d], zero where there is no token.
        tokens: Per dense modality bool [B, T], which tokens exist.
        buckets: int64 [B, S] of the structure modality, -1 for none; [B, 0] without that modality.
        visible: bool [B, M], modalities the fused vector may read (present and not dropped).
        present: bool [B, M], modalities that exist, and so are views of the loss.
        content: int64 [B, M], equal where the content of that modality is equal.
        own: float [B, D], the ID rows fetched for `rows` (zero where that is -1); None: no table is used.
    """

    rows: Tensor
    features: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]
    buckets: Tensor
    visible: Tensor
    present: Tensor
    content: Tensor
    own: Tensor | None = None

    def to(self, device: torch.device | str) -> FusionBatch:
        """The same batch on `device`."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            features={k: v.to(device, non_blocking=True) for k, v in self.features.items()},
            tokens={k: v.to(device, non_blocking=True) for k, v in self.tokens.items()},
            buckets=self.buckets.to(device, non_blocking=True),
            visible=self.visible.to(device, non_blocking=True),
            present=self.present.to(device, non_blocking=True),
            content=self.content.to(device, non_blocking=True),
            own=None if self.own is None else self.own.to(device, non_blocking=True),
        )


def align(query: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """Cosine-softmax pooling of feature tokens by the ID query: Σ_j softmax_j(cos(q, x_j) / τ) · x_j.

    Args:
        query: [B, D].
        tokens: [B, T, D], already projected by W_m.
        mask: bool [B, T]; an item without any token yields zeros.
        temperature: τ of the alignment.

    Returns:
        [B, D].
    """
    cosine = torch.einsum("bd,btd->bt", F.normalize(query, dim=-1), F.normalize(tokens, dim=-1))
    logits = (cosine.float() / temperature).masked_fill(~mask, torch.finfo(torch.float32).min)
    weights = torch.softmax(logits, dim=-1) * mask
    return torch.einsum("bt,btd->bd", weights.to(tokens.dtype), tokens)


class CrossBlock(nn.Module):
    """One reading step: pre-norm cross-attention of the state over the modality tokens, then feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_state, self.norm_tokens, self.norm_hidden = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, state: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
        """The change Δ [B, D] that state [B, D] takes from tokens [B, M, D] where visible (bool [B, M])."""
        size, width = state.shape
        query = self.query(self.norm_state(state)).view(size, self.heads, 1, -1)
        both = self.key_value(self.norm_tokens(tokens)).view(size, -1, 2, self.heads, width // self.heads)
        key, value = both.unbind(2)
        read = F.scaled_dot_product_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=visible[:, None, None, :]
        )
        change: Tensor = self.out(read.reshape(size, width))
        fed: Tensor = self.feed(self.norm_hidden(state + change))
        return change + fed


class FusionModel(nn.Module):
    """ID query → alignment → gated cross-attention → fused vector, and one view vector per modality.

    Args:
        modalities: What an item may bring, in the order of `M`.
        width: D.
        depth: Number of cross-attention blocks.
        heads: Attention heads.
        alignment_temperature: τ of the alignment.
        gated: Whether items choose how many blocks they take; all take all otherwise.
        hashed_rows: Whether an item's own ID query is a random vector computed from its row, none learnt.
        statistics: `mean.<m>` and `std.<m>` float32 [d_m] of the dense modalities; frozen.
    """

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        *,
        width: int,
        depth: int,
        heads: int,
        alignment_temperature: float,
        gated: bool = True,
        hashed_rows: bool = False,
        statistics: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.width, self.depth, self.temperature = width, depth, alignment_temperature
        self.shared_query = nn.Embedding(1, width)
        nn.init.normal_(self.shared_query.weight, std=QUERY_STD)
        self.hashed_rows = hashed_rows
        # By number, not by name: names come from the user's columns and need not be Python attributes.
        self.project = nn.ModuleList()
        for index, spec in enumerate(self.modalities):
            self.project.append(nn.Linear(_BAG_WIDTH if spec.kind == "bag" else spec.dim, width, bias=False))
            if spec.kind == "bag":
                self.buckets = nn.Embedding(spec.dim, _BAG_WIDTH)
            else:
                mean, std = (statistics[f"{part}.{spec.name}"].float() for part in ("mean", "std"))
                std = torch.where(std > _CONSTANT, std, torch.ones_like(std))
                self.register_buffer(f"mean_{index}", mean)
                self.register_buffer(f"std_{index}", std)
        # One embedding per modality tells the blocks which token is which; the last one is the null token
        # that is always visible, so an item without any content still has something to read.
        self.kinds = nn.Embedding(len(self.modalities) + 1, width)
        nn.init.normal_(self.kinds.weight, std=QUERY_STD)
        self.blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        self.gates = nn.ModuleList(_gate(width) for _ in range(depth - 1 if gated else 0))

    def forward(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass with the soft gate: h ← h + (Π_{k<l} g^(k)) · Δ^(l).

        Returns:
            fused [B, D], rows of unit root mean square; views [M, B, D], zero where absent; the products of
            gates [B, depth] that weighted each block.
        """
        state, tokens, visible, views = self._read(batch)
        weight = torch.ones_like(state[:, 0])
        weights = []
        for level, block in enumerate(self.blocks):
            if level and self.gates:
                weight = weight * self._gate(level - 1, state)
            weights.append(weight)
            state = state + weight[:, None] * block(state, tokens, visible)
        return unit_rms(state), views, torch.stack(weights, dim=1)

    @torch.no_grad()
    def embed(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Inference with the hard gate: an item leaves as soon as its product of gates falls below ½.

        The blocks an item does take weigh as they did in training, and blocks nobody takes are not computed.

        Returns:
            fused float32 [B, D], depth uint8 [B] (blocks taken), views [M, B, D].
        """
        state, tokens, visible, views = self._read(batch)
        weight = torch.ones_like(state[:, 0])
        depth = torch.zeros(len(state), dtype=torch.uint8, device=state.device)
        active = torch.arange(len(state), device=state.device)
        for level, block in enumerate(self.blocks):
            if level and self.gates:
                weight = weight * self._gate(level - 1, state[active])
                going = weight >= 0.5
                active, weight = active[going], weight[going]
            if not len(active):
                break
            change = weight[:, None] * block(state[active], tokens[active], visible[active])
            state = state.index_add(0, active, change)
            depth[active] += 1
        return unit_rms(state).float(), depth, views

    def _gate(self, level: int, state: Tensor) -> Tensor:
        return torch.sigmoid(self.gates[level](state)).squeeze(-1)

    def _read(self, batch: FusionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query: Tensor = self.shared_query(torch.zeros_like(batch.rows))
        own = hashed_normal(batch.rows, self.width) * QUERY_STD if self.hashed_rows else batch.own
        if own is not None:
            query = torch.where(batch.rows[:, None] >= 0, own.to(query.dtype), query)
        kinds = self.kinds(torch.arange(len(self.modalities) + 1, device=query.device))
        tokens, views = [], []
        for index, spec in enumerate(self.modalities):
            if spec.kind == "bag":
                aligned = view = self.project[index](self._bag(batch.buckets))
            else:
                mask = batch.tokens[spec.name]
                mean, std = getattr(self, f"mean_{index}"), getattr(self, f"std_{index}")
                standard = (batch.features[spec.name].to(mean.dtype) - mean) / std
                projected = self.project[index]((standard * mask[..., None]).to(query.dtype))
                aligned = align(query, projected, mask, temperature=self.temperature)
                # The view must not depend on the query, or it could carry the item's identity into the loss.
                view = projected.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(projected.dtype)
            tokens.append(aligned + kinds[index])
            views.append(view * batch.present[:, index, None])
        null = kinds[-1].expand_as(query)
        always = torch.ones_like(batch.visible[:, :1])
        visible = torch.cat([batch.visible, always], dim=1)
        return query, torch.stack([*tokens, null], dim=1), visible, torch.stack(views)

    def _bag(self, buckets: Tensor) -> Tensor:
        used = (buckets >= 0)[..., None]
        embedded: Tensor = self.buckets(buckets.clamp(min=0)) * used
        return embedded.sum(1) / used.sum(1).clamp(min=1).to(embedded.dtype)


def _gate(width: int) -> nn.Sequential:
    last = nn.Linear(width // 4, 1)
    nn.init.constant_(last.bias, _GATE_BIAS)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU(), last)


def unit_rms(state: Tensor) -> Tensor:
    """Rows scaled to length √D: the loss compares angles, and the quantizer's distances agree with them."""
    return F.normalize(state, dim=-1) * math.sqrt(state.shape[-1])
