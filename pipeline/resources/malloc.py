"""Settings of glibc's malloc, for processes that should not hold what they freed."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""From glibc's malloc.h."""
_THRESHOLD = 32 << 20
"""glibc's own largest. A threshold that is set no longer grows, and neither does what is kept."""


def give_memory_back() -> None:
    """Let this process keep little of what it frees, from now on.

    glibc keeps more of it the larger the blocks that a process once freed: an index build over ten
    million keys kept 100 MB that one over a million did not.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, _THRESHOLD)


def one_arena() -> None:
    """What MALLOC_ARENA_MAX=1 does, for a process that has read its environment already."""
    _call("mallopt", _M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Give the system all whole pages that are free now, also those between blocks in use.

    A driver frees a copy of its tables' lists of fragments at every commit, each a little longer
    than the one before, so that what is free between other blocks fits none of the next.
    """
    _call("malloc_trim", 0)


def _call(function: str, *numbers: int) -> None:
    """Nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        getattr(ctypes.CDLL(None), function)(*numbers)
