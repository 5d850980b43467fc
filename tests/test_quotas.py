"""What is known of an account: buckets, windows, ledgers, gates, breaker, suspicion; pure arithmetic, no loop."""

import itertools
import logging
import random
from typing import Any
from unittest import mock

import pytest

import chatgpt_apiserver as app

NEVER = app.NEVER
T0 = 10_000.0
told = app.Allowance


def upstream(name: str = "a", quota: app.Quota | None = None, **more: Any) -> app.Upstream:
    """Return an echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), **more)
    return app.Upstream(config, app.EchoController(config), quota or app.Quota(name, config.limits))


def candidate(name: str = "a", model: str = "m", **limits: Any) -> app.Candidate:
    """Return a controller with these limits, for one model."""
    return upstream(name, limits=app.QuotaLimits(**limits)).candidate(model)


def lease(one: app.Candidate, now: float = T0, need: float = 1.0, stream: bool = True, sent: bool = True) -> app.Lease:
    """Return a lease, by default of a request that was written at once."""
    made = app.Lease(one, need, stream, now)
    if sent:
        made.sent(now)
    return made


def verdict(outcome: str, status: int = 500, message: str = "", **more: Any) -> app.Verdict:
    """Return what an attempt came to."""
    return app.Verdict(app.Outcome(outcome), status, message, **more)


def is_open(one: app.Candidate, now: float = T0, need: float = 1.0) -> bool:
    """Return whether a request may go now."""
    return one.opens_at(need, now) <= now


def fail(one: app.Candidate, outcome: str, now: float = T0, status: int = 500, **more: Any) -> None:
    """Make one whole attempt that ends so."""
    lease(one, now).release(verdict(outcome, status, **more), now)


def succeed(one: app.Candidate, now: float = T0) -> None:
    """Make one whole attempt that is answered."""
    made = lease(one, now)
    made.answered(now)
    made.release(app.OK, now)


def pool_of(*ups: app.Upstream) -> app.UpstreamPool:
    """Return a pool whose clock stands still and whose timers never fire."""
    timers = mock.Mock(**{"time.return_value": T0})
    return app.UpstreamPool(list(ups), app.PoolConfig(), timers)


# -- buckets


def test_a_bucket_refills_at_its_limit_per_minute() -> None:
    """Sixty a minute are one a second, up to the size, never below zero."""
    one = candidate()
    lease(one).learn(told(60, 10), None, T0)
    bucket = one.ledger.requests
    assert [bucket.level_at(T0 + after_s) for after_s in (0, 5, 1000)] == [10, pytest.approx(15), 60]
    bucket.take(100, T0 + 5)
    assert bucket.level_at(T0 + 5) == 0
    assert bucket.opens_at(1, T0 + 5) == pytest.approx(T0 + 6 + app.EDGE_S)
    assert bucket.opens_at(1, T0 + 6) > T0 + 6 and bucket.opens_at(1, T0 + 6.01) == 0  # not at the very edge
    assert bucket.opens_at(1000, T0 + 5) == pytest.approx(T0 + 65 + app.EDGE_S)  # more than all goes when it is full
    assert bucket.opens_at(1000, T0 + 65.01) == 0


def test_a_reset_tells_the_fraction_and_slow_limits() -> None:
    """`remaining` is rounded down: a reset adds the fraction, but not a window's. Two slow resets in a row count."""
    one, other = candidate(), candidate()
    for left, reset_s, level in ((59, 1.0, 59), (9, 50.5, 9.5), (9, 1.0, 9), (9, 49.9, 9)):
        lease(one).learn(told(60, left, reset_s), None, T0)
        assert one.ledger.requests.level_at(T0) == pytest.approx(level)
    day, minute = told(14_400, 14_390, 60.0), told(14_400, 14_390, 0.04)  # one a six seconds: 86,400 s for all
    for said, rate in ((day, 240), (day, 1 / 6), (day, 1 / 6), (minute, 240), (day, 240)):
        lease(other).learn(said, None, T0)
        assert other.ledger.requests.rate == pytest.approx(rate)


