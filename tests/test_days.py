"""Limits of a calendar day, and the budgets of client keys."""

import asyncio
import datetime as dt
import re
import time
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

from .support import ANSWER, KEY, Running, Upstream, answers, controller, json_reply

DAY_S = 86400.0
USAGE = {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}
GOOD = json_reply(200, {**ANSWER, "usage": USAGE})


def unix(text: str) -> float:
    """Return the Unix time of an ISO time."""
    return dt.datetime.fromisoformat(text).timestamp()


class Clock:
    """A wall clock that a test sets."""

    def __init__(self, text: str) -> None:
        self.now = unix(text)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("zone", "now", "ends"),
    [
        ("UTC", "2026-12-01T23:59:59+00:00", "2026-12-02T00:00:00+00:00"),
        ("UTC", "2026-12-02T00:00:00+00:00", "2026-12-03T00:00:00+00:00"),
        ("America/Los_Angeles", "2026-12-01T12:00:00+00:00", "2026-12-02T08:00:00+00:00"),
        ("America/Los_Angeles", "2026-03-08T08:00:00+00:00", "2026-03-09T07:00:00+00:00"),  # 23 hours
        ("America/Los_Angeles", "2026-11-01T07:00:00+00:00", "2026-11-02T08:00:00+00:00"),  # 25 hours
        ("Asia/Kolkata", "2026-12-01T18:29:00+00:00", "2026-12-01T18:30:00+00:00"),
    ],
)
def test_a_day_ends_at_midnight_of_its_zone(zone: str, now: str, ends: str) -> None:
    """Days with a change of the clock are shorter or longer."""
    assert app.day_end(unix(now), app.zone_of(zone)) == unix(ends)


def test_a_day_of_a_limit() -> None:
    """A spent day opens at midnight; what is not sent by then counts for the next day, what was sent does not."""
    clock = Clock("2026-12-01T23:00:00+00:00")
    window = app.DayWindow(False, 3, "UTC", clock)
    receipts = [window.take(1.0, 0.0) for _ in range(3)]
    for receipt in receipts[:2]:
        window.sent(receipt, 0.0)
    assert window.opens_at(1.0, 5.0) == 5.0 + 3600 and window.left_at(5.0) == 0
    window.correct(receipts[1], 0.0, 5.0)
    assert window.opens_at(1.0, 5.0) == 0.0
    clock.now += 3600
    assert window.left_at(10.0) == 2
    window.correct(receipts[0], 0.0, 10.0)
    assert window.left_at(10.0) == 2
    window.correct(receipts[0], 2.0, 10.0)
    assert window.left_at(10.0) == 0 and window.opens_at(1.0, 10.0) == pytest.approx(10.0 + DAY_S)


def test_a_prompt_larger_than_a_day() -> None:
    """It goes when nothing of the day is used."""
    window = app.DayWindow(True, 100, "UTC", Clock("2026-12-01T12:00:00+00:00"))
    assert window.opens_at(500.0, 0.0) == 0.0
    window.take(1.0, 0.0)
    assert window.opens_at(500.0, 0.0) == DAY_S / 2


async def test_500_at_once_on_a_daily_limit() -> None:
    """Not one request is over; the others go to the next account, and get 429 with the true time when all are spent."""
    async with Upstream(answers(GOOD)) as one, Upstream(answers(GOOD)) as two:
        first, second = controller("a", one.url, limits={"rpd": 100}), controller("b", two.url, limits={"rpd": 300})
        async with Running(first, second, pool={"type": "priority"}) as server:
            replies = await asyncio.gather(*(server.post("m") for _ in range(500)))
            assert len(one.seen) == 100 and len(two.seen) == 300
            refused = [reply for reply in replies if reply.status == 429]
            states = (await server.status())["controllers"]
    assert len(refused) == 100
    left_s = app.day_end(time.time(), dt.UTC) - time.time()
    assert all(-5 < int(reply.headers["retry-after"]) - left_s < 60 for reply in refused)
    assert [state["state"] for state in states] == ["limited", "limited"]
    rpd = states[0]["ledger"]["m"]["rpd"]
    assert (rpd["limit"], rpd["taken"]) == (100, 100) and 0 <= left_s - rpd["ends_in_s"] + 5 < 60


