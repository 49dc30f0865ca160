"""One self-contained HTML page per run: nothing is fetched, nothing runs, everything shown is escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from qbrec import __version__
from qbrec.config import RootConfig, dump_config
from qbrec.registry.standing import Standing
from qbrec.report import results
from qbrec.report.blocks import Block, Section
from qbrec.report.codebooks import codebooks
from qbrec.report.data import data
from qbrec.report.decision import decision
from qbrec.report.examples import examples
from qbrec.report.flow import flow
from qbrec.report.training import training
from qbrec.storage.artifact import Artifact, write_atomic

REPORT_FILE = "report.html"


def write_report(
    config: RootConfig,
    run_dir: Path,
    artifacts: Mapping[str, Artifact],
    *,
    standing: Standing | None = None,
) -> Path:
    """Write `report.html` into the run directory.

    Args:
        config: The run's configuration.
        run_dir: Its directory (metrics.jsonl, run.json).
        artifacts: The finished artifacts by stage name; chapters of missing ones are left out.
        standing: What the registry says of the run's model, see `registry.describe.standing_of`.

    Returns:
        Path of the page.

    Raises:
        DataError: An artifact is damaged.
    """
    chapters: list[Section | None] = [
        decision(artifacts, standing),
        results.metrics(artifacts, standing),
        flow(config, run_dir, artifacts),
        *examples(config, artifacts),
        codebooks(artifacts),
        training(run_dir, artifacts),
        data(artifacts, config),
        _configuration(config),
    ]
    present = [chapter for chapter in chapters if chapter is not None]
    html = _render(
        title=f"qbrec run {config.run.name}",
        subtitle=_subtitle(artifacts),
        tiles=results.tiles(artifacts, standing),
        sections=present,
        contents=[(chapter.id, chapter.name) for chapter in present],
        footer=f"Written by qbrec {__version__} on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.",
    )
    path = run_dir / REPORT_FILE
    write_atomic(path, html.encode())
    return path


def _render(**context: object) -> str:
    from jinja2 import Environment, StrictUndefined

    source = (resources.files("qbrec.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(**context)


def _subtitle(artifacts: Mapping[str, Artifact]) -> str:
    if "catalog" not in artifacts:
        return "nothing has been built yet"
    meta = artifacts["catalog"].meta
    return (
        f"{meta['num_items']:,} items, {meta['num_users']:,} users, "
        f"{meta['num_interactions']:,} interactions; evaluated on {meta['target_domain']}"
    )


def _configuration(config: RootConfig) -> Section:
    block = Block(summary="Show the whole configuration", pre=dump_config(config))
    return Section("configuration", "Configuration", blocks=(block,))
