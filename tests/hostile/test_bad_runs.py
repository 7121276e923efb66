"""Run folders from a stranger, or after bad luck: each command ends within 20 seconds, with one line about the file."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import assert_printable, assert_refused, run_limited

from forks import run_forked, run_main
from npp_ds.checkpoint.folders import RECORD, _digest, read_record
from npp_ds.config.load import load_config
from npp_ds.training.lease import Owner
from sample_sets import tiny_run

pytestmark = pytest.mark.slow

Change = Callable[[Path], Any]
TRAIN = {
    "event": "train", "step": 5, "stage": 0, "patch_side": 2, "epoch": 0, "loss": 5.0, "learning_rate": 1e-3,
    "grad_norm": 1.0, "images_per_second": 10.0, "mfu": None, "elapsed_seconds": 3.0, "data_wait_share": 0.1,
    "peak_memory_gb": 1.0,
}  # fmt: skip

SHORT = {"event": "train", "step": 6, "stage": 0}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The folder of a run that has logged five steps."""
    run = tiny_run(tmp_path_factory.mktemp("runs") / "run")
    stage = load_config(file=run / "config.yaml").build_schedule(10_000).stages[0]
    begun = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
    events = [{"event": "stage", "step": 0, "stage": 0, "elapsed_seconds": 0.0, **begun}, TRAIN]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


@pytest.fixture
def run(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def terabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


def text(content: str) -> Change:
    return lambda path: path.write_text(content)


def added(event: dict[str, Any] | bytes) -> Change:
    """One more line of metrics.jsonl."""
    line = event if isinstance(event, bytes) else json.dumps(event).encode()
    return lambda path: path.write_bytes(path.read_bytes() + line + b"\n")


def recorded(**changes: Any) -> Change:
    """Other entries of a checkpoint's record, with the right hash of the whole."""

    def change(path: Path) -> None:
        content = {**asdict(read_record(path.parent)), **changes}
        path.write_text(json.dumps({**content, "sha256": _digest(content)}))

    return change


def command(path: Path) -> None:
    """A held-out set that comes out of a command, which would write a report."""
    config = yaml.safe_load(path.read_text())
    config["data"]["val"] = f"pipe:touch {path.parent}/report.html; cat {{file}}"
    path.write_text(yaml.safe_dump(config))


def aliases(path: Path) -> None:
    lines = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(12)]
    path.write_text("\n".join([path.read_text(), "a0: &a0 [x]", *lines]))


