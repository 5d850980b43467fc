"""What an account gets to see of a request, and what is refused before anything is sent."""

import asyncio
import json
from typing import Any

import pytest

import chatgpt_apiserver as app

MESSAGES = [{"role": "user", "content": "hello world"}]


def controller(account: "dict[str, Any] | None" = None, **more: Any) -> app.OpenAIController:
    """An openai controller as a configuration makes it."""
    base = {"api_key": "sk-test-key-0000", "base_url": "https://up.example/v1"}
    one = dict({"type": "openai", "config": dict(base, **(account or {}))}, **more)
    config = app.parse_config({"controllers": [one]}, "c.json", {}).controllers[0]
    made = app.CONTROLLERS[config.type](config)
    assert isinstance(made, app.OpenAIController)
    return made


def request(data: "dict[str, Any] | None" = None, lines: bytes = b"", **more: Any) -> app.ApiRequest:
    """A chat request as the server hands it over."""
    data = {"model": "m", "messages": MESSAGES} if data is None else data
    body = json.dumps(data).encode()
    made = app.ApiRequest("POST", "/chat/completions", "", lines, body)
    made.data, made.model, made.stream = data, data.get("model", ""), bool(data.get("stream"))
    for name, value in more.items():
        setattr(made, name, value)
    return made


def head_of(one: app.OpenAIController, asked: app.ApiRequest) -> list[bytes]:
    """The lines of the message's head."""
    head, _ = one.message(asked)
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].split(b"\r\n")


