"""The way of an answer: events as they come, errors in streams, cuts, large answers, headers; real sockets on both sides."""

import asyncio
import gzip
import json

import pytest

from chatgpt_apiserver import chunk

from .support import (
    ANSWER,
    DONE,
    MESSAGES,
    SSE_HEAD,
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
    request,
    sse_reply,
    until,
)
from .wirefeed import turns

OK = json_reply(200, ANSWER)
PRIORITY = {"type": "priority"}


def steps(*pieces: bytes, step: asyncio.Event, close: bool = False) -> Script:
    """Return a script that sends the pieces, each after the first one when `step` is set."""

    async def script(peer: Peer, _: Message) -> None:
        for number, piece in enumerate(pieces):
            if number:
                await step.wait()
                step.clear()
            await peer.send(piece)
        if close:
            peer.close()

    return script


async def test_events_leave_as_they_arrive() -> None:
    """Each event is readable before the next one was sent; comments, CRLF and split UTF-8 stay as they were."""
    step, end = asyncio.Event(), b"0\r\n\r\n"
    pieces = [b": hi\r\n\r\n" + event("one"), event("zwei \u00fc")[:-9], event("zwei \u00fc")[-9:], b"data: [DONE]\n\n"]
    script = steps(SSE_HEAD + chunk(pieces[0]), *map(chunk, pieces[1:]), end, step=step)
    async with Upstream(script) as one, Running(controller("a", one.url), controller("b", one.url)) as server:
        client = await server.open()
        await client.post(stream=True)
        assert (await client.read(head_only=True)).headers["transfer-encoding"] == "chunked"
        for piece in (*map(chunk, pieces), end):
            assert await client.reader.readexactly(len(piece)) == piece
            step.set()
        client.close()


@pytest.mark.parametrize("cut", range(1, 280, 7))
async def test_a_stream_cut_anywhere_is_the_same_stream(cut: int) -> None:
    """The client gets the same body wherever the network cuts the upstream's bytes."""
    body = event("a\u00e9") + b": c\n\n" + event("b") + b"data: [DONE]\n\n"
    wire = sse_reply(body)

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(wire[:cut])
        await turns()
        await peer.send(wire[cut:])

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        assert (await server.post(stream=True)).body == body


@pytest.mark.parametrize("cut", [False, True])
async def test_a_compressed_stream_passes_as_it_comes(cut: bool) -> None:
    """The events of a compressed stream are not read: no other controller is asked, and a cut adds no error event."""
    step, packed = asyncio.Event(), gzip.compress(event("a"))
    first = SSE_HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer") + chunk(packed[:20])
    script = steps(first, chunk(packed[20:]) + (b"" if cut else b"0\r\n\r\n"), step=step, close=cut)
    async with Upstream(script) as one, Upstream(script) as two:
        async with Running(controller("a", one.url), controller("b", two.url)) as server:
            client = await server.open()
            await client.post("m", stream=True)
            assert b"Content-Encoding: gzip" in await client.reader.readuntil(b"\r\n\r\n")
            assert await client.reader.readuntil(packed[:20] + b"\r\n")
            step.set()
            data = await (client.reader.read() if cut else client.reader.readuntil(b"0\r\n\r\n"))
            assert data == chunk(packed[20:]) + (b"" if cut else b"0\r\n\r\n")
            assert (await server.status())["controllers"][0]["failures"] == cut and not two.seen
            client.close()


