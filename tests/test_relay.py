"""Relay: attempts, failover, the commit point, cuts, vanished clients; real sockets on both sides."""

import asyncio
import gzip
import json

import pytest

from chatgpt_apiserver import chunk

from .support import (
    ANSWER,
    MESSAGES,
    SSE_HEAD,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    request,
    sse_reply,
)
from .test_bounds import pause
from .wirefeed import turns

GOOD = json_reply(200, ANSWER)


@pytest.mark.parametrize("status", [401, 403, 408, 409, 429, 500, 502, 503, 529])
async def test_next_controller_after_a_failure(status: int) -> None:
    """A status that another account may not have sends the request on, once per controller."""
    async with Upstream(answers(error_reply(status))) as bad, Upstream(answers(GOOD)) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            found = await server.post()
            assert found.status == 200 and found.json() == ANSWER
            assert (found.headers["x-apiserver-controller"], found.headers["x-apiserver-attempts"]) == ("b", "2")
            assert (len(bad.seen), len(good.seen)) == (1, 1)


@pytest.mark.parametrize("status", [400, 404, 413, 422, 418])
async def test_a_clients_mistake_is_returned_as_it_is(status: int) -> None:
    """A 4xx about the request is never replayed, and its body comes back byte for byte."""
    body = b'{"error": {"message":"x",  "type":null,"param":null,"code":"c"}}'
    raw = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nX-Own: 1\r\n\r\n%b" % (status, len(body), body)
    async with Upstream(answers(raw)) as one, Upstream(answers(GOOD)) as other:
        async with Running(controller("a", one.url), controller("b", other.url)) as server:
            found = await server.post()
            assert (found.status, found.body, found.headers["x-own"]) == (status, body, "1")
            assert not other.seen


async def test_the_most_useful_answer_when_all_failed() -> None:
    """A 429 says more than a 500, and a 500 more than a 401."""
    replies = [error_reply(401), error_reply(500), error_reply(429, message="slow down")]
    async with Upstream(answers(*replies)) as one:
        async with Running(*(controller(name, one.url) for name in "abc"), pool={"max_wait": 0}) as server:
            found = await server.post()
            assert found.status == 429 and found.json()["error"]["message"] == "slow down"


async def test_unreachable_controllers_end_in_502() -> None:
    """With no answer to show, the client gets an OpenAI-style 502."""
    async with Running(controller("a", "http://127.0.0.1:9/v1")) as server:
        found = await server.post()
        assert found.status == 502 and found.json()["error"]["code"] == "upstream_unreachable"
        assert server.server.pool.upstreams[0].in_flight == 0


async def test_a_reset_before_the_reply_moves_on() -> None:
    """A fresh connection that is reset before any byte costs the client nothing."""

    async def script(peer: Peer, _: Message) -> None:
        peer.reset()

    async with Upstream(script) as bad, Upstream(answers(GOOD)) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            assert (await server.post()).status == 200


@pytest.mark.virtual_time
async def test_a_silent_upstream_stream_and_whole() -> None:
    """Silence past first_byte: a stream goes to the next controller, a whole answer gets 504 and is not replayed."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.gone()

    async with Upstream(script) as bad, Upstream(answers(GOOD)) as good:
        slow = controller("a", bad.url, timeouts={"first_byte": 5})
        async with Running(slow, controller("b", good.url)) as server:
            assert (await server.post()).status == 504
            await server.post()
            assert (await server.post(stream=True)).status == 200
            assert len(good.seen) == 2


async def test_events_leave_as_they_arrive_and_unchanged() -> None:
    """Each event is readable before the next one was sent; comments, CRLF and split UTF-8 stay as they were."""
    step = asyncio.Event()
    pieces = [b": hi\r\n\r\n" + event("one"), event("zwei \u00fc")[:-9], event("zwei \u00fc")[-9:], b"data: [DONE]\n\n"]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        for piece in pieces:
            await peer.chunk(piece)
            await step.wait()
            step.clear()
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url), controller("b", one.url)) as server:
        client = await server.open()
        await client.post(stream=True)
        assert (await client.read(head_only=True)).headers["transfer-encoding"] == "chunked"
        for piece in pieces:
            size = int(await client.reader.readline(), 16)
            assert (await client.reader.readexactly(size + 2))[:-2] == piece
            step.set()
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"
        client.close()


@pytest.mark.parametrize("cut", range(1, 280, 7))
async def test_a_stream_cut_into_any_pieces_relays_identically(cut: int) -> None:
    """Where the network cuts the upstream's bytes changes nothing in the body."""
    body = event("a\u00e9") + b": c\n\n" + event("b") + b"data: [DONE]\n\n"
    wire = SSE_HEAD + b"%x\r\n%b\r\n" % (len(body), body) + b"0\r\n\r\n"

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(wire[:cut])
        await asyncio.sleep(0)
        await peer.send(wire[cut:])

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        assert (await server.post(stream=True)).body == body


