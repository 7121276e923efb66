"""The stage manager: it gives each stage of a run its own loader and batch sizes, on one engine."""

from collections.abc import Generator, Iterator

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import StageLoader, StepBatch
from npp_ds.data.store import CodeStore
from npp_ds.data.store import stage as stage_shards
from npp_ds.distributed.process_group import Processes
from npp_ds.training.engine import TrainingEngine


def stage_data(config: RunConfig) -> tuple[CodeStore, CodeStore | None]:
    """Stage the training shards and, where there are any, the validation shards on this node."""
    data = config.data
    return stage_shards(data.train, data.cache_dir), stage_shards(data.val, data.cache_dir) if data.val else None


class StageManager:
    """The source of batches: when the patch side changes it closes the old loader and builds the next one.

    `wait_seconds` is the time spent waiting for data so far, by all loaders.
    """

    def __init__(
        self, config: RunConfig, schedule: Schedule, store: CodeStore, engine: TrainingEngine, processes: Processes
    ):
        self.config, self.schedule, self.store = config, schedule, store
        self.engine, self.processes = engine, processes
        self.wait_seconds = 0.0

    def batches(self, first_step: int) -> Generator[tuple[Stage, StepBatch], None, None]:
        """Yield (stage, batch) for every step from `first_step` to the end of the schedule."""
        for stage in self.schedule.stages:
            if first_step < stage.end_step:
                self.engine.set_stage(stage)
                yield from self._batches_of(stage, max(first_step, stage.start_step))

    def _batches_of(self, stage: Stage, first_step: int) -> Iterator[tuple[Stage, StepBatch]]:
        waited_before = self.wait_seconds
        with StageLoader(
            self.store,
            stage,
            seed=self.config.seed,
            class_dropout=self.config.data.class_dropout,
            num_classes=self.config.model.num_classes,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            first_step=first_step,
        ) as loader:
            for batch in loader:
                self.wait_seconds = waited_before + loader.wait_seconds
                yield stage, batch
