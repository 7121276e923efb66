"""Checks before anything starts: config, data, processes, DeepSpeed settings, kernels, initial weights, evaluation."""

import logging
from collections.abc import Callable

import torch

from npp_ds.checkpoint.folders import saved_steps
from npp_ds.checkpoint.open import Weights, open_weights
from npp_ds.config.checks import problems_of
from npp_ds.config.schedule import Schedule
from npp_ds.config.schema import DataSection, ModelSection, RunConfig
from npp_ds.data.manifest import Coding, Manifest, Mismatch, meaning_mismatches, size_mismatches
from npp_ds.data.store import CodeStore, load_manifest, stage_sets
from npp_ds.distributed.environment import host_name
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig
from npp_ds.model.attention import check_attention
from npp_ds.sizes import ffn_hidden
from npp_ds.tokenizer.loading import check_tokenizer
from npp_ds.training.deepspeed_config import check_monitors, engine_settings
from npp_ds.training.evaluation import load_evaluator
from npp_ds.training.performance import check_performance

logger = logging.getLogger(__name__)


def fitting_schedule(config: RunConfig, world_size: int) -> Schedule:
    """Return the schedule of a run on its data with this many processes; of the data only the manifests are read.

    Raises UserError that lists every problem.
    """
    train = load_manifest(config.data.train)
    val = load_manifest(config.data.val) if config.data.val else None
    problems = problems_of(config, world_size, train.num_samples)
    if not problems:
        problems = _engine_problems(config, train.num_samples, world_size) + _init_problems(config, train)
    for key, manifest in (("train", train), ("val", val)):
        problems += _size_problems(key, manifest, config) if manifest else []
    if val:
        where = f"data.val ({config.data.val})"
        problems += _meaning_problems(where, meaning_mismatches(val.coding, train.coding), config)
    if config.evaluate.every:  # this loads the tokenizer, too
        problems += _refusals(lambda: load_evaluator(config, train.tokenizer, torch.device("cpu")))
    elif tokenizer := config.data.tokenizer:
        problems += [f"data.tokenizer: {p}" for p in _refusals(lambda: check_tokenizer(train.tokenizer, tokenizer))]
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


def _init_problems(config: RunConfig, train: Manifest) -> list[str]:
    """Return where initial weights disagree with the model and the data.

    Their grid may differ, since positions are computed.
    """
    try:
        weights = initial_weights(config)
    except UserError as error:
        return [f"init_from: {error}"]
    if weights is None:
        return []
    ours, theirs = (_fixed_by_weights(model) for model in (config.model, weights.model))
    problems = [
        f"model.{key}: {ours[key]}, but the weights of init_from ({config.init_from}) have {theirs[key]}; "
        "change the model, or start from other weights"
        for key in ours
        if ours[key] != theirs[key]
    ]
    where = f"init_from ({config.init_from})"
    return problems + _meaning_problems(where, meaning_mismatches(weights.coding, train.coding), config)


def _meaning_problems(where: str, mismatches: list[Mismatch], config: RunConfig) -> list[str]:
    """Return the problem for each mismatch with the training data; only warn of them with data.allow_mismatch."""
    texts = [
        f"{where}: its {fact} is {found}, but {expected} in data.train ({config.data.train})"
        for fact, found, expected in mismatches
    ]
    if config.data.allow_mismatch:
        for text in texts:
            logger.warning(f"{text}; accepted, because data.allow_mismatch is set")
        return []
    return [f"{text}; name one that agrees, or accept it with data.allow_mismatch=true" for text in texts]


def _fixed_by_weights(model: ModelSection) -> dict[str, int]:
    config = ModelConfig(**model.arguments())
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "num_classes")
    width = ffn_hidden(config.dim, config.ffn_multiple_of)
    return {**{name: getattr(config, name) for name in names}, "ffn_multiple_of (width)": width}


def _engine_problems(config: RunConfig, num_samples: int, world_size: int) -> list[str]:
    """Return what DeepSpeed's settings, the attention kernel and `performance` would refuse later."""
    first = config.build_schedule(num_samples, world_size).stages[0]
    return [
        *_refusals(lambda: engine_settings(config, first, world_size)),
        *_refusals(lambda: check_monitors(config)),
        *_refusals(lambda: check_attention(config.model.attention)),
        *_refusals(lambda: check_performance(config)),
    ]


def _refusals(check: Callable[[], object]) -> list[str]:
    """Return the lines of the UserError that a check raises; [] if it raises none."""
    try:
        check()
    except UserError as error:
        return str(error).splitlines()
    return []


def _size_problems(key: str, manifest: Manifest, config: RunConfig) -> list[str]:
    """Return where the sizes of shards and model differ."""
    model, where = config.model, f"data.{key} ({getattr(config.data, key)})"
    sizes = Coding(model.grid_size, model.vocab_size, model.num_classes)
    return [
        f"model.{name}: {ours}, but the shards of {where} have {theirs}; set model.{name}={theirs} or name other shards"
        for name, theirs, ours in size_mismatches(manifest.coding, sizes)
    ]


def staged_sets(data: DataSection, processes: Processes) -> tuple[CodeStore, CodeStore | None]:
    """Return the training and validation sets of a run, the same ones on all ranks.

    Raises what `stage` raises, and UserError where a path leads to another set on another node.
    """
    train, val = processes.on_all(stage_sets, data)
    for key, store in (("data.train", train), ("data.val", val)):
        found = processes.gather(store and (store.manifest.fingerprint()[:12], host_name()))
        for rank, other in enumerate(found):
            if other and other[0] != found[0][0]:
                raise UserError(
                    f"{key}: rank {rank} on {other[1]} reads another set ({other[0]}) than rank 0 on {found[0][1]} "
                    f"({found[0][0]}); give all nodes the same shards",
                    on_all_ranks=True,
                )
    return train, val
