"""One self-contained HTML page per run."""

from qbrec.report.page import write_report

__all__ = ["write_report"]
