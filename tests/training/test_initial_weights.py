"""A run starts from the same weights whatever its ZeRO stage, precision, device and version of PyTorch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_loops import BareLoop, EngineLoop
from npp_ds.distributed.process_group import Processes
from npp_ds.model import Transformer
from npp_ds.training.engine import initial_model
from runs import tiny_config


def test_a_seed_has_these_weights_in_every_version_of_pytorch(tmp_path):
    first_and_last = {
        "cls_embedding.embedding_table.weight": [0.01425802, -0.01270085, 0.01229046],
        "layers.1.feed_forward.w2.weight": [0.01697972, -0.03179282, -0.01178295],
    }
    weights = initial_model(tiny_config(tmp_path, tmp_path)).state_dict()
    for name, values in first_and_last.items():  # processors differ in the last digits of a logarithm
        assert weights[name].flatten()[[0, 1, -1]].tolist() == pytest.approx(values, abs=1e-7), name


def test_weights_in_bf16_are_those_in_float32_rounded(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    exact = initial_model(config).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = initial_model(config).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name


def test_the_weights_of_a_model_on_a_gpu_are_generated_on_the_cpu(tmp_path, monkeypatch):
    generated, normal = set(), torch.Tensor.normal_

    def watched(tensor, *arguments, **options):
        generated.add((tensor.device.type, tensor.dtype))
        return normal(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", watched)
    with FakeTensorMode(), torch.device("cuda"):  # stand-ins for a GPU's tensors
        model = initial_model(tiny_config(tmp_path, tmp_path))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert generated == {("cpu", torch.float32)}


def test_a_model_without_data_takes_no_random_numbers(tmp_path):
    config = initial_model(tiny_config(tmp_path, tmp_path)).config
    before = torch.get_rng_state()
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in Transformer(config).parameters())
    assert torch.equal(torch.get_rng_state(), before)


def _differing_weights(processes: Processes, config) -> list[str]:
    """The parameters in which the engine's float32 weights are not those of the benchmarks' bare loop, rounded."""
    engine = EngineLoop(config, config.build_schedule(160, processes.world_size).stages[0]).engine
    bare = BareLoop(config, compiled=False, graphs=False, device=processes.device).model.state_dict()
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    masters = engine.partitions.masters
    wholes = {name: engine.partitions.whole(masters, name, processes.device) for name in engine.partitions.shapes}
    assert wholes.keys() == bare.keys()
    return [name for name, whole in wholes.items() if not torch.equal(whole, bare[name].to(dtype).float())]


@pytest.mark.processes
@pytest.mark.parametrize(  # autocast last: it leaves a mark on DeepSpeed's module
    "precision, zero_stage",
    [("bf16", 2), ("bf16", 3), *[(precision, stage) for precision in ("fp32", "autocast_bf16") for stage in (1, 2, 3)]],
)
def test_every_engine_and_the_bare_loop_of_the_benchmarks_start_from_the_same_weights(
    pair, tmp_path, precision, zero_stage
):
    config = tiny_config(tmp_path, tmp_path, precision=precision, deepspeed={"config": f"zero{zero_stage}"})
    assert pair.run(_differing_weights, config) == [[], []]
