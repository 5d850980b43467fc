#!/usr/bin/env python3
"""A seeded mutator over the wire corpus: python3 tests/fuzz.py [--seconds S] [--seed N] [--target NAME] [--case N]

Whatever the input, the outcome is a value or the documented error, soon, and the same wherever the input is cut.
Every case follows from its target, the seed and its number, so that what fails can be replayed: the failing input is
printed as a repr, with the command that makes it again.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import logging
import math
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import chatgpt_apiserver as app
from tests.support import Message, Peer, Running, Upstream, controller, reply, request
from tests.wirefeed import (
    FOLLOW,
    Stage,
    corpus,
    cut,
    cut_at,
    each_request,
    message,
    read_answers,
    read_reply,
    split_answers,
    talk,
)

HANG_S = 5.0  # real time one case may take
SMALL, TINY = 3000, 500  # inputs below the first are worth mutating, below the second worth cutting at every byte
LIMIT = 700  # bytes of a body, low enough to be met

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
TOKENS = (
    b"\r\n \n \r \0 \t : , ; = \" 0 5 a F x + - _ . / * % ? # \\ [ ] \x0b \x0c \x7f \x80 \xff 0x 00 \r\n\r\n \n\n \r\r"
    b" chunked gzip identity HTTP/1.1 HTTP/1.0 HTTP/2.0 GET POST CONNECT close keep-alive 100-continue"
    b" 0\r\n\r\n ffffffffffffffff 18446744073709551616 data: event: error [DONE] {\"error\":{}} {}"
).split(b" ")
PIECES = (
    *TOKENS,
    b" ",
    b"\r\n ",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b"Host: other\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n",
    b"[" * 300,
    b"1" * 40,
)


class Hang(Exception):
    """A case took too long."""


class Broken(Exception):
    """A property does not hold."""


def mutate(data: bytes, chooser: random.Random, others: "list[bytes] | tuple[bytes, ...]") -> bytes:
    """`data` changed in a few places."""
    for _ in range(chooser.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        start = chooser.randrange(len(data) + 1)
        end = min(len(data), start + chooser.choice((0, 0, 1, 1, 2, 4, 16, 64)))
        kind = chooser.randrange(9)
        if kind == 0:
            middle = b""
        elif kind == 1:
            middle = data[start:end] * 2
        elif kind == 2:
            middle = bytes([chooser.randrange(256)])
        elif kind == 3:
            middle = data[start:end].swapcase()
        elif kind == 4:
            other = chooser.choice(others)
            at = chooser.randrange(len(other) + 1)
            middle = other[at : at + chooser.choice((1, 8, 40, 400))]
        elif kind == 5:
            lines = data.splitlines(keepends=True) or [b""]
            line = chooser.choice(lines)
            start = end = data.find(line)
            middle = line
        else:
            middle = chooser.choice(PIECES)
        data = data[:start] + middle + data[end:]
    return data[: 2 * SMALL]


def ways(data: bytes, chooser: random.Random) -> "Iterator[list[bytes]]":
    """Some ways to cut `data`."""
    if len(data) < TINY:
        yield cut(data, "byte")
    yield cut(data, "line")
    for _ in range(2):
        yield cut_at(data, [chooser.randrange(len(data) + 1) for _ in range(chooser.randint(1, 5))])


def same(data: bytes, chooser: random.Random, judge: "Callable[[Iterable[bytes]], Any]") -> None:
    """The judgement of `data` does not depend on where it is cut."""
    whole = judge([data])
    for pieces in ways(data, chooser):
        found = judge(pieces)
        if found != whole:
            raise Broken("whole: %r\ncut %r: %r" % (whole, [len(piece) for piece in pieces][:50], found))


class Target:
    """What is fuzzed: `make` gives an input, `check` raises when it is not handled as it should be."""

    seeds: "list[bytes]"

    def make(self, chooser: random.Random) -> "Any":
        """An input."""
        return mutate(chooser.choice(self.seeds), chooser, self.seeds)

    def check(self, value: "Any", chooser: random.Random) -> None:
        """Raises whatever is wrong."""

    def close(self) -> None:
        """Gives back what it holds."""


def small(*folders: str) -> "list[bytes]":
    """The short messages of the corpus."""
    return [data for folder in folders for data in map(message, corpus(folder)) if len(data) < SMALL]


class Requests(Target):
    """The pure request parser and the decoders of request bodies."""

    def __init__(self) -> None:
        self.seeds = [data + FOLLOW for data in small("valid", "invalid")]

    def judge(self, pieces: "Iterable[bytes]") -> "tuple[list[Any], str]":
        """The good requests, and how it ended."""
        found: "list[Any]" = []
        try:
            found += each_request(pieces, LIMIT)
        except app.BadMessage as error:
            return found, "%d" % error.status
        except OverflowError:
            return found, "413"
        except ValueError:
            return found, "400"
        return found, "end"

    def check(self, value: "Any", chooser: random.Random) -> None:
        same(value, chooser, self.judge)


class Replies(Target):
    """The pure reply parser and the decoders of reply bodies."""

    def __init__(self) -> None:
        self.seeds = small("replies/valid", "replies/invalid", "replies/cut")

    def judge(self, pieces: "Iterable[bytes]") -> "tuple[Any, ...]":
        """Status and body, or the error."""
        try:
            status, body, _ = read_reply(pieces)
        except app.UpstreamError as error:
            return (type(error).__name__,)
        except ValueError:
            return ("BadReply",)
        return status, body

    def check(self, value: "Any", chooser: random.Random) -> None:
        same(value, chooser, self.judge)


def reference_chunked(data: bytes) -> "tuple[bytes, bytes] | None":
    """Body and rest of a whole chunked body, decoded slowly and by the letter of RFC 9112, 7.1; None: not one."""
    digits, body = b"0123456789abcdefABCDEF", b""
    while True:
        line, found, data = data.partition(b"\r\n")
        number = line[: len(line) - len(line.lstrip(digits))]
        extension = line[len(number) :].lstrip(b" \t")
        fits = not line[len(number) :] or extension.startswith(b";")
        if not found or not number or not fits or any((byte < 32 and byte != 9) or byte == 127 for byte in line):
            return None
        size = int(number, 16)
        if not size:
            break
        if data[size : size + 2] != b"\r\n":
            return None
        body, data = body + data[:size], data[size + 2 :]
    while not data.startswith(b"\r\n"):
        line, found, data = data.partition(b"\r\n")
        name, colon, value = line.partition(b":")
        token = name and all(33 <= byte < 127 and byte not in b'"(),/:;<=>?@[\\]{}' for byte in name)
        if not found or not colon or not token or any((byte < 32 and byte != 9) or byte == 127 for byte in value):
            return None
    return body, data[2:]


class Chunked(Target):
    """The chunked decoder, also against a slow one that shares nothing with it."""

    def __init__(self) -> None:
        self.seeds = list(BODIES)

    def judge(self, pieces: "Iterable[bytes]") -> "tuple[Any, ...]":
        """The body, whether it is whole, and what follows; or the error."""
        decoder, body, rest = app.ChunkedDecoder(LIMIT), b"", b""
        try:
            for piece in pieces:
                if decoder.done:
                    rest += piece
                elif piece:
                    body += decoder.feed(piece)
                    rest += decoder.rest if decoder.done else b""
        except OverflowError:
            return ("too large",)
        except ValueError:
            return ("malformed",)
        return body, decoder.done, rest

    def check(self, value: "Any", chooser: random.Random) -> None:
        same(value, chooser, self.judge)
        found, reference = self.judge([value]), reference_chunked(value)
        if reference is None:
            if len(found) == 3 and found[1]:
                raise Broken("taken against the grammar: %r" % (found,))
        elif len(found) == 3 and found != (reference[0], True, reference[1]):
            raise Broken("%r is not %r" % (found, reference))
        elif found == ("too large",) and len(reference[0]) <= LIMIT:
            raise Broken("not too large")


class Events(Target):
    """The event splitter, and what an event means."""

    def __init__(self) -> None:
        self.seeds = list(CHATS)

    def judge(self, pieces: "Iterable[bytes]") -> "tuple[list[bytes], bytes]":
        """The whole events, and the beginning of the next."""
        splitter, events = app.EventSplitter(), []
        for piece in pieces:
            events += splitter.feed(piece)
        return [bytes(event) for event in events], bytes(splitter.pending)

    def check(self, value: "Any", chooser: random.Random) -> None:
        same(value, chooser, self.judge)
        events, pending = self.judge([value])
        if b"".join(events) + pending != value:
            raise Broken("bytes were lost or made up: %r" % (events,))
        for event in [*events, pending]:
            if not isinstance(app.judge_event(event), app.EventKind):
                raise Broken("no kind for %r" % event)


CONFIG: "dict[str, Any]" = {
    "host": "127.0.0.1",
    "port": "8080",
    "pool": {"type": "balanced", "max_wait": 30, "max_queue": 1000, "rescue_after": "auto"},
    "controllers": [
        {
            "type": "openai",
            "name": "team-a",
            "weight": 5,
            "models": ["gpt-4.1*"],
            "model_map": {"fast": "gpt-4.1-mini"},
            "limits": {"rpm": 500, "tpm": 200000, "concurrency": 64, "burst_s": 60},
            "quota_group": "org-1",
            "timeouts": {"connect": 10, "first_byte": 120, "idle": 300, "total": 0},
            "config": {
                "api_key": "$FUZZ_KEY",
                "base_url": "https://api.openai.com/v1",
                "organization": "org",
                "project": "p",
                "proxy": "http://user:pass@proxy:3128",
                "headers": {"X-A": "1"},
            },
        },
        {"type": "echo", "name": "e", "models": ["echo"], "config": {"delay": 0.03}},
    ],
    "client_keys": [{"name": "alice", "key": "alice-key-1234567", "models": ["*"], "limits": {"rpm": 60}}],
    "endpoints": ["inference"],
    "cors": {"allow_origins": ["https://app.example"]},
    "allowed_hosts": ["api.example"],
    "limits": {"body_bytes": 33554432, "header_bytes": 65536, "connections": 10000, "header_timeout": 20},
    "log": {"format": "text", "level": "info"},
}
VALUES: "list[Any]" = [
    None, True, False, 0, 1, -1, 0.5, 1e308, -0.0, math.inf, -math.inf, math.nan, 10**30, -(10**400), "", "0", "-1", "auto", "nan", "1e999",
    " ", "\x00", "a\r\nX: 1", "\ud800", "\u2028", "é", "x" * 5000, "$", "$FUZZ_KEY", "${FUZZ_KEY}", "$NOT_SET", "${", "file:", "file:\x00",
    "file:/nowhere/at/all", "sha256:", "sha256:" + "0" * 64, "sha256:zz", "*", "[", "[a-", "http://", "http://[", "http://[::1", "http://h:99999", "http://h:x/",
    "https://user@h/v1", "https://h/v1?x=1", "https://h/v1#f", "https://h/\r\n", "https://é.example/v1", "ftp://h", "//h", "socks5://h:1", "::1", "0.0.0.0", "999.1.1.1",
    [], {}, [None], [[]], [{}], {"": ""}, {"type": "openai"}, {"a": {"b": {"c": []}}}, ["x"] * 300, [1, 2], {"X-A": None}, {"X A": "1"}, {"Host": "x"},
]  # fmt: skip


def places(value: "Any", path: "tuple[Any, ...]" = ()) -> "Iterator[tuple[Any, ...]]":
    """The paths to every value inside of a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def deepen(chooser: random.Random) -> "Any":
    """A value that is nested far."""
    value: "Any" = 1
    for _ in range(chooser.choice((3, 30, 300))):
        value = [value] if chooser.random() < 0.5 else {"config": value}
    return value


