"""Server-sent events: found at any cut, inspected, never rewritten."""

import pytest

import chatgpt_apiserver as app

STREAM = 'data: {"a":"\u00e9\u2028"}\n\n: comment\r\n\r\nevent: x\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n'.encode()


def test_events_at_every_cut() -> None:
    """Two pieces cut anywhere give the same events, whole and unchanged."""
    assert len(list(app.EventSplitter().feed(STREAM))) == 4
    for cut in range(len(STREAM) + 1):
        splitter = app.EventSplitter()
        events = [*splitter.feed(STREAM[:cut]), *splitter.feed(STREAM[cut:])]
        assert b"".join(events) + splitter.pending == STREAM


def test_fields_of_an_event() -> None:
    """Several data lines are joined, one leading space is dropped, comments and a byte order mark are skipped."""
    assert app.event_fields(b"\xef\xbb\xbfevent: x\r\n: c\r\ndata:1\r\ndata:  2\r\n\r\n") == (b"x", b"1\n 2")


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b": keep-alive\n\n", "life"),
        (b'data: {"choices":[],"prompt_filter_results":[]}\n\n', "preface"),
        (b'event: response.created\ndata: {"type":"response.created"}\n\n', "preface"),
        (b'event: keepalive\ndata: {"type":"keepalive","sequence_number":3}\n\n', "life"),
        (b'event: ping\ndata: {"type": "ping"}\n\n', "life"),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":"","refusal":null}}]}\n\n', "preface"),
        (b'data: {"choices":[{"delta":{"role":"assistant","tool_calls":[{}]}}]}\n\n', "real"),
        (b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n', "real"),
        (b'data: {"choices":[{"text":""}]}\n\n', "real"),
        (b'data: {"choices":[{"delta":{"content":""},"finish_reason":"error","error":{}}]}\n\n', "error"),
        (b'data: {"choices":null,"error":{"message":"x"}}\n\n', "error"),
        (b"event: error\ndata: overloaded\n\n", "error"),
        (b'data: {"detail":"not found"}\n\n', "preface"),
        (b'data: {"object":"error","message":"x"}\n\n', "error"),
        (b'data: {"code":500,"msg":"x","success":false}\n\n', "error"),
        (b"data: [DONE]\n\n", "real"),
        (b"data: not json\n\n", "preface"),
        (b"event: ping\ndata: {}\n\n", "life"),
        (b"event: ping\ndata: 2026-01-01\n\n", "life"),
        (b'event: response.created\ndata: {"response":{}}\n\n', "preface"),
        (b'data: [{"error":{"code":503}}]\n\n', "error"),
        (b'data: {"id":"x","choices":null}\n\n', "preface"),
        (b'data: {"error":{"message":"x"}}\n\n', "error"),
        (b'data: {"error":{"message":"x"},"choices":[{}]}\n\n', "error"),
        (b'event: error\ndata: {"type":"error"}\n\n', "error"),
        (b'data: {"error":null,"choices":[{}]}\n\n', "real"),
    ],
)
def test_the_kind_of_an_event(event: bytes, kind: str) -> None:
    """Comments, pings and Azure's empty chunk come before an answer; an error is one even beside choices."""
    assert app.judge_event(event).value == kind


CHOICE = b'data: {"choices":[{"delta":{"content":"\\"finish_reason\\": \\"stop\\""},"finish_reason":%b}]}\n\n'
WORD, STOP = CHOICE % b"null", CHOICE % b'"stop"'
COMPLETED = b'data: {"response":{"output":["%b"]},"type":"response.completed"}\n\n' % (b"x" * 9000)


@pytest.mark.parametrize(
    ("stream", "whole"),
    [
        (WORD, False),
        (WORD + b"data: [DONE]\n\n", True),
        (WORD + b"data:[DONE]", True),
        (WORD + b"data: [DONE]\n\n: bye\n\n", True),
        (STOP, True),
        (STOP.replace(b":", b" : "), True),
        (CHOICE % b'""', False),
        (STOP[:-2], True),
        (STOP[:-5], False),
        (STOP + WORD[:40], False),
        (STOP[: STOP.rindex(b"}]") + 1], False),
        (STOP + b": a comment\n\n", True),
        (STOP + b'data: {"choices":[],"citations":["%b"]}\n\n' % (b"x" * 9000), True),
        (b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n', False),
        (b"data: [DONE]\n\n", True),
        (b"", False),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_end_of_a_stream(stream: bytes, whole: bool, size: int) -> None:
    """A stream of chats is whole with [DONE] or a finish_reason, and without half an event behind it."""
    end = app.StreamEnd(False)
    for at in range(0, len(stream), size):
        end.feed(stream[at : at + size])
    assert end.is_whole() is whole


@pytest.mark.parametrize("word", ["completed", "failed", "incomplete", "output_text.delta"])
@pytest.mark.parametrize("size", [5, 1000, 100_000])
def test_the_end_of_a_response(word: str, size: int) -> None:
    """A stream of the Responses API needs its last event, which may be long."""
    end, stream = app.StreamEnd(True), COMPLETED.replace(b"completed", word.encode())
    for at in range(0, len(stream), size):
        end.feed(stream[at : at + size])
    assert end.is_whole() is ("." not in word)
    named = b"event: response.%b\ndata: {}\n\n" % word.encode()
    end = app.StreamEnd(True)
    end.feed(named)
    assert end.is_whole() is ("." not in word)


def test_the_error_event_suits_go_openai() -> None:
    """`error` is the first key, without a space before it, on one data line."""
    event = app.error_event("a\nb", "c")
    assert event.startswith(b'data: {"error":{"message":"a\\nb"') and event.endswith(b"}}\n\n") and event.count(b"\n") == 2
