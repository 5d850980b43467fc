"""What is known of an account: buckets, windows, ledgers, parking, breaker, suspicion; pure arithmetic, no loop."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest

import chatgpt_apiserver as app

NEVER = app.NEVER
T0 = 10_000.0


def upstream(name: str = "a", quota: "app.Quota | None" = None, **more: Any) -> app.Upstream:
    """An echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), **more)
    return app.Upstream(config, app.EchoController(config), quota or app.Quota(name, config.limits))


def seat(name: str = "a", model: str = "m", **limits: Any) -> app.Seat:
    """A controller with these limits, for one model."""
    return upstream(name, limits=app.QuotaLimits(**limits)).seat(model)


def lease(one: app.Seat, now: float = T0, need: float = 1.0, stream: bool = True, sent: bool = True) -> app.Lease:
    """A lease, by default of a request that was written at once."""
    made = app.Lease(one, need, stream, now)
    if sent:
        made.sent(now)
    return made


def told(limit: float, left: float, reset_s: "float | None" = None) -> app.Allowance:
    """What a reply says of a limit."""
    return app.Allowance(limit, left, reset_s)


def rebase(bucket: app.Bucket, said: app.Allowance, serial: int, now: float = T0, sent_at: float = T0, since: float = 0) -> None:
    """A reply to a request that was sent before anything was known."""
    expected = bucket.charge(0.0, now) + since - (now - sent_at) * bucket.rate
    bucket.rebase(said, serial, expected, sent_at if not bucket.limit else now, now)


def verdict(outcome: str, status: int = 500, **more: Any) -> app.Verdict:
    """What an attempt came to."""
    made = app.Verdict(app.Outcome(outcome), status)
    for name, value in more.items():
        setattr(made, name, value)
    return made


class Clock:
    """A clock that stands still, and timers that never fire."""

    def time(self) -> float:
        return T0

    def call_at(self, at: float, call: object, *args: object) -> "Clock":
        return self

    def cancel(self) -> None:
        pass


def limit_error(message: str = "", code: str = "rate_limit_exceeded", kind: str = "requests") -> bytes:
    """The body of a 429."""
    return app.compact_json({"error": {"message": message, "type": kind, "param": None, "code": code}})


# -- what replies say


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("17ms", 0.017),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1h2m3s", 3723.0),
        ("2m59.56s", 179.56),
        ("0", 0.0),
        ("59", 59.0),
        ("1.5", 1.5),
        ("600.0", 600.0),
        ("100us", 0.0001),
        ("1d", None),
        ("-1", None),
        ("-1s", None),
        ("", None),
        ("s", None),
        ("1s ", None),
        ("1 s", None),
        ("nan", None),
        ("inf", None),
        ("1e9", None),
        ("1s2", None),
        ("Tue, 24 Nov 2026 16:00:00 GMT", None),
    ],
)
def test_durations(text: str, seconds: "float | None") -> None:
    """Go durations and plain numbers are seconds; everything else is nothing."""
    found = app.parse_duration(text)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_durations_never_raise_and_are_never_negative() -> None:
    """Whatever a header says, the result is None or a finite time from zero on."""
    chance = random.Random(1)
    for _ in range(3000):
        text = "".join(chance.choice("0123456789.hmsuµn -+e") for _ in range(chance.randrange(12)))
        found = app.parse_duration(text)
        assert found is None or 0.0 <= found <= 1e12


@pytest.mark.parametrize(
    ("index", "message", "seconds"),
    [
        ({b"retry-after-ms": b"1500", b"retry-after": b"9"}, "try again in 7s", 1.5),
        ({b"retry-after": b"9"}, "try again in 7s", 9.0),
        ({b"retry-after": b"0"}, "", 0.0),
        ({b"retry-after": b"Tue, 24 Nov 2026 16:00:30 GMT"}, "", 30.0),
        ({b"retry-after": b"Tue, 24 Nov 2026 15:00:00 GMT"}, "", 0.0),
        ({b"retry-after": b"2026-11-24T16:00:05Z"}, "", 5.0),
        ({b"retry-after": b"-5"}, "try again in 7s", 7.0),
        ({b"retry-after": b"soon"}, "", None),
        ({b"retry-after-ms": b"x", b"retry-after": b"3"}, "", 3.0),
        ({}, "Rate limit reached. Please try again in 41.724s. Visit", 41.724),
        ({}, "Please try again in 6m0s.", 360.0),
        ({}, "Please try again in 20ms.", 0.02),
        ({}, "Please retry after 45 seconds.", 45.0),
        ({}, "Please retry after 1 second.", 1.0),
        ({}, "try again in 2 minutes", 120.0),
        ({}, "try again in 1 hour", 3600.0),
        ({}, "try again in 1h2m3s", 3723.0),
        ({}, "nothing to see", None),
    ],
)
def test_retry_after(index: "dict[bytes, bytes]", message: str, seconds: "float | None") -> None:
    """Milliseconds, seconds, a date, then the prose: the first that makes sense."""
    wall_s = 1_795_536_000.0  # 2026-11-24T16:00:00Z
    found = app.retry_after(index, message, b"", wall_s)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_delay_in_the_body_counts() -> None:
    """Google names its delay in the details of the error."""
    body = b'[{"error":{"code":429,"details":[{"retryDelay": "34s"}]}}]'
    assert app.judge_reply(429, {}, body, 0.0).after_s == 34.0


