"""`evaluate.every`: samples of a run in progress are compared with real images, and the run takes no notice of it."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from evaluated_runs import BATCH_SIZE, IMAGES, config_of, images_to_evaluate_with
from extractors import statistics
from image_sets import save_tiny_tokenizer
from npp_ds.checkpoint.open import open_weights
from npp_ds.config.checks import problems_of
from npp_ds.data.manifest import Manifest
from npp_ds.distributed.process_group import Processes
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import load_reference, make_reference
from npp_ds.evaluation.extractors import ClassifierExtractor
from npp_ds.evaluation.metrics import Moments, frechet_distance
from npp_ds.reporting.report import report_runs
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import build_model, labels_of, sample_images
from npp_ds.tokenizer import load_tokenizer
from npp_ds.training import evaluation
from npp_ds.training.evaluation import Budget
from npp_ds.training.hooks import Context
from npp_ds.training.preemption import Preempted
from npp_ds.training.throughput import Clock
from npp_ds.training.trainer import Trainer
from runs import assert_same, error_of, metrics_of, outcome_of, run

COSTS = ("seconds", "share_of_time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return images_to_evaluate_with(tmp_path_factory.mktemp("evaluate"))


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return [e for e in metrics_of(run_dir) if e["event"] == "evaluation"]


def distance_by_hand(folder: Path, run_dir: Path, step: int, kind: str, patch_side: int) -> float:
    """In this process, from the checkpoint of `step`, all features at once."""
    source = open_weights(run_dir, step=step, variant=kind)
    model, indices = build_model(source, "cpu"), np.arange(IMAGES)
    labels = labels_of(indices, range(10), "balanced", 0)
    options = Options(seed=0, cfg_scale=1.5, patch_side=patch_side)
    decode = load_tokenizer(folder / "tokenizer.safetensors").decode
    images = sample_images(model, decode, labels, indices, options, batch_size=BATCH_SIZE)
    extractor = ClassifierExtractor()
    features = [extractor(images[i : i + BATCH_SIZE]).pool for i in range(0, IMAGES, BATCH_SIZE)]
    reference = load_reference(folder / "reference.npz", extractor)
    return frechet_distance(*statistics(np.concatenate(features)), *reference.pool)


@pytest.mark.processes
@pytest.mark.parametrize(
    "zero_stage, kind",
    [
        (2, "ema"),
        (3, "raw"),
        pytest.param(1, "raw", marks=pytest.mark.slow),
        pytest.param(3, "ema", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_the_distance_that_one_finds_from_the_checkpoint(pair, folder, tmp_path, zero_stage, kind):
    keys = {"deepspeed": {"config": f"zero{zero_stage}"}, "optimizer": {"learning_rate": 1e-2, "ema_decay": 0.7}}
    pair.run(run, config_of(folder, tmp_path / "run", {"every": 6, "weights": kind}, **keys))
    found = evaluations_of(tmp_path / "run")
    assert [(e["step"], e["patch_side"], e["stage"]) for e in found] == [(6, 2, 0), (12, 1, 1)]
    for event in found:
        assert (event["images"], event["cfg_scale"], event["weights"]) == (IMAGES, 1.5, kind)
        expected = distance_by_hand(folder, tmp_path / "run", event["step"], kind, event["patch_side"])
        assert expected > 1
        # Covariances of so few images are singular, and roots of eigenvalues near 0 show rounding errors enlarged.
        assert event["frechet_distance"] == pytest.approx(expected, rel=1e-8)
        picture = Image.open(tmp_path / "run" / "samples" / "during" / f"step-{event['step']:08d}.png")
        assert picture.size == (5 * 32, 32), "the first process's first batch"
    other = distance_by_hand(folder, tmp_path / "run", 12, "raw" if kind == "ema" else "ema", 1)
    assert other != pytest.approx(expected, rel=1e-4)


def _statistics_of_both(processes: Processes, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments(center=rows[0])
    for batch in np.array_split(rows, 5)[processes.rank :: 2]:
        moments.add(batch)
    moments.sum_over_processes(processes.device)
    return moments.statistics()


@pytest.mark.processes
def test_moments_of_two_processes_are_those_of_all_rows(pair):
    rows = np.random.default_rng(0).standard_normal((100, 7)) @ np.random.default_rng(1).standard_normal((7, 7)) + 50
    for mean, covariance in pair.run(_statistics_of_both, rows):
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9)


@pytest.mark.processes
@pytest.mark.parametrize("precision, zero_stage", [("fp32", 2), ("bf16", 3)])
def test_a_run_is_bit_for_bit_the_same_with_and_without(pair, folder, tmp_path, precision, zero_stage):
    keys = {"precision": precision, "deepspeed": {"config": f"zero{zero_stage}"}, "optimizer": {"ema_decay": 0.9}}
    for name, every in (("with", 5), ("without", 0)):
        pair.run(run, config_of(folder, tmp_path / name, {"every": every, "weights": "ema"}, **keys))
    found, expected = outcome_of(tmp_path / "with"), outcome_of(tmp_path / "without")
    assert [e["step"] for e in evaluations_of(tmp_path / "with")] == [5, 10, 12]
    assert_same(found._replace(metrics=[e for e in found.metrics if e["event"] != "evaluation"]), expected)


def test_all_images_of_an_evaluation_decide_whether_steps_are_captured(folder, tmp_path, monkeypatch):
    asked, batches = [], []
    monkeypatch.setattr(evaluation, "worth_capturing", lambda model, *counts: asked.append(counts) or "as asked")

    def drawn(model, decode, labels, indices, options, *, batch_size, capture):
        batches.append((batch_size, capture, indices.tolist()))
        return np.zeros((len(indices), 32, 32, 3), np.uint8)

    monkeypatch.setattr(evaluation, "sample_images", drawn)
    config = config_of(folder, tmp_path / "run", {"every": 1})
    second = SimpleNamespace(rank=1, world_size=2, on_all=lambda f, *a: f(*a), device=torch.device("cpu"))
    manifest = Manifest.load(folder / "train")
    log = SimpleNamespace(last_logged=lambda event: None)
    judged = evaluation.Evaluation(config, SimpleNamespace(total_steps=12), manifest.tokenizer, second, log)
    judged.load()
    context = SimpleNamespace(stage=SimpleNamespace(patch_side=1), done=6, check_stop=lambda: None)
    judged._moments(None, context)
    assert (asked, batches) == ([(12, 5)], [(5, "as asked", [5, 6, 7, 8, 9])])


def _random_states(processes: Processes, config) -> list[bool]:
    """Whether each of an evaluation's runs left the state of every generator alone."""
    trainer, same = Trainer(config, processes), []
    evaluate = trainer.evaluation.run

    def watched(*arguments):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        result = evaluate(*arguments)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        same.append(torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all())
        return result

    trainer.evaluation.run = watched
    trainer.run()
    return same


