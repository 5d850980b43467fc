"""Bounds on what clients may take: each has a default, a configuration key, and an end that other clients do not feel."""

import asyncio
import json
import socket
from typing import Any

import pytest

import chatgpt_apiserver as app

from .conftest import open_transports
from .support import (
    ANSWER,
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
    sse_reply,
    until,
)
from .wirefeed import turns

STALLED, LONGER = {"write_timeout": 7}, {"write_timeout": 14, "idle_timeout": 2}
STATUS = request(b"", target="/status", method="GET")
KEYS = [{"key": "alice-key-123456"}]
CHAT = "/v1/chat/completions"


def server_side(client: Client) -> Any:
    """Return the server's transport for a client's connection."""
    address = client.writer.get_extra_info("sockname")
    return next(one for one in open_transports() if one.get_extra_info("peername") == address)


async def open_stalled(server: Running) -> Client:
    """Return a client that reads nothing, and for which the kernel takes no more than some kilobytes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    client = Client(*await asyncio.open_connection(sock=sock))
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await turns()
    server_side(client).get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


async def end_of_all(server: Running, most_s: float) -> float:
    """Return after how many seconds no connection is left."""
    since = now()
    while server.server.connections:
        assert now() - since < most_s, server.server.connections
        await pause(0.5)
    return now() - since


# -- clients that do not read


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("size", "more", "limits", "least_s"),
    [
        *((200_000, b"", STALLED, 6), (900_000, b"", STALLED, 6), (900_000, b"Connection: close", STALLED, 6)),
        *((40_000, b"", LONGER, 12), (40_000, b"Connection: close", LONGER, 12), (40_000, b"BAD\r\n\r\n", LONGER, 12)),
    ],
)
async def test_a_reader_that_stops_in_a_whole_answer(size: int, more: bytes, limits: Any, least_s: float) -> None:
    """A client that does not read its answer is dropped after write_timeout; its controller is free long before."""
    async with Upstream(answers(json_reply(200, {**ANSWER, "pad": "x" * size}))) as one:
        async with Running(controller("a", one.url), limits=limits) as server:
            client = await open_stalled(server)
            await client.post("m", *([more.decode()] if b":" in more else []))
            await client.send(more if b"BAD" in more else b"")
            await pause(1)
            links = server.server.links
            assert links.idle_count == 1 and not links.active and len(server.server.connections) == 1
            assert least_s - 1 <= await end_of_all(server, 18) <= least_s + 5
            client.close()


@pytest.mark.virtual_time
async def test_a_reader_that_stops_in_a_stream_is_dropped() -> None:
    """A stream that is not read ends after write_timeout, upstream too; meanwhile little of it is read and kept."""
    sent = 0

    async def script(peer: Peer, _: Message) -> None:
        nonlocal sent
        await peer.send(SSE_HEAD)
        while not peer.writer.is_closing():
            await peer.chunk(event("x" * 5000))
            sent += 5000

    async with Upstream(script) as one, Running(controller("a", one.url), limits=STALLED) as server:
        client = await open_stalled(server)
        await client.post("m", stream=True)
        await pause(3)
        assert 50_000 < server_side(client).get_write_buffer_size() < 300_000 and sent < 40_000_000
        assert 3 <= await end_of_all(server, 10) <= 6
        assert not server.server.links.idle_count and not server.server.links.active
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize(("after_s", "stop"), [(5, False), (1, True), (5, True)])
async def test_a_slow_reader_gets_the_end_of_its_answer(after_s: int, stop: bool) -> None:
    """A connection that is about to close, by the idle timeout, at a stop or by both, first sends what is left."""
    answer = json_reply(200, {**ANSWER, "pad": "x" * 40_000})
    async with Upstream(answers(answer)) as one:
        async with Running(controller("a", one.url), limits={"write_timeout": 30, "idle_timeout": 2}) as server:
            client = await open_stalled(server)
            await client.post("m")
            await pause(after_s)
            stopping = asyncio.ensure_future(server.server.drain()) if stop else None
            await pause(1)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert (await client.read()).body == answer.partition(b"\r\n\r\n")[2]
            assert await client.closed() == b""
            client.close()
            if stopping:
                await stopping


@pytest.mark.virtual_time
@pytest.mark.parametrize("stream", [False, True])
async def test_pipelining_without_reading_is_bounded(stream: bool) -> None:
    """A client that sends request after request and never reads is answered no further, and dropped."""
    reply = sse_reply(event("x" * 30_000)) if stream else json_reply(200, {**ANSWER, "pad": "x" * 30_000})
    async with Upstream(answers(reply)) as one, Running(controller("a", one.url), limits=STALLED) as server:
        client = await open_stalled(server)
        for _ in range(200):
            client.writer.write(request(json.dumps({"model": "m", "stream": stream, "messages": MESSAGES}).encode()))
        await pause(2)
        assert server_side(client).get_write_buffer_size() < 200_000 and len(one.seen) < 12
        assert 3 <= await end_of_all(server, 10) <= 8
        client.close()


# -- connections


@pytest.mark.parametrize(("key", "other"), [("connections", 503), ("connections_per_client", 200)])
async def test_the_number_of_connections(key: str, other: int) -> None:
    """Above the bound a new connection gets 503 at once and ends; the others are served, and a place comes free again."""
    async with Running(limits={key: 2}) as server:
        mine = [await server.open() for _ in range(2)]
        await until(lambda: len(server.server.connections) == 2)
        refused = await server.open()
        answer = await refused.read()
        assert (answer.status, answer.headers["connection"]) == (503, "close") and await refused.closed() == b""
        far = Client(*await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0)))
        await far.send(STATUS)
        assert (await far.read()).status == other
        for client in (mine[0], far, refused):
            client.close()
        await until(lambda: len(server.server.connections) == 1)
        for client in (await server.open(), mine[1]):
            await client.send(STATUS)
            assert (await client.read()).status == 200
            client.close()


# -- sizes


def get(size: int) -> bytes:
    """Return a request with a header of this size."""
    return request(b"", "X: " + "a" * size, target="/status", method="GET")


def chunked(*sizes: int) -> bytes:
    """Return the beginning of a request whose body comes in chunks of these sizes."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(app.chunk(b" " * size) for size in sizes)


