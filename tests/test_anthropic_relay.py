"""Anthropic's accounts behind the relay: clients see OpenAI's API only, whatever comes and however it comes."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

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
    json_reply,
    request,
    sse_reply,
)
from .test_bounds import check_no_garbage
from .wirefeed import turns

STREAMS = Path(__file__).parent / "golden" / "anthropic" / "streams"
REPLY = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 5, "output_tokens": 2},
}
GOOD, OPENAI = json_reply(200, REPLY), json_reply(200, ANSWER)


def anthropic(name: str, one: Upstream, **more: Any) -> dict[str, Any]:
    """An anthropic controller of this upstream."""
    return {**controller(name, one.url, **more), "type": "anthropic"}


def error(status: int, kind: str, message: str = "no", *headers: str) -> bytes:
    """An error as the Messages API has it."""
    return json_reply(status, {"type": "error", "error": {"type": kind, "message": message}}, *headers)


def sse(kind: str, **more: Any) -> bytes:
    """One event of the Messages API."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **more}).encode())


START = sse("message_start", message={"id": "msg_1", "model": "claude-x", "usage": {"input_tokens": 5}})
STOP = sse("message_stop")
OVERLOADED = sse("error", error={"type": "overloaded_error", "message": "Overloaded"})


def text(word: str) -> bytes:
    """An event with this text."""
    return sse("content_block_delta", index=0, delta={"type": "text_delta", "text": word})


def contents(body: bytes) -> list[str]:
    """The texts of a chat stream."""
    found = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    return [chunk["choices"][0]["delta"].get("content") or "" for chunk in found if chunk.get("choices")]


async def test_a_whole_answer() -> None:
    """Request and answer are translated, and framed by what they have become; the connection serves again."""
    async with Upstream(answers(GOOD)) as one:
        async with Running(anthropic("a", one, model_map={"gpt-4.1": "claude-x"})) as server:
            for _ in range(2):
                found = await server.post("gpt-4.1", "Authorization: Bearer c", "anthropic-version: 1", max_tokens=9)
                assert found.status == 200 and found.headers["content-type"] == "application/json"
                given = found.json()
                assert given["object"] == "chat.completion" and given["choices"][0]["message"]["content"] == "hi"
                assert given["usage"]["total_tokens"] == 7 and len(found.body) == int(found.headers["content-length"])
        assert one.connections == 1
        seen = one.seen[0]
        assert seen.start == "POST /v1/messages HTTP/1.1"
        assert seen.headers["x-api-key"] == "sk-secret-a-key" and "authorization" not in seen.headers
        assert [value for name, value in seen.fields if name == "anthropic-version"] == ["2023-06-01"]
        asked = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        assert seen.json() == {"model": "claude-x", "max_tokens": 9, "messages": asked}


async def test_what_the_configuration_adds() -> None:
    """Its own limit, its own fields over the translation, its own headers."""
    account = {"max_tokens": 77, "thinking": "adaptive", "extra_body": {"service_tier": "standard_only"}}
    account["headers"] = {"anthropic-version": "2099-01-01", "anthropic-beta": "x"}
    async with Upstream(answers(GOOD)) as one, Running(anthropic("a", one, account=account)) as server:
        assert (await server.post(max_tokens=20, reasoning_effort="low")).status == 200
        assert (await server.post()).status == 200
        first, second = (seen.json() for seen in one.seen)
        assert first["thinking"] == {"type": "adaptive"} and first["service_tier"] == "standard_only"
        assert (first["max_tokens"], second["max_tokens"]) == (20, 77)
        assert [value for name, value in one.seen[0].fields if name.startswith("anthropic")] == ["2099-01-01", "x"]


@pytest.mark.parametrize("size", [1, 50, 500])
async def test_a_whole_answer_in_chunks(size: int) -> None:
    """An answer without a length, in pieces, becomes one with a length."""
    body = json.dumps(REPLY).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [app.chunk(body[at : at + size]) for at in range(0, len(body), size)]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(head, *chunks, b"0\r\n\r\n")

    async with Upstream(script) as one, Running(anthropic("a", one)) as server:
        found = await server.post()
        assert found.json()["choices"][0]["message"]["content"] == "hi" and "content-length" in found.headers


