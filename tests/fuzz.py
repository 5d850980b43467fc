#!/usr/bin/env python3
"""A seeded mutator over the wire corpus: python3 tests/fuzz.py [--seconds S] [--seed N] [--target NAME] [--case N]

Whatever the input, the outcome is a value or the documented error, soon, and the same wherever the input is cut. Every
case follows from its target, the seed and its number; what fails is printed with the command that makes it again.
"""

import argparse
import asyncio
import contextlib
import copy
import email
import json
import logging
import math
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chatgpt_apiserver as app
from tests import wirefeed as wire
from tests.support import Message, Peer, Running, Upstream, controller, reply, request, sse_reply

HANG_S = 5.0  # real time one case may take
SMALL, TINY = 3000, 500  # inputs below the first are worth mutating, below the second worth cutting at every byte
LIMIT = 700  # bytes of a body, low enough to be exceeded
FORM_TYPE = b"multipart/form-data; boundary=xx"

CHATS = (
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
    b": keep-alive\n\ndata: [DONE]\n\n",
    b'event: response.created\r\ndata: {"type":"response.created"}\r\n\r\nevent: error\r\ndata: {"type":"error"}\r\n\r\n',
    b'\xef\xbb\xbfdata: {"choices":[],"prompt_filter_results":[]}\r\rdata: {"error":{"message":"x"}}\r\r',
    b'id: 1\nretry: 5\ndata\ndata: {"a":\ndata: 1}\n\nfoo: bar\n\n\n\ndata: \xff\xfe\n\n',
)
BODIES = (
    b"5\r\nhello\r\n0\r\n\r\n",
    b"1;a=b\r\nx\r\n00a;c\r\n0123456789\r\n0\r\nX: 1\r\nY: 2\r\n\r\n",
    b"FF\r\n" + b"x" * 255 + b"\r\n" + b"3\r\nabc\r\n" * 20 + b"000\r\n\r\n",
    b"2\r\n\r\n\r\n4\r\n0\r\n\r\r\n0\r\n\r\n",
)
FORMS = (
    b'--xx\r\nContent-Disposition: form-data; name="model"\r\n\r\nm-1\r\n--xx\r\nContent-Disposition: form-data; name="file";'
    b' filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n\x00\r\n--x\r\n--xx--\r\n',
    b"--xx\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; name=stream\r\n\r\ntrue\r\n--xx--",
)
TOKENS = (
    b"\r\n \n \r \0 \t : , ; = \" 0 5 a F x + - _ . / * % ? # \\ [ ] \x0b \x0c \x7f \x80 \xff 0x 00 \r\n\r\n \n\n \r\r"
    b" chunked gzip identity HTTP/1.1 HTTP/1.0 HTTP/2.0 GET POST CONNECT close keep-alive 100-continue --xx -- name= filename="
    b" 0\r\n\r\n ffffffffffffffff 18446744073709551616 data: event: error [DONE] {\"error\":{}} {}"
).split(b" ")
PIECES = (
    *TOKENS,
    *(b" ", b"\r\n ", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Host: other\r\n", b"Connection: close\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding : chunked\r\n", b"Expect: 100-continue\r\n", b"[" * 300, b"1" * 40),
    *(b"HTTP/1.1 100 Continue\r\n\r\n", b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n--xx\r\n", b'; name="model"'),
)


class Broken(Exception):
    """A property does not hold, or a case took too long."""


def mutate(data: bytes, chooser: random.Random, others: Sequence[bytes]) -> bytes:
    """Change `data` in a few places."""
    for _ in range(chooser.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        start = chooser.randrange(len(data) + 1)
        end = min(len(data), start + chooser.choice((0, 0, 1, 1, 2, 4, 16, 64)))
        other, line = chooser.choice(others), chooser.choice(data.splitlines(keepends=True) or [b""])
        at = chooser.randrange(len(other) + 1)
        taken = other[at : at + chooser.choice((1, 8, 40, 400))]
        changed = [b"", data[start:end] * 2, bytes([chooser.randrange(256)]), data[start:end].swapcase(), taken, line]
        middle = chooser.choice([*changed, *chooser.choices(PIECES, k=3)])
        if middle is line:
            start = end = data.find(line)
        data = data[:start] + middle + data[end:]
    return data[: 2 * SMALL]


def cuts(data: bytes, chooser: random.Random) -> Iterator[list[bytes]]:
    """Yield `data` cut in some ways."""
    if len(data) < TINY:
        yield wire.cut(data, "byte")
    yield wire.cut(data, "line")
    for _ in range(2):
        yield wire.cut_at(data, [chooser.randrange(len(data) + 1) for _ in range(chooser.randint(1, 5))])


def compare(whole: Any, pieces: list[bytes], result: Any) -> None:
    """Require that cut input has the result of whole input."""
    if result != whole:
        raise Broken(f"whole: {whole!r}\ncut {[len(piece) for piece in pieces][:50]!r}: {result!r}")


class Target:
    """One thing to fuzz: `make` returns an input, `check` raises if it is not handled as it should be."""

    seeds: Sequence[bytes]

    def make(self, chooser: random.Random) -> Any:
        """Return an input."""
        return mutate(chooser.choice(self.seeds), chooser, self.seeds)

    def judge(self, pieces: Iterable[bytes]) -> Any:
        """Return the result for an input in pieces, or the kind of its documented error."""

    def check(self, value: Any, chooser: random.Random) -> None:
        """Require the same result however the input is cut."""
        whole = self.judge([value])
        for pieces in cuts(value, chooser):
            compare(whole, pieces, self.judge(pieces))

    def close(self) -> None:
        """Release resources."""


def small(*folders: str) -> tuple[bytes, ...]:
    """Return the short messages of the corpus."""
    return tuple(data for folder in folders for data in map(wire.message, wire.corpus(folder)) if len(data) < SMALL)


class Requests(Target):
    """The pure request parser and the decoders of request bodies."""

    seeds = tuple(data + wire.FOLLOW for data in small("valid", "invalid"))

    def judge(self, pieces: Iterable[bytes]) -> tuple[list[Any], int]:
        requests: list[Any] = []
        try:
            requests += wire.each_request(pieces, LIMIT)
        except app.BadMessage as error:
            return requests, error.status
        return requests, 0


class Replies(Target):
    """The pure reply parser and the decoders of reply bodies."""

    seeds = small("replies/valid", "replies/invalid", "replies/cut")

    def judge(self, pieces: Iterable[bytes]) -> Any:
        try:
            return wire.read_reply(pieces)[:2]
        except app.UpstreamError as error:
            return type(error).__name__
        except app.BadMessage:
            return "BadReply"


def reference_chunked(data: bytes) -> tuple[bytes, bytes] | None:
    """Decode a whole chunked body slowly by the letter of RFC 9112, 7.1: return body and rest, or None."""
    body, digits = b"", b"0123456789abcdefABCDEF"
    text, token = rb"[\t\x20-\x7e\x80-\xff]*", rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
    while True:
        line, crlf, data = data.partition(b"\r\n")
        number = line[: len(line) - len(line.lstrip(digits))]
        if not crlf or not number or not re.fullmatch(rb"([ \t]*;" + text + rb")?", line[len(number) :]):
            return None
        size = int(number, 16)
        if not size:
            break
        if data[size : size + 2] != b"\r\n":
            return None
        body, data = body + data[:size], data[size + 2 :]
    while not data.startswith(b"\r\n"):
        line, crlf, data = data.partition(b"\r\n")
        if not crlf or not re.fullmatch(token + b":" + text, line):
            return None
    return body, data[2:]


class Chunked(Target):
    """The chunked decoder, also against a slow one that shares nothing with it."""

    seeds = BODIES

    def judge(self, pieces: Iterable[bytes]) -> tuple[Any, ...]:
        decoder, body, rest = app.ChunkedDecoder(LIMIT), b"", b""
        try:
            for piece in pieces:
                if decoder.done:
                    rest += piece
                elif piece:
                    body += decoder.feed(piece)
                    rest += decoder.surplus if decoder.done else b""
        except app.BadMessage as error:
            return ("too large" if error.status == 413 else "malformed",)
        return body, decoder.done, rest

    def check(self, value: Any, chooser: random.Random) -> None:
        super().check(value, chooser)
        result, reference = self.judge([value]), reference_chunked(value)
        whole = len(result) == 3 and (reference is not None or result[1])
        too_large = result == ("too large",) and reference is not None and len(reference[0]) <= LIMIT
        if too_large or (whole and (reference is None or result != (reference[0], True, reference[1]))):
            raise Broken(f"{result!r} is not {reference!r}")


class Forms(Target):
    """The form parser: Python's reader of e-mail must find the same parts in an accepted form."""

    seeds = FORMS

    def check(self, value: Any, chooser: random.Random) -> None:
        try:
            spans = app.form_spans(value, FORM_TYPE)
        except app.ProxyError:
            return
        read = email.message_from_bytes(b"Content-Type: %b\r\n\r\n%b" % (FORM_TYPE, value))
        parts = [(part.get_param("name", header="content-disposition"), part.get_payload(decode=True)) for part in read.get_payload()]
        expected = {str(name).lower().encode(): body for name, body in parts}
        if {name: value[start:end] for name, (start, end) in spans.items()} != expected:
            raise Broken(f"{spans!r} of {expected!r}")


class Events(Target):
    """The event splitter, and the kind of an event."""

    seeds = CHATS

    def judge(self, pieces: Iterable[bytes]) -> tuple[list[bytes], bytes]:
        splitter, events = app.EventSplitter(), []
        for piece in pieces:
            events += splitter.feed(piece)
        return events, splitter.pending

    def check(self, value: Any, chooser: random.Random) -> None:
        super().check(value, chooser)
        events, pending = self.judge([value])
        if b"".join(events) + pending != value:
            raise Broken(f"bytes were lost or made up: {events!r}")
        for event in [*events, pending]:
            if not isinstance(app.judge_event(event), app.EventKind):
                raise Broken(f"no kind for {event!r}")


KEY = "sk-fuzz-secret-0123456789"
CONFIG: dict[str, Any] = {
    "port": "8080", "endpoints": ["inference"], "cors": {"allow_origins": ["https://app.example"]}, "allowed_hosts": ["api.example"],
    "pool": {"type": "balanced", "max_wait": 30, "max_queue": 1000, "rescue_after": "auto"}, "log": {"format": "text", "level": "info"},
    "controllers": [
        {
            "type": "openai", "name": "team-a", "weight": 5, "models": ["gpt-4.1*"], "model_map": {"fast": "gpt-4.1-mini"}, "quota_group": "org-1",
            "limits": {"rpm": 500, "tpm": 200000, "concurrency": 64, "burst_s": 60},
            "timeouts": {"connect": 10, "first_byte": 120, "idle": 300, "total": 0},
            "config": {
                "api_key": "$FUZZ_KEY", "base_url": "https://api.openai.com/v1", "organization": "org", "project": "p",
                "proxy": "http://user:pass@proxy:3128", "headers": {"X-A": "1"},
            },
        },
        {"type": "echo", "name": "e", "models": ["echo"], "config": {"delay": 0.03}},
    ],
    "client_keys": [{"name": "alice", "key": "alice-key-1234567", "models": ["*"], "limits": {"rpm": 60}}],
    "limits": {"body_bytes": 33554432, "header_bytes": 65536, "connections": 10000, "header_timeout": 20},
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 0.5, 1e308, -0.0, math.inf, -math.inf, math.nan, 10**30, -(10**400), "", "0", "-1", "auto", "nan", "1e999",
    " ", "\x00", "a\r\nX: 1", "\ud800", "\u2028", "é", "x" * 5000, "$", "$FUZZ_KEY", "${FUZZ_KEY}", "$NOT_SET", "${", "file:", "file:\x00",
    "file:/nowhere/at/all", "sha256:", "sha256:" + "0" * 64, "sha256:zz", "*", "[", "[a-", "http://", "http://[", "http://[::1", "http://h:99999", "http://h:x/",
    "https://user@h/v1", "https://h/v1?x=1", "https://h/v1#f", "https://h/\r\n", "https://é.example/v1", "ftp://h", "//h", "socks5://h:1", "::1", "0.0.0.0", "999.1.1.1",
    [], {}, [None], [[]], [{}], {"": ""}, {"type": "openai"}, {"a": {"b": {"c": []}}}, ["x"] * 300, [1, 2], {"X-A": None}, {"X A": "1"}, {"Host": "x"},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


class Configurations(Target):
    """Configuration documents: parsed, or refused with a message."""

    def make(self, chooser: random.Random) -> Any:
        """Return a document with some places replaced, removed, renamed or repeated."""
        data = copy.deepcopy(CONFIG)
        for _ in range(chooser.choice((1, 1, 1, 2, 3, 5))):
            *path, last = chooser.choice([path for path in places(data) if path] or [("x",)])
            inner = data
            for key in path:
                inner = inner[key]
            kind = chooser.randrange(6)
            if kind == 0:
                del inner[last]
            elif kind == 1 and isinstance(inner, dict):
                inner[chooser.choice([str(last).upper(), str(last) + "s", "", "\x00", "\ud800", "x" * 999])] = inner.pop(last)
            elif kind == 2 and isinstance(inner, list):
                inner.append(copy.deepcopy(inner[last]))
            else:
                inner[last] = copy.deepcopy(chooser.choice(VALUES))
                for _ in range(chooser.choice((3, 30, 300)) if chooser.random() < 0.03 else 0):
                    inner[last] = [inner[last]] if chooser.random() < 0.5 else {"config": inner[last]}
        return chooser.choice(VALUES) if chooser.random() < 0.01 else data

    def check(self, value: Any, chooser: random.Random) -> None:
        try:
            config = app.parse_config(json.loads(json.dumps(value)), "fuzz", {"FUZZ_KEY": KEY})
        except app.ConfigError as error:
            if not str(error) or KEY in str(error):
                raise Broken(f"a refusal without words, or with a secret: {error}") from None
        else:
            if KEY in repr(config) + "".join(app.describe(config)):
                raise Broken("a secret is shown")


class Live(Target):
    """A server on a real socket: whole and cut, the same requests are answered and the same are refused."""

    seeds = Requests.seeds

    def __init__(self) -> None:
        self.stage = wire.Stage()
        self.stage.__enter__()

    def close(self) -> None:
        self.stage.__exit__()

    def judge(self, pieces: Iterable[bytes]) -> list[str]:
        """Return the requests that were answered, and "refused" if the last one was."""
        received, lines = self.stage.ask(list(pieces), leave=True)
        asked = [line.split()[2:5] for line in lines.splitlines()]
        answers = wire.read_answers(received, [method for method, _, _ in asked])
        refused = bool(answers) and answers[-1][0] >= 400 and "request_id" not in answers[-1][1] and asked[-1][0] == "-"
        return [" ".join(words) for words in asked[: len(asked) - refused]] + ["refused"] * refused

    def check(self, value: Any, chooser: random.Random) -> None:
        whole = self.judge([value])
        for pieces in list(cuts(value, chooser))[: 3 if len(value) < TINY else 2]:
            result = self.judge(pieces)
            # After a refused expectation the connection is closed at once: what was sent behind it may come too late.
            common = min(len(result), len(whole)) if b"expect" in value.lower() else None
            compare(whole[:common], pieces, result[:common])


CHAT_FIELDS = (
    *(b"X-A: 1", b"x-a:2", b"Accept: */*", b"Cookie: a=b", b"Authorization: Bearer sk-client", b"OpenAI-Organization: other", b"TE: trailers"),
    *(b"Connection: X-A, close", b"Connection: content-length", b"Connection: host, authorization", b"Upgrade: h2c", b"Content_Length: 3"),
    *(b"Proxy-Authorization: Basic eDp5", b"X-Forwarded-For: 1.2.3.4", b"Forwarded: for=1.2.3.4", b"Expect: 100-continue"),
    *(b"Idempotency-Key: 1", b"X-Stainless-Read-Timeout: 600"),
)
ODD = ("m", "", "a\r\nX-B: 1", "\u2028", "é", "x" * 300, "a\x00b", '"', "\ud800", "..", "%0d%0a")
SENT = {"authorization": "Bearer sk-secret-a-key", "accept-encoding": "identity"}
PRIVATE = {
    *("cookie", "te", "upgrade", "proxy-authorization", "x-forwarded-for", "forwarded", "expect", "transfer-encoding"),
    *("openai-organization", "api-key", "trailer", "keep-alive", "proxy-connection"),
}
OK = reply(200, b'{"id":"own","choices":[{}]}')


class Behind(Target):
    """A server between a client and an upstream that sends what a case says."""

    def talk(self, requests: list[bytes], replies: list[bytes], leave: bool) -> tuple[list[bytes], list[Message]]:
        """Send each request on a connection of its own; return the answers, and the requests that the upstream got."""

        async def script(peer: Peer, _: Message) -> None:
            raw = replies[min(len(upstream.seen), len(replies)) - 1]
            await peer.send(raw)
            if raw is not OK:
                peer.close()
                await peer.gone()

        async def work() -> list[bytes]:
            async with upstream:
                account = controller("a", upstream.url, timeouts={"first_byte": 2, "idle": 2})
                async with Running(account, pool={"max_wait": 0.05}, allowed_hosts=["*"]) as server:
                    answers = [await wire.talk(server.port, [raw], leave) for raw in requests]
                    while server.server.connections:
                        await asyncio.sleep(0)
                    if wire.pooled(server)[1]:
                        raise Broken(f"{wire.pooled(server)}")
                    return answers

        upstream = Upstream(script)
        return asyncio.run(work()), upstream.seen


class Forwarding(Behind):
    """The upstream gets one whole request with the account's own key, whatever fields and names a client sends."""

    def make(self, chooser: random.Random) -> bytes:
        data = {"model": chooser.choice(ODD), "messages": [{"role": "user", "content": chooser.choice(ODD)}]}
        body = json.dumps(data | {chooser.choice(ODD): chooser.choice(VALUES[:20])}).encode()
        head = b"".join([chooser.choice(CHAT_FIELDS) + b"\r\n" for _ in range(chooser.randrange(6))])
        if chooser.random() < 0.4:
            head = mutate(head, chooser, CHAT_FIELDS)
        framing = b"Content-Length: %d\r\n\r\n" % len(body) + body
        if chooser.random() < 0.3:
            framing = b"Transfer-Encoding: chunked\r\n\r\n" + app.chunk(body) + b"0\r\nX-T: 1\r\n\r\n"
        query = chooser.choice((b"", b"", b"?a=b", b"?a=%0d%0aX:%201", b"?a=\"<>", b"?\\"))
        return b"POST /v1/chat/completions%b HTTP/1.1\r\nHost: localhost\r\n" % query + head + framing + wire.FOLLOW

    def check(self, value: Any, chooser: random.Random) -> None:
        (received,), seen = self.talk([value], [OK], leave=True)
        answers, rest = wire.split_answers(received)
        if rest or len(seen) != sum(status == 200 for status, _, _ in answers):
            raise Broken(f"{len(seen)} requests went upstream for {answers!r}, then {rest!r}")
        for sent in seen:
            lengths = [text for name, text in sent.fields if name.lower() == "content-length"]
            start = sent.start.partition("?")[0].partition(" HTTP")[0] == "POST /v1/chat/completions"
            own = not PRIVATE & set(sent.headers) and all(sent.headers.get(name) == text for name, text in SENT.items())
            names = all(re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) for name, _ in sent.fields)
            if not (start and own and names and lengths == [str(len(sent.body))]):
                raise Broken(f"{sent.start!r} {sent.fields!r}")


class Upstreams(Behind):
    """Whatever an upstream sends, its client gets one well-formed answer, and the next client its own."""

    seeds = Replies.seeds + 20 * tuple(sse_reply(chat[:40], chat[40:]) for chat in CHATS)

    def check(self, value: Any, chooser: random.Random) -> None:
        chats = [{"model": "m", "messages": [{"role": "user"}], "stream": stream} for stream in (chooser.random() < 0.5, False)]
        requests = [request(json.dumps(chat).encode(), "Connection: close") for chat in chats]
        (received, following), _ = self.talk(requests, [value, OK], leave=False)
        answers, rest = wire.split_answers(received)
        if len(answers) != 1 and not (rest.startswith(b"HTTP/1.1 2") and not answers):
            raise Broken(f"not one answer: {received!r}")
        status, _, body = wire.read_answers(following)[0]
        if (status == 200 and body != OK.partition(b"\r\n\r\n")[2]) or (status != 200 and "error" not in json.loads(body)):
            raise Broken(f"the next client got {following!r}")


TARGETS: dict[str, Callable[[], Target]] = {
    "requests": Requests, "replies": Replies, "chunked": Chunked, "forms": Forms, "events": Events,
    "config": Configurations, "live": Live, "forwarding": Forwarding, "upstreams": Upstreams,
}


def chooser_of(name: str, seed: int, number: int) -> random.Random:
    """Return the source of all choices of one case."""
    return random.Random(f"{name}:{seed}:{number}")


def run(name: str, seed: int, cases: Iterable[int], until: float = math.inf) -> Iterator[str]:
    """Run cases of a target until a time; yield a report for each that fails."""

    def ring(*_: object) -> None:
        raise Broken(f"more than {HANG_S:g} s")

    signal.signal(signal.SIGALRM, ring)
    with contextlib.closing(TARGETS[name]()) as target:
        for number in cases:
            chooser = chooser_of(name, seed, number)
            value = target.make(chooser)
            try:
                signal.setitimer(signal.ITIMER_REAL, HANG_S)
                target.check(value, chooser)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Exception:
                signal.setitimer(signal.ITIMER_REAL, 0)
                replay = f"python3 tests/fuzz.py --target {name} --seed {seed} --case {number}"
                yield f"{name}\n{traceback.format_exc()}\n{value!r}\nreplay: {replay}\n"
            if time.monotonic() > until:
                print(f"{name}: seed {seed}, {number + 1} cases")
                return


def main() -> int:
    """Run the command line; return 1 if something was found."""
    parser = argparse.ArgumentParser(description="Fuzz the module with a seeded mutator.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    parser.add_argument("--case", type=int, help="only this number")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    names = [options.target] if options.target else list(TARGETS)
    cases = range(10**9) if options.case is None else [options.case]
    for name in names:
        for problem in run(name, options.seed, cases, time.monotonic() + options.seconds / len(names)):
            print(problem)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