class Account:
    """An upstream that counts as OpenAI does: a bucket that refills all the time, reported in each reply."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit, self.level, self.at = limit, float(limit), now

    def level_at(self, now: float) -> float:
        return min(self.limit, self.level + (now - self.at) * self.limit / 60)

    def take(self, amount: float, now: float) -> app.Allowance | None:
        """Charge it and say what is left; None for a 429."""
        self.at, self.level = now, self.level_at(now)
        if self.level < amount:
            return None
        self.level -= amount
        return told(self.limit, int(self.level), (self.limit - self.level) / self.limit * 60)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_in_flight_is_counted_once(seed: int) -> None:
    """Against an account that counts, over random latencies: we believe in what is there, less what is on its way."""
    chance, transit_s, limit = random.Random(seed), 0.005, 120
    one, account, now = candidate(), Account(limit, T0), T0
    on_way: list[tuple[float, app.Lease]] = []
    replies: list[tuple[float, app.Lease, app.Allowance]] = []
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
            item[1].answered(item[0])
            item[1].learn(item[2], None, item[0])
            item[1].release(app.OK, item[0])
        bucket = one.ledger.requests
        if bucket.limit:
            exact = account.level_at(now) - len(on_way)
            assert exact - 1.1 <= bucket.level_at(now) <= exact + 1.1 + transit_s * limit / 60
        if is_open(one, now):
            sent += 1
            on_way.append((now + transit_s, lease(one, now)))
    assert refused <= 3 and sent > 700


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_first_replies_know_what_was_sent_before_anything_was_known(order: tuple[int, ...]) -> None:
    """Four requests at once on an unknown account of 60 a minute: whichever reply comes first, all four are counted."""
    one = candidate()
    flying = [lease(one, T0, need=100) for _ in range(4)]
    gone = lease(one, T0, need=100, sent=False)
    for at in order:
        flying[at].learn(told(60, 59 - at, at + 1), told(6000, 5900 - 100 * at, at + 1), T0 + 1)
        if at == order[1]:
            gone.release(verdict("connect"), T0 + 1)
    assert one.ledger.requests.level_at(T0 + 1) == pytest.approx(57, abs=0.01)
    assert one.ledger.tokens.level_at(T0 + 1) == pytest.approx(5700, abs=1)


@pytest.mark.parametrize("order", ["6789", "9876", "1234567896789", "9512346", "5"])
def test_a_refusal_adds_no_room(order: str) -> None:
    """Nine requests at once on an unknown account of five: whatever reply comes first or last, nothing is left."""
    one = candidate()
    flying = [lease(one, T0, need=10) for _ in range(9)]
    for number in map(int, order):
        left = max(0, 5 - number)
        flying[number - 1].learn(told(5, left, 12.0 * (5 - left)), told(50, 10 * left), T0 + 0.1)
    assert one.ledger.requests.level_at(T0 + 0.1) < 0.1 and one.ledger.tokens.level_at(T0 + 0.1) < 0.1


@pytest.mark.parametrize("seed", range(20))
def test_what_was_never_sent_is_given_back_whole(seed: int) -> None:
    """A reply's word less exactly the requests that were charged after its own and not given back."""
    chance = random.Random(seed)
    one = candidate()
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
                if chosen.serial >= one.ledger.requests.newest:
                    chosen.learn(told(1000, 500), told(100_000, 50_000), T0)
                    later = [made for made in flying if made.serial > chosen.serial]
                    assert one.ledger.requests.level_at(T0) == 500 - len(later)
                    assert one.ledger.tokens.level_at(T0) == 50_000 - sum(made.need for made in later)


# -- configured limits


def test_what_is_leased_but_not_sent_yet_holds_only_its_own_place() -> None:
    """A request that is connecting counts, but an older one leaves although it is queued behind it."""
    window = app.Window(False, 2, 60.0)
    connecting = window.take(1, T0)
    window.sent(window.take(1, T0), T0)
    assert window.opens_at(1, T0 + 1) == T0 + window.span_s
    assert window.opens_at(50, T0 + 1) == T0 + 1 + window.span_s  # more than all of it goes when it is empty
    assert window.opens_at(1, T0 + 61) == 0
    assert window.opens_at(2, T0 + 61) == T0 + 61 + window.span_s  # at the earliest: it has not been sent yet
    window.correct(connecting, 0.0, T0 + 61)
    assert window.opens_at(2, T0 + 61) == 0


