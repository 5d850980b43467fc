"""What an account gets of a request, and what is refused before anything is sent."""

import json
import mmap
import tempfile
from typing import Any, cast

import pytest

import chatgpt_apiserver as app

from . import support
from .support import ANSWER, Running, Upstream, answers, json_reply

MESSAGES = [{"role": "user", "content": "hello world"}]
CHAT = "/chat/completions"
AZURE = "https://r.openai.azure.com"
DEPLOYMENT = "/openai/deployments/gpt%204%2F1"
PROXIED = {"base_url": "http://up.example:81/v1", "proxy": "http://us%40er:p%3Aw@proxy:3128"}


def controller(account: dict[str, Any] | None = None, **more: Any) -> app.OpenAIController:
    """Return a controller as a configuration makes it."""
    base = {"api_key": "sk-test-key-0000", "base_url": "https://up.example/v1"}
    section = {"type": "openai", "config": {**base, **(account or {})}, **more}
    config = app.parse_config({"controllers": [section]}, "c.json", {}).controllers[0]
    return cast(app.OpenAIController, app.CONTROLLERS[config.type](config))


def request(data: dict[str, Any] | None = None, lines: bytes = b"", **more: Any) -> app.ApiRequest:
    """Return a chat request as the server makes it."""
    data = {"model": "m", "messages": MESSAGES} if data is None else data
    made = app.ApiRequest("POST", CHAT, "", lines, json.dumps(data).encode(), data=data, model=data.get("model", ""))
    made.stream = bool(data.get("stream"))
    for name, value in more.items():
        setattr(made, name, value)
    return made


def split(account: app.OpenAIController, asked: app.ApiRequest) -> tuple[list[bytes], bytes]:
    """Return the lines of the head and the body that the account gets."""
    message = b"".join(account.message(asked))
    head, _, body = message.partition(b"\r\n\r\n")
    if body:
        assert b"\r\nContent-Length: %d" % len(body) in head
    return head.split(b"\r\n"), body


def body_for(body: bytes, account: dict[str, Any] | None = None, **more: Any) -> bytes:
    """Return what an account makes of a JSON body."""
    path = more.pop("path", CHAT)
    return split(controller(account, **more), request(json.loads(body), body=body, path=path))[1]


def test_message() -> None:
    """An account gets the request line, its own header lines, the client's, the length (not for a GET) and the body as it came."""
    asked = request(lines=b"Content-Type: application/json\r\nX-A: b\r\n")
    lines, body = split(controller({"organization": "org-1", "project": "proj-1"}), asked)
    assert body == asked.body and lines == [
        b"POST /v1/chat/completions HTTP/1.1",
        b"Host: up.example",
        b"Accept-Encoding: identity",
        b"Authorization: Bearer sk-test-key-0000",
        b"OpenAI-Organization: org-1",
        b"OpenAI-Project: proj-1",
        b"Content-Type: application/json",
        b"X-A: b",
        b"Content-Length: %d" % len(asked.body),
    ]
    for method, lengths in (("GET", []), ("DELETE", [b"Content-Length: 0"])):
        lines, _ = split(controller(), request({}, method=method, path="/models", body=b""))
        assert [line for line in lines if line.lower().startswith(b"content-length")] == lengths


@pytest.mark.parametrize(
    ("account", "asked", "target", "host"),
    [
        ({"base_url": "http://up.example"}, {}, "/chat/completions", "up.example"),
        ({"base_url": "http://up.example:80/a/b/"}, {}, "/a/b/chat/completions", "up.example"),
        ({"base_url": "https://up.example:443/v1"}, {}, "/v1/chat/completions", "up.example"),
        ({"base_url": "http://[::1]:9/v1"}, {}, "/v1/chat/completions", "[::1]:9"),
        ({}, {"path": "/models", "query": "a=b&c"}, "/v1/models?a=b&c", "up.example"),
        ({"chat_path": "/chat"}, {"query": "a=/chat/completions"}, "/v1/chat?a=/chat/completions", "up.example"),
        ({"chat_path": "/chat"}, {"path": "/embeddings"}, "/v1/embeddings", "up.example"),
        # A proxy gets plain HTTP in absolute form; a tunnel for TLS shows nothing of the proxy.
        (PROXIED, {}, "http://up.example:81/v1/chat/completions", "up.example:81"),
        ({"proxy": "http://user:word@proxy:3128"}, {}, "/v1/chat/completions", "up.example"),
    ],
)
def test_targets(account: dict[str, Any], asked: dict[str, Any], target: str, host: str) -> None:
    """Base URL, path and query make one target and one Host; only a plain proxy gets its password."""
    lines, _ = split(controller(account), request(**asked))
    assert lines[:2] == [f"POST {target} HTTP/1.1".encode(), f"Host: {host}".encode()]
    assert (b"Proxy-Authorization: Basic dXNAZXI6cDp3" in lines) == target.startswith("http:")


