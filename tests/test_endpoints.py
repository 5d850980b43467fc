"""Endpoints beyond chat: the same scheduler, the body as it came, and the objects that live in one account."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, SSE_HEAD, Listing, Message, Peer, Running, Script, Upstream, answers, controller, error_reply, json_reply, request, sse_reply
from .wirefeed import turns

LISTED = {"object": "list", "data": []}
PRIORITY = {"type": "priority"}
FORM_KIND = "multipart/form-data; boundary=xx"
FORM = (
    b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n\x00\xff\r\n'
    b'--xx\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--xx--\r\n'
)


@asynccontextmanager
async def serving(*replies: bytes | Script, **more: Any) -> AsyncIterator[tuple[Any, ...]]:
    """Run a server with the controllers a, b ..., which answer with these replies; yield it and their upstreams."""
    async with AsyncExitStack() as stack:
        scripts = [answers(reply) if isinstance(reply, bytes) else reply for reply in replies]
        ups = [await stack.enter_async_context(Upstream(script)) for script in scripts]
        controllers = [controller(name, up.url) for name, up in zip("ab", ups, strict=False)]
        yield await stack.enter_async_context(Running(*controllers, **more)), *ups


async def names(server: Running, method: str, path: str, data: Any = b"", count: int = 3) -> list[str]:
    """Send a request `count` times; return the controllers that answered, sorted."""
    replies = [await server.ask(method, path, data) for _ in range(count)]
    return sorted(answer.headers["x-apiserver-controller"] for answer in replies)


# -- inference


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/v1/embeddings", {"model": "e", "input": ["a", "b"]}),
        ("/embeddings", {"model": "e", "input": [1, 2, 3]}),
        ("/v1/completions", {"model": "c", "prompt": "x", "max_tokens": 5}),
        ("/v1/moderations", {"input": "x"}),
        ("/v1/images/generations", {"prompt": "a cat"}),
        ("/v1/responses", {"model": "r", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]}),
        ("/v1/audio/speech", {"model": "t", "input": "x", "voice": "v"}),
        ("/v1/responses/input_tokens", {"model": "r", "input": "x"}),
        ("/v1/responses/compact", {"input": [{"type": "message", "role": "user", "content": "x"}]}),
    ],
)
async def test_inference_goes_through_the_scheduler(path: str, data: dict[str, Any]) -> None:
    """A failing controller is passed over, the body goes as it came, and the answer tells the way."""
    async with serving(error_reply(429), json_reply(200, ANSWER)) as (server, bad, good):
        answer = await server.ask("POST", path, data)
        assert (answer.status, answer.json()) == (200, ANSWER)
        assert answer.headers["x-apiserver-controller"] == "b" and answer.headers["x-apiserver-attempts"] == "2"
        assert good.seen[0].start == f"POST /v1{path.removeprefix('/v1')} HTTP/1.1"
        assert good.seen[0].body == bad.seen[0].body == json.dumps(data).encode()


async def test_a_missing_model_is_a_400() -> None:
    """Without a model nothing is sent upstream."""
    async with serving(json_reply(200, LISTED)) as (server, up):
        for data in ({"input": "x"}, {"model": "", "input": "x"}, {"model": 3}, []):
            assert (await server.ask("POST", "/v1/embeddings", data)).status == 400 and not up.seen


async def test_a_form_goes_by_its_model_field() -> None:
    """The model is found in the form and mapped in place, and every other byte stays; without one the form gets 400."""
    path = "/v1/audio/transcriptions"
    async with Upstream(answers(json_reply(200, {"text": "hi"}))) as up:
        mapped = controller("b", up.url, models=["whisper"], model_map={"whisper": "whisper-1"})
        async with Running(controller("a", up.url, models=["other"]), mapped) as server:
            answer = await server.ask("POST", path, FORM, kind=FORM_KIND)
            assert answer.json() == {"text": "hi"} and answer.headers["x-apiserver-controller"] == "b"
            assert up.seen[0].body == FORM.replace(b"\r\nwhisper\r\n", b"\r\nwhisper-1\r\n")
            assert up.seen[0].headers["content-type"] == FORM_KIND
            without_model = FORM.replace(b'name="model"', b'name="prompt"')
            assert (await server.ask("POST", path, without_model, kind=FORM_KIND)).status == 400
            assert (await server.ask("POST", path, FORM)).status == 400
            # Pictures named by URL or file id need no form (API reference, images/edits), however the body arrives.
            data = {"model": "whisper", "images": [{"image_url": "https://x.example/a.png"}], "prompt": "a hat"}
            raw = request(json.dumps(data).encode(), "Content-Type: application/json", target="/v1/images/edits")
            for pieces in ([raw], [raw[:-5], raw[-5:]]):
                client = await server.open()
                for piece in pieces:
                    await client.send(piece)
                    await turns(3)
                assert (await client.read()).status == 200 and up.seen[-1].json() == dict(data, model="whisper-1")
                client.close()


@pytest.mark.parametrize("ends", [True, False])
async def test_speech_is_heard_while_it_is_made(ends: bool) -> None:
    """Its first bytes leave at once, as players begin with them; one that breaks off ends without its last chunk."""
    gate, sound = asyncio.Event(), bytes(range(256))

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.chunk(sound)
        await gate.wait()
        await peer.send(b"5\r\nworld\r\n0\r\n\r\n" if ends else b"5\r\nwor")
        peer.close()

    async with serving(script, script) as (server, up, _):
        client = await server.open()
        await client.send(request(json.dumps({"model": "tts", "input": "x"}).encode(), target="/v1/audio/speech"))
        assert (await client.read(head_only=True)).headers["content-type"] == "audio/mpeg"
        assert await client.reader.readexactly(263) == app.chunk(sound)
        gate.set()
        if ends:
            assert await client.reader.readexactly(15) == b"5\r\nworld\r\n0\r\n\r\n"
        else:
            assert not (await client.closed()).endswith(b"0\r\n\r\n") and len(up.seen) == 1
        client.close()


async def test_controllers_that_only_chat_are_passed_over() -> None:
    """An echo controller has no embeddings; where no controller has, the answer says so."""
    data = {"model": "e", "input": "x"}
    async with Upstream(answers(json_reply(200, LISTED))) as up:
        echo = {"type": "echo", "name": "e"}
        async with Running(echo, controller("a", up.url)) as server:
            assert await names(server, "POST", "/v1/embeddings", data, 2) == ["a", "a"]
        async with Running(echo) as server:
            assert (await server.ask("POST", "/v1/embeddings", data)).status == 404


@pytest.mark.parametrize(
    ("value", "chars"),
    [
        ("abcd", 4),
        (["ab", "cd"], 4),
        ([1, 2], 8),
        ([[1], [2]], 8),
        (None, 0),
        ([{"text": "abc"}], 3),
        ([{"content": [{"type": "input_text", "text": "ab"}, {"image_url": "data:" + "x" * 99}]}], 4002),
        (json.loads("[" * 500 + '"x"' + "]" * 500), 0),
    ],
)
def test_the_text_of_an_input_is_counted(value: Any, chars: int) -> None:
    """Text counts wherever it stands, a picture as one part however long its URL, and endless nesting not at all."""
    assert app.count_text(value) == chars


# -- responses

CREATED = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_12345","object":"response"}}\n\n'


COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r"}}\n\n'


async def test_a_responses_stream_commits_on_its_first_real_event() -> None:
    """Its created, queued and in_progress events are held while another controller could answer; an error moves on."""
    preface = CREATED
    for kind in (b"queued", b"in_progress"):
        preface += b'event: response.%b\ndata: {"type":"response.%b"}\n\n' % (kind, kind)
    error = b'event: error\ndata: {"type":"error","code":"server_error","message":"x","param":null}\n\n'
    failed = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n'
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
    data = {"model": "r", "input": "x", "stream": True, "store": False}
    for end in (error, failed):
        async with serving(sse_reply(preface, end), sse_reply(CREATED, delta, COMPLETED)) as (server, *_):
            answer = await server.ask("POST", "/v1/responses", data)
            assert answer.body == CREATED + delta + COMPLETED and answer.headers["x-apiserver-attempts"] == "2"


@pytest.mark.parametrize("cut", [None, 8, 60, 78, 200])
async def test_a_follow_up_goes_where_the_response_was_made(cut: int | None) -> None:
    """previous_response_id and /v1/responses/{id} go to the account that has it, wherever the reads of its stream end."""
    made = iter(range(12345, 99999))

    async def script(peer: Peer, message: Message) -> None:
        created = CREATED.replace(b"12345", b"%d" % next(made))
        if cut is None or message.start.startswith("GET"):
            await peer.send(json_reply(200, json.loads(created.partition(b"data: ")[2])["response"]))
            return
        await peer.send(SSE_HEAD)
        await peer.chunk(created[:cut])
        await turns()
        await peer.send(app.chunk(created[cut:] + COMPLETED), b"0\r\n\r\n")

    async with serving(script, script, endpoints=["*"]) as (server, *_):
        data = {"model": "r", "input": "x", "stream": cut is not None}
        for number, name in ((12345, "a"), (12346, "b")):
            answer = await server.ask("POST", "/v1/responses", data)
            assert answer.headers["x-apiserver-controller"] == name and b"resp_%d" % number in answer.body
        for number, name in ((12346, "b"), (12345, "a"), (12346, "b")):
            follow_up = {**data, "previous_response_id": f"resp_{number}"}
            assert await names(server, "POST", "/v1/responses", follow_up) == [name] * 3
            assert await names(server, "GET", f"/v1/responses/resp_{number}") == [name] * 3


async def test_the_number_of_remembered_responses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ids are forgotten first; a request about such an id goes to the account that has the objects."""
    monkeypatch.setattr(app, "OBJECTS_KNOWN", 2)
    made = iter(range(9))

    async def script(peer: Peer, message: Message) -> None:
        await peer.send(json_reply(200, {"id": f"resp_{next(made)}"} if message.start.startswith("POST") else {}))

    async with serving(script, script, endpoints=["*"]) as (server, *_):
        assert await names(server, "POST", "/v1/responses", {"model": "r", "input": "x"}, 4) == ["a", "a", "b", "b"]
        owners = [(await names(server, "GET", f"/v1/responses/resp_{number}", b"", 1))[0] for number in (1, 3)]
        assert owners == ["a", "b"]