class Configurations(Target):
    """Configuration documents: parsed, or refused in words."""

    env: "dict[str, str]"

    def __init__(self) -> None:
        self.env = {"FUZZ_KEY": "sk-fuzz-secret-0123456789"}

    def make(self, chooser: random.Random) -> "Any":
        """A document with some places replaced, removed, renamed or moved."""
        data = copy.deepcopy(CONFIG)
        for _ in range(chooser.choice((1, 1, 1, 2, 3, 5))):
            *where, last = chooser.choice([path for path in places(data) if path] or [("x",)])
            inner = data
            for key in where:
                inner = inner[key]
            kind = chooser.randrange(6)
            if kind == 0:
                del inner[last]
            elif kind == 1 and isinstance(inner, dict):
                inner[chooser.choice([str(last).upper(), str(last) + "s", "", "\x00", "\ud800", "x" * 999])] = inner.pop(last)
            elif kind == 2 and isinstance(inner, list):
                inner.append(copy.deepcopy(inner[last]))
            else:
                inner[last] = copy.deepcopy(chooser.choice(VALUES)) if chooser.random() < 0.97 else deepen(chooser)
        return chooser.choice(VALUES) if chooser.random() < 0.01 else data

    def check(self, value: "Any", chooser: random.Random) -> None:
        try:
            config = app.parse_config(json.loads(json.dumps(value)), "fuzz", self.env)
        except app.ConfigError as error:
            said = str(error)
            if not said or self.env["FUZZ_KEY"] in said:
                raise Broken("a refusal without words, or with a secret: %r" % said) from None
        else:
            if self.env["FUZZ_KEY"] in repr(config) + "".join(app.describe(config)):
                raise Broken("a secret is shown")


