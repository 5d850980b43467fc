"""Streams on their way to the client: ends that are cuts, signs of life, usage that this server asks for, and a stop."""

import json
from typing import Any

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

CLOSING = SSE_HEAD.replace(b"Transfer-Encoding: chunked", b"Connection: close")
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"content_filter"}]}\n\n'
ARGUMENTS = b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"function":{"arguments":"{\\"a"}}]}}]}\n\n'
DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
INCOMPLETE = b'event: response.incomplete\ndata: {"type":"response.incomplete","response":{}}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":900,"total_tokens":1000}}\n\n'
PRIORITY = {"type": "priority"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("path", "stream", "cut"),
    [
        ("/chat/completions", event("a"), True),
        ("/chat/completions", event("a") + b'data: {"id":"chatcm', True),
        ("/chat/completions", STOP + b'data: {"id":"chatcm', True),
        ("/chat/completions", ARGUMENTS, True),
        ("/chat/completions", event("a") + STOP, False),
        ("/chat/completions", event("a") + DONE, False),
        ("/completions", b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n', True),
        ("/responses", DELTA, True),
        ("/responses", DELTA + INCOMPLETE, False),
        ("/audio/speech", b'data: {"type":"speech.audio.delta","audio":"x"}\n\n', False),
    ],
)
@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_a_stream_without_its_end_is_cut(path: str, stream: bytes, cut: bool, framing: str) -> None:
    """However politely its connection closes, it ends with an error event, and its controller has failed."""

    async def script(peer: Peer, _: Message) -> None:
        if framing == "chunked":
            await peer.send(SSE_HEAD + chunk(stream) + b"0\r\n\r\n")
        else:
            await peer.send(CLOSING + stream)
            peer.close()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        data = {
            "model": "m",
            "stream": True,
            "input": "x",
            "prompt": "x",
            "messages": [{"role": "user", "content": "x"}],
        }
        body = json.dumps(data).encode()
        head = f"POST /v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        await client.send(head.encode() + body)
        received = await client.reader.read()
        client.close()
        assert (b'"code":"upstream_closed"' in received) is cut
        assert received.endswith(b"0\r\n\r\n") is not cut
        assert (await server.status())["controllers"][0]["failures"] == cut
        assert ("tried=a:cut:" in server.access_lines()[0]) is cut


@pytest.mark.parametrize("ending", [b'data: {"error":{"message":"engine died","code":502}}\n\n', b"", "reset"], ids=["error", "end", "reset"])
@pytest.mark.parametrize("preface", [b"", b": hello\n\n", ROLE])
async def test_what_brings_no_word_commits_to_nothing(preface: bytes, ending: bytes | str) -> None:
    """After comments, or a role without content, an error, an end or a reset can still go to another controller."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD + (chunk(preface) if preface else b""))
        if isinstance(ending, str):
            await pause(0.01)
            peer.reset()
        else:
            await peer.send((chunk(ending) if ending else b"") + b"0\r\n\r\n")

    good = sse_reply(ROLE, event("b"), DONE)
    async with Upstream(script) as one, Upstream(answers(good)) as two:
        async with Running(controller("a", one.url), controller("b", two.url), pool=PRIORITY) as server:
            answer = await server.post(stream=True)
            assert answer.headers["x-apiserver-controller"] == "b" and answer.body == ROLE + event("b") + DONE


@pytest.mark.virtual_time
@pytest.mark.parametrize("seconds", [30, 200])
async def test_signs_of_life(seconds: int) -> None:
    """An upstream that sends pings is not silent, so no hedge is sent; without an event within first_byte it has failed."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        for _ in range(seconds):
            await peer.chunk(b": PROCESSING\n\n")
            await pause(1)
        await peer.send(chunk(event("a") + DONE) + b"0\r\n\r\n")

    async with Upstream(script) as one, Upstream(answers(sse_reply(event("b"), DONE))) as two:
        pool = {"type": "priority", "rescue_after": 1}
        async with Running(controller("a", one.url), controller("b", two.url), pool=pool) as server:
            since = now()
            answer = await server.post(stream=True)
            if seconds < 120:
                assert answer.headers["x-apiserver-controller"] == "a" and not two.seen
            else:
                assert answer.headers["x-apiserver-controller"] == "b" and 119 < now() - since < 122
                assert "tried=a:silent:" in server.access_lines()[0]


def tokens(server: Running) -> float:
    """Return how many tokens count in the window of the first controller."""
    (ledger,) = server.server.pool.upstreams[0].quota.ledgers.values()
    return float(sum(minute.total for minute in ledger.minutes if minute.by_tokens))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("tells", [False, True])
async def test_a_stream_is_settled_by_its_usage(asks: bool, tells: bool) -> None:
    """Where a limit counts tokens the upstream is asked for usage; a client that did not ask never sees that event."""
    words = [event("word " * 40) for _ in range(10)]

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(sse_reply(ROLE, *words, STOP, USAGE if tells else b": none\n\n", DONE))

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"tpm": 100_000})) as server:
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asks else {}
        answer = await server.post(stream=True, **options)
        assert one.seen[0].json()["stream_options"] == {"include_usage": True}
        last = USAGE if tells and asks else b"" if tells else b": none\n\n"
        assert answer.body == ROLE + b"".join(words) + STOP + last + DONE
        # Without usage: the words, and the few tokens of the prompt.
        assert tokens(server) == 1000 if tells else 500 <= tokens(server) < 520