@pytest.mark.parametrize("streams", [False, True])
async def test_the_cost_of_a_response_is_counted(streams: bool) -> None:
    """Streamed or not, its usage takes the place of the estimate in a configured limit of tokens."""
    end = {"id": "resp_1", "usage": {"input_tokens": 1000, "output_tokens": 4000, "total_tokens": 5000}}
    events = [{"type": "response.output_text.delta", "delta": "hi"}, {"type": "response.completed", "response": end}]

    async def script(peer: Peer, _: Message) -> None:
        if not streams:
            await peer.send(json_reply(200, end))
            return
        await peer.send(SSE_HEAD)
        for data in events:
            await peer.chunk(b"data: %b\n\n" % json.dumps(data).encode())
            await turns()
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as up, Running(controller("a", up.url, limits={"tpm": 100_000})) as server:
        await server.ask("POST", "/v1/responses", {"model": "r", "input": "x", "stream": streams})
        assert (await server.status())["controllers"][0]["ledger"]["r"]["tpm"]["taken"] == 5000


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/v1/conversations", {"conversation": "made_1"}),
        ("/v1/conversations", {"conversation": {"id": "made_1"}}),
        ("/v1/files", {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "made_1"}]}]}),
        ("/v1/vector_stores", {"tools": [{"type": "file_search", "vector_store_ids": ["made_0", "made_1"]}]}),
    ],
)
async def test_a_response_goes_to_the_account_of_the_objects_it_names(path: str, data: dict[str, Any]) -> None:
    """A conversation, a file or a vector store of one account exists in no other."""
    made = json_reply(200, {"id": "made_1"})
    for target in ("/v1/responses", "/v1/responses/input_tokens"):
        async with serving(made, made, endpoints=["*"]) as (server, *_):
            assert await names(server, "POST", path, {}, 1) == ["a"]
            assert await names(server, "POST", target, {"model": "r", "input": "x", **data}, 4) == ["a"] * 4


