"""Long conversations stay where their prompt cache is, shares stay the weights', and short ones notice nothing."""

import asyncio
import random
from collections import Counter
from itertools import zip_longest
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply

LONG = "x" * 5000


def pool_of(*weights: int, groups: str = "", **more: Any) -> app.UpstreamPool:
    """Return a pool of controllers a, b, c ...; `groups` has a letter for the quota group of each."""
    controllers = [
        {"type": "echo", "name": name, "weight": weight, **({"quota_group": group} if group else {})}
        for name, weight, group in zip_longest("abcdef"[: len(weights)], weights, groups)
    ]
    config = app.parse_config({"controllers": controllers, "pool": more}, "c.json", {})
    pool = app.UpstreamPool([], config.pool, asyncio.get_running_loop())
    app.rebuild_pool(pool, config)
    return pool


def chat(*texts: str, **more: Any) -> app.ApiRequest:
    """Return a chat of a system message, then messages of the user and the model in turn."""
    roles = ["system", *("user", "assistant") * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    made = app.ApiRequest("POST", "/chat/completions", "", b"", b"")
    made.data, made.model = {"model": "m", "messages": messages, **more}, "m"
    made.prompt_tokens = app.estimate_prompt(made.data)
    return made


def lease(pool: app.UpstreamPool, asked: app.ApiRequest) -> app.Lease:
    """Return the right to send this request."""
    found = pool.lease_at_once(asked, pool.candidates("m"), set())
    assert found is not None
    return found


def send(pool: app.UpstreamPool, asked: app.ApiRequest) -> str:
    """Return the name of the controller that got this request; it is over at once."""
    found = lease(pool, asked)
    found.sent(asyncio.get_running_loop().time())
    pool.settle(found, app.OK)
    return found.upstream.name


def loads(pool: app.UpstreamPool, count: int) -> Counter[str]:
    """Return how many of so many requests at once, all of one conversation, each controller gets."""
    leases = [lease(pool, chat(LONG, "q")) for _ in range(count)]
    for held in leases:
        pool.settle(held, app.Verdict(app.Outcome.GONE))
    return Counter(held.upstream.name for held in leases)


async def test_turns_of_a_conversation_go_to_one_controller() -> None:
    """All requests that begin with the same messages go to one controller, whatever other conversations do."""
    pool = pool_of(1, 1, 1, 1)
    for number in range(50):
        first = f"question {number}"
        places = {send(pool, chat(LONG, first))}
        for _ in range(3):
            send(pool, chat(LONG, f"other {random.random()}"))
            places.add(send(pool, chat(LONG, first, "answer", "and then?")))
        assert len(places) == 1


@pytest.mark.parametrize("kind", ["balanced", "random", "least_busy"])
async def test_shares_are_the_weights(kind: str) -> None:
    """Over many conversations with one system prompt each controller gets the share of its weight."""
    pool = pool_of(1, 2, 1, type=kind)
    seen = Counter(send(pool, chat(LONG, f"question {number}")) for number in range(4000))
    assert abs(seen["a"] - 1000) < 120 and abs(seen["b"] - 2000) < 150 and abs(seen["c"] - 1000) < 120


@pytest.mark.parametrize(
    ("more", "system", "texts", "sequence"),
    [
        ({}, "hi", ["question"], "aabacaa"),
        ({"affinity": False}, LONG, ["question"], "aabacaa"),
        ({}, LONG, [], "aabacaa"),
        ({"type": "priority"}, LONG, ["question"], "aaaaaaa"),
        ({"type": "fastest"}, LONG, ["question"], "aaaaaaa"),
    ],
)
async def test_where_no_conversation_decides(more: dict[str, Any], system: str, texts: list[str], sequence: str) -> None:
    """Short prompts, prompts without a user, other policies and a pool without affinity are balanced as ever."""
    pool = pool_of(5, 1, 1, **more)
    assert "".join(send(pool, chat(system, *texts)) for _ in range(14)) == sequence * 2


async def test_a_cache_key_is_the_conversation() -> None:
    """The client's prompt_cache_key counts more than the words."""
    pool = pool_of(1, 1, 1, 1)
    assert len({send(pool, chat(LONG, str(n), prompt_cache_key="k")) for n in range(40)}) == 1
    assert len({send(pool, chat(LONG, "q", prompt_cache_key=str(n))) for n in range(40)}) == 4
    assert len({send(pool, chat(LONG, str(n), prompt_cache_key=7)) for n in range(40)}) == 4


async def test_the_load_is_bounded() -> None:
    """One conversation in many requests at once gets no more of a controller than 1.25 of its share."""
    shares = loads(pool_of(1, 1, 1, 1), 400)
    assert max(shares.values()) <= 126 and min(shares.values()) > 0


async def test_only_the_conversations_of_the_lost_move() -> None:
    """When a controller is out only its conversations move; when it is back they return."""
    pool = pool_of(1, 1, 1, 1)
    before = {number: send(pool, chat(LONG, str(number))) for number in range(200)}
    lost = pool.upstreams[1]
    lost.gate.shut(app.FAILING, asyncio.get_running_loop().time(), "test", 60.0)
    during = {number: send(pool, chat(LONG, str(number))) for number in range(200)}
    assert all(during[number] == place for number, place in before.items() if place != "b")
    assert "b" not in during.values() and len({during[n] for n, place in before.items() if place == "b"}) == 3
    lost.gate.open(0.0)
    assert {number: send(pool, chat(LONG, str(number))) for number in range(200)} == before


async def test_a_quota_group_is_one_account() -> None:
    """Keys of one organisation share its conversations, because they share its cache; shares stay those of the weights."""
    pool = pool_of(1, 1, 1, 1, groups="ggxy")
    before = {number: send(pool, chat(LONG, str(number))) for number in range(2000)}
    assert all(abs(Counter(before.values())[name] - 500) < 80 for name in "abcd")
    for number, place in before.items():
        assert ("ab" if place in "ab" else place).count(send(pool, chat(LONG, str(number))))
    pool.upstreams[0].gate.shut(app.FAILING, asyncio.get_running_loop().time(), "test", 60.0)
    moved = Counter(send(pool, chat(LONG, str(number))) for number, place in before.items() if place in "ab")
    assert moved["b"] == pytest.approx(1000 * 2 / 3, rel=0.15)  # the group has half of its weight, of four now three
    assert max(loads(pool, 300).values()) <= 126


async def test_a_full_controller_is_left_at_once() -> None:
    """A 429 sends the conversation on within the same request."""
    async with Upstream(answers(error_reply(429, "x", "no", "retry-after: 60"))) as one:
        async with Upstream(answers(json_reply(200, ANSWER))) as two:
            async with Running(controller("a", one.url), controller("b", two.url)) as server:
                messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "q"}]
                for _ in range(8):
                    found = await server.post(messages=messages)
                    assert found.status == 200 and found.headers["x-apiserver-wait-ms"] == "0"
                assert len(one.seen) <= 1


