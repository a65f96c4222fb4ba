"""Reading rejects: the table is only appended to, and this says which of its rows still hold."""

from collections.abc import Sequence

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.ledger import LedgerState

NEEDED = ("shard", "attempt", "row")


def open_rejects(path: str, state: LedgerState, columns: Sequence[str] = ()) -> pa.Table:
    """The rejects that are open: shard, attempt, row and these columns of them.

    A reject is open when its attempt is done and no later done attempt of its shard took its row.
    """
    table = lance.dataset(path).to_table(columns=list(dict.fromkeys((*NEEDED, *columns))))
    done = pa.array(list(state.attempts), pa.string())
    again = pa.array(list(state.taken), pa.string())
    finished = table.filter(pc.is_in(table["shard"], done))
    tried_again = pc.is_in(finished["shard"], again)
    # Nearly all shards have one attempt, and what is left of a killed one has a higher number.
    once = finished.filter(pc.and_(pc.invert(tried_again), pc.equal(finished["attempt"], 1)))
    several = finished.filter(tried_again)
    if not several.num_rows:
        return once
    entries = zip(*(several[name].to_pylist() for name in NEEDED), strict=True)
    still = [attempt == state.taken[shard].get(row, 1) for shard, attempt, row in entries]
    return pa.concat_tables([once, several.filter(pa.array(np.array(still)))])
