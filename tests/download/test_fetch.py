"""The guarded fetch against a server that does what the web does at its worst."""

import errno
import gzip
import io
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.message import Message
from typing import Any

import pytest
import trustme

from arrag_runtime.format.errors import BadInputError
from schemas.records import REASONS
from schemas.settings.download import DownloadSettings
from stages.download.engine import load_engine
from stages.download.fetch import Fetcher, is_disallowed, user_agent
from stages.download.web_address import FetchError, why_blocked
from tests.conftest import jpeg
from tests.worlds.servers.web import (
    Page,
    Web,
    answer,
    drip,
    endless,
    port_without_answers,
    raw,
    redirect,
    serve,
    silent,
)

PICTURE = jpeg(1)
SETTINGS = DownloadSettings(timeout=10, max_bytes=100_000, allow_private_hosts=True)
HASTY = replace(SETTINGS, timeout=0.6)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(bytes(100_000_000))


def outcome(fetcher: Fetcher, url: str) -> bytes | str:
    """The body, or the reason why there is none."""
    try:
        with fetcher.fetch(url) as body:
            return body.read()
    except FetchError as error:
        refusal = error
    assert refusal.reason in REASONS
    assert refusal.detail.isprintable()
    assert 0 < len(refusal.detail) <= 300
    return refusal.reason


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serve({}) as server:
        yield server


