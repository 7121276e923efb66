"""The schedule is a pure function of the step, with the published stage ends, rates and costs."""

import pytest

from npp_ds.config.schedule import stage_ends
from npp_ds.config.schema import RunConfig

IMAGENET = 1281167


def schedule_of(num_samples: int = IMAGENET, **keys):
    config = RunConfig.model_validate({"model": {"size": "B"}, "data": {"train": "unused"}, **keys})
    return config, config.build_schedule(num_samples, world_size=8)


@pytest.mark.parametrize(
    "sides, ratio, ends, token_cost",
    [
        ([2, 1], 0.5, [150, 300], 0.625),
        ([4, 2, 1], 0.5, [75, 150, 300], 0.578),
        ([8, 4, 2, 1], 0.5, [37, 75, 150, 300], 0.572),
        ([8, 4, 2, 1], 0.67, [90, 134, 201, 300], 0.40),
        ([2, 1], 0.67, [201, 300], 0.50),
    ],
)
def test_stage_ends_and_costs_are_the_published_ones(sides, ratio, ends, token_cost):
    assert stage_ends(300, len(sides), ratio) == ends
    config, schedule = schedule_of(schedule={"patch_sides": sides, "ratio": ratio})
    per_epoch = IMAGENET // 256
    assert [s.end_step for s in schedule.stages] == [e * per_epoch for e in ends]
    assert [s.end_epoch for s in schedule.stages] == ends
    assert [s.patch_side for s in schedule.stages] == sides
    assert schedule.token_cost() == pytest.approx(token_cost, abs=0.003)
    flop_cost = schedule.flop_cost(16, config.model.training_flops)
    assert schedule.token_cost() - 0.01 < flop_cost < schedule.token_cost()


def test_next_token_training_costs_one():
    config, schedule = schedule_of(schedule={"patch_sides": [1]})
    assert schedule.token_cost() == schedule.flop_cost(16, config.model.training_flops) == 1


def test_learning_rate_of_the_paper_warms_up_holds_and_falls_in_every_stage():
    _, schedule = schedule_of(num_samples=2560, schedule={"epochs": 40, "patch_sides": [2, 1]})
    for stage in schedule.stages:
        assert (stage.steps, stage.warmup_steps, stage.decay_steps) == (200, 10, 40)
        rates = [schedule.learning_rate(s) for s in range(stage.start_step, stage.end_step)]
        assert rates[:10] == pytest.approx([1e-4 * (i + 1) / 10 for i in range(10)])
        assert set(rates[9:160]) == {1e-4}
        assert rates[160:] == pytest.approx([1e-4 - 9e-5 * (i + 1) / 40 for i in range(40)])
        assert rates[-1] == pytest.approx(1e-5)


def test_learning_rate_of_the_article_falls_to_zero_from_the_warm_up_on():
    _, schedule = schedule_of(
        num_samples=2560,
        schedule={"epochs": 40, "patch_sides": [2, 1], "decay_fraction": 1.0},
        optimizer={"final_learning_rate": 0.0},
    )
    stage = schedule.stages[1]
    rates = [schedule.learning_rate(s) for s in range(stage.start_step, stage.end_step)]
    assert rates[9] == 1e-4
    assert rates[10:] == pytest.approx([1e-4 * (1 - (i + 1) / 190) for i in range(190)])


def test_explicit_stages_have_their_own_lengths_batches_and_rates():
    _, schedule = schedule_of(
        num_samples=100,
        schedule={
            "batch_size": 16,
            "warmup_epochs": 0,
            "stages": [
                {"patch_side": 4, "steps": 8, "batch_size": 32, "micro_batch_size": 2, "learning_rate": 3e-4},
                {"patch_side": 1, "epochs": 1.5, "dropout_scale": 0.5},
            ],
        },
    )
    first, second = schedule.stages
    assert (first.start_step, first.end_step, first.steps_per_epoch, first.start_epoch) == (0, 8, 3, 0)
    assert (first.batch_size, first.micro_batch_size, first.peak_learning_rate) == (32, 2, 3e-4)
    assert (second.start_step, second.end_step, second.steps_per_epoch) == (8, 17, 6)
    assert (second.batch_size, second.micro_batch_size, second.peak_learning_rate) == (16, 2, 1e-4)
    assert (first.dropout_scale, second.dropout_scale) == (1.0, 0.5)
    assert second.start_epoch == 3, "a stage begins with an epoch that no earlier stage has touched"


def test_stage_at_gives_each_step_to_one_stage():
    _, schedule = schedule_of(num_samples=2560, schedule={"epochs": 8, "patch_sides": [4, 2, 1]})
    assert [schedule.stage_at(s).index for s in (0, 19, 20, 39, 40, 79)] == [0, 0, 1, 1, 2, 2]
    assert schedule.total_steps == 80
    for step in (-1, 80):
        with pytest.raises(IndexError):
            schedule.stage_at(step)


def test_epochs_of_a_stage_count_on_from_the_stage_before():
    _, schedule = schedule_of(num_samples=2600, schedule={"epochs": 8, "patch_sides": [4, 2, 1]})
    positions = [schedule.stage_at(s).epoch_at(s) for s in range(80)]
    assert positions == [(s // 10, s % 10) for s in range(80)]


def test_larger_coarse_batches_keep_positions_per_step_and_scale_rates_by_the_square_root():
    sides = {"patch_sides": [8, 4, 2, 1], "epochs": 80, "warmup_epochs": 1}
    _, plain = schedule_of(num_samples=25600, schedule=sides)
    _, enlarged = schedule_of(num_samples=25600, schedule={**sides, "coarse_batch_scale": 16})
    assert [s.batch_size for s in enlarged.stages] == [4096, 4096, 1024, 256]
    assert [s.peak_learning_rate for s in enlarged.stages] == pytest.approx([4e-4, 4e-4, 2e-4, 1e-4])
    assert [s.final_learning_rate for s in enlarged.stages] == pytest.approx([4e-5, 4e-5, 2e-5, 1e-5])
    assert [s.steps_per_epoch for s in enlarged.stages] == [6, 6, 25, 100]
    assert [s.steps for s in enlarged.stages] == [10 * 6, 10 * 6, 20 * 25, 40 * 100]
    assert [s.warmup_steps for s in enlarged.stages] == [6, 6, 25, 100]
    assert plain.stages[-1].batch_size == enlarged.stages[-1].batch_size, "side 1 keeps its batch"
    assert plain.token_cost() == pytest.approx(enlarged.token_cost(), rel=0.01)


def test_coarse_batches_stay_as_they_are_unless_asked_for():
    _, schedule = schedule_of(schedule={"patch_sides": [8, 4, 2, 1]})
    assert {(s.batch_size, s.peak_learning_rate) for s in schedule.stages} == {(256, 1e-4)}