async def test_a_day_survives_reload_and_restart(tmp_path: Path) -> None:
    """A reload that changes other limits keeps the count, and so does a restart with a state_file."""
    file = str(tmp_path / "state.sqlite")
    keys = [{"name": "alice", "key": KEY, "limits": {"tpd": 1000}, "admin": True}]
    async with Upstream(answers(GOOD)) as up:
        for expected in (1, 2):
            more: dict[str, Any] = {"state_file": file, "client_keys": keys}
            async with Running(controller("a", up.url, limits={"rpd": 50}), **more) as server:
                assert (await server.post("m", "api-key: " + KEY)).status == 200
                server.reload(controller("a", up.url, limits={"rpd": 60, "rpm": 10}), **more)
                reply = await server.ask("GET", "/status?verbose=1", b"", "api-key: " + KEY)
                rpd = reply.json()["controllers"][0]["ledger"]["m"]["rpd"]
                assert (rpd["limit"], rpd["taken"]) == (60, expected)
                assert server.server.client_quotas["alice"].ledger("").days[0].total == 100 * expected


@pytest.mark.parametrize(
    ("budget", "unit"),
    [
        ({"tokens_per_day": 150}, "150 tokens per day"),
        ({"tokens_per_month": 150}, "150 tokens per month"),
        ({"cost_per_day": 0.015}, "0.015 cost per day"),
        ({"cost_per_month": 0.015}, "0.015 cost per month"),
    ],
)
async def test_a_budget(budget: dict[str, float], unit: str, tmp_path: Path) -> None:
    """A spent budget is 429 insufficient_quota until its day or month ends, also after a restart; other keys go on."""
    keys = [{"name": "alice", "key": KEY, "budget": budget}, {"name": "bob", "key": "another-key-of-bob"}]
    more: dict[str, Any] = {"client_keys": keys, "prices": {"*": {"input": 100, "output": 100}}}
    more["state_file"] = str(tmp_path / "state.sqlite")
    async with Upstream(answers(GOOD)) as up:
        async with Running(controller("a", up.url), **more) as server:
            assert [(await server.post("m", "api-key: " + KEY)).status for _ in range(3)] == [200, 200, 429]
        async with Running(controller("a", up.url), **more) as server:
            reply = await server.post("m", "api-key: " + KEY)
            assert (await server.post("m", "api-key: another-key-of-bob")).status == 200
    error = reply.json()["error"]
    assert reply.status == 429 and (error["code"], error["type"]) == ("insufficient_quota", "insufficient_quota")
    assert error["message"] == f"The client key 'alice' has used up its budget of {unit}."
    now = dt.datetime.now(dt.UTC)
    first = (now.replace(day=1) + dt.timedelta(days=32)).replace(day=1) if "month" in unit else now + dt.timedelta(days=1)
    ends = first.replace(hour=0, minute=0, second=0, microsecond=0)
    assert -5 < int(reply.headers["retry-after"]) - (ends - now).total_seconds() < 60
    assert reply.headers["x-should-retry"] == "false" and len(up.seen) == 3


def test_zones() -> None:
    """Gemini's day begins at midnight of Pacific time; an unknown zone is refused in words."""
    gemini = {"base_url": "https://generativelanguage.googleapis.com/v1beta/openai", "api_key": "k"}
    for account, limits, zone in (
        (gemini, {"rpd": 9}, "America/Los_Angeles"),
        (gemini, {"rpd": 9, "day_starts": "UTC"}, "UTC"),
        ({"api_key": "k"}, {"rpd": 9}, "UTC"),
    ):
        config = app.parse_config({"controllers": [{"config": account, "limits": limits}]}, "test", {})
        assert config.controllers[0].limits.day_starts == zone
    with pytest.raises(app.ConfigError, match=re.escape("controllers[0].limits.day_starts")):
        app.parse_config({"controllers": [{"type": "echo", "limits": {"day_starts": "Mars/Base"}}]}, "test", {})