async def test_a_response_may_leave_its_model_to_a_stored_prompt() -> None:
    """The Responses API's model is optional, but not null; refusals without a model count for the account."""
    stored, made = {"prompt": {"id": "pmpt_1"}}, json_reply(200, {"id": "resp_1", "object": "response"})
    async with serving(made) as (server, _):
        assert (await server.ask("POST", "/v1/responses", stored)).status == 200
        assert (await server.ask("POST", "/v1/responses", {"model": None, "input": "x"})).status == 400
    async with serving(error_reply(403), made, pool=PRIORITY) as (server, bad, _):
        replies = [await server.ask("POST", "/v1/responses", {**stored, "store": False}) for _ in range(5)]
        assert {answer.status for answer in replies} == {200} and len(bad.seen) == 3


# -- paths


async def test_endpoints_decide_what_may_be_reached() -> None:
    """By default inference only; "*" opens every path under /v1, with method, query and empty bodies as they are."""
    listed = json_reply(200, LISTED)
    async with serving(listed) as (server, up):
        for method, path, status in (("GET", "files", 404), ("GET", "anything", 404), ("DELETE", "embeddings", 405)):
            assert (await server.ask(method, "/v1/" + path)).status == status and not up.seen
    async with serving(listed, endpoints=["objects"]) as (server, up):
        assert (await server.ask("POST", "/v1/embeddings", {"model": "e", "input": "x"})).status == 404
        assert (await server.ask("GET", "/v1/files")).status == 200
        assert (await server.ask("GET", "/v1/anything")).status == 404 and len(up.seen) == 1
    async with serving(listed, endpoints=["*"]) as (server, up):
        assert (await server.ask("PATCH", "/v1/any/thing?a=b", b"raw", kind="text/plain")).json() == LISTED
        assert up.seen[-1].start == "PATCH /v1/any/thing?a=b HTTP/1.1" and up.seen[-1].body == b"raw"
        assert (await server.ask("GET", "/status")).json() == {"status": "ok"}