async def test_events_leave_as_they_arrive() -> None:
    """Each event is translated and readable before the next one was sent."""
    step = asyncio.Event()
    words = ["one", "zwei ü", "three"]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(START)
        for word in words:
            await peer.chunk(text(word))
            await step.wait()
            step.clear()
        await peer.chunk(STOP)
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(anthropic("a", one), anthropic("b", one)) as server:
        client = await server.open()
        await client.post(stream=True)
        head = await client.read(head_only=True)
        assert head.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert head.headers["transfer-encoding"] == "chunked" and "content-length" not in head.headers
        for word in words:
            size = int(await client.reader.readline(), 16)
            assert contents((await client.reader.readexactly(size + 2))[:-2]) == [word]
            step.set()
        assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        client.close()


@pytest.mark.parametrize("others", [0, 1])
async def test_a_stream_ends_once(others: int) -> None:
    """What follows a stream on the client's connection is the next answer, and the upstream's serves again."""
    pieces = (START, sse("ping"), text("a"), sse("ping"), sse("message_delta", delta={}), STOP, sse("ping"))
    async with Upstream(answers(sse_reply(*pieces))) as one:
        async with Running(anthropic("a", one), *[anthropic("b", one)] * others, pool={"type": "priority"}) as server:
            client = await server.open()
            for _ in range(3):
                await client.post(stream=True)
                found = await client.read()
                assert found.status == 200 and found.body.endswith(b"data: [DONE]\n\n")
            client.close()
        assert one.connections == 1


@pytest.mark.parametrize("path", sorted(STREAMS.glob("t*.sse")), ids=lambda path: path.stem)
async def test_recorded_streams(path: Path) -> None:
    """What comes out is the golden translation, whatever the pieces, with and without somebody to fail over to."""
    came, given = path.read_bytes(), path.with_suffix(".out").read_bytes()
    more = {"stream_options": {"include_usage": True}} if ".usage" in path.name else {}
    for cut in range(1, len(came), 97):
        pieces = (came[:cut], came[cut : cut + 3], came[cut + 3 :])
        async with Upstream(answers(sse_reply(*filter(None, pieces)))) as one:
            others = [anthropic("b", one)] * (cut % 2)
            async with Running(anthropic("a", one), *others) as server:
                found = (await server.post(stream=True, **more)).body
        created = json.loads(found[6 : found.index(b"\n")])["created"]
        assert found.replace(b'"created":%d' % created, b'"created":1700000000') == given


@pytest.mark.parametrize("how", ["end", "close", "reset", "length"])
async def test_a_cut_stream_is_told_honestly(how: str) -> None:
    """A stream without its last event ends in an error event and a closed connection, however it ended."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(START + text("a"))
        if how == "end":
            await peer.send(b"0\r\n\r\n")
        elif how == "reset":
            await asyncio.sleep(0)
            peer.reset()
        else:
            await peer.chunk(text("b")[:40] if how == "length" else text("b"))
            peer.close()

    async with Upstream(script) as one, Running(anthropic("a", one), anthropic("b", one)) as server:
        client = await server.open()
        await client.post(stream=True)
        found = await client.closed()
        client.close()
        assert b'"content":"a"' in found and b'data: {"error":{"message":' in found
        assert b"[DONE]" not in found and b'"finish_reason":"stop"' not in found and not found.endswith(b"0\r\n\r\n")
        assert server.server.pool.upstreams[0].failures == 1


BARE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "wire", [BARE_HEAD + START + text("a") + STOP[:-1], SSE_HEAD + app.chunk(START + text("a") + STOP)]
)
async def test_a_cut_after_the_last_event_does_no_harm(wire: bytes) -> None:
    """Once message_stop came, with its blank line or without, the answer is whole; its framing is no matter."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(wire)
        peer.close()

    async with Upstream(script) as one:
        for others in ([], [anthropic("b", one)]):
            async with Running(anthropic("a", one), *others) as server:
                found = await server.post(stream=True)
                assert found.body.endswith(b"data: [DONE]\n\n") and contents(found.body)[0] == "a"
                assert server.server.pool.upstreams[0].failures == 0


async def test_an_error_in_the_middle_is_told() -> None:
    """An error event after the first content comes in OpenAI's form, and nothing after it."""
    async with Upstream(answers(sse_reply(START, text("a"), OVERLOADED))) as one:
        async with Running(anthropic("a", one)) as server:
            found = (await server.post(stream=True)).body
            last = json.loads(found.split(b"\n\n")[-2][6:])["error"]
            assert (last["type"], last["code"], last["message"]) == ("server_error", "overloaded_error", "Overloaded")
            assert b"[DONE]" not in found and b'"finish_reason":"stop"' not in found


