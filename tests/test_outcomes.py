"""What a reply means, when another attempt is safe, and what replies say about quotas."""

import json
import random
from pathlib import Path

import pytest

import chatgpt_apiserver as app

GOLDEN = Path(__file__).parent / "golden"
WALL_S = 1_795_536_000.0  # 2026-11-24T16:00:00Z
DATE = b"Tue, 24 Nov 2026 15:00:00 GMT"  # of a reply whose clock is an hour late


def request(stream: bool = True, stateful: bool = False, inference: bool = True) -> app.ApiRequest:
    """Return a request of that kind."""
    made = app.ApiRequest("POST", "/v1/chat/completions", "", b"", b"")
    made.stream, made.stateful, made.inference = stream, stateful, inference
    return made


def judge(status: int, body: bytes, index: dict[bytes, bytes] | None = None, **kind: bool) -> app.Verdict:
    """Return the verdict on a reply to a request of that kind."""
    return app.judge_reply(status, index or {}, body, request(**kind), ("slow_down_please",), WALL_S)


def error(code: str = "", message: str = "", kind: str = "") -> bytes:
    """Return an error body."""
    return app.compact_json({"error": {"message": message, "type": kind, "code": code or None, "param": None}})


# -- what a reply means


ERRORS = [line.split(" ", 2) for line in (GOLDEN / "errors.txt").read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(("outcome", "status", "body"), ERRORS)
def test_errors_of_vendors(outcome: str, status: str, body: str) -> None:
    """A status and the words of a vendor have one meaning; what a message quotes has none.

    An error in a 200, as a whole answer or an event, counts as the status that belongs to it; late in a stream, an
    error of the client counts as none.
    """
    verdict, long = judge(int(status), body.encode()), outcome == "long"
    if status == "200":
        asked, event = request(), b"data: %b\n\n" % body.encode()
        asked.path = app.CHAT_PATH
        verdict = app.judge_answer(body.encode(), {}, asked, ())
        assert app.judge_error_event(event, {}, ()).outcome is verdict.outcome
        late = app.judge_late_event(event, ()).outcome.value
        assert late == ("ok" if outcome in {"client", "long", "missing", "unfit"} else outcome)
    assert (verdict.outcome.value, verdict.too_long) == ("client" if long else outcome, long)


@pytest.mark.parametrize(
    ("outcome", "statuses"),
    [
        *(("ok", (200, 204)), ("quota", (402,)), ("rate", (429, 498)), ("client", (405, 412, 413, 415, 422))),
        ("fault", (301, 404, 408, 409, 424, 500, 503, 529, 700)),
    ],
)
def test_statuses(outcome: str, statuses: tuple[int, ...]) -> None:
    """Where the body makes no sense, the status alone decides."""
    for status in statuses:
        for body in (b"", b"\xff not JSON", b"[" * 100_000 if status != 404 else b"<html>"):
            assert judge(status, body).outcome.value == outcome


@pytest.mark.parametrize(
    ("status", "message", "kind", "outcome"),
    [
        (404, "no such response", {"stateful": True}, "client"),
        (409, "", {"stateful": True}, "client"),
        (403, "no access to model", {"inference": False}, "barred"),
        (401, "Missing scopes: api.files.read.", {"inference": False}, "barred"),
        (401, "Incorrect API key", {"inference": False}, "auth"),
        (404, "no model in this file", {"inference": False}, "client"),
    ],
)
def test_replies_about_objects(status: int, message: str, kind: dict[str, bool], outcome: str) -> None:
    """An error about an object of the account says nothing about models."""
    assert judge(status, error("", message), **kind).outcome is app.Outcome(outcome)


@pytest.mark.parametrize(("path", "outcome"), [("/embeddings", "fault"), ("/responses", "unfit"), ("/audio/speech", "unfit")])
def test_a_404_for_a_path_that_few_servers_have(path: str, outcome: str) -> None:
    """A 404 without JSON says nothing against a server that may just lack the path."""
    asked = request()
    asked.path = path
    assert app.judge_reply(404, {}, b"404 page not found", asked, (), 0.0).outcome.value == outcome


def test_configured_rate_codes_are_no_lack_of_credit() -> None:
    """A 429 with a code of `rate_codes` is a rate limit, whatever the code means elsewhere."""
    body = error("insufficient_quota")
    assert app.judge_reply(429, {}, body, request(), ("insufficient_quota",), 0.0).outcome is app.Outcome.RATE


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (app.ConnectFailed("x"), "connect"),
        (app.UpstreamTimeout("x", before_reply=True), "silent"),
        (app.UpstreamTimeout("x"), "fault"),
        (app.UpstreamClosed("x", before_reply=True), "fault"),
        (app.UpstreamClosed("x"), "fault"),
        (app.BadReply("x"), "fault"),
    ],
)
def test_judge_failure(failure: app.UpstreamError, outcome: str) -> None:
    """An attempt without a reply has one meaning."""
    assert app.judge_failure(failure).outcome is app.Outcome(outcome)


