"""Archives of pictures, read as streams: what `webdataset` and `journeydb` have in common.

A shard is a `RowRange` of an archive's samples. Samples cannot be counted without reading an
archive's headers, so an archive is listed range by range, the next one once the one before proved
full; where conditions or an order are asked for, its samples are counted first. A damaged archive
gives what came before the damage, and one reject.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from schemas.records import (
    MAX_ROWS_PER_SHARD,
    Count,
    ImageRecord,
    Listing,
    RecordedShard,
    Reject,
    Shard,
)
from schemas.settings.source import SourceSettings
from stages.sources.reading.files import SourceFile
from stages.sources.reading.row_ranges import RowRange, RowSelection, pending
from stages.sources.reading.tar_samples import Damage, Sample, count_samples, read_samples
from stages.sources.reading.where import parse_where, table_of, taken

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_LOOKED_AT, _SAMPLED_ARCHIVES = 64, 3
"""Samples read to learn the columns or to estimate a count, and archives they are read from."""


class ArchiveLayout(Protocol):
    """How a kind of archive is to be read."""

    def key(self, member: tarfile.TarInfo) -> tuple[str | None, str]:
        """The sample a file belongs to and its extension; None for a file that is no part of one."""

    def fields(self, archive: SourceFile, sample: Sample) -> dict[str, Any]:
        """What is said of a sample, by column."""

    def record(self, row: int, sample: Sample, fields: Mapping[str, Any]) -> ImageRecord | Reject:
        """The sample as a record, or why it is none."""


class ArchiveSource:
    """A `Source` of archives of pictures, however they are laid out.

    inputs: located paths. endings: those of archives below a folder. others: those of archives
    that hold no pictures. notes: for every listing.
    """

    def __init__(
        self,
        settings: SourceSettings,
        inputs: Sequence[str],
        endings: tuple[str, ...],
        layout: ArchiveLayout,
        others: tuple[str, ...] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.name = settings.name
        self._selection = RowSelection(settings, inputs, endings)
        self._size = settings.shard_size or MAX_ROWS_PER_SHARD
        self._found: dict[str, SourceFile] = {}
        self._counts: dict[str, int] = {}
        self._layout, self._others, self._notes = layout, others, notes

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        selection = self._selection
        if selection.where is not None:
            self._require_computable(selection.where)
        archives = self._archives()
        reachable, lost = pending(recorded, archives)
        ours = [r for r in recorded if RowRange.of(r.shard).print in archives]
        # A range under a condition, or one that a shuffle chose, may have left others before it.
        in_order = all(RowRange.of(r.shard).is_plain for r in ours)
        if selection.where is None and selection.seed is None and in_order:
            ranges = self._next_ranges(ours)
        else:
            for print_ in archives.keys() - self._counts.keys():
                self._counts[print_] = count_samples(archives[print_], self._layout.key)
            ranges = selection.missing(
                [(p, self._counts[p], archive.name, self._size) for p, archive in archives.items()],
                ours,
                lambda samples: (number for number, _ in self._taken(samples)),
            )
        return Listing(reachable + [r.shard(self.name) for r in ranges], [*self._notes, *lost])

    def _next_ranges(self, recorded: Sequence[RecordedShard]) -> list[RowRange]:
        """The next range of every archive that has not been seen to its end."""
        covered: Counter[str] = Counter()
        closed = set()
        for known in recorded:
            done = RowRange.of(known.shard)
            covered[done.print] = max(covered[done.print], done.stop)
            if known.inputs is None or known.inputs < done.stop - done.start:
                closed.add(done.print)
        ranges = []
        left = self._selection.limit
        for print_, archive in self._archives().items():
            start = covered[print_]
            stop = start + self._size
            if left is not None:
                held = count_samples(archive, self._layout.key, stop=left) if left else 0
                stop, left = min(stop, held), left - held
            if print_ not in closed and start < stop:
                ranges.append(RowRange(print_, start, stop, archive.name))
        return ranges

    def read(self, shard: Shard) -> Iterator[ImageRecord | Reject]:
        samples = RowRange.of(shard)
        for row, (_, record) in enumerate(samples.in_order(self._taken(samples))):
            yield replace(record, row=row)

    def count(self) -> Count:
        """See `Source.count`: from the first samples of a few archives, by the bytes they took."""
        archives = list(self._archives().values())
        step = max(1, len(archives) // _SAMPLED_ARCHIVES)
        chosen = archives[::step][:_SAMPLED_ARCHIVES]
        samples = passed = read = 0
        complete = len(chosen) == len(archives)
        for archive in chosen:
            with closing(read_samples(archive, self._layout.key)) as stream:
                seen = list(islice(stream, _LOOKED_AT))
                complete &= next(stream, None) is None
            samples += len(seen)
            whole = [sample for sample in seen if isinstance(sample, Sample)]
            passed += len(seen)
            if self._selection.where is not None:
                described = (self._layout.fields(archive, sample) for sample in whole)
                passed -= sum(not _passes(fields, self._selection.where) for fields in described)
            files = [data for sample in whole for data in sample.files.values()]
            read += sum(len(data) + tarfile.BLOCKSIZE for data in files)
        total = sum(archive.size for archive in archives)
        inputs = passed if complete else round(total / max(read, 1) * passed)
        note = "" if complete else f"estimated from {samples} samples and {total:,} bytes"
        return Count(self._selection.at_most(inputs), complete, note)

    def _archives(self) -> dict[str, SourceFile]:
        """Every archive by its fingerprint; copies of one appear once."""
        if not self._found:
            files = self._selection.files()
            self._found = {p: f for p, f in files.items() if not f.name.endswith(self._others)}
        return self._found

    def _require_computable(self, where: str) -> None:
        """Refuse columns that none of the first samples has, and what cannot be computed of them."""
        for archive in self._archives().values():
            with closing(read_samples(archive, self._layout.key)) as stream:
                few = [s for s in islice(stream, _LOOKED_AT) if isinstance(s, Sample)]
            if rows := [self._layout.fields(archive, sample) for sample in few]:
                parse_where(where).strict_mask(table_of(rows))
                return

    def _taken(self, samples: RowRange) -> Iterator[tuple[int, ImageRecord | Reject]]:
        """The samples a range takes, with their numbers in the archive; damage is taken always."""
        archive = self._found.get(samples.print) or self._selection.file_of(samples)
        with closing(read_samples(archive, self._layout.key)) as stream:
            for number, sample in enumerate(islice(stream, samples.stop)):
                if number < samples.start:
                    continue
                if isinstance(sample, Damage):
                    detail = sample.detail
                    yield number, Reject(0, samples.name, "read", "broken-archive", detail)
                    continue
                fields = self._layout.fields(archive, sample)
                if _passes(fields, samples.where, samples.without):
                    yield number, self._layout.record(0, sample, fields)


def _passes(fields: dict[str, Any], where: str | None, without: Sequence[str] = ()) -> bool:
    everything = where is None and not without
    return everything or bool(taken(table_of([fields]), where, without)[0])
