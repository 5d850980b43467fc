"""Azure's deployments behind the relay: their first chunk, their filter's chunks, their headers and their errors."""

from typing import Any

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, event, json_reply, sse_reply

FIRST = b'data: {"choices":[],"created":0,"id":"","model":"","prompt_filter_results":[{"prompt_index":0}]}\n\n'
FILTER = (
    b'data: {"choices":[{"content_filter_offsets":{"check_offset":1,"end_offset":9,"start_offset":0},'
    b'"content_filter_results":{"hate":{"filtered":false,"severity":"safe"}},"finish_reason":null,"index":0}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
OK = json_reply(200, ANSWER)


def azure(name: str, one: Upstream, **more: Any) -> dict[str, Any]:
    """Return an azure controller on the classic API of this upstream."""
    return {**controller(name, one.url.removesuffix("/v1"), **more), "type": "azure"}


async def test_a_request_to_a_deployment() -> None:
    """Path, key and body are the deployment's; the client's own key is not forwarded."""
    async with Upstream(answers(OK)) as one:
        async with Running(azure("a", one, model_map={"gpt-4.1": "prod-41"})) as server:
            found = await server.post("gpt-4.1", "api-key: client", "Authorization: Bearer client")
            assert found.status == 200 and found.json() == ANSWER
        (seen,) = one.seen
        assert seen.start == "POST /openai/deployments/prod-41/chat/completions?api-version=2024-10-21 HTTP/1.1"
        assert seen.headers["api-key"] == "sk-secret-a-key" and "authorization" not in seen.headers
        assert seen.json()["model"] == "prod-41"


async def test_the_first_chunk_decides_nothing() -> None:
    """The chunk without choices is held until a real event comes; an error after it still moves the request on."""
    error = b'data: {"error":{"code":"500","message":"The server had an error"}}\n\n'
    last = b'data: {"choices":[{"delta":{},"finish_reason":"stop","index":0}]}\n\n'
    pieces = (FIRST, FILTER, event("hi"), last, FILTER, DONE)  # chunks without a delta pass, also after finish_reason
    async with Upstream(answers(sse_reply(FIRST, error))) as bad, Upstream(answers(sse_reply(*pieces))) as good:
        async with Running(azure("a", bad), azure("b", good)) as server:
            found = await server.post(stream=True)
            assert found.headers["x-apiserver-controller"] == "b" and found.body == b"".join(pieces)


def rate_fields(requests: tuple[int, int, int], tokens: tuple[int, int, int]) -> list[str]:
    """Return Azure's header lines for limit, remaining and reset of requests and tokens."""
    kinds = ("limit", "remaining", "reset")
    lines = [f"x-ratelimit-{kind}-requests: {number}" for kind, number in zip(kinds, requests, strict=True)]
    return lines + [f"x-ratelimit-{kind}-tokens: {number}" for kind, number in zip(kinds, tokens, strict=True)]


async def test_each_deployment_has_its_ledger() -> None:
    """Reset headers in whole seconds are read; two deployments whose names differ by a date count apart."""
    rate = rate_fields((120, 118, 1), (20_000, 19_000, 3))
    async with Upstream(answers(json_reply(200, ANSWER, *rate))) as one:
        models = {"new": "gpt-4o-2024-08-06", "old": "gpt-4o"}
        async with Running(azure("a", one, model_map=models)) as server:
            assert [(await server.post(model)).status for model in ("new", "old", "gpt-4o")] == [200] * 3
            ledgers = (await server.status())["controllers"][0]["ledger"]
            assert sorted(ledgers) == ["gpt-4o", "gpt-4o-2024-08-06"]
            requests, tokens = ledgers["gpt-4o"]["requests"], ledgers["gpt-4o"]["tokens"]
            assert (requests["limit"], requests["per_s"], tokens["limit"]) == (120, 2, 20_000) and requests["left"] < 119


async def test_azures_errors() -> None:
    """A missing deployment, a 429 and the gateway's 401 move the request on; a filtered prompt is the client's answer."""
    missing = error_reply(404, "DeploymentNotFound", "The API deployment does not exist.")
    busy = error_reply(429, "429", "Please retry after 45 seconds.", "retry-after: 45")
    refused = json_reply(401, {"statusCode": 401, "message": "Unauthorized. Access token is missing."})
    filtered = {"error": {"message": "no", "type": None, "param": "prompt", "code": "content_filter", "status": 400}}
    async with Upstream(answers(missing)) as one, Upstream(answers(busy)) as two, Upstream(answers(refused)) as three:
        async with Upstream(answers(OK, json_reply(400, filtered))) as four:
            upstreams = dict(zip("abcd", (one, two, three, four), strict=True))
            async with Running(*(azure(name, upstream) for name, upstream in upstreams.items())) as server:
                assert (await server.post()).headers["x-apiserver-controller"] == "d"
                found = await server.post()
                assert found.status == 400 and found.json() == filtered
                assert len(one.seen) == len(two.seen) == 1 and len(four.seen) == 2


async def test_models_are_those_of_the_configuration() -> None:
    """The resource is not asked: its list has all models that could be deployed."""
    async with Upstream(answers(OK)) as one:
        async with Running(azure("a", one, model_map={"gpt-4.1": "d"})) as server:
            assert [model["id"] for model in (await server.ask("GET", "/v1/models")).json()["data"]] == ["gpt-4.1"]
        assert not one.seen