def test_message() -> None:
    """Prefix, our own fields, the client's, the length; and the body as it came."""
    one = controller({"organization": "org-1", "project": "proj-1"})
    asked = request(lines=b"Content-Type: application/json\r\nX-A: b\r\n")
    for _ in range(2):
        assert head_of(one, asked) == [
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
        assert one.message(asked)[1] == asked.body


@pytest.mark.parametrize(
    ("base_url", "line", "host"),
    [
        ("http://up.example", b"POST /chat/completions HTTP/1.1", b"Host: up.example"),
        ("http://up.example:8080/", b"POST /chat/completions HTTP/1.1", b"Host: up.example:8080"),
        ("http://up.example:80/a/b/", b"POST /a/b/chat/completions HTTP/1.1", b"Host: up.example"),
        ("https://up.example:443/v1", b"POST /v1/chat/completions HTTP/1.1", b"Host: up.example"),
        ("http://[::1]:9/v1", b"POST /v1/chat/completions HTTP/1.1", b"Host: [::1]:9"),
    ],
)
def test_base_urls(base_url: str, line: bytes, host: bytes) -> None:
    """Any base URL, with a path or without, gives one target and one Host."""
    assert head_of(controller({"base_url": base_url}), request())[:2] == [line, host]


def test_query_and_get() -> None:
    """A query goes along; a GET without a body has no length."""
    one = controller()
    asked = request(method="GET", path="/models", query="a=b&c", body=b"")
    assert head_of(one, asked)[0] == b"GET /v1/models?a=b&c HTTP/1.1"
    assert not any(line.lower().startswith(b"content-length") for line in head_of(one, asked))


def test_configured_headers_override() -> None:
    """A configured header replaces ours and the client's, whatever its case."""
    one = controller({"headers": {"authorization": "Basic x", "X-Own": "mine"}})
    lines = head_of(one, request(lines=b"x-own: theirs\r\nX-Else: 1\r\n"))
    assert [line for line in lines if line.lower().startswith((b"authorization", b"x-own"))] == [
        b"authorization: Basic x",
        b"X-Own: mine",
    ]
    assert b"X-Else: 1" in lines


def test_plain_proxy_gets_the_absolute_form() -> None:
    """By a proxy, plain HTTP names the origin in full and carries the proxy's credentials."""
    one = controller({"base_url": "http://up.example:81/v1", "proxy": "http://us%40er:p%3Aw@proxy:3128"})
    lines = head_of(one, request())
    assert lines[0] == b"POST http://up.example:81/v1/chat/completions HTTP/1.1"
    assert b"Host: up.example:81" in lines
    assert b"Proxy-Authorization: Basic dXNAZXI6cDp3" in lines


def test_tunnelled_proxy_stays_out_of_the_message() -> None:
    """By a tunnel, the upstream sees nothing of the proxy."""
    head, _ = controller({"proxy": "http://user:word@proxy:3128"}).message(request())
    assert head.startswith(b"POST /v1/")
    assert b"proxy" not in head.lower()


def test_model_map() -> None:
    """A mapped model is changed in the body, with its length; others go as they came."""
    one = controller(model_map={"fast": "gpt-4.1-mini"})
    asked = request({"model": "fast", "messages": MESSAGES})
    head, body = one.message(asked)
    assert json.loads(body) == {"model": "gpt-4.1-mini", "messages": MESSAGES}
    assert b"Content-Length: %d\r\n" % len(body) in head
    assert one.message(request())[1] == request().body


def test_replace_model_changes_every_one() -> None:
    """Where the model stands twice both become the new one, so that no reader sees the alias."""
    assert app.replace_model(b'{"model":"fast","model":"fast"}', "gpt") == b'{"model":"gpt","model":"gpt"}'


def test_bodies_in_utf_16_are_refused() -> None:
    """JSON between systems is UTF-8."""
    with pytest.raises(app.ProxyError, match="UTF-8"):
        app.parse_chat('{"model":"m","messages":[{}]}'.encode("utf-16"))


@pytest.mark.parametrize(
    ("account", "line"),
    [
        ({"auth_header": "api-key", "auth_scheme": ""}, b"api-key: sk-test-key-0000"),
        ({"auth_scheme": "Key"}, b"Authorization: Key sk-test-key-0000"),
        ({"auth_header": "X-Goog-Api-Key", "auth_scheme": ""}, b"X-Goog-Api-Key: sk-test-key-0000"),
    ],
)
def test_where_the_key_goes(account: dict[str, Any], line: bytes) -> None:
    """Header and scheme are the configuration's; a client cannot add a second value."""
    lines = head_of(controller(account), request(lines=b"x-goog-api-key: theirs\r\nX-A: b\r\n"))
    assert lines[3] == line and b"X-A: b" in lines
    assert (b"x-goog-api-key: theirs" in lines) == (b"X-Goog" not in line)


def test_an_empty_key_is_not_sent() -> None:
    """A server without keys sees no empty header."""
    assert not any(b"uthoriz" in line for line in head_of(controller({"api_key": ""}), request()))


def test_chat_path() -> None:
    """The configured path takes the place of the chat's own, query or not, and of no other."""
    one = controller({"chat_path": "/chat"})
    assert head_of(one, request())[0] == b"POST /v1/chat HTTP/1.1"
    assert head_of(one, request(query="a=/chat/completions"))[0] == b"POST /v1/chat?a=/chat/completions HTTP/1.1"
    assert head_of(one, request(path="/embeddings"))[0] == b"POST /v1/embeddings HTTP/1.1"


PARAMS = {"drop_params": ["user", "seed"], "rename_params": {"max_completion_tokens": "max_tokens"}}


def edited(account: dict[str, Any], body: bytes, **more: Any) -> bytes:
    """What an account gets of a body."""
    head, sent = controller(account, **more).message(request(json.loads(body), body=body))
    assert head.endswith(b"\r\nContent-Length: %d\r\n\r\n" % len(sent))
    return sent


@pytest.mark.parametrize(
    ("account", "body", "sent"),
    [
        (PARAMS, b'{"model" : "m","user":"u", "messages":[]}', b'{"model" : "m", "messages":[]}'),
        (PARAMS, b'{"user":"u","model":"m","messages":[],"seed":1}', b'{"model":"m","messages":[]}'),
        (PARAMS, b'{ "max_completion_tokens": 1e1 ,"model":"m"}', b'{ "max_tokens": 1e1 ,"model":"m"}'),
        (PARAMS, b'{"max_tokens":1,"max_completion_tokens":2}', b'{"max_tokens":2}'),
        (PARAMS, b'{"max_completion_tokens":2,"max_tokens":1}', b'{"max_tokens":2}'),
        (PARAMS, b'{"a":"\\ud800","seed":[{"seed":"}"}],"b":1.0}', b'{"a":"\\ud800","b":1.0}'),
        ({"rename_params": {"a": "b", "b": "a"}}, b'{"a":1,"b":2}', b'{"b":1,"a":2}'),
        ({"extra_body": {"top_k": 5}}, b'{"model":"m"}', b'{"model":"m","top_k":5}'),
        ({"extra_body": {"top_k": 5}}, b'{"top_k":1,"model":"m"}\n', b'{"model":"m","top_k":5}\n'),
        ({"extra_body": {"b": None}, "rename_params": {"a": "b"}}, b'{"a":1,"c":2}', b'{"c":2,"b":null}'),
        ({"drop_params": ["a"], "extra_body": {"a": {"x": "\u00e9"}}}, b'{"a":1}', b'{"a":{"x": "\\u00e9"}}'),
        ({"drop_params": ["a"]}, b'{"a":1}', b"{}"),
    ],
)
def test_edited_params(account: dict[str, Any], body: bytes, sent: bytes) -> None:
    """Outermost keys are left out, renamed, added in this order; every other byte stays."""
    assert edited(account, body) == sent


@pytest.mark.parametrize("body", [b'{"model": "m",  "messages":[{"user":1}]}', b'{"x":{"max_completion_tokens":1}}'])
def test_bodies_that_no_edit_means_go_as_they_came(body: bytes) -> None:
    """Inner keys are no params, and the body is handed on as the very same object."""
    asked = request(json.loads(body), body=body)
    assert controller(PARAMS).message(asked)[1] is asked.body


def test_only_chats_get_the_extra_body() -> None:
    """Other calls have other parameters; what is dropped and renamed is so there, too."""
    one = controller({"extra_body": {"top_k": 5}, "drop_params": ["user"]})
    body = b'{"model":"m","input":"x","user":"u"}'
    _, sent = one.message(request(json.loads(body), body=body, path="/embeddings"))
    assert sent == b'{"model":"m","input":"x"}'


@pytest.mark.parametrize("long", ["a", "model-with-a-longer-name"])
def test_another_model_in_a_form(long: str) -> None:
    """A model that stands in takes its place in a multipart body, and a mapped one its place in turn."""
    body = b"--b\r\nfast\r\n--b--"
    asked = request({}, body=body, path="/audio/speech", model="fast", model_span=(5, 9))
    asked.substitute(long)
    assert (asked.asked, asked.model, asked.body) == ("fast", long, body.replace(b"fast", long.encode()))
    assert controller(model_map={long: "m-2"}).message(asked)[1] == body.replace(b"fast", b"m-2")


def test_edits_and_a_mapped_model() -> None:
    """Both apply to one body."""
    sent = edited(PARAMS, b'{"model":"fast","user":"u"}', model_map={"fast": "slow"})
    assert sent == b'{"model":"slow"}'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"messages":[{"model":"no","content":"\\"model\\":\\"x\\""}],', b""),
        ('"a" : "grüße ☃ 😀 \\u00e9 \\ud800",\r\n\t'.encode(), b' , "b":1.50e+3, "c":[ ] }  \n'),
        (b'"z":{"model":{"model":1}}, ', b',"metadata":{"model":"no"}'),
        (b'"n":null,"t":true,"f":-0.0,"s":"}{",', b',"x":"\x7f"'),
    ],
)
def test_replace_model_leaves_every_other_byte(before: bytes, after: bytes) -> None:
    """Only the value of the outermost model is another one afterwards."""
    tail = after if after.rstrip().endswith(b"] }") else after + b"}"
    wire = b" {" + before + b'"model" :\n%b' + tail
    assert app.replace_model(wire.replace(b"%b", b'"old\\n\\u0041"'), 'n"ew') == wire.replace(b"%b", b'"n\\"ew"')


