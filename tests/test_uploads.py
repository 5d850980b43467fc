"""Forms with files and other large bodies: what a form says, and how a body gets upstream whole."""

import asyncio
import contextlib
import hashlib
import random
import time
import tracemalloc

import pytest

import chatgpt_apiserver as app

from .support import CERT, Client, Message, Peer, Running, Upstream, answers, controller, error_reply, json_reply, now, refusing, until
from .wirefeed import turns

KIND = "multipart/form-data; boundary=xx"
AUDIO = "/v1/audio/transcriptions"
PIECE = bytes(range(256)) * 256
TEXT = json_reply(200, {"text": "hi"})


def field(name: str, value: bytes, more: str = "") -> bytes:
    """Return one part of a form."""
    return b'--xx\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more.encode(), value)


MODEL = field("model", b"whisper-1")
FILE = field("file", b"", '; filename="a.mp3"')[:-2]
END = b"\r\n--xx--\r\n"
LARGE = MODEL + FILE + PIECE * 40 + END  # 2.6 MB


def head(size: int | None, path: str = AUDIO) -> bytes:
    """Return a request's head; without a size the body comes in chunks."""
    framing = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {KIND}\r\n{framing}\r\n\r\n".encode()


async def upload(server: Running, body: bytes, path: str = AUDIO) -> Message:
    """Send a form on a connection of its own and read the answer."""
    client = await server.open()
    with contextlib.suppress(ConnectionError):
        await client.send(head(len(body), path) + body)
    answer = await client.read()
    client.close()
    return answer


class Digest(Upstream):
    """An upstream that keeps only the digest of a body; it may answer, or reset, when it has read `early` bytes of it."""

    def __init__(self, reply: bytes = TEXT, early: int | None = None, tls: bool = False) -> None:
        super().__init__(talk=self.digest, tls=tls)
        self.reply, self.early = reply, early
        self.sha, self.head, self.calls = hashlib.sha256(), b"", 0

    async def digest(self, peer: Peer) -> None:
        """Serve one connection."""
        while True:
            self.head, self.sha = await peer.reader.readuntil(b"\r\n\r\n"), hashlib.sha256()
            self.calls += 1
            size, done = length_in(self.head), 0
            while done < size:
                data = await peer.reader.readexactly(min(size - done, 16384))
                self.sha.update(data)
                done += len(data)
                if self.early is not None and done - len(data) < self.early <= done:
                    if not self.reply:
                        peer.reset()
                        return
                    peer.writer.write(self.reply)
            if self.early is None:
                peer.writer.write(self.reply)

    def got(self, *pieces: bytes) -> bool:
        """Return whether the last body consists of these pieces."""
        return self.sha.digest() == hashlib.sha256(b"".join(pieces)).digest()


def length_in(head: bytes) -> int:
    """Return the Content-Length of a request's head."""
    return int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])


# -- forms (more of them in test_http1.py)

OTHER = b'Content-Disposition: form-data; name="model"\r\n\r\nother\r\n'


@pytest.mark.parametrize(
    "odd",
    [
        field("model", b"other"),
        field("model", b"m", '; filename="m"'),
        b"--xx\r\n" + b"x: y\r\n" * 2000,
        b"--xx--more\r\n--xx\r\n" + OTHER,
    ],
)
async def test_a_form_with_a_hidden_second_model(odd: bytes) -> None:
    """A form in which some account could find a second model, or a model without an end, is refused, and never sent."""
    async with Upstream(answers(TEXT)) as one, Running(controller("a", one.url)) as server:
        for body in (MODEL + odd + field("more", b"") + END[2:], field("model", b"x")):
            assert (await upload(server, body, "/v1/images/edits")).status == 400
        assert not one.seen


