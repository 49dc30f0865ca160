"""How good the semantic IDs of a finished run are, beside published ones of the same items.

Published codes: the instruments set of QBREC_BENCH_DATA has those of its lineage (4 x 256, one ID from the
text, one from the picture); for other items there is only our column. Figures come from the functions that
write quality.json, of the IDs as encoded, before collisions are resolved. Cohesion is the mean cosine of two
items that share the first code or the first two (in brackets: with shuffled IDs), on our fused vectors and on
the embeddings of the set. Those embeddings were decoded from the published codes, which therefore cannot but
look good on them. R² needs codebooks: only ours has it. The last line is JSON.

    python benchmarks/semantic_ids.py STORAGE/runs/NAME | STORAGE/artifacts/quantizer/KEY
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbrec.quantizer.kmeans.chunks import stratified
from qbrec.quantizer.quality import PAIR_ROWS, bucket_figures, cohesion, level_usage
from qbrec.quantizer.quantizer import Quantizer
from qbrec.quantizer.vectors import take_fused
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.blocks import BlockSet
from qbrec.storage.catalog_view import CatalogView

PUBLISHED = {"text": 256, "image": 256}  # column prefix: codes per level
SEED = 0
Figures = dict[str, Any]
Spaces = dict[str, np.ndarray]  # name -> float32 [n, D], centred


def open_run(place: Path) -> dict[str, Artifact]:
    """Quantizer, fusion and catalogue of a run directory or of a quantizer artifact."""
    if (place / "run.json").is_file():
        stages = json.loads((place / "run.json").read_text())["stages"]
        if "quantizer" not in stages:
            sys.exit(f"{place} has no finished quantizer: run `qbrec quantize` first")
        place = Path(stages["quantizer"]["path"])
    if not (place / "manifest.json").is_file():
        sys.exit(f"{place} is neither a run directory nor a finished artifact")
    home = place.resolve().parent.parent  # <storage>/artifacts
    store = ArtifactStore(home.parent)
    quantizer = store.open(place.resolve())
    found = {"quantizer": quantizer}
    for kind in ("catalog", "fusion"):
        wanted = quantizer.manifest["inputs"][kind]
        for folder in (home / kind).glob("*/manifest.json"):
            artifact = store.open(folder.parent)
            if artifact.fingerprint == wanted:
                found[kind] = artifact
        if kind not in found:
            sys.exit(f"the {kind} artifact {wanted[:16]} of this quantizer is not in {home}")
    return found


def figures(
    codes: np.ndarray, sizes: tuple[int, ...], *, catalog: CatalogView, rows: np.ndarray, spaces: Spaces
) -> Figures:
    """Everything that can be said of a table of IDs [N, L] without its codebooks; `spaces` are of `rows`."""
    live = np.flatnonzero(~np.asarray(catalog.retired))
    first = level_usage(codes[:, :1], sizes[:1])[0]
    buckets = bucket_figures(codes[live], sizes, group=np.asarray(catalog.duplicate_group)[live])
    return {
        "codes": first["codes"],
        "used": first["used"],
        "dead": first["dead"],
        "perplexity": first["perplexity"],
        "largest_share": first["largest_share"],
        "sharing": 1 - buckets["no_collision_rate"],
        "colliding": buckets["collision_rate"],
        "duplicates": buckets["duplicate_rate"],
        "fullest": buckets["largest_bucket_contents"],
        "cohesion": {
            space: cohesion(vectors, codes[rows], sizes, seed=SEED) for space, vectors in spaces.items()
        },
    }


def published(items: Path, catalog: CatalogView) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (codes [N, L], embeddings float32 [N, D]); empty if the catalogue has other items."""
    import pyarrow.parquet as pq

    table = pq.read_table(items)
    place = {item: row for row, item in enumerate(table["item_id"].to_pylist())}
    ids = catalog.item_ids(np.arange(catalog.num_items))
    if not all(item in place for item in ids):
        return {}
    rows = np.array([place[item] for item in ids])

    def matrix(column: str) -> np.ndarray:
        return np.stack(table[column].to_numpy(zero_copy_only=False))[rows]

    return {
        name: (matrix(f"{name}_tokens"), matrix(f"{name}_embedding").astype(np.float32)) for name in PUBLISHED
    }


def show(table: dict[str, Figures]) -> None:
    """One column per set of IDs."""

    def near(entry: Figures, space: str, depth: int) -> str:
        found = entry["cohesion"][space]
        return (
            f"{found[depth]['cohesion']:.3f} ({found[depth]['shuffled']:+.3f})" if depth < len(found) else "–"
        )

    lines: dict[str, Callable[..., str]] = {
        "level 0: perplexity": lambda e: f"{e['perplexity']:.1f}",
        "level 0: used / dead": lambda e: f"{e['used']} / {e['dead']}",
        "level 0: largest code": lambda e: f"{e['largest_share']:.2%}",
        "share an ID, unresolved": lambda e: f"{e['sharing']:.2%}",
        "  with other content": lambda e: f"{e['colliding']:.2%}",
        "  items with a duplicate": lambda e: f"{e['duplicates']:.2%}",
        "contents on fullest ID": lambda e: f"{e['fullest']}",
        "R² held out, by level": lambda e: " ".join(f"{r:.3f}" for r in e.get("r2_held_out", ())) or "–",
    }
    for space in next(iter(table.values()))["cohesion"]:
        for depth in (0, 1):
            label = f"cohesion {depth + 1}, {space}"
            lines[label] = lambda e, space=space, depth=depth: near(e, space, depth)
    widths = {name: max(24, *(len(of(entry)) for of in lines.values())) for name, entry in table.items()}
    print(" " * 26 + "".join(f"{name:>{width + 2}}" for name, width in widths.items()))
    for label, of in lines.items():
        print(f"{label:<26}" + "".join(f"{of(entry):>{widths[name] + 2}}" for name, entry in table.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("place", type=Path, help="run directory or quantizer artifact")
    options = parser.parse_args()
    run = open_run(options.place)
    catalog, quantizer = CatalogView(run["catalog"]), Quantizer.load(run["quantizer"])
    codes = np.asarray(run["quantizer"].load_npy("raw_codes.npy"))
    quality = run["quantizer"].load_json("quality.json")
    rows = stratified(len(codes), PAIR_ROWS, seed=SEED)
    fused = take_fused(BlockSet.open(run["fusion"], "fused"), rows, torch.device("cpu"))
    items = Path(os.environ.get("QBREC_BENCH_DATA", "/nowhere")) / "instruments" / "items.parquet"
    theirs = published(items, catalog) if items.is_file() else {}
    spaces = {"fused": quantizer.latents(fused).numpy()}
    spaces |= {name: embeddings[rows] - embeddings.mean(0) for name, (_, embeddings) in theirs.items()}
    table = {"qbrec": figures(codes, quantizer.sizes, catalog=catalog, rows=rows, spaces=spaces)}
    table["qbrec"]["r2_held_out"] = [level["r2_held_out"] for level in quality["levels"]]
    for name, (tokens, _) in theirs.items():
        sizes = (PUBLISHED[name],) * tokens.shape[1]
        table[f"published, {name}"] = figures(tokens, sizes, catalog=catalog, rows=rows, spaces=spaces)
    print(f"{len(codes):,} items, levels {' x '.join(map(str, quantizer.sizes))}, as encoded")
    show(table)
    print(json.dumps({"num_items": len(codes), "levels": list(quantizer.sizes), "ids": table}))


if __name__ == "__main__":
    main()
