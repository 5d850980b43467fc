"""Bounds on what clients may take: each has a default, a configuration key, and an end that others do not feel."""

import asyncio
import gc
import json
import socket
import tracemalloc

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    MESSAGES,
    SSE_HEAD,
    Client,
    Message,
    Peer,
    Running,
    Script,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    request,
    sse_reply,
)
from .wirefeed import turns

STALLED = {"write_timeout": 7}
STATUS = request(b"", target="/status", method="GET")


async def pause(seconds: float) -> None:
    """Let time pass on the loop's clock."""
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(seconds, over.set_result, None)
    await over


async def open_stalled(server: Running) -> Client:
    """A client that reads nothing, and for which the kernel takes no more than some kilobytes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
    client = Client(*await asyncio.open_connection(sock=sock))
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await turns()
    for connection in server.server.connections:
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


async def end_of_all(server: Running, most_s: float) -> float:
    """After how many seconds no connection is left."""
    loop, since = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    while server.server.connections:
        assert loop.time() - since < most_s, server.server.connections
        await pause(0.5)
    return loop.time() - since


@pytest.mark.virtual_time
@pytest.mark.parametrize("lines", [(), ("Connection: close",)])
async def test_a_reader_that_stops_in_a_whole_answer_is_dropped(lines: tuple[str, ...]) -> None:
    """A whole answer that nobody takes is given up after write_timeout, and its controller was free long before."""
    for size in (200_000, 900_000):
        await check_a_reader_that_stops_in_a_whole_answer_is_dropped(size, lines)


async def check_a_reader_that_stops_in_a_whole_answer_is_dropped(size: int, lines: tuple[str, ...]) -> None:
    """One size."""
    async with Upstream(answers(json_reply(200, {"pad": "x" * size}))) as one:
        async with Running(controller("a", one.url), limits=STALLED) as server:
            client = await open_stalled(server)
            await client.post("m", *lines)
            await pause(1)
            assert repr(server.server.links) == "<ConnectionPool idle=1 active=0>" and server.server.connections
            assert 5 <= await end_of_all(server, 10) <= 7
            client.close()


@pytest.mark.virtual_time
async def test_a_reader_that_stops_in_a_stream_is_dropped() -> None:
    """A stream that nobody takes ends after write_timeout, upstream too; meanwhile little of it is kept."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(sse_reply()[:-5])
        while not peer.writer.is_closing():
            await peer.chunk(event("x" * 5000))

    async with Upstream(script) as one, Running(controller("a", one.url), limits=STALLED) as server:
        client = await open_stalled(server)
        await client.post("m", stream=True)
        await pause(3)
        (connection,) = server.server.connections
        assert app.WRITE_HIGH_BYTES < connection.transport.get_write_buffer_size() < app.WRITE_HIGH_BYTES + 2 * app.READ_BYTES
        assert 3 <= await end_of_all(server, 10) <= 6
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize("end", ["closes", "idle", "bad"])
async def test_a_reader_that_stops_at_the_end_is_counted_until_it_is_dropped(end: str) -> None:
    """What is still to be sent when a connection ends is bounded in time, and the connection counts as one until then."""
    limits = {"write_timeout": 14, "idle_timeout": 2}
    async with Upstream(answers(json_reply(200, {"pad": "x" * 40_000}))) as one:
        async with Running(controller("a", one.url), limits=limits) as server:
            client = await open_stalled(server)
            await client.post("m", *(["Connection: close"] if end == "closes" else []))
            if end == "bad":
                await client.send(b"BAD\r\n\r\n")
            await pause(8)
            (connection,) = server.server.connections
            assert connection.transport.get_write_buffer_size() > 10_000
            assert 4 <= await end_of_all(server, 12) <= 10
            client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize(("after_s", "stop"), [(5, False), (1, True), (5, True)])
async def test_a_slow_reader_gets_the_end_of_its_answer(after_s: int, stop: bool) -> None:
    """A connection that is about to close, by the idle timeout, at a stop or by both, first sends what is left."""
    limits = {"write_timeout": 30, "idle_timeout": 2}
    answer = json_reply(200, {"pad": "x" * 40_000})
    async with Upstream(answers(answer)) as one:
        async with Running(controller("a", one.url), limits=limits) as server:
            client = await open_stalled(server)
            await client.post("m")
            await pause(after_s)
            stopping = asyncio.ensure_future(server.server.stop()) if stop else None
            await pause(1)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert (await client.read()).body == answer.partition(b"\r\n\r\n")[2]
            assert await client.closed() == b""
            client.close()
            if stopping:
                await stopping


