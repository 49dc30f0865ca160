"""A job server that speaks Ray's protocol (HTTP and its log stream) and does what a test plans."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from aiohttp import web

TOKEN = "sesame-1234"


@dataclass
class JobServer:
    """What it knows and what it was asked.

    Attributes:
        url: Its address.
        jobs: Jobs by submission id, as JobDetails.
        logs: Their logs.
        packages: Uploaded packages by name.
        requests: Method and path of every request.
        ray_version: Of the cluster.
        token: Wanted as a bearer token, if set.
        cut: Characters after which the next log streams break off; used up one by one.
        on_submit: Called with the body of a submission before it is looked at.
        on_stop: Called with the id; its answer says whether somebody heard it.
        down: Answers 503 to everything, as a proxy whose server is gone.
        refused: How often it did.
        closing: It is about to end.
    """

    url: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ray_version: str = ray.__version__
    token: str | None = None
    cut: list[int] = field(default_factory=list)
    on_submit: Callable[[dict[str, Any]], None] = lambda body: None
    on_stop: Callable[[str], bool] = lambda job: True
    down: bool = False
    refused: int = 0
    closing: bool = False

    def add(
        self, submission_id: str, status: str, *, metadata: dict[str, str] | None = None, **more: Any
    ) -> None:
        """A job; `more` are further fields of JobDetails."""
        self.jobs[submission_id] = {
            "type": "SUBMISSION",
            "submission_id": submission_id,
            "status": status,
            "entrypoint": "python",
            "metadata": metadata or {},
            "runtime_env": {},
            "message": f"Job is {status}.",
            "start_time": int(time.time() * 1000) - 60_000,
            **more,
        }
        self.logs.setdefault(submission_id, "")

    def end(self, submission_id: str, status: str, code: int | None = None) -> None:
        """A job ends."""
        self.jobs[submission_id] |= {
            "status": status,
            "driver_exit_code": code,
            "end_time": int(time.time() * 1000),
        }

    def uploaded(self) -> set[str]:
        """Names of the files in the one package that was uploaded."""
        (data,) = self.packages.values()
        return {name for name in zipfile.ZipFile(io.BytesIO(data)).namelist() if not name.endswith("/")}

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if self.down:
            self.refused += 1
            return web.Response(status=503, text="<html>\n<b>no upstream</b>\n</html>")
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        response: web.StreamResponse = await handler(request)
        return response

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": self.ray_version, "ray_commit": "", "session_name": "test"}
        )

    async def _list(self, request: web.Request) -> web.Response:
        driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": "python x.py"}
        return web.json_response([driver, *self.jobs.values()])

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.on_submit(body)
        name = body["submission_id"]
        if name in self.jobs:
            return web.Response(
                status=500,
                text=f"Traceback (most recent call last):\nValueError: Job {name} already exists.",
            )
        self.add(
            name,
            "PENDING",
            metadata=body["metadata"],
            runtime_env=body["runtime_env"],
            entrypoint=body["entrypoint"],
        )
        return web.json_response({"job_id": name, "submission_id": name})

    async def _job(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        if name not in self.jobs:
            return web.Response(status=404, text=f"Job {name} does not exist")
        return web.json_response(self.jobs[name])

    async def _stop(self, request: web.Request) -> web.Response:
        return web.json_response({"stopped": self.on_stop(request.match_info["job"])})

    async def _logs(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        if name not in self.logs:
            return web.Response(status=500, text="Traceback:\nFileNotFoundError: its node is gone")
        return web.json_response({"logs": self.logs[name]})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        name, stream, sent = request.match_info["job"], web.WebSocketResponse(), 0
        await stream.prepare(request)
        cut = self.cut.pop(0) if self.cut else None
        while not self.closing:
            ended = "end_time" in self.jobs[name]
            until = len(self.logs[name]) if cut is None else min(cut, len(self.logs[name]))
            while sent < until:
                # Chunks of another length each time: a client may not count on their borders.
                chunk = self.logs[name][sent : min(sent + 5 + len(self.requests) % 7, until)]
                await stream.send_str(chunk)
                sent += len(chunk)
            if cut is not None and sent >= cut:
                assert request.transport is not None
                request.transport.abort()
                return stream
            if ended:
                return stream
            await asyncio.sleep(0.02)
        return stream

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    def app(self) -> web.Application:
        """The routes of Ray's dashboard that a client of jobs uses."""
        app = web.Application(middlewares=[self._note], client_max_size=1 << 28)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._job)
        app.router.add_post("/api/jobs/{job}/stop", self._stop)
        app.router.add_get("/api/jobs/{job}/logs", self._logs)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        app.router.add_get("/api/packages/{protocol}/{name}", self._has_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._take_package)
        return app


@contextmanager
def job_server() -> Iterator[JobServer]:
    """One on a free port of this machine."""
    server = JobServer()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.app(), shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing = True
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        loop.close()


def posted(server: JobServer) -> dict[str, Any]:
    """The newest job as it was posted."""
    return json.loads(json.dumps(list(server.jobs.values())[-1]))
