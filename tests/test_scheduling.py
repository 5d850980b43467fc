"""README's table row by row, then rounds, line, commit, hedges, limits: real sockets, scripted upstreams, virtual clock."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    CERT,
    DONE,
    KEY,
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
    now,
    pause,
    reply,
    sse_reply,
    until,
)

pytestmark = pytest.mark.virtual_time

OK = json_reply(200, ANSWER)
STREAM = sse_reply(event("fine"), b"data: [DONE]\n\n")
AZURE = b'data: {"id":"","model":"","choices":[],"prompt_filter_results":[]}\n\n'
PRIORITY = {"type": "priority"}
HEDGED = {"type": "priority", "rescue_after": 2}


def limited(after: str = "", message: str = "slow down", kind: str = "requests", code: str = "rate_limit_exceeded") -> bytes:
    """Return a 429."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return json_reply(429, body, *([f"Retry-After: {after}"] if after else []))


NO_CREDIT = limited("", "You exceeded your current quota", "insufficient_quota", "insufficient_quota")
TOO_LARGE = limited("", "Request too large for m on tokens per min (TPM): Limit 10000, Requested 12000.", "tokens")


def in_stream(code: str, kind: str = "") -> bytes:
    """Return a 200 whose first event is an error."""
    error = app.compact_json({"error": {"message": "x", "type": kind, "code": code}})
    return sse_reply(AZURE, b"data: " + error + b"\n\n")


async def both(peer: Peer, message: Message) -> None:
    """Send a good answer, as a stream if the request asked for one."""
    await peer.send(STREAM if message.json().get("stream") else OK)


async def hang(peer: Peer, _: Message) -> None:
    """Send nothing until the other side closes."""
    await peer.gone()


async def close_at_once(peer: Peer, _: Message) -> None:
    """Close before any byte."""
    peer.close()


async def reset_at_once(peer: Peer, _: Message) -> None:
    """Reset before any byte."""
    peer.reset()


def after(seconds: float, last: Script | bytes = both) -> Script:
    """Return a script that waits, then sends the reply or runs the script."""
    return then([], last, lambda: pause(seconds))


def then(first: list[bytes | Script], last: Script | bytes = both, wait: Callable[[], Awaitable[Any]] | None = None) -> Script:
    """Return a script that does or sends each of `first` once, then always `last`."""
    steps = list(first)

    async def script(peer: Peer, message: Message) -> None:
        step = steps.pop(0) if steps else last
        if wait:
            await wait()
        await (peer.send(step) if isinstance(step, bytes) else step(peer, message))

    return script


def gated(gate: asyncio.Event, raw: bytes = OK) -> Script:
    """Return a script that waits for `gate`, then sends `raw`."""
    return then([], raw, gate.wait)


class Timed(Upstream):
    """An upstream that notes when each request came, and how many were running at once."""

    def __init__(self, script: Script) -> None:
        super().__init__(self._note)
        self.inner = script
        self.times: list[float] = []
        self.running = self.most_running = 0

    async def _note(self, peer: Peer, message: Message) -> None:
        self.times.append(now())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.inner(peer, message)
        finally:
            self.running -= 1


class Setup:
    """A server with the upstreams a, b, c ..."""

    def __init__(self, ups: list[Timed], server: Running) -> None:
        self.ups, self.server = ups, server
        self.clients: list[Client] = []

    async def post(self, *headers: str, **more: Any) -> Message:
        """Send one chat request for the model "m" and read its answer."""
        return await self.server.post(more.pop("model", "m"), *headers, **more)

    async def served_by(self, *headers: str, **more: Any) -> str:
        """Send one chat request; return the name of the controller that answered it with a 200."""
        answer = await self.post(*headers, **more)
        assert answer.status == 200, answer.body
        return answer.headers["x-apiserver-controller"]

    def later(self, *headers: str, **more: Any) -> asyncio.Task[Message]:
        """Start a chat request."""
        return asyncio.get_running_loop().create_task(self.post(*headers, **more))

    async def ask(self, *headers: str, **more: Any) -> Client:
        """Send a chat request; return its client, which has not read the answer."""
        client = await self.server.open()
        self.clients.append(client)
        await client.post(more.pop("model", "m"), *headers, **more)
        return client

    @property
    def calls(self) -> list[int]:
        """The number of requests that each upstream got."""
        return [len(upstream.seen) for upstream in self.ups]

    @property
    def shown(self) -> dict[str, Any]:
        """What /status?verbose=1 shows of the pool."""
        return app.describe_pool(self.server.server.pool, now())

    @property
    def waiting(self) -> int:
        """The length of the line."""
        return int(self.shown["waiting"])

    def state(self, at: int = 0) -> dict[str, Any]:
        """Return what /status?verbose=1 shows of a controller."""
        return dict(self.shown["controllers"][at])

    def failures(self, at: int = 0) -> int:
        """Return how many failures counted against a controller."""
        return int(self.state(at)["failures"])

    def out(self, at: int = 0) -> str:
        """Return why a controller is out of use: failing, refused, silent, no_credit, busy; or "" while it is in use."""
        shown = self.state(at)
        return str(shown["reason"]) if shown["state"] == "out" else ""

    def idle(self) -> bool:
        """Tell whether nothing is running or waiting."""
        return not self.waiting and not any(shown["in_flight"] for shown in self.shown["controllers"])

    def reload(self, *named: tuple[str, int], each: dict[str, Any] | None = None, **more: Any) -> None:
        """Reload with these controllers: a name and the number of its upstream."""
        self.server.reload(*(controller(name, self.ups[at].url, **(each or {})) for name, at in named), **more)

    async def history(self, count: int = 30, stream: bool = True) -> None:
        """Let the first controller answer `count` requests, so that its usual times are known; forget these requests."""
        for _ in range(count):
            assert await self.served_by(stream=stream) == "a"
        await pause(0.1)
        for upstream in self.ups:
            upstream.seen.clear()


Each = dict[str, Any] | list[dict[str, Any]] | None


@contextlib.asynccontextmanager
async def serving(*scripts: Script | Timed, each: Each = None, https: str = "", **more: Any) -> AsyncIterator[Setup]:
    """Run a server whose controllers a, b, c ... do what the scripts say.

    `each`: more configuration, for all controllers or one by one. `https`: names of controllers that use TLS.
    """
    async with contextlib.AsyncExitStack() as stack:
        ups = [script if isinstance(script, Timed) else Timed(script) for script in scripts]
        for upstream in ups:
            await stack.enter_async_context(upstream)
        extra = each if isinstance(each, list) else [each or {}] * len(ups)
        made = []
        for name, upstream, config in zip("abcdef", ups, extra, strict=False):
            url = f"https://127.0.0.1:{upstream.port}/v1" if name in https else upstream.url
            made.append(controller(name, url, **({"account": {"ca_file": CERT}} if name in https else {}), **config))
        setup = Setup(ups, await stack.enter_async_context(Running(*made, **more)))
        try:
            yield setup
        finally:
            for client in setup.clients:
                if not client.writer.is_closing():
                    client.reset()


