"""The parts of `benchmarks.gpu_check` that are neither tests nor other benchmarks.

    python -m benchmarks.gpu_parts NAME

Each part prints one JSON object. It runs on the GPU if there is one, else in a short form on the CPU. A part that finds
a wrong number ends with an error.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PACKAGES = ("torch", "deepspeed", "triton", "flash-attn", "numpy", "pydantic")
GRADIENT_ERROR = {"fp32": 1e-4, "autocast": 5e-2, "compiled": 5e-2}
"""Largest accepted relative error in the 2-norm: fp32 without TF32, and bf16 autocast."""
LEAST_AGREEMENT = {"fp32": 0.999, "tf32": 0.98, "fp16": 0.97, "bf16": 0.9}
"""Smallest accepted share of a trained tokenizer's codes that equal those in fp32 on the CPU, by precision."""
WANTED_CROPS = 1500
"""Required crops per second of VQ-16 in its fastest precision, on one H100 or H200."""
MOST_SCHEDULE_SHARE = 0.60
"""Largest accepted ratio of the wall-clock time of the four-level schedule to that of next-token training."""


def check(holds: bool, what: object) -> None:
    """Raise RuntimeError with `what` unless it holds."""
    if not holds:
        raise RuntimeError(str(what))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ||found - expected|| / ||expected|| in float64."""
    difference = found.detach().double().cpu() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    """Return the device's name and the versions that results depend on; None for what is not installed."""
    driver = None
    if ON_GPU:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
        except (OSError, subprocess.SubprocessError):
            driver = None
    versions = {
        "python": sys.version.split()[0],
        **{package: version_of(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if ON_GPU else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if ON_GPU else None,
        "driver": driver,
    }
    return {"device": torch.cuda.get_device_name() if ON_GPU else None, "versions": versions}


def patch_losses() -> dict[str, Callable[..., Tensor]]:
    """Return each implementation of the patch loss in the package that runs on this device, by name."""
    from npp_ds.model import patch_cross_entropy

    ways: dict[str, Callable[..., Tensor]] = {"torch": patch_cross_entropy}
    if ON_GPU:
        ways["triton"] = partial(patch_cross_entropy, kernel="triton")
    return ways


def patch_loss() -> dict:
    """Compare loss and gradients with float64 on the CPU, for vocabularies of 1000 and 4096 codes."""
    results = {}
    for vocabulary in (1000, 4096):
        for k in (1, 4, 16, 64):
            generator = torch.Generator().manual_seed(k)
            hidden = torch.randn(300, 128, generator=generator, requires_grad=True)
            weight = (0.2 * torch.randn(vocabulary, 128, generator=generator)).requires_grad_()
            targets = torch.randint(vocabulary, (300, k), generator=generator)
            targets[:100, -1] = targets[:100, 0]  # codes repeated within a patch
            h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
            logits = F.linear(h, w)
            loss = (logits.logsumexp(1) - logits.gather(1, targets).mean(1)).mean()
            expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (h, w))])
            for name, way in patch_losses().items():
                for precision in ("fp32", "autocast"):
                    inputs = [x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight)]
                    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
                        found = way(*inputs, targets.to(DEVICE))
                    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(found, inputs)])
                    errors = {"loss": found.item() - loss.item(), "gradient": relative_error(gradients, expected)}
                    results[f"{name}, {precision}, V {vocabulary}, k {k}"] = errors
                    tolerance = GRADIENT_ERROR[precision]
                    check(abs(errors["loss"]) < tolerance and errors["gradient"] < tolerance, results)
    return results


