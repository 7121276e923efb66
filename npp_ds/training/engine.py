"""One DeepSpeed engine for the whole run: built once, told each stage's batch sizes, stepped by whole batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npp_ds.config import RunConfig
from npp_ds.mixing import mix64
from npp_ds.model import ModelConfig, Transformer
from npp_ds.schedule import Stage
from npp_ds.training.deepspeed_config import engine_settings
from npp_ds.training.deepspeed_import import import_deepspeed
from npp_ds.training.launch import Processes


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step is no finite number; the weights are those from before the step."""


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per code, mean over the global batch, and the global gradient norm before clipping."""

    loss: float
    grad_norm: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on tensors of two and more dimensions, none on the rest (as published)."""
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


class TrainingEngine:
    """The model, its optimizer and DeepSpeed's engine around them.

    `model` is what validation calls: model(codes, labels) goes through DeepSpeed's hooks and precision.
    """

    def __init__(self, config: RunConfig, first_stage: Stage, processes: Processes):
        deepspeed = import_deepspeed()
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed()
        settings = engine_settings(config, first_stage, processes.world_size)
        self.seed, self.processes = config.seed, processes
        torch.manual_seed(int(mix64(config.seed) >> 1))
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=settings["zero_optimization"]["stage"] == 3):
            model = Transformer(ModelConfig(**config.model.arguments()))
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=first_stage.peak_learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    @property
    def model(self) -> nn.Module:
        return self.engine

    def set_batch_sizes(self, stage: Stage) -> None:
        """Takes on the batch size and micro-batch size of a stage; between two steps only."""
        self.engine.set_train_micro_batch_size(stage.micro_batch_size)
        self.engine.set_train_batch_size(stage.batch_size)

    def step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]], learning_rate: float) -> StepResult:
        """One optimizer step over this rank's micro-batches of (codes[b, N, k], labels[b]).

        Dropout is a pure function of (seed, step, micro-step, rank). Raises NonFiniteError on all ranks alike when the
        loss or the gradient norm is not finite, before the weights change.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.train()
        device, losses = self.processes.device, []
        for micro_step, (codes, labels) in enumerate(micro_batches):
            torch.manual_seed(int(mix64(self.seed, step, micro_step, self.processes.rank) >> 1))
            self.engine.set_gradient_accumulation_boundary(micro_step == len(micro_batches) - 1)
            loss = self.engine(codes.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            self.engine.backward(loss)
            losses.append(loss.detach())
        mean = self.processes.mean(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise NonFiniteError(f"step {step}: the loss is {mean}")
        self.engine.step()
        if not self.engine.was_step_applied():
            raise NonFiniteError(f"step {step}: the gradient norm is not finite (loss {mean:.4f})")
        return StepResult(mean, float(self.engine.get_global_grad_norm()))

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """(name, value, step) to the monitors that the config asked for."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(events)
