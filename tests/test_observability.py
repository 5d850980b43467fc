"""Logs: one line per request whatever clients send, and no secrets."""

import json
import logging

import pytest

import chatgpt_apiserver as app

KEY = "sk-proj-" + "Abcd1234" * 6 + "wxyz"


def record(model: str = "gpt", path: str = "/v1/x", key: str = "") -> app.AccessRecord:
    """A finished request."""
    found = app.AccessRecord("127.0.0.1", "POST", path, 10.0)
    found.model, found.key, found.controller, found.status, found.bytes = model, key, "a", 502, 7
    found.first_at, found.waited_s, found.outcomes = 10.5, 0.25, [("a", "fault", 0.1), ("b", "rate", 0.2)]
    return found


def test_text_line() -> None:
    """Every field stands where tools look for it."""
    assert app.text_line(record(key="alice"), "T", 11.0) == (
        "T 127.0.0.1 POST /v1/x 502 model=gpt controller=a attempts=2 first_ms=500.0 ms=1000.0 bytes=7"
        " key=alice wait_ms=250 tried=a:fault:100,b:rate:200\n"
    )


FORGED = ["x\nT 127.0.0.1 GET /", "x model=evil", "x\r\n", "x\x1b[31m", "x\u2028y", "x\\n", "\ud800", "☃ b"]


@pytest.mark.parametrize("text", FORGED)
def test_text_line_cannot_be_forged(text: str) -> None:
    """What a client writes stays one word of one line of plain ASCII."""
    plain, forged = (app.text_line(record(t, "/" + t, t), "T", 11.0) for t in ("x", text))
    assert forged.isascii()
    assert forged[:-1].isprintable()
    assert len(forged.splitlines()) == 1
    assert [word.partition("=")[0] for word in forged.split()[5:]] == [w.partition("=")[0] for w in plain.split()[5:]]


@pytest.mark.parametrize("text", FORGED)
def test_json_line_cannot_be_forged(text: str) -> None:
    """The JSON line is one line, and gives back what was sent."""
    line = app.json_line(record(text, "/" + text), "T", 11.0)
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


def test_scrub_leaves_other_bodies() -> None:
    """What holds no secret comes out byte by byte."""
    redactor = app.Redactor()
    redactor.watch([KEY])
    body = b'{"error":"sk- *** **bold** \xff ... wxyz"}'
    assert redactor.scrub(body) == body
