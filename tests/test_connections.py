"""Upstream connections: reuse, stale connections, every framing of a reply, TLS, proxies."""

import asyncio
import contextlib
import errno
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, CERT, Message, Peer, Running, Upstream, answers, controller, json_reply, now, pause, read_message, until

OK = json_reply(200, ANSWER)
BODY = OK.partition(b"\r\n\r\n")[2]
PROBES = (getattr(socket, "TCP_KEEPIDLE", 0) or socket.TCP_KEEPALIVE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
FOREIGN, OTHER_NAME = (str(Path(CERT).parent / name) for name in ("foreign.pem", "other-name.pem"))


@pytest.mark.virtual_time
async def test_a_connection_is_reused_until_it_has_been_idle_for_long() -> None:
    """Requests in a row share a connection, which closes before the upstream would close it."""
    async with Upstream(answers(OK)) as upstream, Running(controller("a", upstream.url)) as server:
        for _ in range(3):
            assert (await server.post()).status == 200
        assert upstream.connections == 1 and repr(server.server.links) == "<ConnectionPool idle=1 active=0>"
        await pause(50)
        assert (await server.post()).status == 200 and upstream.connections == 1
        await pause(56)
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"


@pytest.mark.parametrize(
    ("target", "more", "sent", "answered", "runs"),
    [
        ("chat/completions", {}, b"", 200, 3),
        ("chat/completions", {}, b"HTTP/1.1 103 X\r\n\r\n", 502, 2),
        ("chat/completions", {}, b"HTTP/1.1 20", 502, 2),
        ("chat/completions", {"store": True}, b"", 502, 2),
        ("responses", {"input": "x"}, b"", 502, 2),
        ("responses", {"input": "x", "store": False}, b"", 200, 3),
        ("batches", {"input_file_id": "file-1"}, b"", 502, 2),
    ],
)
async def test_a_stale_connection_is_replaced(target: str, more: Any, sent: bytes, answered: int, runs: int) -> None:
    """A kept connection that ends at the write costs nothing, unless its reply has begun or the request stores."""

    async def script(peer: Peer, message: Message) -> None:
        if len(upstream.seen) == 2:
            await peer.send(sent)
            peer.close()
        else:
            await peer.send(OK)

    account = controller("a", "", models=["m"])
    async with Upstream(script) as upstream:
        account["config"]["base_url"] = upstream.url
        async with Running(account, endpoints=["inference", "objects"]) as server:
            request = {"model": "m", "messages": [{"role": "user", "content": "x"}], **more}
            statuses = [(await server.ask("POST", f"/v1/{target}", request)).status for _ in range(2)]
            assert statuses == [200, answered] and len(upstream.seen) == runs


@pytest.mark.virtual_time
async def test_kept_connections_do_not_pin_an_address() -> None:
    """A connection that brought a 5xx or is five minutes old is not used again, and a probe uses a new one."""
    replies = [json_reply(status, ANSWER) for status in (503, 200, 200)]
    async with Upstream(answers(*replies)) as upstream, Running(controller("a", upstream.url, models=["*m"])) as server:
        assert [(await server.post("m")).status for _ in range(3)] == [503, 200, 200] and upstream.connections == 2
        for _ in range(7):
            await pause(50)
            assert (await server.post("m")).status == 200
        assert upstream.connections == 3
        server.server.pool.upstreams[0].gate.shut("failing", now(), "a test")
        await pause(3)
        assert (await server.post("m")).status == 200 and upstream.connections == 4


async def test_dead_paths_are_watched_on_both_sides() -> None:
    """The kernel probes both connections of a request, and ends one whose peer acknowledges nothing for long."""

    async def script(peer: Peer, _: Message) -> None:
        (client,), (kept,) = server.server.connections, server.server.links.active
        for transport, longest_s in ((client.transport, 150), (kept.transport, 30)):
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            silent_s, every_s, count = [sock.getsockopt(socket.IPPROTO_TCP, name) for name in PROBES]
            assert 10 < silent_s + every_s * count <= longest_s
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                unread = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                assert unread == 1000 * (silent_s + every_s * count)
        await peer.send(OK)

    async with Upstream(script) as upstream, Running(controller("a", upstream.url, models=["m"])) as server:
        assert (await server.post("m")).status == 200


@pytest.mark.virtual_time
@pytest.mark.parametrize(("store", "status"), [(False, 200), (True, 502)])
async def test_a_dead_path(store: bool, status: int) -> None:
    """A request that the kernel reports as not acknowledged is sent again on a new connection, unless it stores."""

    async def script(peer: Peer, _: Message) -> None:
        if len(upstream.seen) == 2:
            await pause(20)
            (kept,) = server.server.links.active
            kept.reader.set_exception(OSError(errno.ETIMEDOUT, "no acknowledgement"))
        else:
            await peer.send(OK)

    async with Upstream(script) as upstream, Running(controller("a", upstream.url, models=["m"])) as server:
        assert [(await server.post("m", store=store)).status for _ in range(2)] == [200, status]


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("127.0.0.1", "localhost,127.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8, fd00::/8", False),
        ("[fd00::1]", "fd00::/8", True),
        ("[fe80::1]", "[fe80::1]", True),
        ("192.168.3.4", "192.168.*", True),
        ("192.169.3.4", "192.168.*", False),
        ("api.vendor.com", ".vendor.com", True),
        ("UP.vendor.com", "*.Vendor.com", True),
        ("notvendor.com", "vendor.com", False),
        ("[fe80::1]", "[fe80::1]:8", True),
        ("api.vendor.com", "api.vendor.com.", True),
        ("up", "up:8", True),
        ("up", "up:9 down,", False),
        ("up", "*", True),
    ],
)
def test_no_proxy(host: str, no_proxy: str, direct: bool) -> None:
    """Addresses, networks, domains and wildcards in no_proxy keep a configured proxy out of the way."""
    data = {"controllers": [controller("a", f"http://{host}:8/v1", account={"proxy": "http://p:1"})]}
    account = app.parse_config(data, "test", {"no_proxy": no_proxy}).controllers[0].account
    assert bool(account.proxy) is not direct