# -- the table, row by row


CUT_SHORT = (in_stream("server_error"), sse_reply(AZURE), sse_reply(b": hello\n\n"), sse_reply())
NO_ANSWERS = [
    *((in_stream(code), True, 1, 1, "no_credit") for code in ("insufficient_quota", "billing_hard_limit_reached")),
    *((stream, True, 1, 1, "") for stream in CUT_SHORT),
    (reply(200, b'{"error":{"message":"x","type":"server_error","code":null}}'), False, 1, 1, ""),
    (reply(200, b'{\n  "error": {\n    "message": "x", "code": 502\n  }\n}'), False, 1, 1, ""),
    (reply(200, b"\n" * 40 + b'{"error":{"message":"x","code":"insufficient_quota"}}'), False, 1, 1, "no_credit"),
    (reply(200, b"\n" * 40), False, 1, 1, ""),
]


@pytest.mark.parametrize(
    ("script", "stream", "requests", "calls", "reason"),
    [
        *((script, stream, 1, 1, "") for script in (close_at_once, reset_at_once) for stream in (False, True)),
        *((error_reply(status), False, 6, 5, "failing") for status in (408, 409, 424, 500, 502, 503, 504, 520, 529)),
        (reply(307, b"", "Location: http://127.0.0.1:9/"), False, 6, 5, "failing"),
        (error_reply(401, "invalid_api_key"), True, 10, 2, "refused"),
        (error_reply(403, "unsupported_country"), False, 10, 3, "refused"),
        *NO_ANSWERS,
    ],
)
async def test_row_the_next_controller_answers(script: Script | bytes, stream: bool, requests: int, calls: int, reason: str) -> None:
    """A failure that another account may not have moves each request on, until the controller is out."""
    async with serving(then([], script), both, pool=PRIORITY) as setup:
        assert {await setup.served_by(stream=stream) for _ in range(requests)} == {"b"}
        assert setup.calls == [calls, requests] and setup.out() == reason
        assert setup.failures() == calls or reason == "no_credit"


async def test_row_connect_failure() -> None:
    """A refused connection moves the request on and gives its quota back; five of them open the breaker."""
    async with serving(both, both, each=[{"limits": {"rpm": 3}}, {}]) as setup:
        setup.ups[0].server.close()  # nothing was sent: the limit of three a minute is not used up
        for _ in range(12):
            assert await setup.served_by() == "b"
        assert setup.out() == "failing" and setup.failures() == 5
    # A kept connection that died is replaced, at the same controller, which is not blamed.
    async with serving(then([OK, close_at_once]), both, each=[{}, {"models": ["n"]}]) as setup:
        assert [await setup.served_by() for _ in range(2)] == ["a", "a"]
        assert setup.calls == [3, 0] and setup.ups[0].connections == 2 and setup.failures() == 0


