"""What a run tells: lines that survive a kill and are not told twice, a bar on a terminal, plain lines elsewhere."""

import errno
import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import pytest

from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.training.metrics import MetricsLog, events_named, read_events
from npp_ds.training.run_log import Progress
from npp_ds.training.trainer import Trainer
from npp_ds.utils.logs import show_logs
from runs import logs, tiny_config

LINE = {
    "event": "train", "step": 30, "stage": 1, "patch_side": 2, "epoch": 3, "loss": 4.25, "learning_rate": 1e-4,
    "images_per_second": 512.4, "mfu": None,
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


class Terminal(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_stage_step_loss_rate_and_time_to_go(monkeypatch, is_terminal):
    screen = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(total_steps=100, first_step=10, stages=3)
    progress.show(LINE, seconds_per_step=75 / 70)
    show_logs()
    logging.getLogger("npp_ds.training").info("validation after step 30")
    progress.close()
    text = screen.getvalue()
    assert "MFU" not in text
    for part in ("stage 2/3 side 2", "step 30/100", "loss 4.2500", "lr 1.00e-04", "512 images/s", "eta"):
        assert part in text, part
    assert "validation after step 30\n" in text
    assert ("\x1b[" in text) is is_terminal
    if not is_terminal:
        assert "eta 0:01:15" in text
        assert len(text.splitlines()) == 2


def test_progress_shows_the_mfu_where_the_peak_is_known(capsys):
    Progress(total_steps=100, first_step=10, stages=3).show({**LINE, "mfu": 0.4321}, seconds_per_step=1)
    assert "512 images/s  MFU 43.2%  eta" in capsys.readouterr().out


def _told_to_monitors(processes: Processes, config) -> list[tuple[str, float, int]]:
    trainer, told = Trainer(config, processes), []
    trainer.engine.write_events = told.extend
    trainer.run()
    return told


@pytest.mark.processes
def test_a_training_line_holds_every_documented_figure_and_monitors_get_its_curves(pair, shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", validation={"every": 0}, logging={"every": 7},
        schedule={"patch_sides": [2], "epochs": 1, "warmup_epochs": 0, "end_at_patch_side_one": False},
    )  # fmt: skip
    told, _ = pair.run(_told_to_monitors, config)
    lines = events_named(read_events(tmp_path / "run" / "metrics.jsonl"), "train")
    assert [line["step"] for line in lines] == [1, 7, 10]
    page = (Path(__file__).parents[2] / "docs/training-metrics.md").read_text()
    rows = [row.split("|")[1] for row in page.split("## Samples compared")[0].splitlines() if row.startswith("| `")]
    documented = {key for row in rows for key in re.findall("`([a-z_]+)`", row)}
    assert lines[0].keys() == documented | {"event", "step"}
    for line in lines:
        assert line["positions_per_second"] == pytest.approx(4 * line["images_per_second"])
        flops = line["images_per_second"] / 2 * config.model.training_flops(4)
        assert line["model_tflops_per_second"] == pytest.approx(flops / 1e12) and line["mfu"] is None
        assert 0.05 < line["peak_memory_gb"] < 50, "a process with torch"
    curves = documented - {"stage", "epoch", "elapsed_seconds", "mfu"}
    expected = {(f"train/{name}", line[name], line["step"]) for line in lines for name in curves}
    assert {event for event in told if event[0].startswith("train/")} == expected