@pytest.mark.parametrize(
    "bad",
    [
        error(529, "overloaded_error"),
        error(500, "api_error"),
        error(429, "rate_limit_error"),
        error(401, "authentication_error"),
        error(402, "billing_error"),
        error(404, "not_found_error", "model: claude-9"),
        error(400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
        sse_reply(START, sse("ping"), OVERLOADED),
        sse_reply(START),
        json_reply(200, {"type": "error", "error": {"type": "api_error", "message": "x"}}),
        json_reply(200, {"hello": "world"}),
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=range(13),
)
@pytest.mark.parametrize("stream", [False, True])
async def test_another_account_is_asked(bad: bytes, stream: bool) -> None:
    """Whatever another account may not have sends the request on, before anything was shown."""
    good = sse_reply(START, text("a"), STOP) if stream else GOOD
    async with Upstream(answers(bad)) as one, Upstream(answers(good)) as two:
        async with Running(anthropic("a", one), anthropic("b", two)) as server:
            found = await server.post(stream=stream)
            assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"


@pytest.mark.parametrize(
    ("bad", "status", "code"),
    [
        (error(529, "overloaded_error"), 503, "overloaded_error"),
        (error(400, "invalid_request_error", "max_tokens: 9 > 8"), 400, None),
        (error(400, "invalid_request_error", "prompt is too long: 9 tokens"), 400, "context_length_exceeded"),
        (error(400, "invalid_request_error", "Your credit balance is too low"), 429, "insufficient_quota"),
        (error(413, "request_too_large"), 413, "request_too_large"),
        (error(429, "rate_limit_error", "slow", "retry-after: 7"), 429, "rate_limit_exceeded"),
        (error(404, "not_found_error", "model: x"), 404, "model_not_found"),
    ],
)
async def test_errors_are_openais(bad: bytes, status: int, code: "str | None") -> None:
    """What is shown has OpenAI's status and form, and the upstream's words."""
    async with Upstream(answers(bad)) as one:
        async with Running(anthropic("a", one), pool={"max_wait": 0}) as server:
            found = await server.post()
            assert found.status == status and found.json()["error"]["code"] == code
            assert found.headers["content-type"] == "application/json"
            assert found.headers.get("retry-after") in (None, "7", "300")


async def test_an_empty_purse_is_parked() -> None:
    """A balance that is too low closes the account for minutes."""
    bad = error(400, "invalid_request_error", "Your credit balance is too low")
    async with Upstream(answers(bad)) as one, Upstream(answers(GOOD)) as two:
        async with Running(anthropic("a", one), anthropic("b", two)) as server:
            for _ in range(4):
                assert (await server.post()).status == 200
            assert len(one.seen) == 1 and server.server.pool.upstreams[0].quota.park_s


async def test_limits_are_learned() -> None:
    """Its rate-limit headers reach the ledger."""
    fields = ["limit: 50", "remaining: 40", "reset: 2999-01-01T00:00:00Z"]
    rate = [f"anthropic-ratelimit-{unit}-{field}" for unit in ("requests", "tokens") for field in fields]
    async with Upstream(answers(json_reply(200, REPLY, *rate))) as one:
        async with Running(anthropic("a", one)) as server:
            await server.post()
            (ledger,) = server.server.pool.upstreams[0].quota.ledgers.values()
            assert ledger.requests is not None and ledger.requests.limit == 50
            assert ledger.tokens is not None and ledger.tokens.limit == 50


async def test_the_limit_that_binds_is_learned() -> None:
    """Input and output have limits of their own: the emptier one fills the bucket, and a client sees all of them."""
    told = {"tokens": (96_000, 90_000), "input-tokens": (80_000, 80_000), "output-tokens": (16_000, 1_600)}
    rate = [
        f"anthropic-ratelimit-{kind}-{end}: {value}"
        for kind, values in told.items()
        for end, value in zip(("limit", "remaining", "reset"), (*values, "2999-01-01T00:00:00Z"), strict=True)
    ]
    async with Upstream(answers(json_reply(200, REPLY, *rate))) as one:
        async with Running(anthropic("a", one)) as server:
            found = await server.post()
            assert found.headers["anthropic-ratelimit-output-tokens-remaining"] == "1600"
            assert not [name for name in found.headers if name.startswith("x-ratelimit")]
            (ledger,) = server.server.pool.upstreams[0].quota.ledgers.values()
            shown = app.describe_ledger(ledger, server.server.loop.time())["tokens"]
            assert shown["limit"] == 96_000 and 9_000 <= shown["left"] <= 10_000


@pytest.mark.parametrize("field", ["cache_read_input_tokens", "cache_creation_input_tokens"])
async def test_a_configured_limit_counts_no_cached_tokens(field: str) -> None:
    """What the prompt cache gives takes nothing of the account's limit, what it takes in does: `tpm` is the same."""
    usage = {"input_tokens": 5, field: 5000, "output_tokens": 2}
    async with Upstream(answers(json_reply(200, {**REPLY, "usage": usage}))) as one:
        limited = anthropic("a", one, limits={"tpm": 1000})
        async with Running(limited, pool={"max_wait": 0}) as server:
            found = [(await server.post(max_tokens=9)).status for _ in range(3)]
            assert found == ([200] * 3 if field == "cache_read_input_tokens" else [200, 429, 429])
            assert (await server.post(max_tokens=9)).status == found[-1]


GZIPPED = ("Content-Encoding: gzip", "retry-after: 7")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_answer(stream: bool) -> None:
    """What is compressed unasked cannot be translated: a sole account's client gets a clear 502, and its breaker
    counts."""
    async with Upstream(answers(json_reply(200, REPLY, *GZIPPED))) as one, Running(anthropic("a", one)) as server:
        found = await server.post(stream=stream)
        assert found.status == 502 and "compressed" in found.json()["error"]["message"]
        assert "content-encoding" not in found.headers
        assert server.server.pool.upstreams[0].failures == 1


async def test_a_compressed_error_still_has_a_status() -> None:
    """A 429 whose words cannot be read is a rate limit all the same, and its Retry-After counts."""
    async with Upstream(answers(json_reply(429, {}, *GZIPPED))) as one:
        async with Running(anthropic("a", one), pool={"max_wait": 0}) as server:
            found = await server.post()
            assert found.status == 429 and found.headers["retry-after"] == "7"
            assert found.json()["error"]["type"] == "rate_limit_error" and "content-encoding" not in found.headers
            assert server.server.pool.upstreams[0].failures == 0


async def test_what_cannot_be_said_is_refused_before_anything_is_sent() -> None:
    """A sole account answers 400 with the field's name; nothing is held against it."""
    async with Upstream(answers(GOOD)) as one, Running(anthropic("a", one)) as server:
        for _ in range(12):
            found = await server.post(n=2)
            assert found.status == 400 and found.json()["error"]["param"] == "n"
            assert found.json()["error"]["code"] == "unsupported_parameter"
        assert not one.seen
        upstream = server.server.pool.upstreams[0]
        assert (upstream.failures, upstream.out_why, upstream.in_flight, len(upstream.recent)) == (0, "", 0, 0)
        assert (await server.post()).status == 200


@pytest.mark.parametrize("last", ["openai", "drops"])
async def test_an_account_that_can_say_it_is_asked(last: str) -> None:
    """The next one that has words for it gets it: of another kind, or one that may drop the field."""
    async with Upstream(answers(GOOD)) as one, Upstream(answers(OPENAI if last == "openai" else GOOD)) as two:
        able = anthropic("c", two, account={"drop_params": ["n"]}) if last == "drops" else controller("c", two.url)
        async with Running(anthropic("a", one), anthropic("b", one), able) as server:
            for _ in range(5):
                found = await server.post(n=2)
                assert found.status == 200 and found.headers["x-apiserver-controller"] == "c"
        assert not one.seen and two.seen[0].json().get("n", 0) == (2 if last == "openai" else 0)


async def test_it_is_not_waited_for_in_vain() -> None:
    """Who cannot say it is not waited for while it is busy; the failure of the others is the answer."""
    busy = error(429, "rate_limit_error", "slow", "retry-after: 9")
    async with Upstream(answers(busy)) as one, Upstream(answers(json_reply(500, {"error": {"message": "x"}}))) as two:
        async with Running(anthropic("a", one), controller("b", two.url), pool={"type": "priority"}) as server:
            assert (await server.post(n=2)).status == 500
            assert not one.seen


@pytest.mark.virtual_time
async def test_a_rescue_that_cannot_be_said(caplog: pytest.LogCaptureFixture) -> None:
    """A rescue by an account without words for the request is no failure of anybody."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.gone()

    async with Upstream(script) as one, Upstream(answers(GOOD)) as two:
        pool = {"type": "priority", "rescue_after": 1}
        with caplog.at_level(logging.WARNING, "chatgpt_apiserver"):
            async with Running(controller("a", one.url), anthropic("b", two), pool=pool) as server:
                found = await server.post(stream=True, n=2)
                assert found.status == 504 and not two.seen
                assert server.server.pool.upstreams[1].failures == server.server.pool.upstreams[1].in_flight == 0
                server.server.access.flush()
                assert "b:unfit" in "".join(server.lines)
        assert "a rescue failed" not in caplog.text


async def test_a_stream_that_ended_is_no_garbage() -> None:
    """A translated stream keeps nothing alive, neither itself nor its connections."""
    wire = sse_reply(START, text("a"), STOP)

    async def script(peer: Peer, _: Message) -> None:
        for piece in (wire[:-40], wire[-40:]):  # the first event alone would be no stream that is piped
            await peer.send(piece)
            await turns()

    body = json.dumps({"model": "m", "stream": True, "messages": MESSAGES}).encode()
    await check_no_garbage(script, request(body, "Connection: close"), "anthropic")


async def test_a_client_that_reads_slowly() -> None:
    """The upstream is held back while the client does not read, and nothing is lost."""
    words = ["%d %s" % (number, "x" * 2000) for number in range(2000)]
    sent = 0

    async def script(peer: Peer, _: Message) -> None:
        nonlocal sent
        await peer.send(SSE_HEAD)
        await peer.chunk(START)
        for word in words:
            await peer.chunk(text(word))
            sent += 1
        await peer.chunk(STOP)
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(anthropic("a", one)) as server:
        client = await server.open()
        client.writer.transport.pause_reading()
        await client.post(stream=True)
        before = -1
        while before != sent or not sent:
            before = sent
            for _ in range(200):
                await asyncio.sleep(0)
        client.writer.transport.resume_reading()
        assert contents((await client.read()).body)[: len(words)] == words
        client.close()


async def test_models_are_listed_in_openais_form() -> None:
    """The account's models come with all four fields that the API demands."""
    listed = {"data": [{"type": "model", "id": "claude-x", "display_name": "X", "created_at": "2025-01-01T00:00:00Z"}]}
    async with Upstream(answers(json_reply(200, listed))) as one, Running(anthropic("a", one)) as server:
        client = await server.open()
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        (model,) = (await client.read()).json()["data"]
        client.close()
        assert (model["id"], model["object"], model["owned_by"]) == ("claude-x", "model", "chatgpt-apiserver")
        assert one.seen[0].start == "GET /v1/models?limit=1000 HTTP/1.1"
        assert one.seen[0].headers["anthropic-version"] == "2023-06-01"


async def test_other_calls_go_elsewhere() -> None:
    """What has no place in the Messages API is not sent there."""
    async with Upstream(answers(GOOD)) as one, Upstream(answers(json_reply(200, {"data": []}))) as two:
        async with Running(anthropic("a", one), controller("b", two.url)) as server:
            for _ in range(3):
                client = await server.open()
                await client.send(request(b'{"model":"m","input":"x"}', target="/v1/embeddings"))
                assert (await client.read()).status == 200
                client.close()
        assert not one.seen


async def test_an_endless_event_ends() -> None:
    """An event that never ends is not kept for ever."""
    pieces = [START + text("a"), *(b"data: " + b"x" * 65536 for _ in range(20))]
    async with Upstream(answers(sse_reply(*pieces))) as one, Running(anthropic("a", one)) as server:
        assert b"an event of more than" in (await server.post(stream=True)).body


async def test_an_error_in_the_middle_of_a_translated_stream_counts() -> None:
    """Overloaded after the first words is a failure of that account."""
    async with Upstream(answers(sse_reply(START, text("x"), OVERLOADED))) as one:
        async with Running(anthropic("a", one)) as server:
            assert b'data: {"error":{"message":"Overloaded"' in (await server.post(stream=True)).body
            server.server.access.flush()
            assert server.server.pool.upstreams[0].failures == 1 and "tried=a:error:" in server.lines[0]
