"""What goes wrong between here and an upstream: each has one clear outcome, soon, and nothing of it is left."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .conftest import GUARD_S
from .support import (
    ANSWER,
    CERT,
    SSE_HEAD,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    read_message,
    reset,
)
from .test_bounds import pause
from .wirefeed import turns

GOOD = json_reply(200, ANSWER)
FOREIGN = str(Path(CERT).parent / "foreign.pem")
OTHER_NAME = str(Path(CERT).parent / "other-name.pem")
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listener(talk: Talk) -> AsyncIterator[int]:
    """Something on a port that treats each connection as `talk` says, and closes it then."""
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fails(server: Running, word: str, status: int = 502, code: str = "upstream_unreachable", **more: Any) -> None:
    """A request ends with this error, and nothing is under way or kept after it."""
    found = await server.post("m", **more)
    error = found.json()["error"]
    assert (found.status, error["code"]) == (status, code) and word in error["message"], found.body
    await turns()
    assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"
    assert server.server.pool.upstreams[0].in_flight == 0


# ---- TLS

ALERT = b"\x15\x03\x03\x00\x02\x02\x28"  # fatal, handshake_failure


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        (ALERT, "HANDSHAKE_FAILURE"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "VERSION"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "SSL"),
        (b"\x16\x03\x03\x00\x7a\x02\x00\x00\x76\x03\x03", ""),
        (b"", ""),
    ],
)
async def test_handshakes_that_fail(sent: bytes, word: str) -> None:
    """An alert, plain HTTP, a cut or a reset in the handshake is a connect failure that says why."""
    for end in ("fin", "reset"):
        await check_handshakes_that_fail(sent, word, end)


async def check_handshakes_that_fail(sent: bytes, word: str, end: str) -> None:
    """One of them."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(sent)
        await writer.drain()
        if end == "reset" and not sent:
            reset(writer)
        elif end == "fin":
            writer.write_eof()
            await reader.read()

    async with listener(talk) as port:
        async with Running(controller("a", "https://localhost:%d/v1" % port, account={"ca_file": CERT})) as server:
            await fails(server, word if end == "fin" else "")