@pytest.mark.virtual_time
@pytest.mark.parametrize("stream", [False, True])
async def test_pipelining_without_reading_piles_nothing_up(stream: bool) -> None:
    """Whoever asks on and on and never reads is answered no further, and dropped."""
    reply = sse_reply(event("x" * 30_000)) if stream else json_reply(200, {"pad": "x" * 30_000})
    body = json.dumps({"model": "m", "stream": stream, "messages": MESSAGES}).encode()
    async with Upstream(answers(reply)) as one, Running(controller("a", one.url), limits=STALLED) as server:
        client = await open_stalled(server)
        client.writer.write(request(body) * 200)
        await pause(2)
        (connection,) = server.server.connections
        assert connection.transport.get_write_buffer_size() < 200_000 and len(one.seen) < 12
        assert 3 <= await end_of_all(server, 10) <= 8
        client.close()


@pytest.mark.virtual_time
async def test_at_the_bound_new_connections_get_503_and_status_still_answers() -> None:
    """Above `connections` a reserve answers /status; all else gets 503 at once, without its body, and so do the silent."""
    async with Running(limits={"connections": 3}) as server:
        taken = [await server.open() for _ in range(3)]
        await turns()
        for raw, status in ((STATUS, 200), (request(b"x" * 100)[:-90], 503), (request(b"", target="/v1/models", method="GET"), 503)):
            client = await server.open()
            await client.send(raw)
            found = await client.read()
            assert (found.status, found.headers["connection"]) == (status, "close")
            client.close()
        while len(server.server.connections) > 3:
            await asyncio.sleep(0)
        silent = [await server.open() for _ in range(app.RESERVE_CONNECTIONS)]
        await turns()
        since = asyncio.get_running_loop().time()
        beyond = await server.open()
        assert (await beyond.read()).status == 503 and await beyond.closed() == b""
        assert asyncio.get_running_loop().time() == since
        assert [(await one.read()).status for one in silent] == [503] * len(silent)
        assert asyncio.get_running_loop().time() - since < 2
        await taken[0].send(STATUS)
        assert (await taken[0].read()).status == 200
        for one in [*taken, *silent, beyond]:
            one.close()


async def test_connections_of_one_address() -> None:
    """`connections_per_client` holds for each address; unless set, only public ones are bounded."""
    async with Running(limits={"connections_per_client": 2}) as server:
        mine = [await server.open() for _ in range(2)]
        await turns()
        third = await server.open()
        assert (await third.read()).status == 503
        other = Client(*await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0)))
        mine[0].close()
        while len(server.server.connections) > 2:
            await asyncio.sleep(0)
        for client in (other, await server.open(), mine[1]):
            await client.send(STATUS)
            assert (await client.read()).status == 200
            client.close()
        third.close()


@pytest.mark.parametrize(
    ("peer", "subscriber", "bound"),
    [
        *((peer, peer, 0) for peer in ("127.0.0.1", "::1", "10.1.2.3", "192.168.1.1", "fe80::1%eth0", "fd00::1", "local")),
        ("::ffff:10.1.2.3", "::ffff:10.1.2.3", 0),
        ("8.8.8.8", "8.8.8.8", app.PEER_CONNECTIONS),
        ("::ffff:8.8.8.8", "8.8.8.8", app.PEER_CONNECTIONS),
        ("2a00:1:2:3::1", "2a00:1:2:3::/64", app.PEER_CONNECTIONS),
        ("2a00:1:2:3:ffff:ffff:ffff:ffff", "2a00:1:2:3::/64", app.PEER_CONNECTIONS),
        ("2a00:1:2:4::1", "2a00:1:2:4::/64", app.PEER_CONNECTIONS),
    ],
)
def test_who_shares_a_bound(peer: str, subscriber: str, bound: int) -> None:
    """Public IPv6 addresses count by their /64, as one subscriber has all of it; mapped ones count as IPv4."""
    assert app.subscriber_of(peer) == (subscriber, bound)


