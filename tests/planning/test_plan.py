"""A plan's numbers: FLOPs and costs as published, memory as measured, time from documented rates."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from npp_ds.cli import app
from npp_ds.config.load import load_config, recipe_names
from npp_ds.config.schema import RunConfig
from npp_ds.errors import UserError
from npp_ds.planning import mfu
from npp_ds.planning.memory import training_memory
from npp_ds.planning.mfu import Mfu
from npp_ds.planning.plan import IMAGENET, Plan, make_plan
from npp_ds.planning.table import duration, milliseconds
from npp_ds.reporting.plot import write_schedule
from npp_ds.utils.gpu_specs import GPUS, find_gpu
from shard_sets import write_set

ROOT = Path(__file__).parents[2]
DOCUMENTED = ROOT / "docs/planning.md"


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch) -> Path:
    """Where a file of measured MFUs would lie: these tests do not depend on the committed one."""
    path = tmp_path / "benchmarks/results/mfu_gpu.json"
    monkeypatch.setattr(mfu, "RESULTS", path)
    return path


def plan_of(recipe: str = "xxl_256", *overrides: str, gpus: int = 32, gpu: str = "h100", **arguments) -> Plan:
    config = load_config(recipe, None, overrides, gpus)
    return make_plan(config, GPUS[gpu], gpus, **arguments)


@pytest.mark.parametrize(
    "sides, token_cost", [("[2, 1]", 0.625), ("[4, 2, 1]", 0.578), ("[8, 4, 2, 1]", 0.572), ("[1]", 1.0)]
)
def test_plan_gives_the_published_costs(sides, token_cost):
    plan = plan_of("xxl_256", f"schedule.patch_sides={sides}")
    assert plan.token_cost == pytest.approx(token_cost, abs=0.001)
    assert plan.flop_cost <= plan.token_cost
    assert plan.flop_cost == pytest.approx(token_cost, abs=0.005)


def test_plan_counts_steps_flops_and_days_of_every_stage():
    plan = plan_of("xxl_256", mfu=0.5)
    assert plan.images == IMAGENET
    assert plan.parameters == pytest.approx(1.411e9, rel=1e-3)
    coarse, fine = plan.stages
    assert (coarse.steps, coarse.positions, coarse.epochs) == (150 * (IMAGENET // 256), 64, 150)
    assert (fine.steps, fine.positions, fine.epochs) == (150 * (IMAGENET // 256), 256, 150)
    # 6 FLOPs per parameter in a matrix and position (all but the embedding tables), and attention on top of that.
    matrices = plan.parameters - 1536 * (16384 + 1001)
    assert fine.flops / (fine.steps * 256 * 256 * 6 * matrices) == pytest.approx(1.014, abs=0.005)
    assert plan.flops == coarse.flops + fine.flops
    assert (coarse.limit, fine.limit) == ("communication", "compute") and fine.mfu == Mfu(0.5, "given")
    seconds = fine.flops / fine.steps / (32 * GPUS["h100"].tflops * 1e12 * 0.5)
    assert fine.compute_seconds == pytest.approx(seconds)
    hours = sum(s.steps * max(s.compute_seconds, s.communication_seconds) / 3600 for s in plan.stages)
    assert (plan.days, plan.gpu_hours) == (pytest.approx(hours / 24), pytest.approx(hours * 32))


def test_communication_of_a_step_is_that_of_ring_collectives():
    plan = plan_of("xxl_256", gpus=32)
    around = 31 / 32 * plan.parameters / 400e9
    assert plan.stages[0].communication_seconds == pytest.approx((4 + 4) * around)  # gradients to owners, weights
    sent = {(n.settings, n.precision): n.communication_seconds / around for n in plan.networks}
    assert sent == pytest.approx(
        {
            ("zero1", "autocast_bf16"): 8, ("zero2", "autocast_bf16"): 8, ("zero3", "autocast_bf16"): 4 + 2 * 4,
            ("zero2_bf16_gradients", "autocast_bf16"): 6, ("zero2", "bf16"): 6, ("zero2_bf16_gradients", "bf16"): 4,
            ("zero3", "bf16"): 8,
        }
    )  # fmt: skip
    smaller = {(n.settings, n.precision): n.bytes_per_parameter for n in plan_of("xl_256", gpus=32).networks}
    assert smaller["zero3", "autocast_bf16"] == pytest.approx(31 / 32 * (4 + 4)), "below 10^9: gathered once"
    alone = plan_of("b_256", gpus=1)
    assert {s.communication_seconds for s in alone.stages} == {0}
    assert {s.limit for s in alone.stages} == {"compute"}


def test_zero_divides_what_it_says_it_divides():
    plan = plan_of("xxl_256", "optimizer.ema_decay=0.9999", gpus=32)
    count = plan.parameters
    for zero in plan.zero:
        memory = zero.memory
        assert memory.optimizer == pytest.approx(12 * count / 32, rel=1e-6)
        assert memory.ema == pytest.approx(4 * count / 32, rel=1e-6)
        assert max(memory.weights, memory.activations) < memory.peak <= sum(vars(memory).values()) - memory.peak
    first, second, third = (zero.memory for zero in plan.zero)
    assert first.gradients == pytest.approx(4 * count * 33 / 32, rel=1e-6)
    assert second.gradients == third.gradients == pytest.approx(4 * count / 32, rel=1e-6)
    assert first.weights == second.weights == 4 * count
    assert third.weights == pytest.approx(4 * count / 32 + 4e9), "no more than 10^9 parameters are gathered at once"
    assert [zero.is_chosen for zero in plan.zero] == [False, True, False]


def test_weights_in_bf16_take_half_and_zero_1_is_left_out_as_training_refuses_it():
    plan = plan_of("xxl_256", "precision=bf16", gpus=32)
    assert [zero.zero_stage for zero in plan.zero] == [2, 3]
    with pytest.raises(UserError, match=r"precision: bf16 with deepspeed\.config zero1"):
        plan_of("b_256", "precision=bf16", "deepspeed.config=zero1", gpus=8)
    assert plan.zero[0].memory.weights == 2 * plan.parameters
    assert plan.zero[0].memory.optimizer == pytest.approx(12 * plan.parameters / 32, rel=1e-6)


def test_the_micro_batch_is_the_largest_that_fits_and_the_rest_is_accumulated():
    plan = plan_of("xxl_256", gpus=8, gpu="rtx4090")
    fine = plan.stages[-1]
    assert fine.micro_batch_size * fine.gradient_accumulation_steps * 8 == 256
    assert 1 <= fine.micro_batch_size < 32
    zero = plan.zero[1]
    assert zero.fits and zero.memory.peak <= 0.9 * 24e9
    config = load_config("xxl_256")
    settings = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 200_000_000}
    larger = training_memory(config, settings, 8, 2 * fine.micro_batch_size, 1, True)
    assert larger.peak > 0.9 * 24e9
    assert plan_of("xxl_256", "schedule.micro_batch_size=2", gpus=8).stages[-1].micro_batch_size == 2


def test_a_run_that_fits_no_gpu_is_a_warning():
    result = CliRunner().invoke(app, ["plan", "--recipe", "2b_256", "--gpus", "1", "--gpu", "rtx4090"])
    assert result.exit_code == 0, result.output
    assert "WARNING: the run does not fit this GPU" in result.output


def test_times_of_fp32_are_not_those_of_the_peak_of_bf16():
    (warning,) = plan_of("b_256", "precision=fp32", gpus=8).warnings
    assert "give the GPU's fp32 rate with --gpu-tflops" in warning
    config = load_config("b_256", overrides=["precision=fp32"])
    assert not make_plan(config, find_gpu("h100", None, 67, None), 8).warnings


def test_a_configured_micro_batch_that_does_not_fit_is_a_warning_with_one_that_does():
    arguments = ["plan", "--recipe", "xxl_384", "--gpus", "8", "--gpu", "h100"]
    assert "WARNING" not in CliRunner().invoke(app, arguments).output
    output = CliRunner().invoke(app, [*arguments, "schedule.micro_batch_size=32"]).output
    output = " ".join(output.split())
    assert "WARNING: 32 images at a time, as configured, do not fit" in output
    assert "set schedule.micro_batch_size=16" in output
    (warning,) = json.loads(CliRunner().invoke(app, [*arguments, "schedule.micro_batch_size=32", "--json"]).stdout)[
        "warnings"
    ]
    assert warning in output


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_activation_checkpointing_lowers_the_expected_memory(mode):
    plain, less = (
        plan_of("xxl_256", f"model.activation_checkpointing={m}", gpus=8).zero[1].memory for m in ("none", mode)
    )
    assert less.activations < {"selective": 0.75, "block": 0.35}[mode] * plain.activations
    assert less.peak < plain.peak


def test_the_plan_shows_the_time_with_and_without_larger_coarse_batches():
    plan = plan_of("xxl_256", gpus=32)
    without, with_it = plan.batch_scalings
    assert (without.coarse_batch_scale, with_it.coarse_batch_scale) == (1, 4)
    assert without.days == plan.days
    asked = plan_of("xxl_256", "schedule.coarse_batch_scale=4", gpus=32)
    assert asked.days == with_it.days == asked.batch_scalings[1].days
    assert asked.stages[0].batch_size == 1024
    assert plan.stages[0].limit == "communication"
    assert with_it.days < without.days
    assert plan_of("ntp_xxl_256").batch_scalings == []


def test_the_time_saved_is_that_of_the_flops_only_where_compute_limits():
    alone = plan_of("xxl_256", gpus=1)
    assert {s.limit for s in alone.stages} == {"compute"}
    assert alone.time_cost == pytest.approx(alone.flop_cost, rel=1e-6)
    many = plan_of("xxl_256", gpus=32)
    coarse, fine = many.stages
    next_token_hours = (coarse.steps + fine.steps) * fine.step_seconds / 3600
    assert many.time_cost == pytest.approx((coarse.hours + fine.hours) / next_token_hours)
    assert many.time_cost > 0.8 > 0.63 > many.batch_scalings[1].time_cost
    assert plan_of("ntp_xxl_256").time_cost == pytest.approx(1)


def test_images_are_those_of_the_shards_where_there_are_any(tmp_path):
    write_set(tmp_path / "train", 640, 2)
    shards = f"data.train={tmp_path / 'train'}"
    plan = plan_of("b_256", shards, gpus=2)
    assert (plan.images, plan.images_source) == (640, str(tmp_path / "train"))
    assert plan_of("b_256", shards, gpus=2, images=5000).images == 5000
    with pytest.raises(UserError, match=r"exceeds the 100 training images"):
        plan_of("b_256", images=100)


CASES = [
    {"size": "XXL", "patch_side": 1, "way": "engine eager", "mfu": 0.5, "gpu": "h100", "seconds": 1.5},
    {"size": "XXL", "patch_side": 1, "way": "engine compiled", "mfu": 0.55, "gpu": "h100", "seconds": 1.4},
    {"size": "XXL", "patch_side": 1, "way": "bare eager", "mfu": 0.45, "gpu": "h100", "seconds": 1.6},
    {"size": "XXL", "patch_side": 2, "way": "engine eager", "mfu": None, "gpu": "h100", "failed": "out of memory"},
    {"size": "B", "patch_side": 1, "way": "engine eager", "mfu": 0.3, "gpu": "h100", "seconds": 0.2},
    {"size": "B", "patch_side": 2, "way": "engine eager", "mfu": 0.2, "gpu": "h100", "seconds": 0.1},
]


def write_measured(path: Path, cases: list[dict] = CASES) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"batch": 256, "machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "cases": cases}))


def test_a_stage_takes_the_mfu_measured_for_its_size_side_and_gpu(nothing_measured):
    assert {s.mfu for s in plan_of("xxl_256").stages} == {Mfu(0.4, "assumed")}
    write_measured(nothing_measured)
    coarse, fine = plan_of("xxl_256").stages
    assert coarse.mfu == Mfu(0.4, "assumed"), "the case at side 2 failed, and that of B is of another size"
    source = (
        "benchmarks/results/mfu_gpu.json: XXL at side 1, engine eager, 256 images a step on one NVIDIA H100 80GB HBM3"
    )
    assert fine.mfu == Mfu(0.5, "measured", source)
    assert fine.compute_seconds == pytest.approx(plan_of("xxl_256", mfu=0.5).stages[1].compute_seconds)
    assert [s.mfu.share for s in plan_of("b_256").stages] == [0.2, 0.3]
    assert [s.mfu for s in plan_of("b_256", mfu=0.6).stages] == [Mfu(0.6, "given")] * 2
    assert {s.mfu.origin for s in plan_of("b_256", gpu="a100-80").stages} == {"assumed"}


def test_a_stage_takes_the_mfu_of_the_way_that_the_config_trains_in(nothing_measured):
    write_measured(nothing_measured)
    for overrides, share in (
        ([], 0.5),
        (["performance.compile=true"], 0.55),
        (["performance.compile=true", "performance.cuda_graphs=true"], 0.5),  # not measured: the slowest of the engine
    ):
        assert plan_of("xxl_256", *overrides).stages[1].mfu.share == share


def test_the_benchmark_names_its_ways_as_the_plan_does():
    from benchmarks.mfu import ENGINE, Case

    for compiled in (False, True):
        for graphs in (False, True):
            keys = [f"performance.compile={compiled}".lower(), f"performance.cuda_graphs={graphs}".lower()]
            config = load_config("b_256", None, keys, 8)
            assert mfu.way_of(config) == Case("B", ENGINE, compiled=compiled, graphs=graphs).way


def test_a_measured_mfu_is_not_taken_for_another_model_or_another_peak(nothing_measured):
    write_measured(nothing_measured)
    assert (
        plan_of("b_256", "model.size=null", "model.dim=768", "model.n_layers=13", "model.n_heads=12")
        .stages[0]
        .mfu.share
        == 0.2
    )
    for size in ("L", "XL"):
        assert {s.mfu.origin for s in plan_of("b_256", f"model.size={size}").stages} == {"assumed"}
    small = plan_of("b_256", "model.size=null", "model.dim=256", "model.n_layers=6", "model.n_heads=4")
    assert {s.mfu.origin for s in small.stages} == {"assumed"}
    config = load_config("b_256")
    faster = make_plan(config, find_gpu("h100", None, 2000, None), 8)
    assert {s.mfu.origin for s in faster.stages} == {"assumed"}


def test_the_plan_says_which_mfu_is_measured(nothing_measured):
    write_measured(nothing_measured)
    arguments = ["plan", "--recipe", "xxl_256", "--gpus", "32", "--gpu", "h100"]
    printed = CliRunner().invoke(app, arguments).output
    for expected in (
        "MFU at side 2: assumed; no measurement",
        "MFU at side 1: measured; it is lower on GPUs",
        "MFU: benchmarks/results/mfu_gpu.json: XXL at side 1, engine eager, 256 images",
    ):
        assert expected in " ".join(printed.split())
    printed_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["stages"]
    assert printed_json[0]["mfu"] == {"share": 0.4, "origin": "assumed", "source": None}
    assert (printed_json[1]["mfu"]["share"], printed_json[1]["mfu"]["origin"]) == (0.5, "measured")
    given = json.loads(CliRunner().invoke(app, [*arguments, "--mfu", "0.3", "--json"]).output)["stages"]
    assert [stage["mfu"] for stage in given] == [{"share": 0.3, "origin": "given", "source": None}] * 2


@pytest.mark.parametrize(
    "text, what",
    [
        ('{"cases": [{"si', "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"batch": 256, "cases": []}', "machine: .*Field required"),
        (
            json.dumps({"batch": 256, "machine": {"gpu": "H"}, "cases": [{**CASES[0], "mfu": 48.0}]}),
            r"cases.0.mfu: found 48.0: Input should be less than 1",
        ),
        (
            json.dumps({"batch": 256, "machine": {"gpu": "H"}, "cases": [{**CASES[0], "size": "S"}]}),
            r"cases.0.size: found 'S': .*expected one of B",
        ),
    ],
)
def test_a_damaged_file_of_measurements_is_an_error_that_names_it(nothing_measured, text, what):
    nothing_measured.parent.mkdir(parents=True)
    nothing_measured.write_text(text)
    with pytest.raises(UserError, match=rf"mfu_gpu.json: not what the benchmark writes: .*{what}.*or give --mfu"):
        plan_of("xxl_256")
    assert plan_of("xxl_256", mfu=0.4).stages


def test_other_gpus_are_given_by_their_figures():
    gpu = find_gpu("mine", 96, 500.0, 10)
    assert (gpu.memory_gb, gpu.tflops, gpu.bandwidth(8), gpu.bandwidth(64)) == (96, 500.0, 10, 10)
    assert find_gpu("h100", 94, None, None).tflops == GPUS["h100"].tflops
    with pytest.raises(UserError, match=r"--gpu mine: not one of a100-40, .*--gpu-memory"):
        find_gpu("mine", 96, None, None)


def test_plan_prints_tables_and_one_json_object():
    arguments = ["plan", "--recipe", "xxl_256", "--gpus", "32", "--gpu", "h100"]
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.output
    for expected in (
        "1,411.0M parameters",
        "0.625 in positions (token_cost)",
        "0.624 in FLOPs (flop_cost)",
        "0.814 in time (time_cost)",
        "time: 14.8 hours, 473 GPU-hours on 32 x h100",
        "(docs/planning.md): 1 takes 14.8 hours",
        "│ 40% │",
    ):
        assert expected in " ".join(printed.output.split())
    printed_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [stage["patch_side"] for stage in printed_json["stages"]] == [2, 1]
    assert sum(stage["share"] for stage in printed_json["stages"]) == pytest.approx(1)
    assert [zero["zero_stage"] for zero in printed_json["zero"]] == [1, 2, 3]
    parts = {"weights", "gradients", "optimizer", "ema", "activations", "logits", "buffers", "peak"}
    assert all(set(zero["memory"]) == parts for zero in printed_json["zero"])


WIDE = (
    "schedule.patch_sides=[8,4,2,1]", "schedule.coarse_batch_scale=64", "schedule.epochs=3000",
    "optimizer.learning_rate=0.000123456",
)  # fmt: skip


@pytest.mark.parametrize("columns, most", [(80, 80), (None, 100), (200, 100)])
def test_a_plan_fits_80_columns_and_at_most_100_beside_a_terminal(columns, most, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    cases = [["--recipe", name] for name in recipe_names() if name != "quickstart"] + [["--recipe", "2b_256", *WIDE]]
    for case in cases:
        result = CliRunner().invoke(app, ["plan", *case], env={"COLUMNS": columns and str(columns)})
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= most and "…" not in result.output
        first_cells = [line.split("│")[1].strip() for line in result.output.splitlines() if line.startswith("│")]
        assert all(first_cells), "no row is folded"


def test_json_holds_what_the_tables_and_the_picture_show():
    arguments = ["plan", "--recipe", "xxl_256", "--gpus", "32", "--json"]
    plan = json.loads(CliRunner().invoke(app, arguments).output)
    assert plan["flops"] / plan["next_token_flops"] == pytest.approx(plan["flop_cost"])
    assert (plan["bandwidth"], plan["usable_memory_gb"], plan["warnings"]) == (400, 72, [])
    for stage in plan["stages"]:
        assert stage["step_seconds"] == max(stage["compute_seconds"], stage["communication_seconds"])
        assert (stage["final_learning_rate"], stage["warmup_epochs"], stage["decay_epochs"]) == (1e-5, 1, 30)


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_schedule_is_drawn(tmp_path, suffix, magic):
    path = tmp_path / "new" / f"plan.{suffix}"
    result = CliRunner().invoke(app, ["plan", "--recipe", "xxl_256", *WIDE[:1], "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(magic)
    if suffix == "svg":
        text = path.read_text()
        for shown in ("Patch side", "8x8", "Learning rate", "next-token training: 8.28e+20", "0.572 of that", "epoch"):
            assert f"<!-- {shown}" in text or shown in text, shown


@pytest.mark.parametrize(
    "name, problem", [("plan.gif", "found suffix '.gif'"), ("plan", "found suffix ''"), ("x.png", "folder")]
)
def test_a_picture_that_cannot_be_written_is_an_error(tmp_path, name, problem):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match=problem):
        write_schedule(plan_of("b_256"), tmp_path / name)


def test_times_of_a_step_are_written_out():
    assert [milliseconds(t) for t in (0.0000101, 0.0108, 0.174, 2.84)] == ["0.0101", "10.8", "174", "2,840"]
    assert [duration(hours) for hours in (0.04, 47.9, 48, 2400)] == [
        "2:24 min",
        "47.9 hours",
        "2.0 days",
        "100.0 days",
    ]


def test_planning_needs_no_torch():
    code = "import sys, npp_ds.planning.plan, npp_ds.planning.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def documented_row(recipe: str) -> str:
    """A recipe's row of the table in docs/planning.md: `npp plan --recipe R --gpus 8 --gpu h100`."""
    plan = plan_of(recipe, gpus=8, mfu=0.4)
    chosen = next(zero for zero in plan.zero if zero.is_chosen)
    cells = [
        f"`{recipe}`",
        f"{plan.parameters / 1e6:,.0f}M",
        f"{plan.token_cost:.3f}",
        f"{plan.flop_cost:.3f}",
        f"{plan.flops:.2e}",
        f"{chosen.micro_batch_size}",
        f"{chosen.memory.peak / 1e9:.1f}",
        duration(24 * plan.days),
        f"{plan.gpu_hours:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def documented_batch_scaling(scale: int) -> list[str]:
    """The rows of the table on larger coarse batches."""
    plan = plan_of(
        "xxl_256", "schedule.patch_sides=[8,4,2,1]", f"schedule.coarse_batch_scale={scale}", gpus=32, mfu=0.4
    )
    return [
        f"| {scale} | {s.patch_side} | {s.batch_size} | {s.compute_seconds * 1e3:.1f} | "
        f"{s.communication_seconds * 1e3:.1f} | {s.limit} | {s.hours:.1f} |"
        for s in plan.stages
    ]


def documented_limit(gpus: int) -> str:
    """A row of the table on what limits a batch of 256 on many GPUs."""
    plan = plan_of("xxl_256", gpus=gpus, mfu=0.4)
    coarse, fine = plan.stages
    less = plan_of("xxl_256", "deepspeed.config=zero2_bf16_gradients", "precision=bf16", gpus=gpus, mfu=0.4)
    cells = [
        f"{gpus}",
        f"{256 // gpus}",
        f"{coarse.compute_seconds * 1e3:.1f}",
        f"{fine.compute_seconds * 1e3:.1f}",
        f"{fine.communication_seconds * 1e3:.1f}",
        *(f"{scaling.time_cost:.3f}" for scaling in plan.batch_scalings),
        f"{less.stages[-1].communication_seconds * 1e3:.1f}",
        f"{less.time_cost:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_documented_tables_are_what_the_command_says():
    rows = [documented_row(name) for name in recipe_names() if name != "quickstart"]
    rows += [*documented_batch_scaling(1), *documented_batch_scaling(16), *map(documented_limit, (8, 16, 32, 64))]
    text = DOCUMENTED.read_text()
    missing = [row for row in rows if row not in text]
    assert not missing, "\n".join(rows)


def test_no_recipe_needs_activation_checkpointing_on_80_gb():
    for name in recipe_names():
        config: RunConfig = load_config(name)
        assert config.model.activation_checkpointing == "none"
        if name != "quickstart":
            chosen = next(zero for zero in plan_of(name, gpus=8).zero if zero.is_chosen)
            assert chosen.fits and chosen.micro_batch_size == (16 if name == "xxl_384" else 32), name
            assert all(s.micro_batch_size == s.configured_micro_batch_size for s in plan_of(name, gpus=8).stages), name
