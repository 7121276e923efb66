"""Sample many images: any number of processes sample parts, resumably, and the last one assembles them.

A part is a fixed range of the images, batches never cross parts, and the request decides whether steps are captured. So
the images depend neither on the number of processes nor on interruptions. Processes share only the output folder.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from npp_ds import __version__
from npp_ds.checkpoint.open import Weights
from npp_ds.distributed.work_queue import LOCK_FILE, SETTINGS_FILE, WORK_FOLDER, WorkQueue
from npp_ds.errors import UserError
from npp_ds.model import Transformer
from npp_ds.sampling.folder import (
    RECORD_FILE,
    SAMPLES_FILE,
    complete_pngs,
    samples_of,
    write_npy,
    write_pngs,
    write_samples,
)
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import DTYPES, LABEL_CHOICES, build_model, labels_of, sample_images, worth_capturing
from npp_ds.tokenizer.vq import VQModel
from npp_ds.utils.files import locked, read_json, write_atomic, write_json_atomic
from npp_ds.utils.format import utc_now
from npp_ds.utils.records import check_same_settings, git_commit

PART_SIZE = 256


@dataclass(frozen=True)
class Request:
    """The images 0 .. `count` - 1, with labels of `classes` that `labels_of` assigns.

    They are resized to `image_size` pixels; None keeps the size of the tokenizer's output. `dtype` is that of the
    model, "fp32" or "bf16"; the tokenizer decodes in float32. A process writes `part_size` images at a time.
    """

    classes: Sequence[int]
    count: int
    labels: str = "balanced"
    options: Options = field(default_factory=Options)
    image_size: int | None = None
    dtype: str = "fp32"
    part_size: int = PART_SIZE

    def check(self, weights: Weights, tokenizer: VQModel) -> None:
        """Raise a UserError that names everything that is impossible with these weights and this tokenizer."""
        problems = [
            f"{name}: found {value}, expected a whole number of at least 1"
            for name in ("count", "image_size", "part_size")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += self.options.problems(weights.model.grid_size)
        if self.options.cfg_scale != 1 and not weights.has_null_class:
            problems.append(
                f"cfg_scale: found {self.options.cfg_scale:g}, but the model was trained without class dropout, so it "
                "has no null class to guide with; use 1"
            )
        if self.labels not in LABEL_CHOICES:
            problems.append(f"labels: found {self.labels!r}, expected one of {', '.join(LABEL_CHOICES)}")
        if self.dtype not in DTYPES:
            problems.append(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        n = len(self.classes)
        if len(set(self.classes)) < n:
            problems.append("classes: some are named twice, expected each once")
        if self.labels == "balanced" and self.count % n:
            below = self.count // n * n
            problems.append(
                f"count: {self.count} images cannot be divided evenly among {n} classes; use {below + n}"
                + (f" or {below}" if below else "")
                + ", or random labels"
            )
        if tokenizer.config.codebook_size != weights.model.vocab_size:
            problems.append(
                f"tokenizer {tokenizer.name}: it has {tokenizer.config.codebook_size} codes, the model has "
                f"{weights.model.vocab_size}; give the tokenizer whose codes the model was trained on"
            )
        if problems:
            raise UserError("; ".join(problems))


def image_count(num_classes: int, per_class: int | None, count: int | None) -> int:
    """Return the number of images: `count`, or `per_class` (default 10) times the classes; UserError for both."""
    if count is not None and per_class is not None:
        raise UserError(f"count and per_class: found {count} and {per_class}, expected one of them")
    for name, value in (("per_class", per_class), ("count", count)):
        if value is not None and value < 1:
            raise UserError(f"{name}: found {value}, expected a whole number of at least 1")
    return count or (per_class or 10) * num_classes


def default_folder(weights: Weights, request: Request) -> Path:
    """Return the folder for the samples of a request, inside `samples_of` these weights.

    Its name holds the step, guidance scale, seed and number of images, then every other setting that differs from the
    default. So different settings have different folders.
    """
    options, usual = asdict(request.options), asdict(Options())
    step = [f"step-{weights.step:08d}"] if weights.step is not None else []
    parts = [*step, f"cfg-{options['cfg_scale']:g}", f"seed-{options['seed']}", f"{request.count}-images"]
    for name, value in options.items():
        if value != usual[name] and name not in ("cfg_scale", "seed"):
            parts.append(f"{name.replace('_', '-')}-{value if isinstance(value, str) else f'{value:g}'}")
    words = (weights.variant, request.labels, request.dtype)
    parts += [word for word in words if word not in ("raw", "balanced", "fp32")]
    if (n := len(request.classes)) < weights.model.num_classes:
        parts.append("-".join(["classes", *map(str, request.classes[:8]), *([f"and-{n - 8}-more"] if n > 8 else [])]))
    if request.image_size:
        parts.append(f"{request.image_size}-pixels")
    return samples_of(weights.path) / "-".join(parts)


class Sampling:
    """One request that is sampled into one folder. Every participating process calls `run`, then `finish`."""

    def __init__(
        self,
        weights: Weights,
        tokenizer: VQModel,
        request: Request,
        out: str | Path,
        *,
        device: str = "cpu",
        batch_size: int = 64,
        png: bool = False,
    ):
        """`png` also writes each image as a file.

        Raises UserError for an impossible request, and if `out` holds samples of another request.
        """
        request.check(weights, tokenizer)
        if batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}, expected a whole number of at least 1")
        self.weights, self.tokenizer, self.request, self.out = weights, tokenizer, request, Path(out)
        self.device, self.batch_size, self.png = device, batch_size, png
        self.work = self.out / WORK_FOLDER
        self.part_count = -(-request.count // request.part_size)
        self._intact: set[int] = set()
        self._sampled, self._seconds, self._processes = 0, 0.0, 1
        self._check_folder()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that determine the images. Existing images are kept only if they have the same settings."""
        request, tokenizer = self.request, self.tokenizer
        return {
            "weights_sha256": self.weights.sha256,
            "checkpoint_step": self.weights.step,
            "weights": self.weights.variant,
            "grid_size": self.weights.model.grid_size,
            "n_heads": self.weights.model.shape()["n_heads"],
            **asdict(request.options),
            "labels": request.labels,
            "classes": list(request.classes),
            "count": request.count,
            "image_size": [self.image_size, self.image_size],
            "dtype": request.dtype,
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        }

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.request.image_size or self.weights.model.grid_size * self.tokenizer.downsample

    @property
    def finished(self) -> bool:
        """True if all samples and their record exist; PNGs may be missing."""
        return (self.out / RECORD_FILE).is_file()

    @property
    def images_per_second(self) -> float | None:
        """The rate of this process, without loading and writing; None before it has sampled an image."""
        return self._sampled / self._seconds if self._sampled else None

    def run(
        self, rank: int = 0, world_size: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Sample the missing parts that no other process has claimed. Return the number of images sampled.

        `progress(done, total)` counts the images of all processes.
        """
        self._processes = world_size
        if self.finished:
            return 0
        with locked(self.work / LOCK_FILE, create_folder=True):
            self.work.mkdir(exist_ok=True)  # `finish` removes it under this lock
            self._check_folder()  # again: another process may have begun since
            if not (self.work / SETTINGS_FILE).is_file():
                write_json_atomic(self.work / SETTINGS_FILE, self._settings())
        with WorkQueue(self.work, rank, world_size) as queue:
            for part in queue.take(self.part_count, lambda part: self._is_intact(part) or self.finished):
                self._sample_part(part, progress)
                queue.release(part)
        return self._sampled

    def finish(self) -> dict[str, Any] | None:
        """Assemble the parts and return the record. Return None if other processes are still sampling parts."""
        if not all(map(self._is_intact, range(self.part_count))) and not self.finished:
            return None
        if self.work.exists() or self.png or not self.finished:
            with locked(self.work / LOCK_FILE, create_folder=True):
                if not self.finished:
                    self._assemble()
                if self.png:
                    complete_pngs(self.out, self.weights.class_names)
                for leftover in self.out.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)
                shutil.rmtree(self.work, ignore_errors=True)
        return read_json(self.out / RECORD_FILE)

    @cached_property
    def model(self) -> Transformer:
        """The model on its device, loaded at first use; the tokenizer is moved there too."""
        self.tokenizer.to(self.device)
        return build_model(self.weights, self.device, self.request.dtype)

    def _sample_part(self, part: int, progress: Callable[[int, int], None]) -> None:
        request, numbers = self.request, self._numbers(part)
        before = sum(len(self._numbers(int(file.stem))) for file in self.work.glob("[0-9]*.npy"))
        batch_size = min(self.batch_size, request.part_size)
        model, started = self.model, time.perf_counter()
        images = sample_images(
            model,
            self.tokenizer.decode,
            self._labels(numbers),
            numbers,
            request.options,
            batch_size=batch_size,
            image_size=request.image_size,
            capture=worth_capturing(model, request.count, batch_size),
            progress=lambda done, total: progress(min(before + done, request.count), request.count),
        )
        self._seconds += time.perf_counter() - started
        if self.png:
            write_pngs(self.out, images, numbers.tolist())
        write_atomic(self._file(part), lambda file: write_npy(file, images))
        self._sampled += len(images)

    def _assemble(self) -> None:
        labels = self._labels(np.arange(self.request.count))
        per_class = self.request.count // len(self.request.classes)
        record = {
            "run": self.weights.name,
            "source": str(self.weights.path),
            **self.identity,
            "weights_patch_side": self.weights.patch_side,
            "per_class": per_class if self.request.labels == "balanced" else None,
            "batch_size": self.batch_size,
            "processes": self._processes,
            "seconds": round(self._seconds, 3),
            "images_per_second": self.images_per_second and round(self.images_per_second, 3),
            "finished_at": utc_now(),
            "created_by": f"npp_ds {__version__}",
            "git_commit": git_commit(),
        }
        try:
            write_samples(self.out, self._parts(), labels, record, self.weights.class_names)
        except FileNotFoundError:  # without file locks another process may have assembled them at the same time
            if not self.finished:
                raise

    def _parts(self) -> Iterator[np.ndarray]:
        for part in range(self.part_count):
            yield np.load(self._file(part), mmap_mode="r")

    def _numbers(self, part: int) -> np.ndarray:
        first = part * self.request.part_size
        return np.arange(first, min(first + self.request.part_size, self.request.count))

    def _labels(self, numbers: np.ndarray) -> np.ndarray:
        request = self.request
        return labels_of(numbers, request.classes, request.labels, request.options.seed)

    def _file(self, part: int) -> Path:
        return self.work / f"{part:06d}.npy"

    def _is_intact(self, part: int) -> bool:
        """Return whether the file of a part exists, whoever wrote it, and has the right shape."""
        if part in self._intact or not self._file(part).is_file():
            return self._file(part).is_file()
        try:
            images = np.load(self._file(part), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        if images.shape == (len(self._numbers(part)), self.image_size, self.image_size, 3):
            self._intact.add(part)
        return part in self._intact

    def _settings(self) -> dict[str, Any]:
        return {**self.identity, "part_size": self.request.part_size}

    def _check_folder(self) -> None:
        """Raise UserError if the folder holds samples, finished or not, that were made with other settings."""
        files = (self.work / SETTINGS_FILE, self.out / RECORD_FILE)
        found = check_same_settings(self.out, files, self._settings(), "samples")
        if not found and (self.out / SAMPLES_FILE).exists():
            raise UserError(f"{self.out}: holds {SAMPLES_FILE} but no record; choose another folder or remove that one")
