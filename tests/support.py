"""Scripted peers on real sockets: an upstream that does what a test says, a client that sends raw bytes."""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chatgpt_apiserver as app

CERT, KEY = (str(Path(__file__).parent / "certs" / name) for name in ("localhost.pem", "localhost.key"))
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4.1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
MESSAGES = [{"role": "user", "content": "hello"}]


def now() -> float:
    """Return the running loop's time in seconds."""
    return asyncio.get_running_loop().time()


async def pause(seconds: float) -> None:
    """Wait on the loop's clock; in tests with virtual time this takes no real time."""
    over = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(seconds, over.set_result, None)
    await over


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until `condition` is true; fail after ten seconds of its clock."""
    give_up, turns = now() + 10, 0
    while not condition():
        assert now() < give_up, "the condition never became true"
        turns += 1
        await (asyncio.sleep(0) if turns % 8 else pause(0.005))


@dataclass
class Message:
    """A request or a reply as a peer saw it.

    `headers` has lower-case names, and of a repeated field the last value; `fields` has every field as it was spelled;
    `interim` has the statuses of the 1xx replies that came first.
    """

    start: str
    fields: list[tuple[str, str]]
    interim: list[int]
    body: bytes = b""
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.headers = {name.lower(): value for name, value in self.fields}

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    def json(self) -> Any:
        return json.loads(self.body)


async def read_message(reader: asyncio.StreamReader, head_only: bool = False) -> Message:
    """Read one message; without framing a reply ends with its connection."""
    interim: list[int] = []
    while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if not lines[0].startswith("HTTP/1.1 1"):
            break
        interim.append(int(lines[0].split()[1]))
    pairs = [line.partition(":") for line in lines[1:] if line]
    message = Message(lines[0], [(name, value.strip()) for name, _, value in pairs], interim)
    if head_only:
        return message
    if message.headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            message.body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif "content-length" in message.headers:
        message.body = await reader.readexactly(int(message.headers["content-length"]))
    elif lines[0].startswith("HTTP/") and message.headers.get("connection") == "close":
        message.body = await reader.read()
    return message


def reply(status: int, body: bytes, *headers: str) -> bytes:
    """Return a reply with a Content-Length."""
    head = [f"HTTP/1.1 {status} X", "Content-Type: application/json", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def json_reply(status: int, value: Any, *headers: str) -> bytes:
    """Return a reply with a JSON body."""
    return reply(status, json.dumps(value).encode(), *headers)


def error_reply(status: int, code: str | None = None, message: str = "no", *headers: str) -> bytes:
    """Return an OpenAI-style error."""
    return json_reply(status, {"error": {"message": message, "type": "x", "param": None, "code": code}}, *headers)


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    """Return one chat event with content."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


DONE = b"data: [DONE]\n\n"


def sse_reply(*events: bytes) -> bytes:
    """Return a whole stream, each event in a chunk of its own."""
    return SSE_HEAD + b"".join(map(app.chunk, events)) + b"0\r\n\r\n"


class End:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        """Send the pieces, each with a write of its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    def reset(self) -> None:
        """Close with a RST instead of a FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Peer(End):
    """One connection of a scripted upstream."""

    async def chunk(self, payload: bytes) -> None:
        """Send one chunk."""
        await self.send(app.chunk(payload))

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def close(self) -> None:
        """Close with a FIN once everything is sent."""
        self.writer.close()


Script = Callable[[Peer, Message], Awaitable[None]]
Talk = Callable[[Peer], Awaitable[None]]


