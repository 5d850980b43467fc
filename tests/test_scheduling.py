"""DESIGN's table row by row, then rounds, line, commit, rescue, exactness: real sockets, scripted upstreams, virtual clock."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    MESSAGES,
    SSE_HEAD,
    Client,
    Message,
    Peer,
    Running,
    Script,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    reply,
    request,
    sse_reply,
)

pytestmark = pytest.mark.virtual_time

GOOD = json_reply(200, ANSWER)
STREAM = sse_reply(event("fine"), b"data: [DONE]\n\n")
AZURE = b'data: {"id":"","model":"","choices":[],"prompt_filter_results":[]}\n\n'


def limited(after: str = "", message: str = "slow down", kind: str = "requests", code: str = "rate_limit_exceeded") -> bytes:
    """A 429."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return json_reply(429, body, *([f"Retry-After: {after}"] if after else []))


def now() -> float:
    """The loop's time."""
    return asyncio.get_running_loop().time()


async def pause(seconds: float) -> None:
    """Let the clock go on."""
    done = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(seconds, done.set_result, None)
    await done


async def until(true: Callable[[], Any]) -> None:
    """Let the loop turn until something is so, within a second of its clock."""
    give_up, turns = now() + 1, 0
    while not true():
        assert now() < give_up, "it never was"
        turns += 1
        await (asyncio.sleep(0) if turns % 8 else pause(0.005))


async def both(peer: Peer, message: Message) -> None:
    """A good answer, as a stream where one was asked for."""
    await peer.send(STREAM if message.json().get("stream") else GOOD)


async def hang(peer: Peer, _: Message) -> None:
    """No answer, until the other side goes."""
    await peer.gone()


def then(first: "list[bytes | Script]", last: Script = both) -> Script:
    """A script that does or sends each of these once, then the last one for ever."""
    left = list(first)

    async def script(peer: Peer, message: Message) -> None:
        if not left:
            await last(peer, message)
            return
        step = left.pop(0)
        if isinstance(step, bytes):
            await peer.send(step)
        else:
            await step(peer, message)

    return script


class Timed(Upstream):
    """An upstream that notes when each request came, and how many there were at once."""

    def __init__(self, script: Script) -> None:
        super().__init__(self._note)
        self.inner = script
        self.times: "list[float]" = []
        self.now_here = self.most_here = self.left = 0

    async def _note(self, peer: Peer, message: Message) -> None:
        self.times.append(now())
        self.now_here += 1
        self.most_here = max(self.most_here, self.now_here)
        try:
            await self.inner(peer, message)
        finally:
            self.now_here -= 1


class House:
    """A server with upstreams a, b, c ..."""

    def __init__(self, ups: "list[Timed]", server: Running) -> None:
        self.ups, self.server = ups, server
        self.pool = server.server.pool
        self.clients: "list[Client]" = []

    async def post(self, *headers: str, **more: Any) -> Message:
        """One chat request."""
        return await self.server.post(more.pop("model", "m"), *headers, **more)

    def later(self, *headers: str, **more: Any) -> "asyncio.Task[Message]":
        """One that is not waited for yet."""
        return asyncio.get_running_loop().create_task(self.post(*headers, **more))

    async def ask(self, *headers: str, **more: Any) -> Client:
        """One whose answer is not read yet."""
        client = await self.server.open()
        self.clients.append(client)
        await client.post(more.pop("model", "m"), *headers, **more)
        return client

    @property
    def calls(self) -> "list[int]":
        """Requests that each upstream got."""
        return [len(one.seen) for one in self.ups]

    def state(self, at: int = 0) -> "dict[str, Any]":
        """What /status would say of a controller."""
        return app.describe_upstream(self.pool.upstreams[at], now())

    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not (any(one.in_flight for one in self.pool.upstreams) or self.pool.waiting or self.pool.lines)


@contextlib.asynccontextmanager
async def house(*scripts: Script, each: "dict[str, Any] | list[dict[str, Any]] | None" = None, **more: Any) -> AsyncIterator[House]:
    """A server whose controllers a, b, c ... do what the scripts say; `each`: more configuration, for all or one by one."""
    async with contextlib.AsyncExitStack() as stack:
        ups = [await stack.enter_async_context(Timed(script)) for script in scripts]
        extra = each if isinstance(each, list) else [each or {}] * len(ups)
        made = [controller("abcdef"[at], one.url, **extra[at]) for at, one in enumerate(ups)]
        server = await stack.enter_async_context(Running(*made, **more))
        built = House(ups, server)
        try:
            yield built
        finally:
            for client in built.clients:
                if not client.writer.is_closing():
                    client.reset()


# -- the table, row by row


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (request(b"x" * 2000), 413),
        (request(b"{nope"), 400),
        (request(b"[]"), 400),
        (request(json.dumps({"messages": MESSAGES}).encode()), 400),
        (request(b'{"model":"m"}'), 400),
        (request(b'{"model":"m","messages":[]}'), 400),
        (request(json.dumps({"model": "m", "messages": MESSAGES}).encode(), "Content-Encoding: gzip"), 415),
    ],
)
async def test_row_a_request_that_is_none(raw: bytes, status: int) -> None:
    """Not HTTP, too big, not JSON, no model or messages, compressed: a 4xx with an error object, nothing sent upstream."""
    async with house(both, limits={"body_bytes": 1024}) as home:
        client = await home.server.open()
        await client.send(raw)
        found = await client.read()
        client.close()
        assert found.status == status and set(found.json()["error"]) == {"message", "type", "param", "code"}
        assert home.calls == [0] and home.pool.upstreams[0].failures == 0


async def test_row_no_controller_serves_the_model() -> None:
    """404 model_not_found that names the models that are served."""
    async with house(both, each={"models": ["gpt-4.1*"]}) as home:
        found = await home.post(model="nope")
        assert (found.status, found.json()["error"]["code"]) == (404, "model_not_found")
        assert "gpt-4.1*" in found.json()["error"]["message"] and home.calls == [0]


async def close_at_once(peer: Peer, _: Message) -> None:
    """Close before any byte."""
    peer.close()


async def reset_at_once(peer: Peer, _: Message) -> None:
    """Reset before any byte."""
    peer.reset()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [close_at_once, reset_at_once])
async def test_row_no_reply_byte_on_a_fresh_connection(script: Script, stream: bool) -> None:
    """Closed or reset before any byte: the next controller at once, and the breaker counts."""
    async with house(script, both) as home:
        found = await home.post(stream=stream)
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"
        assert home.calls == [1, 1] and home.pool.upstreams[0].failures == 1


async def test_row_connect_failure() -> None:
    """Nobody listens: the next controller at once; what was never sent is given back; five of them open the breaker."""
    async with house(both, both, each=[{"limits": {"rpm": 100}}, {}]) as home:
        home.ups[0].server.close()
        for _ in range(12):
            assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.state()["state"] == "breaker" and home.pool.upstreams[0].failures == 5
        assert home.state()["ledger"]["m"]["rpm"]["taken"] == 0


async def test_row_a_pooled_connection_that_died() -> None:
    """Once more on a fresh connection, at the same controller, which is not blamed."""
    async with house(then([GOOD, close_at_once]), both, each=[{}, {"models": ["n"]}]) as home:
        for _ in range(2):
            assert (await home.post()).headers["x-apiserver-controller"] == "a"
        assert home.calls == [3, 0] and home.ups[0].connections == 2 and home.pool.upstreams[0].failures == 0


async def test_row_no_byte_within_first_byte() -> None:
    """A stream goes to the next controller; a whole answer gets 504 and is not replayed; the breaker counts both."""
    async with house(hang, both, each={"timeouts": {"first_byte": 5}}, pool={"type": "priority"}) as home:
        started = now()
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"
        assert now() - started == pytest.approx(5, abs=0.1)
        found = await home.post()
        assert (found.status, found.json()["error"]["code"]) == (504, "upstream_timeout")
        assert home.calls == [2, 1] and home.pool.upstreams[0].failures == 2


async def test_row_429_rate_limit() -> None:
    """The next controller at once; closed for that model until the named time; none has room: waits in line."""
    async with house(then([limited("7")]), then([both, limited("5")]), pool={"type": "priority"}) as home:
        started = now()
        found = await home.post()
        assert found.headers["x-apiserver-controller"] == "b" and found.headers["x-apiserver-attempts"] == "2"
        assert now() - started < 0.1 and home.state()["ledger"]["m"]["closed_for_s"] == pytest.approx(7, abs=0.1)
        assert (await home.post(model="n")).headers["x-apiserver-controller"] == "a"
        found = await home.post()
        assert found.status == 200 and now() - started == pytest.approx(5, abs=0.1)
        assert int(found.headers["x-apiserver-wait-ms"]) == pytest.approx(5000, abs=100)
        assert home.pool.upstreams[0].failures == 0


TOO_LARGE = limited("", "Request too large for m on tokens per min (TPM): Limit 10000, Requested 12000.", "tokens")