async def test_a_path_goes_as_it_was_spelled() -> None:
    """Percent-encoding stays; dot segments, which could lead out of the account, are refused however they are spelled."""
    bad = ("../admin", "x/%2e%2e/%2E%2e/admin", "x/./y", "x/..%5cadmin", "..", "x/..;a/admin")
    async with serving(json_reply(200, LISTED), endpoints=["*"]) as (server, up):
        for target in ("/v1/x/a%2Fb%C3%A9%25?q=%20", "http://localhost/v1/x/a%2Fb%C3%A9%25?q=%20", "/v1/files/x:y/v1/z"):
            assert (await server.ask("GET", target)).status == 200
            assert up.seen[-1].start == f"GET {target.removeprefix('http://localhost')} HTTP/1.1"
        assert {(await server.ask("GET", "/v1/" + path)).status for path in bad} == {404} and len(up.seen) == 3


async def test_the_path_that_is_sent_is_the_path_that_was_judged() -> None:
    """Where only objects are open no spelling of a path below them reaches anything else of the account."""
    targets = """/v1%2Ffiles/organization/admin_api_keys /%76%31/files/a /v1//files/organization/admin_api_keys
        /v1/files/..;/organization/admin_api_keys /v1/models/..%5corganization /v1/chat//completions /v1/chat/completions;x
        /v1/files/x://y/v1/organization http://localhost/v1%2ffiles/organization""".split()
    async with serving(json_reply(200, LISTED), endpoints=["objects"]) as (server, up):
        for target in targets:
            assert (await server.ask("GET", target)).status == 404, target
            assert (await server.ask("POST", target)).status in (404, 405), target
        assert not [seen.start for seen in up.seen if not seen.start.startswith("GET /v1/models ")]


