"""Two versions user by user: what one gains over the other on the same hold-out, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from qbrec.config.sections import GateConfig
from qbrec.errors import DataError
from qbrec.evaluation.bootstrap import UserSums, interval
from qbrec.evaluation.results import MODEL
from qbrec.ranking import METRICS, metrics_of_ranks
from qbrec.registry.gate import Check
from qbrec.registry.metrics import SEEN
from qbrec.storage.artifact import Artifact

RESAMPLES = 10_000
RANKS = "ranks.parquet"
USER_KEY = ("domain", "user", "target_row")
# Of a catalogue, what numbers its items and users, and who is asked for what. Features are no part of it: a
# version with another text encoder, or of another seed, ranked the same items for the same users.
HOLD_OUT = (
    "hashes.npy",
    "item_domain.npy",
    "retired.npy",
    "representatives.npy",
    "users.arrow",
    "histories-*.tar",
)
_SLICE = "in_"
_FEW = 1000  # different values up to which resamples are drawn as counts of the values


@dataclass(frozen=True)
class Evaluated:
    """What a version, or a run, can be compared by.

    Attributes:
        evaluation: Its evaluation.
        open_catalog: Opens the catalogue whose users it ranked for (of that one the manifest is enough); a
            `DataError` where it cannot be had.
    """

    evaluation: Artifact
    open_catalog: Callable[[], Artifact]


@dataclass(frozen=True)
class Paired:
    """A mean difference over users; the ends are those of a 95 % interval."""

    mean: float
    low: float
    high: float
    num_users: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} … {self.high:+.4f}) on {self.num_users:,} users"


class Comparison:
    """Two evaluations of the same users.

    Args:
        ours: Evaluation artifact of one version.
        theirs: Of the one that it is compared with.
        seed: Of the bootstrap.

    Attributes:
        problem: Why they cannot be paired; empty where they can.

    Raises:
        DataError: One of them is damaged.
    """

    def __init__(self, ours: Artifact, theirs: Artifact, *, seed: int) -> None:
        self._seed = seed
        keys, self._ours, self._slices = _users(ours)
        other, self._theirs, _ = _users(theirs)
        self.problem = ""
        if keys.shape != other.shape or not np.array_equal(keys, other):
            self.problem = (
                "the two evaluations did not rank the same users; evaluate both with equal settings"
            )

    @property
    def slices(self) -> Mapping[str, NDArray[np.bool_]]:
        """Membership of every user by slice, bool [users]."""
        return self._slices

    def of(self, name: str) -> Paired | str:
        """The difference in one metric, `ndcg@10`, or `tail/ndcg@10` on a slice; or why there is none."""
        part, _, metric = name.rpartition("/")
        if metric not in METRICS:
            return f"no such metric is computed; those are {', '.join(METRICS)}"
        if part and part not in self._slices:
            return f"the evaluation has no slice {part!r}, only {', '.join(sorted(self._slices))}"
        column = METRICS.index(metric)
        differences = self._ours[:, column] - self._theirs[:, column]
        if part:
            differences = differences[self._slices[part]]
        if not len(differences):
            return f"nobody is in the slice {part!r}"
        return paired_interval(differences, seed=self._seed)


def same_hold_out(ours: Evaluated, theirs: Evaluated) -> bool:
    """Whether two evaluations are of the same items, users and histories: their numbers mean the same.

    Raises:
        DataError: They are of two catalogues, and one of these cannot be opened.
    """
    if ours.evaluation.inputs["catalog"] == theirs.evaluation.inputs["catalog"]:
        return True
    return _hold_out(ours.open_catalog()) == _hold_out(theirs.open_catalog())


def check_champion(
    challenger: Evaluated, champion: Evaluated, *, gate: GateConfig, seed: int
) -> tuple[Check, ...]:
    """Non-inferiority on the same users: the lower end of the interval of the mean paired difference.

    Args:
        challenger: Of the version that wants to serve.
        champion: Of the version that serves.
        gate: How much may be lost in which metric, and what holds when the hold-outs differ.
        seed: Of the bootstrap.

    Raises:
        DataError: One of them is damaged.
    """
    if not same_hold_out(challenger, champion):
        what = "the champion was evaluated on other items or histories, so users cannot be paired"
        return (without_comparison(what, key="other_catalog", passed=gate.other_catalog == "floors"),)
    comparison = Comparison(challenger.evaluation, champion.evaluation, seed=seed)
    checks = []
    for name, loss in sorted(gate.max_loss.items()):
        found = comparison.problem or comparison.of(name)
        title = f"not worse than @champion in {name}"
        if isinstance(found, str):
            checks.append(Check(title, False, found))
        else:
            reason = f"difference {found}, lower end must be ≥ {-loss:+.4f}"
            checks.append(Check(title, found.low >= -loss, reason))
    return tuple(checks)


def without_comparison(what: str, *, key: str, passed: bool) -> Check:
    """The answer where nothing can be compared with the champion.

    Args:
        what: Why not.
        key: Of the gate, which decides it.
        passed: Whether that is `floors`.
    """
    word = f"floors decide ({key}: floors)" if passed else f"with `{key}: floors` in the gate, floors decide"
    return Check("comparison with @champion", passed, f"{what}; {word}")


def paired_interval(differences: NDArray[np.float64], *, seed: int) -> Paired:
    """Mean and 95 % percentile interval of a paired bootstrap over users.

    A difference of two metrics cut off at 20 takes few values, so whole resamples are drawn as multinomial
    counts of the values: the very distribution of drawing users with replacement, at a cost free of their
    number. MRR takes about as many as there are users; those are resampled as everywhere else.

    Args:
        differences: Per user, float64 [users].
        seed: Of the resamples.
    """
    values, counts = np.unique(differences, return_counts=True)
    total = len(differences)
    if len(values) <= _FEW:
        draws = np.random.default_rng(seed).multinomial(total, counts / total, size=RESAMPLES)
        means = (draws @ values / total)[:, None]
    else:
        sums = UserSums(total, seed=seed)
        sums.add(np.stack([differences, np.ones(total)], axis=1))
        resampled = sums.resampled(resamples=RESAMPLES // 10, seed=seed)
        means = resampled[:, :1] / resampled[:, 1:]
    low, high = interval(means)
    return Paired(float(differences.mean()), float(low[0]), float(high[0]), total)


def _hold_out(catalog: Artifact) -> dict[str, str]:
    """SHA-256 of each file that makes up the hold-out."""
    files = catalog.manifest["files"]
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if any(fnmatchcase(name, pattern) for pattern in HOLD_OUT)
    }


def _users(
    evaluation: Artifact,
) -> tuple[NDArray[np.int64], NDArray[np.float64], dict[str, NDArray[np.bool_]]]:
    """User keys int64 [users, 3], sorted; each one's metrics [users, M]; membership of the slices [users]."""
    import pyarrow.parquet as pq

    column = f"{MODEL}_{SEEN}"
    path = evaluation.file(RANKS)
    table = pq.read_table(path)
    missing = [name for name in (*USER_KEY, column) if name not in table.column_names]
    if missing:
        raise DataError(
            f"the ranks lack the columns {missing}", where=str(path), fix="evaluate the run again"
        )
    keys = np.stack([table[name].to_numpy().astype(np.int64) for name in USER_KEY], axis=1)
    order = np.lexsort(keys.T[::-1])
    slices = {
        name.removeprefix(_SLICE): table[name].to_numpy()[order]
        for name in table.column_names
        if name.startswith(_SLICE)
    }
    ranks = table[column].to_numpy().astype(np.int64)
    return keys[order], metrics_of_ranks(ranks[order]), slices
