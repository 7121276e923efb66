"""Validation of a run: when, with which weights and at which patch sides."""

import logging
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.data.loader import EvalLoader
from npp_ds.data.store import CodeStore
from npp_ds.distributed.process_group import Processes
from npp_ds.evaluation.likelihood import mean_nll
from npp_ds.training.hooks import Context, Hook, Logged
from npp_ds.training.partitions import EMA
from npp_ds.training.run_log import RunLog

logger = logging.getLogger(__name__)

_VARIANTS = {"raw": ["raw"], "ema": [EMA], "both": ["raw", EMA]}
_EVENTS = {"raw": "validation", EMA: f"validation_{EMA}"}


class Validation(Hook):
    """The likelihood of the held-out images of a run, at the stage's patch side and at side 1.

    Never due without such images. Logged as mean negative log-likelihood in nats per code: "validation" of the weights,
    "validation_ema" of their moving average.
    """

    def __init__(
        self, config: RunConfig, schedule: Schedule, store: CodeStore | None, processes: Processes, log: RunLog
    ):
        self.settings, self.store, self.processes, self.log = config.validation, store, processes, log
        self._always = {*(stage.end_step for stage in schedule.stages), *([0] if config.init_from else [])}

    def is_due(self, stage: Stage, done: int, already_logged: Logged = frozenset()) -> bool:
        every = self.settings.every
        is_time = done in self._always or (every > 0 and done % every == 0)
        return self.store is not None and is_time and bool(self._missing(stage, already_logged))

    def run(self, context: Context) -> None:
        """Validate what is due. Raises StopAgreed on all ranks when one is asked to stop meanwhile."""
        missing = self._missing(context.stage, context.already_logged)
        for variant, of_variant in groupby(missing, itemgetter(0)):
            with context.engine.weights(variant) as model:
                for _, side in of_variant:
                    nll = mean_nll(model, self._batches(side, context), self.processes.device)
                    self._log_result(_EVENTS[variant], side, nll, context)

    def _log_result(self, event: str, side: int, nll: float, context: Context) -> None:
        self.log.write(event, context.done, stage=context.stage.index, patch_side=side, nll=nll)
        logger.info(f"{event.replace('_', ' of ')} after step {context.done}: {nll:.4f} nats per code at side {side}")
        self.log.curves(context.done, {f"{event}/nll_side_{side}": nll})

    def _missing(self, stage: Stage, already_logged: Logged) -> list[tuple[str, int]]:
        """Return the (variant of the weights, patch side) that the log lacks."""
        sides = sorted({1, stage.patch_side})
        wanted = [(variant, side) for variant in _VARIANTS[self.settings.weights] for side in sides]
        return [(variant, side) for variant, side in wanted if (_EVENTS[variant], side) not in already_logged]

    def _batches(self, patch_side: int, context: Context) -> Iterator[Any]:
        assert self.store is not None  # else nothing is due
        own = self.processes.rank, self.processes.world_size
        for batch in EvalLoader(self.store, patch_side, self.settings.batch_size, *own, limit=self.settings.limit):
            context.check_stop()
            yield batch
