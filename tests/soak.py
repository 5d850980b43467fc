#!/usr/bin/env python3
"""Mixed requests with random failures, then what is left over: python3 tests/soak.py [--requests 20000] [--seed 1]

Upstreams that fail in every way and clients that leave at any time, on real sockets and the real clock. Afterwards
nothing may be in flight, nobody waiting, no connection active, and memory no larger than after the first part.
Exits with 1 where that is not so.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chatgpt_apiserver as app
from tests.support import (
    ANSWER,
    SSE_HEAD,
    Message,
    Peer,
    Running,
    Script,
    Upstream,
    controller,
    error_reply,
    event,
    json_reply,
    sse_reply,
)

CLIENTS = 60  # at once
WARM_UP = 0.4  # of the requests, before memory is looked at for the first time
GROWTH_BYTES = 4_000_000  # above that memory is not flat
TURN_S = 0.05
SETTLE_S = 5.0  # for the last connections to notice that their peers are gone
GOOD = json_reply(200, ANSWER, "x-ratelimit-limit-requests: 100000", "x-ratelimit-remaining-requests: 90000")
STREAM = sse_reply(*(event("word ") for _ in range(8)), b"data: [DONE]\n\n")
REFUSALS = [
    error_reply(400, "bad"),
    error_reply(401, "invalid_api_key"),
    error_reply(403, "forbidden"),
    error_reply(404, "model_not_found"),
    error_reply(429, "rate_limit_exceeded", "x", "retry-after-ms: 20"),
    error_reply(429, "rate_limit_exceeded", "Limit 100, Requested 200 tokens per min (TPM)"),
    error_reply(500),
    error_reply(503, None, "busy", "retry-after-ms: 30"),
    json_reply(200, {"error": {"message": "x", "type": "server_error", "code": None}}),
    sse_reply(b'data: {"error":{"message":"x","code":"overloaded_error"}}\n\n'),
]


class Forgetful(Upstream):
    """An upstream that keeps nothing of what it saw, or its memory would be measured."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await super()._serve(reader, writer)
        self.seen.clear()


def upstream_script(chance: random.Random, trouble: float) -> Script:
    """An upstream that answers, and of `trouble` of the requests makes something else."""

    async def script(peer: Peer, message: Message) -> None:
        stream = message.json().get("stream")
        if chance.random() > trouble:
            await peer.send(STREAM if stream else GOOD)
            return
        match chance.randrange(6):
            case 0:
                peer.reset()
            case 1:
                peer.close()
            case 2:  # cut in the middle
                await peer.send((STREAM if stream else GOOD)[: chance.randrange(1, 300)])
                peer.close()
            case 3:  # a slow one
                await peer.send(SSE_HEAD if stream else GOOD[:20])
                for _ in range(3):
                    if stream:
                        await peer.chunk(event("slow"))
                    await asyncio.sleep(chance.random() / 20)
                await peer.send(b"0\r\n\r\n" if stream else GOOD[20:])
            case 4:  # a silent one
                await peer.gone()
            case _:
                await peer.send(chance.choice(REFUSALS))

    return script


async def one_client(server: Running, chance: random.Random, number: int, seen: "Counter[str]") -> None:
    """One request, whole or a stream, of a client that may leave at any time."""
    client = await server.open()
    try:
        more: "dict[str, Any]" = {"stream": True} if number % 2 else {}
        if number % 11 == 0:
            more["store"] = True
        await client.post("model-%d" % chance.randrange(5), **more)
        leaves = chance.random()
        if leaves < 0.1:
            await asyncio.sleep(chance.random() / 50)
            if leaves < 0.05:
                client.reset()
            seen["left"] += 1
        elif leaves < 0.15:
            await client.read(head_only=True)
            seen["left after the head"] += 1
        else:
            seen[str((await client.read()).status)] += 1
    except (asyncio.IncompleteReadError, ConnectionError):
        seen["cut"] += 1
    finally:
        client.close()


def memory_bytes() -> int:
    """Resident memory now."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left_over(server: Running) -> "dict[str, int]":
    """What must be zero when nobody asks for anything."""
    inner = server.server
    pool = inner.pool
    return {
        "in flight": sum(one.in_flight + one.quota.in_flight for one in pool.upstreams),
        "unanswered": sum(len(one.unanswered) for one in pool.upstreams),
        "probes": sum((one.probe is not None) + (one.quota.probe is not None) for one in pool.upstreams),
        "waiting": pool.waiting + len(pool.lines),
        "connections of clients": len(inner.connections),
        "active upstream connections": len(inner.links.active),
    }


async def soak(count: int, seed: int) -> bool:
    """Runs it; whether all was well."""
    chance, seen = random.Random(seed), Counter[str]()
    troubles = (0.02, 0.1, 0.3, 0.6)
    limits: "list[dict[str, Any]]" = [{}, {"concurrency": 8}, {"rpm": 60_000, "burst_s": 1}, {"tpm": 90_000_000}]
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for number, (trouble, limit) in enumerate(zip(troubles, limits, strict=True)):
            one = await stack.enter_async_context(Forgetful(upstream_script(chance, trouble)))
            made.append(controller("abcd"[number], one.url, limits=limit, timeouts={"first_byte": 0.3, "idle": 1}))
        server = await stack.enter_async_context(Running(*made, pool={"max_wait": 2, "rescue_after": 0.1}))
        server.server.access.write = len
        numbers, started, marks = iter(range(count)), time.monotonic(), []

        async def work() -> None:
            for number in numbers:
                if number == int(count * WARM_UP):
                    marks.append(memory_bytes())
                await one_client(server, chance, number, seen)

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
        took_s = time.monotonic() - started
        give_up = time.monotonic() + SETTLE_S
        while any(left_over(server).values()) and time.monotonic() < give_up:
            await asyncio.sleep(TURN_S)
        found = left_over(server)
        growth = memory_bytes() - marks[0]
        attempts = sum(one.requests for one in server.server.pool.upstreams)
        rescues = int(server.server.pool.rescues.total)
    print(f"{count} requests in {took_s:.1f} s, {attempts} attempts, {rescues} rescues in the last minute")
    print("outcomes: " + ", ".join(f"{name} {number}" for name, number in sorted(seen.items())))
    print("left over: " + ", ".join(f"{name} {number}" for name, number in found.items()))
    print(f"memory: {marks[0] / 1e6:.1f} MB after {WARM_UP:.0%}, {growth / 1e6:+.1f} MB at the end")
    return not any(found.values()) and growth < GROWTH_BYTES


def main() -> int:
    """Reads the command line, runs the soak, returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    app.log.setLevel(logging.CRITICAL)
    good = asyncio.run(soak(options.requests, options.seed))
    print("all is well" if good else "NOT WELL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
