"""`npp evaluate --sweep`: a table and a plot over guidance scales or checkpoints, with existing samples used again."""

import gc
import json
import shutil
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from extractors import Projection, random_images
from image_sets import save_tiny_tokenizer
from npp_ds.checkpoint.open import open_weights
from npp_ds.cli import app
from npp_ds.distributed.environment import ProcessInfo
from npp_ds.distributed.work_queue import WorkQueue
from npp_ds.errors import UserError
from npp_ds.evaluation.evaluate import evaluate_images, load_reference
from npp_ds.evaluation.images import open_images
from npp_ds.evaluation.sweep import Settings, open_sweep, run_sweep, sample_share
from npp_ds.sampling import job
from npp_ds.sampling.logits_processing import Options
from sample_sets import tiny_run

SETTINGS = Settings(per_class=6, options=Options(seed=4), batch_size=7)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with checkpoints after steps 60 and 120 whose images are of 16 x 16."""
    for step in (60, 120):
        tiny_run(tmp_path / "run", seed=step, step=step)
    return tmp_path / "run"


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=random_images(40, 0, size=16))
    return load_reference(tmp_path / "real.npz", Projection(16))


def no_sampling(monkeypatch) -> None:
    def sample_images(*_, **__):
        raise AssertionError("sampled images that existed")

    monkeypatch.setattr(job, "sample_images", sample_images)


def test_each_guidance_scale_has_a_row_and_existing_samples_are_used_again(run_dir, reference, tmp_path, monkeypatch):
    extractor = Projection(16)
    results, folder = run_sweep(open_sweep(run_dir, "cfg=3, 1", SETTINGS), reference, extractor)
    assert [r["value"] for r in results] == [r["samples"]["cfg_scale"] for r in results] == [1, 3]
    assert {(r["num_images"], r["samples"]["seed"], r["samples"]["checkpoint_step"]) for r in results} == {(18, 4, 120)}
    assert results[0]["frechet_distance"] != results[1]["frechet_distance"]
    for result in results:
        again = evaluate_images(open_images(result["samples_dir"]), reference, extractor)
        assert {"value": result["value"], **again} == result
        stored = json.loads((Path(result["samples_dir"]) / "evaluation.json").read_text())
        assert stored.pop("finished_at") and stored == again
    assert json.loads((folder / "sweep.json").read_text()) == {"sweep": "cfg", "results": results}
    text = (folder / "sweep.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0][:3]] == ["cfg", "Frechet distance", "spatial Frechet distance"]
    assert [row[0].strip() for row in rows[2:]] == ["1", "3"]
    assert [row[1].strip() for row in rows[2:]] == [f"{r['frechet_distance']:.2f}" for r in results]
    assert text.count("Warning: 18 samples are too few for 24 features") == 1
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > picture.height > 300 and len(set(picture.convert("L").tobytes())) > 10
    no_sampling(monkeypatch)
    wider, elsewhere = run_sweep(open_sweep(run_dir, "cfg=1,3", SETTINGS), reference, extractor, tmp_path / "out")
    assert wider == results and elsewhere == tmp_path / "out" and (elsewhere / "sweep.png").is_file()


def test_all_checkpoints_means_every_complete_one(run_dir, reference):
    incomplete = tiny_run(run_dir, step=200) / "checkpoints/step-00000200"
    next(incomplete.glob("*.safetensors")).write_bytes(b"damaged")
    sweep = open_sweep(run_dir, "checkpoint=all", SETTINGS)
    assert [point.value for point in sweep.points] == [60, 120]
    results, folder = run_sweep(sweep, reference, Projection(16))
    assert [r["samples"]["checkpoint_step"] for r in results] == [60, 120]
    assert results[0]["samples_sha256"] != results[1]["samples_sha256"]
    assert folder.name == "sweep-checkpoint" and "| checkpoint |" in (folder / "sweep.md").read_text()
    with pytest.raises(UserError, match="incomplete"):
        open_sweep(run_dir, "checkpoint=60,200", SETTINGS)


def test_each_checkpoint_is_sampled_at_the_side_of_its_stage_which_table_and_warnings_show(tmp_path, reference):
    for step, stage in ((60, 0), (120, 1)):
        tiny_run(tmp_path / "run", seed=step, step=step, stage=stage)
    results, folder = run_sweep(open_sweep(tmp_path / "run", "checkpoint=all", SETTINGS), reference, Projection(16))
    assert [(r["samples"]["patch_side"], r["samples"]["weights_patch_side"]) for r in results] == [(2, 2), (1, 1)]
    lines = (folder / "sweep.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[:2] for row in cells] == [["checkpoint", "patch side"], ["---", "---"], ["60", "2"], ["120", "1"]]
    coarse = "the samples are of patch side 2, blocks of one code repeated: not comparable"
    assert [sum(text.startswith(coarse) for text in r["warnings"]) for r in results] == [1, 0]
    forced = replace(SETTINGS, patch_side=1)
    (fine,), _ = run_sweep(open_sweep(tmp_path / "run", "checkpoint=60", forced), reference, Projection(16))
    assert fine["samples_sha256"] != results[0]["samples_sha256"]
    (warning,) = [text for text in fine["warnings"] if "patch side" in text]
    assert warning.startswith("the images were sampled at patch side 1 from weights of a stage of patch side 2")
    sweep = open_sweep(tmp_path / "run", "cfg=1,2", replace(SETTINGS, step=60))
    scales, _ = run_sweep(sweep, reference, Projection(16))
    assert [r["samples"]["patch_side"] for r in scales] == [2, 2]


@pytest.mark.parametrize("text", ["cfg=1,1.5,2", "checkpoint=all"])
def test_at_most_one_model_is_alive_and_none_while_its_samples_are_evaluated(run_dir, reference, monkeypatch, text):
    alive, most, judged = WeakSet(), [], []
    build = job.build_model

    def counted(*arguments):
        alive.add(model := build(*arguments))
        gc.collect()
        most.append(len(alive))
        return model

    class Judge(Projection):
        def __call__(self, images):
            gc.collect()
            judged.append(len(alive))
            return super().__call__(images)

    monkeypatch.setattr(job, "build_model", counted)
    results, _ = run_sweep(open_sweep(run_dir, text, SETTINGS), reference, Judge(16))
    assert most == [1] * len(results) and set(judged) == {0}


def test_guidance_scales_are_of_one_checkpoint_though_the_run_continues(run_dir, reference, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "npp_ds.evaluation.sweep.open_weights", lambda *a, **k: opened.append(open_weights(*a, **k)) or opened[-1]
    )
    sweep = open_sweep(run_dir, "cfg=1,2,3", SETTINGS)
    tiny_run(run_dir, seed=1, step=180)
    results, _ = run_sweep(sweep, reference, Projection(16))
    assert len(opened) == 1 and {r["samples"]["checkpoint_step"] for r in results} == {120}


def test_a_sweep_waits_for_samples_of_other_processes_and_samples_the_parts_they_abandon(
    run_dir, reference, tmp_path, monkeypatch
):
    monkeypatch.setattr("npp_ds.evaluation.sweep.POLL_SECONDS", 0.05)
    shutil.copytree(run_dir, tmp_path / "run of one process")
    expected, _ = run_sweep(open_sweep(tmp_path / "run of one process", "cfg=1,2", SETTINGS), reference, Projection(16))
    sweep, places = open_sweep(run_dir, "cfg=1,2", SETTINGS), [ProcessInfo(rank, rank, 2) for rank in range(2)]
    other = sweep.sampling(sweep.points[0])
    with WorkQueue(other.work, 1, 2) as queue:
        assert list(islice(queue.take(1, lambda part: False), 1)) == [0]
        died = threading.Timer(0.5, queue.release, [0])
        died.start()
        first, _ = run_sweep(replace(sweep, points=sweep.points[:1]), reference, Projection(16), process=places[0])
        died.join()
    sample_share(sweep, places[1])
    no_sampling(monkeypatch)
    results, _ = run_sweep(sweep, reference, Projection(16), process=places[0])
    digests = [[result["samples_sha256"] for result in some] for some in (expected, results)]
    assert digests[0] == digests[1] and first[0]["samples_sha256"] == digests[0][0]


def test_an_interrupted_sweep_has_its_first_rows_and_resumes(run_dir, reference, monkeypatch):
    extractor = Projection(16)

    class Interrupting(Projection):
        def __call__(self, images):
            if self.seen >= 18:
                raise KeyboardInterrupt
            return super().__call__(images)

    sweep = open_sweep(run_dir, "cfg=1,2", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, reference, Interrupting(16))
    folder = run_dir / "samples/sweep-cfg"
    assert [r["value"] for r in json.loads((folder / "sweep.json").read_text())["results"]] == [1]
    no_sampling(monkeypatch)
    results, _ = run_sweep(open_sweep(run_dir, "cfg=1,2", SETTINGS), reference, extractor)
    assert [r["value"] for r in results] == [1, 2]


def test_the_command_sweeps_and_prints_the_table(run_dir, reference, monkeypatch):
    monkeypatch.setattr("npp_ds.evaluation.evaluate.load_extractor", lambda name, weights: Projection(16))

    def npp(*arguments) -> str:
        arguments = ["evaluate", *map(str, arguments), "--reference", reference.path, "--per-class", "3"]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    out = npp(run_dir, "--sweep", "checkpoint=60,120", "--cfg-scale", "2", "--seed", "7", "--labels", "random")
    folder = run_dir / "samples/sweep-checkpoint"
    assert (folder / "sweep.md").read_text() in out and str(folder) in out
    results = json.loads((folder / "sweep.json").read_text())["results"]
    assert {(r["samples"]["cfg_scale"], r["samples"]["seed"], r["samples"]["labels"]) for r in results} == {
        (2, 7, "random")
    }
    assert {tuple(r["image_size"]) for r in results} == {(16, 16)}
    np.savez(reference.path, arr_0=random_images(40, 0, size=8))
    monkeypatch.setattr("npp_ds.evaluation.evaluate.load_extractor", lambda name, weights: Projection(8))
    mine = str(save_tiny_tokenizer(run_dir / "mine.safetensors", seed=1))
    npp(run_dir, "--sweep", "cfg=2", "--image-size", "8", "--tokenizer", mine)
    (small,) = json.loads((run_dir / "samples/sweep-cfg/sweep.json").read_text())["results"]
    assert small["image_size"] == [8, 8] and small["samples"]["labels"] == "balanced"
    assert small["samples"]["tokenizer"]["name"] == "mine.safetensors"
    with pytest.raises(UserError, match="sweep: found no weights"):
        npp("--sweep", "cfg=1")
    for variable, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)
    assert npp(run_dir, "--sweep", "cfg=1", "--seed", "8") == ""
    assert list(run_dir.glob("samples/*cfg-1-seed-8*/.unfinished/000000.npy")), "its share of the samples"


@pytest.mark.parametrize("text", ["cfg", "cfg=", "cfg=1,x", "seed=1,2", "checkpoint=1.5", "checkpoint="])
def test_sweeps_over_nothing_or_nonsense_are_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"sweep: found '.*', expected cfg=1\.5,1\.75,2\.0 or checkpoint=1000,2000"):
        open_sweep(tmp_path, text, SETTINGS)
    with pytest.raises(UserError, match="no checkpoint to sweep over"):
        open_sweep(tmp_path, "checkpoint=all", SETTINGS)
