"""Translation to and from Anthropic's Messages API: golden files, and what has no equivalent.

`golden/anthropic/requests`: a chat request and the Messages request for it; `replies`: an answer and the
chat.completion for it; `streams`: NAME.sse becomes NAME.out (with usage if the name ends in .usage); `refused.txt`: what
no request may hold.
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
USER = [{"role": "user", "content": "x"}]


def cases(folder: str) -> list[Any]:
    """Return the golden files of one folder as parameters that are named by their files."""
    paths = sorted((GOLDEN / folder).glob("*.json"))
    return [pytest.param(json.loads(path.read_text(encoding="utf-8")), id=path.stem) for path in paths]


def sent_for(asked: dict[str, Any], *drop: str, **options: Any) -> dict[str, Any]:
    """Return what an account with these options gets for a chat request."""
    return app.to_messages(asked, frozenset(drop), **{"max_tokens": 4096, "thinking": "effort", **options})


def stream(path: Path) -> app.MessageStream:
    """Return a fresh translation of one golden stream."""
    return app.MessageStream(CREATED, include_usage=path.stem.endswith(".usage"))


def translated(translation: app.MessageStream, *pieces: bytes) -> bytes:
    """Return the translation of an upstream's bytes that arrive in these pieces."""
    splitter = app.EventSplitter()
    events = (event for piece in pieces for event in splitter.feed(piece))
    return b"".join(translation.feed(*app.event_fields(event)) for event in events)


def chunks(given: bytes) -> list[dict[str, Any]]:
    """Return the JSON of each event but [DONE]."""
    data = [app.event_fields(event)[1] for event in app.EventSplitter().feed(given)]
    return [json.loads(text) for text in data if text != b"[DONE]"]


