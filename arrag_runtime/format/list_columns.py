"""Arrays of two dimensions as Arrow columns of fixed-size lists, and back."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def fixed_lists(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """An array [N, n] as Arrow fixed-size lists, without copying."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def list_values(column: pa.ChunkedArray | pa.Array) -> npt.NDArray[Any]:
    """The values [N, n] of a fixed-size list column."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: npt.NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(array), array.type.list_size)
