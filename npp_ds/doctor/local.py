"""Checks that each process makes alone: of the machine (software, GPUs, SLURM, cores) and of the run (settings, data,
disk space)."""

import os
import platform
import shutil
from pathlib import Path

import torch

from npp_ds import __version__
from npp_ds.checkpoint.folders import saved_steps
from npp_ds.config.checks import problems_of
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import CheckpointSection, RunConfig
from npp_ds.data import remote
from npp_ds.data.manifest import Manifest, ShardInfo
from npp_ds.data.shards import read_shard
from npp_ds.data.store import find_staged, staging_folder
from npp_ds.distributed.environment import is_srun_task
from npp_ds.doctor.checks import FAILURE, WARNING, Check, Context, Result
from npp_ds.errors import UserError
from npp_ds.training.deepspeed_config import import_deepspeed
from npp_ds.training.partitions import MOMENTS
from npp_ds.training.preflight import initial_weights
from npp_ds.training.run_folder import check_settings
from npp_ds.utils.files import nearest_folder
from npp_ds.utils.format import counted, format_bytes

DRIVER = Path("/sys/module/nvidia/version")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # set by torchrun and accelerate, and by the deepspeed launcher
BUSY_BYTES = 3e9
"""GPU memory in use from which on another program is assumed; the CUDA context of a process takes less."""
SAMPLED_SHARDS = 3


def software(context: Context) -> Result | None:
    """Import deepspeed on one process of each node and compare versions; training compiles nothing, so no compiler."""
    if not context.is_first_of_node:
        return None
    try:
        deepspeed = import_deepspeed()
    except Exception as error:  # a broken installation may raise anything
        reason = f"deepspeed cannot be imported: {type(error).__name__}: {error}"
        return Result(f"{reason}; fix its installation in this environment (pip install deepspeed)", FAILURE)
    found = [f"npp_ds {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    if context.has_gpu:
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    text = ", ".join([*found, f"deepspeed {deepspeed.__version__}"])
    return Result(text, common=text)


def missing_gpu(local_rank: int) -> str | None:
    """Return what is wrong if SLURM gave this process a GPU that torch does not see, else None."""
    given, visible = _number("SLURM_GPUS_ON_NODE") or 0, torch.cuda.device_count()
    if local_rank >= given or local_rank < visible or visible == 1:  # one each: srun --gpus-per-task
        return None
    return (
        f"SLURM gave {given} GPUs and torch sees {visible} (torch for CUDA {torch.version.cuda}, driver {_driver()}); "
        "install a torch that fits the driver, and check nvidia-smi and CUDA_VISIBLE_DEVICES on this node"
    )


def gpu(context: Context) -> Result:
    """Compare the GPUs of this node with its processes, and their model and driver with those of other nodes."""
    driver = _driver()
    if not context.has_gpu:
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            text = f"driver {driver} is loaded and torch (for CUDA {torch.version.cuda}) sees no GPU"
            return Result(f"{text}: training would run on the CPU; install a torch that fits the driver", WARNING)
        return Result("none: training on the CPU", common="no GPU")
    name, visible = torch.cuda.get_device_name(context.processes.device), torch.cuda.device_count()
    model = f"{name}, driver {driver}"
    processes = context.nodes.count(context.node)
    available = max(visible, _number("SLURM_GPUS_ON_NODE") or 0)
    if processes < available:
        both = f"{counted(available, 'GPU')} and {counted(processes, 'process')} on this node"
        text = f"{model}: {both}; start one process per GPU"
        return Result(text, WARNING, common=model)
    return Result(f"{visible} visible to {counted(processes, 'process')} of a node: {model}", common=model)


def gpu_memory(context: Context) -> Result | None:
    """Warn if another program uses this process's GPU."""
    if not context.has_gpu:
        return None
    free, total = torch.cuda.mem_get_info(context.processes.device)
    name = f"GPU {context.processes.local_rank}"
    if total - free > BUSY_BYTES:
        text = f"{name}: {format_bytes(total - free)} of {format_bytes(total)} are in use"
        return Result(f"{text}: another program runs there (nvidia-smi names it)", WARNING)
    return Result(f"{format_bytes(free)} of {format_bytes(total)} free on {name}")


def world_size(context: Context) -> Result:
    """Compare processes and nodes with what srun started; a launcher inside a task may start any number."""
    world, nodes = context.processes.world_size, len(set(context.nodes))
    found = f"{counted(world, 'process')} on {counted(nodes, 'node')}"
    if not is_srun_task() or any(name in os.environ for name in LAUNCHERS):
        return Result(f"{found}, not started by srun")
    wrong = []
    if (tasks := _number("SLURM_STEP_NUM_TASKS")) != world:
        wrong.append(f"{tasks} tasks")
    if (expected_nodes := _number("SLURM_STEP_NUM_NODES")) not in (None, nodes):
        wrong.append(f"{expected_nodes} nodes")
    if not wrong:
        return Result(f"{found}, as srun started them")
    text = f"{found}, but SLURM says {' and '.join(wrong)}"
    advice = "start one task per GPU with srun and set neither RANK nor WORLD_SIZE by hand"
    return Result(f"{text}; {advice}", FAILURE, permanent=True)


def cores(context: Context) -> Result:
    """Warn if this process has fewer cores than SLURM promised, or a single one beside a GPU."""
    usable, promised = len(os.sched_getaffinity(0)), _number("SLURM_CPUS_PER_TASK") or 1
    advice = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun, which does not inherit --cpus-per-task"
    if usable < promised:
        return Result(f"{usable} usable, SLURM_CPUS_PER_TASK={promised}; {advice}", WARNING)
    if usable == 1 and context.has_gpu:
        return Result(f"1 usable beside a GPU, which will wait for it; {advice}, or request more", WARNING)
    return Result(f"{usable} usable by each process")


def _driver() -> str | None:
    return DRIVER.read_text().strip() if DRIVER.is_file() else None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


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
    Check("world size", world_size),
    Check("software", software),
    Check("GPUs", gpu, differing=WARNING),
    Check("GPU memory", gpu_memory),
    Check("cores", cores),
)
CHECKS_OF_RUN = (
    Check("settings", settings, permanent=True),
    Check("weights", weights, permanent=True),
    Check("shards", shards, permanent=True),
    Check("staging", staging),
    Check("checkpoints", checkpoint_space, permanent=True),
)
