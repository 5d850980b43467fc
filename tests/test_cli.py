"""The command line, as a user meets it: a process of its own, its output and its exit status."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

PROGRAM = Path(app.__file__).resolve()
KEY = "sk-proj-SecretSecret-wxyz"
PASSWORD = "hunter2-hunter2"
Ended = subprocess.CompletedProcess[str]


def start(cwd: Path, *args: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **env: str) -> Ended:
    """Python's end, in an empty folder and an environment without settings."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TMPDIR")}
    return subprocess.run(
        [sys.executable, "-W", "error", *args],
        cwd=cwd,
        env=dict(kept, PYTHONUTF8="1", **env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        encoding="utf-8",
        timeout=30,
        check=False,
    )


def run(cwd: Path, *args: str, **env: str) -> Ended:
    """The program's end, with all that it has said."""
    return start(cwd, str(PROGRAM), *args, **env)


def write(folder: Path, name: str = "chatgpt-apiserver.json", **more: object) -> str:
    """A good configuration with `more`."""
    account = {"api_key": KEY, "proxy": "http://user:%s@proxy:1" % PASSWORD, "headers": {"X-Key": PASSWORD}}
    data = dict({"controllers": [{"name": "team-a", "config": account}], "client_keys": [{"key": PASSWORD}]}, **more)
    (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return name


def test_version(tmp_path: Path) -> None:
    """--version says what this is."""
    ended = run(tmp_path, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "chatgpt_apiserver %s\n" % app.__version__, "")


def test_help_names_every_flag(tmp_path: Path) -> None:
    """--help shows each flag."""
    ended = run(tmp_path, "--help")
    assert ended.returncode == 0
    for flag in (*app.FLAGS, *app.SWITCHES):
        assert "--" + flag.rstrip("=") in ended.stdout
    assert run(tmp_path, "-h").stdout == ended.stdout


def test_check_shows_no_secrets(tmp_path: Path) -> None:
    """--check says what would run and exits."""
    write(tmp_path)
    ended = run(tmp_path, "--check")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "controller team-a: openai; https://api.openai.com/v1; key sk-…wxyz; by a proxy" in ended.stdout
    assert "address: http://127.0.0.1:8080" in ended.stdout
    assert "Secret" not in ended.stdout
    assert PASSWORD not in ended.stdout


@pytest.mark.parametrize("sign", ["_", "-"])
@pytest.mark.parametrize("joined", [True, False])
def test_dashes_and_underscores(tmp_path: Path, sign: str, joined: bool) -> None:
    """Long flags may be written with either, and with = or a space."""
    write(tmp_path, "mine.json", port=9001)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, port=9002)
    for flag, value, port in (("--config_file", "mine.json", 9001), ("--config_path", "folder", 9002)):
        name = "--" + flag[2:].replace("_", sign)
        ended = run(tmp_path, "--check", *([name + "=" + value] if joined else [name, value]))
        assert ended.returncode == 0, ended.stderr
        assert "127.0.0.1:%d" % port in ended.stdout


def test_flags_and_environment(tmp_path: Path) -> None:
    """Flags win over the environment, which wins over the file."""
    write(tmp_path)
    assert ":9003" in run(tmp_path, "--check", CHATGPT_APISERVER_PORT="9003").stdout
    ended = run(tmp_path, "--check", "--port", "9004", "--host", "::1", CHATGPT_APISERVER_PORT="9003")
    assert "address: http://[::1]:9004" in ended.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--config_file", "nowhere.json"), "--config_file: nowhere.json: no such file"),
        (("--config_path", "nowhere"), "--config_path: nowhere: no such folder"),
        (("--config_file", "broken.json"), "broken.json: cannot be read"),
        (("--config_file", "typo.json"), "typo.json: prot: unknown key; did you mean 'port'?"),
        (("--demo", "--port", "http"), '--port: found "http", allowed: a whole number from 0 to 65535'),
        (("--demo", "--port", "70000"), "allowed: a whole number from 0 to 65535"),
        (("--port",), "option --port requires argument; --help shows every flag"),
        (("serve",), "unexpected argument 'serve'; --help shows every flag"),
        (("--nonsense",), "option --nonsense not recognized; --help shows every flag"),
        (("--prot", "1"), "option --prot not recognized; did you mean '--port'? --help shows every flag"),
        (("-port", "1"), "option -p not recognized; long flags begin with two dashes; --help shows every flag"),
    ],
)
def test_what_cannot_run_exits_with_2(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    """A mistake is told on stderr, without a traceback and without secrets."""
    (tmp_path / "broken.json").write_text("{")
    write(tmp_path, "typo.json", prot=1)
    ended = run(tmp_path, *args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Secret" not in ended.stderr


def test_a_taken_port_exits_with_1(tmp_path: Path) -> None:
    """An address that cannot be listened on is told in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(tmp_path, "--demo", "--port", str(port))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "\ncannot listen on 127.0.0.1:%d: " % port in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_no_name_exits_with_1(tmp_path: Path) -> None:
    """A host that no resolver could be asked for is told in one line, and not in full where it looks like a key."""
    ended = run(tmp_path, "--demo", "--port", "0", "--host", "sk-" + 20 * "Secret" + "-wxyz")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert " WARNING ANYONE WHO CAN REACH sk-…wxyz:0 CAN SPEND " in ended.stderr
    assert "\ncannot listen on sk-…wxyz:0: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Secret" not in ended.stderr


def test_the_unforeseen_is_shown_as_ever(tmp_path: Path) -> None:
    """What nobody caught is one traceback and status 1, though it does not happen in the script itself."""
    broken = "class GetoptError(Exception):\n    opt = msg = ''\n\n\ndef getopt(*_):\n    raise LookupError('broken')\n"
    (tmp_path / "getopt.py").write_text(broken)
    ended = run(tmp_path, "--version", PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert (ended.returncode, ended.stdout, ended.stderr.count("Traceback")) == (1, "", 1)
    assert "excepthook" not in ended.stderr.splitlines()[0]
    assert ended.stderr.splitlines()[-1] == "LookupError: broken"


def test_a_prompt_after_the_end(tmp_path: Path) -> None:
    """`python3 -i` shows the exit as it does of any script, and nothing of how this one is left."""
    ended = start(tmp_path, "-i", str(PROGRAM), "--version")
    assert (ended.returncode, ended.stdout) == (0, "chatgpt_apiserver %s\n" % app.__version__)
    assert "SystemExit: 0" in ended.stderr and "excepthook" not in ended.stderr


@pytest.mark.parametrize("args", [("--version",), ("--help",), ("--demo", "--check")])
@pytest.mark.parametrize("mode", [(), ("-u",)])
def test_output_that_nobody_reads(tmp_path: Path, args: tuple[str, ...], mode: tuple[str, ...]) -> None:
    """A pipe whose reader has left, as `| head` does, ends it without a word, whenever Python notices it."""
    read, written = os.pipe()
    os.close(read)
    with open(written, "wb") as closed:
        ended = start(tmp_path, *mode, str(PROGRAM), *args, stdout=closed)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that cannot be written")
@pytest.mark.parametrize("mode", [(), ("-u",)])
def test_output_that_cannot_be_written(tmp_path: Path, mode: tuple[str, ...]) -> None:
    """A full disk is told in one line; where it is the errors that cannot be told, the status still tells."""
    with open("/dev/full", "wb") as full:
        ended = start(tmp_path, *mode, str(PROGRAM), "--version", stdout=full)
        assert ended.returncode == 1
        assert ended.stderr.startswith("cannot write: [Errno 28]") and ended.stderr.count("\n") == 1
        assert start(tmp_path, *mode, str(PROGRAM), "--version", stdout=full, stderr=full).returncode == 1
        assert start(tmp_path, *mode, str(PROGRAM), "--nonsense", stderr=full).returncode == 2


def test_nothing_to_run_with(tmp_path: Path) -> None:
    """Without a file, a key or --demo, the three ways to start are shown."""
    if any((Path("/etc/chatgpt-apiserver") / name).exists() for name in app.CONFIG_NAMES):
        pytest.skip("this machine has a configuration of its own")
    ended = run(tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", app.NOTHING_TO_RUN + "\n")
    for way in ("--config_file", "OPENAI_API_KEY=", "--demo"):
        assert way in ended.stderr


def test_a_fresh_clone_says_what_is_missing(tmp_path: Path) -> None:
    """The sample that a start in the project's own folder finds needs a key, and the message says what to do."""
    (tmp_path / "config").symlink_to(PROGRAM.parent / "config")
    ended = run(tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "config/chatgpt-apiserver.json: controllers[0].config.api_key: found \"$OPENAI_API_KEY\"" in ended.stderr
    assert "OPENAI_API_KEY is not set: export OPENAI_API_KEY=..., or try --demo, which needs no key, " in ended.stderr
    assert ended.stderr.endswith("or name another file with --config_file\n")


def test_a_fresh_clone_starts_with_one_key(tmp_path: Path) -> None:
    """What the message asks for is enough: the samples want no other variable."""
    (tmp_path / "config").symlink_to(PROGRAM.parent / "config")
    ended = run(tmp_path, "--check", OPENAI_API_KEY=KEY)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("good: config/chatgpt-apiserver.json\n")


def test_key_and_demo_checks(tmp_path: Path) -> None:
    """A key alone, or none with --demo, is enough."""
    ended = run(tmp_path, "--check", OPENAI_API_KEY=KEY)
    assert ended.returncode == 0
    assert "key sk-…wxyz" in ended.stdout
    assert "echo-a" in run(tmp_path, "--check", "--demo").stdout


def test_importing_does_nothing(tmp_path: Path) -> None:
    """Importing the module prints nothing and starts nothing."""
    ended = subprocess.run(
        [sys.executable, "-c", "import chatgpt_apiserver"],
        cwd=PROGRAM.parent,
        env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_a_reload_takes_a_good_configuration(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed is logged without secrets, and the secrets of both configurations are kept out of the log."""
    caplog.set_level("INFO", app.log.name)
    monkeypatch.setattr(app.log, "propagate", True)
    monkeypatch.setattr(app, "redactor", app.Redactor())
    old, new = (
        app.parse_config({"controllers": [{"config": {"api_key": key}}], "log": {"level": level}}, "c.json", {})
        for key, level in ((KEY, "error"), (PASSWORD, "info"))
    )
    assert app.reload_config(old, lambda: new) is new
    assert caplog.messages == ["reload: controller openai-1: changed: config.api_key", 'reload: log.level: "error" -> "info"']
    assert app.redactor.clean(KEY + PASSWORD) == "sk-…wxyz…ter2"
    caplog.clear()
    assert app.reload_config(new, lambda: new) is new
    assert caplog.messages == ["reload: nothing changed"]


@pytest.mark.parametrize(("host", "loud"), [("0.0.0.0", 1), ("127.0.0.1", 0)])
def test_a_reload_that_opens_the_server_to_all_is_loud(
    host: str, loud: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without client keys from now on, a public listener warns as at a start."""
    monkeypatch.setattr(app.log, "propagate", True)
    data = {"controllers": [{"type": "echo"}], "host": host}
    old, new = (app.parse_config({**data, "client_keys": keys}, "c.json", {}) for keys in ([{"key": KEY}], []))
    assert app.reload_config(old, lambda: new) is new
    assert [text[:15] for text in caplog.messages if not text.startswith("reload: ")] == ["ANYONE WHO CAN "] * loud


def test_a_reload_refuses_a_bad_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake, or a certificate that does not fit, leaves everything as it was."""
    caplog.set_level("INFO", app.log.name)
    monkeypatch.setattr(app.log, "propagate", True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, port=9001)
    (tmp_path / "a.pem").write_text("no certificate")

    def load() -> app.Config:
        return app.load_config("chatgpt-apiserver.json", "", {}, {})

    current = load()
    for wrong, words in (
        ({"prot": 1}, "chatgpt-apiserver.json: prot: unknown key; did you mean 'port'?"),
        ({"tls": {"cert": "a.pem", "key": "a.pem"}}, "certificate and key cannot be used"),
    ):
        write(tmp_path, **wrong)
        assert app.reload_config(current, load) is None
        assert caplog.messages[-1].startswith("reload: the old configuration stays: ")
        assert words in caplog.messages[-1]


def test_garbage_is_collected_once_it_serves(tmp_path: Path) -> None:
    """Start-up does without the collector, serving does not."""
    code = "import atexit, gc, runpy, sys; atexit.register(lambda: print(gc.isenabled())); del sys.argv[0]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(PROGRAM), "--demo", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        while "listening" not in server.stderr.readline():
            assert server.poll() is None
        server.terminate()
        assert server.communicate()[0] == "True\n"
    assert server.returncode == 0


def test_a_limit_that_cannot_be_raised_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that refuses more open files is no reason not to start."""
    resource = pytest.importorskip("resource")

    def refuse(*_: object) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, -1))
    monkeypatch.setattr(app.log, "propagate", True)
    app.raise_open_files()
    assert caplog.messages == ["open files stay limited to 256: current limit exceeds maximum limit"]
