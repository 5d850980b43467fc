#!/usr/bin/env python3
"""What a request and a streamed event cost: python3 tests/bench.py [--seconds S] [--python PY]

An upstream, a relay of asyncio streams without any feature, the server, nginx where it is installed, and the load run
in processes of their own. CPU microseconds per unit come from /proc (Linux), so they do not depend on how busy the
machine is with the load. A unit is a request; of "paced" it is an event.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM, RAW, SERVER, NGINX = 24500, 24501, 24502, 24503
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"gpt-4.1",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
EVENTS, GAP_S = 50, 0.02
SLACK_S = 30.0  # what a load may take beyond its seconds before the bench gives up
STOP_S = 5.0  # what a process has to end after SIGTERM
CASES = {  # clients, bytes of the prompt, streamed, seconds between events
    "json": (32, 400, False, 0.0),
    "big": (8, 100_000, False, 0.0),
    "sse": (32, 400, True, 0.0),
    "paced": (100, 400, True, GAP_S),
}


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Head and body of a request with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    at = head.lower().find(b"content-length:")
    return head + await reader.readexactly(int(head[at + 15 : head.find(b"\r\n", at)]) if at >= 0 else 0)


async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers at once, or with events; a body that names a gap gets them paced."""
    body = json.dumps({"id": "c", "object": "chat.completion", "model": "m", "choices": [], "pad": "x" * 500}).encode()
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        while True:
            request = await read_request(reader)
            if b'"stream": true' not in request:
                writer.write(whole)
                continue
            writer.write(head)
            for _ in range(EVENTS):
                writer.write(chunk(EVENT))
                if b'"paced"' in request:
                    await asyncio.sleep(GAP_S)
            writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


IDLE: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []


async def raw_relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The floor of this approach: no parsing, no checks, no failover."""
    try:
        while True:
            request = await read_request(reader)
            link = IDLE.pop() if IDLE else await asyncio.open_connection("127.0.0.1", UPSTREAM)
            link[1].write(request)
            head = await link[0].readuntil(b"\r\n\r\n")
            at = head.lower().find(b"content-length:")
            if at >= 0:
                writer.write(head + await link[0].readexactly(int(head[at + 15 : head.find(b"\r\n", at)])))
            else:
                writer.write(head)
                data = b""
                while not data.endswith(b"0\r\n\r\n"):
                    data = await link[0].read(65536)
                    writer.write(data)
                    await writer.drain()
            IDLE.append(link)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def load(port: int, case: str, seconds: float) -> None:
    """Keep-alive clients in a closed loop; prints requests, events and the median in ms."""
    clients, size, stream, gap_s = CASES[case]
    message = {"role": "user", "content": "abcdef " * (size // 7)}
    more = {**({"stream": True} if stream else {}), **({"user": "paced"} if gap_s else {})}
    body = json.dumps({"model": "gpt-4.1", "messages": [message], **more}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    wire = head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    times: list[float] = []
    end = time.monotonic() + seconds

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            since = time.monotonic()
            writer.write(wire)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            at = head.find(b"content-length:")
            if at >= 0:
                await reader.readexactly(int(head[at + 15 : head.find(b"\r\n", at)]))
            else:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            times.append(time.monotonic() - since)
        writer.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    print(json.dumps({"done": len(times), "p50_ms": 1e3 * sorted(times)[len(times) // 2]}))


async def listen(handler: object, port: int) -> None:
    server = await asyncio.start_server(
        handler,  # type: ignore[arg-type]
        "127.0.0.1",
        port,
        limit=1 << 20,
        backlog=1024,
    )
    await server.serve_forever()


def cpu_us(pid: int) -> float:
    """CPU time of a process and its children."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    found = 0
    for one in pids:
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        found += int(fields[11]) + int(fields[12])
    return found * 1e6 / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def nginx_command(folder: str) -> list[str]:
    """One worker that relays to the upstream."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in kinds)
    proxy = 'proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;'
    endless = "keepalive_requests 100000000;"
    text = f"""
worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error; events {{}}
http {{
    access_log off; {paths} client_body_buffer_size 1m; {endless}
    upstream up {{ server 127.0.0.1:{UPSTREAM}; keepalive 256; {endless} }}
    server {{ listen 127.0.0.1:{NGINX}; location / {{ {proxy} }} }}
}}
"""
    Path(folder, "nginx.conf").write_text(text)
    return ["nginx", "-c", f"{folder}/nginx.conf"]


def measure(port: int, pid: int, case: str, seconds: float) -> tuple[float, float]:
    """CPU microseconds per unit, and the median in ms."""
    command = [sys.executable, __file__, "load", str(port), case]
    subprocess.run([*command, "0.5"], capture_output=True, check=True, timeout=SLACK_S)
    before = cpu_us(pid)
    run = subprocess.run([*command, str(seconds)], capture_output=True, check=True, timeout=seconds + SLACK_S)
    done = json.loads(run.stdout)
    units = done["done"] * (EVENTS if case == "paced" else 1)
    return (cpu_us(pid) - before) / max(1, units), done["p50_ms"]


def compare(seconds: float, python: str, folder: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """Starts everything and prints the table."""
    account = {"api_key": "sk-bench", "base_url": f"http://127.0.0.1:{UPSTREAM}/v1"}
    config = {"port": SERVER, "controllers": [{"name": name, "config": account} for name in "ab"]}
    Path(folder, "c.json").write_text(json.dumps(config))
    commands = {
        "upstream": [sys.executable, __file__, "upstream"],
        "raw relay": [python, __file__, "raw"],
        "this server": [python, str(ROOT / "chatgpt_apiserver.py"), "--config_file", f"{folder}/c.json"],
        **({"nginx": nginx_command(folder)} if shutil.which("nginx") else {}),
    }
    with Path(folder, "log").open("wb") as log:
        processes += [subprocess.Popen(command, stdout=log, stderr=log) for command in commands.values()]
    time.sleep(1.5)
    pids = dict(zip(commands, (process.pid for process in processes), strict=True))
    ports = {"raw relay": RAW, "this server": SERVER, "nginx": NGINX}
    print(f"{'case':6} {'gateway':12} {'CPU us/unit':>12} {'/ raw':>6} {'/ nginx':>7} {'p50 ms':>8} {'RSS MB':>7}")
    for case in CASES:
        found = {name: measure(ports[name], pids[name], case, seconds) for name in ports if name in pids}
        for name, (cost, median) in found.items():
            # A short run may cost less than a tick of the kernel's clock: then there is no ratio.
            bases = (found.get(base, (0.0, 0.0))[0] for base in ("raw relay", "nginx"))
            to_raw, to_nginx = (f"{cost / base:.2f}" if base else "-" for base in bases)
            row = f"{case:6} {name:12} {cost:12.1f} {to_raw:>6} {to_nginx:>7} {median:8.2f} {rss_mb(pids[name]):7.1f}"
            print(row, flush=True)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what was started, by force where asking does not help."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    if sys.argv[1:2] in (["upstream"], ["raw"]):
        handler, port = (upstream, UPSTREAM) if sys.argv[1] == "upstream" else (raw_relay, RAW)
        asyncio.run(listen(handler, port))
    elif sys.argv[1:2] == ["load"]:
        asyncio.run(load(int(sys.argv[2]), sys.argv[3], float(sys.argv[4])))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--seconds", type=float, default=3)
        parser.add_argument("--python", default=sys.executable)
        args = parser.parse_args()
        processes: list[subprocess.Popen[bytes]] = []
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a bench that is ended ends what it started
        with tempfile.TemporaryDirectory() as folder:
            try:
                compare(args.seconds, args.python, folder, processes)
            finally:
                stop(processes)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