class Upstream:
    """A scripted upstream on loopback; `script` runs once for each request, or `talk` once for each connection."""

    def __init__(self, script: Script | None = None, tls: bool = False, talk: Talk | None = None) -> None:
        self.talk, self.tls = talk or self._converse, tls
        self.script = script
        self.seen: list[Message] = []
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Upstream":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERT, KEY)
        context.set_alpn_protocols(["h2", "http/1.1"])  # as the front ends of large vendors
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context if self.tls else None)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next turn

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.talk(Peer(reader, writer))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()

    async def _converse(self, peer: Peer) -> None:
        assert self.script is not None
        while not peer.writer.is_closing():
            self.seen.append(await read_message(peer.reader))
            await self.script(peer, self.seen[-1])

    @property
    def open_connections(self) -> int:
        """Return how many connections neither side has closed yet."""
        return len(self.tasks)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}/v1" if self.tls else f"http://127.0.0.1:{self.port}/v1"


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """Hold a port on which every connection is refused; the value is the URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def answers(*replies: bytes) -> Script:
    """Return a script that sends the replies in turn, and the last one for all further requests."""
    left = list(replies)

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(left.pop(0) if len(left) > 1 else left[0])

    return script


def controller(name: str, url: str, **more: Any) -> dict[str, Any]:
    """Return the configuration of an openai controller at `url`; `account` adds to its `config`."""
    account = {"api_key": f"sk-secret-{name}-key", "base_url": url, **more.pop("account", {})}
    return {"type": "openai", "name": name, "config": account, **more}


class Running:
    """The server under test on a free port. It asks its upstreams for their models only where `lists_models` is true."""

    lists_models = False

    def __init__(self, *controllers: dict[str, Any], **more: Any) -> None:
        data = {"port": 0, "controllers": list(controllers) or app.demo_controllers(), "log": {"monitoring": True}, **more}
        self.config = app.parse_config(data, "test", {})

    async def __aenter__(self) -> "Running":
        self.server = app.Server(self.config, asyncio.get_running_loop())
        self.lines: list[str] = []
        self.server.access.write = self.lines.append
        app.redactor.watch(app.secrets_of(self.config))
        if not self.lists_models:
            self.server.models.follow = self.server.models.close  # type: ignore[method-assign]
        self.port = (await self.server.start())[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    async def open(self) -> "Client":
        """Open a raw connection to the server."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def post(self, model: str = "gpt-4.1", *headers: str, **more: Any) -> Message:
        """Send one chat request on a connection of its own; return the answer."""
        client = await self.open()
        with contextlib.closing(client):
            await client.post(model, *headers, **more)
            return await client.read()

    async def ask(
        self, method: str, target: str, data: Any = b"", *lines: str, kind: str = "application/json"
    ) -> Message:
        """Send any request on a connection of its own; `data` is sent as JSON unless it is bytes."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        client = await self.open()
        with contextlib.closing(client):
            await client.send(request(body, f"Content-Type: {kind}", *lines, target=target, method=method))
            return await client.read(head_only=method == "HEAD")

    async def status(self) -> Any:
        """Return what `/status?verbose=1` shows."""
        return (await self.ask("GET", "/status?verbose=1")).json()

    def reload(self, *controllers: dict[str, Any], **more: Any) -> None:
        """Give the server another configuration, as SIGHUP does."""
        self.server.reconfigure(app.parse_config({"port": 0, "controllers": list(controllers), **more}, "test", {}))

    def access_lines(self) -> list[str]:
        """Return the access lines written so far, each of them with its line end."""
        self.server.access.flush()
        return "".join(self.lines).splitlines(keepends=True)


class Listing(Running):
    """A server that asks its upstreams for their models."""

    lists_models = True


class Client(End):
    """A client that sends what a test says."""

    async def post(self, model: str = "gpt-4.1", *headers: str, **more: Any) -> None:
        """Send a chat request."""
        body = json.dumps({"model": model, "messages": MESSAGES, **more}).encode()
        await self.send(request(body, *headers))

    async def read(self, head_only: bool = False) -> Message:
        return await read_message(self.reader, head_only)

    async def closed(self) -> bytes:
        """Return everything up to the end of the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()


def request(body: bytes, *headers: str, target: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    """Return a request's bytes."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
