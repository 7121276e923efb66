"""The batches of a run, of a stage and of a validation set, read from a `CodeStore` as torch tensors.

`StageManager` gives each stage a loader. A `StageLoader` prefetches in a thread but has no state to save: its batches
are a function of seed and step.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.order import batch_ids, crop_index, drop_label, rank_slice
from npp_ds.data.store import CodeStore
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.model.patches import group

PREFETCHED_STEPS = 5


@dataclass(frozen=True)
class StepBatch:
    """The samples of one rank in one optimizer step.

    `ids` int64 [rows] are the samples in training order, `crops` int64 [rows] the crop of each. `micro_batches` has
    (codes int64 [micro_batch, N, k], labels int64 [micro_batch]) of each micro-step; a dropped label is `num_classes`.
    """

    step: int
    epoch: int
    ids: np.ndarray
    crops: np.ndarray
    micro_batches: list[tuple[Tensor, Tensor]]


class _Reader:
    """Gathers rows of a store into grouped int64 tensors, in pinned memory if CUDA is available.

    It uses numpy on the calling thread, because copies by torch would start a team of OpenMP threads for each thread.
    """

    def __init__(self, store: CodeStore, patch_side: int):
        grid_size = store.manifest.grid_size
        if patch_side < 1 or grid_size % patch_side:
            raise UserError(
                f"patch_side {patch_side} does not divide the grid of the shards, {grid_size}; "
                "choose patch sides that do, or shards of another grid."
            )
        self.num_crops = store.manifest.num_crops
        self.pin_memory = torch.cuda.is_available()
        self._rows = store.codes.reshape(-1, store.manifest.num_tokens)
        grouped = group(torch.arange(store.manifest.num_tokens)[None], patch_side)
        self._shape = tuple(grouped.shape[1:])
        # Up to four codes that are consecutive both in raster order and in their patch are copied as one integer.
        width = gcd(patch_side, 4)
        self._columns = grouped.flatten().numpy()[::width] // width
        self._unit = np.dtype(f"u{2 * width}")
        self._buffers = np.empty((2, 0, store.manifest.num_tokens), np.uint16)

    def codes(self, ids: np.ndarray, crops: np.ndarray | int) -> Tensor:
        """Return the codes of one crop of each sample, int64 [len(ids), N, k]."""
        if self._buffers.shape[1] != len(ids):
            self._buffers = np.empty((2, len(ids), self._buffers.shape[2]), np.uint16)
        raster, grouped = self._buffers
        # With mode="raise" np.take would fill a second buffer first; the indices are always in range.
        np.take(self._rows, ids * self.num_crops + crops, axis=0, out=raster, mode="clip")
        if self._shape[1] == 1:
            grouped = raster
        else:
            np.take(raster.view(self._unit), self._columns, axis=1, out=grouped.view(self._unit), mode="clip")
        return self.to_tensor(grouped).view(len(ids), *self._shape)

    def to_tensor(self, values: np.ndarray) -> Tensor:
        """Copy `values` into an int64 tensor."""
        tensor = torch.empty(values.shape, dtype=torch.int64, pin_memory=self.pin_memory)
        tensor.numpy()[...] = values
        return tensor


class StageLoader:
    """Iterates once over the steps `first_step .. end_step - 1` of a stage, yielding this rank's `StepBatch` of each.

    Use it as a context manager or call `close()`, which ends the prefetching thread. The iterator raises the exceptions
    of the thread. `wait_seconds` is the time that the consumer has waited for data so far. Raises UserError if the set
    does not fit the stage: in its number of samples, its grid, or sizes that do not divide evenly.
    """

    def __init__(
        self,
        store: CodeStore,
        stage: Stage,
        *,
        seed: int,
        class_dropout: float,
        num_classes: int,
        rank: int,
        world_size: int,
        first_step: int,
    ):
        if stage.steps_per_epoch != len(store) // stage.batch_size:
            raise UserError(
                f"{store.folder}: the stage plans {stage.steps_per_epoch} steps an epoch, this training set of "
                f"{len(store)} samples has {len(store) // stage.batch_size} batches of {stage.batch_size}; run again."
            )
        self.store, self.stage = store, stage
        self.seed, self.class_dropout, self.num_classes = seed, class_dropout, num_classes
        self.wait_seconds = 0.0
        self._positions = rank_slice(stage.batch_size, world_size, rank, stage.micro_batch_size)
        self._reader = _Reader(store, stage.patch_side)
        self._next_step = first_step
        self._pending: deque[Future[StepBatch]] = deque()
        self._closed = False
        # Without its device, the thread of every rank on the node would pin memory through the first GPU.
        device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if self._reader.pin_memory else (None, ())
        self._thread = ThreadPoolExecutor(1, "npp-stage-loader", *device)

    def __enter__(self) -> "StageLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __len__(self) -> int:
        """Return the number of steps that are left."""
        return self.stage.end_step - self._next_step

    def __next__(self) -> StepBatch:
        if self._closed or not len(self):
            self.close()
            raise StopIteration
        ahead = min(self.stage.end_step, self._next_step + 1 + PREFETCHED_STEPS)
        for step in range(self._next_step + len(self._pending), ahead):
            self._pending.append(self._thread.submit(self._load, step))
        started = time.perf_counter()
        try:
            batch = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - started
        self._next_step += 1
        return batch

    def close(self) -> None:
        """End the thread and drop the prefetched batches; the loader then yields nothing more. May be called twice."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._pending.clear()

    def _load(self, step: int) -> StepBatch:
        stage, seed, all_labels = self.stage, self.seed, self.store.labels
        epoch, index = stage.epoch_at(step)
        ids = batch_ids(len(all_labels), stage.batch_size, seed, epoch, index)[self._positions]
        crops = crop_index(ids, seed, epoch, self._reader.num_crops)
        dropped = drop_label(ids, seed, epoch, self.class_dropout)
        labels = np.where(dropped, self.num_classes, np.take(all_labels, ids))
        micro_batches = [
            (self._reader.codes(ids[m], crops[m]), self._reader.to_tensor(labels[m])) for m in range(len(ids))
        ]
        return StepBatch(step, epoch, ids.reshape(-1), crops.reshape(-1), micro_batches)


