"""Access and forwarding: client keys and their limits, doors, headers that are dropped, nothing injected."""

import asyncio
import hashlib
import json
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, MESSAGES, Message, Peer, Running, Upstream, answers, controller, error_reply, json_reply, pause, request, until

KEY, OTHER_KEY = "alice-key-123456", "bobs-key-1234567"
HASH = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
OK = json_reply(200, ANSWER)


@pytest.mark.parametrize("stored", [KEY, HASH, "$ALICE"])
async def test_a_client_key(stored: str) -> None:
    """A key is stored as its hash only, and found in each of the headers that SDKs use; anything else gets a 401."""
    running = Running()
    data = {"port": 0, "controllers": app.demo_controllers(), "client_keys": [{"key": stored}]}
    running.config = app.parse_config(data, "test", {"ALICE": KEY})
    assert KEY not in repr(running.config.client_keys[0])
    ways = ("Authorization: Bearer %s", "authorization: bearer  %s ", "api-key: %s", "X-API-Key: %s")
    async with running as server:
        for way in ways:
            assert (await server.post("echo", way % KEY)).status == 200, way
            for wrong in (KEY + "x", KEY[:-1], KEY.upper(), "", HASH):
                answer = await server.post("echo", way % wrong)
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", (way, wrong)
                assert answer.json()["error"]["code"] == "invalid_api_key" and len(answer.json()["error"]) == 4
        for lines in ([ways[0] % KEY] * 2, ["Authorization: Basic " + KEY], ["Authorization: " + KEY], ["Cookie: key=" + KEY], []):
            assert (await server.post("echo", *lines)).status == 401, lines


async def test_what_needs_a_key() -> None:
    """With client keys /status is open; its details and the API need a key, and a key with models lists no files."""
    message = "Your key may not use calls that name no model; it may use: gpt-*."
    keys = [{"key": KEY, "models": ["gpt-*"]}, {"key": OTHER_KEY, "admin": True}]
    async with Running(client_keys=keys, endpoints=["objects"]) as server:
        refused = await server.ask("GET", "/status?verbose=1", b"", "api-key: " + KEY)
        assert refused.status == 403 and refused.json()["error"]["code"] == "admin_required"
        for target, line, status in (
            ("/status", "X: 1", 200),
            ("/status?verbose=1", "X: 1", 401),
            ("/status?a=b&verbose=1", "api-key: x", 401),
            ("/status?verbose=1", "api-key: " + OTHER_KEY, 200),
            ("/v1/models", "X: 1", 401),
            ("/v1/files", "api-key: " + KEY, 403),
        ):
            answer = await server.ask("GET", target, b"", line)
            assert answer.status == status and (status != 403 or answer.json()["error"]["message"] == message), target


async def test_the_models_of_a_key() -> None:
    """A key may use the models that match its patterns; a body that names two models is no way around that."""
    keys = [{"key": KEY, "models": ["gpt-4.1*", "echo"]}, {"key": OTHER_KEY}]
    async with Upstream(answers(OK)) as upstream, Running(controller("a", upstream.url), client_keys=keys) as server:
        for model, status in (("gpt-4.1", 200), ("gpt-4.1-mini", 200), ("echo", 200), ("gpt-4", 403), ("GPT-4.1", 403), ("xgpt-4.1", 403)):
            answer = await server.post(model, "api-key: " + KEY)
            assert answer.status == status, model
        assert answer.json()["error"]["code"] == "model_not_allowed"
        assert (await server.post("gpt-4", "api-key: " + OTHER_KEY)).status == 200
        for twice in (b'"model":"echo","model":"o3"', b'"model":"echo","Model":"o3"', b'"model":"o3","\\u006dodel":"echo"', b'"MODEL":"o3","model":"echo"'):
            upstream.seen.clear()
            body = b'{%b,"messages":[{"role":"user","content":"x"}]}' % twice
            assert (await server.ask("POST", "/v1/chat/completions", body, "api-key: " + KEY)).status in (200, 400, 403), twice
            assert all("o3" not in message.body.decode() for message in upstream.seen), twice


@pytest.mark.virtual_time
@pytest.mark.parametrize("limits", [{"rpm": 3}, {"tpm": 600}, {"rpm": 6, "burst_s": 30}])
async def test_rate_limits_of_a_key(limits: dict[str, float]) -> None:
    """One request too many gets 429 with the exact time after which the next one is accepted. Usage is what counts."""
    keys = [{"key": KEY, "limits": limits}, {"key": OTHER_KEY, "limits": limits}]
    used = json_reply(200, {**ANSWER, "usage": {"total_tokens": 200}})
    async with Upstream(answers(used)) as upstream, Running(controller("a", upstream.url), client_keys=keys) as server:

        async def ask(key: str = KEY) -> Message:
            return await server.post("m", "api-key: " + key, max_tokens=199)

        for _ in range(3):
            assert (await ask()).status == 200
            await pause(2)
        for _ in range(3):
            answer = await ask()
            assert answer.status == 429 and answer.json()["error"]["type"] == "rate_limit_error"
            wait_s = int(answer.headers["retry-after-ms"]) / 1e3
            assert 0 <= int(answer.headers["retry-after"]) - wait_s < 1
            assert (await ask(OTHER_KEY)).status == 200 or len(upstream.seen) > 6
            await pause(wait_s - 0.5)
            assert (await ask()).status == 429
            await pause(0.5)
            assert (await ask()).status == 200


