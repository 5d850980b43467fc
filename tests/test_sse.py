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
        (b": keep-alive\n\n", "preface"),
        (b'data: {"choices":[],"prompt_filter_results":[]}\n\n', "preface"),
        (b'event: response.created\ndata: {"type":"response.created"}\n\n', "preface"),
        (b'event: keepalive\ndata: {"type":"keepalive","sequence_number":3}\n\n', "preface"),
        (b'event: ping\ndata: {"type": "ping"}\n\n', "preface"),
        (b'data: {"choices":[{"delta":{}}]}\n\n', "real"),
        (b"data: [DONE]\n\n", "real"),
        (b"data: not json\n\n", "real"),
        (b'data: {"error":{"message":"x"}}\n\n', "error"),
        (b'data: {"error":{"message":"x"},"choices":[{}]}\n\n', "error"),
        (b'event: error\ndata: {"type":"error"}\n\n', "error"),
        (b'data: {"error":null,"choices":[{}]}\n\n', "real"),
    ],
)
def test_the_kind_of_an_event(event: bytes, kind: str) -> None:
    """Comments, pings and Azure's empty chunk come before an answer; an error is one even beside choices."""
    assert app.judge_event(event).value == kind


def test_the_error_event_suits_go_openai() -> None:
    """`error` is the first key, without a space before it, on one data line."""
    event = app.error_event("a\nb", "c")
    assert event.startswith(b'data: {"error":{"message":"a\\nb"') and event.endswith(b"}}\n\n") and event.count(b"\n") == 2
