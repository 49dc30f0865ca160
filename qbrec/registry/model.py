"""Log the bundle as an MLflow pyfunc from code: signature, example, pinned requirements."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import qbrec
from qbrec.errors import RegistryError
from qbrec.registry.recommend import Recommender
from qbrec.registry.shipped import shipped

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

SCRIPT = "serving_model.py"
BUNDLE_ARTIFACT = "bundle"
EXAMPLE_ITEMS = 3
# What serving imports, no more: a test traces it. deepspeed and ray stay where models are trained.
_REQUIREMENTS = (
    "mlflow",
    "numba",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "scipy",
    "torch",
)


def serving_script() -> Path:
    """`serving_model.py`, which MLflow runs when it loads a version.

    Raises:
        RegistryError: The installation is incomplete.
    """
    return shipped(SCRIPT)


def requirements() -> list[str]:
    """Exact versions of this environment, without local parts such as `+cpu`, which no index knows."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def signature() -> ModelSignature:
    """Input `history`, parameters `k` and `keep_seen`, five list columns out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    def texts(name: str) -> ColSpec:
        return ColSpec(Array(DataType.string), name)

    return ModelSignature(
        inputs=Schema([texts("history")]),
        outputs=Schema(
            [
                texts("item_id"),
                ColSpec(Array(DataType.double), "score"),
                texts("title"),
                texts("semantic_id"),
                texts("label"),
            ]
        ),
        params=ParamSchema(
            [ParamSpec("k", DataType.long, 10), ParamSpec("keep_seen", DataType.boolean, False)]
        ),
    )


def input_example(recommender: Recommender) -> pd.DataFrame:
    """Two histories of popular items: real ids, nobody's real history."""
    import pandas as pd

    ids = recommender.popular(EXAMPLE_ITEMS)
    return pd.DataFrame({"history": [ids, ids[:1]]})


def log_bundle(bundle: Path, *, recommender: Recommender, model_name: str) -> str:
    """Log the bundle within MLflow's active run and prove that it answers as the recommender does.

    Args:
        bundle: Folder written by `write_bundle`.
        recommender: The same bundle, opened.
        model_name: Name of the logged model.

    Returns:
        URI of the logged model, `models:/m-…`; it has no version yet.

    Raises:
        RegistryError: The logged model gives another list.
    """
    import mlflow

    example = input_example(recommender)
    k = min(10, recommender.num_candidates)
    info = mlflow.pyfunc.log_model(
        name=model_name,
        python_model=str(serving_script()),
        artifacts={BUNDLE_ARTIFACT: str(bundle)},
        code_paths=[str(Path(qbrec.__file__).parent)],
        signature=signature(),
        input_example=(example, {"k": k, "keep_seen": False}),
        pip_requirements=requirements(),
    )
    served = mlflow.pyfunc.load_model(info.model_uri).predict(example, params={"k": k})
    expected = recommender.recommend(list(example["history"]), k=k)
    if [list(ids) for ids in served["item_id"]] != [
        [item["item_id"] for item in items] for items in expected
    ]:
        raise RegistryError(
            "the logged model does not return the recommender's list",
            where=info.model_uri,
            fix="this is a defect of qbrec: please report it; nothing was registered",
        )
    return str(info.model_uri)
