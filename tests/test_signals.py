"""The program as a process: SIGHUP under load, new keys and certificates, a bad file, a slow log, the way to the end."""

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, CERT, DONE, KEY, SSE_HEAD, Client, Message, Peer, Upstream, answers, controller, event, json_reply, request, until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")
GOOD = json_reply(200, ANSWER)
PROGRAM = Path(app.__file__).resolve()


class Program:
    """A running program, its configuration file and its log."""

    def __init__(self, folder: Path) -> None:
        self.file, self.log, self.port = folder / "c.json", folder / "log.txt", 0
        self.process: subprocess.Popen[bytes]

    def write(self, *controllers: dict[str, Any], **more: Any) -> None:
        """Write the configuration."""
        self.file.write_text(json.dumps({"port": 0, "controllers": controllers, "log": {"level": "debug"}, **more}))

    def start(self, **env: str) -> None:
        """Start with `env` added to the environment."""
        command = [sys.executable, str(PROGRAM), "--config_file", str(self.file)]
        with self.log.open("wb") as log:
            env = {**os.environ, "SOME_KEY": "sk-named-named-named-aaaa", **env}
            self.process = subprocess.Popen(command, stderr=log, env=env)

    async def logged(self, words: str, times: int = 1) -> str:
        """Wait until the log has `words` so many times; return the log."""
        async with asyncio.timeout(15):
            while (text := self.log.read_text()).count(words) < times:
                assert self.process.poll() is None, text
                await asyncio.sleep(0)
        return text

    async def reload(self, words: str = "reload: ") -> str:
        """Send SIGHUP and wait until the log has `words` once more; return the log."""
        count = self.log.read_text().count(words)
        self.process.send_signal(signal.SIGHUP)
        return await self.logged(words, count + 1)

    async def open(self, ca_file: str = "") -> Client:
        """Return a connection to the program, over TLS with a `ca_file`."""
        context = ssl.create_default_context(cafile=ca_file) if ca_file else None
        return Client(*await asyncio.open_connection("localhost" if context else "127.0.0.1", self.port, ssl=context))

    async def ask(self, *lines: str, raw: bytes = b"") -> Message:
        """Send `raw` or a chat on a connection of its own; return the answer."""
        client = await self.open()
        await (client.send(raw) if raw else client.post("m", *lines))
        answer = await client.read()
        client.close()
        return answer


@asynccontextmanager
async def running(program: Program, ready: bool = True, status: int = 0, **env: str) -> AsyncIterator[Program]:
    """Run the program with `env` in its environment, until it ends with `status`; `ready`: wait until it listens."""
    program.start(**env)
    try:
        if ready:
            text = await program.logged("listening on ")
            program.port = int(text.partition("listening on ")[2].split("\n")[0].rsplit(":", 1)[1])
        yield program
        if ready and not status:
            program.process.terminate()
        await until(lambda: program.process.poll() is not None)
        assert program.process.returncode == status
    finally:
        program.process.kill()
        program.process.wait()
    text = program.log.read_text()
    assert "second signal: closing now\n" in text if status else text.endswith("INFO stopped\n")
    assert "Traceback" not in text and "sk-secret" not in text


