#!/usr/bin/env python3
"""chatgpt_apiserver: several rate-limited OpenAI-style accounts behind one endpoint.

Copy this file to a machine that has Python 3.11 or newer, start it, and point any OpenAI client at it:

    python3 chatgpt_apiserver.py --demo                     (no key needed: answers by echoing)
    OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py      (one account, from the environment)
    python3 chatgpt_apiserver.py --config_file my.json      (many accounts; README.md has every key)

The way of a request, top to bottom, and the sections of this file that it passes:

    client --> Server: read head and body, doors, route                        (4, 6, 11)
           --> Relay: one attempt after the other until one answers            (10)
                 --> Balancing: who has room now? nobody: wait in line         (9)
                 --> Controllers: what this account's request looks like       (8)
                 --> Upstream connections: a pooled or fresh connection        (7)
           <-- Relay: hold until the first real event, then every byte at once (5, 10)

Each section uses only what stands above it:

    1. Errors
    2. Configuration
    3. Observability
    4. HTTP/1.1 on the wire
    5. Server-sent events
    6. Timed streams
    7. Upstream connections
    8. Controllers
    9. Balancing and health
    10. Relay
    11. Server
    12. Command line
"""

import sys

if sys.version_info < (3, 11):  # before the imports that older versions lack
    sys.exit("chatgpt_apiserver needs Python 3.11 or newer; this is Python %d.%d" % sys.version_info[:2])

import argparse
import asyncio
import asyncio.sslproto
import base64
import dataclasses
import difflib
import enum
import errno
import functools
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import socket
import ssl
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Protocol

__version__ = "1.0.0"

# Limits that are no configuration keys. Those that users may set stand in section 2 with their defaults.
START_LINE_BYTES = 8192  # RFC 9112, 3 recommends at least 8000 octets for a request line
FIELD_COUNT = 100  # header fields of one message; nginx and Apache stop near this too
CHUNK_LINE_BYTES = 256  # a chunk-size line with its extensions, which nobody needs
TRAILER_BYTES = 8192  # the trailer section is read and dropped
UPSTREAM_HEAD_BYTES = 65536  # a reply's head; real ones stay below 8 kB
INFORMATIONAL_MAX = 16  # 1xx replies before the final one; more is an upstream gone mad
READ_BYTES = 65536  # asked of the kernel at once, and half of what a reader keeps before it stops the peer
WRITE_HIGH_BYTES = 65536  # unsent bytes to one peer above which nothing more is read for it
TLS_BUFFER_BYTES = 32768  # asyncio's own 256 kB for each TLS connection is most of what an idle one costs
WHOLE_BYTES = 1_048_576  # a whole answer up to this size is collected before its head goes out, and can be replayed
HOLD_BYTES = 65536  # what may come before the first real event of a stream
HOLD_S = 15.0  # and for how long it is kept
EVENT_BYTES = 1_048_576  # one event that is looked into; a larger one counts as real unseen
IDLE_UPSTREAM_S = 55.0  # a pooled connection is closed after this; servers commonly close after 60 s
IDLE_UPSTREAM_COUNT = 1024  # pooled connections per origin
STALE_S = 1.0  # a pooled connection that dies this soon after the write had been closed before it
BACKLOG = 4096  # connections that the kernel completes before they are accepted
LINGER_S = 2.0  # how long a client may go on sending after our side is closed
LINGER_BYTES = 1_048_576  # and how much
PROBE_S = 0.05  # between the two interim replies that tell a half-closed client from one that left
MODELS_TTL_S = 300.0  # how long an upstream's model list is believed
MODELS_TIMEOUT_S = 10.0  # for asking it
TOKENS_PER_PART = 1000  # an image, audio or file part in the token estimate; never the length of a data URL
TOKENS_ANSWER = 500  # what an answer is taken to need while nothing is known of the model
MODEL_NAME_CHARS = 256  # longer names are not looked up
MEMORY_MODELS = 256  # models of which one controller's ledger is kept; the least recently used goes first

log = logging.getLogger("chatgpt_apiserver")


# ==== 1. Errors ====
# Every way to fail, with what a client is told. `error_body` is the only place that turns an error into JSON. Upstream
# errors say nothing of retries: section 9 judges them, in one function.


class ProxyError(Exception):
    """An answer that this server gives itself: HTTP status, OpenAI-style code and message, extra header lines."""

    def __init__(
        self, status: int, message: str, code: "str | None" = None, *, param: "str | None" = None, headers: bytes = b""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def type(self) -> str:
        """The `error.type` that OpenAI uses for this status."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


class BadMessage(ProxyError):
    """A message that HTTP's grammar or our limits forbid; the connection cannot go on (RFC 9112, 9.6)."""


class ConfigError(Exception):
    """A configuration that cannot be used: file, path, what was found, what is allowed."""


class UpstreamError(Exception):
    """An attempt that brought no answer. `sent`: whether the upstream may have seen the request."""

    status = 502
    code = "upstream_error"
    sent = True


class ConnectFailed(UpstreamError):
    """No connection: DNS, TCP, TLS or the proxy in between. Nothing of the request was sent."""

    code = "upstream_unreachable"
    sent = False


class UpstreamClosed(UpstreamError):
    """The upstream closed or reset the connection. `early`: before any byte of its reply."""

    code = "upstream_closed"

    def __init__(self, message: str, early: bool = False) -> None:
        super().__init__(message)
        self.early = early


class UpstreamTimeout(UpstreamError):
    """The upstream stayed silent for too long. `early`: before any byte of its reply."""

    status = 504
    code = "upstream_timeout"

    def __init__(self, message: str, early: bool = False) -> None:
        super().__init__(message)
        self.early = early


class BadReply(UpstreamError):
    """The upstream's reply breaks HTTP or a limit."""

    code = "upstream_bad_reply"


class ClientGone(Exception):
    """The client closed its connection while it was being served."""


def error_object(message: str, kind: str, code: "str | None" = None, param: "str | None" = None) -> "dict[str, Any]":
    """The error object of OpenAI's API; all four keys are always there (openai-openapi, `Error`)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: "ProxyError | UpstreamError") -> bytes:
    """The JSON body that tells `error` to a client."""
    if isinstance(error, ProxyError):
        found = error_object(error.message, error.type, error.code, error.param)
    else:
        found = error_object(str(error), "server_error", error.code)
    return compact_json(found)


def compact_json(value: "Any") -> bytes:
    """JSON without white space, as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# ==== 2. Configuration ====
# A pure parse of one mapping into frozen values; every message names the file, the path, what was found, what is
# allowed. `Section` hands keys out one by one, so that what nobody asked for is a typing error by definition.

POOL_TYPES = ("balanced", "random", "least_busy", "fastest", "priority")
CONTROLLER_TYPES = ("openai", "echo")
ENDPOINTS = ("inference", "objects", "*")
LOG_LEVELS = ("debug", "info", "warning", "error")
CONFIG_NAMES = ("chatgpt-apiserver.json", "chatgpt-apiserver.toml")
CONFIG_FOLDERS = (".", ".config", "config", "/etc/chatgpt-apiserver")
ENV = "CHATGPT_APISERVER_"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Secret:
    """A value that is never shown: `reveal()` gives it, every other way to print it gives `sk-…last4`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself; for what goes to its owner only."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        if not self._value:
            return "none"
        head = "sk-" if self._value.startswith("sk-") else ""
        return head + "…" + (self._value[-4:] if len(self._value) >= 12 else "")

    __str__ = __repr__


NO_SECRET = Secret("")

@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds; 0 is none. `first_byte` None: 120 for streams, 600 for whole answers, as SDKs wait 600."""

    connect: float = 10.0
    first_byte: "float | None" = None
    idle: float = 300.0
    total: float = 0.0


@dataclasses.dataclass(frozen=True)
class QuotaLimits:
    """Requests and tokens in any sliding 60 s, requests at once, seconds' worth at once; 0 is none."""

    rpm: int = 0
    tpm: int = 0
    concurrency: int = 0
    burst_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class AccountConfig:
    """The `config` of a controller: where it is and what opens it. Delays in seconds are echo's."""

    api_key: Secret = NO_SECRET
    base_url: str = ""
    organization: str = ""
    project: str = ""
    proxy: Secret = NO_SECRET
    ca_file: str = ""
    headers: "tuple[tuple[str, Secret], ...]" = ()
    delay: float = 0.0
    first_delay: float = 0.0


@dataclasses.dataclass(frozen=True)
class ControllerConfig:
    """One upstream account."""

    type: str
    name: str
    account: AccountConfig
    weight: int = 1
    models: "tuple[str, ...]" = ()
    model_map: "tuple[tuple[str, str], ...]" = ()
    limits: QuotaLimits = QuotaLimits()
    quota_group: str = ""
    timeouts: Timeouts = Timeouts()


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How the pool chooses and waits; `rescue_after` None is "auto", 0 never."""

    type: str = "balanced"
    max_wait: float = 30.0
    max_queue: int = 1000
    rescue_after: "float | None" = None


@dataclasses.dataclass(frozen=True)
class ClientKey:
    """Who may come in: the SHA-256 of a key, and what it may ask for."""

    name: str
    digest: bytes
    models: "tuple[str, ...]" = ()
    limits: QuotaLimits = QuotaLimits()


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Bounds on what clients may do: bytes, counts, seconds."""

    body_bytes: int = 33_554_432
    header_bytes: int = 65536
    header_count: int = FIELD_COUNT
    connections: int = 10000
    connections_per_client: int = 0
    header_timeout: float = 20.0
    body_timeout: float = 120.0
    body_rate: int = 1024
    idle_timeout: float = 75.0
    write_timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the server runs by; `source` says where it came from."""

    controllers: "tuple[ControllerConfig, ...]"
    source: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    pool: PoolConfig = PoolConfig()
    client_keys: "tuple[ClientKey, ...]" = ()
    endpoints: "tuple[str, ...]" = ("inference",)
    allow_origins: "tuple[str, ...]" = ()
    allowed_hosts: "tuple[str, ...]" = ()
    tls_cert: str = ""
    tls_key: str = ""
    limits: ServerLimits = ServerLimits()
    log_format: str = "text"
    log_level: str = "info"
    drain_delay: float = 0.0
    drain_timeout: float = 30.0


def shown(value: "Any") -> str:
    """`value` as a message may show it: short, and never a text that could be a secret."""
    if isinstance(value, str) and len(value) > 40:
        return "a text of %d characters" % len(value)
    if value and isinstance(value, (dict, list)):  # a secret may stand inside
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def nearest(word: str, known: "Iterable[str]") -> str:
    """The hint that ends a message about an unknown word."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, 1, 0.6)
    return "did you mean %r?" % close[0] if close else "allowed here: " + ", ".join(names)


class Section:
    """One mapping of the configuration: hands out its keys, knows where it stands, refuses what is left over."""

    def __init__(self, data: "Any", source: str, path: str = "", env: "Mapping[str, str] | None" = None) -> None:
        self.source, self.path = source, path
        self.env: "Mapping[str, str]" = {} if env is None else env
        if not isinstance(data, dict):
            found = "a string" if isinstance(data, str) else shown(data)
            raise ConfigError("%s: %s: found %s, allowed: an object" % (source, path or "top level", found))
        self.data: "dict[str, Any]" = data
        self.known: "set[str]" = set()

    def where(self, key: str) -> str:
        """The path of `key` as messages name it."""
        return self.path + "." + key if self.path else key

    def error(self, key: str, found: "Any", allowed: str) -> ConfigError:
        """What is wrong with the value of `key`."""
        return ConfigError("%s: %s: found %s, allowed: %s" % (self.source, self.where(key), shown(found), allowed))

    def take(self, key: str, default: "Any" = None) -> "Any":
        """The raw value; null counts as absent."""
        self.known.add(key)
        value = self.data.get(key)
        return default if value is None else value

    def text(self, key: str, default: str = "", choices: "tuple[str, ...]" = ()) -> str:
        """A string, of `choices` where given."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        if choices and value not in choices:
            raise self.error(key, value, " | ".join(choices) + " (%s)" % nearest(value, choices))
        if any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise self.error(key, "a control character", "visible characters (this may become a header)")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.error(key, value, "a number from %g to %g" % (low, high))
        return float(value)

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, "a whole number from %d to %d" % (low, high))
        return value

    def strings(self, key: str) -> "tuple[str, ...]":
        """A list of non-empty strings."""
        value = self.take(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.error(key, value, "a list of non-empty strings")
        return tuple(value)

    def pairs(self, key: str) -> "tuple[tuple[str, str], ...]":
        """An object of strings."""
        value = self.take(key, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) and item for item in value.values()):
            raise self.error(key, value, "an object whose values are non-empty strings")
        return tuple(value.items())

    def section(self, key: str) -> "Section":
        """A nested mapping; an empty one where there is none."""
        return Section(self.take(key, {}), self.source, self.where(key), self.env)

    def sections(self, key: str) -> "list[Section]":
        """A list of mappings."""
        value = self.take(key, [])
        if not isinstance(value, list):
            raise self.error(key, type(value).__name__, "a list of objects")
        return [
            Section(item, self.source, "%s[%d]" % (self.where(key), number), self.env)
            for number, item in enumerate(value)
        ]

    def secret(self, key: str) -> Secret:
        """A literal, `$NAME`, `${NAME}` or `file:PATH`; the value is never part of a message."""
        value = self.take(key, "")
        if not isinstance(value, str):
            raise self.error(key, type(value).__name__, "a string, $NAME or file:PATH")
        return self.resolve(key, value)

    def resolve(self, key: str, value: str) -> Secret:
        """The secret that the text `value` stands for."""
        named = re.fullmatch(r"\$(?:\{(\w+)\}|(\w+))", value)
        if named:
            name = named.group(1) or named.group(2)
            if not self.env.get(name):
                raise self.error(key, value, "the name of a set environment variable (%s is not set)" % name)
            value = self.env[name]
        elif value.startswith("file:"):
            value = self.read(key, value[5:])
        value = value.strip()
        if any(not 32 <= ord(char) < 127 for char in value):
            raise self.error(key, "a character outside printable ASCII", "printable ASCII (it goes into a header)")
        return Secret(value)

    def read(self, key: str, name: str) -> str:
        """The text of the file `name`."""
        path = beside(self.source, name)
        try:
            with open(path, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as problem:
            raise self.error(key, name, "a readable file (%s)" % problem) from problem

    def file(self, key: str) -> str:
        """The path of a file that exists, looked up beside the configuration, then in the working directory."""
        name = self.text(key)
        if not name:
            return ""
        path = beside(self.source, name)
        if not os.path.isfile(path):
            raise self.error(key, name, "an existing file, beside the configuration or in the working directory")
        return path

    def close(self) -> None:
        """Refuses the keys that nobody asked for."""
        for key in self.data:
            if key not in self.known:
                raise ConfigError(
                    "%s: %s: unknown key; %s" % (self.source, self.where(key), nearest(key, self.known))
                )


def beside(source: str, name: str) -> str:
    """Where the relative path `name` of the file `source` leads: beside it, else in the working directory."""
    near = os.path.join(os.path.dirname(source), name)
    return near if os.path.exists(near) else name


def parse_config(data: "Any", source: str, env: "Mapping[str, str]") -> Config:
    """The configuration that `data` (JSON or TOML, as read from `source`) describes. Raises ConfigError."""
    top = Section(data, source, env=env)
    tls, cors, logs = top.section("tls"), top.section("cors"), top.section("log")
    config = Config(
        source=source,
        host=top.text("host", Config.host),
        port=parse_port(top),
        pool=parse_pool(top.section("pool")),
        controllers=parse_controllers(top),
        client_keys=tuple(parse_client_key(section) for section in top.sections("client_keys")),
        endpoints=parse_endpoints(top),
        allow_origins=cors.strings("allow_origins"),
        allowed_hosts=tuple(name.lower() for name in top.strings("allowed_hosts")),
        tls_cert=tls.file("cert"),
        tls_key=tls.file("key"),
        limits=parse_server_limits(top.section("limits")),
        log_format=logs.text("format", "text", ("text", "json")),
        log_level=logs.text("level", "info", LOG_LEVELS),
        drain_delay=top.number("drain_delay", 0, 0, 3600),
        drain_timeout=top.number("drain_timeout", 30, 0, 3600),
    )
    for section in (top, tls, cors, logs):
        section.close()
    if bool(config.tls_cert) != bool(config.tls_key):
        raise ConfigError("%s: tls: found one of cert and key, allowed: both or none" % source)
    return config


def parse_port(top: Section) -> int:
    """The port, which the Go original's files write as a string."""
    value = top.take("port", Config.port)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise top.error("port", value, "a number from 0 to 65535 (0: any free port)")
    return value


def parse_pool(section: Section) -> PoolConfig:
    """The `pool` object."""
    rescue = section.take("rescue_after", "auto")
    pool = PoolConfig(
        type=section.text("type", "balanced", POOL_TYPES),
        max_wait=section.number("max_wait", 30, 0, 3600),
        max_queue=section.whole("max_queue", 1000, 0, 1_000_000),
        rescue_after=None if rescue == "auto" else section.number("rescue_after", 0, 0, 3600),
    )
    section.close()
    return pool


def parse_endpoints(top: Section) -> "tuple[str, ...]":
    """What clients may reach beyond chat and models."""
    found = top.strings("endpoints") or ("inference",)
    for number, name in enumerate(found):
        if name not in ENDPOINTS:
            raise top.error("endpoints[%d]" % number, name, " | ".join(ENDPOINTS))
    return found


def parse_controllers(top: Section) -> "tuple[ControllerConfig, ...]":
    """The `controllers` list; names are made where missing, and must differ."""
    found: "list[ControllerConfig]" = []
    for number, section in enumerate(top.sections("controllers")):
        controller = parse_controller(section, number + 1)
        if any(controller.name == other.name for other in found):
            raise section.error("name", controller.name, "a name that no other controller has")
        check_quota_group(section, controller, found)
        found.append(controller)
    if not found:
        raise top.error("controllers", top.take("controllers"), "a list of at least one controller")
    return tuple(found)


def check_quota_group(section: Section, controller: ControllerConfig, others: "list[ControllerConfig]") -> None:
    """Members of a quota group count as one bucket, so they cannot have different limits."""
    for other in others:
        if controller.quota_group and controller.quota_group == other.quota_group and controller.limits != other.limits:
            raise ConfigError(
                "%s: %s: differ from those of %r, which is in the same quota_group %r; allowed: equal limits"
                % (section.source, section.where("limits"), other.name, other.quota_group)
            )


def parse_controller(section: Section, number: int) -> ControllerConfig:
    """One of the `controllers`; its `config` may stand in a file of its own."""
    kind = section.text("type", "openai", CONTROLLER_TYPES)
    account = section.section("config")
    if section.take("config_file"):
        if section.take("config"):
            raise section.error("config_file", section.data["config_file"], "config or config_file, not both")
        account = Section(read_file(section.file("config_file")), section.file("config_file"), "", section.env)
    controller = ControllerConfig(
        type=kind,
        name=section.text("name") or "%s-%d" % (kind, number),
        weight=section.whole("weight", 1, 1, 10000),
        models=section.strings("models"),
        model_map=section.pairs("model_map"),
        limits=parse_quota_limits(section.section("limits")),
        quota_group=section.text("quota_group"),
        timeouts=parse_timeouts(section.section("timeouts")),
        account=parse_account(account, kind),
    )
    section.close()
    return controller


def parse_quota_limits(section: Section) -> QuotaLimits:
    """`limits` of a controller or of a client key."""
    limits = QuotaLimits(
        rpm=section.whole("rpm", 0, 0, 10_000_000),
        tpm=section.whole("tpm", 0, 0, 10**12),
        concurrency=section.whole("concurrency", 0, 0, 1_000_000),
        burst_s=section.number("burst_s", 60, 0.1, 60),
    )
    section.close()
    return limits


def parse_timeouts(section: Section) -> Timeouts:
    """`timeouts` of a controller, seconds; 0 is none."""
    first_byte = section.number("first_byte", -1, -1, 86400)
    timeouts = Timeouts(
        connect=section.number("connect", 10, 0.001, 3600),
        first_byte=None if first_byte < 0 else first_byte,
        idle=section.number("idle", 300, 0, 86400),
        total=section.number("total", 0, 0, 86400),
    )
    section.close()
    return timeouts


def parse_account(section: Section, kind: str) -> AccountConfig:
    """The `config` of a controller, in place or in its own file."""
    if kind == "echo":
        account = AccountConfig(
            delay=section.number("delay", 0, 0, 600), first_delay=section.number("first_delay", 0, 0, 3600)
        )
    else:
        account = parse_openai_account(section)
    section.close()
    return account


def parse_openai_account(section: Section) -> AccountConfig:
    """The `config` of an openai controller. Only a base_url of the user's own may do without a key."""
    base_url = section.text("base_url") or "https://api.openai.com/v1"
    key = section.secret("api_key")
    if not key and base_url.startswith("https://api.openai.com"):
        raise section.error("api_key", "nothing", "an API key, $NAME or file:PATH")
    headers = section.section("headers")
    return AccountConfig(
        api_key=key,
        base_url=check_url(section, "base_url", base_url, ("http", "https")),
        organization=section.text("organization"),
        project=section.text("project"),
        proxy=parse_proxy(section),
        ca_file=check_ca_file(section),
        headers=tuple((check_field_name(headers, name), headers.secret(name)) for name in headers.data),
    )


def parse_proxy(section: Section) -> Secret:
    """The proxy's URL; a secret, because it may carry a password."""
    proxy = section.secret("proxy")
    if proxy:
        try:
            check_url(section, "proxy", proxy.reveal(), ("http",))
        except ConfigError:
            raise section.error("proxy", "something else", "http://[user:password@]host:port") from None
    return proxy


def check_ca_file(section: Section) -> str:
    """The path of a file with certificates that OpenSSL can read."""
    path = section.file("ca_file")
    if path:
        try:
            ssl.create_default_context(cafile=path)
        except (ssl.SSLError, OSError) as problem:
            raise section.error("ca_file", path, "a file of PEM certificates (%s)" % problem) from problem
    return path


def check_url(section: Section, key: str, url: str, schemes: "tuple[str, ...]") -> str:
    """`url` without its trailing slash, if it is one that requests can be sent to."""
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in schemes and bool(parts.hostname) and not parts.query and not parts.fragment
        good = good and (parts.port is None or parts.port > 0) and url.isascii() and " " not in url
        good = good and (key != "base_url" or "@" not in parts.netloc)
    except ValueError:
        good = False
    if not good:
        bare = re.sub(r"//[^/]*@|[?#].*", "…", url)  # what may hold a password is not repeated
        raise section.error(key, bare, " or ".join(name + "://host[:port][/path]" for name in schemes))
    return url.rstrip("/")


def check_field_name(headers: Section, name: str) -> str:
    """A configured header's name, if it is a token and does not touch the framing of messages."""
    if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or name.lower() in (
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "expect",
        "upgrade",
        "te",
        "trailer",
    ):
        raise headers.error(name, name, "a header name (RFC 9110, 5.1) that does not frame messages")
    return name


def parse_client_key(section: Section) -> ClientKey:
    """One of `client_keys`; the key is kept as its SHA-256 only, and may be given as `sha256:HEX`."""
    key = section.secret("key").reveal()
    hashed = re.fullmatch(r"sha256:([0-9a-fA-F]{64})", key)
    if not key or (key.startswith("sha256:") and not hashed):
        raise section.error("key", "nothing usable", "a key, $NAME, file:PATH or sha256:<64 hex digits>")
    client = ClientKey(
        name=section.text("name") or "key " + repr(Secret(key)),
        digest=bytes.fromhex(hashed.group(1)) if hashed else hashlib.sha256(key.encode()).digest(),
        models=section.strings("models"),
        limits=parse_quota_limits(section.section("limits")),
    )
    section.close()
    return client


def parse_server_limits(section: Section) -> ServerLimits:
    """The `limits` of the server: bytes, counts and seconds; a rate of 0 or a time of 0 is none."""
    default = ServerLimits()
    limits = ServerLimits(
        body_bytes=section.whole("body_bytes", default.body_bytes, 1, 2**40),
        header_bytes=section.whole("header_bytes", default.header_bytes, 1024, 2**24),
        header_count=section.whole("header_count", default.header_count, 10, 10000),
        connections=section.whole("connections", default.connections, 1, 1_000_000),
        connections_per_client=section.whole("connections_per_client", 0, 0, 1_000_000),
        header_timeout=section.number("header_timeout", default.header_timeout, 0.001, 3600),
        body_timeout=section.number("body_timeout", default.body_timeout, 0.001, 86400),
        body_rate=section.whole("body_rate", default.body_rate, 0, 2**30),
        idle_timeout=section.number("idle_timeout", default.idle_timeout, 0.001, 86400),
        write_timeout=section.number("write_timeout", default.write_timeout, 0.001, 86400),
    )
    section.close()
    return limits


def read_file(path: str) -> "Any":
    """The mapping that a JSON or TOML file holds. Raises ConfigError with line and column."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if path.endswith(".toml"):
            import tomllib  # 8 ms that only users of TOML pay

            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=unique_keys)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        raise ConfigError("%s: cannot be read: %s" % (path, problem)) from problem


def unique_keys(pairs: "list[tuple[str, Any]]") -> "dict[str, Any]":
    """A JSON object, refused when a key stands in it twice: only one of the two could count."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError("the key %r stands twice in one object" % next(n for n in names if names.count(n) > 1))
    return found


def find_file(config_file: str, config_path: str, env: "Mapping[str, str]") -> str:
    """The configuration file to read, first hit wins; "" when there is none. A file that is named must exist."""
    named = config_file or env.get(ENV + "CONFIG_FILE") or env.get("CONFIG_FILE") or ""
    if named:
        if not os.path.isfile(named):
            raise ConfigError("%s: no such file (named by the flag or the environment)" % named)
        return named
    folders = [one for one in (config_path, env.get(ENV + "CONFIG_PATH"), env.get("CONFIG_PATH")) if one]
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError("%s: no such folder (named by the flag or the environment)" % folder)
    for place in (*folders, *CONFIG_FOLDERS):
        for name in CONFIG_NAMES:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                return path
    return ""


def environment_overrides(env: "Mapping[str, str]") -> "dict[str, Any]":
    """What CHATGPT_APISERVER_<KEY> sets: top-level and pool scalars, `PORT=9000`, `POOL_TYPE=random`."""
    found: "dict[str, Any]" = {}
    for key in ("host", "port", "drain_delay", "drain_timeout"):
        value = env.get(ENV + key.upper(), "")
        if value and not value.startswith("tcp://"):  # as Kubernetes sets for a service of our name
            found[key] = as_number(value) if key != "host" else value
    pool = {field.name: env.get(ENV + "POOL_" + field.name.upper(), "") for field in dataclasses.fields(PoolConfig)}
    pool_set = {key: as_number(value) for key, value in pool.items() if value}
    return dict(found, pool=pool_set) if pool_set else found


def as_number(text: str) -> "Any":
    """The number that `text` is, else `text`."""
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,9}", text) else text