def fields(kind: bytes = b"requests", **values: bytes) -> "dict[bytes, bytes]":
    """OpenAI's fields of one limit."""
    return {b"x-ratelimit-%b-%b" % (name.encode(), kind): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (fields(limit=b"500", remaining=b"499", reset=b"120ms"), (500, 499, 0.12)),
        (fields(limit=b"500", remaining=b"499"), (500, 499, None)),
        (fields(limit=b"500", remaining=b"0", reset=b"60"), (500, 0, 60.0)),
        (fields(limit=b"500", remaining=b"900", reset=b"1s"), (500, 500, 1.0)),
        (fields(limit=b"500", remaining=b"499", reset=b"-1"), (500, 499, None)),
        (fields(limit=b"500", remaining=b"499", reset=b"soon"), (500, 499, None)),
        (fields(limit=b"500", remaining=b"499", reset=b"720h"), (500, 499, 2_592_000.0)),
        (fields(limit=b"500", remaining=b"499", reset=b"1795800000"), (500, 499, None)),
        (fields(limit=b"500", remaining=b"499", reset=b"9999-01-01T00:00:00Z"), (500, 499, None)),
        (fields(limit=b"0", remaining=b"0", reset=b"0"), None),
        (fields(limit=b"-1", remaining=b"-1"), None),
        (fields(limit=b"500", remaining=b"-1"), None),
        (fields(limit=b"-1", remaining=b"5"), None),
        (fields(remaining=b"5"), None),
        (fields(limit=b"500"), None),
        (fields(limit=b"5e2", remaining=b"1"), None),
        (fields(limit=b"500.5", remaining=b"1"), None),
        (fields(limit=b"9" * 40, remaining=b"1"), None),
        (fields(limit=b"\xb2", remaining=b"1"), None),
        ({}, None),
        (
            {
                b"anthropic-ratelimit-requests-limit": b"50",
                b"anthropic-ratelimit-requests-remaining": b"49",
                b"anthropic-ratelimit-requests-reset": b"2026-11-24T16:00:05Z",
            },
            (50, 49, 5.0),
        ),
        (
            {b"x-ratelimit-limit-req-minute": b"60", b"x-ratelimit-remaining-req-minute": b"7"},
            (60, 7, None),
        ),
    ],
)
def test_allowance(index: "dict[bytes, bytes]", expected: "tuple[float, float, float | None] | None") -> None:
    """Limit, remaining and reset of any vendor; insane values are nothing at all."""
    found = app.allowance(index, app.REQUEST_NAMES, lambda: 1_795_536_000.0)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.limit, found.remaining) == expected[:2]
        assert found.reset_s == (None if expected[2] is None else pytest.approx(expected[2]))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'..."usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}', (12, 7)),
        (b'"usage": {"prompt_tokens" : 5, "completion_tokens" : 7, "total_tokens" : 12}', (12, 7)),
        (b'"usage":{"input_tokens":5,"output_tokens":7}', (12, 7)),
        (b'"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":13}', (13, 7)),
        (b'"usage":{"prompt_tokens":5,"total_tokens":5}', (5, 0)),
        (b'"usage":null}\n\ndata: [DONE]\n\n', (0, 0)),
        (b'"usage":null}\n\ndata: {"choices":[],"usage":{"completion_tokens":1,"total_tokens":2}}', (2, 1)),
        (b"", (0, 0)),
        (b'"usage":{"total_tokens":"many"}', (0, 0)),
    ],
)
def test_used_tokens(tail: bytes, expected: "tuple[int, int]") -> None:
    """The last usage in the end of an answer counts."""
    assert app.used_tokens(tail) == expected


# -- buckets


def test_a_bucket_refills_at_its_limit_per_minute() -> None:
    """Sixty a minute are one a second, up to the size, never below zero."""
    bucket = app.Bucket(T0)
    rebase(bucket, told(60, 10), 1)
    assert bucket.level_at(T0) == 10 and bucket.level_at(T0 + 5) == pytest.approx(15)
    assert bucket.level_at(T0 + 1000) == 60
    bucket.charge(100, T0 + 5)
    assert bucket.level_at(T0 + 5) == 0
    assert bucket.opens_at(1, T0 + 5) == pytest.approx(T0 + 6 + app.EDGE_S)
    assert bucket.opens_at(1, T0 + 6) > T0 + 6 and bucket.opens_at(1, T0 + 6.01) == 0  # not at the very edge
    assert bucket.opens_at(1000, T0 + 5) == pytest.approx(T0 + 65 + app.EDGE_S)  # more than all goes when it is full
    assert bucket.opens_at(1000, T0 + 65.01) == 0


def test_an_older_reply_never_overwrites_a_newer_one() -> None:
    """Replies arrive in any order; the one whose request was sent last is believed."""
    chance = random.Random(3)
    for _ in range(300):
        bucket, newest = app.Bucket(T0), -1
        for serial in chance.sample(range(20), 20):
            before = (bucket.level, bucket.limit)
            rebase(bucket, told(100, serial), serial)
            if serial < newest:
                assert (bucket.level, bucket.limit) == before
            newest = max(newest, serial)
            assert bucket.level == newest


def test_reset_tells_what_remaining_rounds_down() -> None:
    """`remaining` is a whole number; the time until the bucket is full tells the fraction, never more than that."""
    bucket = app.Bucket(T0)
    rebase(bucket, told(60, 59, 1.0), 1)
    rebase(bucket, told(60, 9, 50.5), 2)
    assert bucket.level_at(T0) == pytest.approx(9.5)
    rebase(bucket, told(60, 9, 1.0), 3)
    assert 9 <= bucket.level_at(T0) < 10


def test_slow_limits_only_after_two_replies() -> None:
    """One odd reset proves nothing; two running say that the limit counts hours or days, one ordinary that it does not."""
    bucket = app.Bucket(T0)
    day = told(14_400, 14_390, 60.0)  # one a six seconds: 86,400 s for all
    rebase(bucket, day, 1)
    assert bucket.rate == 240
    rebase(bucket, day, 2)
    assert bucket.rate == pytest.approx(1 / 6)
    rebase(bucket, day, 3)
    assert bucket.rate == pytest.approx(1 / 6)
    rebase(bucket, told(14_400, 14_390, 0.04), 4)
    assert bucket.rate == 240
    rebase(bucket, day, 5)
    assert bucket.rate == 240


def test_never_faster_than_a_minutes_limit() -> None:
    """Whatever resets say, a bucket refills by no more than limit / 60 a second and holds no more than the limit."""
    chance = random.Random(5)
    for _ in range(200):
        bucket = app.Bucket(T0)
        for serial in range(30):
            limit = chance.choice((1, 60, 500, 10_000))
            left = chance.randint(0, limit)
            rebase(bucket, told(limit, left, chance.choice((None, 0.0, 1e-6, 0.01, 1.0, 59.0, 6e4))), serial)
            assert bucket.rate <= limit / 60 + 1e-9 and 0 <= bucket.level_at(T0 + 1e6) <= limit


def test_random_sequences_never_go_below_zero() -> None:
    """Charges, gifts and replies in any order leave a level between nothing and the limit."""
    chance = random.Random(7)
    for _ in range(200):
        bucket, now = app.Bucket(T0), T0
        for serial in range(40):
            now += chance.random() * 5
            match chance.randrange(4):
                case 0:
                    bucket.charge(chance.random() * 100, now)
                case 1:
                    bucket.charge(-chance.random() * 3, now)
                case 2:
                    left = chance.randrange(101)
                    sent_at, since = now - chance.random() * 9, chance.randrange(200)
                    rebase(bucket, told(100, left, chance.choice((None, (100 - left) * 0.6))), serial, now, sent_at, since)
                case 3:
                    at = bucket.opens_at(5, now)
                    assert at in (0.0, NEVER) or bucket.level_at(at + 1e-6) >= 5 - 1e-3
            assert not bucket.limit or 0.0 <= bucket.level_at(now) <= bucket.size


