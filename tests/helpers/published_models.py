"""Models with the weights of the published implementation's vectors in `tests/data`."""

import json
from pathlib import Path

import numpy as np
import torch

from npp_ds.model import ModelConfig, Transformer
from reference_weights import fill

DATA = Path(__file__).parents[1] / "data"


def published_model(name: str) -> tuple[Transformer, dict[str, np.ndarray]]:
    """The model of `gpt_small` or `gpt_gqa` in eval mode, and the vectors of that name."""
    with np.load(DATA / f"{name}.npz") as file:
        vectors = {key: file[key] for key in file.files}
    c = json.loads(str(vectors["config"]))
    config = ModelConfig(
        dim=c["dim"],
        n_layers=c["n_layer"],
        n_heads=c["n_head"],
        n_kv_heads=c.get("n_kv_head"),
        vocab_size=c["vocab_size"],
        grid_size=round(c["block_size"] ** 0.5),
        num_classes=c["num_classes"],
        ffn_multiple_of=c["multiple_of"],
    )
    weights = fill(json.loads(str(vectors["names"])), int(vectors["seed"]))
    model = Transformer(config)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return model.eval(), vectors