async def test_connections_of_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of one subscriber share `connections_per_client`, and give their places back."""
    monkeypatch.setattr(app, "subscriber_of", lambda _: ("127.0.0.0/8", 0))
    async with Running(limits={"connections_per_client": 1}) as server:
        for address in ("127.0.0.1", "127.0.0.2"):
            first = Client(*await asyncio.open_connection("127.0.0.1", server.port, local_addr=(address, 0)))
            await turns()
            assert server.server.per_peer == {"127.0.0.0/8": 1}
            second = await server.open()
            assert (await second.read()).status == 503
            first.close()
            second.close()
            while server.server.per_peer:
                await asyncio.sleep(0)


def get(line: str = "", target: str = "/status") -> bytes:
    """A request without a body."""
    return request(b"", *([line] if line else []), target=target, method="GET")


def chunked(*sizes: int) -> bytes:
    """The beginning of a request whose body comes in chunks of these sizes."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(app.chunk(b" " * size) for size in sizes)


EXTENDED = b"1;%b\r\n \r\n" + app.LAST_CHUNK


@pytest.mark.parametrize(
    ("key", "value", "good", "bad", "status"),
    [
        ("start_line_bytes", 300, get(target="/status?" + "a" * 279), get(target="/status?" + "a" * 280), 414),
        ("header_bytes", 2000, get("X: " + "a" * 1900), get("X: " + "a" * 2000), 431),
        ("header_count", 10, get("\r\n".join(["X: 1"] * 8)), get("\r\n".join(["X: 1"] * 9)), 431),
        ("body_bytes", 500, request(b" " * 500), request(b" " * 501)[:-501], 413),
        ("chunk_line_bytes", 64, chunked() + EXTENDED % (b"x" * 60), chunked() + EXTENDED % (b"x" * 61), 400),
        ("body_bytes", 500, chunked(250, 250) + app.LAST_CHUNK, chunked(250, 251), 413),
        ("body_bytes", 500, chunked(500) + app.LAST_CHUNK, chunked()[:-2] + b"\r\n1f5\r\n", 413),
    ],
)
async def test_sizes_of_requests(key: str, value: int, good: bytes, bad: bytes, status: int) -> None:
    """Exactly as much as configured is taken; a byte more is refused as soon as it is known, and the connection ends."""
    async with Running(limits={key: value}) as server:
        client = await server.open()
        await client.send(good)
        found = await client.read()
        assert found.status in (200, 400) and "connection" not in found.headers
        await client.send(bad)
        found = await client.read()
        assert (found.status, found.headers["connection"]) == (status, "close")
        client.close()


DEEP = {
    "lists": '{"model":"m","messages":[{"role":"user","content":"x"}],"x":%s}',
    "messages": '{"model":"m","messages":[{"role":"user","content":%s}]}',
    "tools": '{"tools":%s,"model":"m","messages":[{"role":"user","content":"x"}]}',
    "capitals": '{"Model":"m","Messages":[{"Role":"user","Content":"x"}],"Tools":%s}',
}


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
async def test_the_depth_of_json(opening: str) -> None:
    """A body nested deeper than json_depth gets 400, wherever it is deep and however deep; what is less deep passes."""
    for shape in DEEP:
        await check_the_depth_of_json(shape, opening)


async def test_the_depth_of_json_holds_for_every_endpoint() -> None:
    """What is no chat is bounded by json_depth too."""
    async with Upstream(answers(json_reply(200, {}))) as one:
        async with Running(controller("a", one.url), limits={"json_depth": 10}) as server:
            for depth, status in ((8, 200), (12, 400)):
                client = await server.open()
                body = '{"model":"m","input":%s}' % ("[" * depth + "]" * depth)
                await client.send(request(body.encode(), target="/v1/embeddings"))
                assert (await client.read()).status == status
                client.close()


