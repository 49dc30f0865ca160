"""Encoders by name: which models may be loaded, and what tiny real ones answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from qbrec.catalog.contract import Domain
from qbrec.catalog.encoders import models
from qbrec.catalog.encoders.encode import ItemEncoder, from_binary
from qbrec.catalog.encoders.models import (
    check_named,
    encoder_identity,
    folder_hash,
    local_models,
    model_folder,
)
from qbrec.catalog.encoders.named import (
    NamedImageEncoder,
    NamedTextEncoder,
    image_encoder,
    precision_of,
    text_encoder,
)
from qbrec.catalog.encoders.pool import encoder_pool
from qbrec.config.sections import CatalogConfig, ComputeConfig, ImageConfig, TextConfig
from qbrec.engine.actor_pool import ActorPool
from qbrec.errors import ConfigError, LaunchError
from tests.support.tiny_encoders import save_bert, save_clip

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def folder(path: Path, **files: Any) -> Path:
    """A folder of files named with __ for / and _dot_ for the full stop; no weights that could be read."""
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper()])
def test_a_model_on_the_hub_is_pinned(revision: str | None) -> None:
    for config in (
        TextConfig(encoder="org/m", revision=revision),
        ImageConfig(encoder="org/m", revision=revision),
    ):
        with pytest.raises(ConfigError, match="not pinned") as caught:
            check_named(config)
        assert caught.value.where == f"{models.key_of(config)}.revision"
        assert "git ls-remote https://huggingface.co/org/m HEAD" in str(caught.value.fix)
    check_named(TextConfig(encoder="org/m", revision=COMMIT))


def test_a_folder_has_no_revision_and_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no revision"):
        check_named(TextConfig(encoder=str(tmp_path), revision=COMMIT))
    for name in (str(tmp_path / "none"), "./none", "~/none", "a/b/c"):
        with pytest.raises(ConfigError, match="there is no folder"):
            check_named(TextConfig(encoder=name, revision=COMMIT))


@pytest.mark.parametrize("section", [TextConfig, ImageConfig])
def test_the_built_in_encoders_have_no_revision(section: Any) -> None:
    with pytest.raises(ValueError, match="built-in"):
        section(revision=COMMIT)


CONFIG = {"model_type": "bert"}


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"pytorch_model_dot_bin": "x"}, "pickle"),
        ({}, "no model.safetensors"),
        ({"other_dot_safetensors": "x", "pytorch_model_dot_bin": "x"}, "pickle"),
        (
            {
                "model_dot_safetensors": "x",
                "2_Dense__pytorch_model_dot_bin": "x",
                "modules_dot_json": [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}],
            },
            "pickle",
        ),
        (
            {"model_dot_safetensors": "x", "modules_dot_json": [{"type": "custom.Module", "path": ""}]},
            "code of its own",
        ),
        (
            {
                "model_dot_safetensors": "x",
                "tokenizer_config_dot_json": {"auto_map": {"AutoTokenizer": "t.T"}},
            },
            "code of its own",
        ),
        (
            {"model_dot_safetensors": "x", "sub__config_dot_json": {"auto_map": {"AutoModel": "m.M"}}},
            "code of its own",
        ),
    ],
)
def test_folders_that_could_run_code(tmp_path: Path, files: dict[str, Any], what: str) -> None:
    place = folder(tmp_path, config_dot_json=CONFIG, **files)
    with pytest.raises(ConfigError, match=what) as caught:
        model_folder(TextConfig(encoder=str(place)))
    assert str(caught.value.where).startswith("catalog.text.encoder")


def test_folders_that_may_be_loaded(tmp_path: Path) -> None:
    place = folder(
        tmp_path,
        config_dot_json=CONFIG,
        modules_dot_json=[{"type": "sentence_transformers.models.Transformer", "path": "0_T"}],
        **{"0_T__model-00001-of-00002_dot_safetensors": "x", "0_T__pytorch_model_dot_bin": "unused"},
    )
    assert model_folder(TextConfig(encoder=str(place))) == place


def test_identity_follows_the_files_and_pins(tmp_path: Path) -> None:
    place = folder(tmp_path / "m", config_dot_json=CONFIG, model_dot_safetensors="weights", note_dot_md="a")
    before = folder_hash(place)
    (place / "note.md").write_text("b")
    assert folder_hash(place) == before == folder_hash(f"{place}/")
    config = CatalogConfig(
        text=TextConfig(encoder=str(place)), image=ImageConfig(encoder="org/clip", revision=COMMIT)
    )
    assert local_models(config) == {"text": before}
    (place / "model.safetensors").write_text("other weights")
    assert local_models(config)["text"] != before
    found = encoder_identity(config, dims={"text": 384, "image": 512})
    assert found["text"]["files"] == local_models(config)["text"]
    assert found["image"]["revision"] == COMMIT
    assert (found["text"]["dim"], found["image"]["dim"]) == (384, 512)
    assert found["text"]["packages"]["torch"] == torch.__version__
    assert encoder_identity(CatalogConfig(), dims={"text": 256}) == {
        "text": {"encoder": "hashed-ngram", "dim": 256}
    }
    json.dumps(found)


@pytest.mark.parametrize("part", ["text", "image"])
def test_without_the_extra(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    encoder: Any = NamedTextEncoder if part == "text" else NamedImageEncoder
    section: Any = TextConfig if part == "text" else ImageConfig
    with pytest.raises(ConfigError, match=r"qbrec\[encode\]") as caught:
        encoder(section(encoder="some/model", revision=COMMIT), device="cpu")
    assert caught.value.where == f"catalog.{part}.encoder"


def test_precision() -> None:
    assert precision_of("auto", "cpu") == torch.float32
    assert precision_of("float16", "cpu") == torch.float16
    if torch.cuda.is_available():
        expected = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        assert precision_of("auto", "cuda") == expected


NAMED = CatalogConfig(text=TextConfig(encoder="org/m", revision=COMMIT))


def pool(config: CatalogConfig = NAMED, **changes: Any) -> ActorPool | None:
    settings: dict[str, Any] = {
        "encoded": ("text",), "resources": {"CPU": 16.0, "GPU": 4.0}, "actors": 0, "gpus_per_actor": 1.0,
        "cpus_per_actor": 1,
    }  # fmt: skip
    settings |= changes
    return encoder_pool(config, settings.pop("compute", ComputeConfig()), **settings)


def test_a_pool_only_for_named_encoders_that_are_needed() -> None:
    assert pool(CatalogConfig()) is None
    assert pool(encoded=("image",)) is None
    assert pool(encoded=()) is None
    with pytest.raises(ConfigError, match="not pinned"):
        pool(CatalogConfig(text=TextConfig(encoder="org/m")))


def test_the_size_of_a_pool() -> None:
    assert pool() == ActorPool(1, 4, 1.0, 1, "cuda")
    assert pool(gpus_per_actor=0.5) == ActorPool(1, 8, 0.5, 1, "cuda")
    assert pool(gpus_per_actor=0.4) == ActorPool(1, 8, 0.4, 1, "cuda")  # two on each GPU, not ten on four
    assert pool(actors=3) == ActorPool(1, 3, 1.0, 1, "cuda")
    assert pool(cpus_per_actor=8) == ActorPool(1, 2, 1.0, 8, "cuda")
    cpu = ComputeConfig(device="cpu")
    assert pool(compute=cpu, cpus_per_actor=3) == ActorPool(1, 5, 0.0, 3, "cpu")
    assert pool(resources={"CPU": 2.0}) == ActorPool(1, 2, 0.0, 1, "cpu")
    with pytest.raises(LaunchError, match="no GPU"):
        pool(resources={"CPU": 2.0}, compute=ComputeConfig(device="cuda"))
    with pytest.raises(LaunchError, match="no actor fits"):
        pool(cpus_per_actor=32)


# ---- Tiny models with random weights, through the real packages. ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the extra `encode` is not installed")
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers", reason="the extra `encode` is not installed")
    return save_bert(tmp_path_factory.mktemp("bert"))


TEXTS = [
    "red paint for walls",
    "blue",
    "red brush for blue walls red paint",
    "brush",
    "blue paint",
    "nobody knows",
]


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_texts_in_any_company_and_order(kind: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue(kind)
    encoder = NamedTextEncoder(TextConfig(encoder=str(place), batch_size=2), device="cpu")
    together = encoder.encode(TEXTS)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    assert np.abs(together @ together.T - np.eye(6)).max() < 0.9999
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.encode([text])[0], together[i], atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[::-1])[::-1], together, atol=1e-5)
    assert encoder.encode(["red " * 400]).shape == (1, together.shape[1])  # cut to what the model reads


def test_clip_text_is_that_of_transformers(clip: Path) -> None:
    import transformers

    whole = transformers.CLIPModel.from_pretrained(clip).eval()
    words = transformers.AutoTokenizer.from_pretrained(clip)
    with torch.inference_mode():
        expected = whole.get_text_features(**words(TEXTS, padding=True, return_tensors="pt"))
    expected = getattr(expected, "pooler_output", expected)
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    found = NamedTextEncoder(TextConfig(encoder=str(clip), batch_size=4), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def pictures(n: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (40, 32 + 4 * i, 3), dtype=np.uint8)) for i in range(n)]


def test_clip_images_and_their_parts(clip: Path) -> None:
    import transformers

    encoder = NamedImageEncoder(ImageConfig(encoder=str(clip), batch_size=2), device="cpu")
    assert encoder.side == 32
    pooled = encoder.encode(pictures(), grid=None)
    assert pooled.shape == (5, 1, 8)
    whole = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(clip)(images=pictures(), return_tensors="pt")
    with torch.inference_mode():
        out = whole.vision_model(**pixels)
        expected = whole.visual_projection(out.pooler_output)
        patches = whole.visual_projection(whole.vision_model.post_layernorm(out.last_hidden_state))[:, 1:]
    unit = torch.nn.functional.normalize
    np.testing.assert_allclose(pooled[:, 0], unit(expected, dim=1).numpy(), atol=1e-5)
    grid = encoder.encode(pictures(), grid=2)
    assert grid.shape == (5, 5, 8)
    np.testing.assert_allclose(grid[:, 0], pooled[:, 0], atol=1e-6)
    square = patches.reshape(5, 4, 4, 8)
    top_right = unit(square[:, :2, 2:].mean(dim=(1, 2)), dim=1).numpy()
    np.testing.assert_allclose(grid[:, 2], top_right, atol=1e-5)
    assert encoder.encode(pictures(1), grid=3).shape == (1, 10, 8)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_and_really_used(clip: Path, bert: Path, precision: Any) -> None:
    for place in (clip, bert):
        full, half = (
            NamedTextEncoder(TextConfig(encoder=str(place), precision=p), device="cpu").encode(TEXTS)
            for p in ("float32", precision)
        )
        assert not np.array_equal(full, half)
        assert (full * half).sum(axis=1).min() > 0.99
    full, half = (
        NamedImageEncoder(ImageConfig(encoder=str(clip), precision=p), device="cpu").encode(
            pictures(), grid=2
        )
        for p in ("float32", precision)
    )
    assert not np.array_equal(full, half)
    assert (full * half).sum(axis=2).min() > 0.99


def test_missing_weights_are_not_drawn_at_random(clip: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    place = shutil.copytree(clip, tmp_path / "m")
    weights = load_file(place / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights: visual_projection\.weight"):
        NamedImageEncoder(ImageConfig(encoder=str(place)), device="cpu")


def test_models_that_cannot_be_used(bert: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a bert model"):
        NamedImageEncoder(ImageConfig(encoder=str(bert)), device="cpu")
    broken = folder(tmp_path / "broken", config_dot_json=CONFIG, model_dot_safetensors="x")
    with pytest.raises(ConfigError, match="cannot load the encoder") as caught:
        NamedTextEncoder(TextConfig(encoder=str(broken)), device="cpu")
    assert len(caught.value.what.splitlines()) == 1


def test_code_in_a_folder_is_never_run(bert: Path, tmp_path: Path) -> None:
    import shutil

    place = shutil.copytree(bert, tmp_path / "m")
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass M: pass\n")
    whole = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(whole | {"auto_map": {"AutoModel": "evil.M"}}))
    with pytest.raises(ConfigError, match="code of its own"):
        NamedTextEncoder(TextConfig(encoder=str(place)), device="cpu")
    (place / "config.json").write_text(json.dumps(whole))
    (place / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.M"}]))
    with pytest.raises(ConfigError, match="code of its own"):
        NamedTextEncoder(TextConfig(encoder=str(place)), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_stays_in_its_process(bert: Path, clip: Path) -> None:
    config = TextConfig(encoder=str(bert))
    assert text_encoder(config, "cpu") is text_encoder(TextConfig(encoder=str(bert)), "cpu")
    image = ImageConfig(encoder=str(clip))
    assert image_encoder(image, "cpu") is image_encoder(image, "cpu")


def test_items_with_named_encoders(clip: Path, bert: Path) -> None:
    files = []
    for picture in pictures(2):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    table = pa.table(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["red paint", None, "blue", " "],
            "brand": [None, "brush", "walls", None],
            "image": [[files[0], files[1]], [files[1]], None, [b"junk"]],
        }
    )
    config = CatalogConfig(
        text=TextConfig(encoder=str(bert)),
        image=ImageConfig(encoder=str(clip), tokens="grid", grid=3, on_error="skip", batch_size=2),
    )
    domain = Domain(0, "shop", (), (), tuple(table.column_names))
    encoder = ItemEncoder(config, modalities=("text", "image"), display=pa.schema([]), text=None)
    found = encoder.encode(table, domain, file=0, first_row=0)
    assert found["tokens.text"].to_pylist() == [1, 1, 2, 0]
    assert found["tokens.image"].to_pylist() == [20, 10, 0, 0]
    values = from_binary(found["feature.text"], 16)
    expected = NamedTextEncoder(config.text, device="cpu").encode(["red paint", "brush", "blue", "walls"])
    np.testing.assert_allclose(values, expected, atol=2e-3)
    image = from_binary(found["feature.image"], 8)
    np.testing.assert_array_equal(image[10:20], image[20:30])
