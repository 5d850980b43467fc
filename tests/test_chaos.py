"""Faults of clients and upstreams at once, over three controllers: no answer is lost or mixed up, nothing is left behind.

Every choice follows from a seed and from the mark that each request carries. `tests/soak.py` runs many rounds.
"""

import asyncio
import contextlib
import functools
import gc
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import chatgpt_apiserver as app

from .support import Client, Message, Peer, Running, Upstream, controller, error_reply, pause, reply, request
from .wirefeed import cut_at, dechunk, split_answers, trickle, turns

SESSIONS, AT_ONCE = 180, 24  # of one round
PATIENCE_S = 3000.0  # on the virtual clock: longer than every timeout
FDS = Path("/proc/self/fd")
LIMITS = {"a": {}, "b": {"concurrency": 8}, "c": {"tpm": 90_000_000}}

SERVED = ("plain", "plain", "trickle", "interim", "chunked", "until-close", "closes-after")
BROKEN = {
    "garbage": b"\x00\xffnonsense\r\n\r\n",
    "both-framings": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "bad-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "flood": b"HTTP/1.1 100 Continue\r\n\r\n" * 200,
}
FAULTS = (
    *("status-400", "status-500", "status-503", "status-429", *BROKEN, "error-in-200"),
    *("fin", "reset", "cut-head", "cut-body", "reset-body", "hang", "hang-in-body", "stray"),
)
MANNERS = (
    *("stay", "stay", "stay", "dribble", "pipeline", "slow-reader", "large"),
    *("leave-in-head", "leave-in-body", "leave-at-once", "leave-in-answer", "half-close"),
    *("reset-in-body", "reset-at-once", "reset-in-answer", "bad-framing", "bad-chunk-at-end"),
)


def fault_of(seed: int, name: str, mark: str) -> str:
    """Return what an upstream does with a request: the same in every run."""
    chooser = random.Random(f"{seed}:{name}:{mark}")
    return chooser.choice(SERVED if chooser.random() < 0.55 else FAULTS)


def events_of(mark: str) -> list[bytes]:
    """Return the events of a streamed answer."""
    chunk = {"id": mark, "choices": [{"index": 0, "delta": {"content": mark}}]}
    numbers = range(1 + random.Random(mark).randrange(6))
    return [*(b"data: %b\n\n" % json.dumps({**chunk, "number": number}).encode() for number in numbers), b"data: [DONE]\n\n"]


def whole_of(mark: str) -> bytes:
    """Return the body of a whole answer."""
    pad = "x" * random.Random(mark).choice((0, 0, 10, 5000, 150_000))
    return json.dumps({"id": mark, "choices": [{"index": 0, "message": {"role": "assistant", "content": mark}}], "pad": pad}).encode()


def good_reply(fault: str, mark: str, stream: bool) -> bytes:
    """Return the bytes of a good reply."""
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


