"""One URL to bytes: what the web may send at worst ends here, as a reason.

In: a URL from outside. Out: its body in an open file, in memory while it is small and otherwise in
a nameless temporary file ($TMPDIR). Every step is bounded: the addresses that may be connected to,
redirects, seconds in all (a slow drip counts), bytes of headers and body (counted while reading and
again after decompression). TLS is verified against the machine's certificates ($SSL_CERT_FILE).
Consent is part of it: a server may say that its pictures are not for this use.
"""

import errno
import http.client
import io
import re
import socket
import ssl
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any
from urllib.parse import urljoin

from arrag_runtime.format.errors import BadInputError
from schemas.settings.download import DownloadSettings
from stages.download.web_address import (
    FetchError,
    HostLookup,
    Resolve,
    WebAddress,
    parse_url,
    system_resolve,
)

_AGENT = "arrag"
_NO_USE = frozenset(("noai", "noimageai", "noindex", "noimageindex"))
"""Directives of X-Robots-Tag that img2dataset respects by default, and so do we."""
_BY_STATUS = {401: "http-403", 403: "http-403", 451: "http-403", 429: "http-429"}
_BY_STATUS |= {404: "http-404", 410: "http-404"}

_COMPRESSED = {b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"}
"""How compressed bodies begin; no picture begins so."""
_CHUNK = 64 * 1024


def _pieces_of(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body in small pieces, decompressed where it is compressed although nobody asked for it."""
    label = response.headers.get("Content-Encoding", "").strip().lower()
    chunk = response.read(_CHUNK)
    if label not in ("gzip", "x-gzip", "deflate") or chunk[:2] not in _COMPRESSED:
        while chunk:
            yield chunk
            chunk = response.read(_CHUNK)
        return
    inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
    while chunk and not inflate.eof:
        while chunk and not inflate.eof:
            yield inflate.decompress(chunk, _CHUNK)
            chunk = inflate.unconsumed_tail
        chunk = response.read(_CHUNK)
    while not inflate.eof and (rest := inflate.decompress(b"", _CHUNK)):
        yield rest
    if not inflate.eof:
        raise EOFError("the compressed body ends early")


def _require_usable(response: http.client.HTTPResponse) -> None:
    """Raise FetchError for a status that is no success, and where the server forbids the use."""
    status = response.status
    if not 200 <= status < 300:
        reason = _BY_STATUS.get(status, "http-5xx" if 500 <= status < 600 else "http-other")
        raise FetchError(reason, f"status {status} {response.reason[:80]}".rstrip())
    if is_disallowed(response.headers):
        raise FetchError("disallowed", "its X-Robots-Tag forbids this use")


def is_disallowed(headers: Message) -> bool:
    """Whether an X-Robots-Tag forbids the use, for all or for us.

    Read as img2dataset does: "noai, noindex" for all, "NAME: noai" for one. What it misses is
    respected too: directives for all before one that has a colon of its own.
    """
    for value in headers.get_all("X-Robots-Tag", []):
        agent, colon, listed = str(value).partition(":")
        for_all = not colon or "," in agent
        if not for_all and agent.strip().lower() != _AGENT:
            continue
        directives = (str(value) if for_all else listed).split(",")
        if any(directive.strip().lower() in _NO_USE for directive in directives):
            return True
    return False


_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_REDIRECTS = 5
"""Redirects that are followed, each checked like the first URL."""
_MAX_ADDRESSES = 4
"""Addresses of one host that are tried; each gets its share of the time that is left."""
_HEAD_BYTES = 256 * 1024
_FRAMING_BYTES = 1 << 20
_IN_MEMORY = 1 << 20


def user_agent(contact: str | None) -> str:
    """Who asks: name, version and how to reach the person who runs it.

    Raises BadInputError for a contact that does not fit a header.
    """
    try:
        name = f"{_AGENT}/{version(_AGENT)}"
    except PackageNotFoundError:  # A checkout that was sent to a cluster is not installed there.
        name = _AGENT
    if contact is None:
        return name
    if not re.fullmatch(r"[!-'*-~]+", contact):
        raise BadInputError(
            f"--user-agent-contact {contact!r} does not fit a header; write a URL or mail address"
        )
    return f"{name} (+{contact})"


class Fetcher:
    """Fetches URLs; may be shared by threads.

    Of the settings, `timeout` bounds all of a URL's seconds (look-up, connection, TLS, headers and
    body, redirects included), `max_bytes` its body as received and as decompressed.
    """

    def __init__(
        self,
        settings: DownloadSettings,
        *,
        resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._agent = user_agent(settings.contact)
        self._lookup = HostLookup(resolve, allow_private=settings.allow_private_hosts)
        self._tls = tls or ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._lookup.close()

    def fetch(self, url: str, deadline: float = float("inf")) -> IO[bytes]:
        """The body of a URL, open at its start; the caller closes it.

        deadline: on `time.monotonic`'s clock, where it comes before the URL's own seconds are up.
        Raises FetchError for all that the web can do, and OSError when the disk is full.
        """
        end = min(time.monotonic() + self._settings.timeout, deadline)
        for _ in range(_MAX_REDIRECTS + 1):
            address = parse_url(url)
            with self._connect(address, end) as connection:
                stream = _Stream(connection, end)
                try:
                    response = self._ask(address, stream)
                    onward = response.headers.get("Location")
                    if response.status not in _REDIRECTS or not onward:
                        _require_usable(response)
                        return self._body(response, stream)
                except TimeoutError as error:
                    raise FetchError("timeout", "the answer was not complete in time") from error
                except (http.client.HTTPException, EOFError, ValueError, zlib.error) as error:
                    raise FetchError("broken-response", _line(error)) from error
            url = _join(url, onward)
        raise FetchError("too-many-redirects", f"more than {_MAX_REDIRECTS}")

    def _connect(self, address: WebAddress, end: float) -> socket.socket:
        """A connection to an address that was checked. Raises FetchError."""
        found = self._lookup(address, end)[:_MAX_ADDRESSES]
        failed: OSError = TimeoutError("no time left")
        for tried, ip in enumerate(found):
            left = (end - time.monotonic()) / (len(found) - tried)
            if left <= 0:
                break
            try:
                plain = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
            except OSError as error:
                # A kernel without IPv6; want of anything else is no fault of this address.
                if error.errno != errno.EAFNOSUPPORT:
                    raise
                failed = error
                continue
            try:
                plain.settimeout(left)
                plain.connect((ip, address.port))
            except OSError as error:
                plain.close()
                failed = error
                continue
            return self._secured(plain, address, end) if address.scheme == "https" else plain
        if isinstance(failed, TimeoutError):
            raise FetchError("timeout", f"{address.host} does not take the connection")
        raise FetchError("refused", f"{address.host}: {failed}")

    def _secured(self, plain: socket.socket, address: WebAddress, end: float) -> socket.socket:
        try:
            plain.settimeout(max(0.001, end - time.monotonic()))
            return self._tls.wrap_socket(plain, server_hostname=address.host.rstrip("."))
        except TimeoutError as error:
            plain.close()
            raise FetchError("timeout", f"{address.host}: no TLS handshake in time") from error
        except (OSError, ValueError) as error:
            plain.close()
            raise FetchError("tls", f"{address.host}: {_line(error)}") from error

    def _ask(self, address: WebAddress, stream: "_Stream") -> http.client.HTTPResponse:
        """Send the request and read the answer's headers."""
        stream.send(
            f"GET {address.target} HTTP/1.1\r\nHost: {address.host_header}\r\n"
            f"User-Agent: {self._agent}\r\nAccept: image/*,*/*;q=0.5\r\n"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        # http.client asks nothing of a socket but a file to read from.
        source: Any = stream
        response = http.client.HTTPResponse(source, method="GET")
        response.begin()
        return response

    def _body(self, response: http.client.HTTPResponse, stream: "_Stream") -> IO[bytes]:
        limit = self._settings.max_bytes
        declared = response.length
        if declared is not None and declared > limit:
            raise FetchError("too-large", f"{declared} bytes declared, at most {limit} allowed")
        stream.limit = stream.received + limit + _FRAMING_BYTES
        # Closed by the caller, who gets it open.
        body = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        try:
            size = 0
            for piece in _pieces_of(response):
                size += len(piece)
                if size > limit:
                    raise FetchError("too-large", f"more than {limit} bytes")
                body.write(piece)
            if response.length:
                raise FetchError("broken-response", f"ended {response.length} bytes early")
            if not size:
                raise FetchError("empty", "the body has zero bytes")
            body.seek(0)
        except BaseException:
            body.close()
            raise
        return body


class _Stream(io.RawIOBase):
    """What comes over a connection, until a moment on `time.monotonic`'s clock and a byte count.

    Raises TimeoutError, or FetchError where the connection breaks: no other OSError, so that it
    cannot be mistaken for one of a full disk.
    """

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._connection = connection
        self._end = end
        self.received = 0
        self.limit = _HEAD_BYTES

    def readable(self) -> bool:
        return True

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client reads from."""
        return _Reader(self, _CHUNK)

    def send(self, request: bytes) -> None:
        """Send all of it."""
        with self._step():
            self._connection.sendall(request)

    def readinto(self, buffer: Any) -> int:
        with self._step():
            count = self._connection.recv_into(buffer)
        self.received += count
        if self.received > self.limit:
            reason = "broken-response" if self.limit == _HEAD_BYTES else "too-large"
            raise FetchError(reason, f"more than {self.limit} bytes came")
        return count

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Let a step on the connection take the time that is left and no more."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            yield
        except TimeoutError:
            raise
        except OSError as error:
            raise FetchError("broken-response", f"connection lost: {error}") from error


class _Reader(io.BufferedReader):
    """Refuses to read to the end at once, which a chunk of -1 bytes would make http.client do."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            raise http.client.HTTPException("a chunk of negative size")
        return super().read(size)


def _join(url: str, onward: str) -> str:
    """Where a redirect leads. Servers send UTF-8, which http.client reads as Latin-1."""
    try:
        return urljoin(url.strip(), onward.encode("latin-1").decode("utf-8", "replace").strip())
    except ValueError as error:
        raise FetchError("bad-url", f"redirected to no URL: {error}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
