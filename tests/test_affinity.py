"""Long conversations stay where their prompt cache is, shares stay the weights', and short ones notice nothing."""

import asyncio
import random
from collections import Counter, OrderedDict
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply

LONG = "x" * 5000


def pool_of(*weights: int, groups: str = "", **more: Any) -> app.UpstreamPool:
    """A pool of controllers a, b, c ... that never open a connection; `groups`: a letter of each one's quota group."""
    controllers = [{"type": "echo", "name": name, "weight": w} for name, w in zip("abcdef", weights, strict=False)]
    for one, group in zip(controllers, groups, strict=False):
        one["quota_group"] = group
    config = app.parse_config({"controllers": controllers, "pool": more}, "c.json", {})
    pool = app.UpstreamPool([], config.pool, asyncio.get_running_loop())
    app.rebuild_pool(pool, config)
    return pool


def chat(*texts: str, **more: Any) -> app.ApiRequest:
    """A chat of a system message, then the user's and the model's in turn."""
    roles = ["system", *("user", "assistant") * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    made = app.ApiRequest("POST", "/chat/completions", "", b"", b"")
    made.data, made.model = {"model": "m", "messages": messages, **more}, "m"
    made.prompt_tokens = app.estimate_prompt(made.data)
    return made


def lease(pool: app.UpstreamPool, asked: app.ApiRequest) -> app.Lease:
    """The right to send this request."""
    found = pool.lease_at_once(asked, pool.candidates("m"), set())
    assert found is not None
    return found


def send(pool: app.UpstreamPool, asked: app.ApiRequest) -> str:
    """Where this request went; it is over at once."""
    found = lease(pool, asked)
    found.sent(asyncio.get_running_loop().time())
    pool.settle(found, app.OK)
    return found.upstream.name


async def test_turns_of_a_conversation_go_to_one_controller() -> None:
    """Whatever follows the first user message, and whatever other conversations do meanwhile."""
    pool = pool_of(1, 1, 1, 1)
    for number in range(50):
        first = f"question {number}"
        places = {send(pool, chat(LONG, first))}
        for _ in range(3):
            send(pool, chat(LONG, f"other {random.random()}"))
            places.add(send(pool, chat(LONG, first, "answer", "and then?")))
        assert len(places) == 1
    pool.close()


@pytest.mark.parametrize("kind", ["balanced", "random", "least_busy"])
async def test_shares_are_the_weights(kind: str) -> None:
    """Over many conversations each controller gets its weight's share, though their system prompt is one."""
    pool = pool_of(1, 2, 1, type=kind)
    seen = Counter(send(pool, chat(LONG, f"question {number}")) for number in range(4000))
    assert abs(seen["a"] - 1000) < 120 and abs(seen["b"] - 2000) < 150 and abs(seen["c"] - 1000) < 120
    pool.close()


@pytest.mark.parametrize("how", ["short", "off", "no user"])
async def test_all_else_keeps_the_exact_sequence(how: str) -> None:
    """Short prompts, a pool that is told so, and prompts without a user make the sequence of the Go original."""
    pool = pool_of(5, 1, 1, affinity=how != "off")
    system = "hi" if how == "short" else LONG
    asked = chat(system) if how == "no user" else chat(system, "question")
    assert "".join(send(pool, asked) for _ in range(14)) == "aabacaa" * 2
    pool.close()


@pytest.mark.parametrize("kind", ["priority", "fastest"])
async def test_policies_with_a_point_of_their_own_stay(kind: str) -> None:
    """Where the order or the speed decides no conversation does."""
    pool = pool_of(1, 1, 1, type=kind)
    assert {send(pool, chat(LONG, str(number))) for number in range(20)} == {"a"}
    pool.close()


async def test_a_cache_key_is_the_conversation() -> None:
    """The client's prompt_cache_key counts more than the words."""
    pool = pool_of(1, 1, 1, 1)
    assert len({send(pool, chat(LONG, str(n), prompt_cache_key="k")) for n in range(40)}) == 1
    assert len({send(pool, chat(LONG, "q", prompt_cache_key=str(n))) for n in range(40)}) == 4
    assert len({send(pool, chat(LONG, str(n), prompt_cache_key=7)) for n in range(40)}) == 4
    pool.close()


async def test_the_load_is_bounded() -> None:
    """One conversation in many requests at once gets no more of a controller than 1.25 of its share."""
    pool = pool_of(1, 1, 1, 1)
    leases = [lease(pool, chat(LONG, "q")) for _ in range(400)]
    loads = Counter(one.upstream.name for one in leases)
    assert max(loads.values()) <= 126 and min(loads.values()) > 0
    for one in leases:
        pool.settle(one, app.Verdict(app.Outcome.GONE))
    pool.close()


async def test_only_the_conversations_of_the_lost_move() -> None:
    """When a controller is out the others keep what they had; when it is back it gets back what it had."""
    pool = pool_of(1, 1, 1, 1)
    before = {number: send(pool, chat(LONG, str(number))) for number in range(200)}
    lost = pool.upstreams[1]
    lost.gate.shut(app.FAILING, asyncio.get_running_loop().time(), "test", 60.0)
    during = {number: send(pool, chat(LONG, str(number))) for number in range(200)}
    assert all(during[number] == place for number, place in before.items() if place != "b")
    assert "b" not in during.values() and len({during[n] for n, place in before.items() if place == "b"}) == 3
    lost.gate.open(0.0)
    assert {number: send(pool, chat(LONG, str(number))) for number in range(200)} == before
    pool.close()


async def test_a_quota_group_is_one_account() -> None:
    """Keys of one organisation share its conversations, as its cache is one; shares stay the weights'."""
    pool = pool_of(1, 1, 1, 1, groups="ggxy")
    before = {number: send(pool, chat(LONG, str(number))) for number in range(2000)}
    assert all(abs(Counter(before.values())[name] - 500) < 80 for name in "abcd")
    for number, place in before.items():
        assert ("ab" if place in "ab" else place).count(send(pool, chat(LONG, str(number))))
    pool.upstreams[0].gate.shut(app.FAILING, asyncio.get_running_loop().time(), "test", 60.0)
    moved = Counter(send(pool, chat(LONG, str(number))) for number, place in before.items() if place in "ab")
    assert moved["b"] == pytest.approx(1000 * 2 / 3, rel=0.15)  # the group has half of its weight, of four now three
    leases = [lease(pool, chat(LONG, "q")) for _ in range(300)]
    assert max(Counter(one.upstream.name for one in leases).values()) <= 126
    for one in leases:
        pool.settle(one, app.Verdict(app.Outcome.GONE))
    pool.close()


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


class Cache:
    """An account that remembers the beginnings of the last conversations that it saw."""

    def __init__(self, size: int) -> None:
        self.known: OrderedDict[str, int] = OrderedDict()
        self.size, self.cached, self.total = size, 0, 0

    def take(self, thread: str, tokens: int) -> None:
        self.cached += min(self.known.pop(thread, 0), tokens)
        self.total += tokens
        self.known[thread] = tokens
        while len(self.known) > self.size:
            self.known.popitem(last=False)


@pytest.mark.parametrize(("affinity", "least", "most"), [(True, 0.8, 1.0), (False, 0.0, 0.4)])
async def test_cached_tokens(affinity: bool, least: float, most: float) -> None:
    """Most of the prompts' tokens are found in the accounts' caches, which balancing alone loses."""
    pool, chance = pool_of(1, 1, 1, 1, 1, 1, affinity=affinity, type="random"), random.Random(7)
    random.seed(7)
    caches = {name: Cache(60) for name in "abcdef"}
    talks: dict[str, list[str]] = {f"talk {number}": [LONG, f"question {number}"] for number in range(200)}
    for _ in range(3000):
        name = chance.choice(list(talks))
        asked = chat(*talks[name])
        caches[send(pool, asked)].take(name, asked.prompt_tokens)
        talks[name] += ["answer " * 20, "and then? " * 20]
        if len(talks[name]) > 24:
            del talks[name]
            talks[f"talk {chance.random()}"] = [LONG, f"question {chance.random()}"]
    share = sum(one.cached for one in caches.values()) / sum(one.total for one in caches.values())
    assert least <= share <= most
    pool.close()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}, False),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]},
                    {"role": "x"},
                ]
            },
            True,
        ),
        (
            {"messages": [{"role": "user", "content": "a" * 40000 + "b" * 2000 + "a" * 40000}]},
            {"messages": [{"role": "user", "content": "a" * 40000 + "c" * 2000 + "a" * 40000}]},
            False,
        ),
        ({"input": "x"}, {"messages": ["x"]}, True),
        ({"messages": [{"role": "user", "content": None}, {}]}, {"messages": [{"role": "user"}]}, True),
        ({"prompt_cache_key": "\ud800"}, {"prompt_cache_key": "?"}, True),
        ({"prompt_cache_key": "a"}, {"prompt_cache_key": "b"}, False),
    ],
)
def test_what_a_conversation_goes_by(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    """Texts through the first of the user count; anything at all is taken."""
    assert (app.thread_of(one) == app.thread_of(other)) is same
