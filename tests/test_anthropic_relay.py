"""Anthropic's accounts behind the relay: clients see OpenAI's API only, whatever the upstream sends and however."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    SSE_HEAD,
    Listing,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    json_reply,
    sse_reply,
)

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
OK, OPENAI = json_reply(200, REPLY), json_reply(200, ANSWER)


def anthropic(name: str, upstream: Upstream, **more: Any) -> dict[str, Any]:
    """Return an anthropic controller of this upstream."""
    return {**controller(name, upstream.url, **more), "type": "anthropic"}


def error(status: int, kind: str, message: str = "no", *headers: str) -> bytes:
    """Return an error of the Messages API."""
    return json_reply(status, {"type": "error", "error": {"type": kind, "message": message}}, *headers)


def sse(kind: str, **more: Any) -> bytes:
    """Return one event of the Messages API."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **more}).encode())


START = sse("message_start", message={"id": "msg_1", "model": "claude-x", "usage": {"input_tokens": 5}})
STOP = sse("message_stop")
OVERLOADED = sse("error", error={"type": "overloaded_error", "message": "Overloaded"})
DONE = b"data: [DONE]\n\n"
GZIPPED = ("Content-Encoding: gzip", "retry-after: 7")


def text(word: str) -> bytes:
    """Return an event with this text."""
    return sse("content_block_delta", index=0, delta={"type": "text_delta", "text": word})


