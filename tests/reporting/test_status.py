"""`npp status` on run folders made of files: figures, states, damage, and the terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from npp_ds.checkpoint import folders
from npp_ds.checkpoint.folders import CheckpointRecord
from npp_ds.cli import app
from npp_ds.config.load import load_config
from npp_ds.errors import UserError
from npp_ds.reporting.status import read_status
from npp_ds.training.lease import this_process
from npp_ds.training.metrics import read_events

CONFIG = load_config("quickstart", None, ["data.train=/nowhere/train", "data.val=null", "data.cache_dir=/nowhere"])
STAGES = CONFIG.build_schedule(9000).stages
RATES = {4: 1250.0, 2: 620.0, 1: 210.0}
OWNER = replace(this_process("token", 5.0, "far", None, None), host="far", machine="another")


def make_run(folder: Path, done: int, *events: dict, images: int | None = 9000, **environment) -> Path:
    """A quickstart of two processes that has logged `done` steps at `RATES`, and then `events`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.to_yaml())
    keys = {"world_size": 2, "training_images": images, "starts": 3, **environment}
    (folder / "environment.json").write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))
    lines, elapsed = [], 0.0
    for stage in STAGES:
        if stage.start_step <= done - (stage.index > 0):
            shape = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
            lines.append({"event": "stage", "step": stage.start_step, "stage": stage.index, **shape})
        for step in range(stage.start_step + 10, min(stage.end_step, done) + 1, 10):
            elapsed += 10 * 64 / RATES[stage.patch_side]
            where = {"event": "train", "step": step, "stage": stage.index, "patch_side": stage.patch_side, "epoch": 1}
            rates = {"images_per_second": RATES[stage.patch_side], "mfu": 0.4321, "data_wait_share": 0.01}
            lines.append(
                {**where, "loss": 6.5 - step / 500, "learning_rate": 1e-3, "elapsed_seconds": elapsed, **rates}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *events]))
    return folder


