"""What a reply means, when another attempt is safe, and what replies say of quotas."""

import pytest

import chatgpt_apiserver as app


def request(stream: bool = True, stateful: bool = False) -> app.ApiRequest:
    """A request of that kind."""
    made = app.ApiRequest("POST", "/v1/chat/completions", "", b"", b"")
    made.stream, made.stateful = stream, stateful
    return made


def error(code: str = "", message: str = "", kind: str = "") -> bytes:
    """An error body."""
    return app.compact_json({"error": {"message": message, "type": kind, "code": code or None, "param": None}})


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b"", "ok"),
        (204, b"", "ok"),
        (301, b"", "fault"),
        (400, error("model_not_found"), "client"),
        (400, b'[{"error":{"code":400,"message":"API key not valid. Please pass a valid one.","status":"x"}}]', "auth"),
        (400, b'{"code":"Client specified ...","error":"Incorrect API key provided: na***ys. You can ..."}', "auth"),
        (400, error("invalid_value", "Invalid value: 'Incorrect API key provided'."), "client"),
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
        (404, b"<html>", "client"),
        (405, b"", "client"),
        (408, b"", "fault"),
        (409, b"", "fault"),
        (412, error("", "Account x is suspended, possibly due to reaching the monthly spending limit."), "quota"),
        (412, b"", "client"),
        (413, b"", "client"),
        (413, error("rate_limit_exceeded", "... (TPM): Limit 6000, Requested 9000, please reduce ...", "tokens"), "large"),
        (415, b"", "client"),
        (422, b"", "client"),
        (424, b"", "fault"),
        (429, b"", "rate"),
        (429, b"\xff not json", "rate"),
        (429, b"[" * 100_000, "rate"),
        (429, error("rate_limit_exceeded", kind="requests"), "rate"),
        (429, error("insufficient_quota"), "quota"),
        (429, error("", kind="insufficient_quota"), "quota"),
        (429, error("other", kind="insufficient_quota"), "quota"),
        (429, error("billing_hard_limit_reached"), "quota"),
        (429, error("", kind="exceeded_current_quota_error"), "quota"),
        (429, error("billing_not_active", kind="billing_not_active"), "quota"),
        (429, error("1113", "No balance"), "quota"),
        (429, error("1302", "Too many at once"), "rate"),
        (429, b'{"error":{"code":429,"message":"Your project has exceeded its monthly spending cap."}}', "quota"),
        (429, b'[{"error":{"code":429,"message":"Resource exhausted"}}]', "rate"),
        (429, b'{"error":"slow down"}', "rate"),
        (498, b"", "rate"),
        (500, b"", "fault"),
        (502, b"<html>", "fault"),
        (503, b"", "fault"),
        (529, b"", "fault"),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_judge_reply(status: int, body: bytes, outcome: str) -> None:
    """A status and an error body have one meaning."""
    assert app.judge_reply(status, {}, body, 0.0).outcome is app.Outcome(outcome)


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (app.ConnectFailed("x"), "connect"),
        (app.UpstreamTimeout("x", early=True), "silent"),
        (app.UpstreamTimeout("x"), "fault"),
        (app.UpstreamClosed("x", early=True), "fault"),
        (app.UpstreamClosed("x"), "fault"),
        (app.BadReply("x"), "fault"),
    ],
)
def test_judge_error(failure: app.UpstreamError, outcome: str) -> None:
    """An attempt without an answer has one meaning."""
    assert app.judge_error(failure).outcome is app.Outcome(outcome)


@pytest.mark.parametrize("outcome", list(app.Outcome))
def test_may_retry(outcome: app.Outcome) -> None:
    """Answers never move on, stateful requests only when they did not run, silent whole answers never."""
    verdict, final = app.Verdict(outcome, 500), outcome.value in {"ok", "client", "gone"}
    assert app.may_retry(verdict, request(stream=True)) is not final
    assert app.may_retry(verdict, request(stream=False)) is not (final or outcome.value == "silent")
    refused = outcome.value in {"unfit", "connect", "auth", "rate", "quota", "large"}
    for stream in (True, False):
        assert app.may_retry(verdict, request(stream, stateful=True)) is refused


def test_a_stateful_request_moves_on_from_a_503_only() -> None:
    """A 503 says that nothing ran; a 500 does not."""
    assert app.may_retry(app.Verdict(app.Outcome.FAULT, 503), request(stateful=True))
    assert not app.may_retry(app.Verdict(app.Outcome.FAULT, 500), request(stateful=True))
