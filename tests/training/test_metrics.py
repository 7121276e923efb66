"""What a run tells: lines that survive a kill and are not told twice, a bar on a terminal, plain lines elsewhere."""

import errno
import io
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.reporting.status import read_status
from npp_ds.training.metrics import MetricsLog, StepLog, events_named, read_events, stages_begun
from npp_ds.training.run_log import Progress
from npp_ds.training.throughput import StepCosts
from npp_ds.training.trainer import Trainer
from npp_ds.utils.screen import show_logs
from runs import logs, run, run_and_stop_after, tiny_config

LINE = {
    "event": "train", "step": 30, "stage": 1, "patch_side": 2, "epoch": 3, "loss": 4.25, "learning_rate": 1e-4,
    "images_per_second": 512.4, "mfu": None, "stage_eta_seconds": 15.2, "eta_seconds": 75.4, "eta_at_most": False,
}  # fmt: skip


def test_opening_the_log_at_a_step_forgets_what_came_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write("stage", 0, stage=0)
    for step in range(1, 8):
        log.write("train", step, elapsed_seconds=2.0 * step)
        if step == 4:
            log.write("validation", 4, nll=1.0)
            log.write("stage", 4, stage=1)
    log.write("end", 7)
    log.close()
    with open(path, "a") as file:
        file.write('{"event": "tra')
    log = MetricsLog(path, 4)
    assert log.elapsed_before == 8.0
    log.write("stage", 4, stage=1)
    log.close()
    events = read_events(path)
    assert [e["step"] for e in events_named(events, "train")] == [1, 2, 3, 4]
    assert [e["step"] for e in events_named(events, "validation")] == [4]
    assert [e["stage"] for e in events_named(events, "stage")] == [0, 1]
    assert not events_named(events, "end")


@pytest.mark.parametrize(
    "line", [b"nonsense", b'{"event": "train", "step": 1e400}', b'{"event": "\xff", "step": 2}', b"[" * 5000, b"[1]"]
)
def test_a_broken_line_is_reported_and_left_out_for_good(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "step": 1}\n' + line + b'\n{"event": "train", "step": 2}\n')
    with logs() as said:
        log = MetricsLog(path, 2)
    assert [e["step"] for e in log.kept] == [1, 2]
    (warning,) = said
    assert warning.startswith(f"WARNING: {path}, line 2: not an event as JSON: ") and warning.endswith("; left out")
    with logs() as said:
        assert [e["step"] for e in read_events(path)] == [1, 2]
    assert not said
    with pytest.raises(UserError, match="not found"):
        read_events(tmp_path / "other.jsonl")


def test_every_event_is_on_disk_when_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("train", 1, loss=2.0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"event": "train", "step": 1, "loss": 2.0}


