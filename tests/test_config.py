"""The configuration: where it is found, what it may contain, what its messages say and that they show no key."""

import hashlib
import json
import re
import urllib.parse
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-proj-SecretSecret-wxyz"
PASSWORD = "hunter2-hunter2"
VALID: dict[str, Any] = {"controllers": [{"type": "openai", "config": {"api_key": KEY}}]}


def parse(env: "dict[str, str] | None" = None, **more: Any) -> app.Config:
    """Return a configuration with one valid controller and `more`."""
    return app.parse_config({**VALID, **more}, "c.json", env or {})


def account(env: "dict[str, str] | None" = None, **config: Any) -> app.AccountConfig:
    """Return the account of a controller with this `config`."""
    return parse(env, controllers=[{"config": {"api_key": KEY, **config}}]).controllers[0].account


def load(env: "dict[str, str] | None" = None, file: str = "", path: str = "", **flags: Any) -> app.Config:
    """Return the configuration of a start."""
    return app.load_config(file, path, flags, env or {})


def write(path: Path, data: Any = None) -> str:
    """Write a configuration file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data or VALID), encoding="utf-8")
    return str(path)


def one(**more: Any) -> dict[str, Any]:
    """Return a top level with one controller that has `more`."""
    return {"controllers": [{"type": "openai", "config": {"api_key": KEY}, **more}]}


def with_config(**config: Any) -> dict[str, Any]:
    """Return a top level with one controller whose `config` has `more`."""
    return one(config={"api_key": KEY, **config})


def test_defaults() -> None:
    """Everything but the controllers has a default, and null is as good as no value."""
    for more in ({}, dict.fromkeys(("host", "port", "pool", "endpoints", "client_keys", "limits"))):
        config = parse(**more)
        assert (config.host, config.port, config.pool, config.endpoints) == ("127.0.0.1", 8080, app.PoolConfig(), ("inference",))
        assert (config.pool.type, config.limits.connections_per_client, config.client_keys) == ("balanced", 0, ())
    first = parse().controllers[0]
    assert (first.name, first.weight, first.models, first.objects) == ("openai-1", 1, (), False)
    assert first.account == app.AccountConfig(app.Secret(KEY), "https://api.openai.com/v1")
    with pytest.raises(FrozenInstanceError):
        first.weight = 2


TOP_MISTAKES: list[tuple[Any, str, str]] = [  # data, path, what the message says of it
    ([], "top level", "found a list, allowed: an object"),
    ({}, "controllers", "found nothing, allowed: a list of at least one controller"),
    ({"controllers": []}, "controllers", "found nothing, allowed: a list of at least one controller"),
    ({"controllers": {}}, "controllers", "found an object, allowed: a list"),
    ({"controllers": "openai"}, "controllers", "found a string, allowed: a list"),
    ({"controllers": ["x"]}, "controllers[0]", "found a string, allowed: an object"),
    ({"controlers": []}, "controlers", "unknown key; did you mean 'controllers'"),
    ({"controllers": one(name="a")["controllers"] * 2}, "controllers[1].name", "no other in this list has"),
    (
        {"controllers": one(quota_group="g")["controllers"] + one(quota_group="g", limits={"rpm": 1})["controllers"]},
        "controllers[1].limits",
        "differ from those of 'openai-1', which has the same quota_group",
    ),
    ({"controllers": one(objects=True)["controllers"] * 2}, "controllers[1].objects", "only one controller may have it"),
    ({"controllers": [{"config_file": "x.json"}]}, "controllers[0].config_file", 'no file "x.json"'),
]
FIELD_MISTAKES: list[tuple[dict[str, Any], str, str]] = [  # added to a valid top level
    ({"prot": 1}, "prot", "unknown key; did you mean 'port'"),
    ({"Prot": 1}, "Prot", "unknown key; did you mean 'port'"),
    ({"zzzzzz": 1}, "zzzzzz", "unknown key; allowed here: .*controllers"),
    ({"a\nb": 1}, r"a\nb", "unknown key"),
    ({"port": "http"}, "port", 'found "http", allowed: a whole number from 0 to 65535'),
    ({"port": True}, "port", "found true"),
    ({"port": 65536}, "port", "found 65536"),
    ({"port": 80.5}, "port", "found 80.5"),
    ({"port": "80a"}, "port", 'found "80a"'),
    ({"host": 1}, "host", "found a number, allowed: a name or an address"),
    ({"host": "a\nb"}, "host", "a character that cannot be printed"),
    *(({"host": host}, "host", "a name or an address of this machine, without scheme and port") for host in
      ("127.0.0.1:80", "http://a", "a b", "*", "[::1]:80", "[a]", "::1]", "a/b")),
    ({"pool": []}, "pool", "found a list, allowed: an object"),
    ({"pool": {"type": "balancd"}}, "pool.type", "found \"balancd\"; did you mean 'balanced'"),
    ({"pool": {"type": "zzz"}}, "pool.type", "allowed: balanced | random | least_busy | fastest | priority"),
    ({"pool": {"max_wait": -1}}, "pool.max_wait", "found -1, allowed: a number from 0 to 3600"),
    ({"pool": {"max_wait": float("nan")}}, "pool.max_wait", "allowed: a number"),
    ({"pool": {"max_queue": 1.5}}, "pool.max_queue", "found 1.5, allowed: a whole number"),
    ({"pool": {"rescue_after": -1}}, "pool.rescue_after", 'found -1, allowed: a number from 0 to 3600, or "auto"'),
    ({"pool": {"rescue_after": "soon"}}, "pool.rescue_after", 'found "soon"'),
    ({"pool": {"maxwait": 3}}, "pool.maxwait", "did you mean 'max_wait'"),
    ({"pool": {"affinity": 1}}, "pool.affinity", "found a number, allowed: true or false"),
    ({"pool": {"aliases": {"fast": ["m"]}}}, "pool.aliases.fast", "found a list, allowed: a non-empty string"),
    ({"pool": {"fallbacks": ["m"]}}, "pool.fallbacks", "found a list, allowed: an object"),
    ({"pool": {"fallbacks": {"a": "b"}}}, "pool.fallbacks.a", "found a string, allowed: a list"),
    ({"pool": {"fallbacks": {"\ud800": ["b"]}}}, r"pool.fallbacks.\ud800", "a character that cannot be printed"),
    ({"pool": {"context_fallbacks": {"a": [1]}}}, "pool.context_fallbacks.a[0]", "found a number, allowed: a non-empty string"),
    ({"pool": {"drain_delay": 1}}, "pool.drain_delay", "unknown key; its place is the top level"),
    ({"max_wait": 5}, "max_wait", "unknown key; its place is pool$"),
    ({"endpoints": ["inference", "all"]}, "endpoints[1]", "found \"all\", allowed: inference"),
    ({"endpoints": "*"}, "endpoints", "a list"),
    *(({"allowed_hosts": ["a", host]}, "allowed_hosts[1]", "allowed: a host with or without port") for host in
      (1, "https://a.example", "*.a.example", "a/", "a b")),
    *(({"cors": {"allow_origins": ["*", origin]}}, "cors.allow_origins[1]", "allowed: scheme://host") for origin in
      ("https://a.example/", "a.example", "https://*.a.example", "https://a/b", "//a", "https:// a")),
    ({"cors": {"allow_origin": []}}, "cors.allow_origin", "did you mean 'allow_origins'"),
    ({"log": {"level": "loud"}}, "log.level", "debug | info"),
    ({"log": {"level": "INFO"}}, "log.level", "did you mean 'info'"),
    ({"tls": {"cert": "nowhere.pem"}}, "tls.cert", 'no file "nowhere.pem" beside the configuration'),
    ({"limits": {"body_bytes": 0}}, "limits.body_bytes", "found 0"),
    ({"limits": {"bodybytes": 1}}, "limits.bodybytes", "did you mean 'body_bytes'"),
    ({"client_keys": ""}, "client_keys", "found a string, allowed: a list"),
    ({"client_keys": [{"name": "a"}]}, "client_keys[0].key", "must be a key"),
    ({"client_keys": [{"key": "sha256:12"}]}, "client_keys[0].key", "64 hex digits"),
    ({"client_keys": [{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]}, "client_keys[1].name", 'found "a"'),
    ({"client_keys": [{"name": "a", "key": "k"}, {"key": "k"}]}, "client_keys[1].key", "the same key as that of 'a'"),
    ({"client_keys": [{"key": "k", "limits": {"rpm": "x"}}]}, "client_keys[0].limits.rpm", 'found "x"'),
    ({"api_key": KEY}, "api_key", r"unknown key; its place is controllers\[\].config$"),
]
CONTROLLER_MISTAKES: list[tuple[dict[str, Any], str, str]] = [  # added to a valid controller
    ({"type": "opnai"}, "type", "did you mean 'openai'"),
    ({"type": "OpenAI"}, "type", "did you mean 'openai'"),
    ({"type": "google"}, "type", "found \"google\"; did you mean 'gemini'"),
    ({"type": "claude"}, "type", "did you mean 'anthropic'"),
    ({"type": "zzz"}, "type", r"allowed: openai | azure | .* | zhipu$"),
    ({"wieght": 3}, "wieght", "did you mean 'weight'"),
    ({"weight": 0}, "weight", "found 0, allowed: a whole number from 1"),
    ({"weight": "5"}, "weight", 'found "5", allowed: a whole number from 1 to 10000, without quotes'),
    ({"name": "\ud800"}, "name", "a character that cannot be printed"),
    ({"models": "gpt"}, "models", "a list"),
    ({"models": ["a\nb"]}, "models[0]", "a character that cannot be printed"),
    ({"models": ["a", "${M}"]}, "models[1]", r'found "\$\{M\}", allowed: the text itself'),
    ({"model_map": {"a": ""}}, "model_map.a", 'found "", allowed: a non-empty string'),
    ({"model_map": {"a\nb": "c"}}, r"model_map.a\nb", "a character that cannot be printed"),
    ({"limits": {"rmp": 5}}, "limits.rmp", "did you mean 'rpm'"),
    ({"limits": {"burst_s": 61}}, "limits.burst_s", "found 61"),
    ({"timeouts": {"connect": 0}}, "timeouts.connect", "found 0"),
    ({"objects": "yes"}, "objects", "allowed: true or false"),
    ({"objects": True, "type": "anthropic"}, "objects", "type anthropic has no files"),
    ({"rpm": 5}, "rpm", r"unknown key; its place is controllers\[\].limits or client_keys\[\].limits"),
    ({"api_key": KEY}, "api_key", r"unknown key; its place is controllers\[\].config$"),
    ({"config_file": "x.json"}, "config_file", "only one of them may be used"),
    ({"type": "echo"}, "config.api_key", "unknown key; allowed here: delay"),
    ({"type": "azure"}, "config.base_url", "found nothing, allowed: https://NAME.openai.azure.com"),
    ({"type": "azure", "config": {"base_url": "https://r.example"}}, "config.api_key", "an API key"),
    ({"type": "groq", "config": {}}, "config.api_key", "found nothing, allowed: an API key"),
    ({"type": "ollama", "config": {"region": "x"}}, "config.region", "unknown key"),
    ({"type": "bedrock"}, "config.region", 'found "", allowed: the region that is part of the URL'),
]
CONFIG_MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [  # type, added to a valid `config`
    ("openai", {"api_key": ""}, "api_key", "found nothing, allowed: an API key"),
    ("openai", {"api_key": [KEY]}, "api_key", "found a list, allowed: a string"),
    ("openai", {"api_key": 1.5}, "api_key", "found a number, allowed: a string"),
    ("openai", {"api_key": "sk\x00"}, "api_key", "found a character outside printable ASCII,"),
    ("openai", {"api_key": "a\r\nb"}, "api_key", "printable ASCII"),
    ("openai", {"api_key": "$NOPE"}, "api_key", "the environment variable NOPE is not set$"),
    ("openai", {"api_key": "${NOPE}"}, "api_key", "NOPE is not set"),
    ("openai", {"api_key": "${A:-b}"}, "api_key", r"found \$\{ and more than a name, allowed: a lit"),
    ("openai", {"api_key": "${A"}, "api_key", r"found \$\{ and more than a name"),
    ("openai", {"api_key": "file:nowhere"}, "api_key", 'cannot read the file "nowhere": No such file or directory$'),
    ("openai", {"api_key": "file:\0"}, "api_key", "cannot read the file .*null byte"),
    ("openai", {"api_key": "Bearer sk-x"}, "api_key", "found blanks or quotation marks, allowed: the key alone"),
    ("openai", {"api_key": '"sk-x"'}, "api_key", "found blanks or quotation marks"),
    ("anthropic", {"api_key": "'sk-x'"}, "api_key", "found blanks or quotation marks"),
    ("openai", {"apikey": KEY}, "apikey", "unknown key; did you mean 'api_key'"),
    ("openai", {"models": []}, "models", r"unknown key; its place is controllers\[\] or client_keys"),
    ("openai", {"project": "$P"}, "project", r'found "\$P", allowed: the text'),
    *(("openai", {"base_url": url}, "base_url", "allowed: http://host") for url in
      ("ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a?b")),
    ("openai", {"base_url": "https://a/v1/chat/completions/"}, "base_url", "must not end in /chat/completions"),
    ("anthropic", {"base_url": "https://a/v1/messages"}, "base_url", "must not end in /messages"),
    ("azure", {"base_url": "https://r.example/openai/deployments/d"}, "base_url", "https://NAME.openai.azure.com"),
    ("azure", {"base_url": "https://r.example", "api_version": "1&a=b"}, "api_version", "a date such as"),
    ("openai", {"api_version": "2024-10-21"}, "api_version", "unknown key"),
    ("cloudflare", {"account": "a/b"}, "account", "letters, digits"),
    ("anthropic", {"rate_codes": []}, "rate_codes", "unknown key; allowed here"),
    ("openai", {"proxy": "socks5://u:p@a"}, "proxy", r"found socks5://…, allowed: http://host:port, with user:password@ .*SOCKS"),
    ("openai", {"proxy": "a:3128"}, "proxy", "found a value without http://"),
    ("openai", {"ca_file": "nowhere"}, "ca_file", 'no file "nowhere"'),
    ("openai", {"headers": {"a b": "c"}}, "headers.a b", "a header name"),
    ("openai", {"headers": {"Host": "c"}}, "headers.Host", "a header name"),
    ("openai", {"headers": {"A": "b\n c"}}, "headers.A", "printable ASCII"),
    ("openai", {"auth_header": "Host"}, "auth_header", 'found "Host"'),
    ("openai", {"auth_header": ""}, "auth_header", "a header name"),
    ("openai", {"auth_scheme": "a b"}, "auth_scheme", "one word"),
    ("openai", {"auth_scheme": "é"}, "auth_scheme", "ASCII"),
    *(("openai", {"chat_path": path}, "chat_path", "allowed: /path without blanks, ") for path in ("chat", "/a?b", "/a b")),
    ("openai", {"drop_params": "user"}, "drop_params", "a list"),
    ("openai", {"drop_params": ["model"]}, "drop_params", "any parameter but model"),
    ("openai", {"rename_params": {"a": 1}}, "rename_params.a", "found a number, allowed: a non-empty string"),
    ("openai", {"rename_params": {"a": "stream"}}, "rename_params", "any parameter but"),
    ("openai", {"rename_params": {"a": "c", "b": "c"}}, "rename_params", 'gives the new name "c" twice'),
    ("openai", {"extra_body": [1]}, "extra_body", "an object"),
    ("openai", {"extra_body": {"a": float("nan")}}, "extra_body", "found an object, allowed: JSON values"),
    ("openai", {"extra_body": {"stream": 1}}, "extra_body", "any parameter but"),
]
MISTAKES = [
    *TOP_MISTAKES,
    *(({**VALID, **more}, path, words) for more, path, words in FIELD_MISTAKES),
    *((one(**more), "controllers[0]." + path, words) for more, path, words in CONTROLLER_MISTAKES),
    *(
        (one(type=kind, config={"api_key": KEY, **config}), "controllers[0].config." + path, words)
        for kind, config, path, words in CONFIG_MISTAKES
    ),
]


@pytest.mark.parametrize(("data", "path", "words"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_mistakes(data: Any, path: str, words: str) -> None:
    """One error names the file, the path, what was found and what is allowed, and shows no secret."""
    with pytest.raises(app.ConfigError, match=words.replace("|", r"\|")) as caught:
        app.parse_config(data, "dir/c.json", {})
    message = str(caught.value)
    assert message.startswith(f"dir/c.json: {path}: ")
    assert "\n" not in message and "Secret" not in message and "u:p" not in message


def test_unusual_values_that_are_allowed() -> None:
    """IPv6 addresses in brackets, origins of apps, hosts with ports and keys with their own scheme are accepted."""
    data = {
        **with_config(api_key="Key of mine", auth_header="Authorization", auth_scheme="", headers={"X": "$$x"},
                      base_url="https://a/chat", proxy="http://$u:p@a:1"),
        "host": "[::1]",
        "cors": {"allow_origins": ["null", "*", "https://a.example:8443", "capacitor://localhost", "app://Obsidian.md"]},
        "allowed_hosts": ["A.example:80", "::1", "[::1]:80", "*"],
        "endpoints": ["objects", "*"],
    }
    config = app.parse_config(data, "c.json", {})
    assert config.host == "::1" and config.allowed_hosts == ("a.example:80", "::1", "[::1]:80", "*")
    assert config.cors.allow_origins[-1] == "app://Obsidian.md" and config.endpoints == ("objects", "*")
    assert parse(endpoints=[]).endpoints == ()
    for host in ("", "0.0.0.0", "::", "fe80::1%eth0", "my_host.local"):
        assert parse(host=host).host == host


@pytest.mark.parametrize(
    "data",
    [
        {**VALID, "client_keys": [PASSWORD]},
        {**VALID, "client_keys": PASSWORD},
        {**VALID, "client_keys": {"key": PASSWORD}},
        {"controllers": [PASSWORD]},
        {"controllers": {"config": {"api_key": PASSWORD}}},
        one(config=PASSWORD),
        one(config=[PASSWORD]),
        with_config(api_key=[PASSWORD]),
        with_config(headers=PASSWORD),
        with_config(headers=[PASSWORD]),
        with_config(extra_body=PASSWORD),
        with_config(extra_body={"stream": PASSWORD}),
        with_config(proxy=f"socks5://u:{PASSWORD}@a"),
        with_config(proxy=PASSWORD),
        with_config(base_url=f"http://u:{PASSWORD}@a"),
        with_config(base_url="http://a?key=" + PASSWORD),
        with_config(api_key="\x00" + PASSWORD),
    ],
)
def test_no_message_shows_a_misplaced_secret(data: Any) -> None:
    """A secret in the wrong place or of the wrong type is not repeated by the error about it."""
    with pytest.raises(app.ConfigError) as caught:
        app.parse_config(data, "c.json", {})
    assert PASSWORD not in str(caught.value)


PASTED = (  # as vendors make them
    "sk-abc123def456",
    "sk-proj-Ab_Cd-EfGhIjKlMnOp",
    "gsk_AbCdEfGhIjKlMnOpQrSt",
    "AIzaSyAbCdEfGhIj-KlMnOpQr_St",
    "0a1b2c3d4e5f60718293a4b5c6d7e8f9",
    "550e8400-e29b-41d4-a716-446655440000",
    "0a1b2c3d4e5f6071.AbC1dEf2GhI3jKl4",
    "Bearer letters",
)


@pytest.mark.parametrize("key", PASTED)
def test_no_message_shows_what_looks_like_a_key(tmp_path: Path, key: str) -> None:
    """A key that was pasted where none belongs, as a value, a name or a path, is masked."""
    for data, env, flags in (
        (one(type=key), {}, {}),
        (with_config(base_url=key), {}, {}),
        (with_config(auth_header=key + ":"), {}, {}),
        (with_config(**{key: ""}), {}, {}),
        (with_config(api_key="file:" + key), {}, {}),
        (one(**{key: 1}), {}, {}),
        ({"controllers": one(name=key)["controllers"] * 2}, {}, {}),
        ({**VALID, "client_keys": [{"name": key, "key": "k"}, {"key": "k"}]}, {}, {}),
        (VALID, {"CHATGPT_APISERVER_PORT": key}, {}),
        (VALID, {"CONFIG_PATH": key}, {}),
        (VALID, {}, {"port": key}),
    ):
        with pytest.raises(app.ConfigError) as caught:
            load(env, "" if "CONFIG_PATH" in env else write(tmp_path / "c.json", data), **flags)
        assert key[:-4] not in str(caught.value) and "…" in str(caught.value)


@pytest.mark.parametrize("text", [f"http://user:{PASSWORD}@host", "sk-abc123def456"])
def test_no_message_shows_a_key_among_flags(text: str) -> None:
    """A file's name, an unknown flag and an unexpected argument are masked like any other value."""
    for call in (lambda: load(file=text), lambda: app.parse_flags([text]), lambda: app.parse_flags(["--" + text])):
        with pytest.raises(app.ConfigError) as caught:
            call()
        assert PASSWORD not in str(caught.value) and "abc123" not in str(caught.value)