class Account:
    """An upstream that counts as OpenAI does: a bucket that refills all the time, told in each reply."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, float(limit), now

    def level_at(self, now: float) -> float:
        return min(self.limit, self.level + (now - self.at) * self.limit / 60)

    def take(self, amount: float, now: float) -> "app.Allowance | None":
        """Takes it and says what is left; None for a 429."""
        level = self.level_at(now)
        self.at, self.level = now, level
        if level < amount:
            return None
        self.level = level - amount
        return told(self.limit, int(self.level), (self.limit - self.level) / self.limit * 60)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_in_flight_is_counted_once(seed: int) -> None:
    """Against an account that counts, over random latencies: what we believe is what is there, less what is on its way."""
    chance, transit_s, limit = random.Random(seed), 0.005, 120
    one, account, now = seat(), Account(limit, T0), T0
    on_way: "list[tuple[float, app.Lease]]" = []
    replies: "list[tuple[float, app.Lease, app.Allowance]]" = []
    refused = sent = 0
    for _ in range(4000):
        now += chance.expovariate(8)
        for at, gone in [item for item in on_way if item[0] <= now]:
            on_way.remove((at, gone))
            answer = account.take(1, at)
            refused += answer is None
            if answer is not None:
                replies.append((at + chance.choice((0.01, 0.3, 4.0)), gone, answer))
        for item in sorted((item for item in replies if item[0] <= now), key=lambda item: item[0]):
            replies.remove(item)
            item[1].answered(item[0], True)
            item[1].learn(item[2], None, item[0])
            item[1].release(app.GOOD, item[0])
        bucket = one.ledger.requests
        if bucket.limit:
            exact = account.level_at(now) - len(on_way)
            assert exact - 1.1 <= bucket.level_at(now) <= exact + 1.1 + transit_s * limit / 60
        if one.ready(1, now):
            sent += 1
            on_way.append((now + transit_s, lease(one, now)))
    assert refused <= 3 and sent > 700


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_first_replies_know_what_was_sent_before_anything_was_known(order: "tuple[int, ...]") -> None:
    """Four requests at once on an unknown account of 60 a minute: whichever reply comes first, all four are counted."""
    one = seat()
    flying = [lease(one, T0, need=100) for _ in range(4)]
    gone = lease(one, T0, need=100, sent=False)
    for at in order:
        flying[at].learn(told(60, 59 - at, at + 1), told(6000, 5900 - 100 * at, at + 1), T0 + 1)
        if at == order[1]:
            gone.release(verdict("connect"), T0 + 1)
    assert one.ledger.requests.level_at(T0 + 1) == pytest.approx(57, abs=0.01)
    assert one.ledger.tokens.level_at(T0 + 1) == pytest.approx(5700, abs=1)


@pytest.mark.parametrize("seed", range(20))
def test_what_was_never_sent_is_given_back_whole(seed: int) -> None:
    """A reply's word less exactly those that were charged after its request and not given back, however many were."""
    chance = random.Random(seed)
    one = seat()
    first = lease(one)
    first.learn(told(1000, 500), told(100_000, 50_000), T0)
    flying = [first]
    for _ in range(200):
        match chance.randrange(3):
            case 0:
                flying.append(lease(one, need=chance.randint(1, 50), sent=chance.random() < 0.6))
            case 1:
                unsent = [made for made in flying if not made.sent_at]
                if unsent:
                    chosen = chance.choice(unsent)
                    flying.remove(chosen)
                    chosen.release(verdict("connect"), T0)
            case 2:
                chosen = chance.choice([made for made in flying if made.sent_at])
                assert one.ledger.requests is not None and one.ledger.tokens is not None
                if chosen.serial >= one.ledger.requests.newest:
                    chosen.learn(told(1000, 500), told(100_000, 50_000), T0)
                    later = [made for made in flying if made.serial > chosen.serial]
                    assert one.ledger.requests.level_at(T0) == 500 - len(later)
                    assert one.ledger.tokens.level_at(T0) == 50_000 - sum(made.need for made in later)


def test_usage_corrects_where_nothing_is_told() -> None:
    """The true cost replaces the estimate, in configured windows as in a bucket."""
    one = seat(tpm=1000)
    made = lease(one, need=900)
    assert not one.ready(200, T0)
    made.correct(100, T0)
    assert one.ready(900, T0) and not one.ready(901, T0)


# -- configured limits


def test_a_window_is_exact() -> None:
    """The limit's last one goes, the next waits until the first is a window old."""
    window = app.Window(2, 60.25)
    for at in (T0, T0 + 10):
        assert window.opens_at(1, at) == 0
        window.sent(window.add(1), at)
    assert window.opens_at(1, T0 + 20) == T0 + window.span_s
    assert window.opens_at(2, T0 + 20) == T0 + 10 + window.span_s
    assert window.opens_at(50, T0 + 20) == T0 + 10 + window.span_s  # more than all of it goes when it is empty
    assert window.opens_at(1, T0 + window.span_s) == 0


def test_what_is_leased_but_not_sent_yet_holds_its_place_and_nobody_elses() -> None:
    """A request that is still connecting counts, but what is older than the window leaves although it stands behind it."""
    window = app.Window(2, 60.0)
    connecting = window.add(1)
    window.sent(window.add(1), T0)
    assert window.opens_at(1, T0 + 1) == T0 + window.span_s
    assert window.opens_at(1, T0 + 61) == 0
    assert window.opens_at(2, T0 + 61) == T0 + 61 + window.span_s  # at the earliest: it has not been sent yet
    window.change(connecting, 0.0)
    assert window.opens_at(2, T0 + 61) == 0


@pytest.mark.parametrize("seed", range(6))
def test_at_most_rpm_in_any_minute_and_a_burst_at_once(seed: int) -> None:
    """Under random concurrency no 60 s hold more than rpm, no burst_s more than its share, and the limit is used up.

    A share that is no whole number is spread evenly: 1.67 a second are one each 0.6 s.
    """
    chance = random.Random(seed)
    rpm, burst_s = ((30, 60.0), (60, 10.0), (100, 1.0), (7, 60.0), (120, 5.0), (20, 1.0))[seed]
    one, now = seat(rpm=rpm, burst_s=burst_s), T0
    connecting: "list[tuple[float, app.Lease]]" = []
    sent: "list[float]" = []
    for _ in range(4000):
        now += chance.expovariate(6)
        for item in [item for item in connecting if item[0] <= now]:
            connecting.remove(item)
            if chance.random() < 0.1:
                item[1].release(verdict("gone", 0), now)
                continue
            item[1].sent(now)
            sent.append(now)
            item[1].release(app.GOOD, now)
        while one.ready(1, now):
            connecting.append((now + chance.choice((0.0, 0.002, 0.05, 0.3)), lease(one, now, sent=False)))
    burst = max(1, int(rpm * burst_s / 60))
    for span_s, most in ((60.0, rpm), (burst * 60 / rpm - 1e-6, burst)):
        for at, start in enumerate(sent):
            assert sum(1 for other in sent[at : at + most + 1] if other < start + span_s) <= most
    assert len(sent) >= 0.7 * min(rpm / 60.25, burst / (burst * 60 / rpm + 0.25)) * (now - T0)


