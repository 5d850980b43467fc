"""A day in the life of the server: storms, deaths, changes and restarts, and the sums in the evening.

Real processes on a real socket of a service manager, clients over TLS, scripted accounts. Every answer has to come, and
the log, the metrics and the state_file have to tell what the accounts have counted for themselves.
"""

import asyncio
import itertools
import json
import signal
import sqlite3
import ssl
import subprocess
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import (
    ANSWER,
    CERT,
    DONE,
    KEY,
    SSE_HEAD,
    Client,
    Message,
    Peer,
    Upstream,
    controller,
    error_reply,
    event,
    json_reply,
    now,
    pause,
    request,
    sse_reply,
    until,
)
from .test_deployment import Manager, managed
from .test_metrics import Samples, parse

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGHUP")
FOREIGN = [str(Path(CERT).parent / name) for name in ("foreign.pem", "foreign.key")]
KEYS = {"alice": "client-key-of-alice-1", "bob": "client-key-of-bob-22", "boss": "client-key-of-the-boss"}
PER_SECOND = 25  # answers of one account
ID_PREFIX = 16  # characters of a request id that are those of its process
STORM_CLIENTS, STORM_REQUESTS = 24, 4


class Account:
    """A vendor's account: so many answers in a second and else 429. It counts whole answers and their tokens."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.held: list[str] = []
        self.go = asyncio.Event()
        self.dead = False
        self.limited = self.refused = 0
        # Requests, and the tokens of prompts, from the cache, and of answers.
        self.sums = [0, 0, 0, 0]

    async def __call__(self, peer: Peer, message: Message) -> None:
        """Answer one request."""
        if self.dead:
            self.refused += 1
            await peer.send(error_reply(401, "invalid_api_key", "this account was closed"))
            return
        while self.recent and self.recent[0] <= now() - 1:
            self.recent.popleft()
        if len(self.recent) >= PER_SECOND:
            self.limited += 1
            wait_ms = (self.recent[0] + 1 - now()) * 1e3 + 1
            await peer.send(error_reply(429, "rate_limit_exceeded", "slow down", f"retry-after-ms: {wait_ms:.0f}"))
            return
        self.recent.append(now())
        data, hold = message.json(), message.headers.get("x-hold")
        if hold:
            self.held.append(hold)
        if hold == "killed":
            await peer.gone()
            return
        if hold == "replaced":
            await peer.send(SSE_HEAD)
            await peer.chunk(event("a"))
            await self.go.wait()
        else:
            await pause(0.02)
        if self.dead:
            # What was under way when the account died.
            peer.reset()
            return
        number = sum(self.sums)
        prompt, cached, answer = 10 + number % 7, number % 3, 5 + number % 5
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}  # type: ignore[assignment]
        if data.get("stream"):
            assert data["stream_options"]["include_usage"]
            last = b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(usage).encode()
            whole = sse_reply(event("a"), event("b"), last, DONE)
            # The head and the first event of what was held are out.
            await peer.send(whole.partition(event("a") + b"\r\n")[2] if hold else whole)
        else:
            await peer.send(json_reply(200, {**ANSWER, "usage": usage}))
        self.sums = [old + more for old, more in zip(self.sums, (1, prompt, cached, answer), strict=True)]


class Day:
    """The server with its clients, its accounts and its files."""

    def __init__(self, folder: Path, manager: Manager, stack: ExitStack) -> None:
        self.folder, self.manager, self.stack = folder, manager, stack
        self.port = manager.listener.getsockname()[1]
        self.accounts: dict[str, Account] = {}
        self.answered: Counter[str] = Counter()  # by client key
        # How the request ids of each process begin, and those of the newest one.
        self.processes: set[str] = set()
        self.newest = "req_"
        self.certificates: set[bytes] = set()
        self.trusted = ssl.create_default_context(cafile=CERT)
        self.trusted.load_verify_locations(FOREIGN[0])
        self.process: subprocess.Popen[bytes]

    # -- the server

    def write(self, *upstreams: tuple[str, Upstream]) -> None:
        """Write the configuration."""
        data = {
            "controllers": [controller(name, up.url, models=["m"]) for name, up in upstreams],
            "client_keys": [{"name": name, "key": key, "admin": name == "boss"} for name, key in KEYS.items()],
            "log": {"file": "day.log", "format": "json"},
            "prices": {"*": {"input": 1, "output": 2}},
            # A hedge would be an answer that the account counts and no client gets.
            "pool": {"rescue_after": 0},
            "state_file": "state.sqlite",
            "tls": {"cert": "server.pem", "key": "server.key"},
        }
        (self.folder / "c.json").write_text(json.dumps(data))

    async def start(self) -> subprocess.Popen[bytes]:
        """Start a process beside the one that runs; wait until it is ready."""
        self.process = self.stack.enter_context(self.manager.start("-c", str(self.folder / "c.json")))
        self.stack.callback(self.process.kill)
        await asyncio.to_thread(self.manager.told, "READY=1")
        return self.process

    def log(self) -> list[dict[str, Any]]:
        """Return the lines of the log, the old file first; each of them has to be JSON."""
        text = "".join(path.read_text() for path in sorted(self.folder.glob("day.log*"), reverse=True))
        # What stands behind the last line end is still being written.
        return [json.loads(line) for line in text.split("\n")[:-1]]

    async def logged(self, *words: str, times: int = 1) -> None:
        """Wait until that many lines of the log have all of `words`."""
        await until(lambda: sum(all(word in line["body"] for word in words) for line in self.log()) >= times)

    def select(self, query: str) -> list[Any]:
        """Return what a query of the state_file finds."""
        with closing(sqlite3.connect(self.folder / "state.sqlite")) as file:
            return file.execute(query).fetchall()

    def stored(self, column: str) -> dict[str, list[int]]:
        """Return requests and tokens in the state_file, by the values of a column."""
        sums: dict[str, list[int]] = {}
        for row in self.select("SELECT * FROM usage"):
            place = row[app.USAGE_COLUMNS.index(column)]
            sums[place] = [old + new for old, new in zip(sums.get(place, [0] * 4), row[4:8], strict=True)]
        return sums

    def counted(self) -> dict[str, list[int]]:
        """Return what the accounts that answered have counted."""
        return {name: account.sums for name, account in self.accounts.items() if account.sums[0]}

    # -- its clients

    async def open(self) -> Client:
        """Open a connection; note which certificate was shown."""
        client = Client(*await asyncio.open_connection("localhost", self.port, ssl=self.trusted))
        shown = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.certificates.add(shown)
        return client

    async def visit(self, name: str, over: Callable[[int], bool], keeps: bool) -> None:
        """Ask until it is over; `keeps`: on one connection as long as the server lets it, else a new one each time.

        There are no second tries: a connection that ends without its answer fails the test.
        """
        client, number, closes = await self.open(), 0, False
        while not over(number):
            if closes or client.reader.at_eof() or (number and not keeps):
                client.close()
                client = await self.open()
            number, stream = number + 1, number % 2 == 1
            await client.post("m", "api-key: " + KEYS[name], stream=stream)
            reply = await client.read()
            assert reply.status == 200, reply
            if stream:
                assert b"usage" not in reply.body and reply.body.endswith(DONE)
            self.answered[name] += 1
            self.processes.add(reply.headers["x-request-id"][:ID_PREFIX])
            closes = reply.headers.get("connection") == "close"
        client.close()

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Have four clients that ask all the time; at the end some more answers, and then quiet."""
        stop = asyncio.Event()
        clients = [(name, keeps) for name in ("alice", "bob") for keeps in (True, False)]
        tasks = [asyncio.ensure_future(self.visit(name, lambda _: stop.is_set(), keeps)) for name, keeps in clients]
        yield
        await self.more()
        stop.set()
        await asyncio.gather(*tasks)

    async def more(self, answers: int = 12) -> None:
        """Wait for more answers."""
        enough = self.answered.total() + answers
        await until(lambda: self.answered.total() >= enough)

    async def operate(self, method: str, target: str) -> Message:
        """Ask as the operator."""
        with closing(await self.open()) as client:
            await client.send(request(b"", "api-key: " + KEYS["boss"], target=target, method=method))
            reply = await client.read()
        assert reply.status == 200, reply
        return reply

    def requests(self) -> list[dict[str, Any]]:
        """Return the lines of ended requests in the log."""
        return [line for line in self.log() if line["body"] == "request"]

    async def compare(self) -> Samples:
        """Wait until all is written; compare log, metrics, page and books with the accounts; return the metrics."""
        await until(lambda: len(self.requests()) == self.answered.total())
        lines = self.requests()
        assert Counter(line["client_key"] for line in lines) == self.answered
        assert {line["http.response.status_code"] for line in lines} == {200}
        outcomes = Counter((one["controller"], one["outcome"]) for line in lines for one in line["attempts"])
        for name, account in self.accounts.items():
            assert (outcomes[name, "ok"], outcomes[name, "rate"]) == (account.sums[0], account.limited)
        # The books have all processes, metrics and page only the running one.
        books = (await self.operate("GET", "/usage?by=controller")).json()["data"]
        assert {row["controller"]: [row[name] for name in app.USAGE_SUMS[:4]] for row in books} == self.counted()
        own = [line for line in lines if line["request_id"].startswith(self.newest)]
        samples = parse((await self.operate("GET", "/metrics")).body.decode())[1]
        assert self.total(samples, "requests_total") == self.total(samples, "requests_total", ("status", "200")) == len(own)
        for kind, name in (("input", "input"), ("output", "output"), ("cached", "cache_read.input")):
            told = sum(line[f"gen_ai.usage.{name}_tokens"] for line in own)
            assert self.total(samples, "tokens_total", ("kind", kind)) == told
        history = (await self.operate("GET", "/status?verbose=1&history=1")).json()["history"]
        assert sum(history["requests"]) == len(own) and not sum(history["failed"])
        shown = {one["id"]: len(one["attempts"]) for one in history["recent"]}
        assert shown == {line["request_id"]: len(line["attempts"]) for line in own[-app.HISTORY_REQUESTS :]}
        return samples

    @staticmethod
    def total(samples: Samples, name: str, *labels: tuple[str, str]) -> float:
        """Return the sum of a metric's samples that have these labels."""
        full = "chatgpt_apiserver_" + name
        return sum(value for (found, has), value in samples.items() if found == full and {*labels} <= {*has})


