"""Which controller gets a request: policies, models, leases, the last resort, hedges, client quotas."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import chatgpt_apiserver as app

T0 = 1000.0


def upstream(name: str, weight: int = 1, models: tuple[str, ...] = (), **more: Any) -> app.Upstream:
    """Return an echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), weight, models, **more)
    return app.Upstream(config, app.EchoController(config), app.Quota(name, config.limits))


def upstreams(*weights: int) -> list[app.Upstream]:
    """Return controllers a, b, c ... with these weights."""
    return [upstream(name, weight) for name, weight in zip("abcdefgh", weights, strict=False)]


def request(stream: bool = True, **more: Any) -> app.ApiRequest:
    """Return a chat with model m."""
    made = app.ApiRequest("POST", "/chat/completions", "", b"", b"")
    made.model, made.stream = "m", stream
    for name, value in more.items():
        setattr(made, name, value)
    return made


class Clock:
    """A clock that is moved by hand, and timers that fire when the test says so."""

    def __init__(self) -> None:
        self.now = T0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, call: Callable[..., None], *args: Any) -> "Clock":
        self.timers.append((at, call, args))
        return self

    def cancel(self) -> None:
        pass

    def move_to(self, at: float) -> None:
        """Move on, and fire what is due."""
        self.now = at
        due, self.timers = [one for one in self.timers if one[0] <= at], [one for one in self.timers if one[0] > at]
        for _, call, args in due:
            call(*args)


def pool_of(ups: list[app.Upstream], kind: str = "balanced", clock: Clock | None = None, **more: Any) -> app.UpstreamPool:
    """Return a pool of these controllers."""
    return app.UpstreamPool(ups, app.PoolConfig(type=kind, **more), clock or Clock())  # type: ignore[arg-type]


def lease(pool: app.UpstreamPool, asked: app.ApiRequest | None = None, *tried: app.Upstream) -> app.Lease | None:
    """Return the right to send a request now."""
    return pool.lease_at_once(asked or request(), pool.candidates("m"), set(tried))


def take(pool: app.UpstreamPool, asked: app.ApiRequest | None = None) -> app.Lease:
    """Return a lease, which must be granted."""
    found = lease(pool, asked)
    assert found is not None
    return found


def names(pool: app.UpstreamPool, count: int, hold: bool = False) -> str:
    """Return which controllers get so many requests, each over at once unless they are to be held."""
    chosen = ""
    for _ in range(count):
        found = take(pool)
        chosen += found.upstream.name
        if not hold:
            pool.settle(found, app.Verdict(app.Outcome.GONE))
    return chosen


async def ask(pool: app.UpstreamPool, *tried: app.Upstream, **more: Any) -> str:
    """Return which controller a request gets that does not wait; "" for none, the time of a refusal."""
    try:
        found = await pool.lease(request(**more), pool.candidates("m"), set(tried))
    except app.NoRoom as refusal:
        return f"{refusal.after_s:.0f}"
    return found.upstream.name if found is not None else ""


@pytest.mark.parametrize(
    ("kind", "weights", "expected"),
    [
        ("balanced", (5, 1, 1), "aabacaa" * 2),  # the sequence of the Go original
        ("balanced", (1, 1, 1), "abcabc"),
        ("least_busy", (1, 3), "abbbabbb"),  # for its weight; the earlier of equals
        ("priority", (1, 3), "aaaa"),
    ],
)
def test_sequences(kind: str, weights: tuple[int, ...], expected: str) -> None:
    """A policy without chance makes one exact sequence."""
    assert names(pool_of(upstreams(*weights), kind), len(expected), hold=kind == "least_busy") == expected


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("how", ["429", "tried"])
def test_shares_with_any_subset_closed(size: int, how: str) -> None:
    """Whichever of five cannot take part, each of the others gets its weight's share of every cycle.

    Of those that are full only the chosen one is asked, so a turn or two may go to another one at the beginning.
    """
    for opened in itertools.combinations(range(5), size):
        ups = upstreams(3, 1, 2, 1, 5)
        pool, closed = pool_of(ups), [one for at, one in enumerate(ups) if at not in opened]
        for one in closed if how == "429" else ():
            one.candidate("m").ledger.close(app.Verdict(app.Outcome.RATE, 429, after_s=60.0), 1, T0)
        cycle = sum(ups[at].weight for at in opened)
        for count in (1, 1, 20):
            leases = [lease(pool, None, *(closed if how == "tried" else ())) for _ in range(count * cycle)]
            seen = Counter(one.upstream.name for one in leases if one)
            assert sum(seen.values()) == count * cycle
            assert all(abs(seen[ups[at].name] - count * ups[at].weight) <= 2 * (how == "429") for at in opened)