@pytest.fixture(scope="module")
def fetcher() -> Iterator[Fetcher]:
    with Fetcher(SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def hasty() -> Iterator[Fetcher]:
    with Fetcher(HASTY) as made:
        yield made


HOSTILE: dict[str, tuple[Page, bytes | str]] = {
    "a picture": (answer(PICTURE), PICTURE),
    "no length, up to the end": (raw(HEAD + b"\r\n" + PICTURE), PICTURE),
    "chunked": (raw(CHUNKED + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nA: b\r\n\r\n"), b"abcde"),
    "HTTP/1.0": (raw(b"HTTP/1.0 200 OK\r\n\r\nabc"), b"abc"),
    "203": (answer(b"abc", "203 Non-Authoritative"), b"abc"),
    "HTML as .jpg": (answer(b"<html>", Content_Type="image/jpeg"), b"<html>"),
    "an empty body": (answer(b""), "empty"),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "empty"),
    "304": (raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "http-other"),
    "400": (answer(b"?", "400 Bad Request"), "http-other"),
    "401": (answer(b"?", "401 Unauthorized"), "http-403"),
    "403": (answer(b"?", "403 Forbidden"), "http-403"),
    "404 with a picture": (answer(PICTURE, "404 Not Found"), "http-404"),
    "410": (answer(b"?", "410 Gone"), "http-404"),
    "429": (answer(b"?", "429 Too Many Requests", Retry_After="1"), "http-429"),
    "451": (answer(b"?", "451 Unavailable For Legal Reasons"), "http-403"),
    "500": (answer(b"?", "500 Oops"), "http-5xx"),
    "503": (answer(b"?", "503 Busy"), "http-5xx"),
    "a terminal's escapes": (raw(b"HTTP/1.1 500 \x1b[2J\x00\r\n\r\n"), "http-5xx"),
    "999": (answer(b"?", "999 Request denied"), "http-other"),
    "a status that is no number": (raw(b"HTTP/1.1 abc OK\r\n\r\n"), "broken-response"),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.0\r\n"), "broken-response"),
    "HTTP/0.9": (raw(PICTURE), "broken-response"),
    "nothing and the end": (raw(b""), "broken-response"),
    "half a header": (raw(HEAD + b"Content-Le"), "empty"),
    "too many headers": (raw(HEAD + b"A: b\r\n" * 101 + b"\r\n"), "broken-response"),
    "a long header": (raw(HEAD + b"A: " + b"b" * 70_000 + b"\r\n\r\n"), "broken-response"),
    "endless headers": (endless(HEAD, b"A: " + b"b" * 60_000 + b"\r\n"), "broken-response"),
    "endless 100 Continue": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "broken-response"),
    "a null in a header": (raw(HEAD + b"A: \0\r\nContent-Length: 3\r\n\r\nabc"), b"abc"),
    "an odd header": (raw(HEAD + b"no colon\r\nContent-Length: 3\r\n\r\nabc"), b"abc"),
    "a negative length": (raw(HEAD + b"Content-Length: -5\r\n\r\nabc"), b"abc"),
    "a length that is no number": (raw(HEAD + b"Content-Length: 9x\r\n\r\nabc"), b"abc"),
    "a length too small": (answer(b"abcdef", length=3), b"abc"),
    "a length too large": (answer(b"abc", length=9), "broken-response"),
    "a length over the cap": (answer(b"abc", length=100_001), "too-large"),
    "a body over the cap": (raw(HEAD + b"\r\n" + bytes(100_001)), "too-large"),
    "a body just at the cap": (answer(bytes(100_000)), bytes(100_000)),
    "an endless body": (endless(HEAD + b"\r\n", bytes(65536)), "too-large"),
    "endless chunks": (endless(CHUNKED, b"400\r\n" + bytes(1024) + b"\r\n"), "too-large"),
    "endless trailers": (endless(CHUNKED + b"1\r\na\r\n0\r\n", b"A: bbbb\r\n" * 99), "too-large"),
    "chunked garbage": (raw(CHUNKED + b"zz\r\nabc"), "broken-response"),
    "a negative chunk": (raw(CHUNKED + b"-1\r\nabc"), "broken-response"),
    "another negative chunk": (raw(CHUNKED + b"-5\r\nabc"), "broken-response"),
    "a chunk cut short": (raw(CHUNKED + b"9\r\nabc"), "broken-response"),
    "a chunk of many bytes": (raw(CHUNKED + b"FFFFFFFFFFFF\r\nabc"), "broken-response"),
    "chunks without an end": (raw(CHUNKED + b"3\r\nabc\r\n"), "broken-response"),
    "gzip": (answer(gzip.compress(PICTURE), Content_Encoding="gzip"), PICTURE),
    "deflate": (answer(zlib.compress(PICTURE), Content_Encoding="Deflate"), PICTURE),
    "gzip only by name": (answer(PICTURE, Content_Encoding="gzip"), PICTURE),
    "another encoding": (answer(b"abc", Content_Encoding="br"), b"abc"),
    "a gzip bomb": (answer(BOMB, Content_Encoding="gzip"), "too-large"),
    "gzip cut short": (
        answer(gzip.compress(PICTURE)[:-20], Content_Encoding="gzip"),
        "broken-response",
    ),
    "broken gzip": (answer(b"\x1f\x8b" + bytes(99), Content_Encoding="gzip"), "broken-response"),
    "silence": (silent, "timeout"),
    "headers that drip": (drip(HEAD + b"Content-Length: 3\r\n\r\nabc", 0.3), "timeout"),
    "a body that drips": (drip(HEAD + b"Content-Length: 99\r\n\r\n" + bytes(99), 0.05), "timeout"),
    "chunks that drip": (drip(CHUNKED + b"1\r\na\r\n" * 99, 0.05), "timeout"),
    "noai": (answer(PICTURE, X_Robots_Tag="noai"), "disallowed"),
    "noindex among others": (answer(PICTURE, X_Robots_Tag="All, NoIndex"), "disallowed"),
    "noimageai for us": (answer(PICTURE, X_Robots_Tag="arrag: noimageai"), "disallowed"),
    "noai for another": (answer(PICTURE, X_Robots_Tag="otherbot: noai"), PICTURE),
    "robots may": (answer(PICTURE, X_Robots_Tag="all, nofollow"), PICTURE),
    "to a file": (redirect("file:///etc/passwd"), "bad-url"),
    "to data": (redirect("data:image/png;base64,AAAA"), "bad-url"),
    "to ftp": (redirect("ftp://a.example/x"), "bad-url"),
    "to no URL": (redirect("http://[::1"), "bad-url"),
    "to a user name": (redirect("http://a@127.0.0.1/"), "bad-url"),
    "to nowhere": (answer(b"?", "302 Found"), "http-other"),
    "to itself": (redirect(""), "http-other"),
    "300": (redirect("/picture", "300 Multiple Choices"), "http-other"),
    "relative": (redirect("picture"), PICTURE),
    "with spaces": (redirect(" /a b?c d "), b"spaces"),
    "in UTF-8": (answer(status="301 Moved", Location="/é".encode().decode("latin-1")), b"accent"),
    "307": (redirect("/picture", "307 Temporary Redirect"), PICTURE),
    "308": (redirect("/picture", "308 Permanent Redirect"), PICTURE),
    "a loop": (redirect("/loop"), "too-many-redirects"),
}
"""Each page with the body or the reason that must come of it."""


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers(case: str, web: Web, fetcher: Fetcher, hasty: Fetcher) -> None:
    page, expected = HOSTILE[case]
    chosen = hasty if expected == "timeout" else fetcher
    web.pages.update(
        {
            "/loop": redirect("/loop"),
            "/picture": answer(PICTURE),
            "/a%20b?c%20d": answer(b"spaces"),
            "/%C3%A9": answer(b"accent"),
            "/case": page,
        }
    )
    started = time.monotonic()
    assert outcome(chosen, web.url("/case")) == expected
    assert time.monotonic() - started < SETTINGS.timeout


def chain(length: int) -> dict[str, Page]:
    """Redirects in a row, and a picture at their end."""
    pages: dict[str, Page] = {f"/{n}": redirect(f"/{n + 1}") for n in range(length)}
    return pages | {f"/{length}": answer(PICTURE)}


@pytest.mark.parametrize(("redirects", "expected"), [(5, PICTURE), (6, "too-many-redirects")])
def test_five_redirects_are_followed_and_no_more(
    redirects: int, expected: bytes | str, fetcher: Fetcher
) -> None:
    with serve(chain(redirects)) as web:
        assert outcome(fetcher, web.url("/0")) == expected
        assert web.paths() == [f"/{n}" for n in range(6)]


def named(**hosts: str) -> Callable[[str, int], Sequence[str]]:
    """A resolver that knows these names (with "_" for ".") and no other."""

    def resolve(host: str, _port: int) -> Sequence[str]:
        try:
            return hosts[host.replace(".", "_")].split()
        except KeyError:
            raise OSError("Name or service not known") from None

    return resolve


def test_private_hosts_are_not_even_connected_to() -> None:
    """Neither by address nor by name nor by a redirect; a public one is passed on."""
    settings = DownloadSettings(timeout=10)
    resolve = named(inside_example="127.0.0.1", both_example="1.1.1.1 127.0.0.1")
    with serve({"/": answer(PICTURE)}) as web, Fetcher(settings, resolve=resolve) as guarded:
        for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "inside.example", "both.example"):
            assert outcome(guarded, web.url("/", host)) == "blocked-address"
        assert outcome(guarded, "http://nowhere.example/") == "dns"
        assert web.requests == []


