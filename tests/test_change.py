"""Changing a configuration safely: --check, --check --diff, --probe, --example, POST /reload, readiness."""

import asyncio
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, KEY, Running, Upstream, answers, controller, error_reply, json_reply, refusing
from .test_signals import PROGRAM, Program, running

ADMIN = "client-key-of-an-admin"
ECHO = {"type": "echo", "name": "echo"}
LISTED = json_reply(
    200, {"data": [{"id": "m"}, {"id": "n"}]}, "x-ratelimit-limit-requests: 90", "x-ratelimit-remaining-requests: 80"
)


def parse(**data: Any) -> app.Config:
    """Return the configuration in `data`."""
    return app.parse_config({"controllers": [ECHO], **data}, "c.json", {})


def test_all_mistakes_at_once() -> None:
    """Each mistake is a line, in every part of the configuration."""
    account = {"api_key": "$NO_SUCH_KEY", "base_url": "ftp://x", "colour": 1}
    data = {
        "controllers": [{"type": "openia"}, {"config": account, "weight": 0, "models": ["", 7]}, {**ECHO, "x": 1}],
        "client_keys": [{"key": ""}, {"key": KEY, "expires": "soon"}],
        "pool": {"max_wait": "long", "typ": "random"},
        "porta": 1,
    }
    with pytest.raises(app.ConfigError) as refused:
        app.parse_config(data, "c.json", {})
    places = [line.split(": ")[1] for line in str(refused.value).splitlines()]
    first = "controllers[1]."
    assert sorted(places) == sorted([
        "porta", "controllers[0].type", first + "weight", first + "models[0]", first + "models[1]", first + "config.colour",
        first + "config.api_key", first + "config.base_url", "controllers[2].x", "client_keys[0].key", "client_keys[1].expires",
        "pool.typ", "pool.max_wait",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, None),
        ({"pool": {"aliases": {"a": "b", "b": "m"}}}, "pool.aliases.a: 'b' is an alias, too"),
        ({"pool": {"aliases": {"a": "gone"}}}, "pool.aliases.a: no controller serves 'gone'"),
        ({"pool": {"fallbacks": {"m": ["gone"]}}}, "pool.fallbacks.m: no controller serves 'gone'"),
        ({"pool": {"context_fallbacks": {"m": ["m"]}}}, "pool.context_fallbacks.m: 'm' leads back to it"),
        ({"pool": {"fallbacks": {"m": ["m-2"], "m-2": ["m"]}}}, "pool.fallbacks.m: 'm-2' leads back to it"),
        ({"client_keys": [{"key": KEY, "models": ["gone"]}]}, "client_keys[key-1].models: no controller serves 'gone'"),
        ({"client_keys": [{"key": KEY, "models": ["gpt-4.*"]}]}, "client_keys[key-1].models: 'gpt-4.*' looks like"),
        ({"client_keys": [{"key": "secret"}]}, "client_keys[key-1].key: has fewer than 16 characters"),
        ({"host": "0.0.0.0"}, "EVERY CLIENT THAT REACHES 0.0.0.0:8080"),
    ],
)
def test_warnings(more: dict[str, Any], words: str | None) -> None:
    """What is allowed, but probably not meant, is warned of; a sensible configuration has no warning."""
    warnings = app.warnings_of(parse(controllers=[{**ECHO, "models": ["m", "m-?"]}], **more))
    assert warnings == [] if words is None else warnings[0].startswith(words), warnings


def test_no_warning_where_the_models_are_not_known() -> None:
    """A controller without `models` may serve any, so nothing leads nowhere."""
    assert app.warnings_of(parse(pool={"aliases": {"a": "gone"}, "fallbacks": {"x": ["y"]}})) == []


