"""The `datacomp` source: DataComp's metadata, a row per address.

--input: see `stages.sources.reading.rows`; without it the publisher's data set of this --scale.
"""

from dataclasses import replace

from arrag_runtime.format.errors import BadInputError
from schemas.settings.source import SourceSettings
from stages.sources.reading.files import hub_inputs
from stages.sources.reading.rows import RowSource
from stages.sources.reading.source_kind import SourceKind

_SCALES = ("small", "medium", "large", "xlarge")


def _open(settings: SourceSettings) -> RowSource:
    if settings.scale is not None and settings.scale not in _SCALES:
        raise BadInputError(f"--scale '{settings.scale}' is not one of {', '.join(_SCALES)}")
    return RowSource(replace(settings, columns=settings.columns or "datacomp"))


def _locate(settings: SourceSettings) -> tuple[str, ...]:
    return hub_inputs(settings, f"mlfoundations/datacomp_{settings.scale or 'small'}")


SOURCE = SourceKind(
    open=_open, locate=_locate, options=("columns", "scale", "revision", "keep_faces")
)
