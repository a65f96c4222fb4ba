"""A server on loopback that behaves like the web, and the list of its pictures.

Of ten links one is dead, one slow, one redirected, one lies about its type, and six are pictures.
`python -m tests.worlds.servers.web_like LIST.tsv` writes the list, serves it and says what to type; once the
builder has seen the faults, the return key mends them.
"""

import sys
import time
from pathlib import Path

from tests.conftest import jpeg
from tests.worlds.servers.web import Page, Web, answer, drip, raw, redirect, serve

DEAD: tuple[Page, ...] = (
    answer(b"gone", "410 Gone"),
    answer(b"?", "404 Not Found"),
    answer(b"busy", "503 Service Unavailable"),
    raw(b""),
)
LIES: tuple[Page, ...] = (
    answer(b"<html><body>404 not found</body></html>", Content_Type="image/jpeg"),
    answer(b"", Content_Type="image/jpeg"),
    answer(jpeg(0)[:300], Content_Type="image/png"),
    answer(jpeg(0), Content_Type="image/jpeg", X_Robots_Tag="noai"),
)


def slow(number: int) -> Page:
    """A picture that takes 25 seconds."""
    return drip(b"HTTP/1.1 200 OK\r\n\r\n" + jpeg(number), 0.25, size=len(jpeg(number)) // 100 + 1)


def faulty(number: int) -> Page:
    """The page of a picture on a web with faults."""
    kind, turn = number % 10, number // 10
    if kind == 0:
        return DEAD[turn % len(DEAD)]
    if kind == 1:
        return slow(number)
    if kind == 2:
        return redirect(f"/moved/{number}.jpg", ("301 Moved Permanently", "302 Found")[turn % 2])
    if kind == 3:
        return LIES[turn % len(LIES)]
    return answer(jpeg(number), Content_Type="image/jpeg")


def faulty_pages(count: int) -> dict[str, Page]:
    """All pages of the web with faults."""
    moved = {f"/moved/{n}.jpg": answer(jpeg(n)) for n in range(count)}
    return moved | {f"/{n}.jpg": faulty(n) for n in range(count)}


def mended_pages(count: int) -> dict[str, Page]:
    """All pages as they should be."""
    return {f"/{n}.jpg": answer(jpeg(n)) for n in range(count)}


def write_list(path: Path, web: Web, count: int) -> None:
    """The list as CC12M is published: address, tab, caption."""
    path.write_text("".join(f"{web.url(f'/{n}.jpg')}\tpicture number {n}\n" for n in range(count)))


def main() -> None:
    """Serve until the process is ended."""
    path, count = Path(sys.argv[1]), 100
    build = f"arrag-db build --source cc12m --input {path} --db web-db --allow-private-hosts"
    with serve(faulty_pages(count)) as web:
        write_list(path, web, count)
        print(f"{path} lists {count} pictures at {web.url()}. In another terminal:\n\n  {build}")
        print("\nThen press return here, and the server mends its faults.", flush=True)
        sys.stdin.readline()
        web.pages.update(mended_pages(count))
        reasons = "timeout,http-404,http-5xx,broken-response,empty,not-an-image,truncated"
        print(f"Mended. Then:\n\n  {build} --retry-rejects {reasons},disallowed")
        print("  arrag-db verify --db web-db\n\nEnd this with Ctrl-C.", flush=True)
        try:
            while True:
                time.sleep(60)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