@pytest.mark.parametrize(
    ("limits", "needs", "a_minute"),
    [
        ({"rpm": 100, "burst_s": 1}, (1,), 100),
        ({"rpm": 100, "burst_s": 2}, (1,), 100),
        ({"rpm": 20, "burst_s": 1}, (1,), 20),
        ({"rpm": 1000, "burst_s": 0.5}, (1,), 1000),
        ({"tpm": 60_000, "burst_s": 1}, (600,), 100),
        ({"tpm": 60_000, "burst_s": 1}, (300, 600), 133),
        ({"tpm": 60_000, "burst_s": 1}, (7000,), 8),
        ({"tpm": 60_000, "burst_s": 10}, (100, 4000, 700), 37),
    ],
)
def test_a_short_burst_wastes_nothing(limits: "dict[str, Any]", needs: "tuple[int, ...]", a_minute: int) -> None:
    """However few fit into a burst, nearly all that a minute may have goes in it, and evenly if it fits into one."""
    one, now = seat(**limits), T0
    sent: "list[float]" = []
    for need in itertools.cycle(needs):
        opens = one.ledger.opens_at(need, now)
        now = max(now, opens)
        if now >= T0 + 180:
            break
        assert one.ready(need, now)
        made = lease(one, now, need)
        made.release(app.GOOD, now)
        sent.append(now)
    assert 0.97 * 3 * a_minute <= len(sent) + 1 and len(sent) <= 3 * a_minute + len(needs)
    third = [sum(T0 + 20 * at <= one < T0 + 20 * at + 20 for one in sent) for at in range(9)]
    assert max(needs) > 1000 == limits.get("tpm", 0) / 60 or max(third) - min(third) <= 0.15 * max(third) + 2


def test_limits_count_per_model_and_concurrency_for_all() -> None:
    """rpm closes one model; concurrency closes the controller, its quota group too."""
    first = upstream("a", limits=app.QuotaLimits(rpm=1))
    lease(first.seat("m"))
    assert not first.seat("m").ready(1, T0) and first.seat("n").ready(1, T0)
    shared = app.Quota("g", app.QuotaLimits(concurrency=2))
    two = [upstream(name, shared) for name in "ab"]
    held = [lease(one.seat("m")) for one in two]
    assert not any(one.seat(model).ready(1, T0) for one in two for model in "mn")
    assert two[0].seat("m").room_at(1, T0) == NEVER
    held[1].release(app.GOOD, T0)
    assert two[0].seat("n").ready(1, T0)


def test_a_dated_name_is_the_same_model() -> None:
    """A model with and without its date suffix has one ledger; a 429's "for limit X" gives it another."""
    one = upstream()
    dated, plain, mini = (one.seat("gpt-4.1" + end) for end in ("-2025-04-14", "", "-mini"))
    assert dated.ledger is plain.ledger is one.seat("gpt-4.1-20250414").ledger and mini.ledger is not plain.ledger
    one.quota.rename("gpt-4.1-mini", "gpt-4.1")
    assert one.quota.ledger("gpt-4.1-mini") is plain.ledger
    config = app.ControllerConfig("azure", "z", app.AccountConfig())
    azure = app.Upstream(config, app.EchoController(config), one.quota)  # whose deployments have quotas of their own
    assert azure.seat("gpt-4.1-2025-04-14").ledger is not azure.seat("gpt-4.1").ledger


def test_a_limits_name_belongs_to_what_the_account_calls_the_model() -> None:
    """Whichever name a client used: all that mean the refused model share its new ledger, now and later; others do not."""
    shared = app.Quota("g", app.QuotaLimits())
    a = upstream("a", shared, model_map=(("fast", "m"), ("quick", "m-2025-04-14")))
    b = upstream("b", shared, model_map=(("fast", "n"),))
    pool = app.UpstreamPool([a, b], app.PoolConfig(), Clock())  # type: ignore[arg-type]
    seats = [a.seat("fast"), a.seat("m"), a.seat("quick"), b.seat("m"), b.seat("m-20250414")]
    others = [b.seat("fast"), a.seat("n")]
    pool.settle(lease(seats[0]), verdict("rate", 429, bucket="m-long", after_s=9.0))
    a.seats.clear()
    seats += [a.seat("fast"), a.seat("m")]
    assert {one.ledger.name for one in seats} == {"m-long"} and not any(one.ready(1, T0) for one in seats)
    assert {one.ledger.name for one in others} == {"n"} and all(one.ready(1, T0) for one in others)


def test_an_early_429_halves_the_burst() -> None:
    """A 429 while our exact count said that there was room: from now on only half as much at once, not below a second."""
    one = seat(rpm=600)
    made = lease(one)
    assert made.was_early(verdict("rate", 429))
    for expected in (30.0, 15.0, 7.5, 3.75, 1.875, 1.0, 1.0):
        one.ledger.halve_burst()
        assert one.ledger.burst_s == expected
    now, count = T0 + 100, 0
    while one.ready(1, now):
        lease(one, now)
        count += 1
    assert count == 10


def test_a_429_that_says_what_is_left_is_not_early() -> None:
    """With nothing remaining by its own word a 429 is no surprise; with room left it is."""
    one = seat()
    made = lease(one, need=10)
    made.learn(told(60, 0), told(1000, 500), T0)
    assert not made.was_early(verdict("rate", 429)) and made.was_early(verdict("rate", 429, by_tokens=True))


# -- 429


def closed_for(one: app.Seat, need: float = 1.0, now: float = T0) -> float:
    """Seconds until a request of that size may go."""
    return max(0.0, one.ledger.opens_at(need, now) - now)


@pytest.mark.parametrize(("after_s", "expected"), [(5.0, 5.0), (0.0, 0.01), (601.0, 600.0), (1e9, 600.0)])
def test_a_429_closes_for_the_time_it_named(after_s: float, expected: float) -> None:
    """That time, at most ten minutes; "now" is not believed to the letter."""
    one = seat()
    one.ledger.close(verdict("rate", 429, after_s=after_s), 1, T0)
    assert closed_for(one) == pytest.approx(expected)


def test_a_429_without_a_time() -> None:
    """Without a hint: until what is lacking is back, where that is known; else a second, doubling to thirty."""
    one = seat()
    lease(one).learn(told(60, 0), None, T0)
    one.ledger.close(verdict("rate", 429), 1, T0)
    assert closed_for(one) == pytest.approx(1.0, abs=0.01)
    two = seat()
    now = T0
    for expected in (1, 2, 4, 8, 16, 30, 30):
        two.ledger.close(verdict("rate", 429), 1, now)
        assert closed_for(two, now=now) == pytest.approx(expected)
        now += expected
    under_way, made = lease(two, now), lease(two, now)
    under_way.sent(now - 30)
    under_way.answered(now, True)  # it was let in before that refusal
    two.ledger.close(verdict("rate", 429), 1, now)
    assert closed_for(two, now=now) == pytest.approx(30.0)
    made.sent(now + 30)
    made.answered(now + 30, True)
    two.ledger.close(verdict("rate", 429), 1, now + 30)
    assert closed_for(two, now=now + 30) == pytest.approx(1.0)


