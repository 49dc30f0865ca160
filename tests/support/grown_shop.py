"""A small catalogue that is trained on and then grows, written without Ray: real artifacts of every kind."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qbrec.config import RootConfig, parse_config
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.fusion import append as fusion_append
from qbrec.fusion import stage as fusion_stage
from qbrec.neighbours import append as neighbours_append
from qbrec.neighbours import stage as neighbours_stage
from qbrec.quantizer import stage as quantizer_stage
from qbrec.quantizer.append import run as quantizer_append
from qbrec.ranking.bonus import Bonus
from qbrec.ranking.graphs import ItemGraphs
from qbrec.sequence.bonus import save_bonus
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.recommender import save_encoder
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.stages import STAGES
from qbrec.storage.artifact import Artifact, ArtifactStore, ArtifactWriter
from qbrec.storage.blocks import BlockTarWriter, write_block_index
from qbrec.storage.generations import GenerationsView
from qbrec.storage.hashing import hash64
from qbrec.storage.id_table import ALIKE_KIND, FUSED_KIND, IdTable, numbered
from qbrec.storage.id_table import KIND as IDS_KIND
from qbrec.storage.token_table import token_table
from tests.support.sequence_inputs import write_histories

DIM = 12
BLOCK = 40
CENTRES = np.random.default_rng(5).standard_normal((12, DIM)) * 2
TRAIN = {"epochs": 2, "batch_size": 64, "micro_batch": 32, "learning_rate": 5e-3}


@dataclass(frozen=True, eq=False)
class Item:
    """One item: its id, its text vector float16 [DIM] (None: none), its domain, its brand's bucket."""

    name: str
    vector: np.ndarray | None
    domain: str = "shop"
    bucket: int = 3

    @property
    def content(self) -> int:
        shown = b"" if self.vector is None else self.vector.tobytes()
        digest = hashlib.blake2b(shown + bytes([self.bucket]), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def draw(count: int, prefix: str, *, seed: int, domain: str = "shop", far: float = 0.0) -> list[Item]:
    """Items around the centres; `far` moves them away from all that the catalogue has."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, len(CENTRES), count)
    away = np.random.default_rng(99).standard_normal((count, DIM)) * far
    vectors = (CENTRES[kind] + 0.4 * rng.standard_normal((count, DIM)) + away).astype(np.float16)
    return [Item(f"{prefix}{n}", vectors[n], domain, int(kind[n])) for n in range(count)]


def configuration(root: Path, **quantizer: Any) -> RootConfig:
    domains = {name: {"items": "-", "interactions": "-"} for name in ("shop", "books")}
    fusion = {"width": 16, "depth": 2, "heads": 2, "group": 32, "behaviour_dim": 0, "train": TRAIN}
    small = {"levels": [8, 8, 8], "iterations": 5, "refine_epochs": 1, "collisions": "none"}
    return parse_config(
        {
            "run": {"name": "grown", "storage": str(root)},
            "data": {"domains": domains},
            "fusion": fusion,
            "quantizer": small | {"quality": {"max_collision_rate": 1.0}} | quantizer,
            "sequence": {"width": 16, "layers": 1, "heads": 2, "max_items": 8},
        }
    )


def context(root: Path, kind: str, name: str) -> StageContext:
    return StageContext.local(ArtifactStore(root), root / "run", stage=kind, key=_key(kind, name), seed=3)


def write_catalog(
    root: Path,
    items: Sequence[Item],
    *,
    collapsed: Sequence[str] = (),
    num_users: int = 60,
    tested: bool = False,
) -> Artifact:
    """A catalogue of the domains shop and books; popularity falls with the row.

    Its users walk about at random: to train on only, or `tested` on the last item of all longer walks.
    """
    items = by_hash(items)
    writer = ArtifactStore(root).writer("catalog", _key("catalog", "base"))
    writer.prepare()
    _items(writer, "items", items, np.arange(len(items)))
    domains = ["shop", "books"]
    _identity(writer, items, domains)
    writer.save_npy("train_counts.npy", np.arange(len(items))[::-1] // 3)
    contents = np.array([item.content for item in items])
    _, first, of = np.unique(contents, return_index=True, return_inverse=True)
    writer.save_npy("duplicates.npy", first[of])
    writer.save_npy("near_duplicates.npy", first[of])
    rng = np.random.default_rng(11)
    walks = [rng.integers(0, len(items), rng.integers(2, 9)) for _ in range(num_users)]
    ends = np.array([[len(walk), len(walk)] for walk in walks], np.int32)
    if tested:
        ends[ends[:, 0] > 2] -= [2, 1]
    write_histories(writer.path, walks, domains=np.zeros(len(walks), np.uint8), cut=ends)
    writer.save_npy("retired.npy", np.array([item.name in collapsed for item in items]))
    vectors = np.stack([item.vector for item in items if item.vector is not None]).astype(np.float32)
    writer.save_safetensors(
        "statistics.safetensors",
        {"mean.text": torch.from_numpy(vectors.mean(0)), "std.text": torch.from_numpy(vectors.std(0))},
    )
    meta = {
        "num_items": len(items),
        "num_users": 0,
        "num_interactions": 0,
        "domains": domains,
        "target_domain": "shop",
        "modalities": {"text": {"dim": DIM, "present": len(vectors), "max_tokens": 2}},
        "structure_buckets": 64,
    }
    return writer.commit(meta=meta, inputs={}, config={}, seed=0)


def train(root: Path, catalog: Artifact, config: RootConfig, name: str = "a") -> dict[str, Artifact]:
    """Fusion and quantizer of the catalogue, and an encoder that has learnt nothing."""
    found = {"catalog": catalog}
    fusion = ArtifactStore(root).find("fusion", _key("fusion", "a"))
    with process_group(config):
        found["fusion"] = fusion or fusion_stage.run(context(root, "fusion", "a"), config, found)
        found["quantizer"] = quantizer_stage.run(context(root, "quantizer", name), config, found)
    found["finetune"] = _untrained(context(root, "finetune", name), config, found)
    return found


def with_bonus(root: Path, found: Mapping[str, Artifact], config: RootConfig) -> dict[str, Artifact]:
    """The same models beside item graphs, each path of which has a weight."""
    found = {name: found[name] for name in ("catalog", "fusion", "quantizer")}
    ctx = context(root, "neighbours", found["quantizer"].key)
    ctx.recipe = STAGES["neighbours"].recipe(config)
    found["neighbours"] = neighbours_stage.run(ctx, config, found)
    graphs = ItemGraphs.load(found["neighbours"])
    bonus = Bonus(graphs, tuple(1.0 + n / 10 for n in range(len(graphs.names))))
    ctx = context(root, "finetune", found["neighbours"].key)
    return {**found, "finetune": _untrained(ctx, config, found, bonus)}


def _untrained(
    ctx: StageContext, config: RootConfig, found: Mapping[str, Artifact], bonus: Bonus | None = None
) -> Artifact:
    torch.manual_seed(0)
    writer = ctx.writer()
    levels = token_table(found["quantizer"]).sizes
    save_encoder(writer, SequenceEncoder(config.sequence, Vocabulary(levels, ("shop", "books"))))
    if bonus is not None:
        save_bonus(writer, bonus, {})
    return ctx.commit(writer, meta={}, inputs=found)


def append(
    root: Path,
    view: GenerationsView,
    items: Sequence[Item] = (),
    *,
    retire: Sequence[str] = (),
    restore: Sequence[str] = (),
) -> GenerationsView:
    """One more generation: known ids are changed items, others new; those retired and restored are shop's."""
    domains = [*view.domains, *sorted({item.domain for item in items} - set(view.domains))]
    known = {item: _row(view, item) for item in items}
    new = by_hash([item for item in items if known[item] < 0])
    changed = sorted((item for item in items if known[item] >= 0), key=lambda item: known[item])
    store = ArtifactStore(root)
    shown = [(item.name, item.domain, item.content) for item in items]
    made_of = repr((view.inputs, shown, list(retire), list(restore)))
    writer = store.writer("generation", _key("generation", made_of))
    writer.prepare()
    if new:
        _items(writer, "items", new, view.num_items + np.arange(len(new)))
        _identity(writer, new, domains)
    if changed:
        rows = np.array([known[item] for item in changed])
        _items(writer, "changed", changed, rows)
        writer.save_npy("changed.npy", rows)
    for name, ids in (("retired", retire), ("restored", restore)):
        if ids:
            writer.save_npy(f"{name}.npy", np.sort(view.lookup(list(ids), "shop")))
    meta = {"first_row": view.num_items, "num_added": len(new), "domains": domains}
    artifact = writer.commit(meta=meta, inputs=view.inputs, config={}, seed=0)
    return GenerationsView(view.base.artifact, [*(g.artifact for g in view.generations), artifact])


def learn(
    root: Path, view: GenerationsView, found: Mapping[str, Artifact], config: RootConfig
) -> dict[str, Artifact]:
    """The run's artifacts with its generations, as `append_run.with_generations` names them, all with IDs."""
    out = dict(found)
    inputs = {"catalog": found["catalog"]}
    for number, generation in enumerate(view.generations, 1):
        inputs[f"generation-{number}"] = out[f"generation-{number}"] = generation.artifact
        ids = {f"ids-{n}": artifact for n, artifact in enumerate(numbered(out, "ids"), 1)}
        if f"ids-{number}" in out:
            continue
        name = generation.artifact.path.name + found["finetune"].key
        ctx = context(root, FUSED_KIND, name)
        fused = fusion_append.run(ctx, config, {**inputs, "fusion": found["fusion"]})
        out[f"fused-{number}"] = fused
        ctx = context(root, IDS_KIND, name)
        wanted = {**inputs, "quantizer": found["quantizer"], "fused": fused, **ids}
        out[f"ids-{number}"] = made = quantizer_append.run(ctx, config, wanted)
        if "neighbours" in found:
            models = {name: found[name] for name in ("fusion", "quantizer", "neighbours")}
            ctx = context(root, ALIKE_KIND, name)
            out[f"alike-{number}"] = neighbours_append.run(
                ctx, config, {**inputs, **models, "fused": fused, "ids": made}
            )
    return out


def id_table(artifacts: Mapping[str, Artifact]) -> IdTable:
    return IdTable(artifacts["quantizer"], numbered(artifacts, "ids"))


def by_hash(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: int(hash64(item.domain, [item.name])[0]))


def _row(view: GenerationsView, item: Item) -> int:
    return int(view.lookup([item.name], item.domain)[0]) if item.domain in view.domains else -1


def _key(kind: str, name: str) -> str:
    return hashlib.sha256(f"{kind} {name}".encode()).hexdigest()


def _identity(writer: ArtifactWriter, items: Sequence[Item], domains: Sequence[str]) -> None:
    writer.save_npy(
        "hashes.npy", np.array([hash64(item.domain, [item.name])[0] for item in items], np.uint64)
    )
    numbers = np.array([domains.index(item.domain) for item in items], np.uint8)
    writer.save_npy("item_domain.npy", numbers)


def _items(writer: ArtifactWriter, prefix: str, items: Sequence[Item], rows: np.ndarray) -> None:
    tar = BlockTarWriter(writer.path, prefix=prefix)
    for begin in range(0, len(items), BLOCK):
        part = items[begin : begin + BLOCK]
        tokens = [item.vector for item in part if item.vector is not None]
        fields = {
            "row": rows[begin : begin + BLOCK].astype(np.int64),
            "domain": np.zeros(len(part), np.uint8),
            "structure": np.array([[item.bucket, -1] for item in part], np.int32),
            "content": np.array([item.content for item in part], np.int64),
            "tokens.text": np.array([item.vector is not None for item in part], np.uint8),
            "feature.text": np.array(tokens, np.float16).reshape(-1, DIM),
        }
        tar.add(fields, len(part))
    write_block_index(writer.path / f"blocks.{prefix}.npy", [tar.close()])
    table = {
        "row": pa.array(rows),
        "domain": pa.array([item.domain for item in items]),
        "item_id": pa.array([item.name for item in items]),
        "title": pa.array([f"{item.name} of kind {item.bucket}" for item in items]),
        "brand": pa.nulls(len(items), pa.string()),
        "categories": pa.array([["all", f"kind {item.bucket}"] for item in items]),
    }
    writer.write_table(f"{prefix}.arrow", pa.table(table))
