"""The tokens source: grids that users have, in every layout, and grids that do not fit."""

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest

from arrag_runtime.format.errors import BadInputError, ShardError
from arrag_runtime.format.list_columns import list_values
from schemas.records import GridRecord, GridShape, ImageRecord, Reject, Shard
from stages.encode.encode_images import encode_shard
from stages.removal.suppression import Suppressions, suppress
from stages.sources.reading.grids import Misfit, grid_bytes
from tests.conftest import jpeg
from tests.encode.test_encode_images import Brightness, small
from tests.worlds.source_cases import (
    GRID,
    datacomp_rows,
    grid_of,
    items_of,
    npy_of,
    open_at,
    parquet_of,
)

FIRST = grid_of(0).astype("<u2").tobytes()


@pytest.mark.parametrize(
    "values",
    [
        grid_of(0),
        grid_of(0).reshape(-1),
        grid_of(0).reshape(1, 1, -1).astype(np.int16),
        np.stack([grid_of(0), grid_of(1)]).reshape(1, 2, -1),
        np.stack([grid_of(0), grid_of(1)])[None],
        grid_of(0).astype(np.float32),
        grid_of(0).tolist(),
        grid_of(0).astype(np.uint64),
    ],
    ids=["grid", "row", "LlamaGen", "augmented", "batch", "float", "list", "wide"],
)
def test_a_grid_in_any_layout(values: Any) -> None:
    """Rows of tokens, whole grids, several of which the first is the picture itself."""
    assert grid_bytes(values, GRID) == FIRST


@pytest.mark.parametrize(
    ("values", "reason", "said"),
    [
        (grid_of(0)[:3], "grid-size", "4x6"),
        (grid_of(0).T, "grid-size", r"\[6, 4\]"),
        (np.zeros((0, 24)), "grid-size", "0, 24"),
        (np.where(grid_of(0) == grid_of(0).max(), 64, grid_of(0)), "token-outside", "64"),
        (grid_of(0) - 64, "token-outside", "-"),
        (grid_of(0) + 0.5, "no-grid", "float64"),
        ([[1, 2], [3]], "no-grid", "ragged"),
        ("text", "no-grid", "U4"),
        (None, "no-grid", "object"),
    ],
)
def test_what_is_no_grid_of_this_tokenizer(values: Any, reason: str, said: str) -> None:
    """Size, range and kind; the detail shows the value."""
    found = grid_bytes(values, GRID)
    assert isinstance(found, Misfit)
    assert found.reason == reason
    assert re.search(said, found.detail)


def test_llamagens_files(tmp_path: Path) -> None:
    """One picture per file with its caption beside it; broken files and pickles are rejects."""
    folder = npy_of(tmp_path / "codes", 3)
    (folder / "1.txt").write_text(" a caption ")
    np.save(folder / "3.npy", grid_of(3)[:2])
    np.save(folder / "4.npy", np.array([{"a": 1}]), allow_pickle=True)
    (folder / "5.npy").write_bytes((folder / "0.npy").read_bytes()[:90])
    items = items_of(open_at("tokens", folder, grid=GRID))
    assert [item.key for item in items] == [f"{n}.npy" for n in range(6)]
    grids = [item for item in items if isinstance(item, GridRecord)]
    assert [item.grid for item in grids] == [grid_of(n).astype("<u2").tobytes() for n in range(3)]
    assert [item.caption for item in grids] == [None, "a caption", None]
    rejects = {item.key: item.reason for item in items if isinstance(item, Reject)}
    assert rejects == {"3.npy": "grid-size", "4.npy": "no-grid", "5.npy": "no-grid"}


