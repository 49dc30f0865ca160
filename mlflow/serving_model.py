"""The served model, as code: MLflow runs this file when it loads a version, so nothing is ever unpickled.

Logged by `qbrec register`; the bundle (plain files) is its artifact `bundle`, the package qbrec its code.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

DEFAULT_K = 10


class QbrecModel(PythonModel):
    """Item ids of histories in, ranked item ids with scores, titles, semantic IDs and labels out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle; every file is verified against its manifest."""
        from qbrec.registry.recommend import Recommender

        self.recommender = Recommender.load(context.artifacts["bundle"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of lists per history.

        Args:
            context: Unused; MLflow passes it.
            model_input: Column `history`: item ids, most recent last.
            params: `k` (items to return) and `keep_seen` (also recommend what the history holds).

        Raises:
            MlflowException: With code INVALID_PARAMETER_VALUE (HTTP 400) for what the caller got wrong.
        """
        from qbrec.errors import QbrecError

        wanted = {"k": DEFAULT_K, "keep_seen": False} | (params or {})
        try:
            lists = self.recommender.recommend(
                [list(history) for history in model_input["history"]],
                k=int(wanted["k"]),
                keep_seen=bool(wanted["keep_seen"]),
            )
        except QbrecError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        columns = ("item_id", "score", "title", "semantic_id", "label")
        return pd.DataFrame({c: [[item[c] for item in items] for items in lists] for c in columns})


set_model(QbrecModel())