@pytest.mark.parametrize("kind", [b"", b"Content-Type: text/plain\r\n", b"Content-Type: Text/Event-Stream\r\n"])
@pytest.mark.parametrize("count", [1, 2])
async def test_a_stream_with_another_content_type(kind: bytes, count: int) -> None:
    """Events leave as they come under any content type; JSON instead of events is a whole answer or an error."""
    step, head = asyncio.Event(), SSE_HEAD.replace(b"Content-Type: text/event-stream\r\n", kind)
    async with Upstream(steps(head + chunk(event("a")), chunk(event("b") + DONE) + b"0\r\n\r\n", step=step)) as one:
        async with Running(*(controller(name, one.url) for name in "ab"[:count])) as server:
            client = await server.open()
            await client.post("m", stream=True)
            assert await client.reader.readuntil(chunk(event("a")))
            step.set()
            assert (await client.reader.readuntil(b"0\r\n\r\n")).startswith(chunk(event("b") + DONE))
            client.close()
    for body, name in ((json.dumps(ANSWER).encode(), "a"), (b'{"error":{"message":"no","code":"server_error"}}', "b")):
        raw = head.replace(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(body)) + body
        async with Upstream(answers(raw)) as one, Upstream(answers(OK)) as two:
            async with Running(controller("a", one.url), controller("b", two.url), pool=PRIORITY) as server:
                answer = await server.post(stream=True)
                assert answer.headers["x-apiserver-controller"] == name
                assert answer.json() == ANSWER if name == "a" else answer.body.endswith(DONE)


EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: 0\r\n\r\n"
LATE_ERROR = b': hold the line\n\ndata: {"error":{"code":503}}\n\n'


@pytest.mark.parametrize(
    ("raw", "stream"),
    [
        *((b"HTTP/1.1 204 No Content\r\n\r\n", False), (b"HTTP/1.1 204 No Content\r\n\r\n", True)),
        *(
            (EMPTY % b"application/json", False),
            (EMPTY % b"application/json", True),
            (EMPTY % b"text/event-stream", True),
        ),
        (EMPTY.replace(b": 0", b": %d" % len(LATE_ERROR)) % b"text/event-stream" + LATE_ERROR, True),
        *((SSE_HEAD, True), (SSE_HEAD + chunk(b": only a comment\n\n"), True), (OK[:-5], False)),
    ],
)
async def test_an_answer_without_content_moves_on(raw: bytes, stream: bool) -> None:
    """An answer that ends or is cut before it says anything, or a small one that is cut, goes to the next controller."""
    good = sse_reply(event("a"), b"data: [DONE]\n\n") if stream else OK
    async with Upstream(steps(raw, step=asyncio.Event(), close=True)) as bad, Upstream(answers(good)) as one:
        async with Running(controller("a", bad.url), controller("b", one.url), pool=PRIORITY) as server:
            answer = await server.post(stream=stream)
            assert (answer.status, answer.headers["x-apiserver-controller"]) == (200, "b")


@pytest.mark.virtual_time
@pytest.mark.parametrize("why", ["cut", "stop", "unread"])
async def test_a_cut_answer_never_looks_whole_to_http_1_0(why: str) -> None:
    """Where only the end of the connection ends an answer, a cut by the upstream, a stop or a timeout ends in a reset."""

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
        stopping = asyncio.ensure_future(server.server.drain()) if why == "stop" else None
        if why == "unread":  # the client's reader stops at its own limit
            await until(lambda: not server.server.connections)
        with pytest.raises(ConnectionResetError):
            await client.reader.read()
        client.close()
        if stopping:
            await stopping


async def test_a_body_goes_out_as_it_came() -> None:
    """Spaces, numbers and unknown fields of a body stay as they are; a client may leave out /v1."""
    body = b'{ "model":"m", "messages":[{"role":"user","content":"\\u00e9"}], "x":1.0e5, "unknown":{"a":[]} }'
    async with Upstream(answers(OK)) as one, Running(controller("a", one.url)) as server:
        assert (await server.ask("POST", "/chat/completions", body)).json() == ANSWER
        assert one.seen[0].body == body and one.seen[0].start == "POST /v1/chat/completions HTTP/1.1"


async def test_capitalised_keys_of_go_clients() -> None:
    """Keys that Go clients capitalise become lower case, in messages too; values stay."""
    body = b'{"Model":"M","Messages":[{"Role":"user","Content":"Hi"}],"Stream":false,"Max_Tokens":3,"Odd":{"Model":1}}'
    sent = {"model": "M", "messages": [{"role": "user", "content": "Hi"}], "stream": False, "max_tokens": 3}
    async with Upstream(answers(OK)) as one, Running(controller("a", one.url)) as server:
        assert (await server.ask("POST", "/v1/chat/completions", body)).status == 200
        await server.ask("POST", "/v1/chat/completions", b'{"model":"m","messages":[{"role":"user"}],"Stream":false}')
        assert one.seen[0].json() == {**sent, "odd": {"Model": 1}} and one.seen[1].json()["stream"] is False