@pytest.mark.parametrize(
    ("rpm", "burst_s"), [(30, 60.0), (60, 10.0), (100, 1.0), (7, 60.0), (120, 5.0), (20, 1.0)]
)
def test_at_most_rpm_in_any_minute_and_a_burst_at_once(rpm: int, burst_s: float) -> None:
    """Under random concurrency no 60 s hold more than rpm, no burst_s more than its share, and the limit is used up.

    A share that is no whole number is spread evenly: 1.67 a second are one each 0.6 s.
    """
    chance, one, now = random.Random(rpm), candidate(rpm=rpm, burst_s=burst_s), T0
    connecting: list[tuple[float, app.Lease]] = []
    sent: list[float] = []
    for _ in range(4000):
        now += chance.expovariate(6)
        for item in [item for item in connecting if item[0] <= now]:
            connecting.remove(item)
            if chance.random() < 0.1:
                item[1].release(verdict("gone", 0), now)
                continue
            item[1].sent(now)
            sent.append(now)
            item[1].release(app.OK, now)
        while is_open(one, now):
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
        ({"rpm": 1000, "burst_s": 0.5}, (1,), 1000),
        ({"tpm": 60_000, "burst_s": 1}, (300, 600), 133),
        ({"tpm": 60_000, "burst_s": 1}, (7000,), 8),
        ({"tpm": 60_000, "burst_s": 10}, (100, 4000, 700), 37),
    ],
)
def test_a_short_burst_wastes_nothing(limits: dict[str, Any], needs: tuple[int, ...], a_minute: int) -> None:
    """However few fit into a burst, nearly all that a minute may have goes in it, and evenly if it fits into one."""
    one, now = candidate(**limits), T0
    sent: list[float] = []
    for need in itertools.cycle(needs):
        now = max(now, one.opens_at(need, now))
        if now >= T0 + 180:
            break
        assert is_open(one, now, need)
        lease(one, now, need).release(app.OK, now)
        sent.append(now)
    assert 0.97 * 3 * a_minute <= len(sent) + 1 and len(sent) <= 3 * a_minute + len(needs)
    third = [sum(T0 + 20 * at <= one < T0 + 20 * at + 20 for one in sent) for at in range(9)]
    assert max(needs) > 1000 == limits.get("tpm", 0) / 60 or max(third) - min(third) <= 0.15 * max(third) + 2


def test_used_tokens_replace_the_estimate() -> None:
    """A configured limit counts what was used; what a reply reports counts more only where no limit is configured."""
    for tells in (False, True):
        one = candidate(tpm=1000)
        pool = pool_of(one.upstream)
        for used, taken in ((1, 1), (800, 801)):
            made = lease(one, need=500)
            made.learn(None, told(9000, 5000) if tells else None, T0)
            pool.used(made, "m", used, 0, tells)
            state = app.describe_ledger(one.ledger, T0)
            assert state["tpm"]["taken"] == taken and (not tells or state["tokens"]["left"] == 5000)


def test_a_reload_changes_limits_and_keeps_what_they_count() -> None:
    """What was sent within the minute, what is under way and what replies reported count under the new limits too."""
    pool = pool_of()

    def reload(**limits: Any) -> app.Candidate:
        data = {"controllers": [{"type": "echo", "name": "a", "limits": limits}]}
        app.rebuild_pool(pool, app.parse_config(data, "c.json", {}))
        return pool.candidates("m")[0]

    one = reload(rpm=10, concurrency=3, burst_s=30)
    flying = [lease(one), lease(one)]
    flying[0].learn(told(60, 40), None, T0)
    lease(one, sent=False).release(verdict("connect"), T0)
    assert reload(rpm=4, concurrency=2, burst_s=30).opens_at(1, T0) == NEVER
    flying[0].release(app.OK, T0)
    assert one.opens_at(1, T0) == T0 + 30  # two of four are half a minute's worth
    assert reload(rpm=2).opens_at(1, T0) == T0 + 60 + app.SLACK_S
    assert one.ledger.requests.level_at(T0) == 39 and one.upstream.in_flight == 1
    assert is_open(reload(rpm=3, tpm=100))
    lease(one, need=90)
    assert not is_open(one) and is_open(one, T0 + 61, need=100)


def test_limits_count_per_model_and_concurrency_for_all() -> None:
    """rpm closes one model; concurrency closes the controller, its quota group too."""
    first = upstream("a", limits=app.QuotaLimits(rpm=1))
    lease(first.candidate("m"))
    assert not is_open(first.candidate("m")) and is_open(first.candidate("n"))
    shared = app.Quota("g", app.QuotaLimits(concurrency=2))
    two = [upstream(name, shared) for name in "ab"]
    held = [lease(one.candidate("m")) for one in two]
    assert all(one.candidate(model).opens_at(1, T0) == NEVER for one in two for model in "mn")
    held[1].release(app.OK, T0)
    assert is_open(two[0].candidate("n"))


def test_a_dated_name_is_the_same_model() -> None:
    """A model with and without its date has one ledger, except at Azure, where deployments have quotas of their own."""
    one = upstream()
    dated, plain, mini = (one.candidate("gpt-4.1" + end) for end in ("-2025-04-14", "", "-mini"))
    assert dated.ledger is plain.ledger is one.candidate("gpt-4.1-20250414").ledger and mini.ledger is not plain.ledger
    config = app.ControllerConfig("azure", "z", app.AccountConfig())
    azure = app.Upstream(config, app.EchoController(config), one.quota)
    assert azure.candidate("gpt-4.1-2025-04-14").ledger is not azure.candidate("gpt-4.1").ledger


