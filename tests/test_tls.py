"""The TLS listener: its versions, how long handshakes may take, how connections end."""

import asyncio
import json
import ssl
import warnings

import pytest

from .support import CERT, KEY, MESSAGES, SSE_HEAD, Client, Message, Peer, Running, Upstream, controller, event, pause, request, until

TLS = {"cert": CERT, "key": KEY}
STATUS = request(b"", target="/status", method="GET")


async def open_tls(server: Running, version: ssl.TLSVersion | None = None) -> Client:
    """Open a TLS connection, of one version only where it is given."""
    context = ssl.create_default_context(cafile=CERT)
    if version is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
    return Client(*await asyncio.open_connection("localhost", server.port, ssl=context))


@pytest.mark.parametrize(
    ("version", "spoken"),
    [(ssl.TLSVersion.TLSv1_1, None), (ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")],
)
async def test_tls_1_2_or_newer(version: ssl.TLSVersion, spoken: str | None) -> None:
    """TLS 1.2 and 1.3 are served, on a connection that stays open; older versions are refused."""
    async with Running(tls=TLS) as server:
        try:
            client = await open_tls(server, version)
        except OSError:
            assert spoken is None
            return
        assert client.writer.get_extra_info("ssl_object").version() == spoken
        for _ in range(2):
            await client.send(STATUS)
            assert (await client.read()).json() == {"status": "ok"}
        client.close()


@pytest.mark.parametrize("size", [500_000, 2_000_000])
async def test_a_large_body_comes_whole_or_is_refused_with_a_reason(size: int) -> None:
    """A body right behind the handshake is read whole; one that is too large gets an answer and a clean end, no reset."""
    async with Running({"type": "echo", "models": ["m"]}, tls=TLS, limits={"body_bytes": 1_000_000}) as server:
        client = await open_tls(server)
        body = json.dumps({"model": "m", "messages": MESSAGES, "pad": "x" * size}).encode()
        client.writer.write(request(body, "Content-Type: application/json"))
        assert (await client.read()).status == (413 if size > 1_000_000 else 200)
        client.writer.close()
        await client.writer.wait_closed()


@pytest.mark.virtual_time
async def test_the_end_of_a_connection_comes_at_once() -> None:
    """The end of a stream to HTTP/1.0, which is the end of its connection, comes right behind the last byte."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True}).encode()
    async with Running({"type": "echo", "models": ["m"]}, tls=TLS) as server:
        client, since = await open_tls(server), asyncio.get_running_loop().time()
        await client.send(request(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await client.reader.read()).endswith(b"data: [DONE]\n\n")
        assert asyncio.get_running_loop().time() - since < 1
        client.close()


@pytest.mark.virtual_time
async def test_handshakes_count_as_connections_and_end_in_time() -> None:
    """A client that connects without a handshake takes a place for header_timeout, and no longer."""
    async with Running(tls=TLS, limits={"connections": 3, "header_timeout": 9}) as server:
        silent = [await server.open() for _ in range(3)]
        await pause(5)
        assert len(server.server.connections) == 3
        refused = await server.open()
        assert await refused.closed() == b""  # no answer in the clear
        await pause(5)
        assert not server.server.connections
        for client in [*silent, refused]:
            client.close()


@pytest.mark.parametrize("raw", [b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00" * 50])
async def test_what_is_no_handshake_ends_at_once(raw: bytes) -> None:
    """Plain HTTP and garbage on a TLS listener are closed without an answer in the clear; other clients are served."""
    async with Running(tls=TLS) as server:
        client = await server.open()
        await client.send(raw)
        assert b"HTTP" not in await client.closed()
        client.close()
        good = await open_tls(server)
        await good.send(STATUS)
        assert (await good.read()).status == 200
        good.close()


@pytest.mark.parametrize("phase", ["handshake", "head", "answer"])
async def test_a_client_that_resets_below_tls(phase: str) -> None:
    """A reset below TLS, in any phase, ends the connection and the request that waits."""
    async with Running({"type": "echo", "models": ["*"], "config": {"first_delay": 60}}, tls=TLS) as server:
        client = await server.open() if phase == "handshake" else await open_tls(server)
        if phase == "head":
            await client.send(b"GET /sta")
        elif phase == "answer":
            await client.post("m")
        (upstream,) = server.server.pool.upstreams
        await until(lambda: server.server.connections and (phase != "answer" or upstream.in_flight))
        client.reset()
        await until(lambda: not server.server.connections)
        assert upstream.in_flight == 0


async def test_a_client_that_closes_in_its_stream() -> None:
    """TLS has no half-close: a client's clean close in the middle of its stream ends the upstream's stream as well."""
    gone = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("a"))
        await peer.gone()
        gone.set()

    async with Upstream(script) as upstream, Running(controller("a", upstream.url), tls=TLS) as server:
        client = await open_tls(server)
        await client.post("m", stream=True)
        await client.reader.readuntil(event("a"))
        client.writer.close()
        await gone.wait()
        await until(lambda: not server.server.connections)
        server.server.access.flush()
        assert server.server.pool.upstreams[0].in_flight == 0 and "tried=a:gone:" in server.lines[0]