async def test_row_no_byte_within_first_byte() -> None:
    """A silent stream goes to the next controller, a silent whole answer gets 504; the breaker counts both."""
    async with serving(hang, both, each={"timeouts": {"first_byte": 5}}, pool=PRIORITY) as setup:
        started = now()
        assert await setup.served_by(stream=True) == "b"
        assert now() - started == pytest.approx(5, abs=0.1)
        answer = await setup.post()
        assert (answer.status, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        assert setup.calls == [2, 1] and setup.failures() == 2


async def test_row_429_rate_limit() -> None:
    """A 429 closes its controller for that model until the named time; when none has room the request waits."""
    async with serving(then([limited("7")]), then([both, limited("5")]), pool=PRIORITY) as setup:
        started = now()
        answer = await setup.post()
        assert (answer.headers["x-apiserver-controller"], answer.headers["x-apiserver-attempts"]) == ("b", "2")
        assert now() - started < 0.1 and await setup.served_by(model="n") == "a"
        answer = await setup.post()
        assert answer.status == 200 and now() - started == pytest.approx(5, abs=0.1)
        assert int(answer.headers["x-apiserver-wait-ms"]) == pytest.approx(5000, abs=100)
        assert answer.headers["x-apiserver-controller"] == "b" and setup.failures() == 0


@pytest.mark.parametrize("limits", [{}, {"rpm": 600, "burst_s": 40}])
async def test_row_429_for_a_whole_burst(limits: dict[str, int]) -> None:
    """Requests that were running at the first 429 are refused with it: they wait together, not ever longer."""
    gate, count = asyncio.Event(), 8
    async with serving(then([gated(gate, limited())] * count), each={"limits": limits}) as setup:
        started = now()
        tasks = [setup.later() for _ in range(count)]
        await until(lambda: setup.calls == [count])
        gate.set()
        assert {(await task).status for task in tasks} == {200} and now() - started < 3


@pytest.mark.parametrize(("second", "calls"), [(both, [1, 0, 1]), (answers(in_stream("server_error")), [1, 1, 1])])
async def test_row_429_request_too_large(second: Script, calls: list[int]) -> None:
    """Only controllers with a large enough known limit are asked; without any the client learns not to retry."""
    each = [{}, {"limits": {"tpm": 50_000 if calls[1] else 11_000}}, {"limits": {"tpm": 50_000}}]
    async with serving(then([TOO_LARGE]), second, both, each=each, pool=PRIORITY) as setup:
        assert await setup.served_by(stream=True) == "c" and setup.calls == calls
        assert await setup.served_by() == "a" and setup.failures() == 0
    async with serving(answers(TOO_LARGE), both) as setup:
        answer = await setup.post()
        assert (answer.status, answer.headers["x-should-retry"]) == (429, "false")
        assert "Limit 10000" in answer.json()["error"]["message"] and setup.calls == [1, 0]


async def test_row_no_credit() -> None:
    """The whole quota group is out until a later request succeeds; a sole controller refuses with the true Retry-After."""
    grouped = {"quota_group": "org"}
    async with serving(then([NO_CREDIT]), both, both, each=[grouped, grouped, {}]) as setup:
        assert [await setup.served_by() for _ in range(4)] == ["c"] * 4
        assert setup.calls == [1, 0, 4] and [setup.out(at) for at in range(3)] == ["no_credit", "no_credit", ""]
        await pause(301)
        assert {await setup.served_by() for _ in range(6)} == {"a", "b", "c"}
        assert [setup.out(at) for at in range(3)] == ["", "", ""]
    async with serving(answers(NO_CREDIT)) as setup:
        assert (await setup.post()).json()["error"]["code"] == "insufficient_quota"
        answer = await setup.post()
        assert answer.status == 429 and int(answer.headers["retry-after"]) == pytest.approx(300, abs=1)
        assert setup.calls == [1]


@pytest.mark.parametrize("status", [403, 404])
async def test_row_the_account_lacks_the_model(status: int) -> None:
    """The controller gets no requests for that model for ten minutes, and goes on with all others."""
    lacks = error_reply(status, "model_not_found", "The model `m` does not exist")

    async def script(peer: Peer, message: Message) -> None:
        await peer.send(lacks if message.json()["model"] == "m" else OK)

    async with serving(script, both) as setup:
        assert {await setup.served_by() for _ in range(4)} == {"b"}
        assert setup.calls == [1, 4] and setup.out() == ""
        assert {await setup.served_by(model="n") for _ in range(2)} == {"a", "b"}
        await pause(601)
        assert {await setup.served_by() for _ in range(2)} == {"b"} and setup.calls[0] == 3


@pytest.mark.parametrize("status", [400, 404, 405, 413, 415, 418, 422, 451])
async def test_row_other_4xx(status: int) -> None:
    """The answer comes back byte for byte and is never replayed; the controller is not blamed, however often."""
    body = b'{"error": {"message":"x",  "type":null,"param":null,"code":"c"}}'
    async with serving(answers(reply(status, body, "X-Own: 1")), both, pool=PRIORITY) as setup:
        for stream in (True, False) * 3:
            answer = await setup.post(stream=stream)
            assert (answer.status, answer.body, answer.headers["x-own"]) == (status, body, "1")
            assert answer.headers["x-apiserver-attempts"] == "1" and "x-should-retry" not in answer.headers
        assert setup.calls == [6, 0] and (setup.out(), setup.failures()) == ("", 0)


@pytest.mark.parametrize("status", [503, 529])
async def test_row_503_with_retry_after(status: int) -> None:
    """Requests wait for a sole controller that is busy; one that is busy for too long has its error passed on at once."""
    async with serving(then([error_reply(status, None, "busy", "Retry-After: 3")])) as setup:
        started = now()
        first = setup.later()
        await until(lambda: setup.calls == [1])
        assert (await setup.post()).status == (await first).status == 200 and setup.calls == [3]
        assert setup.ups[0].times[1] - started == pytest.approx(3, abs=0.05)
    async with serving(answers(error_reply(status, None, "busy", "Retry-After: 100"))) as setup:
        started = now()
        assert (await setup.post()).status == status and now() - started < 0.1 and setup.calls == [1]


@pytest.mark.parametrize(
    ("code", "kind", "calls"),
    [("rate_limit_exceeded", "", [1, 3]), ("model_not_found", "", [1, 3]), ("too_long", "invalid_request_error", [3, 0])],
)
async def test_row_200_whose_first_event_is_a_429_or_a_4xx(code: str, kind: str, calls: list[int]) -> None:
    """A rate limit or a missing model in a stream closes that model; a client's mistake is answered with 400."""
    async with serving(answers(in_stream(code, kind)), both, pool=PRIORITY) as setup:
        statuses = {(await setup.post(stream=True)).status for _ in range(3)}
        assert (statuses, setup.calls, setup.failures()) == ({400 if kind else 200}, calls, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_row_an_answer_that_is_cut(stream: bool) -> None:
    """A large whole one ends short of its length (small ones: test_relay.py); a stream with an error event."""

    async def cut(peer: Peer, _: Message) -> None:
        if stream:
            await peer.send(SSE_HEAD + app.chunk(event("a")))
            await pause(0.01)
            peer.reset()
        else:
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n", b" " * 2_000_000)
            peer.close()

    async with serving(cut, both) as setup:
        data = await (await setup.ask(stream=stream)).closed()
        if stream:
            assert event("a") in data and b'data: {"error":{' in data and b"[DONE]" not in data and b"finish_reason" not in data
        assert len(data) < 3_000_000 and not data.endswith(b"0\r\n\r\n")
        await until(setup.idle)
        assert setup.failures() == 1 and "cut" in setup.state()["last_error"] and setup.calls == [1, 0]


@pytest.mark.parametrize(
    ("replies", "status", "name"),
    [
        ([error_reply(500), error_reply(404, "model_not_found"), error_reply(401)], 500, "a"),
        ([error_reply(503), limited("60", "busy"), error_reply(500)], 429, "b"),
        ([limited("60"), error_reply(502), error_reply(422)], 422, "c"),
    ],
)
async def test_row_every_controller_failed(replies: list[bytes], status: int, name: str) -> None:
    """The client gets the most useful answer as it came: a client's 4xx, then 429, 5xx, 404; and the controller's name."""
    async with serving(*map(answers, replies)) as setup:
        answer = await setup.post()
        assert answer.status == status and answer.body in replies["abc".index(name)]
        assert (answer.headers["x-apiserver-controller"], answer.headers["x-apiserver-attempts"]) == (name, "3")
    # Without any answer it gets an OpenAI-style error; a redirect is neither followed nor passed on.
    for script, code in ((reset_at_once, 502), (hang, 504), (answers(reply(302, b"", "Location: http://evil/")), 502)):
        async with serving(script, script, each={"timeouts": {"first_byte": 3}}) as setup:
            answer = await setup.post(stream=True)
            assert answer.status == code and answer.json()["error"]["type"] == "server_error" and setup.calls == [1, 1]
            assert "location" not in answer.headers


PHASES = ["in line", "connecting", "before the head", "held", "in the stream", "in a whole answer", "in a large answer"]


@pytest.mark.parametrize("how", ["reset", "fin"])
@pytest.mark.parametrize("phase", PHASES)
async def test_row_the_client_leaves(phase: str, how: str) -> None:
    """The upstream connection is closed within 100 ms, what was not sent is given back, and no controller is blamed."""

    async def script(peer: Peer, _: Message) -> None:
        if phase in ("held", "in the stream"):
            await peer.send(SSE_HEAD)
            await peer.chunk(AZURE if phase == "held" else event("a"))
        elif phase == "in a whole answer":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b" " * 500)
        elif phase == "in a large answer":
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n", b" " * 1_500_000)
        await peer.gone()

    tight = {"limits": {"concurrency": 1, "rpm": 5, "tpm": 100_000}}
    other = {} if phase == "held" else {"models": ["n"]}
    https = "a" if phase == "connecting" else ""  # the upstream never answers the handshake
    async with serving(script, both, each=[tight, other], https=https, pool=PRIORITY) as setup:
        if phase == "in line":
            await setup.ask()
            await until(lambda: setup.calls[0] == 1)
        client = await setup.ask(stream=phase in ("held", "in the stream", "before the head"))
        await until(lambda: setup.waiting if phase == "in line" else setup.ups[0].connections)
        await pause(0.05)
        assert setup.state()["in_flight"] == 1
        client.reset() if how == "reset" else client.writer.close()
        left = now()
        if phase == "in line":
            await until(lambda: not setup.waiting)
        else:
            await until(lambda: setup.idle() and not setup.ups[0].open_connections)
        assert now() - left <= 0.1
        assert setup.state()["ledger"]["m"]["rpm"]["taken"] == (phase != "connecting")
        assert setup.failures() == 0 and setup.calls[0] == (phase != "connecting")
        (line,) = setup.server.access_lines()
        assert phase == "in line" or ("attempts=1 " in line and "tried=a:gone:" in line)


# -- the table: SIGHUP


async def test_a_reload_keeps_state_and_waiters() -> None:
    """What is unchanged stays closed; a waiting request goes to a controller that serves its model now, or gets 404."""
    async with serving(then([limited("20")]), both, each=[{}, {"models": ["other"]}]) as setup:
        waiter = setup.later()
        await until(lambda: setup.waiting)
        setup.reload(("a", 0), ("b", 1))
        assert (await waiter).headers["x-apiserver-controller"] == "b"
        assert {await setup.served_by() for _ in range(4)} == {"b"} and setup.calls == [1, 5]
    async with serving(then([limited("20")])) as setup:
        waiter = setup.later()
        await until(lambda: setup.waiting)
        setup.reload(("a", 0), each={"models": ["n"]})
        assert (await waiter).status == 404
        await until(setup.idle)


async def test_a_reload_while_a_request_is_running() -> None:
    """When its attempt fails only the controllers of the new configuration are asked, with their new key."""
    gate = asyncio.Event()
    async with serving(then([gated(gate, error_reply(401))]), both, pool=PRIORITY) as setup:
        task = setup.later()
        await until(lambda: setup.calls == [1, 0])
        setup.reload(("a", 0), each={"account": {"api_key": "sk-secret-renewed"}})
        gate.set()
        assert (await task).status == 200 and setup.calls == [2, 0]
        assert setup.ups[0].seen[1].headers["authorization"] == "Bearer sk-secret-renewed"


async def test_a_reload_removes_a_silent_controller() -> None:
    """A request that is stuck in a removed controller is hedged; a removed controller is not asked as a hedge."""
    pool = {"rescue_after": 3}
    async with serving(hang, both, pool={"type": "priority", **pool}) as setup:
        started, task = now(), setup.later(stream=True)
        await until(lambda: setup.calls == [1, 0])
        for _ in range(2):
            setup.reload(("b", 1), pool=pool)
        assert (await task).headers["x-apiserver-controller"] == "b" and now() - started < 4
        await until(lambda: setup.idle() and not setup.ups[0].open_connections)
    async with serving(hang, both, both, pool=HEDGED) as setup:
        task = setup.later(stream=True)
        await pause(1)
        setup.reload(("a", 0), ("c", 2), pool=HEDGED)
        assert (await task).headers["x-apiserver-controller"] == "c" and setup.calls == [1, 0, 1]


async def test_a_reload_leaves_a_conversation_with_its_account() -> None:
    """A request that waits for the account of its last response goes on waiting for that account."""
    made, data = json_reply(200, {"id": "resp_1", "object": "response"}), {"model": "m", "input": "hi"}
    async with serving(answers(made, limited("5"), made), answers(made), pool=PRIORITY) as setup:
        await setup.server.ask("POST", "/v1/responses", data)
        asked = setup.server.ask("POST", "/v1/responses", {**data, "previous_response_id": "resp_1"})
        waiter = asyncio.get_running_loop().create_task(asked)
        await until(lambda: setup.waiting)
        setup.reload(("a", 0), ("b", 1), pool=PRIORITY)
        assert (await waiter).headers["x-apiserver-controller"] == "a" and setup.calls == [3, 0]


# -- rounds and the last resort


async def test_once_per_round() -> None:
    """Each controller is asked once; a new round begins when waiting, or a slow failure elsewhere, has reopened one."""
    async with serving(answers(error_reply(500)), then([limited("2"), limited("2")]), pool=PRIORITY) as setup:
        assert (await setup.post()).status == 200 and setup.calls == [2, 3]
        assert [round(time - setup.ups[1].times[0]) for time in setup.ups[1].times] == [0, 2, 4]
    async with serving(then([limited("1")]), after(3, error_reply(500)), pool=PRIORITY) as setup:
        answer = await setup.post()
        assert (answer.status, answer.headers["x-apiserver-attempts"]) == (200, "3") and setup.calls == [2, 1]
    # A 429 that was waited out is not the answer: the client gets what came after, without the Retry-After of the 429.
    for script, status in ((answers(error_reply(500)), 500), (close_at_once, 502)):
        async with serving(then([limited("1")], script), each={"limits": {"rpm": 100}}) as setup:
            answer = await setup.post()
            assert answer.status == status and answer.headers["x-apiserver-attempts"] == "2"
            assert "retry-after" not in answer.headers


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(500, "boom", "failing"), (401, "bad_key", "refused"), (403, "region", "refused"), (404, "model_not_found", "")],
)
async def test_a_sole_controller_passes_its_errors_on(status: int, code: str, reason: str) -> None:
    """Neither the breaker nor a refused key nor a missing model keeps a request from the only controller."""
    async with serving(answers(error_reply(status, code))) as setup:
        for count in range(1, 8):
            assert (await setup.post()).status == status and setup.calls == [count]
        assert setup.out() == reason


