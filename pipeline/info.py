"""What a database holds, as the ledger, the rejects and the index manifests say."""

import textwrap
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa

from arrag_runtime.format.ids import contains
from arrag_runtime.format.images import ImageTable, duplicate_images
from arrag_runtime.format.location import exists, join, names_in, stored_bytes
from arrag_runtime.format.manifest import DatabaseManifest, IndexManifest, Layout
from arrag_runtime.search.patch_index import index_folders
from arrag_runtime.search.tombstones import Tombstones
from pipeline.building.plan_shards import open_rejects
from stages.measure.certificate import Certificate
from stages.tables.deletion import deleted_images
from stages.tables.ledger import read_ledger

_NOT_TOLD = ("name", "mark", "count", "temperature", "settings", "metrics")
"""What of an index's manifest is left out."""


def info(database: str | Path) -> dict[str, Any]:
    """The object that `info --json` prints. Raises BadInputError where there is no database."""
    layout = Layout(database)
    manifest = DatabaseManifest.read(layout)
    state = read_ledger(layout)
    reasons = open_rejects(layout.rejects, state, ["reason"])["reason"]
    rejects = {entry["values"]: entry["counts"] for entry in reasons.value_counts().to_pylist()}
    spec, keys = manifest.tokenizer, manifest.keys
    waiting = _removed_waiting(layout, manifest)
    return {
        "database": layout.root,
        "inputs": state.totals["inputs"],
        "images": state.totals["images"] - waiting["images"],
        "heldout": state.totals["heldout"] - waiting["heldout"],
        "patches": state.totals["patches"] - waiting["patches"],
        "rejects": dict(sorted(rejects.items())),
        "removed": state.totals["removed"] + waiting["images"],
        "removed_waiting": waiting["images"],
        "duplicates": len(duplicate_images(ImageTable(layout.images), Tombstones(layout).ids)),
        "shards": len(state.done),
        "shards_open": len(state.recorded) - len(state.done),
        "sources": list(manifest.sources),
        "by_source": {name: dict(counts) for name, counts in sorted(state.by_source.items())},
        "tokenizer": spec.name,
        "grid": [spec.grid_height, spec.grid_width],
        "vocabulary": spec.vocabulary,
        "encoder": vars(manifest.encoder),
        "hold_out": manifest.hold_out,
        "neighborhood": keys.neighborhood.name,
        "border": keys.neighborhood.border,
        "key_space": keys.space,
        "bytes": {
            name: stored_bytes(join(layout.root, name))
            for name in names_in(layout.root)
            if name in ("patches", "index") or name.endswith(".lance")
        },
        "indexes": {f.rpartition("/")[2]: _index(f, layout) for f in index_folders(layout)},
    }


def _removed_waiting(layout: Layout, manifest: DatabaseManifest) -> dict[str, int]:
    """What is removed and still in the tables: pictures, held-out ones of them, and patches."""
    splits: dict[int, str] = {}
    if exists(layout.removed):
        table = lance.dataset(layout.removed).to_table(
            columns=["image_id", "split"], filter="image_id IS NOT NULL"
        )
        deleted = deleted_images(layout)
        there = table.filter(pa.array(~contains(deleted, table["image_id"].to_numpy())))
        splits = dict(zip(*(column.to_pylist() for column in there.columns), strict=True))
    held_out = list(splits.values()).count("heldout")
    patches = manifest.patches_per_image * (len(splits) - held_out)
    return {"images": len(splits), "heldout": held_out, "patches": patches}


def _index(folder: str, layout: Layout) -> dict[str, Any]:
    index = IndexManifest.read(folder)
    current = lance.dataset(layout.patches(index.keys)).count_rows()
    return {name: value for name, value in vars(index).items() if name not in _NOT_TOLD} | {
        "keys": index.count,
        "parts": len(index.parts),
        "recall": index.certificate["chosen"]["recall"],
        "up_to_date": index.settings["rows"] == current,
    }


