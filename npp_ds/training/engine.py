"""One DeepSpeed engine for the whole run: built once, set to each stage's batch sizes, stepped by whole batches."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from npp_ds.checkpoint.open import STATES, Weights
from npp_ds.checkpoint.rank_files import MASTER, SavedState
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import Processes
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training.deepspeed_config import engine_settings, import_deepspeed
from npp_ds.training.partitions import EMA, MOMENTS, Partitions, ShardedEMA, shape_of
from npp_ds.training.performance import apply_performance, free_gradient_nodes
from npp_ds.utils.hash_rng import mix64


@dataclass(frozen=True)
class StepResult:
    """The result of a step: this rank's mean loss in nats per code and the global gradient norm, scalars on the device.

    The norm is that before clipping. `was_applied` is whether the weights changed: they do not when the loss of a rank
    or the norm is not finite.
    """

    loss: Tensor
    grad_norm: Tensor
    was_applied: bool


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay on tensors of two and more dimensions, none on the rest (as published)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        groups[len(shape_of(parameter)) >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def initial_model(config: RunConfig) -> Transformer:
    """Return a run's model with its initial weights, which depend on the model's sizes and the seed alone.

    Under `zero.Init` they are partitioned and in the engine's precision, otherwise in float32 on the CPU.
    """
    torch.manual_seed(int(mix64(config.seed)) >> 1)
    return Transformer(ModelConfig(**config.model.arguments()))


def modules_of_matrices(model: nn.Module) -> list[str]:
    """Return the full names of the classes of modules that have matrices as their own parameters.

    Under autocast DeepSpeed (0.19.8) ignores `communication_data_type`; it sends the gradients of the modules in its
    list `lower_precision_safe_modules` in bf16, and compares classes exactly.
    """
    own = {
        type(module)
        for module in model.modules()
        if any(len(shape_of(p)) >= 2 for p in module.parameters(recurse=False))
    }
    return sorted(f"{found.__module__}.{found.__qualname__}" for found in own)


def reduce_without_waiting(zero: Any) -> None:
    """Let a ZeRO-2 optimizer with `overlap_comm` reduce gradients to their owners while the backward pass computes.

    Where each gradient is sent to its owner alone (`use_multi_rank_bucket_allreduce: false`), DeepSpeed (0.19.8) waits
    for the device before every reduction, to free gradients that are not in its contiguous buffers. Here all are.
    """

    def allreduce_and_copy(
        small_bucket: list[Tensor],
        communication_data_type: torch.dtype,
        rank: int | None = None,
        output_bucket: Sequence[Tensor | None] | None = None,
        process_group: Any = None,
        divide: bool = True,
        log: Any = None,
    ) -> None:
        reduced = zero.allreduce_bucket(small_bucket, communication_data_type, rank, log, divide, process_group)
        for tensor in (reduced, *small_bucket):
            if tensor.is_cuda:  # allocated on the stream of the backward pass, perhaps
                tensor.record_stream(torch.cuda.current_stream())
        if rank in (None, dist.get_rank(process_group)):
            outputs = output_bucket or [None] * len(small_bucket)
            for own, sums, output in zip(small_bucket, zero.unflatten(reduced, small_bucket), outputs, strict=True):
                zero._add_to_grad_partition_buffer(output, sums)
                own.copy_(sums)

    if zero.partition_gradients and zero.contiguous_gradients and zero.overlap_comm:
        zero.allreduce_and_copy = allreduce_and_copy


class TrainingEngine:
    """The model, its optimizer and DeepSpeed's engine around them."""

    def __init__(self, config: RunConfig, first_stage: Stage, processes: Processes):
        deepspeed = import_deepspeed()
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed()
        settings = engine_settings(config, first_stage, processes.world_size)
        self.seed, self.processes = config.seed, processes
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=settings["zero_optimization"]["stage"] == 3):
            model = initial_model(config)
        self.model_config = model.config
        apply_performance(model, config, processes.device)
        if "torch_autocast" in settings and settings.get("communication_data_type") == "bf16":
            settings["torch_autocast"]["lower_precision_safe_modules"] = modules_of_matrices(model)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=first_stage.peak_learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if settings["zero_optimization"]["stage"] < 3:
            reduce_without_waiting(self.engine.optimizer)
        if config.performance.cuda_graphs:
            free_gradient_nodes(model.parameters())
        self.monitor = self.engine.monitor if self.engine.monitor.enabled else None
        self.engine.monitor.enabled = False  # or DeepSpeed would write events of its own in every step
        self.partitions = Partitions(self.engine)
        decay = config.optimizer.ema_decay
        self.ema = ShardedEMA(self.partitions, decay) if decay else None

    def set_stage(self, stage: Stage) -> None:
        """Set the batch size, micro-batch size and dropout rates of a stage; between two steps only."""
        self.engine.module.scale_dropout(stage.dropout_scale)
        self.engine.set_train_micro_batch_size(stage.micro_batch_size)
        self.engine.set_train_batch_size(stage.batch_size)

    def step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]], learning_rate: float) -> StepResult:
        """Make one optimizer step over this rank's micro-batches of (codes[b, N, k], labels[b]).

        Dropout is a pure function of (seed, step, micro-step, rank).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.train()
        device, losses = self.processes.device, []
        for micro_step, (codes, labels) in enumerate(micro_batches):
            torch.manual_seed(int(mix64(self.seed, step, micro_step, self.processes.rank)) >> 1)
            self.engine.set_gradient_accumulation_boundary(micro_step == len(micro_batches) - 1)
            with record_function("forward"):
                loss = self.engine(codes.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            losses.append(loss.detach())
            # 1 for a finite loss, else NaN: every gradient is then NaN on all ranks, and DeepSpeed drops the step.
            with record_function("backward"):
                self.engine.backward(loss * (1 + 0 * loss.detach()))
        with record_function("optimizer"):
            self.engine.step()
            was_applied = self.engine.was_step_applied()
            if was_applied and self.ema:
                self.ema.update()
        norm = self.engine.get_global_grad_norm() if was_applied else math.nan
        return StepResult(torch.stack(losses).mean(), torch.as_tensor(norm), was_applied)

    def state(self) -> dict[str, list[Tensor]]:
        """Return this rank's part of every state of a checkpoint, by name, shaped like the flat partitions."""
        states = {MASTER: self.partitions.masters, **{m: self.partitions.moments(m) for m in MOMENTS}}
        return {**states, EMA: self.ema.partitions} if self.ema else states

    def read(self, folder: Path, files: Iterable[str], optimizer_steps: int) -> None:
        """Load the state in a checkpoint's files, written by any number of processes in any ZeRO stage.

        Each rank reads by itself; the model computes with it after `partitions.publish()`, called by all together.
        Raises UserError when the files are not of this model.
        """
        with SavedState(folder, files, self.partitions.shapes) as saved:
            for state, partitions in self.state().items():
                for fragment in self.partitions.fragments:
                    saved.copy_to(fragment.of(partitions), state, fragment.name, fragment.start)
        self.partitions.optimizer_steps = optimizer_steps

    def start_from(self, weights: Weights) -> None:
        """Copy whole weights into the weights and their average; the optimizer stays fresh. Otherwise like `read`."""
        targets = [self.partitions.masters, *([self.ema.partitions] if self.ema else [])]
        with weights.reading() as tensor:
            for name, fragments in groupby(self.partitions.fragments, lambda fragment: fragment.name):
                values = tensor(name).flatten()
                for fragment, target in product(fragments, targets):
                    fragment.of(target).copy_(values[fragment.start : fragment.start + fragment.numel])

    @contextmanager
    def weights(self, variant: str) -> Iterator[nn.Module]:
        """Yield the model that validation calls, with its weights ("raw") or their moving average ("ema").

        model(codes, labels) uses DeepSpeed's hooks and precision.
        """
        if variant == EMA:
            assert self.ema is not None  # the config is refused otherwise
            with self.ema.in_place_of_weights():
                yield self.engine
        else:
            yield self.engine

    def copy_of_model(self, variant: str, dtype: torch.dtype) -> Transformer:
        """Return a plain model on this rank's device, in eval mode, with the weights ("raw") or their average ("ema").

        Called by all ranks together; training is not affected. Beside the copy itself it takes the memory of the
        largest parameter in float32.
        """
        partitions = self.state()[STATES[variant]]
        with torch.device("meta"):
            model = Transformer(self.model_config)
        device = self.processes.device
        weights = {name: self.partitions.whole(partitions, name, device).to(dtype) for name in self.partitions.shapes}
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()
