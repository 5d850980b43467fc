"""The configuration: where it is found, what it may contain, what its messages say and that they show no key."""

import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

KEY = "sk-proj-SecretSecret-wxyz"
PASSWORD = "hunter2-hunter2"
VALID: dict[str, Any] = {"controllers": [{"type": "openai", "config": {"api_key": KEY}}]}


def parse(env: "dict[str, str] | None" = None, **more: Any) -> app.Config:
    """Return a configuration with one valid controller and `more`."""
    return app.parse_config({**VALID, **more}, "c.json", env or {})


def account(kind: str = "openai", **config: Any) -> app.AccountConfig:
    """Return the account of a controller with this `config`."""
    return app.parse_config(with_config(kind, **config), "c.json", {}).controllers[0].account


def load(env: "dict[str, str] | None" = None, file: str = "", path: str = "", **flags: Any) -> app.Config:
    """Return the configuration of a start."""
    return app.load_config(file, path, flags, env or {})


def write(path: Path, data: Any = None) -> str:
    """Write a configuration file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data or VALID), encoding="utf-8")
    return str(path)


def single(**more: Any) -> dict[str, Any]:
    """Return a top level with one controller that has `more`."""
    return {"controllers": [{"type": "openai", "config": {"api_key": KEY}, **more}]}


def with_config(kind: str = "openai", **config: Any) -> dict[str, Any]:
    """Return a top level with one controller of type `kind` that has this `config`."""
    return single(type=kind, config={"api_key": KEY, **config})


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
    ({"controllers": ["x"]}, "controllers[0]", "found a string, allowed: an object"),
    ({"controlers": []}, "controlers", "unknown key; did you mean 'controllers'"),
    ({"controllers": single(name="a")["controllers"] * 2}, "controllers[1].name", "no other in this list has"),
    ({"controllers": single(quota_group="g")["controllers"] + single(quota_group="g", limits={"rpm": 1})["controllers"]},
     "controllers[1].limits", "differ from those of 'openai-1', which has the same quota_group"),
    ({"controllers": single(objects=True)["controllers"] * 2}, "controllers[1].objects", "only one controller may have it"),
    ({"controllers": [{"config_file": "x.json"}]}, "controllers[0].config_file", 'no file "x.json"'),
]
FIELD_MISTAKES: list[tuple[dict[str, Any], str, str]] = [  # added to a valid top level
    ({"prot": 1}, "prot", "unknown key; did you mean 'port'"),
    ({"zzzzzz": 1}, "zzzzzz", "unknown key; allowed here: .*controllers"),
    ({"a\nb": 1}, r"a\nb", "unknown key"),
    ({"port": "http"}, "port", 'found "http", allowed: a whole number from 0 to 65535'),
    ({"port": 65536}, "port", "found 65536"),
    ({"port": "80a"}, "port", 'found "80a"'),
    ({"host": "a\nb"}, "host", "a character that cannot be printed"),
    *(({"host": host}, "host", "a name or an address of this machine, without scheme and port") for host in
      ("127.0.0.1:80", "http://a", "a b", "*", "[::1]:80", "[a]", "::1]", "a/b")),
    ({"pool": {"type": "balancd"}}, "pool.type", "found \"balancd\"; did you mean 'balanced'"),
    ({"pool": {"type": "zzz"}}, "pool.type", "allowed: balanced | random | least_busy | fastest | priority"),
    ({"pool": {"max_wait": -1}}, "pool.max_wait", "found -1, allowed: a number from 0 to 3600"),
    ({"pool": {"max_queue": 1.5}}, "pool.max_queue", "found 1.5, allowed: a whole number"),
    ({"pool": {"rescue_after": -1}}, "pool.rescue_after", 'found -1, allowed: a number from 0 to 3600, or "auto"'),
    ({"pool": {"affinity": 1}}, "pool.affinity", "found a number, allowed: true or false"),
    ({"pool": {"aliases": {"fast": ["m"]}}}, "pool.aliases.fast", "found a list, allowed: a non-empty string"),
    ({"pool": {"fallbacks": {"a": "b"}}}, "pool.fallbacks.a", "found a string, allowed: a list"),
    ({"pool": {"fallbacks": {"\ud800": ["b"]}}}, r"pool.fallbacks.\ud800", "a character that cannot be printed"),
    ({"pool": {"context_fallbacks": {"a": [1]}}}, "pool.context_fallbacks.a[0]", "found a number, allowed: a non-empty string"),
    ({"pool": {"drain_delay": 1}}, "pool.drain_delay", "unknown key; its place is the top level"),
    ({"max_wait": 5}, "max_wait", "unknown key; its place is pool$"),
    ({"endpoints": ["inference", "all"]}, "endpoints[1]", "found \"all\", allowed: inference"),
    *(({"allowed_hosts": ["a", host]}, "allowed_hosts[1]", "allowed: a host with or without port") for host in
      (1, "https://a.example", "*.a.example", "a/", "a b")),
    *(({"cors": {"allow_origins": ["*", origin]}}, "cors.allow_origins[1]", "allowed: scheme://host") for origin in
      ("https://a.example/", "a.example", "https://*.a.example", "https://a/b", "//a", "https:// a")),
    ({"log": {"level": "INFO"}}, "log.level", "did you mean 'info'"),
    ({"tls": {"cert": "nowhere.pem"}}, "tls.cert", 'no file "nowhere.pem" beside the configuration'),
    ({"client_keys": [{"name": "a"}]}, "client_keys[0].key", "must be a key"),
    ({"client_keys": [{"key": "sha256:12"}]}, "client_keys[0].key", "64 hex digits"),
    ({"client_keys": [{"name": "a", "key": "k"}, {"name": "a", "key": "l"}]}, "client_keys[1].name", 'found "a"'),
    ({"client_keys": [{"name": "a", "key": "k"}, {"key": "k"}]}, "client_keys[1].key", "the same key as that of 'a'"),
    ({"api_key": KEY}, "api_key", r"unknown key; its place is controllers\[\].config$"),
]
CONTROLLER_MISTAKES: list[tuple[dict[str, Any], str, str]] = [  # added to a valid controller
    ({"type": "OpenAI"}, "type", "did you mean 'openai'"),
    ({"type": "google"}, "type", "found \"google\"; did you mean 'gemini'"),
    ({"type": "zzz"}, "type", r"allowed: openai | azure | .* | zhipu$"),
    ({"wieght": 3}, "wieght", "did you mean 'weight'"),
    ({"weight": "5.5"}, "weight", 'found "5.5", allowed: a whole number from 1 to 10000'),
    ({"models": ["a", "${M}"]}, "models[1]", r'found "\$\{M\}", allowed: the text itself'),
    ({"model_map": {"a": ""}}, "model_map.a", 'found "", allowed: a non-empty string'),
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
    ("openai", {"api_key": "sk\x00"}, "api_key", "found a character outside printable ASCII,"),
    ("openai", {"api_key": "$NOPE"}, "api_key", "the environment variable NOPE is not set$"),
    ("openai", {"api_key": "${A:-b}"}, "api_key", r"found \$\{ and more than a name, allowed: a lit"),
    ("openai", {"api_key": "file:nowhere"}, "api_key", 'cannot read the file "nowhere": No such file or directory$'),
    ("openai", {"api_key": "file:\0"}, "api_key", "cannot read the file .*null byte"),
    ("openai", {"api_key": "Bearer sk-x"}, "api_key", "found blanks or quotation marks, allowed: the key alone"),
    ("openai", {"api_key": '"sk-x"'}, "api_key", "found blanks or quotation marks"),
    ("openai", {"apikey": KEY}, "apikey", "unknown key; did you mean 'api_key'"),
    ("openai", {"models": []}, "models", r"unknown key; its place is controllers\[\] or client_keys"),
    ("openai", {"project": "$P"}, "project", r'found "\$P", allowed: the text'),
    *(("openai", {"base_url": url}, "base_url", "allowed: http://host") for url in
      ("ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a?b")),
    ("openai", {"base_url": "https://a/v1/chat/completions/"}, "base_url", "must not end in /chat/completions"),
    ("anthropic", {"base_url": "https://a/v1/messages"}, "base_url", "must not end in /messages"),
    ("azure", {"base_url": "https://r.example/openai/deployments/d"}, "base_url", "https://NAME.openai.azure.com"),
    ("azure", {"base_url": "https://r.example", "api_version": "1&a=b"}, "api_version", "a date such as"),
    ("cloudflare", {"account": "a/b"}, "account", "letters, digits"),
    ("anthropic", {"rate_codes": []}, "rate_codes", "unknown key; allowed here"),
    ("openai", {"proxy": "socks5://u:p@a"}, "proxy", r"found socks5://…, allowed: http://host:port, with user:password@ .*SOCKS"),
    ("openai", {"proxy": "a:3128"}, "proxy", "found a value without http://"),
    ("openai", {"headers": {"a b": "c"}}, "headers.a b", "a header name"),
    ("openai", {"headers": {"Host": "c"}}, "headers.Host", "a header name"),
    ("openai", {"headers": {"A": "b\n c"}}, "headers.A", "printable ASCII"),
    ("openai", {"auth_header": "Host"}, "auth_header", 'found "Host"'),
    ("openai", {"auth_scheme": "a b"}, "auth_scheme", "one word"),
    ("openai", {"auth_scheme": "é"}, "auth_scheme", "ASCII"),
    *(("openai", {"chat_path": path}, "chat_path", "allowed: /path without blanks, ") for path in ("chat", "/a?b", "/a b")),
    ("openai", {"drop_params": ["model"]}, "drop_params", "any parameter but model"),
    ("openai", {"rename_params": {"a": "stream"}}, "rename_params", "any parameter but"),
    ("openai", {"rename_params": {"a": "c", "b": "c"}}, "rename_params", 'gives the new name "c" twice'),
    ("openai", {"extra_body": {"a": float("nan")}}, "extra_body", "found an object, allowed: JSON values"),
    ("openai", {"extra_body": {"stream": 1}}, "extra_body", "any parameter but"),
]
MISTAKES = [
    *TOP_MISTAKES,
    *(({**VALID, **more}, path, words) for more, path, words in FIELD_MISTAKES),
    *((single(**more), "controllers[0]." + path, words) for more, path, words in CONTROLLER_MISTAKES),
    *((with_config(kind, **more), "controllers[0].config." + path, words) for kind, more, path, words in CONFIG_MISTAKES),
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
    origins = ["null", "*", "https://a.example:8443", "capacitor://localhost", "app://Obsidian.md"]
    config = parse(host="[::1]", cors={"allow_origins": origins}, allowed_hosts=["A.example:80", "[::1]:80", "*"], endpoints=[])
    assert config.host == "::1" and config.allowed_hosts == ("a.example:80", "[::1]:80", "*")
    assert config.cors.allow_origins == tuple(origins) and config.endpoints == ()
    for host in ("", "0.0.0.0", "::", "fe80::1%eth0", "my_host.local"):
        assert parse(host=host).host == host
    odd = account(api_key="Key of mine", auth_scheme="", headers={"X": "$$x"}, base_url="https://a/chat", proxy="http://$u:p@a:1")
    assert odd.api_key.reveal() == "Key of mine" and odd.proxy.reveal() == "http://$u:p@a:1"


MISPLACED = [
    *({**VALID, "client_keys": keys} for keys in ([PASSWORD], PASSWORD, {"key": PASSWORD})),
    *({"controllers": value} for value in ([PASSWORD], {"config": {"api_key": PASSWORD}})),
    *(single(config=value) for value in (PASSWORD, [PASSWORD])),
    *(with_config(headers=value) for value in (PASSWORD, [PASSWORD])),
    *(with_config(extra_body=value) for value in (PASSWORD, {"stream": PASSWORD})),
    *(with_config(proxy=value) for value in (f"socks5://u:{PASSWORD}@a", PASSWORD)),
    *(with_config(base_url=url) for url in (f"http://u:{PASSWORD}@a", "http://a?key=" + PASSWORD)),
    *(with_config(api_key=value) for value in ([PASSWORD], "\x00" + PASSWORD)),
]


@pytest.mark.parametrize("data", MISPLACED)
def test_no_message_shows_a_misplaced_secret(data: Any) -> None:
    """A secret in the wrong place or of the wrong type is not repeated by the error about it."""
    with pytest.raises(app.ConfigError) as caught:
        app.parse_config(data, "c.json", {})
    assert PASSWORD not in str(caught.value)


# As vendors make them.
PASTED = """sk-abc123def456 sk-proj-Ab_Cd-EfGhIjKlMnOp gsk_AbCdEfGhIjKlMnOpQrSt AIzaSyAbCdEfGhIj-KlMnOpQr_St
    0a1b2c3d4e5f60718293a4b5c6d7e8f9 550e8400-e29b-41d4-a716-446655440000 0a1b2c3d4e5f6071.AbC1dEf2GhI3jKl4""".split()


@pytest.mark.parametrize("key", [*PASTED, "Bearer letters"])
def test_no_message_shows_what_looks_like_a_key(tmp_path: Path, key: str) -> None:
    """A key that was pasted where none belongs, as a value, a name, a path or a flag, is masked."""
    calls: list[Callable[[], Any]] = [lambda data=data: load(file=write(tmp_path / "c.json", data)) for data in (
        single(type=key), with_config(base_url=key), with_config(auth_header=key + ":"), with_config(**{key: ""}),
        with_config(api_key="file:" + key), single(**{key: 1}), {"controllers": single(name=key)["controllers"] * 2},
        {**VALID, "client_keys": [{"name": key, "key": "k"}, {"key": "k"}]},
    )]  # fmt: skip
    file = write(tmp_path / "valid.json")
    calls += [lambda: load({"CHATGPT_APISERVER_PORT": key}, file), lambda: load({"CONFIG_PATH": key}), lambda: load(file=key)]
    calls += [lambda: load(file=file, port=key), lambda: app.parse_flags([key]), lambda: app.parse_flags(["--" + key])]
    for call in calls:
        with pytest.raises(app.ConfigError) as caught:
            call()
        assert key[:-4] not in str(caught.value) and "…" in str(caught.value)


def test_ordinary_words_are_shown() -> None:
    """Words, models, hosts and paths are not masked: a message that hid them would not help."""
    words = """openia 8o80 xai-1 sk-1 https://team-a.openai.azure.com/openai/v1 gpt-4.1-mini-2025-04-14
        Meta-Llama-3.1-405B-Instruct-Turbo qwen3-235b-a22b-2507 /run/secrets/..2024_11_27_08.1234567890/c.json
        /nix/store/0a1b2c3d4e5f60718293-config/c.json controllers[12].config.rename_params"""
    assert str(app.ConfigError(words)) == words and str(app.ConfigError(app.NOTHING_TO_RUN)) == app.NOTHING_TO_RUN


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.json", "", "line 1, column 1"),
        ("c.json", '{\n "port": 1,}', "line 2, column 1[0-9]: .*comma"),
        ("c.json", '{"port":1,"port":2}', "cannot be read: the key 'port' stands twice in one object"),
        ("c.json", '{"port": 1 // the port\n}', ".*; JSON has no comments"),
        ("c.json", "controllers:\n  - type: echo\n", ".*; this is YAML"),
        ("c.json", "[" * 100_000, "cannot be read"),
        ("c.json", "[1]", "top level: found a list"),
        ("c.json", "\udcff", "cannot be read: .*utf-8"),
        ("c.json", json.dumps({**VALID, "tls": {"cert": "c.json"}}), "tls: found one of cert and key, allowed: both or none"),
        ("c.yaml", "port: 1\n", "line 1, column 1: .*; this is YAML, which is not supported"),
        ("c.toml", "port = 1\n{\n", "cannot be read: .*line 2"),
        ("c.toml", f'[[controllers]]\nconfig = {{api_key = "{KEY}", extra_body = {{ day = 2024-01-01 }}}}',
         r"controllers\[0\].config.extra_body: found an object, allowed: JSON values"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str, words: str) -> None:
    """A file that cannot be parsed is one error with the file's name and the position."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(app.ConfigError, match=f"^{re.escape(str(path))}: {words}"):
        load(file=str(path))


