"""The configuration: where it is found, what it may say, and that no message gives a secret away."""

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-proj-SecretSecret-wxyz"
SHORT = "hunter2-hunter2"
GOOD: dict[str, Any] = {"controllers": [{"type": "openai", "config": {"api_key": KEY}}]}


def parse(env: "dict[str, str] | None" = None, **more: Any) -> app.Config:
    """A configuration with one good controller and `more`."""
    return app.parse_config(dict(GOOD, **more), "c.json", env or {})


def account(env: "dict[str, str] | None" = None, **config: Any) -> app.AccountConfig:
    """The account of a controller with this `config`."""
    return parse(env, controllers=[{"config": dict({"api_key": KEY}, **config)}]).controllers[0].account


def load(env: "dict[str, str] | None" = None, file: str = "", path: str = "", **flags: Any) -> app.Config:
    """The configuration of a start."""
    return app.load_config(file, path, flags, env or {})


def write(path: Path, data: Any = None) -> str:
    """A configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(GOOD if data is None else data), encoding="utf-8")
    return str(path)


def one(**more: Any) -> dict[str, Any]:
    """A top level with one controller that has `more`."""
    return {"controllers": [dict({"type": "openai", "config": {"api_key": KEY}}, **more)]}


def test_defaults() -> None:
    """Everything but the controllers has a default."""
    config = parse()
    assert (config.host, config.port, config.pool.type, config.endpoints) == (
        "127.0.0.1",
        8080,
        "balanced",
        ("inference",),
    )
    first = config.controllers[0]
    assert (first.name, first.weight, first.models, first.account.base_url) == (
        "openai-1",
        1,
        (),
        "https://api.openai.com/v1",
    )


MISTAKES: list[tuple[Any, str, str]] = [  # data, path, what else the message says
    ([], "top level", "found .*, allowed: an object"),
    ({}, "controllers", "at least one controller"),
    ({"controllers": []}, "controllers", "found nothing, allowed: a list of at least one controller"),
    ({"controllers": {}}, "controllers", "found an object, allowed: a list of objects"),
    ({"controllers": "openai"}, "controllers", "found a string, allowed: a list of objects"),
    (one(config={"api_key": [KEY]}), "controllers[0].config.api_key", "found a list, allowed: a string"),
    (one(config={"api_key": 1.5}), "controllers[0].config.api_key", "found a number, allowed: a string"),
    (one(config={"api_key": True}), "controllers[0].config.api_key", "found true or false, allowed: a string"),
    (one(config={"api_key": "sk\x00"}), "controllers[0].config.api_key", "found a character outside printable ASCII,"),
    (one(config={"api_key": ""}), "controllers[0].config.api_key", "found nothing, allowed: an API key"),
    (one(name="nothing\n"), "controllers[0].name", "found a character that cannot be printed,"),
    (dict(GOOD, pool={"rescue_after": -1}), "pool.rescue_after", 'found -1, allowed: a number from 0 to 3600, or "auto"'),
    (dict(GOOD, client_keys=[{"name": "x"}]), "client_keys[0].key", "found nothing usable, allowed: a key"),
    ({"controllers": ["x"]}, "controllers[0]", "an object"),
    (dict(GOOD, prot=1), "prot", "unknown key; did you mean 'port'"),
    (dict(GOOD, zzzzzz=1), "zzzzzz", "unknown key; allowed here: .*controllers"),
    (dict(GOOD, port="http"), "port", 'found "http", allowed: a whole number from 0 to 65535'),
    (dict(GOOD, port=True), "port", "found true"),
    (dict(GOOD, port=65536), "port", "found 65536"),
    (dict(GOOD, port=80.5), "port", "found 80.5"),
    (dict(GOOD, port="80a"), "port", 'found "80a"'),
    (dict(GOOD, host=1), "host", "found 1, allowed: a string"),
    (dict(GOOD, host="a\nb"), "host", "a character that cannot be printed"),
    (one(name="\ud800"), "controllers[0].name", "a character that cannot be printed"),
    (one(models=["a\nb"]), "controllers[0].models[0]", "a character that cannot be printed"),
    (one(model_map={"a\nb": "c"}), "controllers[0].model_map", "a character that cannot be printed"),
    (dict(GOOD, pool={"fallbacks": {"\ud800": ["b"]}}), "pool.fallbacks", "a character that cannot be printed"),
    (dict(GOOD, **{"a\nb": 1}), r"a\nb", "unknown key"),
    (dict(GOOD, pool={"type": "balancd"}), "pool.type", "found \"balancd\".*did you mean 'balanced'"),
    (dict(GOOD, pool={"max_wait": -1}), "pool.max_wait", "found -1, allowed: a number from 0 to 3600"),
    (dict(GOOD, pool={"max_wait": float("nan")}), "pool.max_wait", "allowed: a number"),
    (dict(GOOD, pool={"max_queue": 1.5}), "pool.max_queue", "found 1.5, allowed: a whole number"),
    (dict(GOOD, pool={"rescue_after": "soon"}), "pool.rescue_after", 'found "soon"'),
    (dict(GOOD, pool={"maxwait": 3}), "pool.maxwait", "did you mean 'max_wait'"),
    (dict(GOOD, pool=[]), "pool", r"found \[\], allowed: an object"),
    (dict(GOOD, pool={"affinity": 1}), "pool.affinity", "found 1, allowed: true or false"),
    (dict(GOOD, pool={"affinity": "yes"}), "pool.affinity", 'found "yes"'),
    (dict(GOOD, pool={"afinity": True}), "pool.afinity", "did you mean 'affinity'"),
    (dict(GOOD, pool={"aliases": {"fast": ["m"]}}), "pool.aliases.fast", "found a list, allowed: a non-empty string"),
    (dict(GOOD, pool={"aliases": {"m": "m"}}), "pool.aliases.m", 'found "m", allowed: another model'),
    (dict(GOOD, pool={"fallbacks": ["m"]}), "pool.fallbacks", "found a list, allowed: an object"),
    (dict(GOOD, pool={"fallbacks": {"a": "b"}}), "pool.fallbacks.a", 'found "b", allowed: a list of non-empty'),
    (dict(GOOD, pool={"fallbacks": {"a": ["b", "a"]}}), "pool.fallbacks.a", "another model"),
    (dict(GOOD, pool={"context_fallbacks": {"a": [1]}}), "pool.context_fallbacks.a[0]", "found 1, allowed: a non-empty string"),
    (dict(GOOD, pool={"context_fallbacks": {"a": ["a"]}}), "pool.context_fallbacks.a", "another model"),
    (dict(GOOD, endpoints=["inference", "all"]), "endpoints[1]", "found \"all\", allowed: inference"),
    (dict(GOOD, endpoints="*"), "endpoints", "a list"),
    (dict(GOOD, allowed_hosts=[1]), "allowed_hosts[0]", "found 1, allowed: a non-empty string"),
    (dict(GOOD, allowed_hosts="a"), "allowed_hosts", 'found "a", allowed: a list of non-empty strings'),
    (dict(GOOD, cors={"allow_origin": []}), "cors.allow_origin", "did you mean 'allow_origins'"),
    (dict(GOOD, log={"level": "loud"}), "log.level", "debug | info"),
    (dict(GOOD, log={"format": "xml"}), "log.format", "text | json"),
    (dict(GOOD, tls={"cert": "nowhere.pem"}), "tls.cert", "an existing file"),
    (dict(GOOD, limits={"body_bytes": 0}), "limits.body_bytes", "found 0"),
    (dict(GOOD, limits={"bodybytes": 1}), "limits.bodybytes", "did you mean 'body_bytes'"),
    (dict(GOOD, client_keys=[{"name": "a"}]), "client_keys[0].key", "a key"),
    (dict(GOOD, client_keys=[{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]), "client_keys[1].name", 'found "a"'),
    (dict(GOOD, client_keys=[{"name": "a", "key": "k"}, {"key": "k"}]), "client_keys[1].key", "the key of a"),
    (dict(GOOD, client_keys=[{"key": "sha256:12"}]), "client_keys[0].key", "64 hex digits"),
    (dict(GOOD, client_keys=[{"key": "k", "limits": {"rpm": "9"}}]), "client_keys[0].limits.rpm", 'found "9"'),
    (one(type="opnai"), "controllers[0].type", "did you mean 'openai'"),
    (one(type="grok"), "controllers[0].type", r"openai | .*echo | a vendor that README.md names \(did you mean 'groq'\?\)"),
    (one(type="zzz"), "controllers[0].type", "a vendor that README.md names$"),
    (one(type="azure"), "controllers[0].config.base_url", 'found nothing, allowed: https://NAME.openai.azure.com'),
    (one(type="azure", config={"base_url": "https://r.example"}), "controllers[0].config.api_key", "an API key"),
    (
        one(type="azure", config={"api_key": KEY, "base_url": "https://r.example/openai/deployments/d"}),
        "controllers[0].config.base_url",
        "https://NAME.openai.azure.com",
    ),
    (
        one(type="azure", config={"api_key": KEY, "base_url": "https://r.example", "api_version": "1&a=b"}),
        "controllers[0].config.api_version",
        "a date such as",
    ),
    (one(config={"api_key": KEY, "api_version": "2024-10-21"}), "controllers[0].config.api_version", "unknown key"),
    (one(type="groq", config={}), "controllers[0].config.api_key", "an API key"),
    (one(type="ollama", config={"region": "x"}), "controllers[0].config.region", "unknown key"),
    (one(type="bedrock"), "controllers[0].config.region", 'found "", allowed: the region that is part of the address'),
    (one(type="cloudflare", config={"api_key": KEY, "account": "a/b"}), "controllers[0].config.account", "letters, digits"),
    (one(wieght=3), "controllers[0].wieght", "did you mean 'weight'"),
    (one(weight=0), "controllers[0].weight", "found 0, allowed: a whole number from 1"),
    (one(weight="5"), "controllers[0].weight", 'found "5"'),
    (one(models="gpt"), "controllers[0].models", "a list of non-empty strings"),
    (one(model_map={"a": ""}), "controllers[0].model_map.a", 'found "", allowed: a non-empty string'),
    (one(limits={"rmp": 5}), "controllers[0].limits.rmp", "did you mean 'rpm'"),
    (one(limits={"burst_s": 61}), "controllers[0].limits.burst_s", "found 61"),
    (one(timeouts={"connect": 0}), "controllers[0].timeouts.connect", "found 0"),
    (one(config={"api_key": ""}), "controllers[0].config.api_key", "an API key"),
    (one(config={"api_key": 5}), "controllers[0].config.api_key", "a string"),
    (
        one(config={"api_key": "$NOPE"}),
        "controllers[0].config.api_key",
        r'found "\$NOPE", allowed: a variable that is set; NOPE is not set: export NOPE=\.\.\., or try --demo',
    ),
    (one(config={"api_key": "${NOPE}"}), "controllers[0].config.api_key", "NOPE is not set"),
    (one(config={"api_key": "file:nowhere"}), "controllers[0].config.api_key", "readable file"),
    (one(config={"api_key": "file:\0"}), "controllers[0].config.api_key", "readable file .*null byte"),
    (one(config={"api_key": "a\r\nb"}), "controllers[0].config.api_key", "printable ASCII"),
    (one(config={"api_key": KEY, "auth_header": "Host"}), "controllers[0].config.auth_header", 'found "Host"'),
    (one(config={"api_key": KEY, "auth_header": ""}), "controllers[0].config.auth_header", "a header name"),
    (one(config={"api_key": KEY, "auth_heder": "X"}), "controllers[0].config.auth_heder", "mean 'auth_header'"),
    (one(config={"api_key": KEY, "auth_scheme": "a b"}), "controllers[0].config.auth_scheme", "one word"),
    (one(config={"api_key": KEY, "auth_scheme": "é"}), "controllers[0].config.auth_scheme", "printable ASCII"),
    (one(config={"api_key": KEY, "chat_path": "chat"}), "controllers[0].config.chat_path", 'found "chat", allowed: /path'),
    (one(config={"api_key": KEY, "chat_path": "/a?b"}), "controllers[0].config.chat_path", "without blanks, query"),
    (one(config={"api_key": KEY, "chat_path": "/a b"}), "controllers[0].config.chat_path", "without blanks"),
    (one(config={"api_key": KEY, "drop_params": "user"}), "controllers[0].config.drop_params", "a list of non-empty"),
    (one(config={"api_key": KEY, "drop_params": ["model"]}), "controllers[0].config.drop_params", "anything but model"),
    (one(config={"api_key": KEY, "rename_params": ["a"]}), "controllers[0].config.rename_params", "found a list"),
    (one(config={"api_key": KEY, "rename_params": {"a": 1}}), "controllers[0].config.rename_params.a", "found 1, allowed: a non-empty string"),
    (one(config={"api_key": KEY, "rename_params": {"a": "stream"}}), "controllers[0].config.rename_params", "anything but"),
    (
        one(config={"api_key": KEY, "rename_params": {"a": "c", "b": "c"}}),
        "controllers[0].config.rename_params",
        'found "c", allowed: each new name once',
    ),
    (one(config={"api_key": KEY, "extra_body": [1]}), "controllers[0].config.extra_body", "an object"),
    (one(config={"api_key": KEY, "extra_body": {"a": b""}}), "controllers[0].config.extra_body", "found an object.* JSON"),
    (one(config={"api_key": KEY, "extra_body": {"a": float("nan")}}), "controllers[0].config.extra_body", "JSON values"),
    (one(config={"api_key": KEY, "extra_body": {"stream": 1}}), "controllers[0].config.extra_body", "anything but"),
    (one(type="echo", config={"auth_header": "X"}), "controllers[0].config.auth_header", "unknown key; allowed here"),
    (one(config={"apikey": KEY}), "controllers[0].config.apikey", "unknown key; did you mean 'api_key'"),
    (dict(GOOD, Prot=1), "Prot", "unknown key; did you mean 'port'"),
    (dict(GOOD, api_key=KEY), "api_key", r"unknown key; its place is controllers\[\].config$"),
    (one(api_key=KEY), "controllers[0].api_key", r"unknown key; its place is controllers\[\].config$"),
    (one(config={"api_key": KEY, "models": []}), "controllers[0].config.models", r"place is controllers\[\] or client_keys"),
    (dict(GOOD, pool={"drain_delay": 1}), "pool.drain_delay", "unknown key; its place is the top level"),
    (dict(GOOD, max_wait=5), "max_wait", "unknown key; its place is pool$"),
    (one(rpm=5), "controllers[0].rpm", r"unknown key; its place is controllers\[\].limits or client_keys\[\].limits"),
    (one(type="anthropic", config={"rate_codes": []}), "controllers[0].config.rate_codes", "unknown key; allowed here"),
    (one(type="OpenAI"), "controllers[0].type", "did you mean 'openai'"),
    (dict(GOOD, log={"level": "INFO"}), "log.level", "did you mean 'info'"),
    (one(config={"api_key": "Bearer sk-x"}), "controllers[0].config.api_key", "found a key with blanks.*the key alone"),
    (one(config={"api_key": '"sk-x"'}), "controllers[0].config.api_key", "found a key with blanks or quotation marks"),
    (one(type="anthropic", config={"api_key": "'sk-x'"}), "controllers[0].config.api_key", "found a key with blanks"),
    (one(config={"api_key": "${A:-b}"}), "controllers[0].config.api_key", r"found \$\{ and more than a name, allowed: a lit"),
    (one(config={"api_key": "${A"}), "controllers[0].config.api_key", r"found \$\{ and more than a name"),
    (one(config={"api_key": KEY, "project": "$P"}), "controllers[0].config.project", r'found "\$P", allowed: the text'),
    (one(models=["a", "${M}"]), "controllers[0].models[1]", r'found "\$\{M\}", allowed: the text itself'),
    (
        one(config={"api_key": KEY, "base_url": "https://a/v1/chat/completions/"}),
        "controllers[0].config.base_url",
        "allowed: the address without /chat/completions, which is put behind it",
    ),
    (
        one(type="anthropic", config={"api_key": KEY, "base_url": "https://a/v1/messages"}),
        "controllers[0].config.base_url",
        "allowed: the address without /messages",
    ),
    *((dict(GOOD, host=host), "host", "allowed: a name or an address of this machine, without scheme and port") for host in
      ("127.0.0.1:80", "http://a", "a b", "*", "[::1]:80", "[a]", "::1]", "a/b")),
    *((dict(GOOD, cors={"allow_origins": ["*", one]}), "cors.allow_origins[1]", "allowed: scheme://host") for one in
      ("https://a.example/", "a.example", "https://*.a.example", "https://a/b", "//a", "https:// a")),
    *((dict(GOOD, allowed_hosts=["a", one]), "allowed_hosts[1]", "allowed: a host with or without port") for one in
      ("https://a.example", "*.a.example", "a/", "a b")),
    ({"controlers": []}, "controlers", "unknown key; did you mean 'controllers'"),
    (one(config={"api_key": KEY, "base_ulr": ""}), "controllers[0].config.base_ulr", "did you mean 'base_url'"),
    (one(config={"api_key": KEY, "base_url": "ftp://a"}), "controllers[0].config.base_url", "http://host"),
    (one(config={"api_key": KEY, "base_url": "http://"}), "controllers[0].config.base_url", "http://host"),
    (one(config={"api_key": KEY, "base_url": "http://a:x"}), "controllers[0].config.base_url", "http://host"),
    (one(config={"api_key": KEY, "base_url": "http://u:p@a"}), "controllers[0].config.base_url", "http://host"),
    (one(config={"api_key": KEY, "base_url": "http://a?b"}), "controllers[0].config.base_url", "http://host"),
    (one(config={"api_key": KEY, "proxy": "socks5://a"}), "controllers[0].config.proxy", "http://"),
    (one(config={"api_key": KEY, "ca_file": "nowhere"}), "controllers[0].config.ca_file", "an existing file"),
    (one(config={"api_key": KEY, "headers": {"a b": "c"}}), "controllers[0].config.headers.a b", "a header name"),
    (one(config={"api_key": KEY, "headers": {"Host": "c"}}), "controllers[0].config.headers.Host", "a header name"),
    (one(config={"api_key": KEY, "headers": {"A": "b\n c"}}), "controllers[0].config.headers.A", "printable ASCII"),
    (one(type="echo"), "controllers[0].config.api_key", "unknown key; allowed here: delay"),
    (one(config_file="x.json"), "controllers[0].config_file", "not both"),
    ({"controllers": [{"config_file": "x.json"}]}, "controllers[0].config_file", "an existing file"),
    ({"controllers": one(name="a")["controllers"] * 2}, "controllers[1].name", "no other controller has"),
    (
        {"controllers": one(quota_group="g")["controllers"] + one(quota_group="g", limits={"rpm": 1})["controllers"]},
        "controllers[1].limits",
        "same quota_group",
    ),
]


def test_what_only_looks_like_a_mistake() -> None:
    """Brackets of an IPv6 address, origins of apps, ports of hosts, and keys that carry their own scheme are fine."""
    account = {"api_key": "Key of mine", "auth_header": "Authorization", "auth_scheme": "", "headers": {"X": "$$x"}}
    data = {
        **one(config={**account, "base_url": "https://a/chat", "proxy": "http://$u:p@a:1"}),
        "host": "[::1]",
        "cors": {"allow_origins": ["null", "*", "https://a.example:8443", "capacitor://localhost", "app://Obsidian.md"]},
        "allowed_hosts": ["A.example:80", "::1", "[::1]:80", "*"],
    }
    found = app.parse_config(data, "c.json", {})
    assert found.host == "::1" and found.allowed_hosts == ("a.example:80", "::1", "[::1]:80", "*")
    assert found.cors.allow_origins[-1] == "app://Obsidian.md"
    for host in ("", "0.0.0.0", "::", "fe80::1%eth0", "my_host.local"):
        assert app.parse_config(dict(GOOD, host=host), "c.json", {}).host == host


@pytest.mark.parametrize(("data", "path", "words"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_mistakes(data: Any, path: str, words: str) -> None:
    """One error names the file, the path, what was found and what is allowed, and gives no secret away."""
    with pytest.raises(app.ConfigError, match=words.replace("|", r"\|")) as caught:
        app.parse_config(data, "dir/c.json", {})
    message = str(caught.value)
    assert message.startswith("dir/c.json: %s: " % path)
    assert "\n" not in message
    assert "Secret" not in message
    assert "u:p" not in message


@pytest.mark.parametrize(
    "data",
    [
        dict(GOOD, client_keys=[SHORT]),
        dict(GOOD, client_keys=SHORT),
        dict(GOOD, client_keys={"key": SHORT}),
        {"controllers": [SHORT]},
        {"controllers": {"config": {"api_key": SHORT}}},
        one(config=SHORT),
        one(config=[SHORT]),
        one(config={"api_key": [SHORT]}),
        one(config={"api_key": KEY, "headers": SHORT}),
        one(config={"api_key": KEY, "extra_body": SHORT}),
        one(config={"api_key": KEY, "extra_body": {"stream": SHORT}}),
        one(config={"api_key": KEY, "headers": [SHORT]}),
        one(config={"api_key": KEY, "proxy": "socks5://u:%s@a" % SHORT}),
        one(config={"api_key": KEY, "proxy": SHORT}),
        one(config={"api_key": KEY, "base_url": "http://u:%s@a" % SHORT}),
        one(config={"api_key": KEY, "base_url": "http://a?key=" + SHORT}),
        one(config={"api_key": "\x00" + SHORT}),
    ],
)
def test_no_message_shows_a_misplaced_secret(data: Any) -> None:
    """A secret in the wrong place or shape is not repeated by the error that says so."""
    with pytest.raises(app.ConfigError) as caught:
        app.parse_config(data, "c.json", {})
    assert SHORT not in str(caught.value)


PASTED = (  # as vendors make them
    "sk-abc123def456",
    "sk-proj-Ab_Cd-EfGhIjKlMnOp",
    "sk-ant-api03-AbCdEf-GhIj",
    "gsk_AbCdEfGhIjKlMnOpQrSt",
    "xai-AbCdEfGhIjKlMnOpQrSt",
    "AIzaSyAbCdEfGhIj-KlMnOpQr_St",
    "0a1b2c3d4e5f60718293a4b5c6d7e8f9",
    "550e8400-e29b-41d4-a716-446655440000",
    "0a1b2c3d4e5f6071.AbC1dEf2GhI3jKl4",
    "Bearer letters",
)


@pytest.mark.parametrize("key", PASTED)
@pytest.mark.parametrize(
    "place",
    [
        lambda key: (one(type=key), {}, {}),
        lambda key: (one(config={"api_key": KEY, "base_url": key}), {}, {}),
        lambda key: (one(config={"api_key": KEY, "auth_header": key + ":"}), {}, {}),
        lambda key: (one(config={"api_key": KEY, key: ""}), {}, {}),
        lambda key: (one(config={"api_key": "file:" + key}), {}, {}),
        lambda key: (one(**{key: 1}), {}, {}),
        lambda key: ({"controllers": one(name=key)["controllers"] * 2}, {}, {}),
        lambda key: (dict(GOOD, client_keys=[{"name": key, "key": "k"}, {"key": "k"}]), {}, {}),
        lambda key: (dict(GOOD, pool={"fallbacks": {key: [key]}}), {}, {}),
        lambda key: (GOOD, {"CHATGPT_APISERVER_PORT": key}, {}),
        lambda key: (GOOD, {"CONFIG_PATH": key}, {}),
        lambda key: (GOOD, {}, {"port": key}),
    ],
)
def test_no_message_shows_what_looks_like_a_key(tmp_path: Path, place: Any, key: str) -> None:
    """A key in any place where none belongs, as a value, a name or a path, is shown by its last letters at most."""
    data, env, flags = place(key)
    with pytest.raises(app.ConfigError) as caught:
        load(env, "" if "CONFIG_PATH" in env else write(tmp_path / "c.json", data), **flags)
    assert key[:-4] not in str(caught.value) and "…" in str(caught.value)


@pytest.mark.parametrize("text", ["nowhere", "file:a/b", "http://user:%s@host" % SHORT, "sk-abc123def456"])
def test_no_message_shows_a_key_among_flags(text: str) -> None:
    """Neither a file's name, nor a flag that nobody knows, nor an argument."""
    for call in (lambda: load(file=text), lambda: app.parse_args([text]), lambda: app.parse_args(["--" + text])):
        with pytest.raises(app.ConfigError) as caught:
            call()
        assert SHORT not in str(caught.value) and "abc123" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "openia",
        "8o80",
        "xai-1",
        "sk-1",
        "https://team-a.openai.azure.com/openai/v1",
        "gpt-4.1-mini-2025-04-14",
        "Meta-Llama-3.1-405B-Instruct-Turbo",
        "qwen3-235b-a22b-2507",
        "/run/secrets/..2024_11_27_08.1234567890/c.json",
        "/nix/store/0a1b2c3d4e5f60718293-config/c.json",
        "controllers[12].config.rename_params",
        app.NOTHING_TO_RUN,
    ],
)
def test_ordinary_mistakes_are_shown(text: str) -> None:
    """Words, models, hosts and paths are no keys: a message that hid them would not help."""
    assert str(app.ConfigError(text)) == text


