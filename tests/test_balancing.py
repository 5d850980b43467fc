"""Who gets a request, what a reply means, and when another attempt is safe."""

import itertools
import random
from collections import Counter

import pytest

import chatgpt_apiserver as app


def upstream(
    name: str, weight: int = 1, position: int = 0, models: tuple[str, ...] = (), **more: object
) -> app.Upstream:
    """An echo controller with its state."""
    config = app.ControllerConfig("echo", name, app.AccountConfig(), weight, models, **more)  # type: ignore[arg-type]
    return app.Upstream(config, app.EchoController(config), position)


def upstreams(*weights: int) -> list[app.Upstream]:
    """Controllers a, b, c ... with these weights."""
    return [upstream("abcdefgh"[at], weight, at) for at, weight in enumerate(weights)]


def request(stream: bool = True, stateful: bool = False) -> app.ApiRequest:
    """A request of that kind."""
    made = app.ApiRequest("POST", "/v1/chat/completions", "", [], b"")
    made.stream, made.stateful = stream, stateful
    return made


@pytest.mark.parametrize(
    ("weights", "sequence"),
    [((5, 1, 1), "aabacaa" * 3), ((1, 1, 1), "abcabc"), ((1,), "aaa"), ((3, 2), "ababaababa"), ((1, 2), "babbab")],
)
def test_smooth_sequence(weights: tuple[int, ...], sequence: str) -> None:
    """The sequence is exactly that of smooth weighted round robin."""
    policy, pool = app.SmoothWeighted(), upstreams(*weights)
    assert "".join(policy.choose(pool, True).name for _ in sequence) == sequence


def test_shares_with_any_subset_closed() -> None:
    """Whoever is closed, the others share by their weights, and nobody catches up when all are back."""
    weights = (5, 1, 1, 3)
    pool, whole = upstreams(*weights), sum(weights)
    subsets = [list(open_) for size in range(1, 5) for open_ in itertools.combinations(pool, size)]
    for subset in subsets:
        policy = app.SmoothWeighted()
        for chosen_from in (pool, subset, pool):
            total = sum(one.weight for one in chosen_from)
            counts = Counter(policy.choose(chosen_from, True).name for _ in range(total * 10))
            assert counts == {one.name: one.weight * 10 for one in chosen_from}
        assert sum(policy.credit.values()) == 0
        assert max(map(abs, policy.credit.values())) <= whole


def test_random_shares() -> None:
    """Chance, seeded, follows the weights."""
    policy, pool = app.WeightedRandom(random.Random(7).random), upstreams(5, 1, 2)
    counts = Counter(policy.choose(pool, True).name for _ in range(8000))
    assert counts["a"] == pytest.approx(5000, rel=0.05)
    assert counts["b"] == pytest.approx(1000, rel=0.1)
    assert counts["c"] == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("chance", "name"), [(0.0, "a"), (0.49999, "a"), (0.5, "b"), (0.74999, "b"), (0.75, "c"), (0.9999999999999999, "c")]
)
def test_random_bounds(chance: float, name: str) -> None:
    """Each draw belongs to exactly one controller."""
    assert app.WeightedRandom(lambda: chance).choose(upstreams(2, 1, 1), True).name == name


def test_least_busy_and_priority() -> None:
    """The least busy for its weight, the earlier of equals; or the first in the file."""
    pool = upstreams(1, 3)
    names = ""
    for _ in range(8):
        chosen = app.LeastBusy().choose(pool, True)
        chosen.in_flight += 1
        names += chosen.name
    assert names == "abbbabbb"
    assert app.Priority().choose(pool, True).name == "a"


@pytest.mark.parametrize("kind", app.POOL_TYPES)
def test_every_pool_type_can_be_built(kind: str) -> None:
    """What the configuration allows can be run."""
    data = {"pool": {"type": kind}, "controllers": [{"type": "echo"}, {"type": "echo"}]}
    pool = app.build_pool(app.parse_config(data, "c.json", {}))
    assert pool.policy.choose(pool.upstreams, True) in pool.upstreams