class Session:
    """One client connection: requests with marks, in good and bad manners."""

    def __init__(self, round_: "Round", number: int, client: Client) -> None:
        self.round, self.number, self.client = round_, number, client
        self.transport = client.writer.transport
        self.chooser = random.Random(f"{round_.seed}:session:{number}")
        self.heard, self.over = b"", False

    async def run(self) -> None:
        """Send some requests, until one of them ends the connection."""
        async with asyncio.timeout(PATIENCE_S):
            for turn in range(self.chooser.randint(1, 4)):
                manner = self.chooser.choice(MANNERS)
                self.round.manners[manner] += 1
                if not await self.ask(manner, f"m{self.round.seed}-{self.number}-{turn}"):
                    return

    async def hear(self, enough: Callable[[bytes], bool]) -> None:
        """Read until `enough`, or until the connection is over."""
        while not (enough(self.heard) or self.over):
            data = b""
            with contextlib.suppress(ConnectionError):
                data = await self.client.reader.read(65536)
            self.heard += data
            self.over = not data

    def request(self, mark: str, stream: bool, pad: int = 0) -> bytes:
        """Return a chat request's bytes."""
        chat = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": mark}], "pad": "x" * pad}
        return request(json.dumps(chat).encode(), f"X-Mark: {mark}")

    async def ask(self, manner: str, mark: str) -> bool:
        """Send one request in one manner; return whether the connection may go on."""
        stream = self.chooser.random() < 0.5
        raw = self.request(mark, stream, 400_000 if manner == "large" else 0)
        end = raw.index(b"\r\n\r\n") + 4
        if manner.startswith(("leave", "reset", "half")):
            await self.leave(manner, raw, end)
            return False
        if manner == "dribble":
            await trickle(self.transport, cut_at(raw, range(0, len(raw), 5)), lambda: False)
        elif manner == "pipeline":
            self.transport.write(raw + self.request(mark + "-2", not stream))
        elif manner == "bad-framing":
            self.transport.write(raw + b"GET /status HTTP/1.1\r\nHost : x\r\n\r\n" + self.request(mark + "-never", False))
        elif manner == "bad-chunk-at-end":
            head = raw[:end].replace(b"Content-Length: %d" % (len(raw) - end), b"Transfer-Encoding: chunked")
            self.transport.write(head + app.chunk(raw[end:]) + b"-0\r\n\r\n" + self.request(mark + "-never", False))
        else:
            self.transport.write(raw)
        if manner == "slow-reader":
            await turns(20)
        return await self.judge(manner, mark, stream)

    async def judge(self, manner: str, mark: str, stream: bool) -> bool:
        """Check that each request that was sent whole gets one answer, its own; return whether the connection may go on."""
        expected = [] if manner == "bad-chunk-at-end" else [(mark, stream)]
        expected += [(mark + "-2", not stream)] if manner == "pipeline" else []
        count = len(expected) + manner.startswith("bad")
        await self.hear(lambda heard: len(split_answers(heard)[0]) >= count)
        answers, rest = split_answers(self.heard)
        for (status, _, body), (asked, streamed) in zip(answers, expected, strict=False):
            self.round.check_answer(status, body, asked, streamed)
        if len(answers) < len(expected):
            self.round.check_cut(rest, *expected[len(answers)])
            return False
        if manner.startswith("bad"):
            assert len(answers) == count and answers[-1][0] == 400, (manner, mark, answers)
            await self.hear(lambda _: False)
            assert split_answers(self.heard) == (answers, b"")
        self.heard = b""
        return not self.over and answers[-1][1].get("connection") != "close"

    async def leave(self, manner: str, raw: bytes, end: int) -> None:
        """Send a part, read a part, and leave with a FIN, a RST, or the FIN of one direction."""
        cuts = {"head": self.chooser.randrange(1, end), "body": self.chooser.randrange(end, len(raw) - 1)}
        self.transport.write(raw[: cuts.get(manner.rpartition("-")[2], len(raw))])
        if manner.endswith("answer"):
            await self.hear(lambda heard: len(heard) > self.chooser.choice((0, 20, 200, 400)))
        else:
            await turns(self.chooser.randrange(12))
        if manner.startswith("reset") and not self.transport.is_closing():
            self.client.reset()
        elif manner == "half-close" and not self.transport.is_closing():
            self.transport.write_eof()
            await self.hear(lambda _: False)  # the server takes it for a client that has left, and closes


