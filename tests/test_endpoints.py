"""Endpoints beyond chat: the same scheduler, the body as it came, and what lives in one account."""

import asyncio
import json
from urllib.parse import parse_qsl

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    SSE_HEAD,
    Message,
    Peer,
    Running,
    Script,
    Upstream,
    answers,
    controller,
    error_reply,
    json_reply,
    request,
)
from .wirefeed import turns

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
        ("/v1/responses/input_tokens", {"model": "r", "input": "x"}),
        ("/v1/responses/compact", {"input": [{"type": "message", "role": "user", "content": "x"}]}),
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


@pytest.mark.parametrize("whole", [True, False])
async def test_an_edit_of_pictures_may_come_as_json(whole: bool) -> None:
    """Pictures that an address or a file's id names need no form (API reference, images/edits), however the body comes."""
    data = {"model": "draw", "images": [{"image_url": "https://x.example/a.png"}], "prompt": "a hat"}
    async with Upstream(answers(json_reply(200, {"data": []}))) as one:
        mapped = controller("b", one.url, models=["draw"], model_map={"draw": "gpt-image-1.5"})
        async with Running(controller("a", one.url, models=["other"]), mapped) as server:
            client = await server.open()
            raw = wire("POST", "/v1/images/edits", json.dumps(data).encode())
            await client.send(raw if whole else raw[:-5])
            if not whole:
                await turns(3)
                await client.send(raw[-5:])
            assert (await client.read()).json() == {"data": []}
            assert one.seen[0].json() == dict(data, model="gpt-image-1.5")
            client.close()


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


