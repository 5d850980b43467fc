"""HTTP/1.1 on the wire: heads, framing and push decoders, cut at every byte."""

import random
import time
from collections.abc import Callable

import pytest

import chatgpt_apiserver as app

HEAD = b"POST /v1/x?a=1 HTTP/1.1\r\nHost: h\r\n"


def feed(decoder: app.ChunkedDecoder | app.LengthDecoder, *pieces: bytes) -> bytes:
    """What a decoder makes of the pieces."""
    return b"".join(decoder.feed(piece) for piece in pieces)


def test_a_good_head() -> None:
    """Fields keep their order and spelling; the index is lower-case and joins what is repeated."""
    head = app.parse_request_head(HEAD + b"X-A: 1 \r\nx-a:\t2\r\n\r\n")
    assert (head.method, head.target, head.minor, head.keeps_alive) == ("POST", "/v1/x?a=1", 1, True)
    assert head.lines == b"X-A: 1\r\nx-a: 2\r\n" and head.index[b"x-a"] == b"1,2"


def test_a_connections_last_head_is_remembered() -> None:
    """The same bytes are not parsed again; nor is a head with nothing but another length, which says what it says."""
    memory, head = app.HeadMemory(), HEAD + b"X: 1\r\nContent-Length: %d\r\nY: 2\r\n\r\n"
    first = memory.parse(head % 5)
    assert memory.parse(head % 5) is first
    for length in (123, 5, 0, 7):
        found = memory.parse(head % length)
        assert found.index == {**first.index, b"content-length": b"%d" % length} and found.lines is first.lines
    other = memory.parse(HEAD + b"X: 2\r\nContent-Length: 7\r\nY: 2\r\n\r\n")
    assert other.index[b"x"] == b"2" and other.lines == b"X: 2\r\nY: 2\r\n"
    memory.parse(HEAD + b"X: %b\r\n\r\n" % (b"x" * app.KNOWN_HEAD_BYTES))
    assert (memory.data, memory.head) == (b"", None)


def test_a_remembered_head_changes_nothing() -> None:
    """Whatever follows on a connection is read as by a parser that remembers nothing, and refused where it refuses."""
    chance = random.Random(1)
    lines = [b"Content-Length: 5", b"content-length:5", b"Content-Length: 5 ", b"X-Content-Length: 5", b"X: 5", b"Y: "]
    texts = [b"5", b"55", b" 5", b"5 ", b"", b"-5", b"5\r\nZ: 5", b"5\r\n\r\n", b"\r\n", b"Content-Length: 5\r\n", b"x"]
    memory, kept = app.HeadMemory(), 0
    for _ in range(4000):
        data = HEAD + b"".join(line + b"\r\n" for line in chance.sample(lines, chance.randint(1, 4))) + b"\r\n"
        described(memory.parse, data)
        for _ in range(chance.choice((0, 1, 1, 2))):
            at, text = data.find(b"5", len(HEAD)) + chance.choice((0, 0, 0, -1, 1, 9)), chance.choice(texts)
            data = data[:at] + text + data[at + chance.choice((0, 1, len(text))) :]
        data = data[: data.find(b"\r\n\r\n") + 4]
        known = memory.head
        told = [described(parse, data) for parse in (memory.parse, app.parse_request_head)]
        assert told[0] == told[1]
        kept += known is not None and memory.head is not None and memory.head.lines is known.lines
    assert kept > 400


def described(parse: Callable[[bytes], app.RequestHead], data: bytes) -> tuple[object, ...]:
    """What a parser makes of a head, or why it refuses."""
    try:
        head = parse(data)
    except app.BadMessage as problem:
        return problem.status, str(problem)
    return head.method, head.target, head.minor, list(head.index.items()), head.lines


@pytest.mark.parametrize(
    "lines",
    [
        b"X : 1\r\n",
        b" X: 1\r\n",
        b"X: 1\r\n 2\r\n",
        b"X: \x001\r\n",
        b"X: a\rb\r\n",
        b"X: a\x7f\r\n",
        b"X: a\nb: c\r\n",
        b": 1\r\n",
        b"X\r\n",
        b"X\xff: 1\r\n",
        b"Host: other\r\n",
    ],
)
def test_malformed_fields_are_refused(lines: bytes) -> None:
    """White space before the colon, folding, control characters, bare line ends, bad names, a second Host: be the name
    a new one or one that was seen before."""
    for known in (b"", b"X: 1\r\n"):
        app.REQUEST_FIELDS.names.clear()
        app.REPLY_FIELDS.names.clear()
        app.parse_request_head(HEAD + known + b"\r\n")
        app.parse_response_head(b"HTTP/1.1 200 OK\r\n" + known + b"\r\n")
        with pytest.raises(app.BadMessage):
            app.parse_request_head(HEAD + lines + b"\r\n")
        if b"Host" not in lines:
            with pytest.raises(app.BadReply):
                app.parse_response_head(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET / HTTP/2.0", 505),
        (b"GET  / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET / http/1.1", 400),
        (b"G\x01T / HTTP/1.1", 400),
        (b"GET /\xff HTTP/1.1", 400),
        (b"GET /", 400),
    ],
)
def test_malformed_request_lines(line: bytes, status: int) -> None:
    """One space on each side, a visible target, HTTP/1.0 or 1.1."""
    with pytest.raises(app.BadMessage) as told:
        app.parse_request_head(line + b"\r\nHost: h\r\n\r\n")
    assert told.value.status == status


