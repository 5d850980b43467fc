"""No configured secret is ever shown: logs, error bodies, headers, --check, /status, reprs; whatever an upstream echoes."""

import asyncio
import base64
import gc
import gzip
import io
import json
import logging
import re
import traceback
import tracemalloc
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    SSE_HEAD,
    Message,
    Peer,
    Running,
    Upstream,
    answers,
    controller,
    error_reply,
    event,
    json_reply,
    reply,
    request,
)
from .wirefeed import turns

LITERAL = "sk-proj-LiteralLiteralLiteral-aaaa"
NAMED = "sk-NamedNamedNamedNamedNamed-bbbb"
FILED = "sk-svcacct-FiledFiledFiledFiled-cccc"
PASSWORD = "p@ss/word:Proxy-dddd"
FIELD = "header-Value-Header-Value-eeee"
CLIENT = "client-Key-Client-Key-ffff"
BASIC = base64.b64encode(b"user:" + PASSWORD.encode()).decode()
SECRETS = (LITERAL, NAMED, FILED, PASSWORD, quote(PASSWORD, safe=""), BASIC, FIELD, CLIENT)
MASKED = ("sk-proj-Li***************aaaa", "sk-Named***bbbb", "sk-svcac****cccc", "sk-...cccc")


def shown_in(text: str | bytes) -> list[str]:
    """The secrets that `text` shows, whole, in a dozen letters, or masked as OpenAI does."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [one for one in (*SECRETS, *MASKED, *(secret[:14] for secret in SECRETS)) if one in text]


def configuration(folder: Path, url: str, proxy: str = "127.0.0.1:9") -> dict[str, Any]:
    """Three controllers and a client key that hold every kind of secret."""
    (folder / "key.txt").write_text(FILED + "\n")
    account = {"proxy": "http://user:%s@%s" % (quote(PASSWORD, safe=""), proxy), "headers": {"X-Gate": FIELD}}
    return {
        "port": 0,
        "controllers": [
            controller("literal", url, account={"api_key": LITERAL, "headers": {"X-Gate": FIELD}}),
            controller("named", url, account={"api_key": "$SOME_KEY", **account}),
            controller("filed", url, account={"api_key": "file:" + str(folder / "key.txt")}),
        ],
        "client_keys": [{"name": "alice", "key": CLIENT}],
        "log": {"level": "debug"},
        "pool": {"max_wait": 0},
    }


SENT = tuple(one for one in SECRETS if one != CLIENT)  # no upstream gets a client's key, and so cannot repeat it
ECHO = " ".join((*SENT, *MASKED))
ERROR = {"error": {"message": "Incorrect API key provided: " + ECHO, "type": "x", "param": None, "code": "invalid_api_key"}}
BODY = json.dumps(ERROR).encode()
FIELDS = tuple("X-Echo-%d: Bearer %s" % pair for pair in enumerate((*SENT, *MASKED)))


def stream(*events: bytes) -> bytes:
    """A stream that begins as it should and ends as `events` say."""
    return SSE_HEAD + b"".join(map(app.chunk, events)) + b"0\r\n\r\n"


ECHOES = {
    "401": error_reply(401, "invalid_api_key", "Incorrect API key provided: " + ECHO, *FIELDS),
    "400": error_reply(400, "bad", ECHO, *FIELDS),
    "500": error_reply(500, None, ECHO),
    "429": error_reply(429, "rate_limit_exceeded", ECHO, "Retry-After: 1"),
    "302": json_reply(302, {}, "Location: http://x/" + LITERAL),
    "no JSON": b"HTTP/1.1 403 " + LITERAL.encode() + b"\r\nContent-Length: %d\r\n\r\n%b" % (len(ECHO), ECHO.encode()),
    "fields of a 200": json_reply(200, ANSWER, *FIELDS),
    "200 with an error": json_reply(200, ERROR),
    "first event": stream(b"data: %b\n\n" % BODY),
    "later event": stream(event("a"), b"data: %b\n\n" % BODY, b"data: [DONE]\n\n"),
    "event of type error": stream(event("a"), b"event: error\ndata: %b\n\n" % BODY),
    "garbage": LITERAL.encode() + b"\r\n\r\n",
    "bad field": b"HTTP/1.1 200 OK\r\n" + LITERAL.encode() + b"\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + LITERAL.encode() + b"\r\n",
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the log says once `set_up` has made it as the program does."""
    written = io.StringIO()
    monkeypatch.setattr(app.redactor, "secrets", ())
    monkeypatch.setattr(app.redactor, "keys", ())
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).propagate) for name in (app.log.name, "asyncio")}
    yield written
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:], logging.getLogger(name).propagate = handlers, propagate
    app.log.setLevel(logging.NOTSET)


