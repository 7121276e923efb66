"""Which share of a GPU's peak a plan counts on: as given, as measured and committed, or assumed. Pure: no torch."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import npp_ds
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.sizes import SIZES, parameter_count
from npp_ds.utils.gpu_specs import GPU, GPUS

ASSUMED_MFU = 0.4
"""Where nothing was measured."""
RESULTS = Path(npp_ds.__file__).parent.parent / "benchmarks/results/mfu_gpu.json"
"""What `python -m benchmarks.mfu --gpu --out benchmarks/results` writes: there in a checkout, absent elsewhere."""
SAME_SIZE = 1.5
"""A model is taken for a published one whose number of parameters differs by less than this factor."""


ENGINE = "engine"
"""How the name of a way that trains through DeepSpeed begins; a bare loop is not what a run does."""
CASE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": (f"one of {', '.join(SIZES)}", lambda value: value in SIZES),
    "patch_side": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "way": ("a name", lambda value: isinstance(value, str)),
    "gpu": ("a name", lambda value: isinstance(value, str)),
    "mfu": ("a share between 0 and 1", lambda value: value is None or (type(value) is float and 0 < value < 1)),
}
"""What every case of the file has: key -> (what is expected, whether a value is that)."""


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs over the GPU's peak; `source` tells file, device and case of a measured one."""

    share: float
    origin: Literal["given", "measured", "assumed"]
    source: str | None = None


def mfu_by_side(config: RunConfig, gpu: GPU, given: float | None) -> Callable[[int], Mfu]:
    """patch side -> MFU: `given`, else measured on this GPU for the nearest published size, else `ASSUMED_MFU`.

    Raises UserError when the file of measurements is not as the benchmark writes it.
    """
    if given is not None:
        return lambda patch_side: Mfu(given, "given")
    known = GPUS.get(gpu.name)
    comparable = known is not None and known.tflops == gpu.tflops  # else it is a share of another peak
    measured = read_measured(RESULTS, gpu.name, nearest_size(config), way_of(config)) if comparable else {}
    return lambda patch_side: measured.get(patch_side, Mfu(ASSUMED_MFU, "assumed"))


def nearest_size(config: RunConfig) -> str | None:
    """The published size of about as many parameters, None where there is none."""
    count = config.model.parameters()
    factors = {size: abs(math.log(count / parameter_count(**shape))) for size, shape in SIZES.items()}
    nearest = min(factors, key=factors.__getitem__)
    return nearest if factors[nearest] < math.log(SAME_SIZE) else None


def way_of(config: RunConfig) -> str:
    """What the benchmark calls the way that this config trains in."""
    compiled = "compiled" if config.performance.compile else "eager"
    return f"{ENGINE} {compiled}{', CUDA graphs' if config.performance.cuda_graphs else ''}"


def read_measured(path: Path, gpu: str, size: str | None, way: str) -> dict[int, Mfu]:
    """patch side -> MFU of the engine's cases on this GPU and of this size, {} where there is no file.

    Where `way` was not measured the slowest of the engine's ways counts: a plan promises no more. Raises UserError.
    """
    if not path.is_file():
        return {}
    cases = [
        (case, conditions)
        for case, conditions in _cases(path)
        if (case["gpu"], case["size"]) == (gpu, size) and case["way"].startswith(ENGINE) and case["mfu"] is not None
    ]
    found: dict[int, Mfu] = {}
    for case, conditions in sorted(cases, key=lambda c: (c[0]["way"] != way, c[0]["mfu"])):
        source = f"{'/'.join(path.parts[-3:])}: {size} at side {case['patch_side']}, {case['way']}, {conditions}"
        found.setdefault(case["patch_side"], Mfu(case["mfu"], "measured", source))
    return found


def _cases(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(case, the conditions it was measured under) of a file of measurements; a case that failed has the MFU None."""
    try:
        result = json.loads(path.read_text())
        conditions = f"{result['batch']} images a step on one {result['machine']['gpu']}"
        for number, case in enumerate(result["cases"]):
            for key, (expected, is_right) in CASE.items():
                if not is_right(case.get(key)):
                    raise ValueError(f"cases[{number}].{key} is {case.get(key)!r}, expected {expected}")
            yield {"mfu": None, **case}, conditions
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: not what the benchmark writes: {what}; measure again with "
            "`python -m benchmarks.mfu --gpu --out benchmarks/results`, restore the file, or give --mfu"
        ) from error
