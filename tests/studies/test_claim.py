"""The study of the claim: its plan is sound, and the whole command trains, measures, resumes and writes its page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from npp_ds.config.checks import problems_of
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import SHIPPED as CLASSIFIER
from npp_ds.tokenizer.loading import SHIPPED as TOKENIZERS
from npp_ds.utils.files import read_json

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from studies.claim.muon import MUON_FILE, RATES  # noqa: E402
from studies.claim.page import interval, verdict, write_page  # noqa: E402
from studies.claim.plan import PLAN, Plan  # noqa: E402
from studies.claim.runs import run_part, sweep_of  # noqa: E402
from studies.claim.seconds import key_of, read_seconds, timed_stages  # noqa: E402


def write_result(plan: Plan, run, nats: float, **values) -> None:
    plan.file(run).parent.mkdir(parents=True, exist_ok=True)
    plan.file(run).write_text(json.dumps({"plan_sha256": plan.sha256_of[run.part], "nats": nats, **values}))


def plan_with_results(results: Path, path: Path = PLAN) -> Plan:
    """Return a shipped plan, with results of parts 1 to 3 in which the arms get better in their order."""
    plan = Plan(results, path)
    runs = [run for part in (1, 2, 3) for run in plan.runs(part)]
    for number, run in enumerate(runs):
        write_result(plan, run, 5 - number / 1000)
    return plan


@pytest.fixture
def plan(tmp_path):
    return plan_with_results(tmp_path)


@pytest.mark.parametrize("name", ["plan.yaml", "plan_tiny_imagenet.yaml"])
def test_every_run_of_a_plan_has_a_config_that_can_be_trained(name, tmp_path):
    plan = plan_with_results(tmp_path, ROOT / "studies/claim" / name)
    runs = [run for part in plan.parts for run in plan.runs(part)]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = plan.config(run, tmp_path, tmp_path / run.name)
        assert not problems_of(config), run
        config.build_schedule(plan.keys["data"]["train"])


def test_arms_have_the_flops_updates_and_choices_that_the_plan_says(plan):
    flops, updates = {}, {}
    for arm in plan.part_of:
        flops[arm], updates[arm] = list(plan.flops(plan.stages(arm)))[-1][::-1]
    equal = "centers-flops superposition next-updates npp-best-flops rising share-40 paper-flops sides-4-2-1-flops"
    for arm in equal.split():
        assert flops[arm] == pytest.approx(flops["next"], rel=0.03), arm
    assert 0.5 < flops["paper"] / flops["next"] < 0.65
    assert updates["next-updates"] == updates["centers-flops"]
    assert plan.chosen("next") == "next-b64-6e-3" and plan.resolved("next") == {"batch": 64, "peak": 6e-3}
    assert plan.resolved("npp-best-epochs")["coarse_dropout"] == 0
    assert [s.get("dropout_scale") for s in plan.stages("coarse-dropout-free")] == [0, 0, None]


def test_an_arm_waits_for_what_it_chooses_from_and_results_of_another_plan_are_refused(plan):
    (tuning, *_) = plan.runs(1)
    plan.file(tuning).unlink()
    assert plan.stages("next") is None and plan.stages("next-updates") is None and plan.stages(tuning.arm)
    plan.file(tuning).write_text(json.dumps({"plan_sha256": "other", "nats": 1.0}))
    with pytest.raises(UserError, match="result of another plan"):
        plan.stages("next")
    added = plan.runs(6)[0]
    plan.file(added).write_text(json.dumps({"plan_sha256": plan.sha256_of[1], "nats": 1.0}))
    with pytest.raises(UserError, match="result of another plan"):
        plan.result(added)
    write_result(plan, added, 1.0, tokenizer_sha256="other")
    with pytest.raises(UserError, match="another tokenizer"):
        plan.result(added)


def test_the_page_compares_with_the_arms_of_other_parts_by_seed_and_decides_when_all_seeds_are_there(plan, tmp_path):
    stages = [{"steps": 10, "batch_size": 16, "learning_rate": 1e-3, "patch_side": 1}]
    common = {"keys": {}, "stages": stages, "chosen": None, "updates": 10, "flops": 1, "cpu_seconds": 1.0, "curve": [
        {"step": 10, "flops": 1, "nats": 4.9}], "class_agreement": 0.5, "machine": "m", "torch": "t"}  # fmt: skip
    runs = [run for part in plan.parts for run in plan.runs(part)]
    nats = {"paper-confirmed": 4.69, "next": 4.8}
    for run in runs:
        loss = nats.get(run.arm, 4.7) + run.seed / 100
        distance = 20.0 if run.arm == "npp-best-flops" else 10.0 + run.seed
        write_result(plan, run, loss, test_nats=loss + 1, frechet_distance=distance, part=run.part, **common)
    (tmp_path / "seconds.json").write_text(
        json.dumps({"seconds_per_step": {"side 1, batch 16": 2.0}, "load_before": 0.1})
    )
    write_page(plan, tmp_path / "study.md")
    page = (tmp_path / "study.md").read_text()
    asked = "A, the paper's recipe: equal epochs, no worse than next-token training: "
    assert f"{asked}**better** (-0.0100 ± 0.0000 nats on test images; Frechet distance +0.0 ± 0.0)." in page
    *_, row = (line for line in page.splitlines() if line.startswith("| rising |"))
    assert "| -0.1000 |  |" in row and row.endswith("| 20 |")  # of seed 1 alone; 10 steps of 2 seconds
    plan.file(runs[-1]).unlink()
    plan.file(next(run for run in runs if run.arm == "paper-confirmed")).unlink()
    write_page(plan, tmp_path / "study.md")
    assert f"{asked}not decided yet; part 4 decides." in (tmp_path / "study.md").read_text()


def test_seconds_of_stages_without_dropout_are_their_own(plan):
    result = {"keys": {"dropout": 0}, "stages": [{"patch_side": 2, "batch_size": 16}]}
    assert [key_of(stage) for stage in timed_stages(plan, result)] == ["side 2, batch 16, no dropout"]
    result = {
        "keys": {},
        "stages": [{"patch_side": 2, "batch_size": 16, "dropout_scale": 0}, {"patch_side": 1, "batch_size": 8}],
    }
    assert [key_of(stage) for stage in timed_stages(plan, result)] == [
        "side 2, batch 16, no dropout",
        "side 1, batch 8",
    ]


def test_intervals_are_those_of_students_t_and_decide_as_planned():
    mean, half = interval([-0.03, -0.02, -0.04])
    assert (mean, half) == (pytest.approx(-0.03), pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4))
    assert verdict(mean, half, 0.02) == "better"
    assert verdict(0.03, 0.02, 0.02) == "worse"
    assert verdict(0.01, 0.005, 0.02) == "worse, by less than the margin"
    assert verdict(0.0, 0.015, 0.02) == "no worse"
    assert verdict(0.0, 0.03, 0.02) == "undecided"


def test_a_sweep_goes_on_while_its_largest_scale_is_the_best():
    def measure(scale):
        return {"cfg_scale": scale, "frechet_distance": abs(scale - 5)}

    assert [found["cfg_scale"] for found in sweep_of(measure, [1.0, 2.0, 3.0])] == [1.0, 2.0, 3.0, 4.5, 6.75]
    assert len(sweep_of(measure, [4.0, 5.0, 7.0])) == 3


TINY = {
    "margin": 0.02,
    "data": {"train": 40, "validation": 10, "image_size": 32, "tokenizer": str(TOKENIZERS["fashion_mnist"]),
             "classifier": str(CLASSIFIER)},
    "model": {"dim": 16, "n_layers": 1, "n_heads": 1, "ffn_multiple_of": 16, "vocab_size": 512, "grid_size": 8,
              "num_classes": 10},
    "training": {"epochs": 2, "ratio": 0.5, "warmup_epochs": 0.25, "decay_fraction": 0.2, "final_rate": 0.1,
                 "dropout": 0.1},
    "samples": {"cfg_scales": [1.0, 2.0], "sweep_images": 20, "sweep_seed": 1, "images": 30, "seed": 2},
    "parts": {
        1: {"title": "Tuning", "seeds": [0], "baseline": "next", "test": True, "arms": {
            "next": {"batch": 10, "peak": 1e-3},
            "centers": {"choose": ["next"], "sides": [2, 1], "positions": "centers", "flops": 1},
        }},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
def test_the_whole_command_trains_measures_times_and_writes_a_page_and_finished_runs_stay(tmp_path):
    rng = np.random.default_rng(0)
    for split, label, number in np.ndindex(2, 10, 5):
        path = tmp_path / "images" / ("train", "test")[split] / f"class{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(TINY))
    paths = {name: tmp_path / name for name in ("images", "out", "results")} | {"plan": tmp_path / "plan.yaml"}
    command = [sys.executable, "-m", "studies.claim", *(f"--{name}={path}" for name, path in paths.items())]
    command.append(f"--page={tmp_path / 'docs/study.md'}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for part in ("1", "muon", "data", "seconds"):
        call = [*command, f"--part={part}"]
        found = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert found.returncode == 0, found.stderr[-3000:]
    plan = Plan(paths["results"], paths["plan"])
    run_part(plan, 1, ["--no-run-is-left"], jobs=2)
    results = {run.arm: plan.result(run) for run in plan.runs(1)}
    for result in results.values():
        assert result["curve"][-1]["flops"] == result["flops"] and 0 < result["test_nats"] < 7
        assert result["cfg_scale"] < result["sweep"][-1]["cfg_scale"]
        assert result["frechet_distance"] > 0 and result["cpu_seconds"] > 0
    assert results["centers"]["chosen"] == "next" and results["centers"]["updates"] > results["next"]["updates"]
    page = (tmp_path / "docs/study.md").read_text()
    assert min(read_seconds(plan).values()) > 0 and len(read_seconds(plan)) == 2
    adamw, *muon = (run["nats"] for run in read_json(plan.results / MUON_FILE)["runs"])
    assert adamw == pytest.approx(results["next"]["nats"], abs=1e-5) and len({adamw, *muon}) == 1 + len(RATES)
    for shown in ("| centers |", "| muon-2 |", "seconds, idle core", "| their reconstructions |"):
        assert shown in page
    assert f"{results['centers']['test_nats']:.4f}" in page
    assert (tmp_path / "docs/images/study_part_1.png").is_file()
