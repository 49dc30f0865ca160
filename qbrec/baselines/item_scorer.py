"""A trained SASRec or BERT4Rec as a `ranking.Scorer`, and how it is kept."""

from __future__ import annotations

import json

import numpy as np
import torch

from qbrec.baselines.item_batch import ItemNumbers, pack_items
from qbrec.baselines.item_encoder import ItemEncoder
from qbrec.config.stages import Bert4RecConfig, ItemEncoderConfig
from qbrec.engine.weights import load_weights, save_weights
from qbrec.ranking.scorer import Domain
from qbrec.storage.artifact import Artifact, ArtifactWriter
from qbrec.storage.catalog_view import DomainRows
from qbrec.storage.ragged import Ragged

WEIGHTS, DESCRIPTION, ROWS = "item_encoder.safetensors", "item_encoder.json", "rows.npy"
CONFIGS: dict[str, type[ItemEncoderConfig]] = {"sasrec": ItemEncoderConfig, "bert4rec": Bert4RecConfig}


class ItemScorer:
    """Histories of item rows in, scores of the whole catalogue out.

    Args:
        name: `sasrec` or `bert4rec`.
        module: The encoder; it is used as it is, in evaluation mode.
        numbers: Of the items it knows.
        device: Where `module` lives.
    """

    def __init__(
        self, name: str, module: ItemEncoder, *, numbers: ItemNumbers, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.module, self.numbers = name, module, numbers
        self.device = torch.device(device)
        self._rows = torch.from_numpy(numbers.rows).to(self.device)

    @torch.no_grad()
    def scores(self, histories: Ragged, domain: Domain = 0) -> torch.Tensor:
        """Scores float32 [B, N]: the lowest number there is for items of other domains.

        Rows that the encoder does not know are left out of a history, then the last H are read. An empty one
        is answered by the items' biases alone.
        """
        module = self.module.eval()
        known = self.numbers.of(histories).last(module.config.max_items)
        found = module.bias.float().repeat(len(known), 1)  # [B, n]
        answered = np.flatnonzero(known.lengths > 0)
        if len(answered):
            found[torch.from_numpy(answered).to(self.device)] = self._answers(known.take(answered))
        if len(self.numbers) == self.numbers.num_rows:
            return found
        out = torch.full(
            (len(known), self.numbers.num_rows), torch.finfo(torch.float32).min, device=self.device
        )
        out[:, self._rows] = found
        return out

    def _answers(self, histories: Ragged) -> torch.Tensor:
        """float32 [B, n] of histories of item numbers, 1 to H long."""
        module = self.module
        if not module.causal:
            histories = histories.followed_by(module.num_items)
        packed, order = pack_items(histories)
        batch = packed.to(self.device)
        scores = module.scores(module.states(batch, batch.ends - 1))
        out = torch.empty_like(scores)
        out[torch.from_numpy(order).to(self.device)] = scores
        return out


def numbers_of(catalog: DomainRows, domain: str) -> ItemNumbers:
    """Numbers of a domain's items, retired ones included: histories have them.

    Raises:
        DataError: There is no such domain.
    """
    mask = catalog.domain_mask(domain)
    return ItemNumbers(np.flatnonzero(mask), len(mask))


def save_item_encoder(writer: ArtifactWriter, module: ItemEncoder, *, numbers: ItemNumbers) -> None:
    """Write weights and description of an encoder, and which items it knows, into an artifact."""
    save_weights(writer, WEIGHTS, module)
    writer.save_npy(ROWS, numbers.rows)
    writer.save_json(
        DESCRIPTION, {"config": module.config.model_dump(mode="json"), "num_rows": numbers.num_rows}
    )


def load_item_scorer(artifact: Artifact, *, device: torch.device | str = "cpu") -> ItemScorer:
    """The scorer of a `sasrec` or `bert4rec` artifact.

    Raises:
        DataError: A file is damaged, or its weights do not fit its own description.
    """
    description = artifact.load_json(DESCRIPTION)
    numbers = ItemNumbers(np.array(artifact.load_npy(ROWS)), description["num_rows"])
    # JSON has no tuples; strict models accept lists for them only when told that it is JSON.
    config = CONFIGS[artifact.kind].model_validate_json(json.dumps(description["config"]))
    module = ItemEncoder(config, num_items=len(numbers), causal=artifact.kind == "sasrec")
    load_weights(artifact, WEIGHTS, module)
    return ItemScorer(artifact.kind, module.to(device), numbers=numbers, device=device)
