"""Encoders by name, with stand-ins for the packages of the extra `encode`: what they are asked for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qbrec.catalog.named import NamedImageEncoder, NamedTextEncoder
from qbrec.errors import ConfigError


class Fake:
    """A package whose classes note how they are loaded."""

    def __init__(self, model_type: str) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.AutoConfig = self._loader("config", SimpleNamespace(model_type=model_type))
        self.AutoTokenizer = self._loader("tokenizer", self._tokens)
        self.AutoImageProcessor = self._loader("processor", self._pixels)
        self.CLIPTextModelWithProjection = self._loader("text", Model("text_embeds"))
        self.CLIPVisionModelWithProjection = self._loader("vision", Model("image_embeds"))

    def _loader(self, what: str, result: Any) -> Any:
        def from_pretrained(name: str, **options: Any) -> Any:
            if name == "absent":
                raise OSError("absent is not a model\nmore lines")
            self.calls.append((what, options))
            return result

        return SimpleNamespace(from_pretrained=from_pretrained)

    @staticmethod
    def _tokens(texts: list[str], **_: Any) -> Any:
        return Batch(x=torch.tensor([[float(len(text)), 1.0] for text in texts]))

    @staticmethod
    def _pixels(images: list[Image.Image], **_: Any) -> Any:
        return Batch(x=torch.tensor([[float(image.width), 1.0] for image in images]))


class Batch(dict[str, torch.Tensor]):
    def to(self, _: Any) -> Batch:
        return self


class Model:
    device = "cpu"

    def __init__(self, output: str) -> None:
        self.output = output

    def eval(self) -> Model:
        return self

    def to(self, _: str) -> Model:
        return self

    def __call__(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(**{self.output: x})


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake("clip")
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return fake


def check(calls: list[tuple[str, dict[str, Any]]], weights: str) -> None:
    assert all(options["trust_remote_code"] is False for _, options in calls)
    assert all(options["revision"] == "abc" for _, options in calls)
    assert dict(calls)[weights]["use_safetensors"] is True


def test_clip_text(clip: Fake) -> None:
    vectors = NamedTextEncoder("some/clip", revision="abc", batch_size=2).encode(["a", "bbb", "cc"])
    expected = np.array([[1, 1], [3, 1], [2, 1]], np.float32)
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
    check(clip.calls, "text")


def test_clip_images(clip: Fake) -> None:
    pictures = [Image.new("RGB", (width, 3)) for width in (2, 5, 7)]
    vectors = NamedImageEncoder("some/clip", revision="abc", batch_size=2).encode(pictures)
    np.testing.assert_allclose(vectors[:, 0] / vectors[:, 1], [2, 5, 7], rtol=1e-5)
    check(clip.calls, "vision")


def test_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class SentenceTransformer:
        def __init__(self, name: str, **options: Any) -> None:
            seen.update(options, name=name)

        def encode(self, texts: list[str], **options: Any) -> Any:
            seen.update(options)
            return np.full((len(texts), 4), 3.0)

    monkeypatch.setitem(sys.modules, "transformers", Fake("bert"))
    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=SentenceTransformer)
    )
    vectors = NamedTextEncoder("some/minilm", revision=None, batch_size=17).encode(["a", "b"])
    np.testing.assert_allclose(vectors, 0.5)
    assert seen["trust_remote_code"] is False
    assert seen["model_kwargs"] == {"use_safetensors": True}
    assert seen["batch_size"] == 17


def test_a_model_that_cannot_be_used(clip: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="absent is not a model") as caught:
        NamedTextEncoder("absent", revision="abc", batch_size=1)
    assert "more lines" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", Fake("bert"))
    with pytest.raises(ConfigError, match="is a bert model"):
        NamedImageEncoder("some/bert", revision=None, batch_size=1)