async def check_the_depth_of_json(shape: str, opening: str) -> None:
    """One place."""
    above = 3 if shape == "messages" else 1
    step = opening.count("[") + opening.count("{")
    closing = "".join({"[": "]", "{": "}"}[char] for char in reversed(opening) if char in "[{")
    keys = [{"key": "alice-key-123456", "models": ["*"]}]
    async with Upstream(answers(json_reply(200, {}))) as one:
        async with Running(controller("a", one.url, model_map={"m": "n"}), client_keys=keys, limits={"json_depth": 100}) as server:
            client = await server.open()
            levels = (100 - above) // step
            for count, status in ((levels, 200), (levels + 1, 400), (450, 400), (970, 400), (5000, 400), (100_000, 400)):
                deep = opening * count + "1" + closing * count
                await client.send(request((DEEP[shape] % deep).encode(), "api-key: alice-key-123456"))
                assert (await client.read()).status == status, count
            client.close()
            assert len(one.seen) == 1
    assert app.ServerLimits().json_depth == 128


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("key", "value", "first", "then", "ends_s"),
    [
        ("idle_timeout", 9.0, b"", b"", 9),
        ("idle_timeout", 9.0, b"\r\n", b"\r\n", 9),
        ("header_timeout", 9.0, b"GET /status HTTP/1.1\r\nHost: localhost\r\nX: ", b"x", 9),
        ("body_timeout", 40.0, request(b"x" * 9_000_000)[:-9_000_000], b"x" * 16000, 40),
        ("body_rate", 1000, chunked(), app.chunk(b"x" * 2000), 40),
        ("body_rate", 1000, chunked(), b"1;" + b"x" * 200 + b"\r\nx\r\n", 20),
    ],
)
async def test_slowness_of_requests(key: str, value: float, first: bytes, then: bytes, ends_s: int) -> None:
    """Who sends a request too slowly, by time or by rate, hears 408; who is silent between requests is closed."""
    async with Running(limits={key: value}) as server:
        client = await server.open()
        loop, since = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        client.writer.write(first)
        while server.server.connections or loop.time() - since < 4:
            await pause(4)
            client.writer.write(then)
            assert loop.time() - since < ends_s + 6
        assert ends_s <= loop.time() - since <= ends_s + 6
        found = await client.closed()
        assert found.startswith(b"HTTP/1.1 408 ") if key != "idle_timeout" else found == b""
        client.close()


@pytest.mark.parametrize("cuts", [1, 7])
async def test_the_size_of_an_upstreams_head(cuts: int) -> None:
    """A reply's head may have as many bytes as upstream_head_bytes says, in one read or in many."""
    for size in (900, 1000, 1001, 3000):
        await check_the_size_of_an_upstreams_head(size, cuts)