@pytest.mark.parametrize(
    ("account", "line"),
    [
        ({"auth_header": "api-key", "auth_scheme": ""}, b"api-key: sk-test-key-0000"),
        ({"auth_scheme": "Key"}, b"Authorization: Key sk-test-key-0000"),
        ({"auth_header": "X-Goog-Api-Key", "auth_scheme": ""}, b"X-Goog-Api-Key: sk-test-key-0000"),
        ({"api_key": ""}, b"x-goog-api-key: theirs"),
        ({"headers": {"authorization": "Basic x", "X-A": "mine"}}, b"authorization: Basic x"),
        ({"api_key": "of-azure", "auth_header": "Authorization"}, b"Authorization: Bearer of-azure"),
    ],
)
def test_where_the_key_goes(account: dict[str, Any], line: bytes) -> None:
    """Header and scheme are configured, an empty key is not sent; a client cannot send a configured header again."""
    more = {"type": "azure"} if line.endswith(b"of-azure") else {}
    lines, _ = split(controller(account, **more), request(lines=b"x-goog-api-key: theirs\r\nx-a: b\r\n"))
    assert lines[3] == line
    assert (b"x-goog-api-key: theirs" in lines) == (b"X-Goog" not in line)
    assert [b"X-A: mine" if "headers" in account else b"x-a: b"] == [a for a in lines if a[:4].lower() == b"x-a:"]


@pytest.mark.parametrize(
    ("account", "path", "target"),
    [
        ({}, CHAT, DEPLOYMENT + "/chat/completions?api-version=2024-10-21"),
        ({"api_version": "v-preview"}, CHAT, DEPLOYMENT + "/chat/completions?api-version=v-preview"),
        ({}, "/embeddings?api-version=1&a=b", DEPLOYMENT + "/embeddings?a=b&api-version=2024-10-21"),
        ({"base_url": AZURE + "/openai/"}, "/files", "/openai/files?api-version=2024-10-21"),
        ({"base_url": "https://g.example/t"}, "/files?limit=2", "/t/openai/files?limit=2&api-version=2024-10-21"),
        ({"base_url": AZURE + "/openai/v1"}, CHAT, "/openai/v1/chat/completions"),
        ({"base_url": AZURE + "/openai/v1/", "api_version": "preview"}, "/x", "/openai/v1/x?api-version=preview"),
    ],
)
def test_azure_targets(account: dict[str, Any], path: str, target: str) -> None:
    """The classic API has deployment and version in the path, the newer one neither; a client's version is dropped."""
    account = {"base_url": AZURE, **account}
    path, _, query = path.partition("?")
    lines, body = split(controller(account, type="azure", model_map={"m": "gpt 4/1"}), request(path=path, query=query))
    assert lines[0] == f"POST {target} HTTP/1.1".encode() and lines[3] == b"api-key: sk-test-key-0000"
    assert json.loads(body)["model"] == "gpt 4/1"


