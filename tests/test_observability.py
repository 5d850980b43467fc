"""Logs: one line per request whatever clients send, and no secrets."""

import asyncio
import json
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest

import chatgpt_apiserver as app

from .wirefeed import turns

KEY = "sk-proj-" + "Abcd1234" * 6 + "wxyz"


def record(model: str = "gpt", path: str = "/v1/x", key: str = "") -> app.AccessRecord:
    """A finished request."""
    found = app.AccessRecord("127.0.0.1", "POST", path, 10.0)
    found.model, found.key, found.controller, found.status, found.bytes = model, key, "a", 502, 7
    found.until = 11.0
    found.first_at, found.waited_s, found.outcomes = 10.5, 0.25, [("a", "fault", 0.1), ("b", "rate", 0.2)]
    return found


def test_text_line() -> None:
    """Every field stands where tools look for it."""
    assert app.text_line(record(key="alice"), "T") == (
        "T 127.0.0.1 POST /v1/x 502 model=gpt controller=a attempts=2 first_ms=500.0 ms=1000.0 bytes=7"
        " key=alice wait_ms=250 tried=a:fault:100,b:rate:200\n"
    )


FORGED = ["x\nT 127.0.0.1 GET /", "x model=evil", "x\r\n", "x\x1b[31m", "x\u2028y", "x\\n", "\ud800", "☃ b"]


@pytest.mark.parametrize("text", FORGED)
def test_text_line_cannot_be_forged(text: str) -> None:
    """What a client writes stays one word of one line of plain ASCII."""
    plain, forged = (app.text_line(record(t, "/" + t, t), "T") for t in ("x", text))
    assert forged.isascii()
    assert forged[:-1].isprintable()
    assert len(forged.splitlines()) == 1
    assert [word.partition("=")[0] for word in forged.split()[5:]] == [w.partition("=")[0] for w in plain.split()[5:]]


@pytest.mark.parametrize("text", FORGED)
def test_json_line_cannot_be_forged(text: str) -> None:
    """The JSON line is one line, and gives back what was sent."""
    line = app.json_line(record(text, "/" + text), "T")
    assert len(line.splitlines()) == 1
    assert line.isascii()
    found = json.loads(line)
    assert (found["model"], found["path"], found["controller"]) == (text, "/" + text, "a")
    assert found["attempts"][1] == {"controller": "b", "outcome": "rate", "ms": 200.0}


def test_log_records_are_cleaned() -> None:
    """A secret in a message or its arguments leaves the last four letters."""
    redactor = app.Redactor()
    redactor.watch([KEY, "short", ""])
    made = logging.LogRecord("x", logging.INFO, "", 1, "short %s and " + KEY, (KEY,), None)
    assert redactor.filter(made)
    assert made.getMessage() == "short sk-…wxyz and sk-…wxyz"


def test_longer_secrets_first() -> None:
    """A secret that begins like another leaves no tail behind."""
    redactor = app.Redactor()
    redactor.watch(["secret-1", "secret-1-and-more"])
    assert "more" not in redactor.clean("x secret-1-and-more y")[:-8]
    assert "and-" not in redactor.clean("x secret-1-and-more y")


@pytest.mark.parametrize("key", [KEY, "sk-" + "Abcd1234" * 6, "sk-svcacct-" + "Abcd1234" * 8])
@pytest.mark.parametrize("shape", ["whole", "stars", "short", "ellipsis"])
def test_scrub(key: str, shape: str) -> None:
    """A provider's echo of a key, whole or masked, goes; the rest of the body stays."""
    echo = {
        "whole": key,
        "stars": key[:8] + "*" * (len(key) - 12) + key[-4:],
        "short": key[:3] + "****" + key[-4:],
        "ellipsis": key[:3] + "…" + key[-4:],
    }[shape]
    redactor = app.Redactor()
    redactor.watch([key])
    body = '{"error":{"message":"Incorrect API key provided: %s. You can find it.","code":"invalid_api_key"}}'
    assert redactor.scrub((body % echo).encode()).decode() == body % "***"


@pytest.mark.parametrize("stars", ["***", "*" * 40, "*" * 300, "...", "…", "•" * 9, "***...***", "\\u2026"])
@pytest.mark.parametrize("letters", [3, 4, 5, 8, 9, 12, 20])
@pytest.mark.parametrize("before", [" ", '"', "=", "\\n"])
def test_scrub_masks(before: str, letters: int, stars: str) -> None:
    """However many first letters are shown, and by whatever mask, the last four go with them."""
    redactor = app.Redactor()
    redactor.watch([KEY[:3] + KEY[8:]])
    body = "Incorrect API key provided:%s%s%s. You can find"
    echo = (KEY[:3] + KEY[8:])[:letters] + stars + KEY[-4:]
    assert redactor.scrub((body % (before, echo, "")).encode()).decode() == body % (before, "***", "")


def test_scrub_of_most_of_a_key() -> None:
    """A dozen letters of a key go whatever follows the mask; a secret with quotes goes as JSON spells it."""
    redactor = app.Redactor()
    redactor.watch([KEY, 'pass"word\\'])
    assert redactor.scrub(("x %s*** y" % KEY[:12]).encode()) == b"x *** y"
    assert redactor.scrub(json.dumps({"a": 'pass"word\\'}).encode()) == b'{"a": "***"}'


