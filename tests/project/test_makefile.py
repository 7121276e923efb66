"""`make quickstart` runs the README's commands on a CPU, and with DEVICE=gpu on as many GPUs as its batch allows."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from npp_ds.config.load import load_config

ROOT = Path(__file__).parents[2]
RECORD = '#!/bin/sh\necho "${CUDA_VISIBLE_DEVICES-unset}: $(basename $0) $*" >> "$(dirname $0)/../ran"\n'


@pytest.fixture
def make(tmp_path):
    """Run `make quickstart` with programs that only record what they were asked: (what make said, what ran)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / f".installed-{platform.python_version()}").touch()
    code = f'#!/bin/sh\nif [ "$1" = -c ]; then PYTHONPATH={tmp_path} exec {sys.executable} "$@"; fi\n'
    for name, text in {"python": code + RECORD, "torchrun": RECORD, "npp": RECORD}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments: str, gpus: int = 0) -> tuple[subprocess.CompletedProcess, list[str]]:
        (tmp_path / "torch.py").write_text(f"class cuda: device_count = staticmethod(lambda: {gpus})\n")
        (tmp_path / "ran").unlink(missing_ok=True)
        command = ["make", "--no-print-directory", "quickstart", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "CUDA_VISIBLE_DEVICES")}
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )
        ran = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
        return done, ran

    return run


def processes_of(ran: list[str]) -> list[int]:
    return [int(line.split("--nproc-per-node ")[1].split()[0]) for line in ran if "--nproc-per-node" in line]


def test_the_quickstart_leaves_gpus_alone(make):
    done, ran = make(gpus=8)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(": ") for line in ran), "CUDA_VISIBLE_DEVICES is empty"
    assert [line.split()[1] for line in ran] == ["python", "python", "torchrun", "npp", "npp", "npp"]
    assert processes_of(ran) == [2, 2], "that which trains, and that which the report proposes"


@pytest.mark.parametrize("gpus, processes", [(1, 1), (3, 2), (8, 8)])
def test_on_gpus_it_takes_as_many_as_divide_the_batch(make, gpus, processes):
    done, ran = make("DEVICE=gpu", gpus=gpus)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("unset: ") for line in ran)
    assert processes_of(ran) == [processes] * 2
    load_config("quickstart", world_size=processes)  # raises when the batch cannot be split
    cpu = [line.removeprefix(": ") for line in make()[1]]
    as_on_a_cpu = [line.removeprefix("unset: ").replace(f"node {processes}", "node 2") for line in ran]
    assert as_on_a_cpu == cpu, "all else is the same"


@pytest.mark.parametrize(
    "device, error",
    [
        ("gpu", "DEVICE=gpu: PyTorch finds no CUDA device on this machine; leave DEVICE out to use the CPU"),
        ("tpu", "DEVICE=tpu: expected cpu or gpu"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_error(make, device, error):
    done, ran = make(f"DEVICE={device}")
    assert done.returncode == 2 and not ran
    assert error in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2