def test_a_change_shows_no_key() -> None:
    """Nor does the log of a reload, where a key stands in a place that takes any text."""
    assert told(host=PASTED[0]) == ['host: "127.0.0.1" -> "sk-…f456" (needs a restart)']


def test_tls_needs_both(tmp_path: Path) -> None:
    """A certificate without its key is a mistake."""
    write(tmp_path / "server.pem", "x")
    with pytest.raises(app.ConfigError, match="tls: found one of cert and key, allowed: both or none"):
        app.parse_config(dict(GOOD, tls={"cert": "server.pem"}), str(tmp_path / "c.json"), {})


@pytest.mark.parametrize("text", ["", "{", '{"port": 1,}', '{"port":1,"port":2}', "[" * 100_000, "[1]", "\udcff"])
@pytest.mark.parametrize("name", ["c.json", "c.toml"])
def test_broken_files(tmp_path: Path, name: str, text: str) -> None:
    """A file that cannot be read is one error that names it, whatever is wrong with it."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(app.ConfigError) as caught:
        load(file=str(path))
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_harmless(tmp_path: Path) -> None:
    """Windows editors write one."""
    assert load(file=write(tmp_path / "c.json", "\ufeff" + json.dumps(GOOD))).port == 8080


def test_toml(tmp_path: Path) -> None:
    """TOML says the same as JSON."""
    text = 'port = 9001\n[pool]\ntype = "random"\n[[controllers]]\nconfig = { api_key = "%s" }\nweight = 3\n' % KEY
    config = load(file=write(tmp_path / "c.toml", text))
    assert (config.port, config.pool.type, config.controllers[0].weight) == (9001, "random", 3)
    assert config.controllers[0].account.api_key.reveal() == KEY


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hit wins: flag, environment, folders; each is found once the one before it is gone."""
    monkeypatch.chdir(tmp_path)
    flag, env_file, old_file = (write(tmp_path / name) for name in ("flag.json", "env.json", "old.json"))
    name = "chatgpt-apiserver.json"
    places = ["by-flag", "by-env", "by-old", ".", ".config", "config"]
    for place in places:
        write(tmp_path / place / name)
    env = {
        "CHATGPT_APISERVER_CONFIG_FILE": env_file,
        "CONFIG_FILE": old_file,
        "CHATGPT_APISERVER_CONFIG_PATH": "by-env",
        "CONFIG_PATH": "by-old",
        "OPENAI_API_KEY": KEY,
    }
    assert load(env, flag, "by-flag").source == flag
    assert load(env, "", "by-flag").source == env_file
    del env["CHATGPT_APISERVER_CONFIG_FILE"]
    assert load(env, "", "by-flag").source == old_file
    del env["CONFIG_FILE"]
    assert load(env, "", "by-flag").source == str(Path("by-flag") / name)
    assert load(env).source == str(Path("by-env") / name)
    del env["CHATGPT_APISERVER_CONFIG_PATH"]
    assert load(env).source == str(Path("by-old") / name)
    del env["CONFIG_PATH"]
    monkeypatch.setattr(app, "CONFIG_FOLDERS", app.CONFIG_FOLDERS[:3])
    for place in places[3:]:
        assert Path(load(env).source) == Path(place) / name
        (tmp_path / place / name).unlink()
    assert load(env).source == "OPENAI_API_KEY"
    with pytest.raises(app.ConfigError, match=r"(?s)--config_file.*OPENAI_API_KEY.*--demo"):
        load()