@pytest.mark.parametrize("cut", [8, 60, 78, 200])
async def test_a_streamed_response_is_found_again_wherever_its_reads_end(cut: int) -> None:
    """Who made it is remembered, also where its first read ends before its id or within."""
    created = b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_12345","object":"response"}}\n\n'

    async def script(peer: Peer, message: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(created[:cut])
        await turns()
        await peer.send(app.chunk(created[cut:]) if created[cut:] else b"", b"0\r\n\r\n")

    async with Upstream(script) as one, Upstream(script) as two:
        async with Running(controller("a", one.url), controller("b", two.url)) as server:
            data = {"model": "r", "input": "x", "stream": True}
            found = await ask(server, "POST", "/v1/responses", data)
            assert found.body == created and found.headers["x-apiserver-controller"] == "a"
            for _ in range(3):
                found = await ask(server, "POST", "/v1/responses", {**data, "previous_response_id": "resp_12345"})
                assert found.headers["x-apiserver-controller"] == "a"


@pytest.mark.parametrize("streams", [False, True])
async def test_what_a_response_cost_is_counted(streams: bool) -> None:
    """Streamed or not, its usage takes the place of the estimate in a configured limit of tokens."""
    end = {"id": "resp_1", "usage": {"input_tokens": 1000, "output_tokens": 4000, "total_tokens": 5000}}
    told = [{"type": "response.output_text.delta", "delta": "hi"}, {"type": "response.completed", "response": end}]

    async def script(peer: Peer, _: Message) -> None:
        if not streams:
            await peer.send(json_reply(200, end))
            return
        await peer.send(SSE_HEAD)
        for what in told:
            await peer.chunk(b"data: %b\n\n" % json.dumps(what).encode())
            await turns()
        await peer.send(b"0\r\n\r\n")

    async with Upstream(script) as one, Running(controller("a", one.url, limits={"tpm": 100_000})) as server:
        await ask(server, "POST", "/v1/responses", {"model": "r", "input": "x", "stream": streams})
        ((_, window),) = server.server.pool.upstreams[0].seat("r").ledger.windows
        assert window.total == 5000


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


@pytest.mark.parametrize(
    "data",
    [
        {"conversation": "conv_b1"},
        {"conversation": {"id": "conv_b1"}},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-b1"}]}]},
        {"tools": [{"type": "file_search", "vector_store_ids": ["vs_elsewhere", "vs_b1"]}]},
    ],
)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
async def test_a_response_goes_where_lies_what_it_speaks_of(path: str, data: "dict[str, object]") -> None:
    """A conversation, a file or a store of one account is in no other; what nobody remembers ties a request to none."""
    async with Upstream(answers(json_reply(200, {"id": "resp_1"}))) as one:
        async with Running(controller("a", one.url), controller("b", one.url)) as server:
            asked = {"model": "r", "input": "x", **data}
            names = [(await ask(server, "POST", path, asked)).headers["x-apiserver-controller"] for _ in range(4)]
            assert sorted(names) == ["a", "a", "b", "b"]
            for made in ("conv_b1", "file-b1", "vs_b1"):
                server.server.relay.remember(made, "b")
            for _ in range(3):
                assert (await ask(server, "POST", path, asked)).headers["x-apiserver-controller"] == "b"


@pytest.mark.parametrize("path", ["fine_tuning/jobs", "fine_tuning/alpha/graders/run", "threads/runs", "videos/edits"])
async def test_words_of_a_path_are_no_objects(path: str) -> None:
    """What is made below such a word may be made in any account; where an object follows, it is that which is unknown."""
    async with Upstream(answers(json_reply(200, {"id": "new_1"}))) as one:
        async with Running(controller("a", one.url), controller("b", one.url), endpoints=["objects"]) as server:
            assert (await ask(server, "POST", "/v1/" + path, {"model": "m"})).status == 200
            found = await ask(server, "POST", "/v1/%s/lost_1/cancel" % path)
            assert found.status == 404 and found.json()["error"]["message"].startswith("'lost_1' lives in one account")


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


@pytest.mark.parametrize("read", ["/v1/files/file-out1", "/v1/files/file-out1/content"])
async def test_who_has_read_an_object_may_change_it(read: str) -> None:
    """A batch's output was made by no request; once an account has shown it, it is known where it can be deleted."""
    kept = json_reply(200, {"custom_id": "1", "id": "batch_req_1"})
    async with Upstream(answers(error_reply(404))) as one, Upstream(answers(kept)) as other:
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["objects"]) as server:
            assert (await ask(server, "DELETE", "/v1/files/file-out1")).status == 404
            assert (await ask(server, "GET", "/v1/files/file-lost")).status == 200
            assert (await ask(server, "GET", read)).status == 200
            before = len(one.seen)
            assert (await ask(server, "DELETE", "/v1/files/file-out1")).status == 200
            assert len(one.seen) == before and other.seen[-1].start == "DELETE /v1/files/file-out1 HTTP/1.1"
        async with Running(controller("a", one.url), controller("c", one.url), endpoints=["objects"]) as server:
            assert (await ask(server, "GET", read)).status == 404
            assert not server.server.relay.makers


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
            assert (await ask(server, "GET", "/v1/x/..;a/admin")).status == 404
            assert len(one.seen) == 2


@pytest.mark.parametrize(
    "target",
    [
        "/v1%2Ffiles/organization/admin_api_keys",
        "/%76%31/files/a",
        "/v1//files/organization/admin_api_keys",
        "/v1/files/..;/organization/admin_api_keys",
        "/v1/models/..%5corganization",
        "/v1/chat//completions",
        "/v1/chat/completions;x",
        "/v1/files/x://y/v1/organization",
        "http://localhost/v1%2ffiles/organization",
    ],
)
async def test_what_is_sent_is_the_path_that_was_judged(target: str) -> None:
    """Where only objects are open no spelling of a path below them reaches anything else of the account."""
    async with Upstream(answers(json_reply(200, LISTED))) as one:
        async with Running(controller("a", one.url), endpoints=["objects"]) as server:
            assert (await ask(server, "GET", target)).status == 404
            assert (await ask(server, "POST", target)).status in (404, 405)
            assert not [seen.start for seen in one.seen if not seen.start.startswith("GET /v1/models ")]
        async with Running(controller("a", one.url), endpoints=["*"]) as server:
            assert (await ask(server, "GET", "/v1/files/x://y/v1/z")).status == 200
            assert one.seen[-1].start == "GET /v1/files/x://y/v1/z HTTP/1.1"