@pytest.mark.parametrize("limits", [{}, {"rpm": 600, "burst_s": 40}])
async def test_row_429_a_burst_that_is_refused_is_one_refusal(limits: "dict[str, int]") -> None:
    """What was under way at the first 429 is refused with it: the time does not double, nor the burst halve, for each."""
    gate, count = asyncio.Event(), 8

    async def script(peer: Peer, _: Message) -> None:
        if len(home.ups[0].times) > count:
            await peer.send(GOOD)
            return
        if len(home.ups[0].times) == count:
            gate.set()
        await gate.wait()
        await peer.send(limited())

    async with house(script, each=[{"limits": limits}]) as home:
        started = now()
        found = await asyncio.gather(*(home.post() for _ in range(count)))
        assert {one.status for one in found} == {200} and now() - started < 3
        assert home.pool.upstreams[0].seat("m").ledger.burst_s == (20 if limits else 60)


async def test_row_429_request_too_large_with_a_larger_account() -> None:
    """Only controllers whose known limit is large enough are asked; the small one learns nothing."""
    small, large = {"limits": {"tpm": 11_000}}, {"limits": {"tpm": 50_000}}
    async with house(answers(TOO_LARGE), both, both, each=[{}, small, large], pool={"type": "priority"}) as home:
        found = await home.post()
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "c"
        assert home.calls == [1, 0, 1] and home.state()["state"] == "open"
        assert "closed_for_s" not in home.state()["ledger"] and home.state()["ledger"]["m"]["closed_for_s"] == 0


async def test_row_429_request_too_large_still_fails_over_among_the_large() -> None:
    """Those that are left are judged by their first event too."""
    large = {"limits": {"tpm": 50_000}}
    scripts = [answers(TOO_LARGE), answers(in_stream("server_error")), both]
    async with house(*scripts, each=[{}, large, large], pool={"type": "priority"}) as home:
        found = await home.post(stream=True)
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "c" and home.calls == [1, 1, 1]


async def test_row_429_request_too_large_for_all() -> None:
    """The answer as it is, and the SDKs are told not to come again."""
    async with house(answers(TOO_LARGE), both) as home:
        found = await home.post()
        assert (found.status, found.headers["x-should-retry"]) == (429, "false")
        assert "Limit 10000" in found.json()["error"]["message"] and home.calls == [1, 0]


async def test_row_429_insufficient_quota(caplog: pytest.LogCaptureFixture) -> None:
    """The next controller; parked with its whole quota group, logged once; a later real request probes, and frees it."""
    broke = limited("", "You exceeded your current quota", "insufficient_quota", "insufficient_quota")
    grouped = {"quota_group": "org"}
    async with house(then([broke]), both, both, each=[grouped, grouped, {}]) as home:
        with caplog.at_level(logging.WARNING, "chatgpt_apiserver"):
            for _ in range(4):
                assert (await home.post()).headers["x-apiserver-controller"] == "c"
        assert home.calls == [1, 0, 4]
        assert [home.state(at)["state"] for at in range(3)] == ["parked", "parked", "open"]
        assert len([one for one in caplog.records if "quota" in one.getMessage()]) == 1
        await pause(301)
        assert home.state()["state"] == "half-open"
        served = {(await home.post()).headers["x-apiserver-controller"] for _ in range(6)}
        assert served == {"a", "b", "c"} and home.state()["state"] == "open"


async def test_row_429_insufficient_quota_refuses() -> None:
    """Alone, it is not asked again before its time: 429 with the true Retry-After at once."""
    async with house(answers(limited("", "no money", "insufficient_quota", "insufficient_quota"))) as home:
        found = await home.post()
        assert found.status == 429 and found.json()["error"]["code"] == "insufficient_quota"
        found = await home.post()
        assert found.status == 429 and int(found.headers["retry-after"]) == pytest.approx(300, abs=1)
        assert home.calls == [1]


async def test_row_401() -> None:
    """The next controller; parked after two in a row."""
    async with house(answers(error_reply(401, "invalid_api_key")), both) as home:
        for _ in range(8):
            assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.calls == [2, 8] and home.state()["state"] == "parked"


@pytest.mark.parametrize("status", [403, 404])
async def test_row_the_account_lacks_the_model(status: int) -> None:
    """The next controller that may have it; remembered for that model only, and only for a while."""
    lacks = error_reply(status, "model_not_found", "The model `m` does not exist")

    async def script(peer: Peer, message: Message) -> None:
        await peer.send(lacks if message.json()["model"] == "m" else GOOD)

    async with house(script, both) as home:
        for _ in range(4):
            assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.calls == [1, 4] and home.state()["lacks"] == ["m"] and home.state()["state"] == "open"
        assert {(await home.post(model="n")).headers["x-apiserver-controller"] for _ in range(2)} == {"a", "b"}
        await pause(601)
        for _ in range(2):
            await home.post()
        assert home.calls[0] == 3


async def test_row_other_403() -> None:
    """The next controller; parked after three in a row without a success."""
    async with house(answers(error_reply(403, "unsupported_country")), both) as home:
        for _ in range(10):
            assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.calls == [3, 10] and home.state()["state"] == "parked"


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415, 422, 451])
async def test_row_other_4xx(status: int) -> None:
    """Returned as it is, never replayed; the controller learns nothing, however often."""
    async with house(answers(error_reply(status, "x")), both, pool={"type": "priority"}) as home:
        for _ in range(6):
            found = await home.post(stream=True)
            assert (found.status, found.headers["x-apiserver-attempts"]) == (status, "1")
            assert "x-should-retry" not in found.headers
        assert home.calls == [6, 0] and home.state()["state"] == "open" and home.state()["failures"] == 0


@pytest.mark.parametrize("status", [408, 409, 424, 500, 502, 503, 504, 520, 529])
async def test_row_408_409_5xx(status: int) -> None:
    """The next controller; the breaker counts."""
    async with house(answers(error_reply(status)), both, pool={"type": "priority"}) as home:
        for _ in range(6):
            assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.calls == [5, 6] and home.state()["state"] == "breaker"


@pytest.mark.parametrize("status", [503, 529])
async def test_row_503_with_retry_after_waits_in_line(status: int) -> None:
    """Alone and busy for less than max_wait: the request waits and is answered; others do not go there meanwhile."""
    async with house(then([error_reply(status, None, "busy", "Retry-After: 3")])) as home:
        started = now()
        first = home.later()
        await until(lambda: home.calls == [1])
        found = await home.post()
        assert found.status == (await first).status == 200 and home.calls == [3]
        assert home.ups[0].times[1] - started == pytest.approx(3, abs=0.05)


async def test_row_503_with_a_long_retry_after() -> None:
    """Busy for longer than a request may wait: its error is passed on at once."""
    async with house(answers(error_reply(503, None, "busy", "Retry-After: 100"))) as home:
        started = now()
        found = await home.post()
        assert found.status == 503 and now() - started < 0.1 and home.calls == [1]


async def test_row_3xx() -> None:
    """Never followed; the next controller, else 502 without the Location; the breaker counts."""
    moved = reply(307, b"", "Location: http://127.0.0.1:9/")
    async with house(answers(moved), both) as home:
        assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.pool.upstreams[0].failures == 1
    async with house(answers(moved)) as home:
        found = await home.post()
        assert found.status == 502 and "location" not in found.headers


def in_stream(code: str, kind: str = "") -> bytes:
    """A 200 whose first event is an error."""
    return sse_reply(AZURE, b"data: " + app.compact_json({"error": {"message": "x", "type": kind, "code": code}}) + b"\n\n")


@pytest.mark.parametrize(
    ("first", "state"),
    [
        (in_stream("server_error"), "open"),
        (in_stream("insufficient_quota", "insufficient_quota"), "parked"),
        (in_stream("billing_hard_limit_reached"), "parked"),
        (sse_reply(AZURE), "open"),
        (sse_reply(b": hello\n\n"), "open"),
        (sse_reply(), "open"),
        (reply(200, b'{"error":{"message":"x","type":"server_error","code":null}}'), "open"),
        (reply(200, b'{\n  "error": {\n    "message": "x", "code": 502}\n}'), "open"),
        (reply(200, b"\n" * 40 + b'{"error":{"message":"x","type":"insufficient_quota"}}'), "parked"),
        (reply(200, b"\n" * 40), "open"),
    ],
)
async def test_row_200_whose_first_event_is_an_error(first: bytes, state: str) -> None:
    """An error in the place of an answer, or an end before it: the next controller, and the lesson that the error is."""
    async with house(answers(first), both) as home:
        found = await home.post(stream=b"event-stream" in first)
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"
        assert home.state()["state"] == state


async def test_row_200_whose_first_event_is_a_429_or_a_lacking_model() -> None:
    """A rate limit in a stream closes the model; a lacking model is remembered; a client's mistake is not replayed."""
    for code, kind, calls in (("rate_limit_exceeded", "", 2), ("model_not_found", "", 2), ("too_long", "invalid_request_error", 1)):
        async with house(answers(in_stream(code, kind)), both) as home:
            found = await home.post(stream=True)
            assert (found.status, sum(home.calls)) == ((200, 2) if calls == 2 else (400, 1))
            assert bool(home.state()["lacks"]) is (code == "model_not_found")
            assert bool(home.state()["ledger"]["m"]["closed_for_s"]) is (code == "rate_limit_exceeded")
            assert home.state()["failures"] == 0


