"""A real MLflow store on SQLite: migrating an empty database takes six seconds, so tests copy a ready one."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from qbrec.config import parse_config
from qbrec.tracking.client import connect


def copy_store(cache: Path, storage: Path) -> Path:
    """Put a migrated, empty `mlflow.db` into `storage`; the first call makes the one that is copied."""
    template = cache / "mlflow-template"
    if not (template / "mlflow.db").exists():
        connect(parse_config({"run": {"storage": str(template)}}))
        with sqlite3.connect(template / "mlflow.db") as database:
            database.execute("DELETE FROM experiments WHERE name = 'qbrec'")
        database.close()
    storage.mkdir(parents=True, exist_ok=True)
    shutil.copy(template / "mlflow.db", storage / "mlflow.db")
    return storage