def test_a_redirect_to_a_private_host_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server counts as public here, the one that it sends us to does not."""
    public = "127.0.0.9"
    monkeypatch.setattr(
        "stages.download.web_address.why_blocked",
        lambda ip: None if ip == public else why_blocked(ip),
    )
    resolve = named(public_example=public, inside_example="127.0.0.1")
    with (
        serve({"/": answer(PICTURE)}) as inside,
        Fetcher(DownloadSettings(timeout=10), resolve=resolve) as guarded,
    ):
        for target in (inside.url("/"), inside.url("/", "inside.example")):
            with serve({"/": redirect(target)}, address=public) as web:
                assert outcome(guarded, web.url("/", "public.example")) == "blocked-address"
                assert web.paths() == ["/"]
        assert inside.requests == []


def test_the_name_is_sent_and_the_checked_address_connected_to() -> None:
    """A resolver that changes its mind between two look-ups has only one."""
    answers = iter(["127.0.0.1", "127.0.0.2"])
    with serve({"/x?y": answer(PICTURE)}) as web:
        with Fetcher(SETTINGS, resolve=lambda _host, _port: [next(answers)]) as fetcher:
            assert outcome(fetcher, web.url("/x?y", "a.example")) == PICTURE
            assert outcome(fetcher, web.url("/x?y", "a.example")) == PICTURE
        lines = web.requests[0].decode().split("\r\n")
    assert lines[0] == "GET /x?y HTTP/1.1"
    assert f"Host: a.example:{web.port}" in lines
    assert f"User-Agent: {user_agent(None)}" in lines


def test_the_next_address_is_tried_when_one_is_dead() -> None:
    resolve = named(a_example="127.0.0.77 127.0.0.1")
    with serve({"/": answer(PICTURE)}) as web, Fetcher(SETTINGS, resolve=resolve) as fetcher:
        assert outcome(fetcher, web.url("/", "a.example")) == PICTURE


def test_a_kernel_without_ipv6_is_no_fault_of_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of that kind is passed over; a host that has no other is refused, like any."""
    real = socket.socket

    def made(family: int = socket.AF_INET, *args: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *args, **options)

    resolve = named(both_example="::1 127.0.0.1", six_example="::1")
    with serve({"/": answer(PICTURE)}) as web, Fetcher(SETTINGS, resolve=resolve) as fetcher:
        monkeypatch.setattr("stages.download.fetch.socket.socket", made)
        assert outcome(fetcher, web.url("/", "both.example")) == PICTURE
        assert outcome(fetcher, web.url("/", "six.example")) == "refused"


def test_a_closed_port_is_refused(fetcher: Fetcher) -> None:
    with serve({}) as web:
        gone = web.url()
    assert outcome(fetcher, gone) == "refused"


def test_a_deadline_before_the_urls_own_counts(web: Web, fetcher: Fetcher) -> None:
    web.pages["/silent"] = silent
    started = time.monotonic()
    with pytest.raises(FetchError, match="timeout"):
        fetcher.fetch(web.url("/silent"), started + 0.2)
    assert time.monotonic() - started < 1


