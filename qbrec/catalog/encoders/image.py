"""Built-in image encoder: colour histogram, gradient orientations and coarse layout of a picture.

Pixel statistics know nothing of objects, but pictures of the same kind of article look alike often enough to
carry signal, and they need no download. CLIP by name is in `named.py`.
"""

from __future__ import annotations

import io
import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 32  # pixels a side after scaling
_PART = 16  # pixels a side of one part of a grid
# What shops use. Pillow knows many more, and one of them (EPS) starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")
NUM_BINS, NUM_ANGLES, CELLS = 4, 8, 4
DIM = NUM_BINS**3 + CELLS * CELLS * NUM_ANGLES + CELLS * CELLS * 3


class BadImageError(Exception):
    """Bytes that are no picture, or one larger than allowed; the message is the reason of rejection."""


def decode(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """A picture as RGB uint8 [SIDE, SIDE, 3], scaled without regard to its proportions.

    Raises:
        BadImageError: Pillow cannot read it, or it has more than `max_pixels` pixels.
    """
    return _scaled(open_picture(data, max_pixels=max_pixels, side=SIDE), SIDE)


def decode_parts(data: bytes, *, max_pixels: int, grid: int | None) -> list[NDArray[np.uint8]]:
    """A picture for `picture_tokens`: the whole and, with a grid, all its parts side by side.

    Args:
        data: The encoded picture.
        max_pixels: How large it may be.
        grid: Parts a side; None: only the whole.

    Raises:
        BadImageError: As `decode`.
    """
    if grid is None:
        return [decode(data, max_pixels=max_pixels)]
    side = _PART * grid
    picture = open_picture(data, max_pixels=max_pixels, side=max(SIDE, side))
    return [_scaled(picture, SIDE), _scaled(picture, side)]


def picture_tokens(pictures: list[list[NDArray[np.uint8]]]) -> NDArray[np.float32]:
    """Feature tokens of n pictures of `decode_parts`, of the whole and then of its parts, row by row.

    Returns:
        float32 [n, 1 or 1 + grid², DIM], every token of unit length.
    """
    wholes = pixel_statistics(np.stack([picture[0] for picture in pictures]))[:, None]
    if len(pictures[0]) == 1:
        return wholes
    large = np.stack([picture[1] for picture in pictures])
    n, side = large.shape[:2]
    grid = side // _PART
    cut = large.reshape(n, grid, _PART, grid, _PART, 3).swapaxes(2, 3).reshape(-1, _PART, _PART, 3)
    return np.concatenate([wholes, pixel_statistics(cut).reshape(n, grid**2, DIM)], axis=1)


def _scaled(picture: Image, side: int) -> NDArray[np.uint8]:
    from PIL.Image import Resampling

    return np.asarray(picture.resize((side, side), Resampling.BILINEAR), dtype=np.uint8)


def open_picture(data: bytes, *, max_pixels: int, side: int) -> Image:
    """A decoded RGB `PIL.Image.Image`; the pixel count is checked before anything is unpacked.

    Args:
        data: The encoded picture.
        max_pixels: How large it may be.
        side: Pixels a side that will be needed: a JPEG is unpacked at a fraction of its size, but never below
            twice this.

    Raises:
        BadImageError: Pillow cannot read it, or it has more than `max_pixels` pixels.
    """
    import PIL.Image as pil

    formats = _formats()
    try:
        picture: Image = pil.open(io.BytesIO(data), formats=formats)
        if picture.width * picture.height > max_pixels:
            raise BadImageError("has more pixels than catalog.image.max_pixels")
        picture.draft("RGB", (2 * side, 2 * side))
        return picture.convert("RGBA").convert("RGB") if picture.mode == "P" else picture.convert("RGB")
    except BadImageError:
        raise
    except pil.DecompressionBombError:
        raise BadImageError("has more pixels than catalog.image.max_pixels") from None
    except Exception:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, … for damaged files
        raise BadImageError("cannot be decoded") from None


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    import PIL.Image as pil

    pil.init()  # where formats are named, Pillow does not load the rarer ones by itself
    # Pillow's own limit is a warning at a size of its choice; ours is the configured one. Once for the
    # process: `warnings.catch_warnings` must not be used from several threads.
    warnings.filterwarnings("ignore", category=pil.DecompressionBombWarning)
    return tuple(name for name in FORMATS if name in pil.OPEN)


def pixel_statistics(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features of pictures uint8 [n, s, s, 3], s a multiple of CELLS: float32 [n, DIM], of unit length.

    Colour and orientation are square roots of shares (Hellinger), so that plain cosine compares histograms;
    the three parts weigh the same.
    """
    n = len(pictures)
    if n == 0:
        return np.zeros((0, DIM), dtype=np.float32)
    side = pictures.shape[1]
    row = np.arange(n)[:, None]
    quantised = (pictures >> 6).astype(np.int64)
    bins = quantised[..., 0] * NUM_BINS**2 + quantised[..., 1] * NUM_BINS + quantised[..., 2]
    colour = np.bincount((row * NUM_BINS**3 + bins.reshape(n, -1)).ravel(), minlength=n * NUM_BINS**3)
    colour = np.sqrt(colour.reshape(n, -1) / side**2)

    pixels = pictures.astype(np.float32) / 255
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    dy, dx = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(dx, dy)
    angle = np.floor(np.mod(np.arctan2(dy, dx), np.pi) / np.pi * NUM_ANGLES).astype(np.int64) % NUM_ANGLES
    line = np.arange(side) * CELLS // side
    cell = line[:, None] * CELLS + line[None, :]
    width = CELLS * CELLS * NUM_ANGLES
    place = row * width + (cell[None] * NUM_ANGLES + angle).reshape(n, -1)
    edges = np.bincount(place.ravel(), weights=strength.ravel(), minlength=n * width).reshape(n, width)
    edges = np.sqrt(edges / np.maximum(edges.sum(axis=1, keepdims=True), 1e-6))

    step = side // CELLS
    layout = pixels.reshape(n, CELLS, step, CELLS, step, 3).mean(axis=(2, 4)).reshape(n, -1) - 0.5
    layout = layout / np.maximum(np.linalg.norm(layout, axis=1, keepdims=True), 1e-6)
    parts = np.concatenate([colour, edges, layout], axis=1)
    return np.asarray(
        parts / np.maximum(np.linalg.norm(parts, axis=1, keepdims=True), 1e-6), dtype=np.float32
    )
