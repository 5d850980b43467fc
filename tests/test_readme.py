"""The README: its configurations parse, its keys exist, its commands run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chatgpt_apiserver as app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_configurations_are_good() -> None:
    """Every JSON block is a configuration that the server accepts."""
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        app.parse_config(json.loads(block), "README.md", {"OPENAI_API_KEY": "sk-0123456789"})


def test_keys_of_the_tables_exist() -> None:
    """Each key of the limits, pool and timeouts that the tables name is one that the server reads."""
    fields = {"limits": app.ServerLimits, "pool": app.PoolConfig, "timeouts": app.Timeouts, "config": app.AccountConfig}
    named = re.findall(r"`(limits|pool|timeouts|config)\.(\w+)`", README)
    assert len(named) > 20
    for section, key in named:
        assert hasattr(fields[section](), key), f"{section}.{key}"


def test_every_key_is_in_the_tables() -> None:
    """No server limit, pool key or timeout is missing from the reference."""
    for section, kind in (("limits", app.ServerLimits), ("pool", app.PoolConfig), ("timeouts", app.Timeouts)):
        for key in kind.fields:
            assert f"`{section}.{key}`" in README, f"{section}.{key}"


def test_the_demo_command_starts() -> None:
    """The first command of the README listens and ends with status 0 at Ctrl-C."""
    assert "python3 chatgpt_apiserver.py --demo\n" in README
    command = [sys.executable, str(ROOT / "chatgpt_apiserver.py"), "--demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        for line in server.stderr:
            if "listening on http://127.0.0.1:" in line:
                break
        server.send_signal(2)
        rest = server.stderr.read()
    assert server.returncode == 0 and "Traceback" not in rest


def test_the_image_is_healthy_while_it_serves() -> None:
    """The Dockerfile's health check asks the server itself, whatever proxy is there for the accounts."""
    check = json.loads((ROOT / "Dockerfile").read_text().partition("HEALTHCHECK")[2].partition("CMD")[2].partition("\n")[0])
    command = [sys.executable, str(ROOT / "chatgpt_apiserver.py"), "--demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        port = next(line for line in server.stderr if "listening on " in line).strip().rpartition(":")[2]
        check = [sys.executable, *(word.replace("8080", port) for word in check[1:])]
        env = dict(os.environ, http_proxy="http://127.0.0.1:9")
        serves = subprocess.run(check, stderr=subprocess.DEVNULL, env=env, timeout=30, check=False).returncode
        server.send_signal(2)
        server.stderr.read()
    ended = subprocess.run(check, stderr=subprocess.DEVNULL, env=env, timeout=30, check=False).returncode
    assert (serves, ended) == (0, 1)


def test_every_vendor_is_named() -> None:
    """Messages send the reader to the README for the vendors' names."""
    assert not [name for name in app.PRESETS if f"`{name}`" not in README]
