"""The input: is there Parquet where the configuration says?"""

from __future__ import annotations

from qbrec.catalog.sources import SourceFile, list_files
from qbrec.config import RootConfig
from qbrec.doctor.finding import Finding, of_error, ok
from qbrec.errors import QbrecError


def check_input(config: RootConfig) -> Finding | list[Finding]:
    """Files of every domain; what is in them, `qbrec catalog` checks."""
    if not config.data.domains:
        return ok("input", "no domain is configured")
    findings = []
    for name, domain in config.data.domains.items():
        try:
            files: list[SourceFile] = []
            for role in ("items", "interactions"):
                files += list_files(getattr(domain, role), where=f"data.domains.{name}.{role}")
        except QbrecError as error:
            findings.append(of_error("input", error))
            continue
        size = sum(file.size for file in files)
        findings.append(ok("input", f"{name}: {len(files):,} Parquet files, {size / 1e6:,.1f} MB"))
    return findings