class Live(Target):
    """A server on a real socket: whole and cut, the same requests are answered and the same are refused."""

    def __init__(self) -> None:
        self.seeds = [data + FOLLOW for data in small("valid", "invalid")]
        self.stage = Stage()
        self.stage.__enter__()

    def close(self) -> None:
        self.stage.__exit__()

    def ask(self, pieces: "list[bytes]") -> "list[str]":
        """The requests that were answered, and that the last one was refused if it was."""
        found, lines = self.stage.ask(pieces, leave=True)
        asked = [line.split()[2:5] for line in lines.splitlines()]
        answers = read_answers(found, [method for method, _, _ in asked])
        refused = bool(answers) and answers[-1][0] >= 400 and "request_id" not in answers[-1][1] and asked[-1][0] == "-"
        return [" ".join(words) for words in asked[: len(asked) - refused]] + ["refused"] * refused

    def check(self, value: "Any", chooser: random.Random) -> None:
        whole = self.ask([value])
        for pieces in [cut(value, "line"), *ways(value, chooser)][: 3 if len(value) < TINY else 2]:
            found = self.ask(pieces)
            # Who expects to be asked for its body and is refused without is cut off: what follows may come too late.
            most = min(len(found), len(whole)) if b"expect" in value.lower() else None
            if self.stayed(found)[:most] != self.stayed(whole)[:most]:
                raise Broken("whole: %r\ncut %r: %r" % (whole, [len(piece) for piece in pieces][:50], found))

    def stayed(self, asked: "list[str]") -> "list[str]":
        """Without the status of one whose client was gone: on HTTP/1.0 its FIN may come before or after the answer."""
        return [words.removesuffix(" 499").removesuffix(" 200") for words in asked]


