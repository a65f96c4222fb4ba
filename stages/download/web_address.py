"""Which addresses a download may go to: a URL is taken apart, every address of its host checked.

In: a URL from outside. Out: a `WebAddress`, then the IP addresses to connect to. The connection is
made to the very address that was checked, so a name that is looked up twice with two answers
gains nothing. No proxy is used, since behind one the address could not be checked.
"""

import ipaddress
import re
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

_PORTS = {"http": 80, "https": 443}
_LONGEST = 8192
"""Characters a URL may have; servers refuse longer ones themselves."""
_LONGEST_DETAIL = 300
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_NAME = re.compile(r"[a-z0-9_.-]{1,253}")
_SAFE = "/%:@!$&'()*+,;=~"
"""What stays as it is in a path, next to letters, digits, "-", "_" and "."."""
_LOOKUPS = 64
"""Threads that look up names: one that hangs cannot be stopped, only left behind."""
_REMEMBERED, _REMEMBER_FOR = 20_000, 60.0
"""Names whose addresses are remembered, and for how many seconds."""
_CLOSED = {
    ipaddress.IPv4Network("192.0.0.0/24"): "reserved (and Oracle's metadata service)",
    ipaddress.IPv4Network("192.88.99.0/24"): "a relay of 6to4",
    ipaddress.IPv4Network("168.63.129.16/32"): "Azure's metadata service",
}
"""Networks that Python's ipaddress does not call private in every version."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TEREDO = ipaddress.IPv6Network("2001::/32")
_GLOBAL = ipaddress.IPv6Network("2000::/3")
Resolve = Callable[[str, int], Sequence[str]]
"""(host, port) → IP addresses. Raises OSError where the name has none."""


class FetchError(Exception):
    """A URL gave nothing usable. `reason` is one of `schemas.records.REASONS`.

    `detail` is one printable line, since parts of it come from outside and reach terminals.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = "".join(c if c.isprintable() else "?" for c in detail[:_LONGEST_DETAIL])
        super().__init__(f"{reason}: {self.detail}")


@dataclass(frozen=True)
class WebAddress:
    """A URL taken apart, as a connection needs it."""

    scheme: str
    """"http" or "https"."""
    host: str
    """The host in lower case and ASCII, without brackets."""
    port: int
    """The port, the scheme's own where the URL names none."""
    target: str
    """Path and query as they are sent."""

    @property
    def host_header(self) -> str:
        """The value of the request's Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> WebAddress:
    """Take a URL apart. Raises FetchError (bad-url) for what is no plain http or https URL.

    Spaces, quotes and letters outside ASCII in path and query are percent-encoded, as browsers
    do; in a host, letters outside ASCII become IDNA. A user name in a URL is refused, since its
    only use in a published list is to make a host look like another one.
    """
    text = url.strip()
    if len(text) > _LONGEST:
        raise FetchError("bad-url", f"{len(text)} characters long")
    if _CONTROL.search(text):
        raise FetchError("bad-url", "holds a control character")
    scheme = text.partition(":")[0].lower()
    if scheme not in _PORTS:
        raise FetchError("bad-url", f"scheme {scheme[:20]!r} is not http or https")
    try:
        parts = urlsplit(text)
        port = parts.port if parts.port is not None else _PORTS[scheme]
        host = _host(parts.hostname or "", bracketed="[" in parts.netloc)
        path, query = quote(parts.path or "/", _SAFE), quote(parts.query, _SAFE + "?[]")
    except ValueError as error:
        raise FetchError("bad-url", str(error)) from error
    if "@" in parts.netloc:
        raise FetchError("bad-url", "a user name stands before the host")
    if port == 0:
        raise FetchError("bad-url", "port 0")
    return WebAddress(scheme, host, port, f"{path}?{query}" if query else path)


def _host(host: str, *, bracketed: bool) -> str:
    """The host in ASCII. Raises ValueError (UnicodeError is one) for what can be none."""
    if bracketed:
        if "%" in host:
            raise ValueError(f"host [{host}] names an interface of this machine")
        return str(ipaddress.IPv6Address(host))
    name = host if host.isascii() else host.encode("idna").decode("ascii").lower()
    if not _NAME.fullmatch(name) or not name.strip("."):
        raise ValueError(f"{host[:80]!r} is no host name")
    return name


def why_blocked(address: str) -> str | None:
    """Why no download may go to this IP address; None where it may.

    Only public unicast addresses are open: not loopback, private, link-local (where clouds serve
    their metadata), carrier-grade NAT, multicast, reserved or unspecified ones, nor IPv6 addresses
    that lead to such an IPv4 one (mapped, 6to4, NAT64; Teredo always).
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            inner = why_blocked(str(embedded))
            return f"leads to {embedded}, {inner}" if inner else None
        if ip in _TEREDO:
            return "Teredo"
    for network, meaning in _CLOSED.items():
        if ip in network:
            return meaning
    for kind in ("loopback", "link_local", "multicast", "unspecified", "private", "reserved"):
        if getattr(ip, f"is_{kind}"):
            return kind.replace("_", "-")
    return "not public" if not ip.is_global or (ip.version == 6 and ip not in _GLOBAL) else None


def system_resolve(host: str, port: int) -> Sequence[str]:
    """The addresses that this machine's resolver knows for a host, each once, in its order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class HostLookup:
    """Looks hosts up within a deadline and checks every address; answers are remembered shortly."""

    def __init__(self, resolve: Resolve, *, allow_private: bool) -> None:
        self._resolve = resolve
        self._allow_private = allow_private
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")
        self._known: dict[str, tuple[float, Sequence[str]]] = {}

    def __call__(self, address: WebAddress, end: float) -> Sequence[str]:
        """The IP addresses of a host. end: when time is up, on `time.monotonic`'s clock.

        Raises FetchError: dns, or blocked-address where any one of them is not public.
        """
        until, found = self._known.get(address.host, (0.0, ()))
        if until < time.monotonic():
            found = self._look_up(address, end)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[address.host] = time.monotonic() + _REMEMBER_FOR, found
        for ip in () if self._allow_private else found:
            if why := why_blocked(ip):
                raise FetchError("blocked-address", f"{address.host} is at {ip}: {why}")
        return found

    def _look_up(self, address: WebAddress, end: float) -> Sequence[str]:
        with suppress(ValueError):
            ipaddress.ip_address(address.host)
            return (address.host,)
        asked = self._threads.submit(self._resolve, address.host, address.port)
        try:
            found = asked.result(timeout=max(0.0, end - time.monotonic()))
        except TimeoutError as error:
            asked.cancel()
            raise FetchError("dns", f"no answer for {address.host} in time") from error
        except (OSError, UnicodeError) as error:
            raise FetchError("dns", f"{address.host}: {error}") from error
        if not found:
            raise FetchError("dns", f"{address.host} has no address")
        return found

    def close(self) -> None:
        """Let the threads go; one that hangs ends when the system's resolver gives up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
