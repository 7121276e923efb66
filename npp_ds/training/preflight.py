"""Checks before anything starts: config, data, processes, DeepSpeed settings, kernels, initial weights, evaluation."""

from pathlib import Path

from npp_ds.checkpoint.folders import saved_steps
from npp_ds.checkpoint.open import Weights, open_weights
from npp_ds.config.load import problems_of
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import ModelSection, RunConfig
from npp_ds.data.shards import Manifest
from npp_ds.data.store import load_manifest
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig
from npp_ds.model.attention import check_attention
from npp_ds.sizes import ffn_hidden
from npp_ds.tokenizer.loading import SHIPPED
from npp_ds.training.compile import check_performance
from npp_ds.training.deepspeed_config import engine_settings
from npp_ds.training.evaluation import evaluation_problems
from npp_ds.utils.files import sha256


def fitting_schedule(config: RunConfig, world_size: int) -> Schedule:
    """Return the schedule of a run on its data with this many processes; of the data only the manifests are read.

    Raises UserError that lists every problem.
    """
    train = load_manifest(config.data.train)
    val = load_manifest(config.data.val) if config.data.val else None
    problems = problems_of(config, world_size, train.num_samples)
    if not problems:
        problems = _engine_problems(config, train.num_samples, world_size) + _init_problems(config)
    for key, manifest in (("train", train), ("val", val)):
        problems += _data_problems(key, manifest, config) if manifest else []
    if val and train.tokenizer.sha256 != val.tokenizer.sha256:
        problems.append("data.val: made with another tokenizer than data.train; tokenize both with the same one")
    problems += evaluation_problems(config, train.tokenizer)
    if problems:
        raise UserError("the config does not fit the data:\n" + "\n".join(f"  - {p}" for p in problems))
    return config.build_schedule(train.num_samples, world_size)


def initial_weights(config: RunConfig) -> Weights | None:
    """Return what a fresh run starts from; None for random weights, and for a run that has saved checkpoints.

    Raises UserError when there are no such weights.
    """
    if config.init_from is None or saved_steps(config.directory / "checkpoints"):
        return None
    return open_weights(config.init_from, n_heads=config.model.shape()["n_heads"], verify=True)


def _init_problems(config: RunConfig) -> list[str]:
    """Return where initial weights disagree with the model; their grid may differ, since positions are computed."""
    try:
        weights = initial_weights(config)
    except UserError as error:
        return [f"init_from: {error}"]
    if weights is None:
        return []
    ours, theirs = (_fixed_by_weights(model) for model in (config.model, weights.model))
    return [
        f"model.{key}: {ours[key]}, but the weights of init_from ({config.init_from}) have {theirs[key]}; "
        "change the model, or start from other weights"
        for key in ours
        if ours[key] != theirs[key]
    ]


def _fixed_by_weights(model: ModelSection) -> dict[str, int]:
    config = ModelConfig(**model.arguments())
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "num_classes")
    width = ffn_hidden(config.dim, config.ffn_multiple_of)
    return {**{name: getattr(config, name) for name in names}, "ffn_multiple_of (width)": width}


def _engine_problems(config: RunConfig, num_samples: int, world_size: int) -> list[str]:
    """Return what DeepSpeed's settings, the attention kernel and `performance` would refuse later."""
    first = config.build_schedule(num_samples, world_size).stages[0]
    problems = []
    for check in (
        lambda: engine_settings(config, first, world_size),
        lambda: check_attention(config.model.attention),
        lambda: check_performance(config),
    ):
        try:
            check()
        except UserError as error:
            problems += str(error).splitlines()
    return problems


def _data_problems(key: str, manifest: Manifest, config: RunConfig) -> list[str]:
    """Return where shards disagree with the model, and with the tokenizer that is to decode its samples."""
    model, where = config.model, f"data.{key} ({getattr(config.data, key)})"
    problems = [
        f"model.{name}: {getattr(model, name)}, but the shards of {where} have "
        f"{getattr(manifest, name)}; set model.{name}={getattr(manifest, name)} or name other shards"
        for name in ("grid_size", "vocab_size", "num_classes")
        if getattr(model, name) != getattr(manifest, name)
    ]
    tokenizer, made_by = config.data.tokenizer, manifest.tokenizer
    file = SHIPPED.get(tokenizer, Path(tokenizer)) if tokenizer else None
    if file and file.is_file() and (found := sha256(file)) != made_by.sha256:
        problems.append(
            f"data.tokenizer: {tokenizer} has SHA-256 {found[:12]}.., but the shards of {where} were made by "
            f"{made_by.name} ({made_by.sha256[:12]}..); name that one, or other shards"
        )
    return problems
