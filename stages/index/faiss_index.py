"""Patches table to a flat or ivfpq index: trained on a uniform sample, filled from a stream.

The only user of autofaiss, which is loaded for ivfpq alone: its advisers say whether memory suffices
before anything runs, and it trains and scores the index on the sample. Filling streams blocks from
a table scan, so memory grows with the index alone and not with the table.
"""

import contextlib
import io
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from arrag_runtime.device import available_memory
from arrag_runtime.format.errors import ArragError, BadInputError
from arrag_runtime.format.ids import Ids, contains, split_patch_ids
from arrag_runtime.format.manifest import IDS_FILE, INDEX_FILE, TOKENS_FILE
from arrag_runtime.format.patches import PatchTable
from arrag_runtime.format.specs import Floats, key_vectors
from arrag_runtime.search.faiss_search import has_gpu, inner_ivf
from schemas.settings.index import FEWEST_POINTS, IndexSettings, choose_ivfpq_lists, size_in_bytes

_TRAINING_POINTS_PER_LIST = 100
"""The released AR-RAG index was trained on this many."""


@dataclass(frozen=True)
class FilledIndex:
    """A filled index, not yet measured."""

    index: Any
    """faiss' own."""
    kind: str
    index_key: str
    """faiss' factory string."""
    trained_on: int
    """How many keys."""
    metrics: dict[str, Any]
    """autofaiss' own scores on the sample."""


def require_autofaiss() -> None:
    """Raise ArragError with the next step where autofaiss, which trains ivfpq, is not installed."""
    if find_spec("autofaiss") is None:
        raise ArragError(
            "an index of the kind ivfpq is trained by autofaiss, which is not installed;"
            " `pip install 'arrag[ivfpq]'` (Python 3.11 or 3.12, numpy 1.26), or use another --kind"
        )


def _default_index_key(keys: int, dimension: int) -> str:
    """The released layout with about 4·√keys lists, at least 39 training points each."""
    rotated = min(32, dimension - dimension % 8)
    return f"OPQ8_{rotated},IVF{choose_ivfpq_lists(keys)},PQ8x8"


