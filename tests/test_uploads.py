"""Bodies that pass through while they come: forms with files, which are too large to be kept."""

import asyncio
import contextlib
import hashlib
import random
import tracemalloc
from collections.abc import AsyncIterator

import pytest

import chatgpt_apiserver as app

from .support import CERT, Client, Message, Peer, Running, Upstream, answers, controller, error_reply, json_reply, reset
from .wirefeed import turns

KIND = "multipart/form-data; boundary=xx"
AUDIO = "/v1/audio/transcriptions"
PIECE = bytes(range(256)) * 256


def field(name: str, value: bytes, more: str = "") -> bytes:
    """One part of a form."""
    return b'--xx\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more.encode(), value)


MODEL = field("model", b"whisper-1")
FILE = field("file", b"", '; filename="a.mp3"')[:-2]
END = b"\r\n--xx--\r\n"


def head(size: "int | None", *lines: str, path: str = AUDIO, kind: str = KIND, method: str = "POST") -> bytes:
    """A request's head; without a size the body comes in chunks."""
    framing = "Transfer-Encoding: chunked" if size is None else "Content-Length: %d" % size
    start = ["%s %s HTTP/1.1" % (method, path), "Host: localhost", "Content-Type: " + kind, framing, *lines]
    return "\r\n".join(start).encode() + b"\r\n\r\n"


