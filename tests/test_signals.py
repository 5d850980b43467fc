"""The program as a process: SIGHUP under load, keys and certificates replaced, a bad file, few open files."""

import asyncio
import json
import os
import platform
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

from .support import (
    ANSWER,
    CERT,
    KEY,
    SSE_HEAD,
    Client,
    Message,
    Peer,
    Upstream,
    answers,
    controller,
    event,
    json_reply,
    request,
)

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

    def start(self, prefix: str) -> None:
        """Start, by a shell that runs `prefix` first."""
        command = ["/bin/sh", "-c", '%s exec "$0" "$@"' % prefix, sys.executable, str(PROGRAM), "--config_file", str(self.file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env=dict(os.environ, SOME_KEY="sk-named-named-named-aaaa"))

    async def told(self, words: str, times: int = 1) -> str:
        """Wait until the log says `words`; the log."""
        async with asyncio.timeout(15):
            while (text := self.log.read_text()).count(words) < times:
                assert self.process.poll() is None, text
                await asyncio.sleep(0)
        return text

    async def ready(self) -> None:
        """Wait until the port is known."""
        text = await self.told("listening on ")
        self.port = int(text.partition("listening on ")[2].split("\n")[0].rsplit(":", 1)[1])

    async def reload(self, words: str = "reload: ") -> str:
        """Send SIGHUP and wait for what the log says of it; the log."""
        count = self.log.read_text().count(words)
        self.process.send_signal(signal.SIGHUP)
        return await self.told(words, count + 1)

    async def open(self, ca_file: str = "") -> Client:
        """A connection."""
        context = ssl.create_default_context(cafile=ca_file) if ca_file else None
        return Client(*await asyncio.open_connection("localhost" if context else "127.0.0.1", self.port, ssl=context))

    async def post(self, *lines: str) -> Message:
        """One request on a connection of its own."""
        client = await self.open()
        await client.post("m", *lines)
        found = await client.read()
        client.close()
        return found


@asynccontextmanager
async def running(program: Program, prefix: str = "") -> AsyncIterator[Program]:
    """The program, started by a shell that runs `prefix` first, until SIGTERM ends it with status 0."""
    program.start(prefix)
    try:
        await program.ready()
        yield program
        program.process.terminate()
        await program.told("stopped")
    finally:
        program.process.kill()
        assert program.process.wait() in (0, -signal.SIGKILL)
    assert "Traceback" not in program.log.read_text() and "sk-secret" not in program.log.read_text()


async def test_sighup_under_load(tmp_path: Path) -> None:
    """Keys, controllers and limits are replaced as a whole; open streams go on, other requests lose nothing, and what is
    unchanged keeps its state. A bad file changes nothing."""
    go = asyncio.Event()

    async def script(peer: Peer, message: Message) -> None:
        if "x-hold" not in message.headers:
            await peer.send(GOOD)
            return
        await peer.send(SSE_HEAD + app.chunk(event("a")))
        await go.wait()
        await peer.send(app.chunk(event("b")) + b"0\r\n\r\n")

    alice, bob = {"name": "alice", "key": "alice-key-123456"}, {"name": "bob", "key": "$SOME_KEY"}
    program = Program(tmp_path)
    async with Upstream(script) as one:
        program.write(controller("a", one.url), controller("b", one.url), client_keys=[alice])
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
                program.write(controller("a", one.url), controller("c", one.url, **more), client_keys=[alice, bob])
                await program.reload("reload: controller c: ")
            text = program.file.read_text()
            for broken in (text[:-1], text.replace('"alice"', '"bob"'), text.replace("$SOME_KEY", "$NO_KEY"), ""):
                program.file.write_text(broken)
                await program.reload("reload: the old configuration stays: ")
                assert (await program.post("api-key: sk-named-named-named-aaaa")).status == 200
            go.set()
            await asyncio.gather(*loads)
            assert set(statuses) == {200} and len(statuses) > 10
            program.write(controller("a", one.url), client_keys=[bob])
            await program.reload("reload: client key alice: removed")
            assert await held.reader.readuntil(event("b") + b"\r\n0\r\n\r\n")
            held.close()
            assert (await program.post("api-key: alice-key-123456")).status == 401
            client = await program.open()
            await client.send(request(b"", "api-key: sk-named-named-named-aaaa", target="/status?verbose=1", method="GET"))
            (state,) = (await client.read()).json()["controllers"]
            client.close()
            assert state["name"] == "a" and state["requests"] > len(statuses) // 4


async def test_sighup_replaces_the_certificate(tmp_path: Path) -> None:
    """New connections see the new certificate, old ones go on; one that does not fit its key changes nothing."""
    foreign = [str(Path(CERT).parent / name) for name in ("foreign.pem", "foreign.key")]
    names = [str(tmp_path / name) for name in ("server.pem", "server.key")]
    program = Program(tmp_path)
    program.write({"type": "echo", "models": ["*"]}, tls={"cert": names[0], "key": names[1]})
    for source, target in zip((CERT, KEY), names, strict=True):
        copy(source, target)
    async with running(program):
        old = await program.open(CERT)
        copy(foreign[0], names[0])
        await program.reload("reload: the old configuration stays: ")
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
    """The program on echo controllers, its log a pipe."""
    return subprocess.Popen([sys.executable, str(PROGRAM), "--demo", "--port", "0"], cwd=folder, stderr=subprocess.PIPE)


async def test_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """The program serves on when its log is a pipe that is full, tells what was dropped, and ends as it should."""
    missing = request(b"", target="/" + "x" * 4000, method="GET")
    for gone in (False, True):
        with start_demo(tmp_path) as server:
            assert server.stderr is not None
            while b"listening" not in (line := server.stderr.readline()):
                assert line
            client = Client(*await asyncio.open_connection("127.0.0.1", int(line.rpartition(b":")[2])))

            async def flood(client: Client = client) -> None:
                for _ in range(150):
                    await client.send(missing)
                    assert (await client.read()).status == 404

            await flood()
            await flood()
            if gone:
                server.stderr.close()
            else:
                while b"dropped: nobody read them" not in server.stderr.readline():
                    pass
            await flood()
            client.close()
            server.terminate()
            assert server.wait(15) == 0


async def test_few_open_files(tmp_path: Path) -> None:
    """Where the system allows few open files, fewer clients are let in, and those are served."""
    program = Program(tmp_path)
    async with Upstream(answers(GOOD)) as one:
        program.write(controller("a", one.url))
        async with running(program, "ulimit -n 120;"):
            await program.told("open files are limited to 120: at most 36 clients at once")
            clients = [await program.open() for _ in range(150)]
            for client in clients[:36]:
                await client.post("m")
            assert [(await client.read()).status for client in clients[:36]] == [200] * 36
            assert (await clients[-1].read()).status == 503
            for client in clients:
                client.close()


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """The first signal lets open answers end, the second does not wait for them and is told by the exit status."""
    asked = asyncio.Event()

    async def script(peer: Peer, message: Message) -> None:
        asked.set()
        await peer.gone()

    for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)):
        asked.clear()
        program = Program(tmp_path)
        async with Upstream(script) as one:
            program.write(controller("a", one.url))
            program.start("")
            await program.ready()
            client = await program.open()
            await client.post("m")
            await asked.wait()
            program.process.send_signal(first)
            await program.told("stopping: 1 connections open")
            program.process.send_signal(second)
            assert program.process.wait(15) == 1
            client.close()
        text = program.log.read_text()
        assert text.endswith("second signal: closing now\n") and "Traceback" not in text


