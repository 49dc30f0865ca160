"""The final table on the terminal: qbrec beside its rivals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbrec.evaluation.results import IDS_ALONE, MODEL, MODES

SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")
NAME_WIDTH, CELL_WIDTH = 16, 18


def format_table(metrics: Mapping[str, Any]) -> str:
    """Metrics with 95 % intervals and paired differences, at most 108 columns wide.

    Args:
        metrics: The document `metrics.json` of an evaluation artifact (layout: `evaluation.results`).
    """
    protocol = metrics["protocol"]
    lines = [
        f"Full-catalogue ranking on {protocol['domain']}: {protocol['num_users']:,} users, "
        f"{protocol['num_candidates']:,} items; 95 % intervals over users"
    ]
    first = (MODEL, IDS_ALONE, "itemknn")
    models = sorted(
        metrics["models"],
        key=lambda name: (name not in first, first.index(name) if name in first else 0, name),
    )
    for mode in MODES:
        lines += ["", _row(f"seen {mode}", [name.upper() for name in SHOWN])]
        lines.append("─" * len(_row("", ["x"] * len(SHOWN)).ljust(NAME_WIDTH + CELL_WIDTH * len(SHOWN))))
        for model in models:
            cells = metrics["models"][model][mode]
            lines.append(_row(model, [with_interval(cells[name]) for name in SHOWN]))
            if model in metrics["seeds"]:
                spread = metrics["seeds"][model][mode]
                count = len(spread[SHOWN[0]]["values"])
                lines.append(_row(f"  ± {count} seeds", [number(spread[name]["sd"]) for name in SHOWN]))
        for model in models:
            if model in metrics["paired"]:
                cells = metrics["paired"][model][mode]
                lines.append(_row(f"  vs {model}", [difference(cells[name]) for name in SHOWN]))
                lines.append(_row("", [signed_interval(cells[name]) for name in SHOWN]))
    lines += ["", "coverage@10     " + "   ".join(f"{m} {metrics['coverage'][m]:.1%}" for m in models)]
    parts = [f"{name} {part['num_users']:,}" for name, part in metrics["slices"].items() if name != "all"]
    lines.append("users by slice  " + "   ".join(parts))
    duplicates = metrics["slices"]["non_duplicate"]["models"]
    if duplicates:
        values = "   ".join(f"{m} {number(duplicates[m]['removed']['ndcg@10']['mean'])}" for m in models)
        share = f"{protocol['duplicate_share']:.1%} of the users saw a near-duplicate of their target"
        lines += [f"{share}; NDCG@10 of the others:", f"  {values}"]
    if metrics["paired"]:
        lines.append(f"vs: {MODEL} minus that model, paired by user; * the interval excludes 0")
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return (name.ljust(NAME_WIDTH) + "".join(cell.ljust(CELL_WIDTH) for cell in cells)).rstrip()


def number(value: float) -> str:
    """`.0873`, `1.000`."""
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text[:5]


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + number(abs(value))


def with_interval(cell: Mapping[str, float]) -> str:
    """`.0873 .0820-.0926`."""
    return f"{number(cell['mean'])} {number(cell['low'])}-{number(cell['high'])}"


def difference(cell: Mapping[str, float]) -> str:
    """`+.0042*`; * where the interval excludes 0."""
    return _signed(cell["mean"]) + ("*" if cell["low"] > 0 or cell["high"] < 0 else "")


def signed_interval(cell: Mapping[str, float]) -> str:
    """`+.0021 +.0063`."""
    return f"{_signed(cell['low'])} {_signed(cell['high'])}"