def test_toml_and_byte_order_mark(tmp_path: Path) -> None:
    """TOML holds the same as JSON, and the byte order mark of Windows editors is skipped."""
    text = f'\ufeffport = 9001\n[pool]\ntype = "random"\n[[controllers]]\nconfig = {{ api_key = "{KEY}" }}\nweight = 3\n'
    config = load(file=write(tmp_path / "c.toml", text))
    assert (config.port, config.pool.type, config.controllers[0].weight) == (9001, "random", 3)
    assert config.controllers[0].account.api_key.reveal() == KEY


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hit wins: flag, variables, folders; `config` is not searched; a key alone comes last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", [folder for folder in app.CONFIG_FOLDERS if not folder.startswith("/")])
    name, toml = app.CONFIG_NAMES
    flag, env_file, old_file = (write(tmp_path / file) for file in ("flag.json", "env.json", "old.json"))
    for folder in ("by-flag", "by-env", "by-old", ".", ".config", "config"):
        write(tmp_path / folder / name)
    for folder in (".", ".config"):
        write(tmp_path / folder / toml, '[[controllers]]\ntype = "echo"\n')
    (tmp_path / "empty").mkdir()
    env = {"CHATGPT_APISERVER_CONFIG_FILE": env_file, "CONFIG_FILE": old_file, "CHATGPT_APISERVER_CONFIG_PATH": "by-env"}
    env |= {"CONFIG_PATH": "by-old", "OPENAI_API_KEY": KEY}
    assert load({**env, "CHATGPT_APISERVER_CONFIG_FILE": "nowhere"}, flag, "by-flag").source == flag
    for variable, path, source in (
        ("CHATGPT_APISERVER_CONFIG_FILE", "by-flag", env_file),
        ("CONFIG_FILE", "by-flag", old_file),
        ("", "by-flag", f"by-flag/{name}"),
        ("CHATGPT_APISERVER_CONFIG_PATH", "empty", f"by-env/{name}"),
        ("CONFIG_PATH", "", f"by-old/{name}"),
    ):
        assert load(env, "", path).source == source
        if variable:
            with pytest.raises(app.ConfigError, match=f"^{variable}: nowhere: no such"):  # never skipped
                load({**env, variable: "nowhere"}, "", path)
            del env[variable]
    for file in (name, toml, f".config/{name}", f".config/{toml}"):
        assert Path(load(env).source) == Path(file)
        (tmp_path / file).unlink()
    assert load(env).source == "OPENAI_API_KEY"
    for more, words in (
        ({}, r"(?s)--config_file.*OPENAI_API_KEY.*--demo"),
        ({"file": "empty"}, r"^--config_file: empty: is not a file"),
        ({"path": flag}, r"^--config_path: .*: is not a folder"),
    ):
        with pytest.raises(app.ConfigError, match=words):
            load(**more)


