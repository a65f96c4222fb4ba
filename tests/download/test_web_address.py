"""URLs taken apart, and the addresses that downloads may go to."""

import threading
import time
from collections.abc import Sequence

import pytest

from stages.download.web_address import FetchError, HostLookup, WebAddress, parse_url, why_blocked

ADDRESS = WebAddress("http", "a.example", 80, "/")


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "target"),
    [
        ("http://a.example", "http", "a.example", 80, "/"),
        ("  https://A.Example/x.jpg\n", "https", "a.example", 443, "/x.jpg"),
        ("HTTP://a.example:8080/a/../b?c=d&e#part", "http", "a.example", 8080, "/a/../b?c=d&e"),
        ('http://a.example/a b/"c".jpg', "http", "a.example", 80, "/a%20b/%22c%22.jpg"),
        ("http://a.example/é?ü=ñ", "http", "a.example", 80, "/%C3%A9?%C3%BC=%C3%B1"),
        ("http://a.example/%E9%zz", "http", "a.example", 80, "/%E9%zz"),
        ("http://a.example/a\\b", "http", "a.example", 80, "/a%5Cb"),
        ("http://bücher.example/", "http", "xn--bcher-kva.example", 80, "/"),
        ("http://例え.テスト/", "http", "xn--r8jz45g.xn--zckzah", 80, "/"),
        ("http://１２７.０.０.１/", "http", "127.0.0.1", 80, "/"),
        ("http://a_b.example./", "http", "a_b.example.", 80, "/"),
        ("https://[2001:DB8::1]:444/x", "https", "2001:db8::1", 444, "/x"),
        ("http://2130706433/", "http", "2130706433", 80, "/"),
        ("http://a.example?q", "http", "a.example", 80, "/?q"),
    ],
)
def test_a_url_is_taken_apart_as_browsers_do(
    url: str, scheme: str, host: str, port: int, target: str
) -> None:
    assert parse_url(url) == WebAddress(scheme, host, port, target)


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("", "scheme ''"),
        ("nonsense", "scheme 'nonsense'"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://a.example/x.jpg", "scheme 'ftp'"),
        ("data:image/png;base64,AAAA", "scheme 'data'"),
        ("gopher://a.example:70/_GET", "scheme 'gopher'"),
        ("//a.example/x.jpg", "scheme '//a.example/x.jpg'"),
        ("http:a.example", "no host name"),
        ("http:///x.jpg", "no host name"),
        ("http://./", "no host name"),
        ("http://a.example:port/", "Port could not be cast"),
        ("http://a.example:65536/", "Port out of range"),
        ("http://a.example:0/", "port 0"),
        ("http://user:secret@a.example/", "user name"),
        ("http://good.example@127.0.0.1/", "user name"),
        ("http://good.example\\@bad.example/", "user name"),
        ("http://good.example\\.bad.example/", "no host name"),
        ("http://a b.example/", "no host name"),
        ("http://a%2eexample/", "no host name"),
        ("http://a.example\r\nHost: b.example/", "control character"),
        ("http://a.example/x\ty", "control character"),
        ("http://a.example/\x00", "control character"),
        ("http://a.example/\ud800", "surrogates"),
        ("http://[::1/", "Invalid IPv6 URL"),
        ("http://[not.an.address]/", "'not.an.address'"),
        ("http://[fe80::1%25eth0]/", "interface"),
        ("http://a℀b.example/", "NFKC"),
        ("http://" + "ä" * 70 + ".example/", "label"),
        ("http://" + "a" * 254 + "/", "no host name"),
        ("http://a.example/" + "x" * 9000, "9017 characters"),
    ],
)
def test_what_is_no_web_address_is_refused(url: str, detail: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_url(url)
    assert caught.value.reason == "bad-url"
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "203.0.113.9",
        "168.63.129.16",
        "192.88.99.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "2002:7f00:1::",
        "2002:c0a8:101::",
        "2001:0:53aa:64c::1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2001:db8::1",
        "100::1",
        "5f00::1",
    ],
)
def test_addresses_that_are_not_public_are_blocked(address: str) -> None:
    """Python's versions differ in what they call an address, never in the outcome."""
    assert why_blocked(address)


def test_an_address_inside_an_address_is_named() -> None:
    """IPv6 has several ways to lead to an IPv4 host; each is followed."""
    assert why_blocked("::ffff:127.0.0.1") == "leads to 127.0.0.1, loopback"
    assert why_blocked("2002:c0a8:101::") == "leads to 192.168.1.1, private"
    assert why_blocked("64:ff9b::a9fe:a9fe") == "leads to 169.254.169.254, link-local"
    assert why_blocked("168.63.129.16") == "Azure's metadata service"


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111"),
        *("::ffff:1.1.1.1", "2002:101:101::", "64:ff9b::101:101"),
    ],
)
def test_public_addresses_are_open(address: str) -> None:
    assert why_blocked(address) is None


def lookup(answers: Sequence[str], *, allow_private: bool = False) -> HostLookup:
    return HostLookup(lambda _host, _port: answers, allow_private=allow_private)


def soon() -> float:
    return time.monotonic() + 5


def test_one_blocked_address_among_several_blocks_the_host() -> None:
    """Which of them a connection would take is not left to chance."""
    with pytest.raises(FetchError, match=r"a\.example is at 10\.0\.0\.1: private") as caught:
        lookup(["1.1.1.1", "10.0.0.1"])(ADDRESS, soon())
    assert caught.value.reason == "blocked-address"
    assert lookup(["10.0.0.1"], allow_private=True)(ADDRESS, soon()) == ["10.0.0.1"]


@pytest.mark.parametrize(
    "host", ["2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "127.1", "localhost"]
)
def test_other_spellings_of_an_address_are_seen_through(host: str) -> None:
    """This machine's own resolver knows them; nothing is asked of any other."""
    from stages.download.web_address import system_resolve

    system = HostLookup(system_resolve, allow_private=False)
    with pytest.raises(FetchError) as caught:
        system(WebAddress("http", host, 80, "/"), soon())
    assert caught.value.reason == "blocked-address"


def test_a_host_is_looked_up_once_and_remembered() -> None:
    """What is checked is what is used: a second answer is not asked for."""
    answers = iter([["1.1.1.1"], ["127.0.0.1"]])
    changing = HostLookup(lambda _host, _port: next(answers), allow_private=False)
    assert changing(ADDRESS, soon()) == changing(ADDRESS, soon()) == ["1.1.1.1"]


def test_a_failed_look_up_is_dns_and_not_remembered() -> None:
    outcomes: list[Sequence[str] | Exception] = [OSError("no such host"), [], ["1.1.1.1"]]

    def resolve(_host: str, _port: int) -> Sequence[str]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    failing = HostLookup(resolve, allow_private=False)
    for detail in ("no such host", "no address"):
        with pytest.raises(FetchError, match=detail) as caught:
            failing(ADDRESS, soon())
        assert caught.value.reason == "dns"
    assert failing(ADDRESS, soon()) == ["1.1.1.1"]


def test_a_resolver_that_hangs_is_left_behind() -> None:
    over = threading.Event()

    def hang(_host: str, _port: int) -> Sequence[str]:
        over.wait(10)
        return ["1.1.1.1"]

    hanging = HostLookup(hang, allow_private=False)
    started = time.monotonic()
    with pytest.raises(FetchError, match=r"no answer for a\.example in time") as caught:
        hanging(ADDRESS, started + 0.2)
    assert time.monotonic() - started < 2
    assert caught.value.reason == "dns"
    over.set()
    hanging.close()