async def check_the_size_of_an_upstreams_head(size: int, cuts: int) -> None:
    """One size."""
    pad = size - len(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: ")
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + b"x" * (pad + 24) + b"\r\n\r\n{}"

    async def script(peer: Peer, _: Message) -> None:
        for at in range(cuts):
            await peer.send(raw[len(raw) * at // cuts : len(raw) * (at + 1) // cuts])
            await turns()

    async with Upstream(script) as one, Running(controller("a", one.url), limits={"upstream_head_bytes": 1024}) as server:
        assert (await server.post("m")).status == (200 if size <= 1000 else 502)


async def test_a_reload_bounds_the_bodies_of_open_connections() -> None:
    """A client that repeats its request to the byte is judged by the limits of now, and not of its first time."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        for limit, status in ((4000, 200), (4000, 200), (40, 413)):
            server.server.reconfigure(server.config.replace(limits=app.ServerLimits(body_bytes=limit)))
            await client.send(request(b'{"model":"m","messages":[{"role":"user","content":"x"}]}'))
            assert (await client.read()).status == status
        client.close()


async def test_the_size_of_an_upstreams_chunk_line() -> None:
    """A reply's chunk-size line may have as many bytes as chunk_line_bytes says, which a reload may change."""
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;%b\r\n{}\r\n0\r\n\r\n" % (b"x" * 300)
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url)) as server:
        assert (await server.post("m")).status == 502
        server.server.reconfigure(server.config.replace(limits=app.ServerLimits(chunk_line_bytes=400)))
        assert (await server.post("m")).body == b"{}"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstreams_chunk_may_be_huge_and_is_never_kept_whole(stream: bool) -> None:
    """A chunk of a terabyte is passed on as it arrives; a chunk-size line of many bytes is refused."""
    kind = b"text/event-stream" if stream else b"application/json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind

    async def script(peer: Peer, message: Message) -> None:
        if len(one.seen) == 1:
            await peer.send(head + b"ffffffffff\r\n" + event("x"))
            for _ in range(100):
                await peer.send(b"x" * 50_000)
            await peer.gone()
        else:
            await peer.send(head + b"5;" + b"x" * 300 + b"\r\nhello\r\n0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post("m", stream=stream)
        await client.read(head_only=True)
        for _ in range(60):
            await client.reader.readexactly(50_000)
        (connection,) = server.server.links.active
        assert len(connection.reader.data) <= 2 * app.READ_BYTES
        client.close()
        assert (await server.post("m", stream=stream)).status == 502


async def test_all_bodies_together() -> None:
    """Bodies that wait or are under way count towards bodies_bytes; one too many gets 503, the next after that passes."""
    go = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await go.wait()
        await peer.send(json_reply(200, {}))

    async def until_held(size: int) -> None:
        while server.server.held < size:
            await asyncio.sleep(0)

    async with Upstream(script) as one, Running(controller("a", one.url), limits={"bodies_bytes": 1_000_000}) as server:
        clients = [await server.open() for _ in range(4)]
        await clients[0].post("m", pad="x" * 400_000)
        await until_held(400_000)
        clients[1].writer.write(request(b"x" * 500_000)[:-1])
        await until_held(890_000)
        await clients[2].post("m", pad="x" * 300_000)
        found = await clients[2].read()
        assert (found.status, found.headers["retry-after"], found.headers["connection"]) == (503, "1", "close")
        clients[1].close()
        while server.server.held > 500_000:
            await asyncio.sleep(0)
        await clients[3].post("m", pad="x" * 300_000)
        await until_held(700_000)
        go.set()
        assert [(await clients[number].read()).status for number in (0, 3)] == [200, 200]
        assert server.server.held == 0
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("line", "status"),
    [("api-key: wrong", 401), ("X: 1", 401), ("Origin: https://evil.example", 403), ("api-key: alice-key-123456", 200)],
)
async def test_nothing_is_kept_of_a_strangers_body(line: str, status: int) -> None:
    """Who may not come in hears so at once, before its body has come, and what it goes on sending fills no memory."""
    keys, cors = [{"key": "alice-key-123456"}], {"allow_origins": ["https://app.example"]}
    raw = request(json.dumps({"model": "echo", "messages": MESSAGES, "pad": "x" * 300_000}).encode(), line)
    async with Running(client_keys=keys, cors=cors) as server:
        client = await server.open()
        await client.send(raw[:-10])
        for _ in range(100):
            await asyncio.sleep(0)
        assert (server.server.held > 0) is (status == 200)
        if status == 200:
            await client.send(raw[-10:] + STATUS)
            assert [(await client.read()).status for _ in range(2)] == [status, 200]
        else:
            found = await client.read()
            assert (found.status, found.headers["connection"]) == (status, "close")
            assert found.headers["x-request-id"] and "error" in found.json()
            await client.send(raw[-10:] + STATUS)
            assert await client.closed() == b""
        client.close()


@pytest.mark.parametrize(
    ("path", "line", "status"),
    [
        ("/v1/nothing", "X: 1", 404),
        ("/v1/models", "X: 1", 405),
        ("/v1/chat/completions", "Content-Encoding: gzip", 415),
        ("/v1/embeddings", "Content-Encoding: br", 415),
        ("/v1/audio/transcriptions", "X: 1", 400),
    ],
)
async def test_what_the_head_decides_is_answered_before_the_body(path: str, line: str, status: int) -> None:
    """A body that no answer depends on is not kept: a small one is skipped, a large one not even waited for."""
    async with Running() as server:
        for size in (1000, 70_000):
            client = await server.open()
            await client.send(request(b"x" * size, line, target=path)[: -size + 10])
            await turns()
            assert server.server.held == 0
            if size == 1000:
                await client.send(b"x" * (size - 10) + STATUS)
            found = await client.read()
            assert (found.status, found.headers.get("connection")) == (status, None if size == 1000 else "close")
            if size == 1000:
                assert (await client.read()).status == 200
            else:
                await client.send(b"x" * (size - 10) + STATUS)
                assert await client.closed() == b""
            client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("rest", "status"),
    [(b"", 404), (b"zz\r\n", 400), (app.chunk(b"x" * 70_000) + app.LAST_CHUNK + STATUS, 404), (app.LAST_CHUNK, 404)],
)
async def test_what_is_skipped_is_small_and_soon_over(rest: bytes, status: int) -> None:
    """A body that was refused and does not end, or is none, ends the connection; bad framing is told instead."""
    async with Running() as server:
        client = await server.open()
        since = asyncio.get_running_loop().time()
        await client.send(b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        await turns()
        await client.send(rest)
        found = await client.read()
        assert found.status == status and asyncio.get_running_loop().time() - since <= app.SKIP_S + 0.1
        assert ("connection" in found.headers) is (rest != app.LAST_CHUNK)
        client.close()


async def test_a_stranger_is_not_asked_for_its_body() -> None:
    """With Expect: 100-continue the refusal comes at once, and what comes then is no request."""
    async with Running(client_keys=[{"key": "alice-key-123456"}]) as server:
        client = await server.open()
        raw = request(b"x" * 1000, "Expect: 100-continue", "api-key: wrong")
        await client.send(raw[:-1000])
        found = await client.read()
        assert (found.status, found.interim, found.headers["connection"]) == (401, [], "close")
        await client.send(STATUS)
        assert await client.closed() == b""
        client.close()


async def test_a_body_in_the_smallest_pieces_takes_no_more_memory() -> None:
    """Reads of a byte or two, whose objects would take twenty times their size, are joined as they come."""
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x" * 6000}]}).encode()
    raw = request(body)
    async with Running() as server:
        client = await server.open()
        await client.send(raw[: -len(body)])
        while not (server.server.connections and next(iter(server.server.connections)).phase is app.Phase.BODY):
            await asyncio.sleep(0)
        (connection,) = server.server.connections
        tracemalloc.start()
        for at in range(0, len(body) - 2, 2):
            connection.reader.feed_data(body[at : at + 2])
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        connection.reader.feed_data(body[len(body) - 2 :] if len(body) % 2 == 0 else body[len(body) - 1 :])
        assert (await client.read()).status == 200 and current < 6 * len(body)
        client.close()


@pytest.mark.parametrize("value", ["0", "[]", "{}", '{"a":0}', "12345", '"ab"'])
async def test_a_body_of_tiny_values_takes_bounded_memory(value: str) -> None:
    """Where values would take twenty times their size the body is refused before it is parsed."""
    many = (value + ",") * (8_000_000 // (len(value) + 1)) + value
    body = ('{"model":"m","input":[%s]}' % many).encode()
    async with Upstream(answers(json_reply(200, {}))) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.send(request(body, target="/v1/embeddings"))
        found = await client.read()
        assert (found.status, found.json()["error"]["code"]) == (413, "request_too_large") and not one.seen
        client.close()


async def test_large_inputs_that_are_meant_are_taken() -> None:
    """The most tokens that embeddings take, 2048 lists of 8192 or 300,000 in all, pass; so does a long text."""
    tokens = json.dumps([list(range(100_000, 100_147))] * 2048)
    async with Upstream(answers(json_reply(200, {}))) as one, Running(controller("a", one.url)) as server:
        for value in (tokens, json.dumps("Well, [this] is a text, {yes}. " * 60_000)):
            client = await server.open()
            await client.send(request(b'{"model":"m","input":%b}' % value.encode(), target="/v1/embeddings"))
            assert (await client.read()).status == 200
            client.close()
        assert len(one.seen) == 2


async def test_a_prompt_is_let_go_when_its_answer_has_begun() -> None:
    """A stream may last for minutes, and nobody will be sent its prompt again."""
    going_on = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("a"))
        await going_on.wait()
        await peer.chunk(b"data: [DONE]\n\n")
        await peer.send(b"0\r\n\r\n")

    def held() -> int:
        files = [tracemalloc.Filter(True, name) for name in (app.__file__, json.decoder.__file__)]
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(files).traces)

    async with Upstream(script) as one, Running(controller("a", one.url), controller("b", one.url)) as server:
        client = await server.open()
        prompt = "x" * 3_000_000
        tracemalloc.start()
        try:
            await client.post(messages=[{"role": "user", "content": prompt}], stream=True)
            await client.reader.readuntil(event("a"))
            assert held() < 1_000_000
        finally:
            tracemalloc.stop()
        going_on.set()
        assert b"[DONE]" in await client.reader.readuntil(b"0\r\n\r\n")
        client.close()
        assert len(one.seen[0].body) > 3_000_000


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_that_ended_is_no_garbage(stream: bool) -> None:
    """What a client's and an upstream's connection were goes with them: nothing of ours waits for the collector."""
    kinds = (app.ClientConnection, app.UpstreamConnection, app.NetworkExchange, app.Fiber, app.Deadline)
    reply = sse_reply(event("a") + b"data: [DONE]\n\n") if stream else json_reply(200, ANSWER)
    gc.collect()
    before = sum(type(one) in kinds for one in gc.get_objects())
    gc.disable()
    try:
        async with Upstream(answers(reply)) as one, Running(controller("a", one.url)) as server:
            for _ in range(10):
                assert (await server.post(stream=stream)).status == 200
        await turns()
        assert sum(type(one) in kinds for one in gc.get_objects()) <= before
    finally:
        gc.enable()


