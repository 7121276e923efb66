"""Between lines of the log the host runs one step ahead of the device, and what a run leaves does not show it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_watchful import _break_loss

from npp_ds.distributed.process_group import Processes
from npp_ds.training.engine import TrainingEngine
from npp_ds.training.hooks import FinishedStep, Hook
from npp_ds.training.preemption import Preempted
from npp_ds.training.trainer import Trainer
from runs import WATCHED, Outcome, assert_same, outcome_of, run, tiny_config, told

pytestmark = pytest.mark.processes

EVERY = 6
RARELY = {**WATCHED, "logging": {"every": EVERY, "samples": True}}


def _sparse(outcome: Outcome) -> Outcome:
    """What a run that logs every step would have left, had it logged rarely; its stages end at 10, 20 and 40."""
    at = {1, 10, 20, 40, *range(EVERY, 40, EVERY)}
    return outcome._replace(metrics=[m for m in outcome.metrics if m["event"] != "train" or m["step"] in at])


def _order(processes: Processes, config) -> list[tuple[str, int]]:
    """Steps as they are given to the engine and as their results are read, on this rank."""
    seen: list[tuple[str, int]] = []
    trainer = Trainer(config, processes)
    step = trainer.engine.step

    def stepped(at: int, *rest: Any) -> Any:
        seen.append(("step", at))
        return step(at, *rest)

    class Read(Hook):
        def after_step(self, step: FinishedStep) -> None:
            seen.append(("read", step.batch.step))

    trainer.engine.step = stepped
    trainer.hooks.insert(0, Read())
    trainer.run()
    return seen


def test_a_result_is_waited_for_only_where_something_is_due_after_its_step(pair, shards, tmp_path):
    keys = {"logging": {"every": 4}, "checkpoint": {"every": 7}, "data": {"val": None}}
    found = pair.run(_order, tiny_config(shards, tmp_path / "run", **keys))
    due = {1, 10, 20, 40, *range(4, 40, 4), *range(7, 40, 7)}  # steps done: lines, stages' ends, checkpoints
    expected, unread = [], []
    for at in range(40):
        expected.append(("step", at))
        unread.append(("read", at))
        while len(unread) > (0 if at + 1 in due else 1):
            expected.append(unread.pop(0))
    assert found == [expected] * 2


def test_logging_rarely_changes_nothing_but_the_lines(pair, shards, tmp_path, undisturbed):
    checkpoints = {"every": 5, "asynchronous": True}
    pair.run(run, tiny_config(shards, tmp_path / "run", **RARELY, checkpoint=checkpoints))
    assert_same(outcome_of(tmp_path / "run"), _sparse(undisturbed))


def _stopped_after(processes: Processes, config, prepare: Callable[..., None], *arguments: Any) -> int:
    trainer = Trainer(config, processes)
    prepare(trainer, *arguments)
    try:
        trainer.run()
    except Preempted as stop:
        return stop.step
    return -1


def _ask_at(trainer: Trainer, at: int) -> None:
    """Asks the last rank to stop while it is at a step."""
    step = trainer.engine.step

    def asked(number: int, *rest: Any) -> Any:
        if number == at and trainer.processes.rank == 1:
            trainer.stop.requested = "SIGTERM"
        return step(number, *rest)

    trainer.engine.step = asked


@pytest.mark.parametrize("asked_at, stops_after", [(0, 1), (7, 9), (10, 12), (38, 40)])
def test_all_stop_at_most_a_step_after_the_one_that_was_asked_in(
    pair, shards, tmp_path, undisturbed, asked_at, stops_after
):
    config = tiny_config(shards, tmp_path / "run", **RARELY)
    assert pair.run(_stopped_after, config, _ask_at, asked_at) == [stops_after] * 2
    pair.run(run, config)
    assert_same(outcome_of(tmp_path / "run"), _sparse(undisturbed))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_steps_between_the_lines_that_are_not_finite_are_answered_as_if_every_step_was_logged(
    pair, shards, tmp_path, policy
):
    keys = {"watch": {"on_nonfinite": policy}, "checkpoint": {"every": 10}}
    for name, watched in (("often", WATCHED), ("rarely", RARELY)):
        pair.run(told, tiny_config(shards, tmp_path / name, **watched, **keys), _break_loss, [13, 14])
    often, rarely = outcome_of(tmp_path / "often"), outcome_of(tmp_path / "rarely")
    assert sum(m["event"] == "left_out" for m in rarely.metrics) == 2
    assert_same(rarely, _sparse(often))


def test_a_spike_between_the_lines_is_told_with_its_step(pair, shards, tmp_path):
    config = tiny_config(shards, tmp_path / "run", watch={"spike_window": 12, "spike_threshold": 6}, **RARELY)
    said = pair.run(told, config, _break_loss, [33], 1.5, 0)[0]
    assert [line[:23] for line in said if "is a spike" in line] == ["WARNING: step 33 (stage"]
    assert [m["step"] for m in outcome_of(tmp_path / "run").metrics if m["event"] == "spike"] == [34]


def _waits(processes: Processes, config) -> list[Counter[str]]:
    """What DeepSpeed waited for in a step of 1 and in one of 4 micro-batches; its timer starts in the third step."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    waits: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            waits[name] += 1
            return function(*arguments)

        return call

    stage, accelerator, found = config.build_schedule(160).stages[0], get_accelerator(), []
    engine = TrainingEngine(config, stage, processes)
    is_invalid = counted("norm", stage3.is_invalid_grad_norm)
    with (
        patch.object(accelerator, "synchronize", counted("device", accelerator.synchronize)),
        patch.object(stage3, "is_invalid_grad_norm", is_invalid),
        patch.object(stage_1_and_2, "is_invalid_grad_norm", is_invalid),
    ):
        for step, count in enumerate([1, 1, 1, 4]):
            batch_size = count * stage.micro_batch_size * processes.world_size
            engine.set_stage(replace(stage, batch_size=batch_size))
            waits.clear()
            shape = stage.micro_batch_size, 1, 16
            batch = torch.zeros(shape, dtype=torch.long), torch.zeros(shape[0], dtype=torch.long)
            engine.step(step, [batch] * count, 1e-3)
            found.append(waits.copy())
    return found[2:]


@pytest.mark.parametrize("zero_stage, norm_reads", [(1, 3), (2, 3), (3, 1)])
def test_deepspeed_reads_the_norm_in_a_step_and_synchronizes_the_device_in_no_micro_batch(
    pair, shards, tmp_path, zero_stage, norm_reads
):
    """On a CPU, where DeepSpeed's own streams need no synchronization. The reads stand in docs/performance.md."""
    keys = {"deepspeed": {"config": f"zero{zero_stage}"}, "schedule": {"micro_batch_size": 2}}
    config = tiny_config(shards, tmp_path / "run", **keys)
    assert pair.run(_waits, config) == [[{"norm": norm_reads}] * 2] * 2