def train_and_fill(
    table: PatchTable,
    codes: Floats,
    folder: Path,
    settings: IndexSettings,
    left_out: Ids,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> FilledIndex:
    """Train on a sample of the table, add every key, and write the index's files to `folder`.

    codes: the normalised codebook float32 [V, d]; settings: with their kind resolved; left_out: ids
    of pictures whose keys are not added, ascending. Raises BadInputError when the memory does not
    suffice, the table is empty or too small, or autofaiss gives up.
    """
    if table.count == 0:
        raise BadInputError("the patches table is empty, so there is nothing to index; build first")
    dimension = key_vectors(table.take([0]).keys, codes).shape[1]
    metrics: dict[str, Any] = {}
    if settings.kind == "flat":
        key, trained_on = "Flat", 0
        _require_memory(table.count * dimension * 4, settings, key)
        index = faiss.IndexFlatL2(dimension)
    else:
        key = settings.index_key or _default_index_key(table.count, dimension)
        index, trained_on, metrics = _train(table, codes, dimension, key, settings)
    index = _fill(index, table, codes, folder, left_out, progress)
    faiss.write_index(index, str(folder / INDEX_FILE))
    return FilledIndex(index, str(settings.kind), key, trained_on, metrics)


def _train(
    table: PatchTable, codes: Floats, dimension: int, key: str, settings: IndexSettings
) -> tuple[Any, int, dict[str, Any]]:
    """A trained, empty index; how many keys it was trained on; autofaiss' scores on them."""
    lists = int(match[1]) if (match := re.search(r"IVF(\d+)", key)) else 1
    wanted = max(lists, 256) * _TRAINING_POINTS_PER_LIST
    needed = max(256 if "PQ" in key else 1, lists * FEWEST_POINTS)
    if table.count < needed:
        raise BadInputError(
            f"{key} wants at least {needed} keys to train on and the table has {table.count};"
            " use --kind flat, or an --index-key with fewer lists"
        )
    empty = _make(key, dimension, table.count)
    ivf = inner_ivf(empty)
    found = 0 if ivf is None else ivf.nlist
    if settings.nprobe is not None and not 1 <= settings.nprobe <= found:
        raise BadInputError(f"--nprobe {settings.nprobe} is outside 1..{found} lists")
    require_autofaiss()
    from autofaiss import build_index as autofaiss_build_index
    from autofaiss.external.build import estimate_memory_required_for_index_creation
    from autofaiss.external.metadata import IndexMetadata
    from autofaiss.utils.cast import cast_bytes_to_memory_string

    # Where the system does not say what is free, as much as the index may take.
    memory = available_memory("cpu") or size_in_bytes("--memory", settings.memory)
    size = int(IndexMetadata(key, table.count, dimension, False).estimated_index_size_in_bytes())
    if size < 0:  # a layout that autofaiss does not know: codes, and 8 bytes of id per key
        size = table.count * (empty.sa_code_size() + 8)
    _require_memory(size, settings, key)
    required, _ = estimate_memory_required_for_index_creation(
        min(wanted, table.count), dimension, key
    )
    if required > memory:
        raise BadInputError(
            f"training {key} needs {cast_bytes_to_memory_string(required)} and"
            f" {cast_bytes_to_memory_string(memory)} are free; use an --index-key with fewer lists"
        )
    vectors = key_vectors(table.sample_keys(wanted, seed=settings.seed), codes)
    np.random.default_rng(settings.seed).shuffle(vectors)
    # autofaiss tells of failures by logging errors, or by raising one.
    logger, errors, raised = logging.getLogger("autofaiss"), BufferingHandler(1 << 10), ""
    errors.setLevel(logging.ERROR)
    logger.addHandler(errors)
    try:
        # It draws a bar per step; the caller shows its own.
        with contextlib.redirect_stderr(io.StringIO()):
            index, metrics = autofaiss_build_index(
                vectors,
                save_on_disk=False,
                index_key=key,
                index_param="nprobe=1" if "IVF" in key else None,
                metric_type="l2",
                max_index_memory_usage=cast_bytes_to_memory_string(int(memory * 0.8)),
                current_memory_available=cast_bytes_to_memory_string(memory),
                use_gpu=has_gpu(),
                # It would otherwise set the threads of the whole process, torch's too.
                nb_cores=faiss.omp_get_max_threads(),
                verbose=logging.ERROR,
            )
    except RuntimeError as error:
        index, metrics, raised = None, None, str(error).splitlines()[0]
    finally:
        logger.removeHandler(errors)
    if index is None:
        reasons = ["no reason given", *(record.getMessage() for record in errors.buffer)]
        raise BadInputError(f"autofaiss could not build {key}: {raised or reasons[-1]}")
    index.reset()
    scores = {k: v for k, v in (metrics or {}).items() if isinstance(v, int | float | str)}
    return index, len(vectors), scores


def _fill(
    index: Any,
    table: PatchTable,
    codes: Floats,
    folder: Path,
    left_out: Ids,
    progress: Callable[[int, int], None],
) -> Any:
    """The index with every key of the table in order, ids and next tokens written beside it.

    Where faiss sees a GPU an index with lists is filled there (not run on one yet).
    """
    ids: list[Ids] = []
    tokens: list[npt.NDArray[np.uint16]] = []
    done = 0
    filled, resources = index, None
    if has_gpu() and inner_ivf(index) is not None:
        resources = faiss.StandardGpuResources()
        filled = faiss.index_cpu_to_gpu(resources, 0, index)
    for block in table.blocks():
        taken = ~contains(left_out, split_patch_ids(block.patch_ids)[0])
        filled.add(key_vectors(block.keys[taken], codes))
        ids.append(block.patch_ids[taken])
        tokens.append(block.next_tokens[taken])
        done += len(block.patch_ids)
        progress(done, table.count)
    np.save(folder / IDS_FILE, np.concatenate(ids))
    np.save(folder / TOKENS_FILE, np.concatenate(tokens))
    return index if resources is None else faiss.index_gpu_to_cpu(filled)


def _make(key: str, dimension: int, keys: int) -> Any:
    """An empty index. Raises BadInputError for a factory string that faiss does not take."""
    try:
        return faiss.index_factory(dimension, key)
    except RuntimeError as error:
        reason = str(error).rsplit(": ", 1)[-1].strip()
        raise BadInputError(
            f"faiss cannot make an index '{key}' of {dimension} dimensions ({reason}); give a"
            f" factory string such as {_default_index_key(keys, dimension)}"
        ) from error


def _require_memory(size: int, settings: IndexSettings, key: str) -> None:
    allowed = size_in_bytes("--memory", settings.memory)
    if size > allowed:
        raise BadInputError(
            f"an index {key} takes about {size / 10**6:,.1f} MB of memory, more than"
            f" --memory {settings.memory}; allow more, or choose --kind ivfpq"
        )