@pytest.mark.parametrize(
    "unit",
    [
        *(b"\r\n--xxy", b"--xx", field("a", b"b"), b"--xx\r\n\r\n\r\n", b"\r\n", b"--xx\r\nA: b\r\n"),
        b"\r\n--xx\r\nContent-Disposition: form-data; name=a\r\n" + b"A: b\r\n" * 50,
    ],
)
def test_a_form_of_boundaries_takes_linear_time(unit: bytes) -> None:
    """Three megabytes that look like boundaries are judged in less than a second of CPU time."""
    form = MODEL + unit * (3_000_000 // len(unit)) + END
    since = time.process_time()
    with contextlib.suppress(app.ProxyError):
        app.form_spans(form, KIND.encode())
    assert time.process_time() - since < 0.9


# -- bodies that get upstream


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_upload_takes_little_memory(chunked: bool) -> None:
    """20 MB go up unchanged, in either framing, with a few of them in memory; the connections serve the next one."""
    size = len(MODEL + FILE + END) + 320 * len(PIECE)
    frame = app.chunk if chunked else bytes
    async with Digest() as upstream, Running(controller("a", upstream.url)) as server:
        client = await server.open()
        for _ in range(2):
            await client.send(head(None if chunked else size) + frame(MODEL + FILE))
            tracemalloc.start()
            for _ in range(320):
                await client.send(frame(PIECE))
            await client.send(frame(END) + app.LAST_CHUNK * chunked)
            answer = await client.read()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (answer.status, answer.json()) == (200, {"text": "hi"}) and "connection" not in answer.headers
            assert upstream.got(MODEL, FILE, PIECE * 320, END) and peak < 6_000_000
            assert b"Content-Length: %d\r\n" % size in upstream.head
        assert server.server.links.idle_count == 1 and upstream.calls == 2
        client.close()


@pytest.mark.parametrize("more", [0, 2_000_000])
async def test_a_model_that_follows_its_file(more: int) -> None:
    """A model after the file, as `curl -F file=@x -F model=y` sends it, is found and mapped in place."""
    body = FILE + b"x" * (500_000 + more) + b"\r\n" + MODEL + field("stream", b"true")
    rest = field("more", b"y" * (more and 1_500_000)) + END
    async with Digest() as upstream:
        mapped = controller("b", upstream.url, models=["whisper-1"], model_map={"whisper-1": "whisper-mapped"})
        async with Running(controller("a", upstream.url, models=["other"]), mapped) as server:
            answer = await upload(server, body + rest)
            assert (answer.status, answer.headers["x-apiserver-controller"]) == (200, "b")
            assert answer.headers["x-apiserver-model"] == "whisper-1 -> whisper-mapped"
            assert upstream.got(body.replace(b"whisper-1", b"whisper-mapped"), rest)


@pytest.mark.parametrize("tls", [False, True])
async def test_any_other_large_body(tls: bool) -> None:
    """Files of `objects`, and bytes of any kind where every path is open, go up with their method, path and headers."""
    async with Digest(tls=tls) as one:
        account = {"ca_file": CERT} if tls else {}
        async with Running(controller("a", one.url, account=account), endpoints=["*"]) as server:
            for method, path, kind in (("POST", "/v1/files", KIND), ("PUT", "/v1/x", "application/octet-stream")):
                answer = await server.ask(method, path, LARGE, "X-Mark: 1", kind=kind)
                assert answer.status == 200 and one.got(LARGE) and b"X-Mark: 1\r\n" in one.head
                assert one.head.startswith(f"{method} {path} ".encode())


async def test_an_upload_waits_in_line() -> None:
    """While no controller has room the upload is received, and nothing of it is lost."""
    gate = asyncio.Event()

    async def script(peer: Peer, message: Message) -> None:
        if message.start.startswith("POST /v1/chat"):
            await gate.wait()
        await peer.send(json_reply(200, {"size": len(message.body)}))

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"concurrency": 1})) as server:
        first = await server.open()
        await first.post("m")
        await until(lambda: one.seen)
        waiting = asyncio.ensure_future(upload(server, LARGE))
        await until(lambda: server.server.pool.waiting)
        await turns(10)
        gate.set()
        answer = await waiting
        assert answer.json() == {"size": len(LARGE)} and int(answer.headers["x-apiserver-wait-ms"]) >= 0
        first.close()


# -- uploads that fail


@pytest.mark.parametrize("status", [200, 401, 413, 500])
async def test_an_early_reply(status: int) -> None:
    """A reply during the upload is the answer, or moves it on as any other; its connection is not used again."""
    early, body = TEXT if status == 200 else error_reply(status, message="early"), MODEL + FILE + PIECE * 200 + END
    async with Digest(early, 1_100_000) as upstream, Upstream(answers(json_reply(200, {}))) as other:
        async with Running(controller("a", upstream.url), controller("b", other.url)) as server:
            answer = await upload(server, body)
            if status in (200, 413):
                assert (answer.status, len(other.seen)) == (status, 0)
                assert answer.json() == {"text": "hi"} or answer.json()["error"]["message"] == "early"
            else:
                assert (answer.status, answer.headers["x-apiserver-attempts"]) == (200, "2")
                assert other.seen[0].body == body
            await until(lambda: not upstream.open_connections)
            links = server.server.links
            assert (links.idle_count, bool(links.active)) == (status not in (200, 413), False)