async def test_row_a_whole_answer_cut_in_the_middle() -> None:
    """Collected up to 1 MB, so the next controller answers; a larger one is aborted short of its length."""

    async def cut(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n", b" " * 800_000)
        peer.close()

    async def cut_late(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n", b" " * 2_000_000)
        peer.close()

    async with house(cut, both) as home:
        assert (await home.post()).headers["x-apiserver-controller"] == "b"
        assert home.pool.upstreams[0].failures == 1
    async with house(cut_late, both) as home:
        client = await home.ask()
        assert (await client.read(head_only=True)).status == 200
        assert len(await client.closed()) < 3_000_000
        assert home.calls == [1, 0] and home.pool.upstreams[0].failures == 1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_row_a_stream_cut_after_its_first_event(how: str) -> None:
    """An error event, flushed; no final chunk, no [DONE], no replay; the breaker counts."""

    async def cut(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("one"))
        await pause(0.01)
        getattr(peer, how)()

    async with house(cut, both) as home:
        client = await home.ask(stream=True)
        found = await client.closed()
        assert event("one") in found and b'data: {"error":{' in found and home.calls == [1, 0]
        assert b"[DONE]" not in found and b"finish_reason" not in found and not found.endswith(b"0\r\n\r\n")
        await until(home.idle)
        assert home.pool.upstreams[0].failures == 1 and "cut" in home.state()["last_error"]


@pytest.mark.parametrize(
    ("replies", "status", "name"),
    [
        ([error_reply(500), error_reply(404, "model_not_found"), error_reply(401)], 500, "a"),
        ([error_reply(401), error_reply(403, "model_not_found"), error_reply(403, "x")], 403, "b"),
        ([error_reply(503), limited("60", "busy"), error_reply(500)], 429, "b"),
        ([limited("60"), error_reply(502), error_reply(422)], 422, "c"),
    ],
)
async def test_row_every_controller_failed(replies: "list[bytes]", status: int, name: str) -> None:
    """The most useful answer, as it came: a client's 4xx, then 429, 5xx, 404, 401/403; and whose it was."""
    async with house(*(answers(one) for one in replies)) as home:
        found = await home.post()
        assert found.status == status and found.body in replies["abc".index(name)]
        assert (found.headers["x-apiserver-controller"], found.headers["x-apiserver-attempts"]) == (name, "3")


@pytest.mark.parametrize(("script", "status"), [(reset_at_once, 502), (hang, 504)])
async def test_row_every_controller_failed_without_an_answer(script: Script, status: int) -> None:
    """502 or 504 with an OpenAI-style error."""
    async with house(script, script, each={"timeouts": {"first_byte": 3}}) as home:
        found = await home.post(stream=True)
        assert found.status == status and found.json()["error"]["type"] == "server_error" and home.calls == [1, 1]


PHASES = ["in line", "connecting", "before the head", "held", "in the stream", "in a whole answer", "in a large answer"]


@pytest.mark.parametrize("how", ["reset", "fin"])
@pytest.mark.parametrize("phase", PHASES)
async def test_row_the_client_goes_away(phase: str, how: str) -> None:
    """The upstream connection is closed within 100 ms; before it was sent all is given back, then only the slot."""

    async def script(peer: Peer, _: Message) -> None:
        if phase in ("held", "in the stream"):
            await peer.send(SSE_HEAD)
            await peer.chunk(AZURE if phase == "held" else event("a"))
        elif phase == "in a whole answer":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b" " * 500)
        elif phase == "in a large answer":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n", b" " * 1_500_000)
        if phase in ("in the stream", "in a large answer") and how == "fin":  # the next writes tell
            while not peer.reader.at_eof() and not peer.writer.is_closing():
                await (peer.chunk(event("b")) if phase == "in the stream" else peer.send(b" " * 9))
                await pause(0.01)
        await peer.gone()

    tight = {"limits": {"concurrency": 1, "rpm": 5, "tpm": 100_000}}
    async with house(script, both, each=[tight, {"models": ["n"]} if phase != "held" else {}], pool={"type": "priority"}) as home:
        stream = phase in ("held", "in the stream", "before the head")
        if phase == "in line":
            await home.ask(stream=stream)
            await until(lambda: home.calls[0] == 1)
        elif phase == "connecting":
            home.server.server.links.dial = never_connects
        client = await home.ask(stream=stream)
        await until(lambda: home.pool.waiting if phase == "in line" else phase == "connecting" or home.calls[0])
        await pause(0.05)
        before = home.pool.upstreams[0].in_flight
        assert before == 1
        getattr(client, "reset" if how == "reset" else "close")() if how == "reset" else client.writer.close()
        left = now()
        if phase == "in line":
            await until(lambda: not home.pool.waiting)
        else:
            await until(lambda: home.idle() and not home.ups[0].open_connections)
        assert now() - left <= 0.1
        taken = home.state()["ledger"]["m"]["rpm"]["taken"]
        assert taken == (0 if phase == "connecting" else 1)
        assert home.state()["failures"] == 0 and home.calls[0] == (phase != "connecting")


async def never_connects(_: app.Origin) -> app.Link:
    """A dial that takes for ever."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def test_row_sigterm_lets_answers_finish() -> None:
    """While it drains, the status says so, new connections are refused, the running answer ends."""
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await step.wait()
        await peer.send(GOOD)

    async with house(script) as home:
        client = await home.ask()
        await until(lambda: home.calls == [1])
        stopping = asyncio.get_running_loop().create_task(home.server.server.stop())
        await pause(0.1)
        assert home.server.server.draining
        with pytest.raises(OSError):
            await home.server.open()
        step.set()
        assert (await client.read()).status == 200
        await stopping


async def test_row_sighup_keeps_state_and_waiters() -> None:
    """What is unchanged keeps its ledger; who waits goes on waiting, for whoever is there now."""
    async with house(then([limited("20")]), both, each=[{}, {"models": ["other"]}]) as home:
        waiter = home.later()
        await until(lambda: home.pool.waiting)
        data = {"port": 0, "controllers": [controller("a", home.ups[0].url), controller("b", home.ups[1].url)]}
        home.server.server.reconfigure(app.parse_config(data, "test", {}))
        found = await waiter
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"
        assert home.state()["ledger"]["m"]["closed_for_s"] > 15


async def test_row_sighup_while_a_request_is_under_way() -> None:
    """When its attempt fails only those are asked who are configured now, as they are now: with a new key, too."""
    go = asyncio.Event()

    async def denies(peer: Peer, _: Message) -> None:
        await go.wait()
        await peer.send(error_reply(401))

    async with house(then([denies]), both, pool={"type": "priority"}) as home:
        task = home.later()
        await until(lambda: home.calls == [1, 0])
        renewed = controller("a", home.ups[0].url, account={"api_key": "sk-secret-renewed"})
        home.server.server.reconfigure(app.parse_config({"port": 0, "controllers": [renewed]}, "test", {}))
        go.set()
        assert (await task).status == 200 and home.calls == [2, 0]
        assert home.ups[0].seen[1].headers["authorization"] == "Bearer sk-secret-renewed"


async def test_row_sighup_removes_one_that_is_silent() -> None:
    """What is stuck in a controller is rescued also when that was removed because of it."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 3}) as home:
        started, task = now(), home.later(stream=True)
        await until(lambda: home.calls == [1, 0])
        data = {"port": 0, "controllers": [controller("b", home.ups[1].url)], "pool": {"rescue_after": 3}}
        for _ in range(2):
            home.server.server.reconfigure(app.parse_config(data, "test", {}))
        assert (await task).headers["x-apiserver-controller"] == "b" and now() - started < 4
        home.server.server.reconfigure(home.server.config)
        await until(lambda: home.idle() and not home.pool.leaving)


async def test_row_sighup_removes_a_rescuer() -> None:
    """Nor is one that is not configured any more asked for a second answer."""
    async with house(hang, both, both, pool={"type": "priority", "rescue_after": 2}) as home:
        task = home.later(stream=True)
        await pause(1)
        data = {"port": 0, "controllers": [controller(name, home.ups[at].url) for name, at in (("a", 0), ("c", 2))]}
        home.server.server.reconfigure(app.parse_config({**data, "pool": {"rescue_after": 2}}, "test", {}))
        assert (await task).headers["x-apiserver-controller"] == "c" and home.calls == [1, 0, 1]


async def test_row_sighup_ends_the_waiting_for_a_model_that_is_gone() -> None:
    """Who waits for what no controller serves any more is told so at once."""
    async with house(then([limited("20")])) as home:
        waiter = home.later()
        await until(lambda: home.pool.waiting)
        data = {"port": 0, "controllers": [controller("a", home.ups[0].url, models=["n"])]}
        home.server.server.reconfigure(app.parse_config(data, "test", {}))
        assert (await waiter).status == 404
        await until(home.idle)


async def test_row_sighup_leaves_a_conversation_with_the_account_that_has_it() -> None:
    """Who waits for the account that made its last response goes on waiting for that one, not for whoever has room."""
    made = json_reply(200, {"id": "resp_1", "object": "response"})
    async with house(answers(made, limited("5"), made), answers(made), pool={"type": "priority"}) as home:

        async def ask(**more: str) -> Message:
            client = await home.server.open()
            body = json.dumps({"model": "m", "input": "hi", **more}).encode()
            await client.send(request(body, target="/v1/responses"))
            found = await client.read()
            client.close()
            return found

        await ask()
        waiter = asyncio.get_running_loop().create_task(ask(previous_response_id="resp_1"))
        await until(lambda: home.pool.waiting)
        home.server.server.reconfigure(home.server.config)
        assert (await waiter).headers["x-apiserver-controller"] == "a" and home.calls == [3, 0]


# -- rounds and the last resort


async def test_who_was_full_is_asked_again_when_another_has_failed_slowly() -> None:
    """The first one's time is over by then: its 429 would be told while it has room."""

    async def fails(peer: Peer, _: Message) -> None:
        await pause(3)
        await peer.send(error_reply(500))

    async with house(then([limited("1")]), fails, pool={"type": "priority"}) as home:
        found = await home.post()
        assert (found.status, found.headers["x-apiserver-attempts"]) == (200, "3") and home.calls == [2, 1]


@pytest.mark.parametrize(("then_it", "status"), [(answers(error_reply(500)), 500), (close_at_once, 502)])
async def test_a_429_that_was_waited_out_is_not_the_answer(then_it: Script, status: int) -> None:
    """What the controller did when it had room again is told, and not to come again when it has."""
    async with house(then([limited("1")], then_it), each={"limits": {"rpm": 100}}) as home:
        found = await home.post()
        assert found.status == status and found.headers["x-apiserver-attempts"] == "2"
        assert "retry-after" not in found.headers


async def test_once_per_round_and_a_new_round_only_by_waiting() -> None:
    """Each is asked once; a new round begins when waiting reopened one, and then all may be asked again."""
    async with house(answers(error_reply(500)), then([limited("2"), limited("2")]), pool={"type": "priority"}) as home:
        found = await home.post()
        assert found.status == 200 and home.calls == [2, 3]
        assert [round(at - home.ups[1].times[0]) for at in home.ups[1].times] == [0, 2, 4]


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [(500, "boom", "breaker"), (401, "bad_key", "parked"), (403, "region", "parked"), (404, "model_not_found", "open")],
)
async def test_a_sole_controller_passes_its_errors_on(status: int, code: str, state: str) -> None:
    """Neither breaker nor parked key nor a model that it lacks refuses a request to the only one."""
    async with house(answers(error_reply(status, code))) as home:
        for count in range(1, 8):
            found = await home.post()
            assert found.status == status and found.json()["error"]["code"] == code and home.calls == [count]
        assert home.state()["state"] == state