CHECKPOINT = "checkpoints/step-00000120"
RECORD_FILE, RANK_FILE = f"{CHECKPOINT}/{RECORD}", f"{CHECKPOINT}/rank-00000-of-00001.safetensors"
ELSEWHERE = {"../../../etc/passwd": {"bytes": 1, "sha256": ""}}
CASES: dict[str, tuple[str, Change, str, str]] = {
    "a FIFO for config.yaml": ("report", fifo, "config.yaml", "Not a regular file"),
    "a device for config.yaml": ("report", device, "config.yaml", "Not a regular file"),
    "terabytes of config.yaml": ("report", terabytes, "config.yaml", "Larger than the 1,048,576 bytes"),
    "a config of a billion aliases": ("report", aliases, "config.yaml", "more than 10,000 values"),
    "a deep config": ("report", text("a: " + "[" * 99_999), "config.yaml", "nested more than 50 levels deep"),
    "a config that is no UTF-8": ("report", lambda p: p.write_bytes(b"\xff\xfea"), "config.yaml", "not valid YAML"),
    "a FIFO for metrics.jsonl": ("report", fifo, "metrics.jsonl", "not found"),
    "a device for metrics.jsonl": ("report", device, "metrics.jsonl", "not found"),
    "a loss that is text": ("report", added({**TRAIN, "loss": "\33[2J"}), "metrics.jsonl", "do not hold"),
    "a line without its time": ("report", added(SHORT), "metrics.jsonl", "do not hold"),
    "a validation without its loss": ("report", added(SHORT | {"event": "validation"}), "metrics.jsonl", "do not hold"),
    "a FIFO for COMPLETE.json": ("export", fifo, RECORD_FILE, "Not a regular file"),
    "a device for COMPLETE.json": ("export", device, RECORD_FILE, "Not a regular file"),
    "terabytes of COMPLETE.json": ("export", terabytes, RECORD_FILE, "Larger than the"),
    "a deep COMPLETE.json": ("export", text("[" * 99_999), RECORD_FILE, "nested too deeply"),
    "a file elsewhere": ("export", recorded(files=ELSEWHERE), RECORD_FILE, "files.../../../etc/passwd"),
    "a step that is text": ("export", recorded(step="120"), RECORD_FILE, "step: Input should be a valid integer"),
    "a stage that the run lacks": ("export", recorded(stage=7), RECORD_FILE, "stage 7 of 2"),
    "shapes of another model": ("export", recorded(shapes={"x": [1 << 50]}), RECORD_FILE, "not the weights of"),
    "a command for data.val": ("likelihood", command, "config.yaml", "found in a file, expected on the command line"),
    "terabytes of metrics.jsonl": ("report", terabytes, "metrics.jsonl", "expected at most 1,073,741,824; restore it"),
    "a FIFO for a rank's file": ("export", fifo, RANK_FILE, "missing, or no regular file"),
    "a device for a rank's file": ("export", device, RANK_FILE, "missing, or no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_run_folders_are_refused(run, tmp_path, case):
    command, change, file, phrase = CASES[case]
    change(run / file)
    out = ["--out", tmp_path / "out.safetensors"] if command == "export" else []
    assert str(run) in assert_refused(command, run, *out, phrase=phrase)
    assert not (tmp_path / "out.safetensors").exists() and not (run / "report.html").exists()


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "train", "step": 6, "loss": "\xff"}', b'{"event": "train", "step": 1e400}', b"[" * 99_999,
        json.dumps(TRAIN).replace("5.0", "1e400").encode(), b'{"event": "\33[2J", "step": "x"}', b"[" * (3 << 20),
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_left_out_of_a_report(run, line):
    added(line)(run / "metrics.jsonl")
    done = run_limited("report", run)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl, line 3: not an event as JSON: " in done.stderr
    assert_printable(done.stderr)
    assert (run / "report.html").is_file()


def test_status_shows_texts_of_a_stranger_escaped_and_no_traceback(run):
    owner = Owner("t", "\33[2J[/x]", "m", 1, None, None, 0, "now", 5.0)
    (run / "lease.json").write_text(owner.to_json())
    done = run_limited("status", run)
    assert done.returncode == 0 and "\\x1b[2J[/x]" in done.stdout, done.stdout + done.stderr
    assert_printable(done.stdout)
    added({**TRAIN, "loss": "\33[2J"})(run / "metrics.jsonl")
    done = run_limited("status", run)
    assert done.returncode == 2 and "not as `npp train` writes it" in done.stdout, done.stdout + done.stderr
    assert_printable(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def test_records_of_samples_that_hold_something_else_are_left_out_of_an_export_and_refused_by_a_report(run, tmp_path):
    (run / "samples/a").mkdir(parents=True)
    (run / "samples/a/samples.json").write_text("[]")
    (run / "samples/a/evaluation.json").write_text("[1]")
    assert run_limited("export", run, "--format", "hub", "--out", tmp_path / "hub").returncode == 0
    assert_refused("report", run, phrase="evaluation.json: its files do not hold an evaluation")


def test_a_report_on_a_full_disk_keeps_the_old_one(run):
    (run / "report.html").write_text("old")
    done = run_forked("npp_ds.cli", "report", run, timeout=20, main=run_with_small_files)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {run}/"), done.stderr
    assert "File too large; " in done.stderr and "Traceback" not in done.stderr
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".*.tmp"))


def run_with_small_files(program: str, *words: str) -> None:
    """Call `forks.run_main` where files end at 4 KiB: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    run_main(program, *words)


def test_a_report_that_cannot_be_written_names_its_file(run):
    (run / "report.html").mkdir()
    assert_refused("report", run, phrase=f"error: {run}/")