async def test_a_client_key_pays_what_was_used() -> None:
    """Its tokens are settled by the usage of each answer, and a request that was never sent upstream costs nothing."""
    key, headers = "client-key-0123456789", ("Authorization: Bearer client-key-0123456789",)
    used = json_reply(200, {"usage": {"total_tokens": 10}, **{k: v for k, v in ANSWER.items() if k != "usage"}})
    keys = [{"name": "k", "key": key, "limits": {"tpm": 10_000, "rpm": 30}}]
    async with Upstream(answers(used)) as one:
        async with Running(controller("a", one.url, models=["m"]), client_keys=keys) as server:
            for _ in range(20):
                assert (await server.post("unknown", *headers, max_tokens=4000)).status == 404
            for _ in range(20):
                assert (await server.post("m", *headers, max_tokens=4000)).status == 200


async def test_the_end_of_drain_timeout_is_told() -> None:
    """A stream that a stop cuts ends with an error event, a request without an answer gets 503; both are `stopped`."""

    async def script(peer: Peer, message: Message) -> None:
        if message.json().get("stream"):
            await peer.send(SSE_HEAD + chunk(event("a")))
        await peer.gone()

    async with Upstream(script) as one, Running(controller("a", one.url), drain_timeout=0.05) as server:
        streaming, waiting = await server.open(), await server.open()
        await streaming.post(stream=True)
        await streaming.reader.readuntil(event("a") + b"\r\n")
        await waiting.post()
        await until(lambda: len(one.seen) == 2)
        await server.server.drain()
        await server.server.close()
        received = await streaming.reader.read()
        assert b'data: {"error":' in received and b'"server_shutdown"' in received and not received.endswith(b"0\r\n\r\n")
        refused = await waiting.read()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "server_shutdown")
        assert refused.headers["connection"] == "close"
        assert [line.count("tried=a:stopped:") for line in server.access_lines()] == [1, 1]
        streaming.close()
        waiting.close()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("alone", [True, False])
async def test_an_accounts_own_trouble(status: int, alone: bool) -> None:
    """A sole controller passes its refusal on; with several the client learns which one its operator should look at."""
    refusal = answers(error_reply(status, message="Incorrect API key provided: sk-a***b"))
    async with Upstream(refusal) as one:
        names = ["a"] if alone else ["a", "b"]
        async with Running(*(controller(name, one.url) for name in names)) as server:
            answer = await server.post()
            error = answer.json()["error"]
            if alone:
                assert answer.status == status
            else:
                assert (answer.status, error["code"]) == (502, "upstream_account_refused")
                assert "controller 'b'" in error["message"] and "sk-a" not in error["message"]


