"""Feeds raw messages, cut in every way, to the pure parsers and to a server on a real socket."""

import asyncio
import itertools
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import chatgpt_apiserver as app

from .support import Running

WIRE = Path(__file__).parent / "wire"
# Sent after each message of the corpus: after a good one it must be answered, after a bad one it must not be seen.
FOLLOW = b"GET /v1/wire-follow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
TURNS = 3  # of the loop, after which what one socket of it has sent has been read and handled by another
LEAVE_TURNS = 60  # after which even a relayed request has been answered
WAIT_S = 10.0  # real time that one exchange may take
BODY_LIMIT = 33_554_432
HOW = ("whole", "byte", "line", "random")
NEAR, MANY_LINES, BLOCK = 4, 40, 700

Result = TypeVar("Result")
Request = tuple[str, str, int, bytes]  # method, target, minor version, body
Answer = tuple[int, dict[str, str], bytes]  # status, fields with lower-case names, body


def corpus(folder: str) -> list[str]:
    """Return the names, below tests/wire, of a folder's messages."""
    return sorted(path.relative_to(WIRE).as_posix() for path in (WIRE / folder).glob("*.http"))


def message(name: str) -> bytes:
    """Return the raw bytes of a message."""
    return (WIRE / name).read_bytes()


def cut_at(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Cut `data` before each of the places."""
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def cut(data: bytes, how: str, seed: int | str = 0) -> list[bytes]:
    """Cut `data` in one way; long data is cut by byte only near line ends."""
    if how == "whole":
        return [data]
    line_ends = [match.end() for match in re.finditer(rb"[\r\n]", data)]
    if how == "line":
        return cut_at(data, [end for end in line_ends if data[end - 1 : end] == b"\n"])
    if how == "random":
        chooser = random.Random(seed)
        return cut_at(data, [chooser.randrange(len(data) + 1) for _ in range(chooser.randint(1, 6))])
    assert how == "byte"
    if len(data) < 2 * BLOCK:
        return cut_at(data, range(len(data)))
    near = [place for end in line_ends if len(line_ends) < MANY_LINES for place in range(end - NEAR, end + NEAR)]
    return cut_at(data, [*range(200), *range(0, len(data), BLOCK), *near, *range(len(data) - 200, len(data))])


def take_head(data: bytes, pieces: Iterator[bytes]) -> bytes:
    """Return `data` with as many of the pieces as complete a head, or all of them."""
    start = 0
    while data.find(b"\r\n\r\n", start) < 0 and (piece := next(pieces, b"")):
        start = max(0, len(data) - 3)
        data += piece
    return data


def take_body(decoder: app.Decoder, data: bytes, pieces: Iterator[bytes]) -> tuple[bytes, bytes, bool]:
    """Decode `data` and the pieces: return the body, the bytes after it, and whether it is complete."""
    body = b""
    while not decoder.done:
        if data:
            body += decoder.feed(data)
        data = b""
        if not decoder.done:
            data = next(pieces, b"")
            if not data:
                return body, b"", decoder.until_end
    return body, decoder.surplus + data, True


def each_request(pieces: Iterable[bytes], limit: int = BODY_LIMIT) -> Iterator[Request]:
    """Yield the complete requests in the pieces, by the pure parser. Raises its errors."""
    left, data = iter(pieces), b""
    while True:
        data = take_head(data, left)
        while data.startswith(b"\r\n"):
            data = take_head(data[2:], left)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = app.parse_request_head(data[: end + 4])
        decoder, data, body, whole = app.request_body_decoder(head, limit), data[end + 4 :], b"", True
        if decoder is not None:
            body, data, whole = take_body(decoder, data, left)
        if not whole:
            return
        yield head.method, head.target, head.http_minor, body


def read_reply(pieces: Iterable[bytes], method: str = "POST") -> tuple[int, bytes, bytes]:
    """Return status, body and the bytes after the reply in the pieces, by the pure parser. Raises its errors."""
    left, data = iter(pieces), b""
    while True:
        data = take_head(data, left)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            raise app.UpstreamClosed("no whole head")
        head, data = app.parse_response_head(data[: end + 4]), data[end + 4 :]
        if head.status >= 200:
            break
        if head.status == 101:
            raise app.BadReply("the protocol was not to be switched")
    body, rest, whole = take_body(app.reply_body_decoder(head, method), data, left)
    if not whole:
        raise app.UpstreamClosed("no whole body")
    return head.status, body, rest


ANSWER_HEAD = re.compile(
    r"HTTP/1\.1 ([1-5][0-9]{2}) [ -~]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*\r\n)*)\r\n\Z"
)


def split_answers(data: bytes, methods: Iterable[str] = ()) -> tuple[list[Answer], bytes]:
    """Return the server's complete final answers at the beginning of `data`, and the bytes after them."""
    asked = iter(methods)
    answers: list[Answer] = []
    while True:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return answers, data
        parsed = ANSWER_HEAD.match(head.decode("latin-1") + "\r\n\r\n")
        assert parsed, head
        status = int(parsed[1])
        if status >= 200:
            lines = [line.partition(": ") for line in parsed[2].split("\r\n")[:-1]]
            fields = {name.lower(): value for name, _, value in lines}
            framings = [name for name, _, _ in lines if name.lower() in ("content-length", "transfer-encoding")]
            assert len(framings) == (status not in (204, 304)), head
            body = b""
            if next(asked, "GET") != "HEAD" and status not in (204, 304):
                length = int(fields.get("content-length", "-1"))
                taken = dechunk(rest) if length < 0 else (rest[:length], rest[length:]) if len(rest) >= length else None
                if taken is None:
                    return answers, data
                body, rest = taken
            answers.append((status, fields, body))
        data = rest


def dechunk(data: bytes, strict: bool = True) -> tuple[bytes, bytes] | None:
    """Return a chunked body and the bytes after it; of an incomplete one None, or the part so far unless `strict`."""
    body = b""
    while True:
        line, end, rest = data.partition(b"\r\n")
        assert re.fullmatch(rb"[0-9a-f]*", line), line[:50]
        size = int(line, 16) if end else 0
        if not end or len(rest) < size + 2:
            return None if strict else (body, b"")
        assert rest[size : size + 2] == b"\r\n"
        if not size:
            return body, rest[2:]
        body, data = body + rest[:size], rest[size + 2 :]


def read_answers(data: bytes, methods: Iterable[str] = ()) -> list[Answer]:
    """Return the server's final answers, which must be all of `data`."""
    answers, rest = split_answers(data, methods)
    assert not rest, rest[:200]
    return answers


async def turns(count: int = TURNS) -> None:
    """Let the other side of a loopback connection handle what was sent."""
    for _ in range(count):
        await asyncio.sleep(0)


def pooled(running: Running) -> tuple[int, int]:
    """Return the numbers of idle and of active upstream connections."""
    return running.server.links.idle_count, len(running.server.links.active)


async def trickle(transport: asyncio.WriteTransport, pieces: list[bytes], stop: Callable[[], bool]) -> None:
    """Send the pieces one after the other, each handled before the next is sent; end early if `stop()` is true."""
    for piece in pieces:
        if stop() or transport.is_closing():
            return
        transport.write(piece)
        if len(pieces) > 1:
            await turns()


class Collector(asyncio.Protocol):
    """A client that collects all bytes, also when the connection is reset."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.over = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def talk(port: int, pieces: list[bytes], leave: bool = False) -> bytes:
    """Return all bytes that a server answers before it closes; `leave`: the client sends its FIN once they are answered."""
    async with asyncio.timeout(WAIT_S):
        transport, client = await asyncio.get_running_loop().create_connection(Collector, "127.0.0.1", port)
        try:
            await trickle(transport, pieces, client.over.done)
            await turns(LEAVE_TURNS if leave else 0)
            if leave and not client.over.done():
                transport.write_eof()
            await client.over
            return bytes(client.heard)
        finally:
            transport.abort()


class Stage:
    """A server in a loop that runs only while a test waits for it; without asyncio's debug mode, so it is fast."""

    def __init__(self, *controllers: dict[str, Any], **more: Any) -> None:
        self.runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        limits = {"header_timeout": 5, "body_timeout": 5, "idle_timeout": 5}
        echo = {"type": "echo", "name": "e", "models": ["*"]}
        self.running = Running(*(controllers or (echo,)), limits=limits, allowed_hosts=["*"], **more)

    def __enter__(self) -> "Stage":
        self.run(self.running.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.running.__aexit__)
        self.run(turns)
        self.runner.close()

    def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Run the loop until `work` is done."""

        async def main() -> Result:
            return await work()

        return self.runner.run(main())

    def ask(self, pieces: list[bytes], leave: bool = False) -> tuple[bytes, str]:
        """Return the server's answer to the pieces until it closes, and its access lines."""

        async def work() -> bytes:
            received = await talk(self.running.port, pieces, leave)
            while self.running.server.connections:
                await asyncio.sleep(0)
            await turns()
            return received

        self.running.lines.clear()
        received = self.run(work)
        self.running.server.access.flush()
        return received, "".join(self.running.lines)
