"""The version that serves now: loaded beside the one before it, warmed up, then put in its place."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qbrec.config import RootConfig
from qbrec.errors import QbrecError
from qbrec.registry.recommend import BATCH, Recommender
from qbrec.serving.versions import Version, fetch_bundle, find_version

if TYPE_CHECKING:
    from qbrec.ranking.recommend import Allowed

log = logging.getLogger("qbrec.serving")

_FILTERS = 64  # category filters of a version that are kept ready
_WARM_UP_K = 10
_LONGEST_PAUSE_S = 600.0  # between two attempts to load a version that does not load


@dataclass
class LoadedModel:
    """A version that can answer.

    Attributes:
        version: Which one it is.
        recommender: It, opened.
        since: When it was loaded, seconds since 1970.
    """

    version: Version
    recommender: Recommender
    since: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self._filters: OrderedDict[frozenset[str], Allowed] = OrderedDict()

    def among(self, categories: Sequence[str]) -> Allowed:
        """The filter of some categories, made ready once; from one thread at a time.

        Raises:
            DataError: No item on offer is in one of them.
        """
        key = frozenset(categories)
        if key not in self._filters:
            self._filters[key] = self.recommender.only(categories=sorted(key))
        self._filters.move_to_end(key)
        if len(self._filters) > _FILTERS:
            self._filters.popitem(last=False)
        return self._filters[key]

    def warm_up(self) -> None:
        """Rank full batches as requests will: what is made ready by the first one is ready now."""
        recommender = self.recommender
        k = min(_WARM_UP_K, recommender.num_candidates)
        recommender.recommend([recommender.popular(3)] * BATCH, k=k)
        recommender.recommend([recommender.popular(1)], k=k)


class LiveModel:
    """Keeps the version of an alias in service; a thread of its own looks for another one.

    Requests take `current` once and stay with what they took, so a swap disturbs nobody: both versions are
    in memory while one is loaded and until the last request of the old one is answered.

    Args:
        config: Names the registry and says how often it is asked.
        uri: `models:/name@alias`, or `models:/name/3`, which never changes.
        device: Where the encoder runs.
    """

    def __init__(self, config: RootConfig, uri: str, *, device: str = "cpu") -> None:
        self._config, self._uri, self._device = config, uri, device
        self.current: LoadedModel | None = None
        self._failed: dict[str, Any] | None = None
        self._registry_error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qbrec-live", daemon=True)

    def start(self) -> None:
        """Begin to look for a version; returns at once."""
        # Bundles are plain files; should anything ever ask MLflow to unpickle, the answer is no.
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()

    @property
    def is_alive(self) -> bool:
        """Whether somebody still looks."""
        return self._thread.is_alive() or self._stop.is_set()

    def describe(self) -> dict[str, Any]:
        """What serves, what did not load, and whether the registry answers; JSON-able."""
        current = self.current
        return {
            "uri": self._uri,
            "serving": None if current is None else {**asdict(current.version), "since": current.since},
            "failed": self._failed,
            "registry_error": self._registry_error,
        }

    def _watch(self) -> None:
        attempts, next_attempt = 0, 0.0
        while True:
            wanted = self._wanted()
            if wanted is not None and self._failed is not None and self._failed["version"] != wanted.number:
                self._failed, attempts, next_attempt = None, 0, 0.0
            if wanted is not None and self._differs(wanted) and time.monotonic() >= next_attempt:
                attempts += 1
                pause = min(self._config.serving.poll_s * 2**attempts, _LONGEST_PAUSE_S)
                next_attempt = time.monotonic() + pause
                if self._load(wanted):
                    attempts, next_attempt = 0, 0.0
            if self._stop.wait(self._config.serving.poll_s):
                return

    def _differs(self, wanted: Version) -> bool:
        return self.current is None or self.current.version.number != wanted.number

    def _wanted(self) -> Version | None:
        try:
            found = find_version(self._config, self._uri)
        except Exception as error:
            text = _told(error)
            if text != self._registry_error:
                log.warning("the registry cannot be asked, the model stays as it is: %s", text)
            self._registry_error = text
            return None
        self._registry_error = None
        return found

    def _load(self, version: Version) -> bool:
        log.warning("loading %s", version)
        try:
            recommender = Recommender.load(fetch_bundle(self._config, version), device=self._device)
            model = LoadedModel(version, recommender)
            model.warm_up()
        except Exception as error:  # whatever is wrong with it: the version before goes on serving
            self._failed = {"version": version.number, "error": _told(error), "at": time.time()}
            before = self.current.version if self.current is not None else "no version"
            log.exception("%s does not load, %s goes on serving", version, before)
            return False
        self.current, self._failed = model, None
        log.warning("%s serves", version)
        return True


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, QbrecError) else f"{type(error).__name__}: {error}"
