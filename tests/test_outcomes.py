"""What a reply means, when another attempt is safe, and what replies say about quotas."""

import json
import random

import pytest

import chatgpt_apiserver as app

WALL_S = 1_795_536_000.0  # 2026-11-24T16:00:00Z


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


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (400, error("model_not_found"), "missing"),
        # An account that lacks the model: DeepSeek, Mistral, Groq, OpenAI, OpenRouter, Bedrock, xAI, SiliconFlow.
        (400, error("invalid_request_error", "Model Not Exist", "invalid_request_error"), "missing"),
        (400, b'{"object":"error","message":"Invalid model: m","type":"invalid_model","code":"1500"}', "missing"),
        (400, error("model_decommissioned", "The model `m` has been decommissioned."), "missing"),
        (400, error("", "The model `m` has been decommissioned and is no longer supported."), "missing"),
        (400, error("", "invalid model ID"), "missing"),
        (400, error("", "m/n:free is not a valid model ID"), "missing"),
        (400, b'{"message":"The provided model identifier is invalid."}', "missing"),
        (400, b'{"code":"Client specified an invalid argument","error":"Model not found: grok-9"}', "missing"),
        (400, b'{"code":20012,"message":"Model does not exist. Please check it carefully.","data":null}', "missing"),
        (400, b'{"success":false,"errors":[{"code":5007,"message":"AiError: No such model @cf/m"}]}', "missing"),
        (404, error("", "No endpoints found matching your data policy."), "missing"),
        (404, b'{"status":404,"title":"Not Found","detail":"Function \'f\': Not found for account"}', "missing"),
        (400, error("invalid_value", "Invalid value: 'Model Not Exist'."), "client"),
        (400, error("", "The model `m` does not support image input."), "client"),
        (400, error("", "'temperature' is not a valid model parameter"), "client"),
        (400, b'[{"error":{"code":400,"message":"API key not valid. Please pass a valid one.","status":"x"}}]', "auth"),
        (400, b'{"code":"Client specified ...","error":"Incorrect API key provided: na***ys. You can ..."}', "auth"),
        (400, error("invalid_value", "Invalid value: 'Incorrect API key provided'."), "client"),
        # An empty purse or a spent cap: Anthropic, OpenRouter, OpenCode, one-api, SiliconFlow, Novita, LiteLLM.
        (400, error("", "You have reached your specified API usage limits. You will regain access on 2027-01-01."), "quota"),
        (400, error("", "Your credit balance is too low to access the Anthropic API."), "quota"),
        (403, error("", "This organization has been disabled."), "quota"),
        (403, error("403", "Key limit exceeded (total limit). Manage it using https://openrouter.ai/settings/keys"), "quota"),
        (401, b'{"error":"Insufficient balance. Manage your billing here: https://x"}', "quota"),
        (403, error("insufficient_user_quota", "user quota is not enough"), "quota"),
        (403, b'{"code":30001,"message":"Sorry, your account balance is insufficient","data":null}', "quota"),
        (403, b'{"code":403,"reason":"NOT_ENOUGH_BALANCE","message":"not enough balance","metadata":{}}', "quota"),
        (400, error("400", "Budget has been exceeded! Current cost: 2, Max budget: 1", "budget_exceeded"), "quota"),
        (400, error("", "Invalid value: 'Your credit balance is too low'."), "client"),
        (400, error("Arrearage", "Access denied, please make sure your account is in good standing."), "quota"),
        (400, error("billing_hard_limit_reached", kind="invalid_request_error"), "quota"),
        (400, error("", "Invalid value: 'monthly spending limit'."), "client"),
        (400, b'[{"error":{"code":400,"message":"User location is not supported for the API use."}}]', "auth"),
        (400, error("organization_restricted", "Organization has been restricted.", "invalid_request_error"), "auth"),
        (401, error("invalid_api_key"), "auth"),
        (402, b"", "quota"),
        (403, error(), "forbidden"),
        (403, error("model_not_found", "x"), "missing"),
        (403, error("", "Project has no access to model x"), "missing"),
        (403, error("403", "Your chosen model requires moderation and your input was flagged."), "client"),
        (403, error("", "You have insufficient permissions. Missing scopes: api.moderation.write"), "forbidden"),
        (403, b'{"code":"The caller ...","error":"Content violates usage guidelines. Failed check: SAFETY_BIO"}', "client"),
        (403, error("", "Input token count must be less than the context length of the model being queried."), "client"),
        (403, error("", "Your account has been flagged; contact support."), "forbidden"),
        (403, b'{"code":"The caller ...","error":"Your team t has reached its monthly spending limit."}', "quota"),
        (403, b'{"code":"The caller ...","error":"Your team doesn\'t have any credits or licenses yet."}', "quota"),
        (404, error("model_not_found"), "missing"),
        (404, error("DeploymentNotFound"), "missing"),
        (404, error("", "No such file"), "client"),
        # No API says this: the backend of a proxy is away.
        *((404, body, "fault") for body in (b"<html>", b"404 page not found", b"")),
        (412, error("", "Account x is suspended, possibly due to reaching the monthly spending limit."), "quota"),
        (413, error("rate_limit_exceeded", "... (TPM): Limit 6000, Requested 9000, please reduce ...", "tokens"), "large"),
        (429, b"\xff not json", "rate"),
        (429, b"[" * 100_000, "rate"),
        (429, error("rate_limit_exceeded", kind="requests"), "rate"),
        *((429, error(code), "quota") for code in ("insufficient_quota", "billing_hard_limit_reached", "1113")),
        *((429, error("", kind=kind), "quota") for kind in ("insufficient_quota", "exceeded_current_quota_error")),
        (429, error("other", kind="insufficient_quota"), "quota"),
        (429, error("billing_not_active", kind="billing_not_active"), "quota"),
        (429, error("1302", "Too many at once"), "rate"),
        (429, b'{"error":{"code":429,"message":"Your project has exceeded its monthly spending cap."}}', "quota"),
        (429, b'[{"error":{"code":429,"message":"Resource exhausted"}}]', "rate"),
        (429, b'{"error":"slow down"}', "rate"),
        *((status, b"", "ok") for status in (200, 204)),
        *((status, b"", "client") for status in (405, 412, 413, 415, 422)),
        *((status, b"", "fault") for status in (301, 408, 409, 424, 500, 503, 529, 700)),
        *((status, b"", "rate") for status in (429, 498)),
        (502, b"<html>", "fault"),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_judge_reply(status: int, body: bytes, outcome: str) -> None:
    """A status and an error body have one meaning."""
    assert judge(status, body).outcome is app.Outcome(outcome)


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