async def test_the_last_resort() -> None:
    """When all are out by health the one that is due back first answers; a limit is never passed for that, and a full one waited for."""
    busy = [error_reply(503, None, "busy", f"Retry-After: {seconds}") for seconds in (100, 50, 80)]
    async with serving(*(then([failure] * 5) for failure in busy), pool=PRIORITY) as setup:
        for _ in range(5):
            await setup.post()
        assert await setup.served_by("X-Apiserver-Max-Wait: 1") == "b"
    each = [{}, {"limits": {"rpm": 1}}, {"models": ["n"]}]
    async with serving(answers(limited("100")), both, both, each=each) as setup:
        assert await setup.served_by() == "b"
        answer = await setup.post()
        assert answer.status == 429 and answer.headers["retry-after"] == "61" and setup.calls == [1, 1, 0]
    gate, each = asyncio.Event(), [{}, {"limits": {"concurrency": 1}}]
    async with serving(answers(NO_CREDIT), gated(gate), each=each, pool=PRIORITY) as setup:
        tasks = [setup.later(), setup.later()]
        await until(lambda: setup.waiting == 1)
        gate.set()
        assert [(await task).headers["x-apiserver-controller"] for task in tasks] == ["b", "b"] and setup.calls[1] == 2


# -- the line


async def test_a_waiter_is_woken_in_time() -> None:
    """It is sent within 20 ms of the named time; a burst limit's reopening is known while the request before is silent."""
    async with serving(then([limited("", "Please try again in 1.234s.")])) as setup:
        await setup.post()
        assert 1.234 <= setup.ups[0].times[1] - setup.ups[0].times[0] <= 1.234 + 0.02
    async with serving(after(20), each={"limits": {"rpm": 60, "burst_s": 1}}) as setup:
        tasks = [setup.later() for _ in range(3)]
        assert {(await task).status for task in tasks} == {200}
        gaps = [round(time - setup.ups[0].times[0], 2) for time in setup.ups[0].times]
        assert gaps == pytest.approx([0, 1.0, 2.0], abs=0.05)