@pytest.mark.parametrize("model", [".", ".."])
def test_azure_paths_stay_below_the_deployments(model: str) -> None:
    """A model cannot lead to another path of the resource."""
    with pytest.raises(app.Untranslatable, match="model"):
        controller({"base_url": AZURE}, type="azure").message(request({"model": model, "messages": MESSAGES}))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"messages":[{"content":"\\"model\\":\\"x\\""}],', b"}"),
        ('"a" : "grüße ☃ 😀 \\u00e9 \\ud800",\r\n\t'.encode(), b' , "b":1.50e+3, "c":[ ] }  \n'),
        (b'"n":null,"t":true,"f":-0.0,"s":"}{",', b',"x":"\x7f"}'),
    ],
)
def test_a_mapped_model_leaves_every_other_byte(before: bytes, after: bytes) -> None:
    """Where the model's key stands once, only its value changes."""
    old, new = b'"old\\"\\u0041"', b'"n\\"ew\\\\1"'
    body = b" {" + before + b'"model" :\n' + old + after
    assert body_for(body, model_map={'old"A': 'n"ew\\1'}) == body.replace(old, new)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"no","model":"fast","messages":[]}',
        b'{"messages":[{"model":"fast"}],"model":"fast"}',
        b'{"\\u006dodel":"fast","messages":[{"model":"fast"}]}',
    ],
)
def test_a_mapped_model_where_its_key_stands_twice(body: bytes) -> None:
    """Only the outermost model is another one, and it stands there once."""
    sent = body_for(body, model_map={"fast": "gpt"})
    assert json.loads(sent) == {**json.loads(body), "model": "gpt"} and sent.count(b'"gpt"') == 1


PARAMS = {"drop_params": ["user", "seed"], "rename_params": {"max_completion_tokens": "max_tokens"}}


@pytest.mark.parametrize(
    ("account", "body", "sent"),
    [
        (PARAMS, {"model": "fast", "user": "u", "a": [], "seed": 1}, {"model": "slow", "a": []}),
        (PARAMS, {"max_completion_tokens": 2.0}, {"max_tokens": 2.0}),
        (PARAMS, {"max_tokens": 1, "max_completion_tokens": 2}, {"max_tokens": 2}),
        (PARAMS, {"max_completion_tokens": 2, "max_tokens": 1}, {"max_tokens": 2}),
        (PARAMS, {"seed": [{"seed": "}"}], "b": {"user": 1.0}}, {"b": {"user": 1.0}}),
        ({"rename_params": {"a": "b", "b": "a"}}, {"a": 1, "b": 2}, {"b": 1, "a": 2}),
        ({"extra_body": {"top_k": 5}}, {"top_k": 1, "model": "m"}, {"model": "m", "top_k": 5}),
        ({"extra_body": {"b": None}, "rename_params": {"a": "b"}}, {"a": 1, "c": 2}, {"c": 2, "b": None}),
        ({"drop_params": ["a"], "extra_body": {"a": {"x": "é"}}}, {"a": 1}, {"a": {"x": "é"}}),
        ({"drop_params": ["a"]}, {"a": 1}, {}),
        ({"extra_body": {"k": 5}, "drop_params": ["user"]}, {"input": "x", "user": "u"}, {"input": "x"}),  # no chat
    ],
)
def test_edited_parameters(account: dict[str, Any], body: dict[str, Any], sent: dict[str, Any]) -> None:
    """Outermost keys are dropped, renamed and added to chats, in this order; a mapped model goes along."""
    path = "/embeddings" if "input" in body else CHAT
    assert json.loads(body_for(json.dumps(body).encode(), account, model_map={"fast": "slow"}, path=path)) == sent


ASKED = b'"stream_options":{"include_usage":true}'


@pytest.mark.parametrize(
    ("account", "body", "sent"),
    [
        ({}, b' {"model": "m", "s":"}"}\n', b' {"model": "m", "s":"}",%b}' % ASKED),
        ({}, b'{"model":"fast"}', b'{"model":"slow",%b}' % ASKED),
        ({"drop_params": ["user"]}, b'{"a":1,"user":"u"}', b'{"a":1,%b}' % ASKED),
        ({}, b'{"stream_options":null}', b"{%b}" % ASKED),
        ({}, b'{"stream_options":{"x":1,"include_usage":false}}', b'{"stream_options":{"x":1,"include_usage":true}}'),
        ({}, b'{"stream_options":"x"}', b'{"stream_options":"x"}'),
        ({"drop_params": ["stream_options"]}, b'{"a": 1}', b'{"a": 1}'),
        ({"base_url": AZURE, "api_version": "2024-08-01-preview"}, b'{"a": 1}', b'{"a": 1}'),
        ({"base_url": AZURE}, b'{"a": 1}', b'{"a": 1,%b}' % ASKED),
    ],
)
def test_asking_for_usage(account: dict[str, Any], body: bytes, sent: bytes) -> None:
    """Where a limit counts tokens, a stream is asked for its usage, unless the account refuses that; other bytes stay."""
    kind = "azure" if "base_url" in account else "openai"
    made, data = controller(account, type=kind, model_map={"fast": "slow"}), json.loads(body)
    asked = request(data, body=body, model=data.get("model", "m"), stream=True, add_usage=True)
    assert split(made, asked)[1] == sent and made.reports_usage == (data == {"stream_options": "x"} or sent != body)


