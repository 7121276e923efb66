"""Checks of the run that is to start, each by one process for itself: settings, shards, room on disks."""

import os
import shutil
from contextlib import closing
from pathlib import Path

from npp_ds.checkpoint.folders import saved_steps
from npp_ds.config.load import problems_of
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import CheckpointSection, RunConfig
from npp_ds.data import remote
from npp_ds.data.shards import Manifest, ShardInfo, read_shard
from npp_ds.data.store import find_staged, staging_folder
from npp_ds.doctor.context import Context
from npp_ds.doctor.outcome import FAILURE, WARNING, Check, Outcome
from npp_ds.errors import UserError
from npp_ds.training.partitions import MOMENTS
from npp_ds.training.run_folder import check_settings
from npp_ds.utils.files import nearest_folder
from npp_ds.utils.format import format_bytes

SAMPLED_SHARDS = 3


def settings(context: Context) -> Outcome | None:
    """Everything between config, number of processes and data that a start would refuse; once for all."""
    if not context.is_first:
        return None
    config, world_size = context.config, context.processes.world_size
    if problems := problems_of(config, world_size):
        return Outcome("; ".join(problems), FAILURE)
    check_settings(config)
    if not _shards_are_known(context):
        return Outcome(f"{config.name}: batches fit a world size of {world_size}")
    stages = ", ".join(
        f"side {s.patch_side}: {s.steps:,} steps of {s.batch_size} images ({s.micro_batch_size} at a time)"
        for s in context.schedule.stages
    )
    return Outcome(f"{config.name}: {stages}")


def shards(context: Context) -> Outcome | None:
    """That this node reads one manifest with all others, and every shard file in it; no hashes, few samples."""
    if not context.is_first_of_node:
        return None
    found, fingerprints = [], []
    for source in context.sources:
        manifest = context.manifest(source)
        note = _note_on_files(source, manifest, context.config.data.cache_dir)
        found.append(f"{source}: {manifest.num_samples:,} images, shards: {len(manifest.shards)}{note}")
        fingerprints.append(manifest.fingerprint()[:12])
    return Outcome(", ".join(found), alike=f"manifests {', '.join(fingerprints)}")


def _note_on_files(source: str, manifest: Manifest, cache_dir: str | None) -> str:
    """Why the files of a set were not looked at; empty when they were and are as they should be, else UserError."""
    if find_staged(manifest, cache_dir):
        return " (staged already)"
    if remote.is_remote(source):
        return " (to be fetched)"
    _check_files(Path(source), manifest)
    return ""


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raises UserError naming the first file that is not as the manifest says, and how many there are."""
    problems = [problem for shard in manifest.shards if (problem := _problem_of(folder / shard.file, shard))]
    if problems:
        more = f" (and {len(problems) - 1} more of {len(manifest.shards)} shards)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; restore them, or name a folder that every node sees whole")
    step = -(-len(manifest.shards) // SAMPLED_SHARDS)
    for shard in manifest.shards[::step]:
        with closing(read_shard(folder / shard.file)) as samples:
            next(samples, None)


def _problem_of(path: Path, shard: ShardInfo) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != shard.bytes:
        return f"{path}: {size:,} bytes, expected {shard.bytes:,}"
    return None if os.access(path, os.R_OK) else f"{path}: not readable by this user"


def staging(context: Context) -> Outcome | None:
    """Room on this node for the sets that training will map."""
    if not context.is_first_of_node or not _shards_are_known(context):
        return None
    cache_dir, needed_in, margins = context.config.data.cache_dir, {}, []
    for source in context.sources:
        manifest = context.manifest(source)
        if not find_staged(manifest, cache_dir):
            root, needed = staging_folder(source, manifest, cache_dir)
            needed_in[root] = needed_in.get(root, 0) + needed
    for root, needed in needed_in.items():
        place = nearest_folder(root)
        margins.append(shutil.disk_usage(place).free - needed)
        if margins[-1] < 0 or not os.access(place, os.W_OK):
            what = f"{format_bytes(-margins[-1])} too little" if margins[-1] < 0 else "not writable"
            text = f"{root}: {what} to stage {format_bytes(needed)}"
            return Outcome(f"{text}; set data.cache_dir to a local disk with room", FAILURE)
    if not needed_in:
        return Outcome("staged already")
    text = ", ".join(f"{format_bytes(needed)} to write into {root}" for root, needed in needed_in.items())
    return Outcome(f"{text}, {format_bytes(min(margins))} left then", margin=min(margins))


def checkpoint_room(context: Context) -> Outcome | None:
    """A failure when a fresh run has no room for one checkpoint, a warning when one will have none later.

    A run that has checkpoints can live without the next one, and one that has saved its last step needs none.
    """
    if not context.is_first or not _shards_are_known(context):
        return None
    if problems_of(context.config, context.processes.world_size):  # told by `settings`
        return None
    config, folder = context.config, context.config.directory
    saved = saved_steps(folder / "checkpoints")
    if context.schedule.total_steps in saved:
        return None
    size, most = checkpoint_bytes(config), most_checkpoints(context.schedule, config.checkpoint)
    free = shutil.disk_usage(nearest_folder(folder)).free
    text = f"{format_bytes(size)} each, {most} at most, {len(saved)} there; {format_bytes(free)} free in {folder}"
    advice = "free some, lower checkpoint.keep_last, or set run_dir to a larger disk"
    if free < size and not saved:
        return Outcome(f"{text}; {advice}", FAILURE)
    if free < max(most - len(saved), 1) * size:
        return Outcome(f"{text}: too little for the whole run; {advice}", WARNING)
    return Outcome(text)


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights, Adam's moments and the average where there is one, in float32."""
    return config.model.parameters() * 4 * (1 + len(MOMENTS) + bool(config.optimizer.ema_decay))


def most_checkpoints(schedule: Schedule, checkpoint: CheckpointSection) -> int:
    """On disk at once at most: the newest, those of stages' ends and multiples that stay, and one in the making."""
    stages, steps = len(schedule.stages), schedule.total_steps
    multiples = steps // checkpoint.keep_every if checkpoint.keep_every else 0
    saves = stages + (steps // checkpoint.every if checkpoint.every else 0)
    return min(checkpoint.keep_last + stages + multiples + 1, saves)


def _shards_are_known(context: Context) -> bool:
    """Whether the manifests can be read here; if not, the check of the shards says why."""
    try:
        for source in context.sources:
            context.manifest(source)
    except UserError:
        return False
    return True


CHECKS = (
    Check("settings", settings, lasting=True),
    Check("shards", shards, lasting=True),
    Check("staging", staging),
    Check("checkpoints", checkpoint_room, lasting=True),
)
