"""When a run is validated, with which weights and at which patch sides."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import EvalLoader
from npp_ds.data.store import CodeStore
from npp_ds.distributed.process_group import Processes
from npp_ds.evaluation.likelihood import mean_nll
from npp_ds.training.ema import EMA
from npp_ds.training.engine import TrainingEngine

_KINDS = {"raw": ["raw"], "ema": [EMA], "both": ["raw", EMA]}
_EVENTS = {"raw": "validation", EMA: f"validation_{EMA}"}


class Result(NamedTuple):
    """Mean negative log-likelihood in nats per code; `event` is "validation", or "validation_ema" of the average."""

    event: str
    patch_side: int
    nll: float


class Validation:
    """The held-out images of a run, at the current patch side and at side 1; never due without such images."""

    def __init__(self, config: RunConfig, schedule: Schedule, store: CodeStore | None, processes: Processes):
        self.settings, self.store, self.processes = config.validation, store, processes
        self._always = {*(stage.end_step for stage in schedule.stages), *([0] if config.init_from else [])}

    def is_due(self, done: int) -> bool:
        every = self.settings.every
        return self.store is not None and (done in self._always or (every > 0 and done % every == 0))

    def is_missing(self, stage: Stage, done: int, known: set[tuple[str, int | None]]) -> bool:
        """Whether it was due after `done` steps, in `stage`, and not all of it is `known` (event, patch side)."""
        expected = {(_EVENTS[kind], side) for kind in _KINDS[self.settings.weights] for side in self._sides(stage)}
        return self.is_due(done) and not expected <= known

    def run(self, engine: TrainingEngine, stage: Stage, before_batch: Callable[[], None]) -> list[Result]:
        """Called by all ranks together; `before_batch` may raise, on all of them, to break it off."""
        results = []
        for kind in _KINDS[self.settings.weights]:
            with engine.weights(kind) as model:
                for side in self._sides(stage):
                    loader = EvalLoader(
                        self.store,
                        side,
                        self.settings.batch_size,
                        self.processes.rank,
                        self.processes.world_size,
                        limit=self.settings.limit,
                    )
                    nll = mean_nll(model, _preceded(loader, before_batch), self.processes.device)
                    results.append(Result(_EVENTS[kind], side, nll))
        return results

    def _sides(self, stage: Stage) -> list[int]:
        return sorted({1, stage.patch_side})


def _preceded(loader: EvalLoader, before_batch: Callable[[], None]) -> Iterator[Any]:
    for batch in loader:
        before_batch()
        yield batch
