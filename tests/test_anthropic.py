"""Anthropic's Messages API both ways: golden files, and what has no translation.

`golden/anthropic/requests`: what a client asked and what is sent; `replies`: what came and what is given;
`streams`: NAME.sse came, NAME.out is given (with usage where the name ends in .usage).
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chatgpt_apiserver as app

GOLDEN = Path(__file__).parent / "golden" / "anthropic"
CREATED = 1_700_000_000
STREAMS = sorted((GOLDEN / "streams").glob("*.sse"))
CUT, FAILED = {"cut"}, {"error", "error-first", "broken", "no-start"}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def cases(folder: str) -> "list[Any]":
    """The golden files of one folder."""
    paths = sorted((GOLDEN / folder).glob("*.json"))
    return [pytest.param(json.loads(path.read_text(encoding="utf-8")), id=path.stem) for path in paths]


def stream(path: Path) -> app.MessageStream:
    """A fresh translation of one golden stream."""
    return app.MessageStream(CREATED, include_usage=path.stem.endswith(".usage"))


def fed(translation: app.MessageStream, *pieces: bytes) -> bytes:
    """What a translation gives for an upstream's bytes that arrive in these pieces."""
    splitter = app.EventSplitter()
    events = (event for piece in pieces for event in splitter.feed(piece))
    return b"".join(translation.feed(*app.event_fields(event)) for event in events)


def chunks(given: bytes) -> "Iterator[dict[str, Any]]":
    """The JSON of each event but [DONE]."""
    for event in app.EventSplitter().feed(given):
        _, data = app.event_fields(event)
        if data != b"[DONE]":
            yield json.loads(data)


def asked_for(**more: Any) -> dict[str, Any]:
    """A chat request with these fields."""
    return dict(ASKED, **more)


@pytest.mark.parametrize("case", cases("requests"))
def test_requests(case: dict[str, Any]) -> None:
    """Each request is sent as its golden file says, and the client's own is left as it was."""
    before = json.dumps(case["asked"])
    assert app.to_messages(case["asked"], frozenset(case.get("drop", ())), **case.get("options", {})) == case["sent"]
    assert json.dumps(case["asked"]) == before