def test_configured_rate_codes_are_no_lack_of_credit() -> None:
    """A 429 with a code of `rate_codes` is a rate limit, whatever the code means elsewhere."""
    body = error("insufficient_quota")
    assert app.judge_reply(429, {}, body, request(), ("insufficient_quota",), 0.0).outcome is app.Outcome.RATE


PROVIDER = {"type": "error", "error": {"message": "prompt is too long: 209303 tokens > 200000 maximum"}}
WRAPPED = {"message": "Provider returned error", "code": 400, "metadata": {"raw": json.dumps(PROVIDER)}}


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize(
    "body",
    [
        *(error(code) for code in ("context_length_exceeded", "model_max_prompt_tokens_exceeded", "tokens_limit_reached")),
        json.dumps({"error": WRAPPED}).encode(),
        b'{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9000"}',
        b'{"message":"too many tokens: size limit exceeded by 19296 tokens. Try using shorter or fewer inputs."}',
        *(
            error("", message)
            for message in (
                "This model's maximum context length is 8192 tokens.",
                "This endpoint's maximum context length is 32768 tokens. However, you requested about 40000 tokens.",
                "Your input exceeds the context window of this model.",
                "input length and `max_tokens` exceed context limit: 195000 + 8192 > 200000",
                "prompt token count of 125516 exceeds the limit of 64000",
                "The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).",
                "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
                "Your request exceeded model token limit: 8192",
                "Range of input length should be [1, 8192]",
                "Input is too long for requested model.",
                "Prompt contains 40001 tokens and 0 draft tokens, too large for model with 32768 maximum context length",
                "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
                "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
                "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
                "invalid params, context window exceeds limit (2013)",
                "Please reduce the length of the messages or completion.",
            )
        ),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_prompts_that_are_too_long(body: bytes, status: int) -> None:
    """Codes and words of many vendors say that the prompt is longer than the model can take."""
    verdict = judge(status, body)
    assert (verdict.outcome, verdict.too_long) == (app.Outcome.CLIENT, True)


@pytest.mark.parametrize(
    "message",
    [
        "Invalid value: 'prompt is too long'. Supported values are: 'a' and 'b'.",
        "Invalid schema for function 'f': 'This model's maximum context length is 5' is not valid.",
        "Invalid 'messages[0].name': string too long. Expected a string with maximum length 64.",
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens.",
        "too many tokens: max tokens must be less than or equal to 4096, the maximum output for this model.",
        "The prompt is rude.",
    ],
)
def test_other_mistakes_about_lengths(message: str) -> None:
    """What a message quotes, and other limits, do not make a prompt too long."""
    verdict = judge(400, error("", message))
    assert (verdict.outcome, verdict.too_long) == (app.Outcome.CLIENT, False)


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


@pytest.mark.parametrize(
    ("event", "first", "late"),
    [
        (b'{"error":{"message":"x","type":"server_error"}}', "fault", "fault"),
        (b'{"error":{"message":"x","code":"insufficient_quota"}}', "quota", "quota"),
        (b'{"error":{"message":"x","type":"invalid_request_error"}}', "client", "ok"),
        (b'{"error":{"message":"x","code":"model_not_found"}}', "missing", "ok"),
        (b'{"error":{"message":"x","code":529}}', "fault", "fault"),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"x"}}', "fault", "fault"),
        (b'{"error":{"message":"x","code":"rate_limit_exceeded"}}', "rate", "rate"),
        (b'{"type":"response.failed","response":{"error":{"code":"rate_limit_exceeded"}}}', "rate", "rate"),
        (b'{"choices":[{"delta":{},"finish_reason":"error","error":{"message":"x","code":429}}]}', "rate", "rate"),
        (b'{"choices":[{"delta":{},"finish_reason":"error"}]}', "fault", "fault"),
        (b'{"code":400,"msg":"x","success":false}', "client", "ok"),
    ],
)
def test_error_events(event: bytes, first: str, late: str) -> None:
    """An error event counts as the status that belongs to it; in the middle of a stream a client's error counts as none."""
    event = b"data: " + event + b"\n\n"
    assert app.judge_error_event(event, ()).outcome is app.Outcome(first)
    assert app.judge_late_event(event, ()).outcome is app.Outcome(late)


