"""Suppression: inputs that the list of removed pictures names are kept out of builds.

In: a shard's inputs and the list. Out: the same inputs, with rejects of the reason `removed` in
place of those whose address or original bytes are on the list. A link is suppressed before it is
downloaded.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import lance

from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import Layout
from schemas.records import GridRecord, ImageRecord, LinkRecord, Reject

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Suppressions:
    """What may not come in again; falsy where there is nothing."""

    hashes: frozenset[str] = frozenset()
    """sha256 of original bytes, in hexadecimal."""
    urls: frozenset[str] = frozenset()
    """Addresses."""

    def __bool__(self) -> bool:
        return bool(self.hashes or self.urls)

    def reject(self, item: ImageRecord | LinkRecord | GridRecord) -> Reject | None:
        """The reject that this input becomes, or None where it may come in."""
        if item.url is not None and item.url in self.urls:
            detail = "its address is on the list of removed pictures"
        elif self.hashes and _sha256(item) in self.hashes:
            detail = "its bytes are on the list of removed pictures"
        else:
            return None
        return Reject(item.row, item.key, "read", "removed", detail, item.url)


def read_suppressions(layout: Layout) -> Suppressions:
    """The suppressions of a database as they stand now; read anew only when they have changed."""
    if not exists(layout.removed):
        return Suppressions()
    return _read(layout.removed, lance.dataset(layout.removed).version)


@lru_cache(maxsize=2)
def _read(table: str, version: int) -> Suppressions:
    rows = lance.dataset(table, version=version).to_table(columns=["sha256", "url"])
    return Suppressions(
        hashes=frozenset(rows["sha256"].drop_null().to_pylist()),
        urls=frozenset(rows["url"].drop_null().to_pylist()),
    )


def suppress(items: Iterable[_Item], suppressions: Suppressions) -> Iterator[_Item | Reject]:
    """These inputs in order, with rejects in place of pictures, links and grids that may not come in."""
    for item in items:
        asked = item if isinstance(item, ImageRecord | LinkRecord | GridRecord) else None
        yield (asked and suppressions.reject(asked)) or item


def _sha256(item: ImageRecord | LinkRecord | GridRecord) -> str | None:
    """The hash of a picture's bytes or grid, or the one that the publisher lists for a link."""
    if isinstance(item, LinkRecord):
        return item.sha256
    data = item.grid if isinstance(item, GridRecord) else item.data
    return hashlib.sha256(data).hexdigest()