def test_a_limits_name_belongs_to_what_the_account_calls_the_model() -> None:
    """Whichever name a client used: all that mean the refused model share its new ledger; others do not."""
    shared = app.Quota("g", app.QuotaLimits())
    a = upstream("a", shared, model_map=(("fast", "m"), ("quick", "m-2025-04-14")))
    b = upstream("b", shared, model_map=(("fast", "n"),))
    pool = pool_of(a, b)
    same = [a.candidate("fast"), a.candidate("m"), a.candidate("quick"), b.candidate("m"), b.candidate("m-20250414")]
    others = [b.candidate("fast"), a.candidate("n")]
    pool.settle(lease(same[0]), verdict("rate", 429, bucket="m-long", after_s=9.0))
    same += [a.candidate("m-long")]
    assert {one.ledger.name for one in same} == {"m-long"} and not any(map(is_open, same))
    assert {one.ledger.name for one in others} == {"n"} and all(map(is_open, others))


def test_replies_count_for_the_ledger_that_their_request_was_charged_to() -> None:
    """When a 429 gives a model's limit another name, what is under way still belongs to the old one."""
    one = candidate()
    pool = pool_of(one.upstream)
    flying = [lease(one) for _ in range(50)]
    flying[0].learn(told(100, 99), None, T0)
    pool.settle(flying[1], verdict("rate", 429, bucket="m-long", after_s=1.0))
    assert one.ledger.name == "m-long" and one.opens_at(1, T0) == T0 + 1.0
    for made in flying[2:]:
        made.learn(told(100, 5), None, T0)
        made.release(verdict("gone", 0), T0)
    assert one.ledger.requests.limit == 0
    lease(one, T0 + 1).learn(told(100, 42), None, T0 + 1)
    assert one.ledger.requests.level_at(T0 + 1) == 42


def test_models_in_use_are_not_forgotten_for_names_that_clients_make_up() -> None:
    """The least recently used goes: a configured limit cannot be reset by asking for other models."""
    one = upstream("a", limits=app.QuotaLimits(rpm=1))
    real = one.candidate("real")
    lease(real)
    for number in range(2 * app.MEMORY_MODELS):
        app.Lease(one.candidate("m%d" % number), 1.0, False, T0).release(app.OK, T0)
        if number % 100 == 0:
            assert not is_open(real)
    assert not is_open(one.candidate("real"))
    assert len(one.candidates) <= app.MEMORY_MODELS and len(one.quota.ledgers) <= app.MEMORY_MODELS


# -- 429


def refuse(one: app.Candidate, now: float = T0, need: float = 1.0, **more: Any) -> float:
    """Take a 429; return for how long the candidate is closed then."""
    one.ledger.close(verdict("rate", 429, **more), need, now)
    return one.opens_at(need, now) - now


def test_a_429_without_a_time() -> None:
    """Without a time: one second, doubling to thirty, not past a known reset, and longer where more is lacking."""
    full, one, now = candidate(), candidate(), T0
    lease(full).learn(told(6, 0), None, T0)
    assert refuse(full) == pytest.approx(10, abs=0.01)
    for expected in (1, 2, 4, 8, 16, 30, 30):
        assert refuse(one, now) == expected
        now += expected
    for reset_s, expected in ((3.0, 3), (50.0, 30)):
        assert refuse(one, now, reset_s=reset_s) == expected
        now += expected
    under_way, made = lease(one, now), lease(one, now + 0.1)
    under_way.sent(now - 30)
    under_way.answered(now)  # it was let in before that refusal
    assert refuse(one, now) == 30
    made.sent(now + 30)
    made.answered(now + 30)
    assert refuse(one, now + 30) == 1


def test_after_a_429_without_a_time_there_is_one_probe_at_a_time() -> None:
    """The next one goes once the probe is answered, has ended, or was not refused for as long as the closing was."""
    one, now = candidate(rpm=1000), T0
    pool = pool_of(one.upstream)
    pool.timers.time.side_effect = lambda: now  # type: ignore[attr-defined]
    flying = [lease(one, now, need=5) for _ in range(6)]
    for made in flying[:3]:
        pool.settle(made, verdict("rate", 429))
    assert one.opens_at(1, now) == now + 1
    for closed_s in (2, 4):
        now = one.opens_at(1, now)
        pool.settle(lease(one, now), verdict("gone", 0))
        probe = lease(one, now)
        assert one.opens_at(1, now) == now + closed_s / 2
        pool.settle(probe, verdict("rate", 429))
        assert one.opens_at(1, now) == now + closed_s
        flying.pop().answered(now)  # from before the 429
        assert one.opens_at(1, now) == now + closed_s
    now += 4
    lease(one, now).answered(now)
    assert is_open(one, now)
    pool.settle(lease(one, now + 0.1, need=5), verdict("rate", 429, by_tokens=True))
    assert is_open(one, now + 0.2, need=4) and not is_open(one, now + 0.2, need=5)