@pytest.mark.parametrize("case", cases("requests"))
def test_requests(case: dict[str, Any]) -> None:
    """Each request is translated as its golden file says, by the API's rules, and the client's own is unchanged."""
    before = json.dumps(case["asked"])
    sent = sent_for(case["asked"], *case.get("drop", ()), **case.get("options", {}))
    assert sent == case["sent"] and json.dumps(case["asked"]) == before
    known = "model max_tokens messages system tools tool_choice temperature top_p top_k stop_sequences stream metadata"
    assert set(sent) <= set((known + " thinking output_config cache_control").split())
    every = [turn["role"] for turn in sent["messages"]]
    # A system message follows a user's, and no user's follows it.
    assert {before for before, role in zip(["", *every], every, strict=False) if role == "system"} <= {"user"}
    roles = [role for role in every if role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
    blocks = [block for turn in sent["messages"] for block in turn["content"]] + sent.get("system", [])
    assert all(block["text"].strip() for block in blocks if block["type"] == "text")
    last = sent["messages"][-1]["content"][-1]
    assert every[-1] != "assistant" or last.get("text", "") == last.get("text", "").rstrip()
    defined = {tool["name"] for tool in sent.get("tools", ())}
    assert {block["name"] for block in blocks if block["type"] == "tool_use"} <= defined
    assert defined or "tool_choice" not in sent
    calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert sorted(calls) == sorted({block["tool_use_id"] for block in blocks if block["type"] == "tool_result"})


REFUSED = [line.split(" ", 1) for line in (GOLDEN / "refused.txt").read_text(encoding="utf-8").splitlines()[1:]]


# A name in a message is bounded.
@pytest.mark.parametrize(("field", "asked"), [*REFUSED, ("x" * 100, '{"%s": 1}' % ("x" * 100_000))], ids=lambda text: text[:40])
def test_a_field_without_an_equivalent_is_named(field: str, asked: str) -> None:
    """A field or value that the API lacks is an error with its path; nothing is dropped silently."""
    with pytest.raises(app.Untranslatable) as caught:
        sent_for({"model": "m", "messages": USER, **json.loads(asked)})
    assert caught.value.field == field and str(caught.value).startswith(field + " ")
    assert caught.value.why and len(str(caught.value)) < 250


def test_a_thinking_budget_needs_room() -> None:
    """A limit below the smallest budget is an error where thinking has one."""
    with pytest.raises(app.Untranslatable, match="reasoning_effort"):
        sent_for({"model": "m", "messages": USER, "reasoning_effort": "low", "max_tokens": 1024}, thinking="budget")


ODD = (None, 0, True, "", "x", [], {}, [None], [{}], {"type": ["x"]}, {"type": "function"}, {"": 1}, 1.5, "none")


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place inside a JSON value: its container, and its key or index."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from spots(value[key])


def spoiled(value: Any, chance: random.Random) -> Any:
    """Return a copy with odd values in one to three places."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(list(spots(value)) or [({}, "")])
        if isinstance(holder, dict) and chance.random() < 0.3:
            holder[chance.choice(("", "x", "type", "role", "name"))] = holder.pop(key, None)
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return value


def test_spoiled_requests_are_translated_or_refused() -> None:
    """Whatever stands in a request, the result is a translation or an error that names the field."""
    chance = random.Random(8)
    for (case,) in [param.values for param in cases("requests")] * 60:
        try:
            json.dumps(sent_for(spoiled(case["asked"], chance), **case.get("options", {})))
        except app.Untranslatable as error:
            assert error.why and error.status == 400


def test_spoiled_answers_are_translated_or_refused() -> None:
    """An answer of any shape is translated or is no message; a stream of any events ends in at most one error."""
    chance = random.Random(9)
    for (case,) in [param.values for param in cases("replies")] * 100:
        try:
            app.from_message(spoiled(case["came"], chance), CREATED)
        except ValueError as error:
            assert "not a message" in str(error)
    for path in [path for path in STREAMS if path.stem != "broken"] * 20:
        translation = stream(path)
        for line in path.read_bytes().splitlines():
            if line.startswith(b"data: {"):
                event = spoiled(json.loads(line[6:]), chance) if chance.random() < 0.3 else json.loads(line[6:])
                translation.feed(b"", json.dumps(event).encode())
        assert not (translation.done and translation.failed)


def answered(sent: dict[str, Any], chance: random.Random, signed: dict[str, str], json_mode: bool) -> dict[str, Any]:
    """Return a message with calls as the client gets it, whole or from a stream; `signed` learns its signatures."""
    blocks: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 5)):
        number = f"{len(sent['messages'])}_{len(blocks)}"
        kind = chance.choice(["thinking", "text", "tool_use"])
        if kind == "thinking":
            signature = f"signature {number}"
            signed[signature] = prefix(sent, [*spread(sent), *(("assistant", block) for block in blocks)])
            blocks.append({"type": kind, "thinking": "t" * chance.randint(0, 3), "signature": signature})
        elif kind == "text":
            blocks.append({"type": kind, "text": f"ü{number} "})
        else:
            blocks.append({"type": kind, "id": f"id{number}", "name": "f", "input": {}})
    blocks.append({"type": "tool_use", "id": f"id{len(sent['messages'])}_last", "name": "f", "input": {}})
    if chance.random() < 0.5:
        reply = {"id": "m", "model": "m", "content": blocks, "stop_reason": "tool_use"}
        found: dict[str, Any] = app.from_message(reply, CREATED, json_mode)["choices"][0]["message"]
        return found
    translation = app.MessageStream(CREATED, json_mode=json_mode)
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {"id": "m", "model": "m"}}]
    for index, block in enumerate(blocks):
        pieces = {"text": "text_delta", "thinking": "thinking_delta", "signature": "signature_delta"}
        start = {**block, **{name: "" for name in pieces if name in block}}
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        for name in [name for name in pieces if name in block]:
            delta = {"type": pieces[name], name: block[name]}
            events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    given = b"".join(translation.feed(b"", json.dumps(event).encode()) for event in [*events, {"type": "message_stop"}])
    message: dict[str, Any] = {"role": "assistant", "content": "", "thinking_blocks": [], "tool_calls": []}
    for delta in [chunk["choices"][0]["delta"] for chunk in chunks(given)]:
        message["content"] += delta.get("content") or ""
        message["thinking_blocks"] += delta.get("thinking_blocks", [])
        message["tool_calls"] += [call for call in delta.get("tool_calls", ()) if "id" in call]
    return message


def spread(sent: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return all blocks of a request, each with its role."""
    return [(turn["role"], block) for turn in sent["messages"] for block in turn["content"]]


def prefix(sent: dict[str, Any], blocks: list[tuple[str, dict[str, Any]]]) -> str:
    """Return what a signature is bound to."""
    return json.dumps([sent.get("system"), sent.get("tools"), blocks])


def test_nothing_changes_before_a_signed_block() -> None:
    """While a client only appends, each block of thinking is sent with all that stood before it when it was made."""
    chance = random.Random(7)
    for _ in range(300):
        signed: dict[str, str] = {}
        count = 0
        model = chance.choice(["claude-opus-5", "claude-opus-4-5", "other"])
        messages: list[dict[str, Any]] = [{"role": "system", "content": "S"}, {"role": "user", "content": "go"}]
        for _ in range(chance.randint(2, 5)):
            json_mode = chance.random() < 0.5
            asked = {"model": model, "messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
            sent = sent_for({**asked, **({"response_format": {"type": "json_object"}} if json_mode else {})})
            for at, (_, block) in enumerate(spread(sent)):
                if block["type"] == "thinking":
                    assert signed[block["signature"]] == prefix(sent, spread(sent)[:at])
                    count += 1
            message = answered(sent, chance, signed, json_mode)
            results = [{"role": "tool", "tool_call_id": call["id"], "content": "r"} for call in message["tool_calls"]]
            more = [{"role": role, "content": role} for role in ("system", "developer", "user")]
            messages = [*messages, message, *results, *chance.choices(more, k=chance.choice([0, 0, 1, 2]))]
        assert count >= len(signed) - 6


@pytest.mark.parametrize("case", cases("replies"))
def test_replies(case: dict[str, Any]) -> None:
    """Each whole answer is translated as its golden file says."""
    assert app.from_message(case["came"], CREATED) == case["given"]


@pytest.mark.parametrize("came", [{}, {"type": "error"}, {"content": "text"}, {"content": ["text"]}])
def test_an_answer_that_is_no_message(came: dict[str, Any]) -> None:
    """An answer without content blocks is an error, never an empty answer."""
    with pytest.raises(ValueError, match="not a message"):
        app.from_message(came, CREATED)


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_streams(path: Path) -> None:
    """Each stream is translated as its golden file says, by the chat API's rules, wherever its bytes are cut."""
    came, given = path.read_bytes(), path.with_suffix(".out").read_bytes()
    translation = stream(path)
    assert translated(translation, came) == given
    assert translation.failed == (path.stem in FAILED)
    assert translation.done == (path.stem not in FAILED | CUT)
    for cut in range(1, len(came)):
        assert translated(stream(path), came[:cut], came[cut:]) == given
    assert translated(stream(path), *(came[at : at + 1] for at in range(len(came)))) == given
    # One id, created and model; the role first and once; one finish_reason, last; usage null until it is known.
    found = [chunk for chunk in chunks(given) if "error" not in chunk]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in found}) <= 1
    choices = [chunk["choices"][0] for chunk in found if chunk["choices"]]
    assert ["role" in choice["delta"] for choice in choices] == [index == 0 for index in range(len(choices))]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert given.endswith(b"data: [DONE]\n\n") == translation.done
    if path.stem.endswith(".usage"):
        assert all(chunk["usage"] is None for chunk in found[:-1]) and found[-1]["choices"] == [] and found[-1]["usage"]
    else:
        assert not any("usage" in chunk for chunk in found)