async def test_sighup_under_load(tmp_path: Path) -> None:
    """Keys, controllers and limits are replaced as a whole, without a failed request or a cut stream. Unchanged
    controllers keep their state, and a bad file changes nothing."""
    go = asyncio.Event()

    async def script(peer: Peer, message: Message) -> None:
        if "x-hold" not in message.headers:
            await peer.send(GOOD)
            return
        await peer.send(SSE_HEAD + app.chunk(event("a")))
        await go.wait()
        await peer.send(app.chunk(event("b") + DONE) + b"0\r\n\r\n")

    alice, bob = {"name": "alice", "key": "alice-key-123456"}, {"name": "bob", "key": "$SOME_KEY"}
    program = Program(tmp_path)
    async with Upstream(script) as up:
        program.write(controller("a", up.url), controller("b", up.url), client_keys=[alice])
        async with running(program):
            held = await program.open()
            await held.post("m", "X-Hold: 1", "api-key: alice-key-123456", stream=True)
            await held.read(head_only=True)
            statuses: list[int] = []

            async def load() -> None:
                client = await program.open()
                while not go.is_set():
                    await client.post("m", "api-key: alice-key-123456")
                    statuses.append((await client.read()).status)
                client.close()

            loads = [asyncio.ensure_future(load()) for _ in range(4)]
            for number in range(6):
                more = {"limits": {"rpm": 1_000_000 + number}}
                program.write(controller("a", up.url), controller("c", up.url, **more), client_keys=[alice, bob])
                await program.reload("reload: controllers")
            text = program.file.read_text()
            for broken in (text[:-1], text.replace('"alice"', '"bob"'), text.replace("$SOME_KEY", "$NO_KEY"), ""):
                program.file.write_text(broken)
                await program.reload("reload: keeping the running configuration: ")
                assert (await program.ask("api-key: sk-named-named-named-aaaa")).status == 200
            go.set()
            await asyncio.gather(*loads)
            assert set(statuses) == {200} and len(statuses) > 10
            program.write(controller("a", up.url), client_keys=[{**bob, "admin": True}])
            await program.reload("reload: client_keys: alice, bob -> bob")
            assert await held.reader.readuntil(DONE + b"\r\n0\r\n\r\n")
            held.close()
            assert (await program.ask("api-key: alice-key-123456")).status == 401
            status = request(b"", "api-key: sk-named-named-named-aaaa", target="/status?verbose=1", method="GET")
            (state,) = (await program.ask(raw=status)).json()["controllers"]
            assert state["name"] == "a" and state["requests"] > len(statuses) // 4


async def test_sighup_replaces_the_certificate(tmp_path: Path) -> None:
    """New connections get the new certificate, old ones go on; one that does not fit its key changes nothing."""
    foreign = [str(Path(CERT).parent / name) for name in ("foreign.pem", "foreign.key")]
    names = [str(tmp_path / name) for name in ("server.pem", "server.key")]
    program = Program(tmp_path)
    program.write({"type": "echo", "models": ["*"]}, tls={"cert": names[0], "key": names[1]})
    for source, target in zip((CERT, KEY), names, strict=True):
        copy(source, target)
    async with running(program):
        old = await program.open(CERT)
        copy(foreign[0], names[0])
        await program.reload("reload: keeping the running configuration: ")
        (await program.open(CERT)).close()
        copy(foreign[1], names[1])
        await program.reload("reload: nothing changed")
        with pytest.raises(ssl.SSLCertVerificationError):
            await program.open(CERT)
        new = await program.open(foreign[0])
        for client in (old, new):
            await client.post("m")
            assert (await client.read()).status == 200
            client.close()


def start_demo(folder: Path) -> "subprocess.Popen[bytes]":
    """Start the program on echo controllers, its log a pipe."""
    return subprocess.Popen([sys.executable, str(PROGRAM), "--demo", "--port", "0"], cwd=folder, stderr=subprocess.PIPE)


async def test_a_log_without_a_reader(tmp_path: Path) -> None:
    """The program goes on when its log is a full or closed pipe, logs how much was dropped, and ends with status 0."""
    missing = request(b"", target="/" + "x" * 4000, method="GET")
    for gone in (False, True):
        with start_demo(tmp_path) as server:
            assert server.stderr is not None
            line = next(line for line in server.stderr if b"listening" in line)
            client = Client(*await asyncio.open_connection("127.0.0.1", int(line.rpartition(b":")[2])))
            for number in range(450):
                if number == 300 and gone:
                    server.stderr.close()
                elif number == 300:
                    next(line for line in server.stderr if b" lines dropped" in line)
                await client.send(missing)
                assert (await client.read()).status == 404
            client.close()
            server.terminate()
            assert server.wait(15) == 0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_it_at_once(tmp_path: Path, first: int) -> None:
    """The first signal lets open answers end, the second does not wait for them and exits with status 1."""
    asked, program = asyncio.Event(), Program(tmp_path)

    async def script(peer: Peer, message: Message) -> None:
        if message.start.startswith("POST"):  # and not the question for the models
            asked.set()
        await peer.gone()

    async with Upstream(script) as up:
        program.write(controller("a", up.url))
        async with running(program, status=1):
            client = await program.open()
            await client.post("m")
            await asked.wait()
            program.process.send_signal(first)
            await program.logged("stopping: 1 connections open; waiting up to 30 s, a second signal ends it now")
            program.process.send_signal(signal.SIGINT)
            await client.closed()
            client.close()
        assert "tried=a:stopped:" in program.log.read_text()


