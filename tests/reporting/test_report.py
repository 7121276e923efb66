"""The report of a run: figures from a hand-made metrics.jsonl, the table, the plot, the self-contained page."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from npp_ds.config.schedule import Schedule, Stage
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.reporting.plot import MOST_POINTS, axis_knots, binned, panels, plot_data, plot_run
from npp_ds.reporting.report import picture, report_runs, with_terms
from npp_ds.reporting.summary import RunData, RunSummary, print_summary, read_run, summarize
from npp_ds.training.metrics import read_events, stages_begun

ROOT = Path(__file__).parents[2]
RATES = {4: 800.0, 2: 200.0, 1: 50.0}
EVALUATION = {
    "frechet_distance": 3.25,
    "class_agreement": 0.785,
    "reference_class_agreement": 0.91,
    "num_images": 400,
    "num_reference_images": 1000,
    "extractor": "tiny-features",
    "samples": {"cfg_scale": 2.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 11},
}

ENVIRONMENT = {
    "started_at": "2026-01-31T12:00:00.000+00:00",
    "git_commit": "0123abcd+",
    "npp_ds": "0.1.0",
    "python": "3.11.7",
    "versions": {"torch": "2.14.1", "flash-attn": None},
    "platform": "Linux-6.18",
    "device": "NVIDIA H100 80GB HBM3",
    "cpu_cores": 96,
    "world_size": 8,
}


def make_stage(index: int, patch_side: int, start_step: int, end_step: int) -> Stage:
    return Stage(
        index=index,
        patch_side=patch_side,
        start_step=start_step,
        end_step=end_step,
        start_epoch=start_step // 10,
        steps_per_epoch=10,
        batch_size=20,
        micro_batch_size=20,
        peak_learning_rate=1e-3,
        final_learning_rate=1e-4,
        warmup_steps=5,
        decay_steps=5,
    )


STAGES = (make_stage(0, 4, 0, 20), make_stage(1, 2, 20, 40), make_stage(2, 1, 40, 100))
CONFIG = RunConfig(
    name="tiny-run",
    model={"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "grid_size": 8, "num_classes": 3},
    data={"train": "/none"},
    schedule={
        "batch_size": 20,
        "warmup_epochs": 0.5,
        "stages": [
            {"patch_side": 4, "epochs": 2, "decay_fraction": 5 / 20},
            {"patch_side": 2, "epochs": 2, "decay_fraction": 5 / 20},
            {"patch_side": 1, "epochs": 6, "decay_fraction": 5 / 60},
        ],
    },
    optimizer={"learning_rate": 1e-3, "final_learning_rate": 1e-4},
)  # on 200 images: `STAGES`


def run_lines(last_step: int = 100) -> list[dict]:
    """Return a line every 5 steps at exactly `RATES` (half in the first of a stage), and validations at stage ends."""
    lines, elapsed = [], 0.0
    for stage in STAGES:
        shape = {k: v for k, v in asdict(stage).items() if k not in ("index", "start_step")}
        lines.append(
            {"event": "stage", "step": stage.start_step, "stage": stage.index, "elapsed_seconds": elapsed, **shape}
        )
        for done in range(stage.start_step + 5, stage.end_step + 1, 5):
            rate = RATES[stage.patch_side]
            elapsed += 5 * stage.batch_size / rate
            lines.append(
                {
                    "event": "train",
                    "step": done,
                    "stage": stage.index,
                    "patch_side": stage.patch_side,
                    "epoch": stage.epoch_at(done - 1)[0],
                    "loss": 6 - done / 25,
                    "learning_rate": stage.learning_rate(done - 1),
                    "grad_norm": 0.5,
                    "images_per_second": rate / 2 if done == stage.start_step + 5 else rate,
                    "elapsed_seconds": elapsed,
                }
            )
        for side in sorted({1, stage.patch_side}):
            validation = {"event": "validation", "step": stage.end_step, "stage": stage.index, "patch_side": side}
            lines.append({**validation, "nll": 5 - stage.end_step / 40 + side / 10})
    lines = [line for line in lines if line["step"] <= last_step]
    return lines if last_step < 100 else [*lines, {"event": "end", "step": 100, "elapsed_seconds": elapsed}]


def write_lines(path, lines: list[dict], incomplete: str = "") -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + incomplete)


@pytest.fixture
def run_dir(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", run_lines())
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    samples = tmp_path / "samples/step-00000100"
    samples.mkdir(parents=True)
    (samples / "evaluation.json").write_text(json.dumps(EVALUATION))
    Image.fromarray(np.full((6, 6, 3), 77, np.uint8)).save(samples / "grid.png")
    return tmp_path


def figures_of(lines: list[dict], **arguments) -> RunSummary:
    """Return the figures of a run of these lines that has no folder."""
    return summarize(RunData(Path("/none"), CONFIG, {}, lines), "run", **arguments)


def test_stages_add_up_and_measured_cost_is_relative_to_the_rate_at_side_one():
    summary = figures_of(run_lines())
    assert [s.patch_side for s in summary.stages] == [4, 2, 1]
    assert [s.steps for s in summary.stages] == [20, 20, 60]
    assert [s.epochs for s in summary.stages] == [2, 2, 6]
    assert [s.images_per_second for s in summary.stages] == [800, 200, 50]
    assert [s.seconds for s in summary.stages] == pytest.approx([0.5, 2, 24])
    assert summary.total("images") == 2000 and summary.total("seconds") == pytest.approx(26.5)
    assert summary.time_cost == pytest.approx(26.5 / (2000 / 50))
    assert summary.validation_nll == pytest.approx(2.6) and summary.validation_step == 100
    assert summary.finished


def test_the_validation_is_that_of_the_moving_average_if_only_this_was_validated():
    lines = run_lines()
    assert "nats per code after step 100" in printed(figures_of(lines))
    of_average = [line | {"event": "validation_ema"} if line["event"] == "validation" else line for line in lines]
    assert "2.6000 nats per code by the moving average after step 100" in printed(figures_of(of_average))


def test_an_unfinished_run_is_summed_up_to_its_last_line(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", run_lines(last_step=30), incomplete='{"event": "train", "step": 31, "lo')
    summary = figures_of(read_events(tmp_path / "metrics.jsonl"))
    assert [(s.steps, s.planned_steps) for s in summary.stages] == [(20, 20), (10, 20), (0, 60)]
    assert [s.seconds for s in summary.stages] == pytest.approx([0.5, 1, 0])
    assert summary.time_cost is None and not summary.finished
    assert summary.stages[2].images_per_second is None and summary.stages[2].loss is None


def test_a_resumed_run_reads_like_one_that_was_never_stopped(tmp_path):
    before, after = run_lines(last_step=30), [line for line in run_lines() if line["step"] > 30]
    write_lines(tmp_path / "metrics.jsonl", [*before, *after])
    assert figures_of(read_events(tmp_path / "metrics.jsonl")) == figures_of(run_lines())


def test_the_stage_table_is_read_back_from_the_metrics():
    assert tuple(stages_begun(run_lines())) == STAGES
    assert tuple(stages_begun(run_lines(last_step=30))) == STAGES[:2]
    of_earlier_versions = [{k: v for k, v in line.items() if k != "dropout_scale"} for line in run_lines()]
    assert tuple(stages_begun(of_earlier_versions)) == STAGES


def printed(summary, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(summary, console)
    return console.file.getvalue()


def test_the_closing_table_has_all_figures_that_are_known():
    summary = replace(
        figures_of(run_lines(), next_steps=["npp sample runs/x"]),
        name="run [1]",
        evaluation=EVALUATION,
        files=[("metrics", "runs/[x]/metrics.jsonl")],
    )
    text = printed(summary)
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[0] == ["1", "4", "2", "20", "0.5 s", "800", "5.2000"]
    assert rows[2] == ["3", "1", "6", "60", "24.0 s", "50", "2.0000"]
    assert rows[3] == ["all", "", "10", "100", "26.5 s", "75", ""]
    for piece in (
        "0.662 in positions, 0.659 in FLOPs, 0.662 in measured time",
        "2.6000 nats per code after step 100",
        "78.5% (real images: 91.0%)",
        "3.25 to 1,000 real images, features of tiny-features",
        "400 images, CFG 2.5, temperature 1, top-k all, top-p 1, seed 11",
        "runs/[x]/metrics.jsonl",
        "npp sample runs/x",
    ):
        assert piece in text
    long_path = "runs/" + "x" * 200 + "/metrics.jsonl"
    assert long_path in printed(replace(summary, files=[("metrics", long_path)]), width=60)
    assert "not finished" in printed(figures_of(run_lines(30)))


def test_the_closing_table_has_mfu_and_waiting_times_if_they_are_known():
    lines = run_lines()
    plain = printed(figures_of(lines))
    assert not any(word in plain for word in ("MFU", "waiting", "memory")), "lines of older runs lack them"
    for line in lines:
        if line["event"] == "train":
            side, is_first = line["patch_side"], line["step"] in (5, 25, 45)
            shares = {"mfu": 0.4 / side, "data_wait_share": 0.012}
            line |= {name: 0.9 if is_first else value for name, value in shares.items()}
            line["peak_memory_gb"] = 20.0 / side
    summary = figures_of(lines)
    assert [s.mfu for s in summary.stages] == [0.1, 0.2, 0.4], "the first line of a stage apart"
    text = printed(summary)
    for what, shares in (
        ("MFU", "10.0% at side 4, 20.0% at side 2, 40.0% at side 1"),
        ("waiting for data", "1.2% at side 4, 1.2% at side 2, 1.2% at side 1"),
        ("peak memory", "20 GB in the process with the most"),
    ):
        assert re.search(f"^{what} +{shares}", text, re.MULTILINE), text
    for line in lines:
        line["mfu"] = None
    assert "MFU" not in printed(figures_of(lines)), "that of a CPU is unknown"


@pytest.mark.parametrize("last_step", [5, 30, 100])
def test_the_plot_shows_each_stage_in_its_shade_at_any_point_of_the_run(last_step):
    run = RunData(Path("/none"), CONFIG, {}, run_lines(last_step))
    picture = Image.open(io.BytesIO(plot_run(run))).convert("RGB")
    assert picture.size == (1210, 770 if last_step == 5 else 1155), "two panels a row; validation comes later"
    pixels = np.asarray(picture).reshape(-1, 3)
    for shade in ((0xE3, 0xED, 0xF7), (0xFD, 0xF0, 0xDD), (0xE6, 0xF3, 0xE6)):
        assert (pixels == shade).all(1).mean() > 0.02
    assert (pixels == (0x48, 0x78, 0xA8)).all(1).sum() >= (0 if last_step == 5 else 50)


class Page(HTMLParser):
    """Collects text, image sources and every address a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.text, self.images, self.fetched, self.open = "", [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        elif tag in ("link", "iframe") or (tag == "script" and "src" in values):
            self.fetched.append(tag)
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path: Path) -> Page:
    """The page, which is well-formed and fetches nothing."""
    page, text = Page(), path.read_text()
    page.feed(text)
    assert page.open == [] and page.fetched == [] and not re.search(r"https?:|url\((?!#)|@import", text)
    return page


