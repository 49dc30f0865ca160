"""Named encoders in a real pool of Ray actors: every item is encoded, as the model itself would."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qbrec.catalog import build_items
from qbrec.catalog.encoders.named import NamedImageEncoder, NamedTextEncoder
from qbrec.catalog.stage import run
from qbrec.config import parse_config
from qbrec.engine.context import StageContext
from qbrec.storage.artifact import ArtifactStore
from qbrec.storage.blocks import RaggedField
from qbrec.storage.catalog_view import CatalogView
from tests.support.tiny_encoders import save_bert, save_clip

pytestmark = pytest.mark.usefixtures("ray_session")

COLOURS = ["red", "blue"]


def picture(n: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (40, 40), COLOURS[n % 2]).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.slow
def test_an_actor_that_holds_every_core_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor on both cores; what it encodes is split beside it, and equals what the models say."""
    pytest.importorskip("sentence_transformers", reason="the extra `encode` is not installed")
    monkeypatch.setattr(build_items, "ITEM_UNIT_ROWS", 8)
    n = 120
    titles = [f"{COLOURS[k % 2]} paint for walls" if k % 5 else None for k in range(n)]
    items = {"item_id": [f"i{k}" for k in range(n)], "title": titles}
    items["image"] = pa.array([picture(k) if k % 3 else None for k in range(n)], pa.binary())
    pq.write_table(pa.table(items), tmp_path / "items.parquet", row_group_size=16)
    events = {"user_id": ["u"] * 4, "item_id": ["i1", "i2", "i3", "i4"], "timestamp": range(4)}
    pq.write_table(pa.table(events), tmp_path / "interactions.parquet")
    bert, clip = save_bert(tmp_path / "bert"), save_clip(tmp_path / "clip")
    config = parse_config(
        {
            "data": {
                "domains": {
                    "shop": {role: str(tmp_path / f"{role}.parquet") for role in ("items", "interactions")}
                }
            },
            "catalog": {"text": {"encoder": str(bert)}, "image": {"encoder": str(clip)}},
            "compute": {"device": "cpu", "encoder_cpus": 2},
        }
    )
    store = ArtifactStore(tmp_path / "out")
    artifact = run(StageContext.local(store, tmp_path / "out" / "run", stage="catalog"), config, {})
    view = CatalogView(artifact)
    assert artifact.meta["modalities"]["text"] == {"dim": 16, "present": 96, "max_tokens": 1}
    assert artifact.meta["modalities"]["image"] == {"dim": 8, "present": 80, "max_tokens": 1}
    assert artifact.meta["encoders"]["text"]["encoder"] == str(bert)
    assert len(artifact.meta["encoders"]["image"]["files"]) == 64

    numbers = [int(name[1:]) for name in view.item_ids(np.arange(n))]
    text = view.items().ragged(RaggedField("feature.text", counts="tokens.text"))
    words = [titles[k] for k in numbers]
    assert text.lengths.tolist() == [int(title is not None) for title in words]
    own = NamedTextEncoder(config.catalog.text, device="cpu").encode([title for title in words if title])
    np.testing.assert_allclose(text.values.astype(np.float32), own, atol=2e-3)
    image = view.items().ragged(RaggedField("feature.image", counts="tokens.image"))
    shown = [Image.open(io.BytesIO(picture(k))).convert("RGB") for k in numbers if k % 3]
    own = NamedImageEncoder(config.catalog.image, device="cpu").encode(shown, grid=None)
    np.testing.assert_allclose(image.values.astype(np.float32), own.reshape(len(shown), -1), atol=2e-3)