@pytest.mark.parametrize("pool", [None, {}, {"type": "random", "max_wait": 5}])
def test_every_scalar_can_be_overridden(tmp_path: Path, pool: Any) -> None:
    """Each top-level and pool scalar has its variable, which overrides the file; a flag overrides the variable."""
    names = "HOST PORT DRAIN_DELAY DRAIN_TIMEOUT POOL_TYPE POOL_MAX_WAIT POOL_MAX_QUEUE POOL_RESCUE_AFTER POOL_AFFINITY"
    values = ["1", "2", "3", "4.5", "fastest", "6", "7", "8", "False"]
    env = {"CHATGPT_APISERVER_" + name: value for name, value in zip(names.split(), values, strict=True)}
    file = write(tmp_path / "c.json", {**VALID, "pool": pool, "port": 1})
    config = load(env, file)
    assert (config.host, config.port, config.drain_delay, config.drain_timeout) == ("1", 2, 3, 4.5)
    assert config.pool == app.PoolConfig("fastest", 6.0, 7, 8.0, False)
    config = load(env, file, port="3", host=None)
    assert (config.port, config.host, load(file=file).port) == (3, "1", 1)
    assert load({"CHATGPT_APISERVER_POOL_RESCUE_AFTER": "auto"}, file).pool.rescue_after is None
    assert load({"CHATGPT_APISERVER_POOL_AFFINITY": "true"}, file).pool.affinity is True


