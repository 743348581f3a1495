"""Jobs of an nnsight server that nobody waits for: sent, asked after, collected, cancelled.

Asking and collecting may be repeated, and are where the network fails. Sending is never repeated: a job whose answer
was lost may be there, and would run twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import httpx
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from dit_lens.core.execution.connection import CONNECT, LOST, Connection, tell_detail, trusted

if TYPE_CHECKING:
    from nnsight.tracing.tracer import Tracer


PATIENCE = 30.0  # seconds for which a question is asked again where there is no answer
ABOUT = "/dit-lens"  # where a server that has this library tells of itself
PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between two looks at a job


class SentError(Exception):
    """Leaves a trace whose job was sent. response: what the server answered."""

    def __init__(self, response: ResponseModel):
        super().__init__(response.id)
        self.response = response


class Later(Connection):
    """As a connection, without one that stays open."""

    def __init__(self, key: str, host: str, timeout: float, token: str | None = None):
        super().__init__(key, host, timeout, token)
        self.blocking = False
        self.display.enabled = False

    def submit(self, tracer: Tracer | None) -> NoReturn:
        """Sends a trace; SentError carries the answer out of it."""
        blob = self._serialize(cast("Tracer", tracer))
        self._began = time.monotonic()
        if (knock := self._ask("GET", "/ping")).status_code in (401, 403):
            self._refuse(knock)
        with self._waiting():
            raise SentError(self._post(RequestModel(model_key=self.model_key, compress=self.compress), blob))

    def ask_about(self) -> dict[str, Any] | None:
        """What a server tells of itself that has this library; None for any other."""
        answer = self._ask("GET", ABOUT)
        if answer.status_code in (401, 403):
            self._refuse(answer)
        try:
            about = None if answer.is_error else answer.json()
        except ValueError:  # a page
            return None
        return about if isinstance(about, dict) and "dit_lens" in about else None

    def look(self, name: str) -> ResponseModel | None:
        """The last news of a job; None where the server knows none of that name."""
        answer = self._ask("GET", f"/response/{name}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        self._check(answer, name)
        return ResponseModel.model_validate_json(answer.text)

    def cancel(self, name: str) -> bool:
        """Ends a job; False where the server knows none of that name. ExecutionError where it cannot."""
        answer = self._ask("DELETE", f"/response/{name}")
        if answer.status_code in (httpx.codes.METHOD_NOT_ALLOWED, httpx.codes.NOT_IMPLEMENTED):
            self._fail("takes no cancellation", f"The job {name} may run on there.", None)
        if answer.status_code != httpx.codes.NOT_FOUND:
            self._check(answer, name)
        return answer.status_code != httpx.codes.NOT_FOUND

    def wait(self, name: str, known: bool, until: float) -> Any:
        """What a job saved, once it is done.

        name: of the job.
        known: whether the server knows a job as soon as it has taken it; others do so a little later.
        until: the time at which waiting ends, as time.monotonic tells it.

        Raises RemoteError where the job failed there, ExecutionError where it is gone, or not done in time.
        """
        self.state = "SENT"
        for pause in _pauses():
            news = self.look(name)
            if news is None and known:
                self._fail(f"knows no job {name}", GONE, None)
            if news is not None:
                self.job_id, self.state = name, news.status.value
                if news.status == Status.ERROR:
                    raise RemoteError(news.description)
                if news.status == Status.COMPLETED:
                    return self._fetch(news)
            if (left := until - time.monotonic()) <= 0:
                self._fail(
                    f"has not finished the job {name} yet ({self.state})",
                    "It goes on there: ask again, with a longer timeout=, or end it with job.cancel().",
                    None,
                )
            time.sleep(min(pause, left))
        raise AssertionError  # pauses have no end

    def _fetch(self, news: ResponseModel) -> Any:
        """The result; repeated where the network fails, as the server keeps it."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                found = self.download_result(news.data)
            except httpx.HTTPStatusError as refusal:
                self._fail(f"has no result of the job {news.id} any more", GONE, refusal)
            except httpx.TransportError as silence:
                if time.monotonic() > end:
                    self._fail(
                        f"finished the job {news.id}, and its result could not be fetched: {silence}",
                        "It is kept there for a while: ask again.",
                        silence,
                    )
                time.sleep(1)
            else:
                if found is None:
                    self._fail("finished the job and sent no result", f"Does it have an object store? {LOST}", None)
                return found

    def _ask(self, method: str, path: str) -> httpx.Response:
        """The answer to a question that may be asked again."""
        headers = {"ndif-api-key": self.api_key} if self.api_key else {}
        end = time.monotonic() + min(PATIENCE, self.timeout)
        while True:
            try:
                return httpx.request(method, self.host + path, headers=headers, timeout=CONNECT, verify=trusted())
            except (httpx.TransportError, httpx.InvalidURL) as silence:
                refused = isinstance(silence, httpx.ConnectError | httpx.InvalidURL)
                if time.monotonic() > end or (refused and method == "GET" and path in ("/ping", ABOUT)):
                    self._fail(f"could not be reached: {silence}", "Is the address right, and does it run?", silence)
                time.sleep(min(0.5, self.timeout))

    def _check(self, answer: httpx.Response, name: str) -> None:
        if answer.status_code in (401, 403):
            self._refuse(answer)
        if answer.is_error:
            self._fail(
                f"does not tell of the job {name} (HTTP status {answer.status_code}): {tell_detail(answer)}",
                "Ask again, or ask whoever runs it.",
                None,
            )

    def _refuse(self, answer: httpx.Response) -> NoReturn:
        self._fail(
            f"refused the connection (HTTP status {answer.status_code})",
            "Is the key right (token=, or nnsight.CONFIG.set_default_api_key), and is it an nnsight server?",
            None,
        )


GONE = "It expired there, was cancelled or fetched, or the server was started anew. Send it again."


def _pauses() -> Iterator[float]:
    """Shorter ones first: many jobs are done at once."""
    yield from PAUSES
    while True:
        yield PAUSES[-1]
