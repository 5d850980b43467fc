"""Configured secrets are never shown: in logs, error bodies, headers, --check, /status, reprs, or echoes of an upstream."""

import asyncio
import base64
import gc
import gzip
import io
import json
import logging
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

from .support import ANSWER, Message, Peer, Running, Upstream, answers, controller, error_reply, event, json_reply, reply, sse_reply
from .wirefeed import turns

LITERAL = "sk-proj-LiteralLiteralLiteral-aaaa"
NAMED = "sk-NamedNamedNamedNamedNamed-bbbb"
FILED = "sk-svcacct-FiledFiledFiledFiled-cccc"
PASSWORD = "p@ss/word:Proxy-dddd"
FIELD = "header-Value-Header-Value-eeee"
CLIENT = "client-Key-Client-Key-ffff"
BASIC = base64.b64encode(b"user:" + PASSWORD.encode()).decode()
SECRETS = (LITERAL, NAMED, FILED, PASSWORD, quote(PASSWORD, safe=""), BASIC, FIELD, CLIENT)
# As OpenAI masks keys in its messages.
MASKED = ("sk-proj-Li***************aaaa", "sk-Named***bbbb", "sk-svcac****cccc", "sk-...cccc")


def shown_in(text: str | bytes) -> list[str]:
    """Return the secrets that `text` shows, whole or their first 14 characters."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return [secret for secret in SECRETS if secret in text or secret[:14] in text]


def configuration(folder: Path, url: str, proxy: str = "127.0.0.1:9") -> dict[str, Any]:
    """Three controllers and a client key that hold every kind of secret."""
    (folder / "key.txt").write_text(FILED + "\n")
    account = {"proxy": f"http://user:{quote(PASSWORD, safe='')}@{proxy}", "headers": {"X-Gate": FIELD}}
    accounts = {
        "literal": {"api_key": LITERAL, "headers": {"X-Gate": FIELD}},
        "named": {"api_key": "$SOME_KEY", **account},
        "filed": {"api_key": f"file:{folder / 'key.txt'}"},
    }
    controllers = [controller(name, url, account=config) for name, config in accounts.items()]
    keys = [{"name": "alice", "key": CLIENT}]
    return {"port": 0, "controllers": controllers, "client_keys": keys, "log": {"level": "debug"}, "pool": {"max_wait": 0}}


SENT = tuple(secret for secret in SECRETS if secret != CLIENT)  # an upstream never gets a client's key
ECHO = " ".join(SENT)
ERROR = {"error": {"message": "Incorrect API key provided: " + ECHO, "type": "x", "param": None, "code": "invalid_api_key"}}
BODY = json.dumps(ERROR).encode()
FIELDS = tuple(f"X-Echo-{number}: Bearer {secret}" for number, secret in enumerate(SENT))
ECHOES = {
    "401": error_reply(401, "invalid_api_key", f"Incorrect API key provided: {ECHO} {' '.join(MASKED)}", *FIELDS),
    "400": error_reply(400, "bad", ECHO, *FIELDS),
    "500": error_reply(500, None, ECHO),
    "429": error_reply(429, "rate_limit_exceeded", ECHO, "Retry-After: 1"),
    "302": json_reply(302, {}, "Location: http://x/" + LITERAL),
    "no JSON": f"HTTP/1.1 403 {LITERAL}\r\nContent-Length: {len(ECHO)}\r\n\r\n{ECHO}".encode(),
    "fields of a 200": json_reply(200, ANSWER, *FIELDS),
    "200 with an error": json_reply(200, ERROR),
    "first event": sse_reply(b"data: %b\n\n" % BODY),
    "later event": sse_reply(event("a"), b"data: %b\n\n" % BODY, b"data: [DONE]\n\n"),
    "event of type error": sse_reply(event("a"), b"event: error\ndata: %b\n\n" % BODY),
    "bad status line": LITERAL.encode() + b"\r\n\r\n",
    "bad field": b"HTTP/1.1 200 OK\r\n" + LITERAL.encode() + b"\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + LITERAL.encode() + b"\r\n",
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Return the text of the log after `set_up`; the loggers are restored at the end."""
    written = io.StringIO()
    monkeypatch.setattr(app.redactor, "secrets", ())
    monkeypatch.setattr(app.redactor, "keys", ())
    loggers = [app.log, logging.getLogger("asyncio")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    yield written
    for logger, (handlers, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
    app.log.setLevel(logging.NOTSET)


def set_up(data: dict[str, Any], written: io.StringIO) -> app.Config:
    """Set up the log as the program does, but write it to `written`; return the configuration."""
    config = app.parse_config(data, "test", {"SOME_KEY": NAMED})
    app.set_up_logging(config)
    for handler in app.log.handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(written)
    return config


def serving(data: dict[str, Any], written: io.StringIO) -> Running:
    """Return a server, to be entered, whose log goes to `written`."""
    running = Running()
    running.config = set_up(data, written)
    return running


@pytest.mark.parametrize("sole", [True, False])
@pytest.mark.parametrize("echo", ECHOES)
async def test_what_an_upstream_echoes(echo: str, sole: bool, tmp_path: Path, logged: io.StringIO) -> None:
    """An upstream repeats the secrets it got: no client, log, status page or repr of an object shows them."""
    seen: list[bytes] = []

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(ECHOES[echo])
        if echo.startswith("bad"):
            await peer.gone()

    async with Upstream(script) as upstream:
        data = configuration(tmp_path, upstream.url, f"127.0.0.1:{upstream.port}")
        if sole:  # one account that sends the secrets of all three
            data["controllers"] = data["controllers"][1:2]
            data["controllers"][0]["config"]["headers"] |= {"X-More": LITERAL, "X-Other": FILED}
        async with serving(data, logged) as server:
            for streamed in (False, True, False):
                client = await server.open()
                await client.post("m", "Connection: close", "Authorization: Bearer " + CLIENT, stream=streamed)
                seen.append(await client.closed())
                client.close()
            await turns()
            sent = [value for message in upstream.seen for value in message.headers.values()]
            assert all(any(secret in value for value in sent) for secret in (LITERAL, NAMED, FILED, FIELD, BASIC))
            seen.append((await server.ask("GET", "/status?verbose=1", b"", "x-api-key: " + CLIENT)).body)
            assert echo != "400" or shown_in(live_reprs()) == []
        assert all(seen) and shown_in(b"".join(seen)) == [] and not any(mask.encode() in b"".join(seen[:3]) for mask in MASKED)
        assert "event" not in echo or b"invalid_api_key" in seen[1] or b"upstream_account_refused" in seen[1]
        assert shown_in(logged.getvalue() + "".join(server.lines)) == []


def live_reprs() -> str:
    """Return the reprs of every live object of the module and of asyncio, and of coroutines, functions and errors."""
    kinds = (asyncio.Future, asyncio.Handle, asyncio.BaseTransport, asyncio.Protocol, asyncio.StreamReader, BaseException)
    kinds += (types.CoroutineType, types.FunctionType)
    reprs = [repr(value) for value in gc.get_objects() if type(value).__module__ == app.__name__ or isinstance(value, kinds)]
    assert len(reprs) > 100
    return "\n".join(reprs)


async def test_client_keys_are_not_shown(tmp_path: Path, logged: io.StringIO) -> None:
    """Neither a refused nor an accepted client key reaches an upstream, a log or an answer."""
    async with Upstream(answers(json_reply(200, ANSWER))) as upstream:
        async with serving(configuration(tmp_path, upstream.url), logged) as server:
            lines = ("Authorization: Bearer " + CLIENT, "api-key: " + CLIENT, "x-api-key: " + CLIENT, f"api-key: {CLIENT}x")
            replies = [await server.post("m", line) for line in lines]
            server.server.access.flush()
        assert [answer.status for answer in replies][2:] == [200, 401]
        shown = "".join(str(answer.fields) for answer in (*replies, *upstream.seen)) + logged.getvalue() + "".join(server.lines)
        assert CLIENT not in shown


def test_reports_show_no_secret(tmp_path: Path) -> None:
    """--check, the summary of a reload, reprs of the configuration and error messages name no secret."""
    data = configuration(tmp_path, "http://127.0.0.1:1/v1")
    config = app.parse_config(data, "test", {"SOME_KEY": NAMED})
    empty = app.parse_config({"controllers": app.demo_controllers()}, "test", {})
    shown = [*app.describe(config), *app.diff_config(empty, config), *app.diff_config(config, empty), repr(config)]
    for path in ("controllers.0.config.base_url", "controllers.1.config.proxy", "controllers.0.config.ca_file", "log.level"):
        broken = json.loads(json.dumps(data))
        *parents, last = path.split(".")
        inner: Any = broken
        for step in parents:
            inner = inner[int(step) if step.isdigit() else step]
        inner[last] = f"ftp://user:{PASSWORD}@host/?key={LITERAL}"
        with pytest.raises(app.ConfigError) as caught:
            app.parse_config(broken, "test", {"SOME_KEY": NAMED})
        shown += [str(caught.value), "".join(traceback.format_exception(caught.value, chain=False))]
    assert shown_in("\n".join(shown)) == []


async def test_tracebacks_and_the_log_of_asyncio_are_cleaned(tmp_path: Path, logged: io.StringIO) -> None:
    """A secret in an exception's message is struck out, also where asyncio writes the record."""
    set_up(configuration(tmp_path, "http://127.0.0.1:1/v1"), logged)
    for name in (app.log.name, "asyncio"):
        try:
            raise ValueError("cannot use " + ECHO)
        except ValueError:
            logging.getLogger(name).exception("failed: %s", LITERAL)
    assert logged.getvalue().count("Traceback") == 2 and shown_in(logged.getvalue()) == []


GOOD_ERROR = json.dumps({"error": {"message": f"key {LITERAL} is wrong", "code": "bad"}}).encode()


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(GOOD_ERROR)),
        ("Deflate", zlib.compress(GOOD_ERROR)[2:-4]),
        ("br", b"\x0b\x02\x80" + LITERAL.encode()),
        ("gzip", b"no gzip " + LITERAL.encode()),
        ("gzip", gzip.compress(b"0" * 50_000_000)),
        ("gzip, gzip", gzip.compress(gzip.compress(GOOD_ERROR))),
        ("deflate", b""),
    ],
)
async def test_a_compressed_error_shows_no_secret(coding: str, body: bytes) -> None:
    """An error that was compressed unasked keeps its status, comes uncompressed and shows no key; a bomb takes no memory."""
    async with Upstream(answers(reply(400, body, "Content-Encoding: " + coding))) as upstream:
        async with Running(controller("a", upstream.url, account={"api_key": LITERAL})) as server:
            tracemalloc.start()
            answer = await server.post("m")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert answer.status == 400 and shown_in(answer.body) == [] and peak < 2_000_000
            if body:
                assert answer.json()["error"]["message"] and "content-encoding" not in answer.headers