async def test_no_request_waits_behind_another_line() -> None:
    """A line for one model holds up no other model; a waiter that tried a controller in vain leaves it to the next."""
    async with serving(then([error_reply(500)]), then([limited("20")]), pool=PRIORITY) as setup:
        waiter = setup.later()
        await until(lambda: setup.waiting == 1)
        started = now()
        assert [await setup.served_by() for _ in range(3)] == ["a"] * 3 and now() - started < 0.5
        assert (await waiter).headers["x-apiserver-controller"] == "b"
    async with serving(then([limited("20")])) as setup:
        waiters = [setup.later()]
        await until(lambda: setup.waiting)
        waiters += [setup.later() for _ in range(2)]
        await until(lambda: setup.waiting == 3)
        started = now()
        assert (await setup.post(model="n")).status == 200 and now() - started < 0.1
        assert {(await waiter).status for waiter in waiters} == {200}


@pytest.mark.parametrize("how", ["", "reset", "fin"])
async def test_first_come_first_served(how: str) -> None:
    """With one place, requests go upstream in their order, one at a time; waiters that leave never do."""
    async with serving(after(1), each={"limits": {"concurrency": 1}}) as setup:
        clients, stay = [], {0, 2, 4} if how else set(range(6))
        for number in range(6):
            clients.append(await setup.ask(user=str(number)))
            await pause(0.01)
        assert setup.waiting == 5
        for number in {*range(6)} - stay:
            clients[number].reset() if how == "reset" else clients[number].writer.close()
        await until(lambda: setup.waiting == len(stay) - 1)
        assert {(await clients[number].read()).status for number in stay} == {200}
        assert [message.json()["user"] for message in setup.ups[0].seen] == [*map(str, sorted(stay))]
        assert setup.ups[0].most_running == 1 and setup.idle()


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_a_client_that_leaves_as_a_place_comes_free(leaves_first: bool) -> None:
    """A waiter that leaves in the very moment of its turn keeps no place, and the next one in line gets it."""
    gate = asyncio.Event()
    async with serving(gated(gate), each={"limits": {"concurrency": 1}}) as setup:
        clients = []
        for number in range(4):
            clients.append(await setup.ask(user=str(number)))
            await until(lambda number=number: setup.waiting + setup.calls[0] == number + 1)
        for step in (clients[1].reset, gate.set) if leaves_first else (gate.set, clients[1].reset):
            step()
            await asyncio.sleep(0)
        assert {(await clients[number].read()).status for number in (0, 2, 3)} == {200}
        await until(setup.idle)
        users = [message.json()["user"] for message in setup.ups[0].seen]
        assert [user for user in users if user != "1"] == ["0", "2", "3"]


async def test_patience_that_ends_as_a_place_comes_free() -> None:
    """Requests whose time ends at the very moment of the reopening get an answer or a 429, and leave nothing behind."""
    async with serving(then([limited("5")])) as setup:
        tasks = [setup.later("X-Apiserver-Max-Wait: 5") for _ in range(3)]
        assert {(await task).status for task in tasks} <= {200, 429}
        await until(setup.idle)
        await pause(1)
        assert (await setup.post()).status == 200


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        *(((), 5.0), (("X-Stainless-Read-Timeout: 6", "X-Apiserver-Max-Wait: 3"), 3.0)),
        *(((f"X-Apiserver-Max-Wait: {value}",), seconds) for value, seconds in
          (("1", 1.0), ("500ms", 0.5), ("60", 5.0), ("0", 0.0), ("-3", 5.0))),
        *(((f"X-Stainless-Read-Timeout: {value}",), seconds) for value, seconds in (("4", 2.0), ("600.0", 5.0), ("1", 0.0))),
    ],
)
async def test_how_long_a_request_waits(headers: tuple[str, ...], seconds: float) -> None:
    """It waits for max_wait, lowered by the client's header, and two seconds less than the client's own timeout."""
    async with serving(hang, each={"limits": {"concurrency": 1}}, pool={"max_wait": 5}) as setup:
        await setup.ask()
        await until(lambda: setup.calls == [1])
        started = now()
        answer = await setup.post(*headers)
        assert answer.status == 429 and now() - started == pytest.approx(seconds, abs=0.05)
        assert setup.calls == [1] and not setup.waiting
        # No controller was asked, so none is named.
        assert "x-apiserver-controller" not in answer.headers
        assert int(answer.headers.get("x-apiserver-wait-ms", 0)) == pytest.approx(seconds * 1000, abs=50)


async def test_max_wait_bounds_all_rounds_together() -> None:
    """With 429s of three seconds each and seven seconds in all the third 429 is the last."""
    async with serving(answers(limited("3", "third"))) as setup:
        answer = await setup.post("X-Apiserver-Max-Wait: 7")
        assert answer.status == 429 and setup.calls == [3] and answer.json()["error"]["message"] == "third"
        assert answer.headers["x-apiserver-attempts"] == "3"
        assert int(answer.headers["x-apiserver-wait-ms"]) == pytest.approx(6000, abs=100)


async def test_refused_at_once_when_the_reopening_is_too_late() -> None:
    """The client gets 429 at once, with the time of the reopening, and with the upstream's own body if it was asked."""
    async with serving(answers(limited("100", "come back later"))) as setup:
        started = now()
        for message, code in (("come back later", "rate_limit_exceeded"), (None, "rate_limit_exceeded")):
            answer = await setup.post()
            error = answer.json()["error"]
            assert (answer.status, error["code"], error["message"]) == (429, code, message or error["message"])
            assert int(answer.headers["retry-after"]) == pytest.approx(100, abs=1)
            assert int(answer.headers["retry-after-ms"]) == pytest.approx(100_000, abs=100)
        assert now() - started < 0.2 and setup.calls == [1]


async def test_refused_at_once_by_the_position_in_line() -> None:
    """With one request a second, those behind the thirtieth place would wait too long: they learn when to come."""
    async with serving(both, each={"limits": {"rpm": 60, "burst_s": 1}}) as setup:
        started = now()
        tasks = [setup.later() for _ in range(60)]
        await until(lambda: any(task.done() and task.result().status == 429 for task in tasks))
        assert now() - started < 0.5
        replies = [await task for task in tasks]
        refused = [answer for answer in replies if answer.status == 429]
        assert len(replies) - len(refused) == pytest.approx(31, abs=2)
        assert {int(answer.headers["retry-after"]) for answer in refused} <= {30, 31, 32, 33}


