"""Indexing a database: grown, merged, built again, left out, refused and killed, on real tables."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import pipeline.indexing.growth
from arrag_runtime import PatchIndex
from arrag_runtime.format.codes import CodeLayout
from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.ids import image_id
from arrag_runtime.format.inverted_lists import CENTROIDS, ListPart
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout, read_codebook
from arrag_runtime.format.patches import PatchBlock, PatchTable
from pipeline.index import index, index_queries
from pipeline.indexing.growth import index_to_build
from pipeline.remove import RemovalRequest, carry_out, plan_removal
from pipeline.verify import verify
from schemas.settings.index import IndexSettings
from stages.index.coarse_lists import ListFinder
from stages.index.fill_lists import fill_part, merge_parts
from tests.worlds.command_line import run
from tests.worlds.index_world import STEPS_OF, held_patches, held_pictures, index_files, small_steps
from tests.worlds.removal_world import KEYS, PER_SHARD, add_shard, make_database, shard_of

CODES = IndexSettings(kind="codebook", lists=6, worker_memory=STEPS_OF, max_copies=1)
MORE: list[range | list[int]] = [
    range(18, 24),
    [0, 1, 2, 30, 31, 32],
    [3, 3, 4, 33, 34, 35],
    range(40, 46),
]
"""What shards 3, 4, … hold; numbers that came before are copies of those pictures."""


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    small_steps(monkeypatch)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Three shards of six pictures, some held out, without an index."""
    return make_database(tmp_path / "db")


def table_of(layout: Layout) -> PatchTable:
    return PatchTable(layout.patches(KEYS))


def rows_of(layout: Layout) -> PatchBlock:
    """All rows of the table."""
    return table_of(layout).sample(10**9, seed=0)


def sound(layout: Layout) -> bool:
    return all(check.ok for check in verify(layout.root))


def everything(index: PatchIndex, keys: Any) -> list[set[tuple[int, int]]]:
    """For each key all (distance in hundred-thousandths, id) that a search finds."""
    assert index.lists is not None
    index.nprobe = index.lists
    found = index.search(keys, 5000)
    assert (found.copies == (found.patch_ids >= 0)).all()
    return [
        {(round(float(d) * 1e5), int(i)) for d, i in zip(near[:n], ids[:n], strict=True)}
        for near, ids, n in zip(found.distances, found.patch_ids, found.count, strict=True)
    ]


def canonical(layout: Layout, name: str, tmp_path: Path) -> dict[str, bytes]:
    """The files of one part with all keys of the table, by the index's own centroids."""
    codes = read_codebook(layout)
    coded = CodeLayout(KEYS, codes)
    centroids = np.load(Path(layout.index(name)) / CENTROIDS)
    shutil.rmtree(tmp_path / "canonical", ignore_errors=True)
    filled = tmp_path / "canonical" / "fill"
    table, finder = table_of(layout), ListFinder(centroids)
    fill_part(filled, table.blocks(), finder, coded, lists=len(centroids), keys=table.count)
    part = ListPart.open(filled, coded.size)
    merge_parts(filled.with_name("part"), [part], coded, max_copies=CODES.max_copies)
    return {path.name: path.read_bytes() for path in filled.with_name("part").iterdir()}


def test_a_build_in_parts_makes_the_bytes_of_the_whole(layout: Layout, tmp_path: Path) -> None:
    """Several fills, several slices: one part; and nothing else is left in its folder."""
    add_shard(layout, 3, [0, 1, 2, 3, 4, 5])
    made = index(layout.root, CODES)
    assert made.parts == ("part-0000",)
    assert made.entries < made.count == table_of(layout).count
    files = index_files(layout, "codebook")
    expected = canonical(layout, "codebook", tmp_path)
    assert files == {f"part-0000/{name}": data for name, data in expected.items()} | {
        CENTROIDS: files[CENTROIDS]
    }
    assert sound(layout)


@pytest.mark.parametrize("weights", ["equal", "learned"])
def test_the_order_of_commits_changes_no_byte(tmp_path: Path, weights: str) -> None:
    """Shards are committed as they finish, and neither lists nor what is measured depend on it."""
    made = []
    for order in (range(5), [3, 0, 4, 2, 1]):
        layout = make_database(tmp_path / f"db {order}", shards=0)
        for number in order:
            add_shard(layout, number, range(PER_SHARD * number, PER_SHARD * (number + 1)))
        manifest = index(layout.root, replace(CODES, weights=weights, lists=7))
        tried = [{**one, "ms_batch": None} for one in manifest.certificate["tried"]]
        first = next(table_of(layout).blocks()).patch_ids[0]
        made.append((index_files(layout, "codebook"), manifest.nprobe, tried, first))
    assert made[0][3] != made[1][3]
    assert made[0][:3] == made[1][:3]


