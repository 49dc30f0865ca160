"""The service without Ray: what requests get, what is ranked together, overload, another version."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from qbrec.config import RootConfig, parse_config
from qbrec.registry.recommend import Recommender
from qbrec.serving.http import Api
from qbrec.serving.live import LiveModel, LoadedModel
from qbrec.serving.versions import Version
from tests.support.http_server import Answer, ask, served
from tests.unit.test_ranking_recommend import recommender as in_memory

HISTORIES = [["i3", "i7"], ["i100"], ["i1", "i2", "i3"]]


@dataclass
class Seen:
    """An observer."""

    statuses: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    now_waiting: int = 0

    def answered(self, status: int, seconds: float) -> None:
        assert seconds > 0
        self.statuses.append(status)

    def batch(self, histories: int) -> None:
        self.batches.append(histories)

    def waiting(self, histories: int) -> None:
        self.now_waiting = histories


@dataclass
class Service:
    """A running service."""

    port: int
    live: LiveModel
    seen: Seen

    def recommend(self, histories: Any, **further: Any) -> Answer:
        return ask(self.port, "POST", "/v1/recommend", {"histories": histories, **further})


def loaded(model: Recommender, number: str = "1") -> LoadedModel:
    return LoadedModel(Version("qbrec", number, "run", {"ndcg_at_10": 0.5}), model)


@contextmanager
def service(model: Recommender | None, **limits: Any) -> Iterator[Service]:
    config: RootConfig = parse_config({"serving": limits})
    live, seen = LiveModel(config, "models:/qbrec@champion"), Seen()
    live.current = None if model is None else loaded(model)
    with served(Api(live, limits=config.serving, observer=seen).app()) as port:
        yield Service(port, live, seen)


@pytest.fixture(scope="module")
def model() -> Recommender:
    return in_memory()


def columns(lists: Any) -> list[dict[str, Any]]:
    names = ("item_id", "score", "title", "semantic_id", "label")
    return [{name: [item[name] for item in items] for name in names} for items in lists]


class Gate:
    """Holds every ranking of a recommender until it is opened."""

    def __init__(self, model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        rank = model.rank

        def held(*args: Any, **options: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(30)
            return rank(*args, **options)

        monkeypatch.setattr(model, "rank", held)


def test_alive_first_ready_with_a_model(model: Recommender) -> None:
    with service(None) as it:
        assert ask(it.port, "GET", "/healthz").status == 200
        for answer in (ask(it.port, "GET", "/readyz"), it.recommend(HISTORIES)):
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.body["error"]["what"] == "no version is loaded yet"
        assert ask(it.port, "GET", "/v1/model").body["serving"] is None
        it.live.current = loaded(model)
        assert ask(it.port, "GET", "/readyz").status == 200
        told = ask(it.port, "GET", "/v1/model").body
        assert told["uri"] == "models:/qbrec@champion"
        assert {name: told["serving"][name] for name in ("name", "number", "run", "metrics")} == {
            "name": "qbrec", "number": "1", "run": "run", "metrics": {"ndcg_at_10": 0.5},
        }  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("k", 0), ("keep_seen", "yes"), ("categories", "Lamps")])
def test_the_fix_is_that_of_the_field(model: Recommender, name: str, value: Any) -> None:
    with service(model) as it:
        answer = it.recommend(HISTORIES, **{name: value})
        assert answer.status == 422
        assert f"leave {name} out" in answer.body["error"]["fix"]
        assert answer.body["error"]["where"] == name


def test_lists_are_the_recommenders(model: Recommender) -> None:
    with service(model) as it:
        answer = it.recommend(HISTORIES, k=5)
        assert answer.status == 200
        assert answer.body["model"] == {"name": "qbrec", "version": "1"}
        assert answer.body["recommendations"] == columns(model.recommend(HISTORIES, k=5))
        assert len(it.recommend(HISTORIES[:1]).body["recommendations"][0]["item_id"]) == 10
        seen = it.recommend([["i1"]], k=model.num_candidates, keep_seen=True).body["recommendations"][0]
        assert "i1" in seen["item_id"]
        among = model.only(categories=["c1"])
        answer = it.recommend(HISTORIES, k=5, categories=["c1"])
        assert answer.body["recommendations"] == columns(model.recommend(HISTORIES, k=5, among=among))


@pytest.mark.parametrize(
    ("body", "status", "what"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"\xff", 400, "Invalid JSON"),
        ([], 422, "should be an object"),
        ({}, 422, "Field required"),
        ({"histories": []}, 422, "at least 1 item"),
        ({"histories": [[1]]}, 422, "valid string"),
        ({"histories": [["i1"]], "kk": 3}, 422, "Extra inputs"),
        ({"histories": [["i1"]], "k": 0}, 422, "greater than or equal to 1"),
        ({"histories": [["i1"]], "k": "5"}, 422, "valid integer"),
        ({"histories": [["i1"]], "k": 97}, 422, "has 96 items"),
        ({"histories": [["i1"]], "categories": ["c1"], "k": 50}, 422, "that the filter allows"),
        ({"histories": [["i1"]], "k": 101}, 422, "too much for k"),
        ({"histories": [["i1"]] * 5}, 422, "5 is too much for histories"),
        ({"histories": [["i1"] * 7]}, 422, "7 is too much for items of a history"),
        ({"histories": [["i" * 1025]]}, 422, "more than 1024 characters"),
        ({"histories": [[]]}, 422, "a history is empty"),
        ({"histories": [["i1"], ["i1", "i10x"]]}, 422, "unknown item id 'i10x'"),
        ({"histories": [["i1"]], "categories": ["nowhere"]}, 422, "no item on offer is in the category"),
        (b" " * 3000, 413, "more than 2000 bytes"),
    ],
)
def test_bad_requests_say_why(model: Recommender, body: Any, status: int, what: str) -> None:
    limits = {"max_histories": 4, "max_history_items": 6, "max_k": 100, "max_body_bytes": 2000}
    with service(model, **limits) as it:
        answer = ask(it.port, "POST", "/v1/recommend", body)
        assert (answer.status, it.seen.statuses) == (status, [status])
        assert what in answer.body["error"]["what"]
        if "i10x" in str(body):
            assert "did you mean i10" in answer.body["error"]["fix"]
            assert answer.body["error"]["where"] == "history 1"
        assert it.recommend([["i1"]]).status == 200


def test_a_chunked_body_is_bounded_too(model: Recommender) -> None:
    import http.client

    with service(model, max_body_bytes=2000) as it:
        connection = http.client.HTTPConnection("127.0.0.1", it.port, timeout=30)
        connection.request("POST", "/v1/recommend", iter([b" " * 1500] * 3), encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        assert connection.getresponse().status == 413
        connection.close()


def test_what_is_not_there_is_told(model: Recommender) -> None:
    with service(model) as it:
        assert ask(it.port, "GET", "/v1/nothing").status == 404
        wrong = ask(it.port, "GET", "/v1/recommend")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert "POST /v1/recommend" in wrong.body["error"]["fix"]


def test_no_traceback_comes_out(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("the secret")

    with service(model) as it:
        monkeypatch.setattr(model, "rank", broken)
        answer = it.recommend(HISTORIES)
        assert answer.status == 500
        assert "secret" not in str(answer)
        monkeypatch.undo()
        assert it.recommend(HISTORIES).status == 200


@pytest.mark.parametrize(
    ("limits", "sizes"), [({}, [1, 7]), ({"max_batch": 3}, [1, 3, 3, 1]), ({"max_batch": 1}, [1] * 8)]
)
def test_what_waits_is_ranked_together(
    model: Recommender, monkeypatch: pytest.MonkeyPatch, limits: Any, sizes: list[int]
) -> None:
    """One is being ranked; seven come meanwhile, one of them with an unknown item, which harms nobody."""
    gate = Gate(model, monkeypatch)
    with service(model, max_wait_ms=300.0, **limits) as it, ThreadPoolExecutor(9) as pool:
        first = pool.submit(it.recommend, HISTORIES[:1])
        assert gate.entered.wait(30)
        others = [pool.submit(it.recommend, [HISTORIES[n % 3]], k=4 + n % 2) for n in range(7)]
        bad = pool.submit(it.recommend, [["nothing"]])
        assert bad.result().status == 422
        while it.seen.now_waiting < 8:
            time.sleep(0.005)
        gate.opened.set()
        assert first.result().status == 200
        for n, other in enumerate(others):
            expected = columns(model.recommend([HISTORIES[n % 3]], k=4 + n % 2))
            assert other.result().body["recommendations"] == expected
        assert it.seen.batches == sizes
        assert it.seen.now_waiting == 0


def test_a_history_waits_for_company_as_long_as_it_may(model: Recommender) -> None:
    with service(model, max_wait_ms=300.0) as it:
        start = time.monotonic()
        assert it.recommend(HISTORIES[:1]).status == 200
        assert time.monotonic() - start >= 0.3
    with service(model, max_wait_ms=1000.0, max_batch=2) as it, ThreadPoolExecutor(2) as pool:
        assert [a.status for a in pool.map(it.recommend, [HISTORIES[:1], HISTORIES[1:2]])] == [200, 200]
        assert it.seen.batches == [2]


def test_beyond_the_queue_is_told_to_come_back(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(model, monkeypatch)
    with service(model, max_waiting=4) as it, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(it.recommend, HISTORIES[:2]) for _ in range(2)]
        assert gate.entered.wait(30)
        while it.seen.now_waiting < 4:
            time.sleep(0.005)
        answer = it.recommend(HISTORIES[:1])
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "4 histories wait already" in answer.body["error"]["what"]
        assert ask(it.port, "GET", "/readyz").status == 200
        gate.opened.set()
        assert [one.result().status for one in waiting] == [200, 200]
        assert it.recommend(HISTORIES[:1]).status == 200


def test_requests_under_way_stay_with_their_version(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(model, monkeypatch)
    other = in_memory("autoregressive")
    with service(model) as it, ThreadPoolExecutor(1) as pool:
        early = pool.submit(it.recommend, HISTORIES, k=5)
        assert gate.entered.wait(30)
        it.live.current = loaded(other, "2")
        gate.opened.set()
        assert early.result().body["model"]["version"] == "1"
        assert early.result().body["recommendations"] == columns(in_memory().recommend(HISTORIES, k=5))
        late = it.recommend(HISTORIES, k=5)
        assert late.body["model"]["version"] == "2"
        assert late.body["recommendations"] == columns(other.recommend(HISTORIES, k=5))


def test_filters_are_made_once(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    only = model.only
    monkeypatch.setattr(model, "only", lambda **asked: made.append(asked) or only(**asked))
    with service(model) as it:
        for categories in (["c1", "c2"], ["c2", "c1", "c1"], ["c0"]):
            assert it.recommend(HISTORIES, k=5, categories=categories).status == 200
    assert [one["categories"] for one in made] == [["c1", "c2"], ["c0"]]