def contents(body: bytes) -> list[str]:
    """Return the texts of a chat stream."""
    found = [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    return [chunk["choices"][0]["delta"].get("content") or "" for chunk in found if chunk.get("choices")]


async def state(server: Running, index: int = 0) -> dict[str, Any]:
    """Return what /status shows of a controller."""
    shown: dict[str, Any] = (await server.status())["controllers"][index]
    return shown


@pytest.mark.parametrize("size", [None, 1, 50])
async def test_a_whole_answer(size: int | None) -> None:
    """Request and answer, in chunks or not, are translated, and framed anew; the connection is used again."""
    body = json.dumps(REPLY).encode()
    chunks = b"".join(app.chunk(body[at : at + size]) for at in range(0, len(body), size)) if size else b""
    chunked = SSE_HEAD.replace(b"text/event-stream", b"application/json") + chunks + b"0\r\n\r\n"
    async with Upstream(answers(chunked if size else OK)) as one:
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
        messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        assert seen.json() == {"model": "claude-x", "max_tokens": 9, "messages": messages}


async def test_a_stream_where_a_whole_answer_was_asked_for() -> None:
    """Its events are joined, with thinking, usage and ending."""
    thinking = sse("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "so"})
    async with Upstream(answers(sse_reply(START, thinking, text("h"), text("i"), STOP))) as one:
        async with Running(anthropic("a", one)) as server:
            found = await server.post()
            message = {"role": "assistant", "content": "hi", "reasoning_content": "so"}
            assert found.json()["choices"][0]["message"] == message
            assert found.json()["usage"]["prompt_tokens"] == 5 and found.json()["object"] == "chat.completion"


async def test_what_the_configuration_adds() -> None:
    """The account's max_tokens, extra_body and headers are added to the translated request."""
    account = {"max_tokens": 77, "thinking": "adaptive", "extra_body": {"service_tier": "standard_only"}}
    account["headers"] = {"anthropic-version": "2099-01-01", "anthropic-beta": "x"}
    async with Upstream(answers(OK)) as one, Running(anthropic("a", one, account=account)) as server:
        assert [(await server.post(**more)).status for more in ({"max_tokens": 20, "reasoning_effort": "low"}, {})] == [
            200
        ] * 2
        first, second = (seen.json() for seen in one.seen)
        assert first["thinking"] == {"type": "adaptive"} and first["service_tier"] == "standard_only"
        assert (first["max_tokens"], second["max_tokens"]) == (20, 77)
        assert [value for name, value in one.seen[0].fields if name.startswith("anthropic")] == ["2099-01-01", "x"]


async def test_events_leave_as_they_arrive() -> None:
    """Each event is translated and can be read before the next one was sent."""
    step = asyncio.Event()
    words = ["one", "zwei ü", "three"]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD + app.chunk(START))
        for word in words:
            await peer.chunk(text(word))
            await step.wait()
            step.clear()
        await peer.send(app.chunk(STOP) + b"0\r\n\r\n")

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
        assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(DONE + b"\r\n0\r\n\r\n")
        client.close()


@pytest.mark.parametrize("path", sorted(STREAMS.glob("t*.sse")), ids=lambda path: path.stem)
async def test_golden_streams_through_the_relay(path: Path) -> None:
    """The client gets the golden translation, whatever the pieces, with and without a second controller."""
    came, given = path.read_bytes(), path.with_suffix(".out").read_bytes()
    more = {"stream_options": {"include_usage": True}} if ".usage" in path.name else {}
    for cut in range(1, len(came), 97):
        pieces = (came[:cut], came[cut : cut + 3], came[cut + 3 :])
        async with Upstream(answers(sse_reply(*filter(None, pieces)))) as one:
            async with Running(anthropic("a", one), *[anthropic("b", one)] * (cut % 2)) as server:
                found = (await server.post(stream=True, **more)).body
        created = json.loads(found[6 : found.index(b"\n")])["created"]
        assert found.replace(b'"created":%d' % created, b'"created":1700000000') == given


@pytest.mark.parametrize("how", ["end", "close", "reset", "half"])
async def test_a_cut_stream_ends_with_an_error(how: str) -> None:
    """A stream without its last event ends in an error event and a closed connection, however it was cut."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD + app.chunk(START + text("a")))
        if how == "end":
            await peer.send(b"0\r\n\r\n")
        elif how == "reset":
            await asyncio.sleep(0)
            peer.reset()
        else:
            await peer.chunk(text("b")[:40] if how == "half" else text("b"))
            peer.close()

    async with Upstream(script) as one, Running(anthropic("a", one), anthropic("b", one)) as server:
        client = await server.open()
        await client.post(stream=True)
        found = await client.closed()
        client.close()
        assert b'"content":"a"' in found and b'data: {"error":{"message":' in found
        assert b"[DONE]" not in found and b'"finish_reason":"stop"' not in found and not found.endswith(b"0\r\n\r\n")
        assert (await state(server))["failures"] == 1


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("others", [0, 1])
async def test_a_cut_after_the_last_event_does_no_harm(bare: bool, others: int) -> None:
    """After message_stop, with or without its blank line, the answer is whole, however the connection ends."""
    events = START + text("a") + STOP
    bare_head = SSE_HEAD.replace(b"Transfer-Encoding: chunked", b"Connection: close")

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(bare_head + events[:-1] if bare else SSE_HEAD + app.chunk(events))
        peer.close()

    async with Upstream(script) as one:
        async with Running(anthropic("a", one), *[anthropic("b", one)] * others) as server:
            found = await server.post(stream=True)
            assert found.body.endswith(DONE) and contents(found.body)[0] == "a"
            assert (await state(server))["failures"] == 0


async def test_an_error_in_the_middle_of_a_stream() -> None:
    """An error event after the first content comes in OpenAI's form, ends the stream, and counts as a failure."""
    async with Upstream(answers(sse_reply(START, text("a"), OVERLOADED))) as one:
        async with Running(anthropic("a", one)) as server:
            found = (await server.post(stream=True)).body
            last = json.loads(found.split(b"\n\n")[-2][6:])["error"]
            assert (last["type"], last["code"], last["message"]) == ("server_error", "overloaded_error", "Overloaded")
            assert b"[DONE]" not in found and b'"finish_reason":"stop"' not in found
            assert (await state(server))["failures"] == 1 and "tried=a:error:" in server.access_lines()[0]


@pytest.mark.parametrize(
    ("bad", "status", "code", "waits"),
    [
        (error(529, "overloaded_error"), 503, "overloaded_error", None),
        (error(429, "rate_limit_error", "slow", "retry-after: 7"), 429, "rate_limit_exceeded", "7"),
        (error(402, "billing_error"), 429, "insufficient_quota", "300"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 6\r\n\r\n<html>", 502, None, None),  # no word of the API
        (error(400, "invalid_request_error", "prompt is too long: 9 tokens"), 400, "context_length_exceeded", None),
        (error(400, "invalid_request_error", "Your credit balance is too low"), 429, "insufficient_quota", "300"),
        (json_reply(429, {}, *GZIPPED), 429, None, "7"),  # a compressed error still has a status and a Retry-After
        (json_reply(200, REPLY, *GZIPPED), 502, "upstream_bad_reply", None),  # an answer compressed unasked
        (json_reply(200, {"type": "error", "error": {"type": "api_error"}}), 502, "upstream_bad_reply", None),
        (b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n", 503, None, None),
    ],
    ids=range(10),
)
async def test_errors_are_openais(bad: bytes, status: int, code: str | None, waits: str | None) -> None:
    """The client gets OpenAI's status and form; with a second account, it gets that one's answer instead."""
    async with Upstream(answers(bad)) as one, Upstream(answers(OK)) as two:
        async with Running(anthropic("a", one), pool={"max_wait": 0}) as server:
            found = await server.post()
            assert found.status == status and found.json()["error"]["code"] == code
            assert found.headers["content-type"] == "application/json" and "content-encoding" not in found.headers
            assert found.headers.get("retry-after") == waits
        async with Running(anthropic("a", one), anthropic("b", two)) as server:
            found = await server.post()
            assert found.headers["x-apiserver-controller"] == ("a" if code == "context_length_exceeded" else "b")


@pytest.mark.parametrize(
    "bad",
    [error(401, "authentication_error"), sse_reply(START, sse("ping"), OVERLOADED), sse_reply(START), json_reply(200, {})],
    ids=range(4),
)
async def test_another_account_streams(bad: bytes) -> None:
    """A failure before the first content moves a stream on, before the client gets anything."""
    async with Upstream(answers(bad)) as one, Upstream(answers(sse_reply(START, text("a"), STOP))) as two:
        async with Running(anthropic("a", one), anthropic("b", two)) as server:
            found = await server.post(stream=True)
            assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"


async def test_limits_are_learned() -> None:
    """The rate-limit headers reach the ledger, and the client gets them as they are."""
    told = {"requests": (50, 40), "tokens": (96_000, 90_000), "output-tokens": (16_000, 1_600)}
    rate = []
    for kind, (limit, left) in told.items():
        values = {"limit": limit, "remaining": left, "reset": "2999-01-01T00:00:00Z"}
        rate += [f"anthropic-ratelimit-{kind}-{end}: {value}" for end, value in values.items()]
    async with Upstream(answers(json_reply(200, REPLY, *rate))) as one, Running(anthropic("a", one)) as server:
        found = await server.post()
        assert found.headers["anthropic-ratelimit-output-tokens-remaining"] == "1600"
        assert not [name for name in found.headers if name.startswith("x-ratelimit")]
        (shown,) = (await state(server))["ledger"].values()
        assert shown["requests"]["limit"] == 50 and shown["tokens"]["limit"] == 96_000


@pytest.mark.parametrize("field", ["cache_read_input_tokens", "cache_creation_input_tokens"])
async def test_a_configured_limit_counts_no_cached_tokens(field: str) -> None:
    """Tokens read from the prompt cache do not count against `tpm`; tokens written to it do."""
    usage = {"input_tokens": 5, field: 5000, "output_tokens": 2}
    async with Upstream(answers(json_reply(200, {**REPLY, "usage": usage}))) as one:
        async with Running(anthropic("a", one, limits={"tpm": 1000}), pool={"max_wait": 0}) as server:
            found = [(await server.post(max_tokens=9)).status for _ in range(3)]
            assert found == ([200] * 3 if field == "cache_read_input_tokens" else [200, 429, 429])


async def test_an_untranslatable_request_is_refused_unsent() -> None:
    """With one account the client gets a 400 with the field's name; the account keeps its state."""
    async with Upstream(answers(OK)) as one, Running(anthropic("a", one)) as server:
        for _ in range(12):
            found = await server.post(n=2)
            error = found.json()["error"]
            assert (found.status, error["param"], error["code"]) == (400, "n", "unsupported_parameter")
        assert not one.seen
        assert (await state(server))["failures"] == (await state(server))["in_flight"] == 0
        assert (await server.post()).status == 200


@pytest.mark.parametrize("last", ["openai", "drops", "fails"])
async def test_an_untranslatable_request_goes_to_another_account(last: str) -> None:
    """The next account that can express the request gets it, and its error is the answer."""
    reply = {"openai": OPENAI, "drops": OK, "fails": json_reply(500, {"error": {"message": "x"}})}[last]
    async with Upstream(answers(OK)) as one, Upstream(answers(reply)) as two:
        able = anthropic("c", two, account={"drop_params": ["n"]}) if last == "drops" else controller("c", two.url)
        async with Running(anthropic("a", one), anthropic("b", one), able) as server:
            for _ in range(4):
                found = await server.post(n=2)
                assert found.status == (500 if last == "fails" else 200)
                assert found.headers["x-apiserver-controller"] == "c"
        assert not one.seen and two.seen[0].json().get("n", 0) == (0 if last == "drops" else 2)


async def test_models_are_listed_in_openais_form() -> None:
    """The account's models come with all four fields of OpenAI's API."""
    listed = {"data": [{"type": "model", "id": "claude-x", "display_name": "X", "created_at": "2025-01-01T00:00:00Z"}]}
    async with Upstream(answers(json_reply(200, listed))) as one, Listing(anthropic("a", one)) as server:
        (model,) = (await server.ask("GET", "/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("claude-x", "model", "chatgpt-apiserver")
        assert one.seen[0].start == "GET /v1/models?limit=1000 HTTP/1.1"
        assert one.seen[0].headers["anthropic-version"] == "2023-06-01"


async def test_an_endless_event_ends() -> None:
    """An event of more than EVENT_BYTES becomes an error event."""
    pieces = [START + text("a"), *(b"data: " + b"x" * 65536 for _ in range(20))]
    async with Upstream(answers(sse_reply(*pieces))) as one, Running(anthropic("a", one)) as server:
        assert b"an event of more than" in (await server.post(stream=True)).body