SPELLINGS = """//chat/completions /chat//completions /chat/%2Fcompletions /chat%2F/completions// /chat/completions;x=y
    /chat/completions%3bx /chat;a/;b/completions;c /Chat/Completions /chat/%43ompletions /v1/chat/completions
    //v1//v1/responses /audio//speech /embeddings; //models /MODELS/gpt-4 /status;x""".split()


@pytest.mark.parametrize("endpoints", [["*"], ["objects"], ["inference", "objects", "*"]])
async def test_no_spelling_of_a_served_route_goes_past_it(endpoints: list[str]) -> None:
    """What an upstream that merges slashes, drops parameters or ignores case would run as a chat is refused."""
    data = {"model": "m", "messages": [], "input": "x"}
    async with serving(json_reply(200, ANSWER), endpoints=endpoints) as (server, up):
        for path in SPELLINGS:
            for method in ("POST", "GET"):
                answer = await server.ask(method, "/v1" + path, data)
                assert (answer.status, answer.json()["error"]["code"]) == (404, "unknown_url"), path
        assert not up.seen
        for path in ("/V1/x", "/Files/a", "/models/Org/m") if endpoints == ["*"] else ():
            assert (await server.ask("DELETE", "/v1" + path)).status == 200
            assert up.seen[-1].start == f"DELETE /v1{path} HTTP/1.1"


# -- lists and names of models


async def test_a_model_that_no_list_has_is_asked_for_upstream() -> None:
    """GET /v1/models/{id} goes to the accounts without a list, one after the other, and never leaves their models."""
    tuned = {"id": "ft:gpt-4.1:org", "object": "model"}

    async def knows(peer: Peer, message: Message) -> None:
        known = message.start == "GET /v1/models/ft:gpt-4.1:org HTTP/1.1"
        await peer.send(json_reply(200, tuned) if known else json_reply(200, LISTED))

    async with Upstream(answers(error_reply(404))) as bad, Upstream(knows) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            assert (await server.ask("GET", "/v1/models/ft:gpt-4.1:org")).json() == tuned
            assert (await server.ask("GET", "/v1/models/%2e%2e/files")).status == 404
            assert not any("files" in seen.start for seen in bad.seen + good.seen)
        async with Running(controller("b", good.url, models=["gpt-4"])) as server:
            assert (await server.ask("GET", "/v1/models/gpt-9")).status == 404


@pytest.mark.parametrize(("status", "message"), [(404, "no such model"), (403, "missing scopes: model.read"), (403, "no")])
async def test_a_key_that_may_not_look_for_a_model_may_still_chat_with_it(status: int, message: str) -> None:
    """A refused GET of a model closes neither the model nor the account, and goes on to the next account."""

    async def script(peer: Peer, seen: Message) -> None:
        chat = seen.start.startswith("POST")
        await peer.send(json_reply(200, ANSWER) if chat else error_reply(status, message=message))

    async with serving(script, script) as (server, _, up):
        for _ in range(4):
            answer = await server.ask("GET", "/v1/models/gpt-9")
            assert answer.status == (404 if status == 404 else 502)
        assert len([seen for seen in up.seen if seen.start == "GET /v1/models/gpt-9 HTTP/1.1"]) == 4
        assert {(await server.post("gpt-9")).headers["x-apiserver-controller"] for _ in range(4)} == {"a", "b"}
        assert [shown["failures"] for shown in (await server.status())["controllers"]] == [0, 0]


