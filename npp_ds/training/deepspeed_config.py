"""DeepSpeed: its import, and its JSON settings from ds_configs/ or a file, with every "auto" filled from the config."""

import logging
import os
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import npp_ds
from npp_ds.config.schedule import Stage
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError, did_you_mean, similar_names
from npp_ds.utils.files import read_json

PRECISION_SECTIONS = ("bf16", "fp16", "torch_autocast")
OFFLOAD_SECTIONS = ("offload_optimizer", "offload_param")
MONITOR_SECTIONS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}


def import_deepspeed() -> ModuleType:
    """Return the package `deepspeed`, silent below warnings, ready on machines without a compiler."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Built with a C++ compiler on first use (40 s, and a failure where there is none) to speed up collectives between
    # CPU processes of one host: not worth it for CPU runs, unused on GPUs. As of deepspeed 0.19.8.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.15 calls deprecated, with a warning on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def shipped_configs() -> dict[str, Path]:
    """Return name -> file of the settings in ds_configs/, in a checkout or installed."""
    package = Path(npp_ds.__file__).parent
    folder = next((d for d in (package / "ds_configs", package.parent / "ds_configs") if d.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_settings(name_or_file: str) -> dict[str, Any]:
    """Return the settings of a shipped name or a JSON file, "auto" included. Raises UserError."""
    shipped = shipped_configs()
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        hint = did_you_mean(similar_names(name_or_file, shipped))
        raise UserError(
            f"deepspeed.config: {name_or_file} is neither a file nor one of {', '.join(shipped)}{hint}; name one"
        )
    try:
        settings = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, expected 1, 2 or 3")
    for section in OFFLOAD_SECTIONS:
        if not isinstance(offload := settings["zero_optimization"].get(section), dict | None):
            raise UserError(f'{path}: zero_optimization.{section} is {offload!r}, expected {{"device": ..}}')
    return settings


def zero_stage_of(config: RunConfig) -> int:
    """Return the ZeRO stage (1, 2 or 3) that a run asks for."""
    return read_settings(config.deepspeed.config)["zero_optimization"]["stage"]


def check_monitors(config: RunConfig) -> None:
    """Raise UserError if the package of a monitor in `logging.monitors` cannot be imported."""
    for monitor in config.logging.monitors:
        if monitor == "csv":
            continue
        try:
            import_module("torch.utils.tensorboard" if monitor == "tensorboard" else monitor)
        except ImportError as error:
            raise UserError(
                f"logging.monitors: {monitor} cannot be imported ({error}); install it with `pip install {monitor}`, "
                "or drop it"
            ) from error


def engine_settings(config: RunConfig, stage: Stage, world_size: int) -> dict[str, Any]:
    """Return the settings for `deepspeed.initialize`, with batch sizes, clipping, precision and monitors of the run.

    Raises UserError when the JSON sets a value of its own for what the run config decides.
    """
    settings = read_settings(config.deepspeed.config)
    decided = {
        "train_batch_size": stage.batch_size,
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": stage.batch_size // (stage.micro_batch_size * world_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": None,
    }
    clashes = [k for k, v in decided.items() if settings.get(k, "auto") not in ("auto", v)]
    if settings.get("compute_grad_norm", True) is not True:
        clashes.append("compute_grad_norm (it guards against gradients that are not finite)")
    clashes += [k for k in ("optimizer", "scheduler", *PRECISION_SECTIONS, *MONITOR_SECTIONS.values()) if k in settings]
    if clashes:
        raise UserError(
            f"deepspeed.config {config.deepspeed.config}: {', '.join(clashes)} "
            "belong to the run config (schedule, optimizer, precision, logging.monitors); "
            'drop them from the JSON, or write "auto" for batch sizes, clipping and steps_per_print'
        )
    if config.precision == "bf16" and settings["zero_optimization"]["stage"] == 1:
        raise UserError(
            f"precision: bf16 with deepspeed.config {config.deepspeed.config} (ZeRO-1): DeepSpeed uses another "
            "optimizer for this pair, which checkpoints do not cover; set precision to autocast_bf16, or "
            "deepspeed.config to zero2"
        )
    for section in OFFLOAD_SECTIONS:
        if (settings["zero_optimization"].get(section) or {}).get("device") == "nvme":
            raise UserError(
                f"deepspeed.config {config.deepspeed.config}: zero_optimization.{section} is on nvme, which "
                "checkpoints do not cover; use cpu, or drop the section"
            )
    settings.update(decided)
    # DeepSpeed's timer (0.19.8) synchronizes the device in every micro-batch, for a figure that it would never print.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    zero = settings["zero_optimization"]
    if zero["stage"] == 3 and world_size == 1:
        zero.setdefault("reduce_scatter", False)  # a single process would only copy its gradients, twice
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif config.precision == "autocast_bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    for monitor in config.logging.monitors:
        files = {"output_path": str(config.directory / "monitor"), "job_name": config.name}
        settings[MONITOR_SECTIONS[monitor]] = {
            "enabled": True,
            **({"project": config.name} if monitor == "wandb" else files),
        }
    return settings
