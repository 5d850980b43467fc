"""Quirks of vendors that a row in PRESETS states."""

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply, sse_reply

GOOD = json_reply(200, ANSWER)
SPENT = b'{"error":{"message":"Allocated quota exceeded.","type":"insufficient_quota","code":"insufficient_quota"}}'
REFUSED = error_reply(429, "insufficient_quota", "Allocated quota exceeded, please try again in 7s.")
IN_A_STREAM = sse_reply(b"data: " + SPENT + b"\n\n")


@pytest.mark.parametrize("bad", [REFUSED, IN_A_STREAM, json_reply(200, {"error": {"code": "insufficient_quota"}})])
@pytest.mark.parametrize(
    ("kind", "account", "parked"),
    [
        ("dashscope", {}, False),
        ("dashscope-intl", {}, False),
        ("openai", {}, True),
        ("openai", {"rate_codes": ["insufficient_quota"]}, False),
        ("dashscope", {"rate_codes": []}, True),
    ],
)
async def test_a_throttle_that_sounds_like_an_empty_purse(
    bad: bytes, kind: str, account: "dict[str, list[str]]", parked: bool
) -> None:
    """Where the row says that the code means a rate limit, the account is closed for that time and not parked."""
    async with Upstream(answers(bad)) as one, Upstream(answers(GOOD)) as two:
        first = {**controller("a", one.url, account=account), "type": kind}
        async with Running(first, controller("b", two.url), pool={"type": "priority"}) as server:
            found = await server.post(stream=b"data:" in bad)
            assert found.headers["x-apiserver-controller"] == "b"
            upstream = server.server.pool.upstreams[0]
            assert bool(upstream.quota.park_s) == parked and upstream.failures == 0
            now = server.server.loop.time()
            closed = upstream.seat("gpt-4.1").room_at(1, now) - now
            assert parked or 0 < closed <= (7 if bad is REFUSED else 1)


def test_every_other_vendor_means_what_it_says() -> None:
    """The exception is a row's: with no word of it the code parks the account."""
    assert app.judge_reply(429, {}, SPENT, 0.0).outcome is app.Outcome.QUOTA
    assert app.judge_reply(429, {}, SPENT, 0.0, rate_codes=("insufficient_quota",)).outcome is app.Outcome.RATE
    assert app.judge_reply(402, {}, SPENT, 0.0, rate_codes=("insufficient_quota",)).outcome is app.Outcome.QUOTA
