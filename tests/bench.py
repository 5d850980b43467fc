#!/usr/bin/env python3
"""Measure what a request, a stream and an event cost, beside other gateways: python3 tests/bench.py

Upstream, gateways and load are processes on loopback. A gateway costs the CPU time that Linux counts for it and its
children. All gateways answer the same load in turn, in rounds of alternating order: this server, a relay of asyncio
streams without any feature, nginx if it is installed, and on request LiteLLM and Portkey's gateway. A figure is the
median of the rounds; the ratio to nginx is taken within each round.
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
STARTS = 9  # of each gateway, in the case `start`
RAMP_S = 1.0  # in which the clients of paced streams begin, one after the other
START_S = 120.0  # LiteLLM takes many seconds until it listens
SLACK_S = 30.0  # what a load may take beyond its seconds and its streams
STOP_S = 5.0  # between SIGTERM and SIGKILL
COLUMNS = THIS, RAW, NGINX, LITELLM, PORTKEY = "this server", "raw relay", "nginx", "LiteLLM", "Portkey"
SHARE = {LITELLM: 40, PORTKEY: 10}  # these get so many times fewer paced streams, which they can keep up with


class Case(NamedTuple):
    """A kind of load. `gap_ms`: the time between events; None: answers are whole.

    `sdk`: heads as long as those of the openai package and of OpenAI, bodies of many lengths, and ten accounts.
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
SDK_LINES = [
    *("Accept: application/json", "User-Agent: OpenAI/Python 3.57.0", "X-Stainless-Lang: python", "X-Stainless-OS: Linux"),
    *("X-Stainless-Package-Version: 3.57.0", "X-Stainless-Arch: x64", "X-Stainless-Runtime: CPython", "Connection: keep-alive"),
    *("X-Stainless-Runtime-Version: 3.12.1", "X-Stainless-Async: false", "x-stainless-retry-count: 0"),
    *("x-stainless-read-timeout: 600", "Authorization: Bearer sk-bench", "Accept-Encoding: gzip, deflate"),
]
OPENAI_HEAD = "\r\n".join([
    *("HTTP/1.1 200 OK", "Date: Fri, 27 Nov 2026 08:15:%02d GMT", "Content-Type: application/json", "Content-Length: %d"),
    *("Connection: keep-alive", "access-control-expose-headers: X-Request-ID", "openai-organization: org-bench"),
    *("openai-processing-ms: %d", "openai-project: proj_bench", "openai-version: 2020-10-01"),
    *("x-envoy-upstream-service-time: %d", "x-ratelimit-limit-requests: 10000", "x-ratelimit-limit-tokens: 30000000"),
    *("x-ratelimit-remaining-requests: 9999", "x-ratelimit-remaining-tokens: %d", "x-ratelimit-reset-requests: 6ms"),
    *("x-ratelimit-reset-tokens: 0s", "x-request-id: req_9f8d7c6b5a4f3e2d1c0b%08x", "cf-cache-status: DYNAMIC"),
    "Set-Cookie: __cf_bm=%032x; path=/; expires=Fri, 27-Nov-26 08:45:22 GMT; domain=.api.openai.com; HttpOnly; Secure",
    *("Strict-Transport-Security: max-age=31536000; includeSubDomains; preload", "X-Content-Type-Options: nosniff"),
    *("Server: cloudflare", "CF-RAY: 8f2b%08x-FRA", 'alt-svc: h3=":443"; ma=86400', "", ""),
]).encode()


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def content_length(head: bytes) -> int | None:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 : head.find(b"\r\n", at)]) if at >= 0 else None


async def read_message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(content_length(head) or 0)


