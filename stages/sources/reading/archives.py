"""Archives of pictures, read as streams: what `webdataset` and `journeydb` have in common.

A member is a `Piece`: a range of an archive's samples. Samples cannot be counted without reading an
archive's headers, so an archive is listed range by range, the next one once the one before proved
full; where conditions or an order are asked for, its samples are counted first. A damaged archive
gives what came before the damage, and one reject.
"""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from arrag_runtime.format.errors import BadInputError
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
from stages.sources.reading.files import SourceFile, find_file, find_files
from stages.sources.reading.fingerprint import require_shard_size
from stages.sources.reading.row_ranges import Piece, Wanted, pending, remaining, windows
from stages.sources.reading.tar_samples import BLOCK, Damage, Sample, count_samples, read_samples
from stages.sources.reading.where import parse_where, table_of, taken

LOOKED_AT, SAMPLED_ARCHIVES = 64, 3
"""Samples read to learn the columns or to estimate a count, and archives they are read from."""


class Layout(Protocol):
    """How a kind of archive is to be read."""

    def takes(self, name: str) -> bool:
        """Whether a file of this name is an archive of pictures."""

    def key(self, member: tarfile.TarInfo) -> tuple[str | None, str]:
        """The sample a file belongs to and its extension; None for a file that is no part of one."""

    def fields(self, archive: SourceFile, sample: Sample) -> dict[str, Any]:
        """What is said of a sample, by column."""

    def record(self, row: int, sample: Sample, fields: Mapping[str, Any]) -> ImageRecord | Reject:
        """The sample as a record, or why it is none."""