async def test_models_behind_a_pattern_are_listed_as_the_account_has_them() -> None:
    """An account whose models are patterns is asked, and what they let through is listed; a client key sees its own."""
    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("gpt-x", "gpt-y", "other")]}
    keys = [{"name": "bob", "key": "bob-key-of-some-length", "models": ["gpt-y"]}]

    async def models(server: Running, *headers: str) -> list[str]:
        answer = await server.ask("GET", "/v1/models", b"", *headers)
        return [model["id"] for model in answer.json()["data"]]

    async with Upstream(answers(json_reply(200, listed))) as up:
        account = controller("a", up.url, models=["gpt-*"])
        async with Listing(account) as server:
            assert await models(server) == ["gpt-x", "gpt-y"]
            assert (await server.ask("GET", "/v1/models/gpt-x")).json()["id"] == "gpt-x"
        async with Listing(account, client_keys=keys) as server:
            assert await models(server, "Authorization: Bearer bob-key-of-some-length") == ["gpt-y"]


# -- objects


@pytest.mark.parametrize("named", [False, True])
async def test_objects_live_in_one_account(named: bool) -> None:
    """Calls go to the first account that can have objects, or to the one that is named, and come back byte for byte."""
    calls = ["GET /v1/files?x=%20&limit=5", "GET /v1/assistants?before=x", "GET /v1/files/file-1/content"]
    calls += ["DELETE /v1/files/file-1", "POST /v1/batches", "POST /v1/fine_tuning/jobs/ftjob-1/cancel"]
    async with Upstream(answers(json_reply(200, {"data": [], "own": 1}))) as up:
        first, second = controller("a", up.url), controller("b", up.url, objects=named)
        async with Running({"type": "echo", "name": "e"}, first, second, endpoints=["objects"]) as server:
            for call in calls:
                method, path = call.split()
                assert await names(server, method, path) == ["b" if named else "a"] * 3
                assert (await server.ask(method, path)).json() == {"data": [], "own": 1}
                assert up.seen[-1].start == f"{call} HTTP/1.1"
            assert await names(server, "POST", "/v1/files", FORM) == ["b" if named else "a"] * 3


async def test_a_change_of_an_object_is_not_replayed_where_it_may_have_run() -> None:
    """A 500 to an upload is the answer."""
    async with serving(error_reply(500), json_reply(200, {"id": "file-1"}), endpoints=["objects"]) as (server, bad, good):
        assert (await server.ask("POST", "/v1/files", FORM, kind=FORM_KIND)).status == 500
        assert len(bad.seen) == 1 and not good.seen


SCOPES = "You have insufficient permissions for this operation. Missing scopes: api.files.read."


@pytest.mark.parametrize(("status", "message"), [(403, "no"), (403, "no right to files of this model"), (401, SCOPES)])
async def test_a_key_without_a_right_to_objects_still_chats(status: int, message: str) -> None:
    """Refused calls about objects never put the key out, and do not hide refused chats between which they come."""
    chats = [json_reply(200, ANSWER)]

    async def script(peer: Peer, seen: Message) -> None:
        chat = seen.start.startswith("POST /v1/chat")
        await peer.send(chats[0] if chat else error_reply(status, message=message))

    async with serving(script, json_reply(200, ANSWER), endpoints=["*"], pool=PRIORITY) as (server, up, _):
        for method, path in [("GET", "/v1/files"), ("DELETE", "/v1/files/file-1"), ("POST", "/v1/batches")] * 2:
            answer = await server.ask(method, path)
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_account_refused")
        assert (await server.status())["controllers"][0]["failures"] == 0
        assert (await server.post()).headers["x-apiserver-controller"] == "a"
        chats[0] = error_reply(403)
        for _ in range(5):
            assert (await server.post()).headers["x-apiserver-controller"] == "b"
            await server.ask("DELETE", "/v1/files/file-1")
        assert len([seen for seen in up.seen if seen.start.startswith("POST /v1/chat")]) == 1 + 3


