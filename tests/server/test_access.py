"""Whoever has no token gets nothing, and nothing that anybody sends breaks the server or fills its memory."""

import base64
import json
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import websocket
from nnsight.schema.request import RequestModel

from dit_lens.errors import ExecutionError
from dit_lens.server.access import choose_token, is_loopback
from dit_lens.server.names import CLASS, Served
from dit_lens.server.page import render_page
from dit_lens.server.serve import ServeOptions, serve
from tests.server.conftest import TOKEN, connect

KEY = {"ndif-api-key": TOKEN}
ROUTES = [
    ("GET", "/"),
    ("GET", "/ping"),
    ("GET", "/status"),
    ("GET", "/env"),
    ("GET", "/whoami"),
    ("POST", "/request"),
    ("GET", "/response/x"),
    ("DELETE", "/response/x"),
    ("GET", "/result/x"),
    ("GET", "/result/x?until=99999999999&signature=x"),
    ("GET", "/result/../etc/passwd"),
    ("GET", "/nothing"),
    ("PUT", "/"),
]
WRONG = [
    {},
    {"ndif-api-key": ""},
    {"ndif-api-key": TOKEN[:-1]},
    {"ndif-api-key": TOKEN + "x"},
    {"ndif-api-key": TOKEN.upper()},
    {"ndif-api-key": "ü".encode()},
    {"authorization": f"Bearer {TOKEN}"},
    {"authorization": "Basic " + base64.b64encode(b"me:wrong").decode()},
    {"authorization": "Basic %%%"},
    {"cookie": f"ndif-api-key={TOKEN}"},
]


def envelope(server_name, **more):
    return RequestModel(model_key=f"{CLASS}:{json.dumps({'repo_id': server_name, 'revision': None})}", **more)


def post(host, asked, blob, headers=KEY, timeout=60):
    data = {"data": asked if isinstance(asked, str) else asked.metadata()}
    return httpx.post(f"{host}/request", data=data, files={"blob": ("request", blob)}, headers=headers, timeout=60)


def test_without_the_token_there_is_nothing(server):
    told = set()
    with httpx.Client(base_url=server.host) as client:
        for method, path in ROUTES:
            for headers in WRONG:
                answer = client.request(method, path, headers=headers)
                assert answer.status_code == 401, (method, path, headers)
                told.add(answer.content)
    assert told == {b'{"detail": "this server asks for its token"}', b""}
    for headers in WRONG:
        lines = [f"{name}: {value if isinstance(value, str) else 'x'}" for name, value in headers.items()]
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            websocket.create_connection(f"{server.host.replace('http', 'ws')}/subscribe", header=lines)
        assert refused.value.status_code == 401
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(f"{server.host.replace('http', 'ws')}/subscribe?ndif-api-key={TOKEN}")


def test_a_password_opens_the_page_and_nothing_else(server, folder):
    """A browser repeats it in requests that other pages make."""
    header = {"authorization": "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()}
    page = httpx.get(server.host, headers=header)
    assert page.status_code == 200
    assert "Whoever holds the token of this server runs code" in page.text
    assert "FluxTransformer2DModel" in page.text
    assert page.headers["content-security-policy"] == "default-src 'none'"
    assert httpx.get(server.host).headers["www-authenticate"].startswith("Basic ")
    for method, path in ROUTES[1:]:
        assert httpx.request(method, server.host + path, headers=header).status_code == 401


def test_a_lens_with_the_wrong_token(server, folder):
    lens = connect(folder, server.host, token="wrong")
    with pytest.raises(ExecutionError, match=r"refused the connection \(HTTP status 401\)\. Is the key right"):
        lens.run("red", seed=0)


def test_what_nnsight_asks_for(server):
    with httpx.Client(base_url=server.host, headers=KEY, timeout=60) as client:
        assert client.get("/ping").text == "pong"
        (state,) = client.get("/status").json()["deployments"].values()
        assert state["application_state"] == "RUNNING"
        assert client.get("/env").json()["packages"]["nnsight"]
        assert client.get("/whoami").json() == {"email": None, "tags": []}
        assert client.get("/response/nothing").json()["detail"].startswith("there is no such job")


def test_what_is_no_request(server, folder):
    """Each is refused, and the server goes on."""
    good = envelope(str(folder))
    before = psutil.Process(server.process).memory_info().rss
    for asked, blob, status, said in (
        ("{", b"", 400, "this is no request of nnsight's client"),
        (json.dumps({"no": "key"}), b"", 400, "model_key"),
        (envelope("other/model"), b"", 404, f"asks for other/model, and this server serves {folder}"),
        (RequestModel(model_key="nonsense"), b"", 404, "which names no pipeline"),
        (good.model_copy(update={"session_id": "made up"}), b"x", 409, "no open connection"),
    ):
        answer = post(server.host, asked, blob)
        assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    with httpx.Client(base_url=server.host, headers=KEY, timeout=60) as client:
        assert client.post("/request", content=b"garbage").status_code == 400
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert client.post("/request", content=secrets.token_bytes(100_000), headers=form).status_code == 400
        assert client.post("/request", content=b"", headers=form).status_code == 400
        many = {f"field{i}": "x" for i in range(50)}
        assert client.post("/request", data=many, files={"blob": b""}).status_code == 400
        assert client.post("/request", data={"data": "x" * 2_000_000}, files={"blob": b""}).status_code == 400
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100_000, b"A" * 200_000):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(10)
            try:
                raw.sendall(garbage)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(2**16):
                    pass
            except OSError:
                """It hung up."""
    assert psutil.Process(server.process).memory_info().rss < before + 30 * 2**20
    assert httpx.get(f"{server.host}/ping", headers=KEY, timeout=60).text == "pong"


