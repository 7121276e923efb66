"""A tiny model and its tokenizer for tests of sampling, as a run folder that no training has made."""

from itertools import accumulate
from pathlib import Path

import torch

from image_sets import TINY, save_tiny_tokenizer
from npp_ds.checkpoint.folders import CheckpointRecord, folder_of, write_record
from npp_ds.checkpoint.rank_files import MASTER, Fragment, file_of, write_state
from npp_ds.config.schema import RunConfig
from npp_ds.data.manifest import Manifest
from npp_ds.model import ModelConfig, Transformer

MODEL = {
    "dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": TINY.codebook_size, "grid_size": 4, "num_classes": 3,
    "ffn_multiple_of": 16,
}  # fmt: skip


def tiny_model(seed: int = 0) -> Transformer:
    """A model whose draws differ from image to image."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**MODEL)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def tiny_run(folder: Path, seed: int = 0, step: int = 120, stage: int = 1, train: Path | None = None) -> Path:
    """Writes a run of stages of sides 2 and 1 with one checkpoint, saved in `stage`, and the tokenizer `vq.safetensors`
    beside its config: codes of 4 x 4 make images of 16 x 16. `train` has the manifest of its shards, and the config
    then names no tokenizer. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tiny_tokenizer(folder / "vq.safetensors")
    data = {"train": str(train or folder / "none"), "tokenizer": None if train else str(tokenizer)}
    schedule = {"patch_sides": [2, 1], "epochs": 4}
    config = RunConfig(name="tiny", run_dir=str(folder), model=MODEL, data=data, schedule=schedule)
    (folder / "config.yaml").write_text(config.to_yaml())
    tensors = tiny_model(seed).state_dict()
    starts = [0, *accumulate(tensor.numel() for tensor in tensors.values())]
    fragments = [
        Fragment(name, 0, tensor.numel(), 0, start)
        for (name, tensor), start in zip(tensors.items(), starts, strict=False)
    ]
    checkpoint = folder_of(folder / "checkpoints", step)
    checkpoint.mkdir(parents=True)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    facts = write_state(checkpoint / file_of(0, 1), fragments, {MASTER: [flat]})
    fingerprint = Manifest.load(train).fingerprint() if train else ""
    record = CheckpointRecord(
        step=step, stage=stage, world_size=1, zero_stage=1, precision="fp32", config_hash="", optimizer_steps=step,
        data_fingerprint=fingerprint, kinds=[MASTER], files={file_of(0, 1): facts},
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
    )  # fmt: skip
    write_record(checkpoint, record)
    return folder