class Sink:
    """An upstream that reads a body piece by piece, as `may_read` lets it, and keeps only its digest."""

    def __init__(self, reply: bytes = json_reply(200, {"text": "hi"}), answer_after: "int | None" = None) -> None:
        self.reply, self.answer_after = reply, answer_after
        self.may_read, self.ended = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        self.size, self.sha, self.head, self.broken = 0, hashlib.sha256(), b"", False
        self.begun, self.calls = asyncio.Event(), 0

    @contextlib.asynccontextmanager
    async def listen(self) -> AsyncIterator[str]:
        """Listens on loopback; the URL."""
        tasks = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.ensure_future(self.talk(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        yield "http://127.0.0.1:%d/v1" % server.sockets[0].getsockname()[1]
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                self.head = await reader.readuntil(b"\r\n\r\n")
                self.calls += 1
                await self.take(reader, writer)
                if self.answer_after is None:
                    writer.write(self.reply)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.broken = True
        finally:
            self.ended.set()
            writer.transport.abort()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One body in its framing."""
        self.size, self.sha = 0, hashlib.sha256()
        left = int(self.head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or -1)
        while left:
            if left < 0:
                left = -int((await reader.readuntil(b"\r\n")), 16)
                if not left:
                    await reader.readuntil(b"\r\n")
                    return
                data = (await reader.readexactly(2 - left))[:-2]
                left = -1
            else:
                data = await reader.readexactly(min(left, 16384))
                left -= len(data)
            self.size += len(data)
            self.sha.update(data)
            if self.answer_after is not None and self.size >= self.answer_after:
                writer.write(self.reply)
                self.answer_after = 1 << 60
            self.begun.set()
            await self.may_read.wait()


async def send_pieces(client: Client, count: int, chunked: bool = False) -> None:
    """Pieces of a file, as fast as they are taken."""
    for _ in range(count):
        await client.send(app.chunk(PIECE) if chunked else PIECE)


def digest(*pieces: bytes) -> bytes:
    """The digest of a body."""
    return hashlib.sha256(b"".join(pieces)).digest()


# ---- the scanner


FORM = b"".join(
    (
        b"preamble\r\n",
        field("file", b"\r\n--xy\r\n--xxx\r\n\r\n--x", '; filename="name=\\"m\\"; name=model.mp3"'),
        field("prompt", b"a--xx\r\n-- xx\r\n"),
        b"--xx\r\ncontent-type: text/plain\r\nContent-Disposition: form-data; foo=bar;  name=model \r\n\r\ngpt-x\r\n",
        b"--xx\r\n\r\nno head\r\n",
        field("stream", b"true"),
        b"--xx--\r\nepilogue\r\nname=model",
    )
)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_fields_of_a_form_are_found_at_any_cut(step: int) -> None:
    """However a form comes in pieces, the same values stand in the same places."""
    scanner = app.FormScanner(KIND.encode())
    for at in range(0, len(FORM), step):
        scanner.feed(FORM[at : at + step])
        assert len(scanner.pending) < 300
    found = {name: FORM[start:end] for name, (start, end) in scanner.spans.items()}
    assert found == {b"model": b"gpt-x", b"stream": b"true"} and not scanner.twice


@pytest.mark.parametrize("cut", range(0, len(FORM), 5))
def test_fields_of_a_form_are_found_around_every_cut(cut: int) -> None:
    """Two reads, cut anywhere."""
    scanner = app.FormScanner(b'multipart/form-data; Boundary="xx"')
    scanner.feed(FORM[:cut])
    scanner.feed(FORM[cut:])
    assert scanner.spans.keys() == {b"model", b"stream"}


def test_odd_forms() -> None:
    """A long value is none, a repeated one is told, also as a file, a head without end is refused."""
    for form, model, twice in (
        (field("model", b"m" * 300), None, False),
        (MODEL + field("model", b"other"), b"whisper-1", True),
        (field("model", b"m", '; filename=""'), b"m", False),
        (field("Model", b"a") + field("model", b"m", '; filename="m"'), b"a", True),
        (field("model", b"m" * 300) + field("model", b"m"), b"m", True),
        (field("model", b""), b"", False),
        (b"no form at all", None, False),
    ):
        scanner = app.FormScanner(KIND.encode())
        scanner.feed(form + END[2:])
        start, end = scanner.spans.get(b"model", (0, 0))
        assert ((form[start:end] if end else None), scanner.twice) == (model, twice)
    with pytest.raises(app.ProxyError):
        scanner = app.FormScanner(KIND.encode())
        scanner.feed(b"--xx\r\n" + b"x: y\r\n" * 2000)


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "multipart/form-data",
        "application/json; boundary=xx",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; xboundary=a; x=boundary=b",
        "multipart/form-data; boundary=a; boundary*=utf-8''b",
        "multipart/form-data; boundary=a,multipart/form-data; boundary=b",
        'multipart/form-data; boundary="a',
        'multipart/form-data; boundary="a\\b"',
        'multipart/form-data; boundary="a "',
        "multipart/form-data; boundary=a b",
        "multipart/form-data; boundary=" + "a" * 71,
    ],
)
def test_a_boundary_that_is_none_or_two(kind: str) -> None:
    """Where we and an account could see two boundaries we would look for the model in another form than it."""
    with pytest.raises(app.ProxyError):
        app.FormScanner(kind.encode())


@pytest.mark.parametrize("kind", ['form-data; boundary="a;b c"; charset=x', "form-data;boundary=a;b=1", "x;boundary=--=boundary_1"])
def test_a_boundary_however_clients_spell_it(kind: str) -> None:
    """Quoted ones may hold what bare ones may not."""
    assert app.FormScanner(b"multipart/" + kind.encode()).mark in (b"--a;b c", b"--a", b"----=boundary_1")


OTHER = b'Content-Disposition: form-data; name="model"\r\n\r\nother\r\n'


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    "odd",
    [
        b"--xx \r\n" + OTHER,
        b"--xx\n" + OTHER,
        b"\n--xx\r\n" + OTHER,
        b"--xx--\r\n--xx\r\n" + OTHER,
        b"--xx--more\r\n--xx\r\n" + OTHER,
        field("prompt", b"--xx\r\n" + OTHER),
        b"--xx\r\nContent-Disposition: form-data;\r\n name=model\r\n\r\nother\r\n",
        b"--xx\r\nContent-Type: text/plain\n" + OTHER,
        b"--xx\r\nContent-Disposition : form-data; name=model\r\n\r\nother\r\n",
        b"--xx\r\nContent-Disposition: form-data; name*=utf-8''mod%65l\r\n\r\nother\r\n",
        b"--xx\r\nContent-Disposition: form-data; name*0=mod; name*1=el\r\n\r\nother\r\n",
        b"--xx\r\nContent-Disposition: form-data; name=x; name=model\r\n\r\nother\r\n",
        b"--xx\r\nContent-Disposition: form-data; name=model\r\n" + OTHER.replace(b"model", b"x"),
        b'--xx\r\nContent-Disposition: form-data; name="mo\\del"\r\n\r\nother\r\n',
        b'--xx\r\nContent-Disposition: form-data; name=x; y="\\"; name=model; z="\r\n\r\nother\r\n',
    ],
)
def test_no_model_hides_where_readers_differ(odd: bytes, step: int) -> None:
    """A form in which some account could find a second model is refused, at any cut."""
    scanner, form = app.FormScanner(KIND.encode()), MODEL + odd + field("more", b"")
    with pytest.raises(app.ProxyError):
        for at in range(0, len(form), step):
            scanner.feed(form[at : at + step])


@pytest.mark.parametrize("unit", [b"\r\n--xxy", b"--xx", field("a", b"b"), b"--xx\r\n\r\n\r\n"])
def test_a_form_of_boundaries_takes_no_time(unit: bytes) -> None:
    """They are counted, and refused when they are too many: a thousand are read without copying the rest each time."""
    form = MODEL + unit * (app.FORM_BOUNDARIES - 2)
    scanner, rest = app.FormScanner(KIND.encode()), b"x" * 30_000_000
    scanner.feed(form + rest)
    assert len(scanner.pending) < 10 and scanner.count < app.FORM_BOUNDARIES
    with pytest.raises(app.ProxyError):
        scanner.feed(END + unit * 3)


@pytest.mark.parametrize("value", [b"m" * 300, b"gpt-image-1"])
async def test_a_model_that_cannot_be_read_is_not_the_default(value: bytes) -> None:
    """Too long, or without the delimiter that ends it: the account may take it for a model all the same."""
    async with Upstream(answers(json_reply(200, {}))) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        body = field("model", value) + (END[2:] if len(value) > 256 else b"")
        await client.send(head(len(body), path="/v1/images/edits") + body)
        assert (await client.read()).status == 400 and not one.seen
        client.close()


# ---- passing through


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_upload_passes_through_a_small_memory(chunked: bool) -> None:
    """20 MB go up in their own framing, unchanged, and no more than a few of them are ever kept; the next one follows."""
    count = 320
    size = len(MODEL + FILE + END) + count * len(PIECE)
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url)) as server:
        client = await server.open()
        for _ in range(2):
            await client.send(head(None if chunked else size))
            await client.send(app.chunk(MODEL + FILE) if chunked else MODEL + FILE)
            tracemalloc.start()
            await send_pieces(client, count, chunked)
            await client.send(app.chunk(END) + app.LAST_CHUNK if chunked else END)
            found = await client.read()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (found.status, found.json()) == (200, {"text": "hi"}) and "connection" not in found.headers
            assert sink.size == size and sink.sha.digest() == digest(MODEL, FILE, PIECE * count, END)
            assert (b"Transfer-Encoding: chunked" in sink.head) is chunked
            assert (b"Content-Length: %d\r\n" % size in sink.head) is not chunked
            assert peak < 6_000_000 and server.server.held == 0
        assert repr(server.server.links) == "<ConnectionPool idle=1 active=0>" and sink.calls == 2
        client.close()


async def test_an_upstream_that_stops_reading_stops_the_client() -> None:
    """Back-pressure goes both ways, and no time runs against a client that is kept waiting."""
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url)) as server:
        sink.may_read.clear()
        client = await server.open()
        size = len(MODEL + FILE) + 400 * len(PIECE)
        await client.send(head(size) + MODEL + FILE)
        sending = asyncio.ensure_future(send_pieces(client, 400))
        await sink.begun.wait()
        connection = next(iter(server.server.connections))
        while not connection.reader.held or connection.upload is None or connection.upload.held_at is None:
            await asyncio.sleep(0)
        await turns(20)
        (link,) = server.server.links.active
        assert not sending.done() and len(connection.reader.data) <= 2 * app.READ_BYTES
        assert link.writer.transport.get_write_buffer_size() < app.REPLAYED_BYTES + 4 * app.READ_BYTES
        assert connection.deadline.at == app.math.inf > link.deadline.at
        sink.may_read.set()
        await sending
        assert (await client.read()).status == 200 and sink.size == size
        client.close()


@pytest.mark.parametrize("more", [0, 2_000_000])
async def test_a_model_that_follows_its_file(more: int) -> None:
    """curl -F file=@x -F model=y puts it last: then the body is kept up to body_bytes; the model is mapped in place."""
    body = FILE + b"x" * (500_000 + more) + b"\r\n" + MODEL + field("stream", b"true")
    rest = field("more", b"y" * (more and 1_500_000)) + END
    sink = Sink()
    async with sink.listen() as url:
        mapped = controller("b", url, models=["whisper-1"], model_map={"whisper-1": "whisper-mapped"})
        async with Running(controller("a", url, models=["other"]), mapped) as server:
            client = await server.open()
            await client.send(head(len(body + rest)) + body + rest)
            found = await client.read()
            assert (found.status, found.headers["x-apiserver-controller"]) == (200, "b")
            assert found.headers["x-apiserver-model"] == "whisper-1 -> whisper-mapped"
            assert sink.sha.digest() == digest(body.replace(b"whisper-1", b"whisper-mapped"), rest)
            client.close()


async def test_a_model_that_does_not_come() -> None:
    """Within body_bytes it has to stand; what to do is said, and nothing is sent."""
    async with Upstream(answers(json_reply(200, {}))) as one:
        async with Running(controller("a", one.url), limits={"body_bytes": 200_000}) as server:
            client = await server.open()
            await client.send(head(5_000_000) + FILE + PIECE * 4)
            found = await client.read()
            assert found.status == 413 and "put that field before the file" in found.json()["error"]["message"]
            client.close()
            assert not one.seen and server.server.held == 0


async def test_any_other_large_body_passes_through_too() -> None:
    """Files of `objects`, and bytes of any kind where every path is open; JSON is read whole."""
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url), endpoints=["*"]) as server:
        for method, path, kind in (("POST", "/v1/files", KIND), ("PUT", "/v1/x", "application/octet-stream")):
            client = await server.open()
            sink.begun.clear()
            body = FILE + PIECE * 40 + END
            await client.send(head(len(body), "X-Mark: 1", path=path, kind=kind, method=method) + body[:2_000_000])
            await sink.begun.wait()
            assert 0 < server.server.held < 1_200_000
            await client.send(body[2_000_000:])
            assert (await client.read()).status == 200 and sink.sha.digest() == digest(body)
            assert b"X-Mark: 1\r\n" in sink.head and sink.head.startswith(b"%b %b " % (method.encode(), path.encode()))
            client.close()


async def test_an_upload_over_tls() -> None:
    """Encryption changes nothing about it."""

    async def script(peer: Peer, message: Message) -> None:
        await peer.send(json_reply(200, {"digest": hashlib.sha256(message.body).hexdigest()}))

    async with Upstream(script, tls=True) as one:
        async with Running(controller("a", one.url, account={"ca_file": CERT})) as server:
            client = await server.open()
            body = MODEL + FILE + PIECE * 60 + END
            await client.send(head(len(body)) + body)
            assert (await client.read()).json() == {"digest": digest(body).hex()}
            client.close()


# ---- failing on the way


@pytest.mark.parametrize("status", [401, 413, 500])
async def test_an_early_reply_reaches_the_client(status: int) -> None:
    """An upstream that answers while the body comes is heard, once; nobody else is asked, and the connections close."""
    sink = Sink(error_reply(status, message="early"), answer_after=1_100_000)
    async with sink.listen() as url, Upstream(answers(json_reply(200, {}))) as other:
        async with Running(controller("a", url), controller("b", other.url)) as server:
            client = await server.open()
            await client.send(head(50_000_000) + MODEL + FILE)
            await send_pieces(client, 20)
            found = await client.read()
            assert (found.status, found.json()["error"]["message"]) == (status, "early")
            assert (found.headers["connection"], found.headers["x-apiserver-attempts"]) == ("close", "1")
            await sink.ended.wait()
            assert sink.broken and not other.seen
            client.close()


async def test_an_early_answer_may_be_the_answer() -> None:
    """A 200 before the body's end is passed on; a body that goes on has nobody to go to."""
    sink = Sink(json_reply(200, {"text": "enough"}), answer_after=1_100_000)
    async with sink.listen() as url, Running(controller("a", url)) as server:
        client = await server.open()
        await client.send(head(50_000_000) + MODEL + FILE)
        await send_pieces(client, 20)
        found = await client.read()
        assert (found.status, found.json(), found.headers["connection"]) == (200, {"text": "enough"}, "close")
        await sink.ended.wait()
        client.close()


async def test_a_connection_whose_reply_began_before_the_request_ended_is_not_used_again() -> None:
    """An upstream that answered early may take what still came of the body for the next request."""
    begun = asyncio.Event()

    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = await reader.readuntil(b"\r\n\r\n")
        left = int(text.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(app.REPLAYED_BYTES)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + app.chunk(b"x" * 1_100_000))
        begun.set()
        await reader.readexactly(left - app.REPLAYED_BYTES)
        writer.write(app.LAST_CHUNK)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    listener = await asyncio.start_server(hasty, "127.0.0.1", 0)
    url = "http://127.0.0.1:%d/v1" % listener.sockets[0].getsockname()[1]
    async with Running(controller("a", url)) as server:
        client = await server.open()
        body = MODEL + FILE + PIECE * 40 + END
        await client.send(head(len(body)) + body[:-10])
        await begun.wait()
        assert (await client.read(head_only=True)).headers["connection"] == "close"
        await client.send(body[-10:])
        assert (await client.closed()).endswith(app.LAST_CHUNK)
        client.close()
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"
    listener.close()


async def test_who_cannot_be_reached_is_passed_over_with_an_upload_too() -> None:
    """As long as no more than the kept beginning was needed another controller can be asked; after that not."""
    sink = Sink()
    async with sink.listen() as url:
        async with Running(controller("a", "http://127.0.0.1:1/v1"), controller("b", url)) as server:
            for _ in range(2):
                client = await server.open()
                size = len(MODEL + FILE) + 40 * len(PIECE)
                await client.send(head(size) + MODEL + FILE)
                await send_pieces(client, 40)
                found = await client.read()
                assert (found.status, found.headers["x-apiserver-controller"]) == (200, "b") and sink.size == size
                client.close()


@pytest.mark.parametrize("size", [300_000, 3_000_000])
async def test_a_failure_in_an_upload_is_replayed_only_while_it_is_small(size: int) -> None:
    """Up to 1 MB a form fails over as JSON does; a larger one that had begun to pass gets 502."""

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(min(size, 1_100_000) // 10_000):
            await reader.readexactly(10_000)
        reset(writer)

    bad = await asyncio.start_server(broken, "127.0.0.1", 0)
    sink = Sink()
    async with sink.listen() as url:
        first = controller("a", "http://127.0.0.1:%d/v1" % bad.sockets[0].getsockname()[1])
        async with Running(first, controller("b", url)) as server:
            client = await server.open()
            body = MODEL + FILE + b"x" * size + END
            with contextlib.suppress(ConnectionError):
                await client.send(head(len(body)) + body)
            found = await client.read()
            assert (found.status, found.headers["x-apiserver-attempts"]) == ((200, "2") if size < 1_000_000 else (502, "1"))
            assert server.server.pool.upstreams[0].failures == 1
            client.close()
    bad.close()


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_in_its_body(how: str) -> None:
    """The upstream's connection is closed, and its controller is not blamed."""
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url)) as server:
        client = await server.open()
        await client.send(head(50_000_000) + MODEL + FILE)
        await send_pieces(client, 20)
        await sink.begun.wait()
        if how == "reset":
            client.reset()
        else:
            client.writer.write_eof()
        await sink.ended.wait()
        while server.server.connections:
            await asyncio.sleep(0)
        (upstream,) = server.server.pool.upstreams
        assert (upstream.in_flight, upstream.failures, server.server.held) == (0, 0, 0)
        server.server.access.flush()
        assert " 499 " in "".join(server.lines)
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize(("limits", "least", "most"), [({"body_timeout": 30}, 29, 32), ({"body_rate": 100_000}, 20, 30)])
async def test_a_client_that_stalls_in_its_body(limits: dict[str, int], least: int, most: int) -> None:
    """Silence for body_timeout, or less than body_rate, ends in 408 and closes the upstream."""
    sink = Sink()
    loop = asyncio.get_running_loop()
    async with sink.listen() as url, Running(controller("a", url, timeouts={"first_byte": 5}), limits=limits) as server:
        client = await server.open()
        await client.send(head(50_000_000) + MODEL + FILE)
        await send_pieces(client, 20)
        since = loop.time()
        if "body_rate" in limits:
            while not sink.ended.is_set():
                over = loop.create_future()
                loop.call_later(1, over.set_result, None)
                await over
                await client.send(b"x" * 1000)
        found = await client.read()
        assert (found.status, found.headers["connection"]) == (408, "close")
        assert least <= loop.time() - since <= most
        await sink.ended.wait()
        assert server.server.pool.upstreams[0].failures == 0
        client.close()


@pytest.mark.virtual_time
async def test_an_upstream_that_never_answers_an_upload() -> None:
    """Its time begins when it has the whole body, however long that took."""
    sink = Sink(b"")
    loop = asyncio.get_running_loop()
    async with sink.listen() as url, Running(controller("a", url, timeouts={"first_byte": 5})) as server:
        client = await server.open()
        body = MODEL + FILE + PIECE * 20 + END
        await client.send(head(len(body)) + body[:-10])
        await sink.begun.wait()
        over = loop.create_future()
        loop.call_later(20, over.set_result, None)
        await over
        since = loop.time()
        await client.send(body[-10:])
        assert (await client.read()).status == 504 and 4 <= loop.time() - since <= 6
        assert server.server.pool.upstreams[0].failures == 1
        client.close()


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"zz\r\n", 400),
        (b"ffffff\r\n", 413),
        (app.chunk(b"\r\n" + field("model", b"other") + b"--xx--"), 400),
    ],
)
async def test_a_body_that_turns_bad_on_its_way(bad: bytes, status: int) -> None:
    """Bad framing, too much of it, or another model: the client hears of it and the upstream never gets an end."""
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url), limits={"upload_bytes": 10_000_000}) as server:
        client = await server.open()
        await client.send(head(None) + app.chunk(MODEL + FILE))
        await send_pieces(client, 20, chunked=True)
        await sink.begun.wait()
        await client.send(bad)
        found = await client.read()
        assert (found.status, found.headers["connection"]) == (status, "close")
        await sink.ended.wait()
        assert sink.broken and server.server.pool.upstreams[0].failures == 0
        client.close()


