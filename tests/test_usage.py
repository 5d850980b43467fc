"""Usage and cost: what is counted, where it is stored, and what a restart remembers."""

import asyncio
import contextlib
import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, DONE, KEY, Message, Peer, Running, Upstream, answers, controller, error_reply, event, json_reply, sse_reply
from .test_signals import PROGRAM, Program

ADMIN = "client-key-of-an-admin"
KEYS = [{"name": "alice", "key": KEY}, {"name": "boss", "key": ADMIN, "admin": True}]
PRICES = {"m-1": {"input": 2, "cached": 0.5, "output": 8}, "m-*": {"input": 1, "output": 1}}
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500, "prompt_tokens_details": {"cached_tokens": 400}}
LONG = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 40}, "finish_reason": "stop"}]}
GOOD = json_reply(200, {**ANSWER, "usage": USAGE})


class Counting:
    """An upstream's script: it answers whole or as a stream, tells usage in a stream only if asked, and counts for itself."""

    def __init__(self) -> None:
        self.requests = self.tokens = 0

    async def __call__(self, peer: Peer, message: Message) -> None:
        data = message.json()
        self.requests += 1
        self.tokens += USAGE["total_tokens"]  # type: ignore[operator]
        if not data.get("stream"):
            await peer.send(GOOD)
            return
        told = b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
        asked = (data.get("stream_options") or {}).get("include_usage")
        pieces = [event("a"), event("b"), *([told] if asked else []), DONE]
        await peer.send(sse_reply(*pieces))


async def usage(server: Running, query: str = "") -> list[dict[str, Any]]:
    """Return what `GET /usage` tells an admin."""
    reply = await server.ask("GET", "/usage" + query, b"", "api-key: " + ADMIN)
    assert reply.status == 200
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


@pytest.mark.parametrize(
    ("model", "cost"), [("m-1", (600 * 2 + 400 * 0.5 + 500 * 8) / 1e6), ("m-2", 1500 / 1e6), ("n", 0.0)]
)
def test_the_cost_of_an_answer(model: str, cost: float) -> None:
    """The first pattern that matches counts; without its own price a cached token costs as much as any other."""
    config = app.parse_config({"controllers": [{"type": "echo"}], "prices": PRICES}, "test", {})
    book = app.UsageBook()
    book.configure(config.prices)
    assert book.price_of(model).cost(app.Usage(1500, 1000, 500, 400)) == pytest.approx(cost)


async def test_usage_by_key_and_model(tmp_path: Path) -> None:
    """Whole answers and streams are counted by key, controller and model; a client sees no event that it did not ask for."""
    script = Counting()
    async with Upstream(script) as up:
        more: dict[str, Any] = {"client_keys": KEYS, "prices": PRICES, "state_file": str(tmp_path / "state.sqlite")}
        async with Running(controller("a", up.url), **more) as server:
            await server.post("m-1", "api-key: " + KEY)
            stream = await server.post("m-1", "api-key: " + KEY, stream=True)
            assert b"usage" not in stream.body and b"[DONE]" in stream.body
            await server.post("m-2", "api-key: " + ADMIN)
            await server.post("", "api-key: " + KEY)
            rows = await usage(server, "?since=2d&by=key,model")
            assert [(row["key"], row["model"], row["requests"]) for row in rows] == [("alice", "m-1", 2), ("boss", "m-2", 1)]
            assert [row["cost"] for row in rows] == [pytest.approx(0.0108), pytest.approx(0.0015)]
            (whole,) = await usage(server, "?by=controller")
            assert (whole["requests"], whole["input"] + whole["output"]) == (script.requests, script.tokens)
            assert (whole["controller"], whole["cached"]) == ("a", 1200)
            for query, status in (("?by=secret", 400), ("?since=soon", 400)):
                assert (await server.ask("GET", "/usage" + query, b"", "api-key: " + ADMIN)).status == status
            assert (await server.ask("GET", "/usage", b"", "api-key: " + KEY)).status == 403