@pytest.mark.parametrize("size", [0, 1, 5, 100])
def test_length_decoder_at_every_cut(size: int) -> None:
    """The body is the same wherever it is cut, and what follows is kept apart."""
    wire = b"b" * size + b"REST"
    for cut in range(len(wire) + 1):
        decoder = app.LengthDecoder(size)
        first = decoder.feed(wire[:cut]) if not decoder.done else b""
        rest = decoder.rest
        if not decoder.done:
            first += decoder.feed(wire[cut:])
            rest = decoder.rest
        assert first == b"b" * size and b"REST".startswith(rest)


CHUNKED = b"5\r\nhello\r\n1;ext=1\r\n \r\nA\r\n0123456789\r\n000\r\nTrailer: x\r\n\r\n"


def test_chunked_decoder_at_every_cut_and_by_byte() -> None:
    """Any two pieces, and single bytes, decode to the same body; trailers and extensions are dropped."""
    wire = CHUNKED + b"NEXT"
    for cut in range(len(wire) + 1):
        decoder = app.ChunkedDecoder(100)
        found, rest = b"", b""
        for piece in (wire[:cut], wire[cut:]):
            if decoder.done:
                rest += piece
            else:
                found += decoder.feed(piece)
                rest += decoder.rest
        assert (found, rest, decoder.done) == (b"hello 0123456789", b"NEXT", True)
    decoder = app.ChunkedDecoder(100)
    assert feed(decoder, *(CHUNKED[at : at + 1] for at in range(len(CHUNKED)))) == b"hello 0123456789" and decoder.done


def test_reads_that_are_one_chunk_each() -> None:
    """A stream's reads, each a whole chunk of a known size, are judged like any others: bound, CRLF and last chunk."""
    decoder = app.ChunkedDecoder(12)
    for _ in range(2):
        assert decoder.feed(b"5\r\nhello\r\n") == b"hello" and not decoder.done
    with pytest.raises(OverflowError):
        decoder.feed(b"5\r\nhello\r\n")
    for _ in range(2):  # an earlier last chunk makes its size a known one
        decoder = app.ChunkedDecoder(12)
        assert feed(decoder, b"5\r\nhello\r\n", b"0\r\n\r\n") == b"hello" and decoder.done and not decoder.rest
    with pytest.raises(ValueError):
        app.ChunkedDecoder(12).feed(b"5\r\nhelloX\r\n")
    assert app.ChunkedDecoder(12).feed(b"5\r\nhel\r\n") == b"hel\r\n"


@pytest.mark.parametrize(
    "wire",
    [
        b"0x5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"5_0\r\n",
        b"-1\r\n",
        b" 5\r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"g\r\n",
        b"\r\n",
        b"1" * 20 + b"\r\n",
        b"5;" + b"x" * 300,
        b"0\r\nbad trailer\r\n\r\n",
        b"0\r\nA: b\nC: d\r\n\r\n",
        b"5;a\rb\r\nhello\r\n",
    ],
)
def test_malformed_chunks_are_refused_whole_and_by_byte(wire: bytes) -> None:
    """Sizes are hex digits and bounded; lines end with CRLF; extensions and trailers are bounded."""
    for step in (1, len(wire)):
        decoder = app.ChunkedDecoder(1000)
        with pytest.raises(ValueError):
            feed(decoder, *(wire[at : at + step] for at in range(0, len(wire), step)))


