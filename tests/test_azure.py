"""Azure's deployments behind the relay: their first chunk, their filter's chunks, their headers and their errors."""

import json
from typing import Any

import chatgpt_apiserver as app

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, event, json_reply, reply, sse_reply

FIRST = (
    b'data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0}]}\n\n'
)
FILTER = (
    b'data: {"choices":[{"content_filter_offsets":{"check_offset":1,"end_offset":9,"start_offset":0},'
    b'"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"finish_reason":null,"index":0}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
GOOD = json_reply(200, ANSWER)


def azure(name: str, one: Upstream, **more: Any) -> dict[str, Any]:
    """An azure controller on the classic surface of this upstream."""
    return {**controller(name, one.url.removesuffix("/v1"), **more), "type": "azure"}


async def test_a_request_to_a_deployment() -> None:
    """Path, key and body are the deployment's; nothing of the client's own key goes along."""
    async with Upstream(answers(GOOD)) as one:
        async with Running(azure("a", one, model_map={"gpt-4.1": "prod-41"})) as server:
            found = await server.post("gpt-4.1", "api-key: client", "Authorization: Bearer client")
            assert found.status == 200 and found.json() == ANSWER
        (seen,) = one.seen
        assert seen.start == "POST /openai/deployments/prod-41/chat/completions?api-version=2024-10-21 HTTP/1.1"
        assert seen.headers["api-key"] == "sk-secret-a-key" and "authorization" not in seen.headers
        assert seen.json()["model"] == "prod-41"


async def test_the_first_chunk_decides_nothing() -> None:
    """The chunk without choices is kept until something real comes; an error after it still moves on."""
    error = b'data: {"error":{"code":"500","message":"The server had an error"}}\n\n'
    body = FIRST + event("hi") + FILTER + DONE
    async with Upstream(answers(sse_reply(FIRST, error))) as bad:
        async with Upstream(answers(sse_reply(FIRST, event("hi"), FILTER, DONE))) as good:
            async with Running(azure("a", bad), azure("b", good)) as server:
                found = await server.post(stream=True)
                assert found.headers["x-apiserver-controller"] == "b" and found.body == body


async def test_filter_chunks_pass_even_after_the_end() -> None:
    """Chunks without a delta come through as they are, also after finish_reason."""
    last = b'data: {"choices":[{"delta":{},"finish_reason":"stop","index":0}]}\n\n'
    pieces = (FIRST, FILTER, event("hi"), last, FILTER, DONE)
    async with Upstream(answers(sse_reply(*pieces))) as one:
        async with Running(azure("a", one), azure("b", one)) as server:
            assert (await server.post(stream=True)).body == b"".join(pieces)


async def test_each_deployment_has_its_ledger() -> None:
    """Whole-second reset headers are read; two deployments whose names differ by a date count apart."""
    rate = [f"x-ratelimit-{what}-{unit}: {n}" for unit in ("requests", "tokens") for what, n in RATE[unit].items()]
    async with Upstream(answers(json_reply(200, ANSWER, *rate))) as one:
        models = {"new": "gpt-4o-2024-08-06", "old": "gpt-4o"}
        async with Running(azure("a", one, model_map=models)) as server:
            for model in ("new", "old", "gpt-4o"):
                assert (await server.post(model)).status == 200
            ledgers = server.server.pool.upstreams[0].quota.ledgers
            assert sorted(ledgers) == ["gpt-4o", "gpt-4o-2024-08-06"]
            shown = app.describe_ledger(ledgers["gpt-4o"], server.server.loop.time())
            assert shown["requests"]["limit"] == 120 and shown["tokens"]["limit"] == 20_000
            assert shown["requests"]["left"] < 119 and shown["requests"]["per_s"] == 2


RATE = {
    "requests": {"limit": 120, "remaining": 118, "reset": 1},
    "tokens": {"limit": 20_000, "remaining": 19_000, "reset": 3},
}


async def test_unknown_numbers_teach_nothing() -> None:
    """Limits of -1 and 0, which Azure sends where it does not know, are no limits."""
    rate = [f"x-ratelimit-{what}-requests: {n}" for what, n in (("limit", 0), ("remaining", -1), ("reset", 0))]
    async with Upstream(answers(json_reply(200, ANSWER, *rate))) as one:
        async with Running(azure("a", one)) as server:
            for _ in range(3):
                assert (await server.post()).status == 200


async def test_azures_errors() -> None:
    """A missing deployment and a spent minute go to the next; a filtered prompt is the client's answer."""
    missing = json_reply(
        404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment does not exist."}}
    )
    busy = error_reply(429, "429", "Please retry after 45 seconds.", "retry-after: 45")
    filtered = {"error": {"message": "no", "type": None, "param": "prompt", "code": "content_filter", "status": 400}}
    async with Upstream(answers(missing)) as one, Upstream(answers(busy)) as two:
        async with Upstream(answers(GOOD, json_reply(400, filtered))) as three:
            async with Running(azure("a", one), azure("b", two), azure("c", three)) as server:
                assert (await server.post()).headers["x-apiserver-controller"] == "c"
                found = await server.post()
                assert found.status == 400 and found.json() == filtered
                assert (len(one.seen), len(two.seen), len(three.seen)) == (1, 1, 2)


async def test_a_gateways_refusal_moves_on() -> None:
    """The front gateway's 401 has a shape of its own."""
    refused = reply(401, json.dumps({"statusCode": 401, "message": "Unauthorized. Access token is missing."}).encode())
    async with Upstream(answers(refused)) as one, Upstream(answers(GOOD)) as two:
        async with Running(azure("a", one), azure("b", two)) as server:
            assert (await server.post()).headers["x-apiserver-controller"] == "b"


async def test_models_are_those_of_the_configuration() -> None:
    """The resource is not asked: it would list what could be deployed."""
    async with Upstream(answers(GOOD)) as one:
        async with Running(azure("a", one, model_map={"gpt-4.1": "d"})) as server:
            client = await server.open()
            await client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert [model["id"] for model in (await client.read()).json()["data"]] == ["gpt-4.1"]
            client.close()
        assert not one.seen