async def test_the_last_resort_is_who_is_due_back_first() -> None:
    """All out by health: the one due back first is tried anyway, the others only after it."""
    async with house(both, both, both) as home:
        for at, seconds in enumerate((50.0, 10.0, 30.0)):
            home.pool.upstreams[at].take_out("breaker", now() + seconds)
        assert (await home.post()).headers["x-apiserver-controller"] == "b"


async def test_the_last_resort_never_passes_a_limit() -> None:
    """A 429's time and a configured limit refuse, whatever else is out."""
    async with house(answers(limited("100")), both, both, each=[{}, {"limits": {"rpm": 1}}, {"models": ["n"]}]) as home:
        assert (await home.post()).headers["x-apiserver-controller"] == "b"
        found = await home.post()
        assert found.status == 429 and found.headers["retry-after"] == "61" and home.calls == [1, 1, 0]


async def test_nobody_asks_a_dead_one_while_a_full_one_works() -> None:
    """With one out and the other at its concurrency, requests wait for the one that works."""
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await step.wait()
        await peer.send(GOOD)

    async with house(both, script, each=[{}, {"limits": {"concurrency": 1}}]) as home:
        home.pool.upstreams[0].take_out("parked", now() + 300)
        first, second = home.later(), home.later()
        await until(lambda: home.pool.waiting == 1)
        step.set()
        assert [(await one).headers["x-apiserver-controller"] for one in (first, second)] == ["b", "b"]
        assert home.calls == [0, 2]


# -- the line


async def test_woken_within_20_ms_of_the_known_reopening() -> None:
    """The waiter's request arrives when the named time has passed, and hardly later."""
    async with house(then([limited("", "Please try again in 1.234s.")])) as home:
        await home.post()
        assert 1.234 <= home.ups[0].times[1] - home.ups[0].times[0] <= 1.234 + 0.02


async def test_woken_while_the_one_before_is_still_silent() -> None:
    """A burst limit's reopening is known from the moment of sending, not from an answer."""

    async def slow(peer: Peer, message: Message) -> None:
        await pause(20)
        await both(peer, message)

    async with house(slow, each={"limits": {"rpm": 60, "burst_s": 1}}) as home:
        tasks = [home.later() for _ in range(3)]
        for task in tasks:
            assert (await task).status == 200
        gaps = [round(at - home.ups[0].times[0], 2) for at in home.ups[0].times]
        assert gaps == pytest.approx([0, 1.0, 2.0], abs=0.05)


async def test_a_short_burst_spreads_the_limit_evenly() -> None:
    """A hundred a minute in bursts of a second: one each 0.6 s, a hundred in the first minute, and not one more."""
    async with house(both, each={"limits": {"rpm": 100, "burst_s": 1}}, pool={"max_wait": 90}) as home:
        tasks = [home.later() for _ in range(130)]
        for task in tasks:
            assert (await task).status == 200
        times = home.ups[0].times
        assert worst(times, 59.9) == 100 and worst(times, 0.59) == 1
        assert times[99] - times[0] == pytest.approx(59.4, abs=0.5)


async def test_first_come_first_served_and_one_waiter_per_place() -> None:
    """With one place, requests go upstream in the order in which they came, one at a time, each once."""

    async def script(peer: Peer, message: Message) -> None:
        await pause(0.2)
        await both(peer, message)

    async with house(script, each={"limits": {"concurrency": 1}}) as home:
        tasks = []
        for number in range(10):
            tasks.append(home.later(user=str(number)))
            await pause(0.01)
        for task in tasks:
            assert (await task).status == 200
        assert [one.json()["user"] for one in home.ups[0].seen] == [str(number) for number in range(10)]
        assert home.ups[0].most_here == 1 and home.idle()


async def test_nobody_waits_behind_another_model() -> None:
    """A line for one model does not hold up the other."""
    async with house(then([limited("20")])) as home:
        waiters = [home.later()]
        await until(lambda: home.pool.waiting)
        waiters += [home.later() for _ in range(2)]
        await until(lambda: home.pool.waiting == 3)
        started = now()
        assert (await home.post(model="n")).status == 200 and now() - started < 0.1
        for waiter in waiters:
            assert (await waiter).status == 200


async def test_nobody_waits_behind_one_that_waits_for_somebody_else() -> None:
    """One that has tried a healthy controller in vain waits for the other; the next request has that controller's room."""
    async with house(then([error_reply(500)]), then([limited("20")]), pool={"type": "priority"}) as home:
        waiter = home.later()
        await until(lambda: home.pool.waiting == 1)
        started = now()
        for _ in range(3):
            found = await home.post()
            assert found.status == 200 and found.headers["x-apiserver-controller"] == "a"
        assert now() - started < 0.5
        assert (await waiter).headers["x-apiserver-controller"] == "b"


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_waiters_that_leave_cost_nothing(how: str) -> None:
    """Of five waiters the first, the middle and the last leave; the others are served, nobody else is asked for."""

    async def script(peer: Peer, message: Message) -> None:
        await pause(1)
        await both(peer, message)

    async with house(script, each={"limits": {"concurrency": 1}}) as home:
        clients = []
        for number in range(6):
            clients.append(await home.ask(user=str(number)))
            await pause(0.01)
        assert home.pool.waiting == 5
        for number in (1, 3, 5):
            clients[number].reset() if how == "reset" else clients[number].writer.close()
        await until(lambda: home.pool.waiting == 2)
        for number in (0, 2, 4):
            assert (await clients[number].read()).status == 200
        assert [one.json()["user"] for one in home.ups[0].seen] == ["0", "2", "4"] and home.idle()


def pool_here(*ups: app.Upstream, **config: Any) -> app.UpstreamPool:
    """A pool on the running loop."""
    return app.UpstreamPool(list(ups), app.PoolConfig(**config), asyncio.get_running_loop())