def test_what_the_openai_package_adds_to_an_answer_comes_back_with_it() -> None:
    """Messages of its `parse` and `stream` have `parsed` and `parsed_arguments`; they mean nothing in a history."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}}
    history = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "parsed": {"a": 1}, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    sent = app.to_messages(asked_for(messages=history, tools=[TOOL]), frozenset())
    assert "parsed" not in json.dumps(sent) and len(sent["messages"]) == 3


@pytest.mark.parametrize("case", cases("requests"))
def test_requests_keep_the_apis_rules(case: dict[str, Any]) -> None:
    """Whatever is sent has only fields that the API knows, in the form that it demands."""
    sent = app.to_messages(case["asked"], frozenset(case.get("drop", ())), **case.get("options", {}))
    known = "model max_tokens messages system tools tool_choice temperature top_p top_k stop_sequences stream metadata"
    assert set(sent) <= set((known + " thinking output_config cache_control").split())
    assert isinstance(sent["max_tokens"], int) and sent["max_tokens"] >= 1
    assert 0 <= sent.get("temperature", 1) <= 1
    assert all(text.strip() for text in sent.get("stop_sequences", ()))
    roles = [turn["role"] for turn in sent["messages"]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    assert all(block["type"] == "text" and block["text"].strip() for block in sent.get("system", ()))
    for turn in sent["messages"]:
        check_turn(turn)
    last = sent["messages"][-1]
    assert last["role"] == "user" or last["content"][-1].get("text", "") == last["content"][-1].get("text", "").rstrip()
    check_tools(sent)
    thinking = sent.get("thinking", {})
    assert thinking.get("type") != "enabled" or 1024 <= thinking["budget_tokens"] < sent["max_tokens"]


def check_turn(turn: dict[str, Any]) -> None:
    """A turn has content; results and thinking come before all else in it, calls after all else; no text is blank."""
    kinds = [block["type"] for block in turn["content"]]
    first = {"thinking", "redacted_thinking"} if turn["role"] == "assistant" else {"tool_result"}
    assert kinds and set(kinds) <= {"text", "image", "document", "tool_use", *first}
    assert kinds == sorted(kinds, key=lambda kind: (kind not in first, kind == "tool_use"))
    assert ("tool_use" not in kinds or turn["role"] == "assistant") and (
        "tool_result" not in kinds or turn["role"] == "user"
    )
    assert all(block["text"].strip() for block in turn["content"] if block["type"] == "text")
    assert all(isinstance(block["input"], dict) for block in turn["content"] if block["type"] == "tool_use")


def check_tools(sent: dict[str, Any]) -> None:
    """Tools take objects; a choice needs tools; calls need definitions, and each its result in the next turn."""
    tools = sent.get("tools", [])
    assert all(tool["name"] and tool["input_schema"]["type"] == "object" for tool in tools)
    assert tools or "tool_choice" not in sent
    for turn, after in zip(sent["messages"], [*sent["messages"][1:], None], strict=True):
        used = [block for block in turn["content"] if block["type"] == "tool_use"]
        assert {block["name"] for block in used} <= {tool["name"] for tool in tools}
        results = [
            block["tool_use_id"] for block in (after or {"content": []})["content"] if block["type"] == "tool_result"
        ]
        assert [block["id"] for block in used] == results


USER = [{"role": "user", "content": "x"}]


def content(*parts: Any) -> dict[str, Any]:
    """A request whose user message has these parts."""
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


def called(**call: Any) -> dict[str, Any]:
    """A request whose history has this call."""
    return {"model": "m", "messages": [*USER, {"role": "assistant", "tool_calls": [dict({"id": "c"}, **call)]}]}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (asked_for(n=2), "n"),
        (asked_for(seed=1), "seed"),
        (asked_for(logprobs=True), "logprobs"),
        (asked_for(logit_bias={"50256": -100}), "logit_bias"),
        (asked_for(frequency_penalty=0.5), "frequency_penalty"),
        (asked_for(store=True), "store"),
        (asked_for(metadata={"a": "b"}), "metadata"),
        (asked_for(modalities=["text", "audio"]), "modalities"),
        (asked_for(service_tier="flex"), "service_tier"),
        (asked_for(verbosity="low"), "verbosity"),
        (asked_for(prediction={"type": "content", "content": "x"}), "prediction"),
        (asked_for(functions=[{"name": "f"}]), "functions"),
        (asked_for(web_search_options={}), "web_search_options"),
        (asked_for(brand_new=1), "brand_new"),
        (asked_for(temperature=2.1), "temperature"),
        (asked_for(temperature="hot"), "temperature"),
        (asked_for(max_tokens=0), "max_tokens"),
        (asked_for(max_completion_tokens=True), "max_completion_tokens"),
        (asked_for(stop=["\n"]), "stop"),
        (asked_for(stop={"a": 1}), "stop"),
        (asked_for(reasoning_effort="extreme"), "reasoning_effort"),
        (asked_for(response_format={"type": "grammar"}), "response_format.type"),
        (asked_for(response_format="json"), "response_format"),
        (asked_for(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (
            asked_for(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
            "response_format.json_schema.schema",
        ),
        (asked_for(tools={}), "tools"),
        (asked_for(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].custom"),
        (asked_for(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
        (asked_for(tool_choice="required"), "tool_choice"),
        (asked_for(tools=[TOOL], tool_choice="sometimes"), "tool_choice"),
        (asked_for(tools=[TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": {}}), "tool_choice.type"),
        (asked_for(tools=[TOOL], tool_choice={"type": "function"}), "tool_choice.function"),
        (asked_for(messages=[]), "messages"),
        (asked_for(messages="x"), "messages"),
        (asked_for(messages=["x"]), "messages[0]"),
        (asked_for(messages=[{"role": "system", "content": "x"}]), "messages"),
        (asked_for(messages=[{"role": "function", "name": "f", "content": "x"}]), "messages[0].role"),
        (asked_for(messages=[{"role": "user", "content": "x", "name": "bob"}]), "messages[0].name"),
        (asked_for(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (asked_for(messages=[*USER, {"role": "assistant", "audio": {"id": "a"}}]), "messages[1].audio"),
        (asked_for(messages=[*USER, {"role": "tool", "content": "x"}]), "messages[1].tool_call_id"),
        (
            {
                "model": "m",
                "messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}],
            },
            "messages[0].content[0].type",
        ),
        (content("x"), "messages[0].content[0]"),
        (content({"type": "text"}), "messages[0].content[0].text"),
        (content({"type": "text", "text": "a", "shiny": 1}), "messages[0].content[0].shiny"),
        (content({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), "messages[0].content[0].type"),
        (content({"type": ["text"]}), "messages[0].content[0].type"),
        (content({"type": "image_url", "image_url": "https://x"}), "messages[0].content[0].image_url"),
        (content({"type": "image_url", "image_url": {"url": "file:///x.png"}}), "messages[0].content[0].image_url.url"),
        (
            content({"type": "image_url", "image_url": {"url": "data:image/bmp;base64,AA=="}}),
            "messages[0].content[0].image_url.url",
        ),
        (
            content({"type": "image_url", "image_url": {"url": "https://x", "detail": "low"}}),
            "messages[0].content[0].image_url.detail",
        ),
        (content({"type": "file", "file": {"file_id": "file-1"}}), "messages[0].content[0].file.file_id"),
        (
            content({"type": "file", "file": {"file_data": "data:text/csv;base64,AA=="}}),
            "messages[0].content[0].file.file_data",
        ),
        (
            asked_for(messages=[*USER, {"role": "assistant", "thinking_blocks": [{"type": "thinking", "thinking": "x"}]}]),
            "messages[1].thinking_blocks[0]",
        ),
        (called(type="custom", custom={"name": "f", "input": ""}), "messages[1].tool_calls[0].custom"),
        (called(function={"name": "f", "arguments": "{"}), "messages[1].tool_calls[0].function.arguments"),
        (called(function={"name": "f", "arguments": "[]"}), "messages[1].tool_calls[0].function.arguments"),
        (called(function={"name": "f", "arguments": {}, "x": 1}), "messages[1].tool_calls[0].function.x"),
    ],
)
def test_what_cannot_be_said_is_named(asked: dict[str, Any], field: str) -> None:
    """What the API has no word for is an error that names the field; nothing is dropped in silence."""
    with pytest.raises(app.Untranslatable) as caught:
        app.to_messages(asked, frozenset())
    assert caught.value.field == field and str(caught.value).startswith(field + " ") and caught.value.why


def test_a_long_name_is_cut() -> None:
    """A field's name may be as long as a body; what is told of it is not."""
    with pytest.raises(app.Untranslatable) as caught:
        app.to_messages(asked_for(**{"x" * 100_000: 1}), frozenset())
    assert len(str(caught.value)) < 200 and caught.value.field == "x" * 100


