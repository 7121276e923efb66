"""Tokenizer files: ours (safetensors with the config in the metadata) and published ones (`vq_ds16_c2i.pt`)."""

import json
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npp_ds.checkpoint.safetensors_io import (
    WRAPPINGS,
    as_weights,
    misfits,
    opened_safetensors,
    read_torch,
    unwrapped_tensors,
)
from npp_ds.data.manifest import HasTokenizerId, TokenizerId, tokenizer_mismatch
from npp_ds.errors import UserError, did_you_mean, similar_names
from npp_ds.tokenizer.vq import METADATA_KEY, VQConfig, VQModel
from npp_ds.utils.files import parse_json, sha256, write_atomic
from npp_ds.utils.hub import WEIGHTS_FILE

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {"fashion_mnist": ASSETS / "fashion_mnist_vq.safetensors"}
ENTRIES = ("vq_ema", "vq", *WRAPPINGS)
"""Where checkpoints hold a tokenizer. LlamaGen-REPA and GEAR save weights and their average, which they recommend."""


def load_tokenizer(name_or_path: str | Path) -> VQModel:
    """Load a tokenizer in float32 and eval mode, and set its `name` and the `sha256` of its file.

    `name_or_path` is "fashion_mnist" (shipped), a .safetensors file of `save_tokenizer`, a folder of
    `VQModel.save_pretrained`, or a published .pt file, whose tensors determine the shape. Only tensors are unpickled.
    Raises UserError for a missing, damaged or other file.
    """
    path = _file_of(name_or_path)
    if path.suffix == ".safetensors":
        with opened_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        tensors = unwrapped_tensors(path, read_torch(path), ENTRIES)
    tensors.pop("quantize.codebook_used", None)
    config = _facts(path).get("config") or _infer_config(path, tensors)
    multipliers = config.channel_multipliers
    sizes = chain({**asdict(config), "channel_multipliers": 1}.values(), multipliers)
    possible = all(type(size) is int and size > 0 for size in sizes)
    if not possible or len(multipliers) * config.num_res_blocks > len(tensors):
        raise UserError(f"{path}: {config} is not the shape of its {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            model = VQModel(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path}: no tokenizer can have the shape {config} ({error})") from error
    found, expected = ({name: tuple(value.shape) for name, value in t.items()} for t in (tensors, model.state_dict()))
    if problems := misfits(found, expected):
        raise UserError(f"{path}: not a complete VQ tokenizer: {problems}")
    model.load_state_dict({name: as_weights(path, name, tensor) for name, tensor in tensors.items()}, assign=True)
    model.requires_grad_(False).eval()
    model.name, model.sha256 = identify(name_or_path)
    return model


def tokenizer_of(made_by: HasTokenizerId | None, name_or_path: str | Path | None = None) -> VQModel:
    """Load the tokenizer that decodes codes: the one named, else an available one that made them.

    `made_by` is the tokenizer that made the codes, None if unknown. Available are the shipped tokenizers and a file of
    that name in the working directory. Raises UserError if the tokenizer is another one or cannot be found.
    """
    if name_or_path is None:
        name_or_path = _available(made_by)
    check_tokenizer(made_by, name_or_path)
    return load_tokenizer(name_or_path)


def _available(made_by: HasTokenizerId | None) -> str:
    """Return the name or path of an available tokenizer that made the codes. Raises UserError if there is none."""
    if made_by is None or not made_by.sha256:
        raise UserError("tokenizer: not known which one made the codes; give its name or file with --tokenizer")
    for name, path in (*SHIPPED.items(), (made_by.name, Path(made_by.name))):
        if path.is_file() and sha256(path) == made_by.sha256:
            return name
    raise UserError(
        f"the codes were made by {made_by.name} (SHA-256 {made_by.sha256[:12]}..), which is not available; give its "
        "file with --tokenizer to see images"
    )


def check_tokenizer(made_by: HasTokenizerId | None, name_or_path: str | Path) -> None:
    """Check that a tokenizer exists and is the one that made the codes, without loading it. Raises UserError."""
    found = identify(name_or_path)
    if mismatch := tokenizer_mismatch(found, made_by):
        raise UserError(
            f"tokenizer {name_or_path}: SHA-256 {found.sha256[:12]}.., the codes were made by {mismatch.expected}; "
            "give that one"
        )


def identify(name_or_path: str | Path) -> TokenizerId:
    """Return name and SHA-256 of a tokenizer's file, or of the file that a saved copy was made from. UserError."""
    path = _file_of(name_or_path)
    if origin := _facts(path).get("origin"):
        return origin
    shipped = str(name_or_path) in SHIPPED
    return TokenizerId(str(name_or_path) if shipped else Path(name_or_path).name, sha256(path))


def _file_of(name_or_path: str | Path) -> Path:
    """Return the file of a tokenizer. Raises UserError if there is none."""
    path = SHIPPED.get(str(name_or_path), Path(name_or_path))
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        name = str(name_or_path)
        hint = did_you_mean(similar_names(name, SHIPPED))
        raise UserError(f"tokenizer {name!r}: no such file{hint}; expected a checkpoint or one of {', '.join(SHIPPED)}")
    return path


def save_tokenizer(model: VQModel, path: str | Path, training: dict) -> None:
    """Save the weights in float16, atomically, with config and facts about the `training` as JSON in the metadata."""
    import safetensors.torch

    metadata = {METADATA_KEY: json.dumps({"config": asdict(model.config), "training": training})}
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _facts(path: Path) -> dict[str, Any]:
    """Return `config` and `origin` from the metadata of a file of ours; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with opened_safetensors(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        values = parse_json(text)
        origin = TokenizerId(**values["origin"]) if "origin" in values else None
        return {"config": VQConfig(**values["config"]), "origin": origin}
    except (ValueError, TypeError, KeyError) as error:
        expected = ", ".join(field.name for field in fields(VQConfig))
        raise UserError(
            f"{path}: metadata {METADATA_KEY} is {text[:200]!r}, expected JSON whose 'config' has {expected}"
        ) from error


def _infer_config(path: Path, tensors: dict[str, Tensor]) -> VQConfig:
    """Return the shape of a published checkpoint. Tensors do not show `norm_groups`, which is 32 in all of them."""

    def count(pattern: str) -> int:
        return next((i for i in range(99) if pattern.format(i) not in tensors), 99)

    try:
        channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = count("encoder.conv_blocks.{}.res.0.conv1.weight")
        widths = [tensors[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        codebook_size, codebook_dim = tensors["quantize.embedding.weight"].shape
        return VQConfig(
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=count("encoder.conv_blocks.0.res.{}.conv1.weight"),
            z_channels=tensors["quant_conv.weight"].shape[1],
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
        )
    except (KeyError, ValueError, IndexError, ArithmeticError) as error:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path}: no VQ tokenizer ({error} is missing or has a wrong shape; found {some}, ..); "
            "expected vq_ds16_c2i.pt, vq_ds8_c2i.pt or a file made by data_prep/train_tokenizer.py"
        ) from error