async def test_a_small_form_with_two_models_is_refused() -> None:
    """A key's models are judged by one of them, and the account may take the other."""
    async with Upstream(answers(json_reply(200, {}))) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        body = MODEL + field("model", b"other") + END
        await client.send(head(len(body)) + body)
        assert (await client.read()).status == 400 and not one.seen
        client.close()


@contextlib.asynccontextmanager
async def busy_controller() -> AsyncIterator[tuple[Running, Client, asyncio.Event]]:
    """A server whose only place is taken until the event is set, and a client for an upload, which is told its size."""
    go = asyncio.Event()

    async def script(peer: Peer, message: Message) -> None:
        if message.start.startswith("POST /v1/chat"):
            await go.wait()
        await peer.send(json_reply(200, {"size": len(message.body)}))

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"concurrency": 1})) as server:
        first, client = await server.open(), await server.open()
        await first.post("m")
        while not one.seen:
            await asyncio.sleep(0)
        yield server, client, go
        first.close()
        client.close()


async def test_an_upload_waits_in_line() -> None:
    """While no controller has room the client is stopped, and what it sent before is not lost."""
    async with busy_controller() as (server, client, go):
        body = MODEL + FILE + PIECE * 60 + END
        sending = asyncio.ensure_future(client.send(head(len(body)) + body))
        while not server.server.pool.waiting:
            await asyncio.sleep(0)
        await turns(10)
        go.set()
        await sending
        found = await client.read()
        assert found.json() == {"size": len(body)} and int(found.headers["x-apiserver-wait-ms"]) >= 0