async def test_an_account_that_refuses_to_report_usage() -> None:
    """The client never sees that refusal: the request is sent without the parameter, now and from then on."""
    detail = {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs"}]}
    good = support.sse_reply(support.event("hi"), b"data: [DONE]\n\n")
    async with Upstream(answers(json_reply(422, detail), good, good)) as one:
        async with Running(support.controller("a", one.url, limits={"tpm": 100_000})) as server:
            for _ in range(2):
                assert b"hi" in (await server.post(stream=True)).body
        assert ["stream_options" in seen.json() for seen in one.seen] == [True, False, False]


@pytest.mark.parametrize("mapped", [False, True])
def test_another_model_in_a_form(mapped: bool) -> None:
    """The model of a fallback, or the name it is mapped to, replaces the model in a form, in memory or in a mapped file."""
    body = b"--b\r\nfast\r\n--b--"
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        form = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else body
        asked = request({}, body=form, path="/audio/transcriptions", model="fast", model_span=(5, 9))
        assert split(controller(), asked)[1] == body
        asked.substitute("longer-name")
        assert (asked.asked, asked.model) == ("fast", "longer-name")
        assert split(controller(), asked)[1] == body.replace(b"fast", b"longer-name")
        assert split(controller(model_map={"longer-name": "m-2"}), asked)[1] == body.replace(b"fast", b"m-2")


def test_a_chat_body_goes_as_it_came() -> None:
    """A good body is handed on byte by byte, whatever is in it; inner keys are not parameters."""
    for inner in (b'{"model": "m",  "messages":[{"user":1}]}', b'{"x":{"max_completion_tokens":1}}'):
        assert body_for(inner, PARAMS) == inner
    brackets = json.dumps("[{" * 500 + '"\\').encode()
    body = b' {"messages": [ {"content":%b,"model":"x"} ], "model":"m", "new_key": [%b1]}\n' % (brackets, b"[]," * 500)
    data, sent = app.parse_chat(body)
    assert sent is body and data["model"] == "m"
    assert app.parse_chat(b"\xef\xbb\xbf" + body)[0] == data


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b'"x"', b"null", b"\xff", b"{}", b'{"messages":[{}]}', b'{"model":"","messages":[{}]}'),
        *(b'{"model":1,"messages":[{}]}', b'{"model":"m","messages":{}}', b'{"model":"m","messages":[{}],"stream":1}'),
        b'{"model":"m","messages":[{}],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":[{}],"x":' + b"9" * 5000 + b"}",
        '{"model":"m","messages":[{}]}'.encode("utf-16"),
    ],
    ids=lambda value: repr(value[:64]),
)
def test_refused_bodies(body: bytes) -> None:
    """A body that no upstream could answer is a 400 with a short message."""
    with pytest.raises(app.ProxyError) as caught:
        app.parse_chat(body)
    assert caught.value.status == 400 and len(caught.value.message) < 300


