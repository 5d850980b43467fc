"""A short run of the fuzzer with fixed seeds; `python3 tests/fuzz.py --seconds 600` runs long."""

import pytest

import chatgpt_apiserver as app

from . import fuzz

CASES = {  # about 0.4 s each
    "requests": 3000,
    "replies": 3000,
    "chunked": 2500,
    "events": 2000,
    "config": 2000,
    "live": 100,
    "forwarding": 200,
    "upstreams": 100,
}


@pytest.mark.parametrize("name", list(fuzz.TARGETS))
def test_mutated_input_is_a_value_or_the_documented_error(name: str) -> None:
    """Whatever the input, its outcome is one of those documented, soon, and the same wherever it is cut."""
    for problem in fuzz.run(name, 1, range(CASES[name])):
        pytest.fail(problem, pytrace=False)


def test_a_case_can_be_replayed() -> None:
    """The same seed and number make the same input, in any order."""
    chunked = fuzz.Chunked()

    def inputs(numbers: list[int]) -> list[bytes]:
        return [chunked.make(fuzz.chooser_of("chunked", 7, number)) for number in numbers]

    assert inputs([1, 2, 3]) == inputs([3, 2, 1])[::-1] and len(set(inputs(list(range(50))))) > 25


def test_the_slow_decoder_knows_the_grammar() -> None:
    """The reference that the chunked decoder is held against takes what is right and nothing else."""
    for good in fuzz.BODIES:
        assert fuzz.reference_chunked(good + b"next") is not None
    for bad in (b"5\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n", b"0\r\nX : 1\r\n\r\n", b"\r\n0\r\n\r\n"):
        assert fuzz.reference_chunked(bad) is None


def test_what_goes_wrong_is_reported_with_its_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The long run prints the failing input as a repr and the command that makes it again, and its exit code is 1."""
    monkeypatch.setattr(fuzz.Events, "check", lambda *_: 1 // 0)
    monkeypatch.setattr("logging.disable", lambda _: None)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--target", "events", "--seed", "5", "--case", "3"])
    assert fuzz.main() == 1
    found = capsys.readouterr().out
    value = fuzz.Events().make(fuzz.chooser_of("events", 5, 3))
    assert "ZeroDivisionError" in found and repr(value) in found
    assert "replay: python3 tests/fuzz.py --target events --seed 5 --case 3" in found


def test_a_name_that_no_file_can_have_is_refused_in_words() -> None:
    """A NUL in the path of a secret's file is an error of the configuration, found by the fuzzer (config, seed 1, 2948)."""
    data = {"controllers": [{"type": "openai", "config": {"api_key": "file:\0"}}]}
    with pytest.raises(app.ConfigError):
        app.parse_config(data, "fuzz", {})