@pytest.mark.parametrize("after_s", [0.0, 0.003])
def test_a_429_that_says_now_again_and_again(after_s: float) -> None:
    """It is believed less each time, up to a second, until an answer; a longer time is obeyed, up to ten minutes."""
    one, now = candidate(rpm=1000), T0
    for expected in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0):
        assert refuse(one, now, after_s=after_s) == pytest.approx(expected)
        now += expected
    assert refuse(one, now, after_s=7.0) == pytest.approx(7.0)
    assert refuse(candidate(), after_s=601.0) == refuse(candidate(), after_s=1e9) == pytest.approx(600.0)
    made = lease(one, now)
    made.sent(now + 7)
    made.answered(now + 7)
    assert refuse(one, now + 7, after_s=after_s) == pytest.approx(0.01)


def test_token_429s_close_as_each_of_them_said() -> None:
    """Of any number of token 429s a request obeys those of its size and smaller, and no other."""
    chance = random.Random(11)
    for _ in range(100):
        one, said = candidate(rpm=10**6), []
        for _ in range(12):
            need, after_s = chance.randint(1, 20), chance.randint(1, 20)
            refuse(one, need=need, by_tokens=True, after_s=float(after_s))
            said.append((need, after_s))
        for need, later in itertools.product(range(1, 22), (0, 5, 10, 25)):
            until = max((after_s for least, after_s in said if need >= least), default=0)
            assert max(0.0, one.opens_at(need, T0 + later) - T0 - later) == max(0, until - later)


def test_an_early_429_halves_the_burst() -> None:
    """Refused in spite of room by its own word, else by our count: half as much at once, at least a second's worth."""
    one, two = candidate(rpm=600), candidate()
    pool, now = pool_of(one.upstream, two.upstream), T0 + 100

    def at_once(one: app.Candidate) -> int:
        return len([lease(one, now) for _ in range(700) if is_open(one, now)])

    for _ in range(7):
        pool.settle(lease(one, now), verdict("rate", 429, after_s=0.0))
        now += 100
    assert at_once(one) == 10
    for tokens, most in ((500, 300), (500, 150), (0, 150)):  # whatever a reply says of the whole
        made = lease(two, now, need=10)
        made.learn(told(600, 600), told(1000, tokens), now)
        pool.settle(made, verdict("rate", 429, after_s=0.0, by_tokens=True))
        now += 100
        made.learn(told(600, 590, 1.0), None, now)
        assert most / 2 < at_once(two) <= most
        now += 100


def test_a_429_without_limits_starts_slowly() -> None:
    """Where replies report no limits, one goes at the reopening; after each round trip one more, and twice as fast."""
    one, now = candidate(), T0 + 1.0
    assert refuse(one, after_s=1.0) == pytest.approx(1.0)
    for rate in (1, 2, 4, 8):
        flying = [lease(one, now), lease(one, now)]
        assert one.opens_at(1, now) == pytest.approx(now + 1 / rate, abs=0.01)
        now += 0.01
        for made in flying:
            made.answered(now)
        now += 0.001
        assert is_open(one, now)
    assert refuse(one, now, after_s=0.25) == pytest.approx(0.25)
    for rate in (8, 9.5):  # half of the refused rate, then slow growth
        assert one.ledger.requests.rate == pytest.approx(rate, abs=0.01)
        now += 0.25
        lease(one, now).answered(now + 0.125)


# -- gates: what puts a controller out, for how long, and what brings it back


def times_out(one: app.Candidate, outcome: str, count: int, now: float, times: tuple[float, ...]) -> float:
    """Put it out by `count` failures, then let each probe fail; return when it is due back at last."""
    for _ in range(count - 1):
        fail(one, outcome, now)
    assert is_open(one, now)
    fail(one, outcome, now)
    for at, expected in enumerate(times):
        assert one.opens_at(1, now) == pytest.approx(now + expected) and not is_open(one, now + expected - 0.01)
        now += expected
        if at + 1 < len(times):
            assert is_open(one, now)
            probe = lease(one, now)
            assert probe.is_probe is (outcome in ("fault", "auth", "forbidden"))
            assert one.opens_at(1, now) == NEVER  # one at a time
            probe.release(verdict(outcome), now)
    return now