@pytest.mark.parametrize("endpoints", [["*"], ["objects"], ["inference", "objects", "*"]])
async def test_no_spelling_of_a_route_of_ours_goes_past_it(endpoints: "list[str]") -> None:
    """What an upstream that merges slashes, drops parameters or knows no capitals would run as a chat is refused."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one:
        async with Running(controller("a", one.url), endpoints=endpoints) as server:
            for path in (
                "//chat/completions",
                "/chat//completions",
                "/chat/%2Fcompletions",
                "/chat%2F/completions//",
                "/chat/completions;x=y",
                "/chat/completions%3bx",
                "/chat;a/;b/completions;c",
                "/Chat/Completions",
                "/chat/%43ompletions",
                "/v1/chat/completions",
                "//v1//v1/responses",
                "/audio//speech",
                "/embeddings;",
                "//models",
                "/MODELS/gpt-4",
                "/status;x",
            ):
                for method in ("POST", "GET"):
                    found = await ask(server, method, "/v1" + path, {"model": "m", "messages": [], "input": "x"})
                    assert (found.status, found.json()["error"]["code"]) == (404, "unknown_url"), path
            assert not one.seen
        if endpoints == ["*"]:
            async with Running(controller("a", one.url), endpoints=endpoints) as server:
                for path in ("/x//y", "/chat;x/other", "/V1/x", "/Files/a", "/models/Org//m;x"):
                    assert (await ask(server, "DELETE", "/v1" + path)).status == 200
                    assert one.seen[-1].start == "DELETE /v1%s HTTP/1.1" % path


async def test_binary_answers_come_back_as_they_are() -> None:
    """Speech is bytes, not JSON."""
    sound = bytes(range(256)) * 9
    raw = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nContent-Length: %d\r\n\r\n%b" % (len(sound), sound)
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url)) as server:
        found = await ask(server, "POST", "/v1/audio/speech", {"model": "tts", "input": "x", "voice": "v"})
        assert found.body == sound and found.headers["content-type"] == "audio/mpeg"


@pytest.mark.parametrize("ends", [True, False])
async def test_speech_is_heard_while_it_is_made(ends: bool) -> None:
    """Its first bytes leave at once, as players begin with them; one that breaks off ends without its last chunk."""
    go = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.chunk(b"hello")
        await go.wait()
        await peer.send(b"5\r\nworld\r\n0\r\n\r\n" if ends else b"5\r\nwor")
        peer.close()

    async with Upstream(script) as one, Running(controller("a", one.url), controller("b", one.url)) as server:
        client = await server.open()
        await client.send(wire("POST", "/v1/audio/speech", json.dumps({"model": "tts", "input": "x"}).encode()))
        assert (await client.read(head_only=True)).headers["content-type"] == "audio/mpeg"
        assert await client.reader.readexactly(10) == b"5\r\nhello\r\n"
        go.set()
        if ends:
            assert await client.reader.readexactly(15) == b"5\r\nworld\r\n0\r\n\r\n"
        else:
            assert not (await client.closed()).endswith(b"0\r\n\r\n")
            assert len(one.seen) == 1
        client.close()


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
        async with Running(controller("b", good.url, models=["gpt-4"])) as server:
            assert (await ask(server, "GET", "/v1/models/gpt-9")).status == 404


@pytest.mark.parametrize(
    ("status", "message"), [(404, "no such model"), (403, "missing scopes: model.read"), (403, "no")]
)
async def test_who_may_not_look_for_a_model_may_still_chat_with_it(status: int, message: str) -> None:
    """Asking for a model by GET takes it, and the account, from nobody, and goes on to the next account."""

    async def script(peer: Peer, request: Message) -> None:
        chat = request.start.startswith("POST")
        await peer.send(json_reply(200, ANSWER) if chat else error_reply(status, message=message))

    async with Upstream(script) as one, Upstream(script) as two:
        async with Running(controller("a", one.url), controller("b", two.url)) as server:
            for _ in range(4):
                assert (await ask(server, "GET", "/v1/models/gpt-9")).status == status
            assert len([seen for seen in two.seen if seen.start == "GET /v1/models/gpt-9 HTTP/1.1"]) == 4
            names = {(await server.post("gpt-9")).headers["x-apiserver-controller"] for _ in range(4)}
            assert names == {"a", "b"}
            assert not any(upstream.out_why or upstream.failures for upstream in server.server.pool.upstreams)


SCOPES = "You have insufficient permissions for this operation. Missing scopes: api.files.read."


@pytest.mark.parametrize(
    ("status", "message"), [(403, "no"), (403, "no right to files of this model"), (401, SCOPES)]
)
async def test_a_key_without_a_right_to_objects_still_chats(status: int, message: str) -> None:
    """Refused calls about objects park no key, however many, and hide no refusal of chats by their coming between."""
    chats = [json_reply(200, ANSWER)]

    async def script(peer: Peer, request: Message) -> None:
        chat = request.start.startswith("POST /v1/chat")
        await peer.send(chats[0] if chat else error_reply(status, message=message))

    async with Upstream(script) as one, Running(controller("a", one.url), endpoints=["*"]) as server:
        upstream = server.server.pool.upstreams[0]
        for method, path in [("GET", "/v1/files"), ("DELETE", "/v1/files/file-1"), ("POST", "/v1/batches")] * 2:
            found = await ask(server, method, path)
            assert found.status == status and found.json()["error"]["message"] == message
            assert (await ask(server, "GET", "/v1/x/file-1")).status == status
        assert not (upstream.out_why or upstream.failures or upstream.seat("").lacks_until)
        assert upstream.last_error == "barred %d: %s" % (status, message)
        assert (await server.post()).status == 200
        chats[0] = error_reply(403)
        for count in range(3):
            assert not upstream.out_why and upstream.forbidden == count
            assert (await server.post()).status == 403
            await ask(server, "DELETE", "/v1/files/file-1")
        assert upstream.out_why == "parked"


async def test_what_one_key_may_not_do_another_may() -> None:
    """An upload goes on from a key that lacks the scope, which ran nothing, to one that has it."""
    refused = error_reply(401, message=SCOPES)
    async with Upstream(answers(refused)) as bad, Upstream(answers(json_reply(200, {"id": "file-1"}))) as good:
        async with Running(controller("a", bad.url), controller("b", good.url), endpoints=["objects"]) as server:
            for _ in range(4):
                assert (await ask(server, "POST", "/v1/files", b"x", kind="multipart/form-data; boundary=x")).status == 200
            assert len(bad.seen) == 2 and not server.server.pool.upstreams[0].out_why


async def test_a_refused_response_counts_though_it_names_no_model() -> None:
    """A model that a stored prompt names is one that is asked for something."""
    async with Upstream(answers(error_reply(403))) as one, Running(controller("a", one.url)) as server:
        for _ in range(3):
            assert (await ask(server, "POST", "/v1/responses", {"prompt": {"id": "pmpt_1"}})).status == 403
        assert server.server.pool.upstreams[0].out_why == "parked"


async def test_a_response_may_leave_its_model_to_a_stored_prompt() -> None:
    """The Responses API's model is optional; its upstream judges what is missing."""
    async with Upstream(answers(json_reply(200, {"id": "resp_1", "object": "response"}))) as one:
        async with Running(controller("a", one.url)) as server:
            assert (await ask(server, "POST", "/v1/responses", {"prompt": {"id": "pmpt_1"}})).status == 200
            assert (await ask(server, "POST", "/v1/responses", {"model": None, "input": "x"})).status == 400


