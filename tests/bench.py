#!/usr/bin/env python3
"""What a request, a stream and a streamed event cost, beside other gateways: python3 tests/bench.py

Upstream, gateways and load run in processes of their own, on loopback. What a gateway costs is the CPU time that Linux
counts for it and its children, so it depends little on how busy the machine is with the load. Beside this server there
are a relay of asyncio streams without any feature, nginx where it is installed, and if asked for LiteLLM and Portkey's
gateway, these with fewer clients where events are paced. All answer the same load in turn, in rounds of alternating
order; a figure is the median of the rounds, and so is a ratio, which is taken within a round.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CERT, KEY = (str(ROOT / "tests" / "certs" / name) for name in ("localhost.pem", "localhost.key"))
EVENTS = 50  # of a stream, before its [DONE]
STARTS = 9  # of each way of starting
RAMP_S = 1.0  # in which the clients of paced streams begin, one after the other
START_S = 120.0  # what a gateway may take until it listens
SLACK_S = 30.0  # what a load may take beyond its seconds and its streams
STOP_S = 5.0  # what a process has to end after SIGTERM
COLUMNS = THIS, RAW, NGINX, LITELLM, PORTKEY = "this server", "raw relay", "nginx", "LiteLLM", "Portkey"
SHARE = {LITELLM: 40, PORTKEY: 10}  # slower by far: so many times fewer paced streams, which they can keep up with
NOWHERE = "http://127.0.0.1:9"
Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Case(NamedTuple):
    """A kind of load; a gap is the time between the events of a stream, without one answers are whole.

    `sdk`: heads are as long as those of the openai package and of OpenAI, lengths differ, and there are ten accounts.
    """

    unit: str
    clients: int
    prompt: int = 400
    gap_ms: int | None = None
    tls: bool = False
    sdk: bool = False


CASES = {
    "json": Case("request", 32),
    "sdk": Case("request", 32, sdk=True),
    "json-tls": Case("request", 32, tls=True),
    "big": Case("request", 8, prompt=100_000),
    "one": Case("request", 1),
    "sse": Case("stream", 32, gap_ms=0),
    "timed": Case("event", 200, gap_ms=20),
    "timed1k": Case("event", 1000, gap_ms=100),
    "timed-tls": Case("event", 200, gap_ms=20, tls=True),
}


# ---- the upstream and the raw relay

EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"gpt-4.1",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = EVENT.replace(b'n":null}]', b'n":"stop"}]')
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"gpt-4.1","choices":[{"index":0,"message":{'
    b'"role":"assistant","content":"%b"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":99,'
    b'"total_tokens":108}}' % (b"x" * 500)
)


SDK = """Accept: application/json\r
User-Agent: OpenAI/Python 3.57.0\r
X-Stainless-Lang: python\r
X-Stainless-Package-Version: 3.57.0\r
X-Stainless-OS: Linux\r
X-Stainless-Arch: x64\r
X-Stainless-Runtime: CPython\r
X-Stainless-Runtime-Version: 3.12.1\r
X-Stainless-Async: false\r
x-stainless-retry-count: 0\r
x-stainless-read-timeout: 600\r
Authorization: Bearer sk-bench\r
Accept-Encoding: gzip, deflate\r
Connection: keep-alive\r
"""
OPENAI = b"""HTTP/1.1 200 OK\r
Date: Fri, 27 Nov 2026 08:15:%02d GMT\r
Content-Type: application/json\r
Content-Length: %d\r
Connection: keep-alive\r
access-control-expose-headers: X-Request-ID\r
openai-organization: org-bench\r
openai-processing-ms: %d\r
openai-project: proj_bench\r
openai-version: 2020-10-01\r
x-envoy-upstream-service-time: %d\r
x-ratelimit-limit-requests: 10000\r
x-ratelimit-limit-tokens: 30000000\r
x-ratelimit-remaining-requests: 9999\r
x-ratelimit-remaining-tokens: %d\r
x-ratelimit-reset-requests: 6ms\r
x-ratelimit-reset-tokens: 0s\r
x-request-id: req_9f8d7c6b5a4f3e2d1c0b%08x\r
cf-cache-status: DYNAMIC\r
Set-Cookie: __cf_bm=%032x; path=/; expires=Fri, 27-Nov-26 08:45:22 GMT; domain=.api.openai.com; HttpOnly; Secure\r
Strict-Transport-Security: max-age=31536000; includeSubDomains; preload\r
X-Content-Type-Options: nosniff\r
Server: cloudflare\r
CF-RAY: 8f2b%08x-FRA\r
alt-svc: h3=":443"; ma=86400\r
\r
"""


def openai_answer(number: int) -> bytes:
    """With the lines that differ in each of OpenAI's."""
    took, left = number * 7 % 1500, 30_000_000 - number * 13 % 90_000
    return OPENAI % (number // 1000 % 60, len(WHOLE), took, took + 3, left, number, number, number) + WHOLE


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def content_length(head: bytes) -> int | None:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 : head.find(b"\r\n", at)]) if at >= 0 else None


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(content_length(head) or 0)