# Read by a Python that finds it: a resolver that never answers.
NO_RESOLVER = """
import socket, sys, threading
def getaddrinfo(host, *more, real=socket.getaddrinfo, **named):
    if host != "nowhere.example":
        return real(host, *more, **named)
    print("looking for", host, file=sys.stderr, flush=True)
    threading.Event().wait()
socket.getaddrinfo = getaddrinfo
"""


async def test_it_ends_while_a_name_is_looked_for(tmp_path: Path) -> None:
    """No lookup that hangs keeps it from ending, with status 0 and its log written."""
    (tmp_path / "sitecustomize.py").write_text(NO_RESOLVER)
    program = Program(tmp_path)
    program.write(controller("a", "http://nowhere.example/v1"))
    program.start("PYTHONPATH='%s'" % tmp_path)
    try:
        await program.ready()
        client = await program.open()
        await client.post("m")
        await program.told("looking for nowhere.example")
        client.reset()
        program.process.terminate()
        assert program.process.wait(15) == 0
    finally:
        program.process.kill()
        program.process.wait()
    assert program.log.read_text().endswith("INFO stopped\n")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back, or do not, by themselves")
async def test_a_script_keeps_nothing_of_its_parser(tmp_path: Path) -> None:
    """As a script it has threads to look up names in, and gives back the memory that reading the script took."""
    program = Program(tmp_path)
    async with Upstream(answers(GOOD)) as one:
        program.write(controller("a", one.url.replace("127.0.0.1", "localhost")))
        async with running(program):
            assert (await program.post()).status == 200
            status = Path("/proc/%d/status" % program.process.pid).read_text().split()
            most, now = (int(status[status.index(name) + 1]) for name in ("VmHWM:", "VmRSS:"))
            assert most - now > 8_000, (most, now)