@pytest.mark.parametrize(
    ("outcome", "count", "times"),
    [
        ("fault", 5, (2,)),
        ("fault", 5, (2, 4, 8, 16, 32, 60, 60)),
        ("auth", 2, (30, 60, 120, 240, 480, 960, 1920, 3600, 3600)),
        ("forbidden", 3, (30, 60, 120)),
        ("quota", 1, (300, 600, 1200, 2400, 3600, 3600)),
        ("missing", 1, (600, 600)),
    ],
)
def test_out_for_longer_each_time_until_an_answer_ends_well(outcome: str, count: int, times: tuple[float, ...]) -> None:
    """A number of failures, then a time that doubles at each failed probe; a good end forgets all of it."""
    one = candidate()
    now = times_out(one, outcome, count, T0, times)
    probe = lease(one, now)
    probe.answered(now)
    assert is_open(one, now)  # while the probe's stream still runs
    probe.release(app.OK, now)
    times_out(one, outcome, count, now + 1, times[:2])


FIRST = [("fault", 5, 2), ("auth", 2, 30), ("forbidden", 3, 30), ("quota", 1, 300), ("missing", 1, 600)]


@pytest.mark.parametrize(("outcome", "count", "first_s"), FIRST)
def test_only_a_probe_at_its_due_time_doubles(outcome: str, count: int, first_s: float) -> None:
    """Requests that were under way, or forced through as a last resort, change no time."""
    one = candidate()
    flying = [lease(one) for _ in range(10)]
    for made in flying[: count + 2]:
        made.release(verdict(outcome), T0)
    for _ in range(5):
        fail(one, outcome, T0 + 1)
    flying[-1].answered(T0 + 1)  # it was let in before
    assert one.opens_at(1, T0 + 1) == T0 + first_s
    flying[-2].release(verdict(outcome), T0 + first_s)
    assert is_open(one, T0 + first_s)
    for _ in range(count):
        lease(one, T0 + first_s).release(verdict("gone", 0), T0 + first_s)  # a probe whose client left
    assert is_open(one, T0 + first_s) and one.upstream.gate.reason + one.upstream.quota.gate.reason + one.gate.reason
    other = candidate()
    times_out(other, outcome, count, T0, (first_s,))
    succeed(other, T0 + 1)  # a last resort that is answered was sent after the gate shut: the account works
    assert is_open(other, T0 + 1)


@pytest.mark.parametrize(
    ("outcome", "steps", "opens"),
    [
        ("auth", "fss" * 40, False),
        ("forbidden", "fss" * 40, False),
        ("fault", "fss" * 40, False),
        ("connect", "f" * 5, True),
        ("silent", "s" * 6 + "f" * 6, True),
        ("fault", "s" * 19 + "f" * 10, True),
    ],
)
def test_failures_count_in_a_row_or_as_a_half(outcome: str, steps: str, opens: bool) -> None:
    """A success begins the row again. The breaker opens at five failures that are half of the last twenty outcomes."""
    one = candidate()
    for step in steps:
        assert is_open(one)
        succeed(one) if step == "s" else fail(one, outcome)
    assert is_open(one) is not opens and one.upstream.failures == steps.count("f")


def test_streams_that_begin_well_and_are_cut_open_the_breaker_for_longer_each_time() -> None:
    """Their beginning lets the next ones in, but only one that ends well begins again with two seconds."""
    one, now = candidate(), T0
    for expected in (2, 4, 8, 16, 2):
        if expected == 2:
            succeed(one, now)
        else:
            lease(one, now).answered(now)
        flying = [lease(one, now) for _ in range(5)]
        for made in flying:
            assert is_open(one, now)
            made.answered(now)
            made.release(verdict("cut"), now)
        assert one.opens_at(1, now) == pytest.approx(now + expected)
        now += expected


def test_retry_after_of_a_busy_controller_is_honoured() -> None:
    """A 503 with a Retry-After closes for that time, at most ten minutes, without a probe."""
    one, two = candidate(), candidate()
    fail(one, "fault", status=503, after_s=7.0)
    assert one.opens_at(1, T0) == T0 + 7 and one.upstream.is_busy(T0) and is_open(one, T0 + 7)
    lease(one, T0 + 7)
    assert is_open(one, T0 + 7)
    fail(two, "fault", status=503, after_s=1e6)
    assert two.opens_at(1, T0) == T0 + 600


