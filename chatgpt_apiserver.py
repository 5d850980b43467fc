#!/usr/bin/env python3
"""chatgpt_apiserver: several rate-limited OpenAI-style accounts behind one endpoint.

Copy this file to a machine that has Python 3.11 or newer, start it, and point any OpenAI client at it:

    python3 chatgpt_apiserver.py --demo                     (no key needed: answers by echoing)
    OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py      (one account, from the environment)
    python3 chatgpt_apiserver.py --config_file my.json      (many accounts; README.md has every key)

The way of a request, top to bottom, and the sections of this file that it passes:

    client --> Server: read head and body, doors, route                        (4, 6, 14)
           --> Relay: one attempt after the other until one answers            (13)
                 --> Balancing: who has room now? nobody: wait in line         (11, 12)
                 --> Controllers: what this account's request looks like       (8, 9)
                 --> Upstream connections: a pooled or fresh connection        (7)
                 --> Outcomes: what did it say, may another be asked?          (10)
           <-- Relay: hold until the first real event, then every byte at once (5, 13)

Each section uses only what stands above it:

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
    14. Server
    15. Command line
"""

import sys

if sys.version_info < (3, 11):  # before the imports that older versions lack
    sys.exit("chatgpt_apiserver needs Python 3.11 or newer; this is Python %d.%d" % sys.version_info[:2])

import gc

if __name__ == "__main__":
    gc.disable()  # until `serve` has started: nothing is garbage yet, and looking for it takes 4 ms

import asyncio
import asyncio.sslproto
import base64
import enum
import functools
import getopt
import json
import logging
import math
import operator
import os
import random
import re
import select
import signal
import socket
import ssl
import stat
import struct
import time
import traceback
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, Self, dataclass_transform

__version__ = "1.0.0"

# Limits that are no configuration keys. Those that users may set stand in section 2 with their defaults.
# What a message may be. Each bound stands for memory or time that a peer could otherwise take without end; most servers
# have had their CVE for the lack of one.
START_LINE_BYTES = 8192  # RFC 9112, 3 recommends at least 8000 octets for a request line
REPLAYED_BYTES = 1_048_576  # of an upload are kept to ask another controller with; the rest passes through
FORM_VALUE_BYTES = 256  # a form's text field that is looked into: a model's name
FORM_HEAD_BYTES = 8192  # the head of one part of a form
FORM_BOUNDARIES = 1000  # in one form, real ones or not: each takes some microseconds
# Commas and brackets in a body. A value takes 20 times its bytes when it is parsed, at worst; embeddings take arrays of
# 300,000 tokens, and no model reads a text with as many as this.
JSON_VALUES = 1_000_000
COUNTED_BYTES = 4096  # brackets are counted in bodies up to this size
JSON_DEPTH = 128  # objects and lists in one another; schemas of tools stay below 30
FIELD_COUNT = 100  # header fields of one message; nginx and Apache stop near this too
HOST_BYTES = 300  # a name has at most 255 (RFC 1035), a port five digits
# What is remembered of messages, as clients and upstreams repeat themselves to the byte.
PIECES = 64  # of a body that are kept apart; joining them once costs least
KNOWN_LINES = 1024  # header lines that are remembered on each side, of at most
KNOWN_HEAD_BYTES = 2048  # a connection's last request head is remembered up to this size
KNOWN_LINE_BYTES = 256  # this many bytes: half a megabyte in all
# Chunked bodies (RFC 9112, 7.1) and replies.
CHUNK_LINE_BYTES = 256  # unless configured: a chunk-size line with its extensions, which nobody needs
TRAILER_BYTES = 8192  # the trailer section is read and dropped
UPSTREAM_HEAD_BYTES = 65536  # a reply's head; real ones stay below 8 kB
INFORMATIONAL_MAX = 16  # 1xx replies before the final one; more is an upstream gone mad
# How much is read, kept and sent at once.
READ_BYTES = 65536  # asked of the kernel at once, and half of what a reader keeps before it stops the peer
OUTBOX_BYTES = 16384  # larger writes leave at once
JOINED_BYTES = 262_144  # a request's body up to this size is written in one piece with its head
WRITE_HIGH_BYTES = 65536  # unsent bytes to one peer above which nothing more is read for it
TLS_BUFFER_BYTES = 32768  # asyncio's own 256 kB for each TLS connection is most of what an idle one costs
# What is held back before a client sees any of it: until then another account may be asked.
WHOLE_BYTES = 1_048_576  # a whole answer up to this size is collected before its head goes out, and can be replayed
HOLD_BYTES = 65536  # what may come before the first real event of a stream
HOLD_S = 15.0  # and for how long it is kept
UNWANTED_S = 1.0  # for a connect that nobody waits for any more to end by itself, so that its socket can be closed
LINE_BYTES = 256  # of an event that has left in part are kept, in case the rest makes it an error
EVENT_BYTES = 1_048_576  # one event that is looked into; a larger one counts as real unseen
# Connections to upstreams.
IDLE_UPSTREAM_S = 55.0  # a pooled connection is closed after this; servers commonly close after 60 s
IDLE_UPSTREAM_COUNT = 1024  # pooled connections, of all origins; each is an open file
STALE_S = 1.0  # a pooled connection that dies this soon after the write had been closed before it
# Connections of clients: how they begin and end.
BACKLOG = 4096  # connections that the kernel completes before they are accepted
LINGER_S = 2.0  # how long a client may go on sending after our side is closed
LINGER_BYTES = 1_048_576  # and how much
FLUSH_FIRST_S, FLUSH_MOST_S = 0.01, 1.0  # between two looks at whether a closing connection has sent all
SKIP_BYTES, SKIP_S = 65536, 1.0  # a body that nobody wants is read to its end if it is this small and soon over
PROBE_S = 0.05  # between the two interim replies that tell a half-closed client from one that left
# What is known of models and of requests before their answers tell.
MODELS_TTL_S = 300.0  # how long an upstream's model list is believed
MODELS_TIMEOUT_S = 10.0  # for asking it
INPUT_DEPTH = 8  # nesting of an input that is looked into for its text
LIST_BYTES = 8_388_608  # one account's list of objects; /v1/files has up to 10,000 entries
PAGES_KNOWN = 1000  # ends of merged pages, behind which the next one begins
OBJECTS_KNOWN = 10_000  # ids of files, batches, responses ... whose controller is remembered
TOKENS_PER_PART = 1000  # an image, audio or file part in the token estimate; never the length of a data URL
TOKENS_ANSWER = 500  # what an answer is taken to need while nothing is known of the model
MODEL_NAME_CHARS = 256  # longer names are not looked up
# The log.
FLUSH_S = 0.01  # access lines wait this long for company
LOG_KEPT_BYTES = 262_144  # of the log for a pipe whose reader is slow; 1,700 lines
LOG_LAST_MS = 200  # at the end such a reader may take this long for each piece
# Who gets in, who waits, and who goes where.
USAGE_BYTES = 4096  # the end of an answer, where its usage stands
RESERVE_CONNECTIONS = 16  # above the bound, so that /status still answers
SPARE_FILES = 48  # descriptors for the reserve and for what is no connection
RESERVE_S = 1.0  # and this long each may take to ask for it, as others wait for the place
PEER_CONNECTIONS = 256  # of one public address, where nothing is configured
PATIENCE_S = 2.0  # a client is answered this long before it gives up
KEY_BUSY_S = 1.0  # a client key whose requests are all under way is told to come again after this
AFFINE_TOKENS = 1000  # 4,000 characters; providers cache no shorter prompts
AFFINE_CHARS = 1024  # at least so many, spread over a longer text, tell a conversation from others
AFFINE_LOAD = 1.25  # times its share: more in flight goes elsewhere
MEMORY_MODELS = 256  # models of which one controller's ledger is kept; the least recently used goes first

log = logging.getLogger("chatgpt_apiserver")


# ==== 1. Errors ====
# Every way to fail, with what a client is told. `error_body` is the only place that turns an error into JSON. Upstream
# errors say nothing of retries: section 10 judges them, in one function.


class ProxyError(Exception):
    """An answer that this server gives itself.

    HTTP status, OpenAI-style code and message, the parameter that is at fault, extra header lines with their CRLF.
    """

    def __init__(
        self, status: int, message: str, code: "str | None" = None, *, param: "str | None" = None, headers: bytes = b""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def type(self) -> str:
        """The `error.type` that OpenAI uses for this status."""
        # Not the SDKs, which go by the status, but the frameworks above them tell errors apart by this word.
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"


class BadMessage(ProxyError):
    """A message that HTTP's grammar or our limits forbid; the connection cannot go on (RFC 9112, 9.6)."""


class Untranslatable(ProxyError):
    """A request that one account has no words for. `field`: the path of what is at fault, `why` the reason.

    Nothing was sent and nobody is to blame: the next controller is asked, whatever its type, as even one of the same
    may have other `drop_params`. Where none can say it the client gets this error.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(400, "%s %s" % (field, why), "unsupported_parameter", param=field)
        self.field, self.why = field, why


# What follows is about upstreams: one class for each thing that section 10 must tell apart. What an upstream said (a
# status, a body) is a reply and no exception.
class UpstreamError(Exception):
    """An attempt that brought no answer.

    `sent`: whether the upstream may have seen the request. `early`: whether it failed before any byte of the reply.
    `status` and `code` are what a client is told when nobody else answers either.
    """

    # 502 and 504 are what SDKs retry and what a load balancer in front counts as ours to mend (RFC 9110, 15.6.3).
    status = 502
    code = "upstream_error"
    sent = True

    def __init__(self, message: str, early: bool = False) -> None:
        super().__init__(message)
        self.early = early


class ConnectFailed(UpstreamError):
    """No connection: DNS, TCP, TLS or the proxy in between. Nothing of the request was sent."""

    code = "upstream_unreachable"
    sent = False


class UpstreamClosed(UpstreamError):
    """The upstream closed or reset the connection."""

    code = "upstream_closed"


class UpstreamTimeout(UpstreamError):
    """The upstream stayed silent for too long."""

    status = 504
    code = "upstream_timeout"


class BadReply(UpstreamError):
    """The upstream's reply breaks HTTP or a limit."""

    code = "upstream_bad_reply"


class ClientGone(Exception):
    """The client closed its connection while it was being served. Nobody is to blame, and nobody is told."""


def error_object(message: str, kind: str, code: "str | None" = None, param: "str | None" = None) -> "dict[str, Any]":
    """The error object of OpenAI's API; all four keys are always there (openai-openapi, `Error`)."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def compact_json(value: "Any") -> bytes:
    """JSON without white space, as UTF-8."""
    # "replace": a lone surrogate, which JSON can spell, has no UTF-8, and an error must not fail for want of one.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def error_body(error: "ProxyError | UpstreamError") -> bytes:
    """The JSON body that tells `error` to a client."""
    # An upstream's failure is a server_error with a code of ours: clients retry those, as they should.
    if isinstance(error, ProxyError):
        found = error_object(error.message, error.type, error.code, error.param)
    else:
        found = error_object(str(error), "server_error", error.code)
    return compact_json(found)


# ==== 2. Configuration ====
# A pure parse of one mapping into frozen records; every message names the file, the path, what was found, what is
# allowed. The records below are the reference: each key stands once, with its default, its bounds and how it is read.
# What no record names is a typing error by definition: an option that is ignored in silence is how people come to run
# without a limit that they believe in.

POOL_TYPES = ("balanced", "random", "least_busy", "fastest", "priority")
CONTROLLER_TYPES = ("openai", "azure", "anthropic", "echo")  # and those of PRESETS
KNOWN_TYPES = "openai | azure | anthropic | echo | a vendor that README.md names"
ENDPOINTS = ("inference", "objects", "*")
# What CHATGPT_APISERVER_<KEY> may set, beside the scalars of the pool. Objects and lists have no spelling in a variable
# that anybody would guess.
SCALARS = ("host", "port", "drain_delay", "drain_timeout")
FIXED_PARAMS = ("model", "messages", "stream")  # routing and relaying rely on them
LOG_LEVELS = ("debug", "info", "warning", "error")
# Where a file is looked for: the Go original's places, and what the environment's names begin with.
CONFIG_NAMES = ("chatgpt-apiserver.json", "chatgpt-apiserver.toml")
CONFIG_FOLDERS = (".", ".config", "config", "/etc/chatgpt-apiserver")
ENV = "CHATGPT_APISERVER_"
OPENAI_URL = "https://api.openai.com/v1"
AZURE_API_VERSION = "2024-10-21"  # the newest stable one of the classic surface
THINKING = ("effort", "adaptive", "budget")  # what reasoning_effort becomes at Anthropic: `to_messages` says it
# A header's name is a token (RFC 9110, 5.1); those that frame messages are ours alone, or a file could smuggle.
FIELD_NAME = (
    r"(?!(?i:host|content-length|transfer-encoding|connection|expect|upgrade|te|trailer)\Z)"
    r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
)
FIELD_NAME_IS = "a header name (RFC 9110, 5.1) that does not frame messages"

# Accounts that are unlike OpenAI's: what their `config` says when the user says nothing else.
DIALECTS: "dict[str, dict[str, Any]]" = {
    "azure": {"auth_header": "api-key", "auth_scheme": ""},
    "anthropic": {
        "base_url": "https://api.anthropic.com/v1",
        "auth_header": "x-api-key",
        "auth_scheme": "",
        "chat_path": "/messages",
    },
}
# Vendors that speak OpenAI's API: what the `config` of an openai controller must say of them. Words in braces stand for
# further keys of it. `old=new` renames a parameter, `old=` drops it: an API that knows only the older name of the limit
# ignores the newer one or refuses it; Mistral refused stream_options, and sends usage without it. `429:code`: the code
# means a rate limit there, though elsewhere that the money is spent (DashScope: openclaw PR 148275).
VENDORS = """
bedrock         https://bedrock-runtime.{region}.amazonaws.com/openai/v1
bedrock-mantle  https://bedrock-mantle.{region}.api.aws/v1
cerebras        https://api.cerebras.ai/v1
cloudflare      https://api.cloudflare.com/client/v4/accounts/{account}/ai/v1
cohere          https://api.cohere.ai/compatibility/v1
dashscope       https://dashscope.aliyuncs.com/compatible-mode/v1  429:insufficient_quota
dashscope-intl  https://dashscope-intl.aliyuncs.com/compatible-mode/v1  429:insufficient_quota
deepseek        https://api.deepseek.com/v1           max_completion_tokens=max_tokens
fireworks       https://api.fireworks.ai/inference/v1
gemini          https://generativelanguage.googleapis.com/v1beta/openai
groq            https://api.groq.com/openai/v1
huggingface     https://router.huggingface.co/v1
llamacpp        http://localhost:8080/v1
lmstudio        http://localhost:1234/v1              max_completion_tokens=max_tokens
mistral         https://api.mistral.ai/v1             max_completion_tokens=max_tokens seed=random_seed stream_options=
moonshot        https://api.moonshot.ai/v1
moonshot-cn     https://api.moonshot.cn/v1
nvidia          https://integrate.api.nvidia.com/v1   max_completion_tokens=max_tokens
ollama          http://localhost:11434/v1             max_completion_tokens=max_tokens
openrouter      https://openrouter.ai/api/v1
perplexity      https://api.perplexity.ai             max_completion_tokens=max_tokens
sglang          http://localhost:30000/v1
tgi             http://localhost:8080/v1
together        https://api.together.xyz/v1
vllm            http://localhost:8000/v1
xai             https://api.x.ai/v1
zai             https://api.z.ai/api/paas/v4          max_completion_tokens=max_tokens
zhipu           https://open.bigmodel.cn/api/paas/v4  max_completion_tokens=max_tokens
"""


def parse_vendor(url: str, *changes: str) -> "dict[str, Any]":
    """A row of VENDORS as the `config` that it stands for."""
    made: "dict[str, Any]" = {"base_url": url, "rename_params": {}, "drop_params": [], "rate_codes": []}
    for change in changes:
        old, _, new = change.partition("=")
        if new:
            made["rename_params"][old] = new
        elif old == change:
            made["rate_codes"].append(change.removeprefix("429:"))
        else:
            made["drop_params"].append(old)
    return made


PRESETS = {name: parse_vendor(*row) for name, *row in map(str.split, VENDORS.strip().splitlines())}


class Secret:
    """A value that is never shown: `reveal()` gives it, every other way to print it gives `sk-…last4`.

    The last four letters are what providers' own pages show of a key, so that it can be told from others; a value of
    less than twelve would lose too much by them.
    """

    # No subclass of str: that would be joined, sliced and dumped to JSON as it is. All that prints objects (a log, a
    # debugger, a traceback with locals) goes by __repr__, and so does str().
    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself; for what goes to its owner only."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        if not self._value:
            return "none"
        head = "sk-" if self._value.startswith("sk-") else ""
        return head + "…" + (self._value[-4:] if len(self._value) >= 12 else "")


NO_SECRET = Secret("")
VARIABLE = re.compile(r"\$(\{)?(\w+)(?(1)\})")  # $NAME, ${NAME}
WORD = "a non-empty string"
# What may be a key, for who has put one where none belongs: a word of some vendor's, sixteen letters and digits in a
# row that are no word with a number behind it, a longer row of pieces that mix them (a UUID), or what goes before the @
# of a URL. Names of models and hosts rarely look like that, and of a path, which files have, no row counts.
KEY_LIKE = (  # compiled for the first mistake
    r"\bsk-[\w\-]{4,}|\b(?:gsk_|hf_|fw_|xai-|csk-|pplx-|nvapi-|AIza|ABSK|eyJ)[\w.+/=\-]{12,}"
    r"|(?i:\b(?:bearer|basic) )[^\s\"']+|(?<=//)[^\s\"]+(?=@)"
    r"|(?<![\w/])(?=[A-Za-z]*\d+[A-Za-z])[A-Za-z0-9]{16,}|(?<![\w/\-])(?=(?:[\w\-]*?\d[A-Za-z]){3})[\w\-]{16,}"
)


def without_keys(text: str) -> str:
    """`text` in which all that may be a key is shown as one."""
    return re.sub(KEY_LIKE, lambda match: repr(Secret(match.group())), text)


class ConfigError(Exception):
    """A configuration that cannot be used: file, path, what was found, what is allowed. One line, without secrets."""

    def __init__(self, message: str) -> None:
        # Here, as a key may stand in any part of it: people paste them into names, flags, paths, and before a colon.
        super().__init__(without_keys(message))


class Told(str):
    """Words of ours about what was found, where it cannot be repeated or there is nothing to repeat: no quotation."""


def kind_of(value: "Any") -> Told:
    """What `value` is, for who knows JSON and not Python, where it may be a secret."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return Told(names.get(type(value), "a number" if isinstance(value, (int, float)) else "something else"))


def shown(value: "Any") -> str:
    """`value` as a message may show it: short, and never a text that could be a secret, or what may hold one."""
    # People paste keys where a name belongs, and then the error into an issue. Real keys are longer than 40 characters.
    if isinstance(value, Told):
        return value
    if value and isinstance(value, (dict, list)):
        return kind_of(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > 42:
        return "a text of %d characters" % len(value if isinstance(value, str) else text)
    return without_keys(text)


def nearest(word: str, known: "Iterable[str]") -> str:
    """The hint that helps with an unknown word; "" when nothing is like it."""
    # 0.6 is difflib's own measure: "wieght" finds weight, "grok" finds groq, "zzz" finds nothing. Capitals are no
    # reason to find nothing: "OpenAI" is openai.
    import difflib  # only mistakes need it

    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), sorted(names), 1, 0.6)
    return "did you mean %r?" % names[close[0]] if close else ""


def beside(source: str, name: str) -> str:
    """Where the relative path `name` of the file `source` leads: beside it, else in the working directory."""
    # Beside it first, as a service's working directory is rarely where its files are; the Go original's files, which
    # were looked for in the working directory only, are still found.
    near = os.path.join(os.path.dirname(source), name)
    return near if os.path.exists(near) else name


def unique_keys(pairs: "list[tuple[str, Any]]") -> "dict[str, Any]":
    """A JSON object, refused when a key stands in it twice: only one of the two could count.

    Raises ValueError. TOML refuses it by itself; JSON parsers take the last one in silence.
    """
    found: "dict[str, Any]" = {}
    for key, value in pairs:
        if key in found:
            raise ValueError("the key %r stands twice in one object" % key)
        found[key] = value
    return found


def read_file(path: str) -> "Any":
    """The mapping that a JSON or TOML file holds. Raises ConfigError with line and column."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read().removeprefix("\ufeff")  # Windows editors write it
        if path.endswith(".toml"):
            import tomllib  # 8 ms that only users of TOML pay

            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as problem:
        raise ConfigError("%s: cannot be read: %s" % (path, problem)) from problem


PLACES: "dict[str, list[str]]" = {}  # by key, where it may stand; filled where the records are declared


class Section:
    """One mapping of the configuration: reads its keys, knows where it stands, refuses the keys that nobody knows.

    `env` is what `$NAME` refers to. `overrides` give, for a path, the flag or variable that counts in place of the
    file, and what it says; `preset` what counts where nothing is said. Each reader takes a key, what is said of it and
    what else `setting` was given, and raises ConfigError.
    """

    def __init__(
        self,
        data: "Any",
        source: str,
        path: str,
        env: "Mapping[str, str]",
        overrides: "Mapping[str, tuple[str, Any]]",
    ) -> None:
        self.source, self.path, self.env, self.overrides = source, path, env, overrides
        # A string is not shown: `"config": "sk-..."` is a mistake that people make.
        if not isinstance(data, dict):
            found = kind_of(data) if isinstance(data, str) else shown(data)
            raise ConfigError("%s: %s: found %s, allowed: an object" % (source, path or "top level", found))
        self.data: "dict[str, Any]" = data
        self.preset: "dict[str, Any]" = {}

    def where(self, key: str) -> str:
        """The path of `key` as messages name it: `controllers[1].config.api_key`."""
        # A key with a line end in it would make two lines of the message.
        key = key if key.isprintable() else ascii(key)[1:-1]
        return self.path + "." + key if self.path else key

    def error(self, key: str, found: "Any", allowed: str) -> ConfigError:
        """What is wrong with the value of `key`."""
        # What a variable in some unit file set is not in the configuration: a message that named that would send its
        # reader looking in vain.
        where = self.where(key)
        place = self.overrides[where][0] if where in self.overrides else "%s: %s" % (self.source, where)
        return ConfigError("%s: found %s, allowed: %s" % (place, shown(found), allowed))

    def only(self, *known: str) -> None:
        """Refuses other keys. Called before any is read, as a wrong name is why its right one is missing."""
        for key in self.data:
            if key not in known:
                hint = nearest(key, known)
                if not hint and (self.path or "controllers" in known):  # an account's own file has no other places
                    here = re.sub(r"\[\d+\]", "[]", self.path)
                    hint = " or ".join(place for place in PLACES.get(key, ()) if place != here)
                    hint = hint and "its place is " + hint
                hint = hint or "allowed here: " + ", ".join(sorted(known))
                raise ConfigError("%s: %s: unknown key; %s" % (self.source, self.where(key), hint))

    def take(self, key: str, default: "Any" = None) -> "Any":
        """The raw value; null counts as absent, and so does an empty text where there is a preset."""
        # Empty texts are what templates leave of a variable that was not set: no address and no dialect is meant by it.
        said = self.overrides.get(self.where(key), ("", self.data.get(key)))[1]
        if said is None or (said == "" and key in self.preset):
            return self.preset.get(key, default)
        return said

    def values(self, kind: "type[Record]") -> "dict[str, Any]":
        """What is said here of the keys of `kind`; of the others a record knows the defaults."""
        found = {}
        for name, one in kind.settings.items():
            value = self.take(name)
            # Records are read in any case: a variable may speak of a key in one that the file has not.
            if value is not None or one.read is Section.record:
                found[name] = one.read(self, name, value, *one.more)
        return found

    def name(self, made_up: str, others: "Sequence[ControllerConfig | ClientKey]", kind: str) -> str:
        """What this mapping calls itself, else the name `made_up`; no other of its kind may have it."""
        name: str = self.fit("name", self.take("name", ""), str) or made_up
        if name in [other.name for other in others]:
            raise self.error("name", name, "a name that no other %s has" % kind)
        return name

    # -- readers: a key, what is said of it, and what else its `setting` was given

    def section(self, key: str, value: "Any") -> "Section":
        """A nested mapping; an empty one where there is none."""
        return Section({} if value is None else value, self.source, self.where(key), self.env, self.overrides)

    def sections(self, key: str) -> "list[Section]":
        """A list of mappings."""
        value = self.take(key, [])
        if not isinstance(value, list):
            raise self.error(key, kind_of(value), "a list of objects")
        return [self.section("%s[%d]" % (key, number), item) for number, item in enumerate(value)]

    def record(self, key: str, value: "Any", kind: "type[Record]") -> "Record":
        """An object with the keys of `kind`."""
        inner = self.section(key, value)
        inner.only(*kind.settings)
        return kind(**inner.values(kind))

    def number(self, key: str, value: "Any", low: float, high: float) -> float:
        """A number from `low` to `high`; a whole one where these are."""
        # By type(), as a bool is an int to isinstance; NaN is between no bounds.
        whole = isinstance(low, int)
        if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
            allowed = "a whole number from %d to %d" if whole else "a number from %g to %g"
            raise self.error(key, value, allowed % (low, high))
        return value if whole else float(value)

    def fit(self, key: str, value: "Any", shape: "Any") -> "Any":
        """`value` if it has this shape; lists and objects as tuples, as records are hashed.

        Shapes: bool; str; WORD, a string that is not empty; a tuple, one of its members; [shape]; {str: shape}.
        """
        # The path of a member leads to it: one wrong model in a list of thirty is named, not the list.
        if isinstance(shape, list):
            if not isinstance(value, list):
                raise self.error(key, value, "a list of non-empty strings")
            return tuple(self.fit("%s[%d]" % (key, at), one, shape[0]) for at, one in enumerate(value))
        if isinstance(shape, dict):
            pairs, inner = self.section(key, value).data.items(), shape[str]
            return tuple((self.fit(key, name, str), self.fit(key + "." + name, one, inner)) for name, one in pairs)
        if isinstance(shape, tuple):
            return self.one_of(key, value, shape, " | ".join(shape))
        if not isinstance(value, bool if shape is bool else str) or (shape is WORD and not value):
            raise self.error(key, value, {bool: "true or false", str: "a string"}.get(shape, WORD))
        if isinstance(value, str) and VARIABLE.fullmatch(value):  # no project and no model is called $NAME
            raise self.error(key, value, "the text itself; variables are read for keys, proxies and headers only")
        if not str(value).isprintable():  # it would break a line of the log, or a header
            raise self.error(key, Told("a character that cannot be printed"), "printable characters")
        return value

    def one_of(self, key: str, value: "Any", names: "Collection[str]", allowed: str) -> "Any":
        """One of `names`, which a message may sum up as `allowed`."""
        if value not in names:
            hint = nearest(str(value), names)
            raise self.error(key, value, "%s (%s)" % (allowed, hint) if hint else allowed)
        return value

    def word(self, key: str, value: "Any", pattern: str, allowed: str) -> "Any":
        """A string that matches `pattern`; `allowed` says it in words."""
        if not re.fullmatch(pattern, self.fit(key, value, str)):
            raise self.error(key, value, allowed)
        return value

    def secret(self, key: str, value: "Any") -> Secret:
        """A literal, `$NAME`, `${NAME}` or `file:PATH`; the value is never part of a message."""
        if not isinstance(value, str):
            raise self.error(key, kind_of(value), "a string, $NAME or file:PATH")
        # What begins with $ and is no name is a literal: passwords of proxies may well begin so. But not with ${, as
        # what shells make of ${NAME:-default} is not known here.
        named = VARIABLE.fullmatch(value)
        if named:
            name = named.group(2)
            if not self.env.get(name):
                told = (  # what a start in a clone says first, as it finds the sample in config/
                    "a variable that is set; %s is not set: export %s=..., or try --demo, which needs no key, "
                    "or name another file with --config_file"
                )
                raise self.error(key, value, told % (name, name))
            value = self.env[name]
        elif value.startswith("${"):
            raise self.error(key, Told("${ and more than a name"), "a literal, $NAME, ${NAME} or file:PATH")
        elif value.startswith("file:"):
            try:
                with open(beside(self.source, value[5:]), encoding="utf-8") as file:
                    value = file.read()
            except (OSError, ValueError) as problem:  # no such file, no text, or no name of a file
                raise self.error(key, value[5:], "a readable file (%s)" % problem) from problem
        value = value.strip()  # editors and `echo` end a file with a line end, which no header can hold
        if not (value.isascii() and value.isprintable()):
            found = Told("a character outside printable ASCII")
            raise self.error(key, found, "printable ASCII (it goes into a header)")
        return Secret(value)

    def file(self, key: str, value: "Any") -> str:
        """The path of a file that exists, looked up beside the configuration, then in the working directory."""
        name = self.fit(key, value, str)
        path = beside(self.source, name) if name else ""
        if path and not os.path.isfile(path):
            raise self.error(key, name, "an existing file, beside the configuration or in the working directory")
        return path


class Setting:
    """A key of the configuration: its default, what reads it, and what else that wants.

    Two bounds make a number. Else what stands here is a shape for `Section.fit`, or nothing, and the default's type is
    the shape; a record reads itself. `by` names another reader, a method of Section or a function that is called like
    one.
    """

    __slots__ = ("default", "more", "read")

    def __init__(self, default: "Any", *more: "Any", by: "Callable[..., Any] | None" = None) -> None:
        self.default, self.more = default, more if more or by else (type(default),)
        reads = Section.record if hasattr(default, "settings") else Section.number if len(more) == 2 else Section.fit
        self.read: "Callable[..., Any]" = by or reads


setting: "Any" = Setting  # by this name it may stand where a field of any type has its default


@dataclass_transform(frozen_default=True)
class Record:
    """Named values that never change, declared as those of a frozen dataclass are; `settings` reads them.

    It is none because `dataclasses` writes and compiles methods for each class: 0.8 ms each, a twelfth of the start.
    A reload compares records to find what is unchanged, so they are values all the way down: tuples, no lists.
    """

    fields: "ClassVar[tuple[str, ...]]"
    settings: "ClassVar[dict[str, Setting]]"  # of the fields that have a default

    def __init_subclass__(cls) -> None:
        cls.fields = tuple(cls.__annotations__)
        cls.settings = {}
        # Annotations are in the order of the class; a field without a default has only one.
        for name in cls.fields:
            if name in vars(cls):
                one = vars(cls)[name]
                one = cls.settings[name] = one if isinstance(one, Setting) else Setting(one)
                setattr(cls, name, one.default)

    def __init__(self, *values: "Any", **named: "Any") -> None:
        # mypy checks the calls that it sees; the keys of a configuration come by `**`.
        given = dict(zip(self.fields, values, strict=False), **named)
        wrong = (given.keys() | self.settings.keys()) ^ set(self.fields)
        if wrong:
            raise TypeError("missing or unknown: %s" % ", ".join(sorted(wrong)))
        # Not by `vars`, whose dictionary, once it exists, makes each reading slower: 1 % of a request.
        for name in self.fields:  # in this order, whatever was given
            object.__setattr__(self, name, given[name] if name in given else getattr(self, name))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("%s.%s cannot be changed" % (type(self).__name__, name))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % pair for pair in vars(self).items()))

    def replace(self, **changes: "Any") -> "Self":
        """A copy in which `changes` apply."""
        return type(self)(**{**vars(self), **changes})


# -- readers of keys that are like no other: called as the methods above are


def read_port(section: Section, key: str, value: "Any") -> int:
    """The port, which the Go original's files write as a string, and flags and variables too."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}", value):
        value = int(value)
    if type(value) is not int or not 0 <= value <= 65535:
        raise section.error(key, value, "a whole number from 0 to 65535 (0: any free port)")
    return value


def read_rescue(section: Section, key: str, value: "Any") -> "float | None":
    """Seconds, or "auto" for what the times of the last answers say: None here, as it is no number."""
    if value == "auto":
        return None
    try:
        return section.number(key, value, 0.0, 3600.0)
    except ConfigError as problem:
        raise ConfigError('%s, or "auto"' % problem) from None


def read_detours(section: Section, key: str, value: "Any", shape: "Any") -> "Any":
    """Models that are asked in place of others; none in place of itself."""
    # Circles (a for b, b for a) do no harm: only the list of the model that was asked for is gone through.
    found = section.fit(key, value, shape)
    for name, models in found:
        if name in ((models,) if isinstance(models, str) else models):
            raise section.error(key + "." + name, name, "another model")
    return found


def read_words(section: Section, key: str, value: "Any", pattern: str, allowed: str) -> "tuple[str, ...]":
    """A list of words to compare others with: one that no other could be equal to is a mistake."""
    words: "tuple[str, ...]" = section.fit(key, value, [WORD])
    return tuple(section.word("%s[%d]" % (key, at), word, pattern, allowed) for at, word in enumerate(words))


def read_hosts(section: Section, key: str, value: "Any") -> "tuple[str, ...]":
    """Names of hosts, in which case says nothing (RFC 9110, 4.2.3); they are compared at each request."""
    names = read_words(section, key, value, r"\*|[^/*\s]+", 'a host with or without port, or "*" for all')
    return tuple(name.lower() for name in names)


def read_host(section: Section, key: str, value: "Any") -> str:
    """The address to listen on, or a name of it; an IPv6 one may stand in brackets, as in a URL."""
    host: str = section.fit(key, value, str)
    bare = host[1:-1] if re.fullmatch(r"\[.*:.*\]", host) else host
    try:
        if ":" in bare:
            import ipaddress  # 2 ms that only IPv6 costs

            ipaddress.IPv6Address(bare)
    except ValueError:
        bare = "/"
    if re.search(r"[/*\s\[\]]", bare):  # now and not at the listener, as --check opens none
        raise section.error(key, host, "a name or an address of this machine, without scheme and port")
    return bare


def read_url(section: Section, key: str, value: "Any", schemes: "tuple[str, ...]") -> str:
    """A URL that requests can be sent to, without its trailing slash."""
    # Stricter than urllib, which takes line ends and blanks out of a URL before it looks at it. User and password have
    # no place in base_url: they would have to go into the header that holds the key.
    url: str = section.fit(key, value, str)
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port that is none
        good = False
    if not good or re.search(r"[^!-~]|[?#]", url) or (key == "base_url" and "@" in url):
        bare = re.sub(r"//.*@|[?#].*", "…", url)  # what may hold a password is not repeated
        raise section.error(key, bare, " or ".join(name + "://host[:port][/path]" for name in schemes))
    return url.rstrip("/")


def read_proxy(section: Section, key: str, value: "Any") -> Secret:
    """The proxy's URL; a secret, because it may carry a password.

    Only http: the connection to the proxy is plain, what goes through it is TLS by itself. No message repeats it.
    """
    proxy = section.secret(key, value)
    try:
        if proxy:
            read_url(section, key, proxy.reveal(), ("http",))
    except ConfigError:
        raise section.error(key, Told("another URL or none"), "http://[user:password@]host:port") from None
    return proxy


def read_ca_file(section: Section, key: str, value: "Any") -> str:
    """The path of a file with certificates that OpenSSL can read."""
    # Now and not at the first connection: a typing error shall stop the start, not a request in the night.
    path = section.file(key, value)
    try:
        if path:
            ssl.create_default_context(cafile=path)
    except (ssl.SSLError, OSError) as problem:
        raise section.error(key, path, "a file of PEM certificates (%s)" % problem) from problem
    return path


def read_headers(section: Section, key: str, value: "Any") -> "tuple[tuple[str, Secret], ...]":
    """Further fields for each request; values may well be keys."""
    # Names are checked as a file could otherwise add a second Content-Length, or end the head.
    inner = section.section(key, value)
    pairs = inner.data.items()
    return tuple((inner.word(name, name, FIELD_NAME, FIELD_NAME_IS), inner.secret(name, one)) for name, one in pairs)


def read_extra(section: Section, key: str, value: "Any") -> "tuple[tuple[str, Any], ...]":
    """What every chat is sent beside its own words."""
    # TOML has dates and both have NaN, of which JSON knows nothing; better told now than at each request.
    extra = section.section(key, value).data
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise section.error(key, extra, "JSON values (%s)" % problem) from None
    return tuple(extra.items())


# -- the records: the reference of all keys, which README.md explains and a test compares with it


class Timeouts(Record):
    """Seconds; 0 is none. `first_byte` None: 120 for streams, 600 for whole answers, as SDKs wait 600."""

    # connect has no "none": a network that swallows packets would hold a request for the kernel's two minutes.
    connect: float = setting(10.0, 0.001, 3600.0)
    # total has no end: a long answer is no fault as long as it flows.
    first_byte: "float | None" = setting(None, 0.0, 86400.0)
    idle: float = setting(300.0, 0.0, 86400.0)
    total: float = setting(0.0, 0.0, 86400.0)


class QuotaLimits(Record):
    """Requests and tokens in any sliding 60 s, requests at once, seconds' worth at once; 0 is none."""

    rpm: int = setting(0, 0, 10_000_000)
    tpm: int = setting(0, 0, 10**12)
    concurrency: int = setting(0, 0, 1_000_000)
    # Azure judges slices of 1 or 10 s of the minute; more than a minute's worth at once is over the limit anywhere.
    burst_s: float = setting(60.0, 0.1, 60.0)


class AccountConfig(Record):
    """The `config` of a controller: where it is, what opens it, what its dialect of the API wants. Delays are echo's.

    `auth_header: auth_scheme api_key` opens it; an empty scheme sends the bare key. `chat_path` follows base_url in
    place of /chat/completions. Of a request's outermost keys `drop_params` are left out and `rename_params` get another
    name; then `extra_body` is added, in place of what the client said. Of a 429's codes `rate_codes` mean a limit on
    the rate here, though elsewhere an empty purse. `api_version` is Azure's; `thinking` is Anthropic's, and so is
    `max_tokens`, the limit where the client sets none.
    """

    api_key: Secret = setting(NO_SECRET, by=Section.secret)
    base_url: str = setting("", ("http", "https"), by=read_url)
    organization: str = ""
    project: str = ""
    proxy: Secret = setting(NO_SECRET, by=read_proxy)
    ca_file: str = setting("", by=read_ca_file)
    headers: "tuple[tuple[str, Secret], ...]" = setting((), by=read_headers)
    auth_header: str = setting("Authorization", FIELD_NAME, FIELD_NAME_IS, by=Section.word)
    auth_scheme: str = setting(
        "Bearer", r"[!-~]*", "one word of printable ASCII, or nothing for the bare key", by=Section.word
    )
    chat_path: str = setting(
        "/chat/completions", r"/[!-\"$->@-~]+", "/path, without blanks, query and fragment", by=Section.word
    )
    api_version: str = setting("", r"[0-9A-Za-z-]*", "a date such as " + AZURE_API_VERSION, by=Section.word)
    # Anthropic requires a limit, OpenAI does not: 4096 is the most that its oldest models take.
    max_tokens: int = setting(4096, 1, 10**7)
    thinking: str = setting(THINKING[0], THINKING)
    drop_params: "tuple[str, ...]" = setting((), [WORD])
    rename_params: "tuple[tuple[str, str], ...]" = setting((), {str: WORD})
    extra_body: "tuple[tuple[str, Any], ...]" = setting((), by=read_extra)
    rate_codes: "tuple[str, ...]" = setting((), [WORD])
    delay: float = setting(0.0, 0.0, 600.0)
    first_delay: float = setting(0.0, 0.0, 3600.0)


class ControllerConfig(Record):
    """One upstream account. `models` empty: all; names with `*` and `?`."""

    type: str
    name: str
    account: AccountConfig
    weight: int = setting(1, 1, 10000)
    models: "tuple[str, ...]" = setting((), [WORD])
    model_map: "tuple[tuple[str, str], ...]" = setting((), {str: WORD})
    limits: QuotaLimits = QuotaLimits()
    quota_group: str = ""
    timeouts: Timeouts = Timeouts()


class PoolConfig(Record):
    """How the pool chooses and waits; `rescue_after` None is "auto", 0 never.

    `affinity` sends a conversation where its last request went, as long as there is room. `aliases` are other names of
    models. `fallbacks` are the models to try, in this order, when nothing serves the one asked for; `context_fallbacks`
    when the request is too long for it. Who may use a model may use what stands in for it: `client_keys[].models` is
    about what is asked for, and these are the operator's words.
    """

    # max_wait: what people take for a slow answer and not for a broken one. max_queue: beyond it waiting has no end in
    # sight for the last, who is better told at once.
    type: str = setting("balanced", POOL_TYPES)
    max_wait: float = setting(30.0, 0.0, 3600.0)
    max_queue: int = setting(1000, 0, 1_000_000)
    rescue_after: "float | None" = setting(None, by=read_rescue)
    affinity: bool = True
    aliases: "tuple[tuple[str, str], ...]" = setting((), {str: WORD}, by=read_detours)
    fallbacks: "tuple[tuple[str, tuple[str, ...]], ...]" = setting((), {str: [WORD]}, by=read_detours)
    context_fallbacks: "tuple[tuple[str, tuple[str, ...]], ...]" = setting((), {str: [WORD]}, by=read_detours)


class ClientKey(Record):
    """Who may come in: the SHA-256 of a key, and what it may ask for; no `models` means all."""

    name: str
    digest: bytes
    models: "tuple[str, ...]" = setting((), [WORD])
    limits: QuotaLimits = QuotaLimits()


class ServerLimits(Record):
    """Bounds on what clients may do: bytes, counts, seconds; a rate of 0 is none."""

    # 32 MB hold a dozen images. All bodies together are bounded, too, as requests that stand in line keep theirs.
    body_bytes: int = setting(33_554_432, 1, 2**40)
    bodies_bytes: int = setting(1 << 30, 1, 2**50)
    upload_bytes: int = setting(1 << 30, 1, 2**50)  # OpenAI takes files of 512 MB; of a form only the beginning is kept
    json_depth: int = setting(JSON_DEPTH, 3, 500)  # Python's own bound is near 900
    start_line_bytes: int = setting(START_LINE_BYTES, 64, 2**20)
    header_bytes: int = setting(65536, 1024, 2**24)
    header_count: int = setting(FIELD_COUNT, 10, 10000)
    # An idle connection costs 7 kB, a stream two descriptors.
    connections: int = setting(10000, 1, 1_000_000)
    connections_per_client: int = setting(0, 0, 1_000_000)
    # Who sends slowly (slowloris) holds a place and nothing else; 1024 bytes/s is below any modem.
    header_timeout: float = setting(20.0, 0.001, 3600.0)
    body_timeout: float = setting(120.0, 0.001, 86400.0)
    body_rate: int = setting(1024, 0, 2**30)
    chunk_line_bytes: int = setting(CHUNK_LINE_BYTES, 32, 2**20)
    # Longer than proxies keep a connection (nginx 60 s), so that it is they who close and no request crosses a FIN.
    idle_timeout: float = setting(75.0, 0.001, 86400.0)
    write_timeout: float = setting(120.0, 0.001, 86400.0)
    upstream_head_bytes: int = setting(UPSTREAM_HEAD_BYTES, 1024, 2**24)


class TlsFiles(Record):
    """The listener's certificate and its key; without them it does not speak TLS."""

    cert: str = setting("", by=Section.file)
    key: str = setting("", by=Section.file)


class CorsConfig(Record):
    """The pages that may use the server."""

    # Not only of the web: editors and mobile apps have schemes of their own.
    allow_origins: "tuple[str, ...]" = setting(
        (), r"\*|null|[A-Za-z][A-Za-z0-9+.-]*://[^/*\s]+", 'scheme://host[:port] without a path, "null" or "*"',
        by=read_words,
    )


class LogConfig(Record):
    """What the log looks like, and how much it says."""

    format: str = setting("text", ("text", "json"))
    level: str = setting("info", LOG_LEVELS)


class Config(Record):
    """Everything that the server runs by; `source` says where it came from."""

    controllers: "tuple[ControllerConfig, ...]"
    client_keys: "tuple[ClientKey, ...]"
    source: str
    # Loopback, as who starts this with a key in the environment has not yet said who may spend it.
    host: str = setting("127.0.0.1", by=read_host)
    port: int = setting(8080, by=read_port)
    pool: PoolConfig = PoolConfig()
    endpoints: "tuple[str, ...]" = setting(ENDPOINTS[:1], [ENDPOINTS])
    allowed_hosts: "tuple[str, ...]" = setting((), by=read_hosts)
    cors: CorsConfig = CorsConfig()
    tls: TlsFiles = TlsFiles()
    limits: ServerLimits = ServerLimits()
    log: LogConfig = LogConfig()
    drain_delay: float = setting(0.0, 0.0, 3600.0)
    drain_timeout: float = setting(30.0, 0.0, 3600.0)


# -- from a mapping to records


def note_places(kind: "type[Record]", path: str, prefix: str) -> None:
    """Notes where the keys of `kind` stand, for who has put one elsewhere: an api_key beside `config`, not inside."""
    for name, one in kind.settings.items():
        PLACES.setdefault(name, []).append(path)
        if one.read is Section.record:
            note_places(one.more[0], prefix + name, prefix + name + ".")


note_places(AccountConfig, "controllers[].config", "controllers[].config.")
note_places(ControllerConfig, "controllers[]", "controllers[].")
note_places(ClientKey, "client_keys[]", "client_keys[].")
note_places(Config, "the top level", "")


def key_digest(key: bytes) -> bytes:
    """What is kept of a client key: its SHA-256."""
    # No slow hash: keys are random and long, not chosen by people, and this is paid for each request.
    import hashlib  # 2 ms that a start without client keys does without

    return hashlib.sha256(key).digest()


def same_digest(one: bytes, other: bytes) -> bool:
    """Whether two digests are equal, in a time that does not tell how much of them is."""
    # Digests need that less than keys do, as nobody can choose one that begins as wanted; it costs nothing.
    import hmac  # as hashlib

    return hmac.compare_digest(one, other)


def parse_digest(section: Section) -> bytes:
    """The SHA-256 of a client key; all that is kept of it, and all that a file need tell: `sha256:HEX`."""
    key = section.secret("key", section.take("key", "")).reveal()
    hashed = re.fullmatch(r"sha256:([0-9a-fA-F]{64})", key)
    if not key or (key.startswith("sha256:") and not hashed):
        raise section.error("key", Told("nothing usable"), "a key, $NAME, file:PATH or sha256:<64 hex digits>")
    return bytes.fromhex(hashed.group(1)) if hashed else key_digest(key.encode())


def parse_client_keys(top: Section) -> "tuple[ClientKey, ...]":
    """The `client_keys` list; names are made where missing; names and keys must differ.

    Names stand in the access log and in reloads, so that a key itself need never be shown.
    """
    found: "list[ClientKey]" = []
    for number, section in enumerate(top.sections("client_keys"), 1):
        section.only("name", "key", *ClientKey.settings)
        name = section.name("key-%d" % number, found, "client key")
        client = ClientKey(name, parse_digest(section), **section.values(ClientKey))
        for other in found:
            if client.digest == other.digest:  # of two names for one key only the first would ever count
                raise section.error("key", Told("the key of " + other.name), "a key of its own")
        found.append(client)
    return tuple(found)


_SHARED = "api_key base_url proxy ca_file headers auth_header auth_scheme chat_path drop_params extra_body".split()
_OPENAI = [*_SHARED, "organization", "project", "rename_params", "rate_codes"]
# What the `config` of a type may say, where it is not as for openai. Anthropic's API has no word for some of that.
ACCOUNT_KEYS = {
    "azure": [*_OPENAI, "api_version"],
    "anthropic": [*_SHARED, "max_tokens", "thinking"],
    "echo": ["delay", "first_delay"],
}


def check_params(section: Section, account: AccountConfig) -> None:
    """Refuses what would take parameters from routing, or make two of one."""
    renames = dict(account.rename_params)
    news = list(renames.values())
    # `stream`, say, renamed by one account would make its answers come whole where the relay waits for events.
    extra = dict(account.extra_body)
    touched = {"drop_params": account.drop_params, "rename_params": [*renames, *news], "extra_body": extra}
    for key, names in touched.items():
        for name in names:
            if name in FIXED_PARAMS:
                raise section.error(key, name, "anything but " + ", ".join(FIXED_PARAMS))
    for new in news:
        if news.count(new) > 1:  # a JSON object with a key twice, of which each reader takes another one
            raise section.error("rename_params", new, "each new name once")


def check_pasted(section: Section, account: AccountConfig) -> None:
    """Refuses more than belongs into a value: each request would fail, and nobody's 401 or 404 tells why."""
    # Files for docker's --env-file keep their quotation marks, and examples for curl show "Bearer sk-...".
    if re.search("[\"' ]" if account.auth_scheme else "[\"']", account.api_key.reveal()):
        found = Told("a key with blanks or quotation marks")
        raise section.error("api_key", found, "the key alone; auth_scheme (Bearer) is put before it")
    if account.base_url.endswith(account.chat_path):
        allowed = "the address without %s, which is put behind it" % account.chat_path
        raise section.error("base_url", account.base_url, allowed)


def parse_account(section: Section, kind: str) -> AccountConfig:
    """The `config` of a controller of this type, in place or in its own file.

    What counts: what the user says, then the vendor's row or the dialect, then the defaults of the record.
    """
    preset = {"base_url": OPENAI_URL, **(PRESETS.get(kind) or DIALECTS.get(kind, {}))}
    own = bool(section.take("base_url")) and kind != "azure"
    # Words of an address (a region) are keys only where that address is used.
    words = [] if own else re.findall(r"\{(\w+)\}", preset["base_url"])
    section.only(*ACCOUNT_KEYS.get(kind, _OPENAI), *words)
    if kind == "echo":
        return AccountConfig(**section.values(AccountConfig))
    for key in words:
        told = "the %s that is part of the address: letters, digits, - and _" % key
        word = section.word(key, section.take(key, ""), r"[0-9A-Za-z_-]+", told)
        preset["base_url"] = preset["base_url"].replace("{%s}" % key, word)
    # Who names a header for the key means its usual scheme: Azure's key is bare in api-key, a token of Entra goes as
    # Bearer into Authorization.
    if section.take("auth_header"):
        preset.pop("auth_scheme", None)
    section.preset = preset
    account = AccountConfig(**section.values(AccountConfig))
    check_params(section, account)
    check_pasted(section, account)
    # A forgotten key is told now and not by a 401 later. Only a base_url of the user's own, or a local one, may do
    # without: servers of one's own rarely want any, vendors always do.
    url, local = account.base_url, account.base_url.startswith("http://localhost")
    if not account.api_key and (url.startswith("https://api.openai.com") or not (own or local)):
        raise section.error("api_key", Told("nothing"), "an API key, $NAME or file:PATH")
    if kind == "azure" and (url == OPENAI_URL or "/deployments" in url):
        # The portal shows URLs with the deployment in them; here `model_map` says which model is which deployment.
        found = section.data.get("base_url") or Told("nothing")
        raise section.error("base_url", found, "https://NAME.openai.azure.com, for the newer surface with /openai/v1")
    return account


def parse_controller(section: Section, others: "Sequence[ControllerConfig]") -> ControllerConfig:
    """The next of the `controllers`; its `config` may stand in a file of its own, as the Go original's did."""
    section.only("type", "name", "config", "config_file", *ControllerConfig.settings)
    # The vendors are too many for a message, so that only the nearest is named.
    kind = section.one_of("type", section.take("type", "openai"), (*CONTROLLER_TYPES, *PRESETS), KNOWN_TYPES)
    name = section.name("%s-%d" % (kind, len(others) + 1), others, "controller")
    # A file of its own lets an account and its key be mounted as a secret, beside a configuration that is none.
    account, file = section.section("config", section.take("config")), section.take("config_file")
    if file and account.data:
        raise section.error("config_file", file, "config or config_file, not both")
    if file:
        file = section.file("config_file", file)
        account = Section(read_file(file), file, "", section.env, {})  # whose mistakes name that file
    return ControllerConfig(kind, name, parse_account(account, kind), **section.values(ControllerConfig))


def parse_controllers(top: Section) -> "tuple[ControllerConfig, ...]":
    """The `controllers` list; names are made where missing, and must differ."""
    found: "list[ControllerConfig]" = []
    for section in top.sections("controllers"):
        one = parse_controller(section, found)
        for other in found:
            if one.quota_group and one.quota_group == other.quota_group and one.limits != other.limits:
                raise ConfigError(  # as the group counts as one bucket
                    "%s: %s: differ from those of %r, which is in the same quota_group %r; allowed: equal limits"
                    % (section.source, section.where("limits"), other.name, other.quota_group)
                )
        found.append(one)
    if not found:  # a server that can answer nothing but 404 is a mistake
        raise top.error("controllers", Told("nothing"), "a list of at least one controller")
    return tuple(found)


def parse_config(
    data: "Any", source: str, env: "Mapping[str, str]", overrides: "Mapping[str, tuple[str, Any]] | None" = None
) -> Config:
    """The configuration that `data` (JSON or TOML, as read from `source`) describes. Raises ConfigError.

    `overrides`: see `Section`.
    """
    # Everything is read and checked before anything is done with it: a reload takes all of it or nothing.
    top = Section(data, source, "", env, overrides or {})
    top.only("controllers", "client_keys", *Config.settings)
    config = Config(parse_controllers(top), parse_client_keys(top), source, **top.values(Config))
    if bool(config.tls.cert) != bool(config.tls.key):
        raise ConfigError("%s: tls: found one of cert and key, allowed: both or none" % source)
    return config


# -- where a configuration comes from


def named_places(flag: str, value: str, env: "Mapping[str, str]", exists: "Callable[[str], bool]") -> "Iterator[str]":
    """What `flag` and its two variables name; the one that counts comes first. Raises ConfigError for what is missing.

    A name that leads nowhere is never skipped: the next place may hold another configuration, with other keys.
    """
    name = flag[2:].upper()
    for setter, place in ((flag, value), (ENV + name, env.get(ENV + name)), (name, env.get(name))):
        if place and not exists(place):
            raise ConfigError("%s: %s: no such %s" % (setter, place, "file" if "FILE" in name else "folder"))
        if place:
            yield place


def find_file(config_file: str, config_path: str, env: "Mapping[str, str]") -> str:
    """The configuration file to read, first hit wins; "" when there is none. Raises ConfigError."""
    for path in named_places("--config_file", config_file, env, os.path.isfile):
        return path
    # A named folder without a file leads on to the others: images set CONFIG_PATH once and mount what they have.
    for folder in (*named_places("--config_path", config_path, env, os.path.isdir), *CONFIG_FOLDERS):
        for name in CONFIG_NAMES:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
    return ""


def as_scalar(text: str) -> "Any":
    """The number or truth value that `text` is, else `text`."""
    # JSON knows both; in lower case, as Python, Helm and people write True.
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


# What Kubernetes sets in every pod for a service of our name, or one that begins like it; compiled where there is any.
_SERVICE_VARIABLE = r".*(?:\b|_)(?:SERVICE_(?:HOST|PORT)|PORT_\d+_)"


def environment_overrides(env: "Mapping[str, str]") -> "Iterator[tuple[str, tuple[str, Any]]]":
    """What CHATGPT_APISERVER_<KEY> sets of the scalars at the top (`PORT=9000`) and of the pool (`POOL_TYPE=random`):
    path, name of the variable and value. Raises ConfigError for a variable of that kind that sets nothing."""
    # As a container's variables are the only thing about it that many platforms let one change.
    pool = ("pool." + key for key, one in PoolConfig.settings.items() if one.default != ())
    known = {path.replace(".", "_").upper(): path for path in (*SCALARS, *pool)}
    known.update(CONFIG_FILE="", CONFIG_PATH="")  # which `find_file` has read
    for variable, value in env.items():
        name = variable[len(ENV) :]
        if not variable.startswith(ENV) or "://" in value or re.match(_SERVICE_VARIABLE, name):
            continue
        if name in known:
            if known[name] and value:
                yield known[name], (variable, value if name == "HOST" else as_scalar(value))
            continue
        # Any other name may be that of a secret which the file reads.
        hint = nearest(name, known)
        if hint or name.partition("_")[0].lower() in Config.settings:
            hint = hint or "behind %s may stand %s" % (ENV, ", ".join(sorted(known)))
            raise ConfigError("%s: this variable sets nothing; %s" % (variable, hint))


def environment_proxy(url: str, env: "Mapping[str, str]") -> str:
    """The proxy that https_proxy, http_proxy and no_proxy name for `url`, by urllib's rules; "" for none.

    Only a start without a file goes by it: a file says itself what it wants, and does the same everywhere.
    """
    import urllib.request as rules  # 15 ms that files do without

    # `getproxies_environment` knows the process's own environment only; as there, lower case wins.
    proxies = {
        name.lower()[:-6]: env[name]
        for name in sorted(env, key=str.islower)
        if name.lower().endswith("_proxy") and env[name]
    }
    parts = urllib.parse.urlsplit(url)
    if rules.proxy_bypass_environment(parts.netloc, proxies):  # type: ignore[attr-defined]
        return ""
    found = proxies.get(parts.scheme) or proxies.get("all") or ""
    return "http://" + found if found and "://" not in found else found


def environment_account(env: "Mapping[str, str]") -> "Iterator[tuple[str, tuple[str, str]]]":
    """The `config` of the one controller of a user who has only set OPENAI_API_KEY, as `environment_overrides`.

    The variables are those of OpenAI's own SDKs.
    """
    at = "controllers[0].config."
    keys = {"OPENAI_API_KEY": "api_key", "OPENAI_BASE_URL": "base_url", "OPENAI_ORG_ID": "organization"}
    for name, key in {**keys, "OPENAI_PROJECT_ID": "project"}.items():
        yield at + key, (name, env.get(name, ""))
    proxy = environment_proxy(env.get("OPENAI_BASE_URL") or OPENAI_URL, env)
    yield at + "proxy", ("https_proxy, http_proxy or all_proxy", proxy)


NOTHING_TO_RUN = """chatgpt_apiserver: nothing to run with. Three ways to start:
  a file:  python3 chatgpt_apiserver.py --config_file chatgpt-apiserver.json   (README.md shows one)
  a key:   OPENAI_API_KEY=sk-... python3 chatgpt_apiserver.py
  no key:  python3 chatgpt_apiserver.py --demo"""


def demo_controllers() -> "list[dict[str, Any]]":
    """What --demo runs on: two echo controllers in turn, so that balancing can be seen."""
    # Under names that clients ask for by default, and at a pace at which a stream is seen to be one.
    models = ["echo", "gpt-*"]
    return [
        {"type": "echo", "name": name, "models": models, "config": {"delay": 0.03}} for name in ("echo-a", "echo-b")
    ]


def load_config(
    config_file: str,
    config_path: str,
    flags: "Mapping[str, Any]",
    env: "Mapping[str, str]",
    demo: bool = False,
) -> Config:
    """The configuration of this start: flags over environment over file over defaults. Raises ConfigError.

    A reload calls this again with the same arguments, so that flags keep their say over a file that changed.
    """
    # --demo wins over all files: who tries it first in a folder that has one wants to see it run, not their keys spent.
    path = "" if demo else find_file(config_file, config_path, env)
    overrides: "dict[str, tuple[str, Any]]" = {}
    if path:
        data, source = read_file(path), path
    elif demo:
        data, source = {"controllers": demo_controllers()}, "--demo"
    elif env.get("OPENAI_API_KEY"):
        data, source = {"controllers": [{"name": "openai"}]}, "OPENAI_API_KEY"
        overrides.update(environment_account(env))
    else:
        raise ConfigError(NOTHING_TO_RUN)
    # What is nearest to this one start counts most: a flag over a variable over a file that many starts share.
    overrides.update(environment_overrides(env))
    overrides.update({key: ("--" + key, value) for key, value in flags.items() if value is not None})
    return parse_config(data, source, env, overrides)


# -- what is told of a configuration


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    # A name is none, whatever it resolves to now: the doors of section 14 depend on this.
    if host in ("localhost", "127.0.0.1", "::1"):
        return True
    import ipaddress  # 2 ms that loopback need not pay at the start

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address(config: Config, host: str, port: int) -> str:
    """The URL of a listener."""
    return "http%s://%s:%d" % ("s" if config.tls.cert else "", "[%s]" % host if ":" in host else host, port)


def describe(config: Config) -> "list[str]":
    """The configuration in lines for --check and the start-up log, the address last; secrets as `sk-…last4`."""
    # Which file, which key, which way: what a support question needs to know, and all that may be shown of it.
    lines = ["configuration: %s" % config.source, "policy: %s" % config.pool.type]
    for one in config.controllers:
        account = one.account
        about = [one.type, "weight %d" % one.weight, "models " + (", ".join(one.models) or "all")]
        if one.type != "echo":
            about[1:1] = [account.base_url, "key %r" % account.api_key] + (["by a proxy"] if account.proxy else [])
        lines.append("controller %s: %s" % (one.name, "; ".join(about)))
    lines += ["model %s: %s" % pair for pair in config.pool.aliases]
    lines += ["model %s: else %s" % (name, ", ".join(models)) for name, models in config.pool.fallbacks]
    lines += ["client key %s: models %s" % (key.name, ", ".join(key.models) or "all") for key in config.client_keys]
    return [*lines, "address: " + address(config, config.host, config.port)]


SPELLED = {"account": "config", "digest": "key"}  # where the file says it otherwise than the record
RESTART = ("host", "port")  # the listener is open, and whoever may bind port 443 may have left that right behind


def differences(old: Record, new: Record, prefix: str = "") -> "Iterator[tuple[str, Any, Any]]":
    """The paths at which two records of one type differ, as a file spells them, with both values."""
    for name in old.fields:
        path, before, after = prefix + SPELLED.get(name, name), getattr(old, name), getattr(new, name)
        if isinstance(before, Record):
            yield from differences(before, after, path + ".")
        elif before != after:
            yield path, before, after


def diff_named(
    kind: str, old: "Sequence[ControllerConfig | ClientKey]", new: "Sequence[ControllerConfig | ClientKey]"
) -> "Iterator[str]":
    """What is different in a list whose members have names; of a change the keys only, as values may be secrets."""
    # By name, as state is kept by it: a controller that is renamed is a new one, whose ledger begins empty.
    before, after = {one.name: one for one in old}, {one.name: one for one in new}
    for name in before:
        if name not in after:
            yield "%s %s: removed" % (kind, name)
    for name, one in after.items():
        keys = ", ".join(path for path, _, _ in differences(before.get(name, one), one))
        if keys or name not in before:
            yield "%s %s: %s" % (kind, name, "changed: " + keys if keys else "added")
    if [*filter(after.__contains__, before)] != [*filter(before.__contains__, after)]:
        yield "%ss: another order" % kind  # which priority goes by


def diff_config(old: Config, new: Config) -> "Iterator[str]":
    """What is different in `new`, in lines without secrets; none when nothing is."""
    for path, before, after in differences(old, new):
        if path in ("controllers", "client_keys"):
            yield from diff_named(path[:-1].replace("_", " "), before, after)
        elif path != "source":
            restart = " (needs a restart)" if path in RESTART else ""
            yield "%s: %s -> %s%s" % (path, shown(before), shown(after), restart)


# ==== 3. Observability ====
# One line per request, written in batches, and the logger for everything rarer. What clients control is escaped; a
# secret that finds its way into a message is struck out by the last filter before the stream.


# OpenAI's 401 says "Incorrect API key provided: sk-proj-abc***wxyz": both ends of a key that a client has never seen.
# A word, a run of what masks are made of (also as JSON may escape it), and what follows. Every quantifier is possessive
# and a match starts at the start of a word only, so that no body makes it look twice at a byte.
_MASKED = (  # compiled, and kept by `re`, when the first error comes
    rb"(?<![\w\-])([\w\-]{3,64}+)(?:[*.]{3}|\xe2\x80[\xa2\xa6]|\\u202[26])"
    rb"(?:[*.]|\xe2\x80[\xa2\xa6]|\\u202[26])*+([\w\-]{0,64}+)"
)
_MASK_HINT = re.compile(rb"[*\xe2\\]")  # or two dots; one set of bytes is looked for three times as fast as words
# What people write where a server of their own wants some key: words that errors and logs may well hold.
DUMMY_KEYS = frozenset("ollama lm-studio not-needed no-key-required placeholder".split())


class Redactor:
    """A filter that strikes configured secrets out of every log record; the last line of defence, not the first."""

    secrets: "tuple[str, ...]" = ()  # for logs, and the same
    keys: "tuple[bytes, ...]" = ()  # for bodies; the longest first, as one may begin like another
    shortest = 0  # of the keys

    def watch(self, secrets: "Iterable[str]") -> None:
        """From now on strikes out these; short ones would strike out ordinary words."""
        # Fewer than six letters are no secret that holds, and striking them out would make logs unreadable.
        known = {value for value in secrets if len(value) >= 6} - DUMMY_KEYS
        known |= {json.dumps(value)[1:-1] for value in known}  # as an error body spells one that has quotes
        self.secrets = tuple(sorted(known, key=len, reverse=True))
        self.keys = tuple(secret.encode() for secret in self.secrets)
        self.shortest = min(map(len, self.keys), default=0)

    def clean(self, text: str) -> str:
        """`text` without secrets."""
        # The last letters stay: which of ten keys is meant is what the reader of a log wants to know.
        for secret in self.secrets:
            if secret in text:
                text = text.replace(secret, repr(Secret(secret)))
        return text

    def scrub(self, body: bytes) -> bytes:
        """An upstream's error body without secrets, whole or masked: OpenAI's 401 echoes both ends of the key."""
        for key in self.keys:
            if body.find(key) >= 0:
                body = body.replace(key, b"***")
        return re.sub(_MASKED, self._unmasked, body) if self.keys else body

    def scrub_field(self, value: bytes) -> bytes:
        """A reply's field value without secrets."""
        # There are many, most of them new at each reply (dates, ids, what is left of a quota): a glance must do.
        if len(value) < 6 or value.isdigit():
            return value
        if len(value) >= self.shortest:  # real keys are longer than most values
            for key in self.keys:
                if value.find(key) >= 0:
                    return self.scrub(value)
        return self.scrub(value) if value.find(b"..") >= 0 or _MASK_HINT.search(value) else value

    def _unmasked(self, match: "re.Match[bytes]") -> bytes:
        """What stays of a masked word: all of it unless it shows both ends of a key, or a dozen letters of one."""
        # Documentation and models write `sk-...` too: a mask is only struck out where its ends are a key's of ours.
        word, tail = match.groups()
        ending = [key for key in self.keys if key.endswith(tail)] if len(tail) >= 3 else []
        for key in self.keys if len(word) >= 12 else ending:
            at = word.rfind(key[:3])
            if at >= 0 and key.startswith(word[at:]) and (len(word) - at >= 12 or key in ending):
                return word[:at] + b"***"
        return match.group()

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces the record's text; never drops it."""
        # Tracebacks are rendered here, as a formatter would do it after this filter has looked.
        record.msg, record.args = self.clean(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = self.clean("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return True


class AccessRecord:
    """What the access log says of one request; times in seconds of the loop's clock.

    Filled by whoever knows: the server (client, status, bytes), the doors (key), the relay (model, controller,
    outcomes). `first_at` is when the first byte of the answer left, 0 while none has. `mapped`: the header line that
    tells which model stood in for the one that was asked for.
    """

    def __init__(self, client: str, method: str, path: str, since: float) -> None:
        self.client, self.method = client, method
        self.path, self.since = path, since
        self.model = self.controller = self.key = self.request_id = ""
        self.status = self.bytes = 0
        self.mapped = b""
        self.first_at = self.waited_s = self.until = 0.0
        self.outcomes: "list[tuple[str, str, float]]" = []  # controller, outcome, seconds; one per attempt


# Anything but visible ASCII without the backslash, as that begins what stands for the rest.
_UNSAFE = re.compile(r"[^!-\[\]-~]")


@functools.lru_cache(maxsize=1024)
def plain(text: str) -> str:
    """`text` as one word of a log line: what could forge a field or a line is escaped.

    Paths and models are a client's own words; kept, as clients repeat them.
    """
    return _UNSAFE.sub(lambda match: "\\x%02x" % ord(match.group()), text)


def text_line(record: AccessRecord, stamp: str) -> str:
    """The access line for people: time, client, request, model, status, controller, attempts, milliseconds, bytes."""
    # name=value, so that awk, grep and Loki's logfmt read it; what is rare comes last and only when there is some.
    first = (record.first_at or record.until) - record.since
    # Of %s alone Python makes one joining of texts, which takes half the time.
    line = "%s %s %s %s %s model=%s controller=%s attempts=%s first_ms=%s ms=%s bytes=%s" % (
        stamp,
        record.client,
        record.method,
        plain(record.path),
        record.status,
        plain(record.model) or "-",
        record.controller or "-",
        len(record.outcomes),
        "%.1f" % (first * 1e3),
        "%.1f" % ((record.until - record.since) * 1e3),
        record.bytes,
    )
    if record.key:
        line += " key=" + plain(record.key)
    if record.waited_s:
        line += " wait_ms=%.0f" % (record.waited_s * 1e3)
    if record.outcomes and (record.outcomes[0][1] != "ok" or len(record.outcomes) > 1):
        line += " tried=" + ",".join("%s:%s:%.0f" % (name, what, s * 1e3) for name, what, s in record.outcomes)
    return line + "\n"


def json_line(record: AccessRecord, stamp: str) -> str:
    """The access line for machines: the same fields as one JSON object; unknown is null, so that columns stay."""
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
        "first_ms": round(((record.first_at or record.until) - record.since) * 1e3, 1),
        "ms": round((record.until - record.since) * 1e3, 1),
        "wait_ms": round(record.waited_s * 1e3),
        "bytes": record.bytes,
        "key": record.key or None,
        "request_id": record.request_id or None,
    }
    return json.dumps(found, separators=(",", ":")) + "\n"


class Console:
    """Where log lines go: stderr, which may be a pipe that nobody reads (`2>&1 | less`), or journald, stalled.

    A write that blocks would stop every answer. So a pipe or socket gets only what it has room for, the rest is kept,
    and what is too much is dropped and counted. O_NONBLOCK would not do: it is a property of the open file, which
    belongs to the shell and to its other children, too. Files and terminals are written to as ever.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.poll: "select.poll | None" = None  # for what may block
        self.kept, self.dropped = bytearray(), 0  # bytes that wait for room; lines that came when those were too many
        self.watched = False  # the loop calls `send` once there is room

    def open(self) -> None:
        """Looks at what stderr is now."""
        try:
            self.fd = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # none, or what stands in its place is no file
            return
        try:
            mode = os.fstat(self.fd).st_mode
        except OSError:  # closed (2>&-): a client's socket would be the next to get this number, and then the log
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fd)
            return
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self.poll = select.poll()
            self.poll.register(self.fd, select.POLLOUT)

    def write(self, text: str) -> None:
        """Takes whole lines. A log that cannot be written must not stop the answers."""
        if self.poll is None:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (AttributeError, OSError):  # there is none, the disk is full, the terminal is gone
                pass
            return
        # While lines are missing no later one is taken: the note of it stands where they would have stood.
        if self.dropped:
            self.dropped += text.count("\n")
        else:
            self.kept += text.encode("utf-8", "backslashreplace")
        self.send()
        # Cut at a line's end, and from the newest: what led into the trouble tells more than what came of it.
        if len(self.kept) > LOG_KEPT_BYTES:
            end = self.kept.rfind(b"\n", 0, LOG_KEPT_BYTES) + 1
            self.dropped = self.kept.count(b"\n", end)
            del self.kept[end:]

    def send(self, patience_ms: int = 0) -> None:
        """Writes what there is room for; each piece may wait for it as long as told."""
        waits = False
        try:
            while (self.kept or self.dropped) and not waits:
                waits = not self.poll or not self.poll.poll(patience_ms)
                if not waits:
                    self._send_piece()
        except BlockingIOError:  # another process has set O_NONBLOCK
            waits = True
        except OSError:  # nobody reads any more; of a named pipe somebody may again
            self.dropped += self.kept.count(b"\n")
            self.kept.clear()
        self._watch(waits)

    def _send_piece(self) -> None:
        """One write that does not block: where poll finds room in a pipe there is some for PIPE_BUF bytes (POSIX)."""
        # In whole lines where they are short enough: pieces up to PIPE_BUF are atomic, other writers cannot cut them.
        if self.kept:
            end = self.kept.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
            del self.kept[: os.write(self.fd, self.kept[:end])]
        else:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            os.write(self.fd, b"%b WARNING %d lines dropped: nobody read them\n" % (stamp.encode(), self.dropped))
            self.dropped = 0

    def _watch(self, waits: bool) -> None:
        """Makes the loop call `send` when there is room, as long as something waits for it."""
        if waits == self.watched:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # before or after it the next line tries again
            return
        if waits:
            loop.add_writer(self.fd, self.send)
        else:
            loop.remove_writer(self.fd)
        self.watched = waits


class AccessLog:
    """Writes access lines, those of some milliseconds together: a line by itself costs twice, its write ten times."""

    def __init__(self, loop: asyncio.AbstractEventLoop, write: "Callable[[str], Any]") -> None:
        self.loop, self.write, self.render = loop, write, text_line
        self.records: "list[AccessRecord]" = []

    def add(self, record: AccessRecord) -> None:
        """Takes one finished request."""
        # The line is rendered later, after the answer has left: nobody waits for it.
        record.until = self.loop.time()
        if not self.records:
            self.loop.call_later(FLUSH_S, self.flush)
        self.records.append(record)

    def flush(self) -> None:
        """Writes what has gathered."""
        # One stamp for all, to the second: they ended within FLUSH_S of each other.
        records, self.records = self.records, []
        if records:
            stamp, render = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), self.render
            self.write("".join([render(record, stamp) for record in records]))


redactor = Redactor()
console = Console()


def secrets_of(config: Config) -> "Iterator[str]":
    """Every secret of a configuration, and the forms in which it travels. Of client keys only digests are known."""
    for controller in config.controllers:
        account = controller.account
        yield account.api_key.reveal()
        yield from (value.reveal() for _, value in account.headers)
        # A proxy's password travels as it is spelled in the URL, decoded, and in base64 with the user's name.
        parts = urllib.parse.urlsplit(account.proxy.reveal())
        if parts.password:
            pair = parts.netloc.rpartition("@")[0]
            yield from (parts.password, urllib.parse.unquote(parts.password), pair)
            yield base64.b64encode(urllib.parse.unquote(pair).encode()).decode()


def set_up_logging(config: Config) -> None:
    """Sends log records to stderr, cleaned of every secret that `config` holds."""
    # The log has a text format of its own even where access lines are JSON: it is for people, and has no fields.
    console.open()
    handler = logging.StreamHandler(console)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    redactor.watch(secrets_of(config))
    handler.addFilter(redactor)
    # asyncio's own reports what no code of ours has caught, and so may show what an exception's message holds.
    for logger in (log, logging.getLogger("asyncio")):
        logger.handlers[:] = [handler]
        logger.propagate = False
    log.setLevel(config.log.level.upper())


# ==== 4. HTTP/1.1 on the wire ====
# Bytes to values and back, strict (RFC 9110, RFC 9112), for both sides; no I/O, no clock. Heads are parsed whole by one
# regular expression; bodies by push decoders that may be fed at any cut. Nothing that was not parsed is passed on.
#
# Why so strict: a gateway stands between two parsers, and each byte that they may read differently is a way to smuggle
# one request inside another, on a connection that carries other people's keys. So what the grammar leaves open is
# refused, never repaired: a bare LF, a blank before a colon, a folded line, two lengths, a length beside a coding.
# And what goes on is written afresh from the parsed values, so a head that we misread cannot be read otherwise there.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# Origin-form, absolute-form, asterisk-form; authority-form belongs to CONNECT, which nobody may do here. Visible ASCII
# only: RFC 3986 knows no other byte, and what UTF-8 in a path means differs from one server to the next.
_TARGET = rb'/[!-~]*|\*|(?i:https?)://[!"$-.0->@-~][!"$-~]*'
_REQUEST_LINE = re.compile(rb"(%b) (%b) HTTP/([0-9])\.([0-9])\Z" % (_TOKEN, _TARGET))
# The reason phrase is free text and often missing, with or without the blank before it.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00-\x08\x0a-\x1f\x7f]*)?\Z")
# Values may hold bytes above 0x7f (obs-text), as some upstreams put UTF-8 there; of control characters only the tab.
# Possessive, because white space fits both parts: a field of 60,000 blanks with a bad end took 18 s to refuse.
_FIELD = re.compile(rb"(%b):[ \t]*+([^\x00-\x08\x0a-\x1f\x7f]*+)\Z" % _TOKEN)
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")
_EMPTY_LINES = re.compile(rb"(?:\r\n)+")  # before a request line they are skipped (RFC 9112, 2.2)
# Digits are counted before they are converted: int() takes "+5", "1_0" and " 5", and time for a million of them.
_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?\r\n")
_ABSOLUTE_TARGET = re.compile(r"(?i:https?)://([^/?#]+)([^#]*)\Z")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.\-~%!$&'()*+,;=]*)(?::[0-9]{0,5})?\Z")

# They speak of this connection only (RFC 9110, 7.6.1); whatever Connection names joins them.
HOP_BY_HOP = frozenset(b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade".split())
# A client's credentials are for us, never for an upstream: a key sent on by mistake is a key given away. Nor may it
# choose the account's organization. accept-encoding, because an answer that we must look into has to come plain.
REQUEST_DROPPED = HOP_BY_HOP | frozenset(
    b"authorization api-key x-api-key openai-organization openai-project cookie host accept-encoding expect forwarded"
    b" content-length x-apiserver-max-wait http2-settings".split()
)
REQUEST_DROPPED_PREFIXES = (b"proxy-", b"x-forwarded-")
# An upstream's cookies are those of its load balancer (Cloudflare's), and would tie all clients to one account's
# session; alt-svc would invite clients to go around us.
REPLY_DROPPED = HOP_BY_HOP | frozenset(
    b"set-cookie set-cookie2 content-length alt-svc proxy-authenticate proxy-authentication-info".split()
)
# On an answer that took waiting or failover these would speak of one account of many.
RETRY_FIELDS = frozenset((b"retry-after", b"retry-after-ms", b"x-should-retry"))

# Lines that hold a secret are parsed each time: what is remembered of lines lives as long as the process. So are those
# that nobody says twice, which would only push the others out.
NOT_KEPT_FIELDS = frozenset(
    b"authorization api-key x-api-key proxy-authorization cookie set-cookie x-request-id x-client-request-id cf-ray"
    b" apim-request-id request-id idempotency-key traceparent".split()
)

Fields = list[tuple[bytes, bytes]]
Index = dict[bytes, bytes]


def tokens(value: bytes) -> "set[bytes]":
    """The lower-case members of a comma-separated list."""
    return {member.strip(b" \t").lower() for member in value.split(b",")}


def keeps_alive(index: Index, minor: int) -> bool:
    """Whether a message leaves its connection open (RFC 9112, 9.3)."""
    found = index.get(b"connection")
    if found is None or found == b"keep-alive":
        return minor >= 1 or found is not None
    options = tokens(found)
    return b"close" not in options and (minor >= 1 or b"keep-alive" in options)


class RequestHead:
    """A request's start line and fields.

    `index`: lower-case name to value, repeated ones joined by a comma (RFC 9110, 5.3). `lines`: the fields that an
    upstream may see, written afresh, each with its CRLF.
    """

    __slots__ = ("index", "lines", "method", "minor", "target")

    def __init__(self, method: str, target: str, minor: int, index: Index, lines: bytes) -> None:
        self.method, self.target, self.minor, self.index, self.lines = method, target, minor, index, lines

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on this connection."""
        return keeps_alive(self.index, self.minor)


class ResponseHead:
    """A reply's status and fields, as `RequestHead`; `lines` are those that a client may see."""

    __slots__ = ("index", "lines", "minor", "status")

    def __init__(self, status: int, minor: int, index: Index, lines: bytes) -> None:
        self.status, self.minor = status, minor
        self.index, self.lines = index, lines


_PAIR, _LINE_ON = operator.itemgetter(0), operator.itemgetter(1)  # of what FieldLines knows of a line


def joined_index(pairs: "Iterable[tuple[bytes, bytes]]") -> Index:
    """The index of fields of which some repeat: their values are joined by commas."""
    index: Index = {}
    for name, value in pairs:
        index[name] = index[name] + b"," + value if name in index else value
    return index


def without(lines: bytes, names: "Collection[bytes]") -> bytes:
    """The field lines of `lines` without those of these lower-case names."""
    fields = lines.splitlines(keepends=True)
    return b"".join([field for field in fields if field[: field.index(b":")].lower() not in names])


class FieldLines(dict[bytes, tuple[tuple[bytes, bytes], bytes]]):
    """Parses field lines, and remembers what common ones come to: peers repeat theirs, and looking up costs a tenth.

    From a line to its lower-case name, its value, and the line to pass on, b"" where it stays here; one that is missing
    is parsed. `passes` tells by the lower-case name whether a field goes on, `clean` with which value.
    """

    __slots__ = ("clean", "names", "passes")

    def __init__(self, passes: "Callable[[bytes], bool]", clean: "Callable[[bytes], bytes]" = bytes) -> None:
        self.passes, self.clean = passes, clean
        self.names: "dict[bytes, tuple[bytes, bool]]" = {}  # as spelled, to the lower-case name and whether it passes

    def parse(self, block: bytes, limit: int) -> "tuple[Index, bytes]":
        """Index and passing lines of a head's field lines, which CRLF separates. Raises ValueError."""
        if not block:
            return {}, b""
        # A bare CR or LF stays within its line here, where `_FIELD` refuses it.
        lines = block.split(b"\r\n")
        if len(lines) > limit:
            raise ValueError("more than %d header fields" % limit)
        entries = list(map(self.__getitem__, lines))
        index = dict(map(_PAIR, entries))
        if len(index) != len(lines):  # some name stands twice
            index = joined_index(map(_PAIR, entries))
        kept = b"".join(map(_LINE_ON, entries))
        connection = index.get(b"connection")
        if connection is not None and connection not in (b"keep-alive", b"close"):
            kept = without(kept, tokens(connection))  # RFC 9110, 7.6.1
        return index, kept

    # Each reply has a few lines of its own: dates, ids, what is left of a quota.
    def __missing__(self, line: bytes) -> "tuple[tuple[bytes, bytes], bytes]":
        spelled, _, value = line.partition(b": ")
        known = self.names.get(spelled)
        if known is not None and value.isdigit():  # half of the cost, and it cannot be anything else
            name, passes = known
            line_on = line + b"\r\n" if passes else b""
        else:
            name, value, line_on = self._parse_line(line, spelled, value)
        entry = ((name, value), line_on)
        if len(line) <= KNOWN_LINE_BYTES and name not in NOT_KEPT_FIELDS:
            # Emptied when full: keeping the most used ones would cost more than to learn the common dozen again, and
            # somebody who sends a thousand new lines gains nothing but that.
            if len(self) >= KNOWN_LINES:
                self.clear()
            self[line] = entry
        return entry

    def _parse_line(self, line: bytes, spelled: bytes, value: bytes) -> "tuple[bytes, bytes, bytes]":
        """Lower-case name, value, and the line to pass on. Raises ValueError."""
        known = self.names.get(spelled)
        # A known name and a printable value without blanks around it need no expression, which costs three times that.
        if known is None or not (value.isascii() and value.decode().isprintable() and value.strip() == value != b""):
            found = _FIELD.match(line)
            if found is None:
                raise ValueError("a header line is malformed")
            spelled, value = found.group(1), found.group(2).rstrip(b" \t")
            known = self._learn_name(spelled)
        name, passes = known
        return name, value, b"%b: %b\r\n" % (spelled, self.clean(value)) if passes else b""

    def _learn_name(self, spelled: bytes) -> "tuple[bytes, bool]":
        """Lower-case name, and whether the field passes."""
        name = spelled.lower()
        if len(self.names) >= KNOWN_LINES:
            self.names.clear()
        if len(spelled) <= KNOWN_LINE_BYTES:
            self.names[spelled] = name, self.passes(name)
        return name, self.passes(name)


REQUEST_FIELDS = FieldLines(
    lambda name: name not in REQUEST_DROPPED and not name.startswith(REQUEST_DROPPED_PREFIXES)
)
REPLY_FIELDS = FieldLines(lambda name: name not in REPLY_DROPPED, redactor.scrub_field)


@functools.lru_cache(maxsize=256)  # clients ask for few targets; 256 of the longest are 2 MB
def parse_request_line(line: bytes) -> "tuple[str, str, int]":
    """Method, target and minor version. Raises BadMessage."""
    found = _REQUEST_LINE.match(line)
    if found is None:
        raise BadMessage(400, "The request line is malformed: METHOD SP /PATH SP HTTP/1.1 CRLF is needed.")
    if found.group(3) != b"1":
        raise BadMessage(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    return found.group(1).decode(), found.group(2).decode(), 1 if found.group(4) != b"0" else 0


# Two Hosts are joined by a comma in the index, which no host holds. IP-literals and reg-names as RFC 3986, 3.2.2 has
# them; the port may be empty. Which host it names is the business of the doors.
@functools.lru_cache(maxsize=256)
def check_host(host: "bytes | None", minor: int) -> None:
    """Exactly one Host on HTTP/1.1, and one that is a host (RFC 9112, 3.2). Raises BadMessage."""
    if host is None:
        if minor >= 1:
            raise BadMessage(400, "The Host header is missing (RFC 9112, 3.2).")
    elif not _HOST.match(host) or b"," in host:
        raise BadMessage(400, "The Host header is not one host name with an optional port.")


def parse_request_head(data: bytes, count_limit: int = FIELD_COUNT) -> RequestHead:
    """A request's head, from its first byte to and with the empty line. Raises BadMessage."""
    end = data.find(b"\r\n")
    method, target, minor = parse_request_line(data[:end])
    try:
        index, lines = REQUEST_FIELDS.parse(data[end + 2 : -4], count_limit)
    except ValueError as problem:
        status = 431 if "more than" in str(problem) else 400
        raise BadMessage(status, "The request head is refused: %s." % problem) from None
    host = index.get(b"host")
    if host is not None and len(host) > HOST_BYTES:
        raise BadMessage(400, "The Host header is longer than %d bytes." % HOST_BYTES)
    check_host(host, minor)
    return RequestHead(method, target, minor, index, lines)


class HeadMemory:
    """Parses the request heads of one connection, and remembers the last: clients repeat theirs, to the byte or but for
    the length of the body. An SDK's head has seventeen fields, and to parse it costs a tenth of its request.

    `at` and `tail`: how many bytes stand before and behind the digits of its Content-Length; 0 where it has none.
    """

    __slots__ = ("at", "data", "head", "tail")

    def __init__(self) -> None:
        self.data = b""
        self.at = self.tail = 0
        self.head: "RequestHead | None" = None

    def parse(self, data: bytes, count_limit: int = FIELD_COUNT) -> RequestHead:
        """As `parse_request_head`; the same object for the same bytes."""
        known = self.head
        if known is not None:
            if data == self.data:
                return known
            at, tail = self.at, self.tail
            digits = data[at : len(data) - tail] if at else b""
            # Where all but digits is the same, all else that they mean is: they can end neither a line nor the head.
            if digits.isdigit() and data[:at] == self.data[:at] and data[-tail:] == self.data[-tail:]:
                index = {**known.index, b"content-length": digits}
                self.data = data
                self.head = head = RequestHead(known.method, known.target, known.minor, index, known.lines)
                return head
        head = parse_request_head(data, count_limit)
        self._remember(data, head)
        return head

    def _remember(self, data: bytes, head: RequestHead) -> None:
        self.data, self.head, self.at = data, head, 0
        if len(data) > KNOWN_HEAD_BYTES:
            self.data, self.head = b"", None
            return
        length = head.index.get(b"content-length", b"")
        end = data.find(b"\r\n", data.lower().find(b"\r\ncontent-length:") + 2)
        # Where it stands twice its value is a list, and where white space follows the digits they are elsewhere.
        if length.isdigit() and data[end - len(length) : end] == length:
            self.at, self.tail = end - len(length), len(data) - end


@functools.lru_cache(maxsize=64)
def parse_status_line(line: bytes) -> "tuple[int, int]":
    """Status and minor version. Raises BadReply."""
    found = _STATUS_LINE.match(line)
    if found is None:  # HTTP/0.9 and ICY, which have no head, are among those
        raise BadReply("the upstream's status line is malformed")
    return int(found.group(2)), int(found.group(1))


def parse_response_head(data: bytes) -> ResponseHead:
    """A reply's head, from its first byte to and with the empty line. Raises BadReply."""
    end = data.find(b"\r\n")
    status, minor = parse_status_line(data[:end])
    try:
        index, lines = REPLY_FIELDS.parse(data[end + 2 : -4], 10 * FIELD_COUNT)
    except ValueError as problem:
        raise BadReply("the upstream's reply head is malformed: %s" % problem) from None
    return ResponseHead(status, minor, index, lines)


def check_partial_head(data: bytes, since: int = 0, line_limit: int = START_LINE_BYTES) -> None:
    """Refuses a head that can no longer become a good one, so that nobody waits for its end. Raises BadMessage.

    What stands before `since` was checked before: a head that comes byte by byte would take quadratic time.
    """
    if _BARE_LINE_END.search(data, since):
        raise BadMessage(400, "A line of the request head does not end with CRLF, or holds a control character.")
    if b"\n" not in data:
        if len(data) > line_limit + 1:  # its CR may have come without the LF
            raise BadMessage(414, "The request line is longer than %d bytes." % line_limit)
        if data and not re.match(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?: |\Z)", data):
            raise BadMessage(400, "This is no HTTP request.")
        return
    end = data.find(b"\r\n")
    if end >= since - 1 and not _REQUEST_LINE.match(data[:end]):
        raise BadMessage(400, "This is no HTTP request.")


def content_length(value: bytes) -> int:
    """The number of a Content-Length; repeated equal values count once (RFC 9112, 6.3). Raises ValueError."""
    if value.isdigit() and len(value) < 19:  # bytes.isdigit knows ASCII digits only
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
        if len(data) <= self.left:
            self.left -= len(data)
            self.done = not self.left
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


# Chunk-size lines seen before, at most 4096 of at most 7 digits: a stream's chunks have a few hundred sizes.
CHUNK_SIZES: "dict[bytes, int]" = {}


class ChunkedDecoder:
    """A chunked body of at most `limit` bytes (RFC 9112, 7.1); extensions are dropped, trailers too. `rest` as above.

    Trailers are checked and forgotten, as RFC 9110, 6.5.1 allows: nothing in them may become a header field. Raises
    ValueError for what the grammar or a bound forbids, OverflowError beyond `limit`.
    """

    __slots__ = ("done", "left", "limit", "line_bytes", "pending", "rest", "total", "trailing")

    def __init__(self, limit: int, line_bytes: int = CHUNK_LINE_BYTES) -> None:
        self.limit, self.line_bytes = limit, line_bytes
        self.left = 0  # bytes still to come of the open chunk; -1: its CRLF
        self.total = self.trailing = 0
        self.pending = b""  # the beginning of a line that is not whole yet
        self.rest, self.done = b"", False

    def feed(self, data: bytes) -> bytes:
        """The payload that `data` brings, which may be empty."""
        if self.pending:
            data, self.pending = self.pending + data, b""
        size = len(data)
        if not (self.left or self.trailing) and data[-2:] == b"\r\n":
            # One plain chunk, whole, is what nearly each read of a paced stream brings: a quarter of its event's cost.
            end = data.find(b"\r\n", 0, 10)
            length = CHUNK_SIZES.get(data[:end], 0)  # the last chunk's is 0, too
            if 0 < length == size - end - 4 and self.total + length <= self.limit:
                self.total += length
                return data[end + 2 : -2]
        out: "list[bytes]" = []
        at = 0 if self.left or self.trailing else self._whole_chunks(data, out)
        if at == size:  # as nearly all of a stream's reads
            return out[0] if len(out) == 1 else b"".join(out)
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
        at, taken, size, known = 0, 0, len(data), CHUNK_SIZES
        if self.total + size > self.limit:  # near its end each chunk is judged
            return 0
        while at < size:
            end = data.find(b"\r\n", at, at + 10)
            line = data[at:end]
            length = known.get(line) or self._plain_size(line)
            stop = end + 2 + length
            # The last chunk (length 0) is the slow path's too: what follows it are trailers.
            if not length or data[stop : stop + 2] != b"\r\n" or end < 0:
                break
            out.append(data[end + 2 : stop])
            taken += length
            at = stop + 2
        self.total += taken
        return at

    def _plain_size(self, line: bytes) -> int:
        """The size on a plain chunk-size line, remembered; 0 for what the slow path must judge."""
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,7}", line):
            return 0
        if len(CHUNK_SIZES) < 4096:
            CHUNK_SIZES[line] = int(line, 16)
        return int(line, 16)

    def _line(self, data: bytes, at: int) -> int:
        """Reads the chunk-size or trailer line at `at`; its end, or -1 when it is not whole."""
        # By the LF, so that a line that ends with a bare one is found and refused rather than joined to the next:
        # a parser before us that takes it for a line's end would see another body (RFC 9112, 11.2).
        end = data.find(b"\n", at, at + (TRAILER_BYTES if self.trailing else self.line_bytes))
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
        if len(rest) >= (TRAILER_BYTES if self.trailing else self.line_bytes):
            raise ValueError("a chunk-size or trailer line is too long")
        if not self.trailing and not re.match(rb"[0-9A-Fa-f]{1,15}(?:[ \t]*(?:;[^\r\n\x00]*)?)?\r?\Z", rest):
            raise ValueError("a chunk-size line is malformed")

    def _trailer(self, line: bytes) -> None:
        """One line of the trailer section; the empty one ends the body."""
        self.trailing += len(line)
        if line == b"\r\n":
            self.done = True
        elif self.trailing > TRAILER_BYTES or line[-2:] != b"\r\n" or not _FIELD.match(line[:-2]):
            raise ValueError("the trailer section is malformed or too long")

    def feed_eof(self) -> bool:
        """Whether the body is whole when the connection ends here."""
        return self.done


Decoder = LengthDecoder | ChunkedDecoder | EofDecoder


def decode_body(decoder: "LengthDecoder | ChunkedDecoder", data: bytes) -> bytes:
    """The part of a request's body that `data` brings. Raises BadMessage."""
    try:
        return decoder.feed(data)
    except OverflowError as problem:
        raise BadMessage(413, "%s." % str(problem).capitalize(), "request_too_large") from None
    except ValueError as problem:
        raise BadMessage(400, "The request body is malformed: %s." % problem) from None


def request_body_decoder(
    head: RequestHead, limit: int, line_bytes: int = CHUNK_LINE_BYTES
) -> "LengthDecoder | ChunkedDecoder | None":
    """What decodes the request's body, None where there is none. Raises BadMessage (RFC 9112, 6.1 and 6.3)."""
    coding = head.index.get(b"transfer-encoding")
    length = head.index.get(b"content-length")
    if coding is not None:
        # RFC 9112, 6.1 lets a server prefer the coding; the one before us may have preferred the length.
        if length is not None or head.minor == 0:
            raise BadMessage(400, "Transfer-Encoding cannot stand with Content-Length, nor on HTTP/1.0.")
        codings = [member.strip(b" \t").lower() for member in coding.split(b",")]
        if codings != [b"chunked"]:  # 400 where the end of the body cannot be known, 501 where a coding is not spoken
            status = 501 if codings[-1] == b"chunked" and codings.count(b"chunked") == 1 else 400
            raise BadMessage(status, "Only the transfer coding chunked is understood, alone and once.")
        return ChunkedDecoder(limit, line_bytes)
    if length is None:
        return None  # a request without either has no body (RFC 9112, 6.3), unlike a reply
    try:
        size = content_length(length)
    except ValueError as problem:
        raise BadMessage(400, "%s." % problem) from None
    if size > limit:  # before a byte of it is read
        raise BadMessage(413, "The body is %d bytes; at most %d are taken." % (size, limit), "request_too_large")
    return LengthDecoder(size) if size else None


def reply_body_decoder(
    head: ResponseHead, method: str, line_bytes: int = CHUNK_LINE_BYTES
) -> "LengthDecoder | ChunkedDecoder | EofDecoder":
    """What decodes a reply's body (RFC 9112, 6.3). Raises BadReply where the framing is ambiguous."""
    coding = head.index.get(b"transfer-encoding")
    length = head.index.get(b"content-length")
    if coding is not None and length is not None:
        raise BadReply("the upstream's reply has both Transfer-Encoding and Content-Length")
    # These have no body whatever their fields say; else the next reply on the connection would be read as one.
    if method == "HEAD" or head.status in (204, 304):
        return LengthDecoder(0)
    if coding is not None:
        if coding.strip(b" \t").lower() != b"chunked" or head.minor == 0:
            raise BadReply("the upstream's transfer coding is not plain chunked")
        # An answer may be as long as it likes: what is held of it is bounded elsewhere.
        return ChunkedDecoder(1 << 62, line_bytes)
    if length is None:
        return EofDecoder()
    try:
        return LengthDecoder(content_length(length))
    except ValueError as problem:
        raise BadReply("the upstream's reply is malformed: %s" % problem) from None


# RFC 2046, 5.1.1 and RFC 7578. What stands bare is read as leniently as clients write it (`----=_Part_1`).
_FORM_TYPE = re.compile(
    rb'multipart/[\w\-]+((?:[ \t]*;[ \t]*[\w\-*]+=(?:"[^"\\,]*+"|[^\s";,\\]++))++)[ \t]*;?\Z', re.IGNORECASE
)
_FORM_PARAMETER = re.compile(rb';[ \t]*([\w\-*]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*+"|[^;\s]*)')
# What a reader that knows no escapes, or no quotes, would take for the name of a field that counts.
_FORM_HIDDEN = re.compile(rb'(?<![\w\-])name[ \t]*=[ \t]*"?(model|stream)(?![\w.\-])', re.IGNORECASE)
UNCLEAR = "The form can be read in more than one way: %s."


def form_boundary(content_type: bytes) -> bytes:
    """The boundary of a form, if there is exactly one that all must read alike. Raises ProxyError (400)."""
    found = _FORM_TYPE.match(content_type)
    pairs = _FORM_PARAMETER.findall(found.group(1)) if found is not None else []
    values = [(key.lower(), value) for key, value in pairs if key[:8].lower() == b"boundary"]
    boundary: bytes = dict(values).get(b"boundary", b"").strip(b'"')
    if not re.fullmatch(rb"[ -~]{0,69}[!-~]", boundary) or len(values) > 1:
        raise ProxyError(400, "A multipart/form-data body with its boundary is needed here.")
    return boundary


def form_name(head: "list[bytes]") -> bytes:
    """The name that the head of a part gives it, in lower case. Raises ProxyError (400)."""
    names = []
    for line in head:
        if line and not _FIELD.match(line):  # a folded line too: half of all readers unfold it
            raise ProxyError(400, UNCLEAR % "a header line of a part is malformed")
        if line[:20].lower() == b"content-disposition:":
            pairs = [(key.lower(), value.strip(b'"').lower()) for key, value in _FORM_PARAMETER.findall(line)]
            names += [value if key == b"name" else b"\\" for key, value in pairs if key[:5] in (b"name", b"name*")]
            names += [name.lower() for name in _FORM_HIDDEN.findall(line)]
    if len(set(names)) > 1 or b"\\" in b"".join(names):
        raise ProxyError(400, UNCLEAR % "a part has two names, or an encoded one")
    return names[0] if names else b""


class FormScanner:
    """Finds short text fields of a multipart/form-data body (RFC 7578) that is fed at any cut, and keeps nothing of it.

    `spans`: where the first value of each wanted name stands, counted from the body's beginning; `seen`: which of them
    came, also as a file or too long. `twice`: one came again, so that two readers could believe two different ones. For
    the same reason a boundary is refused wherever readers differ about it, as RFC 2046 lets it stand nowhere else: with
    blanks or other line ends, right behind a part's head, and behind the last one. Raises ProxyError (400).
    """

    __slots__ = "at closed count in_head mark name pending pos seen spans start twice".split()

    wanted = (b"model", b"stream")

    def __init__(self, content_type: bytes) -> None:
        self.mark = b"--" + form_boundary(content_type)
        # Two bytes before whatever is looked at stay. Before the first boundary no line end needs to stand: as if.
        self.pending, self.at, self.pos = b"\r\n", -2, 0
        self.in_head = self.closed = self.twice = False
        self.name, self.start, self.count = b"", -1, 0
        self.spans: "dict[bytes, tuple[int, int]]" = {}
        self.seen: "set[bytes]" = set()

    def feed(self, data: bytes) -> None:
        """Looks at the next bytes of the body."""
        self.pending += data
        while self._head() if self.in_head else self._body():
            pass
        # Once, and not at each boundary: a form of nothing but boundaries would take quadratic time.
        self.pending, self.at, self.pos = self.pending[self.pos :], self.at + self.pos, 0

    def _body(self) -> bool:
        """Passes a part's body by, up to its delimiter; whether it has come. `pos` is two bytes before what is new."""
        pending, size = self.pending, len(self.mark)
        end = pending.find(self.mark, self.pos + 2)
        if end < 0 or len(pending) < end + size + 2:
            self.pos = max(self.pos, (end if end >= 0 else len(pending) - size + 1) - 2)
            return False
        self.count += 1
        if self.count > FORM_BOUNDARIES:
            raise ProxyError(400, "The boundary of the form stands in it more than %d times." % FORM_BOUNDARIES)
        before, after = pending[end - 2 : end], pending[end + size : end + size + 2]
        if before[1] not in b"\r\n" or after[0] not in b" \t\r\n-":  # within a line, or the beginning of a longer one
            self.pos = end - 1
            return True
        stop = self.at + end - 2
        if before != b"\r\n" or after not in (b"\r\n", b"--") or stop + 2 == self.start or self.closed:
            raise ProxyError(400, UNCLEAR % "its boundary stands where it may or may not count")
        if self.name in self.wanted and stop - self.start <= FORM_VALUE_BYTES:
            self.spans.setdefault(self.name, (self.start, stop))
        self.pos = end + size
        self.closed, self.name = after == b"--", b""
        self.in_head = not self.closed
        return True

    def _head(self) -> bool:
        """Reads a part's head, once it is whole; whether it is. Without fields it is the line end of the delimiter."""
        end = self.pending.find(b"\r\n\r\n", self.pos, self.pos + FORM_HEAD_BYTES + 4)
        if end < 0:
            if len(self.pending) - self.pos > FORM_HEAD_BYTES + 3:
                raise ProxyError(400, "The head of a part of the form is longer than %d bytes." % FORM_HEAD_BYTES)
            return False
        self.name = form_name(self.pending[self.pos : end].split(b"\r\n"))
        if self.name in self.wanted:
            self.twice = self.twice or self.name in self.seen
            self.seen.add(self.name)
        self.pos = end + 2
        self.in_head, self.start = False, self.at + end + 4
        return True


def chunk(payload: bytes) -> bytes:
    """`payload` as one chunk (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def render_fields(fields: Fields) -> bytes:
    """Field lines, each with its CRLF."""
    return b"".join([name + b": " + value + b"\r\n" for name, value in fields])


@functools.lru_cache(maxsize=64)
def status_line(status: int) -> bytes:
    """The first line of an answer."""
    from http import HTTPStatus  # start-up does without

    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


def split_target(target: str) -> "tuple[str, str, str]":
    """Authority (of absolute-form), percent-decoded path and raw query of a request target. Raises BadMessage."""
    authority = ""
    if not target.startswith("/"):
        # A server has to take absolute-form (RFC 9112, 3.2.2), as clients configured with a proxy send it.
        absolute = _ABSOLUTE_TARGET.match(target)
        if absolute is None:
            if target == "*":
                return "", "*", ""
            raise BadMessage(400, "The request target is neither a path nor an absolute URL.")
        authority, target = absolute.group(1), absolute.group(2)
        target = target if target.startswith("/") else "/" + target
    path, _, query = target.partition("?")
    if "%" in path:
        # Routes are found by the decoded path; what goes upstream keeps its spelling.
        path = urllib.parse.unquote(path, errors="replace")
        if any(ord(char) < 33 or ord(char) == 127 for char in path):
            raise BadMessage(400, "The request target hides a control character.")
    return authority, path, query


# ==== 5. Server-sent events ====
# Finds events in a byte stream cut anywhere, looks into them, and never rewrites them. Only bytes are split: U+2028 and
# friends are no line ends here. https://html.spec.whatwg.org/multipage/server-sent-events.html

# An event ends with an empty line, and each of its two line ends may be CRLF, LF or CR. "\r\n" alone is one line end:
# that is why the alternatives start with the longest.
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")


class EventSplitter:
    """Hands out the whole events of what it is fed; `pending` is the beginning of the next one."""

    pending = b""

    # A generator: whoever looks for the first real event stops there, and the rest of a read is never split.
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
    # A byte order mark may stand before the first event of a stream; elsewhere it does no harm. The lines of bytes end
    # with CRLF, LF or CR only, while those of a text have more ways to.
    for line in event.removeprefix(b"\xef\xbb\xbf").splitlines():
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


# The Responses API says these before anything is generated: an error that comes after them can still go elsewhere. The
# last two keep a connection open while a model thinks, there and where an API is translated from Anthropic's.
_PREFACE_TYPES = ("response.created", "response.queued", "response.in_progress", "keepalive", "ping")


def judge_event(event: bytes) -> EventKind:
    """Whether an event is a real answer's first, an error, or what may come before either."""
    if b'"choices":[{' in event and b'"error"' not in event:  # as nearly all are: no need to parse it
        return EventKind.REAL
    kind, data = event_fields(event)
    data = data.strip()
    if not data.startswith(b"{"):  # "[DONE]" counts as real: an answer may be empty
        return EventKind.REAL if data else EventKind.PREFACE
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return EventKind.REAL  # not ours to repair; the client sees what was sent
    if found.get("error") or kind == b"error" or found.get("type") in ("error", "response.failed"):
        return EventKind.ERROR
    if found.get("type") in _PREFACE_TYPES or found.get("choices") == []:
        return EventKind.PREFACE
    return EventKind.REAL


def error_event(message: str, code: str) -> bytes:
    """The event that tells a client of a cut. go-openai needs `error` as the first key and no space before it."""
    return b"data: " + compact_json(error_object(message, "server_error", code)) + b"\n\n"


# ==== 6. Timed streams ====
# asyncio's streams with three things added: a read that hands over whatever has arrived without copying it, a timer
# that is moved by assignment (a `wait_for` per read costs more than the read), and a hook that sees the peer leave.

# A read that waits has three ways to end: bytes, the peer's end, or `interrupt` with the error that a timer or a rescue
# chose. Nothing here cancels tasks to end a read: a cancellation cannot say why, and loses what has just arrived.

IDLE_CHECK_S = 30.0  # a timer is never armed further ahead than this, so moving it later or back is an assignment


def nothing() -> None:
    """What a cancelled deadline calls."""


class Deadline:
    """One timer of one connection: `set` moves it, `expired` is called once when it has passed."""

    __slots__ = ("armed", "at", "expired", "handle", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: "Callable[[], None]") -> None:
        self.loop, self.expired = loop, expired
        self.at = self.armed = math.inf
        self.handle: "asyncio.TimerHandle | None" = None

    # Where it can only move later, callers write `at` themselves and save the call.
    def set(self, at: float) -> None:
        """Moves the deadline to `at` (loop time); infinity switches it off."""
        self.at = at
        if at < self.armed:
            self._arm()

    def cancel(self) -> None:
        """Ends the timer for good."""
        self.at = self.armed = math.inf
        self.expired = nothing  # or the connection, whose method it is, would be left to the garbage collector
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None

    def _arm(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
        # An earlier deadline needs the timer moved, a later one does not: it looks again when it fires. A stream moves
        # its deadline at each event and arms a timer twice a minute.
        self.armed = min(self.at, self.loop.time() + IDLE_CHECK_S)
        self.handle = self.loop.call_at(self.armed, self._fire)

    def _fire(self) -> None:
        self.handle, self.armed = None, math.inf
        if self.at == math.inf:
            return
        if self.at <= self.loop.time():
            self.at = math.inf
            self.expired()
        else:
            self._arm()


class Pause:
    """What a fiber awaits until somebody calls its `resume`: `await PAUSE`."""

    __slots__ = ()

    def __await__(self) -> "Generator[Pause, None, None]":
        return iter((self,))  # type: ignore[return-value]  # half of what a generator takes


PAUSE = Pause()


class Running:
    """Which fiber's code runs now. No attribute of the class Fiber: to set one makes Python look all others up anew."""

    __slots__ = ("fiber",)

    def __init__(self) -> None:
        self.fiber: "Fiber | None" = None


running = Running()


class Fiber:
    """A coroutine that goes on within the callback that brings what it waits for.

    A Task goes on in the loop's next turn, which costs a future, a handle and a turn for each read: 15 us of a request.
    What needs a current task (asyncio.timeout) has to be awaited as a task of its own. `ended` is set at the end.
    """

    __slots__ = ("coro", "ended", "loop", "waits_for")

    def __init__(self, coro: "Coroutine[Any, Any, None]", loop: asyncio.AbstractEventLoop) -> None:
        self.coro, self.loop = coro, loop
        self.ended: "asyncio.Future[None]" = loop.create_future()
        self.waits_for: "asyncio.Future[Any] | asyncio.Handle | None" = None  # if it is no PAUSE
        loop.call_soon(self.resume)

    def resume(self, error: "BaseException | None" = None) -> None:
        """Goes on behind its PAUSE, which raises `error` if there is one. Only for one that waits there."""
        # One fiber may run another (a pushed event wakes the client's side): hence the one before comes back.
        before, running.fiber = running.fiber, self
        try:
            found = self.coro.send(None) if error is None else self.coro.throw(error)
        except (StopIteration, asyncio.CancelledError):
            self._end()
        except BaseException as problem:
            self._end()
            self.loop.call_exception_handler({"message": "a connection's coroutine failed", "exception": problem})
        else:
            if found is not PAUSE:
                self._wait(found)
        finally:
            running.fiber = before
            error = None  # its traceback leads here: a cycle, which only the garbage collector would end

    def cancel(self) -> None:
        """Makes what it waits for raise CancelledError, in the loop's next turn."""
        self.loop.call_soon(self._cancel)

    def _wait(self, future: "asyncio.Future[Any] | None") -> None:
        if future is None:  # asyncio.sleep(0); kept, as a cancellation must take back the waking
            self.waits_for = self.loop.call_soon(self.resume)
        else:
            self.waits_for = future
            future._asyncio_future_blocking = False  # as asyncio.Task does with what it is handed
            future.add_done_callback(self._wake)

    def _wake(self, future: "asyncio.Future[Any]") -> None:
        if self.waits_for is future:  # not cancelled meanwhile
            self.waits_for = None
            self.resume()

    def _cancel(self) -> None:
        # As asyncio.Task.cancel: a future that it waits for is cancelled and wakes it, anything else it is thrown at.
        if self.ended.done():
            return
        if self.waits_for is None or not self.waits_for.cancel():  # also when it is done, but has not woken us yet
            self.waits_for = None
            self.resume(asyncio.CancelledError())

    def _end(self) -> None:
        self.waits_for = None
        if not self.ended.done():
            self.ended.set_result(None)


def end_future(future: "asyncio.Future[None]", error: "Exception | None") -> None:
    """Makes whoever awaits `future` go on, or raise `error`."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class WireReader(asyncio.StreamReader):
    """A StreamReader that hands over what has arrived, as it arrived, and tells `on_end` when the peer leaves.

    `on_end(error)` is called at the FIN (None) and at a reset or lost connection (the exception). A reader that is
    diverted calls `sink` with each read instead of keeping it: no future, no task woken, half of what an event costs.
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
        self.resume: "Callable[[Exception | None], None] | None" = None  # of whoever waits in `read_some` or `divert`
        self.sink: "Callable[[bytes], bool] | None" = None

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        """Called by the protocol, and again when TLS takes a connection over."""
        assert isinstance(transport, asyncio.ReadTransport)
        self.link = transport

    def exception(self) -> "Exception | None":
        """Why the connection was lost, for `StreamWriter.drain`."""
        return self.lost if isinstance(self.lost, Exception) else None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]  # only bytes ever come
        """Called by the protocol; above the limit the peer is stopped."""
        if self.sink is not None:
            if self.sink(data):
                self._wake_up(None)
            return
        # Mostly nothing waits, and the read is kept as the very object that the kernel's bytes were put into.
        self.data = self.data + data if self.data else data
        if self.resume is not None:
            self._wake_up(None)
        elif len(self.data) >= READ_BYTES:
            self.hold()

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
        self._wake_up(error)

    # Back-pressure is all in these two: what a slow side cannot take stays with the fast one, and never in our memory.
    def hold(self) -> None:
        """Stops the peer: the kernel's buffers fill, then it cannot send."""
        if not self.held and self.link is not None and not self.link.is_closing():
            self.held = True
            self.link.pause_reading()

    def unhold(self) -> None:
        """Lets the peer go on."""
        if self.held and self.link is not None:
            self.held = False
            if not self.link.is_closing():
                self.link.resume_reading()

    async def read_some(self) -> bytes:
        """All that has arrived, at least a byte; b"" at the end. Raises what broke the connection."""
        while not self.data:
            if self.ended:
                if self.lost is not None:
                    raise ConnectionResetError(str(self.lost)) from self.lost
                return b""
            try:
                await self._waits()
            finally:
                self.resume = None
        data, self.data = self.data, b""
        if self.held:
            self.unhold()
        return data

    # Half of what an event costs is waking a coroutine to hand it on. So for the length of a body the reader calls a
    # function instead, in the very callback that read the bytes: they are with the client's socket when it returns.
    async def divert(self, sink: "Callable[[bytes], bool]") -> None:
        """Calls `sink` with each read until it returns true or nothing more comes. Raises what broke the connection."""
        self.sink = sink
        try:
            data, self.data = self.data, b""
            if (data and sink(data)) or self.ended:
                return
            await self._waits()
            if self.lost is not None:
                raise ConnectionResetError(str(self.lost)) from self.lost
        finally:
            self.sink = self.resume = None
            self.unhold()

    def cut(self, size: int) -> bytes:
        """The first `size` bytes of what has arrived, which must be as many."""
        data = self.data
        if len(data) == size:
            self.data = b""
            return data
        self.data = data[size:]
        return data[:size]

    # What is pipelined behind a body, or came behind a head.
    def unread(self, data: bytes) -> None:
        """Puts back what belongs to the next reader."""
        self.data = data + self.data

    def _waits(self) -> "Awaitable[None]":
        """What whoever reads has to await; a fiber is gone on with at once, a task in the next turn."""
        fiber = running.fiber
        if fiber is not None:
            self.resume = fiber.resume
            return PAUSE
        future: "asyncio.Future[None]" = self.loop.create_future()
        self.resume = functools.partial(end_future, future)
        return future

    def _wake_up(self, error: "Exception | None") -> None:
        resume, self.resume = self.resume, None
        if resume is not None:
            resume(error)

    def _end(self, error: "BaseException | None") -> None:
        self._wake_up(None)
        if self.on_end is not None:
            self.on_end(error)


class WireProtocol(asyncio.StreamReaderProtocol):
    """Joins a WireReader to a transport.

    `full`: the peer reads slower than we write; `on_writable` tells its end. `over_tls`: a FIN is the end of both ways.
    """

    def __init__(
        self,
        reader: WireReader,
        connected: "Callable[[WireProtocol, asyncio.WriteTransport], None] | None" = None,
    ) -> None:
        super().__init__(reader, loop=reader.loop)
        self.wire, self.connected = reader, connected
        self.full = self.over_tls = False
        self.on_writable: "Callable[[], None] | None" = None
        self.data_received = reader.feed_data  # type: ignore[method-assign]  # saves a call and a weak reference a read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)  # StreamWriter.drain works by it
        if self.connected is not None:
            assert isinstance(transport, asyncio.WriteTransport)
            self.connected(self, transport)

    # TCP may close one way and still take an answer, TLS may not (asyncio's cannot).
    def eof_received(self) -> bool:
        """Called by asyncio at the FIN; whether we may still write."""
        return bool(super().eof_received()) and not self.over_tls

    def pause_writing(self) -> None:
        """Called by asyncio above the high-water mark."""
        super().pause_writing()
        self.full = True

    def resume_writing(self) -> None:
        """Called by asyncio below the low-water mark."""
        super().resume_writing()
        self.full = False
        if self.on_writable is not None:
            self.on_writable()

    def connection_lost(self, exc: "Exception | None") -> None:
        """Called by asyncio. The bound methods go, so that no cycle is left to the collector."""
        super().connection_lost(exc)
        self.__dict__.pop("data_received", None)
        self.on_writable = self.connected = None


class Outbox:
    """The writes of one turn of the loop: the first leaves at once, those that follow it leave together at the end.

    Waking a peer that sleeps is half of what a write costs, and a peer that is awake takes the next ones for nothing:
    under load this halves the system's share of a request (30 to 14 us). Nothing waits beyond the turn, and a server
    with one client waits for nothing. Who closes a transport calls `flush` first.
    """

    __slots__ = ("loop", "open", "ready", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.open = loop, False
        # What the loop has still to do in this turn. It is private; without it every first write opens a window, which
        # costs a turn (3 us) where nothing follows.
        self.ready: "Collection[Any] | None" = getattr(loop, "_ready", None)
        self.waiting: "list[tuple[asyncio.WriteTransport, bytes]]" = []

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Writes `data` within this turn, after whatever was written to `transport` before."""
        # The first one is written at once, so that with a single client nothing is ever late.
        if self.open:
            if len(data) <= OUTBOX_BYTES:
                self.waiting.append((transport, data))
                return
            self.flush()
        elif self.ready is None or self.ready:
            self.open = True
            self.loop.call_soon(self._close)
        transport.write(data)

    def flush(self) -> None:
        """Writes what waits."""
        waiting, self.waiting = self.waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)

    def _close(self) -> None:
        self.open = False
        self.flush()


def tune(transport: asyncio.BaseTransport) -> None:
    """Sets the bounds of a connection: what one read may bring and what may wait to be sent."""
    if hasattr(transport, "max_size"):
        transport.max_size = READ_BYTES  # 256 kB as it comes: a large allocation for each read
    assert isinstance(transport, asyncio.WriteTransport)
    transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)


def shrink_tls_buffers() -> None:
    """Makes asyncio's TLS connections small: their read buffer is a class attribute, there is no parameter for it."""
    # Each connection's __init__ allocates as much. A TLS record has at most 16 kB, so two of them fit.
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


# ==== 7. Upstream connections ====
# Dialling (TCP, proxy, TLS), one exchange at a time on a connection, and a pool of idle ones per origin. Bookkeeping is
# synchronous; a connection is given back at most once, and only when its last reply was read to its end.
#
# What is promised to the sections below: a request is never answered with bytes of another's reply. A connection goes
# back to the pool only if its reply ended where its framing says, nothing came after it, and nobody wants to close it;
# and it comes out again only if it is still open and silent. All else is closed, which costs a handshake and no more.


class Origin(Record):
    """Where connections go: scheme, host, port, and by which proxy and which certificates.

    Made by `intern_origin` only, one for each place, so that they are compared and hashed by identity: hashing the five
    fields at every request took 4 us.
    """

    scheme: str
    host: str
    port: int
    proxy: Secret = NO_SECRET
    ca_file: str = ""
    __eq__, __hash__ = object.__eq__, object.__hash__

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
    # Passwords hold what a URL may not, so they are escaped there. UTF-8, as RFC 7617 says when a proxy says nothing.
    pair = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
    return b"Proxy-Authorization: Basic " + base64.b64encode(pair.encode()) + b"\r\n"


@functools.lru_cache(maxsize=64)
def tls_context(ca_file: str) -> ssl.SSLContext:
    """Verifying client context; the system's certificates (or SSL_CERT_FILE's) unless a file is named."""
    # One context for all connections that trust the same: loading the system's certificates takes 20 ms. There is no
    # way to switch verification off: whoever needs it has a certificate to put into ca_file.
    context = ssl.create_default_context(cafile=ca_file or None)
    context.set_alpn_protocols(["http/1.1"])  # without it some front ends speak HTTP/2 to whoever connects
    return context


Link = tuple[WireReader, asyncio.StreamWriter]
Dial = Callable[[Origin], Awaitable[Link]]


def abort_unwanted(dialling: "asyncio.Task[tuple[asyncio.Transport, WireProtocol]]") -> None:
    """Closes a connection that nobody waits for any more."""
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result()[0].abort()


async def unless_cancelled(dialling: "asyncio.Task[tuple[asyncio.Transport, WireProtocol]]") -> "tuple[Any, Any]":
    """The connection that a race of addresses brings.

    Cancelled in the race, asyncio forgets a socket that has just connected without closing it.
    """
    try:
        return await asyncio.shield(dialling)
    except asyncio.CancelledError:
        dialling.add_done_callback(abort_unwanted)
        dialling.get_loop().call_later(UNWANTED_S, dialling.cancel)
        raise


class Lookups:
    """Looks a name up once for all who ask at the same time.

    asyncio gives each lookup a thread, and has six of them where there are two processors: a name that no resolver
    answers for would take them all, and no other account could be connected to.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.look_up = loop, loop.getaddrinfo
        self.under_way: "dict[Any, asyncio.Task[Any]]" = {}

    async def getaddrinfo(self, host: "Any", port: "Any", **more: "Any") -> "Any":
        """As the loop's own, in whose place it stands."""
        asked = (host, port, *sorted(more.items()))
        task = self.under_way.get(asked)
        if task is None:
            task = self.under_way[asked] = self.loop.create_task(self.look_up(host, port, **more))
            task.add_done_callback(functools.partial(self._end, asked))
        return await asyncio.shield(task)  # who gives up ends the lookup for nobody else

    def _end(self, asked: "Any", task: "asyncio.Task[Any]") -> None:
        del self.under_way[asked]
        if not task.cancelled():
            task.exception()  # or asyncio would log one for which nobody waits any more


async def open_link(host: str, port: int, tls: "ssl.SSLContext | None" = None, name: "str | None" = None) -> Link:
    """A TCP or TLS connection as a pair of streams; IPv6 and IPv4 race as RFC 8305 says."""
    loop = asyncio.get_running_loop()
    reader = WireReader(loop)
    protocol = WireProtocol(reader)
    literal = ":" in host or not host.strip("0123456789.")  # one address: no race, which takes three tasks
    connecting = loop.create_connection(
        lambda: protocol,
        host,
        port,
        ssl=tls,
        server_hostname=name,
        happy_eyeballs_delay=None if literal else 0.25,
    )
    transport, _ = await (connecting if literal else unless_cancelled(loop.create_task(connecting)))
    tune(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def check_reply_beginning(data: bytes, limit: int) -> None:
    """Refuses what cannot become a reply head, before waiting for more of it."""
    if len(data) > limit + 3:  # of the empty line some may have come
        raise BadReply("the upstream's reply head is longer than %d bytes" % limit)
    if data[:7] != b"HTTP/1."[: len(data)]:
        raise BadReply("the upstream does not speak HTTP/1.1")


async def read_reply_head(reader: WireReader, limit: int) -> "tuple[ResponseHead, bytes]":
    """The final head of a reply, past the interim ones, and what came after it. Raises UpstreamError."""
    data = b""
    # 100 and 103 may come before the final head, any number of them (RFC 9110, 15.2); 101 was never asked for.
    for _ in range(INFORMATIONAL_MAX):
        end = data.find(b"\r\n\r\n")
        while end < 0:
            if data:
                check_reply_beginning(data, limit)
            more = await reader.read_some()
            if not more:
                raise UpstreamClosed("the upstream closed the connection before its reply", early=not data)
            start = max(0, len(data) - 3)
            data = data + more if data else more
            end = data.find(b"\r\n\r\n", start)
        if end > limit:
            raise BadReply("the upstream's reply head is longer than %d bytes" % limit)
        head = parse_response_head(data[: end + 4])
        data = data[end + 4 :]
        if head.status >= 200:
            return head, data
        if head.status == 101:
            break
    raise BadReply("the upstream sent more interim replies than anyone needs, or switched protocols")


async def open_tunnel(link: Link, origin: Origin) -> None:
    """Asks the proxy for a tunnel (RFC 9110, 9.3.6)."""
    # The port always stands there (RFC 9110, 9.3.6), unlike in a Host.
    host = "[%s]" % origin.host if ":" in origin.host else origin.host
    target = b"%b:%d" % (host.encode("idna" if not host.isascii() else "ascii"), origin.port)
    link[1].write(
        b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, target, proxy_authorization(origin.proxy))
    )
    head, rest = await read_reply_head(link[0], UPSTREAM_HEAD_BYTES)
    if not 200 <= head.status < 300:
        raise ConnectFailed("the proxy refused the tunnel with status %d" % head.status)
    if rest:  # it would be taken for the origin's TLS
        raise ConnectFailed("the proxy sent bytes before the tunnel's own")


async def dial(origin: Origin) -> Link:
    """A connection on which requests to `origin` can be written, by its proxy where it has one. Raises OSError."""
    tls = tls_context(origin.ca_file) if origin.scheme == "https" else None
    if not origin.proxy:
        return await open_link(origin.host, origin.port, tls, origin.host if tls else None)
    proxy = urllib.parse.urlsplit(origin.proxy.reveal())
    link = await open_link(proxy.hostname or "", proxy.port or 80)
    if tls is None:
        return link  # a plain origin is asked for in absolute-form, without a tunnel
    try:
        await open_tunnel(link, origin)
        await link[1].start_tls(tls, server_hostname=origin.host)
        link[0].set_transport(link[1].transport)
        tune(link[1].transport)
    except BaseException:
        link[1].transport.abort()
        raise
    return link


class Outlet(Protocol):
    """Where body bytes go as they arrive: a client's connection."""

    def push(self, data: bytes) -> bool:
        """Writes `data` now; whether more is welcome. If not, `when_ready` tells when it is again."""

    def when_ready(self, call: "Callable[[], None]") -> None:
        """Calls `call` once, when the client has read enough."""


class Exchange(Protocol):
    """One request and its reply, on a network connection or made up by an echo controller.

    `head` is there after `start`; `complete` tells that all of the body came with it, and `take` gives it. All raise
    UpstreamError. `finish` after the last byte, `abort` at any other time; each is harmless when repeated.
    """

    head: ResponseHead
    complete: bool

    async def start(self) -> None:
        """Sends the request and reads the reply's head."""

    def take(self) -> bytes:
        """What has arrived of the body with the head, without waiting."""

    async def read(self) -> bytes:
        """Some bytes of the body, b"" at its whole end."""

    async def pipe(self, outlet: Outlet) -> None:
        """Hands the rest of the body to `outlet`, each read within the callback that brought it."""

    def interrupt(self, error: Exception) -> None:
        """Makes the waiting `start` or `read` raise `error`."""

    def finish(self) -> None:
        """Gives everything back."""

    def abort(self) -> None:
        """Closes the upstream connection now."""


class Upload(Protocol):
    """The rest of a request's body, which passes through while it still comes from the client.

    `left`: how many bytes that is, unless it comes in chunks. `tapped`: some of it is gone, so that the request cannot
    be sent a second time.
    """

    chunked: bool
    tapped: bool

    @property
    def left(self) -> int:
        """See above."""

    @property
    def done(self) -> bool:
        """Whether all of it has passed."""

    def pour(self, push: "Callable[[bytes, bool], bool]") -> None:
        """From now on calls `push(data, last)` with what comes; it says whether more is welcome. If not: `resume`."""

    def resume(self) -> None:
        """More is welcome again."""

    def stop(self) -> None:
        """Nothing more is wanted."""


class UpstreamConnection:
    """A connection to an origin; `used` counts its exchanges."""

    __slots__ = "deadline early idle loop origin pool reader transport used within_s writer written_at".split()

    def __init__(self, origin: Origin, link: Link, pool: "ConnectionPool") -> None:
        self.origin, self.pool = origin, pool
        self.reader, self.writer = link  # the writer, too: it closes its transport when nobody has it any more
        self.transport = self.writer.transport
        self.loop = self.reader.loop
        self.deadline = Deadline(self.loop, self._expired)
        self.used = 0
        self.idle = False
        self.early = True  # no byte of the current reply has come
        self.within_s = 0.0  # that the reply to the current request may take to begin
        self.written_at = 0.0
        self.reader.on_end = self._ended

    def __repr__(self) -> str:
        state = "closed" if self.transport.is_closing() else "idle" if self.idle else "active"
        return "<UpstreamConnection %s %s used=%d>" % (self.origin.authority, state, self.used)

    # Something unasked is mostly a 408 of an upstream that was tired of waiting; it must not answer the next request.
    def quiet(self) -> bool:
        """Whether it is open as far as is known, and nothing has come unasked (RFC 9112, 9.5 and 11.2)."""
        return not (self.reader.ended or self.reader.data)

    def sent(self, now: float, within_s: float) -> None:
        """A request was written; its reply must begin within this time, 0 is no limit."""
        self.used += 1
        self.written_at, self.early = now, True
        self.within_s = within_s
        self.deadline.set(now + within_s if within_s else math.inf)

    # A reset a minute after the write is no stale connection: the request was being answered, and may be billed.
    def was_stale(self, error: UpstreamClosed) -> bool:
        """Whether it had died in the pool: then the request never arrived (RFC 9112, 9.3.1)."""
        return error.early and self.used > 1 and self.loop.time() - self.written_at < STALE_S

    # abort, not close: TLS would wait for the other side's goodbye, and an upstream that still generates has to notice
    # at once that nobody listens.
    def close(self) -> None:
        """Closes without waiting for anything."""
        self.deadline.cancel()
        self.reader.on_end = None
        self.transport.abort()

    # One timer serves both lives: in the pool it ends the idling, in an exchange the waiting.
    def _expired(self) -> None:
        if self.idle:
            self.pool.drop(self)
        else:
            began = "nothing came from the upstream in time"
            silent = "no byte of a reply within %g s" % self.within_s
            self.reader.interrupt(UpstreamTimeout(silent if self.early else began, early=self.early))

    # In an exchange the read that waits is told by its reader.
    def _ended(self, error: "BaseException | None") -> None:
        if self.idle:
            self.pool.drop(self)


def close_unwanted(dialling: "asyncio.Task[Link]") -> None:
    """Closes a link that nobody waits for any more."""
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result()[1].transport.abort()


class ConnectionPool:
    """Idle connections per origin, the most recently used first, so that the surplus grows old and closes.

    `most`: connections of any kind that the system has files for. Idle ones make room for new ones; as many as are
    needed at once are never refused.
    """

    def __init__(self, outbox: Outbox, dial: Dial = dial) -> None:
        self.outbox, self.dial = outbox, dial
        self.head_bytes, self.line_bytes = UPSTREAM_HEAD_BYTES, CHUNK_LINE_BYTES
        self.idle: "dict[Origin, list[UpstreamConnection]]" = {}
        self.active: "set[UpstreamConnection]" = set()
        self.idle_count, self.dialling, self.closed = 0, 0, False
        self.most = math.inf

    def __repr__(self) -> str:
        return "<ConnectionPool idle=%d active=%d>" % (self.idle_count, len(self.active))

    def take(self, origin: Origin) -> "UpstreamConnection | None":
        """An idle connection that is still good, if there is one."""
        idle = self.idle.get(origin)
        while idle:
            connection = idle.pop()  # LIFO: the fewest connections stay warm, TLS sessions and TCP windows with them
            connection.idle = False
            self.idle_count -= 1
            if connection.quiet() and not connection.transport.is_closing():
                self.active.add(connection)
                return connection
            connection.close()
        return None

    async def connect(self, origin: Origin, within_s: float) -> UpstreamConnection:
        """A fresh connection. Raises ConnectFailed, within `within_s` seconds."""
        # Without a file left the dial would fail, and its controller be blamed.
        if self.idle_count and self.idle_count + len(self.active) + self.dialling >= self.most:
            self._drop_oldest()
        self.dialling += 1
        # A task of its own, because asyncio.timeout needs one, which a fiber is not.
        dialling = asyncio.get_running_loop().create_task(self._dial(origin, within_s))
        try:
            link = await dialling
        except asyncio.CancelledError:
            dialling.add_done_callback(close_unwanted)
            dialling.cancel()
            raise
        except TimeoutError:
            raise ConnectFailed("no connection to %s within %g s" % (origin.authority, within_s)) from None
        except (OSError, UnicodeError, UpstreamError) as problem:
            why = str(problem) or "closed during the handshake"  # asyncio's word for that end is an error without one
            raise ConnectFailed("no connection to %s: %s" % (origin.authority, why)) from problem
        finally:
            self.dialling -= 1
        connection = UpstreamConnection(origin, link, self)
        self.active.add(connection)
        return connection

    async def _dial(self, origin: Origin, within_s: float) -> Link:
        async with asyncio.timeout(within_s or None):
            return await self.dial(origin)

    def give_back(self, connection: UpstreamConnection, reusable: bool) -> None:
        """Takes a connection after its exchange; one that cannot serve another is closed."""
        # finish and abort may both come, in any order: whoever is second finds nothing to do.
        if connection not in self.active:
            return
        self.active.discard(connection)
        # With a part of the request unsent, its rest would stand before the next one.
        if not reusable or self.closed or not connection.quiet() or connection.transport.get_write_buffer_size():
            connection.close()
            return
        connection.idle = True
        connection.deadline.set(connection.loop.time() + IDLE_UPSTREAM_S)
        self.idle.setdefault(connection.origin, []).append(connection)
        self.idle_count += 1
        if self.idle_count > IDLE_UPSTREAM_COUNT:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Closes the one that is idle longest."""
        self.drop(min((one[0] for one in self.idle.values() if one), key=lambda one: one.deadline.at))

    def drop(self, connection: UpstreamConnection) -> None:
        """Closes an idle connection that has expired or ended."""
        idle = self.idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
            self.idle_count -= 1
        connection.idle = False
        connection.close()

    def close(self) -> None:
        """Closes the idle connections; the active ones when they are given back."""
        self.closed = True
        for connections in self.idle.values():
            for connection in connections:
                connection.close()
        self.idle.clear()
        self.idle_count = 0


def as_closed(problem: "UpstreamClosed | ConnectionError") -> UpstreamClosed:
    """A lost connection as the error that says so."""
    if isinstance(problem, UpstreamClosed):
        return problem
    return UpstreamClosed("the upstream reset the connection before its reply", early=True)


def ended_well(transport: asyncio.BaseTransport) -> bool:
    """Whether TLS, where there is any, said that nothing more comes: anybody can forge a FIN (RFC 9112, 9.8)."""
    # For a body that ends with its connection. asyncio reports both ends alike, but the TLS object knows: reading gives
    # b"" after a close_notify, and asks for more where there was none.
    tls = transport.get_extra_info("ssl_object")
    try:
        return tls is None or not tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        return True


class NetworkExchange:
    """An exchange on a connection of the pool. See `Exchange`.

    `on_sent(now)` is called when the request is written: with an `upload` when that has come to its end, however it
    does, as an upstream is not silent while it still has to listen.
    """

    __slots__ = (
        "broken complete connection decoder ends_at hasty head idle_s message method on_sent origin piped pool rest"
        " stopped timeouts upload within_s"
    ).split()

    def __init__(
        self,
        pool: ConnectionPool,
        origin: Origin,
        message: "tuple[bytes, bytes]",
        timeouts: Timeouts,
        on_sent: "Callable[[float], None]",
        method: str = "POST",
        upload: "Upload | None" = None,
    ) -> None:
        self.pool, self.origin, self.message = pool, origin, message
        self.timeouts, self.on_sent, self.method, self.upload = timeouts, on_sent, method, upload
        within_s, total = timeouts.first_byte or 0.0, timeouts.total
        self.within_s = min(within_s or total, total) if total else within_s  # for the reply to begin; 0 is no limit
        self.connection: "UpstreamConnection | None" = None
        self.decoder: "Decoder | None" = None
        self.rest = b""  # of the body, as it came with the head
        self.hasty = False  # the reply began before the request had ended
        self.complete = False
        self.stopped: "Exception | None" = None  # by an interrupt that met no connection
        # While the body is piped: from where to where, until when at most, after how much silence, and what was wrong.
        self.piped: "tuple[Decoder, UpstreamConnection, Outlet]"
        self.ends_at, self.idle_s = math.inf, timeouts.idle or math.inf
        self.broken: "ValueError | None" = None
        self.head: ResponseHead

    async def start(self) -> None:
        """See `Exchange`. A pooled connection that had died is replaced, once."""
        connection = self.pool.take(self.origin) or await self.pool.connect(self.origin, self.timeouts.connect)
        self._send(connection)
        try:
            data = await connection.reader.read_some()
            end = data.find(b"\r\n\r\n")
            if 0 <= end <= self.pool.head_bytes and data[9:10] != b"1":  # as nearly all come: whole, in one read
                self.head, self.rest = parse_response_head(data[: end + 4]), data[end + 4 :]
            else:  # not whole yet, or an interim one
                connection.reader.unread(data)
                self.head, self.rest = await read_reply_head(connection.reader, self.pool.head_bytes)
        except (UpstreamClosed, ConnectionError) as problem:
            error = as_closed(problem)
            # Upstreams close idle connections, and their FIN may cross our request: then it was never read, and goes
            # out once more. This is the one replay that no table of outcomes decides.
            if not connection.was_stale(error) or (self.upload is not None and self.upload.tapped):
                raise error from None if error is problem else problem  # an error that is its own cause is never freed
            self.abort()
            connection = await self.pool.connect(self.origin, self.timeouts.connect)
            if self.stopped is not None:
                self.pool.give_back(connection, False)
                raise self.stopped from None
            self._send(connection)
            try:
                self.head, self.rest = await read_reply_head(connection.reader, self.pool.head_bytes)
            except ConnectionError as again:
                raise as_closed(again) from again
        if self.head.status == 407:  # said before the request reached its upstream, and of no use to a client
            raise ConnectFailed("a proxy on the way to %s wants another password" % self.origin.authority)
        self.message = b"", b""  # it arrived, so it will not be sent again
        self.hasty = self.upload is not None and not self.upload.done
        self.decoder = decoder = reply_body_decoder(self.head, self.method, self.pool.line_bytes)
        self.complete = type(decoder) is LengthDecoder and decoder.left == len(self.rest)
        connection.early = False
        connection.deadline.set(self._idle_until(connection))

    def take(self) -> bytes:
        """See `Exchange`."""
        data, self.rest = self.rest, b""
        if data and self.complete and self.decoder is not None:
            self.decoder.done = True
            return data
        return self._decode(data) if data else b""

    async def read(self) -> bytes:
        """See `Exchange`."""
        payload = self.take()
        if payload:
            return payload
        decoder, connection = self.decoder, self.connection
        assert decoder is not None and connection is not None
        while not decoder.done:
            try:
                data = await connection.reader.read_some()
            except ConnectionError as problem:
                raise UpstreamClosed("the upstream reset the connection in its reply") from problem
            if not data:
                self._check_end(decoder)
                return b""
            connection.deadline.set(self._idle_until(connection))
            payload = self._decode(data)
            if payload:
                return payload
        return b""

    async def pipe(self, outlet: Outlet) -> None:
        """See `Exchange`."""
        decoder, connection = self.decoder, self.connection
        assert decoder is not None and connection is not None
        self.piped, self.ends_at = (decoder, connection, outlet), self._ends_at(connection)
        data, self.rest = self.rest, b""
        try:
            if not (self._arrived(data) if data else decoder.done):
                await connection.reader.divert(self._arrived)
        except ConnectionError as problem:
            raise UpstreamClosed("the upstream reset the connection in its reply") from problem
        finally:
            del self.piped  # a translation is its exchange's outlet: each would have the other
        if self.broken is not None:
            raise BadReply("the upstream's reply is malformed: %s" % self.broken)
        self._check_end(decoder)

    def _arrived(self, data: bytes) -> bool:
        """Hands on what a read brings of the body; whether that was its end. A method: the cells of a closure took
        half a kilobyte of each stream."""
        decoder, connection, outlet = self.piped
        try:
            payload = decoder.feed(data)
        except ValueError as problem:  # kept, not raised: above a callback there is nobody who could take it
            self.broken = problem.with_traceback(None)  # whose frame has us
            return True
        deadline, silent_at = connection.deadline, connection.loop.time() + self.idle_s
        # Only ever later: the timer looks when it fires.
        deadline.at = silent_at if silent_at < self.ends_at else self.ends_at
        if payload and not outlet.push(payload):
            # It is we who keep the upstream waiting now, so its clock stands still; the client's runs instead.
            deadline.at = math.inf
            connection.reader.hold()
            outlet.when_ready(self._resume)
        return decoder.done

    def _resume(self) -> None:
        """The client takes more."""
        if self.connection is not None:
            self.connection.deadline.set(self._idle_until(self.connection))
            self.connection.reader.unhold()

    def interrupt(self, error: Exception) -> None:
        """See `Exchange`."""
        if self.connection is not None:
            self.connection.reader.interrupt(error)
        else:  # a stale one is being replaced
            self.stopped = error

    def finish(self) -> None:
        """See `Exchange`. The connection is kept when its reply was whole and nobody wants to close it."""
        connection, decoder = self.connection, self.decoder
        if connection is None:
            return
        whole = decoder is not None and decoder.done and not decoder.rest and type(decoder) is not EofDecoder
        self.connection = None
        if self.upload is not None:
            # Who answers early may take the rest of the body, a client's bytes, for the next request.
            whole = self._end_upload(self.upload, connection) and whole and not self.hasty
        head = self.head
        # Bytes beyond the reply's end would be taken for the next reply: response splitting, the other way round.
        whole = whole and ((head.minor and b"connection" not in head.index) or keeps_alive(head.index, head.minor))
        self.pool.give_back(connection, whole)

    def abort(self) -> None:
        """See `Exchange`."""
        connection, self.connection = self.connection, None
        if connection is not None:
            if self.upload is not None:
                self._end_upload(self.upload, connection)
            self.pool.give_back(connection, False)

    def _send(self, connection: UpstreamConnection) -> None:
        """Writes the request as one piece; the transport sends what the kernel does not take while we read on."""
        self.connection = connection
        (head, body), transport = self.message, connection.transport
        # A reply may come before the request is sent whole (401, 413): nobody waits for the writing to end. To copy
        # 100 kB costs less than a second system call that wakes the upstream twice (80 us of the system's time or 60).
        if len(body) < JOINED_BYTES:
            self.pool.outbox.write(transport, head + body)
        else:
            transport.write(head)
            transport.write(body)
        now = connection.loop.time()
        if self.upload is not None:
            connection.sent(now, 0.0)
            self.upload.pour(self._push)
            return
        connection.sent(now, self.within_s)
        self.on_sent(now)

    def _push(self, data: bytes, last: bool) -> bool:
        """Writes a piece of an upload; whether more is welcome. The upstream's time runs only when it is its turn."""
        connection, upload = self.connection, self.upload
        if connection is None or upload is None:
            return True
        if upload.chunked:
            data = (chunk(data) if data else b"") + (LAST_CHUNK if last else b"")
        transport = connection.transport
        if data and not transport.is_closing():
            self.pool.outbox.write(transport, data)
        protocol, now = transport.get_protocol(), connection.loop.time()
        assert isinstance(protocol, WireProtocol)
        if last:
            self.on_sent(now)
        elif protocol.full:
            protocol.on_writable = upload.resume
        if connection.early:
            waits = self.within_s and (last or protocol.full)
            connection.deadline.set(now + self.within_s if waits else math.inf)
        return last or not protocol.full

    def _end_upload(self, upload: Upload, connection: UpstreamConnection) -> bool:
        """Nothing more of it goes up; whether all of it did. It counts as sent, as providers count cancelled calls."""
        upload.stop()
        protocol = connection.transport.get_protocol()
        if isinstance(protocol, WireProtocol):
            protocol.on_writable = None
        if not upload.done:
            self.on_sent(connection.loop.time())
        return upload.done

    def _decode(self, data: bytes) -> bytes:
        assert self.decoder is not None
        try:
            return self.decoder.feed(data)
        except ValueError as problem:
            raise BadReply("the upstream's reply is malformed: %s" % problem) from problem

    def _check_end(self, decoder: Decoder) -> None:
        """Refuses a body that ends before it is whole."""
        assert self.connection is not None
        if not decoder.done and not (decoder.feed_eof() and ended_well(self.connection.transport)):
            raise UpstreamClosed("the upstream closed the connection in the middle of its reply")

    def _ends_at(self, connection: UpstreamConnection) -> float:
        """When the whole exchange has lasted too long."""
        return connection.written_at + self.timeouts.total if self.timeouts.total else math.inf

    def _idle_until(self, connection: UpstreamConnection) -> float:
        """When silence, or the whole exchange, has lasted too long."""
        return min(connection.loop.time() + self.idle_s, self._ends_at(connection))


# ==== 8. Translations ====
# How another API says what OpenAI's says: Anthropic's Messages API. Pure functions: no I/O, no clock. What it has no
# word for raises Untranslatable; nothing is dropped in silence. https://platform.claude.com/docs/en/api/messages, and
# the types of anthropic-sdk-python.
#
# A chat request is first held against `_REQUEST`, a table of all that has a word there, and then put together anew from
# what is known to be sound. A builder that checks as it goes passes over whatever it does not look at: that is how
# translators come to lose fields. A field that the API gets is a line in the table, one where it is used, and a golden
# file in tests/golden/anthropic.

MESSAGES_VERSION = b"2023-06-01"  # what came since goes by `anthropic-beta`
MESSAGE_BYTES = 16_777_216  # a whole answer above this is not translated; the longest ones are a megabyte
MESSAGES_THINKING_TOKENS = 16384  # the least limit where the client asks for reasoning, which counts towards it
MESSAGES_BUDGET_MIN = 1024  # the smallest thinking budget that the API takes

# A form says what may stand in one place of a request:
#   None                anything
#   a type              a value of this type
#   {name: form}        an object with these fields and no others; under "" the names of those that must be there
#   [form]              a list of such
#   (field, {word: form})    an object whose `field` tells which of these it is
#   (function, words)   what the function makes something of; where that fails or gives None the words say what must be
#   a function          what its result allows: it is given what was found, and returns a form
Form = Any

_NO_EQUIVALENT = "has no equivalent in Anthropic's Messages API."
_TYPES: "dict[type, str]" = {str: "must be a string.", dict: "must be an object.", list: "must be a list."}
# By type and not by isinstance, for which true is a number.
_COUNT: Form = (lambda found: found if type(found) is int and found > 0 else None, "must be a whole number above 0.")
_HEAT: Form = (
    lambda found: found if type(found) in (int, float) and 0 <= found <= 2 else None,
    "must be a number from 0 to 2.",
)
# reasoning_effort: the word for output_config.effort, and the budget of models that know no effort. OpenAI has a step
# more at the lower end; budgets double from the least that is taken.
_EFFORTS = {
    "none": ("", 0),
    "minimal": ("low", 1024),
    "low": ("low", 2048),
    "medium": ("medium", 4096),
    "high": ("high", 8192),
    "xhigh": ("xhigh", 16384),
    "max": ("max", 32768),
}
# The choice of some tools only (allowed_tools) has no word: the other tools would have to go, and with them the prompt
# cache, which begins with the tools.
_TOOL_CHOICES = {"auto": "auto", "required": "any", "none": "none"}
_THOUGHTS = ("thinking", "redacted_thinking")  # the latter is encrypted, and good for nothing but being sent back
# There is no JSON mode without a schema: an instruction has to do.
_JSON_ONLY = "Answer with one valid JSON object and nothing else: no other text and no code fence."


def _only(*values: "Any") -> Form:
    """The form of what may ask for one of these and nothing else: what is the default, or makes no difference."""
    return (lambda found: found if found in values else None), _NO_EQUIVALENT


def _stops(found: "Any") -> "list[str] | None":
    """Stop sequences; the API refuses those of white space, and leaving one out would let the answer run on."""
    stops = [found] if isinstance(found, str) else found
    return stops if isinstance(stops, list) and all(map(str.strip, stops)) else None


def _arguments(found: "Any") -> "dict[str, Any] | None":
    """What a tool was called with; where it takes nothing, some clients send an empty text."""
    given = json.loads(found or "{}")
    return given if isinstance(given, dict) else None


def _call_id(found: "Any") -> "str | None":
    """The id of a call. The API takes letters, digits, - and _ only; other vendors' (functions.f:0) become the same
    wherever they stand, so that a call and its result stay together."""
    return re.sub(r"[^A-Za-z0-9_\-]", "_", found) or None


def _inline(url: str, kinds: str) -> "dict[str, str]":
    """The source that a data URL of one of these media types becomes. Raises IndexError for anything else.

    Not a byte of the data is looked at: it may be megabytes, and the API says what it thinks of them.
    """
    head = re.findall("^data:(%s)(?:;[^;,]*)*;base64," % kinds, url[:128], re.IGNORECASE)[0]
    kind = head.lower().replace("jpg", "jpeg")
    return {"type": "base64", "media_type": kind, "data": url.partition(",")[2]}


def _image(url: str) -> "dict[str, str]":
    """The source of a picture: the API fetches it by itself where it is an address."""
    # Plain http too: whether it is fetched is the upstream's word, and its error names the place.
    remote = url.startswith(("https://", "http://"))
    return {"type": "url", "url": url} if remote else _inline(url, "image/(?:jpeg|jpg|png|gif|webp)")


def _thought(block: "dict[str, Any]") -> "dict[str, Any]":
    """A thinking block as it came; `index` is what streams add, and the API takes no field that it does not know."""
    names = ("type", "thinking", "signature") if block["type"] == "thinking" else ("type", "data")
    return {name: block[name] for name in names}


_PARTS: "dict[str, Form]" = {
    "text": str,
    "refusal": str,
    "image_url": {
        "": ("url",),
        "url": (_image, "must be an https URL, or a data URL in base64 of type image/jpeg, png, gif or webp."),
        "detail": _only("auto", "high"),  # "low" asks for a price that there is none for
    },
    "file": {
        "": ("file_data",),
        "file_data": (  # of all kinds of files only this one comes as data in both APIs
            functools.partial(_inline, kinds="application/pdf"),
            "must be a data URL in base64 of type application/pdf.",
        ),
        "filename": None,
    },
}


def _content(*kinds: str) -> Form:
    """The form of a message's content: a text, or parts of these kinds."""
    # cache_control is Anthropic's own, a mark where the prompt cache shall end; OpenRouter's clients send it here.
    parts = {kind: {"": (kind,), kind: _PARTS[kind], "cache_control": None} for kind in kinds}
    return lambda found: str if isinstance(found, str) else [("type", parts)]


_CALL_ID: Form = (_call_id, "must be a string that is not empty.")
# What Anthropic takes in each place. An assistant's pictures and a name for a speaker are nowhere among it.
_SYSTEM: "dict[str, Form]" = {"content": _content("text")}
_MESSAGES: "dict[str, dict[str, Form]]" = {
    "system": _SYSTEM,
    "developer": _SYSTEM,
    "user": {"content": _content("text", "image_url", "file")},
    "assistant": {
        "content": _content("text", "refusal"),
        "refusal": str,
        "thinking_blocks": [(_thought, "must be a thinking block of an earlier answer, unchanged.")],
        "tool_calls": [
            {
                "": ("id", "function"),
                "id": _CALL_ID,
                "type": None,
                "function": {
                    "": ("name",),
                    "name": str,
                    "arguments": (_arguments, "must be the text of a JSON object."),
                    "parsed_arguments": None,  # `parse` and `stream` of the openai package add them, and `parsed`
                },
                "index": None,  # of a stream, and Gemini's signature: both mean nothing here and are no loss
                "extra_content": None,
            }
        ],
        # Thinking without its signature is passed over: the API would not believe it.
        **dict.fromkeys(("annotations", "parsed", "reasoning_content", "reasoning", "reasoning_details")),
    },
    "tool": {
        "": ("tool_call_id",),
        "tool_call_id": _CALL_ID,
        "name": None,  # the call's, which the id names already
        "content": _content("text", "image_url", "file"),
    },
}
_NAMED: Form = {"": ("function",), "function": {"": ("name",), "name": str}}
_CHOICE_WORDS: Form = (_TOOL_CHOICES.get, "must be none, auto, required or a function for Anthropic's Messages API.")
# Passed on: the same in both APIs, or Anthropic's own, which clients send as extra fields.
_PASSED = ("model", "stream", "top_k", "thinking", "cache_control")
_REQUEST: "dict[str, Form]" = {
    **dict.fromkeys(_PASSED),
    "messages": [("role", _MESSAGES)],
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "temperature": _HEAT,
    "top_p": None,
    "stop": (_stops, "must be texts that are more than white space for Anthropic's Messages API."),
    "user": None,
    "safety_identifier": None,
    "tools": [
        {
            "": ("function",),
            "type": None,
            "function": {"": ("name",), "name": str, "description": None, "parameters": dict, "strict": None},
            "cache_control": None,
        }
    ],
    "tool_choice": lambda found: ("type", {"function": _NAMED}) if isinstance(found, dict) else _CHOICE_WORDS,
    "parallel_tool_calls": None,
    "response_format": (
        "type",
        {
            "text": {},
            "json_object": {},
            "json_schema": {
                "": ("json_schema",),
                "json_schema": {"": ("schema",), "schema": dict, **dict.fromkeys(("name", "description", "strict"))},
            },
        },
    ),
    "reasoning_effort": (_EFFORTS.get, "must be one of %s." % ", ".join(_EFFORTS)),
    # What follows is left out: hints, without which the answer is the same one, stream_options, which speaks to our own
    # translation of streams, and values that ask for nothing but the default: libraries send all of them, set or not.
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


def _made(found: "Any", form: Form, where: str) -> "Any":
    """What a type, or a pair of function and words, makes of `found`. Raises Untranslatable."""
    if isinstance(form, type):
        if not isinstance(found, form):
            raise Untranslatable(where, _TYPES[form])
        return found
    make, words = form
    try:
        made = make(found)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        made = None  # of a shape that the function was not written for
    if made is None:
        raise Untranslatable(where, words)
    return made


def _checked(found: "Any", form: Form, where: str, drop: "frozenset[str]") -> "Any":
    """What `found` says, if `form` has a word for all of it; else Untranslatable, with the path that is at fault.

    Left out are fields and parts named in `drop`, null, and, below the top, unknown fields that are empty: the messages
    of an answer come back with all that some vendor or library had put there. At the top an unknown field may mean
    something by being empty, as web_search_options does.
    """
    if form is None:
        return found
    if isinstance(form, list):
        return [
            _checked(item, form[0], "%s[%d]" % (where, place), drop)
            for place, item in enumerate(_made(found, list, where))
            if not (isinstance(item, dict) and str(item.get("type")) in drop)
        ]
    if isinstance(form, tuple) and isinstance(form[0], str):
        field, known = form
        kind = str(_made(found, dict, where).get(field))
        if kind not in known:
            raise Untranslatable(where + "." + field, "must be %s for Anthropic's Messages API." % " or ".join(known))
        form = {field: None, **known[kind]}
    if isinstance(form, dict):
        path = where and where + "."
        must = form.get("", ())
        out = {}
        for name, value in _made(found, dict, where).items():
            if value is None or (name in drop and name not in must):
                continue
            if name and name in form:
                out[name] = _checked(value, form[name], path + name, drop)
            elif not where or value not in ("", [], {}, False):
                raise Untranslatable(path + name[:100], _NO_EQUIVALENT)
        for name in must:
            if name not in out:  # none of these forms takes None, so this raises, in the form's own words
                _made(None, dict if isinstance(form[name], dict) else form[name], path + name)
        return out
    if callable(form) and not isinstance(form, type):
        return _checked(found, form(found), where, drop)
    return _made(found, form, where)


def _with(found: "dict[str, Any]", **more: "Any") -> "dict[str, Any]":
    """`found` and what of `more` says something: no API takes null for a field that is not asked for."""
    return {**found, **{name: value for name, value in more.items() if value}}


_SOURCES = {"image_url": ("image", "url"), "file": ("document", "file_data")}


def _block(part: "dict[str, Any]") -> "dict[str, Any]":
    """The content block of one part; a refusal of earlier is what the assistant said."""
    found, cache = part[part["type"]], part.get("cache_control")
    if isinstance(found, str):
        return _with({"type": "text", "text": found}, cache_control=cache)
    name, source = _SOURCES[part["type"]]
    return _with({"type": name, "source": found[source]}, title=found.get("filename"), cache_control=cache)


def _blocks(content: "str | list[dict[str, Any]] | None") -> "list[dict[str, Any]]":
    """The blocks of a message's content. Empty texts are left out, for which the API has a 400 (hermes-agent PR 11929):
    an answer of nothing but calls often comes back with one."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    return [block for block in map(_block, parts) if block.get("text", "x").strip()]


def _message_blocks(message: "dict[str, Any]") -> "list[dict[str, Any]]":
    """The content blocks that one message becomes; in an answer thinking comes first and calls come last."""
    content = message.get("content")
    if message["role"] == "tool":  # that a tool failed is told by its words: OpenAI has no field for is_error
        shown = content if isinstance(content, str) else _blocks(content)
        return [_with({"type": "tool_result", "tool_use_id": message["tool_call_id"]}, content=shown)]
    blocks = [*message.get("thinking_blocks", ()), *_blocks(content), *_blocks(message.get("refusal"))]
    for call in message.get("tool_calls", ()):
        name, given = call["function"]["name"], call["function"].get("arguments", {})
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": given})
    return blocks


def _add_turns(messages: "Iterable[dict[str, Any]]", out: "dict[str, Any]") -> None:
    """Adds `messages`, and `system` where there is any: all system messages go to the top, as in the vendor's own
    compatible endpoint. A message of which nothing is left is none (nanobot PR 193)."""
    system: "list[dict[str, Any]]" = []
    turns: "list[dict[str, Any]]" = []
    for message in messages:
        role, blocks = message["role"], _message_blocks(message)
        if role in ("system", "developer"):  # no model there tells the two apart
            system += blocks
        elif blocks:
            role = "user" if role == "tool" else role
            if turns and turns[-1]["role"] == role:  # so all results of parallel calls share the one turn they must
                turns[-1]["content"] += blocks
            else:
                turns.append({"role": role, "content": blocks})
    if not turns:
        raise Untranslatable("messages", "must hold a user message with content.")
    last = turns[-1]["content"][-1]
    if turns[-1]["role"] == "assistant" and last["type"] == "text":
        last["text"] = last["text"].rstrip()  # white space at the end of what it shall go on with is refused
    out.update(_with({"messages": turns}, system=system))


def _add_sampling(asked: "dict[str, Any]", out: "dict[str, Any]") -> None:
    """Adds temperature, top_p, stop sequences and the user's name. Newer models refuse even defaults of the first two
    together, and other values at all: 1, the default of both APIs, is not sent."""
    if asked.get("temperature", 1) < 1:  # its scale ends there; Anthropic's own compatible endpoint lowers all above
        out["temperature"] = asked["temperature"]
    if asked.get("top_p", 1) != 1:
        out["top_p"] = asked["top_p"]
    # One opaque name for both of OpenAI's; the newer one counts.
    user = asked.get("safety_identifier") or asked.get("user")
    out.update(_with({}, stop_sequences=asked.get("stop"), metadata=user and {"user_id": user}))


def _tool(function: "dict[str, Any]", cache: "Any") -> "dict[str, Any]":
    """The definition of one function. `strict: false` is the default and not sent: older models know no strict."""
    # The API demands an object's schema with properties, even of a function that takes nothing.
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    tool = {"name": function["name"], "input_schema": schema}
    return _with(tool, description=function.get("description"), strict=function.get("strict"), cache_control=cache)


def _add_tools(asked: "dict[str, Any]", out: "dict[str, Any]") -> None:
    """Adds tools and tool_choice, of which "auto" is the default."""
    tools, found = asked.get("tools"), asked.get("tool_choice", "auto")
    choice: "dict[str, Any]" = {"type": found}
    if isinstance(found, dict):
        choice = {"type": "tool", "name": found["function"]["name"]}
    if not tools:
        if choice["type"] not in ("auto", "none"):
            raise Untranslatable("tool_choice", "needs tools.")
        # Where the history uses tools, gateways to the API (Bedrock) want them defined; as at OpenAI, the answer calls
        # none.
        used = [block["name"] for turn in out["messages"] for block in turn["content"] if block["type"] == "tool_use"]
        tools = [{"function": {"name": name}} for name in dict.fromkeys(used)]
        choice = {"type": "none"}
        if not tools:
            return
    # Only with tools, and not with "none": elsewhere the API refuses the field.
    if asked.get("parallel_tool_calls") is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    out["tools"] = [_tool(tool["function"], tool.get("cache_control")) for tool in tools]
    if choice != {"type": "auto"}:
        out["tool_choice"] = choice


def _add_reasoning(effort: str, budget: int, thinking: str, out: "dict[str, Any]") -> None:
    """Adds what reasoning_effort asks for; a `thinking` of the client's own stands.

    The generations differ: effort alone, effort with thinking switched on, a budget of tokens, where the others are a
    400. Which one a model is cannot be told from a name, so that the configuration says it.
    """
    begin: "dict[str, Any]" = {}
    if not effort:
        begin = {"type": "disabled"}
    elif thinking == "budget":
        room = out["max_tokens"]
        budget = max(MESSAGES_BUDGET_MIN, min(budget, room // 2))  # the other half is for the answer
        if budget >= room:
            raise Untranslatable("reasoning_effort", "needs a max_tokens above %d." % MESSAGES_BUDGET_MIN)
        # A turn that waits for tool results must begin with the thinking that led to the calls, signed. A client that
        # does not send its `thinking_blocks` back goes on without: better than a 400 in the middle of a loop.
        first = [turn["content"][0]["type"] for turn in out["messages"][-2:]]
        if first[-1] != "tool_result" or first[0] in _THOUGHTS:
            begin = {"type": "enabled", "budget_tokens": budget}
    else:
        out["output_config"] = {"effort": effort}
        if thinking == "adaptive":  # takes a loop's turns without their thinking
            begin = {"type": "adaptive"}
    # A tool that must be called excludes thinking, a 400 there, while OpenAI's models do both.
    if begin and not (effort and out.get("tool_choice", {}).get("type") in ("any", "tool")):
        out.setdefault("thinking", begin)


def to_messages(
    data: "dict[str, Any]",
    drop: "frozenset[str]",
    max_tokens: int = AccountConfig.max_tokens,
    thinking: str = THINKING[0],
) -> "dict[str, Any]":
    """The Messages request that asks what the chat request `data` asks. Raises Untranslatable.

    Fields named in `drop` are left out, wherever they stand; `max_tokens` is the limit when the client sets none.
    `thinking` says what reasoning_effort becomes: "effort" (output_config.effort), "adaptive" (and thinking switched
    on, for models where it is off by default), "budget" (for models that know no effort).
    """
    asked = _checked(data, _REQUEST, "", drop)
    out = {name: asked[name] for name in _PASSED if name in asked}
    effort, budget = asked.get("reasoning_effort", ("", 0))
    # A limit is demanded, where OpenAI's models have none: the default is the account's. Thinking counts towards it, so
    # that 4096 would be thought away before the first word of an answer.
    least = MESSAGES_THINKING_TOKENS if effort or "thinking" in asked else 0
    out["max_tokens"] = asked.get("max_completion_tokens") or asked.get("max_tokens") or max(max_tokens, least)
    _add_turns(asked.get("messages", ()), out)
    _add_sampling(asked, out)
    _add_tools(asked, out)
    if "reasoning_effort" in asked:
        _add_reasoning(effort, budget, thinking, out)
    wanted = asked.get("response_format", {"type": "text"})
    if wanted["type"] == "json_object":
        out["system"] = [*out.get("system", ()), {"type": "text", "text": _JSON_ONLY}]
    elif wanted["type"] == "json_schema":
        # Every schema is strict there; what it is for has no field but the schema's own.
        form = wanted["json_schema"]
        schema = {**_with({}, description=form.get("description")), **form["schema"]}
        out.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": schema}
    return out


# Why an answer ended. A refusal is a filter's work there as at Azure; clients know what to do about that word.
_FINISH_REASONS = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # all others are "stop": end_turn, stop_sequence, and pause_turn, of tools that run at Anthropic


def _tool_call(block: "dict[str, Any]", arguments: str) -> "dict[str, Any]":
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _refusal(found: "dict[str, Any]") -> "str | None":
    """Why the model refused, where it says so."""
    details = found.get("stop_details")
    return details.get("explanation") or None if isinstance(details, dict) else None


def messages_usage(usage: "Any") -> "dict[str, Any]":
    """OpenAI's usage. Anthropic's input_tokens leave out what the prompt cache read or took in, OpenAI's prompt_tokens
    do not (Portkey PR 1754); null counts as 0. Thinking is inside the answer's tokens in both."""
    found = usage if isinstance(usage, dict) else {}
    # Gateways leave out what they do not know of, so that every number may be missing.
    written, read = found.get("cache_creation_input_tokens") or 0, found.get("cache_read_input_tokens") or 0
    prompt = (found.get("input_tokens") or 0) + written + read
    answer = found.get("output_tokens") or 0
    thought = (found.get("output_tokens_details") or {}).get("thinking_tokens") or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def from_message(reply: "dict[str, Any]", created: int) -> "dict[str, Any]":
    """The chat.completion that a whole Messages answer is. Raises ValueError where it is none.

    Thinking comes twice where tools are called: to be read, and signed, to be sent back with the results (in LiteLLM's
    `thinking_blocks`; the openai package keeps fields of a message that it does not know).
    """
    text, thinking = "", ""
    calls: "list[dict[str, Any]]" = []
    thoughts: "list[dict[str, Any]]" = []
    try:
        # Types that are not named here are those of tools that run at Anthropic: their results are in the text.
        for block in reply["content"]:
            if block["type"] == "text":
                text += block.get("text") or ""
            elif block["type"] == "tool_use":
                calls.append(_tool_call(block, compact_json(block["input"]).decode()))
            elif block["type"] in _THOUGHTS:
                thinking += block.get("thinking") or ""
                thoughts.append(block)
        message = _with(
            {"role": "assistant", "content": text or None, "refusal": _refusal(reply)},
            reasoning_content=thinking,
            tool_calls=calls,
            thinking_blocks=calls and thoughts,
        )
        reason = _FINISH_REASONS.get(reply["stop_reason"], "stop")
        return {
            "id": reply["id"],
            "object": "chat.completion",
            "created": created,
            "model": reply["model"],
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": messages_usage(reply.get("usage")),
        }
    except (LookupError, TypeError, AttributeError):
        raise ValueError("the upstream's answer is no message") from None


# What of Anthropic's errors OpenAI has words of its own for: what its type is or its message has in it, type and code
# there. Other types stay, as the code. Messages come first, as invalid_request_error is the type of most: an account
# without money is a 400 there, and only these words tell it from a client's mistake.
_MESSAGES_ERRORS: "tuple[tuple[str, str, str | None], ...]" = (
    ("credit balance is too low", "insufficient_quota", "insufficient_quota"),
    ("enforced_spend_limit_reached", "insufficient_quota", "insufficient_quota"),
    ("prompt is too long", "invalid_request_error", "context_length_exceeded"),
    ("exceed context limit", "invalid_request_error", "context_length_exceeded"),
    ("invalid_request_error", "invalid_request_error", None),
    ("authentication_error", "invalid_request_error", "invalid_api_key"),
    ("billing_error", "insufficient_quota", "insufficient_quota"),
    ("not_found_error", "invalid_request_error", "model_not_found"),
    ("rate_limit_error", "rate_limit_error", "rate_limit_exceeded"),
)


def _translate_error(found: "Any", status: int) -> "dict[str, Any]":
    """OpenAI's error object for an error of any shape: gateways in front of the API have their own, with a text for
    `error`, none at all, or in a list."""
    if isinstance(found, list) and found:
        found = found[0]
    error = found.get("error", found) if isinstance(found, dict) else found
    error = error if isinstance(error, dict) else {"message": error}
    message = error.get("message") or error.get("detail")
    if not isinstance(message, str):
        message = "The upstream answered with status %d." % status
    word = str(error.get("type") or error.get("code") or "")
    for known, kind, code in _MESSAGES_ERRORS:
        if known == word or known in message:
            return error_object(message, kind, code)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return error_object(message, kind, word or None)


def error_from_messages(status: int, body: bytes) -> "tuple[int, bytes]":
    """Status and body that tell an error of the Messages API in OpenAI's way; any body at all is taken.

    No money is a 429 at OpenAI, and overload a 503; 529 is in no registry.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    told = _translate_error(found, status)
    if told["error"]["code"] == "insufficient_quota":
        status = 429
    return 503 if status == 529 else status, compact_json(told)


def _keep(known: "dict[str, Any]", news: "dict[str, Any] | None") -> None:
    """Takes what is told anew; null tells nothing."""
    known.update({name: value for name, value in (news or {}).items() if value is not None})


class MessageStream:
    """A Messages stream becoming a chat stream, event by event.

    `done` after the last event, `failed` once an error went out instead; an upstream that ends with neither was cut.
    Nothing comes out before the first content, so an overloaded upstream can still be left for another. An error that
    comes later leaves as OpenAI's error event with its own word as the code (overloaded_error), by which the relay
    judges it like a reply with the status of that word: elsewhere it was lost or became a 500 (envoy ai-gateway 2697).

    Each event of the upstream is a method, `on_` and its type; types that have none, ping among them, say nothing here.
    """

    def __init__(self, created: int, include_usage: bool = False) -> None:
        self.created, self.include_usage = created, include_usage
        self.head = b""  # of every chunk, up to its choices
        self.calls: "dict[int, list[Any]]" = {}  # of each tool block: its number, its input if that comes in no delta
        self.thoughts: "dict[int, tuple[dict[str, Any], list[str]]]" = {}  # thinking since the last call, and its text
        # What came of usage and of the reason to stop: both come in parts, and the last value of each field holds.
        self.usage: "dict[str, Any]" = {}
        self.ending: "dict[str, Any]" = {}
        self.role = {"role": "assistant"}  # of the first chunk
        self.done = self.failed = False

    def feed(self, event_type: bytes, data: bytes) -> bytes:
        """The chunks that one event of the upstream becomes; often none. Never raises: what cannot be read is an error
        event. `event_type` counts where the data has no type, as some gateways send it."""
        if self.done or self.failed or not data.strip():  # what follows the end is nobody's answer
            return b""
        try:
            event = json.loads(data)
            step = getattr(self, "on_" + (event.get("type") or event_type.decode("latin-1")), None)
            return step(event) if step else b""
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return self.fail({"type": "api_error", "message": "The upstream sent an event that cannot be read."})

    def fail(self, found: "dict[str, Any]") -> bytes:
        """The event that tells an error; nothing that comes after it counts."""
        # Without a status of its own an error of no known type counts as the upstream's fault.
        self.failed = True
        return b"data: " + compact_json(_translate_error(found, 500)) + b"\n\n"

    on_error = fail

    def on_message_start(self, event: "dict[str, Any]") -> bytes:
        """Id and model of all chunks, and the prompt's tokens."""
        message = event["message"]
        _keep(self.usage, message.get("usage"))
        if not self.head:  # a second one comes where another model takes over; another id would be another answer
            same = {"id": message["id"], "object": "chat.completion.chunk", "created": self.created}
            self.head = b"data: " + compact_json(dict(same, model=message["model"]))[:-1] + b',"choices":'
        return b""

    def on_content_block_start(self, event: "dict[str, Any]") -> bytes:
        """A tool's name; and what gateways that send a block whole put here."""
        block, index = event["content_block"], event["index"]
        if block["type"] != "tool_use":
            if block["type"] in _THOUGHTS:
                self.thoughts[index] = dict(block, index=index), [block.get("thinking") or ""]
            return self._text(block)
        # Calls are numbered from 0, as clients join their pieces by it; the upstream's index counts texts, too.
        number = len(self.calls)
        self.calls[index] = [number, block.get("input") or {}]
        # Signed thinking goes with the call that it led to: a client that keeps the call then has both or neither.
        delta = {"tool_calls": [{"index": number, **_tool_call(block, "")}]}
        return self._chunk(_with(delta, thinking_blocks=self._signed()))

    def on_content_block_delta(self, event: "dict[str, Any]") -> bytes:
        """A piece of text, of thinking, of its signature or of a tool's arguments; citations have no place."""
        delta, index = event["delta"], event["index"]
        piece, call, thought = delta.get("partial_json"), self.calls.get(index), self.thoughts.get(index)
        # The first piece is always empty, and no others come of a tool without arguments: `on_content_block_stop` says
        # what those are. Taken for unknown it once ended streams (llmgateway PR 2468).
        if piece and call:
            call[1] = None
            return self._arguments(call[0], piece)
        if thought:  # the signature comes last, in a piece of its own
            thought[0]["signature"] = delta.get("signature") or thought[0].get("signature")
            thought[1].append(delta.get("thinking") or "")
        return self._text(delta)

    def on_content_block_stop(self, event: "dict[str, Any]") -> bytes:
        """The arguments of a tool that had no pieces."""
        number, whole = self.calls.get(event["index"]) or (0, None)
        return b"" if whole is None else self._arguments(number, compact_json(whole).decode())

    def on_message_delta(self, event: "dict[str, Any]") -> bytes:
        """Why it stops, and the answer's tokens; from some gateways the cache's, too (rust-genai PR 258)."""
        _keep(self.usage, event.get("usage"))
        _keep(self.ending, event.get("delta"))
        return b""

    def on_message_stop(self, event: "dict[str, Any]") -> bytes:
        """The end: finish_reason, usage if it was asked for, [DONE]."""
        reason = _FINISH_REASONS.get(self.ending.get("stop_reason", ""), "stop")
        out = self._chunk(_with({}, refusal=_refusal(self.ending)), reason)
        if self.include_usage:
            out += self.head + b'[],"usage":' + compact_json(messages_usage(self.usage)) + b"}\n\n"
        self.done = True
        return out + b"data: [DONE]\n\n"

    def _chunk(self, delta: "dict[str, Any]", reason: "str | None" = None) -> bytes:
        """One chunk. The role stands in the first; with include_usage each has the field, null until the last."""
        if not self.head:
            raise LookupError("content before message_start")
        choice = {"index": 0, "delta": {**self.role, **delta}, "logprobs": None, "finish_reason": reason}
        self.role = {}
        return self.head + compact_json([choice]) + (b',"usage":null}\n\n' if self.include_usage else b"}\n\n")

    def _text(self, found: "dict[str, Any]") -> bytes:
        """The chunk for a text or a thought; DeepSeek's name for the latter is what most clients know."""
        for name, ours in (("text", "content"), ("thinking", "reasoning_content")):
            if found.get(name):
                return self._chunk({ours: found[name]})
        return b""

    def _arguments(self, number: int, piece: str) -> bytes:
        return self._chunk({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})

    def _signed(self) -> "list[dict[str, Any]]":
        """The thinking that led to a call, as in whole answers; the openai package joins lists by their `index`."""
        signed = []
        for block, pieces in self.thoughts.values():
            if block["type"] == "thinking":
                block["thinking"] = "".join(pieces)
            if block.get("signature") or block.get("data"):
                signed.append(block)
        self.thoughts = {}
        return signed


def tightest_tokens(index: "Mapping[bytes, bytes]") -> "dict[bytes, bytes]":
    """What Anthropic's three token limits leave together, as x-ratelimit-*-tokens fields; {} where it says nothing.

    Input and output have limits of their own there, and `tokens` tells their sum or what binds a workspace; our ledger
    has one bucket, from which a request takes its prompt and its answer. So it gets the size of the whole, filled as
    far as the emptiest of the three: the share tells which one binds. The emptiest one as it is would be wrong: a
    prompt of 20,000 tokens is larger than an output limit of 8,000 ever gets, and would wait for a full bucket each
    time. Tokens that the prompt cache gives are not counted by the input limit; as replies tell what is left, they need
    no arithmetic here.
    """
    size, told = 0, []
    for kind in (b"input-tokens", b"output-tokens", b"tokens"):
        name = b"anthropic-ratelimit-%b-" % kind
        limit, left = index.get(name + b"limit", b""), index.get(name + b"remaining", b"")
        if re.fullmatch(rb"[1-9][0-9]{0,14} [0-9]{1,15}", limit + b" " + left):  # insane values tell nothing
            told.append((int(left) / int(limit), int(limit), index.get(name + b"reset", b"")))
            size = int(limit) if kind == b"tokens" else size + int(limit)
    if not told:
        return {}
    # The binding one's time to be full is right for the whole, too: each limit refills in a minute, whatever its size.
    share, _, reset = min(told)
    return {
        b"x-ratelimit-limit-tokens": b"%d" % size,
        b"x-ratelimit-remaining-tokens": b"%d" % round(size * share),
        b"x-ratelimit-reset-tokens": reset,
    }


# ==== 9. Controllers ====
# What a request to one account looks like. Pure translation: a parsed request in, the bytes for the upstream out. First
# what a request is and what can be read from its body, then a class for each kind of account: one that speaks OpenAI's
# API (Azure's is a dialect of it), one whose answers are translated, one that makes them up. A vendor that speaks
# OpenAI's API is a row in VENDORS; a kind of its own is one class here, a line in CONTROLLERS and a file of tests.

CHAT_PATH = "/chat/completions"  # without /v1, which belongs to the base URL, where it has one
# The fastest way into JSON, which tells where a value ends, too.
decode_json = json.JSONDecoder().raw_decode  # 1.3 us less than json.loads


def deeper(data: "Any", depth: int) -> bool:
    """Whether JSON values stand in more than `depth` objects and lists; whoever handles them later may recurse."""
    level = [data]  # level by level, as the one who counts should not recurse either
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def parse_object(body: bytes, depth: int = JSON_DEPTH) -> "dict[str, Any]":
    """The JSON object that `body` is; UTF-8 only (RFC 8259, 8.1), nested to `depth`. Raises ProxyError (400)."""
    if len(body) > JSON_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > JSON_VALUES:
        raise ProxyError(413, "The body has more than %d values." % JSON_VALUES, "request_too_large")
    try:
        # A byte order mark is what PowerShell writes. Other encodings are refused: two readers might guess differently.
        text = body.decode("utf-8-sig" if body[:3] == b"\xef\xbb\xbf" else "utf-8").strip(" \t\r\n")
        data, end = decode_json(text)
        if end != len(text):
            raise ValueError("something follows its end, at character %d" % end)
    # The decoder gives up near 1,000 levels (RecursionError) and at numbers of 4,300 digits (ValueError).
    except (ValueError, RecursionError) as problem:
        raise ProxyError(400, "The body is not valid JSON in UTF-8: %s" % problem) from None
    if not isinstance(data, dict):
        raise ProxyError(400, "The body must be a JSON object.")
    # Counting is cheaper for small bodies; a large one is mostly text, and 100 kB of it take 75 us to count in.
    if (len(body) > COUNTED_BYTES or body.count(b"{") + body.count(b"[") > depth) and deeper(data, depth):
        raise ProxyError(400, "The body is nested deeper than %d levels." % depth)
    return data


# Go writes the names of fields as they stand in the struct unless it has tags; the original server, in Go, took both.
_CHAT_KEYS = frozenset(
    "model messages stream temperature top_p n stop max_tokens max_completion_tokens presence_penalty frequency_penalty"
    " logit_bias user tools tool_choice functions function_call response_format seed stream_options logprobs"
    " top_logprobs parallel_tool_calls reasoning_effort metadata store".split()
)
_MESSAGE_KEYS = frozenset("role content name tool_calls tool_call_id refusal function_call".split())


def lower_keys(data: "dict[str, Any]", known: "frozenset[str]") -> "dict[str, Any]":
    """`data` with its keys lower-cased where that makes a known one; unknown keys stay as they are."""
    return {key.lower() if key.lower() in known else key: value for key, value in data.items()}


def respell(data: "dict[str, Any]") -> "dict[str, Any]":
    """A chat request with the keys that Go clients without JSON tags capitalise in the API's spelling."""
    found = lower_keys(data, _CHAT_KEYS)
    messages = found.get("messages")
    if isinstance(messages, list):
        found["messages"] = [lower_keys(one, _MESSAGE_KEYS) if isinstance(one, dict) else one for one in messages]
    return found


def parse_chat(body: bytes, depth: int = JSON_DEPTH) -> "tuple[dict[str, Any], bytes]":
    """The JSON object of a chat request, and the body to send: as it came, or respelled for Go clients.

    Raises ProxyError (400) for what no upstream could answer.
    """
    data = parse_object(body, depth)
    # Nearly all requests are spelled well, and are not looked through for keys that are not.
    if "model" not in data or "messages" not in data or "Stream" in data:
        spelled = respell(data)
        if spelled != data:
            data, body = spelled, compact_json(spelled)
    model, messages = data.get("model"), data.get("messages")
    # Only what routing and relaying stand on is checked. All else is the upstream's to judge: it knows what it takes,
    # and a field that is new there shall not need a new version here.
    if not isinstance(model, str) or not model:
        raise ProxyError(400, "You must provide a model parameter: a non-empty string.", param="model")
    if not isinstance(messages, list) or set(map(type, messages)) != {dict}:
        raise ProxyError(400, "You must provide messages: a non-empty array of objects.", param="messages")
    # What is neither true nor false could be one to the upstream and the other to us, who would wait for events in
    # vain.
    stream = data.get("stream")
    if not (stream is None or stream is True or stream is False):
        raise ProxyError(400, "stream must be true or false.", param="stream")
    return data, body


def top_level_count(body: bytes, key: str) -> int:
    """How often `key` stands in the outermost object, in any case.

    Where it stands twice, two readers can believe two different ones (Go's takes any case and the last): a client key
    that may use one model would get the other.
    """
    counts = [0]

    def pairs(found: "list[tuple[str, Any]]") -> None:
        counts.append(sum(name.lower() == key for name, _ in found))

    json.loads(body, object_pairs_hook=pairs)
    return counts[-1]  # the outermost object ends last


def _skip_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def edit_members(body: bytes, edit: "Callable[[str], tuple[str, str | None]]", more: "Mapping[str, Any]") -> bytes:
    """`body` with its outermost members as `edit` wants them, and `more` after them; what stays, stays byte for byte.

    `edit` gives, for a member's name, the new one ("": the member is left out) and its new value (None: as it was).
    Parsing and writing it anew would change what JSON does not tell apart and upstreams may: 1.0 and 1, escapes, keys
    that stand twice. `body` is known to be an object that is not empty.
    """
    # The decoder finds where values end, strings and nesting included; a search for the key would find it in a prompt.
    text = body.decode("utf-8", "surrogatepass")
    first = at = text.index("{") + 1
    members: "list[str]" = []
    while text[at - 1] != "}":
        start, at = at, _skip_space(text, at)
        name, end_name = decode_json(text, at)
        value_at = _skip_space(text, _skip_space(text, end_name) + 1)
        _, end = decode_json(text, value_at)
        stop = _skip_space(text, end)
        new_name, value = edit(name)
        if new_name:
            key = text[at:end_name] if new_name == name else json.dumps(new_name)
            value = text[value_at:end] if value is None else value
            members.append(text[start:at] + key + text[end_name:value_at] + value + text[end:stop])
        at = stop + 1
    # What is added comes last, where readers that take the last of two find it.
    members += [json.dumps(name) + ":" + json.dumps(value) for name, value in more.items()]
    return (text[:first] + ",".join(members) + text[at - 1 :]).encode("utf-8", "surrogatepass")


def replace_model(body: bytes, model: str) -> bytes:
    """`body` with another value for each outermost "model", every other byte as it was."""
    return edit_members(body, lambda name: (name, json.dumps(model) if name == "model" else None), {})


class ApiRequest:
    """One API call as every controller gets it.

    `lines`: the client's field lines that may pass. `body` as it came, `data` its parsed JSON object. `need`: the
    tokens that it is taken to cost. `wait_s`: how long it may still stand in line. `key`: the client key's name.
    `model_span`: where the model stands in a multipart body. `pinned`: the controller that has the object it is about;
    `seeks`: each is asked until one has it. `asked`: what the client asked for, where `model` is another one by now.
    `thread`: what its conversation goes by, once somebody wanted to know. `upload`: what follows `body` while it still
    comes. `inference`: whether it asks a model for something, and not for what an account keeps.
    """

    inference = True  # of the class: nearly all do, and none of these pays for it

    def __init__(self, method: str, path: str, query: str, lines: bytes, body: bytes) -> None:
        self.method, self.path, self.query = method, path, query
        self.lines, self.body = lines, body
        self.data: "dict[str, Any]" = {}
        self.model = self.request_id = self.key = self.pinned = self.asked = ""
        self.stream = self.stateful = self.seeks = False
        self.model_span: "tuple[int, int] | None" = None
        self.thread: "bytes | None" = None
        self.upload: "Upload | None" = None
        self.prompt_tokens = self.max_tokens = self.need = 0
        self.wait_s = 0.0
        # No __slots__: in Python 3.11 they save nothing that can be measured in a request.

    def body_for(self, model: str) -> bytes:
        """The body with another model."""
        if self.model_span is not None:
            start, end = self.model_span  # the rest may be a file of hours of speech
            return self.body[:start] + model.encode() + self.body[end:]
        return replace_model(self.body, model) if self.data else self.body

    def substitute(self, model: str) -> None:
        """Asks for `model` from now on: an alias stands for it, or its own model failed. What the client asked for
        first stays known, as its answer tells both."""
        self.asked, self.model, self.body = self.asked or self.model, model, self.body_for(model)
        if self.model_span is not None:
            self.model_span = self.model_span[0], self.model_span[0] + len(model.encode())
        elif self.data:
            self.data = {**self.data, "model": model}


def count_text(value: "Any", depth: int = 0) -> int:
    """Characters of text in a prompt or input of any shape; a token that comes as a number counts as four, and what is
    no text as TOKENS_PER_PART tokens: never the length of a data URL, which says nothing of an image's cost."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return 4
    if depth > INPUT_DEPTH:
        return 0
    if isinstance(value, list):
        return sum([count_text(item, depth + 1) for item in value])
    if isinstance(value, dict):
        if "text" in value or "content" in value:  # a part, a message, an item of the responses API
            return count_text(value.get("text") or value.get("content"), depth + 1)
        return 4 * TOKENS_PER_PART
    return 0


def estimate_prompt(data: "dict[str, Any]") -> int:
    """About how many tokens the prompt of a chat has. No tokenizer: it would be a dependency and a table for each
    model, and replies correct what is wrong here."""
    size = 0
    for message in data["messages"]:
        text = message.get("content")
        size += len(text) if type(text) is str else count_text(text)
    return size // 4


def answer_limit(data: "dict[str, Any]") -> int:
    """The most tokens that the client lets the answers have together; 0 when it sets no limit."""
    # Nonsense counts as none here; the upstream says what is wrong with it. 128 is the most that `n` may be.
    most = data.get("max_completion_tokens") or data.get("max_tokens")
    if not isinstance(most, int) or most < 0:
        return 0
    choices = data.get("n") or 1
    return most * min(max(1, choices), 128) if isinstance(choices, int) else 0


# Of bounded length, as it becomes a key of what is remembered.
_OBJECT_ID = re.compile(rb'"id"\s*:\s*"([\w\-]{4,128})"')


def made_id(beginning: bytes) -> str:
    """The id of the object that an answer describes: the first that stands in it, "" where none does. Files, batches
    and responses begin with theirs; parsing megabytes of an answer for it would cost more than it is worth."""
    found = _OBJECT_ID.search(beginning)
    return found.group(1).decode() if found else ""


def framed_upload(body: bytes, rest: Upload) -> "tuple[bytes, bytes]":
    """The end of the head of a request whose body only begins with `body`, and that in its framing: as it came."""
    if rest.chunked:
        return b"Transfer-Encoding: chunked\r\n\r\n", chunk(body)
    return b"Content-Length: %d\r\n\r\n" % (len(body) + rest.left), body


class Controller(Protocol):
    """An account: `exchange` makes the exchange that carries a request to it. `on_sent` is called at the write: until
    then everything that the request took of a quota can be given back.

    `chat_only`: it takes chat completions and nothing else. `cache_free`: what its prompt cache gives takes nothing of
    its token limit. `rate_codes`: see `AccountConfig`.
    """

    chat_only: bool
    cache_free: bool
    rate_codes: "tuple[str, ...]"

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[float], None]") -> Exchange:
        """A fresh exchange for `request`, not started. Raises Untranslatable where the account has no words for it."""


class OpenAIController:
    """An account that speaks OpenAI's API, at any base URL (openai-openapi; PROVIDERS: vendors alike).

    What differs from account to account is data: `base` is what precedes every path in a request line, `paths` are
    those that it has elsewhere, `fixed` our own field lines, `hidden` the client's that must not stand beside them.
    """

    chat_only = cache_free = False

    def __init__(self, config: ControllerConfig) -> None:
        account, wanted = config.account, config.timeouts.first_byte
        self.origin, prefix = parse_origin(account.base_url, account.proxy, account.ca_file)
        self.base = urllib.parse.quote(prefix, safe="/%:@!$&'()*+,;=~")  # RFC 3986, 3.3; an escape stays one
        # A proxy gets plain requests in the absolute form (RFC 9112, 3.2.2), with its password; TLS goes by a tunnel,
        # and what is in it is none of the proxy's business.
        absolute = self.origin.proxy and self.origin.scheme == "http"
        if absolute:
            self.base = "http://" + self.origin.authority + self.base
        self.paths = {CHAT_PATH: account.chat_path}
        # Mappings are tuples of pairs in the configuration, so that it can be compared and hashed as a whole.
        self.model_map, self.rate_codes = dict(config.model_map), account.rate_codes
        self.drop, self.rename = frozenset(account.drop_params), dict(account.rename_params)
        self.extra = dict(account.extra_body)
        self.edits = bool(self.drop or self.rename or self.extra)
        # Of whole answers, for which SDKs wait 600 s, and of streams, whose first byte does not wait for the last.
        self.timeouts = [config.timeouts.replace(first_byte=s if wanted is None else wanted) for s in (600.0, 120.0)]
        # Of our fields and the configuration's the latter counts, and of the client's none with one of these names:
        # which of two values an upstream believes is anybody's guess.
        own = frozenset(name.lower().encode() for name, _ in account.headers)
        # What a client says for itself never gets as far as here; another header for the key might.
        self.hidden = own | ({account.auth_header.lower().encode()} - REQUEST_DROPPED)
        self.fixed = self._fixed_fields(account, own)
        if absolute:
            self.fixed += proxy_authorization(self.origin.proxy)
        self.start = functools.lru_cache(maxsize=64)(self._start)  # nearly all requests have one of a few

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[float], None]") -> Exchange:
        """See `Controller`."""
        timeouts, message = self.timeouts[request.stream], self.message(request)
        return NetworkExchange(pool, self.origin, message, timeouts, on_sent, request.method, request.upload)

    def message(self, request: ApiRequest) -> "tuple[bytes, bytes]":
        """Head and body of the request as the account gets them; nothing of it is copied from the client's own head
        but values that were parsed. Raises Untranslatable."""
        body, start = self.body(request), self.start(request.method, request.path, request.query, request.model)
        lines = without(request.lines, self.hidden) if self.hidden else request.lines
        if request.upload is not None:
            length, body = framed_upload(body, request.upload)
        else:
            # A GET without a body has no length, anything else has one, be it 0 (RFC 9110, 8.6).
            length = b"Content-Length: %d\r\n\r\n" % len(body) if body or request.method != "GET" else b"\r\n"
        return b"".join((start, lines, length)), body

    def target(self, path: str, query: str, model: str) -> str:
        """What stands between method and version in the request line."""
        return self.base + self.paths.get(path, path) + "?" * bool(query) + query

    def _start(self, method: str, path: str, query: str, model: str) -> bytes:
        return ("%s %s HTTP/1.1\r\n" % (method, self.target(path, query, model))).encode() + self.fixed

    def body(self, request: ApiRequest) -> bytes:
        """The body with this account's name of the model and its parameters; the same object where both are as they
        came."""
        model, names = self.model_map.get(request.model), request.data.keys()
        body = request.body if model is None else request.body_for(model)
        if not (self.edits and names):
            return body
        # Other calls have other parameters, so that chats alone get what the account wants added.
        extra = self.extra if request.path == CHAT_PATH else {}
        if not (extra or self.drop & names or self.rename.keys() & names):
            return body
        # Of an old and a new name for one thing (max_tokens, max_completion_tokens) the one that is renamed counts:
        # clients send the other for servers that know nothing better. Two members of one name would be anybody's guess.
        gone = self.drop | ({self.rename[name] for name in self.rename.keys() & names - self.drop} - self.rename.keys())

        def edit(name: str) -> "tuple[str, None]":
            new = "" if name in gone else self.rename.get(name, name)
            return "" if new in extra else new, None

        return edit_members(body, edit, extra)

    def _fixed_fields(self, account: AccountConfig, own: "frozenset[bytes]") -> bytes:
        key = account.api_key.reveal()
        fields = {
            "Host": self.origin.authority,
            "Accept-Encoding": "identity",  # events could not be told apart, errors not read, nothing translated
            account.auth_header: key and (account.auth_scheme + " " + key).lstrip(),
            "OpenAI-Organization": account.organization,
            "OpenAI-Project": account.project,
        }
        # An empty value is no value: a server without keys would refuse an empty one.
        lines = [(name, value) for name, value in fields.items() if value and name.lower().encode() not in own]
        lines += [(name, value.reveal()) for name, value in account.headers]
        return render_fields([(name.encode(), value.encode()) for name, value in lines])


# What Azure's classic surface serves below a deployment (openai-python, lib/azure.py); all else stands beside them.
# Files and batches, for one, belong to the resource.
_AZURE_DEPLOYED = frozenset(
    "/completions /chat/completions /embeddings /audio/transcriptions /audio/translations /audio/speech"
    " /images/generations /images/edits".split()
)


class AzureController(OpenAIController):
    """A resource of Azure OpenAI: its path names deployment and version.

    A base_url that ends in /openai/v1 is the newer surface, where the body's model is the deployment.
    """

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self.api_version, self.deploys = config.account.api_version, not self.base.endswith("/openai/v1")
        if self.deploys:  # the portal shows the address with and without /openai
            self.api_version = self.api_version or AZURE_API_VERSION
            self.base = self.base.removesuffix("/openai") + "/openai"

    def target(self, path: str, query: str, model: str) -> str:
        """See `OpenAIController`. Raises Untranslatable."""
        # The version is the account's: clients made for Azure send one of their own, and it need not be served here.
        parts = [part for part in query.split("&") if part and part[:12] != "api-version="]
        if self.deploys and path in _AZURE_DEPLOYED:
            deployment = self.model_map.get(model, model)
            if not deployment.strip("."):  # ".." would lead elsewhere; slashes are escaped below
                raise Untranslatable("model", "is no deployment's name.")
            path = "/deployments/" + urllib.parse.quote(deployment, "") + path
        if self.api_version:
            parts.append("api-version=" + self.api_version)
        return super().target(path, "&".join(parts), model)


def wants_usage(request: ApiRequest) -> bool:
    """Whether the client asked for the usage of a stream; one that did not gets none, as at OpenAI."""
    options = request.data.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def messages_head(found: ResponseHead, status: int, kind: bytes) -> ResponseHead:
    """The head of a translated answer: nothing of the framing or the type of the original. Its token limits go into the
    index as OpenAI names them, for the ledger; the lines, which a client sees, stay what the upstream said."""
    gone = (b"content-length", b"transfer-encoding", b"content-encoding", b"content-type")
    index = {name: value for name, value in found.index.items() if name not in gone}
    index.update(tightest_tokens(found.index))
    index[b"content-type"] = kind
    return ResponseHead(status, found.minor, index, without(found.lines, gone) + b"Content-Type: %b\r\n" % kind)


async def read_all(exchange: Exchange, most: int) -> bytes:
    """The upstream's whole body, or as much of it as decides that it is too large. Raises UpstreamError."""
    # Cut off above `most`: then it is no JSON, and told as such.
    body = b""
    while len(body) <= most:
        piece = await exchange.read()
        if not piece:
            break
        body += piece
    return body


def as_completion(body: bytes) -> bytes:
    """The chat.completion that a whole answer is. Raises BadReply."""
    # `created` is our own clock's: the Messages API tells no time. What is no message moves on like any other bad
    # reply.
    try:
        return compact_json(from_message(json.loads(body), int(time.time())))
    except (ValueError, RecursionError) as problem:
        raise BadReply("the upstream's answer cannot be translated: %s" % problem) from None


class MessagesExchange:
    """An exchange with Anthropic's Messages API that reads as one with OpenAI's. See `Exchange`.

    Streams are translated event by event as they come, whole answers and errors once they are all there. It is outlet
    and exchange in one: the relay pipes it to the client, and it has the connection piped to itself, so that each event
    is still written in the callback that brought it.
    """

    def __init__(self, inner: Exchange, usage: bool) -> None:
        self.inner, self.usage = inner, usage
        self.interrupt, self.finish, self.abort = inner.interrupt, inner.finish, inner.abort
        self.splitter = EventSplitter()
        self.stream: "MessageStream | None" = None
        self.ready, self.complete = b"", False  # translated and not handed out; whether nothing follows it
        self.head: ResponseHead

    async def start(self) -> None:
        """See `Exchange`. Errors are read to their end, as only their words tell their status."""
        await self.inner.start()
        found = self.inner.head
        # What Content-Encoding says counts, not what it should say: proxies in between are known to compress.
        status, kind = found.status, b"application/json"
        coded = found.index.get(b"content-encoding", b"identity").lower() != b"identity"
        if status >= 300:  # of a compressed one the status has to do
            body = b"" if coded else await read_all(self.inner, HOLD_BYTES)
            status, self.ready = error_from_messages(status, body)
            self.complete = True
        elif coded:  # although only identity was asked for: inflating what an upstream likes to send has no bound
            raise BadReply("the upstream compressed its answer unasked, and it cannot be translated")
        elif found.index.get(b"content-type", b"")[:17].lower() == b"text/event-stream":
            # By the type that came, not by what was asked for: some gateways answer a stream whole.
            self.stream, kind = MessageStream(int(time.time()), self.usage), b"text/event-stream; charset=utf-8"
        self.head = messages_head(found, status, kind)

    def take(self) -> bytes:
        """See `Exchange`. Nothing is translated without a wait, as whole answers seldom come with their head."""
        data, self.ready = self.ready, b""
        return data

    async def read(self) -> bytes:
        """See `Exchange`."""
        while not (self.ready or self.complete):
            if self.stream is None:
                self.ready, self.complete = as_completion(await read_all(self.inner, MESSAGE_BYTES)), True
                break
            try:
                data = await self.inner.read()
            except UpstreamError:
                if not self.stream.done:
                    raise
                data = b""  # what goes wrong after the last event does no harm
            self.ready, self.complete = self._translate(self.stream, data), not data
        return self.take()

    async def pipe(self, outlet: Outlet) -> None:
        """See `Exchange`. Of a whole answer nothing is left to hand out, of a stream all that it still sends."""
        stream = self.stream
        if stream is None or self.complete:
            return
        self.push_on, self.when_ready = outlet.push, outlet.when_ready
        try:
            await self.inner.pipe(self)
        except UpstreamError:
            if not stream.done:
                raise
        self.push(b"")

    def push(self, data: bytes) -> bool:
        """See `Outlet`: what the upstream sent while `pipe` runs; b"" is its end. Nothing is never pushed on: it would
        look like the end to a client that reads chunks."""
        assert self.stream is not None
        out = self._translate(self.stream, data)
        return self.push_on(out) if out else True

    def _translate(self, stream: MessageStream, data: bytes) -> bytes:
        """What the next bytes become; b"" is the end, where the last event may lack its blank line. Raises
        UpstreamClosed where something is missing."""
        at_end = not data
        # Some servers close after the last event without its blank line. Of all others half is not enough.
        if at_end and b"message_stop" in self.splitter.pending:
            data = b"\n\n"
        out = b""
        for event in self.splitter.feed(data):
            out += stream.feed(*event_fields(event))
        if len(self.splitter.pending) > EVENT_BYTES:  # it would be kept until its end, which may never come
            self.splitter.pending = b""
            out += stream.fail({"message": "The upstream sent an event of more than %d bytes." % EVENT_BYTES})
        if at_end and not (stream.done or stream.failed):
            raise UpstreamClosed("the upstream ended its stream before the last event")
        return out


class AnthropicController(OpenAIController):
    """An account that speaks Anthropic's Messages API, to which chats are translated. Its own chat/completions is for
    trying out only, by the vendor's word: it ignores many fields in silence, and tells nothing of the cache."""

    chat_only = cache_free = True

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self.max_tokens, self.thinking = config.account.max_tokens, config.account.thinking
        self.paths["/models"] = "/models?limit=1000"  # without it the list ends after 20
        # The client's version, if it is one of that API's clients, is not for this translation; the configuration's is.
        if b"anthropic-version" not in self.hidden:
            self.hidden |= {b"anthropic-version"}
            self.fixed += b"anthropic-version: %b\r\n" % MESSAGES_VERSION

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[float], None]") -> Exchange:
        """See `Controller`."""
        inner = super().exchange(request, pool, on_sent)
        return MessagesExchange(inner, wants_usage(request)) if request.path == CHAT_PATH else inner

    def body(self, request: ApiRequest) -> bytes:
        """See `OpenAIController`. Raises Untranslatable."""
        if request.path != CHAT_PATH:
            return request.body
        # What the configuration adds counts over the client's words and over the translation: it may know newer fields.
        asked = {**request.data, "model": self.model_map.get(request.model, request.model)}
        return compact_json({**to_messages(asked, self.drop, self.max_tokens, self.thinking), **self.extra})


def echo_pieces(request: ApiRequest) -> "Iterator[bytes]":
    """What an echo controller answers: the last user message, cut after each run of white space, with usage."""
    # Where no user speaks the last message is echoed, whoever's it is.
    messages = request.data["messages"]
    content = ([one for one in messages if one.get("role") == "user"] or messages)[-1].get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    content = str(content)  # what makes no sense, too: no upstream is there to refuse it
    # Cut as the spaces stand, so that the words put together are the text.
    words = re.findall(r"\S*\s*", content)[:-1]
    prompt = max(1, request.prompt_tokens)
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
    kind, said = ("chat.completion.chunk", "delta") if request.stream else ("chat.completion", "message")
    # Made when it is asked for, so that an answer as long as the prompt is never in memory as a whole.
    name = "chatcmpl-echo-" + request.request_id
    same = {"id": name, "object": kind, "created": int(time.time()), "model": request.model}

    def told(what: "dict[str, Any]", reason: "str | None", **more: "Any") -> bytes:
        choice = {"index": 0, said: what, "logprobs": None, "finish_reason": reason}
        body = compact_json({**same, "choices": [choice], **more})
        return b"data: %b\n\n" % body if request.stream else body

    if not request.stream:
        yield told({"role": "assistant", "content": content, "refusal": None}, "stop", usage=usage)
        return
    metered = wants_usage(request)
    more: "dict[str, Any]" = {"usage": None} if metered else {}
    yield told({"role": "assistant", "content": ""}, None, **more)
    for word in words:
        yield told({"content": word}, None, **more)
    yield told({}, "stop", **more)
    if metered:
        yield told({}, None, choices=[], usage=usage)
    yield b"data: [DONE]\n\n"


class EchoExchange:
    """An exchange that makes its reply up. See `Exchange`. `first_delay` s before all, `delay` s between tokens."""

    complete = False

    def __init__(
        self, request: ApiRequest, delay: float, first_delay: float, on_sent: "Callable[[float], None]"
    ) -> None:
        self.pieces, self.on_sent, self.first_delay = echo_pieces(request), on_sent, first_delay
        self.delay = delay if request.stream else 0.0
        self.wait_s = 0.0  # before the next piece
        kind = b"text/event-stream; charset=utf-8" if request.stream else b"application/json"
        self.head = ResponseHead(200, 1, {b"content-type": kind}, b"Content-Type: %b\r\n" % kind)

    async def start(self) -> None:
        """See `Exchange`."""
        self.on_sent(asyncio.get_running_loop().time())
        await asyncio.sleep(self.first_delay)

    def take(self) -> bytes:
        """See `Exchange`."""
        return b""

    async def read(self) -> bytes:
        """See `Exchange`."""
        await asyncio.sleep(self.wait_s)
        self.wait_s = self.delay
        return next(self.pieces, b"")

    async def pipe(self, outlet: Outlet) -> None:
        """See `Exchange`. A client that does not read is waited for, as an upstream would be held."""
        ready = asyncio.Event()
        piece = await self.read()
        while piece:
            if not outlet.push(piece):
                ready.clear()
                outlet.when_ready(ready.set)
                await ready.wait()
            piece = await self.read()

    def interrupt(self, error: Exception) -> None:
        """Nothing is waited for but time."""

    def finish(self) -> None:
        """Nothing is held."""

    abort = finish


class EchoController:
    """An account without a network: answers with the last user message, whole or word by word, with usage. For --demo,
    for trying out a configuration, and for clients' tests, which need no key."""

    chat_only, cache_free = True, False
    rate_codes: "tuple[str, ...]" = ()

    def __init__(self, config: ControllerConfig) -> None:
        self.delays = config.account.delay, config.account.first_delay

    def exchange(self, request: ApiRequest, pool: ConnectionPool, on_sent: "Callable[[float], None]") -> Exchange:
        """See `Controller`."""
        return EchoExchange(request, *self.delays, on_sent)


# The vendors of PRESETS differ from OpenAI in what their rows say, and in nothing else.
CONTROLLERS: "dict[str, Callable[[ControllerConfig], Controller]]" = {
    **dict.fromkeys(PRESETS, OpenAIController),
    "openai": OpenAIController,
    "azure": AzureController,
    "anthropic": AnthropicController,
    "echo": EchoController,
}


# ==== 10. Outcomes ====
# What came of an attempt. Three pure questions: what does a reply, a broken connection or an error event mean
# (`judge_*`)? May the next controller be asked (`may_retry`)? What does a reply tell of the account's quota
# (`allowance`, `used_tokens`)? Nothing here waits, counts or keeps anything.
#
# Vendors agree on statuses and on little else. Error bodies come as an object, a list of one, a string, HTML or
# nothing; the code may be text, a number or null; what is out of money and what is merely too fast share status 429.
# So bodies are read tolerantly, and whatever makes no sense falls back to what the status alone says.


class Outcome(enum.Enum):
    """What came of an attempt; DESIGN's table has a row for each. The value stands in the access log."""

    OK = "ok"
    CLIENT = "client"  # the request itself is at fault: returned as it is
    LARGE = "large"  # more tokens than this account's limit allows at all
    RATE = "rate"
    QUOTA = "quota"  # nothing left to spend
    AUTH = "auth"
    FORBIDDEN = "forbidden"
    BARRED = "barred"  # its key has no right to such objects, which says nothing of what else it may
    MISSING = "missing"  # this account lacks the model
    FAULT = "fault"
    CONNECT = "connect"  # nothing was sent
    SILENT = "silent"  # no byte within first_byte: it may be generating
    CUT = "cut"
    UNFIT = "unfit"  # its API has no words for the request: nothing was sent
    GONE = "gone"  # the client left
    LOST = "lost"  # another controller answered first, in its rescue


FAILURES = frozenset((Outcome.FAULT, Outcome.CONNECT, Outcome.SILENT, Outcome.CUT))  # what the breaker counts
ANSWERED = frozenset((Outcome.CLIENT, Outcome.LARGE, Outcome.MISSING, Outcome.RATE))  # the account works
# 429 (or 402) for want of money, not of patience: waiting a minute is no use, asking elsewhere is. Rivals that take
# these for rate limits hammer a dead key all day.
QUOTA_CODES = frozenset(
    "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded project_spend_limit_exceeded"
    " organization_usage_limit_exceeded exceeded_current_quota_error billing_error billing_hard_limit_reached"
    " billing_not_active 1113 Arrearage".split()  # the last are Zhipu's and DashScope's
)
# Of Google, Fireworks and xAI, whose codes say nothing of it, in a 403, 412 or 429: a 400 may quote the request.
SPENT_WORDS = ("monthly spending cap", "monthly spending limit", "have any credits or licenses")
# How a 400 begins that elsewhere were a 401 or 403: Google's words and xAI's. Not what it holds, as it may quote the
# request.
BAD_ACCOUNT = (
    "API key not valid",
    "API key expired",
    "API Key not found",
    "User location is not supported",
    "Incorrect API key provided",
)
# 403s about a prompt, which no account would take: the words of OpenRouter, xAI and, where it is too long, Together.
# One about a flagged account is none.
PROMPT_REFUSED = ("input was flagged", "requires moderation", "violates usage guidelines", "context length")
TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
# Those without such a code: the first of nearly all, then xAI, Google, Moonshot, DashScope, Bedrock, Zhipu.
TOO_LONG_WORDS = (
    "context length",
    "maximum prompt length",
    "maximum number of tokens allowed",
    "model token limit",
    "Range of input length",
    "too long for requested model",
    "Prompt exceeds max length",
)
MISSING_CODES = frozenset(("model_not_found", "DeploymentNotFound", "not_found_error"))
# The answer shown when every controller failed: what tells the client most comes first.
USEFULNESS = (
    Outcome.CLIENT,
    Outcome.LARGE,
    Outcome.RATE,
    Outcome.QUOTA,
    Outcome.FAULT,
    Outcome.MISSING,
    Outcome.AUTH,
    Outcome.FORBIDDEN,
    Outcome.BARRED,
)
# Of an account, not of the request: asking again soon is no use (the official SDKs obey x-should-retry).
LASTING = frozenset(
    (Outcome.LARGE, Outcome.QUOTA, Outcome.AUTH, Outcome.FORBIDDEN, Outcome.BARRED, Outcome.MISSING)
)
# The status that an error in a 200's stream would have had, by its code or type (OpenAI's and Anthropic's words).
ERROR_STATUSES = {
    **dict.fromkeys(QUOTA_CODES, 429),
    **dict.fromkeys(MISSING_CODES, 404),
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "overloaded_error": 529,
    "invalid_request_error": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
    "authentication_error": 401,
    "permission_error": 403,
}


class Verdict:
    """What an attempt came to, and what its controller learns of it.

    `status`: 0 where there was no reply. `after_s`: the time that a 429 or 503 named. `by_tokens`: a 429 about tokens,
    of which so many were `requested`. `bucket`: the name that a 429 gave the limit ("for limit gpt-4.1-long-context").
    """

    after_s: "float | None" = None
    by_tokens, bucket, requested = False, "", 0

    def __init__(self, outcome: Outcome, status: int = 0, message: str = "") -> None:
        self.outcome, self.status, self.message = outcome, status, message


GOOD = Verdict(Outcome.OK, 200)

# -- when to come again

# Go's durations, as OpenAI writes them (17ms, 7.66s, 6m0s), or plain seconds, as Azure and Retry-After do. The counts
# bound what a regular expression and float() are given.
_DURATION = re.compile(r"(?:\d{1,12}(?:\.\d{1,9})?(?:[mnuµ]?s|[hm]))+|\d{1,12}(?:\.\d{1,9})?", re.ASCII)
_PART = re.compile(r"([\d.]+)([a-zµ]*)")
_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "": 1.0}
# OpenAI: "try again in 1m2s"; Azure: "retry after 45 seconds"; Google has it in the details of the error.
_HINT = (  # compiled, and kept by `re`, when the first error comes
    r"(?i)(?:try again in|retry after|retry in)\s+((?:\d+(?:\.\d+)?\s?(?:h|ms|m|s)[a-z]*\s?)+)"
    r'|"retryDelay":\s*"([\d.]+s)"'
)


def parse_duration(text: str) -> "float | None":
    """Seconds of a Go duration (`17ms`, `6m0s`, `1h2m3s`) or a plain number of seconds; None for anything else."""
    if not _DURATION.fullmatch(text):
        return None
    seconds = 0.0
    for number, unit in _PART.findall(text):
        seconds += float(number) * _UNITS_S[unit]
    return min(seconds, 1e9)


def seconds_until(date: str, wall_s: float) -> "float | None":
    """From now to an HTTP date or an RFC 3339 time; None for what is neither."""
    import datetime as dt  # 3 ms that only dates pay
    import email.utils

    try:
        then = dt.datetime.fromisoformat(date) if date[:4].isdigit() else email.utils.parsedate_to_datetime(date)
        if then.tzinfo is None:
            then = then.replace(tzinfo=dt.UTC)
        return max(0.0, then.timestamp() - wall_s)
    except (ValueError, TypeError, OverflowError):
        return None


def retry_after(index: Index, message: str, body: bytes, wall_s: float) -> "float | None":
    """How long an error asks us to stay away, in seconds: by header, else by its prose (RFC 9110, 10.2.3).

    Azure's and OpenAI's milliseconds come first: Retry-After rounds 20 ms up to a second, or down to none at all.
    `x-ratelimit-reset-*` does not count: that is when the bucket is full, which no request has to wait for.
    """
    value = ""
    for name, unit_s in ((b"retry-after-ms", 1e-3), (b"retry-after", 1.0)):
        value = index.get(name, b"").decode("latin-1")
        seconds = parse_duration(value)
        if seconds is not None:
            return seconds * unit_s
    seconds = seconds_until(value, wall_s) if value else None
    hint = re.search(_HINT, message) or re.search(_HINT, body[:4096].decode("latin-1"))
    if seconds is not None or hint is None:
        return seconds
    return parse_duration(re.sub(r"\s|econd[s]?|inute[s]?|our[s]?", "", hint.group(1) or hint.group(2)).lower())


# -- what a reply means


def error_words(body: bytes) -> "tuple[str, str]":
    """Code (or type) and message of an error body, in any of the shapes that providers send; "" for what it lacks."""
    try:
        found = json.loads(redactor.scrub(body[:HOLD_BYTES]))  # what is read here is logged and shown
    except (ValueError, RecursionError):
        return "", ""
    if isinstance(found, list) and found:
        found = found[0]
    if not isinstance(found, dict):
        return "", ""
    error = found.get("error") or found
    if not isinstance(error, dict):
        return "", str(error)
    code, kind = str(error.get("code") or ""), str(error.get("type") or "")
    # Some put the status in `code`; and a billing type says more than a general code.
    named = kind if not code or kind in QUOTA_CODES or (code.isdigit() and code not in QUOTA_CODES) else code
    return named, str(error.get("message") or error.get("detail") or "")


def is_too_long(body: bytes) -> bool:
    """Whether an error says that the prompt is longer than the model can take."""
    code, message = error_words(body)
    return code in TOO_LONG_CODES or any(words in message for words in TOO_LONG_WORDS)


def outcome_of(status: int, code: str, message: str, rate_codes: "Collection[str]" = ()) -> Outcome:
    """The class of an error reply (PROVIDERS, neutral outcome classes)."""
    spent = code in QUOTA_CODES and code not in rate_codes  # a 400 at DashScope, and for OpenAI's images
    told = status in (403, 412, 429) and any(words in message for words in SPENT_WORDS)
    if status == 402 or (spent and status in (400, 429)) or told:
        return Outcome.QUOTA
    # Groq's own: 498, its flex tier has no capacity left; 413, a request of more tokens than a minute's limit.
    if status in (429, 498) or (status == 413 and code == "rate_limit_exceeded"):
        return Outcome.RATE
    if status == 401 or (status == 400 and (code == "organization_restricted" or message.startswith(BAD_ACCOUNT))):
        return Outcome.AUTH  # the code is Groq's
    if status == 403 and any(words in message for words in PROMPT_REFUSED):
        return Outcome.CLIENT
    if status in (403, 404):
        # A project may be barred from one model (403), a key from all: only the words tell.
        if code in MISSING_CODES or "model" in message:
            return Outcome.MISSING
        return Outcome.FORBIDDEN if status == 403 else Outcome.CLIENT
    # A timeout, a conflict of the provider's own making, a failed dependency: the same request may do well elsewhere.
    return Outcome.CLIENT if 400 <= status < 500 and status not in (408, 409, 424) else Outcome.FAULT


def read_rate_message(verdict: Verdict, code: str) -> None:
    """Reads OpenAI's prose: "... (for limit gpt-4.1) ... on tokens per min (TPM): Limit 10000, Requested 12000".

    A request of more than the whole limit would be refused for ever: it is LARGE, and nobody's time to wait.
    """
    message = verdict.message
    verdict.by_tokens = code == "tokens" or "tokens per" in message or "(TPM)" in message
    found = re.search(r"\(for limit ([^)\s]{1,128})\)", message)
    if found:
        verdict.bucket = found.group(1)
    found = re.search(r"Limit:? ([\d,]{1,15}).{0,60}?Requested:? ([\d,]{1,15})", message)
    if found:
        limit = int(found.group(1).replace(",", "") or 0)
        verdict.requested = int(found.group(2).replace(",", "") or 0)
        if verdict.requested > limit > 0:
            verdict.outcome = Outcome.LARGE


def judge_reply(
    status: int, index: Index, body: bytes, wall_s: float, stateful: bool = False, rate_codes: "Collection[str]" = ()
) -> Verdict:
    """What a reply means. `body` is only looked at for errors; `wall_s`: the time of day, for dates.

    `stateful`: a 404 or 409 is about an object of the account, so it is the client's and says nothing of the account.
    `rate_codes`: see `AccountConfig`.
    """
    if status < 300:
        return GOOD
    code, message = error_words(body)
    verdict = Verdict(outcome_of(status, code, message, rate_codes), status, message)
    if stateful and status in (404, 409):
        verdict.outcome = Outcome.CLIENT
    if verdict.outcome in (Outcome.RATE, Outcome.FAULT):
        verdict.after_s = retry_after(index, message, body, wall_s)
    if verdict.outcome is Outcome.RATE:
        read_rate_message(verdict, code)
    return verdict


def judge_of_object(verdict: Verdict) -> Outcome:
    """What a refusal comes to where no model was asked for anything: a 403 or 404 is no word about chats."""
    # Keys may be made with a few rights only. OpenAI says 401 for want of one, as to a key that is none: "You have
    # insufficient permissions for this operation. Missing scopes: api.files.read."
    if verdict.status == 403 or (verdict.status == 401 and "issing scope" in verdict.message):
        return Outcome.BARRED
    # Azure knows a deployment by no model's name, and an object may have "model" in its own.
    return Outcome.CLIENT if verdict.status == 404 else verdict.outcome


def judge_first_event(event: bytes, rate_codes: "Collection[str]" = ()) -> Verdict:
    """What an error event means, in a 200's place or later: as if it had come with the status that belongs to it.

    Who judges by status alone sees nothing but successes here, while every client is refused.
    """
    # Some gateways put the status into `code`, deep inside (OpenRouter); else code and types name it, the code first.
    data = event_fields(event)[1]
    found = re.search(rb'"code":\s*"?([45]\d\d)\b', event)
    names = [error_words(data)[0], *re.findall(r'"type":\s*"(\w{1,64})"', event.decode("latin-1"))]
    named = [ERROR_STATUSES[name] for name in names if name in ERROR_STATUSES]
    status = int(found.group(1)) if found else [*named, 502][0]
    return judge_reply(status, {}, data, 0.0, rate_codes=rate_codes)


def judge_error(error: UpstreamError) -> Verdict:
    """What an attempt that brought no answer means."""
    if not error.sent:
        return Verdict(Outcome.CONNECT, 0, str(error))
    silent = isinstance(error, UpstreamTimeout) and error.early
    return Verdict(Outcome.SILENT if silent else Outcome.FAULT, 0, str(error))


def judge_late_event(event: bytes, rate_codes: "Collection[str]" = ()) -> Verdict:
    """What an error in the middle of a stream means for its controller: nothing where the request is at fault."""
    verdict = judge_first_event(event, rate_codes)
    return GOOD if verdict.outcome in (Outcome.CLIENT, Outcome.LARGE, Outcome.MISSING) else verdict


def may_retry(verdict: Verdict, request: ApiRequest) -> bool:
    """Whether the next controller may get this request. The only place that knows.

    Stateful requests leave traces in the account, so they move on only when this one certainly did not run. A whole
    answer that is still silent may be generating, and be billed: asking another would pay twice.
    """
    outcome = verdict.outcome
    # What has passed through and is kept nowhere cannot be sent to another.
    if request.upload is not None and request.upload.tapped:
        return False
    # Whose object it is nobody remembers, so each account is asked until one has it.
    if request.seeks and verdict.status in (403, 404):
        return True
    # A client's mistake is one everywhere: replaying it over all keys is how a pool gets all its keys banned.
    if outcome in (Outcome.OK, Outcome.CLIENT, Outcome.GONE):
        return False
    if request.stateful:
        refused = outcome in (Outcome.UNFIT, Outcome.CONNECT, Outcome.AUTH, Outcome.RATE, Outcome.QUOTA, Outcome.LARGE)
        return refused or verdict.status in (401, 503)
    # A stream's first byte comes soon, so its silence is a hang; a whole answer's may be work.
    return request.stream or outcome is not Outcome.SILENT


# -- what a reply tells of the quota


RESET_MAX_S = 32 * 86_400.0  # no limit counts more than a month


class Allowance:
    """What one reply says of one limit: its size, what is left, seconds until it is full (None: not said)."""

    __slots__ = ("limit", "remaining", "reset_s")

    def __init__(self, limit: float, remaining: float, reset_s: "float | None") -> None:
        # More is a time since 1970: as a duration it would leave an account that is empty once alone for decades.
        self.limit, self.remaining = limit, remaining
        self.reset_s = reset_s if reset_s is not None and reset_s <= RESET_MAX_S else None


# Limit, remaining and reset: OpenAI's names, which most vendors share; Anthropic's; Cerebras' of the day; Mistral's.
# The first that a reply has counts.
REQUEST_NAMES = (
    (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests"),
    (
        b"anthropic-ratelimit-requests-limit",
        b"anthropic-ratelimit-requests-remaining",
        b"anthropic-ratelimit-requests-reset",
    ),
    (b"x-ratelimit-limit-requests-day", b"x-ratelimit-remaining-requests-day", b"x-ratelimit-reset-requests-day"),
    (b"x-ratelimit-limit-req-minute", b"x-ratelimit-remaining-req-minute", b""),
)
TOKEN_NAMES = (
    (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens"),
    (b"anthropic-ratelimit-tokens-limit", b"anthropic-ratelimit-tokens-remaining", b"anthropic-ratelimit-tokens-reset"),
    (b"x-ratelimit-limit-tokens-minute", b"x-ratelimit-remaining-tokens-minute", b"x-ratelimit-reset-tokens-minute"),
)


# Of which a reply without limits has none: one look then saves fourteen.
REMAINING_NAMES = frozenset(map(operator.itemgetter(1), REQUEST_NAMES + TOKEN_NAMES))


@functools.lru_cache(maxsize=1024)
def reset_seconds(reset: bytes) -> "float | None":
    """A reset as a duration, of which there are few; at most 100 bytes, as it is kept."""
    return parse_duration(reset.decode("latin-1"))


@functools.lru_cache(maxsize=4096)  # what is left moves in a small range while there is little traffic
def as_allowance(limit: bytes, remaining: bytes, reset: bytes) -> "Allowance | None":
    """The allowance that these three fields tell of; None where they are not sane (Azure sends -1 and 0)."""
    if not (remaining.isdigit() and limit.isdigit() and len(limit) < 16 and len(remaining) < 16 and int(limit)):
        return None
    return Allowance(int(limit), min(int(remaining), int(limit)), reset_seconds(reset))


def allowance(
    index: Index, names: "tuple[tuple[bytes, ...], ...]", clock: "Callable[[], float]"
) -> "Allowance | None":
    """What a reply's fields say of one limit; None where they say nothing, or nothing sane."""
    for limit_name, remaining_name, reset_name in names:
        remaining = index.get(remaining_name)
        if remaining is not None:
            limit, reset = index.get(limit_name, b""), index.get(reset_name, b"")
            if len(limit) + len(remaining) + len(reset) > 100:  # what is remembered must be short
                return None
            found = as_allowance(limit, remaining, reset)
            if found is not None and reset[10:11] == b"T":  # a time (RFC 3339), not a duration
                return Allowance(found.limit, found.remaining, seconds_until(reset.decode("latin-1"), clock()))
            return found
    return None


_COUNT = re.compile(rb"\s*:\s*(\d{1,12})")


def told_count(tail: bytes, since: int, name: bytes) -> int:
    """The number that the JSON member `name` (with its quotes) has in `tail` behind `since`; 0 where there is none."""
    at = tail.find(name, since)
    found = _COUNT.match(tail, at + len(name)) if at >= 0 else None
    return int(found.group(1)) if found else 0


def used_tokens(tail: bytes, cache_free: bool = False) -> "tuple[int, int]":
    """All tokens and those of the answer, by the last `usage` in the end of an answer; zeros where there is none.

    A search and not a JSON parser: the end of an answer is no JSON, and an answer may have megabytes. `cache_free`:
    without the tokens that the prompt cache gave.
    """
    at = tail.rfind(b'"usage"')
    if at < 0:
        return 0, 0
    answer = told_count(tail, at, b'"completion_tokens"') or told_count(tail, at, b'"output_tokens"')
    total = told_count(tail, at, b'"total_tokens"') or told_count(tail, at, b'"input_tokens"') + answer
    return total - (told_count(tail, at, b'"cached_tokens"') if cache_free else 0), answer


# ==== 11. Quotas and health ====
# What is known of an account: what it may still send, and whether it works. Pure arithmetic: `now` is the loop's clock
# and always passed in; nothing here waits, logs or knows HTTP. This is what most balancers get wrong, so here is the
# whole of it:
#
# A *quota* is what an account, or several that share one (`quota_group`), may spend. Providers count per model, so a
# quota has a *ledger* for each, and only requests at once and money belong to the quota as a whole. A ledger knows
# three kinds of limit, and a request goes when all of them allow it:
#   - *buckets*, one of requests and one of tokens: what replies tell. Providers keep leaky buckets that refill all the
#     time, and a reply says what was left when its own request was admitted. That is old news: others were sent since.
#     So a bucket is a model that is charged at each sending and refills by the clock; a reply is compared with what
#     the model had expected of *it*, and moves the model by the difference. Whatever is under way is counted once, in
#     whatever order replies come. (Taking `remaining` as it is counts nothing of what is on its way; subtracting what
#     is on its way from it counts those twice that the upstream knew already.)
#   - *windows*: what the configuration says. At most so much in any sliding minute, counted exactly.
#   - what the last 429s *closed*, until the time that they named.
# A request is charged when it gets its *lease*, before it is sent: between the decision and the write there may be a
# TLS handshake, and ten requests that decide at once must not all see the same last place. What is never sent is given
# back whole; what was sent stays charged, since providers count cancelled and failed calls.
#
# Whether a controller works is told by its outcomes (the *breaker*: it answers, and badly) and by its silence
# (*suspicion*: it does not answer at all, which no status will ever tell). A *seat* is one controller for one model.

# Of quotas.
WINDOW_S = 60.0  # rpm and tpm are per this
EDGE_S = 0.005  # a bucket is taken to refill this much later than computed: a request 1 ms too early is a 429
SLACK_S = 0.25  # a request may reach the upstream this much later than another; then it is counted later too
CLOSED_MAX_S = 600.0  # no 429 closes for longer without a probe
CLOSED_S = (1.0, 30.0)  # for a 429 that names no time: the first one's, and what doubling ends at
CLOSED_MIN_S = 0.01  # for a 429 that says "now": not believed to the letter, and doubling while it is all that comes
SLOW_PERIOD_S = 600.0  # a limit that takes longer than this to refill counts hours or days
# Of health.
BREAKER_OUTCOMES, BREAKER_FAILURES, BREAKER_WITHIN_S = 20, 5, 30.0
PARK_S = (300.0, 3600.0)  # for an exhausted quota: somebody has to pay first
# How long a controller is out, by reason, doubling until it works again: an overload is over in seconds, a refused key
# needs a person, a hang may be over at any moment and a probe of it costs one rescue.
OUT_S = {"breaker": (2.0, 60.0), "parked": PARK_S, "suspect": (1.0, 60.0)}
DENIED_COUNT, FORBIDDEN_COUNT = 2, 3  # in a row, before a key is parked: a single 401 may be the provider's hiccup
LACKS_S = 600.0  # how long it is remembered that an account lacks a model
SUSPECT_COUNT = 3  # unanswered requests that make a suspicion
SUSPECT_MIN_S, SUSPECT_UNKNOWN_S = 1.0, 30.0  # silence that makes one at least; and where nothing is known of the usual
# Slow start ends at the first of these paces, a second for the last in any case, and allows no larger bursts.
PACE_MIN_S, PACE_END, PACE_STEP, PACE_MOST = 0.02, 1e4, 1.0625, 4.0
SAMPLES = 100  # times to the first answer that are remembered, per controller, model and kind
RESCUE_SAMPLES, RESCUE_MIN_S = 20, 10.0  # fewer prove nothing; and nobody is asked twice for less silence
NEVER = math.inf


def longer(last_s: float, bounds: "tuple[float, float]") -> float:
    """The next of times that double, from the first of `bounds` to the second."""
    return min(max(2 * last_s, bounds[0]), bounds[1])


class Bucket:
    """A limit as replies tell of it: `level` at the time `at`, refilled by `rate` per second up to `size`.

    It is a model that charges and refills move, and that replies correct: `shift` is all that they have corrected so
    far. A lease keeps what the model said right after its own charge, less the shift of that time, so that a reply is
    compared with what was expected of it, and each error is corrected once.

    As long as no reply has told a `limit` it refuses nothing (`rate` 0) and only counts, below zero. `most`: no larger
    `size` is believed, since 429s came early. `knee`: half of the pace that was refused last, while one is guessed.
    `newest`: the serial of the latest request that a reply told of; `known_at`: when the first one did.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.level = self.limit = self.rate = self.shift = 0.0
        self.size = self.most = self.knee = NEVER
        self.at, self.known_at, self.newest, self.slow = now, 0.0, -1, 0

    def level_at(self, now: float) -> float:
        """What may be taken at `now`."""
        level = self.level + (now - self.at) * self.rate
        return level if level < self.size else self.size

    def charge(self, amount: float, now: float) -> float:
        """Takes `amount`, never below zero; what a reply will be compared with."""
        # `level_at`, written out, as this runs for every request. Never below zero: the upstream takes nothing for what
        # it refuses.
        level = self.level + (now - self.at) * self.rate
        level = (level if level < self.size else self.size) - amount
        self.level, self.at = level if level > 0.0 or not self.rate else 0.0, now
        return level - self.shift

    def opens_at(self, amount: float, now: float) -> float:
        """When `amount` can be taken; more than the whole bucket goes when it is full."""
        if not self.rate:
            return 0.0
        # A millionth less than needed is what adding floats leaves of enough.
        lacking = min(amount, self.size) - self.level_at(now - EDGE_S) - 1e-6
        return now + lacking / self.rate if lacking > 0 else 0.0

    def rebase(self, told: Allowance, serial: int, expected: float, sent_at: float, now: float) -> float:
        """Takes a reply's word, unless one to a request sent later was heard before; by how much the level fell.

        `expected`: from the request's own `charge`.
        """
        # Replies come in any order, and the latest request's tells of all before it.
        if serial < self.newest:
            return 0.0
        self.newest = serial
        self.charge(0.0, now)
        left, before = told.remaining, self.level
        if not self.limit:
            self.known_at, before = now, NEVER
        if told.reset_s:
            self._learn_rate(told.limit, left, told.reset_s)
            # The time until it is full tells the fraction that `remaining` rounds down, and never more than that.
            exact = self.size - told.reset_s * self.rate
            if exact > left:
                left = exact if exact < left + 0.999 else left + 0.999
        elif told.limit != self.limit:
            self.limit, self.rate = told.limit, told.limit / WINDOW_S
            self.size = min(told.limit, self.most)
        # What was sent before the first reply was charged to a model that had no rate yet, and did not refill.
        if sent_at < self.known_at:
            expected -= (self.known_at - sent_at) * self.rate
        # `expected` was less the shift of its time: with today's it is what the model of today would have said then, so
        # what replies in between have corrected already is no error any more.
        error = left - expected - self.shift
        self.shift += error
        level = self.level + error
        self.level = level = 0.0 if level < 0.0 else level if level < self.size else self.size
        return before - level if before > level else 0.0

    def _learn_rate(self, limit: float, left: float, reset_s: float) -> None:
        """Size and speed. A bucket may hold less than a minute's worth: what is in it and when it will be full tell.

        The rate is the limit's per minute, unless two replies running say that it takes ten minutes and more to refill:
        then the limit counts hours or days. One alone proves nothing, as resets are rounded and delayed.
        """
        spent = limit - left
        slow = spent > 0 and reset_s * limit > SLOW_PERIOD_S * spent
        if limit == self.limit == self.size and not (slow or self.slow):
            return  # as nearly each reply: all of this is known
        self.slow = self.slow + 1 if slow else 0
        self.rate = spent / reset_s if self.slow > 1 else limit / WINDOW_S
        size = left + reset_s * self.rate
        if size > limit or size > self.most:
            size = min(limit, self.most)
        if limit != self.limit or size > self.size:
            self.size = size if size > 1.0 else 1.0
        self.limit = limit

    # -- slow start: what an account that tells nothing is taken to allow after a 429. Without it the whole line would
    # -- go at the reopening, and all but a few of it be refused again (self-hosted servers, Vertex, some gateways).

    def guess(self, after_s: float, now: float) -> None:
        """At the reopening one goes, then one each time as long again, until a reply tells the limit."""
        self.charge(0.0, now - EDGE_S)
        self.knee = self.rate / 2 or NEVER
        self.rate, self.size = 1 / min(max(1 / self.knee or after_s, PACE_MIN_S), CLOSED_S[1]), 1.0
        self.level, self.shift = 1.0, self.shift + 1.0 - self.level

    def answered(self) -> None:
        """A good answer: one more may go, and each after it twice as soon, until nothing is guessed any more.

        From half of the pace that was refused last, only a little sooner: to double there meets each limit for ever.
        """
        waited, self.size = self.level < 1.0, PACE_MOST
        if self.rate < self.knee:
            self.level, self.shift, self.rate = self.level + 1.0, self.shift + 1.0, 2 * self.rate
        else:
            self.rate *= PACE_STEP
        # While somebody waits for this pace, its end would let the whole line go at once.
        if self.rate >= 2 / PACE_MIN_S and (not waited or self.rate > PACE_END):
            self.rate, self.size, self.knee = 0.0, NEVER, NEVER


class Window:
    """A configured limit: at most `limit` in any `span_s` seconds. Entries are [when it was sent, amount, counted].

    It slides: a counter that starts anew each minute lets twice the limit pass around the minute's end. One that is
    leased but not sent yet counts without an entry in line: it can only leave once it was sent.

    `rate`: of a burst's window, how much may go per second in the long run. A burst of 1.67 requests a second would
    otherwise come to one a second, so as many as fit may go in the time that these are worth: one each 0.6 s.
    """

    def __init__(self, limit: float, span_s: float, rate: float = 0.0) -> None:
        self.limit, self.span_s, self.rate, self.total = limit, span_s, rate, 0.0
        self.entries: "deque[list[float]]" = deque()

    def add(self, amount: float) -> "list[float]":
        """Counts an amount that is about to be sent."""
        self.total += amount
        return [NEVER, amount, 1.0]

    def sent(self, entry: "list[float]", now: float) -> None:
        """It was sent: from now on its time runs. A second time, on another connection, moves it."""
        if entry[0] == NEVER:
            self.entries.append(entry)
        entry[0] = now

    def change(self, entry: "list[float]", amount: float) -> None:
        """Corrects an amount, of an entry that may have left already."""
        if entry[2]:
            self.total += amount - entry[1]
            entry[1] = amount

    def opens_at(self, amount: float, now: float) -> float:
        """When `amount` fits; more than the whole window goes when it is empty."""
        # Entries leave when somebody asks, so no timer runs for them; each enters and leaves once.
        entries = self.entries
        while entries and entries[0][0] + self.span_s <= now:
            gone = entries.popleft()
            self.total -= gone[1]
            gone[2] = 0.0
        most = amount if amount < self.limit else self.limit
        if self.total + most <= self.limit + 1e-9:
            return 0.0
        at = self._leaves_at(self.limit - most, self.span_s, now)
        # As many as fit into the burst, in the time that these are worth.
        if self.rate:
            worth = self.limit // most * most
            at = min(at, self._leaves_at(worth - most, worth / self.rate, now))
        return at if at > now else 0.0

    def _leaves_at(self, left: float, span_s: float, now: float) -> float:
        """When no more than `left` will be younger than `span_s`."""
        excess = self.total - left
        for at, taken, _ in self.entries:
            excess -= taken
            if excess <= 1e-9:
                return at + span_s
        return now + span_s  # at the earliest: what is in the way has yet to be sent


class Ledger:
    """What may still be sent to one quota for one model: by replies, by configuration, by its last 429s.

    `requests` and `tokens` are the buckets; `windows` those of the configuration, each with whether it counts tokens.
    `closed`: until when, for requests of at least so many tokens; `closed_at`: when it last was, `closed_for`: for how
    long at least, until an answer comes. `open`: its leases, in the order of their charges.

    `easy` spares most decisions the arithmetic: a request of no more tokens than that surely goes. What is charged or
    learned since it was computed is taken from it, and from `few`, the requests that surely go; refills are not added.
    Forgotten at each charge, as at first, it cost 2 us more of a request. `limited`: some limit is known; before,
    nothing is counted.
    """

    __slots__ = (
        "buckets burst_s closed closed_at closed_for easy few limited limits name open requests serial tokens used_at"
        " windows"
    ).split()

    def __init__(self, name: str, limits: QuotaLimits) -> None:
        self.name, self.limits, self.burst_s = name, limits, limits.burst_s
        self.requests, self.tokens = self.buckets = Bucket(), Bucket()
        self.closed: "list[tuple[float, float]]" = []
        self.closed_at = self.closed_for = self.used_at = 0.0
        self.serial = 0
        self.open: "dict[Lease, None]" = {}
        rates = (limits.rpm, limits.tpm)
        self.windows = [(by_tokens, Window(rate, WINDOW_S + SLACK_S)) for by_tokens, rate in enumerate(rates) if rate]
        self._add_bursts()
        self.limited = bool(self.windows)
        self.easy = -1.0 if self.limited else NEVER
        self.few = NEVER

    def _add_bursts(self) -> None:
        """A window for what may go at once beside each one that counts a minute, unless that is a minute's worth."""
        minutes = [(by_tokens, window.limit / WINDOW_S) for by_tokens, window in self.windows]
        for by_tokens, rate in minutes if self.burst_s < WINDOW_S else ():
            burst = max(1.0, rate * self.burst_s)
            self.windows.append((by_tokens, Window(burst, burst / rate, rate)))

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters here how many tokens an answer took."""
        return bool(self.tokens.limit or self.limits.tpm)

    def opens_at(self, need: float, now: float) -> float:
        """When a request of `need` tokens may be sent; 0 for now."""
        if need <= self.easy:
            return 0.0
        at = max(self.requests.opens_at(1.0, now), self.tokens.opens_at(need, now))
        for least, until in self.closed:
            if need >= least and until > at:
                at = until
        for by_tokens, window in self.windows:
            at = max(at, window.opens_at(need if by_tokens else 1.0, now))
        if at > now:
            return at
        self.easy = self._spare(now)
        return 0.0

    def take(self, requests: float, tokens: float) -> None:
        """Keeps `easy` true while so much less may be sent."""
        self.easy -= tokens
        self.few -= requests
        if not self.few >= 1.0:  # also when it is no number: what was endless has got a limit
            self.easy = -1.0

    def begin(self, now: float) -> None:
        """Something is known of a limit: from now on all is counted, and first what is under way, in its order."""
        self.limited, self.easy = True, -1.0
        for lease in self.open:
            lease.charge(now)

    def _spare(self, now: float) -> float:
        """The largest need that surely fits, -1 where that has to be asked each time; sets `few`."""
        # Half of a bucket is far from every edge, where the exact times have to be asked.
        if any(until > now for _, until in self.closed):
            return -1.0
        requests, tokens = self.buckets
        few = min(requests.level, requests.size) / 2 if requests.rate else NEVER
        spare = min(tokens.level, tokens.size) / 2 if tokens.rate else NEVER
        for by_tokens, window in self.windows:
            room = window.limit - window.total
            few, spare = (few, min(spare, room)) if by_tokens else (min(few, room), spare)
        self.few = few
        return spare if few >= 1.0 else -1.0

    def answered(self, sent_at: float) -> None:
        """An answer came: the next 429 without a time starts small again, and slow start goes faster.

        What was under way at the last 429 proves nothing: it had been let in before.
        """
        if sent_at > self.closed_at:
            self.closed_for = 0.0
            if self.requests.rate and not self.requests.limit:
                self.requests.answered()

    def rate(self, need: float) -> float:
        """Requests per second that it can take for long; infinite while nothing is known."""
        known = [(by_tokens, bucket.rate) for by_tokens, bucket in enumerate(self.buckets) if bucket.limit]
        known += [(by_tokens, window.limit / window.span_s) for by_tokens, window in self.windows if not window.rate]
        return min((rate / max(1.0, need) if by_tokens else rate for by_tokens, rate in known), default=NEVER)

    def largest(self) -> float:
        """The most tokens that one request may have here; 0 while nothing is known."""
        known = [self.tokens.limit] if self.tokens.limit else []
        known += [window.limit for by_tokens, window in self.windows if by_tokens and not window.rate]
        return min(known, default=0.0)

    def close(self, verdict: Verdict, need: float, now: float, under_way: bool = False) -> None:
        """Takes a 429: closed until the time it named, else until what is lacking is back, else 1 s, doubling.

        One about tokens closes for requests at least as large as the one it refused: smaller ones may fit. `under_way`:
        its request was, at the last 429, so that this one is no second refusal: a burst that is refused doubles once.
        """
        # A named time is obeyed to the letter. Who forgets it where there are several keys, or sleeps half a second in
        # spite of it, burns all its retries while the window is shut.
        after_s, bucket = verdict.after_s, self.buckets[verdict.by_tokens]
        if after_s is None and bucket.limit:
            after_s = max(0.0, bucket.opens_at(need if verdict.by_tokens else 1.0, now) - now) or None
        # "Now" (0, or a date that has passed, by our clock) may be rounded down once; again and again it is no time.
        if not (under_way and self.closed_for):
            self.closed_for = longer(self.closed_for, CLOSED_S if after_s is None else (CLOSED_MIN_S, CLOSED_S[0]))
        after_s = max(after_s or 0.0, self.closed_for)
        until, self.closed_at = now + min(after_s, CLOSED_MAX_S), now
        if not self.limited:
            self.begin(now)
        if not (self.windows or self.requests.limit or under_way):
            self.requests.guess(after_s, now)
        # What another 429 said of larger requests, or until later, still holds; what this one covers is forgotten.
        least = need if verdict.by_tokens else 0.0
        self.closed = [one for one in self.closed if one[1] > now and (one[0] < least or one[1] > until)]
        self.closed.append((least, until))
        self.easy = -1.0

    def halve_burst(self) -> None:
        """A 429 came while there should have been room: slices shorter than believed are judged (Azure: 1 or 10 s).

        A counter of minutes meets such 429s for ever; capping what runs at once instead would waste the quota.
        """
        self.burst_s = max(self.burst_s / 2, 1.0)
        self.windows = [one for one in self.windows if not one[1].rate]
        self._add_bursts()
        for bucket in self.buckets:
            if bucket.limit:
                bucket.size = bucket.most = max(1.0, bucket.size / 2)
        self.easy = -1.0


class Quota:
    """What a controller, or a group of them, may send: the ledgers by model, requests at once, and parking.

    `aliases`: from a model, as the account calls it, to what a 429 called its limit. While it is parked, and after that
    until an answer comes, `park_s` is set; `probe` is the one request that finds out.
    """

    __slots__ = "aliases in_flight ledgers limits most name park_s parked_until probe".split()

    def __init__(self, name: str, limits: QuotaLimits) -> None:
        self.name, self.limits = name, limits
        self.most = limits.concurrency or sys.maxsize  # compared for each seat of each request: no float, but for speed
        self.in_flight = 0
        self.ledgers: "dict[str, Ledger]" = {}
        self.aliases: "dict[str, str]" = {}
        self.parked_until = self.park_s = 0.0
        self.probe: "Lease | None" = None

    def ledger(self, model: str) -> Ledger:
        """The ledger that counts for `model`; the least recently used goes when there are too many."""
        name = self.aliases.get(model, model)
        found = self.ledgers.get(name)
        if found is None:
            if len(self.ledgers) >= MEMORY_MODELS:  # clients choose the names: what is in use must stay
                del self.ledgers[min(self.ledgers, key=lambda one: self.ledgers[one].used_at)]
            found = self.ledgers[name] = Ledger(name, self.limits)
        return found

    def rename(self, model: str, bucket: str) -> None:
        """A 429 said which limit `model` counts against: models that share one share the ledger from now on."""
        if len(self.aliases) >= MEMORY_MODELS:
            self.aliases.clear()
        self.aliases[model] = bucket

    def park(self, now: float) -> None:
        """Nothing left to spend: closed for minutes, growing."""
        self.park_s = longer(self.park_s, PARK_S)
        self.parked_until = now + self.park_s

    def pays(self, now: float) -> None:
        """An answer came: there is something to spend, unless its request was sent before the parking."""
        if self.parked_until <= now:
            self.park_s, self.probe = 0.0, None


# -- who may get a request

_DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8})\Z")


def quantile(values: "Iterable[float]", share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))]


class Seat:
    """One controller for one model: its ledger, whether it has the model, and its usual times to a first answer.

    `mapped`: what `model_map` makes of the model. `limited_as`: the name that its quota goes by, which is the account's
    own name for it without its date (gpt-4.1-2025-04-14 counts as gpt-4.1), but a deployment's as it is.
    """

    __slots__ = "lacks_until ledger limited_as mapped model times upstream".split()

    def __init__(self, upstream: "Upstream", model: str) -> None:
        self.upstream, self.model = upstream, model
        self.mapped = dict(upstream.config.model_map).get(model)
        name = self.mapped or model
        self.limited_as = name if upstream.config.type == "azure" else _DATED.sub("", name)
        self.ledger = upstream.quota.ledger(self.limited_as)
        self.lacks_until = 0.0
        self.times: "tuple[deque[float], deque[float]]" = (deque(maxlen=SAMPLES), deque(maxlen=SAMPLES))

    def __repr__(self) -> str:
        return "<Seat %s at %s>" % (self.model, self.upstream.name)

    def ready(self, need: float, now: float) -> bool:
        """Whether a request of `need` tokens may go here now: it works, has the model, and has room."""
        # The questions of `well_at` and `room_at` without the times: twenty seats are asked for each request.
        upstream = self.upstream
        if upstream.out_until > now or upstream.probe is not None or self.lacks_until > now:
            return False
        quota = upstream.quota
        if quota.in_flight >= quota.most or quota.parked_until > now or quota.probe is not None:
            return False
        ledger = self.ledger
        return need <= ledger.easy or ledger.opens_at(need, now) <= now

    def room_at(self, need: float, now: float) -> float:
        """When there is room, by quota alone: 0 for now, NEVER where only another request's end makes some."""
        quota = self.upstream.quota
        if quota.in_flight >= quota.most or quota.probe is not None:
            return NEVER
        return max(quota.parked_until if quota.parked_until > now else 0.0, self.ledger.opens_at(need, now))

    def well_at(self, now: float) -> float:
        """When it is due back, by health alone: 0 for now."""
        until = max(self.upstream.out_until, self.lacks_until)
        if until > now:
            return until
        return NEVER if self.upstream.probe is not None else 0.0

    def opens_at(self, need: float, now: float) -> float:
        """When a request may go here, as far as is known: 0 for now."""
        return max(self.room_at(need, now), self.well_at(now))

    def usual_s(self, stream: bool) -> float:
        """Silence beyond this is suspicious."""
        # By model and kind, as a whole answer takes as long as its stream, and a thinking model minutes. The p95, as a
        # mean is ruled by the many short ones, and a maximum by one hang.
        times = self.times[stream]
        return max(SUSPECT_MIN_S, 3 * quantile(times, 0.95)) if times else SUSPECT_UNKNOWN_S


def rescue_s(seat: Seat, seats: "list[Seat]", stream: bool) -> float:
    """Silence beyond this asks for a rescue; NEVER while too little is known, of this controller or of all of them."""
    # The p99, and never soon: a rescue is paid for twice, where a suspicion costs nothing.
    times: "Collection[float]" = seat.times[stream]
    if len(times) < RESCUE_SAMPLES:
        times = [seconds for one in seats for seconds in one.times[stream]]
    return max(RESCUE_MIN_S, 3 * quantile(times, 0.99)) if len(times) >= RESCUE_SAMPLES else NEVER


def model_patterns(names: "Iterable[str]") -> "re.Pattern[str]":
    """One expression for all of the names, in which `*` stands for anything and `?` for one character."""
    parts = [re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names]
    return re.compile("|".join(parts), re.DOTALL)


class Upstream:
    """A controller with its live state.

    It is out until `out_until` for the reason `out_why`: "breaker", "parked" (its key was refused), "suspect", or
    "busy" (it named a time itself). After the first three it is `recovering`: one request at a time (`probe`) finds out
    whether it works again. `out_s`: how long it was out last, by reason, until an answer ends well. `lost`: how many
    requests it left unanswered, since it was last heard, until others had answered them in a rescue.
    """

    __slots__ = (
        "answered_at config controller credit denied failures first_byte_s forbidden in_flight last_error name out_s"
        " lost out_until out_why patterns probe quota recent recovering requests seats unanswered weight"
    ).split()

    def __init__(self, config: ControllerConfig, controller: Controller, quota: Quota) -> None:
        self.config, self.controller, self.quota = config, controller, quota
        self.name, self.weight = config.name, config.weight
        self.credit = self.in_flight = self.requests = self.failures = self.denied = self.forbidden = 0
        self.first_byte_s = [0.0, 0.0]  # of whole answers and of streams: a mean that forgets; 0 is unknown
        self.recent: "deque[tuple[float, bool]]" = deque(maxlen=BREAKER_OUTCOMES)
        self.out_until = self.answered_at = 0.0
        self.out_why = self.last_error = ""
        self.out_s: "dict[str, float]" = {}
        self.recovering = False
        self.probe: "Lease | None" = None
        self.unanswered: "dict[Lease, None]" = {}  # in the order of sending
        self.lost = 0
        self.seats: "dict[str, Seat]" = {}
        names = config.models + tuple(name for name, _ in config.model_map)
        self.patterns = model_patterns(names) if config.models else None

    def __repr__(self) -> str:
        told = (self.name, self.out_why or "open", self.in_flight, self.requests)
        return "<Upstream %s %s in_flight=%d requests=%d>" % told

    def serves(self, model: str) -> bool:
        """Whether requests for `model` may go here; a controller without `models` takes all."""
        return self.patterns is None or self.patterns.fullmatch(model) is not None

    def seat(self, model: str) -> Seat:
        """What is known of this controller and `model`."""
        found = self.seats.get(model)
        if found is None:
            if len(self.seats) >= MEMORY_MODELS:
                del self.seats[min(self.seats, key=lambda one: self.seats[one].ledger.used_at)]
            found = self.seats[model] = Seat(self, model)
        return found

    def heard(self, stream: bool, seconds: float) -> None:
        """Takes the time to the first byte of one good answer."""
        mean = self.first_byte_s[stream]
        self.first_byte_s[stream] = mean + (seconds - mean) / 8 if mean else seconds

    # -- in and out

    def take_out(self, why: str, until: float) -> None:
        """Out until then; afterwards one request probes."""
        self.out_until, self.out_why, self.recovering, self.probe = until, why, True, None

    def back_off(self, why: str, now: float) -> None:
        """Out for twice as long as the last time, unless an answer ended well meanwhile."""
        self.out_s[why] = longer(self.out_s.get(why, 0.0), OUT_S[why])
        self.take_out(why, now + self.out_s[why])

    def recover(self) -> None:
        """It works: every door opens."""
        self.out_until, self.out_why, self.recovering, self.probe = 0.0, "", False, None
        self.recent.clear()

    def works(self, now: float) -> None:
        """It gave an answer that is no failure."""
        self.denied = self.forbidden = 0
        if self.out_why and (self.recovering or self.out_until <= now):
            self.recover()

    def failed(self, now: float, verdict: Verdict, probed: bool) -> None:
        """Counts a failure; opens the breaker when it is one too many, or when a probe failed.

        A share and a number: one in a hundred never opens it however busy it is, nor do two failures at night. What was
        under way when it went out says nothing new, so a burst that fails together counts as one time.
        """
        # Old outcomes say nothing of now: a controller with one request a minute needs no breaker.
        self.recent.append((now, True))
        fresh = [bad for at, bad in self.recent if now - at <= BREAKER_WITHIN_S]
        bad = sum(fresh)
        many = bad >= BREAKER_FAILURES and 2 * bad >= len(fresh)
        if (probed and self.out_why == "breaker") or (many and not (self.recovering and self.out_until > now)):
            self.back_off("breaker", now)
        # It is busy and says until when, which needs no probe and no verdict on its health.
        if verdict.after_s:
            self.out_until = max(self.out_until, now + min(verdict.after_s, CLOSED_MAX_S))
            self.out_why = self.out_why or "busy"

    def refused(self, now: float, outcome: Outcome, probed: bool) -> None:
        """A 401 or 403; the key is parked after some in a row, and again when a probe met one."""
        # Two kinds, counted apart: a 401 is about the key, a 403 may be about a region or one request.
        self.denied += outcome is Outcome.AUTH
        self.forbidden += outcome is not Outcome.AUTH
        many = self.denied >= DENIED_COUNT or self.forbidden >= FORBIDDEN_COUNT
        parked = self.out_why == "parked" and self.out_until > now
        if (probed and self.out_why == "parked") or (many and not parked):
            self.back_off("parked", now)

    def is_busy(self, now: float) -> bool:
        """Whether it said when it will have time again."""
        return self.out_why == "busy" and self.out_until > now

    # -- suspicion

    def is_silent(self, now: float) -> bool:
        """Whether its silence is far beyond the usual: at least three requests that were sent since it last answered
        anything, or a probe, and the oldest of them silent for too long.

        A request that was sent before that answer is slow and not stuck: it does not hide that all others are, and as
        long as it was silent then, others of its model and kind may be.
        """
        since = self.answered_at
        asked = [one for one in self.unanswered if one.sent_at > since]
        if self.out_why == "suspect":  # who was stuck before says nothing of the probe
            asked = [one for one in asked if one is self.probe]
        if not asked or (len(asked) + self.lost < SUSPECT_COUNT and asked[0] is not self.probe):
            return False
        seat, stream = asked[0].seat, asked[0].stream
        # For those that were sent since, this is negative and does not count.
        slow = [since - one.sent_at for one in self.unanswered if one.seat is seat and one.stream == stream]
        return now - asked[0].sent_at > max(seat.usual_s(stream), *slow)

    def suspect(self) -> None:
        """It has gone silent: no new requests until what is stuck in it is gone."""
        self.take_out("suspect", NEVER)

    def unstick(self, now: float) -> None:
        """Nothing is stuck in a suspect any more: one real request may probe it, after a while that doubles."""
        if self.out_why == "suspect" and self.out_until == NEVER and not self.unanswered:
            self.back_off("suspect", now)


class Lease:
    """The right to send one request to one controller: charged when granted, given back at most once by `release`.

    `since`: when it was granted. `expected`: what the buckets said right after its charge; `entries`: what it added to
    windows; `told`: what its reply said of requests and of tokens. `stuck`: called when it needs a rescue, which is
    `urgent` from then on.
    """

    __slots__ = "entries expected ledger need seat sent_at serial since stream stuck told upstream urgent".split()

    def __init__(self, seat: Seat, need: float, stream: bool, now: float) -> None:
        upstream, ledger = seat.upstream, seat.ledger
        self.seat, self.upstream, self.need = seat, upstream, need
        self.stream, self.since = stream, now
        self.ledger = ledger  # a 429 may give the seat another one meanwhile
        self.sent_at, self.urgent = 0.0, False
        self.stuck: "Callable[[], bool] | None" = None
        self.entries: "Sequence[tuple[int, Window, list[float]]]" = ()
        self.expected = (0.0, 0.0)
        self.told: "tuple[Allowance | None, Allowance | None]" = (None, None)
        upstream.in_flight += 1
        upstream.requests += 1
        upstream.quota.in_flight += 1
        # Whoever comes first after an outage is the probe; the others are not let in until it is over.
        if upstream.recovering:
            upstream.probe = self
        if upstream.quota.park_s:
            upstream.quota.probe = self
        ledger.serial = self.serial = ledger.serial + 1
        ledger.used_at = now
        ledger.open[self] = None
        if ledger.limited:
            self.charge(now)

    def __repr__(self) -> str:
        return "<Lease %s for %s>" % (self.upstream.name, self.seat.model)

    def charge(self, now: float) -> None:
        """Takes what it needs."""
        ledger, need = self.ledger, self.need
        ledger.take(1.0, need)
        self.expected = ledger.requests.charge(1.0, now), ledger.tokens.charge(need, now)
        if ledger.windows:
            amounts = (1.0, need)
            self.entries = [(kind, window, window.add(amounts[kind])) for kind, window in ledger.windows]

    def sent(self, now: float) -> None:
        """The request was written: from now on it counts, whatever comes of it."""
        self.sent_at = now
        for _, window, entry in self.entries:
            window.sent(entry, now)
        self.upstream.unanswered[self] = None

    def heard(self, now: float) -> None:
        """Something of a reply has come: it is not silent."""
        upstream = self.upstream
        upstream.unanswered.pop(self, None)
        upstream.answered_at, upstream.lost = now, 0

    def answered(self, now: float, good: bool) -> None:
        """A reply began to make sense; `good`: it is the answer, and its time counts as usual."""
        upstream = self.upstream
        self.heard(now)
        if good:
            took_s = now - self.since
            self.seat.times[self.stream].append(took_s)
            upstream.heard(self.stream, took_s)
            upstream.works(now)
            self.ledger.answered(self.sent_at)
            if upstream.quota.park_s:
                upstream.quota.pays(now)

    def learn(self, requests: "Allowance | None", tokens: "Allowance | None", now: float) -> None:
        """Takes what a reply says of its quota."""
        ledger, self.told = self.ledger, (requests, tokens)
        if not ledger.limited:
            ledger.begin(now)
        fell = ledger.requests.rebase(requests, self.serial, self.expected[0], self.sent_at, now) if requests else 0.0
        fewer = ledger.tokens.rebase(tokens, self.serial, self.expected[1], self.sent_at, now) if tokens else 0.0
        if fell or fewer:
            ledger.take(fell, fewer)

    def was_early(self, verdict: Verdict) -> bool:
        """Whether a 429 came while there should have been room: its own reply said so, or our exact count does."""
        # The reply's own figures count more than ours: somebody else may use the account too.
        told = self.told[verdict.by_tokens]
        if told is not None:
            return told.remaining >= (self.need if verdict.by_tokens else 1)
        return bool(self.entries)

    def correct(self, used: float, now: float) -> None:
        """Takes the true cost of an answer, where the upstream does not tell what is left."""
        # Where it does, its word counts: OpenAI and Azure charge the maximum at admission and give nothing back.
        if used > self.need:
            self.ledger.take(0.0, used - self.need)
        if self.ledger.tokens.limit:
            self.ledger.tokens.charge(used - self.need, now)
        for by_tokens, window, entry in self.entries:
            if by_tokens:
                window.change(entry, used)

    def release(self, verdict: Verdict, now: float) -> None:
        """The attempt is over, well or with whatever the verdict says, also after its answer began.

        What was never sent is given back whole.
        """
        # The slot is held until here, the end of the answer: providers count a stream as one request until its last
        # byte, and who frees it at the first one exceeds `concurrency`.
        upstream = self.upstream
        upstream.in_flight -= 1
        upstream.quota.in_flight -= 1
        if self in upstream.unanswered:
            del upstream.unanswered[self]
            upstream.lost += self.urgent and verdict.outcome is Outcome.LOST
        del self.ledger.open[self]
        if not self.sent_at:
            self._give_back(now)
        probed = upstream.probe is self
        if probed:
            upstream.probe = None
        if upstream.quota.probe is self:
            upstream.quota.probe = None
        if verdict is GOOD:
            upstream.recent.append((now, False))
            # The beginning of an answer opens the doors, as it may last for minutes; only a good end forgets the past.
            if upstream.out_s and not upstream.out_why:
                upstream.out_s.clear()
        else:
            self._learn_health(verdict, now, probed)
        if upstream.out_until == NEVER:
            upstream.unstick(now)

    def _give_back(self, now: float) -> None:
        """Undoes the charge. Replies to what was charged after it will know nothing of it: there, more is expected."""
        ledger, amounts = self.ledger, (1.0, self.need)
        for bucket, amount in zip(ledger.buckets, amounts, strict=True):
            bucket.charge(-amount, now)
        for other in reversed(ledger.open):
            if other.serial < self.serial:
                break
            other.expected = other.expected[0] + 1.0, other.expected[1] + self.need
        for _, window, entry in self.entries:
            window.change(entry, 0.0)

    def _learn_health(self, verdict: Verdict, now: float, probed: bool) -> None:
        """What the controller learns (DESIGN 3, the table's third column)."""
        upstream, outcome = self.upstream, verdict.outcome
        if outcome in ANSWERED:
            upstream.recent.append((now, False))
            upstream.works(now)
        elif outcome in FAILURES:
            upstream.failures += 1
            upstream.failed(now, verdict, probed)
        elif outcome in (Outcome.AUTH, Outcome.FORBIDDEN):
            upstream.failures += 1
            upstream.refused(now, outcome, probed)
        # Where little is asked, no three requests are ever stuck at once. So those that were rescued one by one count,
        # or each request would wait as long as the first one, for as long as the upstream hangs.
        elif upstream.lost >= SUSPECT_COUNT and upstream.out_until != NEVER:
            upstream.suspect()
        if verdict.message:
            upstream.last_error = "%s %d: %s" % (outcome.value, verdict.status, verdict.message[:200])


# ==== 12. Balancing ====
# Who gets a request, and who waits for whom. The pool knows no connection and no head, only leases and verdicts; its
# clock, its chance and its timers are passed in.
#
# A request asks for a *lease*. The pool takes the seats that are ready (section 11) and that this round has not tried,
# and the *policy* chooses one; long conversations prefer the one whose prompt cache knows them. When none is ready, the
# request stands in the *line* of its model: first come, first served, and nobody behind a waiter for another model. The
# line is not polled. Every lease that ends, every answer and every known reopening runs `pump`, which hands out as many
# leases as there are places, to those who are first; so a place wakes one waiter and not all of them, and a request
# that comes meanwhile does not overtake the line. Whoever cannot be served in time is told at once when to come again,
# as waiting in vain costs a client its patience and others their place.


NOBODY: "set[Upstream]" = set()
SWEEP_S = 0.25  # how often the silent are looked at, while anything is unanswered
RESCUES_A_MINUTE, RESCUE_SHARE = 10, 0.05  # how many are always allowed, and of all calls: they may be billed twice
RESCUES_SAVED = 500.0  # what quiet hours may save up of that share


# -- conversations


# Providers keep the computed beginning of prompts for some minutes, and bill what they find there at a tenth to a half.
# Balancing alone sends the turns of a conversation everywhere, and hits fall from 95 % to nothing.


def thread_of(data: "dict[str, Any]") -> bytes:
    """What a conversation goes by: its prompt_cache_key, else its texts through the first of the user; b"" for none.

    So turns of one conversation are equal, and a common system prompt alone makes none: it would bring all requests of
    an application to one account. Of long texts a sample counts, as hashing 100 kB takes longer than choosing; spread,
    because templates have both ends in common.
    """
    import hashlib  # 2 ms that only long prompts need

    key, messages = data.get("prompt_cache_key"), data.get("messages")
    seen = hashlib.blake2b(digest_size=16)
    if isinstance(key, str) and key:
        seen.update(key.encode("utf-8", "replace"))
        return seen.digest()
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return b""
        content = message.get("content")
        for part in content if isinstance(content, list) else (content,):
            text = part.get("text") if isinstance(part, dict) else part
            text = text if isinstance(text, str) else ""
            if len(text) > AFFINE_CHARS:
                text = "%d %s" % (len(text), text[:: len(text) // AFFINE_CHARS])
            seen.update(text.encode("utf-8", "replace") + b"\0")
        if message.get("role") == "user":
            return seen.digest()
    return b""


@functools.lru_cache(maxsize=4096)  # the turns of a conversation ask again
def repulsion(thread: bytes, name: str) -> float:
    """A number above 0, exponentially distributed, that is always the same for these two."""
    import hashlib  # as above

    mixed = hashlib.blake2b(thread + name.encode(), digest_size=6).digest()
    return -math.log((int.from_bytes(mixed, "big") + 0.5) / 2**48)


def preferred(thread: bytes, seats: "list[Seat]", by: "Callable[[Seat], str]") -> "list[Seat]":
    """Those of `seats` that a conversation prefers, of all that have their name in common.

    Weighted rendezvous: each name gets its weight's share of all conversations, and when one comes or goes only its own
    move. A name that has more in flight than its share allows is passed over (consistent hashing with bounded loads).
    """
    # Not `hash % count`, where one controller less moves nearly all conversations; not a ring of points either, whose
    # shares are uneven with few controllers.
    named: "dict[str, list[Seat]]" = {}
    for seat in seats:
        named.setdefault(by(seat), []).append(seat)
    share = AFFINE_LOAD * (sum(s.upstream.in_flight for s in seats) + 1) / sum(s.upstream.weight for s in seats)
    best, most = seats, -1.0
    for name, own in named.items() if len(named) > 1 else ():
        weight = sum(seat.upstream.weight for seat in own)
        attraction = weight / repulsion(thread, name)
        if attraction > most and sum(seat.upstream.in_flight for seat in own) < math.ceil(share * weight):
            best, most = own, attraction
    return best


# -- policies: which one of the seats that could take a request. They are at least one and in the order of the
# configuration; `stream`: whether the request is one. Another policy is a function here, a line in POLICIES, and its
# name in the configuration's POOL_TYPES. What one has to remember stands in the Upstream.


def smooth_weighted(seats: "list[Seat]", stream: bool) -> Seat:
    """Smooth weighted round robin, the sequence of the Go original and of nginx: 5, 1, 1 gives a a b a c a a.

    Who cannot take part in a choice neither gains nor loses by it, so the shares of the others stay their weights'.
    """
    # Credits are added to those that can be chosen only. A weighted index into the list of those that are up, as other
    # proxies have it, shifts the shares of all when one is down.
    total, best, most = 0, seats[0], -sys.maxsize
    for seat in seats:
        upstream = seat.upstream
        weight = upstream.weight
        total += weight
        upstream.credit = credit = upstream.credit + weight
        if credit > most:
            best, most = seat, credit
    best.upstream.credit = most - total
    return best


def weighted_random(seats: "list[Seat]", stream: bool, chance: "Callable[[], float]" = random.random) -> Seat:
    """Each choice by chance, in proportion to the weights."""
    left = chance() * sum(seat.upstream.weight for seat in seats)
    for seat in seats:
        left -= seat.upstream.weight
        if left < 0:
            return seat
    return seats[-1]


def least_busy(seats: "list[Seat]", stream: bool) -> Seat:
    """The one with the fewest requests in flight for its weight; the earlier of equals."""
    return min(seats, key=lambda seat: seat.upstream.in_flight / seat.upstream.weight)


def first_listed(seats: "list[Seat]", stream: bool) -> Seat:
    """The first in the order of the configuration."""
    return seats[0]


def fastest(seats: "list[Seat]", stream: bool) -> Seat:
    """The one whose first byte came soonest of late; answers and streams are different kinds. Unknown ones first."""
    return min(seats, key=lambda seat: seat.upstream.first_byte_s[stream])


POLICIES: "dict[str, Callable[[list[Seat], bool], Seat]]" = {
    "balanced": smooth_weighted,
    "random": weighted_random,
    "least_busy": least_busy,
    "priority": first_listed,
    "fastest": fastest,
}
# Whose choice may give way to a conversation's preference: to the others it is their point where a request goes.
AFFINE_POLICIES = ("balanced", "random", "least_busy")


# -- the pool and its lines


class NoRoom(Exception):
    """Nobody has room within the time that a request may wait. `after_s`: when somebody will, as far as is known."""

    def __init__(self, why: str, after_s: float) -> None:
        super().__init__(why)
        self.why, self.after_s = why, after_s


class Waiter:
    """A request in the line: the controllers that may take it, and the future that hands it a lease."""

    def __init__(self, request: ApiRequest, seats: "list[Seat]", future: "asyncio.Future[Lease]") -> None:
        self.request, self.seats, self.future = request, seats, future


def turn_at(openings: "list[tuple[float, float]]", ahead: int, now: float) -> float:
    """When the request that has `ahead` others before it gets its turn.

    `openings`: when each controller has room, and its requests per second from then on. Each gives one place at its
    opening and then its rate, so the places until T are a piecewise linear sum that has to exceed `ahead`.
    """
    # From opening to opening: whether the places that the time between gives are enough, else one more and go on.
    speed = places = 0.0
    at = now
    for opens, rate in sorted((max(opens, now), min(rate, 1e6)) for opens, rate in openings if opens != NEVER):
        if speed and places + (opens - at) * speed >= ahead + 1:
            break
        places += (opens - at) * speed + 1.0
        at, speed = opens, speed + rate
        if places >= ahead + 1:
            return at
    return at + (ahead + 1 - places) / speed if speed else NEVER


class UpstreamPool:
    """The controllers, the policy that chooses among them, and the line of those who wait for room.

    `timers` is the loop, or what stands for it in a test: `time`, `call_at`, `create_future`. All is done within one
    turn of the loop, so nothing needs a lock; only `wait` waits.
    """

    def __init__(self, upstreams: "list[Upstream]", config: PoolConfig, timers: asyncio.AbstractEventLoop) -> None:
        self.timers = timers
        self.upstreams: "list[Upstream]" = []
        self.leaving: "list[Upstream]" = []  # gone from the configuration, with requests still under way
        self.serving: "dict[str, list[Seat]]" = {}
        self.lines: "dict[str, deque[Waiter]]" = {}  # none is empty
        self.alarm: "asyncio.TimerHandle | None" = None  # for the soonest reopening that somebody waits for
        self.sweeper: "asyncio.TimerHandle | None" = None
        self.answer_tokens: "dict[str, float]" = {}  # the running mean per model
        self.rescues, self.saved, self.calls = Window(RESCUES_A_MINUTE, WINDOW_S), 0.0, 0  # calls since the last rescue
        self.replace(upstreams, config)

    def replace(self, upstreams: "list[Upstream]", config: PoolConfig) -> None:
        """Goes on with these controllers; whoever waits now waits for them."""
        self.leaving = [one for one in (*self.leaving, *self.upstreams) if one.in_flight and one not in upstreams]
        self.upstreams, self.config, self.policy = upstreams, config, POLICIES[config.type]
        self.aliases, self.fallbacks = dict(config.aliases), dict(config.fallbacks)
        self.context_fallbacks = dict(config.context_fallbacks)
        self.detours = bool(self.aliases or self.fallbacks)
        self.affine_above = AFFINE_TOKENS if config.affinity and config.type in AFFINE_POLICIES else NEVER
        self.serving.clear()
        for waiter in [waiter for line in self.lines.values() for waiter in line if not waiter.future.done()]:
            try:
                waiter.seats = self.seats_for(waiter.request, waiter.request.model)
            except ProxyError as problem:
                waiter.future.set_exception(problem)
        if self.lines:
            self.pump()

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return sum(map(len, self.lines.values()))

    # -- choosing

    def seats(self, model: str) -> "list[Seat]":
        """The controllers that serve `model`. Raises ProxyError (404) when there is none."""
        found = self.serving.get(model)
        if found is None:
            # Requests about objects name no model: they may go anywhere.
            found = [upstream.seat(model) for upstream in self.upstreams if not model or upstream.serves(model)]
            if len(model) <= MODEL_NAME_CHARS:
                # Clients choose the names: neither their number nor their length may fill the memory.
                if len(self.serving) >= MEMORY_MODELS:
                    self.serving.pop(next(iter(self.serving)))
                self.serving[model] = found
        if not found:
            names = sorted({name for upstream in self.upstreams for name in upstream.config.models})
            told = model if len(model) <= 64 else model[:63] + "…", ", ".join(names)[:1000]
            message = "The model %r is served by no controller here. Served: %s." % told
            raise ProxyError(404, message, "model_not_found", param="model")
        return found

    def seats_for(self, request: ApiRequest, model: str) -> "list[Seat]":
        """The controllers that serve `model` and can take the request. Raises ProxyError (404)."""
        seats = self.seats(model)
        if request.path == CHAT_PATH:
            return seats
        seats = [seat for seat in seats if not seat.upstream.controller.chat_only]
        if request.pinned:
            seats = [seat for seat in seats if seat.upstream.name == request.pinned]
        if not seats:
            raise ProxyError(404, "No controller here can take %s for this model." % request.path[:200], "unknown_url")
        return seats

    def estimate(self, request: ApiRequest) -> None:
        """Sets what the request is taken to need, by its own limit or by what answers of its model had of late."""
        answer = request.max_tokens or self.answer_tokens.get(request.model, TOKENS_ANSWER)
        request.need = request.prompt_tokens + int(answer)

    def lease(
        self, request: ApiRequest, seats: "list[Seat]", tried: "set[Upstream]", now: float, resort: bool = True
    ) -> "Lease | None":
        """The right to send to one that was not tried and has room; None when there is none. Nobody jumps the line.

        `resort`: when all are out by health alone, one of them will do.
        """
        # Who would be served by a place that somebody in line waits for has to stand in line, too.
        line = self.lines.get(request.model)
        if line:
            seats, resort = self._unwanted(seats, line), False
        lease = self._grant(request, seats, tried, now)
        return lease if lease is not None or not resort else self._last_resort(request, seats, tried, now)

    def _grant(self, request: ApiRequest, seats: "list[Seat]", tried: "set[Upstream]", now: float) -> "Lease | None":
        need = float(request.need)  # as what it is compared with
        ready = [seat for seat in seats if seat.ready(need, now)]
        if tried:
            ready = [seat for seat in ready if seat.upstream not in tried]
        if not ready:
            return None
        if request.prompt_tokens > self.affine_above and len(ready) > 1:
            ready = self._affine(request, ready)
        return self._give(self.policy(ready, request.stream), request, now)

    def _affine(self, request: ApiRequest, ready: "list[Seat]") -> "list[Seat]":
        """The one that a long conversation prefers, whose prompt cache may know its beginning.

        It is left at once when it has no room or is ill: then it is not among `ready`. Caches belong to organisations,
        so the quota group comes first; within it the same choice again, for groups that are none.
        """
        # Computed once for all attempts, and only for long prompts: providers cache none below 1,024 tokens.
        thread = request.thread
        if thread is None:
            thread = request.thread = thread_of(request.data)
        if not thread:
            return ready
        group = preferred(thread, ready, lambda seat: seat.upstream.quota.name)
        return preferred(thread, group, lambda seat: seat.upstream.name)

    def _unwanted(self, seats: "list[Seat]", line: "deque[Waiter]") -> "list[Seat]":
        """Those of `seats` that nobody in `line` waits for: who tried one in vain waits for the others only."""
        for waiter in line:
            if len(waiter.seats) >= len(seats):  # mostly the first of them waits for all
                return []
            seats = [seat for seat in seats if seat not in waiter.seats]
        return seats

    def _last_resort(
        self, request: ApiRequest, seats: "list[Seat]", tried: "set[Upstream]", now: float
    ) -> "Lease | None":
        """The one due back first, when all are out by health alone: a sole controller passes its errors on.

        Only a 429's time, a configured limit and an exhausted quota refuse; where one of those ends in time, waiting is
        better.
        """
        # `soon`: when those who work have room, and those who are merely busy have time. Waiting for them is an answer,
        # asking one that is ill most likely none.
        left = [(one, one.room_at(request.need, now), one.well_at(now)) for one in seats if one.upstream not in tried]
        out = [(seat, well) for seat, room, well in left if not room]
        soon = [room for _, room, well in left if not well]
        soon += [well for seat, well in out if seat.upstream.is_busy(now)]
        if not out or (request.wait_s and any(at == NEVER or now < at <= now + request.wait_s for at in soon)):
            return None
        return self._give(min(out, key=lambda one: one[1])[0], request, now)

    def _give(self, seat: Seat, request: ApiRequest, now: float) -> Lease:
        """A lease: a call earns a share of a rescue, and somebody has to look whether it is answered."""
        self.calls += 1
        if self.sweeper is None:
            self.sweeper = self.timers.call_at(now + SWEEP_S, self._sweep)
        return Lease(seat, request.need, request.stream, now)

    # -- what attempts came to

    def settle(self, lease: Lease, verdict: Verdict) -> None:
        """The attempt is over: the controller learns, and whoever waits may have room now. A second time does nothing.

        Also for an error in a stream whose answer had begun: it counts as its verdict says, like one before.
        """
        # A rescue that is dropped and a client that leaves may both come here.
        if lease not in lease.ledger.open:
            return
        now, upstream = self.timers.time(), lease.upstream
        was_out = upstream.out_why
        lease.release(verdict, now)
        if verdict is not GOOD:
            self._learn(lease, verdict, now)
        if upstream.out_why != was_out:
            log.info("%s: %s", upstream.name, "out: " + upstream.out_why if upstream.out_why else "back")
        if self.lines:
            self.pump()

    def _learn(self, lease: Lease, verdict: Verdict, now: float) -> None:
        """What an outcome means for the quota and for the model (DESIGN 3, the table's third column)."""
        quota = lease.upstream.quota
        if verdict.outcome is Outcome.RATE:
            self._close(lease, verdict, now)
        elif verdict.outcome is Outcome.QUOTA:
            if quota.parked_until <= now:  # else it was under way already
                quota.park(now)
                log.warning("%s: quota exhausted, parked for %.0f s", quota.name, quota.park_s)
        elif verdict.outcome is Outcome.MISSING:
            lease.seat.lacks_until = now + LACKS_S

    def _close(self, lease: Lease, verdict: Verdict, now: float) -> None:
        """A 429: the model's ledger closes, under the name that the error gave it.

        All seats of the quota that mean this model get the ledger of that name, whatever clients call it.
        """
        seat, quota = lease.seat, lease.upstream.quota
        if verdict.bucket and verdict.bucket != seat.ledger.name:
            quota.rename(seat.limited_as, verdict.bucket)
            for upstream in self.upstreams:
                for one in upstream.seats.values() if upstream.quota is quota else ():
                    if one.limited_as == seat.limited_as:
                        one.ledger = quota.ledger(one.limited_as)
        under_way = lease.sent_at <= seat.ledger.closed_at
        if not under_way and lease.was_early(verdict):
            seat.ledger.halve_burst()
        seat.ledger.close(verdict, lease.need, now, under_way)

    def answered(self, lease: Lease, good: bool, now: float) -> None:
        """A reply began to make sense: its controller is alive, and whoever waits for that may go on."""
        lease.answered(now, good)
        if self.lines:
            self.pump()

    def used(self, lease: Lease, model: str, total: int, answer: int, told: bool) -> None:
        """An answer said what it cost; `told`: the reply said what is left, which counts more."""
        if answer:
            mean = self.answer_tokens.get(model)
            if mean is None and len(self.answer_tokens) >= MEMORY_MODELS:
                self.answer_tokens.clear()
            self.answer_tokens[model] = answer if mean is None else mean + (answer - mean) / 16
        if total and not told:
            lease.correct(total, self.timers.time())

    # -- the line

    async def wait(self, request: ApiRequest, seats: "list[Seat]", tried: "set[Upstream]") -> "Lease | None":
        """Stands in line until one of `seats` has room for `request`.

        None when waiting is no use: no controller that failed or was not tried comes back by time. Raises NoRoom.
        """
        # Of those that were tried only who is full or busy is waited for: who failed would fail again. With none of
        # these, and nobody in line, all that is left was tried, and its answer is the answer.
        now = self.timers.time()
        busy = [seat for seat in seats if seat.room_at(request.need, now) > now or seat.upstream.is_busy(now)]
        seats = [seat for seat in seats if seat.upstream not in tried or seat in busy]
        line = self.lines.get(request.model, ())
        if not seats or not (busy or line):
            return None
        self._check_line(request, seats, len(line), now)
        waiter = Waiter(request, seats, self.timers.create_future())
        self.lines.setdefault(request.model, deque()).append(waiter)
        handle = self.timers.call_at(now + request.wait_s, self._give_up, waiter)
        self.pump()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled():  # granted in the turn in which the client left
                self.settle(waiter.future.result(), Verdict(Outcome.GONE))
            raise
        finally:
            handle.cancel()
            self._leave(waiter)
            request.wait_s = max(0.0, request.wait_s - (self.timers.time() - now))

    def pump(self) -> None:
        """Hands leases to those who are first in their lines, one for each free place, and sets the next alarm."""
        now, soonest = self.timers.time(), NEVER
        for model, line in list(self.lines.items()):
            blocked: "list[Seat]" = []  # those that somebody further ahead waits for
            for waiter in list(line):
                seats = [seat for seat in waiter.seats if seat not in blocked] if blocked else waiter.seats
                if not waiter.future.done():
                    lease = self._grant(waiter.request, seats, NOBODY, now) if seats else None
                    if lease is None:
                        # What it waits for is closed to those behind it, also a seat that has room for a smaller one:
                        # else small requests would pass a large one for ever.
                        soonest = min([soonest, *(seat.opens_at(waiter.request.need, now) for seat in seats)])
                        blocked += seats
                        if len(waiter.seats) >= len(self.serving.get(model, ())):
                            break  # whoever comes behind waits for nobody else
                        continue
                    waiter.future.set_result(lease)
                line.remove(waiter)
            if not line:
                del self.lines[model]
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None
        # Where nobody knows when, the end of another request will come by here. At least a millisecond, as a timer may
        # fire a moment before its time.
        if soonest != NEVER:
            self.alarm = self.timers.call_at(max(soonest, now + 0.001), self.pump)

    def _check_line(self, request: ApiRequest, seats: "list[Seat]", ahead: int, now: float) -> None:
        """Refuses whom waiting would not help, at once. Raises NoRoom.

        Half of the line is the most that one client key may hold, or one client's burst would be everybody's refusal.
        """
        # A queue without an end date hangs its clients for hours behind one long reset, and a 429 without a Retry-After
        # makes them guess: so the end is computed, and told.
        openings = [(seat.opens_at(request.need, now), seat.ledger.rate(request.need)) for seat in seats]
        known = all(opens != NEVER for opens, _ in openings)  # else another request's end may come at any time
        after_s = turn_at(openings, ahead, now) - now if known else NEVER
        waiting, most = self.waiting, self.config.max_queue
        if waiting >= most:
            raise NoRoom("the line is full", after_s)
        if request.key and 2 * waiting >= most:
            own = sum(waiter.request.key == request.key for line in self.lines.values() for waiter in line)
            if 2 * own >= most:
                raise NoRoom("this key holds half of the line", after_s)
        if not request.wait_s or (known and after_s > request.wait_s):
            raise NoRoom("no controller has room in time", after_s)

    def _give_up(self, waiter: Waiter) -> None:
        if not waiter.future.done():
            after_s = self.reopens_after(waiter.seats, waiter.request.need)
            waiter.future.set_exception(NoRoom("no controller had room in time", after_s))

    def _leave(self, waiter: Waiter) -> None:
        """Takes a waiter that got nothing out of its line; those behind it may be first now."""
        line = self.lines.get(waiter.request.model, ())
        if waiter in line:
            self.lines[waiter.request.model].remove(waiter)
            self.pump()

    # -- the silent

    def _sweep(self) -> None:
        """Looks for controllers that fell silent and for requests stuck in them; runs while anything is under way."""
        now, self.sweeper = self.timers.time(), None
        # Who is connecting may be silent later; and one that hangs may have been removed for that.
        for upstream in [one for one in (*self.upstreams, *self.leaving) if one.in_flight]:
            self.sweeper = self.sweeper or self.timers.call_at(now + SWEEP_S, self._sweep)
            if upstream.is_silent(now):
                # A probe knows already that something is wrong: it need not wait for as long as the others.
                if upstream.probe is not None:
                    upstream.probe.urgent = True
                upstream.suspect()
                log.warning("%s: silent, gets no new requests until it answers", upstream.name)
            for lease in list(upstream.unanswered):
                if lease.stuck is not None and (lease.urgent or self._is_stuck(lease, now)):
                    self._rescue(lease, lease.stuck, now)

    def _is_stuck(self, lease: Lease, now: float) -> bool:
        """Whether a request has been silent for so long that another controller should be asked too."""
        silent_s, after_s = now - lease.sent_at, self.config.rescue_after
        if not (lease.stream or lease.upstream.out_why == "suspect"):  # a whole answer may just be long
            return False
        if after_s is not None:
            return 0 < after_s < silent_s
        known = self.serving.get(lease.seat.model, [])
        return silent_s > RESCUE_MIN_S and silent_s > rescue_s(lease.seat, known, lease.stream)

    def _rescue(self, lease: Lease, ask_another: "Callable[[], bool]", now: float) -> None:
        """Asks the request's owner for a second attempt, within the budget.

        It is urgent from now on: should the rescuer fail, the next one is asked at once, until something is heard.
        """
        lease.urgent = True
        # Once for all calls since the last time, as counting is all that a call should pay.
        self.saved, self.calls = min(self.saved + RESCUE_SHARE * self.calls, RESCUES_SAVED), 0
        allowed = self.saved >= 1.0 or not self.rescues.opens_at(1.0, now)
        if allowed and self.config.rescue_after != 0 and ask_another():
            self.saved = max(0.0, self.saved - 1.0)
            self.rescues.sent(self.rescues.add(1.0), now)

    # -- what is known

    def configured_models(self) -> "list[str]":
        """The model names that the configuration spells out, sorted."""
        names = {name for upstream in self.upstreams for name in upstream.config.models}
        names |= {name for upstream in self.upstreams for name, _ in upstream.config.model_map}
        names |= self.fallbacks.keys()
        return sorted(name for name in names if "*" not in name and "?" not in name)

    def is_served(self, model: str) -> bool:
        """Whether requests for `model` have somebody to go to."""
        return model in self.fallbacks or any(upstream.serves(model) for upstream in self.upstreams)

    def reopens_after(self, seats: "list[Seat]", need: float) -> float:
        """Seconds until somebody has room, as far as is known; NEVER where nothing is."""
        now = self.timers.time()
        return max(0.0, min(seat.opens_at(need, now) for seat in seats) - now)

    def close(self) -> None:
        """Stops the timers."""
        for handle in (self.alarm, self.sweeper):
            if handle is not None:
                handle.cancel()
        self.alarm = self.sweeper = None


class KeyGate:
    """What one client key may still send: its own rpm, tpm and concurrency."""

    def __init__(self, key: ClientKey) -> None:
        self.key, self.quota = key, Quota(key.name, key.limits)

    def enter(self, need: float, now: float) -> float:
        """Counts a request and lets it pass (0), or says in how many seconds it may come again."""
        if self.quota.in_flight >= self.quota.most:
            return KEY_BUSY_S
        # One ledger for all models: what a client may spend is about money, not about a model's capacity.
        ledger = self.quota.ledger("")
        opens = ledger.opens_at(need, now)
        if opens > now:
            return opens - now
        self.quota.in_flight += 1
        ledger.take(1.0, need)
        for by_tokens, window in ledger.windows:
            window.sent(window.add(need if by_tokens else 1.0), now)
        return 0.0

    def leave(self) -> None:
        """The request is over."""
        self.quota.in_flight -= 1


# -- what /status?verbose=1 shows: no secret, times as seconds from now


def describe_ledger(ledger: Ledger, now: float) -> "dict[str, Any]":
    """What is known of one model's quota."""
    closed_until = max((until for _, until in ledger.closed), default=0.0)
    found: "dict[str, Any]" = {"closed_for_s": round(max(0.0, closed_until - now), 3)}
    for name, bucket in (("requests", ledger.requests), ("tokens", ledger.tokens)):
        if bucket.limit:
            left = round(bucket.level_at(now), 1)
            found[name] = {"limit": bucket.limit, "left": left, "per_s": round(bucket.rate, 3)}
    for by_tokens, window in ledger.windows:
        if not window.rate:
            found["tpm" if by_tokens else "rpm"] = {"limit": window.limit, "taken": round(window.total, 1)}
    return found


def describe_upstream(upstream: Upstream, now: float) -> "dict[str, Any]":
    """One controller's state."""
    quota = upstream.quota
    state, until = "open", 0.0
    if quota.parked_until > now:
        state, until = "parked", quota.parked_until
    elif upstream.out_until > now:
        state, until = upstream.out_why, upstream.out_until
    elif upstream.recovering or quota.park_s:
        state = "half-open"
    return {
        "name": upstream.name,
        "type": upstream.config.type,
        "state": state,
        "for_s": None if until == NEVER else round(max(0.0, until - now), 3),
        "quota": quota.name,
        "in_flight": upstream.in_flight,
        "requests": upstream.requests,
        "failures": upstream.failures,
        "last_error": upstream.last_error or None,
        "first_byte_ms": dict(zip(("whole", "stream"), (round(s * 1e3) for s in upstream.first_byte_s), strict=True)),
        "ledger": {name: describe_ledger(ledger, now) for name, ledger in list(quota.ledgers.items())},
        "lacks": [seat.model for seat in upstream.seats.values() if seat.lacks_until > now],
    }


def describe_pool(pool: UpstreamPool, now: float) -> "dict[str, Any]":
    """The pool's state."""
    return {
        "policy": pool.config.type,
        "waiting": pool.waiting,
        "controllers": [describe_upstream(upstream, now) for upstream in pool.upstreams],
    }


# ==== 13. Relay ====
# One request, attempt after attempt, until an answer is committed to the client; then every byte at once. The first
# byte to the client is the point of no return: before it every failure may move on, after it a cut is told honestly.
#
#   run: for each model that may stand in, for each controller that has room (or after a wait in line):
#     _attempt: _ask (send, read the head and as much as decides) --> Refused or UpstreamError: _judge, the next one
#                                                                 --> a Reply: _deliver, and nothing else is tried
#   _fail: nobody answered; the refusal that tells most, or an error of our own.
#
# A rescue is a second _ask beside one that has been silent for too long; the first real answer of the two wins.


class Sink(Outlet, Protocol):
    """Where an answer goes: the client's connection. `open` writes the head, `end` what its framing needs last.

    `failed`: the first event of a stream, of those that passed, that tells of an error.
    """

    failed: bytes

    def whole(self, status: int, fields: bytes, body: bytes) -> bool:
        """Writes an answer of known length, head and body in one piece. As `push`, but `drain` waits."""

    async def drain(self) -> None:
        """Waits until the client takes more."""

    def open(self, status: int, fields: bytes, length: "int | None", first: bytes) -> bool:
        """Begins an answer that is written as it comes, with its first bytes; `length` None: not known. As `push`."""

    def end(self) -> None:
        """Ends the body as its framing asks."""

    def cut(self, last: bytes) -> None:
        """Writes `last`, then closes without the end that would make the answer look whole."""


class Reply:
    """What an upstream sent, as far as it decides: its exchange, and what was read of the body.

    `at`: when what decides was read. `whole`: `held` is all of the body. `learned`: its head's word on the quota was
    taken; `told`: it said how many tokens are left. `source`: of a refusal, whose it was (the record's `controller` and
    `mapped`). `rate_codes`: see `AccountConfig`.
    """

    __slots__ = "at exchange head held learned rate_codes source stream told verdict whole".split()

    def __init__(self, exchange: Exchange, now: float, rate_codes: "tuple[str, ...]") -> None:
        self.exchange, self.head = exchange, exchange.head
        self.at, self.rate_codes = now, rate_codes
        self.held, self.verdict = b"", GOOD
        self.whole = self.stream = self.told = self.learned = False
        self.source = "", b""


class Refused(Exception):
    """An upstream answered, but not with what the client asked for; `reply` and its `verdict` say with what.

    It is whole by then: its connection has been given back or closed, and what can be shown of it is in `reply.held`.
    """

    def __init__(self, reply: Reply, verdict: Verdict) -> None:
        super().__init__(reply.head.status)
        self.reply, reply.verdict = reply, verdict


class Rescued(Exception):
    """Another controller answered first; the attempt that hears this is given up."""


class HeldLongEnough(Exception):
    """The first real event did not come within HOLD_S; what there is goes out."""


SPACED = bytes.maketrans(b"\r\n", b"  ")  # makes one line of a JSON text
LEFT = Verdict(Outcome.GONE)  # what an attempt came to that nobody waits for any more


def model_field(request: ApiRequest, seat: Seat) -> bytes:
    """Which model was asked for and which one was sent for; all of these names are the configuration's."""
    # Only such a line tells a gateway that maps from one that is broken. A name that the client made up is never shown:
    # without a map, an alias or a fallback there is no line.
    names = (request.asked or request.model, seat.mapped or request.model)
    return b"x-apiserver-model: %b -> %b\r\n" % tuple(name.encode("ascii", "backslashreplace") for name in names)


def retry_fields(after_s: float) -> bytes:
    """When to come again: whole seconds for all, milliseconds for the official SDKs; nothing where nobody knows."""
    if after_s == NEVER:
        return b"x-should-retry: true\r\n"
    exact = max(after_s, 0.001)  # the SDKs take 0 for no answer, and come again by their own backoff of 0.5 s
    return b"Retry-After: %d\r\nretry-after-ms: %d\r\n" % (math.ceil(exact), math.ceil(exact * 1e3))


def forget_frames(error: BaseException) -> None:
    """Drops the tracebacks of an error that is kept: their frames hold whoever keeps it, and the garbage collector
    would have to come for all of them."""
    for one in (error, error.__cause__, error.__context__):
        if one is not None:
            one.__traceback__ = None


def more_useful(one: "Reply | None", other: Reply) -> Reply:
    """The one of two refusals that tells a client more; the later of equals, as it is the truer."""
    if one is None:
        return other
    # A 429 of one account beside the 401 of another: the client can do something about the first only.
    better = USEFULNESS.index(other.verdict.outcome) <= USEFULNESS.index(one.verdict.outcome)
    return other if better else one


def is_packed(index: Index) -> bool:
    """Whether a reply came compressed, which nobody had asked for."""
    return index.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b"")


def inflate(data: bytes, coding: bytes) -> "bytes | None":
    """The plain bytes of a content coding (RFC 9110, 8.4.1), if they are whole and at most HOLD_BYTES."""
    import zlib  # 1 ms that only such errors need

    # What is called deflate should have a zlib header, and from some servers has none.
    for window_bits in {b"gzip": (31,), b"x-gzip": (31,), b"deflate": (15, -15)}.get(coding, ()):
        engine = zlib.decompressobj(window_bits)
        try:
            plain = engine.decompress(data, HOLD_BYTES)
        except zlib.error:
            continue
        return plain if engine.eof and not engine.unused_data else None  # half an error would be no JSON
    return None


def unpack_error(reply: Reply) -> None:
    """Makes a compressed error body plain, so that it can be judged and scrubbed; identity was what had been asked for.

    What cannot be unpacked, or only to more than HOLD_BYTES (a bomb), gives way to an error of our own.
    """
    head = reply.head
    if not is_packed(head.index):
        return
    coding = head.index[b"content-encoding"].strip().lower()
    plain, lines = inflate(reply.held, coding), without(head.lines, (b"content-encoding",))
    if plain is None:
        message = "The upstream's error, of status %d, came in a compression that nobody asked for." % head.status
        plain = compact_json(error_object(message, "server_error", "upstream_bad_reply"))
        lines = without(lines, (b"content-type",)) + b"Content-Type: application/json\r\n"
    reply.head, reply.held = ResponseHead(head.status, head.minor, head.index, lines), plain


def refused_in_200(reply: Reply, event: bytes) -> Refused:
    """A 200 whose body is the error of `event`, as if it had come with the status that belongs to it."""
    verdict = judge_first_event(event, reply.rate_codes)
    # Nothing else of the head fits an error: neither the stream's type nor its framing.
    reply.head = ResponseHead(verdict.status, 1, reply.head.index, b"Content-Type: application/json\r\n")
    return Refused(reply, verdict)


def give_up(asked: "asyncio.Task[Reply]") -> None:
    """Ends a second attempt that nobody waits for any more, also one whose answer has just come."""
    if not (asked.cancel() or asked.cancelled() or asked.exception()):
        asked.result().exchange.abort()


@functools.lru_cache(maxsize=1024)
def way_fields(controller: str, attempts: int, wait_ms: int) -> bytes:
    """Our own lines about the way of an answer; nearly all come from one of a few, at once."""
    asked = b"x-apiserver-controller: %b\r\n" % controller.encode() if controller else b""  # else the line gave up
    return b"%bx-apiserver-attempts: %d\r\nx-apiserver-wait-ms: %d\r\n" % (asked, attempts, wait_ms)


def keep(memory: "dict[Any, Any]", key: "Any", value: "Any", most: int) -> None:
    """Puts something into a memory of at most this many, the newest last; the oldest is forgotten."""
    memory.pop(key, None)
    if len(memory) >= most:
        del memory[next(iter(memory))]
    memory[key] = value


class Trip:
    """One request on its way: whom it may ask, whom it asked in this round, and what came of it.

    `tried`: this round's, without those that were full; a new round begins when waiting has reopened somebody. `best`,
    `failure`, `line`, `unfit`: what could be told when nobody answers, a refusal of an upstream, the last error of an
    attempt, why the line gave up, and what no account has words for; `last`: the last attempt's refusal, if it was one.
    `spare`: whether other models may stand in for its own; `models`: those that are left, once the first did. `rescue`:
    the second attempt beside the one that is silent.
    """

    __slots__ = "best failure last line models record request rescue seats spare tried unfit".split()

    def __init__(self, request: ApiRequest, record: AccessRecord) -> None:
        self.request, self.record = request, record
        self.seats: "list[Seat]" = []
        self.tried: "set[Upstream]" = set()
        self.best: "Reply | None" = None
        self.last: "Reply | None" = None
        self.failure: "UpstreamError | None" = None
        self.line: "NoRoom | None" = None
        self.unfit: "ProxyError | None" = None
        self.models: "Iterator[str] | None" = None
        self.spare = False
        self.rescue: "tuple[Lease, asyncio.Task[Reply]] | None" = None

    def has_others(self) -> bool:
        """Whether there is somebody to fail over to."""
        request = self.request
        # What leaves traces, or cannot be sent twice, has nobody: then nothing is held back in vain, nor asked twice.
        if request.stateful or request.upload is not None:
            return False
        return self.spare or len(self.seats) - len(self.tried) > 1

    @property
    def rescued(self) -> bool:
        """Whether another controller has been asked too, and has not said no."""
        return self.rescue is not None

    def name(self, lease: Lease) -> None:
        """Notes whose the answer is, and which model it was asked for."""
        record, request, mapped = self.record, self.request, lease.seat.mapped
        record.controller = lease.upstream.name
        record.mapped = model_field(request, lease.seat) if mapped is not None or request.asked else b""

    def note(self, lease: Lease, verdict: Verdict, now: float) -> None:
        """Keeps an attempt that brought no answer."""
        self.name(lease)
        self.record.outcomes.append((lease.upstream.name, verdict.outcome.value, now - lease.since))
        # Who is full has room again at a time that its ledger knows, which may come while others are asked.
        if verdict.outcome is not Outcome.RATE:
            self.tried.add(lease.upstream)
        if verdict.outcome is Outcome.LARGE:  # only who is known to take that much
            self.seats = [seat for seat in self.seats if seat.ledger.largest() >= verdict.requested]
            self.tried &= {seat.upstream for seat in self.seats}  # `has_others` counts
        elif verdict.outcome is Outcome.UNFIT:  # waiting for it would be no use either
            self.seats = [seat for seat in self.seats if seat.upstream is not lease.upstream]
            self.tried.discard(lease.upstream)


class Meter:
    """Passes bytes on, and remembers the last of them, where `usage` stands. See `Outlet`.

    It stands between only where there is some: in a chat where the client asked for it by `stream_options`, and always
    at the end of a response.
    """

    __slots__ = ("sink", "tail")

    def __init__(self, sink: Sink, first: bytes) -> None:
        self.sink, self.tail = sink, first[-USAGE_BYTES:]

    def push(self, data: bytes) -> bool:
        """See `Outlet`."""
        self.tail = (self.tail + data)[-USAGE_BYTES:]
        return self.sink.push(data)

    def when_ready(self, call: "Callable[[], None]") -> None:
        """See `Outlet`."""
        self.sink.when_ready(call)


class Relay:
    """Carries requests to the pool's controllers and their answers back."""

    def __init__(self, pool: UpstreamPool, connections: ConnectionPool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self.connections, self.loop = pool, connections, loop
        # Object id to the name of the controller that made it. Ids carry nothing of their account, so nothing but the
        # memory of this process tells; after a restart reads ask everybody in turn (`seeks`).
        self.makers: "dict[str, str]" = {}

    def remember(self, made: str, name: str) -> None:
        """An object lives in the account that made it; the oldest are forgotten."""
        if made:
            keep(self.makers, made, name, OBJECTS_KNOWN)

    async def run(self, request: ApiRequest, sink: Sink, record: AccessRecord) -> None:
        """Answers `request` into `sink`. Raises ProxyError or UpstreamError where no upstream answer can be shown."""
        # Two loops: over models that may stand in, and over controllers. A controller is asked once in a round, so that
        # the inner one ends; a lease from the line begins a new round, and the wait itself is bounded.
        pool, now, verdict = self.pool, record.since, LEFT
        trip = Trip(request, record)
        if pool.detours or request.path != CHAT_PATH:
            self._set_out(trip)
        else:
            trip.seats = pool.seats(request.model)
        while True:
            pool.estimate(request)
            try:
                while True:
                    if trip.rescue is None:
                        lease, asked = pool.lease(request, trip.seats, trip.tried, now), None
                        if lease is None:
                            lease = await self._stand_in_line(trip)
                            if lease is None:
                                break
                    else:  # the first attempt failed while a rescue is out: that is the next one
                        (lease, asked), trip.rescue = trip.rescue, None
                    verdict = await self._attempt(lease, asked, trip, sink)
                    if verdict is GOOD:
                        return
                    now = self.loop.time()
                    trip.note(lease, verdict, now)
                    self._keep_up(trip)
                    if not trip.rescued and not may_retry(verdict, request):
                        # It may have run, and made something: whatever others said before, this is the answer. A 429
                        # from before it would have the client make that a second time.
                        trip.best, trip.line = trip.last, None
                        break
            finally:
                self._drop_rescue(trip)
            if not self._turn(trip, verdict):
                break
            now = self.loop.time()
        await self._fail(trip, sink)

    # -- which model

    def _set_out(self, trip: Trip) -> None:
        """Finds who serves the model. Raises ProxyError (404) when nobody does and no other may stand in."""
        pool, request = self.pool, trip.request
        if request.model in pool.aliases:
            request.substitute(pool.aliases[request.model])
        trip.spare = request.model in pool.fallbacks
        try:
            trip.seats = pool.seats_for(request, request.model)
        except ProxyError as problem:
            if not trip.spare:
                raise
            trip.unfit = problem

    def _turn(self, trip: Trip, verdict: Verdict) -> bool:
        """Turns a trip that came to nothing to the next model that may stand in; whether there is one.

        `verdict`: what the last attempt came to. A client's mistake stays one with any model, unless the prompt is too
        long for this one; what may be running already is not asked for twice.
        """
        pool, request, best = self.pool, trip.request, trip.best
        if request.upload is not None and request.upload.tapped:
            return False  # what has passed through cannot be sent to another
        long = verdict.outcome is Outcome.CLIENT and best is not None and is_too_long(best.held)
        if not (long or verdict is LEFT or may_retry(verdict, request)):
            return False
        if trip.models is None:
            known = pool.context_fallbacks if long else pool.fallbacks
            trip.models = iter(known.get(request.model, ()))
        for model in trip.models:
            try:
                trip.seats = pool.seats_for(request, model)
            except ProxyError:
                continue  # configured, but served by nobody
            request.substitute(model)
            trip.tried.clear()
            return True
        return False

    def _keep_up(self, trip: Trip) -> None:
        """Sees to it that after a reload nobody is asked who is not configured any more, or as it was before."""
        known = self.pool.upstreams
        if not all(seat.upstream in known for seat in trip.seats):
            try:
                trip.seats = self.pool.seats_for(trip.request, trip.request.model)
            except ProxyError:
                trip.seats = []
            trip.tried &= {seat.upstream for seat in trip.seats}  # `has_others` counts

    async def _stand_in_line(self, trip: Trip) -> "Lease | None":
        """A lease from the line, which begins a new round; None when waiting is no use."""
        wait_s = trip.request.wait_s  # which becomes less by what is waited, and only by that
        try:
            lease = await self.pool.wait(trip.request, trip.seats, trip.tried) if trip.seats else None
        except NoRoom as problem:
            trip.line, lease = problem, None
            forget_frames(problem)
        finally:  # a client that leaves while it waits has waited too, and the access line says how long
            trip.record.waited_s += wait_s - trip.request.wait_s
        if lease is not None:
            trip.tried.clear()
        return lease

    # -- one attempt

    async def _attempt(
        self, lease: Lease, asked: "asyncio.Task[Reply] | None", trip: Trip, sink: Sink
    ) -> Verdict:
        """One request to one controller, already `asked` in a rescue; what came of it, OK once it was delivered."""
        verdict = LEFT
        try:
            reply = await (self._ask(lease, trip) if asked is None else asked)
            if trip.rescue is not None:
                self._drop_rescue(trip)
            if not reply.whole or reply.stream:
                self.pool.answered(lease, True, reply.at)
                verdict = await self._pass_on(reply, lease, trip, sink)
            else:
                welcome = sink.whole(reply.head.status, self._commit(reply, lease, trip), reply.held)
                # What is learned of it can wait until the client has its answer.
                self._learn(reply, lease)
                self.pool.answered(lease, True, reply.at)
                self._take_usage(reply, lease, trip.request)
                if not welcome:
                    await sink.drain()
                verdict = GOOD
            return GOOD  # whatever became of it: it was the client's answer, and no other may follow
        except (Refused, Rescued, UpstreamError, Untranslatable) as problem:
            verdict = self._judge(problem, lease, trip)
        finally:
            if verdict is LEFT:  # cancelled: the client is gone, which is nobody's fault
                outcomes = trip.record.outcomes
                if outcomes and outcomes[-1][1] == "ok":  # in the midst of its answer, which is the same attempt
                    outcomes.pop()
                outcomes.append((lease.upstream.name, "gone", self.loop.time() - lease.since))
                if asked is not None:
                    give_up(asked)
            self.pool.settle(lease, verdict)
        return verdict

    def _judge(
        self, problem: "Refused | Rescued | UpstreamError | Untranslatable", lease: Lease, trip: Trip
    ) -> Verdict:
        """What an attempt came to that brought no answer; keeps what could be shown of it."""
        trip.last = None
        if isinstance(problem, Rescued):
            return Verdict(Outcome.LOST)
        if isinstance(problem, Untranslatable):
            trip.unfit = problem
            return Verdict(Outcome.UNFIT)
        if isinstance(problem, UpstreamError):
            trip.failure = problem
            forget_frames(problem)
            return judge_error(problem)
        trip.name(lease)
        problem.reply.source = trip.record.controller, trip.record.mapped
        self.pool.answered(lease, False, self.loop.time())
        trip.last, trip.best = problem.reply, more_useful(trip.best, problem.reply)
        return problem.reply.verdict

    async def _ask(self, lease: Lease, trip: Trip) -> Reply:
        """Sends the request and reads as much as decides whether it is the answer. Raises Refused or UpstreamError."""
        request, others = trip.request, trip.has_others()
        exchange = lease.upstream.controller.exchange(request, self.connections, lease.sent)
        if others:
            lease.stuck = functools.partial(self._rescue, trip, lease, exchange)
        try:
            await exchange.start()
            now = self.loop.time()
            reply = Reply(exchange, now, lease.upstream.controller.rate_codes)
            if exchange.complete and reply.head.status < 300 and not request.stream:
                reply.held, reply.whole = exchange.take(), True
            else:
                self._learn(reply, lease)
                await self._collect(reply, lease, others, request)
            said = reply.held.lstrip()  # DeepSeek sends blank lines while a request waits
            if others and reply.whole and not said and reply.head.status < 300 and request.path == CHAT_PATH:
                raise UpstreamClosed("the upstream's answer is empty")
            # An error in a 200 has the word as its first key; to parse each answer would cost as much as all the rest.
            if reply.head.status >= 300 or said.find(b'"error"', 0, 24) >= 0:
                self._learn(reply, lease)
                self._check_refusal(reply, request)
        except BaseException:  # a cancellation too: the upstream has to hear at once that nobody listens
            exchange.abort()
            raise
        finally:
            lease.stuck = None  # which has the lease in it
        return reply

    def _learn(self, reply: Reply, lease: Lease) -> None:
        """Takes what a reply's head says of its quota: a 429's own figures correct the ledger as well as a 200's."""
        index = reply.head.index
        if not (reply.learned or REMAINING_NAMES.isdisjoint(index)):
            reply.learned = True
            requests, tokens = allowance(index, REQUEST_NAMES, time.time), allowance(index, TOKEN_NAMES, time.time)
            if requests is not None or tokens is not None:
                lease.learn(requests, tokens, reply.at)
                reply.told = tokens is not None

    def _check_refusal(self, reply: Reply, request: ApiRequest) -> None:
        """Tells an answer from an error. Raises Refused."""
        head = reply.head
        if head.status >= 300:
            reply.exchange.finish()
            if b"content-encoding" in head.index and reply.held:
                unpack_error(reply)
            stateful, rate_codes = request.stateful, reply.rate_codes
            verdict = judge_reply(head.status, head.index, reply.held, time.time(), stateful, rate_codes)
            if not request.inference:
                verdict.outcome = judge_of_object(verdict)
            raise Refused(reply, verdict)
        event = b"data: " + reply.held.translate(SPACED)
        if not reply.stream and judge_event(event) is EventKind.ERROR:  # in a 200, as OpenRouter may send
            reply.exchange.finish()
            raise refused_in_200(reply, event)

    async def _collect(self, reply: Reply, lease: Lease, others: bool, request: ApiRequest) -> None:
        """Reads a stream up to its first real event, speech up to its first byte, all else up to its end or to
        WHOLE_BYTES."""
        head = reply.head
        kind = head.index.get(b"content-type", b"").lower()
        # Some servers give no type, or text/plain, to what they stream: collected, it would come all at once.
        untyped = request.stream and request.path == CHAT_PATH and b"json" not in kind
        if head.status < 300 and (untyped or kind[:17] == b"text/event-stream"):
            reply.stream = True
            plain = not is_packed(head.index)  # else no event can be told from another
            await self._hold(reply, others and plain, request.stateful and plain)
            reply.at = self.loop.time()
            return
        # Silence ends with the head; how long the body takes is up to the length of the answer, and no suspicion.
        lease.heard(reply.at)
        # Speech is played while it is made (OpenAI's guide to it): from its first byte on it goes out.
        most = 0 if kind[:6] == b"audio/" and head.status < 300 else WHOLE_BYTES
        pieces, size = [], 0
        while size <= most:
            piece = await reply.exchange.read()
            if not piece:
                reply.whole = True
                break
            pieces.append(piece)
            size += len(piece)
        reply.held = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _hold(self, reply: Reply, others: bool, stateful: bool) -> None:
        """Reads a stream up to its first real event; at once through when there is nothing to fail over to.

        At once is behind the id of what is made in the account, as `_commit` remembers where that lives: a read may end
        before it.
        """
        # Upstreams that are about to fail often say 200 first: Azure an empty-choices chunk, others comments while a
        # queue lasts (OpenRouter, DeepSeek), the Responses API three events before the first word.
        exchange, splitter = reply.exchange, EventSplitter()
        timer: "asyncio.TimerHandle | None" = None
        try:
            while True:
                piece = await exchange.read()
                reply.held = reply.held + piece if reply.held else piece
                if not piece:
                    reply.whole = True
                    if reply.held.lstrip()[:1] == b"{":  # no stream, whatever its type says
                        reply.stream = False
                        return
                    # Some end their last event with their connection.
                    if not reply.held or (others and not self._decides(reply, splitter.feed(b"\n\n"))):
                        raise UpstreamClosed("the upstream ended its stream before the first event")
                    return
                if not others:
                    decided = not stateful or bool(made_id(reply.held) or _EVENT_END.search(reply.held))
                else:
                    decided = self._decides(reply, splitter.feed(piece))
                if decided or len(reply.held) > HOLD_BYTES:
                    return
                # Not from the start on: the time to the first byte has a limit of its own.
                timer = timer or self.loop.call_later(HOLD_S, exchange.interrupt, HeldLongEnough())
        except HeldLongEnough:
            return
        finally:
            if timer is not None:
                timer.cancel()

    def _decides(self, reply: Reply, events: "Iterable[bytes]") -> bool:
        """Whether one of `events` is more than a preface. Raises Refused for an error in an answer's place."""
        for event in events:
            kind = judge_event(event)
            if kind is EventKind.ERROR:
                reply.held = event_fields(event)[1]
                reply.exchange.abort()
                raise refused_in_200(reply, event)
            if kind is EventKind.REAL:
                return True
        return False

    # -- rescue

    def _rescue(self, trip: Trip, lease: Lease, exchange: Exchange) -> bool:
        """Asks another controller with room, too; whether there was one. The first real answer wins."""
        if trip.rescue is not None or (trip.best is not None and not may_retry(trip.best.verdict, trip.request)):
            return False
        now = self.loop.time()
        self._keep_up(trip)
        # Only who has room right now: a rescue that would wait or probe helps nobody.
        other = self.pool.lease(trip.request, trip.seats, trip.tried | {lease.upstream}, now, resort=False)
        if other is None:
            return False
        names = (trip.request.request_id, lease.upstream.name, other.upstream.name)
        log.warning("%s: silent in %s, asking %s too", *names)
        task = self.loop.create_task(self._ask(other, trip))
        trip.rescue = (other, task)
        task.add_done_callback(functools.partial(self._end_rescue, trip, other, exchange))
        return True

    def _end_rescue(self, trip: Trip, lease: Lease, exchange: Exchange, task: "asyncio.Task[Reply]") -> None:
        """A rescue that brought an answer ends the first attempt; an error never does, but its controller learns it."""
        problem = None if task.cancelled() else task.exception()
        if task.cancelled() or trip.rescue is None or trip.rescue[1] is not task:
            return  # given up, or the only attempt by now, which `run` awaits
        if problem is None:
            exchange.interrupt(Rescued())
            return
        trip.rescue, verdict = None, LEFT
        if isinstance(problem, (Refused, UpstreamError, Untranslatable)):
            verdict = self._judge(problem, lease, trip)
            trip.note(lease, verdict, self.loop.time())
        else:
            log.error("%s: a rescue failed", trip.request.request_id, exc_info=problem)
        self.pool.settle(lease, verdict)

    def _drop_rescue(self, trip: Trip) -> None:
        """Gives up a rescue that is not needed any more, if there is one."""
        if trip.rescue is None:
            return
        (lease, task), trip.rescue = trip.rescue, None
        give_up(task)
        trip.record.outcomes.append((lease.upstream.name, Outcome.LOST.value, self.loop.time() - lease.since))
        self.pool.settle(lease, Verdict(Outcome.LOST))

    # -- the answer

    def _commit(self, reply: Reply, lease: Lease, trip: Trip) -> bytes:
        """Notes whose answer it is; the fields of its head. From here on no other can follow."""
        record, request, name = trip.record, trip.request, lease.upstream.name
        # To the first byte, as it decided; how long the rest took is the line's `ms`.
        record.outcomes.append((name, "ok", reply.at - lease.since))
        record.status, record.first_at, record.controller = reply.head.status, reply.at, name
        if request.asked or record.mapped or lease.seat.mapped is not None:
            trip.name(lease)
        if request.stateful:
            self.remember(made_id(reply.held[:USAGE_BYTES]), name)
        return self._fields(reply, trip)

    def _take_usage(self, reply: Reply, lease: Lease, request: ApiRequest) -> None:
        """Ends the exchange of a whole answer, and reads what it cost."""
        reply.exchange.finish()
        # Where the upstream says what is left, or no limit counts tokens, usage only feeds the mean: some will do.
        ledger, learns = lease.ledger, not (request.max_tokens or lease.serial & 7)
        if ledger.limited and (learns or (not reply.told and ledger.counts_tokens)):
            cache_free = lease.upstream.controller.cache_free
            self.pool.used(lease, request.model, *used_tokens(reply.held[-USAGE_BYTES:], cache_free), reply.told)

    async def _pass_on(self, reply: Reply, lease: Lease, trip: Trip, sink: Sink) -> Verdict:
        """Sends an answer on as it comes; nothing of it can be replayed. What came of it: OK or CUT."""
        exchange, record, request = reply.exchange, trip.record, trip.request
        try:
            metered = "stream_options" in request.data or (
                request.path == "/responses" and not reply.told and lease.ledger.counts_tokens
            )
            outlet: "Meter | Sink" = Meter(sink, reply.held) if metered else sink
            # Nobody will be asked again: a thousand open streams need not keep a thousand long prompts.
            request.body, request.data = b"", {}
            length = None if reply.stream else reply.head.index.get(b"content-length")
            size = content_length(length) if length else None
            sink.open(reply.head.status, self._commit(reply, lease, trip), size, reply.held)
            reply.held = b""
            if not reply.whole:
                await exchange.pipe(outlet)
            sink.end()
            exchange.finish()
            if isinstance(outlet, Meter):
                cache_free = lease.upstream.controller.cache_free
                self.pool.used(lease, request.model, *used_tokens(outlet.tail, cache_free), reply.told)
            # Status and framing were fine, so that nothing but its last words tells of a failure (vLLM, OpenRouter,
            # Anthropic's overloaded_error): uncounted, an account that always breaks off would get its full share.
            if reply.stream and sink.failed:
                record.outcomes[-1] = (lease.upstream.name, "error", self.loop.time() - lease.since)
                return judge_late_event(sink.failed, reply.rate_codes)
            return GOOD
        except UpstreamError as error:
            record.outcomes[-1] = (lease.upstream.name, "cut", self.loop.time() - lease.since)
            log.warning("%s: answer of %s cut: %s", request.request_id, lease.upstream.name, error)
            told = reply.stream and not is_packed(reply.head.index)
            sink.cut(error_event("The upstream's answer was cut: %s." % error, error.code) if told else b"")
            return Verdict(Outcome.CUT, 0, str(error))
        finally:
            exchange.abort()

    async def _fail(self, trip: Trip, sink: Sink) -> None:
        """Every controller failed, or nobody has room: the answer that tells most."""
        # The client's SDK obeys retry-after and x-should-retry. So these are about the pool: when somebody has room, or
        # that nothing changes soon. An upstream's own would send a client away from accounts that work.
        best, line, fields = trip.best, trip.line, b""
        if line is None and best is not None and best.verdict.outcome is Outcome.RATE:
            best = trip.last  # that 429 was waited out, and what came then is why there is no answer
        outcome = Outcome.RATE if best is None else best.verdict.outcome
        retried = len(trip.record.outcomes) > 1 or trip.record.waited_s > 0
        if line is not None and outcome in (Outcome.RATE, Outcome.QUOTA):
            fields = retry_fields(line.after_s)
        elif outcome is Outcome.RATE and retried:
            fields = retry_fields(self.pool.reopens_after(trip.seats, trip.request.need) if trip.seats else NEVER)
        elif outcome in LASTING and (retried or outcome is Outcome.LARGE):
            fields = b"x-should-retry: false\r\n"
        if best is not None:
            await self._show(best, trip, sink, fields)
        elif line is not None:
            model = trip.request.model[:64]
            message = "Rate limit reached on every controller that serves %s: %s." % (model, line.why)
            raise ProxyError(429, message, "rate_limit_exceeded", headers=fields)
        else:
            raise trip.failure or trip.unfit or ProxyError(503, "No controller could be asked.", "no_controller")

    async def _show(self, reply: Reply, trip: Trip, sink: Sink, fields: bytes) -> None:
        """Sends the upstream error that tells most, without the secrets that it may echo."""
        head = reply.head
        trip.record.status, trip.record.first_at = head.status, self.loop.time()
        trip.record.controller, trip.record.mapped = reply.source
        if 300 <= head.status < 400:  # its Location would show where the account is, and take a key there
            raise ProxyError(502, "The upstream redirects; its base_url needs a correction.", "upstream_redirects")
        fields = self._fields(reply, trip, bool(fields)) + fields
        if not sink.whole(head.status, fields, redactor.scrub(reply.held)):
            await sink.drain()

    def _fields(self, reply: Reply, trip: Trip, ours: bool = False) -> bytes:
        """The head's field lines: the upstream's that may pass, and ours."""
        head, record = reply.head, trip.record
        lines = head.lines
        if ours or record.waited_s or len(record.outcomes) > 1:
            lines = without(lines, RETRY_FIELDS)
        serial = record.request_id.encode()
        lines += record.mapped + way_fields(record.controller, len(record.outcomes), int(record.waited_s * 1e3))
        if b"x-request-id" in head.index:
            return b"%bx-apiserver-request-id: %b\r\n" % (lines, serial)
        return b"%bx-apiserver-request-id: %b\r\nx-request-id: %b\r\n" % (lines, serial, serial)


# ==== 14. Server ====
# One fiber per client connection: read a request, answer it, read the next. Framing is judged before doors, doors
# before routes. A client that leaves cancels its fiber, and with it whatever was under way upstream.
#
# Order of the section: what is served where; what a request says, read; a client's connection and its uploads; lists,
# and what a configuration makes; the server with its doors, routes and handlers.
#
# A body comes in one of three ways. Whole with its head, as nearly all do: it is cut off the reader. In pieces: it is
# collected, once its head has passed doors and routes, as strangers must not fill memory. Or it is a form or a file,
# which may be larger than all memory: its first megabyte is collected and the rest is a ClientUpload.


# Path, and the model that counts where none is named (the API reference's defaults).
INFERENCE = {
    **dict.fromkeys(("/completions", "/embeddings", "/responses", "/audio/speech"), ""),
    **dict.fromkeys(("/responses/input_tokens", "/responses/compact"), ""),
    **dict.fromkeys(("/audio/transcriptions", "/audio/translations"), ""),
    **dict.fromkeys(("/images/generations", "/images/edits", "/images/variations"), "dall-e-2"),
    "/moderations": "omni-moderation-latest",
}
# Those whose body is multipart/form-data, with a file in it; an edit may name its pictures in JSON instead.
FORMS = frozenset(("/images/edits", "/images/variations", "/audio/transcriptions", "/audio/translations"))
# First words of paths below which things live in one account: what is made there exists nowhere else.
OBJECTS = frozenset(
    "files uploads batches responses conversations vector_stores fine_tuning assistants threads containers evals videos"
    " chat".split()
)
# What stands in their paths where elsewhere an id does.
NO_IDS = frozenset("alpha characters checkpoints edits extensions graders jobs run runs validate".split())
# Where none of these words stands, a response needs nothing that lives in one account; to look for names costs more.
TIES = (b'"conversation"', b'"container"', b"file_id", b"vector_store_id")
# What each account has a list of, and the order where none is asked for (API reference, `order`).
LISTS = {
    **dict.fromkeys("/files /batches /vector_stores /fine_tuning/jobs /assistants /containers /videos".split(), "desc"),
    **dict.fromkeys((CHAT_PATH, "/evals"), "asc"),
}
# Path: its methods, and the method of Server that answers. All else is `_object`, where `endpoints` opens it.
ROUTES = {
    **dict.fromkeys(INFERENCE, ("POST", "_infer")),
    CHAT_PATH: ("POST", "_chat"),
    "/models": ("GET, HEAD", "_list"),
    "/models/*": ("GET, HEAD", "_model"),
    "/status": ("GET, HEAD", "_status"),
}
RESETS = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset, at once
AGAIN = b"Retry-After: 1\r\n"
ASK = b"WWW-Authenticate: Bearer\r\n"  # RFC 9110, 15.5.2
TAKEN = (503, "All connections are taken; try again.", "too_many_connections")
PACKED = "A compressed request body is not understood; send it plain."
TOO_LARGE = "The body is larger than %d bytes."
MODEL_LATE = "The form names no model in its first %d bytes: put that field before the file."
FOREIGN_HOST = "The host %r is not known here; add it to allowed_hosts."
FOREIGN_PAGE = "Pages of %r may not use this server; see cors.allow_origins."
UNKNOWN = "There is no %s here; see /v1/chat/completions, /v1/models, /status."
CLOSED = "%s is not open here: `endpoints` of the configuration would have to name %r."
_FULL = error_body(ProxyError(*TAKEN))
# What a connection gets that is one too many. It is written before anything was read, and must not cost much.
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n%bConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (AGAIN, len(_FULL), _FULL)
)


def leads_out(path: str) -> bool:
    """Whether a decoded path has dot segments, which would lead out of the account's base_url, with its key."""
    # Servers on Windows take backslashes for slashes, and those that know path parameters drop `;x` from a segment.
    return "\\" in path or not {".", ".."}.isdisjoint(re.sub(";[^/]*", "", path).split("/"))


def route_of(name: str) -> str:
    """The key in ROUTES that a path without /v1 would have."""
    return "/models/*" if name.startswith("/models/") and len(name) > 8 else name.rstrip("/")


def plain_path(path: str) -> str:
    """The path that lenient upstreams take this one for: slashes merged, `;x` dropped, small letters, one /v1."""
    merged = re.sub("/+", "/", re.sub(";[^/]*", "", path)).lower()
    return re.sub("^(/v1)+(?=/)", "", merged)


def raw_path(target: str, path: str) -> str:
    """The path of `target` as it was spelled, without /v1; `path` is it decoded. Raises ProxyError (404)."""
    # Judged decoded, since whoever comes behind may decode. Only a /v1/ spelled as such is taken off: wherever else it
    # were found, another path would be sent than the one that was allowed.
    absolute = _ABSOLUTE_TARGET.match(target)
    spelled = (absolute.group(2) if absolute else target).partition("?")[0]
    if leads_out(path) or not spelled.startswith("/v1/"):
        raise ProxyError(404, UNKNOWN % path[:200], "unknown_url")
    return spelled[3:]


@functools.lru_cache(maxsize=256)
def find_route(method: str, target: str, endpoints: "tuple[str, ...]") -> "tuple[str, str, str]":
    """Handler, path without /v1, and query of a request. Raises BadMessage, ProxyError (404, 405).

    A path is compared decoded and without a last slash; what `endpoints` lets through to an account keeps its spelling.
    """
    # Clients with a base_url that lacks /v1 are common, and mean the same; but nothing is opened to them beyond that.
    _, path, query = split_target(target)
    name = path[3:] if path.startswith("/v1/") else path
    route = route_of(name)
    methods, handler = ROUTES.get(route, ("", ""))
    if method in methods.split(", "):
        if route in INFERENCE and {"inference", "*"}.isdisjoint(endpoints):
            raise ProxyError(404, CLOSED % (path[:200], "inference"), "unknown_url")
        return handler, name if route == "/models/*" else route, query
    # Passed on, POST /v1/chat//completions would be a chat that nobody counted, where slashes are merged.
    plain = route_of(plain_path(path))
    if plain in ROUTES and plain != route:
        raise ProxyError(404, UNKNOWN % path[:200], "unknown_url")
    plainly = "//" not in path and ";" not in path
    group = "objects" if plainly and name[1:].partition("/")[0] in OBJECTS else "*"
    if path.startswith("/v1/") and not {"*", group}.isdisjoint(endpoints) and route != "/status":
        return "_object", raw_path(target, path), query
    if not methods:  # closed is told from unknown, so that whoever configures it learns the word
        message = CLOSED % (path[:200], group) if group == "objects" else UNKNOWN % path[:200]
        raise ProxyError(404, message, "unknown_url")
    allow = methods + ", OPTIONS"
    fields = b"Allow: %b\r\n" % allow.encode()
    raise ProxyError(405, "%s takes %s." % (path[:200], allow), "method_not_allowed", headers=fields)


@functools.lru_cache(maxsize=1024)
def subscriber_of(peer: str) -> "tuple[str, int]":
    """As what the connections of an address are counted, and how many it may have where nothing is configured.

    A public IPv6 address counts as its /64, the least that one subscriber is given (RFC 6177): each of them could come
    from 2**64 addresses. Private ones count each by itself, as there a /64 is a network of many clients. 0 is no bound.
    """
    import ipaddress  # 2 ms that loopback need not pay at the start

    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer, 0
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:192.0.2.1, on a socket for both families
    if address.is_private or address.is_loopback:
        return peer, 0
    if address.version == 6:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64))), PEER_CONNECTIONS
    return str(address), PEER_CONNECTIONS


@functools.lru_cache(maxsize=1024)
def patience_of(asked: "bytes | None", timeout: "bytes | None", most: float) -> float:
    """`longest_wait` of what its two fields say."""
    for said, spare_s in ((asked, 0.0), (timeout, PATIENCE_S)):
        seconds = parse_duration(said.decode("latin-1")) if said is not None else None
        if seconds is not None:
            most = max(0.0, min(most, seconds - spare_s))
    return most


def longest_wait(index: Index, most: float) -> float:
    """How long a request may stand in line, in seconds: `most`, or less by its own wish or its client's patience.

    The SDKs send their read timeout. Who waits beyond it is answered to nobody, and comes again: a place in line lost.
    """
    asked, timeout = index.get(b"x-apiserver-max-wait"), index.get(b"x-stainless-read-timeout")
    if asked is None and timeout is None:
        return most
    if len(asked or b"") + len(timeout or b"") > 100:  # what is remembered must be short
        return most
    return patience_of(asked, timeout, most)


def is_json(content_type: bytes) -> bool:
    """Whether a body of this type is JSON."""
    return content_type == b"application/json" or b"json" in content_type.lower()


def json_lines(head: RequestHead) -> bytes:
    """The field lines of a JSON request; curl's default content type is a form's."""
    if is_json(head.index.get(b"content-type", b"")):
        return head.lines
    return without(head.lines, (b"content-type",)) + b"Content-Type: application/json\r\n"


def read_input(request: ApiRequest, model: str, depth: int) -> None:
    """Reads a JSON request that is no chat: sets its model, stream, stateful and what it may cost. Raises ProxyError.

    `model`: the path's default. `depth`: how deep JSON may be nested.
    """
    data = request.data = parse_object(request.body, depth)
    request.model = data.get("model") or model
    stored = request.path.startswith("/responses") and "model" not in data  # a stored prompt may name it
    if not stored and (not isinstance(request.model, str) or not request.model):
        raise ProxyError(400, "You must provide a model parameter: a non-empty string.", param="model")
    request.stream = data.get("stream") is True
    # Responses are stored unless they say no (API reference, `store`): to replay one may make two.
    request.stateful = request.path == "/responses" and data.get("store") is not False
    text = list(map(data.get, ("prompt", "input", "instructions", "messages")))
    request.prompt_tokens = count_text(text) // 4
    if request.path in ("/completions", "/responses"):
        most = data.get("max_output_tokens")
        request.max_tokens = most if isinstance(most, int) and most > 0 else answer_limit(data)
    else:
        request.max_tokens = 1  # what comes back counts for little


def refuse_twice(scanner: FormScanner) -> None:
    """Refuses a form that names a model twice: a key's models are judged by one, and the account may take the other."""
    if scanner.twice:
        raise ProxyError(400, "model or stream stands twice in the form.", param="model")


def read_form(request: ApiRequest, content_type: bytes, model: str) -> None:
    """Reads the fields of a form that decide where it goes, as far as it has come. Raises ProxyError (400).

    The body stays as it is: a mapped model is put in the place of the old one (`model_span`). What a file costs
    in tokens nobody knows before: it counts as one part.
    """
    scanner = FormScanner(content_type)
    scanner.feed(request.body)
    refuse_twice(scanner)
    request.model, request.model_span = model, scanner.spans.get(b"model")
    if request.model_span is not None:
        start, end = request.model_span
        request.model = request.body[start:end].decode("utf-8", "replace")
    # One that is too long, or has no end, is not the default either: the account may well read it.
    if not request.model or (request.model_span is None and b"model" in scanner.seen):
        raise ProxyError(400, "You must provide a model field in the form.", param="model")
    start, end = scanner.spans.get(b"stream", (0, 0))
    request.stream = request.body[start:end] == b"true"
    request.prompt_tokens, request.max_tokens = TOKENS_PER_PART, 1


def check_model_allowed(key: ClientKey, model: str, body: bytes) -> None:
    """Refuses a model that is not among the key's (403), and a body that two readers could read differently (400)."""
    if not key.models:
        return
    # JSON parsers differ in which of two equal keys counts: for ours it is the last, for the account's nobody knows.
    if top_level_count(body, "model") > 1:
        raise ProxyError(400, "model stands twice in the body.", param="model")
    if not model_patterns(key.models).fullmatch(model):
        what = "the model %r" % model[:64] if model else "calls that name no model"  # a file, a batch: of any model
        message = "Your key may not use %s; it may use: %s." % (what, ", ".join(key.models))
        raise ProxyError(403, message, "model_not_allowed", param="model")


class Phase(enum.Enum):
    """What a client connection is doing; a deadline that has passed, or a FIN, means another thing in each."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    CLOSING = "closing"


IDLE, ANSWER = Phase.IDLE, Phase.ANSWER  # which each request passes; the class takes five times as long to ask


class ClientUpload:
    """The rest of a client's body. See `Upload`.

    Each read goes on within the callback that brought it, or the client is stopped; so nothing is kept here, and what
    a transfer takes is what two connections take anyway: the reader's limit on one side, the writer's on the other.

    `since`: when the client's time began to run, later by what it was kept waiting (from `held_at` on). `push`: where
    the pieces go while somebody takes them. `scanner`: goes on looking, as a second model could hide behind the first.
    """

    __slots__ = ("chunked", "client", "closes", "decoder", "held_at", "push", "scanner", "since", "size", "tapped")

    def __init__(
        self,
        client: "ClientConnection",
        decoder: "LengthDecoder | ChunkedDecoder",
        scanner: "FormScanner | None",
    ) -> None:
        self.client, self.decoder, self.scanner = client, decoder, scanner
        self.chunked, self.tapped = type(decoder) is ChunkedDecoder, False
        self.size, self.since = 0, 0.0
        self.held_at: "float | None" = None
        self.push: "Callable[[bytes, bool], bool] | None" = None
        # Who is answered before its body has come must not send another request behind it.
        self.closes, client.close_after = client.close_after, True

    @property
    def left(self) -> int:
        """See `Upload`."""
        return self.decoder.left

    @property
    def done(self) -> bool:
        """See `Upload`."""
        return self.decoder.done

    def pour(self, push: "Callable[[bytes, bool], bool]") -> None:
        """See `Upload`."""
        reader = self.client.reader
        self.push, reader.sink = push, self._arrived
        self.since = self.held_at = self.client.loop.time()
        # What came while the request stood in line; the reader had stopped the client at its limit.
        data, reader.data = reader.data, b""
        if not data or self._pass(data):
            self.resume()

    def resume(self) -> None:
        """See `Upload`."""
        client = self.client
        if self.push is None or self.held_at is None:
            return
        if client.reader.ended:  # a FIN before the end of the body; no half-closed client does that
            client.leave()
            return
        self.since, self.held_at = self.since + client.loop.time() - self.held_at, None
        self._set_clock()
        client.reader.unhold()

    def stop(self) -> None:
        """See `Upload`."""
        if self.push is not None:
            self.push = self.client.reader.sink = None
            self._set_clock()
            self.client.reader.unhold()  # all of the rest may have come while it was held, and others follow

    def _arrived(self, data: bytes) -> bool:
        if not self._pass(data) and self.push is not None:
            self.held_at = self.client.loop.time()
            self._set_clock()
            self.client.reader.hold()
        return False

    def _pass(self, data: bytes) -> bool:
        """Passes on what `data` brings of the body; whether more is welcome."""
        client, push = self.client, self.push
        assert push is not None
        try:
            payload = decode_body(self.decoder, data)
            if self.scanner is not None:
                self.scanner.feed(payload)
                refuse_twice(self.scanner)
        except ProxyError as problem:
            # The upstream waits for the rest of its body, so nothing but closing its connection tells it.
            self.stop()
            client.leave(problem)
            return False
        self.tapped, self.size = True, self.size + len(payload)
        if self.done:
            self.stop()
            client.reader.unread(self.decoder.rest)
            if not client.head_sent:  # else its answer has said that it closes
                client.close_after = self.closes or client.server.stopping
        else:
            self._set_clock()
        return push(payload, self.done)

    def _set_clock(self) -> None:
        """While the client is awaited its time runs, until it is silent for body_timeout: all of a large body may take
        longer. The deadline is another's while an answer that came early waits for the client to read it."""
        client = self.client
        if client.on_ready is None:
            awaited = self.push is not None and self.held_at is None
            due = client.body_due(self.since, self.size, client.loop.time()) if awaited else math.inf
            client.deadline.set(due)


class ClientConnection:
    """A client's connection and, during an answer, the Sink that the relay writes to.

    `reserve`: it came above the bound on connections and may ask for /status only. `raw`: the transport below TLS.
    `broken`: what is wrong with a body of which a part has gone upstream. `skipped`: a body that nobody wants was read.
    `held`: bytes of the body that count towards bodies_bytes. `close_after`: no request follows this one. `unread`: it
    was refused before its end.

    Of a stream that is written: `scrubs`: it may tell of an error; `last`: the end of what left last; `telling`: the
    event under way does tell of one, and waits in `pending` for its end; `failed`: see `Sink`.
    """

    __slots__ = (
        "body broken chunked close_after deadline failed framed framed_bytes gone head head_sent heads held key last"
        " loop on_ready origin outbox peer pending phase probes protocol raw reader record reserve scrubs server"
        " skipped task telling transport unread upload"
    ).split()

    def __init__(
        self, server: "Server", protocol: WireProtocol, transport: asyncio.WriteTransport, peer: str, reserve: bool
    ) -> None:
        # For as long as it is open.
        self.server, self.protocol, self.reader = server, protocol, protocol.wire
        self.outbox = server.outbox
        self.transport = self.raw = transport
        self.peer, self.reserve = peer, reserve
        self.loop = self.reader.loop
        self.deadline = Deadline(self.loop, self._expired)
        self.phase, self.probes, self.held = IDLE, 0, 0
        self.gone = self.close_after = self.head_sent = self.chunked = self.scrubs = self.telling = self.skipped = False
        self.unread = reserve
        # For one request, set anew by `_one` and by `open`.
        self.head: "RequestHead | None" = None
        self.heads = HeadMemory()
        self.framed: "RequestHead | None" = None  # whose body was `framed_bytes` long, within all limits
        self.framed_bytes = 0
        self.upload: "ClientUpload | None" = None
        self.broken: "ProxyError | None" = None
        self.key: "ClientKey | None" = None
        self.body = self.last = self.pending = self.failed = self.origin = b""
        self.on_ready: "Callable[[], None] | None" = None
        self.record = AccessRecord(self.peer, "-", "-", 0.0)
        self.reader.on_end = self._ended
        protocol.on_writable = self._writable
        self.task = Fiber(self._run(), self.loop)

    def __repr__(self) -> str:
        return "<ClientConnection %s %s>" % (self.peer, self.phase.value)

    def retire(self) -> None:
        """The server is about to stop: an idle connection closes, a busy one after its answer."""
        self.close_after = True
        if self.phase is IDLE:
            self.outbox.flush()
            if self._unsent():  # the end of an answer that its client reads slowly: `_flush` comes next
                self.reader.interrupt(EOFError())
            else:
                self.task.cancel()

    # -- the connection's life

    async def _run(self) -> None:
        """All of it, from the handshake to the close. Nothing leaves here as an exception."""
        try:
            if self.server.tls is not None:
                await self._shake_hands(self.server.tls)
            while not self.close_after and await self._one():
                pass
            self.phase = Phase.CLOSING
            if not self.gone:
                await self._linger()
                await self._flush()
        except asyncio.CancelledError:  # the client left, or the server stops, maybe in the midst of an answer
            self.gone = self.gone or (self.phase is ANSWER and self.head_sent)
        except (OSError, ClientGone):  # OSError: TimeoutError, ConnectionError, and ENOTCONN of a shutdown come late
            self.gone = True
        finally:
            self.phase = Phase.CLOSING
            self._release()
            self.deadline.cancel()
            self.reader.on_end = self.protocol.on_writable = self.on_ready = self.upload = None
            self._close()
            self.server.forget(self)

    def _close(self) -> None:
        """Closes; whoever has not taken the rest of its answer by now is cut off."""
        self.outbox.flush()  # a transport that is closed takes nothing more
        if not (self.gone or self._unsent()):
            self.transport.close()
            return
        # To HTTP/1.0 a FIN is the end of an answer without a length: what was cut would look whole.
        if self.head_sent and self.head is not None and not self.head.minor and not self.raw.is_closing():
            self.raw.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
        self.transport.abort()

    def _unsent(self) -> int:
        """How many bytes of the answers the kernel has not taken yet."""
        below = self.raw.get_write_buffer_size() if self.raw is not self.transport else 0
        return self.transport.get_write_buffer_size() + below

    async def _shake_hands(self, tls: ssl.SSLContext) -> None:
        """Begins TLS here and not in the listener, whose handshakes nothing counts. Raises OSError."""
        self.protocol.over_tls, self.reader.link = True, None  # what comes right behind must not stop the socket itself
        secured = await self.loop.start_tls(
            self.raw,
            self.protocol,
            tls,
            server_side=True,
            ssl_handshake_timeout=RESERVE_S if self.reserve else self.server.config.limits.header_timeout,
            ssl_shutdown_timeout=LINGER_S,
        )
        assert secured is not None
        self.transport = secured
        self.reader.set_transport(secured)
        tune(secured)

    async def _one(self) -> bool:
        """Reads and answers one request; whether another may follow."""
        self.phase, self.origin = IDLE, b""
        self.head = self.upload = None
        self.head_sent = self.chunked = self.skipped = False
        # Errors of the reading are answered where all are, so that they too have an id, CORS fields and an access line.
        problem = None
        try:
            head = await self._read_head()
            if head is None:
                return False
            if head is self.framed and self.framed_bytes <= len(self.reader.data):
                self.body = self.reader.cut(self.framed_bytes)  # the same head as before, so it was judged before
            else:
                decoder = self._body_decoder(head)
                if decoder is None:
                    self.body = b""
                elif type(decoder) is LengthDecoder and decoder.left <= len(self.reader.data):
                    self.framed, self.framed_bytes = head, decoder.left
                    self.body = self.reader.cut(decoder.left)  # as nearly all come: with their head, in one read
                else:
                    self.body = await self._read_body(head, decoder)
        except ProxyError as error:
            problem = error
            self.unread = not self.skipped
            self.close_after = self.close_after or self.unread  # or what follows it could not be trusted
            self._release()
        except EOFError:
            return False
        self.deadline.at = math.inf
        self.phase = ANSWER
        await self._answer(problem)
        if self.held:
            self._release()
        if self.protocol.full:  # or a client that never reads could pile up the answers to what it pipelines
            await self.drain()
        return not self.close_after

    async def _linger(self) -> None:
        """Lets a client that still sends read our answer before the connection is reset (RFC 9112, 9.6)."""
        # Bytes that nobody has read make the kernel answer a close with a reset, and that takes the answer from the
        # client's buffer: curl then shows "connection reset" where there was a 413 with its reason.
        if self.reader.ended or self.server.stopping:
            return
        self.outbox.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        elif not (self.unread or self.reader.data or (self.upload is not None and not self.upload.done)):
            return  # TLS cannot close one way only, and a client may wait for that as the end of its answer
        self.deadline.set(self.loop.time() + LINGER_S)
        budget = LINGER_BYTES
        try:
            while budget > 0:
                data = await self.reader.read_some()
                if not data:
                    return
                budget -= len(data)
        except EOFError:
            return

    async def _flush(self) -> None:
        """Waits until the last bytes are sent; as long as they are not, this counts as a connection.

        `close` of a transport sends them too, but without a limit in time, and nobody would count who does not read.
        """
        self.outbox.flush()
        until, wait_s = self.loop.time() + self.server.config.limits.write_timeout, FLUSH_FIRST_S
        while self._unsent() and self.loop.time() < until:
            await asyncio.sleep(min(wait_s, until - self.loop.time()))
            wait_s = min(2 * wait_s, FLUSH_MOST_S)

    # -- reading

    async def _read_head(self) -> "RequestHead | None":
        """The next request's head; None when the client closed between requests. Raises BadMessage.

        Once its first byte is here the deadline is header_timeout after it, however many more trickle in.
        """
        limits, data = self.server.config.limits, b""
        self.deadline.set(self.loop.time() + (RESERVE_S if self.reserve else limits.idle_timeout))
        while True:
            more = await self.reader.read_some()
            if not more:
                return None
            data = data + more if data else more
            # Each new read is searched only from where the last one ended: byte by byte would be quadratic otherwise.
            if data[0] == 13:  # old clients send a CRLF behind a body (RFC 9112, 2.2)
                empty = _EMPTY_LINES.match(data)
                data = data[empty.end() :] if empty else data
                if data in (b"", b"\r"):
                    continue
            end = data.find(b"\r\n\r\n", max(0, len(data) - len(more) - 3))
            if 0 <= end <= limits.header_bytes:
                break
            if len(data) > limits.header_bytes:
                raise BadMessage(431, "The request head is larger than %d bytes." % limits.header_bytes)
            check_partial_head(data, max(0, len(data) - len(more) - 1), limits.start_line_bytes)
            if self.phase is IDLE:
                self.phase = Phase.HEAD
                self.deadline.set(self.loop.time() + (RESERVE_S if self.reserve else limits.header_timeout))
        if len(data) > end + 4:  # a body, or what is pipelined behind
            self.reader.unread(data[end + 4 :])
            data = data[: end + 4]
        if end > limits.start_line_bytes and data.find(b"\r\n") > limits.start_line_bytes:
            raise BadMessage(414, "The request line is longer than %d bytes." % limits.start_line_bytes)
        self.head = self.heads.parse(data, limits.header_count)
        return self.head

    def _body_decoder(self, head: RequestHead) -> "LengthDecoder | ChunkedDecoder | None":
        """What decodes the request's body, if one is to be read. Raises BadMessage."""
        limits, index = self.server.config.limits, head.index
        kind = index.get(b"content-type", b"")
        # Only what is no JSON may pass through: JSON has to be read whole before it can be judged.
        form = not is_json(kind) and b"multipart/" in kind.lower()
        most = limits.upload_bytes if form else limits.body_bytes
        decoder = request_body_decoder(head, most, limits.chunk_line_bytes)
        if self.reserve or ((b"connection" in index or not head.minor) and not head.keeps_alive):
            self.close_after = True  # in the reserve others wait for the place
        if decoder is None or self.reserve:
            return None
        if b"expect" in index and head.minor and index[b"expect"].lower() != b"100-continue":
            raise BadMessage(417, "The only expectation understood is 100-continue.")
        return decoder

    async def _read_body(self, head: RequestHead, decoder: "LengthDecoder | ChunkedDecoder") -> bytes:
        """The request's body, bounded in size, time and slowness; of one that passes through, its beginning.

        Raises BadMessage; and ProxyError for what its head alone is refused for, when the body is not here yet.
        """
        self.phase, waits = Phase.BODY, not self.reader.data
        begun = b"" if waits else decode_body(decoder, await self.reader.read_some())  # framing comes before the doors
        expects = b"expect" in head.index and head.minor > 0 and waits
        try:
            passes, scanner = (False, None) if decoder.done else self.server.check_entry(self, head)
        except ProxyError:
            self.skipped = not expects and await self._skip(decoder)  # after `expect` it may not even come
            raise
        if expects:
            self.outbox.write(self.transport, CONTINUE)  # RFC 9110, 10.1.1
        return await self._collect_body(decoder, begun, passes, scanner)

    async def _collect_body(
        self, decoder: "LengthDecoder | ChunkedDecoder", piece: bytes, passes: bool, scanner: "FormScanner | None"
    ) -> bytes:
        """A body as it comes, or the beginning of one that `passes`, whose rest is `upload` then.

        `piece`: what has come of it. Raises ProxyError.
        """
        limits, since = self.server.config.limits, self.loop.time()
        kept = min(REPLAYED_BYTES, limits.body_bytes)
        pieces: "list[bytes]" = []
        body = bytearray()  # what has come in many small pieces, which would take many times their size
        while True:
            self._hold(len(piece))
            if piece:
                pieces.append(piece)
            if len(pieces) > PIECES:
                body += b"".join(pieces)
                pieces.clear()
            if decoder.done:
                self.reader.unread(decoder.rest)
                break
            if scanner is not None:
                scanner.feed(piece)
            # Once it is known where it goes, and more than what a replay would be worth has come, it may go.
            if passes and self.held >= kept and (scanner is None or b"model" in scanner.spans):
                self.upload = ClientUpload(self, decoder, scanner)
                break
            if self.held > limits.body_bytes:
                message = TOO_LARGE if scanner is None else MODEL_LATE
                raise BadMessage(413, message % limits.body_bytes, "request_too_large")
            self.deadline.set(self.body_due(since, self.held, since))
            data = await self.reader.read_some()
            if not data:
                raise ClientGone
            piece = decode_body(decoder, data)
        return b"".join([body, *pieces] if body else pieces)  # one piece is not copied

    async def _skip(self, decoder: "LengthDecoder | ChunkedDecoder") -> bool:
        """Reads a body that nobody wants, if it is small and soon over; whether it was, so that the connection goes on.

        Its framing still counts more than whatever its head was refused for. Raises BadMessage.
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
            decode_body(decoder, data)
        self.reader.unread(decoder.rest)
        return decoder.done

    # One counter for all connections: 10,000 clients with 32 MB each would all be within their own limit.
    def _hold(self, size: int) -> None:
        """Counts bytes of a body that is kept, until its request has been answered. Raises BadMessage (503)."""
        self.held += size
        self.server.held += size
        if self.server.held > self.server.config.limits.bodies_bytes:
            raise BadMessage(503, "Too many bodies are under way; try again.", "server_overloaded", headers=AGAIN)

    def _release(self) -> None:
        """Counts them no more."""
        self.server.held -= self.held
        self.held = 0

    def body_due(self, since: float, size: int, heard_at: float) -> float:
        """When a body is too slow that began at `since` and has `size` bytes by now: by rate, and since `heard_at`.

        The rate is that of the whole, after a start of header_timeout: a pause of a phone in a tunnel is no attack.
        """
        limits = self.server.config.limits
        slowest = since + limits.header_timeout + size / limits.body_rate if limits.body_rate else math.inf
        return min(heard_at + limits.body_timeout, slowest)

    # -- answering

    async def _answer(self, problem: "ProxyError | None") -> None:
        """Doors, route, handler; one place turns every error into a response, that of the reading (`problem`) too."""
        server, head = self.server, self.head
        record = self.record = AccessRecord(
            self.peer, head.method if head else "-", head.target if head else "-", self.loop.time()
        )
        record.request_id = server.next_id()
        try:
            if not head or problem:
                raise problem or ClientGone
            index = head.index
            if (server.guards_host and index.get(b"host") != server.last_host) or b"origin" in index:
                self.origin = server.check_doors(head)
            await server.handle(self, head)
        except (ProxyError, UpstreamError) as error:
            forget_frames(error)  # ours and the relay's, which have it too
            if self.head_sent:  # nothing honest can be said behind half an answer
                raise ClientGone from error
            await self._fail(error)
        # `leave` ended it: the client is gone, or it is still there and its upload was `broken`.
        except asyncio.CancelledError:
            record.status = record.status or 499  # nginx's word for a client that left
            if self.broken is None or self.head_sent:
                raise
            await self._fail(self.broken)
        except (ConnectionError, TimeoutError, ClientGone):
            record.status = record.status or 499
            raise
        # A mistake of ours costs one request, not the server: the log has the traceback, the client an id to ask by.
        except Exception:
            log.exception("%s: internal error", record.request_id)
            self.close_after = True
            if self.head_sent:
                raise ClientGone from None
            await self._fail(ProxyError(500, "Internal error; the log has request %s." % record.request_id))
        finally:
            server.access.add(record)

    async def _fail(self, error: "ProxyError | UpstreamError") -> None:
        """Sends an error as an answer."""
        record = self.record
        record.status = error.status
        fields = error.headers if isinstance(error, ProxyError) else b""
        if record.outcomes or record.waited_s:
            fields += way_fields(record.controller, len(record.outcomes), int(record.waited_s * 1e3)) + record.mapped
        if record.request_id:
            serial = record.request_id.encode()
            fields += b"x-request-id: %b\r\nx-apiserver-request-id: %b\r\n" % (serial, serial)
        # Our own words too may quote an upstream's, or a proxy's URL.
        body = redactor.clean(error_body(error).decode()).encode()
        if not self.whole(error.status, b"Content-Type: application/json\r\n" + fields, body):
            await self.drain()

    async def json(self, value: "Any", status: int = 200) -> None:
        """Answers with a JSON document of our own."""
        self.record.status = status
        if not self.whole(status, b"Content-Type: application/json\r\n", compact_json(value)):
            await self.drain()

    def whole(self, status: int, fields: bytes, body: bytes) -> bool:
        """See `Sink`."""
        # A 204 must not have a length (RFC 9110, 8.6), and a 304's is another answer's; to HEAD it is GET's, which
        # nobody here knows of an upstream's answer.
        asked = self.head.method if self.head is not None else ""
        unknown = status in (204, 304) or (asked == "HEAD" and not body)
        length = b"" if unknown else b"Content-Length: %d\r\n" % len(body)
        if asked == "HEAD":
            body = b""
        self.head_sent = True
        self.record.bytes = len(body)
        # One piece, one system call: a head by itself would wake the client for nothing.
        answer = b"".join((status_line(status), fields, self._own_fields(), length, b"\r\n", body))
        self.outbox.write(self.transport, answer)
        return not self.protocol.full

    async def drain(self) -> None:
        """See `Sink`. A client that stops reading for too long is dropped."""
        ready = asyncio.Event()
        self.when_ready(ready.set)
        await ready.wait()

    def open(self, status: int, fields: bytes, length: "int | None", first: bytes) -> bool:
        """See `Sink`."""
        assert self.head is not None
        if length is not None:
            framing = b"Content-Length: %d\r\n" % length
        elif self.head.minor >= 1:
            framing, self.chunked = b"Transfer-Encoding: chunked\r\n", True
        else:
            framing, self.close_after = b"", True
        # A body whose length was promised cannot be scrubbed; streams have none, and only they carry errors this late.
        self.scrubs, self.telling, self.failed, self.last = length is None, False, b"", b""
        if self.scrubs and b'"error"' in first:
            first = self._scrub(first)
        self.head_sent, self.last = True, first
        self.record.bytes = len(first)
        if first and self.chunked:
            first = chunk(first)
        answer = b"".join((status_line(status), fields, self._own_fields(), framing, b"\r\n", first))
        self.outbox.write(self.transport, answer)
        return not self.protocol.full

    def push(self, data: bytes) -> bool:
        """See `Outlet`."""
        # This runs once for each event of each stream: a search in the bytes, and nothing is parsed without a hit. `in`
        # first tries to make a number of what it looks for, which costs as much as looking.
        if self.scrubs and (
            data.find(b'"error"') >= 0 or self.telling or (self.last[-1:] != b"\n" and self._splits(data))
        ):
            data = self._scrub(data)
            if not data:
                return not self.protocol.full
        self.last = data if data[-1:] == b"\n" else (self.last[-LINE_BYTES:] + data[-LINE_BYTES:])
        self.record.bytes += len(data)
        self.outbox.write(self.transport, b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
        return not self.protocol.full

    def when_ready(self, call: "Callable[[], None]") -> None:
        """See `Outlet`. A client that stops reading for too long is dropped."""
        self.on_ready = call
        self.deadline.set(self.loop.time() + self.server.config.limits.write_timeout)

    def _splits(self, data: bytes) -> bool:
        """Whether the word that gives an error away lies across the last read and this one."""
        self.telling = b'"error"' in self.last[-6:] + data[:6]
        return self.telling

    def _scrub(self, data: bytes) -> bytes:
        """What may leave now of a stream that tells of an error: whole events without secrets. The rest waits.

        An event without the word never waits, and neither do the events before one that has it. OpenAI's message about
        a wrong key shows a part of it, and a read may end in the middle of that.
        """
        data, self.pending = self.pending + data, b""
        whole = max((end.end() for end in _EVENT_END.finditer(data)), default=0)
        if whole:
            self._judge(data[:whole])
            self.telling = False
        self.telling = (self.telling or b'"error"' in data[whole:]) and len(data) - whole <= EVENT_BYTES
        if self.telling:
            data, self.pending = data[:whole], data[whole:]
        return redactor.scrub(data)

    def _judge(self, data: bytes) -> None:
        """Keeps the first event that tells of an error; the beginning of its line may have left before."""
        before = self.last[self.last.rfind(b"\n") + 1 :]
        for event in EventSplitter().feed(before + data):
            if not self.failed and b'"error"' in event and judge_event(event) is EventKind.ERROR:
                self.failed = event

    def end(self) -> None:
        """See `Sink`."""
        if self.pending:
            self._judge(self.pending + b"\n\n")
            last, self.pending, self.scrubs = redactor.scrub(self.pending), b"", False  # or `push` would hold it again
            self.push(last)
        if self.chunked:
            self.outbox.write(self.transport, LAST_CHUNK)

    def cut(self, last: bytes) -> None:
        """See `Sink`."""
        self.pending, self.telling = b"", False  # half an error may hold half a secret
        self.close_after = True
        if last:
            # go-openai adds whatever stands before an error to the error's line, and then cannot parse it.
            if self.last and not self.last.endswith((b"\n\n", b"\r\r", b"\n\r\n")):
                last = b"\n\n" + last  # or it would stand at the end of an unfinished line
            self.outbox.write(self.transport, chunk(last) if self.chunked else last)
        else:
            self.gone = True

    def _own_fields(self) -> bytes:
        """Connection and CORS fields. HTTP/1.0 has to be told that it may stay, HTTP/1.1 that it may not."""
        if self.close_after:
            fields = b"Connection: close\r\n"
        else:
            fields = b"" if self.head is None or self.head.minor else b"Connection: keep-alive\r\n"
        if self.origin:
            fields += b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % self.origin
            fields += b"Access-Control-Expose-Headers: *\r\n"
        return fields

    # -- the client's clock and its leaving

    def _writable(self) -> None:
        """The client has read enough: whoever waits to write goes on."""
        call, self.on_ready = self.on_ready, None
        if call is not None:
            self.deadline.set(math.inf)
            call()

    def _expired(self) -> None:
        """The deadline has passed: who was slow hears of it where it can, and is closed."""
        if self.phase is Phase.CLOSING or (self.phase is IDLE and self._unsent()):
            self.reader.interrupt(EOFError())  # it may still be reading: `_flush` comes next
        elif self.phase is IDLE:
            if self.reserve:
                self.outbox.write(self.transport, FULL)
            self.task.cancel()
        elif self.phase in (Phase.HEAD, Phase.BODY):
            self.reader.interrupt(BadMessage(408, "The request did not arrive in time."))
        elif self.upload is not None and self.upload.push is not None:
            self.leave(BadMessage(408, "The request did not arrive in time."))
        else:  # it does not read
            self.leave()

    def _ended(self, error: "BaseException | None") -> None:
        """A FIN or a reset came. In other phases whoever reads sees it."""
        if self.phase is not ANSWER:
            return
        pouring = self.upload is not None and self.upload.push is not None
        # TLS cannot close one way only, and asyncio's drops what is written from now on without a word.
        if error is not None or pouring or self.protocol.over_tls or self.transport.is_closing():
            self.leave()
        else:
            self.probes = 0
            self._probe()

    def leave(self, problem: "ProxyError | None" = None) -> None:
        """Ends the answer under way: the client is gone, or its body, part of which is upstream, has a `problem`."""
        self.broken, self.gone = problem, problem is None
        if problem is not None:
            forget_frames(problem)
        self.task.cancel()

    def _probe(self) -> None:
        """Tells a client that half-closed and still reads from one that left: the latter answers bytes with a reset.

        Both look alike: a FIN. `printf ... | nc` half-closes; a client that was killed leaves the same way, and its
        request would go on to be billed. HTTP/1.0 knows no interim reply, and TLS no half-close.
        """
        if self.phase is not ANSWER or self.gone:
            return
        plain_socket = self.transport.get_extra_info("socket")
        if self.head is None or self.head.minor == 0 or plain_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.leave()
            return
        if not self.head_sent and self.probes < 2:
            self.outbox.write(self.transport, CONTINUE)
        self.probes += 1
        self.loop.call_later(PROBE_S * min(self.probes, 20), self._probe)


Run = Callable[[ApiRequest, ClientConnection, AccessRecord], Awaitable[None]]
Pages = dict[str, tuple[list[dict[str, Any]], bool]]  # by account: its objects, and whether it has more


def created_at(entry: "tuple[dict[str, Any], str]") -> float:
    """When an object was made, by which lists are sorted; chat completions spell it shorter."""
    item, _ = entry
    found = item.get("created_at") or item.get("created")
    # Python's JSON has NaN, to which nothing compares: one would leave the others in any order.
    return found if isinstance(found, int | float) and -math.inf < found < math.inf else 0.0


def merge_pages(pages: "Pages", limit: int, descending: bool) -> "tuple[list[tuple[dict[str, Any], str]], bool]":
    """The objects of several lists as one, each with whose it is, and whether there are more; `limit` 0 is none.

    An account that has more may have some that belong between those of the others, so the list ends where its does.
    So a page may be shorter than `limit`, as it may be anywhere: clients go by `has_more`.
    """
    merged = [(item, name) for name, (found, _) in pages.items() for item in found]
    merged.sort(key=created_at, reverse=descending)
    ends = [len(found) for found, more in pages.values() if more and found]
    shown = merged[: min([limit or len(merged), *ends])]
    return shown, bool(ends) or len(shown) < len(merged)


def next_places(
    places: "dict[str, str]", pages: "Pages", shown: "list[tuple[dict[str, Any], str]]"
) -> "dict[str, str]":
    """Behind which object each account's list goes on; without those that have shown all of theirs."""
    places = dict(places)
    for item, name in shown:
        places[name] = item["id"]
    for name, (found, more) in pages.items():
        if not more and (not found or places[name] == found[-1]["id"]):
            del places[name]
    return places


def is_open_ended(config: ControllerConfig) -> bool:
    """Whether the configuration leaves open which models an account has: then it is asked, as far as it can tell."""
    named = config.models and {"*", "?"}.isdisjoint("".join(config.models))
    return not named and config.type not in ("echo", "azure")  # Azure lists what could be deployed


def model_object(name: str) -> "dict[str, Any]":
    """A model as `GET /v1/models` lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "chatgpt-apiserver"}


def uncounted(now: float) -> None:
    """What happens at the write of a request that no quota counts: a list costs no tokens."""


async def fetch_list(exchange: Exchange) -> "dict[str, Any]":
    """An upstream's list of objects, each with an id in `data`. Raises UpstreamError."""
    try:
        await exchange.start()
        body = await read_all(exchange, LIST_BYTES)
        exchange.finish()
    finally:
        exchange.abort()
    try:
        if exchange.head.status == 200:
            found: "dict[str, Any]" = json.loads(body)
            # What cannot be printed (half a surrogate pair) cannot be quoted in a URL either, to ask for what follows.
            data = [
                one for one in found["data"] if isinstance(one["id"], str) and one["id"] and one["id"].isprintable()
            ]
            return {**found, "data": data}
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BadReply("status %d instead of a list" % exchange.head.status)


def rebuild_pool(pool: UpstreamPool, config: Config) -> None:
    """Makes `pool` what `config` describes; controllers and quotas that are the same as before keep their state.

    At a reload nothing else would do: fresh ledgers would send a burst to every account, and forget who is parked.
    """
    known = {upstream.name: upstream for upstream in pool.upstreams}
    # A group may have the name of a controller that is not in it.
    quotas = {(bool(one.config.quota_group), one.quota.name): one.quota for one in pool.upstreams}
    upstreams: "list[Upstream]" = []
    for one in config.controllers:
        same = known.get(one.name)
        if same is None or same.config != one:
            which = bool(one.quota_group), one.quota_group or one.name
            quota = quotas.get(which)
            if quota is None or quota.limits != one.limits:
                quota = quotas[which] = Quota(which[1], one.limits)
            same = Upstream(one, CONTROLLERS[one.type](one), quota)
        upstreams.append(same)
    pool.replace(upstreams, config.pool)


def load_certificate(context: ssl.SSLContext, config: Config) -> None:
    """Makes new connections use this certificate. Raises ConfigError."""
    try:
        context.load_cert_chain(config.tls.cert, config.tls.key)
    except (ssl.SSLError, OSError) as problem:
        raise ConfigError("%s: tls: certificate and key cannot be used: %s" % (config.source, problem)) from problem


def server_tls(config: Config) -> ssl.SSLContext:
    """The listener's TLS: 1.2 or newer. Raises ConfigError when certificate and key do not fit."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, config)
    return context


class Server:
    """The listener, the routes, the doors, and the way down.

    `draining`: /status says so; `stopping`: nothing new is taken. `gates`: the limits of client keys, by name; `pages`
    and `models`: see `_merge` and `_models_of`. `dial` is another one in tests.
    """

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop, dial: Dial = dial) -> None:
        self.loop, self.outbox = loop, Outbox(loop)
        self.config, self.lookups = config, Lookups(loop)
        loop.getaddrinfo = self.lookups.getaddrinfo  # type: ignore[method-assign]
        self.links = ConnectionPool(self.outbox, dial)
        self.connections: "set[ClientConnection]" = set()
        self.per_peer: "dict[str, int]" = {}
        self.most = math.inf  # connections that the system has files for; set once these are known
        self.held = 0  # bytes of bodies that came in more than one read and whose requests are under way
        self.listener: "asyncio.Server | None" = None
        self.tls: "ssl.SSLContext | None" = None
        self.stopping = self.draining = False
        self.last_host: "bytes | None" = None  # the last good one, as clients repeat theirs
        self.serial, self.id_prefix = 0, "req_" + os.urandom(6).hex()
        self.models: "dict[str, tuple[float, list[dict[str, Any]]]]" = {}  # by controller: until when, and which
        self.pages: "dict[tuple[str, ...], dict[str, str]]" = {}  # where each account's list goes on behind one's end
        self.pool = UpstreamPool([], config.pool, loop)
        self.gates: "dict[str, KeyGate]" = {}
        self.access = AccessLog(loop, console.write)
        self.reconfigure(config)
        self.relay = Relay(self.pool, self.links, loop)

    def reconfigure(self, config: Config) -> None:
        """Works by `config` from now on. What is unchanged keeps its state; answers under way are not touched."""
        # A listener keeps its kind: those who connect meanwhile could not know which one to speak.
        if self.listener is not None and bool(self.tls) != bool(config.tls.cert):
            log.warning("tls: switching it on or off needs a restart")
        elif self.tls is not None:
            load_certificate(self.tls, config)  # first: it may raise
        if self.listener is not None:  # which stays where it is, and its doors with it
            config = config.replace(host=self.config.host, port=self.config.port)
        self.config, limits = config, config.limits
        self.links.head_bytes, self.links.line_bytes = limits.upstream_head_bytes, limits.chunk_line_bytes
        rebuild_pool(self.pool, config)
        known, self.gates = self.gates, {}
        for key in config.client_keys:
            if key.limits != QuotaLimits():
                gate = known.get(key.name)
                self.gates[key.name] = gate if gate is not None and gate.key.limits == key.limits else KeyGate(key)
        self.access.render = json_line if config.log.format == "json" else text_line
        # A web page may point a name of its own at 127.0.0.1 (DNS rebinding), or post a simple request without asking:
        # a server on loopback is safe from neither, and would spend the keys. A client key is something no page has.
        self.guards_host = is_loopback(config.host) and (not config.client_keys or bool(config.allowed_hosts))
        self.guards_origin = not config.client_keys or bool(config.cors.allow_origins)
        self.last_host = None
        REPLY_FIELDS.clear()  # as there may be new secrets
        for client in self.connections:
            client.heads = HeadMemory()  # as there may be new limits
        self.models.clear()

    def next_id(self) -> str:
        """A request id that no other request has."""
        self.serial += 1
        return "%s%x" % (self.id_prefix, self.serial)

    # -- life

    async def start(self) -> "list[tuple[str, int]]":
        """Listens; the addresses. Raises OSError, ConfigError."""
        self.tls = server_tls(self.config) if self.config.tls.cert else None
        self.listener = await self.loop.create_server(
            self._protocol, self.config.host, self.config.port, backlog=BACKLOG, reuse_address=True
        )
        return [one.getsockname()[:2] for one in self.listener.sockets]

    def _protocol(self) -> WireProtocol:
        """What asyncio asks for at each connection."""
        return WireProtocol(WireReader(self.loop), self._connected)

    def _connected(self, protocol: WireProtocol, transport: asyncio.WriteTransport) -> None:
        """A connection was accepted: it gets its fiber, or an answer that costs nothing."""
        tune(transport)
        name = transport.get_extra_info("peername")
        peer = str(name[0]) if isinstance(name, tuple) else "local"
        subscriber, own = subscriber_of(peer)
        limits, count, here = self.config.limits, len(self.connections), self.per_peer.get(subscriber, 0)
        bound, most = min(limits.connections, self.most), limits.connections_per_client or own
        # Above the bound a connection may still ask for /status, or a balancer would take a full server for a dead one.
        if self.stopping or count >= bound + RESERVE_CONNECTIONS or (most and here >= most):
            transport.write(b"" if self.tls else FULL)
            transport.close()
            return
        self.per_peer[subscriber] = here + 1
        self.connections.add(ClientConnection(self, protocol, transport, peer, count >= bound))

    def forget(self, client: ClientConnection) -> None:
        """A client's connection has ended."""
        if client in self.connections:
            self.connections.discard(client)
            subscriber, _ = subscriber_of(client.peer)
            left = self.per_peer[subscriber] = self.per_peer[subscriber] - 1
            if not left:
                del self.per_peer[subscriber]

    async def stop(self) -> None:
        """Drains: the status says so, the listener closes, answers finish within their time, the rest is closed.

        `drain_delay` is for balancers that ask /status: until they have, new requests still come and must be served.
        """
        self.draining = True
        if self.config.drain_delay:
            await asyncio.sleep(self.config.drain_delay)
        self.stopping = True
        if self.listener is not None:
            self.listener.close()
        # Idle ones go at once. Clients take that for what it is and open another, which goes to whoever follows us.
        for connection in list(self.connections):
            connection.retire()
        tasks = [connection.task for connection in self.connections]
        if tasks:
            await asyncio.wait([task.ended for task in tasks], timeout=self.config.drain_timeout)
            for task in tasks:  # what has not ended by now is cut, and its upstream connection closed
                task.cancel()
            await asyncio.wait([task.ended for task in tasks])
        self.pool.close()
        self.links.close()
        self.access.flush()

    # -- doors

    def check_doors(self, head: RequestHead) -> bytes:
        """The Origin that may read the answer, b"" when there is none. Raises ProxyError (403) for a closed door."""
        # The Host first: a page that has pointed its own name here sends no foreign Origin, as to it we are its own.
        host = head.index.get(b"host")
        if self.guards_host and host is not None and host != self.last_host and not self._host_allowed(host):
            raise ProxyError(403, FOREIGN_HOST % host.decode("latin-1")[:100], "host_not_allowed")
        origin = head.index.get(b"origin")
        if not origin:
            return b""
        known = self.config.cors.allow_origins
        if "*" in known or origin.decode("latin-1") in known:
            return origin
        if self.guards_origin:
            raise ProxyError(403, FOREIGN_PAGE % origin.decode("latin-1")[:100], "origin_not_allowed")
        return b""

    def _host_allowed(self, value: bytes) -> bool:
        """Whether a Host is one of ours; the last good one is remembered, as clients rarely use two."""
        # A port does not matter: a tunnel or a container's mapping changes it, and no page can choose the name.
        name = value.decode("latin-1").strip().lower()
        bare = name.rpartition(":")[0] if re.search(r":[0-9]*\Z", name) else name
        bare = bare.strip("[]")
        allowed = self.config.allowed_hosts
        good = bare == self.config.host or is_loopback(bare) or bare in allowed or name in allowed or "*" in allowed
        self.last_host = value if good else self.last_host
        return good

    def check_key(self, head: RequestHead) -> ClientKey:
        """The client key that a request shows, in any of the ways that clients of OpenAI, Azure and Anthropic do.

        Raises ProxyError (401).
        """
        index = head.index
        shown_key = index.get(b"authorization", b"")
        if shown_key[:7].lower() == b"bearer ":
            shown_key = shown_key[7:].strip()
        else:
            shown_key = index.get(b"api-key", index.get(b"x-api-key", b""))
        digest, found = key_digest(shown_key), None
        for key in self.config.client_keys:  # all of them, so that the time tells nothing
            if same_digest(digest, key.digest):
                found = key
        if found is None:
            message = "Incorrect API key provided: it is none of this server's keys."
            raise ProxyError(401, message, "invalid_api_key", headers=ASK)
        return found

    # -- routes

    def handle(self, client: ClientConnection, head: RequestHead) -> "Awaitable[None]":
        """Finds the handler of a request; what it returns is to be awaited. Raises ProxyError (401, 404, 405, 415)."""
        if head.method == "OPTIONS":  # before the key: browsers send preflights without one
            split_target(head.target)
            return self._options(client, head)
        handler, path, query = find_route(head.method, head.target, self.config.endpoints)
        client.key = None
        if self.config.client_keys or client.reserve or b"content-encoding" in head.index:
            self._admit(client, head, handler, path)
        request, client.body = ApiRequest(head.method, path, query, head.lines, client.body), b""
        request.request_id, request.upload = client.record.request_id, client.upload
        # The handler hands on what the relay returns: a coroutine around it would be one more frame at each wake.
        answer: "Awaitable[None]" = getattr(self, handler)(client, head, request)
        return answer

    def _admit(self, client: ClientConnection, head: RequestHead, handler: str, path: str) -> None:
        """Refuses who may not come in, and what could not be read. Raises ProxyError (401, 415, 503)."""
        if self.config.client_keys and path != "/status":
            client.key = self.check_key(head)
            client.record.key = client.key.name
        if client.reserve and path != "/status":
            raise ProxyError(*TAKEN, headers=AGAIN)
        coding = head.index.get(b"content-encoding")
        if coding is not None and coding.lower() != b"identity" and handler != "_object":
            raise ProxyError(415, PACKED, "unsupported_encoding")  # to be read it would be unpacked, bombs too

    def check_entry(self, client: ClientConnection, head: RequestHead) -> "tuple[bool, FormScanner | None]":
        """Refuses from its head alone what must not come in, before its body is read.

        Whether the body may pass through, and what looks for a model on the way where it has to name one. Raises
        ProxyError (400, 401, 403, 404, 405, 415).
        """
        client.origin = self.check_doors(head)
        if head.method == "OPTIONS":
            return False, None
        handler, path, _ = find_route(head.method, head.target, self.config.endpoints)
        self._admit(client, head, handler, path)
        kind = head.index.get(b"content-type", b"")
        if is_json(kind):
            return False, None
        if path in FORMS and handler == "_infer":
            return True, FormScanner(kind)
        return handler == "_object", None

    async def _options(self, client: ClientConnection, head: RequestHead) -> None:
        """A CORS preflight, or the plain question what is allowed."""
        client.record.status = 204
        fields = b"Allow: GET, HEAD, POST, OPTIONS\r\n"
        if client.origin:
            # Whatever is asked for: the page may come in, and the routes say what is open (DELETE of a file, say).
            method = head.index.get(b"access-control-request-method", b"GET, POST")
            asked = head.index.get(b"access-control-request-headers", b"*")
            fields += b"Access-Control-Allow-Methods: %b\r\nAccess-Control-Max-Age: 600\r\n" % method
            fields += b"Access-Control-Allow-Headers: %b\r\n" % asked
        client.whole(204, fields, b"")

    async def _status(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> None:
        """Open to all, as balancers have no key; what it shows of the controllers is not."""
        status: "dict[str, Any]" = {"status": "draining" if self.draining else "ok"}
        if "verbose=1" in request.query.split("&"):
            if self.config.client_keys:
                self.check_key(head)
            status.update(describe_pool(self.pool, self.loop.time()), connections=len(self.connections))
            status["upstream_connections"] = {"idle": self.links.idle_count, "active": len(self.links.active)}
        await client.json(status, 503 if self.draining else 200)

    def _chat(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> "Awaitable[None]":
        """Chat completions: what all of this is for."""
        # A key's models are judged by what the client sent, not by what Go's spelling was made into.
        body = request.body
        data, request.body = parse_chat(body, self.config.limits.json_depth)
        request.lines = json_lines(head)
        request.data, request.model, request.stream = data, data["model"], data.get("stream") is True
        request.stateful = data.get("store") is True  # chats are kept only on demand, responses unless told not to
        request.prompt_tokens, request.max_tokens = estimate_prompt(data), answer_limit(data)
        return self._go(client, head, request, body)

    def _infer(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> "Awaitable[None]":
        """Completions, embeddings, responses, moderations, images, audio: through the same scheduler as chats."""
        kind = head.index.get(b"content-type", b"")
        if request.path in FORMS and not is_json(kind):
            read_form(request, kind, INFERENCE[request.path])
            return self._go(client, head, request)
        request.lines = json_lines(head)
        read_input(request, INFERENCE[request.path], self.config.limits.json_depth)
        if request.path.startswith("/responses"):
            previous = request.data.get("previous_response_id")
            if isinstance(previous, str):  # the account that made the one before has the conversation
                request.pinned = self._maker(previous)
            elif any(request.body.find(word) >= 0 for word in TIES):
                request.pinned = self._owner(request, ())
        return self._go(client, head, request, request.body)

    def _object(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> "Awaitable[None]":
        """Files, batches, stored responses ...: what lives in one account goes to the controller that made it."""
        group, *parts = request.path[1:].split("/")
        reads = request.method in ("GET", "HEAD")
        request.inference = False
        if reads and request.path in LISTS and "before=" not in request.query:
            return self._go(client, head, request, answer=self._merge)
        request.stateful = not reads
        names = list(map(urllib.parse.unquote, parts))
        request.pinned = self._owner(request, names)
        request.seeks = reads and not request.pinned
        ids = [name for name in names if name not in NO_IDS]
        if ids and group in OBJECTS and not request.pinned:
            if reads:
                return self._go(client, head, request, answer=functools.partial(self._seek, ids[0][:128]))
            request.pinned = self._maker(ids[0])
        return self._go(client, head, request)

    async def _seek(self, made: str, request: ApiRequest, client: ClientConnection, record: AccessRecord) -> None:
        """Answers with what one account has, and remembers which: a client that has read an object may change it."""
        await self.relay.run(request, client, record)
        if record.status < 300:
            self.relay.remember(made, record.controller)

    def _owner(self, request: ApiRequest, names: "Iterable[str]") -> str:
        """The controller that made the first known one of these objects, and of those that the body speaks of; else "":
        a batch's file has to be in the account of the batch."""
        makers = self.relay.makers
        spoken = re.findall(r'"([\w\-]{4,128})"', request.body[:WHOLE_BYTES].decode("latin-1")) if makers else ()
        return next((makers[name] for name in (*names, *spoken) if name in makers), "")

    def _maker(self, made: str) -> str:
        """The controller that made an object; any, where there is only one. Raises ProxyError (404)."""
        # To ask around would be harmless for reads only: a DELETE that one account refuses may succeed in the next one.
        able = [one.name for one in self.pool.upstreams if not one.controller.chat_only]
        name = self.relay.makers.get(made) or (able[0] if len(able) == 1 else "")
        if name not in able:
            message = "%r lives in one account, and this server does not remember which of %d: it was made elsewhere."
            raise ProxyError(404, message % (made[:64], len(able)), "object_not_known")
        return name

    def _go(
        self,
        client: ClientConnection,
        head: RequestHead,
        request: ApiRequest,
        body: bytes = b"{}",
        answer: "Run | None" = None,
    ) -> "Awaitable[None]":
        """Sends a request on its way, within the limits of its client key. Raises ProxyError (400, 403).

        `body`: the JSON as the client sent it. `answer`: who answers, if not the relay.
        """
        key, record, answer = client.key, client.record, answer or self.relay.run
        record.model = request.model[:MODEL_NAME_CHARS]
        request.wait_s = longest_wait(head.index, self.config.pool.max_wait)
        if key is None:
            return answer(request, client, record)
        check_model_allowed(key, request.model, body)
        request.key, gate = key.name, self.gates.get(key.name)
        return answer(request, client, record) if gate is None else self._pass_gate(gate, request, client, answer)

    async def _pass_gate(self, gate: KeyGate, request: ApiRequest, client: ClientConnection, answer: "Run") -> None:
        """Runs a request, unless its client key has sent too many. Raises ProxyError (429)."""
        # By the estimate, as what it will really cost is known when it is too late to refuse.
        self.pool.estimate(request)
        after_s = gate.enter(request.need, self.loop.time())
        if after_s:
            message = "Rate limit reached for the key %r; its limits are this server's own." % request.key
            raise ProxyError(429, message, "rate_limit_exceeded", headers=retry_fields(after_s))
        try:
            await answer(request, client, client.record)
        finally:
            gate.leave()

    # -- lists of objects

    async def _merge(self, request: ApiRequest, client: ClientConnection, record: AccessRecord) -> None:
        """Answers with one list of the objects of all accounts, as of one that had them all.

        `after` goes on exactly where a page of ours ended, as what each account had shown by then is remembered. Any
        other is an object of one account, whose list alone goes on behind it. Who fails is left out; where all do, the
        error is told that a single account would tell.
        """
        pairs = urllib.parse.parse_qsl(request.query)
        rest = [pair for pair in pairs if pair[0] not in ("after", "limit")]
        query = dict(pairs)
        after, limit = query.get("after", ""), query.get("limit", "")
        # Pages of different lists may end with the same object: whatever chooses the list is part of the memory's key.
        which = (request.path, *map("=".join, sorted(rest)))
        able = [one for one in self.pool.upstreams if not one.controller.chat_only]
        places = self.pages.get((*which, after), {}) if after else {one.name: "" for one in able}
        asked = [one for one in able if one.name in places] if len(able) > 1 else []
        rest.append(("limit", limit))
        calls = [self._page(one, request, [*rest, ("after", places[one.name])], record) for one in asked]
        found = await asyncio.gather(*calls)
        pages = {one.name: page for one, page in zip(asked, found, strict=True) if page is not None}
        if not pages:  # none was asked, or none answered
            record.outcomes.clear()
            request.pinned = self.relay.makers.get(after, "")
            request.seeks = not request.pinned
            await self.relay.run(request, client, record)
            return
        descending = query.get("order", LISTS[request.path]) != "asc"
        shown, more = merge_pages(pages, int(limit) if limit.isdecimal() and len(limit) < 9 else 0, descending)
        data = []
        for item, name in shown:
            self.relay.remember(item["id"], name)  # who lists objects will ask for one of them next
            data.append(item)
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        if more and data:
            keep(self.pages, (*which, last), next_places(places, pages, shown), PAGES_KNOWN)
        await client.json({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})

    async def _page(
        self, upstream: Upstream, request: ApiRequest, query: "list[tuple[str, str]]", record: AccessRecord
    ) -> "tuple[list[dict[str, Any]], bool] | None":
        """The account's objects, and whether there are more of them; None when it fails."""
        since = self.loop.time()
        words = urllib.parse.urlencode([pair for pair in query if pair[1]])
        found = await self._fetch(upstream, ApiRequest("GET", request.path, words, request.lines, b""))
        outcome = "ok" if found is not None else "failed"
        record.outcomes.append((upstream.name, outcome, self.loop.time() - since))
        return None if found is None else (found["data"], found.get("has_more") is True)

    async def _fetch(self, upstream: Upstream, request: ApiRequest) -> "dict[str, Any] | None":
        """An account's list, which counts towards no quota; None, and the log says why, when it fails."""
        try:
            async with asyncio.timeout(MODELS_TIMEOUT_S):
                return await fetch_list(upstream.controller.exchange(request, self.links, uncounted))
        except (UpstreamError, TimeoutError, Untranslatable) as problem:  # or it has no word for such a list
            why = str(problem) or "no answer in time"
            log.warning("%s of %s is not known: %s", request.path[1:], upstream.name, why)
            return None

    # -- the list of models

    async def _list(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> None:
        """All models that somebody here serves, as far as the client's key goes."""
        models = await self._all_models()
        if client.key is not None and client.key.models:
            mine = model_patterns(client.key.models)
            models = [model for model in models if mine.fullmatch(model["id"])]
        await client.json({"object": "list", "data": models})

    async def _model(self, client: ClientConnection, head: RequestHead, request: ApiRequest) -> None:
        """One model. Raises ProxyError (404)."""
        name = request.path[len("/models/") :]
        for model in await self._all_models():
            if model["id"] == name:
                await client.json(model)
                return
        asks = any(
            is_open_ended(seat.upstream.config) and not seat.upstream.controller.chat_only
            for seat in self.pool.seats(name)
        )
        if asks and not leads_out(name):
            # Accounts know models that their lists leave out: previews, snapshots, what was tuned elsewhere.
            request.path = "/models/" + urllib.parse.quote(name, safe="/:")
            request.query, request.model, request.seeks, request.inference = "", name, True, False
            await self._go(client, head, request)
            return
        raise ProxyError(404, "The model %r is served by no controller here." % name[:100], "model_not_found")

    async def _all_models(self) -> "list[dict[str, Any]]":
        """The configured models, and those of the upstreams that have no list; the first of each name.

        An upstream that fails only shortens the list: clients ask for it at their start, and would not come up.
        """
        # What the configuration names comes first: it is what will be asked for, whatever an account calls it.
        found = {name: model_object(name) for name in self.pool.configured_models()}
        asked = [one for one in self.pool.upstreams if is_open_ended(one.config)]
        for one, models in zip(asked, await asyncio.gather(*map(self._models_of, asked)), strict=True):
            for model in models:
                if one.serves(model["id"]):
                    found.setdefault(model["id"], model)
        for name, model_name in self.pool.aliases.items():
            if self.pool.is_served(model_name):
                found[name] = {**model_object(name), "root": model_name}  # as vLLM says it of its own
        return [found[name] for name in sorted(found)]

    async def _models_of(self, upstream: Upstream) -> "list[dict[str, Any]]":
        """An upstream's models, asked at most every few minutes; the last known ones while it fails."""
        # Chat front ends ask at every page view; each would cost a request of every account.
        until, models = self.models.get(upstream.name, (0.0, []))
        if self.loop.time() < until:
            return models
        found = await self._fetch(upstream, ApiRequest("GET", "/models", "", b"Accept: application/json\r\n", b""))
        if found is not None:  # Anthropic's have a `type`, and no `object`
            models = [{**model_object(model["id"]), **model, "object": "model"} for model in found["data"]]
        again_s = MODELS_TIMEOUT_S if found is None else MODELS_TTL_S
        self.models[upstream.name] = (self.loop.time() + again_s, models)
        return models


# ==== 15. Command line ====
# Flags, start, signals, exit status: 0 after a drain, 2 for a configuration that cannot be used, 1 for an address that
# cannot be listened on and for output that cannot be written. A start is measured: what few starts need is imported
# where it is needed.


USAGE = """usage: chatgpt_apiserver.py [flags]

Several rate-limited OpenAI-style accounts behind one endpoint.

  --config_file FILE  the configuration
  --config_path DIR   a folder to look for it in
  --host HOST         address to listen on (default 127.0.0.1)
  --port PORT         port to listen on (default 8080)
  --check             validate, print a summary without secrets, exit
  --demo              run without any key, on echo controllers
  --version           print the version, exit
  --help, -h          print this, exit

Long flags may also be written with dashes: --config-file, --config-path."""
# Underscores as the Go original has them, dashes as everybody types them.
FLAGS = ("config_file=", "config-file=", "config_path=", "config-path=", "host=", "port=")
SWITCHES = ("check", "demo", "version", "help")


def parse_args(argv: "list[str]") -> "dict[str, str]":
    """The flags that are set, by their names with underscores. Raises ConfigError.

    By getopt: argparse brings shutil and the compressors along, and takes 12 ms of a start, which has about 90.
    """
    try:
        found, rest = getopt.getopt(argv, "h", [*FLAGS, *SWITCHES])
    except getopt.GetoptError as problem:
        known = [flag.rstrip("=") for flag in (*FLAGS, *SWITCHES)]
        hint = nearest(problem.opt, known).replace("'", "'--", 1) if "not recognized" in problem.msg else ""
        if len(problem.opt) == 1:
            hint = "long flags begin with two dashes;"
        raise ConfigError(" ".join(filter(None, ("%s;" % problem, hint, "--help shows every flag")))) from None
    if rest:
        raise ConfigError("unexpected argument %r; --help shows every flag" % rest[0])
    return {"help" if name == "-h" else name[2:].replace("-", "_"): value for name, value in found}


def raise_open_files() -> float:
    """Raises the limit on open files as far as allowed, as a stream takes two; what it is then."""
    # Shells and systemd give 1024 for fear of select(), which is not used here.
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError) as problem:  # macOS names no limit and then refuses to set none
        log.warning("open files stay limited to %d: %s", soft, problem)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def trim_heap() -> None:
    """Gives the system back what the start took and no longer needs, 16 MB of 43, where the C library is glibc.

    That has its free memory in the midst of what is used, and looks only at the end by itself. Takes 4 ms.
    """
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    except Exception:  # no ctypes, another C library, a sandbox without memory that is executable: it is only memory
        pass


def fit_connections(server: Server, files: float) -> None:
    """Bounds the connections by the open files, two each: without one for the upstream a client is of no use."""
    # Let in, it would wait for a descriptor that the next client takes: refused, it may try another server. The other
    # half is for upstream connections, the idle ones among them. (Infinity // 2 is no number.)
    most = files if files == math.inf else max(1.0, (files - SPARE_FILES) // 2)
    server.most = server.links.most = most
    if server.most < server.config.limits.connections:
        log.warning("open files are limited to %d: at most %d clients at once", files, server.most)


def warn_if_open(config: Config, host: str, port: int) -> None:
    """Tells loudly that a listener is open to all."""
    # Not an error: in a container every address is public, and something in front may ask for keys.
    if not is_loopback(host) and not config.client_keys:
        where = "%s:%d" % (without_keys(host), port)
        log.warning("ANYONE WHO CAN REACH %s CAN SPEND THESE KEYS: no client_keys", where)


def reload_config(current: Config, load: "Callable[[], Config]") -> "Config | None":
    """What `load` finds now, once it is known to be usable as a whole; None, and the log says why, when it is not."""
    # Certificates are renewed at any time, by others: whether key and certificate fit is part of being usable.
    try:
        new = load()
        if new.tls.cert:
            server_tls(new)
    except ConfigError as problem:
        log.error("reload: the old configuration stays: %s", problem)
        return None
    redactor.watch([*secrets_of(current), *secrets_of(new)])  # what is under way may still show the old ones
    log.setLevel(new.log.level.upper())
    for line in [*diff_config(current, new)] or ["nothing changed"]:
        log.info("reload: %s", line)
    if current.client_keys:
        warn_if_open(new, current.host, current.port)  # the address that is listened on
    return new


async def serve(config: Config, load: "Callable[[], Config]") -> None:
    """Runs the server until a signal asks it to stop; SIGHUP makes it `load` again.

    Raises OSError for an address that cannot be listened on, ConfigError for a certificate that does not fit its key.
    """
    loop = asyncio.get_running_loop()
    loop.time = time.monotonic  # type: ignore[method-assign]  # asyncio's is a Python function around it; 8 a request
    server = Server(config, loop)
    stop = asyncio.Event()

    def ask() -> None:
        # Who asks twice does not want to wait for answers, nor for what else the first may have begun.
        if stop.is_set():
            log.warning("second signal: closing now")
            os._exit(1)
        stop.set()

    def reload() -> None:
        new = reload_config(server.config, load)
        if new is not None:
            server.reconfigure(new)

    # Before the listener, so that a supervisor may signal as soon as it can connect.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    loop.add_signal_handler(signal.SIGHUP, reload)
    for host, port in await server.start():
        log.info("listening on %s", address(config, host, port))
    # The listener is open; what follows delays nobody's first connection, only its first answer.
    fit_connections(server, raise_open_files())
    shrink_tls_buffers()
    gc.enable()
    gc.collect()
    trim_heap()
    gc.set_threshold(20_000, 20, 50)  # requests make few cycles; the default looks for them every few requests
    gc.freeze()  # what start-up made lives as long as the process
    await stop.wait()
    log.info("stopping: %d connections open", len(server.connections))
    await server.stop()
    log.info("stopped")
    if server.lookups.under_way:  # Python would wait for its thread, without a resolver for half a minute
        console.send(LOG_LAST_MS)
        os._exit(0)


def tell(text: str, status: int = 0) -> int:
    """Prints what was asked for, or what went wrong where `status` is not 0; the exit status."""
    file = sys.stderr if status else sys.stdout
    try:
        print(text, file=file, flush=True)
    except (OSError, UnicodeError) as problem:
        # What stays in the buffer would be tried again at the end, and told as an error of Python's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        if not status:  # who has read enough, as `| head` has, needs no word
            return 1 if isinstance(problem, BrokenPipeError) else tell("cannot write: %s" % problem, 1)
    return status


def run(config: Config, load: "Callable[[], Config]") -> int:
    """Serves; the exit status, once what is left of the log has found its reader or none."""
    try:
        asyncio.run(serve(config, load))
    except (OSError, UnicodeError) as error:  # the latter for a name that DNS could not hold
        return tell("cannot listen on %s:%d: %s" % (without_keys(config.host), config.port, error), 1)
    finally:
        console.send(LOG_LAST_MS)
    return 0


def main(argv: "list[str] | None" = None) -> int:
    """Runs the command line; the exit status.

    What goes wrong before the log is set up is told on stderr as one message, never as a traceback: it is the user's to
    mend. All checks of --check are those of a start.
    """
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        if "help" in args or "version" in args:
            return tell(USAGE if "help" in args else "chatgpt_apiserver " + __version__)
        flags = {"host": args.get("host"), "port": args.get("port")}
        named = (args.get("config_file", ""), args.get("config_path", ""))
        load = functools.partial(load_config, *named, flags, os.environ, "demo" in args)
        config = load()
        if "check" in args:
            if config.tls.cert:
                server_tls(config)
            return tell("\n".join(["good: " + config.source, *describe(config)]))
        set_up_logging(config)
        for line in describe(config)[:-1]:  # the address is told once it is open
            log.info("%s", line)
        warn_if_open(config, config.host, config.port)
        return run(config, load)
    except ConfigError as error:
        return tell(str(error), 2)


def leave_script() -> NoReturn:
    """Leaves the script by an exception, and runs `main` where that arrives: the process ends with its status.

    CPython keeps what its parser made of a script, 16 MB of this one, until the script's last line has returned. When
    `sys.excepthook` is called it is freed, and all else is as in that line: the main thread, signals, new threads. Not
    so at exit, by atexit or a thread that is waited for: there asyncio may start no lookup of a name any more.
    """
    hook = sys.excepthook

    def run_main(*_: object) -> None:
        sys.excepthook = hook
        try:
            sys.exit(main())
        except (Exception, KeyboardInterrupt) as error:
            hook(type(error), error, error.__traceback__)

    # Until `serve` listens to it. A KeyboardInterrupt on the way to the hook would be told as the hook's error.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = run_main
    raise RuntimeError("sys.excepthook goes on")


if __name__ == "__main__":
    # Whoever runs the script for Python, as -m, a debugger and a profiler do, would see the exception, and so would who
    # asked for a prompt after it (-i).
    if sys.implementation.name == "cpython" and sys._getframe().f_back is None and not sys.flags.inspect:
        leave_script()
    sys.exit(main())