@pytest.mark.processes
def test_an_evaluation_draws_no_random_number_of_any_library(pair, folder, tmp_path):
    assert pair.run(_random_states, config_of(folder, tmp_path / "run", {"every": 6})) == [[True, True]] * 2


def _asked_in_an_evaluation(processes: Processes, config, at: int) -> tuple[int, int, int]:
    """(step after which the run stopped, batches before that, reports of progress)."""
    trainer = Trainer(config, processes)
    batches, reports, in_last_batch = [0], [0], [0]
    check_stop, set_progress = Context.check_stop, trainer.watchdog.progress.set

    def counted(context):
        batches[0] += 1
        reports[0] = 0
        trainer.stop.requested = "SIGTERM" if batches[0] >= at and processes.rank == 1 else None
        try:
            check_stop(context)
        finally:
            in_last_batch[0] = reports[0]

    def counted_set():
        reports[0] += 1
        set_progress()

    trainer.watchdog.progress.set = counted_set
    try:
        with patch.object(Context, "check_stop", counted):
            trainer.run()
    except Preempted as stop:
        return stop.step, batches[0], in_last_batch[0]
    return -1, -1, -1


def without_costs(outcome):
    return outcome._replace(metrics=[{k: v for k, v in e.items() if k not in COSTS} for e in outcome.metrics])


@pytest.mark.processes
def test_a_signal_in_an_evaluation_is_answered_at_its_next_batch_and_the_next_start_makes_it_up(pair, folder, tmp_path):
    keys = {"validation": {"every": 4}, "optimizer": {"ema_decay": 0.9}}
    pair.run(run, config_of(folder, tmp_path / "undisturbed", {"every": 4}, **keys))
    config = config_of(folder, tmp_path / "run", {"every": 4}, **keys)
    stopped = pair.run(_asked_in_an_evaluation, config, 3)
    assert stopped == [(4, 3, 1)] * 2, "at the third batch after step 4, with a report of progress before it"
    assert not evaluations_of(tmp_path / "run")
    pair.run(run, config)
    assert [e["step"] for e in evaluations_of(tmp_path / "run")] == [4, 8, 12]
    found, expected = (without_costs(outcome_of(tmp_path / name)) for name in ("run", "undisturbed"))
    assert_same(found, expected)


@pytest.mark.processes
def test_a_run_that_is_finished_and_evaluated_does_nothing_and_one_that_is_not_is_evaluated(pair, folder, tmp_path):
    pair.run(run, config_of(folder, tmp_path / "run", {"every": 0}))
    for _ in range(2):
        pair.run(run, config_of(folder, tmp_path / "run", {"every": 100}))
        assert [e["step"] for e in evaluations_of(tmp_path / "run")] == [12]


