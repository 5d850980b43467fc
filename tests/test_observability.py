"""Logs: one line for each request whatever clients send, no secrets, and a writer that never delays an answer."""

import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply, until

KEY = "sk-proj-" + "Abcd1234" * 6 + "wxyz"
WAIT_MS = 10_000  # real time that the log thread may take


def record(model: str = "gpt", path: str = "/v1/x", key: str = "") -> app.AccessRecord:
    """Return a finished request."""
    made = app.AccessRecord("127.0.0.1", "POST", path, 10.0)
    made.model, made.key, made.controller, made.status, made.bytes = model, key, "a", 502, 7
    made.request_id, made.upstream_id, made.code, made.usage = "req_1", "up-1", "server_error", app.Usage(12, 5, 7, 3)
    made.until, made.first_at, made.waited_s = 11.0, 10.5, 0.25
    made.attempts = [app.AttemptRecord("a", "fault", 0.1, "gpt", 500, 'it "broke"'), app.AttemptRecord("b", "rate", 0.2, "gpt-2", 429)]
    return made


def line(record: app.AccessRecord, as_json: bool = False) -> str:
    """Return a request's line at a fixed time."""
    formatter = app.LineFormatter()
    formatter.as_json = as_json
    return formatter.access(record, 1764581400.9876)


def test_text_line() -> None:
    """Every field that is known stands on the line; failed attempts come last, with their reasons."""
    assert line(record(key="alice")) == (
        "2025-12-01T09:30:00.987Z INFO request client=127.0.0.1 method=POST path=/v1/x status=502 code=server_error model=gpt"
        " sent=gpt-2 controller=a key=alice in=5 out=7 cached=3 wait_ms=250 first_ms=500.0 ms=1000.0 bytes=7 id=req_1"
        ' upstream_id=up-1 attempts=2 tried=a:fault:100,b:rate:200 why="a: it \\"broke\\""\n'
    )
    unknown = app.AccessRecord("::1", "-", "-", 1.0, until=1.0)
    unknown.attempts = [app.AttemptRecord("a", "ok", 0.1)]
    text = "2025-12-01T09:30:00.987Z INFO request client=::1 method=- path=- status=0 first_ms=0.0 ms=0.0 bytes=0 attempts=1\n"
    assert line(unknown) == text


def test_json_line() -> None:
    """The JSON line has the same fields under OpenTelemetry's names, null where there is no value."""
    attempts = [("a", "fault", 100.0, "gpt", 500, 'it "broke"'), ("b", "rate", 200.0, "gpt-2", 429, "")]
    names = ("controller", "outcome", "ms", "model", "status", "reason")
    assert json.loads(line(record(), True)) == {
        "timestamp": "2025-12-01T09:30:00.987Z", "severity_text": "INFO", "body": "request", "client.address": "127.0.0.1",
        "http.request.method": "POST", "url.path": "/v1/x", "http.response.status_code": 502, "error.type": "server_error",
        "gen_ai.request.model": "gpt", "model_sent": "gpt-2", "controller": "a", "client_key": None, "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7, "gen_ai.usage.cache_read.input_tokens": 3, "wait_ms": 250, "first_ms": 500.0, "ms": 1000.0,
        "http.response.body.size": 7, "request_id": "req_1", "upstream_id": "up-1", "trace_id": None,
        "attempts": [dict(zip(names, values, strict=True)) for values in attempts],
    }


@pytest.mark.parametrize("text", ["x\nT 127.0.0.1 GET /", "x model=evil", "x\r\n", "x\x1b[31m", "x\u2028y", "x\\n", "\ud800", "☃ b"])
def test_lines_cannot_be_forged(text: str) -> None:
    """Text of a client stays one word of one ASCII line, and a JSON line returns it unchanged."""
    good, forged = (line(record(value, "/" + value, value)) for value in ("x", text))
    assert forged.isascii() and forged[:-1].isprintable() and len(forged.splitlines()) == 1
    assert [word.partition("=")[0] for word in forged.split()] == [word.partition("=")[0] for word in good.split()]
    as_json = line(record(text, "/" + text), True)
    assert len(as_json.splitlines()) == 1 and as_json.isascii()
    assert (json.loads(as_json)["gen_ai.request.model"], json.loads(as_json)["url.path"]) == (text, "/" + text)


def test_other_lines_have_the_same_form() -> None:
    """An event has the same time format; as JSON it is one object, with its traceback."""
    formatter = app.LineFormatter()
    made = logging.LogRecord("x", logging.ERROR, "", 1, "broken: %s", ("a",), None)
    made.created, made.exc_text = 1764581400.001, "Traceback:\n  x"
    assert formatter.format(made) == "2025-12-01T09:30:00.001Z ERROR broken: a\nTraceback:\n  x"
    formatter.as_json = True
    assert json.loads(formatter.format(made)) == {
        "timestamp": "2025-12-01T09:30:00.001Z", "severity_text": "ERROR", "body": "broken: a", "exception.stacktrace": "Traceback:\n  x",
    }


