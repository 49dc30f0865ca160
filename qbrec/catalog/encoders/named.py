"""Encoders by name (extra `encode`): sentence-transformers for text, CLIP for text and pictures.

Weights are read from safetensors only and code from the hub is never run: see `models.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qbrec.catalog.encoders.models import model_folder, need
from qbrec.config.sections import ImageConfig, TextConfig
from qbrec.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Floats = NDArray[np.float32]
_OPTIONS: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def _load(load: Any, key: str, name: str) -> Any:
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load the encoder {name!r}: {(str(error).strip().splitlines() or [''])[0]}",
            where=key,
            fix="check that the folder or revision holds a whole model",
        ) from error


def _load_clip(kind: Any, folder: str, part: Any, projection_dim: int, key: str, name: str) -> Any:
    """One tower of a CLIP model in inference mode."""
    # The parts of a configuration may leave out what the whole says.
    part.projection_dim = projection_dim

    def load() -> Any:
        return kind.from_pretrained(
            folder, config=part, use_safetensors=True, output_loading_info=True, **_OPTIONS
        )  # fmt: skip

    model, info = _load(load, key, name)
    if info["missing_keys"]:
        # They would be drawn at random.
        raise ConfigError(
            f"the encoder {name!r} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}, …",
            where=key,
            fix="check that the folder or revision holds a whole model",
        )
    return model.eval()


def precision_of(wanted: str, device: str) -> torch.dtype:
    """The type a named encoder multiplies in; `auto`: bfloat16 on a CUDA device that has it, else float32."""
    import torch

    if wanted == "auto":
        wanted = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


@contextmanager
def _inference(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Mixed precision: sums, norms and soft-max stay in float32."""
    import torch

    with torch.inference_mode(), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        yield


def _open(config: TextConfig | ImageConfig, key: str) -> tuple[Any, str, Any]:
    """The package, the folder that holds the model, and the model's configuration."""
    transformers = need("transformers", key, config.encoder)
    folder = str(model_folder(config))
    kind = _load(lambda: transformers.AutoConfig.from_pretrained(folder, **_OPTIONS), key, config.encoder)
    return transformers, folder, kind


class NamedTextEncoder:
    """A text encoder from the Hugging Face hub or a local folder.

    Args:
        config: Its name, revision, precision and batch size.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: The extra is not installed, or the model must not or cannot be loaded.
    """

    def __init__(self, config: TextConfig, *, device: str) -> None:
        key, name = "catalog.text.encoder", config.encoder
        self._batch, self._device = config.batch_size, device
        self._dtype = precision_of(config.precision, device)
        transformers, folder, kind = _open(config, key)
        self._tokenizer = None
        if kind.model_type == "clip":
            self._tokenizer = _load(
                lambda: transformers.AutoTokenizer.from_pretrained(folder, **_OPTIONS), key, name
            )
            tower = transformers.CLIPTextModelWithProjection
            model = _load_clip(tower, folder, kind.text_config, kind.projection_dim, key, name)
            self._model = model.to(device)
        else:
            package = need("sentence_transformers", key, name)
            self._model = _load(
                lambda: package.SentenceTransformer(
                    folder, model_kwargs={"use_safetensors": True}, device=device, **_OPTIONS
                ),
                key, name,
            )  # fmt: skip

    def encode(self, texts: Sequence[str]) -> Floats:
        """Vectors of n texts, float32 [n, dim], of unit length; texts of one length share a batch."""
        with _inference(self._device, self._dtype):
            if self._tokenizer is not None:
                return _unit(self._clip(texts))
            # Sorts by length itself.
            vectors = self._model.encode(
                list(texts), batch_size=self._batch, convert_to_tensor=True, show_progress_bar=False
            )
            return _unit(vectors.float().cpu().numpy())

    def _clip(self, texts: Sequence[str]) -> Floats:
        longest = self._model.config.max_position_embeddings
        assert self._tokenizer is not None
        ids = self._tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        order = np.argsort([-len(one) for one in ids], kind="stable")
        out: Floats | None = None
        for begin in range(0, len(ids), self._batch):
            chosen = order[begin : begin + self._batch]
            batch = self._tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            found = self._model(**batch.to(self._device)).text_embeds.float().cpu().numpy()
            if out is None:
                out = np.empty((len(ids), found.shape[1]), dtype=np.float32)
            out[chosen] = found
        assert out is not None, "somebody asked for no text"
        return out


class NamedImageEncoder:
    """A CLIP image encoder from the Hugging Face hub or a local folder.

    Args:
        config: Its name, revision, precision and batch size.
        device: `cpu` or `cuda`.

    Attributes:
        side: Pixels a side of what the model looks at.

    Raises:
        ConfigError: The extra is not installed, or the model must not or cannot be loaded or is no CLIP.
    """

    def __init__(self, config: ImageConfig, *, device: str) -> None:
        key, name = "catalog.image.encoder", config.encoder
        self._batch, self._device = config.batch_size, device
        self._dtype = precision_of(config.precision, device)
        transformers, folder, kind = _open(config, key)
        if kind.model_type != "clip":
            raise ConfigError(
                f"the image encoder {name!r} is a {kind.model_type} model",
                where=key,
                fix="name a CLIP model, such as openai/clip-vit-base-patch32, or use pixel-statistics",
            )
        self._processor = _load(
            lambda: transformers.AutoImageProcessor.from_pretrained(folder, **_OPTIONS), key, name
        )
        tower = transformers.CLIPVisionModelWithProjection
        model = _load_clip(tower, folder, kind.vision_config, kind.projection_dim, key, name)
        self._model = model.to(device)
        self.side = int(self._model.config.image_size)

    def encode(self, pictures: Sequence[Image], *, grid: int | None) -> Floats:
        """Tokens of n RGB pictures, of unit length.

        Args:
            pictures: n pictures.
            grid: Beside the pooled embedding, so many parts a side: means of the embeddings of patches after
                the final projection; None: the pooled one only.

        Returns:
            float32 [n, 1 or 1 + grid², dim].
        """
        import torch

        parts = []
        for begin in range(0, len(pictures), self._batch):
            pixels = self._processor(images=list(pictures[begin : begin + self._batch]), return_tensors="pt")
            with _inference(self._device, self._dtype):
                out = self._model(**pixels.to(self._device))
                tokens = out.image_embeds.float()[:, None]
                if grid is not None:
                    patches = self._model.vision_model.post_layernorm(out.last_hidden_state[:, 1:])
                    patches = self._model.visual_projection(patches).float().transpose(1, 2)
                    side = round(patches.shape[2] ** 0.5)
                    patches = patches.unflatten(2, (side, side))
                    cells = torch.nn.functional.adaptive_avg_pool2d(patches, grid).flatten(2)
                    tokens = torch.cat([tokens, cells.transpose(1, 2)], dim=1)
                parts.append(tokens.cpu().numpy())
        return _unit(np.concatenate(parts))


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


@lru_cache(maxsize=1)
def text_encoder(config: TextConfig, device: str) -> NamedTextEncoder:
    """The text encoder of this process: loaded once, whatever the number of units it encodes."""
    return NamedTextEncoder(config, device=device)


@lru_cache(maxsize=1)
def image_encoder(config: ImageConfig, device: str) -> NamedImageEncoder:
    """The image encoder of this process."""
    return NamedImageEncoder(config, device=device)