class ArchiveSource:
    """See the module. inputs: located paths; endings: those of archives below a folder."""

    def __init__(
        self,
        settings: SourceSettings,
        inputs: Sequence[str],
        endings: Sequence[str],
        layout: Layout,
        notes: Sequence[str] = (),
    ) -> None:
        self.name = settings.name
        self._limit, self._seed = settings.limit, settings.shuffle_seed
        self._where = parse_where(settings.where).text if settings.where is not None else None
        require_shard_size(settings.shard_size)
        self._size = settings.shard_size or MAX_ROWS_PER_SHARD
        self._inputs, self._endings = inputs, endings
        self._found: dict[str, SourceFile] = {}
        self._counts: dict[str, int] = {}
        self._layout = layout
        self._notes = list(notes)

    def listing(self, recorded: Sequence[RecordedShard]) -> Listing:
        """See `Source.listing`."""
        if self._where is not None:
            self._require_columns(self._where)
        archives = self._archives()
        reachable, lost = pending(recorded, archives)
        notes = list(self._notes)
        if lost:
            notes.append(f"{lost} shards planned earlier are not in this --input")
        ours = [r for r in recorded if Piece.of(r.shard).print in archives]
        # A range under a condition, or one that a shuffle chose, may have left others before it.
        in_order = all(Piece.of(r.shard).plain for r in ours)
        if self._where is None and self._seed is None and in_order:
            pieces = self._next_ranges(ours)
        else:
            pieces = self._counted(ours)
        return Listing(reachable + [piece.shard(self.name) for piece in pieces], notes)

    def _next_ranges(self, recorded: Sequence[RecordedShard]) -> list[Piece]:
        """The next range of every archive that has not been seen to its end."""
        covered: dict[str, int] = {}
        closed: set[str] = set()
        for known in recorded:
            piece = Piece.of(known.shard)
            covered[piece.print] = max(covered.get(piece.print, 0), piece.stop)
            if known.inputs is None or known.inputs < piece.stop - piece.start:
                closed.add(piece.print)
        pieces = []
        left = self._limit
        for print_, archive in self._archives().items():
            if left == 0:
                break
            start = covered.get(print_, 0)
            stop = start + self._size
            if left is not None:
                held = count_samples(archive, self._layout.key, stop=left)
                stop, left = min(stop, held), left - held
            if print_ not in closed and start < stop:
                pieces.append(Piece(print_, start, stop, archive.name))
        return pieces

    def _counted(self, recorded: Sequence[RecordedShard]) -> list[Piece]:
        """What is wanted of every archive and not recorded, its samples being counted."""
        for print_, archive in self._archives().items():
            if print_ not in self._counts:
                self._counts[print_] = count_samples(archive, self._layout.key)
        counts = [
            (print_, self._counts[print_], archive.name, self._size)
            for print_, archive in self._archives().items()
        ]
        wanted = windows(counts, self._seed)
        if self._limit is not None:
            wanted = list(self._first(wanted, self._limit))
        return list(remaining(wanted, recorded, self._where, self._seed))

    def _first(self, wanted: Sequence[Wanted], limit: int) -> Iterator[Wanted]:
        """The windows up to the `limit`th sample that is taken, the last one cut after it."""
        for window in wanted:
            if limit <= 0:
                return
            piece = Piece(window.print, window.start, window.stop, window.name, self._where)
            numbers = [n for n, _ in islice(self._taken(piece), limit)]
            cut = numbers[-1] + 1 if len(numbers) == limit else window.stop
            yield replace(window, stop=cut)
            limit -= len(numbers)

    def read(self, shard: Shard) -> Iterator[ImageRecord | Reject]:
        """See `Source.read`."""
        piece = Piece.of(shard)
        found = self._taken(piece)
        if piece.seed is not None:
            held = list(found)
            found = (held[index] for index in piece.order(len(held)))
        for row, (_, record) in enumerate(found):
            yield replace(record, row=row)

    def count(self) -> Count:
        """See `Source.count`: from the first samples of a few archives, by the bytes they took."""
        archives = list(self._archives().values())
        step = max(1, len(archives) // SAMPLED_ARCHIVES)
        chosen = archives[::step][:SAMPLED_ARCHIVES]
        samples = passed = read = 0
        complete = len(chosen) == len(archives)
        for archive in chosen:
            with closing(read_samples(archive, self._layout.key)) as stream:
                seen = list(islice(stream, LOOKED_AT))
                complete &= next(stream, None) is None
            samples += len(seen)
            whole = [sample for sample in seen if isinstance(sample, Sample)]
            passed += len(seen) - len(whole)
            passed += sum(self._passes(archive, s, self._where, ()) for s in whole)
            read += sum(len(data) + BLOCK for sample in whole for data in sample.files.values())
        total = sum(archive.size for archive in archives)
        inputs = passed if complete else round(total / max(read, 1) * passed)
        note = "" if complete else f"estimated from {samples} samples and {total:,} bytes"
        return Count(min(inputs, self._limit or inputs), complete, note)

    def _archives(self) -> dict[str, SourceFile]:
        """Every archive by its fingerprint; copies of one appear once."""
        if not self._found:
            files = find_files(self._inputs, self._endings, self.name)
            self._found = {f.print: f for f in files if self._layout.takes(f.name)}
        return self._found

    def _archive(self, piece: Piece) -> SourceFile | None:
        if piece.print in self._found:
            return self._found[piece.print]
        return find_file(self._inputs, self._endings, self.name, piece.name, piece.print)

    def _require_columns(self, where: str) -> None:
        """Refuse columns that none of the first samples has."""
        for archive in self._archives().values():
            with closing(read_samples(archive, self._layout.key)) as stream:
                seen = [s for s in islice(stream, LOOKED_AT) if isinstance(s, Sample)]
            rows = [self._layout.fields(archive, sample) for sample in seen]
            if rows:
                table = table_of(rows)
                expression = parse_where(where)
                expression.require(name for name in table.column_names if name)
                expression.mask(table)
                return

    def _taken(self, piece: Piece) -> Iterator[tuple[int, ImageRecord | Reject]]:
        """The samples a piece takes, with their numbers in the archive; damage is taken always."""
        archive = self._archive(piece)
        if archive is None:
            raise BadInputError(
                f"the archive {piece.name} of this shard is not in --input any more, or has"
                " changed; every node must see it at the same place"
            )
        with closing(read_samples(archive, self._layout.key)) as stream:
            for number, sample in enumerate(islice(stream, piece.stop)):
                if number < piece.start:
                    continue
                if isinstance(sample, Damage):
                    detail = sample.detail
                    yield number, Reject(0, piece.name, "read", "broken-archive", detail)
                elif self._passes(archive, sample, piece.where, piece.without):
                    fields = self._layout.fields(archive, sample)
                    yield number, self._layout.record(0, sample, fields)

    def _passes(
        self, archive: SourceFile, sample: Sample, where: str | None, without: Sequence[str]
    ) -> bool:
        if where is None and not without:
            return True
        fields = self._layout.fields(archive, sample)
        return bool(taken(table_of([fields]), where, without)[0])
