"""A training set as one Arrow file, to train on machines where neither Lance nor the database is."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.errors import BadInputError
from schemas.location import exists, join, normalised, read_bytes
from schemas.trainset import CODEBOOK, MANIFEST, ROWS
from stages.row_table import RowTable

EXPORT_ROWS = 512


def export_trainset(folder: str | Path, path: Path) -> None:
    """Write a training set as one Arrow file, rows by image id, to train where Lance is not."""
    place = normalised(folder)
    rows = RowTable.open(join(place, ROWS))
    if rows is None or not exists(join(place, MANIFEST)):
        raise BadInputError(f"{folder} holds no complete training set; make it first")
    metadata = {
        MANIFEST.encode(): read_bytes(join(place, MANIFEST)),
        CODEBOOK.encode(): read_bytes(join(place, CODEBOOK)),
    }
    schema = rows.schema.with_metadata(metadata)
    order = np.argsort(rows.column("image_id").to_numpy(), kind="stable")
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(order), EXPORT_ROWS):
            table = rows.take(order[start : start + EXPORT_ROWS].tolist())
            writer.write_table(table.replace_schema_metadata(metadata))
    temporary.replace(path)
