"""Requests that come together are ranked together, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qbrec.config.sections import ServingConfig
from qbrec.registry.item_names import Recommendation
from qbrec.serving.live import LoadedModel
from qbrec.storage.ragged import Ragged

if TYPE_CHECKING:
    from qbrec.ranking.recommend import Allowed

_SUGGEST_FROM = 2_000  # ids an unknown one is compared with: some 40 ms
Lists = list[list[Recommendation]]


class Overloaded(Exception):
    """More histories are under way than may be: come back later."""


@dataclass(frozen=True)
class Question:
    """What one request asks for; see `Recommender.recommend`."""

    histories: Sequence[Sequence[str]]
    k: int = 10
    keep_seen: bool = False
    categories: Sequence[str] | None = None


@dataclass
class _Job:
    model: LoadedModel
    rows: Ragged
    k: int
    keep_seen: bool
    among: Allowed | None
    answer: asyncio.Future[Lists]

    @property
    def kind(self) -> tuple[int, int, bool, int]:
        """Jobs of one kind can be ranked in one call."""
        return id(self.model), self.k, self.keep_seen, id(self.among)


class Batcher:
    """Ranks the histories of concurrent requests together.

    A history waits `max_wait_ms` for others at most, and only while nothing is ranked. Ranking has one
    thread: it uses the cores that the replica has.

    Args:
        limits: Sizes and waiting times.
        on_batch: Told the histories of every batch.
        on_waiting: Told how many histories have no answer yet, whenever that changes.
    """

    def __init__(
        self, limits: ServingConfig, *, on_batch: Callable[[int], None], on_waiting: Callable[[int], None]
    ) -> None:
        self._limits, self._on_batch, self._on_waiting = limits, on_batch, on_waiting
        self._waiting = 0
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._ranking = ThreadPoolExecutor(1, thread_name_prefix="qbrec-rank")
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="qbrec-look-up")
        # A category that nobody has asked for takes a pass over the catalogue: others must not wait for it.
        self._filtering = ThreadPoolExecutor(1, thread_name_prefix="qbrec-filter")
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; within a running event loop."""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End, once nobody asks any more."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        self._ranking.shutdown(wait=True)
        self._looking.shutdown(wait=True)
        self._filtering.shutdown(wait=True)

    async def ask(self, model: LoadedModel, question: Question) -> Lists:
        """The lists of one request.

        Args:
            model: What answers, also where another one begins to serve meanwhile.
            question: What is asked.

        Raises:
            Overloaded: Too many histories wait.
            QbrecError: The question cannot be answered: an unknown item or category, k out of range.
        """
        count = len(question.histories)
        if self._waiting + count > self._limits.max_waiting:
            raise Overloaded
        self._count(count)
        try:
            loop = asyncio.get_running_loop()
            among = None
            if question.categories:
                among = await loop.run_in_executor(self._filtering, model.among, question.categories)
            rows = await loop.run_in_executor(self._looking, _looked_up, model, question, among)
            job = _Job(model, rows, question.k, question.keep_seen, among, loop.create_future())
            self._jobs.put_nowait(job)
            return await job.answer
        finally:
            self._count(-count)

    def _count(self, more: int) -> None:
        self._waiting += more
        self._on_waiting(self._waiting)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = await self._gather()
            try:
                answers = await loop.run_in_executor(self._ranking, _answers, jobs)
            except Exception as error:
                answers = [error] * len(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if job.answer.done():
                    continue  # the client is gone
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

    async def _gather(self) -> list[_Job]:
        """The next jobs: those that wait already, then those that come soon enough."""
        jobs = [await self._jobs.get()]
        count = len(jobs[0].rows)
        deadline = asyncio.get_running_loop().time() + self._limits.max_wait_ms / 1000
        while count < self._limits.max_batch:
            if self._jobs.empty():
                try:
                    async with asyncio.timeout_at(deadline):
                        job = await self._jobs.get()
                except TimeoutError:
                    break
            else:
                job = self._jobs.get_nowait()
            jobs.append(job)
            count += len(job.rows)
        self._on_batch(count)
        return jobs


def _looked_up(model: LoadedModel, question: Question, among: Allowed | None) -> Ragged:
    model.recommender.check(question.k, among=among)
    return model.recommender.names.resolve(question.histories, suggest_from=_SUGGEST_FROM)


def _answers(jobs: list[_Job]) -> list[Lists | Exception]:
    """The lists of every job, or why there are none; jobs of one kind in one call."""
    answers: list[Lists | Exception] = [[] for _ in jobs]
    kinds: dict[tuple[int, int, bool, int], list[int]] = {}
    for place, job in enumerate(jobs):
        if not job.answer.done():
            kinds.setdefault(job.kind, []).append(place)
    for places in kinds.values():
        first = jobs[places[0]]
        lengths = [jobs[place].rows.lengths for place in places]
        values = np.concatenate([jobs[place].rows.values for place in places])
        recommender = first.model.recommender
        try:
            lists = recommender.names.describe(
                *recommender.rank(
                    Ragged.from_lengths(values, np.concatenate(lengths)),
                    k=first.k,
                    keep_seen=first.keep_seen,
                    among=first.among,
                )
            )
        except Exception as error:
            for place in places:
                answers[place] = error
            continue
        begin = 0
        for place, own in zip(places, lengths, strict=True):
            answers[place] = lists[begin : begin + len(own)]
            begin += len(own)
    return answers