def test_ordinary_words_are_shown() -> None:
    """Words, models, hosts and paths are not masked: a message that hid them would not help."""
    for text in (
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
    ):
        assert str(app.ConfigError(text)) == text


def test_tls_needs_both_files(tmp_path: Path) -> None:
    """A certificate without its key is a mistake."""
    write(tmp_path / "server.pem", "x")
    with pytest.raises(app.ConfigError, match="tls: found one of cert and key, allowed: both or none"):
        app.parse_config({**VALID, "tls": {"cert": "server.pem"}}, str(tmp_path / "c.json"), {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1"),
        ('{\n "port": 1,}', "line 2, column 1[0-9]: .*comma"),
        ('{"port":1,"port":2}', "cannot be read: the key 'port' stands twice in one object"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "top level: found a list"),
        ("\udcff", "cannot be read: .*utf-8"),
    ],
)
def test_broken_json_files(tmp_path: Path, text: str, words: str) -> None:
    """A file that cannot be parsed is one error with the file's name and the position."""
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(app.ConfigError, match=f"^{re.escape(str(path))}: {words}"):
        load(file=str(path))


def test_other_broken_files(tmp_path: Path) -> None:
    """A broken TOML file is named with the line, YAML and a folder are named for what they are."""
    with pytest.raises(app.ConfigError, match=r"c\.toml: cannot be read: .*line 2"):
        load(file=write(tmp_path / "c.toml", "port = 1\n{\n"))
    with pytest.raises(app.ConfigError, match=r"c\.yaml: line 1, column 1: .*; YAML is not supported"):
        load(file=write(tmp_path / "c.yaml", "port: 1\n"))
    with pytest.raises(app.ConfigError, match=r"^--config_file: .*: is not a file"):
        load(file=str(tmp_path))
    with pytest.raises(app.ConfigError, match=r"^--config_path: .*: is not a folder"):
        load(path=write(tmp_path / "c.json"))