def environment_controller(env: "Mapping[str, str]") -> "dict[str, Any]":
    """The one controller of a user who has only set OPENAI_API_KEY."""
    base_url = env.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    account = {
        "api_key": env["OPENAI_API_KEY"],
        "base_url": base_url,
        "organization": env.get("OPENAI_ORG_ID", ""),
        "project": env.get("OPENAI_PROJECT_ID", ""),
        "proxy": environment_proxy(base_url, env),
    }
    return {"type": "openai", "name": "openai", "config": account}


def environment_proxy(url: str, env: "Mapping[str, str]") -> str:
    """The proxy that https_proxy, http_proxy and no_proxy name for `url`, by urllib's rules; "" for none."""
    import urllib.request as rules  # 15 ms that files do without

    parts = urllib.parse.urlsplit(url)
    proxies = lower_proxies(env)
    if rules.proxy_bypass_environment(parts.netloc, proxies):  # type: ignore[attr-defined]
        return ""
    found = proxies.get(parts.scheme) or proxies.get("all") or ""
    return "http://" + found if found and "://" not in found else found


def lower_proxies(env: "Mapping[str, str]") -> "dict[str, str]":
    """`*_proxy` of an environment that is not the process's own; lower case wins, as in urllib."""
    names = sorted(env, key=str.islower)
    return {name.lower()[:-6]: env[name] for name in names if name.lower().endswith("_proxy") and env[name]}


NOTHING_TO_RUN = """chatgpt_apiserver: nothing to run with. Three ways to start:
  a file:  python3 chatgpt_apiserver.py --config_file chatgpt-apiserver.json   (README.md shows one)
  a key:   OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py
  no key:  python3 chatgpt_apiserver.py --demo"""


def load_config(
    config_file: str,
    config_path: str,
    flags: "Mapping[str, Any]",
    env: "Mapping[str, str]",
    demo: bool = False,
) -> Config:
    """The configuration of this start: flags over environment over file over defaults. Raises ConfigError."""
    path = "" if demo else find_file(config_file, config_path, env)
    if path:
        data, source = read_file(path), path
    elif demo:
        data, source = {"controllers": demo_controllers()}, "--demo"
    elif env.get("OPENAI_API_KEY"):
        data, source = {"controllers": [environment_controller(env)]}, "OPENAI_API_KEY"
    else:
        raise ConfigError(NOTHING_TO_RUN)
    if not isinstance(data, dict):
        raise ConfigError("%s: top level: found %s, allowed: an object" % (source, shown(data)))
    return parse_config(overlay(data, environment_overrides(env), flags), source, env)


def overlay(data: "dict[str, Any]", overrides: "dict[str, Any]", flags: "Mapping[str, Any]") -> "dict[str, Any]":
    """`data` with what the environment and then the flags set."""
    merged = dict(data, **{key: value for key, value in overrides.items() if key != "pool"})
    if "pool" in overrides and isinstance(data.get("pool") or {}, dict):
        merged["pool"] = dict(data.get("pool") or {}, **overrides["pool"])
    return dict(merged, **{key: value for key, value in flags.items() if value is not None})


def demo_controllers() -> "list[dict[str, Any]]":
    """What --demo runs on: two echo controllers in turn, so that balancing can be seen."""
    models = ["echo", "gpt-*"]
    return [
        {"type": "echo", "name": name, "models": models, "config": {"delay": 0.03}} for name in ("echo-a", "echo-b")
    ]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def describe(config: Config) -> "list[str]":
    """The configuration in lines for --check and the start-up log; secrets as `sk-…last4`."""
    lines = ["configuration: %s" % config.source, "policy: %s" % config.pool.type]
    limits = [one.limits for one in config.controllers] + [one.limits for one in config.client_keys]
    if any(one != QuotaLimits() for one in limits):
        lines.append("NOTE: limits of controllers and client keys are read, but not enforced by this version")
    for one in config.controllers:
        account = one.account
        about = [one.type, "weight %d" % one.weight, "models " + (", ".join(one.models) or "all")]
        if one.type != "echo":
            about[1:1] = [account.base_url, "key %r" % account.api_key] + (["by a proxy"] if account.proxy else [])
        lines.append("controller %s: %s" % (one.name, "; ".join(about)))
    lines += ["client key %s: models %s" % (key.name, ", ".join(key.models) or "all") for key in config.client_keys]
    scheme = "https" if config.tls_cert else "http"
    host = "[%s]" % config.host if ":" in config.host else config.host
    return [*lines, "address: %s://%s:%d" % (scheme, host, config.port)]


# ==== 3. Observability ====
# One line per request, written in batches, and the logger for everything rarer. What clients control is escaped; a
# secret that finds its way into a message is struck out by the last filter before the stream.


class Redactor(logging.Filter):
    """Strikes configured secrets out of every log record; the last line of defence, not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: "tuple[str, ...]" = ()

    def watch(self, secrets: "Iterable[str]") -> None:
        """From now on strikes out these; short ones would strike out ordinary words."""
        self.secrets = tuple(sorted({value for value in secrets if len(value) >= 6}, key=len, reverse=True))

    def clean(self, text: str) -> str:
        """`text` without secrets."""
        for secret in self.secrets:
            if secret in text:
                text = text.replace(secret, repr(Secret(secret)))
        return text

    def scrub(self, body: bytes) -> bytes:
        """An upstream's error body without secrets: OpenAI's 401 echoes the first and last letters of the key."""
        for secret in self.secrets:
            key = secret.encode()
            if key in body:
                body = body.replace(key, b"***")
            masked = rb"%b[*.\xe2\x80\xa6]{3,}%b" % (re.escape(key[:3]), re.escape(key[-4:]))
            body = re.sub(masked.replace(b"{3,}", b"{3,200}"), b"***", body)
            body = re.sub(re.escape(key[:8]) + rb"\*{3,200}[\w\-]{0,8}", b"***", body)
        return body

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces the record's text; never drops it."""
        record.msg, record.args = self.clean(record.getMessage()), ()
        return True