def test_json_before_toml_and_an_empty_folder_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder JSON comes first; a named folder without a file leads on to the others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "config" / "chatgpt-apiserver.toml", '[[controllers]]\ntype = "echo"\n')
    assert load(path="empty").source.endswith(".toml")
    write(tmp_path / "config" / "chatgpt-apiserver.json")
    assert load(path="empty").source.endswith(".json")


@pytest.mark.parametrize("name", ["CHATGPT_APISERVER_CONFIG_FILE", "CONFIG_FILE", "CHATGPT_APISERVER_CONFIG_PATH", "CONFIG_PATH"])
def test_a_named_place_must_exist(name: str) -> None:
    """What is named and missing is an error, never skipped."""
    with pytest.raises(app.ConfigError, match="^%s: nowhere: no such" % name):
        load({name: "nowhere", "OPENAI_API_KEY": KEY})


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    """Each layer overrides the one below."""
    file = write(tmp_path / "c.json", dict(GOOD, host="0.0.0.0", port=1, pool={"type": "random", "max_wait": 5}))
    env = {
        "CHATGPT_APISERVER_PORT": "2",
        "CHATGPT_APISERVER_HOST": "::1",
        "CHATGPT_APISERVER_POOL_TYPE": "priority",
        "CHATGPT_APISERVER_POOL_RESCUE_AFTER": "1.5",
    }
    assert load(file=file).port == 1
    config = load(env, file)
    assert (config.port, config.host) == (2, "::1")
    assert config.pool == app.PoolConfig("priority", 5.0, 1000, 1.5)
    config = load(env, file, port="3", host=None)
    assert (config.port, config.host) == (3, "::1")