async def test_refused_at_once_when_the_line_is_full() -> None:
    """The line takes max_queue requests and not one more, and half of them of one client key, until one is served."""
    gate, tight = asyncio.Event(), {"limits": {"concurrency": 1}}
    async with serving(gated(gate), each=tight, pool={"max_queue": 2}) as setup:
        tasks = [setup.later() for _ in range(3)]
        await until(lambda: setup.waiting == 2)
        started = now()
        answer = await setup.post()
        assert answer.status == 429 and now() - started < 0.1
        # The time is not known, so none is told.
        assert "retry-after-ms" not in answer.headers and answer.headers["x-should-retry"] == "true"
        gate.set()
        assert {(await task).status for task in tasks} == {200} and (await setup.post()).status == 200
    keys = [{"name": name, "key": f"key-of-{name}"} for name in ("alice", "bob")]
    alice, bob = (f"Authorization: Bearer {key['key']}" for key in keys)
    async with serving(hang, each=tight, pool={"max_queue": 4}, client_keys=keys) as setup:
        for count in range(3):
            await setup.ask(alice)
            await until(lambda count=count: setup.waiting == count)
        assert (await setup.post(alice)).status == 429
        await setup.ask(bob)
        await until(lambda: setup.waiting == 3)


# -- limits


async def test_a_quota_group() -> None:
    """Its controllers share a 429. A controller outside it that has its name keeps other limits, also after a reload."""
    async with serving(answers(limited("100")), both, both, each=[{"quota_group": "org"}] * 2 + [{}]) as setup:
        assert [await setup.served_by() for _ in range(4)] == ["c"] * 4 and setup.calls == [1, 0, 4]
    group = {"quota_group": "a", "limits": {"rpm": 2}}
    each: list[dict[str, Any]] = [{"limits": {"rpm": 1}}, group, group]
    async with serving(both, both, both, each=each) as setup:
        assert {(await setup.post()).status for _ in range(3)} == {200}
        assert setup.calls[0] == 1 and sum(setup.calls) == 3
        setup.server.reload(*(controller("abc"[at], setup.ups[at].url, weight=2, **more) for at, more in enumerate(each)))
        assert (await setup.post("X-Apiserver-Max-Wait: 0")).status == 429 and sum(setup.calls) == 3


def worst(times: list[float], span_s: float) -> int:
    """Return the most requests in any sliding window of that length."""
    times, first, most = sorted(times), 0, 0
    for at, end in enumerate(times):
        while times[first] <= end - span_s:
            first += 1
        most = max(most, at - first + 1)
    return most


async def test_configured_limits_are_exact() -> None:
    """Of many requests at once none goes beyond rpm, concurrency or burst_s as the upstreams, or a quota group, count."""
    each = [{"limits": {"rpm": 200, "concurrency": 7}}, {"limits": {"rpm": 90, "concurrency": 5, "burst_s": 10}}]
    async with serving(after(0.05), after(0.05), each=each, pool={"max_wait": 300}) as setup:
        tasks = [setup.later(stream=number % 2 == 0) for number in range(500)]
        assert {(await task).status for task in tasks} == {200}
        a, b = setup.ups
        assert sum(setup.calls) == 500 and setup.idle() and [a.most_running, b.most_running] == [7, 5]
        assert (worst(a.times, 60), worst(b.times, 10)) == (200, 15) and worst(b.times, 60) <= 90
    group = {"quota_group": "org", "limits": {"rpm": 20, "concurrency": 3}}
    async with serving(after(0.05), after(0.05), each=group, pool={"max_wait": 300}) as setup:
        assert {(await task).status for task in [setup.later() for _ in range(50)]} == {200}
        a, b = setup.ups
        assert worst(a.times + b.times, 60) == 20 and max(a.most_running, b.most_running) <= 3
    # A hundred a minute in bursts of a second: one each 0.6 s, and a hundred in the first minute.
    async with serving(both, each={"limits": {"rpm": 100, "burst_s": 1}}, pool={"max_wait": 90}) as setup:
        assert {(await task).status for task in [setup.later() for _ in range(130)]} == {200}
        times = setup.ups[0].times
        assert worst(times, 59.9) == 100 and worst(times, 0.59) == 1
        assert times[99] - times[0] == pytest.approx(59.4, abs=0.5)


class Account(Timed):
    """An account with a bucket of requests; `tells`: its replies carry its limit, and the time until there is room."""

    def __init__(self, size: float, per_s: float, tells: bool, took_s: float = 0.0) -> None:
        super().__init__(self._answer)
        self.size, self.per_s, self.tells, self.took_s = size, per_s, tells, took_s
        self.level, self.at, self.refused = size, 0.0, 0

    async def _answer(self, peer: Peer, _: Message) -> None:
        self.level, self.at = min(self.size, self.level + (now() - self.at) * self.per_s), now()
        good = self.level >= 0.999  # the times have milliseconds
        self.level = max(0.0, self.level - good)
        self.refused += not good
        values = {"limit": f"{self.size:.0f}", "remaining": int(self.level), "reset": f"{(self.size - self.level) / self.per_s:.3f}s"}
        lines = [f"x-ratelimit-{name}-requests: {value}" for name, value in values.items() if self.tells]
        message = f"Please try again in {(1 - self.level) / self.per_s:.3f}s." if self.tells else "slow down"
        if good:
            await pause(self.took_s)
        await peer.send(json_reply(200, ANSWER, *lines) if good else error_reply(429, None, message, *lines))


@pytest.mark.parametrize(("limit", "count", "refused"), [(10, 13, 0), (60, 100, 2)])
async def test_limits_learned_from_replies(limit: int, count: int, refused: int) -> None:
    """After the first reply the server knows what is left: all requests are answered, and few earn a 429 upstream."""
    account = Account(limit, limit / 60, tells=True)
    async with serving(account, pool={"max_wait": 60}) as setup:
        assert (await setup.post()).status == 200
        assert {(await task).status for task in [setup.later() for _ in range(count)]} == {200}
        assert account.refused <= refused


@pytest.mark.parametrize(("per_s", "seconds", "count"), [(10.0, 0.3, 90), (1.0, 0.3, 20), (1.0, 2.5, 20)])
async def test_an_account_that_tells_no_limit(per_s: float, seconds: float, count: int) -> None:
    """Its limit is found with few refusals, though it names neither that nor a time, and nearly all of it is used."""
    account, started = Account(2 * per_s, per_s, tells=False, took_s=seconds), now()
    async with serving(account, pool={"max_wait": 60}) as setup:
        tasks = [setup.later() for _ in range(count)]
        await pause(0.5)
        at_first = account.refused  # of those that were sent before anything was known
        assert {(await task).status for task in tasks} == {200}
        assert account.refused - at_first <= 0.3 * count
        assert now() - started < 1.6 * count / per_s + seconds


# -- stateful requests


