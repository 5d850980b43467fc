"""A short run of the fuzzer with fixed seeds; `python3 tests/fuzz.py --seconds 600` runs long."""

import pytest

import chatgpt_apiserver as app

from . import fuzz

CASES = {  # about 0.3 s each
    "requests": 2000, "replies": 2000, "chunked": 2000, "forms": 5000, "events": 1500, "config": 1500,
    "live": 60, "forwarding": 150, "upstreams": 80,
}


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_mutated_input_is_a_value_or_the_documented_error(name: str) -> None:
    """Whatever the input, its outcome is one of those documented, soon, and the same wherever it is cut."""
    for problem in fuzz.run(name, 1, range(CASES[name])):
        pytest.fail(problem, pytrace=False)


def test_the_reference_decoder_knows_the_grammar() -> None:
    """The slow decoder accepts valid chunked bodies and nothing else."""
    for good in fuzz.BODIES:
        assert fuzz.reference_chunked(good + b"next") is not None
    for bad in (b"5\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"0\r\nX : 1\r\n\r\n", b"\r\n0\r\n\r\n"):
        assert fuzz.reference_chunked(bad) is None


def test_a_failure_is_reported_with_its_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The long run prints the failing input and the command that makes it again, and its exit code is 1."""
    monkeypatch.setattr(fuzz.Events, "check", lambda *_: 1 // 0)
    monkeypatch.setattr("logging.disable", lambda _: None)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--target", "events", "--seed", "5", "--case", "3"])
    assert fuzz.main() == 1
    printed = capsys.readouterr().out
    value = fuzz.Events().make(fuzz.chooser_of("events", 5, 3))
    assert "ZeroDivisionError" in printed and repr(value) in printed
    assert "replay: python3 tests/fuzz.py --target events --seed 5 --case 3" in printed


def test_a_secret_in_a_file_with_an_impossible_name() -> None:
    """A NUL in the path of a secret's file is an error of the configuration, found by the fuzzer (config, seed 1, 2948)."""
    data = {"controllers": [{"type": "openai", "config": {"api_key": "file:\0"}}]}
    with pytest.raises(app.ConfigError):
        app.parse_config(data, "fuzz", {})
