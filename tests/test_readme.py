"""The README: its examples run, and its tables hold exactly the keys, defaults, fields and words of the program."""

import ast
import fnmatch
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import chatgpt_apiserver as app

from . import bench
from .support import ANSWER, Running, Upstream, answers, controller, error_reply, json_reply, pause

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "chatgpt_apiserver.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEY = "sk-0123456789abcdef"
ECHO = {"type": "echo"}
OPENAI = {"config": {"api_key": KEY}}


def section(title: str) -> str:
    """Return the text below the heading `title`, up to the next heading of its level or above."""
    text = README.partition(f"\n{title}\n")[2]
    assert text, title
    return re.split(rf"^#{{1,{title.index(' ')}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def blocks(kind: str, text: str = README) -> list[str]:
    """Return the fenced code blocks of this kind."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for word, block in fences if word == kind]


def table(text: str, *columns: str) -> list[list[str]]:
    """Return the rows of the first table in `text` that has these columns."""
    head = "| " + " | ".join(columns) + " |\n"
    assert head in text, head
    rows = text.partition(head)[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def ticked(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def wrap(kind: str, key: str, value: Any) -> dict[str, Any]:
    """Return a configuration in which the object `kind` has this key; a dot leads into an object."""
    *outer, key = key.split(".")
    inner: dict[str, Any] = {key: value}
    for name in reversed(outer):
        inner = {name: inner}
    account = {} if kind == "echo" else {"api_key": KEY, "base_url": "https://x.example/v1"}
    more: dict[str, Any] = {
        "top": inner,
        "client_keys[]": {"client_keys": [{"key": KEY, **inner}]},
        "controllers[]": {"controllers": [{**(ECHO if key == "config" else OPENAI), **inner}]},
    }.get(kind) or ({kind: inner} if kind in OBJECTS else {"controllers": [{"type": kind, "config": {**account, **inner}}]})
    return {"controllers": [ECHO], **more}


def parse(data: dict[str, Any]) -> app.Config:
    """Return the configuration of `data`."""
    return app.parse_config(data, "x.json", {})


def known_keys(kind: str, prefix: str = "") -> set[str]:
    """Return the keys that the program accepts in an object, as its message about an unknown key lists them."""
    with pytest.raises(app.ConfigError) as caught:
        parse(wrap(kind, prefix + "0", 1))
    assert "unknown key; allowed here: " in str(caught.value), str(caught.value)
    return {prefix + name for name in str(caught.value).rpartition("allowed here: ")[2].split(", ")}


OBJECTS = {
    "top": ("### Top level", ["tls.", "cors.", "log."]),
    "pool": ("### `pool`", []),
    "controllers[]": ("### `controllers[]`", ["limits.", "timeouts."]),
    "client_keys[]": ("### `client_keys[]`", ["limits.", "budget."]),
    "limits": ("### `limits`", []),
}
ACCOUNT_ROWS = table(section("### `controllers[].config`"), "key", "default", "types", "meaning")


@pytest.mark.parametrize("kind", OBJECTS)
def test_tables_hold_every_key(kind: str) -> None:
    """The reference tables name exactly the keys that the program accepts."""
    title, nested = OBJECTS[kind]
    told = [name for row in table(section(title), "key", "default", "meaning") for name in ticked(row[0])]
    known = known_keys(kind) - {name.rstrip(".") for name in nested}
    assert sorted(told) == sorted(known.union(*(known_keys(kind, prefix) for prefix in nested)))


@pytest.mark.parametrize("kind", ["openai", "azure", "anthropic", "echo"])
def test_the_account_table_holds_every_key_of_a_type(kind: str) -> None:
    """The table of `config` says for each key which types have it."""
    rows = [row for row in ACCOUNT_ROWS if kind in row[2].split(", ") or (row[2] == "all" and kind != "echo")]
    assert {name for row in rows for name in ticked(row[0])} == known_keys(kind)


def defaults() -> Iterator[tuple[str, str, str]]:
    """Yield object, key and default (as the table writes it) of each key."""
    rows = [(kind, *row) for kind, (title, _) in OBJECTS.items() for row in table(section(title), "key", "default", "meaning")]
    rows += [("openai" if types == "all" else types.split(", ")[0], *row) for *row, types, _ in ACCOUNT_ROWS]
    for kind, names, default, *_ in rows:
        yield from ((kind, name, value) for name, value in zip(ticked(names), default.split(", "), strict=True))


@pytest.mark.parametrize(("kind", "key", "default"), [*defaults()])
def test_defaults_are_those_of_the_program(kind: str, key: str, default: str) -> None:
    """A key that is set to the default of its table changes nothing."""
    if default == "required" or default.startswith("by "):
        assert "name" in key or key in ("key", "controllers")
        return
    value = json.loads(default.strip("`")) if default != "none" else ""
    if key == "base_url":  # which decides whether a key is needed, so the other accounts here have one of their own
        assert parse({"controllers": [{"config": {"api_key": KEY, key: value}}]}) == parse({"controllers": [OPENAI]})
    else:
        assert parse(wrap(kind, key, value)) == parse(wrap(kind, key, None))


@pytest.mark.parametrize("block", blocks("json"))
def test_configurations_pass_the_check(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every JSON example passes --check, once its variables are set and its files exist."""
    for name in re.findall(r"\$(\w+)", block):
        monkeypatch.setenv(name, f"sk-{name.lower()}-0123456789")
    for name in re.findall(r"file:([^\"]+)", block):
        (tmp_path / Path(name).name).write_text(f"sk-{Path(name).stem}-0123456789\n")
    path = tmp_path / "my.json"
    path.write_text(re.sub(r"file:[^\"]*/", "file:", block))
    assert app.main(["--config", str(path), "--check"]) == 0
    assert "0123456789" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[cd]*.json")), ids=lambda path: path.name)
def test_samples_pass_the_check_and_name_their_models(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in config/ need OPENAI_API_KEY at most, and every controller in them names its models."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert app.main(["-c", str(path), "--check"]) == 0
    assert all(account["models"] for account in json.loads(path.read_text())["controllers"])


def test_flags_and_files_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """The README and --help name the same flags; the README names the files and folders that are searched."""
    assert app.main(["--help"]) == 0
    helped = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    assert helped == set(re.findall(r"`(--?[a-z][\w-]*)", README.partition("Flags: ")[2].partition("\n\n")[0]))
    assert all(f"`{name}`" in README for name in (*app.CONFIG_NAMES, *app.CONFIG_FOLDERS))


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The variables of the README are those that the program reads."""
    told = set(re.findall(r"`CHATGPT_APISERVER_([A-Z_]+)`", README)) - {"CONFIG_FILE", "CONFIG_PATH", "ADMIN_KEY"}
    pool = {f"POOL_{name.upper()}" for name in known_keys("pool") if not name.endswith(("aliases", "fallbacks"))}
    assert told == {"HOST", "PORT", "DRAIN_DELAY", "DRAIN_TIMEOUT"} | pool
    for name in told:
        monkeypatch.setenv("CHATGPT_APISERVER_" + name, "nonsense!/")
        assert app.main(["--demo", "--check"]) == 2
        assert f"CHATGPT_APISERVER_{name}: found" in capsys.readouterr().err
        monkeypatch.delenv("CHATGPT_APISERVER_" + name)


def test_every_vendor_is_named() -> None:
    """The types of the README are those that the program knows; messages send the reader there."""
    hosted, local = section("### Vendors").partition("\n- On this machine")[::2]
    told = set(ticked(hosted.partition("- Hosted:")[2])) | set(ticked(local.partition(".")[0]))
    assert told - {"region", "config", "account"} == set(app.PRESETS) - {"openai", "azure", "anthropic", "echo"}


# -- commands


def start(command: str) -> "subprocess.Popen[str]":
    """Start a command of the README in the project's folder, on a free port."""
    line = [sys.executable, *shlex.split(command)[1:], "--port", "0"]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def port_of(server: "subprocess.Popen[str]") -> str:
    """Wait until the server listens; return its port."""
    assert server.stderr is not None
    return next(line for line in server.stderr if "listening on http://127.0.0.1:" in line).strip().rpartition(":")[2]


def stop(server: "subprocess.Popen[str]") -> None:
    """Stop it as Ctrl-C does; it ends with status 0."""
    server.send_signal(2)
    assert server.stderr is not None and "Traceback" not in server.stderr.read() and server.wait() == 0


def commands(text: str = README) -> list[str]:
    """Return the lines of the console blocks."""
    return [line for block in blocks("console", text) for line in block.splitlines()]


def test_the_demo_answers_its_curl() -> None:
    """The first two commands of the README work as they are written: the demo starts, and curl gets a stream."""
    demo, curl, _ = commands(section("## Start"))
    with start(demo) as server:
        words = shlex.split(curl.replace(":8080/", f":{port_of(server)}/"))
        said = subprocess.run([*words, "-s", "--noproxy", "*"], capture_output=True, timeout=30, check=True).stdout
        stop(server)
    assert said.startswith(b"data: {") and said.endswith(b"data: [DONE]\n\n")


def test_the_python_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python example leads to the demo's address and asks for a model that the demo has."""
    package = MagicMock()
    monkeypatch.setitem(sys.modules, "openai", package)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})  # noqa: S102
    assert package.OpenAI.call_args.kwargs == {"base_url": "http://127.0.0.1:8080/v1", "api_key": "anything"}
    asked = package.OpenAI.return_value.chat.completions.create.call_args.kwargs
    assert fnmatch.fnmatch(asked["model"], "gpt-*") and "gpt-*" in str(app.demo_controllers())
    assert "MagicMock" in capsys.readouterr().out


