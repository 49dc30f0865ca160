"""One self-contained HTML page per run."""

from qbrec.report.page import write_report
from qbrec.report.run_log import record_timing

__all__ = ["record_timing", "write_report"]
