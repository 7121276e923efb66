"""What a run will take, before it is started: FLOPs, memory and time, from the config alone. Pure: no torch.

The formulas, their sources and what is left out are in `docs/planning.md`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from npp_ds.config.load import problems_of
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError
from npp_ds.planning.memory import FP32, Memory, training_memory, weight_bytes
from npp_ds.planning.mfu import Mfu, mfu_by_side
from npp_ds.training.deepspeed_config import read_settings
from npp_ds.utils.gpu_specs import GPU

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
USABLE_MEMORY = 0.9
"""Share of a GPU's memory that a plan fills; the rest is for the CUDA context, NCCL and what the allocator loses."""
COARSE_BATCH_SCALE_SHOWN = 4
"""The schedule.coarse_batch_scale that a plan compares with when the config leaves it at 1."""
REPEATED_FLOPS = {"none": 1.0, "selective": 1.0, "block": 4 / 3}
"""What activation checkpointing multiplies the FLOPs by: `block` runs a third pass as long as the forward pass."""

Mfus = Callable[[int], Mfu]
"""patch side -> MFU."""


@dataclass(frozen=True)
class ZeroPlan:
    """Memory of a GPU with one of DeepSpeed's ZeRO stages, in the training stage that takes the most."""

    zero_stage: int
    is_chosen: bool
    patch_side: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class StagePlan:
    """One stage of the run; `flops` and `hours` are of the whole stage, seconds of one optimizer step.

    `configured_micro_batch_size` is what `npp train` takes, `micro_batch_size` the largest up to it that fits the GPU.
    """

    patch_side: int
    epochs: float
    steps: int
    positions: int
    batch_size: int
    learning_rate: float
    configured_micro_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    flops: int
    mfu: Mfu
    compute_seconds: float
    communication_seconds: float
    hours: float

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def limit(self) -> str:
        """What a step waits for."""
        return "compute" if self.compute_seconds >= self.communication_seconds else "communication"


@dataclass(frozen=True)
class Lever:
    """The run's time with another schedule.coarse_batch_scale, beside next-token training too."""

    coarse_batch_scale: int
    time_cost: float
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """Everything that `npp plan` shows. The costs are relative to next-token training on the same images: positions,
    FLOPs, and time on these GPUs."""

    name: str
    parameters: int
    images: int
    images_source: str
    gpu: GPU
    gpus: int
    precision: str
    activation_checkpointing: str
    token_cost: float
    flop_cost: float
    time_cost: float
    flops: int
    stages: list[StagePlan]
    zero: list[ZeroPlan]
    days: float
    gpu_hours: float
    levers: list[Lever]

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values, stages with their share of the FLOPs and what limits them."""
        stages = [{**asdict(s), "share": s.flops / self.flops, "limit": s.limit} for s in self.stages]
        return {**asdict(self), "stages": stages}


def make_plan(config: RunConfig, gpu: GPU, gpus: int, mfu: float | None = None, images: int | None = None) -> Plan:
    """`mfu` None: what was measured, else an assumption (`mfu.py`). Raises UserError when the config does not fit the
    number of images or GPUs.
    """
    count, source = _images(config, images)
    if problems := problems_of(config, gpus, count):
        text = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"the config does not fit {count:,} images ({source}) and {gpus} GPUs:\n{text}")
    own = read_settings(config.deepspeed.config)["zero_optimization"]
    schedule = config.build_schedule(count, gpus)
    fit, mfus = _Fit(config, gpu, gpus), mfu_by_side(config, gpu, mfu)
    stages = [_plan_stage(fit, own, stage, mfus) for stage in schedule.stages]
    days, gpu_hours, time_cost = _time(fit, own, schedule.stages, mfus)
    return Plan(
        name=config.name,
        parameters=config.model.parameters(),
        images=count,
        images_source=source,
        gpu=gpu,
        gpus=gpus,
        precision=config.precision,
        activation_checkpointing=config.model.activation_checkpointing,
        token_cost=schedule.token_cost(),
        flop_cost=schedule.flop_cost(config.model.grid_size, config.model.training_flops),
        time_cost=time_cost,
        flops=sum(s.flops for s in stages),
        stages=stages,
        zero=[_plan_zero(fit, zero, schedule.stages, zero is own) for zero in _zero_settings(own, config.precision)],
        days=days,
        gpu_hours=gpu_hours,
        levers=list(_levers(config, fit, own, count, mfus)),
    )


def _images(config: RunConfig, given: int | None) -> tuple[int, str]:
    """(training images, where the number is from)."""
    if given is not None:
        return given, "--images"
    manifest = available_manifest(config.data.train, config.data.cache_dir)
    return (manifest.num_samples, config.data.train) if manifest else (IMAGENET, "ImageNet-1K; no shards at hand")


def _zero_settings(own: Mapping[str, Any], precision: str) -> list[Mapping[str, Any]]:
    """The shipped settings of ZeRO-1 (not with bf16, which refuses it), 2 and 3, the run's own in place of one."""
    numbers = (2, 3) if precision == "bf16" else (1, 2, 3)
    shipped = (read_settings(f"zero{number}")["zero_optimization"] for number in numbers)
    return [own if zero["stage"] == own["stage"] else zero for zero in shipped]