class StageManager:
    """The stages of a run: when the patch side changes, it closes the old stage's loader and builds the next one."""

    def __init__(self, config: RunConfig, schedule: Schedule, store: CodeStore, processes: Processes):
        self.config, self.schedule, self.store, self.processes = config, schedule, store, processes
        self._loader: StageLoader | None = None
        self._waited_before = 0.0

    @property
    def wait_seconds(self) -> float:
        """The time spent waiting for data so far, by all loaders."""
        return self._waited_before + (self._loader.wait_seconds if self._loader else 0.0)

    def loaders(self, first_step: int) -> Generator[StageLoader, None, None]:
        """Yield the loader of each stage that is not over after `first_step` steps; each is closed before the next."""
        for stage in self.schedule.stages:
            if first_step < stage.end_step:
                with StageLoader(
                    self.store,
                    stage,
                    seed=self.config.seed,
                    class_dropout=self.config.data.class_dropout,
                    num_classes=self.config.model.num_classes,
                    rank=self.processes.rank,
                    world_size=self.processes.world_size,
                    first_step=max(first_step, stage.start_step),
                ) as loader:
                    self._waited_before, self._loader = self.wait_seconds, loader
                    yield loader


class EvalLoader:
    """Iterates over a set in order, without label dropout; the ranks take batches in turn. May be iterated again.

    Yields (codes int64 [micro_batch, N, k] of the central crop, labels int64 [micro_batch], count). The first `count`
    rows are samples; the others repeat the last one, so that all batches have one shape and all ranks the same number
    of batches. With `limit` it takes that many samples, evenly spread over the set (shards are often sorted by class).
    """

    def __init__(
        self,
        store: CodeStore,
        patch_side: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        limit: int | None = None,
    ):
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit}: expected at least one sample, or no limit.")
        self.store, self.rank, self.world_size, self.micro_batch_size = store, rank, world_size, micro_batch_size
        self.num_samples = min(limit or len(store), len(store))
        self._reader = _Reader(store, patch_side)

    def __len__(self) -> int:
        """Return the number of batches of each rank."""
        return -(-self.num_samples // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        size, crop = self.micro_batch_size, self.store.manifest.crops.center
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * size
            count = min(max(self.num_samples - first, 0), size)
            positions = np.minimum(np.arange(first, first + size), self.num_samples - 1)
            ids = positions * len(self.store) // self.num_samples
            labels = np.take(self.store.labels, ids)
            yield self._reader.codes(ids, crop), self._reader.to_tensor(labels), count