def test_toml_and_byte_order_mark(tmp_path: Path) -> None:
    """TOML holds the same as JSON, and the byte order mark of Windows editors is skipped."""
    text = f'\ufeffport = 9001\n[pool]\ntype = "random"\n[[controllers]]\nconfig = {{ api_key = "{KEY}" }}\nweight = 3\n'
    config = load(file=write(tmp_path / "c.toml", text))
    assert (config.port, config.pool.type, config.controllers[0].weight) == (9001, "random", 3)
    assert config.controllers[0].account.api_key.reveal() == KEY
    text = f'[[controllers]]\n[controllers.config]\napi_key = "{KEY}"\nextra_body = {{ day = 2024-01-01 }}\n'
    with pytest.raises(app.ConfigError, match=r"extra_body: found an object, allowed: JSON values"):
        load(file=write(tmp_path / "c.toml", text))


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hit wins: flag, variables, folders; `config` is not searched; a key alone comes last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", [folder for folder in app.CONFIG_FOLDERS if not folder.startswith("/")])
    name = "chatgpt-apiserver.json"
    flag, env_file, old_file = (write(tmp_path / file) for file in ("flag.json", "env.json", "old.json"))
    for place in ("by-flag", "by-env", "by-old", ".", ".config", "config"):
        write(tmp_path / place / name)
    (tmp_path / "empty").mkdir()
    env = {
        "CHATGPT_APISERVER_CONFIG_FILE": env_file,
        "CONFIG_FILE": old_file,
        "CHATGPT_APISERVER_CONFIG_PATH": "by-env",
        "CONFIG_PATH": "by-old",
        "OPENAI_API_KEY": KEY,
    }
    assert load({**env, "CHATGPT_APISERVER_CONFIG_FILE": "nowhere"}, flag, "by-flag").source == flag
    assert load(env, "", "by-flag").source == env_file
    del env["CHATGPT_APISERVER_CONFIG_FILE"]
    assert load(env, "", "by-flag").source == old_file
    del env["CONFIG_FILE"]
    assert load(env, "", "by-flag").source == f"by-flag/{name}"
    assert load(env, "", "empty").source == f"by-env/{name}"
    del env["CHATGPT_APISERVER_CONFIG_PATH"]
    assert load(env).source == f"by-old/{name}"
    del env["CONFIG_PATH"]
    for place in (".", ".config"):
        write(tmp_path / place / "chatgpt-apiserver.toml", '[[controllers]]\ntype = "echo"\n')
        for file in (name, "chatgpt-apiserver.toml"):
            assert Path(load(env).source) == Path(place) / file
            (tmp_path / place / file).unlink()
    assert load(env).source == "OPENAI_API_KEY"
    with pytest.raises(app.ConfigError, match=r"(?s)--config_file.*OPENAI_API_KEY.*--demo"):
        load()


