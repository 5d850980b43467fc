"""Faults of clients and upstreams at once, over three controllers: no answer lost or mixed up, nothing left behind.

Every choice follows from a seed and from the mark that each request carries. `CHAOS_SECONDS=60 python3 tests/run.py
tests/test_chaos.py` goes on for a minute with one seed after the other, from CHAOS_SEED on (default 1).
"""

import asyncio
import gc
import json
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from . import support
from .conftest import VirtualLoop, open_transports
from .support import Message, Peer, Running, controller, error_reply, reply
from .wirefeed import Collector, cut_at, dechunk, split_answers, trickle, turns

SECONDS, SEED = float(os.environ.get("CHAOS_SECONDS", "0")), int(os.environ.get("CHAOS_SEED", "1"))
SESSIONS, AT_ONCE = 180, 24  # of one round
PATIENCE_S = 3000.0  # on the virtual clock: longer than every timeout there is, so whoever waits that long is lost
FDS = Path("/proc/self/fd")
NAMES = ("a", "b", "c")

GOOD = ("plain", "plain", "trickle", "interim", "chunked", "until-close", "closes-after")
BAD = (
    *("status-400", "status-500", "status-503", "status-429", "garbage", "both-framings", "bad-chunk", "flood"),
    *("fin", "reset", "cut-head", "cut-body", "reset-body", "hang", "hang-in-body", "early-400", "early-reset", "stray"),
)
MANNERS = (
    *("stay", "stay", "stay", "dribble", "pipeline", "half-close", "slow-reader", "large"),
    *("leave-in-head", "leave-in-body", "leave-at-once", "leave-in-answer", "reset-in-body", "reset-at-once", "reset-in-answer"),
    *("bad-framing", "bad-chunk-at-end"),
)


def fault_of(seed: int, name: str, mark: str) -> str:
    """What an upstream does with a request: the same in every run."""
    chooser = random.Random("%d:%s:%s" % (seed, name, mark))
    return chooser.choice(GOOD) if chooser.random() < 0.55 else chooser.choice(BAD)


def events_of(mark: str) -> list[bytes]:
    """The events of a streamed answer."""
    count = 1 + random.Random(mark).randrange(6)
    one = {"id": mark, "choices": [{"index": 0, "delta": {"content": mark}}]}
    return [b"data: %b\n\n" % json.dumps(one | {"number": number}).encode() for number in range(count)] + [b"data: [DONE]\n\n"]


def whole_of(mark: str) -> bytes:
    """The body of a whole answer."""
    pad = "x" * random.Random(mark).choice((0, 0, 10, 5000, 150_000))
    return json.dumps({"id": mark, "choices": [{"index": 0, "message": {"role": "assistant", "content": mark}}], "pad": pad}).encode()


