"""The corpus in tests/wire, cut in every way: by the pure parsers, by a server, and by a server's upstream client.

`valid/NAME.http` has well-framed requests, and `expected.json` describes them. `invalid/NAME.STATUS.http` begins with an
offence and is answered with STATUS (one of those joined by a hyphen) and a close. `replies/valid`, `invalid` and `cut`
are what an upstream sends; after one of `cut` it closes, after one of `invalid` it stays.
"""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, SSE_HEAD, Message, Peer, Running, Upstream, controller, event, json_reply
from .wirefeed import FOLLOW, HOW, WAIT_S, WIRE, Stage, corpus, cut, cut_at, each_request, message, pooled, read_answers, read_reply, talk, trickle, turns

EXPECTED: dict[str, dict[str, Any]] = json.loads((WIRE / "expected.json").read_text(encoding="utf-8"))
VALID, INVALID = corpus("valid"), corpus("invalid")
REPLIES, BAD_REPLIES, CUT_REPLIES = corpus("replies/valid"), corpus("replies/invalid"), corpus("replies/cut")
FOLLOWED = ("GET", "/v1/wire-follow", 1, b"")
# Only a server can judge these: the pure parser gets whole heads below the limits of their bytes.
SERVERS_MATTER = ("limit", "protocol-", "-first", "without-end", "expectation-")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A server with an echo controller."""
    with Stage() as received:
        yield received


def test_the_corpus_is_all_there() -> None:
    """Every valid message has its expectation and every expectation a message; no message stands twice."""
    assert sorted(EXPECTED) == sorted(VALID + REPLIES)
    assert len(VALID) >= 60 and len(INVALID) >= 120
    everything = [message(name) for name in VALID + INVALID]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", VALID)
def test_valid_requests_are_parsed(name: str) -> None:
    """A good message is the same requests however it is cut, and the next one begins where it ends."""
    expected = [(method, target, minor, body.encode("latin-1")) for method, target, minor, body in EXPECTED[name]["requests"]]
    for how in HOW:
        assert list(each_request(cut(message(name) + FOLLOW, how, name))) == [*expected, FOLLOWED], how


@pytest.mark.parametrize("name", VALID)
def test_valid_requests_are_answered(name: str, stage: Stage) -> None:
    """Each request gets its answer, and so does a next one on the same connection unless the client wants it closed."""
    expected = EXPECTED[name]
    statuses = expected["statuses"] + ([] if expected["closes"] else [404])
    for how in HOW[:2]:
        received, lines = stage.ask([*cut(message(name), how), FOLLOW])
        answers = read_answers(received, [method for method, *_ in expected["requests"]])
        assert [status for status, _, _ in answers] == statuses, how
        assert [fields.get("connection") == "close" for _, fields, _ in answers] == [False] * (len(answers) - 1) + [True]
        assert lines.count("\n") == len(statuses) and "smuggled" not in lines


@pytest.mark.parametrize("name", [name for name in INVALID if not any(word in name for word in SERVERS_MATTER)])
def test_invalid_requests_are_refused_by_the_parser(name: str) -> None:
    """An offence is found however the message is cut, with its status, and no request comes before it."""
    for how in HOW:
        with pytest.raises(app.BadMessage) as caught:
            received = list(each_request(cut(message(name) + FOLLOW, how, name)))
            pytest.fail(f"{how}: no offence in {received!r}")
        assert str(caught.value.status) in name.split(".")[1].split("-"), how


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests_end_their_connection(name: str, stage: Stage) -> None:
    """An offence gets one OpenAI-style error and a close at once; nothing after it is read as a request."""
    allowed = name.split(".")[1].split("-")
    for how in HOW[:2]:
        received, lines = stage.ask([*cut(message(name), how), FOLLOW])
        answers = read_answers(received)
        assert [str(status) in allowed for status, _, _ in answers] == [True], (how, received[:300])
        _, fields, body = answers[0]
        assert fields["connection"] == "close" and fields["content-type"] == "application/json"
        assert sorted(json.loads(body)["error"]) == ["code", "message", "param", "type"]
        assert lines.count("\n") == 1 and "smuggled" not in body.decode() + lines and "wire-follow" not in lines


@pytest.mark.parametrize("line", [b"GET /", b"SSH-2.0-client_1.0", b"EHLO client.example", b"*1", b"GET / HTTP/1.1 x", b"GET / http/1.1"])
def test_a_bad_first_line_is_refused_without_waiting_for_more(line: bytes, stage: Stage) -> None:
    """A client of another protocol, HTTP/0.9 among them, gets a 400 after its first line, whole or cut."""
    for how in HOW[:2]:
        received, _ = stage.ask(cut(line + b"\r\n", how))
        assert [status for status, _, _ in read_answers(received)] == [400], how


def test_nothing_but_whole_requests_goes_upstream() -> None:
    """An upstream sees each good request once, framed anew by its length, and nothing of a bad one."""

    async def work(raw: bytes) -> list[Message]:
        async def script(peer: Peer, _: Message) -> None:
            await peer.send(json_reply(200, ANSWER))

        async with Upstream(script) as upstream, Running(controller("a", upstream.url), allowed_hosts=["*"]) as server:
            await talk(server.port, [raw, FOLLOW])
            return upstream.seen

    chats = [name for name in VALID if b"POST /v1/chat" in message(name) and set(EXPECTED[name]["statuses"]) == {200}]
    assert len(chats) > 20
    for name in chats + [name for name in INVALID if b"POST /v1/chat" in message(name)]:
        seen = asyncio.run(work(message(name)))
        bodies = [body.encode("latin-1") for method, _, _, body in EXPECTED.get(name, {}).get("requests", []) if method == "POST"]
        assert [message_sent.body for message_sent in seen] == bodies, name
        for message_sent in seen:
            assert message_sent.start == "POST /v1/chat/completions HTTP/1.1"
            assert not {"transfer-encoding", "expect", "upgrade", "te", "trailer", "http2-settings"} & set(message_sent.headers)


# ---- replies


def test_replies_are_parsed() -> None:
    """A good reply is the same however it is cut; the bytes after it are kept apart."""
    for name in REPLIES:
        expected = EXPECTED[name]
        for how in HOW:
            status, body, rest = read_reply(cut(message(name), how, name))
            assert (status, body.decode("latin-1")) == (expected["status"], expected["body"]), (name, how)
            if how == "whole":
                assert bool(rest) is ("-after" in name), name


@pytest.mark.parametrize("name", [name for name in BAD_REPLIES + CUT_REPLIES if "flood" not in name and "limit" not in name])
def test_bad_replies_are_refused_by_the_parser(name: str) -> None:
    """A malformed reply and one that ends too early are errors however they are cut."""
    for how in HOW:
        with pytest.raises((app.UpstreamError, app.BadMessage)):
            received = read_reply(cut(message(name), how, name))
            pytest.fail(f"{how}: no offence in {received!r}")


def exchange_reply(name: str, how: str, closes: bool) -> tuple[Message, tuple[int, int]]:
    """Return the answer to a raw reply, and the connections after it; the next clients must get their own answers."""

    async def script(peer: Peer, _: Message) -> None:
        if len(upstream.seen) > 1:
            await peer.send(json_reply(200, {**ANSWER, "mark": len(upstream.seen)}))
            return
        await trickle(peer.writer.transport, cut(message(name), how), peer.reader.at_eof)
        if closes:
            peer.close()
            await peer.gone()

    async def work() -> tuple[Message, tuple[int, int]]:
        async with upstream, Running(controller("a", upstream.url)) as server, asyncio.timeout(WAIT_S):
            first = await server.ask("POST", "/v1/embeddings", {"model": "m", "input": "x"})  # any body is an answer there
            await turns()
            connections = pooled(server)
            assert [(await server.post("m")).json()["mark"] for _ in range(2)] == [2, 3]
            return first, connections

    upstream = Upstream(script)
    return asyncio.run(work())


@pytest.mark.parametrize("name", REPLIES)
def test_valid_replies_reach_the_client(name: str) -> None:
    """Status and body arrive as they were sent; the connection is kept exactly when it can carry another reply."""
    expected = EXPECTED[name]
    for how in HOW[:2]:
        received, connections = exchange_reply(name, how, expected["closes"])
        assert (received.status, received.body.decode("latin-1")) == (expected["status"], expected["body"]), how
        assert "set-cookie" not in received.headers
        if how == "whole" or "-after" not in name:  # by byte, the bytes after it come too late
            assert connections == (expected["pooled"], 0), how


@pytest.mark.parametrize("name", BAD_REPLIES + CUT_REPLIES)
def test_bad_replies_end_in_502(name: str) -> None:
    """A malformed or cut reply is one clear error, without waiting for more, and its connection is not used again."""
    for how in HOW[:2]:
        received, connections = exchange_reply(name, how, name in CUT_REPLIES)
        assert received.status == 502 and received.json()["error"]["type"] == "server_error", (how, received.body)
        assert received.json()["error"]["code"].startswith("upstream_")
        assert connections == (0, 0), how


EVENT = event("hi")


@pytest.mark.parametrize("cut_off", [len(EVENT), len(EVENT) - 1, len(EVENT) - 2, 20, 5])
async def test_the_error_event_stands_alone(cut_off: int) -> None:
    """A stream that is cut within an event ends with an error event of its own, not at the end of the unfinished line."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD + app.chunk(EVENT) + app.chunk(EVENT[:cut_off]))
        peer.close()
        await peer.gone()

    async with Upstream(script) as upstream, Running(controller("a", upstream.url)) as server:
        client = await server.open()
        await client.post("m", stream=True)
        received = await client.closed()
        client.close()
    assert received.count(b'"error"') == 1 and b"0\r\n\r\n" not in received
    body = b"".join(re.findall(rb"\r\n[0-9a-f]+\r\n(.*?)(?=\r\n[0-9a-f]+\r\n|\r\n\Z)", received, re.DOTALL))
    assert [part for part in body.split(b"\n\n") if b'"error"' in part and not part.lstrip(b"\n").startswith(b'data: {"error":')] == []


def test_a_dribbled_head_costs_no_more_than_a_dribbled_body(stage: Stage) -> None:
    """A head that comes in small pieces is not searched again from its start: CPU time is linear in its size."""
    tail, size = b"Connection: close\r\n", 30_000
    start = b"GET /status HTTP/1.1\r\nHost: localhost\r\n" + tail
    head = start + b"X: " + b"v" * size + b"\r\n\r\n"
    body = start + b"Content-Length: %d\r\n\r\n" % size + b"v" * size
    took = {}
    for name, raw in (("head", head), ("body", body)):
        began = time.process_time()
        received, _ = stage.ask(cut_at(raw, range(0, len(raw), 3)))
        took[name] = time.process_time() - began
        assert [status for status, _, _ in read_answers(received)] == [200], name
    assert took["head"] < 3 * took["body"]