CLOSES = "Connection: close"
BEGUN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raw", "ends"),
    [
        (b"", "fin"),
        (b"", "reset"),
        (b"HTTP/1.1 2", "fin"),
        (b"HTTP/9 what\r\n\r\n", "stays"),
        (BEGUN + b"Content-Length: 90\r\n\r\n{", "fin"),
        (BEGUN + b"Content-Length: 90\r\n\r\n{", "reset"),
        (SSE_HEAD + app.chunk(event("a")), "fin"),
        (SSE_HEAD + app.chunk(event("a")), "reset"),
        (SSE_HEAD + app.chunk(event("a")) + b"zz\r\n", "stays"),
        (error_reply(500), "stays"),
        (error_reply(429, None, "no", "retry-after: 99"), "stays"),
        (json_reply(200, {"error": {"message": "no"}}), "stays"),
    ],
)
async def test_what_failed_is_no_garbage(raw: bytes, ends: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that failed or was cut keeps nothing alive: neither errors and their frames, nor its request."""

    async def script(peer: Peer, _: Message) -> None:
        head, mark, rest = raw.partition(b"zz\r\n")
        await peer.send(head)
        if mark:  # by itself, as it is told in another place than what comes with the first event
            await turns()
            await peer.send(mark + rest)
        if ends != "stays":
            await turns()
            peer.close() if ends == "fin" else peer.reset()

    monkeypatch.setattr(app.log, "disabled", True)  # pytest keeps the errors that a warning speaks of
    body = json.dumps({"model": "m", "stream": stream, "messages": MESSAGES}).encode()
    await check_no_garbage(script, request(body, CLOSES))


@pytest.mark.parametrize("raw", [b"BAD\r\n\r\n", request(b"{", CLOSES), request(b"", CLOSES, target="/v1/x"), request(b"xyz")[:-1]])
async def test_what_was_refused_is_no_garbage(raw: bytes) -> None:
    """A request that was refused, or did not come whole, keeps nothing alive."""
    await check_no_garbage(answers(json_reply(200, ANSWER)), raw)


@pytest.mark.parametrize("end", [b"\r\n--b--\r\n", b"", b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'])
async def test_an_upload_that_ended_is_no_garbage(end: bytes) -> None:
    """An upload, whole or not or refused on its way, keeps nothing alive."""
    part = b'--b\r\nContent-Disposition: form-data; name="'
    form = part + b'model"\r\n\r\nm\r\n' + part + b'file"; filename="f"\r\n\r\n' + b"x" * 1_200_000 + end
    raw = request(form + bytes(10), "Content-Type: multipart/form-data; boundary=b", CLOSES, target="/v1/audio/transcriptions")
    await check_no_garbage(answers(json_reply(200, ANSWER)), raw[: None if b"--b--" in end else -10])


async def check_no_garbage(script: Script, raw: bytes, kind: str = "openai") -> None:
    """Send `raw` to a server with two controllers of that kind and script, which closes the connection, a few times."""
    errors = (app.ProxyError, app.UpstreamError, app.NoRoom, app.Refused)
    wires = (app.ClientConnection, app.ClientUpload, app.UpstreamConnection, app.NetworkExchange, app.Fiber, app.Deadline)
    kinds = (app.Trip, app.Lease, app.ApiRequest, *wires, *errors)
    gc.collect()
    before = sum(isinstance(one, kinds) for one in gc.get_objects())
    gc.disable()
    try:
        async with Upstream(script) as one, Upstream(script) as two:
            both = [{**controller(name, upstream.url), "type": kind} for name, upstream in (("a", one), ("b", two))]
            async with Running(*both, pool={"max_wait": 0}, limits={"body_timeout": 0.02}) as server:
                for _ in range(4):
                    client = await server.open()
                    await client.send(raw)
                    await client.closed()
                    client.close()
                one.seen.clear()
                two.seen.clear()
            await turns()
            del server
        left = [one for one in gc.get_objects() if isinstance(one, kinds)]
        assert len(left) <= before, left
    finally:
        gc.enable()
