"""Differences between vendors that a row of PRESETS states."""

import pytest

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply, sse_reply

SPENT = b'{"error":{"message":"Allocated quota exceeded.","type":"insufficient_quota","code":"insufficient_quota"}}'


@pytest.mark.parametrize(
    "bad",
    [
        error_reply(429, "insufficient_quota", "Allocated quota exceeded, please try again in 7s."),
        sse_reply(b"data: " + SPENT + b"\n\n"),
        json_reply(200, {"error": {"code": "insufficient_quota"}}),
    ],
    ids=["429", "stream", "200"],
)
@pytest.mark.parametrize(
    ("kind", "account", "no_credit"),
    [
        ("dashscope", {}, False),
        ("dashscope-intl", {}, False),
        ("openai", {}, True),
        ("openai", {"rate_codes": ["insufficient_quota"]}, False),
        ("dashscope", {"rate_codes": []}, True),
    ],
)
async def test_a_rate_limit_with_the_code_of_missing_credit(
    bad: bytes, kind: str, account: "dict[str, list[str]]", no_credit: bool
) -> None:
    """Where the row says that the code is a rate limit, only this model is closed; elsewhere the account is out."""
    async with Upstream(answers(bad)) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        first = {**controller("a", one.url, account=account), "type": kind}
        async with Running(first, controller("b", two.url), pool={"type": "priority"}) as server:
            for model, calls in (("gpt-4.1", 1), ("gpt-4.1", 1), ("gpt-4o", 1 if no_credit else 2)):
                found = await server.post(model, stream=b"data:" in bad)
                assert found.headers["x-apiserver-controller"] == "b" and len(one.seen) == calls


@pytest.mark.parametrize(("status", "calls"), [(429, 2), (402, 1)])
async def test_a_402_is_missing_credit_everywhere(status: int, calls: int) -> None:
    """The row is about 429: a 402 with the same code means that the account is out of credit."""
    bad = json_reply(status, {"error": {"message": "Spent.", "code": "insufficient_quota"}})
    async with Upstream(answers(bad)) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        first = {**controller("a", one.url), "type": "dashscope"}
        async with Running(first, controller("b", two.url), pool={"type": "priority"}) as server:
            for model in ("gpt-4.1", "gpt-4o"):
                assert (await server.post(model)).headers["x-apiserver-controller"] == "b"
            assert len(one.seen) == calls
