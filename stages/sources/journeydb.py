"""The `journeydb` source: the publisher's NNN.tgz archives and their annotations, both as streams.

--input: the data set's folder (or its `train` folder), or archives and annotation files; without it
the data set on the hub, which is gated and needs the user's own token. Archives are `NNN.tgz` with
`NNN/x.jpg` inside; annotations are `…anno….jsonl`, plain or in a tgz of its own, with a line per
picture: `img_path` (`./NNN/x.jpg`), `prompt`, `Task1`, `Task2` {`Caption`}, `Task3`. Nothing is
unpacked to disk: of the annotations a worker keeps the lines that name its archive's folder.
The caption is Task2's, or the prompt with `--caption prompt`; null where that one is missing. The
questions of Task3 are left out of the metadata.
"""

import json
import re
import tarfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from arrag_runtime.format.errors import BadInputError
from schemas.records import ImageRecord, Reject
from schemas.settings.source import SourceSettings
from stages.sources.reading.archives import PICTURE_SUFFIXES, ArchiveSource
from stages.sources.reading.columns import metadata_text, text_of
from stages.sources.reading.files import SourceFile, find_files, hub_inputs, require_reached
from stages.sources.reading.source_kind import SourceKind
from stages.sources.reading.tar_samples import Sample, open_tar

_ARCHIVES, _ANNOTATIONS = (".tgz", ".tar.gz", ".tar"), (".jsonl", ".jsonl.tgz", ".jsonl.tar.gz")
_HUB_INPUT = "hf://datasets/JourneyDB/JourneyDB/data/train"


class JourneyDbLayout:
    """How JourneyDB lays out an archive; follows the protocol `ArchiveLayout`."""

    def __init__(self, annotations: Sequence[SourceFile], caption: str) -> None:
        self._annotations = annotations
        self._caption = caption
        self._read: tuple[str, dict[str, dict[str, Any]]] = ("", {})

    def key(self, member: tarfile.TarInfo) -> tuple[str | None, str]:
        """Every picture is a sample of its own."""
        path = PurePosixPath(member.name)
        suffix = path.suffix[1:].lower()
        ours = member.isreg() and suffix in PICTURE_SUFFIXES and not path.name.startswith(".")
        return (_normal(member.name), suffix) if ours else (None, "")

    def fields(self, archive: SourceFile, sample: Sample) -> dict[str, Any]:
        """The picture's annotation; empty where it has none."""
        if self._read[0] != archive.print:
            lines = (_annotations_of(archive, file) for file in self._annotations)
            named = {_normal(str(line.get("img_path"))): line for line in chain(*lines)}
            self._read = (archive.print, named)
        return self._read[1].get(sample.key, {})

    def record(self, row: int, sample: Sample, fields: Mapping[str, Any]) -> ImageRecord | Reject:
        """The picture with its caption; a name that comes twice in a row is a reject."""
        if sample.twice is not None:
            detail = "two files of this name follow each other"
            return Reject(row, sample.key, "read", "name-twice", detail)
        task2 = fields.get("Task2")
        described = task2.get("Caption") if isinstance(task2, Mapping) else None
        caption = described if self._caption == "task2" else fields.get("prompt")
        rest = {k: v for k, v in fields.items() if k not in ("img_path", "Task3")}
        data = next(iter(sample.files.values()))
        return ImageRecord(row, sample.key, data, text_of(caption), metadata=metadata_text(rest))


def _open(settings: SourceSettings) -> ArchiveSource:
    """JourneyDB's archives with their annotations."""
    lists = [path for path in settings.input if path.endswith(_ANNOTATIONS)]
    archives = [path for path in settings.input if path not in lists]
    try:
        annotations = find_files(lists or archives, _ANNOTATIONS, settings.name)
    except BadInputError:
        annotations = []
    annotations = [file for file in annotations if file.location.endswith(_ANNOTATIONS)]
    notes = () if annotations else ("no annotations (…anno….jsonl) are there: no captions",)
    layout = JourneyDbLayout(annotations, settings.caption or "task2")
    return ArchiveSource(settings, archives, _ARCHIVES, layout, _ANNOTATIONS, notes)


def _annotations_of(archive: SourceFile, file: SourceFile) -> Iterator[dict[str, Any]]:
    """The annotations in `file` that name pictures in the folder that NNN.tgz holds, as a stream.

    For an archive of another name they are all of them. Lines that are no JSON object are left out:
    the pictures are the inputs, not the lines.
    """
    stem = PurePosixPath(archive.name).name.split(".")[0]
    folder = f"{stem}/" if stem.isdigit() else ""
    mark = re.compile(rb'"img_path"\s*:\s*"(?:\./)?' + re.escape(folder.encode()))
    with file.open() as stream, closing(_lines(file, stream)) as lines:
        for line in lines:
            if mark.search(line):
                try:
                    fields = json.loads(line.decode("utf-8", "replace"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(fields, dict):
                    yield fields


def _lines(file: SourceFile, stream: Any) -> Generator[bytes, None, None]:
    """The lines of a file, or of the files in a tgz; they end where a tgz is damaged."""
    if file.location.endswith(".jsonl"):
        yield from stream
        return
    try:
        with open_tar(stream) as tar:
            for member in tar:
                if member.isreg() and (inside := tar.extractfile(member)) is not None:
                    yield from inside
    # A damaged archive makes tarfile raise nearly anything.
    except Exception as error:
        require_reached(file, error)


def _normal(path: str) -> str:
    return path.removeprefix("./").removeprefix("imgs/")


SOURCE = SourceKind(
    open=_open,
    locate=lambda settings: hub_inputs(settings, _HUB_INPUT),
    options=("caption", "revision"),
    reads=_ARCHIVES,
    gated=True,
)
