"""Scripted peers for tests on real sockets: an upstream that does what a test says, a client that sends raw bytes."""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
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


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST instead of a FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Message:
    """A request or a reply as a peer saw it.

    `headers` has lower-case names and of a repeated field the last; `fields` has every field as it was spelled.
    """

    def __init__(self, start: str, fields: list[tuple[str, str]], body: bytes, interim: list[int]) -> None:
        self.start, self.fields, self.body = start, fields, body
        self.headers = {name.lower(): value for name, value in fields}
        self.interim = interim  # statuses of the 1xx replies that came first

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    def json(self) -> Any:
        return json.loads(self.body)


async def read_message(reader: asyncio.StreamReader, head_only: bool = False) -> Message:
    """One message; interim replies are only noted; without framing a reply ends with its connection."""
    interim: list[int] = []
    while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        if not lines[0].startswith("HTTP/1.1 1"):
            break
        interim.append(int(lines[0].split()[1]))
    fields = [(line.partition(":")[0], line.partition(":")[2].strip()) for line in lines[1:] if line]
    headers = {name.lower(): value for name, value in fields}
    body = b""
    if head_only:
        return Message(lines[0], fields, body, interim)
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif lines[0].startswith("HTTP/") and headers.get("connection") == "close":
        body = await reader.read()
    return Message(lines[0], fields, body, interim)


def reply(status: int, body: bytes, *headers: str) -> bytes:
    """A reply with a Content-Length."""
    head = [f"HTTP/1.1 {status} X", "Content-Type: application/json", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def json_reply(status: int, value: Any, *headers: str) -> bytes:
    """A reply with a JSON body."""
    return reply(status, json.dumps(value).encode(), *headers)


def error_reply(status: int, code: str | None = None, message: str = "no", *headers: str) -> bytes:
    """An OpenAI-style error."""
    return json_reply(status, {"error": {"message": message, "type": "x", "param": None, "code": code}}, *headers)


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    """One chat event with content."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


def sse_reply(*events: bytes) -> bytes:
    """A whole stream, each event in a chunk of its own."""
    return SSE_HEAD + b"".join(map(app.chunk, events)) + b"0\r\n\r\n"


Script = Callable[["Peer", Message], Awaitable[None]]


class Peer:
    """One connection of a scripted upstream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *pieces: bytes) -> None:
        """Write the pieces, each as its own write."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def chunk(self, payload: bytes) -> None:
        """Write one chunk."""
        await self.send(app.chunk(payload))

    async def gone(self) -> None:
        """Wait until the other side closed."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        """Close with a FIN once everything is sent."""
        self.writer.close()

    def reset(self) -> None:
        """Close with a RST."""
        reset(self.writer)


class Upstream:
    """A scripted upstream on loopback; `script` runs once per request."""

    def __init__(self, script: Script, tls: bool = False) -> None:
        self.script, self.tls = script, tls
        self.seen: list[Message] = []
        self.connections = 0
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Upstream":
        context = None
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERT, KEY)
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                message = await read_message(reader)
                self.seen.append(message)
                await self.script(Peer(reader, writer), message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    @property
    def open_connections(self) -> int:
        """Connections that neither side has closed yet."""
        return len(self.tasks)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{'localhost' if self.tls else '127.0.0.1'}:{self.port}/v1"


def answers(*replies: bytes) -> Script:
    """A script that sends the replies in turn, the last one for ever."""
    left = list(replies)

    async def script(peer: Peer, _: Message) -> None:
        await peer.send(left.pop(0) if len(left) > 1 else left[0])

    return script


def controller(name: str, url: str, **more: Any) -> dict[str, Any]:
    """An openai controller at `url`; `account` adds to its config."""
    account = {"api_key": f"sk-secret-{name}-key", "base_url": url, **more.pop("account", {})}
    return {"type": "openai", "name": name, "config": account, **more}


class Running:
    """The server under test on a free port."""

    def __init__(self, *controllers: dict[str, Any], **more: Any) -> None:
        data = {"port": 0, "controllers": list(controllers) or app.demo_controllers(), **more}
        self.config = app.parse_config(data, "test", {})

    async def __aenter__(self) -> "Running":
        self.server = app.Server(self.config, asyncio.get_running_loop())
        self.lines: list[str] = []
        self.server.access.write = self.lines.append
        app.redactor.watch(app.secrets_of(self.config))
        self.port = (await self.server.start())[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()

    async def open(self) -> "Client":
        """A raw connection to the server."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def post(self, model: str = "gpt-4.1", *headers: str, **more: Any) -> Message:
        """One chat request on a connection of its own."""
        client = await self.open()
        try:
            await client.post(model, *headers, **more)
            return await client.read()
        finally:
            client.close()


class Client:
    """A client that sends what a test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, model: str = "gpt-4.1", *headers: str, **more: Any) -> None:
        """Send a chat request."""
        body = json.dumps({"model": model, "messages": MESSAGES, **more}).encode()
        await self.send(request(body, *headers))

    async def read(self, head_only: bool = False) -> Message:
        return await read_message(self.reader, head_only)

    async def closed(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.transport.abort()

    def reset(self) -> None:
        reset(self.writer)


def request(body: bytes, *headers: str, target: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    """A request's bytes."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
