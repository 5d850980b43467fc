"""Faults between this server and an upstream: each has one clear outcome, soon, and leaves nothing behind."""

import asyncio
import json
import re
import socket

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, CERT, SSE_HEAD, Message, Peer, Running, Upstream, answers, controller, error_reply, event, json_reply, now, pause, read_message
from .wirefeed import turns

OK = json_reply(200, ANSWER)
NOTHING_LEFT = "<ConnectionPool idle=0 active=0>"


async def fails(server: Running, word: str, status: int = 502, code: str = "upstream_unreachable") -> None:
    """Check that a request ends with this error, which names no address, and that nothing is under way or kept."""
    answer = await server.post("m")
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, code) and word in error["message"], answer.body
    assert not re.search(r"127\.0|localhost|:\d", error["message"])
    await turns()
    assert repr(server.server.links) == NOTHING_LEFT
    assert server.server.pool.upstreams[0].in_flight == 0


# ---- TLS

ALERT = b"\x15\x03\x03\x00\x02\x02\x28"  # fatal, handshake_failure


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize(
    ("sent", "word"),
    [
        (ALERT, "TLS failed: sslv3 alert handshake failure"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "protocol version"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "wrong version number"),
        (b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03", ""),
        (b"", ""),
    ],
)
async def test_handshakes_that_fail(sent: bytes, word: str, end: str) -> None:
    """An alert, plain HTTP, a cut or a reset in the handshake is a connect failure with its reason."""

    async def talk(peer: Peer) -> None:
        await peer.reader.read(100)
        await peer.send(sent)
        if end == "reset" and not sent:
            peer.reset()
        elif end == "fin":
            peer.writer.write_eof()
            await peer.gone()

    async with Upstream(talk=talk) as one:
        async with Running(controller("a", f"https://localhost:{one.port}/v1", account={"ca_file": CERT})) as server:
            await fails(server, word if end == "fin" else "")


@pytest.mark.parametrize("how", ["garbage", "alert", "reset", "fin", "close_notify"])
@pytest.mark.parametrize("sent", [b"", OK[:20], OK[:-5], SSE_HEAD + app.chunk(event("a"))])
async def test_tls_that_breaks_in_the_middle(how: str, sent: bytes) -> None:
    """Garbage, an alert, a reset, a bare FIN and a clean close within TLS end a request or a stream with an error."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(sent)
        await turns(3)
        with socket.socket(fileno=socket.dup(peer.writer.get_extra_info("socket").fileno())) as below:
            if how == "close_notify":
                peer.close()
            elif how == "reset":
                peer.reset()
            elif how == "fin":
                below.shutdown(socket.SHUT_WR)
            else:
                below.send(b"\x17\x03\x03\x00\x20" + b"x" * 32 if how == "garbage" else ALERT)
            await peer.gone()

    stream = sent.startswith(SSE_HEAD)
    async with Upstream(script, tls=True) as upstream:
        async with Running(controller("a", upstream.url, account={"ca_file": CERT})) as server:
            client = await server.open()
            await client.post("m", "Connection: close", stream=stream)
            answer = await client.closed()
            client.close()
            if stream:
                assert event("a") in answer and b'data: {"error":{' in answer and not answer.endswith(b"0\r\n\r\n")
            else:
                assert answer.startswith(b"HTTP/1.1 502 ") and b'"upstream_closed"' in answer
            await turns()
            assert repr(server.server.links) == NOTHING_LEFT


# ---- proxies

REFUSED = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 4\r\n\r\nuser"


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "status 403"),
        (REFUSED, "status 407"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://evil.example/\r\n\r\n", "status 302"),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\nno", "status 502"),
        (b"SSH-2.0-proxy\r\n", "HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nBad Header: 1\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "longer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 40, "interim"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "before the tunnel"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "closed during the handshake"),
        (b"", "closed"),
    ],
)
async def test_a_proxy_that_makes_no_tunnel(raw: bytes, word: str) -> None:
    """After a refusal, a redirect, garbage, a flood or a close in answer to CONNECT the next controller is asked."""

    async def talk(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"CONNECT localhost:9 HTTP/1.1\r\n") and b"sk-secret" not in head
        peer.writer.write(raw)
        peer.writer.write_eof()
        await peer.gone()

    async with Upstream(talk=talk) as proxy, Upstream(answers(OK)) as other:
        account = {"proxy": f"http://user:hunter2-hunter2@127.0.0.1:{proxy.port}", "ca_file": CERT}
        bad = controller("a", "https://localhost:9/v1", account=account)
        async with Running(bad) as server:
            await fails(server, word)
        async with Running(bad, controller("b", other.url)) as server:
            assert (await server.post("m")).headers["x-apiserver-attempts"] == "2"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_cannot_be_reached(scheme: str) -> None:
    """A proxy that cannot be reached is a connect failure that does not show its password."""
    account = {"proxy": "http://user:hunter2-hunter2@127.0.0.1:9", "ca_file": CERT}
    async with Running(controller("a", f"{scheme}://localhost:9/v1", account=account)) as server:
        await fails(server, "no connection")
        assert b"hunter2" not in (await server.post("m")).body


async def test_a_407_is_not_the_clients_fault() -> None:
    """A plain proxy that wants another password is an upstream failure: the next controller is asked."""

    async def talk(peer: Peer) -> None:
        await read_message(peer.reader)
        await peer.send(REFUSED)
        await peer.gone()

    async with Upstream(talk=talk) as proxy, Upstream(answers(OK)) as other:
        bad = controller("a", other.url, account={"proxy": f"http://127.0.0.1:{proxy.port}"})
        async with Running(bad, controller("b", other.url)) as server:
            assert (await server.post("m")).status == 200
        async with Running(bad) as server:
            answer = await server.post("m")
            assert answer.status == 502 and "proxy-authenticate" not in answer.headers


# ---- time


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("proxy", "sent"), [(False, b""), (True, b""), (True, b"HTTP/1.1 200 OK\r\n"), (True, b"HTTP/1.1 200 OK\r\n\r\n")]
)
async def test_a_connect_that_hangs(proxy: bool, sent: bytes) -> None:
    """Silence in a TLS handshake, or of a proxy before or behind its tunnel, ends with the connect timeout."""

    async def talk(peer: Peer) -> None:
        await peer.reader.read(2000)
        await peer.send(sent)
        await peer.gone()

    async with Upstream(talk=talk) as one:
        account = {"ca_file": CERT, **({"proxy": f"http://127.0.0.1:{one.port}"} if proxy else {})}
        url = f"https://localhost:{9 if proxy else one.port}/v1"
        async with Running(controller("a", url, timeouts={"connect": 3}, account=account)) as server:
            await fails(server, "within 3 s")


@pytest.mark.virtual_time
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("timeouts", "every_s", "status", "ends_s"),
    [
        ({"idle": 0.5}, 0.4, 200, 2.4),
        ({"idle": 0.5}, 0.6, 504, 0.5),
        ({"idle": 0.5, "total": 1.2}, 0.4, 504, 1.2),
        ({"idle": 0, "total": 1.2}, 40, 504, 1.2),
    ],
)
async def test_a_trickle(timeouts: dict[str, float], every_s: float, status: int, ends_s: float, stream: bool) -> None:
    """Each pause is bounded by idle and all of them by total; a stream that is cut says so."""
    body = b"".join(event(str(n)) for n in range(6)) if stream else json.dumps({**ANSWER, "pad": "x" * 500}).encode()
    head = SSE_HEAD if stream else b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(head)
        for n in range(6):
            await peer.chunk(body[len(body) * n // 6 : len(body) * (n + 1) // 6])
            await pause(every_s)
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as upstream, Running(controller("a", upstream.url, timeouts=timeouts)) as server:
        client, since = await server.open(), now()
        await client.post("m", "Connection: close", stream=stream)
        answer = await client.closed()
        assert ends_s - 0.01 <= now() - since <= ends_s + 0.3
        assert answer.startswith(b"HTTP/1.1 %d " % (200 if stream else status))
        assert (b'"upstream_timeout"' in answer) is (status == 504)
        client.close()
        await turns()
        assert len(server.server.links.active) == 0


@pytest.mark.virtual_time
@pytest.mark.parametrize("timeouts", [{"first_byte": 9}, {"first_byte": 0, "total": 9}, {"first_byte": 30, "total": 9}])
@pytest.mark.parametrize(
    "pieces", [[], [b"HTTP/1.1 200 OK\r\nX: ", *([b"x"] * 12)], [b"HTTP/1.1 103 X\r\n\r\n"] * 15]
)
async def test_a_head_that_does_not_end(pieces: list[bytes], timeouts: dict[str, float]) -> None:
    """Silence, a head byte by byte and a row of 1xx replies end with first_byte, or with total where that is less."""

    async def script(peer: Peer, _: Message) -> None:
        for piece in pieces:
            await peer.send(piece)
            await pause(0.9)
        await peer.gone()

    async with Upstream(script) as upstream, Running(controller("a", upstream.url, timeouts=timeouts)) as server:
        since = now()
        await fails(server, "within 9 s", 504, "upstream_timeout")
        assert 9 <= now() - since <= 10


# ---- pooled connections


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("late", ["fin", "reset", "reply", "half a reply", "408 and fin"])
async def test_what_comes_on_an_idle_connection(late: str, tls: bool) -> None:
    """A pooled connection that ends or speaks without being asked is closed, and costs no later request anything."""
    texts = {"reply": OK, "half a reply": OK[:30], "408 and fin": error_reply(408, None, "slow", "Connection: close")}
    idle = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(json_reply(200, {**ANSWER, "mark": len(upstream.seen)}))
        if len(upstream.seen) == 1:
            await idle.wait()
            await peer.send(texts.get(late, b""))
            if late == "reset":
                peer.reset()
            elif late.endswith("fin"):
                peer.close()

    async with Upstream(script, tls=tls) as upstream:
        async with Running(controller("a", upstream.url, account={"ca_file": CERT} if tls else {})) as server:
            assert (await server.post("m")).json()["mark"] == 1
            assert repr(server.server.links) == "<ConnectionPool idle=1 active=0>"
            idle.set()
            await turns(30)
            for mark in (2, 3):
                answer = await server.post("m")
                assert answer.json()["mark"] == mark and answer.headers["x-apiserver-attempts"] == "1"
            assert upstream.connections == 2


# ---- large requests


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("then", ["stays", "closes", "resets"])
async def test_a_reply_before_the_request_is_sent_whole(status: int, then: str) -> None:
    """The client gets the early answer to a large request, and the half-sent request's connection is not used again."""
    async def talk(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(json_reply(status, {"error": {"message": "early", "code": None}} if status >= 300 else ANSWER))
        await turns(20)
        if then == "closes":
            peer.writer.write_eof()
        elif then == "resets":
            peer.reset()
        while then != "resets" and await peer.reader.read(1000):
            await turns(1)

    async with Upstream(talk=talk) as one, Running(controller("a", one.url)) as server:
        for count in (1, 2):
            answer = await server.post("m", "Content-Type: application/json", pad="x" * 7_000_000)
            assert answer.status == status or (then == "resets" and answer.status == 502), answer.body
            await turns()
            assert repr(server.server.links) == NOTHING_LEFT and one.connections == count


@pytest.mark.virtual_time
@pytest.mark.parametrize(("every_s", "status"), [(8, 200), (10, 504)])
async def test_an_upstream_that_takes_a_large_request_slowly(every_s: float, status: int) -> None:
    """The time for the first byte begins anew with each part that the upstream takes, however long all of it lasts."""

    async def talk(peer: Peer) -> None:
        head = await peer.reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        for size in (4_000_000, left - 4_000_000):
            await pause(every_s)
            await peer.reader.readexactly(size)
        await peer.send(OK)
        await peer.gone()

    async with Upstream(talk=talk) as one, Running(controller("a", one.url, timeouts={"first_byte": 9})) as server:
        answer = await server.post("m", "Content-Type: application/json", pad="x" * 20_000_000)
        assert answer.status == status
