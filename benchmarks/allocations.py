"""CPU memory that PyTorch allocates, inside operations too, as its profiler records it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocations(work: Callable[[], Any]) -> list[tuple[int, int]]:
    """Return (time in ns on the clock of `time.time_ns`, bytes) of each allocation in `work()`, in order.

    Freed memory has a negative number of bytes.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")


def peak_bytes(changes: Sequence[tuple[int, int]], since: int = 0) -> int:
    """Return the largest number of bytes allocated at any one time, at or after `since` in nanoseconds."""
    held = peak = 0
    for when, change in changes:
        held += change
        if when >= since:
            peak = max(peak, held)
    return peak
