"""Upstream connections: TLS, proxies, reuse, stale connections, every framing of a reply."""

import asyncio
from pathlib import Path

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, Message, Peer, Running, Upstream, answers, controller, json_reply, read_message

GOOD = json_reply(200, ANSWER)
CERTS = Path(__file__).parent / "certs"
BODY = GOOD.partition(b"\r\n\r\n")[2]


async def test_connections_are_reused() -> None:
    """Requests one after the other share a connection."""
    async with Upstream(answers(GOOD)) as one, Running(controller("a", one.url)) as server:
        for _ in range(3):
            assert (await server.post()).status == 200
        assert one.connections == 1 and repr(server.server.links) == "<ConnectionPool idle=1 active=0>"


async def test_a_stale_pooled_connection_is_replaced() -> None:
    """A pooled connection that dies at the write costs nothing: the request goes once more on a fresh one."""

    async def script(peer: Peer, message: Message) -> None:
        if len(one.seen) == 2:
            peer.reset()
        else:
            await peer.send(GOOD)

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        assert [(await server.post()).status for _ in range(2)] == [200, 200]
        assert one.connections == 2


@pytest.mark.virtual_time
async def test_idle_connections_expire() -> None:
    """A pooled connection is closed before the upstream would close it."""
    async with Upstream(answers(GOOD)) as one, Running(controller("a", one.url)) as server:
        await server.post()
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        expired = loop.create_future()
        loop.call_later(app.IDLE_UPSTREAM_S + 1, expired.set_result, None)
        await expired
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"


async def test_idle_connections_of_all_origins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above IDLE_UPSTREAM_COUNT the one that is idle longest is closed, whatever its origin."""
    monkeypatch.setattr(app, "IDLE_UPSTREAM_COUNT", 2)
    async with Upstream(answers(GOOD)) as one, Upstream(answers(GOOD)) as two, Upstream(answers(GOOD)) as three:
        upstreams = dict(zip("abc", (one, two, three), strict=True))
        controllers = [controller(name, each.url, models=[name]) for name, each in upstreams.items()]
        async with Running(*controllers) as server:
            for name in "abcabbc":
                assert (await server.post(name)).status == 200
                assert server.server.links.idle_count == sum(map(len, server.server.links.idle.values())) <= 2
            assert [each.connections for each in upstreams.values()] == [2, 2, 2]
            assert repr(server.server.links) == "<ConnectionPool idle=2 active=0>"


async def test_idle_connections_make_room_for_new_ones() -> None:
    """Where files are few, one idle connection is closed for each that is opened, and none that is in use."""
    opened: list[int] = []
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        links = server.server.links
        opened.append(links.idle_count + len(links.active))
        await step.wait()
        await peer.send(GOOD)

    async with Upstream(script) as one, Upstream(script) as two, Upstream(script) as three:
        upstreams = dict(zip("abc", (one, two, three), strict=True))
        async with Running(*(controller(name, each.url, models=[name]) for name, each in upstreams.items())) as server:
            server.server.links.most = 3
            step.set()
            assert await asyncio.gather(*(server.post(name) for name in "aab"))
            for name in "cabcc":
                assert (await server.post(name)).status == 200
            assert max(opened) == 3 and server.server.links.idle_count == 3
            step.clear()  # those in use stay, and who needs one more gets it
            waiting = [asyncio.create_task(server.post(name)) for name in "abcc"]
            while len(opened) < 12:
                await asyncio.sleep(0)
            step.set()
            assert [(await each).status for each in waiting] == [200] * 4
            assert max(opened[8:]) == 4


async def test_connections_fit_the_open_files() -> None:
    """Half of the files are for clients, half for upstreams; without a limit neither has one."""
    async with Running() as server:
        for files, most in ((256, 104), (64, 8), (16, 1), (app.math.inf, app.math.inf)):
            app.fit_connections(server.server, files)
            assert server.server.most == server.server.links.most == most


@pytest.mark.parametrize(
    "raw",
    [
        GOOD,
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + GOOD,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + app.chunk(BODY[:5]) + app.chunk(BODY[5:]) + b"0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    ],
)
async def test_every_framing_of_a_reply(raw: bytes) -> None:
    """Content-Length, chunked, until close, interim replies, and a coding that nobody asked for pass untouched."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(raw)
        if b"HTTP/1.0" in raw:
            peer.writer.close()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        found = await server.post()
        assert found.body == BODY and one.seen[0].headers["accept-encoding"] == "identity"
        assert (found.headers.get("content-encoding") == "gzip") is (b"gzip" in raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Header: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
    ],
)
async def test_replies_that_break_http_end_in_502(raw: bytes) -> None:
    """Garbage, both framings, bad sizes and floods are each a clear error, and the connection is not used again."""
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url)) as server:
        assert (await server.post()).status == 502
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"