def test_unknown_variables(tmp_path: Path) -> None:
    """A misspelt override is an error; variables of Kubernetes and secrets that the file reads are not."""
    file = write(tmp_path / "c.json")
    known = "known after CHATGPT_APISERVER_: CONFIG_FILE, "
    for name, words in (("POOL_TIPE", "did you mean 'POOL_TYPE'?"), ("LOG_LEVEL", known), ("POOL_ALIASES", known)):
        with pytest.raises(app.ConfigError, match=f"^CHATGPT_APISERVER_{name}: unknown variable; {re.escape(words)}"):
            load({"CHATGPT_APISERVER_" + name: "random"}, file)
    names = "SERVICE_HOST SERVICE_PORT_HTTP PORT_80_TCP_ADDR BLUE_SERVICE_PORT BLUE_PORT_80_TCP_PROTO ALICE_KEY PORT"
    for name in names.split():
        assert load({"CHATGPT_APISERVER_" + name: "tcp://10.0.0.1:80" if name == "PORT" else "x"}, file).port == 8080


def test_messages_name_the_flag_or_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message names the flag or variable that set a wrong value, in place of the file."""
    file = write(tmp_path / "c.json", {**VALID, "host": 5})
    for name, value, found in (
        ("PORT", "x", '"x", allowed: a whole number from 0'),
        ("DRAIN_DELAY", "x", '"x"'),
        ("POOL_MAX_WAIT", "-1", "-1, allowed: a number from 0 to 3600"),
        ("POOL_AFFINITY", "x", "a string, allowed: true or false"),
    ):
        with pytest.raises(app.ConfigError, match=f"^CHATGPT_APISERVER_{name}: found {found}"):
            load({"CHATGPT_APISERVER_" + name: value, "CHATGPT_APISERVER_HOST": "::1"}, file)
    with pytest.raises(app.ConfigError, match=r"^--port: found \"x\", allowed: a whole number from 0"):
        load({"CHATGPT_APISERVER_PORT": "y", "CHATGPT_APISERVER_HOST": "::1"}, file, port="x")
    with pytest.raises(app.ConfigError, match=r"c\.json: host: found a number"):
        load({"CHATGPT_APISERVER_PORT": "y"}, file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "CONFIG_FOLDERS", (".",))
    for name, value in (("OPENAI_BASE_URL", "ftp://a"), ("OPENAI_ORG_ID", "a\nb"), ("OPENAI_API_KEY", "a\nb")):
        with pytest.raises(app.ConfigError, match=f"^{name}: "):
            load({"OPENAI_API_KEY": KEY, name: value})
    monkeypatch.setenv("https_proxy", "socks5://a")
    with pytest.raises(app.ConfigError, match=r"^https_proxy, http_proxy or all_proxy: found socks5://"):
        load({"OPENAI_API_KEY": KEY})


@pytest.mark.parametrize("value", ["$NAME", "${NAME}", "file:key.txt"])
def test_secrets(tmp_path: Path, value: str) -> None:
    """A secret comes from a variable or a file beside the configuration, without its line end; a client's is hashed."""
    write(tmp_path / "key.txt", KEY + "\n")
    data = {**with_config(api_key=value, headers={"X-A": value}), "client_keys": [{"key": value}]}
    config = load({"NAME": KEY}, write(tmp_path / "c.json", data))
    assert config.controllers[0].account.api_key.reveal() == KEY
    assert config.controllers[0].account.headers == (("X-A", app.Secret(KEY)),)
    digest = hashlib.sha256(KEY.encode())
    assert config.client_keys[0].digest == digest.digest() and "Secret" not in repr(config)
    assert parse(client_keys=[{"key": "sha256:" + digest.hexdigest().upper()}]).client_keys == config.client_keys