async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests: as OpenAI does if their `user` is "sdk", with events if it is "gap=MS", else whole."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        for number in itertools.count(random.randrange(10**6)):  # in OpenAI's answers some lines differ each time
            request = await read_message(reader)
            gap = re.search(rb"gap=(\d+)", request)
            if gap is None:
                took, left = number * 7 % 1500, 30_000_000 - number * 13 % 90_000
                lines = OPENAI_HEAD % (number // 1000 % 60, len(WHOLE), took, took + 3, left, number, number, number)
                writer.write(lines + WHOLE if b'"sdk"' in request else whole)
                continue
            writer.write(head)
            for event in [EVENT] * (EVENTS - 1) + [LAST]:
                writer.write(chunk(event))
                if int(gap[1]):
                    await asyncio.sleep(int(gap[1]) / 1000)
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    except (EOFError, OSError):
        writer.close()


def raw_relay(port: int, tls: ssl.SSLContext | None) -> Callable[..., Any]:
    """Return the handler of a relay that parses and checks nothing: the least that asyncio streams cost."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await read_message(reader)
                source, sink = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port, ssl=tls)
                sink.write(request)
                head = await source.readuntil(b"\r\n\r\n")
                length = content_length(head)
                writer.write(head + await source.readexactly(length or 0))
                data = b"" if length is None else b"0\r\n\r\n"
                while not data.endswith(b"0\r\n\r\n"):
                    data = await source.read(65536)
                    writer.write(data)
                    await writer.drain()
                idle.append((source, sink))
        except (EOFError, OSError):
            writer.close()

    return relay


async def serve(handler: Callable[..., Any], port: int, tls: ssl.SSLContext | None = None) -> None:
    server = await asyncio.start_server(handler, "127.0.0.1", port, limit=1 << 20, backlog=2048, ssl=tls)
    await server.serve_forever()


# ---- the load


class Load:
    """Clients with kept connections, each of which sends its next request after the last answer."""

    def __init__(self, port: int, clients: int, seconds: float, prompt: int, gap_ms: int | None, sdk: bool, more: str) -> None:
        """`more`: header lines that this gateway wants."""
        self.port, self.clients, self.gap_ms, self.end = port, clients, gap_ms, time.monotonic() + seconds
        user = {"user": "sdk"} if sdk else {} if gap_ms is None else {"stream": True, "user": f"gap={gap_ms}"}
        lines = [f"{line}\n" for line in SDK_LINES if sdk and line.split(":")[0] not in more]
        head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n" + more + "".join(lines)
        requests = []
        for extra in range(100 if sdk else 1):
            message = {"role": "user", "content": "abcdef " * (prompt // 7) + "x" * extra}
            body = json.dumps({"model": "gpt-4.1", **user, "messages": [message]})
            requests.append(f"{head}Content-Length: {len(body)}\n\n".replace("\n", "\r\n").encode() + body.encode())
        self.requests = itertools.cycle(requests)
        self.times: list[float] = []
        self.errors: Counter[str] = Counter()

    async def run(self) -> dict[str, Any]:
        """Run all clients; return how many answers were good, the errors, and the median time."""
        await asyncio.gather(*map(self.client, range(self.clients)))
        return {"done": len(self.times), "errors": self.errors, "p50_ms": 1e3 * statistics.median(self.times or [0.0])}

    async def client(self, number: int) -> None:
        """Send at least one request, and more until the time is over."""
        await asyncio.sleep(RAMP_S * number / self.clients if self.gap_ms else 0)
        link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while link is None or time.monotonic() < self.end:
            try:
                link = link or await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
                await self.ask(*link)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                self.errors[type(error).__name__] += 1
                if time.monotonic() >= self.end:
                    return
                link = None
                await asyncio.sleep(0.05)

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send one request and read its answer; only a complete answer with status 200 counts."""
        since = time.monotonic()
        writer.write(next(self.requests))
        head = await reader.readuntil(b"\r\n\r\n")
        body, length = b"", content_length(head)
        if length is not None:
            body = await reader.readexactly(length)
        while length is None and (size := int(await reader.readuntil(b"\r\n"), 16)):
            body += (await reader.readexactly(size + 2))[:-2]
        if length is None:
            await reader.readuntil(b"\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self.errors[head[9:12].decode("latin-1")] += 1
        elif self.gap_ms is not None and (b"[DONE]" not in body or body.count(b"data: ") <= EVENTS):
            self.errors["events missing"] += 1
        else:
            self.times.append(time.monotonic() - since)


# ---- processes and gateways


class Processes:
    """The processes that were started; they end with the benchmark, also after a signal."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("ab")
        self.running: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)

    def start(self, command: list[str], env: Mapping[str, str] = {}, out: int | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, so that it can be stopped with all its children."""
        env = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "", **env}
        null, log = subprocess.DEVNULL, self.log
        process = subprocess.Popen(command, env=env, process_group=0, stdin=null, stdout=out or log, stderr=log)
        self.running.append(process)
        return process

    def stop(self, *which: subprocess.Popen[bytes]) -> None:
        """Stop these processes, or all."""
        for process in list(which or self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.running.remove(process)


def tree(pid: int) -> list[Path]:
    """Return the folders in /proc of a process and all its descendants."""
    children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [Path(f"/proc/{pid}"), *(folder for child in children for folder in tree(int(child)))]


def cpu_us(pid: int) -> float:
    """Return the CPU time of a process and its children; the kernel counts nanoseconds per thread."""
    return sum(int(task.read_text().split()[0]) for folder in tree(pid) for task in folder.glob("task/*/schedstat")) / 1000


def rss_kb(pid: int) -> float:
    return sum(int((folder / "statm").read_text().split()[1]) for folder in tree(pid)) * os.sysconf("SC_PAGE_SIZE") / 1000


def free_port() -> int:
    """Return a port below those that the system gives to outgoing connections, of which the load makes thousands."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    sys.exit("bench: no free port")


class Gateway(NamedTuple):
    name: str
    port: int
    command: list[str]
    env: Mapping[str, str] = {}
    headers: str = ""  # lines that its clients send in addition


def this_server(name: str, url: str, folder: Path, command: list[str], accounts: int = 2) -> Gateway:
    """This server with some accounts; all else, the access log too, is as it is by default."""
    path, port = folder / f"{name}.json", free_port()
    account = {"base_url": url + "/v1", **({"ca_file": CERT} if "https" in url else {})}
    controllers = [{"name": name, "config": {**account, "api_key": "sk-" + name * 48}} for name in "abcdefghij"[:accounts]]
    path.write_text(json.dumps({"port": port, "controllers": controllers}))
    return Gateway(name, port, [*command, "--config_file", str(path)], {"PYTHONPATH": str(ROOT)})


def nginx(url: str, folder: Path) -> Gateway:
    """nginx with one worker, which passes everything on as it comes."""
    port, (scheme, _, address) = free_port(), url.partition("://")
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    proxy = f'proxy_pass {scheme}://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;'
    if scheme == "https":
        proxy += f" proxy_ssl_verify on; proxy_ssl_trusted_certificate {CERT}; proxy_ssl_name localhost;"
    endless = "keepalive_requests 100000000;"
    (folder / "nginx.conf").write_text(f"""
worker_processes 1; worker_rlimit_nofile 8192; daemon off; pid {folder}/pid; error_log {folder}/log;
events {{ worker_connections 8192; }}
http {{ access_log off; {paths} client_body_buffer_size 1m; {endless}
    upstream up {{ server {address}; keepalive 1024; {endless} }}
    server {{ listen 127.0.0.1:{port} backlog=2048; location / {{ {proxy} }} }} }}
""")
    return Gateway(NGINX, port, ["nginx", "-c", f"{folder}/nginx.conf"])


def rivals(url: str, folder: Path, args: argparse.Namespace) -> list[Gateway]:
    """Return LiteLLM (one worker, one model, no keys of its own, nothing fetched) and Portkey's gateway, if asked for."""
    gateways, port = [], free_port()
    if args.litellm:
        path = folder / "litellm.yaml"
        account = {"model": "openai/gpt-4.1", "api_base": url + "/v1", "api_key": "sk-bench"}
        path.write_text(json.dumps({"model_list": [{"model_name": "gpt-4.1", "litellm_params": account}]}))
        env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
        env |= {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true", "SSL_CERT_FILE": CERT}
        command = [args.litellm, "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        gateways.append(Gateway(LITELLM, port, command, env))
    if args.portkey:
        port, env = free_port(), {"NODE_ENV": "production", "NODE_EXTRA_CA_CERTS": CERT}
        lines = f"x-portkey-provider: openai\nx-portkey-custom-host: {url}/v1\nAuthorization: Bearer sk-bench\n"
        gateways.append(Gateway(PORTKEY, port, ["node", args.portkey, f"--port={port}", "--headless"], env, lines))
    return gateways


# ---- the table


def middle(values: Iterable[float]) -> str:
    """Return the median in about three digits, "" for no values."""
    numbers = list(values)
    value = statistics.median(numbers) if numbers else 0.0
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}" if numbers else ""


def fair_share(case: Case, gateway: Gateway) -> int:
    """Return the number of clients that a gateway gets."""
    return max(1, case.clients // (SHARE.get(gateway.name, 1) if case.gap_ms else 1))


class Bench:
    """Runs the cases and prints the table."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.processes = Processes(folder / "log")

    def run(self) -> None:
        print("CPU time; in brackets: times nginx")
        self.row("case", "figure", {name: name for name in COLUMNS}, "this / raw")
        print("|" + "---|" * (len(COLUMNS) + 3))
        for name in self.args.cases:
            (self.run_load if name in CASES else self.run_idle)(name)
            self.processes.stop()

    def row(self, case: str, what: str, cells: Mapping[str, str], last: str = "") -> None:
        shown = " | ".join(f"{cells.get(name, ''):14}" for name in COLUMNS)
        print(f"| {case:9} | {what:25} | {shown} | {last:10} |", flush=True)

    def gateways(self, url: str, accounts: int = 2) -> list[Gateway]:
        """Return all gateways that are here, each on a port of its own, in front of one upstream."""
        args, folder, port = self.args, self.folder, free_port()
        return [
            this_server(THIS, url, folder, [args.python, "-m", "chatgpt_apiserver"], accounts),
            Gateway(RAW, port, [args.python, __file__, "raw", str(port), url]),
            *([nginx(url, folder)] if shutil.which("nginx") else []),
            *rivals(url, folder, args),
        ]

    def open(self, gateway: Gateway) -> int:
        """Start a gateway, wait until it listens, return its process id."""
        process = self.processes.start(gateway.command, gateway.env)
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", gateway.port), 1):
                return process.pid
            time.sleep(0.001)
        sys.exit(f"bench: {gateway.name} does not start")

    def load(self, case: Case, gateway: Gateway, pid: int, seconds: float, clients: int) -> dict[str, Any]:
        """Run a load; return what it saw, and as `peak` the most memory that the gateway had meanwhile, in kB."""
        spec = json.dumps([gateway.port, clients, seconds, case.prompt, case.gap_ms, case.sdk, gateway.headers])
        process = self.processes.start([sys.executable, __file__, "load", spec], out=subprocess.PIPE)
        deadline = time.monotonic() + seconds + 2 * EVENTS * (case.gap_ms or 0) / 1000 + SLACK_S
        peak = 0.0
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, rss_kb(pid))
            time.sleep(0.05)
        self.processes.stop(process)
        result: dict[str, Any] = json.loads(process.communicate()[0] or b'{"done": 0, "errors": ["too slow"]}')
        if not result["done"]:
            sys.exit(f"bench: {gateway.name} fails: " + ", ".join(result["errors"]))
        return {**result, "peak": peak}

    def warm(self, case: Case, gateway: Gateway, pid: int) -> float:
        """Run all code once and open all connections; return the kB that each open stream takes."""
        self.load(case, gateway, pid, 0.5, min(2, case.clients))
        before, clients = rss_kb(pid), fair_share(case, gateway)
        peak: float = self.load(case, gateway, pid, 0.5, clients)["peak"]
        return (peak - before) / clients

    def measure(self, case: Case, gateway: Gateway, pid: int) -> dict[str, Any]:
        """Run one round; return what its load saw, and as `cost` the CPU microseconds per unit."""
        before = cpu_us(pid)
        result = self.load(case, gateway, pid, self.args.seconds, fair_share(case, gateway))
        return {**result, "cost": (cpu_us(pid) - before) / result["done"] / (EVENTS if case.gap_ms else 1)}

    def run_load(self, name: str) -> None:
        """Run one case: start everything afresh, warm it up, measure in turn, print its rows."""
        case, port = CASES[name], free_port()
        self.open(Gateway("upstream", port, [sys.executable, __file__, "upstream", str(port), "tls" * case.tls]))
        gateways = self.gateways(f"http{'s' * case.tls}://127.0.0.1:{port}", 10 if case.sdk else 2)
        pids = {gateway.name: self.open(gateway) for gateway in gateways}
        kb = {gateway.name: middle([self.warm(case, gateway, pids[gateway.name])]) for gateway in gateways}
        rounds = []
        for number in range(self.args.rounds):
            order = gateways[::-1] if number % 2 else gateways
            rounds.append({gateway.name: self.measure(case, gateway, pids[gateway.name]) for gateway in order})

        def cells(key: str) -> dict[str, str]:
            return {gateway: middle(results[gateway][key] for results in rounds) for gateway in pids}

        def ratio(gateway: str, base: str) -> str:
            return middle(results[gateway]["cost"] / results[base]["cost"] for results in rounds if base in results)

        costs = cells("cost")
        for gateway in costs:
            errors = sum((Counter(results[gateway]["errors"]) for results in rounds), Counter[str]())
            costs[gateway] += f" ({ratio(gateway, NGINX)})" if NGINX in pids else ""
            costs[gateway] += f" {errors.total()} ERRORS: {', '.join(errors)}" if errors else ""
        self.row(name, "CPU us / " + case.unit, costs, ratio(THIS, RAW))
        if case.clients == 1:
            self.row(name, "p50 ms", cells("p50_ms"))
        if case.gap_ms:
            self.row(name, "kB / open stream", kb)

    def run_idle(self, name: str) -> None:
        """Start and stop each gateway in turn; LiteLLM and Portkey's, which take many seconds, only once."""
        url, what = "http://127.0.0.1:9", "MB idle" if name == "memory" else "ms until it listens"
        results: dict[str, list[float]] = {}
        self.open(self.gateways(url)[0])  # writes the bytecode
        self.processes.stop()
        for number in range(1 if name == "memory" else STARTS):
            script = this_server("file", url, self.folder, [self.args.python, str(ROOT / "chatgpt_apiserver.py")])
            for gateway in [script, *self.gateways(url)]:
                if number and gateway.name in SHARE:
                    continue
                since = time.monotonic()
                pid = self.open(gateway)
                took_s = time.monotonic() - since
                time.sleep(name == "memory")
                results.setdefault(gateway.name, []).append(rss_kb(pid) / 1000 if name == "memory" else 1e3 * took_s)
                self.processes.stop()
        cells = {gateway: middle(values) for gateway, values in results.items()}
        self.row(name, what + ", -m", cells)
        self.row(name, what + ", file", {THIS: cells["file"]})


def options() -> argparse.Namespace:
    names = [*CASES, "memory", "start"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(names), help="some of " + ",".join(names))
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
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options(), Path(folder))
            try:
                bench.run()
            finally:
                bench.processes.stop()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