@pytest.mark.parametrize("outcome", ["client", "gone", "lost", "large", "rate", "unfit", "barred"])
def test_what_is_not_the_controllers_fault_costs_it_nothing(outcome: str) -> None:
    """A client's mistake, a client that left, a lost race: not blamed, however often."""
    one = candidate()
    for _ in range(100):
        fail(one, outcome, status=400)
    assert is_open(one) and (one.upstream.failures, one.upstream.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "failures", "reason"),
    [
        ("server_error", 5, "failing"),
        ("overloaded_error", 5, "failing"),
        ("insufficient_quota", 0, "no_credit"),
        ("authentication_error", 5, None),  # a key that begins an answer is not refused
        ("rate_limit_exceeded", 0, None),
        ("invalid_request_error", 0, None),
    ],
)
def test_an_error_after_the_answer_began_counts_as_its_status(kind: str, failures: int, reason: str | None) -> None:
    """An error event in a stream that was already good is judged and settled like a reply with that status."""
    one = upstream("a")
    pool = pool_of(one)
    for made in [lease(one.candidate("m")) for _ in range(5)]:
        pool.answered(made, True, T0)
        event = b'data: {"error":{"message":"x","type":"%b","code":"%b"}}\n\n' % ((kind.encode(),) * 2)
        pool.settle(made, app.judge_error_event(event, {}, ()))
    state = app.describe_upstream(one, T0)
    assert (one.failures, one.in_flight, state["reason"]) == (failures, 0, reason)
    assert (state["state"] == "ok") is is_open(one.candidate("m")) is (kind in {"invalid_request_error", "authentication_error"})


def test_a_quota_group_is_out_of_credit_together() -> None:
    """One account without credit closes the group, and one probe of any of them opens it."""
    shared = app.Quota("g", app.QuotaLimits())
    two = [upstream(name, shared).candidate("m") for name in "ab"]
    fail(two[0], "quota", status=429)
    assert [one.room_at(1, T0) for one in two] == [T0 + 300] * 2
    probe = lease(two[1], T0 + 300)
    assert not any(is_open(one, T0 + 300) for one in two)
    probe.answered(T0 + 300)
    assert all(is_open(one, T0 + 300) for one in two)


def test_the_log_says_why_a_controller_is_out_and_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """A warning with reason and time each time that it goes out, and one line when it returns, whatever the way."""
    one = candidate("team-a")
    with caplog.at_level(logging.INFO, "chatgpt_apiserver"):
        for at in (0, 0, 0, 31):
            fail(one, "auth", T0 + at, 401, message="Incorrect API key")
        succeed(one, T0 + 4000)
        fail(one, "fault", T0 + 4100, 503, after_s=7.0)
        one.upstream.try_again(T0 + 4101)
    assert [f"{record.levelname} {record.getMessage()}" for record in caplog.records] == [
        "WARNING account team-a: disabled for 30 s: 401 Incorrect API key",
        "WARNING account team-a: disabled for 60 s: 401 Incorrect API key",
        "INFO account team-a: back after 4000 s",
        "WARNING account team-a: disabled for 7 s: 503 ",
        "INFO account team-a: back after 1 s",
    ]


@pytest.mark.parametrize(("outcome", "count", "first_s"), FIRST)
def test_a_reload_tries_all_again(outcome: str, count: int, first_s: float) -> None:
    """The operator has just acted: what was out is asked at once, and is out for the first time again if it fails."""
    one = candidate()
    pool = pool_of(one.upstream)
    for _ in range(2):
        times_out(one, outcome, count, T0, (first_s, 2 * first_s)[: 1 + (outcome != "missing")])
        pool.replace([one.upstream], app.PoolConfig())


# -- suspicion


def usual(one: app.Candidate, seconds: float, count: int = 20, stream: bool = True) -> None:
    """Give it a history of answers that took so long."""
    one.times[stream].extend([seconds] * count)


def silent_from(one: app.Candidate, since: float) -> float:
    """Return when it begins to be suspicious, to a tenth of a second; NEVER if it does not within 1,000 s."""
    times = [since + step / 10 for step in range(10_000)]
    return next((round(at - T0, 1) for at in times if one.upstream.is_silent(at)), NEVER)


@pytest.mark.parametrize(("took_s", "sent", "expected"), [(0.8, (0, 2), NEVER), (0.8, (0, 2, 2.3), 2.5), (0.01, (0, 0, 0), 1.1)])
def test_three_silent_requests_make_a_suspect(took_s: float, sent: tuple[float, ...], expected: float) -> None:
    """At least three unanswered, the oldest for more than three times the usual p95, and at least a second."""
    one = candidate()
    usual(one, took_s)
    for at in sent:
        lease(one, T0 + at)
    assert silent_from(one, T0 + sent[-1]) == expected