def test_file_of_the_go_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files run unchanged: port as a string, `config_file` beside the file or in the working directory."""
    write(tmp_path / ".config" / "openai.json", {"api_key": KEY, "proxy": f"http://user:{PASSWORD}@proxy:3128"})
    write(tmp_path / "second.json", {"api_key": KEY})
    files = [{"type": "openai", "config_file": "openai.json"}, {"type": "openai", "config_file": "second.json", "weight": 2}]
    write(tmp_path / ".config" / app.CONFIG_NAMES[0], {"port": "8081", "pool": {"type": "balanced"}, "controllers": files})
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


def test_secret_is_never_shown() -> None:
    """However it is printed, a secret shows at most its last four letters."""
    texts = {"": "none", KEY: "sk-…wxyz", "abcdefghijkl": "…ijkl", "abcdefghijk": "…", "sk-short": "sk-…"}
    for value, shown in texts.items():
        secret = app.Secret(value)
        assert {repr(secret), str(secret), f"{secret}", f"{secret!r}"} == {shown}
        assert secret.reveal() == value and bool(secret) is bool(value)
        assert secret == app.Secret(value) != app.Secret(value + "x")


def test_the_summary_shows_settings_and_no_secrets() -> None:
    """--check and the log show what differs from the defaults, with the paths of the file."""
    config = {"api_key": KEY, "proxy": f"http://user:{PASSWORD}@proxy:1", "headers": {"X-Key": PASSWORD + "-more"}}
    parsed = parse(
        controllers=[
            {"name": "a", "models": ["m"], "objects": True, "limits": {"rpm": 5}, "model_map": {"x": "y"}, "config": config},
            {"type": "echo"},
        ],
        client_keys=[{"key": KEY}, {"name": "bob", "key": "sha256:" + 64 * "a", "models": ["m"]}],
        pool={"aliases": {"fast": "m"}, "fallbacks": {"m": ["n", "o"]}, "affinity": False, "rescue_after": 0},
        host="::1",
    )
    lines = app.describe(parsed)
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
    for text in ("\n".join(lines), repr(parsed)):
        assert "SecretSecret" not in text and PASSWORD not in text
    assert set(app.secrets_of(parsed)) >= {KEY, PASSWORD, PASSWORD + "-more"}


def test_is_loopback() -> None:
    """Only addresses of this machine and localhost are loopback."""
    assert all(map(app.is_loopback, ("localhost", "127.0.0.9", "::1", "[::1]")))
    assert not any(map(app.is_loopback, ("0.0.0.0", "::", "a", "")))


def test_account_dialect() -> None:
    """The key's header, the path of chats and the changes to parameters can be configured."""
    plain = account(base_url="http://up:8/v1/", api_key="")
    assert plain == app.AccountConfig(base_url="http://up:8/v1")
    data = {"auth_header": "api-key", "auth_scheme": "", "chat_path": "/v2/chat"}
    changed = account(**data, drop_params=["user"], rename_params={"a": "b"}, extra_body={"a": {"b": [None, 1.5]}})
    assert {name: getattr(changed, name) for name in data} == data
    assert (changed.drop_params, changed.rename_params) == (("user",), (("a", "b"),))
    assert changed.extra_body == (("a", {"b": [None, 1.5]}),)
    assert account("azure", base_url="https://r.example", auth_header="Authorization").auth_scheme == "Bearer"