def test_lines_that_found_no_room_are_written_later_and_once(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    write, room = os.write, [70]

    def short_of_room(descriptor, data):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", short_of_room)
    for step in range(1, 6):
        log.write("train", step, loss=1.0)
    assert [e["step"] for e in read_events(tmp_path / "metrics.jsonl")] == [1], "then a half line"
    room[0] = 0
    log.rewind(3)
    log.write("train", 4, loss=2.0)
    room[0] = 10_000
    log.write("train", 5, loss=2.0)
    log.close()
    events = read_events(tmp_path / "metrics.jsonl")
    assert [(e["step"], e["loss"]) for e in events] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [e["step"] for e in MetricsLog(tmp_path / "metrics.jsonl", 9).kept] == [1, 2, 3, 4, 5]


def test_a_log_of_samples_larger_than_memory_is_cut_where_the_run_resumes(tmp_path, monkeypatch):
    path = tmp_path / "sample_log.jsonl"
    monkeypatch.setattr("npp_ds.training.metrics.MOST_BYTES", 100)
    log = StepLog(path, 0)
    for step in range(1, 9):
        log.write("samples", step, ids=list(range(10)))
    log.close()
    with path.open("ab") as file:
        file.write(b'{"event": "samples", "st')
    log = StepLog(path, 8)
    log.rewind(5)
    log.write("samples", 6, ids=[1])
    log.close()
    lines = list(map(json.loads, path.read_text().splitlines()))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["ids"] == [1]


def test_a_step_that_is_computed_again_is_logged_as_not_finite_once(tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path / "metrics.jsonl", 4)
        log.write("nonfinite", 4, stage=0)
        log.close()
    assert len(read_events(tmp_path / "metrics.jsonl")) == 1


class Terminal(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def on_screen(text: str, width: int) -> list[str]:
    """What a terminal of this width shows at the end, empty lines apart; for the few codes that rich writes."""
    rows, row, column = [""], 0, 0
    for code, character in re.findall(r"\x1b\[([\d;?]*[a-zA-Z])|(.)", text, re.DOTALL):
        if code[-1:] == "A":
            row -= int(code[:-1] or 1)
        elif code == "2K":
            rows[row] = ""
        elif character == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif character == "\r":
            column = 0
        elif character:
            if column == width:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + character + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows if line.strip()]


LIVE = {
    200: "stage 2/3 side 2  step 32/100  loss 4.2500  lr 1.00e-04  512 images/s  stage eta 0:00:15  eta 0:01:15",
    80: "stage 2/3 side 2  step 32/100  loss 4.2500  stage eta 0:00:15  eta 0:01:15",
    40: "step 32/100  loss 4.2500  eta 0:01:15",
    24: "loss 4.2500  eta 0:01:15",
    12: "eta 0:01:15",
}


@pytest.mark.parametrize("width", LIVE)
def test_on_a_terminal_what_fits_is_shown_and_the_history_of_losses_stays(monkeypatch, width):
    screen = Terminal(True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(total_steps=100, stages=3)
    show_logs()
    for step in (30, 31, 32):
        progress.show({**LINE, "step": step, "loss": 4.25 + 32 - step})
        if step == 31:
            logging.getLogger("npp_ds.training").info("validation")
    lines = on_screen(screen.getvalue(), width)
    assert lines[-1].endswith(LIVE[width]) and max(map(len, lines)) <= width
    assert [line for line in lines if "eta" in line] == lines[-1:], "one live line"
    assert "validation" in lines
    history = [line for line in lines[:-1] if line != "validation"]
    assert len(history) == 3
    for line, loss in zip(history, ("loss 6.2500", "loss 5.2500", "loss 4.2500"), strict=True):
        assert loss in line
    progress.close()
    assert on_screen(screen.getvalue(), width) == lines[:-1], "nothing is left of the bar"


def test_beside_a_terminal_each_logged_step_is_a_whole_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress(total_steps=100, stages=3)
    progress.show(LINE)
    progress.show({**LINE, "mfu": 0.4321, "stage": 2})
    progress.show({**LINE, "eta_at_most": True})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == LIVE[200].replace("32/", "30/") and "\x1b" not in first
    assert third.endswith("eta <0:01:15")
    assert second.endswith("512 images/s  MFU 43.2%  eta 0:01:15"), "in the last stage both are one"


def _told_to_monitors(processes: Processes, config) -> tuple[list[tuple[str, float, int]], list[str]]:
    """The points that monitors get, and torch's warnings of what will change."""
    told: list[tuple[str, float, int]] = []
    with warnings.catch_warnings(record=True) as caught:
        trainer = Trainer(config, processes)
        trainer.engine.monitor = SimpleNamespace(write_events=told.extend, tb_monitor=None, wandb_monitor=None)
        trainer.run()
    return told, [str(warning.message) for warning in caught if warning.category is FutureWarning]


@pytest.mark.processes
def test_a_training_line_holds_every_documented_figure_and_monitors_get_its_curves(pair, shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", validation={"every": 0}, logging={"every": 7},
        schedule={"patch_sides": [2], "epochs": 1, "warmup_epochs": 0, "end_at_patch_side_one": False},
    )  # fmt: skip
    (told, warned), (_, warned_too) = pair.run(_told_to_monitors, config)
    assert warned == warned_too == []
    lines = events_named(read_events(tmp_path / "run" / "metrics.jsonl"), "train")
    assert [line["step"] for line in lines] == [1, 7, 10]
    page = (Path(__file__).parents[2] / "docs/training-metrics.md").read_text()
    rows = [
        row.split("|")[1]
        for row in page.split("## Training lines")[1].split("\n## ")[0].splitlines()
        if row.startswith("| `")
    ]
    documented = {key for row in rows for key in re.findall("`([a-z_]+)`", row)}
    assert lines[0].keys() == documented | {"event", "step"}
    for line in lines:
        assert line["positions_per_second"] == pytest.approx(4 * line["images_per_second"])
        flops = line["images_per_second"] / 2 * config.model.training_flops(4)
        assert line["model_tflops_per_second"] == pytest.approx(flops / 1e12) and line["mfu"] is None
        assert 0.05 < line["peak_memory_gb"] < 50, "a process with torch"
    curves = documented - {"epoch", "elapsed_seconds", "mfu", "stage_eta_seconds", "eta_seconds"}
    expected = {(f"train/{name}", line[name], line["step"]) for line in lines for name in curves}
    assert {event for event in told if event[0].startswith("train/")} == expected


@pytest.mark.processes
def test_the_time_left_of_a_resumed_run_counts_the_lines_before_and_status_reads_it_from_the_files(
    pair, shards, tmp_path
):
    config = tiny_config(shards, tmp_path / "run", validation={"every": 0}, logging={"every": 3})
    pair.run(run_and_stop_after, config, 15)
    assert read_status(config.directory).eta_seconds > 0
    pair.run(run, config)
    events = read_events(config.directory / "metrics.jsonl")
    lines, stages = events_named(events, "train"), stages_begun(events)
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 10, 12, 15, 18, 20, *range(21, 40, 3), 40]
    for number, line in enumerate(lines, start=1):
        left = StepCosts(stages, config.model, lines[:number]).left(line["step"])
        assert line["eta_seconds"] == pytest.approx(sum(left))
        assert line["stage_eta_seconds"] == pytest.approx(left[line["stage"]])
    status = read_status(config.directory)
    assert (status.state, status.restarts, status.stage, status.step, status.eta_seconds) == ("finished", 1, 3, 40, 0)
    assert status.checkpoint_step == 40
    pair.run(run, config)
    assert read_status(config.directory).restarts == 1, "a start that finds nothing to do is none"