@pytest.mark.parametrize("after_s", [0.0, 0.003])
def test_a_429_that_says_now_again_and_again(after_s: float) -> None:
    """It is believed less each time, up to a second, and anew once an answer came; a longer time is always obeyed."""
    one, now = seat(), T0
    for expected in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0):
        one.ledger.close(verdict("rate", 429, after_s=after_s), 1, now)
        assert max(until for _, until in one.ledger.closed) - now == pytest.approx(expected)
        now += expected
    one.ledger.close(verdict("rate", 429, after_s=7.0), 1, now)
    assert closed_for(one, now=now) == pytest.approx(7.0)
    made = lease(one, now)
    made.sent(now + 7)
    made.answered(now + 7, True)
    one.ledger.close(verdict("rate", 429, after_s=after_s), 1, now + 7)
    assert max(until for _, until in one.ledger.closed) - now - 7 == pytest.approx(0.01)


def test_a_token_429_closes_only_for_requests_at_least_that_large() -> None:
    """Smaller requests still go; a smaller one that was refused too closes for its own time, not for the larger one's."""
    one = seat()
    one.ledger.close(verdict("rate", 429, by_tokens=True, after_s=60.0), 9000, T0)
    assert closed_for(one, 9000) == 60 and closed_for(one, 20_000) == 60 and closed_for(one, 8999) == 0
    one.ledger.close(verdict("rate", 429, by_tokens=True, after_s=2.0), 100, T0)
    assert closed_for(one, 9000) == 60 and closed_for(one, 100) == 2 and closed_for(one, 99) == 0
    assert one.ready(100, T0 + 2) and not one.ready(9000, T0 + 2) and one.ready(9000, T0 + 60)


def test_token_429s_close_as_each_of_them_said() -> None:
    """Of any number of token 429s a request obeys those of its size and smaller, and no other."""
    chance = random.Random(11)
    for _ in range(100):
        one, told_ = seat(), []
        for _ in range(12):
            need, after_s = chance.randint(1, 20), chance.randint(1, 20)
            one.ledger.close(verdict("rate", 429, by_tokens=True, after_s=float(after_s)), need, T0)
            told_.append((need, after_s))
        for need, later in itertools.product(range(1, 22), (0, 5, 10, 25)):
            until = max((after_s for least, after_s in told_ if need >= least), default=0)
            assert closed_for(one, need, T0 + later) == max(0, until - later)


@pytest.mark.parametrize(
    ("message", "outcome", "by_tokens", "bucket"),
    [
        ("Rate limit reached for gpt-4.1 in organization org-x on requests per min (RPM): Limit 3, Used 3, Requested 1.", "rate", False, ""),
        ("Rate limit reached for gpt-4.1 (for limit gpt-4.1-long-context) on tokens per min (TPM): Limit 10000, Used 9000, Requested 2000.", "rate", True, "gpt-4.1-long-context"),
        ("Request too large for gpt-4.1 on tokens per min (TPM): Limit 10,000, Requested 12,000.", "large", True, ""),
        ("Limit 0, Requested 5", "rate", False, ""),
    ],
)  # fmt: skip
def test_a_429s_prose(message: str, outcome: str, by_tokens: bool, bucket: str) -> None:
    """OpenAI says in prose what it was about."""
    found = app.judge_reply(429, {}, limit_error(message), 0.0)
    assert (found.outcome.value, found.by_tokens, found.bucket) == (outcome, by_tokens, bucket)


def test_replies_count_for_the_ledger_that_their_request_was_charged_to() -> None:
    """When a 429 gives a model's limit another name, what is under way still belongs to the old one."""
    ups = [upstream()]
    pool = app.UpstreamPool(ups, app.PoolConfig(), Clock())  # type: ignore[arg-type]
    one = ups[0].seat("m")
    flying = [lease(one) for _ in range(50)]
    flying[0].learn(told(100, 99), None, T0)
    pool.settle(flying[1], verdict("rate", 429, bucket="m-long", after_s=1.0))
    assert one.ledger.name == "m-long" and closed_for(one) == 1.0
    for made in flying[2:]:
        made.learn(told(100, 5), None, T0)
        made.release(verdict("gone", 0), T0)
    assert one.ledger.requests is None or one.ledger.requests.limit == 0
    fresh = lease(one, T0 + 1)
    fresh.learn(told(100, 42), None, T0 + 1)
    assert one.ledger.requests is not None and one.ledger.requests.level_at(T0 + 1) == 42


# -- parking


def test_an_exhausted_quota_is_parked_longer_each_time() -> None:
    """Five minutes, doubling to an hour; then one real request at a time finds out; an answer ends it."""
    shared = app.Quota("g", app.QuotaLimits())
    two = [upstream(name, shared).seat("m") for name in "ab"]
    now = T0
    for expected in (300, 600, 1200, 2400, 3600, 3600):
        shared.park(now)
        assert shared.park_s == expected
        assert not two[1].ready(1, now + expected - 1) and two[1].room_at(1, now) == now + expected
        now += expected
        assert two[0].ready(1, now) and two[1].ready(1, now)
        probe = lease(two[0], now)
        assert not two[0].ready(1, now) and not two[1].ready(1, now)
        probe.release(verdict("quota", 429), now)
    probe = lease(two[0], now)
    probe.answered(now, True)
    assert two[0].ready(1, now) and two[1].ready(1, now) and shared.park_s == 0  # while the probe's stream still runs
    probe.release(app.GOOD, now)
    shared.park(now)
    assert shared.park_s == 300


def test_an_answer_of_before_does_not_end_the_parking() -> None:
    """A request that was under way when the quota ran out proves nothing; the next parking still grows."""
    one = seat()
    early = lease(one)
    one.upstream.quota.park(T0)
    early.answered(T0 + 1, True)
    assert not one.ready(1, T0 + 2)
    assert one.ready(1, T0 + 300)
    lease(one, T0 + 300)
    assert not one.ready(1, T0 + 300)
    one.upstream.quota.park(T0 + 301)
    assert one.upstream.quota.park_s == 600


def fail(one: app.Seat, outcome: str, now: float = T0, status: int = 500, **more: Any) -> None:
    """One whole attempt that ends so."""
    lease(one, now).release(verdict(outcome, status, **more), now)


def succeed(one: app.Seat, now: float = T0) -> None:
    """One whole attempt that is answered."""
    made = lease(one, now)
    made.answered(now, True)
    made.release(app.GOOD, now)


@pytest.mark.parametrize(("outcome", "count"), [("auth", 2), ("forbidden", 3)])
def test_a_refused_key_is_parked_after_some_in_a_row(outcome: str, count: int) -> None:
    """Two 401 or three 403 in a row park; a success in between begins again; each failed probe doubles."""
    one = seat()
    for _ in range(count - 1):
        fail(one, outcome)
    assert one.ready(1, T0)
    succeed(one)
    for _ in range(count - 1):
        fail(one, outcome)
    assert one.ready(1, T0)
    fail(one, outcome)
    assert one.upstream.out_why == "parked" and not one.ready(1, T0 + 299) and one.ready(1, T0 + 300)
    fail(one, outcome, T0 + 300)
    assert not one.ready(1, T0 + 899) and one.ready(1, T0 + 900)
    succeed(one, T0 + 900)
    assert one.upstream.out_why == "" and one.ready(1, T0 + 900)


