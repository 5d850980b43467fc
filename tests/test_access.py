"""Who may come in and what passes: client keys and their limits, doors, headers that never cross, nothing injected."""

import asyncio
import hashlib
import json
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    MESSAGES,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    error_reply,
    json_reply,
    request,
)
from .test_bounds import pause

KEY = "alice-key-123456"
WAYS = ("Authorization: Bearer %s", "authorization: bearer  %s ", "api-key: %s", "X-API-Key: %s")
GOOD = json_reply(200, ANSWER)


@pytest.mark.parametrize("stored", [KEY, "sha256:" + hashlib.sha256(KEY.encode()).hexdigest(), "$ALICE"])
async def test_a_key_however_it_is_stored_and_shown(stored: str) -> None:
    """A key is kept as its hash only, and found in each of the headers that SDKs use."""
    running = Running()
    data = {"port": 0, "controllers": app.demo_controllers(), "client_keys": [{"key": stored}]}
    running.config = app.parse_config(data, "test", {"ALICE": KEY})
    assert KEY not in str(vars(running.config.client_keys[0]))
    async with running as server:
        for way in WAYS:
            assert (await server.post("echo", way % KEY)).status == 200, way
            for wrong in (KEY + "x", KEY[:-1], KEY.upper(), "", "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()):
                found = await server.post("echo", way % wrong)
                assert found.status == 401, (way, wrong)
                assert sorted(found.json()["error"]) == ["code", "message", "param", "type"]
                assert found.json()["error"]["code"] == "invalid_api_key" and found.headers["www-authenticate"] == "Bearer"
        for lines in ([WAYS[0] % KEY] * 2, ["Authorization: Basic " + KEY], ["Authorization: " + KEY], ["Cookie: key=" + KEY], []):
            assert (await server.post("echo", *lines)).status == 401, lines


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key is compared, as a digest, by hmac's comparison, whichever matches."""
    compared: list[tuple[bytes, bytes]] = []
    same = app.same_digest
    monkeypatch.setattr(app, "same_digest", lambda *pair: compared.append(pair) or same(*pair))
    loop = asyncio.new_event_loop()
    keys = [{"key": "key-%d-0123456789" % number} for number in range(5)]
    server = app.Server(app.parse_config({"controllers": app.demo_controllers(), "client_keys": keys}, "test", {}), loop)
    for number in range(5):
        compared.clear()
        head = app.RequestHead("GET", "/", 1, {b"api-key": b"key-%d-0123456789" % number}, [])
        assert server.check_key(head).name == "key-%d" % (number + 1)
        assert len(compared) == 5 and {len(value) for pair in compared for value in pair} == {32}
    loop.close()


async def test_the_status_is_open_and_its_details_are_not() -> None:
    """With client keys /status answers anyone, and verbose=1 only who has one."""
    async with Running(client_keys=[{"key": KEY}]) as server:
        client = await server.open()
        for target, line, status in (
            ("/status", "X: 1", 200),
            ("/status?verbose=1", "X: 1", 401),
            ("/status?a=b&verbose=1", "api-key: x", 401),
            ("/status?verbose=1", "api-key: " + KEY, 200),
            ("/v1/models", "X: 1", 401),
        ):
            await client.send(request(b"", line, target=target, method="GET"))
            assert (await client.read()).status == status, target
        client.close()


async def test_the_models_of_a_key() -> None:
    """A key may use the models that its patterns name, as a body with two models cannot get around."""
    keys = [{"key": KEY, "models": ["gpt-4.1*", "echo"]}, {"key": "bobs-key-1234567"}]
    async with Upstream(answers(GOOD)) as one, Running(controller("a", one.url), client_keys=keys) as server:
        for model, status in (("gpt-4.1", 200), ("gpt-4.1-mini", 200), ("echo", 200), ("gpt-4", 403), ("GPT-4.1", 403), ("xgpt-4.1", 403)):
            found = await server.post(model, "api-key: " + KEY)
            assert found.status == status, model
        assert found.json()["error"]["code"] == "model_not_allowed"
        assert (await server.post("gpt-4", "api-key: bobs-key-1234567")).status == 200
        seen = len(one.seen)
        client = await server.open()
        for twice in (b'"model":"echo","model":"o3"', b'"model":"echo","Model":"o3"', b'"model":"o3","\\u006dodel":"echo"', b'"MODEL":"o3","model":"echo"'):
            await client.send(request(b'{%b,"messages":[{"role":"user","content":"x"}]}' % twice, "api-key: " + KEY))
            assert (await client.read()).status == 400, twice
        client.close()
        assert len(one.seen) == seen


async def test_a_key_of_some_models_reads_why_it_lists_no_files() -> None:
    """What an account keeps belongs to no model, so that such a key has no right to it; the error names none, either."""
    async with Running(client_keys=[{"key": KEY, "models": ["gpt-*"]}], endpoints=["objects"]) as server:
        client = await server.open()
        await client.send(request(b"", "api-key: " + KEY, target="/v1/files", method="GET"))
        found = await client.read()
        assert found.status == 403
        assert found.json()["error"]["message"] == "Your key may not use calls that name no model; it may use: gpt-*."
        client.close()


@pytest.mark.virtual_time
@pytest.mark.parametrize("limits", [{"rpm": 3}, {"tpm": 600}, {"rpm": 6, "burst_s": 30}])
async def test_limits_of_a_key_tell_the_truth(limits: dict[str, float]) -> None:
    """One request too many gets 429 and the time after which, and not before which, the next is let in."""
    keys = [{"key": KEY, "limits": limits}, {"key": "bobs-key-1234567", "limits": limits}]
    async with Upstream(answers(GOOD)) as one, Running(controller("a", one.url), client_keys=keys) as server:

        async def ask(key: str = KEY) -> Message:
            return await server.post("m", "api-key: " + key, max_tokens=199)

        for _ in range(3):
            assert (await ask()).status == 200
            await pause(2)
        for _ in range(3):
            found = await ask()
            assert found.status == 429 and found.json()["error"]["type"] == "rate_limit_error"
            wait_s = int(found.headers["retry-after-ms"]) / 1e3
            assert 0 <= int(found.headers["retry-after"]) - wait_s < 1
            assert (await ask("bobs-key-1234567")).status == 200 or len(one.seen) > 6
            await pause(wait_s - 0.5)
            assert (await ask()).status == 429
            await pause(0.5)
            assert (await ask()).status == 200


async def test_the_concurrency_of_a_key() -> None:
    """As many requests at once as the key may have; a place is free again however a request ends."""
    go = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await go.wait()
        await peer.send(GOOD)

    keys = [{"key": KEY, "limits": {"concurrency": 2}}]
    async with Upstream(script) as one, Running(controller("a", one.url), client_keys=keys) as server:
        for end in ("left", "answered"):
            clients = [await server.open() for _ in range(2)]
            for client in clients:
                await client.post("m", "api-key: " + KEY)
            while server.server.pool.upstreams[0].in_flight < 2:
                await asyncio.sleep(0)
            found = await server.post("m", "api-key: " + KEY)
            assert (found.status, found.headers["retry-after"]) == (429, "1")
            if end == "left":
                for client in clients:
                    client.reset()
            else:
                go.set()
                assert [(await client.read()).status for client in clients] == [200, 200]
            while server.server.gates["key-1"].quota.in_flight:
                await asyncio.sleep(0)
            for client in clients:
                client.close()


# ---- doors


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
        ("Content-Length: 1, 2", 400),
        ("Content-Length: 99999999999", 413),
        ("Transfer-Encoding: gzip, chunked", 501),
        ("Expect: magic\r\nContent-Length: 5", 417),
        ("Host: localhost", 400),
        ("Bad Field: 1", 400),
        ("Content-Length: 0", 403),
    ],
)
async def test_framing_is_judged_before_the_doors(framing: str, status: int) -> None:
    """What breaks HTTP is refused as that whoever sent it; only a good message learns whether it may come in."""
    async with Running() as server:
        for line in ("Host: evil.example", "Host: localhost\r\nOrigin: https://evil.example", "Host: localhost\r\nOrigin: null"):
            client = await server.open()
            await client.send(("POST /v1/chat/completions HTTP/1.1\r\n%s\r\n%s\r\n\r\n" % (line, framing)).encode())
            assert (await client.read()).status == status
            client.close()


