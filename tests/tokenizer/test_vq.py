"""The tokenizer computes what the published one does, from any file that holds its weights, and refuses the others."""

import json
import pickle
import runpy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from npp_ds.errors import UserError
from npp_ds.tokenizer import VQ8, VQ16, VQConfig, VQModel, load_tokenizer, save_tokenizer, to_input, to_uint8
from npp_ds.tokenizer.loading import METADATA_KEY, SHIPPED
from npp_ds.tokenizer.sources import load_images, open_source
from reference_weights import fill

ROOT = Path(__file__).parents[2]
TINY = VQConfig(32, (1, 2), num_res_blocks=1, z_channels=8, codebook_size=16, codebook_dim=4, norm_groups=8)


@pytest.fixture(scope="module")
def vectors():
    return np.load(Path(__file__).parents[1] / "data" / "vq16.npz")


@pytest.fixture(scope="module")
def published(vectors, tmp_path_factory):
    """A checkpoint laid out like the published vq_ds16_c2i.pt."""
    shapes = json.loads(str(vectors["names"]))
    usage = torch.zeros(shapes.pop("quantize.codebook_used"))
    weights = fill({name: tuple(shape) for name, shape in shapes.items()}, int(vectors["seed"]))
    state = {name: torch.from_numpy(value) for name, value in weights.items()}
    path = tmp_path_factory.mktemp("published") / "vq_ds16_c2i.pt"
    torch.save({"model": {**state, "quantize.codebook_used": usage}}, path)
    return path


@pytest.fixture(scope="module")
def vq16(published):
    return load_tokenizer(published)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = VQModel(TINY)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.half().float().eval()


def test_a_published_checkpoint_loads_with_its_shape_told_from_its_tensors(vq16, vectors):
    assert vq16.config == VQ16 and vq16.downsample == 16
    assert sum(parameter.numel() for parameter in vq16.parameters()) == int(vectors["params"]) == 71_883_403
    assert vq16.name == "vq_ds16_c2i.pt" and len(vq16.sha256) == 64
    assert not vq16.training and vq16.quantize.embedding.weight.dtype == torch.float32


def test_codes_equal_the_published_implementation(vq16, vectors):
    codes = vq16.encode(to_input(torch.from_numpy(vectors["images"])))
    assert codes.dtype == torch.int64
    assert np.array_equal(codes.numpy(), vectors["codes"])


def test_reconstruction_equals_the_published_implementation_to_1e_4(vq16, vectors):
    images = vq16.decode(torch.from_numpy(vectors["codes"].astype(np.int64))).numpy()
    error = np.linalg.norm(images - vectors["recon"]) / np.linalg.norm(vectors["recon"])
    assert images.shape == (2, 3, 64, 64) and error < 1e-4


def test_vq8_is_told_from_its_tensors_and_gives_four_times_the_codes(tmp_path):
    with torch.device("meta"):
        shapes = VQModel(VQ8).state_dict()
    torch.save(
        {name: torch.zeros(tensor.shape, dtype=torch.half) for name, tensor in shapes.items()}, tmp_path / "vq8.pt"
    )
    model = load_tokenizer(tmp_path / "vq8.pt")
    assert model.config == VQ8 and model.downsample == 8
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_codes_ignore_the_length_of_codebook_vectors(tiny):
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    codes, decoded = tiny.encode(images), tiny.decode(tiny.encode(images))
    with torch.no_grad():
        tiny.quantize.embedding.weight.mul_(torch.linspace(0.1, 9, 16)[:, None])
    assert torch.equal(tiny.encode(images), codes)
    torch.testing.assert_close(tiny.decode(codes), decoded)