async def test_a_full_account_hides_the_trouble_of_another() -> None:
    """Where one account is merely full and another refuses its key, the answer is 429 with the time to come again."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Upstream(answers(error_reply(401))) as two:
        good = controller("good", one.url, limits={"rpm": 1})
        async with Running(good, controller("bad", two.url), pool={"max_wait": 0}) as server:
            statuses = [await server.post() for _ in range(5)]
            assert [answer.status for answer in statuses] == [200, 429, 429, 429, 429]
            assert all(int(answer.headers["retry-after"]) > 25 for answer in statuses[1:])


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b'[{"error":{"code":400,"message":"No signature."}}]', "application/json", "No signature."),
        (b'{"object":"error","message":"no","code":400}', "application/json", "no"),
        (b'{"detail":"Extra inputs"}', "application/json", "Extra inputs"),
        (b"<html><style>p {}</style><p>Bad  <b>Gateway</b></p></html>", "text/html", "Bad Gateway"),
        (b"", "text/html", "The upstream sent status 400 without a reason."),
    ],
)
async def test_errors_in_other_shapes_become_openais(body: bytes, kind: str, message: str) -> None:
    """Whatever shape a vendor's error has, the SDKs find its message; an OpenAI error object passes byte for byte."""
    raw = b"HTTP/1.1 400 X\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind.encode(), len(body), body)
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url)) as server:
        answer = await server.post()
        assert answer.status == 400 and answer.json()["error"]["message"] == message
        assert answer.headers["content-type"] == "application/json"


async def test_a_client_may_leave_after_the_last_event() -> None:
    """The SDKs do so, before the connection's own end: the answer is whole, and the log says `ok`."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD + chunk(event("a") + DONE))
        await peer.gone()

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post(stream=True)
        await client.reader.readuntil(DONE)
        client.close()
        await until(server.access_lines)
        assert "tried=" not in server.access_lines()[0]


@pytest.mark.parametrize("refusal", [b'{"message":"Unknown field: include_usage"}', b"unknown field `stream_options`"])
@pytest.mark.parametrize("status", [400, 422, 500])
async def test_an_account_that_refuses_to_report_usage(refusal: bytes, status: int) -> None:
    """The parameter was this server's, so the request goes once more without it, and the words are counted."""

    async def script(peer: Peer, message: Message) -> None:
        asked = "stream_options" in message.json()
        await peer.send(reply(status, refusal) if asked else sse_reply(event("word " * 400), STOP, DONE))

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"tpm": 100_000})) as server:
        for count in (2, 3):
            assert (await server.post(stream=True)).status == 200 and len(one.seen) == count
        assert 1000 <= tokens(server) < 1040


LONG = b'"results":"%b"' % (b"x" * 7000)
COMPLETED = b'data: {"type":"response.completed","response":{"usage":%b,"output":[{"text":"%b"}]}}\n\n'
DELTAS = b'data: {"type":"response.output_text.delta","delta":"%b"}\n\n' % (b"x" * 4000)


