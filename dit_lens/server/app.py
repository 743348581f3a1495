"""The routes of a server, as nnsight's client uses them: subscribe, send a request, ask after it, fetch the result."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from nnsight.schema.request import RequestModel
from nnsight.schema.response import Status
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from dit_lens.server.access import Access
from dit_lens.server.jobs import Job, Jobs, QueueFullError
from dit_lens.server.names import Served
from dit_lens.server.page import render_page
from dit_lens.server.sessions import Sessions

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CANCELLED = "Cancelled by its sender."


@dataclass
class Site:
    """What a server needs to answer.

    served: the pipeline.
    about: what a lens is told of it.
    jobs, sessions: what was asked, and who waits.
    token: who may come in; it also signs the addresses of results.
    largest: bytes of a request.
    inline: bytes of a result that come with the news of it; larger ones are fetched.
    """

    served: Served
    about: dict[str, Any]
    jobs: Jobs
    sessions: Sessions
    token: str
    largest: int
    inline: int

    def app(self) -> ASGIApp:
        """What a web server calls."""
        routes = [
            Route("/", self.page),
            Route("/ping", self.ping),
            Route("/status", self.status),
            Route("/dit-lens", self.tell),
            Route("/env", self.env),
            Route("/whoami", self.whoami),
            Route("/request", self.request, methods=["POST"]),
            Route("/response/{id}", self.response, methods=["GET"]),
            Route("/response/{id}", self.cancel, methods=["DELETE"]),
            WebSocketRoute("/subscribe", self.subscribe),
        ]
        inside = Access(Starlette(routes=routes, exception_handlers={HTTPException: _tell}), self.token)
        return Results(inside, self)

    async def page(self, request: Request) -> Response:  # noqa: ARG002 as all routes
        return HTMLResponse(
            render_page(self.served, self.jobs.counts), headers={"content-security-policy": "default-src 'none'"}
        )

    async def ping(self, request: Request) -> Response:  # noqa: ARG002
        return PlainTextResponse("pong")

    async def whoami(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"email": None, "tags": []})

    async def status(self, request: Request) -> Response:  # noqa: ARG002
        """As ``nnsight.status()`` shows it."""
        served = self.served
        state = {
            "deployment_level": "HOT",
            "application_state": "RUNNING",
            "model_key": served.key,
            "repo_id": served.name,
            "revision": served.revision,
        }
        return JSONResponse({"deployments": {served.name: state}, "jobs": self.jobs.counts})

    async def tell(self, request: Request) -> Response:  # noqa: ARG002
        """Whatever nnsight's own servers do not tell."""
        return JSONResponse(self.about)

    async def env(self, request: Request) -> Response:  # noqa: ARG002
        """As ``nnsight.compare()`` reads it."""
        from nnsight.ndif import get_local_env

        return JSONResponse(await run_in_threadpool(get_local_env))

    async def subscribe(self, socket: WebSocket) -> None:
        """News of jobs for one client, until it leaves."""
        await socket.accept()
        session = self.sessions.open()
        sending = asyncio.create_task(self._send(socket, session))
        try:
            while (await socket.receive())["type"] != "websocket.disconnect":
                """Clients have nothing to say here."""
        finally:
            sending.cancel()
            self.sessions.close(session)
            await run_in_threadpool(self.jobs.leave, session)

    async def _send(self, socket: WebSocket, session: str) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # it left
            await socket.send_text(json.dumps({"session_id": session, "ends": True, "about": self.about}))
            while True:
                job, news = await self.sessions.next(session)
                if news.status != Status.COMPLETED:
                    await socket.send_text(news.model_dump_json())
                elif job.result.stat().st_size > self.inline:
                    await socket.send_text(news.model_copy(update={"data": self.sign(job)}).model_dump_json())
                else:
                    data = await run_in_threadpool(job.result.read_bytes)
                    await run_in_threadpool(self.jobs.drop, job)  # its client leaves as soon as it has it
                    await socket.send_bytes(news.model_copy(update={"data": data}).pickle())

    async def request(self, request: Request) -> Response:
        """Takes a job; its bytes go to a file as they come."""
        file = self.jobs.new_file()
        try:
            asked = await self._receive(request, file)
            self._check(asked)
            received = await run_in_threadpool(
                self.jobs.submit,
                file,
                compress=asked.compress,
                session=asked.session_id or None,
                origin=_origin(request),
                sender=_sender(request),
            )
        except BaseException as problem:
            file.unlink(missing_ok=True)
            if isinstance(problem, QueueFullError):
                raise HTTPException(503, str(problem)) from problem
            raise
        return Response(received.model_dump_json(), media_type="application/json")

    def _check(self, asked: RequestModel) -> None:
        if wrong := self.served.why_not(asked.model_key):
            raise HTTPException(404, wrong)
        if asked.session_id and asked.session_id not in self.sessions:
            raise HTTPException(409, "the client that sent this has no open connection for news of it")

    async def _receive(self, request: Request, file: Path) -> RequestModel:
        limited = _Limited(request, self.largest)
        try:
            parser = MultiPartParser(request.headers, limited.stream(), max_files=1, max_fields=4)
            async with asyncio.timeout(3600):
                form = await parser.parse()
        except (MultiPartException, KeyError) as problem:
            await limited.drain()
            raise HTTPException(400, f"this is no request of nnsight's client: {problem}") from problem
        except ClientDisconnect as gone:
            raise HTTPException(400, "the client left") from gone
        blob = form.get("blob")
        try:
            if limited.over:
                raise HTTPException(
                    413,
                    f"it is larger than the {self.largest / 2**20:g} MiB that this server takes at once. Send fewer "
                    "prompts (batch_size=) or smaller sources, or start it with a larger --largest",
                )
            if blob is None or isinstance(blob, str):
                raise HTTPException(400, "this is no request of nnsight's client: it brings no file")
            asked = RequestModel.model_validate_json(str(form.get("data")))
            await run_in_threadpool(_copy, blob.file, file)
        except ValidationError as problem:
            raise HTTPException(400, f"this is no request of nnsight's client: {problem}") from problem
        finally:
            await form.close()
        return asked

    async def response(self, request: Request) -> Response:
        """The last news of a job."""
        job = self._find(request)
        state = job.state
        if state.status == Status.COMPLETED:
            job.origin = _origin(request)
            state = state.model_copy(update={"data": self.sign(job)})
        return Response(state.model_dump_json(), media_type="application/json")

    async def cancel(self, request: Request) -> Response:
        """Ends a job; one that has ended is forgotten."""
        job = self._find(request)
        if not await run_in_threadpool(self.jobs.cancel, job.id, CANCELLED):
            await run_in_threadpool(self.jobs.drop, job)
        return Response(job.state.model_dump_json(), media_type="application/json")

    def _find(self, request: Request) -> Job:
        job = self.jobs.find(request.path_params["id"])
        if job is None:
            raise HTTPException(404, "there is no such job: it expired, was forgotten, or is another server's")
        return job

    def sign(self, job: Job) -> str:
        """Where a result can be fetched: nnsight's client does so without the token."""
        until = f"{job.changed + self.jobs.keep:.0f}"
        return (
            f"{job.origin}/result/{job.id}?{urlencode({'until': until, 'signature': self._signature(job.id, until)})}"
        )

    def signed(self, name: str, until: str, signature: str) -> bool:
        """Whether this server gave that address, and it has not expired."""
        good = hmac.compare_digest(signature.encode(), self._signature(name, until).encode())
        return good and float(until) > time.time()

    def _signature(self, name: str, until: str) -> str:
        return hmac.new(self.token.encode(), f"{name} {until}".encode(), hashlib.sha256).hexdigest()