def gradients() -> dict:
    """Compare a model's loss and gradients at each patch side with float64 on the CPU, plain and with compiled blocks.

    Also report whether a second pass gives the same bits.
    """
    from npp_ds.model import ModelConfig, Transformer
    from npp_ds.training.performance import compile_blocks

    def model_and_batch(side: int, images: int) -> tuple[Transformer, Tensor, Tensor]:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(dim=256, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=4096))
        torch.nn.init.normal_(model.output.weight, std=0.05)
        codes = torch.randint(4096, (images, (16 // side) ** 2, side * side))
        codes[:, :, 1:] = torch.where(torch.rand(codes[:, :, 1:].shape) < 0.3, codes[:, :, :1], codes[:, :, 1:])
        return model, codes, torch.randint(1001, (images,))

    def gradient_of(model: Transformer) -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()

    results = {}
    for side in (1, 2, 4, 8):
        model, codes, labels = model_and_batch(side, 8 if ON_GPU else 2)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        reference = model.double()(codes, labels)
        reference.backward()
        expected = gradient_of(model)
        for way in GRADIENT_ERROR if ON_GPU else ("fp32", "autocast"):
            torch._dynamo.reset()
            model = model_and_batch(side, 1)[0]
            model.load_state_dict(start)
            model = model.to(DEVICE)
            if way == "compiled":
                compile_blocks(model)
            passes = []
            for _ in range(2):
                model.zero_grad()
                with torch.autocast(DEVICE, torch.bfloat16, enabled=way != "fp32"):
                    loss = model(codes.to(DEVICE), labels.to(DEVICE))
                loss.backward()
                passes.append(gradient_of(model))
            error = relative_error(passes[0], expected)
            results[f"side {side}, {way}"] = {
                "loss": loss.item() - reference.item(),
                "gradient": error,
                "repeats bit for bit": torch.equal(*passes),
            }
            check(error < GRADIENT_ERROR[way] and abs(loss.item() - reference.item()) < GRADIENT_ERROR[way], results)
    return results


def tokenizer_codes() -> dict:
    """Compare codes in four precisions, and decoded pixels, with those in fp32 on the CPU.

    The tokenizers are VQ-16 with random weights, on ten-crops of noise, and the shipped trained one, on shipped images.
    """
    import numpy as np

    from benchmarks.suite import ROOT
    from npp_ds.tokenizer import VQ16, VQModel, load_tokenizer
    from npp_ds.tokenizer.batches import BatchEncoder
    from npp_ds.tokenizer.sources import load_images, open_source
    from npp_ds.tokenizer.vq import PRECISIONS

    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 256, (1, 70, 70, 3), np.uint8)
    shipped = load_images(open_source([ROOT / "data_prep/fashion_mnist"], "val"), 32)[0][: 500 if ON_GPU else 20]
    cases = {
        "VQ-16, random weights": (VQModel(VQ16).eval(), (64, "ten", (1.1,), 10), noise),
        "shipped tokenizer": (load_tokenizer("fashion_mnist"), (32, "center", (), len(shipped)), shipped),
    }
    results = {}
    for name, (tokenizer, crops, images) in cases.items():
        expected = BatchEncoder(tokenizer.to("cpu"), *crops).encode([images])
        pixels = tokenizer.decode(expected[0, :1])
        agreement = {}
        for precision in PRECISIONS:
            codes = BatchEncoder(tokenizer.to(DEVICE), *crops, DEVICE, precision).encode([images]).cpu()
            agreement[precision] = (codes == expected).float().mean().item()
        error = relative_error(tokenizer.decode(expected[0, :1].to(DEVICE)), pixels)
        results[name] = {"share of codes as on the CPU": agreement, "decoded pixels": error}
        check(agreement["fp32"] >= LEAST_AGREEMENT["fp32"] and error < 1e-3, results)
    trained = results["shipped tokenizer"]["share of codes as on the CPU"]
    check(all(trained[p] >= least for p, least in LEAST_AGREEMENT.items()), results)
    return results


def synchronisations() -> dict:
    """Count how often the host waits for the device in a step of the engine with four micro-batches.

    DeepSpeed's calls to synchronize the whole device are counted on a CPU, too. The part fails if there are more than
    DeepSpeed 0.19.8 makes after backward passes with `overlap_comm`.
    """
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.step_loops import EngineLoop, batches_of
    from npp_ds.config.schema import RunConfig
    from npp_ds.training.deepspeed_config import import_deepspeed

    steps, results = (5 if ON_GPU else 1), {}
    accelerator = import_deepspeed().accelerator.get_accelerator()
    synchronize, waits = accelerator.synchronize, []
    accelerator.synchronize = lambda *arguments: waits.append(1) or synchronize(*arguments)
    for zero_stage in (1, 2, 3):
        keys = {
            "precision": "autocast_bf16" if ON_GPU else "fp32",
            "model": {"dim": 128, "n_layers": 2, "n_heads": 2, "vocab_size": 512},
            "data": {"train": "unused"},
            "deepspeed": {"config": f"zero{zero_stage}"},
            "schedule": {
                "batch_size": 16,
                "warmup_epochs": 0,
                "end_at_patch_side_one": False,
                "stages": [{"patch_side": 4, "epochs": 1, "micro_batch_size": 4}],
            },
        }
        config = RunConfig.model_validate(keys)
        (stage,) = config.build_schedule(16).stages
        loop, batches = EngineLoop(config, stage), batches_of(config, stage, torch.device(DEVICE))
        for _ in range(4):
            loop.step(stage, batches)
        waits.clear()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]) as profiled:
            for _ in range(steps):
                loop.step(stage, batches)
            counted = len(waits)
        counts = {
            e.key: e.count / steps
            for e in profiled.key_averages()
            if "ynchronize" in e.key or e.key == "aten::_local_scalar_dense"
        }
        results[f"ZeRO-{zero_stage}"] = {"DeepSpeed's synchronize": counted / steps, **counts}
        # With overlap_comm, DeepSpeed 0.19.8 synchronizes after each of ZeRO-2's 4 backward passes; its timer adds 5.
        check(counted <= (4 * steps if ON_GPU and zero_stage == 2 else 0), results)
    return results