async def storm(day: Day) -> None:
    """Many clients come at once, several times what the accounts answer in a second. None of them sees a 429."""
    enough = STORM_REQUESTS.__le__
    clients = [day.visit(name, enough, bool(n % 3)) for n, name in zip(range(STORM_CLIENTS), itertools.cycle(KEYS))]
    await asyncio.gather(*clients)
    assert day.answered.total() == STORM_CLIENTS * STORM_REQUESTS
    limited = sum(account.limited for account in day.accounts.values())
    samples = await day.compare()
    assert 0 < limited == day.total(samples, "rate_limits_seen_total")
    assert day.total(samples, "rate_limits_avoided_total") > 0 and day.total(samples, "wait_seconds_total") > 0


async def death(day: Day) -> None:
    """West is closed: what is under way there is cut, the rest is refused. East answers all of it."""
    async with day.load():
        await day.more()
        day.accounts["west"].dead = True
        await day.logged("account west: disabled", "401")
    samples = await day.compare()
    assert day.total(samples, "controller_state", ("controller", "west"), ("state", "out")) == 1
    status = (await day.operate("GET", "/status?verbose=1")).json()
    assert {one["name"]: one["state"] == "out" for one in status["controllers"]} == {"east": False, "west": True}


async def growth(day: Day) -> None:
    """A reload adds south, which takes part at once."""
    async with day.load():
        changed = (await day.operate("POST", "/reload")).json()["changed"]
        assert changed[0] == "controllers: east, west -> east, west, south", changed
        await until(lambda: day.accounts["south"].sums[0] > 5)
        await day.logged("account west: disabled", "401", times=2)


