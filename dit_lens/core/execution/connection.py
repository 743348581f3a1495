"""One request to an nnsight server, from the first handshake to the result, and what is said where it fails on the way.

A failure is told by where it happened: before the server was reached, when it refused, while the job ran there, or when
its result was fetched. nnsight's servers take no cancellation: a job that nobody waits for may run on.
"""

from __future__ import annotations

import json
import math
import pickle
import ssl
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.response import ResponseModel, Status
from zstandard import ZstdError

from dit_lens.errors import ExecutionError, OpError

if TYPE_CHECKING:
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import Tracer

CONNECT = 10.0  # seconds in which a server has to answer at all
LONGEST = 2e6  # seconds, 23 days: no socket waits longer
REFRESH = 0.1  # seconds between two looks at the clock, which also turn the spinner

LOST = "Nothing was kept of this run."

# What an answer that was cut off, or that is of something else, can cause when it is read.
_DAMAGE = (
    ValueError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
    ZstdError,
)


def check_host(host: str) -> str:
    """The address of a server as requests go to it, without a slash at its end; ExecutionError if it is none."""
    text = str(host).strip()
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or out of range
        good = False
    if not good or parts.query or parts.fragment or any(mark.isspace() for mark in text):
        raise ExecutionError(
            f"Invalid host URL: {host!r}. Pass host= as http:// or https://, a name, and a port where it has one, such "
            "as 'http://localhost:8001'."
        )
    return text.rstrip("/")


@cache
def trusted() -> ssl.SSLContext:
    """The authorities that are trusted; to read them takes longer than a request."""
    return httpx.create_ssl_context()


