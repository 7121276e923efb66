"""The README's commands work as they stand there."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from forks import ON_CPU, run_forked
from image_sets import few_images
from npp_ds.cli import app
from npp_ds.config.load import load_config, recipe_names

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = [
    "schedule.batch_size=16", "model.dim=32", "model.n_layers=1", "model.n_heads=2",
    "logging.every=1",
]  # fmt: skip


def commands(section: str) -> list[str]:
    """The lines of the bash blocks under a heading."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path) -> str:
    program, *words = shlex.split(command)
    if program in ("python", "npp"):
        line = words if program == "python" else ["npp_ds.cli", *words]
        done = run_forked(*line, folder=folder, timeout=180)
    else:
        environment = {**os.environ, **ON_CPU, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            [program, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.processes
def test_the_pipeline_goes_from_images_to_a_report(tmp_path):
    for split, count in (("train", 96), ("val", 32)):
        few_images(tmp_path / "data_prep/fashion_mnist", split, count)
    (tmp_path / "data_prep/fashion_mnist/classes.txt").symlink_to(ROOT / "data_prep/fashion_mnist/classes.txt")
    (tmp_path / "data_prep/tokenize_imagenet.py").symlink_to(ROOT / "data_prep/tokenize_imagenet.py")
    pipeline = commands("The pipeline")
    assert pipeline[0] == "source .venv/bin/activate"
    for command in pipeline[1:]:
        if "npp_ds train" in command:
            command = " ".join([command, f"data.cache_dir={tmp_path}/cache", *TINY])
        out = run(command, tmp_path)
    assert "runs/quickstart" in out
    for made in ("report.html", "training.png", "config.yaml", "metrics.jsonl", "checkpoints/latest"):
        assert (tmp_path / "runs/quickstart" / made).is_file(), made
    assert list(tmp_path.glob("runs/quickstart/samples/*/grid.png"))
    assert (tmp_path / "runs/longer/config.yaml").is_file()


def test_the_imagenet_commands_name_options_scripts_and_recipes_that_exist():
    parse = runpy.run_path(str(ROOT / "data_prep/tokenize_imagenet.py"))["parse"]
    seen = []
    for command in commands("On to ImageNet"):
        words = shlex.split(command, comments=True)
        seen.append(words[0])
        if words[0] == "python":
            parse(words[2:])
        elif words[0] in ("cp", "sbatch"):
            assert (ROOT / words[1]).is_file()
        elif words[0] == "npp":
            get_command(app).commands[words[1]].make_context(words[1], words[2:])
        else:
            at = words.index("train")
            config = load_config(words[at + 2], overrides=words[at + 3 :], world_size=8)
            assert config.data.train in README
    assert set(seen) == {"python", "torchrun", "npp", "sbatch", "cp"}


def test_the_measured_ratios_beside_the_published_code_are_those_of_the_results():
    rows = dict(re.findall(r"^\| ([^|]+) \| baseline \| ([^|]+) \|$", README, re.MULTILINE))

    def result(name: str, pattern: str) -> float:
        return float(re.search(pattern, (ROOT / f"benchmarks/results/{name}.md").read_text(), re.MULTILINE)[1])

    step = r"^\| {side} \| \S+ \([^|]+\) \| \S+ \([^|]+\) \| ([0-9.]+) \("
    time = result("patch_loss", r"published_time_w768_k16\) \| [0-9.]+ \| ([0-9.]+)")
    memory = result("patch_loss", r"published_memory_w768_k16\) \| [0-9.]+ \| ([0-9.]+)")
    one, four = (result("training_step", step.format(side=side)) for side in (1, 4))
    drawn = result("sampling", r"published way \| .* \| ([0-9.]+) \|$")
    codes = result("tokenize", r"Ratio in the same turn: \*\*([0-9.]+)")
    assert list(rows.values()) == [
        f"{time:.1f}x faster, {memory:.0f}x less extra memory",
        f"{one:.1f}x and {four:.1f}x faster",
        f"{drawn:.1f}x faster",
        f"{codes:.1f}x faster",
    ]


def test_no_command_asks_a_run_of_a_recipe_for_an_average_that_the_recipe_does_not_keep():
    pages = [README, *(path.read_text() for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("slurm/*.sh")])]
    lines = [line for page in pages for line in page.splitlines() if re.search(r"\b(sample|evaluate)\b.*\bruns/", line)]
    runs = [(line, load_config(name)) for line in lines for name in re.findall(r"\bruns/(\w+_(?:256|384))\b", line)]
    assert len(runs) >= 5
    assert not [line for line, config in runs if "--weights ema" in line and not config.optimizer.ema_decay]


def test_every_recipe_is_named():
    text = README.replace("ntp_*_256", " ".join(n for n in recipe_names() if n.startswith("ntp_")))
    missing = [name for name in recipe_names() if not re.search(rf"\b{name}\b", text)]
    assert missing in ([], ["ntp_256", "paper_256"], ["paper_256"]), missing


def test_every_linked_file_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) >= 4
    assert not [link for link in links if not (ROOT / link).exists()]
