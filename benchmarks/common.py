"""What all benchmarks share: which machine the figures are from, and where they go."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from npp_ds.files import write_json_atomic, write_text_atomic


def machine(*packages: str) -> dict[str, str | int | None]:
    """What the figures depend on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line]
    versions = {package: version(package) for package in packages}
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), **versions}


def publish(result: dict, table: str, out: Path | None) -> None:
    """Prints the table and the result as one JSON line; with `out` also writes <benchmark>.md and .json there."""
    print(table)
    print(json.dumps(result))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / f"{result['benchmark']}.json", result)
        write_text_atomic(out / f"{result['benchmark']}.md", table)
