"""An export of a checkpoint takes at most 1.5 times the memory of its weights, for any number of saving processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from npp_ds.checkpoint.folders import CheckpointRecord, folder_of, write_record
from npp_ds.checkpoint.open import open_weights
from npp_ds.checkpoint.rank_files import Fragment, file_of, write_state
from npp_ds.model import ModelConfig, Transformer
from runs import tiny_config

MODEL = {"dim": 640, "n_layers": 6, "n_heads": 10, "vocab_size": 16384, "grid_size": 4, "num_classes": 10}
STATES = ("master", "ema")
PROGRAM = """
import re, sys
from pathlib import Path
import torch
from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.open import open_weights

def peak():  # of this program; getrusage would count what it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

source, out, layout = sys.argv[1:]
baseline = peak()
export_weights(open_weights(source, variant="ema"), out, layout=layout)
print(peak() - baseline)
"""


def _write_checkpoint(run_dir: Path, world_size: int) -> int:
    """A run's checkpoint of random numbers, every parameter cut into `world_size` stretches; bytes of its weights."""
    config = tiny_config(run_dir, run_dir, model=MODEL)
    with torch.device("meta"):
        model = Transformer(ModelConfig(**config.model.arguments()))
    shapes = {name: list(parameter.shape) for name, parameter in model.state_dict().items()}
    folder = folder_of(run_dir / "checkpoints", 5)
    folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.to_yaml())
    files = {}
    for rank in range(world_size):
        fragments, offset = [], 0
        for name, parameter in model.state_dict().items():
            length = -(-parameter.numel() // world_size)
            numel = max(0, min(length, parameter.numel() - rank * length))
            fragments.append(Fragment(name, rank * length, numel, 0, offset))
            offset += numel
        states = {state: [torch.full((offset,), float(rank + i))] for i, state in enumerate(STATES)}
        files[file_of(rank, world_size)] = write_state(folder / file_of(rank, world_size), fragments, states)
    record = CheckpointRecord(
        step=5,
        stage=0,
        world_size=world_size,
        zero_stage=3,
        precision="fp32",
        config_hash="",
        data_fingerprint="",
        optimizer_steps=5,
        kinds=list(STATES),
        shapes=shapes,
        files=files,
    )
    write_record(folder, record)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("world_size, layout", [(2, "safetensors"), (4, "published")])
def test_exporting_takes_at_most_one_and_a_half_times_the_weights(tmp_path, world_size, layout):
    size = _write_checkpoint(tmp_path / "run", world_size)
    out = (tmp_path / "out").with_suffix({"safetensors": ".safetensors", "published": ".pt"}[layout])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(out), layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    taken = int(done.stdout)
    print(f"{size / 1e6:.0f} MB of weights, {taken / size:.2f} times them taken")
    assert size > 200e6, "large enough to tell"
    assert 0.01 * size < taken <= 1.5 * size
    found = open_weights(out, n_heads=10, grid_size=4).read()
    rows = found["output.weight"].flatten().tensor_split(world_size)
    assert [part.unique().tolist() for part in rows] == [[rank + 1.0] for rank in range(world_size)]
