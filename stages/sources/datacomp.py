"""The `datacomp` source: DataComp's metadata, a row per address.

--input: see `stages.sources.reading.rows`; without it the publisher's data set of this --scale.
"""

from dataclasses import replace

from stages.sources.reading.files import hub_inputs
from stages.sources.reading.rows import RowSource
from stages.sources.reading.source_kind import SourceKind

SOURCE = SourceKind(
    open=lambda given: RowSource(replace(given, columns=given.columns or "datacomp")),
    locate=lambda given: hub_inputs(given, f"mlfoundations/datacomp_{given.scale or 'small'}"),
    options=("columns", "scale", "revision", "keep_faces"),
)
