"""Who gets a request: policies, models, leases."""

import itertools
import random
from collections import Counter

import pytest

import chatgpt_apiserver as app


def upstream(
    name: str, weight: int = 1, models: tuple[str, ...] = (), **more: object
) -> app.Upstream:
    """An echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), weight, models, **more)  # type: ignore[arg-type]
    return app.Upstream(config, app.EchoController(config), app.Quota(name, config.limits))


def seats(*weights: int) -> list[app.Seat]:
    """Seats of controllers a, b, c ... with these weights."""
    return [one.seat("m") for one in upstreams(*weights)]


def upstreams(*weights: int) -> list[app.Upstream]:
    """Controllers a, b, c ... with these weights."""
    return [upstream(name, weight) for name, weight in zip("abcdefgh", weights, strict=False)]


def request(stream: bool = True, stateful: bool = False) -> app.ApiRequest:
    """A request of that kind."""
    made = app.ApiRequest("POST", "/v1/chat/completions", "", b"", b"")
    made.stream, made.stateful = stream, stateful
    return made


def pool_of(ups: "list[app.Upstream]", kind: str = "balanced") -> app.UpstreamPool:
    """A pool whose clock stands still."""
    return app.UpstreamPool(ups, app.PoolConfig(type=kind), Clock())  # type: ignore[arg-type]


class Clock:
    """A clock that is moved by hand, and timers that never fire."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, call: object, *args: object) -> "Clock":
        return self

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize(
    ("weights", "sequence"),
    [((5, 1, 1), "aabacaa" * 3), ((1, 1, 1), "abcabc"), ((1,), "aaa"), ((3, 2), "ababaababa"), ((1, 2), "babbab")],
)
def test_smooth_sequence(weights: tuple[int, ...], sequence: str) -> None:
    """The sequence is exactly that of smooth weighted round robin."""
    pool = seats(*weights)
    assert "".join(app.smooth_weighted(pool, True).upstream.name for _ in sequence) == sequence


def test_shares_with_any_subset_closed() -> None:
    """Whoever is closed, the others share by their weights, and nobody catches up when all are back."""
    weights = (5, 1, 1, 3)
    whole = sum(weights)
    for size in range(1, 5):
        for open_ in itertools.combinations(range(4), size):
            pool = seats(*weights)
            for chosen_from in (pool, [pool[at] for at in open_], pool):
                total = sum(one.upstream.weight for one in chosen_from)
                counts = Counter(app.smooth_weighted(chosen_from, True).upstream.name for _ in range(total * 10))
                assert counts == {one.upstream.name: one.upstream.weight * 10 for one in chosen_from}
            credit = [one.upstream.credit for one in pool]
            assert sum(credit) == 0 and max(map(abs, credit)) <= whole


def test_random_shares() -> None:
    """Chance, seeded, follows the weights."""
    chance, pool = random.Random(7).random, seats(5, 1, 2)
    counts = Counter(app.weighted_random(pool, True, chance).upstream.name for _ in range(8000))
    assert counts["a"] == pytest.approx(5000, rel=0.05)
    assert counts["b"] == pytest.approx(1000, rel=0.1)
    assert counts["c"] == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("chance", "name"), [(0.0, "a"), (0.49999, "a"), (0.5, "b"), (0.74999, "b"), (0.75, "c"), (0.9999999999999999, "c")]
)
def test_random_bounds(chance: float, name: str) -> None:
    """Each draw belongs to exactly one controller."""
    assert app.weighted_random(seats(2, 1, 1), True, lambda: chance).upstream.name == name


def test_least_busy_and_priority() -> None:
    """The least busy for its weight, the earlier of equals; or the first in the file."""
    pool = seats(1, 3)
    names = ""
    for _ in range(8):
        chosen = app.least_busy(pool, True).upstream
        chosen.in_flight += 1
        names += chosen.name
    assert names == "abbbabbb"
    assert app.first_listed(pool, True).upstream.name == "a"


