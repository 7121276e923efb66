"""Checks of the machine alone, each by one process for itself: software, GPU, SLURM's promises, cores."""

import os
import platform
from pathlib import Path

import torch

from npp_ds import __version__
from npp_ds.distributed.environment import is_srun_task
from npp_ds.doctor.context import Context
from npp_ds.doctor.outcome import FAILURE, WARNING, Check, Outcome
from npp_ds.training.deepspeed_import import import_deepspeed
from npp_ds.utils.format import format_bytes

DRIVER = Path("/sys/module/nvidia/version")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")  # set by torchrun and accelerate, and by the deepspeed launcher
BUSY_BYTES = 3e9  # more than what a process's own CUDA context takes


def software(context: Context) -> Outcome | None:
    """On one process of each node; nothing that training uses has to be compiled, so no compiler is asked for."""
    if not context.is_first_of_node:
        return None
    try:
        deepspeed = import_deepspeed()
    except Exception as error:  # whatever a broken installation raises
        reason = f"deepspeed cannot be imported: {type(error).__name__}: {error}"
        return Outcome(f"{reason}; mend its installation in this environment (pip install deepspeed)", FAILURE)
    found = [f"npp_ds {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    if context.has_gpu:
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    text = ", ".join([*found, f"deepspeed {deepspeed.__version__}"])
    return Outcome(text, alike=text)


def missing_gpu(local_rank: int) -> str | None:
    """What is wrong when SLURM has given this process a GPU of its node and torch does not see it."""
    given, visible = _number("SLURM_GPUS_ON_NODE") or 0, torch.cuda.device_count()
    if local_rank >= given or local_rank < visible or visible == 1:  # one each: srun --gpus-per-task
        return None
    return (
        f"SLURM gave {given} GPUs and torch sees {visible} (torch for CUDA {torch.version.cuda}, driver {_driver()}); "
        "install a torch that fits the driver, and see nvidia-smi and CUDA_VISIBLE_DEVICES on this node"
    )


def gpu(context: Context) -> Outcome:
    driver = _driver()
    if not context.has_gpu:
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            text = f"driver {driver} is loaded and torch (for CUDA {torch.version.cuda}) sees no GPU"
            return Outcome(f"{text}: training would run on the CPU; install a torch that fits the driver", WARNING)
        return Outcome("none: training on the CPU", alike="no GPU")
    name, visible = torch.cuda.get_device_name(context.processes.device), torch.cuda.device_count()
    model = f"{name}, driver {driver}"
    processes = context.nodes.count(context.node)
    there = max(visible, _number("SLURM_GPUS_ON_NODE") or 0)
    if processes < there:
        text = f"{model}: {there} GPUs and {processes} processes on this node; start one process per GPU"
        return Outcome(text, WARNING, alike=model)
    return Outcome(f"{visible} visible to {processes} processes of a node: {model}", alike=model)


def gpu_memory(context: Context) -> Outcome | None:
    if not context.has_gpu:
        return None
    free, total = torch.cuda.mem_get_info(context.processes.device)
    place = f"GPU {context.processes.local_rank}"
    if total - free > BUSY_BYTES:
        text = f"{place}: {format_bytes(total - free)} of {format_bytes(total)} are taken already"
        return Outcome(f"{text}: something else runs there (nvidia-smi names it)", WARNING)
    return Outcome(f"{format_bytes(free)} of {format_bytes(total)} free on {place}", margin=free)


def world_size(context: Context) -> Outcome:
    """Against what srun has started; a launcher in one of its tasks starts as many processes as it was told."""
    world, nodes = context.processes.world_size, len(set(context.nodes))
    found = counted(world, nodes)
    if not is_srun_task() or any(name in os.environ for name in LAUNCHERS):
        return Outcome(f"{found}, not started by srun")
    wrong = []
    if (tasks := _number("SLURM_STEP_NUM_TASKS")) != world:
        wrong.append(f"{tasks} tasks")
    if (expected_nodes := _number("SLURM_STEP_NUM_NODES")) not in (None, nodes):
        wrong.append(f"{expected_nodes} nodes")
    if not wrong:
        return Outcome(f"{found}, as srun started them")
    text = f"{found}, but SLURM says {' and '.join(wrong)}"
    advice = "start one task per GPU with srun and set neither RANK nor WORLD_SIZE by hand"
    return Outcome(f"{text}; {advice}", FAILURE, lasting=True)


def cores(context: Context) -> Outcome:
    usable, promised = len(os.sched_getaffinity(0)), _number("SLURM_CPUS_PER_TASK") or 1
    advice = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun, which does not inherit --cpus-per-task"
    if usable < promised:
        return Outcome(f"{usable} usable, SLURM_CPUS_PER_TASK={promised}; {advice}", WARNING)
    if usable == 1 and context.has_gpu:
        return Outcome(f"1 usable beside a GPU, which will wait for it; {advice}, or ask for more", WARNING)
    return Outcome(f"{usable} usable by each process", margin=usable)


def counted(processes: int, nodes: int) -> str:
    """ "2 processes on 1 node"."""
    return f"{processes} process{'es' * (processes != 1)} on {nodes} node{'s' * (nodes != 1)}"


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
