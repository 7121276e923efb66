"""The command line starts fast, reports all problems of a config together, and exits with documented codes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from forks import run_forked
from npp_ds.training.metrics import events_named, read_events
from runs import metrics_of, shards_in, tiny_config
from workers import free_port

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}


def npp(*arguments: str, launcher: tuple[str, ...] = (), gpu: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *(launcher or ("npp_ds",)), *arguments]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "CUDA_VISIBLE_DEVICES"} if gpu else ENVIRONMENT
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['npp', '--help']\n"
        "from npp_ds.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'webdataset', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_wrong_input_is_one_clear_text_and_exit_code_2():
    done = npp("train", "--recipe", "quickstart", "schedule.epocs=3", "seed=x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 problems in the config (recipe quickstart):")
    assert "schedule.epocs: unknown key, did you mean schedule.epochs?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.processes
def test_missing_shards_are_named(tmp_path):
    command = ("train", "--recipe", "quickstart", f"data.train={tmp_path}/nowhere", f"run_dir={tmp_path}/run")
    done = run_forked("npp_ds.cli", *command)
    assert done.returncode == 2
    assert f"{tmp_path}/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "alone"])
def test_every_launcher_trains_to_the_end_and_a_second_start_does_nothing(tmp_path, launcher):
    """The second start is that of the process alone; `test_a_finished_run_started_again_changes_nothing` has two."""
    config = tiny_config(shards_in(tmp_path), tmp_path / "run", schedule={"patch_sides": [2, 1], "epochs": 2})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launchers = {
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "npp_ds"),
        "deepspeed": (
            "deepspeed.launcher.runner",
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "--module",
            "npp_ds",
        ),
        "alone": (),
    }
    done = npp("train", "--config", str(file), launcher=launchers[launcher])
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("1 process," if launcher == "alone" else "2 processes,") in done.stdout
    metrics = metrics_of(tmp_path / "run")
    assert metrics[-1] == {"event": "end", "step": 20}
    if launcher != "alone":
        return
    again = run_forked("npp_ds.cli", "train", "--config", file)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already trained to its last step" in again.stdout
    assert metrics_of(tmp_path / "run") == metrics


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.parametrize(
    "zero_stage, precision",
    [
        (1, "autocast_bf16"),
        (2, "autocast_bf16"),
        (3, "autocast_bf16"),
        (2, "bf16"),
        (3, "bf16"),
        (1, "fp32"),
        (3, "fp32"),
    ],
)
def test_one_gpu_trains_to_the_end_and_resumes(tmp_path, zero_stage, precision):
    keys = {"precision": precision, "deepspeed": {"config": f"zero{zero_stage}"}}
    config = tiny_config(shards_in(tmp_path), tmp_path / "run", **keys)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = npp("train", "--config", str(file), gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before = metrics_of(tmp_path / "run")
    assert before[-1] == {"event": "end", "step": 40}
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000040")
    again = npp("train", "--config", str(file), gpu=True)
    assert "resuming after step 20" in again.stdout, again.stdout + again.stderr
    after = metrics_of(tmp_path / "run")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    losses = [[line["loss"] for line in lines if line["event"] == "train"] for lines in (before, after)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.processes
def test_a_run_with_cuda_graphs_has_the_losses_of_one_without_while_its_loader_pins_memory(tmp_path):
    losses = []
    for graphs in (False, True):
        run_dir, file = tmp_path / f"graphs-{graphs}", tmp_path / f"graphs-{graphs}.yaml"
        keys = {"precision": "autocast_bf16", "deepspeed": {"config": "zero2"}, "performance": {"cuda_graphs": graphs}}
        schedule = {"patch_sides": [4, 2, 1], "epochs": 4, "batch_size": 16, "micro_batch_size": 4}
        config = tiny_config(shards_in(tmp_path), run_dir, **keys, schedule=schedule)
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        done = npp("train", "--config", str(file), gpu=True)
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append([line["loss"] for line in metrics_of(run_dir) if line["event"] == "train"])
    assert len(losses[0]) == 40 and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_one_gpu_logs_its_speed_and_traces_its_kernels(tmp_path, zero_stage):
    keys = {"profile": {"steps": "3-4"}, "deepspeed": {"config": f"zero{zero_stage}"}}
    config = tiny_config(shards_in(tmp_path), tmp_path / "run", precision="autocast_bf16", **keys)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = npp("train", "--config", str(file), gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    trace = json.loads((tmp_path / "run/profile/steps-3-4-rank-0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in trace)
    assert {"step 3", "step 4", "data", "forward", "backward", "optimizer"} <= {event.get("name") for event in trace}
    for line in events_named(read_events(tmp_path / "run/metrics.jsonl"), "train"):
        assert 0 < line["peak_memory_gb"] < 4, "what tensors hold, not the process"
        assert line["mfu"] is None or 0 < line["mfu"] < 1
