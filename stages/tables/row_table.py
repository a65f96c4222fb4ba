"""A table that no ledger speaks of, such as a training set's."""

from collections.abc import Sequence

import lance
import pyarrow as pa

from arrag_runtime.format.location import exists, join
from stages.tables.committer import CLEAN_EVERY, clean_versions


class RowTable:
    """A table whose rows are appended and never changed, and of which no ledger speaks."""

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self._dataset = dataset
        self._commits = 0

    @staticmethod
    def open(path: str) -> "RowTable | None":
        """The table at this path, at its newest version; None where there is none."""
        return RowTable(lance.dataset(path)) if exists(join(path, "_versions")) else None

    @staticmethod
    def create(path: str, schema: pa.Schema) -> "RowTable":
        """A new, empty table with this schema and its metadata."""
        return RowTable(lance.write_dataset(schema.empty_table(), path, schema=schema))

    @property
    def schema(self) -> pa.Schema:
        """The schema, with the metadata it was created with."""
        return self._dataset.schema

    def append(self, fragments: Sequence[str]) -> None:
        """Make written fragments a part of the table, all of them or none."""
        if not fragments:
            return
        new = [lance.FragmentMetadata.from_json(text) for text in fragments]
        self._dataset = lance.LanceDataset.commit(
            self._dataset, lance.LanceOperation.Append(new), read_version=self._dataset.version
        )
        self._commits += 1
        if self._commits % CLEAN_EVERY == 0:
            clean_versions([self._dataset.uri])

    def count(self) -> int:
        """The number of rows."""
        return int(self._dataset.count_rows())

    def column(self, name: str) -> pa.ChunkedArray:
        """One column, in the table's order."""
        return self._dataset.to_table(columns=[name])[name]

    def take(self, rows: Sequence[int]) -> pa.Table:
        """The rows at these ordinals, in the order asked for."""
        return self._dataset.take(list(rows))