async def test_answers_without_usage_are_estimated() -> None:
    """Where tokens are counted and an answer tells none, four characters count as one."""
    async with Upstream(answers(json_reply(200, LONG))) as up:
        async with Running(controller("a", up.url), prices=PRICES) as server:
            await server.post("m-1")
            (row,) = await usage(server)
    assert row["requests"] == 1 and row["input"] > 0 and row["output"] == 10


def test_rows_in_memory_are_bounded() -> None:
    """Models of clients beyond the bound count as one, and the sums stay right."""
    book = app.UsageBook()
    for number in range(app.USAGE_ROWS + 500):
        record = app.AccessRecord("::1", "POST", "/", 0.0, controller="a", status=200, usage=app.Usage(2, 1, 1, 0))
        record.attempts = [app.AttemptRecord("a", "ok", 0.1, f"m-{number}")]
        book.count(record, 1.7e9)
    assert len(book.rows) <= app.USAGE_ROWS
    (row,) = app.group_usage([(*row, *sums) for row, sums in book.rows.items() if row[3] == app.OTHER_MODEL], ["model"])
    assert row["requests"] == 500


async def test_a_restart_remembers(tmp_path: Path) -> None:
    """Usage, objects, accounts that are out and limits that replies told are those of the run before."""
    file = {"state_file": str(tmp_path / "state.sqlite"), "pool": {"type": "priority"}}
    limits = ("x-ratelimit-limit-requests: 100", "x-ratelimit-remaining-requests: 40", "x-ratelimit-reset-requests: 36s")
    made = json_reply(200, {"id": "resp_1", "object": "response", "output": [{}], "usage": USAGE}, *limits)
    refused = error_reply(401, "invalid_api_key")
    async with Upstream(answers(refused)) as bad, Upstream(answers(made)) as one, Upstream(answers(made)) as two:
        controllers = [controller("bad", bad.url), controller("one", one.url), controller("two", two.url)]
        for number in range(2):
            async with Running(*controllers, **file) as server:
                out = {state["name"]: state["state"] for state in (await server.status())["controllers"]}
                assert (out["bad"] == "out") is bool(number)
                if number:
                    state = (await server.status())["controllers"][1]["ledger"]["m"]["requests"]
                    assert state["limit"] == 100 and 35 <= state["left"] <= 45
                    (row,) = await usage(server)
                    assert (row["requests"], row["input"]) == (2, 2000)
                    server.server.pool.upstreams[0].gate.open(0.0)
                    body = {"model": "m", "input": "x", "previous_response_id": "resp_1"}
                    reply = await server.ask("POST", "/v1/responses", body)
                    assert reply.headers["x-apiserver-controller"] == "one"
                else:
                    for _ in range(2):
                        await server.ask("POST", "/v1/responses", {"model": "m", "input": "x"})
    with contextlib.closing(sqlite3.connect(str(file["state_file"]))) as stored:
        assert stored.execute("SELECT sum(requests) FROM usage").fetchone() == (3,)
    assert (tmp_path / "state.sqlite").stat().st_mode & 0o777 == 0o600


async def test_kill_9_loses_at_most_a_second(tmp_path: Path) -> None:
    """What was answered more than a second ago is in the file, and --usage prints it while the server runs or not."""
    program = Program(tmp_path)
    program.write({"type": "echo", "name": "e"}, state_file=str(tmp_path / "state.sqlite"), prices={"*": {"input": 1e6}})
    program.start()
    command = [sys.executable, str(PROGRAM), "-c", str(program.file), "--usage", "--by", "controller,model"]
    try:
        text = await program.logged("listening on ")
        program.port = int(text.partition("listening on ")[2].split("\n")[0].rsplit(":", 1)[1])
        for _ in range(3):
            await program.ask()

        def told() -> str:
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout

        for _ in range(50):
            if "3" in (table := await asyncio.to_thread(told)).split():
                break
        program.process.kill()
        program.process.wait()
        assert await asyncio.to_thread(told) == table
    finally:
        program.process.kill()
    head, row, total = table.splitlines()[1:]
    assert head.split() == ["controller", "model", "requests", "input", "cached", "output", "cost"]
    assert row.split()[:3] == ["e", "m", "3"] and total.split()[:2] == ["total", "3"]