def reset(transport: asyncio.WriteTransport) -> None:
    """Close with a RST, unless the other side was faster."""
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class Upstream:
    """An upstream that answers each request with its mark, or in a way that its mark decides."""

    def __init__(self, name: str, round_: "Round") -> None:
        self.name, self.round = name, round_
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        self.url = "http://127.0.0.1:%d/v1" % self.server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything."""
        self.server.close()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection in a task."""
        task = asyncio.get_running_loop().create_task(self.serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests, until one ends the connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode().lower().split("\r\n")
                fields = dict(line.split(": ", 1) for line in lines if ": " in line)
                mark, length = fields["x-mark"], int(fields["content-length"])
                fault = fault_of(self.round.seed, self.name, mark)
                self.round.faults[fault] += 1
                if fault.startswith("early"):
                    await self.early(fault, reader, writer)
                    return
                body = await reader.readexactly(length)
                assert json.loads(body)["messages"][0]["content"] == mark
                if not await self.answer(fault, mark, b'"stream": true' in body, reader, writer):
                    return
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()

    async def early(self, fault: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer, or not, before the body was read, and close."""
        if fault == "early-reset":
            reset(writer.transport)
            return
        writer.write(error_reply(400, "early", "no", "Connection: close"))
        writer.write_eof()
        while await reader.read(65536):
            pass

    async def answer(self, fault: str, mark: str, stream: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Do what the fault says; whether the connection may go on."""
        if fault.startswith("status-"):
            status = int(fault[-3:])
            writer.write(error_reply(status, "chaos", mark, *(["retry-after-ms: 40"] if status in (429, 503) else [])))
            return True
        if fault == "hang" or fault in ("fin", "reset"):
            if fault == "hang":
                await gone(reader)
            elif fault == "reset":
                reset(writer.transport)
            return False
        if fault in ("garbage", "both-framings", "bad-chunk", "flood"):
            writer.write(BROKEN[fault])
            await gone(reader)
            return False
        data = self.good(fault, mark, stream)
        end = data.index(b"\r\n\r\n") + 4
        if fault == "cut-head":
            data = data[: end // 2]
        elif fault in ("cut-body", "reset-body", "hang-in-body"):
            data = data[: random.Random(mark + self.name).randrange(end, len(data) - 1)]
        elif fault in GOOD:
            self.round.served.add(mark)
        if fault == "trickle":
            await trickle(writer.transport, cut_at(data, range(0, len(data), max(7, len(data) // 40))), lambda: False)
        else:
            writer.write(data + (reply(200, b'{"id":"stray"}') if fault == "stray" else b""))
            self.round.served |= {mark} if fault == "stray" else set()
        if fault == "reset-body":
            await turns()
            reset(writer.transport)
        elif fault == "hang-in-body":
            await gone(reader)
        elif fault in ("until-close", "cut-head", "cut-body", "closes-after"):
            await writer.drain()
            writer.write_eof()
            await gone(reader)
        return fault in ("plain", "trickle", "interim", "chunked", "stray")

    def good(self, fault: str, mark: str, stream: bool) -> bytes:
        """The bytes of a good reply."""
        if stream:
            head = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            body = b"".join(map(app.chunk, events_of(mark))) + b"0\r\n\r\n"
        else:
            body, head = whole_of(mark), b"Content-Type: application/json\r\n"
            if fault == "chunked":
                head += b"Transfer-Encoding: chunked\r\n"
                body = app.chunk(body[:9]) + app.chunk(body[9:]) + b"0\r\nX-T: 1\r\n\r\n"
            elif fault != "until-close":
                head += b"Content-Length: %d\r\n" % len(body)
        interim = b"HTTP/1.1 103 Early Hints\r\nX: 1\r\n\r\n" * 3 if fault == "interim" else b""
        return interim + b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body


BROKEN = {
    "garbage": b"\x00\xffnonsense\r\n\r\n",
    "both-framings": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "bad-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 200,
}


async def gone(reader: asyncio.StreamReader) -> None:
    """Wait until the other side closed."""
    while await reader.read(65536):
        pass


class Client(Collector):
    """A client that can wait for what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.news: asyncio.Future[None] | None = None
        self.link: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.link = transport

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.wake()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.wake()

    def wake(self) -> None:
        if self.news is not None and not self.news.done():
            self.news.set_result(None)

    async def until(self, enough: Callable[[bytes], bool]) -> None:
        """Wait until what was heard is enough, or the connection is over."""
        while not enough(bytes(self.heard)) and not self.over.done():
            self.news = asyncio.get_running_loop().create_future()
            await self.news


class Session:
    """One client connection: requests with marks, in good and bad manners."""

    def __init__(self, round_: "Round", number: int) -> None:
        self.round, self.number = round_, number
        self.chooser = random.Random("%d:session:%d" % (round_.seed, number))
        self.client: Client

    async def run(self, port: int) -> None:
        """Some requests, until one of them ends the connection."""
        loop = asyncio.get_running_loop()
        _, self.client = await loop.create_connection(Client, "127.0.0.1", port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                for turn in range(self.chooser.randint(1, 4)):
                    manner = self.chooser.choice(MANNERS)
                    self.round.manners[manner] += 1
                    if not await self.one(manner, "m%d-%d-%d" % (self.round.seed, self.number, turn)):
                        break
        finally:
            self.client.link.abort()

    def request(self, mark: str, stream: bool, pad: int = 0) -> bytes:
        """A chat request's bytes."""
        body = json.dumps({"model": "m", "stream": stream, "messages": [{"role": "user", "content": mark}], "pad": "x" * pad}).encode()
        lines = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Mark: %s\r\nContent-Length: %d\r\n\r\n"
        return (lines % (mark, len(body))).encode() + body

    async def one(self, manner: str, mark: str) -> bool:
        """One request in one manner; whether the connection may go on."""
        stream = self.chooser.random() < 0.5
        raw = self.request(mark, stream, 400_000 if manner == "large" else 0)
        end = raw.index(b"\r\n\r\n") + 4
        link = self.client.link
        if manner.startswith(("leave", "reset")):
            await self.leave(manner, raw, end)
            return False
        if manner == "dribble":
            await trickle(link, cut_at(raw, range(0, len(raw), 5)), self.client.over.done)
        elif manner == "pipeline":
            link.write(raw + self.request(mark + "-2", not stream))
        elif manner == "bad-framing":
            link.write(raw + b"GET /status HTTP/1.1\r\nHost : x\r\n\r\n" + self.request(mark + "-never", False))
        elif manner == "bad-chunk-at-end":
            head = raw[:end].replace(b"Content-Length: %d" % (len(raw) - end), b"Transfer-Encoding: chunked")
            link.write(head + app.chunk(raw[end:]) + b"-0\r\n\r\n" + self.request(mark + "-never", False))
        else:
            link.write(raw)
        if manner == "half-close":
            link.write_eof()
        elif manner == "slow-reader":
            link.pause_reading()
            await turns(20)
            link.resume_reading()
        return await self.judge(manner, mark, stream)

    async def judge(self, manner: str, mark: str, stream: bool) -> bool:
        """Each request that was sent whole gets one answer, its own; whether the connection may go on."""
        expected = [] if manner == "bad-chunk-at-end" else [(mark, stream)]
        expected += [(mark + "-2", not stream)] if manner == "pipeline" else []
        count = len(expected) + manner.startswith("bad")
        await self.client.until(lambda heard: len(split_answers(heard)[0]) >= count)
        answers, rest = split_answers(bytes(self.client.heard))
        for (status, _, body), (one, streamed) in zip(answers, expected, strict=False):
            self.round.check_answer(status, body, one, streamed)
        if len(answers) < len(expected):
            assert self.client.over.done(), (manner, mark)
            self.round.check_cut(rest, *expected[len(answers)])
        elif manner.startswith("bad"):
            assert len(answers) == count and answers[-1][0] == 400, (manner, mark, answers)
            await self.client.over
            assert split_answers(bytes(self.client.heard)) == (answers, b"")
        self.client.heard.clear()
        return not (self.client.over.done() or manner == "half-close")

    async def leave(self, manner: str, raw: bytes, end: int) -> None:
        """Send some, hear some, and go, by a FIN or a RST."""
        cuts = {"head": self.chooser.randrange(1, end), "body": self.chooser.randrange(end, len(raw) - 1)}
        self.client.link.write(raw[: cuts.get(manner.rpartition("-")[2], len(raw))])
        if manner.endswith("answer"):
            await self.client.until(lambda heard: len(heard) > self.chooser.choice((0, 20, 200, 400)))
        else:
            await turns(self.chooser.randrange(12))
        if manner.startswith("reset"):
            reset(self.client.link)


class Round:
    """A server, its upstreams, and many sessions at once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.served: set[str] = set()  # marks that an upstream has answered well
        self.faults: Counter[str] = Counter()
        self.manners: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def check_answer(self, status: int, body: bytes, mark: str, stream: bool) -> None:
        """An answer is that of its request, and whole."""
        if status == 200:
            expected = b"".join(events_of(mark)) if stream else whole_of(mark)
            assert body == expected, (mark, stream, body[:300])
            self.outcomes["whole"] += 1
            return
        error = json.loads(body)["error"]
        assert status >= 400 and sorted(error) == ["code", "message", "param", "type"], (mark, status, body)
        assert mark in error["message"] if error["code"] == "chaos" else True, (mark, error)
        assert mark not in self.served, (mark, status, "an upstream's good answer was lost")
        self.outcomes["error"] += 1

    def check_cut(self, rest: bytes, mark: str, stream: bool) -> None:
        """An answer that is not whole is a stream that says so, or one that an upstream was late to break."""
        head, end, body = rest.partition(b"\r\n\r\n")
        assert stream and end and head.startswith(b"HTTP/1.1 200 "), (mark, rest[:300])
        assert mark not in self.served, (mark, "an upstream's good answer was cut")
        found, _ = dechunk(body, strict=False) or (b"", b"")
        sent, told, message = found.rpartition(b'data: {"error":{')
        assert told and message.endswith(b"}}\n\n") and message.count(b"\n") == 2, (mark, found[-300:])
        assert b"".join(events_of(mark)).startswith(sent.rstrip(b"\n")), (mark, found)
        self.outcomes["cut"] += 1

    async def run(self) -> None:
        """All sessions, and then nothing is left."""
        before = open_files()
        upstreams = [Upstream(name, self) for name in NAMES]
        for one in upstreams:
            await one.start()
        timeouts = {"connect": 5, "first_byte": 20, "idle": 30}
        configured = [controller(one.name, one.url, timeouts=timeouts) for one in upstreams]
        async with Running(*configured, pool={"max_wait": 5}) as server:
            base, gate = open_files(), asyncio.Semaphore(AT_ONCE)

            async def session(number: int) -> None:
                async with gate:
                    await Session(self, number).run(server.port)

            await asyncio.gather(*(session(number) for number in range(SESSIONS)))
            await self.settle(server, base)
        for one in upstreams:
            await one.stop()
        await turns(5)
        assert open_files() == before

    async def settle(self, server: Running, base: int) -> None:
        """Nothing is in flight and no descriptor is open but the two of each idle connection."""
        links, left = server.server.links, ""
        for _ in range(60):
            idle = sum(map(len, links.idle.values()))
            left = "%r clients=%d files=%d" % (links, len(server.server.connections), open_files() - base - 2 * idle)
            if left.endswith("active=0> clients=0 files=0"):
                return
            await pause(1.0)
        raise AssertionError(left)


def open_files() -> int:
    """How many descriptors this process has open, where the system tells."""
    return len(list(FDS.iterdir())) if FDS.exists() else 0


async def pause(seconds: float) -> None:
    """Let time pass on the loop's clock."""
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(seconds, over.set_result, None)
    await over


async def orderly(work: Awaitable[None]) -> None:
    """`work`; when it fails, everything is closed, or warnings about that would hide why."""
    try:
        await work
    except BaseException:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for transport in open_transports():
            getattr(transport, "abort", transport.close)()
        await turns()
        raise


def test_faults_on_both_sides_lose_nothing_and_leave_nothing() -> None:
    """Whatever clients and upstreams do, every answer is its request's own, and at the end nothing is in flight."""
    until, seed = time.monotonic() + SECONDS, SEED
    problems: list[str] = []
    while True:
        found = Round(seed)
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: problems.append(repr(context)))
            runner.run(orderly(found.run()))
        assert not problems, (seed, problems[:3])
        assert found.outcomes["whole"] > SESSIONS / 3 and found.outcomes["error"] and found.outcomes["cut"], found.outcomes
        assert len(found.faults) > len({*GOOD, *BAD}) - 3 and set(found.manners) == set(MANNERS)
        print(seed, dict(found.outcomes), sum(found.faults.values()), "attempts")
        if time.monotonic() >= until:
            return
        seed += 1


@pytest.mark.skipif(not FDS.exists(), reason="counts the descriptors in /proc")
async def test_a_client_that_leaves_during_the_connect_leaves_no_file_open() -> None:
    """However far a connection to the upstream has come when nobody wants it any more, it is closed at once."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.gone()

    gc.disable()  # it would close what was forgotten
    try:
        async with support.Upstream(script) as one, Running(controller("a", one.url)) as server:
            base = open_files()
            for count in range(16):
                client = await server.open()
                await client.post("m")
                await turns(count)
                client.reset()
                for _ in range(500):
                    if open_files() == base:
                        break
                    await asyncio.sleep(0)
                assert open_files() == base, count
    finally:
        gc.enable()