# A module that every Python process imports at its start, if it finds it: the resolver never answers for one name.
NO_RESOLVER = """
import os, socket, threading
def getaddrinfo(host, *more, real=socket.getaddrinfo, **named):
    if host != "nowhere.example":
        return real(host, *more, **named)
    os.write(2, b"looking for nowhere.example\\n")
    threading.Event().wait()
socket.getaddrinfo = getaddrinfo
"""


# As NO_RESOLVER: the program sends itself a signal at its first import of asyncio, long before it could serve.
EARLY = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "asyncio":
            os.kill(os.getpid(), int(os.environ["EARLY_SIGNAL"]))
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("early", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
async def test_signals_that_come_before_the_server(tmp_path: Path, early: int) -> None:
    """A SIGHUP during the start reloads once the server is up; a SIGTERM or SIGINT stops it with status 0."""
    (tmp_path / "sitecustomize.py").write_text(EARLY)
    program = Program(tmp_path)
    program.write({"type": "echo", "models": ["*"]})
    reloads = early == signal.SIGHUP
    async with running(program, ready=reloads, PYTHONPATH=str(tmp_path), EARLY_SIGNAL=str(int(early))):
        if reloads:
            await program.logged("reload: nothing changed")


async def test_a_hanging_lookup_does_not_delay_the_end(tmp_path: Path) -> None:
    """The program ends with status 0 and its log written while a lookup hangs, and other names are still resolved."""
    (tmp_path / "sitecustomize.py").write_text(NO_RESOLVER)
    program = Program(tmp_path)
    async with Upstream(answers(GOOD)) as up:
        local = controller("local", up.url.replace("127.0.0.1", "localhost"), models=["local"])
        program.write(controller("dead", "http://nowhere.example/v1", models=["m"]), local)
        async with running(program, PYTHONPATH=str(tmp_path)):
            clients = [await program.open() for _ in range(10)]
            for client in clients:
                await client.post("m")
            await program.logged("looking for nowhere.example", len(clients))
            other = await program.open()
            await other.post("local")
            assert (await other.read()).status == 200
            for client in (*clients, other):
                client.reset()


async def test_reload_warns_of_an_open_server(tmp_path: Path) -> None:
    """A reload without the client keys that guarded a public address warns as loudly as a start."""
    program = Program(tmp_path)
    echo = {"type": "echo", "models": ["*"]}
    program.write(echo, host="0.0.0.0", client_keys=[{"name": "alice", "key": "sk-secret-alice"}])
    async with running(program):
        assert "EVERY CLIENT" not in program.log.read_text()
        program.write(echo, host="0.0.0.0", log={"level": "warning"})
        await program.reload("WARNING EVERY CLIENT THAT REACHES 0.0.0.0:0 CAN USE THESE ACCOUNTS")
        program.write(echo, host="0.0.0.0", log={"level": "info"})
        await program.reload("reload: log.level: warning -> info")
        assert program.log.read_text().count("EVERY CLIENT") == 1


async def test_a_log_file_of_json_lines(tmp_path: Path) -> None:
    """Every line is JSON. After a rename SIGUSR1 makes a new file; where that cannot be made, the log stays where it is."""
    program, path, old = Program(tmp_path), tmp_path / "logs" / "server.log", tmp_path / "old.log"
    path.parent.mkdir()
    program.write({"type": "echo", "name": "echo"}, log={"file": str(path), "format": "json"})
    program.start()
    stderr, program.log = program.log, path
    try:
        await until(path.exists)
        program.port = int(re.findall(r"listening on .*:(\d+)", await program.logged("listening on "))[0])
        await program.ask()
        await program.logged('"body":"request"')
        path.rename(old)
        program.process.send_signal(signal.SIGUSR1)
        await until(path.exists)
        await program.ask()
        await program.logged('"body":"request"')
        path.parent.rename(tmp_path / "moved")
        program.log = tmp_path / "moved" / "server.log"
        program.process.send_signal(signal.SIGUSR1)
        await program.logged("log.file: cannot open")
        program.process.terminate()
        assert await asyncio.to_thread(program.process.wait, 15) == 0
    finally:
        program.process.kill()
    lines = [json.loads(line) for line in (old.read_text() + program.log.read_text()).splitlines()]
    assert [line["body"] for line in lines].count("request") == 2 and lines[-1]["body"] == "stopped" and not stderr.read_text()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"]) for line in lines)
