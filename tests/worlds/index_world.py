"""Indexing a small database in many small steps, and stopping it at any of them.

Run as `python -m tests.worlds.index_world MOMENT WORDS…` it is `arrag-db WORDS…` in small steps, and kills
itself with SIGKILL at the MOMENT-th change it makes in a folder in which an index is being built.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import pipeline.index
import pipeline.indexing.growth
import pipeline.indexing.steps
import stages.index.codebook_index
import stages.index.fill_lists
from arrag_runtime.format.ids import Ids, split_patch_ids
from arrag_runtime.format.manifest import IndexManifest, Layout, read_codebook
from stages.index.index_contents import index_contents

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir")
STEPS_OF = "100"
"""Rows that a part of a table may have, as `--worker-memory` in a world of small steps."""


def small_steps(patch: pytest.MonkeyPatch) -> None:
    """Make every shard a part, merge in slices of lists, and parts of an index as soon as three."""
    patch.setattr(pipeline.index, "_QUERIES", 60)
    patch.setattr(pipeline.indexing.growth, "_MOST_PARTS", 2)
    patch.setattr(pipeline.indexing.steps, "_MERGED_BY_A_STEP", 150)
    patch.setattr(stages.index.fill_lists, "MERGE_ENTRIES", 90)
    patch.setattr(stages.index.codebook_index, "MERGE_ENTRIES", 2)
    patch.setattr(stages.index.codebook_index, "_FIXED_BYTES", 0)
    patch.setattr(stages.index.codebook_index, "HELD_A_KEY", 1)


class Watch:
    """Counts the changes in folders in which an index is being built; `react` is told each."""

    def __init__(self) -> None:
        self.count = 0
        self.react: Callable[[int], None] = lambda _count: None
        self.watching = False
        # A hook cannot be taken away again, so one serves all tests.
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.watching and event in CHANGES and ".building-" in str(arguments[:2]):
            self.count += 1
            self.react(self.count)

    @contextmanager
    def changes(self, react: Callable[[int], None]) -> Iterator[None]:
        """Watch for as long as this lasts, counting from the start."""
        self.count, self.react, self.watching = 0, react, True
        try:
            yield
        finally:
            self.watching = False


WATCH = Watch()


def index_files(layout: Layout, name: str) -> dict[str, bytes]:
    """Every file of an index but its manifest, which holds times."""
    folder = Path(layout.index(name))
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    del files["manifest.json"]
    return {name: path.read_bytes() for name, path in files.items()}


def held_patches(layout: Layout, name: str) -> Ids:
    """The ids of all patches in an index, hidden or not, ascending."""
    folder = Path(layout.index(name))
    contents = index_contents(folder, IndexManifest.read(folder), read_codebook(layout))
    return np.sort(np.concatenate([np.empty(0, np.int64), *(b.patch_ids for b in contents)]))


def held_pictures(layout: Layout, name: str) -> set[int]:
    """The pictures that an index holds patches of."""
    return set(split_patch_ids(held_patches(layout, name))[0].tolist())


def _main() -> None:
    moment = int(sys.argv.pop(1))

    def kill(count: int) -> None:
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    from cli import main

    with pytest.MonkeyPatch.context() as patch, WATCH.changes(kill):
        small_steps(patch)
        main()


if __name__ == "__main__":
    _main()
