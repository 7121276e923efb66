"""Evaluation of a run in progress: samples compared with real images; when, on which process, at what cost."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import EvaluateSection, RunConfig
from npp_ds.data.manifest import TokenizerInfo
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import Reference, load_extractor, load_reference, recorded_extractor
from npp_ds.evaluation.extractors import Extractor
from npp_ds.evaluation.metrics import Moments, frechet_distance
from npp_ds.model import Transformer
from npp_ds.sampling.folder import tiled
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import labels_of, sample_images, worth_capturing
from npp_ds.tokenizer.loading import tokenizer_of
from npp_ds.tokenizer.vq import VQModel
from npp_ds.training.hooks import Context, Hook, Logged
from npp_ds.training.metrics import Event
from npp_ds.training.run_log import RunLog
from npp_ds.utils.files import write_atomic

logger = logging.getLogger(__name__)

EVALUATION, PUT_OFF = "evaluation", "evaluation_put_off"
SHOWN, SHOWN_PER_ROW = 40, 8  # most images in a picture


class Result(NamedTuple):
    """The result of an evaluation; `share_of_time` is `seconds` over those of training since the last evaluation."""

    frechet_distance: float
    images: int
    cfg_scale: float
    weights: str
    seconds: float
    share_of_time: float


@dataclass(frozen=True)
class Evaluator:
    """All that turns codes into a distance: tokenizer and extractor on this process's device, and the real images."""

    tokenizer: VQModel
    extractor: Extractor
    reference: Reference


def load_evaluator(config: RunConfig, made_by: TokenizerInfo, device: torch.device) -> Evaluator:
    """Load tokenizer, extractor and reference; `made_by` made the run's codes.

    A black image is passed through all of them, so that errors appear before training. Raises UserError with
    everything that is missing or does not fit, one line each.
    """
    problems: list[str] = []
    with _collected("data.tokenizer", problems):
        tokenizer = tokenizer_of(made_by, config.data.tokenizer)
    with _collected("evaluate", problems):
        extractor, reference = _extractor_and_reference(config.evaluate, device)
    if not problems:
        evaluator = Evaluator(tokenizer.to(device), extractor, reference)
        problems = _misfits(evaluator, config.model.grid_size, device)
    if problems:
        raise UserError("\n".join(problems))
    return evaluator