async def test_bytes_after_a_reply_never_reach_another_client() -> None:
    """A pooled connection that says something unasked is thrown away."""
    async with Upstream(answers(GOOD + GOOD.replace(b'"hi"', b'"no"'))) as one:
        async with Running(controller("a", one.url)) as server:
            assert [(await server.post()).json() for _ in range(3)] == [ANSWER] * 3
            assert one.connections == 3


async def test_tls_is_verified() -> None:
    """A certificate of the configured authority is good; a foreign one is a connect failure."""
    async with Upstream(answers(GOOD), tls=True) as one:
        for name, status in (("localhost", 200), ("foreign", 502)):
            account = {"ca_file": str(CERTS / (name + ".pem"))}
            async with Running(controller("a", one.url, account=account)) as server:
                assert (await server.post()).status == status


async def serve_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heads: list[Message]) -> None:
    """A proxy that records what it was asked, tunnels CONNECT, and answers absolute-form itself."""
    heads.append(await read_message(reader))
    if heads[-1].start.startswith("CONNECT"):
        host, port = heads[-1].start.split()[1].rsplit(":", 1)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
            except ConnectionError:
                pass
            target.close()

        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
    else:
        writer.write(GOOD)
        await reader.read()
    writer.close()


@pytest.mark.parametrize("tls", [True, False])
async def test_a_proxy_is_used(tls: bool) -> None:
    """An https upstream is reached by CONNECT, an http one by absolute-form; the password goes to the proxy only."""
    heads: list[Message] = []
    tasks: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.get_running_loop().create_task(serve_proxy(reader, writer, heads)))

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    url = "http://user:pass%%40word@127.0.0.1:%d" % proxy.sockets[0].getsockname()[1]
    async with Upstream(answers(GOOD), tls=tls) as one:
        account = {"proxy": url, "ca_file": str(CERTS / "localhost.pem")}
        async with Running(controller("a", one.url, account=account)) as server:
            assert (await server.post()).json() == ANSWER
        await asyncio.gather(*tasks, return_exceptions=True)
    proxy.close()
    assert heads[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNzQHdvcmQ="
    if tls:
        assert heads[0].start == f"CONNECT localhost:{one.port} HTTP/1.1" and "authorization" not in heads[0].headers
        assert "proxy-authorization" not in one.seen[0].headers
    else:
        assert heads[0].start == f"POST http://127.0.0.1:{one.port}/v1/chat/completions HTTP/1.1"


async def test_a_tunnel_that_ends_at_once_is_told_as_such() -> None:
    """A proxy may agree to a tunnel and then find nobody at its end; the error says more than that there was one."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        writer.close()

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    account = {"proxy": "http://127.0.0.1:%d" % proxy.sockets[0].getsockname()[1]}
    async with Running(controller("a", "https://localhost:9/v1", account=account)) as server:
        found = await server.post()
        assert found.status == 502 and found.json()["error"]["message"].endswith("localhost:9: closed during the handshake")
    proxy.close()


async def test_models_are_asked_of_the_upstream() -> None:
    """Lists are merged, kept, and an upstream that fails does not break them."""
    listed = json_reply(200, {"object": "list", "data": [{"id": "up-1", "object": "model"}]})
    async with Upstream(answers(listed)) as one, Upstream(answers(json_reply(500, {}))) as bad:
        configured = controller("c", one.url, models=["mine", "gpt-*"])
        async with Running(controller("a", one.url), controller("b", bad.url), configured) as server:
            for _ in range(2):
                client = await server.open()
                await client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert [model["id"] for model in (await client.read()).json()["data"]] == ["mine", "up-1"]
                client.close()
            # Twice, for a and c: each account is asked once, whatever is asked of us.
            assert [seen.start for seen in one.seen] == ["GET /v1/models HTTP/1.1"] * 2