def test_refusals_that_were_under_way_do_not_double_the_parking() -> None:
    """Ten requests that meet a dead key at once park it once."""
    one = seat()
    flying = [lease(one) for _ in range(10)]
    for made in flying:
        made.release(verdict("auth", 401), T0)
    assert one.ready(1, T0 + 300)


# -- breaker


def test_the_breaker_needs_five_failures_that_are_half() -> None:
    """Five failures open it; with more than as many successes among the last twenty they do not."""
    one = seat()
    for _ in range(4):
        fail(one, "fault")
    assert one.ready(1, T0)
    fail(one, "connect")
    assert one.upstream.out_why == "breaker" and not one.ready(1, T0)
    two = seat()
    for _ in range(6):
        succeed(two)
    for _ in range(5):
        fail(two, "cut")
    assert two.ready(1, T0)
    fail(two, "silent")
    assert not two.ready(1, T0)


def test_a_stream_that_is_cut_is_one_failure_and_no_success() -> None:
    """Ten streams that begin and are all cut open the breaker at the fifth."""
    one = seat()
    flying = [lease(one) for _ in range(10)]
    for made in flying:
        made.answered(T0, True)
    for made in flying[:4]:
        made.release(verdict("cut"), T0)
    assert one.ready(1, T0)
    flying[4].release(verdict("cut"), T0)
    assert one.upstream.out_why == "breaker"


@pytest.mark.parametrize(
    ("kind", "failures", "state"),
    [
        ("server_error", 5, "breaker"),
        ("overloaded_error", 5, "breaker"),
        ("insufficient_quota", 0, "parked"),
        ("authentication_error", 5, "open"),  # a key that begins an answer is not refused
        ("rate_limit_exceeded", 0, "open"),
        ("invalid_request_error", 0, "open"),
    ],
)
def test_an_error_after_the_answer_began_counts_as_its_status(kind: str, failures: int, state: str) -> None:
    """An error event in a stream that was already good is judged and settled like a reply with that status."""
    one = upstream("a")
    pool = app.UpstreamPool([one], app.PoolConfig(), Clock())  # type: ignore[arg-type]
    for made in [lease(one.seat("m")) for _ in range(5)]:
        pool.answered(made, True, T0)
        event = b'data: {"error":{"message":"x","type":"%b","code":"%b"}}\n\n' % ((kind.encode(),) * 2)
        pool.settle(made, app.judge_first_event(event))
    assert (one.failures, one.in_flight, app.describe_upstream(one, T0)["state"]) == (failures, 0, state)
    assert one.seat("m").ready(1, T0) is (kind in {"invalid_request_error", "authentication_error"})


def test_answers_that_begin_well_and_are_cut_open_the_breaker_for_longer_each_time() -> None:
    """Their beginning lets the next ones in, but only one that ends well begins again with two seconds."""
    one, now = seat(), T0

    def cut(count: int) -> None:
        for _ in range(count):
            made = lease(one, now)
            made.answered(now, True)
            made.release(verdict("cut"), now)

    for expected in (2, 4, 8, 16):
        cut(5)
        assert one.upstream.out_until == pytest.approx(now + expected) and not one.ready(1, now)
        now += expected
    succeed(one, now)
    cut(5)
    assert one.upstream.out_until == pytest.approx(now + 2)


def test_old_failures_are_forgotten() -> None:
    """Only outcomes of the last 30 s count."""
    one = seat()
    for second in range(0, 40, 8):
        fail(one, "fault", T0 + second)
    assert one.ready(1, T0 + 40)


def test_a_busy_controller_with_one_percent_errors_stays() -> None:
    """Rare failures never open the breaker, whatever the load."""
    chance, one, now = random.Random(13), seat(), T0
    for _ in range(5000):
        now += 0.01
        assert one.ready(1, now)
        if chance.random() < 0.01:
            fail(one, "fault", now)
        else:
            succeed(one, now)


def test_half_open_lets_one_request_probe() -> None:
    """After its time one request goes at a time; its failure doubles the time up to a minute, its success closes."""
    one, now = seat(), T0
    for _ in range(5):
        fail(one, "fault", now)
    for expected in (2, 4, 8, 16, 32, 60, 60):
        assert one.upstream.out_until == pytest.approx(now + expected)
        assert not one.ready(1, now + expected - 0.01)
        now += expected
        assert one.ready(1, now)
        probe = lease(one, now)
        assert not one.ready(1, now)
        probe.release(verdict("fault"), now)
    now += 60
    succeed(one, now)
    assert one.ready(1, now) and lease(one, now) and one.ready(1, now)
    for _ in range(5):
        fail(one, "fault", now)
    assert one.upstream.out_until == pytest.approx(now + 2)


def test_failures_that_were_under_way_do_not_double_the_breaker() -> None:
    """A burst that fails together opens the breaker once, for its first time."""
    one = seat()
    flying = [lease(one) for _ in range(20)]
    for made in flying:
        made.release(verdict("fault"), T0)
    assert one.upstream.out_until == pytest.approx(T0 + 2)


def test_a_probe_whose_client_left_is_no_failure() -> None:
    """The next request probes at once."""
    one = seat()
    for _ in range(5):
        fail(one, "fault")
    lease(one, T0 + 2).release(verdict("gone", 0), T0 + 2)
    assert one.ready(1, T0 + 2) and one.upstream.recovering


def test_a_parked_key_is_not_freed_by_failures_under_way() -> None:
    """A breaker that opens meanwhile does not bring a parked key back sooner."""
    one = seat()
    flying = [lease(one) for _ in range(7)]
    for made in flying[:2]:
        made.release(verdict("auth", 401), T0)
    for made in flying[2:]:
        made.release(verdict("fault"), T0)
    assert not one.ready(1, T0 + 299)


def test_retry_after_of_a_busy_controller_is_honoured() -> None:
    """A 503 with a Retry-After closes for that time, at most ten minutes, without a probe."""
    one = seat()
    fail(one, "fault", status=503, after_s=7.0)
    assert not one.ready(1, T0 + 6.9) and one.ready(1, T0 + 7)
    lease(one, T0 + 7)
    assert one.ready(1, T0 + 7)
    two = seat()
    fail(two, "fault", status=503, after_s=1e6)
    assert two.ready(1, T0 + 600)


@pytest.mark.parametrize("outcome", ["client", "gone", "lost", "large", "missing", "rate"])
def test_what_is_not_the_controllers_fault_costs_it_nothing(outcome: str) -> None:
    """A client's mistake, a client that left, a lost race: not blamed, however often."""
    one = seat()
    for _ in range(100):
        fail(one, outcome, status=400)
    assert one.ready(1, T0) and (one.upstream.failures, one.upstream.in_flight) == (0, 0)


# -- suspicion


def usual(one: app.Seat, seconds: float, count: int = 20, stream: bool = True) -> None:
    """Gives it a history of answers that took so long."""
    for _ in range(count):
        one.times[stream].append(seconds)