@pytest.mark.parametrize("cut", [False, True])
async def test_a_compressed_stream_passes_as_it_comes(cut: bool) -> None:
    """It has no events that could be waited for, so nobody else is asked; nor are words written into one that was cut."""
    step, packed = asyncio.Event(), gzip.compress(event("a"))

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer"))
        await peer.chunk(packed[:20])
        await step.wait()
        await peer.chunk(packed[20:])
        await peer.send(b"" if cut else b"0\r\n\r\n")
        peer.close()

    async with Upstream(script) as one, Upstream(script) as two:
        async with Running(controller("a", one.url), controller("b", two.url)) as server:
            client = await server.open()
            await client.post("m", stream=True)
            assert b"Content-Encoding: gzip" in await client.reader.readuntil(b"\r\n\r\n")
            assert await client.reader.readuntil(packed[:20] + b"\r\n")
            step.set()
            found = await client.reader.read() if cut else await client.reader.readuntil(b"0\r\n\r\n")
            assert found == chunk(packed[20:]) + (b"" if cut else b"0\r\n\r\n")
            assert server.server.pool.upstreams[0].failures == cut and not two.seen
            client.close()


@pytest.mark.parametrize("kind", [b"", b"Content-Type: text/plain\r\n", b"Content-Type: Text/Event-Stream\r\n"])
@pytest.mark.parametrize("count", [1, 2])
async def test_a_stream_is_one_whatever_its_type_says(kind: bytes, count: int) -> None:
    """Each event leaves as it comes; and what is no stream stays a whole answer, or an error that is judged."""
    step = asyncio.Event()
    head = SSE_HEAD.replace(b"Content-Type: text/event-stream\r\n", kind)

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(head, chunk(event("a")))
        await step.wait()
        await peer.send(chunk(event("b")), b"0\r\n\r\n")

    async with Upstream(script) as one:
        async with Running(*(controller(name, one.url) for name in "ab"[:count])) as server:
            client = await server.open()
            await client.post("m", stream=True)
            assert await client.reader.readuntil(chunk(event("a")))
            step.set()
            assert (await client.reader.readuntil(b"0\r\n\r\n")).startswith(chunk(event("b")))
            client.close()
    for body, calls in ((json.dumps(ANSWER).encode(), 1), (b'{"error":{"message":"no","code":"insufficient_quota"}}', 2)):
        bad = head.replace(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(body)) + body
        async with Upstream(answers(bad)) as one, Upstream(answers(GOOD)) as two:
            async with Running(*(controller(name, up.url) for name, up in (("a", one), ("b", two))), pool={"type": "priority"}) as server:
                found = await server.post(stream=True)
                assert found.json() == ANSWER and len(one.seen) + len(two.seen) == calls
                assert bool(server.server.pool.upstreams[0].quota.park_s) is (calls == 2)


async def test_a_cut_stream_is_told_honestly() -> None:
    """After the first event a cut ends in an error event, without the final chunk and without [DONE]."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("a"))
        peer.writer.close()

    async with Upstream(script) as one, Upstream(answers(GOOD)) as other:
        async with Running(controller("a", one.url), controller("b", other.url)) as server:
            client = await server.open()
            await client.post(stream=True)
            found = await client.closed()
            client.close()
            assert event("a") in found and b'data: {"error":{"message":' in found
            assert b"[DONE]" not in found and not found.endswith(b"0\r\n\r\n") and not other.seen


@pytest.mark.parametrize("first", [b'data: {"error":{"message":"overloaded"}}\n\n', b": only a comment\n\n", b""])
async def test_a_stream_that_fails_before_its_first_event_moves_on(first: bytes) -> None:
    """A 200 whose first event is an error, or that ends before one, is no answer while another controller is left."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        if first:
            await peer.chunk(first)
        peer.writer.close()

    async def good_script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(event("fine"))
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as bad, Upstream(good_script) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            assert (await server.post(stream=True)).body == event("fine")