def test_one_key_is_enough() -> None:
    """The command with one key starts a server, and the key is not in its log."""
    setting, _, *words = shlex.split(commands(section("## Start"))[-1])
    assert setting == "OPENAI_API_KEY=sk-..."
    env = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": KEY}
    output = run(*words, "--check", cwd=ROOT, env=env)
    assert "https://api.openai.com/v1" in output and KEY not in output


def test_the_command_that_makes_a_key() -> None:
    """The command prints a key that `client_keys` accepts."""
    command = re.search(r"`(python3 -c '.*?')`", README)
    assert command
    key = run(*shlex.split(command.group(1))[1:]).strip()
    assert len(key) > 40 and parse({"controllers": [ECHO], "client_keys": [{"key": key}]})


def run(*words: str, **more: Any) -> str:
    """Run Python with these arguments until it ends well; return its output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **more}
    return subprocess.run([sys.executable, *words], text=True, timeout=30, check=True, **pipes).stdout


def test_what_is_named_exists() -> None:
    """Paths and error codes of the README are those of the project; it has at most 640 lines and tells the program's size."""
    paths = set(re.findall(r"(?:tests|config|\.ci)/[\w./-]*\w", README))
    assert {"tests/run.py", ".ci/run"} <= paths and not [path for path in paths if not (ROOT / path).exists()]
    source = PROGRAM.read_text()
    for code in (
        "model_not_found invalid_api_key host_not_allowed origin_not_allowed model_not_allowed upstream_account_refused"
        " expired_api_key admin_required insufficient_quota"
    ).split():
        assert f"`{code}`" in README and f'"{code}"' in source
    told, lines = re.search(r"about ([\d,]+) lines long", README), source.count("\n")
    assert told and README.count("\n") <= 640
    assert abs(int(told.group(1).replace(",", "")) - lines) <= 150, f"the file has {lines} lines"


