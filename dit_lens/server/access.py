"""Who may use a server: whoever holds its token. Nobody else gets anything of it, and nothing of theirs is read."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import secrets
from typing import TYPE_CHECKING

from dit_lens.errors import ExecutionError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = b"ndif-api-key"  # where nnsight's client puts it
SHORTEST = 16  # characters of a token that somebody chose
REFUSAL = b'{"detail": "this server asks for its token"}'


def choose_token(token: str | None, host: str) -> str:
    """The token of a server: the one that was given, else a new one.

    host: the address at which the server will listen.

    Raises ExecutionError for a token that can be guessed or cannot be sent, and where none was given for an address
    that other machines reach.
    """
    if token is None:
        if not is_loopback(host):
            raise ExecutionError(
                f"host {host!r} can be reached from other machines, and whoever holds the token runs code on this one. "
                "Choose a token yourself (--token, or DIT_LENS_TOKEN in the environment), or stay on 127.0.0.1 and "
                "come through ssh -L."
            )
        return secrets.token_urlsafe(32)
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ExecutionError(
            f"the token must have at least {SHORTEST} characters, of ASCII and without spaces, as whoever guesses it "
            "runs code on this machine. Leave it out to have one made."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Lets requests through that bring the token; the others are answered before anything of them is read.

    The page may also be opened with the token as the password of a browser's own dialogue. Nothing else may: a browser
    repeats passwords in requests that other pages make, and it cannot add the header to those.

    app: what is behind.
    token: of the server.
    """

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope, send)

    def _admits(self, scope: Scope) -> bool:
        headers = scope["headers"]
        given = [value for name, value in headers if name == HEADER]
        if not given and _is_page(scope):
            given = [_password(value) for name, value in headers if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._token)


def _is_page(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD")


def _password(header: bytes) -> bytes:
    """What was typed into a browser's dialogue; nothing if the header is of another kind."""
    kind, _, coded = header.partition(b" ")
    try:
        return base64.b64decode(coded, validate=True).partition(b":")[2] if kind.lower() == b"basic" else b""
    except binascii.Error:
        return b""


async def _refuse(scope: Scope, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if _is_page(scope):
        headers.append((b"www-authenticate", b'Basic realm="dit-lens: the token is the password", charset="UTF-8"'))
    before = "websocket." if scope["type"] == "websocket" else ""  # which is answered before it is accepted
    await send({"type": f"{before}http.response.start", "status": 401, "headers": headers})
    await send({"type": f"{before}http.response.body", "body": REFUSAL})
