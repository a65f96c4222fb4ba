"""The `parquet` source: tables of pictures or of their addresses, here or on the hub.

--input: see `stages.sources.reading.rows`; --columns says which column holds what.
"""

from stages.sources.reading.files import hub_inputs
from stages.sources.reading.row_files import PARQUET
from stages.sources.reading.rows import RowSource
from stages.sources.reading.source_kind import SourceKind

SOURCE = SourceKind(
    open=RowSource, locate=hub_inputs, options=("columns", "revision", "keep_faces"), reads=PARQUET
)