def test_chunked_bodies_are_bounded() -> None:
    """More than the limit is told before it is taken."""
    for wire in (b"64\r\n" + b"x" * 100 + b"\r\n", b"ffffffff\r\n"):
        with pytest.raises(OverflowError):
            app.ChunkedDecoder(99).feed(wire)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Content-Length: 5\r\nContent-Length: 6\r\n", 400),
        (b"Content-Length: 0x5\r\n", 400),
        (b"Content-Length: \r\n", 400),
        (b"Content-Length: 1000\r\n", 413),
        (b"Transfer-Encoding: xchunked\r\n", 400),
        (b"Transfer-Encoding: gzip, chunked\r\n", 501),
        (b"Transfer-Encoding: chunked, chunked\r\n", 400),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    ],
)
def test_ambiguous_request_framing(lines: bytes, status: int) -> None:
    """No bytes of one request can become another."""
    head = app.parse_request_head(HEAD + lines + b"\r\n")
    with pytest.raises(app.BadMessage) as told:
        app.request_body_decoder(head, 999)
    assert told.value.status == status


def test_repeated_equal_lengths_count_once() -> None:
    """RFC 9112, 6.3 lets a list of equal values stand."""
    head = app.parse_request_head(HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n")
    decoder = app.request_body_decoder(head, 10)
    assert isinstance(decoder, app.LengthDecoder) and decoder.left == 5


def test_reply_framing() -> None:
    """No body for HEAD, 204 and 304; chunked, length, else until close; both framings are refused."""

    def decoder(lines: bytes, status: int = 200, method: str = "GET") -> object:
        return app.reply_body_decoder(app.parse_response_head(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, lines)), method)

    length = decoder(b"Content-Length: 3\r\n")
    assert isinstance(length, app.LengthDecoder) and length.left == 3
    for status, method in ((204, "GET"), (304, "GET"), (200, "HEAD")):
        none = decoder(b"", status, method)
        assert isinstance(none, app.LengthDecoder) and none.done
    assert isinstance(decoder(b"Transfer-Encoding: chunked\r\n"), app.ChunkedDecoder)
    assert isinstance(decoder(b""), app.EofDecoder)
    with pytest.raises(app.BadReply):
        decoder(b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n")


def test_what_is_passed_on() -> None:
    """Hop-by-hop fields, credentials, and what Connection names stay here."""
    lines = b"Authorization: k\r\nX-Api-Key: k\r\nCookie: c\r\nX-Forwarded-Host: f\r\nProxy-X: p\r\nTE: t\r\nConnection: X-B\r\nX-B: b\r\n"
    head = app.parse_request_head(HEAD + lines + b"X-Keep: y\r\n\r\n")
    assert head.lines == b"X-Keep: y\r\n"
    reply = app.parse_response_head(b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nRetry-After: 1\r\nX: y\r\n\r\n")
    assert reply.lines == b"Retry-After: 1\r\nX: y\r\n"
    assert app.without(reply.lines, app.RETRY_FIELDS) == b"X: y\r\n"


def test_what_is_remembered_of_lines() -> None:
    """Common lines are, credentials, ids and long ones are not, and the memory is bounded."""
    table = app.FieldLines(lambda name: True)
    long_line = b"X-Long: " + b"x" * app.KNOWN_LINE_BYTES
    for _ in range(2):
        index, lines = table.parse(b"\r\n".join([b"Authorization: k", b"X-A: b", long_line, b"CF-Ray: 1"]), 10)
        others = {b"x-long": b"x" * app.KNOWN_LINE_BYTES, b"cf-ray": b"1"}
        assert index == {b"authorization": b"k", b"x-a": b"b", **others}
        assert lines == b"Authorization: k\r\nX-A: b\r\n" + long_line + b"\r\nCF-Ray: 1\r\n"
    assert list(table) == [b"X-A: b"]
    for number in range(2 * app.KNOWN_LINES):
        table.parse(b"X-N: %d" % number, 10)
    assert len(table) <= app.KNOWN_LINES


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("/a%20b", None),
        ("/v1/%6dodels?x=%20", ("", "/v1/models", "x=%20")),
        ("http://h:1/p?q", ("h:1", "/p", "q")),
        ("HTTPS://h", ("h", "/", "")),
        ("*", ("", "*", "")),
        ("x/y", None),
        ("/a%0d%0ab", None),
    ],
)
def test_targets(target: str, found: tuple[str, str, str] | None) -> None:
    """Origin-form, absolute-form and percent-encoding; what hides white space or controls is refused."""
    if found is None:
        with pytest.raises(app.BadMessage):
            app.split_target(target)
    else:
        assert app.split_target(target) == found


def test_refusing_a_field_takes_linear_time() -> None:
    """A value of blanks that ends badly is refused at once; it once took seconds of CPU."""
    began = time.process_time()
    with pytest.raises(app.BadMessage):
        app.parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 60_000 + b"\x01\r\n\r\n")
    assert time.process_time() - began < 0.5