CHAT = {"id": "c", "choices": [{"index": 0, "message": {"content": "error"}, "finish_reason": "stop"}], "error": None}


@pytest.mark.parametrize(
    ("body", "path", "outcome", "status"),
    [
        (json.dumps(CHAT), "/chat/completions", "ok", 200),
        (f" {json.dumps(CHAT, indent=1)} ", "/chat/completions", "ok", 200),
        ("", "/chat/completions", "fault", 502),
        ("<html>", "/chat/completions", "fault", 502),
        ("busy", "/completions", "fault", 502),
        (json.dumps(CHAT)[:-9], "/chat/completions", "fault", 502),
        (json.dumps({**CHAT, "choices": []}), "/chat/completions", "fault", 502),
        ('{"id":"c","object":"chat.completion","usage":{}}', "/chat/completions", "fault", 502),
        ('{"id":null,"created":1,"error":{"message":"x","code":503}}', "/chat/completions", "fault", 503),
        ('{"choices":null,"error":{"message":"x","code":"rate_limit_exceeded"}}', "/chat/completions", "rate", 429),
        ('{"code":500,"msg":"404 NOT_FOUND","success":false}', "/chat/completions", "fault", 500),
        ('{"object":"error","message":"x","type":"internal_error","code":50000}', "/chat/completions", "fault", 502),
        ('{"choices":[{"finish_reason":"error","error":{"code":502}}]}', "/chat/completions", "fault", 502),
        ('[{"error":{"code":429,"message":"Resource exhausted"}}]', "/chat/completions", "rate", 429),
        ('{"error":{"message":"x","type":"invalid_request_error"}}', "/chat/completions", "client", 400),
        ('{"data":[],"error":{"message":"x"}}', "/embeddings", "fault", 502),
        ('{"code":500,"success":false}', "/embeddings", "fault", 500),
        ('{"object":"response","output":[],"error":null}', "/responses", "ok", 200),
        ('"error"', "/audio/transcriptions", "ok", 200),
    ],
)
def test_answers_that_are_none(body: str, path: str, outcome: str, status: int) -> None:
    """A 200 without an answer counts as the error that it holds, or as a fault."""
    asked = request(False)
    asked.path = path
    verdict = app.judge_answer(body.encode(), asked, ())
    assert (verdict.outcome.value, verdict.status) == (outcome, status)


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
    """The client's own error helps it most, then a 429, a fault, a missing model, and least an account's key."""
    order = ("client", "large", "rate", "quota", "fault", "missing", "auth", "forbidden", "barred", "gone")
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
        ({b"retry-after": b"Tue, 24 Nov 2026 15:00:30 GMT", b"date": b"Tue, 24 Nov 2026 15:00:00 GMT"}, "", 30.0),
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
        (
            {
                **fields(limit=b"120", remaining=b"39", reset=b"2026-11-24T15:00:40Z"),
                b"date": b"Tue, 24 Nov 2026 15:00:00 GMT",
            },
            (120, 39, 40.0),
        ),
        (fields(limit=b"0", remaining=b"0", reset=b"0"), None),
        *((fields(limit=b"500", remaining=left), None) for left in (b"-1", b"", b"\xb2")),
        *((fields(limit=limit, remaining=b"1"), None) for limit in (b"", b"-1", b"5e2", b"500.5", b"9" * 40, b"\xb2")),
        ({}, None),
        (
            {
                b"anthropic-ratelimit-requests-limit": b"50",
                b"anthropic-ratelimit-requests-remaining": b"49",
                b"anthropic-ratelimit-requests-reset": b"2026-11-24T16:00:05Z",
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


def test_allowances_of_tokens() -> None:
    """A reply reports requests and tokens independently."""
    index = {**fields(b"tokens", limit=b"9000", remaining=b"8000", reset=b"6s"), b"x-other": b"1"}
    assert app.read_allowances(index, lambda: WALL_S) == (None, (9000, 8000, 6.0))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'..."usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}', (12, 7)),
        (b'"usage": {"input_tokens" : 5, "output_tokens" : 7}', (12, 7)),
        (b'"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":13}', (13, 7)),
        (b'"usage":{"prompt_tokens":5,"total_tokens":5}', (5, 0)),
        (b'"usage":null}\n\ndata: [DONE]\n\n', (0, 0)),
        (b'"usage":null}\n\ndata: {"choices":[],"usage":{"completion_tokens":1,"total_tokens":2}}', (2, 1)),
        (b"", (0, 0)),
        (b'"usage":{"total_tokens":"many"}', (0, 0)),
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":7},"choices":["usage"' + b"x" * 9000, (12, 7)),
    ],
)
def test_used_tokens(tail: bytes, expected: tuple[int, int]) -> None:
    """The last usage in an answer counts, wherever it stands."""
    assert app.used_tokens(tail) == expected


def test_used_tokens_without_cached_ones() -> None:
    """Tokens from the prompt cache do not count where the account gives them for free."""
    tail = b'"usage":{"completion_tokens":7,"total_tokens":107,"prompt_tokens_details":{"cached_tokens":90}}'
    assert app.used_tokens(tail) == (107, 7) and app.used_tokens(tail, cache_free=True) == (17, 7)
