"""A shard of links to a shard of pictures: every link ends as a record or a reject.

In: what a source reads of a shard. Out: the same in the order of its rows, with each link fetched
(`stages.download.engine`). A shard that stalls, or whose links nearly all fail for a reason that
lies with this machine or the moment, fails as a whole, so that it can be tried again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from arrag_runtime.format.errors import ShardError
from schemas.records import Attempt, ImageRecord, LinkRecord, Reject
from schemas.settings.download import DownloadSettings
from stages.download.engine import ShardDownload
from stages.download.fetch import Fetcher, FetchSettings
from stages.download.keep_images import keep_images
from stages.download.web_address import FetchError
from stages.removal.suppression import Suppressions, suppress

_TRANSIENT = frozenset(
    ("dns", "refused", "timeout", "tls", "http-429", "http-5xx", "broken-response")
)
"""Reasons that may lie with us or with the moment; others are the link's own."""

_NOTHING_SUPPRESSED = Suppressions()
_SUSPICIOUS_SHARE, _SUSPICIOUS_LINKS = 0.9, 50


class _InShard(Protocol):
    """What a source may yield besides links."""

    @property
    def row(self) -> int: ...


_Ready = TypeVar("_Ready", bound=_InShard)


def download_links(
    items: Iterable[_Ready | LinkRecord],
    settings: DownloadSettings,
    attempt: Attempt,
    *,
    open_fetcher: Callable[[FetchSettings], Fetcher] = Fetcher,
    suppressions: Suppressions = _NOTHING_SUPPRESSED,
) -> Iterator[_Ready | ImageRecord | Reject]:
    """A shard's inputs in the order of their rows, links fetched; what is no link passes through.

    Fetched bytes that `suppressions` name become rejects, and are not kept.
    Raises ShardError when the deadline or the room on disk is used up, or when one transient reason
    makes up over 90 % of at least 50 links: a machine that lost its network must not write off its
    shards. Of rejects that are tried again most may fail again.
    """
    waiting = iter(items)
    for first in waiting:
        if isinstance(first, LinkRecord):
            break
        yield first
    else:
        return
    ready: list[_Ready] = []
    links: list[LinkRecord] = []
    for item in chain((first,), waiting):
        if isinstance(item, LinkRecord):
            links.append(item)
        else:
            ready.append(item)
    with (
        open_fetcher(_fetch_settings(settings)) as fetcher,
        ShardDownload(
            links,
            fetcher,
            threads=settings.threads,
            seconds=settings.shard_deadline,
            max_bytes=settings.max_shard_bytes,
        ) as download,
    ):
        download.run()
        if not attempt.rows:
            _require_plausible(download.refused.values(), len(links))
        fetched = suppress(download.records(), suppressions)
        if settings.keep_images is not None:
            fetched = keep_images(fetched, Path(settings.keep_images), attempt)
        yield from _by_row(ready, fetched)


def _by_row(
    ready: list[_Ready], fetched: Iterator[ImageRecord | Reject]
) -> Iterator[_Ready | ImageRecord | Reject]:
    """Both in the order of rows; each is in order already."""
    position = 0
    for item in fetched:
        while position < len(ready) and ready[position].row < item.row:
            yield ready[position]
            position += 1
        yield item
    yield from ready[position:]


def _require_plausible(refused: Iterable[FetchError], links: int) -> None:
    """Raise ShardError when nearly all links were refused for one transient reason."""
    details: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for refusal in refused:
        details.setdefault(refusal.reason, refusal.detail)
        counts[refusal.reason] += 1
    for reason, count in counts.items():
        if (
            links >= _SUSPICIOUS_LINKS
            and count > _SUSPICIOUS_SHARE * links
            and reason in _TRANSIENT
        ):
            raise ShardError(
                f"{count} of {links} links failed with '{reason}' ({details[reason]}); check this"
                " machine's network and name server, then build again"
            )


def _fetch_settings(settings: DownloadSettings) -> FetchSettings:
    """What concerns a single URL."""
    return FetchSettings(
        timeout=settings.timeout,
        max_bytes=settings.max_bytes,
        allow_private_hosts=settings.allow_private_hosts,
        contact=settings.contact,
    )
