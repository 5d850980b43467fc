"""Server: framing on the wire, keep-alive, doors, routes, draining; a real listener and raw clients."""

import asyncio
import json
import socket
import ssl
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    CERT,
    KEY,
    MESSAGES,
    SSE_HEAD,
    Client,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    event,
    json_reply,
    now,
    pause,
    request,
    until,
)
from .wirefeed import turns

CHAT = json.dumps({"model": "echo", "messages": MESSAGES}).encode()
LAST = request(b"", "Connection: close", target="/status", method="GET")


async def exchange(data: bytes, **config: Any) -> bytes:
    """Return everything that a demo server answers to `data` before it closes."""
    async with Running(**config) as server:
        client = await server.open()
        await client.send(data)
        reply = await client.closed()
        client.close()
        return reply


# -- requests on one connection


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Three requests in one write get three answers, and the connection stays open."""
    get = request(b"", target="/status", method="GET")
    async with Running() as server:
        client = await server.open()
        await client.send(get + request(CHAT) + get)
        assert [(await client.read()).json().get("object", "-") for _ in range(3)] == ["-", "chat.completion", "-"]
        client.close()


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
async def test_a_request_cut_anywhere_is_the_same_request(step: int) -> None:
    """Reads may end anywhere in head, chunk sizes and body."""
    chunks = b"".join(app.chunk(CHAT[at : at + 9]) for at in range(0, len(CHAT), 9)) + b"0\r\nX-T: 1\r\n\r\n"
    wire = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    async with Running() as server:
        client = await server.open()
        for at in range(0, len(wire), step):
            await client.send(wire[at : at + step])
            await asyncio.sleep(0)
        assert (await client.read()).status == 200
        client.close()


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /status HTTP/1.1\r\n\r\n", 400),
        (b"GET /status HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
    ],
)
async def test_bad_framing_ends_the_connection(raw: bytes, status: int) -> None:
    """What HTTP forbids gets one OpenAI-style error, and what follows is never a request (the rest is in tests/wire)."""
    reply = await exchange(raw + LAST)
    assert reply.startswith(b"HTTP/1.1 %d " % status) and reply.count(b"\r\n\r\n") == 1
    assert b"Connection: close" in reply and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{nope", 400),
        (b"[" * 100_000, 400),
        (json.dumps({"messages": MESSAGES}).encode(), 400),
        (b'{"model":"m"}', 400),
        (b'{"model":"m","messages":[]}', 400),
        (b'{"model":"m","messages":[1]}', 400),
        (b'{"model":"other","messages":[{"role":"user"}]}', 404),
        (b'{"model":"m","messages":[{"role":"user"}],"stream":"yes"}', 400),
        (b"gzip", 415),
    ],
)
async def test_bodies_that_are_no_chat_request(body: bytes, status: int) -> None:
    """Each gets an error object, nothing is sent upstream, no controller is blamed, and the connection goes on."""
    async with (
        Upstream(answers(json_reply(200, ANSWER))) as one,
        Running(controller("a", one.url, models=["m", "gpt-4*"])) as server,
    ):
        client = await server.open()
        await client.send(request(body, *(["Content-Encoding: gzip"] if body == b"gzip" else [])) + LAST)
        answer = await client.read()
        assert answer.status == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert status != 404 or "gpt-4*" in answer.json()["error"]["message"]
        assert (await client.read()).json() == {"status": "ok"} and not one.seen
        client.close()
        assert (await server.status())["controllers"][0]["failures"] == 0


async def test_http_1_0() -> None:
    """An HTTP/1.0 stream has no chunks and ends with the connection."""
    body = json.dumps({"model": "echo", "messages": MESSAGES, "stream": True}).encode()
    reply = await exchange(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert b"Transfer-Encoding" not in reply and reply.endswith(b"data: [DONE]\n\n")


# -- routes and doors


@pytest.mark.parametrize(
    ("method", "target", "status", "holds"),
    [
        ("GET", "/status", 200, b'{"status":"ok"}'),
        ("HEAD", "/status", 200, b"Content-Length: 15"),
        ("GET", "/v1/models", 200, b'"id":"echo"'),
        ("GET", "/models/echo", 200, b'"object":"model"'),
        ("GET", "/v1/models/none", 404, b"model_not_found"),
        ("GET", "http://localhost/v1/%6dodels", 200, b'"list"'),
        ("DELETE", "/v1/models", 405, b"Allow: GET, HEAD, OPTIONS"),
        ("GET", "/v1/chat/completions", 405, b"Allow: POST, OPTIONS"),
        ("GET", "/nothing", 404, b"unknown_url"),
    ],
)
async def test_routes(method: str, target: str, status: int, holds: bytes) -> None:
    """Paths work with and without /v1, percent-encoded and absolute; others get 404, or 405 with Allow."""
    reply = await exchange(request(b"", "Connection: close", target=target, method=method))
    assert reply.startswith(b"HTTP/1.1 %d " % status) and holds in reply
    assert method != "HEAD" or reply.endswith(b"\r\n\r\n")


async def test_the_servers_own_answers_have_a_date() -> None:
    """A server with a clock sends Date (RFC 9110, 6.6.1); an upstream's Date is passed on."""  # new words
    async with Upstream(answers(json_reply(200, ANSWER, "Date: Sun, 06 Nov 1994 08:49:37 GMT"))) as one:
        async with Running(controller("a", one.url)) as server:
            own = [(await server.ask("GET", path)).headers["date"] for path in ("/status", "/v1/models", "/nothing")]
            assert all(parsedate_to_datetime(date).tzinfo is not None for date in own)
            assert (await server.post()).headers["date"] == "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize("origin", ["http://evil", "null"])
