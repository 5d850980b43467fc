"""Models by other names, and models that stand in for others."""

import json
from typing import Any

import pytest

from .support import (
    ANSWER,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    sse_reply,
)

GOOD = json_reply(200, ANSWER)
TOO_LONG = error_reply(400, "context_length_exceeded", "This model's maximum context length is 8192 tokens.")


def sole(name: str, one: Upstream, model: str, **more: Any) -> dict[str, Any]:
    """A controller that serves one model."""
    return controller(name, one.url, models=[model], **more)


async def models_of(server: Running) -> dict[str, dict[str, Any]]:
    """What the server lists."""
    client = await server.open()
    await client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    found = {model["id"]: model for model in (await client.read()).json()["data"]}
    client.close()
    return found


def asked(one: Upstream) -> list[str]:
    """The models that an upstream was asked for."""
    return [seen.json()["model"] for seen in one.seen]


async def test_an_alias() -> None:
    """The model is the alias's from the choice of a controller on; other bytes stay; the answer says both names."""
    async with Upstream(answers(GOOD)) as one:
        async with Running(sole("a", one, "gpt-4.1-mini"), pool={"aliases": {"fast": "gpt-4.1-mini"}}) as server:
            client = await server.open()
            body = b'{ "messages":[{"role":"user","content":"\\u00e9"}],"model" : "%b" , "n":1.0}'
            for name in (b"fast", b"gpt-4.1-mini"):
                wire = body.replace(b"%b", name)
                await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
                await client.send(b"Content-Length: %d\r\n\r\n%b" % (len(wire), wire))
                told = (await client.read()).headers.get("x-apiserver-model")
                assert told == ("fast -> gpt-4.1-mini" if name == b"fast" else None)
            client.close()
            assert [seen.body for seen in one.seen] == [body.replace(b"%b", b"gpt-4.1-mini")] * 2
            server.server.access.flush()
            assert "model=fast" in server.lines[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_alias_of_a_mapped_model(stream: bool) -> None:
    """The answer says what was asked for and what was sent, whole or streamed, mapped only or by an alias too."""
    reply = sse_reply(event("a"), b"data: [DONE]\n\n") if stream else GOOD
    async with Upstream(answers(reply)) as one:
        mapped = controller("a", one.url, model_map={"mini": "prod-é"})
        async with Running(mapped, pool={"aliases": {"fast": "mini"}}) as server:
            for name in ("fast", "mini"):
                found = await server.post(name, stream=stream)
                assert found.headers["x-apiserver-model"] == name + r" -> prod-\xe9"
            assert "x-apiserver-model" not in (await server.post("other")).headers
        assert asked(one) == ["prod-é", "prod-é", "other"]


async def test_client_keys_are_about_the_name_that_is_asked() -> None:
    """A key that may use an alias needs no right to what it stands for, nor to what falls in for it."""
    keys = [{"name": "k", "key": "client-key-0001", "models": ["fast"]}]
    pool = {"aliases": {"fast": "a-1"}, "fallbacks": {"a-1": ["b-1"]}}
    async with Upstream(answers(error_reply(500))) as one, Upstream(answers(GOOD)) as two:
        async with Running(sole("a", one, "a-1"), sole("b", two, "b-1"), pool=pool, client_keys=keys) as server:
            key = "Authorization: Bearer client-key-0001"
            assert (await server.post("a-1", key)).status == (await server.post("b-1", key)).status == 403
            assert (await server.post("fast", key)).headers["x-apiserver-model"] == "fast -> b-1"


async def test_models_list_all_names() -> None:
    """Aliases are listed with what they stand for, if anybody serves that; so are models that others stand in for."""
    pool = {"aliases": {"fast": "a-1", "dead": "nobody"}, "fallbacks": {"gone": ["a-1"], "a-1": ["b-1"]}}
    async with Upstream(answers(GOOD)) as one:
        async with Running(sole("a", one, "a-1"), sole("b", one, "b-1"), pool=pool) as server:
            found = await models_of(server)
            assert sorted(found) == ["a-1", "b-1", "fast", "gone"] and found["fast"]["root"] == "a-1"
            assert "root" not in found["a-1"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bad", [error_reply(500), error_reply(401), error_reply(429, "x", "no", "retry-after: 99")])
async def test_another_model_stands_in(bad: bytes, stream: bool) -> None:
    """When every controller of a model failed the others are tried in their order, each with all its controllers."""
    good = sse_reply(event("a"), b"data: [DONE]\n\n") if stream else GOOD
    async with Upstream(answers(bad)) as one, Upstream(answers(good)) as two:
        controllers = [sole("a", one, "m-1"), sole("b", one, "m-1"), sole("c", one, "m-2"), sole("d", two, "m-3")]
        pool = {"fallbacks": {"m-1": ["unknown", "m-2", "m-3"]}}
        async with Running(*controllers, pool=pool) as server:
            found = await server.post("m-1", stream=stream)
            assert found.status == 200 and found.headers["x-apiserver-model"] == "m-1 -> m-3"
            assert found.headers["x-apiserver-attempts"] == "4"
            assert sorted(asked(one)) == ["m-1", "m-1", "m-2"] and asked(two) == ["m-3"]


async def test_a_model_without_room_in_time() -> None:
    """Where the wait would be longer than allowed another model stands in at once; with time enough it is waited for."""
    async with Upstream(answers(error_reply(429, "x", "no", "retry-after: 20"), GOOD)) as one:
        async with Upstream(answers(GOOD)) as two:
            pool = {"fallbacks": {"m-1": ["m-2"]}, "max_wait": 5}
            async with Running(sole("a", one, "m-1"), sole("b", two, "m-2"), pool=pool) as server:
                for _ in range(3):
                    assert (await server.post("m-1")).headers["x-apiserver-controller"] == "b"
                assert len(one.seen) == 1


@pytest.mark.virtual_time
async def test_a_model_with_room_in_time_is_waited_for() -> None:
    """A short wait is better than another model."""
    async with Upstream(answers(error_reply(429, "x", "no", "retry-after: 3"), GOOD)) as one:
        async with Upstream(answers(GOOD)) as two:
            async with Running(
                sole("a", one, "m-1"), sole("b", two, "m-2"), pool={"fallbacks": {"m-1": ["m-2"]}}
            ) as server:
                found = await server.post("m-1")
                assert (
                    found.headers["x-apiserver-controller"] == "a" and int(found.headers["x-apiserver-wait-ms"]) >= 3000
                )
                assert "x-apiserver-model" not in found.headers and not two.seen


async def test_a_model_that_nobody_serves() -> None:
    """Another model may stand in for one without controllers; where that fails too, the 404 is the answer."""
    async with Upstream(answers(GOOD)) as one:
        pool = {"fallbacks": {"gone": ["m-1"], "lost": ["nowhere"]}}
        async with Running(sole("a", one, "m-1"), pool=pool) as server:
            assert (await server.post("gone")).headers["x-apiserver-model"] == "gone -> m-1"
            for name in ("lost", "else"):
                found = await server.post(name)
                assert found.status == 404 and found.json()["error"]["code"] == "model_not_found"


async def test_a_clients_mistake_is_one_with_any_model() -> None:
    """A 400 is returned; so is the best of the errors when all of the models fail."""
    async with (
        Upstream(answers(error_reply(400, "bad"), error_reply(500))) as one,
        Upstream(answers(error_reply(401))) as two,
    ):
        async with Running(
            sole("a", one, "m-1"), sole("b", two, "m-2"), pool={"fallbacks": {"m-1": ["m-2"]}}
        ) as server:
            assert (await server.post("m-1")).status == 400 and not two.seen
            assert (await server.post("m-1")).status == 500 and len(two.seen) == 1


@pytest.mark.virtual_time
async def test_what_may_be_running_is_not_asked_for_twice() -> None:
    """A silent whole answer may be generating, so no other model is asked either."""

    async def script(peer: Peer, _: Message) -> None:
        await peer.gone()

    async with Upstream(script) as one, Upstream(answers(GOOD)) as two:
        pool = {"fallbacks": {"m-1": ["m-2"]}, "rescue_after": 0}
        slow = dict(sole("a", one, "m-1"), timeouts={"first_byte": 5})
        async with Running(slow, sole("b", two, "m-2"), pool=pool) as server:
            assert (await server.post("m-1")).status == 504 and not two.seen


async def test_stateful_requests_move_on_only_when_nothing_ran() -> None:
    """`store` keeps a request from another model after a 500, not after a 503."""
    async with Upstream(answers(error_reply(500), error_reply(503))) as one, Upstream(answers(GOOD)) as two:
        async with Running(
            sole("a", one, "m-1"), sole("b", two, "m-2"), pool={"fallbacks": {"m-1": ["m-2"]}}
        ) as server:
            assert (await server.post("m-1", store=True)).status == 500
            assert (await server.post("m-1", store=True)).status == 200


async def test_prompts_that_are_too_long() -> None:
    """They have a list of their own, which other errors do not use."""
    async with Upstream(answers(TOO_LONG, error_reply(400, "other"), TOO_LONG)) as one:
        async with Upstream(answers(TOO_LONG)) as two, Upstream(answers(GOOD)) as three:
            controllers = [sole("a", one, "m-1"), sole("b", two, "m-2"), sole("c", three, "m-3")]
            pool = {"context_fallbacks": {"m-1": ["m-2", "m-3"]}}
            async with Running(*controllers, pool=pool) as server:
                assert (await server.post("m-1")).headers["x-apiserver-model"] == "m-1 -> m-3"
                assert (await server.post("m-1")).status == 400
                assert len(two.seen) == len(three.seen) == 1
                found = await server.post("m-2")
                assert found.status == 400 and found.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        [{"error": {"code": 400, "message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}}],
        {"code": "x", "error": "This model's maximum prompt length is 8 but the request contains 9 tokens."},
        {"error": {"message": "Invalid request: Your request exceeded model token limit: 8", "type": "invalid_request_error"}},
        {"error": {"code": "invalid_parameter_error", "message": "Range of input length should be [1, 8]"}},
        {"message": "Input is too long for requested model."},
        {"error": {"code": "1261", "message": "Prompt exceeds max length"}},
        {"object": "error", "message": "The input (9 tokens) is longer than the model's context length (8 tokens)."},
    ],
)
async def test_prompts_that_are_too_long_in_each_vendors_words(body: object) -> None:
    """Few vendors have OpenAI's code for it."""
    async with Upstream(answers(json_reply(400, body))) as one, Upstream(answers(GOOD)) as two:
        controllers = [sole("a", one, "m-1"), sole("b", two, "m-2")]
        async with Running(*controllers, pool={"context_fallbacks": {"m-1": ["m-2"]}}) as server:
            assert (await server.post("m-1")).headers["x-apiserver-model"] == "m-1 -> m-2"


async def test_a_stream_that_fails_at_its_first_event() -> None:
    """A sole controller's stream is held until its first real event when another model may stand in."""
    bad = sse_reply(b'data: {"error":{"message":"overloaded","code":503}}\n\n')
    async with Upstream(answers(bad)) as one, Upstream(answers(sse_reply(event("hi"), b"data: [DONE]\n\n"))) as two:
        async with Running(
            sole("a", one, "m-1"), sole("b", two, "m-2"), pool={"fallbacks": {"m-1": ["m-2"]}}
        ) as server:
            found = await server.post("m-1", stream=True)
            assert found.body == event("hi") + b"data: [DONE]\n\n"


async def test_an_account_of_another_kind_stands_in() -> None:
    """What one API cannot say, or finds too long, may go to a model of another."""
    long = json_reply(
        400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9"}}
    )
    pool = {"fallbacks": {"claude": ["m-2"]}, "context_fallbacks": {"claude": ["m-2"]}}
    async with Upstream(answers(long)) as one, Upstream(answers(GOOD)) as two:
        claude = {**sole("a", one, "claude"), "type": "anthropic"}
        async with Running(claude, sole("b", two, "m-2"), pool=pool) as server:
            assert (await server.post("claude", n=2)).headers["x-apiserver-model"] == "claude -> m-2"
            assert not one.seen and two.seen[0].json()["n"] == 2
            assert (await server.post("claude")).headers["x-apiserver-model"] == "claude -> m-2"
            assert len(one.seen) == 1 and json.loads(two.seen[1].body)["model"] == "m-2"
