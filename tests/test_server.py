"""Server: framing on the wire, keep-alive, doors, routes, drain; a real listener and raw clients."""

import asyncio
import http.client
import json
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, MESSAGES, Message, Peer, Running, Upstream, answers, controller, json_reply, request
from .wirefeed import turns

CHAT = json.dumps({"model": "echo", "messages": MESSAGES}).encode()


async def exchange(data: bytes, **config: Any) -> bytes:
    """Everything that a demo server answers to `data` before it closes."""
    async with Running(**config) as server:
        client = await server.open()
        await client.send(data)
        client.writer.write_eof()
        found = await client.closed()
        client.close()
        return found


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
        (b"GET /status HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /status HTTP/1.1\nHost: a\n\n", 400),
        (b"GET /status HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET /status HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
    ],
)
async def test_bad_framing_is_refused_and_the_connection_closed(raw: bytes, status: int) -> None:
    """What HTTP forbids gets one OpenAI-style error; what follows on the connection is never a request."""
    found = await exchange(raw + b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 %d " % status) and found.count(b"\r\n\r\n") == 1
    assert b"Connection: close" in found and json.loads(found.partition(b"\r\n\r\n")[2])["error"]["type"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"messages":[{}]}', 400),
        (b'{"model":"m"}', 400),
        (b'{"model":"m","messages":[1]}', 400),
        (b'{"model":"other","messages":[{"role":"user"}]}', 404),
        (b'{"model":"echo","messages":[{"role":"user"}],"stream":"yes"}', 400),
    ],
)
async def test_bodies_that_are_no_chat_request(body: bytes, status: int) -> None:
    """Each gets an error object and the connection lives on."""
    found = await exchange(request(body) + request(b"", target="/status", method="GET"))
    assert found.startswith(b"HTTP/1.1 %d " % status) and found.endswith(b'{"status":"ok"}')


async def test_compressed_bodies_are_refused() -> None:
    """Content-Encoding on a request gets 415."""
    assert (await exchange(request(CHAT, "Content-Encoding: gzip"))).startswith(b"HTTP/1.1 415 ")


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
    """Paths with and without /v1, percent-encoded and absolute, 404 and 405 with Allow."""
    found = await exchange(request(b"", target=target, method=method))
    assert found.startswith(b"HTTP/1.1 %d " % status) and holds in found
    assert method != "HEAD" or found.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(("line", "code"), [("Origin: http://evil", "origin"), ("Origin: null", "origin")])
async def test_a_foreign_page_is_refused(line: str, code: str) -> None:
    """Without client_keys a page's request is stopped before anything is sent upstream."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Running(controller("a", one.url)) as server:
        found = await server.post("m", line)
        assert found.status == 403 and found.json()["error"]["code"] == code + "_not_allowed" and not one.seen


async def test_a_foreign_host_is_refused_on_loopback() -> None:
    """DNS rebinding ends at the Host door, which allowed_hosts opens."""
    raw = request(b"", target="/status", method="GET").replace(b"Host: localhost", b"Host: api.example:8080")
    assert (await exchange(raw)).startswith(b"HTTP/1.1 403 ")
    assert (await exchange(raw, allowed_hosts=["api.example"])).startswith(b"HTTP/1.1 200 ")


async def test_allowed_origins_get_cors() -> None:
    """A configured page gets its preflight and its headers."""
    cors = {"allow_origins": ["https://app.example"]}
    asked = request(b"", "Origin: https://app.example", "Access-Control-Request-Headers: x-a", target="/v1/x", method="OPTIONS")
    found = await exchange(asked, cors=cors)
    assert found.startswith(b"HTTP/1.1 204 ") and b"Access-Control-Allow-Headers: x-a" in found
    assert b"Access-Control-Allow-Origin: https://app.example\r\nVary: Origin" in found


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "POST"])
async def test_a_preflight_allows_the_method_that_it_asks_for(method: str) -> None:
    """A page that may come in may delete what it has made: what is open is the routes' business."""
    fields = "Origin: https://app.example", f"Access-Control-Request-Method: {method}"
    asked = request(b"", *fields, target="/v1/files/x", method="OPTIONS")
    found = await exchange(asked, cors={"allow_origins": ["https://app.example"]}, endpoints=["*"])
    assert found.startswith(b"HTTP/1.1 204 ") and f"Access-Control-Allow-Methods: {method}\r\n".encode() in found


