"""A stand-in for an nnsight server's front door: its requests over HTTP, its news over a websocket, on a real socket.

What it does with a job is given to it, so that it can also break off, send half of something, or stay silent.
"""

import base64
import hashlib
import json
import struct
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nnsight.schema.response import ResponseModel, Status

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of RFC 6455


class Session:
    """One client's websocket.

    handler: the HTTP handler whose connection it took over.
    """

    def __init__(self, handler):
        self.handler, self.over = handler, threading.Event()

    def frame(self, kind, data):
        """Sends one frame. kind: 1 is text, 2 is binary, 8 closes."""
        size = len(data)
        head = bytes([size]) if size < 126 else struct.pack("!BQ", 127, size)
        self.handler.connection.sendall(bytes([0x80 | kind]) + head + data)

    def tell(self, status, description="", **more):
        """Sends news of the job."""
        news = ResponseModel(id="job-1", status=Status(status), description=description, **more)
        if isinstance(news.data, bytes):
            self.frame(2, news.pickle())
        else:
            self.frame(1, news.model_dump_json().encode())

    def close(self):
        """Closes as a server does that is stopped."""
        self.frame(8, struct.pack("!H", 1001))
        self.over.set()

    def drop(self):
        """Breaks the connection off, as a killed server or a cut cable does."""
        linger = struct.pack("ii", 1, 0)  # so that the other side sees a reset
        self.handler.connection.setsockopt(1, 13, linger)
        self.handler.connection.close()
        self.over.set()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/subscribe":
            self.send_error(404)
            return
        key = self.headers["Sec-WebSocket-Key"].encode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + GUID).digest()).decode())
        self.end_headers()
        self.wfile.flush()
        session = Session(self)
        number = str(len(self.server.sessions))
        self.server.sessions[number] = session
        session.frame(1, self.server.greeting or json.dumps({"session_id": number}).encode())
        session.over.wait(600)
        self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in BytesParser().parsebytes(kind + body).get_payload()
        }
        envelope = json.loads(parts["data"])
        status, answer = self.server.reply
        if answer is None:
            answer = ResponseModel(id="job-1", status=Status.RECEIVED).model_dump_json().encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        session = self.server.sessions[envelope["session_id"]]
        self.server.jobs.append(envelope["model_key"])
        self.server.job(session, envelope, parts["blob"])

    def log_message(self, *_):
        pass


class StandIn(ThreadingHTTPServer):
    """A server on this machine.

    job: function (session, envelope, blob), called once a request is there.
    greeting: what is sent first, in place of the session's name.
    reply: status and body of the answer to a request; a proper one for None.
    """

    daemon_threads = True

    def __init__(self, job, greeting=None, reply=(200, None)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.job, self.greeting, self.reply = job, greeting, reply
        self.sessions, self.jobs = {}, []

    @property
    def host(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that went away."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *problem):
        self.shutdown()
        for session in self.sessions.values():
            session.over.set()
        super().__exit__(*problem)
