"""Configuration: where it is found, what it may hold, and how each mistake is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

ROOT = Path(__file__).resolve().parent.parent
ONE = {"type": "openai", "config": {"api_key": "sk-0123456789abcdef"}}
ECHO = {"type": "echo"}


def parse(env: dict[str, str] | None = None, **top: Any) -> app.Config:
    """A configuration from keys; one echo controller unless others are given."""
    return app.parse_config({"controllers": [ECHO], **top}, "c.json", env or {})


@pytest.mark.parametrize(
    ("top", "parts"),
    [
        ({"prot": 1}, ["prot", "unknown key", "'port'"]),
        ({"port": "80a"}, ["port", '"80a"', "0 to 65535"]),
        ({"port": True}, ["port", "true"]),
        ({"port": 70000}, ["port", "70000"]),
        ({"host": 5}, ["host", "5", "a string"]),
        ({"pool": {"type": "balancd"}}, ["pool.type", "balancd", "'balanced'"]),
        ({"pool": {"max_wait": -1}}, ["pool.max_wait", "-1", "0 to 3600"]),
        ({"pool": []}, ["pool", "[]", "an object"]),
        ({"controllers": []}, ["controllers", "at least one"]),
        ({"controllers": {}}, ["controllers", "a list"]),
        ({"controllers": [{"type": "opena"}]}, ["controllers[0].type", "opena", "'openai'"]),
        ({"controllers": [{"type": "openai"}]}, ["controllers[0].config.api_key", "an API key"]),
        ({"controllers": [{"config": {"api_kee": "sk"}}]}, ["controllers[0].config"]),
        ({"controllers": [{"type": "echo", "wieght": 2}]}, ["controllers[0].wieght", "'weight'"]),
        ({"controllers": [{"type": "echo", "weight": 0}]}, ["controllers[0].weight", "1 to"]),
        ({"controllers": [{"type": "echo", "name": "a"}, {"type": "echo", "name": "a"}]}, ["controllers[1].name"]),
        ({"controllers": [{"config": {"api_key": "$NOT_SET"}}]}, ["api_key", "NOT_SET is not set"]),
        ({"controllers": [{"config": {"api_key": "file:none"}}]}, ["api_key", "a readable file"]),
        ({"controllers": [{"config": {"api_key": "k", "base_url": "ftp://x"}}]}, ["base_url", "https://host"]),
        ({"controllers": [{"config": {"api_key": "k", "proxy": "socks5://u:hunter22@x"}}]}, ["proxy", "http://["]),
        ({"controllers": [{"config": {"api_key": "k", "ca_file": "none.pem"}}]}, ["ca_file", "existing file"]),
        ({"controllers": [{"config": {"api_key": "k", "headers": {"A B": "x"}}}]}, ["headers.A B"]),
        ({"controllers": [{"config": {"api_key": "k", "headers": {"X": "a\r\nb"}}}]}, ["headers.X", "printable"]),
        ({"endpoints": ["all"]}, ["endpoints[0]", "inference"]),
        ({"client_keys": [{"name": "a"}]}, ["client_keys[0].key"]),
        ({"limits": {"body_bytes": 0}}, ["limits.body_bytes", "0", "1 to"]),
        ({"tls": {"cert": ""}, "log": {"level": "loud"}}, ["log.level", "loud", "debug"]),
    ],
)
def test_every_mistake_is_told(top: dict[str, Any], parts: list[str]) -> None:
    """A message names the file, the path, what was found, what is allowed and the nearest key; no secret is in it."""
    with pytest.raises(app.ConfigError) as told:
        parse(**top)
    assert str(told.value).startswith("c.json: ") and "hunter22" not in str(told.value)
    for part in parts:
        assert part in str(told.value)


def test_the_go_originals_files_run(tmp_path: Path) -> None:
    """Port as a string, pool type, a controller in its own file, and a missing weight."""
    (tmp_path / "openai.json").write_text('{"api_key": "sk-from-the-file", "proxy": "http://127.0.0.1:3128"}')
    controllers = [dict(ONE, weight=5), {"type": "openai", "config_file": "openai.json"}]
    path = tmp_path / "chatgpt-apiserver.json"
    path.write_text(json.dumps({"port": "8081", "pool": {"type": "random"}, "controllers": controllers}))
    config = app.load_config(str(path), "", {}, {})
    assert (config.port, config.pool.type, [one.weight for one in config.controllers]) == (8081, "random", [5, 1])
    assert config.controllers[1].account.api_key.reveal() == "sk-from-the-file"
    assert config.controllers[1].account.proxy.reveal() == "http://127.0.0.1:3128"


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag, the environment, then the folders in order; JSON before TOML."""
    monkeypatch.chdir(tmp_path)
    for place in ("config", ".config", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "chatgpt-apiserver.toml").write_text('[[controllers]]\ntype = "echo"\n')
        assert app.find_file("", "", {}) == str(Path(place) / "chatgpt-apiserver.toml") or place == "."
    (tmp_path / "chatgpt-apiserver.json").write_text("{}")
    assert app.find_file("", "", {}).endswith("chatgpt-apiserver.json")
    assert app.find_file("", "config", {}) == "config/chatgpt-apiserver.toml"
    assert app.find_file("", "", {"CONFIG_PATH": "config"}) == "config/chatgpt-apiserver.toml"
    assert app.find_file("", "", {"CONFIG_FILE": "chatgpt-apiserver.toml"}) == "chatgpt-apiserver.toml"
    assert app.load_config("", "config", {}, {}).controllers[0].type == "echo"
    for missing in ({"config_file": "none.json"}, {"config_path": "nowhere"}):
        with pytest.raises(app.ConfigError, match="no such"):
            app.load_config(missing.get("config_file", ""), missing.get("config_path", ""), {}, {})


