"""Memory that a process on CPUs has freed, kept for its next tensors, as PyTorch does on a GPU."""

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of `mallopt` in glibc's malloc.h."""
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")
"""Variables that decide the same; `GLIBC_TUNABLES` may, too."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc's allocator keep what tensors free, for the rest of this process; return whether it does.

    By default the memory of a large tensor goes back to the system when it is freed, and the system clears every page
    of the next one, which takes a good part of a short step. The process then stays as large as it has been.
    Changes nothing under settings of the user's own, or with another C library.
    """
    if any(name in environment for name in OF_THE_USER) or "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No tensor in a mapping of its own, and nothing of the heap's end given back.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