@pytest.mark.parametrize("field", [b'"model":"other"', b'"\\u006dodel":"other"', b'"Model":"other"'])
@pytest.mark.parametrize("body", [b'{%b,"messages":[{"model":"x"}],"model":"m"}', b'{"model":"m","messages":[{}],%b}'])
async def test_restricted_keys_cannot_name_two_models(body: bytes, field: bytes) -> None:
    """With a client key that may use some models only, an upstream never reads another model than the one checked."""
    async with Upstream(answers(json_reply(200, ANSWER))) as upstream:
        keys = [{"name": "alice", "key": "sk-alice-0000", "models": ["m"]}]
        async with Running(support.controller("a", upstream.url), client_keys=keys) as server:
            reply = await server.ask("POST", "/v1" + CHAT, body % field, "Authorization: Bearer sk-alice-0000")
            assert reply.status in (200, 400, 403) and (reply.status == 200) == bool(upstream.seen)
        for seen in upstream.seen:
            pairs = json.loads(seen.body, object_pairs_hook=list)
            assert [value for name, value in pairs if name.lower() == "model"] == ["m"]


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        *(("x" * 400, 100), (None, 0), ([{"type": "text", "text": "x" * 40}], 10)),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}], 1000),
        ([{"type": "text", "text": "xxxx"}, {"type": "file"}, {"type": "input_audio"}, {"type": "?"}], 3001),
    ],
)
def test_estimate_prompt(content: Any, tokens: int) -> None:
    """A prompt counts a quarter of its characters, and 1,000 for each other part, however long its data."""
    assert app.estimate_prompt({"messages": [{"role": "user", "content": content}]}) == tokens


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        *(({}, 0), ({"max_tokens": -10}, 0), ({"max_tokens": "10"}, 0), ({"max_tokens": None, "n": None}, 0)),
        *(({"max_completion_tokens": 20, "max_tokens": 10}, 20), ({"max_tokens": 10, "n": 3}, 30)),
        *(({"max_tokens": 10, "n": -3}, 10), ({"max_tokens": 1, "n": 10**9}, 128)),
    ],
)
def test_answer_limit(data: dict[str, Any], tokens: int) -> None:
    """The client's limit times the number of answers; a limit that makes no sense counts as none."""
    assert app.answer_limit(data) == tokens


async def echo(content: Any, **more: Any) -> tuple[list[bytes], app.ResponseHead]:
    """Return all pieces that an echo controller answers, and the head."""
    config = app.parse_config({"controllers": [{"type": "echo"}]}, "c.json", {}).controllers[0]
    sent: list[float] = []
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    asked = request({"model": "m", "messages": messages, **more}, request_id="r1", prompt_tokens=3)
    pool = app.ConnectionPool()
    exchange = app.CONTROLLERS["echo"](config).exchange(asked, pool, sent.append)
    await exchange.start()
    assert len(sent) == 1
    pieces = []
    while piece := await exchange.read():
        pieces.append(piece)
    for _ in range(2):
        exchange.finish()
        exchange.abort()
    return pieces, exchange.head


PARTS = [{"type": "text", "text": "hello "}, {"type": "image_url", "image_url": {"url": "u"}}, {"text": "world"}]


@pytest.mark.parametrize(
    ("content", "text"), [("hello world", "hello world"), (PARTS, "hello world"), ({"text": "x y"}, "{'text': 'x y'}")]
)
async def test_echo_whole(content: Any, text: str) -> None:
    """The last user message comes back with usage; text parts are joined, other content is printed."""
    pieces, head = await echo(content)
    found, count = json.loads(b"".join(pieces)), len(text.split())
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    assert (found["object"], found["model"], found["id"]) == ("chat.completion", "m", "chatcmpl-echo-r1")
    assert head.index[b"content-type"] == b"application/json"


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("text", ["hello  world\n", "", " x", "ünd ☃"])
async def test_echo_stream(text: str, usage: bool) -> None:
    """A streamed echo has the role, each word, finish_reason, usage if the client asks for it, and [DONE]."""
    pieces, head = await echo(text, stream=True, stream_options={"include_usage": usage})
    assert head.index[b"content-type"].startswith(b"text/event-stream")
    assert list(app.EventSplitter().feed(b"".join(pieces))) == pieces
    assert pieces.pop() == b"data: [DONE]\n\n"
    chunks = [json.loads(piece[6:]) for piece in pieces]
    assert (chunks.pop()["usage"] is not None) if usage else all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_an_echo_controller_that_refuses() -> None:
    """It answers so many requests in a minute, and fails the share of requests that it is told to."""
    echo = {"type": "echo", "name": "e", "config": {"refuse_above": 2}}
    async with Running(echo, pool={"max_wait": 0}) as server:
        replies = [await server.post("m") for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert 58_000 < int(replies[2].headers["retry-after-ms"]) <= 60_001
    async with Running({**echo, "config": {"fail_share": 1.0}}) as server:
        assert (await server.post("m")).status == 500
