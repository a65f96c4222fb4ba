"""`arrag-db plan`: what a build would make and cost, before anything runs.

In: a source and rates. Out: pictures, patches, bytes of every table, memory of every kind of index,
hours, and how fast the suggested index would answer. Inputs are counted by the source (footers of
Parquet files are counts; where it had to estimate, the forecast says so). The constants are measured
(docs/log.md); nothing here loads a model or starts Ray.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.format.specs import KeySpec, key_spec
from schemas.records import Count
from schemas.settings.index import (
    IMBALANCE,
    PROBES,
    SCAN_NS,
    choose_ivfpq_lists,
    choose_lists,
    default_kind,
)
from schemas.settings.plan import ForecastSettings
from stages.sources import count_inputs

GRID, DIMENSION = (24, 24), 8
"""Of VQ-16 and of the bundled tokenizer; a database that exists says its own."""
BYTES_A_PATCH, BYTES_A_NEIGHBOR = 5, 2
"""Measured in Lance: 13 bytes a row of four neighbours, ids and next token included."""
BYTES_A_GRID_TOKEN = 1100 / 576
"""1.1 KB an image of 576 tokens, with caption and address."""
BYTES_A_REJECT, BYTES_A_SHARD = 200, 600
CODE_BYTES = {"codebook": 9, "ivfpq": 18}
"""Resident bytes a key: the packed codes, or codes and ids, with what next tokens take."""
SECONDS_A_SEARCH = 0.3e-3
"""Look-up tables and coarse search, once a query."""
SUCCESS = 0.9
"""Share of published addresses that still answered two years on."""


@dataclass(frozen=True)
class Forecast:
    """What `forecast` found. Bytes are whole, hours None where no rate is known."""

    source: str
    inputs: int
    exact: bool
    note: str
    in_database: int
    images: int
    heldout: int
    patches: int
    tables: Mapping[str, int]
    index_memory: Mapping[str, int]
    index: Mapping[str, Any]
    download_hours: float | None
    gpu_hours: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def disk_bytes(self) -> int:
        """All tables together."""
        return sum(self.tables.values())

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return vars(self) | {"disk_bytes": self.disk_bytes}


def forecast(settings: ForecastSettings) -> Forecast:
    """Count the source's inputs and work out what they become.

        links = SourceSettings(name="cc12m", input=("cc12m.tsv",))
        print(to_text(forecast(ForecastSettings(source=links, images_per_second=300))))

    Raises BadInputError for inputs that are not there or would have to be fetched.
    """
    manifest = _manifest(settings.database)
    return work_out(settings, count_inputs(settings.source), manifest, _recorded(settings))


def work_out(
    settings: ForecastSettings,
    count: Count,
    manifest: DatabaseManifest | None = None,
    in_database: int = 0,
) -> Forecast:
    """The forecast for so many inputs. Pure."""
    keys = (
        manifest.keys if manifest else key_spec(settings.neighborhood, settings.border, "codebook")
    )
    height, width, dimension = _grid(manifest)
    hold_out = manifest.hold_out if manifest else settings.hold_out
    success = SUCCESS if count.links else 1.0
    success = success if settings.success is None else settings.success
    images = round(count.inputs * success)
    heldout = round(images * hold_out)
    positions = len(keys.neighborhood.positions(height, width))
    patches = (images - heldout) * positions
    rate = settings.images_per_second or _measured(manifest)
    return Forecast(
        source=settings.source.name,
        inputs=count.inputs,
        exact=count.exact,
        note=count.note,
        in_database=in_database,
        images=images,
        heldout=heldout,
        patches=patches,
        tables=_tables(count.inputs, images, patches, keys, height * width),
        index_memory=_memory(patches, keys, dimension),
        index=suggest_index(patches, settings.query_ms, space=keys.space),
        download_hours=count.inputs / settings.rate / 3600 if count.links else None,
        gpu_hours=images / rate / 3600 if rate else None,
        settings={
            "success": success,
            "rate": settings.rate if count.links else None,
            "images_per_second": rate,
            "keys": keys.name,
            "grid": [height, width],
            "hold_out": hold_out,
        },
    )


def suggest_index(keys: int, query_ms: float, *, space: str = "codebook") -> dict[str, Any]:
    """The index that `arrag-db index` builds for this many keys, and what a query would take.

    milliseconds: of one query on one thread; threads: how many answer it within `query_ms`.
    """
    name = default_kind(space, keys)
    kind: dict[str, Any] = {"kind": name, "lists": None, "nprobe": None}
    scanned = float(keys)
    if name != "flat":
        of_codebook = name == "codebook"
        lists = choose_lists(keys, query_ms) if of_codebook else choose_ivfpq_lists(keys)
        nprobe = min(PROBES, lists)
        kind |= {"lists": lists, "nprobe": nprobe}
        scanned = keys / lists * nprobe * IMBALANCE
    seconds = SECONDS_A_SEARCH + scanned * SCAN_NS * 1e-9
    threads = max(1, math.ceil(seconds * 1000 / query_ms))
    return kind | {"milliseconds": seconds * 1000, "threads": threads, "query_ms": query_ms}


def _tables(
    inputs: int, images: int, patches: int, keys: KeySpec, positions: int
) -> dict[str, int]:
    """Bytes on disk of each table."""
    return {
        "patches": patches * (BYTES_A_PATCH + BYTES_A_NEIGHBOR * keys.neighborhood.size),
        "images": round(images * BYTES_A_GRID_TOKEN * positions),
        "rejects": (inputs - images) * BYTES_A_REJECT,
        "shards": math.ceil(inputs / 10_000) * BYTES_A_SHARD,
    }


def _memory(patches: int, keys: KeySpec, dimension: int) -> dict[str, int]:
    """Bytes of memory of each kind of index over so many keys."""
    kinds = CODE_BYTES if keys.space == "codebook" else {"ivfpq": CODE_BYTES["ivfpq"]}
    return {kind: patches * size for kind, size in kinds.items()} | {
        "flat": patches * 4 * keys.neighborhood.size * dimension
    }


def _grid(manifest: DatabaseManifest | None) -> tuple[int, int, int]:
    if manifest is None:
        return (*GRID, DIMENSION)
    spec = manifest.tokenizer
    return spec.grid_height, spec.grid_width, spec.dimension


def _manifest(database: str | Path) -> DatabaseManifest | None:
    layout = Layout(database)
    return DatabaseManifest.read(layout) if exists(layout.manifest) else None


def _recorded(settings: ForecastSettings) -> int:
    """How many inputs of this source the database has already."""
    if _manifest(settings.database) is None:
        return 0
    from stages.tables.ledger import read_ledger

    state = read_ledger(Layout(settings.database))
    return state.by_source.get(settings.source.name, {}).get("inputs", 0)


def _measured(manifest: DatabaseManifest | None) -> float | None:
    """Pictures a second that the encoders of the last run made, by its own account."""
    for run in reversed(manifest.runs if manifest else ()):
        hours = run.get("hours", {}).get("encode", 0)
        if hours and run.get("images"):
            return float(run["images"] / hours / 3600)
    return None


def to_text(made: Forecast) -> str:
    """The forecast for people."""
    about = "" if made.exact else "about "
    used = made.settings
    index = made.index
    lines = [
        f"{made.source}: {about}{made.inputs:,} inputs"
        + (f" (an estimate: {made.note})" if not made.exact else ""),
        f"  {made.images:,} images at {used['success']:.0%} success, {made.heldout:,} held out;"
        f" {made.patches:,} patches ({used['keys']})",
        "  on disk "
        + ", ".join(f"{name} {size(n)}" for name, n in made.tables.items())
        + f"; {size(made.disk_bytes)} in all",
        "  index memory " + ", ".join(f"{k} {size(n)}" for k, n in made.index_memory.items()),
        f"  suggested index: {index['kind']}"
        + (f", {index['lists']:,} lists, nprobe {index['nprobe']}" if index["lists"] else "")
        + f"; {index['milliseconds']:.1f} ms a query on one thread,"
        f" {index['threads']} thread{'s' * (index['threads'] > 1)} for {index['query_ms']:g} ms",
    ]
    if made.in_database:
        lines.insert(1, f"  {made.in_database:,} inputs of this source are in the database already")
    if made.download_hours is not None:
        rate = f"{used['rate']:g} addresses/s"
        lines.append(f"  download {made.download_hours:,.1f} hours at {rate}")
    if made.gpu_hours is not None:
        rate = f"{used['images_per_second']:,.1f} images/s"
        lines.append(f"  encoding {made.gpu_hours:,.1f} hours at {rate}")
    else:
        lines.append("  encoding: no rate is known; give --images-per-second")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