def check_timeout(timeout: Any) -> float:
    """Seconds to wait for a run; OpError if it is not a positive number."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or math.isnan(timeout) or timeout <= 0:
        raise OpError(f"timeout={timeout!r} is not a number of seconds above 0. Leave it out for an hour.")
    return float(timeout)


def check_token(token: Any) -> str | None:
    """The token of a server; OpError if it is no word that can be sent."""
    if token is None:
        return None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token.strip():
        raise OpError("token= must be the word that the server gave, of ASCII. Leave it out for nnsight's own key.")
    return token.strip()


class Connection(RemoteBackend):
    """Sends one trace, waits, and fetches what it saved.

    RemoteError: the job failed there, in the server's words. ExecutionError: anything else, as a person can act on it.

    key: how the server knows the model. host: its address. timeout: seconds to wait for the whole of it.
    token: what lets in; nnsight's own setting if None.
    """

    def __init__(self, key: str, host: str, timeout: float, token: str | None = None):
        super().__init__(key, host=host, api_key=token)
        self.timeout = timeout
        self.state = "not sent"
        self.ends = False  # whether the server ends a job whose client is gone
        self.about: dict[str, Any] | None = None  # what a server that has this library tells of itself
        self.code: str | None = None  # which code of this library it must have
        self._began = 0.0

    def request(self, request: RequestModel, tracer: Tracer) -> Any:
        """As nnsight's own, with an end to waiting."""
        blob = self._serialize(tracer)
        self._began = time.monotonic()
        socket = self._connect()
        try:
            request.session_id = self._read_session(socket)
            with self._waiting():
                response = self._post(request, blob)
                while (result := self._take(response)) is None:
                    response = self._receive(socket)
            return result
        finally:
            socket.close(timeout=1)

    def _connect(self) -> websocket.WebSocket:
        header = {"ndif-api-key": self.api_key} if self.api_key else None
        try:
            return websocket.create_connection(
                f"{self.ws_host}/subscribe", header=header, timeout=min(CONNECT, self.timeout)
            )
        except websocket.WebSocketBadStatusException as refusal:
            self._fail(f"refused the connection (HTTP status {refusal.status_code})", self._advice(refusal), refusal)
        except (OSError, websocket.WebSocketException, ValueError, IndexError) as silence:
            self._fail(f"could not be reached: {silence}", "Is the address right, and does it run?", silence)

    def _advice(self, refusal: websocket.WebSocketBadStatusException) -> str:
        if refusal.status_code in (401, 403):
            return (
                "Is the key right (token= of DiTLens.remote, or nnsight.CONFIG.set_default_api_key), and is it an "
                "nnsight server?"
            )
        if refusal.status_code >= 500:
            return "It is there, and does not work now. Try again, or ask whoever runs it."
        path = urlsplit(self.host).path
        ends = f" Its address has no path as a rule, and this one ends in {path!r}." if path else ""
        return f"Is it an nnsight server?{ends}"

    def _read_session(self, socket: websocket.WebSocket) -> str:
        """The name of the channel on which the server will tell of the job."""
        try:
            greeting = json.loads(socket.recv())
            self.ends, self.about = bool(greeting.get("ends")), greeting.get("about")
            session, code = greeting["session_id"], (self.about or {}).get("code")
        except (OSError, websocket.WebSocketException) as silence:
            self._fail(f"could not be reached: {silence}", "Is the address right, and does it run?", silence)
        except _DAMAGE as damage:
            self._fail("did not answer as one", "Is it an nnsight server? Is the address right?", damage)
        if self.code not in (None, code):
            self._fail("was started anew, with another release of dit_lens or none", f"Run it again. {LOST}", None)
        return session

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        """Sends the request; the server answers at once that it has it."""
        headers = {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
            **({"ndif-api-key": self.api_key} if self.api_key else {}),
        }
        self.state = "being sent"
        try:
            answer = httpx.post(
                f"{self.host}/request",
                data={"data": request.metadata()},
                files={"blob": ("request", blob, "application/octet-stream")},
                headers=headers,
                verify=trusted(),
                timeout=httpx.Timeout(min(LONGEST, self._left()), connect=min(CONNECT, self._left())),
            )
        except httpx.TimeoutException as late:
            self._too_late(late)
        if answer.is_error:
            self._fail(f"refused the request (HTTP status {answer.status_code}): {tell_detail(answer)}", LOST, None)
        received = ResponseModel.model_validate_json(answer.text)
        self.ends = self.ends or bool((received.meta or {}).get("ends"))
        return received

    def _receive(self, socket: websocket.WebSocket) -> ResponseModel:
        """The next thing that the server tells of the job."""
        while True:
            left = self._left()
            if left <= 0:
                self._too_late(None)
            socket.settimeout(min(REFRESH, left))
            try:
                message = socket.recv()
            except websocket.WebSocketTimeoutException:
                if self.display.enabled:
                    self.display.refresh()
                continue
            if not message:
                raise ConnectionError("the server closed it")
            return self.parse(message)

    def _take(self, response: ResponseModel) -> Any:
        """The result, once there is one. RemoteError if the job failed."""
        self.job_id = response.id
        if response.status != Status.LOG:
            self.state = response.status.value
        if not self.note(response):
            return None
        try:
            result = self.download_result(response.data)
        except (httpx.HTTPError, httpx.InvalidURL) as silence:
            self._fail(
                f"finished the job, and its result could not be fetched from {urlsplit(str(response.data)).netloc}: "
                f"{silence}",
                f"Is that the object store of the server, and can this machine reach it? Smaller results come without "
                f"it: reduce reads where they are (reduce=), or run fewer prompts at once (batch_size=). {LOST}",
                silence,
            )
        if result is None:
            self._fail("finished the job and sent no result", f"Does it have an object store? {LOST}", None)
        return result

    @contextmanager
    def _waiting(self) -> Generator[None]:
        """What is said of a job that was sent and whose end was not seen."""
        try:
            yield
        except (ExecutionError, RemoteError):
            raise
        except KeyboardInterrupt as stop:
            fate = (
                "The server cancels it, and it ends at its next step."
                if self.ends
                else "nnsight's servers take no cancellation, so it may run on there, and the next run waits for it."
            )
            raise KeyboardInterrupt(f"stopped waiting for {self._job}. {fate} {LOST}") from stop
        except (OSError, httpx.HTTPError, websocket.WebSocketException) as loss:
            raise ExecutionError(
                f"the connection to the nnsight server {self.host} was lost after {self._waited:.0f} s, with "
                f"{self._job}: {loss}. {self._fate}, and what it finds cannot be fetched any more. {LOST} "
                "Run it again when the server is back."
            ) from loss
        except _DAMAGE as damage:
            gist = str(damage).partition("\n")[0]
            self._fail(f"sent an answer that cannot be read, with {self._job}: {gist}", LOST, damage)

    def _too_late(self, cause: Exception | None) -> NoReturn:
        self._fail(
            f"gave no result within {self.timeout:g} s, with {self._job}",
            f"{self._fate}. {LOST} Pass a longer timeout= to DiTLens.remote, or make the run smaller: "
            "fewer prompts at once (batch_size=), or fewer steps.",
            cause,
        )

    @property
    def _fate(self) -> str:
        return "The job ends there at its next step" if self.ends else "The job may run on there"

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._began

    def _left(self) -> float:
        return self.timeout - self._waited

    @property
    def _job(self) -> str:
        return f"the job {self.job_id} {self.state}" if self.job_id else f"the job {self.state}"

    def _fail(self, how: str, advice: str, cause: Exception | None) -> NoReturn:
        raise ExecutionError(f"the nnsight server {self.host} {how}. {advice}") from cause


def tell_detail(answer: httpx.Response) -> str:
    """What a server says of a refusal: in JSON, as text, or by the name of the status."""
    try:
        body = answer.json()
    except ValueError:
        body = answer.text.strip().partition("\n")[0][:200]
    found = body.get("detail") if isinstance(body, dict) else body
    return str(found or answer.reason_phrase).removesuffix(".")