def echo(name: str, **limits: Any) -> app.Upstream:
    """An echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), limits=app.QuotaLimits(**limits))
    return app.Upstream(config, app.EchoController(config), app.Quota(name, config.limits))


def asking(model: str = "m", wait_s: float = 30.0, key: str = "") -> app.ApiRequest:
    """A request as the pool sees it."""
    made = app.ApiRequest("POST", "/chat/completions", "", b"", b"")
    made.model, made.wait_s, made.key = model, wait_s, key
    return made


async def test_leaving_in_the_turn_of_a_grant() -> None:
    """A waiter that is cancelled in the very turn in which a place comes free neither keeps it nor breaks the line."""
    for pumped_first in (True, False):
        one = echo("a", concurrency=1)
        pool = pool_here(one)
        loop = asyncio.get_running_loop()
        held = pool.lease(asking(), pool.seats("m"), set(), now())
        assert held is not None
        waiters = [loop.create_task(pool.wait(asking(), pool.seats("m"), set())) for _ in range(3)]
        await pause(0.01)
        if pumped_first:
            pool.settle(held, app.GOOD)
            waiters[0].cancel()
        else:
            waiters[0].cancel()
            pool.settle(held, app.GOOD)
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]
        second = await waiters[1]
        assert second is not None and one.in_flight == 1 and pool.waiting == 1
        pool.settle(second, app.GOOD)
        third = await waiters[2]
        assert third is not None
        pool.settle(third, app.GOOD)
        assert (one.in_flight, pool.waiting, pool.lines) == (0, 0, {})
        pool.close()


async def test_giving_up_in_the_turn_of_a_reopening() -> None:
    """Patience that ends at the very moment at which a place comes free is no internal error."""
    one = echo("a")
    pool = pool_here(one)
    one.seat("m").ledger.close(app.judge_reply(429, {b"retry-after": b"5"}, b"", 0.0), 1, now())
    one.seat("m").ledger.limited = True
    tasks = [asyncio.get_running_loop().create_task(pool.wait(asking(wait_s=5.0), pool.seats("m"), set())) for _ in range(2)]
    for found in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(found, app.NoRoom | app.Lease)
        if isinstance(found, app.Lease):
            pool.settle(found, app.GOOD)
    assert (one.in_flight, pool.waiting, pool.lines) == (0, 0, {})
    pool.close()


@pytest.mark.parametrize("left_first", [True, False])
async def test_a_client_that_leaves_in_the_turn_of_its_grant_is_not_sent(left_first: bool) -> None:
    """The connection's fiber hears of it although what it waited for is there: nothing goes upstream for nobody."""
    async with house(then([hang]), each={"limits": {"concurrency": 1}}) as home:
        first = await home.ask()
        await until(lambda: home.calls == [1])
        await home.ask(user="gone")
        await until(lambda: home.pool.waiting == 1)
        waiter = home.pool.lines["m"][0]
        second = next(one for one in home.server.server.connections if one.task.waits_for is waiter.future)
        lease = next(iter(home.pool.upstreams[0].unanswered))
        if left_first:
            second.task.cancel()
        home.pool.settle(lease, app.Verdict(app.Outcome.GONE))
        if not left_first:
            second.task.cancel()
        await until(lambda: home.pool.upstreams[0].in_flight == 0)
        assert home.calls == [1] and home.idle()
        first.close()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((), 5.0),
        (("X-Apiserver-Max-Wait: 1",), 1.0),
        (("X-Apiserver-Max-Wait: 500ms",), 0.5),
        (("X-Apiserver-Max-Wait: 60",), 5.0),
        (("X-Apiserver-Max-Wait: 0",), 0.0),
        (("X-Apiserver-Max-Wait: -3",), 5.0),
        (("X-Stainless-Read-Timeout: 4",), 2.0),
        (("X-Stainless-Read-Timeout: 600.0",), 5.0),
        (("X-Stainless-Read-Timeout: 1",), 0.0),
        (("X-Stainless-Read-Timeout: 6", "X-Apiserver-Max-Wait: 3"), 3.0),
    ],
)
async def test_how_long_a_request_waits(headers: "tuple[str, ...]", seconds: float) -> None:
    """max_wait, lowered by the client's wish, and two seconds less than its patience."""
    async with house(hang, each={"limits": {"concurrency": 1}}, pool={"max_wait": 5}) as home:
        await home.ask()
        await until(lambda: home.calls == [1])
        started = now()
        found = await home.post(*headers)
        assert found.status == 429 and now() - started == pytest.approx(seconds, abs=0.05)
        assert home.calls == [1] and not home.pool.waiting


async def test_max_wait_bounds_all_rounds_together() -> None:
    """Three seconds each: with seven in all the third 429 is the last."""
    async with house(answers(limited("3", "third"))) as home:
        found = await home.post("X-Apiserver-Max-Wait: 7")
        assert found.status == 429 and home.calls == [3] and found.json()["error"]["message"] == "third"
        assert found.headers["x-apiserver-attempts"] == "3"
        assert int(found.headers["x-apiserver-wait-ms"]) == pytest.approx(6000, abs=100)


async def test_refused_at_once_by_the_estimate() -> None:
    """What reopens too late is not waited for: 429 with when it will be, and the upstream's own body."""
    async with house(answers(limited("100", "come back later"))) as home:
        started = now()
        found = await home.post()
        assert found.status == 429 and found.json()["error"]["message"] == "come back later"
        assert found.headers["retry-after"] == "100"
        assert int(found.headers["retry-after-ms"]) == pytest.approx(100_000, abs=50)
        found = await home.post()
        assert found.status == 429 and found.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(found.headers["retry-after-ms"]) == pytest.approx(100_000, abs=100)
        assert now() - started < 0.2 and home.calls == [1]


async def test_who_answered_is_told_only_where_somebody_did() -> None:
    """The one asked last is named; where nobody was, as the line gave up, there is no such line: not an empty one."""
    async with house(hang, each={"limits": {"concurrency": 1}}, pool={"max_wait": 1}) as home:
        await home.ask()
        await until(lambda: home.calls == [1])
        found = await home.post()
        assert found.status == 429 and "x-apiserver-controller" not in found.headers
        assert (found.headers["x-apiserver-attempts"], found.headers["x-apiserver-wait-ms"]) == ("0", "1000")


async def test_refused_at_once_by_the_position() -> None:
    """A limit of one a second and forty in line: the forty-first of thirty seconds' patience is told when to come."""
    pool = pool_here(echo("a", rpm=60))
    loop = asyncio.get_running_loop()
    for _ in range(60):
        made = pool.lease(asking(), pool.seats("m"), set(), now())
        assert made is not None
        made.sent(now())
        pool.settle(made, app.GOOD)
        await pause(0.99)
    waiters, refused = [], []
    for _ in range(60):
        task = loop.create_task(pool.wait(asking(), pool.seats("m"), set()))
        await pause(0)
        (refused if task.done() else waiters).append(task)
    assert len(waiters) == pytest.approx(30, abs=2)
    problem = refused[0].exception()
    assert isinstance(problem, app.NoRoom) and problem.after_s == pytest.approx(31, abs=1.5)
    for task in refused:
        assert isinstance(task.exception(), app.NoRoom)
    for task in waiters:
        task.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert pool.waiting == 0 and not pool.lines
    pool.close()


async def test_refused_at_once_when_the_line_is_full() -> None:
    """max_queue waiters and not one more; when one is served there is a place again."""
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await step.wait()
        await peer.send(GOOD)

    async with house(script, each={"limits": {"concurrency": 1}}, pool={"max_queue": 2}) as home:
        tasks = [home.later() for _ in range(3)]
        await until(lambda: home.pool.waiting == 2)
        started = now()
        found = await home.post()
        assert found.status == 429 and now() - started < 0.1
        assert "retry-after-ms" not in found.headers and found.headers["x-should-retry"] == "true"  # nobody knows when
        step.set()
        for task in tasks:
            assert (await task).status == 200
        assert (await home.post()).status == 200


async def test_refused_at_once_when_one_key_holds_half() -> None:
    """A key whose requests are half of the line gets no more of it; another key does."""
    keys = [{"name": name, "key": f"key-of-{name}"} for name in ("alice", "bob")]
    alice, bob = "Authorization: Bearer key-of-alice", "Authorization: Bearer key-of-bob"
    async with house(hang, each={"limits": {"concurrency": 1}}, pool={"max_queue": 4}, client_keys=keys) as home:
        for count in range(3):
            await home.ask(alice)
            await until(lambda count=count: home.pool.waiting == count)
        assert (await home.post(alice)).status == 429
        client = await home.ask(bob)
        await until(lambda: home.pool.waiting == 3)
        client.close()
        await until(lambda: home.pool.waiting == 2)


async def test_quota_groups_count_as_one() -> None:
    """Two keys of one organisation: the limit is shared, and a 429 of one closes both."""
    grouped = {"quota_group": "org", "limits": {"rpm": 3}}
    async with house(both, both, each=grouped) as home:
        for _ in range(3):
            await home.post()
        found = await home.post()
        assert found.status == 429 and sum(home.calls) == 3
        assert float(found.headers["retry-after-ms"]) == pytest.approx(60_250, abs=100)
    async with house(answers(limited("100")), both, both, each=[{"quota_group": "org"}] * 2 + [{}]) as home:
        for _ in range(4):
            assert (await home.post()).headers["x-apiserver-controller"] == "c"
        assert home.calls == [1, 0, 4]


async def test_a_quota_group_may_be_called_as_a_controller_outside_it() -> None:
    """That one has a quota of its own, with other limits, and the group's is still one, also after a reload."""
    group = {"quota_group": "a", "limits": {"rpm": 2}}
    async with house(both, both, both, each=[{"limits": {"rpm": 1}}, group, group]) as home:
        for _ in range(2):
            own, one, other = (upstream.quota for upstream in home.pool.upstreams)
            assert one is other and one is not own and (own.limits.rpm, one.limits.rpm) == (1, 2)
            changed = [controller("abc"[at], home.ups[at].url, weight=2, **more) for at, more in enumerate([{"limits": {"rpm": 1}}, group, group])]
            home.server.server.reconfigure(app.parse_config({"port": 0, "controllers": changed}, "test", {}))
            assert [upstream.quota for upstream in home.pool.upstreams] == [own, one, other]


