"""What the page is made of, before it becomes HTML. Texts are plain: the template escapes every one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A table cell with an optional smaller second line.

    `picture` is a data URI, empty where one is missing; None: there is no room for one.
    """

    text: str
    note: str = ""
    picture: str | None = None


@dataclass(frozen=True)
class Row:
    """A table row; `strong` marks ours."""

    cells: Sequence[Cell]
    strong: bool = False


@dataclass(frozen=True)
class Item:
    """A line of a list in a card; `picture` as in `Cell`."""

    text: str
    label: str = ""
    note: str = ""
    picture: str | None = None


@dataclass(frozen=True)
class Part:
    """A named list in a card."""

    name: str
    entries: Sequence[Item]


@dataclass(frozen=True)
class Card:
    """One example."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Branch:
    """A prefix in the tree of IDs.

    Attributes:
        code: Its last code, as a token.
        words: What sets it apart.
        count: Items below it.
        width: Percent of the largest count among its siblings.
        titles: Some of its items.
        branches: Prefixes one code longer.
        more: What of it is not shown; empty where all is.
    """

    code: str
    words: str
    count: int
    width: int
    titles: Sequence[str] = ()
    branches: Sequence[Branch] = ()
    more: str = ""


@dataclass(frozen=True)
class Block:
    """Charts (SVG), a table, cards, a tree or plain text under a heading.

    `numeric` and `code` name columns of the table. With a `summary` the table and the text are folded away.
    """

    title: str = ""
    text: str = ""
    charts: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    numeric: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()
    cards: Sequence[Card] = ()
    tree: Sequence[Branch] = ()
    summary: str = ""
    pre: str = ""


@dataclass(frozen=True)
class Stage:
    """One station of the flow."""

    name: str
    time: str
    fact: str
    fingerprint: str


@dataclass(frozen=True)
class Section:
    """A chapter with its anchor."""

    id: str
    name: str
    texts: Sequence[str] = ()
    flow: Sequence[Stage] = ()
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    value: str
    text: str


def cells(values: Iterable[object]) -> tuple[Cell, ...]:
    """Cells of texts and numbers; integers get thousands separators."""
    return tuple(Cell(f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v)) for v in values)
