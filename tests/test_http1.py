"""HTTP/1.1 on the wire: heads, framing, decoders cut at every byte, and forms."""

import itertools
import mmap
import tempfile
import time

import pytest

import chatgpt_apiserver as app

HEAD = b"POST /v1/x?a=1 HTTP/1.1\r\nHost: h\r\n"
REPLY = b"HTTP/1.1 200 OK\r\n"


def test_a_good_head() -> None:
    """Fields keep their order and spelling; the index has lower-case names and joins repeated fields."""
    head = app.parse_request_head(HEAD + b"X-A: 1 \r\nx-a:\t2\r\n\r\n")
    assert (head.method, head.target, head.http_minor) == ("POST", "/v1/x?a=1", 1)
    assert head.lines == b"X-A: 1\r\nx-a: 2\r\n" and head.index[b"x-a"] == b"1,2"


@pytest.mark.parametrize(
    ("minor", "connection", "keeps"), [(1, b"", True), (1, b"X, Close", False), (0, b"", False), (0, b"Keep-Alive", True), (1, b"x", True)]
)
def test_which_connections_stay_open(minor: int, connection: bytes, keeps: bool) -> None:
    """HTTP/1.1 keeps a connection unless `close` is named, HTTP/1.0 only if `keep-alive` is."""
    assert app.keeps_alive({b"connection": connection}, minor) is keeps


@pytest.mark.parametrize(
    "line",
    [b"X : 1", b" X: 1", b"X: 1\r\n 2", b"X: \x001", b"X: a\rb", b"X: a\x7f", b"X: a\nb: c", b": 1", b"X", b"X\xff: 1", b""],
)
def test_malformed_fields_are_refused(line: bytes) -> None:
    """Space before the colon, folding, control characters, bare line ends and bad names, also behind the good field."""
    for known in (b"", b"X: 1\r\n"):
        app.parse_request_head(HEAD + known + b"\r\n")
        app.parse_response_head(REPLY + known + b"\r\n")
        with pytest.raises(app.BadMessage):
            app.parse_request_head(HEAD + known + line + b"\r\n\r\n")
        with pytest.raises(app.BadMessage):
            app.parse_response_head(REPLY + known + line + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"GET / HTTP/2.0\r\nHost: h", 505),
        *((start + b"\r\nHost: h", 400) for start in (b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET / http/1.1", b"GET /")),
        *((start + b" HTTP/1.1\r\nHost: h", 400) for start in (b"G\x01T /", b"GET /\xff")),
        *((HEAD + line, 400) for line in (b"Host: h", b"X:" + b" " * 60_000 + b"\x01")),  # backtracking took 18 s of CPU
        *((b"GET / HTTP/1.1\r\n" + line, 400) for line in (b"X: 1", b"Host: h,i", b"Host: " + b"h" * 301)),
        (b"GET / HTTP/1.1\r\nHost: h" + b"\r\nX: 1" * 100, 431),
        *((HEAD + b"Content-Length: " + value, 400) for value in (b"5\r\nTransfer-Encoding: chunked", b"5\r\nContent-Length: 6", b"5, 05", b"0x5", b"")),
        (HEAD + b"Content-Length: 1000", 413),
        *((HEAD + b"Transfer-Encoding: " + value, 400) for value in (b"xchunked", b"chunked, chunked", b"chunked\r\nTransfer-Encoding: chunked")),
        (HEAD + b"Transfer-Encoding: gzip, chunked", 501),
    ],
)
def test_malformed_request_heads(start: bytes, status: int) -> None:
    """A clear start line, exactly one Host, at most 100 fields, framing without doubt: all else is refused, and soon."""
    began = time.process_time()
    with pytest.raises(app.BadMessage) as caught:
        app.request_body_decoder(app.parse_request_head(start + b"\r\n\r\n"), 999)
    assert caught.value.status == status and time.process_time() - began < 0.5


CHUNKED = b"5\r\nhello\r\n1;ext=1\r\n \r\nA\r\n0123456789\r\n000\r\nTrailer: x\r\n\r\n"


@pytest.mark.parametrize(("wire", "body"), [(CHUNKED, b"hello 0123456789"), (b"", b""), (b"b", b"b"), (b"b" * 50, b"b" * 50)])
def test_decoders_at_every_cut_and_by_byte(wire: bytes, body: bytes) -> None:
    """However it is cut, the body is the same, and the bytes after it are kept apart; trailers and extensions are dropped."""
    sent = wire + b"NEXT"
    for places in [*([0, at, len(sent)] for at in range(len(sent) + 1)), range(len(sent) + 1)]:
        decoder = app.ChunkedDecoder(100) if wire == CHUNKED else app.LengthDecoder(len(body))
        received, rest = b"", b""
        for start, end in itertools.pairwise(places):
            if decoder.done:
                rest += sent[start:end]
            else:
                received += decoder.feed(sent[start:end])
                rest += decoder.surplus
        assert (received, rest, decoder.done, decoder.until_end) == (body, b"NEXT", True, False)