async def test_lists_count_for_the_limits_of_a_client_key() -> None:
    """A list of objects counts as a request."""
    keys = [{"key": "alice-key-123456", "limits": {"rpm": 1}}]
    async with serving(json_reply(200, LISTED), endpoints=["objects"], client_keys=keys) as (server, _):
        replies = [await server.ask("GET", "/v1/files", b"", "api-key: alice-key-123456") for _ in range(2)]
        assert [answer.status for answer in replies] == [200, 429]


async def test_a_head_request_gets_no_invented_length() -> None:
    """The length of an upstream's answer to GET is not known, so none is told; the server's own pages have theirs."""
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    async with serving(raw, endpoints=["objects"]) as (server, _):
        client = await server.open()
        for _ in range(2):
            await client.send(request(b"", target="/v1/files/a", method="HEAD"))
            answer = await client.read(head_only=True)
            assert answer.status == 200 and "content-length" not in answer.headers
        await client.send(request(b"", target="/status", method="HEAD"))
        assert (await client.read(head_only=True)).headers["content-length"] == "15"
        client.close()


def reasoning(tag: str, encrypted: str = "") -> dict[str, Any]:
    """Return the output of a response: an item that only the account `tag` can read."""
    return {"id": f"rs_{tag}123", "type": "reasoning", "summary": [], **({"encrypted_content": encrypted} if encrypted else {})}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reference", ["item", "encrypted", "both"])
async def test_items_go_where_they_were_made(stream: bool, reference: str) -> None:
    """A turn that names an item by its id, or brings an encrypted one back, goes to the account that made the item."""

    def made(tag: str) -> Script:
        blob = f"gAAAAA{tag}" + "x" * 5000

        async def script(peer: Peer, message: Message) -> None:
            output = [reasoning(tag, "" if reference == "item" else blob)]
            if not stream:
                await peer.send(json_reply(200, {"id": f"resp_{tag}1", "object": "response", "output": output}))
                return
            done = {"type": "response.output_item.done", "item": output[0]}
            event = b"data: %b\n\n" % json.dumps(done).encode()
            await peer.send(SSE_HEAD)
            for at in range(0, len(event), 50):
                await peer.chunk(event[at : at + 50])
            await peer.send(app.chunk(COMPLETED) + b"0\r\n\r\n")

        return script

    async with serving(made("A"), made("B")) as (server, one, two):
        data = {"model": "r", "input": "x", "store": False, "stream": stream}
        for _ in range(2):
            await server.ask("POST", "/v1/responses", data)
        for tag, name in (("B", "b"), ("A", "a"), ("B", "b"), ("B", "b")):
            item = reasoning(tag, f"gAAAAA{tag}" + "x" * 5000)
            if reference == "item":
                item = {"type": "item_reference", "id": f"rs_{tag}123"}
            elif reference == "encrypted":
                del item["id"]
            answer = await server.ask("POST", "/v1/responses", {**data, "input": [item]})
            assert answer.headers["x-apiserver-controller"] == name
        assert len(one.seen) == 2 and len(two.seen) == 4


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(400, "invalid_encrypted_content", "could not be verified"), (404, None, "Item with id 'rs_1' not found.")],
)
async def test_an_item_of_another_account_asks_the_next(status: int, code: str | None, message: str) -> None:
    """An account that cannot read an item passes the request on; if none can, the client gets that refusal."""
    async with serving(error_reply(status, code, message), json_reply(200, LISTED)) as (server, _, _two):
        data = {"model": "r", "store": False, "input": [{"type": "item_reference", "id": "rs_1"}]}
        answer = await server.ask("POST", "/v1/responses", data)
        assert answer.status == 200 and answer.headers["x-apiserver-controller"] == "b"
        assert [state["state"] for state in (await server.status())["controllers"]] == ["ok", "ok"]
    async with serving(error_reply(status, code, message)) as (server, *_):
        assert (await server.ask("POST", "/v1/responses", data)).status == status
