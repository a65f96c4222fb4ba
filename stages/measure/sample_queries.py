"""Positions to ask about: from held-out pictures, or from a database's own with these left out."""

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids
from arrag_runtime.format.images import ImageTable
from arrag_runtime.format.specs import KeySpec, TokenizerSpec
from stages.measure.exact_search import Queries


def sample_queries(
    images: ImageTable,
    spec: TokenizerSpec,
    keys: KeySpec,
    *,
    pictures: int,
    queries: int,
    seed: int = 0,
    split: str | None = None,
) -> Queries:
    """Up to `queries` positions, drawn uniformly from up to `pictures` pictures.

    split: "heldout" or "database"; by default held-out pictures where there are any. A query may
    find neither its own picture nor a copy of it (known by the hash of its bytes), which matters
    for held-out pictures too: a copy may have stayed in the database. Keys are tokens also where
    the table holds latents, since tokens are all that a generator has.
    """
    chosen = split or "heldout"
    ids, grids = images.sample(chosen, pictures, seed=seed)
    if not len(ids) and split is None:
        chosen = "database"
        ids, grids = images.sample(chosen, pictures, seed=seed)
    height, width = spec.grid_height, spec.grid_width
    every = keys.neighborhood.keys(grids.reshape(-1, height, width))
    positions = keys.neighborhood.positions(height, width)
    total = len(ids) * len(positions)
    at = np.sort(np.random.default_rng(seed).choice(total, min(queries, total), replace=False))
    picture, position = np.divmod(at, len(positions))
    rows = images.rows(ids.tolist())
    hashes = [rows[image].sha256 for image in ids.tolist()]
    said = "pictures of the database, their own excluded"
    if chosen == "heldout":
        said = "held-out pictures"
    return Queries(
        keys=every[picture, position],
        next_tokens=grids[picture, positions[position]],
        images=ids[picture],
        exclude=images.copies_of(hashes)[picture],
        protocol=f"{len(at)} queries from {len(ids)} {said}",
    )


def halves(images: Ids, seed: int) -> npt.NDArray[np.bool_]:
    """Which queries are in the first half of the pictures (or of a single one's), bool [Q]."""
    names, group = np.unique(images, return_inverse=True)
    rng = np.random.default_rng(seed)
    if len(names) < 2:
        return rng.permutation(len(images)) < len(images) / 2
    chosen: npt.NDArray[np.bool_] = (rng.permutation(len(names)) < len(names) / 2)[group]
    return chosen