class Round:
    """A server, its upstreams, and many sessions at once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.served: set[str] = set()  # marks that an upstream has answered well
        self.mixed_up: list[str] = []  # marks whose request came to an upstream with another body
        self.faults: Counter[str] = Counter()
        self.manners: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    async def answer(self, name: str, peer: Peer, message: Message) -> None:
        """Answer a request with its mark, or fail in the way that its mark decides."""
        mark, chat = message.headers["x-mark"], message.json()
        if chat["messages"][0]["content"] != mark:
            self.mixed_up.append(mark)
        fault = fault_of(self.seed, name, mark)
        self.faults[fault] += 1
        if fault.startswith("status-"):
            again = ["retry-after-ms: 40"] if fault in ("status-429", "status-503") else []
            await peer.send(error_reply(int(fault[-3:]), "chaos", mark, *again))
        elif fault == "error-in-200":
            await peer.send(error_reply(200, "chaos", mark))
        elif fault == "fin":
            peer.close()
        elif fault == "reset":
            peer.reset()
        elif fault == "hang" or fault in BROKEN:
            await peer.send(BROKEN.get(fault, b""))
            await peer.gone()
        else:
            await self.answer_well(fault, name, mark, peer, good_reply(fault, mark, chat["stream"]))

    async def answer_well(self, fault: str, name: str, mark: str, peer: Peer, data: bytes) -> None:
        """Send a good reply, or a part of it."""
        end = data.index(b"\r\n\r\n") + 4
        if fault == "cut-head":
            data = data[: end // 2]
        elif fault in ("cut-body", "reset-body", "hang-in-body"):
            data = data[: random.Random(mark + name).randrange(end, len(data) - 1)]
        else:
            self.served.add(mark)
        if fault == "trickle":
            await trickle(peer.writer.transport, cut_at(data, range(0, len(data), max(7, len(data) // 40))), lambda: False)
        else:
            await peer.send(data + (reply(200, b'{"id":"stray"}') if fault == "stray" else b""))
        if fault == "reset-body":
            await turns()
            peer.reset()
        elif fault == "hang-in-body":
            await peer.gone()
        elif fault in ("until-close", "cut-head", "cut-body", "closes-after"):
            peer.writer.write_eof()
            await peer.gone()

    def check_answer(self, status: int, body: bytes, mark: str, stream: bool) -> None:
        """Check that an answer is that of its request, and whole."""
        if status == 200:
            assert body == (b"".join(events_of(mark)) if stream else whole_of(mark)), (mark, stream, body[:300])
            self.outcomes["whole"] += 1
            return
        error = json.loads(body)["error"]
        assert status >= 400 and sorted(error) == ["code", "message", "param", "type"], (mark, status, body)
        assert mark in error["message"] or error["code"] != "chaos", (mark, error)
        assert mark not in self.served, (mark, status, "an upstream's good answer was lost")
        self.outcomes["error"] += 1

    def check_cut(self, rest: bytes, mark: str, stream: bool) -> None:
        """Check that a cut answer is a stream that ends with an error event."""
        head, end, body = rest.partition(b"\r\n\r\n")
        assert stream and end and head.startswith(b"HTTP/1.1 200 "), (mark, rest[:300])
        assert mark not in self.served, (mark, "an upstream's good answer was cut")
        decoded, _ = dechunk(body, strict=False) or (b"", b"")
        sent, marker, message = decoded.rpartition(b'data: {"error":{')
        assert marker and message.endswith(b"}}\n\n") and message.count(b"\n") == 2, (mark, decoded[-300:])
        assert b"".join(events_of(mark)).startswith(sent.rstrip(b"\n")), (mark, decoded)
        self.outcomes["cut"] += 1

    async def run(self) -> None:
        """Run all sessions; check that nothing is left and that everything has happened."""
        before = open_files()
        async with contextlib.AsyncExitStack() as stack:
            configured = []
            for name, limits in LIMITS.items():
                upstream = await stack.enter_async_context(Upstream(functools.partial(self.answer, name)))
                timeouts = {"connect": 5, "first_byte": 20, "idle": 30}
                configured.append(controller(name, upstream.url, timeouts=timeouts, limits=limits))
            server = await stack.enter_async_context(Running(*configured, pool={"max_wait": 5}))
            base, places = open_files(), asyncio.Semaphore(AT_ONCE)

            async def session(number: int) -> None:
                async with places:
                    with contextlib.closing(await server.open()) as client:
                        await Session(self, number, client).run()

            await asyncio.gather(*(session(number) for number in range(SESSIONS)))
            await self.settle(server, base)
        await turns(5)
        assert open_files() == before and not self.mixed_up
        assert self.outcomes["whole"] > SESSIONS / 3 and self.outcomes["error"] and self.outcomes["cut"], self.outcomes
        assert len(self.faults) > len({*SERVED, *FAULTS}) - 3 and set(self.manners) == set(MANNERS)

    async def settle(self, server: Running, base: int) -> None:
        """Wait until nothing is in flight and only idle connections have descriptors open, two each."""
        links, pool, busy, files = server.server.links, server.server.pool, 0, 0
        for _ in range(60):
            busy = sum(upstream.in_flight for upstream in pool.upstreams) + pool.waiting + len(server.server.connections)
            files = open_files() - base - 2 * links.idle_count
            if not (busy or files or links.active):
                return
            await pause(1.0)
        raise AssertionError(f"{links!r} busy={busy} files={files}")


def open_files() -> int:
    """Return how many descriptors this process has open, 0 where the system does not say."""
    return len(list(FDS.iterdir())) if FDS.exists() else 0


@pytest.mark.virtual_time
async def test_faults_on_both_sides_lose_nothing_and_leave_nothing() -> None:
    """Whatever clients and upstreams do, every answer belongs to its request, and at the end nothing is in flight."""
    await Round(2).run()


@pytest.mark.skipif(not FDS.exists(), reason="counts the descriptors in /proc")
async def test_a_client_that_leaves_during_the_connect_leaves_no_file_open() -> None:
    """A connection to the upstream is closed at once when its client leaves, at any step of the connect."""

    gc.disable()  # it would close the sockets that were forgotten
    try:
        async with Upstream(lambda peer, _: peer.gone()) as upstream, Running(controller("a", upstream.url)) as server:
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