def test_three_silent_requests_make_a_suspect() -> None:
    """At least three unanswered, the oldest for more than three times the usual p95, and at least a second."""
    one = seat()
    usual(one, 0.8)
    lease(one, T0)
    lease(one, T0 + 2)
    assert not one.upstream.is_silent(T0 + 100)
    lease(one, T0 + 2.3)
    assert not one.upstream.is_silent(T0 + 2.4) and one.upstream.is_silent(T0 + 2.41)
    two = seat()
    usual(two, 0.01)
    for _ in range(3):
        lease(two, T0)
    assert not two.upstream.is_silent(T0 + 1) and two.upstream.is_silent(T0 + 1.01)


def test_an_answer_since_proves_life() -> None:
    """While it answered anything after the oldest was sent, it is slow and not dead."""
    one = seat()
    usual(one, 0.1)
    flying = [lease(one, T0 + at) for at in range(4)]
    flying[3].answered(T0 + 4, True)
    assert not one.upstream.is_silent(T0 + 100)


def test_one_slow_request_hides_no_hang() -> None:
    """What was sent since the last answer counts, however long an older one has been thinking."""
    one = seat()
    other = one.upstream.seat("thinks-for-long")
    usual(one, 0.1)
    lease(other, T0)
    lease(one, T0 + 50).answered(T0 + 50.1, True)
    for at in range(3):
        lease(one, T0 + 51 + at)
    assert not one.upstream.is_silent(T0 + 52) and one.upstream.is_silent(T0 + 53)
    lease(one, T0 + 54).answered(T0 + 54.1, True)
    assert not one.upstream.is_silent(T0 + 1000)


def test_what_was_slow_when_it_last_answered_may_be_slow_again() -> None:
    """Long answers beside one that proved to be only long are no hang before they are as late as that one was."""
    one = seat()
    usual(one, 0.1)
    lease(one, T0)
    lease(one, T0 + 30).answered(T0 + 30.1, True)
    for _ in range(3):
        lease(one, T0 + 31)
    assert not one.upstream.is_silent(T0 + 60) and one.upstream.is_silent(T0 + 61.2)


@pytest.mark.parametrize("seed", range(10))
def test_slow_answers_among_quick_ones_are_no_suspicion(seed: int) -> None:
    """One in five takes up to thirty seconds where the others take a tenth: never suspect, until all of it hangs."""
    chance, one, now = random.Random(seed), seat(), T0
    flying: "list[tuple[float, app.Lease]]" = []
    for _ in range(3000):
        now += chance.expovariate(10)
        for item in [item for item in flying if item[0] <= now]:
            flying.remove(item)
            item[1].answered(item[0], True)
            item[1].release(app.GOOD, item[0])
        assert not one.upstream.is_silent(now)
        flying.append((now + (chance.uniform(5, 30) if chance.random() < 0.2 else 0.1), lease(one, now)))
    limit = one.usual_s(True)
    for _ in range(3):
        lease(one, now)
    assert one.upstream.is_silent(now + limit + 30)


def test_kinds_have_their_own_usual_times() -> None:
    """A whole answer is not measured by streams, nor one model by another."""
    one = seat()
    usual(one, 0.1)
    usual(one, 20.0, stream=False)
    assert one.usual_s(True) == 1.0 and one.usual_s(False) == pytest.approx(60)
    other = one.upstream.seat("n")
    assert other.usual_s(True) == app.SUSPECT_UNKNOWN_S
    usual(one, 2.0, 2)
    assert one.usual_s(True) == pytest.approx(6.0)  # the p95 of 22


def test_a_suspect_is_probed_once_nothing_is_stuck() -> None:
    """No new requests; when it is empty one probes after 1, 2, 4 ... 60 s; an answer clears it."""
    one, now = seat(), T0
    usual(one, 0.1)
    flying = [lease(one, now) for _ in range(3)]
    one.upstream.suspect()
    assert not one.ready(1, now + 1000) and one.well_at(now) == NEVER
    for made in flying:
        made.release(verdict("lost", 0), now)
    for expected in (1, 2, 4, 8, 16, 32, 60, 60):
        assert not one.ready(1, now + expected - 0.01) and one.ready(1, now + expected)
        now += expected
        probe = lease(one, now)
        assert not one.ready(1, now) and not one.upstream.is_silent(now + 1.0) and one.upstream.is_silent(now + 1.01)
        one.upstream.suspect()
        probe.release(verdict("lost", 0), now)
    now += 60
    succeed(one, now)
    assert one.ready(1, now) and one.upstream.out_why == ""


def test_any_late_answer_clears_a_suspect() -> None:
    """When one of the stuck is answered after all, it works."""
    one = seat()
    flying = [lease(one) for _ in range(3)]
    one.upstream.suspect()
    flying[1].answered(T0 + 5, True)
    assert one.ready(1, T0 + 5)


def test_a_last_resort_sent_to_a_suspect_is_judged_by_itself() -> None:
    """What was stuck before says nothing about the request that was sent now."""
    one = seat()
    usual(one, 0.1)
    for _ in range(3):
        lease(one)
    assert one.upstream.is_silent(T0 + 2)
    one.upstream.suspect()
    lease(one, T0 + 3)
    assert not one.upstream.is_silent(T0 + 3.5) and one.upstream.is_silent(T0 + 4.1)


def test_when_a_request_wants_a_rescue() -> None:
    """Past ten seconds and three times the p99, and never with fewer than twenty samples."""
    one = seat()
    usual(one, 1.0, 19)
    assert app.rescue_s(one, [one], True) == NEVER
    usual(one, 1.0, 1)
    assert app.rescue_s(one, [one], True) == 10.0
    usual(one, 5.0, 1)
    assert app.rescue_s(one, [one], True) == pytest.approx(15.0)
    fresh = seat("b")
    assert app.rescue_s(fresh, [fresh], True) == NEVER and app.rescue_s(fresh, [fresh, one], True) == pytest.approx(15.0)


# -- shares and the line's estimate


def test_equal_weights_share_equally_over_a_cycle_with_any_subset_closed() -> None:
    """Whichever of five are closed by a 429, each of the others gets its weight's share of every cycle."""
    for open_ in itertools.chain.from_iterable(itertools.combinations(range(5), size) for size in range(1, 6)):
        ups = [upstream(name, weight=weight) for name, weight in zip("abcde", (3, 1, 2, 1, 5), strict=True)]
        seats = [one.seat("m") for one in ups]
        for at, one in enumerate(seats):
            if at not in open_:
                one.ledger.close(verdict("rate", 429, after_s=60.0), 1, T0)
        cycle = sum(ups[at].weight for at in open_)
        for _ in range(3):
            counts = Counter(app.smooth_weighted([s for s in seats if s.ready(1, T0)], True).upstream.name for _ in range(cycle))
            assert counts == {"abcde"[at]: ups[at].weight for at in open_}


