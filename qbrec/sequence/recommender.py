"""The trained encoder as a `CodeScorer` and `PrefixScorer`: log-probabilities of the next item's codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from qbrec.config.stages import SequenceConfig
from qbrec.engine.weights import load_weights, save_weights
from qbrec.errors import DataError
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.item_codes import codes_read
from qbrec.sequence.packing import HiddenCodes, PackedHistories, pack
from qbrec.sequence.tasks import id_table
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.ragged import Ragged

# Histories of one forward. They are sorted by length first, so a forward holds histories of like length.
_CHUNK = 512

WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"


class SequenceRecommender:
    """Encoder and ID table: histories of item rows in, code log-probabilities out.

    Args:
        module: The encoder; it is used as it is, in evaluation mode.
        semantic_ids: Codes of all items, any integer type [N, L].
        device: Where `module` lives.

    Attributes:
        semantic_ids: What the encoder reads of every item; item codes, if it knows any, are the last level.
    """

    name = "qbrec"

    def __init__(
        self, module: SequenceEncoder, *, semantic_ids: NDArray[Any], device: torch.device | str = "cpu"
    ) -> None:
        if semantic_ids.shape[1] != module.vocabulary.num_levels:
            raise DataError(
                f"the encoder knows {module.vocabulary.num_levels} levels, the semantic IDs have "
                f"{semantic_ids.shape[1]}",
                fix="load both from the same run",
            )
        self.module, self.semantic_ids, self.device = module, semantic_ids, torch.device(device)
        self._table = id_table(semantic_ids).to(self.device)

    @classmethod
    def load(
        cls, artifact: Artifact, *, semantic_ids: NDArray[Any], device: torch.device | str = "cpu"
    ) -> SequenceRecommender:
        """From a `pretrain` or `finetune` artifact.

        Args:
            artifact: Weights, description, and who has an item code.
            semantic_ids: Codes of all items, any integer type [N, L], without item codes.
            device: Where the encoder shall run.

        Raises:
            DataError: The artifact is damaged, or its levels are not those of `semantic_ids`.
        """
        codes = codes_read(artifact, semantic_ids)
        return cls(load_encoder(artifact).to(device).eval(), semantic_ids=codes, device=device)

    @torch.no_grad()
    def code_log_probs(self, histories: Ragged, domain: NDArray[Any] | int) -> torch.Tensor:
        """One forward over each history followed by L masks.

        Unknown rows (negative, or beyond the ID table) are left out, then the last H items are read. An empty
        history is allowed: the domain token alone then speaks.

        Args:
            histories: B rows of item rows, most recent last.
            domain: Domain index of each history, [B], or one for all.

        Returns:
            float32 [B, L, max K_l] log-probabilities; -inf beyond a level's own codes.
        """
        vocabulary = self.module.vocabulary
        self.module.eval()
        known = self._known(histories).last(self.module.config.max_items)
        domains = np.broadcast_to(np.asarray(domain, dtype=np.int64), (len(known),))
        widest = max(vocabulary.levels)
        out = torch.full((len(known), vocabulary.num_levels, widest), -torch.inf, device=self.device)
        order = np.argsort(known.lengths, kind="stable")
        for begin in range(0, len(order), _CHUNK):
            chosen = order[begin : begin + _CHUNK]
            out[torch.from_numpy(chosen).to(self.device)] = self._forward(
                known.take(chosen), np.ascontiguousarray(domains[chosen])
            )
        return out

    @torch.no_grad()
    def next_code_log_probs(
        self, histories: Ragged, domain: NDArray[Any] | int, prefixes: NDArray[np.int64]
    ) -> torch.Tensor:
        """One forward over each history followed by an item whose first l codes are known, the others masks.

        Args:
            histories: B rows of item rows, most recent last; read as by `code_log_probs`.
            domain: Domain index of each history, [B], or one for all.
            prefixes: First l < L codes of P possible next items of each history, int64 [B, P, l].

        Returns:
            float32 [B, P, K_l] log-probabilities of code l; for l = 0 those of `code_log_probs`.
        """
        vocabulary = self.module.vocabulary
        self.module.eval()
        batch, beams, level = prefixes.shape
        assert batch == len(histories)
        assert level < vocabulary.num_levels
        known = self._known(histories).last(self.module.config.max_items)
        domains = np.broadcast_to(np.asarray(domain, dtype=np.int64), (batch,))
        out = torch.empty(batch * beams, vocabulary.levels[level], device=self.device)
        order = np.argsort(known.lengths, kind="stable")
        asked = (order[:, None] * beams + np.arange(beams)).ravel()  # pairs of history and prefix
        for begin in range(0, len(asked), _CHUNK):
            pairs = asked[begin : begin + _CHUNK]
            chosen = pairs // beams
            batched, last = self._batch(known.take(chosen), np.ascontiguousarray(domains[chosen]))
            place, mask = batched.codes.clone(), torch.zeros_like(batched.codes, dtype=torch.bool)
            known_codes = torch.from_numpy(prefixes.reshape(batch * beams, level)[pairs])
            place[last, :level] = known_codes.to(self.device)
            mask[last, level:] = True
            nowhere = last[:0]
            items = tuple(last if other == level else nowhere for other in range(vocabulary.num_levels))
            scores = self.module(replace(batched, codes=place), HiddenCodes(mask, items))[level]
            out[torch.from_numpy(pairs).to(self.device)] = scores.log_softmax(-1)
        return out.view(batch, beams, -1)

    def _known(self, histories: Ragged) -> Ragged:
        """The histories without rows that have no semantic ID."""
        return histories.where((histories.values >= 0) & (histories.values < len(self._table)))

    def _forward(self, histories: Ragged, domains: NDArray[np.int64]) -> torch.Tensor:
        """float32 [B, L, max K_l] of histories sorted by length, at most H long."""
        batch, last = self._batch(histories, domains)
        mask = torch.zeros_like(batch.codes, dtype=torch.bool)
        mask[last] = True
        hidden = HiddenCodes(mask, (last,) * self.module.vocabulary.num_levels)
        widest = max(self.module.vocabulary.levels)
        levels = [
            functional.pad(scores.log_softmax(-1), (0, widest - scores.shape[-1]), value=-torch.inf)
            for scores in self.module(batch, hidden)
        ]
        return torch.stack(levels, 1)

    def _batch(self, histories: Ragged, domains: NDArray[np.int64]) -> tuple[PackedHistories, torch.Tensor]:
        """Histories sorted by length, each with one more item, and the places int64 [B] of those items."""
        # The item to predict: its codes are hidden or replaced, so any row does.
        asked = histories.followed_by(0)
        packed, order = pack(asked, domains=domains, samples=np.arange(len(asked)))
        assert (order[1:] > order[:-1]).all(), "histories come sorted"
        batch = packed.to(self.device, self._table)
        return batch, torch.cumsum(batch.lengths, 0) - 1


def save_encoder(writer: ArtifactWriter, module: SequenceEncoder) -> None:
    """Write weights and description of an encoder into an artifact."""
    save_weights(writer, WEIGHTS, module)
    writer.save_json(
        DESCRIPTION,
        {
            "sequence": module.config.model_dump(mode="json"),
            "levels": list(module.vocabulary.levels),
            "domains": list(module.vocabulary.domains),
        },
    )


def load_encoder(artifact: Artifact) -> SequenceEncoder:
    """The encoder of a `pretrain` or `finetune` artifact, on the CPU.

    Raises:
        DataError: A file is damaged, or its weights do not fit its own description.
    """
    description = artifact.load_json(DESCRIPTION)
    # JSON has no tuples; strict models accept lists for them only when told that it is JSON.
    config = SequenceConfig.model_validate_json(_dump(description["sequence"]))
    vocabulary = Vocabulary(tuple(description["levels"]), tuple(description["domains"]))
    module = SequenceEncoder(config, vocabulary)
    load_weights(artifact, WEIGHTS, module)
    return module


def _dump(document: Any) -> str:
    import json

    return json.dumps(document)
