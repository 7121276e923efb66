"""A run that goes wrong says where, changes nothing on the way, and goes on or ends as it was told to."""

import contextlib
import io
import json
import logging
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from launches import Launch
from npp_ds.distributed.process_group import Processes
from npp_ds.training.loss_checks import NonFiniteError
from npp_ds.training.trainer import Trainer
from npp_ds.utils.screen import show_logs
from runs import WATCHED, Outcome, assert_same, outcome_of, run, tiny_config, told
from workers import WorkerError

pytestmark = pytest.mark.processes


def _break_loss(trainer: Trainer, steps: list[int], factor: float = math.nan, rank: int = 1) -> None:
    """Lets the loss of `rank` be multiplied by `factor` in these steps, whenever they are trained."""
    engine, step = trainer.engine, trainer.engine.step
    head = engine.engine.module.output
    forward = head.forward

    def broken(at, *arguments):
        wrong = at in steps and trainer.processes.rank == rank
        head.forward = (lambda *a: forward(*a) * factor) if wrong else forward
        try:
            return step(at, *arguments)
        finally:
            head.forward = forward

    engine.step = broken


def _break_gradient(trainer: Trainer, steps: list[int]) -> None:
    """Lets a gradient of rank 1 be infinite in these steps, with a finite loss."""
    engine, step, now = trainer.engine, trainer.engine.step, [-1]

    def broken(at, *arguments):
        now[0] = at
        return step(at, *arguments)

    engine.step = broken
    if trainer.processes.rank == 1:
        engine.engine.module.norm.weight.register_hook(lambda grad: grad * math.inf if now[0] in steps else grad)


def _leave_out(trainer: Trainer, steps: list[int]) -> None:
    trainer.nonfinite.excluded_steps.update(steps)


def _stopped(processes: Processes, config, before, *arguments) -> str:
    """The error that stops a run, and whether the weights are still those from before."""
    trainer = Trainer(config, processes)
    before(trainer, *arguments)
    masters = [m.clone() for m in trainer.engine.partitions.masters]
    step = trainer.engine.step

    def watched(at, *rest):
        for kept, master in zip(masters, trainer.engine.partitions.masters, strict=True):
            kept.copy_(master)
        return step(at, *rest)

    trainer.engine.step = watched
    try:
        trainer.run()
    except NonFiniteError as error:
        same = all(torch.equal(a, b) for a, b in zip(masters, trainer.engine.partitions.masters, strict=True))
        finite = all(p.isfinite().all() for p in trainer.engine.engine.module.parameters())
        return f"{error} | weights as before: {same and bool(finite)}"
    return "went on"


@pytest.mark.parametrize("zero_stage, precision", [(1, "fp32"), (2, "bf16"), (3, "fp32"), (2, "autocast_bf16")])
def test_watchful_a_non_finite_loss_stops_before_the_update_and_says_where(
    pair, shards, tmp_path, undisturbed, zero_stage, precision
):
    keys = {**WATCHED, "precision": precision, "deepspeed": {"config": f"zero{zero_stage}"}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    text = pair.run(_stopped, config, _break_loss, [13])
    ids = undisturbed.samples[13]["ids"][8:]
    listed = ", ".join(map(str, ids))
    expected = f"step 13 (stage 1, patch side 2): the loss of rank 1 is nan; sample ids: {listed}"
    expected += "; to exclude such steps: watch.on_nonfinite=skip"
    assert text == [f"{expected} | weights as before: True"] * 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, 14))
    assert lines[-1]["event"] == "nonfinite"
    assert (lines[-1]["ranks"], lines[-1]["sample_ids"]) == ([1], ids)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_watchful_a_non_finite_gradient_with_finite_losses_stops_before_the_update(pair, shards, tmp_path, zero_stage):
    config = tiny_config(shards, tmp_path / "run", deepspeed={"config": f"zero{zero_stage}"})
    text = pair.run(_stopped, config, _break_gradient, [4])
    assert all("step 4 (stage 0, patch side 4): the gradient norm is not finite; sample ids: " in t for t in text)
    assert all(t.endswith("weights as before: True") for t in text)
    assert text[0].count(",") >= 15, "whose gradient it was cannot be known, so all images are named"


@pytest.fixture(scope="module")
def without_13(pair, shards, tmp_path_factory):
    """A run that leaves out step 13 from the beginning, in each ZeRO stage, made when it is first asked for."""
    made: dict[int, Outcome] = {}

    def of(zero_stage: int) -> Outcome:
        if zero_stage not in made:
            folder = tmp_path_factory.mktemp("without_13") / "run"
            keys = {**WATCHED, "deepspeed": {"config": f"zero{zero_stage}"}}
            pair.run(told, tiny_config(shards, folder, **keys), _leave_out, [13])
            made[zero_stage] = outcome_of(folder)
        return made[zero_stage]

    return of


def _without(outcome: Outcome, *events: str) -> Outcome:
    return outcome._replace(metrics=[line for line in outcome.metrics if line["event"] not in events])