@pytest.mark.parametrize("pool", [None, {}])
def test_environment_overrides_an_empty_pool(tmp_path: Path, pool: Any) -> None:
    """null counts as absent here too."""
    file = write(tmp_path / "c.json", dict(GOOD, pool=pool))
    assert load({"CHATGPT_APISERVER_POOL_TYPE": "random"}, file).pool.type == "random"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("POOL_TIPE", "did you mean 'POOL_TYPE'?"),
        ("LOG_LEVEL", "behind CHATGPT_APISERVER_ may stand CONFIG_FILE, "),
        ("POOL_ALIASES", "behind CHATGPT_APISERVER_ may stand"),
        ("LIMITS_CONNECTIONS", "behind CHATGPT_APISERVER_ may stand"),
    ],
)
def test_a_variable_of_ours_that_sets_nothing(tmp_path: Path, name: str, told: str) -> None:
    """A misspelt override is an error: ignored, the server would run with what it should not have."""
    file = write(tmp_path / "c.json")
    with pytest.raises(app.ConfigError, match="^CHATGPT_APISERVER_%s: this variable sets nothing; " % name) as caught:
        load({"CHATGPT_APISERVER_" + name: "random"}, file)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT_HTTP", "80"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_80_TCP_ADDR", "10.0.0.1"),
        ("BLUE_SERVICE_PORT", "80"),
        ("BLUE_PORT_80_TCP_PROTO", "tcp"),
        ("ALICE_KEY", "sk-of-alice"),
    ],
)
def test_variables_that_are_no_overrides(tmp_path: Path, name: str, value: str) -> None:
    """What Kubernetes sets for a service of our name is none of ours, nor is a secret that the file may read."""
    assert load({"CHATGPT_APISERVER_" + name: value}, write(tmp_path / "c.json")).port == 8080