@pytest.mark.parametrize(
    ("path", "stream", "total"),
    [
        ("/chat/completions", event("a") + STOP[:-3] + b',"usage":{"total_tokens":5000},' + LONG + b"}\n\n", 5000),
        ("/responses", DELTAS + COMPLETED % (b'{"total_tokens":5000}', b"x" * 8000), 5000),
        ("/responses", DELTAS * 2 + COMPLETED % (b"null", b"x" * 8000), 2001),
    ],
)
@pytest.mark.parametrize("size", [100, 100_000])
async def test_usage_may_stand_anywhere(path: str, stream: bytes, total: int, size: int) -> None:
    """A stream's usage counts before a long end, too. Text that the last event repeats counts once."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        for at in range(0, len(stream), size):
            await peer.chunk(stream[at : at + size])
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"tpm": 100_000})) as server:
        options = {"stream_options": {"include_usage": True}}
        data = {"model": "gpt-4.1", "stream": True, "input": "x" * 4, "messages": MESSAGES, **options}
        await server.ask("POST", "/v1" + path, data)
        assert tokens(server) == pytest.approx(total, abs=2)


async def test_a_client_key_pays_for_answers_only() -> None:
    """To read a stored answer, or to get an error, costs a client key no tokens."""
    headers = ("Authorization: Bearer client-key-0123456789",)
    keys = [{"name": "k", "key": "client-key-0123456789", "limits": {"tpm": 10_000}}]

    async def script(peer: Peer, message: Message) -> None:
        stored = json_reply(200, {"id": "resp_1", "usage": {"total_tokens": 5000}})
        await peer.send(stored if message.start.startswith("GET") else error_reply(400))

    async with Upstream(script) as one:
        async with Running(controller("a", one.url), client_keys=keys, endpoints=["*"]) as server:
            for _ in range(5):
                assert (await server.ask("GET", "/v1/responses/resp_1", b"", *headers)).status == 200
                assert (await server.post("m", *headers, max_tokens=4000)).status == 400


SPENT = error_reply(402, message="Insufficient balance")


@pytest.mark.parametrize(
    ("first", "statuses"),
    [
        (error_reply(503), [503, 503]),
        ("reset", [502, 502]),
        (error_reply(401), [502, 502]),
        (SPENT, [502, 502]),
    ],
)
async def test_no_account_is_full(first: bytes | str, statuses: list[int]) -> None:
    """Where one account is out of credit and another has failed, nothing is a rate limit."""

    async def script(peer: Peer, _: Message) -> None:
        if isinstance(first, str):
            peer.reset()
        else:
            await peer.send(first)

    async with Upstream(script) as one, Upstream(answers(SPENT)) as two:
        async with Running(controller("a", one.url), controller("b", two.url), pool=PRIORITY) as server:
            assert [(await server.post()).status for _ in statuses] == statuses


@pytest.mark.parametrize("how", ["full", "reset", 429])
async def test_a_fallback_hides_nothing(how: str | int) -> None:
    """What was said of the model asked for is the answer, also where that was no reply."""

    async def script(peer: Peer, message: Message) -> None:
        if message.json()["model"] == "n":
            await peer.send(error_reply(400, "unsupported_parameter"))
        elif how == "reset":
            peer.reset()
        else:
            await peer.send(error_reply(429, "x", "x", "Retry-After: 50") if how == 429 else json_reply(200, ANSWER))

    async with Upstream(script) as one:
        pool = {"max_wait": 0, "fallbacks": {"m": ["n"]}}
        limits = {"rpm": 1} if how == "full" else {}
        async with Running(controller("a", one.url, models=["m"], limits=limits), controller("b", one.url, models=["n"]), pool=pool) as server:
            statuses = [(await server.post("m")).status for _ in range(3)]
            assert statuses == {"full": [200, 429, 429], "reset": [502] * 3, 429: [429] * 3}[how]


async def test_a_failure_names_its_controller() -> None:
    """A 502 says which controller failed and how; a key's trouble as first event of the last one is told so, too."""
    bad = sse_reply(b'data: {"error":{"message":"Incorrect API key provided: sk-b***0","code":"invalid_api_key"}}\n\n')
    async with Upstream(answers(bad)) as one:
        async with Running(controller("a", "http://127.0.0.1:9/v1"), controller("b", one.url)) as server:
            answer = await server.post(stream=True)
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_account_refused")
            assert b"sk-b" not in answer.body
        async with Running(controller("dead", "http://127.0.0.1:9/v1")) as server:
            message = (await server.post()).json()["error"]["message"]
            assert message.startswith("controller 'dead': no connection") and "127.0.0.1" not in message


# -- answers in the form that was not asked for