def test_chat_body_goes_as_it_came() -> None:
    """A good body is handed on byte by byte."""
    body = b' {"messages": [ {"role":"user","content":"\\u00e9"} ], "model":"m", "new_key": 1.0}\n'
    data, sent = app.parse_chat(body)
    assert sent is body
    assert data["model"] == "m"


def test_respell_for_go_clients() -> None:
    """Keys that Go capitalises are put right, in messages too; unknown keys and values stay."""
    body = b'{"Model":"M","Messages":[{"Role":"user","Content":"Hi"}],"Stream":true,"Max_Tokens":3,"Odd":{"Model":1}}'
    data, sent = app.parse_chat(body)
    assert data == {
        "model": "M",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 3,
        "Odd": {"Model": 1},
    }
    assert json.loads(sent) == data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff",
        b"{}",
        b'{"model":"m"}',
        b'{"messages":[{}]}',
        b'{"model":"","messages":[{}]}',
        b'{"model":1,"messages":[{}]}',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":{}}',
        b'{"model":"m","messages":["x"]}',
        b'{"model":"m","messages":[{}],"stream":"yes"}',
        b'{"model":"m","messages":[{}],"stream":1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model":"m","messages":[{}],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","messages":[{}],"x":' + b"9" * 5000 + b"}",
    ],
    ids=lambda value: repr(value[:64]),
)
def test_refused_bodies(body: bytes) -> None:
    """What no upstream could answer is the client's fault."""
    with pytest.raises(app.ProxyError) as caught:
        app.parse_chat(body)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[{}],"model":"m"}',
        b'{"model":"other","messages":[{"model":"x"}],"model":"m"}',
        b'{"messages":[{}],"model":"other","\\u006dodel":"m"}',
        b'{"model":"m","messages":[{}],"Model":"other"}',
        b'{"model":"m","messages":[{}],"MODEL":"other"}',
    ],
)
def test_restricted_keys_cannot_name_two_models(body: bytes) -> None:
    """For a key that may use some models only, what two readers could read differently is refused."""
    key = app.ClientKey("alice", b"", ("m",))
    data, sent = app.parse_chat(body)
    with pytest.raises(app.ProxyError) as caught:
        app.check_model_allowed(key, data["model"], sent)
    assert caught.value.status == 400


