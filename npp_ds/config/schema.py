"""The config keys of a run with their types, bounds and descriptions. `npp_ds.config.load` loads and checks a config.

Keys declared with `_changeable` may change on resume. A checkpoint stores the others to compare them one by one.
"""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from npp_ds.config.fields import Section, fixed_keys
from npp_ds.config.schedule import Schedule, StageEntry, build_schedule, coarse_batch_factor, stage_ends
from npp_ds.sizes import SIZES, parameter_count, training_flops
from npp_ds.utils.records import differences

RECIPES = Path(__file__).parent / "recipes"

MOST_PROFILED_STEPS = 100
"""A trace is in memory until its last step, with tens of thousands of events per step."""


def _changeable(default: Any, description: str, **bounds: Any) -> Any:
    """Return the field of a key that may differ between the starts of a run; with default `...`, it is required."""
    return Field(default, description=description, json_schema_extra={"may_change_on_resume": True}, **bounds)


class ModelSection(Section):
    size: str | None = Field(None, description="name of a published size, instead of dim, n_layers and n_heads")
    dim: int | None = Field(None, ge=8, le=1 << 16, description="width of the residual stream")
    n_layers: int | None = Field(None, ge=1, le=1000, description="number of transformer blocks")
    n_heads: int | None = Field(None, ge=1, description="number of attention heads; dim / n_heads is the head width")
    n_kv_heads: int | None = Field(
        None, ge=1, description="number of key and value heads (grouped-query attention); null: n_heads"
    )
    vocab_size: int = Field(16384, ge=2, le=65536, description="number of codes in the tokenizer's codebook")
    grid_size: int = Field(16, ge=1, le=1024, description="side of an image's code map: 16 at 256 px, 24 at 384 px")
    num_classes: int = Field(
        1000, ge=1, le=10_000_000, description="number of classes, without the null class of guidance"
    )
    ffn_multiple_of: int = Field(
        256, ge=1, le=1 << 18, description="the feed-forward width is rounded up to a multiple of this"
    )
    token_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the embedded sequence")
    residual_dropout: float = Field(0.1, ge=0, lt=1, description="dropout after the attention projection")
    ffn_dropout: float = Field(0.1, ge=0, lt=1, description="dropout after the feed-forward layer")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention weights")
    attention: Literal["auto", "flash_attn", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"] = (
        _changeable(
            "auto",
            "attention kernel; sdpa: PyTorch's choice; auto: flash-attn if it is installed and can run, else sdpa",
        )
    )
    coarse_positions: Literal["paper", "centers"] = Field(
        "paper",
        description="rotary positions of patches with side p > 1: 0, 1, 2, .. along each axis (paper), or the patches' "
        "centers in units of codes, (i + 0.5) * p - 0.5 (centers); at side 1 both are the same",
    )
    activation_checkpointing: Literal["none", "selective", "block"] = _changeable(
        "none",
        "activations that the backward pass recomputes to save memory, with equal results: none, all but those of "
        "products and attention (selective), or those of whole blocks (block)",
    )

    @field_validator("size", mode="before")
    @classmethod
    def _is_a_size(cls, value: Any) -> str | None:
        if value is None or (isinstance(value, str) and value in SIZES):
            return value
        *others, last = map(repr, SIZES)
        raise PydanticCustomError("size", f"{', '.join(others)} or {last}")

    def shape(self) -> dict[str, int]:
        """Return dim, n_layers and n_heads, from `size` or as given."""
        return dict(SIZES[self.size]) if self.size else {k: getattr(self, k) for k in ("dim", "n_layers", "n_heads")}

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `npp_ds.model.ModelConfig`."""
        return {**self.model_dump(exclude={"size", "dim", "n_layers", "n_heads"}), **self.shape()}

    def parameters(self) -> int:
        """Return the number of trainable parameters."""
        sizes = ("n_kv_heads", "vocab_size", "num_classes", "ffn_multiple_of")
        return parameter_count(**self.shape(), **{k: getattr(self, k) for k in sizes})

    def training_flops(self, positions: int) -> int:
        """Return the FLOPs of training (forward and backward pass) on one image of this many positions."""
        sizes = ("n_kv_heads", "vocab_size", "ffn_multiple_of")
        return training_flops(positions, **self.shape(), **{k: getattr(self, k) for k in sizes})


class DataSection(Section):
    train: str = _changeable(
        ...,
        "code shards to train on: a folder ($VARIABLES in it are expanded on each node), its URL, or a pipe: command",
    )
    val: str | None = _changeable(None, "held-out code shards, given in the same way; null: no validation")
    tokenizer: str | None = _changeable(None, "tokenizer that decodes samples: a shipped name or a checkpoint file")
    allow_mismatch: bool = _changeable(
        False,
        "accept weights of init_from, and data.val, of another tokenizer or other classes than data.train, with a "
        "warning; sizes must fit in any case",
    )
    cache_dir: str | None = _changeable(
        None,
        "folder on each node for the unpacked shards; null: /dev/shm if they take at most half of its free space, else "
        "~/.cache/npp_ds",
    )
    class_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by the null class")


class StageSection(Section):
    """One stage. Keys that are null take the value of the schedule or the optimizer."""

    patch_side: int = Field(ge=1, description="side p of the patches, which have k = p * p codes each")
    epochs: float | None = Field(None, gt=0, le=1_000_000, description="length in epochs; set this or steps")
    steps: int | None = Field(None, gt=0, le=10**12, description="length in optimizer steps; set this or epochs")
    batch_size: int | None = Field(None, ge=1, description="images per optimizer step over all processes")
    micro_batch_size: int | None = _changeable(None, "largest number of images per forward pass and process", ge=1)
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    final_learning_rate: float | None = Field(None, ge=0, description="learning rate at the stage's last step")
    warmup_epochs: float | None = Field(None, ge=0, le=1_000_000, description="length of the linear warm-up in epochs")
    decay_fraction: float | None = Field(None, ge=0, le=1, description="fraction of the steps, at the end, that decays")
    dropout_scale: float | None = Field(
        None, ge=0, le=1, description="factor on the model's four dropout rates in this stage; 0: none; null: 1"
    )


REPLACED_BY_STAGES = ("epochs", "patch_sides", "ratio")
"""Keys of the schedule that have no effect when it lists its stages."""


class ScheduleSection(Section):
    epochs: int = Field(300, ge=1, le=1_000_000, description="number of epochs of the run; unused if stages are listed")
    patch_sides: list[int] = Field(
        [2, 1], min_length=1, description="patch side of each stage, coarse to fine; [1] is next-token training"
    )
    ratio: float = Field(0.5, gt=0, lt=1, description="stage i of L ends at epoch int(epochs * ratio^(L-1-i))")
    stages: list[StageSection] | None = Field(
        None, min_length=1, description="explicit table of stages, instead of epochs, patch_sides and ratio"
    )
    batch_size: int = Field(256, ge=1, description="images per optimizer step over all processes")
    micro_batch_size: int | None = _changeable(
        None,
        "largest number of images per forward pass and process; the run uses the largest divisor of "
        "batch_size / processes up to it; null: batch_size / processes",
        ge=1,
    )
    coarse_batch_scale: int = Field(
        1,
        ge=1,
        description="a stage of patch_sides with side p multiplies batch_size by min(this, p * p), and both learning "
        "rates by the square root of that; 1: the same batch size in all stages",
    )
    warmup_epochs: float = Field(
        1.0, ge=0, le=1_000_000, description="linear warm-up at the start of each stage, in epochs"
    )
    decay_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of each stage's steps, at its end, in which the learning rate decays linearly; "
        "1: all steps after the warm-up",
    )
    end_at_patch_side_one: bool = Field(
        True, description="reject a schedule whose last stage does not have patch side 1"
    )


class OptimizerSection(Section):
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of each stage")
    final_learning_rate: float = Field(
        1e-5, ge=0, description="learning rate at the last step of each stage; unused with decay_fraction 0"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of AdamW's first and second moment")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.05, ge=0, description="for tensors with two or more dimensions; others have none")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of an exponential moving average of the weights, such as 0.9999; 0: none"
    )


class ValidationSection(Section):
    every: int = _changeable(1000, "optimizer steps between validations; 0: only at the end of each stage", ge=0)
    batch_size: int = _changeable(64, "images per forward pass and process", ge=1)
    limit: int | None = _changeable(None, "number of images to validate on; null: all", ge=1)
    weights: Literal["raw", "ema", "both"] = _changeable("raw", "the trained weights, their moving average, or both")


class EvaluateSection(Section):
    """Comparison of samples with real images during a run.

    For its duration, each device holds a copy of the weights, in float32 with precision fp32, else in bfloat16.
    """

    every: int = _changeable(
        0, "optimizer steps between evaluations; also at the run's last step; 0: no evaluations", ge=0
    )
    reference: str | None = _changeable(
        None, "statistics of real images: an .npz of `npp evaluate --make-reference` or ADM; sets the feature extractor"
    )
    inception_weights: str | None = _changeable(
        None, "file of Inception's weights; null: torch-fidelity downloads them"
    )
    images: int = _changeable(
        1000, "images to sample, cycling through the classes; best a multiple of their number", ge=2
    )
    batch_size: int = _changeable(50, "images sampled at a time; the processes take batches in turn", ge=1)
    cfg_scale: float = _changeable(1.5, "scale of classifier-free guidance; 1: no guidance", ge=0)
    seed: int = _changeable(0, "image i has the same class and random numbers in each evaluation", ge=0, lt=2**63)
    weights: Literal["raw", "ema"] = _changeable("raw", "sample with the trained weights or their moving average")
    max_share: float = _changeable(
        0.05,
        "largest ratio of an evaluation's duration to the training time until the next, which is postponed to a later "
        "multiple of `every` if necessary, except at the run's last step",
        gt=0,
    )


class CheckpointSection(Section):
    every: int = _changeable(1000, "optimizer steps between checkpoints; 0: only at the end of each stage", ge=0)
    keep_last: int = _changeable(3, "newest checkpoints to keep, in addition to those at the end of each stage", ge=1)
    keep_every: int = _changeable(0, "also keep checkpoints of steps that are multiples of this; 0: none", ge=0)
    asynchronous: bool = _changeable(
        False, "copy to host memory, then write in a thread during training; needs the memory for the copy"
    )


class WatchSection(Section):
    on_nonfinite: Literal["stop", "skip", "rollback"] = _changeable(
        "stop",
        "a step whose loss or gradient norm is not finite never changes the weights; then end the run (stop), exclude "
        "the step for good (skip), or also return to the newest checkpoint (rollback; the third one ends the run)",
    )
    spike_window: int = _changeable(
        100, "previous losses of the stage to compare a loss with; 0: no spike warnings", ge=0, le=1_000_000
    )
    spike_threshold: float = _changeable(8.0, "standard deviations above their mean that make a loss a spike", gt=0)
    stall_seconds: float = _changeable(
        900.0,
        "seconds without a step after which a process writes its stacks to stalled.txt and exits; 0: never",
        ge=0,
        le=1e9,
    )


class LoggingSection(Section):
    every: int = _changeable(10, "optimizer steps between lines in metrics.jsonl and on the screen", ge=1)
    monitors: list[Literal["tensorboard", "wandb", "csv"]] = _changeable(
        [], "further outputs of the metrics, through DeepSpeed's monitor"
    )
    samples: bool = _changeable(False, "write the ids and crops of each step's images to sample_log.jsonl")


class ProfileSection(Section):
    steps: str | None = _changeable(
        None,
        "optimizer steps to profile, such as 10-12, counted from 1 as in metrics.jsonl; the trace of torch.profiler is "
        "written to profile/ in the run folder; null: none",
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _is_a_range(cls, value: Any) -> str | None:
        if value is None:
            return None
        found = re.fullmatch("([0-9]{1,15})(?:-([0-9]{1,15}))?", str(value))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last < first + MOST_PROFILED_STEPS:
            raise PydanticCustomError(
                "steps", f"one step or a range such as 10-12, from 1 on, of at most {MOST_PROFILED_STEPS} steps"
            )
        return str(value)

    def numbers(self) -> range:
        """Return the steps to profile, counted from 1."""
        first, _, last = (self.steps or "1-0").partition("-")
        return range(int(first), int(last or first) + 1)


class DeepSpeedSection(Section):
    config: str = _changeable("zero2", "name of a file in ds_configs/ (zero1, zero2, zero3, ..) or path of a JSON file")


class PerformanceSection(Section):
    """Faster ways to compute the same. Losses agree to rounding with those of a run without them, not bit for bit."""

    compile: bool = _changeable(
        False, "compile the transformer's blocks for each stage's shape, during its first step; not with ZeRO-3"
    )
    cuda_graphs: bool = _changeable(
        False,
        "capture the forward and backward pass of a micro-batch as CUDA graphs in each stage, for short steps that are "
        "limited by kernel launches; needs memory for a second set of gradients; only on GPUs, not with ZeRO-3",
    )
    loss_kernel: Literal["torch", "triton"] = _changeable(
        "torch",
        "implementation of the patch loss of a chunk's logits; torch: PyTorch's operations; triton: one kernel that "
        "replaces the logits by their gradient, only on GPUs and not yet measured there",
    )


class RunConfig(Section):
    name: str = _changeable("run", "name of the run in logs and images", pattern=r"^\w[\w.-]*$")
    run_dir: str | None = _changeable(None, "folder of the run; null: runs/<name>", min_length=1)
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial weights, data order, crops and dropout")
    init_from: str | None = Field(
        None,
        description="initial weights, used with a new optimizer state: a run folder, a file written by npp export or "
        "npp import, or a published checkpoint; read only at the first start; null: random weights",
    )
    precision: Literal["autocast_bf16", "bf16", "fp32"] = Field(
        "autocast_bf16", description="autocast_bf16: fp32 weights, bf16 products; bf16: DeepSpeed's bf16 engine; fp32"
    )
    model: ModelSection
    data: DataSection
    schedule: ScheduleSection = ScheduleSection()
    optimizer: OptimizerSection = OptimizerSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    validation: ValidationSection = ValidationSection()
    evaluate: EvaluateSection = Field(EvaluateSection(), json_schema_extra={"may_change_on_resume": True})
    checkpoint: CheckpointSection = CheckpointSection()
    watch: WatchSection = WatchSection()
    logging: LoggingSection = LoggingSection()
    profile: ProfileSection = Field(ProfileSection(), json_schema_extra={"may_change_on_resume": True})
    performance: PerformanceSection = Field(PerformanceSection(), json_schema_extra={"may_change_on_resume": True})

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def hash(self) -> str:
        """Return the SHA-256, in hexadecimal, of the keys that must not change when the run is resumed."""
        return hashlib.sha256(json.dumps(self.fixed_keys(), sort_keys=True).encode()).hexdigest()

    def fixed_keys(self) -> dict[str, Any]:
        """Return the keys that must not change when the run is resumed, as JSON values."""
        return fixed_keys(type(self), self.model_dump(mode="json"))

    def differences_from(self, saved: dict[str, Any]) -> list[str]:
        """Return a text for each key that must not change and has another value in the `saved` config.

        A key that `saved` lacks, because an earlier version wrote it, has its default value. Keys that may change, and
        those that have no effect on the stages that `saved` lists, are ignored.
        """
        found = fixed_keys(type(self), saved)
        drop_replaced_by_stages(found)
        return list(differences(found, self.fixed_keys()))

    def stage_table(self) -> list[StageEntry]:
        """Return the stages, with the values that they inherit from the schedule and the optimizer."""
        s, o = self.schedule, self.optimizer
        inherited = StageEntry(
            patch_side=1,
            epochs=None,
            steps=None,
            batch_size=s.batch_size,
            micro_batch_size=s.micro_batch_size,
            learning_rate=o.learning_rate,
            final_learning_rate=o.final_learning_rate,
            warmup_epochs=s.warmup_epochs,
            decay_fraction=s.decay_fraction,
            dropout_scale=1.0,
        )
        if s.stages is not None:
            return [replace(inherited, **stage.model_dump(exclude_none=True)) for stage in s.stages]
        ends = pairwise([0, *stage_ends(s.epochs, len(s.patch_sides), s.ratio)])
        factors = [coarse_batch_factor(side, s.coarse_batch_scale) for side in s.patch_sides]
        return [
            replace(
                inherited,
                patch_side=side,
                epochs=end - start,
                batch_size=s.batch_size * factor,
                learning_rate=o.learning_rate * factor**0.5,
                final_learning_rate=o.final_learning_rate * factor**0.5,
            )
            for side, factor, (start, end) in zip(s.patch_sides, factors, ends, strict=True)
        ]

    def build_schedule(self, num_samples: int, world_size: int = 1) -> Schedule:
        """Return the schedule on `num_samples` training images of a config without problems (`checks.problems_of`)."""
        return build_schedule(self.stage_table(), num_samples, world_size)


def drop_replaced_by_stages(values: dict[str, Any], keep: Collection[str] = ()) -> None:
    """Remove the keys of a config that its list of stages replaces, but those that `keep` names (`schedule.epochs`)."""
    schedule = values.get("schedule")
    if isinstance(schedule, dict) and schedule.get("stages"):
        for name in REPLACED_BY_STAGES:
            if f"schedule.{name}" not in keep:
                schedule.pop(name, None)
