"""Train and measure one run of the study, and run those of a part, several at a time; all of it resumes."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import npp_ds
from npp_ds.checkpoint.open import open_weights
from npp_ds.errors import UserError
from npp_ds.evaluation.extractors import Extractor
from npp_ds.evaluation.likelihood import likelihood_of
from npp_ds.evaluation.metrics import Statistics
from npp_ds.model import Transformer
from npp_ds.sampling.folder import tiled
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import build_model, labels_of, sample_images
from npp_ds.tokenizer import load_tokenizer
from npp_ds.tokenizer.vq import VQModel
from npp_ds.training.metrics import events_named, read_events
from npp_ds.training.preemption import StopRequests
from npp_ds.training.trainer import train
from npp_ds.utils.files import sha256, write_atomic, write_json_atomic
from studies.claim.data import BATCH, DEVICE, extractor_of, quality_of, real_statistics
from studies.claim.plan import Plan, Run

CPU_FILE = "cpu_seconds.json"
POLL_SECONDS = 1.0
SWEEP_FACTOR = 1.5
SHOWN = 40


def make_run(plan: Plan, run: Run, images: Path, out: Path) -> None:
    """Train a run from its newest checkpoint on, measure it, and write its result. Raises Preempted at a signal."""
    run_dir = out / "runs" / run.name
    plan.results.mkdir(parents=True, exist_ok=True)
    config = plan.config(run, out / "codes", run_dir)
    if config is None:
        raise UserError(f"{run.name}: it chooses from runs that have not finished; run the earlier parts first")
    with StopRequests() as stop, _CpuSeconds(run_dir / CPU_FILE) as cpu:
        train(config, None, stop)
    stages = plan.stages(run.arm) or []
    events = read_events(run_dir / "metrics.jsonl")
    curve = [(e["step"], e["nll"]) for e in events_named(events, "validation") if e["patch_side"] == 1]
    flops = [(0, 0), *plan.flops(stages)]
    result = {
        "run": run.name,
        "part": run.part,
        "arm": run.arm,
        "seed": run.seed,
        "plan_sha256": plan.sha256_of[run.part],
        "chosen": plan.chosen(run.arm),
        "keys": plan.resolved(run.arm),
        "stages": stages,
        "updates": flops[-1][0],
        "images_seen": sum(s["steps"] * s["batch_size"] for s in stages),
        "flops": flops[-1][1],
        "curve": [{"step": step, "flops": round(_interpolated(flops, step)), "nats": nll} for step, nll in curve],
        "nats": curve[-1][1],
        "cpu_seconds": round(cpu.total, 1),
        **_measured(plan, run, images, out, run_dir),
        "tokenizer_sha256": sha256(plan.tokenizer),
        "torch": torch.__version__,
        "npp_ds": npp_ds.__version__,
        "machine": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()}, 1 thread",
        "load_average": round(os.getloadavg()[0], 1),
    }
    write_json_atomic(plan.file(run), result)


class _CpuSeconds:
    """The processor time of a block, added to that of earlier blocks in a file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "_CpuSeconds":
        self.before = json.loads(self.path.read_text()) if self.path.is_file() else 0.0
        self.started = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.total = self.before + time.process_time() - self.started
        if self.path.parent.is_dir():
            write_json_atomic(self.path, self.total)


def _interpolated(points: Sequence[tuple[int, int]], step: int) -> float:
    """Return the FLOPs after a step; `points` are those at the ends of the stages."""
    for (first, before), (last, after) in pairwise(points):
        if step <= last:
            return before + (after - before) * (step - first) / (last - first)
    return points[-1][1]