def user(content: Any, **more: Any) -> dict[str, Any]:
    """Return a request with one message of the user."""
    return {"messages": [{"role": "user", "content": content}], **more}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (user("a"), user("b"), False),
        (user([{"type": "text", "text": "a"}, {"type": "image_url"}]), user([{"type": "text", "text": "a"}, {}]), True),
        (user("a" * 40000 + "b" * 2000 + "a" * 40000), user("a" * 40000 + "c" * 2000 + "a" * 40000), False),
        ({"input": ["x"]}, {"messages": ["x"]}, True),
        ({"input": "x"}, user("x"), True),
        ({"input": "x", "instructions": "a"}, {"input": "x", "instructions": "b"}, False),
        ({"input": "x", "instructions": "a"}, {"input": user([{"text": "x"}])["messages"], "instructions": "a"}, True),
        ({"messages": [{"role": "user", "content": None}, {}]}, {"messages": [{"role": "user"}]}, True),
        ({"prompt_cache_key": "\ud800"}, {"prompt_cache_key": "?"}, True),
        ({"prompt_cache_key": "a"}, {"prompt_cache_key": "b"}, False),
    ],
)
def test_what_a_conversation_goes_by(first: dict[str, Any], second: dict[str, Any], same: bool) -> None:
    """The texts up to the first message of the user identify a conversation; no shape of request is an error."""
    assert (app.thread_of(first) == app.thread_of(second)) is same
