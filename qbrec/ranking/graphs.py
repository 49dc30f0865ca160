"""Item graphs, and the paths of one or two steps in them that lead from a history to candidates.

Kinds of arrows between items: `follows` (co-occurrence in training histories, in their order), `next` (the
very next item), `together` (in the same history, whatever the order), and one `alike` graph per content view
(nearest neighbours by cosine: titles, pictures, fused vectors).
Two steps reach further than one: what follows the followers, what is like the followers, what follows items
like those of the history. The last two give items with few interactions, or none, a place beside their kin.
Items appended to the catalogue later have arrows of content only: `ItemGraphs.grown`.

    graphs = ItemGraphs(**count_arrows(training, num_items=N, keep=100), alike=views)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from qbrec.errors import DataError
from qbrec.ranking.cooccurrence import recency
from qbrec.ranking.counted import COUNTED, strongest
from qbrec.storage.artifact import Artifact
from qbrec.storage.id_table import ALIKE_KIND
from qbrec.storage.ragged import Ragged

DECAY = 0.6  # of an item's weight against the one after it, for what follows
CONTENT_DECAY = 0.8  # the same for what is alike
TOGETHER_DECAY = 0.95  # and for what is together
GRAPHS = "graphs.safetensors"  # file of an artifact
WALK = 100  # candidates of a first step from which the second one goes on


@dataclass(frozen=True)
class ItemGraphs:
    """Weighted arrows between N items, all float32 CSR [N, N].

    Attributes:
        follows: co(i, j) / ((pop_j + 1)^0.1 · sqrt(pop_i + 1)), see `cooccurrence`.
        next: The same of the very next item only.
        together: Pairs of places in a history that hold both / sqrt((pop_i + 1) · (pop_j + 1)).
        alike: By content view: squared cosine of each item's nearest neighbours.
        back: By content view: the same from items of the catalogue to items appended later.
        num_appended: How many of the items those are: the last ones.
    """

    follows: sp.csr_matrix
    next: sp.csr_matrix
    together: sp.csr_matrix
    alike: Mapping[str, sp.csr_matrix] = field(default_factory=dict)
    back: Mapping[str, sp.csr_matrix] = field(default_factory=dict)
    num_appended: int = 0

    def grown(self, rows: Mapping[str, sp.csr_matrix]) -> ItemGraphs:
        """The graphs with M appended items, whose arrows lead to items of the catalogue that they are like.

        Paths between items of the catalogue stay as they are. An appended item is reached through its own
        list, and directly from those items on it that are as near to it as to the last one of a full list of
        theirs: it would be on that list, had it been there.

        Args:
            rows: By content view, float32 CSR [M, N].

        Returns:
            Graphs over N + M items, the appended ones last.
        """
        assert rows.keys() == self.alike.keys()
        size = self.num_items + max(graph.shape[0] for graph in rows.values())
        follows, after, together = (_padded(getattr(self, name), size) for name in COUNTED)
        alike = {v: _padded(sp.vstack([graph, rows[v]], "csr"), size) for v, graph in self.alike.items()}
        back = {v: _pointing_back(graph, rows[v], size) for v, graph in self.alike.items()}
        return ItemGraphs(follows, after, together, alike, back, size - self.num_items)

    @property
    def num_items(self) -> int:
        """N."""
        return int(self.follows.shape[0])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the paths, in the order of `paths`: the arrows gone along."""
        content = (name.format(view) for view in self.alike for name in CONTENT_PATHS)
        return (*COUNTED, "follows>follows", *content)

    def paths(self, histories: Ragged) -> list[sp.csr_matrix]:
        """Strength with which each path leads from each history to its candidates.

        Square roots: they stay comparable between users, and strong evidence still counts for more.

        Args:
            histories: B rows of item rows, most recent last; rows from N on lead nowhere.

        Returns:
            One float32 CSR [B, N] for each of `names`, non-negative.
        """
        near = recency(histories, decay=DECAY, num_items=self.num_items)
        far = recency(histories, decay=CONTENT_DECAY, num_items=self.num_items)
        walk = strongest(steps(near, self._following), WALK)
        every = recency(histories, decay=TOGETHER_DECAY, num_items=self.num_items)
        found = [
            steps(near, self.follows),
            steps(near, self.next),
            steps(every, self.together),
            steps(walk, self._following),
        ]
        for view, graph in self.alike.items():
            direct = steps(far, graph)
            if view in self.back:
                direct = (direct + steps(far, self.back[view])).tocsr()
            like = strongest(steps(near, self._like[view]), WALK)
            found += [
                direct,
                steps(walk, self._liked_by[view]),
                steps(like, self._following),
            ]
        for matrix in found:
            np.sqrt(matrix.data, out=matrix.data)
        return found

    @cached_property
    def _following(self) -> sp.csr_matrix:
        return _shares(self.follows)

    @cached_property
    def _like(self) -> dict[str, sp.csr_matrix]:
        return {view: _shares(graph) for view, graph in self.alike.items()}

    @cached_property
    def _liked_by(self) -> dict[str, sp.csr_matrix]:
        # From an item to those that count it among their neighbours: an item without interactions is reached
        # through its own list.
        return {view: graph.T.tocsr() for view, graph in self._like.items()}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is kept, by graph and part: `follows.indptr` int64, `.indices` int32, `.data` float32."""
        assert not self.back, "appended items are kept with their generation"
        return parts_of({name: getattr(self, name) for name in COUNTED} | with_prefix(self.alike))

    @classmethod
    def load(cls, artifact: Artifact, appended: Sequence[Artifact] = ()) -> ItemGraphs:
        """From a `neighbours` artifact.

        Args:
            artifact: The graphs of the catalogue.
            appended: Rows of the generations appended since, oldest first; the last ones may have none yet.

        Raises:
            DataError: An artifact is damaged, or the rows do not go on from the graphs.
        """
        graphs = cls.from_arrays(_arrays(artifact))
        if appended:
            graphs = graphs.grown(_appended_rows(artifact, appended, num_items=graphs.num_items))
        _ = graphs._following, graphs._like, graphs._liked_by  # now, not within somebody's first request
        return graphs

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ItemGraphs:
        """What `arrays` gave."""
        graphs = graphs_of(arrays)
        return cls(graphs["follows"], graphs["next"], graphs["together"], without_prefix(graphs))


CONTENT_PATHS = ("{}", "follows>{}", "{}>follows")  # of every content view
_SPARSE = 20  # arrows that are followed at most, as a share of the items, for a product to be made compact
_ALIKE = "alike."
_PARTS = {"indptr": np.int64, "indices": np.int32, "data": np.float32}


def parts_of(graphs: Mapping[str, sp.csr_matrix]) -> dict[str, NDArray[Any]]:
    """Graphs as arrays by graph and part, see `ItemGraphs.arrays`."""
    return {
        f"{name}.{part}": getattr(graph, part).astype(kind)
        for name, graph in graphs.items()
        for part, kind in _PARTS.items()
    }


def graphs_of(
    arrays: Mapping[str, NDArray[Any]], *, num_columns: int | None = None
) -> dict[str, sp.csr_matrix]:
    """What `parts_of` was given; square unless the number of columns is said."""
    found = {}
    for name in (name.removesuffix(".indptr") for name in arrays if name.endswith(".indptr")):
        data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
        rows = len(indptr) - 1
        found[name] = sp.csr_matrix((data, indices, indptr), shape=(rows, num_columns or rows))
    return found


def with_prefix(views: Mapping[str, sp.csr_matrix]) -> dict[str, sp.csr_matrix]:
    """Graphs of content views by the names under which they are kept."""
    return {f"{_ALIKE}{view}": graph for view, graph in views.items()}


def without_prefix(graphs: Mapping[str, sp.csr_matrix]) -> dict[str, sp.csr_matrix]:
    """Graphs of content views among graphs by the names under which they are kept."""
    return {name.removeprefix(_ALIKE): graph for name, graph in graphs.items() if name.startswith(_ALIKE)}


def _arrays(artifact: Artifact) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in artifact.load_safetensors(GRAPHS).items()}


def _appended_rows(
    neighbours: Artifact, appended: Sequence[Artifact], *, num_items: int
) -> dict[str, sp.csr_matrix]:
    """Rows [M, N] of all generations together, by content view."""
    parts, first = [], num_items
    for number, artifact in enumerate(appended, 1):
        ours = artifact.kind == ALIKE_KIND and artifact.inputs.get("neighbours") == neighbours.fingerprint
        if not ours or artifact.meta["first_row"] != first:
            raise DataError(
                f"the graph rows of generation {number} do not go on from the item graphs",
                where=str(artifact.path),
                fix="bring the run up to date with `qbrec run`, then register it again",
            )
        parts.append(without_prefix(graphs_of(_arrays(artifact), num_columns=num_items)))
        first += artifact.meta["num_added"]
    return {view: sp.vstack([part[view] for part in parts], "csr") for view in parts[0]}


def _padded(graph: sp.csr_matrix, size: int) -> sp.csr_matrix:
    """The same arrows among `size` items."""
    indptr = np.pad(graph.indptr, (0, size + 1 - len(graph.indptr)), mode="edge")
    return sp.csr_matrix((graph.data, graph.indices, indptr), shape=(size, size))


def _pointing_back(graph: sp.csr_matrix, rows: sp.csr_matrix, size: int) -> sp.csr_matrix:
    """From items of the catalogue to appended ones that would be on their lists, CSR [size, size]."""
    lengths = np.diff(graph.indptr)
    weakest = np.zeros(len(lengths), np.float32)
    full = np.flatnonzero((lengths > 0) & (lengths == lengths.max(initial=0)))  # the others have room
    weakest[full] = np.minimum.reduceat(np.append(graph.data, np.inf), graph.indptr[:-1])[full]
    arrows = rows.tocoo()
    kept = arrows.data >= weakest[arrows.col]
    places = arrows.col[kept], arrows.row[kept] + graph.shape[0]
    return sp.csr_matrix((arrows.data[kept], places), shape=(size, size))


def _shares(graph: sp.csr_matrix) -> sp.csr_matrix:
    """Rows divided by their sums (empty ones stay empty)."""
    sums = np.asarray(graph.sum(1)).ravel()
    return (sp.diags(1 / np.where(sums > 0, sums, 1)) @ graph).tocsr().astype(np.float32)


def steps(weights: sp.csr_matrix, graph: sp.csr_matrix) -> sp.csr_matrix:
    """`weights` [B, N] times `graph` [N, N]; for a few histories at a cost that does not depend on N."""
    lengths = graph.indptr[weights.indices + 1] - graph.indptr[weights.indices]
    if int(lengths.sum()) * _SPARSE > graph.shape[1]:
        return (weights @ graph).tocsr()
    # scipy fills an array of N numbers for every product: with ten million items that is most of the time.
    rows, at = np.unique(weights.indices, return_inverse=True)
    part = graph[rows]
    columns, to = np.unique(part.indices, return_inverse=True)
    left = sp.csr_matrix((weights.data, at, weights.indptr), shape=(weights.shape[0], len(rows)))
    right = sp.csr_matrix((part.data, to, part.indptr), shape=(len(rows), len(columns)))
    product = (left @ right).tocsr()
    found = (product.data, columns[product.indices], product.indptr)
    return sp.csr_matrix(found, shape=(weights.shape[0], graph.shape[1]))