async def test_hosts() -> None:
    """On a loopback listener a Host is loopback or one of allowed_hosts, and nothing that only looks like it."""
    good = ("localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8080", "api.example", "Api.Example:443")
    bad = ("", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "api.example.evil", "10.0.0.1", "")
    async with Running(allowed_hosts=["api.example"]) as server:
        client = await server.open()
        for host in (*bad, *good, *bad):
            for _ in range(2):
                await client.send(b"GET /status HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode())
                assert (await client.read()).status == (200 if host in good else 403), host
        client.close()


# ---- what never crosses


async def test_what_never_crosses() -> None:
    """Credentials, cookies, proxies' and hop-by-hop fields, and what Connection names, stop here in both directions."""
    stopped = [
        *("Authorization: Bearer " + KEY, "Api-Key: x", "X-Api-Key: x", "OpenAI-Organization: o", "OpenAI-Project: p"),
        *("Cookie: a=b", "Forwarded: for=1", "X-Forwarded-For: 1", "X-Forwarded-Host: h", "Proxy-Authorization: x", "Proxy-Connection: x"),
        *("Connection: X-Mine, keep-alive, Content-Type", "X-Mine: 1", "Keep-Alive: 5", "TE: trailers", "Trailer: X", "Upgrade: h2c"),
        *("HTTP2-Settings: x", "Expect: 100-continue", "Accept-Encoding: gzip", "X-Apiserver-Max-Wait: 5"),
    ]
    back = [
        *("Set-Cookie: s=1", "Set-Cookie2: s=1", "Connection: X-Theirs", "X-Theirs: 1", "Keep-Alive: 5", "Proxy-Authenticate: Basic"),
        *("Upgrade: h2c", "Trailer: X", "Alt-Svc: h3", "Proxy-Authentication-Info: x", "TE: x", "X-Kept: 1"),
    ]
    async with Upstream(answers(json_reply(200, ANSWER, *back))) as one:
        async with Running(controller("a", one.url), client_keys=[{"key": KEY}]) as server:
            found = await server.post("m", *stopped, "X-Kept: 1")
            assert found.status == 200
            names = {"host", "accept-encoding", "authorization", "content-type", "content-length", "x-kept"}
            assert set(one.seen[0].headers) == names
            assert one.seen[0].headers["authorization"] == "Bearer sk-secret-a-key" and one.seen[0].headers["accept-encoding"] == "identity"
            ours = {"x-apiserver-controller", "x-apiserver-attempts", "x-apiserver-wait-ms", "x-apiserver-request-id", "x-request-id"}
            assert set(found.headers) == {"content-type", "content-length", "x-kept"} | ours


TRAILERS = b"0\r\nSet-Cookie: s=1\r\nX-Trailer: 1\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize("raw", [app.chunk(b"{}") + TRAILERS, b"2;a=b;c\r\n{}\r\n" + TRAILERS])
async def test_trailers_end_here(raw: bytes) -> None:
    """An upstream's trailers and chunk extensions are read and dropped, and the connection carries the next request."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Trailer\r\n\r\n"
    async with Upstream(answers(head + raw)) as one, Running(controller("a", one.url)) as server:
        for _ in range(2):
            found = await server.post("m")
            assert found.body == b"{}" and not {"set-cookie", "x-trailer", "trailer"} & set(found.headers)
        assert one.connections == 1


@pytest.mark.parametrize("status", [204, 304, 205])
async def test_replies_without_a_body(status: int) -> None:
    """What follows a reply that has no body is no part of it, and never the start of another's answer."""
    raw = b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(raw + b"stray" if len(one.seen) == 1 else GOOD)

    async with Upstream(script) as one, Running(controller("a", one.url)) as server:
        client = await server.open()
        await client.post("m")
        assert (await client.read(head_only=status == 204)).status in (204, 205, 502)
        await client.post("m")
        assert (await client.read()).json() == ANSWER
        client.close()


# ---- pipelining, Expect, early ends


@pytest.mark.parametrize("first", ["good", "refused", "HEAD"])
async def test_a_pipelined_body_is_never_a_request(first: str) -> None:
    """Whatever comes of a request, its body's bytes are its body's, and the next request is the next one's bytes."""
    inner = request(b"", target="/v1/smuggled", method="GET")
    head = {"good": ("POST", "/v1/chat/completions"), "refused": ("POST", "/v1/nothing"), "HEAD": ("HEAD", "/v1/models")}[first]
    async with Running() as server:
        for lines in ([], ["Expect: 100-continue"]):
            client = await server.open()
            raw = request(inner, *lines, method=head[0], target=head[1])
            await client.send(raw + request(b"", target="/status", method="GET"))
            found = await client.read(head_only=first == "HEAD")
            assert found.status == {"good": 400, "refused": 404, "HEAD": 200}[first]
            assert (await client.read()).json() == {"status": "ok"}
            client.close()
        server.server.access.flush()
        assert "smuggled" not in "".join(server.lines)


# ---- nothing is injected

NASTY = ("a\r\nX-Injected: 1", "a\nX-Injected: 1", "a\rX-Injected: 1", "a\x00b", "a\u2028b", "a\x85b", "☃", "a b", 'a"b', "a%0d%0aX-Injected: 1", "%s{}")
PLACES = ("name", "model", "model_map", "api_key", "organization", "project", "base_url", "chat_path", "headers", "header name", "proxy", "key name")


def with_nasty(place: str, text: str, port: int) -> dict[str, Any]:
    """A configuration with `text` at one place."""
    account: dict[str, Any] = {"api_key": "sk-1", "base_url": "http://127.0.0.1:%d/v1" % port}
    one: dict[str, Any] = {"type": "openai", "config": account}
    key = {"name": "k", "key": KEY}
    if place == "key name":
        key["name"] = text
    elif place == "name":
        one["name"] = text
    elif place == "model":
        one["models"] = ["m", text]
    elif place == "model_map":
        one["model_map"] = {"m": text}
    elif place == "base_url":
        account["base_url"] += "/" + text
    elif place == "headers":
        account["headers"] = {"X-Own": text}
    elif place == "header name":
        account["headers"] = {text: "1"}
    elif place == "proxy":
        account["proxy"] = "http://u:%s@127.0.0.1:%d" % (text, port)
    else:
        account[place] = text if place != "chat_path" else "/" + text
    return {"port": 0, "controllers": [one], "client_keys": [key]}


@pytest.mark.parametrize("place", PLACES)
async def test_nothing_is_injected_by_the_configuration(place: str) -> None:
    """A value either is refused at the start or goes where it belongs: no head gets a line more, on either side."""
    for text in NASTY:
        await ask_with(place, text)


async def ask_with(place: str, text: str) -> None:
    """Start with `text` at one place, if it can be started so, and look at the heads of a request and its answer."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        length = int(heads[-1].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        json.loads(await reader.readexactly(length))
        writer.write(GOOD)
        await reader.read()
        writer.close()

    upstream = await asyncio.start_server(serve, "127.0.0.1", 0)
    running = Running()
    try:
        running.config = app.parse_config(with_nasty(place, text, upstream.sockets[0].getsockname()[1]), "test", {})
    except app.ConfigError as refused:
        assert "\n" not in str(refused) and "\r" not in str(refused)
        upstream.close()
        return
    assert text.isprintable()
    async with running as server:
        client = await server.open()
        await client.post("m", "api-key: " + KEY)
        raw = await client.reader.readuntil(b"\r\n\r\n")
        client.close()
        server.server.access.flush()
    upstream.close()
    assert raw.startswith(b"HTTP/1.1 200 ") and len(heads) == 1
    for head in (raw, heads[0]):
        assert app.REPLY_FIELDS.parse(head.partition(b"\r\n")[2][:-4], 100) and b"injected" not in head.lower().replace(b"%0d%0ax-injected", b"")
    app.parse_request_head(heads[0])
    assert len("".join(server.lines).splitlines()) == 1


async def test_nothing_is_injected_by_a_request() -> None:
    """A model's name, a path, a query: what a client writes stays inside what it is."""
    for text in NASTY:
        await ask_for(text)


async def ask_for(text: str) -> None:
    """Put `text` wherever a request has room for it."""
    async with Upstream(answers(error_reply(400, "x"))) as one, Running(controller("a", one.url, model_map={"x": "y"})) as server:
        found = await server.post(text)
        assert found.status == 400 and json.loads(one.seen[0].body)["model"] == text
        body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        for target in ("/v1/chat/completions?q=" + text, "/v1/" + text, "/v1/models/" + text):
            client = await server.open()
            await client.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (target.encode(), len(body), body))
            found = await client.read()
            assert found.status in (400, 404, 405) and "x-injected" not in found.headers
            client.close()
        for message in one.seen:
            app.parse_request_line(message.start.encode())
            assert "x-injected" not in message.headers
        server.server.access.flush()
        assert all(line.count("\n") == 1 and line.isascii() for line in "".join(server.lines).splitlines(keepends=True))


async def test_a_host_that_needs_a_restart_moves_no_door() -> None:
    """After a reload with another host the doors are those of the address that is listened on."""
    data: dict[str, Any] = {"port": 0, "controllers": app.demo_controllers()}
    for host, status in (("127.0.0.1", 403), ("0.0.0.0", 200)):
        async with Running(host=host) as server:
            other = {"127.0.0.1": "0.0.0.0", "0.0.0.0": "127.0.0.1"}[host]
            server.server.reconfigure(app.parse_config({**data, "host": other, "pool": {"type": "random"}}, "test", {}))
            client = await server.open()
            await client.send(request(b"", target="/status", method="GET").replace(b"Host: localhost", b"Host: some.example"))
            assert (await client.read()).status == status
            client.close()
            assert server.server.config.host == host and server.server.config.pool.type == "random"