@pytest.mark.parametrize(
    ("status", "wires"),
    [
        (400, [b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"5_0\r\n", b"-1\r\n", b" 5\r\nhello\r\n", b"5\nhello\r\n", b"g\r\n", b"\r\n", b"{"]),
        (400, [b"5\r\nhelloX\r\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\rX", b"1" * 20 + b"\r\n", b"5;" + b"x" * 300, b"5;a\rb\r\nhello\r\n"]),
        (400, [b"0\r\nbad trailer\r\n\r\n", b"0\r\nA: b\nC: d\r\n\r\n", b"0\r\n" + b"A: b\r\n" * 2000]),
        (413, [b"3e9\r\n", b"ffffffff\r\n", b"5\r\nhello\r\n3e4\r\n"]),
    ],
)
def test_malformed_chunks_are_refused_whole_and_by_byte(status: int, wires: list[bytes]) -> None:
    """Sizes are hex digits, and bounded together; lines end with CRLF; extensions and trailers are bounded."""
    for wire, step in itertools.product(wires, (1, 10_000)):
        decoder = app.ChunkedDecoder(1000)
        with pytest.raises(app.BadMessage) as caught:
            for at in range(0, len(wire), step):
                decoder.feed(wire[at : at + step])
        assert caught.value.status == status


def test_framing() -> None:
    """Length, equal lengths and chunked; a reply of neither ends with its connection; HEAD, 204 and 304 have no body."""

    def of_request(lines: bytes) -> app.Decoder | None:
        return app.request_body_decoder(app.parse_request_head(HEAD + lines + b"\r\n"), 10)

    def of_reply(lines: bytes, status: int = 200, method: str = "GET") -> app.Decoder:
        return app.reply_body_decoder(app.parse_response_head(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, lines)), method)

    for decoder in (of_request(b"Content-Length: 3\r\nContent-Length: 3\r\n"), of_reply(b"Content-Length: 3\r\n")):
        assert decoder is not None and decoder.feed(b"abcd") == b"abc" and decoder.done and decoder.surplus == b"d"
    assert of_request(b"") is None and of_request(b"Content-Length: 0\r\n") is None
    for chunked in (of_request(b"Transfer-Encoding: chunked\r\n"), of_reply(b"Transfer-Encoding: Chunked\r\n")):
        assert isinstance(chunked, app.ChunkedDecoder)
    for status, method in ((204, "GET"), (304, "GET"), (200, "HEAD")):
        assert of_reply(b"Content-Length: 3\r\n", status, method).done
    endless = of_reply(b"")
    assert endless.feed(b"a" * 9) == b"a" * 9 and endless.until_end and not endless.done
    for lines in (b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Length: x\r\n"):
        with pytest.raises(app.BadMessage):
            of_reply(lines)


def test_what_is_forwarded() -> None:
    """Hop-by-hop fields, credentials, cookies and what Connection names are dropped; a reply's lines show no secret."""
    lines = b"Authorization: k\r\nX-Api-Key: k\r\nCookie: c\r\nX-Forwarded-Host: f\r\nProxy-X: p\r\nTE: t\r\nConnection: X-B\r\nX-B: b\r\n"
    for _ in range(2):  # parsed, and from the cache
        assert app.parse_request_head(HEAD + lines + b"X-Keep: y\r\n\r\n").lines == b"X-Keep: y\r\n"
    reply = app.parse_response_head(REPLY + b"Set-Cookie: a\r\nRetry-After: 1\r\nX-Forwarded-A: y\r\n\r\n")
    assert reply.lines == b"Retry-After: 1\r\nX-Forwarded-A: y\r\n"
    assert app.without(reply.lines, app.RETRY_FIELDS) == b"X-Forwarded-A: y\r\n"
    for secrets in ((), ("secret-value",), ()):
        app.redactor.watch(secrets)
        value = b"***" if secrets else b"secret-value"
        assert app.parse_response_head(REPLY + b"X-Echo: secret-value\r\n\r\n").lines == b"X-Echo: %b\r\n" % value


def test_header_lines_are_cached_within_bounds() -> None:
    """Lines with credentials and long lines are not cached; the cache is bounded."""
    app.REQUEST_LINES.clear()
    for line in (b"Authorization: k", b"X-Long: " + b"x" * app.CACHED_LINE_BYTES):
        app.parse_request_head(HEAD + line + b"\r\n\r\n")
    assert list(app.REQUEST_LINES) == [b"Host: h"]
    for number in range(2 * app.CACHED_LINES):
        app.parse_request_head(HEAD + b"X-N: %d\r\n\r\n" % number)
    assert len(app.REQUEST_LINES) <= app.CACHED_LINES


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("/v1/%6dodels?x=%20", ("", "/v1/models", "x=%20")),
        ("http://h:1/p?q", ("h:1", "/p", "q")),
        ("HTTPS://h", ("h", "/", "")),
        ("*", ("", "*", "")),
        *((bad, None) for bad in ("x/y", "/a%20b", "/a%0d%0ab")),
    ],
)
def test_targets(target: str, parts: tuple[str, str, str] | None) -> None:
    """Origin-form, absolute-form and percent-encoding; a hidden space or control character is refused."""
    if parts is None:
        with pytest.raises(app.BadMessage):
            app.split_target(target)
    else:
        assert app.split_target(target) == parts