@pytest.mark.parametrize("text", ["{", '{"port": 1, "port": 2}', "[1]", "\xff"])
def test_broken_files_are_errors(tmp_path: Path, text: str) -> None:
    """A file that cannot be read as one object is never skipped."""
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(app.ConfigError, match=r"c\.json: "):
        app.load_config(str(path), "", {}, {})


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    """CHATGPT_APISERVER_<KEY> overrides scalars, a flag overrides both; Kubernetes' own PORT is ignored."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"port": 1, "pool": {"type": "random", "max_wait": 3}, "controllers": [ECHO]}))
    env = {"CHATGPT_APISERVER_PORT": "9000", "CHATGPT_APISERVER_POOL_TYPE": "priority", "CHATGPT_APISERVER_HOST": "::1"}
    config = app.load_config(str(path), "", {"port": None}, env)
    assert (config.port, config.pool.type, config.pool.max_wait, config.host) == (9000, "priority", 3, "::1")
    assert app.load_config(str(path), "", {"port": "7000"}, env).port == 7000
    assert app.load_config(str(path), "", {}, {"CHATGPT_APISERVER_PORT": "tcp://10.0.0.1:80"}).port == 1


def test_a_key_in_the_environment_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_API_KEY starts one controller, with base URL, organisation, project and proxies of the environment."""
    monkeypatch.chdir(tmp_path)
    env = {
        "OPENAI_API_KEY": "sk-environment-key",
        "OPENAI_BASE_URL": "https://api.example/v1/",
        "OPENAI_ORG_ID": "org",
        "OPENAI_PROJECT_ID": "proj",
        "HTTPS_PROXY": "http://proxy:3128",
    }
    account = app.load_config("", "", {}, env).controllers[0].account
    assert (account.base_url, account.organization, account.project) == ("https://api.example/v1", "org", "proj")
    assert account.proxy.reveal() == "http://proxy:3128"
    assert not app.load_config("", "", {}, {**env, "no_proxy": ".example"}).controllers[0].account.proxy
    with pytest.raises(app.ConfigError, match="Three ways to start"):
        app.load_config("", "", {}, {})


def test_secrets(tmp_path: Path) -> None:
    """A literal, $NAME, ${NAME} or file:PATH; never shown but for its last letters."""
    (tmp_path / "key").write_text("sk-in-a-file-1234\n")
    for text in ("sk-in-a-file-1234", "$K", "${K}", f"file:{tmp_path}/key"):
        config = parse({"K": "sk-in-a-file-1234"}, controllers=[{"config": {"api_key": text}}])
        assert config.controllers[0].account.api_key.reveal() == "sk-in-a-file-1234"
        shown = repr(config) + "".join(app.describe(config))
        assert "in-a-file" not in shown and "sk-…1234" in shown
    hashed = parse(client_keys=[{"key": "sha256:" + "ab" * 32}]).client_keys[0]
    assert hashed.digest == bytes.fromhex("ab" * 32)


def test_quota_groups_have_equal_limits() -> None:
    """Members of one bucket cannot have different sizes."""
    group = [dict(ECHO, quota_group="g", name="a", limits={"rpm": 1}), dict(ECHO, quota_group="g", name="b")]
    with pytest.raises(app.ConfigError, match="equal limits"):
        parse(controllers=group)


def run(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, str(ROOT / "chatgpt_apiserver.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env or {}, cwd=ROOT / "tests")


def test_the_command_line() -> None:
    """--version, --check without secrets, dashes or underscores, and exit status 2 for what cannot be used."""
    assert run("--version").stdout == f"chatgpt_apiserver {app.__version__}\n"
    for flag in ("--config_file", "--config-file"):
        done = run("--check", flag, "../config/demo.json")
        assert done.returncode == 0 and "echo-b" in done.stdout
    keys = {"OPENAI_API_KEY": "sk-abcdefghijklmnop", "OPENAI_API_KEY_B": "sk-ponmlkjihgfedcba"}
    done = run("--check", "--config_file", "../config/chatgpt-apiserver.json", env=keys)
    assert done.returncode == 0 and "sk-…mnop" in done.stdout and "abcdefgh" not in done.stdout
    for flags in (["--config_file", "none.json"], [], ["--demo", "--port", "x"]):
        done = run(*flags)
        assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr
