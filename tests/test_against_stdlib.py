"""Against code that shares nothing with the module: the server with http.client, its upstream client with http.server."""

import asyncio
import contextlib
import http.client
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .support import ANSWER, MESSAGES, Message, Running, controller
from .wirefeed import Stage, pooled

CHAT = {"model": "echo", "messages": MESSAGES}
BODY = json.dumps(CHAT).encode()
STREAMED = json.dumps(CHAT | {"stream": True}).encode()
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Yield a server with an echo controller."""
    with Stage() as made:
        yield made


def ask(stage: Stage, work: Callable[[http.client.HTTPConnection], None]) -> None:
    """Run `work` in a thread, on a connection of http.client to the server."""

    def call() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", stage.running.port, timeout=10)) as connection:
            work(connection)

    stage.run(lambda: asyncio.to_thread(call))


Fetched = tuple[int, bytes, http.client.HTTPResponse]


def fetch(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, *headers: str, **more: Any) -> Fetched:
    """Send one request and read its whole answer."""
    fields = {"Content-Type": "application/json", **dict(header.split(": ") for header in headers)}
    connection.request(method, path, body, fields, **more)
    reply = connection.getresponse()
    return reply.status, reply.read(), reply


def test_one_connection_carries_every_kind_of_answer(stage: Stage) -> None:
    """Whole answers, streams, errors, HEAD and OPTIONS follow each other on one connection, until one side asks to close it."""

    def work(connection: http.client.HTTPConnection) -> None:
        connection.connect()
        first = connection.sock
        for _ in range(2):
            status, body, _ = fetch(connection, "POST", PATH, BODY)
            assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "hello"
            status, body, reply = fetch(connection, "POST", PATH, STREAMED)
            assert status == 200 and body.endswith(b"data: [DONE]\n\n") and reply.getheader("transfer-encoding") == "chunked"
            plain = (("GET", "/nowhere", 404), ("DELETE", "/status", 405), ("POST", PATH, 400), ("OPTIONS", PATH, 204))
            for method, path, expected in plain:
                assert fetch(connection, method, path, b"{" if method == "POST" else None)[0] == expected
            for path, expected in (("/status", 200), ("/nowhere", 404)):
                status, body, reply = fetch(connection, "HEAD", path)
                assert (status, body) == (expected, b"") and int(reply.getheader("content-length") or 0) > 0
            assert fetch(connection, "GET", "/status")[:2] == (200, b'{"status":"ok"}')
        assert connection.sock is first
        for _ in range(2):  # http.client connects again by itself
            status, _, reply = fetch(connection, "POST", PATH, BODY, "Connection: close")
            assert status == 200 and reply.getheader("connection") == "close" and connection.sock is None

    ask(stage, work)


@pytest.mark.parametrize(("size", "padding"), [(1, 0), (7, 0), (1000, 0), (50_000, 2_000_000)])
def test_uploads(size: int, padding: int, stage: Stage) -> None:
    """A body arrives whole, by its length and in chunks of each size."""
    whole = json.dumps(CHAT | {"user": "x" * padding}).encode()

    def pieces() -> Iterator[bytes]:
        yield from (whole[at : at + size] for at in range(0, len(whole), size))

    def work(connection: http.client.HTTPConnection) -> None:
        assert fetch(connection, "POST", PATH, whole)[0] == 200
        status, body, _ = fetch(connection, "POST", PATH, pieces(), "Transfer-Encoding: chunked", encode_chunked=True)
        assert status == 200 and b'"content":"hello"' in body

    ask(stage, work)


# ---- http.server as the upstream


class Handler(http.server.BaseHTTPRequestHandler):
    """A handler that answers with the prompt of the request, framed as its server says."""

    server: "Up"

    def handle(self) -> None:
        self.server.connections += 1
        super().handle()

    def do_POST(self) -> None:
        assert self.headers["Transfer-Encoding"] is None and self.headers.get_all("Content-Length") is not None
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.requestline, self.headers["Host"]))
        if asked["model"] == "refused":
            self.send_error(422, "Refused")
            return
        body = json.dumps({**ANSWER, "asked": asked["messages"][0]["content"], "pad": "x" * self.server.pad}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if self.server.framing == "length":
            self.send_header("Content-Length", str(len(body)))
        elif self.server.framing == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            parts = [body[at : at + 999] for at in range(0, len(body), 999)]
            body = b"".join(b"%X;n=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nX-Sum: 1\r\n\r\n"
        self.close_connection |= self.server.framing == "close"
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Up(http.server.ThreadingHTTPServer):
    """http.server in a thread; each connection has its own."""

    daemon_threads = False

    def __init__(self, version: str, framing: str, pad: int) -> None:
        handler = type("Versioned", (Handler,), {"protocol_version": version, "timeout": 10})
        super().__init__(("127.0.0.1", 0), handler)
        self.framing, self.pad, self.connections = framing, pad, 0
        self.seen: list[tuple[str, str]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> "Up":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.mark.parametrize("pad", [0, 2_000_000])
@pytest.mark.parametrize(
    ("version", "framing", "connections"),
    [("HTTP/1.0", "length", 3), ("HTTP/1.0", "close", 3), ("HTTP/1.1", "length", 1), ("HTTP/1.1", "chunked", 1), ("HTTP/1.1", "close", 3)],
)
def test_http_server_as_the_upstream(version: str, framing: str, connections: int, pad: int) -> None:
    """Answers of http.server arrive whole in each framing, its error page unchanged; connections are reused where allowed."""

    async def main() -> tuple[list[Message], Message]:
        async with Running(controller("a", f"http://127.0.0.1:{up.server_port}/v1")) as server:
            replies = [await server.post("m", messages=[{"role": "user", "content": str(number)}]) for number in range(3)]
            assert pooled(server) == (connections == 1, 0)
            assert up.connections == connections
            return replies, await server.post("refused")

    with Up(version, framing, pad) as up:
        replies, refused = asyncio.run(main())
    assert [(reply.status, reply.json()["asked"], len(reply.json()["pad"])) for reply in replies] == [(200, str(n), pad) for n in range(3)]
    assert up.seen == [("POST /v1/chat/completions HTTP/1.1", f"127.0.0.1:{up.server_port}")] * 4
    assert refused.status == 422 and b"Refused" in refused.body and refused.json()["error"]["code"] is None