CHAT_HEADS = (
    b"X-A: 1",
    b"x-a:2",
    b"Accept: */*",
    b"Cookie: a=b",
    b"Authorization: Bearer sk-client",
    b"OpenAI-Organization: other",
    b"Connection: X-A, close",
    b"Connection: content-length",
    b"Connection: host, authorization",
    b"TE: trailers",
    b"Upgrade: h2c",
    b"Proxy-Authorization: Basic eDp5",
    b"X-Forwarded-For: 1.2.3.4",
    b"Forwarded: for=1.2.3.4",
    b"Expect: 100-continue",
    b"Content_Length: 3",
    b"Idempotency-Key: 1",
    b"X-Stainless-Read-Timeout: 600",
)
ODD = ("m", "", "a\r\nX-B: 1", "\u2028", "é", "x" * 300, "a\x00b", '"', "\ud800", "..", "%0d%0a")
OWN = {"authorization": "Bearer sk-secret-a-key", "accept-encoding": "identity"}
PRIVATE = {
    *("cookie", "te", "upgrade", "proxy-authorization", "x-forwarded-for", "forwarded", "expect", "transfer-encoding"),
    *("openai-organization", "api-key", "trailer", "keep-alive", "proxy-connection"),
}


class Behind(Target):
    """A server between a client and an upstream of which a case says what it sends."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)

    def close(self) -> None:
        self.runner.close()

    def talk(self, raw: bytes, *replies: bytes) -> "tuple[list[bytes], list[Message]]":
        """What the client hears that sends `raw`, then what others hear; and what the upstream was asked."""

        async def script(peer: Peer, _: Message) -> None:
            reply = replies[min(len(one.seen), len(replies)) - 1]
            await peer.send(reply)
            if reply is not OK:
                peer.close()
                await peer.gone()

        async def work() -> "list[bytes]":
            async with one:
                account = controller("a", one.url, timeouts={"first_byte": 2, "idle": 2})
                async with Running(account, pool={"max_wait": 0.05}, allowed_hosts=["*"]) as server:
                    raws = [raw] + [good_chat(False)] * (len(replies) - 1)
                    found = [await talk(server.port, [each], leave=True) for each in raws]
                    while server.server.connections:
                        await asyncio.sleep(0)
                    if not repr(server.server.links).endswith("active=0>"):
                        raise Broken(repr(server.server.links))
                    return found

        one = Upstream(script)
        return self.runner.run(work()), one.seen


OK = reply(200, b'{"id":"own"}')


def good_chat(stream: bool) -> bytes:
    """A chat request, after which the server closes."""
    body = json.dumps({"model": "m", "messages": [{"role": "user"}], "stream": stream}).encode()
    return request(body, "Connection: close")


class Forwarding(Behind):
    """What goes upstream is one whole request with the account's own key, whatever fields and names a client sends."""

    def make(self, chooser: random.Random) -> bytes:
        data = {"model": chooser.choice(ODD), "messages": [{"role": "user", "content": chooser.choice(ODD)}]}
        body = json.dumps(data | {chooser.choice(ODD): chooser.choice(VALUES[:20])}).encode()
        fields = [chooser.choice(CHAT_HEADS) for _ in range(chooser.randrange(6))]
        head = b"".join(field + b"\r\n" for field in fields)
        if chooser.random() < 0.4:
            head = mutate(head, chooser, CHAT_HEADS)
        framing = b"Content-Length: %d\r\n\r\n" % len(body) + body
        if chooser.random() < 0.3:
            framing = b"Transfer-Encoding: chunked\r\n\r\n" + app.chunk(body) + b"0\r\nX-T: 1\r\n\r\n"
        query = chooser.choice((b"", b"", b"?a=b", b"?a=%0d%0aX:%201", b"?a=\"<>", b"?\\"))
        return b"POST /v1/chat/completions%b HTTP/1.1\r\nHost: localhost\r\n" % query + head + framing + FOLLOW

    def check(self, value: "Any", chooser: random.Random) -> None:
        (found,), seen = self.talk(value, OK)
        answers, rest = split_answers(found)
        if rest:
            raise Broken("half an answer: %r" % rest)
        if len(seen) != sum(status == 200 for status, _, _ in answers):
            raise Broken("%d requests went upstream for %r" % (len(seen), answers))
        for one in seen:
            lengths = [field for name, field in one.fields if name.lower() == "content-length"]
            if one.start.partition("?")[0].partition(" HTTP")[0] != "POST /v1/chat/completions" or lengths != [str(len(one.body))]:
                raise Broken("%r %r" % (one.start, one.fields))
            if PRIVATE & set(one.headers) or any(one.headers.get(name) != text for name, text in OWN.items()):
                raise Broken("%r" % (one.fields,))
            if not all(re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) for name, _ in one.fields):
                raise Broken("%r" % (one.fields,))