def test_brackets_in_strings_do_not_nest() -> None:
    """Brackets in strings and side by side do not nest."""
    content = json.dumps("[{" * 500 + '"\\')
    body = b'{"model":"m","messages":[{"role":"user","content":%b}],"x":[%b]}' % (
        content.encode(),
        b",".join([b"[]"] * 500),
    )
    app.parse_chat(body)


def test_model_may_stand_elsewhere() -> None:
    """Only the outermost model counts."""
    app.parse_chat(b'{"model":"m","messages":[{"model":"x"}],"metadata":{"model":"y"}}')


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        ("x" * 400, 100),
        (None, 0),
        ([{"type": "text", "text": "x" * 40}], 10),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}], 1000),
        ([{"type": "text", "text": "xxxx"}, {"type": "file"}, {"type": "input_audio"}, {"type": "?"}], 3001),
    ],
)
def test_estimate_prompt(content: Any, tokens: int) -> None:
    """Characters / 4 and 1,000 for each other part, however long its data."""
    assert app.estimate_prompt({"messages": [{"role": "user", "content": content}]}) == tokens


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        ({}, 0),
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 20, "max_tokens": 10}, 20),
        ({"max_tokens": 10, "n": 3}, 30),
        ({"max_tokens": -10}, 0),
        ({"max_tokens": 10, "n": -3}, 10),
        ({"max_tokens": "10"}, 0),
        ({"max_tokens": None, "n": None}, 0),
        ({"max_tokens": 1, "n": 10**9}, 128),
    ],
)
def test_answer_limit(data: dict[str, Any], tokens: int) -> None:
    """The bound that the client sets, times the answers that it wants; nonsense counts as none."""
    assert app.answer_limit(data) == tokens


CHAT = "/chat/completions"
AZURE = "https://r.openai.azure.com"


@pytest.mark.parametrize(
    ("account", "path", "target"),
    [
        ({}, CHAT, "/openai/deployments/gpt%204%2F1/chat/completions?api-version=2024-10-21"),
        ({"api_version": "v-preview"}, CHAT, "/openai/deployments/gpt%204%2F1/chat/completions?api-version=v-preview"),
        (
            {"base_url": AZURE + "/openai/"},
            "/embeddings?api-version=1&a=b",
            "/openai/deployments/gpt%204%2F1/embeddings?a=b&api-version=2024-10-21",
        ),
        ({"base_url": "https://g.example/t"}, "/files?limit=2", "/t/openai/files?limit=2&api-version=2024-10-21"),
        ({"base_url": AZURE + "/openai/v1"}, CHAT, "/openai/v1/chat/completions"),
        (
            {"base_url": AZURE + "/openai/v1/", "api_version": "preview"},
            "/responses",
            "/openai/v1/responses?api-version=preview",
        ),
        ({"base_url": AZURE + "/openai/v1"}, "/files?limit=2", "/openai/v1/files?limit=2"),
    ],
)
def test_azure_targets(account: dict[str, Any], path: str, target: str) -> None:
    """The classic surface names deployment and version, the newer one neither; the version is never the client's."""
    one = controller({"base_url": AZURE, **account}, type="azure", model_map={"m": "gpt 4/1"})
    path, _, query = path.partition("?")
    asked = request(path=path, query=query)
    assert head_of(one, asked)[0] == f"POST {target} HTTP/1.1".encode()
    assert json.loads(one.message(asked)[1])["model"] == "gpt 4/1"


