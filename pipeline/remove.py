"""Remove pictures from a database: look first, then hide them from every search at once.

find what is meant → show it → add it to the list of removed pictures → write a receipt. The list
hides the pictures from searches (a tombstone each) and keeps them out of later builds (a
suppression each). No lease is taken, so that a removal never waits for a build; `compact` deletes
the bytes from tables and indexes later.
"""

import datetime
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.format.patches import PatchTable, patch_tables
from arrag_runtime.search.patch_index import index_folders
from arrag_runtime.search.tombstones import Tombstones
from schemas.receipt import Receipt
from schemas.tables import REMOVED_SCHEMA
from stages.removal import removed_list_file
from stages.removal.find_images import FoundImages, Selection, find_images, hash_files
from stages.removal.removed_list_file import RemovedEntry
from stages.removal.suppression import read_suppressions
from stages.tables.deletion import append_removed

_SHOWN = 5
"""So many pictures of a removal are shown to people."""


@dataclass(frozen=True, kw_only=True)
class RemovalRequest:
    """What to remove, said in exactly one of five ways."""

    where: str | None = None
    """A Lance filter over the columns of the images table."""
    image_ids: tuple[int, ...] = ()
    """The ids of pictures."""
    hashes: tuple[str, ...] = ()
    """sha256 of original bytes, in hexadecimal; those without a picture here are suppressed."""
    like: tuple[Path, ...] = ()
    """Files with the original bytes, used by their hashes."""
    listed: Path | None = None
    """A file of another database's list, as `export_list` writes it."""
    only_these: bool = False
    """Whether copies with the same bytes stay; not with `listed`."""

    def __post_init__(self) -> None:
        ways = (self.where, self.image_ids, self.hashes, self.like, self.listed)
        if sum(bool(way) for way in ways) != 1:
            raise BadInputError(
                "say what to remove in one way: --where, --image-id, --sha256, --like or --import"
            )
        if self.listed and self.only_these:
            raise BadInputError("--import removes all that the list names; leave --only-these out")


@dataclass(frozen=True)
class Removal:
    """What a removal would do."""

    found: FoundImages
    """The pictures that it hides."""
    entries: tuple[RemovedEntry, ...]
    """What goes on the list without a picture here, only to be suppressed."""
    patches: Mapping[str, int]
    """How many patches the pictures have, by table."""

    @property
    def images(self) -> int:
        """How many pictures it hides."""
        return len(self.found.matched) + len(self.found.copies)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.images and not self.entries

    def first(self) -> tuple[dict[str, Any], ...]:
        """A few of the pictures, for people."""
        columns = ["image_id", "key", "url", "sha256"]
        return tuple(self.found.pictures.select(columns).slice(0, _SHOWN).to_pylist())

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {
            "images": self.images,
            "copies": len(self.found.copies),
            "already": self.found.already_hidden,
            "kept_out": len(self.entries),
            "patches": dict(self.patches),
            "first": list(self.first()),
        }

    def to_text(self) -> str:
        """What people are shown before they agree."""
        found = self.found
        lines = [f"{len(found.matched):,} pictures match"]
        if len(found.copies):
            lines[0] += f", and {len(found.copies):,} copies with the same bytes"
        if found.already_hidden:
            lines[0] += f"; {found.already_hidden:,} more are removed already"
        lines += [f"  {p['image_id']}  {p['key']}  {p['url'] or ''}".rstrip() for p in self.first()]
        if self.images > _SHOWN:
            lines.append(f"  and {self.images - _SHOWN:,} more")
        lines += [f"  {count:,} patches of {name}" for name, count in self.patches.items() if count]
        if self.entries:
            lines.append(
                f"  {len(self.entries):,} entries without a picture here, to be kept out of builds"
            )
        if found.shared:
            lines.append(
                f"  {len(found.shared):,} hashes or addresses belong to pictures that stay, too,"
                " and are not kept out of builds"
            )
        return "\n".join(lines)


def remove(
    database: str | Path,
    request: RemovalRequest,
    *,
    why: str,
    command: str = "pipeline.remove.remove",
) -> Receipt:
    """Remove what a request names, without asking; returns the receipt, which is kept as well.

        receipt = remove("mydb", RemovalRequest(where="url LIKE '%://a.org/%'"), why="a letter")
        verify_removed("mydb", receipt.id)

    From then on no search returns the pictures and no build brings them back; `compact` deletes
    their bytes. why: the reason, for the list and the receipt. command: what the receipt names as
    the command. To look first, use `plan_removal` and `carry_out`. Raises BadInputError for a
    request that cannot be used.
    """
    return carry_out(database, plan_removal(database, request), why, command)