@pytest.mark.parametrize("name", sorted({*app.PRESETS} - {"openai", "azure", "anthropic", "echo"}))
def test_presets(name: str) -> None:
    """A vendor's name gives its address and its parameters. A local server needs no key, every other uses TLS."""
    preset = app.PRESETS[name]
    local = urllib.parse.urlsplit(preset["base_url"]).hostname == "localhost"
    assert preset["base_url"].startswith("http:" if local else "https:")
    words = dict.fromkeys(re.findall(r"\{(\w+)\}", preset["base_url"]), "eu-1")
    vendor = account(name, **words, api_key="" if local else KEY)
    assert vendor.base_url == re.sub(r"\{\w+\}", "eu-1", preset["base_url"])
    assert dict(vendor.rename_params) == preset.get("rename_params", {})
    for key in ("drop_params", "refuses", "rate_codes"):
        assert list(getattr(vendor, key)) == preset.get(key, [])


def test_a_preset_gives_way() -> None:
    """The user's values win over the vendor's preset; null, and an empty text where there is a preset, do not count."""
    url = "https://gate.example/v1"
    changed = account("mistral", base_url=url, rename_params={"a": "b"}, drop_params=[], api_key=None)
    assert changed == app.AccountConfig(base_url=url, rename_params=(("a", "b"),), refuses=changed.refuses)
    preset = account("mistral", base_url="", drop_params=None)
    assert preset.base_url == app.PRESETS["mistral"]["base_url"] and preset.drop_params == ("stream_options",)