@pytest.mark.parametrize("model", [".", ".."])
def test_azure_paths_stay_below_the_deployments(model: str) -> None:
    """A model cannot lead to another path of the resource."""
    with pytest.raises(app.Untranslatable, match="model"):
        controller({"base_url": AZURE}, type="azure").message(request({"model": model, "messages": MESSAGES}))


@pytest.mark.parametrize(
    ("account", "line"),
    [
        ({}, b"api-key: sk-test-key-0000"),
        ({"auth_header": "Authorization"}, b"Authorization: Bearer sk-test-key-0000"),
        ({"auth_header": "Ocp-Apim-Subscription-Key", "auth_scheme": ""}, b"Ocp-Apim-Subscription-Key: sk-test-key-0000"),
    ],
)
def test_azure_keys(account: dict[str, Any], line: bytes) -> None:
    """A key has a header of its own; an Entra token is a bearer; a gateway may want another header."""
    assert head_of(controller({"base_url": AZURE, **account}, type="azure"), request())[3] == line


async def echo(data: dict[str, Any]) -> tuple[list[bytes], list[str], app.ResponseHead]:
    """Everything that an echo controller answers, and how often it said that the request was sent."""
    config = app.parse_config({"controllers": [{"type": "echo"}]}, "c.json", {}).controllers[0]
    sent: list[str] = []
    asked = request(data, request_id="r1", prompt_tokens=3)
    pool = app.ConnectionPool(app.Outbox(asyncio.get_running_loop()))
    exchange = app.EchoController(config).exchange(asked, pool, lambda now: sent.append("sent"))
    assert sent == []
    await exchange.start()
    pieces = []
    while piece := await exchange.read():
        pieces.append(piece)
    exchange.interrupt(app.UpstreamTimeout("x"))
    for _ in range(2):
        exchange.finish()
        exchange.abort()
    return pieces, sent, exchange.head


async def test_echo_whole() -> None:
    """The last user message comes back, with usage."""
    messages = [*MESSAGES, {"role": "assistant", "content": "no"}]
    pieces, sent, head = await echo({"model": "m", "messages": messages})
    found = json.loads(b"".join(pieces))
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (found["object"], found["model"], found["id"]) == ("chat.completion", "m", "chatcmpl-echo-r1")
    assert sent == ["sent"]
    assert head.index[b"content-type"] == b"application/json"


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("text", ["hello  world\n", "", " x", "ünd ☃"])
async def test_echo_stream(text: str, usage: bool) -> None:
    """Word by word: role, words, finish, usage on request, [DONE]."""
    data = {"model": "m", "stream": True, "messages": [{"role": "user", "content": text}]}
    if usage:
        data["stream_options"] = {"include_usage": True}
    pieces, _, head = await echo(data)
    assert head.index[b"content-type"].startswith(b"text/event-stream")
    events = list(app.EventSplitter().feed(b"".join(pieces)))
    assert events == pieces
    assert pieces[-1] == b"data: [DONE]\n\n"
    chunks = [json.loads(piece[6:]) for piece in pieces[:-1]]
    assert (chunks.pop()["usage"] is not None) if usage else all("usage" not in one for one in chunks)
    deltas = [one["choices"][0]["delta"] for one in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert [one["choices"][0]["finish_reason"] for one in chunks] == [None] * (len(chunks) - 1) + ["stop"]


async def test_echo_takes_parts() -> None:
    """Text parts are echoed, others are skipped."""
    content = [{"type": "text", "text": "a b"}, {"type": "image_url", "image_url": {"url": "u"}}]
    pieces, _, _ = await echo({"model": "m", "messages": [{"role": "user", "content": content}]})
    assert json.loads(pieces[0])["choices"][0]["message"]["content"] == "a b"


@pytest.mark.parametrize("content", [5, True, {"text": "x"}])
async def test_echo_of_nonsense(content: Any) -> None:
    """Content that is neither text nor parts is echoed as it prints: it is no error of ours."""
    pieces, _, _ = await echo({"model": "m", "messages": [{"role": "user", "content": content}]})
    assert json.loads(pieces[0])["choices"][0]["message"]["content"] == str(content)


def test_a_capitalised_stream_alone_is_respelled() -> None:
    """`Stream` beside lower-case keys asks for a stream too."""
    data, body = app.parse_chat(b'{"model":"m","messages":[{"role":"user"}],"Stream":true}')
    assert data["stream"] is True and json.loads(body)["stream"] is True