def test_a_request_that_cannot_be_read(server, folder):
    """Its bytes are no payload: the job fails, with the versions on both sides."""
    received = post(server.host, envelope(str(folder)), b"garbage").json()
    assert received["status"] == "RECEIVED"
    while (state := httpx.get(f"{server.host}/response/{received['id']}", headers=KEY, timeout=60).json())[
        "status"
    ] != "ERROR":
        assert state["status"] in ("QUEUED", "RUNNING", "RECEIVED")
    assert re.search(
        r"the request could not be read: .*nnsight of no version.*here are nnsight 0\.8", state["description"]
    )


def test_what_is_too_large_is_thrown_away(narrow, folder):
    """A body of any length, told or not, stays out of memory and off the disk."""
    before = psutil.Process(narrow.process).memory_info().rss
    answer = post(narrow.host, envelope(str(folder)), b"x" * (40 * 2**20))
    assert answer.status_code == 413
    assert "larger than the 2 MiB that this server takes" in answer.json()["detail"]

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="blob"; filename="f"\r\n\r\n'
        for _ in range(400):
            yield b"x" * 100_000

    form = {**KEY, "content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{narrow.host}/request", content=endless(), headers=form, timeout=60)
    assert answer.status_code in (400, 413)
    assert psutil.Process(narrow.process).memory_info().rss < before + 20 * 2**20
    with pytest.raises(ExecutionError, match=r"refused the request \(HTTP status 413\): it is larger than the 2 MiB"):
        _send_much(connect(folder, narrow.host))


def _send_much(lens):
    import torch

    import dit_lens as dl

    lens.run("red", [dl.Swap("blocks.0.img", source=torch.rand(1, 96, 32) + i) for i in range(400)], seed=0)


def test_tokens():
    made = {choose_token(None, "127.0.0.1") for _ in range(5)}
    assert len(made) == 5
    assert min(map(len, made)) > 40
    assert choose_token("a" * 16, "0.0.0.0") == "a" * 16
    for host in ("0.0.0.0", "::", "192.168.1.5", "gpu.example.org", "127.0.0.1.example.org"):
        assert not is_loopback(host)
        with pytest.raises(ExecutionError, match=r"can be reached from other machines.*Choose a token yourself"):
            choose_token(None, host)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
    for token in ("", "short", "a" * 15, "a b" * 10, "ü" * 20, "a" * 20 + "\n"):
        with pytest.raises(ExecutionError, match="at least 16 characters"):
            choose_token(token, "127.0.0.1")


def test_an_address_that_is_taken(server, folder):
    with pytest.raises(ExecutionError, match=f"cannot listen at 127.0.0.1 port {server.port}: .*--port"):
        serve(str(folder), ServeOptions(port=server.port), print)
    with pytest.raises(ExecutionError, match="cannot listen at"):
        serve(str(folder), ServeOptions(host="no-such-host.invalid", token="a" * 20), print)


@pytest.mark.parametrize(
    ("served", "asked", "good"),
    [
        (("/models/FLUX.1-dev", None, True), ("/data/FLUX.1-dev", None), True),
        (("/models/FLUX.1-dev", None, True), ("black-forest-labs/FLUX.1-dev", None), True),
        (("/models/FLUX.1-dev", None, True), ("C:\\models\\FLUX.1-dev", None), True),
        (("/models/FLUX.1-dev", None, True), ("/models/FLUX.1-schnell", None), False),
        (("one/FLUX.1-dev", None, False), ("one/flux.1-dev", None), True),
        (("one/FLUX.1-dev", None, False), ("two/FLUX.1-dev", None), False),
        (("one/FLUX.1-dev", None, False), ("/models/FLUX.1-dev", None), True),
        (("one/FLUX.1-dev", "a", False), ("one/FLUX.1-dev", "b"), False),
        (("one/FLUX.1-dev", "a", False), ("one/FLUX.1-dev", "a"), True),
    ],
)
def test_names(served, asked, good):
    key = f"{CLASS}:{json.dumps({'repo_id': asked[0], 'revision': asked[1]})}"
    assert (Served(*served).why_not(key) == "") is good
    assert "class" in Served(*served).why_not(key.replace("DiffusionModel", "LanguageModel"))


@pytest.mark.parametrize("place", ["/elsewhere/dit_lens/toys/weights/", "C:\\elsewhere\\dit_lens\\toys\\weights\\"])
def test_a_toy_has_its_name_everywhere(place):
    """Where it lies is of no use to whoever reads the page on another machine."""
    served = Served(f"{place}flux", None, True)
    page = render_page(served, {})
    assert "DiTLens.remote(&#x27;toy:flux&#x27;, host=" in page
    asked = f"{CLASS}:{json.dumps({'repo_id': f'{place}sana', 'revision': None})}"
    said = served.why_not(asked)
    assert said == (
        "it asks for toy:sana, and this server serves toy:flux. Ask for DiTLens.remote('toy:flux', host=...)"
    )
    assert place not in page + said
    folder = render_page(Served("/models/FLUX.1-dev", None, True), {})
    assert "&#x27;/models/FLUX.1-dev&#x27;" in folder
    assert "has the same name" in folder


def test_packages_that_are_missing(tmp_path):
    """Where the extra is not installed, the command says how to install it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('uvicorn', 'starlette') else find(name, *a)\n"
    )
    command = [sys.executable, "-m", "dit_lens.commands.cli", "serve", "toy:flux"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, env={"PYTHONPATH": f"{tmp_path}:{root}"}, capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 2
    assert done.stderr == (
        "dit-lens: a server needs packages that are not installed (starlette, uvicorn). Install them: "
        "pip install 'dit-lens[serve]'\n"
    )