class Upstreams(Behind):
    """Whatever an upstream sends, its client hears one well-formed answer, and the next client its own."""

    def __init__(self) -> None:
        super().__init__()
        events = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        streams = [events + app.chunk(chat[:40]) + app.chunk(chat[40:]) + b"0\r\n\r\n" for chat in CHATS]
        self.seeds = small("replies/valid", "replies/invalid", "replies/cut") + 20 * streams

    def check(self, value: "Any", chooser: random.Random) -> None:
        stream = chooser.random() < 0.5
        (found, own), _ = self.talk(good_chat(stream), value, OK)
        answers, rest = split_answers(found)
        if len(answers) != 1 and not (rest.startswith(b"HTTP/1.1 2") and not answers):
            raise Broken("not one answer: %r" % found)
        status, _, body = read_answers(own)[0]
        if (status == 200 and body != b'{"id":"own"}') or (status != 200 and "error" not in json.loads(body)):
            raise Broken("the next client heard %r" % own)


TARGETS: "dict[str, Callable[[], Target]]" = {
    "requests": Requests,
    "replies": Replies,
    "chunked": Chunked,
    "events": Events,
    "config": Configurations,
    "live": Live,
    "forwarding": Forwarding,
    "upstreams": Upstreams,
}


@contextlib.contextmanager
def alarm() -> "Iterator[None]":
    """Makes a case that hangs fail, where the system can."""

    def ring(*_: object) -> None:
        raise Hang("more than %g s" % HANG_S)

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def chooser_of(name: str, seed: int, number: int) -> random.Random:
    """What makes the choices of one case."""
    return random.Random("%s:%d:%d" % (name, seed, number))