async def test_the_concurrency_of_a_key() -> None:
    """A key has at most so many requests at once; a place is free again when a client leaves or has its answer."""
    have_left, answering = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        if have_left.is_set():
            await answering.wait()
            await peer.send(OK)
        else:
            await peer.gone()

    keys = [{"key": KEY, "limits": {"concurrency": 2}}]
    async with Upstream(script) as upstream, Running(controller("a", upstream.url), client_keys=keys) as server:
        for leaves in (True, False):
            upstream.seen.clear()
            clients = [await server.open() for _ in range(2)]
            for client in clients:
                await client.post("m", "api-key: " + KEY)
            await until(lambda: len(upstream.seen) == 2)
            answer = await server.post("m", "api-key: " + KEY)
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            if leaves:
                for client in clients:
                    client.reset()
                await until(lambda: not upstream.open_connections)
            have_left.set()
        answering.set()
        assert [(await client.read()).status for client in clients] == [200, 200]
        for client in clients:
            client.close()
        assert (await server.post("m", "api-key: " + KEY)).status == 200


# ---- doors


@pytest.mark.parametrize("line", ["Host: evil.example", "Host: localhost\r\nOrigin: https://evil.example", "Host: localhost\r\nOrigin: null"])
async def test_framing_is_judged_before_the_doors(line: str) -> None:
    """A message that breaks HTTP is refused as such, before its Host and Origin are judged."""
    async with Running() as server:
        for framing, status in (
            ("Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
            ("Content-Length: 99999999999", 413),
            ("Transfer-Encoding: gzip, chunked", 501),
            ("Expect: magic\r\nContent-Length: 5", 417),
            ("Host: localhost", 400),
            ("Content-Length: 0", 403),
        ):
            client = await server.open()
            await client.send(f"POST /v1/chat/completions HTTP/1.1\r\n{line}\r\n{framing}\r\n\r\n".encode())
            assert (await client.read()).status == status
            client.close()


async def test_hosts() -> None:
    """On a loopback listener only loopback hosts and allowed_hosts are accepted, not names that look like them."""
    good = ("localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:8080", "api.example", "Api.Example:443")
    bad = ("", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "api.example.evil", "10.0.0.1", "")
    async with Running(allowed_hosts=["api.example"]) as server:
        client = await server.open()
        for host in (*bad, *good, *bad):
            for _ in range(2):
                await client.send(b"GET /status HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode())
                assert (await client.read()).status == (200 if host in good else 403), host
        client.close()


# ---- what is not forwarded


async def test_what_is_not_forwarded() -> None:
    """Credentials, cookies, proxy and hop-by-hop fields, and what Connection names, are dropped in both directions."""
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
    async with Upstream(answers(json_reply(200, ANSWER, *back))) as upstream:
        async with Running(controller("a", upstream.url), client_keys=[{"key": KEY}]) as server:
            answer = await server.post("m", *stopped, "X-Kept: 1")
            assert answer.status == 200
            sent = upstream.seen[0].headers
            assert set(sent) == {"host", "accept-encoding", "authorization", "content-type", "content-length", "x-kept"}
            assert (sent["authorization"], sent["accept-encoding"]) == ("Bearer sk-secret-a-key", "identity")
            ours = {"x-apiserver-controller", "x-apiserver-attempts", "x-apiserver-wait-ms", "x-apiserver-request-id", "x-request-id"}
            assert set(answer.headers) == {"content-type", "content-length", "x-kept"} | ours


@pytest.mark.parametrize("status", [204, 304, 205])
async def test_replies_without_a_body(status: int) -> None:
    """Bytes behind a reply without a body are neither its body nor the start of the next answer."""
    raw = b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(raw + b"stray" if len(upstream.seen) == 1 else OK)

    async with Upstream(script) as upstream, Running(controller("a", upstream.url)) as server:
        client = await server.open()
        await client.post("m")
        assert (await client.read(head_only=status == 204)).status in (204, 205, 502)
        await client.post("m")
        assert (await client.read()).json() == ANSWER
        client.close()


# ---- pipelining, Expect, early ends


@pytest.mark.parametrize(
    ("method", "target", "status"), [("POST", "/v1/chat/completions", 400), ("POST", "/v1/nothing", 404), ("HEAD", "/v1/models", 200)]
)
@pytest.mark.parametrize("lines", [[], ["Expect: 100-continue"]])
async def test_a_pipelined_body_is_never_a_request(method: str, target: str, status: int, lines: list[str]) -> None:
    """However a request is answered, the bytes of its body are never read as the next request."""
    inner = request(b"", target="/v1/smuggled", method="GET")
    async with Running() as server:
        client = await server.open()
        await client.send(request(inner, *lines, method=method, target=target) + request(b"", target="/status", method="GET"))
        assert (await client.read(head_only=method == "HEAD")).status == status
        assert (await client.read()).json() == {"status": "ok"}
        client.close()
        assert "smuggled" not in "".join(server.access_lines())


# ---- nothing is injected

NASTY = ("a\r\nX-Injected: 1", "a\nX-Injected: 1", "a\rX-Injected: 1", "a\x00b", "a\u2028b", "a\x85b", "☃", "a b", 'a"b', "a%0d%0aX-Injected: 1", "%s{}")
PLACES = {  # in a controller's configuration
    "name": lambda text: {"name": text},
    "models": lambda text: {"models": ["m", text]},
    "model_map": lambda text: {"model_map": {"m": text}},
    **{key: lambda text, key=key: {"config": {key: text}} for key in ("api_key", "organization", "project")},
    "base_url": lambda text: {"config": {"base_url": "/" + text}},
    "chat_path": lambda text: {"config": {"chat_path": "/" + text}},
    "headers": lambda text: {"config": {"headers": {"X-Own": text}}},
    "header name": lambda text: {"config": {"headers": {text: "1"}}},
    "proxy": lambda text: {"config": {"proxy": text}},
    "key name": lambda text: {},
}


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", PLACES)
async def test_nothing_is_injected_by_the_configuration(place: str, text: str) -> None:
    """A value is refused at the start in one line, or it stays one value: no head and no log gets a line more."""
    async with Upstream(answers(OK)) as upstream:
        made = {"base_url": {"config": {"base_url": f"{upstream.url}/{text}"}}, "key name": {}}.get(place) or PLACES[place](text)
        account = {"api_key": "sk-1", "base_url": upstream.url, **made.pop("config", {})}
        if place == "proxy":
            account["proxy"] = upstream.url.replace("//", f"//u:{text}@").removesuffix("/v1")
        keys = [{"name": text if place == "key name" else "k", "key": KEY}]
        try:
            running = Running({"type": "openai", "config": account, **made}, client_keys=keys)
        except app.ConfigError as refused:
            assert "\n" not in str(refused) and "\r" not in str(refused)
            return
        assert text.isprintable()
        async with running as server:
            answer = await server.post("m", "api-key: " + KEY)
            assert answer.status == 200 and len(upstream.seen) == 1 and len(server.access_lines()) == 1
    for message in (answer, upstream.seen[0]):
        assert "x-injected" not in message.headers and json.loads(message.body)
        assert all(app.parse_line(f"{name}: {value}".encode(), is_reply=True) for name, value in message.fields)


@pytest.mark.parametrize("text", NASTY)
async def test_nothing_is_injected_by_a_request(text: str) -> None:
    """A client's model, path and query stay inside their places upstream, in the answer and in the log."""
    async with Upstream(answers(error_reply(400, "x"))) as upstream, Running(controller("a", upstream.url, model_map={"x": "y"})) as server:
        answer = await server.post(text)
        assert answer.status == 400 and json.loads(upstream.seen[0].body)["model"] == text
        body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        for target in ("/v1/chat/completions?q=" + text, "/v1/" + text, "/v1/models/" + text):
            client = await server.open()
            await client.send(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (target.encode(), len(body), body))
            answer = await client.read()
            assert answer.status in (400, 404, 405) and "x-injected" not in answer.headers
            client.close()
        for message in upstream.seen:
            app.parse_request_head(message.start.encode() + b"\r\nHost: h\r\n\r\n")
            assert "x-injected" not in message.headers
        assert all(line.count("\n") == 1 and line.isascii() for line in server.access_lines())


async def test_a_reload_with_another_host() -> None:
    """A new host needs a restart: until then the checks of Host are those of the address in use."""
    data: dict[str, Any] = {"port": 0, "controllers": app.demo_controllers()}
    for host, status in (("127.0.0.1", 403), ("0.0.0.0", 200)):
        async with Running(host=host) as server:
            other = {"127.0.0.1": "0.0.0.0", "0.0.0.0": "127.0.0.1"}[host]
            server.server.reconfigure(app.parse_config({**data, "host": other, "pool": {"type": "random"}}, "test", {}))
            client = await server.open()
            await client.send(b"GET /status HTTP/1.1\r\nHost: some.example\r\n\r\n")
            assert (await client.read()).status == status
            client.close()
            assert server.server.config.host == host and server.server.config.pool.type == "random"
