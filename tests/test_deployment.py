"""The program under a service manager, and the files in config/ that start it there."""

import asyncio
import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import chatgpt_apiserver as app

from .support import CERT, KEY, Running
from .test_signals import PROGRAM, Program, running

CONFIG = PROGRAM.parent / "config"
ECHO = {"type": "echo", "name": "echo"}
# Makes a file number 3, sets LISTEN_PID, and becomes the program.
WITH_FILE_3 = [
    sys.executable,
    "-c",
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
    " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])",
]


def tool(name: str) -> str:
    """Return the path of a program; skip the test where the machine lacks it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    return path


class Manager:
    """A service manager: it owns the listening socket and is told the states of the service."""

    def __init__(self, folder: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = str(folder / "notify")
        self.states = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.states.bind(self.address)
        self.states.settimeout(15)

    def start(self, *flags: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the program with the socket as file 3, as sd_listen_fds(3) describes it; as a demo without flags."""
        number = self.listener.fileno()
        command = [*WITH_FILE_3, str(number), str(PROGRAM), *(flags or ["--demo"])]
        env = {**os.environ, "NOTIFY_SOCKET": self.address, "LISTEN_FDS": "1", **env}
        return subprocess.Popen(command, env=env, pass_fds=[number], stderr=subprocess.DEVNULL)

    def told(self, word: str) -> str:
        """Wait for a state that begins with `word`; return it."""
        while not (state := self.states.recv(4096).decode()).startswith(word):
            pass
        return state

    def get(self) -> bytes:
        """Return the answer to a request on a connection of its own."""
        with socket.create_connection(self.listener.getsockname(), 15) as client:
            client.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: client.recv(65536), b""))


@contextmanager
def managed(folder: Path) -> Iterator[Manager]:
    """Return a service manager; close its sockets at the end."""
    manager = Manager(folder)
    try:
        yield manager
    finally:
        manager.listener.close()
        manager.states.close()


def test_socket_activation_and_states(tmp_path: Path) -> None:
    """The service uses the manager's socket and tells READY, RELOADING, STOPPING and WATCHDOG."""
    with managed(tmp_path) as manager, manager.start("--demo", "--port", "1", WATCHDOG_USEC="100000") as process:
        try:
            manager.told("READY=1")
            assert manager.get().startswith(b"HTTP/1.1 200 ")
            manager.told("WATCHDOG=1")
            manager.told("WATCHDOG=1")
            process.send_signal(signal.SIGHUP)
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.told("RELOADING"))
            manager.told("READY=1")
            process.terminate()
            manager.told("STOPPING=1")
            assert process.wait(15) == 0
        finally:
            process.kill()


def test_a_replacement_loses_no_request(tmp_path: Path) -> None:
    """While no process serves, connections wait in the manager's socket; the next process answers them."""
    with managed(tmp_path) as manager:
        with manager.start() as process:
            manager.told("READY=1")
            process.terminate()
            assert process.wait(15) == 0
        with socket.create_connection(manager.listener.getsockname(), 15) as early, manager.start() as process:
            early.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert early.recv(65536).startswith(b"HTTP/1.1 200 ")
            process.terminate()
            assert process.wait(15) == 0


def test_sockets_for_another_process_are_left_alone() -> None:
    """LISTEN_PID names the process that the sockets are for; a file that does not listen is an error in words."""
    assert app.inherited_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    words = [*WITH_FILE_3, "0", str(PROGRAM), "--demo"]
    env = {**os.environ, "LISTEN_FDS": "1"}
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False, env=env)
    assert ended.returncode == 2 and ended.stderr.startswith("LISTEN_FDS: file 3 cannot be used: ")


async def test_reuse_port(tmp_path: Path) -> None:
    """A new server listens on the port of one that still serves, and goes on when that one has stopped."""
    old = Program(tmp_path)
    old.write(ECHO, reuse_port=True)
    async with running(old):
        (tmp_path / "new").mkdir()
        new = Program(tmp_path / "new")
        new.write(ECHO, reuse_port=True, port=old.port)
        async with running(new):
            assert new.port == old.port
            old.process.terminate()
            await asyncio.to_thread(old.process.wait, 15)
            assert [(await new.ask()).status for _ in range(5)] == [200] * 5


