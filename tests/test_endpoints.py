"""Endpoints beyond chat: the same scheduler, the body as it came, and what lives in one account."""

import json

import pytest

import chatgpt_apiserver as app

from .support import Message, Peer, Running, Upstream, answers, controller, error_reply, json_reply

LISTED = {"object": "list", "data": []}


def wire(method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    """A request as it goes over the wire."""
    head = "%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return (head % (method, path, kind, len(body))).encode() + body


async def ask(server: Running, method: str, path: str, data: object = None, **more: str) -> Message:
    """One request and its answer."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode() if data is not None else b""
    client = await server.open()
    await client.send(wire(method, path, body, **more))
    found = await client.read()
    client.close()
    return found


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
    ],
)
async def test_inference_goes_through_the_scheduler(path: str, data: "dict[str, object]") -> None:
    """A failing controller is passed over, the body goes as it came, and the decision is told."""
    async with Upstream(answers(error_reply(429))) as bad, Upstream(answers(json_reply(200, LISTED))) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            found = await ask(server, "POST", path, data)
            assert (found.status, found.json()) == (200, LISTED)
            assert found.headers["x-apiserver-controller"] == "b" and found.headers["x-apiserver-attempts"] == "2"
            assert good.seen[0].start == "POST /v1%s HTTP/1.1" % path.removeprefix("/v1")
            assert good.seen[0].body == json.dumps(data).encode()
            assert bad.seen[0].body == good.seen[0].body


@pytest.mark.parametrize("data", [{"input": "x"}, {"model": "", "input": "x"}, {"model": 3}, []])
async def test_what_is_needed_is_asked_for(data: object) -> None:
    """Without a model nothing is sent upstream."""
    async with Upstream(answers(json_reply(200, LISTED))) as one, Running(controller("a", one.url)) as server:
        assert (await ask(server, "POST", "/v1/embeddings", data)).status == 400
        assert not one.seen


FORM = (
    b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n\x00\xff\r\n'
    b'--xx\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--xx--\r\n'
)


async def test_a_form_goes_by_its_model_field() -> None:
    """The model is found in the form, mapped in place, and every other byte stays."""
    async with Upstream(answers(json_reply(200, {"text": "hi"}))) as one:
        mapped = controller("b", one.url, models=["whisper"], model_map={"whisper": "whisper-1"})
        async with Running(controller("a", one.url, models=["other"]), mapped) as server:
            found = await ask(server, "POST", "/v1/audio/transcriptions", FORM, kind="multipart/form-data; boundary=xx")
            assert found.json() == {"text": "hi"} and found.headers["x-apiserver-controller"] == "b"
            assert one.seen[0].body == FORM.replace(b"\r\nwhisper\r\n", b"\r\nwhisper-1\r\n")
            assert one.seen[0].headers["content-type"] == "multipart/form-data; boundary=xx"
            bare = FORM.replace(b'name="model"', b'name="prompt"')
            kind = "multipart/form-data; boundary=xx"
            assert (await ask(server, "POST", "/v1/audio/transcriptions", bare, kind=kind)).status == 400
            assert (await ask(server, "POST", "/v1/audio/transcriptions", FORM)).status == 400


async def test_a_responses_stream_commits_on_its_first_real_event() -> None:
    """response.created is held while another controller could take over; an error then moves on."""
    created = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1"}}\n\n'
    failed = b'event: error\ndata: {"type":"error","code":"server_error","message":"x","param":null}\n\n'
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x"}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    def stream(*events: bytes) -> bytes:
        return head + b"".join(map(app.chunk, events)) + b"0\r\n\r\n"

    async with Upstream(answers(stream(created, failed))) as bad, Upstream(answers(stream(created, delta))) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            found = await ask(
                server, "POST", "/v1/responses", {"model": "r", "input": "x", "stream": True, "store": False}
            )
            assert found.body == created + delta and found.headers["x-apiserver-attempts"] == "2"


async def test_a_follow_up_goes_where_the_first_response_lives() -> None:
    """previous_response_id and /v1/responses/{id} go to the controller that made it; an unknown one is refused in words."""
    ids = iter(range(100))

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(json_reply(200, {"id": "resp_%d" % next(ids), "object": "response"}))

    async with Upstream(script) as one, Upstream(script) as other:
        data = {"model": "r", "input": "x"}
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["*"]) as server:
            first = await ask(server, "POST", "/v1/responses", data)
            name, made = first.headers["x-apiserver-controller"], first.json()["id"]
            for _ in range(3):
                found = await ask(server, "POST", "/v1/responses", dict(data, previous_response_id=made))
                assert found.headers["x-apiserver-controller"] == name
                found = await ask(server, "GET", "/v1/responses/" + made)
                assert found.headers["x-apiserver-controller"] == name
            lost = await ask(server, "POST", "/v1/responses", dict(data, previous_response_id="resp_lost"))
            assert lost.status == 404 and lost.json()["error"]["code"] == "object_not_known"
            assert (await ask(server, "DELETE", "/v1/files/file-lost")).status == 404


async def test_objects_are_found_in_the_account_that_has_them() -> None:
    """A file that nobody remembers is asked for in turn; one that was made here is known, also inside another request."""

    async def script_a(peer: Peer, message: Message) -> None:
        await peer.send(error_reply(404, message="No such File object"))

    async def script_b(peer: Peer, message: Message) -> None:
        await peer.send(json_reply(200, {"object": "file", "id": "file-abc1"}))

    async with Upstream(script_a) as one, Upstream(script_b) as other:
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["objects"]) as server:
            found = await ask(server, "GET", "/v1/files/file-abc1?x=y")
            assert found.status == 200 and found.headers["x-apiserver-controller"] == "b"
            assert other.seen[-1].start == "GET /v1/files/file-abc1?x=y HTTP/1.1"
            server.server.relay.remember("file-abc1", "b")
            found = await ask(server, "POST", "/v1/batches", {"input_file_id": "file-abc1"})
            assert found.headers["x-apiserver-controller"] == "b"
            before = len(one.seen)
            assert (await ask(server, "DELETE", "/v1/files/file-abc1")).headers["x-apiserver-controller"] == "b"
            assert len(one.seen) == before


async def test_a_stateful_request_is_not_replayed_where_it_may_have_run() -> None:
    """A 500 to an upload is the answer; a 429 is not."""
    async with Upstream(answers(error_reply(500))) as bad, Upstream(answers(json_reply(200, {"id": "file-1"}))) as good:
        async with Running(controller("a", bad.url), controller("b", good.url), endpoints=["objects"]) as server:
            assert (await ask(server, "POST", "/v1/files", b"x", kind="multipart/form-data; boundary=x")).status == 500
            assert not good.seen


async def test_endpoints_decide_what_may_be_reached() -> None:
    """By default inference only; "*" opens every path under /v1, with method, query and empty bodies as they are."""
    async with Upstream(answers(json_reply(200, LISTED))) as one:
        async with Running(controller("a", one.url)) as server:
            assert (await ask(server, "GET", "/v1/files")).status == 404
            assert (await ask(server, "GET", "/v1/anything")).status == 404
            assert (await ask(server, "DELETE", "/v1/embeddings")).status == 405
        async with Running(controller("a", one.url), endpoints=["objects"]) as server:
            assert (await ask(server, "POST", "/v1/embeddings", {"model": "e", "input": "x"})).status == 404
            assert (await ask(server, "GET", "/v1/files")).status == 200
            assert (await ask(server, "GET", "/v1/anything")).status == 404
        assert len(one.seen) == 1
        async with Running(controller("a", one.url), endpoints=["*"]) as server:
            assert (await ask(server, "PATCH", "/v1/any/thing?a=b", b"raw", kind="text/plain")).json() == LISTED
            assert one.seen[-1].start == "PATCH /v1/any/thing?a=b HTTP/1.1" and one.seen[-1].body == b"raw"
            assert (await ask(server, "GET", "/status")).json() == {"status": "ok"}


async def test_a_path_goes_as_it_was_spelled_and_never_out_of_the_account() -> None:
    """Percent-encoding stays, dot segments are refused however they are spelled."""
    async with Upstream(answers(json_reply(200, LISTED))) as one:
        async with Running(controller("a", one.url), endpoints=["*"]) as server:
            for target in ("/v1/x/a%2Fb%C3%A9%25?q=%20", "http://localhost/v1/x/a%2Fb%C3%A9%25?q=%20"):
                assert (await ask(server, "GET", target)).status == 200
                assert one.seen[-1].start == "GET /v1/x/a%2Fb%C3%A9%25?q=%20 HTTP/1.1"
            for target in ("/v1/../admin", "/v1/x/%2e%2e/%2E%2e/admin", "/v1/x/./y", "/v1/x/..%5cadmin", "/v1/.."):
                assert (await ask(server, "GET", target)).status == 404
            assert len(one.seen) == 2


async def test_binary_answers_come_back_as_they_are() -> None:
    """Speech is bytes, not JSON."""
    sound = bytes(range(256)) * 9
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n%b" % (len(sound), sound)
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url)) as server:
        found = await ask(server, "POST", "/v1/audio/speech", {"model": "tts", "input": "x", "voice": "v"})
        assert found.body == sound and found.headers["content-type"] == "audio/mpeg"


async def test_controllers_that_only_chat_are_passed_over() -> None:
    """An echo controller has no embeddings; where nobody has, the answer says so."""
    async with Upstream(answers(json_reply(200, LISTED))) as one:
        echo = {"type": "echo", "name": "e"}
        async with Running(echo, controller("a", one.url)) as server:
            for _ in range(2):
                found = await ask(server, "POST", "/v1/embeddings", {"model": "e", "input": "x"})
                assert found.headers["x-apiserver-controller"] == "a"
        async with Running(echo) as server:
            assert (await ask(server, "POST", "/v1/embeddings", {"model": "e", "input": "x"})).status == 404


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
    ],
)
def test_text_of_an_input(value: object, chars: int) -> None:
    """Text is counted wherever it stands; a picture counts as a part, however long its URL."""
    assert app.count_text(value) == chars


def test_text_of_a_deep_input_is_not_followed() -> None:
    """Nesting without end is no reason to recurse without end."""
    deep: object = "x"
    for _ in range(500):
        deep = [deep]
    assert app.count_text(deep) == 0


def test_memory_of_objects_is_bounded() -> None:
    """The oldest ids go."""
    relay = app.Relay(None, None, None)  # type: ignore[arg-type]
    for number in range(app.OBJECTS_KNOWN + 5):
        relay.remember("id%d" % number, "a")
    assert len(relay.makers) == app.OBJECTS_KNOWN and "id0" not in relay.makers


async def test_a_model_that_no_list_has_is_asked_for_upstream() -> None:
    """GET /v1/models/{id} goes to the accounts without a list, one after the other, and never leaves their models."""
    tuned = {"id": "ft:gpt-4.1:org", "object": "model"}

    async def knows(peer: Peer, request: Message) -> None:
        found = request.start == "GET /v1/models/ft:gpt-4.1:org HTTP/1.1"
        await peer.send(json_reply(200, tuned) if found else json_reply(200, LISTED))

    async with Upstream(answers(error_reply(404))) as bad, Upstream(knows) as good:
        async with Running(controller("a", bad.url), controller("b", good.url)) as server:
            assert (await ask(server, "GET", "/v1/models/ft:gpt-4.1:org")).json() == tuned
            assert (await ask(server, "GET", "/v1/models/%2e%2e/files")).status == 404
            assert not any("files" in seen.start for seen in bad.seen + good.seen)
        async with Running(controller("b", good.url, models=["gpt-*"])) as server:
            assert (await ask(server, "GET", "/v1/models/gpt-9")).status == 404


async def test_a_response_may_leave_its_model_to_a_stored_prompt() -> None:
    """The Responses API's model is optional; its upstream judges what is missing."""
    async with Upstream(answers(json_reply(200, {"id": "resp_1", "object": "response"}))) as one:
        async with Running(controller("a", one.url)) as server:
            assert (await ask(server, "POST", "/v1/responses", {"prompt": {"id": "pmpt_1"}})).status == 200
            assert (await ask(server, "POST", "/v1/responses", {"model": None, "input": "x"})).status == 400
