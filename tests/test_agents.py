"""An agent's loop with tools: the same on every kind of account, whole and streamed."""

import json
from typing import Any

import pytest

from .support import ANSWER, Message, Peer, Running, Upstream, controller, event, json_reply, sse_reply

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in (("get_weather", {"city": {"type": "string"}}), ("now", {}))
]
QUESTION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Warmer in Oslo or in Rome, and when?"}]
Calls = list[tuple[str, str, dict[str, str]]]  # id, name, arguments
# The model's answers, round by round: text and calls.
ROUNDS: list[tuple[str, Calls]] = [
    ("Let me look.", [("call_1", "get_weather", {"city": "Oslo ☃"}), ("call_2", "get_weather", {"city": "Rome"})]),
    ("", [("call_3", "now", {})]),
    ("Rome, at noon.", []),
]
RESULTS = {"call_1": "5 degrees", "call_2": "20 degrees", "call_3": "12:00"}


def said_by_openai(text: str, calls: Calls, stream: bool) -> bytes:
    """Return one round as a reply of OpenAI or Azure."""
    tool_calls = [
        {"id": name, "type": "function", "function": {"name": tool, "arguments": json.dumps(given)}}
        for name, tool, given in calls
    ]
    reason = "tool_calls" if calls else "stop"
    if not stream:
        message = {"role": "assistant", "content": text or None, **({"tool_calls": tool_calls} if tool_calls else {})}
        return json_reply(200, {**ANSWER, "choices": [{"index": 0, "message": message, "finish_reason": reason}]})
    deltas = [({"tool_calls": [{"index": at, **call}]}, None) for at, call in enumerate(tool_calls)]
    chunks = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in (*deltas, ({}, reason))
    ]
    first = [event(text)] if text else []
    return sse_reply(*first, *(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks), b"data: [DONE]\n\n")


def said_by_anthropic(text: str, calls: Calls, stream: bool) -> bytes:
    """Return the same round as a reply of the Messages API."""
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    blocks += [{"type": "tool_use", "id": name, "name": tool, "input": given} for name, tool, given in calls]
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "usage": {"input_tokens": 5}}
    reason = "tool_use" if calls else "end_turn"
    if not stream:
        return json_reply(200, {**message, "content": blocks, "stop_reason": reason})
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {**message, "content": []}}]
    for at, block in enumerate(blocks):
        empty = {"text": ""} if "text" in block else {"input": {}}
        events.append({"type": "content_block_start", "index": at, "content_block": {**block, **empty}})
        said = block.get("text") or json.dumps(block["input"])
        for piece in (said[:5], said[5:]) if said != "{}" else ():
            delta = {"type": "text_delta", "text": piece} if "text" in block else {"partial_json": piece}
            events.append({"type": "content_block_delta", "index": at, "delta": delta})
        events.append({"type": "content_block_stop", "index": at})
    events += [{"type": "message_delta", "delta": {"stop_reason": reason}}, {"type": "message_stop"}]
    return sse_reply(*(b"event: %b\ndata: %b\n\n" % (one["type"].encode(), json.dumps(one).encode()) for one in events))


def results_in(seen: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the tool results in a request of either API: the call's id, and the content."""
    found = [(message["tool_call_id"], message["content"]) for message in seen["messages"] if message["role"] == "tool"]
    blocks = [block for message in seen["messages"] if isinstance(message["content"], list) for block in message["content"]]
    return found + [(block["tool_use_id"], block["content"]) for block in blocks if block["type"] == "tool_result"]


def message_of(reply: Message, stream: bool) -> tuple[dict[str, Any], str]:
    """Return the message that a client makes of an answer, and its finish_reason."""
    if not stream:
        choice = reply.json()["choices"][0]
        return choice["message"], choice["finish_reason"]
    message, calls, reason = {"role": "assistant", "content": ""}, {}, ""
    assert reply.body.endswith(b"data: [DONE]\n\n")
    for line in reply.body.split(b"\n\n")[:-2]:
        choice = json.loads(line[6:])["choices"][0]
        message["content"] += choice["delta"].get("content") or ""
        reason = choice.get("finish_reason") or reason
        for piece in choice["delta"].get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"type": "function", "function": {"name": "", "arguments": ""}})
            call["id"] = piece.get("id") or call["id"]
            for name, value in piece["function"].items():
                call["function"][name] += value
    return {**message, "content": message["content"] or None, "tool_calls": list(calls.values())}, reason


async def loop(server: Running, stream: bool) -> list[Any]:
    """Ask, call tools and send their results back until an answer calls none; return every round."""
    messages: list[dict[str, Any]] = list(QUESTION)
    trace: list[Any] = []
    while len(trace) < 9:
        reply = await server.post("gpt-4.1", messages=messages, tools=TOOLS, stream=stream, tool_choice="auto")
        assert reply.status == 200, reply.body
        message, reason = message_of(reply, stream)
        functions = [(call["id"], call["function"]) for call in message.get("tool_calls") or ()]
        calls = [(name, function["name"], json.loads(function["arguments"])) for name, function in functions]
        trace.append((message["content"], calls, reason))
        if not calls:
            return trace
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": name, "content": RESULTS[name]} for name, _, _ in calls]
    raise AssertionError("the loop does not end")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["openai", "azure", "anthropic"])
@pytest.mark.parametrize("in_form", [True, False], ids=["as_asked", "in_the_other_form"])
async def test_the_loop_is_the_same_everywhere(kind: str, stream: bool, in_form: bool) -> None:
    """The client gets the model's texts, calls, ids, arguments and finish_reasons in order, in the form it asked for."""

    async def script(peer: Peer, seen: Message) -> None:
        found = results_in(seen.json())
        assert found == list(RESULTS.items())[: len(found)] and len(seen.json()["tools"]) == 2
        say = said_by_anthropic if kind == "anthropic" else said_by_openai
        await peer.send(say(*ROUNDS[{0: 0, 2: 1, 3: 2}[len(found)]], stream is in_form))

    async with Upstream(script) as one:
        base_url = one.url.removesuffix("/v1") if kind == "azure" else one.url
        async with Running({**controller("a", base_url), "type": kind}) as server:
            trace = await loop(server, stream)
    reasons = ["tool_calls", "tool_calls", "stop"]
    assert trace == [(text or None, calls, reason) for (text, calls), reason in zip(ROUNDS, reasons, strict=True)]
