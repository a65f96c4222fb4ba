"""`verify` names what is wrong with a database, whatever it is, and only that."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from arrag_runtime.format.inverted_lists import CODES, TOKENS
from arrag_runtime.format.manifest import (
    IDS_FILE,
    TOKENS_FILE,
    DatabaseManifest,
    IndexManifest,
    Layout,
    read_codebook,
)
from pipeline.index import index
from pipeline.verify import verify
from schemas.settings.index import IndexSettings


@pytest.fixture(scope="module")
def indexed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built database with a flat and a codebook index."""
    database = Path(shutil.copytree(built, tmp_path_factory.mktemp("indexed") / "db"))
    index(database, IndexSettings(kind="flat"))
    index(database, IndexSettings(lists=8, max_copies=1))
    return database


@pytest.fixture
def damaged(indexed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(indexed, tmp_path / "db"))


def failed(database: Path, *, full: bool = False) -> set[str]:
    """The names of the checks that fail."""
    return {check.name for check in verify(database, full=full) if not check.ok}


def patches(database: Path) -> lance.LanceDataset:
    layout = Layout(database)
    return lance.dataset(layout.patches(DatabaseManifest.read(layout).keys))


def test_a_sound_database_has_nothing_wrong(indexed: Path) -> None:
    checks = verify(indexed, full=True)
    assert all(check.ok for check in checks)
    assert len({check.name for check in checks}) == len(checks)


def lose_patches(database: Path) -> None:
    ids = patches(database).to_table(columns=["patch_id"], limit=3)["patch_id"].to_pylist()
    patches(database).delete(f"patch_id IN ({', '.join(map(str, ids))})")


def double_patches(database: Path) -> None:
    table = patches(database)
    lance.write_dataset(table.to_table(limit=2), table, mode="append")


def change_a_next_token(database: Path) -> None:
    first = patches(database).to_table(limit=1)
    token = (first["next_token"][0].as_py() + 1) % 4096
    patch = first["patch_id"][0].as_py()
    patches(database).update(
        {"next_token": f"cast({token} as smallint unsigned)"}, f"patch_id = {patch}"
    )


def lose_an_image(database: Path) -> None:
    images = lance.dataset(Layout(database).images)
    image = images.to_table(columns=["image_id"], filter="split = 'database'", limit=1)
    images.delete(f"image_id = {image['image_id'][0].as_py()}")


def lose_a_reject(database: Path) -> None:
    lance.dataset(Layout(database).rejects).delete("key = 'page.jpg'")


def double_a_ledger_row(database: Path) -> None:
    ledger = lance.dataset(Layout(database).ledger)
    lance.write_dataset(ledger.to_table(filter="state = 'done'", limit=1), ledger, mode="append")


def hold_out_later(database: Path) -> None:
    images = lance.dataset(Layout(database).images)
    image = images.to_table(columns=["image_id"], filter="split = 'database'", limit=1)
    images.update({"split": "'heldout'"}, f"image_id = {image['image_id'][0].as_py()}")


def change_the_codebook(database: Path) -> None:
    layout = Layout(database)
    np.save(layout.codebook, read_codebook(layout)[:-1])


def change_an_index_token(database: Path) -> None:
    tokens = np.load(Path(Layout(database).index("flat")) / TOKENS_FILE, mmap_mode="r+")
    tokens[5] += 1
    tokens.flush()


def cut_an_index(database: Path) -> None:
    path = Path(Layout(database).index("flat")) / IDS_FILE
    np.save(path, np.load(path)[:-1])


def part_of(database: Path) -> Path:
    """The only part of the index of codes."""
    return Path(Layout(database).index("codebook")) / "part-0000"


def flip_a_code(database: Path) -> None:
    codes = np.memmap(part_of(database) / CODES, np.uint8, "r+")
    codes[codes.size // 2] ^= 1
    codes.flush()


def swap_next_tokens(database: Path) -> None:
    tokens = np.memmap(part_of(database) / TOKENS, np.uint16, "r+")
    other = int(np.flatnonzero(tokens != tokens[0])[0])
    tokens[[0, other]] = tokens[[other, 0]]
    tokens.flush()


def lose_a_part(database: Path) -> None:
    shutil.rmtree(part_of(database))


def forget_a_part(database: Path) -> None:
    """The manifest names no part any more, and no keys."""
    folder = Path(Layout(database).index("codebook"))
    replace(IndexManifest.read(folder), parts=(), count=0, entries=0).write(folder)


def name_another_version(database: Path) -> None:
    """One of which the index holds more than the table did."""
    folder = Path(Layout(database).index("codebook"))
    made = IndexManifest.read(folder)
    replace(made, table_version=made.table_version - 1).write(folder)


def name_a_version_that_is_gone(database: Path) -> None:
    folder = Path(Layout(database).index("codebook"))
    replace(IndexManifest.read(folder), table_version=999).write(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_patches, "patches per shard"),
        (double_patches, "patch ids unique"),
        (change_a_next_token, "keys and next tokens equal the grids"),
        (lose_an_image, "images per shard"),
        (lose_a_reject, "rejects of every attempt"),
        (lose_a_reject, "rejects per shard"),
        (double_a_ledger_row, "every shard recorded once"),
        (hold_out_later, "patches belong to pictures in the database"),
        (change_the_codebook, "codebook agrees with the manifest"),
        (change_an_index_token, "index flat matches its table"),
        (cut_an_index, "index flat matches its table"),
        (flip_a_code, "index codebook matches its table"),
        (swap_next_tokens, "index codebook matches its table"),
        (lose_a_part, "index codebook matches its table"),
        (forget_a_part, "index codebook matches its table"),
        (name_another_version, "index codebook matches its table"),
        (name_a_version_that_is_gone, "index codebook matches its table"),
    ],
)
def test_damage_is_named(damaged: Path, damage: Callable[[Path], None], named: str) -> None:
    damage(damaged)
    assert named in failed(damaged, full=True)


def test_a_changed_key_is_found_without_full(damaged: Path) -> None:
    table = patches(damaged)
    rows = table.to_table()
    keys = rows["key"].combine_chunks()
    values = keys.flatten().to_numpy().copy()
    values[3] = (values[3] + 1) % 4096
    changed = pa.FixedSizeListArray.from_arrays(pa.array(values), keys.type.list_size)
    rows = rows.set_column(1, rows.schema.field("key"), changed)
    lance.write_dataset(rows, table.uri, mode="overwrite")
    assert "keys and next tokens equal the grids" in failed(damaged)