async def renewal(day: Day) -> None:
    """A new certificate is used for new connections; old ones go on."""
    assert len(day.certificates) == 1
    async with day.load():
        for source, target in zip(FOREIGN, ("server.pem", "server.key"), strict=True):
            copy(source, day.folder / target)
        day.process.send_signal(signal.SIGHUP)
        await until(lambda: len(day.certificates) == 2)
        # Each reload tries west once more.
        await day.logged("account west: disabled", "401", times=3)
    await day.logged("reload: nothing changed")


async def rotation(day: Day) -> None:
    """The log's file is renamed, and made again at SIGUSR1."""
    async with day.load():
        (day.folder / "day.log").rename(day.folder / "day.log.1")
        day.process.send_signal(signal.SIGUSR1)
        await until((day.folder / "day.log").exists)


async def replacement(day: Day, old: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
    """A new process serves beside the old one, which then ends its answers. It knows that west is closed."""
    await day.compare()
    await until(lambda: day.select("SELECT * FROM state WHERE name LIKE '%out%west%'"))
    held = await day.open()
    await held.post("m", "X-Hold: replaced", "api-key: " + KEYS["bob"], stream=True)
    await held.reader.readuntil(event("a"))
    async with day.load():
        refused, seen = day.accounts["west"].refused, set(day.processes)
        new = await day.start()
        await until(lambda: len(day.processes) == 2)
        old.terminate()
        await day.more()
        for account in day.accounts.values():
            account.go.set()
        rest = await held.reader.readuntil(DONE + b"\r\n0\r\n\r\n")
        day.answered["bob"] += 1
        held.close()
        assert event("b") in rest and await asyncio.to_thread(old.wait, 15) == 0
    (day.newest,) = day.processes - seen
    assert day.accounts["west"].refused == refused
    await day.compare()
    return new


async def crash(day: Day, old: "subprocess.Popen[bytes]") -> None:
    """kill -9 takes one answer that was under way. What comes before the next process runs is answered by that one."""
    await day.visit("alice", (4).__le__, True)
    await until(lambda: day.stored("controller") == day.counted())
    doomed = await day.open()
    await doomed.post("m", "X-Hold: killed", "api-key: " + KEYS["bob"])
    await until(lambda: any("killed" in account.held for account in day.accounts.values()))
    old.kill()
    assert await doomed.closed() == b""
    doomed.close()
    early = [asyncio.ensure_future(day.visit("bob", (1).__le__, False)) for _ in range(3)]
    seen = set(day.processes)
    await day.start()
    await asyncio.gather(*early)
    (day.newest,) = day.processes - seen
    async with day.load():
        await day.more()


async def sums(day: Day) -> None:
    """What the accounts have counted is what log, metrics and state_file say; nothing secret is in the log."""
    samples = await day.compare()
    assert day.total(samples, "controller_state", ("controller", "west"), ("state", "out")) == 1
    await until(lambda: day.stored("controller") == day.counted())
    assert {name: row[0] for name, row in day.stored("key").items()} == day.answered
    day.process.terminate()
    assert await asyncio.to_thread(day.process.wait, 15) == 0
    await day.logged("stopped", times=2)
    assert day.stored("controller") == day.counted()
    text = str(day.log())
    assert not any(secret in text for secret in (*KEYS.values(), "sk-secret", "hello"))
    assert [line["body"].partition(" on ")[0] for line in day.log()].count("listening") == 3


async def test_a_day(tmp_path: Path) -> None:
    """No request is lost that could have been answered, and the accounts' own counts are those of the books."""
    with managed(tmp_path) as manager, ExitStack() as stack:
        day = Day(tmp_path, manager, stack)
        east, west, south = (day.accounts.setdefault(name, Account()) for name in ("east", "west", "south"))
        async with Upstream(east) as up_east, Upstream(west) as up_west, Upstream(south) as up_south:
            at_first = [("east", up_east), ("west", up_west)]
            for source, target in ((CERT, "server.pem"), (KEY, "server.key")):
                copy(source, tmp_path / target)
            day.write(*at_first)
            first = await day.start()
            await storm(day)
            await death(day)
            day.write(*at_first, ("south", up_south))
            await growth(day)
            await renewal(day)
            await rotation(day)
            second = await replacement(day, first)
            await crash(day, second)
            await sums(day)
