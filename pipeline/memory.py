"""Gives freed memory back to the system.

glibc keeps what was freed for the next time, and more of it the larger the blocks that a process once
freed: an index build over ten million keys kept 100 MB that one over a million did not.
"""

import ctypes

M_MMAP_THRESHOLD = -3
THRESHOLD = 32 << 20
"""glibc's own largest. A threshold that is set no longer grows, and neither does what is kept."""


def give_memory_back() -> None:
    """Let this process keep little of what it frees, from now on; nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, THRESHOLD)
