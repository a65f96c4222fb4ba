"""Reading a database's tables for comparison: rows in the order of their ids."""

from pathlib import Path

import lance
import pyarrow as pa

from arrag_runtime.format.manifest import DatabaseManifest, Layout

ORDER = {"images": "image_id", "patches": "patch_id"}


def all_rows(database: str | Path) -> dict[str, pa.Table]:
    """The images, patches, rejects and ledger of a database, sorted; without times and versions."""
    layout = Layout(database)
    patches = layout.patches(DatabaseManifest.read(layout).keys)
    ledger = lance.dataset(layout.ledger).to_table()
    ledger = ledger.drop_columns(["time", "versions", "fragments"])
    return {
        "images": lance.dataset(layout.images).to_table().sort_by("image_id"),
        "patches": lance.dataset(patches).to_table().sort_by("patch_id"),
        "rejects": lance.dataset(layout.rejects)
        .to_table()
        .sort_by([("shard", "ascending"), ("row", "ascending")]),
        "ledger": ledger.sort_by([("shard", "ascending"), ("attempt", "ascending")]),
    }


def assert_same_rows(one: str | Path, other: str | Path) -> None:
    """Both databases hold the same rows in every table."""
    left, right = all_rows(one), all_rows(other)
    for name, table in left.items():
        assert table.num_rows == right[name].num_rows, name
        assert table.equals(right[name]), f"{name} differ"
