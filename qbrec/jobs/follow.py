"""The log of a job as it is written, through lost connections, until the job has ended."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from qbrec.errors import LaunchError, UnreachableError
from qbrec.jobs.attempts import Attempt, look_again

if TYPE_CHECKING:
    from qbrec.jobs.ray_client import JobClient

SILENT_S = 60.0  # after which a quiet stream is opened anew: connections die without a word
LOST_S = 300.0  # of a cluster that does not answer
PAUSE_S = 2.0  # between two streams


def follow(
    client: JobClient,
    attempt: Attempt,
    write: Callable[[str], None],
    *,
    silent_s: float = SILENT_S,
    lost_s: float = LOST_S,
    pause_s: float = PAUSE_S,
) -> Attempt:
    """Hand on the log from its beginning, each character once, until the job has ended.

    Args:
        client: The cluster.
        attempt: Whose log.
        write: Takes what is new of it.
        silent_s: Seconds without a word after which the stream is opened anew.
        lost_s: Seconds after which a cluster that does not answer is given up.
        pause_s: Seconds between two streams.

    Returns:
        The attempt as it ended.

    Raises:
        UnreachableError: The cluster is lost; the job goes on without us.
        LaunchError: It does not know the job any more.
    """
    written, answered = 0, time.monotonic()
    while True:
        passed = 0  # a stream begins anew with the first line
        with closing(_stream(client, attempt.id, silent_s)) as chunks:
            for chunk in chunks:
                answered = time.monotonic()
                passed += len(chunk)
                if passed > written:
                    write(chunk[written - passed :])
                    written = passed
        try:
            now = look_again(client, attempt)
            answered = time.monotonic()
            if now.has_ended:
                _write_rest(client, attempt, write, written)
                return now
        except UnreachableError as error:
            if time.monotonic() - answered > lost_s:
                raise UnreachableError(
                    f"the cluster has not answered for {lost_s:g} s; the job does not need us and may go on",
                    where=error.where,
                    fix=f"when it answers again: `qbrec logs {attempt.id} --follow`",
                ) from None
        time.sleep(pause_s)


def _write_rest(client: JobClient, attempt: Attempt, write: Callable[[str], None], written: int) -> None:
    """What the stream did not bring before it broke off."""
    try:
        rest = client.get_job_logs(attempt.id)[written:]
    except LaunchError as error:
        print(f"the end of the log cannot be had: {error}", file=sys.stderr)
        return
    if rest:
        write(rest)


def _stream(client: JobClient, submission_id: str, silent_s: float) -> Generator[str]:
    """Chunks of a log from its beginning; it ends with the job, with the connection, or in silence."""
    # Ray's stream is asynchronous: in a thread of its own it leaves Ctrl-C to the caller, at once.
    chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()

    async def pump() -> None:
        async for chunk in client.tail_job_logs(submission_id):
            chunks.put(chunk)

    task = loop.create_task(pump())

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))  # what ended it shows when the job is asked for
            if not task.cancelled():
                task.exception()
        finally:
            chunks.put(None)
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (chunk := chunks.get(timeout=silent_s)) is not None:
            yield chunk
    except queue.Empty:
        return
    finally:
        with suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
