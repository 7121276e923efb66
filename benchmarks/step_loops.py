"""The training loops that benchmarks time: a bare PyTorch loop and `TrainingEngine`, with equal results."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.distributed.process_group import join_processes, keep_freed_memory
from npp_ds.sizes import num_positions
from npp_ds.training.engine import TrainingEngine, initial_model, parameter_groups
from npp_ds.training.performance import compile_blocks
from npp_ds.utils.hash_rng import mix64

Batches = list[tuple[Tensor, Tensor]]
"""Micro-batches of (codes[b, N, k], labels[b]) on the host."""


class BareLoop:
    """A bare PyTorch loop over the same model, optimizer and clipping.

    With `graphs`, the whole step of each side is one CUDA graph. On a CPU, its process keeps freed memory, as a
    training process does.
    """

    def __init__(self, config: RunConfig, compiled: bool, graphs: bool, device: torch.device):
        if device.type == "cpu":
            keep_freed_memory()
        self.model = initial_model(config).to(device)
        if compiled:
            compile_blocks(self.model)
        o, self.graphs, self.device = config.optimizer, graphs, device
        self.seed, self.steps = config.seed, 0
        groups = parameter_groups(self.model, o.weight_decay)
        options = {"betas": o.betas, "eps": o.eps, "fused": True, "capturable": graphs}
        self.optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, **options)
        self.replays: dict[int, Callable[[], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None

    def step(self, stage: Stage, batches: Batches) -> Tensor:
        """Take one step and return its loss, computed before the update."""
        if not self.graphs:
            return self._step(self._on_device(batches))
        if stage.index not in self.replays:
            self.replays[stage.index] = self._capture(batches)
        return self.replays[stage.index]()

    def _on_device(self, batches: Batches) -> Batches:
        return [tuple(x.to(self.device, non_blocking=True) for x in batch) for batch in batches]

    def _step(self, batches: Batches) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        self.steps += 1
        for micro_step, (codes, labels) in enumerate(batches):
            if not self.graphs:  # the same dropout masks as in the engine
                torch.manual_seed(int(mix64(self.seed, self.steps, micro_step, 0)) >> 1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(codes, labels) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return total

    def _capture(self, batches: Batches) -> Callable[[], Tensor]:
        inputs = self._on_device(batches)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._step(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool):
            loss = self._step(inputs)

        def replay() -> Tensor:
            for static_inputs, batch in zip(inputs, batches, strict=True):
                for static_input, values in zip(static_inputs, batch, strict=True):
                    static_input.copy_(values, non_blocking=True)
            graph.replay()
            return loss

        return replay


class EngineLoop:
    """`TrainingEngine` as a run uses it, with one process."""

    def __init__(self, config: RunConfig, first_stage: Stage):
        os.environ.setdefault("LOCAL_SIZE", "1")
        self.engine = TrainingEngine(config, first_stage, join_processes())
        self.stage, self.steps = None, 0

    def step(self, stage: Stage, batches: Batches) -> Tensor:
        """Take one step and return its loss, computed before the update."""
        if stage is not self.stage:
            self.engine.set_stage(stage)
            self.stage = stage
        self.steps += 1
        return self.engine.step(self.steps, batches, 1e-4).loss


def batches_of(config: RunConfig, stage: Stage, device: torch.device) -> Batches:
    """Return random micro-batches of (codes, labels) in the loader's format: on the host, pinned for a GPU."""
    model, generator = config.model, torch.Generator().manual_seed(stage.index)
    shape = stage.micro_batch_size, num_positions(model.grid_size, stage.patch_side), stage.patch_side**2
    pin = {"pin_memory": device.type == "cuda", "generator": generator}
    return [
        (torch.randint(model.vocab_size, shape, **pin), torch.randint(model.num_classes, shape[:1], **pin))
        for _ in range(stage.batch_size // stage.micro_batch_size)
    ]