def plan_removal(database: str | Path, request: RemovalRequest) -> Removal:
    """What a request would remove; writes nothing. Raises BadInputError for what cannot be used.

    Hashes that no picture here has, and all entries of an imported list, go on this list as well.
    """
    if request.listed is not None:
        entries = removed_list_file.import_removed(request.listed)
    else:
        hashes = {removed_list_file.require_hash(text, "--sha256") for text in request.hashes}
        hashes |= hash_files(request.like)
        entries = tuple(RemovedEntry(sha256=sha256) for sha256 in sorted(hashes))
    selection = Selection(
        where=request.where,
        image_ids=request.image_ids,
        hashes=frozenset(entry.sha256 for entry in entries if entry.sha256 is not None),
        urls=frozenset(entry.url for entry in entries if entry.url is not None),
    )
    return _removal(database, selection, entries, with_copies=not request.only_these)


def _removal(
    database: str | Path,
    selection: Selection,
    entries: Sequence[RemovedEntry],
    *,
    with_copies: bool,
) -> Removal:
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    found = find_images(
        ImageTable(layout.images), selection, Tombstones(layout).ids, with_copies=with_copies
    )
    suppressed = read_suppressions(layout)
    hashes = suppressed.hashes.union(found.pictures["sha256"].to_pylist())
    urls = suppressed.urls.union(found.pictures["url"].to_pylist())
    # Entries whose hash or address is not suppressed yet.
    fresh = (
        entry
        for entry in entries
        if (entry.sha256 is not None and entry.sha256 not in hashes)
        or (entry.url is not None and entry.url not in urls)
    )
    spec = manifest.tokenizer
    shown = found.pictures["split"].to_pylist().count("database")
    patches = {
        keys.name: shown * keys.neighborhood.positions(spec.grid_height, spec.grid_width).size
        for keys in patch_tables(layout)
    }
    return Removal(found, tuple(dict.fromkeys(fresh)), patches)


def carry_out(database: str | Path, removal: Removal, why: str, command: str) -> Receipt:
    """Hide the pictures of a removal from now on, and write its receipt.

    Raises BadInputError without a reason.
    """
    if not why.strip():
        raise BadInputError("a removal needs a reason, for the list and the receipt; give --why")
    layout = Layout(database)
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    pictures = removal.found.pictures
    rows = _listed(removal, {"when": now, "why": why, "receipt": name})
    versions = {"images": ImageTable(layout.images).version} | {
        f"patches/{keys.name}": PatchTable(layout.patches(keys)).version
        for keys in patch_tables(layout)
    }
    versions["removed"] = append_removed(layout, rows)
    receipt = Receipt(
        id=name,
        when=now.isoformat(timespec="seconds"),
        why=why,
        command=command,
        images=removal.images,
        heldout=pictures["split"].to_pylist().count("heldout"),
        copies=len(removal.found.copies),
        already=removal.found.already_hidden,
        kept_out=len(removal.entries),
        patches=dict(removal.patches),
        image_ids=tuple(sorted(pictures["image_id"].to_pylist())),
        first=removal.first(),
        table_versions=versions,
        indexes=tuple(Path(folder).name for folder in index_folders(layout)),
    )
    receipt.write(layout)
    return receipt


def export_list(database: str | Path, path: Path) -> int:
    """Write the list of a database to a file; returns how many rows it has."""
    layout = Layout(database)
    DatabaseManifest.read(layout)
    return removed_list_file.export_removed(layout, path)


def hide_suppressed(database: str | Path, command: str) -> Receipt | None:
    """Hide what came in although it is on the list: by a build that ran when it was removed."""
    suppressions = read_suppressions(Layout(database))
    if not suppressions:
        return None
    selection = Selection(hashes=suppressions.hashes, urls=suppressions.urls)
    removal = _removal(database, selection, (), with_copies=True)
    if not removal.images:
        return None
    return carry_out(database, removal, "came in again while it was being removed", command)


def _listed(removal: Removal, said: Mapping[str, Any]) -> pa.Table:
    """The rows for the list: pictures, and entries without one.

    A hash or an address that pictures which stay have too is left out, so as not to suppress them.
    """
    pictures = removal.found.pictures
    shared = pa.array(sorted(removal.found.shared), pa.string())
    columns = {name: pictures[name] for name in pictures.column_names}
    for name in ("sha256", "url"):
        stays = pc.is_in(pictures[name], shared)
        columns[name] = pc.if_else(stays, pa.scalar(None, pa.string()), pictures[name])
    for name, value in said.items():
        columns[name] = pa.repeat(pa.scalar(value, REMOVED_SCHEMA.field(name).type), len(pictures))
    entries = [dict(said) | vars(e) | {"why": e.why or said["why"]} for e in removal.entries]
    hidden = pa.table([columns[name] for name in REMOVED_SCHEMA.names], schema=REMOVED_SCHEMA)
    return pa.concat_tables([hidden, pa.Table.from_pylist(entries, schema=REMOVED_SCHEMA)])