def crops_per_second() -> dict:
    """Measure the speed of VQ-16 with random weights on ten-crops of 256 pixels, in each precision."""
    from benchmarks.tokenize import encoder_rate
    from npp_ds.tokenizer import VQ16, VQModel, load_tokenizer
    from npp_ds.tokenizer.vq import PRECISIONS

    torch.manual_seed(0)
    tokenizer = VQModel(VQ16).eval().to(DEVICE) if ON_GPU else load_tokenizer("fashion_mnist")
    crops, batches, precisions = (250, 4, PRECISIONS) if ON_GPU else (10, 1, ("fp32",))
    rates = {precision: encoder_rate(tokenizer, crops, DEVICE, precision, batches) for precision in precisions}
    name = "vq16_crops_per_second"
    return {"crops_per_second": rates, "ratios": {name: max(rates.values())}, "wanted": {name: WANTED_CROPS}}


def training_steps(size: str, sides: tuple[int, ...], graphs: bool = False) -> dict:
    """Measure steps of the engine with compiled blocks, and derive the wall-clock time of the four-level schedule."""
    from benchmarks.mfu import ENGINE, SIDES, Case, ratios_and_wanted, run_case

    batch, repeats = (256, 2) if ON_GPU else (16, 1)
    case = Case(size, ENGINE, compiled=True, graphs=graphs, sides=sides)
    if not ON_GPU:
        case = Case("small", ENGINE, sides=sides)
    try:
        rows = run_case(case, batch, repeats)
    except torch.OutOfMemoryError:
        rows = []
    if not rows:  # not in the handler, whose exception holds the memory
        gc.collect()
        torch.cuda.empty_cache()
        rows = run_case(replace(case, most_images=batch // 8), batch, repeats)
    ratios, wanted = ratios_and_wanted(rows)
    result = {"batch": batch, "cases": rows, "ratios": ratios, "wanted": wanted}
    if sides == SIDES:
        result["schedule"] = four_level_schedule({row["patch_side"]: row["seconds"] for row in rows})
        name = f"{size}_next_token_over_four_levels{'_graphs' if graphs else ''}"
        ratios[name] = 1 / result["schedule"]["share"]
        wanted[name] = 1 / MOST_SCHEDULE_SHARE
    return result


def four_level_schedule(seconds: dict[int, float]) -> dict:
    """Derive the wall-clock time of 300 epochs of ImageNet at sides 8, 4, 2, 1 from the seconds of a step by side.

    The time is the sum of steps times seconds over the recipe's stages; `share` is its ratio to the time of as many
    steps at side 1. Compiling, loading, validating and saving are not included.
    """
    from npp_ds.config.load import load_config
    from npp_ds.planning.plan import IMAGENET

    schedule = load_config("b_256", overrides=["schedule.patch_sides=[8, 4, 2, 1]"]).build_schedule(IMAGENET)
    steps = {stage.patch_side: stage.steps for stage in schedule.stages}
    hours = sum(count * seconds[side] for side, count in steps.items()) / 3600
    next_token = sum(steps.values()) * seconds[1] / 3600
    return {
        "how": "derived: measured seconds of a step times the steps of the recipe b_256 with four levels",
        "steps": steps,
        "hours": hours,
        "next_token_hours": next_token,
        "share": hours / next_token,
    }


def device_rates() -> dict:
    """Measure the device's rates: a large bf16 matrix product, and a large copy (bytes read and written)."""
    if not ON_GPU:
        return {}
    from triton.testing import do_bench

    from npp_ds.training.throughput import peak_tflops

    a, source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    product, copy = (do_bench(f, return_mode="median") / 1e3 for f in (lambda: a @ a, lambda: target.copy_(source)))
    return {
        "bf16 product, TFLOP/s": 2 * 8192**3 / product / 1e12,
        "copy, GB/s": 2 * 4 * 2**28 / copy / 1e9,
        "peak by data sheet, TFLOP/s": peak_tflops(torch.device("cuda", 0)),
    }


PARTS: dict[str, Callable[[], dict]] = {
    "machine": machine,
    "patch loss": patch_loss,
    "gradients": gradients,
    "tokenizer codes": tokenizer_codes,
    "synchronisations": synchronisations,
    "crops": crops_per_second,
    "steps B": partial(training_steps, "B", (8, 4, 2, 1)),
    "steps XXL": partial(training_steps, "XXL", (1,)),
    "steps B graphs": partial(training_steps, "B", (8, 4, 2, 1), graphs=True),
    "device rates": device_rates,
}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]]()))
