"""The page for browsers: what it may load, what it reads, and that text of clients stays text."""

import asyncio
import base64
import contextlib
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, KEY, Running, Upstream, answers, controller, error_reply, json_reply

NASTY = '</script><img src=x onerror=alert(1)>"\'&<b>'
LIMITED = error_reply(429, "rate_limit_exceeded", "slow down", "Retry-After: 60")


def digest(text: str) -> str:
    """Return the source of a Content-Security-Policy for an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


async def test_the_page_of_a_browser_and_of_curl() -> None:
    """A browser gets the page, whatever keys are configured; curl gets a short text; HEAD has no body."""
    async with Running(client_keys=[{"key": KEY}]) as server:
        page = await server.ask("GET", "/", b"", "Accept: text/html,*/*;q=0.8")
        text = await server.ask("GET", "/", b"", "Accept: */*")
        head = await server.ask("HEAD", "/", b"", "Accept: text/html")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.body.startswith(b"<!doctype html>")
    assert text.headers["content-type"].startswith("text/plain") and len(text.body.splitlines()) <= 6
    assert head.status == 200 and head.headers["content-type"].startswith("text/html")


async def test_nothing_from_elsewhere() -> None:
    """The policy allows the page's own style and script by their digests, and calls of this server alone."""
    async with Running() as server:
        page = await server.ask("GET", "/", b"", "Accept: text/html")
    html, policy = page.body.decode(), page.headers["content-security-policy"]
    (style,), (script,) = (re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("style", "script"))
    assert f"style-src {digest(style)};" in policy and f"script-src {digest(script)};" in policy
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    urls = re.findall(r"(?:https?:)?//[\w.]+", html.replace("http://www.w3.org/2000/svg", ""))
    assert not urls and not re.search(r"\son\w+=|\sstyle=|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", html)
    assert page.headers["cache-control"] == "no-store" and page.headers["x-content-type-options"] == "nosniff"


async def test_what_the_page_reads() -> None:
    """Every field of the status that the script reads is there, in the shape that it needs."""
    async with Upstream(answers(LIMITED)) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        accounts = [controller("a", one.url), controller("b", two.url, limits={"rpm": 60, "tpm": 9000})]
        async with Running(*accounts, pool={"type": "priority"}) as server:
            await server.post(NASTY)
            await server.post("m")
            status: dict[str, Any] = (await server.ask("GET", "/status?verbose=1&history=1")).json()
    history = status["history"]
    for name in set(re.findall(r"\bstatus\.(\w+)", app.PAGE_SCRIPT)) - {"error"}:
        assert name in status, name
    for name in set(re.findall(r"\b(?:h|status\.history)\.(\w+)", app.PAGE_SCRIPT)):
        assert name in history, name
    for name in set(re.findall(r"\bc\.(\w+)", app.PAGE_SCRIPT)):
        assert name in status["controllers"][0], name
    for name in set(re.findall(r"\br\.(\w+)", app.PAGE_SCRIPT)):
        assert name in history["recent"][0], name
    for name in set(re.findall(r"\ba\.(\w+)", app.PAGE_SCRIPT)):
        assert name in history["recent"][0]["attempts"][0], name
    for name in set(re.findall(r"\bu\.(\w+)", app.PAGE_SCRIPT)):
        assert name in status["usage_today"][0], name
    assert [len(history[name]) for name in ("requests", "failed", "tokens", "avoided")] == [60] * 4
    assert (sum(history["requests"]), sum(history["avoided"]), sum(history["failed"])) == (2, 2, 0)
    assert history["recent"][1]["model"] == NASTY
    first = history["recent"][1]["attempts"]
    assert [(one["controller"], one["outcome"]) for one in first] == [("a", "rate"), ("b", "ok")]
    assert sum(history["controllers"]["b"]["answered"]) == 2 and history["first_byte_ms"]["p50"] > 0


def test_the_history_is_bounded() -> None:
    """Fifty requests and ten minutes are kept, however many come."""
    history = app.History()
    for number in range(5000):
        record = app.AccessRecord("::1", "POST", "/", 1.0, controller="a", status=200, first_at=1.5, until=2.0)
        record.attempts = [app.AttemptRecord("a", "ok", 0.1)]
        history.add(record, 1000.0 + number)
    told = history.describe(["a", "b"], 5999.0)
    assert len(told["recent"]) == 50 and told["requests"] == [10] * 60 and told["controllers"]["b"]["answered"] == [0] * 60


@contextlib.contextmanager
def browser() -> Iterator[str]:
    """Yield the path of a Chromium; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here")
    yield found


async def test_text_of_clients_stays_text(tmp_path: Path) -> None:
    """In a browser a model's name with markup is shown, and makes no element; the script ends without an error."""
    with browser() as chromium:
        async with Upstream(answers(json_reply(200, ANSWER))) as up, Running(controller("a", up.url)) as server:
            await server.post(NASTY)
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--enable-logging=stderr"]
            command = [chromium, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"http://127.0.0.1:{server.port}/"]
            ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in ended.stdout and "<img" not in ended.stdout
    assert 'id="main">' in ended.stdout and "CONSOLE" not in ended.stderr, ended.stderr[-2000:]
