"""Models by other names, and models that answer in place of others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from .support import ANSWER, MESSAGES, Listing, Message, Peer, Running, Script, Upstream, answers, controller, error_reply, event, json_reply, now, sse_reply

OK = json_reply(200, ANSWER)
STREAM = sse_reply(event("a"), b"data: [DONE]\n\n")
TOO_LONG = error_reply(400, "context_length_exceeded", "This model's maximum context length is 8192 tokens.")
FALLBACK = {"fallbacks": {"m-1": ["m-2"]}}


def sole(name: str, one: Upstream, model: str) -> dict[str, Any]:
    """Return a controller that serves one model."""
    return controller(name, one.url, models=[model])


def asked(one: Upstream) -> list[str]:
    """Return the models that an upstream was asked for."""
    return [seen.json()["model"] for seen in one.seen]


@asynccontextmanager
async def two_models(first: Script, second: Script, pool: dict[str, Any], **more: Any) -> AsyncIterator[tuple[Running, Upstream, Upstream]]:
    """Run a server whose controller a serves m-1 and b serves m-2; `more` configures the first."""
    async with Upstream(first) as one, Upstream(second) as two:
        async with Running({**sole("a", one, "m-1"), **more}, sole("b", two, "m-2"), pool=pool) as server:
            yield server, one, two


@pytest.mark.parametrize("stream", [False, True])
async def test_an_alias_of_a_mapped_model(stream: bool) -> None:
    """The answer names what was asked for and what was sent; all else in the request stays."""
    async with Upstream(answers(STREAM if stream else OK)) as one:
        mapped = controller("a", one.url, model_map={"mini": "prod-é"})
        async with Running(mapped, pool={"aliases": {"fast": "mini"}}) as server:
            for name in ("fast", "mini"):
                answer = await server.post(name, stream=stream)
                assert answer.headers["x-apiserver-model"] == name + r" -> prod-\xe9"
            assert "x-apiserver-model" not in (await server.post("other")).headers
            assert "model=fast" in server.access_lines()[0]
            data = {"messages": MESSAGES, "model": "fast", "n": 1.0, "x": {"model": "fast"}, "stream": stream}
            assert (await server.ask("POST", "/v1/chat/completions", data)).status == 200
        assert asked(one) == ["prod-é", "prod-é", "other", "prod-é"] and one.seen[3].json() == {**data, "model": "prod-é"}


async def test_client_keys_judge_the_name_that_is_asked_for() -> None:
    """A key that may use an alias needs no right to its model, nor to that model's fallback."""
    keys = [{"name": "k", "key": "client-key-0001", "models": ["fast"]}]
    pool = {"aliases": {"fast": "a-1"}, "fallbacks": {"a-1": ["b-1"]}}
    async with Upstream(answers(error_reply(500))) as one, Upstream(answers(OK)) as two:
        async with Running(sole("a", one, "a-1"), sole("b", two, "b-1"), pool=pool, client_keys=keys) as server:
            key = "Authorization: Bearer client-key-0001"
            assert [(await server.post(name, key)).status for name in ("a-1", "b-1")] == [403, 403]
            assert (await server.post("fast", key)).headers["x-apiserver-model"] == "fast -> b-1"


async def test_all_names_are_listed() -> None:
    """Aliases are listed with their model if it is served, and so are models that only have a fallback."""
    pool = {"aliases": {"fast": "a-1", "dead": "missing"}, "fallbacks": {"gone": ["a-1"], "a-1": ["b-1"]}}
    async with Upstream(answers(OK)) as one:
        async with Running(sole("a", one, "a-1"), sole("b", one, "b-1"), pool=pool) as server:
            listed = (await server.ask("GET", "/v1/models")).json()["data"]
            models = {model["id"]: model for model in listed}
            assert sorted(models) == ["a-1", "b-1", "fast", "gone"] and models["fast"]["root"] == "a-1"
            assert "root" not in models["a-1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bad", [error_reply(500), error_reply(401), error_reply(429, "x", "no", "retry-after: 99")])
