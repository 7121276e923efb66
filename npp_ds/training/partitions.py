"""This rank's part of a DeepSpeed engine: which elements of which parameter it holds, in fp32, with optimizer state.

ZeRO-1 and 2 cut the concatenation of a parameter group into one range per rank, ZeRO-3 every parameter by itself.
Either way a rank's share is a list of fragments, each a contiguous range of one flattened parameter: all that saving,
resharding and averaging need. The attributes of DeepSpeed read here are those of 0.19.8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npp_ds.checkpoint.rank_files import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


class Partitions:
    """This rank's flat fp32 partitions of the weights (`masters`) and Adam's moments, and the fragments in them.

    `shapes` maps every parameter's name to the shape of the whole. The moments exist from the start, as zeros.
    """

    def __init__(self, engine: Any):
        self._zero, self._adam = engine.optimizer, engine.optimizer.optimizer
        self._is_stage_3 = hasattr(self._zero, "fp32_partitioned_groups_flat")
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self.shapes = {n: tuple(shape_of(p)) for p, n in self._names.items()}
        flat = (
            self._zero.fp32_partitioned_groups_flat if self._is_stage_3 else self._zero.single_partition_of_fp32_groups
        )
        self.masters: list[Tensor] = [partition.detach() for partition in flat]
        self._keys = list(flat)
        self.fragments = self._fragments_of_stage_3() if self._is_stage_3 else self._fragments_of_stage_1_and_2()
        for key, master in zip(self._keys, self.masters, strict=True):
            state = self._adam.state[key]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(master))
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.device))

    def _fragments_of_stage_1_and_2(self) -> list[Fragment]:
        """Derive the ranges of the parameters in a group's flat buffer from their addresses.

        DeepSpeed's own mapping (`_hp_mapping`, 0.19.8) is wrong with round_robin_gradients.
        """
        fragments = []
        for index, (group, flat) in enumerate(zip(self._zero.bit16_groups, self._zero.bit16_groups_flat, strict=True)):
            size = self.masters[index].numel()
            first = size * dist.get_rank(self._zero.real_dp_process_group[index])
            for parameter in group:
                begin = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                start, stop = max(begin, first), min(begin + parameter.numel(), first + size)
                if start < stop:
                    name = self._names[parameter]
                    fragments.append(Fragment(name, start - begin, stop - start, index, start - first))
        return fragments

    def _fragments_of_stage_3(self) -> list[Fragment]:
        fragments = []
        for index, group in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in group:
                length = parameter.partition_numel()
                start = length * self._zero._get_param_partition_rank(parameter)
                numel = min(length, parameter.ds_numel - start)  # the rest is padding
                if numel > 0:
                    fragments.append(Fragment(self._names[parameter], start, numel, index, offset))
                offset += length
        return fragments

    def whole(self, partitions: list[Tensor], name: str, device: torch.device) -> Tensor:
        """Return parameter `name` in its shape, float32 on `device`, from every rank's tensors shaped like the masters.

        Called by all ranks together.
        """
        values = torch.zeros(prod(self.shapes[name]), device=device)
        for fragment in self.fragments:
            if fragment.name == name:
                values.narrow(0, fragment.start, fragment.numel).copy_(fragment.of(partitions))
        dist.all_reduce(values)
        return values.view(self.shapes[name])

    def moments(self, name: str) -> list[Tensor]:
        """Return one of Adam's moments, shaped like the masters."""
        return [self._adam.state[key][name] for key in self._keys]

    @property
    def optimizer_steps(self) -> int:
        """The number of updates that Adam has made."""
        return int(self._adam.state[self._keys[0]]["step"].item())

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for key in self._keys:
            self._adam.state[key]["step"].fill_(steps)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the weights that the model computes with. Called by all ranks together."""
        if not self._is_stage_3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for index in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()


class ShardedEMA:
    """The exponential moving average of the weights; every rank keeps that of its own fp32 partitions.

    ema <- decay * ema + (1 - decay) * weights after every update; it starts as a copy of the weights. `partitions` are
    fp32 tensors shaped like the masters, on their devices.
    """

    def __init__(self, weights: Partitions, decay: float):
        self._weights, self.decay = weights, decay
        self.partitions: list[Tensor] = [master.clone() for master in weights.masters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.partitions, self._weights.masters, 1 - self.decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the model compute with the averages inside the block; the weights are restored afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mine, master in zip(self.partitions, self._weights.masters, strict=True):
            kept = master.clone()
            master.copy_(mine)
            mine.copy_(kept)
        self._weights.publish()
