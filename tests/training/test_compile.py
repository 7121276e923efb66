"""Compiled blocks: one compilation for each stage's shape, the losses of plain ones, and resumption bit for bit."""

from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer
from npp_ds.training import performance as compiling
from npp_ds.training.hooks import Hook
from npp_ds.training.performance import check_performance
from npp_ds.training.trainer import Trainer
from runs import WATCHED, assert_same, metrics_of, outcome_of, run, run_and_stop_after, tiny_config

COMPILED = {"performance": {"compile": True}}
NOT_INDUCTOR = {"backend": "aot_eager"}
"""Traces forward and backward pass as always, then runs PyTorch's own operations instead of generated code."""


def traced_run(processes, config) -> list[tuple[int, int]]:
    """A run with `NOT_INDUCTOR`; (patch side, shapes compiled so far) after every step."""
    torch._dynamo.reset()
    counters.clear()
    found = []

    class Count(Hook):
        def is_due(self, stage, done):
            return True

        def run(self, context):
            found.append((context.stage.patch_side, counters["stats"]["unique_graphs"]))

    with patch.object(compiling, "how_to_compile", lambda: NOT_INDUCTOR):
        trainer = Trainer(config, processes)
        trainer.hooks.append(Count())
        trainer.run()
    assert not counters["graph_break"]
    return found


def test_a_stage_compiles_once_and_validation_between_its_steps_never(pair, shards, tmp_path, undisturbed):
    for found in pair.run(traced_run, tiny_config(shards, tmp_path / "run", **WATCHED, **COMPILED)):
        assert found == [(4, 1)] * 10 + [(2, 2)] * 10 + [(1, 3)] * 20
    assert_same_losses(metrics_of(tmp_path / "run"), undisturbed.metrics)


@pytest.mark.slow
def test_compiled_blocks_train_alike_with_activation_checkpointing_and_zero_1(pair, shards, tmp_path):
    keys = {"deepspeed": {"config": "zero1"}, "model": {"activation_checkpointing": "block"}}
    for found in pair.run(traced_run, tiny_config(shards, tmp_path / "compiled", **WATCHED, **COMPILED, **keys)):
        assert found[-1] == (1, 3)
    pair.run(run, tiny_config(shards, tmp_path / "plain", **WATCHED, **keys))
    assert_same_losses(metrics_of(tmp_path / "compiled"), metrics_of(tmp_path / "plain"))


def assert_same_losses(lines, others, rel=1e-4):
    assert [(line["event"], line["step"]) for line in lines] == [(line["event"], line["step"]) for line in others]
    for key in ("loss", "nll", "grad_norm"):
        values, wanted = ([line[key] for line in m if key in line] for m in (lines, others))
        assert values == pytest.approx(wanted, rel=rel), key
    assert len({line["loss"] for line in lines if line["event"] == "train"}) > 30


def inductor_run(processes, config, stop_after=None) -> None:
    torch._dynamo.reset()
    run(processes, config) if stop_after is None else run_and_stop_after(processes, config, stop_after)