async def test_fallbacks_are_tried_in_their_order(bad: bytes, stream: bool) -> None:
    """When every controller of a model failed the next model is tried with all its controllers."""
    async with Upstream(answers(bad)) as one, Upstream(answers(STREAM if stream else OK)) as two:
        controllers = [sole("a", one, "m-1"), sole("b", one, "m-1"), sole("c", one, "m-2"), sole("d", two, "m-3")]
        async with Running(*controllers, pool={"fallbacks": {"m-1": ["unknown", "m-2", "m-3"]}}) as server:
            answer = await server.post("m-1", stream=stream)
            assert answer.status == 200 and answer.headers["x-apiserver-model"] == "m-1 -> m-3"
            assert answer.headers["x-apiserver-attempts"] == "4"
            assert sorted(asked(one)) == ["m-1", "m-1", "m-2"] and asked(two) == ["m-3"]


@pytest.mark.virtual_time
@pytest.mark.parametrize(("retry_after", "name"), [(20, "b"), (3, "a")])
async def test_a_model_without_room(retry_after: int, name: str) -> None:
    """Where the wait would be too long the fallback answers at once; a short wait is better than another model."""
    full = answers(error_reply(429, "x", "no", f"retry-after: {retry_after}"), OK)
    async with two_models(full, answers(OK), {**FALLBACK, "max_wait": 5}) as (server, one, _):
        answer = await server.post("m-1")
        assert answer.headers["x-apiserver-controller"] == name
        assert ("x-apiserver-model" in answer.headers) is (name == "b")
        assert (int(answer.headers.get("x-apiserver-wait-ms", 0)) >= 3000) is (name == "a")
        assert (await server.post("m-1")).headers["x-apiserver-controller"] == name
        assert len(one.seen) == (1 if name == "b" else 3)


async def test_a_model_that_no_controller_serves() -> None:
    """The fallback of an unserved model answers; if no controller serves the fallback, the client gets 404."""
    pool = {"fallbacks": {"gone": ["m-1"], "lost": ["nowhere"]}}
    async with two_models(answers(OK), answers(OK), pool) as (server, _, _two):
        assert (await server.post("gone")).headers["x-apiserver-model"] == "gone -> m-1"
        for name in ("lost", "else"):
            answer = await server.post(name)
            assert answer.status == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("failure", "more", "status", "calls"),
    [
        (error_reply(400, "bad"), {}, 400, 0),
        (error_reply(500), {}, 500, 1),
        (error_reply(500), {"store": True}, 500, 0),
        (error_reply(503), {"store": True}, 503, 1),
        (sse_reply(b'data: {"error":{"message":"overloaded","code":503}}\n\n'), {"stream": True}, 503, 1),
    ],
)
async def test_when_a_fallback_is_tried(failure: bytes, more: dict[str, Any], status: int, calls: int) -> None:
    """No fallback is tried after a client's mistake, nor for a stateful request that may have run."""
    async with two_models(answers(failure), answers(error_reply(401)), FALLBACK) as (server, _, two):
        assert (await server.post("m-1", **more)).status == status and len(two.seen) == calls
    async with two_models(answers(failure), answers(STREAM if "stream" in more else OK), FALLBACK) as (server, _, two):
        assert (await server.post("m-1", **more)).status == (200 if calls else status)


@pytest.mark.virtual_time
async def test_what_may_be_running_is_not_asked_for_twice() -> None:
    """A silent whole answer may be generating, so no other model is asked either."""
    pool = {**FALLBACK, "rescue_after": 0}
    async with two_models(lambda peer, _: peer.gone(), answers(OK), pool, timeouts={"first_byte": 5}) as (server, _, two):
        assert (await server.post("m-1")).status == 504 and not two.seen