async def test_what_replies_tell_is_kept_to() -> None:
    """Nothing configured: after the first reply the server knows what is left and never earns a 429."""
    level, at = 10.0, 0.0

    async def script(peer: Peer, _: Message) -> None:
        nonlocal level, at
        level, at = min(10.0, level + (now() - at) * 10 / 60), now()
        if level < 0.999:  # resets have milliseconds
            await peer.send(limited("1"))
            return
        level -= 1
        told = ("x-ratelimit-limit-requests: 10", f"x-ratelimit-remaining-requests: {int(level)}", f"x-ratelimit-reset-requests: {(10 - level) * 6:.3f}s")
        await peer.send(json_reply(200, ANSWER, *told))

    async with house(script) as home:
        assert (await home.post()).status == 200
        tasks = [home.later() for _ in range(13)]
        assert [(await task).status for task in tasks] == [200] * 13
        assert home.calls == [14]


# -- stateful requests


@pytest.mark.parametrize("status", [401, 429, 503])
async def test_stateful_requests_move_on_when_they_did_not_run(status: int) -> None:
    """After a 401, 429 or 503 another controller may have it."""
    async with house(answers(error_reply(status)), both) as home:
        assert (await home.post(store=True)).headers["x-apiserver-controller"] == "b"


@pytest.mark.parametrize("status", [400, 403, 404, 408, 409, 500, 502, 504])
async def test_stateful_requests_stay_where_they_may_have_run(status: int) -> None:
    """Anything else is returned; a 404 about one of them teaches nothing of the model."""
    async with house(answers(error_reply(status, "model_not_found" if status == 404 else "x")), both) as home:
        found = await home.post(store=True)
        assert (found.status, home.calls) == (status, [1, 0])
        assert not home.state()["lacks"]


async def test_a_conflict_over_an_object_is_not_the_controllers_fault() -> None:
    """Any number of 409 to stateful requests: each is returned, none counts for the breaker or as an error."""
    async with house(answers(error_reply(409)), both, pool={"type": "priority"}) as home:
        for _ in range(8):
            assert (await home.post(store=True)).status == 409
        assert home.calls == [8, 0] and (home.state()["state"], home.state()["failures"]) == ("open", 0)


@pytest.mark.parametrize("script", [close_at_once, hang])
async def test_stateful_requests_are_not_replayed_after_sending(script: Script) -> None:
    """A reset or a silence after the write may hide a request that ran."""
    async with house(script, both, each={"timeouts": {"first_byte": 2}}) as home:
        found = await home.post(store=True, stream=True)
        assert found.status in (502, 504) and home.calls == [1, 0]


async def test_stateful_requests_move_on_when_nothing_was_sent() -> None:
    """A connection that could not be made is no trace."""
    async with house(both, both) as home:
        home.ups[0].server.close()
        assert (await home.post(store=True)).headers["x-apiserver-controller"] == "b"


# -- commit


async def test_what_comes_before_the_first_event_is_kept_and_sent_with_it() -> None:
    """Comments and Azure's empty choices are held back, then go out in front, unchanged."""
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(b": hello\n\n")
        await peer.chunk(AZURE)
        await step.wait()
        await peer.chunk(event("real"))
        await peer.send(b"0\r\n\r\n")

    async with house(script, both) as home:
        client = await home.ask(stream=True)
        await pause(1)
        assert not client.reader._buffer  # type: ignore[attr-defined]
        step.set()
        assert (await client.read()).body == b": hello\n\n" + AZURE + event("real")


@pytest.mark.parametrize(("preface", "seconds"), [(b": short\n\n", 15.0), (b": " + b"x" * 65536 + b"\n\n", 0.0)])
async def test_held_for_at_most_64_kb_or_15_s(preface: bytes, seconds: float) -> None:
    """Then what there is goes out, and the stream goes on."""
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(preface)
        await step.wait()
        await peer.chunk(event("real"))
        await peer.send(b"0\r\n\r\n")

    async with house(script, both) as home:
        started = now()
        client = await home.ask(stream=True)
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert now() - started == pytest.approx(seconds, abs=0.1)
        step.set()
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += await client.reader.read(65536)
        assert preface in rest and event("real") in rest and home.calls == [1, 0]


@pytest.mark.parametrize(("count", "more"), [(1, {}), (2, {"store": True})])
async def test_nothing_is_held_back_when_there_is_nothing_to_fail_over_to(count: int, more: "dict[str, Any]") -> None:
    """A sole controller's first bytes, or a stateful request's, go out as they come."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(b": hello\n\n")
        await peer.gone()

    async with house(*[script] * count) as home:
        started = now()
        client = await home.ask(stream=True, **more)
        assert b": hello" in await client.reader.readuntil(b": hello\n\n")
        assert now() - started < 0.1


async def test_a_responses_stream_commits_after_its_preface() -> None:
    """created, queued and in_progress are no answer; a failure after them still moves on."""
    preface = b"".join(
        b'event: response.%b\ndata: {"type":"response.%b"}\n\n' % (one, one) for one in (b"created", b"queued", b"in_progress")
    )
    failed = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n'
    async with house(answers(sse_reply(preface, failed)), both) as home:
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"


@pytest.mark.parametrize(
    ("last", "calls", "state"),
    [(event("a")[:-2], [1, 0], "open"), (b'data: {"error":{"message":"no","code":"insufficient_quota"}}', [1, 1], "parked")],
)
async def test_a_first_event_may_end_with_its_stream(last: bytes, calls: "list[int]", state: str) -> None:
    """Without its blank line it still is an answer, which is not thrown away, or an error, which is judged."""
    async with house(answers(sse_reply(last)), both, pool={"type": "priority"}) as home:
        found = await home.post(stream=True)
        assert found.status == 200 and home.calls == calls and home.state()["state"] == state
        assert (last in found.body) is (calls == [1, 0])


# -- suspicion and rescue


def usual(home: House, at: int = 0, stream: bool = True, seconds: float = 0.1, count: int = 30) -> None:
    """Gives a controller a history of answers that took so long."""
    home.pool.upstreams[at].seat("m").times[stream].extend([seconds] * count)


async def test_a_silent_controller_gets_no_new_requests() -> None:
    """Three unanswered and a second of silence: suspect; the next go elsewhere, until a probe of its is answered."""
    async with house(then([hang] * 3), both, pool={"type": "priority", "rescue_after": 5}) as home:
        usual(home)
        tasks = [home.later(stream=True) for _ in range(3)]
        await pause(0.9)
        assert home.state()["state"] == "open"
        await pause(0.5)
        assert home.state()["state"] == "suspect" and home.state()["for_s"] is None
        assert (await home.post()).headers["x-apiserver-controller"] == "b"
        for task in tasks:
            assert (await task).headers["x-apiserver-controller"] == "b"
        await pause(1.1)
        assert home.state()["state"] == "half-open" and home.calls[0] == 3
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "a"
        assert home.state()["state"] == "open"


async def test_a_hang_behind_a_slow_request_is_seen() -> None:
    """A whole answer that takes its time does not hide that every stream since the last answer is stuck."""
    scripts = then([hang, both, hang, hang, hang])
    async with house(scripts, both, pool={"type": "priority", "rescue_after": 2}) as home:
        usual(home)
        slow = await home.ask()
        await until(lambda: home.calls[0] == 1)
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "a"
        await pause(0.1)
        tasks = [home.later(stream=True) for _ in range(3)]
        await pause(1.5)
        assert home.state()["state"] == "suspect"
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"
        for task in tasks:
            assert (await task).headers["x-apiserver-controller"] == "b"
        slow.close()


async def test_whole_answers_that_are_arriving_are_not_silent() -> None:
    """A head has come and the body trickles: slow, but no suspect."""

    async def trickle(peer: Peer, _: Message) -> None:
        await peer.send(GOOD[:-20])
        await pause(3)
        await peer.send(GOOD[-20:])

    async with house(trickle, both, pool={"type": "priority", "rescue_after": 2}) as home:
        usual(home, stream=False)
        tasks = [home.later() for _ in range(3)]
        await pause(2)
        assert home.state()["state"] == "open"
        for task in tasks:
            assert (await task).headers["x-apiserver-controller"] == "a"


async def test_a_probe_of_a_suspect_is_itself_rescued() -> None:
    """The one real request that finds out is answered by another after the suspicious silence, not after ten seconds."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 100}) as home:
        usual(home)
        home.pool.upstreams[0].suspect()
        home.pool.upstreams[0].unstick(now())
        await pause(1.1)
        started = now()
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "b" and now() - started == pytest.approx(1.25, abs=0.3)
        assert home.state()["state"] == "suspect" and home.calls == [1, 1]


