"""Export and import: published files in, ours and published files out, every tensor bit for bit."""

import argparse
import json
import math
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from npp_ds.checkpoint.export import export_weights
from npp_ds.checkpoint.llamagen import CLASS_EMBEDDING
from npp_ds.checkpoint.open import METADATA_KEY, Weights, open_weights
from npp_ds.cli import app
from npp_ds.config.schema import ModelSection
from npp_ds.errors import UserError
from npp_ds.model import ModelConfig, Transformer, patches
from npp_ds.sampling.job import Request
from npp_ds.sampling.logits_processing import Options
from npp_ds.sampling.sampler import build_model, generate
from npp_ds.sizes import SIZES
from published_models import published_model
from sample_sets import tiny_run

HEADS = {"gpt_small": 4, "gpt_gqa": 6}
GRIDS = {"gpt_small": 8, "gpt_gqa": 16}
WRAPPINGS = {
    "DDP": lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(ema=True)},
    "DeepSpeed": lambda state: {"module": state, "ds_version": "0.14", "optimizer": None},
    "state_dict": lambda state: {"state_dict": state},
    "FSDP": lambda state: state,
    "FSDP, wrapped by layer": lambda state: {
        "_fsdp_wrapped_module." + re.sub(r"^(layers\.\d+)\.", r"\1._fsdp_wrapped_module._orig_mod.", name): value
        for name, value in state.items()
    },
    "DDP, compiled": lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
}


