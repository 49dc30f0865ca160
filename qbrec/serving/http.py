"""The HTTP side of the service: what a request may look like, and what comes back. Knows no Ray.

    POST /v1/recommend   {"histories": [[…]], "k": 10, "keep_seen": false, "categories": […]}
    GET  /v1/model       which version serves, its metrics, what did not load
    GET  /healthz        the process is alive
    GET  /readyz         a version is loaded and warm; 503 until then

Errors are {"error": {"what", "where", "fix"}}: 400 no JSON, 413 too large, 422 what cannot be answered as it
is asked, 503 with Retry-After while no version is loaded or too much waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qbrec.config.sections import ServingConfig
from qbrec.errors import QbrecError
from qbrec.serving.batcher import Batcher, Lists, Overloaded, Question
from qbrec.serving.live import LiveModel, LoadedModel

log = logging.getLogger("qbrec.serving")

RETRY_AFTER_S = 1
MAX_CATEGORIES = 32
MAX_ID = 1024  # characters of an item id or category
_COLUMNS = ("item_id", "score", "title", "semantic_id", "label")


class Ask(BaseModel):
    """Body of `POST /v1/recommend`; `ServingConfig` limits it further."""

    model_config = ConfigDict(extra="forbid", strict=True)

    histories: list[list[str]] = Field(min_length=1)
    k: int = Field(default=10, ge=1)
    keep_seen: bool = False
    categories: list[str] | None = Field(default=None, max_length=MAX_CATEGORIES)


_FIXES = {
    "k": "send a whole number of items, 1 or more, or leave k out",
    "keep_seen": "send true or false, or leave keep_seen out",
    "categories": f"send a list of at most {MAX_CATEGORIES} category names, or leave categories out",
}


class Observer(Protocol):
    """Is told what happens, for metrics."""

    def answered(self, status: int, seconds: float) -> None:
        """A request for recommendations got an answer."""

    def batch(self, histories: int) -> None:
        """So many histories are ranked together now."""

    def waiting(self, histories: int) -> None:
        """So many histories have no answer yet."""


class _Refused(Exception):
    """What is answered in place of lists."""

    def __init__(self, status: int, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.status, self.what, self.where, self.fix = status, what, where, fix


class Api:
    """The routes of the service.

    Args:
        live: The version that serves.
        limits: What a request may ask for.
        observer: Is told what happens.
    """

    def __init__(self, live: LiveModel, *, limits: ServingConfig, observer: Observer) -> None:
        self._live, self._limits, self._observer = live, limits, observer
        self._batcher = Batcher(limits, on_batch=observer.batch, on_waiting=observer.waiting)

    def app(self) -> Starlette:
        """The ASGI application."""

        @asynccontextmanager
        async def running(_: Starlette) -> AsyncIterator[None]:
            self._batcher.start()
            yield
            self._live.stop()
            await self._batcher.stop()

        routes = [
            Route("/v1/recommend", self._recommend, methods=["POST"]),
            Route("/v1/model", self._model, methods=["GET"]),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/readyz", self._ready, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=running, exception_handlers={HTTPException: _http_error})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"alive": True})

    async def _ready(self, _: Request) -> Response:
        if self._live.current is None:
            return _refusal(_not_ready())
        return JSONResponse({"ready": True})

    async def _model(self, _: Request) -> Response:
        return JSONResponse(self._live.describe())

    async def _recommend(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            response = await self._answer(request)
        except _Refused as refused:
            response = _refusal(refused)
        except Exception:
            log.exception("a request failed")  # here, and never in the answer
            response = _refusal(
                _Refused(500, "the request failed", fix="see the log of the service; repeat the request")
            )
        self._observer.answered(response.status_code, time.perf_counter() - start)
        return response

    async def _answer(self, request: Request) -> Response:
        question = self._question(await self._body(request))
        model = self._live.current
        if model is None:
            raise _not_ready()
        try:
            lists = await self._batcher.ask(model, question)
        except Overloaded:
            most = self._limits.max_waiting
            raise _Refused(
                503,
                f"more than {most} histories wait already",
                where="service",
                fix="repeat the request later",
            ) from None
        except QbrecError as error:
            raise _Refused(422, error.what, where=error.where, fix=error.fix) from None
        return JSONResponse(_told(model, lists))

    async def _body(self, request: Request) -> bytes:
        most = self._limits.max_body_bytes
        refused = _Refused(413, f"the body has more than {most} bytes", fix="send fewer histories at once")
        told = request.headers.get("content-length", "0")
        if told.isdecimal() and int(told) > most:
            raise refused
        body = b""
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise refused
        except ClientDisconnect:
            raise _Refused(400, "the body is not whole") from None
        return body

    def _question(self, body: bytes) -> Question:
        try:
            ask = Ask.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            status = 400 if first["type"] == "json_invalid" else 422
            where = ".".join(str(part) for part in first["loc"]) or "body"
            fix = _FIXES.get(where.partition(".")[0], 'send {"histories": [["item id", …], …]}')
            raise _Refused(status, first["msg"], where=where, fix=fix) from None
        limits = self._limits
        longest = max(len(history) for history in ask.histories)
        for name, found, most in (
            ("histories", len(ask.histories), limits.max_histories),
            ("items of a history", longest, limits.max_history_items),
            ("k", ask.k, limits.max_k),
        ):
            if found > most:
                fix = f"send {most} at most, or raise the limit in the section `serving`"
                raise _Refused(422, f"{found} is too much for {name}", where=name, fix=fix)
        names = [*(name for history in ask.histories for name in history), *(ask.categories or ())]
        if any(len(name) > MAX_ID for name in names):
            raise _Refused(422, f"a name has more than {MAX_ID} characters", where="histories, categories")
        return Question(ask.histories, ask.k, ask.keep_seen, ask.categories)


def _told(model: LoadedModel, lists: Lists) -> dict[str, Any]:
    columns = [{name: [item[name] for item in items] for name in _COLUMNS} for items in lists]  # type: ignore[literal-required]
    version = {"name": model.version.name, "version": model.version.number}
    return {"model": version, "recommendations": columns}


def _not_ready() -> _Refused:
    return _Refused(
        503, "no version is loaded yet", where="service", fix="wait for /readyz; /v1/model says more"
    )


def _refusal(refused: _Refused) -> Response:
    told = {"what": refused.what, "where": refused.where, "fix": refused.fix}
    headers = {"Retry-After": str(RETRY_AFTER_S)} if refused.status == 503 else None
    return JSONResponse({"error": told}, status_code=refused.status, headers=headers)


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = _Refused(
        error.status_code, error.detail, fix="POST /v1/recommend, GET /v1/model, /healthz, /readyz"
    )
    response = _refusal(refused)
    response.headers.update(error.headers or {})
    return response