async def test_a_request_behind_an_upload_whose_end_came_in_line_is_read() -> None:
    """A client that was stopped while its request waited goes on, also when all of the body had come by then."""
    async with busy_controller() as (server, client, go):
        begun = MODEL + FILE + b"x" * app.REPLAYED_BYTES
        rest = (b"y" * 15_000, b"y" * (app.READ_BYTES - 10_000) + END)
        await client.send(head(len(begun) + len(b"".join(rest))) + begun)
        while not server.server.pool.waiting:
            await asyncio.sleep(0)
        connection = next(one for one in server.server.connections if one.upload is not None)
        for piece in rest:
            await client.send(piece)
            while not connection.reader.data.endswith(piece):
                await asyncio.sleep(0)
        assert connection.reader.held
        go.set()
        assert (await client.read()).json() == {"size": len(begun) + len(b"".join(rest))}
        await client.send(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await client.read()).json() == {"status": "ok"}


async def test_a_stop_in_the_middle_of_an_upload() -> None:
    """Its answer says that the connection closes, and it does: nobody waits for another request."""
    sink = Sink()
    async with sink.listen() as url, Running(controller("a", url)) as server:
        client = await server.open()
        body = MODEL + FILE + PIECE * 40 + END
        await client.send(head(len(body)) + body[:-10])
        while sink.size < len(body) - 100_000:
            await asyncio.sleep(0)
        stopping = asyncio.ensure_future(server.server.stop())
        while not server.server.stopping:
            await asyncio.sleep(0)
        await client.send(body[-10:])
        found = await client.read()
        assert (found.status, found.headers["connection"]) == (200, "close")
        client.close()
        async with asyncio.timeout(5):
            await stopping


