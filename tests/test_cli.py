"""The command line as a user meets it: a process, its output and its exit status."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import chatgpt_apiserver as app

PROGRAM = Path(app.__file__).resolve()
KEY = "sk-proj-SecretSecret-wxyz"
PASSWORD = "hunter2-hunter2"
Ended = subprocess.CompletedProcess[str]


def run(cwd: Path, *args: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **env: str) -> Ended:
    """Run the program in an environment without settings until it ends."""
    env = {**{name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}, "PYTHONUTF8": "1", **env}
    command, streams = [sys.executable, "-W", "error", str(PROGRAM), *args], {"stdout": stdout, "stderr": stderr}
    return subprocess.run(command, cwd=cwd, env=env, encoding="utf-8", timeout=30, check=False, **streams)


def write(folder: Path, name: str = "chatgpt-apiserver.json", **more: object) -> str:
    """Write a valid configuration with `more`."""
    account = {"api_key": KEY, "proxy": f"http://user:{PASSWORD}@proxy:1", "headers": {"X-Key": PASSWORD}}
    data = {"controllers": [{"name": "team-a", "config": account}], "client_keys": [{"key": PASSWORD}], **more}
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return name


def test_version_and_help(tmp_path: Path) -> None:
    """--version prints the version, --help prints each flag; importing the module prints nothing."""
    ended = run(tmp_path, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"chatgpt_apiserver {app.__version__}\n", "")
    ended = run(tmp_path, "--help")
    assert (ended.returncode, ended.stderr, run(tmp_path, "-h").stdout) == (0, "", ended.stdout)
    for flag in "-c --config --config_file --config-file --config_path --config-path --host --port --check --demo --version -h".split():
        assert f" {flag}" in ended.stdout
    code = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import chatgpt_apiserver"
    imported = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=30, check=False)
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, b"", b"")


def test_check_shows_the_configuration_and_no_secrets(tmp_path: Path) -> None:
    """--check validates the file and prints a summary."""
    write(tmp_path)
    ended = run(tmp_path, "--check")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("configuration OK\nconfiguration: ./chatgpt-apiserver.json\n")
    assert "controller team-a: type openai; config.api_key sk-…wxyz; config.base_url https://api.openai.com/v1" in ended.stdout
    assert "\naddress: http://127.0.0.1:8080\nwarning: client_keys[key-1].key: has fewer than 16 characters" in ended.stdout
    assert "Secret" not in ended.stdout and PASSWORD not in ended.stdout
    write(tmp_path, client_keys=[])
    ended = run(tmp_path, "--check", "--host", "0.0.0.0")
    assert ended.stdout.splitlines()[-1].startswith("warning: EVERY CLIENT THAT REACHES 0.0.0.0:8080 CAN USE THESE ACCOUNTS")


def test_spellings_and_order_of_flags(tmp_path: Path) -> None:
    """Flags have underscores or dashes, = or a space; they win over variables, which win over the file."""
    write(tmp_path, "mine.json", port=9001)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", port=9002)
    files = "--config_file mine.json", "--config-file=mine.json", "--config mine.json", "-c mine.json"
    for line in (*files, "--config_path=folder", "--config-path folder"):
        ended = run(tmp_path, "--check", *line.split())
        assert ended.returncode == 0 and f"127.0.0.1:{9001 if line in files else 9002}" in ended.stdout, ended.stderr
    ended = run(tmp_path, "--check", "-c", "mine.json", "--host", "::1", CHATGPT_APISERVER_PORT="9003")
    assert "address: http://[::1]:9003" in ended.stdout
    assert ":9004" in run(tmp_path, "--check", "-c", "mine.json", "--port", "9004", CHATGPT_APISERVER_PORT="9003").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--config_file nowhere.json", "--config_file: nowhere.json: no such file"),
        ("--config_path nowhere", "--config_path: nowhere: no such folder"),
        ("--config_file broken.json", "broken.json: line 1, column 2: "),
        ("--config_file typo.json", "typo.json: prot: unknown key; did you mean 'port'?"),
        ("--demo --port http", '--port: found "http", allowed: a whole number from 0 to 65535'),
        ("--port", "argument --port: expected one argument; --help shows every flag"),
        ("serve", "unknown argument 'serve'; --help shows every flag"),
        ("--prot 1", "unknown argument '--prot'; did you mean '--port'?"),
        ("-port 1", "unknown argument '-port'; did you mean '--port'?"),
        ("--dem", "unknown argument '--dem'; did you mean '--demo'?"),
    ],
)
def test_mistakes_exit_with_2(tmp_path: Path, args: str, message: str) -> None:
    """A mistake is one line on stderr, without a traceback and without secrets."""
    (tmp_path / "broken.json").write_text("{")
    write(tmp_path, "typo.json", prot=1)
    ended = run(tmp_path, *args.split())
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(message) and ended.stderr.count("\n") == 1 and "Secret" not in ended.stderr


def test_an_address_that_cannot_be_used_exits_with_1(tmp_path: Path) -> None:
    """A port in use and a host that is no name are one line in the log; a host that looks like a key is masked."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(tmp_path, "--demo", "--port", str(port))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith(f" ERROR cannot listen on 127.0.0.1:{port}: the port is in use; choose another with --port\n")
    ended = run(tmp_path, "--demo", "--port", "0", "--host", "sk-" + 20 * "Secret" + "-wxyz")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert " WARNING EVERY CLIENT THAT REACHES sk-…wxyz:0 CAN " in ended.stderr
    assert " ERROR cannot listen on sk-…wxyz:0: " in ended.stderr
    assert "Traceback" not in ended.stderr and "Secret" not in ended.stderr