@dataclass(frozen=True)
class _Fit:
    """Which micro-batches fit a GPU."""

    config: RunConfig
    gpu: GPU
    gpus: int

    def memory(self, zero: Mapping[str, Any], stage: Stage, micro_batch_size: int) -> Memory:
        accumulates = micro_batch_size < stage.batch_size // self.gpus
        return training_memory(self.config, zero, self.gpus, micro_batch_size, stage.patch_side, accumulates)

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= USABLE_MEMORY * self.gpu.memory_gb * 1e9

    def micro_batch_size(self, zero: Mapping[str, Any], stage: Stage) -> int:
        """The largest that fits of those that the config allows; 1 when none does."""
        rows = stage.batch_size // self.gpus
        sizes = (size for size in range(stage.micro_batch_size, 0, -1) if rows % size == 0)
        return next((size for size in sizes if self.fits(self.memory(zero, stage, size))), 1)


def _plan_stage(fit: _Fit, zero: Mapping[str, Any], stage: Stage, mfus: Mfus) -> StagePlan:
    config, rows, mfu = fit.config, stage.batch_size // fit.gpus, mfus(stage.patch_side)
    positions = (config.model.grid_size // stage.patch_side) ** 2
    micro_batch_size = fit.micro_batch_size(zero, stage)
    step_flops = stage.batch_size * config.model.training_flops(positions)
    repeated = REPEATED_FLOPS[config.model.activation_checkpointing]
    compute = step_flops * repeated / (fit.gpus * fit.gpu.tflops * 1e12 * mfu.share)
    sent = sent_bytes(config, zero["stage"], fit.gpus, rows // micro_batch_size)
    communication = sent / (fit.gpu.bandwidth(fit.gpus) * 1e9)
    return StagePlan(
        patch_side=stage.patch_side,
        epochs=stage.steps / stage.steps_per_epoch,
        steps=stage.steps,
        positions=positions,
        batch_size=stage.batch_size,
        learning_rate=stage.peak_learning_rate,
        configured_micro_batch_size=stage.micro_batch_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=rows // micro_batch_size,
        flops=stage.steps * step_flops,
        mfu=mfu,
        compute_seconds=compute,
        communication_seconds=communication,
        hours=stage.steps * max(compute, communication) / 3600,
    )


def sent_bytes(config: RunConfig, zero_stage: int, gpus: int, micro_batches: int) -> float:
    """Bytes that each GPU sends in an optimizer step, ring collectives: (n-1)/n of the whole per pass around the ring.

    ZeRO-1 reduces the float32 gradients once a step, ZeRO-2 with every micro-batch, both by all-reduce (two passes), as
    DeepSpeed 0.19 does for buckets of several ranks; both gather the weights once. ZeRO-3 scatters the gradients (one
    pass) and gathers the weights with every micro-batch.
    """
    count, around = config.model.parameters(), (gpus - 1) / gpus
    gradients, weights = FP32 * count, weight_bytes(config.precision) * count
    if zero_stage == 3:
        return around * micro_batches * (gradients + 2 * weights)
    return around * (2 * gradients * (micro_batches if zero_stage == 2 else 1) + weights)


def _plan_zero(fit: _Fit, zero: Mapping[str, Any], stages: tuple[Stage, ...], is_chosen: bool) -> ZeroPlan:
    sizes = [fit.micro_batch_size(zero, stage) for stage in stages]
    memories = [fit.memory(zero, stage, size) for stage, size in zip(stages, sizes, strict=True)]
    worst = max(range(len(stages)), key=lambda i: memories[i].peak)
    stage, size, memory = stages[worst], sizes[worst], memories[worst]
    accumulation = stage.batch_size // fit.gpus // size
    return ZeroPlan(zero["stage"], is_chosen, stage.patch_side, size, accumulation, memory, fit.fits(memory))


def _time(fit: _Fit, zero: Mapping[str, Any], stages: tuple[Stage, ...], mfus: Mfus) -> tuple[float, float, float]:
    """(days, GPU-hours, time relative to next-token training on the same images, in batches as the last stage's)."""
    hours = sum(_plan_stage(fit, zero, stage, mfus).hours for stage in stages)
    last = stages[-1]
    next_token = _plan_stage(fit, zero, replace(last, patch_side=1), mfus)
    steps = sum(stage.steps * stage.batch_size for stage in stages) / last.batch_size
    return hours / 24, hours * fit.gpus, hours * 3600 / (steps * next_token.step_seconds)


def _levers(config: RunConfig, fit: _Fit, zero: Mapping[str, Any], images: int, mfus: Mfus) -> Iterator[Lever]:
    """The time without larger coarse batches and with them, where the schedule has coarse stages to enlarge."""
    if config.schedule.stages is not None or max(config.schedule.patch_sides) == 1:
        return
    own = config.schedule.coarse_batch_scale
    for scale in (1, own if own > 1 else COARSE_BATCH_SCALE_SHOWN):
        other = config.model_copy(update={"schedule": config.schedule.model_copy(update={"coarse_batch_scale": scale})})
        if problems_of(other, fit.gpus, images):
            continue
        days, gpu_hours, time_cost = _time(fit, zero, other.build_schedule(images, fit.gpus).stages, mfus)
        yield Lever(scale, time_cost, days, gpu_hours)