def test_a_large_body_lies_on_disk() -> None:
    """Only what is small is held in memory; the whole of it comes back."""
    body = bytes(range(256)) * 20_000
    settings = DownloadSettings(timeout=5, allow_private_hosts=True)
    with (
        serve({"/": answer(body)}) as web,
        Fetcher(settings) as fetcher,
        fetcher.fetch(web.url()) as file,
    ):
        assert not isinstance(file._file, io.BytesIO)  # type: ignore[attr-defined]
        assert file.read() == body


@dataclass(frozen=True)
class Authorities:
    """Certificates: of an authority that is trusted here, and of one that nobody knows."""

    ours: trustme.CA
    strange: trustme.CA

    def trusting(self) -> ssl.SSLContext:
        """A client's settings that trust the first."""
        context = ssl.create_default_context()
        self.ours.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def authorities() -> Authorities:
    return Authorities(trustme.CA(), trustme.CA())


def server_side(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
CERTIFICATES: dict[str, tuple[Callable[[Authorities], trustme.LeafCert], bytes | str]] = {
    "good": (lambda a: a.ours.issue_cert("good.example"), PICTURE),
    "wrong host": (lambda a: a.ours.issue_cert("other.example"), "tls"),
    "its address only": (lambda a: a.ours.issue_cert("127.0.0.1"), "tls"),
    "unknown authority": (lambda a: a.strange.issue_cert("good.example"), "tls"),
    "expired": (lambda a: a.ours.issue_cert("good.example", not_after=YESTERDAY), "tls"),
}


@pytest.mark.parametrize("kind", CERTIFICATES)
def test_certificates_are_verified(kind: str, authorities: Authorities) -> None:
    """Against the name in the URL, although the connection is made to an address."""
    issue, expected = CERTIFICATES[kind]
    names: list[str | None] = []
    tls = server_side(issue(authorities))
    tls.sni_callback = lambda _socket, name, _context: names.append(name)
    resolve = named(good_example="127.0.0.1")
    with (
        serve({"/": answer(PICTURE)}, tls) as web,
        Fetcher(SETTINGS, resolve=resolve, tls=authorities.trusting()) as fetcher,
    ):
        assert outcome(fetcher, web.url("/", "good.example")) == expected
    assert names == ["good.example"]


def test_a_certificate_for_an_address(authorities: Authorities) -> None:
    tls = server_side(authorities.ours.issue_cert("127.0.0.1"))
    with serve({"/": answer(PICTURE)}, tls) as web:
        with Fetcher(SETTINGS, tls=authorities.trusting()) as fetcher:
            assert outcome(fetcher, web.url()) == PICTURE
        with Fetcher(SETTINGS) as fetcher:
            assert outcome(fetcher, web.url()) == "tls"


def test_https_where_there_is_none(web: Web, fetcher: Fetcher, hasty: Fetcher) -> None:
    assert outcome(fetcher, web.url().replace("http:", "https:")) == "tls"
    with port_without_answers() as port:
        assert outcome(hasty, f"https://127.0.0.1:{port}/") == "timeout"


HEADERS = [
    ([], False),
    (["noai"], True),
    (["NOINDEX"], True),
    (["nofollow, noimageindex"], True),
    (["nofollow"], False),
    (["arrag: noai"], True),
    (["Arrag: nofollow, noindex"], True),
    (["otherbot: noai"], False),
    (["otherbot: noai", "noai"], True),
    (["noindex,noai , x"], True),
    (["no ai"], False),
    ([""], False),
    ([":"], False),
    (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
]


@pytest.mark.parametrize(("values", "expected"), HEADERS)
def test_robots_tags_are_read_as_img2dataset_does(values: list[str], expected: bool) -> None:
    headers = Message()
    for value in values:
        headers.add_header("X-Robots-Tag", value)
    directives = {"noai", "noimageai", "noindex", "noimageindex"}
    theirs = load_engine().is_disallowed(headers, "arrag", directives)
    assert is_disallowed(headers) == expected == theirs


def test_a_robots_tag_that_img2dataset_misses_is_respected() -> None:
    headers = Message()
    headers.add_header("X-Robots-Tag", "noindex, unavailable_after: 25 Jun 2010")
    assert is_disallowed(headers)


def test_the_agent_names_itself_and_its_contact() -> None:
    assert user_agent("mailto:me@a.example").startswith("arrag/")
    assert user_agent("mailto:me@a.example").endswith(" (+mailto:me@a.example)")
    for contact in ("", "two words", "a\r\nX: y", "(a)", "é"):
        with pytest.raises(BadInputError, match="--user-agent-contact"):
            user_agent(contact)
