"""A shard of links to a shard of pictures: every link ends as a record or a reject.

In: what a source reads of a shard. Out: the same in the order of its rows, with each link fetched
(`stages.download.engine`). A shard that stalls, or whose links nearly all fail for a reason that
lies with this machine or the moment, fails as a whole, so that it can be tried again.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from heapq import merge
from pathlib import Path
from typing import TypeVar

from arrag_runtime.format.errors import ShardError
from schemas.records import Attempt, GridRecord, ImageRecord, LinkRecord, Reject
from schemas.settings.download import DownloadSettings
from stages.download.engine import ShardDownload
from stages.download.fetch import Fetcher
from stages.download.keep_images import keep_images
from stages.download.web_address import FetchError
from stages.removal.suppression import Suppressions, suppress

_TRANSIENT = frozenset(
    ("dns", "refused", "timeout", "tls", "http-429", "http-5xx", "broken-response")
)
"""Reasons that may lie with us or with the moment; others are the link's own."""
_NOTHING_SUPPRESSED = Suppressions()
_SUSPICIOUS_SHARE, _SUSPICIOUS_LINKS = 0.9, 50
_Ready = TypeVar("_Ready", bound=ImageRecord | GridRecord | Reject)
"""What a source may yield besides links."""


def download_links(
    items: Iterable[_Ready | LinkRecord],
    settings: DownloadSettings,
    attempt: Attempt,
    *,
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
    left = [first, *waiting]
    links = [item for item in left if isinstance(item, LinkRecord)]
    ready = [item for item in left if not isinstance(item, LinkRecord)]
    with Fetcher(settings) as fetcher, ShardDownload(links, fetcher, settings) as download:
        download.run()
        if not attempt.rows:
            _require_plausible(download.refused.values(), len(links))
        fetched = suppress(download.records(), suppressions)
        if settings.keep_images is not None:
            fetched = keep_images(fetched, Path(settings.keep_images), attempt)
        yield from merge(fetched, ready, key=lambda item: item.row)


def _require_plausible(refused: Collection[FetchError], links: int) -> None:
    """Raise ShardError when nearly all links were refused for one transient reason."""
    if links < _SUSPICIOUS_LINKS:
        return
    for reason, count in Counter(refusal.reason for refusal in refused).items():
        if count > _SUSPICIOUS_SHARE * links and reason in _TRANSIENT:
            detail = next(refusal.detail for refusal in refused if refusal.reason == reason)
            raise ShardError(
                f"{count} of {links} links failed with '{reason}' ({detail}); check this"
                " machine's network and name server, then build again"
            )
