"""The `webdataset` source: tars of KEY.jpg + KEY.txt + KEY.json, as img2dataset writes them.

--input: tar paths, brace patterns (`{00000..00099}.tar`), glob patterns or folders of tars. See
`stages.sources.reading.archives` for what a shard is. Of the json, `caption`, `url`, `licence` and
`unblurred_faces` are taken; the rest, such as img2dataset's and DataComp's `sha256`, `uid`, sizes
and scores, is kept as metadata and is what `--where` sees.
"""

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord, Reject
from schemas.settings.source import SourceSettings
from stages.sources.reading.archives import PICTURE_SUFFIXES, ArchiveSource
from stages.sources.reading.columns import boxes, text_of
from stages.sources.reading.files import SourceFile
from stages.sources.reading.source_kind import SourceKind
from stages.sources.reading.tar_samples import Sample


class WebdatasetLayout:
    """How img2dataset lays out a tar; follows the protocol `ArchiveLayout`."""

    def key(self, member: tarfile.TarInfo) -> tuple[str | None, str]:
        """A file's key and extension as webdataset splits its name, at the first dot.

        webdataset's own function is one such expression, and importing it would import torch.
        """
        split = re.fullmatch(r"((?:.*/)?[^.]+)\.([^/]*)", member.name)
        return (split[1], split[2]) if split and member.isreg() else (None, "")

    def fields(self, archive: SourceFile, sample: Sample) -> dict[str, Any]:
        """The sample's json; the text beats its caption."""
        fields = _json_object(sample.files.get("json"))
        beside = text_of(sample.files.get("txt", b"").decode("utf-8", errors="replace"))
        return fields | ({"caption": beside} if beside else {})

    def record(self, row: int, sample: Sample, fields: Mapping[str, Any]) -> ImageRecord | Reject:
        """The sample's picture with what its json says."""
        left = dict(fields)
        url = text_of(left.pop("url", None))
        if sample.twice is not None:
            detail = f"the sample holds two files .{sample.twice}"
            return Reject(row, sample.key, "read", "name-twice", detail, url)
        data = next((sample.files[s] for s in PICTURE_SUFFIXES if s in sample.files), None)
        if data is None:
            detail = f"the sample holds {', '.join(sample.files)}"
            return Reject(row, sample.key, "read", "no-image", detail, url)
        caption = text_of(left.pop("caption", None))
        licence = text_of(left.pop("licence", None)) or text_of(left.pop("license", None))
        # Kept files of a download show their faces; the json says where those are.
        faces = boxes(left.pop("unblurred_faces", None))
        rest = json.dumps(left, ensure_ascii=False) if left else None
        return ImageRecord(row, sample.key, data, caption, url, licence, rest, faces)


def _open(settings: SourceSettings) -> ArchiveSource:
    """The tars of --input. Raises BadInputError for a pattern that cannot be read."""
    inputs = [path for pattern in settings.input for path in _expand_braces(pattern)]
    return ArchiveSource(settings, inputs, (".tar",), WebdatasetLayout())


def _expand_braces(given: str) -> list[str]:
    try:
        return list(braceexpand(str(Path(given).expanduser())))
    except ValueError as error:
        raise BadInputError(
            f"--input '{given}' has a brace that is not closed; write 'DIR/{{00000..00009}}.tar'"
        ) from error


def _json_object(data: bytes | None) -> dict[str, Any]:
    """The sample's json; anything else than an object is kept as it is, under "json"."""
    if data is None:
        return {}
    text = data.decode("utf-8", errors="replace")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {"json": text}
    return fields if isinstance(fields, dict) else {"json": fields}


SOURCE = SourceKind(open=_open, reads=(".tar",))