def set_up(config: app.Config, written: io.StringIO) -> None:
    """Log as the program does, but to `written`."""
    app.set_up_logging(config)
    for handler in app.log.handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(written)


@pytest.mark.parametrize("echo", ECHOES)
async def test_what_an_upstream_echoes(echo: str, tmp_path: Path, logged: io.StringIO) -> None:
    """However an upstream repeats what it was sent, neither client, log, status nor any object's repr shows it."""
    for sole in (True, False):
        await check_what_an_upstream_echoes(echo, sole, tmp_path, logged)


async def check_what_an_upstream_echoes(echo: str, sole: bool, tmp_path: Path, logged: io.StringIO) -> None:
    """One upstream or several."""
    seen: list[bytes] = []

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(ECHOES[echo])
        if echo.startswith("bad"):
            await peer.gone()

    async with Upstream(script) as one:
        data = configuration(tmp_path, one.url, "127.0.0.1:%d" % one.port)
        if sole:  # with the key and the header of one that is not sole
            data["controllers"] = data["controllers"][1:2]
            data["controllers"][0]["config"]["headers"]["X-More"] = LITERAL
            data["controllers"][0]["config"]["headers"]["X-Other"] = FILED
        running = Running()
        running.config = app.parse_config(data, "test", {"SOME_KEY": NAMED})
        set_up(running.config, logged)
        async with running as server:
            for streamed in (False, True, False):
                client = await server.open()
                await client.post("m", "Connection: close", "Authorization: Bearer " + CLIENT, stream=streamed)
                seen.append(await client.closed())
                client.close()
            await turns()
            sent = [value for message in one.seen for value in message.headers.values()]
            assert all(any(one in value for value in sent) for one in (LITERAL, NAMED, FILED, FIELD, BASIC))
            client = await server.open()
            await client.send(request(b"", "x-api-key: " + CLIENT, target="/status?verbose=1", method="GET"))
            seen.append((await client.read()).body)
            client.close()
            assert sole or shown_in(live_reprs()) == []  # it takes a while
        assert all(seen) and shown_in(b"".join(seen)) == []
        if "event" in echo:
            assert b'"code": "invalid_api_key"' in seen[1] or b"invalid_api_key" in seen[1]
        assert shown_in(logged.getvalue() + "".join(server.lines)) == []


def live_reprs() -> str:
    """The repr of every live object that is ours or asyncio's, and of what frames of coroutines refer to."""
    kinds = (asyncio.Future, asyncio.Handle, asyncio.BaseTransport, asyncio.Protocol, asyncio.StreamReader, BaseException)
    found = []
    for one in gc.get_objects():
        ours = type(one).__module__ == app.__name__
        if ours or isinstance(one, (*kinds, types.CoroutineType, types.FunctionType)):
            found.append(repr(one))
    assert len(found) > 100
    return "\n".join(found)


async def test_secrets_a_client_sends_are_not_ours_to_show(tmp_path: Path, logged: io.StringIO) -> None:
    """Neither a refused nor an accepted client key reaches an upstream, a log or an answer."""
    async with Upstream(lambda peer, _: peer.send(json_reply(200, ANSWER))) as one:
        running = Running()
        running.config = app.parse_config(configuration(tmp_path, one.url), "test", {"SOME_KEY": NAMED})
        set_up(running.config, logged)
        async with running as server:
            lines = ("Authorization: Bearer " + CLIENT, "api-key: " + CLIENT, "x-api-key: " + CLIENT, "api-key: %sx" % CLIENT)
            answers = [await server.post("m", line) for line in lines]
            server.server.access.flush()
        assert [found.status for found in answers][2:] == [200, 401]
        everything = "".join(str(found.fields) for found in (*answers, *one.seen)) + logged.getvalue() + "".join(server.lines)
        assert CLIENT not in everything


def test_reports_show_no_secret(tmp_path: Path) -> None:
    """--check, the summary of a reload, reprs of the configuration and messages about mistakes name no secret."""
    data = configuration(tmp_path, "http://127.0.0.1:1/v1")
    config = app.parse_config(data, "test", {"SOME_KEY": NAMED})
    empty = app.parse_config({"controllers": app.demo_controllers()}, "test", {})
    shown = [*app.describe(config), *app.diff_config(empty, config), *app.diff_config(config, empty), repr(config), str(vars(config))]
    for path in ("controllers.0.config.base_url", "controllers.1.config.proxy", "controllers.0.config.ca_file", "log.level"):
        broken = json.loads(json.dumps(data))
        *way, last = path.split(".")
        inner: Any = broken
        for step in way:
            inner = inner[int(step) if step.isdigit() else step]
        inner[last] = "ftp://user:%s@host/?key=%s" % (PASSWORD, LITERAL)
        with pytest.raises(app.ConfigError) as told:
            app.parse_config(broken, "test", {"SOME_KEY": NAMED})
        shown += [str(told.value), "".join(traceback.format_exception(told.value, chain=False))]
    assert shown_in("\n".join(shown)) == []


