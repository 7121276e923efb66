"""A profile of some steps: what it holds, where it lies, and that training takes no notice of it."""

import json
import os
from pathlib import Path

import pytest

from npp_ds.training.profiler import StepProfiler
from runs import WATCHED, assert_same, outcome_of, run, run_and_stop_after, tiny_config, told

pytestmark = pytest.mark.processes
PARTS = ("data", "forward", "backward", "optimizer")


def spans(trace: Path) -> list[tuple[str, float, float]]:
    """(name, begin, end) of the annotated stretches of a trace, in microseconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_trace_holds_the_steps_asked_for_with_their_parts_and_training_is_as_without(
    pair, shards, tmp_path, undisturbed
):
    config = tiny_config(shards, tmp_path / "run", profile={"steps": "6-8"}, **WATCHED)
    said, silent = pair.run(told, config)
    assert_same(outcome_of(tmp_path / "run"), undisturbed)
    folder = tmp_path / "run" / "profile"
    assert names_in(folder) == ["steps-6-8-rank-0.json", "steps-6-8-rank-0.txt"]
    told_of = [line for line in said if line.startswith("profile of steps 6 to 8:")]
    assert len(told_of) == 1 and str(folder / "steps-6-8-rank-0.json") in told_of[0]
    assert not any("profile" in line for line in silent), "the first rank alone"
    found = spans(folder / "steps-6-8-rank-0.json")
    steps = [span for span in found if span[0].startswith("step ")]
    assert [name for name, *_ in steps] == ["step 6", "step 7", "step 8"]
    for _, begin, end in steps:
        inside = sorted((b, name) for name, b, e in found if name in PARTS and begin <= b and e <= end)
        assert [name for _, name in inside] == list(PARTS)
    table = (folder / "steps-6-8-rank-0.txt").read_text()
    assert table.startswith("optimizer steps 6 to 8, rank 0:")
    for name in ("aten::mm", "forward", "backward", "optimizer"):
        assert name in table


def test_a_run_that_ends_amid_the_steps_keeps_its_part_and_the_next_start_profiles_the_rest(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", validation={"every": 0}, profile={"steps": "3-6"})
    pair.run(run_and_stop_after, config, 4)
    folder = tmp_path / "run" / "profile"
    assert names_in(folder) == ["steps-3-4-rank-0.json", "steps-3-4-rank-0.txt"]
    pair.run(run, config)
    assert names_in(folder)[2:] == ["steps-5-6-rank-0.json", "steps-5-6-rank-0.txt"]
    steps = [[name for name, *_ in spans(path) if name.startswith("step ")] for path in sorted(folder.glob("*.json"))]
    assert steps == [["step 3", "step 4"], ["step 5", "step 6"]]


def test_a_run_that_ends_in_the_warm_up_or_goes_on_after_the_steps_writes_nothing(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", validation={"every": 0}, profile={"steps": 5})
    pair.run(run_and_stop_after, config, 4)
    assert not (tmp_path / "run" / "profile").exists()
    config.profile.steps = "2"
    pair.run(run, config)
    assert not (tmp_path / "run" / "profile").exists()


def _with_a_full_disk(trainer) -> None:
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    StepProfiler._write = full


def _told_with_a_full_disk(processes, config) -> list[str]:
    write = StepProfiler._write
    try:
        return told(processes, config, _with_a_full_disk)
    finally:
        StepProfiler._write = write


def test_a_disk_without_room_for_the_profile_does_not_end_the_run(pair, shards, tmp_path):
    config = tiny_config(
        shards, tmp_path / "run", validation={"every": 0}, profile={"steps": "1-2"},
        schedule={"patch_sides": [2], "epochs": 1, "warmup_epochs": 0, "end_at_patch_side_one": False},
    )  # fmt: skip
    said, _ = pair.run(_told_with_a_full_disk, config)
    assert [line for line in said if "profile could not be written" in line and "No space left" in line]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "end"