def test_fastest_knows_answers_from_streams() -> None:
    """The one whose first byte came soonest, for each kind; one that was never asked comes first."""
    clock = Clock()
    pool = pool_of(upstreams(1, 1), "fastest", clock)

    def answer(stream: bool, name: str, took_s: float) -> None:
        found = take(pool, request(stream))
        assert found.upstream.name == name
        clock.now += took_s
        pool.answered(found, True, clock.now)
        pool.settle(found, app.OK)

    for name, took_s in (("a", 0.2), ("b", 0.1), ("b", 0.1)):
        answer(True, name, took_s)
    for name, took_s in (("a", 1.0), ("b", 5.0), ("a", 1.0)):
        answer(False, name, took_s)


@pytest.mark.parametrize("kind", app.POOL_TYPES)
def test_every_pool_type_can_be_built(kind: str) -> None:
    """What the configuration allows can be run."""
    data = {"pool": {"type": kind}, "controllers": [{"type": "echo"}, {"type": "echo"}]}
    pool = pool_of([])
    app.rebuild_pool(pool, app.parse_config(data, "c.json", {}))
    assert take(pool).candidate in pool.candidates("m")


def test_serves() -> None:
    """`*` and `?` are the only wildcards, names match whole, and the names of `model_map` are served too."""
    for models, served, others in (
        ("", "anything fast", ""),
        ("gpt-4.1*", "gpt-4.1 gpt-4.1-mini fast", "gpt-4x1"),
        ("gpt-?", "gpt-5", "gpt-55"),
        ("a b", "a b fast", "ab A quick"),
        ("[ab]+", "[ab]+", "a"),
    ):
        controller = upstream("a", models=tuple(models.split()), model_map=(("fast", "m"),))
        assert all(map(controller.serves, served.split())) and not any(map(controller.serves, others.split()))


@pytest.mark.parametrize(
    ("model", "candidates"),
    [
        ("llama-3", "b b b"),  # b names it
        ("quick", "a a a"),  # in the model_map of a
        ("gpt", "ac ac c"),  # nothing names it, so an unknown list may have it
        ("both", "b bc bc"),  # named by b, listed by c
        ("preview", "ac ac ac"),  # in no list, as lists leave out previews
        ("", "abc abc abc"),
    ],
)
def test_a_model_goes_to_what_names_or_lists_it(model: str, candidates: str) -> None:
    """Without `models` a controller gets what it lists, and what nothing names or lists."""
    a, b, c = upstream("a", model_map=(("quick", "x"),)), upstream("b", models=("llama-*", "both")), upstream("c")
    pool, found = pool_of([a, b, c]), []
    for learner, names_listed in ((None, ""), (c, "gpt both"), (a, "other")):
        if learner is not None:
            pool.learn_models(learner, names_listed.split())
        found.append("".join(item.upstream.name for item in pool.candidates(model)))
    assert " ".join(found) == candidates


def test_candidates() -> None:
    """Only those that serve the model, in the order of the file; else a 404 that names what is served."""
    pool = pool_of([upstream("a", models=("x", "y*")), upstream("b", 1, ("x",))], "priority")
    assert [one.upstream.name for one in pool.candidates("x")] == ["a", "b"]
    assert [one.upstream.name for one in pool.candidates("yz")] == ["a"]
    for _ in range(2):
        with pytest.raises(app.ProxyError, match=r"'nope' .*Served: x, y\*\.") as caught:
            pool.candidates("nope")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    with pytest.raises(app.ProxyError) as caught:
        pool.candidates("n" * 100_000)
    assert len(caught.value.message) < 300
    for number in range(2 * app.MEMORY_MODELS):  # clients cannot fill the memory with names
        pool.candidates("y%d" % number)
    assert len(pool.serving) <= app.MEMORY_MODELS >= len(pool.upstreams[0].candidates)
    assert pool.configured_models() == ["x"]


def test_leases() -> None:
    """Each controller is tried once in a round, and a lease is given back once."""
    pool = pool_of(upstreams(1, 1))
    first = take(pool)
    second = lease(pool, None, first.upstream)
    assert second is not None and (first.upstream.name, second.upstream.name) == ("a", "b")
    assert lease(pool, None, *pool.upstreams) is None
    assert [one.in_flight for one in pool.upstreams] == [1, 1]
    for granted in (first, second, first, second):
        pool.settle(granted, app.Verdict(app.Outcome.FAULT))
    assert [(one.in_flight, one.requests, one.failures) for one in pool.upstreams] == [(0, 1, 1), (0, 1, 1)]


# -- the last resort