class AccessRecord:
    """What the access log says of one request; times in seconds of the loop's clock."""

    __slots__ = (
        "bytes",
        "client",
        "controller",
        "first_at",
        "key",
        "method",
        "model",
        "outcomes",
        "path",
        "request_id",
        "since",
        "status",
        "waited_s",
    )

    def __init__(self, client: str, method: str, path: str, since: float) -> None:
        self.client, self.method, self.path, self.since = client, method, path, since
        self.model = self.controller = self.key = self.request_id = ""
        self.status = self.bytes = 0
        self.first_at = self.waited_s = 0.0
        self.outcomes: "list[tuple[str, str, float]]" = []  # controller, outcome, seconds; one per attempt


_UNSAFE = re.compile(r"[^!-\[\]-~]")


def plain(text: str) -> str:
    """`text` as one word of a log line: what could forge a field or a line is escaped."""
    return text if not _UNSAFE.search(text) else _UNSAFE.sub(lambda m: "\\x%02x" % ord(m.group()), text)


def text_line(record: AccessRecord, stamp: str, now: float) -> str:
    """The access line for people: time, client, request, model, status, controller, attempts, milliseconds, bytes."""
    first = (record.first_at or now) - record.since
    line = "%s %s %s %s %d model=%s controller=%s attempts=%d first_ms=%.1f ms=%.1f bytes=%d" % (
        stamp,
        record.client,
        record.method,
        plain(record.path),
        record.status,
        plain(record.model) or "-",
        record.controller or "-",
        len(record.outcomes),
        first * 1e3,
        (now - record.since) * 1e3,
        record.bytes,
    )
    if record.key:
        line += " key=" + plain(record.key)
    if record.waited_s:
        line += " wait_ms=%.0f" % (record.waited_s * 1e3)
    if len(record.outcomes) > 1 or (record.status >= 400 and record.outcomes):
        line += " tried=" + ",".join("%s:%s:%.0f" % (name, what, s * 1e3) for name, what, s in record.outcomes)
    return line + "\n"


def json_line(record: AccessRecord, stamp: str, now: float) -> str:
    """The access line for machines: the same fields as one JSON object."""
    found = {
        "time": stamp,
        "client": record.client,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "model": record.model or None,
        "controller": record.controller or None,
        "attempts": [
            {"controller": name, "outcome": what, "ms": round(s * 1e3, 1)} for name, what, s in record.outcomes
        ],
        "first_ms": round(((record.first_at or now) - record.since) * 1e3, 1),
        "ms": round((now - record.since) * 1e3, 1),
        "wait_ms": round(record.waited_s * 1e3),
        "bytes": record.bytes,
        "key": record.key or None,
        "request_id": record.request_id or None,
    }
    return json.dumps(found, separators=(",", ":")) + "\n"


class AccessLog:
    """Writes access lines, those of one loop turn together: a write per request costs as much as parsing it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, write: "Callable[[str], Any]", as_json: bool = False) -> None:
        self.loop, self.write = loop, write
        self.render = json_line if as_json else text_line
        self.lines: "list[str]" = []
        self.second, self.stamp = 0, ""

    def add(self, record: AccessRecord) -> None:
        """Takes one finished request."""
        if not self.lines:
            self.loop.call_soon(self.flush)
        second = int(time.time())
        if second != self.second:
            self.second, self.stamp = second, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
        self.lines.append(self.render(record, self.stamp, self.loop.time()))

    def flush(self) -> None:
        """Writes what has gathered; a log that cannot be written must not stop the answers."""
        lines, self.lines = self.lines, []
        if not lines:
            return
        try:
            self.write("".join(lines))
        except OSError as problem:
            if problem.errno not in (errno.EPIPE, errno.ENOSPC, errno.EAGAIN):
                raise


redactor = Redactor()


def set_up_logging(config: Config) -> None:
    """Sends log records to stderr, cleaned of every secret that `config` holds."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    redactor.watch(secrets_of(config))
    handler.addFilter(redactor)
    log.handlers[:] = [handler]
    log.setLevel(config.log_level.upper())
    log.propagate = False


def secrets_of(config: Config) -> "Iterator[str]":
    """Every secret of a configuration, and the forms in which it travels."""
    for controller in config.controllers:
        account = controller.account
        yield account.api_key.reveal()
        yield from (value.reveal() for _, value in account.headers)
        parts = urllib.parse.urlsplit(account.proxy.reveal())
        if parts.password:
            yield urllib.parse.unquote(parts.password)
            yield parts.password
            yield parts.netloc.rpartition("@")[0]


# ==== 4. HTTP/1.1 on the wire ====
# Bytes to values and back, strict (RFC 9110, RFC 9112), for both sides; no I/O, no clock. Heads are parsed whole by one
# regular expression; bodies by push decoders that may be fed at any cut. Nothing that was not parsed is passed on.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Origin-form, absolute-form, asterisk-form; authority-form belongs to CONNECT, which nobody may do here.
_TARGET = rb'/[!-~]*|\*|(?i:https?)://[!"$-.0->@-~][!"$-~]*'
_REQUEST_LINE = re.compile(rb"(%b) (%b) HTTP/([0-9])\.([0-9])\r\n" % (_TOKEN, _TARGET))
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
# `^` holds each match to one line, and a value cannot span lines, so as many matches as lines means that all are good.
# Possessive, because white space fits both parts: a field of blanks with a bad end took quadratic time to refuse.
_FIELD = re.compile(rb"^(%b):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)\r\n" % _TOKEN, re.MULTILINE)
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_ABSOLUTE_TARGET = re.compile(r"(?i:https?)://([^/?#]+)([^#]*)\Z")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-~%!$&'()*+,;=]*)(?::[0-9]{0,5})?\Z")

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # RFC 9110, 7.6.1
REQUEST_DROPPED = HOP_BY_HOP | frozenset(
    (
        b"authorization",
        b"api-key",
        b"x-api-key",
        b"openai-organization",
        b"openai-project",
        b"cookie",
        b"host",
        b"accept-encoding",
        b"expect",
        b"forwarded",
        b"content-length",
        b"x-apiserver-max-wait",
        b"http2-settings",
    )
)
REQUEST_DROPPED_PREFIXES = (b"proxy-", b"x-forwarded-")
REPLY_DROPPED = HOP_BY_HOP | frozenset((b"set-cookie", b"set-cookie2", b"content-length", b"alt-svc"))
# On an answer that took failover these would speak of one account of many.
REPLY_DROPPED_RETRIED = REPLY_DROPPED | frozenset((b"retry-after", b"retry-after-ms", b"x-should-retry"))

Fields = list[tuple[bytes, bytes]]


class RequestHead:
    """A request's start line and fields. `index`: lower-case name to value, repeated ones joined by a comma."""

    __slots__ = ("fields", "index", "method", "minor", "target")

    def __init__(self, method: str, target: str, minor: int, fields: Fields, index: "dict[bytes, bytes]") -> None:
        self.method, self.target, self.minor, self.fields, self.index = method, target, minor, fields, index

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on this connection (RFC 9112, 9.3)."""
        found = self.index.get(b"connection")
        if found is None:
            return self.minor >= 1
        options = tokens(found)
        return b"close" not in options and (self.minor >= 1 or b"keep-alive" in options)


class ResponseHead:
    """A reply's status line and fields, as `RequestHead`."""

    __slots__ = ("fields", "index", "minor", "status")

    def __init__(self, status: int, minor: int, fields: Fields, index: "dict[bytes, bytes]") -> None:
        self.status, self.minor, self.fields, self.index = status, minor, fields, index


def tokens(value: bytes) -> "set[bytes]":
    """The lower-case members of a comma-separated list."""
    return {member.strip(b" \t").lower() for member in value.split(b",")}


def joined_index(fields: Fields) -> "dict[bytes, bytes]":
    """Lower-case name to value, the values of repeated names joined by a comma (RFC 9110, 5.3)."""
    index: "dict[bytes, bytes]" = {}
    for name, value in fields:
        key = name.lower()
        index[key] = index[key] + b"," + value if key in index else value
    return index


def parse_fields(block: bytes, limit: int) -> "tuple[Fields, dict[bytes, bytes]]":
    """The field lines of a head, each ended by CRLF. Raises ValueError with what is wrong."""
    fields: Fields = _FIELD.findall(block)
    if len(fields) != block.count(b"\n"):
        raise ValueError("a header line is malformed")
    if len(fields) > limit:
        raise ValueError("more than %d header fields" % limit)
    index = {name.lower(): value for name, value in fields}
    return fields, index if len(index) == len(fields) else joined_index(fields)


def parse_request_head(data: bytes, count_limit: int = FIELD_COUNT) -> RequestHead:
    """A request's head, from its first byte to and with the empty line. Raises BadMessage."""
    line = _REQUEST_LINE.match(data)
    if line is None:
        raise BadMessage(400, "The request line is malformed: METHOD SP /PATH SP HTTP/1.1 CRLF is needed.")
    if line.group(3) != b"1":
        raise BadMessage(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    try:
        fields, index = parse_fields(data[line.end() : -2], count_limit)
    except ValueError as problem:
        status = 431 if "more than" in str(problem) else 400
        raise BadMessage(status, "The request head is refused: %s." % problem) from None
    minor = 1 if line.group(4) != b"0" else 0
    check_host(index, minor)
    return RequestHead(line.group(1).decode(), line.group(2).decode(), minor, fields, index)


def check_host(index: "Mapping[bytes, bytes]", minor: int) -> None:
    """Exactly one Host on HTTP/1.1, and one that is a host (RFC 9112, 3.2)."""
    host = index.get(b"host")
    if host is None:
        if minor >= 1:
            raise BadMessage(400, "The Host header is missing (RFC 9112, 3.2).")
    elif not _HOST.match(host.rstrip(b" \t")) or b"," in host:
        raise BadMessage(400, "The Host header is not one host name with an optional port.")


def parse_response_head(data: bytes) -> ResponseHead:
    """A reply's head, from its first byte to and with the empty line. Raises BadReply."""
    line = _STATUS_LINE.match(data)
    if line is None:
        raise BadReply("the upstream's status line is malformed")
    try:
        fields, index = parse_fields(data[line.end() : -2], 10 * FIELD_COUNT)
    except ValueError as problem:
        raise BadReply("the upstream's reply head is malformed: %s" % problem) from None
    return ResponseHead(int(line.group(2)), int(line.group(1)), fields, index)


def check_partial_head(data: bytes) -> None:
    """Refuses a head that can no longer become a good one, so that nobody waits for its end. Raises BadMessage."""
    if _BARE_LINE_END.search(data):
        raise BadMessage(400, "A line of the request head does not end with CRLF, or holds a control character.")
    if b"\n" not in data:
        if len(data) > START_LINE_BYTES + 1:  # its CR may have come without the LF
            raise BadMessage(414, "The request line is longer than %d bytes." % START_LINE_BYTES)
        if data and not re.match(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?: |\Z)", data):
            raise BadMessage(400, "This is no HTTP request.")
    elif not _REQUEST_LINE.match(data):
        raise BadMessage(400, "This is no HTTP request.")


def content_length(value: bytes) -> int:
    """The number of a Content-Length; repeated equal values count once (RFC 9112, 6.3). Raises ValueError."""
    if value.isdigit() and len(value) < 19:
        return int(value)
    members = [member.strip(b" \t") for member in value.split(b",")]
    if not all(_DIGITS.match(member) for member in members) or len({int(member) for member in members}) != 1:
        raise ValueError("Content-Length is not one plain number")
    return int(members[0])


class LengthDecoder:
    """A body of known length. `rest`: what was fed beyond its end."""

    __slots__ = ("done", "left", "rest")

    def __init__(self, length: int) -> None:
        self.left, self.done, self.rest = length, length == 0, b""

    def feed(self, data: bytes) -> bytes:
        """The part of `data` that belongs to the body."""
        if len(data) < self.left:
            self.left -= len(data)
            return data
        body, self.rest, self.left, self.done = data[: self.left], data[self.left :], 0, True
        return body

    def feed_eof(self) -> bool:
        """Whether the body is whole when the connection ends here."""
        return self.done


class EofDecoder:
    """A body that ends with its connection."""

    __slots__ = ("done", "rest")

    def __init__(self) -> None:
        self.done, self.rest = False, b""

    def feed(self, data: bytes) -> bytes:
        """All of it."""
        return data

    def feed_eof(self) -> bool:
        """Always whole: nothing tells otherwise."""
        self.done = True
        return True


CHUNK_SIZES: "dict[bytes, int]" = {}  # chunk-size lines seen before; at most 4096, of at most 7 digits


class ChunkedDecoder:
    """A chunked body of at most `limit` bytes (RFC 9112, 7.1); extensions are dropped, trailers too. `rest` as above.

    Raises ValueError for what the grammar or a bound forbids, OverflowError beyond `limit`.
    """

    __slots__ = ("done", "left", "limit", "pending", "rest", "total", "trailing")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = 0  # bytes still to come of the open chunk; -1: its CRLF
        self.total = self.trailing = 0
        self.pending = b""  # the beginning of a line that is not whole yet
        self.rest, self.done = b"", False

    def feed(self, data: bytes) -> bytes:
        """The payload that `data` brings, which may be empty."""
        data, self.pending = self.pending + data if self.pending else data, b""
        out: "list[bytes]" = []
        at, size = (0, len(data)) if self.left or self.trailing else (self._whole_chunks(data, out), len(data))
        while at < size and not self.done:
            if self.left > 0:
                piece = data[at : at + self.left]
                out.append(piece)
                at += len(piece)
                self.left = self.left - len(piece) or -1
            elif self.left:
                if size - at < 2 and data[at] == 13:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ValueError("a chunk is longer than its size says")
                at, self.left = at + 2, 0
            else:
                end = self._line(data, at)
                if end < 0:
                    break
                at = end
        if self.done:
            self.rest = data[at:]
        else:
            self.pending = data[at:]
        return out[0] if len(out) == 1 else b"".join(out)

    def _whole_chunks(self, data: bytes, out: "list[bytes]") -> int:
        """Takes the plain chunks that stand whole at the beginning; where they end. Half an unpaced stream's cost."""
        at, total = 0, self.total
        while True:
            end = data.find(b"\r\n", at, at + 10)
            line = data[at:end]
            length = CHUNK_SIZES.get(line) or self._plain_size(line)
            stop = end + 2 + length
            if end < 0 or not length or data[stop : stop + 2] != b"\r\n" or total + length > self.limit:
                self.total = total
                return at
            out.append(data[end + 2 : stop])
            total += length
            at = stop + 2

    def _plain_size(self, line: bytes) -> int:
        """The size on a plain chunk-size line, remembered; 0 for what the slow path must judge."""
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,7}", line):
            return 0
        if len(CHUNK_SIZES) < 4096:
            CHUNK_SIZES[line] = int(line, 16)
        return int(line, 16)

    def _line(self, data: bytes, at: int) -> int:
        """Reads the chunk-size or trailer line at `at`; its end, or -1 when it is not whole."""
        end = data.find(b"\n", at, at + (TRAILER_BYTES if self.trailing else CHUNK_LINE_BYTES))
        if end < 0:
            self._check_unfinished(data, at)
            return -1
        if self.trailing:
            self._trailer(data[at : end + 1])
            return end + 1
        found = _CHUNK_LINE.match(data, at, end + 1)
        if found is None:
            raise ValueError("a chunk-size line is malformed")
        self.left = int(found.group(1), 16)
        self.total += self.left
        if self.total > self.limit:
            raise OverflowError("the body is larger than %d bytes" % self.limit)
        if not self.left:
            self.trailing = 1
        return end + 1

    def _check_unfinished(self, data: bytes, at: int) -> None:
        """Refuses a line that is too long or can no longer become a good one."""
        rest = data[at:]
        if len(rest) >= (TRAILER_BYTES if self.trailing else CHUNK_LINE_BYTES):
            raise ValueError("a chunk-size or trailer line is too long")
        if not self.trailing and not re.match(rb"[0-9A-Fa-f]{1,15}(?:[ \t]*(?:;[^\r\n\x00]*)?)?\r?\Z", rest):
            raise ValueError("a chunk-size line is malformed")

    def _trailer(self, line: bytes) -> None:
        """One line of the trailer section; the empty one ends the body."""
        self.trailing += len(line)
        if line == b"\r\n":
            self.done = True
        elif self.trailing > TRAILER_BYTES or not _FIELD.fullmatch(line):
            raise ValueError("the trailer section is malformed or too long")

    def feed_eof(self) -> bool:
        """Whether the body is whole when the connection ends here."""
        return self.done


Decoder = LengthDecoder | ChunkedDecoder | EofDecoder