async def test_rescue_of_a_stream() -> None:
    """A stream that is silent past rescue_after is asked of another too; its answer wins, the loser is cancelled."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 2}) as home:
        started = now()
        found = await home.post(stream=True)
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"
        assert now() - started == pytest.approx(2.15, abs=0.2)
        await until(lambda: home.idle() and not home.ups[0].open_connections)
        assert home.state()["failures"] == 0 and home.state()["state"] == "open"


async def test_rescue_when_connecting_took_long() -> None:
    """The silent are looked at also when the request was written long after it was granted."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 2}) as home:
        real = home.server.server.links.dial

        async def slow(origin: app.Origin) -> app.Link:
            await pause(1)
            return await real(origin)

        home.server.server.links.dial = slow
        started = now()
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"
        assert now() - started < 5


@pytest.mark.parametrize("after", [0.5, 3])
async def test_rescue_after_is_a_number_of_seconds(after: float) -> None:
    """The configured time is kept to, below a second too."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": after}) as home:
        started = now()
        await home.post(stream=True)
        assert after <= now() - started <= after + 0.3


async def test_rescue_auto_needs_samples() -> None:
    """Never with fewer than twenty; with them after ten seconds or three times the p99."""
    async with house(hang, both, each={"timeouts": {"first_byte": 20}}, pool={"type": "priority"}) as home:
        usual(home, count=19)
        started = now()
        await home.post(stream=True)
        assert now() - started == pytest.approx(20, abs=0.5)
        usual(home, count=5, seconds=4.0)
        started = now()
        await home.post(stream=True)
        assert now() - started == pytest.approx(12, abs=0.5)


async def test_the_first_answer_wins_the_loser_is_cancelled() -> None:
    """When the silent one speaks before its rescuer, the rescuer is given up and not blamed."""

    async def slow(peer: Peer, message: Message) -> None:
        await pause(4)
        await both(peer, message)

    async with house(slow, hang, pool={"type": "priority", "rescue_after": 2}) as home:
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "a" and home.calls == [1, 1]
        await until(lambda: home.idle() and not home.ups[1].open_connections)
        assert home.state(1)["failures"] == 0


@pytest.mark.parametrize("failure", [error_reply(500), limited("9"), in_stream("server_error"), error_reply(400)])
async def test_an_error_never_wins(failure: bytes) -> None:
    """A rescuer that fails is no reason to end the first attempt; its controller learns and is free at once."""

    async def slow(peer: Peer, message: Message) -> None:
        await pause(6)
        await both(peer, message)

    async with house(slow, answers(failure), pool={"type": "priority", "rescue_after": 2}) as home:
        task = home.later(stream=True)
        await pause(3)
        assert home.calls == [1, 1] and home.pool.upstreams[1].in_flight == 0
        assert home.state(1)["last_error"] is not None
        found = await task
        assert found.status == 200 and found.headers["x-apiserver-controller"] == "a"
        assert found.headers["x-apiserver-attempts"] == "2" and home.idle()


async def test_when_a_rescuer_fails_the_next_one_is_asked() -> None:
    """A request that is still stuck is asked of a third at once; the rescuer that failed is not asked again."""
    scripts = [hang, answers(error_reply(500)), then([limited("9")]), both]
    async with house(*scripts, pool={"type": "priority", "rescue_after": 2}) as home:
        started = now()
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "d" and home.calls == [1, 1, 1, 1]
        assert now() - started < 3


async def test_a_probe_whose_rescuer_fails_is_rescued_again() -> None:
    """Its second rescue does not wait for ten seconds either."""
    async with house(hang, answers(error_reply(500)), both, pool={"type": "priority"}) as home:
        usual(home)
        home.pool.upstreams[0].suspect()
        home.pool.upstreams[0].unstick(now())
        await pause(1.1)
        started = now()
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "c" and now() - started < 2


async def test_a_clients_mistake_ends_the_rescues() -> None:
    """What one rescuer calls the client's mistake is not sent to a third."""

    async def slow(peer: Peer, message: Message) -> None:
        await pause(6)
        await both(peer, message)

    async with house(slow, answers(error_reply(400)), both, pool={"type": "priority", "rescue_after": 2}) as home:
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "a" and home.calls == [1, 1, 0]


async def test_the_first_one_fails_while_the_rescuer_works() -> None:
    """Then the rescuer's answer is the answer, whenever it comes, and nobody else is asked."""

    async def fails(peer: Peer, _: Message) -> None:
        await pause(3)
        await peer.send(error_reply(500))

    async def slow(peer: Peer, message: Message) -> None:
        await pause(1.5)
        await both(peer, message)

    async with house(fails, slow, both, pool={"type": "priority", "rescue_after": 2}) as home:
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "b" and home.calls == [1, 1, 0] and home.idle()


async def test_a_rescuer_answers_while_a_stale_connection_is_replaced() -> None:
    """Its answer is the answer as soon as the new connection is there, and the request is not sent on that."""

    async def goes_stale(peer: Peer, _: Message) -> None:
        await pause(0.9)
        peer.reset()

    async def slow(peer: Peer, message: Message) -> None:
        await pause(0.6)
        await both(peer, message)

    async with house(then([both, goes_stale], hang), slow, pool={"type": "priority", "rescue_after": 0.4}) as home:
        await home.post(stream=True)
        real = home.server.server.links.dial

        async def dial(origin: app.Origin) -> app.Link:
            await pause(0 if origin.port == home.ups[1].port else 3)
            return await real(origin)

        home.server.server.links.dial = dial
        started = now()
        found = await home.post(stream=True)
        assert found.headers["x-apiserver-controller"] == "b" and now() - started == pytest.approx(3.9, abs=0.3)
        assert home.calls == [2, 1] and home.idle()


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_during_a_rescue_ends_both(how: str) -> None:
    """Both upstream connections are closed within 100 ms, both places are free."""
    async with house(hang, hang, pool={"type": "priority", "rescue_after": 2}) as home:
        client = await home.ask(stream=True)
        await pause(3)
        assert home.calls == [1, 1]
        client.reset() if how == "reset" else client.writer.close()
        left = now()
        await until(lambda: home.idle() and not (home.ups[0].open_connections or home.ups[1].open_connections))
        assert now() - left <= 0.1


async def test_a_client_that_leaves_in_the_turn_of_its_rescuers_answer() -> None:
    """The rescuer's connection is closed, too, though its answer had come and nobody had taken it yet."""

    async def fails(peer: Peer, _: Message) -> None:
        await pause(3)
        await peer.send(error_reply(500))

    async def goes_on(peer: Peer, _: Message) -> None:
        await pause(2)
        await peer.send(SSE_HEAD + app.chunk(event("a")))
        await peer.gone()

    async with house(fails, goes_on, pool={"type": "priority", "rescue_after": 2}) as home:
        relay, client = home.server.server.relay, await home.ask(stream=True)
        decides = relay._decides

        def leaves(*asked: Any) -> bool:
            (served,) = home.server.server.connections
            served.leave()  # behind what wakes it
            return decides(*asked)

        relay._decides = leaves  # type: ignore[method-assign]
        assert await client.closed() == b""
        await until(lambda: home.idle() and not home.server.server.links.active)
        await until(lambda: not home.ups[1].open_connections)
        assert home.calls == [1, 1]


@pytest.mark.parametrize(
    ("config", "more"),
    [({"rescue_after": 0}, {"stream": True}), ({"rescue_after": 2}, {"stream": True, "store": True}), ({"rescue_after": 2}, {})],
)
async def test_what_is_never_rescued(config: "dict[str, Any]", more: "dict[str, Any]") -> None:
    """Nothing with rescue_after 0, no stateful request, no whole answer of a controller that is not suspect."""

    async def slow(peer: Peer, message: Message) -> None:
        await pause(9)
        await both(peer, message)

    async with house(slow, both, pool={"type": "priority", **config}) as home:
        found = await home.post(**more)
        assert found.headers["x-apiserver-controller"] == "a" and home.calls == [1, 0]


async def test_whole_answers_are_rescued_from_a_suspect() -> None:
    """Three whole answers that are stuck in a suspect are asked of another too."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 2}) as home:
        usual(home, stream=False)
        started = now()
        tasks = [home.later() for _ in range(3)]
        for task in tasks:
            assert (await task).headers["x-apiserver-controller"] == "b"
        assert now() - started < 3


async def test_at_most_ten_rescues_a_minute_where_little_is_asked() -> None:
    """Of fifteen stuck streams ten are rescued in this minute, and the others may be in the next."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 2}, each={"timeouts": {"first_byte": 0}}) as home:
        tasks = [home.later(stream=True) for _ in range(15)]
        await pause(30)
        assert sum(task.done() for task in tasks) == 10 and home.calls == [15, 10]
        await pause(35)
        assert sum(task.done() for task in tasks) == 15 and home.calls == [15, 15]


async def test_at_most_five_percent_of_many_calls_are_rescues() -> None:
    """A thousand calls allow fifty rescues at once, and the next twenty calls one more."""
    one = echo("a")
    pool = pool_here(one, rescue_after=1)
    asked: "list[int]" = []
    for number in range(1200):
        made = pool.lease(asking(), pool.seats("m"), set(), now())
        assert made is not None
        if number < 1000:
            pool.settle(made, app.GOOD)
        elif number < 1100:
            made.stream, made.stuck = True, lambda number=number: not asked.append(number)  # type: ignore[misc,func-returns-value]
            made.sent(now())
    await pause(2)
    assert asked == list(range(1000, 1060))  # a twentieth of 1,200
    pool.close()