CHAT = {"id": "c", "choices": [{"index": 0, "message": {"content": "error"}, "finish_reason": "stop"}], "error": None}


@pytest.mark.parametrize(
    ("body", "path", "status"),
    [
        *((json.dumps(CHAT), "/chat/completions", 200), (f" {json.dumps(CHAT, indent=1)} ", "/chat/completions", 200)),
        *((body, "/chat/completions", 502) for body in ("", "<html>", '{"id":"c","usage":{}}', json.dumps(CHAT)[:-9])),
        *((json.dumps({**CHAT, "choices": []}), "/chat/completions", 502), ("busy", "/completions", 502)),
        *(('{"data":[],"error":{"message":"x"}}', "/embeddings", 502), ('{"success":false}', "/embeddings", 502)),
        ('{"object":"response","output":[],"error":null}', "/responses", 200),
        ('"error"', "/audio/transcriptions", 200),
    ],
)
def test_answers_that_are_none(body: str, path: str, status: int) -> None:
    """A chat must have choices, any other answer may be anything but an error; what is neither is a fault."""
    asked = request(False)
    asked.path = path
    verdict = app.judge_answer(body.encode(), {}, asked, ())
    assert (verdict.outcome.value, verdict.status) == ("ok" if status == 200 else "fault", status)


@pytest.mark.parametrize("outcome", list(app.Outcome))
def test_may_retry(outcome: app.Outcome) -> None:
    """Answers never move on, stateful requests only when they did not run, silent whole answers never."""
    verdict, final = app.Verdict(outcome, 500), outcome.value in {"ok", "client", "gone"}
    assert app.may_retry(verdict, request(stream=True)) is not final
    assert app.may_retry(verdict, request(stream=False)) is not (final or outcome.value == "silent")
    refused = outcome.value in {"unfit", "connect", "auth", "rate", "quota", "large", "missing"}
    for stream in (True, False):
        assert app.may_retry(verdict, request(stream, stateful=True)) is refused
    unavailable = app.Verdict(app.Outcome.FAULT, 503)  # which says that nothing ran
    assert app.may_retry(unavailable, request(stateful=True))


def test_usefulness() -> None:
    """The client's own error helps it most, then a 429, a fault, an account's own trouble, and least a missing model."""
    order = ("client", "large", "rate", "fault", "quota", "auth", "forbidden", "missing", "unfit", "barred", "gone")
    values = [app.usefulness(app.Verdict(app.Outcome(name))) for name in order]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("message", "outcome", "by_tokens", "bucket", "requested"),
    [
        ("Rate limit reached for m in organization o on requests per min (RPM): Limit 3, Used 3, Requested 1.", "rate", False, "", 1),
        ("Rate limit reached for m (for limit m-long) on tokens per min (TPM): Limit 10000, Used 9000, Requested 2000.", "rate", True, "m-long", 2000),
        ("Request too large for m on tokens per min (TPM): Limit 10,000, Requested 12,000.", "large", True, "", 12_000),
        ("Limit 0, Requested 5", "rate", False, "", 5),
    ],
)  # fmt: skip
def test_the_text_of_a_429(message: str, outcome: str, by_tokens: bool, bucket: str, requested: int) -> None:
    """OpenAI says in its text which limit was met, and whether the request is larger than all of it."""
    verdict = judge(429, error("rate_limit_exceeded", message, "requests"))
    assert (verdict.outcome.value, verdict.by_tokens, verdict.bucket, verdict.requested) == (outcome, by_tokens, bucket, requested)


# -- times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("17ms", 0.017), ("1s", 1.0), ("6m0s", 360.0), ("1h2m3s", 3723.0), ("2m59.56s", 179.56), ("0", 0.0), ("59", 59.0),
        ("1.5", 1.5), ("600.0", 600.0), ("100us", 0.0001), ("45 seconds", 45.0), ("9" * 12, 1e9),
        ("1d", None), ("-1", None), ("-1s", None), ("", None), ("s", None), ("nan", None), ("inf", None), ("1e9", None),
        ("1s2", None), ("1" * 41, None), ("\xb2s", None), ("Tue, 24 Nov 2026 16:00:00 GMT", None),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float | None) -> None:
    """Go durations, words and plain numbers are seconds; everything else is nothing."""
    assert app.parse_duration(text) == (None if seconds is None else pytest.approx(seconds))