@pytest.mark.parametrize("shape", [(5, 24), (5, 4, 6), (5, 1, 24)])
def test_the_released_hdf5(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """`indices` are the grids, `vectors` (the latents) are not read; text columns describe."""
    grids = np.stack([grid_of(n) for n in range(5)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["indices"] = grids.reshape(shape)
        file["vectors"] = np.zeros((5, 24, 8), np.float32)
        file["caption"] = [f"c{n}" for n in range(5)]
        file["score"] = np.arange(5)
        file["note"] = "of the whole file"
    items = items_of(open_at("tokens", tmp_path / "a.h5", grid=GRID, shard_size=2))
    found = [item for item in items if isinstance(item, GridRecord)]
    assert [item.grid for item in found] == [grid.astype("<u2").tobytes() for grid in grids]
    assert [item.caption for item in found] == [f"c{n}" for n in range(5)]
    assert [json.loads(item.metadata or "") for item in found] == [{"score": n} for n in range(5)]
    some = items_of(open_at("tokens", tmp_path / "a.h5", grid=GRID, where="score > 2"))
    assert [item.caption for item in some if isinstance(item, GridRecord)] == ["c3", "c4"]


def test_tables_with_a_grid_column(tmp_path: Path) -> None:
    """Parquet and Arrow files of either kind; nulls, other sizes and other codebooks are rejects."""
    rows = [
        {"tokens": grid_of(0).reshape(-1).tolist(), "id": "a", "caption": "x"},
        {"tokens": None, "id": "b", "caption": None},
        {"tokens": [1, 2], "id": "c", "caption": None},
        {"tokens": [999] * 24, "id": "d", "caption": None},
    ]
    parquet_of(tmp_path / "p" / "a.parquet", rows)
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as w,
    ):
        w.write_table(table, max_chunksize=3)
    sink = pa.OSFile(str(tmp_path / "s.arrow"), "wb")
    with sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    for path in (tmp_path / "p", tmp_path / "a.arrow", tmp_path / "s.arrow"):
        items = items_of(open_at("tokens", path, grid=GRID, shard_size=3))
        assert [item.key for item in items] == ["a", "b", "c", "d"]
        assert isinstance(items[0], GridRecord)
        assert items[0].grid == FIRST
        reasons = [item.reason for item in items[1:] if isinstance(item, Reject)]
        assert reasons == ["no-grid", "grid-size", "token-outside"]
    named = parquet_of(tmp_path / "n.parquet", [{"vq": grid_of(0).reshape(-1).tolist()}])
    with pytest.raises(BadInputError, match=r"no column is the grid.*vq.*--columns grid="):
        open_at("tokens", named, grid=GRID).listing(())
    links = parquet_of(tmp_path / "l.parquet", datacomp_rows(1))
    with pytest.raises(BadInputError, match="no column is the grid"):
        open_at("tokens", links, grid=GRID, columns="datacomp").listing(())
    (item,) = items_of(open_at("tokens", named, grid=GRID, columns="grid=vq"))
    assert isinstance(item, GridRecord)


def test_damaged_tables_are_rejects(tmp_path: Path) -> None:
    """A file that is none of its kind costs nothing but itself."""
    for name in ("a.h5", "b.arrow", "c.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 9 + name.encode())
    items = items_of(open_at("tokens", tmp_path, grid=GRID))
    assert [item.reason for item in items if isinstance(item, Reject)] == ["broken-archive"] * 3


def test_grids_pass_by_the_model() -> None:
    """They keep their rows among pictures; their bytes decide the hash and what is held out."""
    shape = GridShape(2, 2, 256)
    grids = {row: np.array([[row, 1], [2, 255]]) for row in (0, 2, 5)}
    inputs: list[ImageRecord | GridRecord | Reject] = [
        GridRecord(row, f"g{row}", grids[row].astype("<u2").tobytes(), caption=f"c{row}")
        if row in grids
        else ImageRecord(row, f"p{row}", jpeg(row))
        for row in range(6)
    ]
    model = Brightness()
    done = encode_shard(model, inputs, small(batch_size=2, hold_out=0.5))
    assert [image.record.row for image in done.images] == list(range(6))
    assert model.batches == [2, 2]
    alone = encode_shard(Brightness(), [i for i in inputs if isinstance(i, ImageRecord)], small())
    assert np.array_equal(done.tokens[[1, 3, 4]], alone.tokens)
    for row, grid in grids.items():
        assert np.array_equal(done.tokens[row], grid)
        assert done.images[row].record.caption == f"c{row}"
        assert (done.images[row].width, done.images[row].height) == (0, 0)
    shard = Shard("tokens", "0123456789abcdef", ())
    table = done.images_table(Brightness.spec, shard)
    assert np.array_equal(list_values(table["tokens"]), done.tokens.reshape(-1, 4))
    only = encode_shard(Brightness(), [i for i in inputs if isinstance(i, GridRecord)], small())
    assert np.array_equal(only.tokens, [grids[row] for row in (0, 2, 5)])
    assert grid_bytes(grids[0], shape) == grids[0].astype("<u2").tobytes()


@pytest.mark.parametrize("grid", [[0, 1, 2], [0, 1, 2, 256]])
def test_a_grid_that_does_not_fit_fails_the_shard(grid: list[int]) -> None:
    """Sources have checked it, so this is no picture's fault; latents cannot be made up either."""
    record = GridRecord(0, "g", np.array(grid, "<u2").tobytes())
    with pytest.raises(ShardError, match="does not fit"):
        encode_shard(Brightness(), [record], small())
    fits = GridRecord(0, "g", np.array([0, 1, 2, 3], "<u2").tobytes())
    with pytest.raises(ShardError, match="latents"):
        encode_shard(Brightness(), [fits], small(latents=True))


def test_a_removed_grid_stays_out() -> None:
    """A takedown names the grid's hash, which is what the images table holds of it."""
    grid = np.array([0, 1, 2, 3], "<u2").tobytes()
    (image,) = encode_shard(Brightness(), [GridRecord(0, "g", grid)], small()).images
    list_ = Suppressions(hashes=frozenset((image.sha256,)))
    kept, gone = GridRecord(0, "other", grid[::-1]), GridRecord(1, "g", grid)
    first, second = suppress([kept, gone], list_)
    assert first == kept
    assert isinstance(second, Reject)
    assert (second.row, second.key, second.reason) == (1, "g", "removed")