MESSAGE = {"role": "assistant", "content": "hé", "reasoning_content": "so", "tool_calls": [CALL]}
META = {"id": "c", "created": 1, "model": "m", "system_fingerprint": "f"}
WHOLE = {
    **META,
    "object": "chat.completion",
    "choices": [{"index": place, "message": MESSAGE, "finish_reason": "tool_calls"} for place in range(2)],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


@pytest.mark.parametrize("usage", [False, True])
async def test_a_whole_answer_becomes_a_stream(usage: bool) -> None:
    """A server that never streams: the client gets chunks with all choices, and the usage if it asked for that."""
    more = {"stream_options": {"include_usage": True}} if usage else {}
    async with Upstream(answers(json_reply(200, WHOLE))) as one, Running(controller("a", one.url)) as server:
        answer = await server.post(stream=True, **more)
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.body.endswith(DONE)
        chunks = [json.loads(line[6:]) for line in answer.body.split(b"\n\n")[:-2]]
        counted = [chunk["usage"] for chunk in chunks if chunk["usage"]]
        assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * len(chunks)
        assert counted == [WHOLE["usage"]] * usage and chunks[0]["system_fingerprint"] == "f"
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        message = {**MESSAGE, "tool_calls": [{"index": 0, **CALL}]}
        assert choices == [{"index": place, "delta": message, "finish_reason": "tool_calls"} for place in range(2)]


async def test_a_stream_becomes_a_whole_answer() -> None:
    """A server that always streams: texts and arguments are joined, and what vendors repeat is not."""
    base: dict[str, Any] = {**META, "object": "chat.completion.chunk"}
    name = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": "s"},
        {"role": "assistant", "content": None, "reasoning_content": "o"},
        {"role": "assistant", "content": "h", "tool_calls": [{"index": 0, **name}]},
        {"content": "é", "tool_calls": [{"index": 0, **name, "function": {"name": "", "arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    ]
    chunks = [{**base, "choices": []}]
    for delta in deltas:
        chunks += [{**base, "choices": [{"index": place, "delta": delta, "finish_reason": ""}]} for place in range(2)]
    chunks += [
        {**base, "choices": [{"index": place, "delta": {}, "finish_reason": "tool_calls"} for place in range(2)]},
        {**base, "choices": [], "usage": WHOLE["usage"]},
    ]
    events = [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks]
    stream = sse_reply(b": wait\n\n", *events, DONE)
    async with Upstream(answers(stream)) as one, Running(controller("a", one.url)) as server:
        for _ in range(2):
            answer = await server.post()
            assert answer.headers["content-type"] == "application/json" and answer.json() == WHOLE
        assert one.connections == 1


TROUBLE = b'{"error":{"message":"no","type":"server_error","code":503}}'


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("stream", "raw", "status"),
    [
        (True, json_reply(200, json.loads(TROUBLE)), 503),
        (True, json_reply(200, {"object": "chat.completion", "choices": []}), 502),
        (True, json_reply(200, [1]), 502),
        (False, sse_reply(event("a"), b"data: %b\n\n" % TROUBLE), 503),
        (False, sse_reply(event("a"), b"event: error\ndata: no\n\n"), 502),
        (False, sse_reply(event("a")), 502),
        (False, sse_reply(DONE), 502),
        (False, sse_reply(event("a"))[:-5], 502),
        (True, json_reply(200, {**ANSWER, "x": "x" * 300_000}), 502),
        (False, sse_reply(*[event("x" * 900)] * 300, DONE), 502),
        (False, sse_reply(event("x" * 300_000), DONE), 502),
    ],
)
async def test_an_error_in_the_other_form(
    stream: bool, raw: bytes, status: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte has reached the client, so another controller answers; without one it gets an error with its status."""
    for bound in ("ANSWER_BYTES", "STREAM_BYTES", "EVENT_BYTES"):
        monkeypatch.setattr(f"chatgpt_apiserver.{bound}", 100_000)

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(raw)
        peer.close()

    async with Upstream(script) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        controllers = [controller("a", one.url), controller("b", two.url)][: 1 if alone else 2]
        async with Running(*controllers, pool=PRIORITY) as server:
            answer = await server.post(stream=stream)
            assert answer.status == (status if alone else 200)
            assert not alone or answer.json()["error"]["message"]