def test_environment_mistakes_and_kubernetes(tmp_path: Path) -> None:
    """A bad override is an error; the address that Kubernetes sets for a service of this name is not ours."""
    file = write(tmp_path / "c.json")
    for variable, found in (
        ("PORT", '"x", allowed: a whole number from 0'),
        ("DRAIN_DELAY", '"x"'),
        ("POOL_MAX_WAIT", '-1, allowed: a number from 0 to 3600'),
        ("POOL_TYPE", '"x", allowed: balanced'),
        ("POOL_AFFINITY", '"x", allowed: true or false'),
    ):
        value = "-1" if variable == "POOL_MAX_WAIT" else "x"
        with pytest.raises(app.ConfigError, match="^CHATGPT_APISERVER_%s: found %s" % (variable, found)):
            load({"CHATGPT_APISERVER_" + variable: value}, file)
    assert load({"CHATGPT_APISERVER_PORT": "tcp://10.0.0.1:80"}, file).port == 8080


def test_a_mistake_is_told_of_what_set_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag or variable that overrides a file is named in its place; a flag comes before a variable."""
    file = write(tmp_path / "c.json", dict(GOOD, host=5))
    with pytest.raises(app.ConfigError, match=r"^--port: found \"x\", allowed: a whole number from 0"):
        load({"CHATGPT_APISERVER_PORT": "y", "CHATGPT_APISERVER_HOST": "::1"}, file, port="x")
    with pytest.raises(app.ConfigError, match=r"c\.json: host: found 5"):
        load({"CHATGPT_APISERVER_PORT": "y"}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", (".",))
    for variable, value in (("OPENAI_BASE_URL", "ftp://a"), ("OPENAI_ORG_ID", "a\nb"), ("OPENAI_API_KEY", "a\nb")):
        with pytest.raises(app.ConfigError, match="^%s: found" % variable):
            load({"OPENAI_API_KEY": KEY, variable: value})
    with pytest.raises(app.ConfigError, match=r"^https_proxy, http_proxy or all_proxy: found"):
        load({"OPENAI_API_KEY": KEY, "https_proxy": "socks5://a"})


def test_every_scalar_can_be_overridden(tmp_path: Path) -> None:
    """Each top-level and pool scalar has its variable, and each sort of value is understood."""
    names = "HOST PORT DRAIN_DELAY DRAIN_TIMEOUT POOL_TYPE POOL_MAX_WAIT POOL_MAX_QUEUE POOL_RESCUE_AFTER POOL_AFFINITY"
    values = ["1", "2", "3", "4.5", "fastest", "6", "7", "8", "False"]
    env = {"CHATGPT_APISERVER_" + name: value for name, value in zip(names.split(), values, strict=True)}
    config = load(env, write(tmp_path / "c.json"))
    assert (config.host, config.port, config.drain_delay, config.drain_timeout) == ("1", 2, 3, 4.5)
    pool = config.pool
    assert (pool.type, pool.max_wait, pool.max_queue, pool.rescue_after, pool.affinity) == ("fastest", 6, 7, 8, False)
    assert load({"CHATGPT_APISERVER_POOL_RESCUE_AFTER": "auto"}, config.source).pool.rescue_after is None
    assert load({"CHATGPT_APISERVER_POOL_AFFINITY": "true"}, config.source).pool.affinity is True


@pytest.mark.parametrize("value", ["$NAME", "${NAME}", "file:key.txt"])
def test_secrets(tmp_path: Path, value: str) -> None:
    """A secret comes from a variable or from a file beside the configuration, without its line end."""
    write(tmp_path / "key.txt", KEY + "\n")
    file = write(tmp_path / "c.json", one(config={"api_key": value, "headers": {"X-A": value}}))
    found = load({"NAME": KEY}, file).controllers[0].account
    assert found.api_key.reveal() == KEY
    assert found.headers == (("X-A", app.Secret(KEY)),)


def test_secrets_of_clients(tmp_path: Path) -> None:
    """Client keys are kept as digests only, given plain, by name or hashed."""
    import hashlib

    digest = hashlib.sha256(KEY.encode())
    for value in (KEY, "$K", "sha256:" + digest.hexdigest().upper()):
        key = parse({"K": KEY}, client_keys=[{"key": value}]).client_keys[0]
        assert key.digest == digest.digest()
        assert "Secret" not in repr(key)


def test_file_of_the_go_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files run unchanged: port as a string, pool type, config_file with key and proxy, no weight."""
    sub = tmp_path / "config"
    write(sub / "openai.json", {"api_key": KEY, "proxy": "http://user:%s@proxy:3128" % SHORT})
    write(tmp_path / "second.json", {"api_key": KEY})
    data = {
        "port": "8081",
        "pool": {"type": "balanced"},
        "controllers": [
            {"type": "openai", "config_file": "openai.json"},
            {"type": "openai", "config_file": "second.json", "weight": 2},
        ],
    }
    write(sub / "chatgpt-apiserver.json", data)
    monkeypatch.chdir(tmp_path)
    config = load()
    assert config.port == 8081
    assert [(c.name, c.weight) for c in config.controllers] == [("openai-1", 1), ("openai-2", 2)]
    assert config.controllers[0].account.proxy.reveal() == "http://user:%s@proxy:3128" % SHORT
    assert config.controllers[1].account.api_key.reveal() == KEY


