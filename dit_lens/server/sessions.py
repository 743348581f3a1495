"""Clients that wait for news of their jobs, each with a queue of its own."""

from __future__ import annotations

import asyncio
import secrets

from nnsight.schema.response import ResponseModel, Status

from dit_lens.server.jobs import Job

MOST = 4000  # news of a client that does not read them


class Sessions:
    """Who waits, and what each is still to be told."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[tuple[Job, ResponseModel]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __contains__(self, session: str) -> bool:
        return session in self._queues

    def open(self) -> str:
        """A new session's name, which nobody can guess. Called in the loop of the server."""
        self._loop = asyncio.get_running_loop()
        session = secrets.token_urlsafe(24)
        self._queues[session] = asyncio.Queue()
        return session

    def close(self, session: str) -> None:
        self._queues.pop(session, None)

    async def next(self, session: str) -> tuple[Job, ResponseModel]:
        """What comes next for a client."""
        return await self._queues[session].get()

    def tell(self, job: Job, news: ResponseModel) -> None:
        """Hands on news of a job, from any thread; nothing where nobody waits for it."""
        if job.session is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, job, news)

    def _put(self, job: Job, news: ResponseModel) -> None:
        queue = self._queues.get(str(job.session))
        passing = news.status in (Status.RUNNING, Status.LOG)
        if queue is not None and not (passing and queue.qsize() > MOST):
            queue.put_nowait((job, news))
