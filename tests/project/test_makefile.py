"""`make quickstart` runs the README's commands on a CPU, and with DEVICE=gpu on as many GPUs as its batch allows."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from npp_ds.cli import app
from npp_ds.config.load import load_config
from npp_ds.sampling.image_model import parse_classes, split_classes

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


def test_every_command_that_the_report_proposes_is_one_that_works(make):
    report = make("--dry-run")[0].stdout.splitlines()[-1]
    words = shlex.split(report)
    steps = [words[at + 1] for at, word in enumerate(words) if word == "--next-step"]
    assert len(steps) == 3 and "next-step" not in "".join(steps)
    names = (ROOT / "data_prep/fashion_mnist/classes.txt").read_text().splitlines()
    commands = get_command(app).commands
    for step in steps:
        program, *words = step.split()
        if program.endswith("/npp"):
            options = commands[words[0]].make_context(words[0], words[1:]).params
            assert options["source"] == Path("runs/quickstart")
            assert parse_classes(split_classes(options["classes"], names), len(names), names)
        elif program.endswith("/torchrun"):
            at = words.index("train")
            processes = int(words[words.index("--nproc-per-node") + 1])
            options = commands["train"].make_context("train", words[at + 1 :]).params
            load_config(options["recipe"], overrides=options["overrides"], world_size=processes)
        else:
            assert f"\n## {step.split(chr(39))[1]}\n" in (ROOT / "README.md").read_text()


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