def test_changes_of_a_reload(tmp_path: Path) -> None:
    """Each setting that changed is shown as the file spells it, with both values and no secret; lists show their names."""
    for name in ("server.pem", "server.key"):
        write(tmp_path / name, "x")
    a, b, c = ({"name": "a", "config": {"api_key": KEY}}, {"name": "b", "type": "echo"}, {"name": "c", "type": "echo"})
    keys = [{"name": "alice", "key": KEY}, {"name": "bob", "key": PASSWORD}]
    old = parse(controllers=[a, b, c], client_keys=keys, pool={"type": "random"})
    assert app.diff_config(old, replace(old, source="d.json")) == []
    changed = {**a, "weight": 3, "config": {"api_key": KEY + "2", "proxy": f"http://u:{PASSWORD}@p:1"}}
    new = parse(
        controllers=[c, changed, {"name": "d", "type": "echo"}],
        client_keys=[{"name": "bob", "key": KEY}],
        host=PASTED[0],
        port=1,
        pool={"max_wait": 5, "fallbacks": {"a": ["b"]}, "rescue_after": 3},
        tls={"cert": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")},
    )
    before, after = ("sha256:" + hashlib.sha256(key.encode()).hexdigest()[:8] + "…" for key in (PASSWORD, KEY))
    assert app.diff_config(old, new) == [
        "controllers: a, b, c -> c, a, d",
        "controllers[a].config.api_key: sk-…wxyz -> sk-…xyz2",
        "controllers[a].config.proxy: none -> p:1",
        "controllers[a].weight: 1 -> 3",
        "client_keys: alice, bob -> bob",
        f"client_keys[bob].key: {before} -> {after}",
        "host: 127.0.0.1 -> sk-…f456 (needs a restart)",
        "port: 8080 -> 1 (needs a restart)",
        "pool.type: random -> balanced",
        "pool.max_wait: 30.0 -> 5.0",
        "pool.rescue_after: auto -> 3.0",
        "pool.fallbacks: none -> a -> b",
        f"tls.cert: none -> {tmp_path / 'server.pem'}",
        f"tls.key: none -> {tmp_path / 'server.key'}",
    ]
