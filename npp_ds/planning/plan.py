"""Estimate the FLOPs, memory and time of a run from its config alone. Needs no torch.

`docs/planning.md` has the formulas, their sources, and what they leave out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from npp_ds.config.checks import problems_of
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.store import available_manifest
from npp_ds.errors import UserError
from npp_ds.planning.memory import FP32, MAX_LIVE, Memory, training_memory, weight_bytes
from npp_ds.planning.mfu import Mfu, mfu_by_side
from npp_ds.sizes import num_positions
from npp_ds.training.deepspeed_config import engine_settings, read_settings, shipped_configs
from npp_ds.training.throughput import step_flops
from npp_ds.utils.gpu_specs import GPU, has_own_rate

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""
USABLE_MEMORY = 0.9
"""Share of a GPU's memory that a plan fills; the rest is for the CUDA context, NCCL and fragmentation."""
COARSE_BATCH_SCALE_SHOWN = 4
"""The schedule.coarse_batch_scale that a plan compares with if the config leaves it at 1."""
REPEATED_FLOPS = {"none": 1.0, "selective": 1.0, "block": 4 / 3}
"""Factor on the FLOPs by activation checkpointing: `block` runs the forward pass a second time."""

BF16 = 2
Settings = Mapping[str, Any]
"""DeepSpeed's JSON settings, as in ds_configs/."""
Mfus = Callable[[int], Mfu]
"""patch side -> MFU."""


@dataclass(frozen=True)
class ZeroPlan:
    """Memory of a GPU with one of DeepSpeed's ZeRO stages, in the training stage that needs the most."""

    zero_stage: int
    is_chosen: bool
    patch_side: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    memory: Memory
    fits: bool


@dataclass(frozen=True)
class StagePlan:
    """One stage of the run; `flops` and `hours` are those of the whole stage, seconds those of one optimizer step.

    `npp train` uses `configured_micro_batch_size`; `micro_batch_size` is the largest up to it that fits the GPU.
    """

    patch_side: int
    epochs: float
    steps: int
    positions: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_epochs: float
    decay_epochs: float
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
        """What limits a step: "compute" or "communication"."""
        return "compute" if self.compute_seconds >= self.communication_seconds else "communication"


@dataclass(frozen=True)
class BatchScaling:
    """The run's time with this schedule.coarse_batch_scale; `time_cost` is relative to next-token training."""

    coarse_batch_scale: int
    time_cost: float
    days: float
    gpu_hours: float


@dataclass(frozen=True)
class Network:
    """What the run sends and how long it takes with these DeepSpeed settings and this precision.

    `bytes_per_parameter` are those that a GPU sends in a step of the last stage. `stalls_from` is the smallest power of
    two of GPUs on which a coarse stage waits for the network; None if none does while the batch can be split.
    """

    settings: str
    precision: str
    is_chosen: bool
    bytes_per_parameter: float
    communication_seconds: float
    time_cost: float
    days: float
    stalls_from: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that `npp plan` shows.

    Costs are relative to next-token training on the same images, in positions, FLOPs, and time on these GPUs.
    `next_token_flops` are those of that training, `bandwidth` is what each GPU sends, in GB/s.
    """

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
    next_token_flops: float
    bandwidth: float
    networks: list[Network]
    batch_scalings: list[BatchScaling]

    @property
    def warnings(self) -> list[str]:
        """What to change before the run starts."""
        if not any(z.fits for z in self.zero if z.is_chosen):
            return [
                "the run does not fit this GPU, even one image at a time; use another ZeRO stage, "
                "model.activation_checkpointing=block, or more GPUs"
            ]
        found = []
        if self.precision == "fp32" and has_own_rate(self.gpu):
            found.append(
                "times are those of bf16 products, and precision=fp32 is several times slower: give the GPU's fp32 "
                "rate with --gpu-tflops"
            )
        if all(s.micro_batch_size == s.configured_micro_batch_size for s in self.stages):
            return found
        most, configured = (
            min(getattr(s, name) for s in self.stages) for name in ("micro_batch_size", "configured_micro_batch_size")
        )
        return [
            *found,
            f"{configured} images at a time, as configured, do not fit; the plan is for the largest that do: "
            f"set schedule.micro_batch_size={most}",
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, including the derived values that the tables show."""
        stages = [
            {**asdict(s), "share": s.flops / self.flops, "limit": s.limit, "step_seconds": s.step_seconds}
            for s in self.stages
        ]
        usable = USABLE_MEMORY * self.gpu.memory_gb
        return {**asdict(self), "stages": stages, "usable_memory_gb": usable, "warnings": self.warnings}