async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers whole, if its `user` is sdk as OpenAI does; a request whose `user` names a gap gets events, that far
    apart."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        for answer in itertools.count(random.randrange(10**6)):
            request = await read_request(reader)
            gap = re.search(rb"gap=(\d+)", request)
            if gap is None:
                writer.write(openai_answer(answer) if b'"sdk"' in request else whole)
                continue
            writer.write(head)
            for number in range(EVENTS):
                writer.write(chunk(EVENT if number < EVENTS - 1 else LAST))
                if int(gap[1]):
                    await asyncio.sleep(int(gap[1]) / 1000)
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    except (EOFError, OSError):
        writer.close()


def raw_relay(port: int, tls: ssl.SSLContext | None) -> Callable[..., Any]:
    """The floor of this approach: no parsing, no checks, no failover."""
    idle: list[Link] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await read_request(reader)
                link = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port, ssl=tls)
                link[1].write(request)
                head = await link[0].readuntil(b"\r\n\r\n")
                length = content_length(head)
                if length is not None:
                    writer.write(head + await link[0].readexactly(length))
                else:
                    writer.write(head)
                    data = b""
                    while not data.endswith(b"0\r\n\r\n"):
                        data = await link[0].read(65536)
                        writer.write(data)
                        await writer.drain()
                idle.append(link)
        except (EOFError, OSError):
            writer.close()

    return relay


async def serve(handler: Callable[..., Any], port: int, tls: ssl.SSLContext | None = None) -> None:
    server = await asyncio.start_server(handler, "127.0.0.1", port, limit=1 << 20, backlog=2048, ssl=tls)
    await server.serve_forever()


# ---- the load