def put(one: app.Upstream, state: str) -> None:
    """Bring a controller into that state."""
    if state == "full":
        one.candidate("m").ledger.close(app.Verdict(app.Outcome.RATE, 429, after_s=100.0), 1, T0)
    elif state == "failed":
        take_failed = app.Lease(one.candidate("m"), 1, True, T0)
        take_failed.release(app.Verdict(app.Outcome.FAULT, 500), T0)
    elif state == "no_credit":
        one.quota.gate.shut(app.NO_CREDIT, T0, "no money")
    elif state.startswith("busy"):
        one.gate.shut(app.BUSY, T0, "503", float(state[4:]))
    elif state != "ok":
        one.gate.shut(state, T0, "out")


@pytest.mark.parametrize(
    ("states", "tried", "chosen"),
    [
        (["failing"], "", "a"),
        (["refused", "failing"], "", "b"),  # the one due back first
        (["refused", "failing"], "b", "a"),
        (["refused", "failing"], "ab", ""),
        (["refused", "full"], "", "30"),  # an account that is merely full refuses, with the true time: the first is due back
        (["refused", "no_credit"], "", "a"),
        (["no_credit"], "", "300"),  # waiting for money is a limit
        (["refused", "failed"], "b", ""),  # the other one works, though not for this request
        (["missing"], "", "a"),
        (["busy20", "refused"], "", "a"),  # its time is too late for the request
    ],
)
async def test_the_last_resort(states: list[str], tried: str, chosen: str) -> None:
    """Only when all controllers of a model are out by health is the one due back first asked anyway."""
    ups = upstreams(*[1] * len(states))
    pool = pool_of(ups)
    for one, state in zip(ups, states, strict=True):
        put(one, state)
    already = [ups["ab".index(name)] for name in tried]
    assert lease(pool, None, *already) is None  # a hedge is no last resort
    assert await ask(pool, *already) == chosen


# -- silence and hedges


@pytest.mark.parametrize(
    ("own", "others", "after_s"), [(19, 0, None), (20, 0, 15.0), (0, 20, 15.0), (0, 19, None)]
)
def test_when_a_request_is_stuck(own: int, others: int, after_s: float | None) -> None:
    """Past ten seconds and three times the p99 of this controller, else of all, and never with fewer than 20 samples."""
    clock = Clock()
    pool, asked = pool_of([upstream("a"), upstream("b")], "priority", clock), []
    for candidate, count in zip(pool.candidates("m"), (own, others), strict=True):
        candidate.times[True].extend(([1.0] * 19 + [5.0])[-count:] if count else ())
    found = take(pool)
    found.stuck = lambda: asked.append(clock.now) or True  # type: ignore[func-returns-value]
    found.sent(T0)
    for step in range(200):
        clock.move_to(T0 + step / 4)
    assert (asked[0] - T0 if asked else None) == (after_s and pytest.approx(after_s, abs=0.5))


# -- client keys


def test_a_client_key_has_its_own_limits() -> None:
    """Requests and tokens of a minute and requests at once, by what was used; what was refused or not sent is free."""
    key = app.ClientQuota("k", app.QuotaLimits(rpm=3, tpm=1000, concurrency=2))

    def refused_for(need: float, now: float = T0) -> float:
        with pytest.raises(app.NoRoom) as refusal:
            key.enter(need, now)
        return round(refusal.value.after_s)

    first, second = key.enter(400, T0), key.enter(400, T0)
    assert refused_for(1) == app.KEY_BUSY_S
    first.leave(False, T0)
    assert refused_for(700) == 60
    third = key.enter(500, T0)
    third.used(100, T0)
    third.leave(True, T0)
    key.enter(500, T0).leave(True, T0)
    assert refused_for(1) == 60  # three requests were sent
    second.used(3000, T0 + 90)  # a long answer: its minute is over, and what the estimate lacked counts now
    assert refused_for(1, T0 + 91) == 59
    key.configure(app.QuotaLimits(tpm=4000))
    key.enter(1300, T0 + 91).leave(True, T0 + 91)
    assert refused_for(200, T0 + 91) == 59


# -- what /status says


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("ok", ("ok", None, 0)),
        ("full", ("limited", None, 100)),
        ("failing", ("out", "failing", 2)),
        ("refused", ("out", "refused", 30)),
        ("silent", ("out", "silent", 1)),
        ("no_credit", ("out", "no_credit", 300)),
        ("busy20", ("out", "busy", 20)),
    ],
)
def test_status(state: str, expected: tuple[str, str | None, float]) -> None:
    """A controller is ok, limited for a time, or out for a reason and a time."""
    pool = pool_of(upstreams(1))
    put(pool.upstreams[0], state)
    (found,) = app.describe_pool(pool, T0)["controllers"]
    assert (found["state"], found["reason"], found["for_s"]) == expected
