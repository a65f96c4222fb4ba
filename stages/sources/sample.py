"""The `sample` source: the pictures that come with the project (see their ATTRIBUTION.md)."""

from dataclasses import replace
from pathlib import Path

from arrag_runtime.format.errors import BadInputError
from schemas.settings.source import SourceSettings
from stages.sources.folder import FolderSource
from stages.sources.reading.source_kind import SourceKind

PICTURES = Path(__file__).parent / "sample_images"


def _open(settings: SourceSettings) -> FolderSource:
    """The bundled pictures, read as a folder. Raises BadInputError when an --input is given."""
    if settings.input:
        raise BadInputError(
            f"--source sample brings its own pictures, so --input {settings.input[0]} cannot be"
            " used; for your own pictures pass --source folder"
        )
    return FolderSource(replace(settings, input=(str(PICTURES),)))


SOURCE = SourceKind(open=_open, bundled=True)
