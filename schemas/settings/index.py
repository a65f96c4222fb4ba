"""How an index is to be made. Kept in its manifest, so that a grown table is indexed likewise."""

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from arrag_runtime.format.errors import BadInputError
from arrag_runtime.settings import Option, check

if TYPE_CHECKING:
    from arrag_runtime.format.specs import KeySpec

Kind = Literal["codebook", "ivfpq", "flat"]
FLAT_UP_TO = 50_000
"""Latent keys: below this many exact search is as fast as anything and takes a few megabytes."""
FEWEST_POINTS = 39
"""faiss' own minimum of training points a list; below it centroids are badly placed."""
MOST_LISTS = 1 << 20
SCAN_NS, IMBALANCE, PROBES = 11, 2.1, 48
"""Measured: nanoseconds a code scanned, lists' imbalance factor, lists visited at 0.98 recall@10."""
BALANCE = 8
"""Lists for each √key at which looking at centroids and at codes cost about the same."""
QUERY_MS = 0.5
"""Wanted milliseconds of a query on one core, by default."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def default_kind(space: str, keys: int) -> Kind:
    """The kind of index that suits this many keys of a space, "codebook" or "latent"."""
    return "codebook" if space == "codebook" else "flat" if keys <= FLAT_UP_TO else "ivfpq"


def choose_lists(keys: int, query_ms: float) -> int:
    """How many lists of a codebook index let a query take about `query_ms` on one core.

    Coarse search aside. At least `BALANCE`·√keys, so that finding the lists and scanning them stay
    in balance, and at most what `FEWEST_POINTS` keys per list allow.
    """
    scan = keys * PROBES * IMBALANCE * SCAN_NS / (query_ms * 1e6)
    wanted = max(BALANCE * math.sqrt(keys), scan)
    return max(1, min(round(wanted), keys // FEWEST_POINTS, MOST_LISTS))


def choose_ivfpq_lists(keys: int) -> int:
    """As many lists of an ivfpq index as the released one had for its size, about 4·√keys."""
    return max(1, min(round(4 * math.sqrt(keys)), keys // FEWEST_POINTS))


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How an index is to be made, and how well it must do."""

    kind: Annotated[Kind | None, Option(shown="codebook; latent keys: by size")] = None
    """codebook, ivfpq or flat."""
    index_key: Annotated[str | None, Option(shown="OPQ8_32,IVFn,PQ8x8")] = None
    """ivfpq: a faiss factory string."""
    lists: Annotated[int | None, Option(minimum=1, shown="by --query-ms")] = None
    """codebook: coarse lists."""
    query_ms: Annotated[float, Option(minimum=0.01)] = QUERY_MS
    """codebook: milliseconds a query may scan on one core."""
    target_recall: Annotated[str, Option(panel="Certificate")] = "0.95"
    """nprobe is the smallest that reaches it; R or R@K."""
    nprobe: Annotated[int | None, Option(panel="Certificate", minimum=1, shown="by the target")] = (
        None
    )
    """Lists a search visits."""
    weights: Annotated[str, Option()] = "equal"
    """codebook: equal, learned, or one number per offset: 1,2,…"""
    max_copies: Annotated[int, Option(minimum=1)] = 16
    """codebook: more identical entries are stored once."""
    dedup: Annotated[Literal["none", "images"], Option()] = "none"
    """codebook: none, or images to leave out copies of pictures."""
    memory: Annotated[str, Option(panel="Machine")] = "4GB"
    """What the index may take in memory."""
    worker_memory: Annotated[str, Option(panel="Machine")] = "600MB"
    """codebook: what a process may take while it fills."""
    seed: int = 0
    """Decides which keys lists are learned from."""

    def __post_init__(self) -> None:
        check(self)

    def resolved(self, keys: "KeySpec", count: int) -> "IndexSettings":
        """The same with the kind that suits the keys where none was asked for.

        Raises BadInputError for settings that no index can have, or that do not go together.
        """
        by_key: Kind | None = "ivfpq" if self.index_key is not None else None
        kind = self.kind or by_key or default_kind(keys.space, count)
        if kind == "codebook" and keys.space != "codebook":
            raise BadInputError(
                f"--kind codebook packs the tokens of a key, and keys in {keys.space} space have"
                " none; use --kind ivfpq"
            )
        for option, given, needed in (
            ("--index-key", self.index_key is not None, "ivfpq"),
            ("--lists", self.lists is not None, "codebook"),
            ("--weights", self.weights != "equal", "codebook"),
            ("--dedup", self.dedup != "none", "codebook"),
        ):
            if given and kind != needed:
                raise BadInputError(f"{option} is for --kind {needed}, not {kind}; leave it out")
        if self.nprobe is not None and kind == "flat":
            raise BadInputError("--nprobe is for kinds with lists, not flat; leave it out")
        size_in_bytes("--memory", self.memory)
        size_in_bytes("--worker-memory", self.worker_memory)
        self.typed_weights(keys)
        return replace(self, kind=kind)

    def typed_weights(self, keys: "KeySpec") -> tuple[float, ...] | None:
        """The weights that were typed, scaled to a mean of 1; None for equal or learned ones."""
        if self.weights in ("equal", "learned"):
            return None
        offsets = keys.neighborhood.size
        try:
            weights = tuple(map(float, self.weights.split(",")))
        except ValueError:
            weights = ()
        finite = all(map(math.isfinite, weights))
        if len(weights) != offsets or not finite or min(weights) < 0 or sum(weights) == 0:
            raise BadInputError(
                f"--weights '{self.weights}' is neither equal, learned nor {offsets} numbers, one an"
                f" offset of {keys.neighborhood.name}, such as {','.join(['1'] * offsets)}"
            )
        mean = sum(weights) / offsets
        return tuple(weight / mean for weight in weights)

    def to_json(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)

    @staticmethod
    def from_json(kept: dict[str, Any]) -> "IndexSettings":
        """What `to_json` gave; what else stands there is left aside."""
        known = {field.name for field in fields(IndexSettings)}
        return IndexSettings(**{name: value for name, value in kept.items() if name in known})


def size_in_bytes(option: str, text: str) -> int:
    """A size such as 4GB, 512MB or 1.5G. Raises BadInputError for what is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise BadInputError(f"{option} '{text}' is not a size such as 4GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
