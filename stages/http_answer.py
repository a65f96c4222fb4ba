"""What a server's answer comes to: usable or not, and the bytes of its body.

In: an answer whose headers have been read. Out: nothing or a `FetchError`, then the body in small
pieces. Consent is part of it: a server may say that its pictures are not for this use.
"""

import http.client
import zlib
from collections.abc import Iterator
from email.message import Message

from stages.web_address import FetchError

AGENT = "arrag"
NO_USE = frozenset(("noai", "noimageai", "noindex", "noimageindex"))
"""Directives of X-Robots-Tag that img2dataset respects by default, and so do we."""

BY_STATUS = {401: "http-403", 403: "http-403", 451: "http-403", 429: "http-429"}
BY_STATUS |= {404: "http-404", 410: "http-404"}
COMPRESSED = {b"\x1f\x8b", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"}
"""How compressed bodies begin; no picture begins so."""

CHUNK = 64 * 1024


def decoded(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body in small pieces, decompressed where it is compressed although nobody asked for it."""
    label = response.headers.get("Content-Encoding", "").strip().lower()
    chunk = response.read(CHUNK)
    if label not in ("gzip", "x-gzip", "deflate") or chunk[:2] not in COMPRESSED:
        while chunk:
            yield chunk
            chunk = response.read(CHUNK)
        return
    inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
    while chunk and not inflate.eof:
        while chunk and not inflate.eof:
            yield inflate.decompress(chunk, CHUNK)
            chunk = inflate.unconsumed_tail
        chunk = response.read(CHUNK)
    while not inflate.eof and (rest := inflate.decompress(b"", CHUNK)):
        yield rest
    if not inflate.eof:
        raise EOFError("the compressed body ends early")


def require_usable(response: http.client.HTTPResponse) -> None:
    """Raise FetchError for a status that is no success, and where the server forbids the use."""
    status = response.status
    if not 200 <= status < 300:
        reason = BY_STATUS.get(status, "http-5xx" if 500 <= status < 600 else "http-other")
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
        if not for_all and agent.strip().lower() != AGENT:
            continue
        directives = (str(value) if for_all else listed).split(",")
        if any(directive.strip().lower() in NO_USE for directive in directives):
            return True
    return False