def test_measured_cases() -> None:
    """The table of figures has a row for each case of the benchmark."""
    rows = table(section("## Measured"), "`--cases`", "unit", *bench.COLUMNS)
    assert [name for row in rows for name in ticked(row[0])] == [*bench.CASES, "memory", "start"]


# -- what clients and operators see

LIMITS = ("x-ratelimit-limit-requests: 9", "x-ratelimit-remaining-requests: 8", "x-ratelimit-reset-requests: 1s")


async def test_paths() -> None:
    """Each path of the table is open with the word of its row in `endpoints`, and closed without it."""
    rows = table(section("## How a request flows"), "paths", "served")
    data = {"model": "m", "input": "x", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    async with Upstream(answers(json_reply(200, ANSWER))) as up:
        for paths, served in rows[:3]:
            word = ticked(served)[0].strip('"') if ticked(served) else None
            for endpoints in ([word] if word else [], []):
                async with Running(controller("a", up.url), endpoints=endpoints) as server:
                    for path in ticked(paths):
                        get = word == "objects" or (word is None and "chat" not in path)
                        target = path.replace("{id}", "resp_1")
                        reply = await server.ask("GET" if get else "POST", target, b"" if get else data)
                        closed = bool(word) and not endpoints
                        assert (reply.status == 404) is closed or "{id}" in path, (path, reply.status, reply.body)


async def test_headers_of_answers() -> None:
    """The headers in the table are those that answers carry."""
    told = {ticked(name)[0]: where for name, where, _ in table(README, "header", "on", "meaning")}
    async with Upstream(answers(json_reply(200, ANSWER))) as up:
        async with Running(controller("a", up.url, model_map={"fast": "m"})) as server:
            reply = await server.post("fast", "x-apiserver-max-wait: 1")
    seen = {name for name in reply.headers if name.startswith("x-apiserver")}
    assert seen == {name for name, where in told.items() if where == "answer"}
    assert reply.headers["x-apiserver-model"] == "fast -> m"
    assert "x-apiserver-max-wait" in told and not any(name.startswith("x-apiserver") for name in up.seen[0].headers)


def test_log_fields() -> None:
    """The table of the access log has the fields of both formats."""
    record = app.AccessRecord("127.0.0.1", "POST", "/v1/chat/completions", 1.0)
    record.model, record.controller, record.key, record.request_id = "m", "a", "alice", "req_1"
    record.code, record.upstream_id, record.trace_id, record.usage = "server_error", "up-1", "0af7", app.Usage(3, 1, 2, 0)
    record.waited_s = 1.0
    record.attempts = [app.AttemptRecord("a", "rate", 0.1, "m", 429, "no"), app.AttemptRecord("b", "ok", 0.2, "m", 200)]
    rows = table(section("## Operate"), "text", "JSON", "meaning")
    formatter = app.LineFormatter()
    text = [name for cell, _, _ in rows for name in ticked(cell)]
    assert sorted(text) == sorted(re.findall(r" (\w+)=", formatter.access(record, 1.0)))
    formatter.as_json = True
    names = [name for _, cell, _ in rows for name in ticked(cell) if not cell.startswith("(in")]
    assert sorted(names) == sorted(json.loads(formatter.access(record, 1.0)))


def test_metrics() -> None:
    """The table of metrics is that of the program."""
    rows = table(section("## Operate"), "metric", "type", "labels", "meaning")
    told = {ticked(name)[0]: (kind, " ".join(ticked(labels)), meaning) for name, kind, labels, meaning in rows}
    assert told == app.METRICS


def test_outcomes() -> None:
    """The table has every outcome that the access log may show."""
    rows = table(section("## Operate"), *["outcome", "meaning"] * 3)
    told = [name for row in rows for name in ticked("".join(row[::2]))]
    assert sorted(told) == sorted([*(outcome.value for outcome in app.Outcome), "error", "stopped"])


@pytest.mark.virtual_time
async def test_status(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of /status has its fields, its states and reasons are the program's, and so are the lines of the log."""
    text = section("## Operate")
    rows = {ticked(row[0])[0]: row for row in table(text, "field", "meaning")}
    monkeypatch.setattr(logging.getLogger("chatgpt_apiserver"), "propagate", True)
    caplog.set_level(logging.INFO, "chatgpt_apiserver")
    refused = error_reply(401, "invalid_api_key")
    async with Upstream(answers(refused, refused, json_reply(200, ANSWER, *LIMITS))) as up:
        async with Running(controller("a", up.url, limits={"rpm": 100, "tpm": 100_000, "rpd": 900, "tpd": 10**7})) as server:
            await server.post()
            await server.post()
            out = await server.status()
            await pause(31.0)
            assert (await server.post()).status == 200
            (state,) = (await server.status())["controllers"]
    assert set(out) == {"status", "policy", "waiting", "connections", "upstream_connections", "controllers", "settings", "source"}
    assert all(f"`{name}`" in text for name in set(out) - {"status"})
    assert sorted(name for row in rows.values() for name in ticked(row[0])) == sorted(state)
    assert (out["controllers"][0]["state"], out["controllers"][0]["reason"]) == ("out", "refused")
    ledger = state["ledger"]["gpt-4.1"]
    fields = set(ledger) | {name for value in ledger.values() if isinstance(value, dict) for name in value}
    assert fields | {"tokens"} == set(ticked(rows["ledger"][1]))
    words = {node.value for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Constant)}
    told = [*ticked(rows["state"][1]), *ticked(rows["reason"][1])]
    assert len(told) == 8 and set(told) <= words
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    for line in blocks("", text)[0].splitlines():
        sample = line.partition(" ")[2].replace("team-b", "a")
        pattern = re.sub(r"\d+ s", r"\\d+ s", sample.partition(": 401")[0]) + (": 401 .*" if ": 401" in sample else "")
        assert any(re.fullmatch(pattern, message) for message in said), (pattern, said)
