"""Cold start: how well items that were never trained on are recommended once they are appended.

Layout of coldstart.json (cells as in `evaluation.results`, of mode `removed`: seen items do not compete):

    protocol    {"domain", "share", "num_held_out", "num_users", "duplicate_share", "bootstrap", "confidence"}
    catalogue   the target among all items, those of the catalogue and those appended
    held_out    the target among the appended items alone
                each {"num_candidates", "random": {metric: expectation of a random order}, "models", "paired",
                "slices", …} of `evaluation.results.summarise`; slices are `all` and `non_duplicate`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qbrec.config import RootConfig
from qbrec.engine.context import StageContext
from qbrec.errors import DataError
from qbrec.evaluation.bootstrap import CONFIDENCE
from qbrec.evaluation.held_out import HeldOut
from qbrec.evaluation.protocol import ModelRanks, TestSet, rank_model
from qbrec.evaluation.results import IDS_ALONE, MODEL, summarise
from qbrec.evaluation.slices import saw_near_duplicate
from qbrec.evaluation.table import difference, number, signed_interval, with_interval
from qbrec.neighbours.content import content_with_new, views_of_catalog
from qbrec.ranking.bonus import BonusScorer
from qbrec.ranking.cooccurrence import recency
from qbrec.ranking.graphs import CONTENT_DECAY
from qbrec.ranking.metrics import METRICS, metrics_of_ranks
from qbrec.ranking.scorer import Domain, Scorer
from qbrec.ranking.topk import tie_rank
from qbrec.ranking.validate import drawn
from qbrec.sequence.bonus import load_bonus, load_scorer
from qbrec.storage.artifact import Artifact
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import ALIKE, GENERATION, IDS, IdTable, numbered
from qbrec.storage.ragged import Ragged

KIND = "coldstart"
RESULT = "coldstart.json"
WHOLE = "whole"  # the catalogue that the items were held out of, among the inputs
UNJOINED = "qbrec_unjoined"  # the same model without the appended items' rows of the item graphs
CONTENT = "content:"
RACES = {"catalogue": "all items", "held_out": "items held out"}
SHOWN = ("hr@10", "ndcg@10", "mrr")
_NAME, _CELL = 22, 18  # widths in the table


class ContentScorer:
    """The simple rival: likeness of a candidate's content to the items of the history, summed.

    Args:
        name: Of the content view.
        vectors: float [N, D]; zeros where an item lacks the view.
        decay: Weight of an item against the one after it, of the last 20; 1: their mean.
        device: Where to compute.
    """

    def __init__(
        self,
        name: str,
        vectors: NDArray[np.floating],
        *,
        decay: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.decay = name, decay
        table = torch.from_numpy(vectors).to(device, torch.float32)
        self._unit = torch.nn.functional.normalize(table)

    def scores(self, histories: Ragged, domain: Domain) -> torch.Tensor:
        """Weighted sums of cosines, float32 [B, N]."""
        weights = recency(histories, decay=self.decay, num_items=len(self._unit))
        whole = torch.from_numpy(weights @ self._unit.cpu().numpy()).to(self._unit)
        return whole @ self._unit.T


def run(ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact]) -> Artifact:
    """Rank every user's first item held out, given what stands before it.

    Args:
        ctx: One rank; `share` of the recipe says what was held out.
        config: Of the run that was trained without these items.
        inputs: `whole`; of that run `catalog`, `fusion`, `quantizer`, `finetune`, `neighbours` where it has
            item graphs; and of the generation that brought the items back `generation-1`, `fused`, `ids-1`,
            `alike-1` where there are graphs.

    Raises:
        DataError: Nobody has an item held out with one before it, an item is missing, or an input is damaged.
    """
    share, domain = float(ctx.recipe["share"]), config.data.target_domain
    held = HeldOut.draw(inputs[WHOLE], share=share, seed=ctx.seed)
    users = held.users
    if not len(users):
        raise DataError(
            "nobody has an item held out with another one before it",
            where=str(held.catalog.path),
            fix="hold out a larger --share",
        )
    users = drawn(users, max_users=config.evaluation.max_users, seed=ctx.sub_seed("coldstart/users"))
    contexts, targets = held.tests(users)
    view = GenerationsView(inputs["catalog"], numbered(inputs, GENERATION))
    new = _rows(view, held.catalog, held.rows, domain)
    appended = np.zeros(view.num_items, bool)
    appended[new] = True
    popularity = np.zeros(view.num_items, np.int64)  # nobody was trained on an appended item
    popularity[: view.base.num_items] = view.base.train_counts
    masks = {"catalogue": view.candidates(domain), "held_out": appended}
    tests = {
        race: TestSet(
            users,
            np.full(len(users), view.domain_number(domain), np.uint8),
            Ragged(_rows(view, held.catalog, contexts.values, domain), contexts.offsets),
            new[np.searchsorted(held.rows, targets)],
            mask,
            tie_rank(popularity),
        )
        for race, mask in masks.items()
    }
    ranks: dict[str, dict[str, list[ModelRanks]]] = {race: {} for race in tests}
    for name, scorer in _models(ctx, config, inputs, view):
        for race, test in tests.items():
            with ctx.progress(len(test), f"rank {RACES[race]}: {name}") as progress:
                found = rank_model(
                    scorer,
                    test,
                    batch_users=config.evaluation.batch_users,
                    ranking=config.ranking,
                    on_batch=progress.update,
                )
            ranks[race][name] = [found]
    duplicates = saw_near_duplicate(
        contexts, targets, near_duplicate_group=np.asarray(held.catalog.near_duplicate_group)
    )
    slices = {"all": np.ones(len(users), bool), "non_duplicate": ~duplicates}
    document: dict[str, Any] = {
        "protocol": {
            "domain": domain,
            "share": share,
            "num_held_out": len(new),
            "num_users": len(users),
            "duplicate_share": float(duplicates.mean()),
            "bootstrap": config.evaluation.bootstrap,
            "confidence": CONFIDENCE,
        }
    }
    for race, mask in masks.items():
        document[race] = {"num_candidates": int(mask.sum()), "random": expected_at_random(int(mask.sum()))}
        document[race] |= summarise(
            ranks[race],
            slices,
            resamples=config.evaluation.bootstrap,
            seed=ctx.sub_seed("evaluation/bootstrap"),
        )
    writer = ctx.writer()
    writer.save_json(RESULT, document)
    return ctx.commit(writer, meta=document["protocol"], inputs=inputs)


def expected_at_random(num_candidates: int) -> dict[str, float]:
    """Expectation of every metric where each rank is as likely as any other."""
    means = metrics_of_ranks(np.arange(1, num_candidates + 1)).mean(0)
    return dict(zip(METRICS, means.tolist(), strict=True))


def _rows(
    view: GenerationsView, whole: CatalogView, rows: NDArray[np.int64], domain: str
) -> NDArray[np.int64]:
    """Rows of items of the whole catalogue in the one that they were appended to."""
    distinct, at = np.unique(rows, return_inverse=True)
    found = view.lookup(whole.item_ids(distinct), domain)
    if (found < 0).any():
        (name,) = whole.item_ids(distinct[found < 0][:1])
        raise DataError(
            f"the item {name!r} is not in the catalogue of the cold start",
            where=str(view.path),
            fix="see the rejected items there and of its generation",
        )
    return view.representatives(found)[at]


def _models(
    ctx: StageContext, config: RootConfig, inputs: Mapping[str, Artifact], view: GenerationsView
) -> Iterator[tuple[str, Scorer]]:
    """Ours as it serves, without the new rows of the item graphs, without a bonus; then the rivals."""
    tokens = IdTable(inputs["quantizer"], numbered(inputs, IDS)).tokens

    served = load_scorer(
        inputs["finetune"],
        inputs.get("neighbours"),
        appended=numbered(inputs, ALIKE),
        semantic_ids=tokens,
        chunk_items=config.ranking.chunk_items,
        device=ctx.device,
    )
    yield MODEL, served
    if isinstance(served, BonusScorer):
        unjoined = load_bonus(inputs["finetune"], inputs["neighbours"])
        assert unjoined is not None, "it is the same bonus"
        yield UNJOINED, BonusScorer(served.base, unjoined)
        yield IDS_ALONE, served.base
    for name in views_of_catalog(view.base):
        vectors = np.concatenate(content_with_new(name, view, inputs))
        for label, decay in (("mean", 1.0), ("recent", CONTENT_DECAY)):
            scorer = ContentScorer(f"{CONTENT}{name} {label}", vectors, decay=decay, device=ctx.device)
            yield scorer.name, scorer


def format_coldstart(document: Mapping[str, Any]) -> str:
    """A table for the terminal, 108 columns wide."""
    protocol = document["protocol"]
    lines = [
        f"Cold start on {protocol['domain']}: {protocol['num_held_out']:,} items held out of the training, "
        f"then appended; {protocol['num_users']:,} users"
    ]
    first, metric = (MODEL, UNJOINED, IDS_ALONE), SHOWN[1]
    for race, title in RACES.items():
        part = document[race]
        clear = part["slices"]["non_duplicate"]["models"]
        title += f": {part['num_candidates']:,}"
        cells = [name.upper().ljust(_CELL) for name in SHOWN]
        lines += ["", _line(title, cells, f"{MODEL} − it", "clear"), "─" * 108]
        for model in sorted(part["models"], key=lambda name: (name not in first, name)):
            modes = part["models"][model]
            cells = [with_interval(modes["removed"][name]).ljust(_CELL) for name in SHOWN]
            rival = part["paired"].get(model)
            gap = ""
            if rival is not None:
                cell = rival["removed"][metric]
                gap = f"{difference(cell):<7} {signed_interval(cell)}"
            lines.append(
                _line(model, cells, gap, number(clear[model]["removed"][metric]["mean"]) if clear else "")
            )
        lines.append(_line("random order", [number(part["random"][name]).ljust(_CELL) for name in SHOWN]))
    share = (
        f"{protocol['duplicate_share']:.1%} of the users have a near-duplicate of their target in the history"
    )
    last = f"{MODEL} − it: {metric.upper()}, paired by user, * the interval excludes 0"
    return "\n".join([*lines, "", last, f"clear: {metric.upper()} of the others; {share}"])


def _line(name: str, cells: Sequence[str], gap: str = "", clear: str = "") -> str:
    return f"{name:<{_NAME}}{''.join(cells)}{gap:<23}{clear}".rstrip()