@pytest.mark.parametrize(
    "body",
    [
        '{"error":"sk- *** **bold** \xff ... wxyz"}',
        "keys look like sk-proj-... or sk-***, and end; see task-1...wxyz, sk-ip...wxy and sk-...z",
        "sk-proj-*** is masked",
        "a high-level-risk-*** remains",
        "ask ollama...",
        "*" * 100 + "." * 100,
    ],
)
def test_scrub_leaves_other_bodies(body: str) -> None:
    """What holds no secret comes out byte by byte; a dummy key of a local server is none."""
    redactor = app.Redactor()
    redactor.watch([KEY, "ollama"])
    assert redactor.scrub(body.encode("latin-1")) == body.encode("latin-1")
    assert redactor.clean(body) == body


@pytest.mark.parametrize("piece", ["sk-", "sk-***", "sk-a*** ", "*", ".", "a", "…", "sk-abcd***wxy ", "sk-proj-Abcd***wxyz"])
def test_scrub_is_linear(piece: str) -> None:
    """Four times the body takes about four times as long, whatever it is made of and however many secrets there are."""
    redactor = app.Redactor()
    redactor.watch([KEY, *("sk-%040d" % number for number in range(20))])

    def seconds(size: int) -> float:
        body = (piece * size)[:size].encode()
        since = time.process_time()
        redactor.scrub(body)
        return time.process_time() - since

    short, long = (min(seconds(size) for _ in range(3)) for size in (40_000, 160_000))
    assert long < 10 * short + 0.01


def console_on(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> app.Console:
    """The console of a process whose stderr is this open file."""
    monkeypatch.setattr(sys, "stderr", os.fdopen(descriptor, "w", encoding="utf-8"))
    console = app.Console()
    console.open()
    return console


def lines(first: int, count: int) -> str:
    """As many log lines, numbered."""
    return "".join("line %d %s\n" % (number, "x" * 100) for number in range(first, first + count))


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("batch", [1, 100, 10_000])
async def test_a_log_that_nobody_reads(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing never blocks and keeps little; a reader that comes gets the first lines whole, how many are missing, the next."""
    one, two = (end.detach() for end in socket.socketpair()) if kind == "socket" else os.pipe()
    console = console_on(two, monkeypatch)
    for first in range(0, 20_000, batch):
        console.write(lines(first, batch))
        assert len(console.kept) <= app.LOG_KEPT_BYTES
    found = ""
    while "dropped" not in found:
        found += os.read(one, 65536).decode()
        await turns(3)
    *whole, note = found.splitlines()
    assert [line.split()[1] for line in whole] == [str(number) for number in range(len(whole))]
    told = re.fullmatch(r"\S+ WARNING (\d+) lines dropped: nobody read them", note)
    assert told is not None and len(whole) + int(told[1]) == 20_000 and len(whole) > 2000
    console.write("next\n")
    assert os.read(one, 65536) == b"next\n" and not console.watched
    os.close(one)
    for _ in range(3):
        console.write(lines(0, batch))
        await turns(3)
    assert (len(console.kept), console.dropped, console.watched) == (0, 3 * batch, False)
    sys.stderr.close()


async def test_a_slow_reader_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept goes out as the reader takes it, without another line; at the end it is waited for a little."""
    one, two = os.pipe()
    console = console_on(two, monkeypatch)
    console.write(lines(0, 2000))
    assert console.kept and console.watched
    found = b""
    while console.kept:
        found += os.read(one, 4096)
        await turns(3)
    while len(found) < len(lines(0, 2000)):
        found += os.read(one, 4096)
    assert found.decode() == lines(0, 2000) and not console.watched
    console.write(lines(0, 2000))
    reader = asyncio.get_running_loop().run_in_executor(None, Path("/dev/fd/%d" % one).read_text)
    console.send(10_000)
    sys.stderr.close()
    assert await reader == lines(0, 2000)
    os.close(one)


def test_a_log_before_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start whose first lines fill the pipe goes on."""
    one, two = os.pipe()
    console = console_on(two, monkeypatch)
    console.write(lines(0, 2000))
    kept = len(console.kept)
    os.read(one, 65536)
    console.write("more\n")
    assert kept and len(console.kept) < kept
    sys.stderr.close()
    os.close(one)


def test_a_log_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regular file gets every line at once."""
    console = console_on(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), monkeypatch)
    console.write(lines(0, 10_000))
    assert console.poll is None and (tmp_path / "log").read_text() == lines(0, 10_000)
    sys.stderr.close()


def test_no_log_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start with stderr closed serves in silence, and no client's socket gets its number, and with it the log."""
    monkeypatch.setattr(sys, "stderr", None)
    console = app.Console()
    console.open()
    console.write("a\n")
    closed = os.dup(1)
    stderr = os.fdopen(closed, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    os.close(closed)
    console.open()
    console.write("a\n")
    with socket.socket() as other:
        assert other.fileno() != closed
    stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written is no reason to fail."""
    console = console_on(os.open("/dev/full", os.O_WRONLY), monkeypatch)
    console.write("a\n")
    with pytest.raises(OSError, match="No space"):
        sys.stderr.close()