def error(code: str = "", message: str = "", kind: str = "") -> bytes:
    """An error body."""
    return app.compact_json({"error": {"message": message, "type": kind, "code": code or None, "param": None}})


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b"", "ok"),
        (204, b"", "ok"),
        (301, b"", "fault"),
        (400, error("model_not_found"), "client"),
        (401, error("invalid_api_key"), "auth"),
        (402, b"", "quota"),
        (403, error(), "forbidden"),
        (403, error("model_not_found", "x"), "missing"),
        (403, error("", "Project has no access to model x"), "missing"),
        (404, error("model_not_found"), "missing"),
        (404, error("DeploymentNotFound"), "missing"),
        (404, error("", "No such file"), "client"),
        (404, b"<html>", "client"),
        (405, b"", "client"),
        (408, b"", "fault"),
        (409, b"", "fault"),
        (413, b"", "client"),
        (415, b"", "client"),
        (422, b"", "client"),
        (424, b"", "fault"),
        (429, b"", "rate"),
        (429, b"\xff not json", "rate"),
        (429, b"[" * 100_000, "rate"),
        (429, error("rate_limit_exceeded", kind="requests"), "rate"),
        (429, error("insufficient_quota"), "quota"),
        (429, error("", kind="insufficient_quota"), "quota"),
        (429, error("other", kind="insufficient_quota"), "quota"),
        (429, error("billing_hard_limit_reached"), "quota"),
        (429, error("", kind="exceeded_current_quota_error"), "quota"),
        (429, b'[{"error":{"code":429,"message":"Resource exhausted"}}]', "rate"),
        (429, b'{"error":"slow down"}', "rate"),
        (498, b"", "rate"),
        (500, b"", "fault"),
        (502, b"<html>", "fault"),
        (503, b"", "fault"),
        (529, b"", "fault"),
    ],
    ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else None,
)
def test_judge_reply(status: int, body: bytes, outcome: str) -> None:
    """A status and an error body have one meaning."""
    assert app.judge_reply(status, body) is app.Outcome(outcome)


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (app.ConnectFailed("x"), "connect"),
        (app.UpstreamTimeout("x", early=True), "silent"),
        (app.UpstreamTimeout("x"), "fault"),
        (app.UpstreamClosed("x", early=True), "fault"),
        (app.UpstreamClosed("x"), "fault"),
        (app.BadReply("x"), "fault"),
    ],
)
def test_judge_error(failure: app.UpstreamError, outcome: str) -> None:
    """An attempt without an answer has one meaning."""
    assert app.judge_error(failure) is app.Outcome(outcome)


STATEFUL_RETRIES = {"connect", "auth", "rate", "quota"}


@pytest.mark.parametrize("outcome", list(app.Outcome))
def test_may_retry(outcome: app.Outcome) -> None:
    """Answers never move on, stateful requests only when they did not run, silent whole answers never."""
    final = outcome.value in {"ok", "client"}
    assert app.may_retry(outcome, request(stream=True)) is not final
    assert app.may_retry(outcome, request(stream=False)) is not (final or outcome.value == "silent")
    for stream in (True, False):
        assert app.may_retry(outcome, request(stream, stateful=True)) is (outcome.value in STATEFUL_RETRIES)


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


def test_candidates() -> None:
    """Only those that serve the model, in the order of the file; else a 404 that names what is served."""
    pool = app.UpstreamPool([upstream("a", models=("x", "y*")), upstream("b", 1, 1, ("x",))], app.Priority())
    assert [one.name for one in pool.candidates("x")] == ["a", "b"]
    assert [one.name for one in pool.candidates("yz")] == ["a"]
    for _ in range(2):
        with pytest.raises(app.ProxyError, match=r"'nope' .*Served: x, y\*\.") as caught:
            pool.candidates("nope")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    with pytest.raises(app.ProxyError) as caught:
        pool.candidates("n" * 100_000)
    assert len(caught.value.message) < 300
    assert pool.configured_models() == ["x"]


def test_memory_of_models_is_bounded() -> None:
    """Clients cannot fill the memory with names."""
    pool = app.UpstreamPool(upstreams(1), app.Priority())
    for number in range(2 * app.MEMORY_MODELS):
        pool.candidates("m%d" % number)
    assert len(pool.serving) <= app.MEMORY_MODELS


def test_leases() -> None:
    """Each controller is tried once, and a lease is given back once."""
    pool = app.UpstreamPool(upstreams(1, 1), app.SmoothWeighted())
    tried: set[app.Upstream] = set()
    leases = []
    for _ in range(2):
        lease = pool.lease(pool.candidates("m"), tried, True, 1.0)
        assert lease is not None
        tried.add(lease.upstream)
        leases.append(lease)
    assert pool.lease(pool.candidates("m"), tried, True, 1.0) is None
    assert [one.in_flight for one in pool.upstreams] == [1, 1]
    for lease in leases * 2:
        lease.release(app.Outcome.FAULT)
    assert [(one.in_flight, one.requests, one.failures) for one in pool.upstreams] == [(0, 1, 1), (0, 1, 1)]