@pytest.mark.parametrize("args", ["--version", "--help", "--demo --check"])
def test_output_that_cannot_be_written(tmp_path: Path, args: str) -> None:
    """A pipe whose reader has left, as `| head` does, ends the program without a message, and a full disk with status 1."""
    read, written = os.pipe()
    os.close(read)
    with open(written, "wb") as closed:
        ended = run(tmp_path, *args.split(), stdout=closed)
    assert (ended.returncode, ended.stderr) == (1, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "wb") as full:
            assert run(tmp_path, *args.split(), stdout=full).returncode == 1
            assert run(tmp_path, "--nonsense", stderr=full).returncode == 2


def test_ways_to_start(tmp_path: Path) -> None:
    """One key or --demo is enough; without them the three ways to start are shown. A clone's samples are not used."""
    if any((Path("/etc/chatgpt-apiserver") / name).exists() for name in app.CONFIG_NAMES):
        pytest.skip("this machine has a configuration of its own")
    (tmp_path / "config").symlink_to(PROGRAM.parent / "config")
    ended = run(tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", app.NOTHING_TO_RUN + "\n")
    ended = run(tmp_path, "--check", OPENAI_API_KEY=KEY, OPENAI_BASE_URL="http://up/v1")
    assert ended.returncode == 0
    assert "controller openai: type openai; config.api_key sk-…wxyz; config.base_url http://up/v1; models all" in ended.stdout
    assert "controller echo-a" in run(tmp_path, "--check", "--demo").stdout
    ended = run(tmp_path, "-c", "config/chatgpt-apiserver.json")
    assert ended.stderr.endswith("config.api_key: the environment variable OPENAI_API_KEY is not set\n")


def test_the_demo_shows_how_to_ask_it(tmp_path: Path) -> None:
    """The demo logs a command that works as it stands."""
    command = [sys.executable, str(PROGRAM), "--demo", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "try it: curl " in line)
        name, option, url, flag, body = shlex.split(line.partition("try it: ")[2])
        assert (name, option, flag) == ("curl", "-N", "-d") and json.loads(body)["stream"] is True
        host, path = url.removeprefix("http://").split("/", 1)
        with socket.create_connection(host.split(":")) as client:
            head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        server.terminate()
        server.stderr.read()
    assert answer.startswith(b"HTTP/1.1 200 ") and b"hello" in answer and b"data: [DONE]" in answer
    assert server.returncode == 0


@pytest.mark.parametrize(("soft", "words"), [(256, "only 256 open files are allowed, enough for about 108 clients"), (1024, "")])
def test_few_open_files_are_warned_of(soft: int, words: str, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that refuses to raise a small limit gets a warning with the number of clients, and the start goes on."""
    refuse = MagicMock(side_effect=ValueError("current limit exceeds maximum limit"))
    monkeypatch.setattr(app.resource, "setrlimit", refuse)
    monkeypatch.setattr(app.resource, "getrlimit", lambda _: (soft, -1))
    monkeypatch.setattr(app.log, "propagate", True)
    app.raise_open_files()
    assert len(caplog.messages) == bool(words) and words in "".join(caplog.messages)