def test_durations_never_raise_and_are_never_negative() -> None:
    """Whatever a header says, the result is None or a finite time from zero on, also for a long value, and soon."""
    assert app.parse_duration("1ms" * 20_000) == pytest.approx(20.0) and app.parse_duration("1ms" * 20_000 + "!") is None
    chance = random.Random(1)
    for _ in range(3000):
        seconds = app.parse_duration("".join(chance.choice("0123456789.hmsuµn -+e") for _ in range(chance.randrange(12))))
        assert seconds is None or 0.0 <= seconds <= 1e9


@pytest.mark.parametrize(
    ("index", "message", "seconds"),
    [
        ({b"retry-after-ms": b"1500", b"retry-after": b"9"}, "try again in 7s", 1.5),
        ({b"retry-after": b"9"}, "try again in 7s", 9.0),
        ({b"retry-after": b"0"}, "", 0.0),
        ({b"retry-after": b"Tue, 24 Nov 2026 16:00:30 GMT"}, "", 30.0),
        ({b"retry-after": b"Tue, 24 Nov 2026 15:00:00 GMT"}, "", 0.0),
        ({b"retry-after": b"2026-11-24T16:00:05Z"}, "", 5.0),
        *(({b"retry-after": value}, "", 30.0) for value in (b"30,30", b"30, 5", b"1795536030", b"1795536030000")),
        ({b"retry-after": b"Tue, 24 Nov 2026 16:00:30 GMT,Tue, 24 Nov 2026 16:00:20 GMT"}, "", 30.0),
        # The reply's own clock counts, not ours.
        ({b"retry-after": b"Tue, 24 Nov 2026 15:00:30 GMT", b"date": DATE}, "", 30.0),
        *(({b"retry-after": value}, "", None) for value in (b"9999999999", b"1000000000", b"99999999")),
        ({b"retry-after": b"-5"}, "try again in 7s", 7.0),
        ({b"retry-after": b"soon"}, "", None),
        ({b"retry-after-ms": b"x", b"retry-after": b"3"}, "", 3.0),
        ({}, "Rate limit reached. Please try again in 41.724s. Visit", 41.724),
        ({}, "Please try again in 6m0s.", 360.0),
        ({}, "Please retry after 1 second.", 1.0),
        ({}, "try again in 2 minutes", 120.0),
        ({}, '"retryDelay": "34s"', 34.0),  # as Google has it in the details of an error
        ({}, "nothing to see", None),
    ],
)
def test_retry_after(index: dict[bytes, bytes], message: str, seconds: float | None) -> None:
    """Milliseconds, seconds, a date, then the text: the first that makes sense."""
    body = b"[%b]" % message.encode() if message.startswith('"') else error("", message)
    assert judge(429, body, index).after_s == (None if seconds is None else pytest.approx(seconds))


WINDOW = {b"x-ratelimit-remaining": b"0", b"x-ratelimit-reset": b"1795536025000"}  # as OpenRouter has it


@pytest.mark.parametrize(
    ("index", "after_s", "reset_s"),
    [
        ({b"x-ratelimit-remaining-requests": b"0", b"x-ratelimit-reset-requests": b"48s"}, None, 48.0),
        ({b"x-ratelimit-remaining-requests": b"3", b"x-ratelimit-reset-requests": b"48s"}, None, None),
        ({b"x-ratelimit-reset-tokens": b"1795536007"}, None, 7.0),
        ({b"x-ratelimit-remaining-requests": b"0", b"x-ratelimit-reset-requests": b"-1"}, None, None),
        ({b"x-ratelimit-remaining-requests": b"0", b"x-ratelimit-reset-requests": b"48s", b"retry-after": b"2"}, 2.0, None),
        (WINDOW, 25.0, None),
        ({b"ratelimit-remaining": b"0", b"ratelimit-reset": b"25"}, 25.0, None),
        ({**WINDOW, b"x-ratelimit-remaining": b"2"}, None, None),
        ({**WINDOW, b"x-ratelimit-reset": b"1"}, 1.0, None),
        ({**WINDOW, b"x-ratelimit-reset": b"1795535000"}, None, None),
    ],
    ids=lambda value: repr(value)[:80],
)
def test_when_a_limit_resets(index: dict[bytes, bytes], after_s: float | None, reset_s: float | None) -> None:
    """A 429 without a time to wait tells when its limit is full again: a bucket at the latest, a window exactly."""
    verdict = judge(429, error("rate_limit_exceeded"), index)
    assert (verdict.after_s, verdict.reset_s) == (after_s, reset_s)