@pytest.mark.processes
def test_evaluations_that_cost_too_much_are_put_off_but_the_last(pair, folder, tmp_path):
    config = config_of(folder, tmp_path / "run", {"every": 2, "max_share": 1e-6}, logging={"every": 1})
    pair.run(run, config)
    events = [(e["event"], e["step"]) for e in metrics_of(tmp_path / "run") if e["event"].startswith("evaluation")]
    put_off = [("evaluation_put_off", step) for step in (4, 6, 8, 10)]
    assert events == [("evaluation", 2), *put_off, ("evaluation", 12)]
    (summary,) = report_runs([tmp_path / "run"])
    costs = [e["seconds"] for e in evaluations_of(tmp_path / "run")]
    assert summary.evaluations == 2 and summary.evaluation_seconds == pytest.approx(sum(costs))
    assert "evaluations while training" in (tmp_path / "run" / "report.html").read_text()
    assert Image.open(tmp_path / "run" / "training.png").height > 900, "a third row of panels"


def test_the_budget_waits_until_the_last_evaluation_is_paid_off():
    budget = Budget(0.1, None)
    assert budget.allows(0.0), "the first one always"
    assert budget.spend(50.0, 20.0) == pytest.approx(0.4)
    assert not budget.allows(249.0) and budget.allows(250.0)
    resumed = Budget(0.1, {"elapsed_seconds": 50.0, "seconds": 20.0})
    assert not resumed.allows(249.0) and resumed.allows(250.0)


def test_the_clock_stands_still_while_it_is_paused():
    clock = Clock(100.0)
    with clock.paused():
        inside = clock.elapsed
        assert clock.elapsed == inside
    assert clock.elapsed >= inside


@pytest.mark.processes
def test_everything_that_is_missing_is_said_before_the_run_begins(pair, folder, tmp_path):
    def problems(evaluate: dict[str, Any], **sections) -> str:
        first, second = pair.run(error_of, config_of(folder, tmp_path / "run", {"every": 4, **evaluate}, **sections))
        assert first == second
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return first

    assert "holds no statistics; make some" in problems({"reference": str(folder / "images.npz")})
    assert "nowhere.npz: no readable .npz file" in problems({"reference": str(folder / "nowhere.npz")})
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    weights = str(tmp_path / "inception.pth")
    assert "inception.pth: not found" in problems(
        {"reference": str(tmp_path / "adm.npz"), "inception_weights": weights}
    )
    small = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", arr_0=small)
    made = make_reference(tmp_path / "other.npz", tmp_path / "small.npz", ClassifierExtractor())
    metadata = {**made.source.__dict__, "image_size": [16, 16]}
    with np.load(tmp_path / "other.npz") as file:
        np.savez(tmp_path / "other.npz", **{**file, "metadata": np.array(json.dumps(metadata))})
    assert "is of [16, 16] pixels, samples of this run have [32, 32]" in problems(
        {"reference": str(tmp_path / "other.npz")}
    )
    another = save_tiny_tokenizer(tmp_path / "another.safetensors", seed=1)
    both = config_of(folder, tmp_path / "run", {"every": 4, "reference": str(folder / "nowhere.npz")})
    both.data.tokenizer = str(another)
    (text, _) = pair.run(error_of, both)
    assert "another.safetensors: SHA-256" in text and "nowhere.npz: no readable" in text


def test_config_problems_name_the_key(folder, tmp_path):
    config = config_of(folder, tmp_path, {"every": 4, "reference": None, "weights": "ema"})
    text = "\n".join(problems_of(config))
    assert "evaluate.reference: missing" in text
    assert "evaluate.weights: ema, but optimizer.ema_decay is 0" in text
    assert not problems_of(config_of(folder, tmp_path, {"every": 0, "reference": None}))
    config = config_of(folder, tmp_path, {"every": 4})
    config.data.class_dropout = 0
    (text,) = problems_of(config)
    assert "evaluate.cfg_scale: 1.5, but data.class_dropout is 0" in text


def test_evaluating_is_no_part_of_what_a_run_is(folder, tmp_path):
    """Runs from before these keys go on, and any of them may change when a run is resumed."""
    plain, evaluated = (config_of(folder, tmp_path, {"every": every, "images": 7 + every}) for every in (0, 5))
    assert not evaluated.differences_from(plain.fixed_keys())
    assert "evaluate" not in plain.fixed_keys()


def test_a_distance_needs_two_images():
    with pytest.raises(UserError, match="at least 2 images"):
        statistics(np.zeros((1, 3)))