@pytest.mark.parametrize(
    "data",
    [
        *(b"[]", b"null", b"\xff", b"[" * 100_000, b'{"type":"message_start"}', b'{"type":["x"]}'),
        b'{"type":"content_block_delta","delta":[]}',
    ],
    ids=lambda data: repr(data[:20]),
)
def test_an_event_that_cannot_be_read(data: bytes) -> None:
    """An event of unknown shape ends the stream with one error event."""
    translation = app.MessageStream(CREATED)
    # The first ping comes with every stream; later ones keep the client's connection alive.
    assert [translation.feed(b"ping", b'{"type":"ping"}') for _ in range(3)] == [b"", b": ping\n\n", b": ping\n\n"]
    assert translation.feed(b"", data).startswith(b'data: {"error":{"message":') and translation.failed
    assert translation.feed(b"ping", b'{"type":"ping"}') == b""


LONG = "input length and `max_tokens` exceed context limit: 9 + 9 > 9"
POOR = ("Your credit balance is too low.", "You have reached your specified API usage limits.", "This organization has been disabled.")


@pytest.mark.parametrize(
    ("status", "error", "kind", "code"),
    [
        (400, ("invalid_request_error", "max_tokens: 9 > 8"), "invalid_request_error", None),
        (400, ("invalid_request_error", "prompt is too long: 9"), "invalid_request_error", "context_length_exceeded"),
        (400, ("invalid_request_error", LONG), "invalid_request_error", "context_length_exceeded"),
        *((400, ("invalid_request_error", text), "insufficient_quota", "insufficient_quota") for text in POOR),
        (401, ("authentication_error", "invalid x-api-key"), "invalid_request_error", "invalid_api_key"),
        (402, ("billing_error", "m"), "insufficient_quota", "insufficient_quota"),
        (403, ("permission_error", "m"), "invalid_request_error", "permission_error"),
        (404, ("not_found_error", "model: claude-9"), "invalid_request_error", "model_not_found"),
        (413, ("request_too_large", "m"), "invalid_request_error", "request_too_large"),
        (429, ("rate_limit_error", "m"), "rate_limit_error", "rate_limit_exceeded"),
        (429, ("rate_limit_error", "enforced_spend_limit_reached"), "insufficient_quota", "insufficient_quota"),
        (500, ("api_error", "m"), "server_error", "api_error"),
        (529, ("overloaded_error", "Overloaded"), "server_error", "overloaded_error"),
        *((500, {"error": "flat"}, "server_error", None), (403, {"message": "No"}, "invalid_request_error", None)),
        (422, {"detail": "bad"}, "invalid_request_error", None),
        (429, [{"error": {"code": 429, "message": "m"}}], "rate_limit_error", "429"),
    ],
)
def test_errors(status: int, error: Any, kind: str, code: str | None) -> None:
    """An error in any shape becomes OpenAI's object with all four keys; its message is kept."""
    body = {"error": {"type": error[0], "message": error[1]}} if isinstance(error, tuple) else error
    given, text = app.error_from_messages(status, json.dumps(body).encode())
    found = json.loads(text)["error"]
    assert given == (429 if code == "insufficient_quota" else {529: 503}.get(status, status))
    assert list(found) == ["message", "type", "param", "code"]
    assert (found["type"], found["code"]) == (kind, code) and found["message"] in json.dumps(body)


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"\xff", b"[]", b'{"error":{}}', b"[" * 100_000])
def test_errors_without_a_message(body: bytes) -> None:
    """A body without a message becomes an error that gives the status."""
    status, text = app.error_from_messages(502, body)
    message = "The upstream answered with status 502."
    assert status == 502 and json.loads(text) == app.error_object(message, "server_error")
