"""Files fetched from a publisher: resumed where they broke off, complete or not there at all.

In: an http(s) address and a folder. Out: the path of the whole file in it. What has arrived is kept
in `NAME.part` beside a note of the file's version, and asked for again from there.
"""

import hashlib
import http.client
import logging
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from arrag_runtime.format.errors import BadInputError

log = logging.getLogger(__name__)
_TRIES = 8
"""Attempts in a row that bring nothing new; any progress starts counting anew."""
_TIMEOUT = 60
_CHUNK = 1 << 20


def fetch_published(url: str, folder: Path, pause: float = 1.0) -> Path:
    """The file at `url`, in `folder`; one that is there already is not asked for again.

    pause: seconds before the second attempt, doubled for each further one that brings nothing.
    Raises BadInputError when it cannot be had whole.
    """
    name = Path(urlsplit(url).path).name or "list"
    digest = hashlib.blake2b(url.encode(), digest_size=6).hexdigest()
    path = folder / f"{digest}-{name}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        had = _size(part)
        try:
            _fetch_rest(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise BadInputError(
                    f"{url} answers {error.code} {error.reason}; check the address, or download"
                    " the list and pass its path as --input"
                ) from error
            reason = f"{error.code} {error.reason}"
            if error.code == 416:
                part.unlink(missing_ok=True)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        failures = 0 if _size(part) > had else failures + 1
        if failures == _TRIES:
            raise BadInputError(
                f"cannot fetch {url} ({reason}); the same command goes on where it broke off, or"
                " download the list and pass its path as --input"
            )
        log.info("fetching %s broke off (%s); going on", url, reason)
        time.sleep(pause * 2**failures if failures else 0)
    _version(part).unlink(missing_ok=True)
    return part.replace(path)


def _fetch_rest(url: str, part: Path) -> None:
    """Append what is missing of the file; raises when the stream ends before the file does."""
    had = _size(part)
    version = _version(part).read_text() if _version(part).exists() else ""
    headers = {"User-Agent": "arrag", "Accept-Encoding": "identity"}
    if had and version:
        # The server sends the whole file instead where it has another version by now.
        headers |= {"Range": f"bytes={had}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        resumed = answer.status == 206 and _begins_at(answer.headers.get("Content-Range"), had)
        if answer.status == 206 and not resumed:
            raise ValueError(f"a range that was not asked for: {answer.headers['Content-Range']}")
        start = had if resumed else 0
        length = answer.headers.get("Content-Length")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _version(part).write_text("" if version.startswith("W/") else version)
        with part.open("ab" if resumed else "wb") as file:
            shutil.copyfileobj(answer, file, _CHUNK)
    if length is not None and (missing := start + int(length) - _size(part)):
        raise ValueError(f"{missing} bytes are missing")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _begins_at(content_range: str | None, start: int) -> bool:
    return (content_range or "").startswith(f"bytes {start}-")


def _version(part: Path) -> Path:
    """The note beside a partial file that says which version of the file it is of."""
    return part.with_name(part.name + ".version")