@pytest.mark.parametrize(
    ("log", "statuses"),
    [({}, [200, 404]), ({"access": "errors"}, [404]), ({"access": "off"}, []), ({"monitoring": True}, [200, 404, 200])],
)
async def test_which_requests_are_logged(log: dict[str, Any], statuses: list[int]) -> None:
    """Calls about the server itself have no line, unless they are asked for."""
    async with Running(log=log) as server:
        await server.post("echo")
        await server.post("nothing")
        await server.status()
        assert [int(re.findall(r" status=(\d+) ", text)[0]) for text in server.access_lines()] == statuses


@pytest.mark.parametrize("as_json", [False, True])
async def test_prompts_are_never_logged(as_json: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a prompt nor an answer, nor an account's message that quotes the prompt, is in any line."""
    monkeypatch.setattr(app.formatter, "as_json", as_json)
    quoted = error_reply(400, "invalid_prompt", "this is not allowed: SECRET-PROMPT")
    answer = json_reply(200, {**ANSWER, "choices": [{**ANSWER["choices"][0], "message": {"content": "SECRET-ANSWER"}}]})
    messages = [{"role": "user", "content": "SECRET-PROMPT"}]
    with caplog.at_level(logging.DEBUG, "chatgpt_apiserver"):
        async with Upstream(answers(quoted, answer)) as upstream, Running(controller("a", upstream.url)) as server:
            statuses = [(await server.post("m", messages=messages)).status for _ in range(2)]
            text = "".join(server.access_lines())
    assert statuses == [400, 200] and "SECRET" not in text and "SECRET" not in caplog.text and "client" in text


async def test_ids_of_a_request() -> None:
    """A sane id of the client is kept, its trace is passed on, and the account's own id is logged."""
    reply = json_reply(200, ANSWER, "x-request-id: up-77")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with Upstream(answers(reply)) as upstream, Running(controller("a", upstream.url)) as server:
        answer = await server.post("m", "x-request-id: my-id.7", "traceparent: " + trace)
        assert answer.headers["x-apiserver-request-id"] == "my-id.7" and answer.headers["x-request-id"] == "up-77"
        assert upstream.seen[0].headers["traceparent"] == trace
        (text,) = server.access_lines()
        assert f" id=my-id.7 upstream_id=up-77 trace_id={trace[3:35]} " in text
        for bad in ("a b", "x" * 129, "a,b", ""):
            answer = await server.post("m", "x-request-id: " + bad)
            assert answer.headers["x-apiserver-request-id"].startswith("req_"), bad


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("10.9.9.9, 203.0.113.9, 10.1.2.3", "203.0.113.9"),
        ("1.1.1.1, 203.0.113.9:4711", "203.0.113.9"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("2001:db8::1,10.1.2.3", "2001:db8::1"),
        ("10.7.7.7", "10.7.7.7"),
        ("evil\\x, 10.1.2.3", "10.1.2.3"),
        ("", "127.0.0.1"),
        ("unknown", "127.0.0.1"),
    ],
)
async def test_the_address_behind_trusted_proxies(forwarded: str, client: str) -> None:
    """The last address that no trusted proxy has is the client's; without trust the header means nothing."""
    for trusted, expected in ((["127.0.0.1", "10.0.0.0/8"], client), (["192.0.2.0/24"], "127.0.0.1")):
        async with Running(trusted_proxies=trusted) as server:
            await server.post("echo", "X-Forwarded-For: " + forwarded)
            assert f" client={expected} " in server.access_lines()[0]


async def test_clients_behind_a_proxy_are_counted_one_by_one() -> None:
    """connections_per_client counts the requests of each client of a trusted proxy, not the proxy's connections."""
    limits = {"connections_per_client": 1}
    async with Upstream(lambda peer, _: peer.gone()) as upstream:
        async with Running(controller("a", upstream.url), limits=limits, trusted_proxies=["127.0.0.1"]) as server:
            first = await server.open()
            await first.post("m", "X-Forwarded-For: 203.0.113.1")
            await until(lambda: upstream.seen)
            refused = await server.post("m", "X-Forwarded-For: 203.0.113.1")
            assert (refused.status, refused.json()["error"]["code"]) == (503, "too_many_connections")
            assert (await server.post("", "X-Forwarded-For: 203.0.113.2")).status == 400
            first.close()
            await until(lambda: not server.server.per_peer["203.0.113.1"])
            assert (await server.post("", "X-Forwarded-For: 203.0.113.1")).status == 400


async def test_debug_lines_explain_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    """With log.level debug the log says why a request went to its account."""
    async with Upstream(answers(json_reply(200, ANSWER))) as upstream:
        full = controller("a", upstream.url, limits={"rpm": 1})
        async with Running(full, controller("b", upstream.url), pool={"type": "priority"}) as server:
            with caplog.at_level(logging.DEBUG, "chatgpt_apiserver"):
                for number in range(2):
                    await server.post("m", f"x-request-id: r-{number}")
    said = [message for message in caplog.messages if message.startswith("r-")]
    assert said[0] == "r-0: m by priority: a chosen, b has room, 0 in flight"
    assert re.fullmatch(r"r-1: m by priority: a full for [\d.]+ s, b chosen", said[1])