class Load:
    """Keep-alive clients in a closed loop, and what they saw."""

    def __init__(
        self, port: int, clients: int, seconds: float, prompt: int, gap_ms: int | None, sdk: bool, headers: str
    ) -> None:
        self.port, self.clients, self.gap_ms, self.end = port, clients, gap_ms, time.monotonic() + seconds
        more = {"user": "sdk"} if sdk else {} if gap_ms is None else {"stream": True, "user": f"gap={gap_ms}"}
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + headers
        lines = "".join(line for line in SDK.splitlines(True) if sdk and line.split(":")[0] not in headers)
        wires = []
        for extra in range(100 if sdk else 1):
            message = {"role": "user", "content": "abcdef " * (prompt // 7) + "x" * extra}
            body = json.dumps({"model": "gpt-4.1", **more, "messages": [message]})
            wires.append(f"{head}{lines}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self.wires = itertools.cycle(wires)
        self.times: list[float] = []
        self.gaps: list[float] = []
        self.errors: Counter[str] = Counter()

    async def run(self) -> dict[str, Any]:
        await asyncio.gather(*(self.client(number) for number in range(self.clients)))
        gaps = sorted(self.gaps) or [0.0]
        found = {"p50_ms": 1e3 * statistics.median(self.times or [0.0]), "p99_ms": 1e3 * gaps[len(gaps) * 99 // 100]}
        return {"done": len(self.times), "errors": self.errors, **found}

    async def client(self, number: int) -> None:
        """Asks at least once, and again until the time is over."""
        await asyncio.sleep(RAMP_S * number / self.clients if self.gap_ms else 0)
        link: Link | None = None
        while True:
            try:
                link = link or await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
                await self.ask(*link)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as failed:
                self.errors[type(failed).__name__] += 1
                if link is not None:
                    link[1].close()
                link = None
                await asyncio.sleep(0.05)
            if time.monotonic() >= self.end:
                return

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request; only a complete answer with status 200 counts."""
        since = time.monotonic()
        writer.write(next(self.wires))
        head = await reader.readuntil(b"\r\n\r\n")
        length = content_length(head)
        body = await (self.chunks(reader) if length is None else reader.readexactly(length))
        if not head.startswith(b"HTTP/1.1 200"):
            self.errors[head[9:12].decode("latin-1")] += 1
        elif self.gap_ms is not None and (b"[DONE]" not in body or body.count(b"data: ") <= EVENTS):
            self.errors["events missing"] += 1
        else:
            self.times.append(time.monotonic() - since)

    async def chunks(self, reader: asyncio.StreamReader) -> bytes:
        """A chunked body; notes the time between its chunks, which are events where these are paced."""
        found, times = [], []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            found.append((await reader.readexactly(size + 2))[:-2])
            times.append(time.monotonic())
        await reader.readuntil(b"\r\n")
        self.gaps += [after - before for before, after in itertools.pairwise(times)]
        return b"".join(found)


# ---- processes


class Processes:
    """What was started, so that it ends with the bench: on Ctrl-C, SIGTERM and SIGHUP too, even amid a start."""

    def __init__(self, log: Path) -> None:
        self.log, self.deaf, self.asked = log.open("ab"), False, False
        self.running: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.on_signal)

    def on_signal(self, *_: object) -> None:
        self.asked = True
        if not self.deaf:
            raise KeyboardInterrupt

    def start(self, command: list[str], env: Mapping[str, str] | None = None, out: int | None = None) -> subprocess.Popen[bytes]:
        """In a group of its own, so that it ends with all that it starts."""
        more = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "", **(env or {})}
        self.deaf = True
        try:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out or self.log, "stderr": self.log}
            self.running.append(subprocess.Popen(command, env=more, process_group=0, **streams))  # type: ignore[call-overload]
        finally:
            self.deaf = False
        if self.asked:
            raise KeyboardInterrupt
        return self.running[-1]

    def stop(self, *which: subprocess.Popen[bytes]) -> None:
        """Ends these, or all: by force what does not end when it is asked."""
        ending, deadline = list(which or self.running), time.monotonic() + STOP_S
        for process in ending:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in ending:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.running.remove(process)


def tree(pid: int) -> list[Path]:
    """The folders in /proc of a process and of all that descend from it."""
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [Path(f"/proc/{pid}"), *(folder for child in children for folder in tree(int(child)))]


def cpu_us(pid: int) -> float:
    """CPU time of a process and its children, which the kernel counts in nanoseconds for each thread."""
    return sum(int(thread.read_text().split()[0]) for one in tree(pid) for thread in one.glob("task/*/schedstat")) / 1000


def rss_kb(pid: int) -> float:
    return sum(int((one / "statm").read_text().split()[1]) for one in tree(pid)) * os.sysconf("SC_PAGE_SIZE") / 1000


def free_port() -> int:
    """One below those that the system gives to outgoing connections, of which the load makes thousands."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    sys.exit("bench: no free port")


# ---- the gateways


class Gateway(NamedTuple):
    name: str
    port: int
    command: list[str]
    env: Mapping[str, str] = {}
    headers: str = ""  # what its clients send in addition


def this_server(name: str, url: str, folder: Path, command: list[str], accounts: int = 2) -> Gateway:
    """Some accounts; everything else as it is by default, with the access log."""
    path, port = folder / f"{name}.json", free_port()
    account = {"base_url": url + "/v1", **({"ca_file": CERT} if "https" in url else {})}
    controllers = [{"name": one, "config": {**account, "api_key": "sk-" + one * 48}} for one in "abcdefghij"[:accounts]]
    path.write_text(json.dumps({"port": port, "controllers": controllers}))
    return Gateway(name, port, [*command, "--config_file", str(path)], {"PYTHONPATH": str(ROOT)})


def nginx(url: str, folder: Path) -> Gateway:
    """One worker that passes everything on as it comes."""
    port, (scheme, _, address) = free_port(), url.partition("://")
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    proxy = f'proxy_pass {scheme}://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;'
    if scheme == "https":
        proxy += f" proxy_ssl_verify on; proxy_ssl_trusted_certificate {CERT}; proxy_ssl_name localhost;"
    endless = "keepalive_requests 100000000;"
    (folder / "nginx.conf").write_text(f"""
worker_processes 1; worker_rlimit_nofile 8192; daemon off; pid {folder}/pid; error_log {folder}/log;
events {{ worker_connections 8192; }}
http {{
    access_log off; {paths} client_body_buffer_size 1m; {endless}
    upstream up {{ server {address}; keepalive 1024; {endless} }}
    server {{ listen 127.0.0.1:{port} backlog=2048; location / {{ {proxy} }} }}
}}
""")
    return Gateway(NGINX, port, ["nginx", "-c", f"{folder}/nginx.conf"])


def litellm(url: str, folder: Path, program: str) -> Gateway:
    """One worker, one model, open to all on loopback as the others are, and nothing fetched from elsewhere."""
    path, port = folder / "litellm.yaml", free_port()
    account = {"model": "openai/gpt-4.1", "api_base": url + "/v1", "api_key": "sk-bench"}
    path.write_text(json.dumps({"model_list": [{"model_name": "gpt-4.1", "litellm_params": account}]}))
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "SSL_CERT_FILE": CERT}
    env["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
    return Gateway(LITELLM, port, [program, "--config", str(path), "--host", "127.0.0.1", "--port", str(port)], env)


def portkey(url: str, program: str) -> Gateway:
    headers = f"x-portkey-provider: openai\r\nx-portkey-custom-host: {url}/v1\r\nAuthorization: Bearer sk-bench\r\n"
    command = ["node", program, f"--port={(port := free_port())}", "--headless"]
    return Gateway(PORTKEY, port, command, {"NODE_ENV": "production", "NODE_EXTRA_CA_CERTS": CERT}, headers)


# ---- the table


class Failed(Exception):
    """A gateway does not do what was asked; the words are what its cell says."""


def middle(values: Iterable[float]) -> str:
    """The median in three digits or so; nothing of nothing."""
    found = list(values)
    value = statistics.median(found) if found else 0.0
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}" if found else ""


class Bench:
    """The options, the processes and the table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.processes = Processes(folder / "log")
        self.notes: dict[str, str] = {}  # what goes wrong in a case, by gateway

    def run(self) -> None:
        print("CPU time of", ", ".join((*COLUMNS, "and this / raw")), "- in brackets: times nginx")
        self.row("case", "figure", {name: name for name in COLUMNS}, "this / raw")
        print("|" + "---|" * 8)
        for name in self.args.cases:
            self.notes.clear()
            (self.run_load if name in CASES else self.run_idle)(name)
            self.processes.stop()

    def row(self, case: str, what: str, cells: Mapping[str, str], last: str = "") -> None:
        shown = [f"{self.notes.get(name) or cells.get(name, ''):14}" for name in COLUMNS]
        print(f"| {case:9} | {what:25} | {' | '.join(shown)} | {last:10} |", flush=True)

    def gateways(self, url: str = NOWHERE, accounts: int = 2) -> list[Gateway]:
        """All that are there, on ports of their own, in front of an upstream."""
        args, folder, port = self.args, self.folder, free_port()
        return [
            this_server(THIS, url, folder, [args.python, "-m", "chatgpt_apiserver"], accounts),
            Gateway(RAW, port, [args.python, __file__, "raw", str(port), url]),
            *([nginx(url, folder)] if shutil.which("nginx") else []),
            *([litellm(url, folder, args.litellm)] if args.litellm else []),
            *([portkey(url, args.portkey)] if args.portkey else []),
        ]

    def attempt(self, name: str, what: Callable[..., Any], *about: Any) -> Any:
        """Whatever goes wrong with a gateway is said in its cells, and it is left out from then on."""
        if name not in self.notes:
            try:
                return what(*about)
            except Failed as failed:
                self.notes[name] = str(failed)
            except (OSError, ValueError):  # no such program, or it ended: its files in /proc are gone
                self.notes[name] = "does not run"
        return None

    def open(self, gateway: Gateway) -> int:
        """Starts it, waits until it listens and returns its id."""
        process = self.processes.start(gateway.command, gateway.env)
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", gateway.port), 1):
                return process.pid
            time.sleep(0.001)
        raise Failed("does not start")

    def load(self, case: Case, gateway: Gateway, pid: int, seconds: float, clients: int) -> dict[str, Any]:
        """What the load saw, and the most memory that the gateway took meanwhile."""
        spec = json.dumps([gateway.port, clients, seconds, case.prompt, case.gap_ms, case.sdk, gateway.headers])
        process = self.processes.start([sys.executable, __file__, "load", spec], out=subprocess.PIPE)
        deadline = time.monotonic() + seconds + 2 * EVENTS * (case.gap_ms or 0) / 1000 + SLACK_S
        peak = 0.0
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, rss_kb(pid))
            time.sleep(0.05)
        self.processes.stop(process)
        said = process.communicate()[0] or b'{"done": 0, "errors": ["too slow"]}'
        found: dict[str, Any] = json.loads(said)
        if not found["done"]:
            raise Failed("fails: " + ", ".join(found["errors"]))
        return {**found, "peak": peak}

    def clients(self, case: Case, gateway: Gateway) -> int:
        return max(1, case.clients // (SHARE.get(gateway.name, 1) if case.gap_ms else 1))

    def warm(self, case: Case, gateway: Gateway, pid: int) -> float:
        """All code runs and all connections open; returns the kB that each open stream takes."""
        self.load(case, gateway, pid, 0.5, min(2, case.clients))
        before, clients = rss_kb(pid), self.clients(case, gateway)
        peak: float = self.load(case, gateway, pid, 0.5, clients)["peak"]
        return (peak - before) / clients

    def measure(self, case: Case, gateway: Gateway, pid: int) -> dict[str, Any]:
        before = cpu_us(pid)
        found = self.load(case, gateway, pid, self.args.seconds, self.clients(case, gateway))
        return {**found, "cost": (cpu_us(pid) - before) / found["done"] / (EVENTS if case.gap_ms else 1)}

    def run_load(self, name: str) -> None:
        """One case: everything starts afresh, is warmed up, then measured in turn."""
        case, port, rounds = CASES[name], free_port(), []
        self.open(Gateway("upstream", port, [sys.executable, __file__, "upstream", str(port), "tls" * case.tls]))
        gateways = self.gateways(f"http{'s' * case.tls}://127.0.0.1:{port}", 10 if case.sdk else 2)
        pids = {one.name: self.attempt(one.name, self.open, one) for one in gateways}
        kb = {one.name: self.attempt(one.name, self.warm, case, one, pids[one.name]) for one in gateways}
        for turn in range(self.args.rounds):
            order = gateways[::-1] if turn % 2 else gateways
            rounds.append({one.name: self.attempt(one.name, self.measure, case, one, pids[one.name]) for one in order})
        self.report(name, rounds, kb)

    def report(self, name: str, rounds: list[dict[str, Any]], kb: dict[str, float]) -> None:
        """The rows of a case: costs with their ratio to nginx's, and what else its load shows."""
        case = CASES[name]

        def cells(key: str) -> dict[str, str]:
            return {one: middle(found[one][key] for found in rounds if found[one]) for one in kb}

        def ratio(one: str, base: str) -> str:
            return middle(found[one]["cost"] / found[base]["cost"] for found in rounds if found[one] and found.get(base))

        costs = cells("cost")
        for one in costs:
            errors = sum((Counter(found[one]["errors"]) for found in rounds if found[one]), Counter[str]())
            costs[one] += f" ({ratio(one, NGINX)})" if ratio(one, NGINX) else ""
            costs[one] += f" {errors.total()} ERRORS: {', '.join(errors)}" if errors else ""
        self.row(name, "CPU us / " + case.unit, costs, ratio(THIS, RAW))
        if case.clients == 1:
            self.row(name, "p50 ms", cells("p50_ms"))
        if case.gap_ms:
            self.row(name, f"p99 of {case.gap_ms} ms gaps", cells("p99_ms"))
            self.row(name, "kB / open stream", {one: middle([kb[one]]) for one in kb if one not in self.notes})

    def idle(self, gateway: Gateway, case: str) -> float:
        """Milliseconds until it listens, or the MB that it has when it was never asked anything."""
        since = time.monotonic()
        pid = self.open(gateway)
        found = 1e3 * (time.monotonic() - since)
        if case == "memory":
            time.sleep(1)
            found = rss_kb(pid) / 1000
        self.processes.stop()
        return found

    def bare(self) -> float:
        """Milliseconds that a Python takes to import asyncio and end."""
        since = time.monotonic()
        self.processes.start([self.args.python, "-c", "import asyncio"]).wait()  # given a timeout it polls, slowly
        return 1e3 * (time.monotonic() - since)

    def run_idle(self, name: str) -> None:
        """Each is started and stopped, in turn; the rivals, which take many seconds, only once."""
        found: dict[str, list[float]] = {"bare": []}
        self.attempt(THIS, self.idle, self.gateways()[0], name)  # leaves the bytecode
        for turn in range(1 if name == "memory" else STARTS):
            script = this_server("file", NOWHERE, self.folder, [self.args.python, str(ROOT / "chatgpt_apiserver.py")])
            for one in [script, *self.gateways()]:
                if turn == 0 or one.name not in SHARE:
                    found.setdefault(one.name, []).append(self.attempt(one.name, self.idle, one, name) or 0.0)
            found["bare"].append(self.bare())
        cells = {one: middle(values) for one, values in found.items()}
        what = "MB idle" if name == "memory" else "ms until it listens"
        self.row(name, what + ", -m", cells)
        self.row(name, what + ", file", {THIS: self.notes.get("file") or cells["file"]})
        if name == "start":
            self.row(name, "ms, import asyncio", {THIS: cells["bare"]})


def options() -> argparse.Namespace:
    names = [*CASES, "memory", "start"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(names), help="of " + ",".join(names))
    parser.add_argument("--seconds", type=float, default=3, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="runs this server and the raw relay")
    parser.add_argument("--litellm", default="", metavar="PATH", help="the litellm executable")
    parser.add_argument("--portkey", default="", metavar="PATH", help="start-server.js of Portkey's gateway")
    args = parser.parse_args()
    args.cases = args.cases.split(",")
    if not set(args.cases) <= set(names) or args.rounds < 1:
        parser.error("unknown case, or no round")
    return args


def main() -> None:
    role, rest = sys.argv[1:2], sys.argv[2:]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if role == ["upstream"]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(CERT, KEY)
        asyncio.run(serve(upstream, int(rest[0]), tls if rest[1] else None))
    elif role == ["raw"]:
        tls = ssl.create_default_context(cafile=CERT)
        asyncio.run(serve(raw_relay(int(rest[1].rpartition(":")[2]), tls if "https" in rest[1] else None), int(rest[0])))
    elif role == ["load"]:
        print(json.dumps(asyncio.run(Load(*json.loads(rest[0])).run())))
    else:
        args = options()
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(args, Path(folder))
            try:
                bench.run()
            finally:
                bench.processes.deaf = True
                bench.processes.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