@pytest.mark.parametrize("kind", ["garbage", "newer", "folder", "missing"])
async def test_a_broken_file_stops_no_answer(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says once what is wrong; answers and counts go on in memory."""
    path = tmp_path / "state.sqlite"
    if kind == "garbage":
        path.write_bytes(b"x" * 5000)
    elif kind == "folder":
        path.mkdir()
    elif kind == "missing":
        path = tmp_path / "none" / "state.sqlite"
    else:
        with contextlib.closing(sqlite3.connect(path)) as file:
            file.execute("PRAGMA user_version = 7")
    with caplog.at_level(logging.INFO, "chatgpt_apiserver"):
        async with Upstream(answers(GOOD)) as up, Running(controller("a", up.url), state_file=str(path)) as server:
            for _ in range(3):
                assert (await server.post("m-1")).status == 200
            (row,) = await usage(server)
            assert row["requests"] == 3
    assert caplog.text.count("cannot be used") == 1
    if kind == "garbage":
        assert path.read_bytes() == b"x" * 5000


@pytest.mark.parametrize("name", ["nonsense", '["limit","a"]', '["out","account","a"]', "7"])
async def test_a_file_with_foreign_rows(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is not understood is logged; the server starts and counts."""
    path = str(tmp_path / "state.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.executescript(app.STATE_SCHEMA)
        file.execute("INSERT INTO state VALUES (?, 'null', 1.0)", (name,))
        file.commit()
    async with Upstream(answers(GOOD)) as up, Running(controller("a", up.url), state_file=path) as server:
        assert (await server.post("m-1")).status == 200
        assert (await usage(server))[0]["requests"] == 1
    assert "is not understood" in caplog.text


def test_what_cannot_be_written_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch stays in memory until the file can be written again; two processes add to the same rows."""
    folder = tmp_path / "mount"
    first, second = (app.StateFile(str(folder / "state.sqlite")) for _ in range(2))
    row = ("2026-12-01", "alice", "a", "m")
    with caplog.at_level(logging.INFO, "chatgpt_apiserver"):
        first.thread.start()
        first.save({row: [1, 10, 0, 5, 0.5]}, {'["object","x"]': '"a"'})
        with first.changed:
            assert first.changed.wait_for(lambda: first.is_failing, 15)
        folder.mkdir()
        first.save({row: [1, 10, 0, 5, 0.5]}, {})
        first.close(15)
    second.thread.start()
    second.save({row: [1, 0, 0, 0, 0.0]}, {'["out"]': None})
    second.close(15)
    assert app.read_usage_file(first.path, "2026-01-01") == [(*row, 3, 20, 0, 10, 1.0)]
    assert second.load() == {'["object","x"]': '"a"'}
    assert "written again" in caplog.text


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ([], 2, "--usage needs a state_file"),
        (["state"], 1, "cannot be read"),
        (["state", "--by", "color"], 2, "found 'color', allowed: day,key,controller,model"),
        (["state", "--since", "x"], 2, "--since is 7d or a day"),
    ],
)
def test_mistakes_with_usage(flags: list[str], status: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is said in words."""
    data = {"controllers": [{"type": "echo"}], **({"state_file": str(tmp_path / "none.sqlite")} if flags else {})}
    (tmp_path / "c.json").write_text(json.dumps(data))
    assert app.main(["-c", str(tmp_path / "c.json"), "--usage", *flags[1:]]) == status
    assert words in capsys.readouterr().err
