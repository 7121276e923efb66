"""Checks of the machine alone, each by one process for itself: software, GPU, SLURM's promises, cores."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from npp_ds import __version__
from npp_ds.doctor.context import Context, gigabytes
from npp_ds.doctor.outcome import FAILURE, WARNING, Check, Outcome
from npp_ds.training.deepspeed_import import import_deepspeed

DRIVER = Path("/sys/module/nvidia/version")
BUSY_BYTES = 3e9  # more than what a process's own CUDA context takes


def software(context: Context) -> Outcome:
    found = [f"npp_ds {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        found.append(f"CUDA {torch.version.cuda}")
    if context.has_gpu:
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    try:
        found.append(f"deepspeed {version('deepspeed')}")
    except PackageNotFoundError:
        return Outcome("deepspeed is not installed; run `pip install deepspeed` in this environment", FAILURE)
    text = ", ".join(found)
    return Outcome(text, alike=text)


def deepspeed_imports(context: Context) -> Outcome | None:
    """On one process of each node; nothing that training uses has to be compiled, so no compiler is asked for."""
    if not context.is_first_of_node:
        return None
    began = time.perf_counter()
    try:
        import_deepspeed()
    except Exception as error:  # whatever a broken installation raises
        reason = f"{type(error).__name__}: {error}; mend the installation of deepspeed in this environment"
        return Outcome(f"cannot be imported: {reason}", FAILURE)
    seconds = time.perf_counter() - began
    return Outcome(f"imports in {seconds:.1f} s", margin=-seconds)


def gpu(context: Context) -> Outcome:
    given = _number("SLURM_GPUS_ON_NODE")
    driver = DRIVER.read_text().strip() if DRIVER.is_file() else None
    if not context.has_gpu:
        if given:
            text = f"SLURM gave {given} GPUs and torch sees none (torch for CUDA {torch.version.cuda}, driver {driver})"
            return Outcome(f"{text}; install a torch that fits the driver, and see CUDA_VISIBLE_DEVICES", FAILURE)
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            text = f"driver {driver} is loaded and torch (for CUDA {torch.version.cuda}) sees no GPU"
            return Outcome(f"{text}: training would run on the CPU; install a torch that fits the driver", WARNING)
        return Outcome("none: training on the CPU", alike="no GPU")
    name, visible = torch.cuda.get_device_name(context.processes.device), torch.cuda.device_count()
    model = f"{name}, driver {driver}"
    processes = context.nodes.count(context.node)
    there = max(visible, given or 0)
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
        text = f"{place}: {gigabytes(total - free)} of {gigabytes(total)} are taken already"
        return Outcome(f"{text}: something else runs there (nvidia-smi names it)", WARNING)
    return Outcome(f"{gigabytes(free)} of {gigabytes(total)} free on {place}", margin=free)


def world_size(context: Context) -> Outcome:
    """Against what SLURM has started; under torchrun a task is not a process, so only nodes are compared."""
    world, nodes = context.processes.world_size, len(set(context.nodes))
    found = counted(world, nodes)
    if "SLURM_JOB_ID" not in os.environ:
        return Outcome(f"{found}, not under SLURM")
    tasks = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS")
    tasks = None if "TORCHELASTIC_RUN_ID" in os.environ else tasks
    expected_nodes = _number("SLURM_STEP_NUM_NODES") or _number("SLURM_JOB_NUM_NODES")
    wrong = []
    if tasks not in (None, world):
        wrong.append(f"{tasks} tasks")
    if expected_nodes not in (None, nodes):
        wrong.append(f"{expected_nodes} nodes")
    if not wrong:
        return Outcome(f"{found}, as SLURM started them")
    text = f"{found}, but SLURM says {' and '.join(wrong)}"
    if "SLURM_STEP_NUM_TASKS" not in os.environ:  # which srun sets, and sbatch does not
        return Outcome(f"{text}: not started by srun; put srun before the command", WARNING)
    return Outcome(f"{text}; start one task per GPU with srun and set neither RANK nor WORLD_SIZE by hand", FAILURE)


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


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


CHECKS = (
    Check("world size", world_size),
    Check("software", software),
    Check("DeepSpeed", deepspeed_imports),
    Check("GPUs", gpu, differing=WARNING),
    Check("GPU memory", gpu_memory),
    Check("cores", cores),
)
