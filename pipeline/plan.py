"""`arrag-db plan`: what a build would make and cost, before anything runs.

In: a source and rates. Out: pictures, patches, bytes of every table, memory of every kind of index,
hours, and how fast the suggested index would answer. Inputs are counted by the source (footers of
Parquet files are counts; where it had to estimate, the forecast says so). The constants are
measured (docs/log.md); nothing here loads a model or starts Ray.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arrag_runtime.format.location import exists
from arrag_runtime.format.manifest import DatabaseManifest, Layout
from arrag_runtime.format.specs import key_spec
from schemas.records import Count
from schemas.settings import index as indexes
from schemas.settings.plan import ForecastSettings
from stages.sources import count_inputs

_GRID, _DIMENSION = (24, 24), 8
"""Of VQ-16 and of the bundled tokenizer; a database that exists says its own."""
_BYTES_A_PATCH, _BYTES_A_NEIGHBOR = 5, 2
"""Measured in Lance: 13 bytes a row of four neighbours, ids and next token included."""
_BYTES_A_GRID_TOKEN = 1100 / 576
"""1.1 KB an image of 576 tokens, with caption and address."""
_BYTES_A_REJECT, _BYTES_A_SHARD = 200, 600
_CODE_BYTES = {"codebook": 9, "ivfpq": 18}
"""Resident bytes a key: the packed codes, or codes and ids, with what next tokens take."""
_SECONDS_A_SEARCH = 0.3e-3
"""Look-up tables and coarse search, once a query."""
_SUCCESS = 0.9
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
    settings: Mapping[str, Any]

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
    layout = Layout(settings.database)
    manifest = DatabaseManifest.read(layout) if exists(layout.manifest) else None
    count = count_inputs(settings.source)
    if manifest is None:
        return work_out(settings, count)
    from stages.tables.ledger import read_ledger

    recorded = read_ledger(layout).by_source.get(settings.source.name, {})
    return work_out(settings, count, manifest, recorded.get("inputs", 0))


def work_out(
    settings: ForecastSettings,
    count: Count,
    manifest: DatabaseManifest | None = None,
    in_database: int = 0,
) -> Forecast:
    """The forecast for so many inputs. Pure."""
    if manifest is None:
        keys = key_spec(settings.neighborhood, settings.border, "codebook")
        height, width, dimension, hold_out = *_GRID, _DIMENSION, settings.hold_out
    else:
        spec, keys, hold_out = manifest.tokenizer, manifest.keys, manifest.hold_out
        height, width, dimension = spec.grid_height, spec.grid_width, spec.dimension
    success = _SUCCESS if count.links else 1.0
    success = success if settings.success is None else settings.success
    images = round(count.inputs * success)
    heldout = round(images * hold_out)
    patches = (images - heldout) * len(keys.neighborhood.positions(height, width))
    tables = {
        "patches": patches * (_BYTES_A_PATCH + _BYTES_A_NEIGHBOR * keys.neighborhood.size),
        "images": round(images * _BYTES_A_GRID_TOKEN * (height * width)),
        "rejects": (count.inputs - images) * _BYTES_A_REJECT,
        "shards": math.ceil(count.inputs / 10_000) * _BYTES_A_SHARD,
    }
    kinds = ("codebook", "ivfpq") if keys.space == "codebook" else ("ivfpq",)
    index_memory = {kind: patches * _CODE_BYTES[kind] for kind in kinds}
    index_memory["flat"] = patches * 4 * keys.neighborhood.size * dimension
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
        tables=tables,
        index_memory=index_memory,
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
    kind = indexes.default_kind(space, keys)
    lists, nprobe, scanned = None, None, float(keys)
    if kind == "codebook":
        lists = indexes.choose_lists(keys, query_ms)
    elif kind == "ivfpq":
        lists = indexes.choose_ivfpq_lists(keys)
    if lists is not None:
        nprobe = min(indexes.PROBES, lists)
        scanned = keys / lists * nprobe * indexes.IMBALANCE
    seconds = _SECONDS_A_SEARCH + scanned * indexes.SCAN_NS * 1e-9
    threads = max(1, math.ceil(seconds * 1000 / query_ms))
    timing = {"milliseconds": seconds * 1000, "threads": threads, "query_ms": query_ms}
    return {"kind": kind, "lists": lists, "nprobe": nprobe} | timing


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
        + ("" if made.exact else f" (an estimate: {made.note})"),
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
        lines.append(f"  download {made.download_hours:,.1f} hours at {used['rate']:g} addresses/s")
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
