"""Does Muon help next-token training at equal FLOPs, its rate tuned? The setting that part 1 chose, in a bare loop.

Muon (https://kellerjordan.github.io/posts/muon/, torch's own) updates the matrices of attention and feed-forward
layers, AdamW the rest, with the peak rate that was best for it. Everything else, data order and dropout included, is
that of the chosen run, so "adamw" repeats it; rounding in another order makes long runs differ, by about 0.01 nats.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npp_ds.data.loader import EvalLoader, StageLoader
from npp_ds.data.store import stage_sets
from npp_ds.errors import UserError
from npp_ds.evaluation.likelihood import mean_nll
from npp_ds.training.engine import initial_model, parameter_groups
from npp_ds.utils.files import read_json, write_json_atomic
from npp_ds.utils.hash_rng import mix64
from studies.claim.plan import Plan, Run

MUON_FILE = "muon.json"
ARM = "next"  # its settings are those of the best run of part 1
RATES = (0.5, 1.0, 2.0, 4.0)  # Muon's peak rate over AdamW's; its updates are scaled to the size of AdamW's


def measure_muon(plan: Plan, out: Path, jobs: int) -> None:
    """Train AdamW alone and Muon with every rate, and write muon.json beside the results; finished runs stay."""
    if plan.resolved(ARM) is None:
        raise UserError(f"--part muon: {ARM} chooses from runs of earlier parts; run these first")
    (out / "muon").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(_trained, *zip(*[(plan, out, rate) for rate in (None, *RATES)], strict=True)))
    write_json_atomic(
        plan.results / MUON_FILE, {"settings_of": plan.chosen(ARM), "torch": torch.__version__, "runs": runs}
    )


def _trained(plan: Plan, out: Path, rate: float | None) -> dict[str, Any]:
    name = f"muon-{rate:g}" if rate else "adamw"
    path = out / "muon" / f"{name}.json"
    if path.is_file():
        return read_json(path)
    torch.set_num_threads(1)
    arm = plan.chosen(ARM) or ARM
    run = Run(plan.part_of[arm], arm, plan.parts[plan.part_of[arm]]["seeds"][0])
    config = plan.config(run, out / "codes", out / "muon" / name)
    assert config is not None
    train, val = stage_sets(config.data)
    assert val is not None
    (stage,) = config.build_schedule(len(train)).stages
    model = initial_model(config).train()
    optimizers = _optimizers(model, config.optimizer, rate)
    started = time.process_time()
    loader = StageLoader(
        train, stage, seed=config.seed, class_dropout=config.data.class_dropout, num_classes=config.model.num_classes,
        rank=0, world_size=1, first_step=0,
    )  # fmt: skip
    with loader:
        for batch in loader:
            ((codes, labels),) = batch.micro_batches
            torch.manual_seed(int(mix64(config.seed, batch.step, 0, 0)) >> 1)
            loss = model(codes, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
            for optimizer, factor in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * stage.learning_rate(batch.step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    seconds = time.process_time() - started
    nats = mean_nll(model.eval(), EvalLoader(val, 1, config.validation.batch_size, 0, 1), "cpu")
    result = {
        "name": name,
        "muon_rate": rate and rate * stage.peak_learning_rate,
        "nats": nats,
        "cpu_seconds": round(seconds, 1),
    }
    write_json_atomic(path, result)
    print(f"{name}: {nats:.4f} nats per code", flush=True)
    return result


def _optimizers(model: nn.Module, settings: Any, rate: float | None) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return optimizers with the factors of their learning rates."""
    matrices = (
        [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2] if rate else []
    )
    own = {id(p) for p in matrices}
    groups = [
        {**group, "params": [p for p in group["params"] if id(p) not in own]}
        for group in parameter_groups(model, settings.weight_decay)
    ]
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)
    found: list[tuple[torch.optim.Optimizer, float]] = [(adamw, 1.0)]
    if rate:
        muon = torch.optim.Muon(matrices, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        found.append((muon, rate))
    return found
