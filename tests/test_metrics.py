"""What GET /metrics tells: the text format, the sums, the labels, and the files in config/ that read it."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, KEY, Running, Upstream, answers, controller, error_reply, json_reply
from .test_deployment import tool

CONFIG = Path(app.__file__).parent / "config"
ADMIN = "client-key-of-an-admin"
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 3}}
GOOD = json_reply(200, {**ANSWER, "usage": USAGE})
LIMITED = error_reply(429, "rate_limit_exceeded", "slow down", "Retry-After: 60")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> tuple[dict[str, str], Samples]:
    """Return types and samples of Prometheus' text format 0.0.4; fail where the text breaks its rules."""
    types: dict[str, str] = {}
    samples: Samples = {}
    current = ""
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in types, line
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current and kind in ("counter", "gauge", "histogram"), line
            types[name] = kind
        else:
            match = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (\S+)', line)
            assert match, line
            labels = tuple(re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            suffixes = "(_bucket|_sum|_count)" if types[current] == "histogram" else ""
            assert re.fullmatch(current + suffixes, match[1]) and (match[1], labels) not in samples, line
            samples[match[1], labels] = float(match[3])
    return types, samples


async def scrape(server: Running, *headers: str) -> Samples:
    """Return the samples of a server; their names without the prefix."""
    reply = await server.ask("GET", "/metrics", b"", *headers)
    assert reply.status == 200 and reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    _, samples = parse(reply.body.decode())
    return {(name.removeprefix("chatgpt_apiserver_"), labels): value for (name, labels), value in samples.items()}


async def test_the_sums_of_some_requests() -> None:
    """Requests, attempts, tokens, limits and times are counted by controller, model, status and outcome."""
    async with Upstream(answers(LIMITED)) as one, Upstream(answers(GOOD)) as two:
        controllers = [controller(name, up.url, models=["m"]) for name, up in (("a", one), ("b", two))]
        async with Running(*controllers, pool={"type": "priority"}) as server:
            for model in ("m", "m", 'made-up "model"\n'):
                await server.post(model)
            await server.status()
            samples = await scrape(server)
    counted = {key: value for key, value in samples.items() if key[0] in ("requests_total", "attempts_total", "tokens_total")}
    good = (("controller", "b"), ("model", "m"))
    assert counted == {
        ("requests_total", (*good, ("status", "200"), ("outcome", "ok"))): 2,
        ("requests_total", (("controller", ""), ("model", "other"), ("status", "404"), ("outcome", "none"))): 1,
        ("attempts_total", (("controller", "a"), ("outcome", "rate"))): 1,
        ("attempts_total", (("controller", "b"), ("outcome", "ok"))): 2,
        ("tokens_total", (*good, ("kind", "input"))): 14,
        ("tokens_total", (*good, ("kind", "output"))): 10,
        ("tokens_total", (*good, ("kind", "cached"))): 6,
    }
    assert (samples["rate_limits_seen_total", (("controller", "a"),)], samples["rate_limits_avoided_total", ()]) == (1, 2)
    buckets = [value for (name, _), value in samples.items() if name == "request_seconds_bucket"]
    assert buckets == sorted(buckets) and buckets[-1] == samples["request_seconds_count", (("controller", "b"),)] == 2
    assert samples["answer_bytes_total", ()] > 400 and samples["wait_seconds_total", ()] == 0


async def test_the_state_of_the_pool() -> None:
    """State, headroom and connections are those of the moment; counters go on over a reload."""
    up_limits = ("x-ratelimit-limit-tokens: 1000", "x-ratelimit-remaining-tokens: 900", "x-ratelimit-reset-tokens: 6s")
    async with Upstream(answers(json_reply(200, ANSWER, *up_limits))) as one:
        limited = controller("a", one.url, models=["m"], limits={"rpm": 10})
        async with Running(limited, controller("c", one.url, models=["n"])) as server:
            await server.post("m")
            first = await scrape(server)
            server.reload(controller("c", one.url, models=["n"]))
            second = await scrape(server)
    label = (("controller", "a"),)
    assert first["headroom_requests", (*label, ("model", "m"))] == 9 and 890 < first["headroom_tokens", (*label, ("model", "m"))] < 1000
    assert [first["controller_state", (*label, ("state", state))] for state in ("ok", "limited", "out")] == [1, 0, 0]
    assert first["client_connections", ()] >= 1 and first["upstream_connections", (("state", "idle"),)] >= 1
    assert first["process_cpu_seconds_total", ()] > 0 and first["process_start_time_seconds", ()] > 1.7e9
    assert ("in_flight_requests", label) in first and ("in_flight_requests", label) not in second
    name = ("requests_total", (("controller", "a"), ("model", "m"), ("status", "200"), ("outcome", "ok")))
    assert first[name] == second[name] == 1


async def test_metrics_are_for_operators() -> None:
    """With client keys only an admin key opens them; without, nothing that came through a proxy."""
    keys = [{"key": KEY}, {"key": ADMIN, "admin": True}]
    async with Running(client_keys=keys) as server:
        asked = [await server.ask("GET", "/metrics", b"", line) for line in ("X: 1", "api-key: " + KEY, "api-key: " + ADMIN)]
        assert [reply.status for reply in asked] == [401, 403, 200]
    async with Running() as server:
        asked = [await server.ask("GET", "/metrics", b"", line) for line in ("X: 1", "X-Forwarded-For: 127.0.0.1")]
        assert [reply.status for reply in asked] == [200, 403]


def test_labels_are_escaped() -> None:
    """Names in the configuration may have any printable character."""
    name = 'a "b" \\ c'
    metrics = app.Metrics()
    record = app.AccessRecord("::1", "POST", "/", 0.0, controller=name, status=200, until=1.0, first_at=0.5)
    metrics.count(record, ())
    pool, links = app.UpstreamPool([], app.PoolConfig(), asyncio.new_event_loop()), app.ConnectionPool()
    _, samples = parse(metrics.render(pool, links, 0))
    pool.timers.close()
    assert samples["chatgpt_apiserver_request_seconds_count", (("controller", r"a \"b\" \\ c"),)] == 1


# -- the files in config/


def expressions() -> list[str]:
    """Return every expression of the dashboard and of the alerts."""
    board = json.loads((CONFIG / "grafana-dashboard.json").read_text())
    alerts = re.findall(r"^ +expr: (.+)$", (CONFIG / "alerts.yml").read_text(), re.MULTILINE)
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(alerts) >= 5 and len(panels) >= 10
    return [*alerts, *panels]


@pytest.mark.parametrize("expression", expressions())
async def test_the_expressions_of_dashboard_and_alerts(expression: str) -> None:
    """Each metric of an expression is in a scrape, with the labels that the expression uses."""
    async with Upstream(answers(LIMITED, GOOD)) as one:
        limited = controller("a", one.url, models=["m"], limits={"rpm": 10, "tpm": 10_000})
        async with Running(limited, controller("b", one.url, models=["m"])) as server:
            await server.post("m")
            reply = await server.ask("GET", "/metrics")
    _, samples = parse(reply.body.decode())
    labels: dict[str, set[str]] = {}
    for name, pairs in samples:
        labels.setdefault(name, set()).update(label for label, _ in pairs)
    used = re.findall(r"\b(chatgpt_apiserver_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expression)
    assert used, expression
    known = set()
    for name, matchers in used:
        if name != "up":  # Prometheus makes it
            assert name in labels, name
            known |= labels[name]
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[name] | {"job", "instance"}
    grouped = {label for names in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.split(r",\s*", names)}
    assert grouped <= known | {"job", "instance"}, expression


async def test_prometheus_accepts_metrics_and_expressions(tmp_path: Path) -> None:
    """Its own tool finds nothing to say of a scrape, the alerts, and the expressions of the dashboard."""
    promtool = tool("promtool")
    rules = [{"record": f"panel_{number}", "expr": expression} for number, expression in enumerate(expressions())]
    # JSON is YAML.
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    async with Running() as server:
        await server.post("echo")
        body = (await server.ask("GET", "/metrics")).body
    files = (str(CONFIG / "alerts.yml"), str(tmp_path / "rules.yml"))
    for words, given in ((("check", "metrics"), body), (("check", "rules", *files), b"")):
        command = [promtool, *words]
        ended = await asyncio.to_thread(subprocess.run, command, input=given, capture_output=True, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (0, b""), ended