@pytest.mark.parametrize(
    ("key", "value", "good", "bad", "status"),
    [
        ("header_bytes", 2000, get(1900), get(2000), 431),
        ("body_bytes", 500, request(b" " * 500), request(b" " * 501)[:-501], 413),
        ("body_bytes", 500, chunked(250, 250) + app.LAST_CHUNK, chunked(250, 251), 413),
        ("body_bytes", 500, chunked(500) + app.LAST_CHUNK, chunked()[:-2] + b"\r\n1f5\r\n", 413),
    ],
)
async def test_sizes_of_requests(key: str, value: int, good: bytes, bad: bytes, status: int) -> None:
    """Exactly as much as configured is taken; a byte more is refused as soon as it is known, and the connection ends."""
    async with Running(limits={key: value}) as server:
        client = await server.open()
        await client.send(good)
        answer = await client.read()
        assert answer.status in (200, 400) and "connection" not in answer.headers
        await client.send(bad)
        answer = await client.read()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        client.close()


async def test_a_reload_bounds_the_bodies_of_open_connections() -> None:
    """The limits of a new configuration apply to open connections."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        for limit, status in ((4000, 200), (4000, 200), (40, 413)):
            server.reload(controller("a", one.url), limits={"body_bytes": limit})
            await client.send(request(b'{"model":"m","messages":[{"role":"user","content":"x"}]}'))
            assert (await client.read()).status == status
        client.close()


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","messages":[{"role":"user","content":"x"}],"x":%s}',
        '{"model":"m","messages":[{"role":"user","content":%s}]}',
        '{"tools":%s,"model":"m","messages":[{"role":"user","content":"x"}]}',
        '{"Model":"m","Messages":[{"Role":"user","Content":"x"}],"Tools":%s}',
        '{"model":"m","input":%s}',
    ],
)
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
async def test_the_depth_of_json(body: str, opening: str, closing: str) -> None:
    """A body that is nested too deep for the decoder gets 400, wherever it is deep; a less deep one passes."""
    target = "/v1/embeddings" if "input" in body else "/v1/chat/completions"
    keys = [{**KEYS[0], "models": ["*"]}]
    async with Upstream(answers(json_reply(200, ANSWER))) as one:
        async with Running(controller("a", one.url, model_map={"m": "n"}), client_keys=keys) as server:
            for count, status in ((20, 200), (100_000, 400)):
                data = (body % (opening * count + "1" + closing * count)).encode()
                assert (await server.ask("POST", target, data, "api-key: alice-key-123456")).status == status
            assert len(one.seen) == 1


@pytest.mark.parametrize(
    ("value", "status"),
    [
        *((f"[{(value + ',') * (8_000_000 // (len(value) + 1))}{value}]", 413) for value in ("0", "[]", '{"a":0}', '"ab"')),
        (json.dumps([list(range(100_000, 100_147))] * 2048), 200),
        (json.dumps("Well, [this] is a text, {yes}. " * 60_000), 200),
    ],
    ids=["0", "[]", "{}", "ab", "tokens", "text"],
)
async def test_bodies_of_many_values(value: str, status: int) -> None:
    """Values that would take 20 times their size are refused unparsed; 2048 lists of tokens and a long text pass."""
    async with Upstream(answers(json_reply(200, {}))) as one, Running(controller("a", one.url)) as server:
        answer = await server.ask("POST", "/v1/embeddings", f'{{"model":"m","input":{value}}}'.encode())
        assert answer.status == status and len(one.seen) == (status == 200)
        assert status == 200 or answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json"])
async def test_an_upstreams_chunk_may_be_huge(kind: bytes) -> None:
    """A chunk of a terabyte is passed on as it arrives."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD.replace(b"text/event-stream", kind) + b"ffffffffff\r\n" + event("x"))
        for _ in range(100):
            await peer.send(b"x" * 50_000)
        await peer.gone()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post("m", stream=b"event" in kind)
        await client.read(head_only=True)
        await client.reader.readexactly(3_000_000)
        client.close()


@pytest.mark.virtual_time
async def test_all_bodies_together() -> None:
    """Bodies that arrive or whose requests are running count for bodies_bytes; one too many gets 503."""

    async def script(peer: Peer, _: Message) -> None:
        await until(lambda: len(one.seen) == 2)
        await peer.send(json_reply(200, ANSWER))

    async with Upstream(script) as one, Running(controller("a", one.url), limits={"bodies_bytes": 1_000_000}) as server:
        clients = [await server.open() for _ in range(4)]
        await clients[0].post("m", pad="x" * 400_000)
        await until(lambda: one.seen)
        clients[1].writer.write(request(b"x" * 500_000)[:-1])
        await pause(1)
        await clients[2].post("m", pad="x" * 300_000)
        answer = await clients[2].read()
        assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "1", "close")
        clients[1].close()
        await pause(1)
        await clients[3].post("m", pad="x" * 300_000)
        assert [(await clients[number].read()).status for number in (0, 3)] == [200, 200]
        for client in clients:
            client.close()


# -- bodies that are not wanted


ALICE = "api-key: alice-key-123456"


@pytest.mark.parametrize(
    ("path", "line", "status"),
    [
        *((CHAT, "api-key: wrong", 401), (CHAT, "X: 1", 401), (CHAT, "Expect: 100-continue", 401)),
        *((CHAT, "Origin: https://evil.example", 403), ("/v1/nothing", ALICE, 404), ("/v1/models", ALICE, 405)),
        (CHAT, ALICE + "\r\nContent-Encoding: gzip", 415),
        ("/v1/embeddings", ALICE + "\r\nContent-Encoding: br", 415),
    ],
)
@pytest.mark.parametrize(("size", "closes"), [(1000, False), (70_000, True)])
async def test_what_the_head_decides(path: str, line: str, status: int, size: int, closes: bool) -> None:
    """The answer does not wait for the body; a small body is skipped, a large one ends the connection."""
    async with Running(client_keys=KEYS, cors={"allow_origins": ["https://app.example"]}) as server:
        client = await server.open()
        await client.send(request(b"x" * size, line, target=path)[: -size + 10])
        await turns()
        await client.send(b"" if closes else b"x" * (size - 10) + STATUS)
        answer = await client.read()
        assert (answer.status, answer.headers.get("connection")) == (status, "close" if closes else None)
        assert not answer.interim and answer.headers["x-request-id"] and "error" in answer.json()
        if closes:
            await client.send(b"x" * (size - 10) + STATUS)
            assert await client.closed() == b""
        else:
            assert (await client.read()).status == 200
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("rest", "status"),
    [(b"", 404), (b"zz\r\n", 400), (app.chunk(b"x" * 70_000) + app.LAST_CHUNK + STATUS, 404), (app.LAST_CHUNK, 404)],
)
async def test_only_a_short_and_small_body_is_skipped(rest: bytes, status: int) -> None:
    """A refused body that does not end soon, or is large or badly framed, ends the connection within a second."""
    async with Running() as server:
        client = await server.open()
        since = now()
        await client.send(chunked().replace(CHAT.encode(), b"/v1/nothing"))
        await turns()
        await client.send(rest)
        answer = await client.read()
        assert answer.status == status and now() - since <= 1.1
        assert ("connection" in answer.headers) is (rest != app.LAST_CHUNK)
        client.close()


# -- slowness

FORM = "Content-Type: multipart/form-data; boundary=xx"
UPLOAD = request(b"x" * 9_000_000, FORM, target="/v1/audio/transcriptions")[:-7_000_000]  # the first 2 MB


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("key", "value", "first", "then", "ends_s"),
    [
        ("idle_timeout", 9.0, b"", b"", 9),
        ("idle_timeout", 9.0, b"\r\n", b"\r\n", 9),
        ("header_timeout", 9.0, b"GET /status HTTP/1.1\r\nHost: localhost\r\nX: ", b"x", 9),
        ("body_timeout", 40.0, request(b"x" * 9_000_000)[:-9_000_000], b"x" * 16000, 40),
        ("body_timeout", 40.0, UPLOAD, b"", 40),
        ("body_rate", 100_000, UPLOAD, b"x" * 1000, 40),
        ("body_rate", 1000, chunked(), app.chunk(b"x" * 2000), 40),
        ("body_rate", 1000, chunked(), b"1;" + b"x" * 200 + b"\r\nx\r\n", 20),
    ],
)
async def test_slow_requests(key: str, value: float, first: bytes, then: bytes, ends_s: int) -> None:
    """A request that comes too slowly, by time or by rate, gets 408; a connection that is idle for too long is closed."""
    async with Running(limits={key: value}) as server:
        client = await server.open()
        since = now()
        client.writer.write(first)
        while server.server.connections or now() - since < 4:
            await pause(4)
            client.writer.write(then)
            assert now() - since < ends_s + 6
        assert ends_s <= now() - since <= ends_s + 6
        data = await client.closed()
        assert data.startswith(b"HTTP/1.1 408 ") if key != "idle_timeout" else data == b""
        client.close()