async def test_a_whole_answer_cut_in_the_middle_moves_on() -> None:
    """A small whole answer is collected, so that a cut can still fail over."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(GOOD[:-5])
        peer.writer.close()

    async with Upstream(script) as bad, Upstream(answers(GOOD)) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            assert (await server.post()).json() == ANSWER


async def test_a_large_answer_streams_through_and_a_cut_aborts_it() -> None:
    """Above a megabyte the head goes out first; a cut then closes the connection short of Content-Length."""
    size = 3_000_000

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, b"x" * (size - 10))
        peer.writer.close()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post()
        assert (await client.read(head_only=True)).headers["content-length"] == str(size)
        assert len(await client.closed()) < size
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize("why", ["cut", "stop", "unread"])
async def test_what_http_1_0_gets_of_an_answer_never_looks_whole(why: str) -> None:
    """Where only the end of the connection ends an answer, one that was cut, by whomever, ends in a reset."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(80 if why == "unread" else 20):
            await peer.chunk(b"x" * 100_000)
        if why == "cut":
            peer.close()
        else:
            await peer.gone()

    more = {"drain_timeout": 2, "limits": {"write_timeout": 5}}
    async with Upstream(script) as one, Running(controller("a", one.url), **more) as server:
        client = await server.open()
        body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        await client.send(request(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b"200 OK" in await client.reader.readuntil(b"\r\n\r\n")
        stopping = asyncio.ensure_future(server.server.stop()) if why == "stop" else None
        if why == "unread":  # the reader stops at its limit
            while server.server.connections:
                await pause(0.5)
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
        client.close()
        if stopping:
            await stopping


@pytest.mark.parametrize("phase", ["before the head", "in the stream"])
@pytest.mark.parametrize("how", ["reset", "fin"])
async def test_a_vanished_client_closes_the_upstream(phase: str, how: str) -> None:
    """Whenever the client leaves, the upstream connection is closed at once."""
    got, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        if phase == "in the stream":
            await peer.send(SSE_HEAD)
            await peer.chunk(event("a"))
        got.set()
        if phase == "in the stream" and how == "fin":
            while not gone.is_set() and not peer.writer.is_closing():
                await peer.chunk(event("more"))
                await asyncio.sleep(0)
        await peer.gone()
        gone.set()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post(stream=True)
        await got.wait()
        if how == "reset":
            client.reset()
        else:
            client.writer.close()
        if phase == "before the head" or how == "reset":
            await asyncio.wait_for(gone.wait(), 5)
        while server.server.connections:
            await asyncio.sleep(0)
        assert server.server.pool.upstreams[0].in_flight == 0
        assert repr(server.server.links) == "<ConnectionPool idle=0 active=0>"
        server.server.access.flush()
        assert "attempts=1 " in server.lines[0] and "tried=a:gone:" in server.lines[0]  # also where it had begun


async def test_a_half_closed_client_gets_its_answer() -> None:
    """A FIN alone is no goodbye on HTTP/1.1: the client that still reads is answered."""
    half = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await half.wait()
        await peer.send(GOOD)

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post()
        client.writer.write_eof()
        assert await client.reader.readuntil(b"100 Continue\r\n\r\n")
        half.set()
        assert (await client.read()).json() == ANSWER
        client.close()


async def test_back_pressure_reaches_the_upstream() -> None:
    """A client that does not read stops the upstream from being read, so memory stays bounded."""
    sent = 0

    async def script(peer: Peer, _: Message) -> None:
        nonlocal sent
        await peer.send(SSE_HEAD)
        while sent < 200_000_000:
            await peer.chunk(b"data: " + b"x" * 65536 + b"\n\n")
            sent += 65536

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post(stream=True)
        before = -1
        while sent != before or not sent:
            before = sent
            for _ in range(300):
                await asyncio.sleep(0)
        assert 0 < sent < 40_000_000
        client.reset()


async def test_bodies_and_headers_pass_as_designed() -> None:
    """The body goes out as it came; credentials, cookies and hop-by-hop headers stop here, in both directions."""
    body = b'{ "model":"m", "messages":[{"role":"user","content":"\\u00e9"}], "x":1.0e5, "unknown":{"a":[]} }'
    answer = json_reply(200, ANSWER, "Set-Cookie: a=b", "X-Thing: 1", "Connection: X-Hop", "X-Hop: 1")
    async with Upstream(answers(answer)) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        lines = b"Authorization: Bearer mine\r\nCookie: c\r\nX-Forwarded-For: 1\r\nX-Keep: yes\r\nConnection: X-Own\r\nX-Own: 1\r\n"
        await client.send(
            b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
            % (lines, len(body), body)
        )
        found = await client.read()
        client.close()
        seen = one.seen[0]
        assert seen.body == body and seen.start == "POST /v1/chat/completions HTTP/1.1"
        assert seen.headers["authorization"] == "Bearer sk-secret-a-key" and seen.headers["x-keep"] == "yes"
        assert not {"cookie", "x-forwarded-for", "x-own"} & set(seen.headers)
        assert found.headers["x-thing"] == "1" and not {"set-cookie", "x-hop"} & set(found.headers)


async def test_go_clients_capitalised_keys() -> None:
    """`Model`, `Messages` and `Stream` go upstream in the API's spelling."""
    async with Upstream(answers(GOOD)) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        body = json.dumps({"Model": "m", "Messages": [{"Role": "user", "Content": "x"}], "Stream": False}).encode()
        await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert (await client.read()).status == 200
        client.close()
        assert one.seen[0].json() == {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": False}


async def test_an_echoed_key_is_struck_out() -> None:
    """OpenAI's 401 repeats part of the key; the client does not get to see it."""
    message = "Incorrect API key provided: sk-secre******-key. Or sk-secret-a-key."
    async with Upstream(answers(error_reply(401, "invalid_api_key", message))) as one:
        async with Running(controller("a", one.url)) as server:
            found = await server.post()
            assert found.status == 401 and b"sk-sec" not in found.body


async def test_controllers_take_turns() -> None:
    """With the balanced policy and weights 2 and 1 the answers come from a, b, a."""
    async with Upstream(answers(GOOD)) as one:
        async with Running(controller("a", one.url, weight=2), controller("b", one.url)) as server:
            names = [(await server.post()).headers["x-apiserver-controller"] for _ in range(6)]
            assert names == ["a", "b", "a", "a", "b", "a"]


async def test_a_redirect_is_never_followed() -> None:
    """A 3xx goes to the next controller; alone it becomes a 502 without the Location."""
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n"
    async with Upstream(answers(moved)) as one, Running(controller("a", one.url)) as server:
        found = await server.post()
        assert found.status == 502 and "location" not in found.headers


MAPPED = {"model_map": {"gpt-4.1": "mapped"}}


@pytest.mark.parametrize("raw", [error_reply(400), error_reply(500), b"nonsense\r\n\r\n"])
async def test_an_error_tells_which_model_was_asked_for(raw: bytes) -> None:
    """x-apiserver-model stands on an upstream's error and on ours about it, with the name that was sent last."""
    async with Upstream(answers(raw)) as one:
        async with Running(controller("a", one.url, **MAPPED), pool={"aliases": {"fast": "gpt-4.1"}}) as server:
            for name in ("gpt-4.1", "fast"):
                found = await server.post(name)
                assert found.status >= 400 and found.headers["x-apiserver-model"] == name + " -> mapped"
                assert found.headers["x-apiserver-controller"] == "a"
        async with Running(controller("a", one.url)) as server:
            assert "x-apiserver-model" not in (await server.post("gpt-4.1")).headers


async def test_the_error_that_is_shown_tells_its_own_model() -> None:
    """Of two refusals the one that is shown, not the last one, names controller and model."""
    async with Upstream(answers(error_reply(429))) as one, Upstream(answers(error_reply(401))) as other:
        async with Running(controller("a", one.url, **MAPPED), controller("b", other.url), pool={"max_wait": 0}) as server:
            found = await server.post("gpt-4.1")
            shown = found.headers["x-apiserver-controller"], found.headers["x-apiserver-model"]
            assert (found.status, shown) == (429, ("a", "gpt-4.1 -> mapped"))


FAILED = b'event: response.failed\ndata: {"type":"response.failed","response":{"id":"r","error":{"code":"server_error"}}}\n\n'
OVERLOADED = b'data: {"error":{"message":"overloaded","type":"overloaded_error","code":null}}\n\n'


@pytest.mark.parametrize(
    ("told", "failures"),
    [
        (OVERLOADED, 1),
        (OVERLOADED * 2, 1),
        (OVERLOADED[:-2], 1),
        (FAILED, 1),
        (b'event: error\ndata: {"type":"error","code":"server_error","message":"x","param":null}\n\n', 1),
        (b'data: {"error":{"message":"x","type":"invalid_request_error","code":"content_filter"}}\n\n', 0),
        (event('an \\"error\\" in words') + b'data: {"choices":[],"error":null}\n\n', 0),
    ],
)
@pytest.mark.parametrize("size", [5, 9, 4000])
async def test_an_error_in_the_middle_of_a_stream_counts(told: bytes, failures: int, size: int) -> None:
    """It passes unchanged, counts once against its controller however it is cut, and the access line tells it."""
    first = event("x")

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(first)
        for at in range(0, len(told), size):
            await peer.chunk(told[at : at + size])
            await turns(2)
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        assert (await server.post(stream=True)).body == first + told
        (upstream,) = server.server.pool.upstreams
        server.server.access.flush()
        assert upstream.failures == failures == len([one for one in upstream.recent if one[1]])
        assert ("tried=a:error:" in server.lines[0]) is (failures == 1 or b"content_filter" in told)


async def test_errors_in_streams_open_the_breaker() -> None:
    """A controller whose streams all fail in the middle gets none while another works."""
    async with Upstream(answers(SSE_HEAD + chunk(event("x") + OVERLOADED) + b"0\r\n\r\n")) as bad:
        async with Upstream(answers(GOOD)) as good:
            async with Running(controller("a", bad.url), controller("b", good.url)) as server:
                for _ in range(20):
                    await server.post(stream=True)
                assert len(bad.seen) == 5


EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: 0\r\n\r\n"
LATE_ERROR = b': hold the line\n\ndata: {"error":{"code":503}}\n\n'


@pytest.mark.parametrize(
    ("reply", "stream"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (EMPTY % b"application/json", False),
        (EMPTY % b"application/json", True),
        (EMPTY % b"text/event-stream", True),
        (EMPTY.replace(b": 0", b": %d" % len(LATE_ERROR)) % b"text/event-stream" + LATE_ERROR, True),
    ],
)
async def test_an_answer_of_nothing_is_none(reply: bytes, stream: bool) -> None:
    """A chat that ends before it says anything, or whose stream begins with an error, goes to the next controller."""
    good = sse_reply(event("a"), b"data: [DONE]\n\n") if stream else GOOD
    async with Upstream(answers(reply)) as bad, Upstream(answers(good)) as one:
        async with Running(controller("a", bad.url), controller("b", one.url), pool={"type": "priority"}) as server:
            found = await server.post(stream=stream)
            assert (found.status, found.headers["x-apiserver-controller"]) == (200, "b")


async def test_what_a_sole_controller_says_of_retries_is_passed_on() -> None:
    """Its error took neither waiting nor failover: on the real clock, too, where no two looks at it show the same time."""
    async with Upstream(answers(error_reply(500, None, "no", "x-should-retry: true"), error_reply(401))) as one:
        async with Running(controller("a", one.url)) as server:
            first, second = await server.post(), await server.post()
            assert (first.status, first.headers["x-should-retry"]) == (500, "true")
            assert second.status == 401 and "x-should-retry" not in second.headers
            server.server.access.flush()
            assert server.lines and "wait_ms=" not in "".join(server.lines)