def test_one_slow_request_hides_no_hang() -> None:
    """What was sent since the last byte counts, unless others of its model and kind proved to be as slow."""
    one, other = candidate(), candidate()
    usual(one, 0.1)
    usual(other, 0.1)
    lease(one.upstream.candidate("thinks-for-long"), T0)
    lease(one, T0 + 50).answered(T0 + 50.1)
    for at in range(3):
        lease(one, T0 + 51 + at)
    assert silent_from(one, T0 + 51) == 52.1
    pinged = lease(one, T0 + 54)
    pinged.heard(T0 + 54.1)  # any byte is a sign of life, and this request is never silent again
    assert not one.upstream.is_silent(T0 + 1000) and pinged not in one.upstream.unanswered
    lease(other, T0)
    lease(other, T0 + 30).answered(T0 + 30.1)
    for _ in range(3):
        lease(other, T0 + 31)
    assert silent_from(other, T0 + 31) == pytest.approx(61.2)


@pytest.mark.parametrize("seed", range(5))
def test_slow_answers_among_quick_ones_are_no_suspicion(seed: int) -> None:
    """One in five takes up to thirty seconds where the others take a tenth: never suspect, until all of it hangs."""
    chance, one, now = random.Random(seed), candidate(), T0
    flying: list[tuple[float, app.Lease]] = []
    for _ in range(3000):
        now += chance.expovariate(10)
        for item in [item for item in flying if item[0] <= now]:
            flying.remove(item)
            item[1].answered(item[0])
            item[1].release(app.OK, item[0])
        assert not one.upstream.is_silent(now)
        flying.append((now + (chance.uniform(5, 30) if chance.random() < 0.2 else 0.1), lease(one, now)))
    for _ in range(3):
        lease(one, now)
    assert one.upstream.is_silent(now + 3 * 30 + 30)


def test_kinds_and_models_have_their_own_usual_times() -> None:
    """A whole answer is not measured by streams, nor one model by another; of few a p95 is the longest."""
    one = candidate()
    usual(one, 0.1, 18)
    usual(one, 2.0, 2)
    usual(one, 20.0, stream=False)
    for stream, model, expected in ((True, "m", 6.1), (False, "m", 60.1), (True, "n", 30.1)):
        flying = [lease(one.upstream.candidate(model), T0, stream=stream) for _ in range(3)]
        assert silent_from(one, T0) == expected
        for made in flying:
            made.release(verdict("gone", 0), T0)


def test_a_suspect_is_probed_once_nothing_is_stuck() -> None:
    """No new requests; when it is empty one probes after 1, 2, 4 ... 60 s; any late byte clears it."""
    one, now = candidate(), T0
    usual(one, 0.1)
    flying = [lease(one, now) for _ in range(3)]
    one.upstream.gate.shut(app.SILENT, now, "silent", NEVER)
    assert one.well_at(now) == NEVER
    for made in flying:
        made.release(verdict("lost", 0), now)
    for expected in (1, 2, 4, 8, 16, 32, 60, 60):
        assert one.opens_at(1, now) == now + expected
        now += expected
        probe = lease(one, now)
        assert one.opens_at(1, now) == NEVER and silent_from(one, now) == round(now - T0 + 1.1, 1)
        one.upstream.gate.shut(app.SILENT, now, "silent", NEVER)
        probe.release(verdict("lost", 0), now)
    stuck = [lease(one, now) for _ in range(2)]
    stuck[1].heard(now)
    assert is_open(one, now)


# -- the line's estimate


def test_turn_at_is_what_counting_says() -> None:
    """The estimate is when as many places have been given as stand before."""
    chance = random.Random(17)
    for _ in range(500):
        count, ahead = chance.randint(1, 5), chance.randrange(40)
        openings = [(chance.choice((0.0, T0 + chance.random() * 50)), chance.choice((0.1, 1.0, 8.3))) for _ in range(count)]
        turn = app.turn_at(openings, ahead, T0)
        for at, enough in ((turn - 1e-3, turn == T0), (turn + 1e-3, True)):
            given = [1 + (at - max(opens, T0)) * rate for opens, rate in openings if max(opens, T0) <= at]
            assert (sum(given) >= ahead + 1) is enough or at < T0
    assert app.turn_at([(NEVER, 5.0), (T0 + 3, 1.0)], 0, T0) == T0 + 3  # an unknown opening does not help
    assert app.turn_at([(NEVER, 5.0)], 0, T0) == NEVER
    assert app.turn_at([(T0 + 3, NEVER)], 1000, T0) == pytest.approx(T0 + 3, abs=0.01)