class Results:
    """Sends results to whoever has their signed address; everything else goes on.

    app: what is behind.
    site: the server.
    """

    def __init__(self, app: ASGIApp, site: Site):
        self._app, self._site = app, site

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith("/result/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        name, query = scope["path"].removeprefix("/result/"), request.query_params
        if not self._site.signed(name, query.get("until", ""), query.get("signature", "")):
            await Response(status_code=401)(scope, receive, send)
            return
        job = self._site.jobs.find(name)
        if job is None or job.state.status != Status.COMPLETED:
            await Response(status_code=404)(scope, receive, send)
            return
        await FileResponse(job.result, media_type="application/octet-stream")(scope, receive, send)
        if job.session is not None:
            await run_in_threadpool(self._site.jobs.drop, job)


class _Limited:
    """The body of a request, of which no more than so many bytes are handed on; the rest is read and thrown away.

    A client learns of a refusal only when it has sent everything.
    """

    def __init__(self, request: Request, largest: int):
        self._source, self._left = request.stream(), largest
        self.over = False

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async for chunk in self._source:
            self._left -= len(chunk)
            if self._left < 0:
                self.over = True
                await self.drain()
                return
            yield chunk

    async def drain(self) -> None:
        with suppress(ClientDisconnect):
            async for _ in self._source:
                """Forgotten."""


def _copy(source: Any, file: Path) -> None:
    source.seek(0)
    with file.open("wb") as target:
        shutil.copyfileobj(source, target)


def _origin(request: Request) -> str:
    """The address at which a client sees the server, whatever tunnel lies between."""
    secure = request.headers.get("x-forwarded-proto") == "https"
    return str(request.base_url.replace(scheme="https") if secure else request.base_url).rstrip("/")


def _sender(request: Request) -> str:
    """The versions of a client, for the error of a request that cannot be read."""
    nnsight = request.headers.get("nnsight-version", "of no version")[:20]
    python = request.headers.get("python-version", "of no version").partition(" ")[0][:20]
    return f"nnsight {nnsight} and Python {python}"


async def _tell(request: Request, problem: Exception) -> Response:  # noqa: ARG001 as Starlette calls it
    """What a refusal is of, where nnsight's client looks for it."""
    status = problem.status_code if isinstance(problem, HTTPException) else 500
    return JSONResponse({"detail": getattr(problem, "detail", "")}, status)