def test_a_saved_tokenizer_loads_back_with_the_same_codes_and_the_same_bytes(tiny, tmp_path):
    save_tokenizer(tiny, tmp_path / "a.safetensors", {"note": 1})
    save_tokenizer(tiny, tmp_path / "b.safetensors", {"note": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_tokenizer(tmp_path / "a.safetensors")
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert loaded.config == TINY
    assert torch.equal(loaded.encode(images), tiny.encode(images))


def test_uint8_conversion_truncates_as_the_published_sampler_and_inverts_the_input_conversion():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_input(images)), images.add(torch.zeros_like(images)))
    edge = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 1.0, 9.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(edge)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, _: {"model": state, "optimizer": {}, "steps": 3},
        lambda state, _: {"state_dict": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        lambda state, _: {"module": state},
        lambda state, other: {"vq": other, "vq_ema": state, "steps": 5},
        lambda state, _: {"vq": {f"_orig_mod.{name}": value for name, value in state.items()}},
        lambda state, _: state,
    ],
)
def test_tokenizers_load_from_every_wrapping_and_of_two_the_average(wrap, tmp_path):
    torch.manual_seed(0)
    config = VQConfig(32, (1, 2), 1, 32, 64, 4)  # 32 groups, as in all published files
    model, other = VQModel(config), VQModel(config)
    torch.save(wrap(model.state_dict(), other.state_dict()), tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert loaded.config == config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


class Surprise:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/npp-ds-test-was-unpickled"),))


@pytest.mark.parametrize(
    "fault",
    ["missing", "empty", "text", "cut", "foreign", "no tensors", "pickle", "partial", "shape", "narrow", "NaN", "int8"],
)
def test_wrong_tokenizer_files_are_refused_with_the_file_named(fault, tiny, tmp_path):
    path = tmp_path / "wrong.pt"
    state = tiny.state_dict()
    if fault == "empty":
        path.touch()
    elif fault == "text":
        path.write_text("<html>404</html>")
    elif fault == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif fault == "foreign":
        torch.save({"model": {"tok_embeddings.weight": torch.zeros(3, 3)}}, path)
    elif fault == "no tensors":
        torch.save({"model": {"step": 3}}, path)
    elif fault == "pickle":
        path.write_bytes(pickle.dumps({"model": Surprise()}, protocol=2))
    elif fault == "partial":
        torch.save({name: value for name, value in state.items() if not name.startswith("decoder.")}, path)
    elif fault == "narrow":
        torch.save(VQModel(VQConfig(8, (1, 2), norm_groups=8, codebook_size=16)).state_dict(), path)
    elif fault in ("NaN", "int8"):
        change = {"NaN": lambda tensor: tensor * torch.nan, "int8": lambda tensor: tensor.to(torch.int8)}[fault]
        torch.save({**state, "quantize.embedding.weight": change(state["quantize.embedding.weight"])}, path)
    elif fault == "shape":
        torch.save({**state, "decoder.conv_out.bias": torch.zeros(4)}, path)
    with pytest.raises(UserError, match=r"wrong\.pt"):
        load_tokenizer(path)
    assert not Path("/tmp/npp-ds-test-was-unpickled").exists()


@pytest.mark.parametrize("change", [{"num_res_blocks": 10**9}, {"channels": "8"}, {"channel_multipliers": [1] * 10**6}])
def test_a_config_that_its_tensors_contradict_is_refused_before_a_model_is_built(tiny, tmp_path, change):
    from safetensors.torch import save_file

    metadata = {"npp_vq": json.dumps({"config": {**asdict(tiny.config), **change}})}
    save_file(tiny.state_dict(), tmp_path / "wrong.safetensors", metadata)
    with pytest.raises(UserError, match=r"wrong\.safetensors: .* is not the shape of its"):
        load_tokenizer(tmp_path / "wrong.safetensors")


def test_damaged_safetensors_and_their_metadata_are_refused(tiny, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "wrong.safetensors"
    save_tokenizer(tiny, path, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"wrong\.safetensors"):
        load_tokenizer(path)
    save_file(dict(tiny.state_dict()), path, {"npp_vq": '{"config": {"channels": 8}}'})
    with pytest.raises(UserError, match="channel_multipliers"):
        load_tokenizer(path)


def test_an_unknown_tokenizer_name_is_answered_with_the_shipped_ones():
    with pytest.raises(UserError, match="fashion_mnist"):
        load_tokenizer("cifar")


@pytest.fixture(scope="module")
def script():
    """The names of data_prep/train_tokenizer.py."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "data_prep" / "train_tokenizer.py")))


@pytest.fixture(scope="module")
def validation_images():
    return load_images(open_source([ROOT / "data_prep" / "fashion_mnist"], "val"), 32)[0]


def test_the_shipped_tokenizer_uses_its_codes_and_reconstructs_the_shipped_validation_images(script, validation_images):
    model = load_tokenizer("fashion_mnist")
    assert model.name == "fashion_mnist" and model.config.codebook_size == 512
    assert model.encode(to_input(torch.from_numpy(validation_images[:2]))).shape == (2, 64)
    measured = script.measure(model, validation_images)
    assert measured["mean_absolute_error"] <= 0.03
    assert measured["codes_used"] >= 0.9
    with safe_open(SHIPPED["fashion_mnist"], "pt") as file:
        recorded = json.loads(file.metadata()[METADATA_KEY])["training"]["validation"]
    assert measured["mean_absolute_error"] == pytest.approx(recorded["mean_absolute_error"], rel=1e-3)
    assert SHIPPED["fashion_mnist"].stat().st_size < 1.5e6


def test_training_lowers_the_error_spreads_the_codes_and_is_reproducible(script, validation_images, capsys):
    config = replace(script.SMALL_VQ, channels=8, channel_multipliers=(1, 1, 2), z_channels=8, codebook_size=32)
    settings = script.TokenizerTraining(steps=40, batch_size=16, warmup_steps=5, autoencoder_steps=10, precision="fp32")
    images = validation_images[:64]
    untrained = script.measure(VQModel(config), images)
    model = script.train(images, config, settings, log_every=20)
    measured = script.measure(model, images)
    assert measured["mean_absolute_error"] < 0.6 * untrained["mean_absolute_error"]
    assert measured["codes_used"] == 1.0 and measured["perplexity"] > 8
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["step 20", "step 40"]
    again = script.train(images, config, settings)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_codes_that_fall_out_of_use_move_to_latents_that_occur(script):
    torch.manual_seed(0)
    config, settings = replace(TINY, codebook_size=32), script.TokenizerTraining(codebook_decay=0.5)
    early, late = (torch.nn.functional.normalize(torch.randn(400, 4) + shift, dim=-1) for shift in (8.0, -2.0))
    kept, revived = (script.SphericalCodebook(early, config, settings) for _ in range(2))
    for _ in range(12):
        for codebook, revive in ((kept, False), (revived, True)):
            codebook.update(late, codebook.nearest(late), revive)
    assert len(kept.nearest(late).unique()) < 16
    assert len(revived.nearest(late).unique()) >= 30
    torch.testing.assert_close(revived.vectors.norm(dim=-1), torch.ones(32))
