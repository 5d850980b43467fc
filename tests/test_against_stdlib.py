"""Against code that shares nothing with ours: the server with http.client and urllib, its upstream client with http.server."""

import asyncio
import http.client
import http.server
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from .support import MESSAGES, Message, Running, controller
from .wirefeed import Stage

CHAT = {"model": "echo", "messages": MESSAGES}
BODY = json.dumps(CHAT).encode()
JSON = {"Content-Type": "application/json"}
PATH = "/v1/chat/completions"

Result = TypeVar("Result")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A server with an echo controller."""
    with Stage() as found:
        yield found


def ask(stage: Stage, work: Callable[[http.client.HTTPConnection], Result]) -> Result:
    """Run `work` in a thread, on a connection of http.client to the server."""

    def call() -> Result:
        connection = http.client.HTTPConnection("127.0.0.1", stage.running.port, timeout=10)
        try:
            return work(connection)
        finally:
            connection.close()

    async def main() -> Result:
        return await asyncio.to_thread(call)

    return stage.run(main)


def fetch(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, bytes, http.client.HTTPResponse]:
    """One request and all of its answer."""
    connection.request(method, path, body, JSON | more.pop("headers", {}), **more)
    found = connection.getresponse()
    return found.status, found.read(), found


def test_one_connection_carries_every_kind_of_answer(stage: Stage) -> None:
    """Whole answers, streams, errors, HEAD and OPTIONS follow each other on one connection of http.client."""

    def work(connection: http.client.HTTPConnection) -> None:
        connection.connect()
        first = connection.sock
        for _ in range(2):
            status, body, _ = fetch(connection, "POST", PATH, BODY)
            assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "hello"
            status, body, found = fetch(connection, "POST", PATH, json.dumps(CHAT | {"stream": True}))
            assert status == 200 and body.endswith(b"data: [DONE]\n\n") and found.getheader("transfer-encoding") == "chunked"
            assert fetch(connection, "GET", "/nowhere")[0] == 404
            assert fetch(connection, "DELETE", "/status")[0] == 405
            assert fetch(connection, "POST", PATH, b"{")[0] == 400
            assert fetch(connection, "OPTIONS", PATH)[:2] == (204, b"")
            status, body, found = fetch(connection, "HEAD", "/status")
            assert (status, body) == (200, b"") and int(found.getheader("content-length") or 0) > 0
            status, body, found = fetch(connection, "HEAD", "/nowhere")
            assert (status, body) == (404, b"") and int(found.getheader("content-length") or 0) > 0
            assert fetch(connection, "GET", "/status")[:2] == (200, b'{"status":"ok"}')
        assert connection.sock is first

    ask(stage, work)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_upload_in_chunks(size: int, stage: Stage) -> None:
    """A body that http.client sends in chunks is the body that it was given."""

    def pieces() -> Iterator[bytes]:
        yield from (BODY[at : at + size] for at in range(0, len(BODY), size))

    def work(connection: http.client.HTTPConnection) -> None:
        for _ in range(2):
            status, body, _ = fetch(connection, "POST", PATH, pieces(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
            assert status == 200 and b'"content":"hello"' in body

    ask(stage, work)


def test_a_large_upload(stage: Stage) -> None:
    """Two megabytes arrive whole, by length and in chunks."""
    body = json.dumps(CHAT | {"user": "x" * 2_000_000}).encode()

    def work(connection: http.client.HTTPConnection) -> None:
        assert fetch(connection, "POST", PATH, body)[0] == 200
        chunked = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
        assert fetch(connection, "POST", PATH, chunked, encode_chunked=True)[0] == 200

    ask(stage, work)


def test_an_upload_that_is_too_large_is_refused_from_its_head(stage: Stage) -> None:
    """The answer comes before the body; http.client reads it and finds the connection closed."""

    def work(connection: http.client.HTTPConnection) -> None:
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", str(1 << 40))
        connection.endheaders()
        found = connection.getresponse()
        assert found.status == 413 and json.loads(found.read())["error"]["code"] == "request_too_large"
        assert found.will_close and connection.sock is None

    ask(stage, work)


def test_the_client_may_ask_to_close(stage: Stage) -> None:
    """`Connection: close` is answered with the same, and http.client opens a new connection by itself."""

    def work(connection: http.client.HTTPConnection) -> None:
        for _ in range(2):
            status, _, found = fetch(connection, "POST", PATH, BODY, headers={"Connection": "close"})
            assert status == 200 and found.getheader("connection") == "close" and connection.sock is None

    ask(stage, work)


def test_http_1_0_of_http_client(stage: Stage) -> None:
    """A client of HTTP/1.0 gets whole answers and, until the close, streams."""

    def work(connection: http.client.HTTPConnection) -> None:
        connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
        for stream in (False, True):
            status, body, found = fetch(connection, "POST", PATH, json.dumps(CHAT | {"stream": stream}))
            assert status == 200 and found.getheader("transfer-encoding") is None
            assert body.endswith(b"data: [DONE]\n\n") is stream

    ask(stage, work)


def test_expectations(stage: Stage) -> None:
    """`100 Continue` comes before the body is sent; http.client skips it and reads the answer."""

    def work(connection: http.client.HTTPConnection) -> None:
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", str(len(BODY)))
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.sock.recv(4, socket.MSG_PEEK) == b"HTTP"
        connection.send(BODY)
        found = connection.getresponse()
        assert found.status == 200 and b'"content":"hello"' in found.read()

    ask(stage, work)


def test_urllib_reads_answers_and_errors(stage: Stage) -> None:
    """urllib.request gets answers, streams line by line, and errors with their JSON."""

    def work() -> None:
        base = "http://127.0.0.1:%d" % stage.running.port
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def get(path: str, body: bytes | None) -> Any:
            return opener.open(urllib.request.Request(base + path, body, JSON), timeout=10)  # noqa: S310  # http only

        with get(PATH, BODY) as found:
            assert found.status == 200 and json.load(found)["object"] == "chat.completion"
        streamed = json.dumps(CHAT | {"stream": True}).encode()
        with get(PATH, streamed) as found:
            lines = [line for line in found if line.strip()]
            assert all(line.startswith(b"data: ") for line in lines) and lines[-1] == b"data: [DONE]\n"
        for path, body, status in ((PATH, b"[]", 400), ("/v1/nowhere", None, 404), ("/status", b"", 405)):
            with pytest.raises(urllib.error.HTTPError) as told:
                get(path, body)
            with told.value as error:
                assert error.code == status and sorted(json.load(error)["error"]) == ["code", "message", "param", "type"]

    async def main() -> None:
        await asyncio.to_thread(work)

    stage.run(main)


# ---- http.server as the upstream


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked, framed as its server says."""

    server: "Up"

    def handle(self) -> None:
        self.server.connections += 1
        super().handle()

    def do_POST(self) -> None:
        assert self.headers["Transfer-Encoding"] is None and self.headers.get_all("Content-Length") is not None
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.requestline, dict(self.headers.items()), asked))
        if json.loads(asked)["model"] == "refused":
            self.send_error(422, "Refused")
            return
        body = json.dumps({"asked": json.loads(asked)["messages"][0]["content"], "pad": "x" * self.server.pad}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if self.server.framing == "length":
            self.send_header("Content-Length", str(len(body)))
        elif self.server.framing == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%X;n=1\r\n%b\r\n" % (len(body[at : at + 999]), body[at : at + 999]) for at in range(0, len(body), 999))
            body += b"0\r\nX-Sum: 1\r\n\r\n"
        else:
            self.close_connection = True
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
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> "Up":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.mark.parametrize("pad", [0, 200_000, 2_000_000])
@pytest.mark.parametrize(
    ("version", "framing", "connections"),
    [("HTTP/1.0", "length", 3), ("HTTP/1.0", "close", 3), ("HTTP/1.1", "length", 1), ("HTTP/1.1", "chunked", 1), ("HTTP/1.1", "close", 3)],
)
def test_http_server_as_the_upstream(version: str, framing: str, connections: int, pad: int) -> None:
    """Answers of http.server arrive whole in each of its framings; a connection is used again exactly where it may be."""

    async def main() -> list[Message]:
        async with Running(controller("a", "http://127.0.0.1:%d/v1" % up.server_port)) as server:
            found = []
            for number in range(3):
                messages = [{"role": "user", "content": str(number)}]
                found.append(await server.post("m", messages=messages))
            assert repr(server.server.links) == "<ConnectionPool idle=%d active=0>" % (connections == 1)
            return found

    with Up(version, framing, pad) as up:
        found = asyncio.run(main())
    assert [(one.status, one.json()["asked"], len(one.json()["pad"])) for one in found] == [(200, str(n), pad) for n in range(3)]
    assert up.connections == connections and len(up.seen) == 3
    for start, fields, body in up.seen:
        assert start == "POST /v1/chat/completions HTTP/1.1" and json.loads(body)["model"] == "m"
        assert fields["Host"] == "127.0.0.1:%d" % up.server_port


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
def test_errors_of_http_server_are_shown(version: str) -> None:
    """An error page of http.server reaches the client with its status, its body and its type."""

    async def main() -> list[Message]:
        async with Running(controller("a", "http://127.0.0.1:%d/v1" % up.server_port)) as server:
            return [await server.post("refused") for _ in range(2)]

    with Up(version, "length", 0) as up:
        for found in asyncio.run(main()):
            assert found.status == 422 and b"Refused" in found.body and found.headers["content-type"].startswith("text/html")
