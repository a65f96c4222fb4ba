"""The receipt of a removal: what was taken out of a database, when, why, and from where."""

from dataclasses import asdict, dataclass
from typing import Any

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.format.location import exists, join, make_folder, names_in, resolved_place
from arrag_runtime.format.manifest import Layout, read_json, write_json


@dataclass(frozen=True)
class Receipt:
    """One removal. `when` is UTC; `command` what was typed.

    images: pictures taken out, `heldout` and `copies` of them held out, and there only because
    their bytes are those of a picture that matched; already: matching ones that were out before;
    kept_out: entries of the list without a picture here, which only keep out; patches: by table;
    image_ids: all of the pictures; first: a few of them with key, address and hash;
    table_versions: those that were looked at, and the one of the list that this wrote.
    """

    id: str
    when: str
    why: str
    command: str
    images: int
    heldout: int
    copies: int
    already: int
    kept_out: int
    patches: dict[str, int]
    image_ids: tuple[int, ...]
    first: tuple[dict[str, Any], ...]
    table_versions: dict[str, int]
    indexes: tuple[str, ...]

    def to_text(self, database: object) -> str:
        """What was done, for people, and what is left to do."""
        return (
            f"removed {self.images:,} pictures with {sum(self.patches.values()):,} patches; no search"
            f" returns them any more. Receipt {self.id} is in {database}/receipts.\n"
            f"Their bytes are still in the tables: `arrag-db compact --db {database}` takes them out."
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