def make_plan(config: RunConfig, gpu: GPU, gpus: int, mfu: float | None = None, images: int | None = None) -> Plan:
    """Return the plan of a run on `gpus` GPUs; without `mfu` it is as measured, else assumed (`mfu.py`).

    Without `images` their number is that of the shards, else ImageNet's. Raises UserError if the config does not fit
    the number of images or GPUs, or if training refuses its DeepSpeed settings.
    """
    count, source = _images(config, images)
    if problems := problems_of(config, gpus, count):
        text = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"the config does not fit {count:,} images ({source}) and {gpus} GPUs:\n{text}")
    own = read_settings(config.deepspeed.config)
    schedule = config.build_schedule(count, gpus)
    engine_settings(config, schedule.stages[0], gpus)  # raises for what training refuses
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
        next_token_flops=sum(s.steps * step_flops(config.model, s, 1) for s in schedule.stages),
        bandwidth=gpu.bandwidth(gpus),
        stages=stages,
        zero=[_plan_zero(fit, other, schedule.stages, other is own) for other in _all_settings(own, config.precision)],
        days=days,
        gpu_hours=gpu_hours,
        networks=sorted(_networks(fit, count, mfus), key=lambda n: (n.days, n.communication_seconds)),
        batch_scalings=list(_batch_scalings(config, fit, own, count, mfus)),
    )


def _images(config: RunConfig, given: int | None) -> tuple[int, str]:
    """Return (number of training images, where the number is from)."""
    if given is not None:
        return given, "--images"
    manifest = available_manifest(config.data.train, config.data.cache_dir)
    return (manifest.num_samples, config.data.train) if manifest else (IMAGENET, "ImageNet-1K; no shards available")


def _is_refused(zero_stage: int, precision: str) -> bool:
    """Return whether training refuses the pair (`engine_settings`)."""
    return zero_stage == 1 and precision == "bf16"


def _all_settings(own: Settings, precision: str) -> list[Settings]:
    """Return the shipped settings of ZeRO-1 (not with bf16, which refuses it), 2 and 3, with the run's own in place of
    the shipped ones of its stage."""
    shipped = (read_settings(f"zero{number}") for number in (1, 2, 3) if not _is_refused(number, precision))
    stage = own["zero_optimization"]["stage"]
    return [own if other["zero_optimization"]["stage"] == stage else other for other in shipped]


@dataclass(frozen=True)
class _Fit:
    """Decides which micro-batches fit a GPU."""

    config: RunConfig
    gpu: GPU
    gpus: int

    def memory(self, settings: Settings, stage: Stage, micro_batch_size: int) -> Memory:
        zero = settings["zero_optimization"]
        accumulates = micro_batch_size < stage.batch_size // self.gpus
        return training_memory(self.config, zero, self.gpus, micro_batch_size, stage.patch_side, accumulates)

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= USABLE_MEMORY * self.gpu.memory_gb * 1e9

    def micro_batch_size(self, settings: Settings, stage: Stage) -> int:
        """Return the largest one that the config allows and that fits; 1 if none fits."""
        rows = stage.batch_size // self.gpus
        sizes = (size for size in range(stage.micro_batch_size, 0, -1) if rows % size == 0)
        return next((size for size in sizes if self.fits(self.memory(settings, stage, size))), 1)


