"""``dit-lens serve``: loads a pipeline, listens, and says how to come in."""

from __future__ import annotations

import gc
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dit_lens.errors import ExecutionError, StoreError
from dit_lens.server.access import choose_token, is_loopback

MISSING = "a server needs packages that are not installed ({gone}). Install them: pip install 'dit-lens[serve]'"
STOPPED = "The server is being stopped, and the job with it. Nothing was kept of it, and nothing of it runs on."


@dataclass(frozen=True)
class ServeOptions:
    """How a pipeline is served.

    host, port: where it listens; 0 takes a port that is free.
    token: who may come in; one is made if None.
    device, dtype: of the pipeline.
    results: folder for results, which a later server finds again; a temporary one if None.
    keep: hours for which results are kept.
    timeout: seconds that one job may take.
    largest: MiB that one request may have.
    inline: MiB of a result that come with the last message; larger ones are fetched.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    token: str | None = None
    device: Any = "cpu"
    dtype: Any = None
    results: str | Path | None = None
    keep: float = 24.0
    timeout: float = 3600.0
    largest: float = 1024.0
    inline: float = 8.0


def serve(pipeline: str, options: ServeOptions, say: Callable[[str], None]) -> None:
    """Serves a pipeline until it is stopped (Ctrl-C, SIGTERM).

    pipeline: a folder, a repository, or a toy such as "toy:flux".
    say: writes a line for whoever started it.

    Raises ExecutionError where it cannot listen or the token is not safe, StoreError if there is no such pipeline.
    """
    token = choose_token(options.token, options.host)
    with ExitStack() as held:
        listening = held.enter_context(_listen(options.host, options.port))
        folder = _folder(options.results, held)
        say(f"loading {pipeline} ...")
        server, close = _build(pipeline, options, token, folder)
        _announce(pipeline, options, token, listening.getsockname()[1], say)
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn passes it on after an orderly end
            pass
        finally:
            close()
        say("stopped.")


def prepare() -> None:
    """What has to happen before nnsight is imported; ExecutionError where packages of a server are missing."""
    from importlib.util import find_spec

    needed = ("starlette", "uvicorn", "websockets", "python_multipart")
    if gone := [name for name in needed if find_spec(name) is None]:
        raise ExecutionError(MISSING.format(gone=", ".join(gone)))
    import anyio

    anyio.run(anyio.sleep, 0)  # makes classes that may have no attribute they do not name, and nnsight gives all one


def _listen(host: str, port: int) -> socket.socket:
    """A socket at an address; ExecutionError where it is taken or not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as problem:
        raise ExecutionError(
            f"cannot listen at {host} port {port}: {problem}. Choose another with --port, or 0 for one that is free."
        ) from problem
    return listening


def _folder(results: str | Path | None, held: ExitStack) -> Path:
    """The folder for jobs, which only its owner can read."""
    if results is None:
        return Path(held.enter_context(tempfile.TemporaryDirectory(prefix="dit-lens-serve-")))
    results = Path(results)
    try:
        results.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise StoreError(f"{results} cannot be a folder for results: {problem}") from problem
    return results


def _build(pipeline: str, options: ServeOptions, token: str, folder: Path) -> tuple[Any, Callable[[], None]]:
    """A web server that is ready to run, and what ends its jobs."""
    import uvicorn

    from dit_lens.server.app import Site
    from dit_lens.server.jobs import Job, Jobs
    from dit_lens.server.names import Served
    from dit_lens.server.sessions import Sessions
    from dit_lens.server.tasks import describe_server
    from dit_lens.server.work import Work, load
    from dit_lens.toys import find_pipeline

    named = Path(find_pipeline(pipeline))
    local = named.is_dir()
    name = str(named.resolve()) if local else pipeline
    model = load(name, options.device, options.dtype)
    pipe: Any = model.pipeline
    work, sessions = Work(model, options.timeout), Sessions()

    def carry_out(job: Job) -> None:
        work(job, jobs)

    jobs = Jobs(folder, carry_out, sessions.tell, keep=options.keep * 3600)
    served = Served(
        name,
        None,
        local,
        (
            ("pipeline", type(pipe).__name__),
            ("transformer", type(pipe.transformer).__name__),
            ("device", f"{pipe.device}, {str(pipe.transformer.dtype).removeprefix('torch.')}"),
            ("results", f"kept for {options.keep:g} hours"),
            ("jobs end", f"after {options.timeout:g} s"),
        ),
    )
    site = Site(
        served, describe_server(pipe), jobs, sessions, token, int(options.largest * 2**20), int(options.inline * 2**20)
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Clients are told before their connections are closed."""
            if not self.should_exit:
                jobs.close(STOPPED, patience=0)
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        site.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="websockets-sansio",
        ws_max_size=2**16,  # clients send nothing here
        ws_ping_interval=60,
        ws_ping_timeout=600,  # they do not answer while they send a request or read a result
        timeout_graceful_shutdown=5,
        lifespan="off",
    )
    gc.freeze()  # what is there now stays, and need not be looked through after every job
    jobs.start()
    return Server(config), lambda: jobs.close(STOPPED)


def _announce(pipeline: str, options: ServeOptions, token: str, port: int, say: Callable[[str], None]) -> None:
    """How to come in, and what is at stake."""
    from dit_lens.server.page import WARNING

    say(f"serving {pipeline} at http://{options.host}:{port}")
    if options.token is None:
        say(f"token: {token}")
    say(WARNING)
    if is_loopback(options.host):
        machine = socket.gethostname()
        say(f"Only this machine reaches it. From another one: ssh -N -L {port}:127.0.0.1:{port} USER@{machine}")
    else:
        say("It speaks HTTP, which anybody on the way can read, the token included: use it inside a network you trust.")