def test_log_records_are_cleaned() -> None:
    """A secret in a message or its arguments leaves the last four letters; values that are too short stay."""
    redactor = app.Redactor()
    redactor.watch([KEY, "short", ""])
    made = logging.LogRecord("x", logging.INFO, "", 1, "short %s and " + KEY, (KEY,), None)
    assert redactor.filter(made)
    assert made.getMessage() == "short sk-…wxyz and sk-…wxyz"


@pytest.mark.parametrize(
    ("secrets", "text", "scrubbed"),
    [
        ([KEY], f'{{"message":"Incorrect API key provided: {KEY}. You"}}', '{"message":"Incorrect API key provided: ***. You"}'),
        (["secret-1", "secret-1-and-more"], "x secret-1-and-more, secret-1", "x ***, ***"),
        (['pass"word\\'], json.dumps({"a": 'pass"word\\'}), '{"a": "***"}'),
        ([KEY, "ollama"], "keys look like sk-... or sk-proj-***; ask ollama", None),
        ([], KEY, None),
    ],
)
def test_upstream_bytes_are_scrubbed(secrets: list[str], text: str, scrubbed: str | None) -> None:
    """Whole secrets go, the longest first and in JSON's spelling too; other text and a local server's dummy key stay."""
    redactor = app.Redactor()
    redactor.watch(secrets)
    assert redactor.scrub(text.encode()).decode() == (text if scrubbed is None else scrubbed)
    assert redactor.clean(text) == text if scrubbed is None else all(secret not in redactor.clean(text) for secret in secrets)


@contextmanager
def writer_on(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[app.LogWriter]:
    """Yield a LogWriter whose stderr is an open file; close both at the end."""
    stderr = os.fdopen(descriptor, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stderr)
    log_writer = app.LogWriter(app.LineFormatter())
    log_writer.open()
    yield log_writer
    log_writer.send(WAIT_MS)
    stderr.close()


def lines(first: int, count: int) -> str:
    """Return numbered log lines."""
    return "".join([f"line {number} {'x' * 100}\n" for number in range(first, first + count)])


def read_lines(descriptor: int, ending: str) -> list[str]:
    """Read lines until one ends with `ending`."""
    text = ""
    while not (text.endswith("\n") and text.splitlines()[-1].endswith(ending)):
        text += os.read(descriptor, 65536).decode()
    return text.splitlines()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("batch", [1, 100])
def test_a_log_without_a_reader(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing never blocks and keeps a bounded queue; a later reader gets the first lines, the number of the dropped, the next."""
    reading, writing = (end.detach() for end in socket.socketpair()) if kind == "socket" else os.pipe()
    with writer_on(writing, monkeypatch) as log_writer:
        for first in range(0, 20_000, batch):
            log_writer.write(lines(first, batch))
            assert len(log_writer.waiting) <= app.LOG_QUEUE_BYTES
        *whole, note = read_lines(reading, "in time")
        assert [line.split()[1] for line in whole] == [str(number) for number in range(len(whole))]
        dropped = re.fullmatch(r"\S+ WARNING (\d+) log lines dropped: they were not read or stored in time", note)
        assert dropped is not None and len(whole) + int(dropped[1]) == 20_000 and len(whole) > 2000
        log_writer.write("next\n")
        assert read_lines(reading, "next") == ["next"]
        os.close(reading)
        for _ in range(3):  # without any reader lines are lost, and nothing waits
            log_writer.write(lines(0, batch))
        log_writer.send(WAIT_MS)
        assert not log_writer.waiting


@pytest.mark.parametrize("blocks", [True, False])
def test_a_slow_reader_loses_no_line(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines wait for the reader, also if another process set O_NONBLOCK on stderr; `send` waits no longer than asked."""
    reading, writing = os.pipe()
    os.set_blocking(writing, blocks)
    with writer_on(writing, monkeypatch) as log_writer:
        log_writer.write(lines(0, 1999) + "end\n")
        began = time.monotonic()
        log_writer.send(20)
        assert log_writer.waiting and 0.02 <= time.monotonic() - began < 5
        assert read_lines(reading, "end") == [*lines(0, 1999).splitlines(), "end"]
    os.close(reading)


def test_a_log_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets every line, and characters that UTF-8 cannot hold are escaped."""
    with writer_on(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), monkeypatch) as log_writer:
        log_writer.write(lines(0, 2000))
        log_writer.write("\ud800\n")
        log_writer.send(WAIT_MS)
        assert (tmp_path / "log").read_text() == lines(0, 2000) + "\\ud800\n"


def test_no_log_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stderr, and with one that cannot be written, lines are discarded without an error."""
    monkeypatch.setattr(sys, "stderr", None)
    log_writer = app.LogWriter(app.LineFormatter())
    log_writer.open()
    log_writer.write("a\n")
    log_writer.send(WAIT_MS)
    if Path("/dev/full").exists():
        with writer_on(os.open("/dev/full", os.O_WRONLY), monkeypatch) as log_writer:
            log_writer.write("a\n")
            log_writer.send(WAIT_MS)
            assert not log_writer.waiting
