"""What was removed stays out: inputs that the database's list names become rejects.

In: a shard's inputs and the list. Out: the same inputs, those whose address or original bytes are on
the list as rejects with the reason `removed`. Links are turned away before they are downloaded.
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

Item = TypeVar("Item")


@dataclass(frozen=True)
class Suppressed:
    """hashes: sha256 of original bytes, hex; urls: addresses. Neither may come in again."""

    hashes: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()

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


def read_suppressed(layout: Layout) -> Suppressed:
    """The list as it stands now; read anew only when it has changed."""
    if not exists(layout.removed):
        return Suppressed()
    return _read(layout.removed, lance.dataset(layout.removed).version)


@lru_cache(maxsize=2)
def _read(table: str, version: int) -> Suppressed:
    rows = lance.dataset(table, version=version).to_table(columns=["sha256", "url"])
    return Suppressed(
        *(frozenset(rows[name].drop_null().to_pylist()) for name in rows.schema.names)
    )


def without_removed(items: Iterable[Item], suppressed: Suppressed) -> Iterator[Item | Reject]:
    """These inputs in order, with rejects in place of pictures and links that were removed."""
    for item in items:
        asked = item if isinstance(item, ImageRecord | LinkRecord | GridRecord) else None
        yield (asked and suppressed.reject(asked)) or item


def _sha256(item: ImageRecord | LinkRecord | GridRecord) -> str | None:
    """The hash of a picture's bytes or grid, or the one that the publisher lists for a link."""
    if isinstance(item, LinkRecord):
        return item.sha256
    data = item.grid if isinstance(item, GridRecord) else item.data
    return hashlib.sha256(data).hexdigest()