def request_body_decoder(head: RequestHead, limit: int) -> "LengthDecoder | ChunkedDecoder | None":
    """What decodes the request's body, None where there is none. Raises BadMessage (RFC 9112, 6.1 and 6.3)."""
    coding = head.index.get(b"transfer-encoding")
    length = head.index.get(b"content-length")
    if coding is not None:
        if length is not None or head.minor == 0:
            raise BadMessage(400, "Transfer-Encoding cannot stand with Content-Length, nor on HTTP/1.0.")
        codings = [member.strip(b" \t").lower() for member in coding.split(b",")]
        if codings != [b"chunked"]:  # 400 where the end of the body cannot be known, 501 where a coding is not spoken
            status = 501 if codings[-1] == b"chunked" and codings.count(b"chunked") == 1 else 400
            raise BadMessage(status, "Only the transfer coding chunked is understood, alone and once.")
        return ChunkedDecoder(limit)
    if length is None:
        return None
    try:
        size = content_length(length)
    except ValueError as problem:
        raise BadMessage(400, "%s." % problem) from None
    if size > limit:
        raise BadMessage(413, "The body is %d bytes; at most %d are taken." % (size, limit), "request_too_large")
    return LengthDecoder(size) if size else None


def reply_body_decoder(head: ResponseHead, method: str) -> "LengthDecoder | ChunkedDecoder | EofDecoder":
    """What decodes a reply's body (RFC 9112, 6.3). Raises BadReply where the framing is ambiguous."""
    coding = head.index.get(b"transfer-encoding")
    length = head.index.get(b"content-length")
    if coding is not None and length is not None:
        raise BadReply("the upstream's reply has both Transfer-Encoding and Content-Length")
    if method == "HEAD" or head.status in (204, 304):
        return LengthDecoder(0)
    if coding is not None:
        if coding.strip(b" \t").lower() != b"chunked" or head.minor == 0:
            raise BadReply("the upstream's transfer coding is not plain chunked")
        return ChunkedDecoder(1 << 62)
    if length is None:
        return EofDecoder()
    try:
        return LengthDecoder(content_length(length))
    except ValueError as problem:
        raise BadReply("the upstream's reply is malformed: %s" % problem) from None


def chunk(payload: bytes) -> bytes:
    """`payload` as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@functools.lru_cache(maxsize=1024)
def goes_upstream(name: bytes) -> bool:
    """Whether a client's field of this name may be passed on; names repeat, so the answer is remembered."""
    key = name.lower()
    return key not in REQUEST_DROPPED and not key.startswith(REQUEST_DROPPED_PREFIXES)


@functools.lru_cache(maxsize=1024)
def goes_to_client(name: bytes, retried: bool) -> bool:
    """Whether an upstream's field of this name may be passed on; `retried`: it took more than one attempt."""
    return name.lower() not in (REPLY_DROPPED_RETRIED if retried else REPLY_DROPPED)


def without_connection(fields: Fields, index: "Mapping[bytes, bytes]") -> Fields:
    """`fields` without those that Connection names (RFC 9110, 7.6.1)."""
    connection = index.get(b"connection")
    if connection is None or connection.lower() in (b"keep-alive", b"close"):
        return fields
    named = tokens(connection)
    return [field for field in fields if field[0].lower() not in named]


def forwarded_fields(head: RequestHead) -> Fields:
    """The client's fields that an upstream gets to see."""
    return [field for field in without_connection(head.fields, head.index) if goes_upstream(field[0])]


def returned_fields(head: ResponseHead, retried: bool) -> Fields:
    """The upstream's fields that a client gets to see."""
    return [field for field in without_connection(head.fields, head.index) if goes_to_client(field[0], retried)]


def render_fields(fields: Fields) -> bytes:
    """Field lines, each with its CRLF."""
    return b"".join([name + b": " + value + b"\r\n" for name, value in fields])


@functools.lru_cache(maxsize=64)
def status_line(status: int) -> bytes:
    """The first line of an answer."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


def split_target(target: str) -> "tuple[str, str, str]":
    """Authority (of absolute-form), percent-decoded path and raw query of a request target. Raises BadMessage."""
    authority = ""
    if not target.startswith("/"):
        absolute = _ABSOLUTE_TARGET.match(target)
        if absolute is None:
            if target == "*":
                return "", "*", ""
            raise BadMessage(400, "The request target is neither a path nor an absolute URL.")
        authority, target = absolute.group(1), absolute.group(2)
        target = target if target.startswith("/") else "/" + target
    path, _, query = target.partition("?")
    if "%" in path:
        path = urllib.parse.unquote(path, errors="replace")
        if any(ord(char) < 33 or ord(char) == 127 for char in path):
            raise BadMessage(400, "The request target hides a control character.")
    return authority, path, query


# ==== 5. Server-sent events ====
# Finds events in a byte stream cut anywhere, looks into them, and never rewrites them. Only bytes are split: U+2028 and
# friends are no line ends here. https://html.spec.whatwg.org/multipage/server-sent-events.html

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_LINE_END = re.compile(rb"\r\n|\n|\r")
DONE_EVENT = b"[DONE]"


class EventSplitter:
    """Hands out the whole events of what it is fed; `pending` is the beginning of the next one."""

    __slots__ = ("pending",)

    def __init__(self) -> None:
        self.pending = b""

    def feed(self, data: bytes) -> "Iterator[bytes]":
        """The events that `data` completes, each with the blank line that ends it; found as they are asked for."""
        data = self.pending + data if self.pending else data
        start = 0
        for end in _EVENT_END.finditer(data):
            yield data[start : end.end()]
            start = end.end()
        self.pending = data[start:]


def event_fields(event: bytes) -> "tuple[bytes, bytes]":
    """An event's type (`event:`) and data; several data lines are joined, comments skipped."""
    kind, data = b"", []
    for line in _LINE_END.split(event.removeprefix(b"\xef\xbb\xbf")):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
    return kind, b"\n".join(data)


class EventKind(enum.Enum):
    """What an event means for the decision to commit to an upstream."""

    PREFACE = "preface"  # comments, Azure's chunk without choices, response.created
    REAL = "real"
    ERROR = "error"


_PREFACE_TYPES = ("response.created", "response.queued", "response.in_progress")


def judge_event(event: bytes) -> EventKind:
    """Whether an event is a real answer's first, an error, or what may come before either."""
    kind, data = event_fields(event)
    data = data.strip()
    if not data or data[:1] not in b"{[":
        return EventKind.REAL if data else EventKind.PREFACE
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return EventKind.REAL  # not ours to repair; the client sees what was sent
    if not isinstance(found, dict):
        return EventKind.REAL
    if found.get("error") or kind == b"error" or found.get("type") in ("error", "response.failed"):
        return EventKind.ERROR
    if found.get("type") in _PREFACE_TYPES or found.get("choices") == []:
        return EventKind.PREFACE
    return EventKind.REAL


def first_kind(events: "Iterable[bytes]") -> EventKind:
    """The kind of the first event that is more than a preface."""
    for event in events:
        kind = judge_event(event)
        if kind is not EventKind.PREFACE:
            return kind
    return EventKind.PREFACE


def error_event(message: str, code: str) -> bytes:
    """The event that tells a client of a cut. go-openai needs `error` as the first key and no space before it."""
    return b"data: " + compact_json(error_object(message, "server_error", code)) + b"\n\n"


# ==== 6. Timed streams ====
# asyncio's streams with three things added: a read that hands over whatever has arrived without copying it, a timer
# that is moved by assignment (a `wait_for` per read costs more than the read), and a hook that sees the peer leave.

IDLE_CHECK_S = 30.0  # a timer is never armed further ahead than this, so moving it later or back is an assignment


class Deadline:
    """One timer of one connection: `set` moves it, `expired` is called once when it has passed."""

    __slots__ = ("at", "expired", "handle", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: "Callable[[], None]") -> None:
        self.loop, self.expired = loop, expired
        self.at = math.inf
        self.handle: "asyncio.TimerHandle | None" = None

    def set(self, at: float) -> None:
        """Moves the deadline to `at` (loop time); infinity switches it off."""
        self.at = at
        if self.handle is None:
            if at != math.inf:
                self._arm()
        elif at < self.handle.when():
            self.handle.cancel()
            self._arm()

    def cancel(self) -> None:
        """Ends the timer for good."""
        self.at = math.inf
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None

    def _arm(self) -> None:
        self.handle = self.loop.call_at(min(self.at, self.loop.time() + IDLE_CHECK_S), self._fire)

    def _fire(self) -> None:
        self.handle = None
        if self.at == math.inf:
            return
        if self.at <= self.loop.time():
            self.at = math.inf
            self.expired()
        else:
            self._arm()


class WireReader(asyncio.StreamReader):
    """A StreamReader that hands over what has arrived, as it arrived, and tells `on_end` when the peer leaves.

    `on_end(error)` is called at the FIN (None) and at a reset or lost connection (the exception).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=READ_BYTES, loop=loop)
        self.loop = loop
        self.data = b""
        self.ended = False
        self.lost: "BaseException | None" = None
        self.on_end: "Callable[[BaseException | None], None] | None" = None
        self.link: "asyncio.ReadTransport | None" = None
        self.held = False
        self.wake: "asyncio.Future[None] | None" = None

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        """Called by the protocol, and again when TLS takes a connection over."""
        assert isinstance(transport, asyncio.ReadTransport)
        self.link = transport

    def exception(self) -> "Exception | None":
        """Why the connection was lost, for `StreamWriter.drain`."""
        return self.lost if isinstance(self.lost, Exception) else None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # only bytes ever come
        """Called by the protocol; above the limit the peer is stopped."""
        self.data = self.data + data if self.data else data
        if self.wake is not None:
            self._wake_up()
        elif len(self.data) >= READ_BYTES and not self.held and self.link is not None:
            self.held = True
            self.link.pause_reading()

    def feed_eof(self) -> None:
        """Called by the protocol at the FIN and at a close."""
        if not self.ended:
            self.ended = True
            self._end(None)

    def set_exception(self, exc: BaseException) -> None:
        """Called by the protocol when the connection is lost."""
        if self.lost is None:
            self.ended, self.lost = True, exc
            self._end(exc)

    def at_eof(self) -> bool:
        """Whether nothing more will come."""
        return self.ended and not self.data

    def interrupt(self, error: Exception) -> None:
        """Makes the read that waits now raise `error`; nothing that has arrived is lost."""
        wake, self.wake = self.wake, None
        if wake is not None and not wake.done():
            wake.set_exception(error)

    async def read_some(self) -> bytes:
        """All that has arrived, at least a byte; b"" at the end. Raises what broke the connection."""
        while not self.data:
            if self.ended:
                if self.lost is not None:
                    raise ConnectionResetError(str(self.lost)) from self.lost
                return b""
            self.wake = self.loop.create_future()
            try:
                await self.wake
            finally:
                self.wake = None
        data, self.data = self.data, b""
        if self.held and self.link is not None:
            self.held = False
            if not self.link.is_closing():
                self.link.resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """Puts back what belongs to the next reader."""
        self.data = data + self.data

    def _wake_up(self) -> None:
        wake, self.wake = self.wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _end(self, error: "BaseException | None") -> None:
        self._wake_up()
        if self.on_end is not None:
            self.on_end(error)


def tune(transport: asyncio.BaseTransport) -> None:
    """Sets the bounds of a connection: what one read may bring and what may wait to be sent."""
    if hasattr(transport, "max_size"):
        transport.max_size = READ_BYTES  # 256 kB as it comes: a large allocation for each read
    assert isinstance(transport, asyncio.WriteTransport)
    transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)


def shrink_tls_buffers() -> None:
    """Makes asyncio's TLS connections small: their read buffer is a class attribute, there is no parameter for it."""
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


# ==== 7. Upstream connections ====
# Dialling (TCP, proxy, TLS), one exchange at a time on a connection, and a pool of idle ones per origin. Bookkeeping is
# synchronous; a connection is given back at most once, and only when its last reply was read to its end.


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where connections go: scheme, host, port, and by which proxy and which certificates.

    Made by `intern_origin` only, one for each place, so that they are compared and hashed by identity: hashing the five
    fields at every request took 4 us.
    """

    scheme: str
    host: str
    port: int
    proxy: Secret = NO_SECRET
    ca_file: str = ""

    @property
    def authority(self) -> str:
        """`host[:port]` as Host and CONNECT spell it."""
        host = "[%s]" % self.host if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else "%s:%d" % (host, self.port)


@functools.lru_cache(maxsize=1024)
def intern_origin(scheme: str, host: str, port: int, proxy: Secret, ca_file: str) -> Origin:
    """The one Origin of these values."""
    return Origin(scheme, host, port, proxy, ca_file)


def parse_origin(base_url: str, proxy: Secret, ca_file: str) -> "tuple[Origin, str]":
    """The origin and the path prefix of a base URL that section 2 has checked."""
    parts = urllib.parse.urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return intern_origin(parts.scheme, parts.hostname or "", port, proxy, ca_file), parts.path


def proxy_authorization(proxy: Secret) -> bytes:
    """The Proxy-Authorization line for a proxy URL with user and password, else nothing (RFC 7617)."""
    parts = urllib.parse.urlsplit(proxy.reveal())
    if parts.username is None:
        return b""
    pair = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
    return b"Proxy-Authorization: Basic " + base64.b64encode(pair.encode()) + b"\r\n"


@functools.lru_cache(maxsize=64)
def tls_context(ca_file: str) -> ssl.SSLContext:
    """Verifying client context; the system's certificates (or SSL_CERT_FILE's) unless a file is named."""
    context = ssl.create_default_context(cafile=ca_file or None)
    context.set_alpn_protocols(["http/1.1"])
    return context


Link = tuple[WireReader, asyncio.StreamWriter]
Dial = Callable[[Origin], Awaitable[Link]]


async def open_link(host: str, port: int, tls: "ssl.SSLContext | None" = None, name: "str | None" = None) -> Link:
    """A TCP or TLS connection as a pair of streams; IPv6 and IPv4 race as RFC 8305 says."""
    loop = asyncio.get_running_loop()
    reader = WireReader(loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(
        lambda: protocol, host, port, ssl=tls, server_hostname=name, happy_eyeballs_delay=0.25
    )
    tune(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def dial(origin: Origin) -> Link:
    """A connection on which requests to `origin` can be written, by its proxy where it has one. Raises OSError."""
    tls = tls_context(origin.ca_file) if origin.scheme == "https" else None
    if not origin.proxy:
        return await open_link(origin.host, origin.port, tls, origin.host if tls else None)
    proxy = urllib.parse.urlsplit(origin.proxy.reveal())
    link = await open_link(proxy.hostname or "", proxy.port or 80)
    if tls is None:
        return link
    try:
        await open_tunnel(link, origin)
        await link[1].start_tls(tls, server_hostname=origin.host)
        link[0].set_transport(link[1].transport)
        tune(link[1].transport)
    except BaseException:
        link[1].transport.abort()
        raise
    return link


async def open_tunnel(link: Link, origin: Origin) -> None:
    """Asks the proxy for a tunnel (RFC 9110, 9.3.6)."""
    host = "[%s]" % origin.host if ":" in origin.host else origin.host
    target = b"%b:%d" % (host.encode("idna" if not host.isascii() else "ascii"), origin.port)
    link[1].write(
        b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, target, proxy_authorization(origin.proxy))
    )
    head, rest = await read_reply_head(link[0], b"")
    if not 200 <= head.status < 300:
        raise ConnectFailed("the proxy refused the tunnel with status %d" % head.status)
    if rest:
        raise ConnectFailed("the proxy sent bytes before the tunnel's own")


async def read_reply_head(reader: WireReader, data: bytes) -> "tuple[ResponseHead, bytes]":
    """The final head of a reply, past the interim ones, and what came after it. `data`: what was read already."""
    for _ in range(INFORMATIONAL_MAX):
        end = data.find(b"\r\n\r\n")
        while end < 0:
            check_reply_beginning(data)
            more = await reader.read_some()
            if not more:
                raise UpstreamClosed("the upstream closed the connection before its reply", early=not data)
            start = max(0, len(data) - 3)
            data = data + more if data else more
            end = data.find(b"\r\n\r\n", start)
        if end > UPSTREAM_HEAD_BYTES:
            raise BadReply("the upstream's reply head is longer than %d bytes" % UPSTREAM_HEAD_BYTES)
        head = parse_response_head(data[: end + 4])
        data = data[end + 4 :]
        if head.status >= 200:
            return head, data
        if head.status == 101:
            break
    raise BadReply("the upstream sent more interim replies than anyone needs, or switched protocols")


def check_reply_beginning(data: bytes) -> None:
    """Refuses what cannot become a reply head, before waiting for more of it."""
    if len(data) > UPSTREAM_HEAD_BYTES:
        raise BadReply("the upstream's reply head is longer than %d bytes" % UPSTREAM_HEAD_BYTES)
    if data[:7] != b"HTTP/1."[: len(data)]:
        raise BadReply("the upstream does not speak HTTP/1.1")


class Exchange(Protocol):
    """One request and its reply, on a network connection or made up by an echo controller.

    `head` is there after `start`. `read` gives decoded body bytes, b"" at the whole end; it raises UpstreamError.
    `finish` after the last byte, `abort` at any other time; each is harmless when repeated.
    """

    head: ResponseHead

    async def start(self) -> None:
        """Sends the request and reads the reply's head."""

    async def read(self) -> bytes:
        """Some bytes of the body."""

    def interrupt(self, error: Exception) -> None:
        """Makes the waiting `start` or `read` raise `error`; it may be called again afterwards."""

    def finish(self) -> None:
        """Gives everything back."""

    def abort(self) -> None:
        """Closes the upstream connection now."""


