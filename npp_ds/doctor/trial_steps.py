"""`--step`: optimizer steps of the run's model at each patch side, with random codes, at the run's batch sizes."""

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from npp_ds.config.schedule import Stage
from npp_ds.doctor.checks import FAILURE, Check, Context, Result
from npp_ds.errors import is_out_of_memory
from npp_ds.model.patches import group
from npp_ds.training.engine import TrainingEngine
from npp_ds.utils.format import format_bytes

MICRO_BATCHES = 2
"""Most micro-batches per step: from the second on, memory also holds the gradients of the first."""


class TrialSteps:
    """The checks of `--step`, to be run in order: build the engine, then train each stage on it."""

    def __init__(self, context: Context, stages: Sequence[Stage]):
        self.context, self.stages = context, stages
        self.engine: TrainingEngine | None = None

    def checks(self) -> list[Check]:
        """Return the checks: one of the engine, and one of each stage."""
        steps = [Check(f"step, side {s.patch_side}", partial(self._guarded, self._step, s)) for s in self.stages]
        return [Check("engine", partial(self._guarded, self._build, self.stages[0])), *steps]

    def _guarded(self, action: Callable[[Stage], Result], stage: Stage, _: Context) -> Result:
        """Return what `action` returns, a failure if memory runs out."""
        try:
            return action(stage)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        total = format_bytes(_total_bytes(self.context))
        return Result(
            f"out of memory ({total}) at patch side {stage.patch_side} with {stage.micro_batch_size} images at a time; "
            f"lower schedule.micro_batch_size, set deepspeed.config=zero3, use more processes or a smaller model",
            FAILURE,
            lasting=True,
        )

    def _build(self, stage: Stage) -> Result:
        config = self.context.run
        logging = config.logging.model_copy(update={"monitors": []})  # monitors would write into the run folder
        self.engine = TrainingEngine(config.model_copy(update={"logging": logging}), stage, self.context.processes)
        return self._with_peak(f"{config.model.parameters() / 1e6:.1f}M parameters, {config.deepspeed.config}")

    def _step(self, stage: Stage) -> Result:
        assert self.engine is not None
        if self.context.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        accumulated = stage.batch_size // (stage.micro_batch_size * self.context.processes.world_size)
        batches = [self._random_batch(stage)] * min(MICRO_BATCHES, accumulated)
        self.engine.set_stage(stage)
        self.engine.step(0, batches, 0.0)  # the first step also allocates buffers
        start = time.perf_counter()
        result = self.engine.step(1, batches, 0.0)
        loss = result.loss.item()  # waits for the device
        seconds = (time.perf_counter() - start) * accumulated / len(batches)
        if not result.was_applied:
            return Result(f"the loss is {loss}, expected a finite one with finite gradients", FAILURE)
        most = "at most " if accumulated > len(batches) else ""
        at_a_time = f"{stage.micro_batch_size} images at a time"
        return self._with_peak(f"{most}{seconds:.2f} s for {stage.batch_size} images, {at_a_time}")

    def _with_peak(self, text: str) -> Result:
        peak, total = _peak_bytes(self.context), _total_bytes(self.context)
        return Result(f"{text}; {format_bytes(peak)} of {format_bytes(total)} at the peak")

    def _random_batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return random codes[b, N, k] and labels[b] of one micro-batch."""
        model, count = self.context.run.model, stage.micro_batch_size
        codes = torch.randint(model.vocab_size, (count, model.grid_size**2))
        return group(codes, stage.patch_side), torch.randint(model.num_classes + 1, (count,))


def _peak_bytes(context: Context) -> int:
    """Return the peak memory: on a GPU of this stage, with the allocator's cache; on a CPU of the process so far."""
    if context.has_gpu:
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _total_bytes(context: Context) -> int:
    if context.has_gpu:
        return torch.cuda.mem_get_info(context.processes.device)[1]
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) * 1024