ODD = (None, 0, True, "", "x", [], {}, [None], [{}], {"type": ["x"]}, {"type": "function"}, {"": 1}, 1.5, "none")


def spots(value: Any) -> "Iterator[tuple[Any, Any]]":
    """Every place inside a JSON value: what holds it, and the key or number there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


def spoiled(value: Any, chance: random.Random) -> Any:
    """A copy with odd values in one to three places."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(spots(value)) or [({}, "")])
        if isinstance(holder, dict) and chance.random() < 0.3:
            holder[chance.choice(("", "x", "type", "role", "name"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def test_spoiled_requests_are_told() -> None:
    """Whatever stands in whatever place of a request: a translation or an error that names the field, nothing else."""
    chance = random.Random(8)
    for case in [one.values[0] for one in cases("requests")] * 60:
        try:
            json.dumps(app.to_messages(spoiled(case["asked"], chance), frozenset(), **case.get("options", {})))
        except app.Untranslatable as told:
            assert told.why and told.status == 400


def test_spoiled_answers_are_told() -> None:
    """An answer of any shape is one or is none; a stream of any events ends in at most one error."""
    chance = random.Random(9)
    for case in [one.values[0] for one in cases("replies")] * 100:
        try:
            app.from_message(spoiled(case["came"], chance), CREATED)
        except ValueError as told:
            assert "no message" in str(told)
    for path in [one for one in STREAMS if one.stem != "broken"] * 20:
        translation = stream(path)
        for line in path.read_bytes().splitlines():
            if line.startswith(b"data: {"):
                event = spoiled(json.loads(line[6:]), chance) if chance.random() < 0.3 else json.loads(line[6:])
                translation.feed(b"", json.dumps(event).encode())
        assert not (translation.done and translation.failed)


def test_a_thinking_budget_needs_room() -> None:
    """A limit below the smallest budget is an error where thinking has one."""
    with pytest.raises(app.Untranslatable, match="reasoning_effort"):
        app.to_messages(asked_for(reasoning_effort="low", max_tokens=1024), frozenset(), thinking="budget")


@pytest.mark.parametrize("case", cases("replies"))
def test_replies(case: dict[str, Any]) -> None:
    """Each whole answer is given as its golden file says."""
    assert app.from_message(case["came"], CREATED) == case["given"]


@pytest.mark.parametrize("came", [{}, {"type": "error"}, {"content": "text"}, {"content": ["text"]}])
def test_what_is_no_message(came: dict[str, Any]) -> None:
    """An answer without content blocks is an error, never an empty answer."""
    with pytest.raises(ValueError, match="no message"):
        app.from_message(came, CREATED)


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_streams(path: Path) -> None:
    """Each stream is given as its golden file says, and its end is known: whole, failed or cut."""
    translation = stream(path)
    assert fed(translation, path.read_bytes()) == path.with_suffix(".out").read_bytes()
    assert translation.failed == (path.stem in FAILED)
    assert translation.done == (path.stem not in FAILED | CUT)


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_streams_at_every_cut(path: Path) -> None:
    """Where the upstream's bytes are cut makes no difference."""
    came, given = path.read_bytes(), path.with_suffix(".out").read_bytes()
    for cut in range(1, len(came)):
        assert fed(stream(path), came[:cut], came[cut:]) == given
    assert fed(stream(path), *(came[at : at + 1] for at in range(len(came)))) == given


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_streams_keep_the_chat_apis_rules(path: Path) -> None:
    """One id, created and model; the role first and once; one finish_reason, last; usage null until it is told."""
    given = path.with_suffix(".out").read_bytes()
    found = [chunk for chunk in chunks(given) if "error" not in chunk]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) <= 1
    choices = [chunk["choices"][0] for chunk in found if chunk["choices"]]
    assert [bool(choice["delta"].get("role")) for choice in choices] == [True] * bool(choices) + [False] * (
        len(choices) - 1
    )
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert given.endswith(b"data: [DONE]\n\n") == (path.stem not in FAILED | CUT)
    if path.stem.endswith(".usage"):
        assert all(chunk["usage"] is None for chunk in found[:-1]) and found[-1]["choices"] == [] and found[-1]["usage"]
    else:
        assert not any("usage" in chunk for chunk in found)


def test_a_stream_says_what_the_whole_answer_says() -> None:
    """The tools of a stream, put together by index, are those of the same answer told whole."""
    path = GOLDEN / "streams" / "tools.sse"
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks(fed(stream(path), path.read_bytes())):
        for piece in chunk["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"id": piece.get("id", ""), "name": "", "arguments": ""})
            call["name"] += piece["function"].get("name", "")
            call["arguments"] += piece["function"]["arguments"]
    assert calls == {
        0: {"id": "toolu_1", "name": "get_weather", "arguments": '{"location": "Paris"}'},
        1: {"id": "toolu_2", "name": "now", "arguments": "{}"},
    }


def test_signed_thinking_comes_back_as_it_was() -> None:
    """What a stream gives of the thinking that led to its calls is, sent back, what the upstream had signed."""
    path = GOLDEN / "streams" / "thinking-tools.sse"
    given = [chunk["choices"][0]["delta"] for chunk in chunks(fed(stream(path), path.read_bytes()))]
    blocks = [block for delta in given for block in delta.get("thinking_blocks", ())]
    answer = {"role": "assistant", "content": "So.", "thinking_blocks": blocks}
    sent = app.to_messages(asked_for(messages=[*USER, answer, *USER]), frozenset())["messages"][1]["content"]
    assert sent == [
        {"type": "thinking", "thinking": "A city.", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "ZW5j"},
        {"type": "thinking", "thinking": "And when?", "signature": "c2lnMg"},
        {"type": "text", "text": "So."},
    ]


def limits(**told: "tuple[int | str, int | str]") -> dict[bytes, bytes]:
    """Anthropic's fields for these limits: how much, and what is left of it."""
    found = {}
    for name, values in told.items():
        for end, value in zip(("limit", "remaining"), values, strict=True):
            found[f"anthropic-ratelimit-{name.replace('_', '-')}-{end}".encode()] = str(value).encode()
        found[f"anthropic-ratelimit-{name.replace('_', '-')}-reset".encode()] = name.encode()
    return found


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, None),
        ({"requests": (50, 0)}, None),
        ({"tokens": (96_000, 48_000)}, (96_000, 48_000, "tokens")),
        ({"input_tokens": (80_000, 20_000)}, (80_000, 20_000, "input_tokens")),
        (
            {"tokens": (96_000, 90_000), "input_tokens": (80_000, 78_000), "output_tokens": (16_000, 12_000)},
            (96_000, 72_000, "output_tokens"),
        ),
        ({"input_tokens": (80_000, 8_000), "output_tokens": (16_000, 12_000)}, (96_000, 9_600, "input_tokens")),
        (
            {"tokens": (50_000, 0), "input_tokens": (80_000, 78_000), "output_tokens": (16_000, 12_000)},
            (50_000, 0, "tokens"),
        ),
        ({"tokens": (0, 0), "input_tokens": (-1, 5), "output_tokens": ("9" * 5000, 1)}, None),
    ],
)
def test_the_tightest_of_the_token_limits(
    told: "dict[str, tuple[int, int]]", expected: "tuple[int, int, str] | None"
) -> None:
    """The ledger's one bucket has the size of all tokens and is as empty as the emptiest of the limits."""
    found = app.tightest_tokens(limits(**told))
    names = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
    assert found == ({} if expected is None else dict(zip(names, (str(one).encode() for one in expected), strict=True)))


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"1",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"type":"message_start"}',
        b'{"type":"content_block_delta","delta":[]}',
        b'{"type":["x"]}',
    ],
)
def test_odd_events_never_raise(data: bytes) -> None:
    """An event of no known shape ends the stream with one error event."""
    translation = app.MessageStream(CREATED)
    assert translation.feed(b"", data).startswith(b'data: {"error":{"message":') and translation.failed
    assert translation.feed(b"ping", b'{"type":"ping"}') == b""