class UpstreamConnection:
    """A connection to an origin; `used` counts its exchanges."""

    __slots__ = (
        "deadline",
        "early",
        "idle",
        "loop",
        "origin",
        "pool",
        "reader",
        "used",
        "waits_for",
        "writer",
        "written_at",
    )

    def __init__(self, origin: Origin, link: Link, pool: "ConnectionPool") -> None:
        self.origin, self.pool = origin, pool
        self.reader, self.writer = link
        self.loop = self.reader.loop
        self.deadline = Deadline(self.loop, self._expired)
        self.used = 0
        self.idle = False
        self.early = True  # no byte of the current reply has come
        self.waits_for = ""
        self.written_at = 0.0
        self.reader.on_end = self._ended

    def __repr__(self) -> str:
        state = "closed" if self.writer.is_closing() else "idle" if self.idle else "active"
        return "<UpstreamConnection %s %s used=%d>" % (self.origin.authority, state, self.used)

    @property
    def usable(self) -> bool:
        """Whether a new exchange may start: open, and nothing has come unasked (RFC 9112, 9.5 and 11.2)."""
        return not (self.reader.ended or self.reader.data or self.writer.is_closing())

    def expect(self, what: str, within_s: float) -> None:
        """Starts the clock for what comes next; 0 seconds is no limit."""
        self.waits_for = what
        self.deadline.set(self.loop.time() + within_s if within_s else math.inf)

    def close(self) -> None:
        """Closes without waiting for anything."""
        self.deadline.cancel()
        self.reader.on_end = None
        self.writer.transport.abort()

    def _expired(self) -> None:
        if self.idle:
            self.pool.drop(self)
        else:
            self.reader.interrupt(UpstreamTimeout(self.waits_for, early=self.early))

    def _ended(self, error: "BaseException | None") -> None:
        if self.idle:
            self.pool.drop(self)


class ConnectionPool:
    """Idle connections per origin, the most recently used first, so that the surplus grows old and closes."""

    def __init__(self, dial: Dial = dial) -> None:
        self.dial = dial
        self.idle: "dict[Origin, list[UpstreamConnection]]" = {}
        self.active: "set[UpstreamConnection]" = set()
        self.closed = False

    def __repr__(self) -> str:
        return "<ConnectionPool idle=%d active=%d>" % (sum(map(len, self.idle.values())), len(self.active))

    def take(self, origin: Origin) -> "UpstreamConnection | None":
        """An idle connection that is still good, if there is one."""
        idle = self.idle.get(origin)
        while idle:
            connection = idle.pop()
            connection.idle = False
            if connection.usable:
                self.active.add(connection)
                return connection
            connection.close()
        return None

    async def connect(self, origin: Origin, within_s: float) -> UpstreamConnection:
        """A fresh connection. Raises ConnectFailed, within `within_s` seconds."""
        try:
            async with asyncio.timeout(within_s or None):
                link = await self.dial(origin)
        except TimeoutError:
            raise ConnectFailed("no connection to %s within %g s" % (origin.authority, within_s)) from None
        except (OSError, UnicodeError, UpstreamError) as problem:
            raise ConnectFailed("no connection to %s: %s" % (origin.authority, problem)) from problem
        connection = UpstreamConnection(origin, link, self)
        self.active.add(connection)
        return connection

    def give_back(self, connection: UpstreamConnection, reusable: bool) -> None:
        """Takes a connection after its exchange; one that cannot serve another is closed."""
        if connection not in self.active:
            return
        self.active.discard(connection)
        idle = self.idle.setdefault(connection.origin, [])
        if not reusable or self.closed or not connection.usable or len(idle) >= IDLE_UPSTREAM_COUNT:
            connection.close()
            return
        connection.idle = True
        connection.deadline.set(connection.loop.time() + IDLE_UPSTREAM_S)
        idle.append(connection)

    def drop(self, connection: UpstreamConnection) -> None:
        """Closes an idle connection that has expired or ended."""
        idle = self.idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
        connection.idle = False
        connection.close()

    def close(self) -> None:
        """Closes the idle connections; the active ones when they are given back."""
        self.closed = True
        for connections in self.idle.values():
            for connection in connections:
                connection.close()
        self.idle.clear()


class NetworkExchange:
    """An exchange on a connection of the pool. See `Exchange`."""

    __slots__ = ("connection", "data", "decoder", "head", "message", "on_sent", "origin", "pool", "retried", "timeouts")

    def __init__(
        self,
        pool: ConnectionPool,
        origin: Origin,
        message: "tuple[bytes, bytes]",
        timeouts: Timeouts,
        on_sent: "Callable[[], None]",
    ) -> None:
        self.pool, self.origin, self.message, self.timeouts, self.on_sent = pool, origin, message, timeouts, on_sent
        self.connection: "UpstreamConnection | None" = None
        self.decoder: "Decoder | None" = None
        self.data = b""
        self.retried = False
        self.head: ResponseHead

    async def start(self) -> None:
        """Sends the request unless it was sent already, and reads the head of the reply. Raises UpstreamError."""
        if self.connection is None:
            await self._send(self.pool.take(self.origin))
        while True:
            connection = self.connection
            assert connection is not None
            try:
                self.head, self.data = await read_reply_head(connection.reader, b"")
                break
            except (UpstreamClosed, ConnectionError) as problem:
                error = self._lost(problem)
                if not self._stale(connection, error):
                    raise error from problem
            self.retried = True
            connection.pool.give_back(connection, False)
            await self._send(None)
        self.decoder = reply_body_decoder(self.head, self.message[0][:4].decode().strip())
        connection.early = False
        connection.waits_for = "nothing came from the upstream in time"
        connection.deadline.set(self._idle_until(connection))

    async def read(self) -> bytes:
        """Some bytes of the body, b"" at its whole end. Raises UpstreamError when it is cut or malformed."""
        decoder, connection = self.decoder, self.connection
        assert decoder is not None and connection is not None
        while not decoder.done:
            data, self.data = self.data, b""
            if not data:
                try:
                    data = await connection.reader.read_some()
                except ConnectionError as problem:
                    raise UpstreamClosed("the upstream reset the connection in its reply") from problem
                connection.deadline.set(self._idle_until(connection))
            if not data:
                if decoder.feed_eof():
                    return b""
                raise UpstreamClosed("the upstream closed the connection in the middle of its reply")
            try:
                payload = decoder.feed(data)
            except ValueError as problem:
                raise BadReply("the upstream's reply is malformed: %s" % problem) from problem
            if payload:
                return payload
        return b""

    def interrupt(self, error: Exception) -> None:
        """See `Exchange`."""
        if self.connection is not None:
            self.connection.reader.interrupt(error)

    def finish(self) -> None:
        """Gives the connection back, for reuse when its reply was whole and nobody wants to close it."""
        connection, decoder = self.connection, self.decoder
        if connection is None:
            return
        whole = decoder is not None and decoder.done and not decoder.rest and not isinstance(decoder, EofDecoder)
        self.connection = None
        self.pool.give_back(connection, whole and keeps_open(self.head))

    def abort(self) -> None:
        """Closes the connection."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self.pool.give_back(connection, False)

    async def _send(self, connection: "UpstreamConnection | None") -> None:
        """Writes the request as one piece; the transport sends what the kernel does not take while we read on."""
        if connection is None:
            connection = await self.pool.connect(self.origin, self.timeouts.connect)
        self.connection = connection
        head, body = self.message
        if len(body) < READ_BYTES:
            connection.writer.write(head + body)
        else:
            connection.writer.write(head)
            connection.writer.write(body)
        connection.used += 1
        connection.written_at = connection.loop.time()
        connection.early = True
        limit = self.timeouts.first_byte or 0.0
        connection.expect("no byte of a reply within %g s" % limit, limit)
        self.on_sent()

    def _lost(self, problem: "UpstreamClosed | ConnectionError") -> UpstreamClosed:
        if isinstance(problem, UpstreamClosed):
            return problem
        return UpstreamClosed("the upstream reset the connection before its reply", early=True)

    def _stale(self, connection: UpstreamConnection, error: UpstreamClosed) -> bool:
        """Whether the connection had died in the pool: then the request never arrived (RFC 9112, 9.3.1)."""
        quick = connection.loop.time() - connection.written_at < STALE_S
        return error.early and connection.used > 1 and quick and not self.retried

    def _idle_until(self, connection: UpstreamConnection) -> float:
        """When silence, or the whole exchange, has lasted too long."""
        idle, total = self.timeouts.idle, self.timeouts.total
        silent = connection.loop.time() + idle if idle else math.inf
        return min(silent, connection.written_at + total) if total else silent


def keeps_open(head: ResponseHead) -> bool:
    """Whether the upstream keeps its connection open after this reply (RFC 9112, 9.3)."""
    found = head.index.get(b"connection")
    if found is None:
        return head.minor >= 1
    options = tokens(found)
    return b"close" not in options and (head.minor >= 1 or b"keep-alive" in options)


# ==== 8. Controllers ====
# What a request to one account looks like. Pure translation: a parsed request in, the bytes for the upstream out. A new
# kind of account is one class here and one line in CONTROLLERS.


class ApiRequest:
    """One API call as every controller gets it: `body` as it came, `data` its parsed JSON object."""

    __slots__ = (
        "body",
        "client",
        "data",
        "fields",
        "max_tokens",
        "method",
        "model",
        "path",
        "prompt_tokens",
        "query",
        "request_id",
        "stateful",
        "stream",
        "wait_s",
    )

    def __init__(self, method: str, path: str, query: str, fields: Fields, body: bytes) -> None:
        self.method, self.path, self.query, self.fields, self.body = method, path, query, fields, body
        self.data: "dict[str, Any]" = {}
        self.model = self.client = self.request_id = ""
        self.stream = self.stateful = False
        self.prompt_tokens = self.max_tokens = 0
        self.wait_s = math.inf


def parse_chat(body: bytes) -> "tuple[dict[str, Any], bytes]":
    """The JSON object of a chat request, and the body to send: as it came, or respelled for Go clients.

    Raises ProxyError (400) for what no upstream could answer.
    """
    data = parse_object(body)
    if "model" not in data or "messages" not in data or "Stream" in data:
        spelled = respell(data)
        if spelled is not data:
            data, body = spelled, compact_json(spelled)
    model, messages = data.get("model"), data.get("messages")
    if not isinstance(model, str) or not model:
        raise ProxyError(400, "You must provide a model parameter: a non-empty string.", param="model")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ProxyError(400, "You must provide messages: a non-empty array of objects.", param="messages")
    if not isinstance(data.get("stream", False), (bool, type(None))):
        raise ProxyError(400, "stream must be true or false.", param="stream")
    return data, body


def parse_object(body: bytes) -> "dict[str, Any]":
    """The JSON object that `body` is. Raises ProxyError (400)."""
    try:
        if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
            raise ValueError("it must be UTF-8 (RFC 8259, 8.1)")
        data = json.loads(body)
    except (ValueError, RecursionError) as problem:
        raise ProxyError(400, "The body is not valid JSON: %s" % problem) from None
    if not isinstance(data, dict):
        raise ProxyError(400, "The body must be a JSON object.")
    return data


def top_level_count(body: bytes, key: str) -> int:
    """How often `key` stands in the outermost object, in any case: two readers could believe two different ones."""
    counts: "list[int]" = []

    def pairs(found: "list[tuple[str, Any]]") -> "dict[str, Any]":
        counts.append(sum(name.lower() == key for name, _ in found))
        return {}

    json.loads(body, object_pairs_hook=pairs)
    return counts[-1] if counts else 0


_CHAT_KEYS = frozenset(
    "model messages stream temperature top_p n stop max_tokens max_completion_tokens presence_penalty frequency_penalty"
    " logit_bias user tools tool_choice functions function_call response_format seed stream_options logprobs"
    " top_logprobs parallel_tool_calls reasoning_effort metadata store".split()
)
_MESSAGE_KEYS = frozenset("role content name tool_calls tool_call_id refusal function_call".split())


def respell(data: "dict[str, Any]") -> "dict[str, Any]":
    """`data` with the keys that Go clients capitalise in the API's spelling; the same object if there are none."""
    found = lower_keys(data, _CHAT_KEYS)
    messages = found.get("messages")
    if found is not data and isinstance(messages, list):
        found["messages"] = [lower_keys(m, _MESSAGE_KEYS) if isinstance(m, dict) else m for m in messages]
    return found


def lower_keys(data: "dict[str, Any]", known: "frozenset[str]") -> "dict[str, Any]":
    """`data` with its keys lower-cased where that makes a known one; unknown keys stay as they are."""
    if not any(key not in known and key.lower() in known for key in data):
        return data
    return {key.lower() if key.lower() in known else key: value for key, value in data.items()}


def replace_model(body: bytes, model: str) -> bytes:
    """`body` with another value for each outermost "model", every other byte as it was."""
    text = body.decode("utf-8", "surrogatepass")
    decoder, at, done = json.JSONDecoder(), text.index("{") + 1, 0
    out: "list[str]" = []
    while text[at - 1] != "}":
        at = _skip_space(text, at)
        key, at = decoder.raw_decode(text, at)
        at = _skip_space(text, _skip_space(text, at) + 1)
        _, end = decoder.raw_decode(text, at)
        if key == "model":
            out += [text[done:at], json.dumps(model)]
            done = end
        at = _skip_space(text, end) + 1
    return "".join([*out, text[done:]]).encode("utf-8", "surrogatepass")


def _skip_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def estimate_prompt(data: "dict[str, Any]") -> int:
    """About how many tokens the prompt has: text characters / 4, and 1,000 for each part that is no text."""
    chars = parts = 0
    for message in data["messages"]:
        content = message.get("content")
        if isinstance(content, str):
            chars += len(content)
        elif isinstance(content, list):
            for part in content:
                text = part.get("text") if isinstance(part, dict) else None
                if isinstance(text, str):
                    chars += len(text)
                else:
                    parts += 1
    return chars // 4 + parts * TOKENS_PER_PART


def answer_limit(data: "dict[str, Any]") -> int:
    """The most tokens that the client lets the answers have together; 0 when it sets no limit."""
    most = data.get("max_completion_tokens") or data.get("max_tokens") or 0
    choices = data.get("n") or 1
    if not isinstance(most, int) or not isinstance(choices, int):
        return 0
    return max(0, most) * min(max(1, choices), 128)


class Controller(Protocol):
    """An account: `exchange` makes the exchange that carries a request to it. `on_sent` is called at the write."""

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[], None]") -> Exchange:
        """A fresh exchange for `request`, not started."""