def turn_by_counting(openings: "list[tuple[float, float]]", ahead: int, now: float) -> float:
    """The same by brute force: the places that each opening has given until T."""

    def places(at: float) -> float:
        return sum(1 + (at - max(opens, now)) * rate for opens, rate in openings if max(opens, now) <= at)

    low, high = now, now + 1e7
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if places(middle) >= ahead + 1 - 1e-9 else (middle, high)
    return high


def test_turn_at_is_what_counting_says() -> None:
    """The estimate is when as many places have been given as stand before."""
    chance = random.Random(17)
    for _ in range(500):
        openings = [
            (chance.choice((0.0, T0 + chance.random() * 50)), chance.choice((0.1, 1.0, 8.3))) for _ in range(chance.randint(1, 5))
        ]
        ahead = chance.randrange(40)
        assert app.turn_at(openings, ahead, T0) == pytest.approx(turn_by_counting(openings, ahead, T0), abs=1e-3)


def test_turn_at_ignores_who_never_opens() -> None:
    """Who opens only when another request ends is no help to an estimate."""
    assert app.turn_at([(NEVER, 5.0), (T0 + 3, 1.0)], 0, T0) == T0 + 3
    assert app.turn_at([(NEVER, 5.0)], 0, T0) == NEVER
    assert app.turn_at([(T0 + 3, NEVER)], 1000, T0) == pytest.approx(T0 + 3, abs=0.01)


def test_reprs_tell_the_state() -> None:
    """What a debugger shows names the controller and why it is out."""
    one = seat()
    made = lease(one)
    assert repr(one) == "<Seat m at a>" and repr(made) == "<Lease a for m>"
    one.upstream.suspect()
    assert repr(one.upstream) == "<Upstream a suspect in_flight=1 requests=1>"


# -- what says nothing, and what is forgotten


def test_a_429_without_limits_starts_slowly() -> None:
    """Where replies tell no limits, one goes at the reopening; each good answer lets the next ones follow sooner."""
    one = seat()
    one.ledger.close(verdict("rate", 429, after_s=1.0), 1, T0)
    assert closed_for(one) == pytest.approx(1.0)
    first = lease(one, T0 + 1.0)
    assert closed_for(one, now=T0 + 1.0) == pytest.approx(1.0, abs=0.01)  # one a second, while nothing was answered
    first.answered(T0 + 1.1, True)
    assert one.ready(1, T0 + 1.1)
    second = lease(one, T0 + 1.1)
    assert 0 < closed_for(one, now=T0 + 1.1) < 0.5
    for _ in range(8):
        second.answered(T0 + 1.2, True)
    assert one.ledger.requests.rate == 0.0 and one.ready(1, T0 + 1.2)


def test_slow_start_ends_when_limits_are_told() -> None:
    """A reply that tells what is left is better than a guess."""
    one = seat()
    one.ledger.close(verdict("rate", 429, after_s=1.0), 1, T0)
    lease(one, T0 + 1.0).learn(told(60, 30), None, T0 + 1.1)
    assert one.ledger.requests.rate == 1.0 and one.ready(1, T0 + 1.1)


def test_a_halved_bucket_stays_halved() -> None:
    """What a reply says of the whole does not undo what an early 429 taught."""
    one = seat()
    lease(one).learn(told(600, 600, None), None, T0)
    one.ledger.halve_burst()
    lease(one).learn(told(600, 590, 1.0), None, T0)
    assert one.ledger.requests is not None and one.ledger.requests.size == 300


def test_a_halved_bucket_lets_no_more_pass_than_it_holds() -> None:
    """What it was full of before it was halved twice does not go out at once."""
    one = seat()
    lease(one).learn(told(600, 600, None), None, T0)
    for _ in range(2):
        one.ledger.halve_burst()
    sent = 0
    while one.ready(1, T0) and sent < 600:
        lease(one)
        sent += 1
    assert sent <= 150


def test_models_in_use_are_not_forgotten_for_names_that_clients_make_up() -> None:
    """The least recently used goes: a configured limit cannot be reset by asking for other models."""
    one = upstream("a", limits=app.QuotaLimits(rpm=1))
    lease(one.seat("real"), T0)
    for number in range(2 * app.MEMORY_MODELS):
        made = app.Lease(one.seat("m%d" % number), 1.0, False, T0 + number)
        made.release(app.GOOD, T0 + number)
        if number % 100 == 0:
            one.seat("real").ledger.used_at = T0 + number
    assert not one.seat("real").ready(1, T0 + 1)
    assert len(one.seats) <= app.MEMORY_MODELS and len(one.quota.ledgers) <= app.MEMORY_MODELS


def test_what_is_remembered_of_headers_is_short() -> None:
    """Neither a client nor an upstream can fill a memory with long values."""
    assert app.parse_duration("1" * 41) is None
    size = app.as_allowance.cache_info().currsize
    index = {
        b"x-ratelimit-limit-requests": b"10",
        b"x-ratelimit-remaining-requests": b"5",
        b"x-ratelimit-reset-requests": b"1" * 50_000,
    }
    assert app.allowance(index, app.REQUEST_NAMES, float) is None
    assert app.as_allowance.cache_info().currsize == size
    with pytest.raises(app.BadMessage):
        app.parse_request_head(b"GET / HTTP/1.1\r\nHost: " + b"a" * 301 + b"\r\n\r\n")


@pytest.mark.parametrize("seed", range(40))
def test_the_shortcut_of_a_decision_never_says_yes_where_the_arithmetic_says_no(seed: int) -> None:
    """Whatever is charged, learned, corrected, given back or refused in between: what `easy` lets pass does fit."""
    dice = random.Random(seed)
    limits = {name: dice.choice((0, most)) for name, most in (("rpm", 40), ("tpm", 9000), ("burst_s", 10))}
    one = seat(**{name: value for name, value in limits.items() if value})
    ledger, now, under_way, yes = one.ledger, T0, [], 0
    for _ in range(600):
        now += dice.choice((0.0, 0.001, 0.05, 0.9, 7.0))
        need = dice.choice((1.0, 50.0, 400.0, 3000.0))
        if one.ready(need, now):
            easy, ledger.easy = ledger.easy, -1.0
            assert ledger.opens_at(need, now) <= now, "easy said %r of %r" % (easy, need)
            ledger.easy, yes = easy, yes + 1
            under_way.append(lease(one, now, need, sent=dice.random() < 0.9))
        if under_way and dice.random() < 0.7:
            ended = under_way.pop(dice.randrange(len(under_way)))
            if dice.random() < 0.4:
                requests = told(50, dice.randrange(50), dice.choice((None, 3.0, 90.0)))
                ended.learn(dice.choice((requests, None)), told(9000, dice.randrange(9000), None), now)
            elif dice.random() < 0.3:
                ended.correct(dice.choice((0.0, 5000.0)), now)
            refused = dice.random() < 0.02
            ended.release(verdict("rate", 429) if refused else app.GOOD, now)
            if refused:
                ledger.close(verdict("rate", 429, after_s=dice.choice((None, 2.0))), ended.need, now)
    assert yes > 20
