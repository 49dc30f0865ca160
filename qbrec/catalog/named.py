"""Hugging Face encoders by name: sentence-transformers for text, CLIP for text and pictures (extra `encode`).

Weights are read from safetensors only and code from the hub is never run. Pin `revision` to a commit for a
run that can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.float32]


def _need(module: str, key: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"the encoder {name!r} needs the package {module}, which is not installed",
            where=key,
            fix="pip install 'qbrec[encode]', or use the built-in encoder",
        ) from None


def _load(load: Any, key: str, name: str, revision: str | None) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the encoder {name!r}: {str(error).strip().splitlines()[0]}",
            where=f"{key}, revision {revision or 'main'}",
            fix="check the name and revision, and that the model has safetensors weights",
        ) from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class NamedTextEncoder:
    """A text encoder from the Hugging Face hub or a local folder.

    Raises:
        ConfigError: The extra is not installed, or the model cannot be loaded.
    """

    def __init__(self, name: str, *, revision: str | None, batch_size: int) -> None:
        key = "catalog.text.encoder"
        self._batch = batch_size
        transformers = _need("transformers", key, name)
        options = {"revision": revision, "trust_remote_code": False}
        config = _load(lambda: transformers.AutoConfig.from_pretrained(name, **options), key, name, revision)
        self._clip = config.model_type == "clip"
        if self._clip:
            self._tokenizer = _load(
                lambda: transformers.AutoTokenizer.from_pretrained(name, **options), key, name, revision
            )
            self._model = _load(
                lambda: transformers.CLIPTextModelWithProjection.from_pretrained(
                    name, use_safetensors=True, **options
                ),
                key, name, revision,
            )  # fmt: skip
            self._model = self._model.eval().to(_device())
        else:
            package = _need("sentence_transformers", key, name)
            self._model = _load(
                lambda: package.SentenceTransformer(
                    name, model_kwargs={"use_safetensors": True}, device=_device(), **options
                ),
                key, name, revision,
            )  # fmt: skip

    def encode(self, texts: Sequence[str]) -> Floats:
        """Vectors of n texts, float32 [n, dim], of unit length."""
        if not self._clip:
            vectors = self._model.encode(
                list(texts), batch_size=self._batch, convert_to_numpy=True, show_progress_bar=False
            )
            return _unit(np.asarray(vectors, dtype=np.float32))
        import torch

        parts = []
        for begin in range(0, len(texts), self._batch):
            tokens = self._tokenizer(
                list(texts[begin : begin + self._batch]), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                parts.append(self._model(**tokens.to(self._model.device)).text_embeds.float().cpu().numpy())
        return _unit(np.concatenate(parts))


class NamedImageEncoder:
    """A CLIP image encoder from the Hugging Face hub or a local folder.

    Raises:
        ConfigError: The extra is not installed, or the model cannot be loaded or is no CLIP.
    """

    def __init__(self, name: str, *, revision: str | None, batch_size: int) -> None:
        key = "catalog.image.encoder"
        self._batch = batch_size
        transformers = _need("transformers", key, name)
        options = {"revision": revision, "trust_remote_code": False}
        config = _load(lambda: transformers.AutoConfig.from_pretrained(name, **options), key, name, revision)
        if config.model_type != "clip":
            raise ConfigError(
                f"the image encoder {name!r} is a {config.model_type} model",
                where=key,
                fix="name a CLIP model, such as openai/clip-vit-base-patch32, or use pixel-statistics",
            )
        self._processor = _load(
            lambda: transformers.AutoImageProcessor.from_pretrained(name, **options), key, name, revision
        )
        model = _load(
            lambda: transformers.CLIPVisionModelWithProjection.from_pretrained(
                name, use_safetensors=True, **options
            ),
            key, name, revision,
        )  # fmt: skip
        self._model = model.eval().to(_device())

    def encode(self, pictures: Sequence[Image]) -> Floats:
        """Vectors of n RGB pictures, float32 [n, dim], of unit length."""
        import torch

        parts = []
        for begin in range(0, len(pictures), self._batch):
            pixels = self._processor(images=list(pictures[begin : begin + self._batch]), return_tensors="pt")
            with torch.inference_mode():
                parts.append(self._model(**pixels.to(self._model.device)).image_embeds.float().cpu().numpy())
        return _unit(np.concatenate(parts))


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


@lru_cache(maxsize=1)
def text_encoder(name: str, revision: str | None, batch_size: int) -> NamedTextEncoder:
    """The text encoder of this process: loaded once, whatever the number of units it encodes."""
    return NamedTextEncoder(name, revision=revision, batch_size=batch_size)


@lru_cache(maxsize=1)
def image_encoder(name: str, revision: str | None, batch_size: int) -> NamedImageEncoder:
    """The image encoder of this process."""
    return NamedImageEncoder(name, revision=revision, batch_size=batch_size)