class OpenAIController:
    """An account that speaks OpenAI's API, at any base URL (openai-openapi; PROVIDERS: vendors alike)."""

    def __init__(self, config: ControllerConfig) -> None:
        account = config.account
        self.origin, self.prefix = parse_origin(account.base_url, account.proxy, account.ca_file)
        self.model_map = dict(config.model_map)
        self.whole_timeouts = with_first_byte(config.timeouts, 600.0)
        self.stream_timeouts = with_first_byte(config.timeouts, 120.0)
        self.overrides = frozenset(name.lower().encode() for name, _ in account.headers)
        self.fixed = self._fixed_fields(account)
        self.lines: "dict[str, bytes]" = {}

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[], None]") -> Exchange:
        """See `Controller`."""
        timeouts = self.stream_timeouts if request.stream else self.whole_timeouts
        return NetworkExchange(pool, self.origin, self.message(request), timeouts, on_sent)

    def message(self, request: ApiRequest) -> "tuple[bytes, bytes]":
        """Head and body of the request as the account gets them; nothing of it is copied from the client's own head
        but values that were parsed."""
        body = request.body
        model = self.model_map.get(request.model)
        if model is not None and request.data:
            body = replace_model(body, model)
        fields = request.fields
        if self.overrides:
            fields = [field for field in fields if field[0].lower() not in self.overrides]
        length = b"Content-Length: %d\r\n\r\n" % len(body) if body or request.method != "GET" else b"\r\n"
        return self._start(request) + render_fields(fields) + length, body

    def _start(self, request: ApiRequest) -> bytes:
        """Request line and our own fields; those without a query are kept."""
        if request.query:
            return self._line(request.method, request.path + "?" + request.query) + self.fixed
        key = request.method + request.path
        found = self.lines.get(key)
        if found is None:
            found = self._line(request.method, request.path) + self.fixed
            if len(self.lines) < 64:
                self.lines[key] = found
        return found

    def _line(self, method: str, path: str) -> bytes:
        target = urllib.parse.quote(self.prefix, safe="/%:@!$&'()*+,;=~") + path
        if self.origin.proxy and self.origin.scheme == "http":
            target = "http://" + self.origin.authority + target  # absolute-form, RFC 9112, 3.2.2
        return b"%b %b HTTP/1.1\r\n" % (method.encode(), target.encode())

    def _fixed_fields(self, account: AccountConfig) -> bytes:
        fields = [("Host", self.origin.authority), ("Accept-Encoding", "identity")]
        if account.api_key:
            fields.append(("Authorization", "Bearer " + account.api_key.reveal()))
        if account.organization:
            fields.append(("OpenAI-Organization", account.organization))
        if account.project:
            fields.append(("OpenAI-Project", account.project))
        own = [field for field in fields if field[0].lower().encode() not in self.overrides]
        lines = [(name.encode(), value.encode()) for name, value in own]
        lines += [(name.encode(), value.reveal().encode()) for name, value in account.headers]
        proxied = self.origin.proxy and self.origin.scheme == "http"
        return render_fields(lines) + (proxy_authorization(self.origin.proxy) if proxied else b"")


def with_first_byte(timeouts: Timeouts, default_s: float) -> Timeouts:
    """`timeouts` with the time to the first byte that this kind of answer needs."""
    return timeouts if timeouts.first_byte is not None else dataclasses.replace(timeouts, first_byte=default_s)


class EchoExchange:
    """An exchange that makes its reply up. See `Exchange`."""

    def __init__(self, request: ApiRequest, delay: float, first_delay: float, on_sent: "Callable[[], None]") -> None:
        self.request, self.delay, self.on_sent = request, delay, on_sent
        self.wait_s = first_delay
        self.pieces = self._stream_pieces() if request.stream else self._whole_pieces()
        kind = b"text/event-stream; charset=utf-8" if request.stream else b"application/json"
        fields = [(b"Content-Type", kind)]
        self.head = ResponseHead(200, 1, fields, {b"content-type": kind})

    async def start(self) -> None:
        """See `Exchange`."""
        self.on_sent()
        await self._pause()

    async def read(self) -> bytes:
        """See `Exchange`."""
        await self._pause()
        if self.request.stream:
            self.wait_s = self.delay
        return next(self.pieces, b"")

    def interrupt(self, error: Exception) -> None:
        """Nothing is waited for but time."""

    def finish(self) -> None:
        """Nothing is held."""

    def abort(self) -> None:
        """Nothing is held."""

    async def _pause(self) -> None:
        """Waits for the delay that is due."""
        wait_s, self.wait_s = self.wait_s, 0.0
        if wait_s:
            await asyncio.sleep(wait_s)

    def _words(self) -> "list[str]":
        """The last user message, cut after each run of white space."""
        asked = [message for message in self.request.data["messages"] if message.get("role") == "user"]
        content = (asked or self.request.data["messages"])[-1].get("content") or ""
        if not isinstance(content, str):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return re.findall(r"\S*\s*", content)[:-1]

    def _answer(self, kind: str, **more: "Any") -> "dict[str, Any]":
        return dict(
            {
                "id": "chatcmpl-echo-" + self.request.request_id,
                "object": kind,
                "created": int(time.time()),
                "model": self.request.model,
            },
            **more,
        )

    def _usage(self, words: int) -> "dict[str, int]":
        prompt = max(1, self.request.prompt_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words}

    def _whole_pieces(self) -> "Iterator[bytes]":
        words = self._words()
        message = {"role": "assistant", "content": "".join(words), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        yield compact_json(self._answer("chat.completion", choices=[choice], usage=self._usage(len(words))))

    def _stream_pieces(self) -> "Iterator[bytes]":
        words = self._words()
        deltas: "list[dict[str, str]]" = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word} for word in words] + [{}]
        options = self.request.data.get("stream_options") or {}
        usage = isinstance(options, dict) and options.get("include_usage")
        more: "dict[str, Any]" = {"usage": None} if usage else {}
        for number, delta in enumerate(deltas):
            reason = "stop" if number == len(deltas) - 1 else None
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield self._event(choices=[choice], **more)
        if usage:
            yield self._event(choices=[], usage=self._usage(len(words)))
        yield b"data: [DONE]\n\n"

    def _event(self, **more: "Any") -> bytes:
        return b"data: " + compact_json(self._answer("chat.completion.chunk", **more)) + b"\n\n"


class EchoController:
    """An account without a network: answers with the last user message, whole or word by word, with usage."""

    def __init__(self, config: ControllerConfig) -> None:
        self.name = config.name
        self.delay, self.first_delay = config.account.delay, config.account.first_delay

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[], None]") -> Exchange:
        """See `Controller`."""
        return EchoExchange(request, self.delay, self.first_delay, on_sent)


CONTROLLERS: "dict[str, Callable[[ControllerConfig], Controller]]" = {
    "openai": OpenAIController,
    "echo": EchoController,
}


# ==== 9. Balancing and health ====
# Who gets a request, and what its outcome means. Knows no connection and no head, only outcomes; time and randomness
# are passed in. Only `judge_reply` reads an upstream's answer for its meaning, only `may_retry` knows when another
# attempt is safe.


class Outcome(enum.Enum):
    """What came of an attempt (PROVIDERS, neutral outcome classes)."""

    OK = "ok"
    CLIENT = "client"  # the request itself is at fault: returned as it is
    RATE = "rate"
    QUOTA = "quota"
    AUTH = "auth"
    FORBIDDEN = "forbidden"
    MISSING = "missing"  # this account lacks the model
    FAULT = "fault"
    CONNECT = "connect"  # nothing was sent
    SILENT = "silent"  # no byte within first_byte: it may be generating
    CUT = "cut"


QUOTA_CODES = frozenset(
    (
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "exceeded_current_quota_error",
        "billing_error",
        "billing_hard_limit_reached",
    )
)
MISSING_CODES = frozenset(("model_not_found", "DeploymentNotFound", "not_found_error"))
# The answer shown when every controller failed: what tells the client most comes first.
USEFULNESS = (
    Outcome.CLIENT,
    Outcome.RATE,
    Outcome.QUOTA,
    Outcome.FAULT,
    Outcome.MISSING,
    Outcome.AUTH,
    Outcome.FORBIDDEN,
)


def error_words(body: bytes) -> "tuple[str, str]":
    """Code (or type) and message of an error body, in any of the shapes that providers send."""
    try:
        found = json.loads(body[:HOLD_BYTES])
    except (ValueError, RecursionError):
        return "", ""
    if isinstance(found, list) and found:
        found = found[0]
    if not isinstance(found, dict):
        return "", ""
    error = found.get("error", found)
    if not isinstance(error, dict):
        return "", str(error)
    return str(error.get("code") or error.get("type") or ""), str(error.get("message") or error.get("detail") or "")


def judge_reply(status: int, body: bytes) -> Outcome:
    """What a reply with this status and (for errors) this body means."""
    if status < 300:
        return Outcome.OK
    if status in (400, 413, 422):
        return Outcome.CLIENT
    code, message = error_words(body)
    if status == 402 or (status == 429 and (code in QUOTA_CODES or '"insufficient_quota"' in body.decode("latin-1"))):
        return Outcome.QUOTA
    if status in (429, 498):
        return Outcome.RATE
    if status == 401:
        return Outcome.AUTH
    if status == 404:
        return Outcome.MISSING if code in MISSING_CODES or "model" in message else Outcome.CLIENT
    if status == 403:
        return Outcome.MISSING if code in MISSING_CODES or "model" in message else Outcome.FORBIDDEN
    return Outcome.CLIENT if 400 <= status < 500 and status not in (408, 409, 424) else Outcome.FAULT


def judge_error(error: UpstreamError) -> Outcome:
    """What an attempt that brought no answer means."""
    if not error.sent:
        return Outcome.CONNECT
    if isinstance(error, UpstreamTimeout) and error.early:
        return Outcome.SILENT
    return Outcome.FAULT


def may_retry(outcome: Outcome, request: ApiRequest, early: bool = True) -> bool:
    """Whether the next controller may get this request. The only place that knows.

    Stateful requests leave traces in the account, so they move on only when this one certainly did not run. A whole
    answer that is still silent may be generating, and be billed: asking another would pay twice.
    """
    if outcome in (Outcome.OK, Outcome.CLIENT):
        return False
    if request.stateful:
        return outcome in (Outcome.CONNECT, Outcome.AUTH, Outcome.RATE, Outcome.QUOTA)
    return request.stream or outcome is not Outcome.SILENT


class Upstream:
    """A controller with its live state. `position` is its place in the configuration."""

    __slots__ = (
        "config",
        "controller",
        "failures",
        "first_byte_s",
        "in_flight",
        "name",
        "patterns",
        "position",
        "requests",
        "weight",
    )

    def __init__(self, config: ControllerConfig, controller: Controller, position: int) -> None:
        self.config, self.controller, self.position = config, controller, position
        self.name, self.weight = config.name, config.weight
        self.in_flight = self.requests = self.failures = 0
        self.first_byte_s = [0.0, 0.0]  # of whole answers and of streams: a mean that forgets; 0 is unknown
        names = config.models + tuple(name for name, _ in config.model_map)
        self.patterns = model_patterns(names) if config.models else None

    def __repr__(self) -> str:
        return "<Upstream %s in_flight=%d requests=%d>" % (self.name, self.in_flight, self.requests)

    def heard(self, stream: bool, seconds: float) -> None:
        """Takes the time to the first byte of one good answer."""
        mean = self.first_byte_s[stream]
        self.first_byte_s[stream] = mean + (seconds - mean) / 8 if mean else seconds

    def serves(self, model: str) -> bool:
        """Whether requests for `model` may go here; a controller without `models` takes all."""
        return self.patterns is None or self.patterns.fullmatch(model) is not None


def model_patterns(names: "Iterable[str]") -> "re.Pattern[str]":
    """One expression for all of the names, in which `*` stands for anything and `?` for one character."""
    parts = [re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names]
    return re.compile("|".join(parts), re.DOTALL)


class Lease:
    """The right to send one request to one controller; `release` gives it back, once."""

    __slots__ = ("since", "upstream")

    def __init__(self, upstream: Upstream, since: float) -> None:
        self.upstream, self.since = upstream, since
        upstream.in_flight += 1
        upstream.requests += 1

    def release(self, outcome: Outcome) -> None:
        """The attempt is over. A second call changes nothing."""
        if self.since >= 0:
            self.since = -1.0
            self.upstream.in_flight -= 1
            self.upstream.failures += outcome not in (Outcome.OK, Outcome.CLIENT)


class Policy(Protocol):
    """How a pool chooses among the controllers that could take a request."""

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """One of `upstreams`, which are at least one and in the order of the configuration."""


class SmoothWeighted:
    """Smooth weighted round robin, the sequence of the Go original and of nginx: 5, 1, 1 gives a a b a c a a.

    Who cannot take part in a choice neither gains nor loses by it, so the shares of the others stay their weights'.
    """

    def __init__(self) -> None:
        self.credit: "dict[int, int]" = {}

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """See `Policy`."""
        credit, total, best, most = self.credit, 0, upstreams[0], -math.inf
        for upstream in upstreams:
            weight = upstream.weight
            total += weight
            have = credit.get(upstream.position, 0) + weight
            credit[upstream.position] = have
            if have > most:
                best, most = upstream, have
        credit[best.position] -= total
        return best


class WeightedRandom:
    """Each choice by chance, in proportion to the weights."""

    def __init__(self, chance: "Callable[[], float]" = random.random) -> None:
        self.chance = chance

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """See `Policy`."""
        left = self.chance() * sum(upstream.weight for upstream in upstreams)
        for upstream in upstreams:
            left -= upstream.weight
            if left < 0:
                return upstream
        return upstreams[-1]


class LeastBusy:
    """The one with the fewest requests in flight for its weight; the earlier of equals."""

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """See `Policy`."""
        return min(upstreams, key=lambda upstream: upstream.in_flight / upstream.weight)


class Priority:
    """The first in the order of the configuration."""

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """See `Policy`."""
        return upstreams[0]


class Fastest:
    """The one whose first byte came soonest of late; answers and streams are different kinds. Unknown ones first."""

    def choose(self, upstreams: "list[Upstream]", stream: bool) -> Upstream:
        """See `Policy`."""
        return min(upstreams, key=lambda upstream: upstream.first_byte_s[stream])


POLICIES: "dict[str, Callable[[], Policy]]" = {
    "balanced": SmoothWeighted,
    "random": WeightedRandom,
    "least_busy": LeastBusy,
    "priority": Priority,
    "fastest": Fastest,
}


class UpstreamPool:
    """The controllers and the policy that chooses among them."""

    def __init__(self, upstreams: "list[Upstream]", policy: Policy) -> None:
        self.upstreams, self.policy = upstreams, policy
        self.serving: "dict[str, list[Upstream]]" = {}

    def candidates(self, model: str) -> "list[Upstream]":
        """The controllers that serve `model`. Raises ProxyError (404) when there is none."""
        found = self.serving.get(model)
        if found is None:
            found = [upstream for upstream in self.upstreams if upstream.serves(model)]
            if len(self.serving) < MEMORY_MODELS and len(model) <= MODEL_NAME_CHARS:
                self.serving[model] = found
        if not found:
            raise ProxyError(404, self._missing(model), "model_not_found", param="model")
        return found

    def lease(
        self, candidates: "list[Upstream]", tried: "set[Upstream]", stream: bool, now: float
    ) -> "Lease | None":
        """The right to send to one that was not tried yet, or None when all were."""
        left = [upstream for upstream in candidates if upstream not in tried] if tried else candidates
        return Lease(self.policy.choose(left, stream), now) if left else None

    def configured_models(self) -> "list[str]":
        """The model names that the configuration spells out, sorted."""
        names = {name for upstream in self.upstreams for name in upstream.config.models}
        names |= {name for upstream in self.upstreams for name, _ in upstream.config.model_map}
        return sorted(name for name in names if "*" not in name and "?" not in name)

    def _missing(self, model: str) -> str:
        names = sorted({name for upstream in self.upstreams for name in upstream.config.models})
        shown_model = model if len(model) <= 64 else model[:63] + "…"
        return "The model %r is served by no controller here. Served: %s." % (shown_model, ", ".join(names)[:1000])


# ==== 10. Relay ====
# One request, attempt after attempt, until an answer is committed to the client; then every byte at once. The first
# byte to the client is the point of no return: before it every failure may move on, after it a cut is told honestly.


def _nothing() -> None:
    """What happens at the write while nobody counts it."""


class Sink(Protocol):
    """Where an answer goes: the client's connection. `open` writes the head, `end` what its framing needs last."""

    async def whole(self, status: int, fields: bytes, body: bytes) -> None:
        """Writes an answer of known length, head and body in one piece."""

    def open(self, status: int, fields: bytes, length: "int | None") -> None:
        """Begins an answer that is written as it comes; `length` None: not known."""

    async def write(self, data: bytes) -> None:
        """Writes body bytes now; returns when the client takes more."""

    def end(self) -> None:
        """Ends the body as its framing asks."""

    def cut(self, last: bytes) -> None:
        """Writes `last`, then closes without the end that would make the answer look whole."""


class Reply:
    """An attempt's answer that is good enough to be the client's: its exchange, and what was read of the body.

    `whole`: `held` is all of the body.
    """

    __slots__ = ("exchange", "head", "held", "outcome", "stream", "whole")

    def __init__(self, exchange: Exchange, outcome: Outcome = Outcome.OK) -> None:
        self.exchange, self.head, self.outcome = exchange, exchange.head, outcome
        self.held, self.whole, self.stream = b"", False, False