@pytest.mark.parametrize(
    "zero_stage, breaking",
    [
        (2, _break_loss),
        (3, _break_loss),
        (1, _break_gradient),
        pytest.param(1, _break_loss, marks=pytest.mark.slow),
        pytest.param(2, _break_gradient, marks=pytest.mark.slow),
        pytest.param(3, _break_gradient, marks=pytest.mark.slow),
    ],
)
def test_watchful_skip_leaves_the_step_out_as_if_it_had_not_been(
    pair, shards, tmp_path, without_13, zero_stage, breaking
):
    keys = {**WATCHED, "watch": {"on_nonfinite": "skip"}, "deepspeed": {"config": f"zero{zero_stage}"}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    said = pair.run(told, config, breaking, [13])[0]
    assert any("WARNING: step 13" in line and "the run excludes this step (skip)" in line for line in said)
    found = outcome_of(tmp_path / "run")
    assert_same(_without(found, "nonfinite"), without_13(zero_stage))
    assert int(found.state["optimizer_steps"]) == 39
    assert [line["step"] for line in found.metrics if line["event"] == "left_out"] == [14]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_watchful_rollback_goes_back_and_leaves_the_step_out(pair, shards, tmp_path, without_13, zero_stage):
    keys = {**WATCHED, "watch": {"on_nonfinite": "rollback"}, "deepspeed": {"config": f"zero{zero_stage}"}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    said = pair.run(told, config, _break_loss, [13])[0]
    assert "rolled back to step-00000010 (rollback 1); excluded steps: 13" in said
    found = outcome_of(tmp_path / "run")
    assert_same(_without(found, "rollback"), without_13(zero_stage))
    told_of = next(m for m in found.metrics if m["event"] == "rollback")
    assert (told_of["failed_step"], told_of["step"], told_of["ranks"]) == (13, 10, [1])
    assert len(told_of["sample_ids"]) == 8


def test_watchful_excluded_steps_stay_excluded_after_a_restart(pair, shards, tmp_path, without_13):
    config = tiny_config(shards, tmp_path / "run", watch={"on_nonfinite": "skip"}, checkpoint={"every": 7}, **WATCHED)
    with pytest.raises(WorkerError, match=r"step 16 .*the loss of rank 1 is nan"):
        pair.run(told, config, _break_twice, [13], 16)
    pair.run(run, tiny_config(shards, tmp_path / "run", **WATCHED))
    assert_same(_without(outcome_of(tmp_path / "run"), "nonfinite"), without_13(2))


def _break_twice(trainer: Trainer, steps: list[int], last: int) -> None:
    """Steps to leave out, then one at which the run stops."""
    _break_loss(trainer, [*steps, last])
    step = trainer.engine.step

    def strict(at, *arguments):
        if at == last:
            trainer.nonfinite.policy = "stop"
        return step(at, *arguments)

    trainer.engine.step = strict


def test_watchful_rollback_before_the_first_checkpoint_goes_back_to_the_beginning(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", watch={"on_nonfinite": "rollback"}, **WATCHED)
    said = pair.run(told, config, _break_loss, [0])[0]
    assert "rolled back to step-00000000 (rollback 1); excluded steps: 0" in said
    assert int(outcome_of(tmp_path / "run").state["optimizer_steps"]) == 39


def test_watchful_two_rollbacks_are_lived_with_and_the_third_stops(pair, shards, tmp_path):
    keys = {**WATCHED, "watch": {"on_nonfinite": "rollback"}, "checkpoint": {"every": 4}}
    pair.run(told, tiny_config(shards, tmp_path / "two", **keys), _break_loss, [5, 22])
    state = outcome_of(tmp_path / "two").state
    assert (int(state["step"]), int(state["optimizer_steps"])) == (40, 38)
    config = tiny_config(shards, tmp_path / "three", **keys)
    text = pair.run(_stopped, config, _break_loss, [5, 9, 22])
    assert all("step 22" in t and "rollback 3 of 3 | weights as before: True" in t for t in text)


def test_watchful_a_run_that_only_skips_is_stopped(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", watch={"on_nonfinite": "skip"}, **WATCHED)
    text = pair.run(_stopped, config, _break_loss, list(range(12, 40)))
    assert all("step 22 " in t and "so were the 10 steps before it" in t for t in text)


def test_watchful_a_spike_is_told_with_its_images_and_the_run_goes_on(pair, shards, tmp_path, undisturbed):
    config = tiny_config(shards, tmp_path / "run", watch={"spike_window": 12, "spike_threshold": 6}, **WATCHED)
    said = pair.run(told, config, _break_loss, [33], 1.5, 0)[0]
    spikes = [line for line in said if "is a spike" in line]
    assert len(spikes) == 1
    assert "WARNING: step 33 (stage 2): loss 8." in spikes[0]
    event = next(m for m in outcome_of(tmp_path / "run").metrics if m["event"] == "spike")
    assert event["sample_ids"] == undisturbed.samples[33]["ids"]
    assert event["loss"] > event["mean"] + 6 * event["std"]
    assert not any(m["event"] == "spike" for m in undisturbed.metrics)


def test_watchful_a_stalled_rank_ends_the_run_with_stacks_in_a_file(shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", watch={"stall_seconds": 4})
    with Launch(config) as launch:
        launch.wait_until_step(5)
        launch.send(1, signal.SIGSTOP)
        assert launch.processes[0].wait(60) == 4
        launch.send(1, signal.SIGCONT)
        assert launch.processes[1].wait(60) != 0
    text = Path(tmp_path / "run" / "stalled.txt").read_text()
    assert "rank 0, host" in text
    assert "in step" in text and "trainer.py" in text
    assert "stalled.txt" in launch.text()


def test_watchful_a_slow_but_living_run_is_left_alone(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", watch={"stall_seconds": 4}, validation={"every": 0})
    pair.run(told, config, _slow_down)
    assert not (tmp_path / "run" / "stalled.txt").exists()


def _slow_down(trainer: Trainer) -> None:
    step = trainer.engine.step

    def slow(*arguments):
        time.sleep(0.2)
        return step(*arguments)

    trainer.engine.step = slow


def test_a_run_says_its_lines_on_the_first_rank_only(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", schedule={"patch_sides": [2, 1], "epochs": 2})
    assert pair.run(_printed, config) == ["a line\n", ""]


def _printed(processes: Processes, config) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        show_logs(processes.rank)
        logging.getLogger("npp_ds.training").info("a line")
    return text.getvalue()