def test_a_grown_index_finds_what_a_new_one_finds(layout: Layout) -> None:
    """It adds a part with what is new and leaves the older files as they are."""
    first = index(layout.root, CODES)
    before = index_files(layout, "codebook")
    inode = (Path(layout.index("codebook")) / "part-0000" / "codes.bin").stat().st_ino
    assert index_to_build(layout.root) is None
    add_shard(layout, 3, MORE[0])
    stale = index_to_build(layout.root)
    assert stale is not None
    name, settings = stale
    assert (name, settings.max_copies) == ("codebook", 1)
    grown = index(layout.root, CODES)
    assert (first.parts, grown.parts) == (("part-0000",), ("part-0000", "part-0001"))
    after = index_files(layout, "codebook")
    assert {name: after[name] for name in before} == before
    assert (Path(layout.index("codebook")) / "part-0000" / "codes.bin").stat().st_ino == inode
    new = index(layout.root, CODES, name="new")
    assert (new.parts, new.count) == (("part-0000",), grown.count)
    keys = rows_of(layout).keys[::50]
    one, other = (PatchIndex.open(layout.root, name) for name in ("codebook", "new"))
    assert everything(one, keys) == everything(other, keys)
    assert sound(layout)


def test_many_parts_become_one_again_and_again(layout: Layout, tmp_path: Path) -> None:
    """With two parts at most: at every third growth all are merged, into the bytes of a whole."""
    parts = [index(layout.root, CODES).parts]
    for number, contents in enumerate(MORE, start=3):
        add_shard(layout, number, contents)
        made = index(layout.root, CODES)
        parts.append(made.parts)
        held = held_patches(layout, "codebook").tolist()
        assert held == sorted(p for b in table_of(layout).blocks() for p in b.patch_ids.tolist())
        assert made.count == len(held)
        folders = {path.name for path in Path(layout.index("codebook")).iterdir() if path.is_dir()}
        assert folders == set(made.parts)
        if len(made.parts) == 1:
            files = index_files(layout, "codebook")
            for name, data in canonical(layout, "codebook", tmp_path).items():
                assert files[f"{made.parts[0]}/{name}"] == data, (number, name)
    assert [len(names) for names in parts] == [1, 2, 1, 2, 1]
    assert sound(layout)