def _plan_stage(fit: _Fit, settings: Settings, stage: Stage, mfus: Mfus) -> StagePlan:
    config, rows, mfu = fit.config, stage.batch_size // fit.gpus, mfus(stage.patch_side)
    positions = num_positions(config.model.grid_size, stage.patch_side)
    micro_batch_size = fit.micro_batch_size(settings, stage)
    flops = step_flops(config.model, stage, stage.patch_side)
    repeated = REPEATED_FLOPS[config.model.activation_checkpointing]
    compute = flops * repeated / (fit.gpus * fit.gpu.tflops * 1e12 * mfu.share)
    sent = sent_bytes(config, settings, fit.gpus, rows // micro_batch_size)
    communication = sent / (fit.gpu.bandwidth(fit.gpus) * 1e9)
    return StagePlan(
        patch_side=stage.patch_side,
        epochs=stage.steps / stage.steps_per_epoch,
        steps=stage.steps,
        positions=positions,
        batch_size=stage.batch_size,
        learning_rate=stage.peak_learning_rate,
        final_learning_rate=stage.final_learning_rate,
        warmup_epochs=stage.warmup_steps / stage.steps_per_epoch,
        decay_epochs=stage.decay_steps / stage.steps_per_epoch,
        configured_micro_batch_size=stage.micro_batch_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=rows // micro_batch_size,
        flops=stage.steps * flops,
        mfu=mfu,
        compute_seconds=compute,
        communication_seconds=communication,
        hours=stage.steps * max(compute, communication) / 3600,
    )


def sent_bytes(config: RunConfig, settings: Settings, gpus: int, micro_batches: int) -> float:
    """Return the bytes that each GPU sends in an optimizer step, by ring collectives: a pass sends (n-1)/n of a buffer.

    ZeRO-1 reduces the gradients once a step, ZeRO-2 with every micro-batch: in one pass to the GPU that owns them, or
    in two passes to all with `use_multi_rank_bucket_allreduce`. Both gather the weights once. With every micro-batch,
    ZeRO-3 scatters the gradients and gathers the weights, a second time for the backward pass if the model is larger
    than `stage3_max_live_parameters`. `benchmarks/network.py` compares these formulas with traces of DeepSpeed 0.19.8.
    """
    zero, count, around = settings["zero_optimization"], config.model.parameters(), (gpus - 1) / gpus
    gradients = count * (BF16 if settings.get("communication_data_type") == "bf16" else FP32)
    weights = count * weight_bytes(config.precision)
    if zero["stage"] == 3:
        gathers = 1 if count <= zero.get("stage3_max_live_parameters", MAX_LIVE) else 2
        if config.precision == "autocast_bf16" and gradients < FP32 * count:
            weights = BF16 * count  # DeepSpeed gathers in the dtype in which it sends gradients
        return around * micro_batches * (gradients + gathers * weights)
    passes = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
    return around * (passes * gradients * (micro_batches if zero["stage"] == 2 else 1) + weights)


def _plan_zero(fit: _Fit, settings: Settings, stages: tuple[Stage, ...], is_chosen: bool) -> ZeroPlan:
    sizes = [fit.micro_batch_size(settings, stage) for stage in stages]
    memories = [fit.memory(settings, stage, size) for stage, size in zip(stages, sizes, strict=True)]
    worst = max(range(len(stages)), key=lambda i: memories[i].peak)
    stage, size, memory = stages[worst], sizes[worst], memories[worst]
    accumulation = stage.batch_size // fit.gpus // size
    number = settings["zero_optimization"]["stage"]
    return ZeroPlan(number, is_chosen, stage.patch_side, size, accumulation, memory, fit.fits(memory))


def _time(fit: _Fit, settings: Settings, stages: tuple[Stage, ...], mfus: Mfus) -> tuple[float, float, float]:
    """Return (days, GPU-hours, time relative to next-token training on the same images in the last stage's batches)."""
    hours = sum(_plan_stage(fit, settings, stage, mfus).hours for stage in stages)
    last = stages[-1]
    next_token = _plan_stage(fit, settings, replace(last, patch_side=1), mfus)
    steps = sum(stage.steps * stage.batch_size for stage in stages) / last.batch_size
    return hours / 24, hours * fit.gpus, hours * 3600 / (steps * next_token.step_seconds)


def _batch_scalings(
    config: RunConfig, fit: _Fit, settings: Settings, images: int, mfus: Mfus
) -> Iterator[BatchScaling]:
    """Yield the time without and with larger coarse batches, if the schedule has coarse stages."""
    if config.schedule.stages is not None or max(config.schedule.patch_sides) == 1:
        return
    own = config.schedule.coarse_batch_scale
    for scale in (1, own if own > 1 else COARSE_BATCH_SCALE_SHOWN):
        other = config.model_copy(update={"schedule": config.schedule.model_copy(update={"coarse_batch_scale": scale})})
        if problems_of(other, fit.gpus, images):
            continue
        days, gpu_hours, time_cost = _time(fit, settings, other.build_schedule(images, fit.gpus).stages, mfus)
        yield BatchScaling(scale, time_cost, days, gpu_hours)


def _networks(fit: _Fit, images: int, mfus: Mfus) -> Iterator[Network]:
    """Yield what the run sends with each of the shipped settings, and in the bf16 engine as well."""
    own = fit.config.deepspeed.config
    for precision in dict.fromkeys((fit.config.precision, "bf16")):
        other = replace(fit, config=fit.config.model_copy(update={"precision": precision}))
        stages = other.config.build_schedule(images, fit.gpus).stages
        for name in dict.fromkeys((own, *shipped_configs())):
            settings = read_settings(name)
            if _is_refused(settings["zero_optimization"]["stage"], precision):
                continue
            days, _, time_cost = _time(other, settings, stages, mfus)
            last = _plan_stage(other, settings, stages[-1], mfus)
            sent = sent_bytes(other.config, settings, fit.gpus, last.gradient_accumulation_steps)
            yield Network(
                settings=name,
                precision=precision,
                is_chosen=name == own and precision == fit.config.precision,
                bytes_per_parameter=sent / other.config.model.parameters(),
                communication_seconds=last.communication_seconds,
                time_cost=time_cost,
                days=days,
                stalls_from=_stalls_from(other, settings, images, mfus),
            )


def _stalls_from(fit: _Fit, settings: Settings, images: int, mfus: Mfus) -> int | None:
    """Return the smallest power of two of GPUs on which a coarse stage waits for the network, None if there is none."""
    gpus = 2
    while not problems_of(fit.config, gpus, images):
        coarse = (s for s in fit.config.build_schedule(images, gpus).stages if s.patch_side > 1)
        planned = (_plan_stage(replace(fit, gpus=gpus), settings, stage, mfus) for stage in coarse)
        if any(stage.limit == "communication" for stage in planned):
            return gpus
        gpus *= 2
    return None
