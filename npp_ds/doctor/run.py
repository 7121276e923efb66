"""Checks of the run that each process makes alone: settings, shards, disk space."""

import os
import shutil
from pathlib import Path

from npp_ds.checkpoint.folders import saved_steps
from npp_ds.config.checks import problems_of
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import CheckpointSection, RunConfig
from npp_ds.data import remote
from npp_ds.data.manifest import Manifest, ShardInfo
from npp_ds.data.shards import read_shard
from npp_ds.data.store import find_staged, staging_folder
from npp_ds.doctor.checks import FAILURE, WARNING, Check, Context, Result
from npp_ds.errors import UserError
from npp_ds.training.partitions import MOMENTS
from npp_ds.training.preflight import initial_weights
from npp_ds.training.run_folder import check_settings
from npp_ds.utils.files import nearest_folder
from npp_ds.utils.format import format_bytes

SAMPLED_SHARDS = 3


def settings(context: Context) -> Result | None:
    """Check on the first process that config, number of processes, data and run folder fit together."""
    if not context.processes.is_first:
        return None
    config, world_size = context.run, context.processes.world_size
    if problems := problems_of(config, world_size):
        return Result("; ".join(problems), FAILURE)
    check_settings(config)
    if not context.has_manifests():
        return Result(f"{config.name}: batches fit a world size of {world_size}")
    stages = ", ".join(
        f"side {s.patch_side}: {s.steps:,} steps of {s.batch_size} images ({s.micro_batch_size} at a time)"
        for s in context.schedule.stages
    )
    return Result(f"{config.name}: {stages}")


def weights(context: Context) -> Result | None:
    """Read on the first process the weights that a fresh run starts from: a damaged tensor shows only then."""
    if not context.processes.is_first:
        return None
    try:
        initial = initial_weights(context.run)
    except UserError:  # `settings` reports it
        return None
    if initial is None:
        return None
    with initial.reading() as tensor:
        for name in initial.shapes:
            tensor(name)
    return Result(f"{initial.path}: {initial.describe()}, all finite")


def shards(context: Context) -> Result | None:
    """Check on each node that it has the same manifest as the others and every shard file; read only a few samples."""
    if not context.is_first_of_node:
        return None
    found, fingerprints = [], []
    for source in context.sources:
        manifest = context.manifest(source)
        note = _check_unless_staged(source, manifest, context.run.data.cache_dir)
        found.append(f"{source}: {manifest.num_samples:,} images, shards: {len(manifest.shards)}{note}")
        fingerprints.append(manifest.fingerprint()[:12])
    return Result(", ".join(found), common=f"manifests {', '.join(fingerprints)}")


def _check_unless_staged(source: str, manifest: Manifest, cache_dir: str | None) -> str:
    """Return why the files of a set need no check, "" if they were checked. Raises UserError for a bad one."""
    if find_staged(manifest, cache_dir):
        return " (staged already)"
    if remote.is_remote(source):
        return " (to be downloaded)"
    _check_files(Path(source), manifest)
    return ""


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise UserError that names the first file which differs from the manifest, and how many differ."""
    problems = [problem for shard in manifest.shards if (problem := _problem_of(folder / shard.file, shard))]
    if problems:
        more = f" (and {len(problems) - 1} more of {len(manifest.shards)} shards)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; restore them, or name a folder that is complete on every node")
    step = -(-len(manifest.shards) // SAMPLED_SHARDS)
    for shard in manifest.shards[::step]:
        for _ in read_shard(folder / shard.file):
            break


def _problem_of(path: Path, shard: ShardInfo) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != shard.bytes:
        return f"{path}: {size:,} bytes, expected {shard.bytes:,}"
    return None if os.access(path, os.R_OK) else f"{path}: not readable by this user"


def staging(context: Context) -> Result | None:
    """Check that each node has space for the sets that training will stage and map."""
    if not context.is_first_of_node or not context.has_manifests():
        return None
    cache_dir = context.run.data.cache_dir
    needed_in: dict[Path, int] = {}
    for source in context.sources:
        manifest = context.manifest(source)
        if not find_staged(manifest, cache_dir):
            root, needed = staging_folder(source, manifest, cache_dir)
            needed_in[root] = needed_in.get(root, 0) + needed
    left = []
    for root, needed in needed_in.items():
        folder = nearest_folder(root)
        left.append(shutil.disk_usage(folder).free - needed)
        if left[-1] < 0 or not os.access(folder, os.W_OK):
            what = f"{format_bytes(-left[-1])} too little" if left[-1] < 0 else "not writable"
            text = f"{root}: {what} to stage {format_bytes(needed)}"
            return Result(f"{text}; set data.cache_dir to a local disk with enough space", FAILURE)
    if not needed_in:
        return Result("staged already")
    text = ", ".join(f"{format_bytes(needed)} to write into {root}" for root, needed in needed_in.items())
    return Result(f"{text}, {format_bytes(min(left))} left then")


def checkpoint_space(context: Context) -> Result | None:
    """Check the disk of the run folder: a failure if a fresh run cannot save, a warning if it cannot later.

    A run that has checkpoints can continue without the next one, and a run that has saved its last step needs none.
    """
    if not context.processes.is_first or not context.has_manifests():
        return None
    if problems_of(context.run, context.processes.world_size):  # `settings` reports them
        return None
    config, folder = context.run, context.run.directory
    saved = saved_steps(folder / "checkpoints")
    if context.schedule.total_steps in saved:
        return None
    size, most = checkpoint_bytes(config), most_checkpoints(context.schedule, config.checkpoint)
    free = shutil.disk_usage(nearest_folder(folder)).free
    text = f"{format_bytes(size)} each, {most} at most, {len(saved)} saved; {format_bytes(free)} free in {folder}"
    advice = "free some space, lower checkpoint.keep_last, or set run_dir to a larger disk"
    if free < size and not saved:
        return Result(f"{text}; {advice}", FAILURE)
    if free < max(most - len(saved), 1) * size:
        return Result(f"{text}: too little for the whole run; {advice}", WARNING)
    return Result(text)


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of a checkpoint: weights, Adam's moments and, if the run has one, the EMA, all in float32."""
    return config.model.parameters() * 4 * (1 + len(MOMENTS) + bool(config.optimizer.ema_decay))


def most_checkpoints(schedule: Schedule, checkpoint: CheckpointSection) -> int:
    """Return the most checkpoints on disk at once: the newest, the kept ones (ends of stages, multiples of
    `keep_every`), and one that is being written."""
    stages, steps = len(schedule.stages), schedule.total_steps
    multiples = steps // checkpoint.keep_every if checkpoint.keep_every else 0
    saves = stages + (steps // checkpoint.every if checkpoint.every else 0)
    return min(checkpoint.keep_last + stages + multiples + 1, saves)


CHECKS = (
    Check("settings", settings, lasting=True),
    Check("weights", weights, lasting=True),
    Check("shards", shards, lasting=True),
    Check("staging", staging),
    Check("checkpoints", checkpoint_space, lasting=True),
)
