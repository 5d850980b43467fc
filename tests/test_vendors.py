"""Differences between vendors that a row of PRESETS states."""

import json
from typing import Any

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


# -- what an API or a model does not take

SEEN = {"role": "assistant", "content": "a", "reasoning_content": "r", "thinking_blocks": [{"type": "thinking"}]}
HISTORY = [{"role": "developer", "content": "d"}, SEEN, {"role": "user", "content": "reasoning_content"}]
BARE = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "d"}


@pytest.mark.parametrize(
    ("kind", "account", "sent"),
    [
        ("groq", {}, [HISTORY[0], BARE, HISTORY[2]]),
        ("mistral", {}, [SYSTEM, BARE, HISTORY[2]]),
        ("deepseek", {}, [SYSTEM, *HISTORY[1:]]),
        ("moonshot", {}, [SYSTEM, *HISTORY[1:]]),
        ("openai", {"refuses": ["thinking_blocks"]}, [HISTORY[0], {**BARE, "reasoning_content": "r"}, HISTORY[2]]),
    ],
)
async def test_a_history_loses_what_a_vendor_refuses(kind: str, account: dict[str, Any], sent: list[Any]) -> None:
    """Fields of other vendors are left out, and the role `developer` is renamed; all else stays byte for byte."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one:
        async with Running({**controller("a", one.url, account=account), "type": kind}) as server:
            await server.post(messages=HISTORY)
            await server.post(messages=HISTORY[2:])
    assert one.seen[0].json()["messages"] == sent
    assert one.seen[1].body == json.dumps({"model": "gpt-4.1", "messages": HISTORY[2:]}).encode()


@pytest.mark.parametrize(
    ("word", "message", "sent"),
    [
        ("thinking_blocks", "Unknown parameter: 'messages[1].thinking_blocks'.", {**BARE, "reasoning_content": "r"}),
        ("developer", "developer is not one of ['system', 'user']", SEEN),
    ],
)
async def test_a_refusal_of_what_other_vendors_add(word: str, message: str, sent: dict[str, Any]) -> None:
    """The client never sees it: the account is asked again without the word, and does not get it any more."""
    refusal, good = error_reply(400, message=message), json_reply(200, ANSWER)
    async with Upstream(answers(refusal, good)) as one, Running(controller("a", one.url)) as server:
        for _ in range(2):
            assert (await server.post(messages=HISTORY)).status == 200
        found = [seen.json()["messages"] for seen in one.seen]
        assert found == [HISTORY, *[[SYSTEM if word == "developer" else HISTORY[0], sent, HISTORY[2]]] * 2]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_parameter_that_a_model_does_not_take(count: int) -> None:
    """An account of another kind is asked; one of the same kind would say the same. Alone, the refusal is returned."""
    refusal = error_reply(400, "unsupported_value", "Unsupported value: 'temperature' does not support 0.2.")
    async with Upstream(answers(refusal)) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        controllers = [controller("a", one.url), controller("b", one.url), controller("c", two.url)]
        async with Running(*controllers[:count], pool={"type": "priority"}) as server:
            answer = await server.post(temperature=0.2)
            assert answer.status == (200 if count == 3 else 400) and len(one.seen) == 1
            assert count == 3 or answer.body == refusal.partition(b"\r\n\r\n")[2]
            assert {state["state"] for state in (await server.status())["controllers"]} == {"ok"}
