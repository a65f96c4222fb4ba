"""Means with their uncertainty: intervals by resampling whole pictures.

Positions of one picture resemble each other, so a picture is what is drawn, with all its positions.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from arrag_runtime.format.ids import Ids

_ROUNDS = 1000
_LEVEL = 0.95


def mean_interval(
    values: npt.NDArray[Any], images: Ids, *, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The mean of each column and the ends of its 95 % interval, float64 [C] each.

    values: [Q, C], NaN where there is none; images: int64 [Q], the picture each row is from. The
    columns share their draws, so the interval of a column of differences is that of a paired test.
    NaN for a column without values.
    """
    names, group = np.unique(images, return_inverse=True)
    known = ~np.isnan(values)
    sums = np.zeros((len(names), values.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, group, np.where(known, values, 0.0))
    np.add.at(counts, group, known)
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=_ROUNDS
    )
    # A column without values is NaN; draws in which it has none are left out.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        means = (draws @ sums) / (draws @ counts)
        mean = sums.sum(axis=0) / counts.sum(axis=0)
        low, high = np.nanquantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
    return mean, low, high
