"""The TLS listener: its versions, how handshakes are bounded, what a refused client still gets to read."""

import asyncio
import json
import ssl
import warnings

import pytest

from .support import CERT, KEY, MESSAGES, SSE_HEAD, Client, Message, Peer, Running, Upstream, controller, event, request
from .test_bounds import end_of_all, pause

TLS = {"cert": CERT, "key": KEY}
STATUS = request(b"", target="/status", method="GET")


async def open_tls(server: Running, ca_file: str = CERT, version: ssl.TLSVersion | None = None) -> Client:
    """A client that speaks TLS, of one version where given."""
    context = ssl.create_default_context(cafile=ca_file)
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
    """Older versions find no server."""
    async with Running(tls=TLS) as server:
        try:
            client = await open_tls(server, version=version)
        except OSError:
            assert spoken is None
            return
        assert client.writer.get_extra_info("ssl_object").version() == spoken
        for _ in range(2):
            await client.send(STATUS)
            assert (await client.read()).json() == {"status": "ok"}
        client.close()


@pytest.mark.virtual_time
async def test_handshakes_count_as_connections_and_end_in_time() -> None:
    """Whoever connects and does not shake hands takes a place for header_timeout, and no longer."""
    async with Running(tls=TLS, limits={"connections": 3, "header_timeout": 9}) as server:
        silent = [await server.open() for _ in range(3)]
        await pause(5)
        assert len(server.server.connections) == 3
        client = await open_tls(server)
        await client.send(request(b"", target="/v1/models", method="GET"))
        assert (await client.read()).status == 503
        assert 3 <= await end_of_all(server, 9) <= 7
        for one in [*silent, client]:
            one.close()


async def test_a_large_request_that_is_refused_reads_why() -> None:
    """A client that still sends when its request is refused gets the answer and a clean end, no reset."""
    async with Running(tls=TLS, limits={"body_bytes": 1000}) as server:
        client = await open_tls(server)
        await client.send(request(b"x" * 500_000))
        assert (await client.read()).status == 413
        client.writer.close()
        await client.writer.wait_closed()


@pytest.mark.virtual_time
async def test_the_end_of_a_connection_comes_at_once() -> None:
    """To HTTP/1.0 it is the end of a stream: it comes behind the last byte, and waits for nothing that a client may send."""
    body = json.dumps({"model": "m", "messages": MESSAGES, "stream": True}).encode()
    async with Running({"type": "echo", "models": ["m"]}, tls=TLS) as server:
        client, since = await open_tls(server), asyncio.get_running_loop().time()
        await client.send(request(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await client.reader.read()).endswith(b"data: [DONE]\n\n")
        assert asyncio.get_running_loop().time() - since < 1
        client.close()


@pytest.mark.parametrize("raw", [b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x00" * 50])
async def test_what_is_no_handshake_ends_at_once(raw: bytes) -> None:
    """Plain HTTP and garbage on a TLS listener are closed without an answer in the clear, and nobody else notices."""
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
async def test_a_client_that_vanishes_within_tls(phase: str) -> None:
    """A reset below TLS, wherever it comes, ends the connection and what it waited for."""
    async with Running({"type": "echo", "models": ["*"], "config": {"first_delay": 60}}, tls=TLS) as server:
        client = await server.open() if phase == "handshake" else await open_tls(server)
        if phase == "head":
            await client.send(b"GET /sta")
        elif phase == "answer":
            await client.post("m")
        while not server.server.connections or (phase == "answer" and not server.server.pool.upstreams[0].in_flight):
            await asyncio.sleep(0)
        client.reset()
        while server.server.connections:
            await asyncio.sleep(0)
        assert server.server.pool.upstreams[0].in_flight == 0


async def test_a_client_that_closes_in_the_midst_of_its_stream_within_tls() -> None:
    """TLS knows no half-close: a clean end of the client's side ends the upstream's stream, too."""
    gone = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("a"))
        await peer.gone()
        gone.set()

    async with Upstream(script) as one, Running(controller("a", one.url), tls=TLS) as server:
        client = await open_tls(server)
        await client.post("m", stream=True)
        await client.reader.readuntil(event("a"))
        client.writer.close()
        await gone.wait()
        while server.server.connections:
            await asyncio.sleep(0)
        server.server.access.flush()
        assert server.server.pool.upstreams[0].in_flight == 0 and "tried=a:gone:" in server.lines[0]