def test_two_files_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that is not used is named; a folder in place of a file is told where it belongs."""
    (tmp_path / "chatgpt-apiserver.json").write_text(json.dumps({"controllers": [ECHO]}))
    (tmp_path / "chatgpt-apiserver.toml").write_text("")
    assert app.main(["--config_path", str(tmp_path), "--check"]) == 0
    assert "chatgpt-apiserver.toml beside it is not" in capsys.readouterr().out
    assert app.main(["--config_file", str(tmp_path), "--check"]) == 2
    assert "is not a file; --config_path names a folder" in capsys.readouterr().err


def test_the_example_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--example prints a configuration that --check accepts without a warning."""
    assert app.main(["--example"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "c.toml").write_text(text)
    assert app.main(["-c", str(tmp_path / "c.toml"), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "warning" not in shown and all(one["name"] in shown for one in tomllib.loads(text)["controllers"])


async def test_a_new_key_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """The printed key fits the printed line; a key that has expired is told so."""
    assert app.main(["--new-key", "alice"]) == 0
    key, _, member = capsys.readouterr().out.splitlines()
    assert len(key) > 40 and key not in member
    keys = [json.loads(member), {"name": "old", "key": KEY, "expires": "2024-01-31"}]
    async with Running(client_keys=keys) as server:
        assert (await server.post("echo", "api-key: " + key)).status == 200
        reply = await server.post("echo", "api-key: " + KEY)
    assert (reply.status, reply.json()["error"]["code"]) == (401, "expired_api_key")
    assert parse(client_keys=[{"key": KEY, "expires": "2024-01-31T01:00:00+01:00"}]).client_keys[0].expires == parse(
        client_keys=[{"key": KEY, "expires": "2024-01-31"}]
    ).client_keys[0].expires


async def test_the_probe(tmp_path: Path) -> None:
    """Each account has a row: what came of it, its limits, its models. One that fails makes the exit status 1."""
    chat = json_reply(200, ANSWER)
    with refusing() as dead:
        async with Upstream(answers(LISTED, LISTED, chat)) as good, Upstream(answers(error_reply(401, "invalid_api_key"))) as bad:
            accounts = [controller("good", good.url), controller("bad", bad.url), controller("dead", dead)]
            (tmp_path / "c.json").write_text(json.dumps({"controllers": accounts}))
            command = [sys.executable, str(PROGRAM), "-c", str(tmp_path / "c.json")]
            for flag, models in (("--probe", "2"), ("--probe=chat", "2")):
                ended = await asyncio.to_thread(
                    subprocess.run, [*command, flag], capture_output=True, text=True, timeout=30, check=False
                )
                rows = [line.split() for line in ended.stdout.splitlines()]
                assert ended.returncode == 1 and rows[1][0] == "good" and rows[1][-2:] == [models, "ok"], ended
                assert rows[2][0] == "bad" and "401" in rows[2] and "auth:" in rows[2]
                assert rows[3][0] == "dead" and "reachable:" in rows[3] and "sk-secret" not in ended.stdout + ended.stderr
            assert "80 of 90" in ended.stdout or flag == "--probe=chat"
            # The account names no model, so the first of its list is asked.
            assert [seen.start.split()[0] for seen in good.seen] == ["GET", "GET", "POST"]
            asked = good.seen[2].json()
            assert (asked["model"], asked["max_tokens"]) == ("m", 1)


@pytest.mark.parametrize("flag", ["--probe", "--probe=chat"])
def test_a_probe_of_the_demo(flag: str) -> None:
    """Echo controllers are well."""
    command = [sys.executable, str(PROGRAM), "--demo", flag]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr, ended.stdout.count(" ok\n")) == (0, "", 2)


async def test_a_disabled_account_gets_nothing() -> None:
    """`enabled: false` takes it out of the pool; with none left the configuration is refused. A reload brings it back."""
    async with Upstream(answers(json_reply(200, ANSWER))) as one, Upstream(answers(json_reply(200, ANSWER))) as two:
        off = {**controller("a", one.url), "enabled": False}
        async with Running(off, controller("b", two.url)) as server:
            for _ in range(3):
                await server.post("m")
            assert not one.seen and [state["name"] for state in (await server.status())["controllers"]] == ["b"]
            server.reload({**off, "enabled": True}, {**controller("b", two.url), "enabled": False})
            await server.post("m")
            assert len(one.seen) == 1
    with pytest.raises(app.ConfigError, match="all are disabled"):
        parse(controllers=[{**ECHO, "enabled": False}])


def test_numbers_as_text() -> None:
    """Templates write numbers as text, wherever a number may stand."""
    config = parse(port="9001", pool={"max_wait": "2.5"}, controllers=[{**ECHO, "weight": "3", "limits": {"rpm": "60"}}])
    one = config.controllers[0]
    assert (config.port, config.pool.max_wait, one.weight, one.limits.rpm) == (9001, 2.5, 3, 60)


async def test_readiness() -> None:
    """The question with ready=1 is 503 while no controller can be asked; the plain one stays 200."""
    async with Upstream(answers(error_reply(401, "invalid_api_key"))) as bad:
        async with Running(controller("a", bad.url)) as server:
            assert (await server.ask("GET", "/status?ready=1")).json() == {"status": "ok", "ready": True}
            for _ in range(2):
                await server.post("m")
            unready = await server.ask("GET", "/status?ready=1")
            assert (unready.status, unready.json()["ready"]) == (503, False)
            assert (await server.ask("GET", "/status")).status == 200


async def test_reload_and_its_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--diff says what a reload would change, POST /reload does it and says the same; mistakes change nothing."""
    program = Program(tmp_path)
    keys = [{"name": "boss", "key": ADMIN, "admin": True}, {"name": "k", "key": KEY}]
    program.write(ECHO, client_keys=keys)
    async with running(program):
        port = {"port": program.port}
        program.write({**ECHO, "weight": 5}, client_keys=keys, **port)
        command = [sys.executable, str(PROGRAM), "-c", str(program.file), "--check", "--diff"]

        def diff(key: str) -> subprocess.CompletedProcess[str]:
            monkeypatch.setenv("CHATGPT_APISERVER_ADMIN_KEY", key)
            return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

        told = await asyncio.to_thread(diff, ADMIN)
        assert told.returncode == 0 and "controllers[echo].weight: 1 -> 5\n" in told.stdout, told
        refused = await asyncio.to_thread(diff, KEY)
        assert refused.returncode == 2 and "CHATGPT_APISERVER_ADMIN_KEY" in refused.stderr

        async def reload(key: str) -> Any:
            return await program.ask(raw=b"POST /reload HTTP/1.1\r\nHost: localhost\r\napi-key: %b\r\nContent-Length: 0\r\n\r\n" % key.encode())

        assert [(await reload(key)).status for key in ("wrong", KEY)] == [401, 403]
        assert "controllers[echo].weight: 1 -> 5" in (await reload(ADMIN)).json()["changed"]
        assert "weight" not in str((await reload(ADMIN)).json())
        program.write({**ECHO, "weight": "x"}, client_keys=keys, pool={"typ": 1}, **port)
        reply = await reload(ADMIN)
        error = reply.json()["error"]
        assert (reply.status, error["code"], error["message"].count("\n")) == (400, "invalid_configuration", 1)


async def test_what_is_not_worth_a_retry() -> None:
    """SDKs do not come back at once where that is no use: a key that is refused, a wait of more than a minute."""
    async with Upstream(answers(error_reply(401, "invalid_api_key"))) as one:
        async with Running(controller("a", one.url), controller("b", one.url)) as server:
            reply = await server.post("m")
            assert (reply.status, reply.headers["x-should-retry"]) == (502, "false")
    limited = [error_reply(429, "rate_limit_exceeded", "slow", f"Retry-After: {after}") for after in (30, 300)]
    for reply_429, expected in zip(limited, (None, "false"), strict=True):
        async with Upstream(answers(reply_429)) as one:
            accounts = [controller("a", one.url), controller("b", one.url)]
            async with Running(*accounts, pool={"max_wait": 0}) as server:
                reply = await server.post("m")
                assert reply.status == 429 and reply.headers.get("x-should-retry") == expected
