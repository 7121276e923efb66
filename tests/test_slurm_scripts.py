"""The SLURM scripts and their page agree with the recipes, with each other and with the arithmetic; no SLURM needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from npp_ds.config_checks import load_config

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if path.name not in ("common.sh", "task.sh")]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
IMAGES = 1_281_167


def options(script: Path) -> dict[str, str]:
    """The #SBATCH lines."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if linter := shutil.which("shellcheck"):
        done = subprocess.run([linter, "-x", "-e", "SC2317", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_size_has_a_job_that_trains_it():
    trained = {path.name: re.search(r'^train (\w+) "\$@"$', path.read_text(), re.MULTILINE)[1] for path in JOBS[2:]}
    assert trained == {f"train_{size}.sh": f"{size}_256" for size in ("b", "l", "xl", "1b", "xxl", "2b")}


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_a_job_asks_for_a_task_per_gpu_and_comes_back(script):
    asked = options(script)
    assert asked["job-name"] == script.stem
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["open-mode"] == "append" and "requeue" in asked and "%j" in asked["output"]
    assert asked["signal"] == ("B:USR1@300" if script.name.startswith("train_") else "B:TERM@60")
    if script.name.startswith("train_"):
        size = script.stem.removeprefix("train_")
        tasks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
        config = load_config(f"{size}_256", world_size=tasks)
        parameters = re.search(r"\(([\d.]+[MB]) parameters\)", script.read_text())[1]
        assert parameters == _short(config.model.parameters())
        assert f"| `{script.name}` | {parameters} | {asked['nodes']} |" in PAGE


def _short(parameters: int) -> str:
    return f"{parameters / 1e6:.0f}M" if parameters < 1e9 else f"{parameters / 1e9:.1f}B"


def estimates(size: str) -> str:
    """The row of the page's table, by the formulas that stand above it."""
    config = load_config(f"{size}_256")
    parameters, shape = config.model.parameters(), config.model.shape()
    stages = config.build_schedule(IMAGES).stages
    flops = sum(s.steps * s.batch_size * config.model.training_flops((16 // s.patch_side) ** 2) for s in stages)
    hours = [f"{flops / (gpus * 989e12 * 0.35) / 3600:.1f}" for gpus in (8, 16, 32, 128)]
    memory = [f"{(8 * parameters + 16 * parameters / gpus) / 1e9:.1f}" for gpus in (8, 16, 32)]
    activations = f"{34 * shape['n_layers'] * 256 * shape['dim'] / 1e9:.2f}"
    return " | ".join([size.upper(), f"{flops:.1e}", *hours, *memory, activations, f"{12 * parameters / 1e9:.1f}"])


@pytest.mark.parametrize("size", ["b", "l", "xl", "1b", "xxl", "2b"])
def test_the_estimates_on_the_page_follow_from_its_formulas(size):
    assert f"| {estimates(size)} |" in PAGE
