"""The free memory of a device."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(device: str) -> int:
    """Return the free bytes of a CUDA device, or of this machine within the limits of the process's control groups."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) << 10, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left below each memory limit of this process's groups (cgroups version 1 and 2)."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = CGROUPS / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (folder / name for name in names)
            if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
                yield max(0, int(text) - int(used.read_text()))
            if folder == base:
                break