@pytest.mark.virtual_time
async def test_a_handshake_that_hangs() -> None:
    """Silence in the handshake ends with the connect timeout."""

    async def talk(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while await reader.read(100):
            pass

    async with listener(talk) as port:
        url = "https://localhost:%d/v1" % port
        async with Running(controller("a", url, timeouts={"connect": 3}, account={"ca_file": CERT})) as server:
            await fails(server, "within 3 s")


@pytest.mark.parametrize(("ca_file", "word"), [(FOREIGN, "CERTIFICATE_VERIFY_FAILED"), (OTHER_NAME, "CERTIFICATE_VERIFY_FAILED")])
async def test_a_certificate_that_is_not_trusted(ca_file: str, word: str) -> None:
    """Nothing is sent to whoever has no trusted certificate."""
    async with Upstream(answers(GOOD), tls=True) as one:
        async with Running(controller("a", one.url, account={"ca_file": ca_file})) as server:
            await fails(server, word)
        assert not one.seen


def below_tls(writer: asyncio.StreamWriter) -> socket.socket:
    """A second handle on the socket below a TLS connection."""
    return socket.socket(fileno=socket.dup(writer.get_extra_info("socket").fileno()))


@pytest.mark.parametrize("how", ["garbage", "alert", "reset", "fin without close_notify"])
async def test_tls_that_breaks_in_the_middle(how: str) -> None:
    """Garbage, an alert, a reset or a bare FIN within TLS is a broken connection: an error or a told cut, never a hang."""
    for when in ("before the reply", "in the head", "in the body", "in a stream"):
        await check_tls_that_breaks_in_the_middle(how, when)


async def check_tls_that_breaks_in_the_middle(how: str, when: str) -> None:
    """At one moment."""
    stream = when == "in a stream"
    sent = {"before the reply": b"", "in the head": GOOD[:20], "in the body": GOOD[:-5]}.get(when, SSE_HEAD + app.chunk(event("a")))

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(sent)
        await turns(3)
        with below_tls(peer.writer) as sock:
            if how == "reset":
                reset(peer.writer)
            elif how.startswith("fin"):
                sock.shutdown(socket.SHUT_WR)
                await peer.gone()
            else:
                sock.send(b"\x17\x03\x03\x00\x20" + b"x" * 32 if how == "garbage" else ALERT)
                await peer.gone()

    async with Upstream(script, tls=True) as one:
        async with Running(controller("a", one.url, account={"ca_file": CERT})) as server:
            if not stream:
                found = await server.post("m")
                assert found.status == 502 and found.json()["error"]["code"] == "upstream_closed", found.body
            else:
                client = await server.open()
                await client.post("m", stream=True)
                found_bytes = await client.closed()
                client.close()
                assert event("a") in found_bytes and b'data: {"error":{' in found_bytes and not found_bytes.endswith(b"0\r\n\r\n")
            await turns()
            assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_with_its_tls_connection(stream: bool) -> None:
    """Without other framing an answer is whole only if TLS said that it is over: a FIN alone can be forged."""
    for cleanly in (True, False):
        await check_an_answer_that_ends_with_its_tls_connection(cleanly, stream)


async def check_an_answer_that_ends_with_its_tls_connection(cleanly: bool, stream: bool) -> None:
    """One way to end."""
    kind, body = (b"text/event-stream", event("a")) if stream else (b"application/json", b"{}")

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\n%b" % (kind, body))
        await turns(3)
        if cleanly:
            peer.close()
        else:
            with below_tls(peer.writer) as sock:
                sock.shutdown(socket.SHUT_WR)
        await peer.gone()

    async with Upstream(script, tls=True) as one:
        async with Running(controller("a", one.url, account={"ca_file": CERT})) as server:
            client = await server.open()
            await client.post("m", "Connection: close", stream=stream)
            found = await client.closed()
            client.close()
            assert found.startswith(b"HTTP/1.1 %d " % (200 if cleanly or stream else 502)) and (b'"error"' in found) is not cleanly


# ---- proxies


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "status 403"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 4\r\n\r\nuser", "status 407"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://evil.example/\r\n\r\n", "status 302"),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\nno", "status 502"),
        (b"SSH-2.0-proxy\r\n", "HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nBad Header: 1\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "longer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 40, "interim"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "before the tunnel"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed"),
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"", "closed"),
    ],
)
async def test_a_proxy_that_makes_no_tunnel(raw: bytes, word: str) -> None:
    """A refusal, 407, a redirect, garbage, a flood or a close in answer to CONNECT: nothing was sent, the next is asked."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"CONNECT localhost:9 HTTP/1.1\r\n") and b"sk-secret" not in head
        writer.write(raw)
        writer.write_eof()
        await reader.read()

    async with listener(talk) as port, Upstream(answers(GOOD)) as other:
        account = {"proxy": "http://user:hunter2-hunter2@127.0.0.1:%d" % port, "ca_file": CERT}
        bad = controller("a", "https://localhost:9/v1", account=account)
        async with Running(bad) as server:
            await fails(server, word)
        async with Running(bad, controller("b", other.url)) as server:
            assert (await server.post("m")).headers["x-apiserver-attempts"] == "2"


@pytest.mark.virtual_time
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_proxy_that_hangs(said: bytes) -> None:
    """A proxy that falls silent, before or after it has made the tunnel, is given up with the connect timeout."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await reader.read()
        await reader.read()

    async with listener(talk) as port:
        account = {"proxy": "http://127.0.0.1:%d" % port, "ca_file": CERT}
        async with Running(controller("a", "https://localhost:9/v1", timeouts={"connect": 3}, account=account)) as server:
            await fails(server, "within 3 s")


async def test_a_proxy_that_nobody_answers_for() -> None:
    """A proxy that cannot be reached is a connect failure that does not show its password."""
    account = {"proxy": "http://user:hunter2-hunter2@127.0.0.1:9", "ca_file": CERT}
    for url in ("https://localhost:9/v1", "http://localhost:9/v1"):
        async with Running(controller("a", url, account=account)) as server:
            await fails(server, "no connection")
            assert b"hunter2" not in (await server.post("m")).body


