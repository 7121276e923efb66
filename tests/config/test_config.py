"""A config says everything that is wrong with it at once, and every shipped recipe and DeepSpeed setting is right."""

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from npp_ds.cli import app
from npp_ds.config.checks import problems_of
from npp_ds.config.fields import keys_of, section_of
from npp_ds.config.load import load_config, load_run, recipe_names
from npp_ds.config.schema import RunConfig, ScheduleSection
from npp_ds.errors import UserError, similar_names
from npp_ds.sizes import SIZES
from npp_ds.training.deepspeed_config import engine_settings, read_settings, shipped_configs
from npp_ds.utils.gpu_specs import GPUS

MINIMAL = {"model": {"size": "B"}, "data": {"train": "shards"}}


def write(path: Path, keys: dict) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


def complaint(tmp_path: Path, keys: dict, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file=write(tmp_path / "run.yaml", keys), overrides=overrides, world_size=world_size)
    return str(caught.value)


def test_every_problem_is_reported_at_once_with_key_value_expectation_and_fix(tmp_path):
    keys = {
        "model": {"size": "B", "dims": 3, "grid_size": 6},
        "data": {"train": "shards", "class_dropout": 2},
        "schedule": {"patch_sides": [4, 1], "batch_size": 7},
        "optimizer": {"betas": [2, 0.1]},
        "loging": {"every": 3},
        "seed": "abc",
    }
    text = complaint(tmp_path, keys, "schedule.epochs=x", "nonsense", world_size=2)
    for expected in (
        "9 problems",
        "model.dims: unknown key, did you mean model.dim?",
        "loging: unknown key, did you mean logging?",
        "seed: found 'abc', expected integer",
        "data.class_dropout: found 2, expected less than or equal to 1 (share of labels replaced by the null class)",
        "schedule.epochs: found 'x', expected integer",
        "nonsense: expected key=value",
        "schedule.patch_sides.0: side 4 does not divide the 6x6 grid; use one of [1, 2, 3, 6]",
        "optimizer.betas: the first is 2.0, expected at least 0 and below 1",
        "schedule.batch_size: 7 (every stage) is not a multiple of 2 processes; use 8",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ({"epochs": 3, "patch_sides": [8, 4, 2, 1]}, "leave stage 0 (side 8) empty"),
        ({"patch_sides": [2, 4, 1]}, "sides [2, 4, 1] must decrease from stage to stage"),
        ({"patch_sides": [2, 2, 1]}, "must decrease from stage to stage"),
        ({"patch_sides": [4, 2]}, "the last stage has side 2"),
        ({"patch_sides": [3, 1]}, "side 3 does not divide the 16x16 grid"),
        ({"stages": [{"patch_side": 1}]}, "neither of epochs and steps given; give exactly one"),
        ({"stages": [{"patch_side": 1, "epochs": 1, "steps": 2}]}, "both of epochs and steps given"),
        ({"stages": [{"patch_side": 1, "epochs": 0}]}, "schedule.stages.0.epochs: found 0, expected greater than 0"),
        ({"stages": []}, "schedule.stages: found [], expected"),
        ({"ratio": 1.0}, "schedule.ratio: found 1.0, expected less than 1"),
        (
            {"coarse_batch_scale": 4, "stages": [{"patch_side": 1, "epochs": 1}]},
            "schedule.coarse_batch_scale: 4 has no effect on listed stages",
        ),
        ({"coarse_batch_scale": 0}, "schedule.coarse_batch_scale: found 0, expected greater than or equal to 1"),
    ],
)
def test_impossible_stages_are_refused(tmp_path, schedule, expected):
    assert expected in complaint(tmp_path, {**MINIMAL, "schedule": schedule})


def test_a_coarse_last_stage_can_be_asked_for(tmp_path):
    keys = {**MINIMAL, "schedule": {"patch_sides": [4, 2], "end_at_patch_side_one": False}}
    assert load_config(file=write(tmp_path / "run.yaml", keys)).stage_table()[-1].patch_side == 2


def test_stages_that_do_not_fit_the_number_of_images_are_refused():
    config = RunConfig.model_validate({**MINIMAL, "schedule": {"epochs": 4, "warmup_epochs": 3}})
    assert "exceeds the 255 training images" in problems_of(config, 1, 255)[0]
    assert "schedule.warmup_epochs: 3.0 (6 steps) exceeds the 4 of every stage" in problems_of(config, 1, 512)[0]
    assert not problems_of(RunConfig.model_validate({**MINIMAL, "schedule": {"epochs": 4}}), 1, 512)


