"""What PyTorch allocates on a CPU: every allocation, those inside an operation too, as its profiler tells them."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocations(work: Callable[[], Any]) -> list[tuple[int, int]]:
    """(nanoseconds as `time.time_ns` counts them, bytes) of each in `work()`, in order; freed bytes are negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")


def peak_bytes(changes: Sequence[tuple[int, int]], since: int = 0) -> int:
    """The most bytes allocated at one time, at or after the nanosecond `since`."""
    held = peak = 0
    for when, change in changes:
        held += change
        if when >= since:
            peak = max(peak, held)
    return peak