def test_one_answer_keeps_one_id() -> None:
    """A second message_start, as of a model that takes over, changes nothing but the count."""
    translation = app.MessageStream(CREATED)
    for name in ("a", "b"):
        event = {"type": "message_start", "message": {"id": name, "model": name, "usage": {"input_tokens": 5}}}
        translation.feed(b"message_start", json.dumps(event).encode())
    given = translation.feed(b"", b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}')
    assert next(chunks(given))["id"] == "a" and app.messages_usage(translation.usage)["prompt_tokens"] == 5


def test_the_event_line_serves_where_the_data_has_no_type() -> None:
    """Some gateways name an event only in its `event:` line."""
    translation = app.MessageStream(CREATED)
    translation.feed(b"message_start", b'{"message":{"id":"a","model":"b"}}')
    assert b'"content":"Hi"' in translation.feed(b"content_block_delta", b'{"index":0,"delta":{"text":"Hi"}}')


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (
            400,
            {"type": "error", "error": {"type": "invalid_request_error", "message": "max_tokens: 9 > 8"}},
            ("invalid_request_error", None),
        ),
        (
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "prompt is too long: 208310 tokens > 200000 maximum",
                }
            },
            ("invalid_request_error", "context_length_exceeded"),
        ),
        (
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "input length and `max_tokens` exceed context limit: 9 + 9 > 9",
                }
            },
            ("invalid_request_error", "context_length_exceeded"),
        ),
        (
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "Your credit balance is too low to access the Anthropic API.",
                }
            },
            ("insufficient_quota", "insufficient_quota"),
        ),
        (
            401,
            {"error": {"type": "authentication_error", "message": "invalid x-api-key"}},
            ("invalid_request_error", "invalid_api_key"),
        ),
        (402, {"error": {"type": "billing_error", "message": "m"}}, ("insufficient_quota", "insufficient_quota")),
        (403, {"error": {"type": "permission_error", "message": "m"}}, ("invalid_request_error", "permission_error")),
        (
            404,
            {"error": {"type": "not_found_error", "message": "model: claude-9"}},
            ("invalid_request_error", "model_not_found"),
        ),
        (413, {"error": {"type": "request_too_large", "message": "m"}}, ("invalid_request_error", "request_too_large")),
        (429, {"error": {"type": "rate_limit_error", "message": "m"}}, ("rate_limit_error", "rate_limit_exceeded")),
        (
            429,
            {"error": {"type": "rate_limit_error", "message": "enforced_spend_limit_reached"}},
            ("insufficient_quota", "insufficient_quota"),
        ),
        (500, {"error": {"type": "api_error", "message": "m"}}, ("server_error", "api_error")),
        (529, {"error": {"type": "overloaded_error", "message": "Overloaded"}}, ("server_error", "overloaded_error")),
        (418, {"error": {"type": "teapot_error", "message": "m"}}, ("invalid_request_error", "teapot_error")),
        (500, {"error": "flat"}, ("server_error", None)),
        (403, {"message": "Forbidden"}, ("invalid_request_error", None)),
        (422, {"detail": "bad"}, ("invalid_request_error", None)),
        (429, [{"error": {"code": 429, "message": "m"}}], ("rate_limit_error", "429")),
    ],
)
def test_errors(status: int, body: Any, error: tuple[str, str | None]) -> None:
    """An error in any shape becomes OpenAI's object with all four keys, its message kept."""
    given, text = app.error_from_messages(status, json.dumps(body).encode())
    found = json.loads(text)["error"]
    assert given == (429 if error[1] == "insufficient_quota" else {529: 503}.get(status, status))
    assert list(found) == ["message", "type", "param", "code"]
    assert (found["type"], found["code"]) == error and found["message"] in json.dumps(body)


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad gateway</html>", b"\xff", b"null", b"[]", b'{"error":{}}', b"[" * 100_000]
)
def test_errors_that_say_nothing(body: bytes) -> None:
    """A body without a message still makes an error that tells the status."""
    status, text = app.error_from_messages(502, body)
    assert status == 502 and json.loads(text) == {
        "error": {
            "message": "The upstream answered with status 502.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    }