def test_an_outgrown_index_is_built_anew(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that were trained for far fewer keys are too long."""
    first = index(layout.root, CODES)
    monkeypatch.setattr(pipeline.indexing.growth, "_OUTGROWN", 1.2)
    add_shard(layout, 3, MORE[0])
    second = index(layout.root, CODES)
    assert second.parts == ("part-0000",)
    assert second.settings["trained_for"] == second.count > 1.2 * first.settings["trained_for"]
    assert sound(layout)


@pytest.mark.parametrize("change", ["rows written anew", "another setting"])
def test_an_index_that_cannot_grow_is_built_anew(layout: Layout, change: str) -> None:
    index(layout.root, CODES)
    add_shard(layout, 3, MORE[0])
    settings = CODES
    if change == "another setting":
        settings = IndexSettings(kind="codebook", lists=5, worker_memory=STEPS_OF)
    else:
        table = lance.dataset(layout.patches(KEYS))
        first = table.to_table(limit=1)["patch_id"][0].as_py()
        table.update({"next_token": "next_token"}, f"patch_id = {first}")
    made = index(layout.root, settings)
    assert made.parts == ("part-0000",)
    assert made.count == table_of(layout).count
    held = {c.name: c.ok for c in verify(layout.root)}
    assert held["index codebook matches its table"]


@pytest.mark.parametrize("more", [False, True])
def test_a_compacted_table_that_has_grown_is_indexed_anew(layout: Layout, more: bool) -> None:
    """Rows that came between the compaction and the indexing are not taken for moved ones."""
    index(layout.root, CODES)
    lance.dataset(layout.patches(KEYS)).optimize.compact_files()
    if more:
        add_shard(layout, 3, MORE[0])
    made = index(layout.root, CODES, compacted=True)
    assert made.parts == (("part-0000",) if more else ("part-0001",))
    assert made.count == table_of(layout).count
    assert sound(layout)


@pytest.mark.parametrize(
    "kind", ["flat", pytest.param("ivfpq", marks=pytest.mark.ivfpq), "codebook"]
)
def test_removed_pictures_are_in_no_index(layout: Layout, kind: str) -> None:
    """Hidden in one that is open at once, absent from one that is built or grown later."""
    settings = {
        "flat": IndexSettings(kind="flat"),
        "ivfpq": IndexSettings(index_key="IVF4,Flat"),
        "codebook": CODES,
    }[kind]
    index(layout.root, settings)
    opened = PatchIndex.open(layout.root, kind)
    gone = set(
        carry_out(
            layout.root, plan_removal(layout.root, RemovalRequest(where="key LIKE '1/%'")), "w", "c"
        ).image_ids
    )
    here = held_pictures(layout, kind) & gone
    assert here
    rows = rows_of(layout)
    own = rows.keys[np.isin(rows.patch_ids >> 10, list(here))]
    found = opened.search(own, 5)
    assert (found.count == 5).all()
    assert not set((found.patch_ids >> 10).ravel().tolist()) & gone
    assert sound(layout)
    add_shard(layout, 3, MORE[0])
    made = index(layout.root, settings)
    assert not held_pictures(layout, kind) & gone
    assert made.left_out == len(gone)
    assert made.count == table_of(layout).count_without(np.array(sorted(gone)))
    assert sound(layout)


def test_removed_pictures_are_neither_asked_about_nor_learned_from(
    layout: Layout, tmp_path: Path
) -> None:
    """Before any compaction all is as in a database that never had them."""
    never = make_database(tmp_path / "never", shards=0)
    for number in (0, 2):
        add_shard(never, number, range(PER_SHARD * number, PER_SHARD * (number + 1)))
    removal = plan_removal(layout.root, RemovalRequest(where="key LIKE '1/%'"))
    assert carry_out(layout.root, removal, "w", "c").image_ids
    made = [index(one.root, replace(CODES, weights="learned")) for one in (layout, never)]
    assert made[0].weights == made[1].weights
    manifest = DatabaseManifest.read(layout)
    asked = [index_queries(one, manifest).images.tolist() for one in (layout, never)]
    assert asked[0] == asked[1] != []


def database_copies(layout: Layout) -> dict[str, list[int]]:
    """The ids of pictures that have patches, by hash."""
    rows = lance.dataset(layout.images).to_table(
        columns=["image_id", "sha256"], filter="split = 'database'"
    )
    copies: dict[str, list[int]] = {}
    for row in rows.sort_by("image_id").to_pylist():
        copies.setdefault(row["sha256"], []).append(row["image_id"])
    return copies


def test_copies_of_pictures_are_left_out(layout: Layout) -> None:
    """One of each stays, also when the copy that stays comes later or the first one is removed."""
    settings = IndexSettings(kind="codebook", lists=6, worker_memory=STEPS_OF, dedup="images")
    add_shard(layout, 5, [0, 1, 2, 2, 50, 51])
    index(layout.root, settings)
    groups = database_copies(layout)
    assert any(len(ids) > 1 for ids in groups.values())
    assert held_pictures(layout, "codebook") == {ids[0] for ids in groups.values()}
    assert sound(layout)
    # Its pictures come before those of shard 5 in the order of ids, after those of the first three.
    add_shard(layout, 4, [50, 51, 3, 60, 61, 62])
    index(layout.root, settings)
    groups = database_copies(layout)
    kept = {ids[0] for ids in groups.values()}
    assert any(ids[0] < image_id(shard_of(5).id, 0) <= ids[-1] for ids in groups.values())
    assert held_pictures(layout, "codebook") == kept
    assert sound(layout)
    first = next(ids[0] for ids in groups.values() if len(ids) > 1)
    removal = plan_removal(layout.root, RemovalRequest(image_ids=(first,), only_these=True))
    gone = set(carry_out(layout.root, removal, "w", "c").image_ids)
    index(layout.root, settings)
    left = [[i for i in ids if i not in gone] for ids in groups.values()]
    assert held_pictures(layout, "codebook") == {ids[0] for ids in left if ids}
    assert sound(layout)


def test_a_picture_that_was_removed_by_mistake_comes_back(layout: Layout) -> None:
    removal = plan_removal(layout.root, RemovalRequest(where="key = '1/0.jpg'"))
    [gone] = carry_out(layout.root, removal, "w", "c").image_ids
    index(layout.root, CODES)
    assert gone not in held_pictures(layout, "codebook")
    lance.dataset(layout.removed).delete(f"image_id = {gone}")
    index(layout.root, CODES)
    assert gone in held_pictures(layout, "codebook")
    assert sound(layout)


def test_an_index_below_the_bound_is_not_put_in_place(layout: Layout) -> None:
    """What was there stays as it was, and nothing is left of the one that failed."""
    index(layout.root, CODES)
    folder = Path(layout.index("codebook"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    one_list = IndexSettings(kind="codebook", lists=12, nprobe=1, worker_memory=STEPS_OF)
    with pytest.raises(BadInputError, match=r"recall of 0\.\d+, below --min-recall 1"):
        index(layout.root, one_list, min_recall=1.0)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["codebook"]
    made = index(layout.root, one_list, min_recall=0.1)
    assert (made.nprobe, made.certificate["reached"]) == (1, False)
    assert PatchIndex.open(layout.root).nprobe == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nprobe": 7, "lists": 6}, r"--nprobe 7 is outside 1\.\.6 lists"),
        ({"lists": 5000}, "--lists 5000 is more than the table has keys"),
        ({"memory": "1KB"}, "more than --memory 1KB"),
        ({"worker_memory": "0.5B"}, "--worker-memory 0.5B is too little"),
        ({"target_recall": "2"}, "target recall '2' is out of range"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    layout: Layout, settings: dict[str, Any], message: str
) -> None:
    wanted = {"kind": "codebook", "worker_memory": STEPS_OF} | settings
    with pytest.raises(BadInputError, match=message):
        index(layout.root, IndexSettings(**wanted))
    indexes = Path(layout.indexes)
    assert not indexes.exists() or list(indexes.iterdir()) == []


def test_the_smallest_nprobe_that_reaches_the_target(
    layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another depth than ten it is another one; the command says so, and a search uses it."""
    for number, contents in enumerate(MORE, start=3):
        add_shard(layout, number, contents)
    words = ("index", "--db", layout.root, "--lists", "16", "--worker-memory", "200B")
    code, out, err = run(capsys, *words, "--target-recall", "0.9@2048")
    assert code == 0, err
    made = IndexManifest.read(layout.index("codebook"))
    assert f"nprobe {made.nprobe} reaches recall@2048 of 0.9:" in out
    tried = {one["nprobe"]: one["recall"]["2048"] for one in made.certificate["tried"]}
    assert made.nprobe is not None
    assert tried[made.nprobe] >= 0.9 > tried[made.nprobe - 1]
    assert PatchIndex.open(layout.root).nprobe == made.nprobe > 1
    code, out, err = run(capsys, *words, "--target-recall", "0.9")
    assert code == 0, err
    shallow = IndexManifest.read(layout.index("codebook"))
    assert shallow.nprobe is not None
    assert shallow.nprobe < made.nprobe
    code, out, err = run(capsys, *words, "--nprobe", "1", "--min-recall", "0.999")
    assert (code, out) == (1, "")
    assert err.startswith("error: index codebook has a recall of ")
    assert IndexManifest.read(layout.index("codebook")) == shallow


def test_weights_are_kept_and_searched_with(layout: Layout) -> None:
    """Typed ones are scaled to a mean of 1; distances are in their units; a grown index keeps them."""
    settings = IndexSettings(kind="codebook", lists=4, weights="1,3,0,4", worker_memory=STEPS_OF)
    index(layout.root, settings)
    add_shard(layout, 3, MORE[0])
    made = index(layout.root, settings)
    assert (made.weights, len(made.parts)) == ((0.5, 1.5, 0.0, 2.0), 2)
    opened = PatchIndex.open(layout.root)
    opened.nprobe = 4
    rows = rows_of(layout)
    codes = read_codebook(layout).astype(np.float64)
    found = opened.search(rows.keys[:3], 20)
    for row in range(3):
        offsets = ((codes[rows.keys] - codes[rows.keys[row]]) ** 2).sum(axis=2)
        nearest = np.sort(offsets @ np.array(made.weights))[:20]
        assert np.allclose(found.distances[row], nearest, atol=1e-5)
