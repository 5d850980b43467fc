#!/usr/bin/env python3
"""chatgpt_apiserver: several rate-limited OpenAI-style accounts behind one endpoint.

Copy this file to a machine that has Python 3.11 or newer, start it, and point any OpenAI client at it:

    python3 chatgpt_apiserver.py --demo                     (no key needed: it echoes the prompt)
    OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py      (one account, from the environment)
    python3 chatgpt_apiserver.py --config_file my.json      (many accounts; README.md lists every key)

The path of a request, with the sections of this file that it passes:

    client --> Server: read the head and the body, check access, choose a route       (4, 6, 16)
           --> Relay: make one attempt after another until a controller answers       (13)
                 --> Balancing: choose a controller that has room, or wait in line    (11, 12)
                 --> Controllers: build the request for this account's API            (8, 9)
                 --> Upstream connections: send it on a pooled or new connection      (7)
                 --> Outcomes: judge the reply; may another controller be tried?      (10)
           <-- Relay: hold the answer until its first real event, then forward it     (5, 13)

Each section uses only the sections above it:

    1. Errors
    2. Configuration
    3. Observability
    4. HTTP/1.1 on the wire
    5. Server-sent events
    6. Timed streams
    7. Upstream connections
    8. Translations
    9. Controllers
    10. Outcomes
    11. Quotas and health
    12. Balancing
    13. Relay
    14. Metrics and usage
    15. Page
    16. Server
    17. Command line
"""

import sys

if sys.version_info < (3, 11):  # before the imports that older versions do not have
    sys.exit("chatgpt_apiserver needs Python 3.11 or newer; this is Python " + sys.version.split()[0])

import signal

# They wait from here on until `serve` handles them: SIGHUP would end a program that is still starting.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

import argparse
import asyncio
import base64
import bisect
import contextlib
import datetime as dt
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import random
import re
import resource
import secrets
import select
import socket
import sqlite3
import ssl
import struct
import tempfile
import threading
import time
import tomllib
import traceback
import urllib.parse
import urllib.request
import zlib
import zoneinfo
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, NoReturn, Protocol, TypeVar, get_type_hints

__version__ = "1.0.0"

log = logging.getLogger("chatgpt_apiserver")


# ==== 1. Errors ====
# Every way to fail. `error_body` is the only place that turns an error into JSON. Section 10 decides about retries.


class ProxyError(Exception):
    """An error answer of this server itself.

    It has the HTTP status, a message, OpenAI's error code, the parameter at fault, and extra header lines with CRLF.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, *, param: str | None = None, headers: bytes = b""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def type(self) -> str:
        """Return the `error.type` that OpenAI uses for this status; frameworks above the SDKs read it."""
        if self.status == 429:
            return self.code if self.code == "insufficient_quota" else "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


class BadMessage(ProxyError):
    """A message breaks HTTP's grammar or a limit. A client gets the answer, then a close (RFC 9112, 9.6).

    Section 7 makes it a BadReply if the message is a reply of an upstream.
    """


class Untranslatable(ProxyError):
    """The account's API cannot express this request: `field` is the path of the parameter, `why` the reason.

    Nothing was sent. The next controller is tried, since another account may have other `drop_params`.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(400, f"{field} {why}", "unsupported_parameter", param=field)
        self.field, self.why = field, why


class UpstreamError(Exception):
    """An attempt failed without a complete reply. A reply with an error status is no exception.

    `sent`: the upstream may have seen the request. `before_reply`: no byte of the reply had arrived. `status` and
    `code` go to the client if no other controller answers; SDKs and load balancers retry a 502 and a 504.
    """

    status = 502
    code = "upstream_error"
    sent = True

    def __init__(self, message: str, before_reply: bool = False) -> None:
        super().__init__(message)
        self.before_reply = before_reply


class ConnectFailed(UpstreamError):
    """DNS, TCP, TLS or the proxy failed. Nothing of the request was sent."""

    code = "upstream_unreachable"
    sent = False


class UpstreamClosed(UpstreamError):
    """The upstream closed or reset the connection."""

    code = "upstream_closed"


class UpstreamTimeout(UpstreamError):
    """The upstream was silent for too long."""

    status = 504
    code = "upstream_timeout"


class BadReply(UpstreamError):
    """The upstream's reply breaks HTTP's grammar or a limit."""

    code = "upstream_bad_reply"


class ClientGone(Exception):
    """The client closed its connection during its request. This counts against no account."""


def error_object(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object; it always has all four keys (openai-openapi, `Error`)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def compact_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8 without white space; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error_body(error: ProxyError | UpstreamError) -> bytes:
    """Return the JSON body that reports `error` to a client."""
    kind, param = (error.type, error.param) if isinstance(error, ProxyError) else ("server_error", None)
    return compact_json(error_object(str(error), kind, error.code, param))


# ==== 2. Configuration ====
# One JSON or TOML mapping becomes frozen dataclasses. Each key is declared once: its default, and in its annotation the
# function that checks it. Unknown keys are errors: a server that ignored one could run without a limit that it should
# have. Every message names the file, the path in it, what was found and what is allowed.

KEY_CHARS = 16  # shorter client keys can be guessed
POOL_TYPES = ("balanced", "random", "least_busy", "fastest", "priority")
FIXED_PARAMS = ("model", "messages", "stream")  # routing and relaying depend on them
CONFIG_NAMES = ("chatgpt-apiserver.json", "chatgpt-apiserver.toml")
CONFIG_FOLDERS = (".", ".config", "/etc/chatgpt-apiserver")
ENV_PREFIX = "CHATGPT_APISERVER_"
OPENAI_URL = "https://api.openai.com/v1"
ANTHROPIC_URL = "https://api.anthropic.com/v1"
AZURE_API_VERSION = "2024-10-21"  # the newest stable version of the classic surface
ORIGIN = r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/*\s]+"  # editors and mobile apps have schemes of their own
ORIGIN_IS = 'scheme://host[:port] without a path, "null" or "*"'
VARIABLE = re.compile(r"\$(\{)?(\w+)(?(1)\})")  # $NAME, ${NAME}

_BARE_KEY = {"auth_header": "api-key", "auth_scheme": ""}
# For APIs that refuse or ignore the newer name.
_OLD_LIMIT = {"max_completion_tokens": "max_tokens"}
# Messages of other vendors and of this server have fields that some APIs refuse. Some do not know the role `developer`.
# DeepSeek and Moonshot need reasoning_content back with the results of tools (api-docs.deepseek.com, "Thinking Mode").
_NO_FIELDS, _NO_ROLE = ["reasoning_content", "thinking_blocks"], ["developer"]
_MISTRAL = {"rename_params": {**_OLD_LIMIT, "seed": "random_seed"}, "refuses": [*_NO_FIELDS, *_NO_ROLE]}
# The code is a rate limit at DashScope (openclaw PR 148275); elsewhere it means that no credit is left.
_DASHSCOPE = {"rate_codes": ["insufficient_quota"], "refuses": _NO_ROLE}
# Defaults of `config`, by controller type. Words in braces are further keys, which the user must set.
PRESETS: dict[str, dict[str, Any]] = {
    "openai": {"base_url": OPENAI_URL},
    "azure": _BARE_KEY,
    "anthropic": {**_BARE_KEY, "auth_header": "x-api-key", "base_url": ANTHROPIC_URL, "chat_path": "/messages"},
    "echo": {},
    "bedrock": {"base_url": "https://bedrock-runtime.{region}.amazonaws.com/openai/v1"},
    "bedrock-mantle": {"base_url": "https://bedrock-mantle.{region}.api.aws/v1"},
    "cerebras": {"base_url": "https://api.cerebras.ai/v1", "refuses": [*_NO_FIELDS, *_NO_ROLE]},
    "cloudflare": {"base_url": "https://api.cloudflare.com/client/v4/accounts/{account}/ai/v1", "refuses": _NO_ROLE},
    # Refuses stream_options (strandsagents.com, "Cohere").
    "cohere": {"base_url": "https://api.cohere.ai/compatibility/v1", "drop_params": ["stream_options"]},
    "dashscope": {"base_url": "https://dashscope.aliyuncs.com/compatible-mode/v1", **_DASHSCOPE},
    "dashscope-intl": {"base_url": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1", **_DASHSCOPE},
    "deepseek": {"base_url": "https://api.deepseek.com/v1", "rename_params": _OLD_LIMIT, "refuses": _NO_ROLE},
    "fireworks": {"base_url": "https://api.fireworks.ai/inference/v1"},
    "gemini": {"base_url": "https://generativelanguage.googleapis.com/v1beta/openai", "refuses": _NO_FIELDS},
    "groq": {"base_url": "https://api.groq.com/openai/v1", "refuses": _NO_FIELDS},
    "huggingface": {"base_url": "https://router.huggingface.co/v1"},
    "llamacpp": {"base_url": "http://localhost:8080/v1"},
    "lmstudio": {"base_url": "http://localhost:1234/v1", "rename_params": _OLD_LIMIT, "refuses": _NO_ROLE},
    # It refuses stream_options, and sends usage without it.
    "mistral": {"base_url": "https://api.mistral.ai/v1", "drop_params": ["stream_options"], **_MISTRAL},
    "moonshot": {"base_url": "https://api.moonshot.ai/v1", "refuses": _NO_ROLE},
    "moonshot-cn": {"base_url": "https://api.moonshot.cn/v1", "refuses": _NO_ROLE},
    "nvidia": {"base_url": "https://integrate.api.nvidia.com/v1", "rename_params": _OLD_LIMIT, "refuses": _NO_ROLE},
    "ollama": {"base_url": "http://localhost:11434/v1", "rename_params": _OLD_LIMIT},
    "openrouter": {"base_url": "https://openrouter.ai/api/v1"},
    "perplexity": {"base_url": "https://api.perplexity.ai", "rename_params": _OLD_LIMIT},
    "sglang": {"base_url": "http://localhost:30000/v1"},
    "tgi": {"base_url": "http://localhost:8080/v1"},
    "together": {"base_url": "https://api.together.xyz/v1", "refuses": _NO_ROLE},
    "vllm": {"base_url": "http://localhost:8000/v1"},
    "xai": {"base_url": "https://api.x.ai/v1", "refuses": _NO_ROLE},
    "zai": {"base_url": "https://api.z.ai/api/paas/v4", "rename_params": _OLD_LIMIT, "refuses": _NO_ROLE},
    "zhipu": {"base_url": "https://open.bigmodel.cn/api/paas/v4", "rename_params": _OLD_LIMIT, "refuses": _NO_ROLE},
}
# Products and companies that people write in place of a type; for hints only.
OTHER_NAMES = {"google": "gemini", "claude": "anthropic", "aws": "bedrock", "grok": "xai", "kimi": "moonshot"}


@dataclass(frozen=True, repr=False)
class Secret:
    """A value that is never shown: `reveal()` returns it, printing it in any way gives `sk-…last4`."""

    # Not a subclass of str, which would be joined, sliced and written as JSON as it is.
    _value: str = ""

    def reveal(self) -> str:
        """Return the value, for the header or connection that needs it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        if not self._value:
            return "none"
        start = "sk-" if self._value.startswith("sk-") else ""
        return start + "…" + (self._value[-4:] if len(self._value) >= 12 else "")


# Text that may be a key in a wrong place: it has a vendor's prefix, or mixes letters and digits in at least 16
# characters (a word with a number behind it does not), or is a UUID, or stands before the @ of a URL.
KEY_LIKE = re.compile(
    r"\bsk-[\w\-]{4,}|\b(?:gsk_|hf_|fw_|xai-|csk-|pplx-|nvapi-|AIza|ABSK|eyJ)[\w.+/=\-]{12,}"
    r"|(?i:\b(?:bearer|basic) )[^\s\"']+|(?<=//)[^\s\"]+(?=@)"
    r"|(?<![\w/])(?=[A-Za-z]*\d+[A-Za-z])[A-Za-z0-9]{16,}|(?<![\w/\-])(?=(?:[\w\-]*?\d[A-Za-z]){3})[\w\-]{16,}"
)


def mask_keys(text: str) -> str:
    """Return `text` with everything that may be a key shown as `Secret` shows it."""
    return KEY_LIKE.sub(lambda match: repr(Secret(match.group())), text)


class ConfigError(Exception):
    """A configuration that cannot be used. The message shows no key, wherever in the configuration it was pasted."""

    def __init__(self, message: str) -> None:
        super().__init__(mask_keys(message))


def reason_of(error: Exception) -> str:
    """Return the reason of an error in words, without the number and the file name of an OSError."""
    return getattr(error, "strerror", None) or str(error)


def json_type(value: Any) -> str:
    """Return the JSON name of the value's type, for messages that must not show the value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return {**names, int: "a number", float: "a number"}.get(type(value), "another type")


def show(value: Any) -> str:
    """Return `value` for a message: what may be a key is masked, and a long value is only described."""
    # Objects and lists may hold keys. Most keys are longer than 40 characters.
    if value and isinstance(value, (dict, list)):
        return json_type(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return mask_keys(text) if len(text) <= 42 else f"a value of {len(str(value))} characters"


def suggest(word: str, known: Collection[str]) -> str:
    """Return a hint for a misspelt word, ignoring case; "" if no known word is close."""
    names = {name.lower(): name for name in known}
    names.update((other, name) for other, name in OTHER_NAMES.items() if name in known)
    close = difflib.get_close_matches(word.lower(), sorted(names), 1)
    return f"did you mean {names[close[0]]!r}?" if close else ""


def path_beside(source: str, name: str) -> str:
    """Return the path of a file that this server makes: in the folder of `source`, or where an absolute name says."""
    return os.path.join(os.path.dirname(source), name)


def resolve_path(source: str, name: str) -> str:
    """Return the path of a file that `source` names: beside `source` if it exists there, else as it is."""
    near = path_beside(source, name)
    return near if os.path.exists(near) else name


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ValueError if a key stands in it twice; json.loads would use the last value."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key {name!r} stands twice in one object")
    return dict(pairs)


def read_file(path: str) -> Any:
    """Return the mapping in a JSON or TOML file. Raise ConfigError with line and column."""
    try:
        # Windows editors write a byte order mark.
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        return tomllib.loads(text) if path.endswith(".toml") else json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        hint = "; is there a comma too many?" if error.doc[: error.pos].rstrip().endswith(",") else ""
        # A line that begins with a name and a colon, or with a dash, is YAML.
        yaml = path.endswith((".yaml", ".yml")) or re.match(r"\s*(#.*\s+)*(---|- |\w+:(\s|$))", error.doc)
        hint = "; this is YAML, which is not supported: use JSON or TOML" if yaml else hint
        comment = error.doc[error.pos : error.pos + 2] in ("//", "/*") or error.doc[error.pos : error.pos + 1] == "#"
        hint = "; JSON has no comments: remove it, or write the file in TOML" if comment and not yaml else hint
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason_of(error)}") from error


# For a hint about a misplaced key, the paths of all objects that may have it: for `api_key`, ["controllers[].config"].
# It is filled below the records.
KEY_PATHS: dict[str, list[str]] = {}


@dataclass(frozen=True)
class Place:
    """Where a value stands: the file, the path in it, and the environment that `$NAME` refers to."""

    source: str
    env: Mapping[str, str]
    # By path, the flag or variable that overrides the file there.
    setters: Mapping[str, str]
    path: str = ""

    def inside(self, key: str | int) -> "Place":
        """Return the place of an object's member or a list's item."""
        if isinstance(key, int):
            return replace(self, path=f"{self.path}[{key}]")
        # A line end would make two lines of a message.
        key = key if key.isprintable() else ascii(key)[1:-1]
        return replace(self, path=f"{self.path}.{key}" if self.path else key)

    def problem(self, message: str) -> ConfigError:
        """Return an error about the value that stands here."""
        setter = self.setters.get(self.path) or f"{self.source}: {self.path or 'top level'}"
        return ConfigError(f"{setter}: {message}")

    def error(self, found: str, allowed: str) -> ConfigError:
        """Return the error for a value that is not allowed here."""
        return self.problem(f"found {found}, allowed: {allowed}")

    def refuse_unknown(self, data: Mapping[str, Any], known: Collection[str]) -> None:
        """Raise ConfigError for keys that are not in `known`, with the nearest name or the key's right place."""
        mistakes = []
        for key in [key for key in data if key not in known]:
            hint = suggest(key, known)
            # In a `config_file`, whose top level is a `config`, the path would mislead.
            if not hint and (self.path or "controllers" in known):
                here = re.sub(r"\[\d+\]", "[]", self.path)
                hint = " or ".join(path for path in KEY_PATHS.get(key, ()) if path != here)
                hint = hint and "its place is " + hint
            hint = hint or "allowed here: " + ", ".join(sorted(known))
            mistakes.append(str(self.inside(key).problem("unknown key; " + hint)))
        if mistakes:
            raise ConfigError("\n".join(mistakes))


def gather(*checks: Callable[[], Any]) -> list[Any]:
    """Return the results of all checks. Raise ConfigError with the mistakes of those that failed, a line each."""
    results, mistakes = [], []
    for check in checks:
        try:
            results.append(check())
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return results


# -- checks: each takes a place, the value that stands there, and the arguments that the key's annotation adds. It
# returns the value that the server uses, or raises ConfigError.

Check = Callable[..., Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def check_type(place: Place, value: Any, kind: type, allowed: str) -> Any:
    """Return a value of type `kind`. Another one is not shown: it may be a misplaced key (`"config": "sk-..."`)."""
    if isinstance(value, kind):
        return value
    raise place.error(json_type(value), allowed)


def check_object(place: Place, value: Any) -> dict[str, Any]:
    """Return a JSON object."""
    return dict(check_type(place, value, dict, "an object, {...}"))


def check_list(place: Place, value: Any, check: Check, *args: Any) -> tuple[Any, ...]:
    """Return a list as a tuple of checked items."""
    items = check_type(place, value, list, "a list, [...]")
    return tuple(gather(*[partial(check, place.inside(number), item, *args) for number, item in enumerate(items)]))


def check_number(place: Place, value: Any, low: float, high: float, otherwise: str = "") -> float:
    """Return a number from `low` to `high`, a whole one if `low` is an int. The message ends with `otherwise`."""
    whole = isinstance(low, int)
    # Templates, flags and variables have numbers as text.
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}" if whole else r"-?[0-9]{1,18}(\.[0-9]{1,9})?", value):
        value = int(value) if whole else float(value)
    # Not isinstance: a bool is an int.
    if type(value) in ((int,) if whole else (int, float)) and low <= value <= high:
        return value if whole else float(value)
    raise place.error(show(value), f"a {'whole ' * whole}number from {low:.15g} to {high:.15g}{otherwise}")


def check_text(place: Place, value: Any, pattern: str = ".+", allowed: str = "a non-empty string") -> str:
    """Return a string that matches `pattern`; `allowed` describes the pattern."""
    text: str = check_type(place, value, str, allowed)
    if VARIABLE.fullmatch(text):
        raise place.error(show(text), "the text itself; variables work for keys, proxies and headers only")
    # Such a character would break a line of the log, or a header.
    if not text.isprintable():
        raise place.problem("contains a character that cannot be printed")
    if not re.fullmatch(pattern, text):
        raise place.error(show(text), allowed)
    return text


def check_field_name(place: Place, value: Any) -> str:
    """Return the name of a header that does not frame messages: such a header could smuggle a second request."""
    framing = "host|content-length|transfer-encoding|connection|expect|upgrade|te|trailer"
    pattern = rf"(?!(?i:{framing})\Z)[!#$%&'*+.^_`|~0-9A-Za-z-]+"
    return check_text(place, value, pattern, "a header name (RFC 9110, 5.1) that does not frame messages")


def check_choice(place: Place, value: Any, names: Collection[str]) -> str:
    """Return one of `names`."""
    if isinstance(value, str) and value in names:
        return value
    hint = suggest(str(value), names)
    raise place.problem(f"found {show(value)}; {hint}") if hint else place.error(show(value), " | ".join(names))


def check_pairs(place: Place, value: Any, check_name: Check, check: Check, *args: Any) -> tuple[tuple[str, Any], ...]:
    """Return an object as pairs of checked names and checked values."""
    members = [(place.inside(name), name, item) for name, item in check_object(place, value).items()]
    names = gather(*[partial(check_name, at, name) for at, name, _ in members])
    return tuple(zip(names, gather(*[partial(check, at, item, *args) for at, _, item in members]), strict=True))


def check_secret(place: Place, value: Any) -> Secret:
    """Return a secret from a literal, `$NAME`, `${NAME}` or `file:PATH`. No message shows the value."""
    value = check_type(place, value, str, "a string, $NAME or file:PATH")
    variable = VARIABLE.fullmatch(value)
    if variable:
        value = place.env.get(variable.group(2))
        if not value:
            raise place.problem(f"the environment variable {variable.group(2)} is not set")
    elif value.startswith("${"):
        # Like the shell's ${NAME:-default}; "$" alone may begin a password.
        raise place.error("${ and more than a name", "a literal, $NAME, ${NAME} or file:PATH")
    elif value.startswith("file:"):
        try:
            with open(resolve_path(place.source, value[5:]), encoding="utf-8") as file:
                value = file.read()
        except (OSError, ValueError) as error:
            raise place.problem(f"cannot read the file {show(value[5:])}: {reason_of(error)}") from error
    # `echo` and editors end a file with a line end, which no header can hold.
    value = value.strip()
    if not (value.isascii() and value.isprintable()):
        raise place.error("a character outside printable ASCII", "printable ASCII (it goes into a header)")
    return Secret(value)


def check_file(place: Place, value: Any, certificates: bool = False) -> str:
    """Return the path of a file that exists. Load certificates, so that bad ones fail at the start."""
    name = check_text(place, value, ".*", "a string")
    path = resolve_path(place.source, name) if name else ""
    if path and not os.path.isfile(path):
        raise place.problem(f"no file {show(name)} beside the configuration or in the working directory")
    try:
        if path and certificates:
            ssl.create_default_context(cafile=path)
    except OSError as error:  # SSLError is a subclass
        raise place.error(show(path), f"a file of PEM certificates ({reason_of(error)})") from error
    return path


def check_listen_host(place: Place, value: Any) -> str:
    """Return the name or address to listen on: an IPv6 address may stand in brackets, and is returned without them."""
    pattern = r"[^/*\s\[\]:]*|(\[)?[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:.]*(?:%[\w.-]+)?(?(1)\])"
    allowed = "a name or an address of this machine, without scheme and port"
    return check_text(place, value, pattern, allowed).strip("[]")


def check_host_name(place: Place, value: Any) -> str:
    """Return a host as clients may name it, in lower case."""
    return check_text(place, value, r"\*|[^/*\s]+", 'a host with or without port, or "*" for all').lower()


def check_network(place: Place, value: Any) -> Network:
    """Return an address, or a network in CIDR form."""
    text = check_text(place, value)
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise place.error(show(text), "an address, or a network such as 10.0.0.0/8 without host bits") from None


def zone_of(name: str) -> dt.tzinfo:
    """Return a time zone by its IANA name. Raise ValueError. UTC needs no time zone data."""
    try:
        return dt.UTC if name == "UTC" else zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise ValueError(f"no time zone {name!r}") from error


def check_zone(place: Place, value: Any) -> str:
    """Return the name of a time zone."""
    name = check_text(place, value, "[A-Za-z0-9_+/-]+", "a time zone such as UTC or America/Los_Angeles")
    try:
        zone_of(name)
    except ValueError:
        raise place.error(show(name), "UTC, or an IANA time zone that this system knows (package tzdata)") from None
    return name


def check_moment(place: Place, value: Any) -> dt.datetime:
    """Return a time, or the beginning of a day in UTC, of RFC 3339. TOML has dates and times of its own."""
    allowed = "a time such as 2027-01-31T12:00:00Z, or a day such as 2027-01-31"
    try:
        moment = dt.datetime.fromisoformat(str(value))
    except ValueError:
        raise place.error(show(value), allowed) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def check_url(place: Place, url: str, scheme: str, forbidden: str, allowed: str) -> str:
    """Return a URL that requests can be sent to; `scheme` and `forbidden` are patterns, `allowed` describes them."""
    # urllib alone would remove line ends and blanks from the URL before it looks at it.
    try:
        parts = urllib.parse.urlsplit(url)
        valid = re.fullmatch(scheme, parts.scheme) and parts.hostname and parts.port != 0
    except ValueError:
        # The brackets do not match, or the port is not a number.
        valid = False
    if not valid or re.search("[^!-~]|" + forbidden, url):
        # The rest may hold a password.
        start = re.match("[a-z0-9]+://", url)
        raise place.error((start.group() if start else "a value without http://") + "…", allowed)
    return url


def check_base_url(place: Place, value: Any) -> str:
    """Return the URL of an API without its trailing slash."""
    allowed = "http://host[:port][/path] or https://host[:port][/path], without ?, # and @"
    return check_url(place, check_text(place, value), "https?", "[?#@]", allowed).rstrip("/")


def check_proxy(place: Place, value: Any) -> Secret:
    """Return the URL of a proxy; it is a secret because it may hold a password."""
    proxy = check_secret(place, value)
    allowed = "http://host:port, with user:password@ before the host if needed (HTTPS and SOCKS are not supported)"
    return Secret(check_url(place, proxy.reveal(), "http", "[?#]", allowed)) if proxy else proxy


def check_rescue_after(place: Place, value: Any) -> float | None:
    """Return seconds, or None for "auto"."""
    return None if value == "auto" else check_number(place, value, 0.0, 3600.0, ', or "auto"')


def check_extra_body(place: Place, value: Any) -> tuple[tuple[str, Any], ...]:
    """Return what is added to every chat. TOML has dates and both formats have NaN, which JSON cannot hold."""
    try:
        json.dumps(check_object(place, value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise place.error(show(value), f"JSON values ({error})") from None
    return tuple(value.items())


@functools.cache
def checks_of(record: type) -> dict[str, Any]:
    """Return what checks each key of `record`: another record, or a function and its further arguments."""
    # A field without a default is no key: its parser fills it in.
    hints = get_type_hints(record, include_extras=True)
    keys = {item.name: hints[item.name] for item in fields(record) if item.default is not MISSING}
    return {key: hint if is_dataclass(hint) else hint.__metadata__ for key, hint in keys.items()}


def check_keys(place: Place, value: Any, record: type, *others: str) -> dict[str, Any]:
    """Return the checked values of an object that may have the keys of `record` and `others`. Null counts as absent."""
    data, checks = check_object(place, value), checks_of(record)

    def check_key(key: str, check: Any) -> Any:
        if isinstance(check, type):
            return check(**check_keys(place.inside(key), data[key], check))
        return check[0](place.inside(key), data[key], *check[1:])

    given = {key: check for key, check in checks.items() if data.get(key) is not None}
    known = partial(place.refuse_unknown, data, [*others, *checks])
    _, *values = gather(known, *[partial(check_key, key, check) for key, check in given.items()])
    return dict(zip(given, values, strict=True))


def check_members(place: Place, value: Any, parse: Callable[..., Any]) -> tuple[Any, ...]:
    """Return a list of records with different names. `parse` gets a place, an item and the records before it."""
    members: list[Any] = []

    def check_member(number: int, item: Any) -> None:
        member = parse(place.inside(number), item, members)
        if member.name in [other.name for other in members]:
            at = place.inside(number).inside("name")
            raise at.error(show(member.name), "a name that no other in this list has")
        members.append(member)

    items = check_type(place, value, list, "a list, [...]")
    gather(*[partial(check_member, number, item) for number, item in enumerate(items)])
    return tuple(members)


Text = Annotated[str, check_text, ".*", "a string"]
Flag = Annotated[bool, check_type, bool, "true or false"]
Words = Annotated[tuple[str, ...], check_list, check_text]
Pairs = Annotated[tuple[tuple[str, str], ...], check_pairs, check_text, check_text]
Fallbacks = Annotated[tuple[tuple[str, tuple[str, ...]], ...], check_pairs, check_text, check_list, check_text]
Seconds = Annotated[float, check_number, 0.0, 3600.0]
Timeout = Annotated[float, check_number, 0.001, 86400.0]  # without 0: these waits must end


# -- records: README.md explains the keys, and a test compares them with it. Values are tuples, not lists, as a reload
# compares records to find what has changed.


@dataclass(frozen=True)
class Timeouts:
    """Seconds; 0 means no limit. `first_byte` None: 120 for streams, 600 for whole answers, as in the SDKs."""

    # Never unlimited: the kernel would wait two minutes.
    connect: Timeout = 10.0
    first_byte: Annotated[float | None, check_number, 0.0, 86400.0] = None
    idle: Annotated[float, check_number, 0.0, 86400.0] = 300.0
    total: Annotated[float, check_number, 0.0, 86400.0] = 0.0


@dataclass(frozen=True)
class QuotaLimits:
    """Requests and tokens in any sliding 60 s and in a day, requests at once, and how many seconds' worth at once.

    0: no limit.
    """

    rpm: Annotated[int, check_number, 0, 10_000_000] = 0
    tpm: Annotated[int, check_number, 0, 10**12] = 0
    concurrency: Annotated[int, check_number, 0, 1_000_000] = 0
    # Azure counts slices of 1 or 10 s of the minute.
    burst_s: Annotated[float, check_number, 0.1, 60.0] = 60.0
    rpd: Annotated[int, check_number, 0, 10**9] = 0
    tpd: Annotated[int, check_number, 0, 10**15] = 0
    # The zone whose midnight begins a day.
    day_starts: Annotated[str, check_zone] = "UTC"


@dataclass(frozen=True)
class Budget:
    """What a client key may use in a day and in a month of UTC; 0: no limit. Money is that of `prices`."""

    tokens_per_day: Annotated[int, check_number, 0, 10**15] = 0
    tokens_per_month: Annotated[int, check_number, 0, 10**15] = 0
    cost_per_day: Annotated[float, check_number, 0.0, 1e9] = 0.0
    cost_per_month: Annotated[float, check_number, 0.0, 1e9] = 0.0


@dataclass(frozen=True)
class AccountConfig:
    """The `config` of a controller: the account's address, its key, and how its API differs from OpenAI's.

    The key is sent as `auth_header: auth_scheme api_key`; an empty scheme sends the bare key. `extra_body` wins over
    what the client sent.
    """

    api_key: Annotated[Secret, check_secret] = Secret()
    base_url: Annotated[str, check_base_url] = ""
    organization: Text = ""
    project: Text = ""
    proxy: Annotated[Secret, check_proxy] = Secret()
    ca_file: Annotated[str, check_file, True] = ""
    headers: Annotated[tuple[tuple[str, Secret], ...], check_pairs, check_field_name, check_secret] = ()
    auth_header: Annotated[str, check_field_name] = "Authorization"
    auth_scheme: Annotated[str, check_text, "[!-~]*", 'one word of ASCII, or "" for the bare key'] = "Bearer"
    chat_path: Annotated[str, check_text, r"/[!-\"$->@-~]+", "/path without blanks, ? and #"] = "/chat/completions"
    api_version: Annotated[str, check_text, "[0-9A-Za-z-]*", "a date such as " + AZURE_API_VERSION] = ""  # Azure only
    # Anthropic only; its oldest models take no more.
    max_tokens: Annotated[int, check_number, 1, 10**7] = 4096
    thinking: Annotated[str, check_choice, ("effort", "adaptive", "budget")] = "effort"  # Anthropic only
    drop_params: Words = ()
    rename_params: Pairs = ()
    # Fields to leave out of a chat's messages. With `developer`, that role becomes `system`.
    refuses: Words = ()
    extra_body: Annotated[tuple[tuple[str, Any], ...], check_extra_body] = ()
    # A 429 with one of these is a rate limit; elsewhere it means no credit.
    rate_codes: Words = ()
    delay: Annotated[float, check_number, 0.0, 600.0] = 0.0  # echo only
    first_delay: Seconds = 0.0  # echo only
    # Echo only, to try what happens: answers in a minute, more get 429; and the share of requests that get 500.
    refuse_above: Annotated[int, check_number, 0, 1_000_000] = 0
    fail_share: Annotated[float, check_number, 0.0, 1.0] = 0.0


@dataclass(frozen=True)
class ControllerConfig:
    """One upstream account. `models` may hold `*` and `?`; if it is empty, the account's own list counts."""

    type: str
    name: str
    account: AccountConfig
    weight: Annotated[int, check_number, 1, 10000] = 1
    models: Words = ()
    model_map: Pairs = ()
    limits: QuotaLimits = QuotaLimits()
    quota_group: Text = ""
    # Files, batches and vector stores live here.
    objects: Flag = False
    timeouts: Timeouts = Timeouts()
    enabled: Flag = True


@dataclass(frozen=True)
class PoolConfig:
    """How the pool chooses and waits. `rescue_after` None is "auto", 0 is never."""

    type: Annotated[str, check_choice, POOL_TYPES] = POOL_TYPES[0]
    # More looks like a failure, not like a slow answer.
    max_wait: Seconds = 30.0
    max_queue: Annotated[int, check_number, 0, 1_000_000] = 1000
    rescue_after: Annotated[float | None, check_rescue_after] = None
    affinity: Flag = True
    aliases: Pairs = ()
    fallbacks: Fallbacks = ()
    context_fallbacks: Fallbacks = ()


class Usage(NamedTuple):
    """The tokens of an answer. `cached` are those of the prompt that the account had in its cache."""

    total: int
    prompt: int
    answer: int
    cached: int


@dataclass(frozen=True)
class Price:
    """What a million tokens cost. `cached` None: as much as other tokens of the prompt."""

    input: Annotated[float, check_number, 0.0, 1e6] = 0.0
    cached: Annotated[float | None, check_number, 0.0, 1e6] = None
    output: Annotated[float, check_number, 0.0, 1e6] = 0.0

    def __str__(self) -> str:
        cached = "" if self.cached is None else f", cached {self.cached:g}"
        return f"input {self.input:g}{cached}, output {self.output:g}"

    def cost(self, usage: Usage) -> float:
        """Return what an answer cost."""
        cached = self.input if self.cached is None else self.cached
        prompt = (usage.prompt - usage.cached) * self.input + usage.cached * cached
        return (prompt + usage.answer * self.output) / 1e6


def check_price(place: Place, value: Any) -> Price:
    """Return the price of a model."""
    return Price(**check_keys(place, value, Price))


@dataclass(frozen=True)
class ClientKey:
    """A client: the SHA-256 of its key, and what it may ask for. Empty `models` means all models.

    `is_short`: the key can be guessed.
    """

    name: str
    digest: bytes
    is_short: bool
    models: Words = ()
    # It may read what operators read, and reload.
    admin: Flag = False
    expires: Annotated[dt.datetime | None, check_moment] = None
    limits: QuotaLimits = QuotaLimits()
    budget: Budget = Budget()


@dataclass(frozen=True)
class ServerLimits:
    """Limits for clients in bytes, counts and seconds. 0 means no limit where it is allowed."""

    # 32 MB hold a dozen images.
    body_bytes: Annotated[int, check_number, 1, 2**40] = 1 << 25
    # The bodies of all requests together: those in line keep theirs.
    bodies_bytes: Annotated[int, check_number, 1, 2**50] = 1 << 30
    # OpenAI takes files of 512 MB.
    upload_bytes: Annotated[int, check_number, 1, 2**50] = 1 << 29
    header_bytes: Annotated[int, check_number, 1024, 2**24] = 65536
    connections: Annotated[int, check_number, 1, 1_000_000] = 10000
    connections_per_client: Annotated[int, check_number, 0, 1_000_000] = 0
    header_timeout: Timeout = 20.0
    body_timeout: Timeout = 120.0
    # Bytes per second, less than any modem.
    body_rate: Annotated[int, check_number, 0, 2**30] = 1024
    # Longer than proxies keep a connection (nginx: 60 s). So the proxy closes it first, and no request is lost.
    idle_timeout: Timeout = 75.0
    write_timeout: Timeout = 120.0


@dataclass(frozen=True)
class TlsFiles:
    """The listener's certificate and its key; without them the listener speaks plain HTTP."""

    cert: Annotated[str, check_file] = ""
    key: Annotated[str, check_file] = ""


@dataclass(frozen=True)
class CorsConfig:
    """The origins of web pages that may use the server."""

    allow_origins: Annotated[tuple[str, ...], check_list, check_text, ORIGIN, ORIGIN_IS] = ()


@dataclass(frozen=True)
class LogConfig:
    """The format of the log, the least level that is written, and which requests have a line."""

    access: Annotated[str, check_choice, ("all", "errors", "off")] = "all"
    # Whether calls of /status, /metrics, /usage and the page are logged, too.
    monitoring: Flag = False
    file: Text = ""
    format: Annotated[str, check_choice, ("text", "json")] = "text"
    level: Annotated[str, check_choice, ("debug", "info", "warning", "error")] = "info"


# -- members of the two lists: `others` are those that stand before in the list


def parse_client_key(place: Place, data: Any, others: Sequence[ClientKey]) -> ClientKey:
    """Return the next of the `client_keys`. Logs and messages show its name, so they never need the key itself."""
    values = check_keys(place, data, ClientKey, "name", "key")
    name = check_text(place.inside("name"), data.get("name") or f"key-{len(others) + 1}")
    key_place = place.inside("key")
    key = check_secret(key_place, data.get("key") or "").reveal()
    hashed = re.fullmatch("sha256:([0-9a-fA-F]{64})", key)
    if not key or (key.startswith("sha256:") and not hashed):
        raise key_place.problem("must be a key, $NAME, file:PATH or sha256:<64 hex digits>")
    digest = bytes.fromhex(hashed.group(1)) if hashed else hashlib.sha256(key.encode()).digest()
    for other in others:
        if other.digest == digest:
            raise key_place.problem(f"is the same key as that of {other.name!r}")
    return ClientKey(name, digest, not hashed and len(key) < KEY_CHARS, **values)


_SHARED_KEYS = "api_key base_url proxy ca_file headers auth_header auth_scheme chat_path drop_params extra_body".split()
_OPENAI_KEYS = [*_SHARED_KEYS, "organization", "project", "rename_params", "refuses", "rate_codes"]
ACCOUNT_KEYS = {  # by controller type, where it differs from openai's
    "azure": [*_OPENAI_KEYS, "api_version"],
    "anthropic": [*_SHARED_KEYS, "max_tokens", "thinking"],
    "echo": ["delay", "first_delay", "refuse_above", "fail_share"],
}


def check_account(place: Place, account: AccountConfig) -> None:
    """Raise ConfigError if `account` changes parameters that routing needs, or if its key or URL has extra text."""
    renames = dict(account.rename_params)
    changed = {"drop_params": account.drop_params, "rename_params": [*renames, *renames.values()]}
    for key, names in {**changed, "extra_body": dict(account.extra_body)}.items():
        for name in set(names) & set(FIXED_PARAMS):
            raise place.inside(key).error(show(name), "any parameter but " + ", ".join(FIXED_PARAMS))
    for name, count in Counter(renames.values()).items():
        if count > 1:
            raise place.inside("rename_params").problem(f"gives the new name {show(name)} twice")
    # Files for docker's --env-file keep their quotation marks, and examples for curl show "Bearer sk-...".
    if re.search("[\"' ]" if account.auth_scheme else "[\"']", account.api_key.reveal()):
        raise place.inside("api_key").error("blanks or quotation marks", "the key alone (auth_scheme is added to it)")
    if account.base_url.endswith(account.chat_path):
        raise place.inside("base_url").problem(f"must not end in {account.chat_path}, which is added to it")


def bypasses_proxy(url: str, no_proxy: str) -> bool:
    """Return whether `no_proxy` has the host of `url`: an address, a network (CIDR), a domain, or a name with `*`."""
    parts = urllib.parse.urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or {"http": 80, "https": 443}.get(parts.scheme)

    def has_host(entry: str) -> bool:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
        except ValueError:  # one of them is a name
            pattern = re.escape(entry.strip(".")).replace(r"\*", ".*")
            return any(
                re.fullmatch(rf"(.+\.)?{pattern}", name) for name in (host, f"{host}:{port}", f"[{host}]:{port}")
            )

    return any(map(has_host, re.findall(r"[^\s,]+", no_proxy.lower())))


def parse_account(place: Place, data: dict[str, Any], kind: str) -> AccountConfig:
    """Return the `config` of a controller of type `kind`: what the user set, then the preset, then the defaults."""
    preset = dict(PRESETS[kind])
    own_url = bool(data.get("base_url")) and kind != "azure"
    words = [] if own_url else re.findall(r"\{(\w+)\}", preset.get("base_url", ""))
    known = {*ACCOUNT_KEYS.get(kind, _OPENAI_KEYS), *words}
    for word in words:
        allowed = f"the {word} that is part of the URL: letters, digits, - and _"
        value = check_text(place.inside(word), data.get(word) or "", "[0-9A-Za-z_-]+", allowed)
        preset["base_url"] = preset["base_url"].replace(f"{{{word}}}", value)
    # A header that the user names gets the usual scheme.
    if data.get("auth_header"):
        preset.pop("auth_scheme", None)
    # Templates leave an empty string for a variable that is not set; where there is a preset it counts as absent.
    given = {name: value for name, value in data.items() if value is not None and (value != "" or name not in preset)}
    given = {name: value for name, value in {**preset, **given}.items() if name in known or name in preset}
    _, values = gather(
        partial(place.refuse_unknown, data, known), partial(check_keys, place, given, AccountConfig, *words)
    )
    account = AccountConfig(**values)
    check_account(place, account)
    if account.proxy and bypasses_proxy(account.base_url, place.env.get("no_proxy") or place.env.get("NO_PROXY", "")):
        account = replace(account, proxy=Secret())
    # Vendors always need a key. A local server, or one at an address that the user gave, may work without a key.
    url = account.base_url
    vendor = not own_url or url.startswith("https://api.openai.com")
    if not account.api_key and url and vendor and not url.startswith("http://localhost"):
        raise place.inside("api_key").error("nothing", "an API key, $NAME or file:PATH")
    # The portal's URLs name the deployment.
    if kind == "azure" and (not url or "/deployments" in url):
        allowed = "https://NAME.openai.azure.com, for the newer surface with /openai/v1"
        raise place.inside("base_url").error(show(url) if url else "nothing", allowed)
    return account


def parse_controller(place: Place, data: Any, others: Sequence[ControllerConfig]) -> ControllerConfig:
    """Return the next of the `controllers`. Its `config` may stand in a file of its own, as the Go original's did."""
    data = check_object(place, data)
    kind = check_choice(place.inside("type"), "openai" if data.get("type") is None else data["type"], PRESETS)
    name = check_text(place.inside("name"), data.get("name") or f"{kind}-{len(others) + 1}")
    config, config_place, file = data.get("config"), place.inside("config"), data.get("config_file")
    if file and config:
        raise place.inside("config_file").problem("stands beside `config`; only one of them may be used")
    if file:
        path = check_file(place.inside("config_file"), file)
        # Messages name that file.
        config, config_place = read_file(path), Place(path, place.env, {})
    values, account = gather(
        partial(check_keys, place, data, ControllerConfig, "type", "name", "config", "config_file"),
        lambda: parse_account(config_place, check_object(config_place, {} if config is None else config), kind),
    )
    controller = ControllerConfig(kind, name, account, **values)
    # The day of Gemini's limits begins at midnight of Pacific time (ai.google.dev/gemini-api/docs/rate-limits).
    limits, is_gemini = controller.limits, "generativelanguage.googleapis.com" in account.base_url
    if is_gemini and (limits.rpd or limits.tpd) and "day_starts" not in data["limits"]:
        zone = check_zone(place.inside("limits").inside("day_starts"), "America/Los_Angeles")
        controller = replace(controller, limits=replace(limits, day_starts=zone))
    if controller.objects and kind in ("anthropic", "echo"):
        raise place.inside("objects").problem(f"must be false: type {kind} has no files, batches or vector stores")
    for other in others:
        if controller.objects and other.objects:
            raise place.inside("objects").problem(f"is true for {other.name!r}, too; only one controller may have it")
        if controller.quota_group and controller.quota_group == other.quota_group and controller.limits != other.limits:
            message = f"differ from those of {other.name!r}, which has the same quota_group and so the same limits"
            raise place.inside("limits").problem(message)
    return controller


@dataclass(frozen=True)
class Config:
    """Everything that the server runs by; `source` says where it came from."""

    source: str
    controllers: Annotated[tuple[ControllerConfig, ...], check_members, parse_controller] = ()
    client_keys: Annotated[tuple[ClientKey, ...], check_members, parse_client_key] = ()
    # A key in the environment does not mean that other machines may use it.
    host: Annotated[str, check_listen_host] = "127.0.0.1"
    port: Annotated[int, check_number, 0, 65535, " (0: any free port)"] = 8080
    pool: PoolConfig = PoolConfig()
    endpoints: Annotated[tuple[str, ...], check_list, check_choice, ("inference", "objects", "*")] = ("inference",)
    allowed_hosts: Annotated[tuple[str, ...], check_list, check_host_name] = ()
    trusted_proxies: Annotated[tuple[Network, ...], check_list, check_network] = ()
    cors: CorsConfig = CorsConfig()
    tls: TlsFiles = TlsFiles()
    # A new server can listen on the same port before the old one stops.
    reuse_port: Flag = False
    limits: ServerLimits = ServerLimits()
    log: LogConfig = LogConfig()
    drain_delay: Seconds = 0.0
    drain_timeout: Seconds = 30.0
    # SQLite; it keeps what a restart should not forget.
    state_file: Text = ""
    # The first pattern that matches a model counts.
    prices: Annotated[tuple[tuple[str, Price], ...], check_pairs, check_text, check_price] = ()

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens of every answer are wanted, and not only those that answers tell by themselves."""
        budgets = any(key.budget != Budget() for key in self.client_keys)
        return bool(self.prices or self.state_file or budgets)


def note_keys(path: str, record: type) -> None:
    """Add the keys of `record`, and of the records in it, to KEY_PATHS."""
    for key, check in checks_of(record).items():
        KEY_PATHS.setdefault(key, []).append(path or "the top level")
        if isinstance(check, type):
            note_keys(f"{path}.{key}".lstrip("."), check)


note_keys("controllers[].config", AccountConfig)
note_keys("controllers[]", ControllerConfig)
note_keys("client_keys[]", ClientKey)
note_keys("", Config)


def parse_config(data: Any, source: str, env: Mapping[str, str], setters: Mapping[str, str] | None = None) -> Config:
    """Return the configuration in `data`, which was read from `source`. Raise ConfigError."""
    # Nothing takes effect here, so a reload takes a new configuration as a whole or not at all.
    top = Place(source, env, setters or {})
    config = Config(source, **check_keys(top, data, Config))
    if not config.controllers:
        raise top.inside("controllers").error("nothing", "a list of at least one controller")
    if not any(controller.enabled for controller in config.controllers):
        raise top.inside("controllers").problem("all are disabled; at least one needs enabled: true")
    if bool(config.tls.cert) != bool(config.tls.key):
        raise top.inside("tls").error("one of cert and key", "both or none")
    return config


# -- where a configuration comes from


def find_file(config_file: str, config_path: str, env: Mapping[str, str]) -> str:
    """Return the path of the configuration file to read, "" for none. Raise ConfigError if what is named is missing."""
    folders: list[str] = []
    for name, kind, flag in (("CONFIG_FILE", "file", config_file), ("CONFIG_PATH", "folder", config_path)):
        variables = [(variable, env.get(variable)) for variable in (ENV_PREFIX + name, name)]
        for setter, path in (("--" + name.lower(), flag), *variables):
            if path and not (os.path.isfile(path) if kind == "file" else os.path.isdir(path)):
                other = "--config_path names a folder" if kind == "file" else "--config_file names a file"
                what = f"is not a {kind}; {other}" if os.path.exists(path) else f"no such {kind}"
                raise ConfigError(f"{setter}: {path}: {what}")
            if path and kind == "file":
                return path
            folders += [path] if path else []
    paths = (os.path.join(folder, name) for folder in (*folders, *CONFIG_FOLDERS) for name in CONFIG_NAMES)
    return next(filter(os.path.isfile, paths), "")


# Kubernetes sets these in every pod for a service whose name is, or begins with, this program's name.
SERVICE_VARIABLE = re.compile(r".*(?:\b|_)(?:SERVICE_(?:HOST|PORT)|PORT_\d+_)")


def environment_overrides(env: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """Yield path, variable and value of what CHATGPT_APISERVER_<KEY> sets. Raise ConfigError for a misspelt name."""
    paths = ["host", "port", "drain_delay", "drain_timeout"]
    paths += ["pool." + item.name for item in fields(PoolConfig) if item.default != ()]
    known = {path.replace(".", "_").upper(): path for path in paths}
    known.update(CONFIG_FILE="", CONFIG_PATH="")  # `find_file` reads these
    for variable, text in env.items():
        name = variable[len(ENV_PREFIX) :]
        if not variable.startswith(ENV_PREFIX) or "://" in text or SERVICE_VARIABLE.match(name) or name == "ADMIN_KEY":
            continue
        if name not in known:
            hint = suggest(name, known)
            # Other variables may be secrets for the file.
            if hint or name.partition("_")[0].lower() in checks_of(Config):
                hint = hint or f"known after {ENV_PREFIX}: {', '.join(sorted(known))}"
                raise ConfigError(f"{variable}: unknown variable; {hint}")
        elif text and known[name]:
            try:
                # The value is a number, or True in any spelling.
                value = text if name == "HOST" else json.loads(text.lower())
            except ValueError:
                value = text
            yield known[name], variable, value


def environment_config(env: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configuration of a start with only OPENAI_API_KEY, and the variable that each key comes from."""
    # The variables are those of OpenAI's own SDKs. Only such a start uses the environment's proxy, by urllib's rules.
    variables = {"api_key": "OPENAI_API_KEY", "base_url": "OPENAI_BASE_URL", "organization": "OPENAI_ORG_ID"}
    variables["project"] = "OPENAI_PROJECT_ID"
    account = {key: env.get(variable, "") for key, variable in variables.items()}
    scheme, _, rest = (account["base_url"] or OPENAI_URL).partition("://")
    proxy = urllib.request.getproxies().get(scheme) or urllib.request.getproxies().get("all")
    if proxy and not urllib.request.proxy_bypass(rest.partition("/")[0]):
        variables["proxy"] = "https_proxy, http_proxy or all_proxy"
        account["proxy"] = proxy if "://" in proxy else "http://" + proxy
    setters = {"controllers[0].config." + key: variable for key, variable in variables.items()}
    return {"controllers": [{"name": "openai", "config": account}]}, setters


NOTHING_TO_RUN = """chatgpt_apiserver: no configuration found. Three ways to start:
  with a file:    python3 chatgpt_apiserver.py --config_file chatgpt-apiserver.json
                  (the smallest: {"controllers": [{"type": "openai", "config": {"api_key": "$OPENAI_API_KEY"}}]})
  with one key:   OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py
  without a key:  python3 chatgpt_apiserver.py --demo"""


def storm_controllers() -> list[dict[str, Any]]:
    """Return the controllers of --demo=storm: three accounts with small limits, of which one fails often."""
    echo = {"type": "echo", "models": ["echo", "gpt-*"]}
    account = {"first_delay": 0.12, "delay": 0.02}
    # The limit of team-b is not configured, so that its 429s show.
    return [
        {**echo, "name": "team-a", "config": {**account, "refuse_above": 120}, "limits": {"rpm": 120, "tpm": 12_000}},
        {**echo, "name": "team-b", "config": {**account, "refuse_above": 60, "first_delay": 0.2}},
        {**echo, "name": "shaky", "config": {**account, "fail_share": 0.4}, "limits": {"rpm": 60}},
        {**echo, "name": "reserve", "config": {**account, "refuse_above": 400}, "limits": {"rpm": 400, "burst_s": 5}},
    ]


def demo_controllers() -> list[dict[str, Any]]:
    """Return the controllers of --demo: two of them show balancing, their delay shows streaming."""
    echo = {"type": "echo", "models": ["echo", "gpt-*"], "config": {"delay": 0.03}}
    return [{**echo, "name": "echo-a"}, {**echo, "name": "echo-b"}]


def load_config(
    config_file: str, config_path: str, flags: Mapping[str, Any], env: Mapping[str, str], demo: str = ""
) -> Config:
    """Return the configuration of this start: flags over environment over file over defaults. Raise ConfigError."""
    # A reload calls this again with the same arguments, so flags still override a file that has changed.
    # A demo spends no key, whatever file is there.
    path = "" if demo else find_file(config_file, config_path, env)
    setters: dict[str, str] = {}
    if path:
        data, source = read_file(path), path
    elif demo:
        data, source = {"controllers": demo_controllers()}, "--demo"
        if demo == "storm":
            source = "--demo=storm"
            data = {"controllers": storm_controllers(), "prices": {"*": {"input": 2, "output": 8}}}
    elif env.get("OPENAI_API_KEY"):
        (data, setters), source = environment_config(env), "OPENAI_API_KEY"
    else:
        raise ConfigError(NOTHING_TO_RUN)
    top = Place(source, env, setters)
    data = check_object(top, data)
    flag_values = ((key, "--" + key, value) for key, value in flags.items() if value is not None)
    for path, setter, value in (*environment_overrides(env), *flag_values):  # "port", "pool.type"
        setters[path] = setter
        group, _, key = path.rpartition(".")
        if group:
            data[group] = {**check_object(top.inside(group), data.get(group) or {}), key: value}
        else:
            data[key] = value
    return parse_config(data, source, env, setters)


# -- what is shown of a configuration


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`. Names other than localhost count as public."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def warnings_of(config: Config) -> list[str]:
    """Return what is allowed in a configuration, but probably not meant."""
    warnings: list[str] = []
    active, pool = [controller for controller in config.controllers if controller.enabled], config.pool
    # A controller without `models` may have any.
    closed = all(controller.models for controller in active)
    named = [name for controller in active for name in (*controller.models, *dict(controller.model_map))]
    fallbacks = {**dict(pool.fallbacks), **dict(pool.context_fallbacks)}

    def is_served(name: str) -> bool:
        return not closed or name in dict(pool.fallbacks) or any(fnmatch.fnmatchcase(name, known) for known in named)

    for alias, model in pool.aliases:
        if model in dict(pool.aliases) and model != alias:
            warnings.append(f"pool.aliases.{alias}: {model!r} is an alias, too; an alias is followed once")
        elif not is_served(model):
            warnings.append(f"pool.aliases.{alias}: no controller serves {model!r}")
    for key in ("fallbacks", "context_fallbacks"):
        for model, others in getattr(pool, key):
            unserved = [name for name in others if not is_served(name)]
            warnings += [f"pool.{key}.{model}: no controller serves {name!r}" for name in unserved]
            circles = [name for name in others if name == model or model in fallbacks.get(name, ())]
            warnings += [f"pool.{key}.{model}: {name!r} leads back to it" for name in circles]
    members: Sequence[Any] = (*active, *config.client_keys)
    for member in members:
        where = f"{'client_keys' if isinstance(member, ClientKey) else 'controllers'}[{member.name}]"
        regular = [name for name in member.models if re.search(r"\.\*|\.\+|[\^$|()\[\]\\]", name)]
        hint = "looks like a regular expression; the wildcards are * and ?"
        warnings += [f"{where}.models: {name!r} {hint}" for name in regular]
    aliases = dict(pool.aliases)
    for client in config.client_keys:
        names = [name for name in client.models if {"*", "?"}.isdisjoint(name)]
        lost = [name for name in names if not is_served(aliases.get(name, name))]
        warnings += [f"client_keys[{client.name}].models: no controller serves {name!r}" for name in lost]
        if client.is_short:
            hint = f"has fewer than {KEY_CHARS} characters and can be guessed; --new-key makes a good one"
            warnings.append(f"client_keys[{client.name}].key: {hint}")
    folder, file = os.path.split(config.source)
    others = [name for name in CONFIG_NAMES if name != file and os.path.isfile(os.path.join(folder, name))]
    if file in CONFIG_NAMES and others:
        warnings.append(f"{config.source} is used, and {others[0]} beside it is not")
    # Not an error: in a container every address is public, and a proxy in front may ask for keys.
    if not is_loopback(config.host) and not config.client_keys:
        address = f"{config.host}:{config.port}"
        hint = "no client_keys are configured"
        warnings.append(f"EVERY CLIENT THAT REACHES {address} CAN USE THESE ACCOUNTS: {hint}")
    return [mask_keys(warning) for warning in warnings]


def url_of(config: Config, host: str, port: int) -> str:
    """Return the URL of a listener."""
    return f"http{'s' if config.tls.cert else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def settings_of(record: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path (as the file spells it), value and default of every setting below `record`."""
    for item in fields(record):
        value = getattr(record, item.name)
        path = prefix + {"account": "config", "digest": "key"}.get(item.name, item.name)
        if item.name in ("controllers", "client_keys"):
            yield path, tuple(member.name for member in value), ()
            for member in value:
                yield from settings_of(member, f"{path}[{member.name}].")
        elif is_dataclass(value) and not isinstance(value, Secret):
            yield from settings_of(value, path + ".")
        elif item.name not in ("name", "source", "is_short"):
            yield path, value, item.default


def show_setting(path: str, value: Any) -> str:
    """Return the value of a setting for the log and --check, without secrets."""
    if isinstance(value, tuple):  # a list, or pairs
        pairs = (
            f"{item[0]} -> {show_setting('', item[1])}" if isinstance(item, tuple) else str(item) for item in value
        )
        return mask_keys(", ".join(pairs)) or "none"
    if path.endswith("config.proxy") and value:
        return str(urllib.parse.urlsplit(value.reveal()).netloc.rpartition("@")[2])
    if isinstance(value, bytes):
        return f"sha256:{value.hex()[:8]}…"
    # Only rescue_after and first_byte can be None.
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else mask_keys(str(value)) or "none"


def changed_settings(record: Any, between: str) -> list[str]:
    """Return path and value of every setting below `record` that differs from its default."""
    settings = settings_of(record)
    return [path + between + show_setting(path, value) for path, value, default in settings if value != default]


def describe(config: Config) -> list[str]:
    """Return a summary for --check and the log: every setting that differs from its default, without secrets."""
    lines = [f"configuration: {config.source}"]
    members: Sequence[Any] = (*config.controllers, *config.client_keys)
    for member in members:
        kind = "client key" if isinstance(member, ClientKey) else "controller"
        settings = [*changed_settings(member, " "), *([] if member.models else ["models all"])]
        lines.append(f"{kind} {member.name}: " + "; ".join(settings))
    return lines + changed_settings(replace(config, controllers=(), client_keys=()), ": ")


RESTART_KEYS = ("host", "port", "reuse_port", "state_file")  # the listener and the file are open already


def needs_restart(path: str) -> str:
    """Return the words for a setting that a reload does not change; "" for any other."""
    return " (needs a restart)" if path in RESTART_KEYS else ""


def diff_config(old: Config, new: Config) -> list[str]:
    """Return a line for each setting that differs in `new`, without secrets; [] when nothing does."""
    before = {path: value for path, value, _ in settings_of(old)}
    lines = []
    for path, value, _ in settings_of(new):
        if before.get(path, value) != value:
            lines.append(
                f"{path}: {show_setting(path, before[path])} -> {show_setting(path, value)}{needs_restart(path)}"
            )
    return lines


# ==== 3. Observability ====
# One access line for each request, and a logger for all else. Text that clients control is escaped. A filter strikes
# out configured secrets before a record is written.

# Access lines are collected for this long: one write for many lines costs a tenth.
FLUSH_S = 0.01
# Log lines that wait for a slow reader of stderr; about 1,700 lines.
LOG_QUEUE_BYTES = 262_144
SECRET_CHARS = 6  # shorter secrets are not struck out: that would make logs unreadable
# Keys for local servers without authentication: ordinary words in errors and logs.
DUMMY_KEYS = frozenset("ollama lm-studio not-needed no-key-required placeholder".split())


class Redactor:
    """Strikes configured secrets out of log records and of what upstreams send. It is the last defence, not the first.

    `secrets` and `keys` hold the same values, as text and as bytes, the longest first: one may be a prefix of another.
    """

    secrets: tuple[str, ...] = ()
    keys: tuple[bytes, ...] = ()

    def watch(self, secrets: Iterable[str]) -> None:
        """Strike out `secrets` from now on, in place of those that were given before."""
        known = {value for value in secrets if len(value) >= SECRET_CHARS} - DUMMY_KEYS
        # A JSON error body may spell a secret with escapes.
        known |= {json.dumps(value)[1:-1] for value in known}
        self.secrets = tuple(sorted(known, key=len, reverse=True))
        self.keys = tuple(secret.encode() for secret in self.secrets)

    def clean(self, text: str) -> str:
        """Return `text` with secrets shown as `sk-…last4`: a reader of the log must know which key is meant."""
        for secret in self.secrets:
            text = text.replace(secret, repr(Secret(secret)))
        return text

    def scrub(self, data: bytes) -> bytes:
        """Return header lines or a body of an upstream with `***` in place of secrets."""
        for key in self.keys:
            data = data.replace(key, b"***")
        return data

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean a log record and its traceback; never drop it."""
        record.msg, record.args = self.clean(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = self.clean("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return True


class AttemptRecord(NamedTuple):
    """What came of one attempt: `outcome` in one word, `status` of the reply (0: none came), `reason` if it failed."""

    controller: str
    outcome: str
    seconds: float
    model: str = ""  # as it was sent
    status: int = 0
    reason: str = ""


@dataclass(slots=True)
class AccessRecord:
    """The facts about one request, for the access log and the counts. Times are seconds of the loop's clock.

    `first_at`: when the first byte of the answer was sent, or 0. `mapped`: the header line that names the model that
    answered in place of the requested one. `code`: that of an error answer. `usage`: None where the answer told none.
    `limited`: it met an account without room.
    """

    client: str
    method: str
    path: str
    since: float
    model: str = ""
    controller: str = ""
    key: str = ""
    request_id: str = ""
    trace_id: str = ""
    upstream_id: str = ""
    code: str = ""
    mapped: bytes = b""
    monitoring: bool = False
    stream: bool = False
    limited: bool = False
    usage: Usage | None = None
    status: int = 0
    bytes: int = 0
    first_at: float = 0.0
    waited_s: float = 0.0
    until: float = 0.0
    attempts: list[AttemptRecord] = field(default_factory=list)

    def ms(self, at: float) -> float:
        """Return the milliseconds from the beginning to `at`, or to the end if that never came."""
        return ((at or self.until) - self.since) * 1e3


# The fields of an access line: their names in text, and in JSON. These are OpenTelemetry's where it has one (semantic
# conventions for HTTP and for generative AI).
ACCESS_FIELDS = (
    ("client", "client.address"),
    ("method", "http.request.method"),
    ("path", "url.path"),
    ("status", "http.response.status_code"),
    ("code", "error.type"),
    ("model", "gen_ai.request.model"),
    ("sent", "model_sent"),
    ("controller", "controller"),
    ("key", "client_key"),
    ("in", "gen_ai.usage.input_tokens"),
    ("out", "gen_ai.usage.output_tokens"),
    ("cached", "gen_ai.usage.cache_read.input_tokens"),
    ("wait_ms", "wait_ms"),
    ("first_ms", "first_ms"),
    ("ms", "ms"),
    ("bytes", "http.response.body.size"),
    ("id", "request_id"),
    ("upstream_id", "upstream_id"),
    ("trace_id", "trace_id"),
)
TEXT_NAMES, JSON_NAMES = zip(*ACCESS_FIELDS, strict=True)
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_NOT_PLAIN_TEXT = re.compile(r"[^!-\[\]-~]")


def plain(text: str) -> str:
    """Return `text` as one word: all but visible ASCII is escaped, and the backslash, which begins an escape."""
    if not _NOT_PLAIN_TEXT.search(text):
        return text
    return _NOT_PLAIN_TEXT.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


class LineFormatter(logging.Formatter):
    """Makes every line of the log, as text or as JSON. Times are in UTC with milliseconds."""

    as_json = False
    second, prefix = -1, ""  # the last second, and how it is written

    def stamp(self, at: float) -> str:
        """Return how the Unix time `at` is written."""
        second = int(at)
        if second != self.second:
            self.second, self.prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self.prefix}.{int((at - second) * 1e3 + 1e-3):03d}Z"

    def event(self, at: float, level: str, message: str, stack: str = "") -> str:
        """Return the line of an event, with its line end. JSON has the names of OpenTelemetry's log data model."""
        if self.as_json:
            fields = {"timestamp": self.stamp(at), "severity_text": level, "body": message}
            return _to_json({**fields, **({"exception.stacktrace": stack} if stack else {})}) + "\n"
        return " ".join([self.stamp(at), level, message]) + ("\n" + stack if stack else "") + "\n"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a log record, without its end, which the handler adds."""
        return self.event(record.created, record.levelname, record.getMessage(), record.exc_text or "")[:-1]

    def access(self, record: AccessRecord, at: float) -> str:
        """Return the line of a request that ended at the Unix time `at`. A text line leaves out what is unknown."""
        usage, attempts = record.usage, record.attempts
        values = (
            *(record.client, record.method, record.path, record.status, record.code or None, record.model or None),
            attempts[-1].model or None if attempts else None,
            *(record.controller or None, record.key or None),
            *((usage.prompt, usage.answer, usage.cached) if usage else (None, None, None)),
            round(record.waited_s * 1e3) or None,
            *(round(record.ms(record.first_at), 1), round(record.ms(record.until), 1), record.bytes),
            *(record.request_id or None, record.upstream_id or None, record.trace_id or None),
        )
        if self.as_json:
            fields: dict[str, Any] = {"timestamp": self.stamp(at), "severity_text": "INFO", "body": "request"}
            fields.update(zip(JSON_NAMES, values, strict=True))
            fields["attempts"] = [
                {
                    "controller": name,
                    "outcome": outcome,
                    "ms": round(s * 1e3, 1),
                    "model": model,
                    "status": status,
                    "reason": reason,
                }
                for name, outcome, s, model, status, reason in attempts
            ]
            return _to_json(fields) + "\n"
        words = [
            f"{name}={plain(value) if isinstance(value, str) else value}"
            for name, value in zip(TEXT_NAMES, values, strict=True)
            if value is not None
        ]
        words.append(f"attempts={len(attempts)}")
        if len(attempts) > 1 or any(one.outcome != "ok" for one in attempts):
            tried = [f"{plain(name)}:{outcome}:{s * 1e3:.0f}" for name, outcome, s, *_ in attempts]
            words.append("tried=" + ",".join(tried))
        reasons = "; ".join([f"{name}: {reason}" for name, *_, reason in attempts if reason])
        if reasons:
            words.append("why=" + _to_json(reasons))
        return f"{self.stamp(at)} INFO request {' '.join(words)}\n"


formatter = LineFormatter()


class LogWriter:
    """Writes log lines to stderr in a thread, so that a full pipe or a stalled disk never delays an answer.

    LOG_QUEUE_BYTES may wait. Lines that come while there is more are dropped, and a note with their number is written.
    """

    def __init__(self, formatter: LineFormatter) -> None:
        self.formatter = formatter
        # A line stays in it until it is written.
        self.waiting = bytearray()
        self.dropped = 0  # lines
        self.fd = -1
        self.changed = threading.Condition()

    def open(self, path: str = "") -> None:
        """Write to the file at `path` from now on, or to stderr. Raise OSError.

        Call it again after the file was renamed (logrotate). Without a stderr that is a file, lines are discarded.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640) if path else os.dup(sys.stderr.fileno())
        except (AttributeError, ValueError):
            # There is no stderr.
            return
        except OSError:
            if path:
                raise
            return
        with self.changed:
            started, self.fd = self.fd >= 0, fd
        if not started:
            threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str) -> None:
        """Queue whole lines without waiting."""
        data = text.encode("utf-8", "backslashreplace")
        with self.changed:
            if self.dropped or (self.waiting and len(self.waiting) + len(data) > LOG_QUEUE_BYTES):
                self.dropped += data.count(b"\n")
            elif self.fd >= 0:
                self.waiting += data
                self.changed.notify_all()

    def send(self, wait_ms: float) -> None:
        """Wait until all lines are written, at most `wait_ms` milliseconds. Call it before the process ends."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting, wait_ms / 1e3)

    def _run(self) -> None:
        fd = self.fd
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                data = bytes(self.waiting)
                if fd != self.fd:
                    os.close(fd)
                    fd = self.fd
            try:
                # sys.stderr has a lock, which the end of the process would wait for.
                written = os.write(fd, data)
            except BlockingIOError:
                # Another process set O_NONBLOCK on the shared file.
                select.select((), (fd,), ())
                written = 0
            except OSError:
                # The reader is gone, or the disk is full: the lines are lost.
                written = len(data)
            with self.changed:
                del self.waiting[:written]
                if self.dropped and not self.waiting:
                    note = f"{self.dropped} log lines dropped: they were not read or stored in time"
                    self.waiting += self.formatter.event(time.time(), "WARNING", note).encode()
                    self.dropped = 0
                self.changed.notify_all()


class AccessLog:
    """Collects access records and writes their lines in batches, after the answers were sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, write: Callable[[str], Any]) -> None:
        self.loop, self.write, self.config = loop, write, LogConfig()
        self.records: list[AccessRecord] = []

    def add(self, record: AccessRecord) -> None:
        """Take one finished request, if its kind is logged."""
        wanted = self.config.access
        if wanted == "off" or (record.monitoring and not self.config.monitoring):
            return
        failed = record.status >= 400 or any(one.outcome != "ok" for one in record.attempts)
        if wanted == "errors" and not failed:
            return
        if not self.records:
            self.loop.call_later(FLUSH_S, self.flush)
        self.records.append(record)

    def flush(self) -> None:
        """Write the collected lines."""
        records, self.records = self.records, []
        if records:
            # Records have the loop's times.
            offset_s = time.time() - self.loop.time()
            self.write("".join([formatter.access(record, record.until + offset_s) for record in records]))


redactor = Redactor()
log_writer = LogWriter(formatter)


def secrets_of(config: Config) -> Iterator[str]:
    """Yield every secret of a configuration in each form in which it is sent. Of client keys only digests are kept."""
    for controller in config.controllers:
        account = controller.account
        yield account.api_key.reveal()
        yield from (value.reveal() for _, value in account.headers)
        parts = urllib.parse.urlsplit(account.proxy.reveal())
        # A password is sent as the URL spells it, decoded, and in base64 with the user name.
        if parts.password:
            pair = parts.netloc.rpartition("@")[0]
            yield from (parts.password, urllib.parse.unquote(parts.password), pair)
            yield base64.b64encode(urllib.parse.unquote(pair).encode()).decode()


def open_log(config: Config) -> None:
    """Open the file of the log, or open it again. Raise ConfigError."""
    path = config.log.file and path_beside(config.source, config.log.file)
    try:
        log_writer.open(path)
    except OSError as error:
        raise ConfigError(f"{config.source}: log.file: cannot open {path}: {reason_of(error)}") from error


def set_up_logging(config: Config) -> None:
    """Send the log records of this module and of asyncio to stderr or to the log's file, without secrets.

    Raise ConfigError.
    """
    open_log(config)
    handler = logging.StreamHandler(log_writer)
    handler.setFormatter(formatter)
    redactor.watch(secrets_of(config))
    handler.addFilter(redactor)
    for logger in (log, logging.getLogger("asyncio")):
        logger.handlers[:] = [handler]
        logger.propagate = False
    log.setLevel(config.log.level.upper())
    formatter.as_json = config.log.format == "json"


# ==== 4. HTTP/1.1 on the wire ====
# Bytes to values and back, for both sides; no I/O, no clock. Heads are parsed whole, bodies by decoders that may be fed
# in any pieces. The parsers are strict (RFC 9110, RFC 9112): a gateway stands between two parsers, and bytes that these
# read differently can smuggle one request inside another, to a connection with the account's key. So ambiguous input is
# refused, never repaired: a bare LF, a space before a colon, a folded line, two lengths, a length beside a transfer
# coding. What goes on is written anew from the parsed values.

START_LINE_BYTES = 8192  # RFC 9112, 3 recommends at least 8000 octets for a request line
FIELD_COUNT = 100  # header fields of a request; nginx and Apache stop near this too
UPSTREAM_HEAD_BYTES = 65536  # a reply's head; real ones stay below 8 kB
# A chunk-size line with its extensions, which no known client or vendor uses.
CHUNK_LINE_BYTES = 256
TRAILER_BYTES = 8192  # the trailer section is read and dropped
# Number and size of cached header lines, for each direction.
CACHED_LINES, CACHED_LINE_BYTES = 1024, 256
FORM_PARTS = 1000  # parts of a form; an image edit has less than thirty

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Origin-form, absolute-form, asterisk-form (RFC 9112, 3.2). Visible ASCII only (RFC 3986): servers differ about UTF-8.
_TARGET = rb'/[!-~]*|\*|(?i:https?)://[!"$-.0->@-~][!"$-~]*'
_REQUEST_LINE = re.compile(rb"(%b) (%b) HTTP/([0-9])\.([0-9])\Z" % (_TOKEN, _TARGET))
# The reason phrase is free text and often missing, with or without the space before it.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?\Z")
# Values may have bytes above 0x7f (obs-text), as some upstreams send UTF-8; of control characters only the tab.
# Possessive, since white space fits both parts: a field of 60,000 spaces with a bad end took 18 s to refuse.
_FIELD = re.compile(rb"(%b):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)\Z" % _TOKEN)
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")
# Before a request line they are skipped (RFC 9112, 2.2).
_EMPTY_LINES = re.compile(rb"(?:\r\n)+")
# Checked before int(), which takes "+5", "1_0" and " 5".
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_ABSOLUTE_TARGET = re.compile(r"(?i:https?)://([^/?#]+)([^#]*)\Z")
# IP-literals and reg-names of RFC 3986, 3.2.2, with at most 255 bytes (RFC 1035); the port may be empty. No comma: two
# Host fields are joined by one.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]{1,99}\]|[A-Za-z0-9_.\-~%!$&'()*+;=]{0,255})(?::[0-9]{0,5})?\Z")

# These fields are about one connection (RFC 9110, 7.6.1); so are those that Connection names.
HOP_BY_HOP = frozenset(b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade".split())
# A client's credentials are for this server only, and a client must not choose the account's organization.
# accept-encoding is dropped because answers are inspected and so must not be compressed.
REQUEST_DROPPED = HOP_BY_HOP | frozenset(
    b"authorization api-key x-api-key openai-organization openai-project cookie host accept-encoding expect forwarded"
    b" content-length x-apiserver-max-wait http2-settings".split()
)
REQUEST_DROPPED_PREFIXES = (b"proxy-", b"x-forwarded-")
# The cookies of an upstream's load balancer would tie all clients to one session. alt-svc would let clients bypass us.
REPLY_DROPPED = HOP_BY_HOP | frozenset(
    b"set-cookie set-cookie2 content-length alt-svc proxy-authenticate proxy-authentication-info".split()
)
# After waiting or failover these would describe only one of several accounts.
RETRY_FIELDS = frozenset((b"retry-after", b"retry-after-ms", b"x-should-retry"))
# Parsed header lines are cached, as peers repeat most of them; lines with a secret are not.
NOT_CACHED = frozenset(b"authorization api-key x-api-key proxy-authorization cookie set-cookie".split())

Fields = list[tuple[bytes, bytes]]
Index = dict[bytes, bytes]
# Lower-case name, value, the line to forward with its CRLF: b"" if it is dropped.
Line = tuple[bytes, bytes, bytes]
REQUEST_LINES: dict[bytes, Line] = {}
REPLY_LINES: dict[bytes, Line] = {}


def tokens(value: bytes) -> set[bytes]:
    """Return the lower-case members of a comma-separated list."""
    return {member.strip(b" \t").lower() for member in value.split(b",")}


def keeps_alive(index: Index, http_minor: int) -> bool:
    """Return whether the connection stays open after a message (RFC 9112, 9.3)."""
    options = tokens(index.get(b"connection", b""))
    return b"close" not in options and (http_minor >= 1 or b"keep-alive" in options)


@dataclass(slots=True)
class RequestHead:
    """A request's start line and header fields.

    `index`: lower-case name to value; repeated fields are joined by a comma (RFC 9110, 5.3). `lines`: the field lines
    to forward, written anew, each with its CRLF.
    """

    method: str
    target: str
    http_minor: int
    index: Index
    lines: bytes


@dataclass(slots=True)
class ResponseHead:
    """A reply's status and header fields, as in `RequestHead`."""

    status: int
    http_minor: int
    index: Index
    lines: bytes


def without(lines: bytes, names: Collection[bytes]) -> bytes:
    """Return field lines without those of these lower-case names."""
    fields = lines.splitlines(keepends=True)
    return b"".join([field for field in fields if field[: field.index(b":")].lower() not in names])


def parse_line(line: bytes, is_reply: bool) -> Line:
    """Parse one header line without its CRLF. Raises BadMessage."""
    match = _FIELD.match(line)
    if match is None:
        raise BadMessage(400, "A header line is malformed.")
    spelled, value = match.group(1), match.group(2).rstrip(b" \t")
    name = spelled.lower()
    dropped = name in (REPLY_DROPPED if is_reply else REQUEST_DROPPED)
    dropped = dropped or (not is_reply and name.startswith(REQUEST_DROPPED_PREFIXES))
    return name, value, b"" if dropped else b"%b: %b\r\n" % (spelled, value)


def parse_fields(block: bytes, is_reply: bool) -> tuple[Index, bytes]:
    """Return the index of header lines, which each end with CRLF, and the lines to forward. Raises BadMessage."""
    # A bare CR or LF stays within a line, and `_FIELD` refuses it.
    lines = block.split(b"\r\n")[:-1]
    cache = REPLY_LINES if is_reply else REQUEST_LINES
    index: Index = {}
    forwarded = b""
    for line in lines:
        parsed = cache.get(line)
        if parsed is None:
            parsed = parse_line(line, is_reply)
            if len(cache) >= CACHED_LINES:
                cache.clear()
            if len(line) <= CACHED_LINE_BYTES and parsed[0] not in NOT_CACHED:
                cache[line] = parsed
        name, value, line_to_forward = parsed
        index[name] = index[name] + b"," + value if name in index else value
        forwarded += line_to_forward
    connection = index.get(b"connection", b"close")
    if connection not in (b"close", b"keep-alive"):
        forwarded = without(forwarded, tokens(connection))  # RFC 9110, 7.6.1
    return index, forwarded


def parse_request_head(data: bytes) -> RequestHead:
    """Parse a request's head, which ends with the empty line. Raises BadMessage."""
    start, _, block = data.removesuffix(b"\r\n").partition(b"\r\n")
    match = _REQUEST_LINE.match(start)
    if match is None:
        raise BadMessage(400, "The request line is malformed: METHOD SP /PATH SP HTTP/1.1 CRLF is needed.")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise BadMessage(505, "Only HTTP/1.0 and HTTP/1.1 are supported.")
    if block.count(b"\r\n") > FIELD_COUNT:
        raise BadMessage(431, f"The request has more than {FIELD_COUNT} header fields.")
    index, lines = parse_fields(block, is_reply=False)
    host = index.get(b"host")
    if host is None and minor != b"0":
        raise BadMessage(400, "The Host header is missing (RFC 9112, 3.2).")
    if host is not None and not _HOST.match(host):
        raise BadMessage(400, "The Host header is not one host name with an optional port.")
    return RequestHead(method.decode(), target.decode(), min(int(minor), 1), index, lines)


def parse_response_head(data: bytes) -> ResponseHead:
    """Parse a reply's head, which ends with the empty line; configured secrets are struck out. Raises BadMessage."""
    start, _, block = data.removesuffix(b"\r\n").partition(b"\r\n")
    match = _STATUS_LINE.match(start)
    if match is None:
        raise BadMessage(400, "The status line is malformed.")
    index, lines = parse_fields(block, is_reply=True)
    return ResponseHead(int(match.group(2)), int(match.group(1)), index, redactor.scrub(lines))


def check_partial_head(data: bytes, since: int = 0) -> None:
    """Refuse a head that can no longer become valid, so that its client need not time out. Raises BadMessage.

    The bytes before `since` were checked before: a head that comes byte by byte must not take quadratic time.
    """
    if _BARE_LINE_END.search(data, since):
        raise BadMessage(400, "A line of the request head does not end with CRLF, or it has a control character.")
    end = data.find(b"\r\n")
    # The CR may come before the LF.
    if end < 0 and len(data) > START_LINE_BYTES + 1:
        raise BadMessage(414, f"The request line is longer than {START_LINE_BYTES} bytes.")
    valid = re.match(_TOKEN + rb"(?: |\Z)", data) if end < 0 else end < since - 1 or _REQUEST_LINE.match(data[:end])
    if data and not valid:
        raise BadMessage(400, "This is not an HTTP/1.1 request.")


def content_length(value: bytes) -> int:
    """Return the number of a Content-Length; equal repeated values count once (RFC 9112, 6.3). Raises BadMessage."""
    members = {member.strip(b" \t") for member in value.split(b",")}
    number = members.pop()
    if members or not _DIGITS.match(number):
        raise BadMessage(400, "Content-Length is not one plain number.")
    return int(number)


class LengthDecoder:
    """A body of `length` bytes, or until the end of the connection (None). `surplus`: the bytes after the body."""

    __slots__ = ("done", "left", "surplus", "until_end")

    def __init__(self, length: int | None) -> None:
        self.until_end = length is None
        self.left = sys.maxsize if length is None else length
        self.done = length == 0
        self.surplus = b""

    def feed(self, data: bytes) -> bytes:
        """Return the part of `data` that belongs to the body."""
        if len(data) > self.left:
            data, self.surplus = data[: self.left], data[self.left :]
        self.left -= len(data)
        self.done = not self.left
        return data


class ChunkedDecoder:
    """A chunked body of at most `limit` bytes (RFC 9112, 7.1). `surplus`: the bytes after the body.

    Extensions are dropped. Trailers are checked and dropped: they must not become header fields (RFC 9110, 6.5.1).
    """

    __slots__ = ("done", "left", "limit", "pending", "surplus", "total", "trailer_bytes")
    until_end = False

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Bytes that are still to come of the current chunk and of the CRLF behind it.
        self.left = 0
        # Bytes of all chunks so far.
        self.total = 0
        # Bytes of the trailer section so far; -1 before it.
        self.trailer_bytes = -1
        # The start of an incomplete line.
        self.pending = b""
        self.surplus, self.done = b"", False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`, which may be empty. Raises BadMessage, with status 413 beyond `limit`."""
        data, self.pending = self.pending + data, b""
        payloads, at, size = [], 0, len(data)
        while at < size and not self.done:
            if self.left:
                stop = at + self.left
                payload = data[at : stop - 2]
                payloads.append(payload)
                at += len(payload)
                if data[at:stop] != b"\r\n"[: size - at]:
                    raise BadMessage(400, "A chunk is longer than its size says.")
                if stop > size:
                    self.left -= len(payload)
                    break
                at, self.left = stop, 0
            else:
                # Found by its LF, so that a line with a bare LF is refused: a parser in front of this server may take
                # it for a line end, and would see another body (RFC 9112, 11.2).
                limit = CHUNK_LINE_BYTES if self.trailer_bytes < 0 else TRAILER_BYTES
                end = data.find(b"\n", at, at + limit) + 1
                if not end:
                    # A client that announces chunks and sends plain JSON gets its error at once.
                    if size - at >= limit or (self.trailer_bytes < 0 and data[at] not in b"0123456789ABCDEFabcdef"):
                        raise BadMessage(400, "A chunk-size or trailer line is malformed or too long.")
                    break
                self._read_line(data[at:end])
                at = end
        self.surplus, self.pending = (data[at:], b"") if self.done else (b"", data[at:])
        return payloads[0] if len(payloads) == 1 else b"".join(payloads)

    def _read_line(self, line: bytes) -> None:
        """Read a chunk-size line or, behind the size 0, a line of the trailer section; an empty one ends the body."""
        if self.trailer_bytes >= 0:
            self.trailer_bytes += len(line)
            self.done = line == b"\r\n"
            valid = self.done or (line.endswith(b"\r\n") and _FIELD.match(line[:-2]))
            if not valid or self.trailer_bytes > TRAILER_BYTES:
                raise BadMessage(400, "The trailer section is malformed or too long.")
            return
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadMessage(400, "A chunk-size line is malformed.")
        length = int(match.group(1), 16)
        self.total += length
        if self.total > self.limit:
            raise BadMessage(413, f"The body is larger than {self.limit} bytes.", "request_too_large")
        if length:
            self.left = length + 2
        else:
            self.trailer_bytes = 0


Decoder = LengthDecoder | ChunkedDecoder


def request_body_decoder(head: RequestHead, limit: int) -> Decoder | None:
    """Return the decoder of a request's body; None if it has none (RFC 9112, 6.1 and 6.3). Raises BadMessage."""
    coding, length = head.index.get(b"transfer-encoding"), head.index.get(b"content-length")
    if coding is not None:
        # RFC 9112, 6.1 allows to prefer the coding; a server in front of this one may have preferred the length.
        if length is not None or head.http_minor == 0:
            raise BadMessage(400, "Transfer-Encoding cannot stand with Content-Length, nor on HTTP/1.0.")
        codings = [member.strip(b" \t").lower() for member in coding.split(b",")]
        # 501 for an unknown coding, 400 if the end of the body cannot be known.
        if codings != [b"chunked"]:
            status = 501 if codings[-1] == b"chunked" and codings.count(b"chunked") == 1 else 400
            raise BadMessage(status, "Only the transfer coding chunked is supported, alone and once.")
        return ChunkedDecoder(limit)
    if length is None:
        return None
    size = content_length(length)
    if size > limit:
        raise BadMessage(413, f"The body has {size} bytes; at most {limit} are accepted.", "request_too_large")
    return LengthDecoder(size) if size else None


def reply_body_decoder(head: ResponseHead, method: str) -> Decoder:
    """Return the decoder of a reply's body (RFC 9112, 6.3). Raises BadMessage if its framing is ambiguous."""
    coding, length = head.index.get(b"transfer-encoding"), head.index.get(b"content-length")
    if coding is not None and length is not None:
        raise BadMessage(400, "Transfer-Encoding cannot stand with Content-Length.")
    # These have no body, whatever the fields say.
    if method == "HEAD" or head.status in (204, 304):
        return LengthDecoder(0)
    if coding is None:
        return LengthDecoder(None if length is None else content_length(length))
    if coding.strip(b" \t").lower() != b"chunked" or head.http_minor == 0:
        raise BadMessage(400, "The transfer coding is not plain chunked.")
    # The relay bounds what it holds of an answer.
    return ChunkedDecoder(sys.maxsize)


# Forms as client libraries write them (RFC 7578). Other spellings are refused: an upstream could find another model in
# them than this server, and a client key could use a model that it may not use.
_FORM_TYPE = re.compile(
    rb'multipart/form-data(?:; ?charset=[\w-]+)?; ?boundary=("?)([\w\'()+./:=?-]{1,70})\1(?:; ?charset=[\w-]+)?',
    re.IGNORECASE,
)
_FORM_PART = re.compile(rb"\r\n((?:[\w-]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)+)\r\n")
_FORM_DISPOSITION = re.compile(  # without a second name behind the file's name
    rb'(?mi)^content-disposition: form-data; name=("?)([\w.\[\]-]+)\1'
    rb"(?:; (?![^\r\n]*(?<!file)name[\s*0-9]*=)filename\*?=[^\r\n]*)?\r\n"
)


def form_spans(body: bytes | mmap.mmap, content_type: bytes) -> dict[bytes, tuple[int, int]]:
    """Return the start and end of the value of each part of a form by its lower-case name. Raises ProxyError (400)."""
    kind = _FORM_TYPE.fullmatch(content_type)
    if kind is None:
        raise ProxyError(400, "A multipart/form-data body with its boundary is needed here.")
    unclear = ProxyError(400, "The form is not as RFC 7578 defines it, or it can be read in more than one way.")
    mark = b"--" + kind.group(2)
    spans: dict[bytes, tuple[int, int]] = {}
    # Every place of the boundary must be the beginning of a part, or the end.
    at = body.find(mark)
    if at:
        raise unclear
    for _ in range(FORM_PARTS):
        at += len(mark)
        if body[at : at + 5] in (b"--", b"--\r\n"):
            return spans
        part = _FORM_PART.match(body, at)
        head = part.group(1) if part is not None else b""
        disposition = _FORM_DISPOSITION.search(head)
        if part is None or disposition is None or head.lower().count(b"content-disposition") > 1 or mark in head:
            raise unclear
        at = body.find(mark, part.end())
        if at < part.end() + 2 or body[at - 2 : at] != b"\r\n":
            raise unclear
        name = disposition.group(2).lower()
        if name in spans and name in (b"model", b"stream"):
            raise ProxyError(400, "model or stream stands twice in the form.", param="model")
        spans[name] = part.end(), at - 2
    raise ProxyError(400, f"The form has more than {FORM_PARTS} parts.")


LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def chunk(payload: bytes) -> bytes:
    """Return `payload` as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def render_fields(fields: Fields) -> bytes:
    """Return field lines, each with its CRLF."""
    return b"".join([name + b": " + value + b"\r\n" for name, value in fields])


def status_line(status: int) -> bytes:
    """Return the first line of an answer."""
    return f"HTTP/1.1 {status} {http.client.responses.get(status, '')}\r\n".encode()


def http_date(now_s: float) -> bytes:
    """Return a time, in seconds since 1970, as the value of a Date field (RFC 9110, 6.6.1)."""
    return email.utils.formatdate(now_s, usegmt=True).encode()


def split_target(target: str) -> tuple[str, str, str]:
    """Return the authority (of absolute-form), the decoded path and the raw query of a target. Raises BadMessage."""
    authority = ""
    if not target.startswith("/"):
        if target == "*":
            return "", "*", ""
        # Clients with a proxy setting send the absolute form (RFC 9112, 3.2.2).
        absolute = _ABSOLUTE_TARGET.match(target)
        if absolute is None:
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
# Finds events in a byte stream, however it is cut, inspects them, and never rewrites them. Only bytes are split: U+2028
# is no line end here. https://html.spec.whatwg.org/multipage/server-sent-events.html

# An event ends with an empty line. Each of its two line ends may be CRLF, LF or CR; "\r\n" alone is one line end, so
# the longest alternative stands first.
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
TAIL_BYTES = 4096  # what is kept of the end of an answer
EVENT_BYTES = 1_048_576  # a larger event of a stream is not parsed
# Responses API events that come before any output: an error after them can still go to another controller. The next
# keep a connection open while a model thinks, also behind gateways to Anthropic.
_KINDS_BY_TYPE = dict.fromkeys(("response.created", "response.queued", "response.in_progress"), "preface")
_KINDS_BY_TYPE.update(keepalive="life", ping="life", heartbeat="life")


class EventSplitter:
    """Splits a stream into whole events; `pending` is the start of the next one."""

    pending = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the events that `data` completes, each with the blank line that ends it."""
        data = self.pending + data
        start = 0
        for end in _EVENT_END.finditer(data):
            yield data[start : end.end()]
            start = end.end()
        self.pending = data[start:]


def event_fields(event: bytes) -> tuple[bytes, bytes]:
    """Return an event's type (`event:`) and data. Several data lines are joined; comments are skipped."""
    kind, data = b"", []
    for line in event.removeprefix(b"\xef\xbb\xbf").splitlines():  # a stream may begin with a byte order mark
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
    return kind, b"\n".join(data)


class EventKind(enum.Enum):
    """The meaning of an event for the decision to commit to an upstream."""

    LIFE = "life"  # a comment or a ping: the upstream is at work
    PREFACE = "preface"  # a role without content, Azure's chunk without choices, response.created
    REAL = "real"
    ERROR = "error"


def first_object(value: Any) -> dict[str, Any]:
    """Return `value`, or the first member of a list, if it is an object; else an empty object."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, dict) else {}


def find_error(value: Any) -> dict[str, Any]:
    """Return the error in a parsed body, in any of the shapes that providers use; an empty object without one.

    Shapes: `error` (OpenAI and most others; a text at xAI and TGI), all in a list (Google), `errors` (Cloudflare),
    `choices[0].error` (OpenRouter), `response.error` (OpenAI's Responses API), or flat (vLLM, SiliconFlow).
    """
    body = first_object(value)
    choice, response = first_object(body.get("choices")), first_object(body.get("response"))
    error = body.get("error") or choice.get("error") or response.get("error") or first_object(body.get("errors"))
    if error:
        return error if isinstance(error, dict) else {"message": error, **body}
    is_error = "error" in (body.get("object"), body.get("type"), choice.get("finish_reason"))
    return body if is_error or body.get("type") == "response.failed" or body.get("success") is False else {}


def _says_nothing(choices: Any) -> bool:
    """Return whether the choices of a chunk bring no word yet: there are none, or only a role."""
    choice = first_object(choices)
    delta = choice.get("delta")
    words = [name for name, value in delta.items() if value and name != "role"] if isinstance(delta, dict) else [""]
    return choices == [] or not (words or choice.get("finish_reason"))


def event_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that an event's data is, or the first in a list; an empty one for any other data."""
    try:
        return first_object(json.loads(data))
    except (ValueError, RecursionError):
        return {}


def judge_event(event: bytes) -> EventKind:
    """Return whether an event belongs to a real answer, is an error, or may come before either."""
    kind, data = event_fields(event)
    value, text = event_object(data), data.strip()
    name = str(value.get("type") or kind.decode("latin-1"))
    if kind == b"error" or find_error(value):
        return EventKind.ERROR
    if name in _KINDS_BY_TYPE or not text:
        return EventKind(_KINDS_BY_TYPE.get(name, "life"))
    # An answer may be empty. Its chunks have choices, and all other events of answers have a type.
    is_real = text == b"[DONE]" or "type" in value or not _says_nothing(value.get("choices") or [])
    return EventKind.REAL if is_real else EventKind.PREFACE


# What ends a stream of the Responses API, and one of chats or completions. Inside a JSON string each quote has a
# backslash, so no text of an answer looks like this. Some vendors write "" for a reason that is not known yet.
_RESPONSE_END = re.compile(rb'(?:"type"\s*:\s*"|[\r\n]event: ?)response\.(?:completed|failed|incomplete)["\r\n]')
_CHOICE_END = re.compile(rb'"finish_reason"\s*:\s*"[^"]')
_DONE = re.compile(rb"[\r\n]data: ?\[DONE\]")


class StreamEnd:
    """Watches a stream for its end, as upstreams often close without an error in the middle of an answer.

    `tail` is the last part of the stream: usage, late errors and [DONE] stand there.
    """

    def __init__(self, is_response: bool) -> None:
        self.pattern, self.seen, self.tail = _RESPONSE_END if is_response else _CHOICE_END, False, b"\n"
        self.open = b""  # what came since the last blank line

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        last = len(self.tail)
        self.tail += data
        # A bit of what came before, as the words may be cut in two.
        self.seen = self.seen or self.pattern.search(self.tail, max(0, last - 64)) is not None
        self.tail = self.tail[-TAIL_BYTES:]
        blank = max(data.rfind(b"\n\n"), data.rfind(b"\n\r\n"), data.rfind(b"\r\r"))
        self.open = data[blank + 2 :] if blank >= 0 else (self.open + data)[-EVENT_BYTES:]

    def is_whole(self) -> bool:
        """Return whether the stream has its end, and the last event is not cut in half."""
        # Some servers close after the last event without its blank line.
        last = event_fields(_EVENT_END.split(self.open)[-1])[1].strip()
        is_ended = not last or bool(event_object(last))
        return (self.seen and is_ended) or _DONE.search(self.tail) is not None


def is_usage_event(event: bytes) -> bool:
    """Return whether an event has the usage of a chat and nothing else, as `include_usage` brings it."""
    value = event_object(event_fields(event)[1]) if b'"usage"' in event else {}
    return value.get("choices") == [] and bool(value.get("usage"))


def error_event(message: str, code: str) -> bytes:
    """Return the event that reports a broken stream. go-openai needs `error` as the first key, without a space."""
    return b"data: " + compact_json(error_object(message, "server_error", code)) + b"\n\n"


# ==== 6. Timed streams ====
# asyncio's streams with three additions: a read that returns whatever has arrived and can be interrupted with an error,
# a callback when the peer leaves, and a timer that an assignment moves (a `wait_for` for each read costs more than the
# read). A read is never ended by cancelling its task: a cancellation has no reason, and loses what has just arrived.

# The most that one read brings; a reader that holds as much stops its peer.
READ_BYTES = 65_536
# Unsent bytes to one peer above which nothing more is read for it.
WRITE_HIGH_BYTES = 65_536
# An upstream that acknowledges nothing for so long cannot be reached; a lost packet is sent again within 1 s.
DEAD_PATH_S = 20.0
# A timer is armed at most this far ahead, so that moving a deadline later is an assignment.
REARM_S = 30.0


def watch_path(connection: socket.socket, dead_after_s: float) -> None:
    """Let the kernel end a connection whose peer acknowledges nothing for `dead_after_s`, also while nothing is sent.

    Accepted connections inherit this from their listener.
    """
    dead_after_s = min(max(DEAD_PATH_S, dead_after_s), 3600.0)
    options = {
        "TCP_USER_TIMEOUT": round(dead_after_s * 1000),  # for bytes that were sent, in ms (RFC 5482); Linux only
        "TCP_KEEPIDLE": round(dead_after_s * 0.4),  # seconds of silence before the first of three probes
        "TCP_KEEPALIVE": round(dead_after_s * 0.4),  # its name on macOS
        "TCP_KEEPINTVL": round(dead_after_s * 0.2),
        "TCP_KEEPCNT": 3,
    }
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError:
        # A Mac refuses options of a connection that was reset; the next read reports that.
        pass


class Deadline:
    """Calls `expired` once when loop time `at` has passed; infinity switches the timer off.

    A new time that may be earlier than the last one needs `set`. To move the time later, assign `at`, as a stream does
    at each event: the timer looks at it when it fires.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        self.loop, self.expired = loop, expired
        self.at = self.armed = math.inf
        self.timer: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Move the deadline to `at`."""
        self.at = at
        if at < self.armed:
            if self.timer is not None:
                self.timer.cancel()
            self.armed = min(at, self.loop.time() + REARM_S)
            self.timer = self.loop.call_at(self.armed, self._fire)

    def cancel(self) -> None:
        """End the timer for good."""
        # No later `set` arms it again.
        self.at, self.armed = math.inf, -math.inf
        if self.timer is not None:
            self.timer.cancel()

    def _fire(self) -> None:
        at, self.at, self.armed, self.timer = self.at, math.inf, math.inf, None
        if at > self.loop.time():
            self.set(at)
        else:
            self.expired()


class TimedReader(asyncio.StreamReader):
    """A StreamReader to be read with `read_some` only: it returns each read as it came, without a copy.

    `data` is what has arrived and was not read yet; `ended` says that nothing more will come. `on_end(error)` is called
    when the peer closes (None) or the connection is lost (the exception), also while nothing reads.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=READ_BYTES, loop=loop)
        self.loop = loop
        self.data = b""
        self.ended = False
        self.lost: BaseException | None = None
        self.on_end: Callable[[BaseException | None], None] | None = None
        self.transport: asyncio.ReadTransport | None = None
        self.paused = False
        self.waiter: asyncio.Future[None] | None = None  # of the read that waits
        # The error that the waiting read has to raise.
        self.interruption: Exception | None = None

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        """Use `transport` from now on. Called again when TLS takes the connection over."""
        assert isinstance(transport, asyncio.ReadTransport)
        # What came right behind a handshake may have stopped the socket below TLS.
        if self.paused and self.transport is not None:
            self.transport.resume_reading()
            transport.pause_reading()
        self.transport = transport

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # a protocol receives nothing but bytes
        """Keep what has arrived, and stop the peer when that is too much."""
        self.data = self.data + data if self.data else data
        if self.waiter is not None:
            self._wake()
        elif len(self.data) >= READ_BYTES and not self.paused and self.transport is not None:
            # The kernel's buffers fill, then the peer cannot send: back-pressure that costs no memory here.
            self.paused = True
            self.transport.pause_reading()

    def feed_eof(self) -> None:
        """Note the peer's FIN, or the close of the connection."""
        self._end(None)

    def set_exception(self, exc: BaseException) -> None:
        """Note that the connection is lost."""
        self._end(exc)

    async def read_some(self) -> bytes:
        """Return all that has arrived, b"" at the end; wait for one read at most.

        Raises ConnectionResetError when the connection was lost, and the error that `interrupt` gives.
        """
        if not (self.data or self.ended):
            self.waiter = self.loop.create_future()
            try:
                await self.waiter
            finally:
                self.waiter, error, self.interruption = None, self.interruption, None
            if error is not None:
                raise error
        if self.lost is not None and not self.data:
            raise ConnectionResetError(str(self.lost)) from self.lost
        data, self.data = self.data, b""
        if self.paused and self.transport is not None:
            self.paused = False
            self.transport.resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """Put back what belongs to the next reader."""
        self.data = data + self.data

    def interrupt(self, error: Exception) -> None:
        """Make the read that waits now raise `error`; what has arrived stays for the next read."""
        if self.waiter is not None:
            self.interruption = error
            self._wake()

    def _end(self, error: BaseException | None) -> None:
        # A reset may follow a FIN.
        if not self.ended or (error is not None and self.lost is None):
            self.ended, self.lost = True, error
            self._wake()
            if self.on_end is not None:
                self.on_end(error)

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class TimedProtocol(asyncio.StreamReaderProtocol):
    """Connects a TimedReader and a transport; calls `on_open(protocol)` once the connection is open.

    `full`: the peer reads slower than data is written; `on_writable` is called when that ends.
    """

    def __init__(self, reader: TimedReader, on_open: "Callable[[TimedProtocol], None] | None" = None) -> None:
        super().__init__(reader, loop=reader.loop)
        self.reader = reader
        self.transport: asyncio.Transport
        self.full = self.over_tls = False
        self.on_open = on_open
        self.on_writable: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with `transport`. Called by asyncio, and again when TLS takes the connection over."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self.transport = transport
        self.over_tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        if hasattr(transport, "max_size"):
            # asyncio's default of 256 kB is a large allocation for each read.
            transport.max_size = READ_BYTES
        on_open, self.on_open = self.on_open, None
        if on_open is not None:
            on_open(self)

    async def start_tls(self, context: ssl.SSLContext, **options: Any) -> None:
        """Put TLS on this connection. `options` are those of asyncio's `loop.start_tls`. Raises OSError."""
        # A FIN may come before the handshake has ended.
        self.over_tls = True
        secured = await self.reader.loop.start_tls(self.transport, self, context, **options)
        if secured is None:
            raise ConnectionAbortedError("closed at the end of the TLS handshake")
        self.connection_made(secured)

    def eof_received(self) -> bool:
        """Return whether the other direction stays open. TCP can close one only; asyncio's TLS closes both."""
        super().eof_received()
        return not self.over_tls

    def pause_writing(self) -> None:
        """Note that the peer is slow. Called by asyncio above the high-water mark."""
        self.full = True

    def resume_writing(self) -> None:
        """Report that the peer has caught up. Called by asyncio below the low-water mark."""
        self.full = False
        if self.on_writable is not None:
            self.on_writable()


# ==== 7. Upstream connections ====
# Dialling (TCP, proxy, TLS), a pool of idle connections for each origin, and exchanges, one at a time on a connection.
#
# No request is ever answered with bytes of another request's reply. A connection goes back to the pool only if its
# reply ended where the framing says and nothing came after it; it comes out again only if it is still open and silent.
# All others are closed, which costs a handshake and no more.

# 1xx replies before the final one; an upstream that sends more is broken.
INTERIM_COUNT = 16
# A larger request goes out in pieces of this size; a smaller one fits the receive buffer of every system.
SEND_BYTES = 65_536
# How long an abandoned connect may still run, so that its socket can be closed.
ABANDONED_S = 1.0
# An idle connection is closed after this; servers commonly close after 60 s.
IDLE_UPSTREAM_S = 55.0
# An older connection is not reused: its host's name may lead to another address by now.
CONNECTION_AGE_S = 300.0
# An idle connection that ends this soon after a write had been closed before it.
STALE_S = 1.0


@dataclass(frozen=True, eq=False)
class Origin:
    """Where an account's connections go: scheme, host, port, by which proxy, trusting which certificates.

    Compared by identity: each account has its own, and its own idle connections.
    """

    scheme: str
    host: str
    port: int
    proxy: Secret = Secret()
    ca_file: str = ""

    @property
    def authority(self) -> str:
        """Return `host[:port]` as the Host field spells it."""
        usual = self.port == {"http": 80, "https": 443}[self.scheme]
        return self.address.rpartition(":")[0] if usual else self.address

    @property
    def address(self) -> str:
        """Return `host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_origin(base_url: str, proxy: Secret, ca_file: str) -> tuple[Origin, str]:
    """Return the origin and the path prefix of a base URL that section 2 has checked."""
    parts = urllib.parse.urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Origin(parts.scheme, parts.hostname or "", port, proxy, ca_file), parts.path


def proxy_authorization(proxy: Secret) -> bytes:
    """Return the Proxy-Authorization line for a proxy URL with user and password, else b"" (RFC 7617)."""
    parts = urllib.parse.urlsplit(proxy.reveal())
    if parts.username is None:
        return b""
    pair = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
    return b"Proxy-Authorization: Basic " + base64.b64encode(pair.encode()) + b"\r\n"


@functools.lru_cache(maxsize=64)  # loading the system's certificates takes 20 ms
def tls_context(ca_file: str) -> ssl.SSLContext:
    """Return a verifying context. Without `ca_file` it trusts the system's certificates, or SSL_CERT_FILE's.

    Verification cannot be switched off: a private certificate can be put into ca_file.
    """
    context = ssl.create_default_context(cafile=ca_file or None)
    if ca_file:
        # Python 3.13 began to refuse private CAs whose certificates lack a key usage or a key identifier.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # Without ALPN some front ends speak HTTP/2.
    context.set_alpn_protocols(["http/1.1"])
    return context


def abort_late(connecting: asyncio.Task[tuple[asyncio.Transport, TimedProtocol]]) -> None:
    """Close the connection of an abandoned connect, if it has brought one."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[0].abort()


async def open_connection(host: str, port: int) -> TimedProtocol:
    """Return a new TCP connection; IPv6 and IPv4 race, 250 ms apart (RFC 8305). Raise OSError."""
    loop = asyncio.get_running_loop()
    protocol = TimedProtocol(TimedReader(loop))
    race = loop.create_connection(lambda: protocol, host, port, happy_eyeballs_delay=0.25)
    connecting = loop.create_task(race)
    try:
        await asyncio.shield(connecting)
    except asyncio.CancelledError:
        # Cancelled itself, asyncio's race would leave a socket open that has just connected.
        connecting.add_done_callback(abort_late)
        loop.call_later(ABANDONED_S, connecting.cancel)
        raise
    return protocol


Parsed = TypeVar("Parsed")


def strictly(parse: Callable[..., Parsed], *arguments: Any) -> Parsed:
    """Return what a parser of section 4 makes of a reply. Raise BadReply in place of its BadMessage."""
    try:
        return parse(*arguments)
    except BadMessage as problem:
        raise BadReply(f"the upstream's reply breaks HTTP/1.1: {problem}") from None


async def read_reply_head(reader: TimedReader) -> ResponseHead:
    """Return the final head of a reply, without the interim ones. What came behind it stays in `reader`.

    Raises UpstreamError.
    """
    data = b""
    # Any number of 100 and 103 replies may precede the final one (RFC 9110, 15.2); 101 was not asked for.
    for count in range(INTERIM_COUNT):
        end = data.find(b"\r\n\r\n")
        while end < 0 and len(data) < UPSTREAM_HEAD_BYTES + 4:
            if data[:7] != b"HTTP/1."[: len(data)]:
                raise BadReply("the upstream does not speak HTTP/1.1")
            before_reply = not (data or count)
            try:
                more = await reader.read_some()
            except ConnectionError as problem:
                raise UpstreamClosed("the upstream reset the connection before its reply", before_reply) from problem
            if not more:
                raise UpstreamClosed("the upstream closed the connection before its reply", before_reply)
            start = max(0, len(data) - 3)
            data += more
            end = data.find(b"\r\n\r\n", start)
        if not 0 <= end <= UPSTREAM_HEAD_BYTES:
            raise BadReply(f"the upstream's reply head is longer than {UPSTREAM_HEAD_BYTES} bytes")
        head, data = strictly(parse_response_head, data[: end + 4]), data[end + 4 :]
        if head.status == 101:
            raise BadReply("the upstream switched protocols without being asked")
        if head.status >= 200:
            reader.unread(data)
            return head
    raise BadReply(f"the upstream sent more than {INTERIM_COUNT - 1} interim replies")


async def open_tunnel(protocol: TimedProtocol, origin: Origin) -> None:
    """Ask the proxy for a tunnel to `origin`. Raises UpstreamError, UnicodeError."""
    # The target has its port, even the usual one (RFC 9110, 9.3.6).
    start = f"CONNECT {origin.address} HTTP/1.1\r\nHost: {origin.address}\r\n"
    protocol.transport.write(start.encode() + proxy_authorization(origin.proxy) + b"\r\n")
    head = await read_reply_head(protocol.reader)
    if not 200 <= head.status < 300:
        raise ConnectFailed(f"the proxy refused the tunnel with status {head.status}")
    # These bytes would be taken for the upstream's TLS.
    if protocol.reader.data:
        raise ConnectFailed("the proxy sent bytes before the tunnel's own")


async def dial(origin: Origin) -> TimedProtocol:
    """Return a connection on which requests to `origin` can be written. Raises OSError, UnicodeError, UpstreamError."""
    tls = tls_context(origin.ca_file) if origin.scheme == "https" else None
    proxy = urllib.parse.urlsplit(origin.proxy.reveal())
    host, port = (proxy.hostname or "", proxy.port or 80) if origin.proxy else (origin.host, origin.port)
    protocol = await open_connection(host, port)
    if tls is not None:
        try:
            # A plain origin needs no tunnel: its requests have the absolute form.
            if origin.proxy:
                await open_tunnel(protocol, origin)
            await protocol.start_tls(tls, server_hostname=origin.host)
        except BaseException:
            protocol.transport.abort()
            raise
    return protocol


def describe_failure(problem: Exception) -> str:
    """Return why a connect failed, for clients: without the addresses that the error itself names."""
    if isinstance(problem, UpstreamError):
        return str(problem)
    if isinstance(problem, ssl.SSLError):
        return "TLS failed: " + (problem.reason or "protocol error").lower().replace("_", " ")
    if isinstance(problem, (socket.gaierror, UnicodeError)):
        return "its name cannot be resolved"
    # If several addresses failed, only their texts have it.
    number = re.search(r"\[Errno (\d+)\]", str(problem))
    return os.strerror(int(number.group(1))) if number else "closed during the handshake"


# A request's head, and its body in any number of pieces.
Message = tuple[bytes | memoryview | mmap.mmap, ...]


class Exchange(Protocol):
    """One request and its reply, on a network connection or made up by an echo controller.

    `start` sends the request and reads the reply's `head`. `read` returns some bytes of the body, b"" at the end of a
    whole one. `finish` gives the connection back after that, `abort` closes it at any time; both may be repeated.
    `interrupt` makes the `start` or `read` that waits raise `error`. All raise UpstreamError. `first_byte_s` is the
    longest time to the first event.
    """

    head: ResponseHead
    first_byte_s: float

    async def start(self) -> None: ...
    async def read(self) -> bytes: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...
    def interrupt(self, error: Exception) -> None: ...


class UpstreamConnection:
    """A connection of the pool. Its one timer ends the idling, and in an exchange the waiting."""

    def __init__(self, origin: Origin, protocol: TimedProtocol, pool: "ConnectionPool") -> None:
        self.origin, self.protocol, self.pool = origin, protocol, pool
        self.reader, self.transport = protocol.reader, protocol.transport
        self.loop = self.reader.loop
        self.deadline = Deadline(self.loop, self._expired)
        self.request_count = 0
        self.dead_after_s = 0.0  # see `watch_path`
        self.expires_at = self.loop.time() + CONNECTION_AGE_S
        # The current request's beginning, in loop time.
        self.written_at = 0.0
        # The error when the deadline passes in an exchange.
        self.late = UpstreamTimeout("")
        self.reader.on_end = self._ended

    def is_quiet(self) -> bool:
        """Return whether it is open and nothing has come unasked, such as a 408 (RFC 9112, 9.5 and 11.2)."""
        return not (self.reader.ended or self.reader.data or self.transport.is_closing())

    def was_stale(self, error: UpstreamClosed) -> bool:
        """Return whether it had probably ended before the request arrived (RFC 9112, 9.3.1)."""
        # With these errors the kernel reports a dead path (`watch_path`): the request was not acknowledged.
        dead = getattr(self.reader.lost, "errno", None) in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
        # A reset long after the write is another thing: the request was being answered, and may be billed.
        early = dead or self.loop.time() - self.written_at < STALE_S
        return error.before_reply and self.request_count > 1 and early

    def close(self) -> None:
        """Close at once. TLS would wait for the peer's goodbye, and an upstream that generates would not notice."""
        self.deadline.cancel()
        self.reader.on_end = None
        self.transport.abort()

    def _expired(self) -> None:
        if self not in self.pool.active:
            self.pool.drop(self)
        else:
            self.reader.interrupt(self.late)

    def _ended(self, error: BaseException | None) -> None:
        # In an exchange the next read reports the end.
        if self not in self.pool.active:
            self.pool.drop(self)


class ConnectionPool:
    """Keeps the idle connections of each origin. The last used goes out first, so that those too many grow old.

    They need no bound: an origin never has more of them than it had requests at once.
    """

    def __init__(self) -> None:
        self.idle: dict[Origin, list[UpstreamConnection]] = {}
        self.active: set[UpstreamConnection] = set()
        self.closed = False

    def __repr__(self) -> str:
        return f"<ConnectionPool idle={self.idle_count} active={len(self.active)}>"

    @property
    def idle_count(self) -> int:
        """Return the number of idle connections."""
        return sum(map(len, self.idle.values()))

    async def take(self, origin: Origin, fresh: bool, within_s: float) -> UpstreamConnection:
        """Return an idle connection unless `fresh`, else a new one. Raise ConnectFailed, within `within_s` seconds."""
        idle = [] if fresh else self.idle.get(origin, [])
        while idle:
            connection = idle.pop()
            if connection.is_quiet():
                self.active.add(connection)
                return connection
            connection.close()
        try:
            async with asyncio.timeout(within_s):
                protocol = await dial(origin)
        except TimeoutError:
            raise ConnectFailed(f"no connection within {within_s:g} s") from None
        except (OSError, UnicodeError, UpstreamError) as problem:
            log.info("no connection to %s: %s", origin.authority, str(problem) or "closed during the handshake")
            raise ConnectFailed(f"no connection: {describe_failure(problem)}") from problem
        connection = UpstreamConnection(origin, protocol, self)
        self.active.add(connection)
        return connection

    def give_back(self, connection: UpstreamConnection, reusable: bool) -> None:
        """Take a connection after its exchange; close it unless it can serve another."""
        self.active.discard(connection)
        now = connection.loop.time()
        good = reusable and not self.closed and connection.is_quiet() and now < connection.expires_at
        # What is left of a request in the transport's buffer would stand before the next request.
        if not good or connection.transport.get_write_buffer_size():
            connection.close()
            return
        connection.deadline.set(min(now + IDLE_UPSTREAM_S, connection.expires_at))
        self.idle.setdefault(connection.origin, []).append(connection)

    def drop(self, connection: UpstreamConnection) -> None:
        """Close an idle connection that has expired or ended."""
        self.idle[connection.origin].remove(connection)
        connection.close()

    def close(self) -> None:
        """Close the idle connections now, and each active one when it is given back."""
        self.closed = True
        for connections in self.idle.values():
            for connection in connections:
                connection.close()
        self.idle.clear()


@dataclass(eq=False)
class NetworkExchange:
    """An exchange on a connection of the pool. See `Exchange`.

    `on_sent(now)` is called when the request is written. A large request that is not written to its end counts as sent
    when its exchange ends, as providers bill cancelled calls. `resend`: the request may run twice, so it is written
    again if a pooled connection had ended. `fresh`: use a new connection, as the host may have another address by now.
    `pieces` of a large request are not written yet. `replied_early`: the reply began before they were. `interrupted` is
    the error of an interruption while there was no connection.
    """

    pool: ConnectionPool
    origin: Origin
    message: Message
    timeouts: Timeouts
    on_sent: Callable[[float], None]
    method: str = "POST"
    resend: bool = False
    fresh: bool = False
    head: ResponseHead = field(init=False)
    first_byte_s: float = field(init=False)
    connection: UpstreamConnection | None = None
    decoder: Decoder | None = None
    pieces: Iterator[memoryview] | None = None
    replied_early: bool = False
    interrupted: Exception | None = None

    def __post_init__(self) -> None:
        self.first_byte_s = min(self.timeouts.first_byte or math.inf, self.timeouts.total or math.inf)

    async def start(self) -> None:
        """See `Exchange`."""
        while True:
            connection = await self.pool.take(self.origin, self.fresh, self.timeouts.connect)
            if self.interrupted is not None:
                self.pool.give_back(connection, False)
                raise self.interrupted
            self._send(connection)
            try:
                self.head = await read_reply_head(connection.reader)
                break
            except UpstreamClosed as error:
                # Upstreams close idle connections, and their FIN may cross our request, which is hardly ever read then.
                # This is the only replay that section 10 does not decide. A new connection is never stale.
                if not (self.resend and connection.was_stale(error)):
                    raise
                self.abort()
                self.fresh = True
        # The proxy sent it, so the request has not reached its upstream.
        if self.head.status == 407:
            raise ConnectFailed("the proxy wants another password")
        self.decoder = strictly(reply_body_decoder, self.head, self.method)
        # A long answer does not keep the memory of its prompt.
        self.message = ()
        self.replied_early = self.pieces is not None
        connection.late = UpstreamTimeout("nothing came from the upstream in time")
        connection.deadline.at = math.inf

    async def read(self) -> bytes:
        """See `Exchange`."""
        connection, decoder, payload = self.connection, self.decoder, b""
        assert connection is not None and decoder is not None
        idle_s, total_s = self.timeouts.idle or math.inf, self.timeouts.total or math.inf
        while not (payload or decoder.done):
            connection.deadline.set(min(connection.loop.time() + idle_s, connection.written_at + total_s))
            try:
                data = await connection.reader.read_some()
            except ConnectionError as problem:
                raise UpstreamClosed("the upstream reset the connection in its reply") from problem
            # Until the next read it is the client that is slow.
            connection.deadline.at = math.inf
            if not data:
                if not decoder.until_end:
                    raise UpstreamClosed("the upstream closed the connection in the middle of its reply")
                decoder.done = True
                break
            payload = strictly(decoder.feed, data)
        return payload

    def interrupt(self, error: Exception) -> None:
        """See `Exchange`."""
        if self.connection is not None:
            self.connection.reader.interrupt(error)
        else:
            self.interrupted = error

    def finish(self) -> None:
        """See `Exchange`. The connection is kept if the reply was whole and neither side wants to close."""
        decoder = self.decoder
        # After an early reply the upstream may take the rest of the body, a client's bytes, for the next request.
        whole = decoder is not None and decoder.done and not (decoder.surplus or self.replied_early)
        # After a 5xx, a new connection may find a better machine behind the same name.
        self._give_back(whole and self.head.status < 500 and keeps_alive(self.head.index, self.head.http_minor))

    def abort(self) -> None:
        """See `Exchange`."""
        self._give_back(False)

    def _send(self, connection: UpstreamConnection) -> None:
        """Write the request. Its reply may begin before all of it is sent (401, 413), so this does not wait."""
        self.connection = connection
        now = connection.loop.time()
        connection.request_count += 1
        connection.written_at = now
        connection.late = UpstreamTimeout(f"no byte of a reply within {self.first_byte_s:g} s", before_reply=True)
        small = sum(map(len, self.message)) <= SEND_BYTES
        # A busy upstream may read nothing, and acknowledges only what its buffer takes: a large request has more time.
        dead_after_s = DEAD_PATH_S if small else self.first_byte_s
        if dead_after_s != connection.dead_after_s:
            connection.dead_after_s = dead_after_s
            watch_path(connection.transport.get_extra_info("socket"), dead_after_s)
        if small:
            connection.transport.write(b"".join(self.message))
            connection.deadline.set(now + self.first_byte_s)
            self.on_sent(now)
        else:
            parts = [memoryview(part) for part in self.message]
            self.pieces = (part[at : at + SEND_BYTES] for part in parts for at in range(0, len(part), SEND_BYTES))
            connection.protocol.on_writable = self._send_more
            self._send_more()

    def _send_more(self) -> None:
        """Write as much of a large request as the upstream takes. The time to answer begins anew with each piece."""
        connection = self.connection
        if connection is None or self.pieces is None:
            return
        now = connection.loop.time()
        if self.decoder is None:
            connection.deadline.set(now + self.first_byte_s)
        for piece in self.pieces:
            if connection.transport.is_closing():
                return
            connection.transport.write(piece)
            if connection.protocol.full:
                return
        self.pieces = None
        self.on_sent(now)

    def _give_back(self, reusable: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is None:
            return
        connection.protocol.on_writable = None
        if self.pieces is not None:
            self.pieces = None
            self.on_sent(connection.loop.time())
        self.pool.give_back(connection, reusable)


# ==== 8. Translations ====
# Translates chat completions to Anthropic's Messages API, and its answers back. Pure functions: no I/O, no clock.
# Source: https://platform.claude.com/docs/en/api/messages and the types of the anthropic-sdk-python package.
#
# A request is checked first and built second. `_REQUEST` is a table of all fields that have an equivalent, and
# `_convert` checks a request against it. Any other field raises Untranslatable: nothing is dropped silently. A new
# field needs a row in the table, a line in `to_messages` or in a function that it calls, and a golden file in
# tests/golden/anthropic.

# A form describes what one place of a request may hold:
#   None                     any value
#   (function, message)      a value that the function converts; None, or an exception, is an error with this message
#   {name: form, ...}        an object with no other fields; "" lists the names of required ones
#   [form]                   a list of such values
#   (field, {word: form})    an object; the word in its `field` selects the form
#   a function               returns the form for a value
Form = Any

_NO_EQUIVALENT = "has no equivalent in Anthropic's Messages API."
_STRING: Form = (lambda value: value if isinstance(value, str) else None, "must be a string.")
_OBJECT: Form = (lambda value: value if isinstance(value, dict) else None, "must be an object.")
_LIST: Form = (lambda value: value if isinstance(value, list) else None, "must be a list.")
# Compared by type: isinstance would accept true as a number.
_POSITIVE: Form = (lambda value: value if type(value) is int and value > 0 else None, "must be a whole number above 0.")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # of reasoning_effort; see `_reasoning`
# allowed_tools is missing: the other tools would have to be removed, and the prompt cache begins with the tools.
_TOOL_CHOICES = {"auto": "auto", "required": "any", "none": "none"}
_THINKING_BLOCKS = ("thinking", "redacted_thinking")  # the second is encrypted; it can only be sent back
# The least default of max_tokens for models that think, as thinking counts. All of them allow it.
_THINKING_TOKENS = 32_000
# How the names of models with a trait go on after "claude-": platform.claude.com, "Troubleshooting thinking",
# "Mid-conversation system messages" and the models' pages "What's new". On other platforms, names begin differently:
# those models count as models without traits.
_FROM_5_5 = r"(5-[5-9](?!\d)|[6-9])"
_TRAITS = {
    "thinks by default": rf"(opus|sonnet|fable|mythos)-[5-9]|haiku-{_FROM_5_5}",
    "always thinks": rf"(opus|sonnet)-{_FROM_5_5}|(fable|mythos)-[5-9]",
    "takes system messages": rf"(opus-4-[89](?!\d)|(opus|fable|mythos)-[5-9]|(sonnet|haiku)-{_FROM_5_5})",
    "refuses sampling": rf"opus-4-[7-9](?!\d)|(opus|sonnet|fable|mythos)-[5-9]|haiku-{_FROM_5_5}",
    "refuses a prefill": rf"(opus|sonnet)-(4-[6-9](?!\d)|[5-9])|(fable|mythos)-[5-9]|haiku-{_FROM_5_5}",
    "refuses forced tools": rf"(opus|sonnet)-{_FROM_5_5}|(fable|mythos)-(5-[1-9](?!\d)|[6-9])",
}
# Steps of a thinking block's `after`; see `from_message`. All others are lengths of texts.
_JSON_STEP, _CALL_STEP = "json_object", "call"
# The API has no JSON mode without a schema.
_JSON_TEXT = "Answer with one valid JSON object and nothing else: no other text and no code fence."
_JSON_MODE = [{"role": "system", "content": _JSON_TEXT}]


def _only(*values: Any) -> Form:
    """Return the form of a field that may hold only these values: they change nothing."""
    return (lambda value: value if value in values else None), _NO_EQUIVALENT


def _stop_sequences(value: Any) -> list[str] | None:
    """Return the stop sequences. The API refuses blank ones; without them the answer would not stop there."""
    stops = [value] if isinstance(value, str) else value
    return stops if isinstance(stops, list) and all(map(str.strip, stops)) else None


def _url(*kinds: str) -> Form:
    """Return the form of a URL that becomes a source block: a web address, or a data URL of these media types.

    The API judges the address and the data, which may have megabytes.
    """

    def convert(url: str) -> dict[str, str] | None:
        if url.startswith(("https://", "http://")):
            return {"type": "url", "url": url}
        kind = re.findall("^data:([^;,]*)(?:;[^;,]*)*;base64,", url[:128], re.IGNORECASE)[0]
        kind = kind.lower().replace("jpg", "jpeg")
        return {"type": "base64", "media_type": kind, "data": url.partition(",")[2]} if kind in kinds else None

    return convert, f"must be an https URL, or a data URL in base64 of type {' or '.join(kinds)}."


def _thinking_block(block: dict[str, Any]) -> dict[str, Any]:
    """Return a thinking block with `after` and without `index`, which streams add."""
    names = ("type", "thinking", "signature") if block["type"] == "thinking" else ("type", "data")
    return {**{name: block[name] for name in names}, "after": [*(block.get("after") or ())]}


def _arguments(value: str | dict[str, Any]) -> dict[str, Any]:
    """Return the input of a call. A history may hold any text: max_tokens cuts arguments."""
    try:
        parsed = value if isinstance(value, dict) else json.loads(value or "{}", strict=False, parse_constant=str)
    except (ValueError, RecursionError):
        parsed = value
    return parsed if isinstance(parsed, dict) else {} if parsed is None else {"arguments": value}


# What structured outputs know, by platform.claude.com, "Structured outputs".
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def _refuse_recursion(definitions: dict[str, Any]) -> None:
    """Raise ValueError if a definition refers to itself, also by others."""
    uses = {name: set(re.findall('"#/[^/"]+/([^"]*)"', json.dumps(part))) for name, part in definitions.items()}
    while uses:
        # Those that use no other are in no circle.
        rest = {name: used for name, used in uses.items() if used & uses.keys()}
        if len(rest) == len(uses):
            raise ValueError("recursion")
        uses = rest


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` in the subset of structured outputs. Raise ValueError, TypeError, AttributeError or LookupError.

    It is rewritten as transform_schema of the anthropic-sdk-python package does: objects are closed, and what the
    subset lacks moves to the description. An error is what has no type, and what this would change too much.
    """
    left: dict[str, Any] = dict(schema)
    made: dict[str, Any] = {}
    if len(left.get("allOf", ())) == 1:
        # Older pydantic wraps references in this way.
        return _schema({**left.pop("allOf")[0], **left})
    for name in ("$defs", "definitions"):
        if name in left:
            made[name] = {key: _schema(part) for key, part in left.pop(name).items()}
            _refuse_recursion(made[name])
    if "$ref" in left:
        if not left["$ref"].startswith(("#/$defs/", "#/definitions/")):
            raise ValueError("a reference to something else than a definition")
        return {**made, "$ref": left["$ref"]}
    values = [left.pop("const")] if "const" in left else left.pop("enum", None)
    if values is not None:
        made["enum"] = values
        kinds = sorted({_TYPES[type(value)] for value in values})
        left.setdefault("type", kinds if len(kinds) > 1 else kinds[0])
    choice = left.keys() & {"anyOf", "oneOf", "allOf"}
    if choice:
        (name,) = choice
        made["allOf" if name == "allOf" else "anyOf"] = [_schema(part) for part in left.pop(name)]
        if left.pop("type", None) == "object" or "properties" in left:
            raise ValueError("properties beside a choice")
    else:
        made["type"] = left.pop("type")
    if "object" in made.get("type", ()):
        is_open = left.pop("additionalProperties", "properties" not in left) not in (False, None)
        made["properties"] = {name: _schema(part) for name, part in left.pop("properties", {}).items()}
        if is_open and not made["properties"]:
            raise ValueError("an object with any keys")
        made["additionalProperties"] = False
    if "items" in left:
        made["items"] = _schema(left.pop("items"))
    kept = ["title", "description", "required"]
    kept += ["format"] * (left.get("format") in _FORMATS) + ["minItems"] * (left.get("minItems") in (0, 1))
    made.update({name: left.pop(name) for name in kept if name in left})
    if left:
        lost = "{" + ", ".join(f"{name}: {value}" for name, value in left.items()) + "}"
        made["description"] = "\n\n".join(filter(None, [made.get("description"), lost]))
    return made


_IMAGE = _url("image/jpeg", "image/png", "image/gif", "image/webp")
_PARTS: dict[str, Form] = {
    **dict.fromkeys(("text", "refusal"), _STRING),
    "image_url": {"": ("url",), "url": _IMAGE, "detail": _only("auto", "high")},
    "file": {"": ("file_data",), "file_data": _url("application/pdf"), "filename": None},
}


def _content(*kinds: str) -> Form:
    """Return the form of a message's content: a string, or a list of parts of these kinds."""
    # cache_control is Anthropic's own field; clients of OpenRouter send it in OpenAI's format.
    parts = {kind: {"": (kind,), kind: _PARTS[kind], "cache_control": None} for kind in kinds}
    return lambda value: _STRING if isinstance(value, str) else [("type", parts)]


_CALL_ID: Form = (lambda value: value + "" or None, "must be a string that is not empty.")
_CALL: Form = {
    "": ("id", "function"),
    "id": _CALL_ID,
    "function": {
        "": ("name",),
        "name": _STRING,
        "arguments": (_arguments, "must be a string."),
        "parsed_arguments": None,  # added by `parse` and `stream` of the openai package, as is `parsed`
    },
    **dict.fromkeys(("type", "index", "extra_content")),  # `index` comes from streams, extra_content from Gemini
}
_SYSTEM: Form = {"content": _content("text")}
_USER: Form = {"content": _content("text", "image_url", "file")}
_MESSAGES: dict[str, Form] = {
    "system": _SYSTEM,
    "developer": _SYSTEM,
    "user": _USER,
    "assistant": {
        "content": _content("text", "refusal"),
        "refusal": _STRING,
        "thinking_blocks": [(_thinking_block, "must be a thinking block of an earlier answer, unchanged.")],
        "tool_calls": [_CALL],
        # Thinking without a signature is left out: the API accepts no thinking that it did not sign.
        **dict.fromkeys(("annotations", "parsed", "reasoning_content", "reasoning", "reasoning_details")),
    },
    "tool": {"": ("tool_call_id",), "tool_call_id": _CALL_ID, "name": None, **_USER},
}
_FUNCTION: Form = {"": ("name",), "name": _STRING, "description": None, "parameters": _OBJECT, "strict": None}
_STRICT: Form = (_schema, "must be a schema with types, without recursion and free keys, for Anthropic's Messages API.")
_TOOL_NAME: Form = {"": ("function",), "function": {"": ("name",), "name": _STRING}}
_TOOL_WORD: Form = (_TOOL_CHOICES.get, "must be none, auto, required or a function for Anthropic's Messages API.")
_SCHEMA: Form = {
    "": ("json_schema",),
    "json_schema": {"": ("schema",), "schema": _STRICT, **dict.fromkeys(("name", "description", "strict"))},
}
# Copied unchanged: equal in both APIs, or Anthropic's own and sent by clients as extra fields.
_COPIED = ("model", "stream", "thinking", "cache_control")
# Such parameters exclude thinking, and newer models refuse them.
_SAMPLING = ("temperature", "top_p", "top_k")
_REQUEST: Form = {
    **dict.fromkeys((*_COPIED, *_SAMPLING)),
    "messages": [("role", _MESSAGES)],
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), _POSITIVE),
    "temperature": (lambda value: value if 0 <= value <= 2 else None, "must be a number from 0 to 2."),
    "top_p": (lambda value: value if 0 <= value <= 1 else None, "must be a number from 0 to 1."),
    "stop": (_stop_sequences, "must be texts that are more than white space for Anthropic's Messages API."),
    **dict.fromkeys(("user", "safety_identifier", "parallel_tool_calls")),
    "tools": [{"": ("function",), "function": _FUNCTION, **dict.fromkeys(("type", "cache_control"))}],
    "tool_choice": lambda value: ("type", {"function": _TOOL_NAME}) if isinstance(value, dict) else _TOOL_WORD,
    "response_format": ("type", {"text": {}, "json_object": {}, "json_schema": _SCHEMA}),
    "reasoning_effort": (_EFFORTS.index, f"must be one of {', '.join(_EFFORTS)}."),
    # The rest is checked and left out: hints, options of our own stream translation, and defaults. Libraries send
    # defaults that the user did not set.
    **dict.fromkeys(("stream_options", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")),
    "n": _only(1),
    **dict.fromkeys(("store", "logprobs"), _only(False)),
    **dict.fromkeys(("metadata", "logit_bias"), _only({})),
    **dict.fromkeys(("top_logprobs", "frequency_penalty", "presence_penalty"), _only(0)),
    "modalities": _only(["text"]),
    "service_tier": _only("auto", "default"),
    "verbosity": _only("medium"),
    "functions": _only([]),
}


def _convert_value(value: Any, form: Form, path: str) -> Any:
    """Return the result of the form's function for `value`. Raise Untranslatable with the form's message."""
    function, message = form
    try:
        converted = function(value)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        converted = None  # the value has another type than the function expects
    if converted is None:
        raise Untranslatable(path, message)
    return converted


def _convert(value: Any, form: Form, path: str, drop: frozenset[str]) -> Any:
    """Check `value` against `form` and return it converted. Raise Untranslatable with the path of the first fault.

    Left out are fields and parts named in `drop`, nulls, and unknown fields that are empty, except at the top level:
    clients send messages back with all fields that vendors and libraries add, but web_search_options: {} has a meaning.
    """
    if callable(form):
        form = form(value)
    if form is None:
        return value
    if isinstance(form, list):
        return [
            _convert(item, form[0], f"{path}[{index}]", drop)
            for index, item in enumerate(_convert_value(value, _LIST, path))
            if not (isinstance(item, dict) and str(item.get("type")) in drop)
        ]
    if isinstance(form, tuple) and callable(form[0]):
        return _convert_value(value, form, path)
    members = _convert_value(value, _OBJECT, path)
    if isinstance(form, tuple):
        field, forms = form
        word = str(members.get(field))
        if word not in forms:
            raise Untranslatable(f"{path}.{field}", f"must be {' or '.join(forms)} for Anthropic's Messages API.")
        form = {field: None, **forms[word]}
    prefix = path and path + "."
    required = form.get("", ())
    converted = {}
    for name in dict.fromkeys((*members, *required)):
        member = members.get(name)
        if name not in required and (member is None or name in drop):
            continue
        if name and name in form:  # no form of a required field accepts null
            converted[name] = _convert(member, form[name], prefix + name, drop)
        elif not path or member not in ("", [], {}, False):
            raise Untranslatable(prefix + name[:100], _NO_EQUIVALENT)
    return converted


def _set(**fields: Any) -> dict[str, Any]:
    """Return the fields that are neither null nor empty: the APIs refuse such values."""
    return {name: value for name, value in fields.items() if value}


def _blocks(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the blocks of a message's content.

    The API refuses blank texts. Answers that only call tools often have a blank text (hermes-agent PR 11929).
    """
    blocks = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        value: Any = part[part["type"]]
        optional = _set(cache_control=part.get("cache_control"))
        if part["type"] == "image_url":
            blocks.append({"type": "image", "source": value["url"], **optional})
        elif part["type"] == "file":
            optional.update(_set(title=value.get("filename")))
            blocks.append({"type": "document", "source": value["file_data"], **optional})
        elif value.strip():
            blocks.append({"type": "text", "text": value, **optional})
    return blocks


def _answer(message: dict[str, Any], calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks of an assistant's message in the order in which the model made them: see `from_message`."""
    content, thoughts = message.get("content") or "", message.get("thinking_blocks", ())
    blocks: list[dict[str, Any]] = []
    mark = None
    if isinstance(content, list) and any(thought["after"] for thought in thoughts):
        # Clients that set cache_control make parts of the text.
        mark = content[-1].get("cache_control")
        content = "".join([part[part["type"]] for part in content])
    for thought in thoughts:
        for step in thought.pop("after"):
            if step == _CALL_STEP:
                blocks += calls[:1]
                calls = calls[1:]
            elif isinstance(step, int):
                blocks += _blocks(content[:step])
                content = content[step:]
        blocks.append(thought)
    blocks += [*_blocks(content), *_blocks(message.get("refusal")), *calls]
    if mark and blocks[-1]["type"] not in _THINKING_BLOCKS:
        blocks[-1]["cache_control"] = mark
    return blocks


def _call_id(name: str, used: dict[str, int]) -> str:
    """Return the id to send for a call: the API demands unique ids of few characters.

    Other vendors use one id in each turn (call_0), or other characters (functions.f:0).
    """
    # Some platforms allow 64 characters.
    base = unique = re.sub(r"[^A-Za-z0-9_\-]", "_", name)[:56]
    while unique in used:
        used[base] += 1
        unique = f"{base}_{used[base]}"
    used[unique] = 1
    return unique


def _add(turns: list[dict[str, Any]], role: str, blocks: list[dict[str, Any]]) -> None:
    """Add blocks to the last turn, or as a new one. Messages without content are left out (nanobot PR 193)."""
    if blocks and role == "user" and turns and turns[-1]["role"] == "system":
        # The API refuses a system message before a user's turn: the text becomes part of it.
        turns[-2]["content"] += turns[-1]["content"]
        turns.pop()
    if blocks and turns and turns[-1]["role"] == role:
        content = turns[-1]["content"]
        # The results of parallel calls must share one turn, and lead it.
        results = [block["type"] for block in content].count("tool_result")
        at = results if blocks[0]["type"] == "tool_result" else len(content)
        content[at:at] = blocks
    elif blocks:
        turns.append({"role": role, "content": blocks})


def _conversation(messages: Iterable[dict[str, Any]], takes_system: bool) -> dict[str, Any]:
    """Return the fields `messages` and `system`.

    A signature binds thinking to all that stands before it. If a client only appends messages, nothing before a block
    of an answer changes. So only the first system messages become `system`; later ones keep their place.
    """
    system: list[dict[str, Any]] = []
    turns: list[dict[str, Any]] = []
    used: dict[str, int] = {}
    waiting: dict[str, list[str]] = {}  # by the client's id: calls of the last turn that have no result yet
    for message in messages:
        role, content = message["role"], message.get("content")
        before = turns[-1]["role"] if turns else ""
        if role == "assistant":
            if before != role:
                waiting.clear()
            calls = []
            for call in message.get("tool_calls", ()):
                function, name = call["function"], _call_id(call["id"], used)
                waiting.setdefault(call["id"], []).append(name)
                arguments = function.get("arguments", {})
                calls.append({"type": "tool_use", "id": name, "name": function["name"], "input": arguments})
            _add(turns, role, _answer(message, calls))
        elif role == "tool":
            # OpenAI has no field for is_error.
            result = _set(content=content if isinstance(content, str) else _blocks(content))
            name = message["tool_call_id"]
            name = (waiting.get(name) or [_call_id(name, {})]).pop(0)
            _add(turns, "user", [{"type": "tool_result", "tool_use_id": name, **result}])
        elif role == "user":
            _add(turns, role, _blocks(content))
        elif not turns:
            system += _blocks(content)
        else:
            # The API takes a system message only after a user's turn.
            _add(turns, "system" if takes_system and before != "assistant" else "user", _blocks(content))
    if not turns:
        raise Untranslatable("messages", "must hold a user message with content.")
    return {"messages": turns, **_set(system=system)}


def _tools(asked: dict[str, Any], turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fields `tools` and `tool_choice`. Raise Untranslatable for a choice without tools."""
    given, wanted = asked.get("tools"), asked.get("tool_choice", "auto")
    choice = {"type": "tool", "name": wanted["function"]["name"]} if isinstance(wanted, dict) else {"type": wanted}
    if not given:
        if choice["type"] not in ("auto", "none"):
            raise Untranslatable("tool_choice", "needs tools.")
        # Bedrock demands definitions of the tools in the history. As at OpenAI, the answer must not call them.
        used = [block["name"] for turn in turns for block in turn["content"] if block["type"] == "tool_use"]
        given = [{"function": {"name": name}} for name in dict.fromkeys(used)]
        choice = {"type": "none" if used else "auto"}
    elif asked.get("parallel_tool_calls") is False and choice["type"] != "none":
        # Refused beside "none".
        choice["disable_parallel_tool_use"] = True
    tools = []
    for index, tool in enumerate(given):
        function = tool["function"]
        # The API demands the schema of an object with properties, also for functions without parameters.
        schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
        path = f"tools[{index}].function.parameters"
        if schema.keys() & {"anyOf", "oneOf", "allOf"}:
            raise Untranslatable(path, "must not be a choice for Anthropic's Messages API.")
        if function.get("strict"):
            schema = _convert_value(schema, _STRICT, path)
        # `strict: false`, the default, is left out: older models refuse the field.
        cache = tool.get("cache_control")
        optional = _set(description=function.get("description"), strict=function.get("strict"), cache_control=cache)
        tools.append({"name": function["name"], "input_schema": schema, **optional})
    return _set(tools=tools, tool_choice=choice if choice != {"type": "auto"} else None)


def _reasoning(level: int, sent: dict[str, Any], mode: str, excluded: bool) -> dict[str, Any]:
    """Return the fields `thinking` and `output_config` for a level of _EFFORTS; `sent` is the request so far.

    Generations of models differ in what they accept: effort alone, effort with thinking switched on, or a budget of
    tokens. The configuration tells which (`mode`: `thinking` of `to_messages`). Thinking is not switched on if another
    parameter excludes it.
    """
    if level == 0:
        return {"thinking": {"type": "disabled"}}
    effort = max(_EFFORTS[level], "low", key=_EFFORTS.index)  # Anthropic has no "minimal"
    output = {} if mode == "budget" else {"effort": effort}
    thinking: dict[str, Any] = {"type": "adaptive"} if mode == "adaptive" else {}
    if mode == "budget":
        least, limit = 1024, sent["max_tokens"]  # the API accepts no smaller budget
        budget = max(least, min(least << level - 1, limit // 2))  # the other half is for the answer
        if budget >= limit:
            raise Untranslatable("reasoning_effort", f"needs a max_tokens above {least}.")
        # With a budget, a turn that gets tool results must begin with its signed thinking. If the client did not send
        # the `thinking_blocks` back, thinking is left out: a 400 would end the agent's loop.
        first = [turn["content"][0]["type"] for turn in sent["messages"][-2:]]
        if first[-1] != "tool_result" or first[0] in _THINKING_BLOCKS:
            thinking = {"type": "enabled", "budget_tokens": budget}
    return _set(thinking={} if excluded else thinking, output_config=output)


def _thinking(asked: dict[str, Any], sent: dict[str, Any], mode: str, traits: set[str]) -> dict[str, Any]:
    """Return the sampling parameters, and the fields for reasoning_effort; `sent` is the request so far.

    The API refuses thinking beside sampling and forced tools (platform.claude.com, "Thinking"). The client's own
    `thinking` counts: beside it, they are Untranslatable. With reasoning_effort, thinking is left out instead. A model
    that always refuses sampling gets none if the client wants thinking; else sampling is Untranslatable.
    """
    level = asked.get("reasoning_effort")
    own = first_object(sent.get("thinking")).get("type", "disabled") != "disabled"
    # Newer models refuse temperature beside top_p, even with its default: 1, the default in both APIs, is not sent.
    # Anthropic's scale ends at 1; its own endpoint for OpenAI's format lowers higher values to 1.
    sampling = {name: asked[name] for name in _SAMPLING if name in asked and (name == "top_k" or asked[name] < 1)}
    if sampling and "refuses sampling" in traits:
        if not (own or level):
            raise Untranslatable(min(sampling), "is refused by this model.")
        sampling.clear()
    forced = sent.get("tool_choice", {}).get("type") in ("any", "tool")
    if forced and "refuses forced tools" in traits:
        raise Untranslatable("tool_choice", "must not force a tool: this model refuses it.")
    # With thinking, top_p may be 0.95 or more.
    excluding = [name for name, value in sampling.items() if name != "top_p" or value < 0.95]
    excluding += ["tool_choice"] * forced
    if own and excluding:
        raise Untranslatable(excluding[0], "cannot stand beside thinking in Anthropic's Messages API.")
    if level == 0 and "always thinks" in traits:
        raise Untranslatable("reasoning_effort", "must not be none: this model always thinks.")
    return {**sampling, **({} if level is None else _reasoning(level, sent, mode, bool(excluding)))}


def to_messages(data: dict[str, Any], drop: frozenset[str], max_tokens: int, thinking: str) -> dict[str, Any]:
    """Return the Messages request for the chat request `data`. Raise Untranslatable.

    Fields named in `drop` are left out at every level. `max_tokens` is the limit where the client sets none. `thinking`
    says what reasoning_effort becomes: "effort" (output_config.effort), "adaptive" (the same, and thinking switched on)
    or "budget" (a thinking budget, for models without effort).
    """
    asked = _convert(data, _REQUEST, "", drop)
    sent = {name: asked[name] for name in _COPIED if name in asked}
    traits = {trait for trait, names in _TRAITS.items() if re.match(f"claude-({names})", str(asked.get("model")))}
    # The API demands a limit.
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if limit is None and ("thinks by default" in traits or "thinking" in asked or asked.get("reasoning_effort")):
        budget = first_object(asked.get("thinking")).get("budget_tokens")
        limit = max(_THINKING_TOKENS, max_tokens + (budget if isinstance(budget, int) else 0))
    sent["max_tokens"] = limit or max_tokens
    user = asked.get("safety_identifier") or asked.get("user")
    sent.update(_set(stop_sequences=asked.get("stop"), metadata=user and {"user_id": user}))
    wanted = asked.get("response_format", {"type": "text"})
    messages: list[dict[str, Any]] = []
    for message in asked.get("messages", ()):
        # The instruction for JSON mode stands again where it stood when the answer was made.
        steps = [step for thought in message.get("thinking_blocks", ()) for step in thought["after"]]
        messages += _JSON_MODE * (_JSON_STEP in steps) + [message]
    prompt = messages + _JSON_MODE * (wanted["type"] == "json_object")
    sent.update(_conversation(prompt, "takes system messages" in traits))
    if sent["messages"][-1]["role"] == "assistant":
        # Only the client's own prefill is one.
        if messages[-1]["role"] != "assistant" or "refuses a prefill" in traits:
            raise Untranslatable("messages", "must end with a message of the user or a tool that has content.")
        last = sent["messages"][-1]["content"][-1]
        if last["type"] == "text":
            # The API refuses a prefill that ends in white space.
            last["text"] = last["text"].rstrip()
    sent.update(_tools(asked, sent["messages"]))
    # The client's own `thinking` counts.
    sent = {**_thinking(asked, sent, thinking, traits), **sent}
    if wanted["type"] == "json_schema":
        # There, every schema is strict, and has the only place for the description.
        form = wanted["json_schema"]
        schema = {**_set(description=form.get("description")), **form["schema"]}
        sent.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": schema}
    return sent


def _tool_call(block: dict[str, Any], arguments: str) -> dict[str, Any]:
    """Return OpenAI's tool call for a tool_use block."""
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _ending(reply: dict[str, Any]) -> tuple[str, str | None]:
    """Return the finish_reason, and the model's explanation of a refusal."""
    reasons = {"tool_use": "tool_calls", "refusal": "content_filter", "max_tokens": "length"}
    reasons["model_context_window_exceeded"] = "length"
    # All others mean "stop": end_turn, stop_sequence, and pause_turn of server tools.
    return reasons.get(reply.get("stop_reason") or "", "stop"), (reply.get("stop_details") or {}).get(
        "explanation"
    ) or None


def messages_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's usage object for Anthropic's. Any number may be missing: gateways leave some out.

    Anthropic's input_tokens exclude what the prompt cache read or wrote, OpenAI's prompt_tokens include it (Portkey
    PR 1754). The answer's tokens include thinking in both.
    """
    names = ("cache_creation_input_tokens", "cache_read_input_tokens", "input_tokens", "output_tokens")
    written, read, rest, answer = (usage.get(name) or 0 for name in names)
    prompt = written + read + rest
    thinking = (usage.get("output_tokens_details") or {}).get("thinking_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def from_message(reply: dict[str, Any], created: int, json_mode: bool = False) -> dict[str, Any]:
    """Return the chat.completion for a whole Messages answer. Raise ValueError if it is not one.

    Thinking that leads to tool calls is given twice: as text, and signed in `thinking_blocks` (LiteLLM's name), which
    the client sends back with the results. Each block's `after` lists what stands between it and the block before:
    the lengths of texts, and a word for each call. The first list tells whether the request had JSON mode.
    """
    try:
        # Other types of blocks belong to tools that run at Anthropic; their results are in the text.
        blocks = reply["content"]
        text = "".join([block.get("text") or "" for block in blocks if block["type"] == "text"])
        thinking = "".join([block.get("thinking") or "" for block in blocks if block["type"] == "thinking"])
        signed, after = [], list[Any]([_JSON_STEP] * json_mode)
        for block in blocks:
            if block["type"] == "tool_use":
                after.append(_CALL_STEP)
            elif block["type"] == "text":
                after.append(len(block.get("text") or ""))
            elif block.get("signature") or block.get("data"):
                signed.append({**block, **_set(after=after)})
                after = []
        used = [block for block in blocks if block["type"] == "tool_use"]
        calls = [_tool_call(block, compact_json(block["input"]).decode()) for block in used]
        optional = _set(reasoning_content=thinking, tool_calls=calls, thinking_blocks=calls and signed)
        reason, refusal = _ending(reply)
        message = {"role": "assistant", "content": text or None, "refusal": refusal, **optional}
        return {
            "id": reply["id"],
            "object": "chat.completion",
            "created": created,
            "model": reply["model"],
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": messages_usage(reply.get("usage") or {}),
        }
    except (LookupError, TypeError, AttributeError):
        raise ValueError("the upstream's answer is not a message") from None


# -- errors in the many shapes of vendors and gateways; section 10 uses these functions too


def parse_reply(body: bytes) -> Any:
    """Return the value of a JSON body, without secrets, as clients and the log get its words; None if it is no JSON."""
    try:
        return json.loads(redactor.scrub(body))
    except (ValueError, RecursionError):
        return None


def error_words(error: dict[str, Any]) -> tuple[list[str], str]:
    """Return the names of an error (code, type and the like), the most exact one first, and its message."""
    names = [str(error[name]) for name in ("code", "type", "status", "reason") if error.get(name)]
    texts = [str(error[name]) for name in ("message", "msg", "detail") if error.get(name)]
    # OpenRouter: the provider's own error.
    raw = first_object(error.get("metadata")).get("raw")
    if isinstance(raw, str):
        inner = find_error(parse_reply(raw.encode(errors="replace")))
        texts[:1] = [": ".join([*texts[:1], error_words(inner)[1] if inner else raw])]
    return names, texts[0][:4096] if texts else ""


# The account is out of credit, or has reached a limit that its owner set.
SPENT_WORDS = (
    "(Your )?credit balance is too low|You have reached your specified .{0,40}limits"
    "|(This|Your) organization has been disabled"
)
# OpenAI's type and code for an error `TYPE: MESSAGE`. Messages come first: an account out of credit is an
# invalid_request_error there. A type that is missing here becomes the code.
_MESSAGES_ERRORS: tuple[tuple[str, str, str | None], ...] = (
    (rf"^billing_error:|^\w*: ({SPENT_WORDS})|spend_limit_reached", "insufficient_quota", "insufficient_quota"),
    (r"^\w*: (prompt is too long|input length and )", "invalid_request_error", "context_length_exceeded"),
    ("^invalid_request_error:", "invalid_request_error", None),
    ("^authentication_error:", "invalid_request_error", "invalid_api_key"),
    ("^not_found_error:", "invalid_request_error", "model_not_found"),
    ("^rate_limit_error:", "rate_limit_error", "rate_limit_exceeded"),
)


def _openai_error(error: dict[str, Any], status: int) -> dict[str, Any]:
    """Return OpenAI's error object for an error that came with `status`."""
    names, message = error_words(error)
    word, message = names[0] if names else "", message or f"The upstream answered with status {status}."
    for pattern, kind, code in _MESSAGES_ERRORS:
        if re.search(pattern, f"{word}: {message}"):
            return error_object(message, kind, code)
    return error_object(message, ProxyError(status, message).type, word or None)


def error_from_messages(status: int, body: bytes) -> tuple[int, bytes]:
    """Return OpenAI's status and body for an error of the Messages API, whatever its body is.

    An account out of credit is a 429 at OpenAI, and overload a 503, as 529 is not registered. A 404 without JSON is
    no word of the API, but of a proxy whose backend is away.
    """
    value = parse_reply(body)
    error = _openai_error(find_error(value) or first_object(value), status)
    if error["error"]["code"] == "insufficient_quota":
        status = 429
    return {529: 503, 404: 502 if value is None else 404}.get(status, status), compact_json(error)


class MessageStream:
    """Translates a Messages stream to a chat stream, event by event.

    `done` is set by the last event, `failed` by an error; a stream that ends with neither was cut. No chunk is made
    before the first content, so that another controller can be asked after an early error. A later error becomes
    OpenAI's error event with the upstream's type as its code (overloaded_error), by which section 10 judges it.
    """

    def __init__(self, created: int, include_usage: bool = False, json_mode: bool = False) -> None:
        self.created, self.include_usage = created, include_usage
        self.head = b""  # of every chunk, up to its choices
        # By block: the call's number, and its input unless it comes in deltas.
        self.calls: dict[int, tuple[int, dict[str, Any] | None]] = {}
        self.thoughts: dict[int, dict[str, Any]] = {}  # by block: thinking since the last call
        self.after: list[Any] = [_JSON_STEP] * json_mode  # of the next thinking; see `from_message`
        self.halves: dict[tuple[int, str], str] = {}  # by block and field: the first half of a surrogate pair
        self.usage: dict[str, Any] = {}  # usage and ending come in several events; the last value of a field counts
        self.ending: dict[str, Any] = {}
        self.role = {"role": "assistant"}  # empty once it was sent, in the first chunk
        self.done = self.failed = False
        self.pings = 0

    def feed(self, event_type: bytes, data: bytes) -> bytes:
        """Return the chunks for one event, often none; an error event for one that cannot be read. Never raises.

        `event_type`, from the event's own line, counts if the data has no type: some gateways leave it out.
        """
        if self.done or self.failed or not data.strip():
            return b""
        try:
            event = json.loads(data)
            kind = event.get("type") or event_type.decode("latin-1")
            return self._block_event(kind, event) if kind.startswith("content_") else self._message_event(kind, event)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return self.fail({"type": "api_error", "message": "The upstream sent an event that cannot be read."})

    def fail(self, error: dict[str, Any]) -> bytes:
        """Return the error event; no later event counts. An error of unknown type is the upstream's fault: 500."""
        self.failed = True
        return b"data: " + compact_json(_openai_error(error, 500)) + b"\n\n"

    def _count(self, holder: dict[str, Any]) -> None:
        """Note the usage of an event. Counts are cumulative: a lower one is a gateway's fault."""
        for name, value in _set(**(holder.get("usage") or {})).items():
            known = self.usage.get(name)
            self.usage[name] = max(value, known) if isinstance(value, int) and isinstance(known, int) else value

    def _message_event(self, kind: str, event: dict[str, Any]) -> bytes:
        """Return the chunks for an event about the whole message, or for an error."""
        if kind == "error":
            return self.fail(find_error(event))
        if kind == "ping":
            # A comment keeps the connection alive while the model thinks. The first ping comes with every stream.
            self.pings += 1
            return b": ping\n\n" if self.pings > 1 else b""
        if kind == "message_start":
            message = event["message"]
            self._count(message)
            # There is a second one if another model takes over; the answer keeps its id.
            if not self.head:
                fields = {"id": message["id"], "object": "chat.completion.chunk", "created": self.created}
                self.head = b"data: " + compact_json({**fields, "model": message["model"]})[:-1] + b',"choices":'
        elif kind == "message_delta":
            # Some gateways send the cache's counts here (rust-genai PR 258).
            self._count(event)
            self.ending.update(_set(**(event.get("delta") or {})))
        elif kind == "message_stop":
            reason, refusal = _ending(self.ending)
            chunks = self._chunk(_set(refusal=refusal), reason)
            if self.include_usage:
                chunks += self.head + b'[],"usage":' + compact_json(messages_usage(self.usage)) + b"}\n\n"
            self.done = True
            return chunks + b"data: [DONE]\n\n"
        return b""

    def _block_event(self, kind: str, event: dict[str, Any]) -> bytes:
        """Return the chunk for the start of a block, for a piece of it or for its end. Citations have no equivalent."""
        index, piece = event["index"], event.get("content_block") or event.get("delta") or {}
        for name in ("text", "thinking", "partial_json"):
            if piece.get(name):
                piece[name] = self._whole(index, name, piece[name])
        block_type, arguments, text = piece.get("type"), piece.get("partial_json"), piece.get("text") or ""
        if kind == "content_block_start" and block_type == "tool_use":
            # Clients join a call's pieces by this number; the upstream's index counts all blocks.
            number = len(self.calls)
            self.calls[index] = number, piece.get("input") or {}
            # Signed thinking goes out with the call that it led to: a client keeps both or neither.
            # The openai package joins such lists by their `index`.
            signed = [block for block in self.thoughts.values() if block.get("signature") or block.get("data")]
            self.thoughts.clear()
            self.after.append(_CALL_STEP)
            call = {"index": number, **_tool_call(piece, "")}
            return self._chunk({"tool_calls": [call], **_set(thinking_blocks=signed)})
        if kind == "content_block_start" and block_type in _THINKING_BLOCKS:
            self.thoughts[index] = {**piece, "index": index, **_set(after=self.after)}
            self.after = []
        elif index in self.thoughts:
            block = self.thoughts[index]
            pieces = {name: piece[name] for name in ("thinking", "signature") if piece.get(name)}
            block.update({name: (block.get(name) or "") + text for name, text in pieces.items()})
        number, whole_input = self.calls.get(index, (0, None))
        if kind == "content_block_stop" and whole_input is not None:
            arguments = compact_json(whole_input).decode()
        # The first piece is always empty; a tool without arguments gets no other one (llmgateway PR 2468).
        if arguments and index in self.calls:
            self.calls[index] = number, None
            return self._chunk({"tool_calls": [{"index": number, "function": {"arguments": arguments}}]})
        if block_type == "text":
            self.after.append(0)
        if text and self.after and isinstance(self.after[-1], int):
            self.after[-1] += len(text)
        # Some gateways put the whole text into the start of its block. Most clients know DeepSeek's name for thinking.
        delta = _set(content=text, reasoning_content=piece.get("thinking"))
        return self._chunk(delta) if delta else b""

    def _whole(self, index: int, name: str, text: str) -> str:
        """Return a piece of text without the first half of a surrogate pair at its end, which begins the next piece."""
        half = self.halves.pop((index, name), "")
        if "\ud800" <= text[-1] <= "\udbff":
            self.halves[index, name], text = text[-1], text[:-1]
        return (half + text).encode("utf-16", "surrogatepass").decode("utf-16", "replace") if half else text

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """Return one chunk. With include_usage each has the field `usage`, null in all but the last."""
        if not self.head:
            raise LookupError("content before message_start")
        choice = {"index": 0, "delta": {**self.role, **delta}, "logprobs": None, "finish_reason": reason}
        self.role = {}
        return self.head + compact_json([choice]) + (b',"usage":null}\n\n' if self.include_usage else b"}\n\n")


# ==== 9. Controllers ====
# Makes the request that one account gets: a parsed request in, the bytes for the upstream out. First the request and
# what is read from its body, then a class for each kind of account: OpenAI's API, Azure's dialect of it,
# Anthropic's API with translations, and an echo without a network. A vendor that speaks OpenAI's API is a row in
# PRESETS. Another kind of account is a class here, a line in CONTROLLERS and a file of tests.

# Without /v1, which belongs to the base URL of an account.
CHAT_PATH = "/chat/completions"
LIFE_S = 0.5  # how often a stream whose events have no translation gets a comment
HOLD_BYTES = 65536  # kept of a stream before its first real event, and read of an error
ANSWER_BYTES = 16_777_216  # read of an answer to translate; the longest have about 1 MB
STREAM_BYTES = 67_108_864  # read of a stream to join: each of 128,000 tokens may come in an event of 500 bytes
STREAM_TYPE = b"text/event-stream; charset=utf-8"
# The estimate for an image, audio or file: the length of its data does not tell.
TOKENS_PER_PART = 1000
# A large upload is mapped from a temporary file.
Body = bytes | mmap.mmap


def parse_object(body: Body) -> dict[str, Any]:
    """Return the JSON object in `body`, which must be UTF-8 (RFC 8259, 8.1). Raise ProxyError (400, 413)."""
    # Most values in a body: parsed, a value can take 20 times its size. Embedding requests have 300,000.
    most = 1_000_000
    data = body[:]
    if len(data) > most and data.count(b",") + data.count(b"[") + data.count(b"{") > most:
        raise ProxyError(413, f"The body has more than {most} values.", "request_too_large")
    try:
        # utf-8-sig: PowerShell writes a byte order mark. json.loads would guess other encodings of bytes.
        value = json.loads(data.decode("utf-8-sig"))
    # The decoder stops near 1,000 levels (RecursionError) and at numbers of 4,300 digits (ValueError).
    except (ValueError, RecursionError) as problem:
        raise ProxyError(400, f"The body is not valid JSON in UTF-8: {problem}") from None
    if not isinstance(value, dict):
        raise ProxyError(400, "The body must be a JSON object.")
    return value


def lower_keys(value: Any) -> Any:
    """Return an object with its keys in lower case; any other value as it is."""
    return {key.lower(): member for key, member in value.items()} if isinstance(value, dict) else value


def parse_chat(body: Body) -> tuple[dict[str, Any], Body]:
    """Return the JSON object of a chat request, and the body to send. Raise ProxyError (400).

    Go clients without JSON tags capitalise keys, and the original server, in Go, accepted them: their body is rewritten
    with keys in lower case. Only fields on which routing relies are checked. All others are the upstream's to judge.
    """
    data = parse_object(body)
    if "model" not in data or "messages" not in data or "Stream" in data:
        data = lower_keys(data)
        if isinstance(data.get("messages"), list):
            data["messages"] = list(map(lower_keys, data["messages"]))
        body = compact_json(data)
    model, messages = data.get("model"), data.get("messages")
    if not isinstance(model, str) or not model:
        raise ProxyError(400, "You must provide a model parameter: a non-empty string.", param="model")
    if not isinstance(messages, list) or set(map(type, messages)) != {dict}:
        raise ProxyError(400, "You must provide messages: a non-empty array of objects.", param="messages")
    # An upstream could read "yes" or 1 as true and answer with a stream that is not expected here.
    if not isinstance(data.get("stream"), bool | None):
        raise ProxyError(400, "stream must be true or false.", param="stream")
    return data, body


def replace_model(body: bytes, data: dict[str, Any], model: str) -> bytes:
    """Return the JSON `body`, which was parsed as `data`, with another model.

    If `"model"` stands only once, and no key is spelled with escapes, all other bytes stay as they are.
    """
    if "model" in data and body.count(b'"model"') == 1 and b"\\u006" not in body:
        new = json.dumps(model).encode()
        edited, count = re.subn(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"', lambda match: match.group(1) + new, body)
        if count:
            return edited
    return compact_json({**data, "model": model})


@dataclass(slots=True, eq=False, repr=False)
class ApiRequest:
    """An API call, as every controller gets it."""

    method: str
    path: str
    query: str
    lines: bytes  # the client's header lines that may be forwarded
    body: Body  # as it came
    data: dict[str, Any] = field(default_factory=dict)  # the JSON object in `body`, empty for a form
    model: str = ""
    asked: str = ""  # the model that the client asked for, if `model` is another one by now
    model_span: tuple[int, int] | None = None  # where the model's name stands in a form
    stream: bool = False
    met_limit: bool = False  # the first choice of the pool had no room
    stateful: bool = False  # it stores something at the account: to repeat it may store it twice
    inference: bool = True  # it asks a model; False: it is about objects such as files
    pinned: str = ""  # the only controller that may answer: it has the object that the request refers to
    key: str = ""  # the client key's name
    request_id: str = ""
    thread: bytes | None = None  # the conversation's fingerprint, for affinity; None: not computed yet
    prompt_tokens: int = 0  # estimated
    max_tokens: int = 0  # limit of the answer, 0 without one
    need: int = 0  # tokens that it is expected to cost
    add_usage: bool = False  # the account is asked for the usage of a stream, although the client did not ask
    refused: frozenset[str] = frozenset()  # what the account has refused before, as in `refuses`
    on_usage: Callable[[int], None] | None = None  # gets the tokens that the answer used: the client key has a limit
    was_sent: bool = False  # at least one account got it
    wait_s: float = 0.0  # how long it may still wait in line

    def substitute(self, model: str) -> None:
        """Ask for `model` from now on: it stands for an alias, or is a fallback. `asked` keeps the client's model."""
        self.asked, self.model = self.asked or self.model, model

    def body_for(self, model: str) -> tuple[bytes | memoryview, ...]:
        """Return the pieces of the body with `model` in place of the client's, "" for the body as it came."""
        if model and self.model_span is not None:
            (start, end), view = self.model_span, memoryview(self.body)
            return view[:start], model.encode(), view[end:]
        if model and self.data:
            return (replace_model(self.body[:], self.data, model),)
        return (self.body if isinstance(self.body, bytes) else memoryview(self.body),)


def count_text(value: Any, depth: int = 0) -> int:
    """Return the number of characters of text in a prompt or input of any shape.

    A number is a token and counts as 4 characters; parts without text count as TOKENS_PER_PART tokens.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return 4
    if not isinstance(value, list | dict) or depth > 8:
        return 0
    if isinstance(value, list):
        return sum([count_text(item, depth + 1) for item in value])
    # A message, a part of its content, or an item of the responses API.
    if "text" in value or "content" in value or "role" in value:
        return count_text(value.get("text") or value.get("content"), depth + 1)
    return 4 * TOKENS_PER_PART


def estimate_prompt(data: dict[str, Any]) -> int:
    """Return about how many tokens a prompt has: a quarter of its characters. Replies correct the estimate."""
    return count_text([data.get(name) for name in ("messages", "prompt", "input", "instructions")]) // 4


def answer_limit(data: dict[str, Any]) -> int:
    """Return the most tokens that the answers may have together; 0 without a limit, or with one that makes no sense."""
    limit, choices = data.get("max_completion_tokens") or data.get("max_tokens"), data.get("n") or 1
    if not isinstance(limit, int) or limit < 0 or not isinstance(choices, int):
        return 0
    # The API allows no more than 128 choices.
    return limit * min(max(1, choices), 128)


class Controller(Protocol):
    """An account, as the relay uses it.

    `chat_only`: it serves chat completions only. `cache_free`: tokens read from its prompt cache do not count against
    its limit. `reports_usage`: it takes stream_options.include_usage. `rate_codes`: see `AccountConfig`.
    """

    chat_only: bool
    cache_free: bool
    reports_usage: bool
    rate_codes: tuple[str, ...]

    def exchange(
        self, request: ApiRequest, connections: ConnectionPool, on_sent: Callable[[float], None], fresh: bool = False
    ) -> Exchange:
        """Return an exchange for `request`, not started; it calls `on_sent(now)` when it writes the request.

        `fresh`: on a new connection. Raise Untranslatable if the account cannot express the request.
        """


def wants_usage(request: ApiRequest) -> bool:
    """Return whether a stream must report its usage: the client asked for it, or a limit counts tokens."""
    options = request.data.get("stream_options")
    return request.add_usage or (isinstance(options, dict) and options.get("include_usage") is True)


async def read_all(exchange: Exchange, most: int) -> bytes:
    """Return the upstream's whole body, or more than `most` bytes of a larger one. Raise UpstreamError."""
    body = data = await exchange.read()
    while data and len(body) <= most:
        data = await exchange.read()
        body += data
    return body


def is_compressed(head: ResponseHead) -> bool:
    """Return whether a body is compressed: some proxies do that although only identity was asked for."""
    return head.index.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b"")


def head_for(head: ResponseHead, status: int, kind: bytes) -> ResponseHead:
    """Return a reply's head for another body, of type `kind`."""
    replaced = (b"content-length", b"transfer-encoding", b"content-encoding", b"content-type")
    index = {name: value for name, value in head.index.items() if name not in replaced}
    lines = without(head.lines, replaced) + b"Content-Type: %b\r\n" % kind
    return ResponseHead(status, 1, {**index, b"content-type": kind}, lines)


def to_events(answer: dict[str, Any], usage: bool) -> bytes:
    """Return a whole chat completion as a stream: one chunk with all of it, and one with its usage.

    Raise LookupError, TypeError or AttributeError if `answer` is no chat completion.
    """
    choices = []
    for place, choice in enumerate(answer["choices"]):
        delta = {name: value for name, value in choice["message"].items() if value is not None}
        # Clients join the pieces of these lists by a number.
        for name in {"tool_calls", "thinking_blocks"} & delta.keys():
            delta[name] = [{"index": number, **item} for number, item in enumerate(delta[name])]
        rest = {name: value for name, value in choice.items() if name != "message"}
        choices.append({"index": place, **rest, "delta": delta})
    chunk = {**answer, "object": "chat.completion.chunk", "choices": choices, "usage": None}
    chunks = [chunk, {**chunk, "choices": [], "usage": answer.get("usage")}][: 2 if usage and "usage" in answer else 1]
    return b"".join([b"data: %b\n\n" % compact_json(chunk) for chunk in chunks]) + b"data: [DONE]\n\n"


# Texts that come in pieces. Other values come whole, and some vendors repeat them.
_GROWING = frozenset("content reasoning_content reasoning refusal arguments text thinking data transcript".split())


def join_chunk(whole: dict[str, Any], chunk: dict[str, Any]) -> None:
    """Add a chunk to those before it: texts grow, lists are joined by `index`, all else is replaced."""
    for name, value in chunk.items():
        before = whole.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            join_chunk(before, value)
        elif isinstance(value, list) and isinstance(before, list):
            for item in value:
                index = first_object(item).get("index")
                same = [old for old in before if index is not None and first_object(old).get("index") == index]
                if same:
                    join_chunk(same[0], item)
                else:
                    before.append(item)
        elif name in _GROWING and isinstance(value, str) and isinstance(before, str):
            whole[name] = before + value
        elif value not in (None, "") or name not in whole:
            whole[name] = value


class AskedForm:
    """An exchange for a chat, whose answer gets the form that the client asked for: a stream, or one JSON object.

    Some servers never stream, others always do. SDKs find nothing in the wrong form, and report no error. Answers in
    the right form pass unchanged. So do errors, which section 13 judges.
    """

    def __init__(self, inner: Exchange, request: ApiRequest) -> None:
        self.inner, self.first_byte_s = inner, inner.first_byte_s
        self.read, self.interrupt, self.finish, self.abort = inner.read, inner.interrupt, inner.finish, inner.abort
        self.stream, self.usage = request.stream, wants_usage(request)
        self.head: ResponseHead
        self.body = b""

    async def start(self) -> None:
        """See `Exchange`. An answer in the wrong form is read to its end."""
        await self.inner.start()
        head = self.head = self.inner.head
        kind = head.index.get(b"content-type", b"").lower()
        is_stream = kind.startswith(b"text/event-stream")
        if head.status >= 300 or is_stream == self.stream or not (is_stream or b"json" in kind) or is_compressed(head):
            return
        self.read = self._read
        try:
            if is_stream:
                self.head = head_for(head, head.status, b"application/json")
                self.body = await self._join()
            else:
                self.body = await read_all(self.inner, ANSWER_BYTES)
                answer = json.loads(self.body)
                if answer["choices"] and not find_error(answer):
                    self.body = to_events(answer, self.usage)
                    self.head = head_for(head, head.status, STREAM_TYPE)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            # This is no chat completion.
            if len(self.body) > ANSWER_BYTES:
                raise BadReply(f"the upstream sent an answer of more than {ANSWER_BYTES} bytes") from None

    async def _join(self) -> bytes:
        """Return the body for a stream: the chat completion, or its error.

        Raise UpstreamError. Raise LookupError, TypeError or AttributeError if the stream is no chat.
        """
        splitter, end, answer, size, data = EventSplitter(), StreamEnd(is_response=False), dict[str, Any](), 0, b" "
        while data:
            data = await self.inner.read()
            size += len(data)
            if size > STREAM_BYTES or len(splitter.pending) > EVENT_BYTES:
                raise BadReply(f"the upstream sent more than {STREAM_BYTES} bytes, or {EVENT_BYTES} in one event")
            end.feed(data)
            for event in splitter.feed(data or b"\n\n"):
                kind, text = event_fields(event)
                chunk = event_object(text)
                if kind == b"error" or find_error(chunk):
                    return text
                join_chunk(answer, chunk)
        if not end.is_whole():
            raise UpstreamClosed("the upstream ended its stream before the last event")
        for choice in answer["choices"]:
            message = choice["message"] = {"role": "assistant", "content": None, **choice.pop("delta")}
            for item in (*(message.get("tool_calls") or ()), *(message.get("thinking_blocks") or ())):
                item.pop("index", None)
        return compact_json({**answer, "object": "chat.completion"})

    async def _read(self) -> bytes:
        """See `Exchange`."""
        data, self.body = self.body, b""
        return data


class OpenAIController:
    """An account that speaks OpenAI's API, at any base URL.

    `base` precedes every path in the request line, `paths` are those that differ from OpenAI's, `fixed` are our own
    header lines, `hidden` the names of client headers that must not stand beside them.
    """

    chat_only = cache_free = False
    reports_usage = True
    api_fields: tuple[tuple[str, str], ...] = ()  # header fields that every request of this API has

    def __init__(self, config: ControllerConfig) -> None:
        account = config.account
        self.model_map, self.rate_codes = dict(config.model_map), account.rate_codes
        self.drop, self.rename = frozenset(account.drop_params), dict(account.rename_params)
        self.reports_usage, self.refuses = "stream_options" not in self.drop, frozenset(account.refuses)
        self.extra = dict(account.extra_body)
        self.origin, prefix = parse_origin(account.base_url, account.proxy, account.ca_file)
        # RFC 3986, 3.3; escapes stay as they are.
        self.base = urllib.parse.quote(prefix, safe="/%:@!$&'()*+,;=~")
        self.paths = {CHAT_PATH: account.chat_path}
        key = account.api_key.reveal()
        fields = {
            "Host": self.origin.authority,
            # Events, errors and answers to translate must be readable.
            "Accept-Encoding": "identity",
            account.auth_header: key and (account.auth_scheme + " " + key).lstrip(),
            "OpenAI-Organization": account.organization,
            "OpenAI-Project": account.project,
            **dict(self.api_fields),
        }
        # Configured headers replace ours, and both replace the client's.
        configured = {name.lower() for name, _ in account.headers}
        lines = [(name, value) for name, value in fields.items() if value and name.lower() not in configured]
        lines += [(name, value.reveal()) for name, value in account.headers]
        self.fixed = render_fields([(name.encode(), value.encode()) for name, value in lines])
        # The client's fields in REQUEST_DROPPED were removed when its head was parsed.
        self.hidden = {name.lower().encode() for name in (*fields, *configured)} - REQUEST_DROPPED
        if self.origin.proxy and self.origin.scheme == "http":
            # A proxy gets plain requests in absolute form, with its password (RFC 9112, 3.2.2). For TLS it is a tunnel.
            self.base = "http://" + self.origin.authority + self.base
            self.fixed += proxy_authorization(self.origin.proxy)
        # SDKs wait 600 s for a whole answer; the first byte of a stream does not wait for the last.
        by_default = [replace(config.timeouts, first_byte=seconds) for seconds in (600.0, 120.0)]
        self.timeouts = by_default if config.timeouts.first_byte is None else [config.timeouts] * 2

    def exchange(
        self, request: ApiRequest, connections: ConnectionPool, on_sent: Callable[[float], None], fresh: bool = False
    ) -> Exchange:
        """See `Controller`."""
        timeouts, message = self.timeouts[request.stream], self.message(request)
        resend = not request.stateful
        exchange = NetworkExchange(connections, self.origin, message, timeouts, on_sent, request.method, resend, fresh)
        return AskedForm(self.translated(exchange, request), request) if request.path == CHAT_PATH else exchange

    def translated(self, exchange: Exchange, request: ApiRequest) -> Exchange:
        """Return an exchange that reads like one with OpenAI's API."""
        return exchange

    def message(self, request: ApiRequest) -> tuple[bytes | memoryview, ...]:
        """Return the head and the pieces of the body, as the account gets them. Raise Untranslatable."""
        body = self.body(request)
        start = f"{request.method} {self.target(request.path, request.query, request.model)} HTTP/1.1\r\n".encode()
        lines = without(request.lines, self.hidden) if self.hidden else request.lines
        # Without a body, a GET has no length, any other method has length 0 (RFC 9110, 8.6).
        size = sum(map(len, body))
        length = b"Content-Length: %d\r\n\r\n" % size if size or request.method != "GET" else b"\r\n"
        return (start + self.fixed + lines + length, *body)

    def target(self, path: str, query: str, model: str) -> str:
        """Return the target of the request line. Raise Untranslatable."""
        return self.base + self.paths.get(path, path) + "?" * bool(query) + query

    def body(self, request: ApiRequest) -> tuple[bytes | memoryview, ...]:
        """Return the pieces of the body, with the model and the parameters that this account wants."""
        names, model = request.data.keys(), self.model_map.get(request.model, request.model if request.asked else "")
        # Other calls have other parameters.
        extra = {**self.history(request), **self.extra} if names and request.path == CHAT_PATH else {}
        options = request.data.get("stream_options")
        adds_usage = request.add_usage and self.reports_usage and isinstance(options, dict | None)
        if not (extra or self.drop & names or self.rename.keys() & names or (adds_usage and "stream_options" in names)):
            pieces = request.body_for(model)
            if adds_usage:
                text = b"".join(pieces)
                pieces = (text[: text.rindex(b"}")] + b',"stream_options":{"include_usage":true}}',)
            return pieces
        edited = {name: value for name, value in request.data.items() if name not in self.drop}
        if adds_usage:
            edited["stream_options"] = {**(options or {}), "include_usage": True}
        # A renamed parameter replaces one that has the new name: clients send both max_tokens and
        # max_completion_tokens for servers that know only one.
        renamed = {new: edited.pop(old) for old, new in self.rename.items() if old in edited}
        return (compact_json({**edited, **renamed, **extra, **({"model": model} if model else {})}),)

    def history(self, request: ApiRequest) -> dict[str, Any]:
        """Return the field `messages` without what this account refuses there; an empty object if nothing changes."""
        refused, messages = self.refuses | request.refused, request.data.get("messages", [])
        if not refused:
            return {}
        role = ("role", "system" if "developer" in refused else "developer")
        edited = [
            dict(role if item == ("role", "developer") else item for item in message.items() if item[0] not in refused)
            for message in messages
        ]
        return {"messages": edited} if edited != messages else {}


# Azure's classic API serves these below a deployment, all others beside it (openai-python, lib/azure.py).
_AZURE_DEPLOYED = re.compile(
    "/((chat/)?completions|embeddings|audio/(transcriptions|translations|speech)|images/(generations|edits))"
)


class AzureController(OpenAIController):
    """A resource of Azure OpenAI: the path names the deployment and the API's version.

    A base_url that ends in /openai/v1 is the newer API, in which the body's model is the deployment.
    """

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self.api_version, self.classic = config.account.api_version, not self.base.endswith("/openai/v1")
        if self.classic:
            self.api_version = self.api_version or AZURE_API_VERSION
            # The portal shows addresses with and without the suffix.
            self.base = self.base.removesuffix("/openai") + "/openai"
            # 2024-09-01-preview added stream_options (Azure: "API preview lifecycle").
            self.reports_usage = self.reports_usage and self.api_version >= "2024-09-01"

    def target(self, path: str, query: str, model: str) -> str:
        """See `OpenAIController`."""
        # Clients made for Azure send a version of their own, which this resource may not have.
        parts = [part for part in query.split("&") if part and not part.startswith("api-version=")]
        if self.classic and _AZURE_DEPLOYED.fullmatch(path):
            deployment = self.model_map.get(model, model)
            # ".." would lead to another path; slashes are escaped below.
            if not deployment.strip("."):
                raise Untranslatable("model", "is not the name of a deployment.")
            path = "/deployments/" + urllib.parse.quote(deployment, "") + path
        if self.api_version:
            parts.append("api-version=" + self.api_version)
        return super().target(path, "&".join(parts), model)


class MessagesExchange:
    """An exchange with Anthropic's Messages API that reads like an exchange with OpenAI's. See `Exchange`.

    Streams are translated event by event as they arrive, whole answers and errors when they are complete.
    """

    def __init__(self, inner: Exchange, usage: bool, json_mode: bool) -> None:
        self.inner, self.usage, self.json_mode, self.first_byte_s = inner, usage, json_mode, inner.first_byte_s
        self.interrupt, self.finish, self.abort = inner.interrupt, inner.finish, inner.abort
        self.splitter = EventSplitter()
        self.stream: MessageStream | None = None
        self.heard_at = 0.0
        self.ready = b""  # translated and not read yet
        self.head: ResponseHead

    async def start(self) -> None:
        """See `Exchange`. Whole answers and errors are read to their end; the text of an error decides the status."""
        await self.inner.start()
        head = self.inner.head
        status, kind = head.status, b"application/json"
        compressed = is_compressed(head)
        if status >= 300:
            body = b"" if compressed else await read_all(self.inner, HOLD_BYTES)
            status, self.ready = error_from_messages(status, body)
        elif compressed:
            raise BadReply("the upstream compressed its answer unasked, and it cannot be translated")
        elif head.index.get(b"content-type", b"")[:17].lower() == b"text/event-stream":
            self.stream, kind = MessageStream(int(time.time()), self.usage, self.json_mode), STREAM_TYPE
        else:
            # Some gateways never stream.
            body = await read_all(self.inner, ANSWER_BYTES)
            try:
                self.ready = compact_json(from_message(json.loads(body), int(time.time()), self.json_mode))
            except (ValueError, RecursionError) as problem:
                raise BadReply(f"the upstream's answer cannot be translated: {problem}") from None
        self.head = head_for(head, status, kind)

    async def read(self) -> bytes:
        """See `Exchange`."""
        while self.stream is not None and not self.ready:
            try:
                data = await self.inner.read()
            except UpstreamError:
                # An error after the last event does no harm.
                if not self.stream.done:
                    raise
                data = b""
            self._translate(self.stream, data)
            if not data:
                self.stream = None
            elif len(self.ready) == 0 and time.monotonic() - self.heard_at > LIFE_S:
                # What has no translation is a sign of life, too.
                self.ready = b": ping\n\n"
        data, self.ready, self.heard_at = self.ready, b"", time.monotonic()
        return data

    def _translate(self, stream: MessageStream, data: bytes) -> None:
        """Translate the next bytes into `ready`; b"" is the end. Raise UpstreamClosed if the last event is missing."""
        ended = not data
        if ended and b"message_stop" in self.splitter.pending:
            # Some servers close after the last event without its blank line.
            data = b"\n\n"
        self.ready = b"".join([stream.feed(*event_fields(event)) for event in self.splitter.feed(data)])
        if len(self.splitter.pending) > EVENT_BYTES:
            self.splitter.pending = b""
            message = f"The upstream sent an event of more than {EVENT_BYTES} bytes."
            self.ready += stream.fail({"type": "api_error", "message": message})
        if ended and not (stream.done or stream.failed):
            raise UpstreamClosed("the upstream ended its stream before the last event")


class AnthropicController(OpenAIController):
    """An account that speaks Anthropic's Messages API, to which chats are translated.

    The vendor's own endpoint for OpenAI's format is for tests, as it says: it ignores fields and reports no cache use.
    """

    chat_only = cache_free = True
    # This translation speaks one version of the API, whatever the client sends; the configuration may change it.
    api_fields = (("anthropic-version", "2023-06-01"),)

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self.max_tokens, self.thinking = config.account.max_tokens, config.account.thinking
        # The default is 20.
        self.paths["/models"] = "/models?limit=1000"

    def translated(self, exchange: Exchange, request: ApiRequest) -> Exchange:
        """See `OpenAIController`."""
        wanted = first_object(request.data.get("response_format")).get("type")
        json_mode = wanted == "json_object" and "response_format" not in self.drop
        return MessagesExchange(exchange, wants_usage(request) or not request.stream, json_mode)

    def body(self, request: ApiRequest) -> tuple[bytes | memoryview, ...]:
        """See `OpenAIController`. The fields of extra_body replace translated ones: they may be newer."""
        if request.path != CHAT_PATH:
            return request.body_for("")
        asked = {**request.data, "model": self.model_map.get(request.model, request.model)}
        return (compact_json({**to_messages(asked, self.drop, self.max_tokens, self.thinking), **self.extra}),)


def echo_pieces(request: ApiRequest) -> Iterator[bytes]:
    """Yield the answer of an echo controller: the last user message, whole or word by word, with usage."""
    messages = request.data["messages"]
    said = [message for message in messages if message.get("role") == "user"] or messages
    content = said[-1].get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    # Content of any other type is echoed, not refused.
    content = str(content)
    words = re.findall(r"\S*\s*", content)[:-1]
    prompt = max(1, request.prompt_tokens)
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    kind = "chat.completion.chunk" if request.stream else "chat.completion"
    name = "chatcmpl-echo-" + request.request_id
    fields = {"id": name, "object": kind, "created": int(time.time()), "model": request.model}
    if not request.stream:
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        yield compact_json({**fields, "choices": [choice], "usage": usage})
        return
    more: dict[str, Any] = {"usage": None} if wants_usage(request) else {}
    for delta in ({"role": "assistant", "content": ""}, *({"content": word} for word in words), {}):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None if delta else "stop"}
        yield b"data: %b\n\n" % compact_json({**fields, "choices": [choice], **more})
    if more:
        yield b"data: %b\n\n" % compact_json({**fields, "choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"


class EchoExchange:
    """An exchange that makes its reply up. See `Exchange`."""

    def __init__(
        self, request: ApiRequest, account: AccountConfig, refusal: int, fields: Index, on_sent: Callable[[float], None]
    ) -> None:
        self.pieces, self.on_sent, self.first_byte_s = echo_pieces(request), on_sent, math.inf
        self.first_delay_s, self.delay_s = account.first_delay, account.delay if request.stream else 0.0
        self.wait_s = 0.0  # before the next piece; none before the first
        if refusal:
            code = {429: "rate_limit_exceeded"}.get(refusal, "server_error")
            self.pieces = iter([compact_json(error_object("The echo controller was told to refuse.", code, code))])
        kind = STREAM_TYPE if request.stream and not refusal else b"application/json"
        index = {b"content-type": kind, **fields}
        lines = b"".join([b"%b: %b\r\n" % field for field in index.items()])
        self.head = ResponseHead(refusal or 200, 1, index, lines)

    async def start(self) -> None:
        """See `Exchange`."""
        self.on_sent(asyncio.get_running_loop().time())
        await asyncio.sleep(self.first_delay_s)

    async def read(self) -> bytes:
        """See `Exchange`."""
        await asyncio.sleep(self.wait_s)
        self.wait_s = self.delay_s
        return next(self.pieces, b"")

    def interrupt(self, error: Exception | None = None) -> None:
        """Do nothing: there is no connection."""

    finish = abort = interrupt


class EchoController:
    """An account without a network that answers with the last user message: for --demo and for tests of clients."""

    chat_only = reports_usage = True
    cache_free = False
    rate_codes: tuple[str, ...] = ()

    def __init__(self, config: ControllerConfig) -> None:
        self.account = config.account
        # When it answered in the last minute.
        self.answered: deque[float] = deque()

    def exchange(
        self, request: ApiRequest, connections: ConnectionPool, on_sent: Callable[[float], None], fresh: bool = False
    ) -> Exchange:
        """See `Controller`."""
        now, most, fields = asyncio.get_running_loop().time(), self.account.refuse_above, Index()
        while self.answered and self.answered[0] <= now - 60.0:
            self.answered.popleft()
        refusal = 500 if random.random() < self.account.fail_share else 0
        if not refusal and 0 < most <= len(self.answered):
            refusal, fields = 429, {b"retry-after-ms": b"%d" % (1e3 * (self.answered[0] + 60.0 - now) + 1.0)}
        elif not refusal and most:
            self.answered.append(now)
        return EchoExchange(request, self.account, refusal, fields, on_sent)


CONTROLLERS: dict[str, Callable[[ControllerConfig], Controller]] = {
    **dict.fromkeys(PRESETS, OpenAIController),
    "azure": AzureController,
    "anthropic": AnthropicController,
    "echo": EchoController,
}


# ==== 10. Outcomes ====
# Pure functions that tell what a reply, a broken connection or an error event means (`judge_*`), whether the next
# controller may get the request (`may_retry`), and what a reply reports about the quota. Vendors agree on statuses and
# on little else: an exhausted balance and a rate limit share status 429, and the body of an error may be an object, a
# list, a text, HTML or empty. Bodies are read tolerantly; where they make no sense, the status alone decides.


class Outcome(enum.Enum):
    """The kind of an attempt's result, as in README's table "What happens when". Its value stands in the access log."""

    OK = "ok"
    CLIENT = "client"  # the request itself is at fault: the client gets this error as it is
    LARGE = "large"  # the request needs more tokens than the account's whole limit
    RATE = "rate"
    QUOTA = "quota"  # out of credit
    AUTH = "auth"
    FORBIDDEN = "forbidden"
    BARRED = "barred"  # the key has no right to such objects; its other rights are not known
    MISSING = "missing"  # the account lacks the model
    FAULT = "fault"
    CONNECT = "connect"  # nothing was sent
    SILENT = "silent"  # no byte within first_byte: the upstream may be generating
    CUT = "cut"
    UNFIT = "unfit"  # the account's API or model cannot take the request: nothing ran
    GONE = "gone"  # the client left
    LOST = "lost"  # in a hedge, another controller answered first


# Facts about an account: an early retry cannot succeed. The official SDKs obey x-should-retry.
LASTING = frozenset(map(Outcome, "large quota auth forbidden barred missing".split()))
# The request certainly did not run, so even a stateful one may be sent elsewhere.
NOT_RUN = frozenset(map(Outcome, "unfit connect auth rate quota large missing".split()))

# The account is out of credit: waiting does not help, another account may. 1113 is Zhipu's code, 30001 SiliconFlow's,
# Arrearage DashScope's, AccountOverdueError Volcengine's, budget_exceeded LiteLLM's, NOT_ENOUGH_BALANCE Novita's.
CREDIT_CODES = (
    "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded project_spend_limit_exceeded"
    " organization_usage_limit_exceeded exceeded_current_quota_error billing_error billing_hard_limit_reached"
    " billing_not_active 1113 30001 Arrearage AccountOverdueError budget_exceeded insufficient_user_quota"
    " pre_consume_token_quota_failed insufficient_balance INSUFFICIENT_BALANCE NOT_ENOUGH_BALANCE"
).split()
# Anthropic, OpenRouter, OpenCode; SiliconFlow, fal; xAI, Google, Fireworks.
CREDIT_WORDS = (
    f"(?i)^({SPENT_WORDS}|Key limit exceeded|Insufficient (account )?balance"
    "|Sorry, your account balance is insufficient|User is locked. Reason: "
    "|(Your (newly created )?(team|project)|Account) .*(monthly spending (cap|limit)|credits)"
    "|Your prepayment credits are|Your API access is blocked because a spend limit)"
)
# 1211 is Zhipu's, 5007 Cloudflare's, 20012 SiliconFlow's.
MISSING_CODES = (
    "model_not_found DeploymentNotFound not_found_error model_decommissioned model_not_supported model_not_available"
    " model_terms_required invalid_model unknown_model INVALID_MODEL_ID 1211 5007 20012"
).split()
# DeepSeek, xAI; OpenAI, Mistral, LiteLLM; GitHub, MiniMax; OpenRouter; Groq; Codex; Bedrock; Together; Cloudflare.
MISSING_WORDS = (
    r"(?i)^(\S+: )?(model (\S+ )?((does )?not (exist|found)|is not supported\.?$|was removed|access denied)"
    r"|invalid model( name| id| identifier)?( passed| ['\"]|[.:]|$)|no models loaded|not supported model "
    r"|(invalid params, )?(unknown|unsupported) model(:| ['\"])|\S+ is not a valid model id"
    r"|the (requested )?model (\S+ )?(does not exist|was not found|is not supported( by|\.?$)|is no longer"
    r"|has been (decommission|deprecat|retir)ed)|your organization must be verified to"
    r"|invocation of model id \S+ with on-demand"
    r"|the \S+ model is not supported|the provided model identifier is invalid|unable to access (\S+ )?model"
    r"|(aierror: )?no such model)"
)
AUTH_WORDS = (
    "(?i)^(API key (not valid|expired|not found)|User location is not supported|Incorrect API key provided"
    "|Gemini API free tier is not available|Access to .{1,40} is not allowed from unsupported countries)"
)


# The API or its model does not take a parameter, a field of a message or a role: words of OpenAI, Azure, Anthropic,
# Mistral, vLLM, Google, DeepSeek, Groq, Cerebras, xAI, Ollama, Moonshot, DashScope and LM Studio.
OPTION_CODES = "unsupported_parameter unsupported_value unknown_parameter extra_forbidden".split()
OPTION_WORDS = (
    r"(?i)^(unsupported|unknown) (parameter|value)|^unrecognized request argument|cannot both be specified"
    r"|extra inputs are not permitted|extra_forbidden|additional properties are not allowed"
    r"|unknown (name|variant|field) |property '[^']*' is unsupported|only \S+ is allowed for this model"
    r"|\bnot support(ed)?\b|deprecated for this model|^\w+ is not one of \[|'role' field that is in"
)


class Rule(NamedTuple):
    """Errors with one of `statuses` and, if any are given, one of `codes` or `words` (a regular expression)."""

    outcome: Outcome
    statuses: Collection[int]
    codes: Sequence[str] = ()
    words: str = ""


# The first rule that matches decides. A message may quote the request, so the words of a 400 must begin the message.
RULES = (
    Rule(Outcome.QUOTA, (402,)),
    Rule(Outcome.QUOTA, (400, 401, 403, 412, 429), CREDIT_CODES, CREDIT_WORDS),
    # 498: Groq's flex tier has no capacity left. 413: it counts more tokens than a minute's limit.
    Rule(Outcome.RATE, (429, 498)),
    Rule(Outcome.RATE, (413,), ("rate_limit_exceeded",)),
    # Groq's code; Google's and xAI's words.
    Rule(Outcome.AUTH, (400,), ("organization_restricted", "invalid_api_key"), AUTH_WORDS),
    # Gateways that stand in front of several accounts themselves: LiteLLM says 401, new-api 503.
    Rule(Outcome.MISSING, range(400, 600), ("key_model_access_denied", "model_not_found", "ModelDeprecated")),
    Rule(Outcome.AUTH, (401,)),
    # No account would take this prompt: it is flagged (OpenRouter, xAI) or too long (Together).
    Rule(Outcome.CLIENT, (403,), (), "input was flagged|requires moderation|violates usage guidelines|context length"),
    Rule(Outcome.MISSING, (400, 403, 404), MISSING_CODES, MISSING_WORDS),
    # A project may lack one model, a key all of them: only the words differ. OpenRouter and NVIDIA name no model.
    Rule(Outcome.MISSING, (403, 404), (), "(?i)model|no endpoints|^Function '"),
    Rule(Outcome.FORBIDDEN, (403,)),
    # A timeout, a conflict inside the provider, a failed dependency: the same request may succeed elsewhere.
    Rule(Outcome.FAULT, (408, 409, 424)),
    Rule(Outcome.UNFIT, (400, 422), OPTION_CODES, OPTION_WORDS),
    # OpenAI: another account has the items of this conversation.
    Rule(Outcome.UNFIT, (400, 404), ("invalid_encrypted_content",), "^Item with id '"),
    # DeepSeek, Moonshot: another vendor began it, without the thinking that they want back.
    Rule(
        Outcome.UNFIT, (400,), (), "(?i)missing.{0,9}reasoning_content|reasoning_content.{0,50} (missing|passed back)"
    ),
    Rule(Outcome.CLIENT, range(400, 500)),
    Rule(Outcome.FAULT, range(1000)),
)
# The prompt is longer than the model can take: codes of OpenAI, llama.cpp, Copilot, GitHub and Zhipu.
TOO_LONG_CODES = (
    "context_length_exceeded exceed_context_size_error model_max_prompt_tokens_exceeded tokens_limit_reached 1261"
).split()
# First the words of most vendors, with an amount or a comparison, as other errors also speak of contexts; then those of
# Anthropic, Bedrock, Cohere, TGI, Google, xAI, Moonshot, DashScope, Zhipu, SGLang, Groq and GitHub. Cohere's "too many
# tokens: max tokens must be less than" is not among them: it is about the answer.
TOO_LONG_WORDS = re.compile(
    r"context (length|window|size|limit)( is| of)?( only)?:? ?\(?\d|\d maximum context length|context window exceeds"
    r"|(exceed(s|ed)?|(longer|greater|less) than) (\S+ ){0,3}context (length|window|size)"
    r"|prompt (is |tokens )?too long|too long for requested model|size limit exceeded by|max_new_tokens. must be"
    r"|inputs. must have less|token count .{0,40}exceeds the (limit|max)|maximum (prompt|model) length (is|of) \d"
    r"|model token limit|Range of input length should|Prompt exceeds max length|maximum allowed input length"
    r"|reduce the length of the (input )?messages|^Request body too large for \S+ model|max_seq_len"
    r"|input (token count|length) (is )?\d+ (but model only supports|exceeds)|input tokens exceed"
    r"|tokens in the prompt cannot exceed|^context length exceeded|input is too long: \d|(input length|prompt) too l"
    r"|(length|tokens) \(?\d+\)? exceeds (the )?(maximum input|model's limit)",
    re.IGNORECASE,
)
# What a message quotes may be the client's text. An apostrophe inside a word begins no quotation.
_QUOTED = re.compile(r"(?<!\w)(['\"]).*\1(?!\w)", re.DOTALL)
# An error in a 200 is judged like a reply with this status, by its code or type (of OpenAI and Anthropic).
ERROR_STATUSES = {
    **dict.fromkeys((*CREDIT_CODES, "rate_limit_error", "rate_limit_exceeded"), 429),
    **dict.fromkeys(MISSING_CODES, 404),
    **dict.fromkeys(("invalid_request_error", "invalid_prompt", "content_filter", "content_policy_violation"), 400),
    **dict.fromkeys(TOO_LONG_CODES, 400),
    **dict.fromkeys(("authentication_error", "invalid_api_key"), 401),
    "overloaded_error": 529,
    "permission_error": 403,
}


@dataclass(slots=True, eq=False)
class Verdict:
    """The result of an attempt, from which its controller learns.

    `status`: 0 without a reply. `after_s`: the time to wait that an error named. `reset_s`: where a 429 named none, the
    time until the limit that is used up is full again. `by_tokens`: whether a 429 is about tokens; `requested`: how
    many the request needs, by its message. `bucket`: the name of the limit in a 429 ("for limit
    gpt-4.1-long-context"). `too_long`: the prompt is longer than the model can take. `of_kind`: all accounts with this
    API would refuse the request.
    """

    outcome: Outcome
    status: int = 0
    message: str = ""
    after_s: float | None = None
    reset_s: float | None = None
    by_tokens: bool = False
    bucket: str = ""
    requested: int = 0
    too_long: bool = False
    of_kind: bool = False


OK = Verdict(Outcome.OK, 200)

# -- times

# Go's durations, as OpenAI writes them (17ms, 7.66s, 6m0s), prose ("45 seconds"), or plain seconds, as in Azure's
# fields and Retry-After. "ms" stands before "m": the first alternative that fits counts.
_NUMBER = r"\d{1,12}(?:\.\d{1,9})?"
_PART = re.compile(rf"({_NUMBER})\s?([mnuµ]?s|m|h)[a-z]*\s?", re.ASCII | re.IGNORECASE)
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
# OpenAI: "try again in 1m2s"; Azure: "retry after 45 seconds"; Google: in the details of the error.
_HINT = re.compile(
    rf'(?:try again in|retry after|retry in|"retryDelay":)\s*"?({_NUMBER}\s?[a-zµ]*(?:{_NUMBER}[a-zµ]+)*)',
    re.ASCII | re.IGNORECASE,
)
# No limit counts more than a month. A time that is further away is a mistake.
RESET_MAX_S = 32 * 86_400.0


def parse_duration(text: str) -> float | None:
    """Return the seconds of a duration (`17ms`, `6m0s`, `45 seconds`) or of a plain number; None for anything else."""
    if re.fullmatch(_NUMBER, text, re.ASCII):
        return min(float(text), 1e9)
    parts = _PART.findall(text)
    if not parts or _PART.sub("", text):
        return None
    return min(sum(float(number) * _UNITS_S[unit.lower()] for number, unit in parts), 1e9)


def parse_date(text: str) -> float | None:
    """Return the Unix time of an HTTP date or an RFC 3339 time; None for anything else."""
    try:
        parse = dt.datetime.fromisoformat if text[:4].isdigit() else email.utils.parsedate_to_datetime
        then = parse(text)
        return (then if then.tzinfo else then.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def seconds_until(name: bytes, index: Index, wall_s: float) -> float | None:
    """Return the seconds until the time in a field: a duration, Unix time in seconds or milliseconds, or a date.

    Return None for anything else. A date is compared with the reply's own Date, as clocks differ; `wall_s`, our Unix
    time, counts where it has none. Of a field that is given twice, the longest time counts.
    """
    longest = None
    # Repeated fields were joined with commas. A date has a comma of its own, before the day.
    for text in re.split(r",(?!\s*\d\d?[ -][A-Za-z])\s*", index.get(name, b"").decode("latin-1")):
        is_unix_time = re.fullmatch(r"\d{10}(\.\d{1,9})?|\d{13}", text, re.ASCII) is not None
        seconds = None if is_unix_time else parse_duration(text)
        then = float(text) if is_unix_time else parse_date(text) if seconds is None else None
        then = then / 1e3 if then and then >= 1e11 else then
        if then is not None:
            date_s = parse_date(index.get(b"date", b"").decode("latin-1"))
            seconds = then - (wall_s if date_s is None else date_s)
        if seconds is not None and abs(seconds) <= RESET_MAX_S:
            longest = max(seconds, longest or 0.0)
    return longest


def read_waits(verdict: Verdict, index: Index, body: bytes, wall_s: float) -> None:
    """Set the time to wait: by an error's fields (RFC 9110, 10.2.3), else by its text, else by the end of a window.

    The milliseconds of Azure and OpenAI come first: Retry-After rounds 20 ms up to a second, or down to zero.
    X-RateLimit-Reset (OpenRouter) is the end of a fixed window. A bucket that refills has room long before it is full,
    so `reset_s` is only the latest time to ask again.
    """
    exact_ms = seconds_until(b"retry-after-ms", index, wall_s)
    verdict.after_s = seconds_until(b"retry-after", index, wall_s) if exact_ms is None else exact_ms / 1e3
    hint = _HINT.search(body[:4096].decode("utf-8", "replace"))
    if verdict.after_s is None and hint:
        verdict.after_s = parse_duration(hint.group(1))
    if verdict.after_s is None and verdict.outcome is Outcome.RATE:
        for names in (*WINDOW_NAMES, *REQUEST_NAMES, *TOKEN_NAMES):
            # A request for many tokens is refused while some are left.
            spent = index.get(names[1], b"0") == b"0" or (verdict.by_tokens and names in TOKEN_NAMES)
            reset_s = seconds_until(names[2], index, wall_s) if spent else None
            if reset_s and names in WINDOW_NAMES:
                verdict.after_s = reset_s
            elif reset_s:
                verdict.reset_s = min(reset_s, verdict.reset_s or reset_s)


# -- errors


def read_rate_message(verdict: Verdict, names: list[str]) -> None:
    """Read OpenAI's text: "... (for limit gpt-4.1) ... on tokens per min (TPM): Limit 10000, Requested 12000".

    The outcome becomes LARGE where the request exceeds the whole limit: it would be refused however long it waits.
    """
    verdict.by_tokens = "tokens" in names or re.search(r"tokens per|\(TPM\)", verdict.message) is not None
    name = re.search(r"\(for limit ([^)\s]{1,128})\)", verdict.message)
    verdict.bucket = name.group(1) if name else ""
    amounts = re.search(r"Limit:? ([\d,]{1,15}).{0,60}?Requested:? ([\d,]{1,15})", verdict.message)
    if amounts:
        limit, verdict.requested = (int(amount.replace(",", "") or 0) for amount in amounts.groups())
        if verdict.requested > limit > 0:
            verdict.outcome = Outcome.LARGE


def judge_error(status: int, index: Index, body: bytes, rate_codes: Collection[str], wall_s: float) -> Verdict:
    """Return the verdict on an error reply to a request for a model. For a 200, the error's words give the status."""
    value = parse_reply(body)
    error = find_error(value) or first_object(value)
    names, message = error_words(error)
    if status < 300:
        numbers = [int(name) for name in names if re.fullmatch(r"[45]\d\d", name, re.ASCII)]
        status = [*numbers, *(ERROR_STATUSES[name] for name in names if name in ERROR_STATUSES), 502][0]
    # LiteLLM puts the vendor's own error into its text. Elsewhere JSON in a text may be the client's.
    start, end = message.find("{"), message.rfind("}") + 1
    inner = find_error(parse_reply(message[start:end].encode())) if message.startswith(("litellm.", "{")) else {}
    text = error_words(inner)[1] if inner else message
    for outcome, statuses, codes, words in RULES:
        has_code = any(name in codes and not (outcome is Outcome.QUOTA and name in rate_codes) for name in names)
        if status in statuses and (has_code or (words and re.search(words, text)) or not (codes or words)):
            break
    # Another account with the same API would say the same.
    verdict = Verdict(outcome, status, message, of_kind=words is OPTION_WORDS)
    if outcome is Outcome.CLIENT:
        is_code = any(name in TOO_LONG_CODES for name in names)
        verdict.too_long = is_code or TOO_LONG_WORDS.search(_QUOTED.sub("", text)) is not None
    elif outcome in (Outcome.RATE, Outcome.FAULT):
        # OpenRouter repeats its header fields in the body: there they also reach the client of a stream.
        headers = first_object(first_object(error.get("metadata")).get("headers"))
        fields = {name.lower().encode(): str(value).encode() for name, value in headers.items()}
        if outcome is Outcome.RATE:
            read_rate_message(verdict, names)
        read_waits(verdict, {**fields, **index}, body, wall_s)
    return verdict


def judge_reply(
    status: int, index: Index, body: bytes, request: ApiRequest, rate_codes: Collection[str], wall_s: float
) -> Verdict:
    """Return the verdict on a reply; `body` is only read for errors. `rate_codes`: see `AccountConfig`."""
    if status < 300:
        return OK
    verdict = judge_error(status, index, body, rate_codes, wall_s)
    if not request.inference:
        # The request named no model, so a 403 or 404 says nothing about models. A key may have few rights; OpenAI
        # answers 401 where one is missing: "You have insufficient permissions ... Missing scopes: api.files.read."
        if status == 403 or (status == 401 and "issing scope" in verdict.message):
            verdict.outcome = Outcome.BARRED
        elif status == 404 or (status == 409 and request.stateful):
            verdict.outcome = Outcome.CLIENT
    elif status == 404 and body.lstrip()[:1] not in (b"{", b"["):
        # An API would answer in JSON: this is a proxy whose backend is away, or a server that lacks a rarer path.
        is_common = request.path.endswith(("/completions", "/embeddings"))
        verdict.outcome = Outcome.FAULT if is_common else Outcome.UNFIT
    elif request.stateful and status in (404, 409) and not (request.model and verdict.outcome is Outcome.MISSING):
        # About an object of the account, not about the account.
        verdict.outcome = Outcome.CLIENT
    return verdict


# Inside a JSON string quotes are escaped, so neither pattern can match there.
_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\{')
_ERROR = re.compile(rb'"(?:error|success)"(?!\s*:\s*(?:null|true))')


def judge_answer(body: bytes, index: Index, request: ApiRequest, rate_codes: Collection[str]) -> Verdict:
    """Return the verdict on `body`, a whole answer with status 200: some upstreams send errors with that status.

    A chat must have choices; any other answer may be anything but an error object. Only a suspicious body is parsed,
    as parsing every answer would double the cost of a request.
    """
    text, is_chat = body.removeprefix(b"\xef\xbb\xbf").strip(), request.path in (CHAT_PATH, "/completions")
    is_object = text[:1] == b"{" and text[-1:] == b"}"
    is_page = b"html" in index.get(b"content-type", b"") or text[:6].lower() in (b"<html>", b"<!doct")
    if not request.inference or not (is_chat or is_object or is_page):
        return OK
    has_error = (b'"error"' in text or b'"success"' in text) and _ERROR.search(text)
    if not has_error and ((not is_chat and not is_page) or (is_object and _CHOICES.search(text))):
        return OK
    value = parse_reply(text)
    answer = first_object(value)
    # A stored response that failed is an object of the account: the client may read it again.
    if find_error(value) and not (request.stateful and answer.get("object") == "response"):
        return judge_error(200, index, text, rate_codes, time.time())
    if first_object(answer.get("choices")) or not (is_chat or is_page):
        return OK
    problem = "is empty" if not text else "has no choices" if answer else "is no JSON object"
    return Verdict(Outcome.FAULT, 502, f"the upstream's answer {problem}")


def judge_error_event(event: bytes, index: Index, rate_codes: Collection[str]) -> Verdict:
    """Return the verdict on an error event: the same as on a reply with the status that belongs to the error.

    The status of the real reply is 200, so without this an account that refuses all streams would look healthy.
    """
    return judge_error(200, index, event_fields(event)[1], rate_codes, time.time())


def judge_late_event(event: bytes, rate_codes: Collection[str]) -> Verdict:
    """Return the verdict on an error in the middle of a stream: OK where the controller is not at fault."""
    verdict = judge_error_event(event, {}, rate_codes)
    return OK if verdict.outcome in (Outcome.CLIENT, Outcome.LARGE, Outcome.MISSING, Outcome.UNFIT) else verdict


def judge_failure(error: UpstreamError) -> Verdict:
    """Return the verdict on an attempt without a reply."""
    silent = isinstance(error, UpstreamTimeout) and error.before_reply
    outcome = Outcome.SILENT if silent else Outcome.FAULT
    return Verdict(outcome if error.sent else Outcome.CONNECT, 0, str(error))


def may_retry(verdict: Verdict, request: ApiRequest) -> bool:
    """Return whether the next controller may get this request. The only place that decides it.

    A stateful request changes something in the account, so it moves on only when it certainly did not run. An upstream
    that is silent before a whole answer may be generating: a second answer would be billed too.
    """
    outcome = verdict.outcome
    # Another account may have the model.
    if request.path.startswith("/models/") and verdict.status in (403, 404):
        return True
    # All accounts would refuse a client's mistake; a prompt that breaks a rule could get all keys banned.
    if outcome in (Outcome.OK, Outcome.CLIENT, Outcome.GONE):
        return False
    if request.stateful:
        return outcome in NOT_RUN or verdict.status in (401, 503)
    # A stream's first byte comes soon, so silence is a hang; before a whole answer, it may be work.
    return request.stream or outcome is not Outcome.SILENT


def usefulness(verdict: Verdict) -> int:
    """Return how useful an error is to the client, more for a higher number: a 429 is more useful than a 401."""
    order = "barred unfit missing forbidden auth quota fault rate large client".split()
    return order.index(verdict.outcome.value) if verdict.outcome.value in order else -1


# -- reports of quota and usage


class Allowance(NamedTuple):
    """A reply's report of one limit: its size, the rest, and the seconds until all is back (None: not reported)."""

    limit: float
    remaining: float
    reset_s: float | None = None


# OpenAI's names, which most vendors share; Anthropic's; Cerebras'; Mistral's. A reply's first known set counts. Then
# OpenRouter's names and those of the IETF's draft (ratelimit-headers), which do not say what they count.
REQUEST_NAMES, TOKEN_NAMES, WINDOW_NAMES = (
    [tuple(name.replace("*", what).encode() for what in ("limit", "remaining", "reset")) for name in names.split()]
    for names in (
        "x-ratelimit-*-requests anthropic-ratelimit-requests-* x-ratelimit-*-requests-day x-ratelimit-*-req-minute",
        "x-ratelimit-*-tokens anthropic-ratelimit-tokens-* x-ratelimit-*-tokens-minute",
        "x-ratelimit-* ratelimit-*",
    )
)
REMAINING_NAMES = frozenset(names[1] for names in REQUEST_NAMES + TOKEN_NAMES)


def read_allowances(index: Index, clock: Callable[[], float]) -> tuple[Allowance | None, Allowance | None]:
    """Return what a reply reports of requests and of tokens. `clock` returns Unix time, to read dates."""
    if REMAINING_NAMES.isdisjoint(index):
        return None, None
    allowances: list[Allowance | None] = []
    for known_names in (REQUEST_NAMES, TOKEN_NAMES):
        names = next((names for names in known_names if names[1] in index), known_names[0])
        limit, remaining = (index.get(name, b"") for name in names[:2])
        # Azure sends -1 and 0 where it has no limit. Fifteen digits are exact in a float.
        if all(value.isdigit() and len(value) < 16 for value in (limit, remaining)) and int(limit):
            reset_s = seconds_until(names[2], index, clock())
            allowances.append(Allowance(int(limit), min(int(remaining), int(limit)), reset_s))
        else:
            allowances.append(None)
    return allowances[0], allowances[1]


_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_decode_json = json.JSONDecoder().raw_decode
USAGE_BYTES = 2048  # no usage is larger


def usage_of(text: str) -> Usage | None:
    """Return the usage that a text begins with: in the names of chats, or of responses. None if it has no number."""
    try:
        values = _decode_json(text)[0]
    except ValueError:  # it is cut off
        return None
    counts = {name: value for name, value in values.items() if isinstance(value, int) and value >= 0}
    prompt = counts.get("prompt_tokens") or counts.get("input_tokens", 0)
    answer = counts.get("completion_tokens") or counts.get("output_tokens", 0)
    total = counts.get("total_tokens") or prompt + answer
    details = values.get("prompt_tokens_details") or values.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    cached = cached if isinstance(cached, int) else 0
    return Usage(total, prompt or total - answer, answer, cached) if total else None


def read_usage(body: bytes) -> Usage | None:
    """Return the last `usage` in an answer or in its end; None without one.

    It searches, as the end of an answer is not JSON, and a whole answer may have megabytes.
    """
    start = body.rfind(b'"usage"')
    while start >= 0:
        found = _USAGE.match(body, start)
        if found is not None:
            return usage_of(body[found.end() : start + USAGE_BYTES].decode("utf-8", "replace"))
        start = body.rfind(b'"usage"', 0, start)
    return None


# The text in an answer, and in the events of a stream. The Responses API repeats the text of its deltas later.
_TEXT = re.compile(rb'"(?:content|reasoning_content|text|arguments)"\s*:\s*"((?:[^"\\]|\\.)*)"')
_DELTA = re.compile(rb'"delta"\s*:\s*"((?:[^"\\]|\\.)*)"')


class UsageMeter:
    """Counts the tokens of an answer that passes: by its usage, wherever that stands, else by its text."""

    def __init__(self, request: ApiRequest) -> None:
        self.pattern = _DELTA if request.stream and request.path == "/responses" else _TEXT
        self.splitter = EventSplitter() if request.stream else None
        self.usage: Usage | None = None
        self.tail, self.text = b"", 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes. A usage may come in two pieces."""
        window = self.tail + data
        self.usage = read_usage(window) or self.usage
        self.tail = window[-USAGE_BYTES:]
        for piece in (data,) if self.splitter is None else self.splitter.feed(data):
            self.text += sum(map(len, self.pattern.findall(piece)))
        if self.splitter is not None and len(self.splitter.pending) > EVENT_BYTES:
            self.splitter.pending = b""


# ==== 11. Quotas and health ====
# How much an account may be sent, and whether it works. Pure arithmetic: `now` is the loop's clock and always passed
# in; nothing here waits or knows HTTP.
#
# Providers count per model, so a *quota* (an account, or several that share a `quota_group`) has a *ledger* of limits
# for each model. A request is charged when it gets its *lease*, before it is sent: else ten requests at once would all
# see the same last place. A *window* is a configured limit, counted exactly. A *bucket* follows replies: providers keep
# leaky buckets that refill all the time, and a reply reports what was left when its own request was admitted. Other
# requests were sent since. So the bucket is a model, charged at each sending and refilled by the clock. A reply is
# compared with what the model expected for its request, and the difference corrects the model. So each request under
# way counts exactly once, in whatever order replies come.
#
# A *gate* is shut for a time that doubles at each relapse. Then one request, the probe, finds out. There is one for a
# controller's health, one for a quota's credit, one for each ledger's 429s that name no time, and one for each
# *candidate*, which is a controller for one model and may lack it.

NEVER = math.inf
MEMORY_MODELS = 256  # models in each cache, as clients choose the names

CachedT = TypeVar("CachedT")


def recall(cache: dict[str, CachedT], key: str, make: Callable[[str], CachedT]) -> CachedT:
    """Return the cached value of `key`, made if it is missing; a full cache drops the least recently used."""
    value = cache.pop(key) if key in cache else make(key)
    if len(cache) >= MEMORY_MODELS:
        del cache[next(iter(cache))]
    cache[key] = value
    return value


def next_backoff(last_s: float, bounds: tuple[float, float]) -> float:
    """Double `last_s`, clamped to `bounds` (first, maximum)."""
    return min(max(2 * last_s, bounds[0]), bounds[1])


# -- gates

FAILING, REFUSED, SILENT, NO_CREDIT, NO_MODEL, BUSY = "failing", "refused", "silent", "no_credit", "missing", "busy"
LIMITED = "limited"
# Seconds for which a gate is shut: the first time, and the end of doubling. An overload ends in seconds, a refused key
# or an unpaid bill needs a person, a hang may end at any moment. For BUSY the upstream names the time.
BACKOFF_S = {FAILING: (2, 60), REFUSED: (30, 3600), SILENT: (1, 60), NO_CREDIT: (300, 3600)}
BACKOFF_S |= {NO_MODEL: (600, 600), LIMITED: (1, 30)}


class Gate:
    """A gate is shut for a `reason` ("": open) until a time that doubles at each relapse; then one probe may pass."""

    def __init__(self, name: str = "") -> None:
        # The log names the account; a gate without a name is not logged.
        self.name, self.reason, self.until = name, "", 0.0
        # The times when it shut first and last.
        self.out_since = self.shut_at = 0.0
        self.probe: Lease | None = None
        # The last backoff for each reason, until an answer ends well.
        self.backoff_s: dict[str, float] = {}

    def opens_at(self, now: float) -> float:
        """Return when a request may pass: 0 for now, NEVER while that depends on the probe's end."""
        if not self.reason or self.until > now:
            return self.until
        if self.probe is None:
            return 0.0
        # A 429 comes soon. A probe that is not refused for as long as the gate was shut is probably answered.
        again_at = self.probe.since + self.until - self.shut_at if self.reason == LIMITED else NEVER
        return again_at if again_at > now else 0.0

    def enter(self, lease: "Lease", now: float) -> None:
        """Let a request pass; the first after the time is the probe, a last resort before that is not."""
        if self.reason == BUSY and self.until <= now:
            self.open(now)
        elif self.reason and not self.opens_at(now):
            self.probe = lease

    def counts(self, lease: "Lease", enough: bool = True) -> bool:
        """Return whether a failure shuts the gate: the probe's does, any other where the gate is open and `enough`."""
        return self.probe is lease or (enough and self.reason in ("", BUSY))

    def shut(self, reason: str, now: float, why: str, for_s: float | None = None) -> None:
        """Shut for `for_s` seconds, by default twice the last time for this reason. `why`: for the log."""
        if for_s is None:
            for_s = self.backoff_s[reason] = next_backoff(self.backoff_s.get(reason, 0.0), BACKOFF_S[reason])
        self.out_since = self.out_since if self.reason else now
        self.reason, self.shut_at, self.until, self.probe = reason, now, now + for_s, None
        if self.name:
            until = "until it answers" if for_s == NEVER else f"for {math.ceil(for_s)} s"
            log.warning("account %s: disabled %s: %s", self.name, until, why)

    def works(self, lease: "Lease", now: float) -> None:
        """Open after an answer, unless its request began before the gate shut."""
        if self.reason and lease.since > self.shut_at:
            self.open(now)

    def open(self, now: float) -> None:
        """Let all requests pass."""
        if self.reason and self.name:
            log.info("account %s: back after %.0f s", self.name, now - self.out_since)
        self.reason, self.until, self.probe = "", 0.0, None


# -- limits. `opens_at` says when an amount may be sent, and `take` charges it. Later a limit learns when the amount was
# `sent`, and by `correct` its real cost; 0 gives it back.

WINDOW_S = 60.0  # the time that rpm and tpm count
EDGE_S = 0.005  # a bucket refills this much later than computed: a request that is 1 ms too early gets a 429
SLACK_S = 0.25  # a request may need this much longer than another to reach the upstream, which then counts it later
CLOSED_MAX_S = 600.0  # the longest closing by one 429 or 503
CLOSED_NOW_S = (0.01, 1.0)  # for a 429 that says "now": the first closing, and the end of doubling
SLOW_PERIOD_S = 600.0  # a limit that needs longer than this to refill counts hours or days
# Slow start: requests per second at least and at its end; growth for each request near the refused rate; requests that
# may go at once.
PACE_MIN, PACE_END, PACE_STEP, PACE_BURST = 1 / 30, 1000.0, 0.0625, 4.0


@dataclass(slots=True, eq=False)
class Receipt:
    """A charge. `expected`: the level that the reply should report. `counted`: whether the charge is in its window."""

    amount: float
    expected: float = 0.0
    sent_at: float = NEVER
    counted: bool = True


class Bucket:
    """A limit as replies report it: `level` at the time `at`, refilled by `rate` per second up to `size`.

    `shift` is the sum of all corrections by replies. A receipt keeps the level right after its own charge, less the
    shift of that time; so a reply is compared with what was expected of it, and each error is corrected once.

    Until a reply reports a `limit` (at `known_at`) `rate` is 0: the bucket refuses nothing and only counts, below zero.
    """

    def __init__(self, by_tokens: bool, now: float = 0.0) -> None:
        self.by_tokens, self.at = by_tokens, now
        self.level = self.limit = self.rate = self.shift = self.known_at = 0.0
        # `most`: the largest size that is believed.
        self.size = self.most = NEVER
        # The serial of the latest request whose reply counted; how many replies in a row reported a slow limit.
        self.newest, self.slow = -1, 0
        # Of a slow start: whether it had no second 429, and when its rate grew last.
        self.doubles, self.grown_at = True, 0.0

    def level_at(self, now: float) -> float:
        """Return the amount that may be taken."""
        return min(self.level + (now - self.at) * self.rate, self.size)

    def left_at(self, now: float) -> float | None:
        """Return what is left; None while no reply has reported a limit."""
        return max(0.0, self.level_at(now)) if self.limit else None

    def opens_at(self, amount: float, now: float) -> float:
        """Return when `amount` can be taken, 0 for now; a larger amount than the size goes when the bucket is full."""
        if not self.rate:
            return 0.0
        # Sums of floats are wrong by less than a millionth.
        lacking = min(amount, self.size) - self.level_at(now - EDGE_S) - 1e-6
        return now + lacking / self.rate if lacking > 0 else 0.0

    def take(self, amount: float, now: float) -> Receipt:
        """Charge `amount`."""
        level = self.level_at(now) - amount
        # Not below zero: the upstream charges nothing for a request that it refuses.
        self.level, self.at = max(level, 0.0) if self.rate else level, now
        return Receipt(amount, level - self.shift)

    def sent(self, receipt: Receipt, now: float) -> None:
        """Do nothing: a bucket counts from the charge on."""

    def correct(self, receipt: Receipt, amount: float, now: float) -> None:
        """Charge `amount` in place of the receipt's."""
        self.take(amount - receipt.amount, now)
        receipt.amount = amount

    def rebase(self, told: Allowance, serial: int, expected: float, sent_at: float, now: float) -> None:
        """Learn from a reply, unless a later request's reply came before. `expected`: from the receipt."""
        if serial < self.newest:
            return
        self.newest = serial
        self.take(0.0, now)
        left = told.remaining
        if not self.limit:
            self.known_at = now
        if told.reset_s:
            self._learn_rate(told.limit, left, told.reset_s)
        elif told.limit != self.limit:
            self.limit, self.rate = told.limit, told.limit / WINDOW_S
            self.size = min(told.limit, self.most)
        # What the model expected of this reply, by all that it knows now. `expected` leaves out the shift of its time.
        # A charge before the first reply met a bucket without a rate, which did not refill.
        believed = expected + self.shift - max(0.0, self.known_at - sent_at) * self.rate
        # `remaining` is rounded down. The time until the bucket is full has the fraction, unless it ends a window; then
        # the model has it, if it is not wrong by more.
        exact = self.size - (told.reset_s or 0.0) * self.rate
        left = next(level for level in (exact, believed, left) if left <= level < left + 1)
        error = left - believed
        self.shift += error
        # No more can be left than the reply reported, plus what was refilled since. The level may have been below zero
        # and was set to zero: without this bound each refused request would then look like one that was given back.
        most = min(self.size, left + (now - sent_at) * self.rate)
        self.level = min(max(self.level + error, 0.0), most)

    def _learn_rate(self, limit: float, left: float, reset_s: float) -> None:
        """Learn size and rate. A bucket may hold less than a minute's worth, as its content and its reset show.

        The limit is per minute, unless two replies in a row report that it needs more than ten minutes to refill. One
        such reply proves nothing, as resets are rounded and delayed.
        """
        spent = limit - left
        slow = spent > 0 and reset_s * limit > SLOW_PERIOD_S * spent
        if limit == self.limit == self.size and not (slow or self.slow):
            # The reply reports nothing new, as nearly all do.
            return
        self.slow = self.slow + 1 if slow else 0
        self.rate = spent / reset_s if self.slow > 1 else limit / WINDOW_S
        size = min(left + reset_s * self.rate, limit, self.most)
        if limit != self.limit or size > self.size:
            self.size = max(size, 1.0)
        self.limit = limit

    def slow_down(self, after_s: float, now: float) -> None:
        """Begin a slow start after a 429 of an account that reports no limit (self-hosted, Vertex, some gateways).

        At the reopening one request goes, the next after `after_s`. Another 429 halves the rate.
        """
        self.take(0.0, now - EDGE_S)
        self.doubles = not self.rate
        self.rate = max(self.rate / 2 or 1 / after_s, PACE_MIN)
        self.size, self.level, self.shift = 1.0, 1.0, self.shift + 1.0 - self.level

    def speed_up(self, sent_at: float, now: float) -> None:
        """Grow the rate of a slow start, once in a round trip: a rate must be tried before it grows.

        It doubles until the second 429, then grows with the requests since: doubling would exceed the same limit again.
        """
        if sent_at <= self.grown_at or self.limit or not self.rate:
            return
        if self.doubles:
            self.level, self.shift, self.rate = self.level + 1.0, self.shift + 1.0, 2 * self.rate
        else:
            self.rate *= 1 + PACE_STEP * min(self.rate * (now - self.grown_at), PACE_BURST)
        self.grown_at, self.size = now, PACE_BURST
        if self.rate >= PACE_END:
            self.rate, self.size = 0.0, NEVER


class Window:
    """A configured limit: at most `limit` in any `span_s` seconds, where a counter per minute would let twice as many.

    A charge counts in `total` at once, and gets its place in `queue` when it is sent. `burst`: it bounds the bursts of
    another window. As many requests as fit may go in the time that they are worth: 1.67 a second are one each 0.6 s.
    """

    def __init__(self, by_tokens: bool, limit: float, span_s: float, burst: bool = False) -> None:
        self.by_tokens, self.limit, self.span_s, self.burst = by_tokens, limit, span_s, burst
        self.total = 0.0
        self.queue: deque[Receipt] = deque()

    @property
    def rate(self) -> float:
        """What may be sent per second in the long run."""
        return self.limit / self.span_s

    def left_at(self, now: float) -> float | None:
        """Return what is left of the limit; None for a bound of bursts."""
        self._forget(now)
        return None if self.burst else max(0.0, self.limit - self.total)

    def opens_at(self, amount: float, now: float) -> float:
        """Return when `amount` fits, 0 for now; a larger amount than the limit goes when the window is empty."""
        self._forget(now)
        most = min(amount, self.limit)
        if self.total + most <= self.limit + 1e-9:
            return 0.0
        at = self._falls_to(self.limit - most, self.span_s, now)
        if self.burst:
            worth = self.limit // most * most
            at = min(at, self._falls_to(worth - most, worth / self.rate, now))
        return at if at > now else 0.0

    def take(self, amount: float, now: float) -> Receipt:
        """Count an amount that is about to be sent."""
        self.total += amount
        return Receipt(amount)

    def sent(self, receipt: Receipt, now: float) -> None:
        """Let the time of a charge begin; a second sending begins it again."""
        if receipt.sent_at == NEVER:
            self.queue.append(receipt)
        receipt.sent_at = now

    def correct(self, receipt: Receipt, amount: float, now: float) -> None:
        """Count `amount` in place of the receipt's. If the charge has left the window, only the excess counts, now."""
        self._forget(now)
        if receipt.counted:
            self.total += amount - receipt.amount
        elif amount > receipt.amount and not self.burst:
            self.sent(self.take(amount - receipt.amount, now), now)
        receipt.amount = amount

    def _forget(self, now: float) -> None:
        """Drop the charges that are older than the window."""
        while self.queue and self.queue[0].sent_at + self.span_s <= now:
            left = self.queue.popleft()
            self.total -= left.amount
            left.counted = False

    def _falls_to(self, rest: float, span_s: float, now: float) -> float:
        """Return when at most `rest` is left of the charges of `span_s`."""
        excess = self.total - rest
        for receipt in self.queue:
            excess -= receipt.amount
            if excess <= 1e-9:
                return receipt.sent_at + span_s
        # This is the earliest time, as some charges are not sent yet.
        return now + span_s


def day_end(wall_s: float, zone: dt.tzinfo) -> float:
    """Return the Unix time of the next midnight in `zone`. A day with a change of the clock has 23 or 25 hours."""
    today = dt.datetime.fromtimestamp(wall_s, zone).date()
    return dt.datetime.combine(today + dt.timedelta(days=1), dt.time(), zone).timestamp()


class DayWindow(Window):
    """A configured limit of a calendar day: all of it is free again at midnight of `zone`. `clock`: Unix time."""

    def __init__(self, by_tokens: bool, limit: float, zone: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__(by_tokens, limit, 86400.0)
        self.zone, self.clock = zone_of(zone), clock
        # When the day ends, in Unix time; how many days have ended; charges that are not sent yet.
        self.ends, self.serial, self.unsent = day_end(clock(), self.zone), 0, 0.0

    @property
    def rate(self) -> float:
        """No rate: nothing comes back before midnight, and until then the rest may go at once."""
        return NEVER

    def opens_at(self, amount: float, now: float) -> float:
        """Return when `amount` fits, 0 for now; a larger amount than the limit goes when nothing was used."""
        self._forget(now)
        if self.total + min(amount, self.limit) <= self.limit + 1e-9:
            return 0.0
        return now + self.ends - self.clock()

    def take(self, amount: float, now: float) -> Receipt:
        """Count an amount that is about to be sent."""
        self.total += amount
        self.unsent += amount
        return Receipt(amount)

    def sent(self, receipt: Receipt, now: float) -> None:
        """Let a charge count for this day."""
        if receipt.sent_at == NEVER:
            self.unsent -= receipt.amount
            receipt.sent_at = self.serial

    def correct(self, receipt: Receipt, amount: float, now: float) -> None:
        """Count `amount` in place of the receipt's; of a charge of an earlier day only the excess counts."""
        self._forget(now)
        more = amount - receipt.amount
        if receipt.sent_at == NEVER:
            self.unsent += more
        if receipt.sent_at in (NEVER, self.serial) or more > 0:
            self.total += more
        receipt.amount = amount

    def _forget(self, now: float) -> None:
        """Begin a new day at midnight."""
        wall_s = self.clock()
        if wall_s >= self.ends:
            self.ends, self.total = day_end(wall_s, self.zone), self.unsent
            self.serial += 1

    def restore(self, ends: float, total: float) -> None:
        """Count what was used of the same day before a restart."""
        self._forget(0.0)
        if ends == self.ends:
            self.total += total


class Ledger:
    """The limits of one quota for one model: by replies, by configuration and by the last 429s."""

    def __init__(self, name: str, limits: QuotaLimits) -> None:
        self.name, self.serial = name, 0
        self.open: dict[Lease, None] = {}
        self.requests, self.tokens = self.buckets = Bucket(False), Bucket(True)
        self.limits: list[Bucket | Window] = []
        # When the last 429 came, and the last closing by one that said "now".
        self.closed_at = self.closed_for = 0.0
        # Pairs of tokens and a time: until then no request with at least so many tokens goes.
        self.closed: list[tuple[float, float]] = []
        # A 429 without a time shuts the gate for requests of at least `least` tokens.
        self.gate, self.least = Gate(), 0.0
        self.configure(limits)

    def configure(self, limits: QuotaLimits) -> None:
        """Apply configured limits. Windows keep their charges, as the provider counts them too."""
        known = {(limit.by_tokens, limit.burst): limit for limit in self.limits if type(limit) is Window}
        windows: list[Window] = []
        for by_tokens, limit in ((False, limits.rpm), (True, limits.tpm)):
            most = max(1.0, limit * limits.burst_s / WINDOW_S)
            for burst, size, slack_s in ((False, limit, SLACK_S), (True, most, 0.0)) if limit else ():
                windows.append(known.get((by_tokens, burst)) or Window(by_tokens, size, WINDOW_S, burst))
                windows[-1].limit, windows[-1].span_s = size, size * WINDOW_S / limit + slack_s
        days = {(day.by_tokens, day.zone): day for day in self.limits if isinstance(day, DayWindow)}
        self.days: list[DayWindow] = []
        for by_tokens, limit in ((False, limits.rpd), (True, limits.tpd)):
            if limit:
                day = days.get((by_tokens, zone_of(limits.day_starts)))
                self.days.append(day or DayWindow(by_tokens, limit, limits.day_starts))
                self.days[-1].limit = limit
        self.configured, self.limits = limits, [*self.buckets, *windows, *self.days]
        self.minutes = [window for window in windows if not window.burst]

    @property
    def limited(self) -> bool:
        """Whether a limit is known."""
        return any(limit.limit for limit in self.limits)

    def opens_at(self, need: float, now: float) -> float:
        """Return when a request of `need` tokens may be sent; 0 for now."""
        openings = [limit.opens_at(need if limit.by_tokens else 1.0, now) for limit in self.limits]
        openings += [until for least, until in self.closed if need >= least]
        opens = max(*openings, self.gate.opens_at(now) if need >= self.least else 0.0)
        return opens if opens > now else 0.0

    def take(self, need: float, now: float) -> list[tuple[Bucket | Window, Receipt]]:
        """Charge one request of `need` tokens to every limit, first to the buckets."""
        return [(limit, limit.take(need if limit.by_tokens else 1.0, now)) for limit in self.limits]

    def left_at(self, by_tokens: bool, now: float) -> float | None:
        """Return how many requests, or tokens, all limits allow now; None while no limit is known."""
        left = [limit.left_at(now) for limit in self.limits if limit.by_tokens is by_tokens]
        return min((amount for amount in left if amount is not None), default=None)

    def rate(self, need: float) -> float:
        """Return how many such requests a second may go in the long run; NEVER while no limit is known."""
        known = [limit.rate / (max(1.0, need) if limit.by_tokens else 1.0) for limit in self.limits if limit.limit]
        return min(known, default=NEVER)

    def largest(self) -> float:
        """Return the most tokens that one request may have; 0 while no limit is known."""
        known = [self.tokens.limit, *(minute.limit for minute in self.minutes if minute.by_tokens)]
        return min(filter(None, known), default=0.0)

    def answered(self, sent_at: float, now: float) -> None:
        """Note a good answer: the backoff begins anew, and a slow start becomes faster."""
        # An answer to a request from before the last 429 proves nothing.
        if sent_at > self.closed_at:
            self.closed_for = 0.0
            self.gate.backoff_s.clear()
            self.requests.speed_up(sent_at, now)

    def close(self, verdict: Verdict, need: float, now: float, under_way: bool = False) -> None:
        """Learn from a 429: close until the time it named, else for 1, 2, 4 ... 30 s, and then for all but one probe.

        A 429 about tokens leaves smaller requests alone. `under_way`: the request was sent before the last 429, so a
        whole burst that is refused doubles the backoff once.
        """
        least, gate, until = need if verdict.by_tokens else 0.0, self.gate, now
        if verdict.after_s is not None:
            # "Now" (0, or a date in the past) may be a rounded time, but not again and again.
            if not (under_way and self.closed_for):
                self.closed_for = next_backoff(self.closed_for, CLOSED_NOW_S)
            until = now + min(max(verdict.after_s, self.closed_for), CLOSED_MAX_S)
            # Earlier 429s still hold for larger requests and for later times; this 429 covers the rest.
            self.closed = [item for item in self.closed if item[1] > now and (item[0] < least or item[1] > until)]
            self.closed.append((least, until))
        elif not under_way:
            self.least = min(least, self.least) if gate.reason else least
            gate.shut(LIMITED, now, "")
            gate.until = until = min(gate.until, now + (verdict.reset_s or NEVER))
        self.closed_at = now
        if not (self.minutes or self.requests.limit or under_way):
            self.requests.slow_down(until - now, now)

    def halve_burst(self) -> None:
        """Halve the burst after a 429 that came in spite of room: Azure counts slices of 1 or 10 s."""
        burst_s = self.configured.burst_s
        self.configure(replace(self.configured, burst_s=min(burst_s, max(burst_s / 2, 1.0))))
        for bucket in self.buckets:
            if bucket.limit:
                bucket.size = bucket.most = max(1.0, bucket.size / 2)


class Quota:
    """What a controller, or a `quota_group`, may be sent: ledgers by model, requests at once, and a gate for credit."""

    def __init__(self, name: str, limits: QuotaLimits) -> None:
        self.name, self.limits, self.in_flight, self.gate = name, limits, 0, Gate(name)
        # After a 429 two models may share a ledger.
        self.ledgers: dict[str, Ledger] = {}

    def configure(self, limits: QuotaLimits) -> None:
        """Apply configured limits; what was sent and what is under way still counts."""
        # Equal limits must not undo what `halve_burst` learned.
        for ledger in self.ledgers.values() if limits != self.limits else ():
            ledger.configure(limits)
        self.limits = limits

    @property
    def is_full(self) -> bool:
        """Whether as many requests as `concurrency` allows are under way."""
        return 0 < self.limits.concurrency <= self.in_flight

    def ledger(self, model: str) -> Ledger:
        """Return the ledger that counts for `model`."""
        return recall(self.ledgers, model, lambda name: Ledger(name, self.limits))


# -- controllers and their models

BREAKER_OUTCOMES, BREAKER_FAILURES, BREAKER_WITHIN_S = 20, 5, 30.0
# So many in a row shut the gate, as a single 401 may be a short fault of the provider.
REFUSALS = {Outcome.AUTH: 2, Outcome.FORBIDDEN: 3}
# Silent requests that make a suspect; the shortest suspicious silence, and that where no usual time is known.
SUSPECT_COUNT, SUSPECT_MIN_S, SUSPECT_UNKNOWN_S = 3, 1.0, 30.0
SAMPLES = 100  # cached times to the first answer, per controller, model and kind
_DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8})\Z")


def model_patterns(names: Iterable[str]) -> re.Pattern[str]:
    """Return one expression for all of the names, in which `*` stands for anything and `?` for one character."""
    parts = [re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names]
    return re.compile("|".join(parts), re.DOTALL)


def unusual_s(times: Iterable[float], share: float) -> float:
    """Return three times the value that `share` of `times` do not exceed."""
    ordered = sorted(times)
    return 3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Candidate:
    """One controller for one model: its ledger, whether it has the model, and its usual times to a first answer.

    `mapped`: its name by `model_map`. `limited_as`: its name in the quota. `times`: of whole answers and of streams.
    `refused`: what it has refused of what a request can do without.
    """

    def __init__(self, upstream: "Upstream", model: str) -> None:
        self.upstream, self.model, self.gate = upstream, model, Gate()
        self.mapped = dict(upstream.config.model_map).get(model)
        self.refused: frozenset[str] = frozenset()
        name = self.mapped or model
        # gpt-4.1-2025-04-14 counts as gpt-4.1, but each of Azure's deployments has a quota of its own.
        self.limited_as = name if upstream.config.type == "azure" else _DATED.sub("", name)
        self.times: tuple[deque[float], deque[float]] = (deque(maxlen=SAMPLES), deque(maxlen=SAMPLES))

    @property
    def ledger(self) -> Ledger:
        """The ledger that counts for this model; a 429 may change it."""
        return self.upstream.quota.ledger(self.limited_as)

    def room_at(self, need: float, now: float) -> float:
        """Return when quota and credit have room: 0 for now, NEVER while that depends on another request's end."""
        quota = self.upstream.quota
        return NEVER if quota.is_full else max(quota.gate.opens_at(now), self.ledger.opens_at(need, now))

    def well_at(self, now: float) -> float:
        """Return when the controller works again and has the model, as far as is known: 0 for now."""
        return max(self.upstream.gate.opens_at(now), self.gate.opens_at(now))

    def is_out(self, now: float) -> bool:
        """Return whether its health or a lack of credit keeps requests away, and not only a limit."""
        return bool(self.well_at(now) or self.upstream.quota.gate.opens_at(now))

    def opens_at(self, need: float, now: float) -> float:
        """Return when a request may go here, as far as is known: 0 for now."""
        return max(self.room_at(need, now), self.well_at(now))


class Upstream:
    """A controller with its live state."""

    def __init__(self, config: ControllerConfig, controller: Controller, quota: Quota) -> None:
        self.config, self.controller, self.quota = config, controller, quota
        self.name, self.weight, self.gate = config.name, config.weight, Gate(config.name)
        self.kind = config.type, config.account.base_url
        self.credit = self.in_flight = self.requests = self.failures = 0
        # Moving means, of whole answers and of streams; 0 is unknown.
        self.first_byte_s = [0.0, 0.0]
        # When the last attempts ended, and whether they failed.
        self.recent: deque[tuple[float, bool]] = deque(maxlen=BREAKER_OUTCOMES)
        self.refusals: Counter[Outcome] = Counter()
        # Sent requests without a byte of reply; how many in a row another controller had to answer.
        self.unanswered: dict[Lease, None] = {}
        self.hedged, self.answered_at, self.last_error = 0, 0.0, ""
        self.candidates: dict[str, Candidate] = {}
        self.patterns = model_patterns([*config.models, *dict(config.model_map)])
        # The models of its own list, if that is known.
        self.listed: frozenset[str] | None = None

    def names(self, model: str) -> bool:
        """Return whether the configuration names `model` for this controller."""
        return self.patterns.fullmatch(model) is not None

    def serves(self, model: str) -> bool:
        """Return whether requests for `model` may go here; a controller without `models` takes all."""
        return not self.config.models or self.names(model)

    def candidate(self, model: str) -> Candidate:
        """Return what is known of this controller and `model`."""
        return recall(self.candidates, model, partial(Candidate, self))

    def try_again(self, now: float) -> None:
        """Open all its gates and forget all failures: the operator has just acted."""
        for gate in (self.gate, self.quota.gate, *(candidate.gate for candidate in self.candidates.values())):
            gate.open(now)
            gate.backoff_s.clear()
        self.recent.clear()
        self.refusals.clear()
        self.hedged = 0

    def learn(self, lease: "Lease", verdict: Verdict, now: float) -> None:
        """Learn from an attempt that failed (README's table, third column)."""
        outcome, gate = verdict.outcome, self.gate
        why = f"{verdict.status or outcome.value} {verdict.message[:200]}"
        self.last_error = why if verdict.message else self.last_error
        was_refused = outcome is Outcome.UNFIT and verdict.status > 0
        if was_refused or outcome in (Outcome.CLIENT, Outcome.LARGE, Outcome.MISSING, Outcome.RATE):
            self.recent.append((now, False))
            self.refusals.clear()
            gate.works(lease, now)
        elif outcome in REFUSALS:
            self.failures += 1
            self.refusals[outcome] += 1
            if gate.counts(lease, self.refusals[outcome] >= REFUSALS[outcome]):
                gate.shut(REFUSED, now, why)
        elif outcome in (Outcome.FAULT, Outcome.CONNECT, Outcome.SILENT, Outcome.CUT):
            self._fail(lease, verdict, now, why)
        elif self.hedged >= SUSPECT_COUNT and gate.counts(lease):
            # With little traffic no three requests are stuck at once.
            gate.shut(SILENT, now, f"{self.hedged} requests in a row were answered elsewhere", NEVER)
        if outcome is Outcome.QUOTA and self.quota.gate.counts(lease):
            self.quota.gate.shut(NO_CREDIT, now, why)
        elif outcome is Outcome.MISSING and lease.candidate.gate.counts(lease):
            lease.candidate.gate.shut(NO_MODEL, now, why)

    def _fail(self, lease: "Lease", verdict: Verdict, now: float, why: str) -> None:
        """Count a failure: the breaker needs a number and a share, so one failure in a hundred never opens it."""
        self.failures += 1
        self.recent.append((now, True))
        # A controller with one request a minute needs no breaker.
        fresh = [failed for at, failed in self.recent if now - at <= BREAKER_WITHIN_S]
        if self.gate.counts(lease, sum(fresh) >= max(BREAKER_FAILURES, len(fresh) / 2)):
            self.gate.shut(FAILING, now, why)
        # The upstream named a time: no relapse, and no probe is needed.
        if verdict.after_s:
            for_s = min(verdict.after_s, CLOSED_MAX_S)
            if not self.gate.reason:
                self.gate.shut(BUSY, now, why, for_s)
            self.gate.until = max(self.gate.until, now + for_s)

    def is_busy(self, now: float) -> bool:
        """Return whether the upstream named a time to come back that is not over yet."""
        return self.gate.reason == BUSY and self.gate.until > now

    def is_silent(self, now: float) -> bool:
        """Return whether a probe, or three requests sent since the last answer, are silent for unusually long.

        A request sent before that answer is slow and not stuck, and others of its model and kind may be as slow.
        """
        since, probe = self.answered_at, self.gate.probe
        asked = [lease for lease in self.unanswered if lease.sent_at > since and self.gate.counts(lease)]
        if not asked or (len(asked) + self.hedged < SUSPECT_COUNT and asked[0] is not probe):
            return False
        candidate, stream = asked[0].candidate, asked[0].stream
        # Times are kept by model and kind, as a thinking model takes minutes.
        times = candidate.times[stream]
        usual = max(SUSPECT_MIN_S, unusual_s(times, 0.95)) if times else SUSPECT_UNKNOWN_S
        alike = [lease for lease in self.unanswered if lease.candidate is candidate and lease.stream == stream]
        return now - asked[0].sent_at > max(usual, *(since - lease.sent_at for lease in alike))


class Lease:
    """The right to send one request to one controller: charged when granted, given back at most once by `release`."""

    def __init__(self, candidate: Candidate, need: float, stream: bool, now: float) -> None:
        upstream = candidate.upstream
        self.candidate, self.upstream, self.need, self.stream = candidate, upstream, need, stream
        self.since, self.sent_at = now, 0.0
        # Called when the request needs a hedge. After a hedge, and for a silent probe, the next one follows at once.
        self.stuck: Callable[[], bool] | None = None
        self.urgent = False
        # What the reply reported of requests and of tokens.
        self.told: tuple[Allowance | None, Allowance | None] = (None, None)
        upstream.in_flight += 1
        upstream.requests += 1
        upstream.quota.in_flight += 1
        self.ledger = ledger = candidate.ledger
        self.gates = [upstream.gate, upstream.quota.gate, candidate.gate, *[ledger.gate] * (need >= ledger.least)]
        for gate in self.gates:
            gate.enter(self, now)
        ledger.serial = self.serial = ledger.serial + 1
        ledger.open[self] = None
        self.receipts = ledger.take(need, now)

    @property
    def is_probe(self) -> bool:
        """Whether the request finds out if a controller that was out works again."""
        return self.upstream.gate.probe is self

    def sent(self, now: float) -> None:
        """Note that the request was written: from now on it counts, whatever its result."""
        self.sent_at = now
        for limit, receipt in self.receipts:
            limit.sent(receipt, now)
        self.upstream.unanswered[self] = None

    def heard(self, now: float) -> None:
        """Note that a byte of a reply came, also of a ping: request and controller are not silent."""
        upstream = self.upstream
        upstream.unanswered.pop(self, None)
        upstream.answered_at, upstream.hedged = now, 0
        if upstream.gate.reason == SILENT:
            upstream.gate.open(now)

    def answered(self, now: float) -> None:
        """Note that the answer began: the controller works, and the time so far becomes a sample."""
        upstream, took_s, was_out = self.upstream, now - self.since, self.upstream.gate.reason
        self.heard(now)
        self.candidate.times[self.stream].append(took_s)
        mean = upstream.first_byte_s[self.stream]
        upstream.first_byte_s[self.stream] = mean + (took_s - mean) / 8 if mean else took_s
        upstream.refusals.clear()
        for gate in self.gates:
            gate.works(self, now)
        if was_out and not upstream.gate.reason:
            upstream.recent.clear()
        self.ledger.answered(self.sent_at, now)

    def learn(self, requests: Allowance | None, tokens: Allowance | None, now: float) -> None:
        """Note what the reply reports about the quota."""
        self.told = requests, tokens
        for bucket, told, (_, receipt) in zip(self.ledger.buckets, self.told, self.receipts, strict=False):
            if told:
                bucket.rebase(told, self.serial, receipt.expected, self.sent_at, now)

    def release(self, verdict: Verdict, now: float) -> None:
        """End the attempt with this verdict, also after its answer began. What was never sent is given back whole."""
        # A sent request stays charged, as providers count failed calls too. They count a stream as one request at once
        # until its last byte.
        upstream = self.upstream
        upstream.in_flight -= 1
        upstream.quota.in_flight -= 1
        if self in upstream.unanswered:
            del upstream.unanswered[self]
            upstream.hedged += self.urgent and verdict.outcome is Outcome.LOST
        del self.ledger.open[self]
        if not self.sent_at:
            for limit, receipt in self.receipts:
                limit.correct(receipt, 0.0, now)
            # The upstream never saw this request, so replies to later requests will report so much more.
            for later in [lease for lease in self.ledger.open if lease.serial > self.serial]:
                for amount, (_, receipt) in zip((1.0, self.need), later.receipts, strict=False):
                    receipt.expected += amount
        if verdict is OK:
            upstream.recent.append((now, False))
        else:
            upstream.learn(self, verdict, now)
        for gate in self.gates:
            # An answer's beginning opens a gate, as the answer may last minutes; only a good end resets the backoff.
            if verdict is OK and not gate.reason:
                gate.backoff_s.clear()
            if gate.probe is self:
                gate.probe = None
        if upstream.gate.reason == SILENT and upstream.gate.until == NEVER and not upstream.unanswered:
            # Nothing is stuck any more: after a time a probe may go.
            upstream.gate.shut(SILENT, now, "it did not answer")


# ==== 12. Balancing ====
# Which controller gets a request, and in which order requests wait. The pool knows no connection and no head, only
# leases and verdicts; its clock and its timers are passed in.
#
# A request asks for a *lease*. The *policy* chooses among the candidates that are open (section 11) and not tried in
# this round; long conversations prefer the account whose prompt cache has them. When no candidate has room, the request
# stands in the *line* of its model: first come, first served, and never behind a request for another model. The line is
# not polled: at the end of each lease, at each answer and at each known reopening `pump` hands out the free places. A
# request that cannot be served in time is refused at once, with the time to come again.

TOKENS_ANSWER = 500  # the estimate for an answer of an unknown model
MODEL_NAME_CHARS = 256  # longer names are not cached
KEY_BUSY_S = 1.0  # Retry-After for a client key whose requests are all under way
THREADED_PATHS = (CHAT_PATH, "/responses")
AFFINE_TOKENS = 1000  # 4,000 characters; providers cache no shorter prompts
AFFINE_LOAD = 1.25  # a controller with more in flight than so many times its share is passed over
# Fewer samples prove nothing; a hedge may be billed twice, so it comes late.
HEDGE_SAMPLES, HEDGE_MIN_S = 20, 10.0
SWEEP_S = 0.25  # how often silent requests are looked for, while any is unanswered
# Hedges may be billed twice. So many may go in a minute, or this share of all calls, of which so many are saved up.
HEDGES_A_MINUTE, HEDGE_SHARE, HEDGES_SAVED = 10, 0.05, 500.0


# -- conversations. Providers cache the beginning of prompts for some minutes, and bill it at a tenth to a half then.
# When the turns of a conversation go to all accounts, the hits fall from 95 % to nothing.


def thread_of(data: dict[str, Any]) -> bytes:
    """Return a conversation's name: its prompt_cache_key, else a checksum of its texts to the user's first, else b"".

    A system prompt alone makes no name: it would bring all requests of an application to one account.
    """
    key, turns = data.get("prompt_cache_key"), data.get("messages", data.get("input"))
    if isinstance(key, str) and key:
        return key.encode("utf-8", "replace")[:MODEL_NAME_CHARS]
    # The Responses API has the system prompt apart, and takes a text for one turn of the user.
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    thread = 0
    for turn in [{"content": data.get("instructions")}, *turns] if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            return b""
        content = turn.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            thread = zlib.crc32(text.encode("utf-8", "replace") if isinstance(text, str) else b"\0", thread)
        if turn.get("role") == "user":
            return b"%d" % thread
    return b""


def preferred(thread: bytes, candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates of the quota that a conversation prefers, as prompt caches belong to organisations.

    By weighted rendezvous hashing only the conversations of a quota that comes or goes move. A quota with too much in
    flight is passed over (bounded loads).
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.upstream.quota.name, []).append(candidate)

    def sums(group: list[Candidate]) -> tuple[int, int]:
        return sum(item.upstream.weight for item in group), sum(item.upstream.in_flight for item in group)

    weights, in_flight = sums(candidates)
    best, most = candidates, 0.0
    for name, group in groups.items() if len(groups) > 1 else ():
        digest = hashlib.blake2b(thread + name.encode(), digest_size=6).digest()
        weight, load = sums(group)
        attraction = -weight / math.log((int.from_bytes(digest, "big") + 0.5) / 2**48)
        if attraction > most and load < math.ceil(AFFINE_LOAD * (in_flight + 1) * weight / weights):
            best, most = group, attraction
    return best


# -- policies (POOL_TYPES): which of at least one candidates, in the order of the configuration, gets a request


POLICIES: dict[str, Callable[[list[Candidate], bool], Candidate]] = {
    # Smooth weighted round robin, as the Go original and nginx: 5, 1, 1 gives a a b a c a a.
    "balanced": lambda candidates, stream: max(
        candidates, key=lambda item: item.upstream.credit + item.upstream.weight
    ),
    "random": lambda candidates, stream: random.choices(candidates, [item.upstream.weight for item in candidates])[0],
    "least_busy": lambda candidates, stream: min(
        candidates, key=lambda item: item.upstream.in_flight / item.upstream.weight
    ),
    "priority": lambda candidates, stream: candidates[0],
    # The shortest time to the first byte, of answers or of streams; an unknown time counts as the shortest.
    "fastest": lambda candidates, stream: min(candidates, key=lambda item: item.upstream.first_byte_s[stream]),
}
AFFINE_POLICIES = ("balanced", "random", "least_busy")  # the other policies choose one certain controller


# -- the pool and its lines


class NoRoom(Exception):
    """No controller has room while a request may wait. `after_s`: seconds until there is room, NEVER if unknown."""

    def __init__(self, why: str, after_s: float) -> None:
        super().__init__(why)
        self.why, self.after_s = why, after_s


@dataclass(slots=True, eq=False)
class Waiter:
    """A request in the line: the candidates that may take it, and the future that hands it a lease."""

    request: ApiRequest
    candidates: list[Candidate]
    future: asyncio.Future[Lease]


def turn_at(openings: list[tuple[float, float]], ahead: int, now: float) -> float:
    """Return when a request with `ahead` others before it gets its turn.

    `openings`: when each controller has room, and its requests per second from then on. It gives one place at its
    opening and then its rate.
    """
    turn, speed, at_zero = NEVER, 0.0, ahead + 1.0
    for opens, rate in sorted((max(opens, now), min(rate, 1e6)) for opens, rate in openings if opens != NEVER):
        # If only these and no later openings counted: places = speed * time - at_zero.
        speed, at_zero = speed + rate, at_zero + rate * opens - 1.0
        turn = min(turn, max(opens, at_zero / speed))
    return turn


class UpstreamPool:
    """The controllers, the policy that chooses among them, and the lines of requests that wait for room.

    `timers` is the loop. Only `lease` waits; all else happens in one turn of the loop, so there is no lock.
    """

    def __init__(self, upstreams: list[Upstream], config: PoolConfig, timers: asyncio.AbstractEventLoop) -> None:
        self.timers = timers
        self.upstreams: list[Upstream] = []
        # These are gone from the configuration, but have requests under way.
        self.leaving: list[Upstream] = []
        self.serving: dict[str, list[Candidate]] = {}
        # The models that the configuration or a list names.
        self.known_models: frozenset[str] = frozenset()
        # The waiting requests by model, without empty lines.
        self.lines: dict[str, deque[Waiter]] = {}
        # It rings at the soonest reopening for a waiter.
        self.alarm: asyncio.TimerHandle | None = None
        self.sweeper: asyncio.TimerHandle | None = None
        # The moving mean of answers, by model.
        self.answer_tokens: dict[str, float] = {}
        self.hedges, self.hedge_credit = Window(False, HEDGES_A_MINUTE, WINDOW_S), 0.0
        self.replace(upstreams, config)

    def replace(self, upstreams: list[Upstream], config: PoolConfig) -> None:
        """Continue with these controllers, and try all of them again; waiting requests wait for them now."""
        for upstream in dict.fromkeys((*self.upstreams, *upstreams)):
            upstream.try_again(self.timers.time())
        self.leaving = [item for item in (*self.leaving, *self.upstreams) if item.in_flight and item not in upstreams]
        self.upstreams, self.config, self.policy = upstreams, config, POLICIES[config.type]
        self.aliases, self.fallbacks = dict(config.aliases), dict(config.fallbacks)
        self.context_fallbacks = dict(config.context_fallbacks)
        self.affine_above = AFFINE_TOKENS if config.affinity and config.type in AFFINE_POLICIES else NEVER
        self._forget_models()
        for waiter in [waiter for line in self.lines.values() for waiter in line if not waiter.future.done()]:
            try:
                waiter.candidates = self.candidates_for(waiter.request, waiter.request.model)
            except ProxyError as error:
                waiter.future.set_exception(error)
        self.pump()

    @property
    def waiting(self) -> int:
        """The number of requests in all lines."""
        return sum(map(len, self.lines.values()))

    # -- choosing

    def candidates(self, model: str, asked: str = "") -> list[Candidate]:
        """Return the candidates for `model`, "" for any model. Raise ProxyError (404) when there are none.

        The error names `asked`, if the client asked for the model by another name.
        """
        serving = self._serving(model)
        if not serving:
            names = ", ".join(sorted({name for upstream in self.upstreams for name in upstream.config.models}))[:1000]
            name = asked or model
            name = name if len(name) <= 64 else name[:63] + "…"
            message = f"The model {name!r} is served by no controller here. Served: {names}."
            raise ProxyError(404, message, "model_not_found", param="model")
        return serving

    def _serving(self, model: str) -> list[Candidate]:
        """Return the candidates that name or list `model`, else those that may have it; "" for any model."""

        def find(name: str) -> list[Candidate]:
            able = [upstream for upstream in self.upstreams if not name or upstream.serves(name)]
            sure = [item for item in able if item.names(name) or name in (item.listed or ())]
            if not any(upstream.names(name) for upstream in sure):
                # A list that is not known yet may have the model, and no controller is meant for it.
                sure += [upstream for upstream in able if sure and upstream.listed is None]
            # Lists leave out previews and tuned models.
            return [upstream.candidate(name) for upstream in able if not (name and sure) or upstream in sure]

        # Clients choose the names: long ones must not fill the memory.
        return recall(self.serving, model, find) if len(model) <= MODEL_NAME_CHARS else find(model)

    def _forget_models(self) -> None:
        """Find the candidates of each model anew."""
        self.serving.clear()
        listed = [name for upstream in self.upstreams for name in upstream.listed or ()]
        self.known_models = frozenset((*self.configured_models(), *self.aliases, *listed))

    def learn_models(self, upstream: Upstream, names: Iterable[str]) -> None:
        """Learn the models that a controller itself lists. Waiting requests keep their candidates.

        Gemini lists `models/NAME`, and Ollama `NAME:latest`; clients ask for both by NAME.
        """
        upstream.listed = frozenset(
            short for name in names for short in (name, name.removeprefix("models/"), name.removesuffix(":latest"))
        )
        self._forget_models()

    def candidates_for(self, request: ApiRequest, model: str) -> list[Candidate]:
        """Return the candidates that serve `model` and can take the request. Raise ProxyError (404)."""
        candidates = self.candidates(model, request.asked)
        if request.path == CHAT_PATH:
            return candidates
        # The object is there, whatever the lists say of its model.
        if request.pinned:
            able = [upstream for upstream in self.upstreams if upstream.name == request.pinned]
            candidates = [upstream.candidate(model) for upstream in able if not model or upstream.serves(model)]
        candidates = [item for item in candidates if not item.upstream.controller.chat_only]
        if not candidates:
            raise ProxyError(404, f"No controller here can take {request.path[:200]} for this model.", "unknown_url")
        return candidates

    def estimate(self, request: ApiRequest) -> None:
        """Set the tokens that the request needs, by its own limit or by recent answers of the model."""
        answer = request.max_tokens or self.answer_tokens.get(request.model, TOKENS_ANSWER)
        request.need = request.prompt_tokens + int(answer)

    async def lease(self, request: ApiRequest, candidates: list[Candidate], tried: set[Upstream]) -> Lease | None:
        """Return the right to send to a candidate that is not in `tried`, now or from the line; None if that is no use.

        A lease from the line begins a new round: `tried` becomes empty. The time in line is taken from
        `request.wait_s`. Raise NoRoom when no controller has room in time.
        """
        lease = self.lease_at_once(request, candidates, tried)
        if lease is None and request.model not in self.lines:
            lease = self._last_resort(request, candidates, tried)
        return lease or await self._wait(request, candidates, tried)

    def lease_at_once(self, request: ApiRequest, candidates: list[Candidate], tried: set[Upstream]) -> Lease | None:
        """Return the right to send to a candidate that is not in `tried` and has room, without waiting; else None."""
        free = [candidate for candidate in candidates if candidate.upstream not in tried]
        # A candidate that a waiter could use is for the waiter. Mostly the first waiter could use all of them.
        for waiter in self.lines.get(request.model, ()):
            free = [candidate for candidate in free if candidate not in waiter.candidates]
            if not free:
                break
        lease = self._grant(request, free)
        if log.isEnabledFor(logging.DEBUG):
            self._explain(request, candidates, tried, lease)
        return lease

    def _explain(
        self, request: ApiRequest, candidates: list[Candidate], tried: set[Upstream], lease: Lease | None
    ) -> None:
        """Write to the log why a request went to its candidate, or why it went to none."""
        now, reasons = self.timers.time(), []
        for item in candidates:
            gate = item.upstream.quota.gate if item.upstream.quota.gate.reason else item.upstream.gate
            opens, well = item.room_at(request.need, now), item.well_at(now)
            if lease is not None and lease.candidate is item:
                reason = "chosen"
            elif item.upstream in tried:
                reason = "tried"
            elif well:
                reason = f"out ({gate.reason or 'lacks the model'})"
            elif opens:
                reason = "full" if opens == NEVER else f"full for {opens - now:.1f} s"
            else:
                reason = f"has room, {item.upstream.in_flight} in flight"
            reasons.append(f"{item.upstream.name} {reason}")
        log.debug("%s: %s by %s: %s", request.request_id, request.model, self.config.type, ", ".join(reasons))

    def _grant(self, request: ApiRequest, candidates: list[Candidate]) -> Lease | None:
        """Lease the candidate with room that the policy chooses; None when no candidate has room."""
        now = self.timers.time()
        ready = [item for item in candidates if not (item.upstream.quota.is_full or item.well_at(now))]
        # Only the chosen ledger is asked, as mostly it has room: to ask twenty for each request costs 15 us.
        while ready:
            eligible = ready
            if request.prompt_tokens > self.affine_above:
                if request.thread is None:
                    request.thread = thread_of(request.data) if request.path in THREADED_PATHS else b""
                eligible = preferred(request.thread, ready) if request.thread else ready
            chosen = self.policy(eligible, request.stream)
            if not chosen.room_at(request.need, now):
                # Each one that could take part gains its weight, and the chosen one pays the sum.
                for item in eligible if self.config.type == "balanced" else ():
                    item.upstream.credit += item.upstream.weight
                    chosen.upstream.credit -= item.upstream.weight
                return self._give(chosen, request, now)
            request.met_limit = True
            ready.remove(chosen)
        return None

    def _last_resort(self, request: ApiRequest, candidates: list[Candidate], tried: set[Upstream]) -> Lease | None:
        """Lease the candidate that is due back first, if all candidates are out; else None.

        So a sole controller passes its errors on. A limit or a lack of credit still refuses. A controller that named
        its time is waited for, if there is time.
        """
        now = self.timers.time()
        if not all(item.is_out(now) for item in candidates):
            return None
        left = [item for item in candidates if item.upstream not in tried and not item.room_at(request.need, now)]
        if not left or any(item.upstream.is_busy(now) and item.well_at(now) <= now + request.wait_s for item in left):
            return None
        return self._give(min(left, key=lambda item: item.well_at(now)), request, now)

    def _give(self, candidate: Candidate, request: ApiRequest, now: float) -> Lease:
        """Return a lease of this candidate, and look for silence from now on."""
        self.hedge_credit = min(self.hedge_credit + HEDGE_SHARE, HEDGES_SAVED)
        self.sweeper = self.sweeper or self.timers.call_at(now + SWEEP_S, self._sweep)
        return Lease(candidate, request.need, request.stream, now)

    # -- results of attempts

    def settle(self, lease: Lease, verdict: Verdict) -> None:
        """End an attempt: its controller learns, and waiters may have room now. A second call does nothing."""
        # The end of a hedge and a client that leaves may both settle a lease.
        if lease not in lease.ledger.open:
            return
        now = self.timers.time()
        lease.release(verdict, now)
        if verdict.outcome is Outcome.RATE:
            quota, ledger = lease.upstream.quota, lease.candidate.ledger
            # Models that share this limit share its ledger from now on.
            if verdict.bucket and verdict.bucket != ledger.name:
                ledger = quota.ledgers[lease.candidate.limited_as] = quota.ledger(verdict.bucket)
            under_way = lease.sent_at <= ledger.closed_at
            # Whether there was room, by the reply's own figures, else by our exact count.
            told, amount = lease.told[verdict.by_tokens], lease.need if verdict.by_tokens else 1.0
            had_room = told.remaining >= amount if told is not None else bool(ledger.minutes)
            if had_room and not under_way:
                ledger.halve_burst()
            ledger.close(verdict, lease.need, now, under_way)
        self.pump()

    def answered(self, lease: Lease, good: bool, now: float) -> None:
        """Note that a reply made sense so far, `good` if its answer began: the controller works."""
        (lease.answered if good else lease.heard)(now)
        self.pump()

    def used(self, lease: Lease, model: str, total: int, answer: int, told: bool) -> None:
        """Charge the tokens that an answer used, in all. `told`: the reply reported what is left."""
        if answer:
            mean = recall(self.answer_tokens, model, lambda name: float(answer))
            self.answer_tokens[model] = mean + (answer - mean) / 16
        # For a bucket the report counts more: OpenAI and Azure charge the maximum at admission and give nothing back.
        for limit, receipt in lease.receipts if total else ():
            if limit.by_tokens and not (told and isinstance(limit, Bucket)):
                limit.correct(receipt, total, self.timers.time())

    # -- the line

    async def _wait(self, request: ApiRequest, candidates: list[Candidate], tried: set[Upstream]) -> Lease | None:
        """Stand in line until a candidate has room; see `lease`."""
        # A tried candidate is only waited for if it is full or busy: any other would fail again.
        now = self.timers.time()
        busy = [item for item in candidates if item.room_at(request.need, now) or item.upstream.is_busy(now)]
        candidates = [item for item in candidates if item.upstream not in tried or item in busy]
        if not candidates or not (busy or request.model in self.lines):
            return None
        self._check_line(request, candidates, now)
        waiter = Waiter(request, candidates, self.timers.create_future())
        self.lines.setdefault(request.model, deque()).append(waiter)
        handle = self.timers.call_at(now + request.wait_s, self._give_up, waiter)
        self.pump()
        try:
            lease = await waiter.future
            tried.clear()
            return lease
        except asyncio.CancelledError:
            # The client may leave in the same turn of the loop in which the lease is granted.
            if waiter.future.done() and not waiter.future.cancelled():
                self.settle(waiter.future.result(), Verdict(Outcome.GONE))
            raise
        finally:
            handle.cancel()
            if waiter in self.lines.get(request.model, ()):
                self.lines[request.model].remove(waiter)
                # The next in line may be served now.
                self.pump()
            request.wait_s = max(0.0, request.wait_s - (self.timers.time() - now))

    def pump(self) -> None:
        """Hand a lease to the first in line for each free place, and set the next alarm."""
        if not self.lines:
            return
        now, soonest = self.timers.time(), NEVER
        for model, line in list(self.lines.items()):
            # Waiters further ahead wait for these.
            blocked: list[Candidate] = []
            for waiter in list(line):
                if not waiter.future.done():
                    candidates = [candidate for candidate in waiter.candidates if candidate not in blocked]
                    lease = self._grant(waiter.request, candidates)
                    if lease is None:
                        # A place that is too small is kept too: else small requests would pass a large one for ever.
                        blocked += candidates
                        soonest = min([soonest, *(item.opens_at(waiter.request.need, now) for item in candidates)])
                        if all(item in blocked for item in self._serving(model)):
                            # No other candidate is left for the waiters behind.
                            break
                        continue
                    waiter.future.set_result(lease)
                line.remove(waiter)
            if not line:
                del self.lines[model]
        if self.alarm is not None:
            self.alarm.cancel()
        # Where no time is known, the end of another request calls this. A timer may fire a moment too early, so it is
        # set at least a millisecond ahead.
        self.alarm = None if soonest == NEVER else self.timers.call_at(max(soonest, now + 0.001), self.pump)

    def _check_line(self, request: ApiRequest, candidates: list[Candidate], now: float) -> None:
        """Raise NoRoom, with the true time, for a request that would wait in vain."""
        openings = [(item.opens_at(request.need, now), item.ledger.rate(request.need)) for item in candidates]
        # Another request may end at any time, so with a NEVER nothing is known.
        known = all(opens != NEVER for opens, _ in openings)
        after_s = turn_at(openings, len(self.lines.get(request.model, ())), now) - now if known else NEVER
        waiting, most = self.waiting, self.config.max_queue
        if waiting >= most:
            raise NoRoom("the line is full", after_s)
        # A burst of one client must not fill the line.
        if request.key and 2 * waiting >= most:
            own = sum(waiter.request.key == request.key for line in self.lines.values() for waiter in line)
            if 2 * own >= most:
                raise NoRoom("this key holds half of the line", after_s)
        if not request.wait_s or (known and after_s > request.wait_s):
            raise NoRoom("no controller has room in time", after_s)

    def _give_up(self, waiter: Waiter) -> None:
        """Refuse a waiter whose time is over."""
        if not waiter.future.done():
            after_s = self.reopens_after(waiter.candidates, waiter.request.need)
            waiter.future.set_exception(NoRoom("no controller had room in time", after_s))

    # -- silence

    def _sweep(self) -> None:
        """Look for silent controllers and stuck requests, again and again while any request is under way."""
        now, self.sweeper = self.timers.time(), None
        # The operator may have removed a controller because it hangs.
        for upstream in [item for item in (*self.upstreams, *self.leaving) if item.in_flight]:
            self.sweeper = self.sweeper or self.timers.call_at(now + SWEEP_S, self._sweep)
            if upstream.is_silent(now):
                if upstream.gate.probe is not None:
                    upstream.gate.probe.urgent = True
                upstream.gate.shut(SILENT, now, "silent for far longer than usual", NEVER)
            for lease in list(upstream.unanswered):
                if lease.stuck is not None and (lease.urgent or self._is_stuck(lease, now)):
                    # A probe always gets a hedge, as there is one probe for each backoff.
                    within = lease.urgent or self.hedge_credit >= 1.0 or not self.hedges.opens_at(1.0, now)
                    if within and self.config.rescue_after != 0 and lease.stuck():
                        # If the hedge fails, the next one follows at once.
                        lease.urgent = True
                        self.hedge_credit = max(0.0, self.hedge_credit - 1.0)
                        self.hedges.sent(self.hedges.take(1.0, now), now)

    def _is_stuck(self, lease: Lease, now: float) -> bool:
        """Return whether a request has been silent for so long that another controller should be asked too."""
        silent_s, after_s, candidate = now - lease.sent_at, self.config.rescue_after, lease.candidate
        # A whole answer may just be long.
        if not (lease.stream or lease.upstream.gate.reason == SILENT):
            return False
        if after_s is not None:
            return 0 < after_s < silent_s
        times: Collection[float] = candidate.times[lease.stream]
        if len(times) < HEDGE_SAMPLES:
            times = [seconds for item in self._serving(candidate.model) for seconds in item.times[lease.stream]]
        return len(times) >= HEDGE_SAMPLES and silent_s > max(HEDGE_MIN_S, unusual_s(times, 0.99))

    # -- what is known

    def configured_models(self) -> list[str]:
        """Return the model names in the configuration that are no patterns, sorted."""
        configs = [upstream.config for upstream in self.upstreams]
        names = {name for config in configs for name in (*config.models, *dict(config.model_map))}
        return sorted(name for name in names | self.fallbacks.keys() if not {"*", "?"} & {*name})

    def is_served(self, model: str) -> bool:
        """Return whether a controller or a fallback serves `model`."""
        return model in self.fallbacks or any(upstream.serves(model) for upstream in self.upstreams)

    def reopens_after(self, candidates: list[Candidate], need: float) -> float:
        """Return the seconds until a candidate has room; NEVER where no time is known."""
        now = self.timers.time()
        return max(0.0, min((item.opens_at(need, now) for item in candidates), default=NEVER) - now)

    def close(self) -> None:
        """Stop the timers."""
        for handle in filter(None, (self.alarm, self.sweeper)):
            handle.cancel()


@dataclass(slots=True, eq=False)
class ClientCharge:
    """What one request of a client key counts, until `leave`."""

    quota: Quota
    receipts: list[tuple[Bucket | Window, Receipt]]

    def used(self, total: float, now: float) -> None:
        """Charge the tokens that the answer used, in place of the estimate."""
        for limit, receipt in self.receipts:
            if limit.by_tokens:
                limit.correct(receipt, total, now)

    def leave(self, was_sent: bool, now: float) -> None:
        """Note that the request is over; what was never sent to an upstream is given back."""
        self.quota.in_flight -= 1
        for limit, receipt in self.receipts if not was_sent else ():
            limit.correct(receipt, 0.0, now)


class ClientQuota(Quota):
    """The quota of one client key: its own limits, over all models."""

    def enter(self, need: float, now: float) -> ClientCharge:
        """Charge a request that may be sent now. Raise NoRoom."""
        if self.is_full:
            raise NoRoom("has as many requests under way as it may", KEY_BUSY_S)
        opens = self.ledger("").opens_at(need, now)
        if opens:
            raise NoRoom("has reached its own limit", opens - now)
        self.in_flight += 1
        charge = ClientCharge(self, self.ledger("").take(need, now))
        for limit, receipt in charge.receipts:
            limit.sent(receipt, now)
        return charge


def describe_ledger(ledger: Ledger, now: float) -> dict[str, Any]:
    """Return the state of one model's quota, for /status."""
    closed_until = max(ledger.gate.until, *(until for _, until in ledger.closed), 0.0)
    state: dict[str, Any] = {"closed_for_s": round(max(0.0, closed_until - now), 3)}
    for bucket in ledger.buckets:
        if bucket.limit:
            left, per_s = round(bucket.level_at(now), 1), round(bucket.rate, 3)
            state["tokens" if bucket.by_tokens else "requests"] = {"limit": bucket.limit, "left": left, "per_s": per_s}
    for day in ledger.days:
        left_s = max(0.0, day.ends - day.clock())
        state["tpd" if day.by_tokens else "rpd"] = {"limit": day.limit, "taken": day.total, "ends_in_s": round(left_s)}
    for minute in ledger.minutes:
        state["tpm" if minute.by_tokens else "rpm"] = {"limit": minute.limit, "taken": round(minute.total, 1)}
    return state


def describe_upstream(upstream: Upstream, now: float) -> dict[str, Any]:
    """Return one controller's state, for /status."""
    quota = upstream.quota
    gate = quota.gate if quota.gate.reason else upstream.gate
    out = gate.reason and not (gate.reason == BUSY and gate.until <= now)
    openings = [ledger.opens_at(1.0, now) for ledger in quota.ledgers.values()]
    limited_until = NEVER if quota.is_full else max(openings, default=0.0)
    until = gate.until if out else limited_until
    return {
        "name": upstream.name,
        "type": upstream.config.type,
        "state": "out" if out else "limited" if limited_until else "ok",
        "reason": gate.reason if out else None,
        "for_s": None if until == NEVER else round(max(0.0, until - now), 3),
        "quota": quota.name,
        "in_flight": upstream.in_flight,
        "requests": upstream.requests,
        "failures": upstream.failures,
        "last_error": upstream.last_error or None,
        "first_byte_ms": dict(zip(("whole", "stream"), (round(s * 1e3) for s in upstream.first_byte_s), strict=True)),
        "ledger": {name: describe_ledger(ledger, now) for name, ledger in list(quota.ledgers.items())},
        "lacks": [candidate.model for candidate in upstream.candidates.values() if candidate.gate.opens_at(now)],
    }


def describe_pool(pool: UpstreamPool, now: float) -> dict[str, Any]:
    """Return the pool's state for /status: no secret, times as seconds from now."""
    return {
        "policy": pool.config.type,
        "waiting": pool.waiting,
        "controllers": [describe_upstream(upstream, now) for upstream in pool.upstreams],
    }


# ==== 13. Relay ====
# One request, attempt after attempt, until one controller answers. `Relay.run` returns an `Answer`, and section 16
# writes it. Until then every failure may move on to another controller. From the first byte to the client on, nothing
# is retried, and a broken answer ends with an error event.
#
#   run: for the model and then for each of its fallbacks,
#     _ask_controllers: for each controller that has room, now or after a wait in line,
#       _attempt: send the request and read as much as decides; its verdict says what came of it
#     _commit: the first good attempt becomes the answer
#   _refusal: no attempt was good, so the most useful refusal becomes the answer, or an error is raised
#
# A hedge is a second attempt beside one that has been silent for too long. The first real answer of the two wins.

WHOLE_BYTES = 1_048_576  # a whole answer up to this size is collected before its head is sent, and can be replayed
HOLD_S = 15.0  # the longest time for which the beginning of a stream is held back
REASON_CHARS = 200  # of an upstream's message or id in the access record
OBJECTS_KNOWN = 30_000  # objects whose controller is remembered; the oldest are forgotten
# Ids of responses and of the items in them, and the beginning of an encrypted item, which no other item has.
OBJECT_NAMES = re.compile(rb'"(?:id|item_id)"\s*:\s*"([\w\-]{4,128})"|"encrypted_content"\s*:\s*"([^"\\]{4,64})')
JSON_TYPE = b"Content-Type: application/json\r\n"
ABANDONED = Verdict(Outcome.GONE)  # the verdict of an attempt until another is known: its client left
RATE_LIMITED = Verdict(Outcome.RATE, 429)
# Streams that have a certain end, and whether it is that of the Responses API. Without it they were cut.
ENDED_STREAMS = {CHAT_PATH: False, "/completions": False, "/responses": True}
# What an operator should look at when an account refuses this server itself. Clients can do nothing about it.
ACCOUNT_REFUSALS = {
    Outcome.AUTH: "check its api_key",
    Outcome.FORBIDDEN: "check the rights of its key, its organisation and its region",
    Outcome.BARRED: "its key may not use such objects",
    Outcome.QUOTA: "its credit or its spending limit is used up",
}
# How errors name the parameter with which this server asks for usage.
_USAGE_OPTION = re.compile(rb"stream_?options|include_usage", re.IGNORECASE)
# What other vendors add to messages, as a refusal names it; see `refuses`.
_LEFT_OUT = re.compile(r"\b(reasoning_content|thinking_blocks|developer)\b")


@dataclass(slots=True, repr=False)
class Answer:
    """What a client gets, whichever part of the server made it.

    `lines` are the header lines without framing. `held` is the first part of the body, and all of it where `rest` is
    None. `length` is the size of the whole body in bytes; None is unknown.
    """

    status: int
    lines: bytes
    held: bytes = b""
    length: int | None = None
    rest: AsyncGenerator[bytes, None] | None = None


class AnswerCut(Exception):
    """The rest of an answer will not come. `last` is an event that says so; empty where the body has no events."""

    def __init__(self, last: bytes) -> None:
        super().__init__("the answer was cut")
        self.last = last


class Hedged(Exception):
    """Another controller has answered; this attempt stops."""


@dataclass(slots=True, eq=False, repr=False)
class Attempt:
    """One request to one controller and what is known of the reply.

    `head` is None while there was no reply. `held` is what was read of the body, and all of it when `whole`. `at` is
    the time at which the attempt was decided. `readable`: the body is not compressed. `tokens_known`: the reply said
    how many tokens are left. `adds_usage`: this server asked for the usage of the stream, and the client did not.
    """

    lease: Lease
    model: str
    verdict: Verdict = ABANDONED
    exchange: Exchange | None = None
    head: ResponseHead | None = None
    held: bytes = b""
    at: float = 0.0
    whole: bool = False
    stream: bool = False
    readable: bool = True
    tokens_known: bool = False
    adds_usage: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Trip:
    """One request with its attempts.

    `tried` are the controllers asked in this round, without those that were only full. A wait in line begins a new
    round. `refusals` are the attempts that brought a reply. `failure` is the last error of an attempt without a reply,
    `full` the last refusal by the line; it is `merely_full` if a limit is the reason, and not health. `unfit` is the
    error when no API can express the request. `asked` is the model asked for, without its alias. `has_fallbacks`: other
    models may answer instead; `models` are those left. `hedge` is the second attempt beside a silent one and its task.
    """

    request: ApiRequest
    record: AccessRecord
    candidates: list[Candidate] = field(default_factory=list)
    tried: set[Upstream] = field(default_factory=set)
    refusals: list[Attempt] = field(default_factory=list)
    verdict: Verdict = ABANDONED  # of the last attempt
    failure: UpstreamError | None = None
    full: NoRoom | None = None
    merely_full: bool = False
    unfit: ProxyError | None = None
    asked: str = ""
    has_fallbacks: bool = False
    models: Iterator[str] | None = None
    hedge: tuple[Attempt, asyncio.Task[None]] | None = None

    @property
    def is_refused(self) -> bool:
        """Whether anything is known yet of why the request failed. It is about the model asked for, if possible."""
        return bool(self.refusals or self.failure or self.full)

    @property
    def hedged(self) -> bool:
        """Whether a second attempt is under way."""
        return self.hedge is not None

    def has_others(self) -> bool:
        """Return whether another controller or model could still answer. A stateful request stays with one."""
        return not self.request.stateful and (self.has_fallbacks or len(self.candidates) - len(self.tried) > 1)

    def name(self, attempt: Attempt) -> None:
        """Note the controller in the access record, and the model that was sent where it is not the one asked for."""
        lease, request = attempt.lease, self.request
        sent = lease.candidate.mapped or attempt.model
        self.record.controller, self.record.mapped = lease.upstream.name, b""
        # Only configured names are shown. A name that a client made up never comes back in a header.
        if lease.candidate.mapped is not None or request.asked:
            names = ((name.encode("ascii", "backslashreplace")) for name in (request.asked or request.model, sent))
            self.record.mapped = b"x-apiserver-model: %b -> %b\r\n" % tuple(names)

    def note(self, attempt: Attempt) -> None:
        """Take what a failed attempt means for the next ones."""
        verdict, controller = attempt.verdict, attempt.lease.upstream
        self.name(attempt)
        self.verdict = verdict
        if attempt.head is not None:
            self.refusals.append(attempt)
        # A full controller has room again at a time that its ledger knows, perhaps while others are asked.
        if verdict.outcome is not Outcome.RATE:
            self.tried.add(controller)
        # Only accounts that are known to take as many tokens are left.
        if verdict.outcome is Outcome.LARGE:
            self.keep([item for item in self.candidates if item.ledger.largest() >= verdict.requested])
        elif verdict.outcome is Outcome.UNFIT:
            # Waiting for it is no use either.
            kind = controller.kind if verdict.of_kind else None
            self.keep(
                [item for item in self.candidates if item.upstream is not controller and item.upstream.kind != kind]
            )

    def keep(self, candidates: list[Candidate]) -> None:
        """Go on with these candidates only."""
        self.candidates = candidates
        # `has_others` counts what is left.
        self.tried &= {candidate.upstream for candidate in candidates}


NO_RETRY = b"x-should-retry: false\r\n"  # for the official SDKs: to ask again soon is no use
SDK_RETRY_S = 60.0  # the official SDKs ignore a longer Retry-After, and would come back after some seconds


def retry_fields(after_s: float) -> bytes:
    """Return header lines that say when to retry, in seconds and, for the official SDKs, in milliseconds."""
    if after_s == NEVER:  # unknown
        return b"x-should-retry: true\r\n"
    # The SDKs read 0 as no value and use their own backoff of 0.5 s; so they do with more than a minute.
    after_s = max(after_s, 0.001)
    lines = b"Retry-After: %d\r\nretry-after-ms: %d\r\n" % (math.ceil(after_s), math.ceil(after_s * 1e3))
    return lines + (NO_RETRY if after_s > SDK_RETRY_S else b"")


def routing_headers(record: AccessRecord) -> bytes:
    """Return the x-apiserver-* header lines of an answer, and the x-request-id of the server itself."""
    lines = b"x-apiserver-request-id: %b\r\n" % record.request_id.encode()
    if record.attempts or record.waited_s:
        if record.controller:
            lines += b"x-apiserver-controller: %b\r\n" % record.controller.encode()
        waited = (len(record.attempts), int(record.waited_s * 1e3))
        lines += b"x-apiserver-attempts: %d\r\nx-apiserver-wait-ms: %d\r\n" % waited + record.mapped
    return lines


def makes_objects(request: ApiRequest) -> bool:
    """Return whether an answer may name objects of its account. Stateless responses have items in them, too."""
    return request.stateful or request.path == "/responses"


def plain_text(body: bytes) -> str:
    """Return the beginning of an error page's text, without markup."""
    text = body[:HOLD_BYTES].decode("utf-8", "replace")
    return " ".join(re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text).split())[:300]


def is_error_object(body: bytes) -> bool:
    """Return whether a body is an error as OpenAI's API sends it, which all SDKs can read."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("error"), dict)


class Relay:
    """Carries requests to the pool's controllers and brings their answers."""

    def __init__(self, pool: UpstreamPool, connections: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self.connections, self.loop = pool, connections, loop
        # Whether the server cuts the answers that are left.
        self.stopping = False
        # Whether clients may see an account's error about its own key.
        self.shows_account = True
        # Whether the tokens of every answer are wanted.
        self.counts_tokens = False
        # Object id -> name of the controller that made it. An id says nothing about its account.
        self.makers: dict[str, str] = {}
        # Those that are not stored yet, where they are stored.
        self.new_makers: dict[str, str] | None = None

    def remember(self, answer: bytes, controller: str) -> None:
        """Remember which controller made the objects in a part of an answer; the oldest are forgotten."""
        for item in OBJECT_NAMES.findall(answer):
            name = b"".join(item).decode("latin-1")
            self.makers.pop(name, None)
            if len(self.makers) >= OBJECTS_KNOWN:
                del self.makers[next(iter(self.makers))]
            self.makers[name] = controller
            if self.new_makers is not None:
                self.new_makers[name] = controller

    async def run(self, request: ApiRequest, record: AccessRecord) -> Answer:
        """Return the answer to `request`. Raise ProxyError or UpstreamError where no upstream's answer can be shown."""
        trip = Trip(request, record)
        self._find_candidates(trip)
        while True:
            self.pool.estimate(request)
            try:
                attempt = await self._ask_controllers(trip)
            finally:
                self._drop_hedge(trip)
            if attempt is not None:
                return await self._commit(attempt, trip)
            if not self._next_fallback(trip):
                return self._refusal(trip)

    # -- models

    def _find_candidates(self, trip: Trip) -> None:
        """Find the controllers that serve the model. Raise ProxyError (404) when there is none and no fallback."""
        pool, request = self.pool, trip.request
        if request.model in pool.aliases:
            request.substitute(pool.aliases[request.model])
        trip.asked = request.model
        trip.has_fallbacks = request.model in pool.fallbacks or request.model in pool.context_fallbacks
        try:
            trip.candidates = pool.candidates_for(request, request.model)
        except ProxyError as error:
            if request.model not in pool.fallbacks:
                raise
            trip.unfit = error

    def _next_fallback(self, trip: Trip) -> bool:
        """Switch to the next fallback model that is served; return False if none is left.

        A client's mistake stays one with every model, unless the prompt is too long for this one. A request that may be
        running already is not sent again.
        """
        pool, request, verdict = self.pool, trip.request, trip.verdict
        too_long = verdict.outcome is Outcome.CLIENT and verdict.too_long
        unfit_fallback = trip.models is not None and verdict.outcome is Outcome.CLIENT
        if not (too_long or unfit_fallback or verdict is ABANDONED or may_retry(verdict, request)):
            return False
        if trip.models is None:
            fallbacks = pool.context_fallbacks if too_long else pool.fallbacks
            trip.models = iter(fallbacks.get(request.model, ()))
        for model in trip.models:
            try:
                trip.candidates = pool.candidates_for(request, model)
            except ProxyError:
                # The fallback is configured, but no controller serves it.
                continue
            request.substitute(model)
            trip.tried.clear()
            return True
        return False

    def _drop_removed(self, trip: Trip) -> None:
        """After a reload, go on with the controllers of the new configuration."""
        if not all(candidate.upstream in self.pool.upstreams for candidate in trip.candidates):
            try:
                trip.keep(self.pool.candidates_for(trip.request, trip.request.model))
            except ProxyError:
                trip.keep([])

    # -- attempts

    async def _ask_controllers(self, trip: Trip) -> Attempt | None:
        """Return the first good attempt for the current model; None when there is none.

        A controller is asked once in a round. A wait in line begins a new round, and the time to wait is bounded.
        """
        request = trip.request
        while True:
            # The first attempt failed, so its hedge is the next one.
            if trip.hedge is not None:
                attempt, task = trip.hedge
                # A plain await would cancel the task when the client leaves, and lose a result that has just come.
                await asyncio.shield(task)
                trip.hedge = None
            else:
                # The pool reduces it by the time that the request waits.
                lease, wait_s = None, request.wait_s
                try:
                    lease = await self.pool.lease(request, trip.candidates, trip.tried) if trip.candidates else None
                except NoRoom as full:
                    if trip.models is None or not trip.is_refused:
                        now, trip.full = self.loop.time(), full
                        full_ones = [item for item in trip.candidates if item.room_at(request.need, now)]
                        trip.merely_full = not all(item.is_out(now) for item in full_ones)
                finally:
                    trip.record.waited_s += wait_s - request.wait_s
                if lease is None:
                    return None
                attempt = Attempt(lease, request.model)
                await self._attempt(attempt, trip)
            if attempt.verdict is OK:
                return attempt
            self._settle(attempt, trip)
            trip.note(attempt)
            self._drop_removed(trip)
            if not trip.hedged and not may_retry(attempt.verdict, request):
                # It may have run. A 429 from before would make the client send it a second time. But what a fallback
                # says of the request does not replace what was said of the model asked for.
                if trip.models is None or attempt.verdict.outcome is not Outcome.CLIENT:
                    trip.refusals, trip.full = trip.refusals[-1:] if attempt.head is not None else [], None
                return None

    async def _attempt(self, attempt: Attempt, trip: Trip) -> None:
        """Send the request to one controller and set the attempt's verdict. Settle it when the client leaves."""
        try:
            await self._exchange(attempt, trip)
        except Hedged:
            attempt.verdict = Verdict(Outcome.LOST)
        except Untranslatable as error:
            trip.unfit, attempt.verdict = error, Verdict(Outcome.UNFIT)
        except UpstreamError as error:
            attempt.verdict, attempt.head = judge_failure(error), None
            error.args = (f"controller {attempt.lease.upstream.name!r}: {error}",)
            trip.failure = error if trip.models is None or not trip.is_refused else trip.failure
        except BaseException:
            # The client left, another controller answered first, or there is a mistake in this program.
            self._settle(attempt, trip)
            raise
        finally:
            attempt.lease.stuck = None
            # The upstream has to notice at once that its answer is not wanted.
            if attempt.verdict is not OK and attempt.exchange is not None:
                attempt.exchange.abort()

    async def _exchange(self, attempt: Attempt, trip: Trip) -> None:
        """Send the request, and read as much of the reply as decides. Raise UpstreamError, Untranslatable, Hedged."""
        request, lease, others = trip.request, attempt.lease, trip.has_others()
        # The usage of a stream comes on demand only. Where a limit counts it, this server asks in the client's place.
        counts = self.counts_tokens or request.on_usage is not None
        counts = counts or any(window.by_tokens for window in (*lease.ledger.minutes, *lease.ledger.days))
        asks = counts and request.stream and request.path in (CHAT_PATH, "/completions")
        # An earlier attempt may have set it.
        request.add_usage = False
        attempt.adds_usage = asks and lease.upstream.controller.reports_usage and not wants_usage(request)
        request.add_usage, request.refused = attempt.adds_usage, lease.candidate.refused
        exchange = lease.upstream.controller.exchange(request, self.connections, lease.sent, lease.is_probe)
        attempt.exchange = exchange
        if others:
            lease.stuck = partial(self._hedge, trip, attempt)
        await exchange.start()
        attempt.head, attempt.at = exchange.head, self.loop.time()
        attempt.readable = not is_compressed(exchange.head)
        requests, tokens = read_allowances(exchange.head.index, time.time)
        if requests is not None or tokens is not None:
            lease.learn(requests, tokens, attempt.at)
            attempt.tokens_known = tokens is not None
        kind = exchange.head.index.get(b"content-type", b"").lower()
        # Some servers name no type, or text/plain, for a stream. Collected as a whole it would arrive late.
        untyped = request.stream and request.path == CHAT_PATH and not (b"json" in kind or b"html" in kind)
        attempt.stream = exchange.head.status < 300 and (untyped or kind.startswith(b"text/event-stream"))
        if attempt.stream:
            attempt.verdict = await self._hold(attempt, exchange, request, others)
        else:
            # A long answer takes long, so from its head on the controller is not silent.
            lease.heard(attempt.at)
            # Speech is played while it is made, so it is passed on from its first byte.
            limit = 0 if kind.startswith(b"audio/") and exchange.head.status < 300 else WHOLE_BYTES
            held = bytearray()
            while len(held) <= limit and not attempt.whole:
                piece = await exchange.read()
                held += piece
                attempt.whole = not piece
            attempt.held = bytes(held)
            attempt.verdict = self._judge_whole(attempt, exchange, request)
            is_refused = attempt.adds_usage and attempt.verdict is not OK and bool(_USAGE_OPTION.search(attempt.held))
            named = set(_LEFT_OUT.findall(attempt.verdict.message)) if attempt.verdict.of_kind else set()
            if is_refused or named - lease.candidate.refused:
                # The client did not ask for any of these. The account does not get them any more.
                lease.upstream.controller.reports_usage &= not is_refused
                lease.candidate.refused |= named
                attempt.whole = False
                await self._exchange(attempt, trip)
                return
        if attempt.verdict is not OK:
            self.pool.answered(lease, False, self.loop.time())

    async def _hold(self, attempt: Attempt, exchange: Exchange, request: ApiRequest, others: bool) -> Verdict:
        """Read a stream up to its first real event, if there is another controller to ask; return the verdict.

        Upstreams that are about to fail often say 200 first: Azure sends a chunk with empty choices, OpenRouter and
        DeepSeek send comments while the request waits, the Responses API three events before the first word. Raise
        UpstreamTimeout when signs of life are all that comes within `first_byte`.
        """
        others = others and attempt.readable
        # Where the client must not see an account's trouble with its key, the first event is judged in any case.
        judges = others or (attempt.readable and not self.shows_account)
        splitter, begun = EventSplitter(), False
        try:
            async with asyncio.timeout_at(attempt.at + exchange.first_byte_s) as held:
                while True:
                    piece = await exchange.read()
                    attempt.lease.heard(self.loop.time())
                    attempt.held = attempt.held + piece if attempt.held else piece
                    for event in splitter.feed(piece or b"\n\n") if judges else ():
                        kind = judge_event(event)
                        if kind in (EventKind.REAL, EventKind.ERROR):
                            return OK if kind is EventKind.REAL else self._refused_in_200(attempt, event)
                        if not begun and (kind is EventKind.PREFACE or not others):
                            begun = True
                            held.reschedule(self.loop.time() + HOLD_S)
                    if not piece:
                        attempt.whole = True
                        # This is no stream, whatever its type says.
                        if attempt.held.lstrip()[:1] == b"{":
                            attempt.stream = False
                            return self._judge_whole(attempt, exchange, request)
                        if others or not attempt.held:
                            raise UpstreamClosed("the upstream ended its stream before the first event")
                        return OK
                    if not judges or (begun and not others) or len(attempt.held) > HOLD_BYTES:
                        return OK
        except TimeoutError:
            if begun or not others:
                return OK
            message = f"no event within {exchange.first_byte_s:g} s, only signs of life"
            raise UpstreamTimeout(message, before_reply=True) from None
        finally:
            attempt.at = self.loop.time()

    def _judge_whole(self, attempt: Attempt, exchange: Exchange, request: ApiRequest) -> Verdict:
        """Return the verdict on a reply that is no stream."""
        head, rate_codes = exchange.head, attempt.lease.upstream.controller.rate_codes
        if head.status < 300:
            is_known = attempt.whole and attempt.readable
            verdict = judge_answer(attempt.held, head.index, request, rate_codes) if is_known else OK
            if verdict is not OK:
                exchange.finish()
                attempt.head = ResponseHead(verdict.status, 1, head.index, JSON_TYPE)
            return verdict
        if attempt.whole:
            exchange.finish()
        attempt.held = attempt.held if attempt.readable else b""
        return judge_reply(head.status, head.index, attempt.held, request, rate_codes, time.time())

    def _refused_in_200(self, attempt: Attempt, event: bytes) -> Verdict:
        """Return the verdict of an error event in an answer's place; the attempt gets the status that fits it."""
        assert attempt.head is not None
        verdict = judge_error_event(event, attempt.head.index, attempt.lease.upstream.controller.rate_codes)
        attempt.held = event_fields(event)[1]
        attempt.head = ResponseHead(verdict.status, 1, attempt.head.index, JSON_TYPE)
        return verdict

    def _settle(self, attempt: Attempt, trip: Trip, word: str = "") -> None:
        """End an attempt: the pool learns its verdict, and the access record gets it as `word` or by its outcome."""
        verdict, lease = attempt.verdict, attempt.lease
        ended_at = attempt.at if verdict is OK else self.loop.time()
        word = word or ("stopped" if self.stopping and verdict is ABANDONED else verdict.outcome.value)
        status, sent = attempt.head.status if attempt.head else 0, lease.candidate.mapped or attempt.model
        # What an account says of the request may quote the prompt, which is never logged.
        reason = "" if verdict.outcome is Outcome.CLIENT else redactor.clean(verdict.message[:REASON_CHARS])
        trip.record.attempts.append(
            AttemptRecord(lease.upstream.name, word, ended_at - lease.since, sent[:MODEL_NAME_CHARS], status, reason)
        )
        trip.request.was_sent |= lease.sent_at > 0
        trip.record.limited |= trip.request.met_limit or verdict.outcome is Outcome.RATE or trip.record.waited_s > 0
        self.pool.settle(lease, verdict)

    # -- hedges

    def _hedge(self, trip: Trip, silent: Attempt) -> bool:
        """Ask a second controller that has room now; return whether there is one. The first real answer wins."""
        if trip.hedge is not None or any(not may_retry(refusal.verdict, trip.request) for refusal in trip.refusals):
            return False
        self._drop_removed(trip)
        lease = self.pool.lease_at_once(trip.request, trip.candidates, trip.tried | {silent.lease.upstream})
        if lease is None:
            return False
        names = (trip.request.request_id, silent.lease.upstream.name, lease.upstream.name)
        log.warning("%s: no answer from account %s yet, asking %s too", *names)
        attempt = Attempt(lease, trip.request.model)
        task = self.loop.create_task(self._attempt(attempt, trip))
        trip.hedge = (attempt, task)
        task.add_done_callback(partial(self._end_hedge, trip, attempt, silent))
        return True

    def _end_hedge(self, trip: Trip, attempt: Attempt, silent: Attempt, task: asyncio.Task[None]) -> None:
        """Stop the first attempt if its hedge brought an answer. If the hedge failed, only its controller learns it."""
        if task.cancelled() or trip.hedge is None or silent.verdict is not ABANDONED:
            # The hedge was given up, or the first attempt has failed and `_ask_controllers` waits for this one.
            return
        # `_attempt` has settled it.
        if task.exception() is not None:
            trip.hedge = None
            log.error("%s: internal error in a hedge", trip.request.request_id, exc_info=task.exception())
        elif attempt.verdict is OK:
            assert silent.exchange is not None
            silent.exchange.interrupt(Hedged())
        else:
            trip.hedge = None
            self._settle(attempt, trip)
            trip.note(attempt)

    def _drop_hedge(self, trip: Trip) -> None:
        """Give up the hedge, if there is one: the first attempt has answered, or the client left."""
        if trip.hedge is None:
            return
        (attempt, task), trip.hedge = trip.hedge, None
        attempt.verdict = Verdict(Outcome.LOST)
        if not task.done():
            task.cancel()  # it settles itself
            return
        if attempt.exchange is not None:
            attempt.exchange.abort()
        self._settle(attempt, trip)

    # -- the answer

    async def _commit(self, attempt: Attempt, trip: Trip) -> Answer:
        """Return the answer that a good attempt brings. No other attempt can follow."""
        record, request, lease = trip.record, trip.request, attempt.lease
        assert attempt.head is not None and attempt.exchange is not None
        record.first_at, record.stream = attempt.at, attempt.stream
        trip.name(attempt)
        self.pool.answered(lease, True, attempt.at)
        if attempt.whole and not attempt.stream:
            attempt.exchange.finish()
            if makes_objects(request):
                self.remember(attempt.held, lease.upstream.name)
            meter, usage = self._meter(attempt, request), read_usage(attempt.held)
            if meter is not None and usage is None:
                meter.feed(attempt.held)
            self._take_usage(attempt, trip, usage, meter)
            self._settle(attempt, trip)
            return Answer(attempt.head.status, self._lines(attempt, trip), attempt.held, len(attempt.held))
        size = None if attempt.stream else attempt.head.index.get(b"content-length")
        rest = self._rest(attempt, attempt.exchange, trip)
        # The generator runs from here on, so closing it ends the attempt.
        held = await rest.__anext__()
        # The headers count this attempt, too. `_rest` settles it later.
        record.attempts.append(AttemptRecord(lease.upstream.name, "ok", 0.0))
        lines = self._lines(attempt, trip)
        record.attempts.pop()
        return Answer(attempt.head.status, lines, held, content_length(size) if size else None, rest)

    async def _rest(self, attempt: Attempt, exchange: Exchange, trip: Trip) -> AsyncGenerator[bytes, None]:
        """Yield what was held, then the rest of an answer as it comes. Settle the attempt at the end, or when closed.

        Raise AnswerCut when the upstream breaks off, when its stream ends without its end, or when this server stops.
        """
        request, stream, word = trip.request, attempt.stream, ""
        readable = stream and attempt.readable
        has_end = readable and request.path in ENDED_STREAMS
        end, meter = StreamEnd(ENDED_STREAMS.get(request.path, False)), self._meter(attempt, request)
        splitter = EventSplitter() if attempt.adds_usage and readable else None
        remembers = makes_objects(request)
        data, attempt.verdict, attempt.held = attempt.held, ABANDONED, b""
        # The prompt is not needed any more, and may have megabytes.
        request.body, request.data = b"", {}
        try:
            while True:
                if remembers:
                    # A name may come in two pieces.
                    self.remember(end.tail[-256:] + data, attempt.lease.upstream.name)
                end.feed(data)
                if meter is not None:
                    meter.feed(data)
                if splitter is not None:
                    events = [event for event in splitter.feed(data) if not is_usage_event(event)]
                    data = b"".join(events) + (splitter.pending if attempt.whole else b"")
                yield redactor.scrub(data) if stream and data.find(b'"error"') >= 0 else data
                if attempt.whole:
                    break
                data = await exchange.read()
                attempt.whole = not data
            # Some upstreams report a failure with status 200 and in their last event only (vLLM, OpenRouter).
            tells = readable and (b"error" in end.tail or b"failed" in end.tail)
            events = _EVENT_END.split(end.tail) if tells else []
            late = [event for event in events if judge_event(event) is EventKind.ERROR]
            if late:
                word, attempt.verdict = "error", judge_late_event(late[0], attempt.lease.upstream.controller.rate_codes)
            elif has_end and not end.is_whole():
                raise UpstreamClosed("the upstream ended its stream before the last event")
            else:
                attempt.verdict = OK
            exchange.finish()
        except (UpstreamError, asyncio.CancelledError) as error:
            if isinstance(error, UpstreamError):
                attempt.verdict, word = Verdict(Outcome.CUT, 0, str(error)), "cut"
                name = attempt.lease.upstream.name
                log.warning("%s: answer of account %s cut: %s", request.request_id, name, error)
                event = error_event(f"The answer of controller {name!r} was cut: {error}.", error.code)
            elif self.stopping:
                event = error_event("This server is shutting down.", "server_shutdown")
            else:
                raise
            # go-openai adds what stands before an error to its line, and then cannot parse it.
            begun = not end.tail.endswith((b"\n\n", b"\r\r", b"\n\r\n"))
            raise AnswerCut((b"\n\n" if begun else b"") + event if readable else b"") from error
        finally:
            exchange.abort()
            if attempt.verdict is ABANDONED and has_end and end.is_whole():
                # The SDKs leave after the last event; then the answer is whole.
                attempt.verdict = OK
            usage = (read_usage(end.tail) if readable else None) if meter is None else meter.usage
            self._take_usage(attempt, trip, usage, meter)
            self._settle(attempt, trip, word)

    def _meter(self, attempt: Attempt, request: ApiRequest) -> UsageMeter | None:
        """Return what counts the tokens of an answer; None where nothing needs it."""
        counts = self.counts_tokens or request.on_usage is not None or attempt.lease.ledger.limited
        return UsageMeter(request) if counts else None

    def _take_usage(self, attempt: Attempt, trip: Trip, usage: Usage | None, meter: UsageMeter | None) -> None:
        """Note what an answer used, and settle it where a limit counts tokens."""
        request, trip.record.usage = trip.request, usage
        if meter is None:
            return
        # Without usage, four characters count as a token.
        total = usage.total if usage else request.prompt_tokens + meter.text // 4
        if usage is None and self.counts_tokens and request.inference:
            trip.record.usage = Usage(total, request.prompt_tokens, total - request.prompt_tokens, 0)
        if usage and attempt.lease.upstream.controller.cache_free:
            total -= usage.cached
        self.pool.used(attempt.lease, request.model, total, usage.answer if usage else 0, attempt.tokens_known)
        if request.on_usage is not None:
            request.on_usage(total)

    def _lines(self, attempt: Attempt, trip: Trip, retry: bytes = b"") -> bytes:
        """Return the header lines of an upstream's answer: those that may pass, then those of this server."""
        head, record = attempt.head, trip.record
        assert head is not None
        lines = head.lines
        record.upstream_id = head.index.get(b"x-request-id", b"").decode("latin-1")[:REASON_CHARS]
        # The upstream's retry headers say nothing about the pool.
        if retry or record.waited_s or len(record.attempts) > 1:
            lines = without(lines, RETRY_FIELDS)
        if b"x-request-id" not in head.index:
            lines += b"x-request-id: %b\r\n" % record.request_id.encode()
        return redactor.scrub(lines) + routing_headers(record) + retry

    def _refusal(self, trip: Trip) -> Answer:
        """Return the refusal that is most useful to the client. Raise ProxyError or UpstreamError if there is none.

        SDKs obey Retry-After and x-should-retry, so both are about the whole pool. An upstream's own values would keep
        a client away from accounts that work.
        """
        record, request = trip.record, trip.request
        # What was said of the model asked for hides what a fallback said. The last of equals is the truest.
        own = [refusal for refusal in trip.refusals if refusal.model == trip.asked]
        trip.refusals = own if own or trip.full or trip.failure else trip.refusals
        best = max(trip.refusals[::-1], key=lambda item: usefulness(item.verdict), default=None)
        limited = best is not None and best.verdict.outcome is Outcome.RATE
        if trip.merely_full and best is not None and usefulness(best.verdict) < usefulness(RATE_LIMITED):
            # A full account will have room again, so the client should come back. The troubles of others do not matter.
            best = None
        elif trip.full is None and limited and request.model == trip.asked:
            # That 429 was waited out. What came then is the answer: the last refusal, or an error without a reply.
            best = trip.refusals[-1] if trip.verdict is trip.refusals[-1].verdict else None
        outcome = Outcome.RATE if best is None else best.verdict.outcome
        retried = len(record.attempts) > 1 or record.waited_s > 0
        retry = b""
        if trip.full is not None and outcome in (Outcome.RATE, Outcome.QUOTA):
            retry = retry_fields(trip.full.after_s)
        elif outcome is Outcome.RATE and retried:
            candidates = trip.candidates
            retry = retry_fields(self.pool.reopens_after(candidates, request.need) if candidates else NEVER)
        elif outcome in LASTING and (retried or outcome is Outcome.LARGE):
            retry = NO_RETRY
        if best is not None:
            return self._show(best, trip, retry)
        if trip.full is not None and (trip.merely_full or trip.failure is None):
            model = (request.asked or request.model)[:64]
            message = f"Rate limit reached on every controller that serves {model}: {trip.full.why}."
            if not trip.merely_full:
                message = f"Every controller that serves {model} is out of service or of credit; see /status?verbose=1."
                if not self.shows_account:
                    raise ProxyError(502, message, "upstream_account_refused", headers=NO_RETRY)
            raise ProxyError(429, message, "rate_limit_exceeded", headers=retry)
        raise trip.failure or trip.unfit or ProxyError(503, "No controller could be asked.", "no_controller")

    def _show(self, attempt: Attempt, trip: Trip, retry: bytes) -> Answer:
        """Return an upstream's refusal as the answer, without secrets that it may repeat. Raise ProxyError."""
        assert attempt.head is not None
        status, outcome = attempt.head.status, attempt.verdict.outcome
        trip.name(attempt)
        name = trip.record.controller
        trip.record.first_at = self.loop.time()
        # A client that follows its Location would send a key there.
        if 300 <= status < 400:
            message = f"The upstream of {name!r} redirects; correct its base_url."
            raise ProxyError(502, message, "upstream_redirects", headers=NO_RETRY)
        if outcome in ACCOUNT_REFUSALS and not self.shows_account:
            message = f"The account of controller {name!r} refused this server: {ACCOUNT_REFUSALS[outcome]}."
            raise ProxyError(502, message, "upstream_account_refused", headers=NO_RETRY)
        body, lines = redactor.scrub(attempt.held), self._lines(attempt, trip, retry)
        if (outcome is Outcome.AUTH and status == 401) or not is_error_object(body):
            message, code = redactor.clean(attempt.verdict.message), None
            if outcome is Outcome.AUTH:
                # The upstream's text shows parts of this server's key, and blames the client.
                message, code = (
                    f"The upstream refused this server's key for the controller {name!r}.",
                    "invalid_api_key",
                )
            message = message or plain_text(body) or f"The upstream sent status {status} without a reason."
            kind = "invalid_request_error"
            if status >= 500:
                kind, message = "server_error", f"controller {name!r}: {message}"
            body = compact_json(error_object(message, kind, code))
            lines = without(lines, (b"content-encoding", b"content-type")) + JSON_TYPE
        return Answer(status, lines, body, len(body))


# ==== 14. Metrics and usage ====
# What an operator counts. Every ended request is added once, to plain numbers in memory; the rest is read when a scrape
# asks for it. Labels come from the configuration and from the lists of models, never from a client's text.

METRIC_PREFIX = "chatgpt_apiserver_"
# Upper bounds in seconds: from a cached embedding to a long answer of a thinking model.
SECONDS_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
OTHER_MODEL = "other"  # the label of models that no configuration and no list names
METRICS_TYPE = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
# Name, type, labels, help. Those of the process have the names that Prometheus' own client libraries give them.
METRICS_TEXT = """
requests_total counter controller,model,status,outcome Requests that ended; the outcome is the last attempt's, or none.
attempts_total counter controller,outcome Requests to controllers, several for one request of a client.
first_byte_seconds histogram controller Time until an answer began.
request_seconds histogram controller Time until an answer ended.
wait_seconds_total counter - Time that requests stood in line.
tokens_total counter controller,model,kind Tokens by the usage of answers: input, cached (a part of input), output.
rate_limits_seen_total counter controller 429 answers of controllers.
rate_limits_avoided_total counter - Requests that met an account without room, and were answered.
answer_bytes_total counter - Bytes of the bodies of answers.
waiting_requests gauge - Requests in line now.
in_flight_requests gauge controller Requests under way at a controller.
controller_state gauge controller,state 1 for the state that the controller has: ok, limited or out.
headroom_requests gauge controller,model Requests that the limits allow now.
headroom_tokens gauge controller,model Tokens that the limits allow now.
client_connections gauge - Open connections of clients.
upstream_connections gauge state Open connections to controllers: active or idle.
build_info gauge version,python Always 1.
process_cpu_seconds_total counter - CPU time of this process.
process_start_time_seconds gauge - Unix time of the start.
process_resident_memory_bytes gauge - Memory in use; only where the system has /proc.
process_open_fds gauge - Open files; only where the system has /proc.
process_max_fds gauge - Open files that are allowed.
"""
METRICS = {
    name if name.startswith("process_") else METRIC_PREFIX + name: (kind, labels.replace(",", " ").strip("-"), about)
    for name, kind, labels, about in (line.split(" ", 3) for line in METRICS_TEXT.strip().splitlines())
}
Labels = tuple[str, ...]


def show_labels(names: str, values: Labels) -> str:
    """Return the labels of a sample, in braces; "" if it has none."""
    escaped = [re.sub(r'[\\"]', r"\\\g<0>", value).replace("\n", "\\n") for value in values]
    pairs = [f'{name}="{value}"' for name, value in zip(names.split(), escaped, strict=True)]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def process_figures(started_at: float) -> dict[str, dict[Labels, float]]:
    """Return the figures of this process; without /proc those that the system tells."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "process_cpu_seconds_total": used.ru_utime + used.ru_stime,
        "process_start_time_seconds": started_at,
        "process_max_fds": float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    }
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            figures["process_resident_memory_bytes"] = float(file.read().split()[1]) * resource.getpagesize()
        figures["process_open_fds"] = float(len(os.listdir("/proc/self/fd")))
    except OSError:
        # The system has no /proc.
        pass
    return {name: {(): value} for name, value in figures.items()}


class MetricRow:
    """What was counted of requests with the same labels."""

    __slots__ = ("bytes", "first_byte", "limited", "requests", "seconds", "tokens", "waited_s")

    def __init__(self) -> None:
        self.requests = self.limited = self.bytes = 0
        self.waited_s, self.tokens = 0.0, [0, 0, 0]
        # Counts by bound, the last without one, and the sum.
        self.first_byte, self.seconds = ([0.0] * (len(SECONDS_BOUNDS) + 2) for _ in range(2))


def observe(histogram: list[float], seconds: float) -> None:
    """Add an observation to a histogram."""
    histogram[bisect.bisect_left(SECONDS_BOUNDS, seconds)] += 1
    histogram[-1] += seconds


class Metrics:
    """Counts ended requests, and renders all metrics for Prometheus (text format 0.0.4)."""

    def __init__(self) -> None:
        self.started_at = time.time()
        # By controller, model, status and outcome.
        self.rows: dict[Labels, MetricRow] = {}
        self.attempts: Counter[Labels] = Counter()

    def count(self, record: AccessRecord, known: Collection[str]) -> None:
        """Count an ended request. `known`: the models that may be labels."""
        model = record.model if record.model in known else OTHER_MODEL if record.model else ""
        last = record.attempts[-1].outcome if record.attempts else "none"
        labels = (record.controller, model, str(record.status), last)
        row = self.rows.get(labels)
        if row is None:
            row = self.rows[labels] = MetricRow()
        row.requests += 1
        row.bytes += record.bytes
        row.waited_s += record.waited_s
        row.limited += record.limited
        for attempt in record.attempts:
            self.attempts[attempt.controller, attempt.outcome] += 1
        if record.usage is not None:
            row.tokens[0] += record.usage.prompt
            row.tokens[1] += record.usage.answer
            row.tokens[2] += record.usage.cached
        if record.controller and record.status < 400:
            observe(row.first_byte, record.first_at - record.since)
            observe(row.seconds, record.until - record.since)

    def _counters(self) -> dict[str, dict[Labels, float]]:
        """Return the counters by name and labels."""
        sums: dict[str, Counter[Labels]] = defaultdict(Counter)
        for (controller, model, status, outcome), row in self.rows.items():
            sums["requests_total"][controller, model, status, outcome] += row.requests
            sums["answer_bytes_total"][()] += row.bytes
            sums["wait_seconds_total"][()] += row.waited_s  # type: ignore[assignment]
            sums["rate_limits_avoided_total"][()] += row.limited if int(status) < 400 else 0
            for kind, tokens in zip(("input", "output", "cached"), row.tokens, strict=True):
                if tokens:
                    sums["tokens_total"][controller, model, kind] += tokens
        for (controller, outcome), count in self.attempts.items():
            sums["attempts_total"][controller, outcome] += count
            if outcome == Outcome.RATE.value:
                sums["rate_limits_seen_total"][controller,] += count
        return {name: dict(counter) for name, counter in sums.items()}

    def _histograms(self) -> dict[str, dict[Labels, list[float]]]:
        """Return the histograms by name and labels."""
        sums: dict[str, dict[Labels, list[float]]] = {"first_byte_seconds": {}, "request_seconds": {}}
        for (controller, *_), row in self.rows.items():
            for name, more in (("first_byte_seconds", row.first_byte), ("request_seconds", row.seconds)):
                if any(more):
                    known = sums[name].get((controller,), [0.0] * len(more))
                    sums[name][controller,] = [old + new for old, new in zip(known, more, strict=True)]
        return sums

    def render(self, pool: UpstreamPool, links: ConnectionPool, clients: int) -> str:
        """Return all metrics as text."""
        lines: list[str] = []
        values_of = {**self._counters(), **self._gauges(pool, links, clients)}
        histograms = self._histograms()
        for full, (kind, labels, about) in METRICS.items():
            name = full.removeprefix(METRIC_PREFIX)
            samples = values_of.get(name, {})
            lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
            for values, counts in histograms.get(name, {}).items():
                for bound, total in zip((*SECONDS_BOUNDS, "+Inf"), itertools.accumulate(counts[:-1]), strict=True):
                    lines.append(f"{full}_bucket{show_labels(labels + ' le', (*values, str(bound)))} {total:.15g}")
                lines.append(f"{full}_sum{show_labels(labels, values)} {counts[-1]:.6f}")
                lines.append(f"{full}_count{show_labels(labels, values)} {sum(counts[:-1]):.15g}")
            if not labels and kind == "counter":
                samples = samples or {(): 0}
            lines += [f"{full}{show_labels(labels, values)} {value:.15g}" for values, value in samples.items()]
        return "\n".join(lines) + "\n"

    def _gauges(self, pool: UpstreamPool, links: ConnectionPool, clients: int) -> dict[str, dict[Labels, float]]:
        """Return what is read at the moment of a scrape."""
        now, known = pool.timers.time(), pool.known_models
        states = {upstream.name: describe_upstream(upstream, now)["state"] for upstream in pool.upstreams}
        gauges: dict[str, dict[Labels, float]] = {
            "waiting_requests": {(): pool.waiting},
            "in_flight_requests": {(upstream.name,): upstream.in_flight for upstream in pool.upstreams},
            "controller_state": {
                (name, state): float(state == current)
                for name, current in states.items()
                for state in ("ok", "limited", "out")
            },
            "client_connections": {(): clients},
            "upstream_connections": {("active",): len(links.active), ("idle",): links.idle_count},
            "build_info": {(__version__, sys.version.split()[0]): 1},
        }
        for name, by_tokens in (("headroom_requests", False), ("headroom_tokens", True)):
            gauges[name] = {
                (upstream.name, model): left
                for upstream in pool.upstreams
                for model, ledger in upstream.quota.ledgers.items()
                for left in [ledger.left_at(by_tokens, now)]
                if model in known and left is not None
            }
        return {**gauges, **process_figures(self.started_at)}


# -- the last minutes, for the page

HISTORY_REQUESTS = 50  # the last requests, with their attempts
HISTORY_BUCKETS, BUCKET_S = 60, 10.0  # ten minutes
HISTORY_TIMES = 500  # times to the first byte


def describe_request(record: AccessRecord, at: float) -> dict[str, Any]:
    """Return an ended request for the page."""
    names = "model controller key status code".split()
    return {
        "id": record.request_id,
        "at": round(at, 3),
        **{name: getattr(record, name) for name in names},
        "ms": round(record.ms(record.until), 1),
        "first_ms": round(record.ms(record.first_at), 1),
        "wait_ms": round(record.waited_s * 1e3),
        "tokens": record.usage.total if record.usage else None,
        "attempts": [{**one._asdict(), "seconds": round(one.seconds, 4)} for one in record.attempts],
    }


class History:
    """The last requests, and counts of the last ten minutes in buckets of ten seconds."""

    def __init__(self) -> None:
        self.recent: deque[tuple[float, AccessRecord]] = deque(maxlen=HISTORY_REQUESTS)
        self.first_byte_s: deque[tuple[float, float]] = deque(maxlen=HISTORY_TIMES)
        # Number of a bucket -> what was counted, by name.
        self.buckets: deque[tuple[int, Counter[str]]] = deque(maxlen=HISTORY_BUCKETS)

    def add(self, record: AccessRecord, at: float) -> None:
        """Take a request that ended at the Unix time `at`."""
        number = int(at // BUCKET_S)
        if not self.buckets or self.buckets[-1][0] != number:
            self.buckets.append((number, Counter()))
        # A client's own mistake is no failure of the server.
        counts, failed = self.buckets[-1][1], record.status >= 500 or record.status == 429
        counts["requests"] += 1
        counts["failed"] += failed
        counts["tokens"] += record.usage.total if record.usage else 0
        for attempt in record.attempts:
            counts[("ok:" if attempt.outcome == "ok" else "no:") + attempt.controller] += 1
        counts["avoided"] += record.limited and not failed
        if record.first_at and not failed:
            self.first_byte_s.append((at, record.first_at - record.since))
        self.recent.append((at, record))

    def describe(self, names: Sequence[str], at: float) -> dict[str, Any]:
        """Return the history for `/status?verbose=1&history=1`; `names` are those of the controllers."""
        last, counted = int(at // BUCKET_S), dict(self.buckets)
        buckets = [counted.get(number, Counter[str]()) for number in range(last - HISTORY_BUCKETS + 1, last + 1)]
        times = sorted(seconds for when, seconds in self.first_byte_s if when > at - HISTORY_BUCKETS * BUCKET_S)
        ms = {f"p{share}": round(times[len(times) * share // 100] * 1e3, 1) if times else None for share in (50, 95)}
        return {
            "bucket_s": BUCKET_S,
            **{name: [bucket[name] for bucket in buckets] for name in ("requests", "failed", "tokens", "avoided")},
            "controllers": {
                name: {
                    "answered": [one["ok:" + name] for one in buckets],
                    "failed": [one["no:" + name] for one in buckets],
                }
                for name in names
            },
            "first_byte_ms": ms,
            "recent": [describe_request(record, when) for when, record in reversed(self.recent)],
        }


# -- usage and cost

USAGE_DAYS = 400  # the file keeps so many days: a year, and the month that it is compared with
USAGE_ROWS = 10_000  # in memory; models beyond them count as OTHER_MODEL
UsageRow = tuple[str, str, str, str]
USAGE_COLUMNS = ("day", "key", "controller", "model")  # of a UsageRow; days are in UTC
USAGE_SUMS = ("requests", "input", "cached", "output", "cost")


def day_of(at: float) -> str:
    """Return the day in UTC of a Unix time, as 2026-12-01."""
    return dt.datetime.fromtimestamp(at, dt.UTC).date().isoformat()


class UsageBook:
    """The requests, tokens and cost of answers since the start, by day, client key, controller and model."""

    def __init__(self) -> None:
        self.prices: list[tuple[re.Pattern[str], Price]] = []
        self.known_prices: dict[str, Price] = {}
        self.day_number, self.day = 0, ""
        self.rows: dict[UsageRow, list[float]] = {}
        # The rows that have changed since they were stored, and what was stored of them.
        self.changed: dict[UsageRow, None] = {}
        self.stored: dict[UsageRow, list[float]] = {}
        # Tokens and cost by client key and by day or month, for budgets.
        self.spent: dict[tuple[str, str], list[float]] = {}

    def configure(self, prices: Sequence[tuple[str, Price]]) -> None:
        """Use these prices from now on."""
        self.prices, self.known_prices = [(model_patterns([name]), price) for name, price in prices], {}

    def price_of(self, model: str) -> Price:
        """Return the price of a model; 0 where none is configured."""
        return next((price for pattern, price in self.prices if pattern.fullmatch(model)), Price())

    def count(self, record: AccessRecord, at: float) -> None:
        """Count a request that ended at the Unix time `at`, if a controller answered it."""
        usage = record.usage
        if not record.attempts or (usage is None and record.status >= 400):
            return
        if int(at // 86400.0) != self.day_number:
            self.day_number, self.day = int(at // 86400.0), day_of(at)
        model = record.attempts[-1].model
        row = (self.day, record.key, record.controller, model)
        if row not in self.rows and len(self.rows) >= USAGE_ROWS:
            row = (*row[:3], OTHER_MODEL)
            if row not in self.rows:
                # The oldest row, which is stored by now.
                oldest = next(iter(self.rows))
                del self.rows[oldest]
                self.stored.pop(oldest, None)
                self.changed.pop(oldest, None)
        sums = self.rows.setdefault(row, [0, 0, 0, 0, 0.0])
        sums[0] += 1
        if usage is not None:
            sums[1] += usage.prompt
            sums[2] += usage.cached
            sums[3] += usage.answer
            cost = recall(self.known_prices, model, self.price_of).cost(usage) if self.prices else 0.0
            sums[4] += cost
            if record.key:
                self.spend(record.key, self.day, usage.prompt + usage.answer, cost)
        self.changed[row] = None

    def spend(self, key: str, day: str, tokens: float, cost: float) -> None:
        """Count what a client key used on a day."""
        for period in (day, day[:7]):
            spent = self.spent.get((key, period))
            if spent is None:
                # Only the current day and month are asked for.
                self.spent = {place: sums for place, sums in self.spent.items() if day.startswith(place[1])}
                spent = self.spent[key, period] = [0.0, 0.0]
            spent[0] += tokens
            spent[1] += cost

    def check_budget(self, key: ClientKey, at: float) -> None:
        """Raise ProxyError (429) if a client key has used up its budget at the Unix time `at`."""
        day = dt.datetime.fromtimestamp(at, dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        month_ends = (day.replace(day=1) + dt.timedelta(days=32)).replace(day=1)
        periods = (("day", f"{day:%Y-%m-%d}", day + dt.timedelta(days=1)), ("month", f"{day:%Y-%m}", month_ends))
        for period, name, ends in periods:
            spent = self.spent.get((key.name, name), (0.0, 0.0))
            for kind, used in zip(("tokens", "cost"), spent, strict=True):
                most = getattr(key.budget, f"{kind}_per_{period}")
                if 0 < most <= used:
                    message = f"The client key {key.name!r} has used up its budget of {most:g} {kind} per {period}."
                    fields = without(retry_fields(ends.timestamp() - at), (b"x-should-retry",))
                    fields += NO_RETRY
                    raise ProxyError(429, message, "insufficient_quota", headers=fields)

    def take_changes(self) -> dict[UsageRow, list[float]]:
        """Return what was counted since the last call."""
        changes = {}
        for row in self.changed:
            known = self.stored.get(row, [0, 0, 0, 0, 0.0])
            # A client's model may have a lone surrogate, which the file cannot hold.
            day, key, controller, model = row
            name = day, key, controller, model.encode("utf-8", "replace").decode()
            changes[name] = [new - old for new, old in zip(self.rows[row], known, strict=True)]
            self.stored[row] = list(self.rows[row])
        self.changed.clear()
        return changes


def group_usage(rows: Iterable[tuple[Any, ...]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the sums of usage rows for each value of `columns`, the largest cost and then the most tokens first.

    A row has the values of USAGE_COLUMNS, then those of USAGE_SUMS.
    """
    groups: dict[tuple[str, ...], list[float]] = {}
    places = [USAGE_COLUMNS.index(column) for column in columns]
    for row in rows:
        sums = groups.setdefault(tuple(row[place] for place in places), [0, 0, 0, 0, 0.0])
        sums[:] = [old + more for old, more in zip(sums, row[len(USAGE_COLUMNS) :], strict=True)]
    ordered = sorted(groups.items(), key=lambda item: (-item[1][4], -item[1][1] - item[1][3], item[0]))
    return [
        {
            **dict(zip(columns, group, strict=True)),
            **dict(zip(USAGE_SUMS, sums, strict=True)),
            "cost": round(sums[4], 6),
        }
        for group, sums in ordered
    ]


def parse_usage_query(since: str, by: str, now: float) -> tuple[str, list[str]]:
    """Return the first day, and the columns, of a question for usage: `7d` or a day; `key,model`. Raise ValueError."""
    days = re.fullmatch(r"(\d{1,4})d", since)
    first = day_of(now - (int(days[1]) - 1) * 86400.0) if days else dt.date.fromisoformat(since).isoformat()
    columns = by.split(",")
    if not set(columns) <= set(USAGE_COLUMNS):
        raise ValueError(f"found {by!r}, allowed: " + ",".join(USAGE_COLUMNS))
    return first, columns


# -- what a restart should not forget

SAVE_S = 1.0  # between two batches: a process that is killed loses so much
SAVE_AGAIN_S = (1.0, 60.0)  # backoff after a batch that could not be written
STATE_LOCK_S = 5.0  # how long a batch waits while another process writes
# `at` is a Unix time. Names of `state` are JSON lists such as ["object", "resp_1"].
STATE_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (day TEXT, key TEXT, controller TEXT, model TEXT, requests INTEGER, input INTEGER,
    cached INTEGER, output INTEGER, cost REAL, PRIMARY KEY (day, key, controller, model)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT, at REAL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
ADD_USAGE = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET requests = requests + excluded.requests,
    input = input + excluded.input, cached = cached + excluded.cached, output = output + excluded.output,
    cost = cost + excluded.cost
"""
FORGET_OBJECTS = """
DELETE FROM state WHERE name IN
    (SELECT name FROM state WHERE name LIKE '["object"%' ORDER BY at DESC LIMIT -1 OFFSET ?)
"""


def read_usage_file(path: str, first_day: str) -> list[tuple[Any, ...]]:
    """Return the usage rows of a state_file from a day on; it may be in use. Raise sqlite3.Error."""
    uri = f"file:{urllib.parse.quote(path)}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=STATE_LOCK_S)) as file:
        return list(file.execute("SELECT * FROM usage WHERE day >= ?", (first_day,)))


class StateFile:
    """An SQLite file that a thread writes in batches. A broken or full disk never delays an answer.

    What cannot be written stays in memory, the newest USAGE_ROWS and OBJECTS_KNOWN of it, and is tried again. Several
    processes may use the same file: usage is added, not replaced.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.usage: dict[UsageRow, list[float]] = {}
        self.values: dict[str, str | None] = {}
        self.changed = threading.Condition()
        self.is_closing = self.is_failing = self.is_writing = False
        self.thread = threading.Thread(target=self._run, name="state", daemon=True)

    def save(self, usage: Mapping[UsageRow, Sequence[float]], values: Mapping[str, str | None]) -> None:
        """Queue a batch: usage to add, and values to store by name; None removes one."""
        with self.changed:
            for row, more in usage.items():
                known = self.usage.get(row, [0.0] * len(more))
                self.usage[row] = [old + new for old, new in zip(known, more, strict=True)]
            for name in self.values.keys() & values.keys():
                del self.values[name]
            self.values.update(values)
            while len(self.usage) > USAGE_ROWS:
                del self.usage[next(iter(self.usage))]
            while len(self.values) > OBJECTS_KNOWN:
                del self.values[next(iter(self.values))]
            self.changed.notify()

    def close(self, wait_s: float) -> None:
        """Write what is left, and wait for it for at most `wait_s`."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(wait_s)

    def load(self) -> dict[str, str]:
        """Return the stored values by name, the oldest first; none if the file cannot be read, which is logged."""
        try:
            with contextlib.closing(self._open()) as file:
                return dict(file.execute("SELECT name, value FROM state ORDER BY at"))
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return {}

    def load_spent(self, month: str) -> list[tuple[str, str, float, float]]:
        """Return day, client key, tokens and cost of each day of a month; nothing if the file cannot be read."""
        query = "SELECT day, key, sum(input + output), sum(cost) FROM usage WHERE day LIKE ? GROUP BY day, key"
        try:
            with contextlib.closing(self._open()) as file:
                return list(file.execute(query, (month + "%",)))
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return []

    def read(self, first_day: str) -> list[tuple[Any, ...]]:
        """Return the usage rows from a day on, after what is queued was written. Raise sqlite3.Error, OSError."""
        with self.changed:
            self.changed.wait_for(lambda: not (self.usage or self.is_writing), SAVE_S)
        return read_usage_file(self.path, first_day)

    def _open(self) -> sqlite3.Connection:
        """Return a connection. Raise sqlite3.Error, OSError."""
        # It tells what each client key did.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        file = sqlite3.connect(self.path, timeout=STATE_LOCK_S, isolation_level=None)
        try:
            version = file.execute("PRAGMA user_version").fetchone()[0]
            if version > 1:
                raise sqlite3.DatabaseError(f"it is of a newer version of this program (schema {version})")
            # With WAL a commit needs no sync, and readers do not wait.
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.executescript(STATE_SCHEMA)
        except BaseException:
            file.close()
            raise
        return file

    def _run(self) -> None:
        """Write batches until `close`."""
        wait_s = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.usage or self.values or self.is_closing)
                if wait_s:
                    self.changed.wait_for(lambda: self.is_closing, wait_s)
                usage, self.usage, values, self.values = self.usage, {}, self.values, {}
                self.is_writing = True
            try:
                with contextlib.closing(self._open()) as file:
                    self._write(file, usage, values)
                wait_s = 0.0
                if self.is_failing:
                    self.is_failing = False
                    log.info("state_file %s: written again", self.path)
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
                wait_s = next_backoff(wait_s, SAVE_AGAIN_S)
                # What came since is newer.
                self.save(usage, {name: value for name, value in values.items() if name not in self.values})
                if self.is_closing:
                    return
            with self.changed:
                self.is_writing = False
                self.changed.notify_all()
            if self.is_closing and not (self.usage or self.values):
                return

    def _write(
        self, file: sqlite3.Connection, usage: dict[UsageRow, list[float]], values: dict[str, str | None]
    ) -> None:
        """Write one batch as one transaction. Raise sqlite3.Error."""
        now = time.time()
        file.execute("BEGIN IMMEDIATE")
        file.executemany(ADD_USAGE, [(*row, *sums) for row, sums in usage.items()])
        file.executemany(
            "DELETE FROM state WHERE name = ?", [(name,) for name, value in values.items() if value is None]
        )
        stored = [(name, value, now) for name, value in values.items() if value is not None]
        file.executemany("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", stored)
        file.execute("DELETE FROM usage WHERE day < ?", (day_of(now - USAGE_DAYS * 86400.0),))
        file.execute(FORGET_OBJECTS, (OBJECTS_KNOWN,))
        file.execute("COMMIT")

    def _failed(self, error: Exception) -> None:
        """Log the first of several failures."""
        if not self.is_failing:
            self.is_failing = True
            log.error("state_file %s: cannot be used: %s; counting goes on in memory", self.path, reason_of(error))


def dump_days(kind: str, quota: Quota) -> dict[str, Any]:
    """Return what the current day has used of the daily limits of a quota, by name."""
    return {
        compact_json(["day", kind, quota.name, model, day.by_tokens]).decode(): [day.ends, day.total - day.unsent]
        for model, ledger in list(quota.ledgers.items())
        for day in ledger.days
    }


def dump_pool(
    pool: UpstreamPool, keys: Mapping[str, ClientQuota], wall_s: float, levels: bool
) -> dict[str, str | None]:
    """Return state by name for a restart: accounts that are out, limits that replies told, and what a day has used.

    `wall_s`: the Unix time of the loop's 0. `levels`: also what is left of the limits, which changes all the time.
    """
    now, values = pool.timers.time(), dict[str, Any]()
    gates = {("quota", one.quota.name): one.quota.gate for one in pool.upstreams}
    gates.update({("account", one.name): one.gate for one in pool.upstreams})
    for place, gate in gates.items():
        out = gate.reason in (REFUSED, NO_CREDIT, BUSY) and gate.until > now
        values[compact_json(["out", *place]).decode()] = [gate.reason, round(gate.until + wall_s, 3)] if out else None
    for key_quota in keys.values():
        values.update(dump_days("key", key_quota))
    for quota in {one.quota.name: one.quota for one in pool.upstreams}.values():
        values.update(dump_days("account", quota))
        for model, ledger in list(quota.ledgers.items()):
            told = [[item.limit, item.rate, item.size] if item.limit else None for item in ledger.buckets]
            if any(told):
                level = [[item.level_at(now) for item in ledger.buckets], round(now + wall_s, 3)] if levels else None
                values[compact_json(["limit", quota.name, model]).decode()] = [told, level]
    return {name: None if value is None else compact_json(value).decode() for name, value in values.items()}


def restore_pool(pool: UpstreamPool, keys: Mapping[str, ClientQuota], values: Mapping[str, str], wall_s: float) -> None:
    """Give the pool the state that `dump_pool` returned before. Controllers that are gone are left out."""
    now, quotas = pool.timers.time(), {one.quota.name: one.quota for one in pool.upstreams}
    gates = {("quota", name): quota.gate for name, quota in quotas.items()}
    gates.update({("account", one.name): one.gate for one in pool.upstreams})
    for name, text in values.items():
        kind, *place = json.loads(name)
        value = json.loads(text)
        if kind == "out" and tuple(place) in gates and value[1] > now + wall_s:
            gates[tuple(place)].shut(value[0], now, "so it was before the restart", value[1] - wall_s - now)
        elif kind == "day":
            quota = (keys if place[0] == "key" else quotas).get(place[1])
            for day in quota.ledger(place[2]).days if quota is not None else ():
                if day.by_tokens is place[3]:
                    day.restore(*value)
        elif kind == "limit" and place[0] in quotas and len(quotas[place[0]].ledgers) < USAGE_ROWS:
            told, level = value
            for number, bucket in enumerate(quotas[place[0]].ledger(place[1]).buckets):
                if told[number]:
                    bucket.limit, bucket.rate, bucket.size = told[number]
                    bucket.at = bucket.known_at = now
                    left, at = (level[0][number], level[1]) if level else (bucket.size, now + wall_s)
                    bucket.level = min(bucket.size, left + max(0.0, now + wall_s - at) * bucket.rate)


# ==== 15. Page ====
# What `GET /` shows in a browser: one answer without outside assets. The page holds no data. Its script asks
# `/status?verbose=1&history=1`, and puts all that it gets into text nodes, as models are named by clients.

PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#14171f;--dim:#5b6472;--line:#e3e6ec;--accent:#2f6fed;
--ok:#16815a;--warn:#a86500;--bad:#c62f3b;--soft:#eaf1ff}
@media (prefers-color-scheme:dark){:root{--bg:#0d1017;--card:#161b25;--ink:#e8ecf3;--dim:#98a2b3;--line:#252c39;
--accent:#6da0ff;--ok:#4cc38a;--warn:#e2a33b;--bad:#ff6b74;--soft:#1b2740}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main,header{max-width:1120px;margin:0 auto;padding:0 20px}
header{display:flex;align-items:center;gap:12px;padding-top:28px;padding-bottom:18px;flex-wrap:wrap}
h1{font-size:20px;letter-spacing:-.01em;margin:0;font-weight:650}
h2{font-size:13px;font-weight:600;color:var(--dim);margin:30px 0 10px;letter-spacing:.02em}
#state{margin:0 0 0 auto;font-size:13px}
.dot{display:inline-block;width:8px;height:8px;border-radius:50%;background:currentColor;margin-right:7px;
vertical-align:1px}
.ok{color:var(--ok)}.limited{color:var(--warn)}.out,.bad{color:var(--bad)}.dim{color:var(--dim)}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px}
#now{display:grid;grid-template-columns:repeat(6,1fr);gap:12px;margin:0}
#now .card{padding:14px 16px 10px;min-width:0;overflow:hidden}
dt{color:var(--dim);font-size:12.5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
dd{margin:2px 0 6px;font-size:25px;font-weight:620;letter-spacing:-.02em;white-space:nowrap}
dd small{font-size:14px;font-weight:500;color:var(--dim);letter-spacing:0}
svg{display:block;width:100%;height:28px;overflow:visible}
.area{fill:var(--accent);opacity:.14}.wave{fill:none;stroke:var(--accent);stroke-width:1.6;
vector-effect:non-scaling-stroke;stroke-linejoin:round}.fails{fill:none;stroke:var(--bad);stroke-width:1.4;
vector-effect:non-scaling-stroke}
ul,ol{list-style:none;margin:0;padding:0}
#controllers{display:grid;gap:10px}
#controllers li{display:grid;grid-template-columns:minmax(150px,1.3fr) 1.5fr 1.5fr minmax(140px,1.2fr);gap:8px 22px;
padding:14px 18px;align-items:center}
.name{font-weight:620;font-size:16px;overflow-wrap:anywhere}.why{font-size:13px}
.meter{font-size:12.5px;color:var(--dim);padding-top:3px}.meter b{color:var(--ink);font-weight:600}
.bar{height:7px;border-radius:4px;background:var(--line);margin-top:5px;overflow:hidden}
.bar i{display:block;height:100%;border-radius:4px;background:var(--ok);transition:width .6s ease}
.bar i.low{background:var(--warn)}.bar i.none{background:var(--bad)}
.error{grid-column:1/-1;font-size:12.5px;color:var(--dim);border-top:1px solid var(--line);padding-top:8px;
overflow-wrap:anywhere}
#recent .card,.wrap{border-radius:0;border-width:0 1px 1px}
#recent li:first-child .card{border-radius:14px 14px 0 0;border-top-width:1px}
#recent li:last-child .card{border-radius:0 0 14px 14px}
summary{display:grid;grid-template-columns:76px 64px minmax(90px,1.2fr) minmax(90px,1fr) 1.4fr 92px;gap:14px;
padding:9px 18px;cursor:pointer;font-size:13.5px;align-items:center;list-style:none}
summary::-webkit-details-marker{display:none}
summary>*{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
summary:hover{background:var(--soft)}
.path i{display:inline-block;width:9px;height:9px;border-radius:3px;background:var(--bad);margin-right:3px}
.path i.ok{background:var(--ok)}.path i.rate{background:var(--warn)}
.num{text-align:right}
details ol{padding:2px 18px 12px 94px;font-size:13px}
details li{padding:2px 0;overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-size:13.5px}
th,td{padding:8px 18px;text-align:right;border-top:1px solid var(--line)}
th{color:var(--dim);font-weight:500;border:0}td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere}
form{width:min(420px,100% - 28px);margin:60px auto;padding:24px}
label{display:block;font-size:13.5px;color:var(--dim)}
input,button{font:inherit;padding:9px 12px;border-radius:9px;border:1px solid var(--line);background:var(--bg);
color:inherit;width:100%;margin-top:8px}
button{background:var(--accent);border-color:var(--accent);color:#fff;font-weight:600;cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
footer{max-width:1120px;margin:26px auto;padding:0 20px 24px;color:var(--dim);font-size:12.5px}
@media (max-width:900px){#now{grid-template-columns:repeat(3,1fr)}
#controllers li{grid-template-columns:1fr 1fr}}
@media (max-width:560px){main,header,footer{padding-left:14px;padding-right:14px}
#now{grid-template-columns:1fr 1fr;gap:9px}#controllers li{grid-template-columns:1fr;padding:13px 15px}
summary{grid-template-columns:64px 1fr auto;gap:2px 12px;padding:9px 15px}
summary .code{order:1}summary .account{order:2}summary .path{order:3}
details ol{padding:2px 15px 12px 91px}th,td{padding:8px 10px}}
@media (prefers-reduced-motion:reduce){.bar i{transition:none}}
"""
PAGE_SCRIPT = """
"use strict"
const $ = id => document.getElementById(id), rows = new Map(), seen = new Map(), NS = "http://www.w3.org/2000/svg"
const WORDS = {ok: "answered", rate: "rate limit", quota: "no credit", auth: "key refused", fault: "failed",
  cut: "cut", connect: "no connection", silent: "silent", lost: "another was faster", gone: "the client left",
  client: "request refused", missing: "lacks the model", large: "too large", unfit: "cannot take it"}
let wait = 2000
const make = (tag, name, text) => {
  const it = document.createElement(tag)
  if (name) it.className = name
  if (text !== undefined) it.textContent = text
  return it
}
const put = (it, ...parts) => (it.replaceChildren(...parts), it)
const short = n => n >= 1e6 ? (n / 1e6).toFixed(1) + "M" : n >= 1e4 ? Math.round(n / 1e3) + "k" :
  n >= 100 || n % 1 === 0 ? String(Math.round(n)) : n.toFixed(1)
const span = ms => ms === null ? "-" : ms >= 9950 ? Math.round(ms / 1e3) + " s" : ms >= 1000 ? (ms / 1e3).toFixed(1) +
  " s" : Math.round(ms) + " ms"
const sum = list => list.reduce((a, b) => a + b, 0)
function wave(values, fails, label) {
  const svg = document.createElementNS(NS, "svg"), top = Math.max(1, ...values, ...(fails || []))
  const points = list => list.map((v, i) => `${i * 120 / (list.length - 1)},${27 - v / top * 25}`).join(" ")
  const line = (kind, name, value) => {
    const it = document.createElementNS(NS, kind)
    it.setAttribute("class", name)
    it.setAttribute("points", value)
    svg.append(it)
  }
  svg.setAttribute("viewBox", "0 0 120 28")
  svg.setAttribute("preserveAspectRatio", "none")
  svg.setAttribute("role", "img")
  svg.setAttribute("aria-label", label)
  line("polygon", "area", `0,28 ${points(values)} 120,28`)
  line("polyline", "wave", points(values))
  if (fails && sum(fails)) line("polyline", "fails", points(fails))
  return svg
}
function meter(what, left, limit, model) {
  const it = make("div", "meter"), bar = make("div", "bar"), fill = make("i"), share = limit ? left / limit : 1
  put(it, make("b", "", short(Math.max(0, left))), ` of ${short(limit)} ${what} left`, model ? ` (${model})` : "")
  fill.style.width = Math.max(0, Math.min(100, share * 100)) + "%"
  fill.className = share <= 0.02 ? "none" : share < 0.25 ? "low" : ""
  bar.append(fill)
  it.append(bar)
  return it
}
function tightest(ledger, names) {
  let best = null
  for (const [model, state] of Object.entries(ledger)) for (const name of names) {
    const it = state[name]
    if (!it || !it.limit) continue
    const left = it.left === undefined ? it.limit - it.taken : it.left
    if (!best || left / it.limit < best.left / best.limit) best = {left, limit: it.limit, model}
  }
  return best
}
function showNow(status) {
  const h = status.history, all = sum(h.requests), good = all - sum(h.failed)
  const live = list => sum(list.slice(-4, -1)) / 30
  const cards = [["Requests / s", short(live(h.requests)), wave(h.requests, h.failed, "requests, ten minutes")],
    ["Tokens / s", short(live(h.tokens)), wave(h.tokens, null, "tokens, ten minutes")],
    ["429s avoided", short(sum(h.avoided)), wave(h.avoided, null, "429s avoided, ten minutes")],
    ["Answered", all ? (Math.floor(good / all * 1000) / 10) + " %" : "-", `${short(good)} of ${short(all)}`],
    ["First byte", span(h.first_byte_ms.p50), `p95 ${span(h.first_byte_ms.p95)}`],
    ["Waiting in line", String(status.waiting), `${status.connections} connections`]]
  put($("now"), ...cards.map(([name, value, more]) => {
    const card = make("div", "card"), dd = make("dd", "", value)
    put(card, make("dt", "", name), dd, more instanceof Node ? more : make("span", "dim why", more))
    return card
  }))
}
function showControllers(status) {
  const list = $("controllers"), names = new Set(status.controllers.map(c => c.name))
  for (const [name, it] of rows) if (!names.has(name)) rows.delete(name), it.remove()
  for (const c of status.controllers) {
    if (!rows.has(c.name)) rows.set(c.name, list.appendChild(make("li", "card")))
    const one = status.history.controllers[c.name] || {answered: [0, 0], failed: [0, 0]}
    const title = make("div"), word = make("div", "why " + c.state), stats = make("div"), total = sum(one.answered)
    const until = c.for_s ? ` for ${span(c.for_s * 1e3)}` : ""
    const state = c.state === "out" ? `out: ${c.reason}${until}` : c.state === "ok" ? "ok" : c.state + until
    put(word, make("span", "dot"), state)
    put(title, make("div", "name", c.name), word)
    const kinds = [["requests", ["requests", "rpm", "rpd"]], ["tokens", ["tokens", "tpm", "tpd"]]]
    const parts = kinds.map(([what, keys]) => {
      const found = tightest(c.ledger, keys)
      return found ? meter(what, found.left, found.limit, found.model) : make("div", "meter", `${what}: no limit known`)
    })
    put(stats, wave(one.answered, one.failed, `${c.name}: answers and failures, ten minutes`),
      make("div", "meter", `${short(total)} answered, ${short(sum(one.failed))} failed, ${c.in_flight} in flight`))
    const error = c.last_error ? [make("div", "error", "Last error: " + c.last_error)] : []
    put(rows.get(c.name), title, ...parts, stats, ...error)
  }
}
function showRecent(status) {
  const list = $("recent"), ids = new Set(status.history.recent.map(r => r.id + r.at))
  for (const [id, it] of seen) if (!ids.has(id)) seen.delete(id), it.remove()
  for (const r of [...status.history.recent].reverse()) {
    if (seen.has(r.id + r.at)) continue
    const item = make("li"), box = make("details", "card"), head = make("summary"), path = make("span", "path")
    const tries = r.attempts.map(a => make("i", a.outcome === "ok" ? "ok" : a.outcome === "rate" ? "rate" : ""))
    put(path, ...tries, ` ${r.attempts.length} attempt${r.attempts.length === 1 ? "" : "s"}`)
    put(head, make("span", "dim time", new Date(r.at * 1e3).toLocaleTimeString([], {hour12: false})),
      make("span", "code " + (r.status < 400 ? "ok" : "bad"), String(r.status)), make("span", "model", r.model || "-"),
      make("span", "account dim", r.controller || r.code || "-"), path, make("span", "num", span(r.ms)))
    const why = make("ol")
    const line = (text, more) => why.append(put(make("li"), text, make("span", "dim", more)))
    if (r.wait_ms) line(`waited in line for ${span(r.wait_ms)}`, "")
    for (const a of r.attempts) {
      const status = a.status && a.status !== 200 ? `, status ${a.status}` : ""
      const reason = a.reason ? `: ${a.reason}` : ""
      line(`${a.controller}: ${WORDS[a.outcome] || a.outcome}`, ` after ${span(a.seconds * 1e3)}${status}${reason}`)
    }
    const tokens = r.tokens && short(r.tokens) + " tokens"
    line("", [r.id, r.key && "key " + r.key, tokens, "first byte " + span(r.first_ms)].filter(Boolean).join(", "))
    box.append(head, why)
    item.append(box)
    list.prepend(item)
    seen.set(r.id + r.at, item)
  }
}
function showUsage(status) {
  $("spent").hidden = !status.usage_today.length
  const cells = (tag, list) => put(make("tr"), ...list.map(text => make(tag, "", text)))
  const numbers = u => [u.requests, u.input, u.cached, u.output].map(short)
  put($("usage"), cells("th", ["key", "requests", "input", "cached", "output", "cost"]),
    ...status.usage_today.map(u => cells("td", [u.key || "-", ...numbers(u), u.cost.toFixed(4)])))
}
function tell(name, text) { put($("state"), make("span", "dot"), text), $("state").className = name }
async function poll() {
  try {
    const key = sessionStorage.getItem("key"), headers = key ? {Authorization: "Bearer " + key} : {}
    const reply = await fetch("status?verbose=1&history=1", {headers, cache: "no-store"})
    const locked = reply.status === 401 || reply.status === 403, status = await reply.json()
    $("login").hidden = !locked
    $("main").hidden = locked
    if (locked) {
      tell("dim", "locked")
      if (key) $("hint").textContent = status.error.message
      return
    }
    $("demo").hidden = status.source !== "--demo=storm"
    for (const show of [showNow, showControllers, showRecent, showUsage]) show(status)
    tell(status.status === "ok" ? "ok" : "limited", status.status === "ok" ? "live" : status.status)
    wait = 2000
  } catch (error) {
    tell("bad", "no answer from the server")
    wait = Math.min(wait * 2, 30000)
  }
  setTimeout(function again() { document.hidden ? setTimeout(again, 1000) : poll() }, wait)
}
$("login").addEventListener("submit", event => {
  event.preventDefault()
  sessionStorage.setItem("key", $("key").value)
  poll()
})
poll()
"""
PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>chatgpt_apiserver</title><link rel="icon" href="data:,"><style>{PAGE_STYLE}</style></head><body>
<header><h1>chatgpt_apiserver</h1><p id="state" role="status" class="dim">connecting</p></header>
<form id="login" class="card" hidden><label for="key">This server has client keys. Show one with admin rights; it stays
in this tab.</label><input id="key" type="password" autocomplete="off" required><button>Open</button>
<p id="hint" class="bad" role="alert"></p></form>
<main id="main" hidden><dl id="now"></dl>
<h2>Controllers</h2><ul id="controllers"></ul>
<h2>Last requests: open one to see why it went where</h2><ol id="recent"></ol>
<section id="spent" hidden><h2>Usage today (UTC)</h2><table id="usage" class="card"></table></section></main>
<footer>chatgpt_apiserver {__version__}. Graphs show ten minutes, failures in red. For machines: /metrics, /usage.
<span id="demo" hidden>This is a show: the accounts echo, and the server itself sends the load.</span></footer>
<script>{PAGE_SCRIPT}</script></body></html>
"""
PAGE_TEXT = f"""chatgpt_apiserver {__version__}: several OpenAI-style accounts behind one address.
Point an OpenAI client at the path /v1 of this address. Open this address in a browser to see what happens.
/status  whether it is well          /status?verbose=1  every account
/metrics for Prometheus              /usage             tokens and cost
"""


def page_headers() -> bytes:
    """Return the header lines of the page: nothing from elsewhere runs or is loaded (CSP, level 3)."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (PAGE_STYLE, PAGE_SCRIPT)
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fields = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return "".join([f"{name}: {value}\r\n" for name, value in fields.items()]).encode()


PAGE_HEADERS = page_headers()


# ==== 16. Server ====
# One task for each client connection: read a request, get its answer, write it, read the next. `ClientConnection._send`
# is the only writer, and `ClientConnection._answer` the only place that turns an error into an answer. A client that
# leaves cancels the task, and with it all that is under way upstream.
#
# Framing is judged first, then the head by `Server.admit` (Host, Origin, client key, route), then the body is read. A
# client without a key can not fill the memory. A large upload waits in a temporary file until it is whole.
#
# Order of the section: routes; what a request says; the client's connection; lists of models; what a reload makes; the
# server with its handlers.

SPOOL_BYTES = 1_048_576  # a larger upload waits in a temporary file
BACKLOG = 4096  # connections that the kernel completes before they are accepted
LINGER_S, LINGER_BYTES = 2.0, 1_048_576  # how long, and how much, a client may send after this side is closed
FLUSH_FIRST_S, FLUSH_MAX_S = 0.01, 1.0  # between two looks at whether a closing connection has sent all
MODELS_EVERY_S = 600.0  # between two questions to a controller for its list of models
MODELS_TIMEOUT_S = 10.0  # for an answer, and before a question is repeated at first
MODELS_START_S = 0.5  # the start waits for the first lists, so that the first request goes to the right account
MODELS_WAIT_S = 2.0  # how long a client that asks for the list waits for the first lists
LIST_BYTES = 8_388_608  # one controller's model list
ANSWER_EARLY_S = 2.0  # answer this long before the client's own read timeout
SKIP_BYTES, SKIP_S = 65536, 1.0  # a body of a refused request is read to its end if it is this small and fast
IDLE_GRACE_S = 1.0  # at a stop, for a request that crosses the end of its idle connection
LAST_BYTES_S = 1.0  # at a stop, for an error event to reach its client
ACCEPTED_S = 0.05  # at a stop, for the connections that the kernel has just handed over
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset

DATE = b"Date: %b\r\n"  # RFC 9110, 6.6.1
# A client's own request id is kept if it is of this kind.
REQUEST_ID = re.compile(rb"[0-9A-Za-z._:@/+=-]{1,128}")
TRACE_PARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")  # W3C Trace Context, 3.2
# The answers about the server itself; see log.monitoring.
MONITORING = ("_status", "_metrics", "_usage", "_reload", "_page")
FORWARDED_FIELDS = frozenset((b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"))  # a proxy adds one of them

# Paths of inference, and the model used where the request names none (defaults of OpenAI's API reference).
INFERENCE = {
    **dict.fromkeys(("/completions", "/embeddings", "/responses", "/audio/speech"), ""),
    **dict.fromkeys(("/responses/input_tokens", "/responses/compact"), ""),
    **dict.fromkeys(("/audio/transcriptions", "/audio/translations"), ""),
    **dict.fromkeys(("/images/generations", "/images/edits", "/images/variations"), "dall-e-2"),
    "/moderations": "omni-moderation-latest",
}
# Those with a multipart/form-data body. An image edit may also come as JSON.
FORMS = frozenset(("/images/edits", "/images/variations", "/audio/transcriptions", "/audio/translations"))
# First words of the paths of objects, which live in one account.
OBJECTS = frozenset(
    "files uploads batches responses conversations vector_stores fine_tuning assistants threads containers evals videos"
    " chat".split()
)
# A response that has none of these refers to nothing that one account has.
REFERENCES = (
    *(b'"conversation"', b'"container"', b"file_id", b"vector_store_id"),
    *(b'"encrypted_content"', b'"item_reference"', b'"rs_', b'"msg_', b'"fc_'),
)
# Path: methods, and the method of Server that answers. All other paths are for `_object`, where `endpoints` opens them.
ROUTES = {
    **dict.fromkeys(INFERENCE, ("POST", "_infer")),
    CHAT_PATH: ("POST", "_chat"),
    "/models": ("GET, HEAD", "_list_models"),
    "/models/*": ("GET, HEAD", "_show_model"),
    "/status": ("GET, HEAD", "_status"),
    "/metrics": ("GET, HEAD", "_metrics"),
    "/usage": ("GET, HEAD", "_usage"),
    "/reload": ("POST", "_reload"),
    "": ("GET, HEAD", "_page"),
}


# -- routes


def unknown_path(path: str) -> ProxyError:
    """Return the error (404) for a path that is not served."""
    message = f"There is no {path[:200]} here; see /v1/chat/completions, /v1/models, /status."
    return ProxyError(404, message, "unknown_url")


def closed_path(path: str, group: str) -> ProxyError:
    """Return the error (404) for a path that the configuration could open by the word `group`."""
    message = f"{path[:200]} is not open here; add {group!r} to `endpoints` in the configuration."
    return ProxyError(404, message, "unknown_url")


# What a lenient account would read differently than this server: merged slashes, path parameters (`;x`), a backslash
# as a slash, dot segments (which would leave the account's base_url, with its key), a second /v1.
_NOT_PLAIN = re.compile(r"//|[;\\]|/\.{1,2}(?:/|\Z)|\A/v1/")


def route_key(name: str) -> str:
    """Return the key in ROUTES that a path without /v1 would have."""
    return "/models/*" if name.startswith("/models/") and len(name) > 8 else name.rstrip("/")


@functools.lru_cache(maxsize=256)
def find_route(method: str, target: str, endpoints: tuple[str, ...]) -> tuple[str, str, str]:
    """Return handler, path without /v1, and query of a request. Raise BadMessage, ProxyError (404, 405).

    A path is compared decoded and without its last slash. What goes to an account keeps its spelling.
    """
    # A base_url without /v1 is common in clients and means the same for the routes of this server.
    _, path, query = split_target(target)
    name = path[3:] if path.startswith("/v1/") else path
    route = route_key(name)
    methods, handler = ROUTES.get(route, ("", ""))
    if method in methods.split(", "):
        if route in INFERENCE and {"inference", "*"}.isdisjoint(endpoints):
            raise closed_path(path, "inference")
        return handler, name if route == "/models/*" else route, query
    # Passed on, a path that differs from a chat's in capitals only could be a chat that no limit here has counted.
    if _NOT_PLAIN.search(name) or (not methods and route_key(name.lower()) in ROUTES):
        raise unknown_path(path)
    group = "objects" if name[1:].partition("/")[0] in OBJECTS else "*"
    absolute = _ABSOLUTE_TARGET.match(target)
    spelled = (absolute.group(2) if absolute else target).partition("?")[0]
    # Only a /v1/ spelled as such is taken off, or another path would be sent than the one that was judged.
    if spelled.startswith("/v1/") and not {"*", group}.isdisjoint(endpoints) and route != "/status":
        return "_object", spelled[3:], query
    if not methods:
        raise closed_path(path, group) if group == "objects" else unknown_path(path)
    allow = methods + ", OPTIONS"
    message = f"{path[:200]} takes {allow}."
    raise ProxyError(405, message, "method_not_allowed", headers=f"Allow: {allow}\r\n".encode())


# -- what a request says


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """One request as the handlers get it.

    `key` is the client's key, and `origin` the web page that may read the answer. `charge` is what the limit of the
    client key counts for this request. `request` is what the controllers get. `entered`: counted for its client.
    """

    head: RequestHead
    record: AccessRecord
    handler: str = ""
    path: str = ""
    query: str = ""
    origin: bytes = b""
    key: ClientKey | None = None
    body: bytes | mmap.mmap = b""
    charge: ClientCharge | None = None
    request: ApiRequest | None = None
    entered: bool = False


def is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    """Return whether a connection from `address` comes from a trusted proxy."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket has no address
        return False
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip in network for network in trusted)


def client_address(peer: str, forwarded: bytes, trusted: Sequence[Network]) -> str:
    """Return the client's address: the last one in X-Forwarded-For that is no trusted proxy, else that of the peer.

    Each proxy adds the address of its own client at the end, so a client can make up only what stands before its own.
    """
    address = peer
    for entry in reversed(forwarded.decode("latin-1").split(",")):
        # Some proxies add the port.
        host = re.fullmatch(r"\s*(?:\[([^\]]+)\](?::\d+)?|([^:]+):\d+|(.+?))\s*", entry)
        try:
            if not host or not is_trusted(address, trusted):
                break
            address = str(ipaddress.ip_address(host[1] or host[2] or host[3]))
        except ValueError:
            break
    return address


def longest_wait(index: Index, most_s: float) -> float:
    """Return how long a request may wait in line: `most_s` seconds, or less by its own wish or its read timeout.

    The SDKs send their read timeout. A client that has timed out sends again, and its place in line was in vain.
    """
    for name, margin_s in ((b"x-apiserver-max-wait", 0.0), (b"x-stainless-read-timeout", ANSWER_EARLY_S)):
        value = index.get(name)
        seconds = parse_duration(value.decode("latin-1")) if value is not None else None
        if seconds is not None:
            most_s = max(0.0, min(most_s, seconds - margin_s))
    return most_s


def is_json(content_type: bytes) -> bool:
    """Return whether a body of this type is JSON."""
    return b"json" in content_type.lower()


def json_lines(head: RequestHead) -> bytes:
    """Return the header lines of a JSON request; curl's default content type is a form's."""
    if is_json(head.index.get(b"content-type", b"")):
        return head.lines
    return without(head.lines, (b"content-type",)) + JSON_TYPE


def read_input(request: ApiRequest, model: str) -> None:
    """Read a JSON request that is no chat. `model` is the default of its path. Raise ProxyError (400)."""
    data = request.data = parse_object(request.body)
    request.model = data.get("model") or model
    # A stored prompt may name it.
    stored = request.path.startswith("/responses") and "model" not in data
    if not stored and (not isinstance(request.model, str) or not request.model):
        raise ProxyError(400, "You must provide a model parameter: a non-empty string.", param="model")
    request.stream = data.get("stream") is True
    # Responses are stored by default (API reference, `store`): to send one twice may make two.
    request.stateful = request.path == "/responses" and data.get("store") is not False
    request.prompt_tokens = estimate_prompt(data)
    # Embeddings, images and speech cost no tokens for the answer.
    request.max_tokens = 1
    if request.path in ("/completions", "/responses"):
        limit = data.get("max_output_tokens")
        request.max_tokens = limit if isinstance(limit, int) and limit > 0 else answer_limit(data)


def read_form(request: ApiRequest, content_type: bytes, model: str) -> None:
    """Read the fields of a form that routing needs. `model` is the default of its path. Raise ProxyError (400)."""
    spans = form_spans(request.body, content_type)
    request.model, request.model_span = model, spans.get(b"model")
    if request.model_span is not None:
        start, end = request.model_span
        request.model = request.body[start:end].decode("utf-8", "replace")
    if not request.model:
        raise ProxyError(400, "You must provide a model field in the form.", param="model")
    start, end = spans.get(b"stream", (0, 0))
    request.stream = request.body[start:end] == b"true"
    request.prompt_tokens, request.max_tokens = TOKENS_PER_PART, 1


def check_model_allowed(key: ClientKey, request: ApiRequest) -> None:
    """Raise ProxyError (403) if the client key may not use the model of a request."""
    if not key.models:
        return
    if not model_patterns(key.models).fullmatch(request.model):
        # A file or a batch may be for any model.
        what = f"the model {request.model[:64]!r}" if request.model else "calls that name no model"
        message = f"Your key may not use {what}; it may use: {', '.join(key.models)}."
        raise ProxyError(403, message, "model_not_allowed", param="model")
    # JSON parsers differ in which of two equal keys counts, and Go's ignores case. So the account gets what was judged.
    if sum(name.lower() == "model" for name in request.data) > 1:
        raise ProxyError(400, "model stands twice in the body.", param="model")
    if request.data:
        request.body = compact_json(request.data)


# -- a client's connection


def json_answer(value: Any, status: int = 200, lines: bytes = b"") -> Answer:
    """Return an answer of this server with a JSON body (with Date: RFC 9110, 6.6.1)."""
    body = compact_json(value) if value is not None else b""
    return Answer(status, DATE % http_date(time.time()) + (JSON_TYPE if body else b"") + lines, body, len(body))


def error_answer(error: ProxyError | UpstreamError, record: AccessRecord | None = None) -> Answer:
    """Return the answer that tells a client of an error."""
    lines = error.headers if isinstance(error, ProxyError) else b""
    if record is not None:
        record.code = error.code or ""
        lines = b"x-request-id: %b\r\n" % record.request_id.encode() + routing_headers(record) + lines
    # A message may quote an upstream, or a proxy's URL.
    body = redactor.scrub(error_body(error))
    return Answer(error.status, DATE % http_date(time.time()) + JSON_TYPE + lines, body, len(body))


class Phase(enum.Enum):
    """What a client connection does now. A passed deadline, and a FIN, mean something else in each."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    CLOSING = "closing"


class ClientConnection:
    """A client's connection and the task that serves it.

    `raw` is the transport below TLS. `keep`: another request may follow. `gone`: the client left, so nothing more is
    sent. `unread`: a part of a refused request was not read. `held_bytes`: bytes of the body that count towards
    limits.bodies_bytes.
    """

    def __init__(self, server: "Server", protocol: TimedProtocol, peer: str) -> None:
        self.server, self.protocol, self.reader, self.peer = server, protocol, protocol.reader, peer
        self.transport = self.raw = protocol.transport
        self.loop = server.loop
        self.deadline = Deadline(self.loop, self._expired)
        self.phase, self.held_bytes = Phase.IDLE, 0
        self.keep, self.gone, self.unread = True, False, False
        # Both are about the current request: whether the head of its answer was sent, and its HTTP/1 version.
        self.head_sent, self.http_minor = False, 1
        self.writable: asyncio.Event = asyncio.Event()
        self.reader.on_end = self._ended
        protocol.on_writable = self.writable.set
        self.task = self.loop.create_task(self._run())

    def __repr__(self) -> str:
        return f"<ClientConnection {self.peer} {self.phase.value}>"

    def retire(self) -> None:
        """Close an idle connection, and a busy one after its answer: the server is about to stop."""
        self.keep = False
        if self.phase is Phase.IDLE:
            # The client still reads the end of an answer; `_flush` waits for it.
            if self._unsent():
                self.reader.interrupt(EOFError())
            else:
                self.task.cancel()

    async def _run(self) -> None:
        """Serve the connection, from the TLS handshake to the close. No exception leaves here."""
        try:
            if self.server.tls is not None:
                # Here, and not in the listener, a handshake is counted and timed.
                limits = {
                    "ssl_handshake_timeout": self.server.config.limits.header_timeout,
                    "ssl_shutdown_timeout": LINGER_S,
                }
                await self.protocol.start_tls(self.server.tls, server_side=True, **limits)
                self.transport = self.protocol.transport
            while self.keep and await self._serve_one():
                pass
            self.phase = Phase.CLOSING
            if not self.gone:
                await self._linger()
                await self._flush()
        except asyncio.CancelledError:
            # The client left, or the server stops.
            self.gone = self.gone or (self.phase is Phase.ANSWER and self.head_sent)
        except (OSError, ClientGone):
            # OSError comes from TLS, from the socket, and from a shutdown that is too late.
            self.gone = True
        finally:
            self.phase = Phase.CLOSING
            self._release()
            self.deadline.cancel()
            self.reader.on_end = self.protocol.on_writable = None
            self._close()
            self.server.forget(self)

    def _unsent(self) -> int:
        """Return how many bytes of answers the kernel has not taken yet."""
        below_tls = self.raw.get_write_buffer_size() if self.raw is not self.transport else 0
        return self.transport.get_write_buffer_size() + below_tls

    def _close(self) -> None:
        """Close the connection. A client that has not taken its answer by now is cut off."""
        if not (self.gone or self._unsent()):
            self.transport.close()
            return
        # For HTTP/1.0 a FIN is the end of an answer without a length. A reset shows that it was cut.
        if self.head_sent and not self.http_minor and not self.raw.is_closing():
            self.raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.transport.abort()

    async def _linger(self) -> None:
        """Let a client that still sends read the answer before the connection is reset (RFC 9112, 9.6).

        Unread bytes make the kernel send a reset, which takes the answer out of the client's buffer: curl would show
        "connection reset" and not the 413.
        """
        if self.reader.ended or self.server.stopping:
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        elif not self.unread:
            # TLS can not close one way only.
            return
        self.deadline.set(self.loop.time() + LINGER_S)
        budget = LINGER_BYTES
        try:
            while budget > 0:
                data = await self.reader.read_some()
                if not data:
                    return
                budget -= len(data)
        except EOFError:  # the deadline's
            return

    async def _flush(self) -> None:
        """Wait until the last bytes are sent; until then this counts as a connection."""
        until, wait_s = self.loop.time() + self.server.config.limits.write_timeout, FLUSH_FIRST_S
        while self._unsent() and self.loop.time() < until:
            await asyncio.sleep(min(wait_s, until - self.loop.time()))
            wait_s = min(2 * wait_s, FLUSH_MAX_S)

    async def _serve_one(self) -> bool:
        """Read and answer one request; return whether another may follow."""
        self.phase, self.head_sent, self.http_minor = Phase.IDLE, False, 1
        error: ProxyError | None = None
        try:
            head = await self._read_head()
        except EOFError:
            # The deadline passed while the client still reads its last answer.
            return False
        except ProxyError as problem:
            head, error, self.unread = RequestHead("-", "-", 1, {}, b""), problem, True
        if head is None:
            return False
        call = Call(head, AccessRecord(self.peer, head.method, head.target, self.loop.time()))
        self._identify(call.record, head.index)
        try:
            try:
                if error is None:
                    self.server.enter(call, self.peer)
                    await self._read_call(call)
            except ProxyError as problem:
                error = problem
            self.keep = self.keep and not self.unread
            self.deadline.set(math.inf)
            self.phase = Phase.ANSWER
            await self._send(await self._answer(call, error), call)
        except (asyncio.CancelledError, ConnectionError, TimeoutError, ClientGone):
            # 499 is nginx's status for a client that left.
            call.record.status = call.record.status or 499
            raise
        finally:
            if call.charge is not None:
                # An error costs no tokens. A client that left (499) and a timeout (504) may have used some.
                if call.record.status >= 400 and call.record.status not in (499, 504):
                    call.charge.used(0, self.loop.time())
                call.charge.leave(call.request is not None and call.request.was_sent, self.loop.time())
            if call.entered:
                self.server.per_peer -= Counter((call.record.client,))
            self.server.finished(call.record)
            self._release()
        # A client that never reads must not pile up answers.
        if self.protocol.full:
            await self._drain()
        return self.keep

    def _identify(self, record: AccessRecord, index: Index) -> None:
        """Note the client's address, the id of its request, and the trace that it belongs to."""
        trusted, forwarded = self.server.config.trusted_proxies, index.get(b"x-forwarded-for")
        if trusted and forwarded:
            record.client = client_address(self.peer, forwarded, trusted)
        request_id = index.get(b"x-request-id", b"")
        record.request_id = request_id.decode() if REQUEST_ID.fullmatch(request_id) else self.server.next_id()
        trace = TRACE_PARENT.fullmatch(index.get(b"traceparent", b""))
        record.trace_id = trace.group(1).decode() if trace else ""

    # -- reading

    async def _read_head(self) -> RequestHead | None:
        """Return the next request's head; None when the client closed between requests. Raise BadMessage.

        The deadline is header_timeout after its first byte, however many more trickle in.
        """
        limit, data = self.server.config.limits.header_bytes, b""
        self.deadline.set(self.loop.time() + self.server.config.limits.idle_timeout)
        while True:
            more = await self.reader.read_some()
            if not more:
                return None
            data = data + more if data else more
            # Some clients send a CRLF behind a body (RFC 9112, 2.2).
            if data[0] == 13:
                empty = _EMPTY_LINES.match(data)
                data = data[empty.end() :] if empty else data
                if data in (b"", b"\r"):
                    continue
            # Only what is new is searched: byte by byte the search would be quadratic.
            end = data.find(b"\r\n\r\n", max(0, len(data) - len(more) - 3))
            if 0 <= end <= limit:
                break
            if len(data) > limit:
                raise BadMessage(431, f"The request head is larger than {limit} bytes.")
            check_partial_head(data, max(0, len(data) - len(more) - 1))
            if self.phase is Phase.IDLE:
                self.phase = Phase.HEAD
                self.deadline.set(self.loop.time() + self.server.config.limits.header_timeout)
        # The surplus is a body, or the next request.
        if len(data) > end + 4:
            self.reader.unread(data[end + 4 :])
        if end > START_LINE_BYTES and data.find(b"\r\n") > START_LINE_BYTES:
            raise BadMessage(414, f"The request line is longer than {START_LINE_BYTES} bytes.")
        return parse_request_head(data[: end + 4])

    async def _read_call(self, call: Call) -> None:
        """Judge a request's framing, then its head, then read its body. Raise BadMessage, ProxyError."""
        head, index, limits = call.head, call.head.index, self.server.config.limits
        self.http_minor = head.http_minor
        self.unread = True
        kind = index.get(b"content-type", b"")
        form = not is_json(kind) and b"multipart/" in kind.lower()
        decoder = request_body_decoder(head, limits.upload_bytes if form else limits.body_bytes)
        if not keeps_alive(index, head.http_minor):
            self.keep = False
        if decoder is None:
            self.unread = False
            self.server.admit(call)
            return
        expects = b"expect" in index and head.http_minor > 0
        if expects and index[b"expect"].lower() != b"100-continue":
            raise BadMessage(417, "The only expectation understood is 100-continue.")
        self.phase = Phase.BODY
        begun = decoder.feed(await self.reader.read_some()) if self.reader.data else b""
        self.unread = not decoder.done
        try:
            self.server.admit(call)
        except ProxyError:
            if decoder.done:
                self.reader.unread(decoder.surplus)
            else:
                # A client that expects 100 may never send the body.
                self.unread = bool(expects and not begun) or not await self._skip(decoder)
            raise
        if expects and not begun:
            self.transport.write(CONTINUE)  # RFC 9110, 10.1.1
        call.body = await self._read_body(decoder, begun, not is_json(kind))
        self.unread = False

    async def _read_body(self, decoder: Decoder, begun: bytes, spools: bool) -> bytes | mmap.mmap:
        """Return a request's body; `begun` is what has come of it. A large one that `spools` waits in a temporary file.

        It is bounded in size, time and slowness. Raise BadMessage, ClientGone.
        """
        since = heard_at = self.loop.time()
        # Python's own spool: a file without a name once it is larger than max_size, in memory while max_size is 0.
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES if spools else 0) as body:
            piece = begun
            while not decoder.done:
                self._hold(len(piece))
                body.write(piece)
                # A write to a disk may have taken a while.
                if self.held_bytes > SPOOL_BYTES and spools:
                    heard_at = self.loop.time()
                self.deadline.set(self._body_due(since, heard_at))
                data = await self.reader.read_some()
                if not data:
                    raise ClientGone
                piece = decoder.feed(data)
            self.reader.unread(decoder.surplus)
            if not self.held_bytes:  # it came in one read
                return piece
            self._hold(len(piece))
            body.write(piece)
            if spools and self.held_bytes > SPOOL_BYTES:
                body.flush()
                return mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ)
            body.seek(0)
            return body.read()

    async def _skip(self, decoder: Decoder) -> bool:
        """Read the body of a refused request, if it is small and soon over; return whether all of it was read.

        Then the connection can go on. Raise BadMessage for bad framing, which counts more than the refusal.
        """
        left = SKIP_BYTES if isinstance(decoder, ChunkedDecoder) or decoder.left <= SKIP_BYTES else 0
        self.deadline.set(self.loop.time() + SKIP_S)
        while left > 0 and not decoder.done:
            try:
                data = await self.reader.read_some()
            except BadMessage:  # the deadline's
                return False
            if not data:
                raise ClientGone
            left -= len(data)
            decoder.feed(data)
        self.reader.unread(decoder.surplus)
        return decoder.done

    def _hold(self, size: int) -> None:
        """Count bytes of a body in memory or on disk until its request is answered. Raise BadMessage (503)."""
        # One count for all connections: 10,000 clients with 32 MB each would all be within their own limit.
        self.held_bytes += size
        self.server.held_bytes += size
        if self.server.held_bytes > self.server.config.limits.bodies_bytes:
            message = "Too many request bodies are under way; try again."
            raise BadMessage(503, message, "server_overloaded", headers=b"Retry-After: 1\r\n")

    def _release(self) -> None:
        """Stop counting this connection's body."""
        self.server.held_bytes -= self.held_bytes
        self.held_bytes = 0

    def _body_due(self, since: float, heard_at: float) -> float:
        """Return when a body is too slow that began at `since`: by its rate, and by the silence since `heard_at`.

        The rate is that of the whole body after a start of header_timeout: a short pause of a phone is no attack.
        """
        limits = self.server.config.limits
        rated_s = limits.header_timeout + self.held_bytes / limits.body_rate if limits.body_rate else math.inf
        return min(heard_at + limits.body_timeout, since + rated_s)

    # -- answering

    async def _answer(self, call: Call, error: ProxyError | None) -> Answer:
        """Return the answer to a call. This is the only place that turns an error into an answer."""
        try:
            if error is not None:
                raise error
            handler: Callable[[Call], Awaitable[Answer]] = getattr(self.server, call.handler)
            return await handler(call)
        except (ProxyError, UpstreamError) as problem:
            return error_answer(problem, call.record)
        except asyncio.CancelledError:
            if self.gone or not self.server.relay.stopping:
                raise
            error = ProxyError(503, "This server is shutting down; try again.", "server_shutdown")
            return error_answer(error, call.record)
        except Exception:
            # A mistake in this program costs one request; the log has the traceback.
            log.exception("%s: internal error", call.record.request_id)
            self.keep = False
            message = f"Internal error; the log has request {call.record.request_id}."
            return error_answer(ProxyError(500, message), call.record)

    async def _send(self, answer: Answer, call: Call) -> None:
        """Write an answer. This is the only place that does. A client that stops reading for too long is dropped."""
        record, rest, head_only = call.record, answer.rest, call.head.method == "HEAD"
        chunked = rest is not None and answer.length is None and self.http_minor > 0
        # A 204 has no length (RFC 9110, 8.6), a 304's is another answer's, and to HEAD the body's length is unknown.
        bodiless = answer.status in (204, 304) or (head_only and not answer.held)
        self.keep = self.keep and not self.server.draining
        if chunked:
            framing = b"Transfer-Encoding: chunked\r\n"
        elif answer.length is not None:
            framing = b"" if bodiless else b"Content-Length: %d\r\n" % answer.length
        else:
            # The body ends with the connection.
            framing, self.keep = b"", False
        record.status, self.head_sent = answer.status, True
        held = b"" if head_only else answer.held
        record.bytes = len(held)
        lines = answer.lines + self._connection_lines(call.origin)
        # Head and body in one piece: a head by itself would wake the client for nothing.
        first = chunk(held) if chunked and held else held
        self.transport.write(b"".join((status_line(answer.status), lines, framing, b"\r\n", first)))
        if rest is None:
            return
        try:
            try:
                if self.protocol.full:
                    await self._drain()
                async for data in rest:
                    # An empty chunk would end the body.
                    if data:
                        record.bytes += len(data)
                        self.transport.write(chunk(data) if chunked else data)
                    if self.protocol.full:
                        await self._drain()
            except asyncio.CancelledError as stop:
                if self.gone or not self.server.relay.stopping:
                    raise
                # This server stops while the client is slow. The relay makes it an AnswerCut.
                await rest.athrow(stop)
            if chunked:
                self.transport.write(LAST_CHUNK)
        except AnswerCut as cut:
            # The last chunk is left out, so the answer does not look whole.
            self.keep, self.gone = False, not cut.last
            if cut.last:
                self.transport.write(chunk(cut.last) if chunked else cut.last)
        finally:
            await rest.aclose()

    def _connection_lines(self, origin: bytes) -> bytes:
        """Return the Connection and CORS header lines."""
        lines = b"" if self.http_minor else b"Connection: keep-alive\r\n"
        if not self.keep:
            lines = b"Connection: close\r\n"
        if origin:
            lines += b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % origin
            lines += b"Access-Control-Expose-Headers: *\r\n"
        return lines

    async def _drain(self) -> None:
        """Wait until the client takes more."""
        self.writable.clear()
        self.deadline.set(self.loop.time() + self.server.config.limits.write_timeout)
        await self.writable.wait()
        self.deadline.set(math.inf)

    # -- the deadline, and the client's end

    def _expired(self) -> None:
        """Act on a deadline that has passed: a slow client gets 408 where it can, and is closed."""
        if self.phase is Phase.CLOSING or (self.phase is Phase.IDLE and self._unsent()):
            self.reader.interrupt(EOFError())  # `_flush` comes next
        elif self.phase is Phase.IDLE:
            self.task.cancel()
        elif self.phase is Phase.ANSWER:  # it does not read
            self.leave()
        else:
            self.reader.interrupt(BadMessage(408, "The request did not arrive in time."))

    def _ended(self, error: BaseException | None) -> None:
        """Act on a FIN or reset during an answer. In other phases the next read sees it."""
        if self.phase is Phase.ANSWER:
            self.leave()

    def leave(self) -> None:
        """Stop the answer under way: the client is gone."""
        self.gone = True
        self.task.cancel()


# -- lists of models


def is_open_ended(config: ControllerConfig) -> bool:
    """Return whether the configuration leaves open which models a controller has, so that it has to be asked."""
    named = config.models and {"*", "?"}.isdisjoint("".join(config.models))
    # Azure lists what could be deployed.
    return not named and config.type not in ("echo", "azure")


def model_object(name: str) -> dict[str, Any]:
    """Return a model as `GET /v1/models` lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "chatgpt-apiserver"}


def ignore_write(now: float) -> None:
    """Do nothing when a request for a list is written: no quota counts it."""


class ModelLists:
    """The models that the controllers serve: those of the configuration, and the lists of open-ended controllers.

    Where they help to choose among several controllers, the lists are asked for in the background, never in a client's
    way; else at the first question for them. While a controller fails, its last list counts.
    """

    def __init__(self, pool: UpstreamPool, connections: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self.connections, self.loop = pool, connections, loop
        self.known: dict[str, list[dict[str, Any]]] = {}  # by controller
        self.answered: set[str] = set()  # the controllers whose first question has ended
        # The last question to each controller, and the time of the next one.
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.timers: dict[str, asyncio.TimerHandle] = {}

    def follow(self) -> None:
        """Ask the controllers of the current configuration, now and from time to time."""
        self.close()
        names = {upstream.name for upstream in self.pool.upstreams}
        self.known = {name: models for name, models in self.known.items() if name in names}
        self.answered &= names
        if len(names) > 1:
            self._ask_all()

    def close(self) -> None:
        """Ask no more."""
        for timer in self.timers.values():
            timer.cancel()
        for task in self.tasks.values():
            task.cancel()
        self.timers, self.tasks = {}, {}

    def _ask_all(self) -> None:
        """Ask each controller that has not been asked yet."""
        for upstream in self.pool.upstreams:
            if is_open_ended(upstream.config) and upstream.name not in self.tasks:
                self._ask_again(upstream, 0.0)

    def _ask_again(self, upstream: Upstream, failed_s: float) -> None:
        self.tasks[upstream.name] = self.loop.create_task(self._ask(upstream, failed_s))

    async def _ask(self, upstream: Upstream, failed_s: float) -> None:
        """Ask one controller, and set the time of the next question. `failed_s`: the last backoff."""
        name, again_s = upstream.name, MODELS_EVERY_S
        try:
            async with asyncio.timeout(MODELS_TIMEOUT_S):
                self.known[name] = await self._fetch(upstream)
            self.pool.learn_models(upstream, [model["id"] for model in self.known[name]])
        except (UpstreamError, TimeoutError, Untranslatable) as error:
            again_s = next_backoff(failed_s, (MODELS_TIMEOUT_S, MODELS_EVERY_S))
            if not failed_s:
                log.warning("account %s: its models cannot be listed: %s", name, str(error) or "no answer in time")
        self.answered.add(name)
        failed_s = again_s if again_s < MODELS_EVERY_S else 0.0
        self.timers[name] = self.loop.call_later(again_s, self._ask_again, upstream, failed_s)

    async def wait(self, timeout_s: float) -> None:
        """Wait until the first question to each controller has ended, at most `timeout_s`."""
        first = [task for name, task in self.tasks.items() if name not in self.answered]
        if first:
            await asyncio.wait(first, timeout=timeout_s)

    async def all(self) -> list[dict[str, Any]]:
        """Return all models and aliases by name. A controller that fails only shortens the list."""
        self._ask_all()
        await self.wait(MODELS_WAIT_S)
        models = {name: model_object(name) for name in self.pool.configured_models()}
        for upstream in self.pool.upstreams:
            for model in self.known.get(upstream.name, ()):
                if upstream.serves(model["id"]):
                    models.setdefault(model["id"], model)
        for alias, name in self.pool.aliases.items():
            if self.pool.is_served(name):
                models[alias] = {**model_object(alias), "root": name}  # as vLLM does
        return [models[name] for name in sorted(models)]

    async def _fetch(self, upstream: Upstream) -> list[dict[str, Any]]:
        """Return a controller's own list of models. Raise UpstreamError, Untranslatable."""
        request = ApiRequest("GET", "/models", "", b"Accept: application/json\r\n", b"")
        exchange = upstream.controller.exchange(request, self.connections, ignore_write, True)
        try:
            await exchange.start()
            body = await read_all(exchange, LIST_BYTES)
        finally:
            # The connection is not kept: requests of clients have connections of their own.
            exchange.abort()
        try:
            if exchange.head.status == 200:
                value = json.loads(body)
                # Together sends the array alone.
                models = value if isinstance(value, list) else value["data"]
                listed = [model for model in models if isinstance(model["id"], str)]
                # Anthropic's models have a `type` and no `object`. What cannot be printed cannot be asked for.
                named = [model for model in listed if model["id"].isprintable() and model["id"]]
                return [{**model_object(model["id"]), **model, "object": "model"} for model in named]
        except (ValueError, KeyError, TypeError, RecursionError):
            log.debug("account %s: not a list of models: %r", upstream.name, body[:200])
        raise BadReply(f"status {exchange.head.status} instead of a list")


# -- what a configuration makes


def rebuild_pool(pool: UpstreamPool, config: Config) -> None:
    """Make `pool` what `config` describes. Unchanged controllers and quotas keep their state.

    Fresh ledgers would send a burst to every account at each reload.
    """
    known = {upstream.name: upstream for upstream in pool.upstreams}
    # A group may have the name of a controller that is not in it.
    quotas = {(bool(one.config.quota_group), one.quota.name): one.quota for one in pool.upstreams}
    upstreams: list[Upstream] = []
    for controller in config.controllers:
        if not controller.enabled:
            continue
        upstream = known.get(controller.name)
        if upstream is not None and replace(upstream.config, limits=controller.limits) == controller:
            upstream.config = controller
        else:
            which = bool(controller.quota_group), controller.quota_group or controller.name
            quota = quotas.setdefault(which, Quota(which[1], controller.limits))
            upstream = Upstream(controller, CONTROLLERS[controller.type](controller), quota)
        upstream.quota.configure(controller.limits)
        upstreams.append(upstream)
    pool.replace(upstreams, config.pool)


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Make new connections use the configured certificate. Raise ConfigError."""
    try:
        context.load_cert_chain(config.tls.cert, config.tls.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{config.source}: tls: certificate and key cannot be used: {error}") from error


def address_of(listener: socket.socket) -> tuple[str, int]:
    """Return the host and port of a listening socket; the path and 0 of a Unix socket."""
    name = listener.getsockname()
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else (str(name), 0)


def server_tls(config: Config) -> ssl.SSLContext:
    """Return the listener's TLS context, for TLS 1.2 or newer. Raise ConfigError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, config)
    return context


# -- the server


class Server:
    """The listener, the checks at its door, the handlers, and the way it stops.

    `draining`: /status says so. `stopping`: the listener is closed. `client_quotas` are the limits of client keys
    by name. Tests pass another `dial`.
    """

    def __init__(
        self, config: Config, loop: asyncio.AbstractEventLoop, load: Callable[[], Config] | None = None
    ) -> None:
        self.loop, self.config, self.load = loop, config, load or (lambda: config)
        self.links = ConnectionPool()
        self.connections: set[ClientConnection] = set()
        self.per_peer: Counter[str] = Counter()
        # The bytes of all request bodies under way.
        self.held_bytes = 0
        self.listeners: list[asyncio.Server] = []
        self.tls: ssl.SSLContext | None = None
        self.stopping = self.draining = False
        self.serial, self.id_prefix = 0, "req_" + secrets.token_hex(6)
        self.pool = UpstreamPool([], config.pool, loop)
        self.client_quotas: dict[str, ClientQuota] = {}
        self.access, self.metrics, self.usage = AccessLog(loop, log_writer.write), Metrics(), UsageBook()
        self.history = History()
        self.state = StateFile(path_beside(config.source, config.state_file)) if config.state_file else None
        # What the file has of the pool.
        self.saved: dict[str, str | None] = {}
        self.saver: asyncio.TimerHandle | None = None
        self.models = ModelLists(self.pool, self.links, loop)
        self.relay = Relay(self.pool, self.links, loop)
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Use `config` from now on. Unchanged parts keep their state; answers under way go on. Raise ConfigError."""
        if self.listeners and bool(self.tls) != bool(config.tls.cert):
            log.warning("tls: switching it on or off needs a restart")
        elif self.tls is not None:
            # This may raise, so it comes first.
            load_certificate(self.tls, config)
        if self.listeners:  # they keep their address
            config = replace(config, host=self.config.host, port=self.config.port)
        self.config = config
        rebuild_pool(self.pool, config)
        known, self.client_quotas = self.client_quotas, {}
        for key in config.client_keys:
            if key.limits != QuotaLimits():
                quota = self.client_quotas[key.name] = known.get(key.name) or ClientQuota(key.name, key.limits)
                quota.configure(key.limits)
        self.access.config = config.log
        self.usage.configure(config.prices)
        self.relay.counts_tokens = config.counts_tokens
        # A web page may point its own name at 127.0.0.1 (DNS rebinding), or send a simple request without asking. It
        # could spend the keys of a server on loopback. No page has a client key.
        self.guards_host = is_loopback(config.host) and (not config.client_keys or bool(config.allowed_hosts))
        self.guards_origin = not config.client_keys or bool(config.cors.allow_origins)
        self.relay.shows_account = len(self.pool.upstreams) == 1 and not config.client_keys
        if self.listeners:
            self.models.follow()

    def reload(self) -> list[str]:
        """Use the configuration that `load` finds now; return the differences. Raise ConfigError and keep the old."""
        current = self.config
        try:
            new = self.load()
            if new.log.file != current.log.file:
                open_log(new)
        except ConfigError as error:
            for mistake in str(error).splitlines():
                log.error("reload: keeping the running configuration: %s", mistake)
            raise
        # Running requests may still show the old secrets.
        redactor.watch([*secrets_of(current), *secrets_of(new)])
        log.setLevel(new.log.level.upper())
        formatter.as_json = new.log.format == "json"
        # The listener stays as it is.
        kept = replace(new, host=current.host, port=current.port)
        differences = diff_config(current, new)
        for line in differences or ["nothing changed"]:
            log.info("reload: %s", line)
        for warning in [text for text in warnings_of(kept) if text not in warnings_of(current)]:
            log.warning("%s", warning)
        self.reconfigure(new)
        return differences

    def next_id(self) -> str:
        """Return a request id that no other request has."""
        self.serial += 1
        return f"{self.id_prefix}{self.serial:x}"

    async def start(self, inherited: Sequence[socket.socket] = ()) -> list[tuple[str, int]]:
        """Listen on the configured address or on `inherited` sockets; return the addresses. Raise OSError, ConfigError.

        A port that is taken is found here. Clients can connect only after `start_serving`.
        """
        config, listen = self.config, partial(self.loop.create_server, self._protocol, backlog=BACKLOG)
        self.tls = server_tls(config) if config.tls.cert else None
        if inherited:
            self.listeners = [await listen(sock=listener, start_serving=False) for listener in inherited]
        else:
            options = {"reuse_address": True, "reuse_port": config.reuse_port or None}
            self.listeners = [await listen(config.host, config.port, start_serving=False, **options)]
        sockets = [listener for server in self.listeners for listener in server.sockets]
        # Accepted connections inherit the options.
        for listener in sockets:
            watch_path(listener, config.limits.write_timeout)
        if self.state is not None:
            self._restore(self.state)
        self.models.follow()
        await self.models.wait(MODELS_START_S)
        for server in self.listeners:
            await server.start_serving()
        return [address_of(listener) for listener in sockets]

    def _restore(self, state: StateFile) -> None:
        """Load what the last run stored, and store from now on."""
        values = state.load()
        try:
            for name, text in values.items():
                kind, *place = json.loads(name)
                if kind == "object":
                    self.relay.makers[place[0]] = json.loads(text)
            restore_pool(self.pool, self.client_quotas, values, time.time() - self.loop.time())
        except (ValueError, TypeError, LookupError) as error:
            # Something else has written into the file.
            log.error("state_file %s: a part of it is not understood: %s", state.path, error)
        for day, key, tokens, cost in state.load_spent(day_of(time.time())[:7]):
            self.usage.spend(key, day, tokens, cost)
        self.relay.new_makers = {}
        state.thread.start()
        self.saver = self.loop.call_later(SAVE_S, self._save)

    def _save(self, levels: bool = False) -> None:
        """Hand what has changed to the thread that writes the state_file; again each SAVE_S."""
        assert self.state is not None and self.relay.new_makers is not None
        values = dump_pool(self.pool, self.client_quotas, time.time() - self.loop.time(), levels)
        changed = {name: value for name, value in values.items() if self.saved.get(name) != value}
        self.saved.update(changed)
        for name, controller in self.relay.new_makers.items():
            changed[compact_json(["object", name]).decode()] = compact_json(controller).decode()
        self.relay.new_makers.clear()
        usage = self.usage.take_changes()
        if usage or changed:
            self.state.save(usage, changed)
        self.saver = self.loop.call_later(SAVE_S, self._save)

    def _stop_listening(self) -> None:
        """Take no more connections."""
        self.stopping = True
        for server in self.listeners:
            server.close()

    def _protocol(self) -> TimedProtocol:
        """Return the protocol of a new connection."""
        return TimedProtocol(TimedReader(self.loop), self._connected)

    def _connected(self, protocol: TimedProtocol) -> None:
        """Serve a new connection, or refuse one too many."""
        transport = protocol.transport
        name = transport.get_extra_info("peername")
        peer = str(name[0]) if isinstance(name, tuple) else "local"
        limits = self.config.limits
        # A trusted proxy brings many clients; `enter` counts them.
        most = 0 if is_trusted(peer, self.config.trusted_proxies) else limits.connections_per_client
        full_peer = 0 < most <= self.per_peer[peer]
        if self.relay.stopping or full_peer or len(self.connections) >= limits.connections:
            if not self.tls:
                message = "All connections are in use; try again."
                error = ProxyError(503, message, "too_many_connections", headers=b"Retry-After: 1\r\n")
                answer = error_answer(error)
                lines = answer.lines + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(answer.held)
                transport.write(status_line(answer.status) + lines + answer.held)
            transport.close()
            return
        self.per_peer[peer] += 1
        self.connections.add(ClientConnection(self, protocol, peer))

    def enter(self, call: Call, peer: str) -> None:
        """Count a request that a trusted proxy brought. Raise ProxyError (503) if its client has too many.

        Other clients are counted by their connections.
        """
        client = call.record.client
        if client != peer:
            call.entered = True
            self.per_peer[client] += 1
            if 0 < self.config.limits.connections_per_client < self.per_peer[client]:
                message = "Too many requests of this client are under way; try again."
                raise ProxyError(503, message, "too_many_connections", headers=b"Retry-After: 1\r\n")

    def finished(self, record: AccessRecord) -> None:
        """Report a request that has ended."""
        record.until = self.loop.time()
        self.access.add(record)
        if not record.monitoring:
            self.metrics.count(record, self.pool.known_models)
            at = time.time()
            self.usage.count(record, at)
            self.history.add(record, at)

    def forget(self, client: ClientConnection) -> None:
        """Stop counting a connection that has ended."""
        if client in self.connections:
            self.connections.discard(client)
            self.per_peer -= Counter((client.peer,))

    async def drain(self) -> None:
        """Let what is under way finish: /status says so for drain_delay, the listener closes, answers may still end.

        Answers say from the beginning on that their connection closes. An idle one is closed after a grace, as its
        client may have sent a request that is on its way.
        """
        self.draining = True
        # Load balancers ask /status; until they know, new requests come.
        await asyncio.sleep(self.config.drain_delay)
        for listener in [listener for server in self.listeners for listener in server.sockets]:
            self.loop.remove_reader(listener)
        # asyncio drops a connection that it accepts in the turn before its server closes.
        await asyncio.sleep(0)
        self._stop_listening()
        await asyncio.sleep(ACCEPTED_S)
        tasks = [connection.task for connection in self.connections]
        if tasks and self.config.drain_delay < IDLE_GRACE_S:
            await asyncio.wait(tasks, timeout=IDLE_GRACE_S)
        for connection in list(self.connections):
            connection.retire()
        if tasks:
            await asyncio.wait(tasks, timeout=self.config.drain_timeout)

    async def close(self) -> None:
        """Cut what is left, and close everything. Streams end with an error event."""
        self.draining = self.relay.stopping = True
        self._stop_listening()
        # The second time for clients that do not take their last bytes.
        for _ in range(2):
            tasks = [connection.task for connection in self.connections]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=LAST_BYTES_S)
        if self.saver is not None and self.state is not None:
            self._save(levels=True)
            self.saver.cancel()
            await self.loop.run_in_executor(None, self.state.close, LAST_BYTES_S)
        self.models.close()
        self.pool.close()
        self.links.close()
        self.access.flush()

    # -- at the door

    def admit(self, call: Call) -> None:
        """Judge a request by its head: Host, Origin, client key, route. Raise ProxyError (401, 403, 404, 405, 415)."""
        head = call.head
        call.origin = self._check_host_and_origin(head)
        # This comes before the key, as browsers send preflights without one.
        if head.method == "OPTIONS":
            split_target(head.target)
            call.handler = "_options"
            return
        call.handler, call.path, call.query = find_route(head.method, head.target, self.config.endpoints)
        call.record.monitoring = call.handler in MONITORING
        if self.config.client_keys and not call.record.monitoring:
            call.key = self._check_key(head)
            call.record.key = call.key.name
        coding = head.index.get(b"content-encoding", b"identity")
        # A small compressed body may unpack to gigabytes.
        if coding.lower() != b"identity" and call.handler != "_object":
            message = "A compressed request body is not understood; send it plain."
            raise ProxyError(415, message, "unsupported_encoding")

    def _check_host_and_origin(self, head: RequestHead) -> bytes:
        """Return the Origin that may read the answer, or nothing. Raise ProxyError (403)."""
        # Host first: a page that has pointed its own name here sends no foreign Origin.
        host = head.index.get(b"host")
        if self.guards_host and host is not None and not self._host_allowed(host):
            message = f"The host {host.decode('latin-1')[:100]!r} is not known here; add it to allowed_hosts."
            raise ProxyError(403, message, "host_not_allowed")
        origin = head.index.get(b"origin")
        if not origin:
            return b""
        allowed = self.config.cors.allow_origins
        if "*" in allowed or origin.decode("latin-1") in allowed:
            return origin
        if self.guards_origin:
            message = f"Pages of {origin.decode('latin-1')[:100]!r} may not use this server; see cors.allow_origins."
            raise ProxyError(403, message, "origin_not_allowed")
        return b""

    def _host_allowed(self, value: bytes) -> bool:
        """Return whether a Host header names this server. The port does not matter: no page can choose the name."""
        name = value.decode("latin-1").strip().lower()
        bare = re.sub(r":[0-9]*\Z", "", name).strip("[]")
        allowed = self.config.allowed_hosts
        return bare == self.config.host or is_loopback(bare) or not {bare, name, "*"}.isdisjoint(allowed)

    def _check_key(self, head: RequestHead) -> ClientKey:
        """Return the client key of a request, in the header of OpenAI, Azure or Anthropic. Raise ProxyError (401)."""
        index = head.index
        shown = index.get(b"authorization", b"")
        if shown[:7].lower() == b"bearer ":
            shown = shown[7:].strip()
        else:
            shown = index.get(b"api-key") or index.get(b"x-api-key", b"")
        digest, match = hashlib.sha256(shown).digest(), None
        # All keys are compared, so the time reveals nothing.
        for key in self.config.client_keys:
            if hmac.compare_digest(digest, key.digest):
                match = key
        if match is None:
            message = (
                "Invalid API key: this gateway does not know it." if shown else "No API key was sent to this gateway."
            )
            raise ProxyError(401, message, "invalid_api_key", headers=b"WWW-Authenticate: Bearer\r\n")
        if match.expires is not None and time.time() >= match.expires.timestamp():
            message = f"The client key {match.name!r} expired at {match.expires.isoformat()}."
            raise ProxyError(401, message, "expired_api_key", headers=b"WWW-Authenticate: Bearer\r\n")
        return match

    def _check_admin(self, call: Call) -> None:
        """Raise ProxyError (401, 403) unless a client may see what operators see.

        It needs a key with `admin`. Without client_keys it must be on this machine, and no proxy may stand between.
        """
        if self.config.client_keys:
            if not self._check_key(call.head).admin:
                message = "This key may not see the server's state; use a client key with admin: true."
                raise ProxyError(403, message, "admin_required")
        elif not is_loopback(call.record.client) or not FORWARDED_FIELDS.isdisjoint(call.head.index):
            message = "The server's state is shown to this machine only; configure a client key with admin: true."
            raise ProxyError(403, message, "admin_required")

    # -- handlers

    async def _options(self, call: Call) -> Answer:
        """Return the answer to a CORS preflight, or to the plain question which methods are allowed."""
        lines = b"Allow: GET, HEAD, POST, OPTIONS\r\n"
        # The page is allowed. The routes decide which paths are open.
        if call.origin:
            index = call.head.index
            method = index.get(b"access-control-request-method", b"GET, POST")
            asked = index.get(b"access-control-request-headers", b"*")
            lines += b"Access-Control-Allow-Methods: %b\r\nAccess-Control-Max-Age: 600\r\n" % method
            lines += b"Access-Control-Allow-Headers: %b\r\n" % asked
        return json_answer(None, 204, lines)

    async def _status(self, call: Call) -> Answer:
        """Return the server's status. Load balancers have no key; the verbose form needs one."""
        status: dict[str, Any] = {"status": "draining" if self.draining else "ok"}
        asked = call.query.split("&")
        if "ready=1" in asked:
            now = self.loop.time()
            wells = [one.gate.opens_at(now) or one.quota.gate.opens_at(now) for one in self.pool.upstreams]
            status["ready"] = not (self.draining or all(wells))
        if "verbose=1" in asked:
            self._check_admin(call)
            status.update(describe_pool(self.pool, self.loop.time()), connections=len(self.connections))
            if "history=1" in asked:
                names, at = [upstream.name for upstream in self.pool.upstreams], time.time()
                today = [(*row, *sums) for row, sums in self.usage.rows.items() if row[0] == day_of(at)]
                status["history"] = self.history.describe(names, at)
                status["usage_today"] = group_usage(today, ["key"])
            status["source"] = self.config.source
            status["settings"] = {path: show_setting(path, value) for path, value, _ in settings_of(self.config)}
            status["upstream_connections"] = {"idle": self.links.idle_count, "active": len(self.links.active)}
        return json_answer(status, 503 if self.draining or status.get("ready") is False else 200)

    async def _metrics(self, call: Call) -> Answer:
        """Return the metrics for Prometheus."""
        self._check_admin(call)
        text = self.metrics.render(self.pool, self.links, len(self.connections)).encode()
        return Answer(200, DATE % http_date(time.time()) + METRICS_TYPE, text, len(text))

    async def _page(self, call: Call) -> Answer:
        """Return the page for browsers; a short text for curl. It holds no data, so it needs no key."""
        if b"text/html" in call.head.index.get(b"accept", b""):
            body, lines = PAGE.encode(), PAGE_HEADERS
        else:
            body, lines = PAGE_TEXT.encode(), b"Content-Type: text/plain; charset=utf-8\r\n"
        return Answer(200, DATE % http_date(time.time()) + lines, body, len(body))

    async def _reload(self, call: Call) -> Answer:
        """Read the configuration again; return what has changed."""
        self._check_admin(call)
        try:
            return json_answer({"changed": self.reload()})
        except ConfigError as error:
            raise ProxyError(400, str(error), "invalid_configuration") from None

    async def _usage(self, call: Call) -> Answer:
        """Return the usage since a day, by some columns. With a state_file it has the time before the start, too."""
        self._check_admin(call)
        query = dict(urllib.parse.parse_qsl(call.query))
        try:
            first_day, columns = parse_usage_query(query.get("since", "30d"), query.get("by", "key,model"), time.time())
        except ValueError as error:
            message = f"since is 7d or a day such as 2026-12-01, by is a list of columns: {error}"
            raise ProxyError(400, message, "invalid_query") from None
        rows: list[tuple[Any, ...]] = [(*row, *sums) for row, sums in self.usage.rows.items() if row[0] >= first_day]
        if self.state is not None:
            self.state.save(self.usage.take_changes(), {})
            try:
                rows = await self.loop.run_in_executor(None, self.state.read, first_day)
            except (sqlite3.Error, OSError) as error:
                log.warning("state_file %s: cannot be read: %s", self.state.path, reason_of(error))
        return json_answer({"since": first_day, "by": columns, "data": group_usage(rows, columns)})

    def _request(self, call: Call) -> ApiRequest:
        """Return the request that controllers get for a call."""
        request = ApiRequest(call.head.method, call.path, call.query, call.head.lines, call.body)
        request.request_id, call.body = call.record.request_id, b""
        return request

    async def _chat(self, call: Call) -> Answer:
        """Answer a chat completion."""
        request = self._request(call)
        data, request.body = parse_chat(request.body)
        request.lines = json_lines(call.head)
        request.data, request.model, request.stream = data, data["model"], data.get("stream") is True
        # A chat is stored only if the client asks for it.
        request.stateful = data.get("store") is True
        request.prompt_tokens, request.max_tokens = estimate_prompt(data), answer_limit(data)
        return await self._relay(call, request)

    async def _infer(self, call: Call) -> Answer:
        """Answer completions, embeddings, responses, moderations, images and audio."""
        request, kind = self._request(call), call.head.index.get(b"content-type", b"")
        if request.path in FORMS and not is_json(kind):
            read_form(request, kind, INFERENCE[request.path])
            return await self._relay(call, request)
        request.lines = json_lines(call.head)
        read_input(request, INFERENCE[request.path])
        if request.path.startswith("/responses"):
            previous = request.data.get("previous_response_id")
            # The account that made the response has the conversation.
            if isinstance(previous, str):
                request.pinned = self.relay.makers.get(previous) or self._home()
            elif any(request.body.find(word) >= 0 for word in REFERENCES):
                request.pinned = self._maker(request, [])
        return await self._relay(call, request)

    async def _object(self, call: Call) -> Answer:
        """Pass a call about files, batches, stored responses and the like to the account where they live.

        What inference made stays where it was made, as long as that is remembered. All else lives in one controller.
        """
        request = self._request(call)
        names = [urllib.parse.unquote(name) for name in request.path.split("/")[2:]]
        request.inference, request.stateful = False, request.method not in ("GET", "HEAD")
        request.pinned = self._maker(request, names) or self._home()
        return await self._relay(call, request)

    def _maker(self, request: ApiRequest, names: list[str]) -> str:
        """Return the controller that made the first remembered object of `names` or of the body; or nothing."""
        makers = self.relay.makers
        if not makers:
            return ""
        body = request.body[:WHOLE_BYTES]
        found = re.findall(rb'"encrypted_content"\s*:\s*"([^"\\]{4,64})|"([\w\-]{4,128})"', body)
        owners = [makers.get(name, "") for name in (*names, *[b"".join(item).decode("latin-1") for item in found])]
        known = {upstream.name for upstream in self.pool.upstreams}
        return next((owner for owner in owners if owner in known), "")

    def _home(self) -> str:
        """Return the controller of objects that no model made: the one with `objects`, else the first that can."""
        able = [upstream for upstream in self.pool.upstreams if not upstream.controller.chat_only]
        marked = [upstream for upstream in able if upstream.config.objects]
        return next((upstream.name for upstream in (*marked, *able)), "")

    async def _relay(self, call: Call, request: ApiRequest) -> Answer:
        """Check a request against its client key, and return the pool's answer. Raise ProxyError (403, 429)."""
        call.record.model = request.model[:MODEL_NAME_CHARS]
        request.wait_s = longest_wait(call.head.index, self.config.pool.max_wait)
        if call.key is not None:
            check_model_allowed(call.key, request)
            if request.inference and call.key.budget != Budget():
                self.usage.check_budget(call.key, time.time())
            request.key = call.key.name
            quota = self.client_quotas.get(call.key.name)
            if quota is not None:
                self.pool.estimate(request)
                try:
                    need = request.need if request.inference else 0
                    charge = call.charge = quota.enter(need, self.loop.time())
                except NoRoom as full:
                    message = f"The client key {request.key!r} {full.why} on this gateway."
                    fields = retry_fields(full.after_s)
                    raise ProxyError(429, message, "rate_limit_exceeded", headers=fields) from None
                call.request = request
                if (quota.limits.tpm or quota.limits.tpd) and request.inference:
                    request.on_usage = lambda total: charge.used(total, self.loop.time())
        return await self.relay.run(request, call.record)

    async def _list_models(self, call: Call) -> Answer:
        """Return all models that the client's key may use."""
        models = await self.models.all()
        if call.key is not None and call.key.models:
            allowed = model_patterns(call.key.models)
            models = [model for model in models if allowed.fullmatch(model["id"])]
        return json_answer({"object": "list", "data": models})

    async def _show_model(self, call: Call) -> Answer:
        """Return one model. Ask a controller where no list has it: previews and tuned models are often left out."""
        name = call.path[len("/models/") :]
        for model in await self.models.all():
            if model["id"] == name:
                return json_answer(model)
        upstreams = [candidate.upstream for candidate in self.pool.candidates(name)]
        if _NOT_PLAIN.search("/" + name) or not any(
            is_open_ended(one.config) and not one.controller.chat_only for one in upstreams
        ):
            raise ProxyError(404, f"No controller here serves the model {name[:100]!r}.", "model_not_found")
        request = self._request(call)
        request.path, request.query = "/models/" + urllib.parse.quote(name, safe="/:"), ""
        request.model, request.inference = name, False
        return await self._relay(call, request)


# ==== 17. Command line ====
# Flags, start, signals, exit status: 0 after a drain, 2 for a configuration that cannot be used, 1 for an address that
# cannot be listened on, for output that cannot be written, and after a second signal.

# Threads for DNS lookups. asyncio has 6 on a small machine; a dead resolver would hold each of them for up to 30 s, and
# no other name could be looked up.
LOOKUP_THREADS = 64
FIRST_SOCKET = 3  # the number of the first file that systemd passes on (SD_LISTEN_FDS_START)
PROBE_TIMEOUT_S = 30.0
PROBE_MODEL = "gpt-4.1-mini"  # for --probe=chat, where neither `models` nor the account's list names another
STORM_CLIENTS = 12
EXAMPLE = """# chatgpt-apiserver.toml. Check it with: python3 chatgpt_apiserver.py -c chatgpt-apiserver.toml --check
host = "127.0.0.1"            # "0.0.0.0" is every address; then client_keys should be set
port = 8080
# state_file = "state.sqlite" # usage, and what a restart should not forget

[pool]
type = "balanced"             # in turn by weight; or least_busy, fastest, priority, random
max_wait = 30                 # how long a request may wait for room, in seconds
# aliases = { fast = "gpt-4.1-mini" }
# fallbacks = { "gpt-4.1" = ["gpt-4.1-mini"] }

# Keys for your own users. Make one with: python3 chatgpt_apiserver.py --new-key alice
# [[client_keys]]
# name = "alice"
# key = "sha256:..."
# limits = { rpm = 60 }

[[controllers]]
name = "team-a"
config = { api_key = "sk-replace-this-key-a" }  # or "$OPENAI_API_KEY", or "file:/run/secrets/openai"
limits = { rpm = 500, tpm = 200_000 }           # leave them out to learn them from the answers

[[controllers]]
name = "team-b"
config = { api_key = "sk-replace-this-key-b" }
weight = 2                    # twice as many requests as team-a

[[controllers]]
name = "local"
models = ["llama-*"]
config = { base_url = "http://127.0.0.1:11434/v1" }"""
HEALTH_TIMEOUT_S = 4.0  # for --healthcheck; Docker waits 5 s in the image
FEW_OPEN_FILES = 1000  # below this limit a warning says how many clients can be served
DEMO_BODY = '{"model": "echo", "stream": true, "messages": [{"role": "user", "content": "hello"}]}'


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """Return the flags and the text of --help. Raise ConfigError for a mistake."""
    parser = argparse.ArgumentParser("chatgpt_apiserver.py", "%(prog)s [flags]", add_help=False, exit_on_error=False)
    parser.description, parser.allow_abbrev = "Several rate-limited OpenAI-style accounts behind one endpoint.", False
    add = parser.add_argument
    names = ("-c", "--config", "--config_file", "--config-file")
    add(*names, metavar="FILE", dest="config_file", default="", help="the configuration file")
    add("--config_path", "--config-path", metavar="DIR", default="", help="a folder to look for it in")
    add("--host", help="address to listen on (default: 127.0.0.1)")
    add("--port", help="port to listen on (default: 8080)")
    add("--usage", action="store_true", help="print the usage in the state_file; see --since and --by")
    add("--since", metavar="7d", default="30d", help="for --usage: so many days, or the first day (default: 30d)")
    add("--by", metavar="key,model", default="key,model", help="for --usage: columns of day, key, controller, model")
    add("--healthcheck", action="store_true", help="ask the running server for its status, exit 0 if it is well")
    add("--check", action="store_true", help="check the configuration, print a summary, exit")
    add("--diff", action="store_true", help="with --check: what a reload of the running server would change")
    add("--probe", nargs="?", const="models", choices=("models", "chat"), help="ask every account, print a table")
    add("--example", action="store_true", help="print a configuration with comments (TOML)")
    add("--new-key", metavar="NAME", help="print a new client key, and its line for the configuration")
    about = "run without any key: two controllers that echo; storm: limited accounts under load, see the page"
    add("--demo", nargs="?", const="echo", default="", choices=("echo", "storm"), help=about)
    add("--version", action="store_true", help="print the version, exit")
    add("-h", "--help", action="store_true", help="print this, exit")
    try:
        flags, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; --help shows every flag") from None
    if rest:
        hint = suggest(rest[0].partition("=")[0], ["--" + name for name in vars(flags)])
        raise ConfigError(f"unknown argument {rest[0]!r}; {hint or '--help shows every flag'}")
    return flags, parser.format_help()


def raise_open_files() -> None:
    """Raise the limit on open files as far as allowed, and warn where it stays small."""
    # The usual 1024 protects programs that use select(), which cannot take more. This one does not use it.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):
        # A Mac reports "no limit" and then refuses to set it.
        pass
    if 0 <= soft < FEW_OPEN_FILES:
        # Each client takes two files, its own and its upstream's.
        clients = max(soft - 40, 0) // 2
        log.warning("only %d open files are allowed, enough for about %d clients at once (ulimit -n)", soft, clients)


def inherited_sockets(env: Mapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that systemd opened for this process (sd_listen_fds(3)). Raise ConfigError."""
    count = env.get("LISTEN_FDS", "")
    if env.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for number in range(FIRST_SOCKET, FIRST_SOCKET + int(count)):
        try:
            listener = socket.socket(fileno=number)
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError(errno.EINVAL, "it does not listen")
        except OSError as error:
            message = (
                f"LISTEN_FDS: file {number} cannot be used: {reason_of(error)}; the socket unit needs ListenStream="
            )
            raise ConfigError(message) from error
        # asyncio makes it non-blocking. Child processes must not inherit it.
        listener.set_inheritable(False)
        sockets.append(listener)
    return sockets


def notify_manager(env: Mapping[str, str], state: str) -> None:
    """Tell systemd the state of this service (sd_notify(3)). Without systemd this does nothing."""
    address = env.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # A name that begins with @ is an abstract one.
    address = "\0" + address[1:] if address[0] == "@" else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.sendto(state.encode(), address)
    except OSError as error:
        log.warning("systemd cannot be told %r: %s", state, reason_of(error))


def feed_watchdog(loop: asyncio.AbstractEventLoop, env: Mapping[str, str]) -> None:
    """Tell systemd's watchdog, twice in its interval, that the event loop still runs."""
    if env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()) and env.get("WATCHDOG_USEC", "").isdigit():
        notify_manager(env, "WATCHDOG=1")
        loop.call_later(int(env["WATCHDOG_USEC"]) / 2e6, feed_watchdog, loop, env)


def reopen_log(server: Server) -> None:
    """Open the file of the log again, after it was renamed. The old file is kept if that fails."""
    try:
        open_log(server.config)
    except ConfigError as error:
        log.error("%s", error)


def leave(status: int) -> NoReturn:
    """Write what is left of the log and end the process."""
    # A slow reader of the log has so many milliseconds for each piece.
    log_writer.send(200)
    # A normal exit would wait for a lookup thread that hangs on a dead resolver.
    os._exit(status)


async def storm_client(host: str, port: int) -> None:
    """Send one streamed chat after another, with pauses, until cancelled."""
    words = "Ten rate-limited accounts behave like one that never says 429 while any of them has room.".split()
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                text = " ".join(words[: random.randint(3, len(words))])
                data = {"model": "gpt-demo", "stream": True, "messages": [{"role": "user", "content": text}]}
                body = compact_json(data)
                head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                writer.write(head + JSON_TYPE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                await reader.read()
            finally:
                writer.close()
        except OSError as error:
            log.debug("storm: %s", reason_of(error))
        await asyncio.sleep(random.uniform(0.2, 1.0))


async def run_storm(host: str, port: int) -> None:
    """Put the server under a load that its accounts can hardly bear."""
    log.info("storm: %d clients send chats to three limited accounts and a failing one; Ctrl-C ends it", STORM_CLIENTS)
    await asyncio.gather(*[storm_client(host, port) for _ in range(STORM_CLIENTS)])


async def serve(config: Config, load: Callable[[], Config], inherited: Sequence[socket.socket]) -> NoReturn:
    """Run the server until a signal stops it; SIGHUP makes it `load` the configuration again."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS))
    server = Server(config, loop, load)
    stop = asyncio.Event()
    drain: list[asyncio.Task[None]] = []

    def on_stop() -> None:
        if drain:
            log.warning("second signal: closing now")
            drain[0].cancel()
        notify_manager(os.environ, "STOPPING=1")
        stop.set()

    def on_reload() -> None:
        # systemd waits for READY and compares the time with that of its signal.
        notify_manager(os.environ, f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        with contextlib.suppress(ConfigError):  # it was logged
            server.reload()
        notify_manager(os.environ, "READY=1")

    # Before the listener: a supervisor may signal as soon as it can connect. What came earlier is handled now.
    loop.add_signal_handler(signal.SIGINT, on_stop)
    loop.add_signal_handler(signal.SIGTERM, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_reload)
    loop.add_signal_handler(signal.SIGUSR1, reopen_log, server)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    raise_open_files()
    try:
        addresses = await server.start(inherited)
    except (OSError, UnicodeError) as error:
        # UnicodeError comes from a name that DNS cannot hold.
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "the port is in use; choose another with --port" if in_use else reason_of(error)
        log.error("cannot listen on %s:%d: %s", mask_keys(config.host), config.port, reason)
        leave(1)
    for host, port in addresses:
        log.info("listening on %s", url_of(config, host, port) if port else host)
        if config.source.startswith("--demo"):
            log.info("see it: %s/ in a browser", url_of(config, host, port))
            log.info("try it: curl -N %s/v1/chat/completions -d '%s'", url_of(config, host, port), DEMO_BODY)
    notify_manager(os.environ, "READY=1")
    feed_watchdog(loop, os.environ)
    if config.source == "--demo=storm":
        show = loop.create_task(run_storm(*addresses[0]))
        await stop.wait()
        show.cancel()
    await stop.wait()
    open_count, wait_s = len(server.connections), server.config.drain_delay + server.config.drain_timeout
    log.info("stopping: %d connections open; waiting up to %g s, a second signal ends it now", open_count, wait_s)
    drain.append(loop.create_task(server.drain()))
    await asyncio.wait(drain)
    await server.close()
    log.info("stopped")
    leave(1 if drain[0].cancelled() else 0)


def tell(text: str, status: int = 0) -> int:
    """Print a result, or an error where `status` is not 0; return the exit status."""
    try:
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
    except (OSError, UnicodeError):
        # The reader has left, as with `| head -1`, or the disk is full. A normal exit would try to write once more.
        os._exit(status or 1)
    return status


def new_key(name: str) -> str:
    """Return a new client key, and what the configuration needs of it."""
    key = "sk-" + secrets.token_urlsafe(32)
    member = {"name": name, "key": "sha256:" + hashlib.sha256(key.encode()).hexdigest()}
    return f"{key}\nIt is shown only once. Into client_keys of the configuration:\n{json.dumps(member)}"


def ask_running(config: Config, path: str) -> tuple[int, str]:
    """Return status and body of a running server's answer to GET `path`. Raise OSError, http.client.HTTPException."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.host, config.host)
    connection = http.client.HTTPConnection(host, config.port, timeout=HEALTH_TIMEOUT_S)
    if config.tls.cert:
        # The certificate has the outside name, and the question stays on this machine.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, config.port, timeout=HEALTH_TIMEOUT_S, context=context)
    key = os.environ.get(ENV_PREFIX + "ADMIN_KEY")
    try:
        connection.request("GET", path, headers={"Authorization": "Bearer " + key} if key else {})
        reply = connection.getresponse()
        return reply.status, reply.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"no answer from {url_of(config, host, config.port)}: {reason_of(error)}") from error
    finally:
        connection.close()


def check_health(config: Config) -> int:
    """Ask the running server for its status; return the exit status, 0 if it answers with 200."""
    try:
        status, text = ask_running(config, "/status")
    except ConfigError as error:
        return tell(str(error), 1)
    return tell(text, 0 if status == 200 else 1)


def show_difference(config: Config) -> int:
    """Print what a reload of the running server would change; return the exit status.

    A secret that changes shows only if its last four characters change.
    """
    status, text = ask_running(config, "/status?verbose=1")
    if status != 200:
        hint = f"set {ENV_PREFIX}ADMIN_KEY to a client key with admin: true"
        raise ConfigError(f"the running server does not show its settings (status {status}); {hint}")
    running = json.loads(text)["settings"]
    new = {path: show_setting(path, value) for path, value, _ in settings_of(config)}
    lines = [
        f"{path}: {running.get(path, 'none')} -> {new.get(path, 'none')}{needs_restart(path)}"
        for path in {**running, **new}
        if running.get(path) != new.get(path)
    ]
    return tell("\n".join(lines) or "a reload would change nothing")


def format_table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Return lines with aligned columns: the first `texts` to the left, the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[f"{cell:{'<' if n < texts else '>'}{widths[n]}}" for n, cell in enumerate(row)] for row in rows]
    return ["  ".join(row).rstrip() for row in aligned]


async def ask_account(upstream: Upstream, links: ConnectionPool, model: str) -> tuple[str, str, list[str]]:
    """Ask an account for its models, or with a `model` for one token.

    Return what came of it ("ok" or the reason), what its limits leave, and the models that it lists.
    """
    request = ApiRequest("GET", "/models", "", b"Accept: application/json\r\n", b"")
    if model:
        data = {"model": model, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 1}
        request = ApiRequest("POST", CHAT_PATH, "", JSON_TYPE, compact_json(data))
        request.data, request.model = data, model
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            exchange = upstream.controller.exchange(request, links, ignore_write, True)
            try:
                await exchange.start()
                body = await read_all(exchange, LIST_BYTES)
            finally:
                exchange.abort()
    except (UpstreamError, Untranslatable, TimeoutError) as error:
        return f"not reachable: {str(error) or 'no answer in time'}", "-", []
    status, index = exchange.head.status, exchange.head.index
    told = [allowance for allowance in read_allowances(index, time.time) if allowance is not None]
    limits = ", ".join([f"{one.remaining:g} of {one.limit:g}" for one in told]) or "-"
    if status >= 300:
        verdict = judge_reply(status, index, body, request, frozenset(), time.time())
        return f"{status} {verdict.outcome.value}: {verdict.message[:100]}", limits, []
    try:
        value = {} if model else json.loads(body)
        listed = value if isinstance(value, list) else value.get("data", ())
        return "ok", limits, [str(one["id"]) for one in listed]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "no list of models", limits, []


async def probe_account(upstream: Upstream, links: ConnectionPool, chat: bool) -> tuple[str, str, str, str]:
    """Return a row of the table: time, limits, number of models, result."""
    since = time.monotonic()
    names = [name for name in upstream.config.models if {"*", "?"}.isdisjoint(name)]
    result, limits, listed = "ok", "-", list[str]()
    # An echo controller has no list.
    if not (chat and names) and upstream.config.type != "echo":
        result, limits, listed = await ask_account(upstream, links, "")
    if chat and result == "ok":
        model = PROBE_MODEL if PROBE_MODEL in listed or not listed else listed[0]
        result, limits, _ = await ask_account(upstream, links, names[0] if names else model)
    return f"{(time.monotonic() - since) * 1e3:.0f} ms", limits, str(len(listed) or "-"), redactor.clean(result)


async def probe_accounts(config: Config, chat: bool) -> int:
    """Ask every account at once, and print a table; return the exit status, 0 if each has answered well."""
    redactor.watch(secrets_of(config))
    pool, links = UpstreamPool([], config.pool, asyncio.get_running_loop()), ConnectionPool()
    rebuild_pool(pool, config)
    rows = await asyncio.gather(*[probe_account(upstream, links, chat) for upstream in pool.upstreams])
    links.close()
    pool.close()
    named = [(upstream.name, *row) for upstream, row in zip(pool.upstreams, rows, strict=True)]
    tell("\n".join(format_table([("account", "time", "limits left", "models", "result"), *named], 5)))
    return 0 if all(row[-1] == "ok" for row in rows) else 1


def show_usage(config: Config, since: str, by: str) -> int:
    """Print a table of the usage in the state_file; return the exit status."""
    if not config.state_file:
        return tell("--usage needs a state_file in the configuration; a running server without one has GET /usage", 2)
    path = path_beside(config.source, config.state_file)
    try:
        first_day, columns = parse_usage_query(since, by, time.time())
        groups = group_usage(read_usage_file(path, first_day), columns)
    except ValueError as error:
        return tell(f"--since is 7d or a day such as 2026-12-01, --by is a list of columns: {error}", 2)
    except sqlite3.Error as error:
        return tell(f"state_file {path}: cannot be read: {error}", 1)
    total = {**dict.fromkeys(columns, ""), columns[0]: "total"}
    total.update({name: sum(group[name] for group in groups) for name in USAGE_SUMS})
    rows = [[*columns, *USAGE_SUMS]]
    for group in (*groups, total):
        texts = [plain(group[name]) or "-" if group is not total else group[name] for name in columns]
        rows.append([*texts, *[f"{group[name]:,}" for name in USAGE_SUMS[:-1]], f"{group['cost']:,.4f}"])
    lines = format_table(rows, len(columns))
    return tell("\n".join([f"since {first_day} (UTC)", *lines]))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status. Mistakes of the user are one message, never a traceback."""
    try:
        flags, usage = parse_flags(sys.argv[1:] if argv is None else argv)
        if flags.help or flags.version:
            return tell(usage if flags.help else "chatgpt_apiserver " + __version__)
        if flags.example:
            return tell(EXAMPLE)
        if flags.new_key is not None:
            return tell(new_key(flags.new_key))

        inherited = inherited_sockets(os.environ)

        def load() -> Config:
            overrides = {"host": flags.host, "port": flags.port}
            config = load_config(flags.config_file, flags.config_path, overrides, os.environ, flags.demo)
            if inherited and inherited[0].family != socket.AF_UNIX:
                host, port = address_of(inherited[0])
                config = replace(config, host=host, port=port)
            if config.tls.cert:
                # A certificate may have been replaced, and its key not yet.
                server_tls(config)
            return config

        config = load()
        if flags.usage:
            return show_usage(config, flags.since, flags.by)
        if flags.healthcheck:
            return check_health(config)
        warnings = warnings_of(config)
        if flags.diff:
            return show_difference(config)
        if flags.check:
            lines = ["configuration OK", *describe(config), "address: " + url_of(config, config.host, config.port)]
            return tell("\n".join([*lines, *["warning: " + warning for warning in warnings]]))
        if flags.probe:
            return asyncio.run(probe_accounts(config, flags.probe == "chat"))
        set_up_logging(config)
        for line in describe(config):
            log.info("%s", line)
        for warning in warnings:
            log.warning("%s", warning)
        asyncio.run(serve(config, load, inherited))
    except ConfigError as error:
        return tell(str(error), 2)


if __name__ == "__main__":
    sys.exit(main())