@pytest.mark.parametrize("script", [401, 429, 503, close_at_once, hang, *(400, 403, 404, 408, 409, 500, 502, 504)])
async def test_a_stateful_request_moves_on_only_when_it_did_not_run(script: Script | int) -> None:
    """It stays after a silence, a cut or an error that may hide a request that ran, which is no one else's fault."""
    failure = script if callable(script) else error_reply(script, "model_not_found" if script == 404 else "x")
    async with serving(then([failure]), both, each={"timeouts": {"first_byte": 2}}, pool=PRIORITY) as setup:
        answer = await setup.post(store=True, stream=callable(script))
        if script in (401, 404, 429, 503):
            assert answer.status == 200 and setup.calls == [1, 1]
        else:
            assert answer.status in ((502, 504) if callable(script) else (502 if script == 403 else script,))
            assert setup.calls == [1, 0] and await setup.served_by() == "a"


async def test_a_stateful_request_that_was_not_sent_or_met_a_conflict() -> None:
    """A connection that could not be made proves that it did not run; a 409 about an object blames no controller."""
    async with serving(both, answers(error_reply(409)), pool=PRIORITY) as setup:
        setup.ups[0].server.close()
        assert {(await setup.post(store=True)).status for _ in range(8)} == {409}
        assert setup.calls == [0, 8] and (setup.out(1), setup.failures(1)) == ("", 0)


# -- commit