# ---- lists of objects


def listing(objects: "list[tuple[str, int]]", cap: int = 100) -> Script:
    """An account that lists these objects (id, created_at), and has each of them."""

    async def script(peer: Peer, message: Message) -> None:
        path, _, words = message.start.split()[1].partition("?")
        query = dict(parse_qsl(words))
        name = path.rpartition("/")[2]
        if name not in ("files", "batches"):
            found = [one for one in objects if one[0] == name]
            await peer.send(json_reply(200, {"id": name}) if found else error_reply(404, message="No such object"))
            return
        rows = sorted(objects, key=lambda one: one[1], reverse=query.get("order", "desc") == "desc")
        ids = [one[0] for one in rows]
        if query.get("after") and query["after"] not in ids:
            await peer.send(error_reply(400, message="No such object"))
            return
        start = ids.index(query["after"]) + 1 if query.get("after") else 0
        size = min(int(query.get("limit", "20")[:9]), cap)
        data = [{"id": one[0], "object": "file", "created_at": one[1]} for one in rows[start : start + size]]
        await peer.send(json_reply(200, {"object": "list", "data": data, "has_more": len(rows) > start + size}))

    return script


async def pages(server: Running, path: str, most: int = 100) -> "list[list[str]]":
    """The ids of all pages, asked for as the official packages do: behind the last object of each."""
    found: "list[list[str]]" = []
    after = ""
    while len(found) < most:
        page = (await ask(server, "GET", path + ("&after=" + after if after else ""))).json()
        ids = [one["id"] for one in page["data"]]
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", *((ids[0], ids[-1]) if ids else (None, None)))
        found.append(ids)
        if not page["has_more"]:
            break
        after = ids[-1]
    return found


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("cap", [2, 100])
async def test_lists_of_all_accounts_are_one(order: str, limit: int, cap: int) -> None:
    """Page by page every object comes once, in the order of time, whatever page an account is willing to send."""
    first, second, third = ([("%s%d" % (name, at), at) for at in times] for name, times in (("a", range(0, 30, 3)), ("b", (1, 2, 50, 51, 52)), ("c", ())))
    async with Upstream(listing(first, cap)) as one, Upstream(listing(second)) as two, Upstream(listing(third)) as three:
        controllers = controller("a", one.url), controller("b", two.url), controller("c", three.url)
        async with Running(*controllers, {"type": "echo", "name": "e"}, endpoints=["objects"]) as server:
            found = await pages(server, "/v1/files?order=%s&limit=%d&purpose=x" % (order, limit))
            rows = sorted(first + second, key=lambda row: row[1], reverse=order == "desc")
            assert [name for page in found for name in page] == [name for name, _ in rows]
            assert all(len(page) <= limit for page in found) and (cap < limit or all(len(page) == limit for page in found[:-1]))
            assert all("purpose=x" in seen.start for seen in one.seen)


