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

import pytest

import chatgpt_apiserver as app

KEY = "sk-proj-" + "Abcd1234" * 6 + "wxyz"
WAIT_MS = 10_000  # real time that the log thread may take


def record(model: str = "gpt", path: str = "/v1/x", key: str = "") -> app.AccessRecord:
    """Return a finished request."""
    made = app.AccessRecord("127.0.0.1", "POST", path, 10.0)
    made.model, made.key, made.controller, made.status, made.bytes = model, key, "a", 502, 7
    made.until, made.first_at, made.waited_s = 11.0, 10.5, 0.25
    made.attempts = [app.AttemptRecord("a", "fault", 0.1), app.AttemptRecord("b", "rate", 0.2)]
    return made


def test_text_line() -> None:
    """Fields keep their places; rare ones come last, and only when they have a value."""
    assert app.text_line(record(key="alice"), "T") == (
        "T 127.0.0.1 POST /v1/x 502 model=gpt controller=a attempts=2 first_ms=500.0 ms=1000.0 bytes=7"
        " key=alice wait_ms=250 tried=a:fault:100,b:rate:200\n"
    )
    unknown = app.AccessRecord("::1", "-", "-", 1.0, until=1.0)
    assert app.text_line(unknown, "T") == "T ::1 - - 0 model=- controller=- attempts=0 first_ms=0.0 ms=0.0 bytes=0\n"
    unknown.attempts = [app.AttemptRecord("a", "ok", 0.1)]
    assert app.text_line(unknown, "T").endswith(" attempts=1 first_ms=0.0 ms=0.0 bytes=0\n")


def test_json_line() -> None:
    """The JSON line has every field, null where there is no value."""
    assert json.loads(app.json_line(record(), "T")) == {
        "time": "T", "client": "127.0.0.1", "method": "POST", "path": "/v1/x", "status": 502, "model": "gpt", "controller": "a",
        "attempts": [{"controller": "a", "outcome": "fault", "ms": 100.0}, {"controller": "b", "outcome": "rate", "ms": 200.0}],
        "first_ms": 500.0, "ms": 1000.0, "wait_ms": 250, "bytes": 7, "key": None, "request_id": None,
    }


@pytest.mark.parametrize("text", ["x\nT 127.0.0.1 GET /", "x model=evil", "x\r\n", "x\x1b[31m", "x\u2028y", "x\\n", "\ud800", "☃ b"])
def test_lines_cannot_be_forged(text: str) -> None:
    """Text of a client stays one word of one ASCII line, and a JSON line returns it unchanged."""
    good, forged = (app.text_line(record(value, "/" + value, value), "T") for value in ("x", text))
    assert forged.isascii() and forged[:-1].isprintable() and len(forged.splitlines()) == 1
    assert [word.partition("=")[0] for word in forged.split()[5:]] == [word.partition("=")[0] for word in good.split()[5:]]
    line = app.json_line(record(text, "/" + text), "T")
    assert len(line.splitlines()) == 1 and line.isascii()
    assert (json.loads(line)["model"], json.loads(line)["path"]) == (text, "/" + text)


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
    log_writer = app.LogWriter()
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
        dropped = re.fullmatch(r"\S+ WARNING (\d+) log lines dropped: stderr was not read in time", note)
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
    log_writer = app.LogWriter()
    log_writer.open()
    log_writer.write("a\n")
    log_writer.send(WAIT_MS)
    if Path("/dev/full").exists():
        with writer_on(os.open("/dev/full", os.O_WRONLY), monkeypatch) as log_writer:
            log_writer.write("a\n")
            log_writer.send(WAIT_MS)
            assert not log_writer.waiting