async def test_client_keys() -> None:
    """With client_keys only their bearers come in, to the models they may use; the key is found by its hash."""
    keys = [{"name": "alice", "key": "alice-key-123456", "models": ["echo"]}]
    async with Running(client_keys=keys) as server:
        assert (await server.post("echo")).status == 401
        assert (await server.post("echo", "Authorization: Bearer wrong")).status == 401
        for line in ("Authorization: Bearer alice-key-123456", "api-key: alice-key-123456", "x-api-key: alice-key-123456"):
            assert (await server.post("echo", line)).status == 200
        assert (await server.post("gpt-4.1", line)).status == 403
        assert any("key=alice" in text for text in server.lines) and "alice-key" not in "".join(server.lines)


async def test_http_1_0_and_connection_close() -> None:
    """HTTP/1.0 streams end with the connection; Connection: close is honoured."""
    body = json.dumps({"model": "echo", "messages": MESSAGES, "stream": True}).encode()
    raw = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with Running() as server:
        client = await server.open()
        await client.send(raw)
        found = await client.closed()
        client.close()
    assert b"Transfer-Encoding" not in found and found.endswith(b"data: [DONE]\n\n")


async def test_expect_100_continue() -> None:
    """The body is asked for once the head is found good."""
    async with Running() as server:
        client = await server.open()
        head, _, body = request(CHAT, "Expect: 100-continue").partition(b"\r\n\r\n")
        await client.send(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == app.CONTINUE
        await client.send(body)
        assert (await client.read()).status == 200
        client.close()


@pytest.mark.virtual_time
async def test_slow_requests_time_out() -> None:
    """A head or body that does not arrive gets 408; an idle connection is closed without a word."""
    async with Running() as server:
        for sent, holds in ((b"GET /st", b"408"), (request(CHAT)[:-5], b"408"), (b"", b"")):
            client = await server.open()
            await client.send(sent)
            found = await client.closed()
            assert holds in found and bool(holds) == bool(found)
            client.close()


async def test_drain_lets_answers_finish() -> None:
    """At a stop running answers end as they should, idle connections close, and nobody else comes in."""
    got, go = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        got.set()
        await go.wait()
        await peer.send(json_reply(200, ANSWER))

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        idle, busy = await server.open(), await server.open()
        await busy.post()
        await got.wait()
        stopping = asyncio.ensure_future(server.server.stop())
        assert await idle.closed() == b""
        go.set()
        found = await busy.read()
        assert found.status == 200 and found.headers["connection"] == "close"
        await stopping
        idle.close()
        busy.close()


@pytest.mark.parametrize("waits", ["a turn", "a future", "a pause"])
async def test_a_fiber_is_cancelled_once_wherever_it_waits(waits: str) -> None:
    """What would have woken it wakes nobody any more, neither when it has ended nor when it waits for something else."""
    loop, seen = asyncio.get_running_loop(), []
    first, second = loop.create_future(), loop.create_future()

    async def life() -> None:
        try:
            while waits == "a turn":
                await asyncio.sleep(0)
            await (first if waits == "a future" else app.PAUSE)
        except asyncio.CancelledError:
            seen.append("cancelled")
            first.cancel()
        await app.PAUSE
        seen.append("woken")
        await second

    fiber = app.Fiber(life(), loop)
    await turns(3)
    fiber.cancel()
    await turns(3)
    assert seen == ["cancelled"]
    fiber.resume()
    assert seen == ["cancelled", "woken"]
    fiber.cancel()
    await fiber.ended
    assert second.cancelled()
    await turns(3)  # an error of the coroutine would reach the exception handler, and fail this test


async def test_the_access_line_tells_the_story() -> None:
    """Time, client, method, path, model, status, controller, attempts and times, on one line that cannot be forged."""
    async with Running() as server:
        await server.post("gpt-\n4 x")
        server.server.access.flush()
        assert len(server.lines) == 1 and server.lines[0].count("\n") == 1
        assert " POST /v1/chat/completions 200 model=gpt-\\x0a4\\x20x controller=echo-a attempts=1 " in server.lines[0]


async def test_against_the_standard_librarys_client() -> None:
    """http.client, which shares no code with the server, reads whole answers and streams."""

    def ask(port: int) -> list[bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        found = []
        for stream in (False, True, False):
            body = json.dumps({"model": "echo", "messages": MESSAGES, "stream": stream})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            found.append(connection.getresponse().read())
        connection.close()
        return found

    async with Running() as server:
        found = await asyncio.to_thread(ask, server.port)
    assert b'"content":"hello"' in found[0] and found[1].endswith(b"data: [DONE]\n\n")