def test_mistake_in_an_accounts_own_file(tmp_path: Path) -> None:
    """The message names the file in which the mistake stands."""
    write(tmp_path / "account.json", {"api_key": KEY, "proxi": ""})
    file = write(tmp_path / "c.json", {"controllers": [{"config_file": "account.json"}]})
    with pytest.raises(app.ConfigError, match=r"account.json: proxi: unknown key; did you mean 'proxy'"):
        load(file=file)


def start(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> app.ControllerConfig:
    """The only controller of a start without a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", (".",))
    return load(dict(env, OPENAI_API_KEY=KEY)).controllers[0]


def test_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_API_KEY is enough, and its companions are honoured."""
    found = start({}, tmp_path, monkeypatch)
    assert (found.name, found.account) == (
        "openai",
        app.AccountConfig(app.Secret(KEY), "https://api.openai.com/v1"),
    )
    env = {"OPENAI_BASE_URL": "http://up:8/v1/", "OPENAI_ORG_ID": "o", "OPENAI_PROJECT_ID": "p"}
    account = start(env, tmp_path, monkeypatch).account
    assert (account.base_url, account.organization, account.project) == ("http://up:8/v1", "o", "p")


@pytest.mark.parametrize(
    ("env", "proxy"),
    [
        ({"https_proxy": "http://p:1"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://big:1", "https_proxy": "http://small:1"}, "http://small:1"),
        ({"https_proxy": "p:1"}, "http://p:1"),
        ({"http_proxy": "http://p:1"}, ""),
        ({"all_proxy": "http://p:1"}, "http://p:1"),
        ({"https_proxy": "http://p:1", "no_proxy": "api.openai.com"}, ""),
        ({"https_proxy": "http://p:1", "no_proxy": ".openai.com, x"}, ""),
        ({"https_proxy": "http://p:1", "NO_PROXY": "*"}, ""),
        ({"https_proxy": "http://p:1", "no_proxy": "other.com"}, "http://p:1"),
        ({"http_proxy": "http://p:1", "OPENAI_BASE_URL": "http://up/v1"}, "http://p:1"),
        ({"http_proxy": "http://p:1", "OPENAI_BASE_URL": "http://up:8/v1", "no_proxy": "up:8"}, ""),
    ],
)
def test_environment_proxies(
    env: dict[str, str], proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """https_proxy, http_proxy and no_proxy mean what they mean to urllib."""
    assert start(env, tmp_path, monkeypatch).account.proxy.reveal() == proxy


def test_files_do_not_take_proxies_from_the_environment(tmp_path: Path) -> None:
    """A file says everything itself."""
    assert not load({"https_proxy": "http://p:1"}, write(tmp_path / "c.json")).controllers[0].account.proxy


@pytest.mark.parametrize(
    ("value", "shown"),
    [("", "none"), (KEY, "sk-…wxyz"), ("abcdefghijkl", "…ijkl"), ("abcdefghijk", "…"), ("sk-short", "sk-…")],
)
def test_secret_is_never_shown(value: str, shown: str) -> None:
    """However it is printed, a secret is at most its last four letters."""
    secret = app.Secret(value)
    assert {repr(secret), str(secret), "%s" % secret, f"{secret}", f"{secret!r}"} == {shown}
    assert secret.reveal() == value
    assert bool(secret) is bool(value)
    assert secret == app.Secret(value)
    assert secret != app.Secret(value + "x")


def test_configuration_can_be_printed() -> None:
    """Neither the values nor the summary show a secret."""
    config = parse(
        controllers=[
            {
                "name": "a",
                "models": ["m"],
                "config": {
                    "api_key": KEY,
                    "proxy": "http://user:%s@proxy:1" % SHORT,
                    "headers": {"X-Key": SHORT + "-more"},
                },
            },
            {"type": "echo"},
        ],
        client_keys=[{"key": KEY}, {"name": "bob", "key": SHORT, "models": ["m"]}],
        host="::1",
    )
    summary = "\n".join(app.describe(config))
    for text in (summary, repr(config), str(config)):
        assert "Secret" not in text.replace("Secret(", "")
        assert SHORT not in text
    assert "controller a: openai; https://api.openai.com/v1; key sk-…wxyz; by a proxy; weight 1; models m" in summary
    assert "client key key-1: models all\nclient key bob: models m" in summary
    assert summary.endswith("address: http://[::1]:8080")
    assert set(app.secrets_of(config)) >= {KEY, SHORT, SHORT + "-more"}


def test_the_summary_names_models() -> None:
    """Other names and models that stand in are part of it."""
    pool = {"aliases": {"fast": "m"}, "fallbacks": {"m": ["n", "o"]}}
    assert {"model fast: m", "model m: else n, o"} <= set(app.describe(parse(pool=pool)))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.9", True), ("::1", True), ("[::1]", True), ("0.0.0.0", False), ("a", False)],
)
def test_is_loopback(host: str, expected: bool) -> None:
    """Only what stays on this machine is loopback."""
    assert app.is_loopback(host) is expected


def test_endpoints() -> None:
    """Nothing said opens inference; an empty list opens nothing beyond chat and models."""
    assert (parse().endpoints, parse(endpoints=None).endpoints, parse(endpoints=[]).endpoints) == (("inference",),) * 2 + ((),)
    assert parse(endpoints=["objects", "*"]).endpoints == ("objects", "*")


def test_pool_detours() -> None:
    """Aliases and fallbacks keep their order; affinity is on unless switched off."""
    assert parse().pool == app.PoolConfig()
    pool = parse(
        pool={"affinity": False, "aliases": {"f": "m"}, "fallbacks": {"a": ["c", "b"]}, "context_fallbacks": {"x": []}}
    ).pool
    assert (pool.affinity, pool.aliases) == (False, (("f", "m"),))
    assert (pool.fallbacks, pool.context_fallbacks) == ((("a", ("c", "b")),), (("x", ()),))


def test_account_dialect() -> None:
    """Where the key goes, where a chat goes, and what becomes of its parameters."""
    plain = account()
    assert (plain.auth_header, plain.auth_scheme, plain.chat_path) == ("Authorization", "Bearer", "/chat/completions")
    assert (plain.drop_params, plain.rename_params, plain.extra_body) == ((), (), ())
    found = account(
        auth_header="api-key",
        auth_scheme="",
        chat_path="/v2/chat",
        drop_params=["user"],
        rename_params={"max_tokens": "max_completion_tokens"},
        extra_body={"a": {"b": [None, 1.5]}},
    )
    assert (found.auth_header, found.auth_scheme, found.chat_path) == ("api-key", "", "/v2/chat")
    assert (found.drop_params, found.rename_params) == (("user",), (("max_tokens", "max_completion_tokens"),))
    assert found.extra_body == (("a", {"b": [None, 1.5]}),)


@pytest.mark.parametrize("name", sorted(app.PRESETS))
def test_presets(name: str) -> None:
    """A vendor's name is enough: it gives address and dialect. A server of one's own needs no key, all others TLS."""
    preset = app.PRESETS[name]
    assert set(preset) <= set(app.AccountConfig.fields) and name not in app.CONTROLLER_TYPES
    parts = urllib.parse.urlsplit(preset["base_url"])
    local = parts.hostname == "localhost"
    assert parts.scheme == ("http" if local else "https")
    words = dict.fromkeys(re.findall(r"\{(\w+)\}", preset["base_url"]), "eu-1")
    config = parse(controllers=[{"type": name, "config": words if local else dict(words, api_key=KEY)}])
    (found,) = config.controllers
    assert found.type == name and found.name == name + "-1"
    assert found.account.base_url == re.sub(r"\{\w+\}", "eu-1", preset["base_url"])
    assert dict(found.account.rename_params) == preset.get("rename_params", {})
    assert list(found.account.drop_params) == preset.get("drop_params", [])
    assert list(found.account.rate_codes) == preset.get("rate_codes", [])
    assert found.account.base_url in "".join(app.describe(config))


def test_a_preset_gives_way() -> None:
    """What the configuration says counts more than the vendor's row; empty values and null say nothing."""
    config = {"base_url": "https://gate.example/v1", "rename_params": {"a": "b"}, "drop_params": [], "api_key": None}
    (found,) = parse(controllers=[{"type": "mistral", "config": config}]).controllers
    assert found.account.base_url == "https://gate.example/v1" and not found.account.api_key
    assert (found.account.rename_params, found.account.drop_params) == ((("a", "b"),), ())
    (found,) = parse(controllers=[{"type": "mistral", "config": {"api_key": KEY, "base_url": "", "drop_params": None}}]).controllers
    assert found.account.base_url == app.PRESETS["mistral"]["base_url"] and found.account.drop_params == ("stream_options",)


def test_toml_dates_are_no_json(tmp_path: Path) -> None:
    """What TOML can say and JSON cannot is refused where it would have to be sent."""
    text = '[[controllers]]\n[controllers.config]\napi_key = "%s"\nextra_body = { day = 2024-01-01 }\n' % KEY
    with pytest.raises(app.ConfigError, match=r"extra_body: found an object, allowed: JSON values"):
        load(file=write(tmp_path / "c.toml", text))


def test_records() -> None:
    """A configuration's values are compared, copied and printed by their fields, and cannot be changed."""
    pool = app.PoolConfig(type="random", max_wait=1.0)
    assert pool == app.PoolConfig("random", 1.0) == app.PoolConfig("random").replace(max_wait=1.0)
    assert pool not in (app.PoolConfig("random"), app.Timeouts(), "random")
    assert hash(pool) == hash(app.PoolConfig("random", 1.0))
    assert repr(app.Timeouts(total=1.0)) == "Timeouts(connect=10.0, first_byte=None, idle=300.0, total=1.0)"
    with pytest.raises(AttributeError, match=r"PoolConfig\.type cannot be changed"):
        pool.type = "x"
    for wrong in ({"typ": "x", "controllers": ()}, {}):
        with pytest.raises(TypeError, match=r"missing or unknown: client_keys, (controllers, source$|source, typ)"):
            app.Config(**wrong)


@pytest.mark.parametrize("name", ["chatgpt-apiserver.json", "demo.json"])
def test_sample_configurations(name: str) -> None:
    """The files of config/ can be used as they are."""
    assert len(load({"OPENAI_API_KEY": KEY}, str(ROOT / "config" / name)).controllers) == 2


def test_account_values() -> None:
    """A server of the user's own needs no key; a trailing slash goes; hosts are lower case."""
    found = account(api_key="", base_url="http://up:8/v1/")
    assert (found.base_url, bool(found.api_key)) == ("http://up:8/v1", False)
    assert parse(allowed_hosts=["API.Example"]).allowed_hosts == ("api.example",)


BEFORE: dict[str, Any] = {
    "controllers": [
        {"name": "a", "config": {"api_key": KEY}},
        {"name": "b", "type": "echo"},
        {"name": "c", "type": "echo", "limits": {"rpm": 1}},
    ],
    "client_keys": [{"name": "alice", "key": KEY}, {"name": "bob", "key": SHORT}],
    "pool": {"type": "random"},
}


def told(**after: Any) -> list[str]:
    """The lines that tell what `after` changes."""
    return list(app.diff_config(app.parse_config(BEFORE, "c.json", {}), app.parse_config({**BEFORE, **after}, "d.json", {})))


def test_diff_of_nothing() -> None:
    """The same configuration, from whatever file, is no change."""
    assert told() == []


def test_diff_of_lists() -> None:
    """Members are added, removed, changed or moved; of a change the keys are named, never their values."""
    a, b, c = BEFORE["controllers"]
    changed = dict(a, weight=3, config={"api_key": KEY + "2", "proxy": "http://u:%s@p:1" % SHORT})
    lines = told(controllers=[c, changed, {"name": "d", "type": "echo"}], client_keys=[{"name": "bob", "key": KEY}])
    assert lines == [
        "controller b: removed",
        "controller a: changed: config.api_key, config.proxy, weight",
        "controller d: added",
        "controllers: another order",
        "client key alice: removed",
        "client key bob: changed: key",
    ]
    assert told(controllers=[a, b, dict(c, limits={"rpm": 2, "tpm": 3})]) == [
        "controller c: changed: limits.rpm, limits.tpm"
    ]


def test_diff_of_the_rest(tmp_path: Path) -> None:
    """Other keys are told as the file spells them, with both values, and with what only a restart brings."""
    for name in ("server.pem", "server.key"):
        write(tmp_path / name, "x")
    lines = told(
        host="::1",
        port=1,
        pool={"max_wait": 5, "fallbacks": {"a": ["b"]}},
        cors={"allow_origins": ["https://a"]},
        limits={"connections": 5, "body_bytes": 6},
        tls={"cert": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")},
        log={"level": "debug"},
    )
    assert [line.partition(":")[0] for line in lines if line.endswith(" (needs a restart)")] == ["host", "port"]
    assert [line for line in lines if "restart" not in line] == [
        'pool.type: "random" -> "balanced"',
        "pool.max_wait: 30.0 -> 5.0",
        'pool.fallbacks: [] -> [["a", ["b"]]]',
        'cors.allow_origins: [] -> ["https://a"]',
        'tls.cert: "" -> %s' % app.shown(str(tmp_path / "server.pem")),
        'tls.key: "" -> %s' % app.shown(str(tmp_path / "server.key")),
        "limits.body_bytes: 33554432 -> 6",
        "limits.connections: 10000 -> 5",
        'log.level: "info" -> "debug"',
    ]