def test_fastest_knows_answers_from_streams() -> None:
    """The one whose first byte came soonest, for each kind; who was never asked comes first."""
    pool = seats(1, 1)
    pool[0].upstream.heard(True, 0.2)
    assert app.fastest(pool, True) is pool[1]
    pool[1].upstream.heard(True, 0.1)
    pool[1].upstream.heard(False, 5.0)
    pool[0].upstream.heard(False, 1.0)
    assert app.fastest(pool, True) is pool[1]
    assert app.fastest(pool, False) is pool[0]


@pytest.mark.parametrize("kind", app.POOL_TYPES)
def test_every_pool_type_can_be_built(kind: str) -> None:
    """What the configuration allows can be run."""
    data = {"pool": {"type": kind}, "controllers": [{"type": "echo"}, {"type": "echo"}]}
    pool = pool_of([])
    app.rebuild_pool(pool, app.parse_config(data, "c.json", {}))
    assert pool.policy(pool.seats("m"), True) in pool.seats("m")


@pytest.mark.parametrize(
    ("models", "model", "expected"),
    [
        ((), "anything", True),
        (("gpt-4.1*",), "gpt-4.1", True),
        (("gpt-4.1*",), "gpt-4.1-mini", True),
        (("gpt-4.1*",), "gpt-4x1", False),
        (("gpt-?",), "gpt-5", True),
        (("gpt-?",), "gpt-55", False),
        (("a", "b"), "b", True),
        (("a", "b"), "ab", False),
        (("a",), "A", False),
        (("[ab]+",), "a", False),
    ],
)
def test_serves(models: tuple[str, ...], model: str, expected: bool) -> None:
    """`*` and `?` are the only wildcards, and names match whole."""
    assert upstream("a", models=models).serves(model) is expected


def test_names_of_the_model_map_are_served() -> None:
    """A mapped name need not be repeated in `models`."""
    assert upstream("a", models=("m",), model_map=(("fast", "m"),)).serves("fast")


def test_seats() -> None:
    """Only those that serve the model, in the order of the file; else a 404 that names what is served."""
    pool = pool_of([upstream("a", models=("x", "y*")), upstream("b", 1, ("x",))], "priority")
    assert [one.upstream.name for one in pool.seats("x")] == ["a", "b"]
    assert [one.upstream.name for one in pool.seats("yz")] == ["a"]
    for _ in range(2):
        with pytest.raises(app.ProxyError, match=r"'nope' .*Served: x, y\*\.") as caught:
            pool.seats("nope")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    with pytest.raises(app.ProxyError) as caught:
        pool.seats("n" * 100_000)
    assert len(caught.value.message) < 300
    assert pool.configured_models() == ["x"]


def test_memory_of_models_is_bounded() -> None:
    """Clients cannot fill the memory with names."""
    pool = pool_of(upstreams(1), "priority")
    for number in range(2 * app.MEMORY_MODELS):
        pool.seats("m%d" % number)
    assert len(pool.serving) <= app.MEMORY_MODELS
    assert len(pool.upstreams[0].seats) <= app.MEMORY_MODELS
    assert len(pool.upstreams[0].quota.ledgers) <= app.MEMORY_MODELS


def test_leases() -> None:
    """Each controller is tried once in a round, and a lease is given back once."""
    pool = pool_of(upstreams(1, 1))
    asked, tried = request(), set()
    leases = []
    for _ in range(2):
        lease = pool.lease(asked, pool.seats("m"), tried, 1000.0)
        assert lease is not None
        tried.add(lease.upstream)
        leases.append(lease)
    assert pool.lease(asked, pool.seats("m"), tried, 1000.0) is None
    assert [one.in_flight for one in pool.upstreams] == [1, 1]
    for lease in leases * 2:
        pool.settle(lease, app.Verdict(app.Outcome.FAULT))
    assert [(one.in_flight, one.requests, one.failures) for one in pool.upstreams] == [(0, 1, 1), (0, 1, 1)]