def test_a_reset_in_the_body() -> None:
    """OpenRouter repeats the fields in the body, where they also stand in an error event."""
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1795536025000"}
    body = json.dumps({"error": {"message": "x", "code": 429, "metadata": {"headers": headers}}}).encode()
    assert judge(429, body).after_s == 25.0


# -- what a reply says about the quota


def fields(kind: bytes = b"requests", **values: bytes) -> dict[bytes, bytes]:
    """Return OpenAI's fields of one limit."""
    return {b"x-ratelimit-%b-%b" % (name.encode(), kind): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (fields(limit=b"500", remaining=b"499", reset=b"120ms"), (500, 499, 0.12)),
        (fields(limit=b"500", remaining=b"499"), (500, 499, None)),
        (fields(limit=b"500", remaining=b"0", reset=b"60"), (500, 0, 60.0)),
        (fields(limit=b"500", remaining=b"900", reset=b"1s"), (500, 500, 1.0)),
        (fields(limit=b"500", remaining=b"499", reset=b"720h"), (500, 499, 2_592_000.0)),
        *(
            (fields(limit=b"500", remaining=b"499", reset=reset), (500, 499, None))
            for reset in (b"-1", b"soon", b"1895800000", b"9999-01-01T00:00:00Z", b"1" * 50_000)
        ),
        (fields(limit=b"500", remaining=b"499", reset=b"1795536007"), (500, 499, 7.0)),
        ({**fields(limit=b"9", remaining=b"3", reset=b"2026-11-24T15:00:40Z"), b"date": DATE}, (9, 3, 40.0)),
        (fields(limit=b"0", remaining=b"0", reset=b"0"), None),
        *((fields(limit=b"500", remaining=left), None) for left in (b"-1", b"", b"\xb2")),
        *((fields(limit=limit, remaining=b"1"), None) for limit in (b"", b"-1", b"5e2", b"500.5", b"9" * 40, b"\xb2")),
        ({}, None),
        (
            {
                b"anthropic-ratelimit-requests-%b" % name: value
                for name, value in ((b"limit", b"50"), (b"remaining", b"49"), (b"reset", b"2026-11-24T16:00:05Z"))
            },
            (50, 49, 5.0),
        ),
        ({b"x-ratelimit-limit-req-minute": b"60", b"x-ratelimit-remaining-req-minute": b"7"}, (60, 7, None)),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_allowances(index: dict[bytes, bytes], expected: tuple[float, float, float | None] | None) -> None:
    """Limit, remaining and reset of any vendor; values that make no sense, or are too long to be kept, are nothing."""
    requests, tokens = app.read_allowances(index, lambda: WALL_S)
    assert requests == (expected and pytest.approx(expected)) and tokens is None
    more = fields(b"tokens", limit=b"9000", remaining=b"8000", reset=b"6s")
    assert app.read_allowances({**index, **more}, lambda: WALL_S) == (requests, (9000, 8000, 6.0))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'..."usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}', (12, 5, 7, 0)),
        (b'"usage": {"input_tokens" : 5, "output_tokens" : 7}', (12, 5, 7, 0)),
        (b'"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":13}', (13, 5, 7, 0)),
        (b'"usage":{"prompt_tokens":5,"total_tokens":5}', (5, 5, 0, 0)),
        (b'"usage":null}\n\ndata: [DONE]\n\n', None),
        (b'"usage":null}\n\ndata: {"choices":[],"usage":{"completion_tokens":1,"total_tokens":2}}', (2, 1, 1, 0)),
        (b'{"usage":{"completion_tokens":1,"total_tokens":2}} {"usage":null}', (2, 1, 1, 0)),
        (b"", None),
        (b'"usage":{"total_tokens":"many"}', None),
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":7},"choices":["usage"' + b"x" * 9000, (12, 5, 7, 0)),
        (
            b'"usage":{"completion_tokens":7,"total_tokens":107,"prompt_tokens_details":{"cached_tokens":90}}',
            (107, 100, 7, 90),
        ),
    ],
)
def test_read_usage(tail: bytes, expected: tuple[int, ...] | None) -> None:
    """The last usage in an answer counts, wherever it stands."""
    assert app.read_usage(tail) == expected