def test_lines_of_an_answer() -> None:
    """A status line has the registered phrase or none; a date is in GMT."""
    assert (app.status_line(404), app.status_line(599)) == (b"HTTP/1.1 404 Not Found\r\n", b"HTTP/1.1 599 \r\n")
    assert app.http_date(784111777.9) == b"Sun, 06 Nov 1994 08:49:37 GMT"




# ---- forms

TYPE = b"multipart/form-data; boundary=xx"
MODEL = b'--xx\r\nContent-Disposition: form-data; name="model"\r\n\r\nm-1\r\n'
FILE = b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n\x00\r\n--x\r\n'
DOTNET = b"--xx\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name=Stream\r\n\r\ntrue\r\n"
END = b"--xx--\r\n"


def test_values_of_a_form() -> None:
    """Values are found as Python's, Go's and .NET's clients write them, in bytes and in a mapped file."""
    form = MODEL + FILE + DOTNET + END
    with tempfile.TemporaryFile() as file:
        file.write(form)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            spans = app.form_spans(mapped, b'Multipart/Form-Data; boundary="xx"')
    assert {name: form[start:end] for name, (start, end) in spans.items()} == {
        b"model": b"m-1", b"file": b"\x00\r\n--x", b"stream": b"true"
    }  # fmt: skip
    assert app.form_spans(form, TYPE) == spans and app.form_spans(form[:-2], b"multipart/form-data;boundary=xx") == spans


OTHER = b'Content-Disposition: form-data; name="model"\r\n\r\nother\r\n'
IN_HEAD = b"--xx\r\nContent-Disposition: form-data; %b\r\n\r\nother\r\n"


@pytest.mark.parametrize(
    "odd",
    [
        *(b"--xx \r\n" + OTHER, b"--xx\n" + OTHER, b"\n--xx\r\n" + OTHER, b"--xx--\r\n--xx\r\n" + OTHER, b"--xxy\r\n" + OTHER, b"--xx"),
        FILE[:-2] + b"--xx\r\n" + OTHER,
        b'--xx\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n--xx\r\n' + OTHER,
        b"--xx\r\nContent-Type: text/plain\n" + OTHER,
        b"--xx\r\nContent-Disposition : form-data; name=model\r\n\r\nother\r\n",
        b"--xx\r\nX-A: 1\r\n\r\nother\r\n",
        b"--xx\r\nContent-Disposition: form-data; name=x\r\n" + OTHER,
        b"--xx\r\nX: Content-Disposition: form-data; name=x\r\n" + OTHER,
        *(IN_HEAD % b"\r\n name=model", IN_HEAD % b"name*=utf-8''mod%65l", IN_HEAD % b"name*0=mod; name*1=el", IN_HEAD % b"name=x; name=model"),
        *(IN_HEAD % b'name="mo\\del"', IN_HEAD % b'name="model', IN_HEAD % b'name="mod%65l"', IN_HEAD % b'name=x; y="\\"; name=model; z="'),
        *(IN_HEAD % b'name="x"; filename="a"; name=model', IN_HEAD % b'name="x"; filename="a"; name*0=model', b"--xx\r\n" + OTHER),
    ],
)
def test_forms_that_readers_could_read_differently(odd: bytes) -> None:
    """A form is refused if an upstream could find another model in it, or two."""
    assert app.form_spans(MODEL + FILE + END, TYPE)
    with pytest.raises(app.ProxyError):
        app.form_spans(MODEL + odd + FILE + END, TYPE)


KINDS = (b"", b"multipart/form-data", b"application/json; boundary=xx", b"multipart/form-data; xboundary=xx")
BOUNDARIES = (b"xx; boundary=b", b"xx; boundary*=utf-8''b", b"xx,b", b'"xx', b'"x\\x"', b"x" * 71, b'"xx "', b"xx b")


@pytest.mark.parametrize("kind", [*KINDS, *(b"multipart/form-data; boundary=" + value for value in BOUNDARIES)])
def test_a_form_needs_one_plain_boundary(kind: bytes) -> None:
    """Other content types, and boundaries that two readers could read differently, are refused."""
    form = MODEL + END
    with pytest.raises(app.ProxyError):
        app.form_spans(form.replace(b"xx", b"xx b") if kind.endswith(b"xx b") else form, kind)


def test_a_form_is_bounded() -> None:
    """Anything before the first boundary, a missing end and too many parts are refused."""
    for form in (b"", b"\r\n" + MODEL + END, MODEL, MODEL + FILE, END + b"x", MODEL + FILE * app.FORM_PARTS + END):
        with pytest.raises(app.ProxyError):
            app.form_spans(form, TYPE)