def published_file(path: Path, name: str, wrap=WRAPPINGS["DDP"]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint laid out as published, and its weights."""
    model, _ = published_model(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(wrap(state), path)
    return path, state


def open_published(path: Path, name: str, **arguments) -> Weights:
    return open_weights(path, n_heads=HEADS[name], grid_size=GRIDS[name], **arguments)


def model_of(weights: Weights) -> Transformer:
    model = Transformer(ModelConfig(**{**weights.model.arguments()}))
    model.load_state_dict(weights.read())
    return model.eval()


def logits(model: Transformer, vectors: dict[str, np.ndarray]) -> np.ndarray:
    codes = patches.group(torch.from_numpy(vectors["codes"].astype(np.int64)), 1)
    with torch.no_grad():
        return model(codes, torch.from_numpy(vectors["labels"]), output="logits").numpy()


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
def test_published_files_in_every_wrapping_give_the_published_logits(tmp_path, name, wrapping):
    path, state = published_file(tmp_path / "c2i.pt", name, WRAPPINGS[wrapping])
    export_weights(open_published(path, name), tmp_path / "ours.safetensors")
    ours = open_weights(tmp_path / "ours.safetensors")
    model, vectors = published_model(name)
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "grid_size", "num_classes"):
        assert getattr(model_of(ours).config, key) == getattr(model.config, key), key
    assert_same_tensors(ours.read(), state)
    expected = vectors["logits_p1"]
    assert np.abs(logits(model_of(ours), vectors) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert ours.step == (7 if wrapping == "DDP" else None)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_imported_model_samples_the_published_greedy_sequences(tmp_path, cfg_scale):
    path, _ = published_file(tmp_path / "c2i.pt", "gpt_small")
    export_weights(open_published(path, "gpt_small"), tmp_path / "ours.safetensors")
    _, vectors = published_model("gpt_small")
    labels = torch.from_numpy(vectors["sample_labels"])
    model = model_of(open_weights(tmp_path / "ours.safetensors"))
    codes = generate(model, labels, torch.arange(len(labels)), Options(cfg_scale=cfg_scale, temperature=0.0))
    assert np.array_equal(codes.numpy(), vectors[f"greedy_cfg{cfg_scale}"])


@pytest.mark.parametrize("name", ["gpt_small", "gpt_gqa"])
def test_published_to_ours_and_back_is_bit_equal_and_loads_as_the_published_scripts_load(tmp_path, name):
    path, state = published_file(tmp_path / "c2i.pt", name)
    export_weights(open_published(path, name), tmp_path / "ours.safetensors")
    export_weights(open_weights(tmp_path / "ours.safetensors"), tmp_path / "back.pt", layout="published")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(content) == ["model"]
    assert_same_tensors(content["model"], state)
    model, vectors = published_model(name)
    assert {key: list(t.shape) for key, t in content["model"].items()} == json.loads(str(vectors["names"]))
    before = logits(model, vectors)
    model.load_state_dict(content["model"], strict=True)
    assert np.array_equal(logits(model, vectors), before)
    size = sum(tensor.nbytes for tensor in state.values())
    assert size < (tmp_path / "back.pt").stat().st_size < size + 100_000, "each tensor is saved once, and nothing else"


def test_an_exported_file_is_ordinary_safetensors_that_describes_itself(tmp_path):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_gqa")
    export_weights(open_published(path, "gpt_gqa"), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert_same_tensors({name: file.get_tensor(name) for name in state}, state)
        facts = json.loads(file.metadata()[METADATA_KEY])
    assert facts["model"]["n_kv_heads"] == 2
    assert (facts["name"], facts["step"], facts["kind"]) == ("c2i", 7, "raw")
    assert facts["source"] == {"sha256": open_published(path, "gpt_gqa").sha256}
    (tmp_path / "elsewhere").mkdir()
    export_weights(open_published(path.rename(tmp_path / "elsewhere/c2i.pt"), "gpt_gqa"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_do_not_ask_for_the_attention_kernel_of_their_run(tmp_path):
    run = tiny_run(tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("attention: auto", "attention: flash_attn"))
    weights = open_weights(run)
    assert "flash_attn" in (run / "config.yaml").read_text() and weights.model.attention == "auto"
    export_weights(weights, tmp_path / "tiny.safetensors")
    build_model(open_weights(tmp_path / "tiny.safetensors"), "cpu")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layout, suffix", [("safetensors", ".safetensors"), ("published", ".pt")])
def test_half_precision_files_come_back_as_fp32_rounded_once(tmp_path, dtype, layout, suffix):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_small")
    out = (tmp_path / "half").with_suffix(suffix)
    export_weights(open_published(path, "gpt_small"), out, layout=layout, dtype=dtype)
    assert out.stat().st_size < 0.6 * path.stat().st_size
    rounded = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = open_published(out, "gpt_small").read()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_same_tensors(found, {name: tensor.to(rounded).float() for name, tensor in state.items()})


def test_values_beyond_fp16_are_refused_and_nothing_is_left_behind(tmp_path):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_small")
    torch.save({**state, "output.weight": state["output.weight"] * 1e6}, path)
    for out, layout in (("a.safetensors", "safetensors"), ("a.pt", "published")):
        with pytest.raises(UserError, match=r"output\.weight: has values that fp16 cannot hold; use --dtype bf16"):
            export_weights(open_published(path, "gpt_small"), tmp_path / out, layout=layout, dtype="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["c2i.pt"]


def test_the_published_average_is_read_on_request(tmp_path):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_small")
    average = {name: tensor / 2 for name, tensor in state.items()}
    with pytest.raises(UserError, match=r"c2i\.pt: holds no `ema` entry"):
        open_published(path, "gpt_small", variant="ema")
    torch.save({"model": state, "ema": average}, path)
    weights = open_published(path, "gpt_small", variant="ema")
    assert_same_tensors(weights.read(), average)
    assert_same_tensors(open_published(path, "gpt_small").read(), state)
    export_weights(weights, tmp_path / "ema.safetensors")
    assert open_weights(tmp_path / "ema.safetensors").variant == "ema"
    assert_same_tensors(open_weights(tmp_path / "ema.safetensors", variant="ema").read(), average)
    export_weights(open_published(path, "gpt_small"), tmp_path / "raw.safetensors")
    with pytest.raises(UserError, match="holds raw weights, no ema"):
        open_weights(tmp_path / "raw.safetensors", variant="ema")


def shape_only(path: Path, **arguments) -> Path:
    """A published file of zeros, which take no room, in the shape of a model."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(ModelConfig(**arguments)).state_dict().items()}
    torch.save({"model": {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}}, path)
    return path


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_published_sizes_are_recognised(tmp_path, size):
    weights = open_weights(shape_only(tmp_path / "c2i.pt", **SIZES[size]))
    assert weights.model == ModelSection(size=size)


def test_heads_of_the_published_3b_model_are_not_64_wide(tmp_path):
    path = shape_only(tmp_path / "c2i_3B.pt", dim=3200, n_layers=24, n_heads=32)
    assert open_weights(path, grid_size=24).model.shape() == {"dim": 3200, "n_layers": 24, "n_heads": 32}
    assert open_weights(path, grid_size=24).model.grid_size == 24


def test_grid_and_heads_are_taken_from_the_file_if_it_contains_them(tmp_path):
    model, _ = published_model("gpt_small")
    table = torch.zeros(24 * 24 + 1, 64 // 4 // 2, 2)
    torch.save({"model": {**model.state_dict(), "freqs_cis": table}}, tmp_path / "table.pt")
    weights = open_weights(tmp_path / "table.pt")
    assert (weights.model.grid_size, weights.model.n_heads) == (24, 4)
    assert set(weights.read()) == set(model.state_dict())
    with pytest.raises(UserError, match="its grid size is 24, but 16 was requested"):
        open_weights(tmp_path / "table.pt", grid_size=16)
    arguments = argparse.Namespace(image_size=384, downsample_size=16)
    torch.save({"model": model.state_dict(), "args": arguments}, tmp_path / "arguments.pt")
    assert open_weights(tmp_path / "arguments.pt").model.grid_size == 24
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pt")
    assert open_weights(tmp_path / "plain.pt").model.grid_size == 16


def without_null_class(path: Path, num_classes: int = 10) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint that was trained without class dropout: 10 rows of classes; its arguments give the number."""
    arguments = argparse.Namespace(num_classes=num_classes)
    return published_file(
        path,
        "gpt_small",
        lambda state: {
            "model": {**state, CLASS_EMBEDDING: state[CLASS_EMBEDDING][:10].clone()},
            "args": arguments,
        },
    )


def test_a_published_model_without_a_null_class_keeps_its_classes_and_cannot_be_guided(tmp_path):
    path, state = without_null_class(tmp_path / "c2i.pt")
    export_weights(open_published(path, "gpt_small"), tmp_path / "ours.safetensors")
    for weights in (open_published(path, "gpt_small"), open_weights(tmp_path / "ours.safetensors")):
        assert weights.model.num_classes == 10 and "10 classes and no null class" in weights.describe()
        tensors = weights.read()
        assert torch.equal(tensors[CLASS_EMBEDDING][:10], state[CLASS_EMBEDDING][:10])
        assert not tensors[CLASS_EMBEDDING][10].any()
        tokenizer = SimpleNamespace(name="vq", config=SimpleNamespace(codebook_size=weights.model.vocab_size))
        Request(classes=range(10), count=10).check(weights, tokenizer)
        with pytest.raises(UserError, match=r"cfg_scale: found 1\.5, but the model was trained without class dropout"):
            Request(classes=range(10), count=10, options=Options(cfg_scale=1.5)).check(weights, tokenizer)
        export_weights(weights, tmp_path / "back.pt", layout="published", force=True)
        back = torch.load(tmp_path / "back.pt", weights_only=False)
        assert_same_tensors(back["model"], {**state, CLASS_EMBEDDING: state[CLASS_EMBEDDING][:10]})
        assert not open_published(tmp_path / "back.pt", "gpt_small").has_null_class


@pytest.mark.parametrize(
    "known, complaint", [(9, None), (10, None), (1000, "has 10 rows, but args.num_classes is 1000")]
)
def test_the_arguments_of_a_published_file_say_whether_the_last_row_is_the_null_class(tmp_path, known, complaint):
    path, _ = without_null_class(tmp_path / "c2i.pt", known)
    if complaint:
        with pytest.raises(UserError, match=complaint):
            open_published(path, "gpt_small")
    else:
        weights = open_published(path, "gpt_small")
        assert (weights.model.num_classes, weights.has_null_class) == (known, known == 9)


def test_a_run_without_class_dropout_has_no_null_class(tmp_path):
    run_dir = tiny_run(tmp_path / "run")
    assert open_weights(run_dir).has_null_class
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("class_dropout: 0.1", "class_dropout: 0.0"))
    assert not open_weights(run_dir).has_null_class


def _changed(state, **changes):
    return {**state, **changes}


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda s: {"model": {"step": 3}}, "no weights under model, module, state_dict or at the top; found model"),
        (lambda s: [1, 2], "no weights under .* found nothing"),
        (lambda s: {"encoder.weight": torch.zeros(2, 2)}, "embedding_table.weight is missing; found encoder.weight"),
        (
            lambda s: {n: t for n, t in s.items() if "layers.1.feed_forward" not in n},
            r"w1.weight is missing; .*w3.weight is missing; .*w2.weight is missing$",
        ),
        (
            lambda s: _changed(s, a=torch.zeros(1), b=torch.zeros(1), c=torch.zeros(1), d=torch.zeros(1)),
            "a does not belong there; b does not belong there; c does not belong there and 1 more",
        ),
        (
            lambda s: _changed(s, **{"norm.weight": torch.zeros(3)}),
            r"norm.weight is \[3\], expected \[64\]",
        ),
        (lambda s: _changed(s, **{"norm.weight": torch.zeros(64, dtype=torch.int8)}), "norm.weight is torch.int8"),
        (
            lambda s: _changed(s, **{"tok_embeddings.weight": torch.zeros(128, 60)}),
            r"\(--heads\)",
        ),
    ],
)
def test_files_that_hold_no_such_model_are_refused_with_what_is_wrong(tmp_path, make, complaint):
    model, _ = published_model("gpt_small")
    torch.save(make(model.state_dict()), tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=rf"wrong\.pt: .*{complaint}"):
        open_weights(tmp_path / "wrong.pt", n_heads=None if "heads" in complaint else 4)


def with_tensor(path: Path, name: str, change, layout: str) -> Path:
    """A file of weights in which one tensor has been changed, as published or as `npp export` lays it out."""
    source, state = published_file(path.with_suffix(".pt"), "gpt_small")
    if layout == "published":
        torch.save({"model": {**state, name: change(state[name])}}, source)
        return source
    export_weights(open_published(source, "gpt_small"), path.with_suffix(".safetensors"))
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        metadata = file.metadata()
    save_file({**state, name: change(state[name])}, path.with_suffix(".safetensors"), metadata)
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("layout", ["published", "safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_named(tmp_path, layout, value, dtype):
    def change(tensor):
        tensor.view(-1)[7] = value
        return tensor.to(dtype)

    path = with_tensor(tmp_path / "bad", "layers.1.attention.wo.weight", change, layout)
    weights = open_weights(path, n_heads=4, grid_size=8)
    wanted = r"layers\.1\.attention\.wo\.weight: 1 of 4,096 values are NaN or infinite"
    with pytest.raises(UserError, match=wanted):
        build_model(weights, "cpu")
    with pytest.raises(UserError, match=wanted):
        export_weights(weights, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("layout", ["published", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_tensors_of_other_types_than_weights_are_refused_at_opening(tmp_path, layout, dtype):
    path = with_tensor(tmp_path / "bad", "output.weight", lambda tensor: tensor.to(dtype), layout)
    with pytest.raises(UserError, match=r"bad\.\w+: output\.weight is \S+, expected a floating-point type"):
        open_weights(path, n_heads=4, grid_size=8)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_published_file_that_was_zipped_again_holds_the_same_weights(tmp_path, compression):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_small")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "again.pt", "w", compression) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert_same_tensors(open_published(tmp_path / "again.pt", "gpt_small").read(), state)


class Surprise:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/npp-ds-test-weights-were-unpickled"),))


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path):
    torch.save({"model": Surprise()}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=r"wrong\.pt: holds more than tensors and plain values \(getattr\)") as refused:
        open_weights(tmp_path / "wrong.pt")
    assert "weights_only" not in str(refused.value), "no advice to run it all the same"
    assert not Path("/tmp/npp-ds-test-weights-were-unpickled").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_published_files_are_distinguished_from_those_with_other_objects(tmp_path, legacy):
    path = tmp_path / "c2i.pt"
    torch.save({"model": {"a": torch.ones(100)}}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"c2i\.pt: damaged, or not a PyTorch checkpoint; fetch it again"
        ) as refused:
            open_weights(path)
        assert "weights_only" not in str(refused.value)


def test_damaged_and_foreign_safetensors_are_refused(tmp_path):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_small")
    out = tmp_path / "ours.safetensors"
    export_weights(open_published(path, "gpt_small"), out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"ours\.safetensors: damaged"):
        open_weights(out)
    out.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UserError, match="format 9, this version reads 1"):
        open_weights(out)
    out.write_bytes(whole.replace(b'\\"n_layers\\": 2', b'\\"n_layers\\": 3'))
    with pytest.raises(UserError, match=r"layers\.2\.attention\.wqkv\.weight is missing"):
        open_weights(out)
    out.write_bytes(whole.replace(b'\\"n_layers\\": 2', b'\\"n_layers\\": x'))
    with pytest.raises(UserError, match="its entry npp_weights is not readable"):
        open_weights(out)
    save_file(state, out)
    with pytest.raises(UserError, match="expected a file made by npp export or npp import"):
        open_weights(out)


def test_a_checkpoint_is_opened_by_its_record_and_sizes_and_read_whole_only_to_verify_it(tmp_path, monkeypatch):
    run_dir = tiny_run(tmp_path / "run")
    (victim,) = (run_dir / "checkpoints/step-00000120").glob("*.safetensors")
    whole = victim.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("npp_ds.checkpoint.folders.sha256", lambda path: pytest.fail(f"{path} was read whole"))
        assert open_weights(run_dir).step == open_weights(run_dir, step=120).step == 120
    victim.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"requested, but incomplete: .* its SHA-256 is not the recorded one"):
        open_weights(run_dir, step=120, verify=True)
    done = CliRunner().invoke(app, ["export", str(run_dir), "--out", str(tmp_path / "out.safetensors")])
    assert isinstance(done.exception, UserError) and "no complete checkpoint" in str(done.exception)
    victim.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(run_dir)


def test_requesting_what_a_file_does_not_have_is_an_error(tmp_path):
    path, _ = published_file(tmp_path / "c2i.pt", "gpt_small")
    with pytest.raises(UserError, match="step 3 requested, but a file holds a single step"):
        open_published(path, "gpt_small", step=3)
    with pytest.raises(UserError, match=r"nowhere: not found; expected the folder of a run"):
        open_weights(tmp_path / "nowhere")
    export_weights(open_published(path, "gpt_small"), tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match="its number of heads is 4, but 8 was requested"):
        open_weights(tmp_path / "ours.safetensors", n_heads=8)


def test_existing_files_are_replaced_only_if_forced_and_suffixes_must_match_the_format(tmp_path):
    path, _ = published_file(tmp_path / "c2i.pt", "gpt_small")
    weights, out = open_published(path, "gpt_small"), tmp_path / "ours.safetensors"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already; give --force"):
        export_weights(weights, out)
    assert out.read_text() == "mine"
    export_weights(weights, out, force=True)
    assert open_weights(out).sha256
    with pytest.raises(UserError, match=r"the suffix of a file in published format is \.pt"):
        export_weights(weights, tmp_path / "new.safetensors", layout="published")
    with pytest.raises(UserError, match="no such folder"):
        export_weights(weights, tmp_path / "none" / "new.safetensors")
    with pytest.raises(UserError, match="--dtype: found 'int8', expected one of fp32, bf16, fp16"):
        export_weights(weights, tmp_path / "new.safetensors", dtype="int8")


def test_import_and_export_from_the_command_line(tmp_path):
    path, state = published_file(tmp_path / "c2i.pt", "gpt_gqa")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pt"
    refused = CliRunner().invoke(app, ["import", str(path), "--out", str(ours)])
    assert isinstance(refused.exception, UserError)
    assert "its width 96 does not divide into heads of width 64, the usual one" in str(refused.exception)
    done = CliRunner().invoke(app, ["import", str(path), "--out", str(ours), "--heads", "6"])
    assert "3 layers of 6 heads, 2 of keys and values, dim 96, 300 codes, grid 16x16, 10 classes" in done.output
    done = CliRunner().invoke(app, ["export", str(ours), "--out", str(back), "--format", "published"])
    assert done.exit_code == 0
    assert_same_tensors(torch.load(back, weights_only=True)["model"], state)