async def test_a_foreign_page_is_refused(origin: str) -> None:
    """Without client_keys the request of a page is stopped before anything is sent upstream."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Running(controller("a", one.url)) as server:
        answer = await server.post("m", f"Origin: {origin}")
        assert answer.status == 403 and answer.json()["error"]["code"] == "origin_not_allowed" and not one.seen


@pytest.mark.parametrize("method", ["", "DELETE", "PATCH", "POST"])
async def test_a_preflight_of_an_allowed_origin(method: str) -> None:
    """A configured page may use the headers and the method that it asks for; the routes decide what is open."""
    fields = ["Origin: https://app.example", "Access-Control-Request-Headers: x-a", "Connection: close"]
    fields += [f"Access-Control-Request-Method: {method}"] if method else []
    asked = request(b"", *fields, target="/v1/files/x", method="OPTIONS")
    reply = await exchange(asked, cors={"allow_origins": ["https://app.example"]}, endpoints=["*"])
    assert reply.startswith(b"HTTP/1.1 204 ") and b"Access-Control-Allow-Headers: x-a" in reply
    assert f"Access-Control-Allow-Methods: {method or 'GET, POST'}\r\n".encode() in reply
    assert b"Access-Control-Allow-Origin: https://app.example\r\nVary: Origin" in reply


async def test_an_access_line() -> None:
    """Method, path, status, model, controller and attempts stand on one line that a client cannot forge."""
    async with Running() as server:
        await server.post("gpt-\n4 x")
        (line,) = server.access_lines()
        words = " method=POST path=/v1/chat/completions status=200 model=gpt-\\x0a4\\x20x sent=gpt-\\x0a4\\x20x controller=echo-a "
        assert words in line and line.endswith(" attempts=1\n")


# -- draining


@pytest.mark.virtual_time
async def test_draining_lets_answers_finish() -> None:
    """At a stop /status says draining, then idle connections and the listener close, and running answers end."""
    gate = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await gate.wait()
        await peer.send(json_reply(200, ANSWER))

    async with Upstream(script) as one, Running(controller("a", one.url), drain_delay=3) as server:
        idle, busy = await server.open(), await server.open()
        await busy.post()
        await until(lambda: one.seen)
        since, stopping = now(), asyncio.ensure_future(server.server.drain())
        await turns()
        answer = await server.ask("GET", "/status")
        assert (answer.status, answer.json()) == (503, {"status": "draining"})
        assert await idle.closed() == b"" and now() - since >= 3
        await pause(0.1)
        with pytest.raises(OSError):
            await server.open()
        gate.set()
        answer = await busy.read()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        await stopping
        idle.close()
        busy.close()


@pytest.mark.virtual_time
async def test_an_idle_connection_is_closed_after_a_grace() -> None:
    """A request that crosses the beginning of a stop is still served; its answer says that the connection closes."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Running(controller("a", one.url)) as server:
        used, idle = await server.open(), await server.open()
        for client in (used, idle):
            await client.post()
            assert "connection" not in (await client.read()).headers
        since, stopping = now(), asyncio.ensure_future(server.server.drain())
        await turns()
        await used.post()
        answer = await used.read()
        assert answer.status == 200 and answer.headers["connection"] == "close" and await used.closed() == b""
        assert await idle.closed() == b"" and 1 <= now() - since < 1.1
        await stopping
        used.close()
        idle.close()


@pytest.mark.parametrize("tls", [{}, {"cert": CERT, "key": KEY}])
async def test_connections_accepted_as_the_stop_begins_are_served(tls: dict[str, str]) -> None:
    """What the kernel hands over in the turn before the listener closes is answered, as what came earlier."""
    async with Running({"type": "echo"}, tls=tls) as server:
        sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        stopping = asyncio.ensure_future(server.server.drain())
        context = ssl.create_default_context(cafile=CERT) if tls else None
        for raw in sockets:
            named = {"ssl": context, "server_hostname": "localhost"} if context else {}
            client = Client(*await asyncio.open_connection(sock=raw, **named))
            await client.send(request(CHAT))
            answer = await client.read()
            assert answer.status == 200 and answer.headers["connection"] == "close"
            client.close()
        await stopping


async def test_a_client_that_leaves_within_its_body_is_logged() -> None:
    """Its access line has status 499, and no controller was asked."""
    async with Running() as server:
        client = await server.open()
        await client.send(request(b"x" * 1000)[:-10])
        await turns()
        client.close()
        await until(server.access_lines)
        (line,) = server.access_lines()
        assert " status=499 " in line and "attempts=0" in line


async def test_a_slow_reader_is_told_of_the_stop() -> None:
    """The error event comes behind what its client has not read yet."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        while not peer.writer.is_closing():
            await peer.chunk(event("x" * 4000))

    async with Upstream(script) as one, Running(controller("a", one.url), drain_timeout=0.05) as server:
        client = await server.open()
        await client.post(stream=True)
        await until(lambda: any(connection.protocol.full for connection in server.server.connections))
        await server.server.drain()
        closing = asyncio.ensure_future(server.server.close())
        received = await client.reader.read()
        await closing
        assert received.endswith(b"\r\n") and b"server_shutdown" in received[-300:]
        assert "tried=a:stopped:" in server.access_lines()[0]
        client.close()