@pytest.mark.parametrize(
    "model, expected",
    [
        ({"size": "B", "dim": 64}, "model.size: B fixes dim, n_layers and n_heads, found also model.dim"),
        ({"dim": 64}, "model: n_layers, n_heads missing"),
        ({"dim": 100, "n_layers": 1, "n_heads": 8}, "model.dim: 100 is not a multiple of 4 x n_heads = 32"),
        ({"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 3}, "model.n_kv_heads: 3 does not divide n_heads 4"),
        ({"size": "XXXL"}, "model.size: found 'XXXL', expected 'B', 'L', 'XL', '1B', 'XXL' or '2B'"),
    ],
)
def test_impossible_models_are_refused(tmp_path, model, expected):
    assert expected in complaint(tmp_path, {**MINIMAL, "model": model})


def test_batches_must_factor_into_processes(tmp_path):
    text = complaint(tmp_path, {**MINIMAL, "schedule": {"batch_size": 250}}, world_size=8)
    assert "schedule.batch_size: 250 (every stage) is not a multiple of 8 processes; use 248" in text


@pytest.mark.parametrize("world_size, expected", [(1, 32), (8, 32), (16, 16), (64, 4)])
def test_micro_batches_are_the_largest_that_fit_whatever_the_number_of_processes(tmp_path, world_size, expected):
    keys = {**MINIMAL, "schedule": {"batch_size": 256, "micro_batch_size": 48}}
    config = load_config(file=write(tmp_path / "run.yaml", keys), world_size=world_size)
    assert {s.micro_batch_size for s in config.build_schedule(1000, world_size).stages} == {expected}


def test_validating_an_average_that_is_not_kept_is_refused(tmp_path):
    text = complaint(tmp_path, {**MINIMAL, "validation": {"weights": "ema"}})
    assert "validation.weights: ema, but optimizer.ema_decay is 0" in text


@pytest.mark.parametrize(
    "override, hint",
    [
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("lr=1", "optimizer.learning_rate or schedule.stages.N.learning_rate"),
        ("optimizer.wd=1", "optimizer.weight_decay"),
        ("optim.eps=1", "optimizer"),
        ("model.epochs=3", "schedule.epochs or schedule.stages.N.epochs"),
        ("Seed=3", "seed"),
        ("model.size=xl", "XL"),
        ("model.attention=flash", "flash_attn"),
        ("optimizer.qqq=1", None),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(tmp_path, override, hint):
    text = complaint(tmp_path, MINIMAL, override)
    assert text.startswith("1 problem in") and (f"did you mean {hint}?" in text if hint else "did you mean" not in text)


@pytest.mark.parametrize(
    "known, typed, expected",
    [
        (recipe_names(), "xl", ["xl_256"]),
        (recipe_names(), "quickstrat", ["quickstart"]),
        (recipe_names(), "PAPER", ["paper_256"]),
        (GPUS, "a100", ["a100-40", "a100-80"]),
        (GPUS, "4090", ["rtx4090"]),
        (GPUS, "H100", ["h100"]),
        (GPUS, "h100-sxm", ["h100"]),
        (shipped_configs(), "zero_2", ["zero2"]),
        (recipe_names(), "", []),
        ([], "x", []),
    ],
)
def test_similar_names_are_found_by_case_beginning_part_or_spelling(known, typed, expected):
    assert similar_names(typed, known)[: max(1, len(expected))] == expected


def test_no_problem_is_listed_twice(tmp_path):
    keys = {**MINIMAL, "optimizer": {"final_learning_rate": 1}}
    text = complaint(tmp_path, keys, "model.dims=2", "model.dims=2")
    assert text.count("final_learning_rate: 1.0 is above the peak 0.0001 of every stage") == 1
    assert text.count("model.dims") == 1 and text.startswith("2 problems")


def test_a_wrong_key_causes_no_second_complaint_about_what_it_would_have_set(tmp_path):
    stages = [{"patch_side": 3, "epoch": 1}, {"patch_side": 1, "epochs": 1}]
    keys = {"model": {"size": "XXXL", "grid_size": 9}, "data": {"train": "x"}, "schedule": {"stages": stages}}
    text = complaint(tmp_path, keys)
    assert text.startswith("2 problems"), text
    assert "schedule.stages.0.epoch: unknown key, did you mean schedule.stages.0.epochs?" in text
    assert "model.size: found 'XXXL'" in text


def test_odd_yaml_is_reported_and_empty_sections_are_defaults(tmp_path):
    text = complaint(tmp_path, MINIMAL, "seed=2024-02-31", "name=..")
    assert "seed: '2024-02-31' is not valid YAML" in text
    assert "name: found '..'" in text
    (tmp_path / "dates.yaml").write_text("seed: 2024-02-31\n")
    with pytest.raises(UserError, match=r"dates\.yaml: not valid YAML"):
        load_config(file=tmp_path / "dates.yaml")
    assert load_config(file=write(tmp_path / "run.yaml", {**MINIMAL, "schedule": None})).schedule.epochs == 300
    assert "model: missing" not in complaint(tmp_path, {**MINIMAL, "model": None})


STAGES = {"stages": [{"patch_side": 2, "epochs": 1}, {"patch_side": 1, "epochs": 1}]}


@pytest.mark.parametrize("key, value", [("epochs", 20), ("patch_sides", [8, 4, 2, 1]), ("ratio", 0.6)])
def test_keys_that_listed_stages_make_useless_are_refused(tmp_path, key, value):
    expected = f"schedule.{key}: {value} has no effect on listed stages; change schedule.stages.N."
    assert expected in complaint(tmp_path, {**MINIMAL, "schedule": {**STAGES, key: value}})
    (tmp_path / "mine.yaml").write_text(f"extends: quickstart\nschedule: {{{key}: {value}}}\n")
    with pytest.raises(UserError, match="has no effect on listed stages"):
        load_config(file=tmp_path / "mine.yaml")
    default = getattr(ScheduleSection(), key)
    with pytest.raises(UserError, match=f"schedule.{key}: .* has no effect"):
        load_config("quickstart", overrides=[f"schedule.{key}={default}"])
    overrides = [f"schedule.{key}={value}", "schedule.stages=[{patch_side: 1, epochs: 1}]"]
    assert "has no effect" in complaint(tmp_path, MINIMAL, *overrides)


def test_listed_stages_take_precedence_over_what_the_extended_recipe_computes_them_from(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: article_256\nschedule: {stages: [{patch_side: 1, epochs: 1}]}\n")
    of_file = load_config(file=tmp_path / "mine.yaml")
    of_override = load_config("article_256", overrides=["schedule.stages=[{patch_side: 1, epochs: 1}]"])
    assert [len(config.stage_table()) for config in (of_file, of_override)] == [1, 1]
    assert len(load_config("article_256", overrides=["schedule.stages=null"]).stage_table()) == 4
    assert len(load_config("quickstart", overrides=["schedule.stages=null", "schedule.epochs=9"]).stage_table()) == 2


def test_a_run_that_was_started_with_such_keys_can_be_read_and_resumed(tmp_path):
    config = load_config("quickstart")
    saved = config.model_dump(mode="json")
    saved["schedule"]["epochs"] = 20
    file = write(tmp_path / "config.yaml", saved)
    (tmp_path / "environment.json").write_text("{}")  # makes it a run's own file
    assert load_config(file=file) == config
    assert config.differences_from(saved) == []


@pytest.mark.parametrize(
    "text, problem",
    [
        ("seed: 1\nname: a\nseed: 2", "line 3: seed is given twice; remove one"),
        ("schedule:\n  stages:\n    - {patch_side: 1, epochs: 1, epochs: 2}", "line 3: epochs is given twice"),
        ("seed: " + "[" * 5000, "line 1: nested more than 50 levels deep"),
        (
            "a0: &a0 1\n" + "\n".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]" for i in range(9)),
            "line 6: more than 10,000",
        ),
        ("seed: [" + "1," * 20_000 + "]", "line 1: more than 10,000 values"),
        ("seed: &a [*a]", "line 1: a YAML alias refers to a node that contains it"),
        ("name: \0", "unacceptable character #x0000"),
        ("seed: 0100", "line 1: 0100 would be octal; write it without the zero, or quote it"),
        ("seed: -0_17", "line 1: -0_17 would be octal"),
        ("seed: 1:4", "line 1: 1:4 would be a number of base 60; quote it"),
        ("optimizer: {learning_rate: 1:4.5}", "line 1: 1:4.5 would be a number of base 60"),
    ],
)
def test_yaml_that_means_something_else_than_it_shows_is_refused(tmp_path, text, problem):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"odd.yaml: not valid YAML: {problem}")) as caught:
        load_config(file=tmp_path / "odd.yaml")
    assert "\n" not in str(caught.value)


def test_overrides_are_read_as_strictly_as_files(tmp_path):
    text = complaint(tmp_path, MINIMAL, "seed=0100", "schedule={epochs: 1, epochs: 2}")
    assert "seed: '0100' is not valid YAML (0100 would be octal;" in text and "epochs is given twice" in text


@pytest.mark.parametrize("key", ["run_dir", "init_from", "data.val"])
def test_an_override_without_a_value_is_refused_as_an_unset_variable_would_make_it(tmp_path, key):
    with pytest.raises(UserError, match=f"{key}=: no value, as of a variable that is not set; {key}=null means none"):
        load_config("b_256", overrides=["data.train=x", f"{key}="])
    assert load_config("b_256", overrides=["data.train=x", f"{key}=null"])


@pytest.mark.parametrize("override", [
    "watch.stall_seconds=1e10", "watch.spike_window=100000000000000000000", "schedule.warmup_epochs=1.0e306",
    "run_dir=''",
])  # fmt: skip
def test_values_that_no_run_can_use_are_refused(override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_config("b_256", overrides=["data.train=x", override])


def test_numbers_are_numbers(tmp_path):
    keys = {
        **MINIMAL,
        "seed": True,
        "schedule": {"patch_sides": [2, True]},
        "optimizer": {"betas": [False, 0.9], "learning_rate": True},
        "checkpoint": {"asynchronous": True},
    }
    text = complaint(tmp_path, keys)
    assert text.startswith("4 problems"), text
    assert "seed: found True, expected a number" in text
    assert "schedule.patch_sides: found [2, True], expected numbers" in text
    assert "optimizer.betas: found [False, 0.9], expected numbers" in text


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_config(file=tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_config(file=tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="recipe quickstrat: no such recipe, did you mean quickstart"):
        load_config(recipe="quickstrat")
    assert "data: missing" in complaint(tmp_path, {"model": {"size": "B"}})


def test_overrides_reach_every_level(tmp_path):
    keys = {**MINIMAL, "schedule": {"stages": [{"patch_side": 2, "epochs": 1}, {"patch_side": 1, "epochs": 1}]}}
    overrides = ["schedule.stages.0.epochs=2.5", "model.size=L", "optimizer.learning_rate=3e-4", "name=mine"]
    config = load_config(file=write(tmp_path / "run.yaml", keys), overrides=overrides)
    assert config.stage_table()[0].epochs == 2.5
    assert (config.model.size, config.optimizer.learning_rate, config.name) == ("L", 3e-4, "mine")
    assert str(config.directory) == "runs/mine"


def copied_run(folder: Path, run_dir: str | None) -> Path:
    """The config.yaml of runs/copy, a copy of the run folder runs/tiny or of `run_dir`."""
    keys = {"name": "tiny", "run_dir": run_dir, "model": {"size": "B"}, "data": {"train": "shards"}}
    (folder / "runs/copy/checkpoints").mkdir(parents=True)
    (folder / "runs/copy/config.yaml").write_text(RunConfig.model_validate(keys).to_yaml())
    return Path("runs/copy/config.yaml")


@pytest.mark.parametrize(
    "run_dir, overrides, directory",
    [
        (None, [], None),
        ("runs/tiny", ["seed=0"], None),
        ("/elsewhere/tiny", [], None),
        (None, ["run_dir=runs/copy"], "runs/copy"),
        (None, ["run_dir=runs/tiny"], "runs/tiny"),
        (None, ["name=copy"], "runs/copy"),
        ("runs/../runs/copy", [], "runs/../runs/copy"),
    ],
)
def test_a_copied_run_starts_only_with_its_folder_named(tmp_path, monkeypatch, run_dir, overrides, directory):
    monkeypatch.chdir(tmp_path)
    file = copied_run(tmp_path, run_dir)
    if directory:
        assert load_run(file=file, overrides=overrides).directory == Path(directory)
        return
    with pytest.raises(UserError, match=r"its run_dir is .*tiny; give run_dir=runs/copy to resume that copy"):
        load_run(file=file, overrides=overrides)
    assert load_config(file=file).name == "tiny", "what only reads the run takes the copy"


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_the_commands_that_start_a_run_refuse_a_copy_without_its_folder(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os._exit", lambda code: None)
    done = CliRunner().invoke(app, [command, "--config", str(copied_run(tmp_path, None))])
    assert "give run_dir=runs/copy" in f"{done.output} {done.exception}"
    assert not (tmp_path / "runs/tiny").exists()


def test_the_resolved_config_reads_back_as_itself():
    config = load_config("article_256")
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_settings_differ_in_what_is_trained_and_not_in_how_it_is_run():
    saved = load_config("b_256").fixed_keys()
    for free in (
        "data.train=elsewhere",
        "schedule.micro_batch_size=2",
        "deepspeed.config=zero3",
        "logging.every=1",
        "run_dir=elsewhere",
        "profile.steps=10-12",
    ):
        assert not load_config("b_256", overrides=[free]).differences_from(saved), free
    for bound in ("seed=1", "schedule.batch_size=512", "optimizer.weight_decay=0.1", "model.size=L", "precision=fp32"):
        (found,) = load_config("b_256", overrides=[bound]).differences_from(saved)
        assert found.startswith(f"{bound.split('=')[0]}: found "), found


def test_a_key_that_a_saved_config_lacks_has_its_default():
    stages = "schedule.stages=[{patch_side: 2, epochs: 3}, {patch_side: 1, epochs: 3}]"
    saved = load_config("b_256", overrides=[stages]).fixed_keys()
    del saved["optimizer"]["eps"], saved["schedule"]["stages"][1]["warmup_epochs"], saved["init_from"]
    del saved["model"]["coarse_positions"], saved["schedule"]["stages"][0]["dropout_scale"]
    assert not load_config("b_256", overrides=[stages]).differences_from(saved)
    changed = [stages, "optimizer.eps=1e-6", "schedule.stages.1.warmup_epochs=2", "model.coarse_positions=centers"]
    assert load_config("b_256", overrides=changed).differences_from(saved) == [
        "model.coarse_positions: found 'paper', requested 'centers'",
        "optimizer.eps: found 1e-08, requested 1e-06",
        "schedule.stages.1.warmup_epochs: found None, requested 2.0",
    ]


def test_one_stage_more_is_a_difference():
    one, two = (
        "schedule.stages=[" + stages + "{patch_side: 1, epochs: 3}]" for stages in ("", "{patch_side: 2, epochs: 3}, ")
    )
    saved = load_config("b_256", overrides=[one]).fixed_keys()
    (found,) = load_config("b_256", overrides=[two]).differences_from(saved)
    assert found.startswith("schedule.stages: found ")


def test_a_saved_key_that_is_unknown_now_is_a_difference():
    saved = load_config("b_256").fixed_keys()
    saved["optimizer"]["momentum"] = 0.5
    assert load_config("b_256").differences_from(saved) == ["optimizer.momentum: found 0.5, requested None"]


@pytest.mark.parametrize("given, numbers", [("10-12", [10, 11, 12]), ("7", [7]), ("3-3", [3]), ("null", [])])
def test_steps_to_profile_are_one_or_a_range(given, numbers):
    config = load_config("b_256", overrides=[f"profile.steps={given}"])
    assert list(config.profile.numbers()) == numbers
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
    assert "profile" not in config.fixed_keys(), "runs from before this key go on"


@pytest.mark.parametrize("given", ["12-10", "0", "0-3", "-4", "10-", "true", "1.5", "[1,2]", "1-101", "ten"])
def test_other_steps_to_profile_are_refused(tmp_path, given):
    text = complaint(tmp_path, MINIMAL, f"profile.steps={given}")
    assert "expected one step or a range such as 10-12, from 1 on, of at most 100 steps" in text


def test_steps_to_profile_lie_within_the_run():
    def problems(steps: str) -> list[str]:
        keys = {**MINIMAL, "schedule": {"epochs": 4}, "profile": {"steps": steps}}
        return problems_of(RunConfig.model_validate(keys), 1, 512)

    assert problems("7-8") == []
    assert problems("7-9") == ["profile.steps: 7-9, but the run ends with step 8; name earlier steps, or use null"]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_sound(name):
    config = load_config(name, world_size=2)
    assert config.name == name
    num_samples = 9000 if name == "quickstart" else 1281167
    assert not problems_of(config, 2, num_samples)
    stage = config.build_schedule(num_samples, 2).stages[0]
    assert engine_settings(config, stage, 2)["train_batch_size"] == config.schedule.batch_size


@pytest.mark.parametrize("base, prefix", [("paper_256", ""), ("ntp_256", "ntp_")])
def test_the_recipe_of_a_size_differs_from_the_shared_one_in_name_and_size_only(base, prefix):
    sizes = [size for size in SIZES if f"{prefix}{size.lower()}_256" in recipe_names()]
    assert len(sizes) == 6
    for size in sizes:
        name = f"{prefix}{size.lower()}_256"
        assert load_config(name) == load_config(base, overrides=[f"name={name}", f"model.size={size}"])


def test_the_paper_recipe_is_the_default_of_every_key():
    defaults = RunConfig.model_validate({"model": {"size": "B"}, "data": {"train": "x"}})
    paper = load_config("paper_256")
    for section in ("optimizer", "schedule", "model", "precision"):
        assert getattr(defaults, section) == getattr(paper, section), section


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_deepspeed_setting_is_filled_from_the_run_config(name):
    assert name.startswith(f"zero{read_settings(name)['zero_optimization']['stage']}")
    config = load_config("quickstart", overrides=[f"deepspeed.config={name}", "schedule.micro_batch_size=8"])
    settings = engine_settings(config, config.build_schedule(9000, 2).stages[0], 2)
    assert "auto" not in json.dumps(settings)
    assert settings["train_batch_size"] == config.schedule.batch_size
    assert settings["gradient_accumulation_steps"] == config.schedule.batch_size // 16
    assert settings["gradient_clipping"] == 1.0


def test_a_process_alone_scatters_no_gradients_under_zero3():
    config = load_config("quickstart", overrides=["deepspeed.config=zero3"])
    stages = {n: config.build_schedule(9000, n).stages[0] for n in (1, 2)}
    assert engine_settings(config, stages[1], 1)["zero_optimization"]["reduce_scatter"] is False
    assert "reduce_scatter" not in engine_settings(config, stages[2], 2)["zero_optimization"]


def test_a_deepspeed_setting_that_contradicts_the_run_config_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    config = load_config("b_256", overrides=[f"deepspeed.config={path}"])
    stage = config.build_schedule(1281167, 2).stages[0]
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5, "bf16": {"enabled": True}})
    )
    with pytest.raises(UserError, match="gradient_clipping, bf16 belong to the run config"):
        engine_settings(config, stage, 2)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}))
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer is 'cpu', expected"):
        engine_settings(config, stage, 2)
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    with pytest.raises(UserError, match=r"precision: bf16 with deepspeed\.config .* set precision to autocast_bf16"):
        engine_settings(config.model_copy(update={"precision": "bf16"}), stage, 2)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "compute_grad_norm": False}))
    with pytest.raises(UserError, match="compute_grad_norm"):
        engine_settings(config, stage, 2)
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(UserError, match=r"zero_optimization\.stage is 0, expected 1, 2 or 3"):
        engine_settings(config, stage, 2)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        engine_settings(config, stage, 2)
    with pytest.raises(UserError, match="neither a file nor one of zero1, zero2, zero2_bf16_gradients, zero3"):
        read_settings("zero7")


def test_the_page_of_all_keys_is_current():
    """If it is not: python docs/configuration_page.py > docs/configuration.md"""
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "configuration.md").read_text()
    assert page == runpy.run_path(str(docs / "configuration_page.py"))["reference"]()
    keys = [key for key, field in keys_of(RunConfig) if section_of(field.annotation) is not field.annotation]
    assert len(keys) > 70 and not [key for key in keys if page.count(f"\n| `{key}` | ") != 1]
    assert not [key for key, field in keys_of(RunConfig) if not field.description and not section_of(field.annotation)]