async def test_tracebacks_and_asyncios_own_log_are_cleaned(tmp_path: Path, logged: io.StringIO) -> None:
    """A secret in an exception's message is struck out, also where asyncio writes the line."""
    config = app.parse_config(configuration(tmp_path, "http://127.0.0.1:1/v1"), "test", {"SOME_KEY": NAMED})
    set_up(config, logged)
    for name in (app.log.name, "asyncio"):
        try:
            raise ValueError("cannot use " + ECHO)
        except ValueError:
            logging.getLogger(name).exception("failed: %s", LITERAL)
    text = logged.getvalue()
    assert text.count("Traceback") == 2 and text.count("ValueError") >= 2
    assert [one for one in shown_in(text) if one not in MASKED] == []


@pytest.mark.parametrize("step_bytes", [1, 9, 20])
@pytest.mark.parametrize("end", ["whole", "cut"])
async def test_an_error_event_that_comes_in_pieces(end: str, step_bytes: int) -> None:
    """A secret that the network cuts in two is struck out of an error event all the same; other events never wait."""
    calm = b'data: {"choices":[{"delta":{"content":"said \\"error\\""}}],"error":null}\n\n'
    told = b'data: {"error":{"message":"bad key %b, %b","code":null}}\n\n' % (LITERAL.encode(), MASKED[0].encode())
    step = asyncio.Event()

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(SSE_HEAD)
        await peer.chunk(calm)
        await step.wait()
        for at in range(0, len(told), step_bytes):
            if end == "whole" or at < 60:
                await peer.chunk(told[at : at + step_bytes])
                await turns(3)
        if end == "whole":
            await peer.send(b"0\r\n\r\n")
        peer.close()

    async with Upstream(script) as one, Running(controller("a", one.url, account={"api_key": LITERAL})) as server:
        client = await server.open()
        await client.post("m", "Connection: close", stream=True)
        assert await client.reader.readuntil(calm)
        step.set()
        found = await client.closed()
        client.close()
        plain = re.sub(rb"\r\n[0-9a-f]{1,2}\r\n", b"", found)
        assert shown_in(plain) == [] and plain.count(b'data: {"error":{"message":"') == 1
        assert found.endswith(b"0\r\n\r\n") is (b"bad key ***, ***" in found) is (end == "whole")


PACKERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": lambda data: zlib.compress(data)[2:-4],
}


@pytest.mark.parametrize("coding", PACKERS)
async def test_a_compressed_error_is_unpacked_and_scrubbed(coding: str) -> None:
    """An upstream that compresses its errors unasked hides no key in them, and its words are understood."""
    body = json.dumps({"error": {"message": "key %s is wrong for this model" % LITERAL, "code": "model_not_found"}}).encode()
    raw = reply(404, PACKERS[coding](body), "Content-Encoding: " + coding, "X-Own: 1")
    async with Upstream(answers(raw)) as one, Running(controller("a", one.url, account={"api_key": LITERAL})) as server:
        found = await server.post("m")
        assert found.status == 404 and found.body == body.replace(LITERAL.encode(), b"***")
        assert "content-encoding" not in found.headers and found.headers["x-own"] == "1"
        assert app.describe_pool(server.server.pool, 0)["controllers"][0]["lacks"] == ["m"]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("br", b"\x0b\x02\x80" + LITERAL.encode()),
        ("gzip", b"no gzip " + LITERAL.encode()),
        ("gzip", gzip.compress(b"x" * 5000)[:-9]),
        ("gzip", gzip.compress(b"0" * 50_000_000)),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
        ("gzip", gzip.compress(b"{") + gzip.compress(b"}")),
        ("deflate", b""),
    ],
)
async def test_a_compressed_error_that_cannot_be_unpacked_is_replaced(coding: str, body: bytes) -> None:
    """Bombs, damage and unknown codings give way to an error of ours with the same status; nothing is unpacked in vain."""
    async with Upstream(answers(reply(400, body, "Content-Encoding: " + coding))) as one:
        async with Running(controller("a", one.url, account={"api_key": LITERAL})) as server:
            tracemalloc.start()
            found = await server.post("m")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert found.status == 400 and LITERAL.encode() not in found.body and peak < 2_000_000
            if body:
                assert found.json()["error"]["code"] == "upstream_bad_reply" and "content-encoding" not in found.headers
