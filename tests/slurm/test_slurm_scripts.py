"""The SLURM scripts and their page agree with the recipes, with each other and with the arithmetic. A job's shell copes
with a slow SLURM and with lost notes; `srun` and `scontrol` are stand-ins, so no SLURM is needed.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from npp_ds.config.load import load_config

ROOT = Path(__file__).parents[2]
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


STAND_INS = {
    # Runs one task and ignores the options.
    "srun": """while [[ $1 == -* ]]; do shift; done
SLURM_PROCID=0 exec "$@\"""",
    # Knows two nodes. Fails as often as the file says and writes down the requests that it answers.
    "scontrol": """[[ $2 != hostnames ]] || exec echo "$HOSTNAMES"
read -r away <"$HERE/away"
if ((away > 0)); then
  echo $((away - 1)) >"$HERE/away"
  echo "Unable to contact slurm controller" >&2
  exit 1
fi
echo "$*" >>"$HERE/asked"
[[ $* != *"show node"* ]] || exec echo "NodeName=$4 Arch=x $NODE NodeHostName=$4"
[[ $* != *show* ]] || echo "JobId=7 JobState=RUNNING Reason=None\"""",
    "sleep": "exit 0",
}
JobShell = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def job_shell(tmp_path) -> JobShell:
    """Runs a script's shell as job 7, with a program of these lines for Python; the doctor finds nothing."""

    def run(python: str, restart: int = 0, away: int = 0, **variables: str) -> subprocess.CompletedProcess:
        for name, text in {**STAND_INS, "python": f"[[ $* != *doctor* ]] || exit 0\n{python}"}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "away").write_text(f"{away}\n")
        (tmp_path / "asked").write_text("")
        job = {"JOB_ID": 7, "JOB_NAME": "train", "JOB_NUM_NODES": 1, "JOB_NODELIST": "n1", "NTASKS": 1}
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "NPP_HOME": str(ROOT),
            "DATA_DIR": "/data", "RUNS_DIR": str(tmp_path / "runs"), "NPP_PYTHON": str(tmp_path / "python"),
            "SLURM_RESTART_COUNT": str(restart), **{f"SLURM_{name}": str(value) for name, value in job.items()},
            **variables,
        }  # fmt: skip
        command = ["bash", ROOT / "slurm/train_b.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def asked(tmp_path: Path) -> list[str]:
    """What `scontrol` was asked for in the last run."""
    return (tmp_path / "asked").read_text().splitlines()


@pytest.mark.parametrize("away", [1, 2])
def test_a_controller_that_is_away_for_a_while_loses_no_job(job_shell, tmp_path, away):
    done = job_shell("exit 1", away=away)
    assert done.returncode == 1 and asked(tmp_path) == ["-o show job 7", "requeue 7"]
    assert done.stdout.rstrip().endswith("ended with 1: requeued") and done.stderr == ""


def test_a_job_whose_controller_stays_away_says_so_in_the_end(job_shell, tmp_path):
    done = job_shell("exit 1", away=1000, NPP_SLURM_PATIENCE="0")
    assert done.returncode == 1 and asked(tmp_path) == []
    assert "could not requeue the job: submit it again to resume" in done.stdout
    assert "Unable to contact slurm controller" in done.stderr


@pytest.mark.parametrize(
    "end, requeued, then",
    [
        ("exit 1", 2, "started 3 times without progress: not requeued"),
        ("kill -USR1 $(ps -o ppid= -p $PPID); exit 138", 4, "ended with 138: requeued"),
        ("exit 75", 19, "started 20 times without progress: not requeued"),
    ],
)
def test_starts_that_were_asked_to_stop_are_no_failures_yet_end_some_time(job_shell, end, requeued, then):
    ends = [job_shell(end, restart).stdout.splitlines()[-1] for restart in range(requeued + 1)]
    assert all(text.endswith(": requeued") for text in ends[:requeued]), ends
    assert ends[requeued].endswith(then)


def test_starts_count_anew_after_a_checkpoint(job_shell, tmp_path):
    for restart in range(5):
        if restart == 2:
            (tmp_path / "runs/b_256/checkpoints/step-00000010").mkdir(parents=True)
        end = job_shell("exit 1", restart).stdout.splitlines()[-1]
        assert end.endswith("not requeued" if restart == 4 else ": requeued")


def test_a_task_that_was_asked_to_stop_is_done_only_with_a_note_of_it(tmp_path):
    command = ["bash", ROOT / "slurm/task.sh"]
    environment = {**os.environ, "SLURM_PROCID": "3"}
    assert subprocess.run([*command, tmp_path, "bash", "-c", "exit 75"], env=environment).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["3.75"]
    lost = subprocess.run([*command, tmp_path / "lost", "bash", "-c", "exit 75"], env=environment, capture_output=True)
    assert lost.returncode == 75


def test_a_job_whose_notes_are_lost_is_not_done(job_shell, tmp_path):
    done = job_shell('rm -r "$RUNS_DIR/.slurm/7/codes"; exit 75')
    assert done.returncode == 75 and asked(tmp_path)[-1] == "requeue 7"


def test_notes_of_jobs_that_were_cancelled_long_ago_are_swept_up(job_shell, tmp_path):
    for job, days in (("5", 91), ("6", 89)):
        (tmp_path / "runs/.slurm" / job / "codes").mkdir(parents=True)
        os.utime(tmp_path / "runs/.slurm" / job, (time.time() - days * 86400,) * 2)
    assert job_shell("exit 1").returncode == 1
    assert sorted(path.name for path in (tmp_path / "runs/.slurm").iterdir()) == ["6", "7"]


def test_a_task_of_an_array_comes_back_alone(job_shell, tmp_path):
    job_shell("exit 75", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert asked(tmp_path) == ["-o show job 7_2", "requeue 7_2"]


def test_variables_of_another_launch_in_the_shell_are_dropped(job_shell):
    left = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "9")
    done = job_shell("env | grep -E '^(RANK|WORLD|LOCAL|MASTER|SLURM_EXPORT)'", **left, SLURM_EXPORT_ENV="NONE")
    assert [line for line in done.stdout.splitlines() if not line.startswith("==")] == ["SLURM_EXPORT_ENV=ALL"]


@pytest.mark.parametrize(
    "hostnames, node, address",
    [
        ("localhost\nn09", "", "localhost"),
        ("no-such-node.invalid\nn09", "NodeAddr=10.0.0.8", "10.0.0.8"),
        ("no-such-node.invalid\nn09", "", None),
    ],
)
def test_the_tasks_of_several_nodes_meet_at_the_first_one(job_shell, hostnames, node, address):
    several = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[08-09]", "HOSTNAMES": hostnames, "NODE": node}
    done = job_shell("echo meet at $MASTER_ADDR; exit 2", away=1, **several)
    assert done.returncode == 2
    if address:
        assert f"meet at {address}" in done.stdout.splitlines()
    else:
        assert (
            "node no-such-node.invalid: its name does not resolve" in done.stderr and "set MASTER_ADDR" in done.stderr
        )