async def test_an_http_proxys_407_is_not_the_clients_fault() -> None:
    """What a plain proxy says about its own password is an upstream failure: the next controller is asked."""
    raw = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 4\r\n\r\nuser"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(raw)
        await reader.read()

    async with listener(talk) as port, Upstream(answers(GOOD)) as other:
        bad = controller("a", other.url, account={"proxy": "http://127.0.0.1:%d" % port})
        async with Running(bad, controller("b", other.url)) as server:
            assert (await server.post("m")).status == 200
        async with Running(bad) as server:
            found = await server.post("m")
            assert found.status == 502 and "proxy-authenticate" not in found.headers


# ---- time


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
async def test_an_answer_that_trickles(timeouts: dict[str, float], every_s: float, status: int, ends_s: float, stream: bool) -> None:
    """Each pause is bounded by idle and all of them by total; a stream that is cut so says so."""
    body = b"".join(event(str(n)) for n in range(6)) if stream else json.dumps({"pad": "x" * 500}).encode()
    head = SSE_HEAD if stream else b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [body[len(body) * n // 6 : len(body) * (n + 1) // 6] for n in range(6)]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(head)
        for piece in pieces:
            await peer.chunk(piece)
            await pause(every_s)
        await peer.send(b"0\r\n\r\n")

    loop = asyncio.get_running_loop()
    async with Upstream(script) as one, Running(controller("a", one.url, timeouts=timeouts)) as server:
        client, since = await server.open(), loop.time()
        await client.post("m", "Connection: close", stream=stream)
        found = await client.closed()
        assert ends_s - 0.01 <= loop.time() - since <= ends_s + 0.3
        assert found.startswith(b"HTTP/1.1 %d " % (200 if stream else status))
        assert (b'"upstream_timeout"' in found) is (status == 504)
        client.close()
        await turns()
        assert len(server.server.links.active) == 0


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("timeouts", "ends_s"), [({"first_byte": 9}, 9), ({"first_byte": 0, "total": 9}, 9), ({"first_byte": 30, "total": 9}, 9)]
)
@pytest.mark.parametrize("how", ["silence", "a trickled head", "interim replies"])
async def test_a_head_that_does_not_end(how: str, timeouts: dict[str, float], ends_s: float) -> None:
    """Silence, a head byte by byte and 1xx replies now and then all end with first_byte, or with total where that is less."""
    pieces = {"silence": [], "a trickled head": [b"HTTP/1.1 200 OK\r\nX: ", *([b"x"] * 12)]}.get(how, [b"HTTP/1.1 103 X\r\n\r\n"] * 15)

    async def script(peer: Peer, _: Message) -> None:
        for piece in pieces:
            await peer.send(piece)
            await pause(0.9)
        await peer.gone()

    loop = asyncio.get_running_loop()
    async with Upstream(script) as one, Running(controller("a", one.url, timeouts=timeouts)) as server:
        since = loop.time()
        await fails(server, "within %d s" % ends_s, 504, "upstream_timeout")
        assert ends_s <= loop.time() - since <= ends_s + 1


# ---- pooled connections


@pytest.mark.parametrize("tls", [False, True])
async def test_what_comes_after_an_answer_on_its_connection(tls: bool) -> None:
    """A pooled connection that ends or speaks unasked serves nobody any more, and nobody notices."""
    for when in ("fin", "reset", "reply", "half a reply", "408 and fin"):
        await check_what_comes_after_an_answer_on_its_connection(when, tls)


async def check_what_comes_after_an_answer_on_its_connection(when: str, tls: bool) -> None:
    """One of them."""
    late = {"reply": GOOD, "half a reply": GOOD[:30], "408 and fin": error_reply(408, None, "too slow", "Connection: close")}.get(when, b"")
    idle = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(json_reply(200, {"mark": len(one.seen)}))
        if len(one.seen) > 1:
            return
        await idle.wait()
        await peer.send(late)
        if when == "reset":
            peer.reset()
        elif when.endswith("fin"):
            peer.close()

    async with Upstream(script, tls=tls) as one:
        async with Running(controller("a", one.url, account={"ca_file": CERT} if tls else {})) as server:
            assert (await server.post("m")).json() == {"mark": 1}
            assert repr(server.server.links) == "<ConnectionPool idle=1 active=0>"
            idle.set()
            for _ in range(1000):
                if repr(server.server.links) == "<ConnectionPool idle=0 active=0>":
                    break
                await asyncio.sleep(0)
            for mark in (2, 3):
                found = await server.post("m")
                assert found.json() == {"mark": mark} and found.headers["x-apiserver-attempts"] == "1"
            assert one.connections == 2


@pytest.mark.parametrize("late", [GOOD, b"x", b"HTTP/1.1 408 X\r\nContent-Length: 0\r\n\r\n"])
async def test_a_late_word_that_meets_the_next_request(late: bytes) -> None:
    """What comes on a pooled connection together with the end of its reply is never taken for the next reply."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(json_reply(200, {"mark": len(one.seen)}) + late)

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        clients = [await server.open() for _ in range(3)]
        for number, client in enumerate(clients):
            await client.post("m")
            assert (await client.read()).json() == {"mark": number + 1}
            client.close()
        assert one.connections == 3


# ---- early replies


@pytest.mark.parametrize("then", ["stays", "closes", "resets"])
async def test_a_reply_before_the_request_is_sent_whole(then: str) -> None:
    """The early answer to a large request is what the client gets; the half-sent request's connection is never used again."""
    for status in (200, 400, 500):
        await check_a_reply_before_the_request_is_sent_whole(status, then)


async def check_a_reply_before_the_request_is_sent_whole(status: int, then: str) -> None:
    """One status."""
    asked: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(1)
        writer.write(json_reply(status, {"error": {"message": "early", "code": None}} if status >= 300 else ANSWER))
        await writer.drain()
        await turns(20)
        if then == "closes":
            writer.write_eof()
        elif then == "resets":
            reset(writer)
        while then != "resets" and await reader.read(1000):
            await turns(1)

    async with listener(talk) as port, Running(controller("a", "http://127.0.0.1:%d/v1" % port)) as server:
        found = await server.post("m", pad="x" * 7_000_000)
        assert found.status == status or (then == "resets" and found.status == 502), found.body
        await turns()
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"
        assert (await server.post("m")).status == status and len(asked) == 2


async def test_a_name_that_nobody_answers_for_takes_no_other_accounts_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that hangs is waited for by all who ask for that name, in one thread; the other names have theirs."""
    over, look_up = threading.Event(), socket.getaddrinfo

    def hang_for_one(host: Any, *rest: Any, **more: Any) -> Any:
        if host == "dead.example":
            over.wait(GUARD_S)
            raise socket.gaierror(socket.EAI_AGAIN, "nobody answers")
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hang_for_one)
    async with Upstream(answers(GOOD)) as one:
        dead = controller("a", "http://dead.example/v1", timeouts={"connect": 0.3})
        async with Running(dead, controller("b", one.url.replace("127.0.0.1", "localhost"))) as server:
            try:
                found = await asyncio.gather(*(server.post("m") for _ in range(50)))
            finally:
                over.set()
            assert {message.status for message in found} == {200}
            assert [upstream.failures > 0 for upstream in server.server.pool.upstreams] == [True, False]


# ---- a client that leaves at any moment


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_at_any_moment_takes_nobodys_answer(stream: bool) -> None:
    """Whenever a client is lost, the next ones on the same connections get their own answers, whole."""

    async def script(peer: Peer, message: Message) -> None:
        mark = message.headers["x-mark"].encode()
        pieces = [SSE_HEAD, app.chunk(event(mark.decode())), app.chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
        for piece in pieces if stream else [b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 20\r\n\r\n", mark.ljust(20)]:
            await peer.send(piece)
            await asyncio.sleep(0)

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        for count in range(16):
            leaver, stayer = await server.open(), await server.open()
            await leaver.post("m", "X-Mark: leaver-%d" % count, stream=stream)
            await stayer.post("m", "X-Mark: stayer-%d" % count, stream=stream)
            await turns(count)
            leaver.reset()
            assert b"stayer-%d" % count in (await stayer.read()).body
            await stayer.post("m", "X-Mark: again-%d" % count, stream=stream)
            body = (await stayer.read()).body
            assert b"again-%d" % count in body and b"leaver" not in body and b"stayer" not in body
            stayer.close()
        while server.server.connections:
            await asyncio.sleep(0)
        assert server.server.pool.upstreams[0].in_flight == 0 and not server.server.links.active