@pytest.mark.parametrize(
    "raw",
    [
        OK,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 15 + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + app.chunk(BODY[:5])
        + app.chunk(BODY[5:])
        + b"0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    ],
)
@pytest.mark.parametrize("tls", [False, True])
async def test_every_framing_of_a_reply(raw: bytes, tls: bool) -> None:
    """Content-Length, chunks, an end with the connection, interim replies and an unrequested coding pass untouched."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(raw)
        if b"HTTP/1.0" in raw:
            peer.close()

    async with Upstream(script, tls=tls) as upstream:
        async with Running(controller("a", upstream.url, account={"ca_file": CERT} if tls else {})) as server:
            answer = await server.post()
            assert answer.body == BODY and upstream.seen[0].headers["accept-encoding"] == "identity"
            assert (answer.headers.get("content-encoding") == "gzip") is (b"gzip" in raw)


# ---- TLS and proxies


@pytest.mark.parametrize(("ca_file", "status"), [(CERT, 200), (FOREIGN, 502), (OTHER_NAME, 502)])
async def test_tls_is_verified_and_speaks_http_1_1(ca_file: str, status: int) -> None:
    """A certificate of the configured authority is good, and HTTP/1.1 is negotiated; for any other nothing is sent."""
    protocols = []

    async def script(peer: Peer, _: Message) -> None:
        protocols.append(peer.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await peer.send(OK)

    async with Upstream(script, tls=True) as upstream:
        async with Running(controller("a", upstream.url, account={"ca_file": ca_file})) as server:
            assert (await server.post()).status == status
    assert protocols == ["http/1.1"] * (status == 200)
    # Python 3.13 became strict about certificates that public authorities do not issue any more, but private ones do.
    assert not app.tls_context(ca_file).verify_flags & ssl.VERIFY_X509_STRICT


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy all bytes, then close."""
    with contextlib.suppress(ConnectionError):
        while data := await source.read(65536):
            target.write(data)
    target.close()


@pytest.mark.parametrize("tls", [True, False])
async def test_a_proxy_is_used(tls: bool) -> None:
    """An https upstream is reached by CONNECT, an http one by the absolute form; only the proxy gets its password."""
    heads: list[Message] = []

    async def talk(peer: Peer) -> None:
        heads.append(await read_message(peer.reader))
        if not heads[-1].start.startswith("CONNECT"):
            await peer.send(OK)
            await peer.gone()
            return
        host, port = heads[-1].start.split()[1].rsplit(":", 1)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        await peer.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        await asyncio.gather(copy(peer.reader, far_writer), copy(far_reader, peer.writer))

    async with Upstream(answers(OK), tls=tls) as upstream, Upstream(talk=talk) as proxy:
        account = {"proxy": f"http://user:pass%40word@127.0.0.1:{proxy.port}", "ca_file": CERT}
        async with Running(controller("a", upstream.url, account=account)) as server:
            assert (await server.post()).json() == ANSWER
        await until(lambda: not proxy.open_connections)
    assert heads[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNzQHdvcmQ="
    if tls:
        assert (
            heads[0].start == f"CONNECT localhost:{upstream.port} HTTP/1.1" and "authorization" not in heads[0].headers
        )
        assert "proxy-authorization" not in upstream.seen[0].headers
    else:
        assert heads[0].start == f"POST http://127.0.0.1:{upstream.port}/v1/chat/completions HTTP/1.1"


# ---- the streams below


async def test_a_read_is_interrupted_once_and_loses_nothing() -> None:
    """An interruption ends the read that waits, even if bytes arrive in the same moment; the next read returns them."""
    reader = app.TimedReader(asyncio.get_running_loop())
    reader.interrupt(LookupError())  # nothing waits, so nothing happens
    read = asyncio.create_task(reader.read_some())
    await asyncio.sleep(0)
    reader.feed_data(b"ab")
    reader.interrupt(LookupError())
    with pytest.raises(LookupError):
        await read
    assert await reader.read_some() == b"ab"
    reader.feed_eof()
    assert await reader.read_some() == b""