@pytest.mark.parametrize("size", [300_000, 3_000_000])
async def test_an_upload_fails_over_at_any_size(size: int) -> None:
    """An upstream that breaks off, or cannot be reached, costs the client nothing, however large the form is."""
    body = MODEL + FILE + b"x" * size + END
    async with Digest(b"", early=250_000) as broken, Digest() as good:
        with refusing() as refused_url:
            for first in (broken.url, refused_url):
                async with Running(controller("a", first), controller("b", good.url)) as server:
                    answer = await upload(server, body)
                    assert (answer.status, answer.headers["x-apiserver-attempts"]) == (200, "2") and good.got(body)
                    assert (await server.status())["controllers"][0]["failures"] == 1


@pytest.mark.virtual_time
async def test_an_upstream_that_never_answers_an_upload() -> None:
    """The timeout for the first byte begins when the upstream has the whole body."""
    async with Digest(b"") as one, Running(controller("a", one.url, timeouts={"first_byte": 5})) as server:
        since = now()
        assert (await upload(server, MODEL + FILE + PIECE * 20 + END)).status == 504 and 4 <= now() - since <= 6
        assert (await server.status())["controllers"][0]["failures"] == 1


async def begin(server: Running, size: int | None = 50_000_000) -> Client:
    """Return a client that has sent the first 1.3 MB of an upload."""
    client = await server.open()
    frame = app.chunk if size is None else bytes
    await client.send(head(size) + frame(MODEL + FILE))
    for _ in range(20):
        await client.send(frame(PIECE))
    return client


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_in_its_upload(how: str) -> None:
    """When a client leaves during its upload nothing is sent upstream, and no controller is blamed."""
    async with Upstream(answers(TEXT)) as one, Running(controller("a", one.url)) as server:
        client = await begin(server)
        client.reset() if how == "reset" else client.writer.close()
        await until(lambda: not server.server.connections)
        assert not one.connections
        (shown,) = (await server.status())["controllers"]
        assert (shown["in_flight"], shown["failures"]) == (0, 0)


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"zz\r\n", 400),
        (b"ffffff\r\n", 413),
        (app.chunk(b"\r\n" + field("model", b"other") + b"--xx--") + app.LAST_CHUNK, 400),
    ],
)
async def test_an_upload_that_turns_bad(bad: bytes, status: int) -> None:
    """After bad framing, too many bytes or a second model the client gets an error, and nothing is sent upstream."""
    async with Upstream(answers(TEXT)) as one:
        async with Running(controller("a", one.url), limits={"upload_bytes": 10_000_000}) as server:
            client = await begin(server, None)
            await client.send(bad)
            answer = await client.read()
            assert answer.status == status and not one.connections
            client.close()


async def test_nothing_is_left_of_uploads() -> None:
    """Clients that leave and upstreams that answer early or break, in any mixture, leave no connection and no lease behind."""
    chance = random.Random(7)
    done: list[int] = []

    async def moody(peer: Peer) -> None:
        how = "whole"
        while how == "whole":
            left = length_in(await peer.reader.readuntil(b"\r\n\r\n"))
            how = chance.choice(["whole", "whole", "early", "reset", "close"])
            left = left if how == "whole" else chance.randrange(left)
            while left > 0 and (data := await peer.reader.read(min(left, chance.choice([1000, 60_000])))):
                left -= len(data)
            if how == "reset":
                peer.reset()
            elif how != "close":
                await peer.send(error_reply(chance.choice([400, 401, 429, 500])) if how == "early" else TEXT)

    async def one_client(server: Running) -> None:
        client = await server.open()
        body = MODEL + FILE + b"x" * chance.choice([10_000, 900_000, 1_200_000, 2_000_000]) + END
        raw = head(len(body)) + body
        cut = chance.randrange(len(raw)) if chance.random() < 0.3 else len(raw)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await client.send(raw[:cut])
            if cut < len(raw):
                client.reset()
            done.append((await client.read()).status)
        client.close()

    async with Upstream(talk=moody) as one, Upstream(talk=moody) as two:
        async with Running(controller("a", one.url), controller("b", two.url)) as server:
            for _ in range(5):
                await asyncio.gather(*(one_client(server) for _ in range(6)))
            await until(lambda: not server.server.connections)
            assert not server.server.links.active and len(done) > 5
            assert [shown["in_flight"] for shown in (await server.status())["controllers"]] == [0, 0]