@pytest.mark.parametrize("tls", [{}, {"cert": CERT, "key": KEY}])
async def test_the_health_check(tmp_path: Path, tls: dict[str, str]) -> None:
    """It asks the server of the configuration, whatever proxy is set, and says why when there is no answer."""
    program = Program(tmp_path)
    program.write(ECHO, tls=tls)
    async with running(program):
        command = [sys.executable, str(PROGRAM), "--healthcheck", "-c", str(program.file), "--port", str(program.port)]
        env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        ask = {"capture_output": True, "text": True, "env": env, "timeout": 30, "check": False}
        well = await asyncio.to_thread(subprocess.run, command, **ask)
        assert (well.returncode, json.loads(well.stdout)) == (0, {"status": "ok"})
    ended = await asyncio.to_thread(subprocess.run, command, **ask)
    assert ended.returncode == 1 and re.fullmatch(r"no answer from https?://127.0.0.1:\d+: .+\n", ended.stderr)


# -- the files in config/


def test_the_image_checks_its_health() -> None:
    """The Dockerfile's check is a flag of the program."""
    file = (PROGRAM.parent / "Dockerfile").read_text()
    entry, check = (json.loads(file.partition(word)[2].partition("\n")[0]) for word in ("ENTRYPOINT", " CMD "))
    assert entry == check[:3] and app.parse_flags(check[3:])[0].healthcheck


def test_the_systemd_units(tmp_path: Path) -> None:
    """The unit starts the program with flags that it has, its key is where systemd puts it, and systemd accepts it."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    text = (CONFIG / "chatgpt-apiserver.service").read_text()
    unit.read_string(text)
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[:3] == ["/usr/bin/python3", "-m", "chatgpt_apiserver"] and app.parse_flags(words[3:])
    name = unit["Service"]["LoadCredential"].partition(":")[0]
    assert f'"api_key": "file:/run/credentials/chatgpt-apiserver.service/{name}"' in text
    verify = tool("systemd-analyze")
    units = [shutil.copy(CONFIG / f"chatgpt-apiserver.{kind}", tmp_path) for kind in ("service", "socket")]
    ended = subprocess.run([verify, "verify", *units], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


async def test_the_nginx_file_passes_the_doors() -> None:
    """The Host of the file is accepted by a server on loopback; nginx's own is not."""
    host = re.search(r"proxy_set_header Host (\S+);", (CONFIG / "nginx.conf").read_text())
    assert host
    async with Running() as server:
        for name, status in ((host.group(1), 200), ("chatgpt_apiserver", 403)):
            client = await server.open()
            await client.send(b"GET /v1/models HTTP/1.1\r\nHost: %b\r\n\r\n" % name.encode())
            assert (await client.read()).status == status
            client.close()


def test_nginx_accepts_its_file(tmp_path: Path) -> None:
    """nginx reads the file."""
    main = tmp_path / "nginx.conf"
    main.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; include {CONFIG}/nginx.conf; }}")
    command = [tool("nginx"), "-t", "-q", "-c", str(main), "-e", str(tmp_path / "errors")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_kubectl_accepts_the_manifests(tmp_path: Path) -> None:
    """kubectl reads the manifests, and the configuration in them is one that the program accepts."""
    shutil.copy(CONFIG / "kubernetes.yml", tmp_path)
    (tmp_path / "kustomization.yaml").write_text("resources: [kubernetes.yml]\n")
    built = subprocess.run(
        [tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert built.returncode == 0, built.stderr
    assert re.findall(r"^kind: (\w+)", built.stdout, re.MULTILINE) == ["ConfigMap", "Service", "Deployment"]


def test_the_configuration_in_the_manifests(tmp_path: Path) -> None:
    """It is one that the program accepts, with secrets where the manifests mount them."""
    text = (CONFIG / "kubernetes.yml").read_text()
    block = text.partition("chatgpt-apiserver.json: |\n")[2].partition("---")[0]
    mounted = re.search(r"name: secrets, mountPath: ([\w/-]+)", text)
    assert mounted and block.count("file:" + mounted.group(1)) == 2
    for name in ("openai", "client"):
        (tmp_path / name).write_text("sk-not-a-real-key-" + name)
    (tmp_path / "c.json").write_text(block.replace(mounted.group(1), str(tmp_path)))
    assert app.main(["--check", "-c", str(tmp_path / "c.json")]) == 0


def test_docker_accepts_the_compose_file() -> None:
    """docker compose reads the file; what it mounts exists."""
    text = (CONFIG / "compose.yml").read_text()
    assert (CONFIG / re.findall(r"- \./(\S+?):", text)[0]).is_file()
    found = shutil.which("docker-compose")
    compose = [found] if found else [tool("docker"), "compose"]
    if subprocess.run([*compose, "version"], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("no docker compose here")
    command = [*compose, "-f", str(CONFIG / "compose.yml"), "config", "-q"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "OPENAI_API_KEY": "x"}
    )
    assert (ended.returncode, ended.stderr) == (0, "")
