"""Bounds on what clients may take: each has a default, a configuration key, and an end that others do not feel."""

import asyncio
import json
import socket

import pytest

import chatgpt_apiserver as app

from .support import (
    MESSAGES,
    Client,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    event,
    json_reply,
    request,
    sse_reply,
)
from .wirefeed import turns

STALLED = {"write_timeout": 7}


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


async def end_of_all(server: Running, most_s: int) -> int:
    """After how many seconds no connection is left."""
    for second in range(most_s):
        if not server.server.connections:
            return second
        await pause(1)
    raise AssertionError(server.server.connections)


@pytest.mark.virtual_time
@pytest.mark.parametrize("lines", [(), ("Connection: close",)])
@pytest.mark.parametrize("size", [200_000, 900_000])
async def test_a_reader_that_stops_in_a_whole_answer_is_dropped(size: int, lines: tuple[str, ...]) -> None:
    """A whole answer that nobody takes is given up after write_timeout, and its controller was free long before."""
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
    limits = {"write_timeout": 30, "idle_timeout": 4}
    async with Upstream(answers(json_reply(200, {"pad": "x" * 40_000}))) as one:
        async with Running(controller("a", one.url), limits=limits) as server:
            client = await open_stalled(server)
            await client.post("m", *(["Connection: close"] if end == "closes" else []))
            if end == "bad":
                await client.send(b"BAD\r\n\r\n")
            await pause(20)
            (connection,) = server.server.connections
            assert connection.transport.get_write_buffer_size() > 10_000
            assert 10 <= await end_of_all(server, 20) <= 17
            client.close()


@pytest.mark.virtual_time
async def test_a_slow_reader_gets_the_end_of_its_answer() -> None:
    """A connection that is about to close, by the idle timeout or at a stop, first sends what is left."""
    limits = {"write_timeout": 30, "idle_timeout": 4}
    answer = json_reply(200, {"pad": "x" * 40_000})
    async with Upstream(answers(answer)) as one:
        async with Running(controller("a", one.url), limits=limits) as server:
            for stop in (False, True):
                client = await open_stalled(server)
                await client.post("m")
                await pause(20)
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