async def test_a_listed_object_is_known() -> None:
    """What a list showed is asked for where it is, at once; without a limit the lists are as long as they come."""
    async with Upstream(listing([("file-a", 1)])) as one, Upstream(listing([("file-b", 2)])) as other:
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["objects"]) as server:
            assert await pages(server, "/v1/batches?") == [["file-b", "file-a"]]
            for name in "ab":
                found = await ask(server, "GET", "/v1/files/file-" + name)
                assert (found.headers["x-apiserver-controller"], found.headers["x-apiserver-attempts"]) == (name, "1")
            server.server.access.flush()
            assert "tried=a:ok:" in server.lines[0] and "b:ok:" in server.lines[0]


async def test_a_list_is_asked_for_as_the_client_asks() -> None:
    """Every word of the query goes to each account but for its own place; a limit that is none is the account's to judge."""
    async with Upstream(listing([("a", 1)])) as one, Upstream(listing([("b", 2)])) as other:
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["objects"]) as server:
            await ask(server, "GET", "/v1/files?include[]=a&include[]=b%20c&limit=5")
            for upstream in (one, other):
                assert upstream.seen[0].start == "GET /v1/files?include%5B%5D=a&include%5B%5D=b+c&limit=5 HTTP/1.1"
            await ask(server, "GET", "/v1/files?limit=" + "9" * 5000)
            assert one.seen[-1].start.count("9") == 5000


