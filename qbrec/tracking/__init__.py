"""MLflow tracking on the driver's side: it tails `metrics.jsonl`; a dead server costs nothing."""

from qbrec.tracking.replay import replay
from qbrec.tracking.tracker import StageRecord, Tracker

__all__ = ["StageRecord", "Tracker", "replay"]