@pytest.mark.slow
@pytest.mark.parametrize("precision, stop_after", [("fp32", 10), ("autocast_bf16", 13)])
def test_a_compiled_run_resumes_bit_for_bit_with_dropout(pair, shards, tmp_path, monkeypatch, precision, stop_after):
    keys = {**WATCHED, **COMPILED, "precision": precision}
    pair.run(inductor_run, tiny_config(shards, tmp_path / "undisturbed", **keys), timeout=280)
    config = tiny_config(shards, tmp_path / "stopped", **keys)
    pair.run(inductor_run, config, stop_after, timeout=280)
    pair.stop()  # other processes go on, which find nothing that was compiled
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    pair.run(inductor_run, config, timeout=280)
    pair.stop()
    assert list((tmp_path / "empty").iterdir())
    assert_same(outcome_of(tmp_path / "stopped"), outcome_of(tmp_path / "undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_generated_code_gives_the_loss_and_gradients_of_plain_blocks(checkpointing):
    torch._dynamo.reset()
    config = ModelConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, grid_size=4, num_classes=10, ffn_multiple_of=32,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    names = list(model.state_dict())
    codes, labels = torch.randint(100, (8, 16, 1)), torch.randint(10, (8,))

    def loss_and_gradients():
        model.zero_grad()
        loss = model(codes, labels)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = loss_and_gradients()
    compiling.compile_blocks(model)
    for found, value in zip(loss_and_gradients(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] and list(model.state_dict()) == names


def test_dropout_in_compiled_blocks_follows_the_seed_alone():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, grid_size=4, residual_dropout=0.5))
    torch.nn.init.normal_(model.output.weight, std=0.1)
    with patch.object(compiling, "how_to_compile", lambda: NOT_INDUCTOR):
        compiling.compile_blocks(model)
    codes, labels, losses = torch.randint(50, (2, 16, 1)), torch.zeros(2, dtype=torch.int64), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(model(codes, labels).item())
    assert losses[0] == losses[2] != losses[1]
    model.scale_dropout(0)
    assert model(codes, labels).item() == pytest.approx(model.eval()(codes, labels).item(), rel=1e-6)


@pytest.mark.parametrize("kernel", ["auto", "sdpa_math"])
def test_compiled_blocks_hold_the_chosen_attention_kernel_without_a_break(kernel):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=50, grid_size=4, attention=kernel))
    torch.nn.init.normal_(model.output.weight, std=0.1)
    codes, labels = torch.randint(50, (2, 16, 1)), torch.zeros(2, dtype=torch.int64)
    expected = model(codes, labels)
    with patch.object(compiling, "how_to_compile", lambda: {"backend": "eager"}):
        compiling.compile_blocks(model)
    with torch.profiler.profile() as profiler:
        torch.testing.assert_close(model(codes, labels), expected)
    seen = {e.key for e in profiler.key_averages()}
    assert ("aten::_scaled_dot_product_attention_math" in seen) == (kernel == "sdpa_math")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_more_stages_than_pytorch_compiles_by_itself_stay_compiled():
    compiling.compile_blocks(Transformer(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=50)))
    assert torch._dynamo.config.recompile_limit >= 64


def problems(shards, tmp_path, **sections) -> str:
    with pytest.raises(UserError) as caught:
        check_performance(tiny_config(shards, tmp_path, **sections))
    return str(caught.value)


def test_pairs_that_cannot_work_are_refused_together(shards, tmp_path, monkeypatch):
    both = {"performance": {"compile": True, "cuda_graphs": True, "loss_kernel": "triton"}}
    monkeypatch.setattr(compiling, "which", lambda name: None)
    text = problems(
        shards,
        tmp_path,
        **both,
        deepspeed={"config": "zero3"},
        model={"activation_checkpointing": "selective"},
    )
    for expected in (
        "performance.compile: ZeRO-3 (deepspeed.config zero3) gathers weights by hooks",
        "performance.cuda_graphs: ZeRO-3 (deepspeed.config zero3) gathers weights by hooks",
        "performance.compile: needs a C++ compiler, found none on PATH; install it",
        "performance.compile: compiled blocks hide their operations from model.activation_checkpointing=selective",
        "performance.cuda_graphs: needs a CUDA device, found none",
        "performance.loss_kernel: triton needs a CUDA device, found none; set performance.loss_kernel=torch",
        "performance.cuda_graphs: model.activation_checkpointing=selective reads the state of the random numbers",
    ):
        assert expected in text
    check_performance(tiny_config(shards, tmp_path, deepspeed={"config": "zero3"}))


@pytest.mark.parametrize(
    ("missing", "lack"),
    [("find_spec", "the package triton, found none"), ("which", "a C compiler, found none on PATH")],
)
def test_the_triton_loss_is_refused_where_triton_cannot_compile(shards, tmp_path, monkeypatch, missing, lack):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiling, "find_spec", lambda name: True)
    monkeypatch.setattr(compiling, "which", lambda name: name)
    check_performance(tiny_config(shards, tmp_path, performance={"loss_kernel": "triton"}))
    monkeypatch.setattr(compiling, missing, lambda name: None)
    text = problems(shards, tmp_path, performance={"loss_kernel": "triton"})
    assert text == f"performance.loss_kernel: triton needs {lack}; install it, or set performance.loss_kernel=torch"


def test_an_attention_kernel_that_cannot_is_told_before_anything_is_compiled(shards, tmp_path):
    config = tiny_config(shards, tmp_path, **COMPILED, model={"attention": "sdpa_cudnn"})
    with pytest.raises(UserError, match=r"attention: sdpa_cudnn needs a CUDA device, found torch\.float32 on cpu"):
        compiling.apply_performance(
            Transformer(ModelConfig(dim=32, n_layers=1, n_heads=2)), config, torch.device("cpu")
        )