class Refused(Exception):
    """An upstream answered, but not with what the client asked for. `reply` is whole."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.head.status)
        self.reply = reply


class Relay:
    """Carries requests to the pool's controllers and their answers back."""

    def __init__(self, pool: UpstreamPool, connections: ConnectionPool, now: "Callable[[], float]") -> None:
        self.pool, self.connections, self.now = pool, connections, now

    async def run(self, request: ApiRequest, sink: Sink, record: AccessRecord) -> None:
        """Answers `request` into `sink`. Raises ProxyError or UpstreamError where no upstream answer can be shown."""
        candidates = self.pool.candidates(request.model)
        tried: "set[Upstream]" = set()
        best: "Reply | None" = None
        failure: "UpstreamError | None" = None
        while True:
            lease = self.pool.lease(candidates, tried, request.stream, self.now())
            if lease is None:
                break
            outcome = Outcome.CUT
            try:
                reply = await self._attempt(request, lease, len(candidates) - len(tried) > 1, record)
                outcome = reply.outcome
                await self._deliver(reply, request, sink, record, lease)
                return
            except Refused as refused:
                outcome, best = refused.reply.outcome, more_useful(best, refused.reply)
            except UpstreamError as error:
                outcome, failure = judge_error(error), error
                record.outcomes.append((lease.upstream.name, outcome.value, self.now() - lease.since))
            finally:
                lease.release(outcome)
            tried.add(lease.upstream)
            record.controller = lease.upstream.name
            if not may_retry(outcome, request):
                break
        if best is not None:
            await self._show(best, request, sink, record)
            return
        raise failure if failure is not None else ProxyError(503, "No controller could be asked.", "no_controller")

    async def _attempt(self, request: ApiRequest, lease: Lease, others: bool, record: AccessRecord) -> Reply:
        """One request to one controller, up to the point where its answer is good. Raises Refused or UpstreamError."""
        exchange = lease.upstream.controller.exchange(request, self.connections, _nothing)
        try:
            await exchange.start()
            reply = await self._first(exchange, request, others)
        except Refused as refused:
            exchange.finish()
            record.outcomes.append((lease.upstream.name, refused.reply.outcome.value, self.now() - lease.since))
            raise
        except BaseException:
            exchange.abort()
            raise
        took_s = self.now() - lease.since
        lease.upstream.heard(request.stream, took_s)
        record.outcomes.append((lease.upstream.name, reply.outcome.value, took_s))
        return reply

    async def _first(self, exchange: Exchange, request: ApiRequest, others: bool) -> Reply:
        """Reads as much of a reply as decides whether it is the answer."""
        status, kind = exchange.head.status, exchange.head.index.get(b"content-type", b"")
        reply = Reply(exchange)
        if status >= 300:
            await self._collect(reply, WHOLE_BYTES)
            reply.outcome = judge_reply(status, reply.held)
            raise Refused(reply)
        if kind[:17].lower() == b"text/event-stream":
            reply.stream = True
            await self._hold(reply, others)
        else:
            await self._collect(reply, WHOLE_BYTES)
            if reply.held[:9] == b'{"error":' and judge_event(b"data: " + reply.held) is EventKind.ERROR:
                reply.outcome = judge_reply(502, reply.held)  # 200 with an error in it, as OpenRouter may send
                raise Refused(as_error(reply))
        return reply

    async def _collect(self, reply: Reply, limit: int) -> None:
        """Reads the body up to its end or to `limit` bytes."""
        pieces: "list[bytes]" = []
        size = 0
        while size <= limit:
            piece = await reply.exchange.read()
            if not piece:
                reply.whole = True
                break
            pieces.append(piece)
            size += len(piece)
        reply.held = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _hold(self, reply: Reply, others: bool) -> None:
        """Reads a stream up to its first real event; at once through when there is nothing to fail over to."""
        splitter = EventSplitter()
        held: "list[bytes]" = []
        until = self.now() + HOLD_S
        while True:
            piece = await reply.exchange.read()
            held.append(piece)
            if not piece:
                reply.whole = True
                if not any(held):
                    raise UpstreamClosed("the upstream ended its stream before the first event")
            reply.held = piece if len(held) == 1 else b"".join(held)
            kind = first_kind(splitter.feed(piece))
            if kind is EventKind.ERROR and others:
                raise UpstreamError("the upstream's stream began with an error")
            if kind is not EventKind.PREFACE or not others or reply.whole:
                return
            if len(reply.held) > HOLD_BYTES or self.now() > until:
                return

    async def _deliver(
        self, reply: Reply, request: ApiRequest, sink: Sink, record: AccessRecord, lease: Lease
    ) -> None:
        """Sends an answer on as it comes. From here on nothing can be replayed."""
        exchange = reply.exchange
        record.controller = lease.upstream.name
        fields = self._fields(reply, request, record)
        record.status, record.first_at = reply.head.status, self.now()
        try:
            if reply.whole and not reply.stream:
                exchange.finish()
                await sink.whole(reply.head.status, fields, reply.held)
                return
            length = reply.head.index.get(b"content-length")
            sink.open(reply.head.status, fields, content_length(length) if length else None)
            piece = reply.held
            while piece:
                await sink.write(piece)
                piece = b"" if reply.whole else await exchange.read()
            sink.end()
            exchange.finish()
        except UpstreamError as error:
            record.outcomes[-1] = (lease.upstream.name, "cut", self.now() - lease.since)
            log.warning("%s: answer of %s cut: %s", request.request_id, lease.upstream.name, error)
            sink.cut(error_event("The upstream's answer was cut: %s." % error, error.code) if reply.stream else b"")
        finally:
            exchange.abort()

    async def _show(self, reply: Reply, request: ApiRequest, sink: Sink, record: AccessRecord) -> None:
        """Sends the upstream error that tells most, without the secrets that it may echo."""
        record.status, record.first_at = reply.head.status, self.now()
        fields = self._fields(reply, request, record)
        if 300 <= reply.head.status < 400:
            raise ProxyError(502, "The upstream redirects; its base_url needs a correction.", "upstream_redirects")
        encoded = reply.head.index.get(b"content-encoding")
        await sink.whole(reply.head.status, fields, reply.held if encoded else redactor.scrub(reply.held))

    def _fields(self, reply: Reply, request: ApiRequest, record: AccessRecord) -> bytes:
        """The head's field lines: the upstream's that may pass, and ours."""
        index = reply.head.index
        found = render_fields(returned_fields(reply.head, len(record.outcomes) > 1))
        ours = "x-apiserver-controller: %s\r\nx-apiserver-attempts: %d\r\nx-apiserver-wait-ms: %d\r\n" % (
            record.controller,
            len(record.outcomes),
            record.waited_s * 1e3,
        )
        found += ours.encode() + b"x-apiserver-request-id: " + request.request_id.encode() + b"\r\n"
        if b"x-request-id" not in index:
            found += b"x-request-id: " + request.request_id.encode() + b"\r\n"
        return found


def more_useful(one: "Reply | None", other: Reply) -> Reply:
    """The one of two refusals that tells a client more; the earlier of equals."""
    if one is None:
        return other
    return other if USEFULNESS.index(other.outcome) < USEFULNESS.index(one.outcome) else one


def as_error(reply: Reply) -> Reply:
    """A 200 whose body is an error, as the 502 that it is."""
    reply.head = ResponseHead(502, 1, reply.head.fields, reply.head.index)
    return reply


# ==== 11. Server ====
# One task per client connection: read a request, answer it, read the next. Framing is judged before doors, doors before
# routes. A client that leaves cancels its task, and with it whatever was under way upstream.


