"""The share of a GPU's peak (MFU) that a plan assumes: as given, as measured and committed, or 0.4. Needs no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

import npp_ds
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.sizes import SIZES, parameter_count
from npp_ds.utils.files import read_small
from npp_ds.utils.gpu_specs import GPU, has_own_rate

ASSUMED_MFU = 0.4
"""The MFU where nothing was measured."""
RESULTS = Path(npp_ds.__file__).parent.parent / "benchmarks/results/mfu_gpu.json"
"""The file that `python -m benchmarks.mfu --gpu --out benchmarks/results` writes; only a checkout has it."""
SAME_SIZE = 1.5
"""A model counts as the nearest published size if their numbers of parameters differ by less than this factor."""
ENGINE = "engine"
"""Prefix of the ways that train through DeepSpeed; the benchmark also measures bare loops, which no run uses."""


@dataclass(frozen=True)
class Mfu:
    """Model FLOPs over the GPU's peak; `source` names file, device and case of a measured one."""

    share: float
    origin: Literal["given", "measured", "assumed"]
    source: str | None = None


class _Case(BaseModel):
    """A case of the benchmark's file; `mfu` is None if it failed."""

    size: str
    patch_side: int = Field(ge=1)
    way: str
    gpu: str
    mfu: float | None = Field(None, gt=0, lt=1)

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if value not in SIZES:
            raise ValueError(f"expected one of {', '.join(SIZES)}")
        return value


class _Machine(BaseModel):
    gpu: str


class _Results(BaseModel):
    batch: int
    machine: _Machine
    cases: list[_Case]


def mfu_by_side(config: RunConfig, gpu: GPU, given: float | None) -> Callable[[int], Mfu]:
    """Return a function patch side -> MFU: `given`, else measured on this GPU for the nearest size, else assumed.

    Raises UserError if the file of measurements is not as the benchmark writes it.
    """
    if given is not None:
        return lambda patch_side: Mfu(given, "given")
    measured = {}
    if has_own_rate(gpu):  # else the measured share is of another peak
        measured = read_measured(RESULTS, gpu.name, nearest_size(config), way_of(config))
    return lambda patch_side: measured.get(patch_side, Mfu(ASSUMED_MFU, "assumed"))


def nearest_size(config: RunConfig) -> str | None:
    """Return the published size with about as many parameters, or None."""
    count = config.model.parameters()
    factors = {size: abs(math.log(count / parameter_count(**shape))) for size, shape in SIZES.items()}
    nearest = min(factors, key=factors.__getitem__)
    return nearest if factors[nearest] < math.log(SAME_SIZE) else None


def way_of(config: RunConfig) -> str:
    """Return the benchmark's name for the way in which this config trains."""
    compiled = "compiled" if config.performance.compile else "eager"
    return f"{ENGINE} {compiled}{', CUDA graphs' if config.performance.cuda_graphs else ''}"


def read_measured(path: Path, gpu: str, size: str | None, way: str) -> dict[int, Mfu]:
    """Return patch side -> MFU of the engine's cases on this GPU and of this size; {} if there is no file.

    If `way` was not measured, take the slowest of the engine's ways, so that a plan promises no more. Raises UserError.
    """
    if not path.is_file():
        return {}
    results = _read_results(path)
    conditions = f"{results.batch} images a step on one {results.machine.gpu}"
    cases = [
        (case.way != way, case.mfu, case)
        for case in results.cases
        if (case.gpu, case.size) == (gpu, size) and case.way.startswith(ENGINE) and case.mfu is not None
    ]
    found: dict[int, Mfu] = {}
    for _, mfu, case in sorted(cases, key=lambda item: item[:2]):
        source = f"{'/'.join(path.parts[-3:])}: {size} at side {case.patch_side}, {case.way}, {conditions}"
        found.setdefault(case.patch_side, Mfu(mfu, "measured", source))
    return found


def _read_results(path: Path) -> _Results:
    try:
        return _Results.model_validate_json(read_small(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{key}: found {first['input']!r}: {first['msg']}" if key else first["msg"]
        raise UserError(
            f"{path}: not what the benchmark writes: {what}; measure again with "
            "`python -m benchmarks.mfu --gpu --out benchmarks/results`, restore the file, or give --mfu"
        ) from error