def _measured(plan: Plan, run: Run, images: Path, out: Path, run_dir: Path) -> dict[str, Any]:
    """Return test loss and sample quality, where the plan asks for them."""
    part, found = plan.parts[run.part], {}
    weights = open_weights(run_dir)
    if part.get("test"):
        found["test_nats"] = likelihood_of(weights, out / "codes" / "test", device=DEVICE)["nats_per_code"]
    if not part.get("samples", True):
        return found
    s, tokenizer = plan.keys["samples"], load_tokenizer(plan.tokenizer).to(DEVICE)
    extractor = extractor_of(plan)
    real = real_statistics(images, plan.keys["data"]["image_size"], out, extractor)
    model, side = build_model(weights, DEVICE), weights.patch_side or 1

    def judged(count: int, seed: int, cfg: float) -> tuple[dict[str, Any], np.ndarray]:
        return _judged(model, tokenizer, extractor, real, count, Options(seed=seed, cfg_scale=cfg, patch_side=side))

    sweep = sweep_of(lambda cfg: judged(s["sweep_images"], s["sweep_seed"], cfg)[0], s["cfg_scales"])
    best = min(sweep, key=lambda result: result["frechet_distance"])
    final, shown = judged(s["images"], s["seed"], best["cfg_scale"])
    if run.seed == part["seeds"][0]:
        write_atomic(plan.results / f"{run.name}.png", lambda file: tiled(shown, 10).save(file, "PNG"))
    return {**found, "sweep": sweep, **final}


def sweep_of(measure: Callable[[float], dict[str, Any]], scales: Sequence[float]) -> list[dict[str, Any]]:
    """Return what `measure` finds at each guidance scale, and at larger ones while the largest is the best."""
    found = [measure(scale) for scale in scales]
    while min(found, key=lambda result: result["frechet_distance"]) is found[-1]:
        found.append(measure(SWEEP_FACTOR * found[-1]["cfg_scale"]))
    return found


def _judged(
    model: Transformer,
    tokenizer: VQModel,
    extractor: Extractor,
    real: Statistics,
    count: int,
    options: Options,
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the quality of `count` samples, with labels in turn, and the first of them."""
    labels = labels_of(np.arange(count), range(model.config.num_classes), "balanced", options.seed)
    shown: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for numbers in np.split(np.arange(count), range(BATCH, count, BATCH)):
            pixels = sample_images(
                model,
                tokenizer.decode,
                labels[numbers],
                numbers,
                options,
                batch_size=BATCH,
                capture=DEVICE == "cuda",
            )
            shown.append(pixels[: SHOWN if not shown else 0])
            yield pixels

    quality = quality_of(batches(), labels, extractor, real)
    return {"cfg_scale": options.cfg_scale, **quality}, shown[0]


def run_part(plan: Plan, part: int, arguments: Sequence[str], jobs: int) -> None:
    """Make all runs of a part that have no result, `jobs` processes at a time. Raises UserError if one fails.

    At SIGTERM or SIGINT the runs in progress save a checkpoint and end; the same command resumes them.
    """
    waiting = [run for run in plan.runs(part) if plan.result(run) is None]
    if not waiting:
        print(f"part {part}: all runs have results in {plan.results}; other --results make them again", flush=True)
    active: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    stopping = False
    with StopRequests() as stop, ExitStack() as at_error:
        at_error.callback(lambda: [process.terminate() for process in active.values()])
        while waiting or active:
            for run in [run for run, process in active.items() if process.poll() is not None]:
                finished = plan.result(run) is not None
                print(f"{run.name}: {'finished' if finished else 'ended without a result'}", flush=True)
                del active[run]
                if not finished:
                    failed.append(run.name)
            if not stopping and (failed or stop.requested):
                stopping, waiting = True, []
                for process in active.values():
                    process.send_signal(signal.SIGTERM)
            ready = [run for run in waiting if plan.stages(run.arm)]
            if waiting and not ready and not active:
                raise UserError(f"{waiting[0].name}: it chooses from runs of earlier parts; run these first")
            for run in ready[: jobs - len(active)]:
                waiting.remove(run)
                print(f"{run.name}: started, {len(waiting)} to go", flush=True)
                active[run] = subprocess.Popen(
                    [sys.executable, "-m", "studies.claim", *arguments, "--run", run.name],
                    start_new_session=True,  # Ctrl-C reaches this process alone, which sends one SIGTERM
                )
            time.sleep(POLL_SECONDS)
    if stop.requested:
        raise UserError(f"{stop.requested}: stopped; rerun the same command to resume")
    if failed:
        raise UserError(f"{', '.join(failed)}: failed, see the messages above; rerun the same command to resume")
