"""Checks of the machine that each process makes alone: software, GPUs, what SLURM started, cores."""

import os
import platform
from pathlib import Path

import torch

from npp_ds import __version__
from npp_ds.distributed.environment import is_srun_task
from npp_ds.doctor.checks import FAILURE, WARNING, Check, Context, Result
from npp_ds.training.deepspeed_config import import_deepspeed
from npp_ds.utils.format import counted, format_bytes

DRIVER = Path("/sys/module/nvidia/version")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # set by torchrun and accelerate, and by the deepspeed launcher
BUSY_BYTES = 3e9
"""GPU memory in use from which on another program is assumed; the CUDA context of a process takes less."""


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
    return Result(f"{text}; {advice}", FAILURE, lasting=True)


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


CHECKS = (
    Check("world size", world_size),
    Check("software", software),
    Check("GPUs", gpu, differing=WARNING),
    Check("GPU memory", gpu_memory),
    Check("cores", cores),
)