# -- what is shown


async def test_decision_headers_and_the_record_of_attempts() -> None:
    """Who answered, after how many attempts and how long a wait; the access line has each attempt and what came of it."""
    async with house(answers(error_reply(500)), then([limited("2")]), pool={"type": "priority"}) as home:
        found = await home.post()
        assert found.headers["x-apiserver-controller"] == "b" and found.headers["x-apiserver-attempts"] == "3"
        assert int(found.headers["x-apiserver-wait-ms"]) == pytest.approx(2000, abs=20)
        assert found.headers["x-request-id"] == found.headers["x-apiserver-request-id"]
        home.server.server.access.flush()
        (line,) = home.server.lines
        assert [one.rpartition(":")[0] for one in line.split("tried=")[1].split()[0].split(",")] == ["a:fault", "b:rate", "b:ok"]


async def test_an_upstreams_request_id_is_kept() -> None:
    """Ours stands beside it."""
    async with house(answers(json_reply(200, ANSWER, "x-request-id: theirs"))) as home:
        found = await home.post()
        assert found.headers["x-request-id"] == "theirs" and found.headers["x-apiserver-request-id"].startswith("req_")


async def test_retry_headers_are_ours_after_a_failover() -> None:
    """An upstream's advice about its own limit is no advice about all of them."""
    told = error_reply(429, "rate_limit_exceeded", "x", "Retry-After: 50", "retry-after-ms: 50000", "x-should-retry: true")
    other = error_reply(429, "rate_limit_exceeded", "x", "Retry-After: 40", "x-should-retry: false")
    async with house(answers(told), answers(other)) as home:
        found = await home.post()
        assert found.headers["retry-after"] == "40" and "x-should-retry" not in found.headers
        assert [name.lower() for name, _ in found.fields].count("retry-after") == 1


async def verbose(home: House) -> Any:
    """What /status?verbose=1 says."""
    client = await home.server.open()
    await client.send(request(b"", target="/status?verbose=1", method="GET"))
    found = await client.read()
    client.close()
    return found.json()


async def test_status_tells_each_controllers_state() -> None:
    """State, in flight, ledger, last error, counts and the length of the line; no secret; valid JSON."""
    told = ("x-ratelimit-limit-requests: 60", "x-ratelimit-remaining-requests: 41", "x-ratelimit-reset-requests: 19s")
    scripts = [answers(json_reply(200, ANSWER, *told)), answers(limited("33")), answers(error_reply(401, "invalid_api_key")), hang]
    only: "dict[str, Any]" = {"models": ["m"]}
    each = [{**only, "limits": {"rpm": 7}}, only, only, {"models": ["n"], "limits": {"concurrency": 1}}]
    async with house(*scripts, each=each) as home:
        for _ in range(7):
            assert (await home.post()).status == 200
        tasks = [home.later("X-Apiserver-Max-Wait: 1", model="n") for _ in range(2)]
        await until(lambda: home.pool.waiting == 1)
        home.pool.upstreams[3].suspect()
        found = await verbose(home)
        a, b, c, d = found["controllers"]
        assert found["waiting"] == 1 and found["status"] == "ok"
        assert [one["name"] for one in found["controllers"]] == ["a", "b", "c", "d"]
        assert (a["state"], a["requests"], a["failures"], a["in_flight"]) == ("open", 7, 0, 0)
        assert a["ledger"]["m"]["requests"] == {"limit": 60, "left": 41, "per_s": 1.0}
        assert a["ledger"]["m"]["rpm"] == {"limit": 7, "taken": 7}
        assert b["ledger"]["m"]["closed_for_s"] == pytest.approx(33, abs=0.2) and "429" in b["last_error"]
        assert (c["state"], c["failures"]) == ("parked", 2) and c["for_s"] == pytest.approx(300, abs=0.2)
        assert (d["state"], d["for_s"], d["in_flight"]) == ("suspect", None, 1)
        assert "sk-secret" not in json.dumps(found)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- exactness


def worst(times: "list[float]", span_s: float) -> int:
    """The most requests in any sliding window of that length."""
    times, first, most = sorted(times), 0, 0
    for at, end in enumerate(times):
        while times[first] <= end - span_s:
            first += 1
        most = max(most, at - first + 1)
    return most


async def test_exactness_of_configured_limits() -> None:
    """500 concurrent requests on two controllers: rpm and concurrency as the upstreams count them are never exceeded."""

    async def script(peer: Peer, message: Message) -> None:
        await pause(0.05)
        await both(peer, message)

    each: "list[dict[str, Any]]" = [
        {"limits": {"rpm": 200, "concurrency": 7}},
        {"limits": {"rpm": 90, "concurrency": 5, "burst_s": 10}},
    ]
    async with house(script, script, each=each, pool={"max_wait": 300}) as home:
        tasks = [home.later(stream=number % 2 == 0) for number in range(500)]
        for task in tasks:
            assert (await task).status == 200
        assert sum(home.calls) == 500 and home.idle()
        assert worst(home.ups[0].times, 60) == 200 and worst(home.ups[1].times, 60) <= 90
        assert worst(home.ups[1].times, 10) == 15
        assert home.ups[0].most_here == 7 and home.ups[1].most_here == 5


async def test_exactness_of_a_shared_quota() -> None:
    """Two controllers of one group together keep to its limits."""
    grouped = {"quota_group": "org", "limits": {"rpm": 20, "concurrency": 3}}

    async def script(peer: Peer, message: Message) -> None:
        await pause(0.05)
        await both(peer, message)

    async with house(script, script, each=grouped, pool={"max_wait": 200}) as home:
        tasks = [home.later() for _ in range(50)]
        for task in tasks:
            assert (await task).status == 200
        times = home.ups[0].times + home.ups[1].times
        assert worst(times, 60) == 20 and max(home.ups[0].most_here, home.ups[1].most_here) <= 3


async def test_a_line_of_learned_limits_wastes_nothing() -> None:
    """A hundred requests at once on an account of 60 a minute that tells what is left: all answered, few refused upstream."""
    level, at = 60.0, now()

    async def script(peer: Peer, _: Message) -> None:
        nonlocal level, at
        level, at = min(60.0, level + now() - at), now()
        left = level - 1 if level >= 0.999 else level
        told = ("x-ratelimit-limit-requests: 60", f"x-ratelimit-remaining-requests: {int(max(left, 0))}", f"x-ratelimit-reset-requests: {60 - left:.3f}s")
        if level < 0.999:
            await peer.send(error_reply(429, None, f"Please try again in {1 - level:.3f}s.", *told))
            return
        level = left
        await peer.send(json_reply(200, ANSWER, *told))

    async with house(script, pool={"max_wait": 60}) as home:
        assert (await home.post()).status == 200
        tasks = [home.later() for _ in range(100)]
        assert {(await task).status for task in tasks} == {200}
        assert home.calls[0] <= 103


async def test_a_hang_is_noticed_where_little_is_asked() -> None:
    """Requests that were rescued one after the other count as unanswered: the fourth is not asked of the silent one."""
    async with house(hang, both, pool={"type": "priority", "rescue_after": 2}) as home:
        for _ in range(3):
            assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"
        assert home.state()["state"] == "suspect" and home.calls == [3, 3]
        started = now()
        assert (await home.post(stream=True)).headers["x-apiserver-attempts"] == "1" and now() - started < 0.5
        await pause(1.1)  # a probe, which is rescued, too, and makes it wait twice as long
        assert (await home.post(stream=True)).headers["x-apiserver-controller"] == "b"
        assert home.state()["state"] == "suspect" and home.calls == [4, 5]
        await pause(1.5)
        assert (await home.post(stream=True)).headers["x-apiserver-attempts"] == "1" and home.calls == [4, 6]


@pytest.mark.parametrize(("per_s", "seconds", "count"), [(10.0, 0.3, 90), (1.0, 0.3, 20), (1.0, 2.5, 20)])
async def test_a_line_before_an_account_that_tells_nothing(per_s: float, seconds: float, count: int) -> None:
    """Its limit is found by few refusals, though it names neither that nor a time, and nearly all of it is used."""
    burst = 2 * per_s
    level, at, calls, started = burst, now(), {200: 0, 429: 0}, now()

    async def silent(peer: Peer, message: Message) -> None:
        nonlocal level, at
        level, at = min(burst, level + (now() - at) * per_s), now()
        good = level >= 1
        level -= good
        calls[200 if good else 429] += 1
        if good:
            await pause(seconds)
        await peer.send(GOOD if good else limited())

    async with house(silent, pool={"max_wait": 60}) as home:
        tasks = [home.later() for _ in range(count)]
        await pause(0.5)
        at_first = calls[429]  # of those that went before anything was known
        assert {(await task).status for task in tasks} == {200}
        assert calls[429] - at_first <= 0.3 * count
        assert now() - started < 1.6 * count / per_s + seconds