async def test_a_page_behind_any_other_object() -> None:
    """Behind an object where no page of ours ended the list of its account goes on, known or found by asking."""
    first = [("a%d" % at, at) for at in range(9)]
    async with Upstream(listing(first)) as one, Upstream(listing([("b1", 1)])) as other:
        async with Running(controller("b", other.url), controller("a", one.url), endpoints=["objects"]) as server:
            server.server.relay.remember("a5", "a")
            found = await ask(server, "GET", "/v1/files?limit=2&after=a5")
            assert [row["id"] for row in found.json()["data"]] == ["a4", "a3"] and len(other.seen) == 0


async def test_a_list_without_some_accounts() -> None:
    """Who fails or is silent is left out, and comes back in with the next page; when all fail their answer is told."""
    bad = [error_reply(500)]

    async def script(peer: Peer, message: Message) -> None:
        if bad:
            await peer.send(bad.pop())
        else:
            await listing([("a%d" % at, at) for at in range(2)])(peer, message)

    async with Upstream(script) as one, Upstream(listing([("b%d" % at, at) for at in range(5)])) as other:
        async with Running(controller("a", one.url), controller("b", other.url), endpoints=["objects"]) as server:
            assert await pages(server, "/v1/files?limit=2") == [["b4", "b3"], ["b2", "a1"], ["b1", "a0"], ["b0"]]
    replies = answers(error_reply(401, message="no"), json_reply(200, {"data": [3]}), error_reply(500, message="down"))
    async with Upstream(replies) as one, Running(controller("a", one.url), controller("b", one.url), endpoints=["*"]) as server:
        found = await ask(server, "GET", "/v1/files")
        assert found.status == 500 and found.json()["error"]["message"] == "down"


async def test_one_account_lists_by_itself() -> None:
    """With a single one, or by HEAD or `before`, the answer is its own, byte for byte."""
    async with Upstream(answers(json_reply(200, {"data": [], "own": 1}))) as one:
        async with Running(controller("a", one.url), {"type": "echo", "name": "e"}, endpoints=["objects"]) as server:
            assert (await ask(server, "GET", "/v1/files?x=%20")).json() == {"data": [], "own": 1}
            assert one.seen[-1].start == "GET /v1/files?x=%20 HTTP/1.1"
        async with Running(controller("a", one.url), controller("b", one.url), endpoints=["objects"]) as server:
            assert (await ask(server, "GET", "/v1/assistants?before=x")).json() == {"data": [], "own": 1}


async def test_the_limits_of_a_key_hold_for_lists() -> None:
    """A merged list counts as a request of its client."""
    keys = [{"key": "alice-key-123456", "limits": {"rpm": 1}}]
    async with Upstream(listing([])) as one:
        both = controller("a", one.url), controller("b", one.url)
        async with Running(*both, endpoints=["objects"], client_keys=keys) as server:
            for status in (200, 429):
                client = await server.open()
                await client.send(b"GET /v1/files HTTP/1.1\r\nHost: localhost\r\napi-key: alice-key-123456\r\n\r\n")
                assert (await client.read()).status == status
                client.close()


async def test_an_object_that_cannot_be_named_is_left_out() -> None:
    """Half a surrogate pair, a line end or nothing is no id to go on behind: such a page ends no list."""
    ids = ["file-1", "\ud800", "a\r\nb", ""]
    page = {"object": "list", "data": [{"id": name, "created_at": 9} for name in ids], "has_more": True}
    other = {"object": "list", "data": [{"id": "file-%d" % n, "created_at": n} for n in (2, 3)], "has_more": True}
    async with Upstream(answers(json_reply(200, page))) as one, Upstream(answers(json_reply(200, other))) as two:
        async with Running(controller("a", one.url), controller("b", two.url), endpoints=["objects"]) as server:
            found = (await ask(server, "GET", "/v1/files")).json()
            assert found["data"] == [{"id": "file-1", "created_at": 9}] and found["last_id"] == "file-1"
            assert (await ask(server, "GET", "/v1/files?after=file-1")).status == 200
            assert one.seen[-1].start == "GET /v1/files?after=file-1 HTTP/1.1"