def test_the_page_is_one_file_with_pictures_and_all_figures(run_dir):
    (summary,) = report_runs([run_dir], next_steps=["npp sample <run> & look"])
    page = read_page(run_dir / "report.html")
    assert len(page.images) == 1 and all(src.startswith("data:image/png;base64,iVBOR") for src in page.images)
    for piece in ("tiny-run", "78.5%", "2.6000 nats per code", "0.662", "npp sample <run> & look", "ffn_multiple_of"):
        assert piece in page.text
    assert Image.open(run_dir / "training.png").size == (1210, 1155)
    assert dict(summary.files)["samples to look at"] == str(run_dir / "samples/step-00000100/grid.png")
    assert "checkpoints" not in dict(summary.files)
    schedule = Schedule(STAGES)
    assert summary.token_cost == schedule.token_cost() == pytest.approx((20 / 16 + 20 / 4 + 60) / 100)
    assert summary.token_cost * 0.9 < summary.flop_cost < summary.token_cost


def test_stages_that_an_unfinished_run_has_not_begun_are_those_of_its_config(run_dir):
    write_lines(run_dir / "metrics.jsonl", run_lines(last_step=30))
    assert read_run(run_dir).schedule == Schedule(STAGES)
    (summary,) = report_runs([run_dir])
    assert summary.token_cost == Schedule(STAGES).token_cost()


