"""The receipt of a removal: what was removed from a database, when, why, and by which command."""

from dataclasses import asdict, dataclass
from typing import Any

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import exists, join, make_folder, names_in, resolved_place
from arrag_runtime.format.manifest import Layout, read_json, write_json


@dataclass(frozen=True)
class Receipt:
    """One removal, as it is kept in the database's folder of receipts."""

    id: str
    """The receipt's name: the time in UTC and a random part."""
    when: str
    """The time in UTC, ISO 8601."""
    why: str
    """The reason that was given."""
    command: str
    """The command that was typed."""
    images: int
    """How many pictures were removed."""
    heldout: int
    """How many of them were held out."""
    copies: int
    """How many of them were removed only as copies: with the bytes of a picture that matched."""
    already: int
    """How many more pictures matched and had been removed before."""
    kept_out: int
    """Entries of the list without a picture here, which are only suppressed."""
    patches: dict[str, int]
    """How many patches the pictures had, by table."""
    image_ids: tuple[int, ...]
    """All of the pictures, ascending."""
    first: tuple[dict[str, Any], ...]
    """A few of them with id, key, address and hash."""
    table_versions: dict[str, int]
    """The versions of the tables that were looked at, and that of the list which this wrote."""
    indexes: tuple[str, ...]
    """The indexes that there were."""

    def to_text(self, database: object) -> str:
        """What was done, for people, and what is left to do."""
        return (
            f"removed {self.images:,} pictures with {sum(self.patches.values()):,} patches; no search"
            f" returns them any more. Receipt {self.id} is in {database}/receipts.\n"
            f"Their bytes are still in the tables: `arrag-db compact --db {database}` deletes them."
        )

    def write(self, layout: Layout) -> str:
        """Write it among the database's receipts, atomically; returns where."""
        make_folder(layout.receipts)
        place = join(layout.receipts, f"{self.id}.json")
        write_json(place, asdict(self))
        return place

    @staticmethod
    def read(layout: Layout, name: str) -> "Receipt":
        """The receipt of this id, or in this file. Raises BadInputError where there is none."""
        place = join(layout.receipts, f"{name.removesuffix('.json')}.json")
        if not exists(place):
            place = resolved_place(name)
        if not exists(place):
            listed = [file.removesuffix(".json") for file in names_in(layout.receipts)]
            raise BadInputError(
                f"no receipt '{name}' in {layout.receipts}; it has"
                f" {', '.join(listed[-3:]) or 'none'}"
            )
        fields = read_json(place)
        try:
            lists = {name: tuple(fields[name]) for name in ("image_ids", "first", "indexes")}
            return Receipt(**fields | lists)
        except (KeyError, TypeError) as error:
            raise BadInputError(f"{place} is no receipt of a removal ({error})") from error