async def test_whatever_happens_to_uploads_nothing_is_left() -> None:
    """Clients that leave, upstreams that answer early, break or are slow, in any mixture: all is given back at the end."""
    chance = random.Random(7)
    done: list[int] = []

    async def moody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                text = (await reader.readuntil(b"\r\n\r\n")).lower()
                left = int(text.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                how = chance.choice(["whole", "whole", "early", "reset", "close"])
                left = left if how == "whole" else chance.randrange(left)
                while left > 0 and (data := await reader.read(min(left, chance.choice([1000, 60_000])))):
                    left -= len(data)
                if how == "reset":
                    reset(writer)
                elif how != "close":
                    writer.write(error_reply(chance.choice([400, 401, 429, 500])) if how == "early" else json_reply(200, {}))
                if how != "whole":
                    return
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one_client(server: Running) -> None:
        client = await server.open()
        size = chance.choice([10_000, 900_000, 1_200_000, 2_000_000])
        body = MODEL + FILE + b"x" * size + END
        raw = head(len(body)) + body
        cut = chance.randrange(len(raw)) if chance.random() < 0.3 else len(raw)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await client.send(raw[:cut])
            if cut < len(raw):
                client.reset()
            done.append((await client.read()).status)
        client.close()

    peers = [await asyncio.start_server(moody, "127.0.0.1", 0) for _ in range(2)]
    urls = ["http://127.0.0.1:%d/v1" % peer.sockets[0].getsockname()[1] for peer in peers]
    async with Running(*(controller(name, url) for name, url in zip("ab", urls, strict=True))) as server:
        for _ in range(5):
            await asyncio.gather(*(one_client(server) for _ in range(6)))
        while server.server.connections:
            await asyncio.sleep(0)
        assert server.server.held == 0 and not server.server.links.active and len(done) > 5
        assert all(upstream.in_flight == 0 for upstream in server.server.pool.upstreams)
    for peer in peers:
        peer.close()