def test_reports_are_made_without_torch():
    code = "import sys, npp_ds.reporting.report, npp_ds.config.load, npp_ds.data.shards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_a_run_without_samples_or_lines_is_handled(run_dir):
    (run_dir / "samples/step-00000100/evaluation.json").unlink()
    (summary,) = report_runs([run_dir])
    assert summary.evaluation == {} and "Frechet" not in printed(summary)
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training line yet"):
        report_runs([run_dir])


def test_the_page_names_date_commit_hardware_data_parameters_and_how_to_repeat_the_run(run_dir):
    report_runs([run_dir])
    text = read_page(run_dir / "report.html").text
    for piece in (
        "2026-01-31 12:00 UTC",
        "0123abcd, with changed files",
        "8 x NVIDIA H100 80GB HBM3, 96 CPU cores; Linux-6.18",
        "npp_ds 0.1.0, Python 3.11.7, torch 2.14.1\n",
        "/none",
        "M parameters: 2 layers, width 32, 2 heads; 8 x 8 codes out of 64, 3 classes",
        "git checkout 0123abcd\ntorchrun --standalone --nproc-per-node 8 -m npp_ds train --config "
        f"{run_dir}/config.yaml run_dir={run_dir}-again",
        "Why validation at patch side 1 may rise in coarse stages",
        "could not be read here: /none: these shards are not on this machine",
    ):
        assert piece in text, piece
    (run_dir / "environment.json").unlink()
    report_runs([run_dir])
    assert f"npp train --config {run_dir}/config.yaml" in read_page(run_dir / "report.html").text