@pytest.mark.parametrize("name", ["CHATGPT_APISERVER_CONFIG_FILE", "CONFIG_FILE", "CHATGPT_APISERVER_CONFIG_PATH", "CONFIG_PATH"])
def test_a_named_place_must_exist(name: str) -> None:
    """A named place that is missing is an error, never skipped."""
    with pytest.raises(app.ConfigError, match=f"^{name}: nowhere: no such"):
        load({name: "nowhere", "OPENAI_API_KEY": KEY})


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    """A flag overrides a variable, which overrides the file."""
    file = write(tmp_path / "c.json", {**VALID, "host": "0.0.0.0", "port": 1, "pool": {"type": "random", "max_wait": 5}})
    env = {f"CHATGPT_APISERVER_{name}": value for name, value in (("PORT", "2"), ("HOST", "::1"), ("POOL_TYPE", "priority"))}
    assert load(file=file).port == 1
    config = load(env, file)
    assert (config.port, config.host, config.pool) == (2, "::1", app.PoolConfig("priority", 5.0))
    config = load(env, file, port="3", host=None)
    assert (config.port, config.host) == (3, "::1")


@pytest.mark.parametrize("pool", [None, {}])
def test_every_scalar_can_be_overridden(tmp_path: Path, pool: Any) -> None:
    """Each top-level and pool scalar has its variable, and each type of value is understood."""
    names = "HOST PORT DRAIN_DELAY DRAIN_TIMEOUT POOL_TYPE POOL_MAX_WAIT POOL_MAX_QUEUE POOL_RESCUE_AFTER POOL_AFFINITY"
    values = ["1", "2", "3", "4.5", "fastest", "6", "7", "8", "False"]
    env = {"CHATGPT_APISERVER_" + name: value for name, value in zip(names.split(), values, strict=True)}
    config = load(env, write(tmp_path / "c.json", {**VALID, "pool": pool}))
    assert (config.host, config.port, config.drain_delay, config.drain_timeout) == ("1", 2, 3, 4.5)
    assert config.pool == app.PoolConfig("fastest", 6.0, 7, 8.0, False)
    assert load({"CHATGPT_APISERVER_POOL_RESCUE_AFTER": "auto"}, config.source).pool.rescue_after is None
    assert load({"CHATGPT_APISERVER_POOL_AFFINITY": "true"}, config.source).pool.affinity is True