@pytest.mark.parametrize(
    ("preface", "event_s", "seconds", "count", "more"),
    [
        ([b": hello\n\n", AZURE], 1.0, 1.0, 2, {}),
        ([b": short\n\n", AZURE], 30.0, 15.0, 2, {}),
        ([b": " + b"x" * 65536 + b"\n\n"], 1.0, 0.0, 2, {}),
        ([b": sole controller\n\n"], 1.0, 0.0, 1, {}),
        ([b": stateful\n\n"], 1.0, 0.0, 2, {"store": True}),
    ],
)
async def test_what_comes_before_the_first_event_is_held(
    preface: list[bytes], event_s: float, seconds: float, count: int, more: dict[str, Any]
) -> None:
    """It is held until the first real event, for at most 64 kB or 15 s, and not at all where nothing else can answer."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD, *map(app.chunk, preface))
        await pause(event_s)
        await peer.send(app.chunk(event("real") + DONE) + b"0\r\n\r\n")

    async with serving(*[script] * count) as setup:
        started = now()
        client = await setup.ask(stream=True, **more)
        assert await client.reader.read(1) == b"H" and now() - started == pytest.approx(seconds, abs=0.1)
        assert (await client.read()).body == b"".join(preface) + event("real") + DONE and sum(setup.calls) == 1


ENDING = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'


@pytest.mark.parametrize(
    ("last", "name"), [(ENDING[:-2], "a"), (b'data: {"error":{"message":"no","code":"insufficient_quota"}}', "b")]
)
async def test_a_first_event_may_end_with_its_stream(last: bytes, name: str) -> None:
    """Without its blank line it still is an answer, which is passed on, or an error, which is judged."""
    async with serving(answers(sse_reply(last)), both, pool=PRIORITY) as setup:
        answer = await setup.post(stream=True)
        assert (answer.status, answer.headers["x-apiserver-controller"]) == (200, name)
        assert (last in answer.body) is (name == "a") and bool(setup.out()) is (name == "b")


# -- silent controllers


async def test_a_silent_controller_gets_no_new_requests() -> None:
    """After three unanswered requests and a second of silence the next go elsewhere, until a probe is answered."""

    async def trickle(peer: Peer, _: Message) -> None:
        await peer.send(OK[:-20])
        await pause(3)
        await peer.send(OK[-20:])

    async with serving(then([both] * 30 + [hang] * 3), both, pool={"type": "priority", "rescue_after": 5}) as setup:
        await setup.history()
        tasks = [setup.later(stream=True) for _ in range(3)]
        await pause(0.9)
        assert setup.out() == ""
        await pause(0.5)
        assert setup.out() == "silent" and await setup.served_by() == "b"
        assert {(await task).headers["x-apiserver-controller"] for task in tasks} == {"b"}
        await pause(1.1)
        assert setup.calls[0] == 3 and await setup.served_by(stream=True) == "a" and setup.out() == ""
    async with serving(then([both] * 30, trickle), both, pool=HEDGED) as setup:  # a slow answer is no silence
        await setup.history(stream=False)
        tasks = [setup.later() for _ in range(3)]
        await pause(2)
        assert setup.out() == "" and {(await task).headers["x-apiserver-controller"] for task in tasks} == {"a"}


async def test_a_hang_is_noticed_where_little_is_asked() -> None:
    """Hedged requests, one after the other, count as unanswered; a probe that is hedged doubles the time."""
    async with serving(hang, both, pool=HEDGED) as setup:
        for _ in range(3):
            assert await setup.served_by(stream=True) == "b"
        assert setup.out() == "silent" and setup.calls == [3, 3]
        started = now()
        assert (await setup.post(stream=True)).headers["x-apiserver-attempts"] == "1" and now() - started < 0.5
        await pause(1.1)
        assert await setup.served_by(stream=True) == "b"
        assert setup.out() == "silent" and setup.calls == [4, 5]
        await pause(1.5)
        assert (await setup.post(stream=True)).headers["x-apiserver-attempts"] == "1" and setup.calls == [4, 6]


@pytest.mark.parametrize("failing", [False, True])
async def test_the_probe_of_a_silent_controller_is_hedged_early(failing: bool) -> None:
    """The probe is answered by another controller after a second of silence, even if a first hedge fails."""
    scripts = [then([both] * 30, hang), then([both] * 3, answers(error_reply(500))) if failing else both, both]
    async with serving(*scripts, pool={"type": "priority", "rescue_after": 20}) as setup:
        await setup.history()
        await asyncio.gather(*(setup.post(stream=True) for _ in range(3)))
        await pause(1.1)
        assert setup.out() in ("silent", "") and setup.calls[0] == 3
        started = now()
        assert await setup.served_by(stream=True) == ("c" if failing else "b")
        assert now() - started == pytest.approx(1.25, abs=0.5) and setup.calls[0] == 4 and setup.out() == "silent"


# -- hedges


class LateHandshake(Timed):
    """A TLS upstream that answers each handshake only after some seconds, one number for each connection."""

    def __init__(self, script: Script, *seconds: float) -> None:
        super().__init__(script)
        self.seconds = list(seconds)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        super()._accept(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERT, KEY)
        try:
            await pause(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
            await writer.start_tls(context)
        except OSError:
            writer.transport.abort()
            return
        await super()._serve(reader, writer)


@pytest.mark.parametrize("rescue_after", [0.5, 3])
async def test_a_stuck_stream_is_hedged(rescue_after: float) -> None:
    """A stream that is silent past rescue_after is asked of another; its answer wins, the loser is cancelled unblamed."""
    pool = {"type": "priority", "rescue_after": rescue_after}
    async with serving(hang, both, pool=pool) as setup:
        started = now()
        assert await setup.served_by(stream=True) == "b"
        assert rescue_after <= now() - started <= rescue_after + 0.3
        await until(lambda: setup.idle() and not setup.ups[0].open_connections)
        assert (setup.failures(), setup.out()) == (0, "")
    # The time counts from the request's writing, which may come long after its lease.
    async with serving(LateHandshake(hang, 1), both, https="a", pool=pool) as setup:
        started = now()
        assert await setup.served_by(stream=True) == "b" and rescue_after + 0.9 < now() - started < rescue_after + 3


async def test_automatic_hedges_need_samples() -> None:
    """With fewer than twenty samples a request is never hedged; with them after ten seconds or three times the p99."""
    timeouts = {"timeouts": {"first_byte": 20}}
    async with serving(then([both] * 19 + [hang] + [after(4)] * 5, hang), both, each=timeouts, pool=PRIORITY) as setup:
        await setup.history(19)
        started = now()
        assert await setup.served_by(stream=True) == "b" and now() - started == pytest.approx(20, abs=0.5)
        await setup.history(5)
        started = now()
        assert await setup.served_by(stream=True) == "b" and now() - started == pytest.approx(12, abs=0.5)


@pytest.mark.parametrize("failure", [error_reply(500), limited("9"), in_stream("server_error"), error_reply(400)])
async def test_an_error_never_wins(failure: bytes) -> None:
    """A hedge that fails does not end the first attempt; its controller is judged and free at once."""
    async with serving(after(6), answers(failure), pool=HEDGED) as setup:
        task = setup.later(stream=True)
        await pause(3)
        assert setup.calls == [1, 1] and setup.state(1)["in_flight"] == 0 and setup.state(1)["last_error"]
        answer = await task
        assert (answer.status, answer.headers["x-apiserver-controller"]) == (200, "a")
        assert answer.headers["x-apiserver-attempts"] == "2" and setup.idle()


@pytest.mark.parametrize(
    ("scripts", "name", "calls"),
    [
        ([after(4), hang], "a", [1, 1]),
        ([after(3, error_reply(500)), after(1.5), both], "b", [1, 1, 0]),
        ([hang, answers(error_reply(500)), then([limited("9")]), both], "d", [1, 1, 1, 1]),
    ],
)
async def test_the_first_answer_wins(scripts: list[Script], name: str, calls: list[int]) -> None:
    """The first real answer is the answer; after a failed hedge the next controller is asked."""
    async with serving(*scripts, pool=HEDGED) as setup:
        started = now()
        assert await setup.served_by(stream=True) == name and setup.calls == calls
        assert now() - started < (3 if name == "d" else 7)
        await until(lambda: setup.idle() and not (name == "a" and setup.ups[1].running))
        assert calls != [1, 1] or setup.failures(1) == 0


async def test_a_hedge_answers_while_a_stale_connection_is_replaced() -> None:
    """Its answer is the answer, and the request is not sent again on the new connection."""

    async def goes_stale(peer: Peer, _: Message) -> None:
        await pause(0.9)
        peer.reset()

    slow_to_connect = LateHandshake(then([both, goes_stale], hang), 0, 3)
    pool = {"type": "priority", "rescue_after": 0.4}
    async with serving(slow_to_connect, after(0.6), https="a", pool=pool) as setup:
        assert await setup.served_by(stream=True) == "a"
        started = now()
        assert await setup.served_by(stream=True) == "b" and now() - started < 4.2
        assert setup.calls == [2, 1] and setup.idle()


@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_client_that_leaves_during_a_hedge_ends_both(how: str) -> None:
    """Both upstream connections are closed within 100 ms, and both places are free."""
    async with serving(hang, hang, pool=HEDGED) as setup:
        client = await setup.ask(stream=True)
        await pause(3)
        assert setup.calls == [1, 1]
        client.reset() if how == "reset" else client.writer.close()
        left = now()
        await until(lambda: setup.idle() and not any(upstream.open_connections for upstream in setup.ups))
        assert now() - left <= 0.1


@pytest.mark.parametrize(
    ("rescue_after", "more"), [(0, {"stream": True}), (2, {"stream": True, "store": True}), (2, {})]
)
async def test_what_is_never_hedged(rescue_after: int, more: dict[str, Any]) -> None:
    """Nothing is hedged with rescue_after 0, no stateful request, no whole answer of a controller that is in use."""
    async with serving(after(9), both, pool={"type": "priority", "rescue_after": rescue_after}) as setup:
        assert await setup.served_by(**more) == "a" and setup.calls == [1, 0]


async def test_how_many_hedges_there_are() -> None:
    """Of fifteen stuck streams ten are hedged in this minute, the others in the next; of many calls five percent."""
    endless = {"timeouts": {"first_byte": 0}}
    async with serving(hang, both, pool=HEDGED, each=endless) as setup:
        tasks = [setup.later(stream=True) for _ in range(15)]
        await pause(30)
        assert sum(task.done() for task in tasks) == 10 and setup.calls == [15, 10]
        await pause(35)
        assert sum(task.done() for task in tasks) == 15 and setup.calls == [15, 15]
    async with serving(then([both] * 400, hang), both, pool=HEDGED, each=endless) as setup:
        for _ in range(8):
            await asyncio.gather(*(setup.post(stream=True) for _ in range(50)))
        assert setup.calls == [400, 0]
        tasks = [setup.later(stream=True) for _ in range(30)]
        await pause(5)
        assert 18 <= sum(task.done() for task in tasks) <= 22
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- what is shown


async def test_headers_of_answers_and_the_record_of_attempts() -> None:
    """They tell the way of the request. After a failover the retry headers are the server's own."""
    async with serving(answers(error_reply(500)), then([limited("2")]), pool=PRIORITY) as setup:
        answer = await setup.post()
        assert (answer.headers["x-apiserver-controller"], answer.headers["x-apiserver-attempts"]) == ("b", "3")
        assert int(answer.headers["x-apiserver-wait-ms"]) == pytest.approx(2000, abs=20)
        assert answer.headers["x-request-id"] == answer.headers["x-apiserver-request-id"]
        (line,) = setup.server.access_lines()
        tried = line.split("tried=")[1].split()[0].split(",")
        assert [attempt.rpartition(":")[0] for attempt in tried] == ["a:fault", "b:rate", "b:ok"]
    replies = [error_reply(429, "x", "x", f"Retry-After: {after_s}", "x-should-retry: false") for after_s in (50, 40)]
    async with serving(*map(answers, replies)) as setup:
        answer = await setup.post()
        assert answer.headers["retry-after"] == "40" and "x-should-retry" not in answer.headers
        assert [name.lower() for name, _ in answer.fields].count("retry-after") == 1
    async with serving(answers(json_reply(200, ANSWER, "x-request-id: theirs"))) as setup:
        answer = await setup.post()
        assert answer.headers["x-request-id"] == "theirs" != answer.headers["x-apiserver-request-id"]
