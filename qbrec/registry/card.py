"""The model card: what a person should know before this version serves anybody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbrec.config import RootConfig
from qbrec.registry.bundle import COLDSTART, COLDSTART_FILE
from qbrec.registry.metrics import cells_of, metric_names, qbrec_cells
from qbrec.storage.artifact import Artifact
from qbrec.storage.generations import GenerationsView
from qbrec.storage.id_table import GENERATION, IDS, numbered


def model_card(config: RootConfig, artifacts: Mapping[str, Artifact]) -> str:
    """Markdown: purpose, data, model, measured quality, limits, provenance."""
    catalog, quantizer = artifacts["catalog"], artifacts["quantizer"]
    meta = catalog.meta
    levels = " × ".join(str(k) for k in quantizer.meta["levels"])
    lines = [
        f"# {config.registry.model_name}: run {config.run.name}",
        "",
        "Ranks the whole catalogue of one domain for a history of item ids. A masked encoder over semantic "
        "IDs (Q-BERT4Rec, arXiv 2512.02474) gives the probability of every code; an item's score is the sum "
        "of the log-probabilities of its codes.",
        "",
        "## Data",
        "",
        f"- target domain `{meta['target_domain']}` of {', '.join(f'`{d}`' for d in meta['domains'])}",
        f"- {meta['num_items']:,} items, {meta['num_users']:,} users",
        f"- {meta['num_interactions']:,} interactions",
        *_generations(artifacts),
        f"- modalities: {', '.join(meta['modalities'])}",
        f"- split: {config.catalog.split}",
        "",
        "## Model",
        "",
        f"- semantic IDs: {levels} codes ({config.quantizer.method}, {config.quantizer.collisions})",
        f"- encoder: {config.sequence.layers} layers of width {config.sequence.width}, "
        f"the last {config.sequence.max_items} items of a history",
        f"- scorer: {config.ranking.scorer}, exact over the full catalogue; ties by popularity in training",
        "",
        "## Quality",
        "",
        "Full-catalogue ranking of each test user's held-out item, seen items removed; 95 % intervals.",
        "",
        *_table(artifacts["evaluation"].load_json("metrics.json")),
        "",
        *_coldstart(artifacts),
        "## Use and limits",
        "",
        "- Input: column `history`, a list of item ids of the target domain, most recent last; parameters "
        "`k` and `keep_seen`.",
        "- An unknown item id is an error. Items added after training are ranked once `qbrec append` has "
        "given them semantic IDs; the figures above were measured without them.",
        "- Past behaviour is reproduced, its biases included: popular items are favoured by the data they "
        "come from. Watch the cold and tail slices of the report.",
        "",
        "## Provenance",
        "",
        *(f"- {kind}: `{artifact.fingerprint}`" for kind, artifact in sorted(artifacts.items())),
        "",
    ]
    return "\n".join(lines)


def _generations(artifacts: Mapping[str, Artifact]) -> list[str]:
    generations = numbered(artifacts, GENERATION)
    if not generations:
        return []
    view, ids = GenerationsView(artifacts["catalog"], generations), numbered(artifacts, IDS)
    ranked = sum(one.meta["num_added"] for one in ids)
    gone = int(view.retired.sum() - view.base.retired.sum())
    drifts = [one.meta["drift"].get("drift") for one in ids]
    shown = ", ".join("–" if drift is None else f"{drift:.2f}" for drift in drifts)
    return [
        f"- appended since the training, in {len(generations)} generations: "
        f"{view.num_items - view.base.num_items:,} items, {ranked:,} of them with semantic IDs; "
        f"{gone:,} items retired",
        *([f"- drift of the generations (1: none): {shown}"] if ids else []),
    ]


def _coldstart(artifacts: Mapping[str, Artifact]) -> list[str]:
    if COLDSTART not in artifacts:
        return []
    document = artifacts[COLDSTART].load_json(COLDSTART_FILE)
    protocol = document["protocol"]
    lines = [
        f"Cold start: {protocol['num_held_out']:,} items were held out of a training like this one, then "
        f"appended; {protocol['num_users']:,} users were asked for theirs.",
        "",
    ]
    for race, among in (("catalogue", "all items"), ("held_out", "those held out")):
        cell = qbrec_cells(document[race])["ndcg@10"]
        lines.append(
            f"- NDCG@10 among {among}: {cell['mean']:.4f} ({cell['low']:.4f}–{cell['high']:.4f}); in random "
            f"order {document[race]['random']['ndcg@10']:.4f}"
        )
    return [*lines, ""]


def _table(metrics: Mapping[str, Any]) -> list[str]:
    models = cells_of(metrics["models"])
    names = metric_names(models)
    lines = [f"| model | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for model, cells in models.items():
        texts = [f"{c['mean']:.4f} ({c['low']:.4f}–{c['high']:.4f})" for c in (cells[n] for n in names)]
        lines.append(f"| {model} | {' | '.join(texts)} |")
    return lines