def test_unknown_variables(tmp_path: Path) -> None:
    """A misspelt override is an error; variables of Kubernetes and secrets that the file reads are not."""
    file = write(tmp_path / "c.json")
    for name, words in (
        ("POOL_TIPE", "did you mean 'POOL_TYPE'?"),
        ("LOG_LEVEL", "known after CHATGPT_APISERVER_: CONFIG_FILE, "),
        ("POOL_ALIASES", "known after CHATGPT_APISERVER_: "),
        ("LIMITS_CONNECTIONS", "known after CHATGPT_APISERVER_: "),
    ):
        with pytest.raises(app.ConfigError, match=f"^CHATGPT_APISERVER_{name}: unknown variable; {re.escape(words)}"):
            load({"CHATGPT_APISERVER_" + name: "random"}, file)
    for name, value in (
        ("SERVICE_HOST", "10.0.0.1"),
        ("SERVICE_PORT_HTTP", "80"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_80_TCP_ADDR", "10.0.0.1"),
        ("BLUE_SERVICE_PORT", "80"),
        ("BLUE_PORT_80_TCP_PROTO", "tcp"),
        ("ALICE_KEY", "sk-of-alice"),
    ):
        assert load({"CHATGPT_APISERVER_" + name: value}, file).port == 8080


def test_messages_name_the_flag_or_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message names the flag or variable that set a wrong value, in place of the file."""
    file = write(tmp_path / "c.json", {**VALID, "host": 5})
    with pytest.raises(app.ConfigError, match=r"^--port: found \"x\", allowed: a whole number from 0"):
        load({"CHATGPT_APISERVER_PORT": "y", "CHATGPT_APISERVER_HOST": "::1"}, file, port="x")
    with pytest.raises(app.ConfigError, match=r"c\.json: host: found a number"):
        load({"CHATGPT_APISERVER_PORT": "y"}, file)
    file = write(tmp_path / "c.json")
    for variable, value, found in (
        ("PORT", "x", '"x", allowed: a whole number from 0'),
        ("DRAIN_DELAY", "x", '"x"'),
        ("POOL_MAX_WAIT", "-1", "-1, allowed: a number from 0 to 3600"),
        ("POOL_TYPE", "x", '"x", allowed: balanced'),
        ("POOL_AFFINITY", "x", "a string, allowed: true or false"),
    ):
        with pytest.raises(app.ConfigError, match=f"^CHATGPT_APISERVER_{variable}: found {found}"):
            load({"CHATGPT_APISERVER_" + variable: value}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", (".",))
    for variable, value in (("OPENAI_BASE_URL", "ftp://a"), ("OPENAI_ORG_ID", "a\nb"), ("OPENAI_API_KEY", "a\nb")):
        with pytest.raises(app.ConfigError, match=f"^{variable}: "):
            load({"OPENAI_API_KEY": KEY, variable: value})
    monkeypatch.setenv("https_proxy", "socks5://a")
    with pytest.raises(app.ConfigError, match=r"^https_proxy, http_proxy or all_proxy: found socks5://"):
        load({"OPENAI_API_KEY": KEY})


@pytest.mark.parametrize("value", ["$NAME", "${NAME}", "file:key.txt"])
def test_secrets(tmp_path: Path, value: str) -> None:
    """A secret comes from a variable or from a file beside the configuration, without its line end."""
    write(tmp_path / "key.txt", KEY + "\n")
    file = write(tmp_path / "c.json", one(config={"api_key": value, "headers": {"X-A": value}}))
    config = load({"NAME": KEY}, file).controllers[0].account
    assert config.api_key.reveal() == KEY
    assert config.headers == (("X-A", app.Secret(KEY)),)


def test_secrets_of_clients() -> None:
    """Client keys are kept as digests only, whether given plain, by name or hashed."""
    digest = hashlib.sha256(KEY.encode())
    for value in (KEY, "$K", "sha256:" + digest.hexdigest().upper()):
        key = parse({"K": KEY}, client_keys=[{"key": value}]).client_keys[0]
        assert key.digest == digest.digest() and "Secret" not in repr(key)


def test_file_of_the_go_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files run unchanged: port as a string, `config_file` beside the file or in the working directory."""
    write(tmp_path / ".config" / "openai.json", {"api_key": KEY, "proxy": f"http://user:{PASSWORD}@proxy:3128"})
    write(tmp_path / "second.json", {"api_key": KEY})
    data = {
        "port": "8081",
        "pool": {"type": "balanced"},
        "controllers": [
            {"type": "openai", "config_file": "openai.json"},
            {"type": "openai", "config_file": "second.json", "weight": 2},
        ],
    }
    write(tmp_path / ".config" / "chatgpt-apiserver.json", data)
    monkeypatch.chdir(tmp_path)
    config = load()
    assert config.port == 8081
    assert [(item.name, item.weight) for item in config.controllers] == [("openai-1", 1), ("openai-2", 2)]
    assert config.controllers[0].account.proxy.reveal() == f"http://user:{PASSWORD}@proxy:3128"
    assert config.controllers[1].account.api_key.reveal() == KEY
    write(tmp_path / "second.json", {"api_key": KEY, "proxi": ""})
    with pytest.raises(app.ConfigError, match=r"^second.json: proxi: unknown key; did you mean 'proxy'"):
        load()


def start(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> app.ControllerConfig:
    """Return the only controller of a start without a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", (".",))
    for name in ("https_proxy", "http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return load({**env, "OPENAI_API_KEY": KEY}).controllers[0]


def test_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_API_KEY is enough, and the other variables of OpenAI's SDKs count."""
    controller = start({}, tmp_path, monkeypatch)
    assert (controller.name, controller.account) == ("openai", app.AccountConfig(app.Secret(KEY), "https://api.openai.com/v1"))
    env = {"OPENAI_BASE_URL": "http://up:8/v1/", "OPENAI_ORG_ID": "o", "OPENAI_PROJECT_ID": "p"}
    account = start(env, tmp_path, monkeypatch).account
    assert (account.base_url, account.organization, account.project) == ("http://up:8/v1", "o", "p")


@pytest.mark.parametrize(
    ("env", "proxy"),
    [
        ({"https_proxy": "http://p:1"}, "http://p:1"),
        ({"HTTPS_PROXY": "http://big:1", "https_proxy": "http://small:1"}, "http://small:1"),
        ({"HTTPS_PROXY": "p:1"}, "http://p:1"),
        ({"http_proxy": "http://p:1"}, ""),
        ({"all_proxy": "http://p:1"}, "http://p:1"),
        ({"https_proxy": "http://p:1", "no_proxy": ".openai.com, x"}, ""),
        ({"https_proxy": "http://p:1", "NO_PROXY": "*"}, ""),
        ({"https_proxy": "http://p:1", "no_proxy": "other.com"}, "http://p:1"),
        ({"http_proxy": "http://p:1", "OPENAI_BASE_URL": "http://up/v1"}, "http://p:1"),
        ({"http_proxy": "http://p:1", "OPENAI_BASE_URL": "http://up:8/v1", "no_proxy": "up:8"}, ""),
    ],
)
def test_environment_proxies(env: dict[str, str], proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """https_proxy, http_proxy and no_proxy mean what they mean to urllib; a file ignores them."""
    assert start(env, tmp_path, monkeypatch).account.proxy.reveal() == proxy
    assert not load(env, write(tmp_path / "c.json")).controllers[0].account.proxy


@pytest.mark.parametrize(
    ("value", "shown"),
    [("", "none"), (KEY, "sk-…wxyz"), ("abcdefghijkl", "…ijkl"), ("abcdefghijk", "…"), ("sk-short", "sk-…")],
)
def test_secret_is_never_shown(value: str, shown: str) -> None:
    """However it is printed, a secret shows at most its last four letters."""
    secret = app.Secret(value)
    assert {repr(secret), str(secret), f"{secret}", f"{secret!r}"} == {shown}
    assert secret.reveal() == value and bool(secret) is bool(value)
    assert secret == app.Secret(value) != app.Secret(value + "x")


def test_the_summary_shows_settings_and_no_secrets() -> None:
    """--check and the log show what differs from the defaults, with the paths of the file."""
    config = parse(
        controllers=[
            {
                "name": "a",
                "models": ["m"],
                "objects": True,
                "limits": {"rpm": 5},
                "model_map": {"x": "y"},
                "config": {"api_key": KEY, "proxy": f"http://user:{PASSWORD}@proxy:1", "headers": {"X-Key": PASSWORD + "-more"}},
            },
            {"type": "echo"},
        ],
        client_keys=[{"key": KEY}, {"name": "bob", "key": "sha256:" + 64 * "a", "models": ["m"]}],
        pool={"aliases": {"fast": "m"}, "fallbacks": {"m": ["n", "o"]}, "affinity": False, "rescue_after": 0},
        host="::1",
    )
    lines = app.describe(config)
    assert lines == [
        "configuration: c.json",
        "controller a: type openai; config.api_key sk-…wxyz; config.base_url https://api.openai.com/v1; "
        "config.proxy proxy:1; config.headers X-Key -> …more; models m; model_map x -> y; limits.rpm 5; objects true",
        "controller echo-2: type echo; models all",
        f"client key key-1: key sha256:{hashlib.sha256(KEY.encode()).hexdigest()[:8]}…; models all",
        "client key bob: key sha256:aaaaaaaa…; models m",
        "host: ::1",
        "pool.rescue_after: 0.0",
        "pool.affinity: false",
        "pool.aliases: fast -> m",
        "pool.fallbacks: m -> n, o",
    ]
    for text in ("\n".join(lines), repr(config)):
        assert "SecretSecret" not in text and PASSWORD not in text
    assert set(app.secrets_of(config)) >= {KEY, PASSWORD, PASSWORD + "-more"}


def test_is_loopback() -> None:
    """Only addresses of this machine and localhost are loopback."""
    assert all(map(app.is_loopback, ("localhost", "127.0.0.9", "::1", "[::1]")))
    assert not any(map(app.is_loopback, ("0.0.0.0", "::", "a", "")))


def test_account_dialect() -> None:
    """The key's header, the path of chats and the changes to parameters can be configured."""
    plain = account(base_url="http://up:8/v1/", api_key="")
    assert (plain.base_url, bool(plain.api_key)) == ("http://up:8/v1", False)
    assert (plain.auth_header, plain.auth_scheme, plain.chat_path) == ("Authorization", "Bearer", "/chat/completions")
    changed = account(
        auth_header="api-key",
        auth_scheme="",
        chat_path="/v2/chat",
        drop_params=["user"],
        rename_params={"max_tokens": "max_completion_tokens"},
        extra_body={"a": {"b": [None, 1.5]}},
    )
    assert (changed.auth_header, changed.auth_scheme, changed.chat_path) == ("api-key", "", "/v2/chat")
    assert (changed.drop_params, changed.rename_params) == (("user",), (("max_tokens", "max_completion_tokens"),))
    assert changed.extra_body == (("a", {"b": [None, 1.5]}),)
    azure = {"type": "azure", "config": {"api_key": KEY, "base_url": "https://r.example", "auth_header": "Authorization"}}
    assert parse(controllers=[azure]).controllers[0].account.auth_scheme == "Bearer"


@pytest.mark.parametrize("name", sorted({*app.PRESETS} - {"openai", "azure", "anthropic", "echo"}))
def test_presets(name: str) -> None:
    """A vendor's name gives its address and its parameters. A local server needs no key, every other uses TLS."""
    preset = app.PRESETS[name]
    parts = urllib.parse.urlsplit(preset["base_url"])
    local = parts.hostname == "localhost"
    assert parts.scheme == ("http" if local else "https")
    words = dict.fromkeys(re.findall(r"\{(\w+)\}", preset["base_url"]), "eu-1")
    config = parse(controllers=[{"type": name, "config": words if local else {**words, "api_key": KEY}}])
    (controller,) = config.controllers
    assert controller.type == name and controller.name == name + "-1"
    assert controller.account.base_url == re.sub(r"\{\w+\}", "eu-1", preset["base_url"])
    assert dict(controller.account.rename_params) == preset.get("rename_params", {})
    assert list(controller.account.drop_params) == preset.get("drop_params", [])
    assert list(controller.account.rate_codes) == preset.get("rate_codes", [])


def test_a_preset_gives_way() -> None:
    """The user's values win over the vendor's preset; null, and an empty text where there is a preset, do not count."""
    config = {"base_url": "https://gate.example/v1", "rename_params": {"a": "b"}, "drop_params": [], "api_key": None}
    changed = parse(controllers=[{"type": "mistral", "config": config}]).controllers[0].account
    assert changed.base_url == "https://gate.example/v1" and not changed.api_key
    assert (changed.rename_params, changed.drop_params) == ((("a", "b"),), ())
    config = {"api_key": KEY, "base_url": "", "drop_params": None}
    preset = parse(controllers=[{"type": "mistral", "config": config}]).controllers[0].account
    assert preset.base_url == app.PRESETS["mistral"]["base_url"] and preset.drop_params == ("stream_options",)


@pytest.mark.parametrize("name", ["chatgpt-apiserver.json", "demo.json"])
def test_sample_configurations(name: str) -> None:
    """The files of config/ can be used as they are."""
    assert len(load({"OPENAI_API_KEY": KEY}, str(ROOT / "config" / name)).controllers) == 2


BEFORE: dict[str, Any] = {
    "controllers": [{"name": "a", "config": {"api_key": KEY}}, {"name": "b", "type": "echo"}, {"name": "c", "type": "echo"}],
    "client_keys": [{"name": "alice", "key": KEY}, {"name": "bob", "key": PASSWORD}],
    "pool": {"type": "random"},
}


def changes(**after: Any) -> list[str]:
    """Return the lines that a reload logs for `after`."""
    old, new = (app.parse_config(data, "c.json", {}) for data in (BEFORE, {**BEFORE, **after}))
    return app.diff_config(old, replace(new, source="d.json"))


def test_diff_of_lists() -> None:
    """Members that are added, removed or moved show in the list of names; secrets are masked."""
    assert changes() == []
    a, _, c = BEFORE["controllers"]
    a = {**a, "weight": 3, "config": {"api_key": KEY + "2", "proxy": f"http://u:{PASSWORD}@p:1"}}
    old, new = ("sha256:" + hashlib.sha256(key.encode()).hexdigest()[:8] + "…" for key in (PASSWORD, KEY))
    assert changes(controllers=[c, a, {"name": "d", "type": "echo"}], client_keys=[{"name": "bob", "key": KEY}]) == [
        "controllers: a, b, c -> c, a, d",
        "controllers[a].config.api_key: sk-…wxyz -> sk-…xyz2",
        "controllers[a].config.proxy: none -> p:1",
        "controllers[a].weight: 1 -> 3",
        "client_keys: alice, bob -> bob",
        f"client_keys[bob].key: {old} -> {new}",
    ]


def test_diff_of_the_rest(tmp_path: Path) -> None:
    """Other settings are shown as the file spells them, with both values; a new address needs a restart."""
    for name in ("server.pem", "server.key"):
        write(tmp_path / name, "x")
    lines = changes(
        host=PASTED[0],
        port=1,
        pool={"max_wait": 5, "fallbacks": {"a": ["b"]}, "rescue_after": 3},
        cors={"allow_origins": ["https://a"]},
        limits={"connections": 5},
        tls={"cert": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")},
        log={"level": "debug"},
    )
    assert lines == [
        "host: 127.0.0.1 -> sk-…f456 (needs a restart)",
        "port: 8080 -> 1 (needs a restart)",
        "pool.type: random -> balanced",
        "pool.max_wait: 30.0 -> 5.0",
        "pool.rescue_after: auto -> 3.0",
        "pool.fallbacks: none -> a -> b",
        "cors.allow_origins: none -> https://a",
        f"tls.cert: none -> {tmp_path / 'server.pem'}",
        f"tls.key: none -> {tmp_path / 'server.key'}",
        "limits.connections: 10000 -> 5",
        "log.level: info -> debug",
    ]