class Phase(enum.Enum):
    """What a client connection is doing; the deadline that has passed is answered accordingly."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    CLOSING = "closing"


class ClientConnection:
    """A client's connection and, during an answer, the Sink that the relay writes to."""

    __slots__ = (
        "chunked",
        "close_after",
        "deadline",
        "gone",
        "head",
        "head_sent",
        "loop",
        "origin",
        "peer",
        "phase",
        "probes",
        "reader",
        "record",
        "server",
        "task",
        "transport",
        "writer",
    )

    def __init__(self, server: "Server", reader: WireReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.transport = writer.transport
        self.loop = reader.loop
        peer = writer.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else "local"
        self.deadline = Deadline(self.loop, self._expired)
        self.phase, self.probes = Phase.IDLE, 0
        self.gone = self.close_after = self.head_sent = self.chunked = False
        self.origin = b""
        self.head: "RequestHead | None" = None
        self.record = AccessRecord(self.peer, "-", "-", 0.0)
        reader.on_end = self._ended
        self.task = self.loop.create_task(self._run())

    def __repr__(self) -> str:
        return "<ClientConnection %s %s>" % (self.peer, self.phase.value)

    def drain(self) -> None:
        """The server is about to stop: an idle connection closes, a busy one after its answer."""
        self.close_after = True
        if self.phase is Phase.IDLE:
            self.task.cancel()

    # -- the connection's life

    async def _run(self) -> None:
        try:
            while not self.close_after and await self._one():
                pass
            self.phase = Phase.CLOSING
            await self._linger()
        except asyncio.CancelledError:
            pass  # the client left, or the server stops; asyncio 3.11 prints a traceback for a cancelled stream task
        except (ConnectionError, TimeoutError, ClientGone):
            self.gone = True
        finally:
            self.phase = Phase.CLOSING
            self.deadline.cancel()
            self.reader.on_end = None
            if self.gone:
                self.transport.abort()
            else:
                self.writer.close()
            self.server.connections.discard(self)

    async def _one(self) -> bool:
        """Reads and answers one request; whether another may follow."""
        self.phase, self.head_sent, self.chunked, self.head, self.origin = Phase.IDLE, False, False, None, b""
        try:
            head = await self._read_head()
            if head is None:
                return False
            body = await self._read_body(head)
        except BadMessage as error:
            self.close_after = True
            self.record = AccessRecord(self.peer, "-", "-", self.loop.time())
            if self.head is not None:
                self.record.method, self.record.path = self.head.method, self.head.target
            await self._fail(error)
            self.server.access.add(self.record)
            return False
        self.deadline.set(math.inf)
        self.phase = Phase.ANSWER
        await self._answer(head, body)
        return not self.close_after

    async def _linger(self) -> None:
        """Lets a client that still sends read our answer before the connection is reset (RFC 9112, 9.6)."""
        if not self.transport.can_write_eof() or self.reader.ended or self.server.stopping:
            return
        self.transport.write_eof()
        self.deadline.set(self.loop.time() + LINGER_S)
        budget = LINGER_BYTES
        while budget > 0:
            data = await self.reader.read_some()
            if not data:
                return
            budget -= len(data)

    # -- reading

    async def _read_head(self) -> "RequestHead | None":
        """The next request's head; None when the client closed between requests. Raises BadMessage."""
        limits, data = self.server.config.limits, b""
        self.deadline.set(self.loop.time() + limits.idle_timeout)
        while True:
            more = await self.reader.read_some()
            if not more:
                return None
            data = (data + more if data else more).lstrip(b"\r\n") if len(data) < 4 else data + more
            end = data.find(b"\r\n\r\n", max(0, len(data) - len(more) - 3))
            if end >= 0 and end <= limits.header_bytes:
                break
            if len(data) > limits.header_bytes:
                raise BadMessage(431, "The request head is larger than %d bytes." % limits.header_bytes)
            check_partial_head(data)
            if self.phase is Phase.IDLE and data:
                self.phase = Phase.HEAD
                self.deadline.set(self.loop.time() + limits.header_timeout)
        if len(data) > end + 4:
            self.reader.unread(data[end + 4 :])
            data = data[: end + 4]
        if data.find(b"\r\n") > START_LINE_BYTES:
            raise BadMessage(414, "The request line is longer than %d bytes." % START_LINE_BYTES)
        self.head = parse_request_head(data, limits.header_count)
        return self.head

    async def _read_body(self, head: RequestHead) -> bytes:
        """The request's body, bounded in size, time and slowness. Raises BadMessage."""
        limits = self.server.config.limits
        decoder = request_body_decoder(head, limits.body_bytes)
        if not head.keeps_alive:
            self.close_after = True
        if decoder is None:
            return b""
        self._check_expectation(head)
        self.phase = Phase.BODY
        pieces: "list[bytes]" = []
        size, since = 0, self.loop.time()
        while not decoder.done:
            if pieces or not self.reader.data:
                self.deadline.set(self._body_deadline(since, size))
            data = await self.reader.read_some()
            if not data:
                raise ClientGone
            try:
                pieces.append(decoder.feed(data))
            except OverflowError as problem:
                raise BadMessage(413, "%s." % str(problem).capitalize(), "request_too_large") from None
            except ValueError as problem:
                raise BadMessage(400, "The request body is malformed: %s." % problem) from None
            size += len(pieces[-1])
        if decoder.rest:
            self.reader.unread(decoder.rest)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _check_expectation(self, head: RequestHead) -> None:
        """Answers Expect: 100-continue once the head is found good (RFC 9110, 10.1.1)."""
        expected = head.index.get(b"expect")
        if expected is not None and head.minor >= 1:
            if expected.strip(b" \t").lower() != b"100-continue":
                raise BadMessage(417, "The only expectation understood is 100-continue.")
            if not self.reader.data:
                self.transport.write(CONTINUE)

    def _body_deadline(self, since: float, size: int) -> float:
        """When a body that began at `since` and has `size` bytes by now is too slow: by total, and by rate."""
        limits = self.server.config.limits
        slowest = since + limits.header_timeout + size / limits.body_rate if limits.body_rate else math.inf
        return min(since + limits.body_timeout, slowest)

    # -- answering

    async def _answer(self, head: RequestHead, body: bytes) -> None:
        """Doors, route, handler; one place turns every error into a response."""
        record = self.record = AccessRecord(self.peer, head.method, head.target, self.loop.time())
        record.request_id = self.server.next_id()
        try:
            if head.index.get(b"origin") is not None or self.server.guards_host:
                self.origin = self.server.check_doors(head)
            await self.server.handle(self, head, body)
        except (ProxyError, UpstreamError) as error:
            if self.head_sent:
                raise ClientGone from error
            await self._fail(error)
        except asyncio.CancelledError:
            record.status = record.status or 499
            raise
        except (ConnectionError, TimeoutError, ClientGone):
            record.status = record.status or 499
            raise
        except Exception:
            log.exception("%s: internal error", record.request_id)
            self.close_after = True
            if self.head_sent:
                raise ClientGone from None
            await self._fail(ProxyError(500, "Internal error; the log has request %s." % record.request_id))
        finally:
            self.server.access.add(record)

    async def _fail(self, error: "ProxyError | UpstreamError") -> None:
        """Sends an error as an answer."""
        self.record.status = error.status
        fields = error.headers if isinstance(error, ProxyError) else b""
        if isinstance(error, UpstreamError) and self.record.controller:
            names = (self.record.controller, len(self.record.outcomes))
            fields += ("x-apiserver-controller: %s\r\nx-apiserver-attempts: %d\r\n" % names).encode()
        if self.record.request_id:
            fields += b"x-request-id: %b\r\n" % self.record.request_id.encode()
        body = redactor.clean(error_body(error).decode()).encode()
        await self.whole(error.status, b"Content-Type: application/json\r\n" + fields, body)

    async def json(self, value: "Any", status: int = 200) -> None:
        """Answers with a JSON document of our own."""
        self.record.status = status
        await self.whole(status, b"Content-Type: application/json\r\n", compact_json(value))

    async def whole(self, status: int, fields: bytes, body: bytes) -> None:
        """See `Sink`."""
        length = b"" if status in (204, 304) else b"Content-Length: %d\r\n" % len(body)
        if self.head is not None and self.head.method == "HEAD":
            body = b""
        self.head_sent = True
        self.record.bytes = len(body)
        self.transport.write(b"".join((status_line(status), fields, self._own_fields(), length, b"\r\n", body)))
        if self.transport.get_write_buffer_size() > WRITE_HIGH_BYTES:
            await self._drain()

    def open(self, status: int, fields: bytes, length: "int | None") -> None:
        """See `Sink`. The head waits for the first body bytes, to leave with them in one piece."""
        assert self.head is not None
        if length is not None:
            framing = b"Content-Length: %d\r\n" % length
        elif self.head.minor >= 1:
            framing, self.chunked = b"Transfer-Encoding: chunked\r\n", True
        else:
            framing, self.close_after = b"", True
        self.head_sent = True
        self.transport.write(b"".join((status_line(status), fields, self._own_fields(), framing, b"\r\n")))

    async def write(self, data: bytes) -> None:
        """See `Sink`."""
        self.record.bytes += len(data)
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
        if self.transport.get_write_buffer_size() > WRITE_HIGH_BYTES:
            await self._drain()

    def end(self) -> None:
        """See `Sink`."""
        if self.chunked:
            self.transport.write(LAST_CHUNK)

    def cut(self, last: bytes) -> None:
        """See `Sink`."""
        self.close_after = True
        if last:
            self.transport.write(chunk(last) if self.chunked else last)
        else:
            self.gone = True

    def _own_fields(self) -> bytes:
        """Connection and CORS fields."""
        fields = b"Connection: close\r\n" if self.close_after else b""
        if not self.close_after and self.head is not None and self.head.minor == 0:
            fields = b"Connection: keep-alive\r\n"
        if self.origin:
            fields += b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % self.origin
            fields += b"Access-Control-Expose-Headers: *\r\n"
        return fields

    async def _drain(self) -> None:
        """Waits until the client takes more; one that stops reading for too long is dropped."""
        self.deadline.set(self.loop.time() + self.server.config.limits.write_timeout)
        await self.writer.drain()
        self.deadline.set(math.inf)

    # -- the client's clock and its leaving

    def _expired(self) -> None:
        if self.phase in (Phase.IDLE, Phase.CLOSING):
            self.task.cancel()
        elif self.phase in (Phase.HEAD, Phase.BODY):
            self.reader.interrupt(BadMessage(408, "The request did not arrive in time."))
        else:
            self.gone = True
            self.transport.abort()
            self.task.cancel()

    def _ended(self, error: "BaseException | None") -> None:
        if self.phase is not Phase.ANSWER:
            return
        if error is not None or self.transport.is_closing():
            self._leave()
        else:
            self.probes = 0
            self._probe()

    def _leave(self) -> None:
        self.gone = True
        self.task.cancel()

    def _probe(self) -> None:
        """Tells a client that half-closed and still reads from one that left: the latter answers bytes with a reset."""
        if self.phase is not Phase.ANSWER or self.gone:
            return
        plain_socket = self.transport.get_extra_info("socket")
        if self.head is None or self.head.minor == 0 or plain_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._leave()
            return
        if not self.head_sent and self.probes < 2:
            self.transport.write(CONTINUE)
        self.probes += 1
        self.loop.call_later(PROBE_S * min(self.probes, 20), self._probe)


class Call:
    """A request that has passed the doors, as its handler gets it; `path` without /v1."""

    __slots__ = ("body", "client", "head", "key", "path", "query")

    def __init__(
        self,
        client: ClientConnection,
        head: RequestHead,
        body: bytes,
        path: str,
        query: str,
        key: "ClientKey | None",
    ) -> None:
        self.client, self.head, self.body, self.path, self.query, self.key = client, head, body, path, query, key


class Server:
    """The listener, the routes, the doors, and the way down."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop, dial: Dial = dial) -> None:
        self.config, self.loop = config, loop
        self.links = ConnectionPool(dial)
        self.pool = build_pool(config)
        self.relay = Relay(self.pool, self.links, loop.time)
        self.access = AccessLog(loop, write_stderr, config.log_format == "json")
        self.connections: "set[ClientConnection]" = set()
        self.listener: "asyncio.Server | None" = None
        self.stopping = self.draining = False
        self.guards_host = is_loopback(config.host) and (not config.client_keys or bool(config.allowed_hosts))
        self.guards_origin = not config.client_keys or bool(config.allow_origins)
        self.last_host = b""
        self.serial, self.id_prefix = 0, "req_" + secrets.token_hex(6)
        self.models: "dict[str, tuple[float, list[dict[str, Any]]]]" = {}

    def next_id(self) -> str:
        """A request id that no other request has."""
        self.serial += 1
        return "%s%x" % (self.id_prefix, self.serial)

    # -- life

    async def start(self) -> "list[tuple[str, int]]":
        """Listens; the addresses. Raises OSError."""
        tls = server_tls(self.config) if self.config.tls_cert else None
        self.listener = await self.loop.create_server(
            self._protocol, self.config.host, self.config.port, ssl=tls, backlog=BACKLOG, reuse_address=True
        )
        return [one.getsockname()[:2] for one in self.listener.sockets]

    def _protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(WireReader(self.loop), self._connected, loop=self.loop)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, WireReader)
        tune(writer.transport)
        if len(self.connections) >= self.config.limits.connections or self.stopping:
            body = error_body(ProxyError(503, "All connections are taken; try again.", "too_many_connections"))
            head = b"Content-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
            writer.write(b"%b%bContent-Length: %d\r\n\r\n%b" % (status_line(503), head, len(body), body))
            writer.close()
            return
        self.connections.add(ClientConnection(self, reader, writer))

    async def stop(self) -> None:
        """Drains: the status says so, the listener closes, answers finish within their time, the rest is closed."""
        self.draining = True
        if self.config.drain_delay:
            await asyncio.sleep(self.config.drain_delay)
        self.stopping = True
        if self.listener is not None:
            self.listener.close()
        for connection in list(self.connections):
            connection.drain()
        tasks = [connection.task for connection in self.connections]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.config.drain_timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self.links.close()
        self.access.flush()

    # -- doors

    def check_doors(self, head: RequestHead) -> bytes:
        """The Origin that may read the answer, b"" when there is none. Raises ProxyError (403) for a closed door."""
        host = head.index.get(b"host")
        if self.guards_host and host is not None and host != self.last_host and not self._host_allowed(host):
            name = host.decode("latin-1")[:100]
            raise ProxyError(
                403, "The host %r is not known here; add it to allowed_hosts." % name, "host_not_allowed"
            )
        origin = head.index.get(b"origin", b"").strip()
        if not origin:
            return b""
        known = self.config.allow_origins
        if "*" in known or origin.decode("latin-1") in known:
            return origin
        if self.guards_origin:
            name = origin.decode("latin-1")[:100]
            raise ProxyError(
                403, "Pages of %r may not use this server; see cors.allow_origins." % name, "origin_not_allowed"
            )
        return b""

    def _host_allowed(self, value: bytes) -> bool:
        """Whether a Host is one of ours; the last good one is remembered, as clients rarely use two."""
        name = value.decode("latin-1").strip().lower()
        bare = name.rpartition(":")[0] if re.search(r":[0-9]*\Z", name) else name
        bare = bare.strip("[]")
        allowed = self.config.allowed_hosts
        good = bare == self.config.host or is_loopback(bare) or bare in allowed or name in allowed or "*" in allowed
        self.last_host = value if good else self.last_host
        return good

    def check_key(self, head: RequestHead) -> "ClientKey | None":
        """The client key that a request shows; None where none are configured. Raises ProxyError (401)."""
        if not self.config.client_keys:
            return None
        index = head.index
        shown_key = index.get(b"authorization", b"").strip()
        if shown_key[:7].lower() == b"bearer ":
            shown_key = shown_key[7:].strip()
        else:
            shown_key = index.get(b"api-key", index.get(b"x-api-key", b"")).strip()
        digest, found = hashlib.sha256(shown_key).digest(), None
        for key in self.config.client_keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise ProxyError(401, "Incorrect API key provided: it is none of this server's keys.", "invalid_api_key")
        return found

    # -- routes

    async def handle(self, client: ClientConnection, head: RequestHead, body: bytes) -> None:
        """Finds the handler of a request and runs it. Raises ProxyError (404, 405)."""
        _, path, query = split_target(head.target)
        if head.method == "OPTIONS":
            await self._options(client, head)
            return
        name = path[3:] if path.startswith("/v1/") else path
        route = "/models/*" if name.startswith("/models/") and len(name) > 8 else name.rstrip("/") or "/"
        if route not in ROUTES:
            message = "There is no %s here; see /v1/chat/completions, /v1/models, /status." % path[:200]
            raise ProxyError(404, message, "unknown_url")
        method, handler = ROUTES[route]
        if head.method != method and (head.method, method) != ("HEAD", "GET"):
            allow = "GET, HEAD, OPTIONS" if method == "GET" else method + ", OPTIONS"
            fields = b"Allow: %b\r\n" % allow.encode()
            raise ProxyError(405, "%s takes %s." % (path[:200], allow), "method_not_allowed", headers=fields)
        key = self.check_key(head) if name != "/status" else None
        client.record.key = key.name if key else ""
        await handler(self, Call(client, head, body, name, query, key))

    async def _options(self, client: ClientConnection, head: RequestHead) -> None:
        """A CORS preflight, or the plain question what is allowed."""
        client.record.status = 204
        fields = b"Allow: GET, HEAD, POST, OPTIONS\r\n"
        if client.origin:
            asked = head.index.get(b"access-control-request-headers", b"*")
            fields += b"Access-Control-Allow-Methods: GET, POST, OPTIONS\r\nAccess-Control-Max-Age: 600\r\n"
            fields += b"Access-Control-Allow-Headers: %b\r\n" % asked
        await client.whole(204, fields, b"")

    async def _status(self, call: Call) -> None:
        if self.draining:
            await call.client.json({"status": "draining"}, 503)
        else:
            await call.client.json({"status": "ok"})

    async def _chat(self, call: Call) -> None:
        client, head = call.client, call.head
        if b"content-encoding" in head.index and head.index[b"content-encoding"].strip().lower() != b"identity":
            raise ProxyError(415, "A compressed request body is not understood; send it plain.", "unsupported_encoding")
        data, sent = parse_chat(call.body)
        request = ApiRequest("POST", "/chat/completions", call.query, json_fields(forwarded_fields(head)), sent)
        request.data, request.model, request.stream = data, data["model"], data.get("stream") is True
        request.stateful = data.get("store") is True
        request.request_id = client.record.request_id
        request.prompt_tokens, request.max_tokens = estimate_prompt(data), answer_limit(data)
        client.record.model = request.model[:MODEL_NAME_CHARS]
        if call.key and call.key.models:
            check_model_allowed(call.key, request.model, call.body)
        await self.relay.run(request, client, client.record)

    async def _list(self, call: Call) -> None:
        await call.client.json({"object": "list", "data": await self._all_models()})

    async def _model(self, call: Call) -> None:
        name = call.path[len("/models/") :]
        for model in await self._all_models():
            if model["id"] == name:
                await call.client.json(model)
                return
        raise ProxyError(404, "The model %r is served by no controller here." % name[:100], "model_not_found")

    # -- the list of models

    async def _all_models(self) -> "list[dict[str, Any]]":
        """The configured models, and those of the upstreams that have no list; the first of each name."""
        found = {name: model_object(name) for name in self.pool.configured_models()}
        open_ended = [one for one in self.pool.upstreams if not one.config.models and one.config.type != "echo"]
        for models in await asyncio.gather(*map(self._models_of, open_ended)):
            for model in models:
                found.setdefault(model["id"], model)
        return [found[name] for name in sorted(found)]

    async def _models_of(self, upstream: Upstream) -> "list[dict[str, Any]]":
        """An upstream's models, asked at most every few minutes; the last known ones while it fails."""
        until, models = self.models.get(upstream.name, (0.0, []))
        if self.loop.time() < until:
            return models
        request = ApiRequest("GET", "/models", "", [(b"Accept", b"application/json")], b"")
        try:
            async with asyncio.timeout(MODELS_TIMEOUT_S):
                models = await fetch_models(upstream.controller.exchange(request, self.links, _nothing))
            self.models[upstream.name] = (self.loop.time() + MODELS_TTL_S, models)
        except (UpstreamError, TimeoutError) as problem:
            log.warning("the models of %s are not known: %s", upstream.name, str(problem) or "no answer in time")
            self.models[upstream.name] = (self.loop.time() + MODELS_TIMEOUT_S, models)
        return models


Handler = Callable[[Server, Call], Awaitable[None]]
ROUTES: "dict[str, tuple[str, Handler]]" = {
    "/chat/completions": ("POST", Server._chat),
    "/models": ("GET", Server._list),
    "/models/*": ("GET", Server._model),
    "/status": ("GET", Server._status),
}


def check_model_allowed(key: ClientKey, model: str, body: bytes) -> None:
    """Refuses a model that is not among the key's (403), and a body that two readers could read differently (400)."""
    if top_level_count(body, "model") > 1:
        raise ProxyError(400, "model stands twice in the body.", param="model")
    if not model_patterns(key.models).fullmatch(model):
        message = "Your key may not use the model %r; it may use: %s." % (model[:64], ", ".join(key.models))
        raise ProxyError(403, message, "model_not_allowed", param="model")


def model_object(name: str) -> "dict[str, Any]":
    """A model as `GET /v1/models` lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "chatgpt-apiserver"}


async def fetch_models(exchange: Exchange) -> "list[dict[str, Any]]":
    """The model objects of an upstream's list. Raises UpstreamError."""
    try:
        await exchange.start()
        body = b""
        while len(body) <= WHOLE_BYTES:
            piece = await exchange.read()
            if not piece:
                break
            body += piece
        exchange.finish()
    finally:
        exchange.abort()
    try:
        found = json.loads(body)["data"] if exchange.head.status == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise BadReply("status %d instead of a list of models" % exchange.head.status)
    return [model for model in found if isinstance(model, dict) and isinstance(model.get("id"), str)]


def json_fields(fields: Fields) -> Fields:
    """`fields` with the content type that the parsed body has: curl's default is a form's."""
    for name, value in fields:
        if name.lower() == b"content-type" and b"json" in value:
            return fields
    kept = [field for field in fields if field[0].lower() != b"content-type"]
    return [*kept, (b"Content-Type", b"application/json")]


def build_pool(config: Config) -> UpstreamPool:
    """The pool that a configuration describes."""
    upstreams = [
        Upstream(one, CONTROLLERS[one.type](one), position) for position, one in enumerate(config.controllers)
    ]
    return UpstreamPool(upstreams, POLICIES[config.pool.type]())


def server_tls(config: Config) -> ssl.SSLContext:
    """The listener's TLS: 1.2 or newer. Raises ConfigError when certificate and key do not fit."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (ssl.SSLError, OSError) as problem:
        raise ConfigError("%s: tls: certificate and key cannot be used: %s" % (config.source, problem)) from problem
    return context


def write_stderr(text: str) -> None:
    """Writes access lines, unbuffered."""
    sys.stderr.write(text)
    sys.stderr.flush()


# ==== 12. Command line ====
# Flags, start, signals, exit status: 0 after a drain, 2 for a configuration that cannot be used, 1 for an address that
# cannot be listened on.


def parse_args(argv: "list[str]") -> argparse.Namespace:
    """The flags; each with underscores or dashes."""
    parser = argparse.ArgumentParser(
        prog="chatgpt_apiserver.py", description="Several rate-limited OpenAI-style accounts behind one endpoint."
    )
    parser.add_argument("--config_file", "--config-file", metavar="FILE", default="", help="the configuration")
    parser.add_argument("--config_path", "--config-path", metavar="DIR", default="", help="a folder to look for it in")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", help="port to listen on (default 8080)")
    parser.add_argument("--check", action="store_true", help="validate, print a summary without secrets, exit")
    parser.add_argument("--demo", action="store_true", help="run without any key, on echo controllers")
    parser.add_argument("--version", action="version", version="chatgpt_apiserver " + __version__)
    return parser.parse_args(argv)


def raise_open_files() -> None:
    """Raises the limit on open files as far as allowed: a stream takes two."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(config: Config) -> None:
    """Runs the server until a signal asks it to stop. Raises OSError when it cannot listen."""
    loop = asyncio.get_running_loop()
    server = Server(config, loop)
    stop = asyncio.Event()

    def ask() -> None:
        if stop.is_set():
            log.warning("second signal: closing now")
            os._exit(1)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP: this version does not reload; restart it")
    for host, port in await server.start():
        shown_host = "[%s]" % host if ":" in host else host
        log.info("listening on %s://%s:%d", "https" if config.tls_cert else "http", shown_host, port)
    gc.collect()
    gc.set_threshold(20_000, 20, 50)  # requests make few cycles; the default looks for them every few requests
    gc.freeze()  # what start-up made lives as long as the process
    await stop.wait()
    log.info("stopping: %d connections open", len(server.connections))
    await server.stop()
    log.info("stopped")


def run(config: Config) -> int:
    """Serves; the exit status."""
    try:
        asyncio.run(serve(config))
    except OSError as error:
        print("cannot listen on %s:%d: %s" % (config.host, config.port, error), file=sys.stderr)
        return 1
    return 0


def main(argv: "list[str] | None" = None) -> int:
    """Runs the command line; the exit status."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        flags = {"host": args.host, "port": args.port}
        config = load_config(args.config_file, args.config_path, flags, os.environ, args.demo)
        if args.check:
            if config.tls_cert:
                server_tls(config)
            print("\n".join(["good: " + config.source, *describe(config)]))
            return 0
        set_up_logging(config)
        for line in describe(config)[:-1]:
            log.info("%s", line)
        if not is_loopback(config.host) and not config.client_keys:
            log.warning("ANYONE WHO CAN REACH %s:%d CAN SPEND THESE KEYS: no client_keys", config.host, config.port)
        raise_open_files()
        shrink_tls_buffers()
        return run(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