@contextmanager
def _collected(key: str, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(f"{key}, for evaluate.every: {error}")


def _extractor_and_reference(settings: EvaluateSection, device: torch.device) -> tuple[Extractor, Reference]:
    path = settings.reference
    assert path is not None  # the config is refused otherwise
    name = recorded_extractor(path)
    if name is None:
        raise UserError(
            f"{path} holds no statistics; make some of these images with "
            f"`npp evaluate --reference {path} --make-reference FILE.npz`"
        )
    extractor = load_extractor(name, settings.inception_weights, device)
    return extractor, load_reference(path, extractor, with_features=False)


def _misfits(evaluator: Evaluator, grid_size: int, device: torch.device) -> list[str]:
    codes = torch.zeros(1, grid_size**2, dtype=torch.int64, device=device)
    size = list(evaluator.tokenizer.decode(codes).shape[-2:])
    wanted = evaluator.reference.source.image_size
    if wanted is not None and wanted != size:
        path = evaluator.reference.path
        return [f"evaluate.reference: {path} is of {wanted} pixels, samples of this run have {size}"]
    try:
        evaluator.extractor(np.zeros((1, *size, 3), np.uint8))
    except UserError as error:
        return [f"evaluate.reference: {error}"]
    return []


class Budget:
    """Limit evaluations to a share of the training time, by when the last one was made and how long it took."""

    def __init__(self, max_share: float, last: Event | None):
        self.max_share = max_share
        self._made_at: float = last["elapsed_seconds"] if last else 0.0
        self._seconds: float = last["seconds"] if last else 0.0

    def share(self, elapsed: float, seconds: float | None = None) -> float:
        """Return `seconds`, by default those of the last evaluation, over the training seconds since then."""
        seconds = self._seconds if seconds is None else seconds
        return seconds / max(elapsed - self._made_at, 1e-9)

    def allows(self, elapsed: float) -> bool:
        """Return whether the next evaluation fits if it costs as much as the last one; the first always fits."""
        return self.share(elapsed) <= self.max_share

    def spend(self, elapsed: float, seconds: float) -> float:
        """Record an evaluation; return its share."""
        share = self.share(elapsed, seconds)
        self._made_at, self._seconds = elapsed, seconds
        return share


class Evaluation(Hook):
    """The evaluations of a run.

    Process b modulo the world size samples batch b of the images, whole: the images, and up to the order of float64
    sums the distance, are the same for any number of processes.
    """

    def __init__(
        self, config: RunConfig, schedule: Schedule, made_by: TokenizerInfo, processes: Processes, log: RunLog
    ):
        self.config, self.settings, self.processes, self.log = config, config.evaluate, processes, log
        self._last_step = schedule.total_steps
        self._pictures = config.directory / "samples" / "during"
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self._made_by = made_by
        self._evaluator: Evaluator | None = None
        self._budget = Budget(self.settings.max_share, None)

    def load(self) -> None:
        """Load tokenizer, extractor and reference if `every` is set. All ranks call this; raises UserError on all."""
        if self.settings.every:
            self._evaluator = self.processes.on_all(load_evaluator, self.config, self._made_by, self.processes.device)
            self._budget = Budget(self.settings.max_share, self.log.last_logged(EVALUATION))

    def is_due(self, stage: Stage, done: int, already_logged: Logged = frozenset()) -> bool:
        every = self.settings.every
        is_time = every > 0 and (done % every == 0 or done == self._last_step)
        return is_time and not {EVALUATION, PUT_OFF} & {event for event, _ in already_logged}

    def run(self, context: Context) -> None:
        """Evaluate, or postpone it. Raises StopAgreed on all ranks when one is asked to stop meanwhile."""
        stage, done, elapsed = context.stage, context.done, self.log.clock.elapsed
        where = {"stage": stage.index, "patch_side": stage.patch_side, "elapsed_seconds": elapsed}
        if not self.processes.on_first(lambda: done == self._last_step or self._budget.allows(elapsed)):
            self.log.write(PUT_OFF, done, **where)
            most = self.settings.max_share
            why = f"the last one took more than {most:.1%} of the training time since (evaluate.max_share)"
            logger.info(f"evaluation after step {done} postponed: {why}")
            return
        found = self._evaluate(context, elapsed)
        self.log.write(EVALUATION, done, **where, **found._asdict())
        logger.info(
            f"evaluation after step {done}: Frechet distance {found.frechet_distance:.4g} of {found.images} images at "
            f"side {stage.patch_side}; {found.seconds:.1f} s, {found.share_of_time:.1%} of the training time before it"
        )
        curves = {f"frechet_distance_side_{stage.patch_side}": found.frechet_distance, "seconds": found.seconds}
        self.log.curves(done, {f"{EVALUATION}/{name}": value for name, value in curves.items()})

    def _evaluate(self, context: Context, elapsed: float) -> Result:
        """Sample at the stage's patch side and compare; the result counts on the first rank."""
        began, s = time.perf_counter(), self.settings
        context.check_stop()
        model = context.engine.copy_of_model(s.weights, self._dtype)
        moments = self._moments(model, context)
        del model
        context.check_stop()
        moments.sum_over_processes(self.processes.device)
        distance = self.processes.on_first(self._distance, moments)
        seconds = time.perf_counter() - began
        return Result(distance, s.images, s.cfg_scale, s.weights, seconds, self._budget.spend(elapsed, seconds))

    def _moments(self, model: Transformer, context: Context) -> Moments:
        """Return the moments of the features of this process's share of the images, about the mean of the real ones."""
        s, evaluator = self.settings, self._evaluator
        assert evaluator is not None  # `load` has been called
        moments = Moments(center=evaluator.reference.pool[0])
        options = Options(seed=s.seed, cfg_scale=s.cfg_scale, patch_side=context.stage.patch_side)
        classes = range(self.config.model.num_classes)
        sample = partial(sample_images, batch_size=s.batch_size, capture=worth_capturing(model, s.images, s.batch_size))
        for turn in range(ceil(s.images / (s.batch_size * self.processes.world_size))):
            context.check_stop()
            first = (turn * self.processes.world_size + self.processes.rank) * s.batch_size
            indices = np.arange(first, min(first + s.batch_size, s.images))
            if len(indices):
                labels = labels_of(indices, classes, "balanced", s.seed)
                images = sample(model, evaluator.tokenizer.decode, labels, indices, options)
                moments.add(evaluator.extractor(images).pool)
            if first == 0:
                self._show(images[:SHOWN], context.done)
        return moments

    def _distance(self, moments: Moments) -> float:
        assert self._evaluator is not None
        return frechet_distance(*moments.statistics(), *self._evaluator.reference.pool)

    def _show(self, images: np.ndarray, done: int) -> None:
        """Write one picture of some images and send it to the monitors; a full disk is no reason to stop."""
        picture = tiled(images, SHOWN_PER_ROW)
        self.log.picture("samples", done, picture)
        with suppress(OSError):
            self._pictures.mkdir(parents=True, exist_ok=True)
            write_atomic(self._pictures / f"step-{done:08d}.png", lambda file: picture.save(file, "PNG"))
