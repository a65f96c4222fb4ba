"""Keep what was downloaded: a tar of originals for each attempt at a shard.

In: a shard's pictures on their way. Out: the same, and a file SHARD.tar (SHARD-2.tar of a second
attempt) of ROW.jpg, ROW.txt and ROW.json, which the `webdataset` source reads. It gets its name
when it is complete. The suffix says jpg for every format, as img2dataset's does with originals;
faces that are still to be blurred stand in the json as `unblurred_faces`.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schemas.records import Attempt, ImageRecord, Reject


def keep_images(
    items: Iterator[ImageRecord | Reject], folder: Path, attempt: Attempt
) -> Iterator[ImageRecord | Reject]:
    """Pass the items on, and write the pictures among them to the attempt's tar in `folder`."""
    name = attempt.shard.id if attempt.number == 1 else f"{attempt.shard.id}-{attempt.number}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{name}.tar.*"):  # What a killed attempt left.
        left.unlink(missing_ok=True)
    partial = folder / f".{name}.tar.{os.getpid()}"
    try:
        with tarfile.open(partial, "w") as archive:
            for item in items:
                if isinstance(item, ImageRecord):
                    _add(archive, item)
                yield item
        partial.replace(folder / f"{name}.tar")
    finally:
        partial.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, record: ImageRecord) -> None:
    files = {"jpg": record.data, "json": json.dumps(_fields(record)).encode()}
    if record.caption is not None:
        files["txt"] = record.caption.encode("utf-8", "replace")
    for suffix, data in files.items():
        member = tarfile.TarInfo(f"{record.row:05}.{suffix}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def _fields(record: ImageRecord) -> dict[str, Any]:
    """The source's own columns, and beside them what the record knows."""
    known = json.loads(record.metadata) if record.metadata is not None else {}
    fields = known if isinstance(known, dict) else {"metadata": known}
    fields |= {"key": record.key, "url": record.url}
    if record.licence is not None:
        fields["licence"] = record.licence
    if record.faces:
        fields["unblurred_faces"] = [list(box) for box in record.faces]
    return fields