def to_text(fields: dict[str, Any]) -> str:
    """The same for people."""
    grid = "x".join(map(str, fields["grid"]))
    rejects = sum(fields["rejects"].values())
    removed = f" + {fields['removed']:,} removed" if fields["removed"] else ""
    lines = [
        f"{fields['database']}: {fields['images']:,} images, {fields['patches']:,} patches",
        f"  inputs {fields['inputs']:,} = {fields['images']:,} images + {rejects:,} rejects"
        f"{removed} ({fields['heldout']:,} of the images held out)",
        f"  shards {fields['shards']} done, {fields['shards_open']} open;"
        f" sources {', '.join(fields['sources']) or 'none'}",
        f"  tokenizer {fields['tokenizer']}, grid {grid}, {fields['vocabulary']:,} codes",
        f"  keys {fields['neighborhood']}, border {fields['border']}, {fields['key_space']} space",
    ]
    if len(fields["by_source"]) > 1:
        lines += [
            f"  from {name}: {counts['inputs']:,} inputs, {counts['images']:,} images,"
            f" {counts['rejects']:,} rejects, {counts['patches']:,} patches"
            for name, counts in fields["by_source"].items()
        ]
    if fields["removed_waiting"]:
        lines.append(
            f"  {fields['removed_waiting']:,} of the removed are hidden and still on disk: run"
            " `arrag-db compact`"
        )
    if fields["duplicates"]:
        lines.append(f"  {fields['duplicates']:,} of the images are copies of another one")
    lines += [f"  reject {reason}: {count:,}" for reason, count in fields["rejects"].items()]
    sizes = (f"{name} {size / 1e6:.1f} MB" for name, size in fields["bytes"].items())
    lines.append("  on disk " + ", ".join(sizes))
    for name, index in fields["indexes"].items():
        probe = f", nprobe {index['nprobe']}" if index["nprobe"] else ""
        stale = "" if index["up_to_date"] else "  (older than the table: run `arrag-db index`)"
        lines.append(
            f"  index {name}: {index['index_key']}{probe}, {index['keys']:,} keys,"
            f" recall@10 {index['recall_at_10']:.3f}, {index['ms_per_query']:.2f} ms a query,"
            f" {index['code_bytes_per_key']:.1f} bytes of code a key,"
            f" {index['resident_bytes_per_key']:.1f} resident{stale}"
        )
        recalls = ", ".join(f"@{k} {recall:.3f}" for k, recall in index["recall"].items())
        lines.append(f"    recall {recalls}; {index['certificate']['protocol']}")
    if not fields["indexes"]:
        lines.append("  no index yet: run `arrag-db index`")
    return "\n".join(lines)


def index_to_text(made: IndexManifest) -> str:
    """An index and its certificate, for people who have just built it."""
    probe = f", nprobe {made.nprobe}" if made.nprobe else ""
    lines = [
        f"index {made.name}: {made.index_key}{probe}, {made.count:,} keys in {made.entries:,}"
        f" entries, {made.code_bytes_per_key:.1f} bytes of code a key,"
        f" {made.resident_bytes_per_key:.1f} resident"
    ]
    if made.weights is not None:
        said = ", ".join(f"{weight:.2f}" for weight in made.weights)
        lines.append(f"  weights of the offsets {said}; distances are in these units")
    if fitted := made.metrics.get("weights"):
        low, high = fitted["gain_interval"]
        lines.append(
            f"  learned: {fitted['equal']:.3f} → {fitted['learned']:.3f} nats a token on"
            f" {fitted['judged_on']}; gain {fitted['gain']:.3f} ({low:.3f} to {high:.3f})"
            + ("" if low > 0 else ", which may be none: `--weights equal` does as well")
        )
    if made.left_out:
        lines.append(f"  {made.left_out:,} pictures are left out: removed ones or copies")
    certificate = Certificate.from_json(made.certificate).to_text()
    return "\n".join([*lines, textwrap.indent(certificate, "  ")])