def run_case(target: Target, name: str, seed: int, number: int) -> str:
    """One case; what is wrong with it, with its input, or nothing."""
    chooser = chooser_of(name, seed, number)
    value = target.make(chooser)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        target.check(value, chooser)
    except Exception:
        replay = "python3 tests/fuzz.py --target %s --seed %d --case %d" % (name, seed, number)
        return "%s\n%r\nreplay: %s" % (traceback.format_exc(), value, replay)
    return ""


def run(name: str, seed: int, cases: "Iterable[int]", until: float = math.inf) -> "Iterator[str]":
    """Runs cases of a target until a time; what is wrong with those that fail."""
    with alarm(), contextlib.closing(TARGETS[name]()) as target:
        for number in cases:
            problem = run_case(target, name, seed, number)
            if problem:
                yield problem
            if time.monotonic() > until:
                print("%s: seed %d, %d cases" % (name, seed, number + 1))
                return


def main() -> int:
    """The command line; 1 when something was found."""
    parser = argparse.ArgumentParser(description="Fuzz the module with a seeded mutator.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    parser.add_argument("--case", type=int, help="only this number")
    parser.add_argument("--keep-going", type=int, default=3, metavar="N", help="end a target after N failures (default 3)")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    names = [options.target] if options.target else list(TARGETS)
    failed = 0
    for name in names:
        until = time.monotonic() + options.seconds / len(names)
        cases = range(options.case, options.case + 1) if options.case is not None else range(10**9)
        for count, problem in enumerate(run(name, options.seed, cases, until)):
            print("%s\n%s\n" % (name, problem))
            failed += 1
            if count + 1 >= options.keep_going:
                break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