async def test_prompts_that_are_too_long() -> None:
    """Only prompts that are too long use the context_fallbacks."""
    async with Upstream(answers(TOO_LONG, error_reply(400, "other"), TOO_LONG)) as one:
        async with Upstream(answers(TOO_LONG)) as two, Upstream(answers(OK)) as three:
            controllers = [sole("a", one, "m-1"), sole("b", two, "m-2"), sole("c", three, "m-3")]
            async with Running(*controllers, pool={"context_fallbacks": {"m-1": ["m-2", "m-3"]}}) as server:
                assert (await server.post("m-1")).headers["x-apiserver-model"] == "m-1 -> m-3"
                assert (await server.post("m-1")).status == 400 and len(two.seen) == len(three.seen) == 1
                answer = await server.post("m-2")
                assert answer.status == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        [{"error": {"code": 400, "message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}}],
        {"code": "x", "error": "This model's maximum prompt length is 8 but the request contains 9 tokens."},
        {"message": "Input is too long for requested model."},
        {"error": {"code": "1261", "message": "Prompt exceeds max length"}},
        {"object": "error", "message": "The input (9 tokens) is longer than the model's context length (8 tokens)."},
    ],
)
async def test_prompts_that_are_too_long_in_each_vendors_words(body: object) -> None:
    """Few vendors have OpenAI's code for a prompt that is too long (more of their words: test_outcomes.py)."""
    pool = {"context_fallbacks": {"m-1": ["m-2"]}}
    async with two_models(answers(json_reply(400, body)), answers(OK), pool) as (server, _, _two):
        assert (await server.post("m-1")).headers["x-apiserver-model"] == "m-1 -> m-2"


async def test_a_fallback_may_have_another_api() -> None:
    """What one API cannot express, or finds too long, goes to a model of another."""
    error = {"type": "invalid_request_error", "message": "prompt is too long: 9"}
    long = answers(json_reply(400, {"type": "error", "error": error}))
    pool = {**FALLBACK, "context_fallbacks": {"m-1": ["m-2"]}}
    async with two_models(long, answers(OK), pool, type="anthropic") as (server, one, two):
        for more, sent in (({"n": 2}, 0), ({}, 1)):
            assert (await server.post("m-1", **more)).headers["x-apiserver-model"] == "m-1 -> m-2"
            assert len(one.seen) == sent
        assert two.seen[0].json()["n"] == 2 and asked(two) == ["m-2", "m-2"]


@pytest.mark.parametrize(("reply", "status"), [((429, "rate_limit_exceeded"), 429), ((503, "overloaded"), 503)])
@pytest.mark.parametrize("others", [["n"], ["n", "o"]])
async def test_what_a_fallback_refuses_is_not_the_answer(reply: tuple[int, str], status: int, others: list[str]) -> None:
    """A fallback that cannot take the request hides neither the refusal of the model asked for nor the next fallback."""

    async def script(peer: Peer, message: Message) -> None:
        model = message.json()["model"]
        refusal = error_reply(*reply, "x", "Retry-After: 50") if model == "m" else error_reply(400, "unsupported_parameter")
        await peer.send(json_reply(200, ANSWER) if model == "o" else refusal)

    async with Upstream(script) as one:
        pool = {"max_wait": 1, "fallbacks": {"m": others}}
        async with Running(controller("a", one.url), pool=pool) as server:
            assert (await server.post("m")).status == (200 if "o" in others else status)


@pytest.mark.virtual_time
async def test_lists_are_asked_in_the_background() -> None:
    """One hanging account does not stall /v1/models, and many calls at once are one question upstream."""

    async def hang(peer: Peer, _: Message) -> None:
        await peer.gone()

    listed = json_reply(200, {"object": "list", "data": [{"id": "up-1"}]})
    async with Upstream(hang) as one, Upstream(answers(listed)) as two:
        async with Listing(controller("a", one.url), controller("b", two.url)) as server:
            since = now()
            calls = await asyncio.gather(*(server.ask("GET", "/v1/models") for _ in range(5)))
            assert [[model["id"] for model in call.json()["data"]] for call in calls] == [["up-1"]] * 5
            assert now() - since < 3 and len(one.seen) == len(two.seen) == 1


async def test_a_model_is_named_as_the_client_named_it() -> None:
    """An alias that leads nowhere is a 404 with the name that the client asked for."""
    async with Running(controller("a", "http://127.0.0.1:9/v1", models=["m"]), pool={"aliases": {"fast": "gone"}}) as server:
        answer = await server.post("fast")
        assert answer.status == 404 and "'fast'" in answer.json()["error"]["message"] and b"gone" not in answer.body


async def test_the_first_request_after_a_start_goes_to_the_account_that_has_the_model() -> None:
    """The listener opens when the lists are known, or half a second later."""

    def listing(model: str) -> Script:
        async def script(peer: Peer, message: Message) -> None:
            await peer.send(json_reply(200, {"data": [{"id": model}]} if message.start.startswith("GET") else ANSWER))

        return script

    async with Upstream(listing("m-1")) as one, Upstream(listing("m-2")) as two:
        async with Listing(controller("a", one.url), controller("b", two.url)) as server:
            assert (await server.post("m-2")).headers["x-apiserver-controller"] == "b"