def write_checkpoint(run: Path, step: int) -> Path:
    folder = folders.folder_of(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(b"weights")
    files = {"part": {"bytes": 7, "sha256": ""}}
    record = CheckpointRecord(step, 0, 2, 2, "fp32", "", "", step, [], {}, files=files)
    folders.write_record(folder, record)
    return folder


def shown(*arguments: str, code: int = 0, columns: int = 80) -> str:
    result = CliRunner().invoke(app, ["status", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result.output


EVENTS = (
    {"event": "validation", "step": 250, "patch_side": 2, "nll": 5.25},
    {"event": "validation", "step": 250, "patch_side": 1, "nll": 6.125},
    {"event": "evaluation", "step": 200, "stage": 1, "patch_side": 2, "frechet_distance": 12.5},
    {"event": "spike", "step": 40, "stage": 0},
    {"event": "spike", "step": 60, "stage": 0},
    {"event": "save_failed", "step": 200, "problem": "full"},
)


def test_figures_come_from_the_files_alone(tmp_path):
    run = make_run(tmp_path / "run", 350, *EVENTS)
    write_checkpoint(run, 140)
    (write_checkpoint(run, 200) / "part").unlink()
    (found,) = json.loads(shown(run, "--json"))
    assert (found["state"], found["stage"], found["stages"], found["patch_side"]) == ("stopped", 2, 3, 2)
    assert (found["step"], found["stage_end_step"], found["total_steps"]) == (350, 560, 1120)
    assert (found["loss"], found["validation_nll"], found["validation_step"]) == (5.8, 6.125, 250)
    assert (found["frechet_distance"], found["checkpoint_step"], found["restarts"]) == (12.5, 140, 2)
    assert (found["images_per_second"], found["mfu"]) == (620, 0.4321)
    flops = [CONFIG.model.training_flops(positions) * 64 for positions in (4, 16, 64)]
    assert found["flops"] == 140 * flops[0] + 210 * flops[1] and found["next_token_flops"] == 350 * flops[2]
    assert found["saved_share"] == pytest.approx(1 - found["flops"] / found["next_token_flops"])
    whole = (140 * flops[0] + 420 * flops[1] + 560 * flops[2]) / (1120 * flops[2])
    assert found["planned_cost"] == pytest.approx(whole)
    assert found["stage_eta_seconds"] == pytest.approx(210 * 64 / 620) and not found["eta_at_most"]
    assert found["eta_seconds"] == pytest.approx(210 * 64 / 620 + 560 * 64 / 210, rel=0.05)
    assert found["warnings"] == [
        "the loss spiked 2 times, last after step 60", "a checkpoint could not be written once, after step 200",
    ]  # fmt: skip


def test_a_stage_that_has_begun_is_the_current_one_before_its_first_line(tmp_path):
    status = read_status(make_run(tmp_path / "run", 561))
    assert (status.stage, status.patch_side, status.step) == (3, 1, 560)
    assert status.stage_eta_seconds == status.eta_seconds == pytest.approx(560 * 64 / 210, rel=0.05)


@pytest.mark.parametrize("columns", [40, 80, 170])
def test_runs_are_readable_at_any_width_and_side_by_side_where_there_is_space(tmp_path, monkeypatch, columns):
    names = [make_run(tmp_path / name, 350, *EVENTS).relative_to(tmp_path) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    text = shown(*names, columns=columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns and "…" not in text
    assert sum(line.count("stage  ") for line in lines) == 2
    assert (max(line.count("images/s") for line in lines) == 2) is (columns == 170)
    if columns > 40:
        for part in (
            "2 of 3, patch side 2", "350 of 1,120 (31%)", "5.8000 nats per code", "6.1250 at side 1, after step 250",
            "620 images/s, MFU 43.2%", "Frechet distance 12.5", "of next-token training", "21.7 s (stage), ",
            "2 restarts", "the loss spiked 2 times",
        ):  # fmt: skip
            assert part in text, part


def test_states(tmp_path):
    end = {"event": "end", "step": 1120, "elapsed_seconds": 1.0}
    cases = {  # state: (steps, events, lease, age of the lease, age of the metrics, age of stalled.txt)
        "running": (350, (), OWNER, 0, 20, 500),
        "starting": (0, (), OWNER, 0, 0, None),
        "finished": (1120, (end,), replace(OWNER, released=True), 0, 0, None),
        "stopped": (350, (), replace(OWNER, released=True), 0, 0, None),
        "stopped too": (350, (), OWNER, 100, 120, None),
        "stopped, though slow": (350, (), replace(OWNER, heartbeat_seconds=1e6), 150, 160, None),
        "stopped, killed": (350, (), replace(this_process("t", 5.0, None, None, None), pid=2**22 + 1), 0, 1, None),
        "stopped, no lease": (0, (), None, 0, 0, None),
        "stalled": (350, (), OWNER, 0, 950, None),
        "stalled, ended": (350, (), OWNER, 900, 950, 940),
    }
    for name, (steps, events, owner, lease_age, metrics_age, stacks_age) in cases.items():
        run = make_run(tmp_path / name, steps, *events)
        ages = {"metrics.jsonl": metrics_age, "lease.json": lease_age if owner else None, "stalled.txt": stacks_age}
        if owner:
            (run / "lease.json").write_text(owner.to_json())
        for file, age in ages.items():
            if age is not None:
                (run / file).touch()
                os.utime(run / file, (time.time() - age,) * 2)
        status = read_status(run)
        assert status.state == name.split(" ")[0].strip(","), name
        assert (status.owner is not None) is (name in ("running", "starting", "stalled"))


@pytest.mark.parametrize("done, stages", [(0, None), (350, 3)])
def test_what_earlier_versions_did_not_record_is_left_out(tmp_path, done, stages):
    run = make_run(tmp_path / "run", done, images=None, starts=None, world_size=None)
    if not done:
        (run / "metrics.jsonl").write_text("")
    status = read_status(run)
    assert (status.stages, status.total_steps) == (stages, stages and 1120)
    assert status.restarts is None and status.process_seconds is None
    assert "restart" not in shown(run)
    (run / "environment.json").write_text("[")
    assert read_status(run) == status


def test_a_broken_or_empty_folder_is_one_line_among_others(tmp_path):
    good = make_run(tmp_path / "good", 350)
    broken = {name: make_run(tmp_path / name, 350) for name in ("config", "stage", "binary", "text")}
    (broken["config"] / "config.yaml").write_text("model: {size: Q}\nnonsense: 1\n")
    (broken["stage"] / "metrics.jsonl").write_text('{"event": "stage", "step": 0, "stage": 0}\n')
    (broken["binary"] / "config.yaml").write_bytes(os.urandom(200))
    (broken["text"] / "metrics.jsonl").write_text(
        '{"event": "train", "step": 10, "stage": 0, "images_per_second": "x"}\n'
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = [good, *broken.values(), *(tmp_path / name for name in ("empty", "file", "none"))]
    lines = shown(*names, code=2).splitlines()
    for name in names[1:]:
        assert len([line for line in lines if str(name) in line]) == 1, name
        with pytest.raises(UserError):
            read_status(name)
    found = json.loads(shown(*names, "--json", code=2))
    assert [("problem" in run) for run in found] == [False] + [True] * 7
    assert len(lines) == len(shown(good).splitlines()) + 7


def test_damaged_lines_and_records_do_not_hide_the_rest(tmp_path):
    run = make_run(tmp_path / "run", 350)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\x00\xff\n{"event": "train"}\n{"event": "spike", "step": 20}\n{"event": "tra')
    (run / "lease.json").write_text("{")
    write_checkpoint(run, 140).joinpath(folders.RECORD).write_text("{}")
    status = read_status(run)
    assert (status.step, status.state, status.checkpoint_step) == (350, "stopped", None)
    assert len(read_events(run / "metrics.jsonl", warn=False)) == 35 + 2 + 1


@pytest.mark.parametrize("terminal", [True, False])
def test_watch_ends_cleanly_with_ctrl_c_and_needs_no_torch(tmp_path, terminal):
    run = make_run(tmp_path / "run", 350)
    code = (
        "import sys; from npp_ds.reporting import status; from npp_ds.cli import main; status.WATCH_SECONDS = 0.2\n"
        "sys.argv = ['npp', 'status', sys.argv[1], '--watch']\ntry:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    master, slave = pty.openpty()
    out = slave if terminal else subprocess.PIPE
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen([sys.executable, "-c", code, run], stdout=out, stderr=subprocess.STDOUT, env=environment)
    reader = master if terminal else process.stdout.fileno()
    text = b""
    try:
        while text.count(b"350 of 1,120") < 2:
            text += os.read(reader, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        text += os.read(reader, 1 << 16) if terminal else process.stdout.read()
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
    assert b"Traceback" not in text and b"Abort" not in text
    if terminal:
        assert b"350 of 1,120" in text.split(b"\x1b[?1049l")[-1], "the last state stays on the screen"
