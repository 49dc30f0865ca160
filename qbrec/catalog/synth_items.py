"""Items of the synthetic catalogue: taxonomy, wording and pictures, each a pure function of (seed, index)."""

# ruff: noqa: SIM905 - long word lists are read more easily as text

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qbrec.storage.hashing import uniform

Ints = NDArray[np.int64]

DEPARTMENTS: dict[str, tuple[str, ...]] = {
    "Art": ("Paint", "Brush", "Canvas", "Easel", "Sketchbook", "Marker"),
    "Kitchen": ("Pan", "Knife", "Kettle", "Plate", "Grinder", "Whisk"),
    "Garden": ("Spade", "Hose", "Planter", "Seeds", "Trellis", "Pruner"),
    "Music": ("Guitar", "Strings", "Drum", "Keyboard", "Microphone", "Metronome"),
    "Pets": ("Leash", "Bowl", "Aquarium", "Collar", "Kennel", "Treats"),
    "Beauty": ("Shampoo", "Lotion", "Perfume", "Lipstick", "Mirror", "Razor"),
    "Office": ("Pen", "Notebook", "Stapler", "Folder", "Lamp", "Chair"),
    "Sports": ("Ball", "Racket", "Gloves", "Helmet", "Mat", "Bottle"),
    "Toys": ("Puzzle", "Robot", "Doll", "Blocks", "Kite", "Train"),
    "Camping": ("Tent", "Lantern", "Stove", "Backpack", "Hammock", "Compass"),
    "Tools": ("Drill", "Hammer", "Saw", "Wrench", "Clamp", "Ruler"),
    "Science": ("Microscope", "Beaker", "Balance", "Thermometer", "Pipette", "Goggles"),
}
MODIFIERS = tuple(
    "Acrylic Bamboo Ceramic Cordless Cotton Digital Dual Electric Ergonomic Felt Foldable Glass Heavy "
    "Insulated "
    "Junior Kids Leather Magnetic Marine Mini Modular Nylon Organic Outdoor Padded Portable Precision Quick "
    "Recycled Rubber Silent Silicone Solar Stainless Steel Studio Telescopic Titanium Travel Wooden".split()
)
STYLES = tuple(
    "Aurora Basalt Cascade Dune Ember Fjord Glacier Harbor Indigo Juniper Kestrel Lagoon Meadow Nimbus "
    "Orchid "
    "Prairie Quartz Raven Sierra Tundra Umber Velvet Willow Zephyr".split()
)
COLOURS = tuple(
    "Crimson Orange Amber Lime Green Teal Cyan Azure Blue Violet Magenta Rose Olive Coral Mint Navy".split()
)
SIZES = ("Small", "Medium", "Large", "Single", "Pack of 2", "Pack of 4", "Pack of 6", "Family Size")
QUALITIES = tuple(
    "durable lightweight affordable premium washable waterproof compact reliable elegant sturdy smooth quiet "
    "handmade certified adjustable refillable".split()
)
OCCASIONS = tuple("beginners professionals families students collectors travellers schools workshops".split())
SYLLABLES = tuple("nor vik tal mar ben zu ka lo ren sti fel do ari que pon hu".split())
BRANDS_PER_DEPARTMENT = 24
BRANDS = tuple(
    (
        SYLLABLES[b % 16] + SYLLABLES[(b // 16 * 7 + b * 3) % 16] + SYLLABLES[(b * 5 + b // 16) % 16]
    ).capitalize()
    for b in range(len(DEPARTMENTS) * BRANDS_PER_DEPARTMENT)
)
_DEPARTMENT_NAMES = tuple(DEPARTMENTS)
_NOUNS = tuple(DEPARTMENTS[d][n] for n in range(6) for d in _DEPARTMENT_NAMES)  # by category number


@dataclass(frozen=True)
class Taxonomy:
    """Three levels (department, category, leaf) and who complements whom; items of a leaf are contiguous."""

    starts: Ints  # first item index of every leaf, and num_items at the end [F+1]
    active: Ints  # items of the leaf that may be interacted with; the rest are cold [F]
    category: Ints  # [F]
    modifier: Ints  # [F]
    companion: Ints  # the leaf that complements this one: same department [F]
    sibling: Ints  # another leaf of the same category [F]
    seed: int

    @property
    def num_items(self) -> int:
        """Items in the catalogue."""
        return int(self.starts[-1])

    @property
    def num_leaves(self) -> int:
        """Leaves of the tree."""
        return len(self.category)

    @property
    def department(self) -> Ints:
        """Department number of every leaf [F]."""
        return self.category % len(DEPARTMENTS)


def build_taxonomy(num_items: int, *, seed: int, cold: float) -> Taxonomy:
    """Lay `num_items` out over 12 departments, up to 72 categories and up to 2,880 leaves."""
    num_leaves = int(np.clip(num_items // 20, 1, 72 * len(MODIFIERS)))
    num_categories = min(72, num_leaves)
    leaf = np.arange(num_leaves)
    category = leaf % num_categories
    modifier = (leaf // num_categories + category * 7) % len(MODIFIERS)
    rng = np.random.default_rng([seed, 1])
    share = np.cumsum(0.5 + rng.random(num_leaves))
    starts = np.concatenate([[0], np.floor(share / share[-1] * num_items)]).astype(np.int64)
    starts[-1] = num_items
    # Cumulative rounding: the number of cold items is right to within one over the whole catalogue.
    num_cold = np.diff(np.floor(starts * cold).astype(np.int64))
    active = np.maximum(np.diff(starts) - num_cold, 1)
    companion, sibling = leaf.copy(), leaf.copy()
    for group, target in ((category % len(DEPARTMENTS), companion), (category, sibling)):
        order = rng.permutation(num_leaves)
        order = order[np.argsort(group[order], kind="stable")]
        bounds = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
        for begin, end in pairwise(bounds):
            cycle = order[begin:end]
            target[cycle] = np.roll(cycle, -1)
    return Taxonomy(starts, active, category, modifier, companion, sibling, seed)


@dataclass(frozen=True)
class ItemTruth:
    """What is known about items [n], before any wording: what a perfect encoder would find."""

    index: Ints
    content: Ints  # the index whose content this item shows: smaller than `index` for a duplicate listing
    leaf: Ints
    position: Ints  # of the content within its leaf
    style: Ints
    colour: Ints
    brand: Ints
    cold: NDArray[np.bool_]
    has_image: NDArray[np.bool_]
    has_description: NDArray[np.bool_]


def item_truth(
    tree: Taxonomy, index: Ints, *, duplicates: float, missing_images: float, missing_descriptions: float
) -> ItemTruth:
    """Attributes of the items `index` [n]; independent of how the catalogue is cut into chunks."""

    def draw(of: Ints, stream: int) -> NDArray[np.float64]:
        return uniform(of.astype(np.uint64), stream=tree.seed * 64 + stream)

    leaf = np.searchsorted(tree.starts, index, side="right") - 1
    own = index - tree.starts[leaf]
    # Never two copies in a row, so an original is always an original; a rate of p needs p / (1 - p) draws.
    rate = duplicates / max(1e-9, 1 - duplicates)
    copy = (draw(index, 1) < rate) & ~(draw(index - 1, 1) < rate) & (own > 0)
    content = index - copy
    position = content - tree.starts[leaf]
    brand_local = (draw(leaf, 2) * BRANDS_PER_DEPARTMENT).astype(np.int64) + (draw(content, 3) * 4).astype(
        np.int64
    )
    return ItemTruth(
        index=index,
        content=content,
        leaf=leaf,
        position=position,
        style=position % len(STYLES),
        colour=(draw(content, 4) * len(COLOURS)).astype(np.int64),
        brand=tree.department[leaf] * BRANDS_PER_DEPARTMENT + brand_local % BRANDS_PER_DEPARTMENT,
        cold=own >= tree.active[leaf],
        has_image=draw(content, 5) >= missing_images,
        has_description=draw(content, 6) >= missing_descriptions,
    )


def item_ids(index: Ints) -> pa.Array:
    """`i000000042`: one id per index; rows follow the hash of the id, so the number tells a model nothing."""
    text = pc.utf8_lpad(pc.cast(pa.array(index), pa.string()), 9, "0")
    return pc.binary_join_element_wise(pa.scalar("i"), text, "")


def item_table(tree: Taxonomy, truth: ItemTruth) -> pa.Table:
    """The items in the input contract: item_id, title, description, brand, categories (no pictures)."""

    def words(vocabulary: tuple[str, ...], which: Ints) -> pa.Array:
        return pa.array(vocabulary).take(pa.array(which))

    def draw(stream: int, n: int) -> Ints:
        return (uniform(truth.content.astype(np.uint64), stream=tree.seed * 64 + stream) * n).astype(np.int64)

    join = pc.binary_join_element_wise
    leaf, category = truth.leaf, tree.category[truth.leaf]
    noun, modifier = words(_NOUNS, category), words(MODIFIERS, tree.modifier[leaf])
    brand, style = words(BRANDS, truth.brand), words(STYLES, truth.style)
    leaf_name = join(modifier, noun, " ")
    number = pc.cast(pa.array(truth.position // len(STYLES) + 1), pa.string())
    title = join(
        brand,
        style,
        leaf_name,
        words(COLOURS, truth.colour),
        words(SIZES, draw(7, len(SIZES))),
        "No.",
        number,
        " ",
    )
    friend = tree.companion[leaf]
    lower = pc.utf8_lower
    description = join(
        "The", words(QUALITIES, draw(8, len(QUALITIES))), style, lower(noun), "in", lower(modifier),
        "finish, for",
        words(OCCASIONS, draw(9, len(OCCASIONS))), "who love", lower(words(_DEPARTMENT_NAMES, category % 12)),
        "and want something", words(QUALITIES, draw(10, len(QUALITIES))), "- goes with the", style,
        lower(words(MODIFIERS, tree.modifier[friend])), lower(words(_NOUNS, tree.category[friend])), " ",
    )  # fmt: skip
    names = [words(_DEPARTMENT_NAMES, category % 12), noun, leaf_name]
    offsets = pa.array(np.arange(0, 3 * len(leaf) + 1, 3, dtype=np.int32))
    interleaved = pa.concat_arrays(names).take(pa.array(np.arange(3 * len(leaf)).reshape(3, -1).T.ravel()))
    return pa.table(
        {
            "item_id": item_ids(truth.index),
            "title": title,
            "description": pc.if_else(
                pa.array(truth.has_description), description, pa.scalar(None, pa.string())
            ),
            "brand": brand,
            "categories": pa.ListArray.from_arrays(offsets, interleaved),
        }
    )


def _hsv(hue: NDArray[np.float64], saturation: float, value: float) -> NDArray[np.float64]:
    k = (np.array([5.0, 3.0, 1.0]) + hue[:, None] * 6.0) % 6.0
    return value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)


def render_images(tree: Taxonomy, truth: ItemTruth, *, size: int) -> NDArray[np.uint8]:
    """Pictures [n, size, size, 3]: ground by department, shape by category, stripes by leaf."""
    n = len(truth.leaf)
    category = tree.category[truth.leaf]
    jitter = [uniform(truth.content.astype(np.uint64), stream=tree.seed * 64 + s) - 0.5 for s in (11, 12, 13)]
    axis = np.linspace(-1, 1, size)
    x = axis[None, None, :] - 0.4 * jitter[0][:, None, None]
    y = axis[None, :, None] - 0.4 * jitter[1][:, None, None]
    radius = (0.6 + 0.25 * jitter[2])[:, None, None]
    distance = np.stack(
        np.broadcast_arrays(
            np.hypot(x, y) - radius,  # disc
            np.maximum(np.abs(x), np.abs(y)) - radius * 0.85,  # square
            np.abs(x) + np.abs(y) - radius * 1.1,  # diamond
            np.abs(np.hypot(x, y) - radius) - 0.18,  # ring
            np.minimum(np.maximum(np.abs(x) * 3, np.abs(y)), np.maximum(np.abs(x), np.abs(y) * 3))
            - radius,  # cross
            np.maximum(np.abs(x) * 2.2, np.abs(y)) - radius,  # bar
        )
    )[category // 12, np.arange(n)]
    angle = (tree.modifier[truth.leaf] % 8 * np.pi / 8)[:, None, None]
    frequency = (4.0 + 3.0 * (tree.modifier[truth.leaf] // 8))[:, None, None]
    stripes = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle))) > 0
    back = _hsv(category % 12 / 12.0, 0.35, 0.95)[:, None, None, :]
    paint = _hsv(truth.colour / 16.0, 0.9, 0.85)[:, None, None, :]
    inside = np.where(stripes[..., None], paint, paint * 0.55)
    return (np.where((distance < 0)[..., None], inside, back) * 255).astype(np.uint8)


def encode_png(images: NDArray[np.uint8]) -> list[bytes]:
    """Pictures uint8 [n, h, w, 3] as PNG files (8-bit RGB, no filter)."""
    n, height, width, _ = images.shape
    lines = np.zeros((n, height, 1 + 3 * width), dtype=np.uint8)
    lines[:, :, 1:] = images.reshape(n, height, 3 * width)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    tail = chunk(b"IEND", b"")
    return [head + chunk(b"IDAT", zlib.compress(picture.tobytes(), 1)) + tail for picture in lines]