def test_a_time_that_is_none_does_not_spoil_the_order() -> None:
    """What is no number, or none that can be compared, counts as 0: behind all others in a list of the newest."""
    words = [b"NaN", b"3", b"null", b"Infinity", b"1e999", b'"9"', b"5", b"-Infinity", b"4.5", b"1" + b"0" * 400]
    items = [json.loads(b'{"id": "x", "created_at": %b}' % word) for word in words]
    shown, more = app.merge_pages({"a": (items, False)}, 0, True)
    times = [item["created_at"] for item, _ in shown]
    assert times[:4] == [10**400, 5, 4.5, 3] and len(times) == 10 and not more


async def test_a_head_of_an_object_has_no_length_of_our_making() -> None:
    """What the upstream's GET would bring is not known: to say 0 would be a lie."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    async with Upstream(answers(head)) as one, Running(controller("a", one.url), endpoints=["objects"]) as server:
        client = await server.open()
        for _ in range(2):
            await client.send(request(b"", target="/v1/files/a", method="HEAD"))
            found = await client.read(head_only=True)
            assert found.status == 200 and "content-length" not in found.headers
        await client.send(request(b"", target="/status", method="HEAD"))
        assert (await client.read(head_only=True)).headers["content-length"] == "15"
        client.close()


def test_memory_of_pages_is_bounded() -> None:
    """What was put in last stays."""
    memory = {}
    for number in range(10):
        app.keep(memory, number % 4, number, 3)
    assert memory == {3: 7, 0: 8, 1: 9}


@pytest.mark.parametrize("last", [error_reply(500), error_reply(409)])
async def test_what_may_have_run_is_answered_with_its_own_words(last: bytes) -> None:
    """A 429 from before it would have the client send again what may have made a file."""
    async with Upstream(answers(error_reply(429))) as busy, Upstream(answers(last)) as one:
        async with Running(controller("a", busy.url), controller("b", one.url), endpoints=["objects"]) as server:
            found = await ask(server, "POST", "/v1/vector_stores", {"name": "x"})
            assert found.status == int(last[9:12]) and found.headers["x-apiserver-controller"] == "b"
            assert "retry-after-ms" not in found.headers and found.headers["x-apiserver-attempts"] == "2"


async def test_models_behind_a_pattern_are_listed_as_the_account_has_them() -> None:
    """An account whose models are patterns is asked, and shows what they let through; a client key sees its own."""
    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("gpt-x", "gpt-y", "other")]}
    keys = [{"name": "bob", "key": "bob-key-of-some-length", "models": ["gpt-y"]}]

    async def models(server: Running, *headers: str) -> list[str]:
        client = await server.open()
        await client.send(request(b"", *headers, target="/v1/models", method="GET"))
        found = await client.read()
        client.close()
        return [one["id"] for one in found.json()["data"]]

    async with Upstream(answers(json_reply(200, listed))) as one:
        account = controller("a", one.url, models=["gpt-*"])
        async with Running(account) as server:
            assert await models(server) == ["gpt-x", "gpt-y"]
            assert (await ask(server, "GET", "/v1/models/gpt-x")).json()["id"] == "gpt-x"
        async with Running(account, client_keys=keys) as server:
            assert await models(server, "Authorization: Bearer bob-key-of-some-length") == ["gpt-y"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_account_that_has_no_such_list_is_left_out(method: str) -> None:
    """Azure keeps no list of chats; HEAD asks as GET does."""
    listed = {"object": "list", "data": [{"id": "chat_1", "created": 1}], "has_more": False}
    azure = {"type": "azure", "name": "z", "config": {"api_key": "k-of-some-length"}}
    async with Upstream(answers(json_reply(200, listed))) as one:
        azure["config"] = {"api_key": "k-of-some-length", "base_url": one.url.removesuffix("/v1")}
        async with Running(controller("a", one.url), azure, endpoints=["objects"]) as server:
            client = await server.open()
            await client.send(wire(method, "/v1/chat/completions"))
            found = await client.read(head_only=method == "HEAD")
            assert found.status == 200 and (method == "HEAD" or [x["id"] for x in found.json()["data"]] == ["chat_1"])
            client.close()
