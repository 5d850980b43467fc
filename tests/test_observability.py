"""Logs: one line per request whatever clients send, and no secrets."""

import json
import logging
import time

import pytest

import chatgpt_apiserver as app

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