def test_several_runs_have_one_page_that_writes_nothing_into_their_folders(run_dir, tmp_path):
    folders = [tmp_path / "runs" / name for name in ("<img src=x onerror=alert(1)>", "b")]
    for folder in folders:
        shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("runs"))
    write_lines(folders[1] / "metrics.jsonl", run_lines(last_step=30))
    config = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(config.replace("val: null", "val: other"))
    (folders[0] / "config.yaml").write_text(config.replace("val: null", "val: held-out"))
    before = {*tmp_path.rglob("*")}
    summaries = report_runs(folders)
    assert sorted({*tmp_path.rglob("*")} - before) == [tmp_path / "runs" / "comparison.html"]
    assert [s.finished for s in summaries] == [True, False]
    assert [s.name for s in summaries] == [str(folder) for folder in folders], "runs of one name are called by folders"
    assert all(str(tmp_path / "runs" / "comparison.html") in printed(s) for s in summaries)
    page = read_page(tmp_path / "runs" / "comparison.html")
    assert "x" not in page.images, "the name of a folder is text"
    assert all(str(folder) in page.text for folder in folders), "runs of one name are called by their folders"
    assert "validated on different images" in page.text
    assert "evaluated with different settings" not in page.text
    shutil.copytree(folders[0] / "samples/step-00000100", folders[1] / "samples/new")
    record = {"finished_at": "2999", "samples": {**EVALUATION["samples"], "cfg_scale": 99}}
    (folders[1] / "samples/new/evaluation.json").write_text(json.dumps(EVALUATION | record))
    report_runs(folders)
    page = read_page(tmp_path / "runs" / "comparison.html")
    assert "The samples of the runs are evaluated with different settings" in page.text
    report_runs(folders, out=tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").is_file()


def test_terms_are_explained_where_they_first_stand_and_all_else_is_escaped():
    html = str(with_terms("<b> MFU & mfu, patch side, sides"))
    assert html.startswith('&lt;b&gt; <a class="term" href="#term-mfu" aria-describedby="term-mfu">MFU<span')
    assert html.endswith(", sides") and "&amp; mfu, <a" in html and html.count("<a ") == 2


def test_many_lines_become_few_points_that_keep_mean_and_extremes():
    lines = [{"event": "train", "step": step, "loss": 1.0 + (step == 777) * 9} for step in range(1, 1501)]
    lines[5]["loss"], lines[6]["loss"], lines[7]["loss"] = None, float("nan"), float("inf")
    points = binned(lines, "loss")
    assert len(points) == MOST_POINTS and max(high for *_, high in points) == 10
    assert all(1 <= mean < 2 and low == 1 for _, mean, low, _ in points)
    assert binned(lines[:8], "loss") == [[step, 1.0] for step in range(1, 6)]
    assert binned(lines[5:8], "loss") == [] and binned([], "loss") == []


def test_large_pictures_are_stored_smaller():
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 1200, 3), np.uint8)).save(noise, "PNG")
    stored = picture(noise.getvalue(), "", "").source
    assert stored.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(stored.partition(",")[2]))) as image:
        assert image.size == (1024, 512)


def test_a_page_of_many_steps_is_small(run_dir):
    report_runs([run_dir])
    small = (run_dir / "report.html").stat().st_size
    lines = [line for line in run_lines() if line["event"] != "train"]
    train = [line for line in run_lines() if line["event"] == "train"]
    lines += [{**line, "step": line["step"], "loss": i / 7} for line in train for i in range(1000)]
    write_lines(run_dir / "metrics.jsonl", lines)
    report_runs([run_dir])
    assert (run_dir / "metrics.jsonl").stat().st_size > 3e6
    assert (run_dir / "report.html").stat().st_size < small + 100_000


def test_each_step_has_its_place_on_every_axis(run_dir):
    run = read_run(run_dir)
    knots = {int(row[0]): row[1:].tolist() for row in axis_knots(run)}
    flops = run.config.model.training_flops
    per_stage = [20 * 20 * flops(4), 20 * 20 * flops(16), 60 * 20 * flops(64)]
    assert knots[0] == [0, 0, 0]
    assert knots[20] == pytest.approx([2, per_stage[0], 0.5])
    assert knots[100] == pytest.approx([10, sum(per_stage), 26.5])
    data = plot_data([run], panels([run], ["run"]))
    assert data["axes"] == ["step", "epoch", "TFLOPs", "seconds of training"]
    assert data["runs"][0]["stages"] == [[0, 20, 4], [20, 40, 2], [40, 100, 1]]
    assert data["runs"][0]["knots"][-1] == pytest.approx([100, 10, sum(per_stage) / 1e12, 26.5], rel=1e-6)
    assert [panel["key"] for panel in data["panels"]] == ["validation", "loss", "rate", "speed", "gradients"]
    side_1, own = data["panels"][0]["curves"]
    assert side_1["parts"] == [[[20, 4.6], [40, 4.1], [100, 2.6]]] and own["parts"] == [[[20, 4.9], [40, 4.2]]]