MAPPED = {"model_map": {"gpt-4.1": "mapped"}}


@pytest.mark.parametrize("raw", [error_reply(400), error_reply(500), b"nonsense\r\n\r\n"])
async def test_an_error_names_the_model_that_was_sent(raw: bytes) -> None:
    """x-apiserver-model stands on an upstream's error, and on the server's own error about it."""
    async with Upstream(answers(raw)) as one:
        async with Running(controller("a", one.url, **MAPPED), pool={"aliases": {"fast": "gpt-4.1"}}) as server:
            for name in ("gpt-4.1", "fast"):
                answer = await server.post(name)
                assert answer.status >= 400 and answer.headers["x-apiserver-model"] == name + " -> mapped"
                assert answer.headers["x-apiserver-controller"] == "a"
        async with Running(controller("a", one.url)) as server:
            assert "x-apiserver-model" not in (await server.post("gpt-4.1")).headers


async def test_the_error_that_is_shown_names_its_own_model() -> None:
    """An answer after two refusals names controller and model of the refusal that the client gets, not of the last one."""
    async with Upstream(answers(error_reply(429))) as one, Upstream(answers(error_reply(401))) as other:
        mapped = controller("a", one.url, **MAPPED)
        async with Running(mapped, controller("b", other.url), pool={"max_wait": 0}) as server:
            answer = await server.post("gpt-4.1")
            shown = answer.headers["x-apiserver-controller"], answer.headers["x-apiserver-model"]
            assert (answer.status, shown) == (429, ("a", "gpt-4.1 -> mapped"))


FAILED = b'event: response.failed\ndata: {"type":"response.failed","response":{"id":"r","error":{"code":"server_error"}}}\n\n'
OVERLOADED = b'data: {"error":{"message":"overloaded","type":"overloaded_error","code":null}}\n\n'


@pytest.mark.parametrize(
    ("late", "failures"),
    [
        *((OVERLOADED, 1), (OVERLOADED * 2, 1), (OVERLOADED[:-2], 1), (FAILED, 1)),
        (b'event: error\ndata: {"type":"error","code":"server_error","message":"x","param":null}\n\n', 1),
        (b'data: {"error":{"message":"x","type":"invalid_request_error","code":"content_filter"}}\n\n', 0),
        (event('an \\"error\\" in words') + b'data: {"choices":[],"error":null}\n\n' + DONE, 0),
    ],
)
@pytest.mark.parametrize("size", [5, 9, 4000])
async def test_an_error_in_the_middle_of_a_stream(late: bytes, failures: int, size: int) -> None:
    """A late error event passes unchanged, counts once against its controller, and stands in the access line."""
    first = event("x")

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(first)
        for at in range(0, len(late), size):
            await peer.chunk(late[at : at + size])
            await turns(2)
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        assert (await server.post(stream=True)).body == first + late
        (line,) = server.access_lines()
        assert (await server.status())["controllers"][0]["failures"] == failures
        assert ("tried=a:error:" in line) is (failures == 1 or b"content_filter" in late)


async def test_retry_headers_of_a_sole_controller_are_passed_on() -> None:
    """An error without waiting or failover keeps the upstream's retry headers, and the access line has no wait."""
    async with Upstream(answers(error_reply(500, None, "no", "x-should-retry: true"), error_reply(401))) as one:
        async with Running(controller("a", one.url)) as server:
            first, second = await server.post(), await server.post()
            assert (first.status, first.headers["x-should-retry"]) == (500, "true")
            assert second.status == 401 and "x-should-retry" not in second.headers
            lines = server.access_lines()
            assert len(lines) == 2 and "wait_ms=" not in "".join(lines)
